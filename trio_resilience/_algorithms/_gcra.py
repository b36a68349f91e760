"""The generic cell rate algorithm: how soon the next may pass, to the last digit.

In the version called virtual scheduling (ITU-T Recommendation I.371, Annex A), all that is kept is
the *theoretical arrival time*: when what has passed so far would have passed at an even pace. Who
comes earlier than that by no more than the burst allows may pass, and moves it on by one interval.
So in any window of T seconds at most ``burst + rate * T / per`` pass, and nothing has to be
refilled.

Times are integers, of attoseconds. Sums of floats would drift: a million times 0.1 is 1.3 µs late,
and 24 ms if the clock shows a billion seconds. What is rounded is only the clock's own time: who
comes within its resolution of an instant comes at that instant. So nobody is sent to sleep for less
than the clock can show, and a sleeper's lateness by rounding is not added up.
"""

from __future__ import annotations

import math
from typing import final

import attrs

_SECOND = 1e18
_NANOSECOND = 1_000_000_000

_COARSE = 2.0**22
"""From so many seconds on a float does not show nanoseconds any more."""

_NEVER = 10**36
"""An interval of a billion centuries is as good as any longer one, and floats can hold it."""


def interval_of(rate: float, per: float) -> int:
    """Return the ticks between two at *rate* in *per* seconds, rounded once, at the very end."""
    count, count_unit = rate.as_integer_ratio()
    time, time_unit = per.as_integer_ratio()
    ticks = (time * count_unit * int(_SECOND)) // (time_unit * count)
    return min(max(ticks, 1), _NEVER)


@final
@attrs.define(eq=False)
class Gcra:
    """What one limit has let pass, and what follows from it."""

    interval: int
    """Ticks between two at an even pace."""
    burst: int
    """How many may pass at once after a long enough pause."""
    full_at: int
    """The theoretical arrival time, in ticks: from then on the whole burst is there."""

    @classmethod
    def start(cls, now: float, interval: int, burst: int) -> Gcra:
        """Return a limit of which nothing is used."""
        return cls(interval, burst, int(now * _SECOND))

    def try_take(self, now: float, cost: int = 1) -> bool:
        """Let *cost* pass if it may; tell whether it did."""
        # `may_pass` and `take` in one, for this is what an unhindered call costs.
        ticks = int(now * _SECOND)
        resolution = _NANOSECOND if now < _COARSE else _resolution(now)
        full_at = self.full_at
        if full_at + (cost - self.burst) * self.interval > ticks + resolution:
            return False
        if full_at + resolution < ticks:
            full_at = ticks
        self.full_at = full_at + cost * self.interval
        return True

    def may_pass(self, now: float, cost: int) -> bool:
        """Tell whether *cost* may pass."""
        due = self.full_at + (cost - self.burst) * self.interval
        return due <= int(now * _SECOND) + _resolution(now)

    def take(self, now: float, cost: int) -> None:
        """Let *cost* pass."""
        ticks = int(now * _SECOND)
        if self.full_at + _resolution(now) < ticks:
            self.full_at = ticks
        self.full_at += cost * self.interval

    def due(self, cost: int) -> float:
        """Return when, in seconds, *cost* may pass."""
        return (self.full_at + (cost - self.burst) * self.interval) / _SECOND

    def wait(self, now: float, cost: int, ahead: int = 0) -> float:
        """Return for how many seconds *cost* has to wait, after *ahead* that wait before it."""
        ticks = int(now * _SECOND)
        full_at = max(self.full_at, ticks)  # nobody has passed since, however late it is
        wait = full_at + (ahead + cost - self.burst) * self.interval - ticks
        return wait / _SECOND if wait > _resolution(now) else 0.0

    def available(self, now: float) -> int:
        """Return how many may pass at once."""
        used = max(0, self.full_at - int(now * _SECOND) - _resolution(now))
        return max(0, self.burst - -(-used // self.interval))

    def change_interval(self, now: float, interval: int) -> None:
        """Go on at another pace; of the burst, as much is used as before."""
        ticks = int(now * _SECOND)
        if self.full_at > ticks:
            self.full_at = ticks - (ticks - self.full_at) * interval // self.interval
        self.interval = interval


def resolution(now: float) -> float:
    """Return the seconds by which two instants may differ and be the same for the clock."""
    return _resolution(now) / _SECOND


def _resolution(now: float) -> int:
    """Return the same in ticks."""
    return _NANOSECOND if now < _COARSE else int(2 * math.ulp(now) * _SECOND)
