"""CircuitBreaker: what counts as a failure and what does not, and when it opens."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._circuits import (
    CLOSED,
    OPEN,
    Form,
    begin,
    fail,
    forms,
    is_refused,
    stops,
    succeed,
)
from tests.operations import Gauge, Stopwatch, fails, returns, within_calls
from trio_resilience import (
    Bulkhead,
    BulkheadFullError,
    CircuitOpenError,
    Constant,
    Event,
    RejectedError,
    Retry,
    Timeout,
    subscribe,
    transient,
)
from trio_resilience._circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from trio.testing import MockClock

# --- at the door ----------------------------------------------------------------------------------

HOSTILE: list[Any] = [0, -1, math.nan, math.inf, True, "5", float("1e400"), None, -math.inf, 1.5]

ACCEPTED: dict[str, list[Any]] = {
    "failure_threshold": [None],
    "failure_rate": [None],
    "slow_call_rate": [None],
    "slow_call_duration": [0, math.inf, float("1e400"), 1.5],
    "window_calls": [],
    "window_seconds": [None, 1.5],
    "min_calls": [],
    "recovery_timeout": [0, 1.5],
    "half_open_max_calls": [],
    "success_threshold": [],
    "half_open_timeout": [math.inf, float("1e400"), None, 1.5],
}
"""Which of them mean something."""


@pytest.mark.parametrize("option", ACCEPTED)
def test_what_numbers_mean_nothing_is_found_out_at_the_door(option: str) -> None:
    """The error names the option, and what it was."""
    others: dict[str, Any] = {"failure_rate": 0.5} if option == "failure_threshold" else {}
    accepted = list[Any]()
    for value in HOSTILE:
        try:
            CircuitBreaker(**others, **{option: value})
        except (ValueError, TypeError) as error:
            assert str(error).startswith(f"`{option}` must be ")  # noqa: PT017 - or is accepted
            assert repr(value) in str(error)  # noqa: PT017 - likewise
        else:
            accepted.append(value)
    assert repr(accepted) == repr(ACCEPTED[option])


class Called:
    """What is awaited is not always a function."""

    async def __call__(self, value: int) -> int:
        return value

    async def method(self, value: int) -> int:
        return value


def in_disguise(value: int) -> Awaitable[int]:
    """Return what can be awaited, though it is no coroutine function."""
    return returns(value)


DISGUISES: list[Any] = [
    returns,
    partial(returns),
    in_disguise,
    Called(),
    Called().method,
    Retry()(returns),
]


@forms
@pytest.mark.parametrize("fn", DISGUISES, ids=repr)
async def test_whatever_can_be_awaited_is_awaited_inside(fn: Any, form: Form) -> None:
    """And it is its result that counts."""
    breaker = CircuitBreaker(failure_threshold=1, failure_result=lambda result: result == 3)
    assert await form(breaker, fn, 3) == 3
    assert breaker.state is OPEN


# --- failures in a row ----------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("threshold", [1, 2, 5])
async def test_it_opens_with_exactly_so_many_failures_in_a_row(form: Form, threshold: int) -> None:
    """A success in between starts the row anew; whoever comes after it is refused."""
    breaker = CircuitBreaker(failure_threshold=threshold)
    await fail(breaker, threshold - 1, form)
    await succeed(breaker, 1, form)
    await fail(breaker, threshold - 1, form)
    assert (breaker.state, breaker.retry_after) == (CLOSED, None)
    assert breaker.statistics().consecutive_failures == threshold - 1
    await fail(breaker, 1, form)
    assert (breaker.state, breaker.statistics().opened) == (OPEN, 1)
    assert await is_refused(breaker, form)


@forms
async def test_calls_do_not_wait_for_one_another(autojump_clock: MockClock, form: Form) -> None:
    """Ten calls of a second take one."""
    breaker, gauge, watch = CircuitBreaker(), Gauge(), Stopwatch()
    async with trio.open_nursery() as nursery:
        for index in range(10):
            nursery.start_soon(form, breaker, gauge.run, index)
        await trio.sleep(0.5)
        assert breaker.statistics().in_flight == 10
    assert (watch.seconds, gauge.peak, breaker.statistics().in_flight) == (1, 10, 0)


@forms
async def test_of_calls_that_fail_together_those_after_the_last_straw_say_nothing(
    form: Form,
) -> None:
    """They ran before it opened, and came out when it had: each with its own error."""
    breaker = CircuitBreaker(failure_threshold=3)
    async with trio.open_nursery() as nursery:
        visits = await begin(nursery, breaker, 6, form)
        for number, visit in enumerate(visits, 1):
            error = OSError(number)
            assert await visit.end(error) is error
            assert breaker.state is (OPEN if number >= 3 else CLOSED)
    now = breaker.statistics()
    assert (now.calls, now.failures, now.consecutive_failures, now.opened) == (3, 3, 3, 1)
    assert breaker.last_failure is not None
    assert breaker.last_failure.message == "3"


async def test_calls_count_in_the_order_in_which_they_end() -> None:
    """Not in that in which they began."""
    breaker = CircuitBreaker(failure_threshold=2)
    async with trio.open_nursery() as nursery:
        first, second, third = await begin(nursery, breaker, 3)
        await third.end(OSError())
        await second.end("ok")
        await first.end(OSError())
        assert breaker.state is CLOSED
        await fail(breaker)
    assert breaker.state is OPEN


# --- what is no failure ---------------------------------------------------------------------------


@forms
async def test_a_cancelled_call_is_not_counted(autojump_clock: MockClock, form: Form) -> None:
    """Whoever cancels it: a time limit outside, a scope, or the nursery."""
    breaker, heard = CircuitBreaker(failure_threshold=1), list[Event]()
    before = breaker.statistics()
    with subscribe(within_calls(heard.append)):
        with trio.move_on_after(1) as scope:
            await form(breaker, trio.sleep_forever)
        assert scope.cancelled_caught
        with pytest.raises(trio.TooSlowError), trio.fail_after(1):
            await form(breaker, trio.sleep_forever)
        async with trio.open_nursery() as nursery:
            [visit] = await begin(nursery, breaker, 1, form)
            await visit.cancel()
            await begin(nursery, breaker, 1, form)
            nursery.cancel_scope.cancel()
    assert breaker.statistics() == before
    assert breaker.is_idle
    assert not heard


@forms
async def test_a_time_limit_inside_is_a_failure(autojump_clock: MockClock, form: Form) -> None:
    """Ours, or one of trio's own."""

    async def limited() -> None:
        with trio.fail_after(1):
            await trio.sleep_forever()

    for op in (limited, partial(Timeout(1).call, trio.sleep_forever)):
        breaker = CircuitBreaker(failure_threshold=1)
        with pytest.raises(trio.TooSlowError):
            await form(breaker, op)
        assert breaker.state is OPEN


@forms
async def test_an_outer_cancellation_at_the_instant_of_our_timeout_wins(
    autojump_clock: MockClock, form: Form
) -> None:
    """And is counted nowhere, in either of the two."""
    breaker, timeout = CircuitBreaker(failure_threshold=1), Timeout(1)
    with trio.move_on_after(1) as scope:
        await form(breaker, timeout.call, trio.sleep_forever)
    assert scope.cancelled_caught
    assert (breaker.state, breaker.statistics().calls) == (CLOSED, 0)
    assert timeout.statistics().timed_out == 0


@forms
@stops
async def test_what_stops_the_program_passes_through(form: Form, stop: BaseException) -> None:
    """The same object, at once, and nothing has moved but the circuit's calls in flight."""
    breaker, heard, calls = CircuitBreaker(failure_threshold=2), list[Event](), list[None]()
    await fail(breaker)
    before = breaker.statistics()

    async def op() -> None:
        calls.append(None)
        assert breaker.statistics().in_flight == 1
        raise stop

    with subscribe(within_calls(heard.append)), pytest.raises(type(stop)) as caught:
        await form(breaker, op)
    assert caught.value is stop
    assert len(calls) == 1
    assert breaker.statistics() == before
    assert not heard


@forms
async def test_a_cancellation_that_comes_in_a_group_with_an_error_is_one(form: Form) -> None:
    """The scope catches its part; the error is not lost."""
    breaker = CircuitBreaker(failure_threshold=1)

    async def clean_up_badly() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise OSError("in clean-up")

    with pytest.raises(ExceptionGroup) as caught, trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_and, scope.cancel)
            async with trio.open_nursery() as inner:
                inner.start_soon(trio.sleep_forever)
                inner.start_soon(form, breaker, sleep_beside, clean_up_badly)
    assert caught.group_contains(OSError, match="in clean-up")
    assert breaker.state is CLOSED
    assert breaker.statistics().calls == 0


async def wait_and(then: Callable[[], object]) -> None:
    await wait_all_tasks_blocked()
    then()


async def sleep_beside(other: Callable[[], Awaitable[None]]) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        await trio.sleep_forever()


def is_server_error(error: Exception) -> bool:
    return "5" in str(error)


def at_once(_: Exception) -> float:
    return 0.0


MATCHES: list[tuple[Any, Exception, bool]] = [
    (transient, OSError(), True),
    (transient, ValueError(), False),
    (transient, FileNotFoundError(), False),
    (ValueError, ValueError(), True),
    (ValueError, OSError(), False),
    ((KeyError, OSError), OSError(), True),
    (is_server_error, OSError("503"), True),
    (is_server_error, OSError("404"), False),
    (at_once, OSError(), True),
    (OSError, ExceptionGroup("", [OSError(), ConnectionError()]), True),
    (OSError, ExceptionGroup("", [OSError(), ValueError()]), False),
    (OSError, ExceptionGroup("", [ExceptionGroup("", [OSError(), KeyError()])]), False),
    (Exception, RejectedError(), False),
]


@forms
@pytest.mark.parametrize("match, error, counts", MATCHES)
async def test_only_what_failure_on_matches_counts(
    form: Form, match: Any, error: Exception, counts: bool
) -> None:
    """What it does not match neither makes the row longer nor ends it."""
    breaker = CircuitBreaker(failure_threshold=2, failure_on=match)
    for row in (1, 2):
        with pytest.raises(type(error)) as caught:
            await form(breaker, fails, error)
        assert caught.value is error
        assert breaker.statistics().consecutive_failures == row * counts
    assert breaker.state is (OPEN if counts else CLOSED)
    assert breaker.statistics().calls == 2 * counts


@forms
async def test_a_refusal_by_a_bulkhead_inside_is_not_counted(form: Form) -> None:
    """Nothing was run, so nothing is known of the dependency."""
    breaker, bulkhead = CircuitBreaker(failure_threshold=1), Bulkhead(1, queue_size=0)
    async with bulkhead:
        with pytest.raises(BulkheadFullError):
            await form(breaker, bulkhead.call, returns, 1)
    assert (breaker.state, breaker.statistics().calls) == (CLOSED, 0)


@forms
async def test_predicates_that_raise_are_told_of(form: Form) -> None:
    """Nothing is counted, and nothing is in flight any more."""

    def broken(_: object) -> bool:
        raise ZeroDivisionError

    for breaker in (CircuitBreaker(failure_on=broken), CircuitBreaker(failure_result=broken)):
        with pytest.raises(ZeroDivisionError):
            await form(breaker, fails if breaker.failure_result is None else returns, OSError())
        assert breaker.statistics() == CircuitBreaker().statistics()


# --- with a retry ---------------------------------------------------------------------------------


@pytest.mark.parametrize("breaker_is_inside, failures", [(True, 2), (False, 0)])
async def test_a_retry_around_it_shows_it_each_attempt(
    autojump_clock: MockClock, breaker_is_inside: bool, failures: int
) -> None:
    """Fail, fail, ok: two failures for a breaker inside; one inside of which it is sees none."""
    breaker, retry = CircuitBreaker(), Retry(max_attempts=3, backoff=Constant(1))
    script: list[Any] = [OSError(), OSError(), "ok"]

    async def op() -> str:
        step = script.pop(0)
        if isinstance(step, OSError):
            raise step
        return "ok"

    if breaker_is_inside:
        assert await retry.call(breaker.call, op) == "ok"
    else:
        assert await breaker.call(retry.call, op) == "ok"
    now = breaker.statistics()
    assert (now.failures, now.calls) == (failures, failures + 1)
    assert (now.state, now.consecutive_failures) == (CLOSED, 0)


async def test_a_retry_does_not_run_into_an_open_circuit(autojump_clock: MockClock) -> None:
    """Unless it is asked to; then it waits for as long as it is told."""
    breaker, watch = CircuitBreaker(failure_threshold=1, recovery_timeout=30), Stopwatch()
    script: list[Any] = [OSError(), "ok"]

    async def op() -> None:
        if isinstance(step := script.pop(0), OSError):
            raise step

    with pytest.raises(CircuitOpenError):
        await Retry(max_attempts=5, backoff=Constant(1)).call(breaker.call, op)
    assert script == ["ok"]
    again = Retry(max_attempts=2, backoff=Constant(1), on=(transient, RejectedError))
    await again.call(breaker.call, op)
    assert (watch.seconds, script) == (30, [])
