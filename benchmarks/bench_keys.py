"""What it costs to bound how many operations run at a time for each key, too."""

from __future__ import annotations

from functools import partial

from benchmarks._runner import Benchmark, Bound, Case
from benchmarks._timing import MICROSECONDS, timed
from benchmarks.bench_concurrency import operation
from trio_resilience import map_with_limit

PLAIN = "map_with_limit"
FREE = "map_with_limit, keys that are free"
BUSY = "map_with_limit, keys that are busy"

AT_ONCE = 100
PER_KEY = 2
MANY_KEYS, FEW_KEYS = 1_000, 10


async def plain(count: int) -> list[int]:
    """Run as many at once as there are workers."""
    return await map_with_limit(None, operation, range(count), max_concurrency=AT_ONCE)


async def keyed(keys: int, count: int) -> list[int]:
    """Run two at once for each of so many keys, which take turns."""
    return await map_with_limit(
        None,
        operation,
        range(count),
        max_concurrency=AT_ONCE,
        key=lambda index: index % keys,
        max_per_key=PER_KEY,
    )


_bound = partial(Bound, figure=MICROSECONDS)

BENCHMARKS = (
    Benchmark(
        module="benchmarks.bench_keys",
        name="keys",
        about=f"Operations of one checkpoint, {AT_ONCE} at a time, {PER_KEY} for each key",
        cases=(
            Case(FREE, timed(partial(keyed, MANY_KEYS))),
            Case(BUSY, timed(partial(keyed, FEW_KEYS))),
            Case(PLAIN, timed(plain)),
        ),
        bounds=(
            _bound(case=FREE, relative_to=PLAIN, at_most=3.0),
            _bound(case=BUSY, relative_to=PLAIN, at_most=5.0),
        ),
    ),
)
