"""CircuitBreaker: Ctrl-C at any line comes out once, and leaves every place and count as it was."""

from __future__ import annotations

import gc
import sys
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._circuits import CLOSED, ISOLATED, Form, begin, call, decorated, guard
from tests.operations import leaves, returns
from tests.test_concurrency_interrupts import Tripwire
from trio_resilience import CallAbandonedError, CircuitOpenError, Event, subscribe
from trio_resilience._circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import FrameType

RECOVERY = 5


@attrs.define(eq=False)
class User:
    """Whoever calls under a breaker, and knows what its operations have said."""

    form: Form
    options: dict[str, Any]
    breaker: CircuitBreaker = attrs.field(init=False)
    said: int = 0

    def __attrs_post_init__(self) -> None:
        self.breaker = CircuitBreaker(
            recovery_timeout=RECOVERY, half_open_timeout=1e9, **self.options
        )

    async def op(self, error: Exception | None = None) -> None:
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        self.said += 1
        if error is not None:
            raise error

    async def use(self, error: Exception | None = None) -> None:
        with suppress(OSError, CircuitOpenError, CallAbandonedError):
            await self.form(self.breaker, self.op, error)

    async def check(self) -> list[str]:
        """Say what is wrong with the breaker when nobody uses it."""
        wrong, now = list[str](), self.breaker.statistics()
        if now.in_flight:
            wrong.append(f"{now.in_flight} in flight")
        # One of them may have been interrupted when it had said its word, and not yet been heard.
        if not self.said - 1 <= now.calls <= self.said:
            wrong.append(f"{now.calls} calls counted, of {self.said}")
        if self.breaker.state is ISOLATED:
            wrong.append("it is isolated")
            self.breaker.reset()
        await trio.sleep(self.breaker.retry_after or 0)
        places = 2 if self.breaker.state is CLOSED else 1
        async with trio.open_nursery() as nursery:
            visits = await begin(nursery, self.breaker, 2)
            let_in = sum(visit.has_run for visit in visits)
            if let_in != places:
                wrong.append(f"{let_in} of 2 are let in while it is {now.state}")
            for visit in visits:
                visit.tell("ok")
        if self.breaker.state is not CLOSED:
            wrong.append("it does not close")
        return wrong


# --- at any line ----------------------------------------------------------------------------------


async def calls(user: User) -> None:
    await user.use()
    await user.use(OSError("down"))
    await user.use()


async def outage(user: User) -> None:
    """Open it, be refused, be a probe that fails, and one that says nothing, and one that does."""
    await user.use(OSError("down"))
    await user.use()
    for error in (OSError("down"), None):
        await trio.sleep(user.breaker.retry_after or 0)
        await user.use(error)


async def by_hand(user: User) -> None:
    with user.breaker.isolate():
        await user.use()
    handle = user.breaker.isolate()
    try:
        await user.use()
    finally:
        handle.release()
    user.breaker.reset()
    await user.use()


async def prober(user: User) -> None:
    """Let a prober close it, which fails once before."""
    script = [OSError("down"), None]

    async def probe() -> None:
        await user.op(script.pop(0))

    await user.use(OSError("down"))
    async with trio.open_nursery() as nursery:
        await nursery.start(user.breaker.keep_probing, probe)
        await trio.sleep(3 * RECOVERY)
        nursery.cancel_scope.cancel()


async def prober_itself(user: User) -> None:
    """Be the one who probes."""
    await user.use(OSError("down"))
    with trio.move_on_after(1.5 * RECOVERY):
        await user.breaker.keep_probing(user.op)


# Each with a form of the call, the circuit's options, and whether somebody listens.
JOBS: list[tuple[Callable[[User], Awaitable[None]], Form, dict[str, Any], bool]] = [
    (calls, decorated, {}, False),
    (calls, call, {"failure_rate": 0.9, "window_seconds": 10, "slow_call_duration": 1}, False),
    (calls, guard, {"failure_rate": 0.9, "window_calls": 20}, False),
    (outage, call, {"failure_threshold": 1, "failure_result": [].__contains__}, True),
    (outage, call, {"failure_threshold": 1, "cancel_in_flight": True}, False),
    (outage, guard, {"failure_threshold": 1, "cancel_in_flight": True}, True),
    (by_hand, call, {}, True),
    (prober, call, {"failure_threshold": 1}, True),
    (prober_itself, guard, {"failure_threshold": 1}, False),
]


FILES = "_circuit_breaker.py", "_circuit.py", "_guard.py", "_breaker.py", "_window.py", "_run.py"
"""What a circuit is made of; the rest has its own tests."""


class Once(Tripwire):
    """Watch no longer than until Ctrl-C is pressed, for to watch takes most of the time."""

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Tripwire | None:
        watcher = super().__call__(frame, event, argument)
        if self.where:
            sys.settrace(None)
        return watcher


@attrs.define(eq=False)
class Map(Tripwire):
    """Find out when each line is executed."""

    when: dict[tuple[str, int], list[int]] = attrs.field(factory=dict[tuple[str, int], list[int]])

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Tripwire | None:
        watcher = super().__call__(frame, event, argument)
        line = frame.f_code.co_filename, frame.f_lineno
        if watcher is not None and event == "line" and line[0].endswith(FILES):
            self.when.setdefault(line, []).append(self.lines)
        return watcher

    def points(self) -> list[int]:
        """Return when each line is executed first, and when last."""
        return sorted({when for each in self.when.values() for when in (each[0], each[-1])})


def scenario(
    job: Any, form: Form, options: dict[str, Any], listens: bool, found: list[str]
) -> Callable[[], Awaitable[None]]:
    """Return a main task that does the job, and finds out what is wrong after that."""
    user, heard = User(form, options), list[Event]()

    async def main() -> None:
        try:
            try:
                with subscribe(heard.append) if listens else nullcontext():
                    await job(user)
            finally:
                sys.settrace(None)
                # Here comes out what may still be due.
                await trio.lowlevel.checkpoint()  # noqa: ASYNC102 - nobody cancels it
        finally:
            found.extend(await user.check())  # noqa: ASYNC102 - likewise

    return main


@pytest.mark.watchdog(120)
# Between the call of an async function and its await, Ctrl-C leaves a coroutine behind anywhere.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("job, form, options, listens", JOBS)
def test_ctrl_c_at_any_line(job: Any, form: Form, options: dict[str, Any], listens: bool) -> None:
    """It comes out once; nobody is left inside, no place is lost, and no count is wrong."""
    problems, pressed = list[str](), 0
    make = partial(scenario, job, form, options, listens)
    gc.collect()  # what other tests have left is not to end in the middle, and be counted
    whole = Map(at=-1)
    assert whole.trace(make(problems)) is None
    assert len(whole.points()) > 20
    for point in whole.points():
        found, wire = list[str](), Once(at=point)
        error = wire.trace(make(found))
        kinds = [] if error is None else [type(leaf) for leaf in leaves(error)]
        pressed += bool(wire.where)
        if wire.where and kinds != [KeyboardInterrupt]:
            found.append(f"what came out is {error!r}, caused by {error and error.__cause__!r}")
        problems += [f"{wire.where}: {problem}" for problem in found]
    assert not problems, "\n".join(sorted(set(problems)))
    assert pressed > 0.9 * len(whole.points())


# --- listeners ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("holds", [0, 1])
async def test_a_listener_that_stops_the_program_leaves_no_hold(
    stop: type[BaseException], holds: int
) -> None:
    """Of whoever wanted to isolate it and got no handle; the holds of others stay."""
    breaker = CircuitBreaker()
    handles = [breaker.isolate() for _ in range(holds)]

    def listener(event: Event) -> None:
        raise stop

    def isolate() -> None:
        with subscribe(listener), breaker.isolate():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError if holds else stop):
        isolate()
    assert breaker.state is (ISOLATED if holds else CLOSED)
    for handle in handles:
        handle.release()
    await breaker.call(returns, 1)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
async def test_a_listener_that_stops_the_program_holds_up_no_release(
    stop: type[BaseException],
) -> None:
    """Nor a reset: they are done when it hears of them."""
    breaker = CircuitBreaker()

    def listener(event: Event) -> None:
        raise stop

    for by_handle in (True, False):
        handle = breaker.isolate()
        with subscribe(listener), pytest.raises(stop):
            (handle.release if by_handle else breaker.reset)()
        assert breaker.state is CLOSED
        await breaker.call(returns, 1)
