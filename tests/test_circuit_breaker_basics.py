"""CircuitBreaker: what its calls, blocks, handles and probes do, tell and refuse."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Awaitable, Callable
from datetime import timedelta
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests.operations import fails, returns, within_calls
from trio_resilience import (
    CallAbandonedError,
    CircuitOpenError,
    Event,
    OperationsCancelledError,
    Rejected,
    RejectedError,
    Timeout,
    subscribe,
)
from trio_resilience._circuit_breaker import CircuitBreaker, CircuitBreakerStatistics
from trio_resilience._events import CircuitState, CircuitStateChanged, RejectionSkipped

if TYPE_CHECKING:
    from trio.testing import MockClock

    Form = Callable[..., Awaitable[Any]]

CLOSED, OPEN, HALF_OPEN, ISOLATED = CircuitState


async def by_call(breaker: CircuitBreaker, fn: Any, *args: Any) -> Any:
    return await breaker.call(fn, *args)


async def by_partial(breaker: CircuitBreaker, fn: Any, *args: Any) -> Any:
    return await breaker.call(partial(fn, *args))


async def by_decorator(breaker: CircuitBreaker, fn: Any, *args: Any) -> Any:
    return await breaker(fn)(*args)


async def by_guard(breaker: CircuitBreaker, fn: Any, *args: Any) -> Any:
    async with breaker.guard() as guard:
        result = await fn(*args)
        guard.set_result(result)
        return result


forms = pytest.mark.parametrize("form", [by_call, by_partial, by_decorator, by_guard])


async def trip(breaker: CircuitBreaker, times: int = 1) -> None:
    """Let so many calls fail."""
    for _ in range(times):
        with pytest.raises(OSError, match="down"):
            await breaker.call(fails, OSError("down"))


async def is_refused(breaker: CircuitBreaker, form: Form = by_call) -> bool:
    """Tell whether a call that would succeed is refused."""
    try:
        await form(breaker, returns, 1)
    except CircuitOpenError:
        return True
    return False


# --- at the door --------------------------------------------------------------------------------

WRONG: list[tuple[str, list[Any]]] = [
    ("name", [5, None, b"circuit"]),
    ("failure_threshold", [0, -1, 1.5, True, math.nan, "5"]),
    ("failure_rate", [0, -1, 1.1, True, math.nan, "5"]),
    ("slow_call_rate", [0, -1, 1.1, True, math.nan, "5"]),
    ("slow_call_duration", [-1, True, math.nan, "5", None]),
    ("window_calls", [0, -1, 1.5, True, None]),
    ("window_seconds", [0, -1, math.inf, math.nan, True, "5"]),
    ("min_calls", [0, -1, 1.5, True, None]),
    ("recovery_timeout", [-1, math.inf, math.nan, True, "5", None, trio.sleep]),
    ("half_open_max_calls", [0, True, 1.5, None]),
    ("success_threshold", [0, True, 1.5, None]),
    ("half_open_timeout", [0, -1, math.nan, True, "5"]),
    ("failure_on", [BaseException, 3, KeyboardInterrupt, None]),
    ("failure_result", [3, trio.sleep]),
    ("enforce", [0, None]),
    ("cancel_in_flight", [1, None]),
    ("rng", [3]),
]


@pytest.mark.parametrize(
    "option, value", [(option, value) for option, values in WRONG for value in values]
)
def test_bad_options_are_refused(option: str, value: Any) -> None:
    """In one wording."""
    with pytest.raises((ValueError, TypeError), match=rf"^`{option}` must be .*got "):
        CircuitBreaker(**{option: value})


def test_options_that_contradict_one_another_are_refused() -> None:
    """Nothing to watch, a window that never fills, slow calls that never are."""
    with pytest.raises(ValueError, match=r"^one of `failure_threshold`, `failure_rate` and"):
        CircuitBreaker(failure_threshold=None)
    with pytest.raises(ValueError, match=r"^`min_calls` must be <= `window_calls` \(10\), got 20"):
        CircuitBreaker(failure_rate=0.5, window_calls=10)
    with pytest.raises(ValueError, match=r"^`slow_call_rate` needs a `slow_call_duration`"):
        CircuitBreaker(slow_call_rate=0.5)
    assert CircuitBreaker(failure_rate=0.5, window_calls=10, window_seconds=1).min_calls == 20


def test_the_options_are_the_documented_ones() -> None:
    """The name by position, the rest by keyword; times may be timedeltas."""
    breaker = CircuitBreaker("payments", recovery_timeout=timedelta(minutes=1))
    assert (breaker.name, breaker.recovery_timeout, breaker.state) == ("payments", 60, CLOSED)
    assert CircuitBreaker().name == "circuit"
    assert isinstance(CircuitBreaker(rng=None).rng, Random)
    with pytest.raises(TypeError, match="positional"):
        CircuitBreaker("payments", 5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    for duplicate in (copy.copy, pickle.dumps):
        with pytest.raises(TypeError, match="can't be copied or pickled"):
            duplicate(breaker)


def test_it_tells_how_it_stands_outside_of_a_run() -> None:
    """In its repr, too."""
    breaker = CircuitBreaker("payments")
    assert repr(breaker) == "CircuitBreaker(name='payments': closed, 0 failed in a row)"
    assert breaker.statistics() == CircuitBreakerStatistics(
        state=CLOSED,
        calls=0,
        failures=0,
        slow_calls=0,
        rejections=0,
        failure_rate=None,
        slow_call_rate=None,
        consecutive_failures=0,
        opened=0,
        reason=None,
        in_flight=0,
    )
    assert breaker.retry_after is None
    assert breaker.last_failure is None
    assert breaker.is_idle
    assert breaker.is_disposable


@pytest.mark.parametrize("is_open", [True, False])
async def test_what_is_no_async_function_is_a_mistake(is_open: bool) -> None:
    """It says how to do it right, and counts for nothing."""
    breaker = CircuitBreaker(failure_threshold=1, failure_on=Exception)
    if is_open:
        breaker.isolate()
    for mistake in (len, returns(1)):
        with pytest.raises(TypeError, match=r"^`fn` must be an async function, got "):
            await breaker.call(mistake)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert breaker.statistics().calls == 0
    if not is_open:
        with pytest.raises(TypeError, match="returned 3, which can't be awaited"):
            await breaker.call(lambda: 3)  # type: ignore[arg-type,return-value]  # pyright: ignore[reportArgumentType]
        assert breaker.state is CLOSED


# --- closed, open, half open --------------------------------------------------------------------


@forms
async def test_it_opens_recovers_and_closes(autojump_clock: MockClock, form: Form) -> None:
    """The whole way round; every error is the operation's own, or says when to come back."""
    breaker, error = CircuitBreaker("payments", failure_threshold=2), OSError("down")
    assert await form(breaker, returns, 5) == 5
    for _ in range(2):
        with pytest.raises(OSError, match="down") as caught:
            await form(breaker, fails, error)
        assert caught.value is error
    assert breaker.state is OPEN
    assert not breaker.is_disposable
    await trio.sleep(20)
    with pytest.raises(CircuitOpenError) as refused:
        await form(breaker, returns, 5)
    assert (refused.value.name, refused.value.retry_after) == ("payments", 40)
    assert refused.value.last_failure is breaker.last_failure
    assert breaker.retry_after == 40
    await trio.sleep(40)
    assert (breaker.state, breaker.retry_after, breaker.is_disposable) == (OPEN, 0, True)
    assert await form(breaker, returns, 6) == 6
    assert breaker.state is CLOSED
    assert breaker.is_idle
    now = breaker.statistics()
    assert (now.calls, now.failures, now.rejections, now.opened) == (4, 2, 1, 1)
    assert now.reason == "2 failures in a row"


@forms
async def test_fifty_at_the_instant_at_which_it_reopens(
    autojump_clock: MockClock, form: Form
) -> None:
    """One goes through; the others are told so."""
    breaker, ran, refused = CircuitBreaker(failure_threshold=1), list[float](), list[Exception]()

    async def probe() -> None:
        ran.append(trio.current_time())
        await trio.sleep(1)

    async def caller() -> None:
        try:
            await form(breaker, probe)
        except CircuitOpenError as error:
            refused.append(error)

    await trip(breaker)
    await trio.sleep(60)
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(caller)
        await wait_all_tasks_blocked()
        assert (len(ran), len(refused)) == (1, 49)
        assert breaker.state is HALF_OPEN
        assert breaker.statistics().in_flight == 1
        assert not breaker.is_disposable
    assert breaker.state is CLOSED


def _stop() -> list[BaseException]:
    group = BaseExceptionGroup("", [OSError(), KeyboardInterrupt()])
    return [KeyboardInterrupt(), SystemExit(), GeneratorExit(), group]


@forms
@pytest.mark.parametrize("stop", _stop(), ids=repr)
async def test_what_is_no_exception_says_nothing(
    autojump_clock: MockClock, form: Form, stop: BaseException
) -> None:
    """Closed, it does not count; half open, the place goes to the next."""
    breaker = CircuitBreaker(failure_threshold=1)
    for state in (CLOSED, HALF_OPEN):
        with pytest.raises(type(stop)) as caught:
            await form(breaker, fails, stop)
        assert caught.value is stop
        assert breaker.state is state
        if state is CLOSED:
            await trip(breaker)
            await trio.sleep(60)
    assert not await is_refused(breaker, form)
    assert breaker.statistics().calls == 2


@forms
async def test_a_cancelled_probe_decides_nothing(autojump_clock: MockClock, form: Form) -> None:
    """The next call is the probe."""
    breaker = CircuitBreaker(failure_threshold=1)
    await trip(breaker)
    await trio.sleep(60)
    with trio.move_on_after(1) as scope:
        await form(breaker, trio.sleep_forever)
    assert scope.cancelled_caught
    assert (breaker.state, breaker.statistics().in_flight) == (HALF_OPEN, 0)
    assert breaker.is_disposable
    assert not await is_refused(breaker)
    assert breaker.state is CLOSED


class _AbandonedError(CallAbandonedError):
    """As another breaker further in raises it."""


@forms
@pytest.mark.parametrize(
    "error",
    [
        ValueError("mine"),
        RejectedError(),
        CircuitOpenError("inner"),
        _AbandonedError("inner"),
        OperationsCancelledError(),
        ExceptionGroup("", [OSError(), ValueError()]),
        ExceptionGroup("", [OSError(), ExceptionGroup("", [RejectedError()])]),
    ],
    ids=repr,
)
async def test_what_is_not_about_the_dependency_says_nothing(
    autojump_clock: MockClock, form: Form, error: Exception
) -> None:
    """The row goes on as it was, and a probe decides nothing."""
    breaker = CircuitBreaker(failure_threshold=2)
    await trip(breaker)
    with pytest.raises(type(error)):
        await form(breaker, fails, error)
    assert breaker.statistics().consecutive_failures == 1
    await trip(breaker)
    await trio.sleep(60)
    with pytest.raises(type(error)):
        await form(breaker, fails, error)
    assert breaker.state is HALF_OPEN
    assert not await is_refused(breaker)


@pytest.mark.parametrize("error", [RejectedError(), CallAbandonedError("inner")], ids=repr)
async def test_a_refusal_says_nothing_even_if_every_error_does(error: Exception) -> None:
    """Nothing was run, or it was stopped from without."""
    breaker = CircuitBreaker(failure_threshold=1, failure_on=Exception)
    for each in (error, ExceptionGroup("", [OSError(), error])):
        with pytest.raises(type(each)):
            await breaker.call(fails, each)
    assert breaker.state is CLOSED
    with pytest.raises(ExceptionGroup):
        await breaker.call(fails, ExceptionGroup("", [OSError(), ValueError()]))
    assert breaker.state is OPEN


async def test_our_own_timeout_inside_counts(autojump_clock: MockClock) -> None:
    """It is the dependency that was too slow."""
    breaker = CircuitBreaker(failure_threshold=1)
    with pytest.raises(trio.TooSlowError):
        await breaker.call(Timeout(1).call, trio.sleep_forever)
    assert breaker.state is OPEN


@forms
async def test_results_may_be_failures(form: Form) -> None:
    """They are returned all the same."""
    breaker = CircuitBreaker(failure_threshold=2, failure_result=lambda status: status >= 500)
    for status in (503, 200, 500, 502):
        assert await form(breaker, returns, status) == status
    assert breaker.state is OPEN
    assert breaker.last_failure is not None
    assert (breaker.last_failure.type_name, breaker.last_failure.message) == ("int", "502")


async def test_a_predicate_that_is_async_in_disguise_is_told_of() -> None:
    """Else every result would be a failure."""
    breaker = CircuitBreaker(failure_result=lambda _: returns(value=1))
    with pytest.raises(TypeError, match="`failure_result` must be a plain function, but"):
        await breaker.call(returns, 1)
    assert breaker.statistics().in_flight == 0


async def test_a_block_that_gives_no_result_has_succeeded() -> None:
    """Whatever the predicate thinks of nothing."""
    breaker = CircuitBreaker(failure_threshold=1, failure_result=lambda value: value is None)
    async with breaker.guard():
        pass
    assert (breaker.state, breaker.statistics().calls) == (CLOSED, 1)
    breaker = CircuitBreaker(failure_threshold=1, failure_result=bool)
    async with breaker.guard():
        pass
    assert breaker.state is CLOSED


@pytest.mark.parametrize("raised", [True, False])
async def test_a_late_word_counts_for_nothing(autojump_clock: MockClock, raised: bool) -> None:
    """It was begun before the circuit opened."""
    breaker = CircuitBreaker(failure_threshold=1, failure_result=lambda _: False)
    ends = list[object]()

    async def late() -> None:
        await trio.sleep(61)
        if raised:
            raise OSError("late")

    async def caller() -> None:
        try:
            await breaker.call(late)
        except OSError as error:
            ends.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller)
        await wait_all_tasks_blocked()
        await trip(breaker)
        await trio.sleep(60)
        await breaker.call(trio.sleep, 2)
        assert len(ends) == raised
    assert breaker.state is CLOSED
    assert breaker.statistics().calls == 2


@forms
async def test_a_success_may_be_the_call_that_opens_it(form: Form) -> None:
    """It makes so many that the rate counts; its result is returned all the same."""
    breaker, heard = CircuitBreaker("p", failure_rate=0.2, min_calls=5), list[Event]()
    await form(breaker, returns, 1)
    await trip(breaker)
    with subscribe(within_calls(heard.append)):
        for number in range(3):
            assert breaker.state is CLOSED
            assert await form(breaker, returns, number) == number
    assert breaker.state is OPEN
    assert breaker.statistics().reason == "1 of 5 calls failed"
    assert [type(event) for event in heard] == [CircuitStateChanged]


@forms
async def test_a_call_that_was_overtaken_is_not_counted(
    autojump_clock: MockClock, form: Form
) -> None:
    """Though the circuit is closed, as it was when the call began."""
    breaker = CircuitBreaker()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(form, breaker, trio.sleep, 1)
        await wait_all_tasks_blocked()
        breaker.isolate().release()
    assert (breaker.state, breaker.statistics().calls) == (CLOSED, 0)


async def test_rates_are_told_as_they_are_now(autojump_clock: MockClock) -> None:
    """Also when nothing has happened for a while."""
    breaker = CircuitBreaker(
        failure_rate=0.9, slow_call_rate=0.9, slow_call_duration=1, window_seconds=10
    )
    await trip(breaker)
    for seconds in (0.5, 1.5, 0.5):
        await breaker.call(trio.sleep, seconds)
    now = breaker.statistics()
    assert (now.failure_rate, now.slow_call_rate, now.slow_calls) == (0.25, 0.25, 1)
    assert not breaker.is_idle
    await trio.sleep(11)
    now = breaker.statistics()
    assert (now.failure_rate, now.slow_call_rate, now.calls) == (None, None, 4)
    assert breaker.is_idle


async def test_slow_successes_open_it(autojump_clock: MockClock) -> None:
    """With no failure at all."""
    breaker = CircuitBreaker(
        failure_threshold=None, slow_call_rate=1, slow_call_duration=1, min_calls=3
    )
    for _ in range(3):
        await breaker.call(trio.sleep, 2)
    assert breaker.state is OPEN
    assert breaker.last_failure is None


class _UnspeakableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    "error, message",
    [
        (_UnspeakableError(), "(its text can't be read)"),
        (OSError("x" * 10_000), "x" * 200 + "..."),
        (OSError("short"), "short"),
    ],
    ids=["unspeakable", "long", "short"],
)
async def test_what_is_remembered_of_a_failure_is_short(error: Exception, message: str) -> None:
    """Whatever the error does when it is asked."""
    breaker = CircuitBreaker()
    with pytest.raises(type(error)):
        await breaker.call(fails, error)
    assert breaker.last_failure is not None
    assert breaker.last_failure.message == message
    assert breaker.last_failure.type_name == type(error).__name__


async def test_checkpoints() -> None:
    """To enter a block, and to be refused, are; and a call if its operation is."""
    breaker = CircuitBreaker()
    with assert_checkpoints():
        async with breaker.guard():
            pass
    with assert_checkpoints():
        await breaker.call(trio.lowlevel.checkpoint)
    breaker.isolate()
    for form in (by_call, by_guard):
        with assert_checkpoints(), pytest.raises(CircuitOpenError):
            await form(breaker, returns, 1)


async def test_a_guard_serves_one_block() -> None:
    """A second one needs its own."""
    guard = CircuitBreaker().guard()
    async with guard:
        with pytest.raises(RuntimeError, match=r"call `guard\(\)` anew"):
            await guard.__aenter__()


# --- what is told -------------------------------------------------------------------------------


async def test_every_change_is_told(autojump_clock: MockClock) -> None:
    """And every refusal; with the operation that brought it about."""
    breaker, heard = CircuitBreaker("payments", failure_threshold=1), list[Event]()
    with subscribe(heard.append):
        await trip(breaker)
        assert await is_refused(breaker)
        await trio.sleep(60)
        await breaker.call(returns, 1, name="pay")
        handle = breaker.isolate()
        handle.release()
        breaker.reset()
        breaker.isolate()
        breaker.reset()
    refusals = [event for event in heard if isinstance(event, Rejected)]
    assert [(event.policy, event.retry_after) for event in refusals] == [("payments", 60)]
    told = [
        (event.operation, event.previous, event.state, event.reason, event.retry_after)
        for event in heard
        if isinstance(event, CircuitStateChanged)
    ]
    assert told == [
        ("fails", CLOSED, OPEN, "1 failure in a row", 60),
        ("pay", OPEN, HALF_OPEN, "the recovery time is over", None),
        ("pay", HALF_OPEN, CLOSED, "a probe succeeded", None),
        ("isolate", CLOSED, ISOLATED, "isolated", None),
        ("release", ISOLATED, CLOSED, "released", None),
        ("isolate", CLOSED, ISOLATED, "isolated", None),
        ("reset", ISOLATED, CLOSED, "reset", None),
    ]


async def test_a_listener_finds_the_circuit_as_it_is_told(autojump_clock: MockClock) -> None:
    """It may change it, too."""
    breaker, seen = CircuitBreaker(failure_threshold=1), list[CircuitState]()

    def listen(event: Event) -> None:
        assert isinstance(event, CircuitStateChanged)
        seen.append(breaker.state)
        if event.state is OPEN:
            breaker.reset()

    with subscribe(listen):
        await trip(breaker)
    assert seen == [OPEN, CLOSED]
    assert breaker.state is CLOSED


@forms
async def test_a_listener_that_stops_the_program_leaves_no_probe(
    autojump_clock: MockClock, form: Form
) -> None:
    """The place is free for the next."""
    breaker = CircuitBreaker(failure_threshold=1)

    def listen(_: Event) -> None:
        raise SystemExit

    await trip(breaker)
    await trio.sleep(60)
    with subscribe(listen), pytest.raises(SystemExit):
        await form(breaker, returns, 1)
    assert breaker.statistics().in_flight == 0
    assert not await is_refused(breaker, form)


async def test_a_listener_that_stops_the_program_when_a_probe_hangs(
    autojump_clock: MockClock,
) -> None:
    """The call that finds it out has no place to give back."""
    breaker = CircuitBreaker(failure_threshold=1)

    def listen(_: Event) -> None:
        raise SystemExit

    await trip(breaker)
    await trio.sleep(60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(breaker.call, trio.sleep_forever)
        await trio.sleep(60)
        with subscribe(within_calls(listen)), pytest.raises(SystemExit):
            await breaker.call(returns, 1)
        assert breaker.state is OPEN
        nursery.cancel_scope.cancel()


@forms
async def test_one_that_only_watches_refuses_nothing(autojump_clock: MockClock, form: Form) -> None:
    """It goes through the same states, and counts what it would have refused."""
    breaker, heard = CircuitBreaker(failure_threshold=1, enforce=False), list[Event]()
    with subscribe(heard.append):
        await trip(breaker)
        assert not await is_refused(breaker, form)
        await trip(breaker)
        assert breaker.statistics().rejections == 2
        assert breaker.state is OPEN
        await trio.sleep(60)
        assert not await is_refused(breaker, form)
        assert breaker.state is CLOSED
        breaker.isolate()
        assert not await is_refused(breaker, form)
    skipped = [event for event in heard if isinstance(event, RejectionSkipped)]
    assert [event.retry_after for event in skipped] == [60, 60, None]
    assert not [event for event in heard if isinstance(event, Rejected)]
