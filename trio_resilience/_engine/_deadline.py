"""Time limits, and whose limit it was that expired."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


@contextmanager
def limit(deadline: float, on_expiry: Callable[[], Exception]) -> Generator[trio.CancelScope]:
    """Cancel the block at *deadline* and raise what *on_expiry* returns.

    A scope never catches a cancellation that an outer scope shares, so an outer one wins, also at
    the same instant. Who cancels this scope by hand, before its time, asks for no error.
    """
    with trio.CancelScope(deadline=deadline) as scope:
        yield scope
    if scope.cancelled_caught and trio.current_time() >= scope.deadline:
        expiry = on_expiry()
        # The cancellation that did it is our own device: no traceback shows it.
        raise expiry from expiry.__cause__
