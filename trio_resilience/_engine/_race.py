"""Run one operation several times side by side until one of them succeeds, and join them all."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any, Generic, NoReturn, TypeVar, cast, final

import attrs
import trio
from trio.lowlevel import Abort, Task, enable_ki_protection

from trio_resilience._checks import NotAnOperationError
from trio_resilience._engine._driver import run_unprotected
from trio_resilience._engine._join import leaves_of
from trio_resilience._engine._traceback import (
    Tracebacks,
    put_tracebacks_back,
    take_tracebacks,
)

T = TypeVar("T")


@final
@attrs.define(eq=False, repr=False)
class Leg:
    """One run of the operation in a race."""

    number: int
    """The first is 0."""
    has_begun: bool = attrs.field(default=False, init=False)
    """Whether the operation was called: a leg that is cancelled before that has run nothing."""
    has_succeeded: bool = attrs.field(default=False, init=False)
    seconds: float = attrs.field(default=0.0, init=False)
    """How long it took, until it ended or was cancelled."""


@final
@attrs.define(eq=False, repr=False)
class Race(Generic[T]):
    """Legs in a nursery of their own, and the task that waits there for the first success.

    Legs are started by that task alone, so each runs in a copy of its context. They raise nothing:
    what they come to is noted here. After `run`, all have ended; `result` tells the outcome.
    """

    fn: Callable[..., Awaitable[T]]
    args: tuple[Any, ...]
    name: str
    interval: float
    """Seconds after the last leg has begun when the next is due."""
    most: float
    """How many legs there may be."""
    may_start: Callable[[Exception | None], bool]
    """Asked before each further leg; it is given the error for which the leg would be started."""
    on_start: Callable[[Leg], object]
    on_end: Callable[[Leg], object]

    started: int = attrs.field(default=0, init=False)
    winner: Leg | None = attrs.field(default=None, init=False)
    failures: dict[int, Exception] = attrs.field(factory=dict[int, Exception], init=False)
    """What legs have raised, by their numbers, in the order in which they did."""
    late: dict[int, Exception] = attrs.field(factory=dict[int, Exception], init=False)
    """What they have raised since the outcome was decided, or while they were being cancelled."""
    unwanted: list[T] = attrs.field(factory=list[Any], init=False)
    """Results that nobody gets."""
    _value: T = attrs.field(init=False)
    _due: float = attrs.field(default=math.inf, init=False)
    _running: int = attrs.field(default=0, init=False)
    _just_failed: list[Exception] = attrs.field(factory=list[Exception], init=False)
    _tracebacks: dict[int, Tracebacks] = attrs.field(factory=dict[int, Tracebacks], init=False)
    """Those of what legs have raised, while others may raise the same."""
    _stoppers: list[BaseException] = attrs.field(factory=list[BaseException], init=False)
    """What ends the whole call."""
    _cancellation: BaseException | None = attrs.field(default=None, init=False)
    """That of the waiting task."""
    _waiter: Task | None = attrs.field(default=None, init=False)
    _interrupt: Callable[[], NoReturn] | None = attrs.field(default=None, init=False)

    @enable_ki_protection
    async def run(self) -> None:
        """Run legs until one has succeeded or all have failed; cancel the others and join them."""
        try:
            async with trio.open_nursery(strict_exception_groups=True) as nursery:
                try:
                    await self._supervise(nursery)
                except trio.Cancelled as cancelled:
                    self._cancellation = cancelled
                except BaseException as error:  # noqa: BLE001 - it is raised when all have ended
                    self._stoppers.append(error)
                if self._running:
                    nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            # Ctrl-C, as the losers were about to be joined: a nursery keeps that.
            self._stoppers += leaves_of(group)
        # Of what several have raised, the traceback of the first leg is put back last, and stays.
        for number in sorted(self._tracebacks, reverse=True):
            put_tracebacks_back(self._tracebacks[number])
        if self._stoppers and self.winner is not None:
            self.unwanted.append(self._value)

    async def _supervise(self, nursery: trio.Nursery) -> None:
        self._start(nursery)
        while self._running and not self._is_decided:
            await self._wait()
            if not self._is_decided:
                self._start_more(nursery)
        if not self._is_decided:
            # A leg that was cancelled is no failure, and who cancelled it has cancelled this too.
            await trio.lowlevel.checkpoint_if_cancelled()

    @property
    def _is_decided(self) -> bool:
        return self.winner is not None or bool(self._stoppers)

    async def _wait(self) -> None:
        """Wait until a leg has ended, or the next is due."""
        with trio.CancelScope(deadline=self._due):
            self._waiter = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
            interrupt, self._interrupt = self._interrupt, None
            # A result that has come meanwhile is not lost: trio repeats what is not raised here.
            if interrupt is not None and not self._is_decided:
                interrupt()

    def _abort(self, raise_cancel: Callable[[], NoReturn]) -> Abort:
        # Until its next step a leg may succeed. So it is woken, and looks what there is.
        self._interrupt = raise_cancel
        self._wake()
        return Abort.FAILED

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            trio.lowlevel.reschedule(waiter)

    def _start_more(self, nursery: trio.Nursery) -> None:
        reasons: list[Exception | None] = [*self._just_failed]
        self._just_failed.clear()
        if not reasons and trio.current_time() >= self._due:
            reasons.append(None)
        for reason in reasons:
            if self.started < self.most and self.may_start(reason):
                self.on_start(self._start(nursery))
            else:
                self.most, self._due = self.started, math.inf

    def _start(self, nursery: trio.Nursery) -> Leg:
        leg = Leg(self.started)
        self.started += 1
        self._running += 1
        name = self.name if leg.number == 0 else f"{self.name} (hedge {leg.number})"
        nursery.start_soon(self._run_leg, leg, name=name)
        is_last = self.started >= self.most
        self._due = math.inf if is_last else trio.current_time() + self.interval
        return leg

    @enable_ki_protection
    async def _run_leg(self, leg: Leg) -> None:
        began = trio.current_time()
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            leg.has_begun = True
            self._succeeded(leg, await run_unprotected(self.fn, *self.args))
        except BaseException as error:  # noqa: BLE001 - the waiting task raises it
            self._failed(leg, error)
        leg.seconds = trio.current_time() - began
        self._running -= 1
        self.on_end(leg)
        self._wake()

    def _succeeded(self, leg: Leg, value: T) -> None:
        leg.has_succeeded = True
        if self.winner is None:
            self.winner, self._value = leg, value
        else:
            self.unwanted.append(value)

    def _failed(self, leg: Leg, error: BaseException) -> None:
        is_cancelled = trio.current_effective_deadline() == -math.inf
        rest = _without_cancellations(error) if is_cancelled else error
        if rest is None:
            return
        self._tracebacks[leg.number] = take_tracebacks(rest)
        if isinstance(rest, NotAnOperationError):
            # A mistake in the program is the same one in every leg.
            self._stoppers = self._stoppers or [rest]
        elif not isinstance(rest, Exception):
            self._stoppers.append(rest)
        elif is_cancelled or self.winner is not None:
            self.late[leg.number] = rest
        else:
            self.failures[leg.number] = rest
            self._just_failed.append(rest)

    @property
    def has_succeeded(self) -> bool:
        """Whether there is a result that the caller gets."""
        return self.winner is not None and not self._stoppers

    @property
    def has_failed(self) -> bool:
        """Whether all legs have failed, and nothing else has ended the call."""
        return not self._is_decided and self._cancellation is None

    def reportable(self) -> dict[int, Exception]:
        """Return what legs raised too late to be raised here."""
        return self.late if self._is_decided else {}

    def result(self) -> T:
        """Return the first result, or raise what has ended the call.

        If all legs have failed, that is the error of the first one.
        """
        error = self._error()
        if error is None:
            return self._value
        context = error.__context__
        try:
            raise error
        finally:
            # It was raised in another task: what the caller handles takes the place of nothing.
            if context is not None:
                error.__context__ = context
            del error, context

    def _error(self) -> BaseException | None:
        if self._stoppers:
            return _one_of("several legs stopped the call", self._stoppers)
        if self.winner is not None:
            return None
        if self._cancellation is not None:
            return _one_of("cancelled legs failed", [*self.late.values(), self._cancellation])
        return self.failures[min(self.failures)]

    def forget(self) -> None:
        """Let go of all errors, whose tracebacks lead to the legs, and from there to here."""
        self.failures, self.late, self._just_failed, self._tracebacks = {}, {}, [], {}
        self._stoppers, self._cancellation, self._interrupt = [], None, None


def _one_of(message: str, errors: list[BaseException]) -> BaseException:
    return errors[0] if len(errors) == 1 else BaseExceptionGroup(message, errors)


def _without_cancellations(error: BaseException) -> BaseException | None:
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return group.split(trio.Cancelled)[1]
    return None if isinstance(error, trio.Cancelled) else error
