"""Whose deadline it was: what an operation sees, and what happens at the very instant."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio
import trio.testing

from tests.operations import Stopwatch, foreign_nursery, returns
from trio_resilience import (
    OperationsCancelledError,
    OperationsFailedError,
    OperationTimeoutError,
    map_with_limit,
    run_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from trio.testing import MockClock


def collected_types(results: list[outcome.Value[Any] | outcome.Error]) -> list[type]:
    """The type of each error, or of the value."""
    return [type(each.error if isinstance(each, outcome.Error) else each.value) for each in results]


@pytest.mark.parametrize(
    "callers, own, expected", [(50, 5, 5), (5, 50, 5), (math.inf, 5, 5), (5, math.inf, 5)]
)
@pytest.mark.parametrize("given", [True, False])
async def test_an_operation_sees_the_nearer_deadline(
    autojump_clock: MockClock, given: bool, callers: float, own: float, expected: float
) -> None:
    """current_effective_deadline() is the caller's or the operation's own, from its first step."""
    seen = list[tuple[float, float]]()

    async def look() -> None:
        first = trio.current_effective_deadline() - trio.current_time()
        await trio.lowlevel.checkpoint()
        seen.append((first, trio.current_effective_deadline() - trio.current_time()))

    async with foreign_nursery() as nursery:
        with trio.move_on_after(callers):
            await run_with_limit(
                nursery if given else None, [look] * 3, timeout=own, max_concurrency=1
            )
    assert seen == [pytest.approx((expected, expected))] * 3


async def test_the_deadline_counts_from_the_start_of_each_operation(
    autojump_clock: MockClock,
) -> None:
    """The third of three one-second operations sees the full timeout ahead of it."""
    seen = list[float]()

    async def look() -> None:
        seen.append(trio.current_effective_deadline() - trio.current_time())
        await trio.sleep(1)

    await run_with_limit(None, [look] * 3, timeout=5, max_concurrency=1)
    assert seen == [pytest.approx(5)] * 3


async def test_a_timeout_never_outlives_its_operation(autojump_clock: MockClock) -> None:
    """Between operations no old deadline is pending: a source that waits longer is not cut off."""

    async def source() -> AsyncIterator[Callable[[], Awaitable[None]]]:
        for index in range(3):
            await trio.sleep(10)
            yield partial(trio.sleep, index / 10)

    assert await run_with_limit(None, source(), timeout=1, max_concurrency=1) == [None] * 3


@pytest.mark.parametrize("given", [True, False])
async def test_an_outer_timeout_is_not_ours(autojump_clock: MockClock, given: bool) -> None:
    """The caller's move_on_after(1) expires before our five seconds: it is the one that catches."""
    async with foreign_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            await run_with_limit(nursery if given else None, [trio.sleep_forever], timeout=5)
    assert scope.cancelled_caught


@pytest.mark.parametrize("given", [True, False])
async def test_our_timeout_is_not_the_outer_one(autojump_clock: MockClock, given: bool) -> None:
    """Ours expires first: the caller's scope caught nothing."""
    async with foreign_nursery() as nursery:
        with trio.move_on_after(5) as scope, pytest.raises(OperationsFailedError):
            await run_with_limit(nursery if given else None, [trio.sleep_forever], timeout=1)
    assert not scope.cancelled_caught


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("on_error", ["cancel", "continue", "collect"])
async def test_at_the_same_instant_the_outer_timeout_wins(
    autojump_clock: MockClock, given: bool, on_error: Any
) -> None:
    """Both expire at t = 1: no OperationTimeoutError, no on_done, the caller is cancelled."""
    calls = list[int]()
    async with foreign_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            await run_with_limit(
                nursery if given else None,
                [trio.sleep_forever] * 3,
                timeout=1,
                on_error=on_error,
                on_done=lambda index, _: calls.append(index),
            )
    assert scope.cancelled_caught
    assert calls == []


async def test_at_the_same_instant_the_nurserys_deadline_wins(autojump_clock: MockClock) -> None:
    """The nursery's cancellation is not taken for a timeout of ours."""
    async with foreign_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1
        with pytest.raises(OperationsCancelledError) as caught:
            await run_with_limit(nursery, [trio.sleep_forever], timeout=1)
    assert caught.value.failures == ()


async def test_a_result_at_the_very_deadline_is_kept(autojump_clock: MockClock) -> None:
    """Woken in time, though the time was up before its next step, an operation has succeeded.

    The next operation of the same worker has its own full time.
    """
    event = trio.Event()

    async def woken() -> str:
        await event.wait()
        return "kept"

    async def after() -> float:
        await trio.sleep(0.9)
        return trio.current_time()

    async with trio.open_nursery() as nursery:

        async def wake_and_jump() -> None:
            await trio.testing.wait_all_tasks_blocked()
            event.set()
            autojump_clock.jump(2)

        nursery.start_soon(wake_and_jump)
        watch = Stopwatch()
        ops: list[Callable[[], Awaitable[object]]] = [woken, after]
        results = await run_with_limit(nursery, ops, timeout=1, max_concurrency=1)
    assert results == ["kept", watch.started + 2.9]


@pytest.mark.parametrize("park", [True, False])
async def test_a_result_that_ignored_the_deadline_is_kept(
    autojump_clock: MockClock, park: bool
) -> None:
    """An operation that passes its deadline without a checkpoint has succeeded all the same."""

    async def busy() -> str:
        if park:
            await trio.lowlevel.checkpoint()
        autojump_clock.jump(5)
        return "kept"

    ops: list[Callable[[], Awaitable[str]]] = [busy, partial(returns, "next"), busy]
    results = await run_with_limit(None, ops, timeout=1, max_concurrency=1)
    assert results == ["kept", "next", "kept"]


async def test_an_error_that_ignored_the_deadline_is_kept(autojump_clock: MockClock) -> None:
    """Its own error is what it failed with, not our timeout."""
    error = OSError()

    async def busy() -> None:
        autojump_clock.jump(5)
        raise error

    (result,) = await run_with_limit(None, [busy], timeout=1, on_error="collect")
    assert isinstance(result, outcome.Error)
    assert result.error is error


async def test_a_shielded_operation_may_finish_after_its_deadline(
    autojump_clock: MockClock,
) -> None:
    """A shield holds the timeout off; it strikes at the next checkpoint, if there is one."""

    async def shielded(later: float) -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)
        if later:
            await trio.sleep(later)
        return "kept"

    watch = Stopwatch()
    results = await map_with_limit(
        None, shielded, [0, 1], timeout=1, max_concurrency=1, on_error="collect"
    )
    assert collected_types(results) == [str, OperationTimeoutError]
    assert watch.seconds == 6
