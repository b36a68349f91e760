"""The demo succeeds where it should, and says so where it does not."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from trio_resilience._cli import _demo, _pages, main
from trio_resilience._cli._faults import (
    MAX_ATTEMPTS,
    PROFILES,
    Answer,
    FaultPlan,
    ProfileName,
    Treatment,
)
from trio_resilience._cli._server import FaultServer

if TYPE_CHECKING:
    import trio


NO_OUTAGE = ("--outage", "0")


def demo_json(
    capfd: pytest.CaptureFixture[str], *options: str, outage: float = 0.0
) -> tuple[int, dict[str, Any]]:
    status = main(["demo", "--json", "--outage", str(outage), *options])
    out, err = capfd.readouterr()
    document = json.loads(out)
    assert err == "".join(f"trio_resilience: {problem}\n" for problem in document["problems"])
    return status, document


@pytest.mark.parametrize("profile", list(PROFILES))
def test_every_operation_is_accounted_for(
    capfd: pytest.CaptureFixture[str], profile: ProfileName
) -> None:
    status, document = demo_json(capfd, "--faults", profile, "--requests", "25", "--seed", "2")
    assert status == 0
    assert document["ok"]
    assert document["faults"] == profile
    for name in ("with", "without"):
        run = document[name]
        assert run["requests"] == run["succeeded"] + run["failed"] == 25
        assert run["failed"] == sum(run["failures"].values())
        assert run["attempts"] == 25 + sum(run["retries"].values())
        assert max(run["client_peak"], run["server_peak"]) <= 10
        assert run["latency"]["p50"] <= run["latency"]["p95"] <= run["latency"]["p99"]
    assert document["with"]["failed"] == len(document["scripted_failures"])
    assert document["outage"] is None


def test_without_retries_what_the_script_makes_fail_at_first_fails(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The faults that the server was told to have are exactly those that the client meets."""
    _, document = demo_json(capfd, "--faults", "harsh", "--requests", "40", "--seed", "4")
    plan = FaultPlan("harsh", 4)
    first = [plan.answer(f"/page/{number}", 1).treatment for number in range(1, 41)]
    assert document["without"]["succeeded"] == first.count(Treatment.PAGE)
    assert document["without"]["failures"]["connection dropped"] == first.count(Treatment.DROP)
    assert document["without"]["failures"]["timed out"] == first.count(Treatment.HANG)
    assert document["with"]["succeeded"] > document["without"]["succeeded"]


def test_with_retries_every_fault_of_the_script_is_met_once(
    capfd: pytest.CaptureFixture[str],
) -> None:
    _, document = demo_json(capfd, "--requests", "40", "--seed", "4")
    plan = FaultPlan("mild", 4)
    drops = 0
    for number in range(1, 41):
        drops += [plan.answer(f"/page/{number}", n).treatment for n in (1, 2, 3, 4)].index(
            Treatment.PAGE
        )
    assert sum(document["with"]["retries"].values()) == drops


def test_the_concurrency_is_used_and_not_exceeded(capfd: pytest.CaptureFixture[str]) -> None:
    _, document = demo_json(capfd, "--faults", "none", "--requests", "40", "--max-concurrency", "3")
    for name in ("with", "without"):
        assert document[name]["client_peak"] == document[name]["server_peak"] == 3


def test_an_outage_costs_the_server_few_requests_and_the_client_no_page(
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = ("--faults", "none", "--requests", "60")
    status, document = demo_json(capfd, *options, outage=1.2)
    assert status == 0
    outage = document["outage"]
    guarded, unguarded = outage["with"], outage["without"]
    assert outage["seconds"] == 1.2
    assert guarded["succeeded"] == 60
    assert guarded["requests_during_outage"] < unguarded["requests_during_outage"]
    assert 0 <= guarded["circuit_opened_after"] < 1.2
    assert guarded["circuit_closed_after"] >= 0
    assert guarded["refused"] > 0
    assert guarded["seconds"] > 1.2
    assert (unguarded["refused"], unguarded["circuit"]) == (0, [])
    for run in (guarded, unguarded):
        assert run["attempts"] == 60 + sum(run["retries"].values())
        assert max(run["client_peak"], run["server_peak"]) <= 10


def test_an_outage_opens_the_circuit_before_it_costs_a_page_its_last_attempt() -> None:
    """And no page that waits to try again is away for so long that it becomes the probe."""
    breaker = _pages.make_breaker()
    assert breaker.failure_threshold is not None
    assert breaker.failure_threshold < MAX_ATTEMPTS
    assert _pages.BACKOFF.max_delay < _pages.RECOVERY_TIMEOUT


def test_in_an_outage_one_page_at_a_time_comes_through_as_well(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A page whose failures open the circuit is refused next, and keeps its last attempt."""
    options = ("--faults", "none", "--requests", "2", "--max-concurrency", "1")
    status, document = demo_json(capfd, *options, outage=1.5)
    assert status == 0
    outage = document["outage"]["with"]
    assert outage["succeeded"] == 2
    assert outage["circuit"][-1]["state"] == "closed"


def test_the_outage_has_its_own_table(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--requests", "10", "--faults", "none", "--outage", "0.1"]) == 0
    out = capfd.readouterr().out
    assert out.index("same faults") < out.index("requests received during the outage")
    lines = out.splitlines()[-4:]
    assert lines[0].startswith("outage, with a breaker: 10 of 10 succeeded, ")
    assert lines[1].startswith("outage, without one: 10 of 10 succeeded, ")
    assert lines[2:] == ["with: 10 of 10 succeeded", "without: 10 of 10 succeeded"]


def test_a_page_that_an_outage_costs_fails_the_demo(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the breaker, that is; without it, it's what the demo shows."""
    monkeypatch.setattr(_pages, "PATIENCE", 0.0)
    status, document = demo_json(capfd, "--faults", "none", "--requests", "1", outage=0.5)
    assert status == 1
    (problem,) = document["problems"]
    assert problem.startswith("in the outage, /page/1 failed: ")


def test_the_default_is_a_table_with_both_results(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--requests", "10", "--faults", "none", *NO_OUTAGE]) == 0
    out, err = capfd.readouterr()
    assert "largest concurrency, seen by the server" in out
    assert out.endswith("with: 10 of 10 succeeded\nwithout: 10 of 10 succeeded\n")
    assert err == ""


def test_a_page_that_nobody_can_fetch_is_mentioned(capfd: pytest.CaptureFixture[str]) -> None:
    plans = (FaultPlan("harsh", seed) for seed in range(999))
    seed = next(plan.seed for plan in plans if plan.permanent_failure("/page/1") is Treatment.GONE)
    assert main(["--requests", "1", "--faults", "harsh", "--seed", str(seed), *NO_OUTAGE]) == 0
    out = capfd.readouterr().out
    assert "with: 0 of 1 succeeded (1 fail by script, whatever is done)\n" in out


def test_a_page_that_fails_against_the_script_fails_the_demo(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(plan: FaultPlan, path: str, attempt: int) -> Answer:
        return Answer(Treatment.GONE if path == "/page/2" else Treatment.PAGE, 0.0)

    monkeypatch.setattr(FaultPlan, "answer", answer)
    status, document = demo_json(capfd, "--requests", "3")
    assert status == 1
    assert not document["ok"]
    assert document["problems"] == ["/page/2 failed: 404"]


def test_a_server_that_sees_too_many_fails_the_demo(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest concurrency is the server's own count, not the client's."""
    begun = FaultServer.begun

    def begun_twice(server: FaultServer, stream: trio.SocketStream) -> None:
        begun(server, stream)
        server.peak = 11

    monkeypatch.setattr(FaultServer, "begun", begun_twice)
    status, document = demo_json(capfd, "--requests", "3", "--faults", "none")
    assert status == 1
    assert document["problems"] == ["the server saw 11 requests at once, and 10 were allowed"] * 2


def test_only_a_few_problems_are_printed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> Answer:
        return Answer(Treatment.GONE, 0.0)

    monkeypatch.setattr(FaultPlan, "answer", gone)
    assert main(["--requests", "9", *NO_OUTAGE]) == 1
    assert len(capfd.readouterr().err.splitlines()) == _demo.PROBLEMS_SHOWN


def test_a_reader_that_has_left_ends_the_demo_quietly(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main(["--requests", "1", "--faults", "none", *NO_OUTAGE]) == 141
    assert capfd.readouterr().err == ""


def test_ctrl_c_ends_the_demo_quietly(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> Answer:
        os.kill(os.getpid(), signal.SIGINT)
        return Answer(Treatment.HANG, 0.0)

    monkeypatch.setattr(FaultPlan, "answer", interrupt)
    assert main(["--requests", "1"]) == 130
    out, err = capfd.readouterr()
    assert (out, err) == ("", "trio_resilience: interrupted\n")
