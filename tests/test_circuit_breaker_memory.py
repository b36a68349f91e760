"""CircuitBreaker: nothing grows with the calls, and what has failed is not kept alive."""

from __future__ import annotations

import gc
import sys
import traceback
import weakref
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests._circuits import CLOSED, HALF_OPEN, ISOLATED, OPEN, Form, begin, fail, forms, succeed
from tests.operations import fails, reachable, returns
from tests.test_circuit_breaker_half_open import reopening
from trio_resilience import CallAbandonedError, CircuitOpenError
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import CircuitState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator


@pytest.fixture
def no_gc() -> Generator[None]:
    """Whatever is freed, is freed by its last reference."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Local:
    """Something that an operation or a caller has at hand."""


# --- refusals -------------------------------------------------------------------------------------


def depth(error: BaseException) -> int:
    return len(list(traceback.walk_tb(error.__traceback__)))


async def refusal(breaker: CircuitBreaker, form: Form) -> CircuitOpenError:
    try:
        await form(breaker, returns, 1)
    except CircuitOpenError as error:
        return error
    raise AssertionError


@forms
@pytest.mark.parametrize("state", [OPEN, HALF_OPEN, ISOLATED])
async def test_a_thousand_refusals_are_a_thousand_errors(
    autojump_clock: MockClock, no_gc: None, form: Form, state: CircuitState
) -> None:
    """None hangs on another, none is deeper than the first, and none is kept by the circuit."""
    breaker = CircuitBreaker(failure_threshold=1, recovery_timeout=10)
    await fail(breaker)
    async with trio.open_nursery() as nursery:
        if state is ISOLATED:
            breaker.isolate()
        elif state is HALF_OPEN:
            await trio.sleep(10)
            await begin(nursery, breaker)
        errors = [await refusal(breaker, form) for _ in range(1000)]
        assert breaker.state is state
        nursery.cancel_scope.cancel()
    assert len(set(map(id, errors))) == 1000
    assert {depth(error) for error in errors} == {depth(errors[0])}
    assert depth(errors[0]) < 10
    assert all(reachable(error) == [error] for error in errors)
    refs = [weakref.ref(error) for error in errors]
    errors.clear()
    assert {ref() for ref in refs} == {None}


@forms
async def test_who_was_refused_leaves_nothing_behind(no_gc: None, form: Form) -> None:
    """What was in the frame of the caller is freed when he is done, and no operation was made."""
    breaker = CircuitBreaker()
    breaker.isolate()

    async def caller() -> weakref.ref[Local]:
        local = Local()
        with suppress(CircuitOpenError):
            await form(breaker, returns, local)
        return weakref.ref(local)

    assert [(await caller())() for _ in range(100)] == [None] * 100


# --- failures -------------------------------------------------------------------------------------


class DownError(OSError):
    """A failure that holds on to what the operation was at."""

    def __init__(self, local: Local) -> None:
        super().__init__("down")
        self.local = local


async def by_error(breaker: CircuitBreaker, form: Form) -> list[weakref.ref[Any]]:
    local = Local()

    async def op() -> None:
        here = local
        raise DownError(here)

    with suppress(DownError):
        await form(breaker, op)
    return [weakref.ref(local)]


async def by_group(breaker: CircuitBreaker, form: Form) -> list[weakref.ref[Any]]:
    local = Local()

    async def op() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, DownError(local))

    with suppress(ExceptionGroup):
        await form(breaker, op)
    gc.collect()  # a nursery that fails is a cycle of its own
    return [weakref.ref(local)]


async def by_result(breaker: CircuitBreaker, form: Form) -> list[weakref.ref[Any]]:
    local = Local()
    await form(breaker, returns, local)
    return [weakref.ref(local)]


@forms
@pytest.mark.parametrize("way", [by_error, by_group, by_result])
@pytest.mark.parametrize("is_probe", [True, False])
async def test_what_is_remembered_of_a_failure_keeps_nothing_alive(
    autojump_clock: MockClock, no_gc: None, form: Form, way: Any, is_probe: bool
) -> None:
    """Neither the error, nor its frames, nor the operation, nor its result."""
    breaker = CircuitBreaker(
        failure_threshold=1, failure_result=lambda result: isinstance(result, Local)
    )
    if is_probe:
        await fail(breaker)
        await trio.sleep(60)
    refs = await way(breaker, form)
    assert (breaker.state, breaker.statistics().opened) == (OPEN, 1 + is_probe)
    assert breaker.last_failure is not None
    assert [ref() for ref in refs] == [None]


async def test_a_probe_that_has_failed_is_not_kept_alive(
    autojump_clock: MockClock, no_gc: None
) -> None:
    """By who waits for the next; only the last one's words are."""
    breaker, refs = await reopening(), list[weakref.ref[Any]]()

    async def probe() -> None:
        local = Local()
        refs.append(weakref.ref(local))
        raise DownError(local)

    async with trio.open_nursery() as nursery:
        await nursery.start(breaker.keep_probing, probe)
        await trio.sleep(35)
        assert [ref() for ref in refs] == [None] * 4
        nursery.cancel_scope.cancel()


@forms
async def test_a_call_that_is_given_up_is_not_kept_alive(no_gc: None, form: Form) -> None:
    """Its error shows no cancellation, which is an affair of ours, and nobody keeps its frames."""
    breaker, refs = CircuitBreaker(failure_threshold=1, cancel_in_flight=True), list[Any]()

    async def hang(local: Local) -> None:
        await trio.sleep_forever()

    async def caller() -> None:
        local = Local()
        refs.append(weakref.ref(local))
        with pytest.raises(CallAbandonedError) as caught:
            await form(breaker, hang, local)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
        del caught

    async with trio.open_nursery() as nursery:
        nursery.start_soon(caller)
        await wait_all_tasks_blocked()
        await fail(breaker)
    assert [ref() for ref in refs] == [None]


# --- calls ----------------------------------------------------------------------------------------

PLAIN = (int, float, str, bytes, bytearray, list, tuple, dict, set, deque)


def size_of(breaker: CircuitBreaker) -> tuple[int, int]:
    """Return how many objects the state of *breaker* is made of, and how many bytes they are."""
    seen, queue = dict[int, object](), list[object]([breaker._circuit])  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    while queue:
        each = queue.pop()
        is_ours = type(each).__module__.startswith("trio_resilience")
        if id(each) not in seen and (is_ours or type(each) in PLAIN):
            seen[id(each)] = each
            queue += gc.get_referents(each)
    # An integer that counts is as large as its number; each is one, whatever it shows.
    return (
        sum(not isinstance(each, (int, float)) for each in seen.values()),
        sum(sys.getsizeof(each) for each in seen.values() if not isinstance(each, (int, float))),
    )


def run_many(
    breaker: CircuitBreaker, calls: int, per_second: int, op: Callable[[], Awaitable[object]]
) -> tuple[int, int]:
    clock = MockClock()

    async def main() -> tuple[int, int]:
        for _ in range(calls // per_second):
            for _ in range(per_second):
                with suppress(OSError):
                    await breaker.call(op)
            clock.jump(1)
        return size_of(breaker)

    return trio.run(main, clock=clock)


async def quick() -> None:
    """Succeed."""


def sometimes() -> Callable[[], Awaitable[None]]:
    """Return an operation of whose calls each tenth fails."""
    count = 0

    async def op() -> None:
        nonlocal count
        count += 1
        if not count % 10:
            raise OSError

    return op


@pytest.mark.parametrize("window", [{"window_seconds": 30}, {"window_calls": 1000}])
@pytest.mark.parametrize("per_second", [100, 20_000])
@pytest.mark.parametrize("make_op", [lambda: quick, sometimes], ids=["healthy", "flaky"])
def test_memory_does_not_grow_with_the_calls(
    window: dict[str, Any], per_second: int, make_op: Any
) -> None:
    """Many in a window, or many windows one after the other, are as large as the first is."""
    options: Any = {"failure_threshold": None, "failure_rate": 0.5, "recovery_timeout": 1, **window}
    first, later = CircuitBreaker(**options), CircuitBreaker(**options)
    assert run_many(later, 100_000, per_second, make_op()) <= run_many(first, 2000, 50, make_op())
    assert later.statistics().calls == 100_000
    assert later.state is CLOSED


@forms
async def test_what_calls_leave_behind_does_not_add_up(
    autojump_clock: MockClock, form: Form
) -> None:
    """Hundreds of outages, with calls given up, refused and cancelled, and holds by hand."""
    breaker = CircuitBreaker(failure_threshold=1, cancel_in_flight=True)
    sizes = list[tuple[int, int]]()
    for _ in range(300):
        async with trio.open_nursery() as nursery:
            [given_up, cancelled] = await begin(nursery, breaker, 2, form)
            await cancelled.cancel()
            await fail(breaker)
            await wait_all_tasks_blocked()
            assert isinstance(given_up.outcome, CallAbandonedError)
            await refusal(breaker, form)
        with breaker.isolate(), breaker.isolate():
            await refusal(breaker, form)
        await succeed(breaker)
        await fail(breaker)
        await trio.sleep(60)
        await succeed(breaker)
        sizes.append(size_of(breaker))
    # A dict that is filled and emptied is larger at times, before it is made anew.
    assert max(sizes[100:]) <= max(sizes[:100])
