"""Semaphore, cancelled at every instant: no permit and no place in line is lost, others get in."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests.test_semaphore import counts
from trio_resilience import (
    Bulkhead,
    Event,
    OperationsCancelledError,
    OperationsFailedError,
    Rejected,
    Semaphore,
    WaitFinished,
    WaitStarted,
    run_with_limit,
    subscribe,
)
from trio_resilience.testing import Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Victim = Callable[["World"], Awaitable[object]]

pytestmark = pytest.mark.watchdog(180)

PERMITS = 3


@attrs.define(eq=False)
class World:
    """A semaphore and a bulkhead, and how many are inside either of them."""

    semaphore: Semaphore = attrs.field(factory=lambda: Semaphore(PERMITS))
    bulkhead: Bulkhead = attrs.field(factory=lambda: Bulkhead(PERMITS, queue_size=9, max_wait=1000))
    nursery: trio.Nursery | None = None
    heard: list[Event] = attrs.field(factory=list[Event])
    refused: int = 0
    inside: int = 0
    most: int = PERMITS
    """The largest number of permits that there were at any time."""

    async def work(self, weight: int = 1) -> int:
        """Be inside with so many permits, and suspend."""
        self.inside += weight
        assert self.inside <= self.most
        try:
            await pause(2)
        finally:
            self.inside -= weight
        return weight

    async def fail(self) -> int:
        """Be inside, suspend, and fail."""
        await self.work()
        raise OSError

    async def use(self, weight: int = 1) -> None:
        """Be one of the others."""
        async with self.semaphore.hold(weight, wait_for_resize=True):
            await self.work(weight)

    async def use_by_hand(self) -> None:
        """Take in one task, give back in another."""
        await self.semaphore.acquire(2, wait_for_resize=True)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.give_back, 1)
            nursery.start_soon(self.give_back, 1)

    async def give_back(self, weight: int) -> None:
        """Give back what another task has taken."""
        try:
            await self.work(weight)
        finally:
            self.semaphore.release(weight)

    async def use_in_a_call(self) -> None:
        """Be a call of one's own under the same bound."""
        await run_with_limit(None, [self.work] * 3, max_concurrency=self.semaphore)

    async def use_bulkhead(self) -> None:
        """Be one of the others."""
        await self.bulkhead.call(self.work)

    async def use_all(self) -> None:
        """Take every permit that there should be, at once."""
        self.semaphore.permits = PERMITS
        self.semaphore.acquire_nowait(PERMITS)
        for _ in range(PERMITS):
            self.bulkhead.acquire_nowait()
        await pause()
        self.semaphore.release(PERMITS)
        for _ in range(PERMITS):
            self.bulkhead.release()

    def check(self) -> None:
        """Raise unless everything is as if nobody had ever been here."""
        assert self.inside == 0
        assert counts(self.semaphore) == (0, PERMITS, 0)
        assert counts(self.bulkhead) == (0, PERMITS, 0)
        assert self.bulkhead.statistics().rejections == self.refused
        kinds = [type(event) for event in self.heard]
        assert kinds.count(WaitStarted) == kinds.count(WaitFinished)
        assert kinds.count(Rejected) == self.refused


OTHERS: list[Callable[[World], Awaitable[None]]] = [
    World.use,
    partial(World.use, weight=2),
    World.use_by_hand,
    partial(World.use, weight=PERMITS),
]


def cancel(
    victim: Victim, *expected: type[Exception], others: Any = OTHERS, seeds: int = 2
) -> None:
    """Cancel *victim* everywhere, beside others that want the same permits."""
    __tracebackhide__ = True

    def scenario() -> Scenario:
        world = World()

        async def call(nursery: trio.Nursery) -> None:
            world.nursery = nursery
            with subscribe(world.heard.append):
                await victim(world)

        return Scenario(
            call,
            others=[partial(other, world) for other in others],
            fresh_user=world.use_all,
            invariant=world.check,
            expected=expected,
            on_nursery_cancelled=(OperationsCancelledError,),
        )

    report = cancel_everywhere(scenario, seeds=range(seeds))
    assert report.cancellations > 0


# --- semaphore ----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1, 2, 3])
def test_acquire_and_release(weight: int) -> None:
    """By hand, as a careful user writes it."""

    async def victim(world: World) -> None:
        await world.semaphore.acquire(weight)
        try:
            await world.work(weight)
        finally:
            world.semaphore.release(weight)

    cancel(victim)


@pytest.mark.parametrize("weight", [1, 2, 3])
def test_hold(weight: int) -> None:
    async def victim(world: World) -> None:
        async with world.semaphore.hold(weight):
            await world.work(weight)

    cancel(victim)


def test_a_block() -> None:
    async def victim(world: World) -> None:
        async with world.semaphore:
            await world.work()

    cancel(victim)


def test_a_block_in_a_block() -> None:
    """Of the same semaphore; the others never need all that is left."""

    async def victim(world: World) -> None:
        async with world.semaphore:
            await pause()
            async with world.semaphore:
                await world.work()

    cancel(victim, others=[World.use, World.use])


def test_a_block_with_a_cleanup_that_awaits() -> None:
    """The permits come back all the same, and not before it is over."""

    async def victim(world: World) -> None:
        async with world.semaphore.hold(2):
            try:
                await world.work(2)
            finally:
                with trio.CancelScope(shield=True):
                    await world.work(2)

    cancel(victim)


def test_a_call() -> None:
    async def victim(world: World) -> None:
        assert await world.semaphore.call(world.work) == 1

    cancel(victim)


def test_a_call_that_fails() -> None:
    async def victim(world: World) -> None:
        await world.semaphore.call(world.fail)

    cancel(victim, OSError)


def test_a_decorated_function() -> None:
    async def victim(world: World) -> None:
        assert await world.semaphore(world.work)(1) == 1

    cancel(victim)


def test_many_in_line() -> None:
    """Several tasks of the victim's wait at once, with large and small requests."""

    async def victim(world: World) -> None:
        async with trio.open_nursery() as nursery:
            for weight in (3, 1, 2):
                nursery.start_soon(world.use, weight)

    cancel(victim)


def test_a_resize_while_others_wait() -> None:
    """By the victim, and back again whatever happens; nobody gets in on what is not there."""

    async def victim(world: World) -> None:
        world.most = PERMITS + 2
        try:
            for permits in (1, PERMITS + 2, 0):
                world.semaphore.permits = permits
                await pause()
        finally:
            world.semaphore.permits = PERMITS
        await world.use()

    cancel(victim)


def test_a_wait_for_a_resize() -> None:
    """More than there are, until another task makes room; then that is taken away again."""

    async def victim(world: World) -> None:
        async with world.semaphore.hold(PERMITS + 1, wait_for_resize=True):
            await world.work(PERMITS + 1)

    async def widen(world: World) -> None:
        await pause(3)
        world.most = PERMITS + 1
        world.semaphore.permits = PERMITS + 1
        while world.semaphore.statistics().waiting:
            await pause()
        world.semaphore.permits = PERMITS

    cancel(victim, others=[World.use, partial(World.use, weight=2), widen])


@pytest.mark.parametrize("given", [True, False])
def test_a_semaphore_shared_by_two_calls_and_a_direct_user(given: bool) -> None:
    """The bound of two calls of the victim's and of one of another; and some use it directly."""

    async def victim(world: World) -> None:
        async def call() -> None:
            results = await run_with_limit(
                world.nursery if given else None,
                [world.work] * 3,
                max_concurrency=world.semaphore,
            )
            assert results == [1, 1, 1]

        async with trio.open_nursery() as calls:
            calls.start_soon(call)
            calls.start_soon(world.use, 2)
            await call()

    cancel(victim, others=[World.use_in_a_call, World.use, partial(World.use, weight=2)], seeds=1)


@pytest.mark.parametrize("given", [True, False])
def test_operations_that_fail_under_a_shared_semaphore(given: bool) -> None:
    async def victim(world: World) -> None:
        await run_with_limit(
            world.nursery if given else None,
            [world.work, world.fail, world.work],
            max_concurrency=world.semaphore,
        )

    cancel(victim, OperationsFailedError, OSError, others=[World.use_in_a_call, World.use])
