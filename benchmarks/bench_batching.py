"""What it costs to give an item to a batcher, beside handing it to a task that answers."""

from __future__ import annotations

# flake8: noqa: ASYNC124, ASYNC910
from collections.abc import Iterable
from functools import partial

import trio

from benchmarks._runner import Benchmark, Bound, Case
from benchmarks._timing import MICROSECONDS, timed
from trio_resilience import open_batcher

OURS = "Batcher.submit"
CHANNELS = "round trip through memory channels"
CHANNELS_ALONE = "round trip, one asker"

AT_ONCE = 100
"""How many tasks submit at once, and how many items make a batch."""


async def process(items: list[int]) -> list[int]:
    """Answer at once."""
    return items


async def ours(count: int) -> list[int]:
    """Submit from many tasks, each of which waits for its result."""
    results = [-1] * count

    async def submit(items: Iterable[int]) -> None:
        for item in items:
            results[item] = await batcher.submit(item)

    async with (
        open_batcher(None, process, batch_size=AT_ONCE) as batcher,
        trio.open_nursery() as nursery,
    ):
        for number in range(AT_ONCE):
            nursery.start_soon(submit, range(number, count, AT_ONCE))
    return results


async def channels(askers: int, count: int) -> list[int]:
    """Send each item to a task that serves all, which sends the result to who has asked.

    Each asker has a channel for its answers: the least code that does it.
    """
    results = [-1] * count
    questions, asked = trio.open_memory_channel[tuple[int, trio.MemorySendChannel[int]]](0)

    async def ask(items: Iterable[int]) -> None:
        reply, answers = trio.open_memory_channel[int](0)
        for item in items:
            await questions.send((item, reply))
            results[item] = await answers.receive()

    async def serve() -> None:
        async for item, reply in asked:
            await reply.send(item)

    async with trio.open_nursery() as serving:
        serving.start_soon(serve)
        async with questions, trio.open_nursery() as nursery:
            for number in range(askers):
                nursery.start_soon(ask, range(number, count, askers))
    return results


BENCHMARKS = (
    Benchmark(
        module="benchmarks.bench_batching",
        name="batching",
        about=f"An item that is answered at once, submitted by {AT_ONCE} tasks at a time",
        cases=(
            Case(OURS, timed(ours)),
            Case(CHANNELS, timed(partial(channels, AT_ONCE))),
            Case(CHANNELS_ALONE, timed(partial(channels, 1))),
        ),
        bounds=(
            Bound(case=OURS, relative_to=CHANNELS, figure=MICROSECONDS, at_most=3.0),
            Bound(case=OURS, relative_to=CHANNELS_ALONE, figure=MICROSECONDS, at_most=3.0),
        ),
    ),
)
