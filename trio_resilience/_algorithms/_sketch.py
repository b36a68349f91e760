"""Tell the quantiles of any number of latencies, within two per cent, in a bounded memory.

The buckets are those of DDSketch (see `_buckets`). There are never more than 764 of them, whatever
is observed, and two sketches add up to the very one that would have seen all of it.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import Final, final

import attrs

from trio_resilience._algorithms._buckets import Buckets
from trio_resilience._records import Record, record

BUCKETS: Final = Buckets(1.04)
"""The middle of one is within two per cent of all that it holds."""

AT_ONCE: Final = 256
"""How many latencies are sorted into buckets together."""


@final
@record
class LatencySnapshot(Record):
    """How long something took, as often as it has happened until now.

    Two of them add up: that of two processes, for instance, is their sum.
    """

    count: int = 0
    total: float = 0.0
    """Seconds, all together."""
    shortest: float | None = None
    """``None`` while there is nothing; likewise the longest."""
    longest: float | None = None
    buckets: tuple[tuple[int, int], ...] = ()
    """How many latencies are in each bucket that has any: from 1.04^(b-1) to 1.04^b seconds."""

    @property
    def mean(self) -> float | None:
        """Seconds on average; ``None`` while there is nothing."""
        return self.total / self.count if self.count else None

    def quantile(self, share: float) -> float | None:
        """Return the seconds within which so large a share ended: the least such latency.

        The true one is within two per cent of that, between a microsecond and 115 days; a shorter
        one is within a microsecond. ``None`` while there is nothing.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"`share` must be >= 0 and <= 1, got {share!r}")
        if self.shortest is None or self.longest is None:
            return None
        reached = list(accumulate(count for _, count in self.buckets))
        bucket, _ = self.buckets[bisect_left(reached, max(1, math.ceil(share * reached[-1])))]
        return min(max(BUCKETS.middle_of(bucket), self.shortest), self.longest)

    def plus(self, other: LatencySnapshot) -> LatencySnapshot:
        """Return what one would be that had seen both."""
        counts = Counter(dict(self.buckets))
        counts.update(dict(other.buckets))
        return LatencySnapshot(
            count=self.count + other.count,
            total=self.total + other.total,
            shortest=min(_known(self.shortest, other.shortest), default=None),
            longest=max(_known(self.longest, other.longest), default=None),
            buckets=tuple(sorted(counts.items())),
        )


def _known(*values: float | None) -> list[float]:
    return [value for value in values if value is not None]


def new_batch() -> array[float]:
    """Return room for latencies that are to be sorted together."""
    return array("d")


@final
@attrs.define(eq=False, repr=False)
class Sketch:
    """Latencies as they come.

    They are sorted into the buckets many at a time, which is faster by several times.
    """

    _pending: array[float] = attrs.field(factory=new_batch, init=False)
    """Those that are in no bucket yet."""
    _total: float = attrs.field(default=0.0, init=False)
    _shortest: float = attrs.field(default=math.inf, init=False)
    _longest: float = attrs.field(default=-math.inf, init=False)
    _first: int = attrs.field(default=0, init=False)
    """The bucket that the first of the counts is of."""
    _counts: array[int] = attrs.field(factory=lambda: array("I"), init=False)
    """One after the other, without gaps: a dictionary of them takes ten times the memory."""

    def observe(self, seconds: float) -> None:
        """Take account of a latency."""
        pending = self._pending
        pending.append(seconds)
        if len(pending) >= AT_ONCE:
            self._sort_in()

    def snapshot(self) -> LatencySnapshot:
        """Return what it has come to."""
        self._sort_in()
        if not self._counts:
            return LatencySnapshot()
        counts = enumerate(self._counts, self._first)
        return LatencySnapshot(
            count=sum(self._counts),
            total=self._total,
            shortest=self._shortest,
            longest=self._longest,
            buckets=tuple((bucket, count) for bucket, count in counts if count),
        )

    def observe_all(self, latencies: Iterable[float]) -> None:
        """Take account of many at once: most of them share a bucket with others."""
        ordered = sorted(latencies)
        if not ordered:
            return
        self._total += sum(ordered)
        self._shortest = min(self._shortest, ordered[0])
        self._longest = max(self._longest, ordered[-1])
        self._make_room(BUCKETS.bucket_of(ordered[0]), BUCKETS.bucket_of(ordered[-1]))
        for bucket, count in BUCKETS.counts_of(ordered):
            try:
                self._counts[bucket - self._first] += count
            except OverflowError:
                self._counts = array("Q", self._counts)
                self._counts[bucket - self._first] += count

    def _sort_in(self) -> None:
        pending, self._pending = self._pending, new_batch()
        self.observe_all(pending)

    def _make_room(self, first: int, last: int) -> None:
        """Extend the counts, before or behind them, to these buckets."""
        if not self._counts:
            self._first = first
        zeros = array(self._counts.typecode, [0])
        self._counts = zeros * (self._first - first) + self._counts
        self._first = min(self._first, first)
        self._counts.extend(zeros * (last + 1 - self._first - len(self._counts)))
