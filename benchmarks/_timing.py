"""Time one contender in this interpreter: all of them the same way."""

from __future__ import annotations

import gc
import time
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, Final

import trio

from benchmarks._runner import Figures

MICROSECONDS: Final = "µs"
"""Processor time per operation: so what else the machine does counts as little as possible."""

SECONDS_AT_LEAST = 0.25
"""A contender that is done sooner runs again."""


def timed(
    run: Callable[[int], Awaitable[Sequence[Any] | int]],
) -> Callable[[int], Figures]:
    """Return a measurement of *run*, which does so many operations and returns their results.

    (Or their number, if there is nothing to keep.)
    """

    def measure(size: int) -> Figures:
        return {MICROSECONDS: trio.run(_seconds, run, size) / size * 1e6}

    return measure


async def _seconds(run: Callable[[int], Awaitable[Sequence[Any] | int]], size: int) -> float:
    # Imports are made, caches filled and byte code specialised before the clock starts.
    _check(await run(max(1, size // 20)), max(1, size // 20))
    seconds = list[float]()
    with _level_ground():
        while sum(seconds) < SECONDS_AT_LEAST:
            start = time.process_time()
            results = await run(size)
            seconds.append(time.process_time() - start)
            _check(results, size)
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
