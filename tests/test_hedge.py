"""Hedge: when another leg is started, which result is taken, and what the call comes to."""

from __future__ import annotations

import datetime as dt
import math
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
import trio.testing

from tests.operations import fails, returns, within_calls
from trio_resilience import Constant, Event, RejectedError, Retry, Timeout, subscribe
from trio_resilience._algorithms._budget import RetryBudget
from trio_resilience._algorithms._quantile import Quantile
from trio_resilience._events import HedgeStarted
from trio_resilience._hedge import Hedge, HedgeStatistics
from trio_resilience.testing import test_mode as mode

if TYPE_CHECKING:
    from trio.testing import MockClock


@attrs.define(eq=False)
class Legs:
    """An operation whose calls take so long each, and return their number or raise an error."""

    steps: list[float | tuple[float, BaseException]]
    began_at: list[float] = attrs.field(factory=list[float], init=False)
    cancelled_at: dict[int, float] = attrs.field(factory=dict[int, float], init=False)
    running: int = 0

    async def __call__(self) -> int:
        number = len(self.began_at)
        self.began_at.append(round(trio.current_time(), 6))
        step = self.steps[min(number, len(self.steps) - 1)]
        seconds, error = step if isinstance(step, tuple) else (step, None)
        self.running += 1
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.cancelled_at[number] = round(trio.current_time(), 6)
            raise
        finally:
            self.running -= 1
        if error is not None:
            raise error
        return number


def notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


# --- slowness -----------------------------------------------------------------------------------


async def test_a_quick_call_is_not_hedged(autojump_clock: MockClock) -> None:
    """Nothing else is called."""
    hedge, legs = Hedge(after=1), Legs([0.9])
    assert await hedge.call(legs) == 0
    assert legs.began_at == [0]
    assert hedge.statistics() == HedgeStatistics(1, 0, 0, 0, 0, after=1)


async def test_a_slow_call_is_made_again(autojump_clock: MockClock) -> None:
    """What comes first is taken; the first call is cancelled, and has ended on return."""
    hedge, legs = Hedge(after=1), Legs([60, 0.5])
    assert await hedge.call(legs) == 1
    assert trio.current_time() == 1.5
    assert (legs.began_at, legs.cancelled_at, legs.running) == ([0, 1], {0: 1.5}, 0)
    assert hedge.statistics() == HedgeStatistics(1, 1, 1, 0, 0, after=1)


async def test_the_first_may_still_win(autojump_clock: MockClock) -> None:
    hedge, legs = Hedge(after=1), Legs([1.2, 60])
    assert await hedge.call(legs) == 0
    assert trio.current_time() == 1.2
    assert legs.cancelled_at == {1: 1.2}
    assert hedge.statistics() == HedgeStatistics(1, 1, 0, 0, 0, after=1)


async def test_there_may_be_several_hedges(autojump_clock: MockClock) -> None:
    """Each so long after the one before; no more than allowed."""
    hedge, legs = Hedge(after=1, max_hedges=3), Legs([60, 60, 60, 7])
    assert await hedge.call(legs) == 3
    assert legs.began_at == [0, 1, 2, 3]
    assert trio.current_time() == 10
    assert hedge.statistics() == HedgeStatistics(1, 3, 1, 0, 0, after=1)


async def test_all_at_once(autojump_clock: MockClock) -> None:
    """After no time at all."""
    legs = Legs([5, 4, 3])
    assert await Hedge(after=0, max_hedges=2).call(legs) == 2
    assert legs.began_at == [0, 0, 0]
    assert trio.current_time() == 3


async def test_never_for_slowness(autojump_clock: MockClock) -> None:
    """With an infinite time, only failures start another."""
    legs = Legs([(50, OSError()), 1])
    assert await Hedge(after=math.inf).call(legs) == 1
    assert legs.began_at == [0, 50]


async def test_it_decorates(autojump_clock: MockClock) -> None:
    @Hedge(after=dt.timedelta(seconds=2))
    async def load(name: str, *, seconds: float) -> str:
        await trio.sleep(seconds)
        return name

    assert await load("x", seconds=3) == "x"
    assert load.__name__ == "load"


async def test_calls_at_once_have_nothing_to_do_with_each_other(autojump_clock: MockClock) -> None:
    hedge, found = Hedge(after=1), dict[int, int]()

    async def call(number: int) -> None:
        found[number] = await hedge.call(Legs([number, 1.5]))

    async with trio.open_nursery() as nursery:
        for number in range(10):
            nursery.start_soon(call, number)
    assert found == {number: int(number > 2) for number in range(10)}


async def test_an_operation_that_returns_at_once(autojump_clock: MockClock) -> None:
    """Whatever it returns, also an error; and the call is a checkpoint all the same."""
    for value in (None, 0, OSError("returned")):
        with trio.testing.assert_checkpoints():
            assert await Hedge(after=1).call(returns, value) is value


# --- failures -----------------------------------------------------------------------------------


async def test_a_failure_starts_the_next_at_once(autojump_clock: MockClock) -> None:
    """And a success that comes later beats it."""
    hedge, legs = Hedge(after=1), Legs([(0.1, OSError()), 0.5])
    assert await hedge.call(legs) == 1
    assert legs.began_at == [0, 0.1]
    assert hedge.statistics() == HedgeStatistics(1, 1, 1, 0, 0, after=1)


async def test_the_time_counts_from_the_last_start(autojump_clock: MockClock) -> None:
    """Whatever the reason of that."""
    legs = Legs([(0.5, OSError()), 60, 60, 60])
    with trio.move_on_after(10):
        await Hedge(after=1, max_hedges=3).call(legs)
    assert legs.began_at == [0, 0.5, 1.5, 2.5]


async def test_a_failure_while_another_runs_starts_the_next(autojump_clock: MockClock) -> None:
    legs = Legs([(1.2, OSError()), 60, 1])
    assert await Hedge(after=1, max_hedges=2).call(legs) == 2
    assert legs.began_at == [0, 1, 1.2]


async def test_failures_at_one_instant_start_one_each(autojump_clock: MockClock) -> None:
    """As long as there are any left to be started."""
    for max_hedges, most in ((1, 2), (2, 3), (3, 4), (9, 4)):
        legs = Legs([(2.5, OSError()), (1, OSError()), 60])
        with trio.move_on_after(2.9), suppress(OSError):
            await Hedge(after=1.5, max_hedges=max_hedges).call(legs)
        assert len(legs.began_at) == most


async def test_if_all_fail_the_first_error_comes_out(autojump_clock: MockClock) -> None:
    """The same object, whoever failed first; the others are in a note, and have none."""
    first, second, third = OSError("first"), OSError("second"), OSError("third")
    legs = Legs([(5, first), (1, second), (1, third)])
    hedge = Hedge(after=1, max_hedges=2, name="twice")
    with pytest.raises(OSError, match="first") as caught:
        await hedge.call(legs)
    assert caught.value is first
    told = "hedge 1 raised OSError('second'), hedge 2 raised OSError('third')"
    assert notes(first) == [f"twice: all 3 legs failed; {told}"]
    assert notes(second) == notes(third) == []
    assert first.__context__ is None
    assert hedge.statistics() == HedgeStatistics(1, 2, 0, 1, 0, after=1)


async def test_an_error_that_no_other_leg_would_cure_starts_none(
    autojump_clock: MockClock,
) -> None:
    """It comes out at once; but a leg that runs already may still succeed."""
    error = ValueError("wrong")
    legs = Legs([(0.5, error), 1])
    with pytest.raises(ValueError, match="wrong") as caught:
        await Hedge(after=1).call(legs)
    assert caught.value is error
    assert notes(error) == []
    assert (trio.current_time(), len(legs.began_at)) == (0.5, 1)
    legs = Legs([(1.5, error), 2, 60])
    assert await Hedge(after=1, max_hedges=2).call(legs) == 1
    assert len(legs.began_at) == 2


async def test_after_such_an_error_none_is_started_for_any_other(
    autojump_clock: MockClock,
) -> None:
    """Neither for slowness, nor when a leg that runs fails in a way that one might cure."""
    error = ValueError("wrong")
    legs = Legs([(1.5, error), (2, OSError()), 1])
    with pytest.raises(ValueError, match="wrong") as caught:
        await Hedge(after=1, max_hedges=5).call(legs)
    assert caught.value is error
    assert legs.began_at == [0, 1]


def at_once(_: Exception) -> float:
    return 0.0


def never(_: Exception) -> bool:
    return False


@pytest.mark.parametrize(
    "on, error, legs",
    [
        (ValueError, ValueError(), 2),
        (ValueError, OSError(), 1),
        (at_once, ValueError(), 2),
        (never, OSError(), 1),
        ((OSError, RejectedError), RejectedError(), 2),
    ],
)
async def test_which_errors_another_leg_is_for(on: Any, error: Exception, legs: int) -> None:
    """By default those that `Retry` would retry; a refusal is none of them."""
    operation = Legs([(0, error)])
    with pytest.raises(type(error)):
        await Hedge(after=1, on=on).call(operation)
    assert len(operation.began_at) == legs


async def test_a_refusal_is_not_repeated() -> None:
    """It would defeat failing fast."""
    legs = Legs([(0, RejectedError())])
    with pytest.raises(RejectedError):
        await Hedge(after=1).call(legs)
    assert len(legs.began_at) == 1


async def test_a_predicate_that_raises(autojump_clock: MockClock) -> None:
    """Its error comes out, and the legs that run have ended."""

    def divide(_: Exception) -> bool:
        raise ZeroDivisionError

    legs = Legs([(1.5, OSError()), 60])
    with pytest.raises(ZeroDivisionError):
        await Hedge(after=1, max_hedges=2, on=divide).call(legs)
    assert (legs.running, trio.current_time()) == (0, 1.5)


async def test_mistakes_are_no_failures() -> None:
    """A function that turns out not to be async is called once, and not counted."""
    called = list[int]()
    hedge, sync = Hedge(after=0, on=Exception), cast("Any", len)
    wrong: Any = lambda: called.append(1)  # noqa: E731 - a lambda is what it is about
    with pytest.raises(TypeError, match="must be an async function, but it returned None"):
        await hedge.call(wrong)
    assert set(called) == {1}
    with pytest.raises(TypeError, match="got the sync"):
        await hedge.call(sync, ())
    assert hedge.statistics().calls == 0


# --- budget -------------------------------------------------------------------------------------


async def test_a_budget_bounds_the_hedges(autojump_clock: MockClock) -> None:
    """When it is empty, a slow call stays a slow call, and a failure a failure."""
    budget = RetryBudget(0.1, max_tokens=2)
    hedge = Hedge(after=1, max_hedges=3, budget=budget)
    legs = Legs([10])
    assert await hedge.call(legs) == 0
    assert legs.began_at == [0, 1, 2]
    assert hedge.statistics() == HedgeStatistics(1, 2, 0, 0, 1, after=1)
    error = OSError("down")
    with pytest.raises(OSError, match="down"):
        await hedge.call(fails, error)
    assert notes(error) == ["hedge: no further one was started: the retry budget is empty"]
    assert budget.statistics().tokens == pytest.approx(0.1)


async def test_successes_feed_the_budget(autojump_clock: MockClock) -> None:
    """One for each call, however many legs that had; failures do not."""
    budget = RetryBudget(0.5, max_tokens=4)
    hedge = Hedge(after=1, budget=budget)
    await hedge.call(Legs([5]))
    assert budget.statistics().tokens == 3.5
    await hedge.call(Legs([0.5]))
    assert budget.statistics().tokens == 4
    with pytest.raises(ValueError, match="x"):
        await hedge.call(fails, ValueError("x"))
    with pytest.raises(OSError, match="x"):
        await hedge.call(fails, OSError("x"))
    assert budget.statistics().tokens == 3


async def test_a_hedge_that_calls_nothing_costs_nothing(autojump_clock: MockClock) -> None:
    """One that is cancelled before its first step."""
    budget = RetryBudget()
    legs = Legs([60])
    hedge = Hedge(after=1, budget=budget)
    with trio.CancelScope() as scope, subscribe(within_calls(lambda _: scope.cancel())):
        await hedge.call(legs)
    assert scope.cancelled_caught
    assert legs.began_at == [0]
    assert budget.is_full
    assert hedge.statistics().hedges == 0


async def test_an_outage_gets_no_more_load_than_there_are_calls(
    autojump_clock: MockClock,
) -> None:
    """Hedges and retries from one budget: nothing is added when it is empty."""
    budget = RetryBudget(0.1)
    hedge = Hedge(after=0.5, budget=budget)
    retry = Retry(backoff=Constant(1), budget=budget)
    for most in (1010, 1000):
        legs = Legs([(1, OSError())])
        for _ in range(1000):
            with pytest.raises(OSError):  # noqa: PT011 - it says nothing
                await retry.call(hedge.call, legs)
        assert len(legs.began_at) == most


# --- a learnt delay -----------------------------------------------------------------------------


async def test_the_delay_may_be_learnt(autojump_clock: MockClock) -> None:
    """From the latencies of the calls; until there are enough of them, the initial one counts."""
    hedge = Hedge(after=Quantile(0.9, min_samples=20, initial=5))
    assert hedge.statistics().after == 5
    assert hedge.is_idle
    for number in range(20):
        await hedge.call(trio.sleep, 1 + number / 1000)
    assert not hedge.is_idle
    assert hedge.statistics().after == pytest.approx(1.018, rel=0.02)
    legs = Legs([60, 1])
    assert await hedge.call(legs) == 1
    assert legs.began_at[1] - legs.began_at[0] == pytest.approx(1.018, rel=0.02)


@pytest.mark.parametrize("seconds", [0.001, 0.1, 1, 1.01, 2.5])
async def test_calls_that_all_take_as_long_are_not_hedged(
    autojump_clock: MockClock, seconds: float
) -> None:
    """None of them is slow: the quantile that is learnt is not less than what there was."""
    hedge = Hedge(after=Quantile(0.5, min_samples=10))
    heard = list[Event]()
    with subscribe(within_calls(heard.append)):
        for _ in range(100):
            await hedge.call(trio.sleep, seconds)
    assert hedge.statistics().hedges == 0
    assert heard == []


async def test_the_learnt_delay_finds_its_way(autojump_clock: MockClock) -> None:
    """Also if it is far too small at first, and what is slow is cancelled: one in ten is hedged."""
    rng = Random(11)
    hedge = Hedge(after=Quantile(0.9, min_samples=20, initial=0.001))

    async def op() -> None:
        await trio.sleep(round(rng.expovariate(10), 3))

    async def work() -> None:
        for _ in range(40):
            await hedge.call(op)

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(work)
    assert hedge.statistics().after == pytest.approx(math.log(10) / 10, rel=0.2)


async def test_failures_do_not_make_the_learnt_delay_small(autojump_clock: MockClock) -> None:
    """A service that is down fails quickly; that is not how quickly it answers."""
    hedge = Hedge(after=Quantile(0.5, min_samples=5))
    for _ in range(20):
        await hedge.call(trio.sleep, 1)
    for _ in range(500):
        with pytest.raises(OSError):  # noqa: PT011 - it says nothing
            await hedge.call(Legs([(0.001, OSError())]))
    assert hedge.statistics().after == pytest.approx(1, rel=0.02)


# --- the tail -----------------------------------------------------------------------------------


def latency(survival: float) -> float:
    """Seconds that such a part of the requests exceeds: a measured tail, in three pieces."""
    if survival > 0.02:
        milliseconds = survival ** (-1 / 1.69897)
    elif survival > 0.0022128:
        milliseconds = 10 * (survival / 0.02) ** (-1 / 0.95609)
    else:
        milliseconds = 100 * (survival / 0.0022128) ** (-1 / 1.8679)
    seconds: float = round(milliseconds / 1000, 5)
    return seconds


def evenly(number: int, rng: Random) -> list[float]:
    """So many latencies, evenly from the whole distribution, in any order."""
    drawn = [latency((index + 0.5) / number) for index in range(number)]
    rng.shuffle(drawn)
    return drawn


async def times_of(hedge: Hedge, first: list[float], second: list[float]) -> list[float]:
    """How many milliseconds the calls take whose two legs take so long, in order."""
    times = list[float]()

    async def call(*legs: float) -> None:
        began, left = trio.current_time(), iter(legs)
        await hedge.call(lambda: trio.sleep(next(left)))  # noqa: ASYNC105 - each leg awaits its own
        times.append((trio.current_time() - began) * 1000)

    # Not all at once: so many tasks would mostly wait for memory.
    for start in range(0, len(first), 250):
        async with trio.open_nursery() as nursery:
            for pair in zip(first[start : start + 250], second[start : start + 250], strict=True):
                nursery.start_soon(call, *pair)
    return sorted(times)


@pytest.mark.exhaustive
async def test_hedging_cuts_the_tail(autojump_clock: MockClock) -> None:
    """At ten milliseconds: two per cent more calls; a tenth of the latency at one in a thousand."""
    number, rng, hedge = 50_000, Random(1), Hedge(after=0.01)
    first, second = evenly(number, rng), evenly(number, rng)
    times = await times_of(hedge, first, second)
    assert hedge.statistics().hedges / number == pytest.approx(0.020, abs=0.002)
    assert times[number * 99 // 100] == pytest.approx(11.4, abs=0.2)
    assert times[number * 999 // 1000] == pytest.approx(14.7, abs=0.6)
    # A call that is not hedged takes as long as its first leg.
    first.sort()
    assert first[number * 99 // 100] * 1000 == pytest.approx(20.65, abs=0.1)
    assert first[number * 999 // 1000] * 1000 == pytest.approx(153, abs=1)


# --- manners ------------------------------------------------------------------------------------


async def test_listeners_hear_of_hedges(autojump_clock: MockClock) -> None:
    heard = list[Event]()
    with subscribe(within_calls(heard.append)):
        await Hedge(after=1, max_hedges=2, name="h").call(Legs([9, 9, 1]), name="op")
        await Hedge(after=1).call(Legs([0.5]))
    assert [
        (type(event), event.policy, event.operation, event.time, getattr(event, "leg", None))
        for event in heard
    ] == [(HedgeStarted, "h", "op", 1, 1), (HedgeStarted, "h", "op", 2, 2)]


async def test_a_tests_block(autojump_clock: MockClock) -> None:
    """It counts and learns for itself, has a full budget, and `max_attempts` bounds the legs."""
    budget = RetryBudget(max_tokens=1)
    hedge = Hedge(after=Quantile(0.5, min_samples=1, initial=1), max_hedges=3, budget=budget)
    await hedge.call(Legs([2, 5]))
    outside = hedge.statistics()
    with mode():
        assert hedge.statistics() == HedgeStatistics(0, 0, 0, 0, 0, after=1)
        assert hedge.is_idle is False  # its budget is not full
        legs = Legs([5])
        await hedge.call(legs)
        assert len(legs.began_at) == 2
    with mode(max_attempts=1):
        legs = Legs([5])
        await hedge.call(legs)
        assert len(legs.began_at) == 1
    assert hedge.statistics() == outside
    assert outside.calls == 1


async def test_with_timeouts_around_and_inside(autojump_clock: MockClock) -> None:
    """A leg that times out is a failure; the call's own deadline ends all legs."""
    legs = Legs([60, 0.5])
    assert await Hedge(after=5).call(Timeout(1).call, legs) == 1
    assert legs.began_at == [0, 1]
    legs = Legs([60])
    with pytest.raises(trio.TooSlowError):
        await Timeout(2).call(Hedge(after=1).call, legs)
    assert (legs.running, len(legs.began_at)) == (0, 2)


async def test_a_deadline_is_seen_by_all_legs(autojump_clock: MockClock) -> None:
    seen = list[float]()

    async def op() -> None:
        seen.append(trio.current_effective_deadline())
        await trio.sleep(2)

    with trio.move_on_after(9):
        await Hedge(after=1).call(op)
    assert seen == [9, 9]


def test_it_is_used_in_run_after_run() -> None:
    """Counts and what was learnt go on."""
    hedge = Hedge(after=Quantile(0.5, min_samples=2))

    async def main() -> None:
        await hedge.call(trio.sleep, 0.5)

    for _ in range(2):
        trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert hedge.statistics().calls == 2
    assert hedge.statistics().after == pytest.approx(0.5, rel=0.02)


def test_is_idle() -> None:
    """While a new one would do the same."""
    budget = RetryBudget()
    assert Hedge(after=1).is_idle
    assert Hedge(after=1, budget=budget).is_idle
    budget.try_take()
    assert not Hedge(after=1, budget=budget).is_idle


@pytest.mark.parametrize(
    "options, message",
    [
        ({"after": -1}, "`after` must be >= 0, got -1"),
        ({"after": math.nan}, "`after` must be >= 0, got nan"),
        ({"after": True}, "`after` must be seconds or a timedelta, got True"),
        ({"after": "1"}, "`after` must be seconds or a timedelta, got '1'"),
        ({"max_hedges": 0}, "`max_hedges` must be >= 1, got 0"),
        ({"max_hedges": 1.5}, "`max_hedges` must be an int, got 1.5"),
        ({"budget": 3}, "`budget` must be a RetryBudget or None, got 3"),
        ({"on": 3}, "`on` must be an Exception type.*"),
        ({"on": BaseException}, "`on` must be an Exception type.*"),
        ({"on_discard": 3}, "`on_discard` must be a function, got 3"),
        ({"on_discard": returns}, "`on_discard` must be a plain function, not an async one.*"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"after": 1, **options}
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        Hedge(**given)
