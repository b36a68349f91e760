"""A Semaphore as the bound: resized during a call, waited for by its holder, in several runs."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import Gauge, Stopwatch, foreign_nursery, leaves
from tests.test_concurrency_semaphore import assert_untouched, call, use
from trio_resilience import (
    Bulkhead,
    BulkheadFullError,
    OperationsFailedError,
    Semaphore,
    map_with_limit,
    run_with_limit,
    stream_map_with_limit,
    stream_with_limit,
)
from trio_resilience.testing import test_mode as mode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

given_or_not = pytest.mark.parametrize("given", [True, False], ids=["given", "own"])
streamed_or_not = pytest.mark.parametrize("streamed", [False, True], ids=["list", "stream"])


def script(semaphore: Semaphore, *changes: tuple[float, int]) -> Callable[[], Awaitable[None]]:
    """Return a task that sets the number of permits, each time after so many seconds more."""

    async def change() -> None:
        for seconds, permits in changes:
            await trio.sleep(seconds)
            semaphore.permits = permits

    return change


async def starts(
    semaphore: Semaphore, seconds: list[float], *changes: tuple[float, int], streamed: bool
) -> list[float]:
    """Run operations that take so long while the semaphore changes; return when each began."""
    gauge, watch = Gauge(), Stopwatch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(script(semaphore, *changes))
        with trio.fail_after(1000):
            await call(None, gauge.ops(*seconds), streamed=streamed, max_concurrency=semaphore)
    assert_untouched(semaphore)
    assert sorted(gauge.finished) == list(range(len(seconds)))
    return [round(at - watch.started, 6) for at in gauge.began_at.values()]


# --- resized during a call ------------------------------------------------------------------------


@streamed_or_not
async def test_narrowed(autojump_clock: MockClock, streamed: bool) -> None:
    """With fewer permits nobody starts until enough have finished."""
    began = await starts(Semaphore(3), [1, 2, 3, 1, 1], (0.5, 1), streamed=streamed)
    assert began == [0, 0, 0, 3, 4]


@streamed_or_not
async def test_widened(autojump_clock: MockClock, streamed: bool) -> None:
    """New permits are used at once by the call that is already running."""
    began = await starts(Semaphore(1), [9, 1, 1, 1, 1], (0.5, 4), streamed=streamed)
    assert began == [0, 0.5, 0.5, 0.5, 1.5]


@streamed_or_not
async def test_shut_and_opened_again(autojump_clock: MockClock, streamed: bool) -> None:
    """With no permit nothing starts; as soon as there are some, the work goes on."""
    changes = ((0.5, 0), (9.5, 2), (0.5, 0), (9.5, 1))
    began = await starts(Semaphore(2), [1] * 6, *changes, streamed=streamed)
    assert began == [0, 0, 10, 10, 20, 21]


@streamed_or_not
async def test_shut_at_the_beginning(autojump_clock: MockClock, streamed: bool) -> None:
    """A call waits for the first permit, although there is none at all."""
    semaphore = Semaphore(1)
    semaphore.permits = 0
    began = await starts(semaphore, [1, 1, 1], (5, 2), streamed=streamed)
    assert began == [5, 5, 6]


@streamed_or_not
async def test_an_operation_may_resize_its_own_bound(
    autojump_clock: MockClock, streamed: bool
) -> None:
    """Also below what it holds itself; the permit that is given back fits the new number."""
    semaphore, gauge = Semaphore(3), Gauge()

    async def shrink() -> None:
        semaphore.permits = 1
        await trio.sleep(1)

    ops: list[Any] = [shrink, *gauge.ops(*[1] * 6)]
    watch = Stopwatch()
    await call(None, ops, streamed=streamed, max_concurrency=semaphore)
    # The permits of those three that had begun are back before the next begins.
    assert gauge.peak <= 2
    assert watch.seconds >= 5
    assert_untouched(semaphore)


async def test_peaks_follow_every_change(autojump_clock: MockClock) -> None:
    """Whenever an operation begins, no more run than there are permits at that moment."""
    semaphore, running, excess = Semaphore(4), 0, list[tuple[int, int]]()

    async def work(index: int) -> None:
        nonlocal running
        running += 1
        if running > semaphore.permits:
            excess.append((running, semaphore.permits))
        await trio.sleep(1 + index % 3)
        running -= 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(script(semaphore, *[(1.3, n) for n in (2, 5, 1, 0, 6, 3)]))
        await map_with_limit(nursery, work, range(60), max_concurrency=semaphore)
    assert excess == []
    assert_untouched(semaphore)


# --- waiting for oneself --------------------------------------------------------------------------


@given_or_not
@pytest.mark.parametrize("permits", [1, 2])
async def test_waiting_for_a_permit_of_ones_own_call_is_an_error(
    autojump_clock: MockClock, given: bool, permits: int
) -> None:
    """Operations that hold every permit and call with the same semaphore get a RuntimeError."""
    semaphore, gauge = Semaphore(permits), Gauge()
    async with foreign_nursery() as nursery:

        async def nested(_: int) -> list[int]:
            await trio.sleep(1)
            where = nursery if given else None
            return await run_with_limit(where, gauge.ops(1, 1), max_concurrency=semaphore)

        with trio.fail_after(60), pytest.raises(OperationsFailedError) as caught:
            await map_with_limit(nursery, nested, range(permits), max_concurrency=semaphore)
    errors = [leaf for leaf in leaves(caught.value) if isinstance(leaf, RuntimeError)]
    assert errors
    assert all("permit" in str(error) and "Semaphore" in str(error) for error in errors)
    assert_untouched(semaphore)


async def test_streams_that_wait_for_themselves_are_an_error_too(
    autojump_clock: MockClock,
) -> None:
    """A stream inside an operation of a call inside an operation of a stream."""
    semaphore = Semaphore(1)

    async def inner() -> None:
        await call(None, [trio.lowlevel.checkpoint], streamed=True, max_concurrency=semaphore)

    async def middle() -> None:
        await run_with_limit(None, [inner], max_concurrency=5)

    with trio.fail_after(60), pytest.raises(ExceptionGroup) as caught:
        await call(None, [middle], streamed=True, max_concurrency=semaphore)
    assert [type(leaf) for leaf in leaves(caught.value)] == [RuntimeError]
    assert_untouched(semaphore)


async def test_a_nested_call_may_use_permits_that_are_free(autojump_clock: MockClock) -> None:
    """With a permit left over the same semaphore is no deadlock."""
    semaphore, gauge = Semaphore(2), Gauge()

    async def nested() -> list[int]:
        return await run_with_limit(None, gauge.ops(1, 1, 1), max_concurrency=semaphore)

    assert await run_with_limit(None, [nested], max_concurrency=semaphore) == [[0, 1, 2]]


async def test_a_nested_call_with_another_semaphore_just_waits(autojump_clock: MockClock) -> None:
    """To hold a permit of one bound says nothing about another."""
    outer, inner, gauge = Semaphore(1), Semaphore(1), Gauge()

    async def nested(_: int) -> list[int]:
        return await run_with_limit(None, gauge.ops(1), max_concurrency=inner)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(use, inner, 5)
        await trio.lowlevel.checkpoint()
        results = await map_with_limit(nursery, nested, range(2), max_concurrency=outer)
    assert results == [[0], [0]]


async def test_a_task_that_an_operation_left_behind_just_waits(autojump_clock: MockClock) -> None:
    """It holds no permit any more, when the operation that started it has ended."""
    semaphore, gauge = Semaphore(1), Gauge()

    async def later() -> None:
        await trio.sleep(1)
        await run_with_limit(None, gauge.ops(1), max_concurrency=semaphore)

    async with trio.open_nursery() as outer:

        async def leave_behind() -> None:
            outer.start_soon(later)

        await run_with_limit(None, [leave_behind], max_concurrency=semaphore)
        async with semaphore:
            await trio.sleep(5)
    assert gauge.finished == [0]


async def test_a_permit_that_is_stolen_from_a_call_is_an_error(autojump_clock: MockClock) -> None:
    """An operation that releases what it did not acquire ends the call; no permit is made up."""
    semaphore = Semaphore(2)

    async def steal() -> None:
        await trio.sleep(1)
        semaphore.release()

    with trio.fail_after(60), pytest.raises((RuntimeError, ExceptionGroup)) as caught:
        await run_with_limit(None, [steal], max_concurrency=semaphore)
    assert [type(leaf) for leaf in leaves(caught.value)] == [RuntimeError]
    assert_untouched(semaphore)


# --- several runs ---------------------------------------------------------------------------------


@streamed_or_not
@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_a_run_that_died_takes_its_permits_with_it(
    end: type[BaseException], streamed: bool
) -> None:
    """A semaphore of a module serves the next run in full, whoever held it in the last."""
    semaphore, gauge = Semaphore(2), Gauge()

    async def die() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(use, semaphore, 9)
            nursery.start_soon(use, semaphore, 9, 2)
            ops = gauge.ops(1, 1)
            await call(
                nursery,
                [*ops, partial(_raise, end())],
                streamed=streamed,
                max_concurrency=semaphore,
            )

    async def live() -> None:
        await call(None, gauge.ops(0, 0, 0, 0), streamed=streamed, max_concurrency=semaphore)
        assert_untouched(semaphore)

    for _ in range(2):
        gauge = Gauge()
        with pytest.raises((BaseExceptionGroup, end)):
            trio.run(die, clock=trio.testing.MockClock(autojump_threshold=0))
        assert_untouched(semaphore)
        trio.run(live)
        assert gauge.peak == 2


async def _raise(error: BaseException) -> None:
    await trio.sleep(1)
    raise error


@streamed_or_not
def test_a_second_live_run_is_refused(streamed: bool) -> None:
    """Its call raises a bare RuntimeError; the call in the first run goes on undisturbed."""
    semaphore, gauge = Semaphore(1), Gauge()
    refusals = list[BaseException]()

    async def second() -> None:
        try:
            await call(None, gauge.ops(0), streamed=streamed, max_concurrency=semaphore)
        except RuntimeError as error:
            refusals.append(error)

    async def wait_for_second() -> None:
        thread = threading.Thread(target=trio.run, args=(second,))
        thread.start()
        await trio.to_thread.run_sync(thread.join)

    async def first() -> None:
        await call(None, [wait_for_second], streamed=streamed, max_concurrency=semaphore)
        assert_untouched(semaphore)

    trio.run(first)
    assert len(refusals) == 1
    assert "two runs" in str(refusals[0])
    assert gauge.started == []


async def test_calls_in_a_test_have_permits_of_their_own(autojump_clock: MockClock) -> None:
    """In a block of test_mode a semaphore that is held outside is free; afterwards as before."""
    semaphore, gauge, watch = Semaphore(1), Gauge(), Stopwatch()
    async with semaphore:
        with mode(fresh=True):
            await run_with_limit(None, gauge.ops(1, 1), max_concurrency=semaphore)
            assert_untouched(semaphore)
        assert semaphore.statistics().borrowed == 1
    assert (gauge.peak, watch.seconds) == (1, 2)


# --- checked at the door --------------------------------------------------------------------------


@pytest.mark.parametrize("permits", [0, 2])
async def test_a_queue_is_counted_on_top_of_the_permits(
    autojump_clock: MockClock, permits: int
) -> None:
    """More operations than are permits and places are refused before any of them runs."""
    semaphore, gauge = Semaphore(2), Gauge()
    semaphore.permits = permits
    with pytest.raises(BulkheadFullError) as caught:
        ops = gauge.ops(*[0] * (permits + 4))
        await run_with_limit(None, ops, max_concurrency=semaphore, queue_size=3)
    assert (caught.value.capacity, caught.value.requested) == (permits + 3, permits + 4)
    assert gauge.started == []


async def test_a_bulkhead_goes_into_policy(autojump_clock: MockClock) -> None:
    """As the bound of a call it is a TypeError that says so, in all four functions."""
    gauge, bulkhead = Gauge(), Bulkhead(2)
    wrong: Any = bulkhead
    for job in (run_with_limit, stream_with_limit):
        with pytest.raises(TypeError, match="policy"):
            await _finish(job(None, gauge.ops(0), max_concurrency=wrong))
    for job_of_items in (map_with_limit, stream_map_with_limit):
        with pytest.raises(TypeError, match="policy"):
            await _finish(job_of_items(None, gauge.run, [0], max_concurrency=wrong))
    assert gauge.started == []
    results = await run_with_limit(None, gauge.ops(1, 1, 1), policy=bulkhead, max_concurrency=5)
    assert (results, gauge.peak) == ([0, 1, 2], 2)


async def _finish(started: Any) -> None:
    await started


@pytest.mark.parametrize("use", ["policy", "call", "block", "hold"])
async def test_an_operation_that_would_wait_for_its_own_calls_semaphore_is_told(
    autojump_clock: MockClock, use: str
) -> None:
    """Rather than wait for ever; while there is a permit it gets one."""
    semaphore = Semaphore(1)

    async def operation() -> None:
        if use == "call":
            await semaphore.call(trio.sleep, 1)
        elif use == "block":
            async with semaphore:
                await trio.sleep(1)
        elif use == "hold":
            async with semaphore.hold():
                await trio.sleep(1)

    policy = semaphore if use == "policy" else None
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, [operation], max_concurrency=semaphore, policy=policy)
    assert "would wait for ever" in str(caught.value.exceptions[0])
    semaphore.permits = 2
    await run_with_limit(None, [operation], max_concurrency=semaphore, policy=policy)
    assert semaphore.available_permits == 2
