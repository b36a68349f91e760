"""How long to wait before the next attempt.

A backoff is a function of a `random.Random` that returns an iterator of delays in seconds. Every
call under a policy gets an iterator of its own. A backoff whose iterator ends allows no further
attempt.

Jitter is drawn after the cap, so that clients which were all capped still come back at different
times: "Exponential Backoff And Jitter", Marc Brooker, AWS Architecture Blog, 2015.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Literal, TypeAlias, final

import attrs

from trio_resilience._checks import number, one_of, seconds
from trio_resilience._records import Record

Backoff: TypeAlias = Callable[[Random], Iterator[float]]
Jitter: TypeAlias = Literal["full", "equal", "none"]

# What a delay is cut to where no cap was asked for: infinity can't be added to or drawn from.
_LONGEST = sys.float_info.max


def _base_delay(value: Any) -> float:
    return seconds("base_delay", value, finite=True)


def _max_delay(value: Any) -> float:
    return seconds("max_delay", value)


def _delay(value: Any) -> float:
    return seconds("delay", value, finite=True)


def _multiplier(value: float) -> float:
    return number("multiplier", value, minimum=1, finite=True)


def _jitter(value: Jitter | bool) -> Jitter:  # noqa: FBT001 - a bool is one of the spellings
    if isinstance(value, bool):
        return "full" if value else "none"
    return one_of("jitter", value, ("full", "equal", "none"))


def _not_below_base(instance: Any, _attribute: object, value: float) -> None:
    if value < instance.base_delay:
        base = instance.base_delay
        raise ValueError(f"`max_delay` must be >= `base_delay` ({base:g}), got {value!r}")


def _spread(delay: float, jitter: Jitter, rng: Random) -> float:
    if jitter == "none":
        return delay
    if jitter == "full":
        return rng.uniform(0.0, delay)
    return delay / 2 + rng.uniform(0.0, delay / 2)


@final
@attrs.frozen(eq=False, repr=False, getstate_setstate=False)
class Constant(Record):
    """Wait *delay* seconds every time."""

    delay: float = attrs.field(converter=_delay)
    jitter: Jitter = attrs.field(default="none", kw_only=True, converter=_jitter)

    def __call__(self, rng: Random) -> Iterator[float]:
        """Return the delays of one call."""
        while True:
            yield _spread(self.delay, self.jitter, rng)


@final
@attrs.frozen(eq=False, repr=False, getstate_setstate=False)
class Linear(Record):
    """Wait *base_delay* seconds longer every time, but never more than *max_delay*."""

    base_delay: float = attrs.field(default=1.0, converter=_base_delay)
    max_delay: float = attrs.field(
        default=30.0, kw_only=True, converter=_max_delay, validator=_not_below_base
    )
    jitter: Jitter = attrs.field(default="full", kw_only=True, converter=_jitter)

    def __call__(self, rng: Random) -> Iterator[float]:
        """Return the delays of one call."""
        cap = min(self.max_delay, _LONGEST)
        delay = 0.0
        while True:
            delay = min(delay + self.base_delay, cap)
            yield _spread(delay, self.jitter, rng)


@final
@attrs.frozen(eq=False, repr=False, getstate_setstate=False)
class Exponential(Record):
    """Wait *base_delay* seconds, then *multiplier* times as long every time, up to *max_delay*."""

    base_delay: float = attrs.field(default=1.0, converter=_base_delay)
    multiplier: float = attrs.field(default=2.0, kw_only=True, converter=_multiplier)
    max_delay: float = attrs.field(
        default=30.0, kw_only=True, converter=_max_delay, validator=_not_below_base
    )
    jitter: Jitter = attrs.field(default="full", kw_only=True, converter=_jitter)

    def __call__(self, rng: Random) -> Iterator[float]:
        """Return the delays of one call."""
        cap = min(self.max_delay, _LONGEST)
        delay = self.base_delay
        while True:
            yield _spread(delay, self.jitter, rng)
            delay = min(delay * self.multiplier, cap)


@final
@attrs.frozen(eq=False, repr=False, getstate_setstate=False)
class Fibonacci(Record):
    """Wait 1, 1, 2, 3, 5, 8 … times *base_delay* seconds, but never more than *max_delay*."""

    base_delay: float = attrs.field(default=1.0, converter=_base_delay)
    max_delay: float = attrs.field(
        default=30.0, kw_only=True, converter=_max_delay, validator=_not_below_base
    )
    jitter: Jitter = attrs.field(default="full", kw_only=True, converter=_jitter)

    def __call__(self, rng: Random) -> Iterator[float]:
        """Return the delays of one call."""
        cap = min(self.max_delay, _LONGEST)
        before, delay = 0.0, self.base_delay
        while True:
            yield _spread(delay, self.jitter, rng)
            before, delay = delay, min(before + delay, cap)


@final
@attrs.frozen(eq=False, repr=False, getstate_setstate=False)
class Decorrelated(Record):
    """Wait between *base_delay* and three times the wait before, but never more than *max_delay*.

    The decorrelated jitter of the AWS article, drawn below the cap rather than cut to it.
    """

    base_delay: float = attrs.field(default=1.0, converter=_base_delay)
    max_delay: float = attrs.field(
        default=30.0, kw_only=True, converter=_max_delay, validator=_not_below_base
    )

    def __call__(self, rng: Random) -> Iterator[float]:
        """Return the delays of one call."""
        cap = min(self.max_delay, _LONGEST)
        delay = self.base_delay
        while True:
            delay = rng.uniform(self.base_delay, min(delay * 3, cap))
            yield delay
