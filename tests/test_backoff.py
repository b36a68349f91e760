"""How long to wait: each backoff, its cap, its jitter, and what it refuses."""

from __future__ import annotations

import copy
import datetime as dt
import math
import pickle
from fractions import Fraction
from itertools import islice
from random import Random
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from trio_resilience import Constant, Decorrelated, Exponential, Fibonacci, Linear

if TYPE_CHECKING:
    from collections.abc import Iterator

NAN, INF = math.nan, math.inf
HUGE = 10**400
KINDS: list[Any] = [Constant, Exponential, Linear, Fibonacci, Decorrelated]
GROWING: list[Any] = [Exponential, Linear, Fibonacci]
CAPPED: list[Any] = [*GROWING, Decorrelated]

every_kind = pytest.mark.parametrize("kind", KINDS)
growing = pytest.mark.parametrize("kind", GROWING)
capped = pytest.mark.parametrize("kind", CAPPED)


def delays(backoff: Any, count: int, seed: int = 1) -> list[float]:
    """The first delays of one call."""
    return list(islice(backoff(Random(seed)), count))


def brief(value: object) -> str:
    return "10**400" if value == HUGE else repr(value)


def at_cap(kind: Any, jitter: str) -> Any:
    """A backoff whose every delay is drawn from 8 s."""
    if kind is Constant:
        return Constant(8, jitter=jitter)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    return kind(8, max_delay=8, jitter=jitter)


@pytest.mark.parametrize(
    "backoff, expected",
    [
        (Constant(1.5), [1.5] * 6),
        (Constant(0), [0] * 6),
        (Linear(2, jitter="none"), [2, 4, 6, 8, 10, 12]),
        (Linear(2, max_delay=7, jitter="none"), [2, 4, 6, 7, 7, 7]),
        (Exponential(jitter="none"), [1, 2, 4, 8, 16, 30]),
        (Exponential(0.5, multiplier=3, max_delay=5, jitter="none"), [0.5, 1.5, 4.5, 5, 5, 5]),
        (Exponential(1, multiplier=1, jitter="none"), [1] * 6),
        (Fibonacci(jitter="none"), [1, 1, 2, 3, 5, 8]),
        (Fibonacci(2, max_delay=9, jitter="none"), [2, 2, 4, 6, 9, 9]),
        (Exponential(0, jitter="none"), [0] * 6),
        (Linear(0, jitter="none"), [0] * 6),
        (Fibonacci(0, jitter="none"), [0] * 6),
        (Decorrelated(0), [0] * 6),
        (Decorrelated(3, max_delay=3), [3] * 6),
    ],
    ids=repr,
)
def test_the_delays_without_jitter(backoff: Any, expected: list[float]) -> None:
    """Each grows as its name says, to its cap and no further."""
    assert delays(backoff, 6) == expected


def test_the_defaults_are_the_documented_ones() -> None:
    """Growing backoffs start at one second, end at thirty, and are fully jittered."""
    for backoff in (Exponential(), Linear(), Fibonacci()):
        assert (backoff.base_delay, backoff.max_delay, backoff.jitter) == (1.0, 30.0, "full")
    assert Exponential().multiplier == 2.0
    assert Constant(1).jitter == "none"
    assert (Decorrelated().base_delay, Decorrelated().max_delay) == (1.0, 30.0)


@every_kind
def test_only_the_first_option_is_positional(kind: Any) -> None:
    """What the second number means could only be guessed."""
    with pytest.raises(TypeError, match="positional"):
        kind(1, 2)


def test_a_constant_delay_has_no_default() -> None:
    """How long it is has to be said."""
    with pytest.raises(TypeError, match="delay"):
        Constant()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@every_kind
def test_a_backoff_is_a_frozen_value(kind: Any) -> None:
    """It can be shared without fear, compared, hashed, copied and pickled."""
    backoff = kind(3)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        setattr(backoff, attrs.fields(kind)[0].name, 4)
    assert backoff == kind(3) != kind(4)
    assert hash(backoff) == hash(kind(3))
    assert pickle.loads(pickle.dumps(backoff)) == backoff  # noqa: S301 - it is our own
    assert copy.deepcopy(backoff) == copy.copy(backoff) == backoff
    assert repr(backoff).startswith(f"{kind.__name__}(")


@every_kind
def test_delays_may_be_given_as_timedelta(kind: Any) -> None:
    """They are kept as seconds."""
    assert kind(dt.timedelta(milliseconds=1500)) == kind(1.5) == kind(Fraction(3, 2))


@capped
def test_the_cap_may_be_given_as_timedelta(kind: Any) -> None:
    """So is it."""
    assert kind(max_delay=dt.timedelta(minutes=1)) == kind(max_delay=60)


# --- jitter -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Constant, *GROWING])
def test_full_jitter_is_between_nothing_and_the_delay(kind: Any) -> None:
    """Drawn evenly, after the cap: at the cap clients still come back at different times."""
    drawn = delays(at_cap(kind, "full"), 4000)
    assert min(drawn) >= 0
    assert max(drawn) <= 8
    assert fmean(drawn) == pytest.approx(4, abs=0.2)
    assert stdev(drawn) == pytest.approx(8 / math.sqrt(12), abs=0.1)


@pytest.mark.parametrize("kind", [Constant, *GROWING])
def test_equal_jitter_is_at_least_half_of_the_delay(kind: Any) -> None:
    """Half is certain, and half is drawn."""
    drawn = delays(at_cap(kind, "equal"), 4000)
    assert min(drawn) >= 4
    assert max(drawn) <= 8
    assert fmean(drawn) == pytest.approx(6, abs=0.1)
    assert stdev(drawn) == pytest.approx(4 / math.sqrt(12), abs=0.1)


@growing
def test_jitter_does_not_feed_back(kind: Any) -> None:
    """The delay that is drawn from grows by the rule, whatever was drawn before."""
    plain = delays(kind(1, max_delay=1e9, jitter="none"), 20)
    means = [
        fmean(each)
        for each in zip(
            *(delays(kind(1, max_delay=1e9, jitter="full"), 20, seed) for seed in range(400)),
            strict=True,
        )
    ]
    assert means == pytest.approx([delay / 2 for delay in plain], rel=0.15)


def test_decorrelated_delays_are_drawn_between_the_base_and_three_times_the_last() -> None:
    """And they keep differing at the cap, because they are drawn below it, not cut to it."""
    before = 1.0
    drawn = delays(Decorrelated(1, max_delay=20), 5000)
    for delay in drawn:
        assert 1 <= delay <= min(3 * before, 20)
        before = delay
    assert max(drawn) > 15
    assert sum(delay == 20 for delay in drawn) < 5
    assert stdev(drawn) > 3


@pytest.mark.parametrize("kind", [Constant, *GROWING])
@pytest.mark.parametrize("flag, word", [(True, "full"), (False, "none")])
def test_jitter_may_be_a_bool(kind: Any, flag: bool, word: str) -> None:
    """Yes is full jitter, no is none."""
    assert kind(1, jitter=flag).jitter == word
    assert kind(1, jitter=flag) == kind(1, jitter=word)


@every_kind
def test_a_seed_decides_the_delays(kind: Any) -> None:
    """The same generator state gives the same delays; another gives others."""
    backoff = Decorrelated(1) if kind is Decorrelated else kind(1, jitter="full")
    assert delays(backoff, 50, seed=7) == delays(backoff, 50, seed=7)
    assert delays(backoff, 50, seed=7) != delays(backoff, 50, seed=8)


@pytest.mark.parametrize("kind", [Constant, *GROWING])
def test_no_jitter_draws_nothing(kind: Any) -> None:
    """A generator that nothing is drawn from is left as it was."""
    rng = Random(5)
    before = rng.getstate()
    next(kind(1, jitter="none")(rng))
    assert rng.getstate() == before


@every_kind
def test_every_call_has_its_own_iterator(kind: Any) -> None:
    """Two calls under one backoff start over, each, and do not see each other."""
    backoff = kind(1)
    first: Iterator[float] = backoff(Random(3))
    second: Iterator[float] = backoff(Random(3))
    assert first is not second
    ahead = list(islice(first, 10))
    assert list(islice(second, 10)) == ahead


# --- far out ------------------------------------------------------------------------------------


@capped
@pytest.mark.parametrize(
    "base, cap", [(1, 30.0), (1, INF), (1e300, INF), (1.7e308, INF), (5e-324, INF), (0.0, 30.0)]
)
def test_the_hundred_thousandth_delay_is_a_number_too(kind: Any, base: float, cap: float) -> None:
    """No overflow, no infinity, no NaN, nothing above the cap and nothing negative."""
    drawn = delays(kind(base, max_delay=cap), 100_000)
    assert all(0 <= delay <= cap and delay < INF for delay in drawn)


@growing
@pytest.mark.parametrize("cap", [30.0, INF])
def test_delays_never_shrink_before_the_jitter(kind: Any, cap: float) -> None:
    """Up to the cap, or for ever."""
    plain = delays(kind(1, max_delay=cap, jitter="none"), 5000)
    assert plain == sorted(plain)
    assert max(plain) < INF


@pytest.mark.parametrize("multiplier", [1e308, 1.0000001, 1])
def test_any_finite_multiplier_works(multiplier: float) -> None:
    """The largest float as well: the product is cut before it becomes infinite."""
    plain = delays(Exponential(3, multiplier=multiplier, max_delay=INF, jitter="none"), 1000)
    assert plain == sorted(plain)
    assert plain[0] == 3
    assert all(math.isfinite(delay) for delay in plain)


@pytest.mark.parametrize("jitter", ["full", "equal"])
def test_equal_and_full_jitter_survive_the_largest_delay(jitter: Any) -> None:
    """Drawing from the largest float neither overflows nor exceeds it."""
    drawn = delays(Constant(1.79e308, jitter=jitter), 1000)
    assert all(0 <= delay <= 1.79e308 for delay in drawn)


# --- refused at the door ------------------------------------------------------------------------

BAD_SECONDS: list[object] = [
    *[-1, -0.001, NAN, -INF, True, False, "5", None, [1], 1j, HUGE],
    dt.timedelta(seconds=-1),
]


@every_kind
@pytest.mark.parametrize("value", [*BAD_SECONDS, INF], ids=brief)
def test_a_bad_first_delay_is_refused(kind: Any, value: object) -> None:
    """At construction, by name; an infinite one as well, because it would never be over."""
    name = "delay" if kind is Constant else "base_delay"
    with pytest.raises((TypeError, ValueError), match=f"^`{name}` must be "):
        kind(value)


@capped
@pytest.mark.parametrize("value", BAD_SECONDS, ids=brief)
def test_a_bad_cap_is_refused(kind: Any, value: object) -> None:
    """At construction, by name."""
    with pytest.raises((TypeError, ValueError), match=r"^`max_delay` must be "):
        kind(max_delay=value)


@capped
def test_a_cap_below_the_first_delay_is_refused(kind: Any) -> None:
    """It would make the first delay a lie."""
    with pytest.raises(ValueError, match=r"^`max_delay` must be >= `base_delay` \(5\), got 4\.0$"):
        kind(5, max_delay=4)
    assert kind(5, max_delay=5).max_delay == 5


@pytest.mark.parametrize("value", [0, 0.5, -1, NAN, INF, True, "2", None, HUGE], ids=brief)
def test_a_bad_multiplier_is_refused(value: Any) -> None:
    """Below one it would shrink the delays."""
    with pytest.raises((TypeError, ValueError), match=r"^`multiplier` must be "):
        Exponential(multiplier=value)


@pytest.mark.parametrize("kind", [Constant, *GROWING])
@pytest.mark.parametrize("value", ["half", "", None, 0.5, 1, "Full"])
def test_an_unknown_jitter_is_refused(kind: Any, value: Any) -> None:
    """The message lists what it may be."""
    with pytest.raises((TypeError, ValueError), match=r"^`jitter` must be .*'full'.*'none'"):
        kind(1, jitter=value)


def test_what_was_given_is_shown() -> None:
    """Name, rule, value: the house's one wording."""
    with pytest.raises(ValueError, match=r"^`base_delay` must be >= 0, got -1$"):
        Exponential(-1)
    with pytest.raises(ValueError, match=r"^`multiplier` must be >= 1, got 0$"):
        Exponential(multiplier=0)
