"""Time limits, and whose limit it was that expired."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


@contextmanager
def limit(deadline: float, on_expiry: Callable[[], Exception]) -> Generator[None]:
    """Cancel the block at *deadline* and raise what *on_expiry* returns.

    A scope never catches a cancellation that an outer scope shares. So what this one catches is its
    own deadline and nothing else: nobody has the scope to cancel it by hand.
    """
    with trio.CancelScope(deadline=deadline) as scope:
        yield
    if scope.cancelled_caught:
        expiry = on_expiry()
        try:
            # The cancellation that did it is our own device: no traceback shows it.
            raise expiry from expiry.__cause__
        finally:
            del expiry
