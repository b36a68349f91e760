"""Count events, and trace calls, with OpenTelemetry (the package ``opentelemetry-api``).

A span belongs to a place in the program's flow, so its ends, and what is current in between, are
kept in the context where the events happen: a chain of scopes, as immutable as a context is. What
was current before a scope is set again when it ends, rather than reset by a token: a token is of no
use in another context, and a call that ends there, or never, must break nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import takewhile
from typing import Any, Final, final
from weakref import WeakKeyDictionary

import attrs
import trio

from trio_resilience import (
    AttemptFinished,
    AttemptStarted,
    BatchFlushed,
    CallFinished,
    CallStarted,
    CircuitStateChanged,
    Event,
    FallbackUsed,
    HedgeStarted,
    LoserFailed,
    OperationFinished,
    OperationStarted,
    Rejected,
    RejectionSkipped,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
)
from trio_resilience.instrumentation._measures import (
    BUCKETS,
    CIRCUIT_STATE,
    COUNTERS,
    DURATIONS,
    Labels,
    Quantity,
    max_operations,
    max_policies,
    measures,
)
from trio_resilience.instrumentation._words import (
    Word,
    error_message,
    error_type,
    event_name,
    extra,
    fields,
    must_be,
    outcome,
    text,
)

with extra("opentelemetry"):
    from opentelemetry import context as otel_context
    from opentelemetry import metrics, trace
    from opentelemetry.trace import Span, Status, StatusCode

_NAME: Final = "trio_resilience"

# Each is what happened at an instant within a call, and worth a mark on its span.
_MARKS: Final = (
    *(RetryScheduled, RetryGaveUp, Rejected, RejectionSkipped, CircuitStateChanged, TimedOut),
    *(FallbackUsed, HedgeStarted, LoserFailed, BatchFlushed),
)

# The span itself says these, or its trace does.
_SAID_BY_SPAN: Final = frozenset({"time", "task"})


# --- metrics ------------------------------------------------------------------------------------


@final
class _Meters:
    """All instruments; without an SDK they do nothing."""

    def __init__(self, meter: metrics.Meter) -> None:
        self.add: dict[Quantity, Callable[[float, dict[str, str]], object]] = {
            **{quantity: _counter(meter, quantity) for quantity in COUNTERS},
            **{quantity: _histogram(meter, quantity) for quantity in DURATIONS},
        }
        self.circuit_state = meter.create_gauge(*_described(CIRCUIT_STATE))


def _described(quantity: Quantity) -> tuple[str, str, str]:
    return f"{_NAME}.{quantity.name}", quantity.unit, quantity.meaning


def _counter(meter: metrics.Meter, quantity: Quantity) -> Callable[[float, Any], object]:
    return meter.create_counter(*_described(quantity)).add


def _histogram(meter: metrics.Meter, quantity: Quantity) -> Callable[[float, Any], object]:
    advice: Sequence[float] = BUCKETS
    name, unit, meaning = _described(quantity)
    return meter.create_histogram(
        name, unit, meaning, explicit_bucket_boundaries_advisory=advice
    ).record


# --- spans --------------------------------------------------------------------------------------


@final
@attrs.define(eq=False)
class _Running:
    """An operation of bounded concurrency, which its worker task runs."""

    index: object
    span: Span


@final
@attrs.define(eq=False)
class _Scope:
    """A call or an attempt that goes on in this context, or in one that this is a copy of."""

    key: tuple[object, ...]
    operation: str
    running: _Running | None
    outer: _Scope | None
    span: Span | None
    """None for a call within another of the same operation."""
    around: otel_context.Context | None
    """What was current when it began, if it has a span."""
    is_open: bool = True


@final
@attrs.define(eq=False)
class _Tracing:
    """Spans for calls, attempts and operations: those that have begun, in all contexts."""

    tracer: trace.Tracer
    is_global: bool
    """Whether its provider is the global one, which may come later."""
    _innermost: ContextVar[_Scope | None] = attrs.field(init=False)
    # The event of an operation's end may come from outside of its context.
    _running: WeakKeyDictionary[trio.lowlevel.Task, _Running] = attrs.field(
        factory=WeakKeyDictionary[trio.lowlevel.Task, _Running], init=False
    )

    def __attrs_post_init__(self) -> None:
        self._innermost = ContextVar("trio_resilience_scope", default=None)

    def hear(self, event: Event) -> None:
        """Begin a span, end one, or leave a mark on one."""
        if self.is_global and isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider):
            return  # nobody has provided an SDK
        match event:
            case CallStarted():
                self._begin_call(event)
            case AttemptStarted():
                self._begin(event, f"{text(event.operation)} attempt", ("attempt", event.attempt))
            case CallFinished():
                self._finish(event, "call")
            case AttemptFinished():
                self._finish(event, "attempt", event.attempt)
            case OperationStarted():
                self._start_operation(event)
            case OperationFinished():
                self._end_operation(event)
            case _ if isinstance(event, _MARKS):
                self._mark(event)
            case _:
                pass

    # --- calls and attempts ---

    def _begin_call(self, event: Event) -> None:
        enclosing = (scope for scope in self._enclosing() if scope.operation == event.operation)
        outermost = next(enclosing, None)
        if outermost is None:
            self._begin(event, text(event.operation), ("call",))
        else:
            # Another policy around the same operation: it is all one call.
            self._enter(event, ("call",), None, None)

    def _begin(self, event: Event, name: str, kind: tuple[object, ...]) -> None:
        around = otel_context.get_current()
        span = self.tracer.start_span(name, around, attributes=_attributes(event))
        if not span.get_span_context().is_valid:
            return  # nobody traces
        self._enter(event, kind, span, around)
        otel_context.attach(trace.set_span_in_context(span, around))

    def _enter(
        self,
        event: Event,
        kind: tuple[object, ...],
        span: Span | None,
        around: otel_context.Context | None,
    ) -> None:
        outer, running = self._innermost.get(), self._running_here()
        scope = _Scope(_key(event, *kind), event.operation, running, outer, span, around)
        self._innermost.set(scope)

    def _finish(self, event: Event, *kind: object) -> None:
        key = _key(event, *kind)
        scope = next((scope for scope in self._chain() if scope.key == key), None)
        if scope is None:
            return  # it began where this listener was not, or where nobody traced
        was_open = scope.is_open
        self._leave(scope)
        if scope.span is not None and scope.around is not None:
            otel_context.attach(scope.around)
            if was_open:  # or else it has ended in another context
                _end(scope.span, event)

    def _leave(self, scope: _Scope) -> None:
        """End *scope*, and what began within it here and has not told of its end."""
        for inner in takewhile(lambda each: each is not scope, self._chain()):
            if inner.span is not None and inner.is_open:
                inner.span.end()
            inner.is_open = False
        scope.is_open = False
        self._innermost.set(scope.outer)

    def _chain(self) -> Iterator[_Scope]:
        scope = self._innermost.get()
        while scope is not None:
            yield scope
            scope = scope.outer

    def _enclosing(self) -> Iterator[_Scope]:
        """Yield the scopes that go on around this event, of the same operation of a job if any."""
        running = self._running_here()
        for scope in self._chain():
            if scope.is_open and (running is None or scope.running is running):
                yield scope

    # --- operations of bounded concurrency ---

    def _running_here(self) -> _Running | None:
        task = _current_task() if self._running else None
        return None if task is None else self._running.get(task)

    def _start_operation(self, event: OperationStarted) -> None:
        name, task = f"{text(event.policy)} {text(event.operation)}", _current_task()
        span = self.tracer.start_span(name, attributes=_attributes(event))
        if task is not None and span.get_span_context().is_valid:
            self._running[task] = _Running(event.index, span)
            # The operation's own context, which ends with it.
            otel_context.attach(trace.set_span_in_context(span))

    def _end_operation(self, event: OperationFinished) -> None:
        task, running = _current_task(), self._running_here()
        if task is not None and running is not None and running.index == event.index:
            del self._running[task]
            _end(running.span, event)

    # --- marks ---

    def _mark(self, event: Event) -> None:
        span = self._span_here()
        if span.is_recording():
            span.add_event(event_name(event), _attributes(event))

    def _span_here(self) -> Span:
        spans = (scope.span for scope in self._enclosing())
        found = next((span for span in spans if span is not None), None)
        if found is not None:
            return found
        running = self._running_here()
        return trace.get_current_span() if running is None else running.span


def _current_task() -> trio.lowlevel.Task | None:
    return trio.lowlevel.current_task() if trio.lowlevel.in_trio_task() else None


def _key(event: Event, *kind: object) -> tuple[object, ...]:
    return (*kind, event.task, event.policy, event.operation)


def _attributes(event: Event) -> dict[str, Word]:
    said = fields(event).items()
    return {f"{_NAME}.{name}": value for name, value in said if name not in _SAID_BY_SPAN}


def _end(span: Span, event: Event) -> None:
    """End *span* with the outcome that *event* tells; the error itself is not kept."""
    if span.is_recording():
        span.set_attribute(f"{_NAME}.outcome", outcome(event))
        error = getattr(event, "error", None)
        if error is not None:
            kind, message = error_type(error), error_message(error)
            span.set_attribute("error.type", kind)
            span.add_event("exception", {"exception.type": kind, "exception.message": message})
            span.set_status(Status(StatusCode.ERROR, f"{kind}: {message}"))
    span.end()


# --- the listener -------------------------------------------------------------------------------


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class OpenTelemetryListener:
    """A listener for `subscribe` that counts, times and traces what happens.

    The metrics are named ``trio_resilience.…``. Their attributes are the policy, the operation and
    mostly an outcome: succeeded, failed, refused or cancelled. However many operations there are,
    the number of sets of attributes is bounded.

    Each call has a span, however many policies are around the operation, and each attempt has one
    within; what the operation traces is within that of its attempt. Operations of `run_with_limit`
    and its kin have spans too, around those of the calls within. Retries, refusals and changes of a
    circuit are events on the spans. A span says which error there was, and never a result.

    Without an SDK it does nothing: not even a context is changed. What still goes on when the block
    of `subscribe` ends is not heard to its end, so its span is not exported: wrap `trio.run`.

    Args:
        meter_provider: where the metrics go; the global one if not given.
        tracer_provider: where the spans go; likewise.
        max_operations: how many operations have numbers of their own; further ones share the name
            ``other``, in metrics. Spans have the names that they have.
        max_policies: the same of policies.

    Example::

        with subscribe(OpenTelemetryListener()):
            trio.run(main)
    """

    meter_provider: metrics.MeterProvider | None = attrs.field(
        default=None, validator=attrs.validators.optional(must_be(metrics.MeterProvider))
    )
    tracer_provider: trace.TracerProvider | None = attrs.field(
        default=None, validator=attrs.validators.optional(must_be(trace.TracerProvider))
    )
    max_operations: int = attrs.field(default=100, converter=max_operations)
    max_policies: int = attrs.field(default=100, converter=max_policies)
    _labels: Labels = attrs.field(init=False)
    _meters: _Meters = attrs.field(init=False)
    _tracing: _Tracing = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self._labels = Labels(self.max_policies, self.max_operations)
        self._meters = _Meters(metrics.get_meter(_NAME, meter_provider=self.meter_provider))
        tracer = trace.get_tracer(_NAME, tracer_provider=self.tracer_provider)
        self._tracing = _Tracing(tracer, is_global=self.tracer_provider is None)

    def __call__(self, event: Event) -> None:
        """Add what *event* says to the metrics and to the spans."""
        if not isinstance(event, Event):  # pyright: ignore[reportUnnecessaryIsInstance]
            return
        for quantity, amount, last in measures(event):
            labels = self._labels.of(event, quantity, last)
            self._meters.add[quantity](amount, _named(quantity, labels))
        if isinstance(event, CircuitStateChanged):
            for labels, number in self._labels.circuit_states(event):
                self._meters.circuit_state.set(number, _named(CIRCUIT_STATE, labels))
        self._tracing.hear(event)


def _named(quantity: Quantity, labels: list[str]) -> dict[str, str]:
    return {f"{_NAME}.{key}": value for key, value in zip(quantity.labels, labels, strict=True)}
