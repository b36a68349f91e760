"""Shared bounds and batches, cancelled at every instant: nothing leaks, nobody else suffers."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._pairs import in_pairs
from tests._scenarios import PERMITS, World
from trio_resilience import (
    OperationsCancelledError,
    OperationsFailedError,
    OperationTimeoutError,
    Semaphore,
    map_with_limit,
    run_with_limit,
    stream_with_limit,
)
from trio_resilience.testing import CancelReport, Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = [pytest.mark.watchdog(180), pytest.mark.exhaustive]
stream_ops: Any = stream_with_limit

given_or_not = pytest.mark.parametrize("given", [True, False], ids=["given", "own"])
shapes = pytest.mark.parametrize("shape", ["list", "generator", "async generator"])
bounds = pytest.mark.parametrize("bound", ["number", "limiter", "semaphore"])
options = pytest.mark.parametrize(
    "stream_options",
    [{"ordered": ordered, "buffer": buffer} for ordered in (False, True) for buffer in (0, 2)],
    ids=["as completed", "as completed, buffered", "in order", "in order, buffered"],
)


@attrs.define(eq=False)
class KeyedWorld(World):
    """A world with a semaphore besides the limiter, whose items are even or odd."""

    semaphore: Semaphore = attrs.field(factory=lambda: Semaphore(PERMITS))
    keys: Counter[int] = attrs.field(factory=Counter[int])

    def bound(self, kind: str) -> Any:
        """What is shared with others, or a number for this call alone."""
        return {"number": PERMITS, "limiter": self.limiter, "semaphore": self.semaphore}[kind]

    def shaped(self, items: Any, shape: str) -> Any:
        """Return *items* as a source of that *shape*."""
        if shape == "list":
            return list(items)
        return self.source(items) if shape == "generator" else self.async_source(items)

    async def visit(self, item: int) -> int:
        """Do some work on *item*, which nobody else may do on its key meanwhile."""
        self.keys[item % 2] += 1
        try:
            assert self.keys[item % 2] == 1, "one of a key at a time"
            return await self.work(item, 1 + item % 3)
        finally:
            self.keys[item % 2] -= 1

    async def use_semaphore(self) -> None:
        async with self.semaphore:
            await pause()

    async def use_whole_semaphore(self) -> None:
        async with self.semaphore.hold(PERMITS):
            await pause()

    async def compete_for_semaphore(self) -> None:
        """Make a call of one's own, with keys, under the same semaphore."""
        results = await map_with_limit(
            None, _same, range(3), key=parity, max_per_key=1, max_concurrency=self.semaphore
        )
        assert results == [0, 1, 2]

    async def come_fresh(self) -> None:
        """Take every permit of both bounds."""
        await self.use_all()
        self.semaphore.acquire_nowait(PERMITS)
        await pause()
        self.semaphore.release(PERMITS)

    def check(self) -> None:
        super().check()
        now = self.semaphore.statistics()
        assert (now.borrowed, now.waiting) == (0, 0), "the semaphore is untouched"
        assert self.keys.total() == 0


def parity(item: int) -> int:
    """Be the key of an item."""
    return item % 2


KEYED: dict[str, Any] = {"key": parity, "max_per_key": 1}


async def _same(item: int) -> int:
    await pause()
    return item


def cancel(
    victim: Callable[[KeyedWorld, trio.Nursery | None], Awaitable[object]],
    *expected: type[Exception],
    given: bool,
) -> CancelReport:
    """Cancel *victim* everywhere, beside others that want the same limiter and semaphore."""
    __tracebackhide__ = True

    def make() -> Scenario:
        world = KeyedWorld()

        async def call(nursery: trio.Nursery) -> None:
            await victim(world, nursery if given else None)

        return Scenario(
            call,
            others=[
                world.use_semaphore,
                world.compete_for_semaphore,
                world.use_whole_semaphore,
                world.use_limiter,
            ],
            fresh_user=world.come_fresh,
            invariant=world.check,
            expected=expected,
            on_nursery_cancelled=(OperationsCancelledError,),
        )

    report = cancel_everywhere(make, seeds=[int(given)])
    assert report.cancellations > 0
    return report


# --- a semaphore as the bound ---------------------------------------------------------------------


@given_or_not
@shapes
def test_operations_under_a_semaphore(given: bool, shape: str) -> None:
    """Others wait in its line, one of them for all of it, in front of the call and behind it."""

    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        ops = world.shaped(world.ops(3), shape)
        assert await run_with_limit(nursery, ops, max_concurrency=world.semaphore) == [0, 1, 2]

    cancel(victim, given=given)


@given_or_not
def test_two_calls_under_a_semaphore(given: bool) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        async def call() -> None:
            await run_with_limit(nursery, world.ops(2), max_concurrency=world.semaphore)

        async with trio.open_nursery() as calls:
            calls.start_soon(call)
            await call()

    cancel(victim, given=given)


@given_or_not
def test_a_call_within_a_call_under_a_semaphore(given: bool) -> None:
    """Whether the inner call gets a permit, or is told that it would wait for itself."""

    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        async def inner() -> list[int]:
            await world.work()
            return await run_with_limit(nursery, world.ops(2), max_concurrency=world.semaphore)

        assert await run_with_limit(nursery, [inner], max_concurrency=world.semaphore) == [[0, 1]]

    cancel(victim, RuntimeError, given=given)


@given_or_not
@pytest.mark.parametrize("on_error", ["cancel", "continue"])
def test_failures_under_a_semaphore(given: bool, on_error: Any) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        ops = world.source([*world.ops(1), world.fail, *world.ops(1)])
        await run_with_limit(nursery, ops, max_concurrency=world.semaphore, on_error=on_error)

    cancel(victim, OSError, given=given)


@given_or_not
def test_a_semaphore_that_is_resized_meanwhile(given: bool) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        async def resize(index: int, permits: int) -> int:
            world.semaphore.permits = permits
            return await world.work(index)

        ops = [partial(resize, 0, 0), partial(resize, 1, 3), partial(resize, 2, PERMITS)]
        try:
            with trio.move_on_after(5):
                await run_with_limit(nursery, ops, max_concurrency=world.semaphore)
        finally:
            world.semaphore.permits = PERMITS

    cancel(victim, given=given)


@in_pairs
@given_or_not
@options
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_stream_under_a_semaphore(given: bool, stream_options: Any, asynchronous: bool) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        ops = world.shaped(world.ops(3), "async generator" if asynchronous else "generator")
        stream = stream_ops(nursery, ops, max_concurrency=world.semaphore, **stream_options)
        async with stream as results:
            async for _ in results:
                await pause()

    cancel(victim, given=given)


# --- batches --------------------------------------------------------------------------------------

BATCHES: dict[str, Any] = {"batch_size": 2, "delay_between_batches": 1}


@in_pairs
@given_or_not
@bounds
@pytest.mark.parametrize("on_error", ["cancel", "continue"])
def test_batches_that_fail(given: bool, bound: str, on_error: Any) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        ops = world.source([*world.ops(3), world.fail, *world.ops(1)])
        with pytest.raises(OperationsFailedError) as caught:
            await run_with_limit(
                nursery, ops, max_concurrency=world.bound(bound), on_error=on_error, **BATCHES
            )
        assert len(caught.value.exceptions) == world.failed == 1

    cancel(victim, given=given)


@in_pairs
@given_or_not
@options
@bounds
def test_a_stream_of_batches(given: bool, stream_options: Any, bound: str) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        ops, shared = world.source(world.ops(3)), world.bound(bound)
        stream = stream_ops(nursery, ops, max_concurrency=shared, **BATCHES, **stream_options)
        async with stream as results:
            got = list[int]()
            async for index, _ in results:
                await pause()
                got.append(index)
        assert sorted(got) == [0, 1, 2]

    cancel(victim, given=given)


@in_pairs
@given_or_not
@pytest.mark.parametrize("shape", ["generator", "async generator"])
@pytest.mark.parametrize("at", [0, 2, 3])
def test_a_source_that_raises_in_a_batch_or_between_two(given: bool, shape: str, at: int) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        def broken() -> Any:
            yield from world.ops(at)
            raise OSError

        await run_with_limit(nursery, world.shaped(broken(), shape), max_concurrency=2, **BATCHES)

    cancel(victim, OSError, given=given)


@given_or_not
@bounds
def test_batches_whose_operations_take_too_long(given: bool, bound: str) -> None:
    async def victim(world: KeyedWorld, nursery: trio.Nursery | None) -> None:
        results: list[Any] = await map_with_limit(
            nursery,
            world.hang,
            range(3),
            max_concurrency=world.bound(bound),
            timeout=1,
            on_error="collect",
            **BATCHES,
        )
        assert [type(each.error) for each in results] == [OperationTimeoutError] * 3

    cancel(victim, given=given)
