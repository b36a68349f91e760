"""Time limits, and whose limit it was that expired."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import trio
from trio.lowlevel import enable_ki_protection

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType


@final
@attrs.define(eq=False, repr=False)
class Limit:
    """Cancel the block at *deadline* and raise what *on_expiry* returns.

    A scope never catches a cancellation that an outer scope shares. So what this one catches is its
    own deadline and nothing else: nobody has the scope to cancel it by hand.

    A class and not a generator, here and where it is used: from a traceback, a generator's frame
    leads to the `contextlib` frame that has called it, and that one to the error.
    """

    deadline: float
    on_expiry: Callable[[], Exception]
    _scope: trio.CancelScope = attrs.field(init=False)

    @enable_ki_protection
    def __enter__(self) -> None:
        self._scope = trio.CancelScope(deadline=self.deadline)
        self._scope.__enter__()

    @enable_ki_protection
    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        was_caught = self._scope.__exit__(exc_type, exc, traceback)
        if exc is None or not was_caught:
            return
        expiry = self.on_expiry()
        try:
            # The cancellation that did it is our own device: no traceback shows it.
            raise expiry from expiry.__cause__
        finally:
            del expiry, exc
