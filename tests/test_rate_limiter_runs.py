"""RateLimiter in several runs, in threads, in tests of users' own code, and under Ctrl-C."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.operations import Stopwatch
from tests.test_concurrency_interrupts import ctrl_c_for_the_main_task, press_everywhere
from tests.test_rate_limiter import by_acquire, drain, forms
from trio_resilience import RateLimiter, RateLimiterStatistics, RateLimitExceededError
from trio_resilience.testing import test_mode as mode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    from tests.test_rate_limiter import Form, Limiter


def run(main: Callable[[], Awaitable[Any]], *, at: float = 0.0) -> Any:
    """Run *main* on a virtual clock that shows *at*, as trio's own shows anything."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    clock.jump(at)
    return trio.run(main, clock=clock)


# --- one run after the other --------------------------------------------------------------------


@pytest.mark.parametrize("crash", [SystemExit, KeyboardInterrupt, ValueError, None])
@pytest.mark.parametrize("first, second", [(1e6, 0.0), (0.0, 1e6), (5.0, 5.0)])
def test_a_run_starts_with_a_full_burst_and_an_empty_line(
    crash: type[BaseException] | None, first: float, second: float
) -> None:
    """However the one before ended, and wherever trio's clock starts."""
    limiter = RateLimiter(1, burst=3)

    async def die() -> None:
        async with trio.open_nursery() as nursery:
            assert drain(limiter) == 3
            for _ in range(3):
                nursery.start_soon(limiter.acquire, 2)
            await trio.testing.wait_all_tasks_blocked()
            assert limiter.statistics().waiting == 3
            if crash is not None:
                raise crash
            nursery.cancel_scope.cancel()

    async def live() -> None:
        assert limiter.retry_after == 0
        assert limiter.statistics() == RateLimiterStatistics(3, 0, 0)
        watch = Stopwatch()
        assert drain(limiter) == 3
        await limiter.acquire()
        assert watch.seconds == 1

    if crash is None:
        run(die, at=first)
    else:
        with pytest.raises((crash, BaseExceptionGroup)):
            run(die, at=first)
    assert limiter.statistics() == RateLimiterStatistics(3, 0, 0)
    assert limiter.is_idle
    run(live, at=second)
    run(live, at=first)


def test_what_counts_survives() -> None:
    """Refusals, and the rate that was set."""
    limiter = RateLimiter(1, max_wait=0)

    async def main(rejections: int) -> None:
        limiter.acquire_nowait()
        limiter.rate *= 2
        with pytest.raises(RateLimitExceededError) as caught:
            await limiter.acquire()
        assert caught.value.retry_after == 1 / limiter.rate
        assert limiter.statistics() == RateLimiterStatistics(0, 0, rejections)

    for rejections in (1, 2, 3):
        trio.run(main, rejections, clock=trio.testing.MockClock())
    assert limiter.rate == 8
    assert limiter.statistics() == RateLimiterStatistics(1, 0, 3)


def test_the_rate_may_be_set_between_runs() -> None:
    """And before the first, and after the last."""
    limiter = RateLimiter(1)
    both = RateLimiter.all_of(limiter, RateLimiter(1000, burst=1000))
    watches = list[float]()

    async def main() -> None:
        watch = Stopwatch()
        for _ in range(3):
            await both.acquire()
        watches.append(watch.seconds)

    for rate in (2, 4, 0.5):
        limiter.rate = rate
        run(main, at=7 / rate)
    limiter.rate = 5
    assert watches == [1, 0.5, 4]
    assert limiter.rate == 5


# --- threads ------------------------------------------------------------------------------------


def in_another_thread(form: Form, limiter: Limiter) -> list[str]:
    """Use *limiter* in a run in another thread; return what was raised."""
    problems = list[str]()

    def target() -> None:
        try:
            trio.run(form, limiter)
        except RuntimeError as error:
            problems.append(str(error))

    thread = threading.Thread(target=target)
    thread.start()
    thread.join()
    return problems


@forms
async def test_two_live_runs_at_once_are_refused(form: Form) -> None:
    """The second is told so; the first goes on undisturbed."""
    limiter = RateLimiter(1, burst=2)
    both = RateLimiter.all_of(RateLimiter(1), limiter)
    await form(limiter)
    for way in (limiter, both):
        problems = in_another_thread(form, way)
        assert len(problems) == 1
        assert "two runs of trio at once" in problems[0]
    assert limiter.statistics() == RateLimiterStatistics(1, 0, 0)
    limiter.acquire_nowait()


async def test_a_thread_without_trio_is_refused(autojump_clock: MockClock) -> None:
    """It gets an error, and takes nothing; by way of trio it works."""
    limiter = RateLimiter(1, burst=2)
    with pytest.raises(RuntimeError):
        await trio.to_thread.run_sync(limiter.acquire_nowait)
    assert limiter.statistics() == RateLimiterStatistics(2, 0, 0)

    def by_way_of_trio() -> None:
        trio.from_thread.run(limiter.acquire)
        trio.from_thread.run_sync(limiter.acquire_nowait)

    await trio.to_thread.run_sync(by_way_of_trio)
    assert limiter.statistics() == RateLimiterStatistics(0, 0, 0)


# --- test_mode ----------------------------------------------------------------------------------


async def test_a_test_gets_a_fresh_limiter(mock_clock: MockClock) -> None:
    """A full burst and no refusals; afterwards all is as it was."""
    limiter = RateLimiter(0.001, burst=2, max_wait=0)
    both = RateLimiter.all_of(limiter, RateLimiter(1, burst=9))
    assert drain(limiter) == 2
    with pytest.raises(RateLimitExceededError):
        await limiter.acquire()
    for _ in range(2):
        with mode():
            assert limiter.statistics() == RateLimiterStatistics(2, 0, 0)
            assert both.statistics().available == 2
            assert limiter.retry_after == 0
            await both.acquire()
            assert drain(limiter) == 1
            with pytest.raises(RateLimitExceededError):
                await limiter.acquire()
            assert limiter.statistics() == RateLimiterStatistics(0, 0, 1)
        assert limiter.statistics() == RateLimiterStatistics(0, 0, 1)
        assert both.statistics() == RateLimiterStatistics(0, 0, 0)


async def test_a_limiter_may_keep_its_state(mock_clock: MockClock) -> None:
    """`fresh=False`."""
    limiter = RateLimiter(0.001, burst=2)
    limiter.acquire_nowait()
    with mode(fresh=False):
        assert drain(limiter) == 1
    assert drain(limiter) == 0


@forms
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("combined", [True, False])
async def test_a_test_without_delays_waits_for_nothing(
    autojump_clock: MockClock, form: Form, fresh: bool, combined: bool
) -> None:
    """And nothing is refused for a wait that there is not; mistakes still are."""
    limiter = RateLimiter(0.001, burst=2, max_wait=5)
    way = RateLimiter.all_of(limiter, max_wait=5) if combined else limiter
    with mode(delays=False, fresh=fresh):
        for _ in range(100):
            await form(way)
        await way.acquire(2)
        with pytest.raises(ValueError, match=r"^`cost` must be "):
            await way.acquire(3)
        assert trio.current_time() == 0
        with trio.testing.assert_checkpoints():
            await way.acquire()
        assert way.statistics().rejections == 0


async def test_who_is_outside_a_test_waits_as_ever(autojump_clock: MockClock) -> None:
    """A neighbour's limiter is not changed."""
    limiter, watch = RateLimiter(1), Stopwatch()
    limiter.acquire_nowait()
    ends = list[float]()

    async def neighbour() -> None:
        await limiter.acquire()
        ends.append(watch.seconds)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbour)
        await trio.testing.wait_all_tasks_blocked()
        with mode():
            for _ in range(3):
                await limiter.acquire()
            limiter.rate = 0.5
            await limiter.acquire()
            assert watch.seconds == 2 + 2
        nursery.start_soon(neighbour)
    assert ends[0] in {1, 2}
    assert len(ends) == 2


# --- Ctrl-C -------------------------------------------------------------------------------------


@forms
def test_ctrl_c_in_line_takes_nothing(form: Form) -> None:
    """It comes out of the wait, and the next in line gets the token."""
    limiter = RateLimiter(1)
    times = list[float]()

    async def press() -> None:
        await trio.sleep(0.5)
        ctrl_c_for_the_main_task()

    async def behind() -> None:
        await trio.sleep(0.25)
        await form(limiter)
        times.append(trio.current_time())

    async def main() -> None:
        limiter.acquire_nowait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(press)
            nursery.start_soon(behind)
            with pytest.raises(KeyboardInterrupt):
                await form(limiter)
            assert trio.current_time() == 0.5
            assert limiter.statistics().waiting == 1

    run(main)
    assert times == [1]


@pytest.mark.watchdog(120)
# Between the call of an async function and its await, Ctrl-C leaves a coroutine behind anywhere.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("combined", [True, False])
@forms
def test_ctrl_c_at_any_line(form: Form, combined: bool) -> None:
    """Nobody is left in line, and what was taken is what was used; it comes out once."""

    def scenario(found: list[str]) -> Callable[[], Awaitable[None]]:
        async def main() -> None:
            limiter, used = RateLimiter(1, burst=4), 0
            way = RateLimiter.all_of(limiter, RateLimiter(5)) if combined else limiter
            start = trio.current_time()
            try:
                for _ in range(3):
                    await form(way)
                    used += 1
                await trio.lowlevel.checkpoint()
            finally:
                statistics = limiter.statistics()
                most = min(4, int(4 - used + trio.current_time() - start))
                # One may have been taken for an operation, or a block, that was interrupted.
                least = most - (form is not by_acquire)
                if not least <= statistics.available <= most or statistics.waiting:
                    found.append(f"after {used}: {statistics}")

        return main

    press_everywhere(scenario, lines=20)
