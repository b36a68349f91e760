"""CircuitBreaker: probes of its own, in several runs, and in tests of users' own code."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.operations import Steps, Stopwatch, fails, returns, within_calls
from tests.test_circuit_breaker_basics import is_refused, trip
from tests.test_concurrency_interrupts import run
from trio_resilience import Constant, Event, Exponential, Rejected, subscribe
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import CircuitState, CircuitStateChanged
from trio_resilience.testing import test_mode as mode

if TYPE_CHECKING:
    from trio.testing import MockClock

CLOSED, OPEN, HALF_OPEN, ISOLATED = CircuitState


# --- probes of its own --------------------------------------------------------------------------


async def test_it_probes_at_the_recovery_pace(autojump_clock: MockClock) -> None:
    """Until enough probes have succeeded; a call is never one, and nobody has to call."""
    breaker = CircuitBreaker(
        failure_threshold=1,
        recovery_timeout=Exponential(10, jitter="none"),
        success_threshold=2,
        failure_result=lambda result: result == "bad",
    )
    watch, times, script = Stopwatch(), list[float](), [OSError(), "bad", ValueError(), 1, 1, 1]

    async def probe() -> object:
        times.append(watch.seconds)
        result = script.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.keep_probing, probe)
        assert not breaker.is_disposable
        await trip(breaker)
        await trio.sleep(0.5)
        for _ in range(129):
            await trio.sleep(1)
            assert await is_refused(breaker) == (breaker.state is not CLOSED)
        nursery.cancel_scope.cancel()
    assert times == [10, 30, 60, 90, 120]
    assert breaker.state is CLOSED
    assert breaker.is_idle


async def test_a_probe_that_hangs_has_failed(autojump_clock: MockClock) -> None:
    """After the time that probes have; nor does one that was slow say that it works."""
    breaker = CircuitBreaker(
        failure_threshold=1,
        slow_call_rate=0.5,
        slow_call_duration=5,
        recovery_timeout=10,
        half_open_timeout=20,
    )
    watch, times, durations = Stopwatch(), list[float](), [math.inf, 6, 1]

    async def probe() -> None:
        times.append(watch.seconds)
        await trio.sleep(durations.pop(0))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(breaker.keep_probing, probe)
        await trip(breaker)
        await trio.sleep(31)
        assert breaker.last_failure is not None
        assert breaker.last_failure.message == "the probe took longer than 20 s"
        await trio.sleep(100)
        nursery.cancel_scope.cancel()
    assert times == [10, 40, 56]
    assert breaker.state is CLOSED


async def test_it_probes_beside_calls_that_are_probes_already(autojump_clock: MockClock) -> None:
    """It waits for them; if they are cancelled, it takes their place."""
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=10, half_open_timeout=100)
    await trip(breaker)
    await trio.sleep(10)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(25):
            async with trio.open_nursery() as calls:
                calls.start_soon(breaker.call, trio.sleep_forever)
                await wait_all_tasks_blocked()
                await nursery.start(breaker.keep_probing, partial(returns, 1))
        assert breaker.state is HALF_OPEN
        await trio.sleep(10)
        assert breaker.state is CLOSED
        nursery.cancel_scope.cancel()


async def test_while_it_waits_for_calls_that_are_probes_it_rests(
    autojump_clock: MockClock,
) -> None:
    """It looks again when something has changed, or at the recovery pace."""
    breaker, steps = CircuitBreaker(failure_threshold=1, half_open_timeout=1e9), Steps()
    await trip(breaker)
    await trio.sleep(60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(breaker.call, trio.sleep_forever)
        await wait_all_tasks_blocked()
        await nursery.start(breaker.keep_probing, partial(returns, 1))
        trio.lowlevel.add_instrument(steps)
        await trio.sleep(600)
        trio.lowlevel.remove_instrument(steps)
        nursery.cancel_scope.cancel()
    assert steps.count < 100


async def test_the_pace_of_a_prober_counts_from_the_end_of_each_probe(
    autojump_clock: MockClock,
) -> None:
    """However long it has taken."""
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=10, success_threshold=2)
    watch, times = Stopwatch(), list[float]()

    async def probe() -> None:
        times.append(watch.seconds)
        await trio.sleep(3)

    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.keep_probing, probe)
        await trip(breaker)
        await trio.sleep(40)
        nursery.cancel_scope.cancel()
    assert times == [10, 23]


async def test_when_probing_ends_calls_are_probes_again(autojump_clock: MockClock) -> None:
    """Also if it ends in the middle of a probe."""
    breaker = CircuitBreaker(failure_threshold=1)
    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.keep_probing, trio.sleep_forever)
        await trip(breaker)
        await trio.sleep(61)
        assert await is_refused(breaker)
        nursery.cancel_scope.cancel()
    assert breaker.state is HALF_OPEN
    assert not await is_refused(breaker)
    assert breaker.state is CLOSED


async def test_a_probe_that_is_no_async_function_is_a_mistake(autojump_clock: MockClock) -> None:
    """At once, or when it is called; it is never taken for an outage."""
    breaker = CircuitBreaker(failure_threshold=1)
    with pytest.raises(TypeError, match=r"^`probe` must be an async function"):
        await breaker.keep_probing(len)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await trip(breaker)
    with pytest.raises(TypeError, match="which can't be awaited"):
        await breaker.keep_probing(lambda: 3)  # type: ignore[arg-type,return-value]  # pyright: ignore[reportArgumentType]
    assert breaker.state is HALF_OPEN
    assert breaker.is_disposable


async def test_a_prober_without_delays_lets_the_clock_move(autojump_clock: MockClock) -> None:
    """Others have their turn, and their time."""
    breaker, probes = CircuitBreaker(failure_threshold=1, recovery_timeout=0), list[float]()

    async def probe() -> None:
        probes.append(trio.current_time())
        raise OSError

    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.keep_probing, probe)
        await trip(breaker)
        await trio.sleep(0.1)
        nursery.cancel_scope.cancel()
    assert 50 < len(probes) < 200


# --- runs, and tests ----------------------------------------------------------------------------


def test_it_is_as_open_in_the_next_run() -> None:
    """Its time starts again, a probe that was under way is lost, and counts go on."""
    breaker = CircuitBreaker(failure_threshold=1, failure_rate=0.5, window_seconds=100)

    async def first() -> None:
        await trip(breaker)
        await trio.sleep(60)
        with trio.move_on_after(1):
            await breaker.call(_crash)

    async def second() -> None:
        assert breaker.retry_after == 60
        assert breaker.statistics().failure_rate is None
        await trio.sleep(59)
        assert await is_refused(breaker)
        await trio.sleep(1)
        assert not await is_refused(breaker)

    with pytest.raises(SystemExit):
        run(first)
    assert breaker.statistics().failure_rate is None
    run(second)
    assert breaker.statistics().calls == 2


async def _crash() -> None:
    raise SystemExit


def test_a_window_of_calls_goes_on_in_the_next_run() -> None:
    """And can be looked at in between."""
    breaker = CircuitBreaker(failure_rate=1, window_calls=3, min_calls=3)
    for rate in (1 / 1, 2 / 2):
        run(partial(trip, breaker))
        assert breaker.statistics().failure_rate == rate
        assert not breaker.is_idle
    run(partial(trip, breaker))
    assert breaker.statistics().reason == "3 of 3 calls failed"


def test_outside_of_a_run_probes_are_lost() -> None:
    """It reads OPEN, for the whole time that is to come."""
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=7)

    async def main() -> None:
        await trip(breaker)
        await trio.sleep(7)
        with pytest.raises(KeyboardInterrupt):
            await breaker.call(fails, KeyboardInterrupt())
        assert breaker.state is HALF_OPEN

    run(main)
    assert (breaker.state, breaker.retry_after, breaker.is_disposable) == (OPEN, 7, False)
    heard = list[Event]()
    with subscribe(within_calls(heard.append)):
        assert run(partial(is_refused, breaker))
    assert [type(event) for event in heard] == [CircuitStateChanged, Rejected]


@pytest.mark.parametrize("outcome", [None, OSError("late"), SystemExit()], ids=repr)
@pytest.mark.parametrize("cancel_in_flight", [True, False])
def test_what_is_left_of_a_dead_run_counts_for_nothing(
    outcome: BaseException | None, cancel_in_flight: bool
) -> None:
    """A coroutine that ends when it is collected, or in the next run."""
    breaker = CircuitBreaker(
        failure_threshold=1, failure_result=bool, cancel_in_flight=cancel_in_flight
    )

    async def start() -> list[Any]:
        guard = breaker.guard()
        await guard.__aenter__()
        coro: Any = breaker.call(_outlive, outcome)
        coro.send(None)
        return [guard, coro]

    guard, coro = trio.run(start)
    if cancel_in_flight:
        # A scope of trio's can't be left outside of its run.
        with pytest.raises(RuntimeError):
            coro.send(None)
    else:
        with pytest.raises((StopIteration, OSError, SystemExit)):
            coro.send(None)
    with pytest.raises(StopIteration):
        guard.__aexit__(None, None, None).send(None)
    now = breaker.statistics()
    assert (now.state, now.calls, now.in_flight) == (CLOSED, 0, 0)


async def _outlive(outcome: BaseException | None) -> int:
    await _Suspend()
    if outcome is not None:
        raise outcome
    return 1


class _Suspend:
    def __await__(self) -> Any:
        yield


async def test_a_tests_block_has_a_circuit_of_its_own(autojump_clock: MockClock) -> None:
    """Closed, and with delays as the test wants them."""
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=Constant(60, jitter="full"))
    await trip(breaker)
    opened_for = breaker.retry_after
    with mode():
        assert breaker.is_idle
        await trip(breaker)
        assert breaker.retry_after == 60
        assert await is_refused(breaker)
    with mode(delays=False):
        await trip(breaker)
        assert breaker.retry_after == 0
        assert not await is_refused(breaker)
        handle = breaker.isolate()
    handle.release()
    with mode(delays=False, fresh=False):
        assert (breaker.state, breaker.retry_after) == (OPEN, 0)
        assert not await is_refused(breaker)
        assert breaker.state is CLOSED
    await trip(breaker)
    with mode(jitter=True, fresh=False):
        assert breaker.state is OPEN
        breaker.reset()
        await trip(breaker)
        assert 0 < (breaker.retry_after or 0) < 60
        assert breaker.retry_after != opened_for
