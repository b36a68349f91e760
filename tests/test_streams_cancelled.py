"""Streams whose consumer or nursery is cancelled, or that are not used as they should be."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio
import trio.testing

from tests.operations import (
    Gauge,
    Source,
    Stopwatch,
    closed_nursery,
    foreign_nursery,
    reachable,
)
from trio_resilience import (
    OperationsCancelledError,
    stream_map_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.testing import MockClock

both = pytest.mark.parametrize("given", [True, False])


async def test_a_cancelled_nursery_ends_the_stream(autojump_clock: MockClock) -> None:
    """Finished results are delivered, then OperationsCancelledError is raised."""
    gauge, got = Gauge(), list[int]()
    async with foreign_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 2.5
        with pytest.raises(OperationsCancelledError):
            async with stream_with_limit(nursery, gauge.ops(1, 2, 9), buffer=5) as results:
                await trio.sleep(5)
                async for index, _ in results:
                    got.append(index)
    assert (got, gauge.cancelled) == ([0, 1], [2])


async def test_a_nursery_cancelled_while_the_consumer_waits(autojump_clock: MockClock) -> None:
    """The waiting consumer is woken and told; it never hangs and never ends as if all was done."""
    watch = Stopwatch()
    async with foreign_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1
        with pytest.raises(OperationsCancelledError):
            async with stream_with_limit(nursery, Gauge().ops(9)) as results:
                async for _ in results:
                    pass
    assert watch.seconds == 1


async def test_a_stream_in_a_cancelled_nursery_runs_nothing() -> None:
    """OperationsCancelledError, and no operation was called."""
    called = list[int]()
    async with foreign_nursery() as nursery:
        nursery.cancel_scope.cancel()
        with pytest.raises(OperationsCancelledError):
            async with stream_map_with_limit(nursery, trio.sleep, [0.0]) as results:
                async for _ in results:
                    called.append(1)
    assert called == []


async def test_a_closed_nursery_is_refused() -> None:
    """A RuntimeError before anything runs, without a warning."""
    nursery, gauge = await closed_nursery(), Gauge()
    with pytest.raises(RuntimeError, match="nursery"):
        async with stream_with_limit(nursery, gauge.ops(0)):
            pass
    assert gauge.started == []


@both
@pytest.mark.parametrize("where", ["in the loop", "in the body"])
async def test_cancelling_the_consumer_cancels_the_stream(
    autojump_clock: MockClock, given: bool, where: str
) -> None:
    """Whether it waits for a result or works on one; operations are joined."""
    gauge, source, watch = Gauge(), Source(), Stopwatch()
    ops = source.of(gauge.op(i, 2 * i + 1) for i in count())
    async with foreign_nursery() as nursery:
        with trio.move_on_after(4) as scope:
            async with stream_with_limit(
                nursery if given else None, ops, max_concurrency=2
            ) as results:
                async for _ in results:
                    if where == "in the body":
                        await trio.sleep_forever()
        assert scope.cancelled_caught
        assert not nursery.child_tasks
    assert (gauge.running, watch.seconds, source.closed) == (0, 4, True)


@both
async def test_a_consumer_cancelled_beforehand(given: bool) -> None:
    """In a cancelled scope the block raises Cancelled and leaves nothing behind."""
    gauge = Gauge()
    async with foreign_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.cancel()
            async with stream_with_limit(nursery if given else None, gauge.ops(1)) as results:
                async for _ in results:
                    pass
        assert scope.cancelled_caught
        assert not nursery.child_tasks
    assert gauge.finished == []


async def test_cancelling_during_the_join_still_joins(autojump_clock: MockClock) -> None:
    """A consumer that left early and is cancelled while waiting for the rest waits on."""
    watch = Stopwatch()

    async def careful() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)

    async with foreign_nursery() as nursery:
        with trio.move_on_after(2):
            async with stream_with_limit(nursery, [careful]):
                await trio.testing.wait_all_tasks_blocked()
        assert not nursery.child_tasks
    assert watch.seconds == 5


async def test_a_finished_stream_does_not_notice_that_its_nursery_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    """All was delivered: the end of the block has nothing to report."""
    async with (
        foreign_nursery() as nursery,
        stream_with_limit(nursery, Gauge().ops(1)) as results,
    ):
        assert [each async for each in results] == [(0, 0)]
        nursery.cancel_scope.cancel()


async def test_a_stream_that_is_never_entered_is_harmless() -> None:
    """It pulls nothing and starts nothing, and no warning follows."""
    gauge, source = Gauge(), Source()
    stream = stream_with_limit(None, source.of(gauge.ops(0)))
    del stream
    await trio.testing.wait_all_tasks_blocked()
    assert (source.pulled, gauge.started) == (0, [])


@pytest.mark.parametrize("mapped", [False, True])
async def test_iterating_without_the_block_shows_the_fix(mapped: bool) -> None:
    """`async for` without `async with` is a TypeError that says what to write."""
    gauge = Gauge()
    stream = cast(
        "Any",
        stream_map_with_limit(None, gauge.run, [0])
        if mapped
        else stream_with_limit(None, gauge.ops(0)),
    )
    with pytest.raises(TypeError, match="async with"):
        async for _ in stream:
            pass
    assert gauge.started == []


async def test_a_block_inside_an_async_generator_is_left_cleanly(
    autojump_clock: MockClock,
) -> None:
    """A generator around the block, closed early by its consumer, cancels and joins."""
    gauge, source = Gauge(), Source()

    async def pages(nursery: trio.Nursery) -> AsyncGenerator[int, None]:
        ops = source.of(gauge.op(i) for i in count())
        async with stream_with_limit(nursery, ops, max_concurrency=2) as results:
            async for _, page in results:
                yield page

    async with foreign_nursery() as nursery:
        generator = pages(nursery)
        async for _ in generator:
            break
        await generator.aclose()
        assert not nursery.child_tasks
    assert (gauge.running, source.closed) == (0, True)


async def test_a_block_can_be_entered_once(autojump_clock: MockClock) -> None:
    """A second time would run everything again: it is a RuntimeError."""
    gauge = Gauge()
    stream = stream_with_limit(None, gauge.ops(1))
    async with stream as results:
        assert [each async for each in results] == [(0, 0)]
    with pytest.raises(RuntimeError, match="once"):
        async with stream:
            pass
    assert gauge.started == [0]


async def test_a_stream_is_over_with_its_block(autojump_clock: MockClock) -> None:
    """Asked for a result after the end of the block, it says so and does not wait for ever."""
    stream = stream_with_limit(None, Gauge().ops(1, 9))
    async with stream as results:
        pass
    with pytest.raises(trio.ClosedResourceError):
        await anext(results)


async def test_one_task_at_a_time_may_take_results(autojump_clock: MockClock) -> None:
    """A second one that waits at the same time is refused, and the first gets its result."""
    got = list[tuple[int, int]]()

    async def take() -> None:
        got.append(await anext(results))

    async with (
        stream_with_limit(None, Gauge().ops(5)) as results,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(take)
        await trio.sleep(1)
        with pytest.raises(trio.BusyResourceError):
            await anext(results)
    assert got == [(0, 0)]


async def test_another_task_may_take_the_results(autojump_clock: MockClock) -> None:
    """The block belongs to the task that opened it, the loop may run in a child."""
    got = list[int]()

    async def consume() -> None:
        got.extend([index async for index, _ in results])

    async with (
        stream_with_limit(None, Gauge().ops(2, 1)) as results,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(consume)
    assert got == [1, 0]


@both
async def test_giving_up_on_one_result_loses_none(autojump_clock: MockClock, given: bool) -> None:
    """A timeout around a single `anext` leaves the stream as it was: the result comes later."""
    got, gauge = list[int](), Gauge()
    async with (
        foreign_nursery() as nursery,
        stream_with_limit(nursery if given else None, gauge.ops(2, 4)) as results,
    ):
        for _ in range(9):
            with trio.move_on_after(0.75):
                index, _ = await anext(results)
                got.append(index)
            if len(got) == 2:
                break
    assert got == [0, 1]
    assert gauge.cancelled == []


@both
async def test_operations_of_a_stream_see_the_deadline_of_its_block(
    autojump_clock: MockClock, given: bool
) -> None:
    """Also in a nursery of somebody else's."""

    async def look() -> float:
        await trio.lowlevel.checkpoint()
        return trio.current_effective_deadline()

    async with foreign_nursery() as nursery:
        with trio.fail_after(50) as scope:
            async with stream_with_limit(nursery if given else None, [look] * 2) as results:
                assert [seen async for _, seen in results] == [scope.deadline] * 2


async def test_the_repr_of_a_stream_says_where_it_stands() -> None:
    """Not entered, open or closed."""
    stream = stream_with_limit(None, list[Any]())
    shown = [repr(stream)]
    async with stream:
        shown.append(repr(stream))
    shown.append(repr(stream))
    assert len(set(shown)) == 3
    assert all("stream_with_limit" in each for each in shown)


@both
async def test_an_error_in_the_body_survives_a_cancellation_during_the_join(
    autojump_clock: MockClock, given: bool
) -> None:
    """The body's error was first; that its caller is cancelled meanwhile does not hide it."""
    error = OSError()

    async def careful() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)

    async with foreign_nursery() as nursery:
        with pytest.raises((OSError, BaseExceptionGroup)) as caught, trio.move_on_after(3):
            async with stream_with_limit(nursery if given else None, [careful]):
                await trio.sleep(1)
                raise error
        assert not nursery.child_tasks
    assert any(each is error for each in reachable(caught.value))


@both
async def test_at_the_same_instant_the_consumers_timeout_wins(
    autojump_clock: MockClock, given: bool
) -> None:
    """An outer deadline at the instant of an operation's own is no OperationTimeoutError."""
    async with foreign_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            async with stream_with_limit(
                nursery if given else None, [trio.sleep_forever] * 2, timeout=1
            ) as results:
                async for _ in results:
                    pass
        assert scope.cancelled_caught
