"""Policies in one another and in bounded concurrency: each does its part, and only that."""

from __future__ import annotations

import math
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import Gauge, Stopwatch, foreign_nursery, leaves, returns
from trio_resilience import (
    AttemptFinished,
    AttemptStarted,
    Constant,
    Event,
    OperationFinished,
    OperationsFailedError,
    OperationStarted,
    OperationTimeoutError,
    Retry,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
    Timeout,
    map_with_limit,
    run_in,
    run_with_limit,
    run_with_retry,
    stream_map_with_limit,
    subscribe,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

given_or_not = pytest.mark.parametrize("given", [True, False], ids=["given", "own"])


def seconds_left() -> float:
    return round(trio.current_effective_deadline() - trio.current_time(), 6)


# --- who sees which deadline -----------------------------------------------------------------------


@given_or_not
async def test_an_operation_sees_the_nearest_of_all_deadlines(
    autojump_clock: MockClock, given: bool
) -> None:
    """Of the caller, the job, the policies around it and within: whichever comes first."""
    seen: list[float] = []

    async def look() -> None:
        seen.append(seconds_left())
        await trio.lowlevel.checkpoint()

    async def under(caller: float, job: float, attempt: float, inner: float) -> None:
        retry, timeout = Retry(attempt_timeout=attempt), Timeout(inner)
        with trio.move_on_after(caller):
            await run_with_limit(
                nursery if given else None, [partial(timeout.call, look)], timeout=job, policy=retry
            )

    async with foreign_nursery() as nursery:
        for nearest in range(4):
            limits = [9.0] * 4
            limits[nearest] = 3.0
            await under(*limits)
    assert seen == [3.0] * 4


@given_or_not
async def test_a_retry_in_an_operation_gives_up_in_time_for_its_timeout(
    autojump_clock: MockClock, given: bool
) -> None:
    """Rather than to sleep into it, it comes out with the operation's own error, and a reason."""
    gauge, watch = Gauge(), Stopwatch()
    retry = Retry(max_attempts=None, backoff=Constant(1))
    async with foreign_nursery() as nursery:
        results: list[Any] = await run_with_limit(
            nursery if given else None,
            [gauge.op(0, 1, OSError("mine"))],
            policy=retry,
            timeout=4.5,
            on_error="collect",
        )
    assert str(results[0].error) == "mine"
    assert "deadline" in results[0].error.__notes__[0]
    assert gauge.failed == [0, 0]  # at 1 and 3; a third would begin at 4
    assert watch.seconds == 5 or watch.seconds == 3  # noqa: PLR1714


async def test_timeouts_in_a_retry_in_a_timeout(autojump_clock: MockClock) -> None:
    """The inner limit expires again and again, the outer one once, and ends it."""
    inner, outer = Timeout(0.1), Timeout(0.5)
    retry = Retry(max_attempts=None, backoff=Constant(0))
    watch, heard = Stopwatch(), list[Event]()

    with subscribe(heard.append), pytest.raises(OperationTimeoutError) as caught:
        await outer.call(retry.call, inner.call, trio.sleep, 0.15)
    assert caught.value.timeout == 0.5
    assert watch.seconds == 0.5
    assert inner.statistics().timed_out >= 3
    assert outer.statistics().timed_out == 1
    expired = Counter(event.timeout for event in heard if isinstance(event, TimedOut))
    assert expired == {0.1: inner.statistics().timed_out, 0.5: 1}
    assert retry.statistics().given_up == 0


async def test_limits_of_one_retry_in_a_timeout(autojump_clock: MockClock) -> None:
    """The same, with the retry's own limit of each attempt."""
    outer = Timeout(0.5)
    retry = Retry(max_attempts=None, backoff=Constant(0), attempt_timeout=0.1)
    with pytest.raises(OperationTimeoutError) as caught:
        await outer.call(retry.call, trio.sleep, 0.15)
    assert caught.value.timeout == 0.5
    assert retry.statistics().attempts >= 4
    assert retry.statistics().given_up == 0


async def test_the_total_of_a_retry_ends_a_timeout_inside(autojump_clock: MockClock) -> None:
    """The error names the limit that ended it; its cause is what happened before."""
    retry = Retry(max_attempts=None, backoff=Constant(0), total_timeout=0.25)
    inner = Timeout(0.1)
    with pytest.raises(OperationTimeoutError) as caught:
        await retry.call(inner.call, trio.sleep_forever)
    assert caught.value.timeout == 0.25
    assert isinstance(caught.value.__cause__, OperationTimeoutError)
    assert caught.value.__cause__.timeout == 0.1


# --- cancellation wins -----------------------------------------------------------------------------


async def _in_a_timeout(policy: Timeout, _: Retry) -> None:
    await policy.call(trio.sleep_forever)


async def _in_a_timed_attempt(_: Timeout, retry: Retry) -> None:
    await retry.call(trio.sleep_forever)


async def _in_both(timeout: Timeout, retry: Retry) -> None:
    await retry.call(timeout.call, trio.sleep_forever)


async def _in_an_operation(timeout: Timeout, retry: Retry) -> None:
    ops = [partial(timeout.call, trio.sleep_forever)] * 3
    await run_with_limit(None, ops, policy=retry, timeout=1, max_concurrency=2)


async def _in_a_stream(timeout: Timeout, retry: Retry) -> None:
    op = partial(timeout.call, trio.sleep)
    async with stream_map_with_limit(None, op, [math.inf] * 3, timeout=1, policy=retry) as results:
        async for _ in results:
            pass


@pytest.mark.parametrize(
    "call", [_in_a_timeout, _in_a_timed_attempt, _in_both, _in_an_operation, _in_a_stream]
)
@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "by its deadline"])
async def test_a_cancellation_at_the_instant_of_our_own_timeouts_wins(
    autojump_clock: MockClock, call: Callable[[Timeout, Retry], Awaitable[None]], by_hand: bool
) -> None:
    """It is counted nowhere, and no listener hears of a failure."""
    timeout, heard = Timeout(1), list[Event]()
    retry = Retry(max_attempts=None, backoff=Constant(0), attempt_timeout=1, total_timeout=1)
    with trio.CancelScope(deadline=math.inf if by_hand else trio.current_time() + 1) as scope:
        async with trio.open_nursery() as nursery:
            if by_hand:
                nursery.start_soon(_cancel_after, scope, 1)
            with subscribe(heard.append):
                await call(timeout, retry)
    assert scope.cancelled_caught or by_hand
    if scope.cancelled_caught:
        assert timeout.statistics().timed_out == 0
        assert retry.statistics().given_up == 0
        verdicts = (TimedOut, AttemptFinished, RetryScheduled, RetryGaveUp)
        assert not any(isinstance(event, verdicts) for event in heard)


async def _cancel_after(scope: trio.CancelScope, seconds: float) -> None:
    await trio.sleep(seconds)
    scope.cancel()
