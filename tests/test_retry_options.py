"""Retry's options: what is refused at the door, the defaults, and what can be pickled."""

from __future__ import annotations

import datetime as dt
import math
import pickle
from random import Random

import attrs
import pytest
import trio

from trio_resilience import Constant, Exponential, Retry, RetryResult, transient

BAD: list[tuple[str, object]] = [
    *[("max_attempts", bad) for bad in (0, -1, math.nan, math.inf, 1.5, True, False, "5", [1])],
    *[
        (name, bad)
        for name in ("attempt_timeout", "total_timeout", "max_retry_after")
        for bad in (-1, -0.001, math.nan, -math.inf, True, "5", None, [1], dt.timedelta(-1))
    ],
    *[("backoff", bad) for bad in (1.0, None, "full", [1, 2], trio.sleep)],
    *[("retry_result", bad) for bad in (1, "no", trio.sleep)],
    *[("on_retry", bad) for bad in (1, "print", trio.sleep)],
    *[("rng", bad) for bad in (1, "seed", Random)],
    *[("on", bad) for bad in (BaseException, 5, None)],
]


@pytest.mark.parametrize("option, value", BAD, ids=repr)
def test_bad_options_are_refused(option: str, value: object) -> None:
    """When the policy is made, by name, and with what was given."""
    with pytest.raises((TypeError, ValueError), match=rf"^`{option}` must be .*, got "):
        Retry(**{option: value})  # type: ignore[arg-type]


def test_the_wording_is_the_houses() -> None:
    """Name, rule, value."""
    with pytest.raises(ValueError, match=r"^`max_attempts` must be >= 1, got 0$"):
        Retry(max_attempts=0)
    with pytest.raises(TypeError, match="positional"):
        Retry(3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def test_the_defaults_are_the_documented_ones() -> None:
    """And times may be given as timedelta."""
    policy = Retry(attempt_timeout=dt.timedelta(seconds=1.5), total_timeout=3)
    assert (policy.max_attempts, policy.on, policy.backoff) == (3, transient, Exponential())
    assert (policy.attempt_timeout, policy.total_timeout) == (1.5, 3.0)
    assert (policy.max_retry_after, policy.name) == (60.0, "retry")
    assert (Retry().attempt_timeout, Retry().total_timeout) == (math.inf, math.inf)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        policy.max_attempts = 5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def test_a_policy_can_be_pickled() -> None:
    """To be sent to a worker process, for example, with its configuration."""
    policy = Retry(max_attempts=7, on=(transient, KeyError), backoff=Constant(2), name="db")
    again = pickle.loads(pickle.dumps(policy))  # noqa: S301 - it is our own
    for name in ("max_attempts", "on", "backoff", "total_timeout", "name"):
        assert getattr(again, name) == getattr(policy, name)


def test_a_result_record_is_frozen() -> None:
    """So are the statistics."""
    for record in (RetryResult(1, 2, 3.0), Retry().statistics()):
        with pytest.raises(attrs.exceptions.FrozenInstanceError):
            record.attempts = 5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
        assert pickle.loads(pickle.dumps(record)) == record  # noqa: S301 - it is our own
