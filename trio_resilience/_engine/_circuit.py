"""A circuit in the runs of trio: who is let through, what calls say, and who is told."""

from __future__ import annotations

import reprlib
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from random import Random
from typing import Any, Final, TypeVar, TypeVarTuple, cast, final

import attrs
import trio
from trio.lowlevel import TrioToken, disable_ki_protection, enable_ki_protection

from trio_resilience._algorithms._breaker import HALF_OPEN, NOBODY, OPEN, Breaker, Change, Limits
from trio_resilience._algorithms._retry_rule import LongestDelays
from trio_resilience._algorithms._window import Window
from trio_resilience._checks import NotAnOperationError, label, refuse_coroutine
from trio_resilience._classify import Classifier
from trio_resilience._engine._driver import run_unprotected
from trio_resilience._engine._policy import open_overrides, overrides
from trio_resilience._engine._report import open_subscriptions, report
from trio_resilience._engine._run import RunState
from trio_resilience._errors import (
    CallAbandonedError,
    CircuitOpenError,
    FailureRecord,
    RejectedError,
)
from trio_resilience._events import CircuitState, CircuitStateChanged, Rejected, RejectionSkipped

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

NOTHING: Final = object()
"""In place of a result that there is none of."""

_LEAST_PACE: Final = 0.001
"""Seconds: a prober that never waited would keep the clock of a test from moving."""

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


@final
@attrs.define(eq=False, repr=False)
class CircuitRun:
    """A circuit in one run of trio: who runs, and who waits for a change."""

    rule: Breaker
    now: Callable[[], float] = attrs.field(
        factory=lambda: trio.lowlevel.current_clock().current_time, init=False
    )
    in_flight: int = attrs.field(default=0, init=False)
    probers: int = attrs.field(default=0, init=False)
    scopes: dict[trio.CancelScope, None] = attrs.field(
        factory=dict[trio.CancelScope, None], init=False
    )
    """Calls that are to be cancelled if the circuit opens."""
    _untold: deque[tuple[Change, str]] = attrs.field(factory=deque[tuple[Change, str]], init=False)
    _is_telling: bool = attrs.field(default=False, init=False)
    _changed: trio.Event = attrs.field(factory=trio.Event, init=False)
    _token: TrioToken = attrs.field(factory=trio.lowlevel.current_trio_token, init=False)

    @classmethod
    def begin(cls, rule: Breaker) -> CircuitRun:
        rule.begin_run(trio.current_time())
        return cls(rule)

    @property
    def is_here(self) -> bool:
        """Whether it is the run in which this is asked."""
        return trio.lowlevel.in_trio_run() and trio.lowlevel.current_trio_token() is self._token

    def leave(self, ticket: int) -> None:
        self.in_flight -= 1
        self.rule.leave(ticket)

    def wake(self) -> None:
        if self.probers:
            self._changed.set()
            self._changed = trio.Event()

    def tell(self, changes: list[Change], called: str, policy: str) -> None:
        """Report changes in the order in which they come, also those that listeners bring about."""
        self._untold.extend((change, called) for change in changes)
        if self._is_telling:
            return  # a listener has been told of one, and has not returned yet
        self._is_telling = True
        try:
            while self._untold:
                change, called = self._untold.popleft()
                report(CircuitStateChanged, policy=policy, operation=called, **change._asdict())
        finally:
            self._is_telling = False

    async def wait_for_change(self, most: float) -> None:
        with trio.move_on_after(most):
            await self._changed.wait()


@final
@attrs.define(eq=False, repr=False)
class Circuit:
    """A circuit, and what it is in the run that is live."""

    rule: Breaker
    runs: RunState[CircuitRun]

    @classmethod
    def start(cls, limits: Limits) -> Circuit:
        rule = Breaker(limits)
        return cls(rule, RunState(partial(CircuitRun.begin, rule)))

    def anew(self) -> Circuit:
        return Circuit.start(self.rule.limits)

    @property
    def state(self) -> CircuitState:
        # Between two runs there are no probes that could decide.
        is_lost = self.rule.state is HALF_OPEN and self.runs.peek() is None
        return OPEN if is_lost else self.rule.state

    @property
    def retry_after(self) -> float | None:
        if self.state is not OPEN:
            return None
        if not _has_delays():
            return 0.0
        run = self.runs.peek()  # which may be asked from another thread
        if run is None and trio.lowlevel.in_trio_run():
            run = self.runs.get()
        # Between two runs, the time is to start again with the next.
        return self.rule.recovery if run is None else self.rule.time_to_probe(run.now())

    @property
    def is_busy(self) -> bool:
        run = self.runs.peek()
        return run is not None and bool(run.in_flight or run.probers)

    def window(self) -> Window | None:
        """Return the calls that count at this instant, if there are any."""
        rule = self.rule
        if rule.window is None or (rule.limits.is_window_of_run and self.runs.peek() is None):
            return None
        if self.runs.here() is not None:
            rule.window.forget_before(trio.current_time())
        return rule.window if rule.window.calls else None

    def by_hand(self) -> CircuitRun | None:
        """Return the run in which somebody changes something by hand, if there is one."""
        if trio.lowlevel.in_trio_run():
            return self.runs.get()
        if self.runs.peek() is not None:
            raise RuntimeError(
                "a circuit breaker that is in use in a run of trio can be changed only there: call"
                " this by `trio.from_thread.run_sync`"
            )
        return None


@final
@attrs.frozen(eq=False, repr=False)
class Judge:
    """What a call says about that which it has called, and what is told of it."""

    name: str
    failure_on: Classifier
    failure_result: Callable[[Any], object] | None
    slow_call_duration: float
    enforce: bool
    abandons: bool
    """Whether those who run are cancelled when the circuit opens."""
    rng: Random

    async def admit(self, run: CircuitRun, fn: object) -> int:
        """Return a ticket for the circuit that is not closed, or refuse the call.

        Here and below, *fn* is the operation, or its name if it has one.
        """
        rule, now = run.rule, run.now()
        retry_after = rule.retry_after(now)
        # Else nobody is let through, which is what most calls come to hear.
        if not retry_after or rule.changes or open_overrides:
            ticket = rule.admit(now, self.pace, is_probe=not run.probers)
            if rule.changes:
                self.announce_entry(run, name_of(fn), ticket)
            if ticket is not None:
                return ticket
            retry_after = rule.retry_after(now)
        last_failure = rule.last_failure
        if self.enforce:
            await trio.lowlevel.checkpoint()
        rule.counts.rejections += 1
        if open_subscriptions:
            kind = Rejected if self.enforce else RejectionSkipped
            report(kind, policy=self.name, operation=name_of(fn), retry_after=retry_after)
        if self.enforce:
            raise CircuitOpenError(self.name, retry_after, last_failure)
        return NOBODY

    def raised(
        self, run: CircuitRun, ticket: int, error: Exception, began: float, fn: object
    ) -> None:
        """Take an error for what it says."""
        rule = run.rule
        if ticket != rule.generation or not run.is_here:
            return
        if isinstance(error, NotAnOperationError) or not self._is_failure(error):
            return
        failure = failure_of(error, run.now())
        slow = failure.time - began >= self.slow_call_duration
        rule.failed(ticket, failure, self.pace, slow=slow)
        if rule.changes:
            self.announce(run, name_of(fn))

    def returned(
        self, run: CircuitRun, ticket: int, result: object, began: float, fn: object
    ) -> None:
        """Take a result for what it says."""
        rule = run.rule
        if ticket != rule.generation or not run.is_here:
            return
        now = run.now()
        slow = now - began >= self.slow_call_duration
        failure = None
        if self.failure_result is not None and result is not NOTHING:
            failure = self._failure_in(result, now)
        if failure is None:
            rule.succeeded(ticket, now, self.pace, slow=slow)
        else:
            rule.failed(ticket, failure, self.pace, slow=slow)
        if rule.changes:
            self.announce(run, name_of(fn))

    async def probe(self, run: CircuitRun, probe: Callable[[], Awaitable[object]]) -> None:
        """Call *probe*, if there is a place for it, and take what it says."""
        rule, began, called = run.rule, run.now(), label(probe)
        ticket = rule.admit(began, self.pace, is_probe=True)
        if rule.changes:
            self.announce_entry(run, called, ticket)
        if ticket is None:  # calls are still probes that were so when this began
            await run.wait_for_change(max(rule.recovery, _LEAST_PACE))
            return
        try:
            failure = await self._try(probe, rule.patience)
        finally:
            rule.leave(ticket)
        now = run.now()
        if failure is None:
            slow = now - began >= self.slow_call_duration
            rule.succeeded(ticket, now, self.pace, slow=slow)
        else:
            rule.failed(ticket, failure, self.pace, slow=False)
        self.announce(run, called)
        await run.wait_for_change(_LEAST_PACE)

    async def _try(
        self, probe: Callable[[], Awaitable[object]], patience: float
    ) -> FailureRecord | None:
        try:
            with trio.CancelScope(relative_deadline=patience):
                result = await run_unprotected(probe)
                if self.failure_result is None:
                    return None
                return self._failure_in(result, trio.current_time())
        except NotAnOperationError:
            raise
        except Exception as error:  # noqa: BLE001 - no probe that raises says that it works
            return failure_of(error, trio.current_time())
        text = f"the probe took longer than {patience:g} s"
        return FailureRecord("TooSlowError", text, trio.current_time())

    def announce(self, run: CircuitRun, called: str) -> None:
        """Let all know of what has changed: who waits for it, who is given up, who listens."""
        changes, run.rule.changes = run.rule.changes, []
        run.wake()
        if self.abandons and any(change.state is OPEN for change in changes):
            for scope in run.scopes:
                scope.cancel()
        if open_subscriptions and trio.lowlevel.in_trio_task():
            run.tell(changes, called, self.name)

    def announce_by_hand(self, circuit: Circuit, run: CircuitRun | None, called: str) -> None:
        """Do that for what was done by hand, in a run or outside."""
        if run is None:
            circuit.rule.changes.clear()  # there is no time at which it happens
        else:
            self.announce(run, called)

    def announce_entry(self, run: CircuitRun, called: str, ticket: int | None) -> None:
        """Do that for a call that is let through, or not."""
        try:
            self.announce(run, called)
        except BaseException:  # a listener has raised what stops the program
            if ticket is not None:
                run.rule.leave(ticket)
            raise

    def pace(self) -> Random | None:
        """Return what recovery times are drawn with; ``None``: there are none."""
        mode = overrides() if open_overrides else None
        if mode is None:
            return self.rng
        if not mode.delays:
            return None
        return self.rng if mode.jitter else LongestDelays(0)

    @disable_ki_protection
    def _failure_in(self, result: object, now: float) -> FailureRecord | None:
        assert self.failure_result is not None
        answer = self.failure_result(result)
        refuse_coroutine("failure_result", answer)
        return FailureRecord(type(result).__name__, _short.repr(result), now) if answer else None

    @disable_ki_protection
    def _is_failure(self, error: Exception) -> bool:
        return not _says_nothing(error) and self.failure_on.judge(error) is not False


def _has_delays() -> bool:
    mode = overrides() if open_overrides else None
    return mode is None or mode.delays


def _says_nothing(error: BaseException) -> bool:
    """Tell whether a policy further in has refused the call, or has given it up."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return any(map(_says_nothing, group.exceptions))
    return isinstance(error, (RejectedError, CallAbandonedError))


@disable_ki_protection
def failure_of(error: Exception, time: float) -> FailureRecord:
    """Return what is kept of an error: words, and no more of them than a report has room for."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - whatever a foreign class raises, its failure is one
        text = "(its text can't be read)"
    if len(text) > _short.maxstring:
        text = f"{text[: _short.maxstring]}..."
    return FailureRecord(type(error).__name__, text, time)


def name_of(fn: object) -> str:
    return fn if isinstance(fn, str) else label(fn)


@disable_ki_protection
async def run_coroutine(fn: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]) -> T:
    """Do what `run_unprotected` does, with what is known to be written `async def`."""
    return await fn(*args)


@enable_ki_protection
async def run_abandonable(
    run: CircuitRun, name: str, fn: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]
) -> T:
    scope = trio.CancelScope()
    run.scopes[scope] = None
    try:
        with scope:
            return await run_unprotected(fn, *args)
    finally:
        del run.scopes[scope]
    raise CallAbandonedError(name)
