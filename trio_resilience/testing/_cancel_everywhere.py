"""Find out what breaks when a call is cancelled, at every instant at which it can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import attrs
import trio

from ._cancel_records import (
    CancelEverywhereError,
    CancelPoint,
    CancelReport,
    Finding,
    Scenario,
    Target,
    check_int,
)
from ._cancel_run import CancelRun
from ._scheduling import is_answered, is_replayable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ._run_watch import RunWatch


def cancel_everywhere(
    make_scenario: Callable[[], Scenario],
    *,
    targets: Sequence[Target] | None = None,
    seeds: Iterable[int] = range(3),
    max_suspensions: int = 1000,
    max_steps: int = 10_000,
    max_findings: int = 10,
    only: CancelPoint | Finding | None = None,
) -> CancelReport:
    """Run a scenario again and again, cancelled each time at another instant; raise what broke.

    A call is suspended k = 0, 1, 2 … times before it is over. This runs the scenario once for every
    k and each of two instants, when the task has just *parked* and when it has just been *woken*
    but has not run yet, until a run completes without reaching its k; that for each target and for
    each seed. The suspensions of all tasks count that work for the victim: its own task, those
    beneath it, and those in the nursery that it was given; a task that has not made its first step
    counts as just woken. Each run is a `trio.run` of its own, on virtual time.

    A finding is any of these, in any run, the uncancelled one included:

    - a `Cancelled` that was delivered to the victim's task does not come out of it. (To return all
      the same is fine for a call that had been woken with its value already, and for one that does
      not let itself be aborted, but joins its work.)
    - anything but `Cancelled` comes out of a cancelled victim, or `Cancelled` out of one that is
      not (only the nursery was, or nothing)
    - the other tasks do not finish, or fail; the given nursery crashes
    - a task outlives the call, or is left when all is over
    - a fresh user does not get in, or the scenario's own invariant is broken
    - a deadlock, or a run of more than *max_steps* steps. It is reported, with where everybody
      stands, and the run is torn down: shielded tasks, and those that ignore cancellation, too.
    - an abort function raises, or trio's loop crashes (a task was woken twice)

    A whole test of a home-made lock::

        import trio
        from trio_resilience.testing import Scenario, cancel_everywhere, pause


        class HomeMadeLock:
            def __init__(self) -> None:
                self.is_taken = False
                self.line = trio.lowlevel.ParkingLot()

            async def __aenter__(self) -> None:
                if self.is_taken:
                    await self.line.park()  # until it is handed over
                self.is_taken = True
                await trio.lowlevel.checkpoint()

            async def __aexit__(self, *exc_info: object) -> None:
                self.is_taken = bool(self.line)
                self.line.unpark()


        def make_scenario() -> Scenario:
            lock = HomeMadeLock()

            async def use(nursery: trio.Nursery | None = None) -> None:
                async with lock:
                    await pause()

            return Scenario(
                victim=use,
                others=[use, use],
                fresh_user=use,
                invariant=lambda: not lock.is_taken,
            )


        def test_a_cancelled_user_of_the_lock_harms_nobody() -> None:
            cancel_everywhere(make_scenario)

    It fails: who is cancelled at the `checkpoint()` has the lock already, and never gives it back,
    as ``__aexit__`` only runs if ``__aenter__`` returned. The cure is to ask for the cancellation
    first, with `checkpoint_if_cancelled`, and to end with `cancel_shielded_checkpoint`.

    How to write one: make all state inside *make_scenario*. Let the operations suspend with
    `pause`, never with `trio.sleep` alone, which hides the second instant (if the victim does
    nothing else, that is a `ValueError`). Let the others compete with the victim for what is under
    test, and finish by themselves. Use no threads, sockets or processes: while a run waits for
    one, it looks deadlocked. Draw random numbers from a generator that *make_scenario* seeds.

    Args:
        make_scenario: returns a new `Scenario`; called inside each run.
        targets: whom to cancel: ``"caller"``, ``"nursery"``, or both. By default the caller, and
            the nursery if the victim started anything in it.
        seeds: each makes trio run the runnable tasks in another, repeatable order.
        max_suspensions: a victim that suspends more often is a `ValueError`: it would take long.
        max_steps: how many steps all tasks of one run may make together. (A task that loops without
            ever suspending cannot be stopped.)
        max_findings: stop when there are so many; the first is usually enough.
        only: make only this run: a finding, or its `point`, as its message shows it.

    Raises:
        CancelEverywhereError: an `AssertionError` with all ``findings``, each replayable.
    """
    __tracebackhide__ = True  # pytest then shows the caller's line, not this docstring
    if is_answered(trio.lowlevel.current_trio_token):
        raise RuntimeError("cancel_everywhere makes its own runs: call it from a sync test")
    for name, limit in (
        ("max_suspensions", max_suspensions),
        ("max_steps", max_steps),
        ("max_findings", max_findings),
    ):
        check_int(name, limit, at_least=1)
    search = _Search(make_scenario, max_suspensions, max_steps, max_findings)
    if only is None:
        search.run_all(_checked_targets(targets), seeds)
    else:
        search.run(_checked_point(only))
    if search.findings:
        raise CancelEverywhereError(tuple(search.findings), search.report())
    return search.report()


def _checked_targets(targets: Sequence[Target] | None) -> Sequence[Target] | None:
    known = get_args(Target)
    if targets is not None and not (targets and set(targets) <= set(known)):
        raise ValueError(f"`targets` must be some of {known}, got {targets!r}")
    return targets


def _checked_point(only: object) -> CancelPoint:
    point = only.point if isinstance(only, Finding) else only
    if not isinstance(point, CancelPoint):
        raise TypeError(f"`only` must be a CancelPoint or a Finding, got {only!r}")
    return point


@attrs.define(eq=False)
class _Search:
    """All the runs of one call, and what they found."""

    _make_scenario: Callable[[], Scenario]
    _max_suspensions: int
    _max_steps: int
    _max_findings: int

    findings: list[Finding] = attrs.field(factory=list[Finding], init=False)
    _runs: int = attrs.field(default=0, init=False)
    _cancellations: int = attrs.field(default=0, init=False)
    _suspensions: int = attrs.field(default=0, init=False)

    @property
    def _has_enough(self) -> bool:
        return len(self.findings) >= self._max_findings

    def report(self) -> CancelReport:
        return CancelReport(
            self._runs, self._cancellations, self._suspensions, replayable=is_replayable()
        )

    def run_all(self, targets: Sequence[Target] | None, seeds: Iterable[int]) -> None:
        for seed in seeds:
            quiet = self.run(CancelPoint("caller", "never", 0, seed))
            if quiet.findings:
                return  # what goes wrong by itself would only do so again in every other run
            _refuse_sleep_alone(quiet.watch)
            self._refuse_length(quiet.watch.suspensions)
            used: list[Target] = ["caller", "nursery"] if quiet.watch.uses_nursery else ["caller"]
            for target in targets or used:
                self._run_target(target, seed)
            if self._has_enough:
                return
        if not self._runs:
            raise ValueError("`seeds` must not be empty")

    def _run_target(self, target: Target, seed: int) -> None:
        suspension = 0
        while not self._has_enough:
            self._refuse_length(suspension)
            woken = self.run(CancelPoint(target, "woken", suspension, seed))
            if woken.watch.suspensions <= suspension:
                return
            if woken.watch.is_parked:  # or else its two instants are one
                self.run(CancelPoint(target, "parked", suspension, seed))
            suspension += 1

    def _refuse_length(self, suspensions: int) -> None:
        if suspensions > self._max_suspensions:
            raise ValueError(
                f"the victim is suspended more than `max_suspensions` = {self._max_suspensions} "
                "times: give it less to do, or raise the limit"
            )

    def run(self, point: CancelPoint) -> CancelRun:
        run = CancelRun(point, self._make_scenario, self._max_steps)
        run.make()
        self._runs += 1
        self._cancellations += run.has_cancelled
        self._suspensions = max(self._suspensions, run.watch.suspensions)
        self.findings += run.findings
        return run


def _refuse_sleep_alone(watch: RunWatch) -> None:
    if 0 < watch.sleeps == watch.suspensions - watch.starts:
        raise ValueError(
            "the victim only ever suspends in `trio.sleep`, which hides what happens when it is "
            "cancelled after it was woken: let its operations `await pause()` instead"
        )
