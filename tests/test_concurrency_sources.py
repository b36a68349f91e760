"""Where operations come from: sources that fail, that are left early, and batches of them."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio

from tests.operations import Gauge, Source, Stopwatch, fails, foreign_nursery, reachable
from trio_resilience import (
    OperationsFailedError,
    map_with_limit,
    run_with_limit,
    stream_map_with_limit,
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


async def test_an_async_source_that_never_waits_is_numbered_in_its_order() -> None:
    """Workers that get their operations in one instant do not mix up whose result is whose."""
    failures = [OSError(index) for index in range(20)]
    for _ in range(20):
        ops: Any = Source().async_of(partial(fails, failure) for failure in failures)
        with pytest.raises(OperationsFailedError) as caught:
            await run_with_limit(None, ops, on_error="continue", max_concurrency=20)
        assert list(caught.value.exceptions) == failures
        assert caught.value.message == "20 of 20 operations failed"
        assert len(caught.value.outcomes) == 20


async def test_a_list_that_shrinks_meanwhile_hides_no_failure(autojump_clock: MockClock) -> None:
    """What failed comes out, though the list it came from is empty by then."""
    gauge, error = Gauge(), OSError()
    ops = [gauge.op(0, 1), gauge.op(1, 2, error)]
    async with trio.open_nursery() as nursery:

        async def clear() -> None:
            await trio.sleep(1.5)
            ops.clear()

        nursery.start_soon(clear)
        with pytest.raises(OperationsFailedError) as caught:
            await run_with_limit(None, ops, on_error="continue")
    assert caught.value.exceptions == (error,)


async def test_items_and_results_may_be_none(autojump_clock: MockClock) -> None:
    """None is no sign of anything: not of the end of the source, nor of a missing result."""

    async def echo(item: object) -> object:
        await trio.lowlevel.checkpoint()
        return item

    items = [None, 0, None, False]
    assert await map_with_limit(None, echo, items) == items
    assert await map_with_limit(None, echo, Source().async_of(items)) == items
    for ordered in (False, True):
        stream = stream_map_with_limit(None, echo, Source().of(items), ordered=ordered)
        async with stream as results:
            assert len([each async for each in results]) == 4


async def test_a_coroutine_that_is_handed_out_twice_fails_once() -> None:
    """Two operations that return one coroutine object: the second can't await it, and says so."""

    async def once() -> str:
        await trio.lowlevel.checkpoint()
        return "done"

    coroutine = once()
    results = await run_with_limit(
        None, [lambda: coroutine] * 2, on_error="collect", max_concurrency=1
    )
    assert results[0] == outcome.Value("done")
    assert isinstance(results[1], outcome.Error)
    assert isinstance(results[1].error, RuntimeError)
