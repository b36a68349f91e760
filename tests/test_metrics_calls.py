"""A run of the demo adds up by calls, too: each policy's, and those of the policies around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.test_events import Listener
from tests.test_metrics_demo import SETTINGS, outcomes, run_demo
from trio_resilience import AttemptFinished, CallFinished, CallStarted
from trio_resilience._metrics import Metrics

if TYPE_CHECKING:
    from trio_resilience._cli._pages import Setting


@pytest.mark.parametrize("setting", SETTINGS, ids=["mild", "harsh", "outage"])
async def test_calls_are_successes_failures_refusals_and_cancellations(setting: Setting) -> None:
    """Every call that has begun has ended; and a retry's attempts are its calls and its retries."""
    metrics, listener = Metrics(), Listener()
    report = await run_demo(setting, metrics, listener)
    snapshot = metrics.snapshot().by_policy()
    for policy, series in snapshot.items():
        own = Listener([event for event in listener.heard if event.policy == policy])
        found, calls = outcomes(own.of(CallFinished)), series.calls
        assert calls.started == len(own.of(CallStarted)) == found.total() == calls.finished
        assert calls.succeeded.count == found["succeeded"]
        assert calls.failed.count == found["failed"]
        assert calls.refused.count == found["refused"]
        assert calls.cancelled.count == found["cancelled"]
        if own.of(AttemptFinished):
            assert series.attempts.started == calls.started + series.attempts.retries
    assert snapshot["patience"].calls.started == report.requests
    assert snapshot["patience"].calls.succeeded.count == report.succeeded
