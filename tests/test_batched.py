"""A stream in batches: by size, by age, or because it has ended; every item in exactly one."""

from __future__ import annotations

import math
from contextlib import aclosing
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import attrs
import pytest
import trio
import trio.testing

from tests.operations import Source, Stopwatch, foreign_nursery, leaves
from trio_resilience import OperationsCancelledError, batched

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from trio_resilience import Batches

given_or_not = pytest.mark.parametrize("given", [True, False], ids=["given", "own"])


async def ticks(*pauses: float) -> AsyncIterator[int]:
    """Numbers from zero, each after its pause."""
    for number, pause in enumerate(pauses):
        await trio.sleep(pause)
        yield number


async def collect(batches: Batches[int]) -> list[tuple[float, list[int]]]:
    """Every batch, and when it came."""
    watch = Stopwatch()
    return [(watch.seconds, batch) async for batch in batches]


@given_or_not
async def test_a_batch_is_due_when_it_is_full_or_the_source_has_ended(
    autojump_clock: MockClock, given: bool
) -> None:
    """Without a limit of age nothing else counts."""
    async with foreign_nursery() as nursery:
        source = ticks(1, 1, 1, 1, 1000)
        async with batched(nursery if given else None, source, batch_size=2) as batches:
            assert await collect(batches) == [(2, [0, 1]), (4, [2, 3]), (1004, [4])]
        assert not nursery.child_tasks


async def test_a_batch_is_due_when_its_oldest_item_is_old_enough(autojump_clock: MockClock) -> None:
    """The age counts from when that was pulled, and the source is not disturbed by it."""
    source = ticks(1, 1, 1, 1.5, 9)
    async with batched(None, source, batch_size=9, max_age=timedelta(seconds=3)) as batches:
        assert await collect(batches) == [(4, [0, 1, 2]), (7.5, [3]), (13.5, [4])]


async def test_an_age_of_zero_takes_what_is_there(autojump_clock: MockClock) -> None:
    """What comes in one pass of the scheduler, no more and no less."""
    source = ticks(1, 1, 0, 0)
    async with batched(None, source, batch_size=9, max_age=0) as batches:
        got = await collect(batches)
    assert got[0] == (1, [0])
    assert [item for _, batch in got for item in batch] == [0, 1, 2, 3]


async def test_a_memory_channel_is_left_open(autojump_clock: MockClock) -> None:
    """It is somebody else's."""
    send, receive = trio.open_memory_channel[int](10)
    for item in range(5):
        send.send_nowait(item)
    async with batched(None, receive, batch_size=2, max_age=1) as batches:
        got = [await anext(batches) for _ in range(3)]
    assert got == [[0, 1], [2, 3], [4]]
    send.send_nowait(5)
    assert await receive.receive() == 5


async def test_while_the_consumer_is_busy_the_next_batch_fills(autojump_clock: MockClock) -> None:
    """Up to *batch_size* items; beyond that the source is held back."""
    source = Source()
    got = list[list[int]]()
    async with batched(None, source.async_of(range(10)), batch_size=4, max_age=1) as batches:
        async for batch in batches:
            got.append(batch)
            await trio.sleep(5)
            assert source.pulled == min(10, 4 * len(got) + 4)
    assert got == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


async def test_an_old_batch_is_taken_as_soon_as_the_consumer_is_back(
    autojump_clock: MockClock,
) -> None:
    """It has gone on filling meanwhile; its age is that of its oldest."""
    async with batched(None, ticks(0, 1, 1.5, 1, 9), batch_size=9, max_age=2) as batches:
        watch = Stopwatch()
        assert await anext(batches) == [0, 1]
        assert watch.seconds == 2
        await trio.sleep(3.5)
        assert await anext(batches) == [2, 3]
        assert watch.seconds == 5.5


async def test_an_empty_source_yields_nothing() -> None:
    """And the iterator goes on saying so."""
    async with batched(None, ticks(), batch_size=2) as batches:
        assert await collect(batches) == []
        assert await collect(batches) == []


async def test_iterating_is_a_checkpoint_though_a_batch_is_there() -> None:
    """So a loop over a quick source does not freeze the program."""
    async with batched(None, ticks(0, 0, 0), batch_size=2) as batches:
        await trio.testing.wait_all_tasks_blocked()
        with trio.testing.assert_checkpoints():
            assert await anext(batches) == [0, 1]
        with trio.CancelScope() as scope:
            scope.cancel()
            await anext(batches)
        assert scope.cancelled_caught
        assert await anext(batches) == [2]


async def test_a_source_without_checkpoints_fills_one_batch_at_a_time() -> None:
    """And then gives way, to be stopped like any other."""
    pulled = list[int]()

    async def endless() -> AsyncIterator[int]:
        while True:
            pulled.append(len(pulled))
            yield pulled[-1]

    async with batched(None, endless(), batch_size=3) as batches:
        assert [await anext(batches), await anext(batches)] == [[0, 1, 2], [3, 4, 5]]
        assert len(pulled) <= 9


async def test_the_error_of_the_source_comes_last_and_as_it_is(autojump_clock: MockClock) -> None:
    """After the items that came before it; then the iterator has ended."""
    error = OSError()

    async def source() -> AsyncIterator[int]:
        for number in range(3):
            yield number
        raise error

    async with batched(None, source(), batch_size=2) as batches:
        assert [await anext(batches), await anext(batches)] == [[0, 1], [2]]
        with pytest.raises(OSError) as caught:  # noqa: PT011 - that very object
            await anext(batches)
        assert caught.value is error
        assert await collect(batches) == []


@given_or_not
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)])
async def test_what_is_no_exception_comes_out_as_it_is_too(
    given: bool, stop: BaseException
) -> None:
    """It crashes no nursery on its way."""

    async def source() -> AsyncIterator[int]:
        yield 1
        raise stop

    async with foreign_nursery() as nursery:
        async with batched(nursery if given else None, source(), batch_size=2) as batches:
            assert await anext(batches) == [1]
            with pytest.raises(type(stop)) as caught:
                await anext(batches)
            assert caught.value is stop
        assert not nursery.cancel_scope.cancel_called


@pytest.mark.parametrize("body_raises", [False, True])
async def test_an_error_that_was_not_seen_raises_at_the_end(body_raises: bool) -> None:
    """Unless the body has an error of its own: then it is the context of that."""
    error = OSError("source")

    async def source() -> AsyncIterator[int]:
        yield 1
        raise error

    with pytest.raises(KeyError if body_raises else OSError) as caught:
        async with batched(None, source(), batch_size=2):
            await trio.testing.wait_all_tasks_blocked()
            if body_raises:
                raise KeyError
    assert (caught.value.__context__ if body_raises else caught.value) is error


@given_or_not
async def test_leaving_early_stops_the_source(autojump_clock: MockClock, given: bool) -> None:
    """An async generator is closed by the task that pulls it, before the block has ended."""
    source, watch = Source(), Stopwatch()
    async with foreign_nursery() as nursery:
        items = source.async_of(range(100), pause=1)
        async with batched(nursery if given else None, items, batch_size=2) as batches:
            assert await anext(batches) == [0, 1]
        assert (source.closed, source.pulled, watch.seconds) == (True, 2, 2)
        assert not nursery.child_tasks


@attrs.define(eq=False)
class Untidy:
    """A source that is closed somewhere, and raises there if it is *bad*."""

    pause: float
    bad: str
    closed: int = 0

    def close(self, where: str) -> None:
        self.closed += where != "child"
        if self.bad == where:
            raise OSError("clean-up")

    async def plain(self, where: str = "plain") -> AsyncIterator[int]:
        try:
            while True:
                await trio.sleep(self.pause)
                yield 1
        finally:
            self.close(where)

    async def nursery(self) -> AsyncIterator[int]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.child)
            async with aclosing(cast("Any", self.plain("nursery"))) as items:
                async for item in items:
                    yield item

    async def empty_nursery(self) -> AsyncIterator[int]:
        async with trio.open_nursery(), aclosing(cast("Any", self.plain())) as items:
            async for item in items:
                yield item

    async def child(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.close("child")


@pytest.mark.parametrize("pause", [1, 9], ids=["waiting for room", "waiting for an item"])
@pytest.mark.parametrize("kind", [Untidy.plain, Untidy.nursery, Untidy.empty_nursery])
@pytest.mark.parametrize("bad", ["nowhere", "plain", "nursery", "child"])
async def test_a_generator_is_closed_wherever_it_is(
    autojump_clock: MockClock, pause: float, kind: Any, bad: str
) -> None:
    """What its clean-up raises comes out; what closes it does not."""
    source, errors = Untidy(pause, bad), list[BaseException]()
    try:
        async with batched(None, kind(source), batch_size=2):
            await trio.sleep(5)
    except (OSError, BaseExceptionGroup) as error:
        errors = leaves(error)
    is_bad = (
        bad
        in {
            Untidy.plain: ["plain"],
            Untidy.nursery: ["nursery", "child"],
            Untidy.empty_nursery: ["plain"],
        }[kind]
    )
    assert [str(each) for each in errors] == ["clean-up"] * is_bad
    assert source.closed == 1


async def test_a_group_from_a_clean_up_keeps_its_cause() -> None:
    """As the generator has raised it."""
    error, cause = OSError(), KeyError()

    async def source() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            raise ExceptionGroup("clean-up", [error]) from cause

    with pytest.raises(ExceptionGroup) as caught:
        async with batched(None, source(), batch_size=1):
            await trio.testing.wait_all_tasks_blocked()
    assert caught.value.exceptions == (error,)
    assert caught.value.__cause__ is cause


@given_or_not
async def test_an_error_of_the_body_leaves_unwrapped(given: bool) -> None:
    """The same object, without a context of ours."""
    error = KeyError()
    async with foreign_nursery() as nursery:
        with pytest.raises(KeyError) as caught:
            async with batched(nursery if given else None, ticks(0, 9), batch_size=2):
                raise error
    assert caught.value is error
    assert error.__context__ is None


async def test_a_cancelled_nursery_is_told_after_the_rest(autojump_clock: MockClock) -> None:
    """What was pulled is delivered; then OperationsCancelledError, once."""
    async with (
        foreign_nursery() as nursery,
        batched(nursery, ticks(1, 1, 1, 9), batch_size=2) as batches,
    ):
        nursery.cancel_scope.deadline = trio.current_time() + 3.5
        assert [await anext(batches), await anext(batches)] == [[0, 1], [2]]
        with pytest.raises(OperationsCancelledError):
            await anext(batches)
        assert await collect(batches) == []


@given_or_not
async def test_a_cancelled_consumer_cancels_and_joins(
    autojump_clock: MockClock, given: bool
) -> None:
    """Wherever the nursery lies."""
    source, watch = Source(), Stopwatch()
    async with foreign_nursery() as nursery:
        with trio.move_on_after(3.5) as scope:
            items = source.async_of(range(9), pause=1)
            async with batched(nursery if given else None, items, batch_size=2) as batches:
                await collect(batches)
        assert scope.cancelled_caught
        assert not nursery.child_tasks
    assert (source.closed, watch.seconds) == (True, 3.5)


async def test_a_cancelled_wait_takes_no_item_with_it(autojump_clock: MockClock) -> None:
    """At any time, also at the instant at which a batch is due."""
    got = list[int]()
    async with batched(None, ticks(*[1] * 20), batch_size=4, max_age=2) as batches:
        while len(got) < 20:
            with trio.move_on_after(0.5):
                got += await anext(batches)
    assert got == list(range(20))


async def test_two_consumers_at_once_are_refused(autojump_clock: MockClock) -> None:
    """The second of them gets BusyResourceError, the first its batch."""
    got = list[list[int]]()

    async def consume() -> None:
        got.append(await anext(batches))

    async with batched(None, ticks(1), batch_size=2) as batches, trio.open_nursery() as nursery:
        nursery.start_soon(consume)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await anext(batches)
    assert got == [[0]]


async def test_a_block_that_has_ended_is_closed(autojump_clock: MockClock) -> None:
    """For whoever iterates then, and for whoever waits when it ends."""
    errors = list[type[BaseException]]()

    async def consume() -> None:
        with pytest.raises(trio.ClosedResourceError) as caught:
            await anext(batches)
        errors.append(caught.type)

    async with trio.open_nursery() as nursery, batched(None, ticks(9), batch_size=2) as batches:
        nursery.start_soon(consume)
        await trio.sleep(1)
    assert errors == [trio.ClosedResourceError]
    with pytest.raises(trio.ClosedResourceError):
        await anext(batches)
    with pytest.raises(RuntimeError, match="once"):
        await batches.__aenter__()


async def test_iterating_without_the_block_shows_the_fix() -> None:
    """A TypeError that says what to write."""
    batches: Any = batched(None, ticks(1), batch_size=2)
    with pytest.raises(TypeError, match="async with batched"):
        async for _ in batches:
            pass


async def test_repr_shows_what_is_held(autojump_clock: MockClock) -> None:
    """Before, in and after the block."""
    batches = batched(None, ticks(0, 0, 0), batch_size=9, max_age=math.inf, name="rows")
    assert repr(batches) == "<batched 'rows': not entered, 0 held>"
    async with batches:
        await trio.testing.wait_all_tasks_blocked()
        assert repr(batches) == "<batched 'rows': open, 3 held>"
    assert repr(batches) == "<batched 'rows': closed, 0 held>"
