"""Tell listeners that somebody waits for a turn, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, final

import attrs
import trio

from trio_resilience._engine._report import report
from trio_resilience._events import WaitFinished, WaitStarted

if TYPE_CHECKING:
    from types import TracebackType


@final
@attrs.define(eq=False, repr=False)
class Waiting:
    """Report the block as a wait."""

    policy: str
    operation: str
    _started: float = attrs.field(default=0.0, init=False)

    def __enter__(self) -> None:
        self._started = trio.current_time()
        report(WaitStarted, policy=self.policy, operation=self.operation)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        report(
            WaitFinished,
            policy=self.policy,
            operation=self.operation,
            duration=trio.current_time() - self._started,
            cancelled=exc_type is not None and not issubclass(exc_type, Exception),
        )
