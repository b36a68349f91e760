"""Run operations from one source in a bounded number of worker tasks.

A worker runs one operation after the other, so that an operation costs no task. What it needs
of its own, it has: a copy of the caller's context, and the worker's cancel scope, whose deadline is
moved to where this operation's time ends.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from contextvars import Context, copy_context
from functools import partial
from itertools import chain, islice
from typing import Any, Final, final

import attrs
import trio
from outcome import Error, Value
from trio.lowlevel import Abort, Task, disable_ki_protection, enable_ki_protection

from trio_resilience._checks import (
    NotAnOperationError,
    callable_operation,
    label,
    refuse_coroutine,
)
from trio_resilience._engine._chooser import Chooser, Key
from trio_resilience._engine._driver import (
    COROUTINE,
    Drive,
    as_coroutine,
    operation_mark,
)
from trio_resilience._engine._outbox import Outbox
from trio_resilience._engine._permits import (
    HeldPermit,
    SharedBound,
    TakesPermits,
    held_here,
)
from trio_resilience._engine._plan import Plan
from trio_resilience._engine._report import current_subscriptions, report
from trio_resilience._engine._source import PLAIN, AsyncSource, Pair, close, numbered, size_of
from trio_resilience._engine._traceback import without_our_frames
from trio_resilience._errors import OperationTimeoutError
from trio_resilience._events import OperationFinished, OperationStarted, TimedOut

MISSING: Final = object()
"""Stands in the results for an operation that has none yet."""


@final
@attrs.define(eq=False, repr=False)
class Pool:
    """The workers of one call, what they have done so far, and why they stopped."""

    plan: Plan
    items: Any
    """What to run: an iterator, or an async one, or the list as the user gave it."""
    caller: Context
    outbox: Outbox | None = None
    """Where a stream's results go; without one they are kept in `results`."""

    results: list[Any] = attrs.field(factory=list[Any], init=False)
    size: float = attrs.field(init=False)
    """How many operations there are; infinity if that shows only as they are pulled."""
    started: int = attrs.field(default=0, init=False)
    failures: dict[int, tuple[Any, Exception]] = attrs.field(
        factory=dict[int, tuple[Any, Exception]], init=False
    )
    """Items whose operations raised, and what, by number; unless it is collected."""
    error: BaseException | None = attrs.field(default=None, init=False)
    """What the source or a callback raised."""
    is_complete: bool = attrs.field(default=False, init=False)
    """Whether every operation was pulled and has run to its end."""

    _pairs: Iterator[Pair] = attrs.field(init=False)
    _async_source: AsyncSource | None = attrs.field(default=None, init=False)
    _peeked: Pair | None = attrs.field(default=None, init=False)
    """The first operation of the next batch, once it is pulled."""
    _left: float = attrs.field(default=math.inf, init=False)
    """How many more operations this batch may begin; infinity if only the source can tell."""
    _stopping: bool = attrs.field(default=False, init=False)
    _nursery: trio.Nursery = attrs.field(init=False)
    _supervisor: Task | None = attrs.field(default=None, init=False)
    """The supervising task while it waits for the workers."""
    _clean: Context = attrs.field(factory=copy_context, init=False)
    """What new workers start in, so that they inherit nothing from operations."""
    _workers: int = attrs.field(default=0, init=False)
    _spare: int = attrs.field(default=0, init=False)
    """How many more workers may be started in this batch, as operations turn up."""
    _permits: set[HeldPermit] = attrs.field(factory=set[HeldPermit], init=False)
    """Those of a shared bound that our workers hold."""
    _bound: TakesPermits = attrs.field(init=False)
    """Where they come from."""
    _chooser: Chooser | None = attrs.field(default=None, init=False)
    """Who decides what runs next, if that depends on keys."""
    _seekers: int = attrs.field(default=0, init=False)
    """How many workers wait for a shared bound, or for what the next operation needs besides."""
    _is_choosing: bool = attrs.field(default=False, init=False)
    """Whether one of them knows of an item that may run, and lacks the permit or the room."""
    _outer: tuple[HeldPermit, ...] = attrs.field(factory=held_here.get, init=False)
    _began: dict[int, float] = attrs.field(factory=dict[int, float], init=False)
    """When running operations began, while somebody listens."""

    def __attrs_post_init__(self) -> None:
        self.size = size_of(self.items)
        if not isinstance(self.plan.max_concurrency, int):
            self._bound = self.plan.max_concurrency.open()
        items: Any = self.items
        if hasattr(items, "__anext__"):
            self._async_source = AsyncSource(items, self.abort)
        else:
            self._pairs = numbered(items, self.caller)
        if self.plan.key is not None:
            self._chooser = self._make_chooser(self.plan.key)
            if self.outbox is not None and self._places_are_pulled():
                self.outbox.on_free = self._chooser.rouse

    def _make_chooser(self, key: Key) -> Chooser:
        outbox = self.outbox if self._places_are_pulled() else None

        @disable_ki_protection
        def key_of(item: object) -> Hashable:
            try:
                found = self.caller.run(key, item)
            except (StopIteration, StopAsyncIteration) as error:
                # As in a generator: out of an iterator it would mean something else.
                raise RuntimeError(f"`key` raised {type(error).__name__}") from error
            refuse_coroutine("key", found)
            return found

        return Chooser(
            key=key_of,
            most=self.plan.max_per_key,
            lookahead=self.plan.lookahead,
            pull=self._pull_counted if outbox is None else self._pull_into_place,
            may_go_on=lambda: self._may_go_on() and not self._stopping,
            has_room=(lambda: True) if outbox is None else outbox.has_place,
        )

    def _places_are_pulled(self) -> bool:
        """Tell whether an item has its place in the outbox from when it is pulled.

        In order, what is set aside holds up the results of all that come after it. So it must not
        have to wait for a place that those take up.
        """
        return self.plan.key is not None and self.outbox is not None and self.outbox.ordered

    # --- the supervising task -------------------------------------------------------------------

    @enable_ki_protection
    async def run(self) -> None:
        """Run every operation beneath this task, until all is done or stopped."""
        try:
            async with trio.open_nursery() as self._nursery:
                if self._async_source is not None:
                    self._nursery.start_soon(self._async_source.pull, self.caller)
                await self._run_batches()
                self.is_complete = not self._stopping
        finally:
            for permit in tuple(self._permits):
                self._give_back(permit)
            try:
                close(self.items, self.caller)
            except BaseException as error:  # noqa: BLE001 - the source's clean-up is the source's error
                if self.error is None:
                    self.error = error

    async def _run_batches(self) -> None:
        size = self.plan.batch_size
        if size is None:
            await self._run_batch(math.inf)
            return
        rest = None if self._is_gated() else self._pairs
        while await self._peek():
            if rest is not None:
                assert self._peeked is not None
                self._pairs = chain((self._peeked,), islice(rest, size - 1))
                self._peeked = None
            await self._run_batch(size)
            if rest is not None:
                self._pairs = rest
            if await self._peek():
                await trio.sleep(self.plan.delay_between_batches)

    async def _peek(self) -> bool:
        """Pull the next operation ahead, to learn whether there is a further batch at all."""
        if self._peeked is None and not self._stopping:
            try:
                self._peeked = await self._pull()
            except trio.Cancelled:
                raise
            except BaseException as error:  # noqa: BLE001 - it is raised to the caller as it is
                self.abort(error)
        return self._peeked is not None

    async def _run_batch(self, size: float) -> None:
        """Run the operations of one batch; *size* is how many there may be."""
        self._left, limit = size, self.plan.max_concurrency
        if isinstance(limit, int):
            useful = int(min(limit, self.size, size))
            # Of unknown length: begin with one and let every worker that finds work start two more.
            # There is always one: only the source itself, not its length, tells that it is empty.
            count = max(1, useful) if self.size < math.inf else 1
            self._spare = max(0, useful - count)
        else:
            count = 1
        for _ in range(count):
            self._start_worker()
        self._supervisor = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(self._abort_supervisor)

    def _abort_supervisor(self, _: object) -> Abort:
        # Called in the very instant of a cancellation, so that no worker that is awake at that
        # moment begins another operation.
        self._stopping = True
        self._supervisor = None
        return Abort.SUCCEEDED

    @enable_ki_protection
    def _start_worker(self) -> None:
        self._workers += 1
        start: Any = self._nursery.start_soon
        self._clean.copy().run(start, self._work, name=f"{self.plan.kind} worker")

    @enable_ki_protection
    def _worker_left(self) -> None:
        self._workers -= 1
        if self._workers == 0 and self._supervisor is not None:
            trio.lowlevel.reschedule(self._supervisor)
            self._supervisor = None

    @enable_ki_protection
    def stop(self) -> None:
        """Begin nothing new and cancel what is running."""
        self._stopping = True
        self._nursery.cancel_scope.cancel()

    def abort(self, error: BaseException) -> None:
        """Stop because of the source or a callback: *error* comes out as it is."""
        if self.error is None:
            self.error = error
        self.stop()

    # --- a worker -------------------------------------------------------------------------------

    async def _work(self) -> None:  # noqa: C901, PLR0912, PLR0915 - a hot loop: no call that can be spared
        plan, caller, results = self.plan, self.caller, self.results
        pairs = None if self._is_gated() else self._pairs
        is_listed = self.outbox is None
        is_heard = bool(current_subscriptions())
        is_plain = (
            not is_heard and is_listed and plan.on_error != "collect" and plan.on_done is None
        )
        timeout, is_timed = plan.timeout, plan.timeout < math.inf
        prefix, permit = plan.prefix, None
        now, set_mark, get_mark = trio.current_time, operation_mark.set, operation_mark.get
        task = trio.lowlevel.current_task()
        home, drive = task.context, Drive()
        index, deadline = -1, math.inf
        pair: Pair | None = None
        context: Context | None = None
        failure: Exception | None = None
        item: Any = None
        value: Any = None
        coro: Any = None
        scope: Any = None
        call: Any = None
        try:
            while not self._stopping:
                failure = None
                try:
                    # One scope for as many operations as end well and in time.
                    with trio.CancelScope() as scope:
                        while not self._stopping:
                            try:
                                if pairs is not None:
                                    pair = next(pairs, None)
                                else:
                                    # It may be long until the next: hold on to nothing meanwhile.
                                    pair = item = value = context = coro = None
                                    drive.unload()
                                    task.context, scope.deadline = home, math.inf
                                    pair, permit = await self._admit(permit, index)
                            except trio.Cancelled:
                                raise
                            except BaseException as error:  # noqa: BLE001 - comes out as it is
                                self.abort(error)
                                return
                            if pair is None:
                                return
                            index, item = pair
                            if is_listed and pairs is not None:
                                results.append(MISSING)
                            if self._spare:
                                self._grow()
                            context = caller.copy()
                            set_mark(index)
                            if permit is not None:
                                context.run(held_here.set, (*self._outer, permit))
                            if is_heard:
                                # In the operation's context, where a listener may leave something.
                                context.run(self._report_start, index, item)
                            # Two spellings: to unpack nothing would cost as much as the call.
                            call = context.run
                            coro = call(*prefix, item) if prefix else call(item)
                            if type(coro) is not COROUTINE:
                                coro = as_coroutine(prefix[0] if prefix else item, coro)
                            drive.coro, drive.send = coro, coro.send
                            drive.__next__ = partial(context.run, coro.send, None)
                            task.context = context
                            if is_timed:
                                deadline = now() + timeout
                                scope.deadline = deadline
                            value = await drive
                            if get_mark() == index:  # it never parked: be polite in its stead
                                task.context = home
                                await trio.lowlevel.cancel_shielded_checkpoint()
                            if is_plain:
                                results[index] = value
                            else:
                                self._succeeded(index, item, value)
                            if is_timed and now() >= deadline:
                                break  # the scope has expired, or is about to: take a new one
                except Exception as error:  # noqa: BLE001 - to keep it is what a worker is for
                    failure = error
                if failure is None and scope.cancelled_caught:
                    failure = self._time_out(item)
                if failure is not None:
                    if get_mark() == index:
                        task.context = home
                        await trio.lowlevel.cancel_shielded_checkpoint()
                    self._failed(index, item, failure)
        finally:
            self._give_back(permit)
            drive.discard()
            if type(coro) is COROUTINE:
                coro.close()  # it has ended, unless Ctrl-C came before it began
            if is_heard:
                self._report_end(index, item, None, cancelled=True)
            self._worker_left()
            # The traceback of an error leads back here; from here nothing may lead to the error.
            del self, results, drive, pair, context, failure, item, value, coro, call

    def _is_gated(self) -> bool:
        return (
            self.outbox is not None
            or self._async_source is not None
            or self.plan.key is not None
            or not isinstance(self.plan.max_concurrency, int)
        )

    @enable_ki_protection
    def _grow(self) -> None:
        for _ in range(min(2, self._spare)):
            self._spare -= 1
            self._start_worker()

    @enable_ki_protection
    async def _admit(
        self, done: HeldPermit | None, index: int
    ) -> tuple[Pair | None, HeldPermit | None]:
        """Give back what operation *index* had; wait for what the next one needs; pull that.

        Under a shared bound one worker at a time seeks. So the call has one place in the limiter's
        line, and a slow source, or consumer, keeps no more than one permit from others. Only if
        that one waits for the source, does another take up an item whose key has come free.
        """
        self._give_back(done)
        if self._chooser is not None:
            self._chooser.finished(index)
        if isinstance(self.plan.max_concurrency, int):
            return await self._seek(), None
        if self._seekers and not self._has_work_besides():
            return None, None
        self._seekers += 1
        try:
            pair, permit = await self._seek_under(self.plan.max_concurrency)
        finally:
            self._seekers -= 1
        if pair is None:
            self._give_back(permit)
            return None, None
        if self._may_go_on() if self._chooser is None else not self._chooser.is_drained():
            self._start_worker()
        return pair, permit

    async def _seek_under(self, bound: SharedBound) -> tuple[Pair | None, HeldPermit | None]:
        if self._chooser is not None:
            return await self._choose_under(bound, self._chooser)
        permit = await self._take_useful_permit(bound)
        return None if permit is None else await self._seek(), permit

    async def _choose_under(
        self, bound: SharedBound, chooser: Chooser
    ) -> tuple[Pair | None, HeldPermit | None]:
        """Wait for an item, then for a permit, and then run whichever item is the first."""
        outbox = None if self._places_are_pulled() else self.outbox
        while await chooser.has_next() and not self._stopping:
            if self._is_choosing:
                return None, None  # who is in line already takes it, and has a worker follow
            self._is_choosing = True
            permit = await self._take_permit(bound)
            if outbox is None or outbox.has_room():
                if outbox is not None:
                    outbox.take_place()
                self._is_choosing = False
                return self._begun(chooser.next_nowait()), permit
            self._give_back(permit)
            await outbox.wait_for_room()
            self._is_choosing = False
        self._left = 0
        return None, None

    def _has_work_besides(self) -> bool:
        return self._chooser is not None and not self._is_choosing and self._chooser.has_ready()

    def _may_go_on(self) -> bool:
        """Tell whether another operation may turn up in this batch; a list is seen to its end."""
        is_used_up = type(self.items) in PLAIN and self.started >= len(self.items)
        return self._left > 0 and not is_used_up

    async def _seek(self) -> Pair | None:
        outbox = None if self._places_are_pulled() else self.outbox
        if outbox is not None:
            await outbox.reserve()
        pair = await (self._pull_counted() if self._chooser is None else self._chooser.next())
        if pair is None or self._stopping:
            # Whoever comes after this has nothing to wait for either.
            self._left = 0
            if outbox is not None:
                outbox.free()
            return None
        return self._begun(pair)

    def _begun(self, pair: Pair) -> Pair:
        if self.outbox is None:
            # They may come in any order: of an async source, or where keys decide.
            self.results.extend([MISSING] * (pair[0] + 1 - len(self.results)))
        return pair

    async def _pull_counted(self) -> Pair | None:
        if self._stopping or not self._may_go_on():
            return None
        self._left -= 1
        pair = await self._pull()
        if pair is None:
            self._left = 0
        else:
            self.started = max(self.started, pair[0] + 1)
        return pair

    async def _pull_into_place(self) -> Pair | None:
        assert self.outbox is not None
        self.outbox.take_place()
        pair = await self._pull_counted()
        if pair is None:
            self.outbox.free()
        return pair

    @disable_ki_protection
    async def _pull(self) -> Pair | None:
        if self._peeked is not None:
            pair, self._peeked = self._peeked, None
            return pair
        if self._async_source is None:
            return next(self._pairs, None)
        return await self._async_source.next()

    async def _take_useful_permit(self, bound: SharedBound) -> HeldPermit | None:
        """Take a permit when there is a use for it; none is kept from others while there is not."""
        while self._may_go_on():
            permit = await self._take_permit(bound)
            if self.outbox is None or self.outbox.has_room():
                return permit
            self._give_back(permit)
            await self.outbox.wait_for_room()
        return None

    async def _take_permit(self, bound: SharedBound) -> HeldPermit:
        if not self._bound.try_take():
            self._refuse_deadlock(bound.owner)
            await self._bound.wait()
        permit = HeldPermit(bound.owner)
        self._permits.add(permit)
        return permit

    def _refuse_deadlock(self, owner: object) -> None:
        # While an operation of this call holds a permit, the turn of the next will come.
        if not self._permits and any(
            permit.owner is owner and permit.is_held for permit in self._outer
        ):
            raise RuntimeError(
                f"{self.plan.kind} would wait for ever: it waits for a permit of {owner!r}, of"
                " which the operation that called it holds one; give it a bound of its own"
            )

    @enable_ki_protection
    def _give_back(self, permit: HeldPermit | None) -> None:
        if permit is not None and permit.is_held:
            permit.is_held = False
            self._permits.discard(permit)
            self._bound.give_back()

    # --- what comes of an operation -------------------------------------------------------------

    def _succeeded(self, index: int, item: object, value: object) -> None:
        self._report_end(index, item, None)
        result = Value(value) if self.plan.on_error == "collect" else value
        self._keep(index, item, result)
        self._tell(index, Value(value))

    def _failed(self, index: int, item: object, error: Exception) -> None:
        if not self.plan.prefix:
            error = _refusal(index, item) or error
        self._report_end(index, item, error)
        ours = (item, *self.plan.prefix)
        if isinstance(error, NotAnOperationError) and any(fn is error.fn for fn in ours):
            self.abort(error)
            return
        without_our_frames(error)
        if self.plan.on_error == "collect":
            self._keep(index, item, Error(error))
        else:
            self.failures[index] = (item, error)
            if self.outbox is not None:
                self.outbox.skip(index)
        if self.plan.on_error == "cancel":
            self.stop()
        self._tell(index, Error(error))

    @enable_ki_protection
    def _keep(self, index: int, item: object, result: object) -> None:
        if self.outbox is None:
            self.results[index] = result
        else:
            self.outbox.put(index, (item if self.plan.is_map else index, result))

    def _tell(self, index: int, result: Value[Any] | Error) -> None:
        if self.plan.on_done is None:
            return
        try:
            self.caller.run(self.plan.on_done, index, result)
        except BaseException as error:  # noqa: BLE001 - it is raised to the caller as it is
            self.abort(error)

    def _time_out(self, item: object) -> OperationTimeoutError:
        timeout, name = self.plan.timeout, self._name_of(item)
        report(TimedOut, policy=self.plan.kind, operation=name, timeout=timeout)
        return OperationTimeoutError(timeout, name)

    def _name_of(self, item: object) -> str:
        return label(self.plan.prefix[-1] if self.plan.is_map else item)

    def _report_start(self, index: int, item: object) -> None:
        self._began[index] = trio.current_time()
        self._report(OperationStarted, index, item)

    def _report_end(
        self, index: int, item: object, error: Exception | None, *, cancelled: bool = False
    ) -> None:
        began = self._began.pop(index, None)
        if began is not None:
            duration = trio.current_time() - began
            self._report(
                OperationFinished, index, item, duration=duration, error=error, cancelled=cancelled
            )

    def _report(self, kind: type[Any], index: int, item: object, **fields: Any) -> None:
        name = self._name_of(item)
        report(kind, policy=self.plan.kind, operation=name, index=index, **fields)


def _refusal(index: int, item: object) -> NotAnOperationError | None:
    """Return the error that says why *item* is no operation, if it is none."""
    try:
        callable_operation(f"ops[{index}]", item)
    except NotAnOperationError as refusal:
        return refusal.with_traceback(None)
    return None
