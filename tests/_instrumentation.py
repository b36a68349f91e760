"""Events made by hand, and a job that has some of everything, for the tests of instrumentation."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, final

import attrs
import pytest
import trio

from tests.operations import fails, returns
from trio_resilience import (
    AttemptFinished,
    AttemptStarted,
    BatchFlushed,
    Bulkhead,
    BulkheadFullError,
    CallFinished,
    CallStarted,
    CircuitBreaker,
    CircuitState,
    CircuitStateChanged,
    ConfigReloaded,
    ConfigReloadFailed,
    Constant,
    Event,
    FailureRecord,
    Fallback,
    FallbackUsed,
    HealthChanged,
    HealthChecked,
    HealthStatus,
    Hedge,
    HedgeStarted,
    LoserFailed,
    OperationFinished,
    OperationStarted,
    Pipeline,
    Rejected,
    RejectedError,
    RejectionSkipped,
    ResilienceError,
    Retry,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
    Timeout,
    WaitFinished,
    WaitStarted,
    run_with_limit,
)
from trio_resilience._records import keyword_record

if TYPE_CHECKING:
    from collections.abc import Callable

EventT = TypeVar("EventT", bound=Event)

RESULT = "what an operation returned"

REFUSED = BulkheadFullError("bulkhead", 1, 1)
FAILED = OSError("no route")

# Names that a user may give, and that some format or other could trip over.
ODD_NAMES = [
    "",
    "x" * 10_000,
    "größe ☃",
    'a"b',
    "a\\b",
    "a\nb 1\n# TYPE x",
    "{a='b'}",
    "\ud800",
    "\0",
]


@final
@keyword_record
class ForeignEvent(Event):
    """An event that no tool knows, with fields that they use for themselves."""

    name: str = "n"
    args: tuple[int, ...] = (1, 2)
    event: str = "e"
    message: str = "m"
    exc_info: bool = True
    method_name: str = "m"
    level: int = 2**70
    thing: object = attrs.field(factory=object)
    error: Exception | None = None


class Mute(Exception):  # noqa: N818 - it is for one thing only
    """An error that can't say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def happened(kind: type[EventT], **fields: Any) -> EventT:
    """Return an event of this *kind*, at some place."""
    where: dict[str, Any] = {"time": 1.5, "task": "main", "policy": "db", "operation": "load"}
    return kind(**{**where, **fields})


def ended(error: Exception | None = None, *, cancelled: bool = False) -> dict[str, Any]:
    return {"duration": 0.25, "error": error, "cancelled": cancelled}


def every_event(error: Exception) -> list[Event]:
    """Return an event of each kind, with *error* wherever there can be one."""
    circuit = {"previous": CircuitState.CLOSED, "reason": "5 failures", "retry_after": 60.0}
    record = FailureRecord(type_name="OSError", message="no route", time=1.0)
    health = {"status": HealthStatus.UNHEALTHY, "critical": True, "attempts": 2}
    changed = {"previous": None, "status": HealthStatus.DEGRADED, "services": ("a", "b")}
    return [
        happened(CallStarted),
        happened(CallFinished, **ended(error)),
        happened(OperationStarted, index=0),
        happened(OperationFinished, index=0, **ended(error)),
        happened(AttemptStarted, attempt=1),
        happened(AttemptFinished, attempt=1, **ended(error)),
        happened(RetryScheduled, attempt=1, delay=0.5, error=error, result=RESULT),
        happened(RetryGaveUp, attempts=3, reason="enough", error=error, result=RESULT),
        happened(TimedOut, timeout=2.0),
        happened(WaitStarted),
        happened(WaitFinished, duration=0.25, cancelled=False),
        happened(Rejected, retry_after=None),
        happened(BatchFlushed, size=3, reason="age", **ended(error)),
        *(happened(CircuitStateChanged, state=state, **circuit) for state in CircuitState),
        happened(RejectionSkipped, retry_after=1.0),
        happened(FallbackUsed, error=error),
        happened(HedgeStarted, leg=1),
        happened(LoserFailed, leg=1, error=error),
        happened(ConfigReloaded, changed=("a", "b")),
        happened(ConfigReloadFailed, error=error),
        happened(HealthChecked, **health, duration=0.25, error=record),
        *(happened(HealthChanged, **{**changed, "status": status}) for status in HealthStatus),
        happened(ForeignEvent, error=error),
    ]


# --- counting, as plainly as can be -------------------------------------------------------------


def outcome_of(event: Any) -> str:
    if event.error is not None:
        return "refused" if isinstance(event.error, RejectedError) else "failed"
    return "cancelled" if event.cancelled else "succeeded"


COUNTED: dict[type[Any], str] = {
    CallFinished: "calls",
    OperationFinished: "operations",
    AttemptFinished: "attempts",
    RetryScheduled: "retries",
    RetryGaveUp: "give_ups",
    Rejected: "rejections",
    TimedOut: "timeouts",
    HedgeStarted: "hedges",
    FallbackUsed: "fallbacks",
}


def count(events: list[Any]) -> Counter[tuple[str, str]]:
    """Count by what it is, and by outcome where there is one."""
    return Counter(
        (name, outcome_of(event) if hasattr(event, "cancelled") else "")
        for event in events
        for name in [COUNTED.get(event.__class__)]
        if name is not None
    )


# --- a job --------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Flaky:
    """Fail as often as said, then return."""

    failures: int

    async def run(self) -> str:
        await trio.sleep(0.1)
        self.failures -= 1
        if self.failures >= 0:
            raise FAILED
        return RESULT


async def busy_job() -> None:
    """Succeed, fail, retry, give up, refuse, time out, hedge, fall back and be cancelled."""
    backoff = Constant(1, jitter="none")
    standard = Pipeline(Retry(max_attempts=3, backoff=backoff), Timeout(5), name="standard")
    ops: list[Callable[[], Any]] = [
        *(Flaky(times).run for times in (0, 2, 9)),
        partial(fails, ValueError("x")),
    ]
    await run_with_limit(None, ops, max_concurrency=2, policy=standard, on_error="collect")
    bulkhead = Bulkhead(1, queue_size=0)

    async def enter() -> None:
        await bulkhead.call(trio.sleep, 1)

    await run_with_limit(None, [enter] * 2, on_error="collect")
    await Fallback(value=1).call(fails, OSError())
    await Hedge(after=1).call(trio.sleep, 1.5)
    with pytest.raises(trio.TooSlowError):
        await Timeout(1, name="quick").call(trio.sleep_forever)
    breaker = CircuitBreaker(failure_threshold=1)
    with pytest.raises(OSError, match="x"):
        await breaker.call(fails, OSError("x"))
    with pytest.raises(ResilienceError):
        await breaker.call(returns, 1)
    with trio.move_on_after(1):
        await standard.call(trio.sleep_forever)
