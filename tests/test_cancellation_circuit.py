"""CircuitBreaker, cancelled at every instant: no place of a probe is lost, and nothing is counted.

What is counted is compared with what the operations themselves saw: those that came to an end of
their own, and during which the circuit did not change its state.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._circuits import CLOSED, HALF_OPEN, OPEN, Form, forms
from tests.operations import fails
from trio_resilience import CallAbandonedError, CircuitOpenError, Event, subscribe
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import CircuitStateChanged
from trio_resilience.testing import Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Victim = Callable[["World"], Awaitable[object]]

pytestmark = pytest.mark.watchdog(180)

RECOVERY = 5


@attrs.define(eq=False)
class World:
    """A circuit, what it should have counted, and those who use it."""

    form: Form
    breaker: CircuitBreaker
    era: int = 0
    """How often the circuit has changed its state."""
    running: int = 0
    most: int = 0
    """How many ran at once, at most, while the circuit was half open."""
    said: int = 0
    """Operations that ended by themselves, in the state in which they had begun."""
    failed: int = 0
    refused: int = 0

    def hear(self, event: Event) -> None:
        self.era += isinstance(event, CircuitStateChanged)

    async def work(self, error: Exception | None = None, rounds: int = 2) -> None:
        """Suspend; then end, and note whether that should count."""
        era = self.era
        self.running += 1
        if self.breaker.state is HALF_OPEN:
            self.most = max(self.most, self.running)
        try:
            await pause(rounds)
        finally:
            self.running -= 1
        self.say(era, error)
        if error is not None:
            raise error

    def say(self, era: int, error: Exception | None = None) -> None:
        if era == self.era:
            self.said += 1
            self.failed += error is not None

    async def fail(self) -> None:
        await self.work(OSError("down"))

    async def hang(self) -> None:
        """Suspend until the circuit gives it up."""
        await pause()
        await trio.sleep_forever()

    async def use(self, op: Callable[..., Awaitable[None]], *args: Any) -> None:
        """Make a call, and count what became of it."""
        try:
            await self.form(self.breaker, op, *args)
        except CircuitOpenError:
            self.refused += 1
        except (CallAbandonedError, OSError):
            pass

    async def trip(self) -> None:
        """Open the circuit; unless it is open already, without suspending."""
        with pytest.raises((OSError, CircuitOpenError)) as caught:
            await self.breaker.call(fails, OSError("down"))
        was_refused = isinstance(caught.value, CircuitOpenError)
        self.refused += was_refused
        self.said += not was_refused
        self.failed += not was_refused

    async def heard(self, fn: Callable[[], Awaitable[object]]) -> None:
        """Run *fn*, and hear of every change of state that it brings about."""
        with subscribe(self.hear):
            await fn()

    async def come_back(self) -> None:
        """Be let through when the recovery time is over, as many at a time as there are places."""
        await trio.sleep(self.breaker.retry_after or 0)
        places = self.breaker.half_open_max_calls if self.breaker.state is not CLOSED else 3
        before = self.refused
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(self.use, self.work)
        assert self.refused - before == 3 - places
        assert self.breaker.state is CLOSED

    def check(self) -> None:
        """Raise unless all has been given back, and counted for what it was."""
        now = self.breaker.statistics()
        assert (self.running, now.in_flight) == (0, 0)
        assert (now.calls, now.failures, now.rejections) == (self.said, self.failed, self.refused)
        assert self.breaker.is_disposable


def cancel(
    victim: Victim,
    others: Sequence[Victim],
    *expected: type[Exception],
    form: Form,
    seeds: int = 2,
    **options: Any,
) -> None:
    """Cancel *victim* everywhere, beside others that use the same circuit."""
    __tracebackhide__ = True

    def scenario() -> Scenario:
        breaker = CircuitBreaker(recovery_timeout=RECOVERY, half_open_timeout=1e9, **options)
        world = World(form, breaker)
        return Scenario(
            lambda _: world.heard(partial(victim, world)),
            others=[partial(world.heard, partial(other, world)) for other in others],
            fresh_user=partial(world.heard, world.come_back),
            invariant=world.check,
            expected=expected,
        )

    report = cancel_everywhere(scenario, seeds=range(seeds))
    assert report.cancellations > 0


async def call_twice(world: World) -> None:
    """Be one of the others: an ok and a failure."""
    await world.use(world.work)
    await world.use(world.fail)


async def come_later(world: World) -> None:
    """Be one of the others, at about the time at which it may be tried again."""
    await trio.sleep(RECOVERY)
    await pause()
    await world.use(world.work)
    await world.use(world.work, None, 1)


# --- calls ----------------------------------------------------------------------------------------


@forms
def test_a_call_through_a_closed_circuit(form: Form) -> None:
    async def victim(world: World) -> None:
        await world.form(world.breaker, world.work)
        await world.form(world.breaker, world.work, None, 1)
        assert world.breaker.state is CLOSED

    cancel(victim, [call_twice, call_twice], form=form)


@forms
def test_a_call_that_fails_and_is_not_the_last_straw(form: Form) -> None:
    """Of three that would open it, two are the victim's: cancelled, they open nothing."""

    async def victim(world: World) -> None:
        await world.use(world.fail)
        await world.use(world.fail)

    cancel(victim, [lambda world: world.use(world.fail)], form=form, failure_threshold=3)


@forms
def test_a_call_that_opens_it(form: Form) -> None:
    async def victim(world: World) -> None:
        await world.form(world.breaker, world.fail)

    async def be_late(world: World) -> None:
        await world.use(world.work, None, 4)

    cancel(victim, [call_twice, be_late], OSError, CircuitOpenError, form=form, failure_threshold=1)


@forms
def test_a_call_that_is_refused(form: Form) -> None:
    """One that is cancelled before it hears of that was not refused."""

    async def victim(world: World) -> None:
        await world.trip()
        await pause()
        for _ in range(2):
            await world.use(world.work)
        await pause()
        assert world.breaker.state is OPEN
        assert world.running == 0

    cancel(victim, [lambda world: world.use(world.work)], form=form, failure_threshold=1)


@forms
def test_a_call_that_is_refused_by_hand(form: Form) -> None:
    """While it is isolated; the hold ends with its block, and the circuit is as new."""

    async def victim(world: World) -> None:
        with world.breaker.isolate():
            await pause()
            await world.use(world.work)
        await world.use(world.work)

    cancel(victim, [call_twice], form=form)


# --- probes ---------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("ends_well", [True, False])
def test_a_probe_among_others_who_are_refused(form: Form, most: int, ends_well: bool) -> None:
    """There are never more than allowed; the place of the cancelled one goes to the next."""

    async def victim(world: World) -> None:
        await world.trip()
        await trio.sleep(RECOVERY)
        await pause()
        await world.use(world.work if ends_well else world.fail)
        assert world.most <= most

    others = [come_later, come_later, come_later]
    cancel(victim, others, form=form, failure_threshold=1, half_open_max_calls=most)


@forms
def test_a_probe_that_is_one_of_several_that_it_takes(form: Form) -> None:
    """A success before it stays counted; its own is not."""

    async def victim(world: World) -> None:
        await world.trip()
        await trio.sleep(RECOVERY)
        await world.use(world.work)
        await world.use(world.work)
        await world.use(world.work)

    async def come_back(world: World) -> None:
        await come_later(world)
        await come_later(world)

    cancel(victim, [come_back], form=form, failure_threshold=1, success_threshold=2)


# --- what is cancelled by the circuit, too -------------------------------------------------------


@forms
@pytest.mark.parametrize("hangs", [True, False])
def test_a_call_that_is_given_up_when_it_opens(form: Form, hangs: bool) -> None:
    """Whether it is cancelled before, with, or after that."""

    async def victim(world: World) -> None:
        op = world.hang if hangs else partial(world.work, None, 3)
        await world.form(world.breaker, op)

    async def trip(world: World) -> None:
        await pause()
        await world.use(world.fail)

    async def hang_too(world: World) -> None:
        await world.use(world.hang)

    options = {"failure_threshold": 1, "cancel_in_flight": True}
    expected = CallAbandonedError, CircuitOpenError
    cancel(victim, [trip, hang_too], *expected, form=form, **options)


@forms
def test_a_call_that_gives_others_up(form: Form) -> None:
    """They are released by who opens it, or by nobody."""

    async def victim(world: World) -> None:
        await pause()
        await world.form(world.breaker, world.fail)

    async def hang(world: World) -> None:
        with trio.move_on_after(RECOVERY):
            await world.use(world.hang)

    options = {"failure_threshold": 1, "cancel_in_flight": True}
    cancel(victim, [hang, hang], OSError, form=form, **options)


# --- a prober -------------------------------------------------------------------------------------


@pytest.mark.parametrize("failures", [0, 1])
@forms
def test_a_prober(form: Form, failures: int) -> None:
    """Cancelled in the middle of a probe, or between two: then calls are probes again."""

    async def victim(world: World) -> None:
        script = [world.fail] * failures + [world.work]

        async def probe() -> None:
            await script.pop(0)()

        async with trio.open_nursery() as nursery:
            await nursery.start(world.breaker.keep_probing, probe)
            await world.trip()
            while world.breaker.state is not CLOSED:
                await pause()
                await trio.sleep(RECOVERY / 2)
            nursery.cancel_scope.cancel()

    cancel(victim, [come_later], form=form, failure_threshold=1)
