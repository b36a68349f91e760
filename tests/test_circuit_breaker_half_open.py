"""CircuitBreaker, half open: who is a probe, and what those decide that say nothing, or hang."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._circuits import (
    CLOSED,
    HALF_OPEN,
    OPEN,
    Form,
    begin,
    fail,
    forms,
    is_refused,
    stops,
    succeed,
)
from tests.operations import fails, returns
from tests.test_concurrency_interrupts import run
from trio_resilience import CircuitOpenError, RejectedError
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience.testing._scheduling import seeded_scheduler

if TYPE_CHECKING:
    from trio.testing import MockClock

RECOVERY = 10


def make(**options: Any) -> CircuitBreaker:
    return CircuitBreaker(failure_threshold=1, recovery_timeout=RECOVERY, **options)


async def reopening(**options: Any) -> CircuitBreaker:
    """Return a circuit that has opened, and whose recovery time is over."""
    breaker = make(**options)
    await fail(breaker)
    await trio.sleep(RECOVERY)
    return breaker


# --- how many -------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Crowd:
    """Callers at one instant, some of them let through."""

    breaker: CircuitBreaker
    form: Form
    running: int = 0
    most: int = 0
    ran: int = 0
    refused: int = 0
    told: list[float | None] = attrs.field(factory=list[float | None])

    async def op(self) -> None:
        self.running += 1
        self.ran += 1
        self.most = max(self.most, self.running)
        await trio.sleep(1)
        self.running -= 1

    async def come(self) -> None:
        try:
            await self.form(self.breaker, self.op)
        except CircuitOpenError as error:
            self.refused += 1
            self.told.append(error.retry_after)


@forms
@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_fifty_at_the_instant_at_which_it_reopens(form: Form, most: int, seed: int) -> None:
    """Exactly as many run as there may be; whoever comes while they do is refused too."""

    async def main() -> None:
        breaker = await reopening(half_open_max_calls=most, success_threshold=most)
        crowd = Crowd(breaker, form)
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(crowd.come)
            await trio.sleep(0.5)
            assert (crowd.ran, crowd.refused) == (most, 50 - most)
            for _ in range(50):
                nursery.start_soon(crowd.come)
            await wait_all_tasks_blocked()
            assert (crowd.ran, crowd.refused, breaker.state) == (most, 100 - most, HALF_OPEN)
        assert set(crowd.told) == {None}
        assert (breaker.state, crowd.most) == (CLOSED, most)

    with seeded_scheduler(seed):
        run(main)


@forms
async def test_all_who_sleep_until_it_may_be_tried_come_at_once(
    autojump_clock: MockClock, form: Form
) -> None:
    """As they do who were told when to come back: one of them is let through."""
    breaker = make()
    await fail(breaker)
    crowd = Crowd(breaker, form)

    async def come_back() -> None:
        with pytest.raises(CircuitOpenError) as caught:
            await form(breaker, returns, 1)
        await trio.sleep(caught.value.retry_after or 0)
        await crowd.come()

    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(come_back)
    assert (crowd.ran, crowd.refused, breaker.state) == (1, 49, CLOSED)


@forms
async def test_enough_successes_close_it(autojump_clock: MockClock, form: Form) -> None:
    """One at a time, if there may be no more; a call in between is refused."""
    breaker = await reopening(success_threshold=3)
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            [probe] = await begin(nursery, breaker, 1, form)
            assert await is_refused(breaker, form)
            assert breaker.state is HALF_OPEN
            await probe.end("ok")
    assert breaker.state is CLOSED
    assert breaker.is_idle


@forms
async def test_one_failure_opens_it_again(autojump_clock: MockClock, form: Form) -> None:
    """For the whole recovery time; what the other probes say is late, good or bad."""
    breaker = await reopening(half_open_max_calls=3, success_threshold=3)
    async with trio.open_nursery() as nursery:
        first, second, third = await begin(nursery, breaker, 3, form)
        await first.end("ok")
        await trio.sleep(1)
        await second.end(OSError("still down"))
        assert (breaker.state, breaker.retry_after) == (OPEN, RECOVERY)
        await trio.sleep(RECOVERY)
        fresh = await begin(nursery, breaker, 2, form)
        assert await third.end("ok") == "ok"
        for probe in fresh:
            await probe.end("ok")
        assert breaker.state is HALF_OPEN
        await succeed(breaker, 1, form)
    now = breaker.statistics()
    assert (now.state, now.opened, now.calls, now.failures) == (CLOSED, 2, 6, 2)


# --- what decides nothing -------------------------------------------------------------------------

SAYS_NOTHING: list[BaseException] = [
    ValueError("mine"),
    RejectedError(),
    CircuitOpenError("inner"),
    ExceptionGroup("", [OSError(), ValueError()]),
]


async def check_that_a_place_is_free(breaker: CircuitBreaker, form: Form) -> None:
    """Exactly one, and whoever takes it decides."""
    assert (breaker.state, breaker.statistics().in_flight) == (HALF_OPEN, 0)
    async with trio.open_nursery() as nursery:
        [probe] = await begin(nursery, breaker, 1, form)
        assert probe.has_run
        assert await is_refused(breaker, form)
        await probe.end("ok")
    assert breaker.state is CLOSED


@forms
@pytest.mark.parametrize("error", SAYS_NOTHING, ids=repr)
async def test_an_error_that_is_ignored_gives_the_place_back(
    autojump_clock: MockClock, form: Form, error: Exception
) -> None:
    """Any number of times."""
    breaker = await reopening()
    for _ in range(5):
        with pytest.raises(type(error)):
            await form(breaker, fails, error)
    assert breaker.statistics().calls == 1
    await check_that_a_place_is_free(breaker, form)


@forms
@stops
async def test_what_stops_the_program_gives_the_place_back(
    autojump_clock: MockClock, form: Form, stop: BaseException
) -> None:
    """Ctrl-C, the interpreter's end, and groups that have one of them in it."""
    breaker = await reopening()
    async with trio.open_nursery() as nursery:
        [probe] = await begin(nursery, breaker, 1, form)
        assert await probe.end(stop) is stop
    await check_that_a_place_is_free(breaker, form)


@forms
async def test_a_cancelled_probe_gives_the_place_back(
    autojump_clock: MockClock, form: Form
) -> None:
    """Whether a scope, a time limit or its nursery cancels it, and when nothing has run yet."""
    breaker = await reopening()
    async with trio.open_nursery() as nursery:
        [probe] = await begin(nursery, breaker, 1, form)
        await probe.cancel()
        with trio.move_on_after(1):
            await form(breaker, trio.sleep_forever)
        with trio.CancelScope() as scope:
            scope.cancel()
            await form(breaker, trio.lowlevel.checkpoint)
        await begin(nursery, breaker, 1, form)
        nursery.cancel_scope.cancel()
    await check_that_a_place_is_free(breaker, form)


@forms
async def test_a_probe_whose_result_cannot_be_judged_gives_the_place_back(
    autojump_clock: MockClock, form: Form
) -> None:
    """The predicate's own error comes out, and decides nothing."""

    def judge(result: object) -> bool:
        if result == "strange":
            raise LookupError
        return False

    breaker = await reopening(failure_result=judge)
    with pytest.raises(LookupError):
        await form(breaker, returns, "strange")
    await check_that_a_place_is_free(breaker, form)


# --- what is late ---------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("ending", ["ok", OSError("late"), ValueError("late")], ids=repr)
async def test_a_word_from_before_decides_nothing(
    autojump_clock: MockClock, form: Form, ending: object
) -> None:
    """While it is open, while a probe runs, when none does, and when it is closed again."""
    breaker = make()
    async with trio.open_nursery() as nursery:
        early = await begin(nursery, breaker, 4, form)
        await fail(breaker)
        assert await early[0].end(ending) is ending
        assert (breaker.state, breaker.retry_after) == (OPEN, RECOVERY)
        await trio.sleep(RECOVERY)
        [probe] = await begin(nursery, breaker, 1, form)
        await early[1].end(ending)
        assert breaker.state is HALF_OPEN
        assert await is_refused(breaker, form)
        await probe.cancel()
        await early[2].end(ending)
        assert breaker.state is HALF_OPEN
        await succeed(breaker, 1, form)
        await early[3].end(ending)
        assert breaker.state is CLOSED
    assert breaker.statistics().calls == 2
    assert breaker.is_idle


async def test_a_late_word_takes_no_place_from_the_probes(autojump_clock: MockClock) -> None:
    """Nor does it give one: the probes of a later round are counted by themselves."""
    breaker = await reopening(half_open_max_calls=2, success_threshold=2)
    async with trio.open_nursery() as nursery:
        old, failing = await begin(nursery, breaker, 2)
        await failing.end(OSError())
        await trio.sleep(RECOVERY)
        new = await begin(nursery, breaker, 2)
        await old.end("ok")
        assert await is_refused(breaker)
        await new[0].cancel()
        assert not await is_refused(breaker)
        await new[1].end("ok")
    assert breaker.state is CLOSED


@forms
async def test_an_operation_may_call_its_own_circuit(autojump_clock: MockClock, form: Form) -> None:
    """Closed, both are calls; the inner call of a probe is refused, for the place is taken."""
    breaker = make()

    async def op() -> bool:
        return await is_refused(breaker, form)

    assert not await form(breaker, op)
    await fail(breaker)
    await trio.sleep(RECOVERY)
    assert await form(breaker, op)
    assert breaker.state is CLOSED
