"""Bound how much is in use at once, by permits that are counted and belong to nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING, Never, TypeVar, TypeVarTuple, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._checks import flag, integer, label, operation
from trio_resilience._engine._driver import run_unprotected
from trio_resilience._engine._permits import OpenBlocks, Permits, caller, is_held_here
from trio_resilience._engine._policy import LivePolicy, open_overrides, runs_here
from trio_resilience._engine._report import open_subscriptions
from trio_resilience._engine._run import RunState
from trio_resilience._engine._waiting import Waiting
from trio_resilience._engine._watched import Watched, watched
from trio_resilience._records import Record, record

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
@record
class SemaphoreStatistics(Record):
    """How a `Semaphore` stands."""

    permits: int
    """How many there are; fewer than are borrowed, if their number was lowered meanwhile."""
    borrowed: int
    available: int
    waiting: int
    """Tasks in line."""


@final
@attrs.define(eq=False, repr=False)
class _Size:
    """How many permits there are, and were at first; apart, so that nothing refers in circles."""

    total: int
    first: int

    def start(self) -> Permits:
        return Permits(trio.CapacityLimiter(self.total))


@final
@attrs.define(eq=False, repr=False, init=False)
class Semaphore(LivePolicy[Never]):
    """Let holders of *permits* permits in at once and make the rest wait in one fair line.

    First come, first served, also for requests of several permits, which get all or none of them:
    a large one at the head is served before small ones that came later, and nobody overtakes. Who
    is cancelled in line gives up the place, and the next go in at once. Permits belong to no task:
    what one has acquired, another may release. They do belong to a run: the semaphore may live at
    module level, and every `trio.run` begins with all of them.

    Args:
        permits: how many there are.
        name: label of the semaphore in events.

    `permits` can be set while the program runs. More let waiting tasks in at once. Fewer take
    nothing away from those who hold some, and let nobody in until enough have come back; 0 lets
    nobody in until it is raised again. A request costs time in proportion to its weight.

    Raises:
        ValueError: more is asked for than there is in all.
        RuntimeError: more is released than is held; or an operation waits for a permit of the
            semaphore that is the ``max_concurrency`` of its own call; or the semaphore is in use in
            another live run.

    Example::

        files = Semaphore(3)

        async with files:
            data = await trio.Path(name).read_bytes()

        async with files.hold(2):
            ...

        data = await files.call(read, name)
    """

    name: str
    _size: _Size
    _runs: RunState[Permits]
    _blocks: OpenBlocks

    def __init__(self, permits: int, *, name: str = "semaphore") -> None:
        permits = integer("permits", permits, minimum=1)
        self.name = name
        self._size = _Size(permits, permits)
        self._runs = RunState(self._size.start)
        self._blocks = OpenBlocks()

    @property
    def permits(self) -> int:
        """How many permits there are, held or not; settable, also to 0."""
        return self._size.total

    @permits.setter
    @enable_ki_protection
    def permits(self, total: int) -> None:
        total = integer("permits", total, minimum=0)
        known = {self._runs, runs_here(self._runs)}
        for permits in [runs.get() for runs in known if runs.peek() is not None]:
            permits.resize(total)
        self._size.total = total

    @property
    def available_permits(self) -> int:
        """How many permits are free, never less than 0; while tasks wait, those come first."""
        return self.statistics().available

    @property
    def is_idle(self) -> bool:
        """Whether nobody holds a permit or waits for one, and there are as many as at first."""
        now = self.statistics()
        return now.borrowed == now.waiting == 0 and self._size.total == self._size.first

    @property
    def is_disposable(self) -> bool:
        """Whether nobody holds a permit or waits for one."""
        now = self.statistics()
        return now.borrowed == now.waiting == 0

    @enable_ki_protection
    def acquire_nowait(self, weight: int = 1) -> None:
        """Take *weight* permits, or raise `trio.WouldBlock` if they are not free, or others wait.

        Raises:
            ValueError: there are not so many permits in all.
        """
        self._check(weight)
        if not self._here().try_take(weight):
            raise trio.WouldBlock

    @enable_ki_protection
    async def acquire(self, weight: int = 1, *, wait_for_resize: bool = False) -> None:
        """Take *weight* permits, all at once, when it is this request's turn.

        Args:
            weight: how many.
            wait_for_resize: wait, rather than raise an error, if there are not so many in all. A
                single permit is waited for anyway.

        Raises:
            ValueError: there are not so many permits in all.
        """
        self._check(weight, wait_for_resize=wait_for_resize)
        await self._acquire(weight)

    @enable_ki_protection
    def release(self, weight: int = 1) -> None:
        """Give *weight* permits back; who has waited longest is let in.

        Raises:
            RuntimeError: so many are not held; nothing has changed.
        """
        self._here().give_back(integer("weight", weight, minimum=1))

    def hold(self, weight: int = 1, *, wait_for_resize: bool = False) -> Hold:
        """Take *weight* permits for one ``async with`` block, and give them back at its end.

        All is as in `acquire`, but that what is wrong with *weight* is told at once, here.
        """
        self._check(weight, wait_for_resize=wait_for_resize)
        return Hold(weight, self._acquire)

    @enable_ki_protection
    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        """Return the result of ``fn(*args)``, run with a permit; a checkpoint if that is one."""
        if open_subscriptions and type(name) is not Watched:
            return await watched(self, self.call, fn, args, name)
        permits = self._here()
        if not permits.try_take():
            operation("fn", fn)
            await self._wait(permits, 1, label(fn) if name is None else name)
        try:
            return await run_unprotected(fn, *args)
        finally:
            permits.give_back()

    def statistics(self) -> SemaphoreStatistics:
        """Return how many permits there are, how many are taken, and how many tasks wait."""
        permits = runs_here(self._runs).peek()
        borrowed, waiting = (0, 0) if permits is None else (permits.borrowed, permits.waiting)
        return SemaphoreStatistics(
            self._size.total, borrowed, max(0, self._size.total - borrowed), waiting
        )

    def _check(self, weight: int, *, wait_for_resize: bool = False) -> None:
        integer("weight", weight, minimum=1)
        may_wait = flag("wait_for_resize", wait_for_resize) or weight == 1
        if weight > self._size.total and not may_wait:
            raise ValueError(
                f"`weight` must be <= {self._size.total}, the number of permits, got {weight}; pass"
                " `wait_for_resize=True` to wait until there are more"
            )

    def _here(self) -> Permits:
        return runs_here(self._runs).get() if open_overrides else self._runs.get()

    @enable_ki_protection
    async def _acquire(self, weight: int) -> Permits:
        await trio.lowlevel.checkpoint_if_cancelled()
        permits = self._here()
        if permits.try_take(weight):
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self._wait(permits, weight, "acquire")
        return permits

    async def _wait(self, permits: Permits, weight: int, operation: str) -> None:
        if is_held_here(self):
            # While it waits it gives nothing back, and nor do others that do the same.
            raise RuntimeError(
                f"this would wait for ever: the operation runs under a permit of {self!r} already,"
                " as `max_concurrency` of the call that runs it"
            )
        has_them = False
        try:
            with Waiting(self.name, operation):
                await permits.wait(weight)
                has_them = True
        except BaseException:
            if has_them:  # a listener has raised what stops the program
                permits.give_back(weight)
            raise

    @enable_ki_protection
    async def __aenter__(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        permits = self._here() if open_overrides else self._runs.get()
        if permits.try_take():
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self._wait(permits, 1, "acquire")
        self._blocks.begin(caller(), permits)

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._blocks.end(caller())

    def __repr__(self) -> str:
        now = self.statistics()
        return (
            f"Semaphore({self._size.total}, name={self.name!r}:"
            f" {now.borrowed} borrowed, {now.waiting} waiting)"
        )


@final
@attrs.define(eq=False, repr=False)
class Hold:
    """Permits of a semaphore for the time of one ``async with`` block; see `Semaphore.hold`."""

    _weight: int
    _acquire: Callable[[int], Awaitable[Permits]]
    _is_used: bool = attrs.field(default=False, init=False)
    _permits: Permits = attrs.field(init=False)

    @enable_ki_protection
    async def __aenter__(self) -> None:
        if self._is_used:
            raise RuntimeError("a hold serves one block: call `hold()` anew for the next")
        self._is_used = True
        self._permits = await self._acquire(self._weight)

    @enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # The permits of a run that has died have died with it.
        if self._permits.is_of_this_run:
            self._permits.give_back(self._weight)


def permits_of(semaphore: Semaphore) -> Permits:
    """Return the permits that the current run has of *semaphore*."""
    here: Callable[[], Permits] = semaphore._here  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return here()
