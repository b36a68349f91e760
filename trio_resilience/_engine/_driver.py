"""Run an operation in a context of its own, inside a task that it shares with others.

`Drive` is awaited by a worker task. Its first step goes through `contextvars.Context.run`; for
the later ones the worker has set ``task.context``, so that trio itself enters the context. (To
wrap every step instead would break `trio.from_thread.run`, which swaps ``task.context``.)

No Python frame stands between the worker's and the operation's: ``__next__``, ``send``, ``throw``
and ``close`` are C callables, looked up through slots and properties. So Ctrl-C lands in the
operation or in the worker but never between a step and the scheduler, and trio sees through to
the operation's frames.
"""

from __future__ import annotations

import types
from collections.abc import Awaitable, Callable, Coroutine
from contextvars import ContextVar
from itertools import repeat
from operator import attrgetter
from typing import Any, TypeVar, TypeVarTuple, final

import trio

from trio_resilience._checks import check_awaitable, operation

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
class Drive:
    """An awaitable that a worker uses again for each of its operations.

    To run *coro* in *context*, the worker sets ``coro``, ``send`` to the coroutine's own, and
    ``__next__`` to ``partial(context.run, coro.send, None)``.
    """

    __await__: Any
    __next__: Any
    coro: Any
    send: Any

    __slots__ = ("__await__", "__next__", "coro", "send")

    throw = property(attrgetter("coro.throw"))
    close = property(attrgetter("coro.close"))
    # trio follows these two to show where a task is.
    cr_frame = property(attrgetter("coro.cr_frame"))
    cr_await = property(attrgetter("coro.cr_await"))

    def __init__(self) -> None:
        # What is awaited returns itself; from a C callable, which an endless iterator's step is.
        self.__await__ = repeat(self).__next__

    def unload(self) -> None:
        """Let go of the operation that has ended."""
        self.coro = self.send = self.__next__ = None

    def discard(self) -> None:
        """Let go of itself too: it is of no further use."""
        self.unload()
        self.__await__ = None


# What an `async def` returns; `Any`, for a test against it must not narrow the type.
COROUTINE: Any = types.CoroutineType

# Set, before an operation begins, in the context that the interpreter is in, which is not the
# operation's own: the worker's, or that of an operation before. An operation that never gave up
# control leaves the interpreter in that same context, and the mark is found there again.
operation_mark: ContextVar[int | None] = ContextVar("operation_mark", default=None)


@trio.lowlevel.enable_ki_protection
def awaitable(fn: Callable[..., object], *args: object) -> Awaitable[Any]:
    """Call *fn* and return what is to be awaited, or raise `NotAnOperationError`.

    Ctrl-C waits for the ``await`` that follows, and so never drops a coroutine on the way to it.
    """
    operation("fn", fn)
    value: Any = fn(*args)
    check_awaitable(fn, value)
    awaited: Awaitable[Any] = value
    return awaited


@trio.lowlevel.disable_ki_protection
async def run_unprotected(fn: Callable[[*Ts], Awaitable[T]], *args: *Ts) -> T:
    """Run ``fn(*args)`` open to Ctrl-C, whatever its caller is protected from."""
    result: T = await awaitable(fn, *args)
    return result


def as_coroutine(fn: object, value: Any) -> Coroutine[Any, Any, Any]:
    """Make a coroutine of another awaitable; raise `NotAnOperationError` if it is none."""
    check_awaitable(fn, value)
    return _wait_for(value)


async def _wait_for(awaited: Awaitable[object]) -> object:
    return await awaited
