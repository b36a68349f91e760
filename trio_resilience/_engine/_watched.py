"""Report a policy's call: when it starts, and what has become of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, TypeVarTuple, final

import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._checks import label, operation
from trio_resilience._engine._policy import Policy
from trio_resilience._engine._report import report
from trio_resilience._events import CallFinished, CallStarted

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
class Watched(str):
    """The name of an operation whose call is being reported, so that it is reported once."""

    __slots__ = ()


@enable_ki_protection
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
    called, began = label(fn) if name is None else name, trio.current_time()
    where: dict[str, Any] = {"policy": getattr(policy, "name", ""), "operation": called}
    report(CallStarted, **where)
    try:
        result = await call(fn, *args, name=Watched(called))
    except Exception as error:
        duration = trio.current_time() - began
        report(CallFinished, **where, duration=duration, error=error, cancelled=False)
        raise
    except BaseException:
        duration = trio.current_time() - began
        report(CallFinished, **where, duration=duration, error=None, cancelled=True)
        raise
    duration = trio.current_time() - began
    report(CallFinished, **where, duration=duration, error=None, cancelled=False)
    return result


def plain(name: str | None) -> str | None:
    """Return a name under which a policy further in reports on its own call."""
    return None if name is None else str(name)
