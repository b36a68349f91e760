"""What an error carries: one note that says which operation it was, and nothing of ours."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import outcome
import pytest
import trio

import trio_resilience
from tests.operations import (
    fails,
    operation_notes,
    returns,
)
from trio_resilience import (
    OperationsFailedError,
    OperationTimeoutError,
    map_with_limit,
    run_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    Operation = Callable[[], Awaitable[int]]


async def test_a_failure_says_which_operation_it_was() -> None:
    """Each leaf carries one note with the operation's index."""
    ops = [partial(returns, 0), partial(returns, 1), partial(returns, 2), partial(fails, OSError())]
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, ops)
    assert operation_notes(caught.value.exceptions[0]) == ["operation 3"]


async def test_a_failure_of_a_map_says_which_item_it_was() -> None:
    """With map the note shows the item too."""

    async def fetch(url: str) -> None:
        if "bad" in url:
            raise OSError

    urls = ["https://a", "https://b", "https://c", "https://bad"]
    with pytest.raises(OperationsFailedError) as caught:
        await map_with_limit(None, fetch, urls)
    assert operation_notes(caught.value.exceptions[0]) == ["operation 3: 'https://bad'"]


@pytest.mark.parametrize("length", [20, 80, 100_000])
async def test_a_note_shows_a_usual_item_whole_and_a_huge_one_in_part(length: int) -> None:
    """A URL can be copied from the note; a megabyte of data does not flood the traceback."""
    item = "https://example.org/".ljust(length, "x")
    with pytest.raises(OperationsFailedError) as caught:
        await map_with_limit(None, lambda _: fails(OSError()), [item])
    (note,) = operation_notes(caught.value.exceptions[0])
    assert note.startswith("operation 0: 'https://ex")
    assert len(note) <= 1000
    assert (repr(item) in note) == (length < 1000)


async def test_one_instance_gets_one_note() -> None:
    """An error that several operations raise is not covered with notes."""
    error = OSError()
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, [partial(fails, error)] * 20, on_error="continue")
    assert len(operation_notes(error)) == 1
    assert caught.value.message == "20 of 20 operations failed"


async def test_a_group_from_an_operation_is_one_failure() -> None:
    """A nursery inside an operation raises a group; it stays the object that it is."""
    inner = ExceptionGroup("inner", [OSError(), ValueError()])
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, [partial(fails, inner)])
    assert caught.value.exceptions == (inner,)
    assert operation_notes(inner) == ["operation 0"]
    assert caught.value.message == "1 of 1 operations failed"


class UnprintableItem:
    """An item whose repr fails."""

    def __repr__(self) -> str:
        raise ZeroDivisionError


async def test_an_item_without_a_repr_does_not_hide_the_failure() -> None:
    """The note is a courtesy: where it can't be made, the error comes out all the same."""
    error = OSError()

    async def fail(item: object) -> None:
        raise error

    with pytest.raises(OperationsFailedError) as caught:
        await map_with_limit(None, fail, [UnprintableItem()])
    assert caught.value.exceptions == (error,)


class FrozenError(Exception):
    """An error that refuses attributes, as a frozen dataclass does."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


async def test_an_error_that_takes_no_notes_comes_out_all_the_same() -> None:
    """Frozen errors can't carry a note; they are raised without it."""
    error = FrozenError()
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, [partial(fails, error)])
    assert caught.value.exceptions == (error,)


def package_frames(error: BaseException) -> list[str]:
    """The names of the frames of this library in the error's traceback."""
    package = str(Path(trio_resilience.__file__).parent)
    names, traceback = list[str](), error.__traceback__
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if code.co_filename.startswith(package):
            names.append(code.co_qualname)
        traceback = traceback.tb_next
    return names


@pytest.mark.parametrize("park", [True, False])
async def test_collected_errors_are_left_as_they_were(
    autojump_clock: MockClock, park: bool
) -> None:
    """No notes on them, and in their tracebacks the operation's frames but none of ours."""

    async def fetch() -> None:
        if park:
            await trio.sleep(1)
        raise OSError

    collected, *_ = await run_with_limit(None, [fetch], on_error="collect")
    assert isinstance(collected, outcome.Error)
    assert operation_notes(collected.error) == []
    assert package_frames(collected.error) == []
    assert collected.error.__traceback__ is not None
    assert collected.error.__traceback__.tb_frame.f_code.co_name == "fetch"


async def test_collected_timeouts_are_left_as_they_were(autojump_clock: MockClock) -> None:
    """Our own timeout, collected, carries no note either."""
    collected, *_ = await run_with_limit(None, [trio.sleep_forever], on_error="collect", timeout=1)
    assert isinstance(collected, outcome.Error)
    assert isinstance(collected.error, OperationTimeoutError)
    assert operation_notes(collected.error) == []


async def test_a_raised_error_leads_to_the_line_that_raised_it() -> None:
    """The traceback of a leaf ends in the operation's own code, its context is its own."""
    error = OSError()

    async def fetch() -> None:
        raise error

    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, [fetch])
    frame, traceback = "", error.__traceback__
    while traceback is not None:
        frame, traceback = traceback.tb_frame.f_code.co_name, traceback.tb_next
    assert frame == "fetch"
    assert error.__context__ is None
    assert error.__cause__ is None
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None


async def test_an_error_raised_again_and_again_gathers_no_frames_of_ours() -> None:
    """One instance raised five hundred times has its operations' frames, and no chain."""
    error = OSError()
    await run_with_limit(None, [partial(fails, error)] * 500, on_error="collect", max_concurrency=1)
    assert package_frames(error) == []
    assert error.__context__ is None
