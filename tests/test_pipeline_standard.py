"""The standard pipeline: what it is made of, and that each layer is where it has to be."""

from __future__ import annotations

import datetime as dt
import inspect
import math
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.operations import Gauge, Stopwatch, fails, returns, within_calls
from trio_resilience import (
    AttemptFinished,
    AttemptStarted,
    Bulkhead,
    BulkheadFullError,
    CircuitOpenError,
    Constant,
    Event,
    Keyed,
    OperationTimeoutError,
    Retry,
    Semaphore,
    Timeout,
    subscribe,
)
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import CircuitState
from trio_resilience._pipeline import Pipeline


def layers_of(pipeline: Pipeline[Any]) -> list[Any]:
    return list(pipeline.layers)


# --- what it is made of ---------------------------------------------------------------------------


def test_its_layers() -> None:
    """Total timeout, retry, circuit breaker, bulkhead, attempt timeout; called after it."""
    total, retry, breaker, bulkhead, attempt = layers_of(Pipeline.standard(name="github"))
    assert (total.seconds, total.name) == (30, "github.timeout")
    assert (retry.max_attempts, retry.name) == (3, "github.retry")
    assert (breaker.failure_threshold, breaker.name) == (5, "github.circuit")
    assert (bulkhead.max_concurrency, bulkhead.queue_size) == (10, None)
    assert (attempt.seconds, attempt.name) == (10, "github.attempt_timeout")
    assert isinstance(total, Timeout)
    assert isinstance(retry, Retry)
    assert isinstance(breaker, CircuitBreaker)
    assert isinstance(bulkhead, Bulkhead)
    assert isinstance(attempt, Timeout)
    assert Pipeline.standard().name == "pipeline"


def test_there_is_nothing_odd_about_it() -> None:
    assert Pipeline.standard().advice() == []


def test_its_signature_shows_what_is_made() -> None:
    signature = str(inspect.signature(Pipeline.standard))
    for shown in ("= Retry()", "= CircuitBreaker()", "= Bulkhead(10)", "= 30.0", "= timeout / 3"):
        assert shown in signature


@pytest.mark.parametrize(
    "timeout, attempt",
    [
        (5, 5 / 3),
        (dt.timedelta(minutes=1), 20),
        (Timeout(0.3), 0.1),
        (None, 10),
        (math.inf, 10),
        (Timeout(math.inf), 10),
    ],
    ids=repr,
)
def test_an_attempt_has_a_third_of_the_whole(timeout: Any, attempt: float) -> None:
    """By default, so that it may expire before the whole does; or 10 s, if that never does."""
    pipeline = Pipeline.standard(timeout=timeout)
    assert layers_of(pipeline)[-1].seconds == pytest.approx(attempt)
    assert pipeline.advice() == []


async def test_an_attempt_that_hangs_leaves_time_for_another(autojump_clock: MockClock) -> None:
    """However short the total timeout is."""
    hangs, breaker = iter([True, False]), CircuitBreaker()
    retry = Retry(backoff=Constant(0.1))

    async def op() -> str:
        await trio.sleep(math.inf if next(hangs) else 0)
        return "ok"

    pipeline = Pipeline.standard(timeout=0.6, retry=retry, breaker=breaker)
    watch = Stopwatch()
    assert await pipeline.call(op) == "ok"
    assert watch.seconds == 0.3
    assert breaker.statistics().failures == 1


def test_every_pipeline_gets_layers_of_its_own() -> None:
    first, second = Pipeline.standard(), Pipeline.standard()
    assert not set(first.layers) & set(second.layers)


LAYERS = ["timeout", "retry", "breaker", "bulkhead", "attempt_timeout"]


@pytest.mark.parametrize("left_out", LAYERS)
def test_each_layer_can_be_left_out(left_out: str) -> None:
    """The others stay as they are."""
    options: dict[str, Any] = {left_out: None}
    kinds = [type(layer) for layer in Pipeline.standard().layers]
    del kinds[LAYERS.index(left_out)]
    assert [type(layer) for layer in Pipeline.standard(**options).layers] == kinds


def test_not_all_of_them_can() -> None:
    options: Any = dict.fromkeys(LAYERS)
    with pytest.raises(ValueError, match="at least one layer"):
        Pipeline.standard(**options)


def test_each_layer_can_be_another() -> None:
    """They are taken as they are, names included; a limit is a number, a timedelta or a policy."""
    retry, breaker, total = Retry(max_attempts=9), CircuitBreaker("mine"), Timeout(60)
    hosts = Keyed[str, Semaphore](lambda _: Semaphore(2), key=str)
    pipeline = Pipeline.standard(
        timeout=total,
        retry=retry,
        breaker=breaker,
        bulkhead=hosts,
        attempt_timeout=dt.timedelta(seconds=5),
    )
    assert layers_of(pipeline)[:4] == [total, retry, breaker, hosts]
    assert layers_of(pipeline)[4].seconds == 5


@pytest.mark.parametrize("kind", ["retry", "breaker", "bulkhead"])
@pytest.mark.parametrize("value", [3, Retry, "no", False], ids=repr)
def test_what_is_no_policy_is_refused(kind: str, value: Any) -> None:
    options: dict[str, Any] = {kind: value}
    with pytest.raises(TypeError, match=f"^`{kind}` must be a policy, or None to leave it out, "):
        Pipeline.standard(**options)


@pytest.mark.parametrize("kind", ["timeout", "attempt_timeout"])
@pytest.mark.parametrize("value", [-1, math.nan, True, "5"], ids=repr)
def test_bad_limits_are_refused(kind: str, value: Any) -> None:
    options: dict[str, Any] = {kind: value}
    with pytest.raises((TypeError, ValueError), match=f"^`{kind}` must be "):
        Pipeline.standard(**options)


# --- what it does ---------------------------------------------------------------------------------


async def test_an_attempt_that_hangs_is_tried_again(autojump_clock: MockClock) -> None:
    """After its own limit; the breaker counts it, and the permit is back meanwhile."""
    pipeline, calls = Pipeline.standard(retry=Retry(backoff=Constant(2))), list[float]()

    async def op() -> str:
        calls.append(trio.current_time())
        await trio.sleep(math.inf if len(calls) == 1 else 1)
        return "ok"

    assert await pipeline.call(op) == "ok"
    assert calls == [0, 12]
    total, retry, breaker, bulkhead, attempt = [layer.statistics() for layer in layers_of(pipeline)]
    assert (total.timed_out, attempt.timed_out) == (0, 1)
    assert (retry.attempts, retry.recovered) == (2, 1)
    assert (breaker.failures, breaker.calls) == (1, 2)
    assert bulkhead.borrowed == 0


async def test_all_of_a_call_is_bounded(autojump_clock: MockClock) -> None:
    """Three attempts that hang take longer than there is: the total timeout ends the last."""
    pipeline, watch = Pipeline.standard(retry=Retry(backoff=Constant(2))), Stopwatch()
    with pytest.raises(OperationTimeoutError) as caught:
        await pipeline.call(trio.sleep_forever)
    assert caught.value.timeout == watch.seconds == 30
    _, retry, breaker, _, attempt = [layer.statistics() for layer in layers_of(pipeline)]
    assert (retry.attempts, retry.given_up) == (3, 0)
    assert breaker.failures == attempt.timed_out == 2


async def test_a_cancellation_at_the_instant_of_all_limits_wins(autojump_clock: MockClock) -> None:
    """The caller's own; it is counted by no layer, told to nobody, and leaves nothing taken."""
    pipeline, heard = Pipeline.standard(timeout=10, attempt_timeout=10), list[Event]()
    with trio.move_on_after(10) as scope, subscribe(within_calls(heard.append)):
        await pipeline.call(trio.sleep_forever)
    assert scope.cancelled_caught
    total, retry, breaker, bulkhead, attempt = [layer.statistics() for layer in layers_of(pipeline)]
    assert total.timed_out == attempt.timed_out == 0
    assert (retry.attempts, retry.recovered, retry.given_up) == (1, 0, 0)
    assert (breaker.calls, breaker.failures, breaker.in_flight) == (0, 0, 0)
    assert (bulkhead.borrowed, bulkhead.waiting) == (0, 0)
    finished = [event for event in heard if isinstance(event, AttemptFinished)]
    assert [type(event) for event in heard] == [AttemptStarted, AttemptFinished]
    assert [(event.cancelled, event.error) for event in finished] == [(True, None)]


async def test_an_open_circuit_ends_a_retry(autojump_clock: MockClock) -> None:
    """The fifth failure, an attempt of the second call, opens it; then nothing is run."""
    pipeline, calls = Pipeline.standard(retry=Retry(backoff=Constant(1))), list[int]()

    async def op() -> None:
        calls.append(1)
        await trio.sleep(0.1)
        raise OSError("down")

    with pytest.raises(OSError, match="down"):
        await pipeline.call(op)
    for _ in range(2):
        with pytest.raises(CircuitOpenError):
            await pipeline.call(op)
    assert len(calls) == 5
    _, retry, breaker, _, _ = layers_of(pipeline)
    assert breaker.state is CircuitState.OPEN
    assert retry.statistics().attempts == 3 + 3 + 1


async def test_a_wait_in_line_is_no_failure(autojump_clock: MockClock) -> None:
    """Nor part of the time of an attempt: only of the whole."""
    pipeline, gauge = Pipeline.standard(bulkhead=Bulkhead(1)), Gauge()
    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(pipeline.call, gauge.op(number, 7.0))
    assert sorted(gauge.finished) == [0, 1, 2, 3]
    assert gauge.peak == 1
    _, retry, breaker, _, attempt = [layer.statistics() for layer in layers_of(pipeline)]
    assert (retry.attempts, breaker.failures, attempt.timed_out) == (4, 0, 0)


async def test_who_backs_off_leaves_its_permit_to_others(autojump_clock: MockClock) -> None:
    """Another call is done while the first one waits for its next attempt."""
    pipeline = Pipeline.standard(bulkhead=Bulkhead(1), retry=Retry(backoff=Constant(5)))
    ended, errors = list[str](), [OSError()]

    async def flaky() -> None:
        await trio.sleep(1)
        if errors:
            raise errors.pop()
        ended.append("flaky")

    async def steady() -> None:
        await trio.sleep(1)
        ended.append("steady")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipeline.call, flaky)
        await wait_all_tasks_blocked()
        nursery.start_soon(pipeline.call, steady)
    assert ended == ["steady", "flaky"]


async def test_a_full_line_opens_no_circuit(autojump_clock: MockClock) -> None:
    """It says nothing about the dependency, and is not tried again."""
    bulkhead = Bulkhead(1, queue_size=0)
    pipeline = Pipeline.standard(bulkhead=bulkhead)
    async with bulkhead:
        for _ in range(9):
            with pytest.raises(BulkheadFullError):
                await pipeline.call(returns, 1)
    _, retry, breaker, _, _ = layers_of(pipeline)
    assert breaker.state is CircuitState.CLOSED
    assert breaker.statistics().failures == 0
    assert retry.statistics().attempts == 9
    assert await pipeline.call(returns, 1) == 1


async def test_an_error_that_is_not_transient_comes_out_at_once(autojump_clock: MockClock) -> None:
    """It is no failure of the dependency either."""
    pipeline, error = Pipeline.standard(), ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:
        await pipeline.call(fails, error)
    assert caught.value is error
    _, retry, breaker, _, _ = [layer.statistics() for layer in layers_of(pipeline)]
    assert (retry.attempts, breaker.failures) == (1, 0)
