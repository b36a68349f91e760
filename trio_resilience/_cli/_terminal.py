"""Talk to the person at the terminal, and to the program at the other end of the pipe."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import trio
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Generator

    from rich.console import RenderableType

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
EXIT_BROKEN_PIPE: Final = 141
"""128 + SIGPIPE, as a shell reports it; not every system has the signal."""


class UsageError(Exception):
    """What was asked for cannot be done; each argument is a line that says why."""


def complain(message: str) -> None:
    """Write one line to stderr."""
    print(f"trio_resilience: {' '.join(message.split())}", file=sys.stderr, flush=True)


def write_stdout(text: str) -> None:
    """Write all of *text* to stdout at once.

    Past `sys.stdout`: the end of the interpreter runs into its buffer and its lock, so a broken
    pipe, or a thread that still waits for a slow reader, would be an error message there.
    """
    rest = memoryview(text.encode(errors="backslashreplace"))
    while rest:
        rest = rest[os.write(sys.stdout.fileno(), rest) :]


async def write_stdout_line(text: str) -> None:
    """Write a line to stdout; a reader that takes its time does not hold up the other tasks."""
    await trio.to_thread.run_sync(write_stdout, f"{text}\n", abandon_on_cancel=True)


def render(*parts: RenderableType, width: int | None = None) -> str:
    """Return the parts as stdout can show them: in colour only on a terminal, text unbroken."""
    console = Console(highlight=False, width=width)
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, (str, Text)))
    return capture.get()


def progress_bar() -> Progress:
    """Return a progress display on stderr, which shows itself only if that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,
    )


@contextmanager
def set_aside(progress: Progress) -> Generator[None]:
    """Take the display off the terminal while a line is written to stdout, if that is one too."""
    if not sys.stdout.isatty():
        yield
        return
    progress.stop()
    try:
        yield
    finally:
        progress.start()


async def cancel_on_interrupt(
    scope: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Cancel *scope* at the first Ctrl-C; a second one interrupts the program as usual.

    A `KeyboardInterrupt` can come up between any two lines, so also between the work and its
    report; a cancellation comes where the program waits.
    """
    with trio.open_signal_receiver(signal.SIGINT) as signals:
        task_status.started()
        await anext(aiter(signals))
    scope.cancel()
