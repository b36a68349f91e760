"""Pipeline: the order of its layers, what each of them is given, and what it costs."""

from __future__ import annotations

import inspect
from functools import partial, partialmethod
from typing import TYPE_CHECKING, Any, Never, TypeVar, TypeVarTuple, cast, final

import attrs
import pytest
import trio

from tests._layers import Probe
from tests.operations import Gauge, Stopwatch, fails, returns
from trio_resilience import (
    Bulkhead,
    Constant,
    Event,
    Keyed,
    OperationTimeoutError,
    Policy,
    Retry,
    Semaphore,
    Timeout,
    map_with_limit,
    run_in,
    run_with_limit,
    subscribe,
)
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import TimedOut
from trio_resilience._fallback import Fallback
from trio_resilience._pipeline import Pipeline

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# --- at the door ----------------------------------------------------------------------------------


def test_a_pipeline_without_layers_is_refused() -> None:
    """It shows how to write one."""
    with pytest.raises(ValueError, match=r"at least one layer: write `Pipeline\(Timeout\(30\), "):
        Pipeline()


@pytest.mark.parametrize("layer", [None, 5, Retry, "retry", returns, [Retry()]], ids=str)
def test_what_is_no_policy_is_refused(layer: Any) -> None:
    """It tells which one, and how to write it."""
    with pytest.raises(TypeError, match=r"^`layers\[1\]` must be a policy such as Retry\(\), got "):
        Pipeline(Timeout(1), layer, Retry())


async def test_what_is_no_operation_is_refused_before_any_layer() -> None:
    """No permit is waited for, and nothing is counted; a coroutine object is closed."""
    probe, full = Probe(), Bulkhead(1, queue_size=0)
    pipeline, coro = Pipeline(probe, full), cast("Any", returns(1))
    async with full:
        with pytest.raises(TypeError, match=r"functools\.partial\(returns, "):
            await pipeline.call(coro)
        with pytest.raises(TypeError, match="must be an async function, got the sync "):
            await pipeline.call(cast("Any", inspect.signature))
    assert coro.cr_frame is None
    assert probe.calls == 0


async def test_what_turns_out_to_be_no_operation_is_counted_nowhere() -> None:
    """Only its call can tell; it is called once, and the mistake is told as one."""
    pipeline, calls = Pipeline.standard(), list[int]()
    before = pipeline.statistics()
    pretended: Any = lambda: calls.append(1)  # noqa: E731
    with pytest.raises(TypeError, match=r"which can't be awaited"):
        await pipeline.call(pretended)
    assert calls == [1]
    assert pipeline.statistics() == before


# --- what each layer is given ---------------------------------------------------------------------


@final
@attrs.define(eq=False)
class Mark(Policy[Never]):
    """Leaves a mark when a call comes, and when it goes."""

    mark: str
    marks: list[str]

    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        self.marks.append(f"{self.mark} {name}")
        try:
            return await fn(*args)
        finally:
            self.marks.append(f"end of {self.mark}")

    def statistics(self) -> None:
        return None


def test_it_is_immutable() -> None:
    """Whoever shares it can rely on its layers."""
    pipeline: Any = Pipeline(Retry())
    with pytest.raises(AttributeError):
        pipeline.layers = (Timeout(1),)


async def test_the_first_layer_is_the_outermost() -> None:
    marks = list[str]()
    layers = [Mark(mark, marks) for mark in "abc"]
    assert await Pipeline(*layers).call(returns, 5) == 5
    assert marks == [
        *["a returns", "b returns", "c returns"],
        *["end of c", "end of b", "end of a"],
    ]


async def test_pipelines_in_a_pipeline_are_flattened() -> None:
    """Each gives its layers, in their place; a policy may be in several pipelines."""
    a, b, c, d = (Mark(mark, []) for mark in "abcd")
    inner = Pipeline(b, Pipeline(c), name="inner")
    assert Pipeline(a, inner, d).layers == (a, b, c, d)
    assert Pipeline(inner).layers == inner.layers == (b, c)
    assert (Pipeline(inner).name, inner.name) == ("pipeline", "inner")


async def test_every_layer_gets_the_arguments_and_the_name() -> None:
    """As they are; the name is the operation's own unless the call says another."""
    layers = [Probe() for _ in range(3)]
    pipeline = Pipeline(layers[0], Retry(), layers[1], Timeout(1), layers[2])

    async def fetch(url: str, size: int) -> str:
        return await returns(url * size)

    assert await pipeline.call(fetch, "a", 3) == "aaa"
    assert await pipeline.call(fetch, "a", 3, name="mine") == "aaa"
    expected = [(("a", 3), fetch.__qualname__), (("a", 3), "mine")]
    assert [layer.seen for layer in layers] == [expected] * 3


async def test_the_innermost_layer_gets_the_function_itself() -> None:
    seen = list[Any]()

    @final
    class Look(Policy[Never]):
        async def call(
            self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
        ) -> T:
            seen.append((fn, name))
            return await fn(*args)

        def statistics(self) -> None:
            return None

    bound = partial(returns, 1)
    await Pipeline(Timeout(1), Retry(), Look()).call(bound)
    await Pipeline(Look()).call(bound)
    assert seen == [(bound, "returns"), (bound, "returns")]


async def test_a_layer_may_change_the_arguments() -> None:
    """As it may without a pipeline."""

    @final
    class Double(Policy[Never]):
        async def call(
            self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
        ) -> T:
            doubled = [2 * arg for arg in cast("tuple[Any, ...]", args)]
            result: T = await cast("Any", Timeout(1).call)(fn, *doubled, name=name)
            return result

        def statistics(self) -> None:
            return None

    assert await Pipeline(Timeout(1), Double(), Retry(), Double()).call(returns, 5) == 20
    assert await Pipeline(Double(), Double(), Timeout(1)).call(returns, 5) == 20


def one_at_a_time(_: object) -> Semaphore:
    return Semaphore(1)


class Unflattened(partial[Any]):
    """`functools` makes one of two partials only if neither is of a class of its own."""


@pytest.mark.parametrize("place", range(3))
async def test_keys_are_made_of_what_the_operation_gets(place: int) -> None:
    """Wherever in the pipeline: of the arguments, and of those that partials bind."""
    keys, calls = list[Any](), list[Any]()

    def key(*args: object, **kwargs: object) -> int:
        keys.append((args, kwargs))
        return 1

    async def op(*args: object, **kwargs: object) -> object:
        calls.append((args, kwargs))
        return await returns(args)

    layers: list[Policy[Never]] = [Timeout(9), Retry()]
    layers.insert(place, Keyed(one_at_a_time, key=key))
    pipeline = Pipeline(*layers)
    nested = Unflattened(Unflattened(partial(op, 1, a=1, b=1), 2, b=2, c=2), 3, c=3)
    for fn in (op, partial(op, 1), partial(op, 1, a=1), partial(partial(op, 1, a=1), 2), nested):
        await pipeline.call(fn, 8, 9)
        assert keys[-1] == calls[-1]
    assert calls[-1] == ((1, 2, 3, 8, 9), {"a": 1, "b": 2, "c": 3})
    await pipeline(op)("x", y=5)
    assert keys[-1] == calls[-1] == (("x",), {"y": 5})
    assert len(keys) == len(calls)


async def test_two_layers_that_look_at_the_arguments() -> None:
    """The second sees what the first has passed on, keywords too."""

    def tenant_of(tenant: str, **_: object) -> str:
        return tenant

    def host_of(_: object, host: str) -> str:
        return host

    tenants, hosts = (Keyed(one_at_a_time, key=key) for key in (tenant_of, host_of))

    async def op(tenant: str, *, host: str) -> str:
        return await returns(tenant + host)

    load = Pipeline(tenants, Retry(), hosts)(op)
    assert [await load("a", host="x"), await load("a", host="y")] == ["ax", "ay"]
    assert await load("b", host="x") == "bx"
    assert tenants.statistics().keys == hosts.statistics().keys == 2


# --- as a decorator -------------------------------------------------------------------------------


async def test_a_decorated_function_keeps_its_signature() -> None:
    pipeline = Pipeline(Timeout(1), Retry())

    @pipeline
    async def fetch(url: str, *, size: int = 1) -> str:
        """Fetch it."""
        return await returns(url * size)

    assert await fetch("a", size=2) == "aa"
    assert (fetch.__name__, fetch.__doc__) == ("fetch", "Fetch it.")
    assert str(inspect.signature(fetch)) == "(url: 'str', *, size: 'int' = 1) -> 'str'"
    assert inspect.iscoroutinefunction(fetch)


async def test_methods_can_be_decorated() -> None:
    probe = Probe()
    pipeline = Pipeline(probe, Retry())

    class Client:
        @pipeline
        async def get(self, url: str) -> str:
            return await returns(url)

        @pipeline
        @staticmethod
        async def ping(number: int) -> int:
            return await returns(number)

        get_home = partialmethod(get, "/")

    client = Client()
    assert await client.get("a") == "a"
    assert await client.get_home() == "/"
    assert await client.ping(1) == 1
    assert [args for args, _ in probe.seen] == [(client, "a"), (client, "/"), (1,)]


async def test_it_is_a_policy_like_any_other(autojump_clock: MockClock) -> None:
    """For operations of bounded concurrency, for a task in a nursery, and for each key."""
    gauge, retry = Gauge(), Retry(backoff=Constant(1))
    pipeline = Pipeline(retry, Semaphore(2), name="shared")
    ops = gauge.ops(1, 1, 1, 1)
    assert await run_with_limit(None, ops, policy=pipeline) == [0, 1, 2, 3]
    assert gauge.peak == 2
    assert await map_with_limit(None, returns, "ab", policy=pipeline) == ["a", "b"]
    assert await run_in(None, returns, 7, policy=pipeline) == 7
    keyed = Keyed[str, Pipeline[Never]](lambda _: Pipeline(retry, Semaphore(1)), key=str)
    assert [await keyed.call(returns, key) for key in "aab"] == ["a", "a", "b"]
    assert keyed.statistics().keys == 2
    assert retry.statistics().calls == 4 + 2 + 1 + 3


# --- what comes out -------------------------------------------------------------------------------


async def test_errors_come_out_as_they_are() -> None:
    """The same object, with no context, and a traceback that does not grow."""
    pipeline, depths = Pipeline(Timeout(1), Retry(on=()), Semaphore(1)), list[int]()
    error = OSError("mine")
    for _ in range(3):
        with pytest.raises(OSError, match="mine") as caught:
            await pipeline.call(fails, error.with_traceback(None))
        assert caught.value is error
        assert error.__context__ is error.__cause__ is None
        depths.append(len(caught.traceback))
    assert depths[0] == depths[-1] < 20


async def test_a_layer_may_give_something_else() -> None:
    """What a fallback gives has been seen by the layers around it, and by no other."""
    outer, inner = Probe(), Probe()
    pipeline = Pipeline(outer, Fallback(value="none"), inner)
    assert await pipeline.call(fails, OSError()) == "none"
    assert (outer.returned, inner.raised) == (1, 1)


async def test_a_retry_around_a_breaker_and_a_breaker_around_a_retry(
    autojump_clock: MockClock,
) -> None:
    """For fail, fail, ok: the breaker inside sees two failures, and the one outside none."""
    for is_inside, failures in ((True, 2), (False, 0)):
        breaker, retry = CircuitBreaker(), Retry(max_attempts=3, backoff=Constant(1))
        errors = [OSError(), OSError()]

        async def op(left: list[OSError] = errors) -> str:
            await trio.lowlevel.checkpoint()
            if left:
                raise left.pop()
            return "ok"

        pipeline = Pipeline(retry, breaker) if is_inside else Pipeline(breaker, retry)
        assert await pipeline.call(op) == "ok"
        assert breaker.statistics().failures == failures
        assert breaker.statistics().calls == failures + 1
        assert retry.statistics().recovered == 1


async def test_timeouts_in_a_retry_in_a_timeout(autojump_clock: MockClock) -> None:
    """The inner limit expires again and again, and the outer one exactly once."""
    inner, outer = Timeout(0.1), Timeout(0.5)
    retry, heard = Retry(max_attempts=None, backoff=Constant(0)), list[Event]()
    watch = Stopwatch()
    with subscribe(heard.append), pytest.raises(OperationTimeoutError) as caught:
        await Pipeline(outer, retry, inner).call(trio.sleep, 0.15)
    assert caught.value.timeout == watch.seconds == 0.5
    assert inner.statistics().timed_out >= 3
    assert outer.statistics().timed_out == 1
    expired = [event.timeout for event in heard if isinstance(event, TimedOut)]
    assert expired == [0.1] * inner.statistics().timed_out + [0.5]
    assert {event.operation for event in heard} == {"sleep"}
