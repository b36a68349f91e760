"""Where operations come from: any iterable, pulled one at a time, in the caller's context."""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Sized
from contextvars import Context
from functools import partial
from typing import Any, Self, TypeAlias, cast, final

import attrs
import trio
from outcome import Value
from trio.lowlevel import Abort, Task, disable_ki_protection, enable_ki_protection

Pair: TypeAlias = tuple[int, Any]
"""An operation, or the item that it is made for, and its number."""

# Iterating over these runs no code of a user's, so no context has to be entered for it.
PLAIN = (list, tuple, range, str, bytes, set, frozenset, dict)


Ours: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]


@final
class _InContext:
    """An iterator whose every step is a C call that enters the context first."""

    __slots__ = ("__next__",)

    def __init__(self, context: Context, iterator: Iterator[object]) -> None:
        self.__next__ = partial(context.run, next, iterator)

    def __iter__(self) -> Self:
        return self


def numbered(items: Iterable[object], context: Context) -> Iterator[Pair]:
    """Return the items with their numbers; whatever code yields them runs in *context*."""
    iterator = iter(items)
    return enumerate(iterator if type(items) in PLAIN else _InContext(context, iterator))


def size_of(items: object) -> float:
    """Return how many *items* there are, or infinity if they don't know it themselves."""
    try:
        return len(items) if isinstance(items, Sized) else math.inf
    except TypeError:  # progress bars around a generator have a length that fails
        return math.inf


def close(items: object, context: Context) -> None:
    """Close a generator that is not used up, so that its clean-up runs now."""
    if isinstance(items, Generator):
        context.run(items.close)


@disable_ki_protection
async def _next_of(items: AsyncIterator[Any]) -> Any:
    return await anext(items)


@final
@attrs.define(eq=False, repr=False)
class AsyncSource:
    """An async iterable that one task pulls from, on demand, for any number of others.

    One task, because an async generator may have a nursery or a cancel scope open where it yields.
    """

    items: AsyncIterator[Any]
    on_error: Callable[[BaseException], object]
    is_exhausted: bool = attrs.field(default=False, init=False)
    _count: int = attrs.field(default=0, init=False)
    _askers: deque[Task] = attrs.field(factory=deque[Task], init=False)
    _idle: Task | None = attrs.field(default=None, init=False)

    @enable_ki_protection
    async def next(self) -> Pair | None:
        """Return the next item with its number, or ``None`` after the last."""
        if self.is_exhausted:
            return None
        task = trio.lowlevel.current_task()
        self._askers.append(task)
        if self._idle is not None:
            trio.lowlevel.reschedule(self._idle)
            self._idle = None

        def abort(_: object) -> Abort:
            self._askers.remove(task)
            return Abort.SUCCEEDED

        pair: Pair | None = await trio.lowlevel.wait_task_rescheduled(abort)
        return pair

    @enable_ki_protection
    async def pull(self, context: Context) -> None:
        """Serve those who ask, until the items end, as a task whose context becomes *context*."""
        trio.lowlevel.current_task().context = context
        await trio.lowlevel.cancel_shielded_checkpoint()
        try:
            await self._serve()
        except BaseException as error:  # noqa: BLE001 - it is raised to the caller as it is
            self._tell(error, trio.Cancelled)
        try:
            if inspect.isasyncgen(self.items):
                await self.items.aclose()
        except BaseException as error:  # noqa: BLE001 - likewise
            # A nursery that is open in the generator puts what closes it in a group.
            self._tell(error, (trio.Cancelled, GeneratorExit))
        finally:
            self.is_exhausted = True
            for task in self._askers:
                trio.lowlevel.reschedule(task, Value(None))
            self._askers.clear()

    def _tell(self, error: BaseException, ours: Ours) -> None:
        """Pass on what the source has raised, but not what we have thrown into it."""
        if isinstance(error, BaseExceptionGroup):
            group = cast("BaseExceptionGroup[BaseException]", error)
            thrown, rest = group.split(ours)
            if rest is not None:
                self.on_error(group if thrown is None else rest)
        elif not isinstance(error, ours):
            self.on_error(error)

    @enable_ki_protection
    async def _serve(self) -> None:
        while True:
            if not self._askers:
                self._idle = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abort_idle)
            try:
                item = await _next_of(self.items)
            except StopAsyncIteration:
                return
            if self._askers:  # else the job is being cancelled, and nobody runs it any more
                trio.lowlevel.reschedule(self._askers.popleft(), Value((self._count, item)))
            self._count += 1

    def _abort_idle(self, _: object) -> Abort:
        self._idle = None
        return Abort.SUCCEEDED
