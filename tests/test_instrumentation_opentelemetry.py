"""Calls are counted and traced by OpenTelemetry, each span in its place."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from contextvars import copy_context
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, Sampler
from opentelemetry.trace import StatusCode

from tests._instrumentation import (
    FAILED,
    ODD_NAMES,
    REFUSED,
    busy_job,
    ended,
    every_event,
    happened,
)
from tests.operations import fails, returns
from trio_resilience import (
    AttemptFinished,
    AttemptStarted,
    CallFinished,
    CallStarted,
    CircuitBreaker,
    CircuitState,
    CircuitStateChanged,
    Constant,
    Hedge,
    OperationFinished,
    OperationStarted,
    Pipeline,
    ResilienceError,
    Retry,
    RetryScheduled,
    Semaphore,
    Timeout,
    run_with_limit,
    subscribe,
)
from trio_resilience.instrumentation.opentelemetry import OpenTelemetryListener

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trio.testing import MockClock

BACKOFF = Constant(1, jitter="none")


@attrs.define(eq=False)
class Traced:
    """Providers that keep everything, and a listener that uses them."""

    sampler: Sampler | None = None
    options: dict[str, Any] = attrs.field(factory=dict[str, Any])
    exporter: InMemorySpanExporter = attrs.field(factory=InMemorySpanExporter)
    reader: InMemoryMetricReader = attrs.field(factory=InMemoryMetricReader)
    tracer: trace.Tracer = attrs.field(init=False)
    listener: OpenTelemetryListener = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        traces = TracerProvider(sampler=self.sampler, shutdown_on_exit=False)
        traces.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.tracer = traces.get_tracer("application")
        self.listener = OpenTelemetryListener(
            tracer_provider=traces,
            meter_provider=MeterProvider([self.reader], shutdown_on_exit=False),
            **self.options,
        )

    @property
    def spans(self) -> list[ReadableSpan]:
        """Those that have ended, in the order in which they began."""
        return sorted(self.exporter.get_finished_spans(), key=lambda span: span.start_time or 0)

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.spans if span.name == name]

    def points(self, name: str) -> list[Any]:
        data: Any = self.reader.get_metrics_data()
        return [
            point
            for metric in data.resource_metrics[0].scope_metrics[0].metrics
            if metric.name == f"trio_resilience.{name}"
            for point in metric.data.data_points
        ]

    def tree(self) -> list[str]:
        """The names of all spans, each after those that it is within."""
        by_id = {span.context.span_id: span for span in self.spans if span.context}
        return [" > ".join(path(span, by_id)) for span in self.spans]

    async def work(self) -> None:
        """An operation that traces something itself."""
        with self.tracer.start_as_current_span("query"):
            await trio.sleep(0.1)


def path(span: ReadableSpan, by_id: dict[int, ReadableSpan]) -> list[str]:
    above = [] if span.parent is None else path(by_id[span.parent.span_id], by_id)
    return [*above, span.name]


@pytest.fixture
def traced() -> Traced:
    """Providers that keep everything."""
    return Traced()


@pytest.fixture(autouse=True)
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Neither OpenTelemetry nor `subscribe` logs that something is wrong."""
    yield
    assert [record.getMessage() for record in caplog.get_records("call")] == []


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return {name.removeprefix("trio_resilience."): value for name, value in _items(span.attributes)}


def _items(found: Any) -> list[tuple[str, Any]]:
    return [(name, found[name]) for name in found or ()]


def events(span: ReadableSpan) -> list[str]:
    return [event.name for event in span.events]


# --- spans of calls and attempts ----------------------------------------------------------------


async def test_a_call_has_a_span_and_each_attempt_one_within(
    autojump_clock: MockClock, traced: Traced
) -> None:
    """However many policies are around the operation; what it traces is within its attempt."""
    failures = [FAILED]

    async def load() -> None:
        await traced.work()
        if failures:
            raise failures.pop()

    pipeline = Pipeline(Timeout(60), Retry(backoff=BACKOFF), Semaphore(1), name="db")
    with subscribe(traced.listener):
        await pipeline.call(load, name="load")
    assert traced.tree() == [
        "load",
        "load > load attempt",
        "load > load attempt > query",
        "load > load attempt",
        "load > load attempt > query",
    ]
    (call,) = traced.named("load")
    assert attributes(call) == {"policy": "db", "operation": "load", "outcome": "succeeded"}
    assert events(call) == ["retry_scheduled"]
    first, second = traced.named("load attempt")
    assert [attributes(span)["attempt"] for span in (first, second)] == [1, 2]
    assert [attributes(span)["outcome"] for span in (first, second)] == ["failed", "succeeded"]
    assert first.status.status_code is StatusCode.ERROR
    assert first.status.description == "OSError: no route"
    assert second.status.status_code is StatusCode.UNSET
    assert attributes(first)["error.type"] == "OSError"


async def test_a_call_is_within_what_is_traced_around_it(
    autojump_clock: MockClock, traced: Traced
) -> None:
    with subscribe(traced.listener), traced.tracer.start_as_current_span("request"):
        await Retry().call(traced.work, name="load")
        with traced.tracer.start_as_current_span("after"):
            pass
    assert traced.tree() == [
        "request",
        "request > load",
        "request > load > load attempt",
        "request > load > load attempt > query",
        "request > after",
    ]


async def test_the_call_of_another_operation_within_has_a_span_of_its_own(
    autojump_clock: MockClock, traced: Traced
) -> None:
    async def outer() -> None:
        await Timeout(5).call(traced.work, name="inner")

    with subscribe(traced.listener):
        await Timeout(9).call(outer, name="outer")
    assert traced.tree() == ["outer", "outer > inner", "outer > inner > query"]


async def test_a_policy_within_one_of_the_same_name_ends_nothing_early(
    autojump_clock: MockClock, traced: Traced
) -> None:
    """Attempts within attempts, of two policies that can't be told apart by name."""
    with subscribe(traced.listener):
        await Pipeline(Retry(), Retry(), name="retry").call(traced.work, name="load")
    attempts = "load > load attempt"
    inner = f"{attempts} > load attempt"
    assert traced.tree() == ["load", attempts, inner, f"{inner} > query"]


async def test_attempts_of_a_block_are_traced_too(
    autojump_clock: MockClock, traced: Traced
) -> None:
    with subscribe(traced.listener):
        async for attempt in Retry().attempts():
            with attempt:
                await traced.work()
    assert traced.tree() == ["block attempt", "block attempt > query"]


async def test_a_call_that_is_cancelled(autojump_clock: MockClock, traced: Traced) -> None:
    """Its spans end, and nothing of them is left in the context."""
    with subscribe(traced.listener):
        with trio.move_on_after(1):
            await Pipeline(Retry(), Timeout(5)).call(trio.sleep_forever, name="load")
        assert trace.get_current_span() is trace.INVALID_SPAN
    assert traced.tree() == ["load", "load > load attempt"]
    for span in traced.spans:
        assert attributes(span)["outcome"] == "cancelled"
        assert span.status.status_code is StatusCode.UNSET


async def test_hedges_are_traced_in_the_tasks_that_they_run_in(
    autojump_clock: MockClock, traced: Traced
) -> None:
    """The loser's spans end as cancelled, and no leg's context gets into another's."""
    slow = [5.0, 0.1]

    async def work() -> None:
        with traced.tracer.start_as_current_span("query"):
            await trio.sleep(slow.pop(0))

    with subscribe(traced.listener):
        await Pipeline(Hedge(after=1), Retry()).call(work, name="load")
        assert trace.get_current_span() is trace.INVALID_SPAN
    attempt = "load > load attempt"
    assert sorted(traced.tree()) == sorted(["load", *[attempt, f"{attempt} > query"] * 2])
    outcomes = [attributes(span)["outcome"] for span in traced.named("load attempt")]
    assert sorted(outcomes) == ["cancelled", "succeeded"]
    assert events(traced.named("load")[0]) == ["hedge_started"]


async def test_tasks_side_by_side_do_not_mix(autojump_clock: MockClock, traced: Traced) -> None:
    """Though they make the same call, in tasks of the same name."""
    with subscribe(traced.listener):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(partial(Retry().call, traced.work, name="load"), name="task")
    attempt = "load > load attempt"
    assert sorted(traced.tree()) == sorted(["load", attempt, f"{attempt} > query"] * 3)
    assert len({span.context.trace_id for span in traced.spans if span.context}) == 3


async def test_a_task_that_goes_on_after_its_attempt_starts_new_calls(
    autojump_clock: MockClock, traced: Traced
) -> None:
    """It has a copy of the attempt's context, of which nothing goes on any more."""
    async with trio.open_nursery() as nursery:

        async def later() -> None:
            await trio.sleep(5)
            await Retry().call(returns, 1, name="load")

        async def load() -> None:
            nursery.start_soon(later)

        with subscribe(traced.listener):
            await Retry().call(load, name="load")
            await trio.sleep(10)
    inner = "load > load attempt > load"
    assert traced.tree() == ["load", "load > load attempt", inner, f"{inner} > load attempt"]


async def test_from_a_thread(autojump_clock: MockClock, traced: Traced) -> None:
    """A call in the host task, on behalf of a thread that an attempt waits for, is within that."""

    async def call() -> None:
        await Retry().call(returns, 1, name="inner")

    def in_thread() -> None:
        trio.from_thread.run(call)

    async def load() -> None:
        await trio.to_thread.run_sync(in_thread)

    with subscribe(traced.listener):
        await Retry().call(load, name="load")
        assert trace.get_current_span() is trace.INVALID_SPAN
    inner = "load > load attempt > inner"
    assert traced.tree() == ["load", "load > load attempt", inner, f"{inner} > inner attempt"]


async def test_refusals_and_changes_of_a_circuit_are_events_on_spans(
    autojump_clock: MockClock, traced: Traced
) -> None:
    breaker = CircuitBreaker(failure_threshold=1)
    with subscribe(traced.listener):
        with pytest.raises(OSError, match="no route"):
            await breaker.call(fails, FAILED, name="load")
        with pytest.raises(ResilienceError):
            await breaker.call(returns, 1, name="load")
    first, second = traced.named("load")
    assert events(first) == ["circuit_state_changed", "exception"]
    assert events(second) == ["rejected", "exception"]
    assert dict(_items(first.events[0].attributes))["trio_resilience.state"] == "open"
    assert attributes(second)["outcome"] == "refused"


# --- operations of bounded concurrency ----------------------------------------------------------


async def test_operations_of_a_job_are_around_their_calls(
    autojump_clock: MockClock, traced: Traced
) -> None:
    """Each operation of each worker has a span of its own, within that of the caller."""

    async def load() -> None:
        await Retry().call(traced.work, name="load")

    with subscribe(traced.listener), traced.tracer.start_as_current_span("request"):
        await run_with_limit(None, [load] * 4, max_concurrency=2)
        with traced.tracer.start_as_current_span("after"):
            pass
    operation = f"request > run_with_limit {load.__qualname__}"
    call = f"{operation} > load"
    per_operation = [operation, call, f"{call} > load attempt", f"{call} > load attempt > query"]
    assert sorted(traced.tree()) == sorted(["request", *per_operation * 4, "request > after"])
    assert sorted(
        attributes(span)["index"] for span in traced.spans if "run_with_limit" in span.name
    ) == [0, 1, 2, 3]


@pytest.mark.parametrize("seconds", [0, 1])
async def test_a_policy_of_a_job_is_traced_within_its_operations(
    autojump_clock: MockClock, traced: Traced, seconds: float
) -> None:
    """Whether operations ever wait or not, and whether they fail or not."""
    ops: list[Callable[[], Any]] = [partial(pause_and_fail, seconds, index) for index in range(6)]
    with subscribe(traced.listener):
        policy = Retry(max_attempts=2, backoff=Constant(seconds))
        await run_with_limit(None, ops, max_concurrency=2, policy=policy, on_error="collect")
    operation = "run_with_limit pause_and_fail"
    call = f"{operation} > pause_and_fail"
    found = traced.tree()
    assert found.count(operation) == found.count(call) == 6
    assert found.count(f"{call} > pause_and_fail attempt") == 9
    assert len(found) == 21


async def pause_and_fail(seconds: float, index: int) -> None:
    if seconds:
        await trio.sleep(seconds)
    if index % 2:
        raise FAILED


async def test_a_job_within_an_operation(autojump_clock: MockClock, traced: Traced) -> None:
    """Its operations are within that one's attempt, also if all have the same name."""

    async def load(depth: int) -> None:
        if depth:
            ops = [partial(load, depth - 1)] * 2
            await run_with_limit(None, ops, policy=Retry(), max_concurrency=2)

    with subscribe(traced.listener):
        await run_with_limit(None, [partial(load, 1)], policy=Retry())
    name = load.__qualname__
    layer = f"run_with_limit {name} > {name} > {name} attempt"
    found = traced.tree()
    assert found.count(layer) == 1
    assert found.count(f"{layer} > {layer}") == 2


async def test_what_an_operation_traces_around_a_call_is_around_it(
    autojump_clock: MockClock, traced: Traced
) -> None:
    async def load() -> None:
        with traced.tracer.start_as_current_span("step"):
            await Retry().call(returns, 1, name="load")

    with subscribe(traced.listener):
        await run_with_limit(None, [load])
    operation = f"run_with_limit {load.__qualname__}"
    call = f"{operation} > step > load"
    assert traced.tree() == [operation, f"{operation} > step", call, f"{call} > load attempt"]


async def test_what_an_operation_without_a_policy_traces_is_within_it(
    autojump_clock: MockClock, traced: Traced
) -> None:
    """Also in tasks that it starts; one after the other in a worker, none is within another."""

    async def load() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(traced.work)
        otel_context.attach(otel_context.Context())  # a mess that it leaves behind

    with subscribe(traced.listener), traced.tracer.start_as_current_span("request"):
        await run_with_limit(None, [load] * 3, max_concurrency=1)
        assert trace.get_current_span().get_span_context().is_valid
    operation = f"request > run_with_limit {load.__qualname__}"
    assert traced.tree() == ["request", *[operation, f"{operation} > query"] * 3]


async def test_an_operation_that_is_cancelled(autojump_clock: MockClock, traced: Traced) -> None:
    with subscribe(traced.listener), trio.move_on_after(1):
        await run_with_limit(None, [trio.sleep_forever] * 2)
    assert [attributes(span)["outcome"] for span in traced.spans] == ["cancelled"] * 2


async def test_a_refusal_in_an_operation_without_a_call_is_on_its_span(traced: Traced) -> None:
    """A block form makes no call."""
    breaker = CircuitBreaker()

    async def load() -> None:
        with breaker.isolate():
            pass

    with subscribe(traced.listener):
        await run_with_limit(None, [load])
    (span,) = traced.spans
    assert events(span) == ["circuit_state_changed"] * 2


# --- events that are odd ------------------------------------------------------------------------


def test_an_end_without_a_start_is_nothing(traced: Traced) -> None:
    """Such as that of a call that began outside of the block."""
    traced.listener(happened(CallFinished, **ended()))
    traced.listener(happened(AttemptFinished, attempt=1, **ended()))
    traced.listener(happened(OperationFinished, index=1, **ended()))
    assert traced.spans == []


def test_what_never_told_of_its_end_ends_with_what_is_around_it(traced: Traced) -> None:
    traced.listener(happened(CallStarted))
    traced.listener(happened(AttemptStarted, attempt=1))
    elsewhere = copy_context()
    traced.listener(happened(CallFinished, **ended(REFUSED)))
    assert trace.get_current_span() is trace.INVALID_SPAN
    assert traced.tree() == ["load", "load > load attempt"]
    for run in (copy_context().run, elsewhere.run):
        run(traced.listener, happened(AttemptFinished, attempt=1, **ended()))
    assert len(traced.spans) == 2


def test_what_ends_in_another_context_ends_once(traced: Traced) -> None:
    """An attempt of a block within an async generator, for instance; in either order."""
    traced.listener(happened(CallStarted))
    traced.listener(happened(AttemptStarted, attempt=1))
    contexts = [copy_context(), copy_context()]
    attempt_finished = happened(AttemptFinished, attempt=1, **ended())
    contexts[0].run(traced.listener, attempt_finished)
    assert [span.name for span in traced.spans] == ["load attempt"]
    traced.listener(happened(CallFinished, **ended()))
    contexts[1].run(traced.listener, attempt_finished)
    assert traced.tree() == ["load", "load > load attempt"]
    current = contexts[1].run(trace.get_current_span)
    assert current.get_span_context() == traced.named("load")[0].context


def test_what_began_in_one_task_does_not_end_in_another(traced: Traced) -> None:
    """Though that has a copy of its context."""
    traced.listener(happened(CallStarted))
    traced.listener(happened(CallFinished, task="other", **ended()))
    assert traced.spans == []
    traced.listener(happened(CallFinished, **ended()))
    assert len(traced.spans) == 1


async def test_a_task_whose_operation_never_ends_is_not_kept(traced: Traced) -> None:
    tasks: list[weakref.ref[trio.lowlevel.Task]] = []

    async def in_task() -> None:
        traced.listener(happened(OperationStarted, index=0))
        tasks.append(weakref.ref(trio.lowlevel.current_task()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_task)
    gc.collect()
    assert tasks[0]() is None


async def test_operations_outside_of_their_tasks(traced: Traced) -> None:
    """The end of another operation than the one that runs ends nothing."""
    traced.listener(happened(OperationStarted, index=1))
    traced.listener(happened(OperationFinished, index=2, **ended()))
    assert traced.spans == []
    traced.listener(happened(OperationFinished, index=1, **ended()))
    assert len(traced.spans) == 1


def test_events_outside_of_a_run(traced: Traced) -> None:
    """Nobody is asked for a task that there is none of."""
    for event in every_event(FAILED):
        traced.listener(event)


def test_odd_names(traced: Traced) -> None:
    for name in ODD_NAMES:
        traced.listener(happened(CallStarted, operation=name, policy=name))
        traced.listener(happened(CallFinished, operation=name, policy=name, **ended(FAILED)))
    assert all(len(span.name) <= 200 and span.name.encode() is not None for span in traced.spans)
    assert len(traced.spans) == len(ODD_NAMES)


async def test_a_mark_outside_of_calls_is_on_the_span_around(traced: Traced) -> None:
    with traced.tracer.start_as_current_span("request"):
        traced.listener(happened(RetryScheduled, attempt=1, delay=1.0, error=FAILED))
    assert events(traced.spans[0]) == ["retry_scheduled"]


# --- metrics ------------------------------------------------------------------------------------


def test_calls_are_counted_and_timed_by_outcome(traced: Traced) -> None:
    for ending in (ended(), ended(), ended(FAILED), ended(REFUSED), ended(cancelled=True)):
        traced.listener(happened(CallFinished, **ending))
    prefix = "trio_resilience."
    found = {point.attributes[f"{prefix}outcome"]: point for point in traced.points("calls")}
    assert {outcome: point.value for outcome, point in found.items()} == {
        "succeeded": 2,
        "failed": 1,
        "refused": 1,
        "cancelled": 1,
    }
    assert dict(found["failed"].attributes) == {
        f"{prefix}policy": "db",
        f"{prefix}operation": "load",
        f"{prefix}outcome": "failed",
    }
    timed = {
        point.attributes[f"{prefix}outcome"]: point for point in traced.points("call.duration")
    }
    assert (timed["succeeded"].count, timed["succeeded"].sum) == (2, 0.5)
    assert timed["succeeded"].explicit_bounds[0] == 0.005


def test_the_state_of_a_circuit(traced: Traced) -> None:
    for state in (CircuitState.OPEN, CircuitState.HALF_OPEN):
        change: dict[str, Any] = {"state": state, "reason": "x", "retry_after": None}
        traced.listener(happened(CircuitStateChanged, previous=CircuitState.CLOSED, **change))
    found = {
        point.attributes["trio_resilience.state"]: point.value
        for point in traced.points("circuit.state")
    }
    assert found == {"closed": 0, "open": 0, "half_open": 1, "isolated": 0}


def test_the_number_of_sets_of_attributes_is_bounded() -> None:
    traced = Traced(options={"max_operations": 3, "max_policies": 1})
    for number in range(50):
        where = {"operation": f"o{number}", "policy": f"p{number}"}
        traced.listener(happened(CallFinished, **where, **ended()))
    points = traced.points("calls")
    assert len(points) == 4
    assert sum(point.value for point in points) == 50


# --- without an SDK, and without samples --------------------------------------------------------


async def test_what_is_not_sampled_is_handed_on_as_such(
    autojump_clock: MockClock, traced: Traced
) -> None:
    """So that nothing further in is sampled either; and nothing is recorded."""
    unsampled = Traced(ALWAYS_OFF)
    seen: list[trace.SpanContext] = []

    async def load() -> None:
        seen.append(trace.get_current_span().get_span_context())

    with subscribe(unsampled.listener):
        await Retry().call(load)
    assert [(context.is_valid, context.trace_flags.sampled) for context in seen] == [(True, False)]
    assert unsampled.spans == []


async def test_without_an_sdk_nothing_is_changed(autojump_clock: MockClock) -> None:
    """The context is the same object inside as outside."""
    before = otel_context.get_current()
    seen: list[otel_context.Context] = []

    async def load() -> None:
        seen.append(otel_context.get_current())

    for provider in (None, trace.NoOpTracerProvider()):
        with subscribe(OpenTelemetryListener(tracer_provider=provider)):
            await Pipeline(Retry(), Timeout(1)).call(load)
            await run_with_limit(None, [load], policy=Retry())
            await busy_job()
    assert all(context == before for context in seen)
    assert len(seen) == 4


def test_the_api_alone_is_enough() -> None:
    """The SDK is not imported."""
    program = """
import sys
sys.modules["opentelemetry.sdk"] = None
import trio
from trio_resilience import Retry, subscribe
from trio_resilience.instrumentation.opentelemetry import OpenTelemetryListener
with subscribe(OpenTelemetryListener()):
    trio.run(Retry().call, trio.sleep, 0)
"""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stderr == ""
