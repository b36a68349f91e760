"""The functions that Retry is given: what they are told, and what becomes of their own errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.test_retry import Script, errors, exactly, is_busy
from trio_resilience import RetryScheduled, RetryStatistics

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from trio.testing import MockClock


async def test_on_retry_is_told_before_each_wait(autojump_clock: MockClock) -> None:
    """With the record of what happened; not before the first attempt, nor when giving up."""
    told = list[tuple[float, RetryScheduled]]()
    given = errors(3)

    def on_retry(event: RetryScheduled) -> None:
        told.append((trio.current_time(), event))

    policy = exactly(on_retry=on_retry, name="db")
    with pytest.raises(OSError, match="failure 3"):
        await policy.call(Script([*given]), name="load")
    assert [(at, event.attempt, event.delay) for at, event in told] == [(0, 1, 1), (1, 2, 2)]
    first = told[0][1]
    assert isinstance(first, RetryScheduled)
    assert first.error is given[0]
    assert (first.policy, first.operation, first.result) == ("db", "load", None)


async def test_on_retry_is_told_of_refused_results(autojump_clock: MockClock) -> None:
    """They have no error."""
    told = list[RetryScheduled]()
    policy = exactly(on_retry=told.append, retry_result=is_busy)
    await policy.call(Script(["busy"]))
    assert [(event.error, event.result) for event in told] == [(None, "busy")]


async def test_an_on_retry_that_raises_changes_nothing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is reported once, by logging, and called again the next time."""
    called = list[int]()

    def on_retry(event: RetryScheduled) -> None:
        called.append(event.attempt)
        raise ZeroDivisionError("in the hook")

    script = Script([*errors(3)])
    assert await exactly(max_attempts=5, on_retry=on_retry).call(script) == "ok"
    assert (called, script.began_at) == ([1, 2, 3], [0, 1, 3, 7])
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "in the hook" in caplog.text


# --- questions that are answered by an error ----------------------------------------------------


def judge(_: Exception) -> bool:
    raise ZeroDivisionError("in the hook")


def refuse(_: object) -> bool:
    raise ZeroDivisionError("in the hook")


def backoff(_: Random) -> Iterator[float]:
    raise ZeroDivisionError("in the hook")


@pytest.mark.parametrize("options", [{"on": judge}, {"backoff": backoff}], ids=["on", "backoff"])
@pytest.mark.parametrize("limits", [{}, {"attempt_timeout": 5}], ids=["plain", "timed"])
async def test_a_question_that_raises_ends_the_call(
    autojump_clock: MockClock, options: dict[str, Any], limits: dict[str, Any]
) -> None:
    """Its error is a mistake in the program: it comes out, and shows the operation's as well."""
    script, (failure,) = Script(), errors(1)
    script.steps.append(failure)
    policy = exactly(**options, **limits)
    with pytest.raises(ZeroDivisionError, match="in the hook") as caught:
        await policy.call(script)
    assert caught.value.__context__ is failure
    assert (script.calls, trio.current_time()) == (1, 0)
    assert policy.statistics() == RetryStatistics(1, 1, 0, 0)


async def test_a_question_about_a_result_that_raises_ends_the_call_too(
    autojump_clock: MockClock,
) -> None:
    """At whatever attempt; the failures before it are no context of it."""
    script = Script([*errors(2), "fine"])
    with pytest.raises(ZeroDivisionError, match="in the hook") as caught:
        await exactly(retry_result=refuse).call(script)
    assert caught.value.__context__ is None
    assert script.calls == 3
