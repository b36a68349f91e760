"""Work that runs in a nursery while somebody waits for it, whatever happens to either of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, NoReturn, TypeVar, TypeVarTuple, cast, final

import attrs
import trio
from trio.lowlevel import Abort, Task, enable_ki_protection

from trio_resilience._engine._driver import run_unprotected
from trio_resilience._errors import OperationsCancelledError

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
@attrs.define(eq=False, repr=False)
class Job(Generic[T]):
    """One piece of work in a nursery, and the task that waits for it.

    The work never crashes the nursery: what it raises is kept for the one who waits. It ends with
    the first of: its own end, the nursery's cancellation, the waiter's (or Ctrl-C in the waiter),
    and the deadline that its starter is under.
    """

    scope: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    is_done: bool = attrs.field(default=False, init=False)
    value: T = attrs.field(init=False)
    """What the work returned; unset if it raised or was cancelled."""
    error: BaseException | None = attrs.field(default=None, init=False)
    """What the work raised, without the cancellations that stopped it."""
    on_done: Callable[[], object] | None = attrs.field(default=None, init=False)
    """Called, once, in the last step of the work."""
    _waiter: Task | None = attrs.field(default=None, init=False)
    _raise_cancel: Callable[[], NoReturn] | None = attrs.field(default=None, init=False)

    def start(
        self,
        nursery: trio.Nursery,
        fn: Callable[[*Ts], Awaitable[T]],
        *args: *Ts,
        name: object = None,
    ) -> None:
        """Start ``fn(*args)`` as a child task of *nursery*; refused if that is closed."""
        deadline = trio.current_effective_deadline()
        try:
            nursery.start_soon(self._run, deadline, fn, args, name=fn if name is None else name)
        except RuntimeError as error:
            raise RuntimeError(
                "`nursery` must be open, but its block has ended; open one around this call,"
                " or pass None to have one opened for the call"
            ) from error

    @enable_ki_protection
    async def _run(
        self, deadline: float, fn: Callable[[*Ts], Awaitable[T]], args: tuple[*Ts]
    ) -> None:
        scope = self.scope
        try:
            with scope:
                if deadline < trio.current_effective_deadline():
                    scope.deadline = deadline
                # A nursery that is cancelled already runs nothing of the work.
                await trio.lowlevel.checkpoint_if_cancelled()
                self.value = await run_unprotected(fn, *args)
        except trio.Cancelled:
            raise
        except BaseException as error:  # noqa: BLE001 - the waiter gets it
            cancellations, self.error = _split(error)
            if cancellations is not None:
                try:
                    raise cancellations from None
                finally:
                    del cancellations
        finally:
            self._finish()

    def _finish(self) -> None:
        self.is_done = True
        if self._waiter is not None:
            trio.lowlevel.reschedule(self._waiter)
            self._waiter = None
        if self.on_done is not None:
            self.on_done()

    @enable_ki_protection
    async def wait(self) -> None:
        """Wait until the work has ended; a cancellation or Ctrl-C cancels it and still waits."""
        if not self.is_done:
            self._waiter = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)

    def _abort(self, raise_cancel: Callable[[], NoReturn]) -> Abort:
        self._raise_cancel = raise_cancel
        self.scope.cancel()
        # The waiter stays: it is woken when the work, which it started, has ended.
        return Abort.FAILED

    def raise_if_interrupted(self) -> None:
        """Raise the cancellation, or the Ctrl-C, that came while this was waited for."""
        raise_cancel, self._raise_cancel = self._raise_cancel, None
        if raise_cancel is not None:
            raise_cancel()

    @property
    def was_interrupted(self) -> bool:
        """Whether a cancellation, or Ctrl-C, came while this was waited for."""
        return self._raise_cancel is not None

    @property
    def was_cancelled(self) -> bool:
        """Whether the work neither returned nor raised."""
        return self.is_done and self.error is None and not hasattr(self, "value")

    def absorb_cancellation(self, group: BaseExceptionGroup[BaseException]) -> None:
        """Drop what a nursery around nothing but this job raised because it was cancelled.

        The waiter was cancelled with it, and `raise_if_interrupted` says so; with what came of the
        job, which must not be lost.
        """
        cancellations, rest = group.split(trio.Cancelled)
        if rest is not None or not self.was_interrupted:
            raise group
        del cancellations

    def result(self) -> T:
        """Return what the work returned, or raise what it raised.

        What has ended counts, also if its waiter was cancelled in the same instant: no result is
        lost, and trio raises the cancellation at the next checkpoint.
        """
        error, self.error = self.error, None
        try:
            if error is None and hasattr(self, "value"):
                return self.value
            if isinstance(error, Exception):
                _raise_from_another_task(error)
            if error is not None:
                raise self.stopped_by(error)
        finally:
            del error
        self.raise_if_interrupted()
        raise OperationsCancelledError

    def stopped_by(self, *errors: BaseException) -> BaseExceptionGroup[BaseException]:
        """Return a group of *errors*, and of the interruption of the wait, if there was one."""
        leaves = list(errors)
        try:
            self.raise_if_interrupted()
        except BaseException as interruption:  # noqa: BLE001 - it is raised in the group
            leaves.append(interruption.with_traceback(None))
        return BaseExceptionGroup("an operation stopped the job", leaves)


def _raise_from_another_task(error: Exception) -> NoReturn:
    """Raise *error*, whose own context, if it has one, what is handled here does not replace."""
    context = error.__context__
    try:
        raise error
    finally:
        if context is not None:
            error.__context__ = context
        del error, context


def _split(error: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Part *error* into what the nursery must see, its own cancellation, and what it must not."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        cancellations, rest = group.split(trio.Cancelled)
        return (None, group) if cancellations is None else (cancellations, rest)
    return None, error


def leaves_of(error: BaseException) -> list[BaseException]:
    """Return what a nursery's group holds, or else *error* itself."""
    if isinstance(error, BaseExceptionGroup):
        return list(cast("BaseExceptionGroup[BaseException]", error).exceptions)
    return [error]


@enable_ki_protection
async def join(
    nursery: trio.Nursery | None,
    fn: Callable[[*Ts], Awaitable[T]],
    *args: *Ts,
    name: object = None,
) -> Job[T]:
    """Run ``fn(*args)`` in *nursery*, or in one opened for it, and return the ended job."""
    job: Job[T] = Job()
    if nursery is not None:
        job.start(nursery, fn, *args, name=name)
        await job.wait()
        return job
    try:
        async with trio.open_nursery() as own_nursery:
            job.start(own_nursery, fn, *args, name=name)
            await job.wait()
    except BaseExceptionGroup as group:
        job.absorb_cancellation(group)
    return job


def check_nursery(nursery: object) -> None:
    """Refuse what is neither a nursery nor ``None``."""
    if nursery is not None and not isinstance(nursery, trio.Nursery):
        raise TypeError(f"`nursery` must be a trio.Nursery or None, got {nursery!r}")
