"""Bulkhead: whatever is done with it, it behaves like a plain model, and blocks as theory says."""

from __future__ import annotations

import heapq
import math
from functools import partial
from random import Random
from typing import TYPE_CHECKING

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.test_semaphore import counts
from tests.test_semaphore_properties import Guest, GuestRun, Model, many
from trio_resilience import (
    Bulkhead,
    BulkheadFullError,
    Event,
    Rejected,
    WaitFinished,
    WaitStarted,
    subscribe,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

pytestmark = pytest.mark.exhaustive


# --- a plain model ------------------------------------------------------------------------------


@attrs.define(eq=False)
class LineModel(Model):
    """What a bulkhead is: a semaphore whose line is bounded, in length and in time."""

    queue_size: float = math.inf
    max_wait: float = math.inf
    now: float = 0.0
    rejections: int = 0
    due: dict[Guest, float] = attrs.field(factory=dict[Guest, float])
    refused: list[Guest] = attrs.field(factory=list[Guest])

    def come(self, guest: Guest) -> None:
        has_room = len(self.line) < self.queue_size
        if self.fits(1) or has_room:
            self.due[guest] = self.now + self.max_wait
            super().come(guest)
            self.expire()
        else:
            self.refuse(guest)

    def refuse(self, guest: Guest) -> None:
        self.rejections += 1
        self.refused.append(guest)

    def expire(self) -> None:
        for guest in [each for each in self.line if self.due[each] <= self.now]:
            self.line.remove(guest)
            self.refuse(guest)

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.expire()


@many
class BulkheadMachine(RuleBasedStateMachine):
    """Every rule does one thing, or two in one step, and compares at once and when all rest."""

    def __init__(self) -> None:
        super().__init__()
        self.run = GuestRun()
        self.number = 0

    @initialize(
        size=st.integers(1, 3),
        queue_size=st.none() | st.integers(0, 3),
        max_wait=st.just(math.inf) | st.integers(0, 4),
    )
    def make(self, size: int, queue_size: int | None, max_wait: float) -> None:
        self.bulkhead = Bulkhead(size, queue_size=queue_size, max_wait=max_wait)
        room = math.inf if queue_size is None else queue_size
        self.model = LineModel(size, queue_size=room, max_wait=max_wait)

    def teardown(self) -> None:
        self.run.end()

    def do(self, *actions: Callable[[], object]) -> None:
        """Do them in one step, without a checkpoint in between; compare after each."""

        def act() -> None:
            for action in actions:
                action()
                assert counts(self.bulkhead) == self.model.counts()

        self.run.do(act)

    @rule(by_call=st.booleans())
    def come(self, by_call: bool) -> None:
        guest = Guest(self.number, 1)
        self.number += 1

        async def call() -> None:
            guest.is_in = True
            await guest.leave.wait()

        async def visit_by_call() -> None:
            await guest.visit(partial(self.bulkhead.call, call), bool)

        visit = visit_by_call
        if not by_call:
            visit = partial(guest.visit, self.bulkhead.acquire, self.bulkhead.release)
        self.run.do(lambda: self.run.nursery.start_soon(visit))
        self.model.come(guest)

    @rule()
    def take_by_hand(self) -> None:
        def take() -> None:
            is_free = not self.model.line and self.model.fits(1)
            try:
                self.bulkhead.acquire_nowait()
            except trio.WouldBlock:
                assert not is_free
            else:
                assert is_free
                self.model.by_hand += 1

        self.do(take)

    @precondition(lambda self: self.model.by_hand)
    @rule()
    def release_by_hand(self) -> None:
        self.do(self._release)

    def _release(self) -> None:
        self.bulkhead.release()
        self.model.by_hand -= 1
        self.model.serve()

    @precondition(lambda self: self.model.inside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from(self.model.inside))
        self.run.do(guest.leave.set if data.draw(st.booleans()) else guest.scope.cancel)
        self.model.go(guest)

    @precondition(lambda self: self.model.line)
    @rule(data=st.data())
    def cancel_in_line(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from(self.model.line))

        def cancel() -> None:
            guest.scope.cancel()
            self.model.go(guest)

        self.do(cancel)

    @rule(seconds=st.integers(1, 3))
    def pass_time(self, seconds: int) -> None:
        self.run.do(lambda: self.run.clock.jump(seconds))
        self.model.pass_time(seconds)

    @precondition(lambda self: self.model.line and self.model.by_hand)
    @rule(cancel=st.booleans())
    def release_at_the_last_instant(self, cancel: bool) -> None:
        """Who is let in when its time is just up is in; unless it is cancelled as well."""
        head = self.model.line[0]
        seconds = min(self.model.due[head] - self.model.now, 100.0)

        def release_and_jump() -> None:
            self._release()
            self.run.clock.jump(seconds)
            if cancel:
                head.scope.cancel()

        self.run.do(release_and_jump)
        self.model.pass_time(seconds)  # the others' time is up before the head runs, and leaves
        if cancel:
            self.model.go(head)

    @precondition(lambda self: self.model.line and self.model.max_wait < math.inf)
    @rule(data=st.data())
    def cancel_at_the_last_instant(self, data: st.DataObject) -> None:
        """The cancellation wins, and is no rejection."""
        guest = data.draw(st.sampled_from(self.model.line))
        seconds = self.model.due[guest] - self.model.now

        def jump_and_cancel() -> None:
            self.run.clock.jump(seconds)
            guest.scope.cancel()

        self.run.do(jump_and_cancel)
        self.model.go(guest)
        self.model.pass_time(seconds)

    @invariant()
    def is_as_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        assert counts(self.bulkhead) == self.model.counts()
        assert self.bulkhead.statistics().rejections == self.model.rejections
        assert all(guest.is_in and guest.error is None for guest in self.model.inside)
        assert not any(guest.is_in or guest.is_gone for guest in self.model.line)
        for guest in self.model.refused:
            assert isinstance(guest.error, BulkheadFullError)


TestBulkhead = BulkheadMachine.TestCase


# --- plans in time --------------------------------------------------------------------------------


@attrs.frozen
class Call:
    """When a call comes, how long it takes, and how long its caller has patience."""

    at: float
    seconds: float
    patience: float


def calls() -> st.SearchStrategy[list[Call]]:
    """Up to twenty, no two of which do anything at the same instant."""
    times = st.lists(st.tuples(*[st.integers(0, 12)] * 2, st.none() | st.integers(1, 9)))
    return times.map(_distinct)


def _distinct(times: Sequence[tuple[int, int, int | None]]) -> list[Call]:
    return [
        Call(
            at + number / 64,
            seconds + number / 4096,
            math.inf if patience is None else patience + number / 2**18,
        )
        for number, (at, seconds, patience) in enumerate(times[:20], start=1)
    ]


@many
@given(calls(), st.integers(1, 3), st.none() | st.integers(0, 3), st.none() | st.integers(0, 5))
def test_a_bulkhead_follows_the_plan(
    plan: list[Call], size: int, queue_size: int | None, max_wait: int | None
) -> None:
    """Whoever comes, stays or gives up: refused are those that a simulation of the line refuses."""
    limit = math.inf if max_wait is None else max_wait + 2**-24
    bulkhead = Bulkhead(size, queue_size=queue_size, max_wait=limit)
    ends, heard = dict[int, str](), list[Event]()

    async def make(number: int, call: Call) -> None:
        await trio.sleep(call.at)
        with trio.move_on_after(call.patience):
            try:
                ends[number] = "cancelled"
                await bulkhead.call(trio.sleep, call.seconds)
                ends[number] = "done"
            except BulkheadFullError:
                ends[number] = "refused"

    async def main() -> None:
        with subscribe(heard.append):
            async with trio.open_nursery() as nursery:
                for number, call in enumerate(plan):
                    nursery.start_soon(make, number, call)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    room = math.inf if queue_size is None else queue_size
    assert ends == simulate(plan, size, room, limit)
    assert counts(bulkhead) == (0, size, 0)
    kinds = [type(event) for event in heard]
    assert kinds.count(WaitStarted) == kinds.count(WaitFinished)
    assert kinds.count(Rejected) == [*ends.values()].count("refused")
    assert bulkhead.statistics().rejections == kinds.count(Rejected)


def simulate(plan: list[Call], size: int, room: float, limit: float) -> dict[int, str]:
    """What becomes of each call, event by event."""
    ends = dict[int, str]()
    running, line = set[int](), list[int]()
    events: list[tuple[float, int, str]] = [
        (call.at, number, "come") for number, call in enumerate(plan)
    ]
    heapq.heapify(events)

    def start(number: int, now: float) -> None:
        running.add(number)
        heapq.heappush(events, (now + plan[number].seconds, number, "done"))

    while events:
        now, number, what = heapq.heappop(events)
        if what == "come":
            heapq.heappush(events, (now + plan[number].patience, number, "cancelled"))
            if len(running) < size and not line:
                start(number, now)
            elif len(line) < room:
                line.append(number)
                heapq.heappush(events, (now + limit, number, "refused"))
            else:
                ends[number] = "refused"
        elif number in line and what in ("refused", "cancelled"):
            line.remove(number)
            ends[number] = what
        elif number in running and what in ("done", "cancelled"):
            running.remove(number)
            ends[number] = what
            if line:
                start(line.pop(0), now)
    return ends


# --- theory ---------------------------------------------------------------------------------------


@pytest.mark.watchdog(120)
def test_blocking_is_as_erlang_says() -> None:
    """Ten permits, no line, 8 Erlang: 12.17 % of the calls are refused; each as in a simulation."""
    rng, bulkhead, refused = Random(1917), Bulkhead(10, queue_size=0), list[int]()
    gaps = [rng.expovariate(8.0) for _ in range(20_000)]
    seconds = [rng.expovariate(1.0) for _ in range(20_000)]

    async def call(number: int) -> None:
        try:
            await bulkhead.call(trio.sleep, seconds[number])
        except BulkheadFullError:
            refused.append(number)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for number, gap in enumerate(gaps):
                await trio.sleep(gap)
                nursery.start_soon(call, number)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert bulkhead.statistics().rejections == len(refused)
    assert len(refused) / 20_000 == pytest.approx(0.1217, abs=0.0126)
    assert refused == lost_calls(gaps, seconds)


def lost_calls(gaps: list[float], seconds: list[float]) -> list[int]:
    """The calls that find ten others running."""
    now, running, lost = 0.0, list[float](), list[int]()
    for number, (gap, service) in enumerate(zip(gaps, seconds, strict=True)):
        now += gap
        while running and running[0] <= now:
            heapq.heappop(running)
        if len(running) < 10:
            heapq.heappush(running, now + service)
        else:
            lost.append(number)
    return lost
