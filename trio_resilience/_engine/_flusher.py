"""Items that many tasks hand in one by one, processed together: by size, or by age."""

from __future__ import annotations

import math
import reprlib
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextvars import Context, ContextVar
from copy import copy
from types import TracebackType
from typing import Any, Literal, TypeAlias, final

import attrs
import trio
from outcome import Error, Value
from trio.lowlevel import Abort, Task, enable_ki_protection

from trio_resilience._checks import label
from trio_resilience._engine._copies import own_copy
from trio_resilience._engine._driver import run_unprotected
from trio_resilience._engine._report import report
from trio_resilience._errors import OperationsCancelledError
from trio_resilience._events import BatchFlushed

Reason: TypeAlias = Literal["size", "age", "close"]
Outcome: TypeAlias = Value[Any] | Error


@final
@attrs.define(eq=False, repr=False)
class _Entry:
    """An item, and the task that waits for what comes of it."""

    flusher: Flusher
    item: Any
    since: float
    task: Task | None
    """``None`` when it has its answer, or waits no more."""
    batch: _Batch | None = None
    """``None`` while it waits for one."""

    def abort(self, _: object) -> Abort:
        self.task = None
        if self.batch is None:
            self.flusher.withdraw(self)
        else:
            self.batch.lose_one()
        return Abort.SUCCEEDED

    def answer(self, outcome: Outcome) -> None:
        task, self.task = self.task, None
        if task is not None:
            trio.lowlevel.reschedule(task, outcome)


@final
@attrs.define(eq=False, repr=False)
class _Batch:
    """The items that are processed together."""

    flusher: Flusher
    entries: list[_Entry]
    reason: Reason
    wanted: int
    """How many of them somebody still waits for."""
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    began: float = attrs.field(default=math.nan, init=False)
    is_running: bool = attrs.field(default=False, init=False)
    """Whether `process` has been called, and has not ended."""

    def lose_one(self) -> None:
        self.wanted -= 1
        if self.wanted == 0:
            self.scope.cancel()


# The batches that the code in this context processes, those of enclosing batchers included.
_processed_here: ContextVar[tuple[_Batch, ...]] = ContextVar("processed_here", default=())


@final
@attrs.define(eq=False, repr=False)
class Flusher:
    """The items of one batcher, the task that forms batches of them, and what they came to.

    Those that wait for a batch, and those that wait for room to do so, stand in one line: whoever
    is among its first *queue_size* has room. So nobody has to move up.
    """

    process: Callable[[list[Any]], Awaitable[Any]]
    batch_size: int
    max_age: float
    max_concurrency: int
    queue_size: int
    name: str

    is_open: bool = attrs.field(default=False, init=False)
    """Whether items are accepted."""
    is_closing: bool = attrs.field(default=False, init=False)
    is_complete: bool = attrs.field(default=False, init=False)
    """Whether everything was processed before the end."""
    in_flight: int = attrs.field(default=0, init=False)
    flushes: int = attrs.field(default=0, init=False)
    items: int = attrs.field(default=0, init=False)
    failures: int = attrs.field(default=0, init=False)

    _line: OrderedDict[_Entry, None] = attrs.field(factory=OrderedDict[_Entry, None], init=False)
    """Ordered, as in a plain dict the first is found by passing over all that have left."""
    _running: int = attrs.field(default=0, init=False)
    _opener: Context | None = attrs.field(default=None, init=False)
    _nursery: trio.Nursery = attrs.field(init=False)
    _supervisor: Task | None = attrs.field(default=None, init=False)
    """The supervising task while it is parked."""
    _alarm: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    """Wakes it when the oldest item is old enough; moved there by whoever hands that in."""

    @property
    def waiting(self) -> int:
        """How many items wait for a batch."""
        return min(len(self._line), self.queue_size)

    @property
    def in_line(self) -> int:
        """How many items wait for room to wait for a batch."""
        return len(self._line) - self.waiting

    # --- those who hand in ----------------------------------------------------------------------

    @enable_ki_protection
    async def submit(self, item: object) -> Any:
        """Hand in *item*, wait until its batch was processed, return or raise what came of it."""
        if not self.is_open or _processed_here.get():
            await self._refuse()
        # No checkpoint before this: trio delivers a pending cancellation as soon as the task parks,
        # and that withdraws the item before anybody else runs.
        entry = _Entry(self, item, trio.current_time(), trio.lowlevel.current_task())
        self._line[entry] = None
        count = len(self._line)
        if (count == 1 or count >= self.batch_size) and self._supervisor is not None:
            self._stir(entry, count)
        return await trio.lowlevel.wait_task_rescheduled(entry.abort)

    async def _refuse(self) -> None:
        """Raise, after a checkpoint, if nothing may be handed in, or not from here."""
        if any(batch.flusher is self and batch.is_running for batch in _processed_here.get()):
            await trio.lowlevel.checkpoint()
            raise RuntimeError(
                f"`process` can't submit to the batcher that it works for, {self.name!r}: it would"
                " wait for itself"
            )
        if self.is_open:
            return
        await trio.lowlevel.checkpoint()
        if self._opener is None:
            raise RuntimeError(
                f"{self.name!r} needs its block: `async with open_batcher(...) as batcher:`"
            )
        if self.is_closing:
            raise trio.ClosedResourceError(f"the block of {self.name!r} has ended")
        raise OperationsCancelledError

    def _stir(self, newest: _Entry, count: int) -> None:
        if self._running == self.max_concurrency:
            return
        if count >= self.batch_size:
            self._wake()
        else:
            self._alarm.deadline = newest.since + self.max_age

    def withdraw(self, entry: _Entry) -> None:
        """Forget an item that waits. If it was the oldest, the alarm comes early, once."""
        del self._line[entry]

    # --- the supervising task -------------------------------------------------------------------

    def open(self, opener: Context) -> None:
        """Accept items; they are processed in copies of the context *opener*."""
        self._opener = opener
        self.is_open = True

    @enable_ki_protection
    async def run(self) -> None:
        """Process what is handed in, beneath this task, until it is closed."""
        async with trio.open_nursery() as self._nursery:
            try:
                await self._supervise()
            finally:
                # Who waits for a batch that will never be need not wait for those in flight.
                self.stop()
        self.is_complete = not self._nursery.cancel_scope.cancel_called

    async def _supervise(self) -> None:
        while not (self.is_closing and not self._line):
            reason = self._due()
            if reason is None:
                await self._park()
            else:
                self._start(self._next_batch(reason))
                if self._due() is not None:
                    # Of two tasks that start in one pass, trio may run the second first.
                    await trio.lowlevel.checkpoint()

    async def _park(self) -> None:
        is_waiting = self._running < self.max_concurrency and bool(self._line)
        with trio.CancelScope(deadline=self._old_enough() if is_waiting else math.inf) as scope:
            self._alarm, self._supervisor = scope, trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, _: object) -> Abort:
        self._supervisor = None
        return Abort.SUCCEEDED

    def _wake(self) -> None:
        if self._supervisor is not None:
            trio.lowlevel.reschedule(self._supervisor)
            self._supervisor = None

    def _due(self) -> Reason | None:
        """Return why a batch is to be processed now, if it is."""
        if not self._line or self._running == self.max_concurrency:
            return None
        if self.is_closing:
            return "close"
        if len(self._line) >= self.batch_size:
            return "size"
        return "age" if trio.current_time() >= self._old_enough() else None

    def _old_enough(self) -> float:
        return next(iter(self._line)).since + self.max_age

    def close(self) -> None:
        """Accept nothing more, and process all that waits."""
        self.is_open, self.is_closing = False, True
        self._wake()

    @enable_ki_protection
    def stop(self) -> None:
        """Accept nothing more, and tell all who wait that nothing will come of it."""
        self.is_open = False
        while self._line:
            entry, _ = self._line.popitem(last=False)
            entry.answer(Error(OperationsCancelledError()))

    # --- a batch --------------------------------------------------------------------------------

    def _next_batch(self, reason: Reason) -> _Batch:
        count = min(len(self._line), self.batch_size)
        entries = [self._line.popitem(last=False)[0] for _ in range(count)]
        batch = _Batch(self, entries, reason, count)
        for entry in entries:
            entry.batch = batch
        self._running += 1
        self.in_flight += count
        return batch

    def _start(self, batch: _Batch) -> None:
        assert self._opener is not None
        context = self._opener.copy()
        context.run(_processed_here.set, (*context.get(_processed_here, ()), batch))
        start: Any = self._nursery.start_soon
        context.run(start, self._flush, batch, name=f"{self.name} flush")

    @enable_ki_protection
    async def _flush(self, batch: _Batch) -> None:
        outcomes: list[Outcome] | None = None
        error: Exception | None = None
        try:
            with batch.scope:
                # Nothing is processed for nobody, nor when the nursery is cancelled already.
                await trio.lowlevel.checkpoint_if_cancelled()
                batch.began, batch.is_running = trio.current_time(), True
                results = await self._call([entry.item for entry in batch.entries])
                if isinstance(results, Exception):
                    error = results
                    outcomes = [Error(copy(error)) for _ in batch.entries]
                else:
                    outcomes = self._outcomes_of(results)
        except Exception as raised:  # noqa: BLE001 - those who wait for the batch get it
            error = self._without_earlier_frames(raised)
            outcomes = [Error(own_copy(error)) for _ in batch.entries]
        finally:
            self._end(batch, outcomes, error)
            del batch, outcomes, error

    async def _call(self, items: list[Any]) -> list[Any] | Exception:
        """Return the results, or what is wrong with them; raise what `process` raises."""
        count = len(items)
        results = await run_unprotected(self.process, items)
        if results is None:
            return [None] * count
        if not _is_sequence(results):
            return TypeError(
                "`process` must return a list with a result for each item, or None,"
                f" got {reprlib.repr(results)}"
            )
        listed = list[Any](results)
        if len(listed) != count:
            return ValueError(f"`process` returned {len(listed)} results for {count} items")
        return listed

    def _outcomes_of(self, results: list[Any]) -> list[Outcome]:
        times = Counter(id(each.error) for each in results if isinstance(each, Error))
        return [self._outcome_of(each, times) for each in results]

    def _outcome_of(self, result: Any, times: Counter[int]) -> Outcome:
        # Made anew, for an outcome can be unwrapped only once, and the user may keep this one.
        outcome = result
        if isinstance(result, Error):
            return Error(self._own(result.error, times))
        return Value(outcome.value if isinstance(result, Value) else result)

    def _own(self, error: BaseException, times: Counter[int]) -> Exception:
        """Return *error* itself, or a copy if another submitter gets it too, or has got it."""
        if not isinstance(error, Exception):
            raise error
        if times[id(error)] > 1 or self._frames_of("submit", error):
            return own_copy(error)
        return error

    def _end(self, batch: _Batch, outcomes: list[Outcome] | None, error: Exception | None) -> None:
        entries, batch.entries = batch.entries, []
        self._running -= 1
        self.in_flight -= len(entries)
        if outcomes is None:
            answers: Iterable[Outcome] = (Error(OperationsCancelledError()) for _ in entries)
        else:
            answers = outcomes
        for entry, answer in zip(entries, answers, strict=True):
            entry.answer(answer)
        if self._line:
            self._wake()
        if batch.is_running:
            batch.is_running = False
            self._count(batch, len(entries), error, cancelled=outcomes is None)

    def _count(self, batch: _Batch, size: int, error: Exception | None, *, cancelled: bool) -> None:
        self.flushes += 1
        self.failures += error is not None
        self.items += size if error is None and not cancelled else 0
        report(
            BatchFlushed,
            policy=self.name,
            operation=label(self.process),
            size=size,
            reason=batch.reason,
            duration=trio.current_time() - batch.began,
            error=error,
            cancelled=cancelled,
        )

    def _without_earlier_frames(self, error: Exception) -> Exception:
        """Let the traceback of *error* begin with `_call`, and end before an earlier flush.

        Python puts the frames of a new raise in front of those of the old ones: a `process` that
        always raises one and the same instance would make it carry, and keep, all of its batches.
        """
        ours = self._frames_of("_call", error)
        if not ours:
            return error
        last = ours[0]
        while len(ours) > 1 and last.tb_next is not None:
            if last.tb_next is ours[1]:
                last.tb_next = None
                break
            last = last.tb_next
        return error.with_traceback(ours[0])

    def _frames_of(self, method: str, error: BaseException) -> list[TracebackType]:
        """Return those steps of the traceback of *error* that ran this *method* of ours."""
        code, step = getattr(type(self), method).__code__, error.__traceback__
        found = list[TracebackType]()
        while step is not None:
            if step.tb_frame.f_code is code and step.tb_frame.f_locals.get("self") is self:
                found.append(step)
            step = step.tb_next
        return found


def _is_sequence(results: object) -> bool:
    return isinstance(results, Sequence) and not isinstance(results, (str, bytes, bytearray))
