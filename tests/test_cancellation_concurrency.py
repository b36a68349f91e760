"""Bounded concurrency, cancelled at every instant: nothing leaks, nobody else suffers or hangs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._pairs import in_pairs
from tests._scenarios import World, cancel
from trio_resilience import (
    Constant,
    OperationsFailedError,
    OperationTimeoutError,
    Retry,
    Timeout,
    map_with_limit,
    run_in,
    run_with_limit,
    subscribe,
)
from trio_resilience.testing import pause

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable

    from outcome import Error, Value

pytestmark = pytest.mark.watchdog(180)
given_or_not = pytest.mark.parametrize("given", [True, False], ids=["given", "own"])

SHAPES = ["list", "generator", "async generator"]


def shaped(world: World, items: list[Any], shape: str) -> Iterable[Any] | AsyncIterable[Any]:
    """Return *items* as a source of that *shape*."""
    if shape == "list":
        return items
    return world.source(items) if shape == "generator" else world.async_source(items)


# --- run_in --------------------------------------------------------------------------------------


@given_or_not
def test_a_child(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        assert await run_in(nursery, world.work, 7) == 7

    cancel(victim, given=given)


@given_or_not
def test_a_child_that_fails(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        await run_in(nursery, world.fail)

    cancel(victim, OSError, given=given)


@given_or_not
def test_a_child_whose_cleanup_awaits(given: bool) -> None:
    """The caller is not told before the clean-up is over."""

    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        async def careful() -> int:
            try:
                return await world.work(1)
            finally:
                with trio.CancelScope(shield=True):
                    await world.work(2)

        assert await run_in(nursery, careful) == 1
        assert world.running == 0

    cancel(victim, given=given)


@given_or_not
def test_a_child_under_a_policy(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        retry = Retry(max_attempts=2, backoff=Constant(1))
        world.checks.append(lambda: _check_attempts(world, retry))
        assert await run_in(nursery, partial(_flaky, world, []), 3, policy=retry) == 3

    cancel(victim, OSError, given=given)


@given_or_not
def test_a_child_that_makes_a_call_in_the_same_nursery(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        async def parent() -> int:
            return await run_in(nursery, world.work, 1) + await world.work(1)

        assert await run_in(nursery, parent) == 2

    cancel(victim, given=given)


# --- run_with_limit and map_with_limit ------------------------------------------------------------


@given_or_not
@pytest.mark.parametrize("shape", SHAPES)
def test_many_operations(given: bool, shape: str) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        ops = shaped(world, world.ops(4), shape)
        assert await run_with_limit(nursery, ops, max_concurrency=2) == [0, 1, 2, 3]

    cancel(victim, given=given)


@given_or_not
@pytest.mark.parametrize("shape", SHAPES)
def test_many_items(given: bool, shape: str) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        items = shaped(world, [3, 2, 1], shape)
        assert await map_with_limit(nursery, world.work, items, max_concurrency=2) == [3, 2, 1]

    cancel(victim, given=given)


@given_or_not
@pytest.mark.parametrize("shape", SHAPES)
def test_a_bound_that_others_share(given: bool, shape: str) -> None:
    """Others wait in the line of the limiter, in front of the call and behind it."""

    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        ops = shaped(world, world.ops(3), shape)
        assert await run_with_limit(nursery, ops, max_concurrency=world.limiter) == [0, 1, 2]

    cancel(victim, given=given)


@given_or_not
def test_two_calls_that_share_a_bound(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        async def call() -> None:
            await run_with_limit(nursery, world.ops(2), max_concurrency=world.limiter)

        async with trio.open_nursery() as calls:
            calls.start_soon(call)
            await call()

    cancel(victim, given=given)


@given_or_not
@pytest.mark.parametrize("on_error", ["cancel", "continue"])
def test_operations_that_fail(given: bool, on_error: Any) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        ops = [*world.ops(2), world.fail, *world.ops(2), world.fail]
        with pytest.raises(OperationsFailedError) as caught:
            await run_with_limit(nursery, ops, max_concurrency=2, on_error=on_error)
        # Cancelled ones are neither successes nor failures.
        ended = [each for each in caught.value.outcomes if each is not None]
        assert len(ended) == world.succeeded + world.failed
        assert len(caught.value.exceptions) == world.failed

    cancel(victim, given=given)


@given_or_not
def test_failures_that_are_collected(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        results = await run_with_limit(
            nursery, [world.fail, *world.ops(2)], max_concurrency=2, on_error="collect"
        )
        assert len(results) == 3

    cancel(victim, given=given)


@given_or_not
@pytest.mark.parametrize("on_error", ["cancel", "continue"])
def test_failures_under_a_bound_that_others_share(given: bool, on_error: Any) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        ops = world.source([*world.ops(1), world.fail, *world.ops(1)])
        await run_with_limit(nursery, ops, max_concurrency=world.limiter, on_error=on_error)

    cancel(victim, OSError, given=given)


@given_or_not
@pytest.mark.parametrize("shared", [True, False])
def test_operations_in_time(given: bool, shared: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        bound = world.limiter if shared else 2
        results = await map_with_limit(
            nursery, world.work, range(3), max_concurrency=bound, timeout=5
        )
        assert results == [0, 1, 2]

    cancel(victim, given=given)


@given_or_not
@pytest.mark.parametrize("shared", [True, False])
def test_operations_that_take_too_long(given: bool, shared: bool) -> None:
    """Our own cancellation of an operation is not mistaken for the caller's, nor the reverse."""

    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        bound = world.limiter if shared else 2
        results: list[Value[int] | Error] = await map_with_limit(
            nursery, world.hang, range(3), max_concurrency=bound, timeout=1, on_error="collect"
        )
        errors = [getattr(each, "error", None) for each in results]
        assert [type(error) for error in errors] == [OperationTimeoutError] * 3

    cancel(victim, given=given)


@in_pairs
@given_or_not
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shared", [True, False])
def test_batches_with_a_delay(given: bool, shape: str, shared: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        results = await run_with_limit(
            nursery,
            shaped(world, world.ops(3), shape),
            batch_size=2,
            delay_between_batches=1,
            max_concurrency=world.limiter if shared else 2,
        )
        assert results == [0, 1, 2]

    cancel(victim, given=given)


@given_or_not
def test_a_retry_of_each_operation(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        retry = Retry(max_attempts=2, backoff=Constant(1))
        world.checks.append(lambda: _check_attempts(world, retry))
        flaky = partial(_flaky, world, [])
        results = await map_with_limit(nursery, flaky, [5, 6], policy=retry, max_concurrency=2)
        assert results == [5, 6]

    cancel(victim, OSError, given=given)


@given_or_not
def test_a_timeout_of_each_operation(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        policy, expiries = Timeout(1), list[object]()
        world.checks.append(lambda: _check_expiries(policy, len(expiries), world.started))
        ops = [*world.ops(2), world.hang]
        await run_with_limit(
            nursery,
            ops,
            policy=policy,
            max_concurrency=2,
            on_error="collect",
            on_done=lambda _, each: expiries.extend([each] if hasattr(each, "error") else []),
        )
        assert len(expiries) == 1

    cancel(victim, given=given)


@given_or_not
def test_calls_within_calls(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        async def inner(_: int) -> list[int]:
            return await run_with_limit(nursery, world.ops(2), max_concurrency=1)

        assert await map_with_limit(nursery, inner, range(2), max_concurrency=2) == [[0, 1]] * 2

    cancel(victim, given=given)


@given_or_not
def test_calls_within_calls_of_one_bound(given: bool) -> None:
    """Whether the inner call gets a permit, or is told that it would wait for itself."""

    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        async def inner() -> list[int]:
            await world.work()
            return await run_with_limit(nursery, world.ops(2), max_concurrency=world.limiter)

        assert await run_with_limit(nursery, [inner], max_concurrency=world.limiter) == [[0, 1]]

    cancel(victim, RuntimeError, given=given)


@given_or_not
@pytest.mark.parametrize("shared", [True, False])
def test_on_done_is_told_of_what_ended_and_of_nothing_else(given: bool, shared: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        told: list[int] = []
        world.checks.append(lambda: _check_told(told, world.succeeded + world.failed))
        await run_with_limit(
            nursery,
            world.source([world.fail, *world.ops(2)]),
            on_error="collect",
            max_concurrency=world.limiter if shared else 2,
            on_done=lambda index, _: told.append(index),
        )
        assert sorted(told) == [0, 1, 2]

    cancel(victim, given=given)


@given_or_not
def test_an_on_done_that_raises(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        def refuse(index: int, _: object) -> None:
            if index == 1:
                raise OSError

        ops = world.source(world.ops(4))
        await run_with_limit(nursery, ops, max_concurrency=2, on_done=refuse)

    cancel(victim, OSError, given=given)


@given_or_not
@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_source_that_raises(given: bool, asynchronous: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        def broken() -> Any:
            yield from world.ops(3)
            raise OSError

        make = world.async_source if asynchronous else world.source
        await run_with_limit(nursery, make(broken()), max_concurrency=2)

    cancel(victim, OSError, given=given)


@given_or_not
def test_no_operations(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        await pause()
        assert await run_with_limit(nursery, world.ops(0)) == []

    cancel(victim, given=given)


@given_or_not
def test_listeners_hear_of_an_end_for_every_beginning(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        with subscribe(world.heard.append):
            ops = [world.fail, world.hang, *world.ops(2)]
            await run_with_limit(nursery, ops, max_concurrency=2, timeout=1, on_error="collect")
        assert len(world.heard) == 2 * 4 + 1

    cancel(victim, given=given)


# --- what the statistics come to ------------------------------------------------------------------


async def _flaky(world: World, tried: list[int], index: int) -> int:
    """Fail at the first attempt of the first operation only."""
    tried.append(index)
    return await (world.fail(index) if len(tried) == 1 else world.work(index))


def _check_attempts(world: World, retry: Retry) -> None:
    statistics = retry.statistics()
    assert statistics.attempts == world.started
    assert statistics.given_up == 0
    assert statistics.recovered <= world.succeeded


def _check_expiries(policy: Timeout, expiries: int, calls: int) -> None:
    statistics = policy.statistics()
    assert (statistics.timed_out, statistics.calls) == (expiries, calls)


def _check_told(told: list[int], ended: int) -> None:
    assert len(told) == len(set(told)) == ended
