"""Try again what failed for a passing reason, after a while, and not for ever."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Container
from datetime import timedelta
from functools import partial
from inspect import CO_COROUTINE
from random import Random
from types import FunctionType
from typing import TYPE_CHECKING, Any, Final, Generic, Never, TypeVar, TypeVarTuple, final

import attrs
import trio
from trio.lowlevel import current_clock, enable_ki_protection

from trio_resilience._algorithms._backoff import Backoff, Exponential
from trio_resilience._algorithms._budget import RetryBudget, optional_budget
from trio_resilience._algorithms._retry_rule import LongestDelays, RetryRule, Verdict
from trio_resilience._checks import (
    NotAnOperationError,
    check_awaitable,
    integer,
    label,
    number,
    operation,
    seconds,
    shown,
    sync_callback,
)
from trio_resilience._classify import (
    Classifier,
    ErrorMatch,
    retry_after_of,
    transient,
)
from trio_resilience._engine._deadline import Limit
from trio_resilience._engine._driver import awaitable
from trio_resilience._engine._join import Job, check_nursery, join
from trio_resilience._engine._policy import Overrides, Policy, open_overrides, overrides
from trio_resilience._engine._report import (
    Reporter,
    Subscription,
    call_failed,
    innermost,
    open_subscriptions,
    report,
)
from trio_resilience._engine._traceback import (
    add_note_once,
    being_handled,
    below_our_frames,
    drop_tracebacks,
)
from trio_resilience._engine._watched import Watched, finishing, watched
from trio_resilience._errors import (
    OperationTimeoutError,
    RejectedError,
    RetriesExhaustedError,
)
from trio_resilience._events import (
    AttemptFinished,
    AttemptStarted,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
)
from trio_resilience._records import Record, record

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

_NOTHING: Final = object()
_BLOCK: Final = "block"


@final
@record
class RetryStatistics(Record):
    """What a `Retry` has done so far; cancelled calls count only as calls."""

    calls: int
    attempts: int
    recovered: int
    """Calls that succeeded after more than one attempt."""
    given_up: int
    """Calls that ended with an error, or with a result that was refused."""


@final
@record
class RetryResult(Record, Generic[T]):
    """A result, and what it took to get it."""

    result: T
    attempts: int
    total_delay: float
    """Seconds spent waiting between the attempts."""


@final
@attrs.define(eq=False, repr=False)
class _Counts:
    calls: int = 0
    repeats: int = 0
    recovered: int = 0
    given_up: int = 0


def _most_attempts(value: int | None) -> int | None:
    return None if value is None else integer("max_attempts", value, minimum=1)


def _backoff(_instance: object, _attribute: object, value: object) -> None:
    sync_callback("backoff", value)


def _callback(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None:
        sync_callback(attribute.name, value)


def _random(_instance: object, _attribute: object, value: object) -> None:
    if not isinstance(value, Random):
        raise TypeError(f"`rng` must be a random.Random, got {value!r}")


def _attempt_timeout(value: float | timedelta) -> float:
    return seconds("attempt_timeout", value)


def _total_timeout(value: float | timedelta) -> float:
    return seconds("total_timeout", value)


def _max_retry_after(value: float | timedelta) -> float:
    return seconds("max_retry_after", value)


def _rng(value: Random | None) -> Random:
    return Random() if value is None else value  # noqa: S311 - to spread load, not to keep secrets


def _build_classifier(retry: Retry) -> Classifier:
    return Classifier.of("on", retry.on)


def _build_listeners(retry: Retry) -> tuple[Subscription, ...]:
    callback: Any = retry.on_retry
    return () if callback is None else (Subscription(callback),)


def _needs_nothing(retry: Retry) -> bool:
    """Tell whether an attempt needs no scope, and its result no judgement."""
    timeouts = (retry.attempt_timeout, retry.total_timeout)
    return timeouts == (math.inf, math.inf) and retry.retry_result is None


@final
@attrs.frozen(eq=False, kw_only=True)
class Retry(Policy[Never]):
    """Call an operation again when it fails for a passing reason; give up with its last error.

    What comes out is the operation's own error, as the same object, with a note that says what was
    tried; a refusal, such as that of a circuit which the attempts have opened, has the last failure
    as its cause. A cancellation, Ctrl-C and all else that is no `Exception` pass through at once.
    It never sleeps into a deadline: when the next attempt would begin at or after the effective
    deadline, it gives up at once.

    Args:
        max_attempts: how many calls to make at the most, the first included; ``None``: no limit.
        on: which errors deserve another try: a type, a function of the error that returns a bool
            or the seconds to wait, or a tuple of such. A group of errors does if all its leaves do.
        backoff: how long to wait between attempts; see `Exponential`, `Constant`, `Linear`,
            `Fibonacci`, `Decorrelated`, or any function of a `random.Random` that returns an
            iterator of seconds, which counts as jittered unless it has a `jitter` of ``"none"``.
        retry_result: a function of the result that returns whether it deserves another try.
        attempt_timeout: seconds that each attempt may take: its `OperationTimeoutError` is judged
            by *on* like any other error.
        total_timeout: seconds that all of it may take; it stops a running attempt, too, with an
            `OperationTimeoutError` whose cause is the last error that an attempt raised.
        max_retry_after: give up when the other side, by a ``retry_after`` or a ``Retry-After``
            header, asks to wait longer than these seconds: to come back sooner makes it worse. A
            shorter wait is the least that the next delay will be.
        budget: a `RetryBudget`, from which each further attempt takes a token, and which each
            success feeds; when it is empty, the call gives up at once, with the error it has.
        on_retry: called with a `RetryScheduled` before each wait; if it raises, that is logged. The
            traceback of its error is dropped after that.
        rng: source of the jitter.
        name: label of the policy in events and notes.

    Raises:
        RetriesExhaustedError: the last result was refused by *retry_result*.
        OperationTimeoutError: *total_timeout* expired while an attempt ran.

    Retries multiply: three attempts around three attempts are nine calls.

    Example::

        retry = Retry(max_attempts=5, backoff=Exponential(0.5))

        page = await retry.call(fetch, url)


        @retry
        async def load(url: str) -> bytes: ...


        async for attempt in retry.attempts():
            with attempt:
                page = await fetch(url)
    """

    max_attempts: int | None = attrs.field(default=3, converter=_most_attempts)
    on: ErrorMatch = attrs.field(default=transient, repr=shown)
    backoff: Backoff = attrs.field(factory=Exponential, validator=_backoff, repr=shown)
    retry_result: Callable[[Any], object] | None = attrs.field(
        default=None, validator=_callback, repr=shown
    )
    attempt_timeout: float = attrs.field(default=math.inf, converter=_attempt_timeout)
    total_timeout: float = attrs.field(default=math.inf, converter=_total_timeout)
    max_retry_after: float = attrs.field(default=60.0, converter=_max_retry_after)
    budget: RetryBudget | None = attrs.field(default=None, validator=optional_budget)
    on_retry: Callable[[RetryScheduled], object] | None = attrs.field(
        default=None, validator=_callback, repr=shown
    )
    rng: Random = attrs.field(factory=Random, converter=_rng, validator=_random, repr=False)
    name: str = "retry"

    _classifier: Classifier = attrs.field(
        default=attrs.Factory(_build_classifier, takes_self=True), init=False, repr=False
    )
    _listeners: tuple[Subscription, ...] = attrs.field(
        default=attrs.Factory(_build_listeners, takes_self=True), init=False, repr=False
    )
    _is_plain: bool = attrs.field(
        default=attrs.Factory(_needs_nothing, takes_self=True), init=False, repr=False
    )
    _counts: _Counts = attrs.field(factory=_Counts, init=False, repr=False)

    @property
    def is_idle(self) -> bool:
        """Whether its budget, if it has one, is full."""
        return self.budget is None or self.budget.is_full

    async def call(  # noqa: C901 - the hot path: no call of ours that can be spared
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        """Return the result of the first attempt at ``fn(*args)`` that succeeds."""
        result: T
        if not self._is_plain or open_overrides:
            if open_subscriptions and type(name) is not Watched:
                return await watched(self, self.call, fn, args, name)
            call = self._start(fn, name)
            await _repeat(call, fn, args)
            result = call.result
            return result
        # The usual case, a success at the first attempt, is spared all that others need.
        if type(fn) is not FunctionType or not fn.__code__.co_flags & CO_COROUTINE:
            operation("fn", fn)
        pending: Any = fn
        self._counts.calls += 1
        began = None
        if open_subscriptions:
            where, block = (self.name, label(fn) if name is None else name), innermost.get()
            ledger = block.ledgers[where]
            ledger.only_attempt_started()
            now = current_clock().current_time
            began = now()
        try:
            result = await (pending := fn(*args))
        except Exception as error:
            again = self._first_failed(error, fn, pending, name, began)
            if again is None:
                raise
            call = again
        except BaseException as error:
            if began is not None:
                self._first_failed(error, fn, pending, name, began)
            raise
        else:
            if self.budget is not None:
                self.budget.success()
            if began is not None:
                ledger = ledger if block.is_open else Reporter(*where)  # pyright: ignore[reportPossiblyUnboundVariable]
                ledger.only_attempt_succeeded(now() - began)  # pyright: ignore[reportPossiblyUnboundVariable]
            return result
        call.forget_tracebacks()
        rest = _go_on(call, fn, args)
        if began is not None:
            rest = finishing(rest, where, now, began)  # pyright: ignore[reportPossiblyUnboundVariable]
        await rest
        result = call.result
        return result

    @enable_ki_protection
    def _first_failed(
        self,
        error: BaseException,
        fn: Callable[..., object],
        pending: object,
        name: str | None,
        began: float | None,
    ) -> _Call | None:
        """Return the call that goes on after its first attempt, unless that was its last.

        If somebody listens, *began* is when it began.
        """
        call = self._start(fn, name)
        call.rule.attempts, call.began = 1, began or 0.0
        try:
            if isinstance(error, TypeError) and pending is not fn:
                check_awaitable(fn, pending)
        except NotAnOperationError as mistake:
            call.ended_in(mistake)
            call.tell_end(mistake, began)
            raise
        if call.ended_in(error):
            return call
        call.tell_end(error, began)
        return None

    async def call_counted(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> RetryResult[T]:
        """Like `call`, and tell how many attempts and how much waiting the result took."""
        if open_subscriptions and type(name) is not Watched:
            return await watched(self, self.call_counted, fn, args, name)
        call = self._start(fn, name)
        await _repeat(call, fn, args)
        return RetryResult(call.result, call.rule.attempts, call.rule.total_delay)

    def attempts(self) -> AsyncIterator[Attempt]:
        """Retry a block of code rather than a function.

        ::

            async for attempt in retry.attempts():
                with attempt:
                    page = await fetch(url)
                    attempt.set_result(page)  # only for `retry_result`

        The loop ends after the first block that succeeds, and with the error of the last one.
        """
        return _Attempts(self._start(_BLOCK, _BLOCK))

    def statistics(self) -> RetryStatistics:
        """Return how many calls and attempts there were, and what became of them."""
        counts = self._current_counts(overrides() if open_overrides else None)
        return RetryStatistics(
            calls=counts.calls,
            attempts=counts.calls + counts.repeats,
            recovered=counts.recovered,
            given_up=counts.given_up,
        )

    def _start(self, fn: object, name: str | None) -> _Call:
        mode = overrides() if open_overrides else None
        return _Call(
            self,
            label(fn) if name is None else name,
            self._classifier,
            self._listeners,
            self._current_counts(mode),
            self._rule(mode),
            self._current_budget(mode),
        )

    def _rule(self, mode: Overrides | None) -> RetryRule:
        most = math.inf if self.max_attempts is None else self.max_attempts
        rule = RetryRule(most, self.backoff, self.max_retry_after, self.rng)
        if mode is not None:
            rule.max_attempts = min(most, mode.max_attempts)
            rule.has_delays = mode.delays
            rule.rng = self.rng if mode.jitter else LongestDelays(0)
        return rule

    def _current_counts(self, mode: Overrides | None) -> _Counts:
        return self._counts if mode is None else mode.state_of(self, self._counts, _Counts)

    def _current_budget(self, mode: Overrides | None) -> RetryBudget | None:
        own = self.budget
        return own if own is None or mode is None else mode.state_of(own, own, own.anew)


@final
@attrs.define(eq=False, repr=False)
class _Call:
    """What one call under a policy has come to so far, and what happens next."""

    retry: Retry
    operation: str
    classifier: Classifier
    listeners: tuple[Subscription, ...]
    counts: _Counts
    rule: RetryRule
    budget: RetryBudget | None
    result: Any = attrs.field(default=_NOTHING, init=False)
    is_over: bool = attrs.field(default=False, init=False)
    delay: float = attrs.field(default=0.0, init=False)
    """Seconds until the next attempt, unless it is over."""
    _error: Exception | None = attrs.field(default=None, init=False)
    """What the attempt before raised, without its traceback."""
    _traceback: TracebackType | None = attrs.field(default=None, init=False)
    """The frames of the operation in it; those above them are still running, and hold us."""
    _ran: tuple[Exception, TracebackType | None] | None = attrs.field(default=None, init=False)
    """The same of the last attempt that ran: of a refusal, nothing was run."""
    _handled: Container[int] = attrs.field(default=(), init=False)
    """What the caller was handling when the attempt began."""
    began: float = attrs.field(default=0.0, init=False)
    """When the attempt began."""
    _limit: Limit = attrs.field(init=False)
    _deadline: float = attrs.field(default=math.inf, init=False)
    _has_token: bool = attrs.field(default=False, init=False)
    """Whether it has taken one, of the budget, for an attempt that has not begun."""

    @enable_ki_protection
    def __enter__(self) -> None:
        """Begin an attempt, which is the block."""
        self._begin()
        self._handled = being_handled()
        deadline = min(self.began + self.retry.attempt_timeout, self._deadline)
        self._limit = Limit(deadline, self._expire)
        self._limit.__enter__()

    @enable_ki_protection
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        """End the attempt; swallow its failure if there is to be another."""
        try:
            try:
                self._limit.__exit__(exc_type, exc, traceback)
            except Exception as error:  # it expired; or a group held more than the cancellation
                if self._swallow(error):
                    return True
                raise
            if exc is None:
                self._returned()
                return False
            return self._swallow(exc)
        except BaseException:
            self._end()
            raise
        finally:
            del exc, self._limit  # which leads back here

    def _swallow(self, error: BaseException) -> bool:
        if self.ended_in(error):
            drop_tracebacks(error, self._handled)
            return True
        return False

    def ended_in(self, error: BaseException) -> bool:
        """Take what an attempt has raised; say whether there is to be another."""
        if isinstance(error, Exception):
            return self._failed(error)
        self._finished(None, cancelled=True)
        self._end()
        return False

    async def wait(self) -> None:
        """Wait until it is time for the next attempt."""
        try:
            await trio.sleep(self.delay)
        except BaseException:
            self._end()
            raise

    def forget_tracebacks(self) -> None:
        """Drop those of the attempt before, once its error is no longer being handled."""
        assert self._error is not None
        drop_tracebacks(self._error, being_handled())

    def _end(self) -> None:
        self.is_over, self._error, self._traceback, self._ran = True, None, None, None
        self.return_token()

    def return_token(self) -> None:
        """Give the token back that was taken for an attempt, if that has not begun."""
        if self._has_token and self.budget is not None:
            self._has_token = False
            self.budget.give_back()

    def __del__(self) -> None:
        # Ctrl-C between two attempts, outside of the wait, gives no other sign.
        self.return_token()

    def _begin(self) -> None:
        self.began, self._has_token = trio.current_time(), False
        if self.rule.attempts == 0:
            self.counts.calls += 1
            self._deadline = self.began + self.retry.total_timeout
        else:
            self.counts.repeats += 1
        self.rule.attempts += 1
        self.result = _NOTHING
        self._report(AttemptStarted, attempt=self.rule.attempts)

    def _expire(self) -> OperationTimeoutError:
        is_total = trio.current_time() >= self._deadline
        timeout = self.retry.total_timeout if is_total else self.retry.attempt_timeout
        self._report(TimedOut, timeout=timeout)
        error = OperationTimeoutError(timeout, self.operation)
        if is_total:
            self.is_over = True
            if self._error is not None:
                error.__cause__ = self._error.with_traceback(self._traceback)
        return error

    @enable_ki_protection
    def _failed(self, error: Exception) -> bool:
        if isinstance(error, NotAnOperationError):
            self._end()
            self.counts.calls -= 1
            self.counts.repeats -= self.rule.attempts - 1
            return False
        self._finished(error)
        if self.is_over:
            reason = f"gave up after {self.rule.times()}: `total_timeout` is over"
        else:
            verdict = self.classifier.judge(error)
            reason = (
                f"not retried: `on` does not match {type(error).__name__}"
                if verdict is False
                else self._schedule(verdict, retry_after_of(error, time.time))
            )
        if reason:
            self._explain(error)
            self._give_up(reason, error)
            add_note_once(error, f"{self.retry.name}: ", reason)
            return False
        self._announce(error)
        self._error = error
        if self.operation is not _BLOCK:
            self._traceback = below_our_frames(error.__traceback__)
        if not isinstance(error, RejectedError):
            self._ran = error, self._traceback
        return True

    def _explain(self, error: Exception) -> None:
        """Let a refusal tell what has failed when there was none."""
        if self._ran is not None and isinstance(error, RejectedError) and error.__cause__ is None:
            failure, traceback = self._ran
            error.__cause__ = failure.with_traceback(traceback)

    def _returned(self) -> None:
        self._finished(None)
        is_refused = self.retry.retry_result
        if is_refused is None or self.result is _NOTHING or not is_refused(self.result):
            self._end()
            self.counts.recovered += self.rule.attempts > 1
            if self.budget is not None:
                self.budget.success()
            return
        reason = self._schedule(verdict=True, told=retry_after_of(self.result, time.time))
        if reason:
            self._give_up(reason, None)
            raise RetriesExhaustedError(self.result, self.rule.attempts)
        self._announce(None)

    def _schedule(self, verdict: Verdict, told: float | None) -> str:
        """Plan the next attempt; return why there is none, or an empty string."""
        deadline = min(trio.current_effective_deadline(), self._deadline)
        times = self.rule.times()
        planned = self.rule.next_delay(verdict, told, trio.current_time(), deadline)
        if isinstance(planned, str):
            return planned
        # One that is being cancelled makes no further attempt, and needs no token for it.
        if self.budget is not None and deadline > -math.inf:
            if not self.budget.try_take():
                return f"gave up after {times}: the retry budget is empty"
            self._has_token = True
        self.delay = planned
        return ""

    def tell_end(self, error: BaseException, began: float | None) -> None:
        """Report the end of the call, if its beginning was reported."""
        if began is not None and trio.lowlevel.in_trio_task():
            where = self.retry.name, self.operation
            call_failed(where, trio.current_time() - began, error)

    def _finished(self, error: Exception | None, *, cancelled: bool = False) -> None:
        # An attempt that is closed after its run has ended does so at no time.
        if open_subscriptions and trio.lowlevel.in_trio_task():
            self._report(
                AttemptFinished,
                attempt=self.rule.attempts,
                duration=trio.current_time() - self.began,
                error=error,
                cancelled=cancelled,
            )

    def _announce(self, error: Exception | None) -> None:
        if trio.current_effective_deadline() == -math.inf:
            return
        self._report(
            RetryScheduled,
            also_to=self.listeners,
            attempt=self.rule.attempts,
            delay=self.delay,
            error=error,
            result=None if error is not None else self.result,
        )

    def _give_up(self, reason: str, error: Exception | None) -> None:
        self._end()
        self.counts.given_up += 1
        result = None if error is not None else self.result
        self._report(
            RetryGaveUp, attempts=self.rule.attempts, reason=reason, error=error, result=result
        )

    def _report(self, kind: type[Any], **fields: Any) -> None:
        report(kind, policy=self.retry.name, operation=self.operation, **fields)


async def _go_on(call: _Call, fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
    await call.wait()
    await _repeat(call, fn, args)


async def _repeat(call: _Call, fn: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> None:
    while True:
        with call:
            call.result = await awaitable(fn, *args)
        if call.is_over:
            return
        await call.wait()


@final
class Attempt:
    """One attempt at a block of code: ``with attempt:`` swallows what is to be tried again."""

    number: int
    """Which attempt it is, counted from 1."""
    has_ended: bool

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._was_entered = False
        self.has_ended = False
        self.number = call.rule.attempts + 1

    def set_result(self, value: object) -> None:
        """Give the block's result to `retry_result`, which may ask for another attempt."""
        self._call.result = value

    def __enter__(self) -> Attempt:
        if self._was_entered:
            raise RuntimeError("an attempt can be entered only once")
        self._was_entered = True
        self._call.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self.has_ended = True
        try:
            return self._call.__exit__(exc_type, exc, traceback)
        finally:
            del exc


@final
class _Attempts:
    """The attempts of one loop; an iterator object, for an async generator may be left open."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._current: Attempt | None = None

    def __del__(self) -> None:
        # A loop that is left between two attempts gives no other sign.
        self._call.return_token()

    def __aiter__(self) -> _Attempts:
        return self

    async def __anext__(self) -> Attempt:
        if self._current is None:
            await trio.lowlevel.checkpoint()
        elif not self._current.has_ended:
            raise RuntimeError("an attempt was not used: the loop's body goes in `with attempt:`")
        elif self._call.is_over:
            raise StopAsyncIteration
        else:
            await self._call.wait()
        self._current = Attempt(self._call)
        return self._current


async def run_with_retry(
    nursery: trio.Nursery | None,
    fn: Callable[[*Ts], Awaitable[T]],
    *args: *Ts,
    max_attempts: int | None = 3,
    base_delay: float | timedelta = 1.0,
    max_delay: float | timedelta = 30.0,
    backoff_multiplier: float = 2.0,
    jitter: bool = True,
    retryable_errors: ErrorMatch = transient,
) -> RetryResult[T]:
    """Run ``fn(*args)`` in *nursery*, with retries, and return its result and what that took.

    All attempts run in one child task of *nursery* (``None`` opens one for this call). What the
    last of them raised surfaces here, as the same object, and never crashes the nursery.

    Args:
        max_attempts: how many calls to make at the most, the first included; ``None``: no limit.
        base_delay: seconds before the second attempt; each further wait is *backoff_multiplier*
            times as long, up to *max_delay* seconds.
        jitter: draw each wait between zero and that, so that clients do not come back together.
        retryable_errors: as `Retry`'s ``on``.

    Raises:
        OperationsCancelledError: the nursery was cancelled, but not the caller.

    Example::

        async with trio.open_nursery() as nursery:
            outcome = await run_with_retry(nursery, fetch, url, max_attempts=5)
            print(outcome.result, outcome.attempts)
    """
    check_nursery(nursery)
    operation("fn", fn)
    Classifier.of("retryable_errors", retryable_errors)
    multiplier = number("backoff_multiplier", backoff_multiplier, minimum=1, finite=True)
    backoff = Exponential(base_delay, multiplier=multiplier, max_delay=max_delay, jitter=jitter)
    retry = Retry(
        max_attempts=max_attempts, on=retryable_errors, backoff=backoff, name="run_with_retry"
    )
    await trio.lowlevel.checkpoint_if_cancelled()
    call: Any = partial(retry.call_counted, fn)
    job: Job[RetryResult[T]] = await join(nursery, call, *args, name=label(fn))
    return job.result()
