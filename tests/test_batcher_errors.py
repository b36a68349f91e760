"""What a failing `process` does to those who wait: each gets an error of its own, and it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import attrs
import outcome
import pytest
import trio

from tests.operations import fails, foreign_nursery, leaves
from tests.test_batcher import settle, submit_all
from trio_resilience import (
    BatchFlushed,
    OperationsCancelledError,
    ResilienceError,
    open_batcher,
    subscribe,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

    from trio_resilience import Event


def errors_of(outcomes: dict[Any, Any]) -> list[Exception]:
    """The errors of submitters, in the order of their items."""
    return [outcomes[item].error for item in sorted(outcomes)]


async def fail_with(error: Exception, count: int = 3) -> list[Exception]:
    """The errors that *count* submitters get when `process` raises *error*."""

    async def process(items: list[int]) -> None:
        await fails(error)

    async with open_batcher(None, process, batch_size=count, max_age=60) as batcher:
        async with trio.open_nursery() as nursery:
            outcomes = await submit_all(nursery, batcher, range(count))
        assert batcher.statistics().failures == 1
    return errors_of(outcomes)


async def test_each_submitter_gets_an_error_of_its_own() -> None:
    """Of the same type, with the same text and attributes, and the original as its cause."""
    original = FileNotFoundError(2, "No such file", "data.txt")
    original.add_note("told by process")
    got = await fail_with(original)
    assert [type(each) for each in got] == [FileNotFoundError] * 3
    assert {str(each) for each in got} == {str(original)}
    assert all(each.__cause__ is original for each in got)
    assert len({id(each) for each in [*got, original]}) == 4
    got[0].add_note("told by a submitter")
    assert [getattr(each, "__notes__", None) for each in [original, *got[1:]]] == [
        ["told by process"]
    ] * 3


class HttpError(Exception):
    """It makes its message of another argument."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class TwoArgumentsError(Exception):
    """Its `__init__` takes more than `args` holds."""

    def __init__(self, host: str, port: int) -> None:
        super().__init__(f"{host}:{port}")
        self.host = host


class ItselfError(Exception):
    """Its copy is itself."""

    def __copy__(self) -> Self:
        return self


class AnotherError(Exception):
    """Its copy is something else."""

    def __copy__(self) -> Exception:
        return KeyError()


@attrs.frozen(eq=False)
class FrozenError(Exception):
    """An attrs class that refuses changes."""

    code: int


class SealedError(Exception):
    """It refuses attributes."""

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)


@pytest.mark.parametrize(
    "original",
    [
        HttpError(503),
        TwoArgumentsError("localhost", 80),
        ItselfError("text", 1),
        AnotherError("text"),
        FrozenError(7),
        SealedError("text"),
        KeyError("key"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
        ExceptionGroup("group", [OSError(1)]),
    ],
    ids=lambda each: type(each).__name__,
)
async def test_whatever_its_class_an_error_is_copied(original: Exception) -> None:
    """Also if its `__init__` takes other arguments, or if it refuses to be copied or changed."""
    for each in await fail_with(original):
        assert type(each) is type(original)
        assert each is not original
        assert (str(each), each.args) == (str(original), original.args)
        assert vars(each).items() >= vars(original).items()
        assert each.__cause__ is original


class UncopyableError(Exception):
    """It can be made with three arguments only, and forgets them."""

    def __new__(cls, *args: object) -> Self:
        if len(args) != 3:
            raise RuntimeError("made in one place only")
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        super().__init__("text")


async def test_what_cannot_be_copied_is_named() -> None:
    """Then a ResilienceError tells what it was; nobody is left waiting."""
    original = UncopyableError(1, 2, 3)
    for each in await fail_with(original):
        assert type(each) is ResilienceError
        assert str(each) == "UncopyableError('text')"
        assert each.__cause__ is original


async def test_a_batcher_outlives_its_failures(autojump_clock: MockClock) -> None:
    """The next batch is processed as if nothing had been."""
    failures: list[Exception] = [OSError("1"), ValueError("2")]

    async def process(items: list[int]) -> list[int]:
        await trio.lowlevel.checkpoint()
        if failures:
            raise failures.pop(0)
        return items

    async with open_batcher(None, process) as batcher:
        with pytest.raises(OSError, match="1"):
            await batcher.submit(1)
        with pytest.raises(ValueError, match="2"):
            await batcher.submit(2)
        assert await batcher.submit(3) == 3


async def test_an_error_of_one_item_is_that_items_alone() -> None:
    """That very error, in an `outcome.Error`; the others get their results."""
    errors = [OSError("first"), KeyError("third")]

    async def process(items: list[int]) -> list[outcome.Value[int] | outcome.Error]:
        return [outcome.Error(errors[0]), outcome.Value(1), outcome.Error(errors[1])]

    async with open_batcher(None, process, batch_size=3) as batcher:
        async with trio.open_nursery() as nursery:
            outcomes = await submit_all(nursery, batcher, range(3))
        assert (batcher.statistics().failures, batcher.statistics().items) == (0, 3)
    assert [outcomes[0].error, outcomes[1].unwrap(), outcomes[2].error] == [errors[0], 1, errors[1]]
    assert errors[0].__cause__ is None


async def test_one_error_of_several_items_is_copied_for_each(autojump_clock: MockClock) -> None:
    """Of several in one batch, and when a later batch has it again."""
    error = OSError("the same")
    kept = outcome.Error(error)

    async def process(items: list[int]) -> list[Any]:
        return [kept if item < 2 else outcome.Error(error) for item in items]

    async with open_batcher(None, process, batch_size=3) as batcher:
        async with trio.open_nursery() as nursery:
            outcomes = await submit_all(nursery, batcher, range(3))
        alone = await outcome.acapture(batcher.submit, 3)
        again = await outcome.acapture(batcher.submit, 4)
    assert isinstance(alone, outcome.Error)
    assert isinstance(again, outcome.Error)
    assert alone.error is error
    copies = [*errors_of(outcomes), again.error]
    assert len({id(each) for each in [*copies, error]}) == 5
    assert all(each.__cause__ is error for each in copies)


@pytest.mark.parametrize("count", [0, 3, 5])
async def test_a_wrong_number_of_results_fails_everybody(count: int) -> None:
    """A ValueError for each that says how many there should have been; no result is guessed."""

    async def process(items: list[int]) -> list[int]:
        return [0] * count

    async with (
        open_batcher(None, process, batch_size=4) as batcher,
        trio.open_nursery() as nursery,
    ):
        outcomes = await submit_all(nursery, batcher, range(4))
    got = errors_of(outcomes)
    assert [type(each) for each in got] == [ValueError] * 4
    assert {str(each) for each in got} == {f"`process` returned {count} results for 4 items"}
    assert len({id(each) for each in got}) == 4
    assert [each.__cause__ for each in got] == [None] * 4


@pytest.mark.parametrize(
    "results", ["ab", b"ab", {"a": 1, "b": 2}, {1, 2}, (each for each in [1, 2]), 2]
)
async def test_what_is_no_sequence_fails_everybody(results: Any) -> None:
    """A TypeError for each; a string of the right length is no list of results either."""

    async def process(items: list[int]) -> Any:
        return results

    async with (
        open_batcher(None, process, batch_size=2) as batcher,
        trio.open_nursery() as nursery,
    ):
        outcomes = await submit_all(nursery, batcher, range(2))
    first, second = errors_of(outcomes)
    assert (type(first), type(second)) == (TypeError, TypeError)
    assert first is not second
    assert "`process` must return a list" in str(first)


class GivesBack:
    """Only its call shows that it is not async."""

    def __call__(self, items: list[int]) -> list[int]:
        return items


async def test_a_process_that_cannot_be_awaited_fails_its_batch() -> None:
    """A TypeError that says what it returned instead."""
    process: Any = GivesBack()
    async with open_batcher(None, process, max_age=0) as batcher:
        with pytest.raises(TypeError, match=r"returned \[1\], which can't be awaited"):
            await batcher.submit(1)


async def test_a_process_that_corrupts_its_cancel_scopes_fails_its_batch() -> None:
    """Trio's error about it reaches those who wait."""

    async def process(items: list[int]) -> list[int]:
        if items == [1]:
            trio.CancelScope().__enter__()
        return items

    async with open_batcher(None, process, max_age=0) as batcher:
        with pytest.raises(RuntimeError, match="stack corrupted"):
            await batcher.submit(1)
        assert await batcher.submit(2) == 2


async def clean_up_badly() -> None:
    try:
        await trio.sleep_forever()
    finally:
        raise OSError("clean-up")


async def process_badly(items: list[int]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(clean_up_badly)
        nursery.start_soon(trio.sleep_forever)


async def test_a_cancelled_batch_that_raises_instead(autojump_clock: MockClock) -> None:
    """Nobody waits for it any more; listeners hear of its error."""
    heard = list["Event"]()
    with subscribe(heard.append):
        async with open_batcher(None, process_badly, batch_size=1) as batcher:
            with trio.move_on_after(1):
                await batcher.submit(0)
    (event,) = heard
    assert isinstance(event, BatchFlushed)
    assert event.error is not None
    assert [str(each) for each in leaves(event.error)] == ["clean-up"]


async def test_an_error_beside_the_cancellation_of_the_nursery(autojump_clock: MockClock) -> None:
    """The opener gets it, in a group; the one who waits is told of the cancellation."""
    async with foreign_nursery() as nursery, trio.open_nursery() as submitters:
        with pytest.raises(ExceptionGroup) as caught:
            async with open_batcher(nursery, process_badly, batch_size=1) as batcher:
                outcomes = await submit_all(submitters, batcher, [0])
                nursery.cancel_scope.cancel()
                await settle()
                assert isinstance(outcomes[0].error, OperationsCancelledError)
    assert [str(each) for each in leaves(caught.value)] == ["clean-up"]


async def returns_late(value: int) -> int:
    await trio.lowlevel.checkpoint()
    return value


async def test_a_stray_cancellation_stops_the_batcher() -> None:
    """A `process` that keeps the `Cancelled` of a scope of its own and returns it as a result."""

    async def process(items: list[int]) -> list[outcome.Value[int] | outcome.Error]:
        kept = list[outcome.Value[int] | outcome.Error]()
        with trio.CancelScope() as scope:
            scope.cancel()
            kept.append(await outcome.acapture(returns_late, 1))
        return kept

    async with foreign_nursery() as nursery:
        with pytest.raises(OperationsCancelledError):
            async with open_batcher(nursery, process, batch_size=1) as batcher:
                with pytest.raises(OperationsCancelledError):
                    await batcher.submit(0)
        assert not nursery.cancel_scope.cancel_called
