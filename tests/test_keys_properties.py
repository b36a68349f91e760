"""Any items with any keys are run as a simple model says: who begins when, and never too many."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import attrs
import outcome
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.operations import Source, Stopwatch, foreign_nursery
from trio_resilience import (
    OperationsFailedError,
    Semaphore,
    map_with_limit,
    stream_map_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.exhaustive

many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@attrs.frozen
class Item:
    """An operation's item: what it has in common with others, and what becomes of it."""

    number: int
    key: str
    seconds: int
    fails: bool


@attrs.frozen
class Plan:
    """Items, and how they are to be run."""

    items: list[Item]
    max_concurrency: int
    max_per_key: int
    lookahead: int
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
            "key": attrgetter("key"),
            "max_per_key": self.max_per_key,
            "lookahead": self.lookahead,
        }

    def begins(self, longest: float = math.inf) -> dict[int, float]:
        """When each item begins: of those in the window, the earliest whose key is free."""
        waiting, running = list(self.items), list[tuple[float, int, str]]()
        counts, begins, now = Counter[str](), dict[int, float](), 0.0
        while waiting:
            while len(running) < self.max_concurrency and (item := self._next(waiting, counts)):
                waiting.remove(item)
                counts[item.key] += 1
                begins[item.number] = now
                heapq.heappush(running, (now + min(item.seconds, longest), item.number, item.key))
            now = running[0][0]
            while running and running[0][0] == now:
                counts[heapq.heappop(running)[2]] -= 1
        return begins

    def _next(self, waiting: list[Item], counts: Counter[str]) -> Item | None:
        window = waiting[: self.lookahead]
        return next((item for item in window if counts[item.key] < self.max_per_key), None)

    def ends(self, longest: float = math.inf) -> dict[int, float]:
        begins = self.begins(longest)
        return {
            item.number: begins[item.number] + min(item.seconds, longest) for item in self.items
        }


def _plan(drawn: list[tuple[str, int, bool]], *rest: Any) -> Plan:
    items = [Item(number, *each) for number, each in enumerate(drawn)]
    return Plan(items, *rest)


def plans(shortest: int = 1, longest: int = 14) -> st.SearchStrategy[Plan]:
    """Some items of a few keys, most of them of one."""
    drawn = st.tuples(st.sampled_from("aaabc"), st.integers(shortest, 4), st.booleans())
    return st.builds(
        _plan,
        st.lists(drawn, max_size=longest),
        st.integers(1, 5),
        st.integers(1, 3),
        st.one_of(st.integers(1, 6), st.just(1000)),
        st.sampled_from(["list", "generator", "async generator"]),
        st.sampled_from(["int", "semaphore", "limiter"]),
        st.booleans(),
    )


@attrs.define(eq=False)
class Trial:
    """One plan, carried out in one run of trio on the virtual clock."""

    plan: Plan
    source: Source = attrs.field(factory=Source)
    running: Counter[str] = attrs.field(factory=Counter[str])
    begins: dict[int, float] = attrs.field(factory=dict[int, float])
    ended: int = 0
    excesses: list[bool] = attrs.field(factory=list[bool])
    """For every operation that begins: more of its key, in all, or pulled than may be."""
    elapsed: float = -1.0
    watch: Stopwatch = attrs.field(init=False)

    async def work(self, item: Item) -> int:
        self.begins[item.number] = self.watch.seconds
        self.running[item.key] += 1
        self._look(item)
        try:
            await trio.sleep(item.seconds)
        finally:
            self.running[item.key] -= 1
            self.ended += 1
        if item.fails:
            raise OSError(item.number)
        return item.number

    def _look(self, item: Item) -> None:
        # What is raised in an operation might only be collected.
        plan, unfinished = self.plan, self.source.pulled - self.ended
        self.excesses += [
            self.running[item.key] > plan.max_per_key,
            self.running.total() > plan.max_concurrency,
            unfinished > plan.max_concurrency + plan.lookahead + 1,
        ]

    def items(self) -> Any:
        """The plan's items as a source of its shape."""
        if self.plan.shape == "list":
            return self.plan.items
        make = self.source.of if self.plan.shape == "generator" else self.source.async_of
        return make(self.plan.items)

    def run(self, job: Callable[..., Awaitable[Any]], options: dict[str, Any]) -> Any:
        """Return the job's result, or the group that it ended with."""

        async def main() -> Any:
            self.watch = Stopwatch()
            async with foreign_nursery() as nursery:
                where = nursery if self.plan.given else None
                try:
                    with trio.fail_after(10_000):
                        return await job(where, self.work, self.items(), **options)
                except OperationsFailedError as error:
                    return error
                finally:
                    self.elapsed = self.watch.seconds
                    assert not nursery.child_tasks
                    _check_untouched(options["max_concurrency"])

        result = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
        assert self.running.total() == 0
        assert not any(self.excesses)
        return result


def _check_untouched(bound: Any) -> None:
    if isinstance(bound, Semaphore):
        assert (bound.statistics().borrowed, bound.statistics().waiting) == (0, 0)
    elif isinstance(bound, trio.CapacityLimiter):
        assert bound.borrowed_tokens == bound.statistics().tasks_waiting == 0


# --- a list of results ----------------------------------------------------------------------------


@many
@given(plans(), st.sampled_from([math.inf, 0.5, 1.5, 2.5]))
def test_every_item_begins_when_the_model_says(plan: Plan, timeout: float) -> None:
    """Whatever the source and the bound; and its outcome is at its own place."""
    trial = Trial(plan)
    results = trial.run(partial(map_with_limit, on_error="collect", timeout=timeout), plan.options)
    assert trial.begins == plan.begins(timeout)
    assert trial.elapsed == max(plan.ends(timeout).values(), default=0)
    late = [item.seconds > timeout for item in plan.items]
    failed = [item.fails for item in plan.items]
    for item, result in zip(plan.items, results, strict=True):
        if late[item.number] or failed[item.number]:
            assert isinstance(result, outcome.Error)
        else:
            assert result.unwrap() == item.number


@many
@given(plans())
def test_the_first_failure_ends_the_job_at_its_instant(plan: Plan) -> None:
    """What the model begins before that instant has begun, and nothing that it begins later."""
    trial, begins, ends = Trial(plan), plan.begins(), plan.ends()
    first = min((ends[item.number] for item in plan.items if item.fails), default=None)
    result = trial.run(map_with_limit, plan.options)
    if first is None:
        assert result == [item.number for item in plan.items]
        return
    assert isinstance(result, OperationsFailedError)
    assert trial.elapsed == first
    assert all(ends[error.args[0]] == first for error in result.exceptions)
    assert {n for n in begins if begins[n] < first} <= trial.begins.keys()
    assert trial.begins.items() <= begins.items()


@many
@given(plans(), st.integers(1, 5), st.integers(0, 3))
def test_a_batch_is_a_plan_of_its_own(plan: Plan, batch_size: int, delay: int) -> None:
    """Each begins when the one before has ended and the delay is over; windows end with it."""
    trial = Trial(plan)
    job = partial(
        map_with_limit, on_error="collect", batch_size=batch_size, delay_between_batches=delay
    )
    trial.run(job, plan.options)
    start, predicted = 0.0, dict[int, float]()
    for i in range(0, len(plan.items), batch_size):
        batch = attrs.evolve(plan, items=plan.items[i : i + batch_size])
        predicted |= {number: start + begin for number, begin in batch.begins().items()}
        start += max(batch.ends().values()) + delay
    assert trial.begins == predicted


@many
@given(plans(shortest=0, longest=30))
def test_items_that_take_no_time_are_bounded_too(plan: Plan) -> None:
    """Everything is run, the items of a key in their order, and the bounds hold at every step."""
    trial = Trial(plan)
    results: list[Any] = trial.run(partial(map_with_limit, on_error="collect"), plan.options)
    assert len(results) == len(plan.items) == trial.ended
    for key in "abc":
        began = [trial.begins.get(i.number, math.inf) for i in plan.items if i.key == key]
        assert began == sorted(began)


# --- a stream -------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Consumer:
    """Read a stream, with a pause after each result; check that it never runs ahead."""

    trial: Trial
    pauses: list[int]
    ordered: bool
    buffer: int
    stop_after: int | None
    resizes: list[int]
    got: list[int] = attrs.field(factory=list[int])

    async def __call__(
        self, nursery: trio.Nursery | None, fn: Any, items: Any, **options: Any
    ) -> None:
        stream: Any = stream_map_with_limit(
            nursery,
            fn,
            items,
            ordered=self.ordered,
            buffer=self.buffer,
            on_error="collect",
            **options,
        )
        holds = self.trial.plan.max_concurrency + self.buffer
        async with stream as results:
            async for item, _ in results:
                self.got.append(item.number)
                self._resize(options["max_concurrency"])
                await trio.sleep(self.pauses[len(self.got) % len(self.pauses)])
                assert len(self.trial.begins) <= len(self.got) + holds
                if len(self.got) == self.stop_after:
                    break

    def _resize(self, bound: Any) -> None:
        """Never to more than the plan says, so that its bound holds all the time."""
        if not self.resizes:
            return
        total = min(
            self.resizes[len(self.got) % len(self.resizes)], self.trial.plan.max_concurrency
        )
        if isinstance(bound, Semaphore):
            bound.permits = total
        elif isinstance(bound, trio.CapacityLimiter):
            bound.total_tokens = total


@many
@given(
    plans(shortest=0, longest=20),
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 3),
    st.none() | st.integers(1, 5),
    st.lists(st.integers(1, 5), max_size=4),
)
def test_a_stream_yields_everything_once_and_never_runs_ahead(
    plan: Plan,
    pauses: list[int],
    ordered: bool,
    buffer: int,
    stop_after: int | None,
    resizes: list[int],
) -> None:
    """Whatever the consumer's pace, and whatever becomes of the bound meanwhile."""
    trial = Trial(plan)
    consumer = Consumer(trial, pauses, ordered, buffer, stop_after, resizes)
    trial.run(consumer, plan.options)
    got, total = consumer.got, len(plan.items)
    assert len(got) == min(total, total if stop_after is None else stop_after)
    assert len(set(got)) == len(got)
    if ordered:
        assert got == list(range(len(got)))
    for key in "abc":
        began = [trial.begins.get(i.number, math.inf) for i in plan.items if i.key == key]
        assert began == sorted(began)


@many
@given(plans(), st.booleans())
def test_a_fast_consumer_is_not_noticed(plan: Plan, ordered: bool) -> None:
    """With room for all results everything begins as it does without a stream."""
    trial = Trial(plan)
    consumer = Consumer(trial, [0], ordered, len(plan.items), None, [])
    trial.run(consumer, plan.options)
    assert trial.begins == plan.begins()
    assert trial.elapsed == max(plan.ends().values(), default=0)
