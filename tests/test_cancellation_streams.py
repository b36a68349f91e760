"""Streams, cancelled at every instant: nothing leaks, nobody else suffers or hangs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._pairs import in_pairs
from tests._scenarios import PERMITS, World, cancel
from trio_resilience import (
    Constant,
    Retry,
    stream_map_with_limit,
    stream_with_limit,
    subscribe,
)
from trio_resilience.testing import pause

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.watchdog(180)
# The options that a test varies choose among the overloads only as it runs.
stream_with: Any = stream_with_limit
stream_map_with: Any = stream_map_with_limit

given_or_not = pytest.mark.parametrize("given", [True, False], ids=["given", "own"])
options = pytest.mark.parametrize(
    "stream_options",
    [{"ordered": ordered, "buffer": buffer} for ordered in (False, True) for buffer in (0, 2)],
    ids=["as completed", "as completed, buffered", "in order", "in order, buffered"],
)
asynchronous_or_not = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def source(world: World, number: int, *, asynchronous: bool) -> Any:
    make: Callable[[Any], Any] = world.async_source if asynchronous else world.source
    return make(world.ops(number))


@in_pairs
@given_or_not
@options
@asynchronous_or_not
def test_a_stream(given: bool, stream_options: Any, asynchronous: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        ops = source(world, 4, asynchronous=asynchronous)
        stream = stream_with(nursery, ops, max_concurrency=2, **stream_options)
        async with stream as results:
            got = [index async for index, _ in results]
        assert sorted(got) == [0, 1, 2, 3]
        assert got == sorted(got) or not stream_options["ordered"]

    cancel(victim, given=given)


@given_or_not
@options
def test_a_stream_of_items(given: bool, stream_options: Any) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        items = world.source([3, 2, 1])
        stream = stream_map_with(nursery, world.work, items, max_concurrency=2, **stream_options)
        async with stream as results:
            assert sorted([item async for item, _ in results]) == [1, 2, 3]

    cancel(victim, given=given)


@in_pairs
@given_or_not
@options
@asynchronous_or_not
def test_a_bound_that_others_share(given: bool, stream_options: Any, asynchronous: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        ops = source(world, 3, asynchronous=asynchronous)
        stream = stream_with(nursery, ops, max_concurrency=world.limiter, **stream_options)
        async with stream as results:
            assert sorted([index async for index, _ in results]) == [0, 1, 2]

    cancel(victim, given=given)


@in_pairs
@given_or_not
@options
@pytest.mark.parametrize("shared", [True, False])
def test_a_slow_consumer(given: bool, stream_options: Any, shared: bool) -> None:
    """What is running or waits to be taken stays within its bound, and is dropped at the end."""

    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        bound, taken = world.limiter if shared else PERMITS, 0
        stream = stream_with(
            nursery, world.source(world.ops(4)), max_concurrency=bound, **stream_options
        )
        async with stream as results:
            async for _ in results:
                taken += 1
                assert world.started - taken <= PERMITS + stream_options["buffer"]
                await pause(2)

    cancel(victim, given=given)


@in_pairs
@given_or_not
@options
@asynchronous_or_not
def test_a_stream_that_is_left_early(given: bool, stream_options: Any, asynchronous: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        ops = source(world, 9, asynchronous=asynchronous)
        stream = stream_with(nursery, ops, max_concurrency=2, **stream_options)
        async with stream as results:
            async for _ in results:
                await pause()
                break
        assert world.running == world.open_sources == 0

    cancel(victim, given=given)


@in_pairs
@given_or_not
@options
@asynchronous_or_not
def test_a_body_that_raises(given: bool, stream_options: Any, asynchronous: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        ops = source(world, 9, asynchronous=asynchronous)
        stream = stream_with(nursery, ops, max_concurrency=world.limiter, **stream_options)
        async with stream as results:
            async for _ in results:
                await pause()
                raise KeyError

    cancel(victim, KeyError, given=given)


@given_or_not
def test_a_body_that_takes_nothing(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        async with stream_with_limit(nursery, world.source(world.ops(5)), max_concurrency=2):
            await pause(3)

    cancel(victim, given=given)


@in_pairs
@given_or_not
@options
@pytest.mark.parametrize("on_error", ["cancel", "continue"])
def test_operations_that_fail(given: bool, stream_options: Any, on_error: Any) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        ops = world.source([*world.ops(1), world.fail, *world.ops(2)])
        stream = stream_with(nursery, ops, max_concurrency=2, on_error=on_error, **stream_options)
        async with stream as results:
            async for _ in results:
                await pause()

    cancel(victim, OSError, given=given)


@given_or_not
@options
def test_failures_that_are_collected(given: bool, stream_options: Any) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        ops = world.source([world.fail, world.hang, *world.ops(1)])
        stream = stream_with(
            nursery, ops, max_concurrency=2, timeout=1, on_error="collect", **stream_options
        )
        async with stream as results:
            assert len([each async for each in results]) == 3

    cancel(victim, given=given)


@given_or_not
def test_batches_under_a_retry(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        retry, failures = Retry(max_attempts=2, backoff=Constant(1)), [OSError()]
        world.checks.append(lambda: _check_attempts(world, retry))

        async def flaky(index: int) -> int:
            return await world.work(index, 1, failures.pop() if failures else None)

        async with stream_map_with_limit(
            nursery,
            flaky,
            range(3),
            batch_size=2,
            delay_between_batches=1,
            max_concurrency=2,
            policy=retry,
        ) as results:
            assert sorted([item async for item, _ in results]) == [0, 1, 2]

    cancel(victim, OSError, given=given)


@given_or_not
def test_a_stream_that_feeds_another(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        first = stream_map_with_limit(nursery, world.work, world.source(range(3)))
        async with first as items:
            second = stream_map_with_limit(nursery, _second_of, items)
            async with second as results:
                assert sorted([result async for _, result in results]) == [0, 1, 2]

    cancel(victim, given=given)


@given_or_not
def test_another_task_that_consumes(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        async def consume() -> None:
            assert len([each async for each in results]) == 3

        async with (
            stream_with_limit(nursery, world.source(world.ops(3))) as results,
            trio.open_nursery() as consumers,
        ):
            consumers.start_soon(consume)

    cancel(victim, given=given)


@given_or_not
def test_listeners_hear_of_an_end_for_every_beginning(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        with subscribe(world.heard.append):
            async with stream_with_limit(nursery, world.ops(4), max_concurrency=2) as results:
                async for _ in results:
                    await pause()

    cancel(victim, given=given)


async def _second_of(pair: tuple[int, int]) -> int:
    await pause()
    return pair[1]


def _check_attempts(world: World, retry: Retry) -> None:
    assert retry.statistics().attempts == world.started
    assert retry.statistics().given_up == 0
