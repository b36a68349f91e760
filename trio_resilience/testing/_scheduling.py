"""Make trio's schedule repeatable, and leave a run that cannot be ended in an orderly way.

This is the one place of the harness that uses private names of trio, two of them. Where they are
missing, everything works, but runs are not replayable, and say so.
"""

from __future__ import annotations

import ctypes
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Generator, Iterable

    from trio.lowlevel import Task
    from trio.testing import MockClock

_RANDOM = "_r"
_FLAG = "_ALLOW_DETERMINISTIC_SCHEDULING"


class RunAbandonedError(BaseException):
    """Raised into trio's own loop, to end a run whose tasks cannot be ended."""


def is_replayable() -> bool:
    """Return whether this trio has the two private names that make its schedule repeatable."""
    scheduler = sys.modules.get("trio._core._run")
    return hasattr(scheduler, _RANDOM) and hasattr(scheduler, _FLAG)


@contextmanager
def seeded_scheduler(seed: int) -> Generator[None]:
    """Make trio's choice of the next task depend on *seed* alone; restore everything afterwards.

    Both names are needed: the flag makes trio sort the runnable tasks by age before it shuffles
    them, the generator decides the shuffle. What stays outside: deadlines that expire at the same
    instant, and tasks that one scope cancels, come in the order of their addresses.
    """
    if not is_replayable():
        yield
        return
    scheduler = sys.modules["trio._core._run"]
    generator: random.Random = getattr(scheduler, _RANDOM)
    state, flag = generator.getstate(), getattr(scheduler, _FLAG)
    generator.seed(seed)
    setattr(scheduler, _FLAG, True)
    try:
        yield
    finally:
        generator.setstate(state)
        setattr(scheduler, _FLAG, flag)


def abandon_run(clock: MockClock) -> None:
    """Make `trio.run` raise `trio.TrioInternalError` as soon as its loop reads *clock* again.

    Tasks that are shielded, or that swallow every error, cannot be ended from outside, and what an
    instrument raises does not leave the loop. What a clock raises does.
    """
    current_time = clock.current_time

    def stop() -> float:
        # A task that retries on every error would never give control back to the loop.
        if is_answered(trio.lowlevel.current_task):
            return current_time()
        raise RunAbandonedError

    setattr(clock, "current_time", stop)  # noqa: B010 - an assignment would not type-check


def is_answered(question: Callable[[], object]) -> bool:
    """Return whether *question* can be asked here; trio's raise where there is no run, or task."""
    try:
        question()
    except RuntimeError:
        return False
    return True


def keep_for_ever(tasks: Iterable[Task]) -> None:
    """Keep the tasks of an abandoned run from ever being collected, by leaking them.

    Collecting a suspended coroutine runs its `finally` blocks, now outside of any run: there they
    fail in strange ways, and one that retries on every error spins for ever. A list would only put
    that off until the interpreter exits. There are few such runs, and each is a reported failure.
    """
    for task in tasks:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(task))
