"""RateLimiter over long times: nothing drifts, whatever the clock, and the rate is reached."""

from __future__ import annotations

import time
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing

from tests.operations import Steps
from tests.test_rate_limiter import by_acquire, by_call, drain
from tests.test_rate_limiter_waiting import Crowd
from trio_resilience import RateLimiter
from trio_resilience._algorithms._gcra import Gcra, interval_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    from tests.test_rate_limiter import Form

pytestmark = pytest.mark.exhaustive

LATER = 1e9
"""Seconds, of which floats show no less than a tenth of a microsecond."""


@attrs.define(eq=False)
class LateClock(trio.abc.Clock):
    """A virtual clock under which every sleeper is woken late, as on a busy machine."""

    lateness: float
    now: float = 0.0

    def start_clock(self) -> None:
        """Have started already."""

    def current_time(self) -> float:
        return self.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Pass over the time to *deadline*, and more; trio asks when it has nothing to do."""
        if deadline > self.now:
            self.now = deadline + self.lateness
        return 0.0


def run_at(offset: float, main: Callable[[], Awaitable[Any]]) -> Any:
    """Run *main* on a virtual clock that shows *offset*."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    clock.jump(offset)
    return trio.run(main, clock=clock)


# --- drift --------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 0.6, LATER])
@pytest.mark.parametrize("rate, per", [(10, 1), (300, 60), (3, 1)])
def test_the_rule_does_not_drift_over_a_million(rate: float, per: float, offset: float) -> None:
    """Each passes when the rule said it would, and the last of them when it should."""
    number = 1_000_000 if offset == LATER else 100_000
    rule = Gcra.start(offset, interval_of(float(rate), float(per)), 1)
    now, refusals = offset, 0
    for _ in range(number):
        now = rule.due(1)
        refusals += not rule.try_take(now)
    assert refusals == 0
    assert now - offset == pytest.approx((number - 1) * per / rate, abs=5e-7, rel=0)


@pytest.mark.parametrize("offset", [0.6, LATER])
def test_many_acquisitions_end_when_they_should(offset: float) -> None:
    """Fifty thousand of them, by a task that does nothing else: no sum of floats is late."""
    limiter, steps = RateLimiter(10), Steps()

    async def main() -> float:
        start = trio.current_time()
        for _ in range(50_001):
            await limiter.acquire()
        return trio.current_time() - start

    clock = trio.testing.MockClock(autojump_threshold=0)
    clock.jump(offset)
    seconds = trio.run(main, clock=clock, instruments=[steps])
    assert seconds == pytest.approx(5000, abs=1e-6, rel=0)
    assert steps.count <= 2 * 50_001 + 20


@pytest.mark.parametrize("offset", [0.6, 1e5, LATER])
@pytest.mark.parametrize("rate", [10.0, 3.0, 7.7, 1e3, 1e6, 1e8])
def test_every_wait_moves_the_clock(rate: float, offset: float) -> None:
    """Also a wait that is shorter than the clock can show: nobody sleeps for nothing, or spins."""
    limiter, steps = RateLimiter(rate), Steps()

    async def main() -> float:
        start = trio.current_time()
        for _ in range(1001):
            await limiter.acquire()
        return trio.current_time() - start

    clock = trio.testing.MockClock(autojump_threshold=0)
    clock.jump(offset)
    seconds = trio.run(main, clock=clock, instruments=[steps])
    assert seconds == pytest.approx(1000 / rate, abs=max(2e-9, 5e-16 * offset), rel=1e-9)
    assert steps.count <= 2 * 1001 + 20


@pytest.mark.parametrize("offset", [0.6, LATER])
def test_a_burst_is_no_more_at_any_time(offset: float) -> None:
    """A large clock shows no fractions of microseconds, and that adds up to nothing."""
    limiter = RateLimiter(100, burst=5)
    taken = 0

    async def main() -> None:
        nonlocal taken
        for _ in range(20_000):
            clock.jump(0.001)
            try:
                limiter.acquire_nowait()
                taken += 1
            except trio.WouldBlock:
                pass

    clock = trio.testing.MockClock()
    clock.jump(offset)
    trio.run(main, clock=clock)
    assert taken in {5 + 1999, 5 + 2000}


@pytest.mark.parametrize("offset", [0.0, 0.6, 1e5, LATER])
@pytest.mark.parametrize("rate", [1, 3, 10])
def test_a_wait_of_just_max_wait_is_allowed_whatever_the_clock_shows(
    rate: float, offset: float
) -> None:
    """Eight times a tenth is less than eight tenths, for a clock of floats; the wait is no more.

    On a large clock, eight tenths at once are a little more or less than that, too.
    """
    limiter = RateLimiter(rate, max_wait=0.2 / rate)

    async def main() -> float:
        start = trio.current_time()
        await limiter.acquire()
        for _ in range(8 if offset < LATER else 0):
            await trio.sleep(0.1 / rate)
        await trio.sleep_until(start + 0.8 / rate)
        await limiter.acquire()
        return trio.current_time() - start

    assert run_at(offset, main) == pytest.approx(1 / rate, abs=1e-6)


@pytest.mark.parametrize("number", [10, 100, 1000, 10_000])
def test_a_sum_of_floats_is_on_time(number: int) -> None:
    """A second in ten thousand parts is a little less, or more; it is a second all the same."""
    limiter, early = RateLimiter(1), list[int]()

    async def main() -> None:
        limiter.acquire_nowait()
        for second in range(5):
            for _ in range(number - 1):
                clock.jump(1 / number)
            assert limiter.retry_after == pytest.approx(1 / number, abs=1e-9)
            clock.jump(1 / number)
            if limiter.retry_after != 0.0 or limiter.statistics().available != 1:
                early.append(second)
            limiter.acquire_nowait()

    clock = trio.testing.MockClock()
    trio.run(main, clock=clock)
    assert early == []


# --- the rate that is reached --------------------------------------------------------------------


@pytest.mark.parametrize("form", [by_acquire, by_call])
@pytest.mark.parametrize("offset", [0.6, LATER])
@pytest.mark.parametrize("rate, burst", [(10, 1), (3, 1), (7, 4), (1000, 100)])
def test_a_saturated_limiter_reaches_its_rate(
    form: Form, offset: float, rate: float, burst: int
) -> None:
    """At least 0.999 of it, and no more than all of it, with several tasks in line all the time."""
    limiter, times = RateLimiter(rate, burst=burst), list[float]()

    async def insist() -> None:
        while True:
            await form(limiter)
            times.append(trio.current_time())

    async def main() -> None:
        with trio.move_on_after(3000 / rate):
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(insist)

    run_at(offset, main)
    assert 0.999 * 3000 <= len(times) <= 3000 + burst
    reached = (len(times) - burst) / (times[-1] - times[0])
    assert 0.999 * rate <= reached <= rate * (1 + 1e-6)


@pytest.mark.parametrize("burst", [1, 2, 5])
@pytest.mark.parametrize("lateness", [0.001, 0.03, 0.5])
def test_late_wake_ups_break_no_bound(burst: int, lateness: float) -> None:
    """With a burst of two, lateness below an interval costs nothing of the rate, either."""
    limiter, times = RateLimiter(10, burst=burst), list[float]()

    async def main() -> None:
        for _ in range(1000):
            await limiter.acquire()
            times.append(trio.current_time())

    trio.run(main, clock=LateClock(lateness))
    for first, last in zip(times, times[burst:], strict=False):
        assert last - first >= 0.1 - 1e-9
    for first, last in zip(times, times[burst + 9 :], strict=False):
        assert last - first >= 1.0 - 1e-9
    if burst > 1 and lateness < 0.1:
        assert 999 / (times[-1] - times[0]) >= 0.999 * 10


@pytest.mark.parametrize("burst, late, at_once", [(1, 10, 1), (3, 10, 3), (3, 2.5, 2), (5, 5, 5)])
async def test_to_be_woken_late_lets_no_more_through_than_a_burst(
    mock_clock: MockClock, burst: int, late: float, at_once: int
) -> None:
    """Time jumps while ten wait: what had to be let in on the way has missed its chance."""
    limiter = RateLimiter(1, burst=burst)
    assert drain(limiter) == burst
    async with trio.open_nursery() as nursery:
        crowd = Crowd(nursery)
        for who in range(10):
            await crowd.join(who, limiter)
        mock_clock.jump(late)
        missed = max(0, late - 10) if burst > at_once else late - at_once
        assert round(limiter.retry_after, 6) == 11 - late + missed
        await trio.testing.wait_all_tasks_blocked()
        assert crowd.let_in == dict.fromkeys(range(at_once), late)
        mock_clock.autojump_threshold = 0
    assert crowd.order == list(range(10))
    later = [when for when in crowd.let_in.values() if when > late]
    first = at_once + 1 if late < at_once + 1 and burst > at_once else late + 1
    assert later == [first + place for place in range(10 - at_once)]


def test_waits_are_those_of_a_queue_with_one_server() -> None:
    """M/D/1: 20,000 random arrivals at 0.8 of the rate wait 0.2 s on average, for 0.1 s each.

    Each of the waits is the one that Lindley's recursion gives, too.
    """
    rng, limiter = Random(20_000), RateLimiter(10)
    gaps = [rng.expovariate(8) for _ in range(20_000)]
    waits = [0.0] * len(gaps)

    async def arrive(index: int, due: float) -> None:
        await trio.sleep_until(due)
        arrived = trio.current_time()
        await limiter.acquire()
        waits[index] = trio.current_time() - arrived

    async def main() -> None:
        due = trio.current_time()
        async with trio.open_nursery() as nursery:
            for index, gap in enumerate(gaps):
                due += gap
                nursery.start_soon(arrive, index, due)

    run_at(0, main)
    assert fmean(waits) == pytest.approx(0.2, abs=0.035)
    expected = 0.0
    for index, wait in enumerate(waits):
        assert wait == pytest.approx(expected, abs=1e-6), index
        if index + 1 < len(gaps):
            expected = max(0.0, expected + 0.1 - gaps[index + 1])


# --- other clocks -------------------------------------------------------------------------------


@pytest.mark.parametrize("jump", [3600, -3600])
async def test_the_wall_clock_means_nothing(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """It may be set an hour forward or back while tasks wait."""
    limiter, times = RateLimiter(1), list[float]()

    async def wait() -> None:
        await limiter.acquire()
        times.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(wait)
        await trio.sleep(1.5)
        for name in ("time", "monotonic"):
            clock = getattr(time, name)
            monkeypatch.setattr(time, name, lambda clock=clock: clock() + jump)
            nanoseconds = getattr(time, f"{name}_ns")
            monkeypatch.setattr(
                time, f"{name}_ns", lambda clock=nanoseconds: clock() + jump * 10**9
            )
    assert times == [0, 1, 2, 3]
    assert limiter.retry_after == 1
