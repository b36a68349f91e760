"""Count what happened in a run of the demo, and show two runs side by side."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, Final, Self, final

import attrs
from rich.table import Table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from types import TracebackType

    from trio_resilience import CircuitState

SHARES: Final = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


@final
@attrs.define(eq=False)
class Gauge:
    """How many blocks are running right now, and the most that ever were."""

    current: int = attrs.field(default=0, init=False)
    peak: int = attrs.field(default=0, init=False)

    def __enter__(self) -> Self:
        self.current += 1
        self.peak = max(self.peak, self.current)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.current -= 1


@final
@attrs.frozen
class CircuitChange:
    """The circuit breaker's state from a moment on."""

    seconds: float
    """Since the run began."""
    state: CircuitState


@final
@attrs.frozen(kw_only=True)
class RunReport:
    """What one run came to."""

    requests: int
    failed: Mapping[str, str]
    """Why each path failed that did."""
    attempts: int
    retries: Counter[str]
    """How many attempts were followed by another, by what was wrong with them."""
    refused: int
    """How often a policy let no attempt be made, and the page had to come back later."""
    hedges: int
    """How many attempts were made beside another of the same page."""
    circuit: Sequence[CircuitChange]
    latencies: Sequence[float]
    """Seconds that each success took, its retries included."""
    seconds: float
    client_peak: int
    server_peak: int

    @property
    def succeeded(self) -> int:
        """How many requests got their page."""
        return self.requests - len(self.failed)

    @property
    def failures(self) -> Counter[str]:
        """How many requests failed, by why."""
        return Counter(self.failed.values())

    @property
    def throughput(self) -> float:
        """Successes per second."""
        return self.succeeded / self.seconds

    def latency(self, share: float) -> float | None:
        """Return the seconds within which this share of the successes was done, if any was."""
        return percentile(self.latencies, share)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as what JSON can hold; times in seconds."""
        return {
            "requests": self.requests,
            "succeeded": self.succeeded,
            "failed": len(self.failed),
            "failures": dict(sorted(self.failures.items())),
            "attempts": self.attempts,
            "retries": dict(sorted(self.retries.items())),
            "refused": self.refused,
            "hedges": self.hedges,
            "circuit": [attrs.asdict(change) for change in self.circuit],
            "latency": {name: self.latency(share) for name, share in SHARES.items()},
            "throughput": self.throughput,
            "seconds": self.seconds,
            "client_peak": self.client_peak,
            "server_peak": self.server_peak,
        }


def percentile(values: Iterable[float], share: float) -> float | None:
    """Return the smallest of the values that at least *share* of them do not exceed."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1] if ordered else None


def problems(report: RunReport, scripted: Iterable[str], max_concurrency: int) -> list[str]:
    """Return what is wrong with a run in which exactly the *scripted* paths may fail."""
    failed, expected = set(report.failed), set(scripted)
    found = [f"{path} failed: {report.failed[path]}" for path in sorted(failed - expected)]
    found += [f"{path} succeeded, against the script" for path in sorted(expected - failed)]
    return found + overloads(report, max_concurrency)


def overloads(report: RunReport, max_concurrency: int) -> list[str]:
    """Return who saw more than *max_concurrency* requests at once."""
    peaks = {"client": report.client_peak, "server": report.server_peak}
    return [
        f"the {side} saw {peak} requests at once, and {max_concurrency} were allowed"
        for side, peak in peaks.items()
        if peak > max_concurrency
    ]


def headline(name: str, report: RunReport) -> str:
    """Return one line that says how a run went."""
    return f"{name}: {report.succeeded} of {report.requests} succeeded"


def comparison(resilient: RunReport, plain: RunReport) -> Table:
    """Return a table of a run with this library beside one without it."""
    failures = sorted(resilient.failures | plain.failures)
    retries = sorted(resilient.retries | plain.retries)
    table = Table("", title="The same faults, with and without trio_resilience")
    table.add_column("with", justify="right", style="green")
    table.add_column("without", justify="right")
    left, right = (_figures(report, failures, retries) for report in (resilient, plain))
    for name, figure in left.items():
        table.add_row(name, figure, right[name])
    return table


def _figures(report: RunReport, failures: list[str], retries: list[str]) -> dict[str, str]:
    return {
        "operations done": str(report.succeeded),
        "operations failed": str(len(report.failed)),
        **{f"  failed: {cause}": str(report.failures[cause]) for cause in failures},
        "attempts": str(report.attempts),
        "retries": str(report.retries.total()),
        **{f"  retried: {cause}": str(report.retries[cause]) for cause in retries},
        "hedges": str(report.hedges),
        "refused, to come back later": str(report.refused),
        **{
            f"latency {name}": _milliseconds(report.latency(share))
            for name, share in SHARES.items()
        },
        "throughput": f"{report.throughput:.1f}/s",
        "largest concurrency, seen by the server": str(report.server_peak),
        "largest concurrency, seen by the client": str(report.client_peak),
        "time": f"{report.seconds:.1f} s",
    }


def _milliseconds(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds * 1000:.0f} ms"
