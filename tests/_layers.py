"""Layers of a stack of policies, what is true of each, and probes that look in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Never, TypeVar, TypeVarTuple, final

import attrs
import trio

from tests.operations import leaves
from trio_resilience import (
    Bulkhead,
    Constant,
    Keyed,
    Policy,
    RateLimiter,
    Retry,
    Semaphore,
    Timeout,
)
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._fallback import Fallback
from trio_resilience._hedge import Hedge
from trio_resilience._pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

INSTEAD = object()
"""What the fallback gives."""

TOKENS = 100


@final
@attrs.define(eq=False)
class Probe(Policy[Never]):
    """Changes nothing, and counts what comes in and what goes out."""

    calls: int = 0
    returned: int = 0
    raised: int = 0
    cancelled: int = 0
    stopped: int = 0
    """Calls that ended with what is neither an `Exception` nor a cancellation."""
    seen: list[Any] = attrs.field(factory=list[Any], repr=False)
    """The arguments and the name of each call."""

    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        self.calls += 1
        self.seen.append((args, name))
        try:
            result = await fn(*args)
        except Exception:
            self.raised += 1
            raise
        except BaseException as error:
            if any(isinstance(leaf, trio.Cancelled) for leaf in leaves(error)):
                self.cancelled += 1
            else:
                self.stopped += 1
            raise
        self.returned += 1
        return result

    def statistics(self) -> tuple[int, int, int, int, int]:
        return self.calls, self.returned, self.raised, self.cancelled, self.stopped

    @property
    def ended(self) -> int:
        return self.returned + self.raised + self.cancelled + self.stopped


def same_key(*_args: object, **_kwargs: object) -> str:
    """Return a key, whatever the operation gets."""
    return "key"


MAKERS: dict[str, Callable[[float], Policy[Any]]] = {
    "timeout": Timeout,
    "retry": lambda _: Retry(max_attempts=2, backoff=Constant(1)),
    "breaker": lambda _: CircuitBreaker(failure_threshold=100),
    "limiter": lambda _: RateLimiter(1, per=1e9, burst=TOKENS),
    "semaphore": lambda _: Semaphore(10),
    "bulkhead": lambda _: Bulkhead(10, queue_size=5),
    "hedge": lambda _: Hedge(after=50),
    "fallback": lambda _: Fallback(value=INSTEAD),
    "keyed": lambda _: Keyed(lambda _: Semaphore(10), key=same_key),
}
"""How to make a layer of each kind; if it has a time limit, it is the number."""


def check_layer(layer: Policy[Any], above: Probe, below: Probe) -> None:
    """Raise unless *layer* has counted what *above* it and *below* it has happened."""
    now: Any = layer.statistics()
    assert above.calls == above.ended
    assert below.calls == below.ended
    assert above.stopped == below.stopped
    match layer:
        case Timeout():
            assert now.calls == above.calls == below.calls
            assert now.timed_out == above.raised - below.raised
            assert now.timed_out == below.cancelled - above.cancelled
        case Retry():
            assert (now.calls, now.attempts) == (above.calls, below.calls)
            assert (now.given_up, below.returned) == (above.raised, above.returned)
            assert now.recovered <= above.returned
        case Hedge():
            first_legs = below.calls - now.hedges
            assert now.calls == above.calls >= first_legs >= above.calls - above.cancelled
            assert (now.failed, now.refused) == (above.raised, 0)
            assert now.wins_by_hedge <= above.returned <= below.returned
        case Fallback():
            assert now.calls == above.calls == below.calls
            assert (now.used, now.failed) == (above.returned - below.returned, 0)
            # One that is cancelled before it has given something has been of no use.
            unused = below.raised - above.raised - now.used
            assert unused == above.cancelled - below.cancelled >= 0
        case CircuitBreaker():
            assert (now.calls, now.failures) == (below.returned + below.raised, below.raised)
            assert above.calls - below.calls == now.rejections == above.raised - below.raised
            assert now.in_flight == 0
        case _:
            _check_waits(layer, above, below)


def _check_waits(layer: Policy[Any], above: Probe, below: Probe) -> None:
    """Do so for one that lets calls wait: those that do not come further were cancelled there."""
    now: Any = layer.statistics()
    assert above.calls - below.calls == above.cancelled - below.cancelled >= 0
    assert (above.returned, above.raised) == (below.returned, below.raised)
    match layer:
        case RateLimiter():
            assert now.waiting == 0
            assert now.available == TOKENS - below.calls or layer.burst != TOKENS
        case Semaphore() | Bulkhead():
            assert (now.borrowed, now.waiting) == (0, 0)
        case _:
            assert isinstance(layer, Keyed)
            assert (now.keys, now.in_use) == (1, 0)


def make_layers(kinds: Sequence[str], limits: Sequence[float] = ()) -> list[Policy[Any]]:
    """Return layers of these kinds; *limits* has the time limit of each that has one."""
    each = zip(kinds, limits or [100.0] * len(kinds), strict=True)
    return [MAKERS[kind](limit) for kind, limit in each]


@attrs.define(eq=False)
class Stack:
    """A pipeline of some layers, with a probe around, between and within them."""

    layers: list[Policy[Any]]
    probes: list[Probe] = attrs.field(init=False)
    watched: Pipeline[Any] = attrs.field(init=False)
    plain: Pipeline[Any] = attrs.field(init=False)
    """The same layers, and nothing else."""

    def __attrs_post_init__(self) -> None:
        self.probes = [Probe() for _ in range(len(self.layers) + 1)]
        between = zip(self.layers, self.probes[1:], strict=True)
        self.watched = Pipeline(self.probes[0], *(each for pair in between for each in pair))
        self.plain = Pipeline(*self.layers)

    def check(self) -> None:
        """Raise unless every layer has counted what its probes have seen."""
        for layer, above, below in zip(self.layers, self.probes, self.probes[1:], strict=False):
            check_layer(layer, above, below)

    def statistics(self) -> list[Any]:
        """Return what the layers have counted."""
        return [layer.statistics() for layer in self.layers]

    async def by_hand(
        self, fn: Callable[..., Awaitable[Any]], *args: Any, name: str | None = None
    ) -> Any:
        """Do what a pipeline is there for."""
        calls: list[Any] = [layer.call for layer in self.layers]
        return await calls[0](*calls[1:], fn, *args, name=name)
