"""Bulkhead, cancelled at every instant: no permit is lost, no place in line, no count is wrong."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from tests.test_cancellation_permits import PERMITS, World, cancel
from trio_resilience import (
    Bulkhead,
    BulkheadFullError,
    Constant,
    Retry,
    Timeout,
    run_with_limit,
)
from trio_resilience.testing import pause

pytestmark = pytest.mark.watchdog(180)


async def be_refused(world: World, bulkhead: Bulkhead | None = None) -> None:
    """Call, and count whether it was refused."""
    try:
        await (bulkhead or world.bulkhead).call(world.work)
    except BulkheadFullError:
        world.refused += 1


@pytest.mark.parametrize("way", ["acquire", "block", "call"])
def test_a_bulkhead(way: str) -> None:
    async def victim(world: World) -> None:
        if way == "call":
            assert await world.bulkhead.call(world.work) == 1
        elif way == "block":
            async with world.bulkhead:
                await world.work()
        else:
            await world.bulkhead.acquire()
            try:
                await world.work()
            finally:
                world.bulkhead.release()

    cancel(victim, others=[World.use_bulkhead] * 4)


def test_a_bulkhead_with_a_full_line() -> None:
    """Some of the victim's are refused, and no more than there is no room for."""

    async def victim(world: World) -> None:
        world.bulkhead = Bulkhead(PERMITS, queue_size=1)
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(be_refused, world)
        assert world.refused == 2

    cancel(victim, others=[])


def test_a_bulkhead_that_nobody_may_wait_for() -> None:
    async def victim(world: World) -> None:
        world.bulkhead = Bulkhead(PERMITS, queue_size=0)
        async with world.bulkhead, world.bulkhead, world.bulkhead:
            await be_refused(world)
            await pause()
        assert world.refused == 1

    cancel(victim, others=[])


@pytest.mark.parametrize("max_wait", [0, 1])
def test_a_bulkhead_that_is_waited_for_in_vain(max_wait: float) -> None:
    """The wait ends by its own limit; that is a rejection, and a cancellation is none."""

    async def victim(world: World) -> None:
        world.bulkhead = Bulkhead(PERMITS, max_wait=max_wait)
        async with world.bulkhead, world.bulkhead, world.bulkhead:
            await be_refused(world)
            await pause()
        assert world.refused == 1

    cancel(victim, others=[])


def test_a_permit_that_comes_when_the_wait_is_over() -> None:
    """At the same instant: whatever becomes of the victim, the permit is not lost."""

    async def victim(world: World) -> None:
        world.bulkhead = Bulkhead(PERMITS, max_wait=1)
        async with trio.open_nursery() as nursery:
            for _ in range(PERMITS):
                nursery.start_soon(world.bulkhead.call, trio.sleep, 1)
            await pause(2)
            await be_refused(world)
            await pause()

    cancel(victim, others=[])


def test_a_stack_of_policies() -> None:
    """Semaphore, retry, bulkhead and timeout, in many operations: all counters of all layers."""

    async def victim(world: World) -> None:
        world.most = 2 * PERMITS  # the others use one of the two alone
        retry, timeout = Retry(max_attempts=3, backoff=Constant(1), on=OSError), Timeout(30)
        tried = 0

        async def flaky() -> int:
            nonlocal tried
            tried += 1
            return await (world.fail() if tried == 1 else world.work())

        async def op() -> int:
            return await world.semaphore.call(
                partial(retry.call, partial(world.bulkhead.call, partial(timeout.call, flaky)))
            )

        try:
            results = await run_with_limit(world.nursery, [op] * 4, max_concurrency=2)
            assert results == [1] * 4
        finally:
            statistics = retry.statistics()
            assert statistics.attempts <= statistics.calls + 1
            assert timeout.statistics().timed_out == 0
            assert statistics.given_up == 0

    cancel(victim, others=[World.use, World.use_bulkhead], seeds=1)
