"""Health checks: what a probe comes to, what all of them come to, and how long that takes."""

from __future__ import annotations

import copy
import datetime as dt
import gc
import json
import pickle
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from tests._circuits import CLOSED, HALF_OPEN, ISOLATED, OPEN
from tests.operations import fails, leaves, returns
from tests.test_hedge import Legs
from trio_resilience import (
    CallAbandonedError,
    CallFinished,
    CallStarted,
    CircuitBreaker,
    CircuitOpenError,
    Constant,
    Event,
    FailureRecord,
    OperationTimeoutError,
    Retry,
    subscribe,
)
from trio_resilience._errors import ProbeFailedError
from trio_resilience._events import CircuitState, HealthChecked, HealthStatus, TimedOut
from trio_resilience._health import (
    DEGRADED,
    HEALTHY,
    UNHEALTHY,
    HealthCheck,
    HealthReport,
    ServiceHealth,
    check_health,
    status_of_all,
    status_of_service,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


async def ping() -> None:
    """Answer after a tenth of a second."""
    await trio.sleep(0.1)


def failing(error: BaseException | None = None) -> Callable[[], Awaitable[object]]:
    return partial(fails, OSError("down") if error is None else error)


async def check_one(check: HealthCheck) -> ServiceHealth:
    return (await check_health({"it": check})).services["it"]


def opened(**options: Any) -> CircuitBreaker:
    """A breaker that one failure opens, for a minute."""
    return CircuitBreaker("db", failure_threshold=1, recovery_timeout=60, **options)


async def open_circuit(**options: Any) -> CircuitBreaker:
    breaker = opened(**options)
    with pytest.raises(OSError, match="down"):
        await breaker.call(failing())
    assert breaker.state is OPEN
    return breaker


# --- one service ----------------------------------------------------------------------------------


async def test_a_service_whose_probe_returns_is_healthy(autojump_clock: MockClock) -> None:
    found = await check_one(HealthCheck(ping))
    assert found == ServiceHealth(HEALTHY, True, 0.1, 1, None)  # noqa: FBT003


@pytest.mark.parametrize("result", [None, True, 0, "", {"status": "down"}], ids=repr)
async def test_any_result_but_false_says_that_it_works(result: object) -> None:
    """Also one that counts as false: a probe that returns nothing has succeeded."""
    assert (await check_one(HealthCheck(partial(returns, result)))).status is HEALTHY


async def test_a_probe_that_returns_false_has_failed() -> None:
    found = await check_one(HealthCheck(partial(returns, False)))  # noqa: FBT003
    assert found.status is UNHEALTHY
    assert found.error is not None
    assert found.error.type_name == "ProbeFailedError"
    assert found.error.message == "the probe of 'it' returned False"


async def test_a_probe_that_raises_has_failed(autojump_clock: MockClock) -> None:
    """What it raised is kept in words, with the time at which it did."""
    probe = Legs([(3, ConnectionError("refused"))])
    found = await check_one(HealthCheck(probe))
    assert found.status is UNHEALTHY
    assert found.error == FailureRecord("ConnectionError", "refused", 3)
    assert (found.response_time, found.attempts) == (3, 1)


async def test_a_programming_error_in_a_probe_is_a_failure_like_any_other() -> None:
    """A report that does not come helps nobody."""
    found = await check_one(HealthCheck(failing(TypeError("int + str"))))
    assert (found.status, found.error and found.error.type_name) == (UNHEALTHY, "TypeError")


async def test_a_probe_that_hangs_is_cancelled_and_has_failed(autojump_clock: MockClock) -> None:
    probe = Legs([1000])
    found = await check_one(HealthCheck(probe, timeout=dt.timedelta(seconds=2)))
    assert found.status is UNHEALTHY
    assert found.error is not None
    assert found.error.type_name == "OperationTimeoutError"
    assert found.error.message == "it took longer than 2 s"
    assert (found.response_time, found.attempts, probe.cancelled_at) == (2, 1, {0: 2})


async def test_an_answer_that_is_late_is_an_answer(mock_clock: MockClock) -> None:
    """A probe that never looks up can't be cancelled, and has succeeded all the same."""

    async def busy() -> None:
        mock_clock.jump(7)

    assert (await check_one(HealthCheck(busy, timeout=2))).status is HEALTHY


async def test_a_probe_that_shields_itself_is_waited_for(autojump_clock: MockClock) -> None:
    """That is the one way to hold a report up."""

    async def stubborn() -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(9)
        await trio.sleep(9)

    found = await check_one(HealthCheck(stubborn, timeout=2))
    assert (found.status, found.response_time) == (UNHEALTHY, 9)


async def test_what_is_quoted_of_an_error_is_bounded() -> None:
    """Nor does one that can't be read keep the report from coming."""

    class MuteError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    long = await check_one(HealthCheck(failing(OSError("x" * 10_000))))
    assert long.error is not None
    assert len(long.error.message) < 300
    assert (await check_one(HealthCheck(failing(MuteError())))).status is UNHEALTHY


@pytest.mark.parametrize("retry", [None, Retry(max_attempts=2, backoff=Constant(1))])
async def test_nothing_of_a_failed_probe_is_kept_alive(
    autojump_clock: MockClock, retry: Retry | None
) -> None:
    """Only words, without the garbage collector's help."""

    class Connection:
        pass

    seen: list[weakref.ref[Connection]] = []

    async def probe() -> None:
        connection = Connection()
        seen.append(weakref.ref(connection))
        raise OSError(connection)

    gc.disable()
    try:
        report = await check_health({"it": HealthCheck(probe, retry=retry, breaker=opened())})
        assert report.status is UNHEALTHY
        assert [ref() for ref in seen] == [None] * len(seen)
        assert seen
    finally:
        gc.enable()


# --- attempts -----------------------------------------------------------------------------------


async def test_a_probe_is_tried_again(autojump_clock: MockClock) -> None:
    """The time of all attempts, and of the waits between them, is the response time."""
    probe = Legs([(1, OSError()), (1, OSError()), 1])
    retry = Retry(max_attempts=5, backoff=Constant(10))
    found = await check_one(HealthCheck(probe, timeout=60, retry=retry))
    assert (found.status, found.attempts, found.response_time) == (HEALTHY, 3, 23)
    assert found.error is None


async def test_a_probe_that_returns_false_is_tried_again(autojump_clock: MockClock) -> None:
    results = [False, False, True]

    async def probe() -> bool:
        return results.pop(0)

    retry = Retry(on=ProbeFailedError, backoff=Constant(1))
    found = await check_one(HealthCheck(probe, retry=retry))
    assert (found.status, found.attempts) == (HEALTHY, 3)


async def test_the_last_error_is_the_one_that_is_reported(autojump_clock: MockClock) -> None:
    probe = Legs([(0, OSError("first")), (0, OSError("last"))])
    found = await check_one(HealthCheck(probe, retry=Retry(max_attempts=2, backoff=Constant(1))))
    assert found.error is not None
    assert (found.attempts, found.error.message) == (2, "last")


async def test_the_timeout_is_for_all_attempts_together(autojump_clock: MockClock) -> None:
    """No wait between two of them goes beyond it, either."""
    hanging = Legs([(1, OSError()), 1000])
    retry = Retry(max_attempts=9, backoff=Constant(1))
    found = await check_one(HealthCheck(hanging, timeout=5, retry=retry))
    assert (found.attempts, found.response_time) == (2, 5)
    assert found.error is not None
    assert found.error.type_name == "OperationTimeoutError"
    failing_fast = Legs([(1, OSError("down"))])
    found = await check_one(HealthCheck(failing_fast, timeout=5.5, retry=retry))
    assert (found.attempts, found.response_time) == (3, 5)
    assert found.error is not None
    assert found.error.message == "down"


# --- several --------------------------------------------------------------------------------------


async def test_a_hung_and_a_failing_probe_are_reported_within_the_timeout(
    autojump_clock: MockClock,
) -> None:
    """With status, response time, attempts and error for each."""
    hung, broken = Legs([1000]), Legs([(0.5, ConnectionError("refused"))])
    checks = {
        "database": HealthCheck(hung, timeout=2),
        "cache": HealthCheck(
            broken, critical=False, timeout=3, retry=Retry(max_attempts=2, backoff=Constant(1))
        ),
        "queue": HealthCheck(ping),
    }
    report = await check_health(checks)
    assert trio.current_time() == 2
    assert report.as_dict() == {
        "status": "unhealthy",
        "is_stale": False,
        "time": 2.0,
        "services": {
            "database": {
                "status": "unhealthy",
                "critical": True,
                "response_time": 2.0,
                "attempts": 1,
                "error": {
                    "type": "OperationTimeoutError",
                    "message": "database took longer than 2 s",
                },
                "circuit": None,
            },
            "cache": {
                "status": "unhealthy",
                "critical": False,
                "response_time": 2.0,
                "attempts": 2,
                "error": {"type": "ConnectionError", "message": "refused"},
                "circuit": None,
            },
            "queue": {
                "status": "healthy",
                "critical": True,
                "response_time": 0.1,
                "attempts": 1,
                "error": None,
                "circuit": None,
            },
        },
    }


async def test_probes_run_side_by_side(autojump_clock: MockClock) -> None:
    """The report comes after the longest of the timeouts, however many hang."""
    hung = {f"service {n}": HealthCheck(trio.sleep_forever, timeout=n) for n in range(1, 101)}
    report = await check_health(hung)
    assert trio.current_time() == 100
    assert [found.response_time for found in report.services.values()] == [*range(1, 101)]


async def test_services_come_in_the_order_in_which_they_were_given(
    autojump_clock: MockClock,
) -> None:
    """Not in that in which they answer."""
    slow, quick = HealthCheck(partial(trio.sleep, 3)), HealthCheck(partial(trio.sleep, 1))
    assert [*(await check_health({"b": slow, "a": quick})).services] == ["b", "a"]


async def test_each_probe_runs_in_a_task_of_its_own_beneath_the_caller() -> None:
    """Whose name says what it is for; all have ended in the end."""
    names: list[str] = []

    async def probe() -> None:
        task = trio.lowlevel.current_task()
        names.append(task.name)
        assert task.parent_nursery is not None
        assert task.parent_nursery.parent_task is caller

    caller = trio.lowlevel.current_task()
    before = [*caller.child_nurseries]
    await check_health({"a": HealthCheck(probe), "b": HealthCheck(probe)}, name="ready")
    assert sorted(names) == ["ready: a", "ready: b"]
    assert caller.child_nurseries == before


async def test_the_same_checks_serve_many_callers_at_once(autojump_clock: MockClock) -> None:
    reports: list[HealthReport] = []
    checks = {"a": HealthCheck(ping), "b": HealthCheck(trio.sleep_forever, timeout=1)}

    async def call() -> None:
        reports.append(await check_health(checks))

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(call)
    assert [found.services["b"].attempts for found in reports] == [1] * 5
    assert trio.current_time() == 1


async def test_without_services_all_is_healthy() -> None:
    report = await check_health({})
    assert report.is_healthy
    assert report.services == {}
    with trio.CancelScope() as scope:
        scope.cancel()
        await check_health({})
    assert scope.cancelled_caught


# --- the status of all ----------------------------------------------------------------------------


services = st.builds(
    ServiceHealth,
    status=st.sampled_from(HealthStatus),
    critical=st.booleans(),
    response_time=st.just(0.0),
    attempts=st.just(1),
    error=st.none(),
)


@given(st.dictionaries(st.text(max_size=2), services, max_size=6), services, st.text(max_size=2))
def test_the_status_of_all_is_no_better_than_that_of_each(
    found: dict[str, ServiceHealth], extra: ServiceHealth, name: str
) -> None:
    """It is the worst, where one that is not critical does no worse than degrade it."""

    def weight(service: ServiceHealth) -> int:
        rank = [*HealthStatus].index(service.status)
        return rank if service.critical else min(rank, 1)

    rank = [*HealthStatus].index
    total = rank(status_of_all(found))
    assert total == max(map(weight, found.values()), default=0)
    # One more service makes it as bad as that one is, or leaves it as it was.
    found.pop(name, None)
    before = rank(status_of_all(found))
    assert rank(status_of_all({**found, name: extra})) == max(before, weight(extra))


@pytest.mark.parametrize("circuit", [None, *CircuitState])
def test_the_status_of_a_service(circuit: CircuitState | None) -> None:
    """A failure counts whatever the circuit does; a success counts if others can have one."""
    failure = FailureRecord("OSError", "down", 0)
    assert status_of_service(failure, circuit, is_refused=False) is UNHEALTHY
    assert status_of_service(failure, circuit, is_refused=True) is DEGRADED
    whole = circuit in {None, CLOSED}
    expected = HEALTHY if whole else DEGRADED
    assert status_of_service(None, circuit, is_refused=False) is expected


@pytest.mark.parametrize(
    "critical, works, status, http_status",
    [
        (True, True, HEALTHY, 200),
        (False, True, HEALTHY, 200),
        (True, False, UNHEALTHY, 503),
        (False, False, DEGRADED, 200),
    ],
)
async def test_a_service_that_is_not_critical_only_degrades(
    critical: bool, works: bool, status: HealthStatus, http_status: int
) -> None:
    check = HealthCheck(partial(returns, works), critical=critical)
    report = await check_health({"it": check, "other": HealthCheck(ping)})
    assert (report.status, report.http_status) == (status, http_status)
    assert report.is_healthy is (status is HEALTHY)
    assert report.services["it"].critical is critical
    # What the service itself is, is told as it is.
    assert report.services["it"].status is (HEALTHY if works else UNHEALTHY)


async def test_a_report_serialises_to_json(autojump_clock: MockClock) -> None:
    breaker = await open_circuit()
    check = HealthCheck(ping, breaker=breaker)
    report = await check_health({"db": check, "none": HealthCheck(ping)})
    read = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert read == report.as_dict()
    assert read["services"]["db"]["circuit"] == "open"
    assert {type(value) for value in report.services["db"].as_dict().values()} == {
        str,
        bool,
        float,
        int,
        dict,
    }


async def test_a_report_can_be_pickled_and_copied() -> None:
    report = await check_health({"it": HealthCheck(failing())})
    assert pickle.loads(pickle.dumps(report)) == report  # noqa: S301 - it is our own
    assert copy.deepcopy(report) == report


def test_a_failed_probe_is_an_error_that_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(ProbeFailedError("db")))  # noqa: S301 - it is our own
    assert (type(error), error.name, str(error)) == (
        ProbeFailedError,
        "db",
        "the probe of 'db' returned False",
    )


# --- circuits -------------------------------------------------------------------------------------


async def test_an_open_circuit_degrades_and_the_probe_is_not_called(
    autojump_clock: MockClock,
) -> None:
    """It says why, though the service is critical."""
    breaker, probe = await open_circuit(), Legs([1])
    report = await check_health({"it": HealthCheck(probe, breaker=breaker)})
    found = report.services["it"]
    assert (report.status, found.status, found.circuit) == (DEGRADED, DEGRADED, OPEN)
    assert (found.attempts, probe.began_at) == (0, [])
    assert found.error is not None
    assert found.error.type_name == "CircuitOpenError"
    assert found.error.message == (
        "circuit 'db' is open; try again in 60 s; last failure: OSError: down"
    )


async def test_an_isolated_circuit_degrades(autojump_clock: MockClock) -> None:
    breaker = opened()
    with breaker.isolate():
        found = await check_one(HealthCheck(ping, breaker=breaker))
    assert (found.status, found.circuit, found.attempts) == (DEGRADED, ISOLATED, 0)
    assert (await check_one(HealthCheck(ping, breaker=breaker))).status is HEALTHY


async def test_a_check_is_the_probe_of_a_circuit_when_that_is_due(
    autojump_clock: MockClock,
) -> None:
    """Its success closes it, and all is well."""
    breaker = await open_circuit()
    await trio.sleep(60)
    found = await check_one(HealthCheck(ping, breaker=breaker))
    assert (found.status, found.circuit, breaker.state) == (HEALTHY, CLOSED, CLOSED)


async def test_a_check_that_fails_as_the_probe_of_a_circuit_opens_it_again(
    autojump_clock: MockClock,
) -> None:
    """It was made, and the service has failed."""
    breaker = await open_circuit()
    await trio.sleep(60)
    found = await check_one(HealthCheck(failing(), breaker=breaker))
    assert (found.status, found.circuit, breaker.retry_after) == (UNHEALTHY, OPEN, 60)


async def test_a_half_open_circuit_degrades(autojump_clock: MockClock) -> None:
    """It refuses most calls, until it has proven itself."""
    breaker = await open_circuit(success_threshold=2)
    await trio.sleep(60)
    found = await check_one(HealthCheck(ping, breaker=breaker))
    assert (found.status, found.circuit, found.error) == (DEGRADED, HALF_OPEN, None)


async def test_checks_feed_the_circuit(autojump_clock: MockClock) -> None:
    """A probe that fails, returns `False` or hangs counts as a failed call."""
    breaker = CircuitBreaker(failure_threshold=3)
    hung = HealthCheck(trio.sleep_forever, timeout=1, breaker=breaker)
    await check_one(HealthCheck(failing(), breaker=breaker))
    await check_one(HealthCheck(partial(returns, False), breaker=breaker))  # noqa: FBT003
    assert breaker.statistics().consecutive_failures == 2
    found = await check_one(hung)
    assert (found.status, breaker.state) == (UNHEALTHY, OPEN)
    assert breaker.last_failure is not None
    assert breaker.last_failure.message == "it took longer than 1 s"


async def test_all_attempts_of_a_check_are_one_verdict(autojump_clock: MockClock) -> None:
    breaker = CircuitBreaker(failure_threshold=5)
    retry = Retry(max_attempts=3, backoff=Constant(1))
    found = await check_one(HealthCheck(failing(), retry=retry, breaker=breaker))
    assert (found.attempts, breaker.statistics().failures) == (3, 1)
    found = await check_one(HealthCheck(Legs([(0, OSError()), 0]), retry=retry, breaker=breaker))
    assert (found.status, breaker.statistics().failures, breaker.statistics().calls) == (
        HEALTHY,
        1,
        2,
    )


async def test_a_circuit_that_only_watches_changes_nothing(autojump_clock: MockClock) -> None:
    """Nobody is refused; it is shown."""
    breaker = await open_circuit(enforce=False)
    found = await check_one(HealthCheck(ping, breaker=breaker))
    assert (found.status, found.circuit, found.attempts) == (HEALTHY, OPEN, 1)


async def test_a_circuit_that_opens_meanwhile_degrades(autojump_clock: MockClock) -> None:
    """The probe succeeded, but others are refused."""
    breaker = opened()

    async def probe() -> None:
        with pytest.raises(OSError, match="down"):
            await breaker.call(failing())

    found = await check_one(HealthCheck(probe, breaker=breaker))
    assert (found.status, found.circuit, found.error) == (DEGRADED, OPEN, None)


async def test_a_check_that_its_circuit_gives_up_degrades(autojump_clock: MockClock) -> None:
    """Others have opened it; this one was cancelled, and says nothing."""
    breaker = opened(cancel_in_flight=True)
    found: list[ServiceHealth] = []

    async def check() -> None:
        found.append(await check_one(HealthCheck(trio.sleep_forever, breaker=breaker)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(check)
        await wait_all_tasks_blocked()
        with pytest.raises(OSError, match="down"):
            await breaker.call(failing())
    assert (found[0].status, found[0].circuit, found[0].attempts) == (DEGRADED, OPEN, 1)
    assert found[0].error is not None
    assert found[0].error.type_name == "CallAbandonedError"


@pytest.mark.parametrize(
    "error, status",
    [
        (CircuitOpenError("inner"), DEGRADED),
        (CallAbandonedError("inner"), DEGRADED),
        (ExceptionGroup("", [CircuitOpenError("a"), CircuitOpenError("b")]), DEGRADED),
        (ExceptionGroup("", [CircuitOpenError("a"), OSError()]), UNHEALTHY),
        (OperationTimeoutError(1), UNHEALTHY),
    ],
    ids=repr,
)
async def test_a_circuit_within_the_probe_degrades_as_its_own_does(
    error: Exception, status: HealthStatus
) -> None:
    """If the probe goes through the client that has one; of a group, all parts have to say so."""
    assert (await check_one(HealthCheck(failing(error)))).status is status


# --- what stops it --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop",
    [
        KeyboardInterrupt(),
        SystemExit(3),
        GeneratorExit(),
        BaseExceptionGroup("", [OSError("down"), KeyboardInterrupt()]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("breaker", [None, opened()])
async def test_what_is_no_exception_stops_all(
    stop: BaseException, breaker: CircuitBreaker | None
) -> None:
    """It comes out in a group, is counted nowhere, and the others have ended."""
    other = Legs([1000])
    check = HealthCheck(failing(stop), retry=Retry(), breaker=breaker)
    heard: list[Event] = []
    with pytest.raises(BaseExceptionGroup) as caught, subscribe(heard.append):
        await check_health({"it": check, "other": HealthCheck(other)})
    assert leaves(caught.value) == leaves(stop)
    assert not isinstance(caught.value, Exception)
    assert other.running == 0
    assert not [event for event in heard if isinstance(event, HealthChecked)]
    assert breaker is None or breaker.statistics().calls == 0


@pytest.mark.parametrize("has_policies", [False, True])
async def test_a_probe_that_returns_nothing_to_await_is_a_mistake(
    autojump_clock: MockClock, has_policies: bool
) -> None:
    """A bare `TypeError`, when it is called; the others have ended."""
    other = Legs([1000])
    breaker = opened()
    mistaken: Any = lambda: 3  # noqa: E731 - it is what is under test
    check = HealthCheck(mistaken)
    if has_policies:
        check = HealthCheck(mistaken, retry=Retry(), breaker=breaker)
    with pytest.raises(TypeError, match="it returned 3, which can't be awaited"):
        await check_health({"it": check, "other": HealthCheck(other)})
    assert (other.running, trio.current_time()) == (0, 0)
    assert breaker.statistics().calls == 0


async def test_a_mistake_is_not_kept_alive() -> None:
    """Once it has been handled, without the garbage collector's help."""
    mistaken: Any = lambda: 3  # noqa: E731 - it is what is under test
    seen: list[weakref.ref[TypeError]] = []
    gc.disable()
    try:
        try:
            await check_health({"it": HealthCheck(mistaken)})
        except TypeError as error:
            seen.append(weakref.ref(error))
        assert [ref() for ref in seen] == [None]
    finally:
        gc.enable()


async def test_cancelling_the_caller_cancels_all_probes(autojump_clock: MockClock) -> None:
    """Also when that comes with their own timeouts: nothing has failed."""
    breaker, heard = opened(), list[Event]()
    probes = [Legs([1000]), Legs([1000])]
    with subscribe(heard.append), trio.move_on_after(2) as scope:
        checks = [HealthCheck(probe, timeout=2, breaker=breaker) for probe in probes]
        await check_health({"a": checks[0], "b": checks[1]})
    assert scope.cancelled_caught
    assert [(probe.running, probe.cancelled_at) for probe in probes] == [(0, {0: 2})] * 2
    assert all(event.cancelled for event in heard if isinstance(event, CallFinished))
    assert {type(event) for event in heard} == {CallStarted, CallFinished}
    assert breaker.state is CLOSED


async def test_a_probe_whose_clean_up_fails_hides_no_cancellation(
    autojump_clock: MockClock,
) -> None:
    """Nor is that reported as if the service had failed."""
    heard: list[Event] = []

    async def probe() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("can't close")

    with subscribe(heard.append), trio.move_on_after(1) as scope:
        await check_health({"it": HealthCheck(probe)})
    assert scope.cancelled_caught
    assert heard == []


async def test_nothing_runs_in_a_caller_that_is_cancelled() -> None:
    probe = Legs([1])
    with trio.CancelScope() as scope:
        scope.cancel()
        await check_health({"it": HealthCheck(probe)})
    assert scope.cancelled_caught
    assert probe.began_at == []


# --- what listeners hear --------------------------------------------------------------------------


async def test_each_check_is_told_to_listeners(autojump_clock: MockClock) -> None:
    """And a timeout as any other."""
    heard: list[Any] = []
    with subscribe(heard.append):
        await check_health(
            {
                "quick": HealthCheck(ping, critical=False),
                "hung": HealthCheck(trio.sleep_forever, timeout=2),
            },
            name="ready",
        )
    quick, timed_out, hung = heard
    assert {event.policy for event in heard} == {"ready"}
    assert type(timed_out) is TimedOut
    assert (timed_out.operation, timed_out.timeout, timed_out.time) == ("hung", 2, 2)
    assert quick == HealthChecked(
        time=0.1,
        task="ready: quick",
        policy="ready",
        operation="quick",
        status=HEALTHY,
        critical=False,
        attempts=1,
        duration=0.1,
        error=None,
    )
    assert (hung.operation, hung.status, hung.duration, hung.attempts) == ("hung", UNHEALTHY, 2, 1)
    assert hung.error.type_name == "OperationTimeoutError"


async def test_policies_name_the_service_as_their_operation(autojump_clock: MockClock) -> None:
    heard: list[Event] = []
    retry = Retry(max_attempts=2, backoff=Constant(1))
    with subscribe(heard.append):
        await check_health({"it": HealthCheck(failing(), retry=retry, breaker=opened())})
    assert {event.policy for event in heard} == {"health", "retry", "db"}
    assert {event.operation for event in heard} == {"it"}


# --- what is refused at the door ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"critical": 1}, r"^`critical` must be True or False, got 1$"),
        ({"timeout": 0}, r"^`timeout` must be > 0, got 0$"),
        ({"timeout": float("nan")}, r"^`timeout` must be > 0, got nan$"),
        ({"timeout": float("inf")}, r"^`timeout` must be finite, got inf$"),
        ({"timeout": True}, r"^`timeout` must be seconds or a timedelta, got True$"),
        ({"retry": 3}, r"^`retry` must be a Retry or None, got 3$"),
        ({"retry": Retry}, r"^`retry` must be a Retry or None, got Retry$"),
        ({"breaker": "db"}, r"^`breaker` must be a CircuitBreaker or None, got 'db'$"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """A timeout has to be finite: or a probe that hangs would hang the report."""
    with pytest.raises((TypeError, ValueError), match=message):
        HealthCheck(ping, **options)


def test_a_probe_that_is_no_async_function_is_refused() -> None:
    """A coroutine object too, which is closed."""

    def sync() -> None:
        """Be called without being awaited."""

    mistakes: list[Any] = [sync, 3, ping()]
    for mistake in mistakes:
        with pytest.raises(TypeError, match=r"^`probe` must be an async function, got"):
            HealthCheck(mistake)


@pytest.mark.parametrize(
    "checks, message",
    [
        ([HealthCheck(ping)], r"^`checks` must be a mapping of names to health checks, got \["),
        (None, r"^`checks` must be a mapping of names to health checks, got None$"),
        ({3: HealthCheck(ping)}, r"^`checks` must have names for keys, got 3$"),
        (
            {"db": ping},
            r"^`checks\['db'\]` must be a HealthCheck, got ping: write HealthCheck\(probe\)$",
        ),
    ],
)
async def test_what_is_no_set_of_checks_is_refused(checks: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        await check_health(checks)


def test_a_check_is_frozen_and_shows_its_probe_by_its_name() -> None:
    check = HealthCheck(ping, timeout=dt.timedelta(minutes=1))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        check.timeout = 3  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert repr(check) == (
        "HealthCheck(probe=ping, critical=True, timeout=60.0, retry=None, breaker=None)"
    )
