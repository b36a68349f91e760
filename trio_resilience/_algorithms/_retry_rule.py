"""When the next attempt is due, and when there is to be none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random
from typing import TypeAlias, final

import attrs

from trio_resilience._algorithms._backoff import Backoff
from trio_resilience._checks import number

Verdict: TypeAlias = bool | float
"""Whether to try again; a number is "yes, after this many seconds"."""


class LongestDelays(Random):
    """Draws the upper end of every range: for tests, where delays are to be exact."""

    def uniform(self, a: float, b: float) -> float:
        """Return the larger of *a* and *b*."""
        return max(a, b)


@final
@attrs.define(eq=False, repr=False)
class RetryRule:
    """Count the attempts of one call and decide on the next."""

    max_attempts: float
    backoff: Backoff
    max_retry_after: float
    rng: Random
    has_delays: bool = True
    """Whether there is any waiting at all; in a test there may be none."""
    attempts: int = attrs.field(default=0, init=False)
    total_delay: float = attrs.field(default=0.0, init=False)
    _delays: Iterator[float] | None = attrs.field(default=None, init=False)

    def next_delay(
        self, verdict: Verdict, told: float | None, now: float, deadline: float
    ) -> float | str:
        """Return how many seconds to wait for the next attempt, or why there is none.

        *verdict* is a yes, or the delay itself; *told* is how long the other side asks to wait. An
        attempt that would begin at or after *deadline* is pointless; one of minus infinity means
        that the call is being cancelled, which the wait will find out.
        """
        gave_up = f"gave up after {self.times()}"
        if self.attempts >= self.max_attempts:
            return gave_up
        if told is not None and told > self.max_retry_after:
            longest = self.max_retry_after
            return f"{gave_up}: told to wait {told:g} s, more than `max_retry_after`, {longest:g} s"
        delay = self._draw() if isinstance(verdict, bool) else verdict
        if delay is None:
            return f"{gave_up}: the backoff has ended"
        if told is not None:
            delay = self._not_before(told, delay)
        if not self.has_delays or deadline == -math.inf:
            delay = 0.0
        elif now + delay >= deadline:
            return f"{gave_up}: the next one, in {delay:g} s, would not begin before the deadline"
        self.total_delay += delay
        return delay

    def times(self) -> str:
        """Say how often it was tried, and how long was waited."""
        attempts = "1 attempt" if self.attempts == 1 else f"{self.attempts} attempts"
        return f"{attempts} and {self.total_delay:g} s of waiting" if self.total_delay else attempts

    def _draw(self) -> float | None:
        if self._delays is None:
            self._delays = iter(self.backoff(self.rng))
        drawn = next(self._delays, None)
        return None if drawn is None else number("backoff", drawn)

    def _not_before(self, told: float, delay: float) -> float:
        delay = max(delay, told)
        if isinstance(self.rng, LongestDelays) or getattr(self.backoff, "jitter", "") == "none":
            return delay
        # All who were told the same would come back at the same time.
        return delay + self.rng.uniform(0.0, delay / 10)
