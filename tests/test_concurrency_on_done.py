"""on_done: told of each outcome, in the order of completion."""

from __future__ import annotations

from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio

from tests.operations import Gauge, Stopwatch, fails, foreign_nursery, reachable, returns
from trio_resilience import (
    OperationsFailedError,
    OperationTimeoutError,
    map_with_limit,
    run_with_limit,
)

if TYPE_CHECKING:
    from trio.testing import MockClock


class CallbackError(Exception):
    """Raised by a callback."""


async def test_on_done_is_called_as_operations_complete(autojump_clock: MockClock) -> None:
    """In completion order, at the instant of completion, with the index and the outcome."""
    gauge, watch, error = Gauge(), Stopwatch(), OSError()
    calls = list[tuple[float, int, Any]]()

    def note(index: int, result: outcome.Outcome[int]) -> None:
        calls.append((watch.seconds, index, result))

    ops = [gauge.op(0, 3), gauge.op(1, 1), gauge.op(2, 2, error)]
    await run_with_limit(None, ops, on_done=note, on_error="collect")
    assert [call[:2] for call in calls] == [(1, 1), (2, 2), (3, 0)]
    assert (calls[0][2], calls[2][2]) == (outcome.Value(1), outcome.Value(0))
    assert isinstance(calls[1][2], outcome.Error)
    assert calls[1][2].error is error


async def test_map_has_on_done_too(autojump_clock: MockClock) -> None:
    """It gets the index of the item."""
    calls = list[tuple[int, Any]]()
    await map_with_limit(
        None,
        Gauge().run,
        [3, 1],
        on_done=lambda index, result: calls.append((index, result)),
        max_concurrency=1,
    )
    assert calls == [(0, outcome.Value(3)), (1, outcome.Value(1))]


@pytest.mark.parametrize("on_error", ["cancel", "continue"])
async def test_a_failure_that_is_raised_is_told_first(
    autojump_clock: MockClock, on_error: Any
) -> None:
    """A progress bar sees the failure; operations that are cancelled have no outcome."""
    gauge, calls = Gauge(), list[tuple[int, type]]()
    with pytest.raises(OperationsFailedError):
        await run_with_limit(
            None,
            [gauge.op(0, 1, OSError()), gauge.op(1, 2)],
            on_error=on_error,
            on_done=lambda index, result: calls.append((index, type(result))),
        )
    later = [(1, outcome.Value)] if on_error == "continue" else []
    assert calls == [(0, outcome.Error), *later]


async def test_a_timeout_is_told_as_a_failure(autojump_clock: MockClock) -> None:
    """The outcome holds the OperationTimeoutError."""
    calls = list[Any]()
    await run_with_limit(
        None,
        [trio.sleep_forever],
        timeout=1,
        on_error="collect",
        on_done=lambda _index, result: calls.append(result),
    )
    assert [type(each.error) for each in calls] == [OperationTimeoutError]


@pytest.mark.parametrize("on_error", ["cancel", "continue", "collect"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("error_type", [CallbackError, KeyboardInterrupt])
async def test_a_callback_that_raises_ends_the_job(
    autojump_clock: MockClock, on_error: Any, given: bool, error_type: type[BaseException]
) -> None:
    """As when the source raises: the rest is cancelled and joined, the error comes out as it is."""
    gauge, watch, error = Gauge(), Stopwatch(), error_type()

    def refuse(index: int, result: object) -> None:
        raise error

    async with foreign_nursery() as nursery:
        with pytest.raises(error_type) as caught:
            await run_with_limit(
                nursery if given else None,
                gauge.ops(1, 5, 5, 1),
                max_concurrency=3,
                on_error=on_error,
                on_done=refuse,
            )
        assert not nursery.child_tasks
    assert caught.value is error
    assert (sorted(gauge.cancelled), watch.seconds, gauge.running) == ([1, 2], 1, 0)


async def test_a_callback_that_raises_for_the_last_operation_is_heard() -> None:
    """Though nothing is left to cancel."""
    with pytest.raises(CallbackError):
        await run_with_limit(None, [partial(returns, 1)], on_done=partial(_refuse, 0))


def _refuse(_: int, *call: object) -> None:
    raise CallbackError


async def test_a_callback_that_raises_is_not_called_again(autojump_clock: MockClock) -> None:
    """Operations that complete at the same instant are not reported to it any more."""
    calls = list[int]()

    def refuse(index: int, result: object) -> None:
        calls.append(index)
        raise CallbackError

    with pytest.raises(CallbackError):
        await run_with_limit(None, Gauge().ops(1, 1, 1), on_done=refuse)
    assert len(calls) == 1


async def test_a_callback_may_cancel_the_caller(autojump_clock: MockClock) -> None:
    """Enough found: cancelling from the callback stops the job at once."""
    gauge = Gauge()
    with trio.CancelScope() as scope:
        await run_with_limit(
            None,
            gauge.ops(*[1] * 50),
            max_concurrency=2,
            on_done=lambda _index, _result: scope.cancel(),
        )
    assert scope.cancelled_caught
    assert len(gauge.started) <= 3


var = ContextVar[str]("var", default="unset")


@pytest.mark.parametrize("given", [True, False])
async def test_a_callback_runs_in_the_callers_context(
    autojump_clock: MockClock, given: bool
) -> None:
    """It sees the caller's variables, not those of operations, and what it sets stays."""
    seen = list[str]()

    def note(index: int, result: object) -> None:
        seen.append(var.get())
        var.set(f"callback {index}")

    async def operation(value: str) -> None:
        var.set(value)
        await trio.lowlevel.checkpoint()
        var.set(value)

    token = var.set("caller")
    async with foreign_nursery() as nursery:
        await map_with_limit(
            nursery if given else None, operation, ["a", "b"], on_done=note, max_concurrency=1
        )
    assert seen == ["caller", "callback 0"]
    assert var.get() == "callback 1"
    var.reset(token)


async def test_a_failing_callback_does_not_hide_earlier_failures(
    autojump_clock: MockClock,
) -> None:
    """Neither the failure that the callback was told of nor its own error is lost."""
    failure, error = OSError(), CallbackError()

    def refuse(index: int, result: object) -> None:
        raise error

    with pytest.raises((CallbackError, OperationsFailedError)) as caught:
        await run_with_limit(None, [partial(fails, failure)], on_done=refuse, on_error="continue")
    seen = reachable(caught.value)
    assert any(each is failure for each in seen)
    assert any(each is error for each in seen)
