"""What is in memory at the same time while operations from a generator pass through a stream."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Final, final

import attrs
import trio

from benchmarks._runner import Benchmark, Bound, Case, Figures
from benchmarks.bench_concurrency import operation
from trio_resilience import stream_with_limit

COUNT = 1_000_000
COUNT_TRACED = 100_000
AT_ONCE = 100
MIB = 2**20

ALLOCATED: Final = "MiB allocated"
"""What Python's allocator gave out at the peak, beyond what it had given out before.

Exact, but tracing takes seven times as long, so fewer operations pass.
"""
RESIDENT: Final = "MiB resident"
"""What the process occupied at its peak, beyond what it occupied before.

What the machine pays; but what the process had at hand from before, freed, does not show.
"""
TASKS: Final = "tasks"
"""How many tasks were alive at the same time, beyond those before."""


@final
class LiveTasks(trio.abc.Instrument):
    """Count the tasks that are started, and remember the most that were alive."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0

    def task_spawned(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - trio's signature
        """Count one more."""
        self.now += 1
        self.peak = max(self.peak, self.now)

    def task_exited(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - trio's signature
        """Count one less."""
        self.now -= 1


async def consume(count: int, tasks: LiveTasks) -> None:
    """Stream so many operations, and check that each delivered its result."""
    ops = (partial(operation, index) for index in range(count))
    trio.lowlevel.add_instrument(tasks)
    total = 0
    async with stream_with_limit(None, ops, max_concurrency=AT_ONCE) as results:
        async for _, result in results:
            total += result
    trio.lowlevel.remove_instrument(tasks)
    if total != count * (count - 1) // 2:
        raise RuntimeError(f"{count} operations added up to {total}")


@attrs.frozen
class _Status:
    """What the operating system says about this process, in bytes."""

    resident: int
    peak: int

    @classmethod
    def read(cls) -> _Status:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        kib = [int(fields[name].split()[0]) for name in ("VmRSS", "VmHWM")]
        return cls(kib[0] * 1024, kib[1] * 1024)


async def resident(count: int) -> Figures:
    """Ask the operating system, which says it only on Linux."""
    tasks = LiveTasks()
    gc.collect()
    before = _Status.read()
    await consume(count, tasks)
    # If the peak dates from before, from the imports, this says too much.
    return {RESIDENT: (_Status.read().peak - before.resident) / MIB, TASKS: tasks.peak}


async def allocated(count: int) -> Figures:
    """Trace every allocation."""
    tasks = LiveTasks()
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        await consume(count, tasks)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return {ALLOCATED: (peak - before) / MIB, TASKS: tasks.peak}


def _in_trio(run: Callable[[int], Awaitable[Figures]]) -> Callable[[int], Figures]:
    return lambda count: trio.run(run, count)


_traced, _resident = "stream_with_limit, traced", "stream_with_limit"
_cases = [Case(_traced, _in_trio(allocated), COUNT_TRACED)]
_bounds = [
    Bound(case=_traced, figure=ALLOCATED, at_most=8.0),
    Bound(case=_traced, figure=TASKS, at_most=AT_ONCE + 3),
]
if sys.platform == "linux":
    _cases.append(Case(_resident, _in_trio(resident), COUNT))
    _bounds += [
        Bound(case=_resident, figure=RESIDENT, at_most=8.0),
        Bound(case=_resident, figure=TASKS, at_most=AT_ONCE + 3),
    ]

BENCHMARKS = (
    Benchmark(
        module="benchmarks.bench_stream",
        name="memory",
        about=f"Operations of one checkpoint from a generator, {AT_ONCE} at a time",
        cases=tuple(_cases),
        bounds=tuple(_bounds),
        most_rounds=1,
    ),
)
