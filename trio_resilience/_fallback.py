"""Give the caller something else when an operation fails."""

from __future__ import annotations

import reprlib
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, TypeVarTuple, cast, final, overload

import attrs
import trio

from trio_resilience._checks import NotAnOperationError, label, operation, shown
from trio_resilience._classify import Classifier, ErrorMatch
from trio_resilience._engine._driver import awaitable
from trio_resilience._engine._policy import Policy, open_overrides, overrides
from trio_resilience._engine._report import open_subscriptions, report
from trio_resilience._engine._traceback import add_note_once
from trio_resilience._engine._watched import Watched, watched
from trio_resilience._errors import CallAbandonedError
from trio_resilience._events import FallbackUsed
from trio_resilience._records import Record, record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
F = TypeVar("F", covariant=True)
Ts = TypeVarTuple("Ts")


class _NotGiven:
    """In place of an argument that may be anything."""

    def __repr__(self) -> str:
        return "<not given>"


_NOT_GIVEN: Final[Any] = _NotGiven()

# A note is to tell errors apart, and not to carry all that they say.
_short = reprlib.Repr()
_short.maxother = 200


@final
@record
class FallbackStatistics(Record):
    """What a `Fallback` has done so far; cancelled calls count only as calls."""

    calls: int
    used: int
    """Calls that returned what the fallback gives."""
    failed: int
    """Calls in which the fallback failed too."""


@final
@attrs.define(eq=False, repr=False)
class _Counts:
    calls: int = 0
    used: int = 0
    failed: int = 0


def _is_no_abandoned_call(error: Exception) -> bool:
    return not isinstance(error, CallAbandonedError)


def _without_abandoned_calls(match: object) -> Any:
    """Put into the place of `Exception`, which means any, what does not mean an abandoned call."""
    if isinstance(match, tuple):
        return tuple(map(_without_abandoned_calls, cast("tuple[object, ...]", match)))
    return _is_no_abandoned_call if match is Exception else match


def _async_function(fn: object) -> None:
    try:
        operation("async_fn", fn)
    except NotAnOperationError as error:
        raise TypeError(f"{error}; for a plain value, write `Fallback(value=...)`") from None


@final
@attrs.frozen(eq=False, repr=False, init=False)
class Fallback(Policy[F], Generic[F]):
    """Return something else when an operation fails: a value, or what an async function returns.

    A cancellation, Ctrl-C and everything else that is no `Exception` pass through, and so does an
    error that *on* does not match. If the fallback fails too, its error comes out, as the object it
    is, with the operation's own as its context and in a note.

    Args:
        async_fn: an async function of the error, whose result the caller gets.
        value: or else, what the caller gets: every time the same object.
        on: which errors it is for: a type, a function of the error that returns a bool, or a tuple
            of such. A group of errors is matched if all its leaves are. `Exception` means any but a
            `CallAbandonedError`, the end of a call for which nobody waits any more; name that, too,
            if it is meant.
        name: label of the policy in events and notes.

    Raises:
        TypeError: both a function and a value are given, or neither; or the function is no async
            one.

    Example::

        cached = Fallback(load_from_cache, on=(transient, RejectedError))
        page = await cached.call(fetch, url)

        empty = Fallback(value=())


        @empty
        async def recommend(user: str) -> Sequence[str]: ...
    """

    on: ErrorMatch
    name: str
    _fn: Callable[[Exception], Awaitable[F]] | None
    _value: Any
    _classifier: Classifier
    _counts: _Counts

    @overload
    def __init__(
        self,
        async_fn: Callable[[Exception], Awaitable[F]],
        *,
        on: ErrorMatch = Exception,
        name: str = "fallback",
    ) -> None: ...

    @overload
    def __init__(self, *, value: F, on: ErrorMatch = Exception, name: str = "fallback") -> None: ...

    def __init__(
        self,
        async_fn: Callable[[Exception], Awaitable[F]] = _NOT_GIVEN,
        *,
        value: F = _NOT_GIVEN,
        on: ErrorMatch = Exception,
        name: str = "fallback",
    ) -> None:
        has_function = async_fn is not _NOT_GIVEN
        if has_function is (value is not _NOT_GIVEN):
            got = "both" if has_function else "neither"
            raise TypeError(f"pass either an async function or `value`, got {got}")
        if has_function:
            _async_function(async_fn)
        this: Any = self
        this.__attrs_init__(
            on=on,
            name=name,
            fn=async_fn if has_function else None,
            value=None if has_function else value,
            classifier=Classifier.of("on", _without_abandoned_calls(on)),
            counts=_Counts(),
        )

    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T | F:
        """Return the result of ``fn(*args)``, or that of the fallback if it fails."""
        if open_subscriptions and type(name) is not Watched:
            return await watched(self, self.call, fn, args, name)
        self._current_counts().calls += 1
        try:
            result: T = await awaitable(fn, *args)
            return result
        except NotAnOperationError:
            self._current_counts().calls -= 1
            raise
        except Exception as error:
            if self._classifier.judge(error) is False:
                raise
            instead = await self._ask(error)
            self._current_counts().used += 1
            called = label(fn) if name is None else name
            report(FallbackUsed, policy=self.name, operation=called, error=error)
            return instead

    async def _ask(self, error: Exception) -> F:
        # Within the handling of *error*, which so is the context of whatever is raised here. What
        # fails at once is no checkpoint; and if this is being cancelled, there is nothing to ask.
        await trio.lowlevel.checkpoint()
        if self._fn is None:
            return cast("F", self._value)
        try:
            instead: F = await awaitable(self._fn, error)
            return instead
        except NotAnOperationError:
            raise
        except Exception as second:
            self._current_counts().failed += 1
            if second is not error:
                add_note_once(second, f"{self.name}: ", f"called because of {_short.repr(error)}")
            raise

    def statistics(self) -> FallbackStatistics:
        """Return how many calls there were, and in how many the fallback was used, or failed."""
        counts = self._current_counts()
        return FallbackStatistics(counts.calls, counts.used, counts.failed)

    def _current_counts(self) -> _Counts:
        mode = overrides() if open_overrides else None
        return self._counts if mode is None else mode.state_of(self, self._counts, _Counts)

    def __repr__(self) -> str:
        given = f"value={self._value!r}" if self._fn is None else label(self._fn)
        return f"Fallback({given}, on={shown(self.on)}, name={self.name!r})"
