"""Suspend an operation of a scenario so that it can be cancelled after it was woken."""

from __future__ import annotations

import trio
from trio.lowlevel import Abort

from ._cancel_records import check_int


async def pause(rounds: int = 1) -> None:  # noqa: ASYNC910 - at least one round
    """Sleep and be woken by another task, *rounds* times, taking no time on any clock.

    For the operations of a `Scenario`, in place of `trio.sleep`. A sleep ends when a scope of its
    own expires, so a cancellation that arrives between its end and the next step of the task still
    turns it into `Cancelled`, and the case in which the operation *succeeds* in a cancelled caller
    is never seen. `pause` has that case: once it is woken, it returns.
    """
    check_int("rounds", rounds, at_least=1)
    for _ in range(rounds):
        await _park_until_woken()


async def _park_until_woken() -> None:
    sleeper = trio.lowlevel.current_task()
    asleep = True

    def abort(_: object) -> Abort:
        nonlocal asleep
        asleep = False
        return Abort.SUCCEEDED

    async def wake() -> None:  # noqa: ASYNC124, ASYNC910 - a task, though it never waits
        if asleep:
            trio.lowlevel.reschedule(sleeper)

    # A system task is no child of any nursery: it works wherever the operation runs.
    trio.lowlevel.spawn_system_task(wake, name="pause")
    await trio.lowlevel.wait_task_rescheduled(abort)
