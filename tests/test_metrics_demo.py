"""A run of the demo adds up, for a listener that remembers every event, and so for `Metrics`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests.test_events import Listener
from trio_resilience import (
    AttemptFinished,
    AttemptStarted,
    CircuitStateChanged,
    OperationFinished,
    OperationStarted,
    Rejected,
    RejectedError,
    RetryScheduled,
    subscribe,
)
from trio_resilience._cli._faults import FaultPlan
from trio_resilience._cli._pages import Run, Setting, make_breaker, make_policy
from trio_resilience._cli._server import FaultServer
from trio_resilience._metrics import Metrics

if TYPE_CHECKING:
    from trio_resilience._cli._report import RunReport
    from trio_resilience._snapshots import SeriesSnapshot

SETTINGS = [
    Setting(40, 10, 2, "mild", 0.0),
    Setting(40, 10, 2, "harsh", 0.0),
    Setting(40, 10, 2, "none", 1.0),
]


def do_nothing() -> None:
    """There is no progress bar."""


async def run_demo(setting: Setting, *listeners: Any) -> RunReport:
    """The client of the demo, with the library, against the server of the demo."""
    plan, outage = FaultPlan(setting.faults, setting.seed), setting.make_outage()
    server = FaultServer(plan, outage) if setting.outage else FaultServer(plan)
    policy = make_policy(setting.max_concurrency, make_breaker())
    with subscribe(listeners[0]), subscribe(listeners[1]):
        return await Run(setting, server, policy, do_nothing)()


def outcome_of(event: Any) -> str:
    if isinstance(event.error, RejectedError):
        return "refused"
    if event.error is not None:
        return "failed"
    return "cancelled" if event.cancelled else "succeeded"


def outcomes(events: list[Any]) -> Counter[str]:
    return Counter(map(outcome_of, events))


@pytest.mark.parametrize("setting", SETTINGS, ids=["mild", "harsh", "outage"])
async def test_a_run_of_the_demo_adds_up(setting: Setting) -> None:
    """Operations and attempts; and the metrics have those very numbers."""
    metrics, listener = Metrics(), Listener()
    report = await run_demo(setting, metrics, listener)
    snapshot = metrics.snapshot().by_policy()

    operations = snapshot["run_with_limit"].operations
    found = outcomes(listener.of(OperationFinished))
    assert operations.started == len(listener.of(OperationStarted)) == setting.requests
    assert operations.started == operations.finished == found.total()
    assert operations.succeeded.count == found["succeeded"] == report.succeeded
    assert operations.failed.count == found["failed"] == len(report.failed)
    assert operations.refused.count == found["refused"] == 0

    patience, retry = snapshot["patience"].attempts, snapshot["retry"].attempts
    # Each call of a retry policy begins with an attempt, and each retry adds another one.
    assert patience.started == setting.requests + patience.retries
    assert retry.started == patience.started + retry.retries
    assert patience.retries == report.refused
    assert retry.retries == report.retries.total()
    assert retry.started - retry.refused == report.attempts

    rejected = sum(series.rejections for series in snapshot.values())
    assert rejected == len(listener.of(Rejected)) == retry.refused
    circuit = snapshot.get("circuit")
    changes = 0 if circuit is None else circuit.transitions
    assert changes == len(listener.of(CircuitStateChanged)) == len(report.circuit)
    # Without an outage, a circuit opens when enough calls happen to fail one after the other.
    assert changes > 0 or not setting.outage

    for policy, series in snapshot.items():
        own = Listener([event for event in listener.heard if event.policy == policy])
        assert _attempts_of(series) == (
            len(own.of(AttemptStarted)),
            outcomes(own.of(AttemptFinished)),
            len(own.of(RetryScheduled)),
        )


def _attempts_of(series: SeriesSnapshot) -> tuple[int, Counter[str], int]:
    attempts = series.attempts
    names = ("succeeded", "failed", "refused", "cancelled")
    counts = Counter({name: getattr(attempts, name) for name in names})
    return attempts.started, counts, attempts.retries
