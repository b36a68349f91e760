"""Sketches of latencies: how near their quantiles are, how they add up, and what they take."""

from __future__ import annotations

import math
import sys
from random import Random
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from trio_resilience._algorithms._buckets import LONGEST, SHORTEST
from trio_resilience._algorithms._distinct import DistinctCounter
from trio_resilience._algorithms._sketch import LatencySnapshot, Sketch

latencies = st.lists(st.floats(0, LONGEST) | st.floats(SHORTEST, 10), min_size=1, max_size=80)
shares = st.floats(0, 1)


def sketch_of(*seconds: float) -> Sketch:
    """One that has seen these."""
    sketch = Sketch()
    for each in seconds:
        sketch.observe(each)
    return sketch


def snapshot_of(*seconds: float) -> LatencySnapshot:
    return sketch_of(*seconds).snapshot()


def counts_of(sketch: Any) -> Any:
    return sketch._counts  # noqa: SLF001 - nothing else tells


def true_quantile(values: list[float], share: float) -> float:
    """The least value that so large a share of them does not exceed."""
    return sorted(values)[max(1, math.ceil(share * len(values))) - 1]


@hypothesis.given(latencies, shares)
@hypothesis.example([1.04**3], 0.5)
@hypothesis.example([0.0], 0.5)
@hypothesis.example([SHORTEST, LONGEST], 1)
def test_a_quantile_is_within_two_per_cent(values: list[float], share: float) -> None:
    """Of the true one, and within a microsecond of one that is shorter than that."""
    found = snapshot_of(*values).quantile(share)
    assert found is not None
    assert found == pytest.approx(true_quantile(values, share), rel=0.02, abs=SHORTEST)


@hypothesis.given(latencies, latencies)
def test_two_add_up_to_what_would_have_seen_both(ours: list[float], theirs: list[float]) -> None:
    """In either order, and to the very same buckets."""
    both = snapshot_of(*ours).plus(snapshot_of(*theirs))
    whole = snapshot_of(*ours, *theirs)
    assert both.total == pytest.approx(whole.total)
    assert (both.count, both.buckets) == (whole.count, whole.buckets)
    assert (both.shortest, both.longest) == (whole.shortest, whole.longest)
    assert both == snapshot_of(*theirs).plus(snapshot_of(*ours))


@hypothesis.given(latencies)
def test_nothing_adds_nothing(values: list[float]) -> None:
    found, nothing = snapshot_of(*values), LatencySnapshot()
    assert found.plus(nothing) == nothing.plus(found) == found
    assert nothing.plus(nothing) == nothing


@hypothesis.given(st.floats(0, LONGEST), shares)
def test_what_does_not_vary_is_its_own_quantile(seconds: float, share: float) -> None:
    """Exactly: no quantile is beyond what was observed."""
    assert snapshot_of(seconds, seconds, seconds).quantile(share) == seconds


def test_the_count_the_sum_and_the_extremes_are_exact() -> None:
    found = snapshot_of(0.25, 4.0, 0.5)
    assert (found.count, found.total, found.shortest, found.longest) == (3, 4.75, 0.25, 4.0)
    assert found.mean == pytest.approx(4.75 / 3)


def test_of_nothing_nothing_is_known() -> None:
    nothing = Sketch().snapshot()
    assert nothing == LatencySnapshot()
    assert (nothing.quantile(0.5), nothing.mean, nothing.longest) == (None, None, None)


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_is_between_none_and_all(share: float) -> None:
    with pytest.raises(ValueError, match="`share` must be >= 0 and <= 1, got"):
        snapshot_of(1.0).quantile(share)


@pytest.mark.parametrize("seconds", [-1e-17, 1e-300, 1e300])
def test_latencies_beyond_all_measure_are_counted(seconds: float) -> None:
    """Clocks that stand still, and programs that do."""
    found = snapshot_of(seconds)
    assert (found.count, found.quantile(0.5)) == (1, seconds)


def test_its_memory_is_bounded() -> None:
    """By the range of latencies, not by their number."""
    rng = Random(5)
    sketch = sketch_of(*(10 ** rng.uniform(-8, 9) for _ in range(20_000)), 0.0, LONGEST)
    assert len(sketch.snapshot().buckets) == 764
    assert sys.getsizeof(counts_of(sketch)) < 8000


def test_a_bucket_may_hold_more_than_four_thousand_million() -> None:
    sketch = sketch_of(1.0)
    sketch.snapshot()  # which sorts it in
    counts_of(sketch)[0] = 2**32 - 1  # it would take hours to get there
    sketch.observe(1.0)
    sketch.observe(2.0)
    assert sketch.snapshot().buckets[0] == (1, 2**32)


@pytest.mark.parametrize("number", [0, 1, 100, 10_000])
def test_different_things_are_counted_once(number: int) -> None:
    """Within three per cent."""
    counter = DistinctCounter()
    for _ in range(2):
        for each in range(number):
            counter.add(("policy", f"operation {each}"))
    assert counter.estimate() == pytest.approx(number, rel=0.03)


def test_more_than_can_be_counted_are_many() -> None:
    counter = DistinctCounter()
    for each in range(1_500_000):
        counter.add(each)
    assert 700_000 < counter.estimate() < 800_000
