"""RateLimiter's line: first come, first served, whoever leaves it, and however the rate changes."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
import trio.testing

from tests.operations import Steps, Stopwatch, returns
from tests.test_rate_limiter import by_acquire, forms
from trio_resilience import RateLimiter, RateLimiterStatistics, RateLimitExceededError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    from tests.test_rate_limiter import Form, Limiter


@attrs.define(eq=False)
class Crowd:
    """Tasks that ask, one after the other, and what each of them got, and when."""

    nursery: trio.Nursery
    watch: Stopwatch = attrs.field(factory=Stopwatch)
    let_in: dict[int, float] = attrs.field(factory=dict[int, float])
    refused: dict[int, tuple[float, float]] = attrs.field(factory=dict[int, tuple[float, float]])
    """When, and the seconds after which another try would make sense."""
    cancelled: dict[int, float] = attrs.field(factory=dict[int, float])
    scopes: dict[int, trio.CancelScope] = attrs.field(factory=dict[int, trio.CancelScope])

    async def join(self, who: int, limiter: Limiter, cost: int = 1) -> None:
        """Let *who* ask, and return when it waits or has been answered."""
        self.nursery.start_soon(self.ask, who, partial(limiter.acquire, cost))
        await trio.testing.wait_all_tasks_blocked()

    async def ask(self, who: int, form: Callable[[], Awaitable[object]]) -> None:
        self.scopes[who] = trio.CancelScope()
        with self.scopes[who]:
            try:
                await form()
                self.let_in[who] = self.watch.seconds
            except RateLimitExceededError as error:
                self.refused[who] = (self.watch.seconds, round(error.retry_after or 0, 6))
        if self.scopes[who].cancelled_caught:
            self.cancelled[who] = self.watch.seconds

    @property
    def order(self) -> list[int]:
        return list(self.let_in)


@attrs.define(eq=False)
class Poacher(trio.abc.Instrument):
    """Tries to take a token between any two steps of any task."""

    limiter: Limiter
    tries: int = 0
    booty: list[float] = attrs.field(factory=list[float])

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        self.tries += 1
        try:
            self.limiter.acquire_nowait()
        except trio.WouldBlock:
            return
        self.booty.append(trio.current_time())


# --- first come, first served -------------------------------------------------------------------


@forms
async def test_fifty_that_wait_are_served_in_order(autojump_clock: MockClock, form: Form) -> None:
    """In that of their arrival, each at its instant."""
    limiter = RateLimiter(10, burst=5)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(50):
            nursery.start_soon(crowd.ask, who, partial(form, limiter))
            await trio.testing.wait_all_tasks_blocked()
        assert limiter.statistics() == RateLimiterStatistics(0, 45, 0)
    assert crowd.order == list(range(50))
    assert list(crowd.let_in.values()) == [
        *[0.0] * 5,
        *[round(place / 10, 6) for place in range(1, 46)],
    ]


async def test_a_large_request_is_not_starved_by_small_ones(autojump_clock: MockClock) -> None:
    """They come all the time, and would always find a token; but it was there before."""
    limiter = RateLimiter(1, burst=5)
    limiter.acquire_nowait(5)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        await crowd.join(0, limiter)
        await crowd.join(1, limiter, 5)
        for who in range(2, 12):
            await crowd.join(who, limiter)
            await trio.sleep(0.5)
    assert crowd.let_in[0] == 1
    assert crowd.let_in[1] == 6
    assert [crowd.let_in[who] for who in range(2, 12)] == list(range(7, 17))


async def test_nobody_overtakes_at_any_moment(autojump_clock: MockClock) -> None:
    """Not between a waiter's wake-up and its next step, either."""
    limiter = RateLimiter(1)
    limiter.acquire_nowait()
    poacher = Poacher(limiter)
    trio.lowlevel.add_instrument(poacher)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(5):
            await crowd.join(who, limiter)
    trio.lowlevel.remove_instrument(poacher)
    assert poacher.tries >= 10
    assert poacher.booty == []
    assert list(crowd.let_in.values()) == [1, 2, 3, 4, 5]


async def hurry(crowd: Crowd, who: int, limiter: RateLimiter, due: float) -> None:
    """Come at the instant *due*, try to get in first, then wait like the others."""
    await trio.sleep_until(due)
    if limiter.statistics().waiting:
        with pytest.raises(trio.WouldBlock):
            limiter.acquire_nowait()
    await crowd.ask(who, limiter.acquire)


async def test_a_newcomer_at_the_very_instant_waits_behind(autojump_clock: MockClock) -> None:
    """Whichever of the two tasks trio wakes first."""
    for _ in range(20):
        limiter = RateLimiter(1, burst=2)
        limiter.acquire_nowait(2)

        async with trio.open_nursery() as nursery:
            crowd = Crowd(nursery)
            due = trio.current_time() + 2
            for who in range(1, 4):
                nursery.start_soon(hurry, crowd, who, limiter, due)
            await crowd.join(0, limiter, 2)
        assert crowd.order[0] == 0
        assert list(crowd.let_in.values()) == [2, 3, 4, 5]


@forms
async def test_who_asks_again_goes_to_the_end_of_the_line(
    autojump_clock: MockClock, form: Form
) -> None:
    """Four tasks that ask all the time get the same number of turns each."""
    limiter, turns = RateLimiter(100), [0] * 4

    async def insist(who: int) -> None:
        while True:
            await form(limiter)
            turns[who] += 1

    with trio.move_on_after(4.005):
        async with trio.open_nursery() as nursery:
            for who in range(4):
                nursery.start_soon(insist, who)
    assert sum(turns) == 401
    assert max(turns) - min(turns) <= 1


# --- leaving the line ---------------------------------------------------------------------------


async def test_the_first_free_token_goes_to_the_first_that_still_waits(
    autojump_clock: MockClock,
) -> None:
    """Ten wait, nine leave: the tenth gets the first token, not the tenth."""
    limiter = RateLimiter(1)
    limiter.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(10):
            await crowd.join(who, limiter)
        await trio.sleep(0.5)
        for who in range(9):
            crowd.scopes[who].cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert limiter.statistics().waiting == 1
        assert round(limiter.retry_after, 6) == 1.5
    assert crowd.let_in == {9: 1}
    assert crowd.cancelled == dict.fromkeys(range(9), 0.5)


@pytest.mark.parametrize("seed", range(5))
async def test_the_line_moves_up_when_anybody_leaves(autojump_clock: MockClock, seed: int) -> None:
    """Who stays is let in one interval after the other, whoever leaves, whenever."""
    rng, limiter = Random(seed), RateLimiter(4)
    limiter.acquire_nowait()
    leaving = rng.sample(range(40), 20)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(40):
            await crowd.join(who, limiter)
        for who in leaving:
            crowd.scopes[who].cancel()
            await trio.sleep(rng.choice([0, 0.1]))
    assert crowd.order == [who for who in range(40) if who not in crowd.cancelled]
    assert [4 * when for when in crowd.let_in.values()] == list(range(1, 1 + len(crowd.let_in)))
    assert limiter.statistics() == RateLimiterStatistics(0, 0, 0)


async def test_who_waited_behind_a_large_request_goes_as_soon_as_it_leaves(
    autojump_clock: MockClock,
) -> None:
    """The tokens that had come for it are there for them, at that instant."""
    limiter = RateLimiter(1, burst=5)
    limiter.acquire_nowait(5)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who, cost in enumerate((5, 1, 1, 3)):
            await crowd.join(who, limiter, cost)
        await trio.sleep(2.5)
        crowd.scopes[0].cancel()
    assert crowd.let_in == {1: 2.5, 2: 2.5, 3: 5}


async def test_a_cancellation_at_the_very_instant_takes_no_token(
    autojump_clock: MockClock,
) -> None:
    """The outer deadline is the one that counts; who comes next finds the token there."""
    for _ in range(20):
        limiter = RateLimiter(1)
        limiter.acquire_nowait()
        with trio.move_on_after(1) as scope:
            await limiter.acquire()
        assert scope.cancelled_caught
        limiter.acquire_nowait()
        assert round(limiter.retry_after, 6) == 1


async def test_a_hundred_rounds_of_leaving_leave_no_trace(autojump_clock: MockClock) -> None:
    """Nobody waits, no token is lost, and none is won."""
    limiter = RateLimiter(0.01, burst=2)
    limiter.acquire_nowait()
    for _ in range(100):
        with trio.move_on_after(0.01):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(limiter.acquire, 2)
                nursery.start_soon(limiter.acquire, 2)
    assert limiter.statistics() == RateLimiterStatistics(1, 0, 0)
    assert round(limiter.retry_after, 6) == 0
    limiter.acquire_nowait()
    assert round(limiter.retry_after, 5) == 100 - 1


# --- max_wait -----------------------------------------------------------------------------------


@forms
async def test_a_wait_that_would_be_too_long_is_refused_at_once(
    autojump_clock: MockClock, form: Form
) -> None:
    """It takes no token and no place; the error says how long the wait would be."""
    limiter = RateLimiter(1, max_wait=2.5)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(5):
            nursery.start_soon(crowd.ask, who, partial(form, limiter))
            await trio.testing.wait_all_tasks_blocked()
        assert limiter.statistics() == RateLimiterStatistics(0, 2, 2)
        await trio.sleep(0.5)
        nursery.start_soon(crowd.ask, 5, partial(form, limiter))
    assert crowd.let_in == {0: 0, 1: 1, 2: 2, 5: 3}
    assert crowd.refused == {3: (0, 3), 4: (0, 3)}


@pytest.mark.parametrize("rate", [4, 10, 3, 7, 1000])
async def test_a_wait_of_exactly_max_wait_is_allowed(
    autojump_clock: MockClock, rate: float
) -> None:
    """Whatever fractions floats can't hold."""
    limiter = RateLimiter(rate, max_wait=3 / rate)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(6):
            await crowd.join(who, limiter)
    assert crowd.order == [0, 1, 2, 3]
    assert crowd.let_in[3] == round(3 / rate, 6)
    assert crowd.refused == {who: (0, round(4 / rate, 6)) for who in (4, 5)}


async def test_what_costs_more_waits_longer(autojump_clock: MockClock) -> None:
    """So it may be refused where a smaller request, after it, is not."""
    limiter = RateLimiter(1, burst=4, max_wait=2)
    limiter.acquire_nowait(4)
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who, cost in enumerate((3, 1, 2, 1, 1)):
            await crowd.join(who, limiter, cost)
    assert crowd.let_in == {1: 1, 3: 2}
    assert crowd.refused == {0: (0, 3), 2: (0, 3), 4: (0, 3)}


async def test_without_a_wait_only_what_is_free_is_taken(autojump_clock: MockClock) -> None:
    """A max_wait of zero; and each refusal is an error of its own."""
    limiter, errors = RateLimiter(1, burst=3, max_wait=0), list[RateLimitExceededError]()
    for _ in range(3):
        await limiter.acquire()
    for _ in range(100):
        with pytest.raises(RateLimitExceededError) as caught:
            await limiter.call(returns, 1)
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 100
    assert {round(error.retry_after or 0, 6) for error in errors} == {1}
    assert all(error.__context__ is None for error in errors)
    await trio.sleep(1)
    assert await limiter.call(returns, 1) == 1
    assert limiter.statistics() == RateLimiterStatistics(0, 0, 100)


async def test_who_leaves_makes_room_within_max_wait(autojump_clock: MockClock) -> None:
    """The line that counts is the one there is."""
    limiter = RateLimiter(1, max_wait=2)
    limiter.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(3):
            await crowd.join(who, limiter)
        crowd.scopes[0].cancel()
        await trio.testing.wait_all_tasks_blocked()
        await crowd.join(3, limiter)
    assert crowd.refused == {2: (0, 3)}
    assert crowd.let_in == {1: 1, 3: 2}


# --- wake-ups ----------------------------------------------------------------------------------


async def test_ten_thousand_that_wait_are_woken_once_each(autojump_clock: MockClock) -> None:
    """Or twice, at the most; to wake all of them for each token would be ten thousand times."""
    limiter, steps = RateLimiter(1000), Steps()
    async with trio.open_nursery() as nursery:
        for _ in range(10_001):
            nursery.start_soon(by_acquire, limiter)
        await trio.testing.wait_all_tasks_blocked()
        assert limiter.statistics().waiting == 10_000
        trio.lowlevel.add_instrument(steps)
    trio.lowlevel.remove_instrument(steps)
    assert round(trio.current_time(), 6) == 10
    assert steps.count <= 2 * 10_000 + 10


async def test_who_leaves_wakes_few_others(autojump_clock: MockClock) -> None:
    """A thousand leave a line of two thousand: that takes a step for each of them, or two."""
    limiter, steps = RateLimiter(0.001), Steps()
    limiter.acquire_nowait()
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(2000):
            nursery.start_soon(crowd.ask, who, limiter.acquire)
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(steps)
        for who in range(0, 2000, 2):
            crowd.scopes[who].cancel()
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.remove_instrument(steps)
        assert len(crowd.cancelled) == 1000
        assert limiter.statistics().waiting == 1000
        nursery.cancel_scope.cancel()
    assert steps.count <= 2 * 1000 + 10
    assert limiter.statistics().waiting == 0
