"""Semaphore and bulkhead: Ctrl-C at any line, blocks of all kinds, and those of `test_mode`."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.operations import foreign_nursery
from tests.test_concurrency_interrupts import ctrl_c_for_the_main_task, press_everywhere, run
from tests.test_semaphore import Visitors, counts
from tests.test_semaphore_runs import each, every_entry
from trio_resilience import Bulkhead, BulkheadFullError, Event, Semaphore, subscribe
from trio_resilience.testing import test_mode as mode

# --- Ctrl-C -------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("way", ["acquire", "async with", "call"])
def test_ctrl_c_in_line_leaves_no_ghost(make: Any, way: str) -> None:
    """It comes out of the wait, once; the next in line is not held up by who is gone."""
    limiter = make()

    async def press() -> None:
        ctrl_c_for_the_main_task()

    async def wait() -> None:
        if way == "acquire":
            await limiter.acquire()
        elif way == "call":
            await limiter.call(trio.sleep_forever)
        else:
            async with limiter:
                pass

    async def main() -> None:
        async with foreign_nursery() as nursery:
            await limiter.acquire()
            await limiter.acquire()
            nursery.start_soon(press)
            with pytest.raises(KeyboardInterrupt):
                await wait()
            assert counts(limiter) == (2, 0, 0)
            visitors = Visitors(nursery, lambda: limiter)
            await visitors.come("next")
            limiter.release()
            await wait_all_tasks_blocked()
            assert visitors.entered == ["next"]
            limiter.release()
            await visitors.leave("next")
        assert counts(limiter) == (0, 2, 0)

    run(main)


async def _pass_round() -> None:
    for _ in range(2):
        await trio.lowlevel.checkpoint()


async def use_semaphore(limiter: Any) -> None:
    async with limiter:
        await _pass_round()
    async with limiter.hold(2):
        await _pass_round()
    await limiter.call(_pass_round)


async def use_bulkhead(limiter: Any) -> None:
    for _ in range(2):
        try:
            async with limiter:
                await _pass_round()
            await limiter.call(_pass_round)
        except BulkheadFullError:
            pass


async def use_resize(limiter: Any) -> None:
    for permits in (1, 3, 2):
        limiter.permits = permits
        async with limiter:
            limiter.permits = permits
            await _pass_round()


JOBS: list[tuple[Callable[[], Any], Callable[[Any], Awaitable[None]]]] = [
    (lambda: Semaphore(2), use_semaphore),
    (lambda: Semaphore(2), use_resize),
    (lambda: Bulkhead(2, queue_size=1, max_wait=5), use_bulkhead),
    (lambda: Bulkhead(2, queue_size=0), use_bulkhead),
]


@pytest.mark.exhaustive
@pytest.mark.watchdog(120)
# Between the call of an async function and its await, Ctrl-C leaves a coroutine behind anywhere.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("make, job", JOBS, ids=["semaphore", "resize", "bulkhead", "no line"])
def test_ctrl_c_at_any_line(make: Any, job: Any) -> None:
    """The main task, among others, uses it: all permits come back, and one error comes out."""

    def scenario(found: list[str]) -> Callable[[], Awaitable[None]]:
        async def main() -> None:
            limiter, heard = make(), list[Event]()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(job, limiter)
                    nursery.start_soon(job, limiter)
                    with subscribe(heard.append):
                        await job(limiter)
            finally:
                borrowed, available, waiting = counts(limiter)
                if borrowed or waiting or available != getattr(limiter, "permits", 2):
                    found.append(f"something is lost: {limiter!r}")
                try:
                    for _ in range(available):
                        limiter.acquire_nowait()
                except trio.WouldBlock:
                    found.append(f"there is less than it says: {limiter!r}")
                if counts(limiter)[1] != 0:
                    found.append(f"there is more than it says: {limiter!r}")

        return main

    press_everywhere(scenario, lines=20)


# --- test_mode ----------------------------------------------------------------------------------


@each
async def test_a_tests_block_has_permits_of_its_own(make: Any) -> None:
    """What is held outside is free inside, and the other way round."""
    limiter = make()
    await limiter.acquire()
    with mode():
        assert counts(limiter) == (0, 2, 0)
        assert limiter.is_idle
        await limiter.acquire()
        await limiter.acquire()
        assert counts(limiter) == (2, 0, 0)
    assert counts(limiter) == (1, 1, 0)
    with mode():
        assert counts(limiter) == (0, 2, 0)
        with pytest.raises(RuntimeError):
            limiter.release()
    with mode(fresh=False):
        assert counts(limiter) == (1, 1, 0)
        limiter.release()
    assert counts(limiter) == (0, 2, 0)


async def test_a_tests_block_has_rejections_of_its_own() -> None:
    """And they are what they were when it has ended."""
    bulkhead = Bulkhead(1, queue_size=0)

    async def be_refused() -> None:
        async with bulkhead:
            with pytest.raises(BulkheadFullError):
                await bulkhead.acquire()

    await be_refused()
    with mode():
        assert bulkhead.statistics().rejections == 0
        await be_refused()
        await be_refused()
        assert bulkhead.statistics().rejections == 2
    assert bulkhead.statistics().rejections == 1


async def test_a_tests_block_lines_up_for_itself() -> None:
    """Whoever waits outside does not stand in the way inside, and is not let in from there."""
    semaphore = Semaphore(1)
    async with trio.open_nursery() as nursery:
        visitors = Visitors(nursery, semaphore.hold)
        await visitors.come("holder")
        await visitors.come("waiter")
        with mode():
            async with semaphore:
                assert counts(semaphore) == (1, 0, 0)
            await wait_all_tasks_blocked()
            assert visitors.entered == ["holder"]
        assert counts(semaphore) == (1, 0, 1)
        visitors.leave_all()


@every_entry
async def test_a_task_that_outlives_a_tests_block_gives_back_what_it_took_there(
    make_entry: Any,
) -> None:
    """Not what others hold outside."""
    limiter, enter = make_entry()
    async with trio.open_nursery() as nursery:
        visitors = Visitors(nursery, enter)
        with mode():
            await visitors.come("outlives")
        async with enter():
            assert counts(limiter) == (1, 1, 0)
            await visitors.leave("outlives")
            assert visitors.errors == {}
            assert counts(limiter) == (1, 1, 0)
    assert counts(limiter) == (0, 2, 0)


@each
async def test_a_call_that_outlives_a_tests_block_does_too(make: Any) -> None:
    """Its permit goes back to where it was taken."""
    limiter = make()
    async with trio.open_nursery() as nursery:
        event = trio.Event()
        with mode():
            nursery.start_soon(partial(limiter.call, event.wait))
            await wait_all_tasks_blocked()
            assert counts(limiter) == (1, 1, 0)
        async with limiter:
            event.set()
            await wait_all_tasks_blocked()
            assert counts(limiter) == (1, 1, 0)
    assert counts(limiter) == (0, 2, 0)


@every_entry
async def test_a_tests_block_inside_a_held_one_changes_nothing_about_its_end(
    make_entry: Any,
) -> None:
    """A fixture may open it later than what it is in, and end it later too."""
    limiter, enter = make_entry()
    block, held = mode(), enter()
    await held.__aenter__()
    block.__enter__()
    assert counts(limiter) == (0, 2, 0)
    await held.__aexit__(None, None, None)
    block.__exit__(None, None, None)
    assert counts(limiter) == (0, 2, 0)


# --- blocks -------------------------------------------------------------------------------------


@every_entry
async def test_blocks_may_be_entered_and_left_in_any_order(make_entry: Any) -> None:
    """Several in one task, of one object, and not the last one first."""
    limiter, enter = make_entry()
    first, second = enter(), enter()
    await first.__aenter__()
    await second.__aenter__()
    assert counts(limiter) == (2, 0, 0)
    await first.__aexit__(None, None, None)
    assert counts(limiter) == (1, 1, 0)
    async with enter():
        await second.__aexit__(None, None, None)
        assert counts(limiter) == (1, 1, 0)
    assert counts(limiter) == (0, 2, 0)


@every_entry
async def test_blocks_that_are_over_keep_nothing_alive(make_entry: Any) -> None:
    """What was in the frame of a block is freed with it."""
    _, enter = make_entry()

    class Local:
        pass

    async def hold_something() -> weakref.ref[Local]:
        local = Local()
        async with enter():
            await trio.lowlevel.checkpoint()
        return weakref.ref(local)

    ref = await hold_something()
    gc.collect()
    assert ref() is None
