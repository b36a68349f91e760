"""Semaphore: its number of permits is changed while they are held and waited for."""

from __future__ import annotations

from random import Random
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


async def test_fewer_permits_let_nobody_in_until_enough_are_back(nursery: trio.Nursery) -> None:
    """Five inside, five in line; with two permits the sixth is in when one is left inside."""
    semaphore = Semaphore(5)
    visitors = Visitors(nursery, semaphore.hold)
    for number in range(10):
        await visitors.come(f"{number}")
    semaphore.permits = 2
    assert (semaphore.permits, counts(semaphore)) == (2, (5, 0, 5))
    for left, name in enumerate("012", start=1):
        await visitors.leave(name)
        assert counts(semaphore) == (5 - left, 0, 5)
    await visitors.leave("3")
    assert counts(semaphore) == (2, 0, 4)
    semaphore.permits = 4
    assert counts(semaphore) == (4, 0, 2)
    await wait_all_tasks_blocked()
    assert set(visitors.entered) == {f"{number}" for number in range(8)}


async def test_a_semaphore_can_be_paused(nursery: trio.Nursery) -> None:
    """From two to none: who is inside stays, who comes waits, and with three all go on."""
    semaphore = Semaphore(2)
    visitors = Visitors(nursery, semaphore.hold)
    await visitors.come("a")
    semaphore.permits = 0
    assert counts(semaphore) == (1, 0, 0)
    await visitors.leave("a")
    for name in "bcde":
        await visitors.come(name)
    assert (visitors.entered, visitors.errors) == (["a"], {})
    assert counts(semaphore) == (0, 0, 4)
    with pytest.raises(trio.WouldBlock):
        semaphore.acquire_nowait()
    with pytest.raises(ValueError, match=r"^`weight` must be <= 0"):
        await semaphore.acquire(2)
    semaphore.permits = 3
    assert counts(semaphore) == (3, 0, 1)
    await wait_all_tasks_blocked()
    assert set(visitors.entered) == {*"abcd"}


async def test_more_permits_keep_the_order(nursery: trio.Nursery) -> None:
    """They go to the head of the line, however large, and not to those behind it that fit."""
    semaphore = Semaphore(4)
    visitors = Visitors(nursery, semaphore.hold)
    await visitors.come("holder", 4)
    await visitors.come("large", 4)
    await visitors.come("small")
    semaphore.permits = 7
    assert counts(semaphore) == (4, 3, 2)
    semaphore.permits = 9
    assert counts(semaphore) == (9, 0, 0)


async def test_the_number_can_be_set_inside(autojump_clock: MockClock) -> None:
    """By an operation that runs under it; at every entry there are not more than allowed."""
    semaphore, running, peaks = Semaphore(3), 0, list[tuple[int, int]]()
    rng = Random(7)  # so that no two do something at the same instant

    async def op(number: int) -> None:
        nonlocal running
        running += 1
        peaks.append((running, semaphore.permits))
        await trio.sleep(1 + rng.random())
        semaphore.permits = [1, 4, 2, 5, 3][number % 5]
        await trio.sleep(1 + rng.random())
        running -= 1

    async with trio.open_nursery() as nursery:
        for number in range(40):
            nursery.start_soon(semaphore.call, op, number)
    assert len(peaks) == 40
    assert all(inside <= allowed for inside, allowed in peaks)
    assert max(inside for inside, _ in peaks) > 3


async def test_a_request_above_all_permits_is_refused_at_once(nursery: trio.Nursery) -> None:
    """Unless it asks to wait; then it waits, first in line, until there are enough."""
    semaphore = Semaphore(2)
    visitors = Visitors(nursery, semaphore.hold)
    with pytest.raises(ValueError, match=r"^`weight` must be <= 2"):
        semaphore.acquire_nowait(3)
    with pytest.raises(ValueError, match=r"^`weight` must be <= 2"):
        await semaphore.acquire(3)
    with pytest.raises(ValueError, match=r"^`weight` must be <= 2"):
        await semaphore.hold(3).__aenter__()
    await visitors.come("large", 3, wait_for_resize=True)
    await visitors.come("small")
    assert (visitors.entered, counts(semaphore)) == ([], (0, 2, 2))
    semaphore.permits = 3
    assert counts(semaphore) == (3, 0, 1)
    await visitors.leave("large")
    assert visitors.entered == ["large", "small"]


async def test_who_waits_for_a_resize_in_vain_can_be_cancelled(nursery: trio.Nursery) -> None:
    """And holds up nobody any longer."""
    semaphore = Semaphore(2)
    visitors = Visitors(nursery, semaphore.hold)
    await visitors.come("large", 3, wait_for_resize=True)
    await visitors.come("small")
    visitors.cancel("large")
    assert counts(semaphore) == (1, 1, 0)
