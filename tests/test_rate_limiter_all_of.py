"""Several rate limits at once: from all of them or from none, and in one order."""

from __future__ import annotations

import datetime as dt
import math
from fractions import Fraction
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.operations import Steps, Stopwatch, returns
from tests.test_rate_limiter import by_acquire, drain, forms, instants
from tests.test_rate_limiter_properties import Bucket, check_bound
from tests.test_rate_limiter_waiting import Crowd, Poacher
from trio_resilience import Policy, RateLimiter, RateLimiterStatistics, RateLimitExceededError

if TYPE_CHECKING:
    from trio.testing import MockClock

    from tests.test_rate_limiter import Form, Limiter


# --- all or none --------------------------------------------------------------------------------


@forms
async def test_the_tighter_limit_counts(autojump_clock: MockClock, form: Form) -> None:
    """Ten a second until 300 have passed, then five a second, which are 300 a minute."""
    limiter = RateLimiter.all_of(RateLimiter(10), RateLimiter(300, per=60, burst=30))
    times = await instants(limiter, 100, form)
    # The second bucket of 30 is refilled by 5 a second while 10 a second are taken from it.
    assert times[:59] == [round(n / 10, 6) for n in range(59)]
    assert times[59:] == [round(5.8 + (n - 58) / 5, 6) for n in range(59, 100)]


async def test_a_refusal_takes_from_none(mock_clock: MockClock) -> None:
    """Whichever of them it is that has nothing left."""
    for empty in range(3):
        limiters = [RateLimiter(1, burst=3) for _ in range(3)]
        both = RateLimiter.all_of(*limiters)
        limiters[empty].acquire_nowait(2)
        for _ in range(5):
            with pytest.raises(trio.WouldBlock):
                both.acquire_nowait(2)
        assert [each.statistics().available for each in limiters].count(3) == 2
        assert both.statistics() == RateLimiterStatistics(1, 0, 0)
        both.acquire_nowait()
        assert sorted(each.statistics().available for each in limiters) == [0, 2, 2]


async def test_who_leaves_the_line_has_taken_from_none(autojump_clock: MockClock) -> None:
    """Neither from the limit it waited for nor from the other."""
    fast, slow = RateLimiter(1, burst=3), RateLimiter(0.1, burst=3)
    both = RateLimiter.all_of(fast, slow)
    slow.acquire_nowait(3)
    with trio.move_on_after(5):
        await both.acquire(2)
    assert fast.statistics() == RateLimiterStatistics(3, 0, 0)
    assert slow.statistics() == RateLimiterStatistics(0, 0, 0)
    assert round(slow.retry_after, 6) == 5


async def test_it_draws_on_the_limiters_own_state(autojump_clock: MockClock) -> None:
    """What passes by it counts for them, and what passes by them for it."""
    one, two = RateLimiter(1, burst=4), RateLimiter(1, burst=5)
    both, other = RateLimiter.all_of(one, two), RateLimiter.all_of(two)
    both.acquire_nowait(2)
    one.acquire_nowait()
    other.acquire_nowait(2)
    available = [each.statistics().available for each in (one, two, both, other)]
    assert available == [1, 1, 1, 1]
    both.acquire_nowait()
    for each in (one, two, both, other):
        assert each.retry_after == 1
        with pytest.raises(trio.WouldBlock):
            each.acquire_nowait()
    watch = Stopwatch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.acquire)
        await trio.testing.wait_all_tasks_blocked()
        assert [each.statistics().waiting for each in (one, two, both, other)] == [1, 0, 1, 0]
        await both.acquire()
        assert watch.seconds == 2


async def test_it_is_a_policy_like_any_other() -> None:
    """Results, names, statistics, repr, checkpoints."""
    both = RateLimiter.all_of(RateLimiter(1, burst=9), RateLimiter(2, burst=7), name="api")
    assert isinstance(both, Policy)
    with trio.testing.assert_checkpoints():
        await both.acquire()
    with trio.testing.assert_no_checkpoints():
        assert await both.call(returns, 1) == 1
    async with both:
        assert both.statistics() == RateLimiterStatistics(4, 0, 0)
    assert not both.is_idle
    assert "api" in repr(both)


def test_it_can_be_looked_at_outside_a_run() -> None:
    """It has what the smallest has."""
    both = RateLimiter.all_of(RateLimiter(1, burst=9), RateLimiter(2, burst=7))
    assert both.statistics() == RateLimiterStatistics(7, 0, 0)
    assert both.is_idle
    assert "all_of" in repr(both)


async def test_a_cost_above_the_smallest_burst_is_refused() -> None:
    """It would wait for ever."""
    one, two = RateLimiter(1, burst=4), RateLimiter(1, burst=2)
    both = RateLimiter.all_of(one, two)
    for bad in (3, 0, -1, True, "1", 1.5):
        cost: Any = bad
        with pytest.raises((ValueError, TypeError), match=r"^`cost` must be "):
            both.acquire_nowait(cost)
        with pytest.raises((ValueError, TypeError), match=r"^`cost` must be "):
            await both.acquire(cost)
    assert (drain(one), drain(two)) == (4, 2)


def test_bad_arguments_are_refused() -> None:
    """When it is made."""
    make: Any = RateLimiter.all_of
    wrong: object
    with pytest.raises(ValueError, match="at least one"):
        make()
    for bad in (10, None, "10/s", trio.CapacityLimiter(1), [RateLimiter(1)]):
        with pytest.raises(TypeError, match=r"limiter.*, got "):
            make(RateLimiter(1), bad)
    for wrong in (-1, math.nan, dt.timedelta(-1)):
        with pytest.raises(ValueError, match=r"^`max_wait` must be >= 0, got "):
            make(RateLimiter(1), max_wait=wrong)
    for wrong in (True, "5", None):
        with pytest.raises(TypeError, match=r"^`max_wait` must be .*, got "):
            make(RateLimiter(1), max_wait=wrong)


async def test_one_limit_named_twice_counts_once(mock_clock: MockClock) -> None:
    """Directly, or within another combination."""
    one, two = RateLimiter(1, burst=4), RateLimiter(1, burst=4)
    both = RateLimiter.all_of(one, two, one)
    nested = RateLimiter.all_of(both, one)
    both.acquire_nowait()
    nested.acquire_nowait()
    assert [each.statistics().available for each in (one, two, both, nested)] == [2, 2, 2, 2]


# --- one order ----------------------------------------------------------------------------------


async def test_direct_users_and_combined_ones_are_served_in_one_order(
    autojump_clock: MockClock,
) -> None:
    """Fifty of both kinds wait for one limit."""
    rng, scarce, ample = Random(3), RateLimiter(10), RateLimiter(1000, burst=100)
    ways: list[Limiter] = [
        scarce,
        RateLimiter.all_of(scarce, ample),
        RateLimiter.all_of(ample, scarce),
    ]
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(50):
            await crowd.join(who, rng.choice(ways))
    assert crowd.order == list(range(50))
    assert list(crowd.let_in.values()) == [round(n / 10, 6) for n in range(50)]


async def test_it_is_not_starved_by_direct_users(autojump_clock: MockClock) -> None:
    """Who waits for two limits gets both as soon as the later of them allows it.

    Others take from each of them, all the time, and would never leave both free at once.
    """
    one, two = RateLimiter(1), RateLimiter(1)
    both = RateLimiter.all_of(one, two)
    two.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)

        async def insist(limiter: RateLimiter) -> None:
            while True:
                await limiter.acquire()

        for limiter in (one, two) * 2:
            nursery.start_soon(insist, limiter)
        await trio.sleep(3.25)
        await crowd.join(0, both)
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert crowd.let_in[0] <= 3.25 + 3


async def test_a_newcomer_waits_behind_who_waits_for_both(autojump_clock: MockClock) -> None:
    """Though its own limit has tokens; it knows how long that will take."""
    free, busy = RateLimiter(1, burst=5), RateLimiter(0.1)
    both = RateLimiter.all_of(free, busy)
    busy.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await crowd.join(0, both)
        with pytest.raises(trio.WouldBlock):
            free.acquire_nowait()
        assert round(free.retry_after, 6) == 10
        await crowd.join(1, free)
        await crowd.join(2, busy)
        await crowd.join(3, both)
        assert round(free.retry_after, 6) == 30
        assert round(busy.retry_after, 6) == 40
    assert crowd.let_in == {0: 10, 1: 10, 2: 20, 3: 30}


async def test_a_newcomer_with_little_patience_is_refused_at_once(
    autojump_clock: MockClock,
) -> None:
    """The wait behind those who wait for another limit too counts like any other."""
    free, busy = RateLimiter(1, burst=5, max_wait=3), RateLimiter(0.1)
    both = RateLimiter.all_of(free, busy)
    busy.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await crowd.join(0, both)
        await crowd.join(1, free)
        await trio.sleep(8)
        await crowd.join(2, free)
    assert crowd.refused == {1: (0, 10)}
    assert crowd.let_in == {0: 10, 2: 10}


@pytest.mark.parametrize("seed", range(20))
async def test_what_is_predicted_comes_true(autojump_clock: MockClock, seed: int) -> None:
    """As long as nobody leaves, whoever waits for whatever combination of three limits."""
    rng, predicted = Random(seed), dict[int, float]()
    limiters = [RateLimiter(rate, burst=burst) for rate, burst in ((1, 2), (2, 3), (0.5, 4))]
    picks = [rng.sample(limiters, rng.randint(1, 3)) for _ in range(30)]
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who, pick in enumerate(picks):
            way: Limiter = pick[0] if len(pick) == 1 else RateLimiter.all_of(*pick)
            cost = rng.choice([1, 1, 2])
            if cost == 1:
                predicted[who] = crowd.watch.seconds + way.retry_after
            await crowd.join(who, way, cost)
            await trio.sleep(rng.choice([0, 0, 0.3]))
    assert len(crowd.let_in) == 30
    actual = {who: crowd.let_in[who] for who in predicted}
    assert actual == pytest.approx(predicted, abs=2e-6)


async def test_opposite_orders_do_not_deadlock(autojump_clock: MockClock) -> None:
    """Each two of three limits, in both orders, by many tasks at once; all get through."""
    one, two, three = (RateLimiter(rate, burst=3) for rate in (5, 7, 11))
    pairs = [(one, two), (two, one), (two, three), (three, two), (three, one), (one, three)]
    combined = [RateLimiter.all_of(*pair) for pair in pairs]
    rng, passed = Random(5), list[int]()

    async def use(index: int) -> None:
        for _ in range(20):
            await combined[index].acquire(rng.randint(1, 3))
            passed.append(index)

    async with trio.open_nursery() as nursery:
        for index in list(range(6)) * 3:
            nursery.start_soon(use, index)
    assert len(passed) == 6 * 3 * 20
    assert [each.statistics().waiting for each in (one, two, three)] == [0, 0, 0]


async def test_nobody_overtakes_at_any_moment(autojump_clock: MockClock) -> None:
    """Neither by the one limit nor by the other, nor by both."""
    one, two = RateLimiter(1), RateLimiter(1, burst=2)
    both = RateLimiter.all_of(one, two)
    both.acquire_nowait()
    two.acquire_nowait()
    poachers = [Poacher(limiter) for limiter in (one, two, both)]
    for poacher in poachers:
        trio.lowlevel.add_instrument(poacher)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(4):
            await crowd.join(who, both)
    for poacher in poachers:
        trio.lowlevel.remove_instrument(poacher)
    assert [poacher.booty for poacher in poachers] == [[], [], []]
    assert list(crowd.let_in.values()) == [1, 2, 3, 4]


async def test_who_leaves_lets_all_lines_move_up(autojump_clock: MockClock) -> None:
    """Those behind it by one limit, and those by the other."""
    one, two = RateLimiter(1, burst=3), RateLimiter(1, burst=3)
    both = RateLimiter.all_of(one, two)
    both.acquire_nowait(3)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await crowd.join(0, both, 3)
        for who, limiter in ((1, one), (2, two), (3, both)):
            await crowd.join(who, limiter)
        await trio.sleep(2.5)
        crowd.scopes[0].cancel()
    assert crowd.let_in == {1: 2.5, 2: 2.5, 3: 2.5}
    assert round(both.retry_after, 6) == 0.5


# --- waiting ------------------------------------------------------------------------------------


async def test_a_wait_that_would_be_too_long_is_refused_at_once(autojump_clock: MockClock) -> None:
    """By its own max_wait; that of the limiters is for those who use them directly."""
    one, two = RateLimiter(1, max_wait=0), RateLimiter(0.5, max_wait=0)
    both = RateLimiter.all_of(one, two, max_wait=4)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(5):
            await crowd.join(who, both)
        with pytest.raises(RateLimitExceededError):
            await one.acquire()
    assert crowd.let_in == {0: 0, 1: 2, 2: 4}
    assert crowd.refused == {3: (0, 6), 4: (0, 6)}
    assert both.statistics() == RateLimiterStatistics(0, 0, 2)
    assert (one.statistics().rejections, two.statistics().rejections) == (1, 0)


async def test_a_change_of_either_rate_counts(autojump_clock: MockClock) -> None:
    """For those in line, too."""
    one, two = RateLimiter(1), RateLimiter(0.1)
    both = RateLimiter.all_of(one, two)
    both.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(3):
            await crowd.join(who, both)
        await trio.sleep(5)
        two.rate = 1
        await trio.sleep(1)
        one.rate = 0.5
    assert crowd.let_in == {0: 5.5, 1: 7, 2: 9}


async def test_thousands_that_wait_are_woken_once_each(autojump_clock: MockClock) -> None:
    """Or twice, at the most."""
    both = RateLimiter.all_of(RateLimiter(100), RateLimiter(6000, per=60, burst=10))
    steps = Steps()
    async with trio.open_nursery() as nursery:
        for _ in range(3001):
            nursery.start_soon(by_acquire, both)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(steps)
    trio.lowlevel.remove_instrument(steps)
    assert round(trio.current_time(), 6) == 30
    assert steps.count <= 2 * 3000 + 10


@pytest.mark.parametrize("seed", range(20))
async def test_its_decisions_are_those_of_two_token_buckets(
    mock_clock: MockClock, seed: int
) -> None:
    """Each keeps its own bound, whoever takes from it by whichever way."""
    rng, paces, bursts = Random(seed), (Fraction(3), Fraction(7, 4)), (2, 5)
    limiters = [RateLimiter(float(pace), burst=n) for pace, n in zip(paces, bursts, strict=True)]
    buckets = [Bucket(pace, burst) for pace, burst in zip(paces, bursts, strict=True)]
    ways: list[tuple[Limiter, list[int]]] = [(each, [index]) for index, each in enumerate(limiters)]
    ways.append((RateLimiter.all_of(*limiters), [0, 1]))
    passed: list[list[tuple[float, int]]] = [[], []]
    for _ in range(300):
        now = Fraction(trio.current_time())
        limiter, indexes = rng.choice(ways)
        for index in indexes:
            buckets[index].fill(now)
        verdict = all(buckets[index].tokens >= 1 for index in indexes)
        try:
            limiter.acquire_nowait()
        except trio.WouldBlock:
            assert not verdict
        else:
            assert verdict
            for index in indexes:
                buckets[index].tokens -= 1
                passed[index].append((trio.current_time(), 1))
        mock_clock.jump(rng.random() * 0.5)
    for each, pace, burst in zip(passed, paces, bursts, strict=True):
        check_bound(each, pace, burst)
