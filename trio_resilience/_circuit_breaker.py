"""Stop calling what does not work, until it works again."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from datetime import timedelta
from inspect import CO_COROUTINE
from random import Random
from types import FunctionType
from typing import Any, Never, TypeVar, TypeVarTuple, final

import attrs
import trio
from trio.lowlevel import current_trio_token, enable_ki_protection

from trio_resilience._algorithms._backoff import Backoff, Constant
from trio_resilience._algorithms._breaker import CLOSED, ISOLATED, Limits
from trio_resilience._algorithms._window import CallWindow, TimeWindow, Window
from trio_resilience._checks import (
    flag,
    integer,
    label,
    number,
    operation,
    seconds,
    sync_callback,
    text,
)
from trio_resilience._classify import Classifier, ErrorMatch, transient
from trio_resilience._engine._circuit import (
    Circuit,
    Judge,
    name_of,
    run_abandonable,
    run_coroutine,
)
from trio_resilience._engine._driver import run_unprotected
from trio_resilience._engine._guard import CircuitGuard, CircuitIsolation
from trio_resilience._engine._policy import LivePolicy, open_overrides, overrides
from trio_resilience._engine._report import (
    call_failed,
    call_started,
    call_succeeded,
    open_subscriptions,
)
from trio_resilience._engine._watched import Watched, watched
from trio_resilience._errors import FailureRecord
from trio_resilience._events import CircuitState
from trio_resilience._records import Record, record

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
@record
class CircuitBreakerStatistics(Record):
    """How a `CircuitBreaker` stands, and what it has seen.

    Only calls that said something are counted, and were still in time to say it.
    """

    state: CircuitState
    calls: int
    """Calls that succeeded or failed, in all; probes included."""
    failures: int
    slow_calls: int
    rejections: int
    """Calls that were refused; or would have been, if it only watches."""
    failure_rate: float | None
    """Of the calls in the window; ``None`` while there are none, or without a rate to watch."""
    slow_call_rate: float | None
    """Likewise."""
    consecutive_failures: int
    opened: int
    """How often it has opened, again after a failed probe included."""
    reason: str | None
    """Why it opened last."""
    in_flight: int
    """Calls that are running."""


# --- options ------------------------------------------------------------------------------------


def _name(value: str) -> str:
    return text("name", value)  # it is the one option that may be given by its place


def _failure_threshold(value: int | None) -> int | None:
    return None if value is None else integer("failure_threshold", value, minimum=1)


def _failure_rate(value: float | None) -> float | None:
    return _rate("failure_rate", value)


def _slow_call_rate(value: float | None) -> float | None:
    return _rate("slow_call_rate", value)


def _rate(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    rate = number(name, value, exclusive=True)
    if rate > 1:
        raise ValueError(f"`{name}` must be <= 1, got {value!r}")
    return rate


def _slow_call_duration(value: float | timedelta) -> float:
    return seconds("slow_call_duration", value)


def _window_calls(value: int) -> int:
    return integer("window_calls", value, minimum=1)


def _window_seconds(value: float | timedelta | None) -> float | None:
    if value is None:
        return None
    return seconds("window_seconds", value, finite=True, exclusive=True)


def _min_calls(value: int) -> int:
    return integer("min_calls", value, minimum=1)


def _recovery_timeout(value: float | timedelta | Backoff) -> float | Backoff:
    if callable(value):
        sync_callback("recovery_timeout", value)
        return value
    return seconds("recovery_timeout", value, finite=True)


def _half_open_max_calls(value: int) -> int:
    return integer("half_open_max_calls", value, minimum=1)


def _success_threshold(value: int) -> int:
    return integer("success_threshold", value, minimum=1)


def _half_open_timeout(value: float | timedelta | None) -> float | None:
    return None if value is None else seconds("half_open_timeout", value, exclusive=True)


def _failure_result(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None:
        sync_callback("failure_result", value)


def _enforce(value: bool) -> bool:  # noqa: FBT001 - a converter is given the value
    return flag("enforce", value)


def _cancel_in_flight(value: bool) -> bool:  # noqa: FBT001 - likewise
    return flag("cancel_in_flight", value)


def _rng(value: Random | None) -> Random:
    return Random() if value is None else value  # noqa: S311 - to spread load, not to keep secrets


def _random(_instance: object, _attribute: object, value: object) -> None:
    if not isinstance(value, Random):
        raise TypeError(f"`rng` must be a random.Random, got {value!r}")


def _has_rate(breaker: CircuitBreaker) -> bool:
    return breaker.failure_rate is not None or breaker.slow_call_rate is not None


def _is_timed(breaker: CircuitBreaker) -> bool:
    return breaker.slow_call_duration < math.inf


def _is_plain(breaker: CircuitBreaker) -> bool:
    """Tell whether all that a result says is that the call has succeeded."""
    return not _is_timed(breaker) and breaker.failure_result is None


def _build_circuit(breaker: CircuitBreaker) -> Circuit:
    recovery = breaker.recovery_timeout
    return Circuit.start(
        Limits(
            failure_threshold=breaker.failure_threshold,
            failure_rate=breaker.failure_rate,
            slow_call_rate=breaker.slow_call_rate,
            min_calls=breaker.min_calls,
            make_window=_build_window(breaker) if _has_rate(breaker) else None,
            is_window_of_run=breaker.window_seconds is not None,
            half_open_max_calls=breaker.half_open_max_calls,
            success_threshold=breaker.success_threshold,
            half_open_timeout=breaker.half_open_timeout,
            recovery=recovery if callable(recovery) else Constant(recovery),
        )
    )


def _build_window(breaker: CircuitBreaker) -> Callable[[float], Window]:
    size, length = breaker.window_calls, breaker.window_seconds
    return lambda now: CallWindow(size) if length is None else TimeWindow(length, now)


def _build_judge(breaker: CircuitBreaker) -> Judge:
    return Judge(
        breaker.name,
        Classifier.of("failure_on", breaker.failure_on),
        breaker.failure_result,
        breaker.slow_call_duration,
        breaker.enforce,
        breaker.cancel_in_flight and breaker.enforce,
        breaker.rng,
    )


# --- what users see -----------------------------------------------------------------------------


@final
@attrs.frozen(eq=False, repr=False)
class CircuitBreaker(LivePolicy[Never]):
    """Refuse calls at once while what they call does not work, and find out when it does again.

    A circuit is closed, and calls go through it, until too many of them fail. Then it opens, and
    refuses calls at once, so that nobody waits for what is down, and that is not kept down by
    calls. When the recovery time is over, it is half open: a few calls go through as probes; if
    they succeed, it closes, and if one fails, it opens again.

    A call that is cancelled, or ends with anything but an `Exception`, says nothing, and gives its
    place as a probe to the next. Nor does an error that *failure_on* does not match, or with which
    a policy further in has refused the call or given it up. Nor does a call that ends late, after
    the circuit has changed its state. The call with which the circuit opens raises its own error.

    Args:
        name: label of the circuit in errors and events.
        failure_threshold: so many failures in a row open it; ``None``: however many there are.
        failure_rate: this share of the calls in the window, above 0 and up to 1, opens it.
        slow_call_rate: likewise, of slow calls, whether they fail or not; a slow probe then counts
            as failed.
        slow_call_duration: a call that takes so many seconds or longer is slow.
        window_calls: the rates look at so many calls, the last ones.
        window_seconds: the rates look at the calls of the last seconds instead.
        min_calls: the rates count only when the window holds so many.
        recovery_timeout: seconds for which it stays open; or a backoff, such as `Exponential`, of
            which each failed round of probes takes the next delay, and which starts anew when the
            circuit has closed.
        half_open_max_calls: how many probes there may be at a time.
        success_threshold: how many of them have to succeed to close it.
        half_open_timeout: when all the probes there may be are under way, and this is over since
            any of them began or ended, they count as failed. ``None``: the recovery time, or a
            second if that is 0. It is the next call that finds it out.
        failure_on: which errors are failures; as `Retry`'s ``on``. A group of errors is one if all
            its leaves are.
        failure_result: a function of the result that returns whether it is a failure, too.
        enforce: ``False`` refuses nothing, and only counts and reports what would be refused.
        cancel_in_flight: cancel the calls that are still running when the circuit opens.
        rng: source of the jitter of *recovery_timeout*.

    Times are seconds or a `datetime.timedelta`. It may live at module level: for the next
    `trio.run`, it is as open or isolated as before, and its recovery time starts again; probes
    and a window in seconds belong to a run.

    Raises:
        CircuitOpenError: the circuit is not closed; nothing was run.
        CallAbandonedError: the call ran when the circuit opened, and *cancel_in_flight* is set.

    Example::

        payments = CircuitBreaker("payments", failure_rate=0.5, window_seconds=30)

        receipt = await payments.call(pay, order)


        @payments
        async def refund(order: Order) -> Receipt: ...


        async with payments.guard() as guard:
            guard.set_result(await pay(order))  # only for `failure_result`
    """

    name: str = attrs.field(default="circuit", converter=_name)
    failure_threshold: int | None = attrs.field(
        default=5, kw_only=True, converter=_failure_threshold
    )
    failure_rate: float | None = attrs.field(default=None, kw_only=True, converter=_failure_rate)
    slow_call_rate: float | None = attrs.field(
        default=None, kw_only=True, converter=_slow_call_rate
    )
    slow_call_duration: float = attrs.field(
        default=math.inf, kw_only=True, converter=_slow_call_duration
    )
    window_calls: int = attrs.field(default=100, kw_only=True, converter=_window_calls)
    window_seconds: float | None = attrs.field(
        default=None, kw_only=True, converter=_window_seconds
    )
    min_calls: int = attrs.field(default=20, kw_only=True, converter=_min_calls)
    recovery_timeout: float | Backoff = attrs.field(
        default=60.0, kw_only=True, converter=_recovery_timeout
    )
    half_open_max_calls: int = attrs.field(default=1, kw_only=True, converter=_half_open_max_calls)
    success_threshold: int = attrs.field(default=1, kw_only=True, converter=_success_threshold)
    half_open_timeout: float | None = attrs.field(
        default=None, kw_only=True, converter=_half_open_timeout
    )
    failure_on: ErrorMatch = attrs.field(default=transient, kw_only=True)
    failure_result: Callable[[Any], object] | None = attrs.field(
        default=None, kw_only=True, validator=_failure_result
    )
    enforce: bool = attrs.field(default=True, kw_only=True, converter=_enforce)
    cancel_in_flight: bool = attrs.field(default=False, kw_only=True, converter=_cancel_in_flight)
    rng: Random = attrs.field(factory=Random, kw_only=True, converter=_rng, validator=_random)

    _circuit: Circuit = attrs.field(
        default=attrs.Factory(_build_circuit, takes_self=True), init=False
    )
    _judge: Judge = attrs.field(default=attrs.Factory(_build_judge, takes_self=True), init=False)
    _is_timed: bool = attrs.field(default=attrs.Factory(_is_timed, takes_self=True), init=False)
    _has_rate: bool = attrs.field(default=attrs.Factory(_has_rate, takes_self=True), init=False)
    _is_plain: bool = attrs.field(default=attrs.Factory(_is_plain, takes_self=True), init=False)

    def __attrs_post_init__(self) -> None:
        if self.failure_threshold is None and not _has_rate(self):
            raise ValueError(
                "one of `failure_threshold`, `failure_rate` and `slow_call_rate` must be set, got"
                " None for each"
            )
        if self.slow_call_rate is not None and not self._is_timed:
            raise ValueError("`slow_call_rate` needs a `slow_call_duration`, got inf")
        if self.window_seconds is None and self.min_calls > self.window_calls:
            raise ValueError(
                f"`min_calls` must be <= `window_calls` ({self.window_calls}), got {self.min_calls}"
            )

    @property
    def state(self) -> CircuitState:
        """The state, which only calls change, and those that change it by hand.

        So a circuit whose recovery time is over still reads OPEN until a call is let through as a
        probe, and one whose probe hangs reads HALF_OPEN until the next call.
        """
        return self._here().state

    @property
    def retry_after(self) -> float | None:
        """Seconds until a call may be a probe, 0.0 if one may at once; ``None`` unless OPEN."""
        return self._here().retry_after

    @property
    def last_failure(self) -> FailureRecord | None:
        """What is remembered of the last failure that counted."""
        return self._here().rule.last_failure

    @property
    def is_idle(self) -> bool:
        """Whether it is closed, nothing is counted that could open it, and no call runs."""
        live = self._here()
        in_a_row = 0 if self.failure_threshold is None else live.rule.consecutive
        is_blank = live.rule.state is CLOSED and not in_a_row
        return is_blank and live.window() is None and not live.is_busy

    @property
    def is_disposable(self) -> bool:
        """Whether no call runs, and nobody is refused, nor would the next call be."""
        live = self._here()
        return live.state is not ISOLATED and not live.retry_after and not live.is_busy

    @enable_ki_protection
    async def call(  # noqa: C901, PLR0912, PLR0915 - the hot path: no call that can be spared
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        """Return the result of ``fn(*args)``, or refuse the call; a checkpoint if that is one."""
        runs = self._here().runs if open_overrides else self._circuit.runs
        run = runs.state if runs.token is current_trio_token() else runs.get()
        rule = run.rule
        # What is written `async def` needs no check.
        is_coroutine_function = type(fn) is FunctionType and fn.__code__.co_flags & CO_COROUTINE
        if rule.state is CLOSED:
            ticket, is_plain = rule.generation, self._is_plain
        else:
            if open_subscriptions and type(name) is not Watched:
                return await watched(self, self.call, fn, args, name)
            if not is_coroutine_function:
                operation("fn", fn)
            is_plain = False
            ticket = await self._judge.admit(run, fn if name is None else name)
        where = None
        if open_subscriptions and type(name) is not Watched:
            if not is_coroutine_function:
                operation("fn", fn)
            where = self.name, label(fn) if name is None else name
            call_started(where)
        began = run.now() if self._is_timed or where is not None else 0.0
        run.in_flight += 1
        try:
            if self.cancel_in_flight and self.enforce:
                result = await run_abandonable(run, self.name, fn, args)
            elif is_coroutine_function:
                result = await run_coroutine(fn, args)
            else:
                result = await run_unprotected(fn, *args)
        except Exception as error:
            run.leave(ticket)
            self._judge.raised(run, ticket, error, began, fn if name is None else name)
            if where is not None:
                call_failed(where, run.now() - began, error)
            raise
        except BaseException as error:
            run.leave(ticket)
            if where is not None:
                call_failed(where, run.now() - began, error)
            raise
        if is_plain and ticket == rule.generation and not rule.consecutive:
            # The usual case, in which a success changes little.
            run.in_flight -= 1
            window = rule.window
            if not self._has_rate:
                rule.counts.calls += 1
            elif window is not None and not (window.failures or window.slow_calls):
                rule.counts.calls += 1
                window.add(run.now(), 0)
            else:
                rule.succeeded(ticket, run.now(), self._judge.pace)
                if rule.changes:
                    self._judge.announce(run, name_of(fn if name is None else name))
        else:
            run.leave(ticket)
            self._judge.returned(run, ticket, result, began, fn if name is None else name)
        if where is not None:
            call_succeeded(where, run.now() - began)
        return result

    def guard(self, name: str | None = None) -> CircuitGuard:
        """Watch a block of code rather than a function: ``async with breaker.guard():``.

        *name* labels it in events. To enter it is a checkpoint.
        """
        return CircuitGuard(self._here, self._judge, "block" if name is None else name)

    @enable_ki_protection
    def isolate(self) -> CircuitIsolation:
        """Refuse all calls until the handle that this returns is released.

        There may be several such handles: when the last of them is released, the circuit is closed
        and starts anew, whatever it was before. Calls that run go on.
        """
        live, holder = self._here(), object()
        run = live.by_hand()
        live.rule.isolate(holder)
        try:
            self._judge.announce_by_hand(live, run, "isolate")
        except BaseException:  # a listener has raised what stops the program: nobody gets a handle
            live.rule.release(holder)
            raise
        return CircuitIsolation(live, self._judge, holder)

    @enable_ki_protection
    def reset(self) -> None:
        """Close the circuit, and forget what has opened it, or would have.

        If it is isolated, no longer: the handles release nothing any more. What has been counted
        for `statistics` stays.
        """
        live = self._here()
        run = live.by_hand()
        live.rule.reset()
        self._judge.announce_by_hand(live, run, "reset")

    @enable_ki_protection
    async def keep_probing(  # noqa: ASYNC114 - what is started so is never called in a block
        self,
        probe: Callable[[], Awaitable[object]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Find out with *probe* when it works again, until this is cancelled.

        While the circuit is open, *probe* is called at the recovery pace; it closes when that has
        succeeded *success_threshold* times, and opens again when it fails: when it raises any
        `Exception`, or returns what *failure_result* matches, or takes longer than
        *half_open_timeout*. Meanwhile no user's call is a probe. ::

            await nursery.start(breaker.keep_probing, ping)
        """
        operation("probe", probe)
        run = self._here().runs.get()
        run.probers += 1
        try:
            task_status.started()
            while True:
                wait = run.rule.time_to_probe(trio.current_time())
                if wait:
                    await run.wait_for_change(wait)
                else:
                    await self._judge.probe(run, probe)
        finally:
            run.probers -= 1

    def statistics(self) -> CircuitBreakerStatistics:
        """Return the state, what was counted, and the rates as they are now."""
        live = self._here()
        rule, counts, window, run = live.rule, live.rule.counts, live.window(), live.runs.peek()
        return CircuitBreakerStatistics(
            state=live.state,
            calls=counts.calls,
            failures=counts.failures,
            slow_calls=counts.slow_calls,
            rejections=counts.rejections,
            failure_rate=None if window is None else window.failures / window.calls,
            slow_call_rate=None if window is None else window.slow_calls / window.calls,
            consecutive_failures=rule.consecutive,
            opened=counts.opened,
            reason=rule.reason,
            in_flight=0 if run is None else run.in_flight,
        )

    def _here(self) -> Circuit:
        mode = overrides() if open_overrides else None
        return (
            self._circuit
            if mode is None
            else mode.state_of(self, self._circuit, self._circuit.anew)
        )

    def __repr__(self) -> str:
        now = self.statistics()
        failed = now.consecutive_failures
        return f"CircuitBreaker(name={self.name!r}: {now.state}, {failed} failed in a row)"
