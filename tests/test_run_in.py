"""run_in: a child task of somebody's nursery, whose result or failure comes back here."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from tests.operations import (
    Gauge,
    Stopwatch,
    closed_nursery,
    fails,
    foreign_nursery,
    leaves,
)
from trio_resilience import (
    Constant,
    OperationsCancelledError,
    OperationTimeoutError,
    Retry,
    Timeout,
    run_in,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

both = pytest.mark.parametrize("given", [True, False])


@both
async def test_the_result_comes_back(autojump_clock: MockClock, given: bool) -> None:
    """The arguments are passed on, trio's way; nothing is left when the call returns."""
    gauge, watch = Gauge(), Stopwatch()
    async with foreign_nursery() as nursery:
        assert await run_in(nursery if given else None, gauge.run, 7, 2) == 7
        assert not nursery.child_tasks
    assert watch.seconds == 2


@both
@pytest.mark.parametrize("park", [True, False])
async def test_a_failure_surfaces_here(autojump_clock: MockClock, given: bool, park: bool) -> None:
    """The very error, in no group; the nursery goes on."""
    gauge, error = Gauge(), OSError()
    async with foreign_nursery() as nursery:
        with pytest.raises(OSError, match=r"^$") as caught:
            if park:
                await run_in(nursery if given else None, gauge.run, 0, 1, error)
            else:
                await run_in(nursery if given else None, fails, error)
        assert not nursery.cancel_scope.cancel_called
        assert not nursery.child_tasks
    assert caught.value is error
    assert error.__context__ is None
    assert error.__cause__ is None


@both
async def test_what_the_operation_handled_stays_the_context(given: bool) -> None:
    """Whatever the caller handles, it is what the error came from."""
    first, error, handled = KeyError("first"), OSError("mine"), ValueError("handled")

    async def op() -> None:
        try:
            raise first
        except KeyError:
            raise error  # noqa: B904 - it is the context that counts here

    async with trio.open_nursery() as nursery:
        try:
            raise handled
        except ValueError:
            with pytest.raises(OSError, match="mine"):
                await run_in(nursery if given else None, op)
    assert error.__context__ is first


@both
async def test_a_group_surfaces_as_the_object_it_is(given: bool) -> None:
    """A group that the function raises is neither wrapped nor opened."""
    group = ExceptionGroup("mine", [OSError(), ValueError()])
    async with foreign_nursery() as nursery:
        with pytest.raises(ExceptionGroup) as caught:
            await run_in(nursery if given else None, fails, group)
    assert caught.value is group


@both
@pytest.mark.parametrize("fatal", [KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("park", [True, False])
async def test_what_is_no_exception_surfaces_here_too(
    autojump_clock: MockClock, given: bool, fatal: type[BaseException], park: bool
) -> None:
    """It reaches the caller, and never crashes the foreign nursery."""
    gauge, error = Gauge(), fatal()
    async with foreign_nursery() as nursery:
        with pytest.raises(BaseException) as caught:  # noqa: PT011 - bare or in a group
            if park:
                await run_in(nursery if given else None, gauge.run, 0, 1, error)
            else:
                await run_in(nursery if given else None, fails, error)
        assert not nursery.cancel_scope.cancel_called
        assert not nursery.child_tasks
    assert leaves(caught.value) == [error]


@both
async def test_cancelling_the_caller_cancels_and_joins_the_child(
    autojump_clock: MockClock, given: bool
) -> None:
    """Also when the nursery lies outside the cancelled scope; a shielded cleanup is waited for."""
    watch, ended = Stopwatch(), list[float]()

    async def careful() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3)
            ended.append(watch.seconds)

    async with foreign_nursery() as nursery:
        with trio.move_on_after(1) as scope:
            await run_in(nursery if given else None, careful)
        assert scope.cancelled_caught
        assert not nursery.child_tasks
        assert not nursery.cancel_scope.cancel_called
    assert ended == [4]


async def test_a_cancelled_callers_child_may_fail(autojump_clock: MockClock) -> None:
    """The error from its cleanup comes out as if it was awaited here; the nursery goes on."""

    async def clumsy() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError

    async with foreign_nursery() as nursery:
        with pytest.raises((OSError, BaseExceptionGroup)) as caught:
            with trio.move_on_after(1):
                await run_in(nursery, clumsy)
        assert [type(leaf) for leaf in leaves(caught.value)] == [OSError]
        assert not nursery.cancel_scope.cancel_called


@both
async def test_a_cancelled_caller_gets_cancelled_even_if_it_did_not_start(given: bool) -> None:
    """In a cancelled scope the call raises Cancelled."""
    gauge = Gauge()
    async with foreign_nursery() as nursery:
        with trio.CancelScope() as scope:
            scope.cancel()
            await run_in(nursery if given else None, gauge.run, 0)
        assert scope.cancelled_caught
        assert not nursery.child_tasks
    assert gauge.finished == []


async def test_a_nursery_that_is_cancelled_during_the_call(autojump_clock: MockClock) -> None:
    """The caller, not cancelled itself, gets OperationsCancelledError; it never hangs."""
    gauge, watch = Gauge(), Stopwatch()
    async with foreign_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1
        with pytest.raises(OperationsCancelledError) as caught:
            await run_in(nursery, gauge.run, 0, 5)
    assert caught.value.failures == ()
    assert (gauge.cancelled, watch.seconds) == ([0], 1)


async def test_a_nursery_that_is_cancelled_before_the_call() -> None:
    """The function is never called."""
    called = list[int]()

    async def operation() -> None:
        called.append(1)

    async with foreign_nursery() as nursery:
        nursery.cancel_scope.cancel()
        with pytest.raises(OperationsCancelledError):
            await run_in(nursery, operation)
    assert called == []


async def test_a_failure_in_a_cancelled_nursery_is_kept(autojump_clock: MockClock) -> None:
    """If the child fails because it is cancelled, that error surfaces here, not at the owner's."""
    error = OSError()

    async def clumsy() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise error

    async with foreign_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1
        with pytest.raises((OperationsCancelledError, OSError)) as caught:
            await run_in(nursery, clumsy)
    raised = caught.value
    assert raised is error or cast("OperationsCancelledError", raised).failures == (error,)


async def test_a_caller_inside_the_cancelled_nursery_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    """There the nursery's cancellation is the caller's own."""
    raised = list[BaseException]()
    async with trio.open_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 1
        try:
            await run_in(nursery, trio.sleep_forever)
        except BaseException as error:
            raised.append(error)
            raise
    assert [type(error) for error in raised] == [trio.Cancelled]


async def test_a_closed_nursery_is_refused() -> None:
    """A RuntimeError, with no coroutine that was never awaited."""
    gauge = Gauge()
    nursery = await closed_nursery()
    with pytest.raises(RuntimeError, match="nursery"):
        await run_in(nursery, gauge.run, 0)
    assert gauge.started == []


@both
async def test_the_policy_is_applied(autojump_clock: MockClock, given: bool) -> None:
    """A retry repeats the function in the child; the last error is itself."""
    errors = iter([OSError(1), OSError(2), None])
    seen = list[tuple[Any, ...]]()

    async def flaky(*args: int) -> str:
        seen.append(args)
        error = next(errors)
        if error is not None:
            raise error
        return "done"

    policy = Retry(max_attempts=3, backoff=Constant(1.0))
    async with foreign_nursery() as nursery:
        where = nursery if given else None
        assert await run_in(where, flaky, 1, 2, policy=policy, name="flaky page") == "done"
        assert seen == [(1, 2)] * 3
        with pytest.raises(OperationTimeoutError):
            await run_in(where, trio.sleep_forever, policy=Timeout(1))
        assert not nursery.cancel_scope.cancel_called


@pytest.mark.parametrize("bad", [5, "retry", Timeout, trio.sleep])
async def test_a_policy_must_be_a_policy(bad: Any) -> None:
    """A class, a function or a number in its place is a TypeError before anything runs."""
    gauge = Gauge()
    with pytest.raises(TypeError, match="policy"):
        await run_in(None, gauge.run, 0, policy=bad)
    assert gauge.started == []


@pytest.mark.parametrize("bad", [object(), 5, trio.sleep])
async def test_a_nursery_must_be_a_nursery(bad: Any) -> None:
    """A forgotten nursery, so that the function is in its place, is a TypeError."""
    with pytest.raises(TypeError, match="nursery"):
        await run_in(bad, trio.sleep, 0)


async def test_a_mistaken_call_shows_the_fix() -> None:
    """run_in(nursery, fetch()) is refused with a hint, and the coroutine closed."""

    async def fetch() -> None:
        raise AssertionError

    coroutine = fetch()
    with pytest.raises(TypeError, match="fetch"):
        await run_in(None, cast("Any", coroutine))
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


@both
async def test_a_function_that_returns_no_awaitable_is_a_bare_type_error(given: bool) -> None:
    """Known only when it is called; the nursery is not crashed."""
    async with foreign_nursery() as nursery:
        with pytest.raises(TypeError):
            await run_in(nursery if given else None, cast("Any", lambda: 3))
        assert not nursery.cancel_scope.cancel_called
