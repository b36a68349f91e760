"""What an event says, in words and numbers that every tool can take."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Container, Generator, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, Final, cast

import attrs

from trio_resilience import (
    BatchFlushed,
    CircuitState,
    CircuitStateChanged,
    ConfigReloaded,
    ConfigReloadFailed,
    Event,
    FailureRecord,
    FallbackUsed,
    HealthChanged,
    HealthStatus,
    LoserFailed,
    Rejected,
    RejectedError,
    RejectionSkipped,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
)

Word = str | bool | int | float

MAX_LENGTH: Final = 200
LEVELS: Final = logging.getLevelNamesMapping()
_LARGEST: Final = 2**63 - 1

RECORD_NAMES: Final = frozenset({*vars(logging.makeLogRecord({})), "message", "asctime", "event"})
"""What a log record takes for itself, and what says which event it is of."""

# What an operation returns is the application's own, and may be secret.
_UNTOLD: Final = frozenset({"result"})


@contextmanager
def extra(name: str) -> Generator[None]:
    """Say what to install, should a package be missing that this block imports."""
    try:
        yield
    except ModuleNotFoundError as error:
        how = f'install the extra: pip install "trio_resilience[{name}]"'
        raise ModuleNotFoundError(f"{error.msg}; {how}", name=error.name) from None


def must_be(kind: type[object]) -> Callable[[object, attrs.Attribute[Any], object], None]:
    """Return a validator that refuses what is no *kind*."""

    def check(_: object, attribute: attrs.Attribute[Any], value: object) -> None:
        if not isinstance(value, kind):
            raise TypeError(f"`{attribute.alias}` must be a {kind.__name__}, got {value!r}")

    return check


def text(value: object) -> str:
    """Return *value* as a string of at most 200 characters that can be encoded; never raise."""
    try:
        words = str(value)
    except Exception:  # noqa: BLE001 - an error's own `__str__` may be what fails
        words = f"<{type(value).__name__}>"
    if len(words) > MAX_LENGTH:
        words = words[: MAX_LENGTH - 1] + "…"
    return words.encode("utf-8", "replace").decode()


def event_name(event: Event) -> str:
    """Return what has happened, as ``retry_scheduled`` for a `RetryScheduled`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower()


def outcome(event: object) -> str:
    """Return what has become of a call, an attempt, an operation or a batch."""
    error = getattr(event, "error", None)
    if isinstance(error, RejectedError):
        return "refused"
    if error is not None:
        return "failed"
    return "cancelled" if getattr(event, "cancelled", False) else "succeeded"


def error_type(error: object) -> str:
    """Return the name of an error's class, with its module unless that is Python's own."""
    if isinstance(error, FailureRecord):
        return text(error.type_name)
    kind = type(error)
    module = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
    return text(module + kind.__qualname__)


def error_message(error: object) -> str:
    """Return what an error says."""
    return text(error.message if isinstance(error, FailureRecord) else error)


def fields(event: Event, reserved: Container[str] = ()) -> dict[str, Word]:
    """Return what *event* says by name: never a result, an error itself, or what is ``None``.

    A name that is *reserved* gets an underscore.
    """
    # An `Event` is an attrs class, which type checkers can't see.
    kind: Any = type(event)
    names = [field.name for field in attrs.fields(kind) if field.name not in _UNTOLD]
    pairs = [pair for name in names for pair in _plain(name, getattr(event, name, None))]
    return {f"{name}_" if name in reserved else name: value for name, value in pairs}


def _plain(name: str, value: Any) -> Iterator[tuple[str, Word]]:
    if isinstance(value, Enum):
        value = value.value
    match value:
        case bool() | float():
            yield name, value
        case int() if abs(value) <= _LARGEST:
            yield name, value
        case str() | int():
            yield name, text(value)
        case BaseException() | FailureRecord():
            yield name, error_message(value)
            yield f"{name}_type", error_type(value)
        case tuple():
            yield name, text(", ".join(map(text, cast("tuple[object, ...]", value))))
        case _:
            pass


def level(event: Event) -> str:
    """Return how much an operator should care: debug, info, warning or error."""
    match event:
        case (
            ConfigReloadFailed()
            | CircuitStateChanged(state=CircuitState.OPEN | CircuitState.ISOLATED)
        ):
            return "error"
        case HealthChanged(status=status):
            return _HEALTH_LEVELS.get(status, "warning")
        case RetryGaveUp() | Rejected() | TimedOut() | FallbackUsed() | LoserFailed():
            return "warning"
        case BatchFlushed(error=Exception()):
            return "warning"
        case RetryScheduled() | RejectionSkipped() | CircuitStateChanged() | ConfigReloaded():
            return "info"
        case _:
            return "debug"


_HEALTH_LEVELS: Final = {
    HealthStatus.HEALTHY: "info",
    HealthStatus.DEGRADED: "warning",
    HealthStatus.UNHEALTHY: "error",
}
