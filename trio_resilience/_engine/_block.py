"""A piece of work that goes on for as long as an `async with` block is open."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, cast, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._engine._ending import add_context
from trio_resilience._engine._join import Job


@final
@attrs.define(eq=False, repr=False)
class Block:
    """Run a job beneath a nursery, and join it at the end of the block, whatever happens.

    Without a nursery it opens its own, in the task that enters the block.
    """

    kind: str
    """The public function's name, for tasks and messages."""
    nursery: trio.Nursery | None
    job: Job[None] = attrs.field(factory=Job[None], init=False)
    was_entered: bool = attrs.field(default=False, init=False)
    is_open: bool = attrs.field(default=False, init=False)
    _own_nursery: Any = attrs.field(default=None, init=False)
    _left_with: BaseException | None = attrs.field(default=None, init=False)
    """What came out of our own nursery."""

    @property
    def state(self) -> str:
        """A word for it, to be shown."""
        return "open" if self.is_open else "closed" if self.was_entered else "not entered"

    async def prepare(self) -> None:
        """Refuse a second entry, and one that is cancelled already."""
        if self.was_entered:
            raise RuntimeError(f"a block of {self.kind} can be entered only once")
        await trio.lowlevel.checkpoint_if_cancelled()

    @enable_ki_protection
    async def begin(
        self, work: Callable[[], Awaitable[None]], on_done: Callable[[], object], name: str
    ) -> None:
        """Start the work; it makes its first step when the caller comes to a checkpoint."""
        self.job.on_done = on_done
        nursery = self.nursery
        if nursery is None:
            self._own_nursery = trio.open_nursery()
            nursery = await self._own_nursery.__aenter__()
        self.job.start(nursery, work, name=name)
        self.was_entered = self.is_open = True

    @enable_ki_protection
    async def join(self) -> None:
        """Wait until the work has ended; a cancellation or Ctrl-C cancels it and still waits."""
        await self.job.wait()
        if self._own_nursery is not None:
            try:
                await self._own_nursery.__aexit__(None, None, None)
            except BaseException as error:  # noqa: BLE001 - it is raised, or something weightier
                self._left_with = error

    def settle(self, failure: BaseException | None, body_error: BaseException | None) -> None:
        """Raise what is to leave the block, unless that is the error of its body, as it is.

        The body's error wins over a *failure* of the work, and over a cancellation, which its scope
        will repeat; but what is to stop the program loses to nothing.
        """
        interruptions = self._interruptions()
        ours = interruptions if failure is None else [failure, *interruptions]
        try:
            if any(map(_must_stop, ours)):
                errors = ours if body_error is None else [*ours, body_error]
                raise errors[0] if len(errors) == 1 else BaseExceptionGroup(_STOPPED, errors)
            if body_error is not None:
                add_context(body_error, failure)
            elif interruptions:
                add_context(interruptions[0], failure)
                raise interruptions[0]
            elif failure is not None:
                raise failure
        finally:
            # A traceback leads to this frame; from here nothing may lead to the error.
            interruptions.clear()
            ours.clear()
            errors = []
            del failure, body_error

    def _interruptions(self) -> list[BaseException]:
        """Return the cancellation, or Ctrl-C, that came while the end was waited for."""
        left_with, self._left_with = self._left_with, None
        found = [] if left_with is None else [left_with]
        try:
            self.job.raise_if_interrupted()
        except BaseException as interruption:  # noqa: BLE001 - it is the value asked for
            found.insert(0, interruption.with_traceback(None))
        return found


_STOPPED = "the block was stopped"


def _must_stop(error: BaseException) -> bool:
    """Tell whether *error* is neither an `Exception` nor just a cancellation."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return any(map(_must_stop, group.exceptions))
    return not isinstance(error, (Exception, trio.Cancelled))
