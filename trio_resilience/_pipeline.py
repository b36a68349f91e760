"""Put policies around one another, in an order that makes sense, and use them as one."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from datetime import timedelta
from functools import partial
from inspect import CO_COROUTINE
from types import FunctionType
from typing import (
    Any,
    Final,
    Generic,
    Never,
    TypeAlias,
    TypeVar,
    TypeVarTuple,
    cast,
    final,
    overload,
)

import attrs

from trio_resilience._advice import Advice, advice_on
from trio_resilience._bulkhead import Bulkhead
from trio_resilience._checks import label, operation, seconds
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._engine._policy import Policy
from trio_resilience._engine._report import open_subscriptions
from trio_resilience._engine._watched import Watched, watched
from trio_resilience._fallback import Fallback
from trio_resilience._hedge import Hedge
from trio_resilience._rate_limiter import CombinedRateLimiter, RateLimiter
from trio_resilience._records import Record, record
from trio_resilience._retry import Retry
from trio_resilience._semaphore import Semaphore
from trio_resilience._timeout import Timeout

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
F = TypeVar("F", covariant=True)
F1 = TypeVar("F1")
F2 = TypeVar("F2")
F3 = TypeVar("F3")
F4 = TypeVar("F4")
F5 = TypeVar("F5")

Step: TypeAlias = Callable[[Callable[..., Any], tuple[Any, ...], str], Coroutine[Any, Any, Any]]
"""Runs the operation, with its arguments, under all layers from one on; the last is its name."""

_EXAMPLE = "write `Pipeline(Timeout(30), Retry())`"


@final
@record
class PipelineStatistics(Record):
    """How the layers of a `Pipeline` stand."""

    layers: tuple[object, ...]
    """What each layer's own ``statistics()`` returns, the outermost first."""


@final
@attrs.frozen(eq=False, repr=False)
class _Default:
    """Stands for a policy that each pipeline gets one of its own of."""

    make: Callable[[str, Policy[Never] | None], Policy[Never]]
    """Called with the pipeline's name and its total timeout."""
    shown: str

    def __repr__(self) -> str:
        return self.shown


def _part_of(name: str, total: Policy[Never] | None) -> Timeout:
    """Return a limit that an attempt reaches before the whole does: a third of that, if any."""
    whole = total.seconds if isinstance(total, Timeout) else math.inf
    return Timeout(whole / 3 if whole < math.inf else 10, name=f"{name}.attempt_timeout")


_RETRY: Final[Any] = _Default(lambda name, _: Retry(name=f"{name}.retry"), "Retry()")
_BREAKER: Final[Any] = _Default(
    lambda name, _: CircuitBreaker(f"{name}.circuit"), "CircuitBreaker()"
)
_BULKHEAD: Final[Any] = _Default(
    lambda name, _: Bulkhead(10, name=f"{name}.bulkhead"), "Bulkhead(10)"
)
_THIRD: Final[Any] = _Default(_part_of, "timeout / 3")


@final
@attrs.frozen(eq=False, repr=False, init=False)
class Pipeline(Policy[F], Generic[F]):
    """Run an operation under several policies at once, the first around the second, and so on.

    Each of them does what it does alone: it is given the operation's arguments and name, and sees
    the results and errors of what is further in. So the order decides what counts as an attempt,
    what a time limit is for, and which failures a circuit breaker sees. `standard` is an order that
    suits most; `advice` tells what is odd about another.

    Args:
        layers: the policies, the outermost first. They may be used elsewhere, too. In the place of
            a pipeline among them come its own layers.
        name: label of the pipeline. Events and errors have the names of its layers.

    Raises:
        TypeError: something that is no policy is given.
        ValueError: nothing is given.

    Example::

        payments = Pipeline(
            Timeout(30),
            Retry(max_attempts=5),
            CircuitBreaker("payments"),
            Timeout(3),
        )

        receipt = await payments.call(pay, order)


        @payments
        async def refund(order: Order) -> Receipt: ...
    """

    layers: tuple[Policy[F], ...]
    name: str
    _run: Step

    # A type checker that makes no union of what several arguments say is told to, for a few.
    @overload
    def __init__(self: Pipeline[Never], *layers: Policy[Never], name: str = "pipeline") -> None: ...

    @overload
    def __init__(
        self: Pipeline[F1 | F2], _1: Policy[F1], _2: Policy[F2], /, *, name: str = "pipeline"
    ) -> None: ...

    @overload
    def __init__(
        self: Pipeline[F1 | F2 | F3],
        _1: Policy[F1],
        _2: Policy[F2],
        _3: Policy[F3],
        /,
        *,
        name: str = "pipeline",
    ) -> None: ...

    @overload
    def __init__(
        self: Pipeline[F1 | F2 | F3 | F4],
        _1: Policy[F1],
        _2: Policy[F2],
        _3: Policy[F3],
        _4: Policy[F4],
        /,
        *,
        name: str = "pipeline",
    ) -> None: ...

    @overload
    def __init__(
        self: Pipeline[F1 | F2 | F3 | F4 | F5],
        _1: Policy[F1],
        _2: Policy[F2],
        _3: Policy[F3],
        _4: Policy[F4],
        _5: Policy[F5],
        /,
        *,
        name: str = "pipeline",
    ) -> None: ...

    @overload
    def __init__(self, *layers: Policy[F], name: str = "pipeline") -> None: ...

    def __init__(self, *layers: Policy[Any], name: str = "pipeline") -> None:
        _check(layers)
        flat = tuple(_flat(layers))
        if not flat:
            raise ValueError(f"a pipeline must have at least one layer: {_EXAMPLE}")
        *outer, innermost = flat
        run = _innermost(innermost.call)
        for depth, layer in reversed(list(enumerate(outer))):
            run = _wrapper(layer, depth)(layer.call, run)
        this: Any = self
        this.__attrs_init__(layers=flat, name=name, run=run)

    @staticmethod
    def standard(
        *,
        timeout: float | timedelta | Timeout | None = 30.0,
        retry: Policy[Never] | None = _RETRY,
        breaker: Policy[Never] | None = _BREAKER,
        bulkhead: Policy[Never] | None = _BULKHEAD,
        attempt_timeout: float | timedelta | Timeout | None = _THIRD,
        name: str = "pipeline",
    ) -> Pipeline[Never]:
        """Return a pipeline for calls of one dependency, each layer of which can be left out.

        From the outside in, and why in that order:

        1. *timeout* bounds all of a call: its attempts, the waits between them and the wait for a
           turn. Nothing that is further in can make the caller wait longer.
        2. *retry* is around all that belongs to one attempt, so that each of them is counted by the
           breaker, waits for its own turn, and has its own time limit; and a call that backs off
           keeps nobody else from having a turn.
        3. *breaker* sees every attempt, and not only what has become of all of them. So it opens
           soon, and ends a retry that is under way: a refusal is not tried again. What it refuses
           does not wait in line first.
        4. *bulkhead* is what an attempt waits for when too many are under way. What it refuses
           says nothing about the dependency, and the breaker does not count it.
        5. *attempt_timeout* bounds the operation alone: its time starts when its turn has come, so
           a wait in line is not taken for a slow dependency. When it expires, that is a failure,
           which the breaker counts and the retry tries again.

        Make one for each dependency, and share it.

        Args:
            timeout: seconds, a `datetime.timedelta`, or a `Timeout`.
            retry: by default, a new `Retry`: three attempts.
            breaker: by default, a new `CircuitBreaker`, which five failures in a row open, for a
                minute.
            bulkhead: by default, a new `Bulkhead` of ten calls at a time; the others wait.
            attempt_timeout: as *timeout*; by default a third of it, so that an attempt that hangs
                leaves time for another, or 10 seconds if there is no *timeout*.
            name: label of the pipeline; the layers that this makes are called after it.

        Each may be ``None``, to leave that layer out, and each policy another one, such as a
        `Keyed` with a bulkhead for each host.

        Example::

            github = Pipeline.standard(retry=Retry(max_attempts=5), name="github")
        """
        total = _limit("timeout", timeout, name)
        layers = (
            total,
            _chosen("retry", retry, name),
            _chosen("breaker", breaker, name),
            _chosen("bulkhead", bulkhead, name),
            _limit("attempt_timeout", attempt_timeout, name, total),
        )
        return Pipeline(*(layer for layer in layers if layer is not None), name=name)

    @property
    def is_idle(self) -> bool:
        """Whether all layers are."""
        return all(layer.is_idle for layer in self.layers)

    @property
    def is_disposable(self) -> bool:
        """Whether all layers are."""
        return all(layer.is_disposable for layer in self.layers)

    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T | F:
        """Return the result of ``fn(*args)``, run under all layers, or what one gives instead."""
        if open_subscriptions and type(name) is not Watched:
            return await watched(self, self.call, fn, args, name)
        # Here, before any layer lets it in. What is written `async def` needs no check.
        if type(fn) is FunctionType and fn.__code__.co_flags & CO_COROUTINE:
            called = fn.__qualname__ if name is None else str(name)
        else:
            operation("fn", fn)
            called = label(fn) if name is None else str(name)
        result: T | F = await self._run(fn, args, called)
        return result

    def advice(self) -> list[Advice]:
        """Return which layers are almost surely in the wrong order, and why; usually nothing.

        It knows the policies of this library. What a `Keyed` keeps, it does not look into.
        """
        return advice_on(self.layers)

    def statistics(self) -> PipelineStatistics:
        """Return the statistics of each layer."""
        return PipelineStatistics(tuple(layer.statistics() for layer in self.layers))

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Policy[F], ...]]:
        """Copy and pickle by the layers, if they can be."""
        return partial(Pipeline, name=self.name), self.layers

    def __repr__(self) -> str:
        layers = "".join(f"{layer!r}, " for layer in self.layers)
        return f"Pipeline({layers}name={self.name!r})"


# --- how it is built ------------------------------------------------------------------------------


def _check(layers: Iterable[object]) -> None:
    for index, layer in enumerate(layers):
        if not isinstance(layer, Policy):
            raise TypeError(
                f"`layers[{index}]` must be a policy such as Retry(), got {layer!r}: {_EXAMPLE}"
            )


def _flat(layers: Iterable[Policy[Any]]) -> Iterator[Policy[Any]]:
    for layer in layers:
        yield from layer.layers if isinstance(layer, Pipeline) else (layer,)


def _chosen(kind: str, given: object, name: str) -> Policy[Never] | None:
    if isinstance(given, _Default):
        return given.make(name, None)
    if given is None or isinstance(given, Policy):
        return cast("Policy[Never] | None", given)
    raise TypeError(f"`{kind}` must be a policy, or None to leave it out, got {given!r}")


def _limit(
    kind: str,
    given: float | timedelta | Policy[Never] | _Default | None,
    name: str,
    total: Policy[Never] | None = None,
) -> Policy[Never] | None:
    if isinstance(given, _Default):
        return given.make(name, total)
    if given is None or isinstance(given, Policy):
        return given
    return Timeout(seconds(kind, given), name=f"{name}.{kind}")


# Layers that take no look at what the operation is given. One function for each of them is made
# when the pipeline is, and none for a call; it hands on what it has to in arguments.
_BLIND = (
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


def _wrapper(layer: Policy[Any], depth: int) -> Callable[[Callable[..., Any], Step], Step]:
    if not isinstance(layer, _BLIND):
        return _around_with_arguments
    return _around if depth else _first_around


def _innermost(call: Callable[..., Any]) -> Step:
    async def run(fn: Callable[..., Any], args: tuple[Any, ...], name: str) -> Any:
        return await call(fn, *args, name=name)

    return run


def _around(call: Callable[..., Any], inner: Step) -> Step:
    async def run(fn: Callable[..., Any], args: tuple[Any, ...], name: str) -> Any:
        return await call(inner, fn, args, name, name=name)

    return run


def _first_around(call: Callable[..., Any], inner: Step) -> Step:
    """Do without a frame of its own: no layer that is further out has to be given a coroutine."""

    def run(fn: Callable[..., Any], args: tuple[Any, ...], name: str) -> Any:
        return call(inner, fn, args, name, name=name)

    return run


def _around_with_arguments(call: Callable[..., Any], inner: Step) -> Step:
    """Let a layer see the arguments, those that a partial binds included, and even change them."""

    async def run(fn: Callable[..., Any], args: tuple[Any, ...], name: str) -> Any:
        function = _function_of(fn)

        async def go_on(*given: Any, **options: Any) -> Any:
            return await inner(partial(function, **options) if options else function, given, name)

        return await call(_bound_as(fn, go_on), *args, name=name)

    return run


def _function_of(fn: Callable[..., Any]) -> Callable[..., Any]:
    return _function_of(fn.func) if isinstance(fn, partial) else fn


def _bound_as(fn: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """Bind to *instead* what *fn*, if it is a partial, and those within it bind to the function."""
    if isinstance(fn, partial):
        return partial(_bound_as(fn.func, instead), *fn.args, **fn.keywords)
    return instead
