"""Write events to structlog, each at the level that it deserves (the package ``structlog``)."""

from __future__ import annotations

from typing import Any, Final, final

import attrs

from trio_resilience import Event
from trio_resilience.instrumentation._words import (
    LEVELS,
    RECORD_NAMES,
    event_name,
    extra,
    fields,
    level,
)

with extra("structlog"):
    import structlog

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
        word = level(event)
        log = getattr(self.logger, word)
        if _is_enabled(log, LEVELS[word.upper()]):
            log(event_name(event), **fields(event, _RESERVED))


def _is_enabled(log: Any, number: int) -> bool:
    """Tell whether it is worth it to say what an event is; a filtering logger knows in advance."""
    logger: object = getattr(log, "__self__", None)
    # Of the class: some loggers take any attribute of theirs for something to log.
    ask = getattr(logger.__class__, "is_enabled_for", None)
    return ask is None or bool(ask(logger, number))
