"""Bound how often something is done, in every interval, however the calls come."""

from __future__ import annotations

import math
from collections import OrderedDict
from inspect import CO_COROUTINE
from itertools import count
from types import FunctionType
from typing import TYPE_CHECKING, Never, TypeVar, TypeVarTuple, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._algorithms._gcra import Gcra, interval_of, resolution
from trio_resilience._checks import integer, label, number, operation, seconds
from trio_resilience._engine._driver import awaitable
from trio_resilience._engine._policy import LivePolicy, open_overrides, overrides, runs_here
from trio_resilience._engine._report import open_subscriptions, report
from trio_resilience._engine._run import RunState
from trio_resilience._engine._waiting import Waiting
from trio_resilience._engine._watched import Watched, watched
from trio_resilience._errors import RateLimitExceededError
from trio_resilience._events import Rejected
from trio_resilience._records import Record, record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from datetime import timedelta
    from types import TracebackType

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
@record
class RateLimiterStatistics(Record):
    """How a `RateLimiter` stands, and how often it has refused."""

    available: int
    """How many could pass at this instant, if nobody waited; outside a run, the whole burst."""
    waiting: int
    """Tasks in line; in the longest, if there are several."""
    rejections: int


@final
@attrs.define(eq=False, repr=False)
class _Counts:
    rejections: int = 0


@final
@attrs.define(eq=False, repr=False)
class _Bucket:
    """One limit in one run: what has passed, and who waits."""

    rule: Gcra
    now: Callable[[], float] = attrs.field(
        factory=lambda: trio.lowlevel.current_clock().current_time, init=False
    )
    """What `trio.current_time` asks, in the end."""
    line: OrderedDict[_Waiter, None] = attrs.field(factory=OrderedDict["_Waiter", None], init=False)
    ahead: int = attrs.field(default=0, init=False)
    """What all those in line want together."""
    joint: int = attrs.field(default=0, init=False)
    """How many of them are in other lines too."""

    def append(self, waiter: _Waiter) -> None:
        self.line[waiter] = None
        self.ahead += waiter.cost
        self.joint += len(waiter.buckets) > 1

    def remove(self, waiter: _Waiter) -> None:
        del self.line[waiter]
        self.ahead -= waiter.cost
        self.joint -= len(waiter.buckets) > 1
        self.alert_head()

    def alert_head(self) -> None:
        """Let who is first in line know when it is due."""
        if self.line:
            next(iter(self.line)).set_alarm()

    def is_headed_by(self, waiter: _Waiter) -> bool:
        return next(iter(self.line)) is waiter


@final
@attrs.define(eq=False, repr=False)
class _Waiter:
    """A task that waits, in the lines of all the limits that it is under.

    It joins all of them in the same instant, so in all of them those before it are the same ones,
    and whoever has waited longest of all is the first in each of its lines.
    """

    cost: int
    buckets: tuple[_Bucket, ...]
    latest: float
    """When it gives up, in seconds of trio's clock."""
    number: int = attrs.field(factory=count().__next__, init=False)
    """Who comes later has a higher one."""
    _scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)

    async def wait(self) -> bool:
        """Wait until it has taken what it wants; tell whether that was in time."""
        for bucket in self.buckets:
            bucket.append(self)
        try:
            self._scope.deadline = self._alarm()
            with self._scope:
                await trio.sleep_forever()
            # What is due stays due, also if the rate is lowered before this runs.
            return self._try_take()
        finally:
            for bucket in self.buckets:
                bucket.remove(self)

    def set_alarm(self) -> None:
        self._scope.deadline = self._alarm()

    def _try_take(self) -> bool:
        now = trio.current_time()
        if not self._is_first():
            return False
        if not all(bucket.rule.may_pass(now, self.cost) for bucket in self.buckets):
            return False
        for bucket in self.buckets:
            bucket.rule.take(now, self.cost)
        return True

    def _is_first(self) -> bool:
        return all(bucket.is_headed_by(self) for bucket in self.buckets)

    def _alarm(self) -> float:
        """Return when there is something to be done: to pass, or to give up."""
        if not self._is_first():
            return self.latest
        # While it is the first in all of its lines, nobody takes anything from it.
        return min(self.latest, max(bucket.rule.due(self.cost) for bucket in self.buckets))


def _predict(newcomer: _Waiter, now: float) -> float:
    """Return for how many seconds *newcomer* would wait, after all who are in line before it."""
    if not any(bucket.joint for bucket in newcomer.buckets):
        return max(
            bucket.rule.wait(now, newcomer.cost, bucket.ahead) for bucket in newcomer.buckets
        )
    # Who is in several lines may be held up in one and hold up the others. So all of them have
    # their turn on paper, in the order in which they came.
    rules: dict[_Bucket, Gcra] = {}
    latest: dict[_Bucket, float] = {}
    passes = now
    for waiter in [*_connected(newcomer.buckets), newcomer]:
        for bucket in waiter.buckets:
            rules.setdefault(bucket, attrs.evolve(bucket.rule))
        turn = max(latest.get(bucket, now) for bucket in waiter.buckets)
        passes = turn + max(rules[bucket].wait(turn, waiter.cost) for bucket in waiter.buckets)
        for bucket in waiter.buckets:
            rules[bucket].take(passes, waiter.cost)
            latest[bucket] = passes
    return passes - now


def _connected(buckets: Iterable[_Bucket]) -> list[_Waiter]:
    """Return who waits in these lines, or in one that holds any of them up, in their order."""
    todo, known = list(buckets), set[_Bucket]()
    waiters = set[_Waiter]()
    while todo:
        bucket = todo.pop()
        if bucket not in known:
            known.add(bucket)
            waiters.update(bucket.line)
            todo.extend(other for waiter in bucket.line for other in waiter.buckets)
    return sorted(waiters, key=lambda waiter: waiter.number)


def _rate(value: float) -> float:
    return number("rate", value, finite=True, exclusive=True)


def _per(value: float | timedelta) -> float:
    return seconds("per", value, finite=True, exclusive=True)


def _burst(value: int) -> int:
    return integer("burst", value, minimum=1)


def _max_wait(value: float | timedelta) -> float:
    return seconds("max_wait", value)


@final
@attrs.define(eq=False, repr=False)
class _Pace:
    """So many in so much time; apart, so that nothing refers in circles."""

    rate: float
    per: float
    burst: int

    def interval(self) -> int:
        return interval_of(self.rate, self.per)

    def start(self) -> _Bucket:
        return _Bucket(Gcra.start(trio.current_time(), self.interval(), self.burst))


@final
@attrs.define(eq=False, repr=False)
class _Limit:
    """One limit: its pace, and what has passed in each run."""

    pace: _Pace
    first_rate: float
    runs: RunState[_Bucket]

    @classmethod
    def of(cls, pace: _Pace) -> _Limit:
        return cls(pace, pace.rate, RunState(pace.start))

    def bucket(self) -> _Bucket:
        """Return what has passed here, in this run."""
        return runs_here(self.runs).get() if open_overrides else self.runs.get()

    @enable_ki_protection
    def change_rate(self, rate: float) -> None:
        known = {self.runs, runs_here(self.runs)}
        buckets = [runs.get() for runs in known if runs.peek() is not None]
        self.pace.rate = rate
        for bucket in buckets:
            bucket.rule.change_interval(bucket.now(), self.pace.interval())
            bucket.alert_head()

    def statistics(self) -> tuple[int, int]:
        """Return how many could pass, and how many wait."""
        bucket = runs_here(self.runs).peek()
        if bucket is None:
            return self.pace.burst, 0
        return bucket.rule.available(bucket.now()), len(bucket.line)

    def is_idle(self) -> bool:
        return self.statistics() == (self.pace.burst, 0) and self.pace.rate == self.first_rate

    def __repr__(self) -> str:
        return f"{self.pace.rate:g}, per={self.pace.per:g}, burst={self.pace.burst}"


class _Limiter(LivePolicy[Never]):
    """What one limit and several at once have in common."""

    __slots__ = ()

    name: str
    max_wait: float
    _limits: tuple[_Limit, ...]
    _counts: _Counts

    @property
    def burst(self) -> int:
        """How many may pass at once after a long enough pause."""
        return min(limit.pace.burst for limit in self._limits)

    @property
    def retry_after(self) -> float:
        """Seconds until one more would pass, after all who wait already; 0.0: now, or no run."""
        return self._predict(1) if trio.lowlevel.in_trio_run() else 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits, the whole burst is there, and the rate is as at first."""
        return all(limit.is_idle() for limit in self._limits)

    @property
    def is_disposable(self) -> bool:
        """Whether nobody waits."""
        return not self.statistics().waiting

    @enable_ki_protection
    def acquire_nowait(self, cost: int = 1) -> None:
        """Let *cost* pass, or raise `trio.WouldBlock`.

        Raises:
            ValueError: the burst never allows so much at once.
        """
        self._check(cost)
        if not self._try_take(cost):
            raise trio.WouldBlock

    @enable_ki_protection
    async def acquire(self, cost: int = 1) -> None:
        """Let *cost* pass, all at once, when it is this request's turn and the rate allows it.

        Raises:
            RateLimitExceededError: that would take longer than *max_wait*.
            ValueError: the burst never allows so much at once.
        """
        self._check(cost)
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._try_take(cost):
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self._wait(cost, "acquire")

    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        """Return the result of ``fn(*args)``, called when the rate allows it."""
        if open_subscriptions and type(name) is not Watched:
            return await watched(self, self.call, fn, args, name)
        # What is written `async def` needs no check.
        is_coroutine_function = type(fn) is FunctionType and fn.__code__.co_flags & CO_COROUTINE
        if not is_coroutine_function:
            operation("fn", fn)
        if not self._try_take(1):
            await self._wait(1, label(fn) if name is None else name)
        result: T = await (fn(*args) if is_coroutine_function else awaitable(fn, *args))
        return result

    def statistics(self) -> RateLimiterStatistics:
        """Return how many could pass now, how many wait, and how many were refused."""
        available, waiting = zip(*(limit.statistics() for limit in self._limits), strict=True)
        return RateLimiterStatistics(
            min(available), max(waiting), self._current_counts().rejections
        )

    def _check(self, cost: int) -> None:
        integer("cost", cost, minimum=1)
        if cost > self.burst:
            raise ValueError(f"`cost` must be <= {self.burst}, the burst, got {cost}")

    @enable_ki_protection
    def _try_take(self, cost: int) -> bool:
        if open_overrides and not _has_delays():
            return True
        now = trio.current_time()
        buckets = [limit.bucket() for limit in self._limits]
        for bucket in buckets:
            if bucket.line or not bucket.rule.may_pass(now, cost):
                return False
        for bucket in buckets:
            bucket.rule.take(now, cost)
        return True

    @enable_ki_protection
    async def _wait(self, cost: int, operation: str) -> None:
        now = trio.current_time()
        most = self.max_wait + resolution(now)
        if most < math.inf and (predicted := self._predict(cost)) > most:
            await trio.lowlevel.checkpoint()
            raise self._refusal(operation, predicted)
        waiter = _Waiter(cost, tuple(limit.bucket() for limit in self._limits), now + most)
        with Waiting(self.name, operation):
            is_in_time = await waiter.wait()
        if not is_in_time:
            raise self._refusal(operation, self._predict(cost))

    def _predict(self, cost: int) -> float:
        buckets = tuple(limit.bucket() for limit in self._limits)
        return _predict(_Waiter(cost, buckets, math.inf), trio.current_time())

    def _refusal(self, operation: str, retry_after: float) -> RateLimitExceededError:
        self._current_counts().rejections += 1
        report(Rejected, policy=self.name, operation=operation, retry_after=retry_after)
        return RateLimitExceededError(retry_after)

    def _current_counts(self) -> _Counts:
        mode = overrides() if open_overrides else None
        return self._counts if mode is None else mode.state_of(self, self._counts, _Counts)

    @enable_ki_protection
    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Do nothing: what has passed, has passed."""


def _limits_of(limiter: object) -> tuple[_Limit, ...]:
    if not isinstance(limiter, _Limiter):
        raise TypeError(f"`limiters` must be rate limiters, got {limiter!r}")
    limits: tuple[_Limit, ...] = limiter._limits  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return limits


def _has_delays() -> bool:
    mode = overrides()
    return mode is None or mode.delays


@final
@attrs.define(eq=False, repr=False, init=False)
class RateLimiter(_Limiter):
    """Let at most ``burst + rate * T / per`` pass in any interval of T seconds of a run.

    By itself it spaces calls evenly; with a *burst*, so many may go at once after a pause: "ten a
    second, and ten at once" is ``RateLimiter(10, burst=10)``. Who has to wait is served first come,
    first served, and nobody overtakes; who is cancelled in line has used up nothing, and the line
    moves up. Nothing drifts, however long it runs.

    Args:
        rate: how many in *per* seconds, a number; settable while the program runs.
        per: seconds, a number or a `datetime.timedelta`.
        burst: how many may pass at once.
        max_wait: refuse at once who would have to wait longer than these seconds.
        name: label of the policy in events.

    Raises:
        RateLimitExceededError: the wait would be longer than *max_wait*, or has become so because
            the rate was lowered; nothing was used up, and ``.retry_after`` tells when to come back.
        ValueError: the cost is higher than the burst.

    The algorithm is GCRA, the generic cell rate algorithm (ITU-T I.371).

    Example::

        limiter = RateLimiter(10, burst=10)

        page = await limiter.call(fetch, url)


        @limiter
        async def load(url: str) -> bytes: ...


        async with limiter:
            ...

        await limiter.acquire(3)  # counts as three
    """

    name: str
    max_wait: float
    _limits: tuple[_Limit, ...]
    _runs: RunState[_Bucket]
    _counts: _Counts

    def __init__(
        self,
        rate: float,
        *,
        per: float | timedelta = 1.0,
        burst: int = 1,
        max_wait: float | timedelta = math.inf,
        name: str = "rate_limiter",
    ) -> None:
        limit = _Limit.of(_Pace(_rate(rate), _per(per), _burst(burst)))
        self._limits = (limit,)
        self._runs = limit.runs
        self.max_wait = _max_wait(max_wait)
        self.name = name
        self._counts = _Counts()

    @enable_ki_protection
    def _try_take(self, cost: int) -> bool:
        # The same for one limit, without the detours.
        if open_overrides:
            return super()._try_take(cost)
        bucket = self._runs.get()
        return not bucket.line and bucket.rule.try_take(bucket.now(), cost)

    @property
    def rate(self) -> float:
        """How many may pass in `per` seconds; settable: those who wait are due accordingly."""
        return self._limits[0].pace.rate

    @rate.setter
    def rate(self, value: float) -> None:
        self._limits[0].change_rate(_rate(value))

    @property
    def per(self) -> float:
        """Seconds in which so many may pass."""
        return self._limits[0].pace.per

    @staticmethod
    def all_of(
        *limiters: RateLimiter | CombinedRateLimiter,
        max_wait: float | timedelta = math.inf,
        name: str = "rate_limiter",
    ) -> CombinedRateLimiter:
        """Return a limiter that takes from all of *limiters*, or from none of them.

        What passes counts in each of them, and they may be used by themselves too: who waits for
        several of them is in the line of each, and nobody overtakes in any. To change a rate, set
        it on the limiter itself.

        Args:
            limiters: what has to allow a call; their own *max_wait* does not count here.
            max_wait: refuse at once who would have to wait longer than these seconds.
            name: label of the policy in events.

        Raises:
            TypeError: something else than a rate limiter is given.
            ValueError: none is given.

        Example::

            limiter = RateLimiter.all_of(RateLimiter(10), RateLimiter(300, per=60, burst=30))
        """
        if not limiters:
            raise ValueError("`all_of` needs at least one limiter")
        limits = [limit for limiter in limiters for limit in _limits_of(limiter)]
        return CombinedRateLimiter(tuple(dict.fromkeys(limits)), max_wait=max_wait, name=name)

    def __repr__(self) -> str:
        return f"RateLimiter({self._limits[0]!r}, name={self.name!r})"


@final
@attrs.define(eq=False, repr=False, init=False)
class CombinedRateLimiter(_Limiter):
    """Several rate limits at once; made by `RateLimiter.all_of`."""

    name: str
    max_wait: float
    _limits: tuple[_Limit, ...]
    _counts: _Counts

    def __init__(
        self,
        limits: tuple[_Limit, ...],
        *,
        max_wait: float | timedelta,
        name: str,
    ) -> None:
        self._limits = limits
        self.max_wait = _max_wait(max_wait)
        self.name = name
        self._counts = _Counts()

    def __repr__(self) -> str:
        parts = "; ".join(map(repr, self._limits))
        return f"RateLimiter.all_of({parts}, name={self.name!r})"
