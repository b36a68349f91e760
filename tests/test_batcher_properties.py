"""Any course of events around a batcher, or a stream in batches, goes as a plain model says."""

from __future__ import annotations

import math
from itertools import cycle
from typing import TYPE_CHECKING, Any, Literal

import attrs
import outcome
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.operations import Stopwatch, foreign_nursery, leaves
from trio_resilience import BatcherStatistics, OperationsCancelledError, batched, open_batcher

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = pytest.mark.exhaustive

many = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Times are in hundredths of a second: what happens by the script at multiples of 100, what comes of
# an age 25 later, and what comes of a call so many times 37 later, so that no two coincide.

Step = tuple[Literal["submit", "cancel", "sleep"], int]


@attrs.frozen
class Plan:
    """The options of a batcher, how its calls go, and what is done to it, step by step."""

    batch_size: int
    max_age: float
    max_concurrency: int
    extra_room: int
    durations: list[int]
    failing: list[bool]
    steps: list[Step]
    ending: Literal["leave", "raise", "cancel"]
    given: bool

    @property
    def queue_size(self) -> int:
        return self.batch_size + self.extra_room


plans = st.builds(
    Plan,
    batch_size=st.integers(1, 4),
    max_age=st.sampled_from([0, 125, 225, math.inf]),
    max_concurrency=st.integers(1, 3),
    extra_room=st.integers(0, 2),
    durations=st.lists(st.sampled_from([37, 137, 237]), min_size=1, max_size=4),
    failing=st.lists(st.booleans(), min_size=1, max_size=4),
    steps=st.lists(
        st.tuples(st.just("submit"), st.integers(1, 4))
        | st.tuples(st.just("cancel"), st.integers(0, 20))
        | st.tuples(st.just("sleep"), st.integers(1, 3)),
        max_size=12,
    ),
    ending=st.sampled_from(["leave", "raise", "cancel"]),
    given=st.booleans(),
)


@attrs.define(eq=False)
class Flight:
    """A batch that is being processed."""

    items: list[int]
    end: float
    fails: bool
    wanted: set[int]


@attrs.define(eq=False)
class Model:
    """What a batcher should do, in a list, a clock and a loop."""

    plan: Plan
    now: float = 0
    line: list[tuple[int, float]] = attrs.field(factory=list[tuple[int, float]])
    flights: list[Flight] = attrs.field(factory=list[Flight])
    batches: list[tuple[float, list[int]]] = attrs.field(factory=list[tuple[float, list[int]]])
    results: dict[int, str] = attrs.field(factory=dict[int, str])
    submitted: int = 0
    closing: bool = False

    def apply(self, step: Step) -> None:
        kind, number = step
        if kind == "submit":
            for _ in range(number):
                self.line.append((self.submitted, self.now))
                self.submitted += 1
                self.start_due()
        elif kind == "cancel":
            self.cancel(number)
        else:
            self.advance(self.now + 100 * number)

    def cancel(self, item: int) -> None:
        if item >= self.submitted or item in self.results:
            return
        self.results[item] = "cancelled"
        self.line = [each for each in self.line if each[0] != item]
        for flight in self.flights:
            flight.wanted.discard(item)
        self.flights = [flight for flight in self.flights if flight.wanted]
        self.start_due()

    def due(self) -> float:
        """When the next batch starts, if nothing else happens."""
        if not self.line or len(self.flights) == self.plan.max_concurrency:
            return math.inf
        if self.closing or len(self.line) >= self.plan.batch_size:
            return self.now
        return max(self.now, self.line[0][1] + self.plan.max_age)

    def start_due(self) -> None:
        plan = self.plan
        while self.due() <= self.now:
            items = [item for item, _ in self.line[: plan.batch_size]]
            del self.line[: plan.batch_size]
            number = len(self.batches)
            self.batches.append((self.now, items))
            end = self.now + plan.durations[number % len(plan.durations)]
            fails = plan.failing[number % len(plan.failing)]
            self.flights.append(Flight(items, end, fails, set(items)))

    def advance(self, until: float) -> None:
        while True:
            ends = min((flight.end for flight in self.flights), default=math.inf)
            upcoming = min(ends, self.due())
            if upcoming > until or upcoming == math.inf:
                break
            self.now = upcoming
            for flight in [each for each in self.flights if each.end == upcoming]:
                self.flights.remove(flight)
                for item in flight.wanted:
                    self.results[item] = "failed" if flight.fails else "done"
            self.start_due()
        self.now = self.now if until == math.inf else until

    def end(self) -> None:
        if self.plan.ending == "cancel":
            left = [item for item, _ in self.line]
            left += [item for flight in self.flights for item in flight.wanted]
            self.results.update(dict.fromkeys(left, "stopped"))
            self.line, self.flights = [], []
        else:
            self.closing = True
            self.start_due()
            self.advance(math.inf)

    def check(self, now: BatcherStatistics) -> None:
        waiting = min(len(self.line), self.plan.queue_size)
        assert now.waiting == waiting
        assert now.in_line == len(self.line) - waiting
        assert now.in_flight == sum(len(flight.items) for flight in self.flights)


class BodyError(Exception):
    """What a body raises."""


@attrs.define(eq=False)
class Trial:
    """The same, done to a real batcher."""

    plan: Plan
    watch: Stopwatch = attrs.field(factory=Stopwatch)
    batches: list[tuple[float, list[int]]] = attrs.field(factory=list[tuple[float, list[int]]])
    results: dict[int, str] = attrs.field(factory=dict[int, str])
    errors: list[BaseException] = attrs.field(factory=list[BaseException])
    scopes: list[trio.CancelScope] = attrs.field(factory=list[trio.CancelScope])
    batcher: Any = None

    @property
    def now(self) -> float:
        return round(100 * self.watch.seconds)

    async def process(self, items: list[int]) -> list[str]:
        plan, number = self.plan, len(self.batches)
        self.batches.append((self.now, items))
        await trio.sleep(plan.durations[number % len(plan.durations)] / 100)
        if plan.failing[number % len(plan.failing)]:
            raise OSError(number)
        return [f"result of {item}" for item in items]

    async def submit(self, item: int) -> None:
        with self.scopes[item]:
            result = await outcome.acapture(self.batcher.submit, item)
            if isinstance(result, outcome.Value):
                assert result.value == f"result of {item}"
                self.results[item] = "done"
            elif isinstance(result.error, OSError):
                self.errors.append(result.error)
                self.results[item] = "failed"
            elif isinstance(result.error, OperationsCancelledError):
                self.results[item] = "stopped"
            else:
                result.unwrap()
        if self.scopes[item].cancelled_caught:
            self.results[item] = "cancelled"

    async def apply(self, step: Step, submitters: trio.Nursery) -> None:
        kind, number = step
        if kind == "submit":
            for _ in range(number):
                self.scopes.append(trio.CancelScope())
                submitters.start_soon(self.submit, len(self.scopes) - 1)
                await trio.testing.wait_all_tasks_blocked()
        elif kind == "cancel":
            for scope in self.scopes[number : number + 1]:
                scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
        else:
            await trio.sleep_until(self.watch.started + round(self.now / 100) + number)

    async def run(self, model: Model) -> None:
        plan = self.plan
        async with foreign_nursery() as nursery, trio.open_nursery() as submitters:
            self.batcher = open_batcher(
                nursery if plan.given else None,
                self.process,
                batch_size=plan.batch_size,
                max_age=plan.max_age / 100,
                max_concurrency=plan.max_concurrency,
                queue_size=plan.queue_size,
            )
            with trio.CancelScope() as scope:
                async with self.batcher:
                    for step in plan.steps:
                        await self.apply(step, submitters)
                        model.apply(step)
                        model.check(self.batcher.statistics())
                    if plan.ending == "raise":
                        raise BodyError
                    if plan.ending == "cancel":
                        scope.cancel()
            assert not nursery.child_tasks


@many
@given(plans)
def test_a_batcher_does_what_the_model_does(plan: Plan) -> None:
    """The same batches at the same times, and for each submitter what came of its own item."""

    async def main() -> None:
        model, trial = Model(plan), Trial(plan)
        if plan.ending == "raise":
            with pytest.raises(ExceptionGroup) as caught:
                await trial.run(model)
            assert [type(each) for each in leaves(caught.value)] == [BodyError]
        else:
            await trial.run(model)
        model.end()
        assert trial.batches == model.batches
        assert trial.results == model.results
        assert len(trial.errors) == len({id(error) for error in trial.errors})
        if plan.ending == "leave":
            assert trial.now == model.now
        model.check(trial.batcher.statistics())

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


# --- batches of a stream ------------------------------------------------------------------------


@attrs.frozen
class Course:
    """When the items of a source come, and what the consumer does meanwhile."""

    gaps: list[int]
    batch_size: int
    max_age: float
    pauses: list[int]
    patience: list[float]
    """How long it waits for a batch before it gives up and tries again."""
    given: bool


courses = st.builds(
    Course,
    gaps=st.lists(st.sampled_from([0, 100, 300]), max_size=15),
    batch_size=st.integers(1, 4),
    max_age=st.sampled_from([0, 125, 225, math.inf]),
    pauses=st.lists(st.sampled_from([0, 37, 237, 537]), min_size=1, max_size=4),
    patience=st.lists(st.sampled_from([53, 153, math.inf]), min_size=1, max_size=4),
    given=st.booleans(),
)


@attrs.define(eq=False)
class Reading:
    """One course, and what was pulled and taken, and when."""

    course: Course
    watch: Stopwatch = attrs.field(factory=Stopwatch)
    pulled: list[float] = attrs.field(factory=list[float])
    ended: float = math.inf
    taken: int = 0

    @property
    def now(self) -> float:
        return round(100 * self.watch.seconds)

    async def source(self) -> AsyncIterator[int]:
        for number, gap in enumerate(self.course.gaps):
            await trio.sleep(gap / 100)
            self.pulled.append(self.now)
            assert number < self.taken + self.course.batch_size, "no more is held"
            yield number
        await trio.lowlevel.checkpoint()
        self.ended = self.now

    def check(self, batch: list[int], asked: float) -> None:
        """A batch has the next items, and came when it was due, or when it was asked for."""
        course, first = self.course, self.taken
        assert batch == list(range(first, first + len(batch)))
        assert 1 <= len(batch) <= course.batch_size
        is_full = len(batch) == course.batch_size
        full = self.pulled[first + course.batch_size - 1] if is_full else math.inf
        due = min(full, self.pulled[first] + course.max_age, self.ended)
        assert self.now == max(asked, due)
        self.taken += len(batch)

    async def run(self) -> None:
        course = self.course
        pauses, patience = cycle(course.pauses), self._patience()
        async with (
            foreign_nursery() as nursery,
            batched(
                nursery if course.given else None,
                self.source(),
                batch_size=course.batch_size,
                max_age=course.max_age / 100,
            ) as batches,
        ):
            while True:
                asked, batch = self.now, list[int]()
                with trio.move_on_after(next(patience) / 100):
                    batch = await anext(batches, list[int]())
                    if not batch:
                        break
                if batch:
                    self.check(batch, asked)
                    await trio.sleep(next(pauses) / 100)
            assert self.taken == len(course.gaps)

    def _patience(self) -> Iterator[float]:
        yield from (each for each in self.course.patience for _ in range(4))
        while True:
            yield math.inf


@many
@given(courses)
def test_every_item_is_in_one_batch_in_order_and_in_time(course: Course) -> None:
    """Whatever the pace of source and consumer, and however often it gives up waiting."""

    async def main() -> None:
        await Reading(course).run()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
