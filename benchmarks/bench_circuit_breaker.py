"""What it costs to go through a circuit that is closed, and to be refused by one that is open."""

from __future__ import annotations

# Nothing here gives way, so that only the calls are timed, but where a refusal does.
# flake8: noqa: ASYNC124, ASYNC910
import importlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from itertools import repeat
from typing import Any

import trio

from benchmarks._runner import Benchmark, Bound, Case
from benchmarks._timing import MICROSECONDS, in_asyncio, timed
from trio_resilience import CircuitBreaker, CircuitOpenError

OURS = "CircuitBreaker.call"
OURS_DECORATED = "@CircuitBreaker()"
OURS_GUARD = "async with CircuitBreaker.guard"
OURS_RATE = "CircuitBreaker.call, rate in window_calls"
OURS_RATE_IN_TIME = "CircuitBreaker.call, rate in window_seconds"
BARE = "bare await"
BARE_SYNC = "bare call, sync"
HYX = "hyx @consecutive_breaker (asyncio)"
PURGATORY = "purgatory async with (asyncio)"
PURGATORY_DECORATED = "purgatory decorator (asyncio)"
PURGATORY_KEPT = "purgatory async with, breaker kept (asyncio)"
AIOBREAKER = "aiobreaker call_async (asyncio)"
PYBREAKER = "pybreaker call (sync)"
INTERLOCK = "interlock call_async, rate (asyncio)"

REFUSED = "refused by CircuitBreaker.call"
PLAIN = "a plain exception through as many frames"
CHECKPOINT = "the checkpoint of either"


async def succeed() -> int:
    """Return at once."""
    return 1


def succeed_sync() -> int:
    """Return at once."""
    return 1


async def call_often(fn: Callable[..., Awaitable[object]], count: int, *args: object) -> int:
    """Call *fn*, and nothing else."""
    for _ in repeat(None, count):
        await fn(*args)
    return count


async def bare(count: int) -> int:
    """Await it, and nothing else."""
    for _ in repeat(None, count):
        await succeed()
    return count


async def bare_sync(count: int) -> int:
    """Call it, and nothing else."""
    for _ in repeat(None, count):
        succeed_sync()
    return count


async def ours(make: Callable[[], CircuitBreaker], count: int) -> int:
    """Call it through a circuit."""
    breaker = make()
    for _ in repeat(None, count):
        await breaker.call(succeed)
    return count


async def ours_decorated(count: int) -> int:
    """Call it decorated with a circuit."""
    return await call_often(CircuitBreaker()(succeed), count)


async def ours_in_block(count: int) -> int:
    """Await it in a block that a circuit watches."""
    breaker = CircuitBreaker()
    for _ in repeat(None, count):
        async with breaker.guard():
            await succeed()
    return count


async def hyx_decorated(count: int) -> int:
    """Call it decorated by hyx, which has no other way to call a function."""
    library: Any = importlib.import_module("hyx.circuitbreaker")
    return await call_often(library.consecutive_breaker()(succeed), count)


async def purgatory_in_block(count: int) -> int:
    """Await it in a block of purgatory's, as documented: the breaker is looked up for each."""
    factory = importlib.import_module("purgatory").AsyncCircuitBreakerFactory()
    for _ in repeat(None, count):
        async with await factory.get_breaker("circuit"):
            await succeed()
    return count


async def purgatory_in_block_kept(count: int) -> int:
    """Look it up only once, which goes well as long as nothing shares its state: no bound on it."""
    factory = importlib.import_module("purgatory").AsyncCircuitBreakerFactory()
    breaker = await factory.get_breaker("circuit")
    for _ in repeat(None, count):
        async with breaker:
            await succeed()
    return count


async def purgatory_decorated(count: int) -> int:
    """Call it decorated by purgatory, which looks the breaker up for each call."""
    factory = importlib.import_module("purgatory").AsyncCircuitBreakerFactory()
    return await call_often(factory("circuit")(succeed), count)


async def aiobreaker_called(count: int) -> int:
    """Call it through a circuit of aiobreaker's."""
    breaker: Any = importlib.import_module("aiobreaker").CircuitBreaker()
    for _ in repeat(None, count):
        await breaker.call_async(succeed)
    return count


async def pybreaker_called(count: int) -> int:
    """Call the synchronous one through a circuit of pybreaker's, which has a lock for threads."""
    breaker: Any = importlib.import_module("pybreaker").CircuitBreaker()
    for _ in repeat(None, count):
        breaker.call(succeed_sync)
    return count


async def interlock_called(count: int) -> int:
    """Call it through a circuit of interlock's, which always watches a rate."""
    breaker: Any = importlib.import_module("interlock").CircuitBreaker(name="circuit")
    for _ in repeat(None, count):
        await breaker.call_async(succeed)
    return count


# --- refusals -------------------------------------------------------------------------------------


async def fail() -> None:
    """Raise what opens a circuit."""
    raise ConnectionError("it is down")


async def refused(count: int) -> int:
    """Catch what an open circuit raises."""
    breaker = CircuitBreaker(failure_threshold=1)
    with suppress(ConnectionError):
        await breaker.call(fail)
    found = 0
    for _ in repeat(None, count):
        try:
            await breaker.call(succeed)
        except CircuitOpenError:
            found += 1
    return found


async def plain(count: int) -> int:
    """Catch what is raised, after a checkpoint, as many frames further in as a refusal is."""
    found = 0
    for _ in repeat(None, count):
        try:
            await raise_further_in()
        except ConnectionError:
            found += 1
    return found


async def raise_further_in() -> None:
    """Raise a plain exception, after a checkpoint, as far in as a breaker raises its own."""
    await _give_way_and_raise()


async def _give_way_and_raise() -> None:
    await trio.lowlevel.checkpoint()
    raise ConnectionError("it is down")


async def checkpoints(count: int) -> int:
    """Give way, and nothing else."""
    return await call_often(trio.lowlevel.checkpoint, count)


def _rate(**window: Any) -> CircuitBreaker:
    return CircuitBreaker(failure_threshold=None, failure_rate=0.5, **window)


_bound = partial(Bound, figure=MICROSECONDS)

BENCHMARKS = (
    Benchmark(
        module="benchmarks.bench_circuit_breaker",
        name="closed circuit",
        about="A call that succeeds at once, through a circuit that is closed",
        cases=(
            Case(OURS, timed(partial(ours, CircuitBreaker))),
            Case(OURS_DECORATED, timed(ours_decorated)),
            Case(OURS_GUARD, timed(ours_in_block)),
            Case(OURS_RATE, timed(partial(ours, _rate))),
            Case(OURS_RATE_IN_TIME, timed(partial(ours, partial(_rate, window_seconds=30)))),
            Case(BARE, timed(bare)),
            Case(BARE_SYNC, timed(bare_sync)),
            Case(HYX, timed(hyx_decorated, in_asyncio), package="hyx"),
            Case(PURGATORY, timed(purgatory_in_block, in_asyncio), package="purgatory"),
            Case(PURGATORY_DECORATED, timed(purgatory_decorated, in_asyncio), package="purgatory"),
            Case(PURGATORY_KEPT, timed(purgatory_in_block_kept, in_asyncio), package="purgatory"),
            Case(AIOBREAKER, timed(aiobreaker_called, in_asyncio), package="aiobreaker"),
            Case(PYBREAKER, timed(pybreaker_called), package="pybreaker"),
            Case(INTERLOCK, timed(interlock_called, in_asyncio), package="interlock"),
        ),
        # No slower than the fastest is no slower than any.
        bounds=tuple(
            _bound(case=case, relative_to=peer, at_most=at_most)
            for case, at_most in ((OURS, 1.0), (OURS_RATE_IN_TIME, 1.5))
            for peer in (HYX, PURGATORY, PURGATORY_DECORATED, AIOBREAKER, PYBREAKER)
        ),
    ),
    Benchmark(
        module="benchmarks.bench_circuit_breaker",
        name="open circuit",
        about="A call that an open circuit refuses, which is a checkpoint, and what it raises",
        cases=(
            Case(REFUSED, timed(refused)),
            Case(PLAIN, timed(plain)),
            Case(CHECKPOINT, timed(checkpoints)),
        ),
        bounds=(_bound(case=REFUSED, relative_to=PLAIN, at_most=3.0),),
    ),
)
