"""A deadlocked test fails, shows where it hangs, and leaves the tests after it running.

Three stages, each for what the one before cannot end:

1. At the limit, the stacks and the tree of trio tasks are recorded and the test gets a Ctrl-C: trio
   delivers it to the main task, so that the run unwinds as it does for a user, and nothing leaks
   into the next test.
2. Waits that cannot be cancelled are ended by force: their tasks are rescheduled with an error. (An
   exception raised in trio's scheduler would end the run too, but leave wreckage that fails later
   tests.) Code that does not wait but loops gets the error where it is.
3. A test that holds the interpreter itself (a loop in C code) ends the process with a dump of its
   stacks.
"""

from __future__ import annotations

import faulthandler
import inspect
import signal
import sys
import textwrap
import threading
import traceback
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, final

import attrs
import outcome
import pytest
import trio

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import FrameType

SECONDS = 60.0
GRACE_SECONDS = 5.0
"""How long a test that was told to stop has before the next stage."""
RETRY_SECONDS = 0.01


@final
@attrs.define(eq=False)
class Watchdog:
    """Ends the block that it watches after *seconds* of real time, and remembers that it did."""

    seconds: float
    last_words: int
    """A file descriptor for stage 3; by then, captured output is lost."""
    barks: int = attrs.field(default=0, init=False)
    scene: str = attrs.field(default="", init=False)
    """What every task and thread was doing at the limit."""

    @contextmanager
    def watching(self) -> Generator[None]:
        """Arm the alarm for the block; needs the main thread, as signal handlers do."""
        faulthandler.dump_traceback_later(
            self.seconds + 4 * GRACE_SECONDS, exit=True, file=self.last_words
        )
        try:
            with self._alarm():
                yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def _alarm(self) -> Generator[None]:
        if sys.platform == "win32":  # it has no SIGALRM: only stage 3 is left
            yield
            return
        previous = signal.signal(signal.SIGALRM, self._bark)
        signal.setitimer(signal.ITIMER_REAL, self.seconds, GRACE_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)

    def _bark(self, _signal: int, frame: FrameType | None) -> None:
        self.barks += 1
        if self.barks == 1:
            self.scene = _scene(frame)
            signal.raise_signal(signal.SIGINT)
        elif _runs_an_operation(frame):
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS, GRACE_SECONDS)
            pytest.fail(self.verdict())
        else:
            trio.lowlevel.current_trio_token().run_sync_soon(_end_all_waits)
            # A loop with checkpoints never waits: come back until it is met between two of them.
            signal.setitimer(signal.ITIMER_REAL, RETRY_SECONDS, RETRY_SECONDS)

    def verdict(self) -> str:
        """Return why the test failed."""
        how = "by Ctrl-C" if self.barks == 1 else "by force, as it did not react to Ctrl-C"
        return f"still running after {self.seconds:g} s, ended {how}"


def _runs_an_operation(frame: FrameType | None) -> bool:
    """Whether *frame* is code of the test, rather than trio's scheduler between two steps."""
    if not trio.lowlevel.in_trio_run():
        return True
    while frame is not None and not frame.f_code.co_flags & inspect.CO_COROUTINE:
        frame = frame.f_back
    return frame is not None


def _end_all_waits() -> None:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    # The innermost of trio's own nurseries holds the main task.
    for task in _leaves(root.child_nurseries[-1]):
        # Trio asserts that the task is waiting; one that is about to run needs no force.
        with suppress(AssertionError):
            trio.lowlevel.reschedule(task, outcome.Error(RuntimeError("ended by the watchdog")))


def _leaves(nursery: trio.Nursery) -> Iterator[trio.lowlevel.Task]:
    for task in nursery.child_tasks:
        if not any(inner.child_tasks for inner in task.child_nurseries):
            yield task
        for inner in task.child_nurseries:
            yield from _leaves(inner)


def _scene(frame: FrameType | None) -> str:
    return "".join(["Main thread:\n", *traceback.format_stack(frame), *_tasks(), *_threads()])


def _threads() -> Iterator[str]:
    frames = sys._current_frames()  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            yield f"Thread {thread.name}:\n"
            yield from traceback.format_stack(frames.get(thread.ident or 0))


def _tasks() -> Iterator[str]:
    root = trio.lowlevel.current_root_task() if trio.lowlevel.in_trio_run() else None
    if root is not None:
        yield "Trio tasks:\n"
        yield from _task_lines(root, "  ")


def _task_lines(task: trio.lowlevel.Task, indent: str) -> Iterator[str]:
    yield f"{indent}{task.name}\n"
    for line in traceback.StackSummary.extract(task.iter_await_frames()).format():
        yield textwrap.indent(line, indent)
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            yield from _task_lines(child, indent + "    ")
