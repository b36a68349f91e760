"""Listen in on a call: what it is woken with, and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Self, cast

import attrs

if TYPE_CHECKING:
    from types import FrameType, TracebackType


def contains(error: BaseException | None, kind: type[BaseException]) -> bool:
    """Return whether *error* is a *kind*, or a group with such a leaf."""
    return any(isinstance(leaf, kind) for leaf in strangers(error, ()))


def strangers(
    error: BaseException | None, allowed: tuple[type[BaseException], ...]
) -> list[BaseException]:
    """Return *error*, or its leaves, without what is an instance of an allowed type."""
    if error is None or isinstance(error, allowed):
        return []
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return [leaf for each in group.exceptions for leaf in strangers(each, allowed)]
    return [error]


@attrs.define(eq=False)
class Trap:
    """Keep what leaves the block in `error`; only Ctrl-C gets out."""

    error: BaseException | None = attrs.field(default=None, init=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None
    ) -> bool:
        self.error = error
        return not contains(error, KeyboardInterrupt)


@attrs.define(eq=False)
class Overhear(Generator[Any, Any, Any]):
    """Await *call*, and show to *listener* what trio hands to it whenever it is resumed."""

    _call: Coroutine[Any, Any, object]
    _listener: Callable[[object], None]

    def __await__(self) -> Self:
        return self

    def send(self, value: Any, /) -> Any:
        """Show *value*, then hand it on."""
        self._listener(value)
        return self._call.send(value)

    def throw(self, *error: Any) -> Any:
        """Hand the error on."""
        return self._call.throw(*error)

    # Trio's introspection of tasks asks for these two, and so still sees inside the call.

    @property
    def cr_frame(self) -> FrameType | None:
        """The frame of the call, as a coroutine has it."""
        return getattr(self._call, "cr_frame", None)

    @property
    def cr_await(self) -> object:
        """What the call awaits, as a coroutine has it."""
        return getattr(self._call, "cr_await", None)
