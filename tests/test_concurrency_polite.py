"""Checkpoints: every call is one, no operation freezes the program, none costs a second trip."""

from __future__ import annotations

import math
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.operations import Source, Steps, returns
from trio_resilience import run_with_limit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Operation = Callable[[], Awaitable[int]]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("empty", ["list", "generator", "async generator"])
async def test_no_operations_give_no_results_after_a_checkpoint(given: bool, empty: str) -> None:
    """An empty source gives an empty list, and is a checkpoint all the same."""
    none: list[Operation] = []
    sources: dict[str, Any] = {
        "list": none,
        "generator": Source().of(none),
        "async generator": Source().async_of(none),
    }
    async with trio.open_nursery() as nursery:
        with trio.testing.assert_checkpoints():
            assert await run_with_limit(nursery if given else None, sources[empty]) == []


@pytest.mark.parametrize("given", [True, False])
async def test_a_cancelled_caller_is_told_so_even_without_operations(given: bool) -> None:
    """In a cancelled scope the call raises Cancelled, also for an empty list."""
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.cancel()
            await run_with_limit(nursery if given else None, list[Any]())
    assert scope.cancelled_caught


@pytest.mark.parametrize("given", [True, False])
async def test_a_call_is_a_checkpoint_when_its_operations_are_not(given: bool) -> None:
    """Operations that return at once do not make the call one without a checkpoint."""
    async with trio.open_nursery() as nursery:
        with trio.testing.assert_checkpoints():
            await run_with_limit(nursery if given else None, [partial(returns, 1)])


@pytest.mark.parametrize("timeout", [math.inf, 5.0])
async def test_operations_that_never_wait_do_not_freeze_the_program(timeout: float) -> None:
    """Between two operations that never park, other tasks get their turn."""
    turns = 0

    async def bystander() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bystander)
        await run_with_limit(
            None, [partial(returns, i) for i in range(100)], max_concurrency=1, timeout=timeout
        )
        nursery.cancel_scope.cancel()
    assert turns >= 100


async def test_operations_that_never_wait_can_be_cancelled() -> None:
    """An endless source of operations that never park still notices its caller's cancellation."""
    with trio.CancelScope() as scope:

        async def cancel_soon() -> None:
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_soon)
            await run_with_limit(nursery, (partial(returns, i) for i in count()))
    assert scope.cancelled_caught


async def test_operations_that_fail_without_waiting_do_not_freeze_the_program() -> None:
    """A failure without a checkpoint is followed by one, or collecting them would spin."""
    turns = 0

    async def bystander() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async def refuse() -> int:
        raise OSError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bystander)
        await run_with_limit(None, [refuse] * 100, max_concurrency=1, on_error="collect")
        nursery.cancel_scope.cancel()
    assert turns >= 100


@pytest.mark.parametrize("timeout", [math.inf, 5.0])
@pytest.mark.parametrize("operation", [trio.lowlevel.checkpoint, partial(returns, None)])
async def test_no_operation_costs_a_second_trip_through_the_scheduler(
    operation: Callable[[], Awaitable[None]], timeout: float
) -> None:
    """Two hundred operations of one checkpoint, or of none, take two hundred steps and a few."""
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    await run_with_limit(None, [operation] * 200, max_concurrency=5, timeout=timeout)
    trio.lowlevel.remove_instrument(steps)
    assert 200 <= steps.count <= 200 + 20


async def test_few_tasks_do_all_the_work() -> None:
    """There are never more tasks than max_concurrency and a supervisor, however many operations."""
    tasks = set[int]()

    async def note_tasks() -> None:
        tasks.add(sum(len(each.child_tasks) for each in supervisor_nurseries(nursery)))
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        await run_with_limit(nursery, [note_tasks] * 50, max_concurrency=3)
    assert 1 <= max(tasks) <= 4


def supervisor_nurseries(nursery: trio.Nursery) -> list[trio.Nursery]:
    """The nursery, and all nurseries below it."""
    found = [nursery]
    for task in nursery.child_tasks:
        for child in task.child_nurseries:
            found += supervisor_nurseries(child)
    return found
