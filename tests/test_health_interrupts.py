"""Health checks: Ctrl-C at any line comes out once, and leaves a monitor that can run again."""

from __future__ import annotations

import gc
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests.operations import leaves
from tests.test_circuit_breaker_interrupts import Once
from tests.test_concurrency_interrupts import Tripwire
from trio_resilience import CircuitBreaker, Constant, Retry
from trio_resilience._health import HealthCheck, HealthReport, check_health
from trio_resilience._health_monitor import HealthMonitor

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import FrameType

FILES = "_health.py", "_health_monitor.py"


@attrs.define(eq=False)
class Map(Tripwire):
    """Find out when each line of the health checks is executed."""

    when: dict[tuple[str, int], list[int]] = attrs.field(factory=dict[tuple[str, int], list[int]])

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Tripwire | None:
        watcher = super().__call__(frame, event, argument)
        line = frame.f_code.co_filename, frame.f_lineno
        if watcher is not None and event == "line" and line[0].endswith(FILES):
            self.when.setdefault(line, []).append(self.lines)
        return watcher

    def points(self) -> list[int]:
        """Return when each line is executed first, and when last."""
        return sorted({when for each in self.when.values() for when in (each[0], each[-1])})


@attrs.define(eq=False)
class User:
    """Whoever checks, and knows how many probes run."""

    running: int = 0
    breaker: CircuitBreaker = attrs.field(factory=CircuitBreaker)
    told: list[HealthReport] = attrs.field(factory=list[HealthReport])
    checks: dict[str, HealthCheck] = attrs.field(init=False)
    monitor: HealthMonitor = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        retry = Retry(max_attempts=2, backoff=Constant(1))
        self.checks = {
            "a": HealthCheck(self.probe, retry=retry, breaker=self.breaker),
            "b": HealthCheck(self.fail, retry=retry),
            "c": HealthCheck(trio.sleep_forever, timeout=3),
        }
        self.monitor = HealthMonitor(self.checks, interval=10, on_change=self.told.append)

    async def probe(self) -> None:
        self.running += 1
        try:
            await trio.lowlevel.checkpoint()
        finally:
            self.running -= 1

    async def fail(self) -> bool:
        await self.probe()
        return False

    async def check(self) -> list[str]:
        """Say what is wrong when nobody checks."""
        wrong = list[str]()
        if self.running or self.breaker.statistics().in_flight:
            wrong.append("a probe runs on")
        async with trio.open_nursery() as nursery:
            await nursery.start(self.monitor.run)
            if (await self.monitor.check()).services["a"].attempts != 1:
                wrong.append("the monitor does not work")
            nursery.cancel_scope.cancel()
        return wrong


async def once(user: User) -> None:
    await check_health(user.checks)


async def in_a_nursery(user: User) -> None:
    """Start it, ask it, let it work, and end it."""
    async with trio.open_nursery() as nursery:
        await nursery.start(user.monitor.run)
        await user.monitor.check()
        await trio.sleep(15)
        nursery.cancel_scope.cancel()


async def by_itself(user: User) -> None:
    with trio.move_on_after(15):
        await user.monitor.run()


def scenario(
    job: Callable[[User], Awaitable[None]], found: list[str]
) -> Callable[[], Awaitable[None]]:
    """Return a main task that does the job, and finds out what is wrong after that."""
    user = User()

    async def main() -> None:
        try:
            try:
                await job(user)
            finally:
                sys.settrace(None)
                # Here comes out what may still be due.
                await trio.lowlevel.checkpoint()  # noqa: ASYNC102 - nobody cancels it
        finally:
            found.extend(await user.check())  # noqa: ASYNC102 - likewise

    return main


@pytest.mark.watchdog(120)
# Between the call of an async function and its await, Ctrl-C leaves a coroutine behind anywhere.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("job", [once, in_a_nursery, by_itself])
def test_ctrl_c_at_any_line(job: Callable[[User], Awaitable[None]]) -> None:
    """It comes out once; no probe runs on, and the monitor can be started again."""
    problems, pressed = list[str](), 0
    make = partial(scenario, job)
    gc.collect()  # what other tests have left is not to end in the middle, and be counted
    whole = Map(at=-1)
    assert whole.trace(make(problems)) is None
    assert len(whole.points()) > 20
    for point in whole.points():
        found, wire = list[str](), Once(at=point)
        error = wire.trace(make(found))
        kinds = [] if error is None else [type(leaf) for leaf in leaves(error)]
        pressed += bool(wire.where)
        if wire.where and kinds != [KeyboardInterrupt]:
            found.append(f"what came out is {error!r}, caused by {error and error.__cause__!r}")
        problems += [f"{wire.where}: {problem}" for problem in found]
    assert not problems, "\n".join(sorted(set(problems)))
    assert pressed > 0.9 * len(whole.points())
