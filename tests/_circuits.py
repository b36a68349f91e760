"""Calls of a circuit breaker, in its three forms, that the tests of it share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import attrs
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.operations import fails, returns
from trio_resilience import CircuitOpenError
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import CircuitState

Form = Callable[..., Awaitable[Any]]

CLOSED, OPEN, HALF_OPEN, ISOLATED = CircuitState


async def call(breaker: CircuitBreaker, fn: Any, *args: Any) -> Any:
    return await breaker.call(fn, *args)


async def decorated(breaker: CircuitBreaker, fn: Any, *args: Any) -> Any:
    return await breaker(fn)(*args)


async def guard(breaker: CircuitBreaker, fn: Any, *args: Any) -> Any:
    async with breaker.guard() as block:
        result = await fn(*args)
        block.set_result(result)
        return result


forms = pytest.mark.parametrize("form", [call, decorated, guard])

STOPS = [
    KeyboardInterrupt(),
    SystemExit(3),
    GeneratorExit(),
    BaseExceptionGroup("", [OSError("down"), KeyboardInterrupt()]),
    BaseExceptionGroup("", [BaseExceptionGroup("", [SystemExit()]), OSError("down")]),
]
stops = pytest.mark.parametrize("stop", STOPS, ids=repr)


async def fail(breaker: CircuitBreaker, times: int = 1, form: Form = call) -> None:
    """Let so many calls fail; each comes out as the very error that was raised."""
    for _ in range(times):
        error = OSError("down")
        with pytest.raises(OSError, match="down") as caught:
            await form(breaker, fails, error)
        assert caught.value is error
        assert not hasattr(error, "__notes__")


async def succeed(breaker: CircuitBreaker, times: int = 1, form: Form = call) -> None:
    for _ in range(times):
        assert await form(breaker, returns, "ok") == "ok"


async def is_refused(breaker: CircuitBreaker, form: Form = call) -> bool:
    """Tell whether a call is refused; if it is, nothing has run, else it succeeds."""
    ran = list[None]()

    async def op() -> None:
        ran.append(None)

    try:
        await form(breaker, op)
    except CircuitOpenError:
        assert not ran
        return True
    assert len(ran) == 1
    return False


@attrs.define(eq=False)
class Visit:
    """A call that stays in flight until it is told how to end."""

    breaker: CircuitBreaker
    form: Form = call
    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope)
    outcome: object = "in flight"
    has_run: bool = False
    _told: trio.Event = attrs.field(factory=trio.Event)
    _ending: object = None

    async def op(self) -> object:
        self.has_run = True
        await self._told.wait()
        if isinstance(self._ending, BaseException):
            raise self._ending
        return self._ending

    async def make(self) -> None:
        """Make the call, and keep what comes out of it."""
        try:
            with self.scope:
                self.outcome = await self.form(self.breaker, self.op)
        except BaseException as end:
            if isinstance(end, trio.Cancelled):
                raise
            self.outcome = end
        if self.scope.cancelled_caught:
            self.outcome = "cancelled"

    def tell(self, ending: object) -> None:
        self._ending = ending
        self._told.set()

    async def end(self, ending: object) -> object:
        """Let it end so, and return what came out."""
        self.tell(ending)
        await wait_all_tasks_blocked()
        return self.outcome

    async def cancel(self) -> None:
        self.scope.cancel()
        await wait_all_tasks_blocked()
        assert self.outcome == "cancelled"


async def begin(
    nursery: trio.Nursery, breaker: CircuitBreaker, number: int = 1, form: Form = call
) -> list[Visit]:
    """Let so many calls begin, and come to rest."""
    visits = [Visit(breaker, form) for _ in range(number)]
    for visit in visits:
        nursery.start_soon(visit.make)
    await wait_all_tasks_blocked()
    return visits
