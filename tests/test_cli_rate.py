"""`fetch` keeps to a rate and to a number of requests per host, as the servers see it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from select import select
from typing import TYPE_CHECKING, Any

import attrs
import httpx2
import pytest
import trio
from outcome import Error, Value

from tests._cli_web import Web, web_server
from trio_resilience import OperationTimeoutError, map_with_limit
from trio_resilience._cli import _fetch, main
from trio_resilience._cli._fetch import LOOKAHEAD, Downloader, Options, Tally
from trio_resilience._cli._rate import Rate, host_of, parse_rate
from trio_resilience._cli._urls import Job

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Generator
    from pathlib import Path

    from trio.testing import MockClock


# --- what is written ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, requests, seconds",
    [
        ("10", 10, 1),
        ("10/s", 10, 1),
        ("300/min", 300, 60),
        ("5000/h", 5000, 3600),
        ("0.5/s", 0.5, 1),
        ("2.50/min", 2.5, 60),
        ("007", 7, 1),
    ],
)
def test_a_rate_is_a_number_and_a_unit(text: str, requests: float, seconds: float) -> None:
    """Of a bare number the unit is the second."""
    assert parse_rate(text) == Rate(requests, seconds)


WRONG = [
    "", "/s", "10/", "ten", "10/d", "10/sec", "10/S", "10 /s", " 10", "10/s ", "10/s\n", "10//s",
    "1e3", "nan", "inf", "+5", "-5", "1_000", "10.", ".5", "0x10", "10s", "10/s/s", "٣/s",
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_rate_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"^Must be like 10/s, 300/min or 5000/h, got '"):
        parse_rate(text)


@pytest.mark.parametrize("text", ["0", "0/s", "0.00/min", "9" * 400])
def test_a_rate_is_above_zero_and_finite(text: str) -> None:
    with pytest.raises(ValueError, match=r"^Must be > 0 and finite, got '[^']{1,80}'[.]$"):
        parse_rate(text)


class Fetch:
    """Runs the command and reads what it printed."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.err = ""

    def __call__(self, *arguments: str, status: int = 0) -> list[dict[str, Any]]:
        assert main(["fetch", *arguments]) == status
        out, self.err = self.capfd.readouterr()
        return [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def fetch(capfd: pytest.CaptureFixture[str]) -> Fetch:
    return Fetch(capfd)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's proxies are for the user's URLs, not for a server on this machine."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def web() -> Generator[Web]:
    with web_server() as web:
        yield web


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--rate", "fast"], "--rate: Must be like 10/s, 300/min or 5000/h, got 'fast'."),
        (["--rate", "-5"], "--rate: Must be like 10/s, 300/min or 5000/h, got '-5'."),
        (["--rate", "0"], "--rate: Must be > 0 and finite, got '0'."),
        (["--rate"], "--rate requires an argument"),
        (["--rate", "5", "--burst", "0"], "--burst. Must be > 0"),
        (["--rate", "5", "--burst", "1.5"], "--burst"),
        (["--burst", "5"], "--burst needs a --rate"),
        (["--max-per-host", "0"], "--max-per-host. Must be > 0"),
        (["--max-per-host", "many"], "--max-per-host"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_fetched(
    web: Web, fetch: Fetch, arguments: list[str], words: str
) -> None:
    assert fetch(f"{web.url}/ok", *arguments, status=2) == []
    (line,) = fetch.err.splitlines()
    assert words in line
    assert web.counts.total() == 0


def test_the_help_says_what_counts(fetch: Fetch, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "--help"]) == 0
    text = capfd.readouterr().out
    assert [name for name in ("--rate", "--burst", "--max-per-host") if name not in text] == []
    told = " ".join(text.replace("│", " ").split())
    assert "Every request counts" in told
    assert f"up to {LOOKAHEAD} are read ahead" in told


@pytest.mark.parametrize(
    "urls",
    [
        ["http://example.com/a", "HTTP://EXAMPLE.com:80/b?c", "http://me:secret@example.com./"],
        ["https://example.com", "https://example.com:443/", "http://example.com:443/"],
        ["http://ü.de:8000/", "http://xn--tda.de:8000", "http://Ü.DE:8000/"],
        ["http://[::1]:8080/", "http://[::1]:8080/a"],
        ["http://127.0.0.1:0/"],
        ["http://127.0.0.1/"],
        ["https://127.0.0.1/"],
        ["http://localhost/"],
    ],
)
def test_a_host_is_the_same_however_it_is_written(urls: list[str]) -> None:
    """Its name and its port, whatever the scheme; the groups here are different ones."""
    assert len({host_of(url) for url in urls}) == 1
    others = [host_of(url) for url in ("http://example.org/", "http://example.com:8000/")]
    assert host_of(urls[0]) not in others


def test_different_hosts_differ() -> None:
    urls = [
        "http://a/", "http://b/", "https://a/", "http://a:8080/", "http://a.b/", "http://127.0.0.1/",
        "http://127.0.0.2/", "http://localhost/", "http://a:0/",
    ]  # fmt: skip
    assert len({host_of(url) for url in urls}) == len(urls)


# --- on the virtual clock ----------------------------------------------------------------------


@attrs.define(eq=False)
class Site:
    """A web site behind a client's transport, which says when it was asked for what."""

    answers: dict[str, Callable[[], httpx2.Response]] = attrs.field(
        factory=dict[str, "Callable[[], httpx2.Response]"]
    )
    latency: float = 0.0
    asked: list[tuple[float, str]] = attrs.field(factory=list[tuple[float, str]])
    _began: float = attrs.field(factory=trio.current_time)

    def note(self, what: str) -> None:
        self.asked.append((round(trio.current_time() - self._began, 6), what))

    async def answer(self, request: httpx2.Request) -> httpx2.Response:
        self.note(request.url.path)
        await trio.sleep(self.latency)
        return self.answers.get(request.url.path, partial(httpx2.Response, 200))()


async def fetch_virtually(
    site: Site,
    paths: list[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    rate: str = "1/min",
    burst: int = 1,
    max_attempts: int = 4,
    tally: Tally | None = None,
) -> list[tuple[Job, Value[None] | Error]]:
    """Fetch all at once, as the command does; 30 seconds each."""
    options = Options(
        max_concurrency=100,
        max_attempts=max_attempts,
        timeout=30.0,
        output_dir=None,
        rate=parse_rate(rate),
        burst=burst,
    )
    transport = httpx2.MockTransport(site.answer)
    monkeypatch.setattr(httpx2, "AsyncClient", partial(httpx2.AsyncClient, transport=transport))
    turns = options.turns
    jobs = [Job(number, f"http://site{path}") for number, path in enumerate(paths, 1)]
    async with options.client(turns) as client:
        download = Downloader(options, turns, client, options.retry, tally or Tally())
        outcomes = await map_with_limit(
            None, download, jobs, max_concurrency=100, on_error="collect"
        )
    return list(zip(jobs, outcomes, strict=True))


async def test_requests_are_spaced_and_a_long_line_costs_no_time_limit(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last waits for ten times the 30 seconds that it has, and is fetched."""
    site = Site(latency=1.0)
    done = await fetch_virtually(site, ["/a"] * 6, monkeypatch)
    assert [now for now, _ in site.asked] == [0, 60, 120, 180, 240, 300]
    assert [outcome for _, outcome in done] == [Value(None)] * 6
    assert [round(job.seconds, 6) for job, _ in done] == [1.0] * 6


async def test_so_many_as_the_burst_go_at_once(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site()
    await fetch_virtually(site, ["/a"] * 5, monkeypatch, burst=3)
    assert [now for now, _ in site.asked] == [0, 0, 0, 60, 120]


async def test_every_further_attempt_takes_its_turn(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short the backoff was; and after those that were in line before it."""
    site = Site({"/bad": partial(httpx2.Response, 503)})
    tally = Tally()
    paths = ["/bad", "/a", "/a"]
    done = await fetch_virtually(site, paths, monkeypatch, max_attempts=3, tally=tally)
    assert site.asked == [(0, "/bad"), (60, "/a"), (120, "/a"), (180, "/bad"), (240, "/bad")]
    assert [job.attempts for job, _ in done] == [3, 1, 1]
    assert tally.begun == 3


async def test_every_redirect_takes_its_turn(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And while it waits, the response that leads there takes up no connection."""

    class Body(httpx2.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"this way"
            site.note("read")

    def moved() -> httpx2.Response:
        return httpx2.Response(302, headers={"Location": "/new"}, stream=Body())

    site = Site({"/old": moved})
    done = await fetch_virtually(site, ["/old", "/a"], monkeypatch)
    assert site.asked == [(0, "/old"), (0, "read"), (60, "/a"), (120, "/new")]
    assert [(job.status, job.attempts) for job, _ in done] == [(200, 1), (200, 1)]


async def test_the_time_limit_goes_on_when_the_turn_has_come(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attempts of 20 seconds are more than 30, whatever lies between them."""
    site = Site({"/bad": partial(httpx2.Response, 503)}, latency=20.0)
    [(job, outcome)] = await fetch_virtually(site, ["/bad"], monkeypatch)
    assert isinstance(outcome, Error)
    assert isinstance(outcome.error, OperationTimeoutError)
    (_, second) = site.asked
    assert second == (60, "/bad")
    assert (job.attempts, job.status) == (2, None)
    assert 69 < job.seconds <= 70


async def test_what_is_no_url_takes_no_turn(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(
        max_concurrency=1, max_attempts=1, timeout=1.0, output_dir=None, rate=parse_rate("1/h")
    )
    turns, tally = options.turns, Tally()
    async with options.client(turns) as client:
        download = Downloader(options, turns, client, options.retry, tally)
        bad = Job(1, "nonsense", problem="not a URL")
        [outcome] = await map_with_limit(None, download, [bad], on_error="collect")
    assert isinstance(outcome, Error)
    assert turns.limiter is not None
    assert turns.limiter.statistics().available == 1
    assert tally.midway == 1


# --- as servers see it -------------------------------------------------------------------------


class Arrivals(Counter[str]):
    """Counts requests for a path, and notes when each was read, on the clock of the system."""

    def __init__(self) -> None:
        super().__init__()
        self.times = list[float]()

    def __setitem__(self, path: str, count: int) -> None:
        self.times.append(time.monotonic())
        super().__setitem__(path, count)


def watch(web: Web) -> list[float]:
    web.counts = arrivals = Arrivals()
    return arrivals.times


def test_a_server_sees_no_more_than_the_rate(web: Web, fetch: Fetch) -> None:
    """Further attempts and redirects included: none comes before its time."""
    times = watch(web)
    pages = ["ok/1", "ok/2", "moved", "flaky", "ok/3", "flaky/2"]
    began = time.monotonic()
    lines = fetch(*[f"{web.url}/{page}" for page in pages], "--rate", "8/s", "--burst", "2")
    assert len(lines) == 6
    assert len(times) == 9
    early = [k for k, at in enumerate(times) if at < began + (k - 1) / 8]
    assert early == []


def test_a_burst_goes_out_at_once(web: Web, fetch: Fetch) -> None:
    """Else these would take hours."""
    urls = [f"{web.url}/ok/{number}" for number in range(4)]
    assert len(fetch(*urls, "--rate", "1/h", "--burst", "4")) == 4


def test_ctrl_c_ends_the_wait_for_a_turn(web: Web, fetch: Fetch) -> None:
    """What had not begun yet is not counted as stopped midway."""
    urls = [f"{web.url}/interrupt", f"{web.url}/ok", f"{web.url}/ok"]
    assert fetch(*urls, "--rate", "1/h", status=130) == []
    assert fetch.err == "trio_resilience: interrupted: 0 fetched, 0 failed, 1 stopped midway\n"
    assert web.counts == {"/interrupt": 1}


def test_a_server_sees_no_more_at_once_than_one_host_may(web: Web, fetch: Fetch) -> None:
    """Two ports are two hosts, and each has its own number."""
    with web_server() as other:
        urls = [f"{host.url}/slow?{number}" for number in range(6) for host in (web, other)]
        lines = fetch(*urls, "--max-per-host", "2", "--max-concurrency", "12")
        assert len(lines) == 12
        assert (web.peak, other.peak) == (2, 2)


def test_a_busy_host_does_not_hold_up_the_others(web: Web, fetch: Fetch) -> None:
    """Its URLs come first, and wait for one another; those of the others overtake them."""
    with web_server() as other:
        urls = [f"{web.url}/slow?{number}" for number in range(10)]
        urls += [f"{other.url}/ok?{number}" for number in range(5)]
        lines = fetch(*urls, "--max-per-host", "1", "--max-concurrency", "3")
        assert len(lines) == 15
        assert [line for line in lines[8:] if line["url"].startswith(other.url)] == []
        assert web.peak == 1


def test_both_limits_hold_together(web: Web, fetch: Fetch) -> None:
    times = watch(web)
    urls = [f"{web.url}/slow?{number}" for number in range(5)]
    began = time.monotonic()
    lines = fetch(*urls, "--max-per-host", "1", "--rate", "10")
    assert len(lines) == 5
    assert web.peak == 1
    assert [k for k, at in enumerate(times) if at < began + k / 10] == []


def test_bad_lines_have_no_host_and_are_reported_all_the_same(
    web: Web, fetch: Fetch, tmp_path: Path
) -> None:
    listed = tmp_path / "list"
    listed.write_text(f"nonsense\nhttp://[::1\n{web.url}/ok\n")
    lines = fetch("--input", str(listed), "--max-per-host", "1", status=1)
    assert sorted(line["error"] is None for line in lines) == [False, False, True]
    assert len(fetch.err.splitlines()) == 2


def test_an_endless_input_is_read_so_far_ahead_and_no_further(
    web: Web, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is one busy host: what was set aside is bounded, and was not begun."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    written = 0

    def write() -> None:
        nonlocal written
        pipe = os.open(fifo, os.O_WRONLY)
        os.set_blocking(pipe, False)
        while written < 100_000 and (select([], [pipe], [], 0.5)[1] or not web.counts["/hang"]):
            with suppress(BlockingIOError):
                page = f"ok/{written}" if written < 5 else "hang"
                os.write(pipe, f"{web.url}/{page}\n".encode())
                written += 1
        os.kill(os.getpid(), signal.SIGINT)  # nobody has read for a while, or all was read
        os.close(pipe)

    monkeypatch.setattr(_fetch, "LOOKAHEAD", 100)
    writer = threading.Thread(target=write)
    writer.start()
    lines = fetch("--input", str(fifo), "--max-per-host", "1", status=130)
    writer.join()
    assert len(lines) == 5
    assert fetch.err == "trio_resilience: interrupted: 5 fetched, 0 failed, 1 stopped midway\n"
    assert written < 20_000


def test_a_line_of_a_slow_writer_is_fetched_at_once(web: Web) -> None:
    """Nothing waits until there are enough lines to look ahead."""
    command = [sys.executable, "-W", "error", "-m", "trio_resilience", "fetch", "--input", "-"]
    limits = ["--max-per-host", "1", "--rate", "1000/s"]
    with subprocess.Popen(
        [*command, *limits],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    ) as process:  # fmt: skip
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            for number in range(3):
                process.stdin.write(f"{web.url}/ok/{number}\n")
                assert json.loads(process.stdout.readline())["url"] == f"{web.url}/ok/{number}"
            process.stdin.close()
            assert process.wait(30) == 0
        finally:
            process.kill()
