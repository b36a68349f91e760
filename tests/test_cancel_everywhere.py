"""Each planted bug is caught; each right implementation of the same thing passes."""

from __future__ import annotations

import inspect
import math
import re
import textwrap
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import outcome
import pytest
import trio
from trio.lowlevel import Abort

from trio_resilience.testing import (
    CancelEverywhereError,
    CancelReport,
    Finding,
    Scenario,
    cancel_everywhere,
    pause,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def findings_of(make_scenario: Callable[[], Scenario], **options: Any) -> tuple[Finding, ...]:
    with pytest.raises(CancelEverywhereError) as caught:
        cancel_everywhere(make_scenario, **options)
    return caught.value.findings


def points_of(findings: tuple[Finding, ...]) -> list[tuple[str, int]]:
    return [(finding.point.instant, finding.point.suspension) for finding in findings]


BEFORE_AND_DURING_THE_PAUSE = [("woken", 0), ("parked", 1)]
"""Where a task is cancelled that suspends once, in `pause`. (Woken from it, it is free to go.)"""


def instants_of(findings: tuple[Finding, ...]) -> set[str]:
    return {finding.point.instant for finding in findings}


@attrs.define(eq=False)
class FairSemaphore:
    """One permit, handed to the longest waiter; right, with a hook for each planted bug."""

    is_free: bool = True
    line: deque[trio.lowlevel.Task] = attrs.field(factory=deque[trio.lowlevel.Task])

    async def acquire(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.is_free:
            self.is_free = False
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await self.wait_in_line()

    async def wait_in_line(self) -> None:
        task = trio.lowlevel.current_task()

        def leave(_: object) -> Abort:
            self.line.remove(task)
            return Abort.SUCCEEDED

        self.line.append(task)
        await trio.lowlevel.wait_task_rescheduled(leave)

    def release(self) -> None:
        if self.line:
            trio.lowlevel.reschedule(self.line.popleft())
        else:
            self.is_free = True

    async def __aenter__(self) -> None:
        await self.acquire()

    async def __aexit__(self, *_: object) -> None:
        self.release()


class LosesThePermitAtWakeUp(FairSemaphore):
    """It is polite once too often: who is cancelled at the last checkpoint has the permit."""

    async def wait_in_line(self) -> None:
        await super().wait_in_line()
        await trio.lowlevel.checkpoint()


@attrs.define(eq=False)
class KeepsGhostsInLine(FairSemaphore):
    """A cancelled waiter stays in the line, and is handed the permit when its turn comes."""

    events: deque[trio.Event] = attrs.field(factory=deque[trio.Event])

    async def wait_in_line(self) -> None:
        turn = trio.Event()
        self.events.append(turn)
        await turn.wait()

    def release(self) -> None:
        if self.events:
            self.events.popleft().set()
        else:
            self.is_free = True


class TidiesUpBeforeItReleases(FairSemaphore):
    """The cleanup awaits; in a cancelled task it raises, and the release never happens."""

    async def __aexit__(self, *_: object) -> None:
        await trio.lowlevel.checkpoint()
        self.release()


class RaisesItsOwnError(FairSemaphore):
    """It turns a cancellation into a timeout."""

    async def wait_in_line(self) -> None:
        try:
            await super().wait_in_line()
        except trio.Cancelled:
            raise TimeoutError("no permit") from None


class ForgetsItsLine(FairSemaphore):
    """Its abort function looks for the waiter where it is not."""

    async def wait_in_line(self) -> None:
        task = trio.lowlevel.current_task()

        def leave(_: object) -> Abort:
            self.line.remove(trio.lowlevel.current_root_task())  # type: ignore[arg-type]
            return Abort.SUCCEEDED

        self.line.append(task)
        await trio.lowlevel.wait_task_rescheduled(leave)


class WakesWhoIsGone(FairSemaphore):
    """It leaves cancelled waiters in the line, and wakes them a second time."""

    async def wait_in_line(self) -> None:
        self.line.append(trio.lowlevel.current_task())
        await trio.lowlevel.wait_task_rescheduled(lambda _: Abort.SUCCEEDED)


def contest(make_lock: Callable[[], Any]) -> Scenario:
    """Three tasks want what only one may have; then a fourth comes."""
    lock = make_lock()
    inside = 0

    async def use(_: trio.Nursery | None = None) -> None:
        nonlocal inside
        async with lock:
            inside += 1
            try:
                assert inside == 1
                await pause()
            finally:
                inside -= 1

    def nobody_is_inside() -> None:
        assert inside == 0

    return Scenario(use, others=[use, use], fresh_user=use, invariant=nobody_is_inside)


@pytest.mark.parametrize(
    "make_lock",
    [
        FairSemaphore,
        trio.Lock,
        trio.StrictFIFOLock,
        partial(trio.Semaphore, 1),
        partial(trio.CapacityLimiter, 1),
    ],
)
def test_a_right_lock_passes(make_lock: Callable[[], Any]) -> None:
    report = cancel_everywhere(partial(contest, make_lock))
    assert report.cancellations >= 3 * 3
    assert report.replayable


def test_a_permit_lost_at_wake_up_is_caught_where_it_is_lost() -> None:
    """The permit was handed over, and its new owner is cancelled before it can use it."""
    findings = findings_of(partial(contest, LosesThePermitAtWakeUp), max_findings=100)
    assert instants_of(findings) == {"woken"}
    assert all("deadlock" in finding.problem for finding in findings)
    assert any("FairSemaphore.wait_in_line" in finding.where for finding in findings)


def test_a_ghost_waiter_is_caught() -> None:
    """A permit that is handed to a cancelled waiter is lost to those behind it."""
    findings = findings_of(partial(contest, KeepsGhostsInLine))
    assert instants_of(findings) == {"parked"}
    assert "deadlock" in findings[0].problem
    assert "KeepsGhostsInLine.wait_in_line" in findings[0].where


def test_a_release_that_is_skipped_because_the_cleanup_awaits_first_is_caught() -> None:
    findings = findings_of(partial(contest, TidiesUpBeforeItReleases))
    assert instants_of(findings) == {"parked", "woken"}
    assert "deadlock" in findings[0].problem


def test_a_swallowed_cancelled_is_caught() -> None:
    def swallow() -> Scenario:
        async def victim(_: trio.Nursery) -> str:
            try:
                await pause()
            except trio.Cancelled:
                return "never mind"
            return "done"

        return Scenario(victim)

    findings = findings_of(swallow, seeds=[0])
    assert points_of(findings) == BEFORE_AND_DURING_THE_PAUSE
    assert findings[0].problem == (
        "`Cancelled` was delivered to the victim, and swallowed: it returned"
    )


def test_an_expected_error_is_no_excuse_for_swallowing_a_cancelled() -> None:
    expected = (TimeoutError,)
    findings = findings_of(lambda: attrs.evolve(contest(RaisesItsOwnError), expected=expected))
    assert all("swallowed" in finding.problem for finding in findings)


def test_an_error_instead_of_a_cancelled_is_caught() -> None:
    problems = [finding.problem for finding in findings_of(partial(contest, RaisesItsOwnError))]
    assert all("swallowed: it raised TimeoutError: no permit (raised at " in p for p in problems)


def test_an_abort_function_that_raises_is_caught() -> None:
    findings = findings_of(partial(contest, ForgetsItsLine))
    assert instants_of(findings) == {"parked"}
    assert findings[0].problem.startswith(
        "an abort function raised ValueError: <Task '<init>'> is not in deque (raised at "
    )
    assert len({finding.point for finding in findings}) == len(findings)  # no deadlock on top


def test_a_task_that_is_woken_twice_is_caught() -> None:
    """Trio's own loop does not survive that; the test does."""
    findings = findings_of(partial(contest, WakesWhoIsGone))
    assert instants_of(findings) == {"parked"}
    assert findings[0].problem.startswith("trio's own loop crashed; was a task woken twice?")


def test_a_deadlock_is_reported_with_where_everybody_stands() -> None:
    def embrace() -> Scenario:
        one, two = trio.Lock(), trio.Lock()

        async def take(first: trio.Lock, second: trio.Lock, _: object = None) -> None:
            async with first:
                await pause()
                async with second:
                    pass

        return Scenario(partial(take, one, two), others=[partial(take, two, one)])

    (finding,) = findings_of(embrace, targets=["caller"])
    assert finding.point.instant == "never"
    assert finding.where == "nothing was cancelled"
    headline, other, victim = finding.problem.splitlines()
    assert headline == "deadlock: nothing is left that could wake its tasks"
    assert other.startswith("    other 0: trio's _LockImpl.acquire <- ")
    assert victim.startswith("    victim: trio's _LockImpl.acquire <- ")
    assert other.endswith(".take")
    assert f"{__file__}:" in victim


def test_where_a_task_stands_is_told_in_calls_of_its_own_code_and_what_they_call_of_trio() -> None:
    class Connection(trio.abc.AsyncResource):
        async def aclose(self) -> None:
            await trio.Event().wait()

    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            async with Connection():
                pass

        return Scenario(victim)

    (finding,) = findings_of(make_scenario)
    calls = finding.problem.splitlines()[1].removeprefix("    victim: ").split(" <- ")
    assert [re.sub(r"^.*[. ]", "", call) for call in calls] == [
        "wait",
        "aclose",
        "__aexit__",
        "victim",
    ]


def test_a_livelock_is_reported() -> None:
    def spin() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            while True:
                await trio.lowlevel.checkpoint()

        return Scenario(victim)

    (finding,) = findings_of(spin, max_steps=200)
    assert finding.problem.startswith(
        "livelock: not over after 200 steps of its tasks\n    victim:"
    )


def test_a_task_that_outlives_the_call_is_caught() -> None:
    """It is caught even if the call starts it in the nursery that it was given."""

    def leak() -> Scenario:
        async def victim(nursery: trio.Nursery) -> None:
            nursery.start_soon(trio.sleep_forever, name="the leak")
            await pause()

        return Scenario(victim)

    (finding,) = findings_of(leak)
    assert finding.problem == "tasks outlive the call:\n    the leak: trio's sleep_forever"


def test_a_task_that_nobody_owns_is_caught() -> None:
    def leak() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            trio.lowlevel.spawn_system_task(trio.sleep_forever, name="the leak")
            await pause()

        return Scenario(victim)

    finding, *_ = findings_of(leak)
    assert finding.problem == (
        "tasks are left when everything is over:\n    the leak: trio's sleep_forever"
    )


@attrs.define(eq=False)
class Job:
    """Run `pause` in a nursery, and wait for it here: right if it joins, and if it says so."""

    joins: bool = True
    says_so: bool = True
    lives: int = 0

    async def call(self, nursery: trio.Nursery) -> str:
        scope, done = trio.CancelScope(), trio.Event()
        results: list[str] = []
        nursery.start_soon(self.work, scope, done, results)
        try:
            await done.wait()
        except trio.Cancelled:
            scope.cancel()
            if self.joins:
                with trio.CancelScope(shield=True):
                    await done.wait()
            raise
        if not results and self.says_so:
            raise ConnectionAbortedError("the nursery went away")
        return results[0] if results else ""

    async def work(self, scope: trio.CancelScope, done: trio.Event, results: list[str]) -> None:
        self.lives += 1
        try:
            with scope:
                await pause()
                results.append("done")
        finally:
            self.lives -= 1
            done.set()

    def scenario(self) -> Scenario:
        return Scenario(
            self.call,
            on_nursery_cancelled=(ConnectionAbortedError,),
            invariant=lambda: self.lives == 0,
        )


def test_a_call_in_a_nursery_is_cancelled_with_its_caller_and_with_its_nursery() -> None:
    report = cancel_everywhere(lambda: Job().scenario())
    only_caller = cancel_everywhere(lambda: Job().scenario(), targets=["caller"])
    assert report.cancellations == 2 * only_caller.cancellations


def test_a_child_may_hand_its_cancelled_to_a_caller_who_turns_it_into_an_error() -> None:
    """It is no `Cancelled` of the caller's, so it must not come out, and it is not swallowed."""

    def make_scenario() -> Scenario:
        async def victim(nursery: trio.Nursery) -> None:
            waiter = trio.lowlevel.current_task()

            async def work() -> None:
                with CaptureTo(waiter):
                    await pause()

            nursery.start_soon(work)
            try:
                await trio.lowlevel.wait_task_rescheduled(lambda _: Abort.FAILED)
            except trio.Cancelled:
                raise ConnectionAbortedError from None

        return Scenario(victim, on_nursery_cancelled=(ConnectionAbortedError,))

    assert cancel_everywhere(make_scenario, targets=["nursery"]).cancellations > 0


@attrs.define(eq=False)
class CaptureTo:
    """Wake *waiter* with what the block raises, or with nothing."""

    waiter: trio.lowlevel.Task

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        result: outcome.Outcome[None] = outcome.Error(error) if error else outcome.Value(None)
        trio.lowlevel.reschedule(self.waiter, result)


def test_a_call_that_does_not_join_what_it_started_is_caught() -> None:
    findings = findings_of(lambda: Job(joins=False).scenario())
    assert {finding.point.target for finding in findings} == {"caller"}
    assert all("tasks outlive the call" in finding.problem for finding in findings)


def test_what_comes_out_when_only_the_nursery_was_cancelled_must_be_listed() -> None:
    findings = findings_of(lambda: attrs.evolve(Job().scenario(), on_nursery_cancelled=()))
    assert {finding.point.target for finding in findings} == {"nursery"}
    assert "ConnectionAbortedError: the nursery went away" in findings[0].problem


def test_what_is_listed_for_a_cancelled_nursery_may_not_come_out_otherwise() -> None:
    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            await pause()
            raise ConnectionAbortedError

        return Scenario(victim, on_nursery_cancelled=(ConnectionAbortedError,))

    (finding,) = findings_of(make_scenario)
    assert finding.point.instant == "never"
    assert finding.problem.startswith("the victim failed: ConnectionAbortedError")


def test_a_call_that_hangs_when_its_nursery_is_cancelled_is_caught() -> None:
    def hang() -> Scenario:
        async def victim(nursery: trio.Nursery) -> None:
            done = trio.Event()

            async def work() -> None:
                await pause()
                done.set()

            nursery.start_soon(work)
            try:
                await done.wait()
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await pause()

        return Scenario(victim)

    cancel_everywhere(hang, targets=["caller"])
    findings = findings_of(hang)
    assert {finding.point.target for finding in findings} == {"nursery"}
    assert "deadlock" in findings[0].problem


def test_a_cancelled_out_of_a_caller_that_was_not_cancelled_is_caught() -> None:
    """The child's `Cancelled` belongs to the nursery's scope, not to who waits for the child."""

    def borrow() -> Scenario:
        async def victim(nursery: trio.Nursery) -> None:
            errors: list[BaseException] = []
            done = trio.Event()

            async def work() -> None:
                try:
                    await pause()
                except trio.Cancelled as error:
                    errors.append(error)
                    raise
                finally:
                    done.set()

            nursery.start_soon(work)
            with trio.CancelScope(shield=True):
                await done.wait()
            if errors:
                raise errors[0]

        return Scenario(victim)

    findings = findings_of(borrow, targets=["nursery"])
    assert findings[0].problem == "the victim failed: `Cancelled`, though it was not cancelled"


def test_a_crash_of_the_callers_nursery_is_caught() -> None:
    def crash() -> Scenario:
        async def victim(nursery: trio.Nursery) -> None:
            async def work() -> None:
                await pause()
                raise OSError("from a child")

            nursery.start_soon(work)
            await pause(3)

        return Scenario(victim)

    finding, *_ = findings_of(crash)
    assert finding.problem.startswith(
        "the nursery that the call was given crashed: OSError: from a child"
    )


def test_another_task_that_suffers_is_caught() -> None:
    def break_the_channel() -> Scenario:
        send, receive = trio.open_memory_channel[int](0)

        async def victim(_: trio.Nursery) -> None:
            async with send:
                await pause()
                await send.send(1)

        async def other() -> None:
            await receive.receive()

        return Scenario(victim, others=[other])

    findings = findings_of(break_the_channel)
    assert findings[0].problem.startswith("other 0 failed: trio.EndOfChannel")


def test_a_fresh_user_that_is_refused_is_caught() -> None:
    def leak_a_token() -> Scenario:
        tokens = trio.CapacityLimiter(1)

        async def victim(_: trio.Nursery) -> None:
            tokens.acquire_on_behalf_of_nowait(object())
            await pause()
            tokens.total_tokens = 2

        async def fresh_user() -> None:
            tokens.acquire_on_behalf_of_nowait(object())
            await pause()

        return Scenario(victim, fresh_user=fresh_user)

    findings = findings_of(leak_a_token, seeds=[0])
    assert points_of(findings) == BEFORE_AND_DURING_THE_PAUSE
    assert findings[0].problem.startswith("fresh user failed: trio.WouldBlock")


@pytest.mark.parametrize("raises", [True, False])
def test_a_broken_invariant_is_caught(*, raises: bool) -> None:
    def drift() -> Scenario:
        waiting = 0

        async def victim(_: trio.Nursery) -> None:
            nonlocal waiting
            waiting += 1
            await pause()
            waiting -= 1

        def nobody_waits() -> bool:
            assert not (raises and waiting), "somebody waits"
            return waiting == 0

        return Scenario(victim, invariant=nobody_waits)

    findings = findings_of(drift, seeds=[0])
    assert points_of(findings) == BEFORE_AND_DURING_THE_PAUSE
    expected = "AssertionError: somebody waits" if raises else "it returned False"
    assert f"the invariant is broken: {expected}" in findings[0].problem


# What looks like one of these bugs, and is none.


def test_channels_pass() -> None:
    """An item is either received or still there."""

    def hand_over() -> Scenario:
        send, receive = trio.open_memory_channel[int](math.inf)
        received: list[int] = []

        async def take(_: trio.Nursery | None = None) -> None:
            received.append(await receive.receive())

        async def give() -> None:
            for item in range(3):
                await send.send(item)
                await pause()

        def nothing_is_lost() -> None:
            assert len(received) + send.statistics().current_buffer_used == 3

        return Scenario(take, others=[give, take], fresh_user=take, invariant=nothing_is_lost)

    assert cancel_everywhere(hand_over).cancellations > 0


def test_to_return_is_fine_for_who_was_woken_with_its_value() -> None:
    """`pause` is over when it is woken, and the call has no further checkpoint."""
    outcomes: list[str] = []

    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            await pause()
            outcomes.append("cancelled" if trio.current_effective_deadline() < 0 else "free")

        return Scenario(victim)

    report = cancel_everywhere(make_scenario, seeds=[0])
    assert outcomes == ["free", "cancelled", "free"]
    assert report == CancelReport(runs=5, cancellations=3, suspensions=2, replayable=True)


def test_to_join_the_work_and_return_its_results_is_fine() -> None:
    """The abort failed, so no `Cancelled` was delivered."""

    def join() -> Scenario:
        async def victim(nursery: trio.Nursery) -> None:
            waiter = trio.lowlevel.current_task()

            async def work() -> None:
                await pause(2)
                trio.lowlevel.reschedule(waiter)

            nursery.start_soon(work)
            await trio.lowlevel.wait_task_rescheduled(lambda _: Abort.FAILED)

        return Scenario(victim)

    assert cancel_everywhere(join, targets=["caller"]).cancellations > 0


@pytest.mark.skipif(
    "reason" not in inspect.signature(trio.CancelScope.cancel).parameters,
    reason="before trio 0.31 a Cancelled does not say whose it is",
)
def test_a_timeout_of_the_calls_own_is_no_swallowed_cancelled() -> None:
    """It is shielded, so the `Cancelled` that ends it is its own even in a cancelled caller."""

    def clean_up() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            await pause()
            with trio.CancelScope(deadline=trio.current_time() + 1, shield=True):
                await trio.Event().wait()

        return Scenario(victim)

    assert cancel_everywhere(clean_up).cancellations > 0


def test_expected_errors_may_come_out_also_in_a_group_with_cancelled() -> None:
    def fail() -> Scenario:
        async def refuse() -> None:
            try:
                await pause()
            finally:
                raise ConnectionRefusedError

        async def victim(_: trio.Nursery) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(refuse)
                await trio.sleep_forever()

        return Scenario(victim, expected=(ConnectionRefusedError,))

    assert cancel_everywhere(fail).cancellations > 0
    problems = [f.problem for f in findings_of(lambda: attrs.evolve(fail(), expected=()))]
    assert "the victim failed: ConnectionRefusedError" in problems[0]


def test_waiting_for_all_tasks_to_block_is_no_deadlock() -> None:
    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            await trio.testing.wait_all_tasks_blocked()
            await trio.testing.wait_all_tasks_blocked(0.001)

        return Scenario(victim)

    assert cancel_everywhere(make_scenario).cancellations > 0


def test_time_passes_only_on_the_virtual_clock() -> None:
    def make_scenario() -> Scenario:
        async def victim(_: trio.Nursery) -> None:
            await pause()
            await trio.sleep(3600)

        return Scenario(victim)

    assert cancel_everywhere(make_scenario).cancellations == 3 * 5


def test_the_example_of_the_docstring_fails_as_it_says() -> None:
    text = inspect.getdoc(cancel_everywhere) or ""
    example = text[text.index("    import trio") : text.index("It fails: who is cancelled")]
    namespace: dict[str, Callable[[], None]] = {}
    exec(compile(textwrap.dedent(example), "example", "exec"), namespace)  # noqa: S102
    with pytest.raises(CancelEverywhereError) as caught:
        namespace["test_a_cancelled_user_of_the_lock_harms_nobody"]()
    assert all("deadlock" in finding.problem for finding in caught.value.findings)
    assert any("trio's checkpoint <- " in finding.where for finding in caught.value.findings)
