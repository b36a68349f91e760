"""Write events to structlog, each at the level that it deserves (the package ``structlog``)."""

from __future__ import annotations

from typing import Any, Final, final

import attrs
import structlog

from trio_resilience import Event
from trio_resilience.instrumentation._words import RECORD_NAMES, event_name, fields, level

# What the usual processors take for themselves, and loggers: also those that hand on to `logging`.
_RESERVED: Final = RECORD_NAMES | {
    *("self", "level", "logger", "logger_name", "timestamp", "method_name"),
    *("exception", "stack", "stacklevel"),
}


def _own_logger() -> Any:
    return structlog.get_logger("trio_resilience")


@final
@attrs.frozen(eq=False)
class StructlogListener:
    """A listener for `subscribe` that logs every event as key-values, and holds on to nothing.

    Circuits that open, and configurations that can't be loaded, are errors. Refusals, expired
    limits, fallbacks and retries that are given up are warnings; retries that go on are infos; the
    rest is for debugging. What operations return is never logged.

    Args:
        logger: a bound logger; ``structlog.get_logger("trio_resilience")`` if not given.

    Example::

        with subscribe(StructlogListener()):
            trio.run(main)
    """

    logger: Any = attrs.field(factory=_own_logger)

    def __call__(self, event: Event) -> None:
        """Log *event*; whether its level is enabled is for structlog to say."""
        if not isinstance(event, Event):  # pyright: ignore[reportUnnecessaryIsInstance]
            return
        log = getattr(self.logger, level(event))
        log(event_name(event), **fields(event, _RESERVED))
