"""Show how two runs came through the same outage of their server, one with a circuit breaker."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, final

import attrs
from rich.table import Table

from trio_resilience import CircuitState
from trio_resilience._cli._report import headline, overloads, problems

if TYPE_CHECKING:
    from trio_resilience._cli._report import RunReport


@final
@attrs.frozen(kw_only=True)
class OutageReport:
    """What a run came to whose server was down for a while."""

    run: RunReport
    received: int
    """Requests that the server received while it was down."""
    began: float
    """When it went down, in seconds since the run began."""
    seconds: float
    """How long it was down."""

    @property
    def opened_after(self) -> float | None:
        """Seconds from the beginning of the outage until the circuit opened, if it did."""
        opened = self._changes_to(CircuitState.OPEN)
        return opened[0] - self.began if opened else None

    @property
    def failed_probes(self) -> int:
        """How many probes found that the server was still down."""
        return sum(
            (before.state, after.state) == (CircuitState.HALF_OPEN, CircuitState.OPEN)
            for before, after in pairwise(self.run.circuit)
        )

    @property
    def closed_after(self) -> float | None:
        """Seconds from the end of the outage until the circuit closed again, if it did."""
        closed = self._changes_to(CircuitState.CLOSED)
        return closed[-1] - self.began - self.seconds if closed else None

    def _changes_to(self, state: CircuitState) -> list[float]:
        return [change.seconds for change in self.run.circuit if change.state is state]

    def as_dict(self) -> dict[str, Any]:
        """Return the report as what JSON can hold; times in seconds."""
        return {
            "requests_during_outage": self.received,
            "outage_began": self.began,
            "circuit_opened_after": self.opened_after,
            "failed_probes": self.failed_probes,
            "circuit_closed_after": self.closed_after,
            **self.run.as_dict(),
        }


@final
@attrs.frozen
class OutageComparison:
    """The same outage, with a circuit breaker and without one."""

    guarded: OutageReport
    unguarded: OutageReport

    def problems(self, max_concurrency: int) -> list[str]:
        """Return what is wrong: with the breaker, every page comes."""
        found = problems(self.guarded.run, (), max_concurrency)
        found += overloads(self.unguarded.run, max_concurrency)
        return [f"in the outage, {problem}" for problem in found]

    def as_dict(self) -> dict[str, Any]:
        """Return both as what JSON can hold."""
        return {
            "seconds": self.guarded.seconds,
            "with": self.guarded.as_dict(),
            "without": self.unguarded.as_dict(),
        }

    @property
    def table(self) -> Table:
        """A table of both, side by side."""
        duration = f"{self.guarded.seconds:g} s"
        title = f"An outage of {duration}: retries, with and without a circuit breaker"
        table = Table("", title=title)
        table.add_column("with a breaker", justify="right", style="green")
        table.add_column("without one", justify="right")
        unguarded = _figures(self.unguarded)
        for name, figure in _figures(self.guarded).items():
            table.add_row(name, figure, unguarded[name])
        return table

    @property
    def headlines(self) -> list[str]:
        """Two lines that say how it went."""
        return [
            _headline("with a breaker", self.guarded),
            _headline("without one", self.unguarded),
        ]


def _headline(name: str, report: OutageReport) -> str:
    run = headline(f"outage, {name}", report.run)
    return f"{run}, {report.received} requests came in vain"


def _figures(report: OutageReport) -> dict[str, str]:
    return {
        "requests received during the outage": str(report.received),
        "operations done": str(report.run.succeeded),
        "operations failed": str(len(report.run.failed)),
        "attempts": str(report.run.attempts),
        "refused, to come back later": str(report.run.refused),
        "circuit opened, after the server went down": _seconds(report.opened_after),
        "probes that found it still down": str(report.failed_probes),
        "circuit closed, after the server was back": _seconds(report.closed_after),
        "time": f"{report.run.seconds:.1f} s",
    }


def _seconds(value: float | None) -> str:
    return "never" if value is None else f"{value:.2f} s"
