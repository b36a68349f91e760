"""Cut the tail of latencies: when a call is slow, make it once more, and take what comes first."""

from __future__ import annotations

import reprlib
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Never, TypeVar, TypeVarTuple, final

import attrs
from trio.lowlevel import disable_ki_protection, enable_ki_protection

from trio_resilience._algorithms._budget import RetryBudget, optional_budget
from trio_resilience._algorithms._quantile import LatencyEstimator, Quantile
from trio_resilience._checks import (
    NotAnOperationError,
    integer,
    label,
    operation,
    seconds,
    shown,
    sync_callback,
)
from trio_resilience._classify import Classifier, ErrorMatch, transient
from trio_resilience._engine._policy import Policy, open_overrides, overrides
from trio_resilience._engine._race import Leg, Race
from trio_resilience._engine._report import Subscription, open_subscriptions, report
from trio_resilience._engine._traceback import add_note_once
from trio_resilience._engine._watched import Watched, watched
from trio_resilience._events import HedgeStarted, LoserFailed
from trio_resilience._records import Record, record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

# A note is to tell errors apart, and not to carry all that they say.
_short = reprlib.Repr()
_short.maxother = 200


@final
@record
class HedgeStatistics(Record):
    """What a `Hedge` has done so far; cancelled calls count only as calls."""

    calls: int
    hedges: int
    """How many times an operation was called beyond the first of its call."""
    wins_by_hedge: int
    """Calls whose result is a hedge's."""
    failed: int
    """Calls of which all legs failed."""
    refused: int
    """Hedges that were not started, because the budget was empty."""
    after: float
    """Seconds after which a call would be hedged now; infinite if there is no telling yet."""


@final
@attrs.define(eq=False, repr=False)
class _State:
    """Counts, and what was learnt about latencies; times on no clock, so they outlive a run."""

    latency: LatencyEstimator | None
    calls: int = 0
    hedges: int = 0
    wins_by_hedge: int = 0
    failed: int = 0
    refused: int = 0


def _after(value: float | timedelta | Quantile) -> float | Quantile:
    return value if isinstance(value, Quantile) else seconds("after", value)


def _max_hedges(value: int) -> int:
    return integer("max_hedges", value, minimum=1)


def _callback(_instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None:
        sync_callback(attribute.name, value)


def _build_classifier(hedge: Hedge) -> Classifier:
    return Classifier.of("on", hedge.on)


def _build_discard(hedge: Hedge) -> Subscription | None:
    callback: Any = hedge.on_discard
    return None if callback is None else Subscription(callback)


def _new_state(hedge: Hedge) -> _State:
    return _State(LatencyEstimator(hedge.after) if isinstance(hedge.after, Quantile) else None)


@final
@attrs.frozen(eq=False, kw_only=True)
class Hedge(Policy[Never]):
    """Make a call again when it is slow, side by side with the first, and take the first success.

    The other legs are cancelled, and have ended when the call returns: one that takes its time to
    clean up is waited for. A leg that fails starts the next at once. If all fail, the error of the
    first comes out, as the object it is, with the others in a note. Only for what does no harm if
    it is done twice.

    Each leg runs in a task of its own, and in its own copy of the caller's context. A cancellation
    of the caller cancels and joins all of them. What a leg raises that is no `Exception` ends the
    call, and comes out.

    Args:
        after: seconds from the start of a leg until the next one, a number or a
            `datetime.timedelta`; or a `Quantile`, of the latencies that the calls turn out to have.
        max_hedges: how many legs there may be beyond the first.
        budget: a `RetryBudget`, from which each hedge takes a token, and which each success feeds;
            while it is empty, no hedge is started.
        on: after which errors another leg makes sense: a type, a function of the error that
            returns a bool, or a tuple of such. After any other none is started; those that run
            go on.
        on_discard: called with each result that nobody gets, for instance to close it: that of a
            leg which succeeds when another has already, or when the call ends by Ctrl-C. If it
            raises, that is logged, once.
        name: label of the policy in events and notes.

    Hedges multiply with retries: three attempts of two legs each are six calls.

    Example::

        hedge = Hedge(after=Quantile(0.95), budget=RetryBudget(0.1))

        page = await hedge.call(fetch, url)


        @hedge
        async def load(url: str) -> bytes: ...
    """

    after: float | Quantile = attrs.field(converter=_after)
    max_hedges: int = attrs.field(default=1, converter=_max_hedges)
    budget: RetryBudget | None = attrs.field(default=None, validator=optional_budget)
    on: ErrorMatch = attrs.field(default=transient, repr=shown)
    on_discard: Callable[[Any], object] | None = attrs.field(
        default=None, validator=_callback, repr=shown
    )
    name: str = "hedge"

    _classifier: Classifier = attrs.field(
        default=attrs.Factory(_build_classifier, takes_self=True), init=False, repr=False
    )
    _discard: Subscription | None = attrs.field(
        default=attrs.Factory(_build_discard, takes_self=True), init=False, repr=False
    )
    _state: _State = attrs.field(
        default=attrs.Factory(_new_state, takes_self=True), init=False, repr=False
    )

    @property
    def is_idle(self) -> bool:
        """Whether it has learnt nothing, and its budget, if it has one, is full."""
        latency = self._current_state().latency
        has_learnt = latency is not None and latency.samples > 0
        return not has_learnt and (self.budget is None or self.budget.is_full)

    @enable_ki_protection
    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        """Return the result of the first call of ``fn(*args)`` that succeeds."""
        if open_subscriptions and type(name) is not Watched:
            return await watched(self, self.call, fn, args, name)
        operation("fn", fn)
        call = self._start(label(fn) if name is None else name)
        race = call.race(fn, args)
        call.state.calls += 1
        try:
            await race.run()
            call.settle(race)
            return race.result()
        except NotAnOperationError:
            call.state.calls -= 1
            raise
        finally:
            race.forget()

    def statistics(self) -> HedgeStatistics:
        """Return how many calls and hedges there were, and what became of them."""
        state = self._current_state()
        return HedgeStatistics(
            calls=state.calls,
            hedges=state.hedges,
            wins_by_hedge=state.wins_by_hedge,
            failed=state.failed,
            refused=state.refused,
            after=self._interval(state),
        )

    def _start(self, name: str) -> _Call:
        mode = overrides() if open_overrides else None
        state, budget = self._current_state(), self.budget
        most = 1.0 + self.max_hedges
        if mode is not None:
            most = min(most, mode.max_attempts)
            budget = None if budget is None else mode.state_of(budget, budget, budget.anew)
        return _Call(
            self, name, self._classifier, self._discard, state, budget, self._interval(state), most
        )

    def _interval(self, state: _State) -> float:
        if state.latency is not None:
            return state.latency.seconds()
        assert not isinstance(self.after, Quantile)
        return self.after

    def _current_state(self) -> _State:
        mode = overrides() if open_overrides else None
        make = partial(_new_state, self)
        return self._state if mode is None else mode.state_of(self, self._state, make)


@final
@attrs.define(eq=False, repr=False)
class _Call:
    """What one call under a policy may do, and what becomes of it."""

    hedge: Hedge
    operation: str
    classifier: Classifier
    discard: Subscription | None
    state: _State
    budget: RetryBudget | None
    interval: float
    most_legs: float
    _is_refused: bool = attrs.field(default=False, init=False)

    def race(self, fn: Callable[..., Awaitable[T]], args: tuple[Any, ...]) -> Race[T]:
        """Return the legs of the call, of which none has begun."""
        limits = self.interval, self.most_legs
        return Race(fn, args, self.operation, *limits, self.may_start, self.started, self.ended)

    def may_start(self, error: Exception | None) -> bool:
        """Say whether there may be another leg, because of *error* or of slowness; pay for it."""
        if error is not None and _verdict(self.classifier, error) is False:
            return False
        self._is_refused = self.budget is not None and not self.budget.try_take()
        self.state.refused += self._is_refused
        return not self._is_refused

    def started(self, leg: Leg) -> None:
        """Tell of a hedge."""
        self._report(HedgeStarted, leg=leg.number)

    def ended(self, leg: Leg) -> None:
        """Account for a leg; one that has called nothing has cost nothing."""
        is_hedge = leg.number > 0
        if leg.has_begun:
            self.state.hedges += is_hedge
            if self.state.latency is not None:
                self.state.latency.observe(leg.seconds, is_complete=leg.has_succeeded)
        elif is_hedge and self.budget is not None:
            self.budget.give_back()

    def settle(self, race: Race[Any]) -> None:
        """Account for a race that is over, and hand out what its caller does not get."""
        if race.winner is not None and race.has_succeeded:
            self.state.wins_by_hedge += race.winner.number > 0
            if self.budget is not None:
                self.budget.success()
        elif race.has_failed:
            self.state.failed += 1
            self._add_note(race.failures)
        for result in race.unwanted:
            if self.discard is not None:
                self.discard.tell(result)
        for number, error in race.reportable().items():
            self._report(LoserFailed, leg=number, error=error)

    def _add_note(self, failures: dict[int, Exception]) -> None:
        first, *others = sorted(failures)
        told = [f"hedge {number} raised {_short.repr(failures[number])}" for number in others]
        parts = [f"all {len(failures)} legs failed", ", ".join(told)] if told else []
        if self._is_refused:
            parts.append("no further one was started: the retry budget is empty")
        if parts:
            add_note_once(failures[first], f"{self.hedge.name}: ", "; ".join(parts))

    def _report(self, kind: type[Any], **fields: Any) -> None:
        report(kind, policy=self.hedge.name, operation=self.operation, **fields)


@disable_ki_protection
def _verdict(classifier: Classifier, error: Exception) -> bool | float:
    return classifier.judge(error)
