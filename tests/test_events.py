"""Events: what is reported, to whom, in what order, and what a listener can't break."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import attrs
import pytest
import trio
import trio.testing

from tests.operations import within_calls
from tests.test_retry import Script, errors, exactly, is_busy
from trio_resilience import (
    AttemptFinished,
    AttemptStarted,
    Event,
    OperationFinished,
    OperationsFailedError,
    OperationStarted,
    OperationTimeoutError,
    RetryGaveUp,
    RetryScheduled,
    TimedOut,
    Timeout,
    TimeoutStatistics,
    map_with_limit,
    run_with_limit,
    subscribe,
)
from trio_resilience._engine import _report as internals

if TYPE_CHECKING:
    from collections.abc import Iterator
    from random import Random

    from trio.testing import MockClock


@attrs.define(eq=False)
class Listener:
    """Remembers what it heard."""

    heard: list[Any] = attrs.field(factory=list[Any])

    def __call__(self, event: Event) -> None:
        self.heard.append(event)

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.heard if type(event) is kind]

    @property
    def kinds(self) -> list[type[Event]]:
        return [type(event) for event in self.heard]


# --- what Retry and Timeout report --------------------------------------------------------------


async def test_the_attempts_of_a_call(autojump_clock: MockClock) -> None:
    """Each start and each end, and each wait, in order, with instants and durations."""
    given, listener = errors(2), Listener()
    policy = exactly(name="db")
    with subscribe(within_calls(listener)):
        await policy.call(Script([*given], seconds=0.5), name="load")
    finished, scheduled = listener.of(AttemptFinished), listener.of(RetryScheduled)
    assert listener.kinds == [
        *[AttemptStarted, AttemptFinished, RetryScheduled] * 2,
        AttemptStarted,
        AttemptFinished,
    ]
    assert [event.time for event in listener.heard] == [0, 0.5, 0.5, 1.5, 2, 2, 4, 4.5]
    assert [event.attempt for event in listener.heard] == [1, 1, 1, 2, 2, 2, 3, 3]
    assert [event.error for event in finished] == [*given, None]
    assert {event.duration for event in finished} == {0.5}
    assert [(event.delay, event.error) for event in scheduled] == [(1, given[0]), (2, given[1])]
    task = trio.lowlevel.current_task().name
    assert {(e.policy, e.operation, e.task) for e in listener.heard} == {("db", "load", task)}


async def test_the_end_of_a_call_that_gives_up(autojump_clock: MockClock) -> None:
    """With the reason, which is also in the note, and what came last."""
    listener, given = Listener(), errors(3)
    with subscribe(within_calls(listener)), pytest.raises(OSError, match="failure 3"):
        await exactly().call(Script([*given]))
    (gave_up,) = listener.of(RetryGaveUp)
    assert listener.heard[-1] is gave_up
    assert (gave_up.attempts, gave_up.error, gave_up.result) == (3, given[2], None)
    assert gave_up.reason in given[2].__notes__[0]


def no_delay(_: Random) -> Iterator[float]:
    return iter([])


@pytest.mark.parametrize(
    "options, steps, word",
    [
        ({}, [ValueError("x")], "not retried"),
        ({"total_timeout": 1}, [OSError("x")], "deadline"),
        ({"backoff": no_delay}, [OSError("x")], "backoff"),
        ({"max_attempts": 1}, [OSError("x")], "1 attempt"),
    ],
)
async def test_the_reason_to_give_up(
    autojump_clock: MockClock, options: dict[str, Any], steps: list[Exception], word: str
) -> None:
    """In words."""
    listener = Listener()
    with subscribe(listener), pytest.raises(Exception, match="x"):
        await exactly(**options).call(Script([*steps]))
    (gave_up,) = listener.of(RetryGaveUp)
    assert word in gave_up.reason


async def test_refused_results(autojump_clock: MockClock) -> None:
    """Such an attempt returned: it has no error; what was refused is reported with the wait."""
    listener = Listener()
    policy = exactly(max_attempts=2, retry_result=is_busy)
    with subscribe(listener), pytest.raises(Exception, match="no acceptable result"):
        await policy.call(Script(["busy", "busy"]))
    assert [event.error for event in listener.of(AttemptFinished)] == [None, None]
    (scheduled,), (gave_up,) = listener.of(RetryScheduled), listener.of(RetryGaveUp)
    assert (scheduled.error, scheduled.result) == (None, "busy")
    assert (gave_up.error, gave_up.result, gave_up.attempts) == (None, "busy", 2)


@pytest.mark.parametrize("option", ["attempt_timeout", "total_timeout"])
async def test_a_limit_that_expires(autojump_clock: MockClock, option: str) -> None:
    """Reported once, with its length, at its instant."""
    listener = Listener()
    with subscribe(listener), pytest.raises(OperationTimeoutError) as caught:
        await exactly(max_attempts=1, name="db", **{option: 2}).call(trio.sleep_forever)
    (timed_out,) = listener.of(TimedOut)
    assert (timed_out.timeout, timed_out.time, timed_out.policy) == (2, 2, "db")
    assert timed_out.operation == "sleep_forever"
    (finished,) = listener.of(AttemptFinished)
    assert finished.error is caught.value


async def test_a_timeout_policy_reports_its_expiry(autojump_clock: MockClock) -> None:
    """And nothing else."""
    listener, timeout = Listener(), Timeout(2, name="db")
    with subscribe(within_calls(listener)):
        await timeout.call(trio.sleep, 1)
        with pytest.raises(OperationTimeoutError):
            await timeout.call(trio.sleep, 9, name="nap")
        with pytest.raises(OperationTimeoutError), timeout.scope():
            await trio.sleep_forever()
        with trio.move_on_after(2):
            await timeout.call(trio.sleep, 9)
    assert listener.kinds == [TimedOut, TimedOut]
    assert [(e.timeout, e.time, e.policy) for e in listener.heard] == [(2, 3, "db"), (2, 5, "db")]
    assert listener.heard[0].operation == "nap"


async def test_what_was_cancelled_is_not_reported_as_success(autojump_clock: MockClock) -> None:
    """The attempt has ended, and neither returned nor raised."""
    listener = Listener()
    with subscribe(within_calls(listener)), trio.move_on_after(1):
        await exactly(attempt_timeout=5).call(trio.sleep_forever)
    assert listener.kinds == [AttemptStarted, AttemptFinished]
    finished = listener.heard[-1]
    assert isinstance(finished, AttemptFinished)
    assert (finished.cancelled, finished.error, finished.duration) == (True, None, 1)


async def test_operations_are_named_after_their_function(autojump_clock: MockClock) -> None:
    """Behind a partial too, and when decorated."""

    async def load() -> None:
        pass

    listener = Listener()
    with subscribe(within_calls(listener)):
        await exactly().call(load)
        await exactly().call(partial(load))
        await exactly()(load)()
    assert len(listener.heard) == 6
    assert {event.operation.rpartition(".")[2] for event in listener.heard} == {"load"}


# --- what run_with_limit reports ----------------------------------------------------------------


async def test_operations_report_start_and_end(autojump_clock: MockClock) -> None:
    """With their index and duration; failed, cancelled and timed out ones are told apart."""
    listener, failure = Listener(), OSError("down")
    ops = [Script(seconds=1), Script([failure], seconds=2), Script(seconds=9)]
    with subscribe(listener), pytest.raises(OperationsFailedError):
        await run_with_limit(None, ops)
    assert {event.index for event in listener.of(OperationStarted)} == {0, 1, 2}
    finished = {event.index: event for event in listener.of(OperationFinished)}
    assert [finished[index].duration for index in range(3)] == [1, 2, 2]
    assert [finished[index].error for index in range(3)] == [None, failure, None]
    assert [finished[index].cancelled for index in range(3)] == [False, False, True]
    assert {event.policy for event in listener.heard} == {"run_with_limit"}


async def test_events_of_a_policy_lie_between_those_of_its_operation(
    autojump_clock: MockClock,
) -> None:
    """All in the order in which they happen."""
    listener = Listener()
    with subscribe(within_calls(listener)):
        await map_with_limit(None, trio.sleep, [1.0], policy=exactly())
    assert listener.kinds == [OperationStarted, AttemptStarted, AttemptFinished, OperationFinished]


# --- subscribe ----------------------------------------------------------------------------------


async def call_once() -> None:
    await exactly().call(Script())


async def test_a_listener_hears_its_block_alone() -> None:
    """What the block starts included; what others do is not its business; then it is silent."""
    listener, other = Listener(), Listener()

    async def elsewhere() -> None:
        with subscribe(within_calls(other)):
            await call_once()

    async with trio.open_nursery() as nursery:
        with subscribe(within_calls(listener)):
            nursery.start_soon(call_once)
            await call_once()
            await trio.testing.wait_all_tasks_blocked()
            assert len(listener.heard) == 4
        nursery.start_soon(elsewhere)
        nursery.start_soon(call_once)
        await call_once()
    assert len(listener.heard) == 4
    assert len(other.heard) == 2


async def test_a_task_that_outlives_the_block_is_not_heard(autojump_clock: MockClock) -> None:
    """Silent once the block has ended, also in what it started; an outer block still hears."""
    listener, outer = Listener(), Listener()

    async def later() -> None:
        await trio.sleep(5)
        await call_once()

    with subscribe(within_calls(outer)):
        async with trio.open_nursery() as nursery:
            with subscribe(within_calls(listener)):
                nursery.start_soon(later)
                await trio.sleep(1)
    assert listener.heard == []
    assert len(outer.heard) == 2


async def test_many_listeners_hear_in_their_order() -> None:
    """Nested blocks, and the same listener twice, too."""
    heard = list[str]()
    with (
        subscribe(within_calls(lambda _: heard.append("outer"))),
        subscribe(within_calls(lambda _: heard.append("inner"))),
    ):
        await exactly().call(Script())
    assert heard == ["outer", "inner"] * 2
    listener = Listener()
    with subscribe(within_calls(listener)):
        with subscribe(within_calls(listener)):
            await call_once()
        await call_once()
    assert len(listener.heard) == 6


async def test_blocks_may_end_in_any_order() -> None:
    """As those of an exit stack, or of fixtures, may do."""
    first, second = Listener(), Listener()
    stack = contextlib.ExitStack()
    stack.enter_context(subscribe(within_calls(first)))
    inner = subscribe(within_calls(second))
    inner.__enter__()
    stack.close()
    await call_once()
    inner.__exit__(None, None, None)
    await call_once()
    assert (len(first.heard), len(second.heard)) == (0, 2)


def test_a_whole_program_is_heard_from_outside() -> None:
    """Around `trio.run`; two runs are heard by one."""
    listener = Listener()
    with subscribe(within_calls(listener)):
        trio.run(call_once)
        trio.run(call_once)
    trio.run(call_once)
    assert len(listener.heard) == 4


async def test_a_listener_that_raises_changes_nothing(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once; other listeners hear all, and so does itself."""
    before, after, calls = Listener(), Listener(), list[Event]()

    def broken(event: Event) -> None:
        calls.append(event)
        raise ZeroDivisionError("in the listener")

    with (
        subscribe(within_calls(before)),
        subscribe(within_calls(broken)),
        subscribe(within_calls(after)),
    ):
        assert await exactly().call(Script(list(errors(2)))) == "ok"
    assert len(calls) == len(before.heard) == len(after.heard) == 8
    assert [record.name for record in caplog.records] == ["trio_resilience"]
    assert "in the listener" in caplog.text


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
async def test_what_stops_a_program_stops_it_in_a_listener_too(stop: type[BaseException]) -> None:
    """Only `Exception` is handled."""

    def broken(_: Event) -> None:
        raise stop

    with subscribe(broken), pytest.raises(stop):
        await call_once()


@pytest.mark.parametrize("kind", ["raises", "subscribes", "calls"])
async def test_a_listener_may_use_the_library(autojump_clock: MockClock, kind: str) -> None:
    """Statistics are already up to date when it is called, and it may subscribe another."""
    policy, seen = exactly(), list[Any]()
    inner = Listener()
    stack = contextlib.ExitStack()

    def listener(event: Event) -> None:
        seen.append(policy.statistics())
        if kind == "subscribes" and len(seen) == 1:
            stack.enter_context(subscribe(within_calls(inner)))
        if kind == "raises" and isinstance(event, RetryGaveUp):
            assert policy.statistics().given_up == 1
            raise OSError

    with stack, subscribe(within_calls(listener)), pytest.raises(ValueError, match="wrong"):
        await policy.call(Script([OSError("again"), ValueError("wrong")]))
    assert seen[-1].given_up == 1
    assert seen[0].attempts == 1


async def test_nothing_is_built_when_nobody_listens(
    autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record, and no function of ours to make one."""
    built = list[object]()

    def build(*_: object, **__: object) -> None:
        built.append(1)

    for kind in (AttemptStarted, AttemptFinished, RetryScheduled, RetryGaveUp, TimedOut):
        monkeypatch.setattr(kind, "__init__", build)
    with pytest.raises(OSError, match="failure 3"):
        await exactly().call(Script([*errors(3)]))
    with pytest.raises(OperationTimeoutError):
        await Timeout(1).call(trio.sleep_forever)
    await run_with_limit(None, [Script()])
    assert built == []
    assert not internals.open_subscriptions


@pytest.mark.parametrize("listener", [None, 5, "print"])
def test_a_listener_is_a_function(listener: Any) -> None:
    """Anything else is refused at the door."""
    with pytest.raises(TypeError, match=r"^`listener` must be a function"):
        subscribe(listener).__enter__()


def test_an_async_listener_is_refused() -> None:
    """It would never be awaited."""

    async def listener(_: Event) -> None:
        pass

    with pytest.raises(TypeError, match=r"^`listener` must be a (plain )?function"):
        subscribe(listener).__enter__()


def test_events_are_frozen_records() -> None:
    """With keywords only; all have the four fields of the base."""
    base = {"time": 0.0, "task": "t", "policy": "p", "operation": "o"}
    event = AttemptStarted(**base, attempt=1)  # type: ignore[arg-type]
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.attempt = 2  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(event, Event)
    assert event == AttemptStarted(**base, attempt=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        AttemptStarted(1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def test_an_event_shows_all_that_it_knows(autojump_clock: MockClock) -> None:
    """Its name and its fields, those that all events share first."""
    listener = Listener()
    with subscribe(within_calls(listener)):
        await exactly(name="mine").call(trio.sleep, 1, name="nap")
    shown = repr(listener.heard[0])
    assert shown.startswith("AttemptStarted(time=0.0, task=")
    assert shown.endswith("policy='mine', operation='nap', attempt=1)")


def test_records_are_equal_if_they_are_of_one_kind_with_equal_fields() -> None:
    """And can be in a set; what else compares itself to one, is asked."""
    one, same = TimeoutStatistics(3, 1), TimeoutStatistics(3, 1)
    assert one == same
    assert {one, same} == {one}
    assert one != TimeoutStatistics(3, 2)
    assert one != (3, 1)
    assert one == mock.ANY
