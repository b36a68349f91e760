"""Every error that the library itself raises, in one tree that is caught by meaning.

::

    ResilienceError
    ├── RejectedError               nothing was run; .retry_after
    │   ├── BulkheadFullError       .name .capacity .requested
    │   ├── CircuitOpenError        .name .last_failure
    │   └── RateLimitExceededError
    ├── OperationTimeoutError       also a trio.TooSlowError; .timeout
    ├── CallAbandonedError          it did run, and was cancelled because the circuit opened
    ├── OperationsFailedError       also an ExceptionGroup; .outcomes
    ├── OperationsCancelledError    the nursery went away, not the caller; .failures
    ├── RetriesExhaustedError       only for result-based retry; .last_result .attempts
    ├── ProbeFailedError            a health check's probe returned False; .name
    └── ConfigError                 .errors

An operation's own error is never among them: it comes out as the object it is. Messages are built
when they are read, not when the error is raised, and every error survives pickling and copying.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import trio

from trio_resilience._records import Record, record

if TYPE_CHECKING:
    from collections.abc import Sequence

    import outcome


class ResilienceError(Exception):
    """The root of every error that the library itself raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the cause too, or its text if it can't be pickled: it says what went wrong."""
        attributes = dict(self.__dict__)
        if self.__cause__ is not None:
            attributes["__cause__"] = _portable(self.__cause__)
        return type(self), self.args, attributes


def _portable(cause: BaseException) -> BaseException:
    import pickle  # noqa: PLC0415 - whoever comes here has it; to import it early costs everybody

    try:
        pickle.loads(pickle.dumps(cause))  # noqa: S301 - our own data: the test is the round trip
    except Exception:  # noqa: BLE001 - whatever a foreign class raises, the text is kept
        return ResilienceError(repr(cause))
    return cause


class RejectedError(ResilienceError):
    """The call was refused before anything was run.

    *retry_after* is the number of seconds after which another try makes sense, or ``None`` if
    that is not known.
    """

    args: tuple[Any, ...]
    retry_after: float | None

    # Each refusal sets all of its attributes itself: what a program does when it is overloaded has
    # to cost little, and a chain of constructors costs as much again.
    def __init__(self, retry_after: float | None = None) -> None:
        self.args = (retry_after,)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return f"the call was refused{_later(self.retry_after)}"


class BulkheadFullError(RejectedError):
    """*requested* calls would be running or waiting where there is room for *capacity*.

    Or, if *waited* is a number, there was room in the line, but no permit within so many seconds.
    """

    args: tuple[str, float, float, float | None, float | None]
    name: str
    capacity: float
    requested: float
    waited: float | None

    def __init__(
        self,
        name: str,
        capacity: float,
        requested: float,
        retry_after: float | None = None,
        waited: float | None = None,
    ) -> None:
        self.args = (name, capacity, requested, retry_after, waited)
        self.retry_after = retry_after
        self.name = name
        self.capacity = capacity
        self.requested = requested
        self.waited = waited

    def __str__(self) -> str:
        if self.waited is not None:
            return f"{self.name} is full: no permit came free within {self.waited:g} s"
        return (
            f"{self.name} is full: it has room for {self.capacity:g} calls, running and waiting,"
            f" and this would make {self.requested:g}{_later(self.retry_after)}"
        )


@record
class FailureRecord(Record):
    """What is remembered of a failure: no traceback, so nothing of the operation is kept alive."""

    type_name: str
    message: str
    time: float
    """When it happened, in seconds of trio's clock."""


class CircuitOpenError(RejectedError):
    """The breaker *name* is open; a probe is allowed after *retry_after* seconds."""

    args: tuple[str, float | None, FailureRecord | None]
    name: str
    last_failure: FailureRecord | None

    def __init__(
        self,
        name: str,
        retry_after: float | None = None,
        last_failure: FailureRecord | None = None,
    ) -> None:
        self.args = (name, retry_after, last_failure)
        self.retry_after = retry_after
        self.name = name
        self.last_failure = last_failure

    def __str__(self) -> str:
        last = self.last_failure
        why = "" if last is None else f"; last failure: {last.type_name}: {last.message}"
        return f"circuit {self.name!r} is open{_later(self.retry_after)}{why}"


class RateLimitExceededError(RejectedError):
    """The rate limit allows this call only after *retry_after* seconds."""

    def __str__(self) -> str:
        return f"the rate limit is reached{_later(self.retry_after)}"


class OperationTimeoutError(ResilienceError, trio.TooSlowError):
    """A time limit of this library expired and the operation was cancelled.

    It is never raised for a cancellation that came from outside. *timeout* is in seconds.
    """

    timeout: float
    name: str | None

    def __init__(self, timeout: float, name: str | None = None) -> None:
        super().__init__(timeout, name)
        self.timeout = timeout
        self.name = name

    def __str__(self) -> str:
        return f"{self.name or 'the operation'} took longer than {self.timeout:g} s"


class CallAbandonedError(ResilienceError):
    """The call did run, and was cancelled because the circuit *name* opened meanwhile."""

    name: str

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"the call was abandoned: circuit {self.name!r} opened while it ran"


class OperationsFailedError(ResilienceError, ExceptionGroup[Exception]):
    """One or more operations failed; the group holds what each of them raised.

    ``outcomes`` is what every operation came to, in their order: an `outcome.Value`, an
    `outcome.Error`, or ``None`` for one that was cancelled or never ran. So what did succeed is
    not thrown away. For a stream, whose results were delivered, it holds the failures alone.
    """

    outcomes: Sequence[outcome.Value[Any] | outcome.Error | None] = ()

    def derive(self, excs: Sequence[Exception], /) -> Self:  # type: ignore[override]
        """Keep the type and the outcomes of a part that ``except*`` or ``split`` makes."""
        part = type(self)(self.message, excs)
        part.outcomes = self.outcomes
        return part


class OperationsCancelledError(ResilienceError):
    """The nursery that the operations ran in was cancelled, while their caller was not.

    Or the deadline has passed that the caller was under when the call began, and was put off since.
    *failures* holds what operations raised before or meanwhile, if any of them did.
    """

    failures: tuple[Exception, ...]

    def __init__(self, failures: Sequence[Exception] = ()) -> None:
        super().__init__(tuple(failures))
        self.failures = tuple(failures)

    def __str__(self) -> str:
        failed = f"; {len(self.failures)} of them had failed" if self.failures else ""
        return f"the nursery that the operations ran in was cancelled{failed}"


class RetriesExhaustedError(ResilienceError):
    """Every attempt returned a result that `retry_result` asks to try again."""

    last_result: object
    attempts: int

    def __init__(self, last_result: object, attempts: int) -> None:
        super().__init__(last_result, attempts)
        self.last_result = last_result
        self.attempts = attempts

    def __str__(self) -> str:
        times = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return f"no acceptable result after {times}; the last one was {self.last_result!r}"


class ProbeFailedError(ResilienceError):
    """The probe of the health check *name* returned ``False``."""

    name: str

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"the probe of {self.name!r} returned False"


class ConfigError(ResilienceError):
    """The configuration is wrong; *errors* has every mistake, each with its key path."""

    errors: tuple[str, ...]

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__(tuple(errors))
        self.errors = tuple(errors)

    def __str__(self) -> str:
        return "\n".join(self.errors)


def _later(retry_after: float | None) -> str:
    return "" if retry_after is None else f"; try again in {retry_after:.3g} s"
