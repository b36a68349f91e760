"""Which errors and results deserve another try, and how long the other side asks to wait."""

from __future__ import annotations

import errno
import math
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, timedelta
from typing import Any, TypeAlias, cast, final

import attrs

from trio_resilience._algorithms._retry_rule import Verdict
from trio_resilience._checks import is_async
from trio_resilience._errors import (
    CallAbandonedError,
    ConfigError,
    OperationsCancelledError,
    RejectedError,
)

Predicate: TypeAlias = Callable[[Exception], Verdict]
ErrorMatch: TypeAlias = type[Exception] | Predicate | tuple["ErrorMatch", ...]

_HTTP_STATUS = range(100, 600)
_RETRYABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

_PERMANENT = (
    # The program is wrong: it will be wrong again.
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    ImportError,
    LookupError,
    MemoryError,
    NameError,
    NotImplementedError,
    RecursionError,
    ReferenceError,
    StopAsyncIteration,
    StopIteration,
    SyntaxError,
    SystemError,
    TypeError,
    ValueError,
    Warning,
    # The file system, or the process table, says no.
    ChildProcessError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    ProcessLookupError,
    # Another try would defeat the purpose of these.
    CallAbandonedError,
    ConfigError,
    OperationsCancelledError,
    RejectedError,
)

_PERMANENT_ERRNO = frozenset(
    {errno.EFBIG, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOSPC, errno.ENOTEMPTY, errno.EROFS}
)


def transient(error: Exception) -> bool:
    """Say yes to an error, unless it is known that another try would end the same way.

    It says no to programming errors (`TypeError`, `ValueError`, `LookupError`, …), to what the file
    system refuses (`FileNotFoundError`, `PermissionError`, …), to this library's own refusals
    (to try again into an open circuit defeats failing fast), and to an HTTP status (``.status``,
    ``.status_code``, or those of ``.response``) other than 408, 425, 429, 500, 502, 503, 504.

    A list of what may be retried would miss most of what happens: the errors of HTTP clients,
    `trio.BrokenResourceError` and users' own derive from nothing common.
    """
    if isinstance(error, ExceptionGroup):
        return all(map(transient, cast("ExceptionGroup[Exception]", error).exceptions))
    if isinstance(error, _PERMANENT):
        return False
    if isinstance(error, OSError) and error.errno in _PERMANENT_ERRNO:
        return False
    status = _status(error)
    return status is None or status in _RETRYABLE_STATUS


@final
@attrs.frozen(eq=False, repr=False)
class Classifier:
    """Types and predicates as one question: whether an error deserves another try."""

    types: tuple[type[Exception], ...]
    predicates: tuple[Predicate, ...]

    @classmethod
    def of(cls, name: str, match: ErrorMatch) -> Classifier:
        """Build a classifier of what a user passed as *name*, or refuse it."""
        parts = tuple(_flatten(match))
        for part in parts:
            if not _is_error_type(part) and not _is_predicate(part):
                raise TypeError(
                    f"`{name}` must be an Exception type, a function of an exception, or a tuple"
                    f" of such, got {part!r}"
                )
        types = tuple(part for part in parts if isinstance(part, type))
        return cls(types, tuple(part for part in parts if not isinstance(part, type)))

    def judge(self, error: Exception) -> Verdict:
        """Return the verdict on *error*: on a group, that of its leaves.

        One leaf that is not matched is enough for a no; the longest of several waits counts.
        """
        if not isinstance(error, ExceptionGroup):
            return self._judge_leaf(error)
        if any(issubclass(kind, ExceptionGroup) and isinstance(error, kind) for kind in self.types):
            return True  # it was asked for by the group's own type
        group = cast("ExceptionGroup[Exception]", error)
        verdicts = [self.judge(part) for part in group.exceptions]
        return False if any(verdict is False for verdict in verdicts) else _longest(verdicts)

    def _judge_leaf(self, error: Exception) -> Verdict:
        verdicts = [verdict_of(predicate(error)) for predicate in self.predicates]
        verdicts.append(isinstance(error, self.types))
        return _longest([verdict for verdict in verdicts if verdict is not False])


def _longest(verdicts: list[Verdict]) -> Verdict:
    waits = [verdict for verdict in verdicts if not isinstance(verdict, bool)]
    return max(waits) if waits else bool(verdicts)


def verdict_of(answer: object) -> Verdict:
    """Return what a user's predicate answered as a verdict; 0.0 is a yes, to be tried at once."""
    if isinstance(answer, bool) or not isinstance(answer, (int, float)):
        return bool(answer)
    if not answer >= 0:  # written this way round so that NaN fails too
        raise ValueError(f"a predicate must return True, False or seconds >= 0, got {answer!r}")
    return _float(answer)


def _flatten(match: object) -> Iterator[Any]:
    if isinstance(match, tuple):
        for part in cast("tuple[object, ...]", match):
            yield from _flatten(part)
    else:
        yield match


def _is_error_type(part: object) -> bool:
    return isinstance(part, type) and issubclass(part, Exception)


def _is_predicate(part: object) -> bool:
    return callable(part) and not isinstance(part, type) and not is_async(part)


# --- what an HTTP response says -----------------------------------------------------------------


def retry_after_of(answer: object, wall_clock: Callable[[], float]) -> float | None:
    """Return how many seconds *answer*, an error or a response, asks to wait before another try.

    It is read from ``.retry_after``, or from a ``Retry-After`` header of the answer or its
    ``.response``: seconds or an HTTP date (RFC 9110, 10.2.3). Of a group, the longest counts. What
    can't be understood is ignored. A date is compared with the response's own ``Date``, or else
    with *wall_clock*, in seconds since the epoch.
    """
    if isinstance(answer, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", answer)
        parts = [retry_after_of(part, wall_clock) for part in group.exceptions]
        return max((part for part in parts if part is not None), default=None)
    told = _look(answer, "retry_after")
    if isinstance(told, timedelta):
        told = told.total_seconds()
    if isinstance(told, (int, float)) and not isinstance(told, bool):
        told = _float(told)
        return told if told >= 0 else None
    for source in (answer, _look(answer, "response")):
        headers = _look(source, "headers")
        text = _header(headers, "Retry-After")
        if text is not None:
            now = _seconds_of_date(_header(headers, "Date") or "")
            return _parse_retry_after(text, wall_clock() if now is None else now)
    return None


def _parse_retry_after(text: str, now: float) -> float | None:
    text = text.strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    date = _seconds_of_date(text)
    if date is not None:
        return max(0.0, date - now)
    # Two headers that a client has joined: believe the longer wait.
    parts = text.split(",") if "," in text else []
    waits = [float(part) for part in parts if re.fullmatch(r"\s*[0-9]+\s*", part)]
    return max(waits, default=None)


def _seconds_of_date(text: str) -> float | None:
    from email.utils import parsedate_to_datetime  # noqa: PLC0415 - large, and seldom needed

    try:
        date = parsedate_to_datetime(text)
        return (date.replace(tzinfo=UTC) if date.tzinfo is None else date).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def _status(error: Exception) -> int | None:
    for source in (error, _look(error, "response")):
        for name in ("status", "status_code"):
            value = _look(source, name)
            if isinstance(value, int) and value in _HTTP_STATUS:
                return int(value)
    return None


def _header(headers: object, name: str) -> str | None:
    get = _look(headers, "get")
    if not isinstance(headers, Mapping) and not callable(get):
        return None
    for spelling in (name, name.lower()):  # a plain dict knows only one of them
        try:
            value: object = get(spelling)  # type: ignore[operator]
        except Exception:  # noqa: BLE001 - a foreign object that is no mapping of headers after all
            return None
        if isinstance(value, str):
            return value
        if isinstance(value, (int, float)):
            return str(_float(value))
    return None


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _look(source: object, name: str) -> object:
    try:
        return getattr(source, name, None)
    except Exception:  # noqa: BLE001 - a foreign property may raise anything (httpx: RuntimeError)
        return None
