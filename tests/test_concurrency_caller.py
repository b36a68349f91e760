"""A cancelled caller takes its operations with it, waits for them, and loses no error."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import (
    Gauge,
    Source,
    Stopwatch,
    foreign_nursery,
    leaves,
    reachable,
)
from trio_resilience import (
    OperationsCancelledError,
    run_in,
    run_with_limit,
    stream_map_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


@pytest.mark.parametrize("given", [True, False])
async def test_cancelling_the_caller_cancels_its_operations(
    autojump_clock: MockClock, given: bool
) -> None:
    """They are cancelled and joined although their nursery lies outside the cancelled scope."""
    gauge, watch = Gauge(), Stopwatch()
    async with foreign_nursery() as nursery:
        with trio.move_on_after(1.5) as scope:
            await run_with_limit(
                nursery if given else None, gauge.ops(1, 1, 1, 1), max_concurrency=2
            )
        assert scope.cancelled_caught
        assert not nursery.child_tasks
        assert not nursery.cancel_scope.cancel_called
    assert (sorted(gauge.cancelled), gauge.running, watch.seconds) == ([2, 3], 0, 1.5)


async def test_cancelling_the_caller_inside_its_own_nursery(autojump_clock: MockClock) -> None:
    """With the scope inside the nursery's block the nursery survives and can be used again."""
    gauge = Gauge()
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.5) as scope:
            await run_with_limit(nursery, gauge.ops(1, 1))
        assert scope.cancelled_caught
        assert await run_with_limit(nursery, gauge.ops(1, 1)) == [0, 1]


@pytest.mark.parametrize("given", [True, False])
async def test_a_cancelled_caller_waits_for_the_cleanup_of_its_operations(
    autojump_clock: MockClock, given: bool
) -> None:
    """A shielded cleanup of three seconds is over when the caller comes out."""
    watch, cleaned = Stopwatch(), list[float]()

    async def careful() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3)
            cleaned.append(watch.seconds)

    async with foreign_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            await run_with_limit(nursery if given else None, [careful] * 2)
        assert scope.cancelled_caught
        assert (cleaned, watch.seconds) == ([4, 4], 4)


@pytest.mark.parametrize("given", [True, False])
async def test_a_caller_that_is_cancelled_beforehand_runs_nothing(given: bool) -> None:
    """No operation is called, or at least none gets past its first checkpoint."""
    gauge = Gauge()
    async with foreign_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.cancel()
            await run_with_limit(nursery if given else None, gauge.ops(1, 1))
        assert not nursery.child_tasks
    assert scope.cancelled_caught
    assert gauge.finished == []


async def test_no_operation_is_called_after_the_cancellation(autojump_clock: MockClock) -> None:
    """Cancelled when operation 3 starts, the job calls no further operation function."""
    started, source = list[int](), Source()
    with trio.CancelScope() as scope:

        async def operation(index: int) -> None:
            started.append(index)
            if index == 3:
                scope.cancel()
            await trio.sleep(1)

        ops = source.of(partial(operation, index) for index in range(100))
        await run_with_limit(None, ops, max_concurrency=2)
    assert scope.cancelled_caught
    assert started == [0, 1, 2, 3]
    assert source.closed


@pytest.mark.parametrize("given", [True, False])
async def test_errors_during_a_cancellation_do_not_hide_it(
    autojump_clock: MockClock, given: bool
) -> None:
    """An operation whose cleanup fails does not keep the caller's scope from seeing Cancelled."""

    async def clumsy() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError

    async with foreign_nursery() as nursery:
        scope = trio.move_on_after(1)
        try:
            with scope:
                await run_with_limit(nursery if given else None, [clumsy])
        except* OSError:
            pass
        assert scope.cancelled_caught
        assert not nursery.cancel_scope.cancel_called


@pytest.mark.parametrize("given", [True, False])
async def test_operations_see_the_callers_deadline(autojump_clock: MockClock, given: bool) -> None:
    """In a foreign nursery too, the effective deadline is the caller's, the nursery's or both."""

    async def deadline() -> tuple[float, float]:
        first = trio.current_effective_deadline()
        await trio.lowlevel.checkpoint()
        return first, trio.current_effective_deadline()

    async with foreign_nursery() as nursery:
        with trio.fail_after(50) as scope:
            seen = await run_with_limit(nursery if given else None, [deadline] * 3)
        assert seen == [(scope.deadline, scope.deadline)] * 3
        if given:
            nursery.cancel_scope.deadline = trio.current_time() + 20
            with trio.fail_after(50):
                seen = await run_with_limit(nursery, [deadline])
            assert seen == [(nursery.cancel_scope.deadline,) * 2]


async def test_a_deadline_that_is_put_off_during_the_call_gives_no_partial_list(
    autojump_clock: MockClock,
) -> None:
    """The job starts with the caller's deadline; moved meanwhile, there are all results or none."""
    gauge = Gauge()
    async with foreign_nursery() as nursery:
        with trio.fail_after(1) as scope:
            nursery.start_soon(_put_off, scope, 0.5, 10)
            with suppress(OperationsCancelledError):
                assert await run_with_limit(nursery, gauge.ops(0.5, 2)) == [0, 1]
        assert not nursery.child_tasks
    assert not scope.cancelled_caught


async def _put_off(scope: trio.CancelScope, after: float, seconds: float) -> None:
    await trio.sleep(after)
    scope.deadline += seconds


async def _fail_when_cancelled(error: BaseException) -> None:
    try:
        await trio.sleep_forever()
    finally:
        raise error


async def by_run(nursery: trio.Nursery | None, error: BaseException) -> None:
    ops: list[Callable[[], Awaitable[None]]] = [
        partial(_fail_when_cancelled, error),
        trio.sleep_forever,
    ]
    await run_with_limit(nursery, ops)


async def by_run_in(nursery: trio.Nursery | None, error: BaseException) -> None:
    await run_in(nursery, _fail_when_cancelled, error)


async def by_stream(nursery: trio.Nursery | None, error: BaseException) -> None:
    async with stream_map_with_limit(nursery, _fail_when_cancelled, [error]) as results:
        async for _ in results:
            pass


async def by_a_busy_stream(nursery: trio.Nursery | None, error: BaseException) -> None:
    async with stream_map_with_limit(nursery, _fail_when_cancelled, [error]):
        await trio.sleep_forever()


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("call", [by_run, by_run_in, by_stream, by_a_busy_stream])
@pytest.mark.parametrize("error_type", [OSError, KeyboardInterrupt, SystemExit])
async def test_no_error_is_lost_in_a_cancellation(
    autojump_clock: MockClock, given: bool, call: Callable[..., Awaitable[None]], error_type: Any
) -> None:
    """What an operation raises while it is cancelled comes out, or is the context of what does.

    What is no Exception is never hidden as a context: it is raised.
    """
    raised, error = list[BaseException](), error_type()

    async def caller() -> None:
        try:
            await call(nursery if given else None, error)
        except BaseException as each:
            raised.append(each)
            raise

    async with foreign_nursery() as nursery:
        with suppress(OSError, SystemExit, KeyboardInterrupt, BaseExceptionGroup):
            with trio.move_on_after(1):
                await caller()
        assert not nursery.cancel_scope.cancel_called
        assert not nursery.child_tasks
    (result,) = raised
    assert any(each is error for each in reachable(result))
    if not isinstance(error, Exception):
        assert any(each is error for each in leaves(result))


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("call", [by_run, by_stream])
async def test_a_cancelled_caller_gets_cancelled_itself(
    autojump_clock: MockClock, given: bool, call: Callable[..., Awaitable[None]]
) -> None:
    """Not a group of it, wherever the operations ran."""
    async with foreign_nursery() as nursery:
        with trio.move_on_after(1) as scope, pytest.raises(trio.Cancelled):
            await call(nursery if given else None, OSError())
        assert scope.cancel_called
