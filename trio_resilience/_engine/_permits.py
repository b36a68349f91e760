"""Permits that tasks take, wait for in one line, and give back: first come, first served."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from types import FrameType
from typing import Protocol, final

import attrs
import trio
from trio.lowlevel import Abort, Task, TrioToken, enable_ki_protection


@final
@attrs.define(eq=False, repr=False)
class Permits:
    """The permits of one run, and the line of those who wait for some of them.

    A permit is a token of a `trio.CapacityLimiter` whose borrower is an object of its own, so it
    belongs to no task. The limiter's own line is never used: it knows no weights.
    """

    limiter: trio.CapacityLimiter
    _borrowers: list[object] = attrs.field(factory=list[object], init=False)
    _line: OrderedDict[Task, int] = attrs.field(factory=OrderedDict[Task, int], init=False)
    _token: TrioToken = attrs.field(factory=trio.lowlevel.current_trio_token, init=False)

    @property
    def borrowed(self) -> int:
        """How many are taken."""
        return len(self._borrowers)

    @property
    def waiting(self) -> int:
        """How many tasks wait."""
        return len(self._line)

    @property
    def is_of_this_run(self) -> bool:
        """Whether the run that they belong to is the one in which this is asked."""
        is_in_a_run = trio.lowlevel.in_trio_run()
        return is_in_a_run and trio.lowlevel.current_trio_token() is self._token

    def try_take(self, weight: int = 1) -> bool:
        """Take them all, if they are there and nobody waits; tell whether that was so."""
        if self._line:
            return False
        if weight > 1:
            if not self._has(weight):
                return False
            self._take(weight)
            return True
        borrower = object()
        try:  # of a single one, the limiter itself tells
            self.limiter.acquire_on_behalf_of_nowait(borrower)
        except trio.WouldBlock:
            return False
        self._borrowers.append(borrower)
        return True

    @enable_ki_protection
    async def wait(self, weight: int = 1) -> None:
        """Wait in line and take them all; to be called if `try_take` fails."""
        if self.try_take(weight):  # a listener that heard of the wait has changed something
            await trio.lowlevel.cancel_shielded_checkpoint()
            return
        task = trio.lowlevel.current_task()
        self._line[task] = weight

        def abort(_: object) -> Abort:
            del self._line[task]
            self._serve()  # without a large request at the head, the next ones may fit
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def give_back(self, weight: int = 1) -> None:
        """Give so many back, and let those in who have waited longest."""
        if weight > len(self._borrowers):
            wanted = "a permit" if weight == 1 else f"{weight} permits"
            raise RuntimeError(f"can't release {wanted}: only {len(self._borrowers)} held")
        for _ in range(weight):
            self.limiter.release_on_behalf_of(self._borrowers.pop())
        if self._line:
            self._serve()

    def resize(self, total: int) -> None:
        """Change how many there are; those that are held stay so."""
        self.limiter.total_tokens = total
        self._serve()

    def _has(self, weight: int) -> bool:
        return weight <= self.limiter.available_tokens

    def _take(self, weight: int) -> None:
        for _ in range(weight):
            borrower = object()
            self.limiter.acquire_on_behalf_of_nowait(borrower)
            self._borrowers.append(borrower)

    def _serve(self) -> None:
        # A task that is woken has its permits already. To let it take them when it runs would
        # leave a gap for a newcomer to jump into.
        while self._line:
            task = next(iter(self._line))
            if not self._has(self._line[task]):
                return
            self._take(self._line.pop(task))
            trio.lowlevel.reschedule(task)


def caller() -> FrameType:
    """Return the frame that called the function which calls this."""
    return sys._getframe(2)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


@final
@attrs.define(eq=False, repr=False)
class OpenBlocks:
    """The ``async with`` blocks of an object that are open, and where each has its permit from.

    The object is entered itself, so nothing else is there to keep this. And one block is told from
    another by nothing but the frame it is in: a task may be in several; and a coroutine that a
    crashed run has left behind ends its block whenever it is collected, in whatever task.
    """

    _held: dict[FrameType, list[tuple[Permits, Task]]] = attrs.field(
        factory=dict[FrameType, list[tuple[Permits, Task]]], init=False
    )

    def begin(self, frame: FrameType, permits: Permits) -> None:
        """Note that a block in this frame holds a permit."""
        self._held.setdefault(frame, []).append((permits, trio.lowlevel.current_task()))

    def end(self, frame: FrameType) -> None:
        """Give back the permit of the block in this frame, unless it has died with its run."""
        if frame not in self._held:
            # An exit stack enters and leaves from frames of its own: any block of this task will
            # do, or else, if the stack has been handed over, any of this run.
            alive = [each for each, held in self._held.items() if held[-1][0].is_of_this_run]
            if not alive:
                return
            task = trio.lowlevel.current_task()
            frame = max(alive, key=lambda each: self._held[each][-1][1] is task)
        permits, _ = self._held[frame].pop()
        if not self._held[frame]:
            del self._held[frame]
        if permits.is_of_this_run:
            permits.give_back()


@final
@attrs.define(eq=False, repr=False)
class LimiterPermits:
    """Permits of a `trio.CapacityLimiter` that others use, too: its own line is the line."""

    limiter: trio.CapacityLimiter
    _borrowers: list[object] = attrs.field(factory=list[object], init=False)

    def try_take(self) -> bool:
        """Take one, if there is one and nobody waits; tell whether that was so."""
        borrower = object()
        try:
            self.limiter.acquire_on_behalf_of_nowait(borrower)
        except trio.WouldBlock:
            return False
        self._borrowers.append(borrower)
        return True

    @enable_ki_protection
    async def wait(self) -> None:
        """Wait in line and take one; to be called if `try_take` fails."""
        borrower = object()
        await self.limiter.acquire_on_behalf_of(borrower)
        self._borrowers.append(borrower)

    def give_back(self) -> None:
        """Give one back."""
        self.limiter.release_on_behalf_of(self._borrowers.pop())


class TakesPermits(Protocol):
    """What a call that runs under a shared bound needs of it."""

    def try_take(self) -> bool:
        """Take one, if there is one and nobody waits; tell whether that was so."""
        ...

    async def wait(self) -> None:
        """Wait in line and take one; to be called if `try_take` fails."""

    def give_back(self) -> None:
        """Give one back."""


@final
@attrs.define(eq=False, repr=False)
class HeldPermit:
    """A permit of a shared bound that a running operation has."""

    owner: object
    is_held: bool = True


held_here: ContextVar[tuple[HeldPermit, ...]] = ContextVar("held_here", default=())
"""The permits that the code in this context runs under, those of enclosing calls included."""


def is_held_here(owner: object) -> bool:
    """Tell whether the code in this context runs under a permit of *owner*."""
    return any(permit.owner is owner and permit.is_held for permit in held_here.get())


@final
@attrs.frozen(eq=False, repr=False)
class SharedBound:
    """A bound that several calls share, by the object that the user made."""

    owner: object
    open: Callable[[], TakesPermits]
    """Return what a call that begins now takes its permits from."""
    total: Callable[[], float]
    """Return how many permits there are at this moment."""
