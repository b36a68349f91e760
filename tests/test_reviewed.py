"""Awkward moments: sources that dawdle, bounds that others share, jobs that end as they begin."""

from __future__ import annotations

import gc
import math
import weakref
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, final

import outcome
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.operations import Gauge, Stopwatch, fails, foreign_nursery, leaves, returns
from trio_resilience import (
    Event,
    OperationFinished,
    OperationsFailedError,
    OperationTimeoutError,
    Retry,
    run_with_limit,
    stream_with_limit,
    subscribe,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    from trio.testing import MockClock

ROUNDS = 20
"""How often a race is run: trio shuffles what is runnable, so that both outcomes come up."""


def tasks_beneath(task: trio.lowlevel.Task) -> int:
    """Return how many tasks live in the nurseries of *task*, and of theirs."""
    children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return len(children) + sum(map(tasks_beneath, children))


async def hold(limiter: trio.CapacityLimiter, seconds: float) -> None:
    """Use a permit of *limiter* in another part of the program."""
    async with limiter:
        await trio.sleep(seconds)


# --- how many workers there are, and what they hold ----------------------------------------------


async def test_a_slow_consumer_of_a_shared_bound_gathers_no_workers(
    autojump_clock: MockClock,
) -> None:
    """However long the stream, there are a few more tasks than permits, and no more."""
    most = 0
    ops = (trio.lowlevel.checkpoint for _ in range(60))
    limiter = trio.CapacityLimiter(2)
    async with stream_with_limit(None, ops, max_concurrency=limiter) as results:
        async for _ in results:
            await trio.sleep(1)
            most = max(most, tasks_beneath(trio.lowlevel.current_task()))
    assert most <= 2 + 3


async def test_a_slow_source_under_an_unlimited_bound_gathers_no_workers(
    autojump_clock: MockClock,
) -> None:
    """Operations that come one at a time, and end before the next, need no task each."""
    caller, most = trio.lowlevel.current_task(), 0

    async def source() -> AsyncIterator[Callable[[], Awaitable[None]]]:
        nonlocal most
        for _ in range(60):
            await trio.sleep(1)
            most = max(most, tasks_beneath(caller))
            yield trio.lowlevel.checkpoint

    await run_with_limit(None, source(), max_concurrency=trio.CapacityLimiter(math.inf))
    assert most <= 5


async def test_workers_that_wait_for_a_slow_source_do_not_hoard_a_shared_bound(
    autojump_clock: MockClock,
) -> None:
    """One waits for the source with a permit; those that others could use stay free."""
    limiter, most = trio.CapacityLimiter(5), 0

    async def source() -> AsyncIterator[Callable[[], Awaitable[None]]]:
        nonlocal most
        for _ in range(20):
            await trio.sleep(1)  # every operation has long ended
            most = max(most, limiter.borrowed_tokens)
            yield partial(trio.sleep, 0.1)

    await run_with_limit(None, source(), max_concurrency=limiter)
    assert most == 1


async def test_a_worker_does_not_keep_the_variables_of_an_operation(
    autojump_clock: MockClock,
) -> None:
    """A worker that is started as another one goes on inherits nothing from its operation."""

    @final
    class Big:
        pass

    variable = ContextVar[Big]("variable")
    made: list[weakref.ref[Big]] = []

    async def op() -> None:
        big = Big()
        made.append(weakref.ref(big))
        variable.set(big)
        del big
        await trio.lowlevel.checkpoint()

    alive = 0
    limiter = trio.CapacityLimiter(2)
    ops = (op for _ in range(9))
    async with stream_with_limit(None, ops, max_concurrency=limiter) as results:
        async for _ in results:
            await trio.sleep(1)
            gc.collect()
            # The places of the stream are taken: nobody runs, and nobody can begin.
            alive = max(alive, sum(each() is not None for each in made[:-3]))
    assert alive == 0


# --- the end of the source ------------------------------------------------------------------------


async def test_a_call_that_is_done_does_not_wait_for_another_permit(
    autojump_clock: MockClock,
) -> None:
    """That the source has ended is known: nobody has to queue for a permit to learn it again."""
    limiter, watch, ended = trio.CapacityLimiter(2), Stopwatch(), list[float]()

    async def call() -> None:
        await run_with_limit(None, [partial(trio.sleep, 5)], max_concurrency=limiter)
        ended.append(watch.seconds)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.sleep(1)
        nursery.start_soon(hold, limiter, 1000)
        await wait_all_tasks_blocked()
        nursery.start_soon(hold, limiter, 1000)  # it is in line, and gets the permit of the call
    assert ended == [5]


async def test_a_nested_call_that_is_done_is_not_taken_for_a_deadlock(
    autojump_clock: MockClock,
) -> None:
    """All of it succeeded; that others use the bound meanwhile takes nothing away from that."""
    limiter, results = trio.CapacityLimiter(3), list[Any]()

    async def inner() -> list[int]:
        async def op() -> int:
            await trio.sleep(5)
            return 7

        return await run_with_limit(None, [op], max_concurrency=limiter)

    async def outer() -> None:
        results.extend(await run_with_limit(None, [inner], max_concurrency=limiter))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(outer)
        await trio.sleep(1)
        nursery.start_soon(hold, limiter, 10)
        await wait_all_tasks_blocked()
        nursery.start_soon(hold, limiter, 10)
    assert results == [[7]]


async def test_the_delay_begins_when_the_batch_is_done(autojump_clock: MockClock) -> None:
    """Neither does the end of a batch have to be learnt with a permit in hand."""
    limiter, watch, ended = trio.CapacityLimiter(2), Stopwatch(), list[float]()

    async def call() -> None:
        await run_with_limit(
            None,
            [partial(trio.sleep, 5)] * 2,
            max_concurrency=limiter,
            batch_size=1,
            delay_between_batches=20,
            on_done=lambda _, __: ended.append(watch.seconds),
        )

    async with trio.open_nursery() as nursery:
        nursery.start_soon(call)
        await trio.sleep(1)
        nursery.start_soon(hold, limiter, 14)
        await wait_all_tasks_blocked()
        nursery.start_soon(hold, limiter, 10)  # it is in line, and gets the permit of the call
    assert ended == [5, 30]


# --- numbers -------------------------------------------------------------------------------------


async def test_failures_are_counted_right_whoever_is_faster() -> None:
    """Operations that an async source hands out at once may begin in another order."""

    async def source() -> AsyncIterator[Callable[[], Awaitable[object]]]:
        yield trio.lowlevel.checkpoint
        yield partial(fails, OSError())
        yield partial(fails, OSError())

    for _ in range(ROUNDS):
        with pytest.raises(OperationsFailedError) as caught:
            await run_with_limit(None, source(), on_error="continue")
        assert caught.value.message == "2 of 3 operations failed"
        assert len(caught.value.outcomes) == 3
        with pytest.raises(OperationsFailedError, match="2 of 3 operations failed"):
            async with stream_with_limit(None, source(), on_error="continue") as results:
                async for _ in results:
                    pass


async def test_a_source_may_not_know_its_own_length() -> None:
    """Progress bars around a generator (tqdm's) have a ``__len__`` that raises `TypeError`."""

    class ProgressBar:
        def __init__(self, items: Any) -> None:
            self.items = items

        def __iter__(self) -> Iterator[Any]:
            yield from self.items

        def __len__(self) -> int:
            raise TypeError("object of type 'generator' has no len()")

    def bar() -> ProgressBar:
        return ProgressBar(partial(returns, index) for index in range(3))

    assert await run_with_limit(None, bar()) == [0, 1, 2]
    assert await run_with_limit(None, bar(), queue_size=0, max_concurrency=1) == [0, 1, 2]


# --- nothing begins after the end -----------------------------------------------------------------


async def test_what_a_source_handed_out_before_a_cancellation_does_not_begin(
    autojump_clock: MockClock,
) -> None:
    """A worker that is awake already, with an operation, calls it no more."""
    is_over, late = False, 0

    async def op() -> None:
        nonlocal late
        late += is_over
        await trio.sleep(1)

    async def source(scope: trio.CancelScope) -> AsyncIterator[Callable[[], Awaitable[None]]]:
        nonlocal is_over
        yield op
        await trio.sleep(0.1)  # meanwhile, others have come to ask
        yield op
        is_over = True
        scope.cancel()

    for _ in range(ROUNDS):
        is_over = False
        with trio.CancelScope() as scope:
            await run_with_limit(None, source(scope), max_concurrency=5)
        assert scope.cancelled_caught
    assert late == 0


async def test_nothing_begins_when_a_stream_has_been_left(autojump_clock: MockClock) -> None:
    """A worker that has a place again, but has not run yet, pulls and calls nothing more."""
    is_over, late = False, 0

    async def op() -> None:
        nonlocal late
        late += is_over
        await trio.lowlevel.checkpoint()

    for _ in range(ROUNDS):
        is_over = False
        ops = (op for _ in range(9))
        async with stream_with_limit(None, ops, max_concurrency=1) as results:
            await trio.sleep(1)
            async for _ in results:
                is_over = True
                break
    assert late == 0


# --- sources -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False])
async def test_the_cancellation_of_a_source_is_not_the_callers(
    autojump_clock: MockClock, given: bool
) -> None:
    """A source whose clean-up fails as the job is stopped leaves no `Cancelled` in the group."""

    async def careless() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("clean-up")

    async def source() -> AsyncIterator[Callable[[], Awaitable[int]]]:
        async with trio.open_nursery() as inner:
            inner.start_soon(careless)
            yield partial(fails, OSError("op"))
            await trio.sleep_forever()

    async with foreign_nursery() as nursery:
        with pytest.raises(ExceptionGroup) as caught:
            await run_with_limit(nursery if given else None, source())
    assert sorted(map(str, leaves(caught.value))) == ["clean-up", "op"]


@pytest.mark.parametrize("given", [True, False])
async def test_leaving_a_stream_closes_a_source_with_an_open_nursery(
    autojump_clock: MockClock, given: bool
) -> None:
    """That its nursery puts our `GeneratorExit` in a group is nothing that the block raises."""
    closed: list[str] = []

    async def source() -> AsyncIterator[Callable[[], Awaitable[None]]]:
        try:
            async with trio.open_nursery() as inner:
                inner.start_soon(trio.sleep_forever)
                while True:
                    yield trio.lowlevel.checkpoint
        finally:
            closed.append("source")

    async with foreign_nursery() as nursery:
        async with stream_with_limit(nursery if given else None, source()) as results:
            async for _ in results:
                break
        assert closed == ["source"]


async def test_what_an_operation_left_running_holds_no_permit(autojump_clock: MockClock) -> None:
    """A task that outlives the operation that started it may wait for the bound like any other."""
    limiter, done = trio.CapacityLimiter(2), list[str]()

    async def later() -> None:
        await trio.sleep(2)
        await run_with_limit(None, [trio.lowlevel.checkpoint], max_concurrency=limiter)
        done.append("later")

    async with trio.open_nursery() as nursery:

        async def start_later() -> None:
            nursery.start_soon(later)

        ops: list[Callable[[], Awaitable[object]]] = [start_later]
        ops += [partial(trio.sleep, 5)] * 3
        await run_with_limit(None, ops, max_concurrency=limiter)
    assert done == ["later"]


# --- streams -------------------------------------------------------------------------------------


async def test_a_bound_that_is_widened_speeds_up_a_stream_at_once(
    autojump_clock: MockClock,
) -> None:
    """The new permits are used while the operations that began before still run."""
    limiter, gauge, watch = trio.CapacityLimiter(1), Gauge(), Stopwatch()

    async def widen() -> None:
        await trio.sleep(1)
        limiter.total_tokens = 5

    async with trio.open_nursery() as nursery:
        nursery.start_soon(widen)
        ops = gauge.ops(100, 1, 1, 1, 1)
        async with stream_with_limit(None, ops, max_concurrency=limiter) as results:
            index, _ = await anext(aiter(results))
            first_at = watch.seconds
    assert index != 0
    assert first_at == 2


async def test_a_stream_that_waits_for_its_consumer_keeps_no_permit(
    autojump_clock: MockClock,
) -> None:
    """Else the body of the block could not use the bound that its operations share with it."""
    limiter, taken = trio.CapacityLimiter(1), 0
    ops = [trio.lowlevel.checkpoint] * 4
    with trio.move_on_after(60):
        async with stream_with_limit(None, ops, max_concurrency=limiter) as results:
            async for _ in results:
                await trio.sleep(1)  # meanwhile, the next result has come to wait
                assert limiter.borrowed_tokens == 0
                async with limiter:
                    taken += 1
    assert taken == 4


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("streamed", [True, False])
async def test_a_list_that_grows_meanwhile_is_run_to_its_end(
    autojump_clock: MockClock, shared: bool, streamed: bool
) -> None:
    """Operations may add others, as in a loop over a list, whatever bounds them."""
    ops: list[Callable[[], Awaitable[None]]] = []
    done: list[int] = []

    async def op(index: int) -> None:
        if index < 3:
            ops.append(partial(op, index + 1))
        await trio.lowlevel.checkpoint()
        done.append(index)

    ops.append(partial(op, 0))
    bound = trio.CapacityLimiter(2) if shared else 2
    if streamed:
        async with stream_with_limit(None, ops, max_concurrency=bound) as results:
            assert [index async for index, _ in results] == [0, 1, 2, 3]
    else:
        await run_with_limit(None, ops, max_concurrency=bound)
    assert done == [0, 1, 2, 3]


async def test_a_consumer_in_another_task_is_told_that_the_block_has_ended(
    autojump_clock: MockClock,
) -> None:
    """It was waiting when the block was left; no nursery was cancelled, so nothing says so."""
    heard: list[BaseException] = []

    async def consume(results: Any) -> None:
        try:
            await anext(results)
        except (trio.ClosedResourceError, StopAsyncIteration) as error:
            heard.append(error)

    async with trio.open_nursery() as nursery:  # noqa: SIM117 - the consumer outlives the block
        async with stream_with_limit(None, [trio.sleep_forever]) as results:
            nursery.start_soon(consume, results)  # noqa: ASYNC111 - it is told of the end
            await wait_all_tasks_blocked()
    assert [type(error) for error in heard] == [trio.ClosedResourceError]


# --- policies and events -------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["on", "retry_result"])
def test_an_async_predicate_is_refused_in_every_guise(option: str) -> None:
    """What it returns would be a coroutine, which is true: everything would be tried again."""

    class Predicate:
        async def __call__(self, _: object) -> bool:
            return False

    options: dict[str, Any] = {option: Predicate()}
    with pytest.raises(TypeError, match=f"`{option}`"):
        Retry(**options)


async def test_a_mistake_inside_an_operation_is_that_operations_failure() -> None:
    """It is not this call that was given something wrong; so it is collected like any error."""

    async def mistaken() -> None:
        await Retry().call(lambda: 3)  # type: ignore[arg-type, return-value]

    ops: list[Callable[[], Awaitable[object]]] = [mistaken, partial(returns, 7)]
    failed, ended_well = await run_with_limit(None, ops, on_error="collect")
    assert isinstance(failed, outcome.Error)
    assert isinstance(failed.error, TypeError)
    assert ended_well == outcome.Value(7)


async def test_listeners_learn_that_a_timeout_is_a_failure(autojump_clock: MockClock) -> None:
    """Who counts failures by their events comes to what the job says."""
    heard: list[OperationFinished] = []

    def listen(event: Event) -> None:
        if isinstance(event, OperationFinished):
            heard.append(event)

    with subscribe(listen):
        await run_with_limit(None, [trio.sleep_forever], timeout=1, on_error="collect")
    (finished,) = heard
    assert not finished.cancelled
    assert isinstance(finished.error, OperationTimeoutError)
