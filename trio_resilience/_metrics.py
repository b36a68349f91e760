"""Count what happens, in a bounded memory, and say at any time what it has come to."""

from __future__ import annotations

from array import array
from collections import Counter as Counts
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar, cast, final
from weakref import ref

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience import _events as events
from trio_resilience._algorithms._distinct import DistinctCounter
from trio_resilience._algorithms._sketch import AT_ONCE, Sketch, new_batch
from trio_resilience._checks import integer
from trio_resilience._engine._circuit import failure_of
from trio_resilience._engine._policy import Policy
from trio_resilience._engine._report import Counter, Ledger, Ledgers, Reporter
from trio_resilience._errors import FailureRecord, RejectedError
from trio_resilience._events import CircuitState, Event
from trio_resilience._pipeline import Pipeline
from trio_resilience._registry import RegisteredPolicy
from trio_resilience._snapshots import (
    AttemptsSnapshot,
    BatchesSnapshot,
    CircuitSnapshot,
    MetricsSnapshot,
    OutcomesSnapshot,
    PolicySnapshot,
    SeriesSnapshot,
    WaitsSnapshot,
    plain,
)

PolicyT = TypeVar("PolicyT", bound=Policy[Any])

OTHERS: Final = "(others)"


def _max_series(value: int) -> int:
    return integer("max_series", value, minimum=1)


def _max_policies(value: int) -> int:
    return integer("max_policies", value, minimum=1)


# --- what is counted ----------------------------------------------------------------------------


@final
@attrs.define(eq=False)
class _Outcomes:
    """Calls, or operations."""

    started: int = 0
    succeeded: Sketch = attrs.field(factory=Sketch, init=False)
    failed: Sketch = attrs.field(factory=Sketch, init=False)
    refused: Sketch = attrs.field(factory=Sketch, init=False)
    cancelled: Sketch = attrs.field(factory=Sketch, init=False)

    def snapshot(self) -> OutcomesSnapshot:
        return OutcomesSnapshot(
            started=self.started,
            succeeded=self.succeeded.snapshot(),
            failed=self.failed.snapshot(),
            refused=self.refused.snapshot(),
            cancelled=self.cancelled.snapshot(),
        )


@final
@attrs.define(eq=False)
class _Circuit:
    """The state of a policy that is a circuit breaker."""

    last: events.CircuitStateChanged | None = None
    """No error, task or result hangs on it."""
    transitions: Counts[CircuitState] = attrs.field(factory=Counts[CircuitState], init=False)


@final
@attrs.define(eq=False)
class _Series:
    """What happens to one operation under one policy."""

    circuit: _Circuit
    """The policy's, whatever the operation."""
    calls: _Outcomes = attrs.field(factory=_Outcomes, init=False)
    operations: _Outcomes = attrs.field(factory=_Outcomes, init=False)
    only_attempts: int = 0
    """Attempts that have started together with their call, and are not counted elsewhere yet."""
    only_attempts_succeeded: array[float] = attrs.field(factory=new_batch, init=False)
    """Seconds that such calls took which have succeeded; likewise."""
    attempts: int = 0
    attempts_succeeded: int = 0
    attempts_failed: int = 0
    attempts_refused: int = 0
    attempts_cancelled: int = 0
    retries: int = 0
    given_up: int = 0
    rejections: int = 0
    rejections_skipped: int = 0
    timeouts: int = 0
    hedges: int = 0
    losers_failed: int = 0
    fallbacks: int = 0
    transitions: int = 0
    waits: int = 0
    waits_cancelled: int = 0
    wait_seconds: Sketch = attrs.field(factory=Sketch, init=False)
    batch_items: int = 0
    batches_failed: int = 0
    batches_cancelled: int = 0
    batch_seconds: Sketch = attrs.field(factory=Sketch, init=False)
    last_failure: FailureRecord | None = None

    # This, as a ledger, is what most calls wait for.

    @enable_ki_protection
    def call_started(self) -> None:
        self.calls.started += 1

    @enable_ki_protection
    def call_succeeded(self, duration: float) -> None:
        self.calls.succeeded.observe(duration)

    @enable_ki_protection
    def only_attempt_started(self) -> None:
        self.only_attempts += 1

    @enable_ki_protection
    def only_attempt_succeeded(self, duration: float) -> None:
        pending = self.only_attempts_succeeded
        pending.append(duration)
        if len(pending) >= AT_ONCE:
            self.add_up()

    def add_up(self) -> None:
        """Let calls with an only attempt be calls and attempts."""
        durations, self.only_attempts_succeeded = self.only_attempts_succeeded, new_batch()
        self.attempts_succeeded += len(durations)
        self.calls.succeeded.observe_all(durations)
        self.calls.started += self.only_attempts
        self.attempts += self.only_attempts
        self.only_attempts = 0

    def snapshot(self, policy: str, operation: str) -> SeriesSnapshot:
        self.add_up()
        return SeriesSnapshot(
            policy=policy,
            operation=operation,
            calls=self.calls.snapshot(),
            operations=self.operations.snapshot(),
            attempts=AttemptsSnapshot(
                started=self.attempts,
                succeeded=self.attempts_succeeded,
                failed=self.attempts_failed,
                refused=self.attempts_refused,
                cancelled=self.attempts_cancelled,
                retries=self.retries,
                given_up=self.given_up,
            ),
            waits=WaitsSnapshot(
                started=self.waits,
                cancelled=self.waits_cancelled,
                seconds=self.wait_seconds.snapshot(),
            ),
            batches=BatchesSnapshot(
                items=self.batch_items,
                failed=self.batches_failed,
                cancelled=self.batches_cancelled,
                seconds=self.batch_seconds.snapshot(),
            ),
            rejections=self.rejections,
            rejections_skipped=self.rejections_skipped,
            timeouts=self.timeouts,
            hedges=self.hedges,
            losers_failed=self.losers_failed,
            fallbacks=self.fallbacks,
            transitions=self.transitions,
            last_failure=self.last_failure,
        )


# --- how events are counted ---------------------------------------------------------------------


def _ended(outcomes: _Outcomes, series: _Series, event: Any) -> None:
    error = event.error
    if error is None:
        sketch = outcomes.cancelled if event.cancelled else outcomes.succeeded
    elif isinstance(error, RejectedError):
        sketch = outcomes.refused
    else:
        sketch = outcomes.failed
        series.last_failure = failure_of(error, event.time)
    sketch.observe(event.duration)


def _call_started(series: _Series, _event: Event) -> None:
    series.calls.started += 1


def _call_finished(series: _Series, event: events.CallFinished) -> None:
    _ended(series.calls, series, event)


def _operation_started(series: _Series, _event: Event) -> None:
    series.operations.started += 1


def _operation_finished(series: _Series, event: events.OperationFinished) -> None:
    _ended(series.operations, series, event)


def _attempt_started(series: _Series, _event: Event) -> None:
    series.attempts += 1


def _attempt_finished(series: _Series, event: events.AttemptFinished) -> None:
    error = event.error
    if error is None:
        if event.cancelled:
            series.attempts_cancelled += 1
        else:
            series.attempts_succeeded += 1
    elif isinstance(error, RejectedError):
        series.attempts_refused += 1
    else:
        series.attempts_failed += 1
        series.last_failure = failure_of(error, event.time)


def _retry_scheduled(series: _Series, _event: Event) -> None:
    series.retries += 1


def _retry_gave_up(series: _Series, _event: Event) -> None:
    series.given_up += 1


def _rejected(series: _Series, _event: Event) -> None:
    series.rejections += 1


def _rejection_skipped(series: _Series, _event: Event) -> None:
    series.rejections_skipped += 1


def _timed_out(series: _Series, _event: Event) -> None:
    series.timeouts += 1


def _hedge_started(series: _Series, _event: Event) -> None:
    series.hedges += 1


def _loser_failed(series: _Series, _event: Event) -> None:
    series.losers_failed += 1


def _fallback_used(series: _Series, _event: Event) -> None:
    series.fallbacks += 1


def _wait_started(series: _Series, _event: Event) -> None:
    series.waits += 1


def _wait_finished(series: _Series, event: events.WaitFinished) -> None:
    series.waits_cancelled += event.cancelled
    series.wait_seconds.observe(event.duration)


def _batch_flushed(series: _Series, event: events.BatchFlushed) -> None:
    series.batch_items += event.size
    series.batch_seconds.observe(event.duration)
    if event.error is not None:
        series.batches_failed += 1
        series.last_failure = failure_of(event.error, event.time)
    elif event.cancelled:
        series.batches_cancelled += 1


def _circuit_changed(series: _Series, event: events.CircuitStateChanged) -> None:
    series.transitions += 1
    series.circuit.transitions[event.state] += 1
    series.circuit.last = event


_HANDLERS: Final[Mapping[type[Event], Callable[[_Series, Any], None]]] = {
    events.CallStarted: _call_started,
    events.CallFinished: _call_finished,
    events.OperationStarted: _operation_started,
    events.OperationFinished: _operation_finished,
    events.AttemptStarted: _attempt_started,
    events.AttemptFinished: _attempt_finished,
    events.RetryScheduled: _retry_scheduled,
    events.RetryGaveUp: _retry_gave_up,
    events.Rejected: _rejected,
    events.RejectionSkipped: _rejection_skipped,
    events.TimedOut: _timed_out,
    events.HedgeStarted: _hedge_started,
    events.LoserFailed: _loser_failed,
    events.FallbackUsed: _fallback_used,
    events.WaitStarted: _wait_started,
    events.WaitFinished: _wait_finished,
    events.BatchFlushed: _batch_flushed,
    events.CircuitStateChanged: _circuit_changed,
}
"""What is of another class is not counted."""


# --- the listener -------------------------------------------------------------------------------


@final
class _AllSeries(dict[tuple[str, str], _Series]):
    """The series of each policy and operation, of which there is a bounded number."""

    def __init__(self, max_series: int, max_policies: int) -> None:
        super().__init__()
        self.circuits: dict[str, _Circuit] = {}
        """One for each policy; of most, it has nothing to tell."""
        self.apart = 0
        """How many of the series are those of a single operation."""
        self.merged = DistinctCounter()
        self.merged_events = 0
        self._max_series = max_series
        self._max_policies = max_policies

    def __missing__(self, where: tuple[str, str]) -> Ledger:
        """Make a series, if there is room for it; else events tell what happens."""
        return self._add(where) if self._place_of(where) == where else Reporter(*where)

    def series(self, policy: str, operation: str) -> _Series:
        """Return where an event of this operation is counted."""
        where = policy, operation
        series = self.get(where)
        if series is None:
            place = self._place_of(where)
            if place != where:
                self.merged.add(where)
                self.merged_events += 1
            series = self.get(place) or self._add(place)
        return series

    def _place_of(self, where: tuple[str, str]) -> tuple[str, str]:
        """Return its own place for what is new, or the one for all that has none."""
        policy, _ = where
        if policy not in self.circuits and len(self.circuits) >= self._max_policies:
            return OTHERS, OTHERS
        return (policy, OTHERS) if self.apart >= self._max_series else where

    def _add(self, where: tuple[str, str]) -> _Series:
        policy, operation = where
        # What is merged says nothing about the circuit of any of its policies.
        circuit = _Circuit() if policy is OTHERS else self.circuits.setdefault(policy, _Circuit())
        self.apart += operation is not OTHERS
        series = self[where] = _Series(circuit)
        return series


@final
@attrs.frozen(eq=False, repr=False)
class Metrics(Counter):
    """Counts what happens to calls, by policy and operation; `snapshot` says what it has come to.

    It is a listener: `subscribe` it around what is to be counted. However long that runs, and
    however many operations there are, its memory is bounded: when there are *max_series* of them,
    further ones are counted together, as an operation "(others)" of their policy; and when there
    are *max_policies*, further policies as one "(others)". The snapshot says how many that were.
    Counts never go back, and hold over several runs of trio.

    Args:
        max_series: how many operations are counted apart, those of all policies together.
        max_policies: how many policies are.

    Example::

        metrics = Metrics()
        with subscribe(metrics):
            trio.run(main)
        print(json.dumps(metrics.snapshot().as_dict()))
    """

    max_series: int = attrs.field(default=1000, kw_only=True, converter=_max_series)
    max_policies: int = attrs.field(default=100, kw_only=True, converter=_max_policies)
    _all: _AllSeries = attrs.field(
        default=attrs.Factory(
            lambda self: _AllSeries(self.max_series, self.max_policies), takes_self=True
        ),
        init=False,
    )
    _watched: deque[ref[Policy[Any]]] = attrs.field(
        default=attrs.Factory(lambda self: deque(maxlen=self.max_policies), takes_self=True),
        init=False,
    )

    @property
    def ledgers(self) -> Ledgers:
        """What `subscribe` tells of calls instead of building events."""
        return self._all

    def __call__(self, event: Event) -> None:
        """Count an event."""
        handle = _HANDLERS.get(type(event))
        if handle is not None:
            happened: Any = event
            handle(self._all.series(event.policy, event.operation), happened)

    def watch(self, policy: PolicyT) -> PolicyT:
        """Have the ``statistics()`` of *policy* in each snapshot, and return it.

        Of a `Pipeline`, those of its layers. It is not kept alive by this. When *max_policies* are
        watched, a further one takes the place of the first.
        """
        if not isinstance(cast("object", policy), Policy):
            raise TypeError(f"`policy` must be a Policy, got {policy!r}")
        alive = [each for each in self._watched if each() is not None and each() is not policy]
        self._watched.clear()
        self._watched.extend((*alive, ref(policy)))
        return policy

    def snapshot(self) -> MetricsSnapshot:
        """Return what was counted until now; works outside a run too."""
        # Lists, for another thread may ask while this one counts something new.
        return MetricsSnapshot(
            time=trio.current_time() if trio.lowlevel.in_trio_run() else None,
            series=tuple(series.snapshot(*names) for names, series in list(self._all.items())),
            circuits=tuple(self._circuit_snapshots()),
            policies=tuple(each for policy in self._live() for each in _snapshots_of(policy)),
            merged_operations=self._all.merged.estimate(),
            merged_events=self._all.merged_events,
        )

    def __repr__(self) -> str:
        policies, counted = len(self._all.circuits), self._all.apart
        return f"<Metrics: {counted} operations under {policies} policies at {id(self):#x}>"

    def _circuit_snapshots(self) -> Iterator[CircuitSnapshot]:
        for policy, circuit in list(self._all.circuits.items()):
            last = circuit.last
            if last is not None:
                yield CircuitSnapshot(
                    policy=policy,
                    state=last.state,
                    since=last.time,
                    reason=last.reason,
                    retry_after=last.retry_after,
                    transitions={
                        state.value: count for state, count in circuit.transitions.items()
                    },
                )

    def _live(self) -> Iterator[Policy[Any]]:
        for each in self._watched:
            policy = each()
            if policy is not None:
                yield policy


def _snapshots_of(policy: Policy[Any]) -> Iterator[PolicySnapshot]:
    if isinstance(policy, RegisteredPolicy):
        policy = policy.pipeline
    if isinstance(policy, Pipeline):
        layers: tuple[Policy[Any], ...] = policy.layers
        for layer in layers:
            yield from _snapshots_of(layer)
        return
    yield PolicySnapshot(
        kind=type(policy).__name__,
        policy=str(getattr(policy, "name", type(policy).__name__)),
        statistics=_statistics_of(policy),
    )


def _statistics_of(policy: Policy[Any]) -> Mapping[str, Any]:
    try:
        found = plain(policy.statistics())
    except Exception as error:  # noqa: BLE001 - a foreign policy must not cost the whole snapshot
        return {"error": repr(error)}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {"statistics": found}
