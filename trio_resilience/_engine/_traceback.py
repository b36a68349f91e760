"""Keep tracebacks to what the user wrote, and no longer than one attempt makes them."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import TypeVar

ErrorT = TypeVar("ErrorT", bound=BaseException)

_PACKAGE = __name__.partition(".")[0]


def without_our_frames(error: ErrorT) -> ErrorT:
    """Cut the frames of this package off the start of the traceback of *error*."""
    traceback = error.__traceback__
    while traceback is not None and _is_ours(traceback):
        traceback = traceback.tb_next
    return error.with_traceback(traceback)


def _is_ours(traceback: TracebackType) -> bool:
    module = str(traceback.tb_frame.f_globals.get("__name__", ""))
    return module == _PACKAGE or module.startswith(f"{_PACKAGE}.")


def forget_earlier_raises(error: BaseException) -> None:
    """Cut off what earlier raises of the same instance, through the same frame, left behind.

    Python puts each new raise in front of the old ones: an error object that is raised for every
    attempt would carry them all.
    """
    first = traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        if traceback.tb_next.tb_frame is first.tb_frame:  # type: ignore[union-attr]
            traceback.tb_next = None
        traceback = traceback.tb_next


def add_note_once(error: BaseException, subject: str, text: str) -> None:
    """Add the note "*subject* *text*", unless *error* has one on that *subject* already."""
    notes: list[str] = getattr(error, "__notes__", [])
    if not any(note.startswith(subject) for note in notes):
        with suppress(Exception):  # an error class may refuse attributes; it comes out all the same
            error.add_note(f"{subject}{text}")
