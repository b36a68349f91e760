"""Any list of operations behaves like a simple model of it."""

from __future__ import annotations

import heapq
from functools import partial
from itertools import pairwise
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
    OperationsFailedError,
    OperationTimeoutError,
    run_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.exhaustive

many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@attrs.frozen
class Plan:
    """How long each operation takes, and whether it fails then."""

    seconds: list[int]
    failing: list[bool]
    max_concurrency: int
    given: bool
    lazy: bool
    limiter: bool

    def starts(self, longest: float) -> list[float]:
        """When each starts, if none takes more than *longest* and no failure cancels."""
        free = [0.0] * self.max_concurrency
        starts = list[float]()
        for each in self.seconds:
            starts.append(heapq.heappop(free))
            heapq.heappush(free, starts[-1] + min(each, longest))
        return starts

    def ends(self, longest: float = 1e9) -> list[float]:
        starts = self.starts(longest)
        return [
            start + min(each, longest) for start, each in zip(starts, self.seconds, strict=True)
        ]


def plans() -> st.SearchStrategy[Plan]:
    """Up to a dozen operations of zero to four seconds."""
    pairs = st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=12)
    flags = (st.booleans(), st.booleans(), st.booleans())
    return st.builds(_plan, pairs, st.integers(1, 5), *flags)


def _plan(
    pairs: list[tuple[int, bool]], max_concurrency: int, given: bool, lazy: bool, limiter: bool
) -> Plan:
    seconds, failing = [each for each, _ in pairs], [fails for _, fails in pairs]
    return Plan(seconds, failing, max_concurrency, given, lazy, limiter)


@attrs.define(eq=False)
class Trial:
    """One plan, carried out in one run of trio on the virtual clock."""

    plan: Plan
    gauge: Gauge = attrs.field(factory=Gauge)
    source: Source = attrs.field(factory=Source)
    elapsed: float = -1.0

    def arguments(self) -> dict[str, Any]:
        """What every function of the family takes."""
        plan = self.plan
        ops = [
            self.gauge.op(index, seconds, OSError(index) if failing else None)
            for index, (seconds, failing) in enumerate(zip(plan.seconds, plan.failing, strict=True))
        ]
        bound = plan.max_concurrency
        return {
            "ops": self.source.of(ops) if plan.lazy else ops,
            "max_concurrency": trio.CapacityLimiter(bound) if plan.limiter else bound,
        }

    def run(self, job: Callable[..., Awaitable[Any]]) -> Any:
        """Return the job's result, or the error that it ended with."""

        async def main() -> Any:
            watch = Stopwatch()
            async with foreign_nursery() as nursery:
                arguments = self.arguments()
                try:
                    return await job(nursery if self.plan.given else None, **arguments)
                except OperationsFailedError as error:
                    return error
                finally:
                    self.elapsed = watch.seconds
                    assert not nursery.child_tasks
                    assert not nursery.cancel_scope.cancel_called
                    bound = arguments["max_concurrency"]
                    assert isinstance(bound, int) or not bound.borrowed_tokens

        result = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        assert self.gauge.running == 0
        assert self.gauge.peak <= self.plan.max_concurrency
        return result


def succeeded(error: OperationsFailedError) -> list[int]:
    """The indices of the operations that did succeed."""
    return [i for i, each in enumerate(error.outcomes) if isinstance(each, outcome.Value)]


async def run_job(nursery: trio.Nursery | None, *, ops: Any, **options: Any) -> Any:
    return await run_with_limit(nursery, ops, **options)


@many
@given(plans())
def test_collected_outcomes_follow_the_plan(plan: Plan) -> None:
    """Every operation has its outcome at its index; the job takes as long as the slowest slot."""
    trial = Trial(plan)
    results = trial.run(partial(run_job, on_error="collect"))
    shown = [each.error.args[0] if hasattr(each, "error") else each.value for each in results]
    assert shown == list(range(len(plan.seconds)))
    kinds = [outcome.Error if failing else outcome.Value for failing in plan.failing]
    assert [type(each) for each in results] == kinds
    assert trial.gauge.started == list(range(len(plan.seconds)))
    assert trial.elapsed == max(plan.ends(), default=0)


@many
@given(plans())
def test_continue_raises_exactly_the_failures(plan: Plan) -> None:
    """All run; if any failed, the group holds all failures and the outcomes hold everything."""
    trial = Trial(plan)
    failing = [i for i, fails in enumerate(plan.failing) if fails]
    result = trial.run(partial(run_job, on_error="continue"))
    if not failing:
        assert result == list(range(len(plan.seconds)))
    else:
        assert [each.args[0] for each in result.exceptions] == failing
        assert succeeded(result) == sorted(trial.gauge.finished)
        assert result.message == f"{len(failing)} of {len(plan.seconds)} operations failed"
    assert trial.elapsed == max(plan.ends(), default=0)


@many
@given(plans())
def test_the_first_failure_ends_the_job_at_its_instant(plan: Plan) -> None:
    """Nothing starts afterwards; every failure of that instant that happened is in the group."""
    trial = Trial(plan)
    ends, starts = plan.ends(), plan.starts(1e9)
    first = min((end for end, fails in zip(ends, plan.failing, strict=True) if fails), default=None)
    result = trial.run(run_job)
    if first is None:
        assert result == list(range(len(plan.seconds)))
    else:
        assert trial.elapsed == first
        assert {each.args[0] for each in result.exceptions} == set(trial.gauge.failed)
        assert all(ends[index] == first for index in trial.gauge.failed)
        assert all(starts[index] <= first for index in trial.gauge.started)
        assert succeeded(result) == sorted(trial.gauge.finished)


@many
@given(plans(), st.sampled_from([0.5, 1.5, 2.5, 3.5]))
def test_timeouts_strike_exactly_those_that_are_too_slow(plan: Plan, timeout: float) -> None:
    """Each has the full time from its own start; expiry frees the slot for the next at once."""
    trial = Trial(plan)
    results = trial.run(partial(run_job, on_error="collect", timeout=timeout))
    late = [
        isinstance(each, outcome.Error) and isinstance(each.error, OperationTimeoutError)
        for each in results
    ]
    assert late == [seconds > timeout for seconds in plan.seconds]
    assert trial.elapsed == max(plan.ends(timeout), default=0)


@attrs.define(eq=False)
class Consumer:
    """Read a stream, with a pause after each result; check that it never runs ahead."""

    pauses: list[int]
    ordered: bool
    buffer: int
    trial: Trial
    got: list[int] = attrs.field(factory=list[int])
    stop_after: int | None = None

    async def __call__(self, nursery: trio.Nursery | None, *, ops: Any, **options: Any) -> None:
        stream = stream_with_limit(
            nursery, ops, ordered=self.ordered, buffer=self.buffer, on_error="collect", **options
        )
        gauge, holds = self.trial.gauge, self.trial.plan.max_concurrency + self.buffer
        async with stream as results:
            async for index, _ in results:
                self.got.append(index)
                await trio.sleep(self.pauses[len(self.got) % len(self.pauses)])
                assert len(gauge.started) <= len(self.got) + holds
                if len(self.got) == self.stop_after:
                    break


@many
@given(
    plans(),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 3),
    st.none() | st.integers(1, 5),
)
def test_a_stream_yields_everything_once_and_never_runs_ahead(
    plan: Plan, pauses: list[int], ordered: bool, buffer: int, stop_after: int | None
) -> None:
    """Whatever the consumer's pace: each index once, in order if asked for, within the bound."""
    trial = Trial(plan)
    consumer = Consumer(pauses, ordered, buffer, trial, stop_after=stop_after)
    trial.run(consumer)
    if stop_after is None or stop_after > len(plan.seconds):
        assert sorted(consumer.got) == list(range(len(plan.seconds)))
    else:
        assert len(consumer.got) == stop_after
    assert len(set(consumer.got)) == len(consumer.got)
    if ordered:
        assert consumer.got == list(range(len(consumer.got)))


@many
@given(plans(), st.integers(1, 4), st.integers(0, 5))
def test_batches_never_overlap(plan: Plan, batch_size: int, delay: int) -> None:
    """An operation of a batch starts when the batch before has ended and the delay is over."""
    trial = Trial(plan)
    trial.run(
        partial(run_job, on_error="collect", batch_size=batch_size, delay_between_batches=delay)
    )
    indices = range(len(plan.seconds))
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    began, ended = trial.gauge.began_at, trial.gauge.ended_at
    for before, after in pairwise(batches):
        end = max(ended[index] for index in before)
        assert min(began[index] for index in after) == end + delay
    assert trial.elapsed == max(ended.values(), default=0)
