"""Ctrl-C, wherever it strikes: everything is cancelled and joined, and it comes out once."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing

import trio_resilience
from tests.operations import Gauge, Stopwatch, foreign_nursery, leaves
from trio_resilience import (
    map_with_limit,
    run_in,
    run_with_limit,
    stream_map_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from types import FrameType

PACKAGE = str(Path(trio_resilience.__file__).parent)


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    """Run *main* as the main task, which is the one that trio delivers Ctrl-C to."""
    return trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def ctrl_c() -> None:
    """Press Ctrl-C in the code that calls this."""
    signal.raise_signal(signal.SIGINT)


@trio.lowlevel.enable_ki_protection
def ctrl_c_for_the_main_task() -> None:
    """Press Ctrl-C while no unprotected code runs: trio hands it to the main task."""
    signal.raise_signal(signal.SIGINT)
    for _ in range(3):  # give the interpreter a place to run the signal's handler
        pass


@attrs.define(eq=False)
class Careful:
    """Operations that take three shielded seconds to clean up."""

    watch: Stopwatch = attrs.field(factory=Stopwatch)
    ended: list[float] = attrs.field(factory=list[float])

    async def __call__(self, *_: object) -> None:
        try:
            await trio.sleep_forever()
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(3)
            self.ended.append(self.watch.seconds)


async def by_run(nursery: trio.Nursery | None, careful: Careful) -> None:
    await run_with_limit(nursery, [careful] * 2)


async def by_map(nursery: trio.Nursery | None, careful: Careful) -> None:
    await map_with_limit(nursery, careful, [0, 1])


async def by_run_in(nursery: trio.Nursery | None, careful: Careful) -> None:
    async def twice() -> None:
        async with trio.open_nursery() as inner:
            inner.start_soon(careful)
            inner.start_soon(careful)

    await run_in(nursery, twice)


async def by_stream(nursery: trio.Nursery | None, careful: Careful) -> None:
    async with stream_with_limit(nursery, [careful] * 2) as results:
        async for _ in results:
            pass


async def by_leaving_a_stream(nursery: trio.Nursery | None, careful: Careful) -> None:
    async with stream_map_with_limit(nursery, careful, [0, 1]):
        await trio.sleep(1)


CALLS = [by_run, by_map, by_run_in, by_stream, by_leaving_a_stream]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_in_a_waiting_caller_cancels_and_joins(
    call: Callable[..., Any], given: bool, presses: int
) -> None:
    """KeyboardInterrupt comes out of the call itself, bare, when every operation has cleaned up.

    Pressing it again meanwhile changes nothing.
    """

    async def press() -> None:
        await trio.sleep(1.5 if call is by_leaving_a_stream else 1)
        for _ in range(presses):
            ctrl_c_for_the_main_task()
            await trio.sleep(0.5)

    async def main() -> list[float]:
        careful = Careful()
        async with foreign_nursery() as nursery:
            nursery.start_soon(press)
            with pytest.raises(KeyboardInterrupt):
                await call(nursery if given else None, careful)
            with suppress(*[KeyboardInterrupt] * (presses - 1)):  # a second one may still be due
                await trio.lowlevel.checkpoint()
            assert not nursery.cancel_scope.cancel_called
            assert not nursery.child_tasks
        await trio.sleep(1)
        return careful.ended

    ended = run(main)
    assert ended == [4, 4]


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("park", [True, False])
@pytest.mark.parametrize("on_error", ["cancel", "continue", "collect"])
def test_ctrl_c_in_an_operation_stops_the_job(given: bool, park: bool, on_error: Any) -> None:
    """It is raised in the operation, and reaches the caller in a group, once."""
    gauge = Gauge()

    async def interrupted() -> None:
        if park:
            await trio.sleep(1)
        ctrl_c()

    async def main() -> list[type]:
        ops: list[Callable[[], Awaitable[Any]]] = [interrupted, gauge.op(1, 9)]
        async with foreign_nursery() as nursery:
            with pytest.raises(BaseExceptionGroup) as caught:
                await run_with_limit(nursery if given else None, ops, on_error=on_error)
            assert not nursery.cancel_scope.cancel_called
        await trio.sleep(1)
        return [type(leaf) for leaf in leaves(caught.value)]

    assert run(main) == [KeyboardInterrupt]
    assert gauge.running == 0


def test_ctrl_c_in_a_child_of_run_in() -> None:
    """It reaches the caller, and the nursery goes on."""

    async def interrupted() -> None:
        await trio.sleep(1)
        ctrl_c()

    async def main() -> list[type]:
        async with foreign_nursery() as nursery:
            with pytest.raises((KeyboardInterrupt, BaseExceptionGroup)) as caught:
                await run_in(nursery, interrupted)
            assert not nursery.cancel_scope.cancel_called
        await trio.sleep(1)
        return [type(leaf) for leaf in leaves(caught.value)]

    assert run(main) == [KeyboardInterrupt]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_ctrl_c_in_the_source_comes_out_as_it_is(asynchronous: bool) -> None:
    """As any error of the source: bare, the rest cancelled and joined."""
    gauge = Gauge()

    def source() -> Iterator[Callable[[], Awaitable[int]]]:
        yield gauge.op(0, 9)
        ctrl_c()
        yield gauge.op(1, 9)

    async def async_source() -> AsyncIterator[Callable[[], Awaitable[int]]]:
        for op in source():
            await trio.sleep(1)
            yield op

    async def main() -> None:
        async with foreign_nursery() as nursery:
            ops: Any = async_source() if asynchronous else source()
            with pytest.raises(KeyboardInterrupt):
                await run_with_limit(nursery, ops)
            assert not nursery.child_tasks
        await trio.sleep(1)

    run(main)
    assert (gauge.started, gauge.running, gauge.finished) == ([0], 0, [])


def test_ctrl_c_in_on_done_comes_out_as_it_is() -> None:
    """As any error of the callback."""
    gauge = Gauge()

    async def main() -> None:
        async with foreign_nursery() as nursery:
            with pytest.raises(KeyboardInterrupt):
                await run_with_limit(
                    nursery, gauge.ops(1, 9), on_done=lambda _index, _result: ctrl_c()
                )
            assert not nursery.child_tasks
        await trio.sleep(1)

    run(main)
    assert gauge.cancelled == [1]


@pytest.mark.parametrize("given", [True, False])
def test_ctrl_c_in_the_body_of_a_stream(given: bool) -> None:
    """It leaves the block as it is; the operations are cancelled and joined."""
    gauge = Gauge()

    async def main() -> None:
        async with foreign_nursery() as nursery:
            with pytest.raises(KeyboardInterrupt):
                async with stream_with_limit(
                    nursery if given else None, gauge.ops(1, 9)
                ) as results:
                    async for _ in results:
                        ctrl_c()
            assert not nursery.child_tasks
        await trio.sleep(1)

    run(main)
    assert gauge.cancelled == [1]


def test_ctrl_c_ends_an_operation_that_never_waits() -> None:
    """An endless loop of operations without a checkpoint can be interrupted."""
    calls = 0

    async def spin(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 50:
            ctrl_c()

    async def main() -> None:
        await map_with_limit(None, spin, count(), max_concurrency=2)

    with pytest.raises(BaseExceptionGroup) as caught:
        run(main)
    assert [type(leaf) for leaf in leaves(caught.value)] == [KeyboardInterrupt]
    assert calls == 50


def test_a_run_after_ctrl_c_is_a_fresh_start() -> None:
    """A limiter shared by two runs, the first of which was interrupted, has all of its tokens."""
    limiter = trio.CapacityLimiter(2)
    gauge = Gauge()

    async def press() -> None:
        await trio.sleep(1)
        ctrl_c_for_the_main_task()

    async def first() -> None:
        async with foreign_nursery() as nursery:
            nursery.start_soon(press)
            with pytest.raises(KeyboardInterrupt):
                await run_with_limit(None, gauge.ops(9, 9, 9), max_concurrency=limiter)
        assert limiter.borrowed_tokens == 0
        assert limiter.statistics().tasks_waiting == 0

    run(first)
    assert run(partial(run_with_limit, None, gauge.ops(1, 1), max_concurrency=limiter)) == [0, 1]


@attrs.define(eq=False)
class Tripwire:
    """Press Ctrl-C when the library executes its line number *at*, counted from the start."""

    at: int
    lines: int = 0
    where: str = ""
    passes: dict[str, list[int]] = attrs.field(factory=dict[str, list[int]])
    """When each place in the source was passed, as numbers of lines."""

    def __call__(self, frame: FrameType, event: str, _: Any) -> Tripwire | None:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            self.lines += 1
            if self.at < 0:
                self.passes.setdefault(_place_of(frame), []).append(self.lines)
            elif self.lines == self.at:
                self.where = _place_of(frame)
                sys.settrace(None)  # the rest may run at full speed
                signal.raise_signal(signal.SIGINT)
        return self

    def numbers(self) -> list[int]:
        """Of each place that was passed, the first two times and the last.

        A loop or another operation of the same kind comes by in the same state between them.
        """
        return sorted({n for passes in self.passes.values() for n in [*passes[:2], passes[-1]]})

    def trace(self, main: Callable[[], Awaitable[Any]]) -> BaseException | None:
        """Run *main*; return what came out of it."""
        previous = sys.gettrace()
        sys.settrace(self)
        try:
            run(main)
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test judges it
            return error
        finally:
            sys.settrace(previous)
        return None


def press_everywhere(
    scenario: Callable[[list[str]], Callable[[], Awaitable[Any]]], *, lines: int
) -> None:
    """Press Ctrl-C wherever *scenario* comes by: it comes out once, and leaves nothing wrong.

    The scenario is given the list to which it adds what it finds wrong. It executes more than so
    many *lines* of the library; almost all that are chosen have to be reached again.
    """
    problems = list[str]()
    whole = Tripwire(at=-1)
    assert whole.trace(scenario(problems)) is None
    assert whole.lines > lines
    presses, landed = whole.numbers(), 0
    for number in presses:
        found, wire = list[str](), Tripwire(at=number)
        error = wire.trace(scenario(found))
        kinds = [] if error is None else [type(leaf) for leaf in leaves(error)]
        if wire.where and kinds != [KeyboardInterrupt]:
            found.append(f"what came out is {error!r}, caused by {error and error.__cause__!r}")
        problems += [f"{wire.where}: {each}" for each in found]
        landed += bool(wire.where)
    assert not problems, "\n".join(sorted(set(problems)))
    assert landed > 0.9 * len(presses)


def _place_of(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


async def _pass_round(_: object = None) -> None:
    for _ in range(2):
        await trio.lowlevel.checkpoint()


async def job_with_a_list(limiter: trio.CapacityLimiter, nursery: trio.Nursery) -> None:
    await run_with_limit(
        nursery,
        [_pass_round] * 4,
        max_concurrency=limiter,
        timeout=60,
        on_done=lambda _index, _result: None,
        batch_size=3,
    )


async def job_with_a_stream(limiter: trio.CapacityLimiter, nursery: trio.Nursery) -> None:
    async with stream_map_with_limit(
        nursery, _pass_round, (i for i in range(4)), max_concurrency=limiter, ordered=True
    ) as results:
        async for _ in results:
            await trio.lowlevel.checkpoint()


async def job_with_run_in(limiter: trio.CapacityLimiter, nursery: trio.Nursery) -> None:
    async with limiter:
        await run_in(nursery, _pass_round)


@pytest.mark.exhaustive
@pytest.mark.watchdog(120)
# Between the call of an async function and its await, Ctrl-C leaves a coroutine behind anywhere.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize("job", [job_with_a_list, job_with_a_stream, job_with_run_in])
def test_ctrl_c_at_any_line(job: Callable[..., Awaitable[None]]) -> None:
    """Tokens come back, no task is left, and exactly one KeyboardInterrupt comes out."""

    def scenario(found: list[str]) -> Callable[[], Awaitable[None]]:
        async def main() -> None:
            limiter = trio.CapacityLimiter(2)
            async with foreign_nursery() as nursery:
                try:
                    await job(limiter, nursery)
                finally:
                    if limiter.borrowed_tokens or limiter.statistics().tasks_waiting:
                        found.append(f"a token is lost: {limiter!r}")
                    if nursery.child_tasks:
                        found.append("a task is left")
                    if nursery.cancel_scope.cancel_called:
                        found.append("the nursery is crashed")

        return main

    press_everywhere(scenario, lines=20)
