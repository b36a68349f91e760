"""Count a victim's suspensions, act at one of them, and notice when a run cannot end."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import attrs
import trio
from trio.lowlevel import Task

from ._task_frames import is_sleeping

if TYPE_CHECKING:
    from collections.abc import Callable

    from ._cancel_records import CancelPoint


@attrs.define(eq=False)
class RunWatch(trio.abc.Instrument):
    """Call *act* once, at the point's instant, before any other task runs.

    It acts between the steps of tasks only, where a real cancellation can come too. The moment of
    a wake-up lies inside somebody's `release()`: to cancel there would interrupt synchronous code.
    So it waits for the end of that step; the woken task has not run by then. What is woken by the
    loop itself (a deadline, the kernel) is acted on before the loop's next step.
    """

    _point: CancelPoint
    _act: Callable[[Task], None]
    _on_stuck: Callable[[str], None]
    _max_steps: int

    alive: dict[Task, None] = attrs.field(factory=dict[Task, None], init=False)
    """All living tasks, oldest first (`dict` for its order: sets of tasks have none)."""
    suspensions: int = attrs.field(default=0, init=False)
    sleeps: int = attrs.field(default=0, init=False)
    """How many of the suspensions were in `trio.sleep`."""
    starts: int = attrs.field(default=0, init=False)
    """How many of the suspensions were tasks that had not run yet."""
    is_parked: bool = attrs.field(default=False, init=False)
    """Whether the suspension of the point was a real one, not only a trip through the scheduler."""
    uses_nursery: bool = attrs.field(default=False, init=False)
    is_whole: bool = attrs.field(default=False, init=False)
    """Whether the watch lasted to the end; trio removes an instrument that raises."""

    _nursery: trio.Nursery | None = attrs.field(default=None, init=False)
    _tree: set[Task] = attrs.field(factory=set[Task], init=False)
    _runnable: set[Task] = attrs.field(factory=set[Task], init=False)
    _awaited: Task | None = attrs.field(default=None, init=False)
    _due: Task | None = attrs.field(default=None, init=False)
    _steps: int = attrs.field(default=0, init=False)
    _was_idle: bool = attrs.field(default=False, init=False)

    def follow(self, nursery: trio.Nursery, victim: Task) -> None:
        """Count from now on what *victim* does, its descendants, and the tasks in *nursery*."""
        self._nursery = nursery
        self._join_tree(victim)

    def working_tasks(self) -> list[Task]:
        """Return the living tasks that are counted."""
        return [task for task in self.alive if task in self._tree]

    def task_spawned(self, task: Task) -> None:
        """Count the task, if it works for the victim."""
        self.alive[task] = None
        home = task.parent_nursery
        if home is not None and (home is self._nursery or home.parent_task in self._tree):
            self._join_tree(task)

    def task_scheduled(self, task: Task) -> None:
        """Note the wake-up; if it is the awaited one, act as soon as the current step is over."""
        self._runnable.add(task)
        if task is self._awaited:
            self._awaited, self._due = None, task

    def before_task_step(self, task: Task) -> None:
        """Act on what the loop itself woke; notice a run that never ends."""
        self._act_if_due()
        self._runnable.discard(task)
        self._was_idle = False
        self._steps += 1
        if self._steps % self._max_steps == 0:
            self._on_stuck(f"livelock: not over after {self._steps} steps of its tasks")

    def after_task_step(self, task: Task) -> None:
        """Count the suspension, and act if this is the instant."""
        if task in self._tree and task in self.alive:
            self._count(task, is_parked=task not in self._runnable)
        self._act_if_due()

    def task_exited(self, task: Task) -> None:
        """Forget the task."""
        del self.alive[task]
        # `nursery.start()` moves a task into its nursery when it is well under way.
        self._note_home(task)

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002
        """Notice that nothing can ever run again.

        Twice in a row, because a task in `trio.testing.wait_all_tasks_blocked` is woken by the
        loop just after the first time.
        """
        is_idle = not self._runnable and _nothing_will_come()
        if is_idle and self._was_idle:
            self._on_stuck("deadlock: nothing is left that could wake its tasks")
        self._was_idle = is_idle

    def after_run(self) -> None:
        """Note that the watch was not removed."""
        self.is_whole = True

    def _join_tree(self, task: Task) -> None:
        self._tree.add(task)
        self._note_home(task)
        self.starts += 1
        self._count(task, is_parked=False)

    def _note_home(self, task: Task) -> None:
        if self._nursery is not None and task.parent_nursery is self._nursery:
            self.uses_nursery = True

    def _count(self, task: Task, *, is_parked: bool) -> None:
        number = self.suspensions
        self.suspensions += 1
        if self._point.instant == "never":
            self.sleeps += is_parked and is_sleeping(task)
        elif number == self._point.suspension:
            self.is_parked = is_parked
            self._choose_instant(task, is_parked=is_parked)

    def _choose_instant(self, task: Task, *, is_parked: bool) -> None:
        """Act now, at the wake-up, or, where nobody parked, only as a wake-up."""
        if is_parked and self._point.instant == "woken":
            self._awaited = task
        elif is_parked or self._point.instant == "woken":
            self._due = task

    def _act_if_due(self) -> None:
        if self._due is not None:
            task, self._due = self._due, None
            self._act(task)


def _nothing_will_come() -> bool:
    return trio.lowlevel.current_statistics().seconds_to_next_deadline == math.inf
