"""Which errors deserve another try, and how long the other side asks to wait."""

from __future__ import annotations

import errno
import http
import json
import math
import socket
import ssl
import subprocess
from typing import TYPE_CHECKING, Any

import pytest
import trio

from trio_resilience import (
    BulkheadFullError,
    CallAbandonedError,
    CircuitOpenError,
    ConfigError,
    Constant,
    OperationsCancelledError,
    OperationsFailedError,
    OperationTimeoutError,
    RateLimitExceededError,
    RejectedError,
    Retry,
    RetryScheduled,
    transient,
)
from trio_resilience._classify import retry_after_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock


class Bag:
    """An object with the attributes it is given, as responses of HTTP clients are."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


class AnswerError(Exception):
    """An error with the attributes it is given, as those of HTTP clients are."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__("an answer")
        vars(self).update(attributes)


async def calls_made(error: Exception, **options: Any) -> int:
    """How many calls a policy makes when every one of them raises *error*."""
    calls = 0

    async def op() -> None:
        nonlocal calls
        calls += 1
        raise error

    options = {"backoff": Constant(1), **options}
    with pytest.raises(type(error)) as caught:
        await Retry(**options).call(op)
    assert caught.value is error
    return calls


async def waited(error: Exception, **options: Any) -> float | None:
    """How long a policy waits after *error*; ``None`` if it gives up instead."""
    delays = list[float]()

    async def op() -> None:
        if not delays:
            raise error

    def on_retry(event: RetryScheduled) -> None:
        delays.append(event.delay)

    options = {"backoff": Constant(1), "on_retry": on_retry, **options}
    start = trio.current_time()
    try:
        await Retry(**options).call(op)
    except type(error) as caught:
        assert caught is error  # noqa: PT017 - that it was raised is one of the two good ends
        assert trio.current_time() == start
        return None
    assert trio.current_time() - start == pytest.approx(delays[0])
    return delays[0]


# --- transient ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(),
        ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        TimeoutError(),
        OSError(errno.EHOSTUNREACH, "no route"),
        OSError("out of descriptors"),
        socket.gaierror(socket.EAI_AGAIN, "try again"),
        ssl.SSLError(1, "handshake failed"),
        trio.BrokenResourceError(),
        trio.TooSlowError(),
        OperationTimeoutError(1),
        Exception("of some client library"),
        RuntimeError("likewise"),
        AnswerError(),
    ],
    ids=repr,
)
def test_an_unknown_error_is_transient(error: Exception) -> None:
    """Most of what goes wrong over a network derives from nothing common."""
    assert transient(error)


@pytest.mark.parametrize(
    "error",
    [
        TypeError(),
        ValueError(),
        NameError(),
        json.JSONDecodeError("bad", "", 0),
        ssl.SSLCertVerificationError(1, "expired"),
        LookupError(),
        KeyError(),
        IndexError(),
        ArithmeticError(),
        ZeroDivisionError(),
        AssertionError(),
        NotImplementedError(),
        RecursionError(),
        ImportError(),
        AttributeError(),
        StopIteration(),
        StopAsyncIteration(),
        UserWarning(),
    ],
    ids=repr,
)
def test_a_programming_error_is_not(error: Exception) -> None:
    """The program would be as wrong the second time."""
    assert not transient(error)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(),
        FileExistsError(),
        PermissionError(),
        IsADirectoryError(),
        NotADirectoryError(),
        OSError(errno.ENOSPC, "disk full"),
        OSError(errno.EROFS, "read-only"),
    ],
    ids=repr,
)
def test_what_the_file_system_refuses_is_not(error: Exception) -> None:
    """The file will not be there the second time."""
    assert not transient(error)


@pytest.mark.parametrize(
    "error",
    [
        RejectedError(),
        BulkheadFullError("db", 1, 2),
        CircuitOpenError("db", 1.0),
        RateLimitExceededError(1.0),
        CallAbandonedError("db"),
        ConfigError(["wrong"]),
        OperationsCancelledError(),
    ],
    ids=repr,
)
def test_our_own_refusals_are_not(error: Exception) -> None:
    """To retry into an open circuit, or what was abandoned or cancelled, defeats its purpose."""
    assert not transient(error)


RETRYABLE = {408, 425, 429, 500, 502, 503, 504}
SHAPES: dict[str, Callable[[object], Exception]] = {
    "status": lambda value: AnswerError(status=value),
    "status_code": lambda value: AnswerError(status_code=value),
    "response.status_code": lambda value: AnswerError(response=Bag(status_code=value)),
    "response.status": lambda value: AnswerError(response=Bag(status=value)),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_http_status_decides(shape: Callable[[object], Exception]) -> None:
    """Only those that ask to come back, or tell of a passing state of the server."""
    assert {status for status in range(100, 600) if transient(shape(status))} == RETRYABLE
    assert transient(shape(http.HTTPStatus.SERVICE_UNAVAILABLE))
    assert not transient(shape(http.HTTPStatus.NOT_FOUND))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("value", [None, True, "404", "down", 0, 4, 1000, 4.5, [404], print])
def test_what_is_no_http_status_decides_nothing(
    shape: Callable[[object], Exception], value: object
) -> None:
    """`status` may mean anything elsewhere: an exit status, a word, a method."""
    assert transient(shape(value))


class Shy(Exception):  # noqa: N818 - it stands for a client's own
    """As httpx's errors do, it raises when its response is asked for too early."""

    @property
    def response(self) -> object:
        raise RuntimeError("no response has been set")


def test_attributes_that_raise_are_as_good_as_missing() -> None:
    """An error must be classified, not replaced."""
    assert transient(Shy())
    assert retry_after_of(Shy(), lambda: 0.0) is None


@pytest.mark.parametrize(
    "parts, expected",
    [
        ([OSError("a")], True),
        ([OSError("a"), ValueError("b")], False),
        ([ExceptionGroup("in", [ExceptionGroup("in", [ValueError("b")])])], False),
    ],
)
def test_transient_understands_a_group_by_itself(parts: list[Exception], expected: bool) -> None:
    """It is public, so a user's own predicate may call it with whatever was raised."""
    assert transient(ExceptionGroup("several", parts)) is expected


# --- on= ----------------------------------------------------------------------------------------


def answering(answer: object) -> Callable[[Exception], Any]:
    """A predicate that always says the same."""

    def predicate(_: Exception) -> Any:
        return answer

    return predicate


def is_deadlock(error: Exception) -> bool:
    return "deadlock" in str(error)


ON_CASES: list[tuple[Any, Exception, int]] = [
    (OSError, ConnectionError(), 3),
    (OSError, ValueError(), 1),
    (Exception, ValueError(), 3),
    (is_deadlock, ValueError("deadlock found"), 3),
    (is_deadlock, ValueError("no"), 1),
    ((), OSError(), 1),
    ((OSError, KeyError), KeyError(), 3),
    ((OSError, is_deadlock), ValueError("deadlock"), 3),
    ((OSError, is_deadlock), ValueError("no"), 1),
    ((transient, is_deadlock), ValueError("deadlock"), 3),
    ((transient, (is_deadlock, (KeyError,))), KeyError(), 3),
    (transient, CircuitOpenError("db"), 1),
    ((transient, RejectedError), CircuitOpenError("db"), 3),
    (transient, AnswerError(status=404), 1),
    (answering("yes"), OSError(), 3),
    (answering([]), OSError(), 1),
    (answering(None), OSError(), 1),
]


@pytest.mark.parametrize("on, error, calls", ON_CASES)
async def test_types_predicates_and_tuples_of_them(
    autojump_clock: MockClock, on: Any, error: Exception, calls: int
) -> None:
    """One of them that says yes is enough; what a predicate returns counts by its truth."""
    assert await calls_made(error, on=on) == calls


@pytest.mark.parametrize(
    "on",
    [
        BaseException,
        KeyboardInterrupt,
        SystemExit,
        GeneratorExit,
        trio.Cancelled,
        BaseExceptionGroup,
        (OSError, KeyboardInterrupt),
        (OSError, (BaseException,)),
        int,
        "OSError",
        5,
        None,
        [OSError],
        OSError("an instance"),
        (OSError, "deadlock"),
        trio.sleep,
    ],
    ids=repr,
)
def test_what_is_neither_type_nor_predicate_is_refused(on: Any) -> None:
    """Types that are no `Exception`s as well: what stops a program is never retried."""
    with pytest.raises(TypeError, match=r"^`on` must be an Exception type, a function"):
        Retry(on=on)


@pytest.mark.parametrize(
    "answer, expected",
    [(True, 1.0), (5.0, 5.0), (5, 5.0), (0.0, 0.0), (0, 0.0), (0.25, 0.25), (False, None)],
)
async def test_a_predicate_may_say_how_long_to_wait(
    autojump_clock: MockClock, answer: float, expected: float | None
) -> None:
    """A number takes the place of the backoff, and 0.0 means now; only False itself is a no."""
    assert await waited(OSError(), on=answering(answer)) == expected


@pytest.mark.parametrize("answer", [-1, -0.5, math.nan])
async def test_a_wait_that_is_none_is_a_mistake(autojump_clock: MockClock, answer: float) -> None:
    """Negative or NaN: a ValueError, and no further call."""
    with pytest.raises(ValueError, match=r"predicate must return .* seconds >= 0, got"):
        await Retry(on=answering(answer)).call(raises(OSError()))


def raises(error: Exception) -> Callable[[], Any]:
    async def op() -> None:
        raise error

    return op


@pytest.mark.parametrize("answer", [math.inf, 1e400, 10**400], ids=["inf", "float", "int"])
async def test_an_infinite_wait_means_no(autojump_clock: MockClock, answer: float) -> None:
    """It would end after every deadline."""
    assert await waited(OSError(), on=answering(answer)) is None


# --- groups -------------------------------------------------------------------------------------


def nested(*leaves: Exception) -> ExceptionGroup[Exception]:
    return ExceptionGroup("1", [ExceptionGroup("2", [ExceptionGroup("3", leaves)]), leaves[0]])


@pytest.mark.parametrize(
    "on, error, calls",
    [
        (OSError, ExceptionGroup("", [OSError("a"), ConnectionError("b")]), 3),
        (OSError, ExceptionGroup("", [OSError("a"), ValueError("b")]), 1),
        (transient, ExceptionGroup("", [OSError("a"), ValueError("b")]), 1),
        (transient, nested(OSError("a"), AnswerError(status=503)), 3),
        (transient, nested(OSError("a"), AnswerError(status=404)), 1),
        ((OSError, KeyError), ExceptionGroup("", [OSError("a"), KeyError("b")]), 3),
        ((OSError, OperationsFailedError), OperationsFailedError("", [ValueError("b")]), 3),
        ((OSError, OperationsFailedError), ExceptionGroup("", [ValueError("b")]), 1),
        (is_deadlock, nested(OSError("deadlock"), OSError("deadlock")), 3),
        (is_deadlock, nested(OSError("deadlock"), OSError("no")), 1),
        (Exception, nested(ValueError("a"), KeyError("b")), 3),
    ],
)
async def test_a_group_is_judged_by_all_its_leaves(
    autojump_clock: MockClock, on: Any, error: Exception, calls: int
) -> None:
    """However deep: one leaf that does not match is fatal, unless the group's own type does."""
    assert await calls_made(error, on=on) == calls


async def test_of_several_waits_in_a_group_the_longest_counts(autojump_clock: MockClock) -> None:
    """Among the numbers of a predicate."""
    waits = {"a": 3.0, "b": 7.0, "c": 0.0}
    group = nested(OSError("a"), OSError("b"), OSError("c"))

    def wait_for(error: Exception) -> float:
        return waits[str(error)]

    assert await waited(group, on=wait_for) == 7.0


async def test_except_star_works_on_what_comes_out(autojump_clock: MockClock) -> None:
    """The group is the one that was raised, untouched."""
    caught = list[int]()
    try:
        await Retry(backoff=Constant(1)).call(raises(nested(OSError("a"), EOFError())))
    except* OSError as part:
        caught.append(len(part.exceptions))
    except* EOFError as part:
        caught.append(len(part.exceptions))
    assert caught == [2, 1]


@pytest.mark.parametrize("code", [0, 4, 127])
def test_an_exit_status_is_no_http_status(code: int) -> None:
    """The exit status of a process is called otherwise and decides nothing."""
    assert transient(subprocess.CalledProcessError(code, "cmd"))
