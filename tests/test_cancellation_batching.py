"""Batching, cancelled at every instant: nothing leaks, nobody else suffers or hangs."""

from __future__ import annotations

import math
from contextlib import aclosing, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio

from tests._pairs import in_pairs
from tests._scenarios import World, cancel
from trio_resilience import OperationsCancelledError, batched, open_batcher, subscribe
from trio_resilience.testing import Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

pytestmark = [pytest.mark.watchdog(180), pytest.mark.exhaustive]

given_or_not = pytest.mark.parametrize("given", [True, False], ids=["given", "own"])


@attrs.define(eq=False)
class Desk:
    """A batcher of a scenario, of which nothing may be left, and items that come out doubled."""

    world: World
    batcher: Any = None

    async def process(self, items: list[int]) -> list[int]:
        await self.world.work(0, 1 + len(items) % 2)
        return [2 * item for item in items]

    async def submit(self, item: int) -> None:
        assert await self.batcher.submit(item) == 2 * item

    async def submit_patiently(self, item: int) -> None:
        """Submit beside the victim: whatever becomes of it, the answer is right, or clear."""
        with suppress(OperationsCancelledError, trio.ClosedResourceError):
            await self.submit(item)

    def open(self, nursery: trio.Nursery | None, **options: Any) -> Any:
        self.batcher = open_batcher(nursery, self.process, **options)
        self.world.checks.append(self.check)
        return self.batcher

    def check(self) -> None:
        now = self.batcher.statistics()
        assert (now.waiting, now.in_line, now.in_flight) == (0, 0, 0)


@in_pairs
@given_or_not
@pytest.mark.parametrize("max_age", [0, 1, math.inf])
@pytest.mark.parametrize("max_concurrency", [1, 2])
def test_an_opener_whose_children_submit(given: bool, max_age: float, max_concurrency: int) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        desk = Desk(world)
        options = {"batch_size": 2, "queue_size": 2, "max_concurrency": max_concurrency}
        async with (
            trio.open_nursery() as submitters,
            desk.open(nursery, max_age=max_age, **options),
        ):
            for item in range(5):
                submitters.start_soon(desk.submit_patiently, item)
            await pause()

    cancel(victim, given=given)


@given_or_not
def test_a_body_that_submits_and_raises(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        desk = Desk(world)
        with subscribe(world.heard.append):
            async with desk.open(nursery, batch_size=2, max_age=0):
                await desk.submit(1)
                await desk.submit(2)
                raise KeyError

    cancel(victim, KeyError, given=given)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_submitter_beside_others(size: int) -> None:
    """The batcher belongs to somebody else: it outlives the victim, and serves everybody else."""

    def make() -> Scenario:
        world = World()
        desk, ready, done = Desk(world), trio.Event(), trio.Event()

        async def keep_open() -> None:
            async with desk.open(None, batch_size=size, queue_size=4, max_age=1):
                ready.set()
                await done.wait()
                await desk.submit(9)

        async def submit_some(*items: int) -> None:
            await ready.wait()
            for item in items:
                await desk.submit(item)

        async def victim(_: trio.Nursery) -> None:
            await submit_some(1, 2)

        async def last() -> None:
            await submit_some(3, 4, 5, 6)
            done.set()

        return Scenario(
            victim,
            others=[keep_open, partial(submit_some, 7, 8), last],
            invariant=world.check,
        )

    report = cancel_everywhere(make, targets=["caller"], seeds=range(2))
    assert report.cancellations > 0


# --- batches of a stream ------------------------------------------------------------------------


@in_pairs
@given_or_not
@pytest.mark.parametrize("max_age", [0, 1, math.inf])
@pytest.mark.parametrize("slow", [False, True])
def test_batches_of_a_source(given: bool, max_age: float, slow: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        got = list[int]()
        source = world.async_source(range(5))
        async with batched(nursery, source, batch_size=2, max_age=max_age) as batches:
            async for batch in batches:
                got += batch
                if slow:
                    await pause(3)
        assert got == list(range(5))

    cancel(victim, given=given)


@given_or_not
def test_batches_that_are_left_early(given: bool) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        async with batched(nursery, world.async_source(range(9)), batch_size=2) as batches:
            async for _ in batches:
                await pause()
                break
        assert world.open_sources == 0

    cancel(victim, given=given)


@given_or_not
def test_batches_of_a_source_that_fails_in_a_body_that_raises(given: bool) -> None:
    async def source(world: World) -> AsyncIterable[int]:
        async with aclosing(cast("Any", world.async_source(range(3)))) as items:
            async for item in items:
                yield item
        raise OSError

    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        async with batched(nursery, source(world), batch_size=2) as batches:
            async for batch in batches:
                await pause()
                if len(batch) < 2:
                    raise KeyError

    cancel(victim, KeyError, OSError, given=given)


@pytest.mark.parametrize("max_age", [0, 1])
def test_no_item_of_a_channel_is_lost_with_a_cancelled_wait(max_age: float) -> None:
    """The consumer is cancelled anywhere in `__anext__`; who iterates next gets every item."""

    def make() -> Scenario:
        world, got, is_done = World(), list[int](), trio.Event()
        send, receive = trio.open_memory_channel[int](0)
        batches = batched(None, receive, batch_size=2, max_age=max_age)
        is_open = trio.Event()

        async def feed() -> None:
            await is_open.wait()
            async with send:
                for item in range(5):
                    await pause()
                    await send.send(item)

        async def victim(nursery: trio.Nursery) -> None:
            try:
                await is_open.wait()
                for _ in range(2):
                    got.extend(await anext(batches))
            finally:
                is_done.set()

        async def keep_open() -> None:
            async with batches:
                is_open.set()
                await is_done.wait()
                async for batch in batches:
                    got.extend(batch)

        def check() -> None:
            assert got == list(range(5))

        world.checks.append(check)
        return Scenario(victim, others=[feed, keep_open], invariant=world.check)

    report = cancel_everywhere(make, targets=["caller"], seeds=range(3))
    assert report.cancellations > 0
