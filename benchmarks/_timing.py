"""Time one contender in this interpreter: all of them the same way."""

from __future__ import annotations

import gc
import importlib
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Final, TypeAlias

import trio
from trio.testing import MockClock

from benchmarks._runner import Figures

MICROSECONDS: Final = "µs"
"""Processor time per operation: so what else the machine does counts as little as possible."""

SECONDS_AT_LEAST = 0.25
"""A contender that is done sooner runs again."""

Run: TypeAlias = Callable[[int], Awaitable[Sequence[Any] | int]]
"""Does so many operations; returns their results, or their number if there is nothing to keep."""
Start: TypeAlias = Callable[..., float]
"""Runs an async function, called with the arguments that follow it."""


def in_asyncio(fn: Callable[..., Awaitable[float]], *args: object) -> float:
    """Run an async function where the peers live that do not know trio."""
    library: Any = importlib.import_module("asyncio")
    seconds: float = library.run(fn(*args))
    return seconds


def on_virtual_clock(fn: Callable[..., Awaitable[float]], *args: object) -> float:
    """Run an async function that waits for hours in no time."""
    return trio.run(fn, *args, clock=MockClock(autojump_threshold=0))


def timed(run: Run, start: Start = trio.run) -> Callable[[int], Figures]:
    """Return a measurement of *run*."""
    return clocked(lambda size: seconds_of(run, size), start)


def clocked(
    run: Callable[[int], Awaitable[float]], start: Start = trio.run
) -> Callable[[int], Figures]:
    """Return a measurement of *run*, which says itself how many seconds its operations took."""

    def measure(size: int) -> Figures:
        return {MICROSECONDS: start(_median, run, size) / size * 1e6}

    return measure


def line_of(waiters: int, count: int) -> range:
    """Return as many waiters as there are to be, but for a quick look, which has fewer of all."""
    return range(min(waiters, max(1, count // 2)))


async def seconds_of(run: Run, size: int) -> float:
    """Return the processor time that *run* takes, all of it."""
    start = time.process_time()
    results = await run(size)
    seconds = time.process_time() - start
    _check(results, size)
    return seconds


async def _median(run: Callable[[int], Awaitable[float]], size: int) -> float:
    # Imports are made, caches filled and byte code specialised before anything counts.
    await run(max(1, size // 20))
    seconds = list[float]()
    with _level_ground():
        while sum(seconds) < SECONDS_AT_LEAST:
            seconds.append(await run(size))
    return median(seconds)


def _check(results: Sequence[Any] | int, size: int) -> None:
    """Refuse the time of a contender that did not do its work."""
    found = results if isinstance(results, int) else list(results)
    if found not in (size, list(range(size))):
        raise RuntimeError(f"expected the results of {size} operations, got {found!r:.100}")


@contextmanager
def _level_ground() -> Generator[None]:
    """Let the garbage collector run, as it does in a program, but not over what was imported."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
