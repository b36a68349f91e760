"""The command line as a shell runs it: processes, pipes, signals, terminals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from typing import IO, TYPE_CHECKING, Any

import pytest

from tests._cli_web import Web, web_server

if TYPE_CHECKING:
    from collections.abc import Generator

COMMAND = [sys.executable, "-W", "error", "-m", "trio_resilience"]
ENVIRONMENT = {**os.environ, "NO_PROXY": "*"}
SECONDS = 30


@pytest.fixture(autouse=True)
def ctrl_c_is_heard() -> Generator[None]:
    """What a shell starts in the background ignores Ctrl-C, and so do its children."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture
def web() -> Generator[Web]:
    with web_server() as web:
        yield web


def run(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments],
        env=ENVIRONMENT,
        input=given,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@contextlib.contextmanager
def started(
    *arguments: str, stderr: int = subprocess.PIPE
) -> Generator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """Start the command; give it with its stdin and its stdout."""
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        bufsize=1,
    )
    with process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            yield process, process.stdin, process.stdout
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for the end; return the status and what stderr has."""
    status = process.wait(SECONDS)
    return status, process.stderr.read() if process.stderr is not None else ""


def read_json(stdout: IO[str]) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(stdout.readline())
    return record


@pytest.mark.parametrize("profile", ["none", "mild", "harsh"])
def test_the_demo_succeeds_whatever_the_faults_are(profile: str) -> None:
    ended = run("demo", "--faults", profile, "--requests", "12", "--json", "--outage", "0.2")
    assert (ended.returncode, ended.stderr) == (0, "")
    document = json.loads(ended.stdout)
    assert document["ok"]
    assert document["with"]["requests"] == 12
    assert document["with"]["server_peak"] <= 10
    assert document["outage"]["with"]["succeeded"] == 12


def test_the_demo_is_what_runs_by_default_and_prints_no_control_codes_into_a_pipe() -> None:
    ended = run("--requests", "5", "--outage", "0")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "with: 5 of 5 succeeded" in ended.stdout
    assert "\x1b" not in ended.stdout


def test_a_mistake_is_one_line_and_status_two() -> None:
    for arguments in (
        ["fetch", "nonsense"],
        ["fetch", "--input", "/none"],
        ["demo", "--faults", "x"],
    ):
        ended = run(*arguments)
        assert ended.returncode == 2
        assert ended.stdout == ""
        assert len(ended.stderr.splitlines()) == 1


def test_urls_come_from_stdin_and_lines_go_out_at_once(web: Web) -> None:
    """Each line is there before the next URL is: neither side waits for a buffer to fill."""
    with started("fetch", "--input", "-") as (process, stdin, stdout):
        for number in range(3):
            stdin.write(f"{web.url}/ok/{number}\n")
            assert read_json(stdout)["url"] == f"{web.url}/ok/{number}"
        stdin.close()
        assert end(process) == (0, "")


def test_stdin_may_end_without_a_newline(web: Web) -> None:
    ended = run("fetch", "--input", "-", given=f"{web.url}/ok\n{web.url}/missing")
    assert ended.returncode == 1
    assert len(ended.stdout.splitlines()) == 2


def test_ctrl_c_ends_a_fetch_that_hangs(web: Web) -> None:
    with started("fetch", f"{web.url}/ok", f"{web.url}/hang") as (process, _, stdout):
        assert read_json(stdout)["status"] == 200
        process.send_signal(signal.SIGINT)
        status, err = end(process)
        assert stdout.read() == ""
    assert status == 130
    assert err == "trio_resilience: interrupted: 1 fetched, 0 failed, 1 stopped midway\n"


def test_ctrl_c_ends_the_wait_for_a_line_of_stdin(web: Web) -> None:
    """A thread still waits for the line; the interpreter ends all the same, and says nothing."""
    with started("fetch", f"{web.url}/ok", "--input", "-") as (process, _, stdout):
        read_json(stdout)
        process.send_signal(signal.SIGINT)
        status, err = end(process)
    assert status == 130
    assert err == "trio_resilience: interrupted: 1 fetched, 0 failed, 0 stopped midway\n"


def test_a_second_ctrl_c_ends_it_when_nobody_reads_the_report(web: Web) -> None:
    long_urls = [f"{web.url}/ok/{number}?{'x' * 9_000}" for number in range(20)]
    with started("fetch", *long_urls, "--max-concurrency", "1") as (process, _, stdout):
        assert stdout.readable()
        # Seven lines fill the pipe, and the eighth waits for a reader.
        deadline = time.monotonic() + SECONDS
        while web.counts.total() < 8:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1.0)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.3)
        # A signal that comes before the first is heard counts as the same one: so press again.
        while process.poll() is None:
            assert time.monotonic() < deadline + SECONDS
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3.0)
        assert end(process) == (130, "trio_resilience: interrupted\n")


def test_a_reader_that_takes_one_line_and_leaves_ends_it_quietly(web: Web) -> None:
    urls = [f"{web.url}/ok/{number}" for number in range(200)]
    with started("fetch", *urls, "--max-concurrency", "2") as (process, _, stdout):
        read_json(stdout)
        stdout.close()
        assert end(process) == (141, "")
    assert web.counts.total() < 200


def test_the_table_of_the_demo_may_go_unread() -> None:
    with started("demo", "--requests", "3", "--faults", "none", "--outage", "0") as (
        process,
        _,
        stdout,
    ):
        stdout.close()
        assert end(process) == (141, "")


@pytest.mark.parametrize(
    "arguments", [["fetch"], ["demo", "--json", "--faults", "none", "--outage", "0"]]
)
def test_progress_is_shown_on_a_terminal_only(web: Web, arguments: list[str]) -> None:
    """And never on stdout, which stays readable for a program."""
    urls = [f"{web.url}/slow"] if arguments == ["fetch"] else []
    terminal, child_side = pty.openpty()
    try:
        with started(*arguments, *urls, stderr=child_side) as (process, _, stdout):
            json.loads(stdout.read())
            status, _ = end(process)
    finally:
        os.close(child_side)
    shown = read_terminal(terminal)
    assert status == 0
    assert "1/?" in shown or "200/200" in shown


def read_terminal(terminal: int) -> str:
    shown = b""
    try:
        while chunk := os.read(terminal, 65536):
            shown += chunk
    except OSError:  # how Linux tells that the other side is closed
        pass
    finally:
        os.close(terminal)
    return shown.decode()


def test_progress_does_not_tear_lines_that_share_its_terminal(web: Web) -> None:
    """Every line of JSON can be read whole, as if there were no progress."""
    urls = [f"{web.url}/ok/{number}" for number in range(20)]
    terminal, child_side = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "fetch", *urls], env=ENVIRONMENT, stdout=child_side, stderr=child_side
    )
    os.close(child_side)
    shown = read_terminal(terminal)
    assert process.wait(SECONDS) == 0
    lines = re.findall(r"\{\"url\".*?\}\r\n", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))
    assert {json.loads(line)["url"] for line in lines} == set(urls)
    assert "fetching" in shown
