"""When a circuit opens, who may try whether it can close again, and whose verdict counts.

The pattern is Michael Nygard's ("Release It!", 2007). A call says one of three things about what it
has called: that it works, that it does not, or nothing (it was cancelled, or failed for a reason of
its own). CLOSED, all calls go through, until too many say that it does not work. OPEN, none does,
until the recovery time is over. The next caller is then a *probe*, and the circuit HALF_OPEN: so
many probes at a time, and nobody else, until enough of them say that it works, or one that it does
not. ISOLATED is open by hand, and only a hand ends it.

All changes of state are in one table; a pair that is not in it is a bug. Three rules keep what is
late, lost or hung from doing harm:

- Whoever is let through gets the number of the current *generation*, which every change of state
  raises. A verdict with another number counts for nothing.
- A probe that says nothing gives its place to the next.
- When all places are taken by probes of which nothing was heard for too long, the circuit has
  opened again. Nothing watches for that in the background: the next caller finds it out, and it
  opened when the time was over, not when that caller came.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from enum import Enum, auto
from random import Random
from typing import Final, NamedTuple, TypeAlias, final

import attrs

from trio_resilience._algorithms._backoff import Backoff
from trio_resilience._algorithms._gcra import resolution
from trio_resilience._algorithms._window import FAILED, SLOW, Window
from trio_resilience._checks import number
from trio_resilience._errors import FailureRecord
from trio_resilience._events import CircuitState

# Looked up for every call: an enumeration's own attributes are slower.
CLOSED: Final = CircuitState.CLOSED
OPEN: Final = CircuitState.OPEN
HALF_OPEN: Final = CircuitState.HALF_OPEN
ISOLATED: Final = CircuitState.ISOLATED

NOBODY: Final = -1
"""The ticket of a call that is let through though it should be refused: of no generation."""

PATIENCE: Final = 1.0
"""Seconds, where there is no recovery time: else a probe would be given up as soon as it began."""

Pace: TypeAlias = Callable[[], Random | None]
"""Return what recovery times are drawn with; ``None`` if they are to be zero."""


class Signal(Enum):
    """What makes a circuit change its state."""

    TRIP = auto()
    """Too many calls say that it does not work."""
    PROBE = auto()
    """The recovery time is over, and somebody calls."""
    PROVEN = auto()
    """Enough probes say that it works."""
    DISPROVEN = auto()
    """A probe says that it does not."""
    HUNG = auto()
    """The probes say nothing for too long."""
    LOST = auto()
    """The run in which the probes were has ended."""
    ISOLATE = auto()
    RELEASE = auto()
    RESET = auto()


TRANSITIONS: Final = {
    (CLOSED, Signal.TRIP): OPEN,
    (OPEN, Signal.PROBE): HALF_OPEN,
    (HALF_OPEN, Signal.PROVEN): CLOSED,
    (HALF_OPEN, Signal.DISPROVEN): OPEN,
    (HALF_OPEN, Signal.HUNG): OPEN,
    (HALF_OPEN, Signal.LOST): OPEN,
    (CLOSED, Signal.ISOLATE): ISOLATED,
    (OPEN, Signal.ISOLATE): ISOLATED,
    (HALF_OPEN, Signal.ISOLATE): ISOLATED,
    (ISOLATED, Signal.ISOLATE): ISOLATED,
    (ISOLATED, Signal.RELEASE): CLOSED,
    (CLOSED, Signal.RESET): CLOSED,
    (OPEN, Signal.RESET): CLOSED,
    (HALF_OPEN, Signal.RESET): CLOSED,
    (ISOLATED, Signal.RESET): CLOSED,
}


class Change(NamedTuple):
    """A change of state."""

    previous: CircuitState
    state: CircuitState
    reason: str
    retry_after: float | None


@final
@attrs.frozen(eq=False)
class Limits:
    """What is too much, how long to wait, and how many probes it takes."""

    failure_threshold: int | None
    failure_rate: float | None
    slow_call_rate: float | None
    min_calls: int
    make_window: Callable[[float], Window] | None
    """Return an empty window that begins now; there is one if there is a rate."""
    half_open_max_calls: int
    success_threshold: int
    half_open_timeout: float | None
    recovery: Backoff
    is_window_of_run: bool
    """Whether what is in the window means nothing to another run, whose clock starts elsewhere."""


@final
@attrs.define(eq=False, repr=False)
class Counts:
    """What is only counted; it decides nothing."""

    calls: int = 0
    failures: int = 0
    slow_calls: int = 0
    rejections: int = 0
    opened: int = 0


@final
@attrs.define(eq=False, repr=False)
class Breaker:
    """A circuit: its state, and what has led to it."""

    limits: Limits
    counts: Counts = attrs.field(factory=Counts, init=False)
    state: CircuitState = attrs.field(default=CLOSED, init=False)
    generation: int = attrs.field(default=0, init=False)
    consecutive: int = attrs.field(default=0, init=False)
    """Failures since the last success."""
    window: Window | None = attrs.field(default=None, init=False)
    reason: str | None = attrs.field(default=None, init=False)
    """Why it opened last."""
    last_failure: FailureRecord | None = attrs.field(default=None, init=False)
    recovery: float = attrs.field(default=0.0, init=False)
    """Seconds for which it stays open, since it opened last."""
    holders: list[object] = attrs.field(factory=list[object], init=False)
    """Who wants it to be isolated."""
    changes: list[Change] = attrs.field(factory=list[Change], init=False)
    """Of which nobody has been told yet."""
    _delays: Iterator[float] | None = attrs.field(default=None, init=False)
    """The recovery times to come, since it was closed last."""
    _since: float = attrs.field(default=0.0, init=False)
    """When it opened; or, half open, when a probe was let through or heard of last."""
    _probing: int = attrs.field(default=0, init=False)
    _proofs: int = attrs.field(default=0, init=False)

    # --- who is let through ---

    def admit(self, now: float, pace: Pace, *, is_probe: bool) -> int | None:
        """Return a ticket, or ``None`` if the call is refused; *is_probe*: whether it may be one.

        Here and below, *pace* is asked when a recovery time is drawn.
        """
        if self.state is CLOSED:
            return self.generation
        if self.state is HALF_OPEN and self._is_hung(now):
            patience = self.patience
            reason = f"no probe has ended within {patience:g} s"
            self._open(Signal.HUNG, self._since + patience, reason, pace)
        if not is_probe:
            return None
        if self.state is OPEN and (self.time_to_probe(now) == 0.0 or pace() is None):
            self._probing = self._proofs = 0
            self._go(Signal.PROBE, "the recovery time is over")
        if self.state is HALF_OPEN and self._probing < self.limits.half_open_max_calls:
            self._probing += 1
            self._since = now
            return self.generation
        return None

    def leave(self, ticket: int) -> None:
        """Give the place of a probe back; before its verdict, if there is one."""
        if ticket == self.generation and self.state is HALF_OPEN:
            self._probing -= 1

    def time_to_probe(self, now: float) -> float:
        """Return seconds until the recovery time is over, since it opened or a probe was heard of.

        It is infinite unless the circuit is open or half open.
        """
        if self.state is not OPEN and self.state is not HALF_OPEN:
            return math.inf
        wait = self._since + self.recovery - now
        return wait if wait > resolution(now) else 0.0

    def retry_after(self, now: float) -> float | None:
        """Return seconds until a probe is let through; ``None`` unless it is open."""
        if self.state is not OPEN:
            return None
        wait = self._since + self.recovery - now
        return wait if wait > 1.0 else self.time_to_probe(now)  # spares a call to most

    @property
    def patience(self) -> float:
        """Seconds without a word after which probes have failed."""
        timeout = self.limits.half_open_timeout
        return (self.recovery or PATIENCE) if timeout is None else timeout

    def _is_hung(self, now: float) -> bool:
        if self._probing < self.limits.half_open_max_calls:
            return False
        return now + resolution(now) >= self._since + self.patience

    # --- what they say ---

    def succeeded(self, ticket: int, now: float, pace: Pace, *, slow: bool = False) -> None:
        """Take it that the call says that it works; or, if it is slow, that it hardly does."""
        if ticket != self.generation:
            return
        self.counts.calls += 1
        self.consecutive = 0
        window = self.window
        if slow:
            self.counts.slow_calls += 1
        elif (
            window is not None
            and not (window.failures or window.slow_calls)
            # A probe decides, even if all that was wrong has left the window.
            and self.state is CLOSED
        ):
            # Nothing is wrong, and most of the time nothing is.
            window.add(now, 0)
            return
        if self.state is HALF_OPEN:
            self._judge_probe(now, pace, None, slow=slow)
        else:
            self._record(now, SLOW * slow, pace)

    def failed(self, ticket: int, failure: FailureRecord, pace: Pace, *, slow: bool) -> None:
        """Take it that the call says that it does not work."""
        if ticket == self.generation:
            self.counts.calls += 1
            self.counts.slow_calls += slow
            self.counts.failures += 1
            self.consecutive += 1
            self.last_failure = failure
            if self.state is HALF_OPEN:
                self._judge_probe(failure.time, pace, failure, slow=slow)
            else:
                self._record(failure.time, FAILED + SLOW * slow, pace)

    def _record(self, now: float, mark: int, pace: Pace) -> None:
        limits, window = self.limits, self.window
        if limits.make_window is not None:
            if window is None:
                window = self.window = limits.make_window(now)
            window.add(now, mark)
        reason = self._too_much()
        if reason is not None:
            self._open(Signal.TRIP, now, reason, pace)

    def _judge_probe(
        self, now: float, pace: Pace, failure: FailureRecord | None, *, slow: bool
    ) -> None:
        self._since = now
        if failure is not None:
            reason = f"a probe failed: {failure.type_name}: {failure.message}"
            self._open(Signal.DISPROVEN, now, reason, pace)
        elif slow and self.limits.slow_call_rate is not None:
            self._open(Signal.DISPROVEN, now, "a probe was slow", pace)
        else:
            self._proofs += 1
            if self._proofs >= self.limits.success_threshold:
                probes = "a probe" if self._proofs == 1 else f"{self._proofs} probes"
                self._close(Signal.PROVEN, f"{probes} succeeded")

    def _too_much(self) -> str | None:
        """Return what there is too much of."""
        limits, window = self.limits, self.window
        if limits.failure_threshold is not None and self.consecutive >= limits.failure_threshold:
            return f"{_times(self.consecutive, 'failure')} in a row"
        if window is None or window.calls < limits.min_calls:
            return None
        if _reaches(window.failures, window.calls, limits.failure_rate):
            return f"{window.failures} of {_times(window.calls, 'call')} failed"
        if _reaches(window.slow_calls, window.calls, limits.slow_call_rate):
            return f"{window.slow_calls} of {_times(window.calls, 'call')} were slow"
        return None

    # --- what is done by hand ---

    def isolate(self, holder: object) -> None:
        """Let nobody through for as long as *holder* wants it."""
        self.holders.append(holder)
        self._go(Signal.ISOLATE, "isolated")

    def release(self, holder: object) -> None:
        """Let calls through again, as if it were new, unless others want it isolated."""
        if holder in self.holders:
            self.holders.remove(holder)
            if not self.holders:
                self._close(Signal.RELEASE, "released")

    def reset(self) -> None:
        """Be closed, and forget what has led to any other state, who wants it isolated included."""
        self.holders.clear()
        self.reason = self.last_failure = None
        self._close(Signal.RESET, "reset")

    # --- changes of state ---

    def begin_run(self, now: float) -> None:
        """Go on in another run, whose clock shows *now*."""
        self.generation += 1  # whoever is still to come from the run before is late
        self._since = now
        if self.limits.is_window_of_run:
            self.window = None
        if self.state is HALF_OPEN:
            reason = "the run has ended in which its probes were"
            self._go(Signal.LOST, reason, self.recovery)

    def _open(self, signal: Signal, now: float, reason: str, pace: Pace) -> None:
        # It is drawn first: should the iterator raise, nothing has changed.
        self.recovery = self._draw(pace)
        self._since = now
        self.reason = reason
        self.counts.opened += 1
        self._go(signal, reason, self.recovery)

    def _draw(self, pace: Pace) -> float:
        rng = pace()
        if rng is None:
            return 0.0
        if self._delays is None:
            self._delays = iter(self.limits.recovery(rng))
        # Where the backoff has ended, its last delay goes on.
        drawn = next(self._delays, self.recovery)
        return number("recovery_timeout", drawn, finite=True)

    def _close(self, signal: Signal, reason: str) -> None:
        self._delays = self.window = None
        self.consecutive = 0
        self._go(signal, reason)

    def _go(self, signal: Signal, reason: str, retry_after: float | None = None) -> None:
        previous = self.state
        self.state = TRANSITIONS[previous, signal]
        self.generation += 1
        if self.state is not previous:
            self.changes.append(Change(previous, self.state, reason, retry_after))


def _reaches(part: int, whole: int, rate: float | None) -> bool:
    # A quotient is rounded as a literal is: 7 of 100 is 0.07, while 0.07 * 100 is more than 7.
    return rate is not None and part / whole >= rate


def _times(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
