"""What `Metrics` has counted, as frozen records that add up and that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, Final, Self, TypeVar, cast, final, get_args, get_origin, get_type_hints

import attrs

from trio_resilience._algorithms._buckets import LONGEST, SHORTEST
from trio_resilience._algorithms._sketch import BUCKETS, LatencySnapshot
from trio_resilience._errors import FailureRecord
from trio_resilience._events import CircuitState
from trio_resilience._records import Record, keyword_record

R = TypeVar("R", bound=Record)

_LARGEST: Final = 2**63 - 1
"""Of what is counted; nobody lives to see more."""
_BUCKETS: Final = range(BUCKETS.bucket_of(SHORTEST), BUCKETS.bucket_of(LONGEST) + 1)
QUANTILES: Final = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


@final
@keyword_record
class OutcomesSnapshot(Record):
    """What became of calls, or of operations, and how long they took."""

    started: int = 0
    succeeded: LatencySnapshot = LatencySnapshot()
    failed: LatencySnapshot = LatencySnapshot()
    refused: LatencySnapshot = LatencySnapshot()
    """Those that ended with a `RejectedError`: of this policy, or of one further in."""
    cancelled: LatencySnapshot = LatencySnapshot()

    @property
    def finished(self) -> int:
        """How many have ended."""
        return self.succeeded.count + self.failed.count + self.refused.count + self.cancelled.count

    @property
    def in_progress(self) -> int:
        """How many have begun, and have not ended yet."""
        return max(0, self.started - self.finished)  # one may have begun unheard


@final
@keyword_record
class AttemptsSnapshot(Record):
    """What became of the attempts of a retry policy."""

    started: int = 0
    succeeded: int = 0
    failed: int = 0
    refused: int = 0
    cancelled: int = 0
    retries: int = 0
    """Attempts that were to be followed by another."""
    given_up: int = 0
    """Calls that no further attempt was made for."""


@final
@keyword_record
class WaitsSnapshot(Record):
    """How often calls have waited for their turn, and how long."""

    started: int = 0
    cancelled: int = 0
    seconds: LatencySnapshot = LatencySnapshot()
    """Of all that have ended, however."""

    @property
    def in_progress(self) -> int:
        """How many wait now."""
        return max(0, self.started - self.seconds.count)


@final
@keyword_record
class BatchesSnapshot(Record):
    """What became of batches."""

    items: int = 0
    """In all batches together."""
    failed: int = 0
    cancelled: int = 0
    seconds: LatencySnapshot = LatencySnapshot()
    """That they took to process, however it ended; its count is that of the batches."""


@final
@keyword_record
class SeriesSnapshot(Record):
    """What has happened to one operation under one policy."""

    policy: str
    operation: str
    """``"(others)"`` stands for all that there was no room for."""
    calls: OutcomesSnapshot = OutcomesSnapshot()
    """Of ``call``, and of functions that the policy decorates."""
    operations: OutcomesSnapshot = OutcomesSnapshot()
    """Of `run_with_limit` and its kin."""
    attempts: AttemptsSnapshot = AttemptsSnapshot()
    waits: WaitsSnapshot = WaitsSnapshot()
    batches: BatchesSnapshot = BatchesSnapshot()
    rejections: int = 0
    """Calls that this policy itself has refused."""
    rejections_skipped: int = 0
    """Calls that it would have refused, if it did more than watch."""
    timeouts: int = 0
    hedges: int = 0
    losers_failed: int = 0
    fallbacks: int = 0
    transitions: int = 0
    """Changes of the circuit's state that this operation brought about."""
    last_failure: FailureRecord | None = None
    """Of a call, an operation or an attempt, whatever became of it then."""

    def plus(self, other: SeriesSnapshot) -> SeriesSnapshot:
        """Return the sum of both, under the name of this one."""
        return _sum_of(self, other)


@final
@keyword_record
class CircuitSnapshot(Record):
    """The state of a circuit breaker, as it was last reported."""

    policy: str
    state: CircuitState
    since: float
    """When it came about, in seconds of the clock that the snapshot's `time` is of."""
    reason: str
    retry_after: float | None
    """Seconds, from then, until a probe is let through, if it has opened."""
    transitions: Mapping[str, int]
    """How often it has come to each state, by the state's name."""


@final
@keyword_record
class PolicySnapshot(Record):
    """The ``statistics()`` of a policy that `Metrics.watch` was given."""

    kind: str
    """Its class, such as ``"Bulkhead"``."""
    policy: str
    statistics: Mapping[str, Any]
    """What JSON can hold of them."""


@final
@keyword_record
class MetricsSnapshot(Record):
    """What has happened until now. `merged` adds up those of several processes."""

    time: float | None
    """Seconds of trio's clock, which begins elsewhere in each run; ``None`` outside a run."""
    series: tuple[SeriesSnapshot, ...]
    circuits: tuple[CircuitSnapshot, ...]
    """Of breakers that have changed their state."""
    policies: tuple[PolicySnapshot, ...]
    merged_operations: int
    """About how many operations (within a few per cent) had no room of their own, and were counted
    together as "(others)"."""
    merged_events: int
    """How many events that was, exactly."""

    def by_policy(self) -> dict[str, SeriesSnapshot]:
        """Return the sum of each policy's operations."""
        sums: dict[str, SeriesSnapshot] = {}
        for each in self.series:
            nothing = SeriesSnapshot(policy=each.policy, operation="(all)")
            sums[each.policy] = sums.get(each.policy, nothing).plus(each)
        return sums

    @classmethod
    def merged(cls, snapshots: Iterable[MetricsSnapshot]) -> Self:
        """Return the sum of snapshots of different processes, or of different `Metrics`.

        What was counted is added. The states of policies and circuits are not: each is there as it
        was. Nor are clocks, each process having its own: there is no time, and of the last
        failures, that with the latest time on its own clock is kept.
        """
        given = list(snapshots)
        series: dict[tuple[str, str], SeriesSnapshot] = {}
        for each in (each for snapshot in given for each in snapshot.series):
            key = each.policy, each.operation
            series[key] = series[key].plus(each) if key in series else each
        return cls(
            time=None,
            series=tuple(series.values()),
            circuits=tuple(each for snapshot in given for each in snapshot.circuits),
            policies=tuple(each for snapshot in given for each in snapshot.policies),
            merged_operations=sum(snapshot.merged_operations for snapshot in given),
            merged_events=sum(snapshot.merged_events for snapshot in given),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the snapshot as what JSON can hold: no NaN, and no infinity.

        The latencies have their quantiles with them.
        """
        return cast("dict[str, Any]", plain(self))

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Return the snapshot that `as_dict` has made *document* of; else raise a `ValueError`."""
        try:
            return cls(**_read_fields(cls, document))
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"it is no snapshot of metrics: {error!r}") from error


# --- to add -------------------------------------------------------------------------------------


def _sum_of(a: R, b: R) -> R:
    cls: Any = type(a)
    names = [field.name for field in attrs.fields(cls)]
    fields = {name: _plus(getattr(a, name), getattr(b, name)) for name in names}
    return cast("R", cls(**fields))


def _plus(a: Any, b: Any) -> Any:
    if isinstance(a, int):
        return a + b
    if isinstance(a, LatencySnapshot):
        return a.plus(b) if b.count else a
    if isinstance(a, FailureRecord) or a is None:
        return max((each for each in (a, b) if each), key=lambda each: each.time, default=None)
    return _sum_of(a, b) if isinstance(a, Record) else a  # a name


# --- to and from JSON ---------------------------------------------------------------------------


def plain(value: object) -> object:
    """Return *value* as what JSON can hold; a record as its fields, and ``None`` for infinity."""
    if isinstance(value, LatencySnapshot):
        return _plain_latency(value)
    cls: Any = type(value)
    if attrs.has(cls):
        return {field.name: plain(getattr(value, field.name)) for field in attrs.fields(cls)}
    if isinstance(value, Mapping):
        items = cast("Mapping[object, object]", value).items()
        return {str(key): plain(each) for key, each in items}
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in cast("Iterable[object]", value)]
    return _plain_scalar(value)


def _plain_scalar(value: object) -> object:
    if isinstance(value, Enum):
        return _plain_scalar(value.value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (int, str)) else repr(value)


def _plain_latency(latency: LatencySnapshot) -> dict[str, object] | None:
    """Return nothing for nothing, which most latencies are."""
    if not latency.count:
        return None
    quantiles = {name: plain(latency.quantile(share)) for name, share in QUANTILES.items()}
    return {
        "count": latency.count,
        "total": plain(latency.total),
        "shortest": plain(latency.shortest),
        "longest": plain(latency.longest),
        **quantiles,
        "buckets": [list(each) for each in latency.buckets],
    }


def _read(kind: Any, value: Any) -> Any:
    """Return what `plain` has made *value* of, which was a *kind*."""
    if kind is LatencySnapshot:
        return _read_latency(value)
    if attrs.has(kind):
        return kind(**_read_fields(kind, value))
    if get_origin(kind) is not None:
        return _read_generic(get_origin(kind), get_args(kind), value)
    if kind is CircuitState:
        return CircuitState(value)
    return _read_scalar(kind, value)


def _read_generic(origin: Any, kinds: tuple[Any, ...], value: Any) -> Any:
    if origin is UnionType:
        (kind,) = (each for each in kinds if each is not NoneType)
        return None if value is None else _read(kind, value)
    if origin is Mapping:
        return {str(key): _read(kinds[1], each) for key, each in value.items()}
    return _read_tuple(kinds, value)


def _read_tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
    if value.__class__ is not list:
        raise TypeError(f"{value!r} is no list")
    if kinds[-1] is ...:
        return tuple(_read(kinds[0], each) for each in value)
    return tuple(_read(kind, each) for kind, each in zip(kinds, value, strict=True))


def _read_latency(value: Any) -> LatencySnapshot:
    latency = (
        LatencySnapshot(**_read_fields(LatencySnapshot, value)) if value else LatencySnapshot()
    )
    _check_buckets(latency)
    return latency


def _check_buckets(latency: LatencySnapshot) -> None:
    """Refuse what `Sketch` does not make, so that quantiles and sums can be told."""
    numbers = [bucket for bucket, _ in latency.buckets]
    counts = [count for _, count in latency.buckets]
    if latency.count != sum(counts) or min(counts, default=1) < 1:
        raise ValueError(f"the buckets do not add up to {latency.count}")
    if numbers != sorted(set(numbers)) or not all(each in _BUCKETS for each in numbers):
        raise ValueError("there are no such buckets")
    if (latency.shortest is None or latency.longest is None) == bool(counts):
        raise ValueError("the shortest and the longest are missing")


def _read_fields(kind: Any, value: Any) -> dict[str, Any]:
    return {name: _read(of, value[name]) for name, of in _fields_of(kind)}


@cache
def _fields_of(kind: Any) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind)
    return [(field.name, hints[field.name]) for field in attrs.fields(kind)]


def _read_scalar(kind: Any, value: Any) -> Any:
    if kind is Any:
        return plain(value)
    if kind is float and type(value) is int and abs(value) <= _LARGEST:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{value!r} is not finite")
    if kind is int and abs(value) > _LARGEST:
        raise ValueError(f"{value!r} is too large")
    return value
