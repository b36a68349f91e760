"""Operations, sources, nurseries and meters that the tests of bounded concurrency share."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import attrs
import trio

from trio_resilience import CallFinished, CallStarted

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Iterable,
        Iterator,
    )

    from trio_resilience import Event

T = TypeVar("T")


@attrs.define(eq=False)
class Stopwatch:
    """Seconds of trio's clock since it was made, rounded so that sums of floats compare."""

    started: float = attrs.field(factory=trio.current_time)

    @property
    def seconds(self) -> float:
        return round(trio.current_time() - self.started, 6)


@attrs.define(eq=False)
class Gauge:
    """Make operations, and count what becomes of them."""

    running: int = 0
    peak: int = 0
    started: list[int] = attrs.field(factory=list[int])
    finished: list[int] = attrs.field(factory=list[int])
    failed: list[int] = attrs.field(factory=list[int])
    cancelled: list[int] = attrs.field(factory=list[int])
    began_at: dict[int, float] = attrs.field(factory=dict[int, float])
    ended_at: dict[int, float] = attrs.field(factory=dict[int, float])

    async def run(
        self, index: int, seconds: float = 1.0, error: BaseException | None = None
    ) -> int:
        """Sleep, then return *index* or raise *error*."""
        self.started.append(index)
        self.began_at[index] = trio.current_time()
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await trio.sleep(seconds)
        except trio.Cancelled:
            self.cancelled.append(index)
            raise
        finally:
            self.running -= 1
            self.ended_at[index] = trio.current_time()
        if error is not None:
            self.failed.append(index)
            raise error
        self.finished.append(index)
        return index

    def op(
        self, index: int, seconds: float = 1.0, error: BaseException | None = None
    ) -> Callable[[], Awaitable[int]]:
        return partial(self.run, index, seconds, error)

    def ops(self, *seconds: float) -> list[Callable[[], Awaitable[int]]]:
        """One operation per duration, numbered from zero."""
        return [self.op(index, each) for index, each in enumerate(seconds)]

    @property
    def ended(self) -> int:
        return len(self.finished) + len(self.failed) + len(self.cancelled)


@attrs.define(eq=False)
class Source:
    """A lazy source that counts how far it was pulled and whether it was closed."""

    pulled: int = 0
    closed: bool = False

    def of(self, items: Iterable[T]) -> Iterator[T]:
        try:
            for item in items:
                self.pulled += 1
                yield item
        finally:
            self.closed = True

    async def async_of(self, items: Iterable[T], pause: float = 0.0) -> AsyncIterator[T]:
        try:
            for item in items:
                await trio.sleep(pause)
                self.pulled += 1
                yield item
        finally:
            self.closed = True


@attrs.define(eq=False)
class Steps(trio.abc.Instrument):
    """Count the scheduler's steps."""

    count: int = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        self.count += 1


async def _hold(task_status: trio.TaskStatus[trio.Nursery]) -> None:
    async with trio.open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()


@asynccontextmanager
async def foreign_nursery() -> AsyncGenerator[trio.Nursery, None]:
    """A nursery that belongs to another task: cancelling it does not cancel the body."""
    async with trio.open_nursery() as owner:
        yield await owner.start(_hold)
        owner.cancel_scope.cancel()


async def closed_nursery() -> trio.Nursery:
    """A nursery whose block has ended."""
    async with trio.open_nursery() as nursery:
        pass
    return nursery


async def returns(value: T) -> T:
    """Return at once, without a checkpoint."""
    return value


async def fails(error: BaseException) -> int:
    """Raise at once, without a checkpoint."""
    raise error


def operation_notes(error: BaseException) -> list[str]:
    """Those notes on *error* that say which operation it was."""
    notes: list[str] = getattr(error, "__notes__", [])
    return [note for note in notes if note.startswith("operation")]


def _children(error: BaseException) -> tuple[BaseException, ...]:
    return getattr(error, "exceptions", ())


def leaves(error: BaseException) -> list[BaseException]:
    """All errors in *error*, which may be a group, that are no groups themselves."""
    children = _children(error)
    return [leaf for child in children for leaf in leaves(child)] if children else [error]


def reachable(error: BaseException | None) -> list[BaseException]:
    """*error*, what it groups, and the causes and contexts of all these."""
    found: list[BaseException] = []
    queue = [error]
    while queue:
        each = queue.pop()
        if each is None or any(each is known for known in found):
            continue
        found.append(each)
        queue += [each.__cause__, each.__context__, *_children(each)]
    return found


def ancestors(task: trio.lowlevel.Task) -> list[trio.Nursery]:
    """The nurseries above *task*, innermost first."""
    found: list[trio.Nursery] = []
    nursery = task.parent_nursery
    while nursery is not None:
        found.append(nursery)
        nursery = nursery.parent_task.parent_nursery
    return found


def within_calls(listener: Callable[[Event], object]) -> Callable[[Event], None]:
    """Tell *listener* what happens within the calls of policies, and not of these themselves."""

    def hear(event: Event) -> None:
        if not isinstance(event, (CallStarted, CallFinished)):
            listener(event)

    return hear
