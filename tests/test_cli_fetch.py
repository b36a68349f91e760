"""`fetch` gets what it is given from real servers, and tells of each URL exactly once."""

from __future__ import annotations

import json
import os
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest

from tests._cli_web import BODY, Web, web_server
from trio_resilience._cli import _fetch, main
from trio_resilience._cli._saving import file_name

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's proxies are for the user's URLs, not for a server on this machine."""
    monkeypatch.setenv("NO_PROXY", "*")


@pytest.fixture
def web() -> Generator[Web]:
    with web_server() as web:
        yield web


class Fetch:
    """Runs the command and reads what it printed."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.err = ""

    def __call__(self, *arguments: str, status: int = 0) -> list[dict[str, Any]]:
        assert main(["fetch", *arguments]) == status
        out, self.err = self.capfd.readouterr()
        return [json.loads(line) for line in out.splitlines()]

    def refused(self, *arguments: str) -> str:
        """Return the one line that says what is wrong."""
        assert self(*arguments, status=2) == []
        (line,) = self.err.splitlines()
        return line


@pytest.fixture
def fetch(capfd: pytest.CaptureFixture[str]) -> Fetch:
    return Fetch(capfd)


def test_a_line_says_what_came_of_a_url(web: Web, fetch: Fetch) -> None:
    (line,) = fetch(f"{web.url}/body")
    assert 0 < line.pop("seconds") < 10
    assert line == {
        "url": f"{web.url}/body",
        "status": 200,
        "attempts": 1,
        "bytes": len(BODY),
        "error": None,
    }
    assert fetch.err == ""


def test_lines_come_in_the_order_of_completion(web: Web, fetch: Fetch) -> None:
    lines = fetch(f"{web.url}/slow", f"{web.url}/ok")
    assert [line["url"] for line in lines] == [f"{web.url}/ok", f"{web.url}/slow"]


def test_what_fails_in_passing_is_tried_again(web: Web, fetch: Fetch) -> None:
    (line,) = fetch(f"{web.url}/flaky")
    assert (line["status"], line["attempts"], line["bytes"], line["error"]) == (200, 2, 5, None)


def test_a_server_that_asks_for_a_pause_gets_it(web: Web, fetch: Fetch) -> None:
    (line,) = fetch(f"{web.url}/later")
    assert line["attempts"] == 2
    assert line["seconds"] >= 1.0


def test_a_pause_that_is_too_long_is_a_failure_at_once(web: Web, fetch: Fetch) -> None:
    (line,) = fetch(f"{web.url}/busy", status=1)
    assert (line["status"], line["attempts"], line["error"]) == (429, 1, "429 Too Many Requests")


def test_a_missing_page_is_a_failure_that_is_not_tried_again(web: Web, fetch: Fetch) -> None:
    lines = fetch(f"{web.url}/ok", f"{web.url}/missing", status=1)
    missing = next(line for line in lines if line["error"])
    assert (missing["status"], missing["attempts"], missing["bytes"]) == (404, 1, 0)
    assert missing["error"] == "404 Not Found"
    assert web.counts["/missing"] == 1


@pytest.mark.parametrize("attempts", [1, 3])
def test_a_body_that_breaks_off_is_tried_as_often_as_is_allowed(
    web: Web, fetch: Fetch, attempts: int
) -> None:
    (line,) = fetch(f"{web.url}/dropped", "--max-attempts", str(attempts), status=1)
    assert (line["status"], line["attempts"], line["bytes"]) == (200, attempts, 9)
    assert line["error"].startswith("RemoteProtocolError: ")
    assert web.counts["/dropped"] == attempts


def test_a_status_is_forgotten_when_a_later_attempt_has_none(web: Web, fetch: Fetch) -> None:
    (line,) = fetch(f"{web.url}/sinking", "--max-attempts", "2", status=1)
    assert (line["status"], line["attempts"]) == (None, 2)
    assert line["error"].startswith("RemoteProtocolError: ")


def test_a_server_that_is_not_there_is_a_failure(fetch: Fetch) -> None:
    with web_server() as web:
        url = web.url
    (line,) = fetch(url, "--max-attempts", "1", status=1)
    assert (line["status"], line["attempts"], line["bytes"]) == (None, 1, 0)
    assert line["error"].startswith("ConnectError: ")


def test_a_silent_server_is_tried_again(
    web: Web, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt in which nothing comes does not use up the time of those after it."""
    monkeypatch.setattr(_fetch, "MAX_SILENCE", 0.1)
    (line,) = fetch(f"{web.url}/hang", "--timeout", "60", "--max-attempts", "2", status=1)
    assert (line["status"], line["attempts"], line["error"]) == (None, 2, "ReadTimeout")


def test_the_time_limit_holds_for_all_attempts_together(
    web: Web, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_fetch, "SILENCES", 0.5)
    (line,) = fetch(f"{web.url}/hang", "--timeout", "0.3", status=1)
    assert line["error"] == "timed out after 0.3 s"
    assert line["attempts"] == 1
    assert 0.3 <= line["seconds"] < 3


def test_redirects_are_followed(web: Web, fetch: Fetch) -> None:
    (line,) = fetch(f"{web.url}/moved")
    assert (line["url"], line["status"], line["bytes"]) == (f"{web.url}/moved", 200, 9)


@pytest.mark.parametrize(
    "path, error", [("loop", "TooManyRedirects"), ("away", "UnsupportedProtocol")]
)
def test_a_redirect_that_leads_nowhere_is_not_tried_again(
    web: Web, fetch: Fetch, path: str, error: str
) -> None:
    (line,) = fetch(f"{web.url}/{path}", status=1)
    assert line["error"].startswith(error)
    assert line["attempts"] == 1


def test_the_same_url_may_come_twice(web: Web, fetch: Fetch, tmp_path: Path) -> None:
    lines = fetch(*[f"{web.url}/body"] * 3, "--output-dir", str(tmp_path))
    assert [line["bytes"] for line in lines] == [len(BODY)] * 3
    assert web.counts["/body"] == 3
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [BODY]


def test_no_more_run_at_once_than_asked_for(web: Web, fetch: Fetch) -> None:
    urls = [f"{web.url}/slow?{number}" for number in range(6)]
    assert len(fetch(*urls, "--max-concurrency", "3")) == 6
    assert web.peak == 3


def test_bodies_are_saved_as_they_were_meant(web: Web, fetch: Fetch, tmp_path: Path) -> None:
    """Byte for byte, decoded, each under a name of its own, in a directory that is made."""
    target = tmp_path / "new" / "pages"
    urls = [f"{web.url}/body", f"{web.url}/gzip", f"{web.url}/ok/a?b", f"{web.url}/ok/a?c"]
    lines = fetch(*urls, "--output-dir", str(target))
    saved = {line["url"]: (target / line["file"]).read_bytes() for line in lines}
    assert saved == {urls[0]: BODY, urls[1]: BODY, urls[2]: b"/ok/a?b", urls[3]: b"/ok/a?c"}
    assert {file.name for file in target.iterdir()} == {line["file"] for line in lines}


# What httpx2 makes of a stream that is left midway; it is closed all the same.
left_midway = pytest.mark.filterwarnings("ignore:Async generator .*PoolByteStream:ResourceWarning")


@left_midway
@pytest.mark.parametrize("path", ["missing", "dropped", "ungzip"])
def test_of_a_failure_nothing_is_saved(web: Web, fetch: Fetch, tmp_path: Path, path: str) -> None:
    (line,) = fetch(
        f"{web.url}/{path}", "--output-dir", str(tmp_path), "--max-attempts", "1", status=1
    )
    assert line["file"] is None
    assert list(tmp_path.iterdir()) == []


def test_a_body_that_cannot_be_saved_is_a_failure_of_its_url(
    web: Web, fetch: Fetch, tmp_path: Path
) -> None:
    url = f"{web.url}/body"
    (tmp_path / file_name(url)).mkdir()
    lines = fetch(url, f"{web.url}/ok", "--output-dir", str(tmp_path), status=1)
    failed = next(line for line in lines if line["url"] == url)
    assert failed["error"].startswith("IsADirectoryError")
    assert failed["attempts"] == 1
    assert len(list(tmp_path.iterdir())) == 2


@left_midway
def test_a_full_disk_is_a_failure_and_is_not_tried_again(
    web: Web, fetch: Fetch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_url: str) -> str:
        return "full"

    monkeypatch.setattr(_fetch, "file_name", full)
    monkeypatch.setattr("trio_resilience._cli._saving.os.getpid", lambda: 1)
    (tmp_path / ".full.1-1.part").symlink_to("/dev/full")
    (line,) = fetch(f"{web.url}/body", "--output-dir", str(tmp_path), status=1)
    assert "No space left on device" in line["error"]
    assert line["attempts"] == 1
    assert list(tmp_path.iterdir()) == []


def test_urls_come_from_a_file_too(web: Web, fetch: Fetch, tmp_path: Path) -> None:
    listed = tmp_path / "list"
    listed.write_text(f"# two of them\n{web.url}/ok/1\n\n{web.url}/ok/2\n")
    lines = fetch(f"{web.url}/ok/0", "--input", str(listed))
    assert sorted(line["url"] for line in lines) == [f"{web.url}/ok/{n}" for n in range(3)]


def test_an_empty_list_is_done_at_once(fetch: Fetch, tmp_path: Path) -> None:
    listed = tmp_path / "list"
    listed.touch()
    assert fetch("--input", str(listed)) == []


def test_a_bad_line_is_a_failure_and_the_rest_is_fetched(
    web: Web, fetch: Fetch, tmp_path: Path
) -> None:
    listed = tmp_path / "list"
    listed.write_text(f"nonsense\n{web.url}/ok\n")
    lines = fetch("--input", str(listed), status=1)
    bad = next(line for line in lines if line["url"] == "nonsense")
    assert (bad["status"], bad["attempts"], bad["seconds"], bad["bytes"]) == (None, 0, 0.0, 0)
    assert bad["error"] == f"{listed}:1: not an http or https URL: 'nonsense'"
    assert fetch.err == f"trio_resilience: {bad['error']}\n"
    assert len(lines) == 2


def test_an_endless_input_is_read_as_fast_as_it_is_worked_through(
    web: Web, fetch: Fetch, tmp_path: Path
) -> None:
    """The writer of a pipe is held up while the URLs wait; 100,000 of them are never in memory."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    written = 0

    def write() -> None:
        nonlocal written
        pipe = os.open(fifo, os.O_WRONLY)
        with suppress(BrokenPipeError):
            for number in range(100_000):
                page = "ok" if number < 5 else "interrupt"
                os.write(pipe, f"{web.url}/{page}?{number}\n".encode())
                written = number
        os.close(pipe)

    writer = threading.Thread(target=write)
    writer.start()
    lines = fetch("--input", str(fifo), "--max-concurrency", "2", status=130)
    writer.join()
    # The fifth may be under way when the interrupt comes.
    assert len(lines) in {4, 5}
    assert written < 20_000


def test_ctrl_c_stops_and_what_is_done_is_reported(web: Web, fetch: Fetch, tmp_path: Path) -> None:
    urls = [f"{web.url}/ok", f"{web.url}/interrupt", f"{web.url}/never"]
    lines = fetch(*urls, "--max-concurrency", "1", "--output-dir", str(tmp_path), status=130)
    assert [line["url"] for line in lines] == [f"{web.url}/ok"]
    assert [file.name for file in tmp_path.iterdir()] == [lines[0]["file"]]
    assert fetch.err == "trio_resilience: interrupted: 1 fetched, 0 failed, 1 stopped midway\n"
    assert web.counts["/never"] == 0


def test_ctrl_c_ends_the_wait_for_a_silent_input(web: Web, fetch: Fetch) -> None:
    reader, writer = os.pipe()
    try:
        arguments = [f"{web.url}/interrupt", "--input", f"/dev/fd/{reader}"]
        assert fetch(*arguments, status=130) == []
    finally:
        os.close(writer)
        os.close(reader)


def test_a_reader_that_has_enough_ends_it_quietly(
    web: Web, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert fetch(f"{web.url}/ok", f"{web.url}/hang", status=141) == []
    assert fetch.err == ""


def test_a_bad_url_is_refused_before_anything_runs(web: Web, fetch: Fetch) -> None:
    line = fetch.refused(f"{web.url}/ok", "htp://example.com")
    assert line == "trio_resilience: not an http or https URL: 'htp://example.com'"
    assert web.counts.total() == 0


def test_nothing_to_fetch_is_refused(fetch: Fetch) -> None:
    assert "give URLs, or --input FILE" in fetch.refused()


def test_an_input_that_cannot_be_read_is_refused(fetch: Fetch, tmp_path: Path) -> None:
    assert fetch.refused("--input", f"{tmp_path}/none").endswith("none: No such file or directory")


def test_an_input_that_is_no_list_ends_it(fetch: Fetch, tmp_path: Path) -> None:
    listed = tmp_path / "list"
    listed.write_bytes(b"x" * 200_000)
    assert "list:1: a line of more than 65536 bytes" in fetch.refused("--input", str(listed))


def test_a_directory_that_cannot_be_made_is_refused(fetch: Fetch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = fetch.refused("http://127.0.0.1/", "--output-dir", f"{tmp_path}/file/new")
    assert line.endswith("file/new: Not a directory")
