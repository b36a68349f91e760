"""Check services again and again, and keep the last report at hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, final

import attrs
import trio
from trio.lowlevel import TrioToken, enable_ki_protection

from trio_resilience._algorithms._gcra import resolution
from trio_resilience._checks import seconds, sync_callback
from trio_resilience._engine._policy import runs_here
from trio_resilience._engine._report import Subscription
from trio_resilience._engine._report import report as tell
from trio_resilience._engine._run import RunState
from trio_resilience._errors import OperationsCancelledError
from trio_resilience._events import HealthChanged
from trio_resilience._health import (
    UNHEALTHY,
    HealthCheck,
    HealthReport,
    check_health,
    checked_services,
)


def _interval(value: float | timedelta) -> float:
    return seconds("interval", value, exclusive=True)


def _max_age(value: float | timedelta | None) -> float | None:
    return None if value is None else seconds("max_age", value, exclusive=True)


def _on_change(_instance: object, _attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None:
        sync_callback("on_change", value)


def _build_listener(monitor: HealthMonitor) -> Subscription | None:
    callback: Any = monitor.on_change
    return None if callback is None else Subscription(callback)


def _longest_age(monitor: HealthMonitor) -> float:
    if monitor.max_age is not None:
        return monitor.max_age
    # A round begins so long after the one before, and takes so long: one may be missed.
    longest = max((check.timeout for check in monitor.checks.values()), default=0.0)
    return 2 * monitor.interval + longest


@final
@attrs.frozen(eq=False, repr=False)
class HealthMonitor:
    """Check services again and again, and keep the last report at hand.

    Every round is a `check_health`, and there is never more than one at a time. It may live at
    module level: a report belongs to its run of trio.

    Args:
        checks: as for `check_health`.
        interval: seconds, or a `datetime.timedelta`, from the start of a round to the start of the
            next; one that takes longer is followed at once. Infinity checks only when asked.
        max_age: a report that is older, in seconds, is stale, and therefore unhealthy: the monitor
            has ended, or is stuck. ``None``: twice *interval*, and the longest of the timeouts.
        on_change: called with the first report, and then with every report in which the status of
            a service, or of all together, is new. If it raises, that is logged, once.
        name: label in events and of tasks.

    Example::

        monitor = HealthMonitor({"database": HealthCheck(ping)}, interval=10)

        async with trio.open_nursery() as nursery:
            await nursery.start(monitor.run)
            ...
            print(monitor.report.status)
    """

    checks: Mapping[str, HealthCheck] = attrs.field(converter=checked_services)
    interval: float = attrs.field(default=30.0, kw_only=True, converter=_interval)
    max_age: float | None = attrs.field(default=None, kw_only=True, converter=_max_age)
    on_change: Callable[[HealthReport], object] | None = attrs.field(
        default=None, kw_only=True, validator=_on_change
    )
    name: str = attrs.field(default="health", kw_only=True)

    _listener: Subscription | None = attrs.field(
        default=attrs.Factory(_build_listener, takes_self=True), init=False
    )
    _longest_age: float = attrs.field(
        default=attrs.Factory(_longest_age, takes_self=True), init=False
    )
    _runs: RunState[_Watch] = attrs.field(factory=lambda: RunState(_Watch), init=False)

    @property
    def report(self) -> HealthReport | None:
        """The last report; ``None`` before the first.

        If it is older than *max_age*, or its run of trio has ended, it says that it is stale, and
        that all is unhealthy: there is nobody to say otherwise.
        """
        runs = runs_here(self._runs)
        watch = runs.here() if trio.lowlevel.in_trio_run() or runs.token is None else runs.state
        if watch is None or watch.report is None:
            return None
        is_live = runs.peek() is watch  # or there is no clock to ask
        if is_live and watch.now() - watch.report.time <= self._longest_age:
            return watch.report
        old = watch.report
        return HealthReport(UNHEALTHY, old.services, old.time, is_stale=True)

    async def check(self) -> HealthReport:
        """Check now, and return the report; whoever asks meanwhile shares the round, and it.

        So a round that is under way is waited for. It is the monitor that makes it: who waits may
        be cancelled, and the others still get the report.

        Raises:
            RuntimeError: the monitor is not running.
            OperationsCancelledError: it has ended before the round has.
        """
        watch = runs_here(self._runs).get()
        if not watch.is_running:
            raise RuntimeError(
                f"{self.name} is not running: start it with `await nursery.start(monitor.run)`"
            )
        await trio.lowlevel.checkpoint_if_cancelled()
        turn = watch.turn
        turn.wanted.set()
        await turn.ended.wait()
        if turn.report is None:
            await trio.lowlevel.checkpoint_if_cancelled()
            raise OperationsCancelledError
        return turn.report

    @enable_ki_protection
    async def run(  # noqa: ASYNC114 - what is started so is never called in a block
        self, *, task_status: trio.TaskStatus[HealthReport] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Check at once, and then again and again, until this is cancelled.

        ``await nursery.start(monitor.run)`` returns the first report.

        Raises:
            BaseExceptionGroup: a probe raised something that is not an `Exception`.
            RuntimeError: it is running already.
        """
        watch = runs_here(self._runs).get()
        if watch.is_running:
            raise RuntimeError(f"{self.name} is running already")
        watch.is_running = True
        try:
            task_status.started(await self._check(watch))
            while True:
                await watch.wait_for_turn(self.interval)
                await self._check(watch)
        finally:
            watch.leave()

    async def _check(self, watch: _Watch) -> HealthReport:
        watch.began = trio.current_time()
        report = await check_health(self.checks, name=self.name)
        previous = watch.report
        watch.finish(report)
        self._tell(previous, report)
        return report

    def _tell(self, previous: HealthReport | None, report: HealthReport) -> None:
        services = _changes(previous, report)
        if previous is not None and not services:
            return
        tell(
            HealthChanged,
            policy=self.name,
            operation="run",
            previous=None if previous is None else previous.status,
            status=report.status,
            services=services,
        )
        if self._listener is not None:
            listener: Any = self._listener
            listener.tell(report)

    def __repr__(self) -> str:
        report = self.report
        status = "no report" if report is None else "stale" if report.is_stale else report.status
        return f"HealthMonitor(name={self.name!r}: {status}, {len(self.checks)} services)"


def _changes(previous: HealthReport | None, report: HealthReport) -> tuple[str, ...]:
    if previous is None:
        return tuple(report.services)
    before = previous.services
    return tuple(
        name for name, found in report.services.items() if found.status is not before[name].status
    )


@final
@attrs.define(eq=False, repr=False)
class _Turn:
    """A round to come, or under way, and who waits for its report."""

    wanted: trio.Event = attrs.field(factory=trio.Event, init=False)
    ended: trio.Event = attrs.field(factory=trio.Event, init=False)
    report: HealthReport | None = attrs.field(default=None, init=False)


@final
@attrs.define(eq=False, repr=False)
class _Watch:
    """A monitor in one run of trio."""

    now: Callable[[], float] = attrs.field(
        factory=lambda: trio.lowlevel.current_clock().current_time, init=False
    )
    report: HealthReport | None = attrs.field(default=None, init=False)
    is_running: bool = attrs.field(default=False, init=False)
    began: float = attrs.field(default=-math.inf, init=False)
    """When the last round did."""
    turn: _Turn = attrs.field(factory=_Turn, init=False)
    _token: TrioToken = attrs.field(factory=trio.lowlevel.current_trio_token, init=False)

    async def wait_for_turn(self, interval: float) -> None:
        """Wait until the next round is due, or somebody wants it now."""
        # The clock moves in any case, or a round that takes no time would be made for ever.
        due = self.began + max(interval, resolution(self.began))
        with trio.CancelScope(deadline=due):
            await self.turn.wanted.wait()

    def finish(self, report: HealthReport | None) -> None:
        """Hand the report, if there is one, to all who wait for it."""
        turn, self.turn = self.turn, _Turn()
        if report is not None:
            self.report = turn.report = report
        turn.ended.set()

    def leave(self) -> None:
        """Let nobody wait for a round that is not made any more."""
        is_in_a_run = trio.lowlevel.in_trio_run()
        # Of a run that has died, nobody is left to be woken.
        if is_in_a_run and trio.lowlevel.current_trio_token() is self._token:
            self.is_running = False
            self.finish(None)
