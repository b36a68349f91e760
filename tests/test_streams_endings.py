"""How a stream ends: early, by a failure, by a cancellation, and never without saying why."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

import outcome
import pytest
import trio

from tests.operations import (
    Gauge,
    Stopwatch,
    fails,
    foreign_nursery,
    leaves,
    operation_notes,
    reachable,
    returns,
)
from trio_resilience import (
    OperationsFailedError,
    stream_map_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from trio.testing import MockClock

both = pytest.mark.parametrize("given", [True, False])


# Where on_error is a variable, no overload fits.
untyped: Any = stream_with_limit


class BodyError(Exception):
    """Raised by the body of the block."""


@both
async def test_leaving_early_cancels_the_rest(autojump_clock: MockClock, given: bool) -> None:
    """On break everything is cancelled and joined when the block ends."""
    gauge, watch = Gauge(), Stopwatch()
    async with foreign_nursery() as nursery:
        async with stream_with_limit(nursery if given else None, gauge.ops(1, 5, 9)) as results:
            async for _ in results:
                break
        assert not nursery.child_tasks
        assert not nursery.cancel_scope.cancel_called
    assert (gauge.finished, sorted(gauge.cancelled), watch.seconds) == ([0], [1, 2], 1)


async def test_leaving_early_waits_for_the_cleanup(autojump_clock: MockClock) -> None:
    """A shielded cleanup of three seconds is over when the block is."""
    watch = Stopwatch()

    async def careful() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3)

    async with stream_with_limit(None, [careful, trio.lowlevel.checkpoint]) as results:
        async for _ in results:
            break
    assert watch.seconds == 3


async def test_returning_from_the_block_is_leaving_early(autojump_clock: MockClock) -> None:
    """A function may return its first result from inside the block."""
    gauge = Gauge()

    async def first() -> int | None:
        async with stream_with_limit(None, gauge.ops(3, 1, 2)) as results:
            async for _, result in results:
                return result
        return None

    assert await first() == 1
    assert gauge.running == 0


async def test_a_block_need_not_iterate_at_all(autojump_clock: MockClock) -> None:
    """Then nothing is left behind either."""
    gauge, watch = Gauge(), Stopwatch()
    async with stream_with_limit(None, gauge.ops(5, 5)):
        pass
    assert (gauge.running, gauge.finished, watch.seconds) == (0, [], 0)


@both
@pytest.mark.parametrize("error_type", [BodyError, KeyboardInterrupt, SystemExit])
async def test_an_error_in_the_body_leaves_as_it_is(
    autojump_clock: MockClock, given: bool, error_type: type[BaseException]
) -> None:
    """Unwrapped, also with nursery=None; the rest is cancelled and joined."""
    gauge, error = Gauge(), error_type()
    async with foreign_nursery() as nursery:
        with pytest.raises(error_type) as caught:
            async with stream_with_limit(nursery if given else None, gauge.ops(1, 5)) as results:
                async for _ in results:
                    raise error
        assert not nursery.child_tasks
    assert caught.value is error
    assert caught.value.__cause__ is None
    assert (gauge.cancelled, gauge.running) == ([1], 0)


async def test_an_error_in_the_body_wins_over_failures(autojump_clock: MockClock) -> None:
    """Failures that were not seen yet are its context, not lost."""
    gauge, failure, error = Gauge(), OSError(), BodyError()
    ops = [gauge.op(0, 1), gauge.op(1, 2, failure), gauge.op(2, 9)]
    with pytest.raises(BodyError) as caught:
        async with stream_with_limit(None, ops) as results:
            async for _ in results:
                await trio.sleep(5)
                raise error
    assert caught.value is error
    assert any(each is failure for each in reachable(error))


async def test_an_error_in_the_body_keeps_its_own_context(autojump_clock: MockClock) -> None:
    """`raise ... from ...` in the body is not overwritten."""
    cause, failure = ValueError(), OSError()
    with pytest.raises(BodyError) as caught:
        async with stream_with_limit(None, [Gauge().op(0, 1, failure)]):
            await trio.sleep(5)
            raise BodyError from cause
    assert caught.value.__cause__ is cause
    assert any(each is failure for each in reachable(caught.value))


@both
async def test_finished_results_are_delivered_before_the_failure(
    autojump_clock: MockClock, given: bool
) -> None:
    """The iterator raises the group only when what succeeded has been handed over."""
    gauge, failure, got = Gauge(), OSError(), list[int]()
    ops = [gauge.op(0, 1), gauge.op(1, 2), gauge.op(2, 3, failure), gauge.op(3, 9)]
    async with foreign_nursery() as nursery:
        with pytest.raises(OperationsFailedError) as caught:
            async with stream_with_limit(nursery if given else None, ops, buffer=9) as results:
                await trio.sleep(5)
                async for index, _ in results:
                    got.append(index)
        assert not nursery.cancel_scope.cancel_called
    assert got == [0, 1]
    assert caught.value.exceptions == (failure,)
    assert caught.value.message == "1 of 4 operations failed"
    assert operation_notes(failure) == ["operation 2"]
    assert (gauge.cancelled, gauge.running) == ([3], 0)


async def test_in_order_what_follows_a_failure_is_in_the_order_too(
    autojump_clock: MockClock,
) -> None:
    """With ordered=True too, the results before the failed one are delivered."""
    gauge, failure, got = Gauge(), OSError(), list[int]()
    ops = [gauge.op(0, 3), gauge.op(1, 1), gauge.op(2, 4, failure), gauge.op(3, 9)]
    with pytest.raises(OperationsFailedError):
        async with stream_with_limit(None, ops, ordered=True) as results:
            async for index, _ in results:
                got.append(index)
    assert got == [0, 1]


async def test_the_group_of_a_stream_is_raised_inside_the_block(
    autojump_clock: MockClock,
) -> None:
    """It comes from the loop, so that the body may catch it; then the block ends in peace."""
    gauge, caught = Gauge(), list[Exception]()
    async with stream_with_limit(None, [gauge.op(0, 1, OSError()), gauge.op(1)]) as results:
        try:
            async for _ in results:
                pass
        except OperationsFailedError as error:
            caught.append(error)
    assert len(caught) == 1


async def test_continue_delivers_all_results_first(autojump_clock: MockClock) -> None:
    """With on_error="continue" all run, and one group with all failures ends the loop."""
    gauge, got = Gauge(), list[int]()
    ops = [gauge.op(i, i + 1, OSError(i) if i % 2 else None) for i in range(6)]
    with pytest.raises(OperationsFailedError) as caught:
        async with stream_with_limit(None, ops, on_error="continue", max_concurrency=2) as results:
            async for index, _ in results:
                got.append(index)
    assert got == [0, 2, 4]
    assert caught.value.message == "3 of 6 operations failed"
    assert [operation_notes(error) for error in caught.value.exceptions] == [
        ["operation 1"], ["operation 3"], ["operation 5"],
    ]  # fmt: skip


async def test_a_failure_in_a_mapped_stream_names_its_item() -> None:
    """The note shows the item, as with map_with_limit."""
    with pytest.raises(OperationsFailedError) as caught:
        async with stream_map_with_limit(None, fails, [OSError(5)]) as results:
            async for _ in results:
                pass
    assert operation_notes(caught.value.exceptions[0]) == ["operation 0: OSError(5)"]


@pytest.mark.parametrize("on_error", ["cancel", "continue"])
async def test_unseen_failures_raise_at_the_end_of_the_block(
    autojump_clock: MockClock, on_error: Any
) -> None:
    """After a break, what failed meanwhile is not dropped."""
    gauge, failure = Gauge(), OSError()
    ops = [gauge.op(0, 1), gauge.op(1, 2, failure), gauge.op(2, 9)]
    with pytest.raises(OperationsFailedError) as caught:
        async with untyped(None, ops, on_error=on_error) as results:
            async for _ in results:
                await trio.sleep(5)
                break
    assert caught.value.exceptions == (failure,)


async def test_a_cleanup_that_fails_on_leaving_is_raised(autojump_clock: MockClock) -> None:
    """An error from an operation that the break cancelled raises at the end of the block."""
    failure = OSError()

    async def clumsy() -> int:
        try:
            return await trio.sleep_forever()
        finally:
            raise failure

    with pytest.raises(OperationsFailedError) as caught:
        ops: list[Callable[[], Awaitable[int]]] = [partial(returns, 0), clumsy]
        async with stream_with_limit(None, ops) as results:
            async for _ in results:
                break
    assert caught.value.exceptions == (failure,)


async def test_collected_failures_do_not_raise_at_the_end(autojump_clock: MockClock) -> None:
    """With on_error="collect" an unseen failure is dropped like any unseen result."""
    gauge = Gauge()
    ops = [gauge.op(0, 1), gauge.op(1, 2, OSError()), gauge.op(2, 9)]
    async with stream_with_limit(None, ops, on_error="collect") as results:
        async for _ in results:
            await trio.sleep(5)
            break


@pytest.mark.parametrize("on_error", ["cancel", "continue", "collect"])
async def test_what_the_source_raises_ends_the_stream(
    autojump_clock: MockClock, on_error: Any
) -> None:
    """Finished results are delivered, running operations cancelled; it comes out as it is."""
    gauge, error, got = Gauge(), BodyError(), list[int]()

    async def ops() -> AsyncIterator[Callable[[], Awaitable[int]]]:
        yield gauge.op(0, 1)
        yield gauge.op(1, 9)
        await trio.sleep(2)
        raise error

    with pytest.raises(BodyError) as caught:
        async with untyped(None, ops(), on_error=on_error, buffer=5) as results:
            async for index, _ in results:
                got.append(index)
    assert caught.value is error
    assert (got, gauge.cancelled) == ([0], [1])


@both
@pytest.mark.parametrize("on_error", ["cancel", "continue", "collect"])
@pytest.mark.parametrize("fatal", [KeyboardInterrupt, SystemExit])
async def test_what_is_no_exception_ends_the_stream(
    autojump_clock: MockClock, given: bool, on_error: Any, fatal: type[BaseException]
) -> None:
    """It reaches the consumer in a BaseExceptionGroup and does not crash the nursery."""
    gauge, error = Gauge(), fatal()
    async with foreign_nursery() as nursery:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with untyped(
                nursery if given else None,
                [gauge.op(0, 1, error), gauge.op(1, 9)],
                on_error=on_error,
            ) as results:
                async for _ in results:
                    pass
        assert not nursery.cancel_scope.cancel_called
    assert leaves(caught.value) == [error]
    assert gauge.running == 0


async def test_a_wrong_operation_ends_the_stream(autojump_clock: MockClock) -> None:
    """A lambda that returns 3 is a bare TypeError, also with on_error="collect"."""
    gauge = Gauge()
    ops = [gauge.op(0, 9), cast("Any", lambda: 3)]
    with pytest.raises(TypeError):
        async with stream_with_limit(None, ops, on_error="collect") as results:
            async for _ in results:
                pass
    assert gauge.running == 0


async def test_the_outcomes_of_a_failed_stream_are_its_failures(
    autojump_clock: MockClock,
) -> None:
    """What succeeded was delivered and is not kept a second time."""
    failure = OSError()
    with pytest.raises(OperationsFailedError) as caught:
        async with stream_with_limit(
            None, [partial(returns, 1), partial(fails, failure)], on_error="continue"
        ) as results:
            async for _ in results:
                pass
    kept = [each for each in caught.value.outcomes if each is not None]
    assert [each.error for each in kept if isinstance(each, outcome.Error)] == [failure]
    assert len(kept) == 1
