"""`timeout`: per operation, its policy included, its wait for a permit not."""

from __future__ import annotations

import datetime as dt
from functools import partial
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio

from tests.operations import Gauge, Stopwatch, foreign_nursery, leaves, operation_notes, returns
from trio_resilience import (
    Constant,
    OperationsFailedError,
    OperationTimeoutError,
    ResilienceError,
    Retry,
    map_with_limit,
    run_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


def collected_types(results: list[outcome.Value[Any] | outcome.Error]) -> list[type]:
    """The type of each error, or of the value."""
    return [type(each.error if isinstance(each, outcome.Error) else each.value) for each in results]


@pytest.mark.parametrize("given", [True, False])
async def test_an_operation_that_takes_too_long_has_failed(
    autojump_clock: MockClock, given: bool
) -> None:
    """Expiry is that operation's failure: an OperationTimeoutError, also a TooSlowError, noted."""
    gauge, watch = Gauge(), Stopwatch()
    async with foreign_nursery() as nursery:
        with pytest.raises(OperationsFailedError) as caught:
            await run_with_limit(
                nursery if given else None, gauge.ops(1, 5, 0.5), timeout=2, max_concurrency=2
            )
    (error,) = caught.value.exceptions
    assert isinstance(error, OperationTimeoutError)
    assert isinstance(error, trio.TooSlowError)
    assert isinstance(error, ResilienceError)
    assert error.timeout == 2
    assert operation_notes(error) == ["operation 1"]
    assert (watch.seconds, gauge.cancelled, gauge.finished) == (2, [1], [0, 2])


async def test_a_timeout_hides_its_own_machinery(autojump_clock: MockClock) -> None:
    """The cancellation behind a timeout is our device and does not show in its traceback."""
    (result,) = await run_with_limit(None, [trio.sleep_forever], timeout=1, on_error="collect")
    assert isinstance(result, outcome.Error)
    assert result.error.__cause__ is None
    assert result.error.__context__ is None or result.error.__suppress_context__


async def test_map_has_timeouts_too(autojump_clock: MockClock) -> None:
    """With map_with_limit the timeout is per item."""
    results = await map_with_limit(None, trio.sleep, [1.0, 9.0], timeout=2, on_error="collect")
    assert collected_types(results) == [type(None), OperationTimeoutError]


async def test_a_timedelta_is_a_timeout(autojump_clock: MockClock) -> None:
    """Times may be given as dt.timedelta."""
    watch = Stopwatch()
    with pytest.raises(OperationsFailedError):
        await run_with_limit(None, [trio.sleep_forever], timeout=dt.timedelta(milliseconds=1500))
    assert watch.seconds == 1.5


async def test_every_operation_has_its_own_time(autojump_clock: MockClock) -> None:
    """One worker, and each operation may take the full timeout, also after one that expired."""
    gauge, watch = Gauge(), Stopwatch()
    results = await run_with_limit(
        None,
        gauge.ops(9, 0.9, 9, 9, 0.9, 0.9),
        timeout=1,
        max_concurrency=1,
        on_error="collect",
    )
    late = OperationTimeoutError
    assert collected_types(results) == [late, int, late, late, int, int]
    assert watch.seconds == 5.7


async def test_waiting_for_a_permit_is_not_counted(autojump_clock: MockClock) -> None:
    """Three operations of 0.6 s through one permit all meet a timeout of one second."""
    limiter = trio.CapacityLimiter(1)
    ops = Gauge().ops(0.6, 0.6, 0.6)
    assert await run_with_limit(None, ops, max_concurrency=limiter, timeout=1) == [0, 1, 2]
    async with trio.open_nursery() as nursery, limiter:
        nursery.start_soon(partial(run_with_limit, None, ops, max_concurrency=limiter, timeout=1))
        await trio.sleep(5)


async def test_the_policy_and_its_attempts_are_counted(autojump_clock: MockClock) -> None:
    """The timeout is around the whole retry: it expires in the middle of the second attempt."""
    attempts, watch = 0, Stopwatch()

    async def fail_then_hang() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise OSError
        await trio.sleep_forever()

    policy = Retry(max_attempts=5, backoff=Constant(1.0))
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, [fail_then_hang], policy=policy, timeout=1.5)
    assert [type(error) for error in caught.value.exceptions] == [OperationTimeoutError]
    assert (attempts, watch.seconds) == (2, 1.5)


async def test_a_retry_inside_knows_the_deadline(autojump_clock: MockClock) -> None:
    """The policy sees the timeout as its deadline: it does not back off into it."""
    watch, error = Stopwatch(), OSError()

    async def fail() -> None:
        raise error

    policy = Retry(max_attempts=5, backoff=Constant(1.0))
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, [fail], policy=policy, timeout=1.5)
    assert caught.value.exceptions == (error,)
    assert watch.seconds == 1


async def test_an_operations_own_too_slow_error_stays_its_own(autojump_clock: MockClock) -> None:
    """trio.fail_after inside the operation is its own business: the very error comes out."""

    async def impatient() -> None:
        with trio.fail_after(1):
            await trio.sleep_forever()

    (result,) = await run_with_limit(None, [impatient], timeout=5, on_error="collect")
    assert isinstance(result, outcome.Error)
    assert type(result.error) is trio.TooSlowError


async def test_an_operation_may_answer_its_timeout_with_an_error(
    autojump_clock: MockClock,
) -> None:
    """When its cleanup raises, that is what it failed with, as under trio.fail_after."""
    error = OSError()

    async def clumsy() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise error

    (result,) = await run_with_limit(None, [clumsy], timeout=1, on_error="collect")
    assert isinstance(result, outcome.Error)
    assert result.error is error


async def test_cleanup_after_a_timeout_takes_the_time_it_needs(autojump_clock: MockClock) -> None:
    """An expired operation keeps its slot until it has really ended."""
    gauge, watch = Gauge(), Stopwatch()

    async def careful() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await gauge.run(0, 3)

    results = await run_with_limit(
        None, [careful, gauge.op(1, 0.5)], timeout=1, max_concurrency=1, on_error="collect"
    )
    assert collected_types(results) == [OperationTimeoutError, int]
    assert watch.seconds == 4.5
    assert gauge.peak == 1


async def test_an_expiry_inside_nested_nurseries_is_a_timeout(autojump_clock: MockClock) -> None:
    """The cancellation may come back as a group of Cancelled: it is our timeout, bare."""

    async def spread() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)

    (result,) = await run_with_limit(None, [spread], timeout=1, on_error="collect")
    assert collected_types([result]) == [OperationTimeoutError]


async def test_a_failure_beside_an_expiry_is_not_lost(autojump_clock: MockClock) -> None:
    """When a child in the operation's nursery fails as it is cancelled, that error is told."""

    async def clumsy() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError

    async def spread() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(clumsy)

    (result,) = await run_with_limit(None, [spread], timeout=1, on_error="collect")
    assert isinstance(result, outcome.Error)
    assert [type(leaf) for leaf in leaves(result.error)] == [OSError]


async def test_a_hundred_timeouts_run_side_by_side(autojump_clock: MockClock) -> None:
    """Each worker has its own deadline."""
    watch = Stopwatch()
    results = await map_with_limit(
        None, trio.sleep, [i / 10 for i in range(100)], timeout=5.05,
        max_concurrency=100, on_error="collect",
    )  # fmt: skip
    assert collected_types(results).count(OperationTimeoutError) == 49
    assert watch.seconds == 5.05


async def test_a_timeout_of_zero_stops_at_the_first_checkpoint(autojump_clock: MockClock) -> None:
    """As under trio.fail_after(0): only what needs no time succeeds."""
    ops: list[Callable[[], Awaitable[None]]] = [partial(returns, None), trio.lowlevel.checkpoint]
    results = await run_with_limit(None, ops * 2, timeout=0, on_error="collect", max_concurrency=1)
    assert collected_types(results) == [type(None), OperationTimeoutError] * 2
