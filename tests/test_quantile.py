"""Learnt quantiles: how near they come, how they follow changes, and what is cut short."""

from __future__ import annotations

import datetime as dt
import math
import statistics
from random import Random
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from trio_resilience._algorithms._quantile import LatencyEstimator, Quantile


def learnt(wanted: Quantile, *latencies: float, cut_short: tuple[float, ...] = ()) -> float:
    """What follows from these latencies, and from those that were cut short."""
    estimator = LatencyEstimator(wanted)
    for each in latencies:
        estimator.observe(each, is_complete=True)
    for each in cut_short:
        estimator.observe(each, is_complete=False)
    return estimator.seconds()


def median(*latencies: float, cut_short: tuple[float, ...] = ()) -> float:
    return learnt(Quantile(0.5, min_samples=1), *latencies, cut_short=cut_short)


def log_normal(rng: Random) -> float:
    return math.exp(rng.gauss(math.log(0.02), 0.8))


def log_normal_quantile(quantile: float) -> float:
    return 0.02 * math.exp(0.8 * statistics.NormalDist().inv_cdf(quantile))


# --- what is learnt -----------------------------------------------------------------------------


@hypothesis.given(st.lists(st.floats(1e-5, 1e6), min_size=1, max_size=60), st.floats(0.01, 0.99))
def test_it_is_within_one_per_cent(latencies: list[float], quantile: float) -> None:
    """The least latency that so many are at or below, but for what the newest weigh more."""
    found = learnt(Quantile(quantile, min_samples=1), *latencies)
    ordered = sorted(latencies)
    # Sixty observations differ in weight by six per cent at the most.
    low = ordered[max(0, math.ceil(quantile * 0.94 * len(ordered)) - 1)]
    high = ordered[min(len(ordered) - 1, math.ceil(min(1.0, quantile * 1.07) * len(ordered)))]
    assert low <= found <= high * 1.01


@hypothesis.given(st.floats(1e-5, 1e6))
@hypothesis.example(0.001)
@hypothesis.example(0.3)
@hypothesis.example(1.0)
@hypothesis.example(1.01)
def test_a_latency_that_does_not_vary_stays_below_its_quantile(latency: float) -> None:
    """Or else every one of such calls would be taken for a slow one."""
    assert latency <= median(*[latency] * 50) <= latency * 1.01


def test_it_goes_by_the_initial_value_until_there_are_enough() -> None:
    """And what was cut short is not enough, however much there is of it."""
    wanted = Quantile(0.5, min_samples=3, initial=7)
    estimator = LatencyEstimator(wanted)
    for _ in range(50):
        estimator.observe(0.1, is_complete=False)
    for _ in range(2):
        estimator.observe(0.1, is_complete=True)
        assert estimator.seconds() == 7
    estimator.observe(0.1, is_complete=True)
    assert estimator.seconds() == pytest.approx(0.1, rel=0.01)
    assert estimator.anew().seconds() == 7


def test_without_an_initial_value_there_is_no_telling() -> None:
    assert learnt(Quantile(0.5), *[1.0] * 99) == math.inf
    assert learnt(Quantile(0.5), *[1.0] * 100) == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize("latency", [0.0, 1e-9, -1e-17, 1e12])
def test_latencies_beyond_all_measure_are_bounded(latency: float) -> None:
    """Clocks that stand still, and programs that do."""
    assert 0 < median(latency) < 1.1e7


@pytest.mark.parametrize("quantile", [0.5, 0.95, 0.99])
def test_it_converges_to_the_true_quantile(quantile: float) -> None:
    """Of a distribution with a long tail; on average over time, within five per cent."""
    rng, estimator = Random(5), LatencyEstimator(Quantile(quantile))
    found = list[float]()
    for number in range(20_000):
        estimator.observe(log_normal(rng), is_complete=True)
        if number > 5000 and number % 50 == 0:
            found.append(estimator.seconds())
    assert statistics.fmean(found) == pytest.approx(log_normal_quantile(quantile), rel=0.05)
    assert max(found) / min(found) < 1.5


@pytest.mark.parametrize("factor", [0.1, 10])
def test_it_follows_a_change(factor: float) -> None:
    """Within a few thousand operations, whatever was before, and however long."""
    rng, estimator = Random(5), LatencyEstimator(Quantile(0.95))
    for _ in range(50_000):
        estimator.observe(log_normal(rng), is_complete=True)
    for _ in range(5000):
        estimator.observe(log_normal(rng) * factor, is_complete=True)
    assert estimator.seconds() == pytest.approx(log_normal_quantile(0.95) * factor, rel=0.15)


def buckets_of(estimator: Any) -> list[dict[int, float]]:
    return [estimator._complete, estimator._cut_short]  # noqa: SLF001 - nothing else tells


def test_its_memory_is_bounded() -> None:
    """By the range of latencies, not by their number; and what is forgotten is let go."""
    rng, estimator = Random(5), LatencyEstimator(Quantile(0.95))
    for _ in range(1000):
        estimator.observe(10 ** rng.uniform(-7, 8), is_complete=rng.random() < 0.5)
    buckets = buckets_of(estimator)
    assert all(300 < len(each) < 1500 for each in buckets)
    for _ in range(300_000):
        estimator.observe(1.0, is_complete=True)
    assert estimator.seconds() == pytest.approx(1, rel=0.01)
    buckets = buckets_of(estimator)
    assert [len(each) for each in buckets] == [1, 0]


# --- what was cut short -------------------------------------------------------------------------


def test_what_was_cut_short_took_at_least_that_long() -> None:
    """One in three ends at a second; of the two that were cut short, no more is known."""
    assert median(1.0, cut_short=(2.0, 2.0)) == pytest.approx(2, rel=0.01)
    assert median(1.0, 1.0, cut_short=(2.0,)) == pytest.approx(1, rel=0.01)


def test_what_was_cut_short_early_says_nothing() -> None:
    """Any number of operations that were watched for an instant only."""
    latencies = [1.0, 2.0, 3.0]
    assert median(*latencies, cut_short=(0.001,) * 30) == pytest.approx(2, rel=0.01)


def test_what_was_cut_short_counts_while_it_was_watched() -> None:
    """The product-limit estimate, by hand: 3/4 last longer than 1, and 3/4 * 1/2 longer than 3."""
    found = learnt(Quantile(0.6, min_samples=1), 1.0, 3.0, 4.0, cut_short=(2.0,))
    assert found == pytest.approx(3, rel=0.01)
    found = learnt(Quantile(0.7, min_samples=1), 1.0, 3.0, 4.0, cut_short=(2.0,))
    assert found == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("initial", [0.001, 0.02, 1.0, math.inf])
def test_hedging_does_not_make_it_too_small(initial: float) -> None:
    """The slow ones are those that are cancelled; yet one in twenty is hedged in the end.

    To leave them out, or to take them for ended, would find half of the true latency, or less, and
    from a small initial value never get out of it.
    """
    rng, estimator = Random(3), LatencyEstimator(Quantile(0.95, initial=initial))
    hedged, found = 0, list[float]()
    for number in range(20_000):
        after, first, second = estimator.seconds(), log_normal(rng), log_normal(rng)
        if number >= 5000:
            found.append(after)
            hedged += first > after
        if first > after:
            ended, cut = (first, first - after), (after + second, second)
            is_first = first < after + second
            estimator.observe(ended[0] if is_first else cut[0], is_complete=is_first)
            estimator.observe(ended[1] if is_first else cut[1], is_complete=not is_first)
        else:
            estimator.observe(first, is_complete=True)
    assert statistics.fmean(found) == pytest.approx(log_normal_quantile(0.95), rel=0.03)
    assert hedged / 15_000 == pytest.approx(0.05, abs=0.005)


# --- options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"quantile": 0}, "`quantile` must be > 0, got 0"),
        ({"quantile": 1}, "`quantile` must be < 1, got 1"),
        ({"quantile": math.nan}, "`quantile` must be > 0, got nan"),
        ({"quantile": True}, "`quantile` must be a number, got True"),
        ({"quantile": 95}, "`quantile` must be < 1, got 95"),
        ({"min_samples": 0}, "`min_samples` must be >= 1, got 0"),
        ({"min_samples": 1.5}, "`min_samples` must be an int, got 1.5"),
        ({"initial": -1}, "`initial` must be >= 0, got -1"),
        ({"initial": "1"}, "`initial` must be seconds or a timedelta, got '1'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"quantile": 0.5, **options}
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        Quantile(**given)


def test_the_initial_value_may_be_a_timedelta() -> None:
    assert Quantile(0.9, initial=dt.timedelta(milliseconds=20)).initial == 0.02
