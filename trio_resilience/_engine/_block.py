"""A piece of work that goes on for as long as an `async with` block is open."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

from trio_resilience._engine._ending import add_context, raise_failure
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
            except (trio.Cancelled, BaseExceptionGroup) as error:
                # The job was cancelled from without, and with it, unless it is shielded, this task.
                self._left_with = error

    def settle(self, failure: BaseException | None, body_error: BaseException | None) -> None:
        """Raise what is to leave the block, unless that is the error of its body, as it is.

        That one wins over a *failure* that is an `Exception`, and over a cancellation or Ctrl-C,
        which trio then repeats at the next checkpoint.
        """
        job, left_with, self._left_with = self.job, self._left_with, None
        try:
            if failure is not None and not isinstance(failure, Exception):
                if body_error is None and not job.was_interrupted:
                    raise failure
                raise job.stopped_by(failure, *([] if body_error is None else [body_error]))
            if body_error is not None:
                add_context(body_error, failure)
            elif left_with is not None and not job.was_interrupted:
                raise left_with
            else:
                raise_failure(job, failure)
        finally:
            # The traceback of an error leads to this frame, from which nothing may lead back.
            del failure, body_error, left_with
