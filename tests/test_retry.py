"""Retry: what is called again, when, how often, and what comes out."""

from __future__ import annotations

import math
import time
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing

from trio_resilience import (
    Constant,
    Exponential,
    OperationTimeoutError,
    RetriesExhaustedError,
    Retry,
    RetryResult,
    RetryStatistics,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio.testing import MockClock


@attrs.define(eq=False)
class Script:
    """An operation that raises or returns what it is given, one after the other, and then "ok"."""

    steps: list[Any] = attrs.field(factory=list[Any])
    seconds: float = 0.0
    """How long each call takes."""
    began_at: list[float] = attrs.field(factory=list[float], init=False)

    async def __call__(self) -> Any:
        self.began_at.append(trio.current_time())
        step = self.steps[len(self.began_at) - 1] if len(self.began_at) <= len(self.steps) else "ok"
        if self.seconds:
            await trio.sleep(self.seconds)
        if isinstance(step, BaseException):
            raise step
        return step

    @property
    def calls(self) -> int:
        return len(self.began_at)


def errors(count: int) -> list[OSError]:
    return [OSError(f"failure {number}") for number in range(1, count + 1)]


def exactly(**options: Any) -> Retry:
    """A policy without jitter: after 1, 2, 4 … seconds, unless *options* say otherwise."""
    given: dict[str, Any] = {"backoff": Exponential(jitter="none"), **options}
    return Retry(**given)


def always(_: object) -> bool:
    return True


def is_busy(result: object) -> bool:
    return result == "busy"


# --- success, and giving up ---------------------------------------------------------------------


async def test_a_success_is_returned_at_once(autojump_clock: MockClock) -> None:
    """One call, no wait, and whatever it is: also None, and an exception as a value."""
    value = ValueError("returned, not raised")
    for result in (None, 0, value, "text"):
        policy = exactly()

        async def op(result: object = result) -> object:
            return result

        assert await policy.call(op) is result
        assert policy.statistics() == RetryStatistics(1, 1, 0, 0)
    assert trio.current_time() == 0


async def test_failures_are_tried_again_after_the_backoff(autojump_clock: MockClock) -> None:
    """Each delay starts when the attempt has failed, not when it began."""
    script = Script([*errors(3)], seconds=0.5)
    assert await exactly(max_attempts=4).call(script) == "ok"
    assert script.began_at == [0, 1.5, 4, 8.5]
    assert trio.current_time() == 9


async def test_max_attempts_counts_calls(autojump_clock: MockClock) -> None:
    """Three attempts are two waits; and there is no wait after the last."""
    script = Script([*errors(9)])
    with pytest.raises(OSError, match="failure 3"):
        await exactly().call(script)
    assert script.began_at == [0, 1, 3]
    assert trio.current_time() == 3


async def test_the_last_error_itself_comes_out(autojump_clock: MockClock) -> None:
    """The same object, with one note that says what was tried; the earlier ones have none."""
    given = errors(3)
    policy = exactly(name="db")
    with pytest.raises(OSError, match="failure 3") as caught:
        await policy.call(Script([*given]))
    assert caught.value is given[2]
    (note,) = given[2].__notes__
    assert note.startswith("db: gave up after 3 attempts")
    assert "3 s" in note
    assert [getattr(error, "__notes__", []) for error in given[:2]] == [[], []]
    assert policy.statistics() == RetryStatistics(1, 3, 0, 1)


async def test_one_attempt_is_no_retry(autojump_clock: MockClock) -> None:
    """`max_attempts=1` calls once and says so."""
    script = Script(errors(2))
    with pytest.raises(OSError, match="failure 1") as caught:
        await exactly(max_attempts=1).call(script)
    assert script.calls == 1
    assert caught.value.__notes__ == ["retry: gave up after 1 attempt"]


async def test_an_error_that_is_not_retried_says_why(autojump_clock: MockClock) -> None:
    """At whatever attempt it comes; its note tells which error it was."""
    for before in (0, 2):
        error = ValueError("wrong")
        script = Script([*errors(before), error])
        with pytest.raises(ValueError, match="wrong") as caught:
            await exactly(max_attempts=9).call(script)
        assert caught.value is error
        assert script.calls == before + 1
        (note,) = error.__notes__
        assert note.startswith("retry: not retried: ")
        assert "ValueError" in note


async def test_an_instance_gets_one_note(autojump_clock: MockClock) -> None:
    """However many calls, and policies, raise the same object."""
    error = OSError("always this one")
    policy = exactly()
    for _ in range(5):
        with pytest.raises(OSError, match="always"):
            await policy.call(partial(exactly().call, Script([error] * 9)))
    assert len(error.__notes__) == 1


async def test_no_limit_means_none(autojump_clock: MockClock) -> None:
    """`max_attempts=None` goes on, also past a thousand attempts."""
    script = Script([*errors(1500)])
    policy = exactly(max_attempts=None, backoff=Constant(1))
    assert await policy.call(script) == "ok"
    assert script.calls == 1501
    assert policy.statistics() == RetryStatistics(1, 1501, 1, 0)


async def test_arguments_are_passed_through_each_time(autojump_clock: MockClock) -> None:
    """As trio's functions do it; keywords go into `functools.partial`."""
    seen = list[Any]()

    async def op(*args: object, **kwargs: object) -> str:
        seen.append((args, kwargs))
        if len(seen) < 3:
            raise OSError
        return "ok"

    assert await exactly().call(partial(op, key=1), "a", "b") == "ok"
    assert seen == [(("a", "b"), {"key": 1})] * 3


async def test_call_counted_tells_what_it_took(autojump_clock: MockClock) -> None:
    """The result, the attempts, and the seconds between them."""
    policy = exactly(max_attempts=5)
    assert await policy.call_counted(Script()) == RetryResult("ok", 1, 0.0)
    assert await policy.call_counted(Script([*errors(3)], 10)) == RetryResult("ok", 4, 7.0)
    with pytest.raises(OSError, match="failure 5") as caught:
        await policy.call_counted(Script([*errors(5)]))
    assert caught.value.__notes__[0].startswith("retry: gave up after 5 attempts")


async def test_statistics_tell_what_became_of_calls(autojump_clock: MockClock) -> None:
    """Recovered: success after a failure. Given up: ended with an error."""
    policy = exactly()
    await policy.call(Script())
    await policy.call(Script([*errors(1)]))
    await policy.call_counted(Script([*errors(2)]))
    for error in (OSError(), ValueError()):
        with pytest.raises(type(error)):
            await policy.call(Script([error] * 3))
    assert policy.statistics() == RetryStatistics(calls=5, attempts=10, recovered=2, given_up=2)


# --- results ------------------------------------------------------------------------------------


async def test_a_refused_result_is_tried_again(autojump_clock: MockClock) -> None:
    """`retry_result` sees each result; the first that it does not ask to retry is returned."""
    policy = exactly(retry_result=is_busy)
    script = Script(["busy", "busy", "fine"])
    assert await policy.call_counted(script) == RetryResult("fine", 3, 3.0)
    assert policy.statistics() == RetryStatistics(1, 3, 1, 0)


async def test_refused_to_the_end_is_an_error(autojump_clock: MockClock) -> None:
    """With the last result and the number of attempts, and no cause."""
    policy = Retry(backoff=Constant(1), retry_result=lambda result: result < 10)
    with pytest.raises(
        RetriesExhaustedError, match="after 3 attempts; the last one was 3"
    ) as caught:
        await policy.call(Script([1, 2, 3]))
    assert (caught.value.last_result, caught.value.attempts) == (3, 3)
    assert caught.value.__context__ is None
    assert policy.statistics() == RetryStatistics(1, 3, 0, 1)


async def test_errors_and_refused_results_share_the_attempts(autojump_clock: MockClock) -> None:
    """And the backoff; what came last decides what comes out."""
    policy = exactly(max_attempts=3, retry_result=is_busy)
    with pytest.raises(RetriesExhaustedError) as caught:
        await policy.call(Script(["busy", OSError("a"), "busy"]))
    assert caught.value.last_result == "busy"
    with pytest.raises(OSError, match="b"):
        await policy.call(Script([OSError("a"), "busy", OSError("b")]))
    assert trio.current_time() == 6


# --- backoff ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [-1, -0.001, math.nan, -math.inf])
async def test_a_delay_that_is_none_is_a_mistake(autojump_clock: MockClock, bad: float) -> None:
    """Of a user's own backoff: negative or NaN is a ValueError, and no further call is made."""
    script = Script([*errors(2)])
    with pytest.raises(ValueError, match=r"backoff.*must be >= 0, got"):
        await Retry(backoff=lambda _: iter([bad])).call(script)
    assert script.calls == 1


async def test_a_backoff_that_ends_allows_no_further_attempt(autojump_clock: MockClock) -> None:
    """Its delays are all there are; the operation's own error comes out."""
    script = Script([*errors(9)])
    with pytest.raises(OSError, match="failure 3") as caught:
        await Retry(max_attempts=None, backoff=lambda _: iter([0.5, 0.25])).call(script)
    assert script.began_at == [0, 0.5, 0.75]
    assert caught.value.__notes__[0].startswith("retry: gave up after 3 attempts")


async def test_every_call_has_its_own_delays(autojump_clock: MockClock) -> None:
    """A backoff with state is started anew for each call, with the policy's generator."""
    rng, seen = Random(1), list[Random]()

    def backoff(given: Random) -> Iterator[float]:
        seen.append(given)
        yield from (1.0, 2.0, 4.0)

    policy = Retry(max_attempts=4, backoff=backoff, rng=rng)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(policy.call, Script([*errors(3)]))
    assert trio.current_time() == 7
    assert len(seen) == 10
    assert all(given is rng for given in seen)


async def test_a_backoff_is_not_asked_when_nothing_fails() -> None:
    """Nor when an error is not retried: nothing is drawn in vain."""
    asked = list[Random]()

    def backoff(rng: Random) -> Iterator[float]:
        asked.append(rng)
        return iter([1.0])

    policy = Retry(backoff=backoff)
    await policy.call(Script())
    with pytest.raises(ValueError, match="no"):
        await policy.call(Script([ValueError("no")]))
    assert asked == []


async def test_jitter_comes_from_the_given_generator(autojump_clock: MockClock) -> None:
    """The same seed gives the same waits, and another gives others."""

    async def total(seed: int) -> float:
        policy = Retry(max_attempts=6, rng=Random(seed))
        return (await policy.call_counted(Script([*errors(5)]))).total_delay

    assert await total(1) == await total(1) != await total(2)


async def test_a_retry_without_delay_lets_others_run() -> None:
    """Operations that never wait, and a backoff of zero: the loop can still be cancelled."""
    policy = Retry(max_attempts=None, backoff=Constant(0))

    async def fail() -> None:
        raise OSError

    async with trio.open_nursery() as nursery:
        nursery.start_soon(policy.call, fail)
        for _ in range(20):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert policy.statistics().attempts > 5
    assert policy.statistics().given_up == 0


@pytest.mark.parametrize("jump", [-3600, 3600])
async def test_the_wall_clock_does_not_matter(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """It may be set an hour back or forth in the middle: waits and limits are trio's."""
    script, now = Script([*errors(2)], seconds=1), time.time()

    async def op() -> Any:
        monkeypatch.setattr(time, "time", lambda: now + jump * (script.calls + 1))
        return await script()

    assert await exactly(attempt_timeout=2, total_timeout=9).call(op) == "ok"
    assert script.began_at == [0, 2, 5]


# --- sharing ------------------------------------------------------------------------------------


async def test_one_policy_serves_many_tasks_and_itself(autojump_clock: MockClock) -> None:
    """Fifty calls at once, each of which makes another inside: each counts from one."""
    policy = exactly(max_attempts=4)
    results = list[RetryResult[Any]]()

    async def outer(number: int) -> None:
        script = Script([*errors(number % 4)])

        async def op() -> RetryResult[Any]:
            return await policy.call_counted(script)

        results.append((await policy.call_counted(op)).result)

    async with trio.open_nursery() as nursery:
        for number in range(50):
            nursery.start_soon(outer, number)
    assert sorted(result.attempts for result in results) == sorted(
        number % 4 + 1 for number in range(50)
    )
    assert trio.current_time() == 7
    assert policy.statistics().calls == 100


def test_a_policy_outlives_a_run() -> None:
    """Made before any, used in two, its counts survive; and it can be shown outside of them."""
    policy = exactly(name="db")
    for _ in range(2):
        trio.run(
            policy.call, Script([*errors(1)]), clock=trio.testing.MockClock(autojump_threshold=0)
        )
    assert policy.statistics() == RetryStatistics(2, 4, 2, 0)
    assert "max_attempts=3" in repr(policy)
    assert "name='db'" in repr(policy)


async def test_a_timeout_of_an_attempt_is_a_failure_like_others(autojump_clock: MockClock) -> None:
    """It is retried if *on* says so, and the last one comes out."""
    script = Script(seconds=9)
    with pytest.raises(OperationTimeoutError) as caught:
        await exactly(attempt_timeout=2).call(script)
    assert script.began_at == [0, 3, 7]
    assert caught.value.timeout == 2
    script = Script(seconds=9)
    with pytest.raises(OperationTimeoutError):
        await exactly(attempt_timeout=2, on=OSError).call(script)
    assert script.calls == 1
