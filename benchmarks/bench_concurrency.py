"""What it costs to bound how many operations, of exactly one checkpoint each, run at a time."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import trio

from benchmarks._runner import Benchmark, Bound, Case
from benchmarks._timing import MICROSECONDS, timed
from trio_resilience import run_with_limit

OURS = "run_with_limit"
OURS_TIMED = "run_with_limit, timeout=10"
BY_HAND = "workers written by hand"
LIMITER = "nursery + CapacityLimiter"
AIOMETER = "aiometer.run_all"


async def operation(index: int) -> int:
    """Give way once, and return *index*."""
    await trio.lowlevel.checkpoint()
    return index


def operations(count: int) -> list[Callable[[], Awaitable[int]]]:
    """Return so many operations that return their numbers."""
    return [partial(operation, index) for index in range(count)]


async def ours(at_once: int, count: int) -> list[int]:
    """Run them with `run_with_limit`."""
    return await run_with_limit(None, operations(count), max_concurrency=at_once)


async def ours_timed(at_once: int, count: int) -> list[int]:
    """Run them with `run_with_limit`, each under a timeout."""
    return await run_with_limit(None, operations(count), max_concurrency=at_once, timeout=10)


async def workers_by_hand(at_once: int, count: int) -> list[int]:
    """Run them in the least code that does it: no errors, no context, no cancellation of one."""
    results = [-1] * count
    source = enumerate(operations(count))
    async with trio.open_nursery() as nursery:
        for _ in range(at_once):
            nursery.start_soon(_work, source, results)
    return results


async def _work(  # noqa: ASYNC910 - the operations are what gives way
    source: Iterator[tuple[int, Callable[[], Awaitable[int]]]], results: list[int]
) -> None:
    for index, fn in source:
        results[index] = await fn()


async def nursery_and_limiter(at_once: int, count: int) -> list[int]:
    """Run each in a task of its own, started up front, that waits for a permit."""
    results = [-1] * count
    limiter = trio.CapacityLimiter(at_once)

    async def run(index: int, fn: Callable[[], Awaitable[int]]) -> None:
        async with limiter:
            results[index] = await fn()

    async with trio.open_nursery() as nursery:
        for index, fn in enumerate(operations(count)):
            nursery.start_soon(run, index, fn)
    return results


async def aiometer(at_once: int, count: int) -> list[int]:
    """Run them with aiometer, which is on trio through anyio."""
    library: Any = importlib.import_module("aiometer")
    results: list[int] = await library.run_all(operations(count), max_at_once=at_once)
    return results


def _benchmark(at_once: int, *, at_most: float, at_most_timed: float) -> Benchmark:
    contenders = (ours, ours_timed, workers_by_hand, nursery_and_limiter)
    names = (OURS, OURS_TIMED, BY_HAND, LIMITER)
    cases = [
        Case(name, timed(partial(run, at_once)))
        for name, run in zip(names, contenders, strict=True)
    ]
    bound = partial(Bound, figure=MICROSECONDS)
    return Benchmark(
        module="benchmarks.bench_concurrency",
        name=f"{at_once} at once",
        about=f"Operations of one checkpoint, {at_once} at a time",
        cases=(*cases, Case(AIOMETER, timed(partial(aiometer, at_once)), package="aiometer")),
        bounds=(
            bound(case=OURS, relative_to=BY_HAND, at_most=at_most),
            bound(case=OURS_TIMED, relative_to=BY_HAND, at_most=at_most_timed),
            bound(case=LIMITER, relative_to=OURS, at_least=4.5),
            bound(case=AIOMETER, relative_to=OURS, at_least=8.0),
        ),
    )


BENCHMARKS = (
    _benchmark(5, at_most=1.7, at_most_timed=3.0),
    _benchmark(100, at_most=2.0, at_most_timed=3.6),
)
