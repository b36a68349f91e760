"""What may happen, and be told: a frozen record for each kind of thing."""

from __future__ import annotations

from enum import StrEnum
from typing import final

from trio_resilience._errors import FailureRecord
from trio_resilience._records import Record, keyword_record


@keyword_record
class Event(Record):
    """Something that happened, and where."""

    time: float
    """When, in seconds of trio's clock."""
    task: str
    """Name of the trio task in which it happened."""
    policy: str
    """Name of the policy, or of the function, that reports it."""
    operation: str
    """Name of the operation: ``name=`` of the call, or else the function's own."""


@final
@keyword_record
class CallStarted(Event):
    """A policy has been asked to run an operation."""


@final
@keyword_record
class CallFinished(Event):
    """A policy's call has ended: it returned, unless it raised or was cancelled."""

    duration: float
    """Seconds since it started, waits and repeats included."""
    error: Exception | None
    """What came out; a `RejectedError` if the policy, or one further in, has refused the call."""
    cancelled: bool
    """Whether it was cancelled, or stopped by something else that is no `Exception`."""


@final
@keyword_record
class OperationStarted(Event):
    """`run_with_limit`, or one of its kin, has begun to run an operation."""

    index: int


@final
@keyword_record
class OperationFinished(Event):
    """An operation has ended: it succeeded if there is no error, or was cancelled."""

    index: int
    duration: float
    """Seconds since it started."""
    error: Exception | None
    cancelled: bool


@final
@keyword_record
class AttemptStarted(Event):
    """A retry policy is about to call the operation."""

    attempt: int


@final
@keyword_record
class AttemptFinished(Event):
    """A call that a retry policy made has ended: it returned, unless it raised or was cancelled."""

    attempt: int
    duration: float
    """Seconds since the attempt started."""
    error: Exception | None
    cancelled: bool
    """Whether it was cancelled, or stopped by something else that is no `Exception`."""


@final
@keyword_record
class RetryScheduled(Event):
    """An attempt was not good enough, and another follows after *delay* seconds."""

    attempt: int
    """Which attempt it was, counted from 1."""
    delay: float
    error: Exception | None
    """What it raised; ``None`` if its result was refused."""
    result: object = None
    """What it returned, if its result was refused."""


@final
@keyword_record
class RetryGaveUp(Event):
    """A retry policy makes no further attempt; the error, or the result, is final."""

    attempts: int
    reason: str
    error: Exception | None
    result: object = None


@final
@keyword_record
class TimedOut(Event):
    """A time limit of *timeout* seconds expired and cancelled the operation."""

    timeout: float


@final
@keyword_record
class WaitStarted(Event):
    """A call has to wait for its turn: for a permit, or until a rate limit allows it."""


@final
@keyword_record
class WaitFinished(Event):
    """A wait has ended: its turn came, unless it was refused or cancelled."""

    duration: float
    """Seconds since the wait started."""
    cancelled: bool


@final
@keyword_record
class Rejected(Event):
    """A policy has refused a call, of which nothing was run."""

    retry_after: float | None
    """Seconds after which another try makes sense, if that is known."""


@final
@keyword_record
class BatchFlushed(Event):
    """A batch of *size* items has been processed: each has its result if there is no error."""

    size: int
    reason: str
    """What it was flushed for: ``"size"``, ``"age"`` or ``"close"``."""
    duration: float
    """Seconds that it took to process."""
    error: Exception | None
    cancelled: bool


class CircuitState(StrEnum):
    """Whether a circuit breaker lets calls through."""

    CLOSED = "closed"
    """Calls go through, and are watched."""
    OPEN = "open"
    """Calls are refused, until the recovery time is over."""
    HALF_OPEN = "half_open"
    """A few calls go through, as probes, and decide."""
    ISOLATED = "isolated"
    """Calls are refused for as long as somebody wants it."""


@final
@keyword_record
class CircuitStateChanged(Event):
    """A circuit breaker has changed from one state to another.

    The operation is that of the call which brought it about, or else the method's name.
    """

    previous: CircuitState
    state: CircuitState
    reason: str
    retry_after: float | None
    """Seconds until a probe is let through, if the circuit has opened."""


@final
@keyword_record
class RejectionSkipped(Event):
    """A policy that only watches has let a call run that it would have refused."""

    retry_after: float | None
    """Seconds after which another try would have made sense, if that is known."""


@final
@keyword_record
class FallbackUsed(Event):
    """An operation has failed, and what its caller gets is the fallback's instead."""

    error: Exception
    """What the operation raised."""


@final
@keyword_record
class HedgeStarted(Event):
    """An operation was slow, or has failed, and another leg of the same call was started."""

    leg: int
    """Which one: the first is 0, and the first hedge 1."""


@final
@keyword_record
class LoserFailed(Event):
    """A leg has raised an error when the call was decided: its clean-up failed, for instance."""

    leg: int
    error: Exception


class HealthStatus(StrEnum):
    """How a service does, or all services together."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    """It goes on without some of what it should have."""
    UNHEALTHY = "unhealthy"


@final
@keyword_record
class HealthChecked(Event):
    """The health of a service was checked; the operation is the name of the service."""

    status: HealthStatus
    critical: bool
    attempts: int
    """How often its probe was called: not at all if a circuit refused that."""
    duration: float
    """Seconds that it took, all attempts included."""
    error: FailureRecord | None


@final
@keyword_record
class HealthChanged(Event):
    """A health monitor has found a status, of a service or of all together, that is new."""

    previous: HealthStatus | None
    """Of all together; ``None`` if this is the first report."""
    status: HealthStatus
    services: tuple[str, ...]
    """Those whose own status is new."""


@final
@keyword_record
class ConfigReloaded(Event):
    """A registry has read its configuration again, and its policies are as that says."""

    changed: tuple[str, ...]
    """Names whose pipelines are others now, or are new, or are gone."""


@final
@keyword_record
class ConfigReloadFailed(Event):
    """A registry has read its configuration again, and found mistakes: nothing has changed."""

    error: Exception
    """A `ConfigError`, which tells all of them."""
