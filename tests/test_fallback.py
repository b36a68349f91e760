"""Fallback: what it stands in for, what it lets through, and what is seen when it fails too."""

from __future__ import annotations

import pickle
import traceback
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints

from tests.operations import fails, returns, within_calls
from tests.test_hedge import at_once
from tests.test_retry_memory import attempt_to, holding
from tests.test_retry_memory import no_collector as no_collector  # noqa: PLC0414 - a fixture
from trio_resilience import (
    BulkheadFullError,
    CallAbandonedError,
    Event,
    OperationTimeoutError,
    RejectedError,
    ResilienceError,
    Retry,
    Timeout,
    subscribe,
)
from trio_resilience._events import FallbackUsed
from trio_resilience._fallback import Fallback, FallbackStatistics
from trio_resilience.testing import test_mode as mode

if TYPE_CHECKING:
    from trio.testing import MockClock


async def describe(error: Exception) -> str:
    """A fallback that says what it was for."""
    await trio.lowlevel.checkpoint()
    return f"instead of {error!r}"


async def fail_too(error: Exception) -> str:
    raise LookupError(f"nor for {error}")


# --- what it gives ------------------------------------------------------------------------------


async def test_a_success_is_returned_as_it_is() -> None:
    """The fallback is not asked."""
    fallback = Fallback(fail_too)
    assert await fallback.call(returns, 3) == 3
    assert fallback.statistics() == FallbackStatistics(calls=1, used=0, failed=0)


async def test_a_failure_gives_way_to_the_value() -> None:
    """The same object every time; also None."""
    values: list[Any] = [None, [], 0, "cached"]
    for value in values:
        fallback = Fallback(value=value)
        assert await fallback.call(fails, OSError()) is value
        assert await fallback.call(fails, OSError()) is value
        assert fallback.statistics() == FallbackStatistics(calls=2, used=2, failed=0)


async def test_the_function_gets_the_error() -> None:
    """A group as a whole."""
    error: Exception
    for error in (OSError("x"), ExceptionGroup("several", [OSError(), KeyError()])):
        got = list[Exception]()

        async def note(given: Exception, got: list[Exception] = got) -> int:
            got.append(given)
            return 7

        assert await Fallback(note).call(fails, error) == 7
        assert got[0] is error
        assert len(got) == 1


async def test_it_decorates() -> None:
    """Name and signature are kept."""

    @Fallback(describe)
    async def load(name: str, *, fast: bool) -> str:
        raise OSError(name, fast)

    assert await load("x", fast=True) == "instead of OSError('x', True)"
    assert load.__name__ == "load"


async def test_fallbacks_in_one_another() -> None:
    """The inner one first; its failure is for the outer."""
    inner, outer = Fallback(fail_too), Fallback(describe)
    assert (
        await outer.call(inner.call, fails, OSError("x")) == "instead of LookupError('nor for x')"
    )


async def test_what_the_function_returns_by_way_of_a_lambda() -> None:
    fallback = Fallback(lambda error: describe(error))  # noqa: PLW0108 - it hides what it is
    assert await fallback.call(fails, OSError("x")) == "instead of OSError('x')"


# --- what it is for -----------------------------------------------------------------------------


def says_x(error: Exception) -> bool:
    return "x" in str(error)


@pytest.mark.parametrize(
    "on, error, is_matched",
    [
        (Exception, ValueError(), True),
        (Exception, BulkheadFullError("b", 1, 2), True),
        (Exception, CallAbandonedError("c"), False),
        (Exception, ExceptionGroup("", [OSError(), CallAbandonedError("c")]), False),
        (Exception, ExceptionGroup("", [OSError(), ValueError()]), True),
        ((Exception, CallAbandonedError), CallAbandonedError("c"), True),
        ((OSError, (Exception,)), CallAbandonedError("c"), False),
        (CallAbandonedError, CallAbandonedError("c"), True),
        (ResilienceError, CallAbandonedError("c"), True),
        (OSError, ConnectionError(), True),
        (OSError, ValueError(), False),
        (OSError, ExceptionGroup("", [OSError(), ValueError()]), False),
        ((OSError, RejectedError), RejectedError(), True),
        (says_x, OSError("x"), True),
        (says_x, OSError("y"), False),
        (at_once, OSError(), True),
    ],
)
async def test_which_errors_it_is_for(on: Any, error: Exception, *, is_matched: bool) -> None:
    """Any by default, but the end of a call that was abandoned; that has to be named."""
    fallback = Fallback(value="instead", on=on)
    if is_matched:
        assert await fallback.call(fails, error) == "instead"
    else:
        with pytest.raises(type(error)) as caught:
            await fallback.call(fails, error)
        assert caught.value is error
        assert not hasattr(error, "__notes__")
    assert fallback.statistics() == FallbackStatistics(calls=1, used=int(is_matched), failed=0)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit, BaseException])
async def test_what_is_no_exception_passes_through(stop: type[BaseException]) -> None:
    """The same object; alone or in a group; nothing is asked, and nothing counted."""
    fallback, error = Fallback(value=1), stop()
    for each in (error, BaseExceptionGroup("", [error, OSError()])):
        with pytest.raises(BaseException) as caught:  # noqa: PT011 - it is told by identity
            await fallback.call(fails, each)
        assert caught.value is each
    assert fallback.statistics() == FallbackStatistics(calls=2, used=0, failed=0)


async def test_a_cancellation_passes_through(autojump_clock: MockClock) -> None:
    fallback = Fallback(value=1)
    with trio.move_on_after(1) as scope:
        await fallback.call(trio.sleep, 5)
    assert scope.cancelled_caught
    assert fallback.statistics() == FallbackStatistics(calls=1, used=0, failed=0)


async def test_an_operation_that_fails_as_it_is_cancelled_is_cancelled(
    autojump_clock: MockClock,
) -> None:
    """There is nobody to give anything to; neither a value nor a function helps."""
    asked = list[Exception]()

    async def note(error: Exception) -> None:
        asked.append(error)

    async def op() -> None:
        try:
            await trio.sleep(5)
        finally:
            raise OSError

    for fallback in (Fallback(value=None), Fallback(note)):
        with trio.move_on_after(1) as scope:
            await fallback.call(op)
        assert scope.cancelled_caught
        assert fallback.statistics() == FallbackStatistics(calls=1, used=0, failed=0)
    assert asked == []


async def test_a_timeout_of_our_own_is_a_failure(autojump_clock: MockClock) -> None:
    """Inside; outside it cancels the fallback, too."""
    timeout = Timeout(1)
    assert await Fallback(value="late").call(timeout.call, trio.sleep, 5) == "late"

    async def dawdle(_: Exception) -> None:
        await trio.sleep(5)

    fallback = Fallback(dawdle)
    with pytest.raises(OperationTimeoutError):
        await timeout.call(fallback.call, fails, OSError())
    assert fallback.statistics() == FallbackStatistics(calls=1, used=0, failed=0)


async def test_it_comes_after_the_last_attempt(autojump_clock: MockClock) -> None:
    """Around a retry."""
    retry = Retry(max_attempts=4)
    assert await Fallback(value=0).call(retry.call, fails, OSError()) == 0
    assert retry.statistics().attempts == 4


# --- when it fails too --------------------------------------------------------------------------


async def test_both_errors_are_visible() -> None:
    """The fallback's comes out, with the operation's as its context, and in a note."""
    fallback, first, second = Fallback(fail_too, name="cache"), OSError("down"), LookupError("too")

    async def fail_with_it(_: Exception) -> int:
        raise second

    with pytest.raises(LookupError) as caught:
        await Fallback(fail_with_it, name="cache").call(fails, first)
    assert caught.value is second
    assert second.__context__ is first
    assert second.__notes__ == ["cache: called because of OSError('down')"]
    shown = "".join(traceback.format_exception(second))
    assert "OSError: down" in shown
    assert not hasattr(first, "__notes__")
    with pytest.raises(LookupError, match="nor for down"):
        await fallback.call(fails, first)
    assert fallback.statistics() == FallbackStatistics(calls=1, used=0, failed=1)


async def test_both_are_visible_also_if_the_context_is_hidden() -> None:
    async def fail_from_none(_: Exception) -> int:
        raise LookupError("too") from None

    with pytest.raises(LookupError) as caught:
        await Fallback(fail_from_none).call(fails, OSError("down"))
    assert "OSError('down')" in "".join(traceback.format_exception(caught.value))


async def test_a_fallback_that_raises_the_same_error_declines() -> None:
    """It comes out as it was."""
    error = OSError("down")

    async def decline(given: Exception) -> int:
        raise given

    with pytest.raises(OSError, match="down") as caught:
        await Fallback(decline).call(fails, error)
    assert caught.value is error
    assert error.__context__ is None
    assert not hasattr(error, "__notes__")


async def test_a_long_error_is_short_in_the_note() -> None:
    with pytest.raises(LookupError) as caught:
        await Fallback(fail_too).call(fails, OSError("x" * 10_000))
    assert len(caught.value.__notes__[0]) < 300


async def test_what_stops_the_program_comes_out_of_a_fallback() -> None:
    """As the object it is; it is no failure."""
    stop = KeyboardInterrupt()
    fallback = Fallback(partial(_raise, stop))
    with pytest.raises(KeyboardInterrupt) as caught:
        await fallback.call(fails, OSError())
    assert caught.value is stop
    assert not hasattr(stop, "__notes__")
    assert fallback.statistics() == FallbackStatistics(calls=1, used=0, failed=0)


async def _raise(error: BaseException, _: Exception) -> int:
    raise error


@pytest.mark.parametrize("ending", [describe, fail_too, "value"])
async def test_nothing_is_kept_alive(no_collector: None, ending: Any) -> None:
    """When the call is over and its error handled, the frames of the operation are freed."""

    async def form(fallback: Any, op: Any) -> Any:
        return await fallback.call(op)

    held = list[weakref.ref[Any]]()
    fallback: Any = Fallback(value=1) if ending == "value" else Fallback(ending)
    await attempt_to(form, fallback, holding(held, OSError))
    assert [ref() for ref in held] == [None]


async def test_nothing_refers_in_circles(no_collector: None) -> None:
    fallback = Fallback(value=1)
    await fallback.call(holding([], OSError))
    ref = weakref.ref(fallback)
    del fallback
    assert ref() is None


# --- manners ------------------------------------------------------------------------------------


async def test_the_fast_path_adds_no_checkpoint() -> None:
    """And what comes instead of a failure is one, however quick both are."""
    with assert_no_checkpoints():
        await Fallback(value=1).call(returns, 1)
    with assert_checkpoints():
        await Fallback(value=1).call(fails, OSError())
    with assert_checkpoints():
        await Fallback(returns).call(fails, OSError())


async def test_listeners_hear_of_it() -> None:
    """When the fallback's result is there; of its failure the caller hears."""
    heard, error = list[Event](), OSError("x")
    with subscribe(within_calls(heard.append)):
        await Fallback(describe, name="cache").call(fails, error)
        await Fallback(value=1).call(fails, error, name="named")
        with pytest.raises(LookupError):
            await Fallback(fail_too).call(fails, error)
        await Fallback(describe).call(returns, 1)
    assert [type(event) for event in heard] == [FallbackUsed, FallbackUsed]
    assert [(event.policy, event.operation) for event in heard] == [
        ("cache", "fails"),
        ("fallback", "named"),
    ]
    assert all(isinstance(event, FallbackUsed) and event.error is error for event in heard)


async def test_a_tests_block_counts_for_itself() -> None:
    fallback = Fallback(value=1)
    await fallback.call(fails, OSError())
    with mode():
        assert fallback.statistics() == FallbackStatistics(0, 0, 0)
        await fallback.call(returns, 1)
        assert fallback.statistics() == FallbackStatistics(1, 0, 0)
    assert fallback.statistics() == FallbackStatistics(1, 1, 0)


async def test_mistakes_are_no_failures() -> None:
    """A function that turns out not to be async: no fallback helps, and nothing is counted."""
    fallback = Fallback(value=1)
    wrong: Any = lambda: 3  # noqa: E731 - a lambda is what it is about
    with pytest.raises(TypeError, match="must be an async function, but it returned 3"):
        await fallback.call(wrong)
    assert fallback.statistics() == FallbackStatistics(0, 0, 0)
    fallback = Fallback(lambda error: wrong(*[error][:0]))
    with pytest.raises(TypeError, match="must be an async function, but it returned 3"):
        await fallback.call(fails, OSError())
    assert fallback.statistics() == FallbackStatistics(1, 0, 0)


def test_it_is_immutable() -> None:
    """Whoever shares it can rely on what it was made for."""
    fallback: Any = Fallback(value=1)
    with pytest.raises(AttributeError):
        fallback.on = OSError


def test_it_shows_what_it_gives() -> None:
    assert repr(Fallback(describe, on=OSError)) == (
        "Fallback(describe, on=OSError, name='fallback')"
    )
    assert repr(Fallback(value=3, name="n")) == ("Fallback(value=3, on=Exception, name='n')")


async def test_it_can_be_pickled() -> None:
    """As far as what it is given can be."""
    for fallback in (Fallback(describe), Fallback(value="x")):
        copy = pickle.loads(pickle.dumps(fallback))  # noqa: S301 - our own
        assert await copy.call(fails, OSError()) == await fallback.call(fails, OSError())
        assert repr(copy) == repr(fallback)


def _sync(_: Exception) -> int:
    return 3


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((), {}, "pass either an async function or `value`, got neither"),
        ((describe,), {"value": 3}, "pass either an async function or `value`, got both"),
        (
            (_sync,),
            {},
            "`async_fn` must be an async function, got the sync _sync.*write `Fallback",
        ),
        (("cached",), {}, "`async_fn` must be an async function, got 'cached'; for a plain value"),
        ((describe,), {"on": 3}, "`on` must be an Exception type"),
        ((describe,), {"on": KeyboardInterrupt}, "`on` must be an Exception type"),
    ],
)
def test_wrong_options_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Fallback(*arguments, **options)


def test_a_coroutine_object_is_refused_and_closed() -> None:
    """Without a warning that nobody has awaited it."""
    wrong: Any = describe(OSError())
    with pytest.raises(TypeError, match="got a coroutine object"):
        Fallback(wrong)
