"""`python -m trio_resilience demo --config` fetches under the policies of a configuration."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from trio_resilience._cli import main
from trio_resilience._cli._check import SAMPLE
from trio_resilience._cli._faults import Answer, FaultPlan, Treatment

Capture = pytest.CaptureFixture[str]

STRAIGHT = """
[policies.demo]
layers = ["attempt_timeout"]
attempt_timeout = "1s"
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "it.toml"


def demo_json(capfd: Capture, *options: str) -> tuple[int, dict[str, Any]]:
    status = main(["demo", "--json", *options])
    return status, json.loads(capfd.readouterr().out)


def refusal(capfd: Capture, *options: str) -> str:
    """Run a demo that is refused before anything of it runs; return the one line of why."""
    assert main(["demo", *options]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    return line.removeprefix("trio_resilience: ")


# --- the sample -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("path")
def test_without_a_file_it_runs_under_the_sample(capfd: Capture) -> None:
    """From a directory with nothing in it; and it gets every page, whatever goes wrong."""
    assert list(Path().iterdir()) == []
    status, document = demo_json(capfd, "--requests", "25", "--outage", "0.8", "--config")
    assert status == 0
    assert document["policy"] == {
        "config": str(SAMPLE),
        "name": "demo",
        "layers": ["timeout", "retry", "breaker", "bulkhead", "attempt_timeout"],
    }
    run, outage = document["with"], document["outage"]
    assert run["succeeded"] == outage["with"]["succeeded"] == 25
    assert run["attempts"] == 25 + sum(run["retries"].values()) > 25
    assert outage["with"]["circuit"][-1]["state"] == "closed"
    assert outage["with"]["refused"] > 0
    assert (outage["without"]["refused"], outage["without"]["circuit"]) == (0, [])


@pytest.mark.usefixtures("path")
def test_an_option_may_follow_where_a_file_could_stand(capfd: Capture) -> None:
    assert main(["--config", "--requests", "2", "--faults", "none", "--outage", "0"]) == 0
    assert "with: 2 of 2 succeeded" in capfd.readouterr().out


@pytest.mark.usefixtures("path")
def test_in_an_outage_one_page_at_a_time_comes_through_the_sample_as_well(capfd: Capture) -> None:
    """A page's own failures open the circuit before they have used up its attempts."""
    options = ("--requests", "2", "--max-concurrency", "1", "--faults", "none", "--outage", "2.5")
    status, document = demo_json(capfd, "--config", *options)
    assert status == 0
    assert document["outage"]["with"]["succeeded"] == 2


# --- a file of the user's -------------------------------------------------------------------------


def test_one_attempt_is_one_attempt(capfd: Capture, path: Path) -> None:
    """Then what fails without any policy fails under this one."""
    path.write_text('[policies.demo]\nretry.max_attempts = 1\nattempt_timeout = "1s"')
    options = ("--requests", "30", "--outage", "0")
    status, document = demo_json(capfd, *options, "--config", str(path))
    run = document["with"]
    assert status == 1
    assert run["attempts"] == 30
    assert run["retries"] == {}
    assert run["failures"] == document["without"]["failures"] != {}
    assert len(document["problems"]) == run["failed"]


def test_a_bulkhead_that_waits_for_nobody_refuses_who_then_comes_back(
    capfd: Capture, path: Path
) -> None:
    path.write_text("[policies.demo]\nbulkhead = { max_concurrency = 2, queue_size = 0 }")
    options = ("--requests", "8", "--faults", "none", "--outage", "0")
    status, document = demo_json(capfd, *options, "--config", str(path))
    assert status == 0
    assert document["with"]["refused"] > 0
    assert document["with"]["server_peak"] <= document["with"]["client_peak"] == 2
    assert document["without"]["client_peak"] == 8


def test_a_rate_limit_takes_its_time(capfd: Capture, path: Path) -> None:
    path.write_text('[policies.demo]\nrate_limit = { rate = "10/s", burst = 1 }')
    options = ("--requests", "6", "--faults", "none", "--outage", "0")
    status, document = demo_json(capfd, *options, "--config", str(path))
    assert status == 0
    assert document["with"]["seconds"] >= 0.5 > document["without"]["seconds"]


def test_hedges_are_counted_and_may_exceed_the_concurrency(capfd: Capture, path: Path) -> None:
    """Each page may have two requests under way, if its policy says so."""
    path.write_text('[policies.demo]\nlayers = ["hedge"]\nhedge = { after = 0, max_hedges = 1 }')
    options = ("--requests", "9", "--max-concurrency", "3", "--faults", "none")
    status, document = demo_json(capfd, *options, "--config", str(path))
    run = document["with"]
    assert status == 0
    assert document["problems"] == []
    assert run["hedges"] == 9
    assert 3 < run["client_peak"] <= 6
    assert document["without"]["hedges"] == 0


def test_no_run_sees_the_circuits_of_another(capfd: Capture, path: Path) -> None:
    """What the faults have opened would else be open when the outage begins."""
    path.write_text(
        '[policies.demo]\nretry = false\nattempt_timeout = "1s"\n'
        'breaker = { failure_threshold = 1, recovery_timeout = "1h" }'
    )
    options = ("--requests", "20", "--max-concurrency", "1", "--outage", "0.1")
    status, document = demo_json(capfd, *options, "--config", str(path))
    assert status == 1
    assert document["with"]["failures"]["CircuitOpenError"] > 0
    outage = document["outage"]["with"]
    # Half of the pages come before the server goes down.
    assert outage["succeeded"] == 10
    assert outage["requests_during_outage"] == 1


def test_the_report_begins_with_what_ran(
    capfd: Capture, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On one line, however long the path is, and whatever the name looks like."""
    monkeypatch.setenv("COLUMNS", "30")
    path.write_text(STRAIGHT.replace("policies.demo", 'policies."a [b]"'))
    assert main(["demo", "--requests", "1", "--faults", "none", "--config", str(path)]) == 0
    out = capfd.readouterr().out
    assert out.splitlines()[0] == f"policy 'a [b]' of {path}: attempt_timeout"
    assert out.endswith("with: 1 of 1 succeeded\nwithout: 1 of 1 succeeded\n")


def test_without_a_configuration_no_policy_is_named(capfd: Capture) -> None:
    status, document = demo_json(capfd, "--requests", "1", "--faults", "none", "--outage", "0")
    assert status == 0
    assert document["policy"] is None


# --- which policy ---------------------------------------------------------------------------------

TWO = "policies.{first}.retry = false\npolicies.{second}.breaker = false"


@pytest.mark.parametrize(
    "text, options, chosen",
    [
        ("policies.pay.breaker = false", (), "pay"),
        (TWO.format(first="pay", second="demo"), (), "demo"),
        (TWO.format(first="demo", second="pay"), ("--policy", "pay"), "pay"),
    ],
    ids=["the only one", "the one called demo", "the one that is named"],
)
def test_the_policy_is_chosen(
    capfd: Capture, path: Path, text: str, options: tuple[str, ...], chosen: str
) -> None:
    path.write_text(text)
    few = ("--requests", "1", "--faults", "none", "--outage", "0")
    status, document = demo_json(capfd, *few, "--config", str(path), *options)
    assert status == 0
    assert document["policy"]["name"] == chosen


@pytest.mark.parametrize(
    "text, options, words",
    [
        (TWO, (), "choose one of its policies with --policy: {first}, {second}"),
        (TWO, ("--policy", "x"), "no policy has the name 'x'; there are {first}, {second}"),
        (TWO, ("--policy", ""), "no policy has the name ''; there are {first}, {second}"),
        ("", (), "has no policies"),
        ("", ("--policy", "x"), "has no policies"),
    ],
)
def test_a_name_that_is_missing_is_asked_for(
    capfd: Capture, path: Path, text: str, options: tuple[str, ...], words: str
) -> None:
    names = {"first": "pay", "second": '"a b"'}
    path.write_text(text.format(**names))
    line = refusal(capfd, "--config", str(path), *options)
    assert line == f"{path}: {words.format(first='pay', second=repr('a b'))}"


def test_ctrl_c_ends_it_quietly(
    capfd: Capture, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry is closed on the way out."""

    def interrupt(*_: object) -> Answer:
        os.kill(os.getpid(), signal.SIGINT)
        return Answer(Treatment.HANG, 0.0)

    monkeypatch.setattr(FaultPlan, "answer", interrupt)
    path.write_text("policies.demo.breaker = false")
    assert main(["demo", "--requests", "1", "--config", str(path)]) == 130
    assert capfd.readouterr() == ("", "trio_resilience: interrupted\n")


# --- what is refused ------------------------------------------------------------------------------


def test_every_mistake_is_a_line_as_check_has_it(capfd: Capture, path: Path) -> None:
    path.write_text("[policies.demo]\nretry.max_attempts = 0\ntimeut = 3\nbulkhead = 'x'")
    assert main(["demo", "--config", str(path)]) == 2
    told = capfd.readouterr()
    assert main(["check", str(path)]) == 2
    assert told == capfd.readouterr()
    assert told.out == ""
    paths = [line.split(": ")[1] for line in told.err.splitlines()]
    assert paths == [f"policies.demo.{key}" for key in ("retry.max_attempts", "timeut", "bulkhead")]


@pytest.mark.parametrize(
    "name, words",
    [
        ("none.toml", "can't be read: No such file or directory"),
        ("directory", "can't be read: it is no regular file"),
        ("pipe", "can't be read: it is no regular file"),
        ("loop", "can't be read: Too many levels of symbolic links"),
        ("bytes.toml", "line 1 is no UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(
    capfd: Capture, path: Path, name: str, words: str
) -> None:
    file = path.with_name(name)
    path.with_name("directory").mkdir()
    os.mkfifo(path.with_name("pipe"))
    path.with_name("loop").symlink_to("loop")
    path.with_name("bytes.toml").write_bytes(b"\xff")
    line = refusal(capfd, "--config", str(file))
    assert line.startswith(f"{file}: {words}")


@pytest.mark.parametrize(
    "options, words",
    [
        (("--policy", "demo"), "--policy needs a --config"),
        (("--config", "a.toml", "--config", "b.toml"), "--config is given more than once"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    capfd: Capture, options: tuple[str, ...], words: str
) -> None:
    assert refusal(capfd, *options) == words


def test_two_files_at_once_are_refused(capfd: Capture) -> None:
    assert "--config accepts at most 1" in refusal(capfd, "--config", "a.toml", "b.toml")


def test_an_outage_is_for_a_policy_with_a_breaker(capfd: Capture, path: Path) -> None:
    """It compares that with itself without one; the default goes without the outage."""
    path.write_text(STRAIGHT)
    line = refusal(capfd, "--config", str(path), "--outage", "1")
    assert line == "--outage needs a policy with a breaker, and demo has none"
    few = ("--requests", "1", "--faults", "none")
    status, document = demo_json(capfd, *few, "--config", str(path))
    assert status == 0
    assert document["outage"] is None
