"""What holds for the listeners of all tools: they agree, raise nothing and keep nothing."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import weakref
from collections import Counter
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import structlog
import trio
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry, generate_latest

from tests._instrumentation import (
    COUNTED,
    FAILED,
    ODD_NAMES,
    REFUSED,
    Mute,
    busy_job,
    count,
    every_event,
    outcome_of,
)
from trio_resilience import (
    AttemptFinished,
    AttemptStarted,
    CallFinished,
    CallStarted,
    CircuitState,
    Event,
    Metrics,
    OperationFinished,
    OperationStarted,
    RetryScheduled,
    subscribe,
)
from trio_resilience._cli._pages import Run, Setting, make_breaker, make_policy
from trio_resilience._cli._server import FaultServer
from trio_resilience.instrumentation.logging import LoggingListener
from trio_resilience.instrumentation.opentelemetry import OpenTelemetryListener
from trio_resilience.instrumentation.prometheus import PrometheusListener
from trio_resilience.instrumentation.structlog import StructlogListener

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock

Listener = LoggingListener | StructlogListener | PrometheusListener | OpenTelemetryListener


def make_logging() -> LoggingListener:
    logger = logging.Logger("own", logging.DEBUG)  # noqa: LOG001 - one that no other test knows
    logger.addHandler(logging.NullHandler())
    return LoggingListener(logger)


def make_structlog() -> StructlogListener:
    return StructlogListener(structlog.wrap_logger(structlog.testing.ReturnLogger()))


def make_prometheus() -> PrometheusListener:
    return PrometheusListener(registry=CollectorRegistry())


def make_opentelemetry() -> OpenTelemetryListener:
    traces = TracerProvider(shutdown_on_exit=False)
    traces.add_span_processor(SimpleSpanProcessor(InMemorySpanExporter()))
    meters = MeterProvider([InMemoryMetricReader()], shutdown_on_exit=False)
    return OpenTelemetryListener(tracer_provider=traces, meter_provider=meters)


every_tool = pytest.mark.parametrize(
    "make", [make_logging, make_structlog, make_prometheus, make_opentelemetry]
)


@every_tool
@pytest.mark.parametrize("error", [FAILED, REFUSED, Mute()], ids=["failed", "refused", "mute"])
def test_no_event_makes_it_raise(make: Callable[[], Listener], error: Exception) -> None:
    """Whatever the names are, also of a kind that it does not know, and what is no event at all."""
    listener: Any = make()
    events: list[Any] = every_event(error)
    for event in events:
        for name in ODD_NAMES:
            listener(attrs.evolve(event, operation=name, policy=name, task=name))
    listener(None)
    listener(object())


@pytest.mark.parametrize(
    "make, option, kind",
    [
        (LoggingListener, "logger", "Logger"),
        (PrometheusListener, "registry", "CollectorRegistry"),
        (OpenTelemetryListener, "meter_provider", "MeterProvider"),
        (OpenTelemetryListener, "tracer_provider", "TracerProvider"),
    ],
)
def test_what_it_reports_to_is_checked(make: Callable[..., object], option: str, kind: str) -> None:
    """At once, not when something happens."""
    with pytest.raises(TypeError, match=f"`{option}` must be a {kind}, got 'app'"):
        make(**{option: "app"})


@pytest.mark.parametrize(
    "name, package",
    [
        ("structlog", "structlog"),
        ("prometheus", "prometheus_client"),
        ("opentelemetry", "opentelemetry"),
    ],
)
def test_without_its_package_a_tool_says_what_to_install(name: str, package: str) -> None:
    """Nothing else needs the package."""
    program = f"""
import sys
sys.modules["{package}"] = None
import trio_resilience, trio_resilience.instrumentation, trio_resilience.instrumentation.logging
try:
    import trio_resilience.instrumentation.{name}
except ModuleNotFoundError as error:
    print(error, error.name)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 'install the extra: pip install "trio_resilience[' + name + ']"' in run.stdout
    assert run.stdout.rstrip().endswith(package)


class Tracked(Exception):  # noqa: N818 - that is what it is for
    """An error that can be referred to weakly."""


@every_tool
async def test_it_keeps_neither_errors_nor_tasks(make: Callable[[], Listener]) -> None:
    """Not even in a cycle that the garbage collector has to find."""
    listener = make()
    kept: list[weakref.ref[Any]] = []

    async def in_task() -> None:
        error = Tracked("x")
        kept.extend([weakref.ref(error), weakref.ref(trio.lowlevel.current_task())])
        for event in every_event(error):
            listener(event)

    gc.collect()
    gc.disable()
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(in_task)
        assert kept[0]() is None
    finally:
        gc.enable()
    gc.collect()
    assert kept[1]() is None


# --- numbers ------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Watch:
    """A plain list, `Metrics`, Prometheus and OpenTelemetry, all of which hear the same."""

    heard: list[Any] = attrs.field(factory=list[Any])
    metrics: Metrics = attrs.field(factory=Metrics)
    registry: CollectorRegistry = attrs.field(factory=CollectorRegistry)
    reader: InMemoryMetricReader = attrs.field(factory=InMemoryMetricReader)
    exporter: InMemorySpanExporter = attrs.field(factory=InMemorySpanExporter)

    def listeners(self) -> list[Callable[[Event], object]]:
        traces = TracerProvider(shutdown_on_exit=False)
        traces.add_span_processor(SimpleSpanProcessor(self.exporter))
        meters = MeterProvider([self.reader], shutdown_on_exit=False)
        return [
            self.heard.append,
            self.metrics,
            PrometheusListener(registry=self.registry),
            OpenTelemetryListener(meter_provider=meters, tracer_provider=traces),
        ]

    @property
    def by_list(self) -> Counter[tuple[str, str]]:
        return count(self.heard)

    @property
    def by_metrics(self) -> Counter[tuple[str, str]]:
        found = Counter[tuple[str, str]]()
        for each in self.metrics.snapshot().series:
            for ending in ("succeeded", "failed", "refused", "cancelled"):
                found["calls", ending] += getattr(each.calls, ending).count
                found["operations", ending] += getattr(each.operations, ending).count
                found["attempts", ending] += getattr(each.attempts, ending)
            found["retries", ""] += each.attempts.retries
            found["give_ups", ""] += each.attempts.given_up
            for name in ("rejections", "timeouts", "hedges", "fallbacks"):
                found[name, ""] += getattr(each, name)
        return +found

    @property
    def by_prometheus(self) -> Counter[tuple[str, str]]:
        found = Counter[tuple[str, str]]()
        for family in self.registry.collect():
            for sample in family.samples:
                name = sample.name.removeprefix("trio_resilience_").removesuffix("_total")
                if name in COUNTED.values() and sample.name.endswith("_total"):
                    found[name, sample.labels.get("outcome", "")] += int(sample.value)
        return found

    @property
    def by_opentelemetry(self) -> Counter[tuple[str, str]]:
        found, data = Counter[tuple[str, str]](), self.reader.get_metrics_data()
        metrics: Any = data and data.resource_metrics[0].scope_metrics[0].metrics
        for metric in metrics:
            name = metric.name.removeprefix("trio_resilience.")
            if name in COUNTED.values():
                for point in metric.data.data_points:
                    outcome = point.attributes.get("trio_resilience.outcome", "")
                    found[name, outcome] += point.value
        return found

    def check(self) -> Counter[tuple[str, str]]:
        """Return the numbers, on which all agree, and which add up."""
        found = self.by_list
        assert self.by_metrics == found
        assert self.by_prometheus == found
        assert self.by_opentelemetry == found
        for started, finished in (
            (OperationStarted, OperationFinished),
            (AttemptStarted, AttemptFinished),
            (CallStarted, CallFinished),
        ):
            assert self.number_of(started) == self.number_of(finished)
        self._check_spans()
        return found

    def number_of(self, kind: type[Event]) -> int:
        return sum(type(event) is kind for event in self.heard)

    def _check_spans(self) -> None:
        """Each attempt and each operation has a span, with the outcome that it had."""
        spans = self.exporter.get_finished_spans()
        for kind, key in ((AttemptFinished, "attempt"), (OperationFinished, "index")):
            told = Counter(
                (span.attributes or {})["trio_resilience.outcome"]
                for span in spans
                if f"trio_resilience.{key}" in (span.attributes or {})
            )
            assert told == Counter(outcome_of(each) for each in self.heard if type(each) is kind)


@pytest.fixture
def watch() -> Watch:
    return Watch()


async def listen(watch: Watch, job: Callable[[], Any]) -> None:
    with ExitStack() as stack:
        for listener in watch.listeners():
            stack.enter_context(subscribe(listener))
        await job()


async def test_the_numbers_of_a_job_agree(autojump_clock: MockClock, watch: Watch) -> None:
    """Operations, calls, attempts and the rest, of all four."""
    await listen(watch, busy_job)
    found = watch.check()
    assert {name for name, _ in found} == set(COUNTED.values())
    assert {outcome for name, outcome in found if name == "calls"} == {
        *("succeeded", "failed", "refused", "cancelled"),
    }
    assert found["operations", "succeeded"] == 3
    assert found["operations", "failed"] == 2
    assert found["operations", "refused"] == 1


@pytest.mark.parametrize(
    "setting",
    [Setting(20, 10, 1, "harsh", outage=0), Setting(40, 10, 1, "none", outage=1)],
    ids=["harsh", "outage"],
)
async def test_the_numbers_of_the_demo_agree(watch: Watch, setting: Setting) -> None:
    """Its own client against its own server, with faults; attempts are first ones and retries."""
    policy = make_policy(setting.max_concurrency, make_breaker())
    server = FaultServer(setting.plan)
    if setting.outage:
        server = FaultServer(setting.plan, setting.make_outage())
    await listen(watch, Run(setting, server, policy, lambda: None))
    found = watch.check()
    operations = {outcome: n for (name, outcome), n in found.items() if name == "operations"}
    assert sum(operations.values()) == setting.requests
    assert operations.get("failed", 0) == len(setting.scripted_failures)
    if setting.outage:  # without one, a circuit may open all the same, when enough calls fail
        assert found["calls", "refused"] >= found["rejections", ""] > 0
    attempts = sum(n for (name, _), n in found.items() if name == "attempts")
    calls_of_retries = sum(
        type(event) is AttemptStarted and event.attempt == 1 for event in watch.heard
    )
    assert attempts == calls_of_retries + found["retries", ""]
    assert found["retries", ""] == watch.number_of(RetryScheduled) > 0


async def test_an_exposition_of_a_job_names_its_circuit(
    autojump_clock: MockClock, watch: Watch
) -> None:
    """Which one is open can be read from it."""
    await listen(watch, busy_job)
    labels = f'{{policy="circuit",state="{CircuitState.OPEN}"}}'
    assert f"trio_resilience_circuit_state{labels} 1.0" in generate_latest(watch.registry).decode()
