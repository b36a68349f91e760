"""What holds for the listeners of every primitive: all is told, and nothing that they do harms."""

from __future__ import annotations

import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._instrumentation import FAILED, every_event
from tests.operations import fails, returns
from tests.test_event_calls import POLICIES
from trio_resilience import (
    BatchFlushed,
    Bulkhead,
    CallFinished,
    CallStarted,
    CircuitBreaker,
    CircuitState,
    CircuitStateChanged,
    ConfigReloaded,
    Constant,
    Event,
    HealthChanged,
    HealthCheck,
    HealthMonitor,
    HealthStatus,
    Policy,
    Registry,
    Retry,
    Semaphore,
    Timeout,
    WaitStarted,
    check_health,
    map_with_limit,
    open_batcher,
    run_in,
    run_with_limit,
    run_with_retry,
    stream_map_with_limit,
    stream_with_limit,
    subscribe,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    Job = Callable[[], Awaitable[object]]


async def double(item: int) -> int:
    await trio.sleep(0.5)
    return 2 * item


async def call_policy(make: Callable[[], Policy[Any]]) -> object:
    return await make().call(double, 3)


async def in_a_nursery() -> object:
    results: list[int] = []
    async with trio.open_nursery() as nursery:
        results.append(await run_in(nursery, double, 3, policy=Timeout(9)))
    return results


async def by_stream() -> object:
    ops = [partial(double, 1), partial(fails, FAILED)]
    async with stream_with_limit(None, ops, on_error="collect", ordered=True) as results:
        return [str(result) async for result in results]


async def by_stream_of_a_map() -> object:
    async with stream_map_with_limit(None, double, [1, 2], ordered=True) as results:
        return [result async for result in results]


async def by_batches() -> object:
    async def process(items: list[int]) -> list[int]:
        return [2 * item for item in items]

    async with open_batcher(None, process, batch_size=2) as batcher:
        return await batcher.submit(3)


async def by_monitor() -> object:
    monitor = HealthMonitor({"it": HealthCheck(partial(returns, 1)), "no": HealthCheck(failing)})
    async with trio.open_nursery() as nursery:
        report: Any = await nursery.start(monitor.run)
        nursery.cancel_scope.cancel()
    return report.as_dict()["services"]["it"]["status"], monitor.report is not None


async def failing() -> None:
    raise FAILED


async def by_checks() -> object:
    report = await check_health({"it": HealthCheck(partial(double, 1), timeout=0.1)})
    return report.status


async def by_reload() -> object:
    registry = Registry.load({"policies": {"a": {}}})
    return registry.reload({"policies": {"a": {"timeout": 3}}})


async def by_retries() -> object:
    return (await run_with_retry(None, double, 3)).result


JOBS: dict[str, Job] = {
    **{name: partial(call_policy, make) for name, make in POLICIES.items()},
    "run_in": in_a_nursery,
    "run_with_limit": lambda: run_with_limit(None, [partial(double, 1)]),
    "map_with_limit": lambda: map_with_limit(None, double, range(3)),
    "stream_with_limit": by_stream,
    "stream_map_with_limit": by_stream_of_a_map,
    "run_with_retry": by_retries,
    "open_batcher": by_batches,
    "check_health": by_checks,
    "HealthMonitor": by_monitor,
    "Registry": by_reload,
}
each_job = pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)


@each_job
async def test_every_primitive_tells_what_happens_where_and_when(
    autojump_clock: MockClock, job: Job
) -> None:
    """With the name of the task in which it is told, and at the instant at which it happens."""
    heard: list[tuple[Event, str, float]] = []

    def listener(event: Event) -> None:
        heard.append((event, trio.lowlevel.current_task().name, trio.current_time()))

    with subscribe(listener):
        await job()
    assert heard
    for event, task, time in heard:
        assert (event.task, event.time) == (task, time)
        assert event.policy
        assert event.operation
        assert getattr(event, "duration", 0) >= 0


@each_job
async def test_a_listener_that_raises_is_logged_once_and_changes_nothing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, job: Job
) -> None:
    """Neither results nor the time that it takes; others hear all."""
    heard: list[Event] = []

    def broken(event: Event) -> None:
        raise LookupError(event)

    began = trio.current_time()
    expected = await job()
    took = trio.current_time() - began
    with subscribe(broken), subscribe(heard.append):
        assert await job() == expected
    assert trio.current_time() - began == pytest.approx(2 * took)
    assert heard
    assert [record.name for record in caplog.records] == ["trio_resilience"]


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
async def test_a_listener_may_call_back_into_a_policy(
    autojump_clock: MockClock, make: Callable[[], Policy[Any]]
) -> None:
    """It reads it whenever something happens, and starts another call as the first one begins."""
    policy, results, balance = make(), list[int](), 0

    async def call_again() -> None:
        results.append(await policy.call(double, 4))

    async with trio.open_nursery() as nursery:

        def listener(event: Event) -> None:
            nonlocal balance
            assert repr(policy)
            assert policy.statistics() is not None
            if event.policy == "mine" and isinstance(event, CallStarted):
                balance += 1
                if balance == 1 and not results:
                    nursery.start_soon(call_again)
            balance -= event.policy == "mine" and isinstance(event, CallFinished)

        with subscribe(listener):
            results.append(await policy.call(double, 3))
            while len(results) < 2:
                await trio.sleep(1)
    await trio.sleep(9)
    assert sorted(results) == [6, 8]
    assert balance == 0
    assert policy.is_idle


@pytest.mark.parametrize("limit", [Semaphore(1), Bulkhead(1)], ids=["semaphore", "bulkhead"])
async def test_a_listener_may_take_and_give_permits(limit: Semaphore | Bulkhead) -> None:
    """Of the semaphore, or bulkhead, that tells it of a wait."""
    taken: list[bool] = []

    def listener(event: Event) -> None:
        if isinstance(event, WaitStarted):
            with pytest.raises(trio.WouldBlock):
                limit.acquire_nowait()
            limit.release()
            taken.append(limit.statistics().waiting == 0)

    limit.acquire_nowait()
    with subscribe(listener):
        await limit.acquire()
    limit.release()
    assert taken == [True]
    assert limit.is_idle


async def test_a_listener_may_close_the_circuit_that_opens() -> None:
    """Who has opened it gets its error all the same."""
    breaker = CircuitBreaker(failure_threshold=1)

    def listener(event: Event) -> None:
        if isinstance(event, CircuitStateChanged) and event.state is CircuitState.OPEN:
            breaker.reset()

    with subscribe(listener), pytest.raises(OSError, match="no route"):
        await breaker.call(fails, FAILED)
    assert breaker.state is CircuitState.CLOSED
    assert await breaker.call(returns, 1) == 1


async def test_a_listener_may_submit_to_the_batcher_that_flushes(autojump_clock: MockClock) -> None:
    """Its item is in the next batch."""
    batches: list[list[int]] = []

    async def process(items: list[int]) -> None:
        batches.append(items)

    def listener(event: Event) -> None:
        if isinstance(event, BatchFlushed) and len(batches) == 1:
            nursery.start_soon(batcher.submit, 2)

    # The listeners of whoever opens it hear of flushes.
    with subscribe(listener):
        async with trio.open_nursery() as nursery, open_batcher(nursery, process) as batcher:
            await batcher.submit(1)
            await trio.sleep(1)
    assert batches == [[1], [2]]


async def test_a_listener_may_reload_the_registry_that_has_reloaded() -> None:
    """What it has brought about is how it is in the end."""
    registry = Registry.load({"policies": {"a": {"timeout": 1}}})

    def listener(event: Event) -> None:
        if isinstance(event, ConfigReloaded) and registry.statistics().reloads == 1:
            registry.reload({"policies": {"a": {"timeout": 3}}})

    with subscribe(listener):
        registry.reload({"policies": {"a": {"timeout": 2}}})
    layers: Any = registry["a"].pipeline.layers
    assert layers[0].seconds == 3
    assert registry.statistics().reloads == 2


async def test_a_listener_of_a_health_monitor_finds_the_report() -> None:
    """Of the round that it is told of."""
    monitor, seen = HealthMonitor({"it": HealthCheck(failing)}), list[HealthStatus]()

    def listener(event: Event) -> None:
        if isinstance(event, HealthChanged):
            assert monitor.report is not None
            seen.append(monitor.report.status)

    with subscribe(listener):
        async with trio.open_nursery() as nursery:
            await nursery.start(monitor.run)
            nursery.cancel_scope.cancel()
    assert seen == [HealthStatus.UNHEALTHY]


# --- records ------------------------------------------------------------------------------------


def fields_of(event: Event) -> dict[str, Any]:
    """Return the fields of *event*; errors, which are compared by identity, in words."""
    cls: Any = type(event)
    values = {field.name: getattr(event, field.name) for field in attrs.fields(cls)}
    return {name: repr(each) if name == "error" else each for name, each in values.items()}


@pytest.mark.parametrize(
    "event", every_event(FAILED)[:-1], ids=lambda event: str(type(event).__name__)
)
def test_every_kind_of_event_is_frozen_and_goes_to_another_process(event: Event) -> None:
    """With all its fields; equal ones are equal, and those that differ are not."""
    for name in fields_of(event):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            setattr(event, name, 0)
    there = pickle.loads(pickle.dumps(event))  # noqa: S301 - it is our own
    assert type(there) is type(event)
    assert fields_of(there) == fields_of(event)
    anything: Any = event
    assert attrs.evolve(anything) == event
    assert attrs.evolve(anything, time=99.0) != event


async def test_durations_and_instants_fit_together(autojump_clock: MockClock) -> None:
    """What has a duration began so long before it was told, and was told then."""
    heard: list[Any] = []
    policy = Retry(max_attempts=3, backoff=Constant(2))
    with subscribe(heard.append):
        await run_with_limit(
            None,
            [partial(double, 1), partial(fails, FAILED)],
            policy=policy,
            max_concurrency=1,
            on_error="collect",
        )
    starts: dict[tuple[str, ...], list[float]] = {}
    for event in heard:
        kind, key = type(event).__name__, (event.task, event.policy, event.operation)
        if kind.endswith("Started"):
            starts.setdefault((kind.removesuffix("Started"), *key), []).append(event.time)
        elif kind.endswith("Finished"):
            began = starts[(kind.removesuffix("Finished"), *key)].pop()
            assert event.duration == pytest.approx(event.time - began)
    assert not any(starts.values())
    assert len(starts) == 6
