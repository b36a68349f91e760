"""Semaphore: what its calls take, give back, refuse, tell and cost."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests.operations import Steps, returns
from trio_resilience import Semaphore

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock


@attrs.define(eq=False)
class Visitors:
    """Tasks that come for permits and stay until they are told to leave, and who was let in."""

    nursery: trio.Nursery
    enter: Callable[..., Any]
    """Returns an async context manager, for example `Semaphore.hold`."""
    entered: list[str] = attrs.field(factory=list[str])
    ended: list[str] = attrs.field(factory=list[str])
    errors: dict[str, Exception] = attrs.field(factory=dict[str, Exception])
    scopes: dict[str, trio.CancelScope] = attrs.field(factory=dict[str, trio.CancelScope])
    _exits: dict[str, trio.Event] = attrs.field(factory=dict[str, trio.Event])

    async def come(self, name: str, *args: Any, **kwargs: Any) -> None:
        """Let *name* come; return when it is in, waits in line or was refused."""
        self.scopes[name], self._exits[name] = trio.CancelScope(), trio.Event()
        self.nursery.start_soon(self._visit, name, partial(self.enter, *args, **kwargs))
        await wait_all_tasks_blocked()

    async def _visit(self, name: str, enter: Callable[[], Any]) -> None:
        with self.scopes[name]:
            try:
                async with enter():
                    self.entered.append(name)
                    await self._exits[name].wait()
            except Exception as error:  # noqa: BLE001 - the test looks at it
                self.errors[name] = error
        self.ended.append(name)

    async def leave(self, *names: str) -> None:
        """Let *names* leave, in one step; return when everybody has come to rest."""
        for name in names:
            self._exits[name].set()
        await wait_all_tasks_blocked()

    def cancel(self, *names: str) -> None:
        """Cancel *names*, in line or inside, without giving up control."""
        for name in names:
            self.scopes[name].cancel()

    def leave_all(self) -> None:
        """Cancel everybody who is left."""
        self.nursery.cancel_scope.cancel()


def counts(semaphore: Any) -> tuple[int, int, int]:
    """What is borrowed, what is available, and how many wait."""
    now = semaphore.statistics()
    return now.borrowed, now.available, now.waiting


# --- at the door --------------------------------------------------------------------------------

NO_COUNTS = [-1, math.nan, math.inf, -math.inf, 1e400, True, False, "5", None, 1.5, [1]]


@pytest.mark.parametrize("value", NO_COUNTS, ids=repr)
def test_bad_numbers_of_permits_are_refused(value: Any) -> None:
    """At construction and when they are set; then nothing has changed."""
    with pytest.raises((TypeError, ValueError), match=r"^`permits` must be .*, got "):
        Semaphore(value)
    semaphore = Semaphore(3)
    with pytest.raises((TypeError, ValueError), match=r"^`permits` must be .*, got "):
        semaphore.permits = value
    assert semaphore.permits == 3


def test_a_semaphore_of_nothing_is_refused() -> None:
    """Nobody would ever get in; to pause one that is in use is another matter."""
    with pytest.raises(ValueError, match=r"^`permits` must be >= 1, got 0$"):
        Semaphore(0)
    semaphore = Semaphore(1)
    semaphore.permits = 0
    assert semaphore.permits == 0


@pytest.mark.parametrize("value", [0, *NO_COUNTS], ids=repr)
async def test_bad_weights_are_refused(value: Any) -> None:
    """By every call that takes one, with the type of error that fits; then nothing has changed."""
    semaphore = Semaphore(5)
    await semaphore.acquire(2)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    expected = ValueError if is_integer else TypeError
    for fn in (semaphore.acquire_nowait, semaphore.release):
        with pytest.raises(expected, match=r"^`weight` must be .*, got "):
            fn(value)
    with pytest.raises(expected, match=r"^`weight` must be .*, got "):
        await semaphore.acquire(value)
    with pytest.raises(expected, match=r"^`weight` must be .*, got "):
        async with semaphore.hold(value):
            pass
    assert counts(semaphore) == (2, 3, 0)


def test_the_options_are_the_documented_ones() -> None:
    """The number by position, the name by keyword."""
    semaphore = Semaphore(3)
    assert (semaphore.permits, semaphore.available_permits, semaphore.name) == (3, 3, "semaphore")
    assert Semaphore(permits=2, name="files").name == "files"
    with pytest.raises(TypeError, match="positional"):
        Semaphore(3, "files")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("value", [0, 1, "yes", None])
async def test_the_flag_is_a_bool(value: Any) -> None:
    """So that ``hold(2, wait_for_resize=0.5)`` is not taken for a yes."""
    semaphore = Semaphore(3)
    with pytest.raises(TypeError, match=r"^`wait_for_resize` must be True or False, got "):
        await semaphore.acquire(1, wait_for_resize=value)
    assert counts(semaphore) == (0, 3, 0)


# --- taking and giving back ---------------------------------------------------------------------


async def test_permits_are_counted() -> None:
    """Whichever way they are taken and given back."""
    semaphore = Semaphore(5)
    await semaphore.acquire()
    assert counts(semaphore) == (1, 4, 0)
    semaphore.acquire_nowait(2)
    assert counts(semaphore) == (3, 2, 0)
    async with semaphore:
        assert counts(semaphore) == (4, 1, 0)
    async with semaphore.hold(2):
        assert semaphore.available_permits == 0
        with pytest.raises(trio.WouldBlock):
            semaphore.acquire_nowait()
    semaphore.release(3)
    assert counts(semaphore) == (0, 5, 0)
    assert semaphore.is_idle


async def test_a_body_that_fails_gives_its_permits_back() -> None:
    """And its error comes out as it is."""
    semaphore, error = Semaphore(3), OSError("inside")
    for block in (semaphore, semaphore.hold(), semaphore.hold(3)):
        with pytest.raises(OSError, match="inside") as caught:
            async with block:
                raise error
        assert caught.value is error
        assert counts(semaphore) == (0, 3, 0)


async def test_what_would_wait_can_be_refused_instead() -> None:
    """`acquire_nowait` takes all or nothing."""
    semaphore = Semaphore(3)
    semaphore.acquire_nowait(2)
    with pytest.raises(trio.WouldBlock):
        semaphore.acquire_nowait(2)
    assert counts(semaphore) == (2, 1, 0)
    semaphore.acquire_nowait()
    assert counts(semaphore) == (3, 0, 0)


async def test_permits_belong_to_nobody(autojump_clock: MockClock) -> None:
    """They are taken in one task, which ends, and given back, also in parts, by others."""
    semaphore = Semaphore(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(semaphore.acquire, 3)
    assert counts(semaphore) == (3, 0, 0)

    async def give_back(weight: int) -> None:
        semaphore.release(weight)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_back, 2)
        nursery.start_soon(give_back, 1)
    assert counts(semaphore) == (0, 3, 0)


async def test_one_task_may_take_several_times() -> None:
    """Each time counts; trio's own limiter would refuse the second."""
    semaphore = Semaphore(2)
    async with semaphore, semaphore:
        assert counts(semaphore) == (2, 0, 0)
    assert counts(semaphore) == (0, 2, 0)


@pytest.mark.parametrize("held, released", [(0, 1), (1, 2), (2, 3), (2, 10**30)])
async def test_more_than_is_held_cannot_be_released(held: int, released: int) -> None:
    """A RuntimeError, and nothing has changed, not even in part."""
    semaphore = Semaphore(2)
    for _ in range(held):
        semaphore.acquire_nowait()
    with pytest.raises(RuntimeError, match="release"):
        semaphore.release(released)
    assert counts(semaphore) == (held, 2 - held, 0)
    assert semaphore.permits == 2


async def test_a_refused_release_wakes_nobody() -> None:
    """Of those who wait in line."""
    semaphore = Semaphore(2)
    async with trio.open_nursery() as nursery:
        visitors = Visitors(nursery, semaphore.hold)
        await visitors.come("a", 2)
        await visitors.come("b")
        with pytest.raises(RuntimeError):
            semaphore.release(3)
        await wait_all_tasks_blocked()
        assert visitors.entered == ["a"]
        assert counts(semaphore) == (2, 0, 1)
        visitors.leave_all()


@pytest.mark.parametrize("weight", [None, 1, 2])
async def test_a_body_that_releases_by_hand_is_told_so(weight: int | None) -> None:
    """Its block ends with a RuntimeError, and there are not more permits than before."""
    semaphore = Semaphore(2)
    with pytest.raises(RuntimeError, match="release"):
        async with semaphore if weight is None else semaphore.hold(weight):
            semaphore.release(weight or 1)
    assert counts(semaphore) == (0, 2, 0)


# --- checkpoints --------------------------------------------------------------------------------


async def test_to_acquire_is_a_checkpoint() -> None:
    """Also when a permit is free."""
    semaphore = Semaphore(9)
    with assert_checkpoints():
        await semaphore.acquire()
    with assert_checkpoints():
        await semaphore.acquire(2)
    for block in (semaphore, semaphore.hold(2)):
        with assert_checkpoints():
            await block.__aenter__()


async def test_a_cancelled_caller_takes_nothing() -> None:
    """`acquire` raises before it takes, free permits or not."""
    for held in (0, 2):
        semaphore = Semaphore(2)
        for _ in range(held):
            semaphore.acquire_nowait()
        for enter in (
            semaphore.acquire,
            partial(semaphore.acquire, 2),
            semaphore.hold().__aenter__,
        ):
            with trio.CancelScope() as scope:
                scope.cancel()
                await enter()
            assert scope.cancelled_caught
        assert counts(semaphore) == (held, 2 - held, 0)


async def test_to_acquire_takes_one_trip_through_the_scheduler() -> None:
    """Whether it has to wait or not."""
    semaphore, steps = Semaphore(1), Steps()
    trio.lowlevel.add_instrument(steps)
    await semaphore.acquire()
    assert steps.count == 1
    async with trio.open_nursery() as nursery:

        async def give_back() -> None:
            semaphore.release()

        nursery.start_soon(give_back)
        steps.count = 0
        await semaphore.acquire()
        assert steps.count == 2  # the other task's only one, and ours
    trio.lowlevel.remove_instrument(steps)


async def test_a_call_adds_no_trip_through_the_scheduler() -> None:
    """A call of one checkpoint takes one step, one of none takes none, as without the policy."""
    semaphore, steps = Semaphore(1), Steps()
    trio.lowlevel.add_instrument(steps)
    await semaphore.call(trio.lowlevel.checkpoint)
    assert steps.count == 1
    assert await semaphore.call(returns, 5) == 5
    assert await semaphore(returns)(6) == 6
    trio.lowlevel.remove_instrument(steps)
    assert steps.count == 1


async def test_a_hold_serves_one_block() -> None:
    """A second entry is told how to do it, and takes nothing."""
    semaphore = Semaphore(2)
    hold = semaphore.hold()
    async with hold:
        with pytest.raises(RuntimeError, match="serves one block"):
            await hold.__aenter__()
        assert counts(semaphore) == (1, 1, 0)
    with pytest.raises(RuntimeError, match="serves one block"):
        await hold.__aenter__()
    assert counts(semaphore) == (0, 2, 0)


async def test_an_exit_without_an_entry_gives_nothing_back() -> None:
    """Not what others hold by `acquire`, either."""
    semaphore = Semaphore(2)
    await semaphore.acquire()
    await semaphore.__aexit__(None, None, None)
    assert counts(semaphore) == (1, 1, 0)
    semaphore.release()
