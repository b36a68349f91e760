"""Cancelled at every instant, in the caller or in the nursery, nothing leaks and nobody hangs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import attrs
import outcome
import pytest
import trio

from trio_resilience import (
    Constant,
    OperationsCancelledError,
    OperationTimeoutError,
    Retry,
    map_with_limit,
    run_in,
    run_with_limit,
    stream_map_with_limit,
    stream_with_limit,
)
from trio_resilience.testing import Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    Victim = Callable[["World", trio.Nursery | None], Awaitable[object]]


@attrs.define(eq=False)
class World:
    """What one run of a scenario shares, and what must be left of it in the end: nothing."""

    limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(2))
    running: int = 0
    peak: int = 0
    open_sources: int = 0

    async def work(self, index: int = 0, rounds: int = 2) -> int:
        """Suspend for a while."""
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await pause(rounds)
        finally:
            self.running -= 1
        return index

    async def fail(self, index: int = 0) -> int:
        await self.work(index)
        raise OSError

    def ops(self, number: int) -> list[Callable[[], Awaitable[int]]]:
        return [partial(self.work, index, 1 + index % 2) for index in range(number)]

    def source(self, number: int) -> Iterator[Callable[[], Awaitable[int]]]:
        self.open_sources += 1
        try:
            yield from self.ops(number)
        finally:
            self.open_sources -= 1

    async def async_source(self, number: int) -> AsyncIterator[Callable[[], Awaitable[int]]]:
        self.open_sources += 1
        try:
            for op in self.ops(number):
                await pause()
                yield op
        finally:
            self.open_sources -= 1

    async def use_limiter(self) -> None:
        async with self.limiter:
            await pause()

    async def compete(self) -> None:
        results = await run_with_limit(None, self.ops(3), max_concurrency=self.limiter)
        assert results == [0, 1, 2]

    def is_tidy(self) -> bool:
        waiting = self.limiter.statistics().tasks_waiting
        return not (self.running or self.open_sources or self.limiter.borrowed_tokens or waiting)


async def of_a_list(world: World, nursery: trio.Nursery | None) -> None:
    assert await run_with_limit(nursery, world.ops(4), max_concurrency=2) == [0, 1, 2, 3]


async def of_a_generator(world: World, nursery: trio.Nursery | None) -> None:
    assert await run_with_limit(nursery, world.source(4), max_concurrency=2) == [0, 1, 2, 3]


async def of_an_async_generator(world: World, nursery: trio.Nursery | None) -> None:
    results = await run_with_limit(nursery, world.async_source(3), max_concurrency=2)
    assert results == [0, 1, 2]


async def with_a_limiter(world: World, nursery: trio.Nursery | None) -> None:
    results = await run_with_limit(nursery, world.source(3), max_concurrency=world.limiter)
    assert results == [0, 1, 2]


async def with_timeouts(world: World, nursery: trio.Nursery | None) -> None:
    results = await map_with_limit(nursery, world.work, range(3), max_concurrency=2, timeout=5)
    assert results == [0, 1, 2]


async def with_an_expiry(world: World, nursery: trio.Nursery | None) -> None:
    async def hang(_: int) -> None:
        await world.work()
        await trio.sleep_forever()

    results = await map_with_limit(nursery, hang, range(2), timeout=1, on_error="collect")
    kinds = [type(each.error) for each in results if isinstance(each, outcome.Error)]
    assert kinds == [OperationTimeoutError] * 2


async def in_batches(world: World, nursery: trio.Nursery | None) -> None:
    results = await run_with_limit(
        nursery, world.source(3), batch_size=2, delay_between_batches=1, max_concurrency=2
    )
    assert results == [0, 1, 2]


async def under_a_policy(world: World, nursery: trio.Nursery | None) -> None:
    attempts = 0

    async def flaky(index: int) -> int:
        nonlocal attempts
        attempts += 1
        return await (world.fail(index) if attempts == 1 else world.work(index))

    policy = Retry(backoff=Constant(1.0))
    results = await map_with_limit(nursery, flaky, range(2), policy=policy, max_concurrency=2)
    assert results == [0, 1]


async def with_a_failure(world: World, nursery: trio.Nursery | None) -> None:
    ops = [*world.ops(2), world.fail, *world.ops(2)]
    await run_with_limit(nursery, ops, max_concurrency=2)


async def with_all_failures(world: World, nursery: trio.Nursery | None) -> None:
    await run_with_limit(nursery, [world.fail] * 3, max_concurrency=2, on_error="continue")


async def with_a_callback(world: World, nursery: trio.Nursery | None) -> None:
    done = list[int]()
    await run_with_limit(
        nursery,
        [world.fail, *world.ops(2)],
        on_error="collect",
        on_done=lambda i, _: done.append(i),
    )
    assert sorted(done) == [0, 1, 2]


async def without_operations(world: World, nursery: trio.Nursery | None) -> None:
    await pause()
    assert await run_with_limit(nursery, world.ops(0)) == []


async def nested(world: World, nursery: trio.Nursery | None) -> None:
    async def inner(_: int) -> list[int]:
        return await run_with_limit(nursery, world.ops(2), max_concurrency=1)

    assert await map_with_limit(nursery, inner, range(2), max_concurrency=2) == [[0, 1]] * 2


async def streamed(world: World, nursery: trio.Nursery | None) -> None:
    stream = stream_with_limit(nursery, world.source(4), max_concurrency=2)
    async with stream as results:
        assert sorted([index async for index, _ in results]) == [0, 1, 2, 3]


async def streamed_in_order(world: World, nursery: trio.Nursery | None) -> None:
    stream = stream_map_with_limit(
        nursery, world.work, range(4), max_concurrency=2, ordered=True, buffer=1
    )
    async with stream as results:
        assert [item async for item, _ in results] == [0, 1, 2, 3]


async def streamed_to_a_slow_consumer(world: World, nursery: trio.Nursery | None) -> None:
    stream = stream_with_limit(nursery, world.source(4), max_concurrency=world.limiter)
    async with stream as results:
        async for _ in results:
            await pause(3)


async def streamed_from_an_async_generator(world: World, nursery: trio.Nursery | None) -> None:
    async with stream_with_limit(nursery, world.async_source(3)) as results:
        assert len([index async for index, _ in results]) == 3


async def streamed_and_left(world: World, nursery: trio.Nursery | None) -> None:
    async with stream_with_limit(nursery, world.source(9), max_concurrency=2) as results:
        async for _ in results:
            await pause()
            break


async def streamed_with_a_failure(world: World, nursery: trio.Nursery | None) -> None:
    ops = [*world.ops(2), world.fail, *world.ops(2)]
    async with stream_with_limit(nursery, ops, max_concurrency=2, buffer=1) as results:
        async for _ in results:
            pass


async def as_a_child(world: World, nursery: trio.Nursery | None) -> None:
    assert await run_in(nursery, world.work, 7) == 7


async def as_a_child_that_fails(world: World, nursery: trio.Nursery | None) -> None:
    await run_in(nursery, world.fail, 7)


async def as_a_child_with_cleanup(world: World, nursery: trio.Nursery | None) -> None:
    async def careful() -> int:
        try:
            return await world.work(1, rounds=3)
        finally:
            with trio.CancelScope(shield=True):
                await world.work()

    assert await run_in(nursery, careful) == 1


VICTIMS: list[Victim] = [
    of_a_list, of_a_generator, of_an_async_generator, with_a_limiter, with_timeouts,
    with_an_expiry, in_batches, under_a_policy, with_a_failure, with_all_failures, with_a_callback,
    without_operations, nested, streamed, streamed_in_order, streamed_to_a_slow_consumer,
    streamed_from_an_async_generator, streamed_and_left, streamed_with_a_failure, as_a_child,
    as_a_child_that_fails, as_a_child_with_cleanup,
]  # fmt: skip


def scenario(victim: Victim, *, given: bool) -> Scenario:
    """*victim*, and somebody who competes with it for the limiter."""
    world = World()

    async def call(nursery: trio.Nursery) -> None:
        await victim(world, nursery if given else None)

    return Scenario(
        call,
        others=[world.compete] if victim is with_a_limiter else [world.use_limiter],
        fresh_user=world.use_limiter,
        invariant=world.is_tidy,
        expected=(OSError,),
        on_nursery_cancelled=(OperationsCancelledError,),
    )


@pytest.mark.watchdog(180)
@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("given", [True, False])
def test_cancelled_anywhere_it_leaks_nothing(victim: Victim, given: bool) -> None:
    """No permit, task or source is left, whoever is cancelled and whenever; and nobody hangs."""
    report = cancel_everywhere(partial(scenario, victim, given=given))
    assert report.cancellations > 0
