"""URLs come from the command line and from files, one by one, and a bad one has a clear message."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from trio_resilience._cli._terminal import UsageError
from trio_resilience._cli._urls import CHUNK, Job, JobSource, find_problem, opened

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


async def read_all(name: str, *urls: str) -> list[Job]:
    with opened(name) as descriptor:
        return [job async for job in JobSource(urls, name, descriptor)]


@pytest.fixture
def listed(tmp_path: Path) -> Callable[[bytes], str]:
    """Write a list; return its name."""
    path = tmp_path / "list.txt"

    def write(content: bytes) -> str:
        path.write_bytes(content)
        return str(path)

    return write


async def test_arguments_come_first_then_the_lines_of_the_file(
    listed: Callable[[bytes], str],
) -> None:
    name = listed(b"http://b/\r\n\n  # a comment\n  http://c/  \nhttps://d/")
    jobs = await read_all(name, "http://a/")
    assert [job.url for job in jobs] == ["http://a/", "http://b/", "http://c/", "https://d/"]
    assert [job.number for job in jobs] == [1, 2, 3, 4]
    assert {job.problem for job in jobs} == {None}


async def test_without_a_file_there_are_only_the_arguments() -> None:
    assert [job.url async for job in JobSource(["http://a/"])] == ["http://a/"]


async def test_an_empty_file_has_no_urls(listed: Callable[[bytes], str]) -> None:
    name = listed(b"")
    assert await read_all(name) == []


async def test_a_byte_order_mark_is_no_part_of_the_url(listed: Callable[[bytes], str]) -> None:
    name = listed(b"\xef\xbb\xbfhttp://a/\n")
    assert [job.url for job in await read_all(name)] == ["http://a/"]


async def test_a_bad_line_is_named_with_its_place(listed: Callable[[bytes], str]) -> None:
    name = listed(b"http://a/\n# a comment\nfile:///etc/passwd\nhttp://\xff/\n")
    problems = [job.problem for job in await read_all(name)]
    assert problems[0] is None
    assert problems[1] == f"{name}:3: not an http or https URL: 'file:///etc/passwd'"
    assert str(problems[2]).startswith(f"{name}:4: not a URL: 'http://\\ufffd/'")


@pytest.mark.parametrize(
    "url", ["http://a", "HTTPS://a:8443/b?c#d", "http://[::1]:80/", "http://ü.de/é"]
)
def test_http_and_https_urls_are_good(url: str) -> None:
    assert find_problem(url) is None


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a",
        "//a/b",
        "ftp://a/",
        "http://",
        "http:///a",
        "http://a:99999/",
        "http://a:b/",
        "http://[::1",
        "http://\udc80/",
        "http://" + "a" * CHUNK,
    ],
)
def test_a_problem_is_one_short_printable_line(url: str) -> None:
    problem = find_problem(url)
    assert problem is not None
    assert problem.isascii()
    assert problem.isprintable()
    assert len(problem) < 400


async def test_lines_are_read_no_faster_than_they_are_asked_for(
    listed: Callable[[bytes], str],
) -> None:
    """However long the file is, a chunk of it is held."""
    name = listed(b"http://a/\n" * 100_000)
    with opened(name) as descriptor:
        source = JobSource([], "list", descriptor)
        await anext(aiter(source))
        assert os.lseek(descriptor, 0, os.SEEK_CUR) == CHUNK


async def test_lines_that_end_beyond_a_chunk_are_whole(listed: Callable[[bytes], str]) -> None:
    urls = [f"http://a/{'x' * (number % 977)}" for number in range(1_000)]
    name = listed("\n".join(urls).encode())
    assert [job.url for job in await read_all(name)] == urls


async def test_a_file_that_is_no_list_is_refused_before_it_fills_the_memory(
    listed: Callable[[bytes], str],
) -> None:
    name = listed(b"http://a/\n" + b"x" * (3 * CHUNK))
    with pytest.raises(UsageError, match=r"list\.txt:2: a line of more than 65536 bytes"):
        await read_all(name)


def test_a_file_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"can't read .*none: No such file"),
        opened(f"{tmp_path}/none"),
    ):
        pass


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="it is a directory"), opened(str(tmp_path)):
        pass


def test_the_file_is_closed_at_the_end(listed: Callable[[bytes], str]) -> None:
    name = listed(b"")
    with opened(name) as descriptor:
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.fixture
def stdin(listed: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch) -> Generator[int]:
    """Yield the descriptor of a stdin that has two lines."""
    with Path(listed(b"http://a/\nnonsense")).open() as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield stdin.fileno()


async def test_a_hyphen_stands_for_stdin(stdin: int) -> None:
    """It is read from where it is, and stays open."""
    jobs = await read_all("-")
    assert [job.url for job in jobs] == ["http://a/", "nonsense"]
    assert jobs[1].problem == "-:2: not an http or https URL: 'nonsense'"
    os.fstat(stdin)


async def test_a_file_that_fails_while_it_is_read_is_named(listed: Callable[[bytes], str]) -> None:
    name = listed(b"")
    write_only = os.open(name, os.O_WRONLY)
    try:
        with pytest.raises(UsageError, match="can't read list: Bad file descriptor"):
            await anext(aiter(JobSource([], "list", write_only)))
    finally:
        os.close(write_only)


async def test_waiting_for_a_line_holds_up_nothing_and_can_be_cancelled() -> None:
    """A pipe that stays silent does not keep a program that is told to stop."""
    reader, writer = os.pipe()
    try:
        with trio.move_on_after(0.05) as scope:
            await anext(aiter(JobSource([], "pipe", reader)))
        assert scope.cancelled_caught
    finally:
        os.close(writer)
        os.close(reader)
