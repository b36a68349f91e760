"""The windows of the circuit breaker against models that remember every call."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_resilience._algorithms._window import BUCKETS, FAILED, SLOW, CallWindow, TimeWindow

if TYPE_CHECKING:
    from trio_resilience._algorithms._window import Window

MARKS = [0, FAILED, SLOW, FAILED + SLOW]
WIDTH = 1.0
"""Seconds in a bucket of the windows below."""

marks = st.sampled_from(MARKS)


def counts(window: Window) -> tuple[int, int, int]:
    return window.calls, window.failures, window.slow_calls


def summed(kept: list[int]) -> tuple[int, int, int]:
    return (
        len(kept),
        sum(mark in {FAILED, FAILED + SLOW} for mark in kept),
        sum(mark in {SLOW, FAILED + SLOW} for mark in kept),
    )


@given(st.integers(1, 8), st.lists(marks, max_size=60))
def test_the_last_calls_are_those_that_came_last(size: int, calls: list[int]) -> None:
    """However many came before, and however they ended."""
    window = CallWindow(size)
    assert counts(window) == (0, 0, 0)
    for number, mark in enumerate(calls, 1):
        window.add(0.0, mark)
        assert counts(window) == summed(calls[:number][-size:])
    window.forget_before(1e9)
    assert counts(window) == summed(calls[-size:])


@pytest.mark.parametrize("start", [0.0, 0.6, 1e6])
@given(st.lists(st.tuples(st.floats(0, 100), marks), max_size=40))
def test_the_last_seconds_are_remembered_to_within_a_bucket(
    start: float, calls: list[tuple[float, int]]
) -> None:
    """None that is too old counts; all that are younger than the window less one bucket do."""
    window, seconds = TimeWindow(BUCKETS * WIDTH, start), BUCKETS * WIDTH
    now, seen = start, list[tuple[float, int]]()
    for pause, mark in calls:
        now += pause
        window.add(now, mark)
        seen.append((now, mark))
        old = [mark for time, mark in seen if now - time < seconds + 1e-6]
        young = [mark for time, mark in seen if now - time < seconds - WIDTH - 1e-6]
        for least, count, most in zip(summed(young), counts(window), summed(old), strict=True):
            assert least <= count <= most
    window.forget_before(now + seconds)
    assert counts(window) == (0, 0, 0)


def test_a_window_of_seconds_begins_with_its_first_bucket() -> None:
    """What comes first is remembered for the whole time, and then no longer."""
    window = TimeWindow(10.0, 5.0)
    window.add(5.0, FAILED + SLOW)
    window.forget_before(14.999)
    assert counts(window) == (1, 1, 1)
    window.forget_before(15.0)
    assert counts(window) == (0, 0, 0)


def test_a_long_pause_empties_each_bucket_once() -> None:
    """Millions of window lengths later, the next call is the only one, at once."""
    window = TimeWindow(0.001, 0.0)
    for index in range(200):
        window.add(index * 1e-5, MARKS[index % 4])
    assert window.calls > 50
    window.add(1e6, FAILED)
    assert counts(window) == (1, 1, 0)


def test_a_clock_that_is_asked_out_of_order_does_no_harm() -> None:
    """A call is counted in the newest bucket, whatever the time it comes with."""
    window = TimeWindow(10.0, 0.0)
    window.add(9.0, FAILED)
    window.add(3.0, SLOW)
    window.forget_before(0.0)
    assert counts(window) == (2, 1, 1)
    window.forget_before(19.0)
    assert counts(window) == (0, 0, 0)


@pytest.mark.parametrize("window", [CallWindow(100), TimeWindow(10.0, 0.0)], ids=["calls", "time"])
def test_memory_does_not_grow_with_the_calls(window: CallWindow | TimeWindow) -> None:
    """It is the same after a hundred thousand calls as after a thousand."""

    def size() -> int:
        ring = window._ring  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        return sys.getsizeof(ring) + sum(map(sys.getsizeof, ring))

    sizes = list[int]()
    for index in range(100_000):
        window.add(index / 1000, MARKS[index % 4])
        if index in {1_000, 99_999}:
            sizes.append(size())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    assert sizes[1] < 10_000


@pytest.mark.parametrize("seconds", [5e-324, 1e-308, 1e-12])
@pytest.mark.parametrize("start", [0.0, 1e9])
def test_a_window_shorter_than_the_clock_can_show_holds_an_instant(
    seconds: float, start: float
) -> None:
    """However short it is; at the next instant it is empty."""
    window = TimeWindow(seconds, start)
    for now in (start, start, start + 1e-3):
        window.add(now, FAILED)
    assert (window.calls, window.failures) == (1, 1)
