"""What is no `Exception` stops a batcher: Ctrl-C, SystemExit, and groups that hold one."""

from __future__ import annotations

import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import outcome
import pytest
import trio
import trio.testing

from tests.operations import Stopwatch, foreign_nursery, leaves
from tests.test_batcher import Tens, given_or_not, settle, submit_all
from tests.test_batcher_errors import errors_of
from trio_resilience import OperationsCancelledError, open_batcher

if TYPE_CHECKING:
    from trio.testing import MockClock


class Stop(BaseException):
    """Not an `Exception`."""


async def fail(error: BaseException, _: object) -> None:
    raise error


def raises(error: BaseException) -> Any:
    return partial(fail, error)


def returns_error(error: BaseException) -> Any:
    async def process(items: list[int]) -> list[Any]:
        await trio.lowlevel.checkpoint()
        return [outcome.Error(error) for _ in items]

    return process


@pytest.mark.parametrize("how", [raises, returns_error])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(
    "stop", [Stop(), SystemExit(3), BaseExceptionGroup("both", [OSError(), KeyboardInterrupt()])]
)
async def test_what_is_no_exception_stops_the_batcher(
    autojump_clock: MockClock, how: Any, given: bool, stop: BaseException
) -> None:
    """All who wait get OperationsCancelledError; the opener a group, at the end of the block."""
    cancelled, outcomes = list[list[int]](), dict[int, Any]()
    fatal = how(stop)

    async def process(items: list[int]) -> list[int]:
        if items == [1]:
            result: list[int] = await fatal(items)
            return result
        try:
            await trio.sleep_forever()
        finally:
            cancelled.append(items)

    async with foreign_nursery() as nursery, trio.open_nursery() as submitters:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with open_batcher(
                nursery if given else None, process, batch_size=1, max_concurrency=2
            ) as batcher:
                outcomes = await submit_all(submitters, batcher, [0, 1, 2, 3])
                assert repr(batcher).startswith("<batcher 'batcher': stopped")
                with pytest.raises(OperationsCancelledError):
                    await batcher.submit(4)
        assert not nursery.cancel_scope.cancel_called
    assert set(leaves(stop)) <= set(leaves(caught.value))
    assert "stopped the batcher" in str(caught.value)
    assert [type(each) for each in errors_of(outcomes)] == [OperationsCancelledError] * 4
    assert len({id(each) for each in errors_of(outcomes)}) == 4
    assert cancelled == [[0]]


async def test_the_error_of_the_body_is_not_lost_beside_what_stops() -> None:
    """Both are in the group."""
    with pytest.raises(BaseExceptionGroup) as caught:
        async with open_batcher(None, raises(Stop()), batch_size=1) as batcher:
            with pytest.raises(OperationsCancelledError):
                await batcher.submit(1)
            raise KeyError
    assert [type(each) for each in leaves(caught.value)] == [Stop, KeyError]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
async def test_what_stops_the_body_cancels_too(
    autojump_clock: MockClock, stop: type[BaseException]
) -> None:
    """Nothing is flushed for a program that is to end."""
    process, watch, outcomes = Tens(10), Stopwatch(), dict[int, Any]()
    async with trio.open_nursery() as submitters:
        with pytest.raises(stop):
            async with open_batcher(None, process, batch_size=2) as batcher:
                outcomes = await submit_all(submitters, batcher, range(3))
                raise stop
        await settle()
        assert [type(each.error) for each in outcomes.values()] == [OperationsCancelledError] * 3
    assert (process.batches, process.cancelled, watch.seconds) == ([[0, 1]], 1, 0)


@trio.lowlevel.enable_ki_protection
def press_ctrl_c() -> None:
    """Press it while no unprotected code runs: trio hands it to the main task."""
    signal.raise_signal(signal.SIGINT)
    for _ in range(3):  # give the interpreter a place to run the signal's handler
        pass


@given_or_not
@pytest.mark.parametrize("body_raises", [False, True])
def test_ctrl_c_while_the_block_ends(given: bool, body_raises: bool) -> None:
    """It cancels, joins and comes out: after an error of the body, at the next checkpoint."""

    async def main() -> None:
        process = Tens(10)
        async with foreign_nursery() as nursery:
            with pytest.raises(KeyError if body_raises else KeyboardInterrupt) as caught:
                async with open_batcher(
                    nursery if given else None, process, batch_size=1
                ) as batcher:
                    await submit_all(nursery, batcher, [1])
                    nursery.start_soon(press_later)
                    if body_raises:
                        raise KeyError
            assert caught.value.__context__ is None
            if body_raises:
                with pytest.raises(KeyboardInterrupt):
                    await trio.lowlevel.checkpoint()
        assert (process.cancelled, process.running) == (1, 0)

    async def press_later() -> None:
        await trio.sleep(1)
        press_ctrl_c()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


@given_or_not
async def test_what_stops_the_batcher_is_not_lost_with_a_cancellation(
    autojump_clock: MockClock, given: bool
) -> None:
    """The opener is cancelled while a `process` in flight answers that with SystemExit."""

    async def process(items: list[int]) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise SystemExit

    async with foreign_nursery() as nursery, trio.open_nursery() as submitters:
        with pytest.raises(BaseExceptionGroup) as caught, trio.move_on_after(1) as scope:
            async with open_batcher(nursery if given else None, process, batch_size=1) as batcher:
                await submit_all(submitters, batcher, [1])
        assert [type(each) for each in leaves(caught.value)] == [SystemExit]
        assert scope.cancelled_caught
