"""run_with_retry: the one-liner, whose attempts are children of the nursery it is given."""

from __future__ import annotations

import datetime as dt
import math
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import outcome
import pytest
import trio

from tests.operations import ancestors, closed_nursery, foreign_nursery, leaves, returns
from tests.test_retry import Script, errors
from trio_resilience import OperationsCancelledError, RetryResult, run_with_retry

if TYPE_CHECKING:
    from trio.testing import MockClock

both = pytest.mark.parametrize("given", [True, False])


async def retry(given: bool, fn: Any, **options: Any) -> RetryResult[Any]:
    """Make the call in a nursery of another task, or in one of its own."""
    async with foreign_nursery() as nursery:
        # Caught inside the block: trio would put an error that leaves it in a group.
        ending: Any = await outcome.acapture(
            partial(run_with_retry, nursery if given else None, fn, jitter=False, **options)
        )
    result: RetryResult[Any] = ending.unwrap()
    return result


@both
async def test_it_tells_the_result_and_what_it_took(autojump_clock: MockClock, given: bool) -> None:
    """Attempts and seconds of waiting; the backoff doubles from one second."""
    script = Script([*errors(2)])
    assert await retry(given, script) == RetryResult("ok", attempts=3, total_delay=3.0)
    assert script.began_at == [0, 1, 3]


async def test_its_options_shape_the_backoff(autojump_clock: MockClock) -> None:
    """Base, multiplier and cap; a timedelta is as good as a number."""
    script = Script([*errors(4)])
    await run_with_retry(
        None,
        script,
        max_attempts=5,
        base_delay=dt.timedelta(seconds=2),
        backoff_multiplier=3,
        max_delay=10,
        jitter=False,
    )
    assert script.began_at == [0, 2, 8, 18, 28]


async def test_it_has_jitter_unless_it_is_told_not_to(autojump_clock: MockClock) -> None:
    """So that clients do not come back together."""
    totals = {(await run_with_retry(None, Script(errors(2)))).total_delay for _ in range(20)}
    assert len(totals) == 20
    assert all(0 <= total <= 3 for total in totals)


async def test_arguments_are_passed_on() -> None:
    """As trio does it."""
    assert (await run_with_retry(None, returns, "x")).result == "x"


@both
async def test_the_last_error_surfaces_here(autojump_clock: MockClock, given: bool) -> None:
    """The same object, with a note; the nursery does not notice."""
    given_errors = errors(9)
    with pytest.raises(OSError, match="failure 3") as caught:
        await retry(given, Script([*given_errors]))
    assert caught.value is given_errors[2]
    assert caught.value.__notes__[0].startswith("run_with_retry: gave up after 3 attempts")


def after_half(_: Exception) -> float:
    return 0.5


@both
@pytest.mark.parametrize("match, calls", [(OSError, 1), ((KeyError, OSError), 3), (after_half, 3)])
async def test_which_errors_are_retried(
    autojump_clock: MockClock, given: bool, match: Any, calls: int
) -> None:
    """`retryable_errors` is what `on` is to Retry."""
    script = Script([KeyError("x")] * 5)
    with pytest.raises(KeyError):
        await retry(given, script, retryable_errors=match)
    assert script.calls == calls


async def test_all_attempts_are_one_child_of_the_nursery(autojump_clock: MockClock) -> None:
    """The task tree shows it, by the operation's name, and it has ended when the call returns."""
    tasks = list[trio.lowlevel.Task]()

    async def op() -> None:
        tasks.append(trio.lowlevel.current_task())
        if len(tasks) < 3:
            raise OSError

    async with foreign_nursery() as nursery:
        await run_with_retry(nursery, op)
        assert len(tasks) == 3
        assert len(set(tasks)) == 1
        assert ancestors(tasks[0])[0] is nursery
        assert "op" in tasks[0].name
        assert not nursery.child_tasks or tasks[0] not in nursery.child_tasks


@both
@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["waiting", "running"])
async def test_cancelling_the_caller_ends_it(
    autojump_clock: MockClock, given: bool, seconds: float
) -> None:
    """Wherever the nursery lies: during an attempt, or between two."""
    script = Script([*errors(9)], seconds)
    async with foreign_nursery() as nursery:
        async with trio.open_nursery() as callers:
            callers.start_soon(
                partial(run_with_retry, nursery if given else None, script, jitter=False)
            )
            await trio.sleep(0.5)
            callers.cancel_scope.cancel()
        assert trio.current_time() == 0.5
        assert not nursery.child_tasks
    assert script.calls == 1


async def test_a_cancelled_nursery_is_an_error_for_the_caller(autojump_clock: MockClock) -> None:
    """Before the call nothing is called; during it, all ends."""
    script = Script()
    async with foreign_nursery() as nursery:
        nursery.cancel_scope.cancel()
        with pytest.raises(OperationsCancelledError):
            await run_with_retry(nursery, script)
    assert script.calls == 0
    script = Script(seconds=60)
    async with foreign_nursery() as nursery, trio.open_nursery() as others:
        others.start_soon(cancel_after, nursery, 2.0)
        with pytest.raises(OperationsCancelledError):
            await run_with_retry(nursery, script)
    assert (script.calls, trio.current_time()) == (1, 2)


async def cancel_after(nursery: trio.Nursery, seconds: float) -> None:
    await trio.sleep(seconds)
    nursery.cancel_scope.cancel()


@both
async def test_the_callers_deadline_is_respected(autojump_clock: MockClock, given: bool) -> None:
    """Also when the nursery has none: it gives up in time, with its own error."""
    async with foreign_nursery() as nursery:
        with trio.move_on_after(2) as scope, pytest.raises(OSError, match="failure 2"):
            await run_with_retry(nursery if given else None, Script([*errors(9)]), jitter=False)
    assert not scope.cancelled_caught
    assert trio.current_time() == 1


@both
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_what_stops_a_program_reaches_the_caller_in_a_group(
    autojump_clock: MockClock, given: bool, stop: type[BaseException]
) -> None:
    """It never crashes a foreign nursery."""
    error = stop("enough")
    script = Script([OSError(), error])
    async with foreign_nursery() as nursery:
        with pytest.raises(BaseExceptionGroup) as caught:
            await run_with_retry(nursery if given else None, script)
        assert leaves(caught.value) == [error]
        await trio.lowlevel.checkpoint()
        assert not nursery.cancel_scope.cancel_called
    assert script.calls == 2


async def test_a_cancelled_caller_calls_nothing() -> None:
    """The call is a checkpoint before anything runs."""
    script = Script()
    with trio.CancelScope() as scope:
        scope.cancel()
        await run_with_retry(None, script)
    assert scope.cancelled_caught
    assert script.calls == 0


# --- at the door --------------------------------------------------------------------------------

BAD: list[tuple[str, object]] = [
    *[("max_attempts", bad) for bad in (0, -1, math.nan, 1.5, True, "5")],
    *[("base_delay", bad) for bad in (-1, math.nan, math.inf, True, "5", None)],
    *[("max_delay", bad) for bad in (-1, math.nan, True, "5", None, 0.5)],
    *[("backoff_multiplier", bad) for bad in (0, 0.5, -1, math.nan, math.inf, True, "2", None)],
    *[("jitter", bad) for bad in (None, 1, "half")],
    *[("retryable_errors", bad) for bad in (BaseException, KeyboardInterrupt, 5, "OSError", None)],
]


@pytest.mark.parametrize("option, value", BAD, ids=repr)
async def test_bad_options_are_refused(option: str, value: object) -> None:
    """By the name they have here, before anything is called."""
    script, run = Script(), cast("Any", run_with_retry)
    with pytest.raises((TypeError, ValueError), match=rf"^`{option}` must be .*, got "):
        await run(None, script, **{option: value})
    assert script.calls == 0


def sync() -> int:
    raise AssertionError("called")


@pytest.mark.parametrize("fn", [sync, 5, None, "fn"], ids=repr)
async def test_what_is_no_async_function_is_refused(fn: Any) -> None:
    """Before it is called."""
    with pytest.raises(TypeError, match="must be an async function"):
        await run_with_retry(None, fn)


async def test_a_coroutine_object_is_refused_and_closed() -> None:
    """With the fix in the message, and no warning later."""
    coro: Any = returns(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match=r"functools\.partial\(returns"):
            await run_with_retry(None, coro)
    assert coro.cr_frame is None


async def test_a_nursery_must_be_one_and_open() -> None:
    """A closed one is a clear error; so is a forgotten one."""
    script, run = Script(), cast("Any", run_with_retry)
    with pytest.raises(TypeError, match="nursery"):
        await run(script, 1)
    with pytest.raises(TypeError, match="nursery"):
        await run(object(), script)
    with pytest.raises(RuntimeError, match="nursery"):
        await run_with_retry(await closed_nursery(), script)
    assert script.calls == 0


async def test_what_returns_no_awaitable_is_never_retried(autojump_clock: MockClock) -> None:
    """Whatever `retryable_errors` says: it is a mistake in the program."""
    called = list[int]()
    fn: Any = lambda: called.append(1)  # noqa: E731
    with pytest.raises(TypeError, match="can't be awaited"):
        await run_with_retry(None, fn, retryable_errors=Exception)
    assert (called, trio.current_time()) == ([1], 0)
