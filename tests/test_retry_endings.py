"""What Retry lets through at once and untouched: everything that is no `Exception`."""

from __future__ import annotations

import traceback
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.operations import leaves, reachable
from tests.test_retry import Script, always, errors, exactly
from trio_resilience import (
    CircuitBreaker,
    CircuitOpenError,
    Constant,
    Event,
    RejectedError,
    Retry,
    RetryGaveUp,
    RetryScheduled,
    RetryStatistics,
    subscribe,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


def is_not_value_error(error: Exception) -> bool:
    return not isinstance(error, ValueError)


GREEDY: list[Any] = [Exception, always, is_not_value_error]

greedy = pytest.mark.parametrize("on", GREEDY, ids=["type", "always", "not"])
stops = pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit, GeneratorExit])


async def by_call(retry: Retry, op: Callable[[], Awaitable[Any]]) -> Any:
    return await retry.call(op)


async def by_count(retry: Retry, op: Callable[[], Awaitable[Any]]) -> Any:
    return (await retry.call_counted(op)).result


async def by_decorator(retry: Retry, op: Callable[[], Awaitable[Any]]) -> Any:
    return await retry(op)()


async def by_attempts(retry: Retry, op: Callable[[], Awaitable[Any]]) -> Any:
    result: Any = None
    async for attempt in retry.attempts():
        with attempt:
            result = await op()
            attempt.set_result(result)
    return result


forms = pytest.mark.parametrize("form", [by_call, by_count, by_decorator, by_attempts])
timed = pytest.mark.parametrize("options", [{}, {"attempt_timeout": 60}], ids=["plain", "timed"])


# --- only Exception is handled ------------------------------------------------------------------


@forms
@greedy
@timed
@stops
@pytest.mark.parametrize("before", [0, 1])
async def test_what_stops_a_program_passes_through(
    autojump_clock: MockClock,
    form: Any,
    on: Any,
    options: dict[str, Any],
    stop: type[BaseException],
    before: int,
) -> None:
    """At once, as the same object; no hook is asked, and no verdict is counted."""
    asked, told = list[BaseException](), list[object]()

    def judge(error: Exception) -> bool:
        asked.append(error)
        return bool(on(error)) if not isinstance(on, type) else True

    error = stop("enough")
    script = Script([*errors(before), error])
    policy = exactly(on=judge, on_retry=told.append, **options)
    with pytest.raises(stop) as caught:
        await form(policy, script)
    assert caught.value is error
    assert not hasattr(error, "__notes__")
    assert (script.calls, len(asked), len(told)) == (before + 1, before, before)
    statistics = policy.statistics()
    assert (statistics.recovered, statistics.given_up) == (0, 0)


@forms
@greedy
@timed
async def test_a_cancelled_attempt_is_not_retried(
    autojump_clock: MockClock, form: Any, on: Any, options: dict[str, Any]
) -> None:
    """Nor judged, counted or announced: `Cancelled` reaches its scope."""
    told, script = list[object](), Script(seconds=9)
    policy = exactly(on=on, on_retry=told.append, **options)
    with trio.move_on_after(2) as scope:
        await form(policy, script)
    assert scope.cancelled_caught
    assert (script.calls, told, trio.current_time()) == (1, [], 2)
    assert policy.statistics() == RetryStatistics(1, 1, 0, 0)


@forms
@greedy
@timed
async def test_a_cancelled_wait_is_the_end(
    autojump_clock: MockClock, form: Any, on: Any, options: dict[str, Any]
) -> None:
    """Nothing is called after it, and the failure before it is not counted as given up."""
    script, policy = Script([*errors(9)]), exactly(on=on, max_attempts=None, **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(form, policy, script)
        await trio.sleep(2)
        nursery.cancel_scope.cancel()
    assert (script.began_at, trio.current_time()) == ([0, 1], 2)
    assert policy.statistics() == RetryStatistics(1, 2, 0, 0)


@forms
async def test_a_hook_that_cancels_is_obeyed(form: Any) -> None:
    """A cancellation by `on_retry` takes effect in the wait: nothing is called after it."""
    script = Script([*errors(9)])
    with trio.CancelScope() as scope:

        def on_retry(_: object) -> None:
            scope.cancel()

        await form(exactly(on_retry=on_retry), script)
    assert scope.cancelled_caught
    assert script.calls == 1


@forms
@greedy
@pytest.mark.parametrize("delay", [0, 1])
async def test_a_failure_while_being_cancelled_is_not_retried(
    autojump_clock: MockClock, form: Any, on: Any, delay: float
) -> None:
    """The call ends with its cancellation: nothing is announced, and nobody has given up."""
    told, listener, calls = list[object](), list[Event](), 0
    policy = exactly(on=on, on_retry=told.append, max_attempts=None, backoff=Constant(delay))

    async def op() -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            scope.cancel()
        raise OSError("in the clean-up")

    with trio.CancelScope() as scope, subscribe(listener.append):
        await form(policy, op)
    assert scope.cancelled_caught
    assert (calls, len(told), policy.statistics().given_up) == (2, 1, 0)
    assert [type(event) for event in listener].count(RetryScheduled) == 1
    assert RetryGaveUp not in {type(event) for event in listener}


@forms
@greedy
async def test_a_group_with_a_cancellation_is_not_retried(
    autojump_clock: MockClock, form: Any, on: Any
) -> None:
    """A real one, beside a real failure: it reaches its scope, and the failure is not lost."""
    calls = 0

    async def fail_late() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ConnectionError("in the clean-up")

    async def op() -> None:
        nonlocal calls
        calls += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_late)
            nursery.start_soon(trio.sleep_forever)

    policy = exactly(on=on)
    with pytest.raises(BaseExceptionGroup) as caught, trio.move_on_after(2) as scope:
        await form(policy, op)
    assert [str(leaf) for leaf in leaves(caught.value)] == ["in the clean-up"]
    assert scope.cancelled_caught
    assert (calls, policy.statistics().given_up) == (1, 0)


@forms
@greedy
@stops
async def test_a_group_with_a_stop_is_not_retried(
    form: Any, on: Any, stop: type[BaseException]
) -> None:
    """However deep it is in it."""
    group = BaseExceptionGroup("1", [OSError(), BaseExceptionGroup("2", [stop()])])
    script = Script([group])
    with pytest.raises(BaseExceptionGroup) as caught:
        await form(exactly(on=on), script)
    assert caught.value is group
    assert script.calls == 1


@pytest.mark.parametrize("strict", [True, False])
def test_groups_are_judged_also_without_strict_groups(strict: bool) -> None:
    """A nursery's single failure may come as a group or bare: both are retried."""
    calls = 0

    async def op() -> None:
        nonlocal calls
        calls += 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Script([OSError("down")]))

    clock = trio.testing.MockClock(autojump_threshold=0)
    with warnings.catch_warnings(), pytest.raises(ExceptionGroup if strict else OSError):
        warnings.simplefilter("ignore", trio.TrioDeprecationWarning)
        trio.run(exactly().call, op, clock=clock, strict_exception_groups=strict)
    assert calls == 3


@forms
async def test_causes_and_contexts_are_kept(autojump_clock: MockClock, form: Any) -> None:
    """What the operation said about its error is part of it."""
    causes = list[Exception]()

    async def op() -> None:
        try:
            dict[str, int]()["cause"]
        except KeyError as error:
            causes.append(error)
            raise OSError("effect") from error

    with pytest.raises(OSError, match="effect") as caught:
        await form(exactly(), op)
    assert len(causes) == 3
    assert caught.value.__cause__ is caught.value.__context__ is causes[-1]
    assert causes[-1].__context__ is None


@forms
@timed
async def test_a_refusal_after_a_failure_has_that_as_its_cause(
    autojump_clock: MockClock, form: Any, options: dict[str, Any]
) -> None:
    """Nothing was run: what there is to know is in what was raised when something was."""
    failures, refusals = errors(2), [RejectedError() for _ in range(3)]
    policy = exactly(max_attempts=5, on=(OSError, RejectedError), **options)
    with pytest.raises(RejectedError) as caught:
        await form(policy, Script([*failures, *refusals]))
    assert caught.value is refusals[-1]
    assert caught.value.__cause__ is failures[-1]
    assert [refusal.__cause__ for refusal in refusals[:-1]] == [None, None]
    assert len(reachable(caught.value)) == 2


async def test_the_cause_of_a_refusal_shows_where_it_failed(autojump_clock: MockClock) -> None:
    with pytest.raises(CircuitOpenError) as caught:
        await exactly(on=OSError).call(CircuitBreaker(failure_threshold=1).call, Script(errors(1)))
    assert isinstance(caught.value.__cause__, OSError)
    shown = [entry.name for entry in traceback.extract_tb(caught.value.__cause__.__traceback__)]
    assert shown == ["__call__"]


@forms
async def test_other_refusals_have_no_such_cause(autojump_clock: MockClock, form: Any) -> None:
    """If nothing was run before, or it says itself what has led to it; nor has another error."""
    (told, known, other), cause = (
        [RejectedError(), RejectedError(), ValueError()],
        OSError(),
    )
    known.__cause__ = cause
    for steps, expected in (
        ([told], None),
        ([OSError(), known], cause),
        ([OSError(), other], None),
    ):
        with pytest.raises((RejectedError, ValueError)) as caught:
            await form(exactly(on=OSError), Script(steps))
        assert caught.value.__cause__ is expected


@pytest.mark.parametrize("error", [StopIteration("a"), StopAsyncIteration("b")], ids=repr)
@pytest.mark.parametrize("on", [Exception, OSError])
async def test_errors_that_python_treats_specially_stay_themselves(
    autojump_clock: MockClock, error: Exception, on: Any
) -> None:
    """A block may raise them, and gets them back."""
    count = 0
    with pytest.raises(type(error)) as caught:
        async for attempt in exactly(on=on).attempts():
            with attempt:
                count += 1
                raise error
    assert caught.value is error
    assert count == (3 if on is Exception else 1)
