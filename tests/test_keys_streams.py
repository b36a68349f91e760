"""Items that share a key, in a stream: in order or as they finish, in bounded memory."""

from __future__ import annotations

import gc
import sys
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import Stopwatch, foreign_nursery, leaves
from tests.test_keys import Web, host, shapes, urls
from trio_resilience import (
    OperationsCancelledError,
    OperationsFailedError,
    Semaphore,
    stream_map_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from trio.testing import MockClock

ordered_or_not = pytest.mark.parametrize("ordered", [False, True], ids=["as completed", "in order"])
buffers = pytest.mark.parametrize("buffer", [0, 1, 5])
bounds = pytest.mark.parametrize("bound", [Semaphore, trio.CapacityLimiter])


def stream(web: Web, items: Any, nursery: trio.Nursery | None = None, **options: Any) -> Any:
    """Return the stream of *items*, bounded by host."""
    make: Any = stream_map_with_limit
    return make(nursery, web.fetch, items, **{"key": host, **options})


async def take_all(web: Web, items: Any, **options: Any) -> list[str]:
    """Return the items in the order in which their results come."""
    async with stream(web, items, **options) as results:
        return [url async for url, result in results if result == url.upper()]


# --- all of them come -----------------------------------------------------------------------------


@shapes
@ordered_or_not
@buffers
async def test_everything_comes_once(
    autojump_clock: MockClock, shape: str, ordered: bool, buffer: int
) -> None:
    """Within both bounds; in the order of the items if asked for."""
    web, items = Web({"a": 3}), [*urls("a", 6), *urls("bc", 6)]
    source = web.given(items, shape)
    got = await take_all(
        web, source, max_per_key=2, max_concurrency=5, ordered=ordered, buffer=buffer
    )
    assert (got == items) if ordered else (sorted(got) == sorted(items))
    assert max(web.peaks.values()) == 2
    assert web.peak <= 5


@ordered_or_not
async def test_a_slow_host_is_not_noticed_by_others(
    autojump_clock: MockClock, ordered: bool
) -> None:
    """Nor by the results of the others, if they may come as they finish."""
    others, slow = urls("bcdef", 20), urls("a", 100)
    mixed = [url for pair in zip(slow, others, strict=True) for url in pair]
    options: Any = {"max_per_key": 2, "max_concurrency": 20, "ordered": ordered}
    alone, came = Web(), dict[str, float]()
    await take_all(alone, others, **options)
    web = Web({"a": 10})
    async with stream(web, mixed, buffer=200, **options) as results:
        async for url, _ in results:
            came[url] = web.watch.seconds
    assert {url: web.ended[url] for url in others} == alone.ended
    assert list(came) == mixed or not ordered
    assert {url: came[url] for url in others} == alone.ended or ordered


@buffers
@pytest.mark.parametrize("max_concurrency", [1, 2, 3, 7])
@pytest.mark.parametrize("lookahead", [1, 2, 1000])
async def test_a_head_that_waits_for_its_key_is_not_locked_out(
    autojump_clock: MockClock, buffer: int, max_concurrency: int, lookahead: int
) -> None:
    """In order: results that wait behind it fill the buffer, and yet it gets a place to run."""
    web = Web({"a": 10})
    items = ["a0", "a1", "a2", *urls("bc", 9), "a3", *urls("d", 9)]
    with trio.fail_after(1000):
        got = await take_all(
            web,
            items,
            max_per_key=1,
            max_concurrency=max_concurrency,
            buffer=buffer,
            lookahead=lookahead,
            ordered=True,
        )
    assert got == items


@bounds
@buffers
async def test_a_head_is_not_locked_out_by_a_bound_that_shrinks(
    autojump_clock: MockClock, bound: Any, buffer: int
) -> None:
    """In order: more results wait than may, now that the bound is lower, and yet the head runs."""
    web, shared = Web({"a": 10}), bound(4)

    async def shrink() -> None:
        await trio.sleep(5)
        if isinstance(shared, Semaphore):
            shared.permits = 1
        else:
            shared.total_tokens = 1

    items = [*urls("a", 3), *urls("bcdefgh", 1), *urls("ij", 3)]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shrink)
        with trio.fail_after(1000):
            got = await take_all(
                web, items, max_per_key=1, max_concurrency=shared, buffer=buffer, ordered=True
            )
    assert got == items


@ordered_or_not
async def test_batches_with_keys(autojump_clock: MockClock, ordered: bool) -> None:
    """A batch has finished before the delay, in a stream too."""
    web, items = Web(), ["a0", "a1", "b0", "b1", "b2", "a2", "a3"]
    got = await take_all(
        web, items, max_per_key=1, batch_size=3, delay_between_batches=10, ordered=ordered
    )
    assert (got == items) if ordered else (sorted(got) == sorted(items))
    assert [web.began[url] for url in items] == [0, 1, 0, 12, 13, 12, 24]


async def test_a_stream_with_keys_may_feed_another(autojump_clock: MockClock) -> None:
    """The results of one are the items of the next, with a key of their own."""
    web, second = Web(), list[str]()

    async def parse(pair: tuple[str, str]) -> str:
        await trio.sleep(1)
        second.append(pair[1])
        return pair[1]

    pages = stream(web, urls("ab", 4), max_per_key=1)
    async with pages as results:
        parsed = stream_map_with_limit(
            None, parse, results, key=lambda pair: host(pair[0]), max_per_key=1
        )
        async with parsed as texts:
            got = [text async for _, text in texts]
    assert sorted(got) == sorted(url.upper() for url in urls("ab", 4))
    assert web.watch.seconds == 5


# --- the consumer's pace --------------------------------------------------------------------------


@ordered_or_not
@buffers
@pytest.mark.parametrize("lookahead", [1, 4])
async def test_a_slow_consumer_slows_everything_down(
    autojump_clock: MockClock, ordered: bool, buffer: int, lookahead: int
) -> None:
    """What has started and was not taken is bounded, and so is what was pulled and not started."""
    web, taken = Web({"a": 5}), 0
    source = web.source.of(f"{'aab'[n % 3]}{n}" for n in count())
    options: Any = {"ordered": ordered, "buffer": buffer, "lookahead": lookahead}
    async with stream(web, source, max_per_key=1, max_concurrency=3, **options) as results:
        async for _ in results:
            taken += 1
            await trio.sleep(30)
            assert len(web.began) <= taken + 3 + buffer
            assert web.held <= lookahead + 1
            if taken == 12:
                break
    assert web.source.closed


async def test_a_key_is_free_when_its_operation_has_ended(autojump_clock: MockClock) -> None:
    """Not only when the result is taken: the next one starts while the consumer is busy."""
    web = Web()
    async with stream(web, urls("a", 4), max_per_key=1, buffer=9) as results:
        async for _ in results:
            await trio.sleep(50)
    assert list(web.began.values()) == [0, 1, 2, 3]


@bounds
async def test_no_permit_is_kept_for_a_slow_consumer_or_a_busy_key(
    autojump_clock: MockClock, bound: Any
) -> None:
    """Whoever is next to wait, the bound that all share is there for others."""
    web, shared, entered = Web({"a": 10}), bound(2), 0
    items = urls("ab", 5)
    async with stream(web, items, max_per_key=1, max_concurrency=shared) as results:
        async for _ in results:
            await trio.sleep(40)
            async with shared, trio.open_nursery():
                entered += 1
                assert _borrowed(shared) == 1
    assert entered == 10
    assert _borrowed(shared) == 0


@bounds
async def test_a_busy_consumer_does_not_turn_the_order_of_a_key_round(
    autojump_clock: MockClock, bound: Any
) -> None:
    """Two items of a key come free in one instant, and there is room for the result of one."""
    for _ in range(20):  # trio shuffles what is runnable
        web, items = Web({"a0": 2, "a1": 2, "a2": 0, "a3": 0}), urls("a", 4)
        async with stream(web, items, max_per_key=2, max_concurrency=bound(2)) as results:
            async for _result in results:
                await trio.sleep(1)
        assert web.began["a2"] <= web.began["a3"]


def _borrowed(bound: Any) -> int:
    borrowed: int
    if isinstance(bound, Semaphore):
        borrowed = bound.statistics().borrowed
    else:
        borrowed = bound.borrowed_tokens
    return borrowed


# --- the end --------------------------------------------------------------------------------------


@ordered_or_not
@pytest.mark.parametrize("asynchronous", [False, True])
async def test_leaving_early_runs_no_held_item(
    autojump_clock: MockClock, ordered: bool, asynchronous: bool
) -> None:
    """Of an endless source: it is closed, and what runs is cancelled."""
    web = Web()
    items = (f"a{n}" for n in count())
    source = web.source.async_of(items) if asynchronous else web.source.of(items)
    async with stream(web, source, max_per_key=2, ordered=ordered, lookahead=50) as results:
        async for url, _ in results:
            if url == "a3":
                break
    assert web.source.closed
    assert web.running.total() == 0
    assert len(web.started) <= 6
    assert web.source.pulled <= 6 + 50 + 1


@ordered_or_not
async def test_a_failure_comes_after_the_results(autojump_clock: MockClock, ordered: bool) -> None:
    """Those that had finished are delivered, then the group is raised; held items never run."""
    web, got = Web({"a": 9}, {"b2": OSError("mine")}), list[str]()
    items = ["b0", "b1", "b2", *urls("a", 5)]
    with pytest.raises(OperationsFailedError) as caught:
        async with stream(web, items, max_per_key=1, max_concurrency=3, ordered=ordered) as results:
            async for url, _ in results:
                got.append(url)
    assert got == ["b0", "b1"]
    assert [error.__notes__ for error in caught.value.exceptions] == [["operation 2: 'b2'"]]
    assert set(web.started) == {"b0", "b1", "b2", "a0"}


@ordered_or_not
async def test_failures_leave_no_gap(autojump_clock: MockClock, ordered: bool) -> None:
    """With on_error="continue" the results after a failed one come in their turn."""
    web = Web(errors={"a0": OSError(), "a2": OSError(), "b1": OSError()})
    got = list[str]()
    with pytest.raises(OperationsFailedError) as caught:
        async with stream(
            web, urls("ab", 4), max_per_key=1, ordered=ordered, on_error="continue"
        ) as results:
            async for url, _ in results:
                got.append(url)
    assert len(caught.value.exceptions) == 3
    assert sorted(got) == ["a1", "a3", "b0", "b2", "b3"]
    assert got == ["b0", "a1", "b2", "a3", "b3"] or not ordered


@ordered_or_not
async def test_an_error_of_the_key_comes_after_the_results(
    autojump_clock: MockClock, ordered: bool
) -> None:
    """From the iterator, as it is."""
    web, got, error = Web(), list[str](), LookupError("mine")

    def key(url: str) -> str:
        if url == "b0":
            raise error
        return host(url)

    def source() -> Iterator[str]:
        yield from ["a0", "a1", "b0"]

    with pytest.raises(LookupError) as caught:
        async with stream(
            web, source(), key=key, max_per_key=1, lookahead=1, ordered=ordered
        ) as results:
            async for url, _ in results:
                got.append(url)
    assert caught.value is error
    assert (got, web.watch.seconds) == (["a0"], 1)
    assert ["a0", *web.cancelled] == web.started


@ordered_or_not
async def test_a_cancelled_nursery_says_so(autojump_clock: MockClock, ordered: bool) -> None:
    """Though most of the items were never run."""
    web, got = Web(), list[str]()
    async with foreign_nursery() as nursery:
        nursery.cancel_scope.deadline = trio.current_time() + 2.5
        with pytest.raises(OperationsCancelledError):
            async with stream(
                web, urls("a", 9), nursery, max_per_key=1, ordered=ordered
            ) as results:
                async for url, _ in results:
                    got.append(url)
    assert (got, web.started) == (["a0", "a1"], ["a0", "a1", "a2"])


async def test_an_error_of_the_body_wins(autojump_clock: MockClock) -> None:
    """While items are held, too."""
    web, watch = Web({"a": 9}), Stopwatch()
    with pytest.raises(LookupError, match="mine") as caught:
        async with stream(web, [*urls("a", 5), "b0"], max_per_key=1) as results:
            async for _ in results:
                raise LookupError("mine")
    assert leaves(caught.value) == [caught.value]
    assert (watch.seconds, web.cancelled) == (1, ["a0"])


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "keys, ordered",
    [(1000, False), (10**9, True)],
    ids=["a thousand keys, as completed", "a key each, in order"],
)
async def test_memory_is_constant(keys: int, ordered: bool) -> None:
    """After sixty thousand items as many blocks of memory are in use as after twenty."""
    blocks = dict[int, int]()

    async def source() -> AsyncIterator[int]:
        for number in range(500_000, 560_000):
            yield number

    async def operation(number: int) -> None:
        if number % 10:
            await trio.lowlevel.checkpoint()

    taken = 0
    results = stream_map_with_limit(
        None,
        operation,
        source() if ordered else iter(range(500_000, 560_000)),
        key=lambda number: number * 7919 % keys,
        max_per_key=1,
        max_concurrency=20,
        ordered=ordered,
    )
    async with results as pairs:
        async for _pair in pairs:
            del _pair
            taken += 1
            if taken in (20_000, 59_000):
                gc.collect()
                blocks[taken] = sys.getallocatedblocks()
    assert taken == 60_000
    assert abs(blocks[59_000] - blocks[20_000]) < 500
