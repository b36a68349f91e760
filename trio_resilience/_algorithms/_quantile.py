"""Learn a quantile of latencies as they come, also of those that were cut short, and forget.

Three known parts, none of which does it alone:

- Buckets whose bounds grow by a constant factor (`_buckets`) give any quantile within a relative
  error of one per cent, in a memory that their range bounds.
- Each observation weighs a little more than the one before, so that what was learnt long ago comes
  to count for nothing, and no bucket is touched for it: Cormode et al., "Forward decay: a practical
  time decay model for streaming systems", ICDE 2009.
- An operation that was cancelled after a second has taken *at least* a second. To leave it out, or
  to take it for one that ended then, would make the quantile too small, and more so the more is
  cancelled for being slow. The product-limit estimator counts it among those at risk for as long
  as it was watched, and no longer: Kaplan and Meier, "Nonparametric estimation from incomplete
  observations", JASA 53 (1958).

The P² algorithm (Jain and Chlamtac, 1985) gets by with five numbers, but it never forgets, and has
no place for what was cut short.
"""

from __future__ import annotations

import math
from datetime import timedelta
from typing import final

import attrs

from trio_resilience._algorithms._buckets import Buckets
from trio_resilience._checks import integer, number, seconds

_BUCKETS = Buckets(1.0099)
"""Each reaches almost one per cent further than the one before, to no round number: some 3,000."""

_MEMORY = 1000
"""Of so many observations, at least, the weight of the oldest is more than a third of the last."""

_BEYOND = 50
"""So many of the observations that count lie beyond the quantile."""

_STRIDE = 16
"""The estimate is made anew after so many observations."""

_HEAVY = 1e100
_FORGOTTEN = 1e-9


def _quantile(value: float) -> float:
    result = number("quantile", value, exclusive=True)
    if not result < 1:
        raise ValueError(f"`quantile` must be < 1, got {value!r}")
    return result


def _min_samples(value: int) -> int:
    return integer("min_samples", value, minimum=1)


def _initial(value: float | timedelta) -> float:
    return seconds("initial", value)


@final
@attrs.frozen
class Quantile:
    """A latency that so large a part of the operations stays below, learnt while they run.

    It follows changes: what counts is, roughly, the last thousand operations, or more for a
    quantile so close to 1 that only few of a thousand lie beyond. How long an operation would have
    taken that failed or was cancelled is not known; that it took longer than that counts.

    Args:
        quantile: which part, more than 0 and less than 1.
        min_samples: how many successes there have to be before it is believed.
        initial: seconds to go by until then, a number or a `datetime.timedelta`.

    Example::

        hedge = Hedge(after=Quantile(0.95))  # about every twentieth call is hedged
    """

    quantile: float = attrs.field(converter=_quantile)
    min_samples: int = attrs.field(default=100, kw_only=True, converter=_min_samples)
    initial: float = attrs.field(default=math.inf, kw_only=True, converter=_initial)


@final
@attrs.define(eq=False, repr=False)
class LatencyEstimator:
    """What was observed so far, and the quantile that follows from it."""

    wanted: Quantile
    samples: int = attrs.field(default=0, init=False)
    """Operations that succeeded."""
    _complete: dict[int, float] = attrs.field(factory=dict[int, float], init=False)
    """The weight of those that ended, by bucket."""
    _cut_short: dict[int, float] = attrs.field(factory=dict[int, float], init=False)
    """And of those that did not."""
    _weight: float = attrs.field(default=1.0, init=False)
    _gain: float = attrs.field(init=False)
    _estimate: float | None = attrs.field(default=None, init=False)
    _news: int = attrs.field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        memory = max(_MEMORY, _BEYOND / (1 - self.wanted.quantile))
        self._gain = 1 + 1 / memory

    def observe(self, seconds: float, *, is_complete: bool) -> None:
        """Take account of an operation that took so long, or at least so long."""
        bucket = _BUCKETS.bucket_of(seconds)
        weights = self._complete if is_complete else self._cut_short
        weights[bucket] = weights.get(bucket, 0.0) + self._weight
        self.samples += is_complete
        self._news += 1
        self._weight *= self._gain
        if self._weight > _HEAVY:
            self._complete = self._lightened(self._complete)
            self._cut_short = self._lightened(self._cut_short)
            self._weight = 1.0

    def seconds(self) -> float:
        """Return the quantile, as far as it is known."""
        if self.samples < self.wanted.min_samples:
            return self.wanted.initial
        if self._estimate is None or self._news >= _STRIDE:
            # Not the middle: where latencies hardly vary, almost all would be beyond their own
            # quantile.
            self._estimate, self._news = _BUCKETS.top_of(self._bucket_reached()), 0
        return self._estimate

    def anew(self) -> LatencyEstimator:
        """Return one for the same quantile that has learnt nothing."""
        return LatencyEstimator(self.wanted)

    def _bucket_reached(self) -> int:
        """Return the first bucket by which so large a part has ended, or else the last."""
        left = 1 - self.wanted.quantile + 1e-12
        at_risk = sum(self._complete.values()) + sum(self._cut_short.values())
        surviving, bucket = 1.0, 0
        for bucket in sorted(self._complete.keys() | self._cut_short.keys()):
            ended, cut = self._complete.get(bucket, 0.0), self._cut_short.get(bucket, 0.0)
            at_risk = max(at_risk, ended + cut)  # differences of floats are not exact
            surviving *= 1 - ended / at_risk
            if surviving <= left:
                break
            at_risk -= ended + cut
        return bucket

    def _lightened(self, weights: dict[int, float]) -> dict[int, float]:
        lighter = {bucket: weight / self._weight for bucket, weight in weights.items()}
        return {bucket: weight for bucket, weight in lighter.items() if weight > _FORGOTTEN}
