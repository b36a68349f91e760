"""Timeout: whose limit expired, what is cancelled, and what comes out."""

from __future__ import annotations

import contextlib
import datetime as dt
import gc
import math
import pickle
import weakref
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing

from tests.operations import fails, leaves, returns
from tests.test_retry_memory import no_collector as no_collector  # noqa: PLC0414 - a fixture
from trio_resilience import OperationTimeoutError, Timeout, TimeoutStatistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


async def by_call(timeout: Timeout, fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    return await timeout.call(fn, *args)


async def by_decorator(timeout: Timeout, fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    return await timeout(fn)(*args)


async def by_scope(timeout: Timeout, fn: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    with timeout.scope():
        return await fn(*args)


forms = pytest.mark.parametrize("form", [by_call, by_decorator, by_scope])


@forms
async def test_what_is_in_time_is_returned(autojump_clock: MockClock, form: Any) -> None:
    """As it is; nothing times out."""
    timeout = Timeout(5)
    assert await form(timeout, returns, "ok") == "ok"
    await form(timeout, trio.sleep, 4.999)
    assert timeout.statistics() == TimeoutStatistics(calls=2, timed_out=0)


@forms
async def test_what_takes_too_long_is_cancelled(autojump_clock: MockClock, form: Any) -> None:
    """At the limit, with an error that is trio's own kind, too; the machinery does not show."""
    timeout = Timeout(5)
    with pytest.raises(OperationTimeoutError) as caught:
        await form(timeout, trio.sleep, 60)
    assert isinstance(caught.value, trio.TooSlowError)
    assert (caught.value.timeout, trio.current_time()) == (5, 5)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert timeout.statistics() == TimeoutStatistics(1, 1)


async def test_the_message_names_the_operation(autojump_clock: MockClock) -> None:
    """By its own name, or the one given."""
    with pytest.raises(OperationTimeoutError, match=r"^sleep took longer than 5 s$"):
        await Timeout(5).call(trio.sleep, 60)
    with pytest.raises(OperationTimeoutError, match=r"^nap took longer than 5 s$"):
        await Timeout(5).call(trio.sleep, 60, name="nap")


# --- whose limit it was -------------------------------------------------------------------------


@forms
async def test_an_outer_scope_that_expires_first_is_a_cancellation(
    autojump_clock: MockClock, form: Any
) -> None:
    """Nothing of ours is raised or counted."""
    timeout = Timeout(5)
    with trio.move_on_after(1) as scope:
        await form(timeout, trio.sleep_forever)
    assert scope.cancelled_caught
    assert trio.current_time() == 1
    assert timeout.statistics().timed_out == 0


@forms
async def test_an_outer_scope_that_would_expire_later_is_left_alone(
    autojump_clock: MockClock, form: Any
) -> None:
    """The error is ours, inside of it."""
    with trio.move_on_after(5) as scope, pytest.raises(OperationTimeoutError):
        await form(Timeout(1), trio.sleep_forever)
    assert not scope.cancelled_caught
    assert trio.current_time() == 1


@forms
async def test_at_the_same_instant_the_outer_scope_wins(
    autojump_clock: MockClock, form: Any
) -> None:
    """Whichever was opened first; no error, nothing counted."""
    timeout = Timeout(1)
    with trio.move_on_after(1) as scope:
        await form(timeout, trio.sleep_forever)
    assert scope.cancelled_caught
    assert timeout.statistics().timed_out == 0


@forms
@pytest.mark.parametrize("seconds, ours", [((1, 3), 1), ((3, 1), 1), ((2, 2), 2)])
async def test_nested_timeouts(
    autojump_clock: MockClock, form: Any, seconds: tuple[float, float], ours: float
) -> None:
    """The one that expires raises; of two at the same instant, the outer one."""
    outer, inner = Timeout(seconds[0], name="outer"), Timeout(seconds[1], name="inner")
    with pytest.raises(OperationTimeoutError) as caught:
        await form(outer, form, inner, trio.sleep_forever)
    assert (caught.value.timeout, trio.current_time()) == (ours, ours)
    assert outer.statistics().timed_out == (0 if seconds == (3, 1) else 1)
    assert inner.statistics().timed_out == (1 if seconds == (3, 1) else 0)


@forms
async def test_the_operations_own_too_slow_error_is_its_own(form: Any) -> None:
    """It passes through as it is, and is not counted as a timeout of this policy."""
    own, timeout = trio.TooSlowError("of the operation"), Timeout(5)
    with pytest.raises(trio.TooSlowError) as caught:
        await form(timeout, fails, own)
    assert caught.value is own
    assert timeout.statistics().timed_out == 0


@forms
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
async def test_whatever_is_raised_passes_through(form: Any, stop: type[BaseException]) -> None:
    """The same object, without a note, not counted as a timeout."""
    error, timeout = stop("enough"), Timeout(5)
    with pytest.raises(stop) as caught:
        await form(timeout, fails, error)
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert timeout.statistics() == TimeoutStatistics(1, 0)


@forms
async def test_an_error_at_the_limit_is_the_operations(
    autojump_clock: MockClock, form: Any
) -> None:
    """It turned the cancellation into an error of its own: that is not lost."""

    async def op() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ConnectionError("in the clean-up")

    timeout = Timeout(5)
    with pytest.raises(ConnectionError, match="in the clean-up"):
        await form(timeout, op)
    assert timeout.statistics().timed_out == 0


@forms
async def test_a_failure_beside_the_cancellation_is_not_lost(
    autojump_clock: MockClock, form: Any
) -> None:
    """A nursery in the operation raises both: what is left when ours is taken out comes out."""

    async def clean_up() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ConnectionError("in the clean-up")

    async def op() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(clean_up)
            nursery.start_soon(trio.sleep_forever)

    with pytest.raises(ExceptionGroup) as caught:
        await form(Timeout(5), op)
    assert [str(leaf) for leaf in leaves(caught.value)] == ["in the clean-up"]
    assert trio.current_time() == 5


# --- results ------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("seconds", [5, 6])
async def test_a_result_that_arrives_is_never_thrown_away(
    autojump_clock: MockClock, form: Any, seconds: float
) -> None:
    """Shielded, it ends at the limit or after it, without another checkpoint: it counts."""

    async def op() -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(seconds)
        return "acquired"

    timeout = Timeout(5)
    assert await form(timeout, op) == "acquired"
    assert timeout.statistics().timed_out == 0


@forms
async def test_no_time_at_all(autojump_clock: MockClock, form: Any) -> None:
    """Zero lets an operation run to its first checkpoint."""
    assert await form(Timeout(0), returns, "ok") == "ok"
    with pytest.raises(OperationTimeoutError):
        await form(Timeout(0), trio.lowlevel.checkpoint)
    assert trio.current_time() == 0


@forms
async def test_no_limit_at_all(autojump_clock: MockClock, form: Any) -> None:
    """Infinity never expires."""
    await form(Timeout(math.inf), trio.sleep, 1e9)


# --- one object, many calls ---------------------------------------------------------------------


@forms
async def test_the_limit_counts_from_each_call(autojump_clock: MockClock, form: Any) -> None:
    """Not from when the policy was made; three times with the same object."""
    timeout = Timeout(5)
    for start in (100, 200, 300):
        await trio.sleep_until(start)
        with pytest.raises(OperationTimeoutError):
            await form(timeout, trio.sleep_forever)
        assert trio.current_time() == start + 5


@forms
async def test_one_object_in_many_tasks(autojump_clock: MockClock, form: Any) -> None:
    """Each has its own limit, and one that expires cancels no other."""
    timeout, ended = Timeout(5), dict[int, float]()

    async def use(index: int) -> None:
        await trio.sleep(index)
        with pytest.raises(OperationTimeoutError):
            await form(timeout, trio.sleep_forever)
        ended[index] = trio.current_time()

    async with trio.open_nursery() as nursery:
        for index in range(20):
            nursery.start_soon(use, index)
        await form(timeout, trio.sleep, 4)
    assert ended == {index: index + 5 for index in range(20)}
    assert timeout.statistics() == TimeoutStatistics(21, 20)


def test_an_object_outlives_a_run() -> None:
    """Made before any, used in two; its counts survive, and it can be shown outside of them."""
    timeout = Timeout(5, name="db")
    for _ in range(2):
        with pytest.raises(OperationTimeoutError):
            trio.run(
                timeout.call,
                trio.sleep_forever,
                clock=trio.testing.MockClock(autojump_threshold=0),
            )
    assert timeout.statistics() == TimeoutStatistics(2, 2)
    assert repr(timeout) == "Timeout(seconds=5.0, name='db')"


@forms
async def test_the_operation_sees_the_deadline(autojump_clock: MockClock, form: Any) -> None:
    """`trio.current_effective_deadline()` is the nearer one."""
    seen = list[float]()

    async def op() -> None:
        seen.append(trio.current_effective_deadline())

    await form(Timeout(5), op)
    with trio.move_on_after(3):
        await form(Timeout(5), op)
    assert seen == [5, 3]


# --- scope() ------------------------------------------------------------------------------------


async def test_a_scope_is_a_cancel_scope(autojump_clock: MockClock) -> None:
    """It may be shielded from what is outside of it; the limit is inside."""
    timeout = Timeout(5)
    with trio.move_on_after(1), pytest.raises(OperationTimeoutError), timeout.scope() as scope:
        assert isinstance(scope, trio.CancelScope)
        scope.shield = True
        await trio.sleep_forever()
    assert trio.current_time() == 5


async def test_a_scope_that_is_cancelled_by_hand_has_not_timed_out(
    autojump_clock: MockClock,
) -> None:
    """Whoever cancels it before its time leaves the block, as with any scope."""
    timeout = Timeout(5)
    with timeout.scope() as scope:
        scope.cancel()
        await trio.sleep_forever()
    assert scope.cancelled_caught
    with timeout.scope() as scope:
        await trio.sleep(4)
        scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.sleep(4)
        await trio.lowlevel.checkpoint()
    assert trio.current_time() == 8
    assert timeout.statistics().timed_out == 0


# --- at the door --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [-1, -0.001, math.nan, -math.inf, True, False, "5", None, [1], 1j, dt.timedelta(-1), 10**400],
    ids=lambda value: repr(value)[:20],
)
def test_bad_limits_are_refused(value: Any) -> None:
    """When the policy is made, in the house's wording."""
    with pytest.raises((TypeError, ValueError), match=r"^`seconds` must be "):
        Timeout(value)


def test_what_may_be_given() -> None:
    """Any number of seconds, or a timedelta; the name is a keyword."""
    assert Timeout(dt.timedelta(milliseconds=1500)).seconds == 1.5
    assert Timeout(5).name == "timeout"
    with pytest.raises(TypeError, match="positional"):
        Timeout(5, "db")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        Timeout(5).seconds = 6  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def test_a_timeout_can_be_pickled() -> None:
    """With its configuration."""
    again = pickle.loads(pickle.dumps(Timeout(5, name="db")))  # noqa: S301 - it is our own
    assert (again.seconds, again.name) == (5, "db")


@forms
async def test_nothing_is_kept_alive(
    autojump_clock: MockClock, no_collector: None, form: Any
) -> None:
    """After a timeout was handled, the frames of the operation are freed."""

    class Local:
        pass

    held = list[weakref.ref[Local]]()

    async def op() -> None:
        local = Local()
        held.append(weakref.ref(local))
        await trio.sleep_forever()

    with contextlib.suppress(OperationTimeoutError):
        await form(Timeout(1), op)
    await trio.lowlevel.checkpoint()
    assert not gc.isenabled()
    assert [ref() for ref in held] == [None]
