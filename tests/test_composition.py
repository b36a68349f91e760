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


# --- who sees which deadline ----------------------------------------------------------------------


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
            timeout=4,
            on_error="collect",
        )
    assert str(results[0].error) == "mine"
    assert "deadline" in results[0].error.__notes__[0]
    assert gauge.failed == [0, 0]  # at 1 and 3; the next would begin at 4
    assert watch.seconds == 3


async def test_timeouts_in_a_retry_in_a_timeout(autojump_clock: MockClock) -> None:
    """The inner limit expires again and again, the outer one once, and ends it."""
    inner, outer = Timeout(0.1), Timeout(0.5)
    retry = Retry(max_attempts=None, backoff=Constant(0))
    watch, heard = Stopwatch(), list[Event]()

    with subscribe(heard.append), pytest.raises(OperationTimeoutError) as caught:
        await outer.call(lambda: retry.call(inner.call, trio.sleep, 0.15))
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


# --- cancellation wins ----------------------------------------------------------------------------


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
    async def op(seconds: float) -> None:
        await timeout.call(trio.sleep, seconds)

    async with stream_map_with_limit(None, op, [math.inf] * 3, timeout=1, policy=retry) as results:
        async for _ in results:
            pass


@pytest.mark.parametrize(
    "call", [_in_a_timeout, _in_a_timed_attempt, _in_both, _in_an_operation, _in_a_stream]
)
async def test_a_cancellation_at_the_instant_of_our_own_timeouts_wins(
    autojump_clock: MockClock, call: Callable[[Timeout, Retry], Awaitable[None]]
) -> None:
    """It is counted nowhere, and no listener hears of a verdict."""
    timeout, heard = Timeout(1), list[Event]()
    retry = Retry(max_attempts=None, backoff=Constant(0), attempt_timeout=1, total_timeout=1)
    with trio.move_on_after(1) as scope, subscribe(heard.append):
        await call(timeout, retry)
    assert scope.cancelled_caught
    assert timeout.statistics().timed_out == 0
    assert retry.statistics().given_up == retry.statistics().recovered == 0
    verdicts = (TimedOut, RetryScheduled, RetryGaveUp)
    assert not any(isinstance(event, verdicts) for event in heard)
    ended = [event for event in heard if isinstance(event, OperationFinished)]
    assert all(event.cancelled and event.error is None for event in ended)


@given_or_not
async def test_a_cancelled_caller_stops_a_retry_around_a_call(
    autojump_clock: MockClock, given: bool
) -> None:
    """The cancellation is no failure of the call that would deserve another try."""
    gauge, retry = Gauge(), Retry(max_attempts=None, on=Exception, backoff=Constant(0))
    async with foreign_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            await retry.call(run_with_limit, nursery if given else None, gauge.ops(5, 5))
    assert scope.cancelled_caught
    assert sorted(gauge.started) == sorted(gauge.cancelled) == [0, 1]
    assert retry.statistics().attempts == 1


# --- bounded concurrency within policies ----------------------------------------------------------


@given_or_not
async def test_a_retry_around_a_call_runs_all_of_it_again(
    autojump_clock: MockClock, given: bool
) -> None:
    """A group of transient failures is one transient failure."""
    gauge, retry = Gauge(), Retry(max_attempts=3, backoff=Constant(1))
    errors: list[Exception] = [OSError("first"), OSError("second")]

    async def batch(nursery: trio.Nursery | None) -> list[int]:
        last = gauge.op(2, 1, errors.pop(0) if errors else None)
        return await run_with_limit(nursery, [gauge.op(0, 1), gauge.op(1, 1), last])

    async with foreign_nursery() as nursery:
        result = await retry.call_counted(batch, nursery if given else None)
        assert not nursery.child_tasks
    assert result.result == [0, 1, 2]
    assert (result.attempts, result.total_delay) == (3, 2)
    assert len(gauge.started) == 9


async def test_one_fatal_failure_makes_a_call_fatal(autojump_clock: MockClock) -> None:
    """The retry around it comes out with the group, untouched but for its note."""
    gauge, retry = Gauge(), Retry(max_attempts=3, backoff=Constant(1))
    ops = [gauge.op(0, 1, OSError()), gauge.op(1, 1, KeyError())]
    with pytest.raises(OperationsFailedError) as caught:
        await retry.call(partial(run_with_limit, on_error="continue"), None, ops)
    assert [type(leaf) for leaf in leaves(caught.value)] == [OSError, KeyError]
    assert any("not retried" in note for note in caught.value.__notes__)
    assert retry.statistics().attempts == 1


async def test_a_timeout_around_a_call_cancels_and_joins_it(autojump_clock: MockClock) -> None:
    """One limit for all of it: operations that have ended leave nothing, the others are stopped."""
    gauge, timeout = Gauge(), Timeout(2.5)
    with pytest.raises(OperationTimeoutError):
        await timeout.call(partial(run_with_limit, max_concurrency=1), None, gauge.ops(1, 1, 1, 1))
    assert (gauge.finished, gauge.cancelled, gauge.running) == ([0, 1], [2], 0)


@given_or_not
async def test_a_timeout_around_a_call_is_no_cancelled_nursery(
    autojump_clock: MockClock, given: bool
) -> None:
    """The caller's limit reaches operations in a foreign nursery, and is told by its own name."""
    gauge, timeout = Gauge(), Timeout(1)
    async with foreign_nursery() as nursery:
        where = nursery if given else None
        with pytest.raises(OperationTimeoutError):
            await timeout.call(run_with_limit, where, gauge.ops(5))
        with pytest.raises(OperationTimeoutError):
            await timeout.call(run_in, where, gauge.op(0, 5))
        with pytest.raises(OperationTimeoutError):
            await timeout.call(run_with_retry, where, gauge.op(0, 5))
    assert gauge.cancelled == [0, 0, 0]


@given_or_not
async def test_a_decorated_function_is_an_operation_like_any_other(
    autojump_clock: MockClock, given: bool
) -> None:
    """Policies that decorate it apply within the policy and the limit of the job."""
    timeout, tries = Timeout(1), Counter[int]()
    retry = Retry(max_attempts=3, backoff=Constant(0.5))

    @retry
    @timeout
    async def fetch(number: int) -> int:
        tries[number] += 1
        await trio.sleep(5 if tries[number] == 1 else 0.5)
        return number

    async with foreign_nursery() as nursery:
        where = nursery if given else None
        assert await map_with_limit(where, fetch, range(5), max_concurrency=2) == [0, 1, 2, 3, 4]
    assert set(tries.values()) == {2}
    assert timeout.statistics().timed_out == retry.statistics().recovered == 5


# --- one policy, many tasks -----------------------------------------------------------------------


async def test_fifty_tasks_share_two_policies(autojump_clock: MockClock) -> None:
    """Each has its own attempts, its own deadline and its own error; the counts are of them all."""
    timeout = Timeout(1)
    retry = Retry(max_attempts=3, backoff=Constant(1))
    tries = Counter[int]()

    async def op(number: int) -> int:
        """Succeed at the first, second or third attempt, or never; by an error or by slowness."""
        tries[number] += 1
        await trio.sleep(0.1)
        if tries[number] <= number % 5:
            if number % 2:
                raise OSError(number)
            await trio.sleep_forever()
        return number

    results: dict[int, object] = {}

    async def user(number: int) -> None:
        try:
            results[number] = await retry.call(timeout.call, op, number)
        except (OSError, OperationTimeoutError) as error:
            results[number] = error

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(user, number)
    for number, result in results.items():
        if number % 5 < 3:
            assert result == number
        else:
            kind = OSError if number % 2 else OperationTimeoutError
            assert isinstance(result, kind)
            assert isinstance(result, OperationTimeoutError) or result.args == (number,)
    assert tries == {number: min(1 + number % 5, 3) for number in range(50)}
    statistics = retry.statistics()
    assert (statistics.calls, statistics.attempts) == (50, tries.total())
    assert (statistics.recovered, statistics.given_up) == (20, 20)
    assert timeout.statistics().calls == tries.total()
    assert timeout.statistics().timed_out == sum(min(number % 5, 3) for number in range(0, 50, 2))


# --- sums -----------------------------------------------------------------------------------------


@given_or_not
async def test_what_listeners_hear_adds_up(autojump_clock: MockClock, given: bool) -> None:
    """Every operation and attempt that begins ends, and every failure has one verdict."""
    heard, tries = list[Event](), Counter[int]()
    retry = Retry(max_attempts=2, backoff=Constant(1), attempt_timeout=2)

    async def op(number: int) -> int:
        tries[number] += 1
        await trio.sleep(9 if number % 5 == 4 else 0.5)  # too slow for its attempt
        if number % 5 == 3 or (number % 5 == 2 and tries[number] == 1):
            raise OSError(number)
        return number

    async with foreign_nursery() as nursery:
        with subscribe(heard.append):
            results: list[Any] = await map_with_limit(
                nursery if given else None,
                op,
                range(20),
                max_concurrency=3,
                policy=retry,
                on_error="collect",
            )
        await run_with_limit(None, [partial(returns, 1)])  # nobody listens any more

    count = Counter(type(event) for event in heard)
    failed = [event for event in heard if isinstance(event, AttemptFinished) and event.error]
    errors = [each for each in results if hasattr(each, "error")]
    statistics = retry.statistics()
    assert count[OperationStarted] == count[OperationFinished] == 20
    assert count[AttemptStarted] == count[AttemptFinished] == tries.total() == statistics.attempts
    assert len(failed) == count[RetryScheduled] + count[RetryGaveUp]
    assert count[RetryGaveUp] == statistics.given_up == len(errors) == 8
    assert count[RetryScheduled] == statistics.attempts - statistics.calls
    assert count[TimedOut] == 2 * 4
    ended = [event for event in heard if isinstance(event, OperationFinished)]
    assert sum(event.error is not None for event in ended) == len(errors)
    assert not any(event.cancelled for event in ended)
