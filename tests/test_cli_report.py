"""The demo's report counts right and says what is wrong."""

from __future__ import annotations

import json
import ssl
from collections import Counter

import httpx2
import pytest
import trio

from trio_resilience import OperationTimeoutError, RateLimitExceededError
from trio_resilience._cli._causes import BadURLError, cause, explain, is_worth_retrying
from trio_resilience._cli._report import (
    CircuitChange,
    Gauge,
    RunReport,
    comparison,
    overloads,
    percentile,
    problems,
)
from trio_resilience._cli._terminal import render
from trio_resilience._events import CircuitState

REQUEST = httpx2.Request("GET", "http://a/")


def status_error(status: int) -> httpx2.HTTPStatusError:
    response = httpx2.Response(status, request=REQUEST)
    return httpx2.HTTPStatusError("long\nstory", request=REQUEST, response=response)


def report(**changes: object) -> RunReport:
    values: dict[str, object] = {
        "requests": 4,
        "failed": {"/a": "404"},
        "attempts": 7,
        "retries": Counter({"503": 2, "timed out": 1}),
        "refused": 5,
        "hedges": 2,
        "circuit": [CircuitChange(0.5, CircuitState.OPEN)],
        "latencies": [0.1, 0.2, 0.3],
        "seconds": 2.0,
        "client_peak": 2,
        "server_peak": 2,
        **changes,
    }
    return RunReport(**values)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("share, value", [(0.5, 50), (0.95, 95), (0.99, 99), (0.0, 1), (1.0, 100)])
def test_a_percentile_is_one_of_the_values(share: float, value: int) -> None:
    assert percentile(range(100, 0, -1), share) == value


def test_of_nothing_there_is_no_percentile() -> None:
    assert percentile([], 0.5) is None


def test_the_gauge_keeps_its_peak() -> None:
    gauge = Gauge()
    with gauge, gauge:
        pass
    with gauge:
        assert (gauge.current, gauge.peak) == (1, 2)
    assert gauge.current == 0


def test_a_run_as_json() -> None:
    assert json.loads(json.dumps(report().as_dict())) == {
        "requests": 4,
        "succeeded": 3,
        "failed": 1,
        "failures": {"404": 1},
        "attempts": 7,
        "retries": {"503": 2, "timed out": 1},
        "refused": 5,
        "hedges": 2,
        "circuit": [{"seconds": 0.5, "state": "open"}],
        "latency": {"p50": 0.2, "p95": 0.3, "p99": 0.3},
        "throughput": 1.5,
        "seconds": 2.0,
        "client_peak": 2,
        "server_peak": 2,
    }


def test_a_run_in_which_only_the_scripted_fail_has_no_problems() -> None:
    assert problems(report(), ["/a"], max_concurrency=2) == []


def test_whatever_else_fails_or_does_not_is_a_problem() -> None:
    assert problems(report(), ["/b"], max_concurrency=2) == [
        "/a failed: 404",
        "/b succeeded, against the script",
    ]


@pytest.mark.parametrize("side", ["client", "server"])
def test_too_many_at_once_is_a_problem_whoever_saw_it(side: str) -> None:
    assert overloads(report(**{f"{side}_peak": 3}), 2) == [
        f"the {side} saw 3 requests at once, and 2 were allowed"
    ]


def test_the_table_has_both_runs_and_every_cause() -> None:
    plain = report(
        failed={"/a": "404", "/b": "503"},
        retries=Counter[str](),
        refused=0,
        hedges=0,
        latencies=[],
        seconds=1.0,
    )
    lines = render(comparison(report(), plain)).splitlines()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert rows == [
        ["operations done", "3", "2"],
        ["operations failed", "1", "2"],
        ["failed: 404", "1", "1"],
        ["failed: 503", "0", "1"],
        ["attempts", "7", "7"],
        ["retries", "3", "0"],
        ["retried: 503", "2", "0"],
        ["retried: timed out", "1", "0"],
        ["hedges", "2", "0"],
        ["refused, to come back later", "5", "0"],
        ["latency p50", "200 ms", "none"],
        ["latency p95", "300 ms", "none"],
        ["latency p99", "300 ms", "none"],
        ["throughput", "1.5/s", "2.0/s"],
        ["largest concurrency, seen by the server", "2", "2"],
        ["largest concurrency, seen by the client", "2", "2"],
        ["time", "2.0 s", "1.0 s"],
    ]


@pytest.mark.parametrize(
    "error, label",
    [
        (status_error(503), "503"),
        (OperationTimeoutError(1.0), "timed out"),
        (trio.TooSlowError(), "timed out"),
        (httpx2.ReadTimeout(""), "timed out"),
        (httpx2.ConnectError("refused"), "could not connect"),
        (httpx2.RemoteProtocolError("incomplete"), "connection dropped"),
        (httpx2.ReadError(""), "connection dropped"),
        (KeyError("x"), "KeyError"),
    ],
)
def test_failures_are_counted_under_their_cause(error: Exception, label: str) -> None:
    assert cause(error) == label


@pytest.mark.parametrize(
    "error, line",
    [
        (status_error(503), "503 Service Unavailable"),
        (status_error(599), "599"),
        (httpx2.ReadError("two\nlines"), "ReadError: two lines"),
        (httpx2.ReadTimeout(""), "ReadTimeout"),
        (OperationTimeoutError(2.0, "fetch"), "timed out after 2 s"),
        (RateLimitExceededError(1.0), "the rate limit is reached; try again in 1 s"),
        (BadURLError("list:1: not a URL: 'a'"), "list:1: not a URL: 'a'"),
    ],
)
def test_an_error_is_explained_in_one_line(error: Exception, line: str) -> None:
    assert explain(error) == line


def caused_by(reason: BaseException) -> httpx2.ConnectError:
    error = httpx2.ConnectError("")
    error.__cause__ = trio.BrokenResourceError()
    error.__cause__.__context__ = reason
    return error


def test_an_empty_error_is_explained_by_what_it_comes_from() -> None:
    error = caused_by(ssl.SSLCertVerificationError(1, "self-signed\ncertificate"))
    assert explain(error) == "ConnectError: self-signed certificate"


def test_a_certificate_that_is_refused_stays_so() -> None:
    assert not is_worth_retrying(caused_by(ssl.SSLCertVerificationError(1, "self-signed")))
    assert is_worth_retrying(caused_by(ssl.SSLError(1, "handshake broken off")))


@pytest.mark.parametrize(
    "error",
    [
        status_error(503),
        status_error(429),
        httpx2.ConnectError(""),
        httpx2.ReadTimeout(""),
        httpx2.RemoteProtocolError(""),
    ],
)
def test_what_may_pass_is_worth_another_try(error: Exception) -> None:
    assert is_worth_retrying(error)


@pytest.mark.parametrize(
    "error",
    [
        status_error(404),
        status_error(501),
        httpx2.UnsupportedProtocol(""),
        httpx2.TooManyRedirects(""),
        httpx2.DecodingError(""),
        OSError(28, "No space left on device"),
        BadURLError(""),
    ],
)
def test_what_stays_as_it_is_is_not(error: Exception) -> None:
    assert not is_worth_retrying(error)
