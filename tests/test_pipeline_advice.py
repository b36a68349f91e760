"""Advice on pipelines: each order that is almost surely wrong is named, and no other."""

from __future__ import annotations

import math
from itertools import permutations
from typing import TYPE_CHECKING, Any

import attrs
import pytest

from tests._layers import Probe
from trio_resilience import (
    Bulkhead,
    BulkheadFullError,
    CircuitOpenError,
    Keyed,
    RateLimiter,
    RejectedError,
    Retry,
    Semaphore,
    Timeout,
    transient,
)
from trio_resilience._advice import Advice
from trio_resilience._algorithms._budget import RetryBudget
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._fallback import Fallback
from trio_resilience._hedge import Hedge
from trio_resilience._pipeline import Pipeline

if TYPE_CHECKING:
    from trio_resilience import Policy


def advice(*layers: Policy[Any]) -> list[Advice]:
    return Pipeline(*layers).advice()


def reasons(*layers: Policy[Any]) -> list[str]:
    """What is said about these layers; the layers that it is about are among them, in order."""
    found = advice(*layers)
    for each in found:
        places = [layers.index(layer) for layer in each.layers]
        assert places == sorted(places)
        assert str(each) == each.reason
    return [each.reason for each in found]


def reason(*layers: Policy[Any]) -> str:
    """The one thing that is said about these layers."""
    (only,) = reasons(*layers)
    return only


# --- what is right --------------------------------------------------------------------------------


def test_there_is_none_on_the_standard_pipeline() -> None:
    assert Pipeline.standard().advice() == []


@pytest.mark.parametrize(
    "layers",
    [
        [Retry()],
        [Timeout(1)],
        [Retry(), Timeout(1)],
        [Timeout(3), Timeout(1)],
        [Timeout(30), Retry(attempt_timeout=1)],
        [Timeout(30), Retry(), CircuitBreaker(), Timeout(1)],
        [Timeout(30), Fallback(value=1), Retry(), Timeout(1)],
        [Fallback(value=1), CircuitBreaker(), Retry()],
        [Fallback(value=1), Hedge(after=1)],
        [Retry(), Bulkhead(1)],
        [Retry(), Semaphore(1)],
        [Retry(), RateLimiter(1)],
        [Hedge(after=1), RateLimiter(1)],
        [Bulkhead(1), Hedge(after=1)],
        [CircuitBreaker(), Bulkhead(1), Timeout(1)],
        [CircuitBreaker(), Bulkhead(1), Timeout(math.inf)],
        [Timeout(3), CircuitBreaker(), Retry(attempt_timeout=1)],
        [Timeout(1), Bulkhead(1)],
        [Semaphore(1), Bulkhead(1), Semaphore(1)],
        [CircuitBreaker(), Retry()],
        [Retry(), CircuitBreaker()],
        [Keyed(lambda _: Retry(), key=str), Retry()],
        [Probe(), Retry(), Probe()],
    ],
    ids=lambda layers: "-".join(type(layer).__name__ for layer in layers),
)
def test_there_is_none_on_orders_that_make_sense(layers: list[Policy[Any]]) -> None:
    assert reasons(*layers) == []


# --- what multiplies ------------------------------------------------------------------------------


def test_a_retry_in_a_retry() -> None:
    """It says how many calls that makes, and which layers."""
    outer, inner = Retry(max_attempts=3, name="outer"), Retry(max_attempts=4, name="inner")
    (found,) = advice(Timeout(9), outer, CircuitBreaker(), inner, Timeout(1))
    assert found.layers == (outer, inner)
    assert found.reason == (
        "Retry 'outer' and Retry 'inner' multiply: an operation that keeps failing is called"
        " 3 x 4 = 12 times, when it can bear that least; repeat in one place, or give each a"
        " `RetryBudget`"
    )


def test_a_retry_in_a_hedge_in_a_retry() -> None:
    layers = [Retry(max_attempts=3), Hedge(after=1, max_hedges=2), Retry(max_attempts=2)]
    assert "3 x 3 x 2 = 18 times" in reason(*layers)
    assert advice(*layers)[0].layers == tuple(layers)


def test_a_hedge_in_a_hedge() -> None:
    assert "2 x 2 = 4 times" in reason(Hedge(after=1), Hedge(after=1))


def test_retries_without_limit() -> None:
    assert "is called any number of times" in reason(Retry(max_attempts=None), Retry())


def test_what_is_called_once_multiplies_nothing() -> None:
    assert reasons(Retry(max_attempts=1), Retry(max_attempts=1), Retry()) == []


def test_what_a_budget_bounds_multiplies_nothing() -> None:
    """One that is not bounded is fine beside any number of those that are."""
    budget = RetryBudget()
    assert reasons(Retry(budget=budget), Hedge(after=1, budget=budget), Retry()) == []
    assert len(reasons(Retry(), Hedge(after=1, budget=budget), Retry())) == 1


@pytest.mark.parametrize("on", [RejectedError, (CircuitOpenError, (BulkheadFullError,))], ids=repr)
def test_what_is_refused_multiplies_nothing(on: Any) -> None:
    """Nothing was run: a retry for refusals alone waits until the operation may be called."""
    outer = Retry(max_attempts=None, on=on)
    assert reasons(outer, Retry(), CircuitBreaker()) == []
    assert reasons(outer, Hedge(after=1), CircuitBreaker()) == []
    assert reasons(RateLimiter(1), outer, CircuitBreaker()) == []
    assert reasons(Timeout(9), outer) == []


def test_what_is_not_only_for_refusals_does() -> None:
    """For errors as well, for results, or for what no type tells."""
    kinds: list[dict[str, Any]] = [
        {"on": (OSError, RejectedError)},
        {"on": RejectedError, "retry_result": bool},
        {"on": (RejectedError, transient)},
    ]
    for options in kinds:
        retry = Retry(max_attempts=2, **options)
        assert "2 x 3 = 6 times" in reason(retry, Retry())
    assert "2 x 3 = 6 times" in reason(Hedge(after=1, on=RejectedError), Retry())


# --- time limits ----------------------------------------------------------------------------------


def test_a_timeout_outside_but_not_inside_a_retry() -> None:
    timeout, retry = Timeout(30, name="total"), Retry()
    (found,) = advice(timeout, Probe(), retry, Bulkhead(1))
    assert found.layers == (timeout, retry)
    assert found.reason == (
        "an attempt of Retry 'retry' that hangs uses up all the time that Timeout 'total' allows,"
        " and is never tried again; put a `Timeout` inside the retry, too, or set its"
        " `attempt_timeout`"
    )


def test_the_same_with_the_limits_of_retries() -> None:
    """Their total is a limit around their attempts; an inner retry's is one of an attempt."""
    retry = Retry(total_timeout=30)
    (found,) = advice(retry, Bulkhead(1))
    assert found.layers == (retry,)
    assert "all the time that Retry 'retry' allows" in found.reason
    timeout = Timeout(60)
    (found,) = advice(timeout, retry)
    assert found.layers == (timeout, retry)
    assert reasons(retry, Timeout(1)) == []
    assert reasons(Retry(total_timeout=30, attempt_timeout=1)) == []
    budget = RetryBudget()
    inner = Retry(budget=budget, total_timeout=9, attempt_timeout=1)
    assert reasons(Retry(budget=budget, total_timeout=30), inner) == []


def test_a_limit_that_is_none() -> None:
    """It neither bounds all attempts nor one."""
    assert reasons(Timeout(math.inf), Retry()) == []
    assert len(reasons(Timeout(1), Retry(), Timeout(math.inf))) == 1
    assert reasons(Timeout(1), Retry(max_attempts=1)) == []


def test_a_timeout_outside_but_not_inside_a_breaker() -> None:
    """Whatever it belongs to: a cancellation from outside says nothing."""
    timeout, breaker = Timeout(30, name="total"), CircuitBreaker()
    (found,) = advice(timeout, breaker, Bulkhead(1))
    assert found.layers == (timeout, breaker)
    assert found.reason == (
        "a call that hangs is cancelled by Timeout 'total', outside CircuitBreaker 'circuit', and"
        " so is no failure for it, nor opens it; put a `Timeout` inside the breaker, too"
    )
    retry = Retry(attempt_timeout=1)
    (found,) = advice(timeout, retry, breaker)
    assert found.layers == (timeout, retry, breaker)
    assert reasons(timeout, retry, breaker, Timeout(0.5)) == []


@pytest.mark.parametrize("inside", [Keyed(lambda _: Timeout(1), key=str), Probe()], ids=repr)
def test_what_nobody_knows_may_well_be_a_limit(inside: Policy[Any]) -> None:
    """There is no telling what a `Keyed` keeps, nor what a user's own policy does."""
    assert reasons(Timeout(30), Retry(), CircuitBreaker(), inside) == []
    assert len(reasons(Timeout(30), inside, Retry(), CircuitBreaker())) == 2


@pytest.mark.parametrize("seconds", [5, 6])
def test_an_inner_limit_that_is_not_the_shorter_one(seconds: float) -> None:
    """At the same instant, it is the outer one that counts."""
    outer, inner = Timeout(5, name="total"), Timeout(seconds, name="attempt")
    (found,) = advice(outer, Retry(), CircuitBreaker(), inner)
    assert found.layers == (outer, inner)
    assert found.reason == (
        f"the {seconds} s of Timeout 'attempt' are never over before the 5 s of Timeout 'total', so"
        " that no retry and no breaker hears of them; make the inner limit the shorter one"
    )


def test_the_same_within_a_retry() -> None:
    retry, timeout = Retry(attempt_timeout=5, total_timeout=5), Timeout(5)
    assert [found.layers for found in advice(retry)] == [(retry,)]
    assert [found.layers for found in advice(timeout, retry)] == [(timeout, retry)] * 2
    assert [found.layers for found in advice(Retry(attempt_timeout=9), retry)] != []


def test_a_standard_pipeline_whose_total_is_too_short() -> None:
    assert "the 10 s of Timeout 'pipeline.attempt_timeout'" in reason(
        *Pipeline.standard(timeout=10, attempt_timeout=10).layers
    )


# --- fallbacks ------------------------------------------------------------------------------------


def test_a_breaker_around_a_fallback() -> None:
    breaker, fallback = CircuitBreaker(), Fallback(value=1)
    (found,) = advice(breaker, Timeout(1), fallback)
    assert found.layers == (breaker, fallback)
    assert found.reason == (
        "CircuitBreaker 'circuit' is around Fallback 'fallback': it takes what is given in the"
        " place of a failure for a success, and does not open because of it; put the fallback"
        " outside"
    )


def test_others_around_a_fallback() -> None:
    assert "does not try it again" in reason(Retry(), Fallback(value=1))
    assert "cancels a leg that may yet succeed" in reason(Hedge(after=1), Fallback(value=1))


def test_who_judges_results_may_be_around_a_fallback() -> None:
    """They may well know a result that is none."""
    fallback = Fallback(value=None)
    assert reasons(CircuitBreaker(failure_result=lambda r: r is None), fallback) == []
    assert reasons(Retry(retry_result=lambda r: r is None), fallback) == []
    assert reasons(Fallback(value=1), fallback) == []


@pytest.mark.parametrize(
    "on", [CircuitOpenError, RejectedError, (BulkheadFullError, (CircuitOpenError,)), ()]
)
def test_a_fallback_for_refusals_may_be_anywhere(on: Any) -> None:
    """They count as failures for nobody."""
    assert reasons(Retry(), CircuitBreaker(), Fallback(value=1, on=on), Bulkhead(1)) == []


@pytest.mark.parametrize("on", [Exception, OSError, transient, (RejectedError, (OSError,))])
def test_a_fallback_for_more_may_not(on: Any) -> None:
    assert len(reasons(Retry(), CircuitBreaker(), Fallback(value=1, on=on))) == 2


# --- permits and rates ----------------------------------------------------------------------------


@pytest.mark.parametrize("outer", [Bulkhead(3), Semaphore(3)], ids=repr)
def test_a_retry_within_permits(outer: Policy[Any]) -> None:
    retry = Retry()
    (found,) = advice(outer, CircuitBreaker(), retry)
    assert found.layers == (outer, retry)
    assert "a call keeps its permit while it backs off" in found.reason
    assert reasons(outer, Retry(max_attempts=1)) == []


@pytest.mark.parametrize(
    "outer",
    [RateLimiter(1), RateLimiter.all_of(RateLimiter(1), RateLimiter(10, per=60))],
    ids=repr,
)
def test_repeats_within_a_rate(outer: Policy[Any]) -> None:
    """It counts the call, and not its attempts."""
    retry, hedge = Retry(budget=RetryBudget()), Hedge(after=1)
    (found,) = advice(outer, retry, hedge)
    assert found.layers == (outer, retry, hedge)
    assert "it counts a call once, however often that is repeated" in found.reason


@pytest.mark.parametrize("inner", [Bulkhead(3), Semaphore(3), RateLimiter(1)], ids=repr)
def test_a_wait_that_a_breaker_takes_for_a_slow_dependency(inner: Policy[Any]) -> None:
    breaker, timeout = CircuitBreaker(), Timeout(1)
    (found,) = advice(Timeout(30), breaker, timeout, inner)
    assert found.layers == (breaker, timeout, inner)
    assert "takes a wait that is too long for a failure of what is called" in found.reason


@pytest.mark.parametrize("twice", [Bulkhead(3), Semaphore(3)], ids=repr)
def test_permits_of_which_a_call_needs_two(twice: Policy[Any]) -> None:
    (found,) = advice(twice, Timeout(1), twice)
    assert found.layers == (twice, twice)
    assert "wait for ever" in found.reason


# --- all together ---------------------------------------------------------------------------------


def test_every_mistake_is_named_once() -> None:
    layers = [RateLimiter(9), Bulkhead(1), CircuitBreaker(), Retry(), Fallback(value=1), Timeout(9)]
    named = [tuple(type(layer) for layer in found.layers) for found in advice(*layers)]
    assert named == [
        (CircuitBreaker, Fallback),
        (Retry, Fallback),
        (Bulkhead, Retry),
        (RateLimiter, Retry),
    ]


def test_nested_pipelines_are_seen_through() -> None:
    assert len(Pipeline(Retry(), Pipeline(Timeout(1), Pipeline(Retry()))).advice()) == 2


def test_most_orders_of_the_standard_layers_have_something_odd() -> None:
    """Those that have nothing keep to what its docstring says."""
    layers = Pipeline.standard().layers
    total, retry, breaker, bulkhead, attempt = layers
    fine = [order for order in permutations(layers) if not advice(*order)]
    assert layers in fine
    assert len(fine) == 9
    for order in fine:
        place = {layer: order.index(layer) for layer in order}
        assert place[total] < place[attempt]
        assert place[retry] < place[bulkhead]
        assert place[breaker] < place[attempt]
        assert place[retry] < place[attempt]


def test_advice_is_a_frozen_record() -> None:
    first, second = Retry(), Retry()
    (found,) = advice(first, second)
    assert found == Advice((first, second), found.reason)
    assert hash(found) == hash(advice(first, second)[0])
    assert "layers=(Retry(" in repr(found)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        found.reason = ""  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
