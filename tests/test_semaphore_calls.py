"""Semaphore as a policy: what runs under it, and what it tells of itself."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests.operations import fails, returns, within_calls
from tests.test_semaphore import Visitors, counts
from trio_resilience import (
    Event,
    Policy,
    Semaphore,
    SemaphoreStatistics,
    WaitFinished,
    WaitStarted,
    run_in,
    subscribe,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


# --- call ---------------------------------------------------------------------------------------


async def test_a_call_holds_a_permit(autojump_clock: MockClock) -> None:
    """While its operation runs; its result comes out, in whatever way it is called."""
    semaphore, seen = Semaphore(2), list[tuple[int, int, int]]()

    async def op(*args: object, **kwargs: object) -> object:
        seen.append(counts(semaphore))
        await trio.sleep(1)
        return args, kwargs

    assert await semaphore.call(op, 1, "a") == ((1, "a"), {})
    assert await semaphore(op)(1, key=2) == ((1,), {"key": 2})
    assert await run_in(None, op, policy=semaphore) == ((), {})
    assert seen == [(1, 1, 0)] * 3
    assert counts(semaphore) == (0, 2, 0)


async def test_calls_wait_for_one_another(autojump_clock: MockClock) -> None:
    """Nine seconds of work, three at a time."""
    semaphore = Semaphore(3)
    async with trio.open_nursery() as nursery:
        for _ in range(9):
            nursery.start_soon(semaphore.call, trio.sleep, 1)
        await trio.sleep(0.5)
        assert counts(semaphore) == (3, 0, 6)
    assert trio.current_time() == 3


@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_a_call_that_fails_gives_its_permit_back(kind: type[BaseException]) -> None:
    """Whatever it raises, which comes out as the same object."""
    semaphore, error = Semaphore(1), kind()
    with pytest.raises(kind) as caught:
        await semaphore.call(fails, error)
    assert caught.value is error
    assert error.__context__ is None
    assert not hasattr(error, "__notes__")
    assert counts(semaphore) == (0, 1, 0)


async def test_the_error_of_a_call_that_waited_has_no_context(autojump_clock: MockClock) -> None:
    """How the semaphore waits is no affair of the operation, nor of what a block raises."""
    semaphore, errors = Semaphore(1), list[BaseException]()

    async def fail_in_a_call() -> None:
        await semaphore.call(fails, OSError("call"))

    async def fail_in_a_block() -> None:
        async with semaphore:
            raise OSError("block")

    async def keep(op: Callable[[], Awaitable[None]]) -> None:
        try:
            await op()
        except OSError as error:
            errors.append(error)

    async with trio.open_nursery() as nursery, semaphore:
        nursery.start_soon(keep, fail_in_a_call)
        nursery.start_soon(keep, fail_in_a_block)
        await trio.sleep(1)
    assert [error.__context__ for error in errors] == [None, None]


@pytest.mark.parametrize("free", [True, False])
async def test_what_is_no_operation_is_refused_at_once(free: bool) -> None:
    """Without waiting for a permit; a coroutine object is closed, and no permit is lost."""
    semaphore = Semaphore(1)
    if not free:
        semaphore.acquire_nowait()
    coro: Any = returns(1)
    bad: list[Any] = [coro, len, 5, None]
    with warnings.catch_warnings(), trio.CancelScope() as scope:
        warnings.simplefilter("error")
        scope.deadline = trio.current_time() + 0.1
        for fn in bad:
            with pytest.raises(TypeError, match="must be an async function"):
                await semaphore.call(fn)
    assert not scope.cancelled_caught
    assert inspect.getcoroutinestate(coro) == inspect.CORO_CLOSED
    assert counts(semaphore) == ((0, 1, 0) if free else (1, 0, 0))


async def test_what_returns_no_awaitable_gives_its_permit_back() -> None:
    """A lambda that returns 3 is found out when it is called."""
    semaphore = Semaphore(1)
    fn: Any = lambda: 3  # noqa: E731
    with pytest.raises(TypeError, match="can't be awaited"):
        await semaphore.call(fn)
    assert counts(semaphore) == (0, 1, 0)


async def test_a_cancelled_call_is_never_made(autojump_clock: MockClock) -> None:
    """One that is cancelled in line: its operation does not begin."""
    semaphore, called = Semaphore(1), list[int]()

    async def op() -> None:
        called.append(1)

    async with semaphore:
        with trio.move_on_after(1) as scope:
            await semaphore.call(op)
        assert counts(semaphore) == (1, 0, 0)
    assert scope.cancelled_caught
    assert called == []


# --- what it tells ------------------------------------------------------------------------------


async def test_statistics_are_a_frozen_record_of_the_house() -> None:
    """In the words that every limiter uses; a picture of the moment."""
    semaphore = Semaphore(2)
    before = semaphore.statistics()
    await semaphore.acquire()
    assert before == SemaphoreStatistics(permits=2, borrowed=0, available=2, waiting=0)
    assert semaphore.statistics() == SemaphoreStatistics(2, 1, 1, 0)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        before.borrowed = 5  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    assert pickle.loads(pickle.dumps(before)) == before  # noqa: S301 - it is our own


async def test_the_repr_shows_live_state() -> None:
    """Its name, how many permits it has, and what has become of them."""
    semaphore = Semaphore(37, name="files")
    idle = repr(semaphore)
    assert idle.startswith("Semaphore(")
    assert "37" in idle
    assert "files" in idle
    async with semaphore.hold(14):
        assert repr(semaphore) != idle
        assert "14" in repr(semaphore) or "23" in repr(semaphore)


def test_a_semaphore_is_a_policy_compared_by_identity() -> None:
    """Two of the same size are two."""
    semaphore = Semaphore(3)
    assert isinstance(semaphore, Policy)
    assert len({semaphore, Semaphore(3), semaphore}) == 2


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_live_state_cannot_be_duplicated(duplicate: Callable[[object], object]) -> None:
    """A copy would have permits of its own, or half share them: it is refused."""
    with pytest.raises(TypeError, match="Semaphore"):
        duplicate(Semaphore(3))


async def test_it_is_idle_when_a_new_one_would_do() -> None:
    """Not while permits are held, somebody waits, or it was resized."""
    semaphore = Semaphore(2)
    assert semaphore.is_idle
    async with semaphore:
        assert not semaphore.is_idle
    assert semaphore.is_idle
    semaphore.permits = 3
    assert not semaphore.is_idle
    semaphore.permits = 2
    assert semaphore.is_idle


async def test_events_tell_of_waits(autojump_clock: MockClock) -> None:
    """Only of waits, and each that starts ends; named after the call, or "acquire"."""
    semaphore, heard = Semaphore(1, name="files"), list[Event]()
    with subscribe(within_calls(heard.append)):
        await semaphore.call(trio.sleep, 1)
        assert heard == []
        async with trio.open_nursery() as nursery:
            visitors = Visitors(nursery, semaphore.hold)
            await visitors.come("holder")
            load: Any = partial(semaphore.call, trio.sleep, 1, name="load")
            nursery.start_soon(load)
            await wait_all_tasks_blocked()
            await visitors.come("cancelled")
            await trio.sleep(2)
            visitors.cancel("cancelled")
            await trio.sleep(1)
            await visitors.leave("holder")
    assert [(type(each), each.operation) for each in heard] == [
        (WaitStarted, "load"),
        (WaitStarted, "acquire"),
        (WaitFinished, "acquire"),
        (WaitFinished, "load"),
    ]
    ends = [each for each in heard if isinstance(each, WaitFinished)]
    assert [(each.duration, each.cancelled) for each in ends] == [(2, True), (3, False)]
    assert {each.policy for each in heard} == {"files"}


@pytest.mark.parametrize("action", ["release", "resize"])
async def test_a_listener_may_let_in_who_has_to_wait(action: str) -> None:
    """By the time it is told of the wait, whoever waits is in line."""
    semaphore = Semaphore(1)
    semaphore.acquire_nowait()

    def widen(event: Event) -> None:
        if isinstance(event, WaitStarted) and action == "release":
            semaphore.release()
        elif isinstance(event, WaitStarted):
            semaphore.permits += 1

    with subscribe(widen), trio.move_on_after(0.1) as scope, assert_checkpoints():
        await semaphore.acquire()
    assert not scope.cancelled_caught
    assert semaphore.statistics().waiting == 0


@pytest.mark.parametrize("kind", [WaitStarted, WaitFinished])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
async def test_a_listener_that_stops_the_program_loses_no_permit(kind: Any, stop: Any) -> None:
    """What it raises comes out of the wait, and no permit or place in line is left behind."""
    semaphore = Semaphore(2)

    def listen(event: Event) -> None:
        if isinstance(event, kind):
            raise stop

    async def wait(enter: Callable[[], Any]) -> None:
        with subscribe(listen), pytest.raises(stop):
            await enter()

    ways: list[Any] = [
        semaphore.acquire,
        partial(semaphore.acquire, 2),
        semaphore.__aenter__,
        semaphore.hold(2).__aenter__,
        partial(semaphore.call, returns, 1),
    ]
    for way in ways:
        semaphore.acquire_nowait(2)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, way)
            await wait_all_tasks_blocked()
            semaphore.release(2)
        assert counts(semaphore) == (0, 2, 0)
