"""Run operations from one source in a bounded number of worker tasks.

A worker runs one operation after the other, so that an operation costs no task. What it needs
of its own, it has: a copy of the caller's context, and the worker's cancel scope, whose deadline is
moved to where this operation's time ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from contextvars import Context, ContextVar
from itertools import chain, islice
from typing import Any, Final, final

import attrs
import trio
from outcome import Error, Value
from trio.lowlevel import Abort, Task, disable_ki_protection, enable_ki_protection

from trio_resilience._checks import NotAnOperationError, callable_operation, label
from trio_resilience._engine._driver import (
    COROUTINE,
    Drive,
    as_coroutine,
    awaitable,
    operation_mark,
)
from trio_resilience._engine._outbox import Outbox
from trio_resilience._engine._plan import Plan
from trio_resilience._engine._report import report
from trio_resilience._engine._source import AsyncSource, Pair, close, numbered
from trio_resilience._engine._traceback import without_our_frames
from trio_resilience._errors import OperationTimeoutError
from trio_resilience._events import (
    OperationFinished,
    OperationStarted,
    TimedOut,
    current_subscriptions,
)

MISSING: Final = object()
"""Stands in the results for an operation that has none yet."""


# The calls whose permit of a shared bound the code in this context runs under.
_holders: ContextVar[tuple[Pool, ...]] = ContextVar("holders", default=())


@final
@attrs.define(eq=False)
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
    _quota: float = attrs.field(default=math.inf, init=False)
    """How many more operations this batch may pull from an async source."""
    _stopping: bool = attrs.field(default=False, init=False)
    _nursery: trio.Nursery = attrs.field(init=False)
    _supervisor: Task | None = attrs.field(default=None, init=False)
    """The supervising task while it waits for the workers."""
    _workers: int = attrs.field(default=0, init=False)
    _spare: int = attrs.field(default=0, init=False)
    """How many more workers may be started in this batch, as operations turn up."""
    _permits: set[object] = attrs.field(factory=set[object], init=False)
    """Tokens of our workers that hold a permit of a shared bound."""
    _queueing: set[trio.CancelScope] = attrs.field(factory=set[trio.CancelScope], init=False)
    """A scope around each of our workers that waits for such a permit."""
    _outer: tuple[Pool, ...] = attrs.field(factory=_holders.get, init=False)

    def __attrs_post_init__(self) -> None:
        self.size = len(self.items) if isinstance(self.items, Sized) else math.inf
        items: Any = self.items
        if hasattr(items, "__anext__"):
            self._async_source = AsyncSource(items, self.abort)
        else:
            self._pairs = numbered(items, self.caller)

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
            for token in tuple(self._permits):
                self._give_back(token)
            try:
                close(self.items, self.caller)
            except BaseException as error:  # noqa: BLE001 - the source's clean-up is the source's error
                self.error = self.error or error

    async def _run_batches(self) -> None:
        size = self.plan.batch_size
        if size is None:
            await self._run_batch(math.inf)
            return
        rest = None if self._async_source is not None else self._pairs
        while await self._peek():
            if rest is not None:
                assert self._peeked is not None
                self._pairs = chain((self._peeked,), islice(rest, size - 1))
                self._peeked = None
            self._quota = size - 1
            await self._run_batch(size)
            if rest is not None:
                self._pairs = rest
            self._quota = 1
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
        limit = self.plan.max_concurrency
        if isinstance(limit, int):
            useful = int(min(limit, self.size, size))
            # Of unknown length: begin with one and let every worker that finds work start two more.
            count = useful if self.size < math.inf else 1
            self._spare = useful - count
        else:
            count = 1
        for _ in range(count):
            self._start_worker()
        if self._workers:
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
        self._nursery.start_soon(self._work, name=f"{self.plan.kind} worker")

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
        is_plain = is_listed and plan.on_error != "collect" and plan.on_done is None
        timeout, is_timed = plan.timeout, plan.timeout < math.inf
        prefix = (self._run_reported, *plan.prefix) if current_subscriptions() else plan.prefix
        holders = None if isinstance(plan.max_concurrency, int) else (*self._outer, self)
        now, set_mark, get_mark = trio.current_time, operation_mark.set, operation_mark.get
        task = trio.lowlevel.current_task()
        home, token, drive = task.context, object(), Drive()
        set_mark(None)
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
                                    pair = await self._admit(token)
                            except trio.Cancelled:
                                raise
                            except BaseException as error:  # noqa: BLE001 - comes out as it is
                                self.abort(error)
                                return
                            if pair is None:
                                return
                            index, item = pair
                            if is_listed:
                                results.append(MISSING)
                            if self._spare:
                                self._grow()
                            context = caller.copy()
                            context.run(set_mark, index)
                            if holders is not None:
                                context.run(_holders.set, holders)
                            # Two spellings: to unpack nothing would cost as much as the call.
                            call = context.run
                            coro = call(*prefix, item) if prefix else call(item)
                            if type(coro) is not COROUTINE:
                                coro = as_coroutine(prefix[0] if prefix else item, coro)
                            drive.load(context, coro)
                            task.context = context
                            if is_timed:
                                deadline = now() + timeout
                                scope.deadline = deadline
                            value = await drive
                            if get_mark() != index:  # it never parked: be polite in its stead
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
                    if get_mark() != index:
                        task.context = home
                        await trio.lowlevel.cancel_shielded_checkpoint()
                    self._failed(index, item, failure)
        finally:
            self._give_back(token)
            drive.discard()
            if type(coro) is COROUTINE:
                coro.close()  # it has ended, unless Ctrl-C came before it began
            self._worker_left()
            # The traceback of an error leads back here; from here nothing may lead to the error.
            del (
                self,
                results,
                prefix,
                holders,
                drive,
                pair,
                context,
                failure,
                item,
                value,
                coro,
                call,
            )

    def _is_gated(self) -> bool:
        return (
            self.outbox is not None
            or self._async_source is not None
            or not isinstance(self.plan.max_concurrency, int)
        )

    @enable_ki_protection
    def _grow(self) -> None:
        for _ in range(min(2, self._spare)):
            self._spare -= 1
            self._start_worker()

    @enable_ki_protection
    async def _admit(self, token: object) -> Pair | None:
        """Wait for whatever bounds the start of an operation, then pull it."""
        self._give_back(token)
        outbox, limiter = self.outbox, self.plan.max_concurrency
        if outbox is not None:
            await outbox.reserve()
        pair = None
        if isinstance(limiter, int) or await self._take_permit(limiter, token):
            pair = await self._pull()
        if pair is None:
            if outbox is not None:
                outbox.free()
            self._leave_queue()
            return None
        self.started = pair[0] + 1
        if not isinstance(limiter, int) and not self._queueing:
            self._start_worker()
        return pair

    @disable_ki_protection
    async def _pull(self) -> Pair | None:
        if self._peeked is not None:
            pair, self._peeked = self._peeked, None
            return pair
        if self._async_source is None:
            return next(self._pairs, None)
        if self._quota < 1:
            return None
        self._quota -= 1
        return await self._async_source.next()

    @enable_ki_protection
    async def _take_permit(self, limiter: trio.CapacityLimiter, token: object) -> bool:
        """Take a permit for *token*; false if the source ran out while this waited in line."""
        try:
            limiter.acquire_on_behalf_of_nowait(token)
        except trio.WouldBlock:
            self._refuse_deadlock(limiter)
            with trio.CancelScope() as scope:
                self._queueing.add(scope)
                try:
                    await limiter.acquire_on_behalf_of(token)
                finally:
                    self._queueing.discard(scope)
            if scope.cancelled_caught:
                return False
        self._permits.add(token)
        return not self._stopping

    def _leave_queue(self) -> None:
        for scope in self._queueing:
            scope.cancel()

    def _refuse_deadlock(self, limiter: trio.CapacityLimiter) -> None:
        # While another worker of this call holds a permit, this one's turn will come.
        if not (self._permits or self._queueing) and any(
            pool.plan.max_concurrency is limiter and pool._permits  # noqa: SLF001
            for pool in self._outer
        ):
            raise RuntimeError(
                f"{self.plan.kind} would wait for ever: it waits for a permit of {limiter!r}, of"
                " which the operation that called it holds one; give it a bound of its own"
            )

    @enable_ki_protection
    def _give_back(self, token: object) -> None:
        if token in self._permits:
            self._permits.discard(token)
            limiter = self.plan.max_concurrency
            assert isinstance(limiter, trio.CapacityLimiter)
            limiter.release_on_behalf_of(token)

    # --- what comes of an operation -------------------------------------------------------------

    def _succeeded(self, index: int, item: object, value: object) -> None:
        result = Value(value) if self.plan.on_error == "collect" else value
        self._keep(index, item, result)
        self._tell(index, Value(value))

    def _failed(self, index: int, item: object, error: Exception) -> None:
        if not self.plan.prefix:
            error = _refusal(index, item) or error
        if isinstance(error, NotAnOperationError):
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

    async def _run_reported(self, *call: Any) -> object:
        """Run an operation and tell listeners of its start and its end."""
        index, began = operation_mark.get(), trio.current_time()
        where: dict[str, Any] = {
            "policy": self.plan.kind,
            "operation": self._name_of(call[-1]),
            "index": index,
        }
        report(OperationStarted, **where)
        error: Exception | None = None
        cancelled = True
        try:
            result: object = await awaitable(*call)
            cancelled = False
        except Exception as failure:
            error, cancelled = failure, False
            raise
        finally:
            duration = trio.current_time() - began
            report(OperationFinished, **where, duration=duration, error=error, cancelled=cancelled)
            error = None
        return result


def _refusal(index: int, item: object) -> NotAnOperationError | None:
    """Return the error that says why *item* is no operation, if it is none."""
    try:
        callable_operation(f"ops[{index}]", item)
    except NotAnOperationError as refusal:
        return refusal.with_traceback(None)
    return None
