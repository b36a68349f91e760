"""Retry against a model of it: whatever is scripted, calls, waits and endings are as predicted."""

from __future__ import annotations

import math
from functools import partial
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

import attrs
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from trio_resilience import (
    Constant,
    Decorrelated,
    Exponential,
    Fibonacci,
    Linear,
    OperationTimeoutError,
    RetriesExhaustedError,
    Retry,
    RetryStatistics,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

# Small whole and half numbers, so that instants that coincide in the model do so in floats.
times = st.integers(0, 12).map(lambda halves: halves / 2)


@attrs.frozen
class Step:
    """What one attempt does: it takes its time, then succeeds, fails or is refused."""

    seconds: float
    kind: str
    hint: float | None


@attrs.frozen
class Case:
    """Steps, and the options of the policy that runs them."""

    steps: list[Step]
    delays: list[float]
    max_attempts: int | None
    total_timeout: float
    deadline: float
    max_retry_after: float


@attrs.frozen
class Ending:
    """When which attempt began, how it ended, and when."""

    began_at: list[float]
    kind: str
    at: float


steps = st.builds(
    Step,
    seconds=times,
    kind=st.sampled_from(["ok", "fails", "fails", "fails", "fatal", "refused"]),
    hint=st.none() | times,
)
cases = st.builds(
    Case,
    steps=st.lists(steps, min_size=1, max_size=6),
    delays=st.lists(times, max_size=6),
    max_attempts=st.none() | st.integers(1, 6),
    total_timeout=st.just(math.inf) | times,
    deadline=st.just(math.inf) | times,
    max_retry_after=times,
)


class PassingError(Exception):
    """Deserves another try, after a while if it says so."""

    def __init__(self, hint: float | None) -> None:
        super().__init__()
        self.retry_after = hint


class Refused:
    """A result that does."""

    def __init__(self, hint: float | None) -> None:
        self.retry_after = hint


class Least(Random):
    """Draws the least, so that no jitter is added to a hint."""

    def random(self) -> float:
        return 0.0


def predict(case: Case) -> Ending:
    """Work out by plain arithmetic what the policy has to do."""
    now, began, delays = 0.0, list[float](), iter(case.delays)
    limit = min(case.total_timeout, case.deadline)
    while True:
        began.append(now)
        step = step_of(case, len(began))
        if now + step.seconds >= limit:
            kind = "cancelled" if case.deadline <= case.total_timeout else "timeout"
            return Ending(began, kind, limit)
        now += step.seconds
        if step.kind in {"ok", "fatal"}:
            return Ending(began, step.kind, now)
        over = Ending(began, step.kind, now)
        if len(began) == case.max_attempts:
            return over
        if step.hint is not None and step.hint > case.max_retry_after:
            return over
        delay = next(delays, None)
        if delay is None or now + max(delay, step.hint or 0) >= limit:
            return over
        now += max(delay, step.hint or 0)


def step_of(case: Case, attempt: int) -> Step:
    return case.steps[attempt - 1] if attempt <= len(case.steps) else Step(0.5, "ok", None)


async def act(case: Case, began: list[float]) -> object:
    """Be the operation: note when it began, and do the step that is next."""
    began.append(trio.current_time())
    step = step_of(case, len(began))
    if step.seconds:
        await trio.sleep(step.seconds)
    else:
        await trio.lowlevel.checkpoint()
    if step.kind == "fails":
        raise PassingError(step.hint)
    if step.kind == "fatal":
        raise ValueError
    return Refused(step.hint) if step.kind == "refused" else "ok"


def policy_of(case: Case) -> Retry:
    return Retry(
        max_attempts=case.max_attempts,
        on=PassingError,
        backoff=lambda _: iter(case.delays),
        retry_result=lambda result: isinstance(result, Refused),
        total_timeout=case.total_timeout,
        max_retry_after=case.max_retry_after,
        rng=Least(),
    )


async def use(policy: Retry, form: str, op: Callable[[], Awaitable[object]]) -> None:
    if form == "call":
        await policy.call(op)
        return
    async for attempt in policy.attempts():
        with attempt:
            attempt.set_result(await op())


async def observe(case: Case, form: str) -> tuple[Ending, RetryStatistics]:
    """Run it for real, on the virtual clock."""
    began, policy, kind = list[float](), policy_of(case), "cancelled"
    with trio.move_on_at(case.deadline):
        try:
            await use(policy, form, partial(act, case, began))
            kind = "ok"
        except (PassingError, RetriesExhaustedError, trio.TooSlowError, ValueError) as error:
            kind = KIND_OF[type(error)]
    return Ending(began, kind, trio.current_time()), policy.statistics()


KIND_OF: dict[type, str] = {
    PassingError: "fails",
    RetriesExhaustedError: "refused",
    OperationTimeoutError: "timeout",
    ValueError: "fatal",
}


@given(case=cases, form=st.sampled_from(["call", "attempts"]))
def test_it_does_what_the_model_says(case: Case, form: str) -> None:
    """Every attempt begins at the predicted instant, and the end is the predicted one."""
    clock = trio.testing.MockClock(autojump_threshold=0)
    expected = predict(case)
    if form == "attempts" and case.deadline == 0:
        expected = Ending([], "cancelled", 0.0)  # its first step is a checkpoint
    ending, statistics = trio.run(observe, case, form, clock=clock)
    assert ending == expected
    count = len(expected.began_at)
    assert statistics == RetryStatistics(
        calls=min(1, count),
        attempts=count,
        recovered=int(expected.kind == "ok" and count > 1),
        given_up=int(expected.kind not in {"ok", "cancelled"}),
    )


positive = st.floats(0, allow_nan=False, allow_infinity=False)
kinds = st.sampled_from([Exponential, Linear, Fibonacci, Decorrelated])


@given(kind=kinds, base=positive, more=positive, seed=st.integers(), jitter=st.booleans())
def test_no_delay_leaves_its_bounds(
    kind: Any, base: float, more: float, seed: int, jitter: bool
) -> None:
    """Between zero and the cap, finite, whatever the options; without jitter it never shrinks."""
    cap = base + more
    extra = {} if kind is Decorrelated else {"jitter": jitter}
    delays = list(islice(kind(base, max_delay=cap, **extra)(Random(seed)), 200))
    assert all(0 <= delay <= cap and delay < math.inf for delay in delays)
    if kind is Decorrelated:
        assert all(delay >= base for delay in delays)
    elif not jitter:
        assert delays == sorted(delays)
        assert delays[0] == base


@given(delay=positive, jitter=st.sampled_from(["full", "equal", "none"]), seed=st.integers())
def test_a_constant_delay_stays_in_its_bounds(delay: float, jitter: Any, seed: int) -> None:
    """At least half of it is certain with equal jitter, all of it without."""
    least = {"full": 0.0, "equal": delay / 2, "none": delay}[jitter]
    for drawn in islice(Constant(delay, jitter=jitter)(Random(seed)), 200):
        assert least <= drawn <= delay
