"""Semaphore: who is let in, in which order, and how many at once, whatever happens in the line."""

from __future__ import annotations

import gc
import sys
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.test_semaphore import Visitors, counts
from trio_resilience import Semaphore

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.testing import MockClock


@pytest.fixture
async def nursery() -> AsyncGenerator[trio.Nursery, None]:
    """One whose tasks are cancelled when the test is over."""
    async with trio.open_nursery() as nursery:
        yield nursery
        nursery.cancel_scope.cancel()


# --- the order ----------------------------------------------------------------------------------


async def test_first_come_first_served(nursery: trio.Nursery) -> None:
    """Fifty wait, and are let in as they came."""
    semaphore = Semaphore(1)
    visitors = Visitors(nursery, semaphore.hold)
    names = [f"{number}" for number in range(50)]
    for name in names:
        await visitors.come(name)
    for name in names:
        await visitors.leave(name)
    assert visitors.entered == names
    assert counts(semaphore) == (0, 1, 0)


@pytest.mark.parametrize("way", ["acquire", "async with", "hold", "call"])
async def test_every_way_in_is_the_same_line(nursery: trio.Nursery, way: str) -> None:
    """Whoever waits in another way is not overtaken, and overtakes nobody."""
    semaphore, entered = Semaphore(1), list[str]()

    async def enter(name: str) -> None:
        entered.append(name)

    async def wait_in_another_way() -> None:
        if way == "acquire":
            await semaphore.acquire()
            await enter(way)
            semaphore.release()
        elif way == "call":
            await semaphore.call(enter, way)
        else:
            async with semaphore if way == "async with" else semaphore.hold():
                await enter(way)

    semaphore.acquire_nowait()
    nursery.start_soon(semaphore.call, enter, "first")
    await wait_all_tasks_blocked()
    nursery.start_soon(wait_in_another_way)
    await wait_all_tasks_blocked()
    nursery.start_soon(semaphore.call, enter, "last")
    await wait_all_tasks_blocked()
    semaphore.release()
    await wait_all_tasks_blocked()
    assert entered == ["first", way, "last"]
    assert counts(semaphore) == (0, 1, 0)


async def test_a_permit_is_handed_over_in_the_same_step(nursery: trio.Nursery) -> None:
    """Between the release and the next step of the one who waited there is no gap to jump into."""
    semaphore = Semaphore(1)
    visitors = Visitors(nursery, semaphore.hold)
    semaphore.acquire_nowait()
    await visitors.come("waiter")
    semaphore.release()
    assert counts(semaphore) == (1, 0, 0)
    with pytest.raises(trio.WouldBlock):
        semaphore.acquire_nowait()
    assert visitors.entered == []
    await wait_all_tasks_blocked()
    assert visitors.entered == ["waiter"]


async def test_who_releases_and_comes_back_at_once_waits_behind_the_others(
    nursery: trio.Nursery,
) -> None:
    """It does not overtake, also without a checkpoint in between."""
    semaphore, order = Semaphore(1), list[str]()

    async def work(name: str) -> None:
        for _ in range(3):
            await semaphore.acquire()
            order.append(name)
            await trio.lowlevel.checkpoint()
            semaphore.release()

    semaphore.acquire_nowait()
    for name in "abc":
        nursery.start_soon(work, name)
        await wait_all_tasks_blocked()
    semaphore.release()
    await wait_all_tasks_blocked()
    assert order == [*"abcabcabc"]


async def test_nobody_overtakes_who_waits_for_more(nursery: trio.Nursery) -> None:
    """One permit is free, and waiting for two comes first: the free one stays with the line."""
    semaphore = Semaphore(2)
    visitors = Visitors(nursery, semaphore.hold)
    await visitors.come("one")
    await visitors.come("two", 2)
    assert counts(semaphore) == (1, 1, 1)
    with pytest.raises(trio.WouldBlock):
        semaphore.acquire_nowait()
    await visitors.come("late")
    assert visitors.entered == ["one"]
    await visitors.leave("one")
    assert visitors.entered == ["one", "two"]
    await visitors.leave("two")
    assert visitors.entered == ["one", "two", "late"]


async def test_a_large_request_is_not_starved_by_endless_small_ones(
    autojump_clock: MockClock,
) -> None:
    """It is next as soon as it is first in line, though small ones would always fit."""
    semaphore, entered_at = Semaphore(3), list[float]()

    async def small(number: int) -> None:
        await trio.sleep(number * 0.4)
        async with semaphore:
            await trio.sleep(1)

    async def large() -> None:
        await trio.sleep(5)
        async with semaphore.hold(3):
            entered_at.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(large)
        for number in range(100):
            nursery.start_soon(small, number)
    assert len(entered_at) == 1
    assert 5 <= entered_at[0] <= 6  # when those that were inside have left


async def test_weights_are_atomic(nursery: trio.Nursery) -> None:
    """Two that each need most of the permits: one has all of its, the other none."""
    semaphore = Semaphore(4)
    visitors = Visitors(nursery, semaphore.hold)
    await visitors.come("holder")
    await visitors.come("a", 4)
    await visitors.come("b", 3)
    assert counts(semaphore) == (1, 3, 2)
    await visitors.leave("holder")
    assert (visitors.entered, counts(semaphore)) == (["holder", "a"], (4, 0, 1))
    await visitors.leave("a")
    assert (visitors.entered, counts(semaphore)) == (["holder", "a", "b"], (3, 1, 0))


async def test_one_release_lets_in_all_that_fit(nursery: trio.Nursery) -> None:
    """In the same step, and in their order; the first that does not fit stops the rest."""
    semaphore = Semaphore(5)
    visitors = Visitors(nursery, semaphore.hold)
    await visitors.come("holder", 5)
    for name, weight in {"a": 2, "b": 2, "c": 2, "d": 1}.items():
        await visitors.come(name, weight)
    semaphore.release(5)
    assert counts(semaphore) == (4, 1, 2)
    await wait_all_tasks_blocked()
    assert set(visitors.entered) == {"holder", "a", "b"}


# --- cancellation -------------------------------------------------------------------------------


async def test_a_ghost_takes_no_place(nursery: trio.Nursery) -> None:
    """Of three that wait the first two are cancelled: the third is next, in the same step."""
    semaphore = Semaphore(1)
    visitors = Visitors(nursery, semaphore.hold)
    for name in ("holder", "a", "b", "c"):
        await visitors.come(name)
    visitors.cancel("a", "b")
    assert counts(semaphore) == (1, 0, 1)
    semaphore.release()
    assert counts(semaphore) == (1, 0, 0)
    await wait_all_tasks_blocked()
    assert visitors.entered == ["holder", "c"]
    semaphore.release()
    assert counts(semaphore) == (0, 1, 0)


async def test_a_cancelled_head_lets_the_next_go_in_the_same_step(nursery: trio.Nursery) -> None:
    """What it would have needed is free for all those behind it that fit."""
    semaphore = Semaphore(5)
    visitors = Visitors(nursery, semaphore.hold)
    await visitors.come("holder", 2)
    for name, weight in {"large": 4, "a": 1, "b": 2, "c": 1}.items():
        await visitors.come(name, weight)
    assert counts(semaphore) == (2, 3, 4)
    visitors.cancel("large")
    assert counts(semaphore) == (5, 0, 1)
    await wait_all_tasks_blocked()
    assert set(visitors.entered) == {"holder", "a", "b"}


async def test_several_heads_cancelled_at_once(nursery: trio.Nursery) -> None:
    """By one scope: who is let in on the way and cancelled right after it leaves no trace."""
    semaphore = Semaphore(4)
    inside = Visitors(nursery, semaphore.hold)
    await inside.come("holder", 2)
    async with trio.open_nursery() as doomed:
        visitors = Visitors(doomed, semaphore.hold)
        for number, weight in enumerate([4, 2, 3, 1, 2]):
            await visitors.come(f"{number}", weight)
        await inside.come("survivor", 2)
        doomed.cancel_scope.cancel()
    await wait_all_tasks_blocked()
    assert inside.entered == ["holder", "survivor"]
    assert counts(semaphore) == (4, 0, 0)


async def test_who_is_cancelled_after_it_was_let_in_passes_the_permit_on(
    nursery: trio.Nursery,
) -> None:
    """It was woken and has not run: whether it gets in or not, the next one does."""
    semaphore = Semaphore(1)
    visitors = Visitors(nursery, semaphore.hold)
    for name in ("holder", "woken", "next"):
        await visitors.come(name)
    semaphore.release()
    visitors.cancel("woken")
    await wait_all_tasks_blocked()
    assert visitors.ended == ["woken"]
    assert visitors.entered[-1] == "next"
    assert counts(semaphore) == (1, 0, 0)


async def test_the_line_does_not_drift() -> None:
    """After a hundred rounds of two who wait and are cancelled, nobody waits."""
    semaphore = Semaphore(1)
    semaphore.acquire_nowait()
    for round_ in range(100):
        async with trio.open_nursery() as nursery:
            visitors = Visitors(nursery, semaphore.hold)
            await visitors.come("a")
            await visitors.come("b")
            assert counts(semaphore) == (1, 0, 2)
            if round_ % 2:
                visitors.cancel("b", "a")
            visitors.leave_all()
        assert counts(semaphore) == (1, 0, 0)
    semaphore.release()
    with trio.fail_after(1):
        await semaphore.acquire()


@pytest.mark.exhaustive
@pytest.mark.parametrize("weight", [1, 3])
async def test_cancelled_waits_leave_nothing_in_memory(weight: int) -> None:
    """Of a hundred thousand."""
    semaphore = Semaphore(3)
    semaphore.acquire_nowait()
    semaphore.acquire_nowait(2)

    async def rounds(count: int) -> int:
        for _ in range(count):
            with trio.CancelScope(deadline=trio.current_time()):
                await semaphore.acquire(weight)
        gc.collect()
        return sys.getallocatedblocks()

    before = await rounds(1000)
    assert await rounds(100_000) - before < 500
    assert counts(semaphore) == (3, 0, 0)
