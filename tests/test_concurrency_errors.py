"""What comes out when operations fail: one group, notes, outcomes, and nothing lost."""

from __future__ import annotations

import pickle
from functools import partial
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio

from tests.operations import (
    Gauge,
    Stopwatch,
    fails,
    foreign_nursery,
    leaves,
    operation_notes,
    returns,
)
from trio_resilience import (
    OperationsFailedError,
    OperationTimeoutError,
    ResilienceError,
    Timeout,
    map_with_limit,
    run_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    Operation = Callable[[], Awaitable[int]]


async def test_the_first_failure_cancels_the_rest(autojump_clock: MockClock) -> None:
    """By default running operations are cancelled, later ones never start; one group says so."""
    gauge, watch, error = Gauge(), Stopwatch(), OSError("down")
    ops = [gauge.op(0, 1), gauge.op(1, 2, error), *(gauge.op(i, 9) for i in range(2, 8))]
    async with trio.open_nursery() as nursery:
        with pytest.raises(OperationsFailedError) as caught:
            await run_with_limit(nursery, ops, max_concurrency=3)
    assert caught.value.exceptions == (error,)
    assert caught.value.message == "1 of 8 operations failed"
    assert str(caught.value).startswith("1 of 8 operations failed")
    assert (gauge.finished, sorted(gauge.cancelled), watch.seconds) == ([0], [2, 3], 2)


async def test_the_failure_waits_for_the_cleanup_of_the_rest(autojump_clock: MockClock) -> None:
    """The group comes out when every cancelled operation has ended."""
    watch = Stopwatch()

    async def careful() -> int:
        try:
            return await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(5)

    with pytest.raises(OperationsFailedError):
        await run_with_limit(None, [careful, Gauge().op(1, 1, OSError())])
    assert watch.seconds == 6


async def test_what_succeeded_is_in_the_outcomes(autojump_clock: MockClock) -> None:
    """`.outcomes` has a place for every operation: its value, its error, or None."""
    gauge, error = Gauge(), OSError()
    ops = [gauge.op(0, 1), gauge.op(1, 2, error), gauge.op(2, 9), gauge.op(3, 0.5), gauge.op(4, 9)]
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, ops, max_concurrency=3)
    first, second, third, fourth, *rest = caught.value.outcomes
    assert first == outcome.Value(0)
    assert isinstance(second, outcome.Error)
    assert second.error is error
    assert third is None
    assert fourth == outcome.Value(3)
    assert rest == [None]


async def test_continue_runs_all_and_raises_all_failures(autojump_clock: MockClock) -> None:
    """With on_error="continue" every operation runs before one group comes out."""
    gauge = Gauge()
    errors = [OSError(1), None, ValueError(3), None, KeyError(5)]
    ops = [gauge.op(i, 5 - i, error) for i, error in enumerate(errors)]
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, ops, on_error="continue", max_concurrency=2)
    assert gauge.started == [0, 1, 2, 3, 4]
    assert caught.value.message == "3 of 5 operations failed"
    assert set(caught.value.exceptions) == {errors[0], errors[2], errors[4]}
    assert caught.value.outcomes[1] == outcome.Value(1)
    assert caught.value.outcomes[3] == outcome.Value(3)


async def test_of_an_unsized_source_those_that_ran_are_counted(autojump_clock: MockClock) -> None:
    """The message of the group counts what a generator has yielded."""
    gauge = Gauge()
    ops = (gauge.op(i, 1, OSError() if i == 1 else None) for i in range(3))
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, ops, on_error="continue")
    assert caught.value.message == "1 of 3 operations failed"
    assert len(caught.value.outcomes) == 3


async def test_the_failures_of_a_group_are_in_the_order_of_the_operations(
    autojump_clock: MockClock,
) -> None:
    """Whichever failed first, the group reads like the list that was given."""
    gauge = Gauge()
    ops = [gauge.op(i, 5 - i, OSError(i)) for i in range(5)]
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, ops, on_error="continue")
    assert [operation_notes(error) for error in caught.value.exceptions] == [
        [f"operation {i}"] for i in range(5)
    ]


@pytest.mark.parametrize("on_error", ["cancel", "continue"])
async def test_without_failures_there_is_a_plain_list(
    autojump_clock: MockClock, on_error: Any
) -> None:
    """What on_error says does not matter when nothing fails."""
    assert await run_with_limit(None, Gauge().ops(2, 1), on_error=on_error) == [0, 1]


async def test_collect_returns_values_and_errors(autojump_clock: MockClock) -> None:
    """With on_error="collect" nothing is raised; each operation has its outcome, in order."""
    gauge, error = Gauge(), OSError()
    ops = [gauge.op(0, 3), gauge.op(1, 1, error), gauge.op(2, 2)]
    results = await run_with_limit(None, ops, on_error="collect", max_concurrency=2)
    assert results[0] == outcome.Value(0)
    assert isinstance(results[1], outcome.Error)
    assert results[1].error is error
    assert results[2] == outcome.Value(2)


async def test_map_collects_too() -> None:
    """map_with_limit has the same on_error."""
    results = await map_with_limit(None, fails, [OSError()], on_error="collect")
    assert [type(each) for each in results] == [outcome.Error]


def _one() -> list[Operation]:
    return [Gauge().op(0, 1, OSError()), Gauge().op(1, 5)]


def _one_after_another() -> list[Operation]:
    async def cleanup_fails() -> int:
        try:
            return await trio.sleep_forever()
        finally:
            raise ValueError

    return [Gauge().op(0, 1, OSError()), cleanup_fails]


def _at_the_same_time() -> list[Operation]:
    event = trio.Event()

    async def set_and_fail() -> int:
        await trio.sleep(1)
        event.set()
        raise OSError

    async def wait_and_fail() -> int:
        await event.wait()
        raise ValueError

    return [set_and_fail, wait_and_fail]


def _without_a_checkpoint() -> list[Operation]:
    return [lambda: fails(OSError())]


@pytest.mark.parametrize(
    "ops, on_error",
    [
        (_one, "cancel"),
        (_one, "continue"),
        (_one_after_another, "cancel"),  # nobody would cancel the second one otherwise
        (_at_the_same_time, "cancel"),
        (_at_the_same_time, "continue"),
        (_without_a_checkpoint, "cancel"),
        (_without_a_checkpoint, "continue"),
    ],
)
@pytest.mark.parametrize("given", [True, False])
async def test_the_shape_of_a_failure_does_not_depend_on_timing(
    autojump_clock: MockClock, ops: Callable[[], list[Operation]], on_error: Any, given: bool
) -> None:
    """Alone, one after another, at once or at the first step: always the same flat group."""
    async with foreign_nursery() as nursery:
        with pytest.raises(OperationsFailedError) as caught:
            await run_with_limit(nursery if given else None, ops(), on_error=on_error)
    assert type(caught.value) is OperationsFailedError
    kinds = {type(error) for error in caught.value.exceptions}
    assert kinds == ({OSError, ValueError} if len(kinds) > 1 else {OSError})
    assert (len(kinds) == 2) == (ops in {_one_after_another, _at_the_same_time})


async def test_the_group_is_an_exception_group() -> None:
    """`except*`, split and subgroup work, and keep the type and the outcomes."""
    ops = [partial(fails, OSError()), partial(fails, ValueError()), partial(returns, 2)]
    seen = list[str]()
    try:
        await run_with_limit(None, ops, on_error="continue")
    except* OSError as group:
        seen.append(type(group).__name__)
    except* ValueError as group:
        seen.append(type(group).__name__)
    assert seen == ["OperationsFailedError"] * 2

    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, ops, on_error="continue")
    assert isinstance(caught.value, ResilienceError)
    assert isinstance(caught.value, ExceptionGroup)
    matching, rest = caught.value.split(OSError)
    assert isinstance(matching, OperationsFailedError)
    assert isinstance(rest, OperationsFailedError)
    assert [type(error) for error in rest.exceptions] == [ValueError]
    assert matching.outcomes[2] == outcome.Value(2)


async def test_the_group_survives_pickling() -> None:
    """Errors, notes and outcomes come out of a pickle as they went in."""
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(
            None, [partial(fails, OSError(5)), partial(returns, 1)], on_error="continue"
        )
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own bytes
    assert type(copy) is OperationsFailedError
    assert copy.message == "1 of 2 operations failed"
    assert repr(copy.exceptions[0]) == "OSError(5)"
    assert operation_notes(copy.exceptions[0]) == ["operation 0"]
    assert copy.outcomes[1] == outcome.Value(1)


class Halt(BaseException):
    """Not an Exception: nothing may handle it."""


@pytest.mark.parametrize("on_error", ["cancel", "continue", "collect"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("park", [True, False])
@pytest.mark.parametrize("fatal", [KeyboardInterrupt, SystemExit, GeneratorExit, Halt])
async def test_what_is_no_exception_stops_the_whole_job(
    autojump_clock: MockClock,
    on_error: Any,
    given: bool,
    park: bool,
    fatal: type[BaseException],
) -> None:
    """Whatever on_error says, the very object reaches the caller in a BaseExceptionGroup.

    The rest is cancelled, and the nursery that was given is not crashed.
    """
    gauge, error = Gauge(), fatal()
    bad = gauge.op(0, 1, error) if park else partial(fails, error)
    async with foreign_nursery() as nursery:
        with pytest.raises(BaseExceptionGroup) as caught:
            await run_with_limit(
                nursery if given else None, [bad, gauge.op(1, 9)], on_error=on_error
            )
        assert not nursery.cancel_scope.cancel_called
        assert not nursery.child_tasks
    assert not isinstance(caught.value, Exception)
    assert leaves(caught.value) == [error]
    assert gauge.running == 0
    assert gauge.finished == []


async def test_a_group_with_a_fatal_leaf_is_fatal() -> None:
    """One KeyboardInterrupt among the leaves makes the whole group pass through, uncollected."""
    inner = BaseExceptionGroup("inner", [OSError(), KeyboardInterrupt()])
    with pytest.raises(BaseExceptionGroup) as caught:
        await run_with_limit(None, [partial(fails, inner)], on_error="collect")
    assert {type(leaf) for leaf in leaves(caught.value)} == {OSError, KeyboardInterrupt}


async def test_failures_beside_a_fatal_error_are_not_lost(autojump_clock: MockClock) -> None:
    """An ordinary failure that happened before is in the group too."""
    failure, fatal, gauge = OSError(), Halt(), Gauge()
    with pytest.raises(BaseExceptionGroup) as caught:
        await run_with_limit(
            None, [gauge.op(0, 1, failure), gauge.op(1, 2, fatal)], on_error="continue"
        )
    assert set(leaves(caught.value)) == {failure, fatal}


async def test_an_operation_may_fail_when_it_is_called() -> None:
    """A callable that raises before there is anything to await has failed like any other."""

    def broken() -> Awaitable[int]:
        raise OSError

    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, [lambda: broken()])  # noqa: PLW0108 - a def would be refused
    assert operation_notes(caught.value.exceptions[0]) == ["operation 0"]


@pytest.mark.parametrize("stop", [StopIteration, StopAsyncIteration])
async def test_a_stray_stop_iteration_is_a_failure(stop: type[Exception]) -> None:
    """Raised by an operation, or by its call, it is never taken for the end of the source."""

    def broken() -> Awaitable[int]:
        raise stop

    after = Gauge()
    ops: list[Operation] = [lambda: broken(), after.op(1, 0)]  # noqa: PLW0108
    results = await run_with_limit(None, ops, on_error="collect", max_concurrency=1)
    assert [type(each) for each in results] == [outcome.Error, outcome.Value]
    ops = [lambda: fails(stop()), after.op(1, 0)]
    results = await run_with_limit(None, ops, on_error="collect", max_concurrency=1)
    assert [type(each) for each in results] == [outcome.Error, outcome.Value]


async def test_an_operation_may_return_an_exception() -> None:
    """A value that happens to be an error is a value."""
    error = OSError()
    assert await run_with_limit(None, [partial(returns, error)]) == [error]


async def test_a_timeout_policys_expiry_is_the_operations_failure(
    autojump_clock: MockClock,
) -> None:
    """What a policy raises is grouped and noted like the operation's own error."""
    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, [trio.sleep_forever], policy=Timeout(1))
    (error,) = caught.value.exceptions
    assert isinstance(error, OperationTimeoutError)
    assert operation_notes(error) == ["operation 0"]
