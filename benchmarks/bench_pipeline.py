"""What it costs a call that succeeds at once to have several policies around it."""

from __future__ import annotations

# Nothing here gives way but what a policy waits for itself, so that only the policies are timed.
# flake8: noqa: ASYNC124, ASYNC910
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import repeat
from typing import Any

import trio

from benchmarks._runner import Benchmark, Bound, Case
from benchmarks._timing import MICROSECONDS, clocked, seconds_of, timed
from trio_resilience import (
    Bulkhead,
    CircuitBreaker,
    Fallback,
    Hedge,
    Pipeline,
    Retry,
    RetryBudget,
    Timeout,
)

PIPELINE = "Pipeline of five, beyond a bare await"
PARTS = "its five policies one by one, each beyond a bare await"
NESTED = "the five nested by hand, beyond a bare await"
BARE = "bare await"
HEDGE = "Hedge.call"
HEDGE_BY_HAND = "a nursery, a task and a time limit by hand"
FALLBACK = "Fallback.call"
FALLBACK_BY_HAND = "try and except by hand"
RETRY = "Retry.call"
RETRY_BUDGET = "Retry(budget=...).call"


async def succeed() -> int:
    """Return at once."""
    return 1


def five() -> tuple[Timeout, Retry, CircuitBreaker, Bulkhead, Timeout]:
    """Return the policies, the outermost first."""
    return Timeout(30), Retry(), CircuitBreaker(), Bulkhead(10), Timeout(10)


async def bare(count: int) -> int:
    """Await it, and nothing else."""
    for _ in repeat(None, count):
        await succeed()
    return count


async def call(fn: Callable[..., Awaitable[object]], count: int) -> int:
    """Call it by way of *fn*."""
    for _ in repeat(None, count):
        await fn(succeed)
    return count


async def beyond_bare(fns: tuple[Callable[..., Awaitable[object]], ...], count: int) -> float:
    """Add up the seconds that each of *fns* takes beyond a bare await: in turns, in one process."""
    taken = [await seconds_of(partial(call, fn), count) for fn in fns]
    return sum(taken) - len(fns) * await seconds_of(bare, count)


async def pipeline(count: int) -> float:
    """Call it through all five as one."""
    return await beyond_bare((Pipeline(*five()).call,), count)


async def parts(count: int) -> float:
    """Call it through each of the five alone."""
    return await beyond_bare(tuple(policy.call for policy in five()), count)


async def nested(count: int) -> float:
    """Call it through all five, each of which is told to call the next."""
    *outer, innermost = five()
    through: Callable[..., Awaitable[Any]] = innermost.call
    for policy in reversed(outer):
        through = partial(policy.call, through)
    return await beyond_bare((through,), count)


async def hedge_by_hand(count: int) -> int:
    """Run it in a task, and wait for it for so long."""
    for _ in repeat(None, count):
        with trio.move_on_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(succeed)
    return count


async def fallback_by_hand(count: int) -> int:
    """Be ready to return something else."""
    for _ in repeat(None, count):
        await _succeed_or_not()
    return count


async def _succeed_or_not() -> int:
    try:
        return await succeed()
    except Exception:  # noqa: BLE001 - it is what is compared
        return 0


_bound = partial(Bound, figure=MICROSECONDS)

BENCHMARKS = (
    Benchmark(
        module="benchmarks.bench_pipeline",
        name="pipeline",
        about="A call that succeeds at once, through policies that have nothing to do for it",
        cases=(
            Case(PIPELINE, clocked(pipeline)),
            Case(PARTS, clocked(parts)),
            Case(NESTED, clocked(nested)),
            Case(BARE, timed(bare)),
            Case(HEDGE, timed(partial(call, Hedge(after=10).call))),
            Case(HEDGE_BY_HAND, timed(hedge_by_hand)),
            Case(FALLBACK, timed(partial(call, Fallback(value=0).call))),
            Case(FALLBACK_BY_HAND, timed(fallback_by_hand)),
            Case(RETRY, timed(partial(call, Retry().call))),
            Case(RETRY_BUDGET, timed(partial(call, Retry(budget=RetryBudget()).call))),
        ),
        bounds=(_bound(case=PIPELINE, relative_to=PARTS, at_most=1.2),),
    ),
)
