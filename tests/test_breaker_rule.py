"""The circuit breaker's rule: its table, who is let through, whose word counts, when it opens."""

from __future__ import annotations

import itertools
import math
from collections import deque
from functools import partial
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_resilience import Constant, Exponential
from trio_resilience._algorithms._breaker import NOBODY, TRANSITIONS, Breaker, Limits, Signal
from trio_resilience._algorithms._window import CallWindow, TimeWindow
from trio_resilience._errors import FailureRecord
from trio_resilience._events import CircuitState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trio_resilience._algorithms._window import Window

CLOSED, OPEN, HALF_OPEN, ISOLATED = CircuitState

RECOVERY = 10.0

NO_LIMITS = Limits(
    failure_threshold=None,
    failure_rate=None,
    slow_call_rate=None,
    min_calls=1,
    make_window=None,
    is_window_of_run=False,
    half_open_max_calls=1,
    success_threshold=1,
    half_open_timeout=None,
    recovery=Constant(RECOVERY),
)


def last_calls(size: int) -> Callable[[float], Window]:
    def make(_: float) -> Window:
        return CallWindow(size)

    return make


def last_seconds(seconds: float) -> Callable[[float], Window]:
    def make(now: float) -> Window:
        return TimeWindow(seconds, now)

    return make


def one_by_one(*delays: float) -> Callable[[Random], Iterator[float]]:
    def backoff(_: Random) -> Iterator[float]:
        return iter(delays)

    return backoff


def pace() -> Random:
    return Random(1)


@attrs.define(eq=False)
class Circuit:
    """A rule with a clock that is set by hand."""

    rule: Breaker
    now: float = 0.0

    @classmethod
    def of(cls, **limits: Any) -> Circuit:
        return cls(Breaker(attrs.evolve(NO_LIMITS, **limits)))

    def admit(self, *, is_probe: bool = True) -> int | None:
        return self.rule.admit(self.now, pace, is_probe=is_probe)

    def enter(self) -> int:
        ticket = self.admit()
        assert ticket is not None
        return ticket

    def end(self, ticket: int, *, failed: bool = False, slow: bool = False) -> None:
        self.rule.leave(ticket)
        if failed:
            failure = FailureRecord("OSError", "no", self.now)
            self.rule.failed(ticket, failure, pace, slow=slow)
        else:
            self.rule.succeeded(ticket, self.now, pace, slow=slow)

    def call(self, *, failed: bool = False, slow: bool = False) -> None:
        self.end(self.enter(), failed=failed, slow=slow)

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.call(failed=True)

    @property
    def state(self) -> CircuitState:
        return self.rule.state


def half_open(**limits: Any) -> tuple[Circuit, int]:
    """A circuit whose first probe is under way."""
    circuit = Circuit.of(failure_threshold=1, **limits)
    circuit.fail()
    circuit.now += RECOVERY
    return circuit, circuit.enter()


# --- the table ----------------------------------------------------------------------------------


def test_the_table_has_no_state_that_cannot_be_left_or_reached() -> None:
    """Each has a way in from CLOSED, and a way back to it."""

    def reachable(starts: CircuitState, arrows: set[tuple[Any, Any]]) -> set[CircuitState]:
        found, queue = {starts}, deque([starts])
        while queue:
            here = queue.popleft()
            new = {end for start, end in arrows if start is here} - found
            found |= new
            queue.extend(new)
        return found

    arrows = {(start, end) for (start, _), end in TRANSITIONS.items()}
    assert reachable(CLOSED, arrows) == set(CircuitState)
    assert reachable(CLOSED, {(end, start) for start, end in arrows}) == set(CircuitState)


def test_what_is_done_by_hand_is_possible_in_every_state() -> None:
    """To isolate, and to reset; nothing else is."""
    everywhere = [
        signal for signal in Signal if all((state, signal) in TRANSITIONS for state in CircuitState)
    ]
    assert everywhere == [Signal.ISOLATE, Signal.RESET]


@attrs.define(eq=False)
class Steps:
    """What may happen to a circuit, each step by its number."""

    circuit: Circuit
    running: list[int] = attrs.field(factory=list[int])
    holders: list[object] = attrs.field(factory=list[object])

    def enter(self, *, is_probe: bool = True) -> None:
        ticket = self.circuit.admit(is_probe=is_probe)
        if ticket is not None:
            self.running.append(ticket)

    def end(self, *, failed: bool = False) -> None:
        if self.running:
            self.circuit.end(self.running.pop(0), failed=failed)

    def vanish(self) -> None:
        if self.running:
            self.circuit.rule.leave(self.running.pop())

    def wait(self) -> None:
        self.circuit.now += RECOVERY / 2

    def isolate(self) -> None:
        self.holders.append(object())
        self.circuit.rule.isolate(self.holders[-1])

    def release(self) -> None:
        if self.holders:
            self.circuit.rule.release(self.holders.pop())

    def begin_run(self) -> None:
        self.circuit.now = 0.0
        self.circuit.rule.begin_run(0.0)


STEPS: list[Callable[[Steps], None]] = [
    Steps.enter,
    partial(Steps.enter, is_probe=False),
    Steps.end,
    partial(Steps.end, failed=True),
    Steps.vanish,
    Steps.wait,
    Steps.isolate,
    Steps.release,
    Steps.begin_run,
]


@given(st.lists(st.sampled_from(STEPS), max_size=80), st.integers(1, 3), st.integers(1, 3))
def test_no_sequence_of_steps_leaves_the_table(
    script: list[Callable[[Steps], None]], most: int, needed: int
) -> None:
    """Nor does it wedge: after all of them, probes can close it."""
    circuit = Circuit.of(failure_threshold=2, half_open_max_calls=most, success_threshold=needed)
    steps = Steps(circuit)
    for step in script:
        step(steps)
    while steps.holders:
        steps.release()
    for _ in range(10):
        circuit.now += RECOVERY
        if (ticket := circuit.admit()) is not None:
            circuit.end(ticket)
    assert circuit.state is CLOSED
    path = circuit.rule.changes
    assert all(before.state is after.previous for before, after in itertools.pairwise(path))
    assert all(change.previous is not change.state for change in path)


# --- when it opens ------------------------------------------------------------------------------


def test_failures_in_a_row_open_it() -> None:
    """Exactly so many; a success in between starts the count anew."""
    circuit = Circuit.of(failure_threshold=3)
    circuit.fail(2)
    circuit.call()
    circuit.fail(2)
    assert circuit.state is CLOSED
    circuit.fail()
    assert circuit.state is OPEN
    assert circuit.rule.reason == "3 failures in a row"


@pytest.mark.parametrize("part, whole", [(1, 1), (7, 100), (57, 100), (29, 100), (1, 3), (2, 3)])
def test_a_rate_opens_it_when_it_is_reached(part: int, whole: int) -> None:
    """Not one failure later, however the rate is rounded; and not one earlier."""
    circuit = Circuit.of(failure_rate=part / whole, min_calls=whole, make_window=last_calls(whole))
    for _ in range(whole):
        circuit.call()
    circuit.fail(part - 1)
    assert circuit.state is CLOSED
    circuit.fail()
    assert circuit.state is OPEN
    calls = "1 call" if whole == 1 else f"{whole} calls"
    assert circuit.rule.reason == f"{part} of {calls} failed"


def test_a_success_opens_it_too() -> None:
    """If it is the call that makes so many that the rate counts."""
    circuit = Circuit.of(failure_rate=0.5, min_calls=4, make_window=last_calls(10))
    circuit.fail(2)
    circuit.call()
    assert circuit.state is CLOSED
    circuit.call()
    assert circuit.state is OPEN
    assert circuit.rule.last_failure == FailureRecord("OSError", "no", 0.0)


@pytest.mark.parametrize("failed", [True, False])
def test_slow_calls_open_it_whether_they_fail_or_not(failed: bool) -> None:
    """At their own rate."""
    circuit = Circuit.of(slow_call_rate=0.5, min_calls=2, make_window=last_calls(4))
    circuit.call(failed=failed)
    circuit.call(failed=failed)
    circuit.call(failed=failed, slow=True)
    assert circuit.state is CLOSED
    circuit.call(failed=failed, slow=True)
    assert circuit.state is OPEN
    assert circuit.rule.reason == "2 of 4 calls were slow"


def test_a_window_of_seconds_begins_with_the_first_call() -> None:
    """And failures that are older than it do not count."""
    circuit = Circuit.of(
        failure_rate=0.5,
        min_calls=2,
        make_window=last_seconds(10),
        is_window_of_run=True,
    )
    circuit.now = 3.3
    circuit.fail()
    circuit.now = 13.3
    circuit.fail()
    assert circuit.state is CLOSED
    circuit.now = 23.29
    circuit.fail()
    assert circuit.state is OPEN


def test_what_closes_forgets() -> None:
    """The window, the row, and how long it took the last time."""
    circuit = Circuit.of(
        failure_threshold=3,
        failure_rate=0.9,
        min_calls=4,
        make_window=last_calls(4),
        recovery=Exponential(1, jitter="none"),
    )
    circuit.fail(3)
    for delay in (1, 2, 4):
        assert circuit.rule.recovery == delay
        circuit.now += delay
        circuit.call(failed=delay < 4)
    assert circuit.state is CLOSED
    circuit.fail(2)
    assert circuit.state is CLOSED
    circuit.fail()
    assert circuit.rule.recovery == 1


def test_a_backoff_that_ends_goes_on_with_its_last_delay() -> None:
    """The circuit has to recover some time."""
    circuit = Circuit.of(failure_threshold=1, recovery=one_by_one(1.0, 2.0))
    delays = list[float]()
    for _ in range(4):
        circuit.fail()
        delays.append(circuit.rule.recovery)
        circuit.now += circuit.rule.recovery
    assert delays == [1, 2, 2, 2]


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, "1", True])
def test_a_backoff_that_yields_nonsense_changes_nothing(bad: Any) -> None:
    """It is told of, and the circuit is as it was."""
    circuit = Circuit.of(failure_threshold=1, recovery=one_by_one(bad, 3.0))
    with pytest.raises((ValueError, TypeError), match=r"^`recovery_timeout` must be "):
        circuit.fail()
    assert circuit.state is CLOSED
    assert circuit.rule.changes == []
    circuit.fail()
    assert circuit.rule.retry_after(circuit.now) == 3


def test_without_a_pace_it_recovers_at_once() -> None:
    """As tests of users' own code want it."""
    rule = Breaker(attrs.evolve(NO_LIMITS, failure_threshold=1))
    rule.failed(0, FailureRecord("OSError", "no", 0.0), lambda: None, slow=False)
    assert rule.retry_after(0.0) == 0
    assert rule.admit(0.0, lambda: None, is_probe=True) is not None
    assert rule.patience == 1


# --- probes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 3])
def test_only_so_many_probes_at_a_time(most: int) -> None:
    """Whoever comes at the instant at which it may be tried; and one more when one is over."""
    circuit, first = half_open(half_open_max_calls=most, success_threshold=5)
    tickets = [first, *(circuit.admit() for _ in range(50))]
    admitted = [ticket for ticket in tickets if ticket is not None]
    assert admitted == [first] * most
    circuit.end(first)
    assert circuit.enter() == first
    assert circuit.admit() is None


def test_it_is_tried_when_the_time_is_over_and_not_before() -> None:
    """To within the resolution of the clock."""
    circuit = Circuit.of(failure_threshold=1)
    circuit.now = 0.1
    circuit.fail()
    circuit.now = 0.1 + RECOVERY - 1e-6
    assert circuit.admit() is None
    assert circuit.rule.retry_after(circuit.now) == pytest.approx(1e-6)
    circuit.now += circuit.rule.retry_after(circuit.now) or 0.0
    assert circuit.rule.retry_after(circuit.now) == 0
    assert circuit.admit() is not None
    assert circuit.rule.retry_after(circuit.now) is None


def test_nobody_is_a_probe_while_others_probe() -> None:
    """Neither at first, nor when there is a free place."""
    circuit, ticket = half_open(half_open_max_calls=2)
    assert circuit.admit(is_probe=False) is None
    circuit.end(ticket, failed=True)
    circuit.now += RECOVERY
    assert circuit.admit(is_probe=False) is None
    assert circuit.state is OPEN


def test_a_probe_that_says_nothing_gives_its_place_back() -> None:
    """And decides nothing."""
    circuit, ticket = half_open()
    circuit.rule.leave(ticket)
    assert circuit.state is HALF_OPEN
    assert circuit.enter() == ticket


def test_enough_successes_close_it_and_one_failure_opens_it() -> None:
    """The successes need not be at the same time."""
    circuit, ticket = half_open(success_threshold=3)
    circuit.end(ticket)
    circuit.call()
    assert circuit.state is HALF_OPEN
    circuit.fail()
    assert circuit.state is OPEN
    assert circuit.rule.reason == "a probe failed: OSError: no"
    circuit.now += RECOVERY
    for _ in range(3):
        circuit.call()
    assert circuit.state is CLOSED
    assert circuit.rule.changes[-1].reason == "3 probes succeeded"


@pytest.mark.parametrize("rate, expected", [(0.5, OPEN), (None, CLOSED)])
def test_a_slow_probe_has_failed_where_slow_calls_matter(
    rate: float | None, expected: CircuitState
) -> None:
    """Else it has succeeded."""
    circuit, ticket = half_open(slow_call_rate=rate)
    circuit.end(ticket, slow=True)
    assert circuit.state is expected


@pytest.mark.parametrize("timeout, patience", [(None, RECOVERY), (4.0, 4.0)])
def test_a_hung_probe_has_failed(timeout: float | None, patience: float) -> None:
    """The circuit has opened when its time was over, not when somebody came to see."""
    circuit, hung = half_open(half_open_timeout=timeout)
    start = circuit.now
    circuit.now = start + patience - 1e-6
    assert circuit.admit() is None
    assert circuit.state is HALF_OPEN
    circuit.now = start + patience + 1
    assert circuit.admit() is None
    assert circuit.state is OPEN
    assert circuit.rule.reason == f"no probe has ended within {patience:g} s"
    assert circuit.rule.retry_after(circuit.now) == RECOVERY - 1
    circuit.now = start + patience + RECOVERY
    ticket = circuit.enter()
    circuit.end(hung)
    assert circuit.state is HALF_OPEN
    circuit.end(ticket)
    assert circuit.state is CLOSED


def test_a_probe_hangs_from_its_time_on_however_it_rounds() -> None:
    """A tenth and two tenths of a second are later than three, in floats."""
    circuit, _ = half_open(half_open_timeout=0.2)
    circuit.rule.leave(circuit.rule.generation)
    circuit.now = 0.1
    circuit.enter()
    circuit.now = 0.3
    assert circuit.now < 0.1 + 0.2
    circuit.admit()
    assert circuit.state is OPEN


def test_who_comes_much_later_than_a_hung_probe_is_the_next() -> None:
    """Both times are over."""
    circuit, hung = half_open()
    circuit.now += 2 * RECOVERY
    ticket = circuit.enter()
    states = [change.state for change in circuit.rule.changes]
    assert states == [OPEN, HALF_OPEN, OPEN, HALF_OPEN]
    circuit.end(hung, failed=True)
    assert circuit.state is HALF_OPEN
    circuit.end(ticket)
    assert circuit.state is CLOSED


def test_a_word_from_a_probe_shows_that_not_all_hang() -> None:
    """Nor do they if one has only just begun."""
    circuit, first = half_open(half_open_max_calls=2, success_threshold=9)
    circuit.now += RECOVERY - 1
    second = circuit.enter()
    circuit.now += RECOVERY - 1
    circuit.end(second)
    circuit.now += RECOVERY - 1
    circuit.enter()
    circuit.now += RECOVERY - 1
    assert circuit.admit() is None
    assert circuit.state is HALF_OPEN
    circuit.now += 1
    circuit.admit()
    assert circuit.rule.changes[2].previous is HALF_OPEN
    circuit.end(first)
    assert circuit.rule.counts.calls == 2


def test_without_a_recovery_time_a_probe_has_a_second() -> None:
    """If nobody says otherwise; else each caller would find the last probe hung at once."""
    circuit = Circuit.of(failure_threshold=1, recovery=Constant(0))
    circuit.fail()
    ticket = circuit.enter()
    circuit.now += 0.9
    assert circuit.admit() is None
    circuit.end(ticket)
    assert circuit.state is CLOSED


# --- what is late -------------------------------------------------------------------------------


@pytest.mark.parametrize("failed", [True, False])
def test_a_late_word_counts_for_nothing(failed: bool) -> None:
    """Open, half open, or closed again: it changes no state, and no count."""
    circuit = Circuit.of(failure_threshold=1)
    late = [circuit.enter() for _ in range(4)]
    circuit.fail()
    for change in (lambda: None, circuit.enter, circuit.rule.reset):
        circuit.end(late.pop(), failed=failed)
        before = circuit.state, attrs.astuple(circuit.rule.counts), circuit.rule.consecutive
        circuit.now += RECOVERY
        change()
        state = circuit.state
        circuit.end(late[-1], failed=failed)
        assert circuit.state is state
        assert attrs.astuple(circuit.rule.counts) == before[1]
    circuit.end(NOBODY, failed=failed)
    assert circuit.rule.counts.calls == 1


def test_a_place_is_given_back_to_the_round_that_it_was_taken_from() -> None:
    """A probe of an earlier round makes no room in a later one."""
    circuit, hung = half_open()
    circuit.now += 2 * RECOVERY
    circuit.enter()
    circuit.rule.leave(hung)
    assert circuit.admit() is None


# --- by hand, and in the next run ---------------------------------------------------------------


def test_it_is_isolated_until_the_last_holder_lets_go() -> None:
    """To let go twice is nothing; nor is it, not to have held."""
    circuit, (first, second) = Circuit.of(failure_threshold=1), (object(), object())
    circuit.fail()
    circuit.rule.isolate(first)
    circuit.rule.isolate(second)
    circuit.now += 1e6
    assert circuit.admit() is None
    assert circuit.rule.retry_after(circuit.now) is None
    assert circuit.rule.time_to_probe(circuit.now) == math.inf
    for holder in (first, first, object()):
        circuit.rule.release(holder)
        assert circuit.state is ISOLATED
    circuit.rule.release(second)
    assert circuit.state is CLOSED
    assert [change.state for change in circuit.rule.changes] == [OPEN, ISOLATED, CLOSED]


@pytest.mark.parametrize("isolated", [True, False])
def test_a_reset_closes_whatever_it_was(isolated: bool) -> None:
    """And those who held it do not any more."""
    circuit, holder = Circuit.of(failure_threshold=2), object()
    circuit.fail(2)
    if isolated:
        circuit.rule.isolate(holder)
    circuit.rule.reset()
    assert circuit.state is CLOSED
    assert (circuit.rule.reason, circuit.rule.last_failure) == (None, None)
    circuit.fail()
    circuit.rule.release(holder)
    circuit.fail()
    assert circuit.state is OPEN


def test_in_the_next_run_it_is_as_open_and_its_time_starts_again() -> None:
    """Also if its probes were lost with the run before."""
    circuit, probe = half_open()
    circuit.rule.begin_run(-5000.0)
    circuit.now = -5000.0 + RECOVERY - 1
    circuit.end(probe)
    assert circuit.state is OPEN
    assert circuit.admit() is None
    circuit.now += 1
    circuit.call()
    assert circuit.state is CLOSED


@pytest.mark.parametrize("of_run", [True, False])
def test_in_the_next_run_a_window_in_seconds_is_empty(of_run: bool) -> None:
    """One of calls is not; and the row goes on."""
    circuit = Circuit.of(
        failure_threshold=4,
        failure_rate=1.0,
        min_calls=3,
        make_window=last_seconds(9) if of_run else last_calls(3),
        is_window_of_run=of_run,
    )
    circuit.fail(2)
    circuit.rule.begin_run(0.0)
    circuit.fail()
    assert circuit.state is (CLOSED if of_run else OPEN)
    if of_run:
        circuit.fail()
        assert circuit.rule.reason == "4 failures in a row"


# --- statistics ---------------------------------------------------------------------------------


def calls_until_open(rng: Random, failures: float, **limits: Any) -> int:
    circuit = Circuit.of(**limits)
    for count in itertools.count(1):
        circuit.call(failed=rng.random() < failures)
        if circuit.state is OPEN:
            return count
    raise AssertionError


def test_five_in_a_row_of_three_in_ten() -> None:
    """Opens after (1 - p^5) / ((1 - p) p^5) calls, 586, on average."""
    rng = Random(7)
    found = fmean(calls_until_open(rng, 0.3, failure_threshold=5) for _ in range(2000))
    assert found == pytest.approx(586, abs=45)


def test_half_of_the_last_ten_of_two_in_ten() -> None:
    """Opens after 118 calls on average."""
    rng = Random(8)
    limits: dict[str, Any] = {"failure_rate": 0.5, "min_calls": 10, "make_window": last_calls(10)}
    found = fmean(calls_until_open(rng, 0.2, **limits) for _ in range(3000))
    assert found == pytest.approx(118, abs=8)


def test_half_of_a_healthy_hundred() -> None:
    """Opens with exactly the fiftieth failure."""
    circuit = Circuit.of(failure_rate=0.5, min_calls=20, make_window=last_calls(100))
    for _ in range(100):
        circuit.call()
    states = list[CircuitState]()
    for _ in range(50):
        circuit.fail()
        states.append(circuit.state)
    assert states == [CLOSED] * 49 + [OPEN]
