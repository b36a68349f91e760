"""Bulkhead: who may run, who may wait, for how long, and how the rest are refused."""

from __future__ import annotations

import datetime as dt
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.operations import returns, within_calls
from tests.test_semaphore import Visitors, counts
from trio_resilience import (
    Bulkhead,
    BulkheadFullError,
    Event,
    WaitFinished,
    WaitStarted,
    subscribe,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

NO_COUNTS: list[object] = [-1, math.nan, math.inf, -math.inf, 1e400, True, "5", 1.5, [1]]
NO_TIMES: list[object] = [-1, -0.001, math.nan, -math.inf, True, "5", None, [1], dt.timedelta(-1)]

BAD: list[tuple[str, Any]] = [
    *[("max_concurrency", bad) for bad in (0, None, *NO_COUNTS)],
    *[("queue_size", bad) for bad in NO_COUNTS],
    *[("max_wait", bad) for bad in NO_TIMES],
]


def ways_into(bulkhead: Bulkhead) -> list[Any]:
    """Everything that waits for a permit, to be called without arguments."""
    return [bulkhead.acquire, bulkhead.__aenter__, partial(bulkhead.call, returns, 1)]


@pytest.mark.parametrize("option, value", BAD, ids=repr)
def test_bad_options_are_refused(option: str, value: Any) -> None:
    """When it is made, by name, and with what was given."""
    options: dict[str, Any] = {"max_concurrency": 3, option: value}
    with pytest.raises((TypeError, ValueError), match=rf"^`{option}` must be .*, got "):
        Bulkhead(**options)


def test_the_options_are_the_documented_ones() -> None:
    """A time may be a timedelta, and infinite; what was configured can't be changed."""
    bulkhead = Bulkhead(3)
    assert (bulkhead.max_concurrency, bulkhead.queue_size) == (3, None)
    assert (bulkhead.max_wait, bulkhead.name) == (math.inf, "bulkhead")
    assert Bulkhead(1, max_wait=dt.timedelta(seconds=1.5)).max_wait == 1.5
    assert Bulkhead(1, queue_size=0, max_wait=0, name="db").max_wait == 0
    with pytest.raises(TypeError, match="positional"):
        Bulkhead(3, 5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(AttributeError):
        bulkhead.queue_size = 5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


# --- the line -----------------------------------------------------------------------------------


@pytest.mark.parametrize("queue_size", [0, 1, 3])
async def test_a_full_line_refuses_at_once(queue_size: int) -> None:
    """And says what was full; whoever is inside or waits is not disturbed."""
    bulkhead = Bulkhead(2, queue_size=queue_size, name="db")
    async with trio.open_nursery() as nursery:
        visitors = Visitors(nursery, lambda: bulkhead)
        for number in range(2 + queue_size):
            await visitors.come(f"{number}")
        assert visitors.errors == {}
        for refused in ways_into(bulkhead):
            with pytest.raises(BulkheadFullError) as caught:
                await refused()
            error = caught.value
            assert (error.name, error.capacity, error.requested) == (
                "db",
                2 + queue_size,
                3 + queue_size,
            )
            assert (error.retry_after, error.waited) == (None, None)
        assert counts(bulkhead) == (2, 0, queue_size)
        assert bulkhead.statistics().rejections == 3
        await visitors.leave("0")
        assert len(visitors.entered) == (3 if queue_size else 2)
        visitors.leave_all()
    assert counts(bulkhead) == (0, 2, 0)


async def test_without_a_limit_everybody_may_wait(autojump_clock: MockClock) -> None:
    """`queue_size=None`: nobody is refused."""
    bulkhead = Bulkhead(10)
    async with trio.open_nursery() as nursery:
        for _ in range(1000):
            nursery.start_soon(bulkhead.call, trio.sleep, 1)
        await trio.sleep(0.5)
        assert counts(bulkhead) == (10, 0, 990)
    assert trio.current_time() == 100
    assert bulkhead.statistics().rejections == 0


async def test_who_is_cancelled_gives_up_the_place_in_line() -> None:
    """A hundred times two wait and are cancelled; then there is room for two, and for no more."""
    bulkhead = Bulkhead(1, queue_size=2)
    bulkhead.acquire_nowait()
    async with trio.open_nursery() as nursery:
        visitors = Visitors(nursery, lambda: bulkhead)
        for _ in range(100):
            await visitors.come("a")
            await visitors.come("b")
            visitors.cancel("a", "b")
            assert counts(bulkhead) == (1, 0, 0)
        for name in "cde":
            await visitors.come(name)
        assert counts(bulkhead) == (1, 0, 2)
        assert [*visitors.errors] == ["e"]
        bulkhead.release()
        await visitors.leave("c")
        assert visitors.entered == ["c", "d"]
        visitors.leave_all()


async def test_a_place_in_line_is_free_as_soon_as_its_owner_is_let_in() -> None:
    """In the same step, before it runs."""
    bulkhead = Bulkhead(1, queue_size=1)
    async with trio.open_nursery() as nursery:
        visitors = Visitors(nursery, lambda: bulkhead)
        bulkhead.acquire_nowait()
        await visitors.come("a")
        bulkhead.release()
        assert counts(bulkhead) == (1, 0, 0)
        await visitors.come("b")
        assert (visitors.entered, visitors.errors) == (["a"], {})
        visitors.leave_all()


async def test_first_come_first_served() -> None:
    """Nobody overtakes: `acquire_nowait` neither, nor who releases and comes back."""
    bulkhead = Bulkhead(1)
    async with trio.open_nursery() as nursery:
        visitors = Visitors(nursery, lambda: bulkhead)
        bulkhead.acquire_nowait()
        for name in "abc":
            await visitors.come(name)
        bulkhead.release()
        with pytest.raises(trio.WouldBlock):
            bulkhead.acquire_nowait()
        await visitors.come("d")
        for name in "abcd":
            await visitors.leave(name)
    assert visitors.entered == [*"abcd"]


async def test_it_cannot_be_released_more_often_than_it_is_held() -> None:
    """By hand, or in a block: a RuntimeError, and nothing has changed."""
    bulkhead = Bulkhead(2)
    with pytest.raises(RuntimeError, match="release"):
        bulkhead.release()
    with pytest.raises(RuntimeError, match="release"):
        async with bulkhead:
            bulkhead.release()
    assert counts(bulkhead) == (0, 2, 0)


# --- the wait -----------------------------------------------------------------------------------


async def test_a_wait_is_refused_when_it_has_taken_too_long(autojump_clock: MockClock) -> None:
    """At exactly that instant, with what was waited; the place in line is free again."""
    bulkhead = Bulkhead(1, queue_size=1, max_wait=2.5, name="db")
    async with bulkhead:
        for enter in ways_into(bulkhead):
            start = trio.current_time()
            with pytest.raises(BulkheadFullError) as caught:
                await enter()
            assert trio.current_time() == start + 2.5
            assert (caught.value.name, caught.value.waited) == ("db", 2.5)
            assert str(caught.value) == "db is full: no permit came free within 2.5 s"
            assert counts(bulkhead) == (1, 0, 0)
    assert bulkhead.statistics().rejections == 3


async def test_no_wait_at_all(autojump_clock: MockClock) -> None:
    """`max_wait=0` refuses in no time, but whoever finds a free permit gets it."""
    bulkhead = Bulkhead(1, max_wait=0)
    async with bulkhead:
        with pytest.raises(BulkheadFullError) as caught:
            await bulkhead.acquire()
        assert (caught.value.waited, trio.current_time()) == (0, 0)
    assert await bulkhead.call(returns, 5) == 5
    assert counts(bulkhead) == (0, 1, 0)


async def test_the_limit_is_for_the_wait_alone(autojump_clock: MockClock) -> None:
    """Once it is let in, a call takes as long as it likes, and sees no deadline of the wait."""
    bulkhead, deadlines = Bulkhead(1, max_wait=2), list[float]()

    async def op() -> None:
        deadlines.append(trio.current_effective_deadline())
        await trio.sleep(10)

    async with trio.open_nursery() as nursery:
        await bulkhead.acquire()
        nursery.start_soon(bulkhead.call, op)
        await trio.sleep(1)
        bulkhead.release()
    assert (trio.current_time(), deadlines) == (11, [math.inf])


async def test_each_wait_has_its_own_limit(autojump_clock: MockClock) -> None:
    """It counts from when each came; a refused one does not delay the others."""
    bulkhead, refused_at = Bulkhead(1, max_wait=3), list[float]()

    async def wait(delay: float) -> None:
        await trio.sleep(delay)
        try:
            await bulkhead.acquire()
        except BulkheadFullError:
            refused_at.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        await bulkhead.acquire()
        for delay in (1, 2, 4):
            nursery.start_soon(wait, delay)
        await trio.sleep(6)
        bulkhead.release()
    assert refused_at == [4, 5]
    assert counts(bulkhead) == (1, 0, 0)


async def test_an_outer_deadline_is_not_ours(autojump_clock: MockClock) -> None:
    """Earlier, or at the very same instant: it is the cancellation that goes on, uncounted."""
    bulkhead, heard = Bulkhead(1, max_wait=2), list[Event]()
    await bulkhead.acquire()
    with subscribe(within_calls(heard.append)):
        for seconds in (1, 2):
            for enter in ways_into(bulkhead):
                with trio.move_on_after(seconds) as scope:
                    await enter()
                assert scope.cancelled_caught
    assert bulkhead.statistics().rejections == 0
    assert [type(event) for event in heard] == [WaitStarted, WaitFinished] * 6
    assert all(event.cancelled for event in heard if isinstance(event, WaitFinished))
    assert counts(bulkhead) == (1, 0, 0)


async def test_a_cancellation_at_the_instant_of_the_limit_wins(autojump_clock: MockClock) -> None:
    """Also one that comes from another task."""
    bulkhead = Bulkhead(1, max_wait=2)
    await bulkhead.acquire()
    for _ in range(20):
        refused_before = bulkhead.statistics().rejections
        errors = list[Exception]()

        async def wait(errors: list[Exception] = errors) -> None:
            try:
                await bulkhead.acquire()
            except BulkheadFullError as error:
                errors.append(error)

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.sleep(2)
                scope.cancel()
        # It may have been refused already when the other task was woken, but never both.
        assert bulkhead.statistics().rejections - refused_before == len(errors)
    assert counts(bulkhead) == (1, 0, 0)


async def test_a_permit_that_comes_at_the_last_instant_is_not_lost(
    autojump_clock: MockClock,
) -> None:
    """Either it is taken or it is free, whichever was first."""
    bulkhead = Bulkhead(1, max_wait=2)
    for _ in range(50):
        await bulkhead.acquire()
        ends = list[str]()

        async def wait(ends: list[str] = ends) -> None:
            try:
                async with bulkhead:
                    ends.append("in")
            except BulkheadFullError:
                ends.append("refused")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            await trio.sleep(2)
            bulkhead.release()
        assert len(ends) == 1
        assert counts(bulkhead) == (0, 1, 0)


async def test_a_permit_that_was_granted_in_time_is_kept() -> None:
    """It was handed over; that the limit expires before its owner runs changes nothing."""
    clock, bulkhead = trio.testing.MockClock(), Bulkhead(1, max_wait=2)
    entered = list[float]()

    async def wait() -> None:
        async with bulkhead:
            entered.append(trio.current_time())

    async def main() -> None:
        await bulkhead.acquire()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await wait_all_tasks_blocked()
            bulkhead.release()
            clock.jump(5)

    await trio.to_thread.run_sync(partial(trio.run, main, clock=clock))
    assert entered == [5]
    assert bulkhead.statistics().rejections == 0


async def test_it_is_disposable_while_nobody_holds_or_wants_a_permit() -> None:
    """So `Keyed` forgets none that is in use."""
    bulkhead = Bulkhead(1)
    assert bulkhead.is_disposable
    async with bulkhead:
        assert not bulkhead.is_disposable
    assert bulkhead.is_disposable
