"""Say in a few words why a request failed, and whether another try makes sense."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Final

import httpx2
import trio

from trio_resilience import OperationTimeoutError, ResilienceError, transient

if TYPE_CHECKING:
    from collections.abc import Iterator


class BadURLError(ValueError):
    """A line of the input is no URL."""


FINAL_ERRORS: Final = (
    httpx2.UnsupportedProtocol,  # a redirect to what is neither http nor https
    httpx2.TooManyRedirects,
    httpx2.DecodingError,
    OSError,  # of the disk: what the network raises comes as an error of httpx2
)
"""What comes back the same however often it is tried."""


def is_worth_retrying(error: Exception) -> bool | float:
    """Return whether another try may succeed: `transient`, with what is known about HTTP."""
    if isinstance(error, FINAL_ERRORS) or any(
        isinstance(reason, ssl.CertificateError) for reason in _reasons(error)
    ):
        return False
    return transient(error)


def cause(error: BaseException | None) -> str:
    """Return a label to count the error under."""
    match error:
        case httpx2.HTTPStatusError():
            return str(error.response.status_code)
        case trio.TooSlowError() | httpx2.TimeoutException():
            return "timed out"
        case httpx2.ConnectError():
            return "could not connect"
        case httpx2.TransportError():
            return "connection dropped"
        case _:
            return type(error).__name__


def explain(error: BaseException) -> str:
    """Return the error as one line for a person."""
    if isinstance(error, httpx2.HTTPStatusError):
        return f"{error.response.status_code} {error.response.reason_phrase}".strip()
    # The errors of httpx2 are often empty, and what they come from is not.
    message = next((text for reason in _reasons(error) if (text := _one_line(reason))), "")
    if isinstance(error, OperationTimeoutError):
        return f"timed out after {error.timeout:g} s"
    if isinstance(error, (ResilienceError, BadURLError)):
        return message
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _reasons(error: BaseException | None) -> Iterator[Exception]:
    """Yield the error, what it comes from, and so on; a cancellation is where a timeout starts."""
    while isinstance(error, Exception):
        yield error
        error = error.__cause__ or error.__context__
