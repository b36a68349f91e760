"""That `Metrics` stays small, however many operations there are, and keeps nothing alive."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.test_metrics import made
from trio_resilience import AttemptFinished, CallFinished, CallStarted, TimedOut
from trio_resilience._metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Iterator

MIB = 2**20


@pytest.fixture
def traced() -> Iterator[None]:
    """Memory is measured, from here on."""
    gc.collect()
    tracemalloc.start()
    yield
    tracemalloc.stop()


def call(metrics: Metrics, operation: str, seconds: float, error: Exception | None = None) -> None:
    """Report a call, as a policy does."""
    metrics(made(CallStarted, "db", operation))
    metrics(made(CallFinished, "db", operation, duration=seconds, error=error, cancelled=False))


@pytest.mark.usefixtures("traced")
def test_ten_thousand_operations_take_less_than_20_mib() -> None:
    """And it says how many it has merged, and counts every call all the same."""
    metrics, rng = Metrics(), Random(3)
    for _ in range(2):
        for number in range(10_000):
            error = OSError("x" * 1000) if rng.random() < 0.2 else None
            call(metrics, f"operation {number}", rng.lognormvariate(-3, 1.5), error)
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    assert used < 20 * MIB
    snapshot = metrics.snapshot()
    assert len(snapshot.series) == 1001
    assert snapshot.by_policy()["db"].calls.finished == 20_000
    assert snapshot.merged_operations == pytest.approx(9000, rel=0.03)
    assert snapshot.merged_events == 36_000


@pytest.mark.exhaustive
@pytest.mark.watchdog(300)
@pytest.mark.usefixtures("traced")
def test_a_million_calls_of_ten_thousand_operations_take_less_than_20_mib() -> None:
    """And none of them is lost."""
    metrics, rng = Metrics(), Random(3)
    ended = {"error": None, "cancelled": False}
    pairs = [
        (
            made(CallStarted, "db", f"operation {number}"),
            made(CallFinished, "db", f"operation {number}", duration=rng.expovariate(20), **ended),
        )
        for number in range(10_000)
    ]
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    for _ in range(100):
        for started, finished in pairs:
            metrics(started)
            metrics(finished)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    assert after - before < 20 * MIB
    snapshot = metrics.snapshot()
    assert sum(series.calls.succeeded.count for series in snapshot.series) == 1_000_000
    assert snapshot.merged_operations == pytest.approx(9000, rel=0.03)
    assert snapshot.merged_events == 1_800_000


@pytest.mark.usefixtures("traced")
def test_an_operation_takes_less_than_20_kib_whatever_its_latencies_are() -> None:
    """So a thousand of them take less than 20 MiB for ever: these have all latencies there are."""
    metrics, rng = Metrics(), Random(3)
    before, _ = tracemalloc.get_traced_memory()
    for number in range(5):
        for _ in range(4000):
            error = OSError() if rng.random() < 0.5 else None
            call(metrics, f"operation {number}", 10 ** rng.uniform(-7, 8), error)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    assert (after - before) / 5 < 20 * 1024


@pytest.mark.usefixtures("traced")
def test_policies_without_end_take_no_more() -> None:
    """Such as those that are made for a customer, and named after it."""
    metrics = Metrics(max_policies=10)
    for number in range(20_000):
        metrics(made(TimedOut, f"customer {number}", "load", timeout=1.0))
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    assert used < MIB
    assert len(metrics.snapshot().series) == 11


def test_an_error_is_let_go() -> None:
    """What is remembered of it are words."""

    class LocalError(Exception):
        pass

    metrics, error = Metrics(), LocalError("words")
    held = weakref.ref(error)
    call(metrics, "load", 1.0, error)
    metrics(made(AttemptFinished, attempt=1, duration=1.0, error=error, cancelled=False))
    del error
    gc.collect()
    assert held() is None
    failure = metrics.snapshot().by_policy()["db"].last_failure
    assert failure is not None
    assert failure.message == "words"
