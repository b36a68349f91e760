"""Where operations come from: sources that fail, that are left early, and batches of them."""

from __future__ import annotations

import datetime as dt
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import Gauge, Source, Stopwatch, fails, foreign_nursery, reachable
from trio_resilience import (
    BulkheadFullError,
    OperationsFailedError,
    RejectedError,
    map_with_limit,
    run_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator

    from trio.testing import MockClock

    Operation = Callable[[], Awaitable[int]]


class SourceError(Exception):
    """Raised by a source."""


class SourceExit(BaseException):
    """Raised by a source; not an Exception."""


def broken(ops: Iterable[Operation], error: BaseException) -> Iterator[Operation]:
    yield from ops
    raise error


async def async_broken(ops: Iterable[Operation], error: BaseException) -> AsyncIterator[Operation]:
    for op in ops:
        yield op
    await trio.lowlevel.checkpoint()
    raise error


@pytest.mark.parametrize("on_error", ["cancel", "continue", "collect"])
@pytest.mark.parametrize("source", [broken, async_broken])
@pytest.mark.parametrize("error_type", [SourceError, SourceExit, KeyboardInterrupt, SystemExit])
async def test_what_the_source_raises_comes_out_as_it_is(
    autojump_clock: MockClock, on_error: Any, source: Any, error_type: type[BaseException]
) -> None:
    """Running operations are cancelled and joined; the source's own error comes out, bare."""
    gauge, error = Gauge(), error_type()
    async with foreign_nursery() as nursery:
        with pytest.raises(error_type) as caught:
            await run_with_limit(nursery, source(gauge.ops(5, 5), error), on_error=on_error)
        assert not nursery.child_tasks
    assert caught.value is error
    assert sorted(gauge.cancelled) == sorted(gauge.started)


class Unwilling:
    """A source that fails before it yields anything, when it is asked for its iterator."""

    def __init__(self, error: Exception) -> None:
        self.error = error


class BrokenIter(Unwilling):
    """An iterable."""

    def __iter__(self) -> Iterator[Any]:
        raise self.error


class BrokenAiter(Unwilling):
    """An async iterable."""

    def __aiter__(self) -> AsyncIterator[Any]:
        raise self.error


@pytest.mark.parametrize("kind", [BrokenIter, BrokenAiter])
@pytest.mark.parametrize("given", [True, False])
async def test_a_source_may_fail_when_it_is_asked_for_its_iterator(kind: Any, given: bool) -> None:
    """That error comes out as it is, too."""
    error = SourceError()
    async with foreign_nursery() as nursery:
        with pytest.raises(SourceError) as caught:
            await run_with_limit(nursery if given else None, kind(error))
    assert caught.value is error


@pytest.mark.parametrize("source", [broken, async_broken])
async def test_a_source_may_fail_at_its_first_pull(source: Any) -> None:
    """The error comes out though nothing ever ran."""
    error = SourceError()
    with pytest.raises(SourceError) as caught:
        await run_with_limit(None, source([], error))
    assert caught.value is error


async def test_the_source_of_a_map_may_fail(autojump_clock: MockClock) -> None:
    """What the items' generator raises comes out as it is."""
    gauge, error = Gauge(), SourceError()

    def items() -> Iterator[int]:
        yield 0
        raise error

    with pytest.raises(SourceError) as caught:
        await map_with_limit(None, gauge.run, items())
    assert caught.value is error
    assert gauge.running == 0


async def test_operations_clean_up_before_the_error_of_the_source_comes_out(
    autojump_clock: MockClock,
) -> None:
    """A cancelled operation's shielded cleanup is waited for."""
    watch = Stopwatch()

    async def careful() -> int:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3)

    with pytest.raises(SourceError):
        await run_with_limit(None, async_broken([careful], SourceError()))
    assert watch.seconds == 3


async def test_failures_stay_visible_when_the_source_fails_too(autojump_clock: MockClock) -> None:
    """Neither the operation's failure nor the source's error is lost behind the other."""
    failure, error = OSError(), SourceError()

    async def source() -> AsyncIterator[Operation]:
        yield lambda: fails(failure)
        await trio.sleep(1)
        raise error

    with pytest.raises((SourceError, OperationsFailedError)) as caught:
        await run_with_limit(None, source(), on_error="continue")
    seen = reachable(caught.value)
    assert any(each is failure for each in seen)
    assert any(each is error for each in seen)


@pytest.mark.parametrize("end", ["failure", "cancellation", "completion"])
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_a_generator_is_closed_when_the_job_ends(
    autojump_clock: MockClock, asynchronous: bool, end: str
) -> None:
    """Its finally block has run when the call returns or raises, however that came about."""
    gauge, source = Gauge(), Source()
    error = OSError() if end == "failure" else None
    ops = (gauge.op(i, 1, error) for i in (range(3) if end == "completion" else count()))
    given: Any = source.async_of(ops) if asynchronous else source.of(ops)
    with trio.CancelScope() as scope:
        if end == "cancellation":
            scope.deadline = trio.current_time() + 2.5
        try:
            await run_with_limit(None, given, max_concurrency=2)
        except OperationsFailedError:
            assert end == "failure"
    assert source.closed
    assert scope.cancelled_caught == (end == "cancellation")


async def test_an_async_generator_may_clean_up_with_awaits(autojump_clock: MockClock) -> None:
    """Its shielded cleanup runs to the end before a cancelled call comes out."""
    gauge, cleaned = Gauge(), False

    async def source() -> AsyncIterator[Operation]:
        nonlocal cleaned
        try:
            for index in count():
                yield gauge.op(index)
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            cleaned = True

    with trio.move_on_after(1.5):
        await run_with_limit(None, source(), max_concurrency=1)
    assert cleaned


@pytest.mark.parametrize("end", ["completion", "cancellation"])
async def test_an_async_source_may_keep_a_nursery_open(autojump_clock: MockClock, end: str) -> None:
    """One task pulls it, so that a nursery around its yields is sound."""
    gauge, ended = Gauge(), list[int]()

    async def background() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(1)

    async def source() -> AsyncIterator[Operation]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(background)
            for index in range(4):
                await trio.sleep(0.25)
                yield gauge.op(index)
            nursery.cancel_scope.cancel()

    with trio.move_on_after(1.75 if end == "cancellation" else 60) as scope:
        assert await run_with_limit(None, source(), max_concurrency=2) == [0, 1, 2, 3]
    assert ended == [1]
    assert scope.cancelled_caught == (end == "cancellation")


async def test_an_async_source_is_pulled_and_closed_by_one_task(
    autojump_clock: MockClock,
) -> None:
    """So that a cancel scope around its yields is sound, also when the job ends early."""
    gauge, tasks = Gauge(), list[trio.lowlevel.Task]()

    async def source() -> AsyncIterator[Operation]:
        with trio.CancelScope():
            try:
                for index in range(9):
                    tasks.append(trio.lowlevel.current_task())
                    await trio.sleep(0.25)
                    yield gauge.op(index, 1, OSError() if index == 5 else None)
            finally:
                tasks.append(trio.lowlevel.current_task())

    with pytest.raises(OperationsFailedError):
        await run_with_limit(None, source(), max_concurrency=2)
    assert len(tasks) >= 7
    assert len(set(tasks)) == 1


async def test_a_source_that_blocks_is_cancelled_by_a_failure(autojump_clock: MockClock) -> None:
    """An async source that waits for ever does not keep a failed job alive."""
    gauge, watch, source = Gauge(), Stopwatch(), Source()

    async def ops() -> AsyncIterator[Operation]:
        yield gauge.op(0, 1, OSError())
        try:
            await trio.sleep_forever()
        finally:
            source.closed = True

    with pytest.raises(OperationsFailedError):
        await run_with_limit(None, ops())
    assert (watch.seconds, source.closed) == (1, True)


async def test_a_source_that_blocks_is_cancelled_with_its_caller(
    autojump_clock: MockClock,
) -> None:
    """Cancelling the caller reaches an async source that is waiting for its next item."""
    async with foreign_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            await run_with_limit(nursery, Source().async_of(Gauge().ops(1), pause=1e9))
    assert scope.cancelled_caught


async def test_nothing_is_pulled_after_a_failure(autojump_clock: MockClock) -> None:
    """The first failure ends the pulling, not only the running."""
    gauge, source = Gauge(), Source()
    ops = [gauge.op(0, 5), gauge.op(1, 1, OSError()), *gauge.ops(*[1] * 20)]
    with pytest.raises(OperationsFailedError):
        await run_with_limit(None, source.of(ops), max_concurrency=2)
    assert source.pulled == 2


async def test_a_source_may_yield_the_same_operation_again(autojump_clock: MockClock) -> None:
    """Operations are called, not consumed: one function may stand for many."""
    gauge = Gauge()
    assert await run_with_limit(None, [gauge.op(7)] * 3) == [7, 7, 7]


# --- queue_size ---------------------------------------------------------------------------------


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


async def test_unsized_operations_never_queue(autojump_clock: MockClock) -> None:
    """A generator is pulled lazily, so a small queue does not refuse it."""
    gauge = Gauge()
    ops = (gauge.op(i) for i in range(9))
    assert await run_with_limit(None, ops, max_concurrency=1, queue_size=0) == list(range(9))


# --- batches ------------------------------------------------------------------------------------


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
