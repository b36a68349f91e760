"""CircuitBreaker in several runs, one after the other and at once, in threads, and in tests."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests._circuits import (
    CLOSED,
    HALF_OPEN,
    ISOLATED,
    OPEN,
    Form,
    begin,
    fail,
    forms,
    guard,
    is_refused,
    succeed,
)
from tests.operations import fails, leaves, returns
from tests.test_circuit_breaker_half_open import RECOVERY, make
from tests.test_rate_limiter_runs import run
from tests.test_semaphore_runs import crash, drive_until_it_hangs, hang
from trio_resilience import CallAbandonedError, Event, Exponential, subscribe
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import CircuitStateChanged
from trio_resilience.testing import test_mode as mode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

starts = pytest.mark.parametrize("first, second", [(1e6, 0.0), (0.0, 1e6), (5.0, 5.0)])


# --- one run after the other ----------------------------------------------------------------------


@starts
@pytest.mark.parametrize("waited", [0, 4, 1000])
def test_an_open_circuit_is_open_in_the_next_run_for_its_whole_time(
    first: float, second: float, waited: float
) -> None:
    """Wherever trio's clock starts, and whether or not the time was over in the run before."""
    breaker = make()

    async def open_it() -> None:
        await fail(breaker)
        await trio.sleep(waited)

    async def wait_for_it() -> None:
        assert breaker.retry_after == RECOVERY
        await trio.sleep(RECOVERY - 0.5)
        assert await is_refused(breaker)
        await trio.sleep(0.5)
        assert not await is_refused(breaker)

    run(open_it, at=first)
    assert (breaker.state, breaker.retry_after) == (OPEN, RECOVERY)
    run(wait_for_it, at=second)
    assert (breaker.state, breaker.statistics().opened) == (CLOSED, 1)


@starts
def test_its_time_starts_when_the_run_first_uses_it(first: float, second: float) -> None:
    """Of what was before that, nobody has told it."""
    breaker = make()

    async def come_late() -> None:
        await trio.sleep(3 * RECOVERY)
        assert await is_refused(breaker)
        assert breaker.retry_after == RECOVERY

    run(partial(fail, breaker), at=first)
    run(come_late, at=second)


def test_recovery_times_go_on_growing_in_the_next_run() -> None:
    """Until it closes."""
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=Exponential(1, jitter="none"))

    async def fail_again(expected: float) -> None:
        if breaker.state is OPEN:
            await trio.sleep(breaker.retry_after or 0)
        await fail(breaker)
        assert breaker.retry_after == expected

    for expected in (1, 2, 4, 8):
        run(partial(fail_again, expected))


@starts
@pytest.mark.parametrize("first_use", ["call", "state", "reset", "isolate"])
def test_a_half_open_circuit_is_open_in_the_next_run(
    first: float, second: float, first_use: str
) -> None:
    """Its probes are lost, and its time starts again; listeners are told so, before all else."""
    breaker, heard = make(success_threshold=2), list[Event]()

    async def prove_half() -> None:
        await fail(breaker)
        await trio.sleep(RECOVERY)
        await succeed(breaker)
        assert breaker.state is HALF_OPEN

    async def go_on() -> None:
        if first_use == "call":
            assert await is_refused(breaker)
        elif first_use == "state":
            assert (breaker.state, breaker.retry_after) == (OPEN, RECOVERY)
            assert await is_refused(breaker)
        else:
            getattr(breaker, first_use)()

    run(prove_half, at=first)
    assert breaker.state is breaker.statistics().state is OPEN
    with subscribe(heard.append):
        run(go_on, at=second)
    [lost, *later] = [event for event in heard if isinstance(event, CircuitStateChanged)]
    assert (lost.previous, lost.state, lost.retry_after) == (HALF_OPEN, OPEN, RECOVERY)
    assert lost.reason == "the run has ended in which its probes were"
    states = {"reset": [CLOSED], "isolate": [ISOLATED]}
    assert [event.state for event in later] == states.get(first_use, [])
    if first_use in {"call", "state"}:
        run(partial(_prove, breaker), at=first)
        assert breaker.state is CLOSED


async def _prove(breaker: CircuitBreaker) -> None:
    assert await is_refused(breaker)
    await trio.sleep(RECOVERY)
    await succeed(breaker)
    assert breaker.state is HALF_OPEN, "what was proven in the run before counts no more"
    await succeed(breaker)


def test_an_isolated_circuit_is_isolated_in_the_next_run() -> None:
    """Until its handle is released, which may come from the run before."""
    breaker, handles = make(), list[Any]()

    async def isolate() -> None:
        await fail(breaker)
        handles.append(breaker.isolate())
        handles.append(breaker.isolate())

    async def release() -> None:
        assert (breaker.state, breaker.retry_after) == (ISOLATED, None)
        assert await is_refused(breaker)
        handles.pop().release()
        assert await is_refused(breaker)

    run(isolate)
    assert breaker.state is ISOLATED
    run(release)
    handles.pop().release()
    assert breaker.state is CLOSED
    assert not run(partial(is_refused, breaker))


@starts
def test_a_window_of_seconds_is_empty_in_the_next_run(first: float, second: float) -> None:
    """Failures in a row are counted on, for they have no times."""
    rates = CircuitBreaker(
        failure_threshold=3, failure_rate=0.5, min_calls=2, window_seconds=1e9, recovery_timeout=1
    )

    async def look() -> None:
        assert rates.statistics().failure_rate is None
        await fail(rates)
        assert rates.statistics().failure_rate == 1
        assert rates.state is CLOSED

    run(look, at=first)
    assert rates.statistics().failure_rate is None
    assert not rates.is_idle
    run(look, at=second)
    assert rates.statistics().consecutive_failures == 2
    run(partial(fail, rates), at=first)
    assert rates.statistics().reason == "3 failures in a row"


# --- runs that die --------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("cancel_in_flight", [True, False])
def test_a_run_that_dies_takes_its_probes_along(
    form: Form, stop: type[BaseException], most: int, cancel_in_flight: bool
) -> None:
    """The next has all the places, after the recovery time."""
    breaker = make(
        half_open_max_calls=most, half_open_timeout=1e9, cancel_in_flight=cancel_in_flight
    )

    async def dies() -> None:
        await fail(breaker)
        await trio.sleep(RECOVERY)
        async with trio.open_nursery() as nursery:
            await begin(nursery, breaker, most, form)
            assert await is_refused(breaker, form)
            raise stop

    with pytest.raises(BaseException) as caught:  # noqa: PT011 - a group, or what is in it
        run(dies)
    assert [type(leaf) for leaf in leaves(caught.value)] == [stop]
    _check_it_works(breaker, form, most)


def _check_it_works(breaker: CircuitBreaker, form: Form, most: int) -> None:
    before = breaker.statistics()
    assert (before.state, before.in_flight) == (OPEN, 0)

    async def lives() -> None:
        assert await is_refused(breaker, form)
        await trio.sleep(RECOVERY)
        async with trio.open_nursery() as nursery:
            probes = await begin(nursery, breaker, most + 1, form)
            assert sum(probe.has_run for probe in probes) == most
            for probe in probes:
                probe.tell("ok")

    run(lives)
    after = breaker.statistics()
    assert (after.state, after.in_flight) == (CLOSED, 0)
    assert after.calls == before.calls + 1


@forms
@pytest.mark.parametrize("cancel_in_flight", [True, False])
def test_a_run_that_crashes_takes_its_probes_along(form: Form, cancel_in_flight: bool) -> None:
    """Nothing of it is cleaned up, and nobody ever leaves."""
    breaker = CircuitBreaker(
        failure_threshold=1, recovery_timeout=0, cancel_in_flight=cancel_in_flight
    )

    async def probe() -> None:
        await fail(breaker)
        await form(breaker, trio.sleep_forever)

    crash(probe)
    assert (breaker.state, breaker.statistics().in_flight) == (OPEN, 0)
    assert not run(partial(is_refused, breaker, form))
    assert (breaker.state, breaker.statistics().in_flight) == (CLOSED, 0)


async def _hang(ending: object) -> object:
    """Hang; then end so, if somebody goes on with it."""
    await hang()
    if isinstance(ending, BaseException):
        raise ending
    return ending


@forms
@pytest.mark.parametrize("ending", ["ok", OSError("late"), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("state", [CLOSED, HALF_OPEN])
@pytest.mark.parametrize("options", [{}, {"failure_rate": 0.5, "window_calls": 20}])
def test_whoever_leaves_a_dead_run_in_the_next_says_nothing(
    form: Form, ending: object, state: Any, options: dict[str, Any]
) -> None:
    """It takes no place of a probe, opens nothing, closes nothing, and is not counted."""
    breaker = make(**options)

    async def dies() -> None:
        if state is HALF_OPEN:
            await fail(breaker)
            await trio.sleep(RECOVERY)
        await drive_until_it_hangs(hanging)
        assert (breaker.state, breaker.statistics().in_flight) == (state, 1)

    async def lives() -> None:
        await trio.sleep(breaker.retry_after or 0)
        await succeed(breaker)
        await fail(breaker)
        await trio.sleep(RECOVERY)
        async with trio.open_nursery() as nursery:
            [probe] = await begin(nursery, breaker, 1, form)
            before = breaker.statistics()
            assert (before.state, before.in_flight) == (HALF_OPEN, 1)
            _go_on(hanging, ending)
            assert breaker.statistics() == before
            assert await is_refused(breaker, form)
            await probe.end("ok")
        assert breaker.state is CLOSED

    hanging: Any = form(breaker, _hang, ending)
    run(dies)
    run(lives)


@forms
def test_a_success_from_a_dead_run_is_not_counted_in_the_next(form: Form) -> None:
    """Also if nothing else has changed since: the circuit was closed all the time."""
    breaker = make()
    hanging: Any = form(breaker, _hang, "ok")

    async def dies() -> None:
        await drive_until_it_hangs(hanging)

    async def lives() -> None:
        await succeed(breaker)
        _go_on(hanging, "ok")
        now = breaker.statistics()
        assert (now.state, now.calls, now.in_flight) == (CLOSED, 1, 0)

    run(dies)
    run(lives)


def _go_on(coro: Coroutine[Any, Any, Any], ending: object) -> None:
    with pytest.raises(type(ending) if isinstance(ending, BaseException) else StopIteration):
        coro.send(None)


@forms
@pytest.mark.parametrize("ending", [OSError("late"), SystemExit(1)], ids=repr)
def test_whoever_leaves_a_dead_run_in_none_says_nothing(form: Form, ending: BaseException) -> None:
    """As when it is collected after the program's last run."""
    breaker = make()
    hanging: Any = form(breaker, _hang, ending)

    async def dies() -> None:
        await drive_until_it_hangs(hanging)

    run(dies)
    before = breaker.statistics()
    _go_on(hanging, ending)
    assert breaker.statistics() == before
    assert (before.state, before.in_flight) == (CLOSED, 0)


# --- two runs at once, and threads ----------------------------------------------------------------


async def _enter(breaker: CircuitBreaker) -> None:
    async with breaker.guard():
        pass


async def _keep_probing(breaker: CircuitBreaker) -> None:
    await breaker.keep_probing(partial(returns, 1))


async def _isolate(breaker: CircuitBreaker) -> None:
    breaker.isolate()


async def _reset(breaker: CircuitBreaker) -> None:
    breaker.reset()


USES = [is_refused, _enter, _keep_probing, _isolate, _reset]


@pytest.mark.parametrize("use", USES, ids=["call", "guard", "keep_probing", "isolate", "reset"])
@pytest.mark.parametrize("state", [CLOSED, OPEN])
def test_two_live_runs_at_once_are_refused(
    use: Callable[[CircuitBreaker], Awaitable[object]], state: Any
) -> None:
    """The second is told so, and what it reads is true; the first goes on undisturbed."""
    breaker, errors = make(), list[RuntimeError]()

    async def second() -> None:
        before = breaker.statistics()
        try:
            await use(breaker)
        except RuntimeError as error:
            errors.append(error)
        assert breaker.statistics() == before
        assert (breaker.state, before.in_flight) == (state, 1)
        assert repr(state) in repr(breaker) or str(state) in repr(breaker)

    async def first() -> None:
        async with trio.open_nursery() as nursery:
            [visit] = await begin(nursery, breaker)
            if state is OPEN:
                await fail(breaker)
            thread = threading.Thread(target=trio.run, args=[second])
            thread.start()
            await trio.to_thread.run_sync(thread.join)
            assert (breaker.state, breaker.statistics().in_flight) == (state, 1)
            await visit.end("ok")
        assert breaker.statistics().in_flight == 0

    trio.run(first)
    assert len(errors) == 1
    assert "two runs of trio at once" in str(errors[0])


def test_a_handle_of_another_live_run_is_refused() -> None:
    """It releases nothing there."""
    breaker, errors = make(), list[RuntimeError]()

    async def second(handle: Any) -> None:
        with pytest.raises(RuntimeError, match="two runs of trio at once") as caught:
            handle.release()
        errors.append(caught.value)

    async def first() -> None:
        handle = breaker.isolate()
        thread = threading.Thread(target=trio.run, args=[second, handle])
        thread.start()
        await trio.to_thread.run_sync(thread.join)
        assert breaker.state is ISOLATED
        handle.release()
        assert breaker.state is CLOSED

    trio.run(first)
    assert len(errors) == 1


def test_in_a_thread_it_tells_how_it_stands_in_the_run() -> None:
    """The time that is left, too, by the clock of the run; to change it, it has to ask the run."""
    breaker, clock = make(failure_rate=0.5, window_seconds=100), MockClock()

    def look() -> tuple[Any, ...]:
        for change in (breaker.isolate, breaker.reset):
            with pytest.raises(RuntimeError, match=r"`trio\.from_thread\.run_sync`"):
                change()
        now = breaker.statistics()
        return breaker.state, repr(breaker), now, breaker.retry_after, breaker.is_disposable

    async def main() -> None:
        await fail(breaker)
        clock.jump(4)
        seen = await trio.to_thread.run_sync(look)
        assert seen == (OPEN, repr(breaker), breaker.statistics(), RECOVERY - 4, False)
        await trio.to_thread.run_sync(trio.from_thread.run_sync, breaker.reset)
        assert breaker.state is CLOSED

    trio.run(main, clock=clock)


# --- tests of users' own code ---------------------------------------------------------------------


@forms
async def test_a_call_that_outlives_a_tests_block_ends_where_it_began(
    autojump_clock: MockClock, form: Form
) -> None:
    """It says nothing about the circuit outside, and takes no place there."""
    breaker = make()
    async with trio.open_nursery() as nursery:
        with mode():
            [visit] = await begin(nursery, breaker, 1, form)
            assert breaker.statistics().in_flight == 1
        assert breaker.statistics().in_flight == 0
        before = breaker.statistics()
        await visit.end(OSError("down"))
        assert breaker.statistics() == before
        await fail(breaker)
    with mode():
        assert not await is_refused(breaker, form)
    assert await is_refused(breaker, form)


@forms
async def test_a_call_from_outside_ends_outside(autojump_clock: MockClock, form: Form) -> None:
    """Also if a block of `test_mode` is entered meanwhile."""
    breaker = make()
    async with trio.open_nursery() as nursery:
        [visit] = await begin(nursery, breaker, 1, form)
        with mode():
            await visit.end(OSError("down"))
            assert (breaker.state, breaker.statistics().calls) == (CLOSED, 0)
    assert (breaker.state, breaker.statistics().in_flight) == (OPEN, 0)


async def test_a_guard_that_is_entered_before_a_tests_block_is_left_inside(
    autojump_clock: MockClock,
) -> None:
    """As fixtures do it."""
    breaker, block = make(), mode()
    held = breaker.guard()
    await held.__aenter__()
    block.__enter__()
    assert breaker.statistics().in_flight == 0
    await held.__aexit__(None, None, None)
    block.__exit__(None, None, None)
    assert (breaker.statistics().in_flight, breaker.statistics().calls) == (0, 1)


@pytest.mark.parametrize("fresh", [True, False])
async def test_without_delays_each_call_to_an_open_circuit_is_a_probe(
    autojump_clock: MockClock, fresh: bool
) -> None:
    """But one at a time; outside of the block, the time it was opened for still has to pass."""
    breaker = make()
    await fail(breaker)
    with mode(delays=False, fresh=fresh):
        await fail(breaker, 3)
        assert (breaker.state, breaker.retry_after) == (OPEN, 0)
        async with trio.open_nursery() as nursery:
            [probe] = await begin(nursery, breaker, 1, guard)
            assert await is_refused(breaker)
            await probe.end("ok")
        assert breaker.state is CLOSED
    assert breaker.state is (OPEN if fresh else CLOSED)
    assert await is_refused(breaker) is fresh


async def test_recovery_times_in_a_tests_block_are_exact(autojump_clock: MockClock) -> None:
    """The longest that jitter could have drawn; or drawn, if the test wants that."""
    recovery = Exponential(8, max_delay=100, jitter="full")
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=recovery)
    with mode():
        for expected in (8, 16, 32):
            await fail(breaker)
            assert breaker.retry_after == expected
            await trio.sleep(expected)
    with mode(jitter=True):
        await fail(breaker)
        assert 0 < (breaker.retry_after or 0) < 8


async def test_a_prober_without_delays_closes_it_at_once(autojump_clock: MockClock) -> None:
    """In a test nobody has to wait for it."""
    breaker = make()
    with mode(delays=False):
        async with trio.open_nursery() as nursery:
            await nursery.start(breaker.keep_probing, partial(returns, 1))
            await fail(breaker)
            before = trio.current_time()
            while breaker.state is not CLOSED:
                await trio.sleep(0.001)
            assert trio.current_time() - before < 0.1
            nursery.cancel_scope.cancel()


async def test_in_a_tests_block_calls_are_given_up_too(autojump_clock: MockClock) -> None:
    """Those of the block, and not those outside."""
    breaker = make(cancel_in_flight=True)
    async with trio.open_nursery() as nursery:
        [outside] = await begin(nursery, breaker)
        with mode():
            [inside] = await begin(nursery, breaker)
            await fail(breaker)
            await wait_all_tasks_blocked()
        assert isinstance(inside.outcome, CallAbandonedError)
        assert outside.outcome == "in flight"
        with pytest.raises(OSError, match="down"):
            await breaker.call(fails, OSError("down"))
        await wait_all_tasks_blocked()
        assert isinstance(outside.outcome, CallAbandonedError)
