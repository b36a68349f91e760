"""The tree of errors: what they are caught as, what they say, and that they survive the journey."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import outcome
import pytest
import trio

from trio_resilience import (
    BulkheadFullError,
    CallAbandonedError,
    CircuitOpenError,
    ConfigError,
    FailureRecord,
    OperationsCancelledError,
    OperationsFailedError,
    OperationTimeoutError,
    ProbeFailedError,
    RateLimitExceededError,
    RejectedError,
    ResilienceError,
    RetriesExhaustedError,
)

RECORD = FailureRecord("OSError", "no route", 12.5)


def group() -> OperationsFailedError:
    error = OperationsFailedError("1 of 2 operations failed", [OSError("down")])
    error.outcomes = (outcome.Value(3), outcome.Error(error.exceptions[0]))
    return error


# Each with the attributes that a handler reads.
EXAMPLES: list[tuple[ResilienceError, dict[str, Any]]] = [
    (ResilienceError("anything"), {}),
    (RejectedError(), {"retry_after": None}),
    (RejectedError(2.5), {"retry_after": 2.5}),
    (
        BulkheadFullError("db", 10, 11, 1.5),
        {"name": "db", "capacity": 10, "requested": 11, "retry_after": 1.5},
    ),
    (
        CircuitOpenError("db", 3.0, RECORD),
        {"name": "db", "retry_after": 3.0, "last_failure": RECORD},
    ),
    (CircuitOpenError("db"), {"name": "db", "retry_after": None, "last_failure": None}),
    (RateLimitExceededError(0.25), {"retry_after": 0.25}),
    (OperationTimeoutError(5, "fetch"), {"timeout": 5, "name": "fetch"}),
    (OperationTimeoutError(5), {"timeout": 5}),
    (CallAbandonedError("db"), {"name": "db"}),
    (ProbeFailedError("db"), {"name": "db"}),
    (OperationsCancelledError(), {"failures": ()}),
    (RetriesExhaustedError({"status": 503}, 3), {"last_result": {"status": 503}, "attempts": 3}),
    (ConfigError(["a.b: wrong", "c: unknown"]), {"errors": ("a.b: wrong", "c: unknown")}),
]

each = pytest.mark.parametrize("error, fields", EXAMPLES, ids=lambda value: type(value).__name__)


def reborn(error: BaseException, protocol: int = pickle.HIGHEST_PROTOCOL) -> Any:
    return pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - it is our own


@pytest.mark.parametrize(
    "error, parents",
    [
        (ResilienceError, [Exception]),
        (RejectedError, [ResilienceError]),
        (BulkheadFullError, [RejectedError]),
        (CircuitOpenError, [RejectedError]),
        (RateLimitExceededError, [RejectedError]),
        (OperationTimeoutError, [ResilienceError, trio.TooSlowError]),
        (CallAbandonedError, [ResilienceError]),
        (ProbeFailedError, [ResilienceError]),
        (OperationsFailedError, [ResilienceError, ExceptionGroup]),
        (OperationsCancelledError, [ResilienceError]),
        (RetriesExhaustedError, [ResilienceError]),
        (ConfigError, [ResilienceError]),
    ],
)
def test_errors_are_caught_by_meaning(error: type, parents: list[type]) -> None:
    """The tree is the documented one."""
    assert all(issubclass(error, parent) for parent in parents)


@pytest.mark.parametrize(
    "error",
    [
        OperationTimeoutError,
        CallAbandonedError,
        OperationsFailedError,
        OperationsCancelledError,
        RetriesExhaustedError,
        ConfigError,
    ],
)
def test_what_did_run_is_no_rejection(error: type) -> None:
    """A `RejectedError` promises that nothing was run."""
    assert not issubclass(error, RejectedError)


@each
def test_fields_are_attributes(error: ResilienceError, fields: dict[str, Any]) -> None:
    """A handler reads data, it does not parse messages."""
    assert {name: getattr(error, name) for name in fields} == fields


@each
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_pickle(error: ResilienceError, fields: dict[str, Any], protocol: int) -> None:
    """Type, arguments, attributes and message survive, in every protocol."""
    again = reborn(error, protocol)
    assert type(again) is type(error)
    assert again.args == error.args
    assert {name: getattr(again, name) for name in fields} == fields
    assert str(again) == str(error)


@each
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_errors_can_be_copied(
    error: ResilienceError, fields: dict[str, Any], duplicate: Any
) -> None:
    """The copy is another object that says the same."""
    again = duplicate(error)
    assert again is not error
    assert type(again) is type(error)
    assert {name: getattr(again, name) for name in fields} == fields
    assert str(again) == str(error)


@each
def test_notes_and_own_attributes_travel_too(
    error: ResilienceError, fields: dict[str, Any]
) -> None:
    """What was tried is said by the notes: a pickled error without them would say less."""
    noted = copy.copy(error)
    noted.add_note("retry: gave up after 3 attempts in 3.0 s")
    noted.request_id = 7  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    again = reborn(noted)
    assert again.__notes__ == ["retry: gave up after 3 attempts in 3.0 s"]
    assert again.request_id == 7
    assert not hasattr(error, "request_id")


def test_a_group_pickles_with_its_outcomes() -> None:
    """The failures and what did succeed."""
    error = group()
    for again in (reborn(error), copy.copy(error)):
        assert isinstance(again, OperationsFailedError)
        assert again.message == error.message
        (leaf,) = again.exceptions
        assert isinstance(leaf, OSError)
        assert leaf.args == ("down",)
        value, failed = again.outcomes
        assert value == outcome.Value(3)
        assert isinstance(failed, outcome.Error)
        assert failed.error.args == ("down",)


def test_cancelled_operations_pickle_with_their_failures() -> None:
    """Exceptions do not compare equal, so their parts are looked at."""
    again = reborn(OperationsCancelledError([OSError("down"), KeyError("x")]))
    assert [(type(failure), failure.args) for failure in again.failures] == [
        (OSError, ("down",)),
        (KeyError, ("x",)),
    ]


class Unpicklable(Exception):  # noqa: N818 - the name is what the test is about
    """As of many a client library: it needs more arguments than it keeps."""

    def __init__(self, code: int, *, response: object) -> None:
        super().__init__(f"status {code}")
        self.response = response


def caused_by(cause: BaseException) -> OperationTimeoutError:
    error = OperationTimeoutError(5, "fetch")
    error.__cause__ = cause
    return error


def test_the_cause_is_pickled() -> None:
    """Python drops it; but it says what went wrong."""
    again = reborn(caused_by(OSError("down")))
    assert type(again.__cause__) is OSError
    assert again.__cause__.args == ("down",)


@pytest.mark.parametrize(
    "cause",
    [Unpicklable(503, response=lambda: None), Unpicklable(503, response=3)],
    ids=["pickling fails", "unpickling fails"],
)
def test_of_a_cause_that_cannot_be_pickled_the_text_is_kept(cause: BaseException) -> None:
    """Whether it can't be taken apart or can't be put together again."""
    again = reborn(caused_by(cause))
    assert type(again) is OperationTimeoutError
    assert "Unpicklable" in str(again.__cause__)
    assert "status 503" in str(again.__cause__)


def test_copying_keeps_what_the_cause_said() -> None:
    """A copy is as good an explanation as the original."""
    again = copy.copy(caused_by(Unpicklable(503, response=lambda: None)))
    assert "status 503" in str(again.__cause__)


def test_pickling_changes_nothing_in_the_original() -> None:
    """Its cause and its own attributes stay what they were."""
    error = caused_by(Unpicklable(503, response=lambda: None))
    before, cause = dict(vars(error)), error.__cause__
    reborn(error)
    assert vars(error) == before
    assert error.__cause__ is cause


@pytest.mark.parametrize(
    "error, message",
    [
        (RejectedError(), "the call was refused"),
        (RejectedError(1.23456), "the call was refused; try again in 1.23 s"),
        (RejectedError(0.0), "the call was refused; try again in 0 s"),
        (
            BulkheadFullError("db", 10, 11),
            "db is full: it has room for 10 calls, running and waiting, and this would make 11",
        ),
        (CircuitOpenError("db"), "circuit 'db' is open"),
        (
            CircuitOpenError("db", 3, RECORD),
            "circuit 'db' is open; try again in 3 s; last failure: OSError: no route",
        ),
        (RateLimitExceededError(0.5), "the rate limit is reached; try again in 0.5 s"),
        (OperationTimeoutError(1.5, "fetch"), "fetch took longer than 1.5 s"),
        (OperationTimeoutError(60), "the operation took longer than 60 s"),
        (CallAbandonedError("db"), "the call was abandoned: circuit 'db' opened while it ran"),
        (OperationsCancelledError(), "the nursery that the operations ran in was cancelled"),
        (
            OperationsCancelledError([OSError()]),
            "the nursery that the operations ran in was cancelled; 1 of them had failed",
        ),
        (
            RetriesExhaustedError(0, 1),
            "no acceptable result after 1 attempt; the last one was 0",
        ),
        (
            RetriesExhaustedError("", 4),
            "no acceptable result after 4 attempts; the last one was ''",
        ),
        (ConfigError(["a: x", "b: y"]), "a: x\nb: y"),
        (group(), "1 of 2 operations failed (1 sub-exception)"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_messages_say_what_happened_in_words(error: ResilienceError, message: str) -> None:
    """One line each, with units, and when to come back if that is known."""
    assert str(error) == message


def test_messages_are_built_when_they_are_read() -> None:
    """A rejection that nobody prints costs no formatting: a result is shown only on demand."""

    class Result:
        shown = 0

        def __repr__(self) -> str:
            self.shown += 1
            return "the result"

    result = Result()
    error = RetriesExhaustedError(result, 2)
    assert result.shown == 0
    assert "the result" in str(error)
    assert result.shown == 1


def test_except_star_takes_the_group_apart() -> None:
    """The parts keep the type and the outcomes."""
    error = OperationsFailedError("2 of 2 operations failed", [OSError("a"), KeyError("b")])
    error.outcomes = tuple(outcome.Error(leaf) for leaf in error.exceptions)
    match, rest = error.split(OSError)
    assert isinstance(match, OperationsFailedError)
    assert isinstance(rest, OperationsFailedError)
    assert match.outcomes == rest.outcomes == error.outcomes
    caught = list[object]()
    try:
        raise error
    except* OSError as part:
        caught.append(part)
    except* KeyError as part:
        caught.append(part)
    assert [type(part) for part in caught] == [OperationsFailedError] * 2


def test_a_timeout_of_ours_is_told_from_trios_own() -> None:
    """`except trio.TooSlowError` catches both, `except OperationTimeoutError` ours alone."""
    assert isinstance(OperationTimeoutError(1), trio.TooSlowError)
    assert not isinstance(trio.TooSlowError(), OperationTimeoutError)
