"""RateLimiter: what it lets in at once, how evenly afterwards, and what it says about itself."""

from __future__ import annotations

import datetime as dt
import inspect
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.operations import Steps, Stopwatch, fails, returns, within_calls
from tests.test_events import Listener
from trio_resilience import (
    Policy,
    RateLimiter,
    RateLimiterStatistics,
    RateLimitExceededError,
    Rejected,
    RejectedError,
    WaitFinished,
    WaitStarted,
    subscribe,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    from trio_resilience import CombinedRateLimiter

    Limiter = RateLimiter | CombinedRateLimiter
    Form = Callable[[Limiter], Awaitable[object]]


async def by_acquire(limiter: Limiter) -> None:
    await limiter.acquire()


async def by_block(limiter: Limiter) -> None:
    async with limiter:
        pass


async def by_call(limiter: Limiter) -> None:
    await limiter.call(trio.lowlevel.checkpoint)


async def by_decorator(limiter: Limiter) -> None:
    async def function() -> None:
        await trio.lowlevel.checkpoint()

    await limiter(function)()


FORMS = [by_acquire, by_block, by_call, by_decorator]
forms = pytest.mark.parametrize("form", FORMS)


def drain(limiter: Limiter) -> int:
    """Take what can be had at once, and return how much that was."""
    taken = 0
    try:
        while True:
            limiter.acquire_nowait()
            taken += 1
    except trio.WouldBlock:
        return taken


async def instants(limiter: Limiter, number: int, form: Form = by_acquire) -> list[float]:
    """When a task that asks *number* times in a row was let in."""
    watch, found = Stopwatch(), list[float]()
    for _ in range(number):
        await form(limiter)
        found.append(watch.seconds)
    return found


# --- the rate -----------------------------------------------------------------------------------


@forms
async def test_calls_are_evenly_spaced(autojump_clock: MockClock, form: Form) -> None:
    """By default nothing goes at once but the first."""
    assert await instants(RateLimiter(10), 5, form) == [0, 0.1, 0.2, 0.3, 0.4]


@forms
async def test_a_burst_goes_at_once(autojump_clock: MockClock, form: Form) -> None:
    """Then it is the rate that counts."""
    limiter = RateLimiter(10, burst=10)
    assert await instants(limiter, 13, form) == [0.0] * 10 + [0.1, 0.2, 0.3]


@pytest.mark.parametrize(
    "rate, per, interval",
    [
        (300, 60, 0.2),
        (300, dt.timedelta(minutes=1), 0.2),
        (0.5, 1, 2),
        (1, 3600, 3600),
        (3, 1, 1 / 3),
        (1000, 1, 0.001),
        (0.1, 0.1, 1),
        (7, 86400, 86400 / 7),
    ],
)
async def test_the_rate_is_per_a_time(
    autojump_clock: MockClock, rate: float, per: float | dt.timedelta, interval: float
) -> None:
    """A number of seconds, or a timedelta."""
    times = await instants(RateLimiter(rate, per=per), 4)
    assert times == pytest.approx([0, interval, 2 * interval, 3 * interval], abs=2e-6)


@pytest.mark.parametrize("burst", [1, 2, 10, 1000])
@pytest.mark.parametrize("rate, per", [(10, 1), (3, 1), (300, 60), (0.001, 1), (1e6, 1)])
def test_after_an_hour_of_idleness_the_first_burst_is_no_more(
    rate: float, per: float, burst: int
) -> None:
    """What was not used for long is lost; a bucket that runs over holds a burst."""
    clock = trio.testing.MockClock()
    limiter = RateLimiter(rate, per=per, burst=burst)

    async def main() -> None:
        assert drain(limiter) == burst
        clock.jump(burst * per / rate + 3600)
        assert drain(limiter) == burst
        clock.jump(per / rate)
        assert drain(limiter) == 1

    trio.run(main, clock=clock)


async def test_tokens_come_one_by_one(mock_clock: MockClock) -> None:
    """And parts of one are kept: two halves are one."""
    limiter = RateLimiter(1, burst=5)
    assert drain(limiter) == 5
    got = list[int]()
    for seconds in (0.5, 0.25, 0.25, 0.5, 2.75, 0.75, 0.0, 100.0):
        mock_clock.jump(seconds)
        got.append(drain(limiter))
    assert got == [0, 0, 1, 0, 3, 1, 0, 5]


async def test_a_call_may_cost_more_than_one(autojump_clock: MockClock) -> None:
    """It waits until it can have all of that, and others then wait longer."""
    limiter, watch, times = RateLimiter(2, burst=4), Stopwatch(), list[float]()
    for cost in (3, 3, 1, 4, 1):
        await limiter.acquire(cost)
        times.append(watch.seconds)
    assert times == [0, 1, 1.5, 3.5, 4]
    mock = limiter.statistics()
    assert (mock.available, mock.waiting) == (0, 0)


async def test_acquire_nowait_takes_all_or_nothing(mock_clock: MockClock) -> None:
    """A refusal costs nothing."""
    limiter = RateLimiter(1, burst=5)
    limiter.acquire_nowait(3)
    for _ in range(10):
        with pytest.raises(trio.WouldBlock):
            limiter.acquire_nowait(3)
    assert limiter.statistics().available == 2
    limiter.acquire_nowait(2)
    mock_clock.jump(3)
    limiter.acquire_nowait(cost=3)
    with pytest.raises(trio.WouldBlock):
        limiter.acquire_nowait()


async def test_what_a_block_takes_is_spent(mock_clock: MockClock) -> None:
    """A rate is not a number of places: leaving gives nothing back, whatever ends the block."""
    limiter = RateLimiter(1, burst=4)
    async with limiter:
        assert limiter.statistics().available == 3
    assert limiter.statistics().available == 3
    with pytest.raises(KeyError):
        async with limiter:
            raise KeyError
    with trio.CancelScope() as scope:
        async with limiter:
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert limiter.statistics() == RateLimiterStatistics(available=1, waiting=0, rejections=0)


# --- what it runs -------------------------------------------------------------------------------


async def test_the_result_is_the_operations() -> None:
    """With its arguments."""
    limiter = RateLimiter(1e6, burst=100)
    assert isinstance(limiter, Policy)
    assert await limiter.call(returns, "value") == "value"
    assert await limiter(returns)(value=7) == 7


@pytest.mark.parametrize("error", [OSError(), RejectedError(), SystemExit(), GeneratorExit()])
async def test_the_error_is_the_operations(error: BaseException) -> None:
    """The same object; it did run, so its token is spent, and it is no rejection."""
    limiter = RateLimiter(0.001, burst=2)
    with pytest.raises(type(error)) as caught:
        await limiter.call(fails, error)
    assert caught.value is error
    assert limiter.statistics() == RateLimiterStatistics(1, 0, 0)


@pytest.mark.filterwarnings("error")
async def test_what_is_no_operation_costs_nothing() -> None:
    """A mistake that can be seen is refused before a token is taken, or waited for."""
    limiter: Any = RateLimiter(0.001, burst=1)
    for mistake in (returns(1), print, 5, None):
        with pytest.raises(TypeError, match="must be an async function"):
            await limiter.call(mistake)
    with pytest.raises(TypeError, match="async"):
        limiter(lambda_free)
    assert limiter.statistics().available == 1
    with pytest.raises(TypeError, match="can't be awaited"):
        await limiter.call(lambda: 3)


def lambda_free() -> int:
    return 3


def test_a_decorated_function_stays_what_it_is() -> None:
    """Name, docstring, signature, and that it is a coroutine function."""
    limiter = RateLimiter(1)

    @limiter
    async def fetch(url: str, *, depth: int = 0) -> str:
        """Fetch it."""
        return url * depth

    assert (fetch.__name__, fetch.__doc__) == ("fetch", "Fetch it.")
    assert list(inspect.signature(fetch).parameters) == ["url", "depth"]
    assert inspect.iscoroutinefunction(fetch)


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [by_acquire, by_block])
async def test_to_be_let_in_at_once_is_a_checkpoint(form: Form) -> None:
    """Exactly one, so that a loop of them does not freeze the program."""
    limiter, steps = RateLimiter(1, burst=101), Steps()
    with trio.testing.assert_checkpoints():
        await form(limiter)
    trio.lowlevel.add_instrument(steps)
    for _ in range(100):
        await form(limiter)
    trio.lowlevel.remove_instrument(steps)
    assert steps.count == 100


async def test_a_call_adds_no_trip_through_the_scheduler() -> None:
    """The operation's own checkpoint is enough."""
    limiter, steps = RateLimiter(1, burst=1000), Steps()
    with trio.testing.assert_no_checkpoints():
        await limiter.call(returns, 1)
    trio.lowlevel.add_instrument(steps)
    for _ in range(100):
        await limiter.call(trio.lowlevel.checkpoint)
    trio.lowlevel.remove_instrument(steps)
    assert steps.count == 100


@forms
async def test_a_refusal_is_a_checkpoint(form: Form) -> None:
    """So that it may be tried again in a loop."""
    limiter = RateLimiter(0.001, max_wait=0)
    await form(limiter)
    with trio.testing.assert_checkpoints(), pytest.raises(RateLimitExceededError):
        await form(limiter)
    with trio.CancelScope() as scope:
        scope.cancel()
        await form(limiter)
    assert scope.cancelled_caught
    assert limiter.statistics().rejections == 1


@pytest.mark.parametrize("form", [by_acquire, by_block])
async def test_a_cancelled_task_takes_no_token(form: Form) -> None:
    """Though one is free."""
    limiter = RateLimiter(0.001)
    with trio.CancelScope() as scope:
        scope.cancel()
        await form(limiter)
    assert scope.cancelled_caught
    assert limiter.statistics().available == 1


# --- what it says about itself --------------------------------------------------------------------


async def test_retry_after_says_when_a_newcomer_would_pass(mock_clock: MockClock) -> None:
    """Zero means now."""
    limiter, seen = RateLimiter(2, burst=2), list[float]()
    seen.append(limiter.retry_after)
    for _ in range(2):
        limiter.acquire_nowait()
        seen.append(limiter.retry_after)
    for _ in range(3):
        mock_clock.jump(0.25)
        seen.append(round(limiter.retry_after, 6))
    assert seen == [0, 0, 0.5, 0.25, 0, 0]


async def test_statistics_count_whole_tokens(mock_clock: MockClock) -> None:
    """Those that may be taken at this moment."""
    limiter, seen = RateLimiter(1, burst=3), list[int]()
    for seconds in (0, 0.5, 0.5, 1.5, 100):
        mock_clock.jump(seconds)
        if not seen:
            limiter.acquire_nowait(3)
        seen.append(limiter.statistics().available)
        assert type(seen[-1]) is int
    assert seen == [0, 0, 1, 2, 3]


async def test_a_limiter_with_a_full_bucket_and_an_empty_line_is_idle(
    mock_clock: MockClock,
) -> None:
    """Then a new one in its place would behave the same."""
    limiter = RateLimiter(1, burst=2)
    assert limiter.is_idle
    limiter.acquire_nowait()
    assert not limiter.is_idle
    mock_clock.jump(0.5)
    assert not limiter.is_idle
    mock_clock.jump(0.5)
    assert limiter.is_idle
    limiter.rate = 3
    assert not limiter.is_idle
    limiter.rate = 1
    assert limiter.is_idle


async def test_what_is_waited_for_is_told(autojump_clock: MockClock) -> None:
    """The start and the end of a wait, and refusals; nothing where nobody waits."""
    limiter, listener = RateLimiter(1, max_wait=1.25, name="api"), Listener()
    with subscribe(within_calls(listener)):
        await limiter.acquire()
        assert listener.heard == []
        await limiter.call(returns, 1, name="load")
        with trio.move_on_after(0.5):
            await limiter.call(returns, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(by_block, limiter)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(RateLimitExceededError):
                await limiter.acquire()
    assert {event.policy for event in listener.heard} == {"api"}
    ends, started = listener.of(WaitFinished), listener.of(WaitStarted)
    assert [(e.time, e.operation) for e in started] == [
        (0, "load"),
        (1, "returns"),
        (1.5, "acquire"),
    ]
    assert [(e.time, e.operation) for e in ends] == [(1, "load"), (1.5, "returns"), (2, "acquire")]
    assert [(e.duration, e.cancelled) for e in ends] == [(1, False), (0.5, True), (0.5, False)]
    refused = [(e.time, e.operation, e.retry_after) for e in listener.of(Rejected)]
    assert refused == [(1.5, "acquire", 1.5)]
    assert len(listener.heard) == 7
