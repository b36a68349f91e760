"""Process single items together, or take a stream in batches: by size, or by age."""

from __future__ import annotations

import inspect
import math
from collections.abc import (
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Sequence,
)
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Generic, Self, TypeAlias, TypeVar, final, overload

import trio
from outcome import Error, Value
from trio.lowlevel import enable_ki_protection

from trio_resilience._checks import integer, operation, seconds
from trio_resilience._engine._block import Block
from trio_resilience._engine._filler import ENDED, Filler
from trio_resilience._engine._flusher import Flusher
from trio_resilience._engine._join import check_nursery, leaves_of
from trio_resilience._errors import OperationsCancelledError
from trio_resilience._records import Record, record

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")
R = TypeVar("R")

Seconds: TypeAlias = float | timedelta


@final
@record
class BatcherStatistics(Record):
    """What a `Batcher` holds now, and what it has done so far."""

    waiting: int
    """Items that wait for a batch."""
    in_flight: int
    """Items that are being processed."""
    flushes: int
    """Batches that were processed, those that failed or were cancelled included."""
    items: int
    """Items of batches that were processed and did not fail."""
    failures: int
    """Batches that failed as a whole."""
    in_line: int = 0
    """Items whose submitters wait for room, beyond *waiting*."""


@overload
def open_batcher(
    nursery: trio.Nursery | None,
    process: Callable[[list[T]], Awaitable[None]],
    *,
    batch_size: int = 100,
    max_age: Seconds = 0.01,
    max_concurrency: int = 1,
    queue_size: int | None = None,
    name: str = "batcher",
) -> Batcher[T, None]: ...
@overload
def open_batcher(
    nursery: trio.Nursery | None,
    process: Callable[[list[T]], Awaitable[Sequence[Value[R] | Error]]],
    *,
    batch_size: int = 100,
    max_age: Seconds = 0.01,
    max_concurrency: int = 1,
    queue_size: int | None = None,
    name: str = "batcher",
) -> Batcher[T, R]: ...
@overload
def open_batcher(
    nursery: trio.Nursery | None,
    process: Callable[[list[T]], Awaitable[Sequence[R]]],
    *,
    batch_size: int = 100,
    max_age: Seconds = 0.01,
    max_concurrency: int = 1,
    queue_size: int | None = None,
    name: str = "batcher",
) -> Batcher[T, R]: ...
def open_batcher(
    nursery: trio.Nursery | None,
    process: Callable[[list[T]], Awaitable[Any]],
    *,
    batch_size: int = 100,
    max_age: Seconds = 0.01,
    max_concurrency: int = 1,
    queue_size: int | None = None,
    name: str = "batcher",
) -> Batcher[T, Any]:
    """Collect single items from many tasks into batches, and process each batch with one call.

    Every submitted item is processed once, in the order of submission, unless its submitter was
    cancelled before its batch began; and each submitter gets what came of its own item. Cancelling
    one takes nothing from the others. When the block ends, normally or by an `Exception`, no more
    items are accepted, those that wait are processed, and everything has ended. Cancelling the one
    who opened it, or Ctrl-C in it, cancels what is in flight, and waits for it.

    Args:
        nursery: where the work lives: a supervising task is started in it, and each batch is
            processed beneath that; ``None`` opens a nursery for this block.
        process: an async function of a list of items, called in a copy of the context that the
            block was entered in. It returns a list with a result for each item, in their order, or
            ``None``, which means ``None`` for each. A result may be an `outcome.Error`: then that
            item's submitter alone gets the error; or an `outcome.Value`.
        batch_size: how many items a batch has at most. So many are processed at once, as soon as
            one of *max_concurrency* calls is free to begin.
        max_age: seconds (or a `datetime.timedelta`) from the submission of the oldest item that
            waits until it is processed with those that have joined it. 0 puts together what is
            submitted in one pass of trio's scheduler; infinity waits for a full batch, or the end
            of the block.
        max_concurrency: how many batches are processed at the same time. While as many are, items
            go on collecting.
        queue_size: how many items may wait for a batch, by default ``10 * batch_size``; further
            submitters wait in line, first come, first served, until there is room.
        name: label in events, of tasks, and in messages.

    Raises:
        OperationsCancelledError: at the end of the block: the nursery was cancelled, but not the
            one who opened the batcher. An error of the block's body wins over it.
        BaseExceptionGroup: at the end of the block: *process* raised something that is not an
            `Exception`, which has stopped the batcher.
        RuntimeError: the nursery's block had ended.

    Example::

        async def fetch_users(ids: list[int]) -> list[User]:
            return await database.users(ids)


        async with open_batcher(nursery, fetch_users, batch_size=50) as users:
            user = await users.submit(7)  # in this task and in many others
    """
    check_nursery(nursery)
    operation("process", process)
    size = integer("batch_size", batch_size, minimum=1)
    flusher = Flusher(
        process=process,
        batch_size=size,
        max_age=seconds("max_age", max_age),
        max_concurrency=integer("max_concurrency", max_concurrency, minimum=1),
        queue_size=10 * size
        if queue_size is None
        else integer("queue_size", queue_size, minimum=size),
        name=name,
    )
    return Batcher(Block("open_batcher", nursery), flusher)


@final
class Batcher(Generic[T, R]):
    """Items from many tasks on their way into batches; made by `open_batcher`."""

    def __init__(self, block: Block, flusher: Flusher) -> None:
        self._block = block
        self._flusher = flusher

    def __repr__(self) -> str:
        flusher, state = self._flusher, self._block.state
        if state == "open" and not flusher.is_open:
            state = "stopped"
        counts = f"{flusher.waiting + flusher.in_line} waiting, {flusher.in_flight} in flight"
        return f"<batcher {flusher.name!r}: {state}, {counts}>"

    async def submit(self, item: T) -> R:
        """Return what `process` has returned for *item*, as part of some batch.

        A cancelled submitter waits no longer. An item that is not being processed yet is withdrawn,
        and its place is free; of one that is, the result is dropped; when nobody waits for a batch
        any more, its `process` call is cancelled.

        Raises:
            Exception: what `process` raised; each submitter of the batch gets an error of its own
                of that type, with what was raised as its ``__cause__``. Or, as it is, the error
                that `process` returned for this item in an `outcome.Error`.
            ValueError: `process` returned more or fewer results than there were items.
            TypeError: `process` returned neither a list of results nor ``None``.
            OperationsCancelledError: the batcher was stopped: its nursery, or the one who opened
                it, was cancelled, or `process` raised something that is not an `Exception`.
            trio.ClosedResourceError: the batcher's block has ended.
            RuntimeError: the block was not entered yet; or `process` submits to its own batcher,
                for which it would wait for ever.
        """
        result: R = await self._flusher.submit(item)
        return result

    def statistics(self) -> BatcherStatistics:
        """Return what the batcher holds now, and what it has done so far."""
        flusher = self._flusher
        return BatcherStatistics(
            waiting=flusher.waiting,
            in_flight=flusher.in_flight,
            flushes=flusher.flushes,
            items=flusher.items,
            failures=flusher.failures,
            in_line=flusher.in_line,
        )

    @enable_ki_protection
    async def __aenter__(self) -> Self:
        block, flusher = self._block, self._flusher
        await block.prepare()
        await block.begin(flusher.run, flusher.stop, flusher.name)
        flusher.open(trio.lowlevel.current_task().context)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return self

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block = self._block
        self._flusher.close()
        block.is_open = False
        if exc is not None and not isinstance(exc, Exception):
            block.job.scope.cancel()
        await block.join()  # noqa: ASYNC102 - a cancellation is passed on, and waits
        failure = self._take_failure()
        try:
            block.settle(failure, exc)
        finally:
            del failure, exc

    def _take_failure(self) -> BaseException | None:
        job = self._block.job
        error, job.error = job.error, None
        if error is not None:
            return BaseExceptionGroup("`process` stopped the batcher", leaves_of(error))
        if self._flusher.is_complete or job.was_interrupted:
            return None
        return OperationsCancelledError()


def batched(
    nursery: trio.Nursery | None,
    source: AsyncIterable[T],
    *,
    batch_size: int,
    max_age: Seconds = math.inf,
    name: str = "batched",
) -> Batches[T]:
    """Group the items of *source* into lists, in order: by size, or by age.

    Every item that was pulled is in exactly one batch; none is lost when an age expires, nor when
    the consumer is cancelled while it waits. A batch is due when it has *batch_size* items, when
    its oldest is *max_age* old, or when the source has ended. While the consumer is busy with one
    batch, the next goes on filling; beyond *batch_size* items the source is held back. Leaving the
    block early stops the pulling and waits for that; what was pulled and not taken is dropped.

    Args:
        nursery: where the pulling task lives; ``None`` opens a nursery for this block.
        source: an async iterable or a memory channel, pulled by one task, in the context that the
            block was entered in. An async generator is closed by that task when the block ends; a
            channel is left open.
        batch_size: how many items a batch has at most.
        max_age: seconds (or a `datetime.timedelta`) from when the oldest item of a batch was pulled
            until the batch is due, full or not.
        name: label of the task, and in messages.

    Raises:
        Exception: from the iterator, what the source raised, as it is, after the items that came
            before; or at the end of the block, if that was left before. An error of the block's
            body wins over it.
        OperationsCancelledError: from the iterator, after what was pulled: the nursery was
            cancelled, but not the consumer.
        trio.BusyResourceError: two tasks iterate at the same time.
        RuntimeError: the nursery's block had ended.

    Example::

        async with batched(nursery, channel, batch_size=50, max_age=1.0) as batches:
            async for batch in batches:
                await database.insert(batch)
    """
    check_nursery(nursery)
    _check_source(source)
    filler = Filler(integer("batch_size", batch_size, minimum=1), seconds("max_age", max_age))
    return Batches(Block("batched", nursery), source, filler, name)


def _check_source(source: object) -> None:
    if inspect.iscoroutine(source):
        source.close()
    if isinstance(source, AsyncIterable):
        return
    if isinstance(source, Iterable):
        raise TypeError(
            f"`source` must be an async iterable, got the sync {source!r}: itertools.batched groups"
            " that without a task"
        )
    raise TypeError(f"`source` must be an async iterable or a memory channel, got {source!r}")


@final
class Batches(Generic[T]):
    """Lists of items: ``async with`` pulls them, ``async for`` yields them. Made by `batched`.

    One task at a time may iterate.
    """

    def __init__(self, block: Block, source: AsyncIterable[T], filler: Filler, name: str) -> None:
        self._block = block
        self._source = source
        self._filler = filler
        self._name = name
        self._reason_was_given = False

    def __repr__(self) -> str:
        return f"<batched {self._name!r}: {self._block.state}, {len(self._filler.held)} held>"

    @enable_ki_protection
    async def __aenter__(self) -> Self:
        block, filler = self._block, self._filler
        await block.prepare()
        filler.open(aiter(self._source), trio.lowlevel.current_task().context)
        await block.begin(filler.run, filler.end, self._name)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return self

    def __aiter__(self) -> AsyncIterator[list[T]]:
        if not self._block.was_entered:
            raise TypeError(
                "batched needs a block of its own: `async with batched(...) as batches:` and in it"
                " `async for batch in batches:`"
            )
        return self

    async def __anext__(self) -> list[T]:
        self._check_open()
        batch: list[T] = await self._filler.take()
        if batch is not ENDED:
            return batch
        self._check_open()
        if not self._reason_was_given:
            self._reason_was_given = True
            self._block.settle(self._take_failure(), None)
        raise StopAsyncIteration

    def _check_open(self) -> None:
        if not self._block.is_open:
            raise trio.ClosedResourceError("the block of these batches has ended")

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        block = self._block
        block.is_open = False
        block.job.scope.cancel()
        await block.join()  # noqa: ASYNC102 - a cancellation is passed on, and waits
        self._filler.held = []
        failure = self._take_failure(left_early=True)
        try:
            block.settle(failure, exc)
        finally:
            del failure, exc

    def _take_failure(self, *, left_early: bool = False) -> BaseException | None:
        job = self._block.job
        error, job.error = job.error, None
        if error is None and job.was_cancelled and not left_early:
            return OperationsCancelledError()
        return error
