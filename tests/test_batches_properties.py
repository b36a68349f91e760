"""Any operations in batches of any size begin and end when a simple model says."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import outcome
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.operations import Gauge, Source, Stopwatch, foreign_nursery
from trio_resilience import (
    Constant,
    Event,
    OperationFinished,
    OperationsFailedError,
    OperationStarted,
    Retry,
    Semaphore,
    map_with_limit,
    run_with_limit,
    stream_with_limit,
    subscribe,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.exhaustive

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@attrs.frozen
class Plan:
    """Operations, and how they are to be run in batches."""

    seconds: list[int]
    failing: list[bool]
    max_concurrency: int
    batch_size: int
    delay: int
    shape: str
    bound: str
    given: bool

    @property
    def options(self) -> dict[str, Any]:
        bound: Any = self.max_concurrency
        if self.bound != "int":
            bound = {"semaphore": Semaphore, "limiter": trio.CapacityLimiter}[self.bound](bound)
        return {
            "max_concurrency": bound,
            "batch_size": self.batch_size,
            "delay_between_batches": self.delay,
        }

    def times(self, longest: float = math.inf) -> list[tuple[float, float]]:
        """When each begins and ends: in the first slot that is free, batch after batch."""
        times, start = list[tuple[float, float]](), 0.0
        for first in range(0, len(self.seconds), self.batch_size):
            free = [start] * self.max_concurrency
            for seconds in self.seconds[first : first + self.batch_size]:
                begin = heapq.heappop(free)
                times.append((begin, begin + min(seconds, longest)))
                heapq.heappush(free, times[-1][1])
            start = max(end for _, end in times[first:]) + self.delay
        return times

    def begins(self, longest: float = math.inf) -> dict[int, float]:
        return {index: begin for index, (begin, _) in enumerate(self.times(longest))}

    def end(self, longest: float = math.inf) -> float:
        return max((end for _, end in self.times(longest)), default=0)


def _plan(drawn: list[tuple[int, bool]], *rest: Any) -> Plan:
    return Plan([seconds for seconds, _ in drawn], [fails for _, fails in drawn], *rest)


def plans(longest: int = 14) -> st.SearchStrategy[Plan]:
    """Up to so many operations of zero to four seconds."""
    return st.builds(
        _plan,
        st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=longest),
        st.integers(1, 5),
        st.integers(1, 6),
        st.integers(0, 7),
        st.sampled_from(["list", "generator", "async generator"]),
        st.sampled_from(["int", "semaphore", "limiter"]),
        st.booleans(),
    )


@attrs.define(eq=False)
class Trial:
    """One plan, carried out in one run of trio on the virtual clock."""

    plan: Plan
    gauge: Gauge = attrs.field(factory=Gauge)
    source: Source = attrs.field(factory=Source)
    watch: Stopwatch = attrs.field(init=False)
    elapsed: float = -1.0

    @property
    def begins(self) -> dict[int, float]:
        return {
            index: round(at - self.watch.started, 6) for index, at in self.gauge.began_at.items()
        }

    def op(self, index: int) -> Callable[[], Awaitable[int]]:
        error = OSError(index) if self.plan.failing[index] else None
        return partial(self._run, index, error)

    async def _run(self, index: int, error: Exception | None) -> int:
        # A batch is pulled as it is run, and but for its first item not before.
        batch = index // self.plan.batch_size
        assert self.source.pulled <= (batch + 1) * self.plan.batch_size + 1
        return await self.gauge.run(index, self.plan.seconds[index], error)

    def ops(self) -> Any:
        ops = [self.op(index) for index in range(len(self.plan.seconds))]
        if self.plan.shape == "list":
            return ops
        make = self.source.of if self.plan.shape == "generator" else self.source.async_of
        return make(ops)

    def run(self, job: Callable[..., Awaitable[Any]], **options: Any) -> Any:
        """Return the job's result, or the group that it ended with."""

        async def main() -> Any:
            self.watch, given = Stopwatch(), {**self.plan.options, **options}
            async with foreign_nursery() as nursery:
                where = nursery if self.plan.given else None
                try:
                    with trio.fail_after(10_000):
                        return await job(where, self.ops(), **given)
                except OperationsFailedError as error:
                    return error
                finally:
                    self.elapsed = self.watch.seconds
                    assert not nursery.child_tasks
                    _check_untouched(given["max_concurrency"])

        result = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        assert self.gauge.running == 0
        assert self.gauge.peak <= min(self.plan.max_concurrency, self.plan.batch_size)
        return result


def _check_untouched(bound: Any) -> None:
    if isinstance(bound, Semaphore):
        assert (bound.statistics().borrowed, bound.statistics().waiting) == (0, 0)
    elif isinstance(bound, trio.CapacityLimiter):
        assert bound.borrowed_tokens == bound.statistics().tasks_waiting == 0


async def map_ops(nursery: trio.Nursery | None, ops: Any, **options: Any) -> Any:
    """Run operations as the items of a map, which is all the same."""

    async def run(op: Callable[[], Awaitable[int]]) -> int:
        return await op()

    return await map_with_limit(nursery, run, ops, **options)


jobs = st.sampled_from([run_with_limit, map_ops])
timeouts = st.sampled_from([math.inf, 0.5, 1.5, 2.5])


@many
@given(plans(), jobs, timeouts)
def test_every_operation_begins_when_the_model_says(plan: Plan, job: Any, timeout: float) -> None:
    """Whatever the source and the bound; there is no delay but between two batches."""
    trial = Trial(plan)
    results: list[Any] = trial.run(job, on_error="collect", timeout=timeout)
    assert trial.begins == plan.begins(timeout)
    assert trial.elapsed == plan.end(timeout)
    failed = [fails or plan.seconds[i] > timeout for i, fails in enumerate(plan.failing)]
    assert [isinstance(each, outcome.Error) for each in results] == failed


@many
@given(plans(), jobs)
def test_failures_are_raised_at_the_end_of_the_last_batch(plan: Plan, job: Any) -> None:
    """With on_error="continue" they shorten nothing, and none is lost."""
    trial = Trial(plan)
    result = trial.run(job, on_error="continue")
    assert trial.begins == plan.begins()
    assert trial.elapsed == plan.end()
    failing = [index for index, fails in enumerate(plan.failing) if fails]
    if failing:
        assert [error.args[0] for error in result.exceptions] == failing
        assert len(result.outcomes) == len(plan.seconds)
    else:
        assert result == list(range(len(plan.seconds)))


@many
@given(plans(), jobs)
def test_the_first_failure_is_the_end_of_its_batch_and_of_all_others(plan: Plan, job: Any) -> None:
    """No delay follows it and no batch, nor is anything pulled for one."""
    trial, times = Trial(plan), plan.times()
    ends = [end for (_, end), fails in zip(times, plan.failing, strict=True) if fails]
    result = trial.run(job)
    if not ends:
        assert result == list(range(len(plan.seconds)))
        return
    assert trial.elapsed == min(ends)
    failed: list[int] = [error.args[0] for error in result.exceptions]
    assert [times[index][1] for index in failed] == [min(ends)] * len(failed)
    assert trial.begins.items() <= plan.begins().items()
    assert {i for i, (begin, _) in enumerate(times) if begin < min(ends)} <= trial.begins.keys()


@attrs.define(eq=False)
class Consumer:
    """Read a stream of batches, at a pace of its own."""

    pauses: list[int]
    ordered: bool
    buffer: int
    stop_after: int | None = None
    got: list[int] = attrs.field(factory=list[int])

    async def __call__(self, nursery: trio.Nursery | None, ops: Any, **options: Any) -> None:
        make: Any = stream_with_limit
        stream = make(
            nursery, ops, on_error="collect", ordered=self.ordered, buffer=self.buffer, **options
        )
        async with stream as results:
            async for index, _ in results:
                self.got.append(index)
                await trio.sleep(self.pauses[len(self.got) % len(self.pauses)])
                if len(self.got) == self.stop_after:
                    break


pauses = st.lists(st.integers(0, 9), min_size=1, max_size=4)


@many
@given(plans(), pauses, st.booleans(), st.integers(0, 3), st.none() | st.integers(1, 9))
def test_a_stream_of_batches_keeps_them_apart(
    plan: Plan, pauses: list[int], ordered: bool, buffer: int, stop_after: int | None
) -> None:
    """However slow its consumer: none begins before the one before has ended and the delay."""
    trial = Trial(plan)
    consumer = Consumer(pauses, ordered, buffer, stop_after)
    trial.run(consumer)
    total = len(plan.seconds)
    assert len(consumer.got) == min(total, total if stop_after is None else stop_after)
    assert sorted(consumer.got) == sorted(set(consumer.got))
    assert consumer.got == sorted(consumer.got) or not ordered
    began, ended = trial.gauge.began_at, trial.gauge.ended_at
    for index, at in began.items():
        first = index // plan.batch_size * plan.batch_size
        before = [ended[i] for i in range(first - plan.batch_size, first) if i >= 0]
        assert at >= max(before, default=-math.inf) + plan.delay - 1e-6


@many
@given(plans(), st.booleans())
def test_a_fast_consumer_is_not_noticed(plan: Plan, ordered: bool) -> None:
    """With room for all results everything begins as it does without a stream."""
    trial = Trial(plan)
    trial.run(Consumer([0], ordered, len(plan.seconds)))
    assert trial.begins == plan.begins()
    assert trial.elapsed == plan.end()


@many
@given(plans(), st.integers(1, 20))
def test_a_batch_job_is_cancelled_at_any_time(plan: Plan, after: int) -> None:
    """In a batch or between two: at that instant, and what had begun is what the model says."""
    trial = Trial(plan)
    deadline = after - 0.5

    async def job(nursery: trio.Nursery | None, ops: Any, **options: Any) -> bool:
        with trio.move_on_after(deadline) as scope:
            await run_with_limit(nursery, ops, on_error="collect", **options)
        return scope.cancelled_caught

    was_cancelled = trial.run(job)
    assert was_cancelled == (plan.end() > deadline)
    assert trial.elapsed == min(plan.end(), deadline)
    assert trial.begins == {i: begin for i, begin in plan.begins().items() if begin < deadline}
    assert plan.shape == "list" or not plan.seconds or trial.source.closed


@many
@given(plans())
def test_retries_belong_to_their_batch(plan: Plan) -> None:
    """An operation that fails once is part of its batch until its second attempt has ended."""
    trial, tried = Trial(plan), Counter[int]()
    longer = attrs.evolve(
        plan,
        seconds=[
            2 * each + 3 if fails else each
            for each, fails in zip(plan.seconds, plan.failing, strict=True)
        ],
    )

    async def flaky(index: int) -> int:
        tried[index] += 1
        error = OSError() if plan.failing[index] and tried[index] == 1 else None
        return await trial.gauge.run(index, plan.seconds[index], error)

    async def job(nursery: trio.Nursery | None, _: Any, **options: Any) -> Any:
        retry = Retry(max_attempts=2, backoff=Constant(3))
        return await map_with_limit(
            nursery, flaky, range(len(plan.seconds)), policy=retry, **options
        )

    assert trial.run(job) == list(range(len(plan.seconds)))
    assert trial.elapsed == longer.end()


@many
@given(plans(), jobs)
def test_listeners_hear_of_every_operation_of_every_batch(plan: Plan, job: Any) -> None:
    """Each begins and ends once, with its own number, at its own time."""
    heard = list[Event]()
    trial = Trial(plan)
    with subscribe(heard.append):
        trial.run(job, on_error="collect")
    started = {e.index: e.time for e in heard if isinstance(e, OperationStarted)}
    finished = [e for e in heard if isinstance(e, OperationFinished)]
    assert len(started) == len(finished) == len(plan.seconds)
    assert {i: round(at - trial.watch.started, 6) for i, at in started.items()} == plan.begins()
    assert {e.index: round(e.duration, 6) for e in finished} == dict(enumerate(plan.seconds))
