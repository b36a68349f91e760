"""CircuitBreaker: calls that still hang when it opens are released at once, and for good."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._circuits import CLOSED, OPEN, Form, Visit, begin, fail, forms
from tests.operations import Stopwatch, reachable
from tests.test_circuit_breaker_half_open import RECOVERY, reopening
from trio_resilience import (
    CallAbandonedError,
    Constant,
    OperationTimeoutError,
    Retry,
    Timeout,
)
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._fallback import Fallback

if TYPE_CHECKING:
    from trio.testing import MockClock


def make(**options: Any) -> CircuitBreaker:
    return CircuitBreaker(failure_threshold=1, cancel_in_flight=True, **options)


@attrs.define(eq=False)
class Ticks(trio.abc.Instrument):
    """Count how often the scheduler has looked for what is runnable."""

    count: int = 0

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002
        self.count += 1


@forms
async def test_a_hundred_who_hang_are_released_within_one_tick(form: Form) -> None:
    """Each with an error of its own, which says no more than that; and none of them is counted."""
    breaker, ticks = make(), Ticks()
    ends = list[tuple[int, CallAbandonedError]]()

    async def caller() -> None:
        try:
            await form(breaker, trio.sleep_forever)
        except CallAbandonedError as error:
            ends.append((ticks.count, error))

    async with trio.open_nursery() as nursery:
        for _ in range(100):
            nursery.start_soon(caller)
        await wait_all_tasks_blocked()
        assert breaker.statistics().in_flight == 100
        trio.lowlevel.add_instrument(ticks)
        await fail(breaker)
        assert (ticks.count, ends) == (0, [])
    trio.lowlevel.remove_instrument(ticks)
    assert {tick for tick, _ in ends} == {1}
    errors = [error for _, error in ends]
    assert len(set(map(id, errors))) == 100
    assert not any(error.__cause__ or isinstance(error, OSError) for error in errors)
    now = breaker.statistics()
    assert (now.calls, now.failures, now.in_flight) == (1, 1, 0)


# --- at one instant -------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("ending", ["done", OSError("mine"), ValueError("mine")], ids=repr)
async def test_who_has_ended_just_before_keeps_his_end(form: Form, ending: object) -> None:
    """Woken with it in the step in which the circuit opens; who is woken later is given up."""
    breaker = make()
    async with trio.open_nursery() as nursery:
        before, after = await begin(nursery, breaker, 2, form)
        before.tell(ending)
        await fail(breaker)
        after.tell(ending)
        await wait_all_tasks_blocked()
    assert before.outcome is ending
    assert isinstance(after.outcome, CallAbandonedError)
    assert breaker.statistics().calls == 1


@forms
@pytest.mark.parametrize("is_first", [True, False])
async def test_who_is_cancelled_from_outside_at_that_instant_is_cancelled(
    form: Form, is_first: bool
) -> None:
    """Before or after, as long as it has not left."""
    breaker = make()
    async with trio.open_nursery() as nursery:
        [visit] = await begin(nursery, breaker, 1, form)
        if is_first:
            visit.scope.cancel()
        await fail(breaker)
        visit.scope.cancel()
        await wait_all_tasks_blocked()
    assert visit.outcome == "cancelled"
    assert breaker.statistics().in_flight == 0


@forms
@pytest.mark.parametrize("cancelled_at", [0.5, 1.5])
async def test_who_is_cancelled_from_outside_while_it_cleans_up_is_cancelled(
    autojump_clock: MockClock, form: Form, cancelled_at: float
) -> None:
    """It is given up after a second, and takes three to leave."""
    breaker, scope, watch = make(), trio.CancelScope(), Stopwatch()

    async def tidy() -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3 - watch.seconds)

    async def caller() -> None:
        with scope:
            await form(breaker, tidy)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller)
        await wait_all_tasks_blocked()
        scope.deadline = trio.current_time() + cancelled_at
        await trio.sleep(1)
        await fail(breaker)
    assert scope.cancelled_caught
    assert watch.seconds == 3


@forms
async def test_a_time_limit_around_it_that_expires_at_that_instant_wins(
    autojump_clock: MockClock, form: Form
) -> None:
    """It is further out; one inside has not expired, and does not count it as if it had."""
    breaker, around, inside = make(), Timeout(1), Timeout(2)

    async def op() -> None:
        await inside.call(trio.sleep_forever)

    async def trip() -> None:
        await trio.sleep(1)
        await fail(breaker)

    async with trio.open_nursery() as nursery:
        [visit] = await begin(nursery, breaker, 1, form)
        nursery.start_soon(trip)
        with pytest.raises(OperationTimeoutError):
            await around.call(form, breaker, op)
        await wait_all_tasks_blocked()
    assert isinstance(visit.outcome, CallAbandonedError)
    assert (around.statistics().timed_out, inside.statistics().timed_out) == (1, 0)
    assert breaker.state is OPEN


# --- who is released ------------------------------------------------------------------------------


@forms
async def test_a_probe_that_fails_releases_the_others(
    autojump_clock: MockClock, form: Form
) -> None:
    """They would be too late anyway."""
    breaker = await reopening(cancel_in_flight=True, half_open_max_calls=3)
    async with trio.open_nursery() as nursery:
        probes = await begin(nursery, breaker, 3, form)
        await probes[0].end(OSError("down"))
    assert isinstance(probes[0].outcome, OSError)
    assert all(isinstance(probe.outcome, CallAbandonedError) for probe in probes[1:])
    assert breaker.statistics().opened == 2


@forms
async def test_who_finds_a_probe_hung_releases_it(autojump_clock: MockClock, form: Form) -> None:
    """And is the next himself, if the recovery time is over as well; he is not released."""
    breaker = await reopening(cancel_in_flight=True)
    async with trio.open_nursery() as nursery:
        [hung] = await begin(nursery, breaker, 1, form)
        await trio.sleep(2 * RECOVERY)
        [probe] = await begin(nursery, breaker, 1, form)
        assert isinstance(hung.outcome, CallAbandonedError)
        assert await probe.end("ok") == "ok"
    assert breaker.state is CLOSED


async def test_a_prober_that_fails_releases_calls_that_hang(autojump_clock: MockClock) -> None:
    """Those let in before it began to probe, as probes of their own."""
    breaker = await reopening(cancel_in_flight=True, half_open_max_calls=2)

    async def probe() -> None:
        raise OSError

    async with trio.open_nursery() as nursery:
        [visit] = await begin(nursery, breaker)
        await nursery.start(breaker.keep_probing, probe)
        await trio.sleep(RECOVERY + 1)
        assert isinstance(visit.outcome, CallAbandonedError)
        nursery.cancel_scope.cancel()


@forms
async def test_what_is_done_by_hand_releases_nobody(form: Form) -> None:
    """Calls that run go on, and say nothing any more."""
    breaker = make()
    async with trio.open_nursery() as nursery:
        [visit] = await begin(nursery, breaker, 1, form)
        with breaker.isolate():
            await wait_all_tasks_blocked()
        breaker.reset()
        await wait_all_tasks_blocked()
        assert visit.outcome == "in flight"
        assert await visit.end("ok") == "ok"
    assert breaker.statistics().calls == 0


# --- what is around it ----------------------------------------------------------------------------


async def _call_under(policy: Any, breaker: CircuitBreaker, op: Any) -> object:
    result: object = await policy.call(breaker.call, op)
    return result


async def _give_up(breaker: CircuitBreaker, policy: Any) -> Visit:
    """Return a call under *policy* around *breaker* that was given up."""
    async with trio.open_nursery() as nursery:
        visit = Visit(breaker, partial(_call_under, policy))
        nursery.start_soon(visit.make)
        await wait_all_tasks_blocked()
        await fail(breaker)
    return visit


async def test_a_retry_around_it_does_not_call_again(autojump_clock: MockClock) -> None:
    """It is no failure of the moment: the circuit is open."""
    retry, watch = Retry(max_attempts=5, backoff=Constant(100)), Stopwatch()
    visit = await _give_up(make(recovery_timeout=1), retry)
    assert isinstance(visit.outcome, CallAbandonedError)
    assert (retry.statistics().attempts, watch.seconds) == (1, 0)


async def test_a_fallback_around_it_has_no_say() -> None:
    """Nobody knows what the call has done: it is not for a stand-in to say that all is well."""
    fallback = Fallback(value="instead")
    visit = await _give_up(make(), fallback)
    assert isinstance(visit.outcome, CallAbandonedError)
    assert fallback.statistics().used == 0


async def test_a_circuit_around_it_does_not_count_it() -> None:
    """Of two, one in the other, only that counts which has seen the failure."""
    outer = CircuitBreaker(failure_threshold=1)
    visit = await _give_up(make(), outer)
    assert isinstance(visit.outcome, CallAbandonedError)
    assert (outer.state, outer.statistics().calls) == (CLOSED, 0)


@forms
async def test_an_operation_of_several_tasks_is_given_up_as_one(form: Form) -> None:
    """With one bare error; no group, and nothing of the cancellation on it."""
    breaker = make()

    async def op(fn: Any) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(fn)

    async def call_with_several(breaker: CircuitBreaker, fn: Any) -> object:
        result: object = await form(breaker, op, fn)
        return result

    async with trio.open_nursery() as nursery:
        visit = Visit(breaker, call_with_several)
        nursery.start_soon(visit.make)
        await wait_all_tasks_blocked()
        await fail(breaker)
    assert isinstance(visit.outcome, CallAbandonedError)
    assert visit.outcome.__suppress_context__ or reachable(visit.outcome) == [visit.outcome]
