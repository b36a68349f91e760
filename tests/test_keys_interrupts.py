"""Ctrl-C at any line of a call with keys, or under a semaphore: nothing is lost or left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import foreign_nursery
from tests.test_concurrency_interrupts import press_everywhere
from trio_resilience import Semaphore, map_with_limit, run_with_limit, stream_map_with_limit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


async def work(_: int) -> None:
    """Give way to others, twice."""
    for _ in range(2):
        await trio.lowlevel.checkpoint()


stream_items: Any = stream_map_with_limit
KEYED: dict[str, Any] = {"key": (0, 0, 1).__getitem__, "max_per_key": 1}


async def items_with_keys(semaphore: Semaphore, nursery: trio.Nursery) -> None:
    async with semaphore:
        await map_with_limit(nursery, work, range(3), max_concurrency=2, **KEYED)


async def items_with_keys_under_a_semaphore(semaphore: Semaphore, nursery: trio.Nursery) -> None:
    await map_with_limit(nursery, work, range(3), max_concurrency=semaphore, **KEYED)


async def a_stream_with_keys_in_order(semaphore: Semaphore, nursery: trio.Nursery) -> None:
    async with (
        semaphore.hold(2),
        stream_items(nursery, work, iter(range(3)), ordered=True, **KEYED) as results,
    ):
        async for _ in results:
            await trio.lowlevel.checkpoint()


async def two_calls_under_a_semaphore(semaphore: Semaphore, nursery: trio.Nursery) -> None:
    async def inner() -> None:
        await run_with_limit(None, [trio.lowlevel.checkpoint] * 2, max_concurrency=semaphore)

    await run_with_limit(nursery, [inner] * 2, max_concurrency=1)


@pytest.mark.exhaustive
@pytest.mark.watchdog(180)
# Between the call of an async function and its await, Ctrl-C leaves a coroutine behind anywhere.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
@pytest.mark.parametrize(
    "job",
    [
        items_with_keys,
        items_with_keys_under_a_semaphore,
        a_stream_with_keys_in_order,
        two_calls_under_a_semaphore,
    ],
)
def test_ctrl_c_at_any_line(job: Callable[[Semaphore, trio.Nursery], Awaitable[None]]) -> None:
    """Permits come back, no task is left, and exactly one KeyboardInterrupt comes out."""

    def scenario(found: list[str]) -> Callable[[], Awaitable[None]]:
        async def main() -> None:
            semaphore = Semaphore(2)
            async with foreign_nursery() as nursery:
                try:
                    await job(semaphore, nursery)
                finally:
                    now = semaphore.statistics()
                    if now.borrowed or now.waiting:
                        found.append(f"a permit is lost: {now!r}")
                    if nursery.child_tasks:
                        found.append("a task is left")
                    if nursery.cancel_scope.cancel_called:
                        found.append("the nursery is crashed")

        return main

    press_everywhere(scenario, lines=20)
