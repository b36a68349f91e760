"""What it costs to take a permit and give it back, whether it is free or there is a line."""

from __future__ import annotations

# Nothing here gives way but what is measured, so that only that is timed.
# flake8: noqa: ASYNC124, ASYNC910
import importlib
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from itertools import repeat
from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from benchmarks._runner import Benchmark, Bound, Case
from benchmarks._timing import MICROSECONDS, clocked, in_asyncio, line_of, seconds_of, timed
from trio_resilience import Bulkhead, Semaphore

Permit = AbstractAsyncContextManager[object, None]

BLOCK = "async with Semaphore"
BLOCK_TRIO = "async with trio.CapacityLimiter"
BLOCK_TRIO_SEMAPHORE = "async with trio.Semaphore"
BLOCK_HYX = "async with hyx bulkhead (asyncio)"

CALL = "Bulkhead.call"
CALL_SEMAPHORE = "Semaphore.call"
CALL_ALLOWED = "0.6 CapacityLimiter + bare await"
CALL_TRIO = "async with trio.CapacityLimiter, await"
CALL_BARE = "bare await"
CALL_HYX = "hyx bulkhead (asyncio)"

SHARE = 0.6
"""How much of `BLOCK_TRIO` may come on top of the operation: less than a trip to the scheduler."""

FEW, MANY = 100, 10_000


async def block(permit: Permit, count: int) -> int:
    """Take a permit and give it back."""
    for _ in repeat(None, count):
        async with permit:
            pass
    return count


async def call(fn: Callable[..., Awaitable[object]], count: int) -> int:
    """Call an operation of one checkpoint by way of *fn*."""
    for _ in repeat(None, count):
        await fn(trio.lowlevel.checkpoint)
    return count


async def call_in_block(permit: Permit, count: int) -> int:
    """Take a permit, await the operation, and give the permit back."""
    for _ in repeat(None, count):
        async with permit:
            await trio.lowlevel.checkpoint()
    return count


async def bare(count: int) -> int:
    """Await the operation, and nothing else."""
    for _ in repeat(None, count):
        await trio.lowlevel.checkpoint()
    return count


async def allowed(count: int) -> float:
    """Add up the seconds that a call may take: both parts in turns, in one process."""
    taken = await seconds_of(partial(block, trio.CapacityLimiter(10)), count)
    return SHARE * taken + await seconds_of(bare, count)


def _hyx() -> Any:
    return importlib.import_module("hyx.bulkhead").bulkhead(10, 20)


async def hyx_block(count: int) -> int:
    """Take a place in a bulkhead of hyx; it does not give way."""
    return await block(_hyx(), count)


async def hyx_call(count: int) -> int:
    """Call an operation that gives way once in a bulkhead of hyx."""
    library: Any = importlib.import_module("asyncio")
    fn = _hyx()(library.sleep)
    for _ in repeat(None, count):
        await fn(0)
    return count


async def admissions(make_permit: Callable[[], Permit], waiters: int, count: int) -> float:
    """Return the seconds of so many admissions from a line that never gets shorter."""
    permit, left, ended = make_permit(), count, 0.0

    async def stand_in_line() -> None:
        nonlocal left, ended
        while left > 0:
            async with permit:
                left -= 1
                if left == 0:
                    ended = time.process_time()

    async with trio.open_nursery() as nursery, permit:
        for _ in line_of(waiters, count):
            nursery.start_soon(stand_in_line)
        await wait_all_tasks_blocked()
        started = time.process_time()
    return ended - started


def in_line(name: str, make_permit: Callable[[], Permit]) -> list[Case]:
    """Return the cases of a short line and of a long one."""
    return [
        Case(f"{name}, {waiters:,} in line", clocked(partial(admissions, make_permit, waiters)))
        for waiters in (FEW, MANY)
    ]


def _lines() -> Benchmark:
    """Compare the cost of an admission from a long line with that from a short one."""
    kinds: dict[str, Callable[[], Permit]] = {
        "Semaphore": partial(Semaphore, 1),
        "trio.CapacityLimiter": partial(trio.CapacityLimiter, 1),
        "trio.Semaphore": partial(trio.Semaphore, 1),
    }
    cases = tuple(case for name, make in kinds.items() for case in in_line(name, make))
    return Benchmark(
        module="benchmarks.bench_permits",
        name="admission to a permit",
        about="An admission, when every holder goes to the end of the line at once",
        cases=cases,
        bounds=(_bound(case=cases[1].name, relative_to=cases[0].name, at_most=1.5),),
    )


_bound = partial(Bound, figure=MICROSECONDS)

BENCHMARKS = (
    Benchmark(
        module="benchmarks.bench_permits",
        name="permit",
        about="A permit that is free, taken and given back",
        cases=(
            Case(BLOCK, timed(partial(block, Semaphore(10)))),
            Case(BLOCK_TRIO, timed(partial(block, trio.CapacityLimiter(10)))),
            Case(BLOCK_TRIO_SEMAPHORE, timed(partial(block, trio.Semaphore(10)))),
            Case(BLOCK_HYX, timed(hyx_block, in_asyncio), package="hyx"),
        ),
        bounds=(_bound(case=BLOCK, relative_to=BLOCK_TRIO, at_most=1.3),),
    ),
    Benchmark(
        module="benchmarks.bench_permits",
        name="call with a permit",
        about="An operation of one checkpoint, called with a permit that is free",
        cases=(
            Case(CALL, timed(partial(call, Bulkhead(10).call))),
            Case(CALL_SEMAPHORE, timed(partial(call, Semaphore(10).call))),
            Case(CALL_ALLOWED, clocked(allowed)),
            Case(CALL_TRIO, timed(partial(call_in_block, trio.CapacityLimiter(10)))),
            Case(CALL_BARE, timed(bare)),
            Case(CALL_HYX, timed(hyx_call, in_asyncio), package="hyx"),
        ),
        bounds=(
            _bound(case=CALL, relative_to=CALL_ALLOWED, at_most=1.0),
            _bound(case=CALL_SEMAPHORE, relative_to=CALL_ALLOWED, at_most=1.0),
        ),
    ),
    _lines(),
)
