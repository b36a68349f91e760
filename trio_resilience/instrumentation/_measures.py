"""What events add to counters and histograms: one table, so that all tools agree."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, final

import attrs

from trio_resilience import (
    AttemptFinished,
    BatchFlushed,
    CallFinished,
    CircuitState,
    CircuitStateChanged,
    ConfigReloaded,
    ConfigReloadFailed,
    Event,
    FallbackUsed,
    HealthChecked,
    HedgeStarted,
    LoserFailed,
    OperationFinished,
    Rejected,
    RejectionSkipped,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
    WaitFinished,
)
from trio_resilience._checks import integer
from trio_resilience._records import Record, record
from trio_resilience.instrumentation._words import outcome, text

OTHER: Final = "other"
"""What an operation or policy beyond the bound is called."""


@final
@record
class Quantity(Record):
    """Something that is counted, or measured in seconds."""

    name: str
    """In dotted notation, without the name of this package."""
    meaning: str
    labels: tuple[str, ...]
    unit: str
    """As OpenTelemetry writes it: ``s`` for seconds, or the thing that is counted in braces."""

    @property
    def snake(self) -> str:
        """The name with underscores, for Prometheus, which has the unit for its end."""
        return self.name.removesuffix(".time").replace(".", "_")


_WHERE: Final = ("policy", "operation")
_OUTCOME: Final = (*_WHERE, "outcome")

CALLS: Final = Quantity("calls", "Calls under a policy.", _OUTCOME, "{call}")
OPERATIONS: Final = Quantity(
    "operations", "Operations of bounded concurrency.", _OUTCOME, "{operation}"
)
ATTEMPTS: Final = Quantity("attempts", "Attempts of retry policies.", _OUTCOME, "{attempt}")
RETRIES: Final = Quantity("retries", "Further attempts that were scheduled.", _WHERE, "{retry}")
GIVE_UPS: Final = Quantity("give_ups", "Calls that are not retried further.", _WHERE, "{call}")
REJECTIONS: Final = Quantity("rejections", "Calls that a policy refused.", _WHERE, "{call}")
SKIPPED: Final = Quantity(
    "rejections_skipped", "Calls that a policy that only watches let run.", _WHERE, "{call}"
)
TIMEOUTS: Final = Quantity("timeouts", "Time limits that expired.", _WHERE, "{timeout}")
HEDGES: Final = Quantity("hedges", "Further legs of calls that were slow.", _WHERE, "{leg}")
LOSERS_FAILED: Final = Quantity(
    "losers_failed", "Legs that failed when their call was decided.", _WHERE, "{leg}"
)
FALLBACKS: Final = Quantity("fallbacks", "Failures that a fallback replaced.", _WHERE, "{call}")
TRANSITIONS: Final = Quantity(
    "circuit.transitions", "Changes of a circuit to a state.", ("policy", "state"), "{change}"
)
BATCHES: Final = Quantity("batches", "Batches that were flushed.", _OUTCOME, "{batch}")
BATCH_ITEMS: Final = Quantity("batch.items", "Items in the batches.", _OUTCOME, "{item}")
RELOADS: Final = Quantity(
    "config.reloads", "Times that a configuration was read again.", ("policy", "outcome"), "{load}"
)
HEALTH_CHECKS: Final = Quantity(
    "health.checks", "Checks of a service, which is the operation.", (*_WHERE, "status"), "{check}"
)
COUNTERS: Final = (
    *(CALLS, OPERATIONS, ATTEMPTS, RETRIES, GIVE_UPS, REJECTIONS, SKIPPED, TIMEOUTS, HEDGES),
    *(LOSERS_FAILED, FALLBACKS, TRANSITIONS, BATCHES, BATCH_ITEMS, RELOADS, HEALTH_CHECKS),
)

CALL_DURATION: Final = Quantity("call.duration", "How long calls took.", _OUTCOME, "s")
OPERATION_DURATION: Final = Quantity(
    "operation.duration", "How long operations of bounded concurrency took.", _OUTCOME, "s"
)
ATTEMPT_DURATION: Final = Quantity("attempt.duration", "How long attempts took.", _OUTCOME, "s")
WAIT: Final = Quantity("wait.time", "How long calls waited for their turn.", _WHERE, "s")
BATCH_DURATION: Final = Quantity("batch.duration", "How long batches took.", _WHERE, "s")
HEALTH_DURATION: Final = Quantity("health.duration", "How long health checks took.", _WHERE, "s")
DURATIONS: Final = (
    *(CALL_DURATION, OPERATION_DURATION, ATTEMPT_DURATION, WAIT, BATCH_DURATION, HEALTH_DURATION),
)

CIRCUIT_STATE: Final = Quantity(
    "circuit.state", "1 for the state that a circuit is in, 0 for others.", ("policy", "state"), "1"
)

BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 30, 60)
"""Upper bounds in seconds: those of the semantic conventions, and two for what is retried."""

Measure = tuple[Quantity, float, str]
"""What to add to, how much, and the last label if there is one beyond policy and operation."""


def measures(event: Event) -> Iterator[Measure]:  # noqa: C901, PLR0912 - it is a table
    """Yield what *event* adds; nothing, if that kind is not counted or not known."""
    match event:
        case CallFinished():
            yield from _ended(event, CALLS, CALL_DURATION)
        case OperationFinished():
            yield from _ended(event, OPERATIONS, OPERATION_DURATION)
        case AttemptFinished():
            yield from _ended(event, ATTEMPTS, ATTEMPT_DURATION)
        case RetryScheduled():
            yield RETRIES, 1, ""
        case RetryGaveUp():
            yield GIVE_UPS, 1, ""
        case Rejected():
            yield REJECTIONS, 1, ""
        case RejectionSkipped():
            yield SKIPPED, 1, ""
        case TimedOut():
            yield TIMEOUTS, 1, ""
        case WaitFinished():
            yield WAIT, event.duration, ""
        case HedgeStarted():
            yield HEDGES, 1, ""
        case LoserFailed():
            yield LOSERS_FAILED, 1, ""
        case FallbackUsed():
            yield FALLBACKS, 1, ""
        case CircuitStateChanged():
            yield TRANSITIONS, 1, event.state.value
        case BatchFlushed():
            yield BATCHES, 1, outcome(event)
            yield BATCH_ITEMS, event.size, outcome(event)
            yield BATCH_DURATION, event.duration, ""
        case ConfigReloaded() | ConfigReloadFailed():
            yield RELOADS, 1, outcome(event)
        case HealthChecked():
            yield HEALTH_CHECKS, 1, event.status.value
            yield HEALTH_DURATION, event.duration, ""
        case _:
            pass


def _ended(event: Any, counter: Quantity, duration: Quantity) -> Iterator[Measure]:
    ending = outcome(event)
    yield counter, 1, ending
    yield duration, event.duration, ending


def max_operations(value: int) -> int:
    """Check how many operations may have a label of their own."""
    return integer("max_operations", value, minimum=1)


def max_policies(value: int) -> int:
    """Check how many policies may."""
    return integer("max_policies", value, minimum=1)


@final
@attrs.define(eq=False)
class Bounded:
    """The values of a label: the first *limit* that come are themselves, and the rest `OTHER`."""

    limit: int
    _seen: set[str] = attrs.field(factory=set[str], init=False)

    def __call__(self, value: str) -> str:
        """Return the label for *value*."""
        if value in self._seen:
            return value  # the usual case: what it was made of is what it is
        word = text(value)
        if word in self._seen:
            return word
        if len(self._seen) >= self.limit:
            return OTHER
        self._seen.add(word)
        return word


@final
@attrs.define(eq=False)
class Labels:
    """The labels of measures, of which there is a bounded number of sets."""

    policies: Bounded = attrs.field(converter=Bounded)
    operations: Bounded = attrs.field(converter=Bounded)

    def of(self, event: Event, quantity: Quantity, last: str) -> list[str]:
        """Return a value for each label of *quantity*."""
        found = [self.policies(event.policy)]
        if "operation" in quantity.labels:
            found.append(self.operations(event.operation))
        return [*found, last] if len(found) < len(quantity.labels) else found

    def circuit_states(self, event: CircuitStateChanged) -> Iterator[tuple[list[str], int]]:
        """Yield each state that a circuit may be in, as labels, with 1 for the one it is in.

        Nothing if it shares its label: circuits in different states have none together.
        """
        if self.policies(event.policy) != OTHER:
            for state in CircuitState:
                yield self.of(event, CIRCUIT_STATE, state.value), int(state is event.state)
