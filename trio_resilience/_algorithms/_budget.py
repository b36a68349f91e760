"""Keep repeated calls a small part of a healthy load, and next to none of a dead one.

A token bucket that starts full. A repeat takes a token; a *success* puts a part of one in. (Fed by
first tries, as is common, it would go on feeding repeats to a dependency that answers nothing, and
keep down what a pause would have cured: Bronson et al., "Metastable Failures in Distributed
Systems", HotOS 2021. That successes are what to count is argued in M. Brooker, "Fixing retries with
token buckets and circuit breakers", 2022.)

Tokens are counted in integers, of a billionth: ten times a tenth of a token is a token.
"""

from __future__ import annotations

from typing import Any, Never, final

import attrs

from trio_resilience._checks import integer, number
from trio_resilience._records import Record, record

_TOKEN = 1_000_000_000


@final
@record
class RetryBudgetStatistics(Record):
    """How a `RetryBudget` stands, and what it was asked for."""

    tokens: float
    """How much is left; a repeat needs a whole one."""
    max_tokens: int
    taken: int
    """Repeats that were granted, without those that were not made after all."""
    refused: int


@final
@attrs.define(eq=False, repr=False)
class _Bucket:
    level: int
    taken: int = 0
    refused: int = 0


def _ratio(value: float) -> float:
    return number("ratio", value, exclusive=True, finite=True)


def _max_tokens(value: int) -> int:
    return integer("max_tokens", value, minimum=1)


@final
@attrs.frozen(eq=False, repr=False)
class RetryBudget:
    """Let retries and hedges be at most *ratio* of the calls that succeed, but for a first few.

    Each success puts *ratio* of a token into a bucket that starts full; each retry or hedge takes
    one out, or is not made. So while all is well they add a small part to the load, and when
    nothing succeeds any more they end after *max_tokens* of them.

    One budget may be shared by any number of policies, and should be by those that call the same
    dependency. Policies within one another that share it feed it once each for the same success.

    Args:
        ratio: how much of a token a success is worth.
        max_tokens: how many tokens there are at first, and at the most.

    It does not look at the clock, so it may be used in several runs, one after the other.

    Example::

        budget = RetryBudget(0.1)
        retry = Retry(budget=budget)
        hedge = Hedge(after=0.2, budget=budget)
    """

    ratio: float = attrs.field(default=0.1, converter=_ratio)
    max_tokens: int = attrs.field(default=10, kw_only=True, converter=_max_tokens)
    _share: int = attrs.field(
        default=attrs.Factory(lambda self: max(1, round(self.ratio * _TOKEN)), takes_self=True),
        init=False,
    )
    _most: int = attrs.field(
        default=attrs.Factory(lambda self: self.max_tokens * _TOKEN, takes_self=True), init=False
    )
    _bucket: _Bucket = attrs.field(
        default=attrs.Factory(lambda self: _Bucket(self._most), takes_self=True), init=False
    )

    @property
    def is_full(self) -> bool:
        """Whether all tokens are there, as at first."""
        return self._bucket.level == self._most

    def try_take(self) -> bool:
        """Take a token for a repeat that is about to be made; tell whether there was one."""
        bucket = self._bucket
        if bucket.level < _TOKEN:
            bucket.refused += 1
            return False
        bucket.level -= _TOKEN
        bucket.taken += 1
        return True

    def give_back(self) -> None:
        """Put a token back that was taken, for a repeat that was not made after all."""
        bucket = self._bucket
        bucket.level = min(bucket.level + _TOKEN, self._most)
        bucket.taken -= 1

    def success(self) -> None:
        """Feed the bucket: a call has succeeded."""
        bucket = self._bucket
        if bucket.level < self._most:
            bucket.level = min(bucket.level + self._share, self._most)

    def anew(self) -> RetryBudget:
        """Return a full one with the same limits."""
        return RetryBudget(self.ratio, max_tokens=self.max_tokens)

    def statistics(self) -> RetryBudgetStatistics:
        """Return how many tokens are left, and how many were taken and refused."""
        bucket = self._bucket
        return RetryBudgetStatistics(
            bucket.level / _TOKEN, self.max_tokens, bucket.taken, bucket.refused
        )

    def __reduce__(self) -> Never:
        """Refuse to be copied or pickled: what a copy is fed, its original would not get."""
        raise TypeError("a RetryBudget can't be copied or pickled: it is shared; make a new one")

    def __repr__(self) -> str:
        left = self._bucket.level / _TOKEN
        return f"RetryBudget({self.ratio:g}, max_tokens={self.max_tokens}: {left:g} left)"


def optional_budget(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    """Refuse what is neither a budget nor ``None``."""
    if value is not None and not isinstance(value, RetryBudget):
        raise TypeError(f"`{attribute.name}` must be a RetryBudget or None, got {value!r}")
