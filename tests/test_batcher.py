"""Single items from many tasks, processed together: by size, by age, in order, each once."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import attrs
import outcome
import pytest
import trio
import trio.testing

from tests.operations import Stopwatch, foreign_nursery
from trio_resilience import BatcherStatistics, open_batcher

if TYPE_CHECKING:
    from collections.abc import Iterable

    from trio.testing import MockClock

    from trio_resilience import Batcher

given_or_not = pytest.mark.parametrize("given", [True, False], ids=["given", "own"])
settle = trio.testing.wait_all_tasks_blocked


@attrs.define(eq=False)
class Tens:
    """Process numbers slowly: the result is ten times the number. Keeps what it was given."""

    seconds: float = 1.0
    batches: list[list[int]] = attrs.field(factory=list[list[int]])
    at: list[float] = attrs.field(factory=list[float])
    running: int = 0
    peak: int = 0
    cancelled: int = 0
    _watch: Stopwatch = attrs.field(factory=Stopwatch)

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(list(items))
        self.at.append(self._watch.seconds)
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await trio.sleep(self.seconds)
        except trio.Cancelled:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return [10 * item for item in items]


async def submit_all(
    nursery: trio.Nursery, batcher: Batcher[Any, Any], items: Iterable[Any]
) -> dict[Any, Any]:
    """Submit each item from a task of its own, in order; return where their outcomes appear."""
    outcomes = dict[Any, Any]()

    async def submit(item: object) -> None:
        outcomes[item] = await outcome.acapture(batcher.submit, item)

    for item in items:
        nursery.start_soon(submit, item)
        await settle()
    return outcomes


def values(outcomes: dict[Any, Any]) -> dict[Any, Any]:
    return {item: each.unwrap() for item, each in outcomes.items()}


@given_or_not
async def test_single_items_are_processed_together(autojump_clock: MockClock, given: bool) -> None:
    """A full batch goes at once; each submitter gets what came of its own item."""
    process = Tens()
    async with foreign_nursery() as foreign:
        async with (
            open_batcher(foreign if given else None, process, batch_size=3) as batcher,
            trio.open_nursery() as nursery,
        ):
            outcomes = await submit_all(nursery, batcher, range(6))
        assert not foreign.child_tasks
    assert values(outcomes) == {item: 10 * item for item in range(6)}
    assert process.batches == [[0, 1, 2], [3, 4, 5]]
    assert process.at == [0, 1]


async def test_an_incomplete_batch_goes_when_its_oldest_item_is_old_enough(
    autojump_clock: MockClock,
) -> None:
    """The age counts from the submission of the oldest item, not of the latest."""
    process = Tens()
    async with open_batcher(None, process, max_age=2) as batcher, trio.open_nursery() as nursery:
        for item in range(5):
            nursery.start_soon(batcher.submit, item)
            await trio.sleep(0.75)
    assert process.batches == [[0, 1, 2], [3, 4]]
    assert process.at == [2, 4.25]


async def test_an_age_of_zero_puts_together_what_comes_in_one_pass(
    autojump_clock: MockClock,
) -> None:
    """Nothing waits for time to pass, and nothing that is there goes alone."""
    process = Tens(0)
    async with open_batcher(None, process, max_age=timedelta(0)) as batcher:
        for _ in range(2):
            async with trio.open_nursery() as nursery:
                for item in range(20):
                    nursery.start_soon(batcher.submit, item)
    assert [sorted(batch) for batch in process.batches] == [list(range(20))] * 2
    assert process.at == [0, 0]


async def test_an_age_below_what_the_clock_can_represent_is_due_at_once() -> None:
    """A float of trio's clock plus 1e-30 s is that float again: no loop waits for it to pass."""
    clock = trio.testing.MockClock()
    clock.jump(1e9)
    process = Tens(0)
    async with open_batcher(None, process, max_age=1e-30) as batcher:
        with trio.fail_after(5):
            assert await batcher.submit(1) == 10


async def test_without_a_limit_of_age_only_size_and_the_end_of_the_block_count(
    autojump_clock: MockClock,
) -> None:
    """An hour changes nothing; leaving the block flushes what waits."""
    process = Tens()
    async with trio.open_nursery() as nursery:
        async with open_batcher(None, process, batch_size=2, max_age=math.inf) as batcher:
            outcomes = await submit_all(nursery, batcher, range(5))
            await trio.sleep(3600)
        assert process.batches == [[0, 1], [2, 3], [4]]
        await settle()
        assert values(outcomes) == {item: 10 * item for item in range(5)}


async def test_items_collect_while_all_slots_are_busy(autojump_clock: MockClock) -> None:
    """When a call ends, all that is due goes, in order; never more than fit into a batch."""
    process = Tens()
    async with (
        open_batcher(None, process, batch_size=3, max_age=0) as batcher,
        trio.open_nursery() as nursery,
    ):
        await submit_all(nursery, batcher, range(6))
        assert batcher.statistics().waiting == 5
    assert process.batches == [[0], [1, 2, 3], [4, 5]]
    assert (process.at, process.peak) == ([0, 1, 2], 1)


async def test_so_many_batches_as_allowed_are_in_flight(autojump_clock: MockClock) -> None:
    """Two calls at once, and the next when the first of them ends."""
    process = Tens()
    async with (
        open_batcher(None, process, batch_size=2, max_concurrency=2) as batcher,
        trio.open_nursery() as nursery,
    ):
        await submit_all(nursery, batcher, range(8))
        assert process.batches == [[0, 1], [2, 3]]
    assert process.batches == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert (process.at, process.peak) == ([0, 0, 1, 1], 2)


async def test_a_full_line_holds_submitters_back(autojump_clock: MockClock) -> None:
    """At most *queue_size* wait for a batch; the rest waits for room, and nobody overtakes."""
    process = Tens()
    async with (
        open_batcher(None, process, batch_size=2, queue_size=3, max_age=0) as batcher,
        trio.open_nursery() as nursery,
    ):
        outcomes = await submit_all(nursery, batcher, range(8))
        now = batcher.statistics()
        assert (now.in_flight, now.waiting, now.in_line) == (1, 3, 4)
        await trio.sleep(1)
        await settle()
        now = batcher.statistics()
        assert (now.in_flight, now.waiting, now.in_line) == (2, 3, 2)
    assert process.batches == [[0], [1, 2], [3, 4], [5, 6], [7]]
    assert values(outcomes) == {item: 10 * item for item in range(8)}


async def test_who_waits_for_room_grows_older_too(autojump_clock: MockClock) -> None:
    """The age counts from the submission: who has waited long goes at once when a slot is free."""
    process = Tens(5)
    async with (
        open_batcher(None, process, batch_size=2, queue_size=2, max_age=3) as batcher,
        trio.open_nursery() as nursery,
    ):
        await submit_all(nursery, batcher, range(5))
    assert (process.batches, process.at) == ([[0, 1], [2, 3], [4]], [0, 5, 10])


async def test_the_queue_is_ten_batches_by_default(autojump_clock: MockClock) -> None:
    """Enough that a burst is not held back."""
    async with (
        open_batcher(None, Tens(), batch_size=2) as batcher,
        trio.open_nursery() as nursery,
    ):
        await submit_all(nursery, batcher, range(25))
        assert (batcher.statistics().waiting, batcher.statistics().in_line) == (20, 3)


async def test_no_result_means_none_for_each(autojump_clock: MockClock) -> None:
    """For a `process` that only does something, such as to insert rows."""

    async def process(items: list[str]) -> None:
        await trio.sleep(len(items))

    async with open_batcher(None, process) as batcher, trio.open_nursery() as nursery:
        outcomes = await submit_all(nursery, batcher, ["a", "b"])
    assert values(outcomes) == {"a": None, "b": None}


async def test_results_may_be_any_sequence_and_outcomes(autojump_clock: MockClock) -> None:
    """A tuple, a range; and `outcome.Value`, which is unwrapped, though the caller keeps it."""
    kept = outcome.Value("kept")
    answers: list[Any] = [(1, 2), range(2), [kept, kept], [outcome.Value(None), 0]]

    async def process(items: list[int]) -> Any:
        assert items == [0, 1]
        return answers.pop(0)

    got = list[Any]()
    async with open_batcher(None, process, batch_size=2) as batcher:
        while answers:
            async with trio.open_nursery() as nursery:
                outcomes = await submit_all(nursery, batcher, [0, 1])
            got.append([outcomes[item].unwrap() for item in (0, 1)])
    assert got == [[1, 2], [0, 1], ["kept", "kept"], [None, 0]]
    assert kept.unwrap() == "kept"


async def test_what_process_does_to_its_list_matters_to_nobody(autojump_clock: MockClock) -> None:
    """The list is its own."""

    async def process(items: list[int]) -> list[int]:
        results = list(items)
        items.clear()
        return results

    async with open_batcher(None, process) as batcher:
        assert await batcher.submit(3) == 3


async def test_a_closed_batcher_refuses(autojump_clock: MockClock) -> None:
    """Before the block RuntimeError; while it ends, and afterwards, ClosedResourceError."""
    process = Tens()
    batcher = open_batcher(None, process, batch_size=2, max_age=math.inf)
    with pytest.raises(RuntimeError, match="async with"):
        await batcher.submit(0)
    async with trio.open_nursery() as nursery:
        async with batcher:
            early = await submit_all(nursery, batcher, [1, 2, 3, 4, 5])
            nursery.start_soon(submit_later, batcher, late := list[type[BaseException]]())
        with trio.testing.assert_checkpoints(), pytest.raises(trio.ClosedResourceError):
            await batcher.submit(9)
        with pytest.raises(RuntimeError, match="once"):
            await batcher.__aenter__()
    assert late == [trio.ClosedResourceError]
    assert values(early) == {item: 10 * item for item in range(1, 6)}
    assert process.batches == [[1, 2], [3, 4], [5]]


async def submit_later(batcher: Batcher[Any, Any], errors: list[type[BaseException]]) -> None:
    await trio.sleep(0.5)
    with pytest.raises(trio.ClosedResourceError) as caught:
        await batcher.submit(9)
    errors.append(caught.type)


@given_or_not
async def test_an_error_in_the_body_still_flushes(autojump_clock: MockClock, given: bool) -> None:
    """What was accepted is processed, in so many batches as it takes; the error is as it was."""
    process, error, outcomes = Tens(), KeyError("body"), dict[int, Any]()
    async with foreign_nursery() as foreign, trio.open_nursery() as nursery:
        with pytest.raises(KeyError) as caught:
            async with open_batcher(
                foreign if given else None, process, batch_size=2, max_age=9, queue_size=2
            ) as batcher:
                outcomes = await submit_all(nursery, batcher, range(7))
                raise error
        assert not foreign.child_tasks
        await settle()
        assert values(outcomes) == {item: 10 * item for item in range(7)}
    assert caught.value is error
    assert error.__context__ is None
    assert process.batches == [[0, 1], [2, 3], [4, 5], [6]]


async def test_submit_is_a_checkpoint_and_process_may_have_none() -> None:
    """Also if `process` returns at once."""

    async def process(items: list[int]) -> list[int]:
        return items

    async with open_batcher(None, process, batch_size=1) as batcher:
        with trio.testing.assert_checkpoints():
            assert await batcher.submit(1) == 1


async def test_statistics_and_repr_show_what_goes_on(autojump_clock: MockClock) -> None:
    """Before, during and after the block."""

    async def process(items: list[int]) -> list[int]:
        await trio.sleep(1)
        if items[0] == 2:
            raise OSError
        return items

    batcher = open_batcher(None, process, batch_size=2, queue_size=2, max_age=9, name="rows")
    assert repr(batcher) == "<batcher 'rows': not entered, 0 waiting, 0 in flight>"
    async with trio.open_nursery() as nursery:
        async with batcher:
            await submit_all(nursery, batcher, range(7))
            assert repr(batcher) == "<batcher 'rows': open, 5 waiting, 2 in flight>"
            assert batcher.statistics() == BatcherStatistics(
                waiting=2, in_flight=2, flushes=0, items=0, failures=0, in_line=3
            )
        assert repr(batcher) == "<batcher 'rows': closed, 0 waiting, 0 in flight>"
        assert batcher.statistics() == BatcherStatistics(0, 0, 4, 5, 1)
