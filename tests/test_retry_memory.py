"""That nothing grows with the attempts of Retry, and that it keeps nothing alive."""

from __future__ import annotations

import contextlib
import gc
import traceback
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.test_retry import Script, errors, exactly, is_busy
from tests.test_retry_endings import forms, timed
from trio_resilience import Constant, RejectedError, Retry, transient
from trio_resilience._checks import NotAnOperationError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from random import Random

    from trio.testing import MockClock


def depth(error: BaseException) -> int:
    return len(list(traceback.walk_tb(error.__traceback__)))


def contexts(error: BaseException) -> int:
    """How many errors hang on *error* as contexts, one on the other."""
    count, context = 0, error.__context__
    while context is not None and count < 1000:
        count, context = count + 1, context.__context__
    return count


def one(error: OSError) -> Iterator[Exception]:
    while True:
        yield error


def two(error: OSError) -> Iterator[Exception]:
    while True:
        yield error
        yield OSError("another")


def alternating(error: OSError) -> Iterator[Exception]:
    other = OSError("the other")
    while True:
        yield other
        yield error


def chained(error: OSError) -> Iterator[Exception]:
    while True:
        other = OSError("new")
        other.__cause__ = error
        yield other
        yield error


@forms
@timed
@pytest.mark.parametrize("errors_of", [one, two, alternating, chained])
async def test_tracebacks_do_not_grow_with_the_attempts(
    autojump_clock: MockClock, form: Any, options: dict[str, Any], errors_of: Any
) -> None:
    """Five hundred attempts that raise the same instance, or come back to it."""
    error = OSError("always this one")
    source = errors_of(error)

    async def op() -> None:
        raise next(source)

    with pytest.raises(OSError, match=r"this one|another|other|new") as caught:
        await form(exactly(max_attempts=500, backoff=Constant(1), **options), op)
    assert depth(caught.value) < 50
    assert depth(error) < 50
    assert contexts(caught.value) <= 2


@forms
async def test_the_leaves_of_groups_do_not_grow_either(
    autojump_clock: MockClock, form: Any
) -> None:
    """A nursery makes a new group of the same error each time."""
    error = OSError("always this one")

    async def op() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Script([error]))

    with pytest.raises(ExceptionGroup) as caught:
        await form(exactly(max_attempts=500, backoff=Constant(1)), op)
    assert depth(caught.value) < 50
    assert depth(error) < 50
    assert contexts(caught.value) <= 2


@forms
@timed
async def test_distinct_errors_are_not_chained(
    autojump_clock: MockClock, form: Any, options: dict[str, Any]
) -> None:
    """Each attempt is made outside the handling of the failure before it."""
    with pytest.raises(OSError, match="failure 500") as caught:
        await form(exactly(max_attempts=500, backoff=Constant(1), **options), Script(errors(500)))
    assert contexts(caught.value) == 0
    assert depth(caught.value) < 50


@forms
@timed
async def test_what_the_caller_handles_keeps_its_traceback(
    autojump_clock: MockClock, form: Any, options: dict[str, Any]
) -> None:
    """A call made in an `except` block: that error is the context of all, and not ours to trim."""
    try:
        dict[str, int]()["handled"]
    except KeyError as error:
        handled, before = error, error.__traceback__
        with pytest.raises(OSError, match="failure 3") as caught:
            await form(exactly(**options), Script(errors(3)))
        assert caught.value.__context__ is handled
        assert handled.__traceback__ is before is not None
        # Also when the operation raises that very error.
        await form(exactly(on=KeyError, **options), Script([handled]))
        assert handled.__traceback__ is not None


class Local:
    """Something that an operation holds, to see whether it is let go."""


def holding(held: list[weakref.ref[Local]], *steps: Any) -> Callable[[], Awaitable[Any]]:
    """An operation with a local of its own, to which it leaves a weak reference in *held*.

    It raises the types in *steps*, anew each time: an error that the test itself keeps would keep
    the frames that it went through.
    """

    async def op() -> Any:
        local = Local()
        held.append(weakref.ref(local))
        await trio.lowlevel.checkpoint()
        step = steps[len(held) - 1] if len(held) <= len(steps) else "ok"
        if isinstance(step, type):
            raise step("again")
        return step

    return op


async def attempt_to(form: Any, policy: Retry, op: Callable[[], Awaitable[Any]]) -> None:
    """Make the call and handle what comes out, as a program would."""
    with contextlib.suppress(BaseException):
        await form(policy, op)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the collector, what is part of a cycle is never let go."""
    gc.disable()
    yield
    gc.enable()


def one_delay(_: Random) -> Iterator[float]:
    return iter([1.0])


def bad_second_delay(_: Random) -> Iterator[float]:
    return iter([1.0, -1.0])


def raises_on_value_error(error: Exception) -> bool:
    if isinstance(error, ValueError):
        raise ZeroDivisionError
    return True


def raises_on_ok(result: object) -> bool:
    if result == "ok":
        raise ZeroDivisionError
    return True


ENDINGS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "success": ([], {}),
    "success after failures": ([OSError, OSError], {}),
    "exhausted": ([OSError] * 3, {}),
    "not retried": ([ValueError], {}),
    "not retried at last": ([OSError, ValueError], {}),
    "no time left": ([OSError, OSError], {"total_timeout": 2}),
    "refused results": (["busy"] * 3, {"retry_result": is_busy}),
    "predicate raises": ([OSError, ValueError], {"on": raises_on_value_error}),
    "backoff is wrong": ([OSError, OSError], {"backoff": bad_second_delay}),
    "retry_result raises": ([OSError, "busy"], {"retry_result": raises_on_ok}),
    "refused at last": ([OSError, RejectedError], {"on": transient}),
    "backoff ends": ([OSError] * 3, {"backoff": one_delay}),
}  # fmt: skip


@forms
@timed
@pytest.mark.parametrize("steps, more", ENDINGS.values(), ids=ENDINGS)
async def test_nothing_is_kept_alive(
    autojump_clock: MockClock,
    no_collector: None,
    form: Any,
    options: dict[str, Any],
    steps: list[Any],
    more: dict[str, Any],
) -> None:
    """When the call is over and its error handled, the frames of the operation are freed."""
    held = list[weakref.ref[Local]]()
    await attempt_to(form, exactly(**options, **more), holding(held, *steps))
    assert held
    assert [ref() for ref in held] == [None] * len(held)


class AgainError(OSError):
    """There may be weak references to it."""


@forms
@timed
async def test_an_instance_that_every_attempt_raises_is_not_kept_alive(
    autojump_clock: MockClock, no_collector: None, form: Any, options: dict[str, Any]
) -> None:
    """It leads to the call that it came out of, which has let go of it."""
    steps = [AgainError("same")] * 3
    ref = weakref.ref(steps[0])

    async def op() -> None:
        raise steps.pop()

    await attempt_to(form, exactly(**options), op)
    assert steps == []
    assert ref() is None


@forms
@timed
async def test_nothing_is_kept_alive_by_a_cancelled_wait(
    autojump_clock: MockClock, no_collector: None, form: Any, options: dict[str, Any]
) -> None:
    """The failure before it is forgotten with the call."""
    held = list[weakref.ref[Local]]()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(form, exactly(**options), holding(held, OSError, OSError, OSError))
        await trio.sleep(2)
        nursery.cancel_scope.cancel()
    await trio.lowlevel.checkpoint()
    assert [ref() for ref in held] == [None, None]


@forms
@pytest.mark.parametrize("stop", [KeyboardInterrupt, NotAnOperationError])
async def test_nothing_is_kept_alive_by_what_ends_the_whole_job(
    autojump_clock: MockClock, no_collector: None, form: Any, stop: type[BaseException]
) -> None:
    """At the second attempt, when there is an earlier failure."""
    held = list[weakref.ref[Local]]()
    await attempt_to(form, exactly(), holding(held, OSError, stop))
    assert [ref() for ref in held] == [None, None]


async def leave_after_failure(policy: Retry, op: Callable[[], Awaitable[Any]]) -> None:
    async for attempt in policy.attempts():
        with attempt:
            await op()
        if attempt.number == 2:
            break


@timed
async def test_nothing_is_kept_alive_by_leaving_a_loop(
    autojump_clock: MockClock, no_collector: None, options: dict[str, Any]
) -> None:
    """Between two attempts, when the last one has failed and nobody waits for another."""
    held = list[weakref.ref[Local]]()
    await leave_after_failure(exactly(**options), holding(held, OSError, OSError))
    assert [ref() for ref in held] == [None, None]
