"""Items that share a key, cancelled at every instant: nothing leaks, nobody else suffers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._pairs import in_pairs
from tests._scenarios import World
from tests._scenarios import cancel as cancel_in_world
from tests.test_cancellation_shared import (
    KEYED,
    KeyedWorld,
    bounds,
    cancel,
    given_or_not,
    options,
    shapes,
)
from trio_resilience import (
    Constant,
    OperationsFailedError,
    OperationTimeoutError,
    Retry,
    map_with_limit,
    stream_map_with_limit,
    subscribe,
)
from trio_resilience.testing import pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = [pytest.mark.watchdog(180), pytest.mark.exhaustive]
map_items: Any = map_with_limit
stream_items: Any = stream_map_with_limit

windows = pytest.mark.parametrize("lookahead", [1, 1000])


# --- keys -----------------------------------------------------------------------------------------


@in_pairs
@given_or_not
@shapes
@windows
def test_items_with_keys(given: bool, shape: str, lookahead: int) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        items = world.shaped([0, 2, 4, 1, 3], shape)
        results = await map_items(
            nursery, world.visit, items, max_concurrency=3, lookahead=lookahead, **KEYED
        )
        assert results == [0, 2, 4, 1, 3]

    cancel_in_world(_in_keyed_world(victim), given=given)


def _in_keyed_world(
    victim: Callable[[KeyedWorld, trio.Nursery | None], Awaitable[object]],
) -> Callable[[World, trio.Nursery | None], Awaitable[object]]:
    """Let a victim have a keyed world of its own, where nobody competes with it."""

    async def call(world: World, nursery: trio.Nursery | None) -> None:
        own = KeyedWorld()
        world.checks.append(own.check)
        await victim(own, nursery)

    return call


@in_pairs
@given_or_not
@shapes
@pytest.mark.parametrize("bound", ["limiter", "semaphore"])
def test_keys_under_a_bound_that_others_share(given: bool, shape: str, bound: str) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        items = world.shaped([0, 2, 1], shape)
        results = await map_items(
            nursery, world.visit, items, max_concurrency=world.bound(bound), **KEYED
        )
        assert results == [0, 2, 1]

    cancel(victim, given=given)


@given_or_not
@bounds
def test_two_calls_with_keys(given: bool, bound: str) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        async def call(items: list[int]) -> None:
            shared = world.bound(bound)
            await map_items(nursery, world.visit, items, max_concurrency=shared, **KEYED)

        async with trio.open_nursery() as calls:
            calls.start_soon(call, [0, 2])
            await call([1, 3])

    cancel(victim, given=given)


@in_pairs
@given_or_not
@bounds
@pytest.mark.parametrize("on_error", ["cancel", "continue"])
def test_keys_of_items_that_fail(given: bool, bound: str, on_error: Any) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        async def visit(item: int) -> int:
            return await (world.fail(item) if item in {2, 3} else world.visit(item))

        items, shared = world.source([0, 2, 4, 1, 3]), world.bound(bound)
        with pytest.raises(OperationsFailedError) as caught:
            await map_items(
                nursery, visit, items, max_concurrency=shared, on_error=on_error, **KEYED
            )
        assert len(caught.value.exceptions) == world.failed

    cancel(victim, given=given)


@given_or_not
@bounds
def test_keys_of_items_that_take_too_long(given: bool, bound: str) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        results = await map_items(
            nursery,
            world.hang,
            [0, 2, 1],
            max_concurrency=world.bound(bound),
            timeout=1,
            on_error="collect",
            **KEYED,
        )
        assert [type(each.error) for each in results] == [OperationTimeoutError] * 3

    cancel(victim, given=given)


@given_or_not
@shapes
def test_a_key_function_that_raises(given: bool, shape: str) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        def key(item: int) -> int:
            if item == 3:
                raise OSError
            return 0

        items = world.shaped(range(5), shape)
        await map_items(nursery, world.work, items, key=key, max_per_key=1, lookahead=2)

    cancel(victim, OSError, given=given)


@in_pairs
@given_or_not
@pytest.mark.parametrize("shape", ["list", "async generator"])
@bounds
def test_batches_with_keys(given: bool, shape: str, bound: str) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        results = await map_items(
            nursery,
            world.visit,
            world.shaped([0, 2, 1, 3], shape),
            max_concurrency=world.bound(bound),
            batch_size=3,
            delay_between_batches=1,
            **KEYED,
        )
        assert results == [0, 2, 1, 3]

    cancel(victim, given=given)


@given_or_not
def test_a_retry_of_items_with_keys(given: bool) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        retry, failures = Retry(max_attempts=2, backoff=Constant(1)), [OSError()]

        async def flaky(item: int) -> int:
            if item == 2 and failures:
                raise failures.pop()
            return await world.visit(item)

        results = await map_items(nursery, flaky, [0, 2, 1], policy=retry, **KEYED)
        assert results == [0, 2, 1]
        assert retry.statistics().recovered == 1

    cancel(victim, OSError, given=given)


# --- streams with keys ----------------------------------------------------------------------------


@in_pairs
@given_or_not
@options
@bounds
def test_a_stream_with_keys(given: bool, stream_options: Any, bound: str) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        items, shared = world.source([0, 2, 1, 3]), world.bound(bound)
        stream = stream_items(
            nursery, world.visit, items, max_concurrency=shared, **KEYED, **stream_options
        )
        async with stream as results:
            got = [item async for item, _ in results]
        assert sorted(got) == [0, 1, 2, 3]
        assert got == [0, 2, 1, 3] or not stream_options["ordered"]

    cancel(victim, given=given)


@in_pairs
@given_or_not
@options
@pytest.mark.parametrize(
    "asynchronous, is_left", [(True, False), (False, True)], ids=["to the end", "left early"]
)
def test_a_slow_consumer_of_a_stream_with_keys(
    given: bool, stream_options: Any, asynchronous: bool, is_left: bool
) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        items = world.shaped([0, 2, 4, 1], "async generator" if asynchronous else "generator")
        stream = stream_items(
            nursery, world.visit, items, max_concurrency=2, **KEYED, **stream_options
        )
        async with stream as results:
            async for item, _ in results:
                await pause(2)
                if is_left and item == 0:
                    break
        assert world.running == world.open_sources == 0

    cancel_in_world(_in_keyed_world(victim), given=given)


@given_or_not
def test_listeners_hear_of_an_end_for_every_beginning(given: bool) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        with subscribe(world.heard.append):
            await map_items(nursery, world.visit, [0, 2, 1], max_concurrency=2, **KEYED)

    cancel(victim, given=given)
