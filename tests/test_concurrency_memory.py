"""Nothing is kept alive: no reference cycles, no operations that are done with."""

from __future__ import annotations

import gc
import weakref
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import outcome
import pytest
import trio

from tests.operations import foreign_nursery
from trio_resilience import (
    OperationsCancelledError,
    OperationsFailedError,
    OperationTimeoutError,
    map_with_limit,
    run_in,
    run_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Generator, Iterator

    from trio.testing import MockClock


class Resource:
    """Something that an operation holds in a local variable."""


@attrs.define(eq=False)
class Holder:
    """Operations that hold a resource; remembers each by a weak reference."""

    references: list[weakref.ref[Resource]] = attrs.field(factory=list[weakref.ref[Resource]])

    def make(self) -> Resource:
        resource = Resource()
        self.references.append(weakref.ref(resource))
        return resource

    async def fail(self) -> None:
        resource = self.make()
        await trio.sleep(1)
        raise OSError(id(resource))

    async def hang(self) -> Resource:
        resource = self.make()
        await trio.sleep_forever()
        return resource

    async def succeed(self) -> Resource:
        resource = self.make()
        await trio.sleep(1)
        return resource

    @property
    def alive(self) -> int:
        return sum(reference() is not None for reference in self.references)


@contextmanager
def no_garbage_collection() -> Generator[None, None, None]:
    """What is freed in this block was freed by reference counting."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def failure(nursery: trio.Nursery | None, holder: Holder) -> None:
    with pytest.raises(OperationsFailedError):
        await run_with_limit(nursery, [holder.fail, holder.hang, holder.succeed])


async def failures_at_the_end(nursery: trio.Nursery | None, holder: Holder) -> None:
    with pytest.raises(OperationsFailedError):
        await run_with_limit(nursery, [holder.fail, holder.succeed], on_error="continue")


async def collected(nursery: trio.Nursery | None, holder: Holder) -> None:
    await run_with_limit(nursery, [holder.fail, holder.succeed], on_error="collect")


async def timed_out(nursery: trio.Nursery | None, holder: Holder) -> None:
    with pytest.raises(OperationsFailedError):
        await run_with_limit(nursery, [holder.hang], timeout=1)


async def success(nursery: trio.Nursery | None, holder: Holder) -> None:
    await run_with_limit(nursery, [holder.succeed] * 3, timeout=5)


async def cancelled(nursery: trio.Nursery | None, holder: Holder) -> None:
    with trio.move_on_after(1):
        await run_with_limit(nursery, [holder.hang] * 3)


async def fatal(nursery: trio.Nursery | None, holder: Holder) -> None:
    async def crash() -> None:
        resource = holder.make()
        await trio.sleep(1)
        raise KeyboardInterrupt(id(resource))

    with pytest.raises(BaseExceptionGroup):
        await run_with_limit(nursery, [crash, holder.hang])


async def broken_source(nursery: trio.Nursery | None, holder: Holder) -> None:
    def ops() -> Iterator[Callable[[], Awaitable[Any]]]:
        resource = holder.make()
        yield holder.hang
        raise OSError(id(resource))

    with pytest.raises(OSError, match=r"\d"):
        await run_with_limit(nursery, ops())


async def stream_that_fails(nursery: trio.Nursery | None, holder: Holder) -> None:
    with pytest.raises(OperationsFailedError):
        async with stream_with_limit(
            nursery, [holder.succeed, holder.fail, holder.hang]
        ) as results:
            async for _, result in results:
                del result


async def stream_that_is_left(nursery: trio.Nursery | None, holder: Holder) -> None:
    async with stream_with_limit(nursery, [holder.succeed, holder.hang]) as results:
        async for _ in results:
            break


async def stream_whose_body_fails(nursery: trio.Nursery | None, holder: Holder) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with stream_with_limit(nursery, [holder.fail, holder.hang]):
            await trio.sleep(5)
            raise ValueError("mine")


async def child_that_fails(nursery: trio.Nursery | None, holder: Holder) -> None:
    with pytest.raises(OSError, match=r"\d"):
        await run_in(nursery, holder.fail)


async def child_that_is_cancelled(nursery: trio.Nursery | None, holder: Holder) -> None:
    with trio.move_on_after(1):
        await run_in(nursery, holder.hang)


SCENARIOS = [
    failure, failures_at_the_end, collected, timed_out, success, cancelled, fatal, broken_source,
    stream_that_fails, stream_that_is_left, stream_whose_body_fails, child_that_fails,
    child_that_is_cancelled,
]  # fmt: skip


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("given", [True, False])
async def test_everything_is_freed_at_once(
    autojump_clock: MockClock, scenario: Callable[..., Awaitable[None]], given: bool
) -> None:
    """When the caller has dealt with the outcome, what operations held is freed.

    Without the help of the garbage collector: no reference cycle was made.
    """
    holder = Holder()
    async with foreign_nursery() as nursery:
        with no_garbage_collection():
            await scenario(nursery if given else None, holder)
            assert holder.references
            assert holder.alive == 0


async def test_a_cancelled_nursery_frees_everything(autojump_clock: MockClock) -> None:
    """The caller that stays behind holds nothing of the operations."""
    holder = Holder()
    with no_garbage_collection():
        async with foreign_nursery() as nursery:
            nursery.cancel_scope.deadline = trio.current_time() + 1
            with pytest.raises(OperationsCancelledError):
                await run_with_limit(nursery, [holder.hang])
        assert holder.alive == 0


class Operation:
    """A callable that can be referenced weakly."""

    def __init__(self, holder: Holder, peaks: list[int]) -> None:
        self.holder = holder
        self.peaks = peaks
        self.resource = holder.make()

    async def __call__(self) -> None:
        self.peaks.append(self.holder.alive)
        await trio.lowlevel.checkpoint()


async def test_operations_that_are_done_are_let_go(autojump_clock: MockClock) -> None:
    """Of five hundred operations from a generator only those at work are alive."""
    holder, peaks = Holder(), list[int]()
    with no_garbage_collection():
        await run_with_limit(
            None, (Operation(holder, peaks) for _ in range(500)), max_concurrency=4
        )
        assert max(peaks) <= 4 + 2
        assert holder.alive == 0


async def test_items_that_are_done_are_let_go() -> None:
    """The same for the items of a map."""
    holder, peaks = Holder(), list[int]()

    async def work(item: Resource) -> None:
        peaks.append(holder.alive)
        await trio.lowlevel.checkpoint()

    with no_garbage_collection():
        await map_with_limit(None, work, (holder.make() for _ in range(500)), max_concurrency=4)
        assert max(peaks) <= 4 + 2
        assert holder.alive == 0


async def test_errors_that_are_kept_keep_no_frames_of_ours(autojump_clock: MockClock) -> None:
    """Collected errors hold the frames of their own operation, not the job's, nor one another's."""
    holder = Holder()

    async def big(index: int) -> None:
        resource = holder.make()
        await trio.sleep(1)
        if index:
            raise OSError(id(resource))

    with no_garbage_collection():
        results = await map_with_limit(None, big, range(10), on_error="collect")
        assert holder.alive == 9
        del results[5:]
        assert holder.alive == 4
        results.clear()
        assert holder.alive == 0


async def test_timeouts_leave_no_garbage(autojump_clock: MockClock) -> None:
    """A hundred expired operations leave nothing to collect."""
    with no_garbage_collection():
        results = await run_with_limit(
            None, [partial(trio.sleep, 9)] * 100, timeout=1, on_error="collect"
        )
        errors = [weakref.ref(each.error) for each in results if isinstance(each, outcome.Error)]
        assert {type(error()) for error in errors} == {OperationTimeoutError}
        assert len(errors) == 100
        results.clear()
        assert [each() for each in errors] == [None] * 100
