"""CircuitBreaker: what listeners hear, what is refused, what is done by hand, and only watching."""

from __future__ import annotations

import copy
import logging
import pickle
import time
from random import Random
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._circuits import (
    CLOSED,
    HALF_OPEN,
    ISOLATED,
    OPEN,
    Form,
    begin,
    fail,
    forms,
    is_refused,
    succeed,
)
from tests.operations import fails, returns, within_calls
from trio_resilience import CircuitOpenError, Event, Rejected, subscribe
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import CircuitState, CircuitStateChanged, RejectionSkipped

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock


def changes(heard: list[Event]) -> list[tuple[CircuitState, CircuitState]]:
    return [(e.previous, e.state) for e in heard if isinstance(e, CircuitStateChanged)]


# --- refusals -------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("waited", [0, 20, 59.5])
async def test_a_refusal_says_when_to_come_back_and_why(
    autojump_clock: MockClock, form: Form, waited: float
) -> None:
    """By name; after the time that is left; with the last failure, of which only words are kept."""
    breaker = CircuitBreaker("payments", failure_threshold=1, recovery_timeout=60)
    await fail(breaker)
    await trio.sleep(waited)
    with pytest.raises(CircuitOpenError) as caught:
        await form(breaker, returns, 1)
    error = caught.value
    assert (error.name, error.retry_after) == ("payments", 60 - waited)
    assert error.last_failure is not None
    assert (error.last_failure.type_name, error.last_failure.message) == ("OSError", "down")
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        error.last_failure.message = "up"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):  # noqa: S301 - our own
        assert (type(twin), twin.args, str(twin)) == (type(error), error.args, str(error))
    await trio.sleep(error.retry_after or 0)
    assert not await is_refused(breaker, form)


@pytest.mark.parametrize("start", [0.0, 0.1, 1 / 3, 12345.678, 1e9 + 0.3])
@pytest.mark.parametrize("recovery", [0.1, 0.7, 60, 1e-3, 1e6 / 7])
async def test_who_comes_back_when_told_is_let_through(
    autojump_clock: MockClock, start: float, recovery: float
) -> None:
    """However the clock rounds: it is never told to come back twice."""
    await trio.sleep(start)
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=recovery)
    await fail(breaker)
    await trio.sleep(recovery / 3)
    with pytest.raises(CircuitOpenError) as caught:
        await breaker.call(returns, 1)
    assert caught.value.retry_after == pytest.approx(recovery * 2 / 3, abs=1e-6)
    await trio.sleep(caught.value.retry_after or 0)
    assert breaker.retry_after == 0
    assert not await is_refused(breaker)


async def test_to_be_refused_in_a_loop_does_not_freeze_the_program() -> None:
    """Others have their turn, and whoever is cancelled meanwhile was not refused."""
    breaker = CircuitBreaker()
    breaker.isolate()
    turns = 0

    async def other() -> None:
        nonlocal turns
        for turns in range(1, 11):  # noqa: B007 - it is counted for the test
            await trio.lowlevel.checkpoint()
        scope.cancel()

    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            while True:
                assert await is_refused(breaker)
    assert turns == 10
    assert 8 <= breaker.statistics().rejections <= 12


@forms
async def test_a_cancelled_refusal_is_none(form: Form) -> None:
    """It is the cancellation that comes out, and nothing is counted or told."""
    breaker, heard = CircuitBreaker(), list[Event]()
    breaker.isolate()
    with subscribe(within_calls(heard.append)), trio.CancelScope() as scope:
        scope.cancel()
        await form(breaker, returns, 1)
    assert scope.cancelled_caught
    assert breaker.statistics().rejections == 0
    assert not heard


async def test_the_wall_clock_does_not_matter(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be put back or forward by an hour at any time."""
    breaker = CircuitBreaker(failure_threshold=1, failure_rate=0.5, window_seconds=10)
    await fail(breaker)
    for offset in (3600, -3600):
        monkeypatch.setattr(time, "time", lambda offset=offset: 1.7e9 + offset)
        monkeypatch.setattr(time, "monotonic", lambda offset=offset: 1e5 + offset)
        assert breaker.retry_after == 60
        assert await is_refused(breaker)
    await trio.sleep(60)
    assert not await is_refused(breaker)


# --- listeners ------------------------------------------------------------------------------------


async def test_calls_that_change_nothing_are_not_told_of() -> None:
    """Whether they succeed, fail or are cancelled."""
    breaker, heard = CircuitBreaker(), list[Event]()
    with subscribe(within_calls(heard.append)):
        await succeed(breaker)
        await fail(breaker)
        with trio.CancelScope() as scope:
            scope.cancel()
            await breaker.call(trio.lowlevel.checkpoint)
    assert not heard


@forms
async def test_listeners_that_raise_change_nothing(
    autojump_clock: MockClock, form: Form, caplog: pytest.LogCaptureFixture
) -> None:
    """Errors, results and states are as ever, others hear everything, and it is logged once."""
    breaker, heard = CircuitBreaker(failure_threshold=1), list[Event]()

    def broken(event: Event) -> None:
        raise LookupError(event)

    with subscribe(broken), subscribe(heard.append), caplog.at_level(logging.ERROR):
        await fail(breaker, 1, form)
        assert breaker.state is OPEN
        assert await is_refused(breaker, form)
        await trio.sleep(60)
        await succeed(breaker, 1, form)
        assert breaker.state is CLOSED
        with breaker.isolate():
            assert breaker.state is ISOLATED
        breaker.reset()
    assert changes(heard) == [
        (CLOSED, OPEN),
        (OPEN, HALF_OPEN),
        (HALF_OPEN, CLOSED),
        (CLOSED, ISOLATED),
        (ISOLATED, CLOSED),
    ]
    assert sum(isinstance(event, Rejected) for event in heard) == 1
    assert [record.name for record in caplog.records] == ["trio_resilience"]


ACTIONS: list[Callable[[CircuitBreaker], object]] = [CircuitBreaker.reset, CircuitBreaker.isolate]


@pytest.mark.parametrize("act", ACTIONS)
@pytest.mark.parametrize("is_first", [True, False])
async def test_other_listeners_hear_the_changes_in_order(
    act: Callable[[CircuitBreaker], object], is_first: bool
) -> None:
    """When one of them calls back: what the others heard last is how it is."""
    breaker, heard = CircuitBreaker(failure_threshold=1), list[Event]()

    def call_back(event: Event) -> None:
        if isinstance(event, CircuitStateChanged) and event.state is OPEN:
            act(breaker)

    first, second = (call_back, heard.append) if is_first else (heard.append, call_back)
    with subscribe(first), subscribe(second):
        await fail(breaker)
    after = breaker.state
    assert changes(heard) == [(CLOSED, OPEN), (OPEN, after)]
    assert after is (CLOSED if act is CircuitBreaker.reset else ISOLATED)


@forms
async def test_a_listener_may_stop_the_program(form: Form) -> None:
    """Its own error comes out; the circuit has opened, and no call is in flight."""
    breaker = CircuitBreaker(failure_threshold=1)

    def stop(_: Event) -> None:
        raise KeyboardInterrupt

    with subscribe(within_calls(stop)), pytest.raises(KeyboardInterrupt):
        await form(breaker, fails, OSError())
    assert (breaker.state, breaker.statistics().in_flight) == (OPEN, 0)


async def test_after_a_listener_that_stops_the_program_others_are_told_of_all() -> None:
    """What it has kept from being told is told with what happens next."""
    breaker, heard = CircuitBreaker(failure_threshold=1), list[Event]()

    def stop(_: Event) -> None:
        breaker.reset()  # so that there is something more to tell
        raise KeyboardInterrupt

    with subscribe(within_calls(stop)), pytest.raises(KeyboardInterrupt):
        await breaker.call(fails, OSError())
    with subscribe(within_calls(heard.append)):
        await fail(breaker)
    assert changes(heard) == [(OPEN, CLOSED), (CLOSED, OPEN)]


# --- by hand --------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("state", [CLOSED, OPEN, HALF_OPEN])
@pytest.mark.parametrize("ending", ["ok", OSError("late")], ids=repr)
async def test_calls_in_flight_when_it_is_isolated_say_nothing(
    autojump_clock: MockClock, form: Form, state: CircuitState, ending: object
) -> None:
    """Neither while it is, nor later; they go on, and come out as they are."""
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=10)
    async with trio.open_nursery() as nursery:
        early = await begin(nursery, breaker, 2, form)
        if state is not CLOSED:
            await fail(breaker)
        if state is HALF_OPEN:
            await trio.sleep(10)
            early += await begin(nursery, breaker, 1, form)
        assert breaker.state is state
        handle = breaker.isolate()
        assert (breaker.state, breaker.retry_after) == (ISOLATED, None)
        assert await early.pop().end(ending) is ending
        assert breaker.state is ISOLATED
        assert await is_refused(breaker, form)
        await trio.sleep(1000)
        assert await is_refused(breaker, form)
        handle.release()
        assert breaker.state is CLOSED
        for visit in early:
            assert await visit.end(ending) is ending
        assert breaker.state is CLOSED
    assert breaker.statistics().calls == (0 if state is CLOSED else 1)
    assert breaker.is_idle


@forms
@pytest.mark.parametrize("ending", ["ok", OSError("late")], ids=repr)
async def test_calls_in_flight_when_it_is_reset_say_nothing(form: Form, ending: object) -> None:
    """Also if it was closed: what led to it before is forgotten, and so is who was under way."""
    breaker = CircuitBreaker(failure_threshold=1)
    async with trio.open_nursery() as nursery:
        [visit] = await begin(nursery, breaker, 1, form)
        breaker.reset()
        assert await visit.end(ending) is ending
    assert (breaker.state, breaker.statistics().calls, breaker.last_failure) == (CLOSED, 0, None)


async def test_handles_may_be_released_in_any_order() -> None:
    """And as often as one likes: the circuit is closed when the last of them is."""
    breaker, rng = CircuitBreaker(), Random(4)
    for _ in range(20):
        held = [breaker.isolate() for _ in range(rng.randint(1, 5))]
        rng.shuffle(held)
        while held:
            assert breaker.state is ISOLATED
            handle = held.pop()
            for _ in range(rng.randint(1, 3)):
                handle.release()
        assert breaker.state is CLOSED
    assert breaker.is_idle


async def test_a_handle_releases_nothing_but_its_own_hold() -> None:
    """Not that of another, after a reset has ended its own."""
    breaker = CircuitBreaker()
    old = breaker.isolate()
    breaker.reset()
    assert breaker.state is CLOSED
    new = breaker.isolate()
    old.release()
    assert breaker.state is ISOLATED
    new.release()
    assert breaker.state is CLOSED


async def test_a_block_releases_however_it_ends() -> None:
    """By an error, which comes out as it is, or by a cancellation."""
    breaker, error = CircuitBreaker(), LookupError()
    with pytest.raises(LookupError) as caught, breaker.isolate():
        raise error
    assert caught.value is error
    with trio.CancelScope() as scope, breaker.isolate() as handle:
        assert breaker.state is ISOLATED
        scope.cancel()
        await trio.lowlevel.checkpoint()
    handle.release()
    assert breaker.state is CLOSED


async def test_what_is_released_starts_anew(autojump_clock: MockClock) -> None:
    """Whatever it was before: the row, the window and the recovery time are forgotten."""
    breaker = CircuitBreaker(failure_threshold=2, failure_rate=0.9, min_calls=3, window_calls=3)
    await fail(breaker)
    breaker.isolate().release()
    assert breaker.is_idle
    await fail(breaker)
    assert breaker.state is CLOSED
    await fail(breaker)
    breaker.isolate().release()
    assert not await is_refused(breaker)
    assert breaker.statistics().failures == 3


async def test_a_reset_forgets_but_what_is_counted(autojump_clock: MockClock) -> None:
    """And calls that began before it say nothing after it."""
    breaker = CircuitBreaker(failure_threshold=2, failure_rate=0.9, min_calls=3, window_calls=3)
    async with trio.open_nursery() as nursery:
        early = await begin(nursery, breaker, 2)
        await fail(breaker, 2)
        assert await is_refused(breaker)
        breaker.reset()
        assert (breaker.state, breaker.retry_after, breaker.last_failure) == (CLOSED, None, None)
        for visit in early:
            await visit.end(OSError("late"))
    now = breaker.statistics()
    assert (now.calls, now.failures, now.rejections, now.opened) == (2, 2, 1, 1)
    assert (now.consecutive_failures, now.failure_rate, now.reason) == (0, None, None)
    assert breaker.is_idle


# --- only watching --------------------------------------------------------------------------------


async def play(breaker: CircuitBreaker, step: str) -> None:
    if step == "ok":
        await breaker.call(returns, 1)
    else:
        await breaker.call(fails, OSError() if step == "fail" else ValueError())


@pytest.mark.parametrize("seed", range(5))
async def test_one_that_only_watches_is_like_its_twin(autojump_clock: MockClock, seed: int) -> None:
    """State by state, and count by count, but that it refuses nothing; and it says so."""
    rng = Random(seed)
    options: dict[str, Any] = {
        "failure_threshold": 2,
        "failure_rate": 0.6,
        "min_calls": 4,
        "recovery_timeout": 5,
        "success_threshold": 2,
    }
    strict, shadow = CircuitBreaker(**options), CircuitBreaker(enforce=False, **options)
    seen, heard = set[CircuitState](), list[Event]()
    with subscribe(heard.append):
        for _ in range(300):
            step, refused = rng.choice(["ok", "ok", "fail", "fail", "mine"]), 0
            try:
                await play(strict, step)
            except CircuitOpenError:
                refused = 1
            except (OSError, ValueError):
                pass
            try:
                await play(shadow, step)
            except (OSError, ValueError):
                assert step != "ok"
            else:
                assert step == "ok"
            assert shadow.state is strict.state
            assert shadow.statistics() == strict.statistics()
            seen.add(strict.state)
            await trio.sleep(rng.choice([0, 1, 2]) * (1 + refused))
    assert seen == {CLOSED, OPEN, HALF_OPEN}
    skipped = [event for event in heard if isinstance(event, RejectionSkipped)]
    rejected = [event for event in heard if isinstance(event, Rejected)]
    assert [event.retry_after for event in skipped] == [event.retry_after for event in rejected]
    assert len(skipped) == shadow.statistics().rejections > 10
