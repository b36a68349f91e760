"""What it costs a call that succeeds at once to be ready for its failure."""

from __future__ import annotations

# Nothing here gives way, so that only the calls are timed.
# flake8: noqa: ASYNC124, ASYNC910
import importlib
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import repeat
from typing import Any

from benchmarks._runner import Benchmark, Bound, Case
from benchmarks._timing import MICROSECONDS, timed
from trio_resilience import Retry

OURS = "Retry.call"
OURS_DECORATED = "@Retry()"
BARE = "bare await"
TENACITY = "tenacity AsyncRetrying"
TENACITY_DECORATED = "tenacity @retry"
STAMINA = "stamina @retry"
STAMINA_CALLER = "stamina AsyncRetryingCaller"


async def succeed() -> int:
    """Return at once."""
    return 1


async def bare(count: int) -> int:
    """Await it, and nothing else."""
    for _ in repeat(None, count):
        await succeed()
    return count


async def ours(count: int) -> int:
    """Call it under a policy."""
    retry = Retry()
    for _ in repeat(None, count):
        await retry.call(succeed)
    return count


async def ours_decorated(count: int) -> int:
    """Call it decorated with a policy."""
    return await _call_often(Retry()(succeed), count)


async def tenacity_called(count: int) -> int:
    """Call it under a policy of tenacity's."""
    library: Any = importlib.import_module("tenacity")
    retrying = library.AsyncRetrying(stop=library.stop_after_attempt(3))
    for _ in repeat(None, count):
        await retrying(succeed)
    return count


async def tenacity_decorated(count: int) -> int:
    """Call it decorated by tenacity."""
    library: Any = importlib.import_module("tenacity")
    return await _call_often(library.retry(stop=library.stop_after_attempt(3))(succeed), count)


async def stamina_called(count: int) -> int:
    """Call it under a policy of stamina's."""
    library: Any = importlib.import_module("stamina")
    caller = library.AsyncRetryingCaller(attempts=3)
    for _ in repeat(None, count):
        await caller(Exception, succeed)
    return count


async def stamina_decorated(count: int) -> int:
    """Call it decorated by stamina."""
    library: Any = importlib.import_module("stamina")
    return await _call_often(library.retry(on=Exception, attempts=3)(succeed), count)


async def _call_often(fn: Callable[[], Awaitable[object]], count: int) -> int:
    for _ in repeat(None, count):
        await fn()
    return count


_bound = partial(Bound, figure=MICROSECONDS)

BENCHMARKS = (
    Benchmark(
        module="benchmarks.bench_retry",
        name="success",
        about="A call that succeeds at the first attempt, at once",
        cases=(
            Case(OURS, timed(ours)),
            Case(OURS_DECORATED, timed(ours_decorated)),
            Case(BARE, timed(bare)),
            Case(TENACITY, timed(tenacity_called), package="tenacity"),
            Case(TENACITY_DECORATED, timed(tenacity_decorated), package="tenacity"),
            Case(STAMINA, timed(stamina_decorated), package="stamina"),
            Case(STAMINA_CALLER, timed(stamina_called), package="stamina"),
        ),
        bounds=(
            _bound(case=OURS, relative_to=BARE, at_most=6.0),
            _bound(case=TENACITY, relative_to=OURS, at_least=30.0),
            _bound(case=TENACITY_DECORATED, relative_to=OURS, at_least=30.0),
            _bound(case=STAMINA, relative_to=OURS, at_least=25.0),
            _bound(case=STAMINA_CALLER, relative_to=OURS, at_least=25.0),
        ),
    ),
)
