"""Sort latencies into buckets whose bounds grow by a constant factor.

So any latency is known within a constant relative error, in a memory that depends on the range
alone: Masson, Rim and Lee, "DDSketch: a fast and fully-mergeable quantile sketch with
relative-error guarantees", PVLDB 12 (2019).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from math import exp, floor, log
from typing import Final, final

import attrs

SHORTEST: Final = 1e-6
LONGEST: Final = 1e7
"""Seconds; what lies beyond counts as these, which bounds the number of buckets."""


@final
@attrs.frozen
class Buckets:
    """Buckets of which each reaches *growth* times as far as the one before."""

    growth: float
    _log_growth: float = attrs.field(
        default=attrs.Factory(lambda self: log(self.growth), takes_self=True), init=False
    )

    def bucket_of(self, seconds: float) -> int:
        """Return the bucket that a latency belongs to."""
        if not SHORTEST <= seconds <= LONGEST:
            seconds = SHORTEST if seconds < SHORTEST else LONGEST
        return floor(log(seconds) / self._log_growth) + 1

    def top_of(self, bucket: int) -> float:
        """Return what all latencies of a bucket stay below."""
        return exp(bucket * self._log_growth)

    def counts_of(self, ordered: Sequence[float]) -> Iterator[tuple[int, int]]:
        """Yield the buckets of latencies that are in order, and how many there are in each."""
        start, number = 0, len(ordered)
        while start < number:
            bucket = self.bucket_of(ordered[start])
            end = bisect_left(ordered, exp(bucket * self._log_growth), start + 1)
            yield bucket, end - start
            start = end

    def middle_of(self, bucket: int) -> float:
        """Return what no latency of a bucket is far from, seen from that latency."""
        return self.top_of(bucket) * 2 / (1 + self.growth)
