"""Results on their way to one consumer: in a bounded number, as completed or in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, final

import attrs
import trio
from outcome import Value
from trio.lowlevel import Abort, Task, enable_ki_protection

_SKIPPED: Final = object()
ENDED: Final = object()


@final
@attrs.define(eq=False, repr=False)
class Outbox:
    """Hold what is running or finished but not yet taken, at most *capacity()* of it.

    An operation takes its place before it starts and keeps it until its result is taken or turns
    out to be none. So a slow consumer holds back new operations, and so does, in order, a slow one
    at the head.
    """

    capacity: Callable[[], float]
    buffer: int
    ordered: bool
    on_free: Callable[[], object] | None = attrs.field(default=None, init=False)
    """Called when a place has been given back."""
    _places: int = attrs.field(default=0, init=False)
    _ready: deque[Any] = attrs.field(factory=deque[Any], init=False)
    _early: dict[int, Any] = attrs.field(factory=dict[int, Any], init=False)
    """Finished before their turn, by number; unused unless in order."""
    _turn: int = attrs.field(default=0, init=False)
    _has_ended: bool = attrs.field(default=False, init=False)
    _stalled: deque[Task] = attrs.field(factory=deque[Task], init=False)
    _consumer: Task | None = attrs.field(default=None, init=False)

    @enable_ki_protection
    async def reserve(self) -> None:
        """Take a place for an operation that is about to start; wait until there is one."""
        await self.wait_for_room()
        self.take_place()

    def take_place(self) -> None:
        """Take a place, whether there is one or not."""
        self._places += 1

    def has_place(self) -> bool:
        """Tell whether there is a place for one that may have to wait for its start."""
        return self._places < self.capacity()

    def has_room(self) -> bool:
        """Tell whether another operation may start."""
        # If it is not the consumer who is behind, the operations are, and what bounds those is
        # another matter.
        waiting = len(self._ready) + len(self._early)
        return self._places < self.capacity() or waiting <= self.buffer

    @enable_ki_protection
    async def wait_for_room(self) -> None:
        """Wait until another operation may start."""
        while not self.has_room():
            task = trio.lowlevel.current_task()
            self._stalled.append(task)
            await trio.lowlevel.wait_task_rescheduled(self._abort_stalled(task))

    def _abort_stalled(self, task: Task) -> Callable[[object], Abort]:
        def abort(_: object) -> Abort:
            self._stalled.remove(task)
            return Abort.SUCCEEDED

        return abort

    @enable_ki_protection
    def free(self) -> None:
        """Give a place back, to the worker that has waited longest if there is one."""
        self._places -= 1
        if self._stalled:
            trio.lowlevel.reschedule(self._stalled.popleft())
        if self.on_free is not None:
            self.on_free()

    @enable_ki_protection
    def put(self, index: int, result: object) -> None:
        """Hand the result of operation *index* to the consumer, when it is its turn."""
        if self.ordered:
            self._early[index] = result
            while self._turn in self._early:
                self._hand_over(self._early.pop(self._turn))
                self._turn += 1
        else:
            self._hand_over(result)

    def skip(self, index: int) -> None:
        """Say that operation *index* has no result to deliver."""
        self.put(index, _SKIPPED)

    @enable_ki_protection
    def end(self) -> None:
        """Say that nothing follows; what waits behind a gap is delivered all the same."""
        self._has_ended = True
        for index in sorted(self._early):
            self._hand_over(self._early.pop(index))
        if self._consumer is not None:
            trio.lowlevel.reschedule(self._consumer, Value(ENDED))
            self._consumer = None

    def _hand_over(self, result: object) -> None:
        if result is _SKIPPED:
            self.free()
        elif self._consumer is not None:
            trio.lowlevel.reschedule(self._consumer, Value(result))
            self._consumer = None
            self.free()
        else:
            self._ready.append(result)

    @enable_ki_protection
    async def take(self) -> Any:
        """Return the next result, or `ENDED` after the last one."""
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._ready:
            result = self._ready.popleft()
            self.free()
            await trio.lowlevel.cancel_shielded_checkpoint()
            return result
        if self._has_ended:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return ENDED
        if self._consumer is not None:
            raise trio.BusyResourceError("another task is iterating over this stream already")
        self._consumer = trio.lowlevel.current_task()
        return await trio.lowlevel.wait_task_rescheduled(self._abort_consumer)

    def _abort_consumer(self, _: object) -> Abort:
        self._consumer = None
        return Abort.SUCCEEDED
