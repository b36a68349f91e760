"""Where a batcher runs `process`: beneath the nursery, in the opener's context, and for whom."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio
import trio.testing

from tests.operations import ancestors, closed_nursery, fails, foreign_nursery, returns
from tests.test_batcher import Tens, settle
from trio_resilience import BatchFlushed, batched, open_batcher, subscribe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from trio.testing import MockClock

    from trio_resilience import Event


async def test_process_never_submits_to_its_own_batcher(autojump_clock: MockClock) -> None:
    """A RuntimeError instead of a deadlock; another batcher is no problem, nor the time after."""
    later = list[int]()

    async def process(items: list[int]) -> list[int]:
        assert await other.submit(1) == 10
        assert await helper.submit(1) == 10
        with trio.testing.assert_checkpoints(), pytest.raises(RuntimeError, match="itself"):
            await batcher.submit(2)
        return items

    async def process_within(items: list[int]) -> list[int]:
        async with open_batcher(None, process_more) as inner:
            return [await inner.submit(item) for item in items]

    async def process_more(items: list[int]) -> list[int]:
        with pytest.raises(RuntimeError, match="'outer'"):
            await outer.submit(2)
        if items == [1]:
            background.start_soon(submit_in_background)
        return items

    async def submit_in_background() -> None:
        await trio.sleep(5)
        later.append(await outer.submit(3))

    async with (
        open_batcher(None, Tens()) as other,
        open_batcher(None, process, name="own") as batcher,
        open_batcher(None, Tens()) as helper,
    ):
        assert await batcher.submit(1) == 1
    async with (
        trio.open_nursery() as background,
        open_batcher(None, process_within, name="outer") as outer,
    ):
        assert await outer.submit(1) == 1
        await trio.sleep(10)
    assert later == [3]


async def test_process_runs_beneath_the_nursery() -> None:
    """The caller's task tree shows it."""
    seen = list[list[trio.Nursery]]()

    async def process(items: list[int]) -> None:
        seen.append(ancestors(trio.lowlevel.current_task()))

    async with foreign_nursery() as nursery, open_batcher(nursery, process) as batcher:
        await batcher.submit(1)
        assert nursery in seen[0]


variable = ContextVar("variable", default="none")


async def test_process_sees_the_context_of_the_opener(autojump_clock: MockClock) -> None:
    """Not that of a submitter; and each call a copy of it, so that nothing set in one lasts."""
    seen = list[str]()

    async def process(items: list[int]) -> None:
        seen.append(variable.get())
        variable.set("process")

    async def submit() -> None:
        variable.set("submitter")
        await batcher.submit(0)

    variable.set("opener")
    async with open_batcher(None, process, batch_size=1) as batcher, trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(submit)
        await settle()
        variable.set("opener later")
        nursery.start_soon(submit)
    assert seen == ["opener", "opener", "opener later"]
    assert variable.get() == "opener later"


async def test_the_listeners_of_the_opener_hear_of_flushes(autojump_clock: MockClock) -> None:
    """One event for every batch that was processed: why, how many, how long, and what failed."""
    heard, unheard = list["Event"](), list["Event"]()
    error = OSError()

    async def process(items: list[int]) -> None:
        await trio.sleep(items[0])
        if items[0] == 2:
            raise error

    async def submit(item: int) -> None:
        with subscribe(unheard.append):
            await outcome.acapture(batcher.submit, item)

    with subscribe(heard.append):
        async with (
            trio.open_nursery() as nursery,
            open_batcher(None, process, batch_size=2, max_age=3, name="b") as batcher,
        ):
            for item in [1, 0, 2]:
                nursery.start_soon(submit, item)
                await settle()
            await trio.sleep(9)
            nursery.start_soon(submit, 3)
            await settle()
    fields = [
        (each.size, each.reason, round(each.duration, 6), each.error, each.cancelled)
        for each in heard
        if isinstance(each, BatchFlushed)
    ]
    assert fields == [
        (2, "size", 1, None, False),
        (1, "age", 2, error, False),
        (1, "close", 3, None, False),
    ]
    assert {(each.policy, each.task) for each in heard} == {("b", "b flush")}
    assert "process" in heard[0].operation
    assert unheard == []


async def test_a_source_is_pulled_in_the_context_of_the_opener() -> None:
    """Beneath the nursery; what it sets is seen there, as if the opener pulled it."""
    seen = list[tuple[str, list[trio.Nursery]]]()

    async def source() -> AsyncIterator[int]:
        seen.append((variable.get(), ancestors(trio.lowlevel.current_task())))
        variable.set("source")
        yield 1
        await trio.lowlevel.checkpoint()

    variable.set("opener")
    async with foreign_nursery() as nursery:
        async with batched(nursery, source(), batch_size=1) as batches:
            assert await anext(batches) == [1]
        assert (seen[0][0], nursery in seen[0][1]) == ("opener", True)
    assert variable.get() == "source"


# --- what is refused at the door ----------------------------------------------------------------


async def ignore(items: list[int]) -> None:
    """Do nothing."""


BAD_OPTIONS: list[tuple[str, object, type[Exception], str]] = [
    ("batch_size", 0, ValueError, r"`batch_size` must be >= 1, got 0"),
    ("batch_size", True, TypeError, "`batch_size` must be an int, got True"),
    ("batch_size", "5", TypeError, "`batch_size` must be an int, got '5'"),
    ("batch_size", 2.0, TypeError, "`batch_size` must be an int, got 2.0"),
    ("max_age", -1, ValueError, "`max_age` must be >= 0, got -1"),
    ("max_age", float("nan"), ValueError, "`max_age` must be >= 0, got nan"),
    ("max_age", True, TypeError, "`max_age` must be seconds or a timedelta, got True"),
    ("max_age", "5", TypeError, "`max_age` must be seconds or a timedelta, got '5'"),
]
BATCHER_ONLY: list[tuple[str, object, type[Exception], str]] = [
    ("max_concurrency", 0, ValueError, "`max_concurrency` must be >= 1, got 0"),
    ("max_concurrency", float("inf"), TypeError, "`max_concurrency` must be an int, got inf"),
    ("max_concurrency", True, TypeError, "`max_concurrency` must be an int, got True"),
    ("queue_size", 99, ValueError, "`queue_size` must be >= 100, got 99"),
    ("queue_size", False, TypeError, "`queue_size` must be an int, got False"),
]


@pytest.mark.parametrize("option, value, kind, message", BAD_OPTIONS + BATCHER_ONLY)
def test_bad_options_of_a_batcher_are_refused(
    option: str, value: object, kind: type[Exception], message: str
) -> None:
    """At construction, outside of any run."""
    options: dict[str, Any] = {option: value}
    with pytest.raises(kind, match=message):
        open_batcher(None, ignore, **options)


@pytest.mark.parametrize("option, value, kind, message", BAD_OPTIONS)
def test_bad_options_of_batches_are_refused(
    option: str, value: object, kind: type[Exception], message: str
) -> None:
    """Likewise."""
    _, channel = trio.open_memory_channel[int](0)
    options: dict[str, Any] = {"batch_size": 1, option: value}
    with pytest.raises(kind, match=message):
        batched(None, channel, **options)


def sync(items: list[int]) -> list[int]:
    return items


@pytest.mark.parametrize("bad", [sync, 5, None])
def test_what_is_no_async_function_is_refused(bad: Any) -> None:
    """A TypeError that names the option."""
    with pytest.raises(TypeError, match="`process` must be an async function"):
        open_batcher(None, bad)


def test_a_coroutine_object_is_refused_and_closed() -> None:
    """No "never awaited" warning follows."""
    process: Any = returns(1)
    with pytest.raises(TypeError, match="without calling it"):
        open_batcher(None, process)
    source: Any = fails(OSError())
    with pytest.raises(TypeError, match="async iterable"):
        batched(None, source, batch_size=1)


@pytest.mark.parametrize("source", [[1, 2], range(3), iter("abc")])
def test_a_sync_iterable_is_refused(source: Sequence[int]) -> None:
    """A TypeError that names what does without tasks."""
    wrong: Any = source
    with pytest.raises(TypeError, match=r"itertools\.batched"):
        batched(None, wrong, batch_size=2)


def test_what_is_no_iterable_is_refused() -> None:
    """Such as a function that was not called."""
    wrong: Any = foreign_nursery
    with pytest.raises(TypeError, match="`source` must be an async iterable"):
        batched(None, wrong, batch_size=2)


@pytest.mark.parametrize("bad", [5, "nursery", trio.CancelScope()])
def test_what_is_no_nursery_is_refused(bad: Any) -> None:
    """A TypeError that names it, for both."""
    _, channel = trio.open_memory_channel[int](0)
    with pytest.raises(TypeError, match="`nursery` must be a trio"):
        open_batcher(bad, ignore)
    with pytest.raises(TypeError, match="`nursery` must be a trio"):
        batched(bad, channel, batch_size=1)


async def test_a_closed_nursery_is_refused() -> None:
    """A RuntimeError when the block is entered; whoever submits then does not hang."""
    nursery = await closed_nursery()
    batcher = open_batcher(nursery, Tens(0))
    with pytest.raises(RuntimeError, match="`nursery` must be open"):
        await batcher.__aenter__()
    with pytest.raises(RuntimeError, match="async with"):
        await batcher.submit(1)
    _, channel = trio.open_memory_channel[int](0)
    with pytest.raises(RuntimeError, match="`nursery` must be open"):
        await batched(nursery, channel, batch_size=1).__aenter__()


async def test_a_cancelled_opener_enters_nothing() -> None:
    """The block is not begun, and may be entered later."""
    batcher = open_batcher(None, Tens(0))
    with trio.CancelScope() as scope:
        scope.cancel()
        await batcher.__aenter__()
    assert scope.cancelled_caught
    async with batcher:
        assert await batcher.submit(1) == 10
