"""RateLimiter against plain models: a token bucket in fractions, and a line in front of it."""

from __future__ import annotations

import math
from fractions import Fraction
from random import Random
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
import trio.testing
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trio_resilience import RateLimiter, RateLimitExceededError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

pytestmark = pytest.mark.exhaustive

NEAR = Fraction(1, 10**7)
"""Two instants that are nearer are not told apart in what the models predict."""


@attrs.define(eq=False)
class Bucket:
    """The reference: tokens drop in at an even pace, and what does not fit in is lost."""

    rate: Fraction
    burst: int
    tokens: Fraction = attrs.field(init=False)
    filled_at: Fraction = Fraction(0)

    def __attrs_post_init__(self) -> None:
        self.tokens = Fraction(self.burst)

    def fill(self, now: Fraction) -> None:
        since = now - self.filled_at
        self.tokens = min(Fraction(self.burst), self.tokens + since * self.rate)
        self.filled_at = now

    def try_take(self, now: Fraction, cost: int = 1) -> bool:
        self.fill(now)
        if self.tokens < cost:
            return False
        self.tokens -= cost
        return True

    def change_rate(self, now: Fraction, rate: Fraction) -> None:
        self.fill(now)
        self.rate = rate

    def due(self, cost: int) -> Fraction:
        """When *cost* tokens will be there, as long as nobody takes any."""
        return self.filled_at + max(Fraction(0), cost - self.tokens) / self.rate


def check_bound(passed: Sequence[tuple[float, int]], rate: Fraction, burst: int) -> None:
    """Raise if in any window of T seconds more than ``burst + rate * T`` passed."""
    pace, total, least = float(rate), 0, math.inf
    for when, cost in passed:
        least = min(least, total - pace * when)
        total += cost
        over = total - pace * when - least
        assert over <= burst + 1e-6 + pace * 2e-9, f"{over} passed in a window up to {when}"


def pass_time(clock: trio.testing.MockClock, now: Fraction) -> None:
    clock.jump(max(0.0, float(now) - clock.current_time()))


def run(main: Callable[[trio.testing.MockClock], Awaitable[None]], offset: Fraction) -> None:
    clock = trio.testing.MockClock()
    clock.jump(float(offset))
    trio.run(main, clock, clock=clock)


rates = st.sampled_from(
    [Fraction(*pair) for pair in [(1, 1), (10, 1), (3, 1), (7, 2), (1, 3), (300, 1), (1, 10)]]
)
pers = st.sampled_from([Fraction(1), Fraction(60), Fraction(1, 10)])
bursts = st.sampled_from([1, 1, 2, 3, 5, 10, 100])
seeds = st.integers(0, 2**32)


def gap(rng: Random, interval: Fraction, *, on_grid: bool) -> Fraction:
    """Return the time to the next arrival; more often too short than not."""
    if on_grid:
        return interval * Fraction(rng.choice([0, 0, 1, 1, 2, 3, 4, 4, 8, 40]), 4)
    return Fraction(rng.choice([0, 0.2, 0.7, 1, 2, 10]) * rng.random()) * interval


@settings(max_examples=1000, deadline=None)
@given(
    rate=rates,
    per=pers,
    burst=bursts,
    seed=seeds,
    number=st.just(100),
    on_grid=st.booleans(),
    weighted=st.booleans(),
    offset=st.sampled_from([Fraction(0), Fraction(3, 5), Fraction(12345678901, 10**5)]),
)
def test_its_decisions_are_those_of_a_token_bucket(
    rate: Fraction,
    per: Fraction,
    burst: int,
    seed: int,
    number: int,
    on_grid: bool,
    weighted: bool,
    offset: Fraction,
) -> None:
    """For a hundred arrivals, on the instants at which tokens come, between them, and in bulk."""
    rng, pace = Random(seed), rate / per
    limiter = RateLimiter(float(rate), per=float(per), burst=burst)
    bucket = Bucket(pace, burst, filled_at=offset)
    passed = list[tuple[float, int]]()

    async def main(clock: trio.testing.MockClock) -> None:
        now = offset
        for _ in range(number):
            cost = rng.randint(1, burst) if weighted else 1
            now += gap(rng, 1 / pace, on_grid=on_grid)
            bucket.fill(now)
            if not on_grid and abs(bucket.due(cost) - now) < NEAR:
                now += 2 * NEAR
            pass_time(clock, now)
            verdict = bucket.try_take(now, cost)
            try:
                limiter.acquire_nowait(cost)
            except trio.WouldBlock:
                assert not verdict
            else:
                assert verdict
                passed.append((trio.current_time(), cost))

    run(main, offset)
    assert passed
    check_bound(passed, pace, burst)


@settings(max_examples=300, deadline=None)
@given(rate=rates, burst=bursts, seed=seeds, number=st.integers(1, 100))
def test_its_decisions_at_changing_rates_are_those_of_a_token_bucket(
    rate: Fraction, burst: int, seed: int, number: int
) -> None:
    """Tokens that are there stay, also parts of one, and the next come at the new pace."""
    rng, limiter, bucket = Random(seed), RateLimiter(float(rate), burst=burst), Bucket(rate, burst)

    async def main(clock: trio.testing.MockClock) -> None:
        now = Fraction(0)
        for _ in range(number):
            now += gap(rng, 1 / bucket.rate, on_grid=False)
            if rng.random() < 0.3:
                bucket.change_rate(now, Fraction(rng.choice([0.1, 0.5, 1, 3, 7, 10, 250])))
                pass_time(clock, now)
                limiter.rate = float(bucket.rate)
                continue
            cost = rng.randint(1, burst)
            bucket.fill(now)
            if abs(bucket.due(cost) - now) < NEAR:
                now += 2 * NEAR
            pass_time(clock, now)
            bucket.fill(now)
            available = limiter.statistics().available
            assert available in {int(bucket.tokens - NEAR), int(bucket.tokens + NEAR * 1000)}
            verdict = bucket.try_take(now, cost)
            try:
                limiter.acquire_nowait(cost)
            except trio.WouldBlock:
                assert not verdict
            else:
                assert verdict

    run(main, Fraction(0))


# --- the line -----------------------------------------------------------------------------------


@attrs.frozen
class Deed:
    """One thing that happens: somebody asks, or leaves, or the rate changes."""

    when: Fraction
    kind: str
    who: int = 0
    value: float = 0.0


@attrs.define(eq=False)
class Play:
    """What happens when: who asks, who leaves, how the rate changes; and what must come of it."""

    rng: Random
    bucket: Bucket
    max_wait: Fraction | None
    changes: bool
    script: list[Deed] = attrs.field(factory=list[Deed], init=False)
    let_in: dict[int, Fraction] = attrs.field(factory=dict[int, Fraction], init=False)
    refused: dict[int, Fraction] = attrs.field(factory=dict[int, Fraction], init=False)
    waits: list[Fraction] = attrs.field(factory=list[Fraction], init=False)
    costs: dict[int, int] = attrs.field(factory=dict[int, int], init=False)
    now: Fraction = Fraction(0)
    _line: dict[int, int] = attrs.field(factory=dict[int, int], init=False)

    def write(self, number: int) -> None:
        for who in range(number):
            self._go_to(self.now + Fraction(self.rng.random()) * 2 / self.bucket.rate)
            self._act(who)
        self._serve(None)

    def _go_to(self, then: Fraction) -> None:
        """Pass over what happens until *then*, or a little later if that is too near to it."""
        while True:
            self._serve(then)
            head = next(iter(self._line.values()), None)
            if head is None or abs(self.bucket.due(head) - then) > NEAR:
                break
            then += 3 * NEAR
        self.now = then
        self.bucket.fill(then)

    def _serve(self, then: Fraction | None) -> None:
        while self._line:
            who, cost = next(iter(self._line.items()))
            due = self.bucket.due(cost)
            if then is not None and due > then:
                return
            assert self.bucket.try_take(due, cost)
            del self._line[who]
            self.let_in[who] = due

    def _act(self, who: int) -> None:
        choice = self.rng.random()
        if choice < 0.25 and self._line:
            leaver = self.rng.choice(list(self._line))
            del self._line[leaver]
            self.script.append(Deed(self.now, "leave", leaver))
            self._serve(self.now)
        elif choice < 0.4 and self.changes:
            rate = self.rng.choice([0.5, 1, 3, 7, 10])
            self.bucket.change_rate(self.now, Fraction(rate))
            self.script.append(Deed(self.now, "rate", value=rate))
        else:
            self._ask(who)

    def _ask(self, who: int) -> None:
        cost = self.costs[who] = self.rng.randint(1, self.bucket.burst)
        self.script.append(Deed(self.now, "ask", who, cost))
        wait = max(Fraction(0), sum(self._line.values()) + cost - self.bucket.tokens)
        wait /= self.bucket.rate
        self.waits.append(wait)
        if self.max_wait is not None and wait > self.max_wait:
            self.refused[who] = wait
        else:
            self._line[who] = cost
            self._serve(self.now)

    def is_clear(self) -> bool:
        """Whether no wait is so near to max_wait that its verdict is a matter of rounding."""
        return self.max_wait is None or all(abs(wait - self.max_wait) > NEAR for wait in self.waits)


@attrs.define(eq=False)
class Stage:
    """Where it is played for real."""

    limiter: RateLimiter
    let_in: dict[int, float] = attrs.field(factory=dict[int, float])
    refused: dict[int, float] = attrs.field(factory=dict[int, float])
    _scopes: dict[int, trio.CancelScope] = attrs.field(factory=dict[int, trio.CancelScope])

    async def play(self, script: list[Deed]) -> None:
        async with trio.open_nursery() as nursery:
            for deed in script:
                await trio.sleep_until(float(deed.when))
                if deed.kind == "ask":
                    nursery.start_soon(self._ask, deed.who, int(deed.value))
                elif deed.kind == "leave":
                    self._scopes[deed.who].cancel()
                else:
                    self.limiter.rate = deed.value
                await trio.testing.wait_all_tasks_blocked()

    async def _ask(self, who: int, cost: int) -> None:
        with trio.CancelScope() as self._scopes[who]:
            try:
                await self.limiter.acquire(cost)
                self.let_in[who] = trio.current_time()
            except RateLimitExceededError as error:
                self.refused[who] = error.retry_after or 0.0


@settings(max_examples=300, deadline=None)
@given(
    rate=rates,
    burst=bursts,
    seed=seeds,
    number=st.integers(1, 60),
    variant=st.sampled_from(["plain", "rates", "max_wait"]),
)
def test_its_line_is_served_as_the_model_says(
    rate: Fraction, burst: int, seed: int, number: int, variant: str
) -> None:
    """With weights, with some who leave, at changing rates, or refusing long waits."""
    max_wait = 5 / rate if variant == "max_wait" else None
    play = Play(Random(seed), Bucket(rate, burst), max_wait, variant == "rates")
    play.write(number)
    assume(play.is_clear())
    patience = math.inf if max_wait is None else float(max_wait)
    stage = Stage(RateLimiter(float(rate), burst=burst, max_wait=patience))
    trio.run(stage.play, play.script, clock=trio.testing.MockClock(autojump_threshold=0))
    assert stage.let_in == pytest.approx({w: float(at) for w, at in play.let_in.items()}, abs=1e-6)
    assert list(stage.let_in) == list(play.let_in)
    assert stage.refused == pytest.approx({w: float(s) for w, s in play.refused.items()}, abs=1e-6)
    statistics = stage.limiter.statistics()
    assert (statistics.waiting, statistics.rejections) == (0, len(play.refused))
    if variant != "rates":
        passed = [(at, play.costs[who]) for who, at in stage.let_in.items()]
        check_bound(passed, rate, burst)
