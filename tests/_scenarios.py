"""What the cancel-everywhere tests share: a small world, and what must be left of it in the end."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

import attrs
import trio

from trio_resilience import (
    OperationFinished,
    OperationsCancelledError,
    OperationStarted,
    run_with_limit,
)
from trio_resilience.testing import CancelReport, Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator

    from trio_resilience import Event

    Operation = Callable[[], Awaitable[int]]
    Victim = Callable[["World", trio.Nursery | None], Awaitable[object]]

T = TypeVar("T")

PERMITS = 2


@attrs.define(eq=False)
class World:
    """What one run shares: a limiter, a gauge, sources that want closing, and who listened."""

    limiter: trio.CapacityLimiter = attrs.field(factory=lambda: trio.CapacityLimiter(PERMITS))
    running: int = 0
    started: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    open_sources: int = 0
    heard: list[Event] = attrs.field(factory=list["Event"])
    checks: list[Callable[[], object]] = attrs.field(factory=list["Callable[[], object]"])
    """What else must be true in the end; each raises if it is not."""

    async def work(
        self, index: int = 0, rounds: int = 2, error: BaseException | None = None
    ) -> int:
        """Suspend *rounds* times, then return *index* or raise *error*."""
        self.started += 1
        self.running += 1
        try:
            await pause(rounds)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        if error is not None:
            self.failed += 1
            raise error
        self.succeeded += 1
        return index

    async def fail(self, index: int = 0) -> int:
        """Suspend, and raise an error of its own."""
        return await self.work(index, error=OSError(index))

    async def hang(self, _: int = 0) -> int:
        """Suspend, then wait until a time limit strikes."""
        self.started += 1
        self.running += 1
        try:
            await pause(2)
            await trio.sleep_forever()
        finally:
            self.running -= 1
            self.cancelled += 1
        raise AssertionError

    def ops(self, number: int) -> list[Operation]:
        """Return so many operations, of one or two suspensions each."""
        return [partial(self.work, index, 1 + index % 2) for index in range(number)]

    def source(self, items: Iterable[T]) -> Iterator[T]:
        """Yield *items*, and want to be closed."""
        self.open_sources += 1
        try:
            yield from items
        finally:
            self.open_sources -= 1

    async def async_source(self, items: Iterable[T]) -> AsyncIterator[T]:
        """Suspend before each of *items*, in a nursery that is open meanwhile."""
        self.open_sources += 1
        try:
            async with trio.open_nursery() as nursery:
                for item in items:
                    nursery.start_soon(pause)
                    await pause()
                    yield item
        finally:
            self.open_sources -= 1

    async def use_limiter(self) -> None:
        """Wait in the limiter's line like any other part of a program."""
        async with self.limiter:
            await pause()

    async def compete(self) -> None:
        """Make a call of one's own under the same limiter."""
        ops = [pause, pause, pause]
        assert await run_with_limit(None, ops, max_concurrency=self.limiter) == [None] * 3

    async def use_all(self) -> None:
        """Take every permit there should be, at once."""
        borrowers = [object() for _ in range(PERMITS)]
        for borrower in borrowers:
            self.limiter.acquire_on_behalf_of_nowait(borrower)
        await pause()
        for borrower in borrowers:
            self.limiter.release_on_behalf_of(borrower)

    def check(self) -> None:
        """Raise unless everything is as if nobody had ever been here."""
        assert self.running == 0, "the gauge is back to zero"
        assert self.open_sources == 0, "sources are closed"
        assert self.limiter.borrowed_tokens == 0, "permits are back"
        assert self.limiter.statistics().tasks_waiting == 0, "nobody waits"
        assert self.started == self.succeeded + self.failed + self.cancelled, "all are accounted"
        self._check_events()
        for check in self.checks:
            check()

    def _check_events(self) -> None:
        begun = [event.index for event in self.heard if isinstance(event, OperationStarted)]
        ended = [event.index for event in self.heard if isinstance(event, OperationFinished)]
        assert sorted(begun) == sorted(ended), "every operation that begins ends, for listeners too"


def scenario(victim: Victim, expected: tuple[type[Exception], ...], *, given: bool) -> Scenario:
    """Return *victim* beside two users of the limiter, one of which makes a call of its own."""
    world = World()

    async def call(nursery: trio.Nursery) -> None:
        await victim(world, nursery if given else None)

    return Scenario(
        call,
        others=[world.use_limiter, world.compete, world.use_limiter],
        fresh_user=world.use_all,
        invariant=world.check,
        expected=expected,
        on_nursery_cancelled=(OperationsCancelledError,),
    )


def cancel(victim: Victim, *expected: type[Exception], given: bool = False) -> CancelReport:
    """Cancel *victim* everywhere, its caller and, if it is *given* one, its nursery."""
    __tracebackhide__ = True
    # Another order of tasks for each of the two.
    make = partial(scenario, victim, expected, given=given)
    report = cancel_everywhere(make, seeds=[int(given)])
    assert report.cancellations > 0
    return report
