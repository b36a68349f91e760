"""Semaphore: what belongs to a run ends with it, two at once are refused, and Ctrl-C harms none."""

from __future__ import annotations

import threading
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.operations import leaves
from tests.test_concurrency_interrupts import run
from tests.test_semaphore import Visitors, counts
from trio_resilience import Bulkhead, Semaphore
from trio_resilience.testing._scheduling import keep_for_ever

LIMITERS: dict[str, Callable[[], Any]] = {
    "semaphore": lambda: Semaphore(2),
    "bulkhead": lambda: Bulkhead(2, queue_size=9),
}
each = pytest.mark.parametrize("make", LIMITERS.values(), ids=LIMITERS)

ENTRIES: dict[str, Callable[[], tuple[Any, Callable[[], Any]]]] = {}


def entry(make: Callable[[], tuple[Any, Callable[[], Any]]]) -> Any:
    ENTRIES[make.__name__] = make
    return make


@entry
def block() -> tuple[Any, Callable[[], Any]]:
    semaphore = Semaphore(2)
    return semaphore, lambda: semaphore


@entry
def hold() -> tuple[Any, Callable[[], Any]]:
    semaphore = Semaphore(2)
    return semaphore, semaphore.hold


@entry
def bulkhead_block() -> tuple[Any, Callable[[], Any]]:
    bulkhead = Bulkhead(2)
    return bulkhead, lambda: bulkhead


@attrs.define(eq=False)
class Stacked:
    """Enter it in one frame, and leave it in another."""

    limiter: Any
    _stack: AsyncExitStack = attrs.field(factory=AsyncExitStack)

    async def __aenter__(self) -> None:
        await self._stack.enter_async_context(self.limiter)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)  # noqa: ASYNC102 - it never waits


@entry
def semaphore_on_a_stack() -> tuple[Any, Callable[[], Any]]:
    semaphore = Semaphore(2)
    return semaphore, partial(Stacked, semaphore)


@entry
def bulkhead_on_a_stack() -> tuple[Any, Callable[[], Any]]:
    bulkhead = Bulkhead(2)
    return bulkhead, partial(Stacked, bulkhead)


every_entry = pytest.mark.parametrize("make_entry", ENTRIES.values(), ids=ENTRIES)
# What an exit stack has entered cannot be told from what another has.
every_single_entry = pytest.mark.parametrize("make_entry", [block, hold, bulkhead_block])


# --- one run after the other --------------------------------------------------------------------


@each
def test_it_works_outside_a_run(make: Any) -> None:
    """At module level: it is made, shown, and read; to take a permit there is no run."""
    limiter = make()
    assert counts(limiter) == (0, 2, 0)
    assert repr(limiter)
    assert limiter.is_idle
    for fn in (limiter.acquire_nowait, limiter.release):
        with pytest.raises(RuntimeError):
            fn()
    assert counts(limiter) == (0, 2, 0)


@each
def test_permits_of_a_run_that_ended_are_back(make: Any) -> None:
    """Also of one that never released them; outside of a run nothing is held."""
    limiter = make()

    async def leave_taken() -> tuple[int, int, int]:
        before = counts(limiter)
        await limiter.acquire()
        await limiter.acquire()
        return before

    for _ in range(3):
        assert run(leave_taken) == (0, 2, 0)
        assert counts(limiter) == (0, 2, 0)
        assert limiter.is_idle
        assert repr(limiter)


@each
@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt])
def test_a_run_that_dies_takes_its_line_along(make: Any, stop: type[BaseException]) -> None:
    """With two inside and three waiting; the next finds all permits and wakes no dead task."""
    limiter = make()

    async def dies() -> None:
        async with trio.open_nursery() as nursery:
            limiter.acquire_nowait()
            visitors = Visitors(nursery, lambda: limiter)
            for name in "abcd":
                await visitors.come(name)
            assert counts(limiter) == (2, 0, 3)
            raise stop

    async def lives() -> list[str]:
        assert counts(limiter) == (0, 2, 0)
        async with trio.open_nursery() as nursery:
            visitors = Visitors(nursery, lambda: limiter)
            for name in "abc":
                await visitors.come(name)
            await visitors.leave("a")
            await visitors.leave("b", "c")
        return visitors.entered

    with pytest.raises(BaseException) as caught:  # noqa: PT011 - a group, or what is in it
        run(dies)
    assert [type(leaf) for leaf in leaves(caught.value)] == [stop]
    assert run(lives) == [*"abc"]
    assert counts(limiter) == (0, 2, 0)


def test_the_number_of_permits_survives() -> None:
    """It is configuration: set before a run, in one, or between two."""
    semaphore = Semaphore(2)
    semaphore.permits = 5

    async def resize(expected: int, permits: int) -> None:
        await semaphore.acquire()
        assert counts(semaphore) == (1, expected - 1, 0)
        semaphore.permits = permits
        assert counts(semaphore) == (1, permits - 1, 0)

    run(partial(resize, 5, 3))
    run(partial(resize, 3, 4))
    assert semaphore.permits == 4
    semaphore.permits = 6
    assert counts(semaphore) == (0, 6, 0)
    run(partial(resize, 6, 1))


@types.coroutine
def hang() -> Generator[object, object, None]:
    """Wait for what never comes; `drive_until_it_hangs` stops here."""
    yield hang


@types.coroutine
def drive_until_it_hangs(coro: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
    """Run *coro* in this task, and leave it alone for ever as soon as it hangs."""
    trap = coro.send(None)
    while trap is not hang:
        trap = coro.send((yield trap))


async def hang_inside(enter: Callable[[], Any]) -> None:
    async with enter():
        await hang()


@every_single_entry
@pytest.mark.parametrize("in_a_run", [True, False])
def test_an_exit_that_belongs_to_a_dead_run_is_ignored(make_entry: Any, in_a_run: bool) -> None:
    """A block that its run left hanging ends when it is collected, in the next run or in none."""
    limiter, enter = make_entry()

    async def drive(coro: Coroutine[Any, Any, None]) -> None:
        await drive_until_it_hangs(coro)
        assert counts(limiter) == (1, 1, 0)

    async def next_run() -> None:
        async with enter():
            assert counts(limiter) == (1, 1, 0)
            hanging.close()
            assert counts(limiter) == (1, 1, 0)
        assert counts(limiter) == (0, 2, 0)

    hanging = hang_inside(enter)
    run(partial(drive, hanging))
    if in_a_run:
        run(next_run)
    else:
        hanging.close()
    assert counts(limiter) == (0, 2, 0)


class DoomedClock(trio.abc.Clock):
    """A clock that can make trio's own loop crash: then nothing of the run is cleaned up."""

    is_doomed = False

    def start_clock(self) -> None:
        """Nothing to start."""

    def current_time(self) -> float:
        if self.is_doomed:
            raise OSError
        return 0.0

    def deadline_to_sleep_time(self, deadline: float) -> float:  # noqa: ARG002 - it never waits
        return 0.0


def crash(main: Callable[[], Awaitable[None]]) -> None:
    """Run *main* in a child task until it blocks, then let trio crash."""
    clock = DoomedClock()

    async def start() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(main)
            for _ in range(5):
                await trio.lowlevel.checkpoint()
            # Collected, the wreckage would fail in strange ways in the middle of other tests.
            keep_for_ever(tasks_below(trio.lowlevel.current_root_task()))
            clock.is_doomed = True
            await trio.sleep_forever()

    with pytest.raises(trio.TrioInternalError):
        trio.run(start, clock=clock)


def tasks_below(task: trio.lowlevel.Task | None) -> list[trio.lowlevel.Task]:
    """The task, and all tasks below it."""
    assert task is not None
    children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return [task, *[each for child in children for each in tasks_below(child)]]


@each
def test_who_waited_in_a_run_that_crashed_is_never_woken(make: Any) -> None:
    """Its task means nothing to the next run."""
    limiter = make()

    async def wait_for_the_third() -> None:
        for _ in range(3):
            await limiter.acquire()

    async def next_run() -> None:
        assert counts(limiter) == (0, 2, 0)
        for _ in range(2):
            await limiter.acquire()
        limiter.release()
        limiter.release()
        await wait_all_tasks_blocked()
        assert counts(limiter) == (0, 2, 0)

    crash(wait_for_the_third)
    run(next_run)
    assert counts(limiter) == (0, 2, 0)


# --- two runs at once, and threads --------------------------------------------------------------


@each
@pytest.mark.parametrize("use", ["acquire", "acquire_nowait", "release", "call", "async with"])
def test_two_live_runs_at_once_are_refused(make: Any, use: str) -> None:
    """The second is told so; the first goes on undisturbed, and the second may come later."""
    limiter, refusals = make(), list[str]()

    async def use_it() -> None:
        if use == "call":
            await limiter.call(trio.lowlevel.checkpoint)
        elif use == "async with":
            async with limiter:
                pass
        elif use == "acquire":
            await limiter.acquire()
        else:
            getattr(limiter, use)()

    def second() -> None:
        with pytest.raises(RuntimeError, match="two runs of trio at once") as caught:
            run(use_it)
        refusals.append(str(caught.value))

    async def first() -> None:
        async with limiter:
            thread = threading.Thread(target=second)
            thread.start()
            await trio.to_thread.run_sync(thread.join)
            assert counts(limiter) == (1, 1, 0)
        assert counts(limiter) == (0, 2, 0)

    trio.run(first)
    assert len(refusals) == 1
    if use != "release":
        run(use_it)


@pytest.mark.parametrize("in_a_run", [True, False])
def test_a_thread_cannot_resize_what_a_run_uses(in_a_run: bool) -> None:
    """It would have to wake tasks of another thread's loop: it is refused and changes nothing."""
    semaphore, errors = Semaphore(1), list[BaseException]()

    async def resize() -> None:
        semaphore.permits = 5

    def elsewhere() -> None:
        try:
            if in_a_run:
                run(resize)
            else:
                semaphore.permits = 5
        except RuntimeError as error:
            errors.append(error)

    async def main() -> None:
        async with trio.open_nursery() as nursery, semaphore:
            visitors = Visitors(nursery, semaphore.hold)
            await visitors.come("waiter")
            thread = threading.Thread(target=elsewhere)
            thread.start()
            await trio.to_thread.run_sync(thread.join)
            assert (semaphore.permits, counts(semaphore)) == (1, (1, 0, 1))
            visitors.leave_all()

    trio.run(main)
    assert len(errors) == 1


@each
def test_a_worker_thread_is_told_that_it_is_in_no_run(make: Any) -> None:
    """A clear error, and no counter has moved; by way of the run it may."""
    limiter = make()

    def work() -> None:
        for fn in (limiter.acquire_nowait, limiter.release):
            with pytest.raises(RuntimeError):
                fn()
        assert counts(limiter) == (1, 1, 0)
        trio.from_thread.run(limiter.acquire)
        trio.from_thread.run_sync(limiter.release)

    async def main() -> None:
        async with limiter:
            await trio.to_thread.run_sync(work)
            assert counts(limiter) == (1, 1, 0)

    trio.run(main)
