"""The demo succeeds where it should, and says so where it does not."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import pytest

from trio_resilience._cli import _demo, main
from trio_resilience._cli._faults import PROFILES, Answer, FaultPlan, ProfileName, Treatment
from trio_resilience._cli._server import FaultServer

if TYPE_CHECKING:
    import trio


def demo_json(capfd: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict[str, Any]]:
    status = main(["demo", "--json", *options])
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


def test_the_default_is_a_table_with_both_results(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--requests", "10", "--faults", "none"]) == 0
    out, err = capfd.readouterr()
    assert "largest concurrency, seen by the server" in out
    assert out.endswith("with: 10 of 10 succeeded\nwithout: 10 of 10 succeeded\n")
    assert err == ""


def test_a_page_that_nobody_can_fetch_is_mentioned(capfd: pytest.CaptureFixture[str]) -> None:
    plans = (FaultPlan("harsh", seed) for seed in range(999))
    seed = next(plan.seed for plan in plans if plan.permanent_failure("/page/1") is Treatment.GONE)
    assert main(["--requests", "1", "--faults", "harsh", "--seed", str(seed)]) == 0
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
    assert main(["--requests", "9"]) == 1
    assert len(capfd.readouterr().err.splitlines()) == _demo.PROBLEMS_SHOWN


def test_a_reader_that_has_left_ends_the_demo_quietly(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main(["--requests", "1", "--faults", "none"]) == 141
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
