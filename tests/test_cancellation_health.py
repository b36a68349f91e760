"""Health checks, cancelled at every instant: nothing runs on, and nobody is told what is not so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests._scenarios import World, cancel
from trio_resilience import (
    CircuitBreaker,
    Constant,
    Event,
    OperationsCancelledError,
    Retry,
    subscribe,
)
from trio_resilience._events import CircuitState, HealthChecked
from trio_resilience._health import HEALTHY, UNHEALTHY, HealthCheck, check_health
from trio_resilience._health_monitor import HealthMonitor
from trio_resilience.testing import Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

pytestmark = pytest.mark.watchdog(180)


def checks_of(world: World, breaker: CircuitBreaker | None = None) -> dict[str, HealthCheck]:
    """One that works, one that fails twice, and one that hangs."""
    retry = Retry(max_attempts=2, backoff=Constant(1))
    return {
        "works": HealthCheck(world.work, breaker=breaker),
        "fails": HealthCheck(world.fail, retry=retry, critical=False, breaker=breaker),
        "hangs": HealthCheck(world.hang, timeout=3),
    }


@pytest.mark.parametrize("has_breaker", [False, True])
def test_a_round_of_checks(*, has_breaker: bool) -> None:
    """Each check that is told of has ended; no verdict comes of one that was cancelled."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        breaker = CircuitBreaker(failure_threshold=5) if has_breaker else None
        heard: list[Event] = []

        def check() -> None:
            told = [event for event in heard if isinstance(event, HealthChecked)]
            assert {event.operation: event.status for event in told}.items() <= {
                "works": HEALTHY,
                "fails": UNHEALTHY,
                "hangs": UNHEALTHY,
            }.items()
            if breaker is not None:
                now = breaker.statistics()
                assert now.in_flight == 0
                assert now.calls <= 2
                assert now.failures <= world.failed / 2

        world.checks.append(check)
        with subscribe(heard.append):
            report = await check_health(checks_of(world, breaker))
        assert report.status is UNHEALTHY
        assert [found.attempts for found in report.services.values()] == [1, 2, 1]

    cancel(victim)


def test_the_probe_of_a_circuit() -> None:
    """Cancelled, it gives its place to the next."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=1)

        def check() -> None:
            assert breaker.is_disposable or breaker.state is CircuitState.OPEN
            assert breaker.statistics().in_flight == 0

        world.checks.append(check)
        check_it = {"it": HealthCheck(world.work, breaker=breaker)}
        await check_health({"it": HealthCheck(world.fail, breaker=breaker)})
        await check_health(check_it)
        await trio.sleep(1)
        await check_health(check_it)
        assert breaker.state is CircuitState.CLOSED

    cancel(victim)


@attrs.define(eq=False)
class Watched:
    """A monitor, and who asks it."""

    running: int = 0
    monitor: HealthMonitor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        checks = {"a": HealthCheck(self.probe), "b": HealthCheck(self.probe)}
        self.monitor = HealthMonitor(checks, interval=1)

    async def probe(self) -> None:
        self.running += 1
        try:
            await pause(2)
        finally:
            self.running -= 1

    async def ask(self) -> None:
        """Ask as soon as it runs; it may end meanwhile."""
        await pause()
        try:
            assert (await self.monitor.check()).is_healthy
        except (OperationsCancelledError, RuntimeError):
            await pause()

    async def use(self) -> None:
        """Run it anew, and be answered."""
        async with trio.open_nursery() as nursery:
            await nursery.start(self.monitor.run)
            assert (await self.monitor.check()).is_healthy
            nursery.cancel_scope.cancel()

    def check(self) -> None:
        assert self.running == 0
        report = self.monitor.report
        assert report is None or len(report.services) == 2


def cancel_watched(victim: Callable[[Watched], Awaitable[object]]) -> None:
    __tracebackhide__ = True

    def make() -> Scenario:
        watched = Watched()
        return Scenario(
            lambda _: victim(watched),
            others=[watched.ask, watched.ask],
            fresh_user=watched.use,
            invariant=watched.check,
        )

    report = cancel_everywhere(make, seeds=range(2))
    assert report.cancellations > 0


def test_a_monitor() -> None:
    """Who asks it is told, and it can be started again."""

    async def victim(watched: Watched) -> None:
        with trio.move_on_after(3):
            await watched.monitor.run()

    cancel_watched(victim)


def test_starting_a_monitor() -> None:
    """Before the first report, or after it."""

    async def victim(watched: Watched) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(watched.monitor.run)
            await pause()
            nursery.cancel_scope.cancel()

    cancel_watched(victim)


def test_asking_a_monitor() -> None:
    """It goes on for the others."""

    def make() -> Scenario:
        watched = Watched()
        answered: list[bool] = []

        async def run() -> None:
            with trio.move_on_after(5):
                await watched.monitor.run()

        async def ask() -> None:
            await pause(2)
            answered.append((await watched.monitor.check()).is_healthy)

        async def victim(_: trio.Nursery) -> None:
            await pause()
            assert (await watched.monitor.check()).is_healthy
            assert (await watched.monitor.check()).is_healthy

        def check() -> None:
            watched.check()
            assert answered == [True]

        return Scenario(victim, others=[run, ask], fresh_user=watched.use, invariant=check)

    report = cancel_everywhere(make, seeds=[0])
    assert report.cancellations > 0


def test_asking_a_monitor_that_ends() -> None:
    """Who is cancelled as it ends hears of the cancellation, and of nothing else."""

    def make() -> Scenario:
        watched = Watched()

        async def run_for_a_while() -> None:
            async with trio.open_nursery() as nursery:
                await nursery.start(watched.monitor.run)
                await pause(3)
                nursery.cancel_scope.cancel()

        async def victim(_: trio.Nursery) -> None:
            while watched.monitor.report is None:
                await pause()
            while True:
                await watched.monitor.check()

        return Scenario(
            victim,
            others=[run_for_a_while],
            fresh_user=watched.use,
            invariant=watched.check,
            expected=(OperationsCancelledError, RuntimeError),
        )

    report = cancel_everywhere(make, seeds=range(2))
    assert report.cancellations > 0
