"""What `Metrics` counts where it is the only listener, without events, is what those would tell."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import ExitStack, suppress
from types import coroutine
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import trio
import trio.testing
from hypothesis import strategies as st

from tests.test_events import Listener
from trio_resilience import (
    AttemptFinished,
    AttemptStarted,
    Bulkhead,
    CallFinished,
    CallStarted,
    CircuitBreaker,
    Constant,
    Event,
    Metrics,
    MetricsSnapshot,
    Policy,
    Retry,
    RetryScheduled,
    Timeout,
    subscribe,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

POLICIES: dict[str, Callable[[], Policy[Any]]] = {
    "retry": lambda: Retry(max_attempts=2, backoff=Constant(1)),
    "retry with a limit": lambda: Retry(max_attempts=2, attempt_timeout=3, backoff=Constant(1)),
    "breaker": lambda: CircuitBreaker(failure_threshold=2, recovery_timeout=5),
    "bulkhead": lambda: Bulkhead(1, queue_size=0),
    "timeout": lambda: Timeout(3),
}
ERRORS: list[BaseException | None] = [None, None, OSError("down"), ValueError("wrong")]


async def act(seconds: float, outcomes: Iterator[BaseException | None]) -> None:
    await trio.sleep(seconds)
    error = next(outcomes, None)
    if error is not None:
        raise error


class Acts:
    """The same, of an object."""

    async def __call__(self, *args: Any) -> None:
        await act(*args)


Call = tuple[str, float, list[BaseException | None], str | None, float, bool]
calls = st.tuples(
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from([0, 0.1, 1, 2, 4]),
    st.lists(st.sampled_from(ERRORS), max_size=2),
    st.sampled_from([None, "load", "store", "other"]),
    st.sampled_from([0.5, 2.5, 60]),
    st.booleans(),
)


async def make_calls(chosen: list[Call]) -> None:
    policies = {name: make() for name, make in POLICIES.items()}
    async with trio.open_nursery() as nursery:
        for number, each in enumerate(chosen):
            nursery.start_soon(_make_call, policies, number, each)


async def _make_call(policies: dict[str, Policy[Any]], number: int, call: Call) -> None:
    name, seconds, outcomes, operation, patience, is_function = call
    fn: Callable[..., Awaitable[None]] = act if is_function else Acts()
    await trio.sleep(number * 0.7)
    with trio.move_on_after(patience):
        with suppress(Exception):  # which of them, the policies tell
            await policies[name].call(fn, seconds, iter(outcomes), name=operation)


def counted(chosen: list[Call], *others: Callable[[Event], object]) -> MetricsSnapshot:
    """What is counted of these calls while *others* listen, too."""
    metrics = Metrics(max_series=6)
    clock = trio.testing.MockClock(autojump_threshold=0)
    with ExitStack() as stack:
        listeners: list[Callable[[Event], object]] = [metrics, *others]
        for listener in listeners:
            stack.enter_context(subscribe(listener))
        trio.run(make_calls, chosen, clock=clock)
    return metrics.snapshot()


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.lists(calls, max_size=12))
def test_it_counts_the_same_with_and_without_events(chosen: list[Call]) -> None:
    """Successes, failures, refusals, cancellations, and what has no room of its own."""
    other = Metrics(max_series=6)
    alone = counted(chosen)
    assert alone == counted(chosen, lambda _: None)
    assert alone == counted(chosen, other) == other.snapshot()
    finished = sum(series.calls.finished for series in alone.series)
    assert finished == sum(series.calls.started for series in alone.series) == len(chosen)


async def returns(value: int) -> int:
    await trio.lowlevel.checkpoint()
    return value


@pytest.mark.parametrize("make", [Retry, CircuitBreaker])
async def test_no_event_is_built_of_a_success(
    make: Callable[[], Policy[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That would take ten times the steps of the call itself."""
    for kind in (CallStarted, CallFinished, AttemptStarted, AttemptFinished):
        monkeypatch.setattr(kind, "__init__", None)
    metrics, policy = Metrics(), make()
    with subscribe(metrics):
        for _ in range(200):
            assert await policy.call(returns, 3) == 3
    (series,) = metrics.snapshot().series
    assert (series.operation, series.calls.started, series.calls.succeeded.count) == (
        "returns",
        200,
        200,
    )
    assert series.attempts.started == series.attempts.succeeded == (200 if make is Retry else 0)


async def test_no_event_is_built_after_a_block_around_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So long as it is the only listener again."""
    with subscribe(Listener()):
        pass
    await test_no_event_is_built_of_a_success(Retry, monkeypatch)


def test_latencies_are_added_up_in_time() -> None:
    """Before anybody asks for them, they take no more room than a few do."""
    metrics = Metrics()
    ledger = metrics.ledgers["db", "load"]
    tracemalloc.start()
    try:
        for number in range(10_000):
            ledger.only_attempt_started()
            ledger.only_attempt_succeeded(number % 7 / 10)
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used < 10_000


async def test_a_listener_is_let_go() -> None:
    """With its block."""
    listener = Listener()
    held = weakref.ref(listener)
    with subscribe(listener):
        pass
    del listener
    gc.collect()
    assert held() is None


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
async def test_what_ends_after_the_block_is_not_counted(
    autojump_clock: MockClock, make: Callable[[], Policy[Any]]
) -> None:
    """Nor what begins after it; but whoever listens around the block still hears of both."""
    metrics, around = Metrics(), Listener()
    policy = make()

    async def call_twice() -> None:
        for _ in range(2):
            await policy.call(trio.sleep, 2)

    with subscribe(around):
        async with trio.open_nursery() as nursery:
            with subscribe(metrics):
                nursery.start_soon(call_twice)
                await trio.sleep(1)
    (series,) = metrics.snapshot().series
    assert (series.calls.started, series.calls.finished) == (1, 0)
    finished = around.of(CallFinished)
    assert [(event.time, event.duration) for event in finished] == [(2, 2), (4, 2)]


@pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)
async def test_a_block_may_end_before_all_that_it_has_started(
    autojump_clock: MockClock, make: Callable[[], Policy[Any]]
) -> None:
    """Though nobody listens around it, somebody does elsewhere."""
    metrics, policy = Metrics(), make()

    async def listen_elsewhere() -> None:
        with subscribe(Listener()):
            await trio.sleep(10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen_elsewhere)
        with subscribe(metrics):
            nursery.start_soon(policy.call, trio.sleep, 2)
            await trio.sleep(1)
        await trio.sleep(2)
        await policy.call(trio.sleep, 1)
    (series,) = metrics.snapshot().series
    assert (series.calls.started, series.calls.finished) == (1, 0)


async def test_another_may_begin_to_listen_in_between(autojump_clock: MockClock) -> None:
    """Within the block of the only one: then both are told, until it has enough."""
    metrics, listener, retry = Metrics(), Listener(), Retry()
    with subscribe(metrics):
        await retry.call(trio.sleep, 1)
        with subscribe(listener):
            await retry.call(trio.sleep, 1)
        await retry.call(trio.sleep, 1)
    (series,) = metrics.snapshot().series
    assert (series.calls.started, series.calls.succeeded.count) == (3, 3)
    assert series.attempts.succeeded == 3
    assert listener.kinds == [CallStarted, AttemptStarted, AttemptFinished, CallFinished]


async def test_a_retry_is_told_from_the_first_attempt_on(autojump_clock: MockClock) -> None:
    """By events, from the first failure on."""
    metrics, listener, failures = Metrics(), Listener(), iter([OSError("1"), OSError("2")])
    retry = Retry(backoff=Constant(3))
    with subscribe(metrics):
        await retry.call(act, 1, failures, name="load")
    (series,) = metrics.snapshot().series
    assert (series.calls.succeeded.count, series.calls.succeeded.total) == (1, 9)
    attempts = series.attempts
    assert (attempts.started, attempts.failed, attempts.succeeded, attempts.retries) == (3, 2, 1, 2)
    with subscribe(listener):
        await retry.call(act, 1, iter([OSError("1")]), name="load")
    attempt = [AttemptStarted, AttemptFinished]
    assert listener.kinds == [CallStarted, *attempt, RetryScheduled, *attempt, CallFinished]
    assert [event.duration for event in listener.of(AttemptFinished)] == [1, 1]
    assert listener.of(CallFinished)[0].duration == 5


@coroutine
def pause() -> Generator[None]:
    yield


async def wait_for_ever() -> None:
    await pause()


@pytest.mark.parametrize("make", [Retry, CircuitBreaker])
@pytest.mark.parametrize("listener", [Metrics(), print], ids=["counts", "prints"])
def test_a_call_that_is_left_behind_ends_at_no_time(
    capsys: pytest.CaptureFixture[str],
    make: Callable[[], Policy[Any]],
    listener: Callable[[Event], object],
) -> None:
    """It is closed when its run is over, and says nothing."""
    left: list[Any] = []

    async def main() -> None:
        left.append(make().call(wait_for_ever))
        left[0].send(None)

    with subscribe(listener):
        trio.run(main)
        left.pop().close()
    assert "Finished" not in capsys.readouterr().out
