"""CircuitBreaker: for how long it stays open, and for how long its probes may hang."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from random import Random
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests._circuits import (
    CLOSED,
    HALF_OPEN,
    OPEN,
    Form,
    begin,
    call,
    fail,
    forms,
    is_refused,
    succeed,
)
from tests.operations import Stopwatch
from tests.test_circuit_breaker_half_open import RECOVERY, Crowd, reopening
from trio_resilience import Exponential
from trio_resilience._circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from trio.testing import MockClock


# --- probes that hang -----------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("timeout, patience", [(3, 3), (25.5, 25.5), (None, RECOVERY)])
async def test_a_probe_that_hangs_wedges_nobody(
    autojump_clock: MockClock, form: Form, timeout: float | None, patience: float
) -> None:
    """When its time is over it has failed; the next has its turn after the recovery time."""
    breaker = await reopening(half_open_timeout=timeout)
    async with trio.open_nursery() as nursery:
        [hung] = await begin(nursery, breaker, 1, form)
        await trio.sleep(patience - 0.5)
        assert await is_refused(breaker, form)
        assert breaker.state is HALF_OPEN
        await trio.sleep(1)
        assert await is_refused(breaker, form)
        assert (breaker.state, breaker.retry_after) == (OPEN, RECOVERY - 0.5)
        assert (breaker.statistics().opened, breaker.statistics().failures) == (2, 1)
        await trio.sleep(RECOVERY - 0.5)
        [probe] = await begin(nursery, breaker, 1, form)
        assert probe.has_run
        assert await hung.end(OSError("late")) == hung.outcome
        assert breaker.state is HALF_OPEN
        await probe.end("ok")
    assert breaker.state is CLOSED


@pytest.mark.parametrize("ending", ["ok", OSError("late")], ids=repr)
async def test_a_probe_that_was_only_slow_still_decides_if_nobody_came(
    autojump_clock: MockClock, ending: object
) -> None:
    """That its time was over is found out by the next caller; there was none."""
    breaker = await reopening(half_open_timeout=3)
    async with trio.open_nursery() as nursery:
        [slow] = await begin(nursery, breaker)
        await trio.sleep(30)
        assert breaker.state is HALF_OPEN
        await slow.end(ending)
    assert breaker.state is (CLOSED if ending == "ok" else OPEN)


async def test_probes_may_have_all_the_time_there_is(autojump_clock: MockClock) -> None:
    """With no limit on it, the place is taken until the probe ends."""
    breaker = await reopening(half_open_timeout=float("inf"))
    async with trio.open_nursery() as nursery:
        [probe] = await begin(nursery, breaker)
        await trio.sleep(80_000)
        assert await is_refused(breaker)
        await probe.end("ok")
    assert breaker.state is CLOSED


async def test_fifty_who_find_a_probe_hung(autojump_clock: MockClock) -> None:
    """Both times are over when they come: exactly one of them is the next probe."""
    breaker = await reopening()
    crowd = Crowd(breaker, call)
    async with trio.open_nursery() as nursery:
        [hung] = await begin(nursery, breaker)
        await trio.sleep(5 * RECOVERY)
        for _ in range(50):
            nursery.start_soon(crowd.come)
        await wait_all_tasks_blocked()
        assert (crowd.ran, crowd.refused) == (1, 49)
        await hung.end("ok")
        assert breaker.state is HALF_OPEN
    assert breaker.state is CLOSED
    assert breaker.statistics().calls == 2


# --- how long it stays open -----------------------------------------------------------------------


async def openings(breaker: CircuitBreaker, endings: str) -> list[float | None]:
    """Let probes end so, as soon as they may; return how long it stayed open after each failure."""
    times = list[float | None]()
    for ending in endings:
        if ending == "f":
            await fail(breaker)
            times.append(breaker.retry_after)
        elif ending == "c":
            async with trio.open_nursery() as nursery:
                [probe] = await begin(nursery, breaker)
                await probe.cancel()
        elif ending == "h":
            async with trio.open_nursery() as nursery:
                [probe] = await begin(nursery, breaker)
                await trio.sleep(1)
                assert await is_refused(breaker)
                times.append(breaker.retry_after)
                await probe.cancel()
        else:
            await succeed(breaker)
        await trio.sleep(breaker.retry_after or 0)
    return times


@pytest.mark.parametrize(
    "endings, times",
    [
        ("ffff", [1, 2, 4, 8]),
        ("ffs" + "ff", [1, 2, 1, 2]),
        ("fcfccf", [1, 2, 4]),
        ("fhfh", [1, 2, 4, 8]),
        ("fffff", [1, 2, 4, 8, 10]),
    ],
)
async def test_a_backoff_grows_with_each_round_that_failed(
    autojump_clock: MockClock, endings: str, times: list[float]
) -> None:
    """A hung one is such a round, a cancelled one is not; to close starts it anew."""
    breaker = CircuitBreaker(
        failure_threshold=1,
        recovery_timeout=Exponential(1, max_delay=10, jitter="none"),
        half_open_timeout=1,
    )
    assert await openings(breaker, endings) == times


async def test_a_success_of_many_does_not_start_the_backoff_anew(
    autojump_clock: MockClock,
) -> None:
    """Only to close does."""
    recovery = Exponential(1, jitter="none")
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=recovery, success_threshold=2)
    assert await openings(breaker, "fsfsfss") == [1, 2, 4]
    assert breaker.state is CLOSED
    assert await openings(breaker, "f") == [1]


async def test_a_reset_starts_the_backoff_anew(autojump_clock: MockClock) -> None:
    """And so does a hold that ends."""
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=Exponential(1, jitter="none"))
    for forget in (breaker.reset, lambda: breaker.isolate().release()):
        assert await openings(breaker, "ff") == [1, 2]
        forget()
        assert breaker.state is CLOSED


async def test_jitter_comes_from_its_own_generator(autojump_clock: MockClock) -> None:
    """So that a thousand clients do not come back at one instant; and a test can repeat it."""
    recovery = Exponential(60, max_delay=60, jitter="full")
    times = [
        await openings(
            CircuitBreaker(failure_threshold=1, recovery_timeout=recovery, rng=Random(seed)), "f"
        )
        for seed in (1, 2, 1)
    ]
    assert times[0] == pytest.approx(times[2])
    assert times[0] != pytest.approx(times[1])
    assert all(0 <= (time or 0) <= 60 for [time] in times)


async def test_the_recovery_time_may_be_anything_that_yields_delays(
    autojump_clock: MockClock,
) -> None:
    """Each opening of a closed circuit has an iterator of its own; a timedelta is a time, too."""

    def delays(_: Random) -> Iterator[float]:
        yield from (5, 3, 7)

    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=delays)
    assert await openings(breaker, "fffsff") == [5, 3, 7, 5, 3]
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=timedelta(minutes=2))
    assert await openings(breaker, "fff") == [120, 120, 120]


async def test_without_a_recovery_time_the_next_call_is_a_probe(autojump_clock: MockClock) -> None:
    """At the same instant."""
    breaker, watch = CircuitBreaker(failure_threshold=1, recovery_timeout=0), Stopwatch()
    await fail(breaker, 5)
    assert (breaker.state, breaker.retry_after, breaker.statistics().opened) == (OPEN, 0, 5)
    await succeed(breaker)
    assert (breaker.state, watch.seconds) == (CLOSED, 0)
