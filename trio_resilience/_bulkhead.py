"""Bound how many calls run at once, and how many more may wait, so that overload is refused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Never, TypeVar, TypeVarTuple, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._checks import integer, label, operation, seconds
from trio_resilience._engine._driver import run_unprotected
from trio_resilience._engine._permits import OpenBlocks, Permits, caller
from trio_resilience._engine._policy import LivePolicy, open_overrides, overrides
from trio_resilience._engine._report import open_subscriptions, report
from trio_resilience._engine._waiting import Waiting
from trio_resilience._engine._watched import Watched, watched
from trio_resilience._errors import BulkheadFullError
from trio_resilience._events import Rejected
from trio_resilience._records import Record, record
from trio_resilience._semaphore import Semaphore, permits_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import timedelta
    from types import TracebackType

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
@record
class BulkheadStatistics(Record):
    """How a `Bulkhead` stands, and how often it has refused."""

    max_concurrency: int
    borrowed: int
    available: int
    waiting: int
    """Tasks in line."""
    rejections: int


@final
@attrs.define(eq=False, repr=False)
class _Counts:
    rejections: int = 0


def _max_concurrency(value: int) -> int:
    return integer("max_concurrency", value, minimum=1)


def _queue_size(value: int | None) -> int | None:
    return None if value is None else integer("queue_size", value, minimum=0)


def _max_wait(value: float | timedelta) -> float:
    return seconds("max_wait", value)


@final
@attrs.frozen(eq=False, repr=False)
class Bulkhead(LivePolicy[Never]):
    """Let *max_concurrency* calls run at a time, make a few more wait, and refuse the rest at once.

    Who waits is served first come, first served; nobody overtakes, and who is cancelled in line
    gives up the place. So a slow dependency holds a bounded number of tasks, and no more.

    Args:
        max_concurrency: how many calls run at once.
        queue_size: how many may wait; ``None``: any number; 0: nobody.
        max_wait: seconds that each of them waits at the most, a number or a `datetime.timedelta`.
        name: label of the policy in events and errors.

    Raises:
        BulkheadFullError: the line was full, or *max_wait* was over, which is then its ``.waited``;
            the call was not made.

    Example::

        database = Bulkhead(10, queue_size=20, max_wait=1)

        rows = await database.call(query, "select 1")


        @database
        async def load(key: int) -> Row: ...


        async with database:
            ...
    """

    max_concurrency: int = attrs.field(converter=_max_concurrency)
    queue_size: int | None = attrs.field(default=None, kw_only=True, converter=_queue_size)
    max_wait: float = attrs.field(default=math.inf, kw_only=True, converter=_max_wait)
    name: str = attrs.field(default="bulkhead", kw_only=True)
    _semaphore: Semaphore = attrs.field(
        default=attrs.Factory(lambda self: Semaphore(self.max_concurrency), takes_self=True),
        init=False,
    )
    _blocks: OpenBlocks = attrs.field(factory=OpenBlocks, init=False)
    _counts: _Counts = attrs.field(factory=_Counts, init=False)

    @property
    def is_idle(self) -> bool:
        """Whether no permit is held, and nobody waits."""
        return self._semaphore.is_idle

    @property
    def is_disposable(self) -> bool:
        """Whether no call runs or waits."""
        return self._semaphore.is_disposable

    @enable_ki_protection
    def acquire_nowait(self) -> None:
        """Take the permit of one call, or raise `trio.WouldBlock`, which counts as no refusal."""
        self._semaphore.acquire_nowait()

    @enable_ki_protection
    async def acquire(self) -> None:
        """Take the permit of one call, after a wait if there has to be.

        Raises:
            BulkheadFullError: the line is full, or *max_wait* is over.
        """
        await self._acquire()

    @enable_ki_protection
    def release(self) -> None:
        """Give the permit of one call back, to who has waited longest.

        Raises:
            RuntimeError: none is held.
        """
        self._semaphore.release()

    @enable_ki_protection
    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        """Return the result of ``fn(*args)``, run when there is room for it."""
        if open_subscriptions and type(name) is not Watched:
            return await watched(self, self.call, fn, args, name)
        permits = permits_of(self._semaphore)
        if not permits.try_take():
            operation("fn", fn)
            await self._wait(permits, label(fn) if name is None else name)
        try:
            return await run_unprotected(fn, *args)
        finally:
            permits.give_back()

    def statistics(self) -> BulkheadStatistics:
        """Return how many calls run and wait, and how many were refused."""
        now = self._semaphore.statistics()
        return BulkheadStatistics(
            max_concurrency=self.max_concurrency,
            borrowed=now.borrowed,
            available=now.available,
            waiting=now.waiting,
            rejections=self._current_counts().rejections,
        )

    @enable_ki_protection
    async def _acquire(self) -> Permits:
        await trio.lowlevel.checkpoint_if_cancelled()
        permits = permits_of(self._semaphore)
        if permits.try_take():
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self._wait(permits, "acquire")
        return permits

    @enable_ki_protection
    async def _wait(self, permits: Permits, operation: str) -> None:
        if self.queue_size is not None and permits.waiting >= self.queue_size:
            await trio.lowlevel.checkpoint()
            raise self._refusal(operation, None)
        has_one = False
        try:
            # The limit is within: its expiry ends the wait, and doesn't cancel it.
            with (
                Waiting(self.name, operation),
                trio.CancelScope(relative_deadline=self.max_wait),
            ):
                await permits.wait()
                has_one = True
        except BaseException:
            if has_one:  # a listener has raised what stops the program
                permits.give_back()
            raise
        if not has_one:
            raise self._refusal(operation, self.max_wait)

    def _refusal(self, operation: str, waited: float | None) -> BulkheadFullError:
        self._current_counts().rejections += 1
        report(Rejected, policy=self.name, operation=operation, retry_after=None)
        room = math.inf if self.queue_size is None else self.max_concurrency + self.queue_size
        return BulkheadFullError(self.name, room, room + 1, waited=waited)

    def _current_counts(self) -> _Counts:
        mode = overrides() if open_overrides else None
        return self._counts if mode is None else mode.state_of(self, self._counts, _Counts)

    @enable_ki_protection
    async def __aenter__(self) -> None:
        self._blocks.begin(caller(), await self._acquire())

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._blocks.end(caller())

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"Bulkhead({self.max_concurrency}, queue_size={self.queue_size},"
            f" max_wait={self.max_wait:g}, name={self.name!r}:"
            f" {now.borrowed} borrowed, {now.waiting} waiting)"
        )
