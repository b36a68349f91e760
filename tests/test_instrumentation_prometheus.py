"""Events are counted for Prometheus, in its own names and formats."""

from __future__ import annotations

import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
import trio
from prometheus_client import CollectorRegistry, Counter, generate_latest, start_http_server
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics import parser as openmetrics_parser
from prometheus_client.parser import text_string_to_metric_families

from tests._instrumentation import (
    FAILED,
    ODD_NAMES,
    REFUSED,
    busy_job,
    ended,
    every_event,
    happened,
)
from trio_resilience import (
    AttemptFinished,
    CallFinished,
    CircuitState,
    CircuitStateChanged,
    OperationFinished,
    Retry,
    WaitFinished,
    subscribe,
)
from trio_resilience.instrumentation.prometheus import PrometheusListener

if TYPE_CHECKING:
    from trio.testing import MockClock

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_in(exposition: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def scrape(registry: CollectorRegistry) -> Samples:
    return samples_in(generate_latest(registry).decode())


def read(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=10) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        exposition: bytes = answer.read()
    return exposition.decode()


def value(samples: Samples, name: str, **labels: str) -> float | None:
    where = {"policy": "db", "operation": "load", **labels}
    return samples.get((f"trio_resilience_{name}", frozenset(where.items())))


def test_calls_are_counted_and_timed_by_outcome() -> None:
    registry = CollectorRegistry()
    listener = PrometheusListener(registry=registry)
    for ending in (ended(), ended(), ended(FAILED), ended(REFUSED), ended(cancelled=True)):
        listener(happened(CallFinished, **ending))
    found = scrape(registry)
    assert value(found, "calls_total", outcome="succeeded") == 2
    for outcome in ("failed", "refused", "cancelled"):
        assert value(found, "calls_total", outcome=outcome) == 1
    seconds = "call_duration_seconds"
    assert value(found, f"{seconds}_count", outcome="succeeded") == 2
    assert value(found, f"{seconds}_sum", outcome="succeeded") == 0.5
    assert value(found, f"{seconds}_bucket", outcome="succeeded", le="0.1") == 0
    assert value(found, f"{seconds}_bucket", outcome="succeeded", le="0.25") == 2


def test_names_and_units_follow_the_conventions() -> None:
    """Counters end in `_total`, what is timed in `_seconds`, and all have a help text."""
    registry = CollectorRegistry()
    listener = PrometheusListener(registry=registry)
    for event in every_event(FAILED):
        listener(event)
    families = list(registry.collect())
    counters = {family.name for family in families if family.type == "counter"}
    histograms = {family.name for family in families if family.type == "histogram"}
    prefix = "trio_resilience_"
    assert {family.name.startswith(prefix) for family in families} == {True}
    assert counters == {
        f"{prefix}{name}"
        for name in (
            *("calls", "operations", "attempts", "retries", "give_ups", "rejections"),
            *("rejections_skipped", "timeouts", "hedges", "losers_failed", "fallbacks"),
            *("circuit_transitions", "batches", "batch_items", "config_reloads", "health_checks"),
        )
    }
    assert histograms == {
        f"{prefix}{name}_seconds"
        for name in (
            *("call_duration", "operation_duration", "attempt_duration", "wait"),
            *("batch_duration", "health_duration"),
        )
    }
    assert all(family.documentation.endswith(".") for family in families)
    assert all(family.samples for family in families)


def test_the_state_of_a_circuit_is_one_of_all_states() -> None:
    registry = CollectorRegistry()
    listener = PrometheusListener(registry=registry)
    for state in (CircuitState.OPEN, CircuitState.HALF_OPEN):
        change: dict[str, Any] = {"state": state, "reason": "x", "retry_after": None}
        listener(happened(CircuitStateChanged, previous=CircuitState.CLOSED, **change))
    found = {
        dict(labels)["state"]: number
        for (name, labels), number in scrape(registry).items()
        if name == "trio_resilience_circuit_state"
    }
    assert found == {"closed": 0, "open": 0, "half_open": 1, "isolated": 0}


def test_circuits_that_share_a_label_have_no_state_together() -> None:
    """One may be open while another is closed; their changes are counted all the same."""
    registry = CollectorRegistry()
    listener = PrometheusListener(registry=registry, max_policies=1)
    for policy in ("first", "second", "third"):
        change: dict[str, Any] = {"state": CircuitState.OPEN, "reason": "x", "retry_after": None}
        where: dict[str, Any] = {"policy": policy, "previous": CircuitState.CLOSED}
        listener(happened(CircuitStateChanged, **where, **change))
    found = scrape(registry)
    states = {dict(labels)["policy"] for name, labels in found if name.endswith("circuit_state")}
    assert states == {"first"}
    others = frozenset({("policy", "other"), ("state", "open")})
    assert found["trio_resilience_circuit_transitions_total", others] == 2


def test_the_number_of_series_is_bounded() -> None:
    """However many names of operations and policies there are; nothing is lost."""
    registry = CollectorRegistry()
    listener = PrometheusListener(registry=registry, max_operations=3, max_policies=2)
    for number in range(200):
        where = {"policy": f"p{number % 20}", "operation": f"o{number}"}
        listener(happened(CallFinished, **where, **ended()))
    found = {
        labels: number
        for (name, labels), number in scrape(registry).items()
        if name == "trio_resilience_calls_total"
    }
    assert {dict(labels)["operation"] for labels in found} == {"o0", "o1", "o2", "other"}
    assert {dict(labels)["policy"] for labels in found} == {"p0", "p1", "other"}
    assert sum(found.values()) == 200


@pytest.mark.parametrize("option", ["max_operations", "max_policies"])
def test_the_bounds_are_checked(option: str) -> None:
    """And nothing is registered by a listener that can't be made."""
    registry = CollectorRegistry()
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=f"`{option}` must be >= 1, got 0"):
        PrometheusListener(registry=registry, **options)
    assert list(registry.collect()) == []


def test_a_second_listener_on_one_registry_is_told_why_not() -> None:
    """Its numbers would add to those of the first, so it is refused, and the first goes on."""
    registry = CollectorRegistry()
    first = PrometheusListener(registry=registry)
    with pytest.raises(ValueError, match="its own `registry`"):
        PrometheusListener(registry=registry)
    first(happened(CallFinished, **ended()))
    assert value(scrape(registry), "calls_total", outcome="succeeded") == 1


def test_a_clash_with_a_metric_of_somebody_else_registers_nothing() -> None:
    registry = CollectorRegistry()
    Counter("trio_resilience_retries_total", "Another's.", registry=registry)
    with pytest.raises(ValueError, match="already"):
        PrometheusListener(registry=registry)
    assert [family.name for family in registry.collect()] == ["trio_resilience_retries"]


def test_odd_names_are_exposed_as_they_are() -> None:
    """In both formats, and what can't be encoded is replaced."""
    registry = CollectorRegistry()
    listener = PrometheusListener(registry=registry)
    for name in ODD_NAMES:
        listener(happened(AttemptFinished, attempt=1, operation=name, policy=name, **ended()))
    found = {
        dict(labels)["operation"]
        for name, labels in scrape(registry)
        if name == "trio_resilience_attempts_total"
    }
    assert found == {"x" * 199 + "…" if len(name) > 200 else name for name in ODD_NAMES} - {
        "\ud800"
    } | {"?"}
    untyped: Any = openmetrics_parser, openmetrics
    parser, generator = untyped
    exposition = generator.generate_latest(registry).decode()
    parsed = parser.text_string_to_metric_families(exposition)
    attempts = next(family for family in parsed if family.name == "trio_resilience_attempts")
    assert {sample.labels["operation"] for sample in attempts.samples} == found


async def test_one_listener_hears_in_many_blocks(autojump_clock: MockClock) -> None:
    """One after the other, and side by side in tasks."""
    registry = CollectorRegistry()
    listener = PrometheusListener(registry=registry)

    async def one() -> None:
        with subscribe(listener):
            await Retry(name="db").call(trio.sleep, 1, name="load")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one)
        nursery.start_soon(one)
    await one()
    assert value(scrape(registry), "attempts_total", outcome="succeeded") == 3


async def test_what_a_scrape_over_http_reads(autojump_clock: MockClock) -> None:
    """The numbers of a job, as a Prometheus server gets them from the package's own server."""
    registry = CollectorRegistry()
    with subscribe(PrometheusListener(registry=registry)):
        await busy_job()
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        exposition = read(f"http://127.0.0.1:{server.server_port}/metrics")
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
    assert not thread.is_alive()
    found = samples_in(exposition)
    assert found == scrape(registry)
    job = {"policy": "run_with_limit"}
    flaky = {"policy": "retry", "operation": "Flaky.run"}
    assert value(found, "operations_total", **job, operation="Flaky.run", outcome="succeeded") == 2
    assert value(found, "operations_total", **job, operation="Flaky.run", outcome="failed") == 1
    assert value(found, "attempts_total", **flaky, outcome="failed") == 5
    assert value(found, "attempts_total", **flaky, outcome="succeeded") == 2
    assert value(found, "retries_total", **flaky) == 4
    assert value(found, "give_ups_total", **flaky) == 1


def test_waits_are_timed() -> None:
    registry = CollectorRegistry()
    listener = PrometheusListener(registry=registry)
    listener(happened(WaitFinished, duration=2.0, cancelled=False))
    listener(happened(OperationFinished, index=1, **ended()))
    assert value(scrape(registry), "wait_seconds_sum") == 2.0
