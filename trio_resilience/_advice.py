"""What is odd about the order of policies around one another; each finding with its reason."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias, TypeGuard, cast, final

from trio_resilience._bulkhead import Bulkhead
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._engine._policy import Policy
from trio_resilience._errors import RejectedError
from trio_resilience._fallback import Fallback
from trio_resilience._hedge import Hedge
from trio_resilience._rate_limiter import CombinedRateLimiter, RateLimiter
from trio_resilience._records import Record, record
from trio_resilience._retry import Retry
from trio_resilience._semaphore import Semaphore
from trio_resilience._timeout import Timeout

AnyPolicy: TypeAlias = Policy[object]
Layers: TypeAlias = tuple[AnyPolicy, ...]


@final
@record
class Advice(Record):
    """An order of layers that is almost surely wrong, and why; see `Pipeline.advice`."""

    layers: Layers
    """Those that it is about, the outermost first."""
    reason: str

    def __str__(self) -> str:
        return self.reason


def advice_on(layers: Layers) -> list[Advice]:
    """Return what is odd about the order of *layers*, the outermost first."""
    return [found for rule in _RULES for found in rule(layers)]


# --- the rules ------------------------------------------------------------------------------------


def _repeated(layers: Layers) -> Iterator[Advice]:
    """Find repeats of repeats that no budget bounds."""
    found = [layer for layer in layers if _adds_calls(layer) and layer.budget is None]
    if len(found) > 1:
        yield Advice(
            tuple(found),
            f"{_all(found)} multiply: an operation that keeps failing is called"
            f" {_product(map(_most_calls, found))} times, when it can bear that least; repeat in"
            " one place, or give each a `RetryBudget`",
        )


def _hanging(layers: Layers) -> Iterator[Advice]:
    """Find retries of which one attempt may use up all the time."""
    for retry, around in _without_limit_inside(layers):
        if _retries_calls(retry) and not _limits_attempts(retry):
            yield Advice(
                (*(layer for layer in around if layer is not retry), retry),
                f"an attempt of {_called(retry)} that hangs uses up all the time that"
                f" {_all(around)} allows, and is never tried again; put a `Timeout` inside the"
                " retry, too, or set its `attempt_timeout`",
            )


def _unheard(layers: Layers) -> Iterator[Advice]:
    """Find breakers that no call tells that it hangs."""
    for breaker, around in _without_limit_inside(layers):
        if isinstance(breaker, CircuitBreaker):
            yield Advice(
                (*around, breaker),
                f"a call that hangs is cancelled by {_all(around)}, outside {_called(breaker)}, and"
                " so is no failure for it, nor opens it; put a `Timeout` inside the breaker, too",
            )


def _vain(layers: Layers) -> Iterator[Advice]:
    """Find time limits that never expire, because one further out always does first."""
    limits = _limits(layers)
    for index, (length, inner) in enumerate(limits):
        for total, outer in limits[:index]:
            if total <= length:
                yield Advice(
                    (outer, inner) if outer is not inner else (inner,),
                    f"the {length:g} s of {_called(inner)} are never over before the {total:g} s of"
                    f" {_called(outer)}, so that no retry and no breaker hears of them; make the"
                    " inner limit the shorter one",
                )
                break


def _blinded(layers: Layers) -> Iterator[Advice]:
    """Find those that wait for failures which a fallback further in turns into results."""
    for outer, fallbacks in _around_any(layers, _hides_failures):
        if isinstance(outer, CircuitBreaker) and outer.failure_result is None:
            what = "does not open because of it"
        elif isinstance(outer, Retry) and outer.retry_result is None:
            what = "does not try it again"
        elif isinstance(outer, Hedge):
            what = "cancels a leg that may yet succeed"
        else:
            continue
        yield Advice(
            (outer, *fallbacks),
            f"{_called(outer)} is around {_all(fallbacks)}: it takes what is given in the place of"
            f" a failure for a success, and {what}; put the fallback outside",
        )


def _hoarding(layers: Layers) -> Iterator[Advice]:
    """Find permits that are kept while nothing runs."""
    for outer, retries in _around_any(layers, _backs_off):
        if isinstance(outer, (Bulkhead, Semaphore)):
            yield Advice(
                (outer, *retries),
                f"{_called(outer)} is around {_all(retries)}: a call keeps its permit while it"
                " backs off, and keeps others out; put the retry outside",
            )


def _uncounted(layers: Layers) -> Iterator[Advice]:
    """Find rate limits that count calls, and not what is made of them."""
    for outer, repeats in _around_any(layers, _adds_calls):
        if isinstance(outer, (RateLimiter, CombinedRateLimiter)):
            yield Advice(
                (outer, *repeats),
                f"{_called(outer)} is around {_all(repeats)}: it counts a call once, however often"
                " that is repeated, and what is called gets more than the rate; put the rate"
                " limiter inside",
            )


def _misjudged(layers: Layers) -> Iterator[Advice]:
    """Find breakers that hold against what they guard that this side makes calls wait."""
    for index, breaker in enumerate(layers):
        for timeout, waits in _around_any(layers[index + 1 :], _makes_wait):
            if isinstance(breaker, CircuitBreaker) and isinstance(timeout, Timeout):
                yield Advice(
                    (breaker, timeout, *waits),
                    f"{_called(timeout)} is around {_all(waits)}: its time includes the wait there,"
                    f" and {_called(breaker)} takes a wait that is too long for a failure of what"
                    " is called; put the time limit inside",
                )


def _doubled(layers: Layers) -> Iterator[Advice]:
    """Find permits of which a call needs two."""
    for index, layer in enumerate(layers):
        if isinstance(layer, (Bulkhead, Semaphore)) and layer in layers[:index]:
            yield Advice(
                (layer, layer),
                f"{_called(layer)} is there twice: calls that each hold one of its permits, and"
                " wait for another, wait for ever; leave one out",
            )


# Of another policy, such as a `Keyed`, nobody knows what it does: it may well limit the time.
_KNOWN = (
    Bulkhead,
    CircuitBreaker,
    CombinedRateLimiter,
    Fallback,
    Hedge,
    RateLimiter,
    Retry,
    Semaphore,
    Timeout,
)

_RULES = (
    _repeated,
    _hanging,
    _unheard,
    _vain,
    _blinded,
    _hoarding,
    _uncounted,
    _misjudged,
    _doubled,
)


# --- what they look at ----------------------------------------------------------------------------


def _around_any(
    layers: Layers, is_one: Callable[[AnyPolicy], bool]
) -> Iterator[tuple[AnyPolicy, list[AnyPolicy]]]:
    """Yield each layer that is around some of a kind, with these."""
    for index, layer in enumerate(layers):
        inner = list(filter(is_one, layers[index + 1 :]))
        if inner:
            yield layer, inner


def _without_limit_inside(layers: Layers) -> Iterator[tuple[AnyPolicy, list[AnyPolicy]]]:
    """Yield each layer with those that limit its time from outside, if none does from inside."""
    for index, layer in enumerate(layers):
        around = [each for each in layers[: index + 1] if _limits([each])]
        inside = layers[index + 1 :]
        if around and not _limits(inside) and all(isinstance(each, _KNOWN) for each in inside):
            yield layer, around


def _adds_calls(layer: AnyPolicy) -> TypeGuard[Retry | Hedge]:
    return isinstance(layer, Hedge) or _retries_calls(layer)


def _retries_calls(layer: AnyPolicy) -> TypeGuard[Retry]:
    """Tell whether it is a retry for more than refusals, of which nothing was run."""
    if not isinstance(layer, Retry) or _most_calls(layer) == 1:
        return False
    return layer.retry_result is not None or not _means_refusals(layer.on)


def _backs_off(layer: AnyPolicy) -> bool:
    return isinstance(layer, Retry) and _most_calls(layer) > 1


def _makes_wait(layer: AnyPolicy) -> bool:
    return isinstance(layer, (Bulkhead, CombinedRateLimiter, RateLimiter, Semaphore))


def _hides_failures(layer: AnyPolicy) -> bool:
    """Tell whether it is a fallback for more than refusals, which count as no failures anyway."""
    return isinstance(layer, Fallback) and not _means_refusals(layer.on)


def _means_refusals(match: object) -> bool:
    if isinstance(match, tuple):
        return all(map(_means_refusals, cast("tuple[object, ...]", match)))
    return isinstance(match, type) and issubclass(match, RejectedError)


def _most_calls(layer: Retry | Hedge) -> float:
    if isinstance(layer, Hedge):
        return 1 + layer.max_hedges
    return math.inf if layer.max_attempts is None else layer.max_attempts


def _limits(layers: Iterable[AnyPolicy]) -> list[tuple[float, AnyPolicy]]:
    """Return all time limits, the outermost first, each with its layer."""
    found: list[tuple[float, AnyPolicy]] = []
    for layer in layers:
        if isinstance(layer, Timeout):
            found.append((layer.seconds, layer))
        elif isinstance(layer, Retry):
            found += [(layer.total_timeout, layer), (layer.attempt_timeout, layer)]
    return [limit for limit in found if limit[0] < math.inf]


def _limits_attempts(layer: AnyPolicy) -> bool:
    return isinstance(layer, Retry) and layer.attempt_timeout < math.inf


def _product(numbers: Iterable[float]) -> str:
    factors = list(numbers)
    if math.inf in factors:
        return "any number of"
    return f"{' x '.join(f'{factor:.0f}' for factor in factors)} = {math.prod(factors):.0f}"


def _all(layers: Iterable[AnyPolicy]) -> str:
    return " and ".join(map(_called, layers))


def _called(layer: AnyPolicy) -> str:
    return f"{type(layer).__name__} {getattr(layer, 'name', '')!r}"
