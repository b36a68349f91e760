"""What kind of task run_in starts: its nursery, context, deadline, frames and steps."""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING

import pytest
import sniffio
import trio
import trio.testing

from tests.operations import (
    Gauge,
    Steps,
    Stopwatch,
    foreign_nursery,
    returns,
)
from trio_resilience import (
    run_in,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

var = ContextVar[str]("var", default="unset")


both = pytest.mark.parametrize("given", [True, False])


async def test_the_function_is_a_child_of_the_nursery() -> None:
    """Its task's parent is the nursery that was given, or a new one of the caller's."""

    async def look() -> trio.lowlevel.Task:
        await trio.lowlevel.checkpoint()
        return trio.lowlevel.current_task()

    async with foreign_nursery() as nursery:
        child = await run_in(nursery, look)
        assert child.parent_nursery is nursery
    child = await run_in(None, look)
    assert child.parent_nursery is not None
    assert child.parent_nursery.parent_task is trio.lowlevel.current_task()


@both
async def test_the_call_is_a_checkpoint(given: bool) -> None:
    """Whatever the function does."""
    async with foreign_nursery() as nursery:
        with trio.testing.assert_checkpoints():
            await run_in(nursery if given else None, partial(returns, 1))


async def test_a_call_takes_few_steps() -> None:
    """Starting, running and coming back: no more trips through the scheduler than that."""
    steps = Steps()
    async with foreign_nursery() as nursery:
        await trio.testing.wait_all_tasks_blocked()
        trio.lowlevel.add_instrument(steps)
        for _ in range(100):
            await run_in(nursery, trio.lowlevel.checkpoint)
        trio.lowlevel.remove_instrument(steps)
    assert steps.count <= 3 * 100 + 10


@both
async def test_the_child_has_a_copy_of_the_callers_context(given: bool) -> None:
    """It sees the caller's variables, not the nursery's; what it sets stays with it."""

    async def change() -> list[str]:
        seen = [var.get()]
        var.set("child")
        await trio.lowlevel.checkpoint()
        return [*seen, var.get()]

    token = var.set("owner")
    async with foreign_nursery() as nursery:
        var.set("caller")
        assert await run_in(nursery if given else None, change) == ["caller", "child"]
        assert var.get() == "caller"
    var.reset(token)


@both
async def test_the_child_sees_the_callers_deadline(autojump_clock: MockClock, given: bool) -> None:
    """In a foreign nursery too; the nearer of the caller's and the nursery's."""

    async def look() -> float:
        await trio.lowlevel.checkpoint()
        return trio.current_effective_deadline()

    async with foreign_nursery() as nursery:
        with trio.fail_after(50) as scope:
            assert await run_in(nursery if given else None, look) == scope.deadline
            nursery.cancel_scope.deadline = trio.current_time() + 20
            assert await run_in(nursery, look) == nursery.cancel_scope.deadline


@both
async def test_the_callers_timeout_is_the_callers(autojump_clock: MockClock, given: bool) -> None:
    """When its deadline expires, its own scope catches: nothing else is raised."""
    async with foreign_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            await run_in(nursery if given else None, trio.sleep_forever)
        assert scope.cancelled_caught
        with trio.move_on_after(1) as scope, pytest.raises(trio.TooSlowError):
            with trio.fail_after(0.5):
                await run_in(nursery if given else None, trio.sleep_forever)
        assert not scope.cancelled_caught


async def test_the_child_is_an_ordinary_task() -> None:
    """Its frames are seen, sniffio says trio, and Ctrl-C can reach it."""

    async def fetch_page() -> tuple[str, bool]:
        await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        return sniffio.current_async_library(), trio.lowlevel.currently_ki_protected()

    results = list[tuple[str, bool]]()

    async def call() -> None:
        results.append(await run_in(nursery, fetch_page))

    async with foreign_nursery() as nursery, trio.open_nursery() as callers:
        callers.start_soon(call)
        for _ in range(4):
            await trio.lowlevel.checkpoint()
        stacks = [
            [frame.f_code.co_name for frame, _ in task.iter_await_frames()]
            for task in nursery.child_tasks
        ]
    assert ["fetch_page" in stack for stack in stacks] == [True]
    assert results == [("trio", False)]


async def test_calls_run_side_by_side(autojump_clock: MockClock) -> None:
    """run_in is no lock: many tasks may use one nursery."""
    gauge, watch = Gauge(), Stopwatch()
    async with foreign_nursery() as nursery, trio.open_nursery() as callers:
        for index in range(10):
            callers.start_soon(run_in, nursery, gauge.op(index))
    assert (gauge.peak, watch.seconds) == (10, 1)


async def test_a_call_may_be_nested_in_the_same_nursery(autojump_clock: MockClock) -> None:
    """The child may itself call run_in with the nursery it runs in; cancelling reaches both."""
    gauge = Gauge()

    async with foreign_nursery() as nursery:

        async def outer(seconds: float) -> int:
            return await run_in(nursery, gauge.run, 1, seconds)

        assert await run_in(nursery, outer, 1) == 1
        with trio.move_on_after(1) as scope:
            await run_in(nursery, outer, 5)
        assert scope.cancelled_caught
        assert not nursery.child_tasks
    assert gauge.cancelled == [1]
