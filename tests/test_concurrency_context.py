"""An operation is as good as a task of its own: context, threads, frames, interrupts."""

from __future__ import annotations

import math
import threading
from contextvars import ContextVar, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import sniffio
import trio

from tests.operations import foreign_nursery
from trio_resilience import map_with_limit, run_with_limit, stream_with_limit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from trio.testing import MockClock

var = ContextVar[str]("var", default="unset")

both = pytest.mark.parametrize("given", [True, False])
timed = pytest.mark.parametrize("timeout", [math.inf, 60.0])


@both
@timed
async def test_an_operation_sees_its_callers_variables(given: bool, timeout: float) -> None:
    """The context is that of the caller, not that of the task that opened the nursery."""
    seen = list[str]()

    async def look() -> None:
        seen.append(var.get())
        await trio.lowlevel.checkpoint()
        seen.append(var.get())

    token = var.set("owner")
    async with foreign_nursery() as nursery:
        var.set("caller")
        await run_with_limit(nursery if given else None, [look] * 2, timeout=timeout)
    var.reset(token)
    assert seen == ["caller"] * 4


@both
@timed
async def test_variables_never_leak(given: bool, timeout: float) -> None:
    """What an operation sets, in its first step or later, is seen by itself alone.

    Not by the next operation of the same worker, not by the caller, not by the source.
    """
    seen = list[str]()

    async def change(index: int, park: bool) -> str:
        seen.append(var.get())
        var.set(f"first {index}")
        if park:
            await trio.lowlevel.checkpoint()
            assert var.get() == f"first {index}"
            var.set(f"later {index}")
            await trio.lowlevel.checkpoint()
        return var.get()

    def source() -> Iterator[Callable[[], Awaitable[str]]]:
        for index in range(6):
            seen.append(var.get())
            yield partial(change, index, index % 2 == 0)
        seen.append(var.get())

    token = var.set("caller")
    async with trio.open_nursery() as nursery:
        results = await run_with_limit(
            nursery if given else None, source(), max_concurrency=1, timeout=timeout
        )
    assert var.get() == "caller"
    var.reset(token)
    assert seen == ["caller"] * 13
    assert results == ["later 0", "first 1", "later 2", "first 3", "later 4", "first 5"]


@timed
async def test_a_variable_may_be_reset_later(timeout: float) -> None:
    """All steps of an operation run in one and the same context, so that tokens stay valid."""

    async def scoped() -> str:
        token = var.set("inner")
        await trio.lowlevel.checkpoint()
        var.reset(token)
        return var.get()

    assert (
        await run_with_limit(None, [scoped] * 3, max_concurrency=2, timeout=timeout)
        == ["unset"] * 3
    )


@timed
async def test_a_task_started_by_an_operation_inherits_its_context(
    timeout: float,
) -> None:
    """From its first step on, as if the operation were a task."""
    seen = list[str]()

    async def child() -> None:
        seen.append(var.get())

    async def parent(value: str) -> None:
        var.set(value)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)

    await map_with_limit(None, parent, ["a", "b"], max_concurrency=1, timeout=timeout)
    assert seen == ["a", "a", "b", "b"]


async def test_trio_itself_sees_the_operations_context() -> None:
    """task.context is the operation's own after its first step, and copy_context() always."""

    async def look(value: str) -> list[str | None]:
        var.set(value)
        first = copy_context().get(var)
        await trio.lowlevel.checkpoint()
        return [first, copy_context().get(var), trio.lowlevel.current_task().context.get(var)]

    assert await map_with_limit(None, look, ["a", "b"]) == [["a"] * 3, ["b"] * 3]


@both
@timed
async def test_threads_see_the_operations_context(given: bool, timeout: float) -> None:
    """trio.to_thread in the first step and later, and trio.from_thread.run back into trio."""

    async def back(value: str) -> str:
        assert var.get() == f"{value} thread"
        await trio.lowlevel.checkpoint()
        assert var.get() == f"{value} thread"
        var.set("from thread")
        return sniffio.current_async_library()

    def in_thread(value: str) -> None:
        assert threading.current_thread() is not threading.main_thread()
        assert var.get() == value
        var.set(f"{value} thread")
        assert trio.from_thread.run(back, value) == "trio"
        assert trio.from_thread.run_sync(var.get) in {f"{value} thread", "from thread"}

    async def operation(value: str) -> str:
        var.set(value)
        await trio.to_thread.run_sync(in_thread, value)
        assert var.get() == value
        await trio.to_thread.run_sync(in_thread, value)
        return var.get()

    async with foreign_nursery() as nursery:
        results = await map_with_limit(
            nursery if given else None,
            operation,
            ["a", "b", "c"],
            max_concurrency=2,
            timeout=timeout,
        )
    assert results == ["a", "b", "c"]


async def test_a_thread_hears_that_its_operation_is_cancelled() -> None:
    """trio.from_thread.check_cancelled() inside an operation's thread works."""
    started, stopped = threading.Event(), threading.Event()

    def in_thread() -> None:
        started.set()
        try:
            while not stopped.wait(0.001):
                trio.from_thread.check_cancelled()
        finally:
            stopped.set()

    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:

            async def cancel() -> None:
                await trio.to_thread.run_sync(started.wait)
                scope.cancel()

            nursery.start_soon(cancel)
            await run_with_limit(nursery, [partial(trio.to_thread.run_sync, in_thread)])
        assert scope.cancelled_caught
    assert stopped.is_set()


@timed
async def test_libraries_that_ask_which_loop_runs_are_told(timeout: float) -> None:
    """It is trio that sniffio names, in the first step and later, in the source too."""

    async def ask() -> list[str]:
        first = sniffio.current_async_library()
        await trio.lowlevel.checkpoint()
        return [first, sniffio.current_async_library()]

    async def source() -> AsyncIterator[Callable[[], Awaitable[list[str]]]]:
        assert sniffio.current_async_library() == "trio"
        yield ask
        await trio.lowlevel.checkpoint()
        assert sniffio.current_async_library() == "trio"

    assert await run_with_limit(None, source(), timeout=timeout) == [["trio", "trio"]]


@pytest.mark.parametrize("asynchronous", [False, True])
@both
async def test_the_source_runs_in_the_callers_context(given: bool, asynchronous: bool) -> None:
    """It sees the caller's variables, its changes are the caller's, from the first pull on."""
    seen = list[str]()

    async def operation() -> None:
        var.set("operation")
        await trio.lowlevel.checkpoint()

    def source() -> Iterator[Callable[[], Awaitable[None]]]:
        for index in range(3):
            seen.append(var.get())
            var.set(f"source {index}")
            yield operation

    async def async_source() -> AsyncIterator[Callable[[], Awaitable[None]]]:
        for each in source():
            before = var.get()
            await trio.lowlevel.checkpoint()
            assert var.get() == before
            yield each

    token = var.set("caller")
    async with foreign_nursery() as nursery:
        ops: Any = async_source() if asynchronous else source()
        await run_with_limit(nursery if given else None, ops, max_concurrency=1)
    assert seen == ["caller", "source 0", "source 1"]
    assert var.get() == "source 2"
    var.reset(token)


async def test_streams_isolate_operations_too() -> None:
    """Neither the body of the block nor the next operation sees what an operation set."""

    async def change(value: str) -> str:
        before = var.get()
        var.set(value)
        await trio.lowlevel.checkpoint()
        return before

    token = var.set("caller")
    ops = [partial(change, value) for value in "abc"]
    async with stream_with_limit(None, ops, max_concurrency=1) as results:
        async for _, before in results:
            assert before == "caller"
            assert var.get() == "caller"
    var.reset(token)


def all_tasks(nursery: trio.Nursery) -> list[trio.lowlevel.Task]:
    """Every task below *nursery*."""
    found = list[trio.lowlevel.Task]()
    for task in nursery.child_tasks:
        found.append(task)
        for child in task.child_nurseries:
            found += all_tasks(child)
    return found


@both
@timed
async def test_introspection_sees_the_operations_frames(
    autojump_clock: MockClock, given: bool, timeout: float
) -> None:
    """Task.iter_await_frames() leads through the operation down to where it waits."""

    async def inner() -> None:
        await trio.sleep(5)

    async def fetch_page() -> None:
        await trio.lowlevel.checkpoint()
        await inner()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(run_with_limit, nursery if given else None, [fetch_page], timeout=timeout)
        )
        await trio.sleep(1)
        stacks = [
            [frame.f_code.co_name for frame, _ in task.iter_await_frames()]
            for task in all_tasks(nursery)
        ]
    (stack,) = [stack for stack in stacks if "fetch_page" in stack]
    assert stack[stack.index("fetch_page") :][:2] == ["fetch_page", "inner"]
    assert stack.count("fetch_page") == 1


@timed
async def test_an_operation_is_not_protected_from_ctrl_c(timeout: float) -> None:
    """An endless loop in an operation, in its first step or a later one, can be interrupted."""

    async def look() -> list[bool]:
        first = trio.lowlevel.currently_ki_protected()
        await trio.lowlevel.checkpoint()
        return [first, trio.lowlevel.currently_ki_protected()]

    assert await run_with_limit(None, [look] * 2, timeout=timeout) == [[False, False]] * 2


async def test_a_lock_held_by_an_operation_is_not_released_by_magic() -> None:
    """Operations share worker tasks: a trio.Lock that one leaves held belongs to the next one."""
    lock = trio.Lock()

    async def take() -> None:
        await lock.acquire()

    async def give() -> bool:
        lock.release()
        return lock.locked()

    ops: list[Callable[[], Awaitable[Any]]] = [take, give]
    assert await run_with_limit(None, ops, max_concurrency=1) == [None, False]


async def test_an_operation_is_always_in_one_task() -> None:
    """current_task() is the same in every step, so that locks and limiters work inside it."""
    lock, limiter = trio.Lock(), trio.CapacityLimiter(1)

    async def operation() -> bool:
        task = trio.lowlevel.current_task()
        async with lock, limiter:
            await trio.lowlevel.checkpoint()
        return trio.lowlevel.current_task() is task

    assert await run_with_limit(None, [operation] * 5, max_concurrency=3) == [True] * 5
