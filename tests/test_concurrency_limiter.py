"""A trio.CapacityLimiter as the bound: shared, given back, never a silent deadlock."""

from __future__ import annotations

import math
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import Gauge, Source, Stopwatch, foreign_nursery, leaves
from trio_resilience import (
    OperationsCancelledError,
    OperationsFailedError,
    map_with_limit,
    run_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from trio.testing import MockClock


async def test_a_limiter_bounds_a_call(autojump_clock: MockClock) -> None:
    """Its tokens are the number of operations that run at once, and come back."""
    gauge, limiter = Gauge(), trio.CapacityLimiter(2)
    watch = Stopwatch()
    assert await run_with_limit(None, gauge.ops(*[1] * 5), max_concurrency=limiter) == [*range(5)]
    assert (gauge.peak, watch.seconds, limiter.borrowed_tokens) == (2, 3, 0)


@pytest.mark.parametrize("given", [True, False])
async def test_two_calls_share_a_limiter(autojump_clock: MockClock, given: bool) -> None:
    """Three tokens bound the sum of both calls, and both get on."""
    gauge, limiter, watch = Gauge(), trio.CapacityLimiter(3), Stopwatch()
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(
                partial(
                    map_with_limit,
                    nursery if given else None,
                    gauge.run,
                    range(6),
                    max_concurrency=limiter,
                )
            )
    assert (gauge.peak, watch.seconds, limiter.borrowed_tokens) == (3, 4, 0)


async def test_a_limiter_is_shared_with_the_rest_of_the_program(
    autojump_clock: MockClock,
) -> None:
    """Tokens that others hold are not ours."""
    gauge, limiter, watch = Gauge(), trio.CapacityLimiter(2), Stopwatch()
    async with trio.open_nursery() as nursery, limiter:
        nursery.start_soon(
            partial(run_with_limit, None, gauge.ops(1, 1, 1), max_concurrency=limiter)
        )
        await trio.sleep(2.5)
        assert gauge.peak == 1
    assert watch.seconds == 3.0


async def test_a_permit_is_taken_before_an_operation_is_pulled(autojump_clock: MockClock) -> None:
    """Without a free token the source is not touched."""
    gauge, source, limiter = Gauge(), Source(), trio.CapacityLimiter(1)
    async with trio.open_nursery() as nursery, limiter:
        nursery.start_soon(
            partial(run_with_limit, None, source.of(gauge.ops(1, 1)), max_concurrency=limiter)
        )
        await trio.sleep(5)
        assert source.pulled == 0
    assert gauge.finished == [0, 1]


@pytest.mark.parametrize("end", ["failure", "cancellation", "nursery", "fatal", "timeout"])
async def test_tokens_come_back_however_the_call_ends(autojump_clock: MockClock, end: str) -> None:
    """After a failure, a cancellation or a crash none is borrowed and nobody waits."""
    limiter, gauge = trio.CapacityLimiter(3), Gauge()
    errors: dict[str, Any] = {"failure": OSError(), "fatal": KeyboardInterrupt()}
    ops = (gauge.op(i, 1 + i % 2, errors.get(end) if i == 7 else None) for i in count())
    async with foreign_nursery() as nursery:
        if end == "nursery":
            nursery.cancel_scope.deadline = trio.current_time() + 3.5
        with trio.CancelScope() as scope:
            if end == "cancellation":
                scope.deadline = trio.current_time() + 3.5
            with pytest.raises(
                (
                    OperationsFailedError,
                    OperationsCancelledError,
                    BaseExceptionGroup,
                    trio.Cancelled,
                )
            ):
                await run_with_limit(
                    nursery,
                    ops,
                    max_concurrency=limiter,
                    timeout=1.5 if end == "timeout" else math.inf,
                )
    assert limiter.borrowed_tokens == 0
    assert limiter.statistics().tasks_waiting == 0


async def test_a_cancelled_call_stops_waiting_for_tokens(autojump_clock: MockClock) -> None:
    """A call that never got a token leaves no ghost in the limiter's line."""
    limiter, gauge = trio.CapacityLimiter(1), Gauge()
    async with limiter:
        with trio.move_on_after(1) as scope:
            await run_with_limit(None, gauge.ops(1, 1), max_concurrency=limiter)
    assert scope.cancelled_caught
    assert gauge.started == []
    assert (limiter.borrowed_tokens, limiter.statistics().tasks_waiting) == (0, 0)
    with trio.fail_after(1):
        async with limiter:
            pass


async def test_a_limiter_may_be_unlimited(autojump_clock: MockClock) -> None:
    """With infinitely many tokens, which trio allows, all of a list runs at once."""
    gauge = Gauge()
    await run_with_limit(None, gauge.ops(*[1] * 50), max_concurrency=trio.CapacityLimiter(math.inf))
    assert gauge.peak == 50


async def test_a_limiter_may_be_narrowed_during_a_call(autojump_clock: MockClock) -> None:
    """With fewer tokens nobody starts until enough have finished."""
    gauge, limiter, watch = Gauge(), trio.CapacityLimiter(3), Stopwatch()

    async def narrow() -> None:
        await trio.sleep(0.5)
        limiter.total_tokens = 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(narrow)
        await run_with_limit(nursery, gauge.ops(*[1] * 5), max_concurrency=limiter)
    assert (gauge.peak, watch.seconds) == (3, 3)


async def test_a_limiter_may_be_widened_during_a_call(autojump_clock: MockClock) -> None:
    """New tokens are used by the call that is already running."""
    gauge, limiter, watch = Gauge(), trio.CapacityLimiter(1), Stopwatch()

    async def widen() -> None:
        await trio.sleep(0.5)
        limiter.total_tokens = 4

    async with trio.open_nursery() as nursery:
        nursery.start_soon(widen)
        await run_with_limit(nursery, gauge.ops(*[1] * 8), max_concurrency=limiter)
    assert gauge.peak == 4
    assert watch.seconds <= 3


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("tokens", [1, 2])
async def test_waiting_for_a_permit_of_ones_own_call_is_an_error(
    autojump_clock: MockClock, given: bool, tokens: int
) -> None:
    """Operations that hold every token and call with the same limiter get a RuntimeError.

    It says so, instead of letting them wait for one another for ever.
    """
    limiter, gauge = trio.CapacityLimiter(tokens), Gauge()
    async with foreign_nursery() as nursery:

        async def nested(_: int) -> list[int]:
            await trio.sleep(1)
            return await run_with_limit(
                nursery if given else None, gauge.ops(1, 1), max_concurrency=limiter
            )

        with trio.fail_after(60), pytest.raises(OperationsFailedError) as caught:
            await map_with_limit(nursery, nested, range(tokens), max_concurrency=limiter)
    errors = [leaf for leaf in leaves(caught.value) if isinstance(leaf, RuntimeError)]
    assert errors
    assert all("permit" in str(error) or "limiter" in str(error) for error in errors)
    assert (limiter.borrowed_tokens, limiter.statistics().tasks_waiting) == (0, 0)


async def test_streams_that_wait_for_themselves_are_an_error_too(
    autojump_clock: MockClock,
) -> None:
    """A stream inside an operation of a stream, with the same single token."""
    limiter = trio.CapacityLimiter(1)

    async def nested() -> None:
        async with stream_with_limit(
            None, [trio.lowlevel.checkpoint], max_concurrency=limiter
        ) as s:
            async for _ in s:
                pass

    with trio.fail_after(60), pytest.raises(ExceptionGroup) as caught:
        async with stream_with_limit(None, [nested], max_concurrency=limiter) as results:
            async for _ in results:
                pass
    assert [type(leaf) for leaf in leaves(caught.value)] == [RuntimeError]


async def test_waiting_three_calls_deep_is_an_error_too(autojump_clock: MockClock) -> None:
    """The call in between, with a bound of its own, does not hide the outermost permit."""
    limiter = trio.CapacityLimiter(1)

    async def inner() -> None:
        await run_with_limit(None, [trio.lowlevel.checkpoint], max_concurrency=limiter)

    async def middle() -> None:
        await run_with_limit(None, [inner], max_concurrency=5)

    with trio.fail_after(60), pytest.raises(ExceptionGroup) as caught:
        await run_with_limit(None, [middle], max_concurrency=limiter)
    assert [type(leaf) for leaf in leaves(caught.value)] == [RuntimeError]


async def test_a_nested_call_may_use_tokens_that_are_free(autojump_clock: MockClock) -> None:
    """With a token left over the same limiter is no deadlock."""
    limiter, gauge = trio.CapacityLimiter(2), Gauge()

    async def nested() -> list[int]:
        return await run_with_limit(None, gauge.ops(1), max_concurrency=limiter)

    assert await run_with_limit(None, [nested], max_concurrency=limiter) == [[0]]


async def test_a_call_that_does_not_hold_a_permit_just_waits(autojump_clock: MockClock) -> None:
    """A task that a finished operation left behind in another nursery waits like everybody."""
    limiter, gauge, done = trio.CapacityLimiter(1), Gauge(), list[int]()

    async def later() -> None:
        await trio.sleep(1)
        done.extend(await run_with_limit(None, gauge.ops(1), max_concurrency=limiter))

    async with trio.open_nursery() as outer:

        async def leave_behind() -> None:
            outer.start_soon(later)

        await run_with_limit(None, [leave_behind], max_concurrency=limiter)
        async with limiter:
            await trio.sleep(5)
    assert done == [0]


async def test_a_limiter_works_in_two_runs(autojump_clock: MockClock) -> None:
    """Sequential calls with the same limiter, also after a failed one, are independent."""
    limiter, gauge = trio.CapacityLimiter(1), Gauge()
    with pytest.raises(OperationsFailedError):
        await run_with_limit(
            None, [gauge.op(0, 1, OSError()), gauge.op(1)], max_concurrency=limiter
        )
    assert await run_with_limit(None, gauge.ops(1, 1), max_concurrency=limiter) == [0, 1]


async def test_a_call_does_not_overtake_another_at_a_shared_limiter(
    autojump_clock: MockClock,
) -> None:
    """A call that gives its token back and wants it again waits behind those that waited."""
    limiter, order = trio.CapacityLimiter(1), list[str]()

    async def work(name: str) -> None:
        order.append(name)
        await trio.sleep(1)

    async def call(name: str) -> None:
        await run_with_limit(None, [partial(work, name)] * 4, max_concurrency=limiter)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, "a")
        await trio.sleep(0.5)
        nursery.start_soon(call, "b")
    assert order.index("b") <= 2
    assert order[:6].count("b") >= 2


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_limiter_may_be_shut_and_opened_again(
    autojump_clock: MockClock, streamed: bool
) -> None:
    """With no token nothing starts; as soon as there is one, the work goes on."""
    limiter, gauge, watch = trio.CapacityLimiter(1), Gauge(), Stopwatch()

    async def control() -> None:
        await trio.sleep(1.5)
        limiter.total_tokens = 0
        await trio.sleep(8.5)
        limiter.total_tokens = 1

    async def consume() -> None:
        async with stream_with_limit(None, gauge.ops(1, 1, 1), max_concurrency=limiter) as results:
            assert [index async for index, _ in results] == [0, 1, 2]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(control)
        with trio.fail_after(60):
            if streamed:
                await consume()
            else:
                await run_with_limit(None, gauge.ops(1, 1, 1), max_concurrency=limiter)
    assert gauge.finished == [0, 1, 2]
    assert watch.seconds == 11


async def test_a_stream_may_begin_with_a_limiter_that_is_shut(autojump_clock: MockClock) -> None:
    """It waits for the first token, and starts when there is one."""
    limiter, gauge = trio.CapacityLimiter(1), Gauge()
    limiter.total_tokens = 0

    async def control() -> None:
        await trio.sleep(5)
        limiter.total_tokens = 2

    async with trio.open_nursery() as nursery:
        nursery.start_soon(control)
        with trio.fail_after(60):
            async with stream_with_limit(None, gauge.ops(1, 1), max_concurrency=limiter) as results:
                assert sorted([index async for index, _ in results]) == [0, 1]
    assert gauge.peak == 2
