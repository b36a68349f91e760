"""RateLimiter's options: what is refused at the door, the defaults, and what can be seen of it."""

from __future__ import annotations

import copy
import datetime as dt
import math
import pickle
import re
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests.operations import Steps
from trio_resilience import RateLimiter, RateLimiterStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock


async def test_the_repr_shows_how_it_is(mock_clock: MockClock) -> None:
    """In a run and outside."""
    limiter = RateLimiter(300, per=60, burst=7, name="api")
    assert repr(limiter).startswith("RateLimiter(300")
    limiter.acquire_nowait(7)
    assert repr(limiter).startswith("RateLimiter(300")


def test_it_can_be_looked_at_outside_a_run() -> None:
    """A limiter that was never used has its whole burst."""
    limiter = RateLimiter(5, per=2, burst=7, max_wait=3)
    assert limiter.statistics() == RateLimiterStatistics(available=7, waiting=0, rejections=0)
    assert repr(limiter).startswith("RateLimiter(5")
    assert limiter.retry_after == 0
    assert limiter.is_idle
    assert (limiter.rate, limiter.per, limiter.burst) == (5, 2, 7)


def test_statistics_are_a_frozen_record() -> None:
    """That can be sent to another process."""
    record = RateLimiter(1).statistics()
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        record.available = 5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert pickle.loads(pickle.dumps(record)) == record  # noqa: S301 - it is our own


# --- options ------------------------------------------------------------------------------------

NO_TIMES: tuple[object, ...] = (-1, -0.001, math.nan, -math.inf, dt.timedelta(-1))
NO_NUMBERS: tuple[object, ...] = (True, False, "5", None, [1], 1j)
BAD_VALUES: list[tuple[str, object]] = [
    *[("rate", bad) for bad in (0, 0.0, -1, math.nan, math.inf, -math.inf, 1e400, 10**400)],
    *[("per", bad) for bad in (*NO_TIMES, 0, 0.0, math.inf, dt.timedelta(0))],
    *[("burst", bad) for bad in (0, -1)],
    *[("max_wait", bad) for bad in NO_TIMES],
]
BAD_TYPES: list[tuple[str, object]] = [
    *[(option, bad) for option in ("rate", "per", "burst", "max_wait") for bad in NO_NUMBERS],
    *[("burst", bad) for bad in (1.5, 2.0, math.nan, math.inf)],
    ("rate", dt.timedelta(1)),
]


@pytest.mark.parametrize("option, value", BAD_VALUES, ids=repr)
def test_bad_values_are_refused(option: str, value: object) -> None:
    """When the limiter is made, by name."""
    options: dict[str, Any] = {"rate": 1, option: value}
    with pytest.raises(ValueError, match=rf"^`{option}` must be "):
        RateLimiter(**options)


@pytest.mark.parametrize("option, value", BAD_TYPES, ids=repr)
def test_bad_types_are_refused(option: str, value: object) -> None:
    """When the limiter is made, by name, and with what was given."""
    options: dict[str, Any] = {"rate": 1, option: value}
    with pytest.raises(TypeError, match=rf"^`{option}` must be .*, got {re.escape(repr(value))}$"):
        RateLimiter(**options)


def test_the_wording_is_the_houses() -> None:
    """Name, rule, value."""
    with pytest.raises(ValueError, match=r"^`burst` must be >= 1, got 0$"):
        RateLimiter(1, burst=0)
    with pytest.raises(ValueError, match=r"^`rate` must be > 0, got 0$"):
        RateLimiter(0)
    with pytest.raises(TypeError, match="positional"):
        RateLimiter(1, 1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("bad", [0, -1, 1.5, math.nan, math.inf, True, False, "1", None, 4])
@pytest.mark.parametrize("pause", [True, False])
async def test_bad_costs_are_refused_at_once(bad: Any, pause: bool) -> None:
    """More than a burst, too, would wait for ever; nothing is taken."""
    limiter = RateLimiter(1, burst=3)
    with pytest.raises((TypeError, ValueError), match=r"^`cost` must be .*, got "):
        if pause:
            await limiter.acquire(bad)
        else:
            limiter.acquire_nowait(bad)
    assert limiter.statistics() == RateLimiterStatistics(3, 0, 0)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, True, "5", None])
def test_a_bad_rate_is_refused_later_too(bad: Any) -> None:
    """And the old one stays."""
    limiter = RateLimiter(5)
    with pytest.raises((TypeError, ValueError), match=r"^`rate` must be .*, got "):
        limiter.rate = bad
    assert limiter.rate == 5


def test_the_defaults_are_the_documented_ones() -> None:
    """One at a time, each second, however long that takes."""
    limiter = RateLimiter(5)
    assert (limiter.rate, limiter.per, limiter.burst) == (5, 1, 1)
    assert (limiter.max_wait, limiter.name) == (math.inf, "rate_limiter")
    assert RateLimiter(5, max_wait=dt.timedelta(minutes=1)).max_wait == 60


@pytest.mark.parametrize("rate", [1e-300, 1e-12, 1e12, 1e18, 1e30, 1e300])
async def test_no_rate_is_too_small_or_too_large(autojump_clock: MockClock, rate: float) -> None:
    """A hundred are let in, at once or never, and nothing overflows or spins."""
    limiter, let_in, steps = RateLimiter(rate), 0, Steps()
    trio.lowlevel.add_instrument(steps)
    with trio.move_on_after(1):
        for _ in range(100):
            await limiter.acquire()
            let_in += 1
    trio.lowlevel.remove_instrument(steps)
    assert let_in == (1 if rate < 1 else 100)
    assert 0 <= limiter.retry_after < math.inf
    assert steps.count <= 2 * 100 + 10


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("combined", [True, False])
async def test_live_state_cannot_be_duplicated(
    duplicate: Callable[[object], object], combined: bool
) -> None:
    """A copy would let through as much again, or half share what has passed: it is refused."""
    limiter = RateLimiter(1)
    limiter.acquire_nowait()
    with pytest.raises(TypeError, match="RateLimiter"):
        duplicate(RateLimiter.all_of(limiter) if combined else limiter)


def test_a_limiter_is_compared_by_identity() -> None:
    """Two of the same rate are two."""
    limiter = RateLimiter(3)
    assert len({limiter, RateLimiter(3), limiter}) == 2
