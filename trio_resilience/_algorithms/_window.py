"""How many of the last calls failed or were slow: the last so many, or those of the last seconds.

The last N calls are a ring of one byte each. The last seconds are a ring of buckets, for to keep
the time of every call would take memory without bound: a bucket is forgotten as a whole, so a call
counts for the whole window, or for up to one sixty-fourth of it less. Either costs a constant time
for each call, and buckets that have run out while nothing happened are emptied when the next call
ends; no task does it in the background.
"""

from __future__ import annotations

import math
from typing import Final, Protocol, final

import attrs

from trio_resilience._algorithms._gcra import resolution

BUCKETS: Final = 64
"""A power of two, so that the bounds of the buckets are exact."""

FAILED: Final = 1
SLOW: Final = 2
"""A call's mark is the sum of what is true of it."""


class Window(Protocol):
    """The calls that count, and how they ended."""

    calls: int
    failures: int
    slow_calls: int

    def add(self, now: float, mark: int) -> None:
        """Count a call that has ended, with this mark."""

    def forget_before(self, now: float) -> None:
        """Let go of what is too old to count."""


@final
@attrs.define(eq=False, repr=False)
class CallWindow:
    """The last *size* calls, however long ago they were."""

    size: int
    calls: int = attrs.field(default=0, init=False)
    failures: int = attrs.field(default=0, init=False)
    slow_calls: int = attrs.field(default=0, init=False)
    _ring: bytearray = attrs.field(factory=bytearray, init=False)
    _oldest: int = attrs.field(default=0, init=False)

    def add(self, now: float, mark: int) -> None:  # noqa: ARG002
        """Count a call that has ended, in the place of the oldest."""
        if mark:
            self.failures += mark & FAILED
            self.slow_calls += mark >> 1
        if self.calls < self.size:
            self.calls += 1
            self._ring.append(mark)
            return
        oldest = self._oldest
        gone = self._ring[oldest]
        if gone:
            self.failures -= gone & FAILED
            self.slow_calls -= gone >> 1
        self._ring[oldest] = mark
        self._oldest = (oldest + 1) % self.size

    def forget_before(self, now: float) -> None:
        """Do nothing: no call is too old."""


@final
@attrs.define(eq=False, repr=False)
class TimeWindow:
    """The calls of the last *seconds*."""

    seconds: float
    start: float
    """When the first bucket begins."""
    calls: int = attrs.field(default=0, init=False)
    failures: int = attrs.field(default=0, init=False)
    slow_calls: int = attrs.field(default=0, init=False)
    _newest: int = attrs.field(default=0, init=False)
    """Number of the bucket that calls go into, counted from the start."""
    _ends: float = attrs.field(default=-math.inf, init=False)
    """When the next one begins."""
    _ring: list[list[int]] = attrs.field(
        factory=lambda: [[0, 0, 0] for _ in range(BUCKETS)], init=False
    )
    _bucket: list[int] = attrs.field(init=False)
    """The newest: its calls, its failures and its slow calls."""

    def __attrs_post_init__(self) -> None:
        # A sum of floats may fall short of the end of a bucket that it stands for.
        self.start -= resolution(self.start)
        # No clock shows the end of a shorter bucket, and the number of one may be too large.
        self.seconds = max(self.seconds, BUCKETS * resolution(self.start))

    def add(self, now: float, mark: int) -> None:
        """Count a call that has ended."""
        if now >= self._ends:
            self.forget_before(now)
        bucket = self._bucket
        bucket[0] += 1
        self.calls += 1
        if mark:
            failed, slow = mark & FAILED, mark >> 1
            bucket[1] += failed
            bucket[2] += slow
            self.failures += failed
            self.slow_calls += slow

    def forget_before(self, now: float) -> None:
        """Empty the buckets that are too old to count."""
        newest = int((now - self.start) * BUCKETS / self.seconds)
        for number in range(max(self._newest, newest - BUCKETS) + 1, newest + 1):
            self._empty(self._ring[number % BUCKETS])
        self._newest = max(self._newest, newest)
        self._bucket = self._ring[self._newest % BUCKETS]
        self._ends = self.start + (self._newest + 1) * self.seconds / BUCKETS

    def _empty(self, bucket: list[int]) -> None:
        self.calls -= bucket[0]
        self.failures -= bucket[1]
        self.slow_calls -= bucket[2]
        bucket[:] = 0, 0, 0
