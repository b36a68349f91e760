"""Retry budget: what feeds it, what it grants, and how little a dead service gets to bear."""

from __future__ import annotations

import copy
import math
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from tests.operations import fails, returns, within_calls
from tests.test_retry import Script, errors, exactly, is_busy
from tests.test_retry_memory import attempt_to, holding
from tests.test_retry_memory import no_collector as no_collector  # noqa: PLC0414 - a fixture
from trio_resilience import (
    AttemptStarted,
    Constant,
    Event,
    RetriesExhaustedError,
    Retry,
    RetryGaveUp,
    run_with_limit,
    subscribe,
)
from trio_resilience._algorithms._budget import RetryBudget, RetryBudgetStatistics
from trio_resilience.testing import test_mode as mode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


def empty(ratio: float = 0.1, max_tokens: int = 1) -> RetryBudget:
    """A budget of which nothing is left."""
    budget = RetryBudget(ratio, max_tokens=max_tokens)
    while budget.try_take():
        pass
    return budget


def tokens(budget: RetryBudget) -> float:
    return budget.statistics().tokens


# --- the bucket ---------------------------------------------------------------------------------


def test_it_starts_full() -> None:
    """So that the first few failures of a program are tried again."""
    budget = RetryBudget(max_tokens=3)
    assert budget.is_full
    assert [budget.try_take() for _ in range(5)] == [True, True, True, False, False]
    assert budget.statistics() == RetryBudgetStatistics(0, 3, taken=3, refused=2)
    assert not budget.is_full


@pytest.mark.parametrize("ratio, successes", [(0.1, 10), (0.2, 5), (0.7, 2), (1, 1), (0.01, 100)])
def test_successes_make_a_token(ratio: float, successes: int) -> None:
    """To the last digit: ten tenths are a whole one, and nine are not."""
    budget = empty(ratio, 5)
    for _ in range(successes - 1):
        budget.success()
    assert not budget.try_take()
    budget.success()
    assert budget.try_take()


def test_it_never_holds_more_than_its_maximum() -> None:
    budget = RetryBudget(0.5, max_tokens=2)
    budget.success()
    budget.give_back()
    assert tokens(budget) == 2
    budget.try_take()
    for _ in range(100):
        budget.success()
    assert tokens(budget) == 2
    assert [budget.try_take() for _ in range(3)] == [True, True, False]


def test_what_is_given_back_was_not_taken() -> None:
    budget = RetryBudget(max_tokens=1)
    assert budget.try_take()
    budget.give_back()
    assert budget.statistics() == RetryBudgetStatistics(1, 1, taken=0, refused=0)
    assert budget.try_take()


def test_the_smallest_ratio_is_not_nothing() -> None:
    """A success always counts."""
    budget = empty(1e-300)
    budget.success()
    assert tokens(budget) > 0


@given(
    st.floats(0.001, 2),
    st.integers(1, 20),
    st.lists(st.sampled_from(["take", "give_back", "success"]), max_size=200),
)
def test_it_grants_no_more_than_successes_have_paid_for(
    ratio: float, max_tokens: int, steps: list[str]
) -> None:
    """Whatever happens in whatever order; and it refuses only when there is less than one."""
    budget = RetryBudget(ratio, max_tokens=max_tokens)
    taken = successes = 0
    for step in steps:
        before = tokens(budget)
        if step == "take":
            granted = budget.try_take()
            assert granted is (before >= 1)
            taken += granted
        elif step == "give_back" and taken:
            budget.give_back()
            taken -= 1
        else:
            budget.success()
            successes += 1
        assert 0 <= tokens(budget) <= max_tokens
        assert taken <= max_tokens + successes * ratio + 1e-6
        assert budget.statistics().taken == taken


@pytest.mark.parametrize(
    "options, message",
    [
        ({"ratio": 0}, "`ratio` must be > 0, got 0"),
        ({"ratio": -0.1}, "`ratio` must be > 0, got -0.1"),
        ({"ratio": math.nan}, "`ratio` must be > 0, got nan"),
        ({"ratio": math.inf}, "`ratio` must be finite, got inf"),
        ({"ratio": True}, "`ratio` must be a number, got True"),
        ({"ratio": "5"}, "`ratio` must be a number, got '5'"),
        ({"max_tokens": 0}, "`max_tokens` must be >= 1, got 0"),
        ({"max_tokens": 2.5}, "`max_tokens` must be an int, got 2.5"),
        ({"max_tokens": True}, "`max_tokens` must be an int, got True"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^{message}$"):
        RetryBudget(**options)


def test_it_shows_how_much_is_left() -> None:
    budget = RetryBudget(0.25, max_tokens=4)
    budget.try_take()
    budget.success()
    assert repr(budget) == "RetryBudget(0.25, max_tokens=4: 3.25 left)"


def test_there_is_one_of_it() -> None:
    """A copy would be fed with what the original does not get."""
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="make a new one"):
            make(RetryBudget())


# --- retries under a budget ---------------------------------------------------------------------


async def calls_in_an_outage(retry: Retry, calls: int) -> int:
    """Make so many calls, all of which fail; return how many operations that were."""
    script = Script([OSError("down")] * calls * 3)
    for _ in range(calls):
        with pytest.raises(OSError, match="down"):
            await retry.call(script)
    return script.calls


async def test_an_outage_gets_no_more_load_than_there_are_calls(
    autojump_clock: MockClock,
) -> None:
    """Once the bucket is empty; without a budget, three times as much."""
    retry = Retry(backoff=Constant(1), budget=RetryBudget())
    assert await calls_in_an_outage(retry, 1000) <= 1100
    assert await calls_in_an_outage(retry, 1000) == pytest.approx(1000, rel=0.02)
    assert await calls_in_an_outage(Retry(backoff=Constant(1)), 1000) == 3000


async def test_a_healthy_service_gets_as_many_retries_as_it_needs(
    autojump_clock: MockClock,
) -> None:
    """One in twenty fails, which is less than the tenth that the successes pay for."""
    retry = Retry(backoff=Constant(1), budget=RetryBudget(0.1))
    script = Script([OSError() if number % 20 == 0 else "ok" for number in range(2000)])
    for _ in range(1000):
        assert await retry.call(script) == "ok"
    assert retry.statistics().given_up == 0


async def test_who_gets_no_token_gives_up_at_once(autojump_clock: MockClock) -> None:
    """With the error that there is, and a note that says why; without a wait."""
    error = OSError("first")
    retry = exactly(budget=empty(), name="db")
    heard = list[Event]()
    with subscribe(within_calls(heard.append)), pytest.raises(OSError, match="first") as caught:
        await retry.call(Script([error]))
    assert caught.value is error
    assert error.__notes__ == ["db: gave up after 1 attempt: the retry budget is empty"]
    assert trio.current_time() == 0
    assert retry.statistics().given_up == 1
    assert [type(event) for event in heard][-1] is RetryGaveUp


async def test_the_note_counts_only_what_was_waited_for(autojump_clock: MockClock) -> None:
    with pytest.raises(OSError, match="failure 2") as caught:
        await exactly(budget=RetryBudget(max_tokens=1)).call(Script(errors(2)))
    (note,) = caught.value.__notes__
    assert note == ("retry: gave up after 2 attempts and 1 s of waiting: the retry budget is empty")


async def in_a_loop(retry: Retry, op: Callable[[], Awaitable[object]]) -> None:
    async for attempt in retry.attempts():
        with attempt:
            attempt.set_result(await op())


async def by_call(retry: Retry, op: Callable[[], Awaitable[object]]) -> None:
    await retry.call(op)


async def heard_by_somebody(retry: Retry, op: Callable[[], Awaitable[object]]) -> None:
    with subscribe(lambda _: None):
        await retry.call(op)


forms = pytest.mark.parametrize("form", [by_call, heard_by_somebody, in_a_loop])


@forms
async def test_every_success_feeds_it(autojump_clock: MockClock, form: Any) -> None:
    """Also one at a later attempt, which has cost a token."""
    budget = empty(0.5, 4)
    await form(exactly(budget=budget), Script())
    assert tokens(budget) == 0.5
    budget.success()
    await form(exactly(budget=budget), Script([OSError()]))
    assert tokens(budget) == 0.5


@forms
async def test_a_failure_does_not_feed_it(autojump_clock: MockClock, form: Any) -> None:
    """Nor does a result that is refused."""
    budget = empty(0.5, 4)
    with pytest.raises(ValueError, match="no"):
        await form(exactly(budget=budget), Script([ValueError("no")]))
    with pytest.raises(RetriesExhaustedError):
        await form(exactly(budget=budget, retry_result=is_busy), Script(["busy"]))
    assert tokens(budget) == 0
    assert budget.statistics().refused == empty().statistics().refused + 1


@forms
async def test_what_is_not_retried_costs_nothing(autojump_clock: MockClock, form: Any) -> None:
    """The last of the attempts, and an error that does not deserve another."""
    budget = RetryBudget()
    with pytest.raises(OSError, match="failure 2"):
        await form(exactly(max_attempts=2, budget=budget), Script(errors(2)))
    assert tokens(budget) == 9
    with pytest.raises(ValueError, match="no"):
        await form(exactly(budget=budget), Script([ValueError("no")]))
    assert tokens(budget) == 9


@forms
async def test_a_cancelled_wait_returns_its_token(autojump_clock: MockClock, form: Any) -> None:
    budget = RetryBudget()
    with trio.move_on_after(0.5) as scope:
        # The wait is longer than the time that is left; so the deadline comes only later.
        scope.deadline = math.inf
        async with trio.open_nursery() as nursery:
            nursery.start_soon(form, exactly(budget=budget), Script(errors(1)))
            await trio.sleep(0.5)
            assert tokens(budget) == 9
            nursery.cancel_scope.cancel()
    assert tokens(budget) == 10


async def test_a_loop_that_is_left_between_two_attempts_returns_its_token(
    autojump_clock: MockClock, no_collector: None
) -> None:
    budget = RetryBudget()

    async for attempt in exactly(budget=budget).attempts():
        with attempt:
            await fails(OSError())
        assert tokens(budget) == 9
        break
    assert tokens(budget) == 10


class CtrlC(BaseException):
    """Ends a program."""


@forms
async def test_what_stops_the_program_between_two_attempts_returns_it_too(
    autojump_clock: MockClock, no_collector: None, form: Any
) -> None:
    """Here, a listener that hears of the next one; at the latest when that has been handled."""
    budget = RetryBudget()

    def stop(_: object) -> None:
        raise CtrlC

    await attempt_to(form, exactly(budget=budget, on_retry=stop), holding([], OSError))
    assert budget.statistics() == RetryBudget().statistics()


async def test_a_call_that_is_being_cancelled_needs_no_token(autojump_clock: MockClock) -> None:
    """It goes on as a cancellation, also if there is none."""
    retry = exactly(budget=empty())
    with trio.CancelScope() as scope:
        scope.cancel()
        await retry.call(fails, OSError())
    assert scope.cancelled_caught
    assert retry.statistics().given_up == 0
    assert retry.budget is not None
    assert retry.budget.statistics() == empty().statistics()


async def test_several_policies_share_one(autojump_clock: MockClock) -> None:
    """What the successes of one pay for, another may use."""
    budget = empty(1, 3)
    first, second = exactly(budget=budget), exactly(budget=budget)
    for _ in range(3):
        await first.call(returns, 1)
    with pytest.raises(OSError, match="failure 3"):
        await second.call(Script(errors(3)))
    assert tokens(budget) == 1


async def test_calls_at_once_share_what_there_is(autojump_clock: MockClock) -> None:
    budget = RetryBudget(max_tokens=3)
    retry = exactly(max_attempts=2, budget=budget)
    heard = list[Event]()
    ops = [lambda: retry.call(fails, OSError())] * 10
    with subscribe(heard.append):
        await run_with_limit(None, ops, on_error="collect")
    assert sum(isinstance(event, AttemptStarted) for event in heard) == 13


async def test_a_tests_block_has_a_budget_of_its_own(autojump_clock: MockClock) -> None:
    """Full at first; the one outside is not touched."""
    budget = empty()
    retry = exactly(budget=budget)
    with mode():
        assert await retry.call(Script(errors(1))) == "ok"
        with pytest.raises(OSError, match="failure 1"):
            await retry.call(Script(errors(1)))
    with mode(fresh=False), pytest.raises(OSError, match="failure 1"):
        await retry.call(Script(errors(1)))
    assert tokens(budget) == 0


def test_a_retry_is_idle_while_its_budget_is_full() -> None:
    """Then a new one would do the same."""
    assert Retry().is_idle
    assert Retry(budget=RetryBudget()).is_idle
    assert not Retry(budget=empty()).is_idle


def test_a_budget_is_a_budget() -> None:
    with pytest.raises(TypeError, match=r"`budget` must be a RetryBudget or None, got 0\.1"):
        Retry(budget=0.1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
