"""run_with_limit and map_with_limit: results, the bound, laziness, politeness."""

from __future__ import annotations

from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.operations import Gauge, Source, Stopwatch, foreign_nursery, returns
from trio_resilience import Constant, Retry, map_with_limit, run_with_limit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

    import outcome
    from trio.testing import MockClock

    Operation = Callable[[], Awaitable[int]]


async def test_results_come_in_the_order_of_the_operations(autojump_clock: MockClock) -> None:
    """The slowest operation is first in the list, and its result is too."""
    gauge = Gauge()
    async with trio.open_nursery() as nursery:
        results = await run_with_limit(nursery, gauge.ops(3, 1, 2, 0))
    assert results == [0, 1, 2, 3]
    assert gauge.finished == [3, 1, 2, 0]


async def test_no_more_than_max_concurrency_run_at_once(autojump_clock: MockClock) -> None:
    """Five one-second calls through two slots finish after three seconds."""
    gauge, watch = Gauge(), Stopwatch()
    async with trio.open_nursery() as nursery:
        await run_with_limit(nursery, gauge.ops(1, 1, 1, 1, 1), max_concurrency=2)
    assert (gauge.peak, watch.seconds) == (2, 3)


async def test_all_slots_are_used(autojump_clock: MockClock) -> None:
    """A slow operation holds one slot only; the others go on beside it."""
    gauge, watch = Gauge(), Stopwatch()
    await run_with_limit(None, gauge.ops(10.5, *[1] * 10), max_concurrency=2)
    assert watch.seconds == 10.5
    assert gauge.finished == [*range(1, 11), 0]


async def test_ten_run_at_once_by_default(autojump_clock: MockClock) -> None:
    """The default bound is ten."""
    gauge = Gauge()
    await run_with_limit(None, gauge.ops(*[1] * 25))
    assert gauge.peak == 10


async def test_operations_start_in_order(autojump_clock: MockClock) -> None:
    """Whatever finishes first, the next to start is the next in the source."""
    gauge = Gauge()
    await run_with_limit(None, gauge.ops(5, 1, 4, 2, 3, 1, 1), max_concurrency=3)
    assert gauge.started == list(range(7))


async def test_one_at_a_time_is_a_sequence(autojump_clock: MockClock) -> None:
    """With max_concurrency=1 an operation starts only when the one before has finished."""
    gauge, watch = Gauge(), Stopwatch()
    await run_with_limit(None, gauge.ops(1, 2, 3), max_concurrency=1)
    assert (gauge.peak, watch.seconds, gauge.finished) == (1, 6, [0, 1, 2])


@pytest.mark.parametrize("given", [True, False])
async def test_nothing_runs_any_more_when_the_call_returns(
    autojump_clock: MockClock, given: bool
) -> None:
    """No task outlives the call, neither in the nursery it was given nor in its own."""
    async with trio.open_nursery() as nursery:
        gauge = Gauge()
        await run_with_limit(nursery if given else None, gauge.ops(1, 2, 3))
        assert gauge.running == 0
        assert not nursery.child_tasks
        assert trio.lowlevel.current_task().child_nurseries[-1] is nursery


@pytest.mark.parametrize("shape", ["list", "tuple", "generator", "iterator", "async generator"])
async def test_any_iterable_will_do(autojump_clock: MockClock, shape: str) -> None:
    """Lists, tuples, generators, iterators and async iterables give the same results."""
    gauge = Gauge()
    ops = gauge.ops(3, 1, 2)
    sources: dict[str, Any] = {
        "list": ops,
        "tuple": tuple(ops),
        "generator": (op for op in ops),
        "iterator": iter(ops),
        "async generator": Source().async_of(ops),
    }
    assert await run_with_limit(None, sources[shape], max_concurrency=2) == [0, 1, 2]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("max_concurrency", [1, 3])
async def test_operations_are_pulled_only_as_slots_become_free(
    autojump_clock: MockClock, asynchronous: bool, max_concurrency: int
) -> None:
    """At every pull, at most max_concurrency operations are ahead of what has finished."""
    gauge, ahead = Gauge(), list[int]()

    def ops() -> Iterator[Operation]:
        for index in range(20):
            ahead.append(index + 1 - gauge.ended)
            yield gauge.op(index, seconds=index % 3)

    source = Source()
    await run_with_limit(
        None,
        source.async_of(ops()) if asynchronous else source.of(ops()),
        max_concurrency=max_concurrency,
    )
    assert len(ahead) == 20
    assert max(ahead) == max_concurrency


async def test_an_infinite_source_is_not_read_to_its_end(autojump_clock: MockClock) -> None:
    """Cancelled after twenty completions, it was pulled max_concurrency ahead of them at most."""
    gauge, source = Gauge(), Source()
    with trio.CancelScope() as scope:

        def stop(index: int, result: outcome.Outcome[int]) -> None:
            if len(gauge.finished) == 20:
                scope.cancel()

        await run_with_limit(
            None, source.of(gauge.op(i) for i in count()), max_concurrency=4, on_done=stop
        )
    assert scope.cancelled_caught
    assert source.closed
    assert 20 < source.pulled <= 20 + 4 + 1


async def test_a_slow_async_source_is_never_entered_twice(autojump_clock: MockClock) -> None:
    """Free workers queue for the source one by one, while started operations run on."""
    gauge, watch, started = Gauge(), Stopwatch(), list[float]()

    async def operation(index: int) -> int:
        started.append(watch.seconds)
        return await gauge.run(index, 3)

    ops = Source().async_of([partial(operation, i) for i in range(4)], pause=1)
    assert await run_with_limit(None, ops) == [0, 1, 2, 3]
    assert (started, watch.seconds) == ([1, 2, 3, 4], 7)


class Countdown:
    """An async iterator with no aclose."""

    def __init__(self, gauge: Gauge, start: int) -> None:
        self.gauge = gauge
        self.left = start

    def __aiter__(self) -> Countdown:
        return self

    async def __anext__(self) -> Operation:
        await trio.lowlevel.checkpoint()
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return self.gauge.op(self.left)


async def test_an_async_iterator_needs_no_aclose(autojump_clock: MockClock) -> None:
    """The bare protocol, __aiter__ and __anext__, is enough; also when the job ends early."""
    assert await run_with_limit(None, Countdown(Gauge(), 3)) == [2, 1, 0]
    with trio.move_on_after(0.5) as scope:
        await run_with_limit(None, Countdown(Gauge(), 10**9), max_concurrency=2)
    assert scope.cancelled_caught


async def test_every_kind_of_async_callable_is_an_operation(autojump_clock: MockClock) -> None:
    """Async functions, partials, lambdas, bound methods and callable objects are awaited."""

    class Caller:
        async def __call__(self) -> int:
            return 4

        async def method(self) -> int:
            return 3

        @classmethod
        async def of_class(cls) -> int:
            return 5

    async def function() -> int:
        return 0

    add_one: Callable[[int], Awaitable[int]] = lambda value: returns(value + 1)  # noqa: E731
    ops: list[Operation] = [
        function,
        partial(returns, 1),
        lambda: returns(2),
        Caller().method,
        Caller(),
        Caller.of_class,
        partial(Caller()),
        partial(add_one, 6),
    ]
    assert await run_with_limit(None, ops) == [0, 1, 2, 3, 4, 5, 4, 7]


async def test_map_calls_the_function_with_each_item(autojump_clock: MockClock) -> None:
    """The results come in the order of the items, at most max_concurrency at once."""
    gauge, watch = Gauge(), Stopwatch()
    async with trio.open_nursery() as nursery:
        results = await map_with_limit(nursery, gauge.run, [3, 1, 2], max_concurrency=1)
    assert results == [3, 1, 2]
    assert (gauge.peak, watch.seconds) == (1, 3)


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_map_takes_any_iterable_lazily(autojump_clock: MockClock, asynchronous: bool) -> None:
    """Items may come from a generator or an async generator, and are pulled as slots free up."""
    gauge, source = Gauge(), Source()
    items = source.async_of(range(9)) if asynchronous else source.of(range(9))

    def check(index: int, result: outcome.Outcome[int]) -> None:
        assert source.pulled <= len(gauge.finished) + 2

    assert await map_with_limit(None, gauge.run, items, max_concurrency=2, on_done=check) == list(
        range(9)
    )


async def test_map_gives_an_item_that_is_a_tuple_as_one_argument() -> None:
    """Items are never unpacked."""

    async def echo(item: tuple[int, str]) -> tuple[int, str]:
        return item

    assert await map_with_limit(None, echo, [(1, "a"), (2, "b")]) == [(1, "a"), (2, "b")]


async def test_map_of_no_items_is_an_empty_list() -> None:
    """And a checkpoint."""
    with trio.testing.assert_checkpoints():
        assert await map_with_limit(None, trio.sleep, list[float]()) == []


async def test_the_policy_is_applied_to_each_operation(autojump_clock: MockClock) -> None:
    """With a retry as policy every operation has its own attempts."""
    calls = dict[int, int]()

    async def flaky(item: int) -> int:
        calls[item] = calls.get(item, 0) + 1
        if calls[item] <= item:
            raise OSError(item)
        return item

    policy = Retry(max_attempts=3, backoff=Constant(1.0))
    assert await map_with_limit(None, flaky, [0, 1, 2], policy=policy) == [0, 1, 2]
    assert calls == {0: 1, 1: 2, 2: 3}


async def test_a_retry_keeps_its_slot_while_it_backs_off(autojump_clock: MockClock) -> None:
    """An operation in its backoff counts as running: the next one waits."""
    gauge, watch = Gauge(), Stopwatch()
    attempts = iter([OSError(), None])

    async def flaky() -> int:
        error = next(attempts)
        if error is not None:
            raise error
        return 0

    policy = Retry(backoff=Constant(5.0))
    await run_with_limit(None, [flaky, gauge.op(1, 1)], max_concurrency=1, policy=policy)
    assert watch.seconds == 6


async def test_calls_may_be_nested_with_their_own_bounds(autojump_clock: MockClock) -> None:
    """An operation may call run_with_limit itself, also in the same nursery."""
    gauge = Gauge()
    async with foreign_nursery() as nursery:

        async def outer(index: int) -> list[int]:
            return await run_with_limit(nursery, gauge.ops(1, 1), max_concurrency=1)

        assert await map_with_limit(nursery, outer, range(4), max_concurrency=2) == [[0, 1]] * 4
    assert gauge.peak == 2


async def test_an_operation_may_open_scopes_nurseries_and_generators(
    autojump_clock: MockClock,
) -> None:
    """Cancel scopes, nurseries and async generators inside an operation work as everywhere."""

    async def ticks() -> AsyncIterator[int]:
        for tick in range(3):
            await trio.sleep(1)
            yield tick

    async def busy(index: int) -> int:
        with trio.move_on_after(0.5) as scope:
            await trio.sleep_forever()
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep, 1)
            nursery.start_soon(trio.sleep, 2)
        return sum([tick async for tick in ticks()]) + index

    assert await map_with_limit(None, busy, range(5), max_concurrency=2) == [3, 4, 5, 6, 7]
