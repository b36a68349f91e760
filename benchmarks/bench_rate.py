"""What it costs to keep to a rate: when it allows what is asked for, and at the end of a line."""

from __future__ import annotations

# Nothing here gives way but what is measured, so that only that is timed.
# flake8: noqa: ASYNC124, ASYNC910
import importlib
import time
from contextlib import AbstractAsyncContextManager
from functools import partial
from itertools import repeat
from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from benchmarks._runner import Benchmark, Bound, Case
from benchmarks._timing import MICROSECONDS, clocked, in_asyncio, line_of, on_virtual_clock, timed
from trio_resilience import RateLimiter

CALL = "RateLimiter.call"
BARE = "bare await"
AIOLIMITER = "aiolimiter (asyncio)"
HYX = "hyx tokenbucket (asyncio)"
THROTTLED = "throttled-py, gcra (asyncio)"
PYRATE = "pyrate-limiter, gcra (asyncio)"

BLOCK = "async with RateLimiter"

PLENTY = 1_000_000_000
"""So many per second, and at once, that nothing ever waits."""

FEW, MANY = 100, 10_000


async def succeed() -> int:
    """Return at once."""
    return 1


async def bare(count: int) -> int:
    """Await it, and nothing else."""
    for _ in repeat(None, count):
        await succeed()
    return count


async def ours(count: int) -> int:
    """Call it under a limiter."""
    limiter = RateLimiter(PLENTY, burst=PLENTY)
    for _ in repeat(None, count):
        await limiter.call(succeed)
    return count


async def ours_block(count: int) -> int:
    """Await it in a block, which gives way once more."""
    return await _await_in_blocks(RateLimiter(PLENTY, burst=PLENTY), count)


async def aiolimiter(count: int) -> int:
    """Await it in a block of aiolimiter's."""
    library: Any = importlib.import_module("aiolimiter")
    return await _await_in_blocks(library.AsyncLimiter(PLENTY, 1), count)


async def hyx(count: int) -> int:
    """Await it in a block of hyx's."""
    library: Any = importlib.import_module("hyx.ratelimit")
    return await _await_in_blocks(library.tokenbucket(PLENTY, 1), count)


async def throttled(count: int) -> int:
    """Await it in a block of throttled-py's, which looks its state up under a key."""
    library: Any = importlib.import_module("throttled.asyncio")
    quota = library.rate_limiter.per_sec(PLENTY, burst=PLENTY)
    store = library.store.MemoryStore()
    limiter = library.Throttled(key="key", using="gcra", quota=quota, store=store)
    return await _await_in_blocks(limiter, count)


async def pyrate(count: int) -> int:
    """Await it after a limiter of pyrate-limiter's has let it pass."""
    library: Any = importlib.import_module("pyrate_limiter")
    bucket = library.StateBucket([library.Rate(PLENTY, library.Duration.SECOND)])
    # Its clean-up would be a thread; this bucket has nothing to clean up.
    limiter = library.Limiter(library.limiter.SingleBucketFactory(bucket, schedule_leak=False))
    for _ in repeat(None, count):
        await limiter.try_acquire_async("key")
        await succeed()
    return count


async def _await_in_blocks(block: AbstractAsyncContextManager[object, None], count: int) -> int:
    for _ in repeat(None, count):
        async with block:
            await succeed()
    return count


async def admissions(waiters: int, count: int) -> float:
    """Return the seconds of so many admissions from a line that never gets shorter."""
    limiter, left, ended = RateLimiter(1000), count, 0.0

    async def stand_in_line() -> None:
        nonlocal left, ended
        while left > 0:
            await limiter.acquire()
            left -= 1
            if left == 0:
                ended = time.process_time()

    await limiter.acquire()
    async with trio.open_nursery() as nursery:
        for _ in line_of(waiters, count):
            nursery.start_soon(stand_in_line)
        await wait_all_tasks_blocked()
        started = time.process_time()
    return ended - started


_bound = partial(Bound, figure=MICROSECONDS)

_lines = tuple(
    Case(f"{waiters:,} in line", clocked(partial(admissions, waiters), on_virtual_clock))
    for waiters in (FEW, MANY)
)

BENCHMARKS = (
    Benchmark(
        module="benchmarks.bench_rate",
        name="call at a rate",
        about="An operation that returns at once, at a rate that is never reached",
        cases=(
            Case(CALL, timed(ours)),
            Case(BLOCK, timed(ours_block)),
            Case(BARE, timed(bare)),
            Case(AIOLIMITER, timed(aiolimiter, in_asyncio), package="aiolimiter"),
            Case(HYX, timed(hyx, in_asyncio), package="hyx"),
            Case(THROTTLED, timed(throttled, in_asyncio), package="throttled"),
            Case(PYRATE, timed(pyrate, in_asyncio), package="pyrate_limiter"),
        ),
        bounds=(_bound(case=CALL, relative_to=AIOLIMITER, at_most=1.0),),
    ),
    Benchmark(
        module="benchmarks.bench_rate",
        name="admission at a rate",
        about="An admission, on the virtual clock, when who is let in goes to the end of the line",
        cases=_lines,
        bounds=(_bound(case=_lines[1].name, relative_to=_lines[0].name, at_most=1.5),),
    ),
)
