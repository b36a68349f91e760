"""`python -m trio_resilience top` shows what the policies of a running process do."""

from __future__ import annotations

import json
import math
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
from rich.console import Console

from tests.test_metrics import changed, ended, made
from trio_resilience import (
    Bulkhead,
    BulkheadFullError,
    CallFinished,
    CallStarted,
    CircuitBreaker,
    CircuitState,
    OperationFinished,
    OperationStarted,
    Rejected,
    WaitStarted,
)
from trio_resilience._cli import _top as top
from trio_resilience._cli import main
from trio_resilience._metrics import Metrics
from trio_resilience._serving import serve_metrics

if TYPE_CHECKING:
    from collections.abc import Generator

    from trio_resilience import Event

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short path, since those of sockets have to be; and a wide terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "250")
    return Path("metrics.sock")


@contextmanager
def process(
    path: Path | int, *events: Event, tick: Event | None = None, max_series: int = 1000
) -> Generator[Metrics]:
    """Serve what these events come to, in a thread: the command has a run of trio of its own.

    *tick* happens a hundred times a second.
    """
    metrics, ready, scope = Metrics(max_series=max_series), threading.Event(), trio.CancelScope()
    for event in events:
        metrics(event)
    tokens: list[trio.lowlevel.TrioToken] = []

    async def serve() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        with scope:
            async with trio.open_nursery() as nursery:
                await serve_metrics(nursery, path, metrics)
                ready.set()
                while True:
                    await trio.sleep(0.01)
                    if tick is not None:
                        metrics(tick)

    thread = threading.Thread(target=trio.run, args=(serve,))
    thread.start()
    assert ready.wait(10)
    try:
        yield metrics
    finally:
        tokens[0].run_sync_soon(scope.cancel)
        thread.join()


def row_of(out: str, policy: str) -> list[str]:
    """The cells of a policy's row."""
    (line,) = (line for line in out.splitlines() if f" {policy} " in line)
    return [cell.strip() for cell in line.strip("│ ").split("│")]


CALLS = [
    *[made(CallStarted)] * 5,
    ended(CallFinished, 0.5),
    ended(CallFinished, 0.5),
    ended(CallFinished, 0.5, OSError("no\nroute")),
    ended(CallFinished, 0.001, BulkheadFullError("b", 1, 2)),
    *[made(Rejected, retry_after=None)] * 3,
    *[made(WaitStarted)] * 2,
    changed(CircuitState.OPEN, 1.0),
]
JOBS = [
    made(OperationStarted, "run_with_limit", index=0),
    made(OperationFinished, "run_with_limit", index=0, duration=90.0, error=None, cancelled=False),
]


def test_it_shows_a_row_for_each_policy(capfd: Capture, path: Path) -> None:
    """Of all its operations: state, counts, latencies, last failure."""
    with process(path, *CALLS, *JOBS):
        assert main(["top", str(path), "--once"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    row = row_of(out, "db")
    assert row[1].startswith("open (")
    assert row[1].endswith("): now open")
    assert row[2:9] == ["1", "2", "4", "-", "1", "3", "-"]
    assert row[9:12] == ["500 ms"] * 3
    assert row[12].startswith("OSError: no route (")
    assert row[12].endswith(" ago)")
    assert row_of(out, "run_with_limit")[1:] == [
        "-",
        "0",
        "0",
        "1",
        "-",
        "0",
        "0",
        "-",
        *["90 s"] * 3,
        "-",
    ]


def test_it_reads_from_a_port_too(capfd: Capture, path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with process(port, *CALLS):
        assert main(["top", str(port), "--once"]) == 0
    assert row_of(capfd.readouterr().out, "db")[4] == "4"


def test_a_snapshot_as_json_is_the_servers_own(capfd: Capture, path: Path) -> None:
    with process(path, *CALLS) as metrics:
        assert main(["top", str(path), "--once", "--json"]) == 0
        (line,) = capfd.readouterr().out.splitlines()
        assert json.loads(line)["series"] == metrics.snapshot().as_dict()["series"]


def test_a_breaker_that_is_watched_has_a_state_from_the_beginning(
    capfd: Capture, path: Path
) -> None:
    with process(path, made(CallStarted), made(CallStarted, "other")) as metrics:
        breaker = metrics.watch(CircuitBreaker("db"))
        bulkhead = metrics.watch(Bulkhead(3, name="other"))
        assert main(["top", str(path), "--once"]) == 0
    out = capfd.readouterr().out
    assert row_of(out, breaker.name)[1] == "closed"
    assert row_of(out, bulkhead.name)[1] == "-"


def test_what_is_counted_together_is_said(capfd: Capture, path: Path) -> None:
    events = [made(WaitStarted, "db", f"load {number}") for number in range(3)]
    with process(path, *events, max_series=1):
        assert main(["top", str(path), "--once"]) == 0
    assert "about 2 operations are counted as (others)" in capfd.readouterr().out


def test_names_can_not_command_the_terminal(capfd: Capture, path: Path) -> None:
    """They are another process's, and may be anybody's input."""
    with process(path, made(WaitStarted, "\x1b]0;title\x07[red]", "load")):
        assert main(["top", str(path), "--once"]) == 0
    out = capfd.readouterr().out
    assert "?]0;title?[red]" in out
    assert "\x1b]" not in out


def test_what_is_written_to_a_pipe_is_as_wide_as_it_has_to_be(
    capfd: Capture, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is a line, and nothing in it is cut off."""
    monkeypatch.delenv("COLUMNS")
    with process(path, *CALLS, made(CallStarted, "policy " * 20)):
        assert main(["top", str(path), "--once"]) == 0
    out = capfd.readouterr().out
    assert row_of(out, "db")[12].startswith("OSError: no route (")
    assert "policy " * 20 in out
    assert "…" not in out


@pytest.mark.parametrize(
    "width, names",
    [
        (30, ["policy", "state"]),
        (40, ["policy", "state", "failed"]),
        (
            81,
            [*("policy", "state", "calls", "calls/s", "failed", "refused", "p99"), "last failure"],
        ),
    ],
)
def test_a_narrow_terminal_shows_what_matters_most(width: int, names: list[str]) -> None:
    """Columns that there is no room for are left out, and those that are there can be read."""
    metrics, console = Metrics(), Console(width=width)
    for event in [*CALLS, *JOBS]:
        metrics(event)
    table = top.History().table(metrics.snapshot(), width)
    assert [column.header for column in table.columns] == names
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert all(name in lines[2] for name in names)
    assert not any("…" in line for line in lines)


# --- rates --------------------------------------------------------------------------------------


def shown(history: top.History, metrics: Metrics, time: float | None) -> list[str]:
    """The one row, at that time of the process's clock."""
    snapshot = metrics.snapshot()
    fields: dict[str, Any] = {name: getattr(snapshot, name) for name in snapshot.as_dict()}
    fields["time"] = time
    table = history.table(type(snapshot)(**fields))
    return [str(next(iter(column.cells))) for column in table.columns]


def test_rates_are_those_since_the_table_before() -> None:
    """By the clock of the process; if that has begun anew, there is no telling."""
    history, metrics = top.History(), Metrics()
    for event in CALLS:
        metrics(event)
    assert shown(history, metrics, 10.0)[5] == "-"
    for event in CALLS * 3:
        metrics(event)
    row = shown(history, metrics, 12.0)
    assert (row[5], row[8]) == ("6.0", "4.5")
    assert shown(history, metrics, 14.0)[5] == "0.0"
    for time in (14.0, 13.0, None):
        assert shown(history, metrics, time)[5] == "-"


def test_a_policy_that_is_new_has_rates_as_well() -> None:
    history, metrics = top.History(), Metrics()
    history.table(metrics.snapshot())
    for event in [made(WaitStarted), ended(CallFinished, 2000.0, OSError("x" * 70))]:
        metrics(event)
    for time, rate in ((10.0, "-"), (12.0, "0.0")):
        row = shown(history, metrics, time)
        assert row[5] == rate
    assert row[9] == "-"  # it has not begun under this listener
    assert "x" * 50 + "... (5 s ago)" in row[12]


def test_what_another_process_has_counted_is_no_rate() -> None:
    """One that has taken the place of the first has counted less, whatever its clock says."""
    history, metrics = top.History(), Metrics()
    for event in CALLS * 2:
        metrics(event)
    shown(history, metrics, 10.0)
    metrics = Metrics()
    for event in CALLS:
        metrics(event)
    row = shown(history, metrics, 12.0)
    assert (row[5], row[8]) == ("-", "-")
    assert shown(history, metrics, 14.0)[5] == "0.0"


# --- following ----------------------------------------------------------------------------------


def test_it_follows_until_the_process_is_gone(capfd: Capture, path: Path) -> None:
    """Where it is no terminal, one table after the other; in the end, one line says so."""
    with process(path, *CALLS, tick=made(CallStarted)) as metrics:
        follower = followed(path, "--interval", "0.1")
        assert follower.stdout is not None
        tables = 0
        while tables < 3:
            tables += "policies" in follower.stdout.readline()
        assert metrics.snapshot().by_policy()["db"].calls.started > 5
    _, err = follower.communicate(timeout=20)
    assert follower.returncode == 1
    assert (
        err
        == f"trio_resilience: no process serves its metrics at {path}: No such file or directory\n"
    )


def followed(path: Path, *options: str) -> subprocess.Popen[str]:
    """The command, whose output nobody has read yet."""
    command = [sys.executable, "-m", "trio_resilience", "top", str(path), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_has_seen_enough_ends_it(path: Path, options: list[str]) -> None:
    """Such as `head`: silently, with the status that a shell shows for it."""
    with process(path, *CALLS):
        follower = followed(path, "--interval", "0.05", *options)
        assert follower.stdout is not None
        assert follower.stderr is not None
        assert follower.stdout.readline()
        follower.stdout.close()
        assert follower.wait(20) == 141
        assert follower.stderr.read() == ""
        follower.stderr.close()


def test_ctrl_c_ends_it_though_nobody_reads(path: Path) -> None:
    """A table is more than a pipe holds: it waits until there is room."""
    with process(path, *[made(CallStarted, f"{number} " * 500) for number in range(100)]):
        follower = followed(path, "--interval", "0.01")
        assert follower.stdout is not None
        assert select.select([follower.stdout], [], [], 20)[0]
        follower.send_signal(signal.SIGINT)
        assert follower.wait(20) == 0
        assert follower.communicate()[1] == ""


def test_on_a_terminal_the_table_stays_in_its_place_until_ctrl_c(path: Path) -> None:
    ours, theirs = pty.openpty()
    with process(path, *CALLS):
        command = [sys.executable, "-m", "trio_resilience", "top", str(path), "--interval", "0.05"]
        environment = {
            **os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "TERM": "xterm",
            "COLUMNS": "250",
        }  # fmt: skip
        follower = subprocess.Popen(command, env=environment, stdout=theirs, stderr=subprocess.PIPE)
        os.close(theirs)
        written = b""
        while written.count(b"policies") < 3:
            written += os.read(ours, 65536)
        follower.send_signal(signal.SIGINT)
        while True:
            try:
                written += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        _, err = follower.communicate(timeout=20)
    os.close(ours)
    assert (follower.returncode, err) == (0, b"")
    assert b"\x1b[1A\x1b[2K" in written  # the cursor goes up, and the line is made anew


# --- no answer ----------------------------------------------------------------------------------


@contextmanager
def server(path: Path, answer: bytes, *, hangs: bool = False) -> Generator[None]:
    """Something else that listens there, and answers one client."""
    done = threading.Event()

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            client.sendall(answer)
            if hangs:
                done.wait(10)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield
        done.set()
        thread.join()


@pytest.mark.parametrize(
    "answer",
    [b"", b"hello\n", b"{}", b"\xff", b"[" * 100_000, b"3", b"NaN"],
    ids=["nothing", "words", "empty", "binary", "deep", "number", "nan"],
)
def test_what_is_no_snapshot_is_one_line(capfd: Capture, path: Path, answer: bytes) -> None:
    with server(path, answer):
        assert main(["top", str(path), "--once"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"trio_resilience: what {path} has answered is no snapshot of metrics\n"


LATENCY = ("series", 0, "calls", "succeeded")


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    "place, value",
    [
        (("time",), math.inf),
        (("time",), math.nan),
        (("time",), 10**400),
        (("series", 0, "rejections"), 10**400),
        ((*LATENCY, "buckets"), [[10**9, 2]]),
        ((*LATENCY, "buckets"), [[1, 1], [1, 1]]),
        ((*LATENCY, "buckets"), [[1, 1], [0, 1]]),
        ((*LATENCY, "buckets"), [[0, 3], [1, -1]]),
        ((*LATENCY, "longest"), None),
        ((*LATENCY, "shortest"), None),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_numbers_that_nobody_counts_are_no_snapshot(
    capfd: Capture, path: Path, place: tuple[Any, ...], value: Any, as_json: bool
) -> None:
    """Nothing can be told from them."""
    metrics = Metrics()
    for event in CALLS:
        metrics(event)
    _kept = metrics.watch(CircuitBreaker("db"))
    document = metrics.snapshot().as_dict()
    inner: Any = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with server(path, json.dumps(document).encode()):
        assert main(["top", str(path), "--once", *["--json"] * as_json]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"trio_resilience: what {path} has answered is no snapshot of metrics\n"


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_deep_is_shown_or_is_one_line(capfd: Capture, path: Path, as_json: bool) -> None:
    """What can be read can be shown, however deep that is in this version of Python."""
    metrics = Metrics()
    _kept = metrics.watch(CircuitBreaker("db"))
    document = metrics.snapshot().as_dict()
    statuses: list[int] = []
    for depth in (10, *range(100, 1000, 40), 100_000):
        document["policies"][0]["statistics"]["state"] = "here"
        answer = json.dumps(document).replace('"here"', "[" * depth + "]" * depth)
        with server(path, answer.encode()):
            statuses.append(main(["top", str(path), "--once", *["--json"] * as_json]))
        path.unlink()
        out, err = capfd.readouterr()
        assert (err.count("\n"), bool(out)) == ((1, False) if statuses[-1] else (0, True))
    assert statuses == sorted(statuses)
    assert set(statuses) == {0, 1}


def test_an_endless_answer_is_not_read_to_its_end(
    capfd: Capture, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "MOST", 1000)
    with server(path, b"1" * 2000):
        assert main(["top", str(path), "--once"]) == 1
    assert "is no snapshot of metrics" in capfd.readouterr().err


def test_a_process_that_hangs_is_not_waited_for(
    capfd: Capture, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(top, "PATIENCE", 0.1)
    with server(path, b"{", hangs=True):
        assert main(["top", str(path), "--once"]) == 1
    assert f"{path} has not answered within 0.1 s" in capfd.readouterr().err


def test_a_connection_that_breaks_is_one_line(
    capfd: Capture, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(_: Any) -> bytes:
        await trio.lowlevel.checkpoint()
        raise trio.BrokenResourceError

    monkeypatch.setattr(top, "_receive", broken)
    assert main(["top", str(path), "--once"]) == 1
    assert f"the process at {path} has gone away" in capfd.readouterr().err


@pytest.mark.parametrize("where", ["1", "missing.sock"])
def test_where_nobody_listens_is_one_line(capfd: Capture, path: Path, where: str) -> None:
    assert main(["top", where, "--once"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("trio_resilience: no process serves its metrics at ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("where", ["99999", ""])
def test_a_place_that_can_not_be_is_a_wrong_command(capfd: Capture, where: str) -> None:
    assert main(["top", where, "--once"]) == 2
    assert "PATH_OR_PORT must be" in capfd.readouterr().err


def test_a_place_has_to_be_given(capfd: Capture) -> None:
    assert main(["top"]) == 2
    assert "PATH_OR_PORT" in capfd.readouterr().err
