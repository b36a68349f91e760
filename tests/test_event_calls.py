"""Every policy tells its listeners when a call of it starts, and what has become of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import returns
from trio_resilience import (
    Bulkhead,
    CallFinished,
    CallStarted,
    CircuitBreaker,
    Constant,
    Event,
    Fallback,
    Hedge,
    Keyed,
    Metrics,
    Pipeline,
    Policy,
    RateLimiter,
    RejectedError,
    Retry,
    Semaphore,
    Timeout,
    run_in,
    subscribe,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

POLICIES: dict[str, Callable[[], Policy[Any]]] = {
    "breaker": lambda: CircuitBreaker("mine"),
    "bulkhead": lambda: Bulkhead(1, name="mine"),
    "fallback": lambda: Fallback(value=1, on=KeyError, name="mine"),
    "hedge": lambda: Hedge(after=60, on=KeyError, name="mine"),
    "keyed": lambda: Keyed(lambda _: Timeout(60), key=lambda *_: 1, name="mine"),
    "limiter": lambda: RateLimiter(1, name="mine"),
    "limiters": lambda: RateLimiter.all_of(RateLimiter(1), RateLimiter(2), name="mine"),
    "pipeline": lambda: Pipeline(Timeout(60), Timeout(50), name="mine"),
    "retry": lambda: Retry(max_attempts=1, name="mine"),
    "retry with limits": lambda: Retry(max_attempts=1, attempt_timeout=60, name="mine"),
    "semaphore": lambda: Semaphore(1, name="mine"),
    "timeout": lambda: Timeout(60, name="mine"),
}
each_policy = pytest.mark.parametrize("make", POLICIES.values(), ids=POLICIES)


class Calls:
    """What was heard of the calls of the policy that is named mine."""

    def __init__(self) -> None:
        self.heard: list[Any] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, (CallStarted, CallFinished)) and event.policy == "mine":
            self.heard.append(event)

    def finished(self) -> CallFinished:
        """The end of the one call that there was."""
        started, finished = self.heard
        assert isinstance(started, CallStarted)
        assert isinstance(finished, CallFinished)
        assert (started.operation, started.task) == (finished.operation, finished.task)
        assert finished.time - started.time == finished.duration
        return finished


async def take(seconds: float, error: BaseException | None = None) -> str:
    await trio.sleep(seconds)
    if error is not None:
        raise error
    return "result"


@each_policy
async def test_a_success(autojump_clock: MockClock, make: Callable[[], Policy[Any]]) -> None:
    """With its duration, in the order in which things happen."""
    calls = Calls()
    with subscribe(calls):
        assert await make().call(take, 2, name="nap") == "result"
    finished = calls.finished()
    assert (finished.operation, finished.time, finished.duration) == ("nap", 2, 2)
    assert (finished.error, finished.cancelled) == (None, False)


@each_policy
async def test_a_failure(autojump_clock: MockClock, make: Callable[[], Policy[Any]]) -> None:
    """With the error that comes out."""
    calls, error = Calls(), OSError("mine")
    with subscribe(calls), pytest.raises(OSError, match="mine"):
        await make()(take)(2, error)
    finished = calls.finished()
    assert (finished.operation, finished.duration) == ("take", 2)
    assert (finished.error, finished.cancelled) == (error, False)


@each_policy
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
async def test_what_stops_the_program(
    autojump_clock: MockClock, make: Callable[[], Policy[Any]], stop: type[BaseException]
) -> None:
    """Neither a success nor a failure."""
    calls = Calls()
    with subscribe(calls), pytest.raises(stop):
        await make().call(take, 1, stop())
    finished = calls.finished()
    assert (finished.duration, finished.error, finished.cancelled) == (1, None, True)


@each_policy
async def test_a_cancellation(autojump_clock: MockClock, make: Callable[[], Policy[Any]]) -> None:
    """Likewise."""
    calls = Calls()
    with subscribe(calls), trio.move_on_after(3) as scope:
        await make().call(take, 60)
    assert scope.cancelled_caught
    finished = calls.finished()
    assert (finished.duration, finished.error, finished.cancelled) == (3, None, True)


@each_policy
async def test_what_is_no_operation_is_no_call(make: Callable[[], Policy[Any]]) -> None:
    """It is refused before anything is told."""
    calls = Calls()
    mistake: Any = "take"
    with subscribe(calls), pytest.raises(TypeError, match="must be an async function"):
        await make().call(mistake)
    assert calls.heard == []


async def test_a_mistake_that_only_its_call_tells_is_a_call_that_failed(
    autojump_clock: MockClock,
) -> None:
    """Whatever is told to begin is told to end."""
    calls = Calls()
    mistake: Any = lambda: 5  # noqa: E731 - what it returns can't be awaited
    with subscribe(calls), pytest.raises(TypeError, match="can't be awaited") as caught:
        await Retry(name="mine").call(mistake)
    assert calls.finished().error is caught.value


async def test_a_refusal(autojump_clock: MockClock) -> None:
    """Is the error of the call, also of one around it."""
    calls, outer = Calls(), list[Event]()
    breaker = CircuitBreaker("mine", failure_threshold=1)
    with pytest.raises(OSError, match="down"):
        await breaker.call(take, 0, OSError("down"))
    with subscribe(calls), subscribe(outer.append), pytest.raises(RejectedError) as caught:
        await Pipeline(Timeout(5, name="outer"), breaker).call(take, 1)
    assert calls.finished().error is caught.value
    ends = [event for event in outer if isinstance(event, CallFinished)]
    assert [event.policy for event in ends] == ["mine", "outer", "pipeline"]
    assert {id(event.error) for event in ends} == {id(caught.value)}


async def test_calls_nest(autojump_clock: MockClock) -> None:
    """As the layers do, each attempt anew; every one that starts ends."""
    heard, failures = list[Event](), [OSError(), None]

    async def op() -> None:
        await take(1, failures.pop(0))

    outer = Retry(backoff=Constant(0), name="retry")
    keyed = Keyed(lambda _: Timeout(9, name="inner"), key=lambda: 1, name="keyed")
    with subscribe(heard.append):
        await Pipeline(outer, keyed, name="all").call(op)
    told = [
        f"{type(event).__name__.removeprefix('Call')} {event.policy}"
        for event in heard
        if isinstance(event, (CallStarted, CallFinished))
    ]
    attempt = ["Started keyed", "Started inner", "Finished inner", "Finished keyed"]
    assert told == ["Started all", "Started retry", *attempt * 2, "Finished retry", "Finished all"]
    assert {event.operation.rpartition(".")[2] for event in heard} == {"op"}


async def test_counted_calls_are_calls(autojump_clock: MockClock) -> None:
    calls = Calls()
    with subscribe(calls):
        assert (await Retry(name="mine").call_counted(returns, 3)).result == 3
    assert calls.finished().error is None


async def test_in_a_nursery_of_the_callers_choice(autojump_clock: MockClock) -> None:
    """It is told once, in the task in which it runs."""
    calls = Calls()
    with subscribe(calls):
        await run_in(None, returns, 3, policy=Timeout(5, name="mine"), name="job")
    assert calls.finished().task == "job"


def _stop(event: Event) -> None:
    if isinstance(event, CallFinished):
        raise KeyboardInterrupt


@each_policy
async def test_a_listener_may_stop_the_program(
    autojump_clock: MockClock, make: Callable[[], Policy[Any]]
) -> None:
    """Then nothing is held any more: the next call is let through."""
    policy = make()
    with subscribe(_stop), pytest.raises(KeyboardInterrupt):
        await policy.call(take, 1)
    assert await policy.call(take, 1) == "result"


@each_policy
@pytest.mark.parametrize("listener", [Metrics(), Calls()], ids=["counts", "listens"])
def test_an_operation_is_open_to_ctrl_c(
    make: Callable[[], Policy[Any]], listener: Callable[[Event], object]
) -> None:
    """As it is while nobody listens; a further attempt too."""
    seen: list[bool] = []

    async def op() -> None:
        seen.append(trio.lowlevel.currently_ki_protected())
        await trio.lowlevel.checkpoint()
        if len(seen) == 1:
            raise OSError

    async def main() -> None:
        policy = Pipeline(Retry(backoff=Constant(0)), make())
        await policy.call(op)
        await Retry(backoff=Constant(0)).call(op)

    with subscribe(listener):
        trio.run(main)
    assert seen == [False] * 3


async def test_nobody_hears_of_what_is_elsewhere() -> None:
    """Though policies report, since somebody listens to something."""
    calls: list[Event] = []

    async def listen(task_status: trio.TaskStatus[None]) -> None:
        with subscribe(calls.append):
            task_status.started()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        await nursery.start(listen)
        call: Callable[..., Awaitable[int]] = Timeout(5).call
        assert await call(returns, 3) == 3
        nursery.cancel_scope.cancel()
    assert calls == []
