"""CircuitBreaker: isolated and reset by hand, and calls that are given up when it opens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.operations import Stopwatch, fails, leaves, returns
from tests.test_circuit_breaker_basics import forms, is_refused, trip
from trio_resilience import CallAbandonedError, Event, subscribe
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import CircuitState, CircuitStateChanged

if TYPE_CHECKING:
    from trio.testing import MockClock

    from tests.test_circuit_breaker_basics import Form

CLOSED, OPEN, HALF_OPEN, ISOLATED = CircuitState


# --- by hand ------------------------------------------------------------------------------------


async def test_handles_nest() -> None:
    """The last of them closes it; to release one twice is harmless."""
    breaker = CircuitBreaker()
    outer = breaker.isolate()
    with breaker.isolate() as inner:
        assert await is_refused(breaker)
        assert not breaker.is_disposable
    inner.release()
    assert breaker.state is ISOLATED
    outer.release()
    outer.release()
    assert breaker.state is CLOSED
    assert not await is_refused(breaker)


def test_it_may_be_isolated_outside_of_a_run() -> None:
    """Before, between and after; nobody listens to that."""
    breaker = CircuitBreaker()
    with subscribe(lambda _: None):
        handle = breaker.isolate()
        assert trio.run(is_refused, breaker)
        assert trio.run(is_refused, breaker)
        handle.release()
        assert not trio.run(is_refused, breaker)


def test_what_is_done_outside_of_a_run_is_told_to_nobody() -> None:
    """Nor in the next run: there is no time at which it has happened."""
    breaker, heard = CircuitBreaker(failure_threshold=1), list[Event]()
    with subscribe(heard.append):
        breaker.isolate().release()
        breaker.isolate()
        breaker.reset()
        trio.run(trip, breaker)
    assert [event.state for event in heard if isinstance(event, CircuitStateChanged)] == [OPEN]


async def test_it_is_changed_only_in_its_own_run() -> None:
    """In a thread it says how."""
    breaker = CircuitBreaker()
    await breaker.call(returns, 1)
    with pytest.raises(RuntimeError, match=r"`trio\.from_thread\.run_sync`"):
        await trio.to_thread.run_sync(breaker.isolate)
    assert breaker.state is CLOSED
    handle = await trio.to_thread.run_sync(trio.from_thread.run_sync, breaker.isolate)
    assert breaker.state is ISOLATED
    handle.release()


@attrs.define(eq=False)
class _IsolatesWhenIdle(trio.abc.Instrument):
    breaker: CircuitBreaker

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002
        self.breaker.isolate()


def test_it_may_be_changed_where_no_task_runs() -> None:
    """In an instrument, for example; nobody is told of it, for it is in no task."""
    breaker, heard = CircuitBreaker(), list[Event]()

    async def main() -> None:
        await wait_all_tasks_blocked()
        assert breaker.state is ISOLATED

    with subscribe(heard.append):
        trio.run(main, instruments=[_IsolatesWhenIdle(breaker)])
    assert heard == []


# --- calls in flight ----------------------------------------------------------------------------


@forms
async def test_calls_in_flight_are_given_up(autojump_clock: MockClock, form: Form) -> None:
    """At the instant at which it opens, each with an error of its own; not who has tripped it."""
    breaker = CircuitBreaker("payments", failure_threshold=1, cancel_in_flight=True)
    ends = list[CallAbandonedError]()

    async def hang() -> None:
        with pytest.raises(CallAbandonedError) as caught:
            await form(breaker, trio.sleep_forever)
        ends.append(caught.value)

    watch = Stopwatch()
    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(hang)
        await trio.sleep(1)
        with pytest.raises(OSError, match="down"):
            await form(breaker, fails, OSError("down"))
    assert (len(set(ends)), watch.seconds) == (100, 1)
    assert {str(error) for error in ends} == {str(CallAbandonedError("payments"))}
    now = breaker.statistics()
    assert (now.calls, now.failures, now.in_flight) == (1, 1, 0)


@forms
@pytest.mark.parametrize("error", [None, OSError("mine")], ids=repr)
async def test_who_has_an_end_of_its_own_is_not_given_up(
    autojump_clock: MockClock, form: Form, error: Exception | None
) -> None:
    """A result that arrives is returned, and an error is raised as it is."""
    breaker, ends = CircuitBreaker(failure_threshold=1, cancel_in_flight=True), list[object]()

    async def stubborn() -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(2)
        if error is not None:
            raise error
        return "done"

    async def in_a_group() -> str:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            await stubborn()
        raise AssertionError

    async def caller(fn: Any) -> None:
        try:
            ends.append(await form(breaker, fn))
        except (OSError, ExceptionGroup, CallAbandonedError) as end:
            ends.append(end)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller, stubborn)
        await trio.sleep(1)
        await trip(breaker)
    assert ends == ["done" if error is None else error]
    if error is None:
        return
    breaker.reset()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller, in_a_group)
        await trio.sleep(1)
        await trip(breaker)
    assert isinstance(ends[1], BaseException)
    assert leaves(ends[1]) == [error]
    assert breaker.statistics().in_flight == 0


@forms
async def test_an_outer_cancellation_wins_over_being_given_up(
    autojump_clock: MockClock, form: Form
) -> None:
    """At the same time, it is that which goes on."""
    breaker = CircuitBreaker(failure_threshold=1, cancel_in_flight=True)
    scope = trio.CancelScope()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_trip_and_cancel, breaker, scope)
        with scope:
            await form(breaker, trio.sleep_forever)
        assert scope.cancelled_caught


async def _trip_and_cancel(breaker: CircuitBreaker, scope: trio.CancelScope) -> None:
    await wait_all_tasks_blocked()
    await trip(breaker)
    scope.cancel()


async def test_one_that_only_watches_gives_nobody_up(autojump_clock: MockClock) -> None:
    """Nor does one that is isolated by hand."""
    for breaker in (
        CircuitBreaker(failure_threshold=1, cancel_in_flight=True, enforce=False),
        CircuitBreaker(cancel_in_flight=True),
    ):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(breaker.call, trio.sleep, 1)
            await wait_all_tasks_blocked()
            if breaker.enforce:
                breaker.isolate()
            else:
                await trip(breaker)
