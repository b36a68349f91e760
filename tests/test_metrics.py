"""What `Metrics` counts, how its snapshots add up, and that JSON can hold them."""

from __future__ import annotations

import json
import math
import pickle
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import trio
from hypothesis import strategies as st

from tests.operations import fails
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
    Event,
    FailureRecord,
    FallbackUsed,
    HedgeStarted,
    LoserFailed,
    OperationFinished,
    OperationStarted,
    Pipeline,
    Policy,
    Registry,
    Rejected,
    RejectionSkipped,
    Retry,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
    WaitFinished,
    WaitStarted,
    run_with_limit,
    subscribe,
)
from trio_resilience._metrics import Metrics
from trio_resilience._records import keyword_record
from trio_resilience._snapshots import (
    MetricsSnapshot,
    OutcomesSnapshot,
    SeriesSnapshot,
)

if TYPE_CHECKING:
    from trio.testing import MockClock


def made(kind: Any, policy: str = "db", operation: str = "load", /, **fields: Any) -> Event:
    """An event, as a policy would have reported it."""
    where = {"time": 7.0, "task": "main", "policy": policy, "operation": operation}
    event: Event = kind(**{**where, **fields})
    return event


def ended(
    kind: Any,
    duration: float,
    error: Exception | None = None,
    *,
    cancelled: bool = False,
    **more: Any,
) -> Event:
    return made(kind, duration=duration, error=error, cancelled=cancelled, **more)


def counted(*events: Event, **options: Any) -> MetricsSnapshot:
    """What these come to."""
    metrics = Metrics(**options)
    for event in events:
        metrics(event)
    return metrics.snapshot()


def only(snapshot: MetricsSnapshot) -> SeriesSnapshot:
    (series,) = snapshot.series
    return series


# --- what is counted ----------------------------------------------------------------------------

ENDINGS = [
    (1.0, None, False),
    (2.0, None, False),
    (0.25, OSError("no route"), False),
    (0.125, BulkheadFullError("b", 1, 2), False),
    (4.0, None, True),
]


@pytest.mark.parametrize(
    "started, finished, more, where",
    [
        (CallStarted, CallFinished, {}, "calls"),
        (OperationStarted, OperationFinished, {"index": 3}, "operations"),
    ],
)
def test_calls_are_counted_by_their_outcome_with_their_latencies(
    started: Any, finished: Any, more: dict[str, Any], where: str
) -> None:
    """Those that have not ended are in progress."""
    begun = [made(started, **more) for _ in range(7)]
    ends = [ended(finished, t, error, cancelled=c, **more) for t, error, c in ENDINGS]
    series = only(counted(*begun, *ends))
    found: OutcomesSnapshot = getattr(series, where)
    assert (found.started, found.finished, found.in_progress) == (7, 5, 2)
    assert (found.succeeded.count, found.succeeded.total) == (2, 3.0)
    assert [found.failed.total, found.refused.total, found.cancelled.total] == [0.25, 0.125, 4.0]
    assert found.succeeded.quantile(0.5) == pytest.approx(1, rel=0.02)
    assert (series.policy, series.operation) == ("db", "load")
    assert series.last_failure == FailureRecord("OSError", "no route", 7.0)


def test_the_attempts_add_up() -> None:
    """Each is a success, a failure, a refusal or cancelled; and each but the first a retry."""
    events = [made(AttemptStarted, attempt=1) for _ in ENDINGS]
    events += [
        ended(AttemptFinished, duration, error, cancelled=cancelled, attempt=1)
        for duration, error, cancelled in ENDINGS
    ]
    events += [made(RetryScheduled, attempt=1, delay=1.0, error=OSError())] * 3
    events += [made(RetryGaveUp, attempts=3, reason="max_attempts", error=OSError())]
    found = only(counted(*events)).attempts
    assert found.started == 5
    assert (found.succeeded, found.failed, found.refused, found.cancelled) == (2, 1, 1, 1)
    assert (found.retries, found.given_up) == (3, 1)


@pytest.mark.parametrize(
    "event, field",
    [
        (made(Rejected, retry_after=None), "rejections"),
        (made(RejectionSkipped, retry_after=1.0), "rejections_skipped"),
        (made(TimedOut, timeout=1.0), "timeouts"),
        (made(HedgeStarted, leg=1), "hedges"),
        (made(LoserFailed, leg=0, error=OSError()), "losers_failed"),
        (made(FallbackUsed, error=OSError()), "fallbacks"),
    ],
)
def test_what_happens_now_and_then_has_a_count_of_its_own(event: Event, field: str) -> None:
    changes: dict[str, Any] = {field: 2}
    expected = SeriesSnapshot(policy="db", operation="load", **changes)
    assert only(counted(event, event)) == expected


def test_waits_are_counted_and_timed() -> None:
    waits = [made(WaitStarted)] * 3
    waits += [made(WaitFinished, duration=1.0, cancelled=False)]
    waits += [made(WaitFinished, duration=3.0, cancelled=True)]
    found = only(counted(*waits)).waits
    assert (found.started, found.cancelled, found.in_progress) == (3, 1, 1)
    assert (found.seconds.count, found.seconds.total) == (2, 4.0)


def test_batches_are_counted_with_their_items() -> None:
    def flushed(size: int, error: Exception | None = None, *, cancelled: bool = False) -> Event:
        return made(
            BatchFlushed, size=size, reason="age", duration=0.5, error=error, cancelled=cancelled
        )

    series = only(counted(flushed(3), flushed(4, OSError()), flushed(1, cancelled=True)))
    found = series.batches
    assert (found.items, found.failed, found.cancelled, found.seconds.count) == (8, 1, 1, 3)
    assert series.last_failure is not None


def changed(state: CircuitState, time: float, operation: str = "load") -> Event:
    return made(
        CircuitStateChanged,
        "db",
        operation,
        time=time,
        previous=CircuitState.CLOSED,
        state=state,
        reason=f"now {state.value}",
        retry_after=None,
    )


def test_the_state_of_a_circuit_is_the_policys_whatever_the_operation() -> None:
    """With when it came about and why, and how often it was in each."""
    events = [changed(CircuitState.OPEN, 1), changed(CircuitState.HALF_OPEN, 2, "probe")]
    snapshot = counted(*events, changed(CircuitState.OPEN, 3, "probe"))
    (circuit,) = snapshot.circuits
    assert (circuit.policy, circuit.state, circuit.since) == ("db", CircuitState.OPEN, 3)
    assert circuit.reason == "now open"
    assert circuit.transitions == {"open": 2, "half_open": 1}
    assert [series.transitions for series in snapshot.series] == [1, 2]


@keyword_record
class _Foreign(Event):
    """An event that nobody knows."""


def test_what_it_does_not_know_is_not_counted() -> None:
    assert counted(made(_Foreign), made(ConfigReloaded, changed=())).series == ()


def test_what_has_begun_unheard_is_not_in_progress() -> None:
    """A listener may come when calls are under way."""
    series = only(
        counted(ended(CallFinished, 1.0), made(WaitFinished, duration=1, cancelled=False))
    )
    assert (series.calls.in_progress, series.waits.in_progress) == (0, 0)


class _MuteError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def test_of_a_failure_the_words_are_kept_as_far_as_they_can_be_read() -> None:
    """And no more of them than a line or two."""
    long = only(counted(ended(CallFinished, 1.0, OSError("x" * 10_000)))).last_failure
    assert long == FailureRecord("OSError", "x" * 200 + "...", 7.0)
    mute = only(counted(ended(CallFinished, 1.0, _MuteError()))).last_failure
    assert mute == FailureRecord("_MuteError", "(its text can't be read)", 7.0)


# --- real policies ------------------------------------------------------------------------------


async def test_a_retry_that_recovers(autojump_clock: MockClock) -> None:
    """What the policies report is what is counted."""
    metrics, errors = Metrics(), [OSError("first"), OSError("second")]

    async def load() -> str:
        await trio.sleep(1)
        if errors:
            raise errors.pop(0)
        return "loaded"

    policy = Retry(name="retry")
    with subscribe(metrics):
        assert await run_with_limit(None, [load], policy=policy) == ["loaded"]
    snapshot = metrics.snapshot()
    assert snapshot.time == trio.current_time()
    retry = snapshot.by_policy()["retry"]
    assert (retry.attempts.started, retry.attempts.failed, retry.attempts.succeeded) == (3, 2, 1)
    assert (retry.attempts.retries, retry.attempts.given_up) == (2, 0)
    assert retry.last_failure is not None
    assert retry.last_failure.message == "second"
    operations = snapshot.by_policy()["run_with_limit"].operations
    assert (operations.started, operations.succeeded.count, operations.failed.count) == (1, 1, 0)
    assert operations.succeeded.total > 3


async def test_a_breaker_that_opens(autojump_clock: MockClock) -> None:
    """Why it refuses, and how often it did, is in the snapshot."""
    metrics, breaker = Metrics(), CircuitBreaker("db", failure_threshold=2)
    with subscribe(metrics):
        for _ in range(5):
            with pytest.raises(Exception, match=r"down|db"):
                await breaker.call(fails, OSError("down"), name="load")
    snapshot = metrics.snapshot()
    (circuit,) = snapshot.circuits
    assert (circuit.policy, circuit.state) == ("db", CircuitState.OPEN)
    assert circuit.reason == breaker.statistics().reason
    assert snapshot.by_policy()["db"].rejections == 3


# --- bounds -------------------------------------------------------------------------------------


def test_when_there_is_no_room_operations_are_merged_by_policy() -> None:
    """And the snapshot says how many: the operations about, and their events exactly."""
    events = [made(TimedOut, "db", f"load {n}", timeout=1.0) for n in range(50)]
    events += [made(TimedOut, "web", "get", timeout=1.0)]
    snapshot = counted(*events * 2, max_series=3)
    names = [(series.policy, series.operation, series.timeouts) for series in snapshot.series]
    apart = [("db", f"load {n}", 2) for n in range(3)]
    assert names == [*apart, ("db", "(others)", 94), ("web", "(others)", 2)]
    assert snapshot.merged_operations == pytest.approx(48, abs=1)
    assert snapshot.merged_events == 96


def test_when_there_is_no_room_policies_are_merged_too() -> None:
    events = [made(TimedOut, f"host {n}", "get", timeout=1.0) for n in range(9)]
    snapshot = counted(*events, changed(CircuitState.OPEN, 1.0), max_policies=2)
    names = [(series.policy, series.operation, series.timeouts) for series in snapshot.series]
    assert names == [("host 0", "get", 1), ("host 1", "get", 1), ("(others)", "(others)", 7)]
    assert snapshot.merged_events == 8
    assert snapshot.circuits == ()


@pytest.mark.parametrize("name", ["max_series", "max_policies"])
@pytest.mark.parametrize("value, error", [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bounds_are_checked(name: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"`{name}` must be"):
        Metrics(**{name: value})


def test_it_shows_how_much_it_counts() -> None:
    metrics = Metrics()
    metrics(made(TimedOut, timeout=1.0))
    assert repr(metrics).startswith("<Metrics: 1 operations under 1 policies at 0x")


# --- policies that are watched ------------------------------------------------------------------


def test_a_watched_policy_has_its_statistics_in_the_snapshot() -> None:
    """As JSON can hold them: a state as its name."""
    metrics = Metrics()
    breaker = metrics.watch(CircuitBreaker("db"))
    bulkhead = metrics.watch(Bulkhead(3, name="slots"))
    first, second = metrics.snapshot().policies
    assert (first.kind, first.policy, first.statistics["state"]) == (
        "CircuitBreaker",
        "db",
        "closed",
    )
    assert (second.kind, second.policy) == ("Bulkhead", "slots")
    assert second.statistics["available"] == bulkhead.statistics().available == 3
    assert breaker.statistics().state is CircuitState.CLOSED


def test_of_a_pipeline_the_layers_are_watched() -> None:
    """Also of one that a registry has made."""
    metrics, pipeline = Metrics(), Pipeline.standard(name="web")
    metrics.watch(pipeline)
    kinds = ["Timeout", "Retry", "CircuitBreaker", "Bulkhead", "Timeout"]
    assert [each.kind for each in metrics.snapshot().policies] == kinds
    registry = Registry.load({"policies": {"payments": {}}})
    metrics.watch(registry["payments"])
    assert [each.kind for each in metrics.snapshot().policies] == kinds * 2


def test_what_is_watched_is_not_kept_alive() -> None:
    metrics = Metrics()
    metrics.watch(Bulkhead(1))
    kept = metrics.watch(Bulkhead(2, name="kept"))
    metrics.watch(Bulkhead(3))
    assert [each.policy for each in metrics.snapshot().policies] == [kept.name]


def test_no_more_are_watched_than_there_is_room_for() -> None:
    """The last ones, each once."""
    metrics = Metrics(max_policies=2)
    policies = [Bulkhead(1, name=f"{n}") for n in range(4)]
    for policy in [*policies, policies[3]]:
        metrics.watch(policy)
    assert [each.policy for each in metrics.snapshot().policies] == ["2", "3"]


class _Odd(Policy[Any]):
    """A policy of somebody else's, whose statistics are no record, or can't be had."""

    def __init__(self, found: object) -> None:
        self.found = found

    async def call(self, fn: Any, *args: Any, name: str | None = None) -> Any:  # type: ignore[override]
        return await fn(*args, name)

    def statistics(self) -> object:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    "found, shown",
    [
        ([1, {"a": math.nan}, range(3)], {"statistics": [1, {"a": None}, "range(0, 3)"]}),
        (OSError("lost"), {"error": "OSError('lost')"}),
    ],
)
def test_a_foreign_policy_may_have_any_statistics(found: object, shown: object) -> None:
    metrics, policy = Metrics(), _Odd(found)
    metrics.watch(policy)
    (snapshot,) = metrics.snapshot().policies
    assert (snapshot.policy, snapshot.statistics) == ("_Odd", shown)


def test_only_a_policy_can_be_watched() -> None:
    with pytest.raises(TypeError, match="`policy` must be a Policy, got 3"):
        Metrics().watch(3)  # type: ignore[type-var]  # pyright: ignore[reportArgumentType]


# --- snapshots ----------------------------------------------------------------------------------

seconds = st.floats(0, 1e6)
errors = st.none() | st.builds(OSError, st.text(max_size=3)) | st.just(BulkheadFullError("b", 1, 2))
names = st.sampled_from(["a", "b"])
histories = st.lists(
    st.builds(made, st.just(CallStarted), names, names)
    | st.builds(
        made,
        st.sampled_from([CallFinished]),
        names,
        names,
        time=st.integers(0, 9).map(float),
        duration=seconds,
        error=errors,
        cancelled=st.booleans(),
    )
    | st.builds(made, st.just(WaitStarted), names, names)
    | st.builds(made, st.just(TimedOut), names, names, timeout=seconds),
    max_size=12,
)


def comparable(snapshot: MetricsSnapshot) -> dict[tuple[str, str], Any]:
    """Its counts; sums of floats depend on their order."""
    document: dict[tuple[str, str], Any] = {
        (series["policy"], series["operation"]): series for series in snapshot.as_dict()["series"]
    }
    for series in document.values():
        del series["last_failure"]
        for latency in filter(None, list(series["calls"].values())[1:]):
            latency["total"] = pytest.approx(latency["total"])
    return document


@hypothesis.given(histories, histories)
def test_the_snapshots_of_two_processes_add_up(ours: list[Event], theirs: list[Event]) -> None:
    """To what one would have counted that had seen both."""
    both = MetricsSnapshot.merged([counted(*ours), counted(*theirs)])
    assert comparable(both) == comparable(counted(*ours, *theirs))


@hypothesis.given(histories)
def test_a_snapshot_goes_to_json_and_comes_back(history: list[Event]) -> None:
    """As JSON has it: no NaN, and no infinity."""
    snapshot = counted(*history, changed(CircuitState.OPEN, 1.0))
    text = json.dumps(snapshot.as_dict(), allow_nan=False)
    assert MetricsSnapshot.from_dict(json.loads(text)) == snapshot
    assert pickle.loads(pickle.dumps(snapshot)) == snapshot  # noqa: S301 - its own


def test_the_states_of_several_processes_stay_apart() -> None:
    """Two breakers of one name may be open and closed. The last failure is the latest."""
    late = ended(CallFinished, 1.0, OSError("late"), time=9.0)
    early = ended(CallFinished, 1.0, OSError("early"), time=3.0)
    snapshots = [
        counted(late, changed(CircuitState.OPEN, 1.0), max_series=1),
        counted(
            early,
            changed(CircuitState.CLOSED, 2.0),
            made(TimedOut, "x", "y", timeout=1.0),
            max_series=1,
        ),
    ]
    both = MetricsSnapshot.merged(snapshots)
    states = [circuit.state for circuit in both.circuits]
    assert states == [CircuitState.OPEN, CircuitState.CLOSED]
    failure = both.by_policy()["db"].last_failure
    assert failure is not None
    assert failure.message == "late"
    assert (both.time, both.merged_events, both.merged_operations) == (None, 1, 1)


def test_the_latencies_have_their_quantiles_in_json() -> None:
    document = counted(ended(CallFinished, 0.5)).as_dict()
    calls = document["series"][0]["calls"]
    assert (calls["succeeded"]["p50"], calls["succeeded"]["p99"]) == (0.5, 0.5)
    assert calls["failed"] is None


GOOD = counted(ended(CallFinished, 0.5), changed(CircuitState.OPEN, 1.0)).as_dict()


def _spoilt(**fields: Any) -> Any:
    return {**json.loads(json.dumps(GOOD)), **fields}


@pytest.mark.parametrize(
    "document",
    [
        3,
        [],
        {},
        _spoilt(merged_events="many"),
        _spoilt(merged_events=True),
        _spoilt(time="noon"),
        _spoilt(series={}),
        _spoilt(series=[3]),
        _spoilt(circuits=[{**GOOD["circuits"][0], "state": "ajar"}]),
        _spoilt(circuits=[{**GOOD["circuits"][0], "transitions": []}]),
        _spoilt(
            series=[
                {
                    **GOOD["series"][0],
                    "calls": {**GOOD["series"][0]["calls"], "failed": {"count": 1}},
                }
            ]
        ),
    ],
)
def test_what_is_no_snapshot_is_refused(document: Any) -> None:
    assert MetricsSnapshot.from_dict(_spoilt()).as_dict() == GOOD
    with pytest.raises(ValueError, match="it is no snapshot of metrics: "):
        MetricsSnapshot.from_dict(document)


def test_buckets_that_do_not_add_up_are_refused() -> None:
    document = _spoilt()
    document["series"][0]["calls"]["succeeded"]["count"] = 7
    with pytest.raises(ValueError, match="do not add up to 7"):
        MetricsSnapshot.from_dict(document)


def test_a_later_version_may_say_more() -> None:
    """What is not known is left out; and other writers of JSON have no point in whole numbers."""
    assert MetricsSnapshot.from_dict(_spoilt(weather="fine")).as_dict() == GOOD
    assert MetricsSnapshot.from_dict(_spoilt(time=3)).time == 3.0
