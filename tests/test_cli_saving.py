"""A saved body is whole or not there, under a name that is safe and its own."""

from __future__ import annotations

import re
import string
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from trio_resilience._cli._saving import file_name, saved_whole

if TYPE_CHECKING:
    from pathlib import Path

SAFE = set(string.ascii_letters + string.digits + "._-")


def files(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_name_tells_what_it_is_and_keeps_the_suffix() -> None:
    name = file_name("https://example.com/a/b%20c.html?x=1#y")
    assert re.fullmatch(r"example\.com_a_b_20c-[0-9a-f]{16}\.html", name)


@given(st.text())
def test_every_name_is_safe_on_every_file_system(rest: str) -> None:
    name = file_name(f"http://{rest}")
    assert set(name) <= SAFE
    assert not name.startswith((".", "-"))
    assert len(name) < 120


@given(st.text(), st.text())
def test_different_urls_have_names_that_differ_also_without_case(one: str, other: str) -> None:
    same = file_name(one).lower() == file_name(other).lower()
    assert same == (one == other)


@pytest.mark.parametrize(
    "url", ["http://a", "http://a/", "http://a.com", "http://a/b.", "http://a/.hidden"]
)
def test_what_is_no_suffix_is_not_taken_for_one(url: str) -> None:
    assert "." not in file_name(url).rpartition("-")[2]


async def test_the_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = trio.Path(tmp_path / "page")
    async with saved_whole(path, 1) as write:
        await write(b"one ")
        await write(b"two")
        assert not await path.exists()
    assert files(tmp_path) == {"page": b"one two"}


async def test_a_failure_leaves_what_was_there_before(tmp_path: Path) -> None:
    path = trio.Path(tmp_path / "page")
    await path.write_bytes(b"old")

    async def save_half() -> None:
        async with saved_whole(path, 1) as write:
            await write(b"new")
            raise ValueError("midway")

    with pytest.raises(ValueError, match="midway"):
        await save_half()
    assert files(tmp_path) == {"page": b"old"}


async def test_a_cancellation_leaves_nothing(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        async with saved_whole(trio.Path(tmp_path / "page"), 1) as write:
            await write(b"new")
            scope.cancel()
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert files(tmp_path) == {}


async def test_the_same_url_can_be_saved_twice_at_once(tmp_path: Path) -> None:
    path = trio.Path(tmp_path / "page")
    async with saved_whole(path, 1) as write_one, saved_whole(path, 2) as write_two:
        await write_one(b"same")
        await write_two(b"same")
    assert files(tmp_path) == {"page": b"same"}


async def test_a_directory_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        async with saved_whole(trio.Path(tmp_path / "gone" / "page"), 1):
            pass
