"""Retry and time limits: its own, its attempts', its callers', at exact instants."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.test_retry import Script, always, errors, exactly, is_busy
from trio_resilience import (
    Constant,
    OperationsFailedError,
    OperationTimeoutError,
    RetriesExhaustedError,
    Retry,
    RetryStatistics,
    Timeout,
    run_with_limit,
)

if TYPE_CHECKING:
    from trio.testing import MockClock


# --- the deadline of a caller -------------------------------------------------------------------


@pytest.mark.parametrize("limit, ends_at", [(0.5, 0), (1, 0), (1.001, 1), (3, 1), (3.001, 3)])
async def test_it_never_sleeps_into_a_deadline(
    autojump_clock: MockClock, limit: float, ends_at: float
) -> None:
    """A wait that would end at or after it: the last error comes out at once, not `Cancelled`."""
    script = Script([*errors(9)])
    with trio.move_on_after(limit) as scope, pytest.raises(OSError, match="failure") as caught:
        await exactly(max_attempts=None).call(script)
    assert (trio.current_time(), script.began_at[-1]) == (ends_at, ends_at)
    assert not scope.cancelled_caught
    (note,) = caught.value.__notes__
    assert note.startswith("retry: gave up after ")
    assert "deadline" in note


async def test_any_scope_around_the_call_counts(autojump_clock: MockClock) -> None:
    """The effective deadline is the nearest one."""
    with trio.move_on_after(1), trio.move_on_after(99), pytest.raises(OSError, match="failure 1"):
        await exactly().call(Script(errors(2)))
    assert trio.current_time() == 0


async def test_a_shield_hides_the_deadline_outside_of_it(autojump_clock: MockClock) -> None:
    """As it does for everything in trio."""
    with trio.move_on_after(0.5), trio.CancelScope(shield=True):
        assert await exactly().call(Script(errors(1))) == "ok"
    assert trio.current_time() == 1


async def test_refused_results_give_up_before_the_deadline_too(autojump_clock: MockClock) -> None:
    """With the last result."""
    policy = exactly(retry_result=is_busy)
    with trio.move_on_after(1), pytest.raises(RetriesExhaustedError) as caught:
        await policy.call(Script(["busy"] * 9))
    assert (caught.value.last_result, caught.value.attempts) == ("busy", 1)
    assert trio.current_time() == 0


async def test_a_hint_that_ends_after_the_deadline_is_not_waited_for(
    autojump_clock: MockClock,
) -> None:
    """The wait that counts is the one that would be made."""
    error = OSError("busy")
    error.retry_after = 10  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    with trio.move_on_after(5), pytest.raises(OSError, match="busy"):
        await exactly().call(Script([error]))
    assert trio.current_time() == 0


async def test_an_outer_deadline_in_an_attempt_is_a_cancellation(autojump_clock: MockClock) -> None:
    """It belongs to the scope that set it: nothing is retried, counted or noted."""
    policy = exactly(attempt_timeout=5, total_timeout=9)
    script = Script(seconds=60)
    with trio.move_on_after(2) as scope:
        await policy.call(script)
    assert scope.cancelled_caught
    assert (script.calls, trio.current_time()) == (1, 2)
    assert policy.statistics().given_up == 0


@pytest.mark.parametrize("option", ["attempt_timeout", "total_timeout"])
async def test_at_the_same_instant_the_outer_scope_wins(
    autojump_clock: MockClock, option: str
) -> None:
    """No `OperationTimeoutError`, no further attempt."""
    policy = exactly(**{option: 2})
    script = Script(seconds=60)
    with trio.move_on_after(2) as scope:
        await policy.call(script)
    assert scope.cancelled_caught
    assert script.calls == 1
    assert policy.statistics().given_up == 0


# --- attempt_timeout ----------------------------------------------------------------------------


async def test_every_attempt_has_the_same_time(autojump_clock: MockClock) -> None:
    """Waits are not counted; one that finishes in time is a success."""
    seconds = [3.0, 2.5, 1.9]
    began = list[float]()

    async def op() -> str:
        began.append(trio.current_time())
        await trio.sleep(seconds[len(began) - 1])
        return "ok"

    assert await exactly(attempt_timeout=2).call(op) == "ok"
    assert began == [0, 3, 7]
    assert trio.current_time() == 8.9


@pytest.mark.parametrize("option", ["attempt_timeout", "total_timeout"])
async def test_the_cancellation_behind_a_timeout_does_not_show(
    autojump_clock: MockClock, option: str
) -> None:
    """It is our own device: neither a cause nor a context that would be printed."""
    with pytest.raises(OperationTimeoutError) as caught:
        await exactly(max_attempts=1, **{option: 2}).call(trio.sleep_forever)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


async def test_a_result_that_arrives_is_returned_however_late(autojump_clock: MockClock) -> None:
    """An operation that does not see the cancellation has not been cancelled."""

    async def op() -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(5)
        return "late"

    assert await exactly(attempt_timeout=2, total_timeout=3).call(op) == "late"


async def test_the_operation_sees_the_nearest_deadline(autojump_clock: MockClock) -> None:
    """So that what it calls can decide by it."""
    seen = list[float]()

    async def op() -> None:
        seen.append(trio.current_effective_deadline())
        raise OSError("down")

    with pytest.raises(OSError, match="down"):
        await exactly(attempt_timeout=4, total_timeout=6, max_attempts=4).call(op)
    assert seen == [4, 5, 6]
    with pytest.raises(OSError, match="down"):
        await exactly().call(op)
    assert seen[3] == math.inf


async def test_an_operations_own_too_slow_error_is_its_own(autojump_clock: MockClock) -> None:
    """It is retried and comes out as it is, without being taken for a timeout of the policy."""
    own = trio.TooSlowError("of the operation")
    with pytest.raises(trio.TooSlowError) as caught:
        await exactly(attempt_timeout=60, total_timeout=60).call(Script([own] * 3))
    assert caught.value is own


# --- total_timeout ------------------------------------------------------------------------------


async def test_the_total_stops_a_running_attempt(autojump_clock: MockClock) -> None:
    """With the last attempt's error as the cause."""
    failure = OSError("the first attempt")
    script = Script([failure], seconds=2)
    policy = exactly(total_timeout=4)
    with pytest.raises(OperationTimeoutError) as caught:
        await policy.call(script)
    assert (trio.current_time(), script.began_at) == (4, [0, 3])
    assert caught.value.timeout == 4
    assert caught.value.__cause__ is failure
    assert failure.__traceback__ is not None, "a cause is shown with where it came from"
    assert caught.value.__notes__[0].startswith("retry: gave up after 2 attempts")
    assert "total_timeout" in caught.value.__notes__[0]
    assert policy.statistics() == RetryStatistics(1, 2, 0, 1)


async def test_without_an_earlier_error_it_has_no_cause(autojump_clock: MockClock) -> None:
    """The first attempt hangs."""
    with pytest.raises(OperationTimeoutError) as caught:
        await exactly(total_timeout=4).call(trio.sleep_forever)
    assert caught.value.__cause__ is None
    assert trio.current_time() == 4


async def test_no_wait_ends_after_the_total(autojump_clock: MockClock) -> None:
    """At 3 s the next attempt would be at 7: the error comes out at 3, not a timeout at 5."""
    script = Script([*errors(9)])
    with pytest.raises(OSError, match="failure 3"):
        await exactly(max_attempts=None, total_timeout=5).call(script)
    assert script.began_at == [0, 1, 3]
    assert trio.current_time() == 3


@pytest.mark.parametrize("total, ends_at", [(1, 0), (1.5, 1)])
async def test_a_wait_may_not_end_at_the_total_either(
    autojump_clock: MockClock, total: float, ends_at: float
) -> None:
    """The attempt after it would have no time."""
    with pytest.raises(OSError, match="failure"):
        await exactly(total_timeout=total).call(Script([*errors(9)]))
    assert trio.current_time() == ends_at


async def test_the_nearer_of_both_limits_expires(autojump_clock: MockClock) -> None:
    """An attempt's timeout is retried, the total's is not; and each says how long it was."""
    script = Script(seconds=60)
    with pytest.raises(OperationTimeoutError) as caught:
        await exactly(attempt_timeout=3, total_timeout=5).call(script)
    assert caught.value.timeout == 5
    assert isinstance(caught.value.__cause__, OperationTimeoutError)
    assert caught.value.__cause__.timeout == 3
    assert (trio.current_time(), script.began_at) == (5, [0, 4])


def at_once(_: Exception) -> float:
    return 0.0


@pytest.mark.parametrize("on", [Exception, always, at_once])
async def test_the_total_is_never_retried(autojump_clock: MockClock, on: Any) -> None:
    """Whatever *on* says."""
    script = Script(seconds=60)
    with pytest.raises(OperationTimeoutError):
        await exactly(total_timeout=5, on=on).call(script)
    assert (script.calls, trio.current_time()) == (1, 5)


async def test_the_total_counts_from_the_call(autojump_clock: MockClock) -> None:
    """Not from when the policy was made, and anew for each call."""
    policy = exactly(total_timeout=5)
    for start in (100, 200):
        await trio.sleep_until(start)
        with pytest.raises(OperationTimeoutError):
            await policy.call(trio.sleep_forever)
        assert trio.current_time() == start + 5


@pytest.mark.parametrize("option", ["attempt_timeout", "total_timeout"])
async def test_no_time_at_all_lets_an_operation_run_to_its_first_checkpoint(
    autojump_clock: MockClock, option: str
) -> None:
    """Zero is allowed, and means what it says."""
    policy = exactly(max_attempts=1, **{option: 0})

    async def at_once() -> str:
        return "ok"

    assert await policy.call(at_once) == "ok"
    with pytest.raises(OperationTimeoutError):
        await policy.call(trio.sleep_forever)
    assert trio.current_time() == 0


# --- together with others -----------------------------------------------------------------------


async def test_a_timeout_around_a_retry_is_its_deadline(autojump_clock: MockClock) -> None:
    """The retry gives up with its own error while there is time; a hanging attempt times out."""
    with pytest.raises(OSError, match="failure 2"):
        await Timeout(3).call(partial(exactly().call, Script([*errors(9)])))
    assert trio.current_time() == 1
    script = Script([*errors(1)], seconds=1.5)
    with pytest.raises(OperationTimeoutError):
        await Timeout(3).call(partial(exactly().call, script))
    assert (trio.current_time(), script.calls) == (4, 2)


async def test_a_timeout_inside_a_retry_is_an_attempts(autojump_clock: MockClock) -> None:
    """Each attempt has the whole of it."""
    script = Script(seconds=60)
    with pytest.raises(OperationTimeoutError) as caught:
        await exactly().call(partial(Timeout(2, name="slow").call, script))
    assert script.began_at == [0, 3, 7]
    assert caught.value.timeout == 2


@pytest.mark.parametrize("given", [True, False])
async def test_retries_end_in_time_for_the_timeout_of_an_operation(
    autojump_clock: MockClock, given: bool
) -> None:
    """In `run_with_limit`, an operation's own error comes out rather than a timeout."""
    flaky, hanging = Script([*errors(9)]), Script([OSError("once")], seconds=1.5)
    async with trio.open_nursery() as nursery:
        with pytest.raises(OperationsFailedError) as caught:
            await run_with_limit(
                nursery if given else None,
                [flaky, hanging],
                policy=exactly(max_attempts=None),
                timeout=3,
                on_error="continue",
            )
    first, second = caught.value.exceptions
    assert str(first) == "failure 2"
    assert [note.partition(" ")[0] for note in first.__notes__] == ["retry:", "operation"]
    assert isinstance(second, OperationTimeoutError)
    assert (flaky.began_at, hanging.began_at) == ([0, 1], [0, 2.5])
    assert trio.current_time() == 3


async def test_a_retry_keeps_its_slot_while_it_waits(autojump_clock: MockClock) -> None:
    """One at a time: the second operation starts when the first has succeeded."""
    first, second = Script([*errors(2)]), Script()
    policy = Retry(backoff=Constant(5))
    await run_with_limit(None, [first, second], max_concurrency=1, policy=policy)
    assert (first.began_at, second.began_at) == ([0, 5, 10], [10])
