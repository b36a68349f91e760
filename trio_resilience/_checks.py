"""Refuse bad arguments at the door, in one wording: name, rule, value."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import types
from collections.abc import Awaitable, Iterable
from datetime import timedelta
from typing import Any, TypeVar, cast

WordT = TypeVar("WordT", bound=str)


class NotAnOperationError(TypeError):
    """What was given as an operation can't be awaited: a mistake in the program, not a failure.

    It ends the whole job, as the `TypeError` it is, and is never retried, counted or collected.
    """

    def __init__(self, message: str, fn: object = None) -> None:
        super().__init__(message)
        self.fn = fn


# --- numbers and words --------------------------------------------------------------------------


def integer(name: str, value: object, *, minimum: int) -> int:
    """Return *value* if it is an integer of at least *minimum*; a bool is not an integer."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an int, got {value!r}")
    if value < minimum:
        raise ValueError(f"`{name}` must be >= {minimum}, got {value!r}")
    return int(value)


def number(
    name: str,
    value: object,
    *,
    minimum: float = 0.0,
    finite: bool = False,
    exclusive: bool = False,
) -> float:
    """Return *value* as a float if it is a real number of at least *minimum*, or above it."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}")
    try:
        result = float(value)
    except OverflowError:
        raise ValueError(f"`{name}` must be a number that a float can hold") from None
    # Written this way round so that NaN fails too.
    if not (result > minimum if exclusive else result >= minimum):
        rule = ">" if exclusive else ">="
        raise ValueError(f"`{name}` must be {rule} {minimum:g}, got {value!r}")
    if finite and result == math.inf:
        raise ValueError(f"`{name}` must be finite, got {value!r}")
    return result


def seconds(name: str, value: object, *, finite: bool = False, exclusive: bool = False) -> float:
    """Return *value* as seconds: a number or a `datetime.timedelta`, not negative, or above 0."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    elif isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be seconds or a timedelta, got {value!r}")
    return number(name, value, finite=finite, exclusive=exclusive)


def refuse_coroutine(name: str, value: object) -> None:
    """Refuse what a callback has returned that is an async function in disguise."""
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError(f"`{name}` must be a plain function, but it returned {value!r}")


def flag(name: str, value: object) -> bool:
    """Return *value* if it is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` must be True or False, got {value!r}")
    return value


def one_of(name: str, value: WordT, allowed: tuple[WordT, ...]) -> WordT:
    """Return *value* if it is one of the *allowed* words."""
    if value not in allowed:
        words = ", ".join(map(repr, allowed))
        raise ValueError(f"`{name}` must be one of {words}, got {value!r}")
    return value


def text(name: str, value: object) -> str:
    """Return *value*, or refuse what is no string."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, got {value!r}")
    return value


def sync_callback(name: str, value: object) -> None:
    """Refuse what can't be called, and an async function where a plain one is called."""
    if not callable(value):
        raise TypeError(f"`{name}` must be a function, got {value!r}")
    if is_async(value):
        raise TypeError(f"`{name}` must be a plain function, not an async one, got {value!r}")


# --- operations ---------------------------------------------------------------------------------


def operation(name: str, fn: object) -> None:
    """Refuse what is known not to be an async callable; close a coroutine object.

    A lambda or an object may well return a coroutine: only its call can tell, see `awaitable`.
    """
    if isinstance(fn, types.FunctionType) and fn.__code__.co_flags & _ASYNC_DEF:
        return
    callable_operation(name, fn)
    if inspect.isasyncgenfunction(fn):
        raise NotAnOperationError(
            f"`{name}` must be an async function, got the async generator function {label(fn)}:"
            " call it in an async function, and iterate there",
            fn,
        )
    if _is_known_sync(fn):
        raise NotAnOperationError(
            f"`{name}` must be an async function, got the sync {label(fn)}: make it `async def`,"
            f" or run it in a thread: functools.partial(trio.to_thread.run_sync, {label(fn)})",
            fn,
        )


def operations(name: str, fns: Iterable[object]) -> None:
    """Check each of *fns* before any of them runs; close every coroutine object among them."""
    try:
        for index, fn in enumerate(fns):
            inner: Any = fn
            if type(inner) is functools.partial:
                inner = inner.func
            # The usual case, told in one step: what comes here may be a long list.
            if type(inner) is types.FunctionType and inner.__code__.co_flags & _ASYNC_DEF:
                continue
            operation(f"{name}[{index}]", fn)
    except TypeError:
        for fn in fns:
            if inspect.iscoroutine(fn):
                fn.close()
        raise


def callable_operation(name: str, fn: object) -> None:
    """Refuse what can't be called; close a coroutine object, so that it warns of nothing later."""
    if inspect.iscoroutine(fn):
        called = fn.__name__
        fn.close()
        raise NotAnOperationError(
            f"`{name}` must be an async function, got a coroutine object: pass the function"
            f" without calling it, {called}, or functools.partial({called}, ...) with arguments",
            fn,
        )
    if not callable(fn):
        raise NotAnOperationError(f"`{name}` must be an async function, got {fn!r}", fn)


def check_awaitable(fn: object, value: object) -> None:
    """Refuse *value*, which *fn* returned, if it can't be awaited."""
    # The usual case, told in one step.
    if type(value) is not types.CoroutineType and not isinstance(value, Awaitable):
        raise NotAnOperationError(
            f"{label(fn)} must be an async function, but it returned {value!r}, which can't be"
            " awaited",
            fn,
        )


def label(fn: object) -> str:
    """Return the name by which a user knows *fn*; of an object that can be called, its class's."""
    if type(fn) is types.FunctionType:  # the usual case, told in one step
        return fn.__qualname__
    while isinstance(fn, functools.partial):
        fn = fn.func
    name = getattr(fn, "__qualname__", None)
    if isinstance(name, str):
        return name
    # A repr would have an address in it, and so be another name for each object.
    return type(fn).__qualname__ if callable(fn) else repr(fn)


def shown(value: object) -> str:
    """Return a repr in which functions and types go by the names by which a user knows them."""
    if isinstance(value, tuple):
        parts = [shown(part) for part in cast("tuple[object, ...]", value)]
        return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
    return label(value) if callable(value) and _is_named(value) else repr(value)


def _is_named(value: Any) -> bool:
    return isinstance(value, functools.partial) or hasattr(value, "__qualname__")


_ASYNC_DEF = inspect.CO_COROUTINE | inspect.CO_ITERABLE_COROUTINE


def _is_known_sync(fn: object) -> bool:
    while isinstance(fn, functools.partial):
        fn = fn.func
    if inspect.iscoroutinefunction(fn):
        return False
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        return not _has_async_flag(fn)
    if isinstance(fn, type):
        return not issubclass(fn, Awaitable)
    if isinstance(fn, types.BuiltinFunctionType):
        return isinstance(fn.__self__, types.ModuleType)
    if isinstance(fn, types.MethodType):
        fn = fn.__func__
    return isinstance(fn, types.FunctionType) and not _may_return_awaitable(fn)


def _may_return_awaitable(fn: types.FunctionType) -> bool:
    """Tell whether a plain function shows that it hands on an awaitable: then its call decides."""
    returns = str(fn.__annotations__.get("return", ""))
    cells = (cell.cell_contents for cell in fn.__closure__ or () if _is_filled(cell))
    return (
        fn.__name__ == "<lambda>"
        or _has_async_flag(fn)
        or "Awaitable" in returns
        or "Coroutine" in returns
        or is_async(getattr(fn, "__wrapped__", None))
        or any(callable(content) and is_async(content) for content in cells)
    )


def _has_async_flag(fn: object) -> bool:
    code = getattr(fn, "__code__", None)
    return code is not None and bool(code.co_flags & _ASYNC_DEF)


def is_async(fn: object) -> bool:
    """Tell whether *fn* is known to return an awaitable."""
    while isinstance(fn, functools.partial):
        fn = fn.func
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
