"""Bound how long an operation may take."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Never, TypeVar, TypeVarTuple, final

import attrs
import trio

from trio_resilience._checks import label, seconds
from trio_resilience._engine._deadline import limit
from trio_resilience._engine._driver import awaitable
from trio_resilience._engine._policy import Policy, open_overrides, overrides
from trio_resilience._engine._report import report
from trio_resilience._errors import OperationTimeoutError
from trio_resilience._events import TimedOut

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator
    from datetime import timedelta

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
@attrs.frozen
class TimeoutStatistics:
    """What a `Timeout` has done so far."""

    calls: int
    timed_out: int


@final
@attrs.define(eq=False)
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
        operation = label(fn) if name is None else name
        self._current_counts().calls += 1
        with trio.CancelScope(relative_deadline=self.seconds):
            result: T = await awaitable(fn, *args)
            return result
        raise self._expire(operation)

    @contextmanager
    def scope(self) -> Generator[trio.CancelScope]:
        """Bound a block of code rather than a function.

        The scope may be cancelled by hand: the block then ends without an error.
        """
        self._current_counts().calls += 1
        deadline = trio.current_time() + self.seconds
        with trio.CancelScope() as scope, limit(deadline, lambda: self._expire("block")):
            yield scope

    def _expire(self, operation: str) -> OperationTimeoutError:
        self._current_counts().timed_out += 1
        report(TimedOut, policy=self.name, operation=operation, timeout=self.seconds)
        return OperationTimeoutError(self.seconds, operation)

    def statistics(self) -> TimeoutStatistics:
        """Return how many calls there were, and how many of them timed out."""
        counts = self._current_counts()
        return TimeoutStatistics(counts.calls, counts.timed_out)

    def _current_counts(self) -> _Counts:
        mode = overrides() if open_overrides else None
        return self._counts if mode is None else mode.state_of(self, self._counts)
