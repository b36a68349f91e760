"""When the harness cancels, that it repeats itself, that it always ends, and what it refuses."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import types
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
from trio.lowlevel import Abort

from trio_resilience.testing import (
    CancelEverywhereError,
    CancelPoint,
    CancelReport,
    Scenario,
    _scheduling,
    cancel_everywhere,
    pause,
)
from trio_resilience.testing._run_watch import RunWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


def scheduler_state() -> object:
    generator, flag = (
        getattr(sys.modules["trio._core._run"], name)
        for name in ("_r", "_ALLOW_DETERMINISTIC_SCHEDULING")
    )
    return generator.getstate(), flag


async def idle(_: object = None) -> None:
    await pause()


@attrs.define(eq=False)
class LeakyLock:
    """A lock with a bug: a waiter that is cancelled at its last checkpoint keeps it."""

    is_taken: bool = False
    line: trio.lowlevel.ParkingLot = attrs.field(factory=trio.lowlevel.ParkingLot)

    async def use(self, _: object = None) -> None:
        if self.is_taken:
            await self.line.park()
        self.is_taken = True
        await trio.lowlevel.checkpoint()
        await self.work()

    async def work(self) -> None:
        try:
            await pause()
        finally:
            self.is_taken = bool(self.line)
            self.line.unpark()


def leaky() -> Scenario:
    lock = LeakyLock()
    return Scenario(lock.use, others=[lock.use, lock.use], fresh_user=lock.use)


def error_of(make_scenario: Callable[[], Scenario], **options: Any) -> CancelEverywhereError:
    with pytest.raises(CancelEverywhereError) as caught:
        cancel_everywhere(make_scenario, **options)
    return caught.value


# The instants


def test_a_parked_task_is_cancelled_before_any_other_task_runs() -> None:
    """`bystander` makes a step in every round of the loop, and sees none between the two."""
    rounds: list[tuple[int, int]] = []

    def make_scenario() -> Scenario:
        steps = 0

        async def bystander() -> None:
            nonlocal steps
            for steps in range(20):  # noqa: B007
                await trio.lowlevel.checkpoint()

        async def victim(_: trio.Nursery) -> None:
            parked_at = steps

            def abort(_: object) -> Abort:
                rounds.append((parked_at, steps))
                return Abort.SUCCEEDED

            task = trio.lowlevel.current_task()
            trio.lowlevel.current_trio_token().run_sync_soon(wake, task)
            await trio.lowlevel.wait_task_rescheduled(abort)

        def wake(task: trio.lowlevel.Task) -> None:
            if not rounds:
                trio.lowlevel.reschedule(task)

        return Scenario(victim, others=[bystander])

    for seed in range(10):
        rounds.clear()
        cancel_everywhere(make_scenario, only=CancelPoint("caller", "parked", 1, seed))
        ((parked_at, aborted_at),) = rounds
        assert parked_at == aborted_at


@pytest.mark.parametrize("seed", range(10))
def test_a_woken_task_is_cancelled_when_its_waker_has_ended_its_step(seed: int) -> None:
    """Not inside the waker's `release()`, and before the woken task runs."""
    log: list[str] = []

    def make_scenario() -> Scenario:
        turn = trio.Event()

        def abort(_: object) -> Abort:
            log.append("abort")
            return Abort.SUCCEEDED

        async def abortable() -> None:
            await trio.lowlevel.wait_task_rescheduled(abort)

        async def victim(_: trio.Nursery) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(abortable)
                await turn.wait()
                log.append(f"woken, deadline {trio.current_effective_deadline()}")
                nursery.cancel_scope.cancel()

        async def waker() -> None:
            await trio.testing.wait_all_tasks_blocked()
            turn.set()
            log.append("waker goes on")
            await trio.lowlevel.checkpoint()

        return Scenario(victim, others=[waker])

    # The victim's start is suspension 0, its child's start 1, the wait of the victim 2.
    cancel_everywhere(make_scenario, only=CancelPoint("caller", "woken", 2, seed))
    assert log == ["waker goes on", "abort", "woken, deadline -inf"]


def test_what_the_loop_itself_wakes_is_cancelled_before_it_runs() -> None:
    """Both deadlines are over when the victim runs, so the outer one wins."""
    endings: list[str] = []

    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            await pause()
            with trio.move_on_after(1):
                await trio.sleep_forever()
            endings.append("timeout")

        return Scenario(victim)

    report = cancel_everywhere(make_scenario, only=CancelPoint("caller", "woken", 2, 0))
    assert report.cancellations == 1
    assert endings == []
    cancel_everywhere(make_scenario, only=CancelPoint("caller", "never", 2, 0))
    assert endings == ["timeout"]


def test_every_suspension_of_every_task_that_works_for_the_victim_is_an_instant() -> None:
    def make_scenario() -> Scenario:
        async def child(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            await pause()
            task_status.started()
            await trio.lowlevel.checkpoint()

        async def victim(given: trio.Nursery) -> None:
            await given.start(child)
            async with trio.open_nursery() as own:
                own.start_soon(child)
            await pause(3)

        return Scenario(victim, others=[idle, partial(pause, 5)], fresh_user=idle)

    report = cancel_everywhere(make_scenario, seeds=[0], targets=["caller"])
    # The victim: its start, waiting in `start` (its nursery) and in its own nursery, 3 pauses.
    # Each child: its start, its pause, its checkpoint.
    assert report.suspensions == 6 + 3 + 3
    parked = 5 + 1 + 1
    assert report.cancellations == 12 + parked
    assert report.runs == 1 + report.cancellations + 1


def test_the_nursery_is_cancelled_too_if_the_victim_starts_something_in_it() -> None:
    """Also if it arrives there by `start`, from a nursery of trio's own."""

    def make_scenario(how: str) -> Scenario:
        async def child(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            task_status.started()

        async def victim(given: trio.Nursery) -> None:
            if how == "start":
                await given.start(child)
            elif how == "start_soon":
                given.start_soon(child)
            with trio.CancelScope(shield=True):  # until the child is gone
                await trio.testing.wait_all_tasks_blocked()

        return Scenario(victim, on_nursery_cancelled=(RuntimeError,))

    for how, factor in (("start", 2), ("start_soon", 2), ("", 1)):
        both = cancel_everywhere(partial(make_scenario, how))
        caller = cancel_everywhere(partial(make_scenario, how), targets=["caller"])
        assert both.cancellations == factor * caller.cancellations
    unused = cancel_everywhere(partial(make_scenario, ""), targets=["caller", "nursery"])
    assert unused.cancellations == 2 * caller.cancellations


def test_a_trip_through_the_scheduler_has_one_instant_only() -> None:
    """The task is runnable at once, so there is none at which it has parked."""

    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            await trio.lowlevel.checkpoint()

        return Scenario(victim)

    report = cancel_everywhere(make_scenario, seeds=[0])
    # The third suspension is that of `checkpoint` when it finds itself cancelled.
    assert report == CancelReport(runs=4, cancellations=2, suspensions=3, replayable=True)
    for suspension in (0, 1):
        never = cancel_everywhere(
            make_scenario, only=CancelPoint("caller", "parked", suspension, 0)
        )
        assert never.cancellations == 0


# Replays


def test_a_finding_is_replayed_from_its_numbers() -> None:
    error = error_of(leaky)
    assert len(error.findings) > 1
    for finding in error.findings:
        again = error_of(leaky, only=finding.point)
        assert again.findings == error_of(leaky, only=finding).findings == (finding,)
        assert again.report.runs == 1
        assert f"replay: cancel_everywhere(make_scenario, only={finding.point!r})" in str(finding)
        assert eval(repr(finding.point)) == finding.point  # noqa: S307


def test_the_message_has_all_findings() -> None:
    error = error_of(leaky, max_findings=3)
    head, *findings = str(error).split("\n\n")
    assert head == f"3 problems in {error.report.runs} runs"
    assert findings == [str(finding) for finding in error.findings]
    assert str(error_of(leaky, only=error.findings[0].point)).startswith("1 problem in 1 runs")


def test_it_stops_when_there_are_enough_findings() -> None:
    assert len(error_of(leaky, max_findings=2).findings) == 2
    assert len(error_of(leaky, max_findings=1000).findings) > 2
    first, only_seed = (error_of(leaky, max_findings=1, seeds=seeds) for seeds in (range(9), [0]))
    assert first.report == only_seed.report


def test_the_error_survives_pickling() -> None:
    error = error_of(leaky)
    again: CancelEverywhereError = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert again.findings == error.findings
    assert str(again) == str(copy.copy(error)) == str(error)


def test_runs_repeat_themselves_in_other_processes() -> None:
    """Whatever the hashes and the addresses are there."""
    script = (
        "from tests.test_cancel_everywhere_runs import error_of, leaky\n"
        "print(error_of(leaky, seeds=range(5), max_findings=100))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=Path(__file__).parent.parent,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    here = str(error_of(leaky, seeds=range(5), max_findings=100))
    assert outputs == {f"{here}\n".encode()}


def test_seeds_make_a_difference() -> None:
    """Whether the victim finds the lock taken depends on who runs first."""
    reports = {cancel_everywhere_report(seed) for seed in range(10)}
    assert len(reports) > 1


def cancel_everywhere_report(seed: int) -> CancelReport:
    def make_scenario() -> Scenario:
        lock = trio.Lock()

        async def use(_: object = None) -> None:
            async with lock:
                await pause()

        return Scenario(use, others=[use, use])

    return cancel_everywhere(make_scenario, seeds=[seed])


def test_this_trio_has_the_private_names_that_make_runs_replayable() -> None:
    """True for 0.25 to 0.35. Where it fails, `_scheduling` must learn how the new trio does it."""
    assert _scheduling.is_replayable()
    assert cancel_everywhere(lambda: Scenario(idle)).replayable


def test_without_the_private_names_it_works_and_says_that_runs_may_differ(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_scheduling, "_FLAG", "_A_NAME_THAT_TRIO_DROPPED")
    before = scheduler_state()
    error = error_of(leaky, seeds=range(20))
    assert scheduler_state() != before
    assert not error.report.replayable
    assert "(may differ: this version of trio does not let" in str(error.findings[0])


def test_trios_scheduler_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plugin of hypothesis, for one, sets the flag for all runs."""
    monkeypatch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", False)
    before = scheduler_state()
    cancel_everywhere(lambda: Scenario(idle))
    error_of(leaky)
    with pytest.raises(ZeroDivisionError):
        cancel_everywhere(lambda: Scenario(idle, others=[1 / 0]))  # type: ignore[list-item]
    assert scheduler_state() == before


# Runs that do not want to end


async def shielded() -> None:
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


async def in_a_shielded_nursery() -> None:
    with trio.CancelScope(shield=True):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.Event().wait()
            finally:
                await trio.sleep(1)


async def unabortable() -> None:
    await trio.lowlevel.wait_task_rescheduled(lambda _: Abort.FAILED)


async def deaf() -> None:
    while True:
        with suppress(BaseException):
            await trio.sleep(1)


async def restless() -> None:
    while True:
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    "hang", [trio.sleep_forever, shielded, in_a_shielded_nursery, unabortable, deaf, restless]
)
@pytest.mark.parametrize("where", ["victim", "given", "other", "fresh user", "system"])
def test_no_task_can_keep_a_run_from_ending(
    hang: Callable[[], Any], where: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Not even one that ignores every cancellation: the run is abandoned, and reported."""

    def make_scenario() -> Scenario:
        async def victim(given: trio.Nursery) -> None:
            if where == "victim":
                await hang()
            elif where == "given":
                given.start_soon(hang)
            elif where == "system":
                trio.lowlevel.spawn_system_task(hang)
            await pause()

        async def other() -> None:
            await (hang if where == "other" else idle)()

        async def fresh_user() -> None:
            await (hang if where == "fresh user" else idle)()

        return Scenario(victim, others=[other], fresh_user=fresh_user)

    findings = error_of(make_scenario, max_steps=500).findings
    assert any(
        headline in findings[0].problem
        for headline in ("deadlock", "livelock", "outlive", "are left")
    )
    # The next run does not notice.
    cancel_everywhere(lambda: Scenario(idle), seeds=[0])
    assert caplog.records == []


def test_the_tasks_of_an_abandoned_run_never_run_again() -> None:
    """To collect them would run their `finally` blocks, outside of any run."""
    log: list[str] = []

    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            try:
                await unabortable()
            finally:
                log.append("collected")

        return Scenario(victim)

    error_of(make_scenario)
    gc.collect()
    assert log == []


def test_ctrl_c_ends_it() -> None:
    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            await pause()
            raise KeyboardInterrupt

        return Scenario(victim, others=[idle])

    with pytest.RaisesGroup(KeyboardInterrupt, flatten_subgroups=True):
        cancel_everywhere(make_scenario)


def test_an_exit_of_the_victim_is_a_finding_as_any_other_error() -> None:
    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            await pause()
            raise SystemExit(3)

        return Scenario(victim)

    assert (
        error_of(make_scenario).findings[0].problem.startswith("the victim failed: SystemExit: 3")
    )


def test_an_await_of_another_framework_fails_as_it_does_without_the_harness() -> None:
    @types.coroutine
    def foreign() -> Generator[str, None, None]:
        yield "what trio does not know"

    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            try:
                await foreign()
            finally:
                await pause()

        return Scenario(victim)

    problem = error_of(make_scenario).findings[0].problem
    assert "TypeError: trio.run received unrecognized yield message" in problem


def test_a_watch_that_breaks_is_no_silent_success(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Trio removes an instrument that raises; then nothing would be cancelled any more."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(RunWatch, "task_exited", fail)
    with pytest.raises(RuntimeError, match="could not watch the run to its end"):
        cancel_everywhere(lambda: Scenario(idle))
    assert "ZeroDivisionError" in caplog.text


# What is refused


def test_a_victim_that_only_sleeps_is_refused() -> None:
    def make_scenario(sleep: Callable[[], Any]) -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            await sleep()

        return Scenario(victim)

    with pytest.raises(ValueError, match=r"only ever suspends in `trio.sleep`.* `await pause\(\)`"):
        cancel_everywhere(partial(make_scenario, partial(trio.sleep, 1)))
    cancel_everywhere(partial(make_scenario, partial(trio.sleep, 0)))
    cancel_everywhere(partial(make_scenario, pause))


def test_a_victim_that_suspends_too_often_is_refused_after_one_run() -> None:
    runs = 0

    def make_scenario() -> Scenario:
        nonlocal runs
        runs += 1

        async def victim(_: trio.Nursery) -> None:
            await pause(9)

        return Scenario(victim)

    assert cancel_everywhere(make_scenario, max_suspensions=10).suspensions == 10
    runs = 0
    with pytest.raises(ValueError, match="more than `max_suspensions` = 9 times"):
        cancel_everywhere(make_scenario, max_suspensions=9)
    assert runs == 1


def test_a_victim_that_changes_from_run_to_run_cannot_keep_it_going() -> None:
    rounds = 0

    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            nonlocal rounds
            rounds += 1
            await pause(rounds)

        return Scenario(victim)

    with pytest.raises(ValueError, match="more than `max_suspensions` = 20 times"):
        cancel_everywhere(make_scenario, max_suspensions=20)


async def test_it_is_refused_inside_a_run() -> None:
    with pytest.raises(RuntimeError, match="call it from a sync test"):
        cancel_everywhere(lambda: Scenario(idle))
    await trio.lowlevel.checkpoint()


def test_bad_options_are_refused() -> None:
    def make_scenario() -> Scenario:
        return Scenario(idle)

    def refused(**options: Any) -> None:
        cancel_everywhere(make_scenario, **options)

    for name in ("max_suspensions", "max_steps", "max_findings"):
        with pytest.raises(ValueError, match=f"`{name}` must be >= 1, got 0"):
            refused(**{name: 0})
        with pytest.raises(TypeError, match=f"`{name}` must be an int, got True"):
            refused(**{name: True})
    for targets in ([], ["everybody"]):
        with pytest.raises(ValueError, match="`targets` must be some of"):
            refused(targets=targets)
    with pytest.raises(ValueError, match="`seeds` must not be empty"):
        refused(seeds=[])
    with pytest.raises(TypeError, match="`only` must be a CancelPoint or a Finding, got 3"):
        refused(only=3)
    with pytest.raises(TypeError, match="`make_scenario` must return a Scenario, got None"):
        cancel_everywhere(lambda: None)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("name", ["victim", "others", "fresh_user"])
def test_a_scenario_refuses_what_is_no_async_function(name: str) -> None:
    def wrong(value: object) -> dict[str, Any]:
        return {"victim": idle, name: [value] if name == "others" else value}

    with pytest.raises(TypeError, match=f"`{name}` must be an async function, got 1"):
        Scenario(**wrong(1))
    with pytest.raises(TypeError, match=rf"write `{name}=fn`, not `{name}=fn\(\)`"):
        Scenario(**wrong(idle()))


def test_a_scenario_refuses_other_mistakes() -> None:
    with pytest.raises(TypeError, match="`invariant` must be a sync function"):
        Scenario(idle, invariant=idle)
    with pytest.raises(TypeError, match="`invariant` must be a sync function"):
        Scenario(idle, invariant=1)  # type: ignore[arg-type]
    wrong: Any
    for wrong in (OSError, (OSError, KeyboardInterrupt), (OSError(),)):
        with pytest.raises(TypeError, match="`expected` must be a tuple of Exception types"):
            Scenario(idle, expected=wrong)


def test_a_cancel_point_refuses_numbers_that_are_none() -> None:
    with pytest.raises(ValueError, match="`target` must be 'caller' or 'nursery', got 'x'"):
        CancelPoint("x", "woken", 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`instant` must be 'never' or 'parked' or 'woken'"):
        CancelPoint("caller", "x", 0, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`suspension` must be >= 0, got -1"):
        CancelPoint("caller", "woken", -1, 0)
    with pytest.raises(TypeError, match="`seed` must be an int, got '1'"):
        CancelPoint("caller", "woken", 1, "1")  # type: ignore[arg-type]
    assert CancelPoint("caller", "woken", 1, -1).seed == -1


# `pause`


def test_pause_takes_no_time_and_lets_others_run() -> None:
    async def main() -> list[str]:
        log: list[str] = []

        async def two(name: str) -> None:
            for _ in range(2):
                log.append(name)
                await pause()

        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(two, "a")
            nursery.start_soon(two, "b")
        assert trio.current_time() == began
        return log

    log = trio.run(main, clock=trio.testing.MockClock())
    assert set(log[:2]) == set(log[2:]) == {"a", "b"}


async def test_pause_is_cancellable() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await pause()
    assert scope.cancelled_caught


async def test_pause_refuses_no_rounds() -> None:
    with pytest.raises(ValueError, match="`rounds` must be >= 1, got 0"):
        await pause(0)
