"""`async for attempt in retry.attempts()`: the form for a block rather than a function."""

from __future__ import annotations

import gc
import inspect
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import Steps
from tests.test_retry import always, errors, exactly, is_busy
from trio_resilience import (
    OperationTimeoutError,
    RetriesExhaustedError,
    Retry,
    RetryStatistics,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from trio.testing import MockClock


async def test_the_block_is_repeated_until_it_succeeds(autojump_clock: MockClock) -> None:
    """Attempts are numbered from one; the loop ends after the first success."""
    seen = list[tuple[int, float]]()
    policy = exactly(max_attempts=5)
    async for attempt in policy.attempts():
        with attempt:
            seen.append((attempt.number, trio.current_time()))
            if attempt.number < 3:
                raise OSError
    assert seen == [(1, 0), (2, 1), (3, 3)]
    assert policy.statistics() == RetryStatistics(1, 3, 1, 0)


async def test_the_last_error_leaves_the_loop(autojump_clock: MockClock) -> None:
    """The same object, with its note; the code after the block never runs for a failure."""
    given, after = errors(3), list[int]()
    policy = exactly()
    with pytest.raises(OSError, match="failure 3") as caught:
        async for attempt in policy.attempts():
            with attempt:
                raise given[attempt.number - 1]
            after.append(attempt.number)
    assert caught.value is given[2]
    assert [note.partition(":")[0] for note in given[2].__notes__] == ["retry"]
    assert after == [1, 2], "what is swallowed goes on after the block"
    assert policy.statistics() == RetryStatistics(1, 3, 0, 1)
    assert trio.current_time() == 3


async def test_an_error_that_is_not_retried_leaves_at_once(autojump_clock: MockClock) -> None:
    """With the note that says why."""
    count = 0
    with pytest.raises(ValueError, match="wrong") as caught:
        async for attempt in exactly().attempts():
            with attempt:
                count += 1
                raise ValueError("wrong")
    assert (count, trio.current_time()) == (1, 0)
    assert caught.value.__notes__[0].startswith("retry: not retried: ")


async def test_a_refused_result_is_tried_again(autojump_clock: MockClock) -> None:
    """`set_result` says what the block came to."""
    policy = exactly(retry_result=is_busy)
    answers, answer = ["busy", "busy", "fine"], ""
    async for attempt in policy.attempts():
        with attempt:
            answer = answers.pop(0)
            attempt.set_result(answer)
    assert answer == "fine"
    assert trio.current_time() == 3
    with pytest.raises(RetriesExhaustedError) as caught:
        async for attempt in policy.attempts():
            with attempt:
                attempt.set_result("busy")
    assert (caught.value.last_result, caught.value.attempts) == ("busy", 3)
    assert policy.statistics() == RetryStatistics(2, 6, 1, 1)


async def test_a_block_that_sets_no_result_is_not_asked_about(autojump_clock: MockClock) -> None:
    """There is nothing to refuse; nor is the result of an earlier attempt taken for it."""
    asked = list[object]()

    def refuse(result: object) -> bool:
        asked.append(result)
        return True

    policy, count = exactly(retry_result=refuse), 0
    async for attempt in policy.attempts():
        with attempt:
            count += 1
            if attempt.number == 1:
                attempt.set_result("busy")
    assert (count, asked) == (2, ["busy"])


def is_none(result: object) -> bool:
    return result is None


async def test_none_is_a_result(autojump_clock: MockClock) -> None:
    """To set None is not the same as to set nothing."""
    count = 0
    with pytest.raises(RetriesExhaustedError):
        async for attempt in exactly(retry_result=is_none).attempts():
            with attempt:
                count += 1
                attempt.set_result(None)
    assert count == 3


async def test_the_result_of_a_failed_block_does_not_count(autojump_clock: MockClock) -> None:
    """It raised after it had set one: it is the error that is judged."""
    policy = exactly(retry_result=always)
    with pytest.raises(ValueError, match="after all"):
        async for attempt in policy.attempts():
            with attempt:
                attempt.set_result("fine")
                raise ValueError("after all")


# --- leaving the loop ---------------------------------------------------------------------------


async def leave_by_return(policy: Retry) -> str:
    async for attempt in policy.attempts():
        with attempt:
            return "left"
    raise AssertionError


async def leave_by_break(policy: Retry) -> str:
    async for attempt in policy.attempts():
        with attempt:
            break
    return "left"


async def leave_by_continue(policy: Retry) -> str:
    async for attempt in policy.attempts():
        with attempt:
            continue
    return "left"


@pytest.mark.parametrize("leave", [leave_by_return, leave_by_break, leave_by_continue])
@pytest.mark.parametrize("options", [{}, {"attempt_timeout": 9, "total_timeout": 9}])
async def test_leaving_a_block_early_is_a_success(leave: Any, options: dict[str, Any]) -> None:
    """By any statement; and no scope is left open behind it."""
    policy = exactly(**options)
    assert await leave(policy) == "left"
    gc.collect()
    await trio.lowlevel.checkpoint()
    assert trio.current_effective_deadline() == float("inf")
    assert policy.statistics() == RetryStatistics(1, 1, 0, 0)


async def test_leaving_between_attempts_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    """The failure was swallowed, and whoever breaks then wants no further attempt."""
    policy = exactly(attempt_timeout=9, total_timeout=9)
    async for attempt in policy.attempts():
        with attempt:
            raise OSError
        break
    assert trio.current_effective_deadline() == float("inf")
    await trio.sleep(20)
    assert policy.statistics() == RetryStatistics(1, 1, 0, 0)


async def test_it_is_no_generator() -> None:
    """A generator that is left open would be finalized at some later time, elsewhere."""
    attempts = exactly().attempts()
    assert not inspect.isasyncgen(attempts)
    assert not hasattr(attempts, "aclose")
    assert aiter(attempts) is attempts


async def test_a_generator_may_hold_a_loop(autojump_clock: MockClock) -> None:
    """Closed while an attempt is open: the block ends, and nothing is counted as a failure."""
    policy = exactly(attempt_timeout=9)

    async def lines() -> AsyncGenerator[int, None]:
        async for attempt in policy.attempts():
            with attempt:
                yield attempt.number

    generator = lines()
    assert await anext(generator) == 1
    await generator.aclose()
    assert trio.current_effective_deadline() == float("inf")
    assert policy.statistics().given_up == 0


# --- mistakes -----------------------------------------------------------------------------------


async def test_an_attempt_that_is_not_entered_is_a_mistake() -> None:
    """Without `with attempt:` the loop would never end."""
    count = 0
    with pytest.raises(RuntimeError, match="with attempt"):
        async for _ in exactly().attempts():
            count += 1
    assert count == 1


async def test_a_later_attempt_that_is_not_entered_is_one_too(autojump_clock: MockClock) -> None:
    """The rule holds for each of them."""
    with pytest.raises(RuntimeError, match="with attempt"):
        async for attempt in exactly().attempts():
            if attempt.number == 1:
                with attempt:
                    raise OSError


async def test_an_attempt_is_entered_once(autojump_clock: MockClock) -> None:
    """A second block would not be counted."""
    async for attempt in exactly().attempts():
        with attempt:
            pass
        with pytest.raises(RuntimeError, match="once"), attempt:
            pass


async def test_a_loop_that_is_over_stays_over(autojump_clock: MockClock) -> None:
    """To iterate again yields nothing more, and makes no call."""
    policy = exactly()
    attempts = policy.attempts()
    async for attempt in attempts:
        with attempt:
            pass
    with pytest.raises(StopAsyncIteration):
        await anext(attempts)
    assert policy.statistics() == RetryStatistics(1, 1, 0, 0)


async def test_an_attempt_is_not_made_before_it_is_entered() -> None:
    """Who asks for the attempts but makes none has made no call."""
    policy = exactly()
    attempts = policy.attempts()
    await anext(attempts)
    assert policy.statistics() == RetryStatistics(0, 0, 0, 0)


# --- politeness, deadlines, sharing -------------------------------------------------------------


async def test_the_first_attempt_is_a_checkpoint() -> None:
    """A block that never waits, in a loop, does not freeze the program; and can be cancelled."""
    with trio.CancelScope() as scope:
        scope.cancel()
        async for _ in exactly().attempts():
            pytest.fail("a cancelled loop began")
    assert scope.cancelled_caught
    steps = Steps()
    trio.lowlevel.add_instrument(steps)
    async for attempt in exactly().attempts():
        with attempt:
            pass
    trio.lowlevel.remove_instrument(steps)
    assert steps.count == 1


async def test_a_loop_can_be_cancelled_between_its_attempts(autojump_clock: MockClock) -> None:
    """While it waits; nothing more is attempted."""
    policy, count = exactly(max_attempts=None), 0

    async def loop() -> None:
        nonlocal count
        async for attempt in policy.attempts():
            with attempt:
                count += 1
                raise OSError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop)
        await trio.sleep(5)
        nursery.cancel_scope.cancel()
    assert (count, trio.current_time()) == (3, 5)
    assert policy.statistics() == RetryStatistics(1, 3, 0, 0)


async def test_it_never_sleeps_into_a_deadline(autojump_clock: MockClock) -> None:
    """Outside of the loop, around it."""
    with trio.move_on_after(3) as scope, pytest.raises(OSError, match="failure 2"):
        async for attempt in exactly().attempts():
            with attempt:
                raise errors(9)[attempt.number - 1]
    assert trio.current_time() == 1
    assert not scope.cancelled_caught


async def test_an_attempt_has_its_timeout(autojump_clock: MockClock) -> None:
    """The block is cancelled, and that is its failure."""
    began = list[float]()
    with pytest.raises(OperationTimeoutError) as caught:
        async for attempt in exactly(attempt_timeout=2).attempts():
            with attempt:
                began.append(trio.current_time())
                await trio.sleep_forever()
    assert began == [0, 3, 7]
    assert caught.value.timeout == 2


async def test_the_total_stops_a_block(autojump_clock: MockClock) -> None:
    """It counts from the first attempt; the cause is the error of the attempt before."""
    failure = OSError("first")
    attempts = exactly(total_timeout=4).attempts()
    await trio.sleep(50)
    with pytest.raises(OperationTimeoutError) as caught:
        async for attempt in attempts:
            with attempt:
                await trio.sleep(2)
                if attempt.number == 1:
                    raise failure
    assert trio.current_time() == 54
    assert (caught.value.timeout, caught.value.__cause__) == (4, failure)


async def test_the_body_outside_of_the_block_has_no_limit(autojump_clock: MockClock) -> None:
    """Only the attempt itself is timed."""
    async for attempt in exactly(attempt_timeout=1, total_timeout=1).attempts():
        with attempt:
            pass
        assert trio.current_effective_deadline() == float("inf")
        await trio.sleep(5)


async def test_loops_of_one_policy_do_not_see_each_other(autojump_clock: MockClock) -> None:
    """Fifty at once, each with a nested one: everyone counts from one."""
    policy = exactly(max_attempts=4)
    numbers = dict[int, list[int]]()

    async def loop(index: int) -> None:
        async for attempt in policy.attempts():
            with attempt:
                async for inner in policy.attempts():
                    with inner:
                        await trio.lowlevel.checkpoint()
                        if inner.number == 1:
                            raise OSError
                numbers.setdefault(index, []).append(attempt.number)
                if attempt.number <= index % 4:
                    raise OSError

    async with trio.open_nursery() as nursery:
        for index in range(50):
            nursery.start_soon(loop, index)
    assert all(seen == list(range(1, index % 4 + 2)) for index, seen in numbers.items())
    assert len(numbers) == 50


async def test_begun_in_one_task_and_ended_in_another(autojump_clock: MockClock) -> None:
    """An iterator may be handed on between its attempts."""
    policy = exactly(attempt_timeout=9)
    attempts = policy.attempts()

    async def fail_once() -> None:
        with await anext(attempts):
            raise OSError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail_once)
    async for attempt in attempts:
        with attempt:
            assert attempt.number == 2
    assert policy.statistics() == RetryStatistics(1, 2, 1, 0)
