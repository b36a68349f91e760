"""The legs of a hedged call: how losers end, what becomes of their results and of their errors."""

from __future__ import annotations

import contextlib
import contextvars
import logging
import traceback
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests.operations import fails, leaves, returns
from tests.test_concurrency_interrupts import ctrl_c_for_the_main_task, press_everywhere, run
from tests.test_hedge import Legs, notes
from tests.test_retry_memory import AgainError, attempt_to, holding
from tests.test_retry_memory import no_collector as no_collector  # noqa: PLC0414 - a fixture
from trio_resilience import Event, subscribe
from trio_resilience._algorithms._budget import RetryBudget
from trio_resilience._events import LoserFailed
from trio_resilience._hedge import Hedge, HedgeStatistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


@attrs.define(eq=False)
class Cast:
    """An operation whose legs are played by these functions, in the order in which they begin."""

    parts: list[Callable[[], Awaitable[Any]]]
    began: int = 0

    async def __call__(self) -> Any:
        self.began += 1
        return await self.parts[self.began - 1]()


async def after(seconds: float, result: Any = None) -> Any:
    """Return, or raise, after so many seconds."""
    await trio.sleep(seconds)
    if isinstance(result, BaseException):
        raise result
    return result


async def fail_in_cleanup(error: BaseException, cleanup: float = 0) -> None:
    """Run until cancelled, take some time for that, and fail."""
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(cleanup)
        raise error


async def succeed_all_the_same(seconds: float, result: Any) -> Any:
    """Do not hear of any cancellation."""
    with trio.CancelScope(shield=True):
        await trio.sleep(seconds)
    return result


# --- losers -------------------------------------------------------------------------------------


async def test_losers_have_ended_on_return(autojump_clock: MockClock) -> None:
    """However long they take to clean up; no task is left."""
    tasks = trio.lowlevel.current_statistics().tasks_living
    cast = Cast([partial(fail_in_cleanup, OSError(), 10), partial(after, 1, "quick")])
    assert await Hedge(after=1).call(cast) == "quick"
    assert trio.current_time() == 12
    assert trio.lowlevel.current_statistics().tasks_living == tasks


async def test_a_losers_error_is_told_to_listeners(autojump_clock: MockClock) -> None:
    """It is not raised in place of the result."""
    heard, error = list[Event](), OSError("on closing")
    cast = Cast([partial(fail_in_cleanup, error), partial(after, 1, "quick")])
    with subscribe(heard.append):
        assert await Hedge(after=1, name="h").call(cast, name="op") == "quick"
    (event,) = [each for each in heard if isinstance(each, LoserFailed)]
    assert (event.policy, event.operation, event.leg, event.error) == ("h", "op", 0, error)
    assert notes(error) == []


async def test_a_losers_error_beside_its_cancellation_is_told_too(
    autojump_clock: MockClock,
) -> None:
    """A nursery within raises both, in one group; only what is no cancellation is told."""
    heard, error = list[Event](), OSError("on closing")

    async def op() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fail_in_cleanup, error)
            await trio.sleep_forever()

    with subscribe(heard.append):
        assert await Hedge(after=1).call(Cast([op, partial(after, 1, "quick")])) == "quick"
    (event,) = [each for each in heard if isinstance(each, LoserFailed)]
    assert event.error is not error
    assert leaves(event.error) == [error]


async def test_a_failure_at_the_instant_of_the_success_is_told(autojump_clock: MockClock) -> None:
    """Unless it comes first, and would start another leg; either way there is a result."""
    heard = list[Event]()
    for _ in range(20):
        cast = Cast([partial(after, 2, OSError()), partial(after, 1, "ok")])
        with subscribe(heard.append):
            assert await Hedge(after=1).call(cast) == "ok"
    assert 0 < sum(isinstance(event, LoserFailed) for event in heard) <= 20


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_what_a_loser_raises_that_is_no_exception_comes_out(
    autojump_clock: MockClock, kind: type[BaseException]
) -> None:
    """The same object; the result goes to `on_discard`."""
    stop, discarded = kind(), list[Any]()
    cast = Cast([partial(fail_in_cleanup, stop), partial(after, 1, "quick")])
    hedge = Hedge(after=1, on_discard=discarded.append)
    with pytest.raises(kind) as caught:
        await hedge.call(cast)
    assert caught.value is stop
    assert discarded == ["quick"]
    assert hedge.statistics() == HedgeStatistics(1, 1, 0, 0, 0, after=1)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, GeneratorExit])
async def test_what_is_no_exception_ends_the_call(
    autojump_clock: MockClock, kind: type[BaseException]
) -> None:
    """At once; the other legs are joined, and none is started; it is not counted."""
    stop = kind()
    hedge = Hedge(after=1, max_hedges=3)
    cast = Cast([partial(after, 1.5, stop), partial(after, 60)])
    with pytest.raises(kind) as caught:
        await hedge.call(cast)
    assert caught.value is stop
    assert notes(stop) == []
    assert (trio.current_time(), cast.began) == (1.5, 2)
    assert hedge.statistics() == HedgeStatistics(1, 1, 0, 0, 0, after=1)


async def test_several_such_come_out_as_a_group(autojump_clock: MockClock) -> None:
    stops = [KeyboardInterrupt(), SystemExit()]
    cast = Cast([partial(after, 1, stops[0]), partial(fail_in_cleanup, stops[1])])
    with pytest.raises(BaseExceptionGroup) as caught:
        await Hedge(after=0).call(cast)
    assert leaves(caught.value) == stops


async def test_a_cancellation_that_comes_from_nowhere_comes_out() -> None:
    """One that somebody kept and raises again: it is no failure, and no other leg follows."""
    kept: Any = None
    with trio.CancelScope() as scope:
        scope.cancel()
        try:
            await trio.lowlevel.checkpoint()
        except trio.Cancelled as error:
            kept = error
    cast = Cast([partial(fails, kept)])
    with pytest.raises(trio.Cancelled) as caught:
        await Hedge(after=1).call(cast)
    assert caught.value is kept
    assert cast.began == 1


# --- results that nobody gets -------------------------------------------------------------------


async def test_of_two_successes_one_is_returned(autojump_clock: MockClock) -> None:
    """At one instant: the other goes to `on_discard`."""
    for _ in range(20):
        discarded = list[Any]()
        cast = Cast([partial(after, 2, "first"), partial(after, 1, "second")])
        hedge = Hedge(after=1, on_discard=discarded.append)
        result = await hedge.call(cast)
        assert {result, *discarded} == {"first", "second"}
        assert len(discarded) == 1
        assert hedge.statistics().wins_by_hedge == (result == "second")


async def test_a_late_success_is_discarded(autojump_clock: MockClock) -> None:
    """Of a leg that does not let itself be cancelled; after it has ended, in the calling task."""
    variable = contextvars.ContextVar("variable", default="other")
    discarded = list[Any]()

    def discard(result: Any) -> None:
        discarded.append((result, variable.get(), trio.current_time()))

    variable.set("mine")
    cast = Cast([partial(succeed_all_the_same, 9, "late"), partial(after, 1, "quick")])
    assert await Hedge(after=1, on_discard=discard).call(cast) == "quick"
    assert discarded == [("late", "mine", 9)]


async def test_a_discarded_result_needs_no_callback(autojump_clock: MockClock) -> None:
    cast = Cast([partial(succeed_all_the_same, 9, "late"), partial(after, 1, "quick")])
    assert await Hedge(after=1).call(cast) == "quick"


async def test_a_callback_that_raises_is_logged_once(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """And changes nothing about the result."""

    def close(result: Any) -> None:
        raise OSError(result)

    hedge = Hedge(after=1, on_discard=close)
    for _ in range(3):
        cast = Cast([partial(succeed_all_the_same, 9, "late"), partial(after, 1, "quick")])
        assert await hedge.call(cast) == "quick"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("trio_resilience", logging.ERROR)


# --- the caller ---------------------------------------------------------------------------------


async def test_a_cancelled_caller_cancels_and_joins_all_legs(autojump_clock: MockClock) -> None:
    """It is no failure; of what legs had raised before, nothing comes out."""
    hedge, legs = Hedge(after=1, max_hedges=3), Legs([(1.5, OSError()), 60])
    with trio.move_on_after(5) as scope:
        await hedge.call(legs)
    assert scope.cancelled_caught
    assert trio.current_time() == 5
    assert (legs.running, len(legs.began_at)) == (0, 4)
    assert hedge.statistics() == HedgeStatistics(1, 3, 0, 0, 0, after=1)


async def test_a_caller_that_is_cancelled_already_calls_nothing() -> None:
    cast = Cast([partial(returns, 1)])
    with trio.CancelScope() as scope:
        scope.cancel()
        await Hedge(after=0).call(cast)
    assert scope.cancelled_caught
    assert cast.began == 0


async def test_what_cancelled_legs_raise_is_not_lost(autojump_clock: MockClock) -> None:
    """It leaves the caller's scope as an error, as from a nursery."""
    error, heard = OSError("on closing"), list[Event]()
    cast = Cast([partial(fail_in_cleanup, error), partial(after, 60)])
    with (
        subscribe(heard.append),
        pytest.raises(ExceptionGroup) as caught,
        trio.move_on_after(5) as scope,
    ):
        await Hedge(after=1).call(cast)
    assert scope.cancelled_caught
    assert leaves(caught.value) == [error]
    assert not any(isinstance(event, LoserFailed) for event in heard)


async def test_a_result_is_not_lost_to_a_cancellation(autojump_clock: MockClock) -> None:
    """A leg that succeeds as it is cancelled: the caller gets that, and the cancellation next."""
    with trio.move_on_after(5) as scope:
        found = await Hedge(after=60).call(succeed_all_the_same, 9, "late")
        assert found == "late"
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    assert trio.current_time() == 9


async def test_a_cancellation_and_a_failure_at_one_instant(autojump_clock: MockClock) -> None:
    """The cancellation wins, whoever runs first, and no other leg is started."""
    for _ in range(20):
        hedge = Hedge(after=60)
        cast = Cast([partial(after, 5, OSError()), partial(after, 60)])
        with trio.move_on_after(5) as scope:
            try:
                await hedge.call(cast)
            except BaseExceptionGroup as group:
                _, rest = group.split(trio.Cancelled)
                assert rest is not None
                assert isinstance(leaves(rest)[0], OSError)
                await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert hedge.statistics().failed == 0


# --- Ctrl-C -------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["waiting", "with the result", "joining"])
def test_ctrl_c_joins_all_legs(moment: str) -> None:
    """It comes out, once; a result that is there goes to the caller or to `on_discard`."""
    ended, returned, discarded = list[str](), list[Any](), list[Any]()

    async def clean_up() -> None:
        try:
            await trio.sleep_forever()
        finally:
            if moment == "joining":
                ctrl_c_for_the_main_task()
            with trio.CancelScope(shield=True):
                await trio.sleep(1)
            ended.append("loser")

    async def quick() -> str:
        await trio.sleep(1)
        if moment != "joining":
            ctrl_c_for_the_main_task()
        if moment == "waiting":
            await trio.sleep_forever()
        return "quick"

    async def main() -> None:
        hedge = Hedge(after=0.5, on_discard=discarded.append)
        with pytest.raises(KeyboardInterrupt):
            returned.append(await hedge.call(Cast([clean_up, quick])))
            await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()

    run(main)
    assert ended == ["loser"]
    assert returned == ["quick"] * (moment == "joining")
    assert discarded == ["quick"] * (moment == "with the result")


def test_ctrl_c_at_any_line() -> None:
    """It comes out once, whatever the library does at that moment; no token and no leg is lost."""

    def scenario(found: list[str]) -> Callable[[], Awaitable[None]]:
        async def main() -> None:
            budget, running = RetryBudget(max_tokens=5), list[int]()
            hedge = Hedge(after=0, budget=budget, on_discard=lambda _: None)

            async def op() -> None:
                running.append(1)
                try:
                    await trio.lowlevel.checkpoint()
                finally:
                    running.pop()

            try:
                await hedge.call(op)
                await hedge.call(op)
            finally:
                left, made = budget.statistics(), hedge.statistics()
                if running:
                    found.append("a leg is left")
                if left.taken != made.hedges or left.tokens < 5 - left.taken:
                    found.append(f"a token is lost: {left}, {made}")

        return main

    press_everywhere(scenario, lines=50)


# --- context and memory -------------------------------------------------------------------------


async def test_each_leg_has_its_own_copy_of_the_context(autojump_clock: MockClock) -> None:
    """It sees what the caller has set, and no other leg sees what it sets; nor does the caller."""
    variable = contextvars.ContextVar("variable", default="nobody")
    seen = list[str]()

    async def op() -> None:
        seen.append(variable.get())
        variable.set(f"leg {len(seen)}")
        await trio.sleep(0.5 if len(seen) == 3 else 60)

    variable.set("caller")
    await Hedge(after=1, max_hedges=2).call(op)
    assert seen == ["caller"] * 3
    assert variable.get() == "caller"


async def test_legs_are_tasks_of_their_own(autojump_clock: MockClock) -> None:
    """Beneath the caller's, with names that tell them apart."""
    names = list[str]()
    parent = trio.lowlevel.current_task()

    async def op() -> None:
        task = trio.lowlevel.current_task()
        assert task.parent_nursery is not None
        assert task.parent_nursery.parent_task is parent
        names.append(task.name)
        await trio.sleep(5)

    await Hedge(after=1).call(op, name="fetch")
    assert names == ["fetch", "fetch (hedge 1)"]


async def test_what_the_caller_handles_is_the_context(autojump_clock: MockClock) -> None:
    """As if the operation had been called directly; and our frames stay out of the traceback."""
    error, handled = ValueError("x"), KeyError("handled")
    try:
        raise handled
    except KeyError:
        with pytest.raises(ValueError, match="x"):
            await Hedge(after=1).call(fails, error)
    assert error.__context__ is handled
    frames = [entry.name for entry in traceback.extract_tb(error.__traceback__)]
    assert frames[-1] == "fails"
    assert "_run_leg" not in frames


async def test_what_the_operation_handled_stays_the_context(autojump_clock: MockClock) -> None:
    """Whatever the caller handles, it is what the error came from."""
    first, error, handled = KeyError("first"), OSError("mine"), ValueError("handled")

    async def op() -> None:
        try:
            raise first
        except KeyError:
            raise error  # noqa: B904 - it is the context that counts here

    try:
        raise handled
    except ValueError:
        with pytest.raises(OSError, match="mine"):
            await Hedge(after=1).call(op)
    assert error.__context__ is first


def lines(error: BaseException) -> list[str]:
    """The names of the functions in the traceback of *error*."""
    return [entry.name for entry in traceback.extract_tb(error.__traceback__)]


async def test_an_instance_that_all_legs_raise_has_the_traceback_of_the_first(
    autojump_clock: MockClock,
) -> None:
    """It does not grow with the number of legs; nor does that of what a group holds."""
    leaf, error = OSError("leaf"), OSError("mine")

    async def in_a_group() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails, leaf)

    for legs in (1, 9):
        hedge = Hedge(after=1, max_hedges=legs)
        with pytest.raises(OSError, match="mine"):
            await hedge.call(fails, error)
        assert lines(error)[1:] == ["call", "result", "fails"]
        error.__traceback__ = None
        with pytest.raises(ExceptionGroup):
            await hedge.call(in_a_group)
        assert lines(leaf) == ["fails"]
        leaf.__traceback__ = None


async def test_every_leg_raises_its_error_where_it_does(autojump_clock: MockClock) -> None:
    """What is raised again in another place tells of the place of the first leg."""
    error = OSError("mine")

    async def first() -> None:
        await trio.sleep(2)
        raise error

    cast = Cast([first, partial(fails, error), partial(after, 2, error)])
    with pytest.raises(OSError, match="mine"):
        await Hedge(after=1, max_hedges=2).call(cast)
    assert lines(error)[-1] == "first"


async def test_errors_that_are_only_told_show_where_they_come_from(
    autojump_clock: MockClock,
) -> None:
    """Without the frames of ours that have led there."""
    error, heard = OSError("mine"), list[Event]()
    with subscribe(heard.append):
        await Hedge(after=1).call(Cast([partial(fail_in_cleanup, error), partial(after, 1)]))
    assert [event.error for event in heard if isinstance(event, LoserFailed)] == [error]
    assert lines(error) == ["__call__", "fail_in_cleanup"]


ENDINGS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "success": ([], {}),
    "success after a failure": ([OSError], {}),
    "all fail": ([OSError, OSError], {}),
    "fails for good": ([ValueError], {}),
    "no budget": ([OSError], {"budget": RetryBudget(max_tokens=1)}),
    "stops": ([OSError, SystemExit], {}),
}


@pytest.mark.parametrize("steps, options", ENDINGS.values(), ids=ENDINGS)
async def test_nothing_is_kept_alive(
    autojump_clock: MockClock, no_collector: None, steps: list[Any], options: dict[str, Any]
) -> None:
    """When the call is over and its error handled, the frames of the operation are freed."""

    async def form(hedge: Any, op: Any) -> Any:
        return await hedge.call(op)

    held = list[weakref.ref[Any]]()
    hedge: Any = Hedge(after=1, **options)
    await attempt_to(form, hedge, holding(held, *steps))
    await trio.lowlevel.checkpoint()
    assert held
    assert [ref() for ref in held] == [None] * len(held)


async def test_an_instance_that_all_legs_raise_is_not_kept_alive(
    autojump_clock: MockClock, no_collector: None
) -> None:
    """It leads to the call that it came out of, which has let go of it and of its tracebacks."""
    steps = [AgainError("same")] * 3
    ref = weakref.ref(steps[0])

    async def op() -> None:
        raise steps.pop()

    async def call() -> None:
        with contextlib.suppress(OSError):
            await Hedge(after=1, max_hedges=2).call(op)

    await call()
    await trio.lowlevel.checkpoint()
    assert steps == []
    assert ref() is None


async def test_nothing_is_kept_alive_by_a_cancelled_call(
    autojump_clock: MockClock, no_collector: None
) -> None:
    held = list[weakref.ref[Any]]()

    class Local:
        pass

    async def op() -> None:
        local = Local()
        held.append(weakref.ref(local))
        try:
            await trio.sleep_forever()
        finally:
            if len(held) == 2:
                raise OSError

    async def call() -> None:
        await Hedge(after=1).call(op)

    with trio.move_on_after(5):
        with contextlib.suppress(BaseExceptionGroup):
            await call()
    await trio.lowlevel.checkpoint()
    assert [ref() for ref in held] == [None, None]


async def test_a_hedge_refers_to_nothing_in_circles(
    autojump_clock: MockClock, no_collector: None
) -> None:
    hedge = Hedge(after=1, on_discard=print)
    assert await hedge.call(Legs([5, 1])) == 1
    ref = weakref.ref(hedge)
    del hedge
    assert ref() is None
