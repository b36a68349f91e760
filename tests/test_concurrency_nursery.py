"""Whose tasks these are: the given nursery, its cancellation, and the caller's."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import (
    Gauge,
    Source,
    ancestors,
    closed_nursery,
    fails,
    foreign_nursery,
)
from trio_resilience import (
    OperationsCancelledError,
    OperationsFailedError,
    map_with_limit,
    run_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


async def test_one_task_in_the_nursery_stands_for_the_whole_call(
    autojump_clock: MockClock,
) -> None:
    """The caller's nursery gets one child per call, and every operation runs beneath it."""
    seen = list[trio.lowlevel.Task]()

    async def note() -> None:
        assert nursery in ancestors(trio.lowlevel.current_task())
        assert trio.lowlevel.current_task() not in nursery.child_tasks
        seen.extend(nursery.child_tasks)
        await trio.sleep(1)

    async with foreign_nursery() as nursery:
        await run_with_limit(nursery, [note] * 20, max_concurrency=4)
    assert len(seen) == 20
    assert len(set(seen)) == 1


async def test_without_a_nursery_operations_run_beneath_the_caller(
    autojump_clock: MockClock,
) -> None:
    """None opens a nursery for the call, in the calling task."""
    caller = trio.lowlevel.current_task()

    async def above() -> bool:
        return caller in [each.parent_task for each in ancestors(trio.lowlevel.current_task())]

    assert await run_with_limit(None, [above] * 3) == [True] * 3
    assert await map_with_limit(None, lambda _: above(), range(3)) == [True] * 3


async def test_a_child_of_the_nursery_may_be_the_caller(autojump_clock: MockClock) -> None:
    """The usual shape inside a program: the task that calls lives in the same nursery."""
    results = list[list[int]]()

    async def child() -> None:
        results.append(await run_with_limit(nursery, Gauge().ops(1, 1)))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(child)
        nursery.start_soon(child)
    assert results == [[0, 1], [0, 1]]


@pytest.mark.parametrize("on_error", ["cancel", "continue", "collect"])
async def test_a_failing_operation_does_not_crash_the_nursery(
    autojump_clock: MockClock, on_error: Any
) -> None:
    """Failures surface where the caller awaits; other children of the nursery go on."""
    sibling = Gauge()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sibling.run, 0, 10)
        try:
            await run_with_limit(nursery, [partial(fails, OSError())], on_error=on_error)
        except OperationsFailedError:
            assert on_error != "collect"
        assert not nursery.cancel_scope.cancel_called
    assert sibling.finished == [0]


async def test_a_cancelled_nursery_is_reported_to_a_caller_outside_of_it(
    autojump_clock: MockClock,
) -> None:
    """The caller, not cancelled itself, gets OperationsCancelledError and never a partial list."""
    gauge, source = Gauge(), Source()
    async with foreign_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1.5
        with pytest.raises(OperationsCancelledError) as caught:
            await run_with_limit(nursery, source.of(gauge.ops(*[1] * 6)), max_concurrency=2)
    assert caught.value.failures == ()
    assert (sorted(gauge.finished), sorted(gauge.cancelled)) == ([0, 1], [2, 3])
    assert source.closed


async def test_a_nursery_cancelled_beforehand_runs_nothing() -> None:
    """The caller gets OperationsCancelledError, and no operation was called."""
    called, source = list[int](), Source()

    async def operation() -> None:
        called.append(1)

    async with foreign_nursery() as nursery:
        nursery.cancel_scope.cancel()
        with pytest.raises(OperationsCancelledError):
            await run_with_limit(nursery, source.of([operation] * 3))
    assert called == []


async def test_a_caller_inside_the_cancelled_nursery_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    """Where the nursery's cancellation is the caller's own, Cancelled comes out."""
    gauge, raised = Gauge(), list[BaseException]()
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1
        try:
            await run_with_limit(nursery, gauge.ops(5, 5))
        except BaseException as error:
            raised.append(error)
            raise
    assert [type(error) for error in raised] == [trio.Cancelled]
    assert nursery.cancel_scope.cancelled_caught
    assert sorted(gauge.cancelled) == [0, 1]


async def test_failures_of_a_cancelled_nursery_are_kept(autojump_clock: MockClock) -> None:
    """What failed before the nursery was cancelled, or because of it, is in `.failures`."""
    early, late = OSError("early"), OSError("late")

    async def clumsy() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise late

    async with foreign_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1
        with pytest.raises(OperationsCancelledError) as caught:
            ops: list[Callable[[], Awaitable[object]]] = [partial(fails, early), clumsy]
            await run_with_limit(nursery, ops, on_error="continue")
    assert set(caught.value.failures) == {early, late}


async def test_a_nursery_that_crashes_elsewhere_is_a_cancelled_nursery(
    autojump_clock: MockClock,
) -> None:
    """When a sibling fails, the caller hears that its operations were stopped.

    The nursery's owner gets the sibling's error alone.
    """
    crash = OSError("sibling")
    heard = list[str]()

    async def sibling() -> None:
        await trio.sleep(1)
        raise crash

    async def owner(task_status: trio.TaskStatus[trio.Nursery]) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sibling)
                task_status.started(nursery)
                await trio.sleep_forever()
        assert caught.value.exceptions == (crash,)
        heard.append("owner")

    async with trio.open_nursery() as owners:
        nursery = await owners.start(owner)
        with pytest.raises(OperationsCancelledError):
            await run_with_limit(nursery, Gauge().ops(5, 5))
        heard.append("caller")
    assert sorted(heard) == ["caller", "owner"]


async def test_a_shielded_caller_does_not_hang_on_a_cancelled_nursery(
    autojump_clock: MockClock,
) -> None:
    """Inside a shield the caller is not cancelled, so it is told that the operations were."""
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True), pytest.raises(OperationsCancelledError):
            await run_with_limit(nursery, Gauge().ops(1))


async def test_a_caller_cancelled_together_with_the_nursery_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    """At the same instant the caller's own cancellation wins."""
    async with foreign_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1
        with trio.move_on_after(1) as scope:
            await run_with_limit(nursery, Gauge().ops(5))
    assert scope.cancelled_caught


async def test_a_nursery_cancelled_when_all_is_done_changes_nothing(
    autojump_clock: MockClock,
) -> None:
    """There are all results, or the caller is told; a list with holes never comes out."""
    async with foreign_nursery() as nursery:

        async def last() -> int:
            await trio.sleep(2)
            nursery.cancel_scope.cancel()
            return 1

        with suppress(OperationsCancelledError):
            assert await run_with_limit(nursery, [Gauge().op(0, 1), last]) == [0, 1]


async def test_a_closed_nursery_is_refused_before_anything_runs() -> None:
    """It is a RuntimeError, and leaves no coroutine behind that was never awaited."""
    gauge, source = Gauge(), Source()
    nursery = await closed_nursery()
    with pytest.raises(RuntimeError, match="nursery"):
        await run_with_limit(nursery, source.of(gauge.ops(0)))
    with pytest.raises(RuntimeError, match="nursery"):
        await map_with_limit(nursery, gauge.run, [0])
    assert gauge.started == []
    assert source.pulled == 0


async def test_an_endless_job_ends_with_its_nursery(autojump_clock: MockClock) -> None:
    """The nursery governs the job: cancelling it is enough to stop it."""
    gauge = Gauge()
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 3.5
        await run_with_limit(nursery, (gauge.op(i) for i in count()), max_concurrency=1)
    assert gauge.finished == [0, 1, 2]
    assert nursery.cancel_scope.cancelled_caught
