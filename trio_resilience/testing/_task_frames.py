"""Say where a suspended task stands, in the words of the code that it runs."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from trio.lowlevel import Task

_HARNESS = __file__.removesuffix("_task_frames.py")
_TRIO = (trio.__file__ or "").removesuffix("__init__.py")


def locate(task: Task) -> str:
    """Return where *task* is suspended, innermost call first, without the harness's own frames."""
    state = inspect.getcoroutinestate(task.coro)
    if state == inspect.CORO_CREATED:
        return "before its first step"
    if state == inspect.CORO_CLOSED:
        return "finished"
    calls: list[str] = []
    inside_trio = False
    for frame, line in task.iter_await_frames():
        code = frame.f_code
        if code.co_filename.startswith(_HARNESS):
            continue
        if not code.co_filename.startswith(_TRIO):
            inside_trio = False
            calls.append(f"{code.co_filename}:{line} in {code.co_qualname}")
        elif not inside_trio and code.co_name != "__aenter__":
            inside_trio = True  # what was called says more than how trio does it
            calls.append(f"trio's {code.co_qualname}")
    return " <- ".join(reversed(calls))


def is_sleeping(task: Task) -> bool:
    """Return whether *task* is suspended in `trio.sleep`, which only its own deadline ends."""
    sleep = trio.sleep_until.__code__
    return any(frame.f_code is sleep for frame, _ in task.iter_await_frames())
