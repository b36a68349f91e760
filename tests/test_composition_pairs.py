"""Every policy around every other, and three of them: each does its part, and counts only that."""

from __future__ import annotations

import math
from collections import Counter
from contextvars import ContextVar
from itertools import product
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._layers import INSTEAD, MAKERS, Stack, make_layers
from tests.operations import Stopwatch, leaves, reachable, within_calls
from trio_resilience import Event, OperationTimeoutError, Timeout, TimeoutStatistics, subscribe
from trio_resilience._events import (
    AttemptFinished,
    AttemptStarted,
    CircuitStateChanged,
    FallbackUsed,
    HedgeStarted,
    LoserFailed,
    Rejected,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
    WaitFinished,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from trio.testing import MockClock

    Way = Callable[[Stack], Callable[..., Awaitable[Any]]]

PAIRS = list(product(MAKERS, MAKERS))
TRIPLES = [
    ("timeout", "retry", "timeout"),
    ("timeout", "hedge", "timeout"),
    ("timeout", "retry", "hedge"),
    ("timeout", "breaker", "timeout"),
    ("timeout", "limiter", "retry"),
    ("timeout", "keyed", "retry"),
    ("retry", "timeout", "breaker"),
    ("retry", "breaker", "timeout"),
    ("retry", "breaker", "bulkhead"),
    ("retry", "limiter", "timeout"),
    ("retry", "hedge", "timeout"),
    ("retry", "retry", "retry"),
    ("breaker", "retry", "timeout"),
    ("breaker", "bulkhead", "timeout"),
    ("fallback", "retry", "timeout"),
    ("fallback", "timeout", "retry"),
    ("fallback", "retry", "breaker"),
    ("fallback", "breaker", "hedge"),
    ("hedge", "breaker", "timeout"),
    ("hedge", "limiter", "bulkhead"),
    ("bulkhead", "timeout", "retry"),
    ("keyed", "breaker", "timeout"),
]
STACKS = [*PAIRS, *TRIPLES]
TIMED = [kinds for kinds in STACKS if "timeout" in kinds]

VERDICTS = (
    CircuitStateChanged,
    FallbackUsed,
    HedgeStarted,
    LoserFailed,
    Rejected,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
    WaitFinished,
)


def each(stacks: Sequence[Sequence[str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("kinds", stacks, ids="-".join)


every_stack, every_timed_stack = each(STACKS), each(TIMED)


@attrs.define(eq=False)
class Service:
    """What is called: it takes some time, and then does what it is for."""

    answer: object = attrs.field(factory=object)
    seconds: float = 0.25
    error: BaseException | None = None
    calls: int = 0
    left: list[float] = attrs.field(factory=list[float])
    """Seconds until the nearest deadline, when it was called."""

    async def use(self, argument: int, *, option: int = 0) -> object:
        assert (argument, option) == (7, 0)
        self.calls += 1
        self.left.append(trio.current_effective_deadline() - trio.current_time())
        await trio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return self.answer


async def outcome_of(
    call: Callable[..., Awaitable[Any]], service: Service, limit: float = math.inf
) -> object:
    """Make one call, which is given up after *limit* seconds, and return what came out of it."""
    with trio.move_on_after(limit) as scope:
        try:
            return await call(service.use, 7, name="use")
        except BaseException as error:
            if isinstance(error, trio.Cancelled):
                raise
            return error
    assert scope.cancelled_caught
    return scope


WAYS: dict[str, Way] = {
    "watched": lambda stack: stack.watched.call,
    "plain": lambda stack: stack.plain.call,
    "by hand": lambda stack: stack.by_hand,
}


async def run_all(
    kinds: Sequence[str],
    make: Callable[[], Service],
    limits: Sequence[float] = (),
    limit: float = math.inf,
) -> tuple[object, Service, Stack, list[Event]]:
    """Make the call in three ways, which must come to the same; return all about the first."""
    runs: dict[str, Any] = {}
    for name, way in WAYS.items():
        stack, service, heard = Stack(make_layers(kinds, limits)), make(), list[Event]()
        watch = Stopwatch()
        # A pipeline has a call of its own around those of its layers.
        with subscribe(within_calls(heard.append)):
            outcome = await outcome_of(way(stack), service, limit)
        told = Counter(type(event) for event in heard)
        facts = (type(outcome), service.calls, stack.statistics(), told, watch.seconds)
        runs[name] = (facts, (outcome, service, stack, heard))
    assert runs["watched"][0] == runs["plain"][0] == runs["by hand"][0]
    result: tuple[object, Service, Stack, list[Event]] = runs["watched"][1]
    stack, heard = result[2], result[3]
    stack.check()
    assert {event.operation for event in heard} <= {"use"}
    assert {seen for probe in stack.probes for seen in probe.seen} == {((7,), "use")}
    return result


def kinds_of(heard: Sequence[Event], *kinds: type[Event]) -> list[Event]:
    return [event for event in heard if isinstance(event, kinds)]


# --- success and failure --------------------------------------------------------------------------


@every_stack
async def test_success(autojump_clock: MockClock, kinds: Sequence[str]) -> None:
    """One call, whose result comes out as the object that it is, and nobody has a verdict."""
    outcome, service, stack, heard = await run_all(kinds, Service)
    assert outcome is service.answer
    assert service.calls == 1
    assert {probe.statistics() for probe in stack.probes} == {(1, 1, 0, 0, 0)}
    assert kinds_of(heard, *VERDICTS) == []


@every_stack
async def test_failure(autojump_clock: MockClock, kinds: Sequence[str]) -> None:
    """The error comes out as the object that it is, or what a fallback gives instead of it.

    Whoever is around a fallback has seen a success; whoever is within has seen the failure, and a
    repeat around a repeat repeats it.
    """
    error = OSError("mine")
    outcome, service, stack, heard = await run_all(kinds, lambda: Service(error=error))
    assert outcome is (INSTEAD if "fallback" in kinds else error)
    outside = kinds.index("fallback") if "fallback" in kinds else -1
    repeats = [kind for kind in kinds[outside + 1 :] if kind in {"retry", "hedge"}]
    if "fallback" not in kinds[outside + 1 :]:
        assert service.calls == 2 ** len(repeats)
    assert stack.probes[-1].raised == service.calls
    assert reachable(error) == [error]
    assert kinds_of(heard, TimedOut, Rejected, CircuitStateChanged) == []


@every_stack
async def test_tracebacks_do_not_grow(autojump_clock: MockClock, kinds: Sequence[str]) -> None:
    """Of an instance that is raised again for every attempt."""
    error = OSError("mine")
    await outcome_of(Stack(make_layers(kinds)).plain.call, Service(error=error))
    assert depth(error) <= 2 + 9 * len(kinds)


def depth(error: BaseException) -> int:
    traceback, frames = error.__traceback__, 0
    while traceback is not None:
        traceback, frames = traceback.tb_next, frames + 1
    return frames


# --- time limits ----------------------------------------------------------------------------------


@every_timed_stack
async def test_timeout(autojump_clock: MockClock, kinds: Sequence[str]) -> None:
    """An operation that hangs ends with the first limit that expires, which alone counts.

    All limits are of the same length here, so it is the outermost of those that begin together.
    """
    limits = [1.0] * len(kinds)
    outcome, service, stack, heard = await run_all(kinds, lambda: Service(seconds=math.inf), limits)
    first = kinds.index("timeout")
    if "fallback" in kinds[:first]:
        assert outcome is INSTEAD
    else:
        assert isinstance(outcome, OperationTimeoutError)
        assert outcome.timeout == 1
    repeats = [kind for kind in kinds[:first] if kind in {"retry", "hedge"}]
    assert service.calls == 2 ** len(repeats)
    timeouts = [layer for layer in stack.layers if isinstance(layer, Timeout)]
    expired = [timeout.statistics().timed_out for timeout in timeouts]
    assert expired == [service.calls, *[0] * (len(expired) - 1)]
    assert len(kinds_of(heard, TimedOut)) == service.calls


@every_timed_stack
async def test_a_limit_further_in_that_is_shorter(
    autojump_clock: MockClock, kinds: Sequence[str]
) -> None:
    """It is the one that expires; the others see a failure, unless they expire as well."""
    limits = [1000.0 / 10**index for index in range(len(kinds))]
    outcome, service, stack, _ = await run_all(kinds, lambda: Service(seconds=math.inf), limits)
    last = len(kinds) - 1 - list(reversed(kinds)).index("timeout")
    if "fallback" in kinds[:last]:
        assert outcome is INSTEAD
    else:
        assert isinstance(outcome, OperationTimeoutError)
        assert outcome.timeout == limits[last]
    calls = stack.probes[last].calls
    assert stack.probes[last].raised == calls
    assert stack.layers[last].statistics() == TimeoutStatistics(calls, timed_out=calls)
    assert service.calls >= calls


@every_stack
async def test_deadlines(autojump_clock: MockClock, kinds: Sequence[str]) -> None:
    """The operation sees the nearest: of the caller, and of every limit around it."""
    for lengths in ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]):
        limits = lengths[: len(kinds)]
        timed = [limit for kind, limit in zip(kinds, limits, strict=True) if kind == "timeout"]
        for around in (0.5, 2.5):
            _, service, _, _ = await run_all(kinds, Service, limits, around)
            assert service.left == [pytest.approx(min(around, *timed, math.inf))]


# --- what is no error -----------------------------------------------------------------------------


@every_stack
async def test_cancellation(autojump_clock: MockClock, kinds: Sequence[str]) -> None:
    """From outside, it is neither a success nor a failure, for anybody."""
    outcome, service, stack, heard = await run_all(
        kinds, lambda: Service(seconds=math.inf), limit=0.5
    )
    assert isinstance(outcome, trio.CancelScope)
    assert service.calls == 1
    assert {probe.statistics() for probe in stack.probes} == {(1, 0, 0, 1, 0)}
    assert kinds_of(heard, *VERDICTS) == []


@every_timed_stack
async def test_cancellation_at_the_instant_of_our_own_timeout(
    autojump_clock: MockClock, kinds: Sequence[str]
) -> None:
    """It wins, and is counted nowhere."""
    outcome, _, stack, heard = await run_all(
        kinds, lambda: Service(seconds=math.inf), [1.0] * len(kinds), limit=1
    )
    assert isinstance(outcome, trio.CancelScope)
    assert {probe.statistics() for probe in stack.probes} == {(1, 0, 0, 1, 0)}
    assert kinds_of(heard, *VERDICTS) == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
@every_stack
async def test_what_stops_the_program(
    autojump_clock: MockClock, kinds: Sequence[str], kind: type[BaseException]
) -> None:
    """It comes out at once, after one call, and says nothing about what was called."""
    error = kind("stop")
    outcome, service, stack, heard = await run_all(kinds, lambda: Service(error=error))
    assert isinstance(outcome, BaseException)
    assert leaves(outcome) == [error]
    assert service.calls == 1
    assert {probe.statistics() for probe in stack.probes} == {(1, 0, 0, 0, 1)}
    assert kinds_of(heard, *VERDICTS) == []
    attempts = kinds_of(heard, AttemptStarted, AttemptFinished)
    assert len(attempts) == 2 * kinds.count("retry")


# --- context --------------------------------------------------------------------------------------

_variable: ContextVar[str] = ContextVar("variable")


@every_stack
async def test_context(autojump_clock: MockClock, kinds: Sequence[str]) -> None:
    """The operation sees the caller's, and what it sets the caller sees: it is the same task.

    Only a hedge, which may run it twice at a time, gives it a context of its own.
    """
    _variable.set("caller's")
    seen, tasks = list[str](), list[trio.lowlevel.Task]()

    async def look() -> None:
        seen.append(_variable.get())
        tasks.append(trio.lowlevel.current_task())
        _variable.set("operation's")
        await trio.lowlevel.checkpoint()

    await Stack(make_layers(kinds)).plain.call(look)
    assert seen == ["caller's"]
    is_apart = "hedge" in kinds
    assert (tasks[0] is trio.lowlevel.current_task()) is not is_apart
    assert _variable.get() == ("caller's" if is_apart else "operation's")


@every_stack
async def test_ctrl_c_reaches_the_operation(kinds: Sequence[str]) -> None:
    """Whatever code of ours is protected from it, the operation is not."""

    async def look() -> bool:
        await trio.lowlevel.checkpoint()
        return trio.lowlevel.currently_ki_protected()

    assert await Stack(make_layers(kinds)).plain.call(look) is False
