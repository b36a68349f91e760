"""How long the other side asks to wait: `retry_after`, and the Retry-After header."""

from __future__ import annotations

import datetime as dt
import math
import time
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_classify import AnswerError, Bag, nested, waited
from trio_resilience import Constant, RateLimitExceededError, RejectedError, Retry
from trio_resilience._classify import retry_after_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock

NOON = dt.datetime(2026, 11, 23, 12, tzinfo=dt.UTC)


def told(value: Any, **headers: Any) -> Exception:
    return AnswerError(response=Bag(status_code=503, headers={"Retry-After": value, **headers}))


def after_two(_: Exception) -> float:
    return 2.0


def after_nine(_: Exception) -> float:
    return 9.0


HINTS: dict[str, Callable[[Any], Exception]] = {
    "retry_after": lambda value: AnswerError(retry_after=value),
    "response.headers": told,
    "lower case": lambda value: AnswerError(response=Bag(headers={"retry-after": value})),
    "headers": lambda value: AnswerError(headers={"Retry-After": value}),
}


@pytest.mark.parametrize("name", HINTS)
@pytest.mark.parametrize(
    "value, expected", [(5, 5.0), (0.5, 1.0), (0, 1.0), (60, 60.0), (61, None)]
)
async def test_a_hint_is_the_least_to_wait(
    autojump_clock: MockClock, name: str, value: float, expected: float | None
) -> None:
    """The larger of hint and backoff; longer than `max_retry_after` means giving up at once."""
    # Headers are text; an attribute is a number.
    error = HINTS[name](value if name == "retry_after" else str(value))
    assert await waited(error) == expected


async def test_a_timedelta_is_a_hint(autojump_clock: MockClock) -> None:
    """As times are everywhere."""
    assert await waited(AnswerError(retry_after=dt.timedelta(seconds=5))) == 5.0


async def test_a_rejection_tells_when_to_come_back(autojump_clock: MockClock) -> None:
    """Where its retry was asked for."""
    assert await waited(RateLimitExceededError(7.5), on=RejectedError) == 7.5
    assert await waited(RateLimitExceededError(None), on=RejectedError) == 1.0


async def test_how_long_a_hint_may_be_can_be_set(autojump_clock: MockClock) -> None:
    """`max_retry_after` is exact, and may be infinite."""
    assert await waited(told("5"), max_retry_after=5) == 5.0
    assert await waited(told("5"), max_retry_after=4.99) is None
    assert await waited(told("9999"), max_retry_after=math.inf) == 9999.0
    assert await waited(told("5"), max_retry_after=dt.timedelta(seconds=4)) is None


async def test_the_note_says_that_the_wait_was_too_long(autojump_clock: MockClock) -> None:
    """And how long it would have been."""
    error = told("120")
    assert await waited(error) is None
    (note,) = error.__notes__
    assert note.startswith("retry: ")
    assert "120" in note
    assert "max_retry_after" in note


async def test_a_hint_is_a_floor_for_a_predicates_number_too(autojump_clock: MockClock) -> None:
    """Whatever the delay comes from, it is not shorter than told."""
    assert await waited(told("5"), on=after_two) == 5.0
    assert await waited(told("5"), on=after_nine) == 9.0


async def test_with_jitter_up_to_a_tenth_is_added_to_a_hint(autojump_clock: MockClock) -> None:
    """Or all that were told the same would come back together."""
    backoff = Constant(1, jitter="full")
    drawn = [await waited(told("10"), backoff=backoff) for _ in range(200)]
    assert all(wait is not None and 10 <= wait <= 11 for wait in drawn)
    assert len(set(drawn)) > 150


@pytest.mark.parametrize("seconds", [30, 0, -3600])
async def test_a_date_is_a_hint(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Compared with the calendar; one in the past means that no wait is asked for."""
    monkeypatch.setattr(time, "time", NOON.timestamp)
    date = NOON + dt.timedelta(seconds=seconds)
    assert await waited(told(format_datetime(date, usegmt=True))) == max(1, seconds)
    assert await waited(told(format_datetime(date.replace(tzinfo=None)))) == max(1, seconds)


@pytest.mark.parametrize("skew", [-3600, 3600])
async def test_a_date_is_compared_with_the_servers_own(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, skew: float
) -> None:
    """If the response has a `Date`, a wrong clock here does not matter."""
    monkeypatch.setattr(time, "time", lambda: NOON.timestamp() + skew)
    date = format_datetime(NOON + dt.timedelta(seconds=30), usegmt=True)
    assert await waited(told(date, Date=format_datetime(NOON, usegmt=True))) == 30


def kind_of(value: object) -> str:
    return type(value).__name__


HOSTILE: list[Any] = [
    "-1", "0", "0.5", "9" * 5000, "1m0s", "nan", "inf", "-inf", "", " ", "soon", "1e400", "0x10",
    "\u0663", "Fri, 31 Dec 9999 23:59:59 GMT", "Fri, 31 Dec 9999 23:59:59 -2359",
    "Thu, 01 Jan 1970 00:00:00 GMT", "Mon, 23 Nov 2026 12:00:30 -0000", "Mon, 99 Nov 2026",
    "1764000000", "5, 10", "5, soon", ",", ";", "\x00", None, [], {}, object(), b"5", math.nan,
    math.inf, -math.inf, True, 10**400, 10**5000, -(10**400), dt.timedelta.max, dt.timedelta.min,
]  # fmt: skip


@pytest.mark.parametrize("hint", HINTS.values(), ids=HINTS)
@pytest.mark.parametrize("value", HOSTILE, ids=kind_of)
async def test_a_hostile_hint_does_no_harm(
    autojump_clock: MockClock, hint: Callable[[Any], Exception], value: object
) -> None:
    """It never raises, and the wait is between the backoff and the limit, or there is none."""
    wait = await waited(hint(value))
    assert wait is None or 1 <= wait <= 60


async def test_two_headers_that_were_joined_mean_the_longer_wait(autojump_clock: MockClock) -> None:
    """Clients join them with a comma."""
    assert await waited(told("5, 10")) == 10


@given(text=st.text(max_size=40), date=st.text(max_size=40))
def test_no_text_in_a_header_raises(text: str, date: str) -> None:
    """What can't be understood is ignored, and what is understood is not negative or NaN."""
    found = retry_after_of(told(text, Date=date), lambda: 1e9)
    assert found is None or found >= 0


class Strict:
    """Headers that can be asked for a few names only."""

    def get(self, name: str) -> str:
        raise KeyError(name)


@pytest.mark.parametrize(
    "response",
    [
        None,
        5,
        Bag(headers=None),
        Bag(headers=[("Retry-After", "5")]),
        Bag(headers=5),
        Bag(headers=Strict()),
    ],
)
async def test_a_response_without_headers_is_no_hint(
    autojump_clock: MockClock, response: object
) -> None:
    """Objects of any shape are looked at with care."""
    assert await waited(AnswerError(response=response)) == 1.0


async def test_a_hint_on_a_refused_result_counts_too(autojump_clock: MockClock) -> None:
    """A response with a 503 is a result for some clients: its header says the same."""
    last = Bag(status_code=200)
    answers = [Bag(status_code=503, headers={"Retry-After": "7"}), last]

    async def fetch() -> Bag:
        return answers.pop(0)

    policy = Retry(retry_result=lambda answer: answer.status_code == 503, backoff=Constant(1))
    counted = await policy.call_counted(fetch)
    assert counted.total_delay == 7
    assert counted.result is last


async def test_of_several_hints_in_a_group_the_longest_counts(autojump_clock: MockClock) -> None:
    """Coming back earlier than any of them would be too early for one."""
    group = nested(AnswerError(retry_after=2), AnswerError(retry_after=9), OSError())
    assert await waited(group) == 9.0
