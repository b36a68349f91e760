"""HealthMonitor: when it checks, what it keeps, whom it tells, and what is too old."""

from __future__ import annotations

import datetime as dt
import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.operations import fails, leaves, returns
from tests.test_circuit_breaker_runs import starts
from tests.test_hedge import Legs
from tests.test_rate_limiter_runs import run
from tests.test_semaphore_runs import crash
from trio_resilience import (
    CircuitBreaker,
    Constant,
    Event,
    OperationsCancelledError,
    Retry,
    subscribe,
)
from trio_resilience._events import CircuitState, HealthChanged
from trio_resilience._health import (
    DEGRADED,
    HEALTHY,
    UNHEALTHY,
    HealthCheck,
    HealthReport,
)
from trio_resilience._health_monitor import HealthMonitor
from trio_resilience.testing import test_mode as mode

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock


@attrs.define(eq=False)
class Service:
    """A service that works or not, and knows when it was asked."""

    works: bool = True
    seconds: float = 0.0
    asked_at: list[float] = attrs.field(factory=list[float], init=False)

    async def __call__(self) -> bool:
        self.asked_at.append(trio.current_time())
        await trio.sleep(self.seconds)
        return self.works


def watching(probe: Any, **options: Any) -> HealthMonitor:
    """A monitor of one service, every ten seconds, which may take five."""
    return HealthMonitor({"it": HealthCheck(probe, timeout=5)}, interval=10, **options)


def last(monitor: HealthMonitor) -> HealthReport:
    report = monitor.report
    assert report is not None
    return report


# --- when it checks -------------------------------------------------------------------------------


async def test_the_first_report_is_there_when_it_has_started(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """And is what `nursery.start` returns."""
    monitor = watching(Service(seconds=2))
    assert monitor.report is None
    report = await nursery.start(monitor.run)
    assert trio.current_time() == 2
    assert report is last(monitor)
    assert report.status is HEALTHY


async def test_it_starts_also_if_all_is_unhealthy(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    monitor = watching(trio.sleep_forever)
    report = await nursery.start(monitor.run)
    assert (report.status, trio.current_time()) == (UNHEALTHY, 5)


async def test_it_may_be_started_without_waiting(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    monitor = watching(Service(seconds=2))
    nursery.start_soon(monitor.run)
    await trio.sleep(1)
    assert monitor.report is None
    await trio.sleep(2)
    assert last(monitor).is_healthy


async def test_rounds_start_at_the_interval(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """From start to start, however long each takes."""
    service = Service(seconds=3)
    monitor = watching(service)
    await nursery.start(monitor.run)
    await trio.sleep(31)
    assert service.asked_at == [0, 10, 20, 30]
    assert last(monitor).time == 33


async def test_a_round_that_takes_longer_is_followed_at_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """There is never more than one."""
    service = Service(seconds=4)
    check = HealthCheck(service, timeout=5)
    monitor = HealthMonitor({"it": check}, interval=dt.timedelta(seconds=1))
    await nursery.start(monitor.run)
    await trio.sleep(10)
    assert service.asked_at == [0, 4, 8, 12]


async def test_an_interval_that_the_clock_can_not_show_lets_it_move(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    autojump_clock.jump(1e6)
    service = Service()
    monitor = HealthMonitor({"it": HealthCheck(service)}, interval=1e-300)
    await nursery.start(monitor.run)
    await trio.sleep(1e-8)
    assert 2 < len(service.asked_at) < 200


async def test_an_infinite_interval_checks_only_when_asked(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Then no report is ever too old."""
    service = Service()
    monitor = HealthMonitor({"it": HealthCheck(service)}, interval=math.inf)
    await nursery.start(monitor.run)
    await trio.sleep(5e4)
    assert last(monitor).is_healthy
    await monitor.check()
    assert service.asked_at == [0, 5e4]


# --- asking it ------------------------------------------------------------------------------------


async def test_a_check_is_made_at_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """The next round is due an interval later."""
    service = Service(seconds=1)
    monitor = watching(service)
    await nursery.start(monitor.run)
    await trio.sleep(3)
    service.works = False
    report = await monitor.check()
    assert (report.status, report.time) == (UNHEALTHY, 5)
    assert monitor.report is report
    await trio.sleep(20)
    assert service.asked_at == [0, 4, 14, 24]


async def test_those_who_ask_at_once_share_a_round(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Also who comes while it is under way; who comes after it gets another."""
    service = Service(seconds=2)
    monitor = watching(service)
    reports: list[HealthReport] = []

    async def ask(after: float) -> None:
        await trio.sleep(after)
        reports.append(await monitor.check())

    await nursery.start(monitor.run)
    async with trio.open_nursery() as askers:
        for after in (1, 1, 1.5, 2.9, 3.5):
            askers.start_soon(ask, after)
    assert service.asked_at == [0, 3, 5.5]
    assert [report is reports[0] for report in reports] == [True] * 4 + [False]


async def test_who_asks_during_the_first_round_waits_for_that(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    service = Service(seconds=2)
    monitor = watching(service)
    nursery.start_soon(monitor.run)
    await trio.sleep(1)
    assert (await monitor.check()).time == 2
    assert service.asked_at == [0]


async def test_cancelling_who_asks_takes_nothing_from_the_others(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """The round goes on: it is the monitor's."""
    service = Service(seconds=2)
    monitor = watching(service)
    reports: list[HealthReport] = []

    async def ask() -> None:
        reports.append(await monitor.check())

    await nursery.start(monitor.run)
    async with trio.open_nursery() as askers:
        with trio.move_on_after(1) as impatient:
            askers.start_soon(ask)
            await monitor.check()
    assert impatient.cancelled_caught
    assert [report.is_healthy for report in reports] == [True]
    assert service.asked_at == [0, 2]


async def test_the_deadline_of_who_asks_is_not_that_of_the_probes(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """Or one who is in a hurry would spoil the report for all."""
    probe = Legs([0, (0, OSError()), 0])
    check = HealthCheck(probe, timeout=5, retry=Retry(backoff=Constant(2)))
    monitor = HealthMonitor({"it": check})
    await nursery.start(monitor.run)
    with trio.move_on_after(1):
        await monitor.check()
    await trio.sleep(5)
    assert last(monitor).services["it"].attempts == 2
    assert last(monitor).is_healthy


async def test_one_that_is_cancelled_asks_for_nothing(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    service = Service()
    monitor = watching(service)
    await nursery.start(monitor.run)
    with trio.CancelScope() as scope:
        scope.cancel()
        await monitor.check()
    assert scope.cancelled_caught
    await trio.sleep(1)
    assert service.asked_at == [0]


async def test_to_ask_one_that_is_not_running_is_a_mistake() -> None:
    """It says how to start it; also when it has ended."""
    monitor = watching(Service(), name="ready")
    message = r"^ready is not running: start it with `await nursery\.start\(monitor\.run\)`$"
    with pytest.raises(RuntimeError, match=message):
        await monitor.check()
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.run)
        nursery.cancel_scope.cancel()
    with pytest.raises(RuntimeError, match=message):
        await monitor.check()


async def test_who_waits_hears_that_the_monitor_was_cancelled(autojump_clock: MockClock) -> None:
    monitor = watching(Service(seconds=2))
    heard: list[str] = []

    async def ask() -> None:
        try:
            await monitor.check()
        except OperationsCancelledError:
            heard.append("cancelled")

    async with trio.open_nursery() as askers, trio.open_nursery() as nursery:
        await nursery.start(monitor.run)
        askers.start_soon(ask)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert heard == ["cancelled"]


async def test_who_is_cancelled_as_the_monitor_ends_hears_of_that_alone(
    autojump_clock: MockClock,
) -> None:
    script: list[BaseException | None] = [None, SystemExit()]

    async def probe() -> None:
        error = script.pop(0)
        if error is not None:
            raise error

    monitor, scope = watching(probe), trio.CancelScope()

    async def watch(  # noqa: ASYNC128 - it hands it on
        task_status: trio.TaskStatus[HealthReport],
    ) -> None:
        with pytest.raises(BaseExceptionGroup):
            await monitor.run(task_status=task_status)
        scope.cancel()

    async with trio.open_nursery() as nursery:
        await nursery.start(watch)
        with scope:
            await monitor.check()
    assert scope.cancelled_caught


# --- running it -----------------------------------------------------------------------------------


async def test_it_runs_once_at_a_time(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """The second is refused, and takes nothing from the first."""
    monitor = watching(Service())
    await nursery.start(monitor.run)
    with pytest.raises(RuntimeError, match=r"^health is running already$"):
        await monitor.run()
    assert (await monitor.check()).is_healthy


async def test_it_may_be_started_again(autojump_clock: MockClock) -> None:
    """And goes on from the report that it has."""
    service, changes = Service(), list[HealthReport]()
    monitor = watching(service, on_change=changes.append)
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            await nursery.start(monitor.run)
            nursery.cancel_scope.cancel()
    assert len(service.asked_at) == 2
    assert len(changes) == 1


async def test_ctrl_c_in_a_probe_leaves_it_ready_to_run_again(
    autojump_clock: MockClock,
) -> None:
    script: list[BaseException | None] = [KeyboardInterrupt(), None]

    async def probe() -> None:
        error = script.pop(0)
        if error is not None:
            raise error

    monitor = watching(probe)
    with pytest.raises(BaseExceptionGroup) as caught:
        await monitor.run()
    assert [type(leaf) for leaf in leaves(caught.value)] == [KeyboardInterrupt]
    assert monitor.report is None
    with trio.move_on_after(1):
        await monitor.run()
    assert last(monitor).is_healthy


async def test_what_is_no_exception_comes_out_of_it(autojump_clock: MockClock) -> None:
    """Who waits for a report is told that there will be none."""
    results: list[Any] = []

    async def probe() -> None:
        await trio.sleep(1)
        if len(results) > 1:
            raise SystemExit(3)
        results.append("ok")

    monitor = watching(probe)

    async def watch() -> None:
        with pytest.raises(BaseExceptionGroup) as caught:
            await monitor.run()
        results.append([type(leaf) for leaf in leaves(caught.value)])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await trio.sleep(0.5)
        await monitor.check()
        results.append("asked")
        with pytest.raises(OperationsCancelledError):
            await monitor.check()
    assert results == ["ok", "asked", [SystemExit]]


async def test_a_mistake_in_a_probe_comes_out_of_it() -> None:
    mistaken: Any = lambda: 3  # noqa: E731 - it is what is under test
    with pytest.raises(TypeError, match="it returned 3, which can't be awaited"):
        await watching(mistaken).run()


# --- what is too old ------------------------------------------------------------------------------


async def test_a_report_that_is_too_old_says_so(autojump_clock: MockClock) -> None:
    """It is unhealthy then, as nobody knows better; the services are as they were."""
    monitor = watching(Service(), max_age=12)
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.run)
        fresh = last(monitor)
        nursery.cancel_scope.cancel()
    await trio.sleep(12)
    assert last(monitor) is fresh
    await trio.sleep(0.001)
    stale = last(monitor)
    assert (stale.status, stale.is_stale, stale.http_status) == (UNHEALTHY, True, 503)
    assert (stale.services, stale.time) == (fresh.services, fresh.time)
    assert stale.as_dict()["is_stale"] is True
    assert not fresh.is_stale


async def test_a_stuck_monitor_is_seen(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """By default after two intervals and the longest timeout; and it recovers."""
    probe = Service()

    async def stubborn() -> None:
        with trio.CancelScope(shield=True):
            await probe()

    monitor = HealthMonitor(
        {"it": HealthCheck(stubborn, timeout=5), "other": HealthCheck(probe, timeout=1)},
        interval=10,
    )
    await nursery.start(monitor.run)
    probe.seconds = 100
    await trio.sleep(25)
    assert not last(monitor).is_stale
    await trio.sleep(1)
    assert last(monitor).is_stale
    await trio.sleep(90)
    assert not last(monitor).is_stale


async def test_a_monitor_that_works_is_never_too_old(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """However slow its services are within their timeouts."""
    monitor = watching(trio.sleep_forever)
    await nursery.start(monitor.run)
    for _ in range(100):
        await trio.sleep(0.5)
        assert not last(monitor).is_stale


# --- who is told ----------------------------------------------------------------------------------


async def test_a_change_is_told_once(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    """The first report is one; then whenever a service is not what it was."""
    database, cache = Service(), Service()
    checks = {"database": HealthCheck(database), "cache": HealthCheck(cache, critical=False)}
    told: list[HealthReport] = []
    heard: list[Event] = []
    monitor = HealthMonitor(checks, interval=10, on_change=told.append, name="ready")
    with subscribe(heard.append):
        await nursery.start(monitor.run)
        await trio.sleep(15)
        cache.works = False
        await trio.sleep(20)
        database.works = False
        await trio.sleep(10)
        cache.works = database.works = True
        await trio.sleep(20)
    changes = [event for event in heard if isinstance(event, HealthChanged)]
    assert [(change.time, change.previous, change.status) for change in changes] == [
        (0, None, HEALTHY),
        (20, HEALTHY, DEGRADED),
        (40, DEGRADED, UNHEALTHY),
        (50, UNHEALTHY, HEALTHY),
    ]
    assert [change.services for change in changes] == [
        ("database", "cache"),
        ("cache",),
        ("database",),
        ("database", "cache"),
    ]
    assert {(change.policy, change.operation) for change in changes} == {("ready", "run")}
    assert [(report.time, report.status) for report in told] == [
        (change.time, change.status) for change in changes
    ]


async def test_a_change_of_one_service_is_told_though_the_whole_is_the_same(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    one, other = Service(works=False), Service()
    told: list[HealthReport] = []
    checks = {"one": HealthCheck(one), "other": HealthCheck(other)}
    await nursery.start(HealthMonitor(checks, interval=10, on_change=told.append).run)
    other.works = False
    await trio.sleep(15)
    assert [report.status for report in told] == [UNHEALTHY, UNHEALTHY]


async def test_who_is_told_finds_the_new_report(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """The monitor has it before it tells anybody."""
    found: list[bool] = []

    def on_change(report: HealthReport) -> None:
        found.append(monitor.report is report)

    monitor = watching(Service(), on_change=on_change)
    await nursery.start(monitor.run)
    assert found == [True]


async def test_a_callback_that_raises_is_logged_once_and_changes_nothing(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service()

    def on_change(_: HealthReport) -> None:
        raise OSError("can't tell")

    monitor = watching(service, on_change=on_change)
    with caplog.at_level(logging.ERROR, "trio_resilience"):
        await nursery.start(monitor.run)
        service.works = False
        await trio.sleep(15)
    assert last(monitor).status is UNHEALTHY
    assert len(caplog.records) == 1


async def test_without_services_it_is_healthy_and_says_so_once(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    told: list[HealthReport] = []
    monitor = HealthMonitor({}, interval=1, on_change=told.append)
    await nursery.start(monitor.run)
    await trio.sleep(10)
    assert [report.status for report in told] == [HEALTHY]


async def test_it_closes_the_circuit_of_a_service_that_is_back(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    """It opens it, too, before users' calls have to find out."""
    service = Service(works=False)
    breaker = CircuitBreaker(failure_threshold=2, recovery_timeout=20)
    monitor = HealthMonitor({"it": HealthCheck(service, breaker=breaker)}, interval=10)
    seen: list[tuple[Any, CircuitState]] = []
    await nursery.start(monitor.run)
    for _ in range(5):
        seen.append((last(monitor).status, breaker.state))
        service.works = len(seen) >= 4
        await trio.sleep(10)
        await wait_all_tasks_blocked()
    assert seen == [
        (UNHEALTHY, CircuitState.CLOSED),
        (UNHEALTHY, CircuitState.OPEN),
        (DEGRADED, CircuitState.OPEN),
        (UNHEALTHY, CircuitState.OPEN),
        (DEGRADED, CircuitState.OPEN),
    ]
    await trio.sleep(10)
    assert (last(monitor).status, breaker.state) == (HEALTHY, CircuitState.CLOSED)


# --- runs -----------------------------------------------------------------------------------------


@starts
def test_it_serves_one_run_after_the_other(first: float, second: float) -> None:
    """Each with reports of its own, wherever its clock starts."""
    told: list[HealthReport] = []
    service = Service()
    monitor = watching(service, on_change=told.append)

    async def main() -> None:
        assert monitor.report is None
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            await nursery.start(monitor.run)
            await trio.sleep(25)
            assert last(monitor).is_healthy
            assert [time - began for time in service.asked_at] == [0, 10, 20]
            nursery.cancel_scope.cancel()
        service.asked_at.clear()

    run(main, at=first)
    run(main, at=second)
    assert [report.is_healthy for report in told] == [True, True]


def test_a_report_can_be_read_outside_a_run() -> None:
    """Of a run that has ended, it is stale: nobody checks any more."""
    monitor = watching(Service())
    assert monitor.report is None
    assert repr(monitor) == "HealthMonitor(name='health': no report, 1 services)"

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(monitor.run)
            assert repr(monitor) == "HealthMonitor(name='health': healthy, 1 services)"
            nursery.cancel_scope.cancel()

    run(main)
    assert last(monitor).is_stale
    assert repr(monitor) == "HealthMonitor(name='health': stale, 1 services)"


async def test_a_report_can_be_read_in_a_thread(nursery: trio.Nursery) -> None:
    """As a web server in threads does; it is as fresh as it is in the run."""
    monitor = HealthMonitor({"it": HealthCheck(Service())}, max_age=60)
    await nursery.start(monitor.run)
    found = await trio.to_thread.run_sync(lambda: monitor.report)
    assert found is monitor.report
    nursery.cancel_scope.cancel()


async def test_another_run_has_no_report(nursery: trio.Nursery) -> None:
    """While this one goes on, in another thread; and to use it there is an error."""
    monitor = HealthMonitor({"it": HealthCheck(Service())})
    await nursery.start(monitor.run)

    async def elsewhere() -> None:
        assert monitor.report is None
        with pytest.raises(RuntimeError, match="two runs of trio at once"):
            await monitor.run()
        with pytest.raises(RuntimeError, match="two runs of trio at once"):
            await monitor.check()

    await trio.to_thread.run_sync(trio.run, elsewhere)
    assert last(monitor).is_healthy
    nursery.cancel_scope.cancel()


def test_what_is_left_of_a_run_that_crashed_harms_no_other() -> None:
    """Who waited there is never woken, and the monitor runs anew."""
    monitor = watching(partial(returns, "ok"))
    left: Any = monitor.run()
    course: list[str] = []

    async def dies() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_the_second_round)
            await left

    async def wait_for_the_second_round() -> None:
        while monitor.report is None:
            await trio.lowlevel.checkpoint()
        turn = monitor._runs.get().turn  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        course.append("waits")
        await turn.ended.wait()
        course.append("was woken")

    async def lives() -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(monitor.run)
            with pytest.raises(RuntimeError, match="Cancel scope stack corrupted"):
                left.close()
            assert (await monitor.check()).is_healthy
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()

    crash(dies)
    assert last(monitor).is_stale
    run(lives)
    assert course == ["waits"]


async def test_in_test_mode_it_has_a_state_of_its_own(autojump_clock: MockClock) -> None:
    monitor = watching(Service())
    async with trio.open_nursery() as nursery:
        await nursery.start(monitor.run)
        with mode():
            assert monitor.report is None
            async with trio.open_nursery() as inner:
                await inner.start(monitor.run)
                inner.cancel_scope.cancel()
            assert monitor.report is not None
        nursery.cancel_scope.cancel()


# --- what is refused at the door ------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"interval": 0}, r"^`interval` must be > 0, got 0$"),
        ({"interval": "30"}, r"^`interval` must be seconds or a timedelta, got '30'$"),
        ({"interval": math.nan}, r"^`interval` must be > 0, got nan$"),
        ({"max_age": 0}, r"^`max_age` must be > 0, got 0$"),
        ({"on_change": 3}, r"^`on_change` must be a function, got 3$"),
        ({"on_change": trio.sleep}, r"^`on_change` must be a plain function, not an async one"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        HealthMonitor({}, **options)


def test_checks_are_refused_when_it_is_made() -> None:
    mistaken: Any = {"it": partial(returns, 1)}
    with pytest.raises(TypeError, match=r"^`checks\['it'\]` must be a HealthCheck, got returns: "):
        HealthMonitor(mistaken)


async def test_checks_that_are_changed_later_change_nothing() -> None:
    """Neither those that were given, nor those that it shows."""
    checks = {"it": HealthCheck(Service())}
    monitor = HealthMonitor(checks)
    checks["other"] = HealthCheck(partial(fails, OSError()))
    assert [*monitor.checks] == ["it"]
    shown: Any = monitor.checks
    change: Callable[[], object] = lambda: shown.update(checks)  # noqa: E731
    with pytest.raises(AttributeError):
        change()
