"""Pipeline: what it tells of its layers, what it costs, and what it keeps of a call."""

from __future__ import annotations

import contextlib
import copy
import gc
import pickle
import sys
import weakref
from typing import TYPE_CHECKING, Any, TypeVar, TypeVarTuple, cast

import attrs
import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints

from tests._layers import Probe
from tests.operations import Steps, Stopwatch, fails, returns
from trio_resilience import (
    Bulkhead,
    Constant,
    Event,
    Keyed,
    Retry,
    Semaphore,
    Timeout,
    TimeoutStatistics,
    subscribe,
)
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import RetryScheduled
from trio_resilience._hedge import Hedge
from trio_resilience._pipeline import Pipeline, PipelineStatistics
from trio_resilience.testing import test_mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trio.testing import MockClock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# --- state ----------------------------------------------------------------------------------------


async def test_statistics_are_those_of_the_layers() -> None:
    timeout, retry, semaphore = Timeout(1), Retry(), Semaphore(3)
    pipeline = Pipeline(timeout, retry, semaphore)
    await pipeline.call(returns, 1)
    layers = (timeout.statistics(), retry.statistics(), semaphore.statistics())
    assert pipeline.statistics() == PipelineStatistics(layers)
    assert retry.statistics().calls == 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        cast("Any", pipeline.statistics()).layers = ()


async def test_its_repr_shows_the_live_state_of_the_layers() -> None:
    semaphore = Semaphore(3)
    pipeline = Pipeline(Timeout(1, name="total"), semaphore, name="mine")

    async def look() -> str:
        await trio.lowlevel.checkpoint()
        return repr(pipeline)

    assert await pipeline.call(look) == (
        "Pipeline(Timeout(seconds=1.0, name='total'),"
        " Semaphore(3, name='semaphore': 1 borrowed, 0 waiting), name='mine')"
    )
    assert "0 borrowed" in repr(pipeline)


async def test_it_is_idle_when_all_layers_are() -> None:
    """And may be thrown away when they all may."""
    semaphore, breaker = Semaphore(1), CircuitBreaker(failure_threshold=2)
    pipeline = Pipeline(Retry(), breaker, semaphore)
    assert pipeline.is_idle
    assert pipeline.is_disposable
    async with semaphore:
        assert not pipeline.is_idle
        assert not pipeline.is_disposable
    with contextlib.suppress(OSError):
        await breaker.call(fails, OSError())
    assert not pipeline.is_idle
    assert pipeline.is_disposable


def test_it_serves_several_runs() -> None:
    """Its layers do, so it does."""
    pipeline = Pipeline.standard()
    for calls in (1, 2):
        assert trio.run(pipeline.call, returns, 5) == 5
        assert pipeline.statistics().layers[0] == TimeoutStatistics(calls, timed_out=0)


def pickled(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))  # noqa: S301 - our own data


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickled])
def test_it_can_be_copied_if_its_layers_can(copied: Callable[[Any], Any]) -> None:
    pipeline = copied(Pipeline(Timeout(3), Timeout(2), name="mine"))
    assert [layer.seconds for layer in pipeline.layers] == [3, 2]
    assert pipeline.name == "mine"
    assert trio.run(pipeline.call, returns, 5) == 5


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_live_state_is_not_copied(copied: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="a Bulkhead can't be copied or pickled"):
        copied(Pipeline(Timeout(3), Bulkhead(2)))


async def test_what_a_test_changes_is_changed_for_its_layers(autojump_clock: MockClock) -> None:
    """Delays, and counts that are the block's own."""
    pipeline, watch = Pipeline(Retry(backoff=Constant(9)), CircuitBreaker()), Stopwatch()
    with test_mode(delays=False):
        with pytest.raises(OSError, match="mine"):
            await pipeline.call(fails, OSError("mine"))
        assert watch.seconds == 0
        retry, breaker = cast("Any", pipeline.statistics().layers)
        assert (retry.attempts, breaker.failures) == (3, 3)
    retry, breaker = cast("Any", pipeline.statistics().layers)
    assert (retry.attempts, breaker.failures) == (0, 0)


# --- what it costs --------------------------------------------------------------------------------


async def test_a_layer_costs_one_frame_more_than_alone() -> None:
    """And the pipeline none, for its own frame is that one of the outermost layer."""

    async def count_frames() -> int:
        await trio.lowlevel.checkpoint()
        frame, count = sys._getframe(), 0  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        while frame.f_back is not None:
            frame, count = frame.f_back, count + 1
        return count

    layers = [Retry() for _ in range(5)]
    bare, alone = await count_frames(), await layers[0].call(count_frames)
    assert await Pipeline(*layers).call(count_frames) - bare == 5 * (alone - bare + 1)


async def test_it_adds_no_trip_through_the_scheduler() -> None:
    pipeline, steps = Pipeline.standard(), Steps()
    trio.lowlevel.add_instrument(steps)
    assert await pipeline.call(returns, 1) == 1
    trio.lowlevel.remove_instrument(steps)
    assert steps.count == 0


async def test_a_call_is_a_checkpoint_if_the_operation_is() -> None:
    pipeline = Pipeline.standard()
    with assert_checkpoints():
        await pipeline.call(trio.lowlevel.checkpoint)
    with assert_no_checkpoints():
        await pipeline.call(returns, 1)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the collector, what is part of a cycle is never let go."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("error", [None, OSError, ValueError])
async def test_nothing_refers_in_circles(
    autojump_clock: MockClock, no_collector: None, error: type[Exception] | None
) -> None:
    """Neither the pipeline nor what an operation holds outlives its use, whatever it ends with."""
    held = list[weakref.ref[Any]]()

    async def op(_: object) -> None:
        local = Probe()
        held.append(weakref.ref(local))
        await trio.lowlevel.checkpoint()
        if error is not None:
            raise error

    async def use() -> None:
        keyed = Keyed[str, Semaphore](lambda _: Semaphore(1), key=str)
        pipeline = Pipeline(keyed, *Pipeline.standard().layers, Hedge(after=9))
        held.append(weakref.ref(pipeline))
        with contextlib.suppress(OSError, ValueError):
            await pipeline.call(op, "key")

    await use()
    assert [ref() for ref in held] == [None] * len(held)


async def test_any_number_of_tasks_share_one(autojump_clock: MockClock) -> None:
    """Each has its own attempts, its own error and its own name."""
    heard, results = list[Event](), dict[int, object]()
    pipeline = Pipeline(Retry(max_attempts=3, backoff=Constant(1)), Semaphore(7), Timeout(2))
    tries = dict[int, int]()

    async def op(number: int) -> int:
        tries[number] = tries.get(number, 0) + 1
        await trio.sleep(number / 10)
        if tries[number] <= number % 4:
            raise OSError(number)
        return number

    async def user(number: int) -> None:
        try:
            results[number] = await pipeline.call(op, number, name=f"op {number}")
        except OSError as error:
            results[number] = error.args

    with subscribe(heard.append):
        async with trio.open_nursery() as nursery:
            for number in range(16):
                nursery.start_soon(user, number)
    assert results == {n: (n,) if n % 4 == 3 else n for n in range(16)}
    retried = [event.operation for event in heard if isinstance(event, RetryScheduled)]
    expected = [f"op {n}" for n in range(16) for _ in range(min(n % 4, 2))]
    assert sorted(retried) == sorted(expected)
