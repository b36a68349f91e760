"""Semaphore: whatever is done with it, it behaves like a plain model of weighted permits."""

from __future__ import annotations

import queue
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import attrs
import outcome
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.test_semaphore import counts
from trio_resilience import Semaphore
from trio_resilience.testing._scheduling import seeded_scheduler

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.exhaustive

many = settings(
    max_examples=150,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    # To explain a failure takes longer than to find and shrink it, and there is a watchdog.
    phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink],
)


# --- a machine that drives trio, step by step -----------------------------------------------------


@attrs.define(eq=False)
class GuestRun:
    """A run of trio that does something when it is told to, and stands still in between."""

    clock: trio.testing.MockClock = attrs.field(factory=trio.testing.MockClock)
    nursery: trio.Nursery = attrs.field(init=False)
    _calls: queue.SimpleQueue[Callable[[], object]] = attrs.field(
        factory=queue.SimpleQueue[Any], init=False
    )
    _commands: trio.MemorySendChannel[Callable[[], object]] = attrs.field(init=False)
    _token: trio.lowlevel.TrioToken = attrs.field(init=False)
    _result: outcome.Outcome[None] | None = attrs.field(default=None, init=False)
    _is_idle: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        trio.lowlevel.start_guest_run(
            self._main,
            run_sync_soon_threadsafe=self._calls.put,
            done_callback=self._note_end,
            clock=self.clock,
        )
        self._pump()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._commands, commands = trio.open_memory_channel[Any](1)
        async with trio.open_nursery() as self.nursery, commands:
            self._is_idle = True
            async for command in commands:
                command()
                await trio.testing.wait_all_tasks_blocked()
                self._is_idle = True
            self.nursery.cancel_scope.cancel()

    def _note_end(self, result: outcome.Outcome[None]) -> None:
        self._result = result

    def _pump(self) -> None:
        while not self._is_idle and self._result is None:
            self._calls.get(timeout=30)()

    def do(self, command: Callable[[], object]) -> None:
        """Do it, in one step of a task; return when every task has come to rest."""
        self._is_idle = False
        self._token.run_sync_soon(self._commands.send_nowait, command)
        self._pump()
        if self._result is not None:
            self._result.unwrap()

    def end(self) -> None:
        """Cancel everything and end the run, unless a command that failed has done so."""
        if self._result is not None:
            return
        self._token.run_sync_soon(self._commands.close)
        while self._result is None:
            self._calls.get(timeout=30)()
        self._result.unwrap()


@attrs.define(eq=False)
class Guest:
    """A task that came for permits, and how far it got."""

    number: int
    weight: int
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    leave: trio.Event = attrs.field(factory=trio.Event)
    is_in: bool = False
    is_gone: bool = False
    error: Exception | None = None

    async def visit(self, acquire: Callable[[], Awaitable[None]], release: Any) -> None:
        """Take the permits, stay, and give them back."""
        try:
            with self.scope:
                await acquire()
                self.is_in = True
                try:
                    await self.leave.wait()
                finally:
                    release()
        except Exception as error:  # noqa: BLE001 - the machine looks at it
            self.error = error
        finally:
            self.is_in, self.is_gone = False, True


# --- the model ------------------------------------------------------------------------------------


@attrs.define(eq=False)
class Model:
    """What a semaphore is, said as simply as possible."""

    permits: int
    inside: list[Guest] = attrs.field(factory=list[Guest])
    line: list[Guest] = attrs.field(factory=list[Guest])
    by_hand: int = 0
    """Permits that were taken at once and belong to nobody."""

    @property
    def borrowed(self) -> int:
        return self.by_hand + sum(guest.weight for guest in self.inside)

    def fits(self, weight: int) -> bool:
        return self.borrowed + weight <= self.permits

    def counts(self) -> tuple[int, int, int]:
        return self.borrowed, max(0, self.permits - self.borrowed), len(self.line)

    def serve(self) -> None:
        while self.line and self.fits(self.line[0].weight):
            self.inside.append(self.line.pop(0))

    def come(self, guest: Guest) -> None:
        self.line.append(guest)
        self.serve()

    def go(self, guest: Guest) -> None:
        """It is cancelled in line, or leaves."""
        for place in (self.line, self.inside):
            if guest in place:
                place.remove(guest)
        self.serve()


@many
class SemaphoreMachine(RuleBasedStateMachine):
    """Every rule does one thing, or two in one step, and compares at once and when all rest."""

    def __init__(self) -> None:
        super().__init__()
        self.run = GuestRun()
        self.number = 0

    @initialize(permits=st.integers(1, 5))
    def make(self, permits: int) -> None:
        self.semaphore, self.model = Semaphore(permits), Model(permits)

    def teardown(self) -> None:
        self.run.end()
        if hasattr(self, "model"):
            assert self.semaphore.statistics().waiting == 0

    def do(self, *actions: Callable[[], object]) -> None:
        """Do them in one step, without a checkpoint in between; compare after each."""

        def act() -> None:
            for action in actions:
                action()
                # Hand-over and cancellation take effect at once, not when somebody runs.
                assert counts(self.semaphore) == self.model.counts()

        self.run.do(act)

    @rule(weight=st.integers(1, 5))
    def come(self, weight: int) -> None:
        guest = Guest(self.number, weight)
        self.number += 1
        waits = weight > max(1, self.model.permits)

        async def acquire() -> None:
            await self.semaphore.acquire(weight, wait_for_resize=waits)

        def release() -> None:
            self.semaphore.release(weight)

        self.run.do(lambda: self.run.nursery.start_soon(guest.visit, acquire, release))
        self.model.come(guest)

    @rule(weight=st.integers(1, 5))
    def take_by_hand(self, weight: int) -> None:
        def take() -> None:
            is_free = not self.model.line and self.model.fits(weight)
            try:
                self.semaphore.acquire_nowait(weight)
            except trio.WouldBlock:
                assert not is_free
                assert weight <= max(1, self.model.permits)
            except ValueError:
                assert weight > max(1, self.model.permits)
            else:
                assert is_free
                self.model.by_hand += weight

        self.do(take)

    @rule(weight=st.integers(1, 5))
    def release_by_hand(self, weight: int) -> None:
        if weight <= self.model.by_hand:
            self.do(lambda: self._release_by_hand(weight))

    def _release_by_hand(self, weight: int) -> None:
        self.semaphore.release(weight)
        self.model.by_hand -= weight
        self.model.serve()

    @rule(more=st.integers(1, 3))
    def release_too_much(self, more: int) -> None:
        def release() -> None:
            try:
                self.semaphore.release(self.model.borrowed + more)
            except RuntimeError:
                return
            raise AssertionError

        self.do(release)

    @rule(permits=st.integers(0, 6))
    def resize(self, permits: int) -> None:
        self.do(lambda: self._resize(permits))

    def _resize(self, permits: int) -> None:
        self.semaphore.permits = permits
        self.model.permits = permits
        self.model.serve()

    @precondition(lambda self: self.model.line)
    @rule(data=st.data())
    def cancel_in_line(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from(self.model.line))
        self.do(lambda: self._cancel_in_line(guest))

    def _cancel_in_line(self, guest: Guest) -> None:
        guest.scope.cancel()
        self.model.go(guest)

    @precondition(lambda self: self.model.inside)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        guest = data.draw(st.sampled_from(self.model.inside))
        self.run.do(guest.leave.set if data.draw(st.booleans()) else guest.scope.cancel)
        self.model.go(guest)

    @precondition(lambda self: self.model.line and self.model.by_hand)
    @rule(data=st.data(), permits=st.none() | st.integers(0, 6))
    def cancel_just_woken(self, data: st.DataObject, permits: int | None) -> None:
        """Whoever a release, or a resize, lets in is cancelled before it runs."""
        weight = data.draw(st.integers(1, self.model.by_hand))
        inside, cancelled = list(self.model.inside), list[Guest]()
        doomed = data.draw(st.sets(st.sampled_from(self.model.line)))

        def cancel() -> None:
            for guest in self.model.inside:
                if guest not in inside and guest in doomed:
                    guest.scope.cancel()
                    cancelled.append(guest)

        resize = [] if permits is None else [lambda: self._resize(permits)]
        self.do(lambda: self._release_by_hand(weight), *resize, cancel)
        for guest in cancelled:
            self.model.go(guest)

    @precondition(lambda self: self.model.line)
    @rule(count=st.integers(2, 4))
    def cancel_the_first(self, count: int) -> None:
        """Several in one step, of whom the later ones may have been let in by the first's end."""
        doomed = self.model.line[:count]

        def cancel(guest: Guest) -> None:
            guest.scope.cancel()
            if guest in self.model.line:
                self.model.go(guest)

        self.do(*[partial(cancel, guest) for guest in doomed])
        for guest in doomed:
            self.model.go(guest)

    @invariant()
    def is_as_the_model_says(self) -> None:
        if not hasattr(self, "model"):
            return
        assert counts(self.semaphore) == self.model.counts()
        assert all(guest.is_in and guest.error is None for guest in self.model.inside)
        assert not any(guest.is_in or guest.is_gone for guest in self.model.line)


TestSemaphore = SemaphoreMachine.TestCase


# --- any schedule ---------------------------------------------------------------------------------


@attrs.define(eq=False)
class Crowd:
    """Tasks that do all that can be done with a semaphore, at random, and watch the bound."""

    rng: Random
    semaphore: Semaphore
    inside: int = 0
    entries: int = 0

    def enter(self, weight: int) -> None:
        self.inside += weight
        self.entries += 1
        assert self.inside <= self.semaphore.permits
        assert self.inside <= self.semaphore.statistics().borrowed

    def leave(self, weight: int) -> None:
        self.inside -= weight
        self.semaphore.release(weight)
        self.barge()

    def barge(self) -> None:
        """In the very step of a release: what is taken now has not been handed over."""
        try:
            self.semaphore.acquire_nowait()
        except trio.WouldBlock:
            return
        self.enter(1)
        self.inside -= 1
        self.semaphore.release()

    async def visit(self) -> None:
        for _ in range(self.rng.randint(1, 3)):
            weight = self.rng.choice([1, 1, 2, 3])
            await self.semaphore.acquire(weight)
            self.enter(weight)
            try:
                for _ in range(self.rng.randint(0, 2)):
                    await trio.lowlevel.checkpoint()
            finally:
                self.leave(weight)

    async def main(self) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(self.cancelled_visit)

    async def cancelled_visit(self) -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.visit)
                if self.rng.random() < 0.5:
                    for _ in range(self.rng.randint(0, 8)):
                        await trio.lowlevel.checkpoint()
                    scope.cancel()


def test_there_are_never_too_many_inside() -> None:
    """A thousand random schedules of acquiring, releasing, barging in and being cancelled."""
    entries = 0
    for seed in range(1000):
        crowd = Crowd(Random(seed), Semaphore(3))
        with seeded_scheduler(seed):
            trio.run(crowd.main)
        assert crowd.inside == 0
        assert counts_after(crowd) == (0, 3, 0)
        entries += crowd.entries
    assert entries > 1000


def counts_after(crowd: Crowd) -> Any:
    """How its semaphore stands in a run that comes after."""
    return counts(crowd.semaphore)
