"""stream_with_limit and stream_map_with_limit: order, backpressure, bounded memory."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio
import trio.testing

from tests.operations import Gauge, Source, Stopwatch, ancestors, foreign_nursery, returns
from trio_resilience import (
    BulkheadFullError,
    Constant,
    OperationTimeoutError,
    Retry,
    stream_map_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

both = pytest.mark.parametrize("given", [True, False])


@both
async def test_results_come_as_completed(autojump_clock: MockClock, given: bool) -> None:
    """Each with the index of its operation, at the instant it is ready."""
    gauge, watch, got = Gauge(), Stopwatch(), list[tuple[float, int, int]]()
    async with foreign_nursery() as nursery:
        async with stream_with_limit(nursery if given else None, gauge.ops(3, 1, 2)) as results:
            async for index, result in results:
                got.append((watch.seconds, index, result))
        assert not nursery.child_tasks
    assert got == [(1, 1, 1), (2, 2, 2), (3, 0, 0)]


async def test_results_may_come_in_order(autojump_clock: MockClock) -> None:
    """With ordered=True each waits for those before it."""
    gauge, watch, got = Gauge(), Stopwatch(), list[tuple[float, int]]()
    async with stream_with_limit(None, gauge.ops(3, 1, 4, 1), ordered=True) as results:
        async for index, result in results:
            assert index == result
            got.append((watch.seconds, index))
    assert got == [(3, 0), (3, 1), (4, 2), (4, 3)]


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_map_yields_the_item_with_its_result(
    autojump_clock: MockClock, ordered: bool
) -> None:
    """What `async for item, result` reads."""

    async def measure(word: str) -> int:
        await trio.sleep(len(word))
        return len(word)

    words, got = ["cherry", "fig", "apple"], list[tuple[str, int]]()
    async with trio.open_nursery() as nursery:
        stream = stream_map_with_limit(nursery, measure, words, ordered=ordered)
        async with stream as results:
            async for word, length in results:
                got.append((word, length))
    expected = [("cherry", 6), ("fig", 3), ("apple", 5)]
    assert got == (expected if ordered else [expected[1], expected[2], expected[0]])


async def test_the_bound_holds(autojump_clock: MockClock) -> None:
    """Two slots, five one-second operations: three seconds."""
    gauge, watch = Gauge(), Stopwatch()
    async with stream_with_limit(None, gauge.ops(*[1] * 5), max_concurrency=2) as results:
        assert len([index async for index, _ in results]) == 5
    assert (gauge.peak, watch.seconds) == (2, 3)


@both
async def test_operations_run_beneath_one_task_of_the_nursery(
    autojump_clock: MockClock, given: bool
) -> None:
    """As with run_with_limit: one supervising child, or a nursery of the caller's own."""
    caller = trio.lowlevel.current_task()
    children = list[int]()

    async def look() -> bool:
        await trio.lowlevel.checkpoint()
        above = ancestors(trio.lowlevel.current_task())
        children.append(len(nursery.child_tasks))
        return nursery in above if given else caller in [each.parent_task for each in above]

    async with foreign_nursery() as nursery:
        stream = stream_with_limit(nursery if given else None, [look] * 5, max_concurrency=2)
        async with stream as results:
            assert [found async for _, found in results] == [True] * 5
    assert set(children) == {1 if given else 0}


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_any_iterable_can_be_streamed(autojump_clock: MockClock, asynchronous: bool) -> None:
    """Lists, generators and async generators; an async generator that is left early is closed."""
    gauge, source = Gauge(), Source()
    ops = (gauge.op(i) for i in count())
    given: Any = source.async_of(ops) if asynchronous else source.of(ops)
    async with stream_with_limit(None, given, max_concurrency=2) as results:
        got = [index async for index, _ in _first(results, 5)]
    assert sorted(got)[:4] == [0, 1, 2, 3]
    assert source.closed


async def _first(
    results: AsyncIterator[tuple[int, int]], number: int
) -> AsyncIterator[tuple[int, int]]:
    left = number
    async for each in results:
        yield each
        left -= 1
        if not left:
            return


async def test_no_operations_give_no_results() -> None:
    """The loop ends at once, after a checkpoint; the block is none too few."""
    none: list[Any] = []
    for ordered in (False, True):
        with trio.testing.assert_checkpoints():
            async with stream_with_limit(None, none, ordered=ordered) as results:
                assert [each async for each in results] == []


async def test_a_finished_stream_stays_finished() -> None:
    """Asked again after its end, it ends again."""
    async with stream_with_limit(None, [partial(returns, 1)]) as results:
        assert [each async for each in results] == [(0, 1)]
        assert [each async for each in results] == []


async def test_collect_yields_outcomes(autojump_clock: MockClock) -> None:
    """With on_error="collect" failures are delivered like results, without notes."""
    gauge, error = Gauge(), OSError()
    ops = [gauge.op(0, 2), gauge.op(1, 1, error), gauge.op(2, 3)]
    async with stream_with_limit(None, ops, on_error="collect") as results:
        got = [each async for each in results]
    assert [index for index, _ in got] == [1, 0, 2]
    assert isinstance(got[0][1], outcome.Error)
    assert got[0][1].error is error
    assert got[1][1] == outcome.Value(0)
    assert not hasattr(error, "__notes__")


async def test_a_stream_has_timeouts_policies_and_batches(autojump_clock: MockClock) -> None:
    """The options of run_with_limit work in a stream."""
    gauge, watch, attempts = Gauge(), Stopwatch(), 0

    async def flaky() -> int:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise OSError
        return 7

    ops = [flaky, gauge.op(1, 9), gauge.op(2, 1)]
    policy = Retry(max_attempts=3, backoff=Constant(0.25))
    got = list[tuple[float, int, type]]()
    stream = stream_with_limit(
        None, ops, policy=policy, timeout=2, batch_size=2, delay_between_batches=10,
        on_error="collect",
    )  # fmt: skip
    async with stream as results:
        async for index, result in results:
            value = result.error if isinstance(result, outcome.Error) else result.value
            got.append((watch.seconds, index, type(value)))
    assert got == [(0.5, 0, int), (2, 1, OperationTimeoutError), (13, 2, int)]


async def test_a_stream_may_share_a_limiter(autojump_clock: MockClock) -> None:
    """A trio.CapacityLimiter bounds two streams together."""
    limiter, gauge, watch = trio.CapacityLimiter(2), Gauge(), Stopwatch()

    async def consume() -> None:
        async with stream_with_limit(None, gauge.ops(1, 1, 1), max_concurrency=limiter) as results:
            assert len([each async for each in results]) == 3

    async with trio.open_nursery() as nursery:
        nursery.start_soon(consume)
        nursery.start_soon(consume)
    assert (gauge.peak, watch.seconds, limiter.borrowed_tokens) == (2, 3, 0)


async def test_a_stream_refuses_more_than_fits() -> None:
    """queue_size refuses sized operations before anything runs."""
    gauge = Gauge()
    with pytest.raises(BulkheadFullError):
        async with stream_with_limit(
            None, gauge.ops(*[0] * 6), max_concurrency=2, queue_size=3
        ) as results:
            async for _ in results:
                pass
    assert gauge.started == []
