"""CircuitBreaker: the shares of failed and of slow calls, of the last calls or the last seconds."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from random import Random
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests._circuits import (
    CLOSED,
    HALF_OPEN,
    OPEN,
    Form,
    begin,
    fail,
    forms,
    succeed,
)
from tests.operations import fails
from trio_resilience._circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from trio.testing import MockClock


def rated(rate: float = 0.5, **options: Any) -> CircuitBreaker:
    """Return one that a row of failures does not open."""
    return CircuitBreaker(failure_threshold=None, failure_rate=rate, **options)


# --- the last calls -------------------------------------------------------------------------------


@forms
async def test_a_rate_counts_when_there_are_so_many_calls(form: Form) -> None:
    """Twenty, if nothing else is said; and then at once, whatever the call was that makes it so."""
    breaker = rated()
    await fail(breaker, 19, form)
    assert breaker.state is CLOSED
    await fail(breaker, 1, form)
    assert breaker.state is OPEN
    assert breaker.statistics().reason == "20 of 20 calls failed"
    breaker = rated()
    await fail(breaker, 10, form)
    await succeed(breaker, 9, form)
    assert breaker.state is CLOSED
    await succeed(breaker, 1, form)
    assert breaker.state is OPEN
    assert breaker.statistics().failure_rate == 0.5


async def test_after_a_healthy_window_it_opens_on_exactly_the_fiftieth_failure() -> None:
    """Of a hundred calls, at a rate of one half."""
    breaker = rated()
    await succeed(breaker, 250)
    await fail(breaker, 49)
    assert (breaker.state, breaker.statistics().failure_rate) == (CLOSED, 0.49)
    await fail(breaker)
    assert breaker.state is OPEN


@pytest.mark.parametrize("part", range(1, 21))
async def test_it_opens_at_the_rate_and_not_above(part: int) -> None:
    """However twentieths are rounded."""
    breaker = rated(part / 20, window_calls=20)
    await succeed(breaker, 20)
    await fail(breaker, part - 1)
    assert breaker.state is CLOSED
    await fail(breaker)
    assert breaker.state is OPEN


async def test_calls_that_have_left_the_window_do_not_count() -> None:
    """Nine of the last ten are needed: eight that failed are forgotten in time."""
    breaker = rated(0.9, window_calls=10, min_calls=10)
    await fail(breaker, 8)
    await succeed(breaker, 2)
    await fail(breaker, 8)
    assert breaker.state is CLOSED
    await succeed(breaker, 10)
    assert breaker.statistics().failure_rate == 0
    await fail(breaker, 8)
    assert breaker.state is CLOSED
    await fail(breaker, 1)
    assert breaker.state is OPEN


async def test_the_smallest_window() -> None:
    """Of one call."""
    breaker = rated(1.0, window_calls=1, min_calls=1)
    await succeed(breaker, 3)
    assert breaker.state is CLOSED
    await fail(breaker)
    assert (breaker.state, breaker.statistics().reason) == (OPEN, "1 of 1 call failed")


@forms
async def test_only_calls_that_say_something_are_in_the_window(
    autojump_clock: MockClock, form: Form
) -> None:
    """Not those that are cancelled, ignored or refused, nor probes, nor those that are late."""
    breaker = rated(0.5, window_calls=4, min_calls=4)
    await fail(breaker, 1, form)
    async with trio.open_nursery() as nursery:
        late = await begin(nursery, breaker, 5, form)
        for error in (ValueError(), KeyboardInterrupt(), ExceptionGroup("", [KeyError()])):
            with pytest.raises(type(error)):
                await form(breaker, fails, error)
        with trio.move_on_after(1):
            await form(breaker, trio.sleep_forever)
        await succeed(breaker, 2, form)
        assert breaker.statistics().failure_rate == pytest.approx(1 / 3)
        await fail(breaker, 1, form)
        assert breaker.state is OPEN
        await trio.sleep(60)
        await succeed(breaker, 1, form)
        assert breaker.statistics().failure_rate is None
        for visit in late:
            await visit.end(OSError("late"))
    assert (breaker.state, breaker.statistics().failure_rate) == (CLOSED, None)
    assert breaker.is_idle


async def test_rates_and_rows_are_watched_side_by_side() -> None:
    """Whichever is reached first opens it."""
    breaker = CircuitBreaker(failure_threshold=3, failure_rate=0.5, window_calls=20, min_calls=6)
    for _ in range(2):
        await succeed(breaker)
        await fail(breaker, 2)
    assert breaker.state is OPEN
    assert breaker.statistics().reason == "4 of 6 calls failed"
    breaker.reset()
    await fail(breaker, 3)
    assert breaker.statistics().reason == "3 failures in a row"


# --- slow calls -----------------------------------------------------------------------------------


@forms
async def test_calls_are_slow_from_their_duration_on(autojump_clock: MockClock, form: Form) -> None:
    """Whether they succeed or fail; one that is slower than others counts no more."""
    breaker = CircuitBreaker(
        failure_threshold=None, slow_call_rate=0.5, slow_call_duration=2, min_calls=4
    )

    async def fail_late() -> None:
        await trio.sleep(2)
        raise OSError("late")

    await form(breaker, trio.sleep, 1.9)
    await form(breaker, trio.sleep, 1000)
    await form(breaker, trio.sleep, 0)
    assert breaker.statistics().slow_calls == 1
    with pytest.raises(OSError, match="late"):
        await form(breaker, fail_late)
    now = breaker.statistics()
    assert (now.state, now.slow_calls, now.failures, now.slow_call_rate) == (OPEN, 2, 1, 0.5)
    assert now.reason == "2 of 4 calls were slow"


@forms
async def test_what_says_nothing_is_not_slow(autojump_clock: MockClock, form: Form) -> None:
    """A call that was cancelled after hours, or that ended with an error of the caller's own."""
    breaker = CircuitBreaker(slow_call_rate=0.1, slow_call_duration=1, min_calls=1)

    async def mine() -> None:
        await trio.sleep(5)
        raise ValueError("mine")

    with trio.move_on_after(5):
        await form(breaker, trio.sleep_forever)
    with pytest.raises(ValueError, match="mine"):
        await form(breaker, mine)
    assert (breaker.state, breaker.statistics().slow_calls) == (CLOSED, 0)


@forms
@pytest.mark.parametrize("rate, state", [(None, CLOSED), (0.5, OPEN)])
async def test_a_slow_probe_has_failed_only_where_slowness_opens_it(
    autojump_clock: MockClock, form: Form, rate: float | None, state: Any
) -> None:
    """Else slow calls are only counted."""
    breaker = CircuitBreaker(failure_threshold=1, slow_call_rate=rate, slow_call_duration=1)
    await fail(breaker)
    await trio.sleep(60)
    assert await form(breaker, trio.sleep, 1) is None
    now = breaker.statistics()
    assert (now.state, now.slow_calls, now.failures) == (state, 1, 1)


async def test_if_any_call_may_be_slow_all_are(autojump_clock: MockClock) -> None:
    """A duration of zero says so."""
    breaker = CircuitBreaker(slow_call_rate=1, slow_call_duration=0, min_calls=2)
    await succeed(breaker, 2)
    assert breaker.state is OPEN


# --- the last seconds -----------------------------------------------------------------------------


@forms
async def test_what_is_older_than_the_window_does_not_count(
    autojump_clock: MockClock, form: Form
) -> None:
    """However little has happened since: nothing runs in the background."""
    breaker = rated(0.5, window_seconds=10, min_calls=4)
    await fail(breaker, 3, form)
    await trio.sleep(10)
    assert breaker.statistics().failure_rate is None
    assert breaker.is_idle
    await fail(breaker, 3, form)
    await trio.sleep(9)
    await succeed(breaker, 1, form)
    assert (breaker.state, breaker.statistics().failure_rate) == (OPEN, 0.75)


async def test_a_window_of_seconds_may_hold_any_number_of_calls() -> None:
    """More than ``window_calls``, which is another kind of window; all at one instant."""
    breaker = rated(0.5, window_seconds=1, window_calls=1, min_calls=1000)
    await succeed(breaker, 500)
    await fail(breaker, 499)
    assert breaker.state is CLOSED
    await fail(breaker)
    assert breaker.state is OPEN


@pytest.mark.parametrize("idle", [10, 64, 1e5])
async def test_an_idle_time_empties_it(autojump_clock: MockClock, idle: float) -> None:
    """Of any length."""
    breaker = rated(0.5, window_seconds=10, min_calls=2)
    for _ in range(5):
        await fail(breaker)
        assert breaker.state is CLOSED
        await trio.sleep(idle)


@pytest.mark.parametrize("seed", range(4))
async def test_it_counts_as_a_plain_list_of_calls_does(
    autojump_clock: MockClock, seed: int
) -> None:
    """Within the grain of the window, which is a second here, as are all the times."""
    rng, calls = Random(seed), deque[tuple[float, bool, bool]]()
    breaker = rated(0.9, slow_call_rate=1, slow_call_duration=2, window_seconds=64, min_calls=400)

    async def op(duration: float, *, failed: bool) -> None:
        await trio.sleep(duration)
        if failed:
            raise OSError

    for _ in range(300):
        duration, failed = rng.choice([0, 0, 1, 3]), rng.random() < 0.4
        try:
            await breaker.call(lambda: op(duration, failed=failed))  # noqa: B023 - it is called now
        except OSError:
            assert failed
        calls.append((trio.current_time(), failed, duration >= 2))
        await trio.sleep(rng.choice([0, 0, 0, 1, 1, 20]))
        recent = [call for call in calls if trio.current_time() - call[0] < 64]
        now = breaker.statistics()
        assert now.failure_rate == (fmean(call[1] for call in recent) if recent else None)
        assert now.slow_call_rate == (fmean(call[2] for call in recent) if recent else None)
    assert breaker.state is CLOSED


@pytest.mark.parametrize("looks", [True, False])
async def test_a_window_that_has_run_out_keeps_no_circuit_open(
    autojump_clock: MockClock, looks: bool
) -> None:
    """When nothing is left in it that was wrong, a probe closes all the same; who looks or not."""
    breaker = CircuitBreaker(
        failure_rate=0.5, window_seconds=1, min_calls=1, recovery_timeout=10, success_threshold=2
    )
    await fail(breaker)
    await trio.sleep(10)
    for state in (HALF_OPEN, CLOSED):
        if looks:
            assert breaker.statistics().failure_rate is None
        await succeed(breaker)
        assert breaker.state is state


@pytest.mark.parametrize("window", [{"window_calls": 5}, {"window_seconds": 1000}])
async def test_what_closes_has_an_empty_window(
    autojump_clock: MockClock, window: dict[str, Any]
) -> None:
    """The failures that opened it would open it again with the next."""
    breaker = rated(0.5, min_calls=4, recovery_timeout=10, **window)
    await fail(breaker, 4)
    await trio.sleep(10)
    await succeed(breaker)
    await fail(breaker, 3)
    assert breaker.state is CLOSED
    await fail(breaker)
    assert breaker.state is OPEN
    await trio.sleep(10)
    async with trio.open_nursery() as nursery:
        await begin(nursery, breaker)
        assert breaker.state is HALF_OPEN
        nursery.cancel_scope.cancel()


# --- how soon -------------------------------------------------------------------------------------


async def calls_until_it_opens(breaker: CircuitBreaker, rng: Random, rate: float) -> int:
    """Call a dependency that fails so often, by chance."""
    breaker.reset()
    before, error = breaker.statistics().calls, OSError()

    async def op() -> None:
        if rng.random() < rate:
            raise error.with_traceback(None)

    while breaker.state is CLOSED:
        with suppress(OSError):
            await breaker.call(op)
    return breaker.statistics().calls - before


@pytest.mark.parametrize(
    "options, rate, mean, tolerance",
    [
        ({"failure_threshold": 5}, 0.3, 586, 45),
        (
            {"failure_threshold": None, "failure_rate": 0.5, "window_calls": 10, "min_calls": 10},
            0.2,
            118,
            8,
        ),
    ],
    ids=["row", "rate"],
)
async def test_it_opens_by_chance_as_theory_says(
    options: dict[str, Any], rate: float, mean: float, tolerance: float
) -> None:
    """On average; with more repetitions, the rule itself is held to the same."""
    breaker, rng = CircuitBreaker(**options), Random(11)
    found = [await calls_until_it_opens(breaker, rng, rate) for _ in range(400)]
    assert fmean(found) == pytest.approx(mean, abs=tolerance)
