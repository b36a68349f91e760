"""Write events to the standard library's `logging`, each at the level that it deserves."""

from __future__ import annotations

import logging
from typing import final

import attrs

from trio_resilience import Event
from trio_resilience.instrumentation._words import (
    LEVELS,
    RECORD_NAMES,
    event_name,
    fields,
    level,
    must_be,
)


def _own_logger() -> logging.Logger:
    return logging.getLogger("trio_resilience")


@final
@attrs.frozen(eq=False)
class LoggingListener:
    """A listener for `subscribe` that logs every event, and holds on to nothing.

    Circuits that open, and configurations that can't be loaded, are errors. Refusals, expired
    limits, fallbacks and retries that are given up are warnings; retries that go on are infos; the
    rest is for debugging. What an event says is in the message and, by name, in the record's
    ``extra`` attributes, of which ``event`` says what has happened. What operations return is never
    logged.

    Args:
        logger: where to log; that of the name ``trio_resilience`` if not given.

    Example::

        with subscribe(LoggingListener()):
            trio.run(main)
    """

    logger: logging.Logger = attrs.field(factory=_own_logger, validator=must_be(logging.Logger))

    def __call__(self, event: Event) -> None:
        """Log *event*, if its level is enabled."""
        if not isinstance(event, Event):  # pyright: ignore[reportUnnecessaryIsInstance]
            return
        number = LEVELS[level(event).upper()]
        if self.logger.isEnabledFor(number):
            name, said = event_name(event), fields(event, RECORD_NAMES)
            # Names are shown as Python writes strings, so that none can forge a line of the log.
            words = " ".join(f"{key}={value!r}" for key, value in said.items())
            self.logger.log(number, "%s: %s", name, words, extra={**said, "event": name})
