"""Items of an async source, pulled ahead into the batch that its one consumer takes next."""

from __future__ import annotations

import inspect
import math
from collections.abc import AsyncIterator
from contextlib import suppress
from contextvars import Context
from typing import Any, Final, final

import attrs
import trio
from trio.lowlevel import Abort, Task, disable_ki_protection, enable_ki_protection

ENDED: Final[list[Any]] = []
"""What is taken after the last batch; known by identity."""


@final
@attrs.define(eq=False, repr=False)
class Filler:
    """At most *batch_size* items that were pulled and not yet taken, and the task that pulls.

    Nothing is handed over: the consumer takes what is there, in the step in which it goes on. So
    neither its cancellation nor the expiry of a batch's age comes between an item and its way.
    """

    batch_size: int
    max_age: float
    held: list[Any] = attrs.field(factory=list[Any], init=False)
    _items: AsyncIterator[Any] = attrs.field(init=False)
    _context: Context = attrs.field(init=False)
    _due: float = attrs.field(default=math.inf, init=False)
    """When the oldest item held is old enough; infinity while there is none."""
    _has_ended: bool = attrs.field(default=False, init=False)
    _puller: Task | None = attrs.field(default=None, init=False)
    """The pulling task while it waits for room."""
    _consumer: Task | None = attrs.field(default=None, init=False)
    _alarm: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    """Wakes the consumer when a batch is old enough."""

    # --- the pulling task -----------------------------------------------------------------------

    def open(self, items: AsyncIterator[Any], context: Context) -> None:
        """Pull from *items*, in *context*."""
        self._items = items
        self._context = context

    @enable_ki_protection
    async def run(self) -> None:
        """Pull until the source ends, as a task whose context becomes that of the source."""
        trio.lowlevel.current_task().context = self._context
        await trio.lowlevel.cancel_shielded_checkpoint()
        try:
            with suppress(StopAsyncIteration):
                while True:
                    await self._wait_for_room()
                    self._keep(await _next_of(self._items))
        finally:
            await self._close()  # noqa: ASYNC102 - where it is cancelled, its clean-up is cancelled too

    async def _wait_for_room(self) -> None:
        while len(self.held) >= self.batch_size:
            self._puller = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort_puller)

    def _abort_puller(self, _: object) -> Abort:
        self._puller = None
        return Abort.SUCCEEDED

    def _keep(self, item: object) -> None:
        self.held.append(item)
        if len(self.held) == 1:
            self._due = trio.current_time() + self.max_age
            if self._consumer is not None:
                self._alarm.deadline = self._due
        if len(self.held) >= self.batch_size:
            self._wake_consumer()

    async def _close(self) -> None:
        """Close a generator that is not used up, in the task that has pulled it."""
        if not inspect.isasyncgen(self._items):
            return
        try:
            await self._items.aclose()
        except BaseExceptionGroup as group:
            # A nursery that is open in the generator puts what closes it in a group.
            closing, rest = group.split(GeneratorExit)
            if closing is None:
                raise
            if rest is not None:
                raise rest from None

    @enable_ki_protection
    def end(self) -> None:
        """Say that nothing follows."""
        self._has_ended = True
        self._wake_consumer()

    # --- the consumer ---------------------------------------------------------------------------

    @enable_ki_protection
    async def take(self) -> list[Any]:
        """Return the next batch when it is due, or `ENDED` after the last one."""
        if self._is_due():
            await trio.lowlevel.checkpoint()
        while not self._is_due():
            await self._park()
        if self._puller is not None:
            trio.lowlevel.reschedule(self._puller)
            self._puller = None
        batch, self.held, self._due = self.held, [], math.inf
        return batch or ENDED

    def _is_due(self) -> bool:
        is_full = len(self.held) >= self.batch_size
        return is_full or self._has_ended or trio.current_time() >= self._due

    async def _park(self) -> None:
        if self._consumer is not None:
            raise trio.BusyResourceError("another task is iterating over these batches already")
        with trio.CancelScope(deadline=self._due) as self._alarm:
            self._consumer = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort_consumer)

    def _abort_consumer(self, _: object) -> Abort:
        self._consumer = None
        return Abort.SUCCEEDED

    def _wake_consumer(self) -> None:
        if self._consumer is not None:
            trio.lowlevel.reschedule(self._consumer)
            self._consumer = None


@disable_ki_protection
async def _next_of(items: AsyncIterator[Any]) -> Any:
    return await anext(items)
