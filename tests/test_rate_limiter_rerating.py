"""RateLimiter at another rate: who waits is due accordingly, and nobody gets more than is due."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from tests.operations import Steps
from tests.test_rate_limiter import drain
from tests.test_rate_limiter_waiting import Crowd
from trio_resilience import RateLimiter, RateLimiterStatistics, RateLimitExceededError
from trio_resilience.testing import Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


async def line_up(crowd: Crowd, limiter: RateLimiter, number: int) -> None:
    for who in range(number):
        await crowd.join(who, limiter)


async def test_a_higher_rate_serves_the_line_sooner(autojump_clock: MockClock) -> None:
    """Half a token was there; the other half comes at the new pace, and so do all after it."""
    limiter = RateLimiter(1)
    limiter.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await line_up(crowd, limiter, 10)
        await trio.sleep(0.5)
        limiter.rate = 10
        assert round(limiter.retry_after, 6) == 1.05
    assert list(crowd.let_in.values()) == [round(0.55 + n / 10, 6) for n in range(10)]
    assert crowd.order == list(range(10))


async def test_a_lower_rate_serves_the_line_later(autojump_clock: MockClock) -> None:
    """Nobody is let in by what was promised before."""
    limiter = RateLimiter(10)
    limiter.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await line_up(crowd, limiter, 10)
        await trio.sleep(0.25)
        limiter.rate = 1
        assert round(limiter.retry_after, 6) == 8.5
    assert list(crowd.let_in.values()) == [0.1, 0.2, *[round(0.75 + n, 6) for n in range(8)]]


async def test_a_lower_rate_may_be_too_low_for_who_waits(autojump_clock: MockClock) -> None:
    """It gives up when its time is over, though others are before it; and those go on."""
    limiter = RateLimiter(1, max_wait=10)
    patient = RateLimiter.all_of(limiter, RateLimiter(1))
    limiter.acquire_nowait()

    async def lower() -> None:
        await trio.sleep(0.5)
        limiter.rate = 0.01

    async with trio.open_nursery() as nursery:
        nursery.start_soon(patient.acquire)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(lower)
        with pytest.raises(RateLimitExceededError):
            await limiter.acquire()
        assert round(trio.current_time(), 6) == 10
    assert round(trio.current_time(), 6) == 50.5


async def test_the_rate_may_change_again_and_again(autojump_clock: MockClock) -> None:
    """What counts is the area below the rate: so many tokens have come."""
    limiter = RateLimiter(1, burst=2)
    limiter.acquire_nowait(2)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who, cost in enumerate((2, 1, 2)):
            await crowd.join(who, limiter, cost)
        for seconds, rate in ((0.5, 0.5), (1, 4), (0.125, 1), (0.25, 0.25), (1, 8)):
            await trio.sleep(seconds)
            limiter.rate = rate
    # 0.5 + 0.5 + 0.5 + 0.25 + 0.25 = 2 at 2.875; the rest at 8 a second.
    assert crowd.let_in == {0: 2.875, 1: 3, 2: 3.25}


@pytest.mark.parametrize("rate", [0.25, 1, 100])
async def test_a_change_gives_and_takes_no_tokens(mock_clock: MockClock, rate: float) -> None:
    """Neither those that are there nor parts of one."""
    limiter = RateLimiter(1, burst=4)
    limiter.acquire_nowait(3)
    mock_clock.jump(1.5)
    for _ in range(10):
        limiter.rate = rate
        limiter.rate = 1
    assert limiter.statistics().available == 2
    limiter.rate = rate
    assert drain(limiter) == 2
    assert limiter.retry_after == pytest.approx(0.5 / rate)
    mock_clock.jump(10 / rate)
    assert drain(limiter) == 4


async def test_a_full_bucket_stays_full(mock_clock: MockClock) -> None:
    """It has been for long: at another rate it has not overflown into anything."""
    limiter = RateLimiter(1, burst=4)
    assert drain(limiter) == 4
    mock_clock.jump(1000)
    for rate in (0.001, 1000, 2):
        limiter.rate = rate
    assert drain(limiter) == 4
    assert limiter.retry_after == 0.5


async def test_who_would_now_wait_too_long_is_refused(autojump_clock: MockClock) -> None:
    """By the end of its max_wait at the latest, and those who don't are not."""
    limiter = RateLimiter(10, max_wait=1)
    limiter.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await line_up(crowd, limiter, 5)
        await trio.sleep(0.25)
        limiter.rate = 1
    assert crowd.let_in == {0: 0.1, 1: 0.2, 2: 0.75}
    assert set(crowd.refused) == {3, 4}
    at, retry_after = crowd.refused[3]
    assert 0.25 <= at <= 1
    # Whoever is behind in that instant, too, counts for one who comes back.
    assert round(at + retry_after, 6) in {1.75, 2.75}
    assert 0.25 <= crowd.refused[4][0] <= 1
    assert limiter.statistics() == RateLimiterStatistics(0, 0, 2)
    assert round(limiter.retry_after, 6) == 0.75
    await trio.sleep(0.75)
    limiter.acquire_nowait()


async def test_who_is_due_at_once_goes_at_once(autojump_clock: MockClock) -> None:
    """And a newcomer after the change goes behind them."""
    limiter = RateLimiter(0.001, burst=2)
    limiter.acquire_nowait(2)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await line_up(crowd, limiter, 3)
        await trio.sleep(999)
        limiter.rate = 1000
        with pytest.raises(trio.WouldBlock):
            limiter.acquire_nowait()
        await crowd.join(3, limiter)
    assert crowd.order == [0, 1, 2, 3]
    assert max(crowd.let_in.values()) < 999.004


async def test_a_change_wakes_few(autojump_clock: MockClock) -> None:
    """A thousand changes while a thousand wait do not wake a thousand each."""
    limiter, steps, rng = RateLimiter(0.001), Steps(), Random(1)
    limiter.acquire_nowait()
    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(limiter.acquire)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(steps)
        for _ in range(1000):
            limiter.rate = rng.uniform(1e-6, 1e-5)
            await trio.sleep(0.001)
        trio.lowlevel.remove_instrument(steps)
        assert limiter.statistics().waiting == 1000
        nursery.cancel_scope.cancel()
    assert steps.count <= 3 * 1000 + 10


async def test_the_first_in_line_may_leave_after_a_change(autojump_clock: MockClock) -> None:
    """The one behind it is due at the new pace, too."""
    limiter = RateLimiter(0.001)
    limiter.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await line_up(crowd, limiter, 3)
        limiter.rate = 1
        await trio.sleep(0.5)
        crowd.scopes[0].cancel()
        await trio.sleep(0.25)
        limiter.rate = 0.5
        crowd.scopes[1].cancel()
    assert crowd.let_in == {2: 1.25}


async def test_nobody_is_forgotten_when_the_rate_falls_at_the_last_moment(
    autojump_clock: MockClock,
) -> None:
    """At the very instant at which somebody is due, too: a later change still reaches them."""
    for _ in range(20):
        limiter = RateLimiter(1)
        limiter.acquire_nowait()
        async with trio.open_nursery() as nursery:
            crowd = Crowd(nursery)
            await line_up(crowd, limiter, 2)
            await trio.sleep(1)
            limiter.rate = 0.001
            await trio.sleep(0.5)
            limiter.rate = 1
        assert crowd.order == [0, 1]
        assert crowd.let_in[0] == 1
        assert 2.4 <= crowd.let_in[1] <= 2.5


def test_who_leaves_while_the_rate_changes_harms_nobody() -> None:
    """Cancelled at every instant: those who wait are served, and nobody is left in line."""

    def scenario() -> Scenario:
        limiter, let_in = RateLimiter(1, burst=2), list[int]()

        async def use(who: int) -> None:
            await limiter.acquire(2)
            let_in.append(who)
            await pause()

        async def victim(_: trio.Nursery) -> None:
            await use(0)
            limiter.rate = 3
            await use(0)

        async def change() -> None:
            for rate in (0.5, 4, 0.25, 1):
                await trio.sleep(0.5)
                limiter.rate = rate

        def check() -> None:
            assert {1, 2} <= set(let_in)
            assert limiter.statistics().waiting == 0

        others: list[Callable[[], Awaitable[None]]] = [partial(use, 1), change, partial(use, 2)]
        return Scenario(victim, others=others, fresh_user=partial(use, 3), invariant=check)

    assert cancel_everywhere(scenario).cancellations > 0


async def test_a_rate_lowered_at_the_due_instant_changes_nothing(autojump_clock: MockClock) -> None:
    """For what comes after: whoever runs first, the token is there at that instant."""
    passed = set[float]()
    for _ in range(30):  # trio shuffles what is due at the same instant
        limiter, start = RateLimiter(1, burst=2), trio.current_time()
        limiter.acquire_nowait(2)

        async def lower(limiter: RateLimiter, start: float) -> None:
            await trio.sleep_until(start + 1)
            limiter.rate = 0.25

        async with trio.open_nursery() as nursery:
            nursery.start_soon(lower, limiter, start)
            await limiter.acquire()
            passed.add(round(trio.current_time() - start, 6))
            limiter.rate = 1
    assert passed == {1}


async def test_who_is_not_first_gives_up_in_time_too(autojump_clock: MockClock) -> None:
    """When the rate is lowered, those in line give up when their `max_wait` is over."""
    limiter, refused = RateLimiter(1, max_wait=5), dict[int, float]()
    limiter.acquire_nowait()
    start = trio.current_time()

    async def visit(number: int) -> None:
        with pytest.raises(RateLimitExceededError):
            await limiter.acquire()
        refused[number] = round(trio.current_time() - start, 6)

    async with trio.open_nursery() as nursery:
        for number in range(3):
            nursery.start_soon(visit, number)
            await trio.testing.wait_all_tasks_blocked()
        limiter.rate = 0.01
    assert refused == {0: 5, 1: 5, 2: 5}
    assert limiter.statistics().waiting == 0
