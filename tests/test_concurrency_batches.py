"""Batches, the delay between them, and queue_size, which refuses what would have to wait."""

from __future__ import annotations

import datetime as dt
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import Gauge, Source, Stopwatch
from trio_resilience import (
    BulkheadFullError,
    Event,
    OperationsFailedError,
    Rejected,
    RejectedError,
    map_with_limit,
    run_with_limit,
    stream_with_limit,
    subscribe,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    Operation = Callable[[], Awaitable[int]]


@pytest.mark.parametrize("limit", [2, "limiter"])
@pytest.mark.parametrize("shape", [list, tuple, dict.fromkeys])
async def test_more_operations_than_fit_are_refused_before_any_runs(limit: Any, shape: Any) -> None:
    """With 2 running and 3 waiting at most, 6 operations are one too many."""
    gauge = Gauge()
    bound = trio.CapacityLimiter(2) if limit == "limiter" else limit
    async with trio.open_nursery() as nursery:
        with pytest.raises(BulkheadFullError) as caught:
            await run_with_limit(
                nursery, shape(gauge.ops(*[0] * 6)), max_concurrency=bound, queue_size=3
            )
        assert not nursery.child_tasks
    assert isinstance(caught.value, RejectedError)
    assert gauge.started == []


async def test_as_many_operations_as_fit_are_run(autojump_clock: MockClock) -> None:
    """The bound itself is allowed."""
    gauge = Gauge()
    assert await run_with_limit(None, gauge.ops(*[0] * 5), max_concurrency=2, queue_size=3)


async def test_a_queue_of_zero_allows_only_what_can_run_at_once(autojump_clock: MockClock) -> None:
    """queue_size=0 means that nothing may wait."""
    gauge = Gauge()
    assert await run_with_limit(None, gauge.ops(0, 0), max_concurrency=2, queue_size=0) == [0, 1]
    with pytest.raises(BulkheadFullError):
        await run_with_limit(None, gauge.ops(0, 0, 0), max_concurrency=2, queue_size=0)


async def test_items_of_a_map_are_refused_too() -> None:
    """Sized items are counted like sized operations; the function is never called."""
    gauge = Gauge()
    with pytest.raises(BulkheadFullError):
        await map_with_limit(None, gauge.run, range(6), max_concurrency=2, queue_size=3)
    assert gauge.started == []


async def test_listeners_hear_of_the_refusal() -> None:
    """Once for the whole job, of which nothing is run."""
    heard: list[Event] = []
    with subscribe(heard.append), pytest.raises(BulkheadFullError):
        await run_with_limit(None, Gauge().ops(0, 0), max_concurrency=1, queue_size=0)
    (event,) = heard
    assert isinstance(event, Rejected)
    assert (event.policy, event.operation) == ("run_with_limit", "run_with_limit")


def test_outside_of_a_run_a_stream_is_refused_unheard() -> None:
    """There is no clock to tell the time by."""
    heard: list[Event] = []
    with subscribe(heard.append), pytest.raises(BulkheadFullError):
        stream_with_limit(None, Gauge().ops(0, 0), max_concurrency=1, queue_size=0)
    assert heard == []


async def test_unsized_operations_never_queue(autojump_clock: MockClock) -> None:
    """A generator is pulled lazily, so a small queue does not refuse it."""
    gauge = Gauge()
    ops = (gauge.op(i) for i in range(9))
    assert await run_with_limit(None, ops, max_concurrency=1, queue_size=0) == list(range(9))


async def starts_of(ops: int, *, lazily: bool = False, seconds: float = 1, **options: Any) -> Any:
    """Run *ops* operations; return when each started and when all was over."""
    watch, starts, source = Stopwatch(), list[float](), Source()

    async def operation() -> None:
        starts.append(watch.seconds)
        await trio.sleep(seconds)

    given = [operation] * ops
    await run_with_limit(None, source.of(given) if lazily else given, **options)
    return starts, watch.seconds


@pytest.mark.parametrize("lazily", [False, True])
async def test_a_batch_waits_for_the_one_before_and_the_delay(
    autojump_clock: MockClock, lazily: bool
) -> None:
    """Batches of two one-second calls, ten seconds apart, start at 0, 11 and 22."""
    starts, end = await starts_of(5, lazily=lazily, batch_size=2, delay_between_batches=10)
    assert starts == [0, 0, 11, 11, 22]
    assert end == 23


@pytest.mark.parametrize("lazily", [False, True])
async def test_there_is_no_delay_after_the_last_batch(
    autojump_clock: MockClock, lazily: bool
) -> None:
    """Also when the last batch is full."""
    starts, end = await starts_of(4, lazily=lazily, batch_size=2, delay_between_batches=10)
    assert starts == [0, 0, 11, 11]
    assert end == 12


async def test_batches_need_no_delay(autojump_clock: MockClock) -> None:
    """Without a delay the next batch starts when the last operation of this one has finished."""
    gauge, watch = Gauge(), Stopwatch()
    await run_with_limit(None, gauge.ops(1, 5, 1, 1), batch_size=2)
    assert (gauge.peak, watch.seconds) == (2, 6)


async def test_the_bound_holds_within_a_batch(autojump_clock: MockClock) -> None:
    """A batch may be larger than what runs at once."""
    starts, end = await starts_of(4, batch_size=2, delay_between_batches=10, max_concurrency=1)
    assert starts == [0, 1, 12, 13]
    assert end == 14


async def test_one_batch_may_hold_everything(autojump_clock: MockClock) -> None:
    """A batch larger than the job changes nothing."""
    assert await starts_of(3, batch_size=100, delay_between_batches=10) == ([0, 0, 0], 1)


async def test_a_batch_of_one_spaces_operations(autojump_clock: MockClock) -> None:
    """The delay counts from the end of an operation; a timedelta will do."""
    delay = dt.timedelta(seconds=2)
    assert await starts_of(3, batch_size=1, delay_between_batches=delay) == ([0, 3, 6], 7)


async def test_batches_are_pulled_lazily(autojump_clock: MockClock) -> None:
    """While one batch runs the next is not pulled, but for one operation at most."""
    gauge, source = Gauge(), Source()
    with trio.move_on_after(5):
        await run_with_limit(
            None,
            source.of(gauge.op(i) for i in count()),
            batch_size=3,
            delay_between_batches=10,
            max_concurrency=10,
        )
    assert gauge.started == [0, 1, 2]
    assert source.pulled <= 4


async def test_a_failure_ends_the_batches(autojump_clock: MockClock) -> None:
    """No delay and no further batch follow a failure."""
    gauge, watch = Gauge(), Stopwatch()
    ops = [gauge.op(0, 1, OSError()), gauge.op(1), gauge.op(2), gauge.op(3)]
    with pytest.raises(OperationsFailedError):
        await run_with_limit(None, ops, batch_size=2, delay_between_batches=10)
    assert watch.seconds == 1
    assert gauge.started == [0, 1]


async def test_failures_that_do_not_cancel_do_not_end_the_batches(
    autojump_clock: MockClock,
) -> None:
    """With on_error="collect" the next batch follows in its turn."""
    gauge, watch = Gauge(), Stopwatch()
    ops = [gauge.op(0, 1, OSError()), gauge.op(1)]
    await run_with_limit(None, ops, batch_size=1, delay_between_batches=10, on_error="collect")
    assert watch.seconds == 12


async def test_the_delay_can_be_cancelled(autojump_clock: MockClock) -> None:
    """A caller that is cancelled between two batches comes out at once."""
    gauge, watch = Gauge(), Stopwatch()
    with trio.move_on_after(5) as scope:
        await run_with_limit(None, gauge.ops(1, 1), batch_size=1, delay_between_batches=10)
    assert (scope.cancelled_caught, watch.seconds, gauge.started) == (True, 5, [0])
