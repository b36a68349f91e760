"""A Semaphore as the bound: one fair line for calls and everybody else, and no silent deadlock."""

from __future__ import annotations

import math
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import Gauge, Source, Stopwatch, foreign_nursery
from trio_resilience import (
    OperationsCancelledError,
    OperationsFailedError,
    Semaphore,
    map_with_limit,
    run_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from trio.testing import MockClock

given_or_not = pytest.mark.parametrize("given", [True, False], ids=["given", "own"])
streamed_or_not = pytest.mark.parametrize("streamed", [False, True], ids=["list", "stream"])


def assert_untouched(semaphore: Semaphore) -> None:
    """Nobody holds a permit of it, nobody waits for one, and none is lost."""
    now = semaphore.statistics()
    assert (now.borrowed, now.waiting, now.available) == (0, 0, semaphore.permits)


async def call(nursery: trio.Nursery | None, ops: Any, *, streamed: bool, **options: Any) -> None:
    """Run *ops* and drop their results."""
    if not streamed:
        await run_with_limit(nursery, ops, **options)
        return
    async with stream_with_limit(nursery, ops, **options) as results:
        async for _ in results:
            pass


async def use(semaphore: Semaphore, seconds: float = 1.0, weight: int = 1) -> None:
    """Hold permits as any other part of a program."""
    async with semaphore.hold(weight):
        await trio.sleep(seconds)


# --- a bound --------------------------------------------------------------------------------------


@given_or_not
@streamed_or_not
async def test_a_semaphore_bounds_a_call(
    autojump_clock: MockClock, given: bool, streamed: bool
) -> None:
    """Its permits are the number of operations that run at once, and come back."""
    gauge, semaphore, watch = Gauge(), Semaphore(2), Stopwatch()
    async with foreign_nursery() as nursery:
        await call(
            nursery if given else None,
            gauge.ops(*[1] * 5),
            streamed=streamed,
            max_concurrency=semaphore,
        )
    assert (gauge.peak, watch.seconds) == (2, 3)
    assert gauge.started == [0, 1, 2, 3, 4]
    assert_untouched(semaphore)


async def test_results_come_in_order(autojump_clock: MockClock) -> None:
    """Whichever of them is faster."""
    gauge = Gauge()
    ops = gauge.ops(4, 1, 3, 1, 2)
    assert await run_with_limit(None, ops, max_concurrency=Semaphore(3)) == [0, 1, 2, 3, 4]
    assert gauge.finished != [0, 1, 2, 3, 4]


@given_or_not
async def test_two_calls_share_a_semaphore(autojump_clock: MockClock, given: bool) -> None:
    """Three permits bound the sum of both calls, and both get on."""
    gauge, semaphore, watch = Gauge(), Semaphore(3), Stopwatch()
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            where = nursery if given else None
            nursery.start_soon(
                partial(map_with_limit, where, gauge.run, range(6), max_concurrency=semaphore)
            )
    assert (gauge.peak, watch.seconds) == (3, 4)
    assert_untouched(semaphore)


async def test_what_runs_is_borrowed_and_the_call_waits_once(autojump_clock: MockClock) -> None:
    """The statistics count an operation as a holder, and a call as one waiter, whatever it has."""
    semaphore = Semaphore(3)
    async with trio.open_nursery() as nursery:
        ops = Gauge().ops(*[2] * 100)
        nursery.start_soon(partial(run_with_limit, None, ops, max_concurrency=semaphore))
        await trio.sleep(1)
        now = semaphore.statistics()
        assert (now.permits, now.borrowed, now.available, now.waiting) == (3, 3, 0, 1)
        nursery.cancel_scope.cancel()
    assert_untouched(semaphore)


async def test_a_permit_is_taken_before_an_operation_is_pulled(autojump_clock: MockClock) -> None:
    """Without a free permit the source is not touched."""
    gauge, source, semaphore = Gauge(), Source(), Semaphore(1)
    async with trio.open_nursery() as nursery, semaphore:
        ops = source.of(gauge.ops(1, 1))
        nursery.start_soon(partial(run_with_limit, None, ops, max_concurrency=semaphore))
        await trio.sleep(5)
        assert source.pulled == 0
    assert gauge.finished == [0, 1]


async def test_the_wait_for_a_permit_is_not_part_of_the_timeout(autojump_clock: MockClock) -> None:
    """It counts from the operation's own start."""
    gauge, semaphore = Gauge(), Semaphore(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(use, semaphore, 10)
        await trio.sleep(1)
        results = await run_with_limit(
            nursery, gauge.ops(1, 1), max_concurrency=semaphore, timeout=1.5
        )
    assert results == [0, 1]


# --- one line -------------------------------------------------------------------------------------


@streamed_or_not
async def test_a_large_request_is_not_starved_by_a_call(
    autojump_clock: MockClock, streamed: bool
) -> None:
    """An endless call waits behind whoever wants all the permits, and goes on afterwards."""
    semaphore, gauge, watch = Semaphore(3), Gauge(), Stopwatch()

    async def use_all() -> None:
        async with semaphore.hold(3):
            assert gauge.running == 0
            # The call's own next request was in line before this one; no other was.
            assert watch.seconds == 2
            await trio.sleep(1)
        await trio.sleep(2.5)
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        ops = (gauge.op(i) for i in count())
        run = partial(call, None, ops, streamed=streamed, max_concurrency=semaphore)
        nursery.start_soon(run)
        await trio.sleep(0.5)
        nursery.start_soon(use_all)
    assert [round(at - watch.started, 6) for at in gauge.began_at.values()][:7] == [
        *[0, 0, 0],
        1,
        *[3, 3, 3],
    ]


async def test_a_call_does_not_overtake_another(autojump_clock: MockClock) -> None:
    """Calls that share a single permit take turns."""
    semaphore, order = Semaphore(1), list[str]()

    async def work(name: str) -> None:
        order.append(name)
        await trio.sleep(1)

    async def work_all(name: str) -> None:
        await run_with_limit(None, [partial(work, name)] * 4, max_concurrency=semaphore)

    async with trio.open_nursery() as nursery:
        for name in ("a", "b", "c"):
            nursery.start_soon(work_all, name)
            await trio.sleep(0.1)
    # Call a was in line for its second operation before the others came.
    assert order == ["a", *["a", "b", "c"] * 3, "b", "c"]


async def test_users_of_one_permit_pass_between_the_operations_of_a_call(
    autojump_clock: MockClock,
) -> None:
    """Ten users that come while a call of a hundred runs are let in before its later operations."""
    semaphore, gauge, entered = Semaphore(2), Gauge(), list[float]()
    watch = Stopwatch()

    async def enter() -> None:
        async with semaphore:
            entered.append(watch.seconds)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(run_with_limit, None, gauge.ops(*[1] * 100), max_concurrency=semaphore)
        )
        await trio.sleep(0.5)
        for _ in range(10):
            nursery.start_soon(enter)
    # The call has one place in the line, and takes it behind them when it has had its turn.
    assert entered == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]


async def test_a_stalled_stream_hoards_nothing(autojump_clock: MockClock) -> None:
    """While results wait for their consumer, all permits are there for others."""
    semaphore, entered = Semaphore(2), 0
    ops = (trio.lowlevel.checkpoint for _ in range(20))
    async with stream_with_limit(None, ops, max_concurrency=semaphore, buffer=1) as results:
        async for _ in results:
            await trio.sleep(10)
            assert_untouched(semaphore)
            async with semaphore.hold(2):
                entered += 1
    assert entered == 20


async def test_a_slow_source_hoards_no_more_than_one_permit(autojump_clock: MockClock) -> None:
    """However many are free, and however many operations the source has had already."""
    semaphore, most = Semaphore(5), 0

    async def source() -> AsyncIterator[Callable[[], Awaitable[None]]]:
        nonlocal most
        for _ in range(10):
            await trio.sleep(1)
            most = max(most, semaphore.statistics().borrowed)
            yield partial(trio.sleep, 0.5)

    await run_with_limit(None, source(), max_concurrency=semaphore)
    assert most == 1
    assert_untouched(semaphore)


async def test_a_call_that_is_done_waits_for_no_permit(autojump_clock: MockClock) -> None:
    """When the last operation has begun, the call has left the line."""
    semaphore, gauge, watch = Semaphore(1), Gauge(), Stopwatch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(run_with_limit, None, gauge.ops(1), max_concurrency=semaphore))
        await trio.sleep(0.5)
        assert semaphore.statistics().waiting == 0
        nursery.start_soon(use, semaphore, 50)
        await trio.sleep(1)
        assert (gauge.finished, watch.seconds) == ([0], 1.5)


# --- the end --------------------------------------------------------------------------------------


ENDS: dict[str, type[BaseException]] = {
    "failure": OperationsFailedError,
    "cancellation": trio.Cancelled,
    "nursery": OperationsCancelledError,
    "fatal": BaseExceptionGroup,
    "timeout": OperationsFailedError,
    "source": LookupError,
    "on_done": LookupError,
}


def broken(index: int, _: object) -> None:
    if index == 4:
        raise LookupError


@pytest.mark.parametrize("end", ENDS)
async def test_permits_come_back_however_the_call_ends(autojump_clock: MockClock, end: str) -> None:
    """After a failure, a cancellation or a crash none is borrowed and nobody waits."""
    semaphore, gauge = Semaphore(3), Gauge()
    errors: dict[str, Any] = {"failure": OSError(), "fatal": KeyboardInterrupt()}

    def ops() -> Any:
        for i in count():
            if end == "source" and i == 7:
                raise LookupError
            yield gauge.op(i, 1 + i % 2, errors.get(end) if i == 7 else None)

    at = trio.current_time() + 3.5
    async with foreign_nursery() as nursery:
        if end == "nursery":
            nursery.cancel_scope.deadline = at
        deadline = at if end == "cancellation" else math.inf
        with trio.CancelScope(deadline=deadline), pytest.raises(ENDS[end]):
            await run_with_limit(
                nursery,
                ops(),
                max_concurrency=semaphore,
                timeout=1.5 if end == "timeout" else math.inf,
                on_done=broken if end == "on_done" else None,
            )
    assert_untouched(semaphore)


async def test_a_cancelled_call_stops_waiting_for_permits(autojump_clock: MockClock) -> None:
    """A call that never got a permit leaves no ghost in the line."""
    semaphore, gauge = Semaphore(1), Gauge()
    async with semaphore:
        with trio.move_on_after(1) as scope:
            await run_with_limit(None, gauge.ops(1, 1), max_concurrency=semaphore)
        assert semaphore.statistics().waiting == 0
    assert scope.cancelled_caught
    assert gauge.started == []
    semaphore.acquire_nowait()
    semaphore.release()


async def test_a_call_goes_in_when_the_large_request_before_it_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    """What one gives up by leaving the line is the next one's in the same instant."""
    semaphore, gauge, watch = Semaphore(2), Gauge(), Stopwatch()
    scope = trio.CancelScope()

    async def large() -> None:
        with scope:
            await use(semaphore, 1, 2)

    async with semaphore, trio.open_nursery() as nursery:
        nursery.start_soon(large)
        await trio.sleep(1)
        run = partial(run_with_limit, None, gauge.ops(1), max_concurrency=semaphore)
        nursery.start_soon(run)
        await trio.sleep(1)
        assert gauge.started == []
        scope.cancel()
    assert (watch.seconds, gauge.finished) == (3, [0])
    assert_untouched(semaphore)
