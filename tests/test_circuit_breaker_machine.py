"""CircuitBreaker against a plain model, in any sequence of calls, times, hands and runs.

The model keeps lists: of calls that are inside, with the *round* that each was let into, and of
verdicts, each with its time. A round is what there is between two changes of state.
"""

from __future__ import annotations

import math
from typing import Any

import attrs
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from tests._circuits import (
    CLOSED,
    HALF_OPEN,
    ISOLATED,
    OPEN,
    Form,
    Visit,
    begin,
    call,
    decorated,
    guard,
)
from trio_resilience import CallAbandonedError, CircuitOpenError, Event, Exponential, subscribe
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._engine._guard import CircuitIsolation
from trio_resilience._events import CircuitState, CircuitStateChanged, Rejected, RejectionSkipped

SLOW = 5
WINDOW_CALLS = 4
WINDOW_SECONDS = 64
"""So a bucket is a second, and times in whole seconds are remembered as they are."""

ENDINGS: dict[str, object] = {
    "ok": "fine",
    "fail": OSError("down"),
    "ignore": ValueError("mine"),
    "cancel": None,
}


@attrs.frozen
class Options:
    """What circuits differ in."""

    threshold: int | None
    failure_rate: float | None
    slow_rate: float | None
    is_timed: bool
    in_seconds: bool
    min_calls: int
    grows: bool
    recovery: int
    most: int
    proofs: int
    timeout: int | None
    enforce: bool
    abandons: bool

    def build(self) -> CircuitBreaker:
        recovery = Exponential(self.recovery, max_delay=self.recovery * 4, jitter="none")
        return CircuitBreaker(
            failure_threshold=self.threshold,
            failure_rate=self.failure_rate,
            slow_call_rate=self.slow_rate,
            slow_call_duration=SLOW if self.is_timed else math.inf,
            window_calls=WINDOW_CALLS,
            window_seconds=WINDOW_SECONDS if self.in_seconds else None,
            min_calls=self.min_calls,
            recovery_timeout=recovery if self.grows else self.recovery,
            half_open_max_calls=self.most,
            success_threshold=self.proofs,
            half_open_timeout=self.timeout,
            failure_on=OSError,
            enforce=self.enforce,
            cancel_in_flight=self.abandons,
        )

    @property
    def is_possible(self) -> bool:
        watches = self.threshold or self.failure_rate or self.slow_rate
        return bool(watches) and (self.is_timed or not self.slow_rate)


@attrs.define(eq=False)
class Caller:
    """One who was let in."""

    visit: Visit
    began: int
    round: object
    """``None`` if he would have been refused."""


# --- the model ------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Model:
    """What a circuit should be."""

    options: Options
    now: int = 0
    state: CircuitState = CLOSED
    round: object = attrs.field(factory=object)
    inside: list[Caller] = attrs.field(factory=list[Caller])
    verdicts: list[tuple[int, bool, bool]] = attrs.field(factory=list[tuple[int, bool, bool]])
    """Since it was closed last, when, whether failed, and whether slow."""
    holds: list[CircuitIsolation] = attrs.field(factory=list[CircuitIsolation])
    row: int = 0
    openings: int = 0
    """Since it was closed last."""
    opened_at: int = 0
    heard_at: int = 0
    proofs: int = 0
    has_reason: bool = False
    has_failure: bool = False
    calls: int = 0
    failures: int = 0
    slow: int = 0
    rejections: int = 0
    opened: int = 0
    changes: list[tuple[CircuitState, CircuitState]] = attrs.field(
        factory=list[tuple[CircuitState, CircuitState]]
    )
    abandoned: list[Caller] = attrs.field(factory=list[Caller])

    @property
    def recovery(self) -> int:
        doublings = min(self.openings - 1, 2) if self.options.grows else 0
        return self.options.recovery << doublings

    @property
    def patience(self) -> int:
        return max(self.recovery, 1) if self.options.timeout is None else self.options.timeout

    @property
    def probes(self) -> int:
        return sum(caller.round is self.round for caller in self.inside)

    @property
    def retry_after(self) -> float | None:
        return max(0, self.opened_at + self.recovery - self.now) if self.state is OPEN else None

    def window(self) -> list[tuple[int, bool, bool]]:
        if self.options.in_seconds:
            return [each for each in self.verdicts if each[0] > self.now - WINDOW_SECONDS]
        return self.verdicts[-WINDOW_CALLS:]

    def rates(self) -> tuple[float | None, float | None]:
        window = self.window()
        watches = self.options.failure_rate or self.options.slow_rate
        if not window or not watches:
            return None, None
        failed, slow = (sum(each[column] for each in window) for column in (1, 2))
        return failed / len(window), slow / len(window)

    # what happens to it

    def come(self) -> object:
        """Return the round that the next caller is let into, or ``None``."""
        if self.state is HALF_OPEN and self.probes >= self.options.most:
            hung_at = self.heard_at + self.patience
            if self.now >= hung_at:
                self.open(hung_at)
        if self.state is OPEN and self.retry_after == 0:
            self.proofs = 0
            self.go(HALF_OPEN)
        if self.state is HALF_OPEN and self.probes < self.options.most:
            self.heard_at = self.now
            return self.round
        if self.state is CLOSED:
            return self.round
        self.rejections += 1
        return None

    def end(self, caller: Caller, ending: str) -> None:
        self.inside.remove(caller)
        has_failed = ending == "fail"
        if caller.round is not self.round or not (has_failed or ending == "ok"):
            return
        is_slow = self.options.is_timed and self.now - caller.began >= SLOW
        self.calls += 1
        self.failures += has_failed
        self.slow += is_slow
        self.row = self.row + 1 if has_failed else 0
        self.has_failure |= has_failed
        if self.state is HALF_OPEN:
            self.judge(has_failed or (is_slow and self.options.slow_rate is not None))
        else:
            self.verdicts.append((self.now, has_failed, is_slow))
            if self.is_too_much():
                self.open(self.now)

    def judge(self, is_bad: bool) -> None:
        self.heard_at = self.now
        self.proofs += 1
        if is_bad:
            self.open(self.now)
        elif self.proofs == self.options.proofs:
            self.close()

    def is_too_much(self) -> bool:
        if self.row == self.options.threshold:
            return True
        if len(self.window()) < self.options.min_calls:
            return False
        limits = self.options.failure_rate, self.options.slow_rate
        pairs = zip(self.rates(), limits, strict=True)
        return any(rate is not None and limit and rate >= limit for rate, limit in pairs)

    def open(self, when: int) -> None:
        self.openings += 1
        self.opened += 1
        self.opened_at, self.has_reason = when, True
        self.go(OPEN)
        if self.options.abandons and self.options.enforce:
            self.abandoned += self.inside
            self.inside.clear()

    def close(self) -> None:
        self.verdicts.clear()
        self.row = self.openings = 0
        self.go(CLOSED)

    def go(self, state: CircuitState) -> None:
        if state is not self.state:
            self.changes.append((self.state, state))
        self.state, self.round = state, object()

    def release(self, hold: CircuitIsolation) -> None:
        if hold in self.holds:
            self.holds.remove(hold)
            if not self.holds:
                self.close()

    def reset(self) -> None:
        self.holds.clear()
        self.has_reason = self.has_failure = False
        self.close()

    def begin_run(self, now: int) -> None:
        """Go on where the clock shows something else, and nobody is inside."""
        self.now = self.opened_at = now
        self.inside.clear()
        if self.options.in_seconds:
            self.verdicts.clear()
        if self.state is HALF_OPEN:
            self.go(OPEN)


# --- both of them ---------------------------------------------------------------------------------

Step = tuple[Any, ...]


@attrs.define(eq=False)
class Twins:
    """A circuit and its model, which are done the same things to."""

    options: Options
    form: Form
    looks: bool
    """Whether the circuit is looked at after each step, and not only at the end of a run."""
    model: Model = attrs.field(init=False)
    breaker: CircuitBreaker = attrs.field(init=False)
    handles: list[CircuitIsolation] = attrs.field(factory=list[CircuitIsolation])
    heard: list[Event] = attrs.field(factory=list[Event])
    _clock: trio.testing.MockClock = attrs.field(init=False)
    _nursery: trio.Nursery = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.model = Model(self.options)
        self.breaker = self.options.build()

    def run(self, steps: list[Step], start: int) -> None:
        """Take these steps in a run of their own, and leave who is inside to be cancelled."""
        self._clock = trio.testing.MockClock()
        self._clock.jump(start)
        with subscribe(self.heard.append):
            trio.run(self._main, steps, start, clock=self._clock)

    async def _main(self, steps: list[Step], start: int) -> None:
        self.model.begin_run(start)
        async with trio.open_nursery() as self._nursery:
            assert self.breaker.retry_after == self.model.retry_after
            for kind, *arguments in steps:
                await getattr(self, kind)(*arguments)
                if self.looks:
                    self.compare()
            self.compare()
            self._nursery.cancel_scope.cancel()
        assert self.breaker.statistics().in_flight == 0

    def compare(self) -> None:
        model, breaker, now = self.model, self.breaker, self.breaker.statistics()
        assert breaker.state is now.state is model.state
        assert breaker.retry_after == model.retry_after
        assert (now.failure_rate, now.slow_call_rate) == model.rates()
        assert (now.calls, now.failures, now.slow_calls) == (
            model.calls,
            model.failures,
            model.slow,
        )
        assert (now.rejections, now.opened) == (model.rejections, model.opened)
        assert (now.consecutive_failures, now.in_flight) == (model.row, len(model.inside))
        assert (now.reason is not None, breaker.last_failure is not None) == (
            model.has_reason,
            model.has_failure,
        )
        changes = [each for each in self.heard if isinstance(each, CircuitStateChanged)]
        # What a new run changes is told of with what happens first in it.
        assert [(each.previous, each.state) for each in changes] == model.changes[: len(changes)]
        assert len(model.changes) - len(changes) <= (model.state is OPEN)
        refusals = [each for each in self.heard if isinstance(each, (Rejected, RejectionSkipped))]
        assert len(refusals) == model.rejections

    # steps

    async def come(self, number: int) -> None:
        """Let so many come at one instant; they are not told apart."""
        if self.options.enforce:
            await self._come(number)
            return
        for _ in range(number):  # all of them run, and which of them is a probe cannot be seen
            await self._come(1)

    async def _come(self, number: int) -> None:
        visits = await begin(self._nursery, self.breaker, number, self.form)
        for visit in sorted(visits, key=lambda visit: not visit.has_run):
            admitted_to = self.model.come()
            self._check_abandoned()
            assert visit.has_run == (admitted_to is not None or not self.options.enforce)
            if visit.has_run:
                self.model.inside.append(Caller(visit, self.model.now, admitted_to))
            else:
                assert isinstance(visit.outcome, CircuitOpenError)
                assert visit.outcome.retry_after == self.model.retry_after

    async def end(self, index: int, ending: str) -> None:
        """Let one of those who are inside end so."""
        if not self.model.inside:
            return
        caller = self.model.inside[index % len(self.model.inside)]
        if ending == "cancel":
            await caller.visit.cancel()
        else:
            outcome = ENDINGS[ending]
            assert await caller.visit.end(outcome) is outcome
        self.model.end(caller, ending)
        self._check_abandoned()

    async def make(self, ending: str, times: int) -> None:
        """Let so many come, one after the other, and end at once."""
        for _ in range(times):
            before = self.model.inside[-1:]
            await self.come(1)
            if self.model.inside[-1:] != before:
                await self.end(-1, ending)

    def _check_abandoned(self) -> None:
        for caller in self.model.abandoned:
            assert isinstance(caller.visit.outcome, CallAbandonedError)
        self.model.abandoned.clear()

    async def wait(self, seconds: int | None) -> None:
        """Let so much time go by; or, if it is open, as much as it takes."""
        passed = int(self.model.retry_after or 0) if seconds is None else seconds
        self._clock.jump(passed)
        self.model.now += passed
        await wait_all_tasks_blocked()

    async def isolate(self) -> None:
        handle = self.breaker.isolate()
        self.handles.append(handle)
        self.model.holds.append(handle)
        self.model.go(ISOLATED)

    async def release(self, index: int) -> None:
        """Release a handle, which may have been before."""
        if self.handles:
            handle = self.handles[index % len(self.handles)]
            handle.release()
            self.model.release(handle)

    async def reset(self) -> None:
        self.breaker.reset()
        self.model.reset()


options = st.builds(
    Options,
    threshold=st.sampled_from([None, 1, 2, 3]),
    failure_rate=st.sampled_from([None, 0.5, 1.0]),
    slow_rate=st.sampled_from([None, 0.5]),
    is_timed=st.booleans(),
    in_seconds=st.booleans(),
    min_calls=st.sampled_from([1, 2, WINDOW_CALLS]),
    grows=st.booleans(),
    recovery=st.sampled_from([10, 100, 0]),
    most=st.sampled_from([1, 3]),
    proofs=st.sampled_from([1, 2]),
    timeout=st.sampled_from([None, 7]),
    enforce=st.sampled_from([True, True, False]),
    abandons=st.booleans(),
).filter(lambda drawn: drawn.is_possible)

STEPS: list[Step] = [
    ("wait", 0),  # the simplest one, which hypothesis puts in place of what does not matter
    *[("make", ending, times) for ending in ENDINGS for times in (1, 4)],
    *[("make", "fail", 2)] * 4,
    *[("make", "ok", 1)] * 6,
    *[("come", number) for number in (1, 1, 2, 4)] * 2,
    *[("end", index, ending) for index in (0, 1, 2) for ending in ENDINGS],
    *[("wait", seconds) for seconds in (None, None, None, None, 1, SLOW, 7, 7, 10, 64, 100)],
    *[("isolate",), ("release", 0), ("release", 1), ("reset",)],
]

# Short ones seldom come far.
runs = st.lists(st.lists(st.sampled_from(STEPS), min_size=30, max_size=50), min_size=1, max_size=2)


@settings(max_examples=300, deadline=None)
@given(
    options=options,
    form=st.sampled_from([call, decorated, guard]),
    looks=st.booleans(),
    runs=runs,
)
def test_it_does_what_a_plain_model_of_it_does(
    options: Options, form: Form, looks: bool, runs: list[list[Step]]
) -> None:
    """Who is let in, who is refused and until when, what is counted, and what is told."""
    twins = Twins(options, form, looks)
    for number, steps in enumerate(runs):
        twins.run(steps, start=(0, 12345)[number])
