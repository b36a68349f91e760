"""Keep tracebacks to what the user wrote, and no longer than one attempt makes them."""

from __future__ import annotations

import sys
from collections.abc import Container
from contextlib import suppress
from types import TracebackType
from typing import TypeAlias, TypeVar, cast

Tracebacks: TypeAlias = list[tuple[BaseException, TracebackType | None]]

ErrorT = TypeVar("ErrorT", bound=BaseException)

_PACKAGE = __name__.partition(".")[0]


def without_our_frames(error: ErrorT) -> ErrorT:
    """Cut the frames of this package off the start of the traceback of *error*."""
    return error.with_traceback(below_our_frames(error.__traceback__))


def below_our_frames(traceback: TracebackType | None) -> TracebackType | None:
    """Return the part of *traceback* that begins with the first frame that is not ours."""
    while traceback is not None and _is_ours(traceback):
        traceback = traceback.tb_next
    return traceback


def _is_ours(traceback: TracebackType) -> bool:
    module = str(traceback.tb_frame.f_globals.get("__name__", ""))
    return module == _PACKAGE or module.startswith(f"{_PACKAGE}.")


def drop_tracebacks(error: BaseException, handled: Container[int]) -> None:
    """Let *error*, or a part of it, be raised again as if it had not been raised before.

    Python puts the frames of a new raise in front of those of the old ones: an instance that is
    raised for every attempt would carry them all. What the caller handles is not ours: *handled*.
    """
    for part in _parts(error):
        if id(part) not in handled:
            part.__traceback__ = None


def take_tracebacks(error: BaseException) -> Tracebacks:
    """Take those of *error* and its parts away, without our frames, to be put back later.

    Meanwhile another task may raise the same instances, whose tracebacks then do not add up.
    """
    taken: Tracebacks = [(part, part.__traceback__) for part in _parts(error)]
    taken[0] = error, below_our_frames(error.__traceback__)
    for part, _ in taken:
        part.with_traceback(None)
    return taken


def put_tracebacks_back(taken: Tracebacks) -> None:
    """Undo what `take_tracebacks` has done."""
    for part, traceback in taken:
        part.with_traceback(traceback)


def being_handled() -> Container[int]:
    """Return the ids of the exception that the calling code handles, and of its parts."""
    return {id(part) for part in _parts(sys.exception())}


def _parts(error: BaseException | None) -> list[BaseException]:
    """Return *error*, what it groups, and what it was raised from, each of them once."""
    found: dict[int, BaseException] = {}
    left = [error]
    while left:
        part = left.pop()
        if part is not None and id(part) not in found:
            found[id(part)] = part
            left += [part.__cause__, part.__context__]
            if isinstance(part, BaseExceptionGroup):
                left += cast("BaseExceptionGroup[BaseException]", part).exceptions
    return list(found.values())


def add_note_once(error: BaseException, subject: str, text: str) -> None:
    """Add the note "*subject* *text*", unless *error* has one on that *subject* already."""
    notes: list[str] = getattr(error, "__notes__", [])
    if not any(note.startswith(subject) for note in notes):
        with suppress(Exception):  # an error class may refuse attributes; it comes out all the same
            error.add_note(f"{subject}{text}")
