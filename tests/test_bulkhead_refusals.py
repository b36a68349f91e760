"""Bulkhead as a policy: what runs under it, what a refusal costs, and what it tells of itself."""

from __future__ import annotations

import gc
import pickle
import traceback
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests.operations import Steps, fails, leaves, returns, within_calls
from tests.test_bulkhead import ways_into
from tests.test_semaphore import Visitors, counts
from trio_resilience import (
    Bulkhead,
    BulkheadFullError,
    BulkheadStatistics,
    Constant,
    Event,
    Policy,
    Rejected,
    RejectedError,
    Retry,
    Semaphore,
    WaitFinished,
    WaitStarted,
    run_in,
    run_with_limit,
    subscribe,
    transient,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from trio.testing import MockClock

# --- refusals -----------------------------------------------------------------------------------


@attrs.define(eq=False)
class Full:
    """A bulkhead that has no room, and one that makes wait in vain."""

    @staticmethod
    def line() -> Bulkhead:
        bulkhead = Bulkhead(1, queue_size=0)
        bulkhead.acquire_nowait()
        return bulkhead

    @staticmethod
    def wait() -> Bulkhead:
        bulkhead = Bulkhead(1, max_wait=0)
        bulkhead.acquire_nowait()
        return bulkhead


in_either_way = pytest.mark.parametrize("full", [Full.line, Full.wait], ids=["line", "wait"])


@in_either_way
async def test_a_refusal_is_a_checkpoint(full: Callable[[], Bulkhead]) -> None:
    """A loop that tries again and again does not freeze the program."""
    bulkhead = full()
    for enter in ways_into(bulkhead):
        with assert_checkpoints(), pytest.raises(BulkheadFullError):
            await enter()
        with trio.CancelScope() as scope:
            scope.cancel()
            await enter()
        assert scope.cancelled_caught
    assert bulkhead.statistics().rejections == 3
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(try_for_ever, bulkhead)
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            scope.cancel()
    assert bulkhead.statistics().rejections > 5


async def try_for_ever(bulkhead: Bulkhead) -> None:
    while True:
        with suppress(BulkheadFullError):
            await bulkhead.call(returns, 1)


@in_either_way
async def test_refusals_are_distinct_and_do_not_grow(full: Callable[[], Bulkhead]) -> None:
    """A thousand: each an error of its own, as deep as the first, without context."""
    bulkhead, errors = full(), list[BulkheadFullError]()
    for _ in range(1000):
        try:
            await bulkhead.call(returns, 1)
        except BulkheadFullError as error:
            errors.append(error)
    assert len({id(error) for error in errors}) == 1000
    depths = {len(list(traceback.walk_tb(error.__traceback__))) for error in errors}
    assert len(depths) == 1
    assert max(depths) < 8
    assert {(error.__context__, error.__cause__) for error in errors} == {(None, None)}
    assert bulkhead.statistics().rejections == 1000


class Local:
    """Something that a caller holds, to see whether it is let go."""


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Without the collector, what is part of a cycle is never let go."""
    gc.disable()
    yield
    gc.enable()


async def attempt(bulkhead: Bulkhead, held: list[weakref.ref[Local]]) -> None:
    local = Local()
    held.append(weakref.ref(local))
    await bulkhead.call(returns, 1)


@in_either_way
async def test_a_refused_caller_is_let_go(no_collector: None, full: Callable[[], Bulkhead]) -> None:
    """Its frames are freed as soon as the error is handled; so are those of a cancelled one."""
    bulkhead, held = full(), list[weakref.ref[Local]]()
    with suppress(BulkheadFullError):
        await attempt(bulkhead, held)
    waiting = Bulkhead(1)
    waiting.acquire_nowait()
    with trio.CancelScope(deadline=trio.current_time()):
        await attempt(waiting, held)
    await trio.lowlevel.checkpoint()  # until then, trio keeps what it has woken the task with
    assert [ref() for ref in held] == [None, None]


@in_either_way
async def test_a_refusal_pickles(full: Callable[[], Bulkhead]) -> None:
    """With all that a handler reads."""
    with pytest.raises(RejectedError) as caught:
        await full().acquire()
    error = caught.value
    assert isinstance(error, BulkheadFullError)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 - it is our own
    assert type(again) is BulkheadFullError
    for name in ("name", "capacity", "requested", "retry_after", "waited", "args"):
        assert getattr(again, name) == getattr(error, name)
    assert str(again) == str(error)


@in_either_way
async def test_a_refusal_is_not_retried_by_default(
    autojump_clock: MockClock, full: Callable[[], Bulkhead]
) -> None:
    """To come back at once would defeat the purpose; who wants it can ask for it."""
    bulkhead = full()
    with pytest.raises(BulkheadFullError) as caught:
        await Retry(max_attempts=5).call(bulkhead.call, returns, 1)
    assert bulkhead.statistics().rejections == 1
    assert "not retried" in caught.value.__notes__[0]

    async def release_later() -> None:
        await trio.sleep(2.5)
        bulkhead.release()

    retry = Retry(max_attempts=5, on=(transient, RejectedError), backoff=Constant(1))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(release_later)
        assert await retry.call(bulkhead.call, returns, 7) == 7
    assert trio.current_time() == 3
    assert bulkhead.statistics().rejections == 4


async def test_the_refused_operation_is_never_called() -> None:
    """A rejection promises that nothing was run; a coroutine object is closed all the same."""
    bulkhead, called = Full.line(), list[int]()

    async def op() -> None:
        called.append(1)

    with pytest.raises(BulkheadFullError):
        await bulkhead.call(op)
    coro: Any = op()
    with pytest.raises(TypeError, match="coroutine object"):
        await bulkhead.call(coro)
    assert called == []
    assert bulkhead.statistics().rejections == 1


# --- call ---------------------------------------------------------------------------------------


async def test_a_call_runs_in_whatever_way_it_is_made(autojump_clock: MockClock) -> None:
    """Called, decorated, through `run_in`, and as the policy of many."""
    bulkhead, seen = Bulkhead(2, queue_size=5), list[tuple[int, int, int]]()

    async def op(*args: object, **kwargs: object) -> object:
        seen.append(counts(bulkhead))
        await trio.sleep(1)
        return args, kwargs

    assert await bulkhead.call(op, 1, "a") == ((1, "a"), {})
    assert await bulkhead(op)(1, key=2) == ((1,), {"key": 2})
    assert await run_in(None, op, policy=bulkhead) == ((), {})
    assert seen == [(1, 1, 0)] * 3
    await run_with_limit(None, [op] * 6, policy=bulkhead)
    assert trio.current_time() == 6
    assert counts(bulkhead) == (0, 2, 0)
    with pytest.raises(ExceptionGroup) as caught:
        await run_with_limit(None, [op] * 8, policy=bulkhead)
    assert [type(leaf) for leaf in leaves(caught.value)] == [BulkheadFullError]
    assert counts(bulkhead) == (0, 2, 0)


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_a_call_that_fails_gives_its_permit_back(kind: type[BaseException]) -> None:
    """Whatever it raises, which comes out as the same object, and is no rejection."""
    bulkhead, error = Bulkhead(1, max_wait=9), kind()
    with pytest.raises(kind) as caught:
        await bulkhead.call(fails, error)
    assert caught.value is error
    assert error.__context__ is None
    assert counts(bulkhead) == (0, 1, 0)
    assert bulkhead.statistics().rejections == 0


async def test_the_error_of_a_call_that_waited_has_no_context(autojump_clock: MockClock) -> None:
    """How the bulkhead waits is no affair of the operation."""
    bulkhead, errors = Bulkhead(1, max_wait=9), list[BaseException]()

    async def fail() -> None:
        try:
            await bulkhead.call(fails, OSError("call"))
        except OSError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery, bulkhead:
        nursery.start_soon(fail)
        await trio.sleep(1)
    assert [error.__context__ for error in errors] == [None]


async def test_a_call_adds_no_trip_through_the_scheduler() -> None:
    """A call of one checkpoint takes one step, one of none takes none, as without the policy."""
    for bulkhead in (Bulkhead(1), Bulkhead(1, queue_size=0, max_wait=5)):
        steps = Steps()
        trio.lowlevel.add_instrument(steps)
        await bulkhead.call(trio.lowlevel.checkpoint)
        assert steps.count == 1
        assert await bulkhead.call(returns, 5) == 5
        trio.lowlevel.remove_instrument(steps)
        assert steps.count == 1
        with assert_checkpoints():
            await bulkhead.acquire()
        bulkhead.release()
        with assert_checkpoints():
            async with bulkhead:
                pass


async def test_a_cancelled_caller_takes_nothing() -> None:
    """`acquire` and the block raise before they take."""
    bulkhead = Bulkhead(1)
    for enter in (bulkhead.acquire, bulkhead.__aenter__):
        with trio.CancelScope() as scope:
            scope.cancel()
            await enter()
        assert scope.cancelled_caught
    assert counts(bulkhead) == (0, 1, 0)


# --- what it tells ------------------------------------------------------------------------------


async def test_statistics_are_a_frozen_record_of_the_house() -> None:
    """In the words that every limiter uses; a picture of the moment."""
    bulkhead = Bulkhead(2, queue_size=0)
    before = bulkhead.statistics()
    async with bulkhead, bulkhead:
        with pytest.raises(BulkheadFullError):
            await bulkhead.acquire()
        assert bulkhead.statistics() == BulkheadStatistics(2, 2, 0, 0, 1)
        was_idle = bulkhead.is_idle
    empty = {"max_concurrency": 2, "borrowed": 0, "available": 2, "waiting": 0, "rejections": 0}
    assert before == BulkheadStatistics(**empty)
    # What it has refused before does not change how it behaves.
    assert (was_idle, bulkhead.is_idle) == (False, True)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        before.borrowed = 5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert pickle.loads(pickle.dumps(before)) == before  # noqa: S301 - it is our own


async def test_the_repr_shows_live_state() -> None:
    """Its options, and what has become of its permits."""
    bulkhead = Bulkhead(37, queue_size=41, name="db")
    idle = repr(bulkhead)
    assert idle.startswith("Bulkhead(")
    for word in ("37", "41", "db"):
        assert word in idle
    async with bulkhead:
        assert repr(bulkhead) != idle


def test_a_bulkhead_is_a_policy_and_no_bound() -> None:
    """It may refuse, so it goes into `policy`; two of the same size are two."""
    bulkhead = Bulkhead(3)
    assert isinstance(bulkhead, Policy)
    assert not isinstance(bulkhead, Semaphore)
    assert len({bulkhead, Bulkhead(3), bulkhead}) == 2


async def test_events_tell_of_waits_and_refusals(autojump_clock: MockClock) -> None:
    """Each wait that starts ends, also one that is refused, which is not called cancelled."""
    bulkhead, heard = Bulkhead(1, queue_size=1, max_wait=2, name="db"), list[Event]()
    with subscribe(within_calls(heard.append)):
        await bulkhead.call(returns, 1)
        assert heard == []
        await bulkhead.acquire()
        with pytest.raises(BulkheadFullError):
            await bulkhead.call(returns, 1, name="load")
        async with trio.open_nursery() as nursery:
            visitors = Visitors(nursery, lambda: bulkhead)
            await visitors.come("waiter")
            with pytest.raises(BulkheadFullError):
                await bulkhead.acquire()
            bulkhead.release()
            visitors.leave_all()
    assert [(type(each), each.operation) for each in heard] == [
        (WaitStarted, "load"),
        (WaitFinished, "load"),
        (Rejected, "load"),
        (WaitStarted, "acquire"),
        (Rejected, "acquire"),
        (WaitFinished, "acquire"),
    ]
    ends = [each for each in heard if isinstance(each, WaitFinished)]
    assert [(each.duration, each.cancelled) for each in ends] == [(2, False), (0, False)]
    assert {each.policy for each in heard} == {"db"}
    assert [each.retry_after for each in heard if isinstance(each, Rejected)] == [None, None]


async def test_what_events_add_up_to(autojump_clock: MockClock) -> None:
    """As many waits end as start, and the refusals are those that statistics count."""
    bulkhead, heard, refused = Bulkhead(2, queue_size=3, max_wait=1.5), list[Event](), 0

    async def call(number: int) -> None:
        nonlocal refused
        await trio.sleep(number * 0.2)
        with trio.move_on_after(9 if number % 3 else 0.7):
            try:
                await bulkhead.call(trio.sleep, 1)
            except BulkheadFullError:
                refused += 1

    with subscribe(heard.append):
        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(call, number)

    def number_of(kind: type[Event]) -> int:
        return sum(isinstance(event, kind) for event in heard)

    assert number_of(WaitStarted) == number_of(WaitFinished) > 10
    assert number_of(Rejected) == bulkhead.statistics().rejections == refused > 10
    assert any(event.cancelled for event in heard if isinstance(event, WaitFinished))
    assert counts(bulkhead) == (0, 2, 0)


@pytest.mark.parametrize("kind", [WaitStarted, WaitFinished, Rejected])
async def test_a_listener_that_stops_the_program_loses_no_permit(kind: type[Event]) -> None:
    """What it raises comes out of the call, and nothing is left behind."""
    bulkhead = Bulkhead(1, queue_size=1)

    def listen(event: Event) -> None:
        if isinstance(event, kind):
            raise SystemExit

    async def wait(enter: Callable[[], Awaitable[object]]) -> None:
        with subscribe(listen), pytest.raises(SystemExit):
            await enter()

    for way in ways_into(bulkhead):
        await bulkhead.acquire()
        async with trio.open_nursery() as nursery:
            visitors = Visitors(nursery, lambda: bulkhead)
            if kind is Rejected:
                await visitors.come("waiter")
            nursery.start_soon(wait, way)
            await wait_all_tasks_blocked()
            bulkhead.release()
            if kind is Rejected:
                await visitors.leave("waiter")
        assert counts(bulkhead) == (0, 1, 0)
