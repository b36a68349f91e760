"""A batcher whose submitters, opener or nursery are cancelled, at any instant."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing

from tests.operations import Stopwatch, foreign_nursery
from tests.test_batcher import Tens, given_or_not, settle, submit_all
from trio_resilience import BatchFlushed, OperationsCancelledError, open_batcher, subscribe

if TYPE_CHECKING:
    from trio.testing import MockClock

    from trio_resilience import Batcher, Event


@attrs.define(eq=False)
class Crowd:
    """Submitters that can be cancelled one by one."""

    batcher: Batcher[int, Any]
    nursery: trio.Nursery
    scopes: dict[int, trio.CancelScope] = attrs.field(factory=dict[int, trio.CancelScope])
    results: dict[int, Any] = attrs.field(factory=dict[int, Any])

    async def submit(self, item: int) -> None:
        with trio.CancelScope() as scope:
            self.scopes[item] = scope
            self.results[item] = await self.batcher.submit(item)

    async def enter(self, *items: int) -> None:
        for item in items:
            self.nursery.start_soon(self.submit, item)
            await settle()

    async def lose(self, *items: int) -> None:
        for item in items:
            self.scopes[item].cancel()
        await settle()


async def test_a_cancelled_submitter_withdraws_its_item(autojump_clock: MockClock) -> None:
    """Before its batch begins; the others of that batch get their results."""
    process = Tens()
    async with open_batcher(None, process) as batcher, trio.open_nursery() as nursery:
        crowd = Crowd(batcher, nursery)
        await crowd.enter(*range(5))
        await crowd.lose(0, 3)
        assert batcher.statistics().waiting == 3
    assert process.batches == [[1, 2, 4]]
    assert crowd.results == {1: 10, 2: 20, 4: 40}


async def test_the_age_is_that_of_the_oldest_item_that_is_left(autojump_clock: MockClock) -> None:
    """Nobody goes early because of one who has left."""
    process = Tens()
    async with open_batcher(None, process, max_age=4) as batcher, trio.open_nursery() as nursery:
        crowd = Crowd(batcher, nursery)
        for item in range(3):
            await crowd.enter(item)
            await trio.sleep(1)
        await crowd.lose(0, 1)
    assert (process.batches, process.at) == ([[2]], [6])


async def test_when_all_have_left_nothing_is_processed(autojump_clock: MockClock) -> None:
    """And whoever comes then is as old as it is."""
    process = Tens()
    async with open_batcher(None, process, max_age=4) as batcher, trio.open_nursery() as nursery:
        crowd = Crowd(batcher, nursery)
        await crowd.enter(0)
        await trio.sleep(3)
        await crowd.lose(0)
        await crowd.enter(1)
    assert (process.batches, process.at) == ([[1]], [7])


async def test_who_leaves_the_line_lets_the_next_move_up(autojump_clock: MockClock) -> None:
    """From among those with room, and from among those without."""
    process = Tens()
    async with (
        open_batcher(None, process, batch_size=2, queue_size=2, max_age=0) as batcher,
        trio.open_nursery() as nursery,
    ):
        crowd = Crowd(batcher, nursery)
        await crowd.enter(*range(8))
        assert (batcher.statistics().waiting, batcher.statistics().in_line) == (2, 5)
        await crowd.lose(1, 4, 6)
        assert (batcher.statistics().waiting, batcher.statistics().in_line) == (2, 2)
    assert process.batches == [[0], [2, 3], [5, 7]]
    assert crowd.results == {item: 10 * item for item in [0, 2, 3, 5, 7]}


async def test_of_a_batch_in_flight_only_the_result_is_dropped(autojump_clock: MockClock) -> None:
    """Whoever was first in it, too."""
    process = Tens()
    async with (
        open_batcher(None, process, batch_size=3) as batcher,
        trio.open_nursery() as nursery,
    ):
        crowd = Crowd(batcher, nursery)
        await crowd.enter(0, 1, 2)
        await crowd.lose(0, 2)
        assert batcher.statistics().in_flight == 3
    assert (process.batches, process.cancelled) == ([[0, 1, 2]], 0)
    assert crowd.results == {1: 10}


async def test_a_batch_that_nobody_waits_for_is_cancelled(autojump_clock: MockClock) -> None:
    """At once, and its slot is free; the others go on, and so does the batcher."""
    process, heard = Tens(), list["Event"]()
    with subscribe(heard.append):
        async with (
            open_batcher(None, process, batch_size=2, max_age=0) as batcher,
            trio.open_nursery() as nursery,
        ):
            crowd = Crowd(batcher, nursery)
            await crowd.enter(0, 1, 2)
            await trio.sleep(0.5)
            await crowd.lose(0)
            assert (process.batches, process.cancelled) == ([[0], [1, 2]], 1)
    assert process.at == [0, 0.5]
    assert crowd.results == {1: 10, 2: 20}
    flushed = [(each.size, each.cancelled) for each in heard if isinstance(each, BatchFlushed)]
    assert flushed == [(1, True), (2, False)]
    assert (batcher.statistics().flushes, batcher.statistics().items) == (2, 2)


async def test_a_batch_whose_submitters_leave_before_its_first_step_is_not_processed() -> None:
    """All left in the pass in which the batch was formed."""
    process = Tens(0)

    class Leave(trio.abc.Instrument):
        def task_scheduled(self, task: trio.lowlevel.Task) -> None:
            if task.name == "batcher flush":
                crowd.scopes[0].cancel()

    async with open_batcher(None, process, batch_size=1) as batcher, trio.open_nursery() as nursery:
        crowd = Crowd(batcher, nursery)
        trio.lowlevel.add_instrument(instrument := Leave())
        await crowd.enter(0)
        trio.lowlevel.remove_instrument(instrument)
        assert crowd.scopes[0].cancelled_caught
        await crowd.enter(1)
    assert process.batches == [[1]]
    assert batcher.statistics().flushes == 1


@attrs.define(eq=False)
class StepsOf(trio.abc.Instrument):
    """Count the steps of the tasks of one name."""

    name: str
    count: int = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += task.name == self.name


async def test_many_leave_one_by_one() -> None:
    """Nobody but they themselves is woken for it, whoever was first."""
    async with (
        trio.open_nursery() as nursery,
        open_batcher(None, Tens(0), batch_size=5000, max_age=math.inf) as batcher,
    ):
        crowd = Crowd(batcher, nursery)
        for item in range(2000):
            nursery.start_soon(crowd.submit, item)
        await settle()
        trio.lowlevel.add_instrument(steps := StepsOf("batcher"))
        for scope in [*crowd.scopes.values()][:-1]:
            scope.cancel()
        await settle()
        trio.lowlevel.remove_instrument(steps)
        assert (batcher.statistics().waiting, steps.count) == (1, 0)
    assert len(crowd.results) == 1


async def test_the_supervisor_is_woken_only_for_a_batch_that_can_begin(
    autojump_clock: MockClock,
) -> None:
    """Neither for a new age, which moves its alarm, nor for a full batch while no slot is free."""
    steps = StepsOf("batcher")
    async with open_batcher(None, Tens(1), batch_size=100, max_age=5) as batcher:
        await settle()
        trio.lowlevel.add_instrument(steps)
        async with trio.open_nursery() as nursery:
            counts = list[int]()
            for number in [1, 98, 1, 150]:
                for item in range(number):
                    nursery.start_soon(batcher.submit, item)
                await settle()
                counts.append(steps.count)
        trio.lowlevel.remove_instrument(steps)
    # Then once each: the end of a batch with others waiting, and the age of the last fifty.
    assert (counts, steps.count) == ([0, 0, 1, 1], 4)


async def test_a_cancelled_submitter_hands_in_nothing(autojump_clock: MockClock) -> None:
    """In a scope that is cancelled already."""
    process = Tens()
    async with open_batcher(None, process, batch_size=1) as batcher:
        with trio.CancelScope() as scope:
            scope.cancel()
            await batcher.submit(0)
        assert scope.cancelled_caught
        assert await batcher.submit(1) == 10
    assert process.batches == [[1]]


# --- the nursery, and the opener ----------------------------------------------------------------


@pytest.mark.parametrize("body_raises", [False, True])
async def test_a_cancelled_nursery_is_told_to_all(
    autojump_clock: MockClock, body_raises: bool
) -> None:
    """To those who wait or submit later, and to the opener, unless the body has its own error."""
    process, expected = Tens(), KeyError if body_raises else OperationsCancelledError
    outcomes = dict[int, Any]()
    async with foreign_nursery() as nursery, trio.open_nursery() as submitters:
        with pytest.raises(expected):
            async with open_batcher(nursery, process, batch_size=2, queue_size=2) as batcher:
                outcomes = await submit_all(submitters, batcher, range(6))
                nursery.cancel_scope.cancel()
                await settle()
                assert [type(each.error) for each in outcomes.values()] == [
                    OperationsCancelledError
                ] * 6
                with trio.testing.assert_checkpoints(), pytest.raises(OperationsCancelledError):
                    await batcher.submit(6)
                if body_raises:
                    raise KeyError
    assert (process.batches, process.cancelled) == ([[0, 1]], 1)


async def test_who_waits_is_told_before_those_in_flight_have_ended(
    autojump_clock: MockClock,
) -> None:
    """A `process` that takes its time to clean up holds up its own submitters only."""
    watch, told = Stopwatch(), dict[int, float]()

    async def process(items: list[int]) -> None:
        with trio.CancelScope(shield=True):
            await trio.sleep(5)
        await trio.lowlevel.checkpoint()

    async def submit(item: int) -> None:
        with pytest.raises(OperationsCancelledError):
            await batcher.submit(item)
        told[item] = watch.seconds

    async with foreign_nursery() as nursery:
        with pytest.raises(OperationsCancelledError):
            async with (
                open_batcher(nursery, process, batch_size=1) as batcher,
                trio.open_nursery() as submitters,
            ):
                for item in range(2):
                    submitters.start_soon(submit, item)
                    await settle()
                nursery.cancel_scope.cancel()
    assert told == {0: 5, 1: 0}


async def test_a_nursery_that_is_cancelled_already(autojump_clock: MockClock) -> None:
    """Nothing is processed; who has submitted meanwhile is told."""
    process = Tens()
    async with foreign_nursery() as nursery, trio.open_nursery() as submitters:
        nursery.cancel_scope.cancel()
        with pytest.raises(OperationsCancelledError):
            async with open_batcher(nursery, process, batch_size=1) as batcher:
                with pytest.raises(OperationsCancelledError):
                    await batcher.submit(0)
                assert (await submit_all(submitters, batcher, [1]))[1].error
    assert process.batches == []


@given_or_not
@pytest.mark.parametrize("when", ["in the block", "while it ends"])
async def test_a_cancelled_opener_cancels_and_joins(
    autojump_clock: MockClock, given: bool, when: str
) -> None:
    """It gets a bare `Cancelled`; its submitters elsewhere get OperationsCancelledError."""
    process, watch, outcomes = Tens(10), Stopwatch(), dict[int, Any]()
    async with foreign_nursery() as nursery, trio.open_nursery() as submitters:
        with trio.move_on_after(3) as scope, pytest.raises(trio.Cancelled) as caught:
            async with open_batcher(
                nursery if given else None, process, batch_size=2, queue_size=2
            ) as batcher:
                outcomes = await submit_all(submitters, batcher, range(5))
                if when == "in the block":
                    await trio.sleep_forever()
        assert type(caught.value) is trio.Cancelled
        assert scope.cancel_called
        assert not nursery.child_tasks
        await settle()
        assert watch.seconds == 3
    assert [type(each.error) for each in outcomes.values()] == [OperationsCancelledError] * 5
    assert process.cancelled == len(process.batches) == 1


@given_or_not
async def test_the_error_of_the_body_wins_over_a_late_cancellation(
    autojump_clock: MockClock, given: bool
) -> None:
    """It comes out as it is; trio repeats the cancellation at the next checkpoint."""
    error, watch = KeyError(), Stopwatch()
    async with foreign_nursery() as nursery, trio.open_nursery() as submitters:
        with trio.move_on_after(3) as scope:
            with pytest.raises(KeyError) as caught:
                async with open_batcher(
                    nursery if given else None, Tens(10), batch_size=1
                ) as batcher:
                    await submit_all(submitters, batcher, [1])
                    raise error
            assert caught.value is error
            await trio.lowlevel.checkpoint()
        assert scope.cancelled_caught
        assert watch.seconds == 3


async def test_a_shielded_body_whose_surroundings_are_cancelled(autojump_clock: MockClock) -> None:
    """The cancellation comes out at the end of the block, though the body never saw it."""
    with trio.CancelScope() as scope:
        async with open_batcher(None, Tens(10), batch_size=1) as batcher:
            with trio.CancelScope(shield=True):
                scope.cancel()
                with pytest.raises(OperationsCancelledError):
                    await batcher.submit(1)
                await settle()
        pytest.fail("the cancellation was lost")
    assert scope.cancelled_caught
