"""One run of a scenario: cancel at one point, then see who suffers."""

from __future__ import annotations

import inspect
import re
import traceback
from functools import partial
from typing import TYPE_CHECKING

import attrs
import trio
from trio.lowlevel import Task
from trio.testing import MockClock

from ._cancel_records import CancelPoint, Finding, Scenario
from ._listening import Overhear, Trap, contains, strangers
from ._run_watch import RunWatch
from ._scheduling import (
    RunAbandonedError,
    abandon_run,
    is_replayable,
    keep_for_ever,
    seeded_scheduler,
)
from ._task_frames import locate

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

_REASON = "cancelled by cancel_everywhere"
_CANCEL_PARAMETERS = inspect.signature(trio.CancelScope.cancel).parameters
_WITH_REASON = {"reason": _REASON} if "reason" in _CANCEL_PARAMETERS else {}  # trio >= 0.31


@attrs.define(eq=False)
class CancelRun:
    """A run that cancels at *point*: what it found, and how far it came."""

    point: CancelPoint
    _make_scenario: Callable[[], Scenario]
    _max_steps: int

    watch: RunWatch = attrs.field(init=False)
    findings: list[Finding] = attrs.field(factory=list[Finding], init=False)
    has_cancelled: bool = attrs.field(default=False, init=False)

    _clock: MockClock = attrs.field(init=False)
    _root: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _caller: trio.CancelScope = attrs.field(factory=trio.CancelScope, init=False)
    _target: trio.CancelScope = attrs.field(init=False)
    _where: str = attrs.field(default="nothing was cancelled", init=False)
    _was_delivered: bool = attrs.field(default=False, init=False)
    _is_torn_down: bool = attrs.field(default=False, init=False)
    _not_ours: frozenset[Task] = attrs.field(default=frozenset[Task](), init=False)

    def __attrs_post_init__(self) -> None:
        self._clock = MockClock(autojump_threshold=0)
        self._target = self._caller
        self.watch = RunWatch(self.point, self._cancel, self._tear_down, self._max_steps)

    def make(self) -> None:
        """Make the run; return when nothing of it is left, whatever its tasks do."""
        try:
            with seeded_scheduler(self.point.seed):
                trio.run(self._main, clock=self._clock, instruments=[self.watch])
        except trio.TrioInternalError as crash:
            if not isinstance(crash.__cause__, RunAbandonedError):
                cause = _describe(crash.__cause__ or crash)
                self._find(f"trio's own loop crashed; was a task woken twice? {cause}")
            keep_for_ever(self.watch.alive)
        if not self.watch.is_whole:
            raise RuntimeError(
                "cancel_everywhere could not watch the run to its end; "
                "the log of `trio.abc.Instrument` says why"
            )

    async def _main(self) -> None:
        self._not_ours = frozenset(self.watch.alive)
        scenario = _checked(self._make_scenario())
        with self._root:
            await self._play(scenario)
            if scenario.fresh_user is not None:
                await self._admit(scenario.fresh_user)
        self._find_left_behind(self._living_tasks(), "are left when everything is over")
        self._check_invariant(scenario)

    async def _play(self, scenario: Scenario) -> None:
        done = trio.Event()
        async with trio.open_nursery() as stage:
            for number, other in enumerate(scenario.others):
                name = f"other {number}"
                stage.start_soon(self._run_bystander, name, other, name=name)
            with Trap() as trap:
                async with trio.open_nursery() as given:
                    if self.point.target == "nursery":
                        self._target = given.cancel_scope
                    # `given` outlives the victim's use of it: the block below waits for `done`.
                    run_victim = partial(self._run_victim, scenario, given, done)
                    stage.start_soon(run_victim, name="victim")
                    self.watch.follow(given, next(reversed(self.watch.alive)))
                    # A nursery that its owner left closes as soon as it is empty. This one stays
                    # open, cancelled or not, as long as the victim may use it.
                    with trio.CancelScope(shield=True):
                        await done.wait()
            self._find_strangers("the nursery that the call was given crashed", trap.error, ())

    async def _run_victim(self, scenario: Scenario, given: trio.Nursery, done: trio.Event) -> None:
        try:
            with self._caller, Trap() as trap:
                await Overhear(_call(scenario.victim, given), self._listen)
            self._judge(scenario, trap.error)
            if self._find_left_behind(self.watch.working_tasks(), "outlive the call"):
                given.cancel_scope.cancel()
        finally:
            done.set()

    async def _run_bystander(self, name: str, function: Callable[[], Awaitable[object]]) -> None:
        with Trap() as trap:
            await function()
        self._find_strangers(f"{name} failed", trap.error, ())

    async def _admit(self, fresh_user: Callable[[], Awaitable[object]]) -> None:
        name = "fresh user"
        # A task of its own, so that a deadlock names it.
        async with trio.open_nursery() as nursery:  # noqa: ASYNC112
            nursery.start_soon(self._run_bystander, name, fresh_user, name=name)

    def _listen(self, value: object) -> None:
        """Note a `Cancelled` of ours; one of a scope inside the call is the call's own affair.

        Before trio 0.31, which gives no reasons, all of them look like ours.
        """
        error = getattr(value, "error", None)  # trio resumes a task with an `outcome`
        if self.has_cancelled and isinstance(error, trio.Cancelled):
            self._was_delivered |= getattr(error, "reason", _REASON) == _REASON

    def _cancel(self, task: Task) -> None:
        self.has_cancelled = True
        self._where = f"{task.name}, just {self.point.instant}: {locate(task)}"
        self._cancel_scope(self._target)

    def _cancel_scope(self, scope: trio.CancelScope) -> None:
        with Trap() as trap:
            scope.cancel(**_WITH_REASON)
        if trap.error is not None:
            # The task that it belongs to will probably never wake, and deadlock the run.
            self._find(f"an abort function raised {_describe(trap.error)}")
            self._is_torn_down = True

    def _tear_down(self, problem: str) -> None:
        """End a run that cannot end: politely first, so that most tasks clean up as usual."""
        if self._is_torn_down:
            abandon_run(self._clock)
            return
        self._find(problem + _list_tasks(self._living_tasks()))
        self._is_torn_down = True
        self._cancel_scope(self._root)

    def _judge(self, scenario: Scenario, error: BaseException | None) -> None:
        allowed: tuple[type[BaseException], ...] = scenario.expected
        is_cancelled = self.has_cancelled and self.point.target == "caller"
        if is_cancelled:
            allowed = (*allowed, trio.Cancelled)
        elif self.has_cancelled:
            allowed = (*allowed, *scenario.on_nursery_cancelled)
        if is_cancelled and self._was_delivered and not contains(error, trio.Cancelled):
            ending = "it returned" if error is None else f"it raised {_describe(error)}"
            self._find(f"`Cancelled` was delivered to the victim, and swallowed: {ending}")
        else:
            self._find_strangers("the victim failed", error, allowed)

    def _living_tasks(self) -> list[Task]:
        return [task for task in self.watch.alive if task not in self._not_ours]

    def _check_invariant(self, scenario: Scenario) -> None:
        if scenario.invariant is None:
            return
        verdict: object = None
        with Trap() as trap:
            verdict = scenario.invariant()
        if trap.error is not None:
            self._find(f"the invariant is broken: {_describe(trap.error)}")
        elif verdict is False:
            self._find("the invariant is broken: it returned False")

    def _find_left_behind(self, tasks: Iterable[Task], verb: str) -> bool:
        left = [task for task in tasks if task is not trio.lowlevel.current_task()]
        if left:
            self._find(f"tasks {verb}:{_list_tasks(left)}")
        return bool(left)

    def _find_strangers(
        self, what: str, error: BaseException | None, allowed: tuple[type[BaseException], ...]
    ) -> None:
        for stranger in strangers(error, allowed):
            self._find(f"{what}: {_describe(stranger)}")

    def _find(self, problem: str) -> None:
        # What happens after a deadlock was found is only how its tasks die.
        if not self._is_torn_down:
            finding = Finding(self.point, problem, self._where, replayable=is_replayable())
            self.findings.append(finding)


def _checked(scenario: object) -> Scenario:
    if not isinstance(scenario, Scenario):
        raise TypeError(f"`make_scenario` must return a Scenario, got {scenario!r}")
    return scenario


async def _call(victim: Callable[[trio.Nursery], Awaitable[object]], nursery: trio.Nursery) -> None:
    await victim(nursery)


def _list_tasks(tasks: Iterable[Task]) -> str:
    return "".join(f"\n    {task.name}: {locate(task)}" for task in tasks)


def _describe(error: BaseException) -> str:
    if isinstance(error, trio.Cancelled):
        return "`Cancelled`, though it was not cancelled"
    text = "".join(traceback.format_exception_only(error)).strip()
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", text)  # so that a replay says the same
    frames = traceback.extract_tb(error.__traceback__)
    return f"{text} (raised at {frames[-1].filename}:{frames[-1].lineno})" if frames else text
