"""Bound how long an operation may take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Never, TypeVar, TypeVarTuple, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._checks import NotAnOperationError, label, seconds
from trio_resilience._engine._deadline import Limit
from trio_resilience._engine._driver import awaitable
from trio_resilience._engine._policy import Policy, open_overrides, overrides
from trio_resilience._engine._report import open_subscriptions, report
from trio_resilience._engine._watched import Watched, watched
from trio_resilience._errors import OperationTimeoutError
from trio_resilience._events import TimedOut
from trio_resilience._records import Record, record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from contextlib import AbstractContextManager
    from datetime import timedelta
    from types import TracebackType

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
@record
class TimeoutStatistics(Record):
    """What a `Timeout` has done so far."""

    calls: int
    timed_out: int


@final
@attrs.define(eq=False, repr=False)
class _Counts:
    calls: int = 0
    timed_out: int = 0


def _limit(value: float | timedelta) -> float:
    return seconds("seconds", value)


@final
@attrs.frozen(eq=False)
class Timeout(Policy[Never]):
    """Cancel an operation that takes longer than *seconds* and raise `OperationTimeoutError`.

    The time counts from each call, not from when the policy was made. A result that arrives is
    returned, however late: an operation that never reaches a checkpoint can't be cancelled. When
    an outer scope cancels the operation, also at the same instant, it is that cancellation which
    goes on, and nothing times out.

    Args:
        seconds: the limit, a number or a `datetime.timedelta`; 0 expires at the first checkpoint.
        name: label of the policy in events.

    Raises:
        OperationTimeoutError: only when its own limit expired; also a `trio.TooSlowError`.

    Example::

        timeout = Timeout(5)
        page = await timeout.call(fetch, url)

        with timeout.scope():
            await fetch(url)
    """

    seconds: float = attrs.field(converter=_limit)
    name: str = attrs.field(default="timeout", kw_only=True)
    _counts: _Counts = attrs.field(factory=_Counts, init=False, repr=False)

    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        """Return the result of ``fn(*args)`` if it arrives in time."""
        if open_subscriptions and type(name) is not Watched:
            return await watched(self, self.call, fn, args, name)
        operation = label(fn) if name is None else name
        self._count_call()
        try:
            with trio.CancelScope(relative_deadline=self.seconds):
                result: T = await awaitable(fn, *args)
                return result
        except NotAnOperationError:
            self._current_counts().calls -= 1
            raise
        raise self._expire(operation)

    def scope(self) -> AbstractContextManager[trio.CancelScope]:
        """Bound a block of code rather than a function.

        The scope may be cancelled by hand: the block then ends without an error.
        """
        return _Block(self.seconds, self._count_call, lambda: self._expire("block"))

    def _expire(self, operation: str) -> OperationTimeoutError:
        self._current_counts().timed_out += 1
        report(TimedOut, policy=self.name, operation=operation, timeout=self.seconds)
        return OperationTimeoutError(self.seconds, operation)

    def statistics(self) -> TimeoutStatistics:
        """Return how many calls there were, and how many of them timed out."""
        counts = self._current_counts()
        return TimeoutStatistics(counts.calls, counts.timed_out)

    def _count_call(self) -> None:
        self._current_counts().calls += 1

    def _current_counts(self) -> _Counts:
        mode = overrides() if open_overrides else None
        return self._counts if mode is None else mode.state_of(self, self._counts, _Counts)


@final
@attrs.define(eq=False, repr=False)
class _Block:
    """A block under a limit, within a scope that the user may cancel by hand."""

    seconds: float
    on_entry: Callable[[], None]
    on_expiry: Callable[[], Exception]
    _by_hand: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _limit: Limit = attrs.field(init=False)

    @enable_ki_protection
    def __enter__(self) -> trio.CancelScope:
        self._by_hand.__enter__()
        self.on_entry()
        self._limit = Limit(trio.current_time() + self.seconds, self.on_expiry)
        self._limit.__enter__()
        return self._by_hand

    @enable_ki_protection
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        try:
            self._limit.__exit__(exc_type, exc, traceback)
        except BaseException as error:
            # It is no cancellation of the outer scope: that one, the inner would not have touched.
            del exc
            self._by_hand.__exit__(type(error), error, error.__traceback__)
            raise
        return self._by_hand.__exit__(exc_type, exc, traceback)
