"""Two runs through one outage are compared: how many came in vain, and what the circuit did."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from trio_resilience._cli._outage import OutageComparison, OutageReport
from trio_resilience._cli._report import CircuitChange, RunReport
from trio_resilience._cli._terminal import render
from trio_resilience._events import CircuitState

CHANGES = [
    CircuitChange(2.5, CircuitState.OPEN),
    CircuitChange(3.0, CircuitState.HALF_OPEN),
    CircuitChange(3.1, CircuitState.OPEN),
    CircuitChange(3.6, CircuitState.HALF_OPEN),
    CircuitChange(3.7, CircuitState.OPEN),
    CircuitChange(5.5, CircuitState.HALF_OPEN),
    CircuitChange(5.75, CircuitState.CLOSED),
]


def outage_report(
    circuit: list[CircuitChange], received: int, *failed: str, peak: int = 2
) -> OutageReport:
    run = RunReport(
        requests=4,
        failed=dict.fromkeys(failed, "connection dropped"),
        attempts=4 + received,
        retries=Counter({"connection dropped": received}),
        refused=len(circuit),
        hedges=0,
        circuit=circuit,
        latencies=[0.1, 0.2],
        seconds=6.0,
        client_peak=2,
        server_peak=peak,
    )
    return OutageReport(run=run, received=received, began=2.0, seconds=3.0)


def test_what_the_circuit_did_is_told_relative_to_the_outage() -> None:
    report = outage_report(CHANGES, 7)
    assert report.opened_after == 0.5
    assert report.failed_probes == 2
    assert report.closed_after == 0.75


def test_without_a_circuit_there_is_nothing_to_tell() -> None:
    report = outage_report([], 40)
    assert (report.opened_after, report.failed_probes, report.closed_after) == (None, 0, None)


def test_both_as_json() -> None:
    both = OutageComparison(outage_report(CHANGES, 7), outage_report([], 40, "/a"))
    document = json.loads(json.dumps(both.as_dict()))
    assert document["seconds"] == 3.0
    guarded, unguarded = document["with"], document["without"]
    assert (guarded["requests_during_outage"], unguarded["requests_during_outage"]) == (7, 40)
    assert (guarded["succeeded"], unguarded["succeeded"]) == (4, 3)
    assert guarded["outage_began"] == 2.0
    assert guarded["circuit_opened_after"] == 0.5
    assert guarded["failed_probes"] == 2
    assert guarded["circuit_closed_after"] == 0.75
    assert guarded["circuit"][-1] == {"seconds": 5.75, "state": "closed"}
    assert unguarded["circuit"] == []
    assert unguarded["circuit_opened_after"] is None


def test_the_table_has_both_and_begins_with_the_requests() -> None:
    both = OutageComparison(outage_report(CHANGES, 7), outage_report([], 40, "/a"))
    lines = render(both.table).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [
        ["requests received during the outage", "7", "40"],
        ["operations done", "4", "3"],
        ["operations failed", "0", "1"],
        ["attempts", "11", "44"],
        ["refused, to come back later", "7", "0"],
        ["circuit opened, after the server went down", "0.50 s", "never"],
        ["probes that found it still down", "2", "0"],
        ["circuit closed, after the server was back", "0.75 s", "never"],
        ["time", "6.0 s", "6.0 s"],
    ]


def test_two_lines_say_it_in_short() -> None:
    both = OutageComparison(outage_report(CHANGES, 7), outage_report([], 40, "/a"))
    assert both.headlines == [
        "outage, with a breaker: 4 of 4 succeeded, 7 requests came in vain",
        "outage, without one: 3 of 4 succeeded, 40 requests came in vain",
    ]


def test_with_the_breaker_every_page_has_to_come() -> None:
    lost = OutageComparison(outage_report(CHANGES, 7, "/b"), outage_report([], 40))
    assert lost.problems(2) == ["in the outage, /b failed: connection dropped"]
    assert (
        OutageComparison(outage_report(CHANGES, 7), outage_report([], 40, "/b")).problems(2) == []
    )


@pytest.mark.parametrize("peaks", [(3, 2), (2, 3)])
def test_too_many_at_once_are_a_problem_on_either_side(peaks: tuple[int, int]) -> None:
    reports = [outage_report([], 7, peak=peak) for peak in peaks]
    assert OutageComparison(*reports).problems(2) == [
        "in the outage, the server saw 3 requests at once, and 2 were allowed"
    ]
