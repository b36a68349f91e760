"""Items that share a key: so many of them at once, and none of them in the way of others."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import count, cycle
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests.operations import Source, Stopwatch, returns
from trio_resilience import map_with_limit

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator

    from trio.testing import MockClock


def host(url: str) -> str:
    """Return the key of an item such as "a7": its letters."""
    return url.rstrip("0123456789")


def urls(hosts: str, each: int) -> list[str]:
    """Return "a0", "b0", …, "a1", "b1", …: so many of each of these one-letter hosts, in turn."""
    return [f"{name}{number}" for number in range(each) for name in hosts]


@attrs.define(eq=False)
class Web:
    """Hosts that take their time, and note who comes when and how many are there at once."""

    seconds: dict[str, float] = attrs.field(factory=dict[str, float])
    """How long an item takes, by item or by host; one second if it is not here."""
    errors: dict[str, Exception] = attrs.field(factory=dict[str, Exception])
    source: Source = attrs.field(factory=Source)
    watch: Stopwatch = attrs.field(factory=Stopwatch)
    running: Counter[str] = attrs.field(factory=Counter[str])
    peaks: defaultdict[str, int] = attrs.field(factory=lambda: defaultdict[str, int](int))
    peak: int = 0
    began: dict[str, float] = attrs.field(factory=dict[str, float])
    ended: dict[str, float] = attrs.field(factory=dict[str, float])
    finished: list[str] = attrs.field(factory=list[str])
    cancelled: list[str] = attrs.field(factory=list[str])

    async def fetch(self, url: str) -> str:
        name = host(url)
        self.began[url] = self.watch.seconds
        self.running[name] += 1
        self.peaks[name] = max(self.peaks[name], self.running[name])
        self.peak = max(self.peak, self.running.total())
        try:
            await trio.sleep(self.seconds.get(url, self.seconds.get(name, 1)))
        except trio.Cancelled:
            self.cancelled.append(url)
            raise
        finally:
            self.running[name] -= 1
            self.ended[url] = self.watch.seconds
        if url in self.errors:
            raise self.errors[url]
        self.finished.append(url)
        return url.upper()

    @property
    def started(self) -> list[str]:
        return list(self.began)

    @property
    def held(self) -> int:
        """How many items were pulled and wait for their turn."""
        return self.source.pulled - len(self.began)

    def given(self, items: Iterable[str], shape: str) -> Any:
        """Return *items* as a source of that *shape*, which is counted unless it is a list."""
        if shape == "list":
            return list(items)
        return self.source.of(items) if shape == "generator" else self.source.async_of(items)


shapes = pytest.mark.parametrize("shape", ["list", "generator", "async generator"])
lazy_shapes = pytest.mark.parametrize("shape", ["generator", "async generator"])


async def fetch_all(web: Web, items: Any, **options: Any) -> list[Any]:
    """Fetch everything, bounded by host."""
    results: list[Any] = await map_with_limit(None, web.fetch, items, key=host, **options)
    return results


# --- the bound ------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("most", [1, 2, 3])
async def test_never_more_of_a_key_than_allowed(
    autojump_clock: MockClock, shape: str, most: int
) -> None:
    """Six one-second calls to one host take as long as its bound allows, whatever the workers."""
    web = Web()
    results = await fetch_all(web, web.given(urls("a", 6), shape), max_per_key=most)
    assert results == ["A0", "A1", "A2", "A3", "A4", "A5"]
    assert (web.peaks["a"], web.watch.seconds) == (most, 6 / most)


@shapes
async def test_keys_are_bounded_each_for_itself(autojump_clock: MockClock, shape: str) -> None:
    """Four hosts with two calls at a time each make eight at a time."""
    web = Web()
    await fetch_all(web, web.given(urls("abcd", 6), shape), max_per_key=2, max_concurrency=100)
    assert (web.peak, web.watch.seconds) == (8, 3)
    assert set(web.peaks.values()) == {2}


@shapes
async def test_the_bound_of_the_call_holds_too(autojump_clock: MockClock, shape: str) -> None:
    """However many keys may run."""
    web = Web()
    await fetch_all(web, web.given(urls("abcdefgh", 3), shape), max_per_key=2, max_concurrency=4)
    assert (web.peak, web.watch.seconds) == (4, 6)


@shapes
async def test_one_of_a_key_at_a_time_is_one_after_the_other(
    autojump_clock: MockClock, shape: str
) -> None:
    """If all share it, the call is sequential, and in order."""
    web = Web()
    await fetch_all(web, web.given(urls("a", 9), shape), max_per_key=1, max_concurrency=50)
    assert web.started == web.finished == urls("a", 9)
    assert (web.peak, web.watch.seconds) == (1, 9)


@shapes
async def test_keys_that_are_all_different_change_nothing(
    autojump_clock: MockClock, shape: str
) -> None:
    """Then only `max_concurrency` counts."""
    web = Web()
    items = [f"{letter}0" for letter in "abcdefghi"]
    await fetch_all(web, web.given(items, shape), max_per_key=1, max_concurrency=3)
    assert web.started == items
    assert (web.peak, web.watch.seconds) == (3, 3)


async def test_keys_that_are_equal_are_one(autojump_clock: MockClock) -> None:
    """As in a dictionary; None is a key like any other."""
    watch, keys = Stopwatch(), [1, 1.0, True, None, None]
    await map_with_limit(None, trio.sleep, [1] * 5, key=lambda _: keys.pop(), max_per_key=1)
    assert watch.seconds == 3


@shapes
async def test_a_slow_host_is_not_noticed_by_others(autojump_clock: MockClock, shape: str) -> None:
    """Half of a thousand items are on one slow host: all others finish as if it were not there.

    Although there are more of its items than workers, and all of them come first, or in between.
    """
    others = urls("bcdefghijklmnopqrstu", 25)
    slow = urls("a", 500)
    mixed = [url for pair in zip(slow, others, strict=True) for url in pair]
    alone = Web()
    await fetch_all(alone, alone.given(others, shape), max_per_key=2, max_concurrency=100)
    for items in (mixed, slow + others, others + slow):
        web = Web({"a": 10})
        await fetch_all(web, web.given(items, shape), max_per_key=2, max_concurrency=100)
        assert {url: web.ended[url] for url in others} == alone.ended
        assert max(alone.ended.values()) == 13
        assert (web.peaks["a"], web.watch.seconds) == (2, 2500)


# --- the order ------------------------------------------------------------------------------------


async def test_the_earliest_item_that_may_run_goes_first(autojump_clock: MockClock) -> None:
    """When a slot and a key are free, an item that had to wait goes before those after it."""
    web = Web({"a0": 2, "a1": 2})
    items = ["a0", "a1", "a2", "b0", "b1", "c0", "c1", "a3", "d0", "d1"]
    await fetch_all(web, items, max_per_key=1, max_concurrency=2)
    assert [web.began[url] for url in items] == [0, 2, 4, 0, 1, 2, 3, 5, 4, 5]


@shapes
async def test_items_of_a_key_start_in_their_order(autojump_clock: MockClock, shape: str) -> None:
    """Whatever the others do."""
    web = Web({"b3": 7, "c1": 5, "a0": 3})
    items = urls("abcd", 12)
    await fetch_all(web, web.given(items, shape), max_per_key=2, max_concurrency=5)
    for name in "abcd":
        began = [web.began[url] for url in urls(name, 12)]
        assert began == sorted(began)


async def test_items_of_a_key_start_in_their_order_however_fast_they_come(
    autojump_clock: MockClock,
) -> None:
    """From an async source, too, which serves several workers in one instant."""

    async def source() -> AsyncIterator[str]:
        for url in urls("a", 8):
            yield url

    for _ in range(20):  # trio shuffles what is runnable
        web = Web()
        await fetch_all(web, source(), max_per_key=1)
        assert web.started == urls("a", 8)


async def test_results_are_in_the_order_of_the_items(autojump_clock: MockClock) -> None:
    """However much later an item was run."""
    web = Web({"a": 9})
    items = [*urls("a", 5), *urls("b", 5)]
    results = await fetch_all(web, items, max_per_key=1)
    assert results == [url.upper() for url in items]
    assert web.started != items


# --- the window -----------------------------------------------------------------------------------


async def test_a_window_of_one_is_a_queue(autojump_clock: MockClock) -> None:
    """An item that may not run yet holds up all that follow."""
    web = Web()
    await fetch_all(web, ["a0", "a1", "b0", "c0"], max_per_key=1, lookahead=1)
    assert web.began == {"a0": 0, "a1": 1, "b0": 1, "c0": 1}


@pytest.mark.parametrize("lookahead, began", [(1, 3), (2, 2), (3, 1), (4, 0), (5, 0)])
async def test_an_item_is_found_as_soon_as_it_is_in_the_window(
    autojump_clock: MockClock, lookahead: int, began: int
) -> None:
    """Of a host's four items one runs and three wait: a fourth place shows the next host's."""
    web = Web()
    items = [*urls("a", 4), "b0"]
    await fetch_all(web, items, max_per_key=1, lookahead=lookahead)
    assert web.began["b0"] == began


@lazy_shapes
@pytest.mark.parametrize("lookahead", [1, 2, 10, 300])
async def test_no_more_are_pulled_than_the_window_holds(
    autojump_clock: MockClock, shape: str, lookahead: int
) -> None:
    """Of an endless source: what runs, what has finished, the window, and one in the hand."""
    web, most = Web({"a": 10}), 0

    def endless() -> Iterator[str]:
        nonlocal most
        for number in count():
            most = max(most, web.held)
            yield f"a{number}" if number % 3 else f"b{number}"

    with trio.move_on_after(45.5):
        await fetch_all(
            web, web.given(endless(), shape), max_per_key=1, max_concurrency=8, lookahead=lookahead
        )
    assert lookahead - 1 <= most <= lookahead + 1
    assert web.held <= lookahead + 1
    assert web.source.closed


@lazy_shapes
async def test_the_window_is_of_a_thousand_items(autojump_clock: MockClock, shape: str) -> None:
    """Unless it is chosen: an endless host does not fill the memory."""
    web = Web({"a": 10})
    items = (f"a{number}" for number in count())
    with trio.move_on_after(45):
        await fetch_all(web, web.given(items, shape), max_per_key=2, max_concurrency=8)
    assert 999 <= web.held <= 1001


@lazy_shapes
async def test_nothing_is_pulled_while_all_workers_are_busy(
    autojump_clock: MockClock, shape: str
) -> None:
    """The window is filled only to find an item for a worker that has none."""
    web = Web({"a": 10, "b": 10})
    items = (f"{name}{number}" for number, name in enumerate(cycle("ab")))
    with trio.move_on_after(25):
        await fetch_all(web, web.given(items, shape), max_per_key=2, max_concurrency=4)
    assert web.source.pulled <= 4 * 3 + 1


# --- sources that are odd, or take their time -----------------------------------------------------


@pytest.mark.parametrize("most", [1, 2])
async def test_a_list_that_grows_meanwhile_is_run_to_its_end(
    autojump_clock: MockClock, most: int
) -> None:
    """Operations may add others, as in a loop over a list, while all workers wait for a key."""
    web, items = Web({"b": 5}), ["a0", "b0"]

    async def fetch(url: str) -> str:
        if url in {"a0", "b0", "a1"}:
            items.extend([f"a{len(items)}", f"c{len(items)}"])
        return await web.fetch(url)

    results = await map_with_limit(None, fetch, items, key=host, max_per_key=most)
    assert results == [url.upper() for url in items]
    assert len(results) >= 6


async def test_items_that_never_wait_do_not_freeze_the_program() -> None:
    """Ten thousand of them, of one key and of many: others get their turn all the while."""
    turns = 0

    async def bystander() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bystander)
        for keys in (1, 100):
            results = await map_with_limit(
                nursery,
                returns,
                range(5000),
                key=lambda n: n % keys,
                max_per_key=1,
            )
            assert results == list(range(5000))
        nursery.cancel_scope.cancel()
    assert turns >= 5000


async def test_a_held_item_does_not_wait_for_the_source(autojump_clock: MockClock) -> None:
    """When its key is free, it starts, though the source has not come up with the next one."""
    web = Web()

    async def source() -> AsyncIterator[str]:
        for url in ["a0", "a1", "a2"]:
            yield url
        await trio.sleep(100)
        yield "b0"

    await fetch_all(web, source(), max_per_key=1)
    assert web.began == {"a0": 0, "a1": 1, "a2": 2, "b0": 100}


async def test_an_item_that_arrives_does_not_wait_for_held_ones(autojump_clock: MockClock) -> None:
    """It starts when it comes, though earlier ones still wait for their key."""
    web = Web({"a": 30})

    async def source() -> AsyncIterator[str]:
        for url in ["a0", "a1", "a2", "b0", "c0", "b1"]:
            yield url
            await trio.sleep(2)

    await fetch_all(web, source(), max_per_key=1, max_concurrency=3)
    assert web.began == {"a0": 0, "b0": 6, "c0": 8, "b1": 10, "a1": 30, "a2": 60}


async def test_a_slow_source_keeps_no_key_from_its_items(autojump_clock: MockClock) -> None:
    """What it yields in one second's distance runs as if there were no keys, if they allow it."""
    web = Web({"a": 3, "b": 3})
    items = web.source.async_of(urls("ab", 4), pause=1)
    await fetch_all(web, items, max_per_key=2)
    assert list(web.began.values()) == [1, 2, 3, 4, 5, 6, 7, 8]
