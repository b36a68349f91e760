"""Report a policy's call: when it starts, and what has become of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, TypeVarTuple, final

from trio.lowlevel import current_clock

from trio_resilience._checks import label, operation
from trio_resilience._engine._policy import Policy
from trio_resilience._engine._report import call_failed, call_started, call_succeeded

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
class Watched(str):
    """The name of an operation whose call is being reported, so that it is reported once."""

    __slots__ = ()


async def watched(
    policy: Policy[Any],
    call: Callable[..., Awaitable[T]],
    fn: Callable[..., object],
    args: tuple[Any, ...],
    name: str | None,
) -> T:
    """Return the result of *call*, a method of *policy*, and report on it; for listeners only.

    What is no operation is refused first: a mistake is no call.
    """
    operation("fn", fn)
    called = label(fn) if name is None else name
    where = getattr(policy, "name", ""), called
    now = current_clock().current_time
    began = now()
    call_started(where)
    return await finishing(call(fn, *args, name=Watched(called)), where, now, began)


async def finishing(
    rest: Awaitable[T], where: tuple[str, str], now: Callable[[], float], began: float
) -> T:
    """Return the result of the rest of a call, and report what has become of the call."""
    try:
        result = await rest
    except BaseException as error:
        call_failed(where, now() - began, error)
        raise
    call_succeeded(where, now() - began)
    return result


def plain(name: str | None) -> str | None:
    """Return a name under which a policy further in reports on its own call."""
    return None if name is None else str(name)
