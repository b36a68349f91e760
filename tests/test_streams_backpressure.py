"""How far a stream runs ahead of its consumer, and how much it holds."""

from __future__ import annotations

import gc
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import pytest
import trio
import trio.testing

from tests.operations import Gauge, Source, Stopwatch, returns
from trio_resilience import (
    stream_map_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock


@pytest.mark.parametrize("buffer", [0, 1, 5])
@pytest.mark.parametrize("ordered", [False, True])
async def test_a_slow_consumer_slows_the_operations_down(
    autojump_clock: MockClock, buffer: int, ordered: bool
) -> None:
    """Besides the result in the consumer's hand, a stream holds max_concurrency + buffer items.

    So many operations have started while the consumer is busy, no more; and the buffer is used.
    """
    gauge, source, taken = Gauge(), Source(), 0
    ops = source.of(gauge.op(i) for i in count())
    stream = stream_with_limit(None, ops, max_concurrency=3, buffer=buffer, ordered=ordered)
    async with stream as results:
        async for _ in results:
            taken += 1
            await trio.sleep(100)
            assert len(gauge.started) == taken + 3 + buffer
            assert source.pulled == taken + 3 + buffer
            if taken == 4:
                break


async def test_a_block_that_does_not_iterate_starts_no_more_than_fit(
    autojump_clock: MockClock,
) -> None:
    """Before the first result is asked for, the same bound holds."""
    gauge = Gauge()
    stream = stream_with_limit(None, (gauge.op(i) for i in count()), max_concurrency=3, buffer=2)
    async with stream:
        await trio.sleep(100)
        assert len(gauge.started) <= 5
    assert gauge.running == 0


@pytest.mark.parametrize("buffer", [0, 2])
async def test_a_slow_head_holds_back_new_starts(autojump_clock: MockClock, buffer: int) -> None:
    """In order, what waits for the first result is bounded too."""
    gauge = Gauge()
    ops = (gauge.op(i, 100 if i == 0 else 1) for i in count())
    got = list[int]()
    stream = stream_with_limit(None, ops, ordered=True, max_concurrency=3, buffer=buffer)
    async with stream as results:
        async for index, _ in results:
            if index == 0:
                assert len(gauge.started) <= 1 + 3 + buffer
                assert len(gauge.finished) <= 3 + buffer
            got.append(index)
            if index == 9:
                break
    assert got == list(range(10))


async def test_a_fast_consumer_keeps_all_slots_busy(autojump_clock: MockClock) -> None:
    """Handing over a result costs no slot: thirty seconds of work take ten in three slots."""
    gauge, watch = Gauge(), Stopwatch()
    async with stream_with_limit(None, gauge.ops(*[1] * 30), max_concurrency=3) as results:
        async for _ in results:
            pass
    assert watch.seconds == 10


async def test_a_buffer_lets_operations_run_ahead(autojump_clock: MockClock) -> None:
    """A consumer that pauses once does not stop the work if the buffer is large enough."""
    gauge, watch = Gauge(), Stopwatch()
    stream = stream_with_limit(None, gauge.ops(*[1] * 10), max_concurrency=1, buffer=20)
    async with stream as results:
        async for index, _ in results:
            if index == 0:
                await trio.sleep(20)
    assert watch.seconds == 21
    assert gauge.finished == list(range(10))


async def test_an_infinite_source_is_streamed(autojump_clock: MockClock) -> None:
    """Breaking out ends it; the generator is closed and was not read ahead."""
    gauge, source = Gauge(), Source()
    ops = source.of(gauge.op(i) for i in count())
    async with stream_with_limit(None, ops, max_concurrency=4) as results:
        async for index, _ in results:
            if index >= 20:
                break
    assert source.closed
    assert source.pulled <= len(gauge.finished) + 4
    assert gauge.running == 0


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_stream_holds_few_results_at_a_time(ordered: bool) -> None:
    """Of two thousand results, never more are alive than the stream may hold."""
    alive = WeakSet[Any]()
    peak = 0

    class Result:
        pass

    async def operation(_: int) -> Result:
        await trio.lowlevel.checkpoint()
        result = Result()
        alive.add(result)
        return result

    gc.disable()
    try:
        stream = stream_map_with_limit(
            None, operation, range(2000), max_concurrency=3, buffer=2, ordered=ordered
        )
        async with stream as results:
            async for _item, result in results:
                del result
                peak = max(peak, len(alive))
    finally:
        gc.enable()
    assert 1 <= peak <= 3 + 2 + 1
    assert not alive


async def test_a_stream_lets_go_of_items_and_tasks() -> None:
    """Items are alive only while they are worked on; live tasks are max_concurrency and three."""
    alive, peak, tasks = WeakSet[Any](), 0, 0

    class Item:
        pass

    def items() -> Any:
        for _ in range(1000):
            item = Item()
            alive.add(item)
            yield item
            del item

    async def operation(item: Item) -> None:
        nonlocal peak, tasks
        peak = max(peak, len(alive))
        tasks = max(tasks, trio.lowlevel.current_statistics().tasks_living)
        await trio.lowlevel.checkpoint()

    before = trio.lowlevel.current_statistics().tasks_living
    gc.disable()
    try:
        async with stream_map_with_limit(None, operation, items(), max_concurrency=4) as results:
            async for _pair in results:
                del _pair
    finally:
        gc.enable()
    assert peak <= 4 + 2
    assert tasks <= before + 4 + 3


async def test_taking_a_ready_result_is_a_checkpoint() -> None:
    """A loop over results that are all there already does not freeze the program."""
    ops = [partial(returns, i) for i in range(10)]
    async with stream_with_limit(None, ops, buffer=100) as results:
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(10):
            with trio.testing.assert_checkpoints():
                await anext(results)
        with pytest.raises(StopAsyncIteration):
            await anext(results)


async def test_operations_of_a_stream_do_not_freeze_the_program() -> None:
    """Operations that never park, and a consumer that never waits: others get their turn."""
    turns = 0

    async def bystander() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bystander)
        ops = (partial(returns, i) for i in islice(count(), 100))
        async with stream_with_limit(nursery, ops, max_concurrency=1) as results:
            async for _ in results:
                pass
        nursery.cancel_scope.cancel()
    assert turns >= 100


async def test_a_stream_may_feed_another(autojump_clock: MockClock) -> None:
    """Streams nest: the results of one are the items of the next, lazily."""
    gauge, source = Gauge(), Source()

    async def pages() -> AsyncIterator[int]:
        ops = source.of(gauge.op(i) for i in count())
        async with stream_with_limit(nursery, ops, max_concurrency=2, ordered=True) as results:
            async for _, page in results:
                yield page

    async def double(page: int) -> int:
        await trio.sleep(1)
        return 2 * page

    got = list[int]()
    async with trio.open_nursery() as nursery:
        stream = stream_map_with_limit(nursery, double, pages(), max_concurrency=2, ordered=True)
        async with stream as results:
            async for _, doubled in results:
                got.append(doubled)
                if len(got) == 5:
                    break
    assert got == [0, 2, 4, 6, 8]
    assert source.closed
    assert source.pulled <= 5 + 2 + 2 + 2
