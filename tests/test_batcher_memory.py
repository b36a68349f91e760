"""That nothing grows with the flushes of a batcher, and that it keeps nothing alive."""

from __future__ import annotations

import contextlib
import gc
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio

from tests.operations import reachable
from tests.test_batcher import settle
from tests.test_batcher_errors import UncopyableError
from trio_resilience import batched, open_batcher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from trio.testing import MockClock


def depth(error: BaseException) -> int:
    return len(list(traceback.walk_tb(error.__traceback__)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("by_item", [False, True])
async def test_tracebacks_do_not_grow_with_the_flushes(by_item: bool, nested: bool) -> None:
    """A `process` that raises, or returns, one and the same instance again and again."""
    error = OSError("always this one")

    async def process(items: list[int]) -> list[Any]:
        if by_item:
            return [outcome.Error(error)]
        return await process_deep(items, 3 if nested else 0)

    async def process_deep(items: list[int], more: int) -> list[Any]:
        if more:
            return await process_deep(items, more - 1)
        raise error

    caught: Exception = error
    async with open_batcher(None, process, batch_size=1) as batcher:
        for _ in range(100):
            with pytest.raises(OSError, match="always") as info:
                await batcher.submit(1)
            caught = info.value
    shown = traceback.format_exception(caught)
    assert depth(error) < 20
    assert depth(caught) < 20
    assert len(reachable(caught)) == 2
    if not by_item:
        assert "".join(shown).count("in process_deep") == (4 if nested else 1)


@pytest.mark.parametrize("by_item", [False, True])
async def test_the_frames_of_another_batcher_are_kept(by_item: bool) -> None:
    """A `process` that passes on what another batcher has raised says where that came from."""

    async def process_inside(items: list[int]) -> list[int]:
        raise OSError("inside")

    async def process_outside(items: list[int]) -> list[Any]:
        try:
            return [await inner.submit(item) for item in items]
        except OSError as error:
            if by_item:
                seen.append(error)
                return [outcome.Error(error)]
            raise error.__cause__ or error from None

    seen = list[BaseException]()
    async with (
        open_batcher(None, process_inside, batch_size=1) as inner,
        open_batcher(None, process_outside, batch_size=1) as outer,
    ):
        with pytest.raises(OSError, match="inside") as caught:
            await outer.submit(1)
    assert by_item == (caught.value in seen)
    assert "in process_inside" in "".join(traceback.format_exception(caught.value))


class Local:
    """Something that `process` or a submitter holds, to see whether it is let go."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the collector, what is part of a cycle is never let go."""
    gc.disable()
    yield
    gc.enable()


async def return_items(items: list[Local]) -> list[Local]:
    return items


async def return_too_few(items: list[Local]) -> list[Local]:
    return items[1:]


async def raise_error(items: list[Local]) -> None:
    raise OSError


async def raise_uncopyable(items: list[Local]) -> None:
    raise UncopyableError(1, 2, 3)


async def return_errors(items: list[Local]) -> list[outcome.Error]:
    return [outcome.Error(OSError()) for _ in items]


async def return_the_same_error(items: list[Local]) -> list[outcome.Error]:
    return [outcome.Error(OSError())] * len(items)


async def raise_in_a_nursery(items: list[Local]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raise_error, items)


async def wait(items: list[Local]) -> None:
    await trio.sleep(1)


PROCESSES = [
    return_items, return_too_few, raise_error, raise_uncopyable, return_errors,
    return_the_same_error, raise_in_a_nursery, wait,
]  # fmt: skip


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("timeout", [0.5, 2])
async def test_nothing_is_kept_alive(
    autojump_clock: MockClock, no_collector: None, process: Any, timeout: float
) -> None:
    """When a submitter has its answer, or was cancelled, nothing of its item is left."""
    held = list[weakref.ref[Local]]()

    async def submit(call: Callable[[Any], Awaitable[object]]) -> None:
        item = Local()
        held.append(weakref.ref(item))
        with contextlib.suppress(Exception), trio.move_on_after(timeout):
            await call(item)

    async with open_batcher(None, process, batch_size=2) as batcher:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(submit, batcher.submit)
        await settle()
        assert [ref() for ref in held] == [None] * 3


@pytest.mark.parametrize("ending", ["end", "break", "error", "cancelled"])
async def test_nothing_of_a_stream_is_kept_alive(
    autojump_clock: MockClock, no_collector: None, ending: str
) -> None:
    """Neither its items nor its error, when they were taken and handled."""
    held = list[weakref.ref[Local]]()

    async def source() -> AsyncIterator[Local]:
        for _ in range(3):
            item = Local()
            held.append(weakref.ref(item))
            yield item
        await trio.sleep(9)
        if ending == "error":
            raise OSError

    async def consume() -> None:
        with contextlib.suppress(OSError):
            async with batched(None, source(), batch_size=2) as batches:
                async for _ in batches:
                    if ending == "break":
                        break

    with trio.move_on_after(5 if ending == "cancelled" else 99):
        await consume()
    assert held
    assert [ref() for ref in held] == [None] * 3
