"""Choose what runs next among several items that wait, so that no key takes up all the workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Hashable
from heapq import heappop, heappush
from typing import Any, Final, TypeAlias, final

import attrs
import trio
from trio.lowlevel import Abort, Task, enable_ki_protection

from trio_resilience._engine._source import Pair

Key: TypeAlias = Callable[[Any], Hashable]

_NOT_OURS: Final = object()


@final
@attrs.define(eq=False, repr=False, kw_only=True)
class Chooser:
    """Hand out items in their order, but at most *most* at once of those that share a key.

    An item whose key is busy is set aside, and those behind it have their turn, until *lookahead*
    items are set aside. When its key is free again, it goes before all that came later.
    """

    key: Key
    most: int
    lookahead: int
    pull: Callable[[], Awaitable[Pair | None]]
    """Return the next item and its number, or ``None`` after the last."""
    may_go_on: Callable[[], bool]
    """Tell whether there may be more to pull."""
    has_room: Callable[[], bool]
    """Tell whether more may be pulled now."""
    _busy: dict[Hashable, int] = attrs.field(factory=dict[Hashable, int], init=False)
    """How many of each key run, or may run and are looking for a worker."""
    _keys: dict[int, Hashable] = attrs.field(factory=dict[int, Hashable], init=False)
    """The keys of those, by number."""
    _aside: dict[Hashable, deque[Pair]] = attrs.field(
        factory=dict[Hashable, deque[Pair]], init=False
    )
    _ready: list[Pair] = attrs.field(factory=list[Pair], init=False)
    """A heap of what was set aside and may run now."""
    _waiting: int = attrs.field(default=0, init=False)
    """How many items are set aside, or ready."""
    _is_pulling: bool = attrs.field(default=False, init=False)
    """Whether a worker is pulling an item: one at a time, so that they come in their order."""
    _idle: deque[Task] = attrs.field(factory=deque[Task], init=False)
    """Workers that wait for an item that may run."""

    @enable_ki_protection
    async def next(self) -> Pair | None:
        """Return the first item that may run, or ``None`` after the last."""
        return self.next_nowait() if await self.has_next() else None

    @enable_ki_protection
    async def has_next(self) -> bool:
        """Wait for an item that may run, for `next_nowait`; false after the last."""
        while not self._ready:
            if self._may_pull():
                pair = await self._pull()
                if pair is not None:
                    heappush(self._ready, pair)
                    self._waiting += 1
            elif self.is_drained():
                return False
            else:
                await self._wait()
        return True

    def next_nowait(self) -> Pair:
        """Return the first item that may run; `has_next` has just told that there is one."""
        self._waiting -= 1
        pair = heappop(self._ready)
        self.rouse()
        return pair

    @enable_ki_protection
    def finished(self, index: int) -> None:
        """Let the next item run that has the same key as the one of this number."""
        key = self._keys.pop(index, _NOT_OURS)
        if key is _NOT_OURS:
            return
        aside = self._aside.get(key)
        if aside is None:
            self._busy[key] -= 1
            if not self._busy[key]:
                del self._busy[key]
            return
        pair = aside.popleft()
        if not aside:
            del self._aside[key]
        self._keys[pair[0]] = key
        heappush(self._ready, pair)
        self._wake_one()

    def has_ready(self) -> bool:
        """Tell whether an item that was set aside looks for a worker."""
        return bool(self._ready)

    def is_drained(self) -> bool:
        """Tell whether every item has been handed out."""
        return not (self._waiting or self._is_pulling or self.may_go_on())

    def rouse(self) -> None:
        """Wake those who wait for items, if there may be some, or if there will be none."""
        if self._idle and self.is_drained():
            while self._idle:
                self._wake_one()
        elif self._idle and self._may_pull():
            self._wake_one()

    def _wake_one(self) -> None:
        if self._idle:
            trio.lowlevel.reschedule(self._idle.popleft())

    def _may_pull(self) -> bool:
        is_kept = self._is_pulling or self._waiting >= self.lookahead
        return not is_kept and self.may_go_on() and self.has_room()

    async def _pull(self) -> Pair | None:
        """Pull one item, and return it if it may run at once."""
        self._is_pulling = True
        try:
            pair = await self.pull()
        finally:
            self._is_pulling = False
        if pair is None:
            self.rouse()
            return None
        index, item = pair
        key = self.key(item)
        if self._busy.get(key, 0) >= self.most:
            self._aside.setdefault(key, deque()).append(pair)
            self._waiting += 1
            return None
        self._busy[key] = self._busy.get(key, 0) + 1
        self._keys[index] = key
        return pair

    async def _wait(self) -> None:
        task = trio.lowlevel.current_task()
        self._idle.append(task)

        def abort(_: object) -> Abort:
            self._idle.remove(task)
            return Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
