"""Handles of a circuit: a block of code that it watches, and a hold that keeps it open."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._algorithms._breaker import CLOSED, NOBODY
from trio_resilience._engine._circuit import NOTHING, Circuit, CircuitRun, Judge
from trio_resilience._errors import CallAbandonedError


@final
@attrs.define(eq=False, repr=False)
class CircuitGuard:
    """A block of code under a circuit breaker; see `CircuitBreaker.guard`."""

    _find: Callable[[], Circuit]
    _judge: Judge
    _name: str
    _run: CircuitRun | None = attrs.field(default=None, init=False)
    _ticket: int = attrs.field(default=NOBODY, init=False)
    _began: float = attrs.field(default=0.0, init=False)
    _result: object = attrs.field(default=NOTHING, init=False)
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    def set_result(self, value: object) -> None:
        """Give the block's result to *failure_result*; a block that gives none has succeeded."""
        self._result = value

    @enable_ki_protection
    async def __aenter__(self) -> CircuitGuard:
        if self._run is not None:
            raise RuntimeError("a guard serves one block: call `guard()` anew for the next")
        await trio.lowlevel.checkpoint()
        run = self._find().runs.get()
        rule = run.rule
        if rule.state is CLOSED:
            self._ticket = rule.generation
        else:
            self._ticket = await self._judge.admit(run, self._name)
        run.in_flight += 1
        self._run, self._began = run, run.now()
        if self._judge.abandons:
            run.scopes[self._scope] = None
            self._scope.__enter__()
        return self

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        run = self._run
        assert run is not None
        if not run.is_here:
            return  # what belongs to a run that has died has died with it
        try:
            self._close_scope(run, exc_type, exc, traceback)
        except BaseException as error:
            self._end(run, error)
            raise
        else:
            self._end(run, exc)
        finally:
            del exc

    def _close_scope(
        self,
        run: CircuitRun,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._judge.abandons:
            del run.scopes[self._scope]
            try:
                # It says the same of a block that has ended without an error.
                if self._scope.__exit__(exc_type, exc, traceback) and exc is not None:
                    raise CallAbandonedError(self._judge.name) from None
            finally:
                del exc

    def _end(self, run: CircuitRun, error: BaseException | None) -> None:
        run.leave(self._ticket)
        if error is None:
            self._judge.returned(run, self._ticket, self._result, self._began, self._name)
        elif isinstance(error, Exception):
            self._judge.raised(run, self._ticket, error, self._began, self._name)


@final
@attrs.define(eq=False, repr=False)
class CircuitIsolation:
    """A hold on a circuit that is isolated; see `CircuitBreaker.isolate`.

    It ends with `release`, or with a ``with`` block.
    """

    _circuit: Circuit
    _judge: Judge
    _holder: object

    @enable_ki_protection
    def release(self) -> None:
        """Give the hold up; to do so twice is harmless."""
        run = self._circuit.by_hand()
        self._circuit.rule.release(self._holder)
        self._judge.announce_by_hand(self._circuit, run, "release")

    @enable_ki_protection
    def __enter__(self) -> CircuitIsolation:
        return self

    @enable_ki_protection
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
