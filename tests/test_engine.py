"""Corners of the engine that the public functions reach only by an unlucky Ctrl-C, or rarely."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock

from tests.operations import fails, leaves, returns
from trio_resilience import OperationsFailedError, run_with_limit, stream_with_limit
from trio_resilience._engine._ending import add_context
from trio_resilience._engine._join import Job, leaves_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator


async def test_any_awaitable_is_an_operation() -> None:
    """An object with ``__await__`` does as well as a coroutine."""

    async def seven() -> int:
        await trio.lowlevel.checkpoint()
        return 7

    class Ready:
        def __await__(self) -> Generator[Any, Any, int]:
            return (yield from seven().__await__())

    assert await run_with_limit(None, [Ready] * 2) == [7, 7]


def test_a_delay_between_batches_needs_batches() -> None:
    """Without them it would never come up."""
    with pytest.raises(ValueError, match="`delay_between_batches` needs a `batch_size`"):
        trio.run(partial(run_with_limit, None, [], delay_between_batches=1))


async def test_a_source_that_fails_as_it_is_closed_is_heard() -> None:
    """Its clean-up is part of it; and what the operation raised is not lost."""

    def source() -> Iterator[Callable[[], Awaitable[object]]]:
        try:
            yield partial(fails, OSError("op"))
            yield trio.sleep_forever
        finally:
            raise LookupError("clean-up")

    with pytest.raises(OperationsFailedError) as caught:
        await run_with_limit(None, source(), max_concurrency=1)
    assert sorted(map(str, leaves(caught.value))) == ["clean-up", "op"]


async def test_a_source_may_fail_between_two_batches(autojump_clock: MockClock) -> None:
    """That is where the first operation of a batch is pulled."""
    done: list[int] = []

    def source() -> Iterator[Callable[[], Awaitable[object]]]:
        yield partial(returns, 1)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        await run_with_limit(
            None, source(), batch_size=1, on_done=lambda index, _: done.append(index)
        )
    assert done == [0]


async def test_an_exit_in_the_source_comes_with_what_had_failed() -> None:
    """What stops the program is not mixed into a group of ordinary errors."""

    def source() -> Iterator[Callable[[], Awaitable[object]]]:
        yield partial(fails, OSError("op"))
        raise SystemExit(3)

    with pytest.raises(BaseExceptionGroup) as caught:
        await run_with_limit(None, source(), on_error="continue", max_concurrency=1)
    assert [type(leaf) for leaf in leaves(caught.value)] == [SystemExit, OSError]


def test_an_interruption_of_the_job_itself_is_its_only_leaf() -> None:
    """Ctrl-C may land outside of any operation: then there is no group to take apart."""
    interruption = KeyboardInterrupt()
    assert leaves_of(interruption) == [interruption]
    assert leaves_of(BaseExceptionGroup("", [interruption])) == [interruption]


def test_only_the_jobs_own_cancellation_is_absorbed() -> None:
    """Of anything else, nobody else would tell."""
    job = Job[None]()
    group = BaseExceptionGroup("", [KeyboardInterrupt()])
    with pytest.raises(BaseExceptionGroup) as caught:
        job.absorb_cancellation(group)
    assert caught.value is group


def test_an_error_is_never_made_its_own_context() -> None:
    """A body may raise the very error that an operation has raised."""
    error, first = ValueError(), KeyError()
    add_context(error, error)
    assert error.__context__ is None
    error.__context__ = first
    add_context(error, first)
    assert first.__context__ is None


async def test_the_first_of_two_errors_of_a_callers_code_comes_out() -> None:
    """A callback stops the job; that the source then fails to close is not what it stopped for."""

    def source() -> Iterator[Callable[[], Awaitable[object]]]:
        try:
            yield partial(returns, 1)
            yield trio.sleep_forever
        finally:
            raise LookupError("clean-up")

    def stop(index: int, _: object) -> None:
        raise KeyError(index)

    with pytest.raises(KeyError):
        await run_with_limit(None, source(), max_concurrency=1, on_done=stop)


@pytest.mark.filterwarnings("ignore::trio.TrioDeprecationWarning")
@pytest.mark.parametrize("given", [True, False])
def test_without_strict_groups_nothing_is_lost_either(given: bool) -> None:
    """Trio then raises what is alone in a nursery as it is, cancellations too."""

    async def exit_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise SystemExit(3)

    async def by_call(nursery: trio.Nursery | None) -> None:
        await run_with_limit(nursery, [exit_when_cancelled])

    async def by_stream(nursery: trio.Nursery | None) -> None:
        async with stream_with_limit(nursery, [exit_when_cancelled]) as results:
            async for _ in results:
                pass

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for call in (by_call, by_stream):
                with trio.move_on_after(1):
                    try:
                        await call(nursery if given else None)
                    except BaseException as error:  # noqa: BLE001 - whatever it is, it is looked at
                        caught.append(error)

    caught: list[BaseException] = []
    trio.run(main, clock=MockClock(autojump_threshold=0), strict_exception_groups=False)
    assert [any(isinstance(leaf, SystemExit) for leaf in leaves(each)) for each in caught] == [
        True,
        True,
    ]


async def test_what_says_that_it_is_empty_is_run_all_the_same() -> None:
    """A length is a hint, for how many workers to begin with; no operation is lost by it."""

    class Filling:
        def __len__(self) -> int:
            return 0

        def __iter__(self) -> Iterator[Callable[[], Awaitable[object]]]:
            return iter([partial(returns, index) for index in range(3)])

    assert await run_with_limit(None, Filling()) == [0, 1, 2]
    assert await run_with_limit(None, []) == []
