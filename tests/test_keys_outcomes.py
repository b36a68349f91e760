"""Items that share a key: whatever becomes of them, in batches, and under a bound of many calls."""

from __future__ import annotations

from functools import partial
from itertools import count, pairwise
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import Source, Stopwatch, leaves
from tests.test_keys import Web, fetch_all, host, shapes, urls
from trio_resilience import (
    Constant,
    OperationsFailedError,
    OperationTimeoutError,
    Retry,
    Semaphore,
    map_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

# --- whatever becomes of an item ------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["continue", "collect"])
async def test_a_failure_frees_its_key(autojump_clock: MockClock, on_error: Any) -> None:
    """The next item of the key starts when one has failed."""
    web = Web(errors={"a0": OSError("mine"), "a2": OSError("mine")})
    run = partial(fetch_all, web, urls("a", 4), max_per_key=1, on_error=on_error)
    if on_error == "collect":
        assert [hasattr(each, "error") for each in await run()] == [True, False] * 2
    else:
        with pytest.raises(OperationsFailedError) as caught:
            await run()
        notes = [each.__notes__ for each in caught.value.exceptions]
        assert notes == [["operation 0: 'a0'"], ["operation 2: 'a2'"]]
    assert list(web.began.values()) == [0, 1, 2, 3]


async def test_a_failure_cancels_what_runs_and_what_waits(autojump_clock: MockClock) -> None:
    """Held items never run; every outcome stands at its item's place."""
    web = Web({"a": 9}, {"c0": OSError("mine")})
    items = [*urls("a", 5), "b0", "c0", *urls("d", 3)]
    with pytest.raises(OperationsFailedError) as caught:
        await fetch_all(web, items, max_per_key=1, max_concurrency=3)
    # The worker of b0 may have gone on, in the instant in which c0 failed.
    assert set(web.started) - {"d0"} == {"a0", "b0", "c0"}
    assert caught.value.message == "1 of 10 operations failed"
    assert caught.value.exceptions[0].__notes__ == ["operation 6: 'c0'"]
    outcomes: list[Any] = list(caught.value.outcomes)
    assert outcomes[6].error is caught.value.exceptions[0]
    assert [index for index, each in enumerate(outcomes) if each is not None] in ([6], [5, 6])


async def test_a_timeout_counts_from_the_start_and_frees_the_key(
    autojump_clock: MockClock,
) -> None:
    """The wait for the key is no part of it."""
    web = Web({"a1": 100})
    results = await fetch_all(web, urls("a", 4), max_per_key=1, timeout=1.5, on_error="collect")
    assert list(web.began.values()) == [0, 1, 2.5, 3.5]
    assert [type(getattr(each, "error", None)) for each in results] == [
        type(None),
        OperationTimeoutError,
        *[type(None)] * 2,
    ]


async def test_a_retry_keeps_its_key_while_it_backs_off(autojump_clock: MockClock) -> None:
    """As it keeps its slot: a host that has trouble gets no more calls meanwhile."""
    web = Web(errors={"a0": OSError("mine")})
    retry = Retry(max_attempts=3, backoff=Constant(10))
    results = await fetch_all(
        web, ["a0", "a1", "b0"], max_per_key=1, policy=retry, on_error="collect"
    )
    assert (web.began["a1"], web.began["b0"], len(results)) == (23, 0, 3)


async def test_on_done_gets_the_items_own_numbers(autojump_clock: MockClock) -> None:
    """In the order in which they finish."""
    done, web = list[tuple[int, str]](), Web()

    def note(index: int, result: Any) -> None:
        done.append((index, result.unwrap()))

    await fetch_all(web, ["a0", "a1", "a2", "b0"], max_per_key=1, on_done=note)
    assert sorted(done[:2]) == [(0, "A0"), (3, "B0")]
    assert done[2:] == [(1, "A1"), (2, "A2")]


async def test_a_cancelled_call_runs_no_held_item(autojump_clock: MockClock) -> None:
    """It ends what runs, and the source, and begins nothing more."""
    web = Web()
    with trio.move_on_after(2.5) as scope:
        await fetch_all(web, web.given((f"a{n}" for n in count()), "generator"), max_per_key=1)
    assert scope.cancelled_caught
    assert (web.started, web.cancelled) == (["a0", "a1", "a2"], ["a2"])
    assert (web.source.closed, web.watch.seconds) == (True, 2.5)


# --- batches --------------------------------------------------------------------------------------


@shapes
async def test_a_batch_with_keys_finishes_before_the_delay(
    autojump_clock: MockClock, shape: str
) -> None:
    """The window ends with the batch: nothing of the next one starts before its time."""
    web = Web({"a": 2})
    items = ["a0", "a1", "b0", "b1", "b2", "a2", "a3"]
    await fetch_all(
        web, web.given(items, shape), max_per_key=1, batch_size=3, delay_between_batches=10
    )
    assert web.began == {
        # the first batch, then the second, ten seconds after its end, then the third
        "a0": 0, "b0": 0, "a1": 2,
        "b1": 14, "a2": 14, "b2": 15,
        "a3": 26,
    }  # fmt: skip
    assert web.watch.seconds == 28


@shapes
async def test_a_batch_holds_no_more_than_its_size(autojump_clock: MockClock, shape: str) -> None:
    """Not even the window pulls further than one item ahead."""
    web, pulled = Web(), list[int]()
    items = web.given(urls("a", 9), shape)

    async def fetch(url: str) -> None:
        pulled.append(web.source.pulled)
        await web.fetch(url)

    run = partial(map_with_limit, None, fetch, items, key=host, max_per_key=1)
    await run(batch_size=3, delay_between_batches=1)
    assert shape == "list" or max(pulled[:3]) <= 4
    assert list(web.began.values()) == [0, 1, 2, 4, 5, 6, 8, 9, 10]


# --- under a bound that others share -------------------------------------------------------------

bounds = pytest.mark.parametrize("bound", [Semaphore, trio.CapacityLimiter])


def borrowed(bound: Any) -> int:
    """How many permits of either kind of bound are taken."""
    borrowed: int
    if isinstance(bound, Semaphore):
        borrowed = bound.statistics().borrowed
    else:
        borrowed = bound.borrowed_tokens
    return borrowed


@bounds
@shapes
async def test_a_shared_bound_and_keys(autojump_clock: MockClock, bound: Any, shape: str) -> None:
    """Both hold, everything is run, and every permit comes back."""
    web, shared = Web(), bound(3)
    items = urls("abcd", 6)
    results = await fetch_all(web, web.given(items, shape), max_per_key=1, max_concurrency=shared)
    assert results == [url.upper() for url in items]
    assert (web.peak, max(web.peaks.values()), web.watch.seconds) == (3, 1, 8)
    assert borrowed(shared) == 0


@bounds
@shapes
async def test_no_permit_is_kept_while_no_item_may_run(
    autojump_clock: MockClock, bound: Any, shape: str
) -> None:
    """A call whose items all wait for one key holds the permit of that which runs, and no other."""
    web, shared, seen = Web({"a": 10}), bound(4), set[int]()

    async def watch() -> None:
        while True:
            await trio.sleep(0.7)
            seen.add(borrowed(shared))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        items = web.given(urls("a", 6), shape)
        await fetch_all(web, items, max_per_key=1, max_concurrency=shared)
        nursery.cancel_scope.cancel()
    assert (seen, web.watch.seconds) == ({1}, 60)


@bounds
async def test_who_waits_for_a_key_is_not_in_the_line_for_permits(
    autojump_clock: MockClock, bound: Any
) -> None:
    """A permit that comes back goes to somebody who can use it, at once."""
    web, shared, entered = Web({"a": 10}), bound(2), list[float]()

    async def enter() -> None:
        async with shared:
            entered.append(web.watch.seconds)
            await trio.sleep(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(fetch_all, web, urls("a", 4), max_per_key=1, max_concurrency=shared)
        )
        for _ in range(5):
            await trio.sleep(0.5)
            nursery.start_soon(enter)
    assert entered == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert list(web.began.values()) == [0, 10, 20, 30]


@bounds
async def test_two_calls_with_keys_share_a_bound(autojump_clock: MockClock, bound: Any) -> None:
    """Neither starves: the one whose items may all run uses what the other has no use for."""
    slow, quick, shared = Web({"a": 10}), Web(), bound(3)
    async with trio.open_nursery() as nursery:
        for web, items in ((slow, urls("a", 4)), (quick, urls("bcd", 12))):
            nursery.start_soon(
                partial(fetch_all, web, items, max_per_key=1, max_concurrency=shared)
            )
    # In the instant in which a slow one ends, a quick one may be before the next in the line.
    began = list(slow.began.values())
    assert all(10 <= later - earlier <= 11 for earlier, later in pairwise(began))
    assert 17 <= max(quick.ended.values()) <= 20
    assert borrowed(shared) == 0


@bounds
async def test_a_slow_source_with_keys_keeps_no_more_than_one_permit(
    autojump_clock: MockClock, bound: Any
) -> None:
    """One that is taken to pull with, besides those of what runs."""
    web, shared, most = Web({"a": 0.5}), bound(5), 0

    async def source() -> AsyncIterator[str]:
        nonlocal most
        for number in range(10):
            await trio.sleep(1)
            most = max(most, borrowed(shared))
            yield f"a{number}"

    await fetch_all(web, source(), max_per_key=1, max_concurrency=shared)
    assert most <= 1
    assert len(web.finished) == 10


@bounds
async def test_a_held_item_gets_a_permit_in_spite_of_a_slow_source(
    autojump_clock: MockClock, bound: Any
) -> None:
    """A single permit is enough for items whose keys come free while the source takes its time."""
    web, shared = Web({"a": 3}), bound(2)

    async def source() -> AsyncIterator[str]:
        for url in urls("a", 3):
            yield url
        await trio.sleep(100)
        yield "b0"

    await fetch_all(web, source(), max_per_key=1, max_concurrency=shared)
    assert web.began == {"a0": 0, "a1": 3, "a2": 6, "b0": 100}


@bounds
async def test_a_bound_that_is_opened_late(autojump_clock: MockClock, bound: Any) -> None:
    """With keys, too, a call waits for the first permit; an item in the hand is all it pulls."""
    web, shared, source, watch = Web(), bound(1), Source(), Stopwatch()

    async def use() -> None:
        async with shared:
            await trio.sleep(5)
            assert source.pulled <= 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(use)
        await trio.sleep(1)
        await fetch_all(web, source.of(urls("ab", 2)), max_per_key=1, max_concurrency=shared)
    assert (web.started, watch.seconds) == (["a0", "b0", "a1", "b1"], 9)


@bounds
@pytest.mark.parametrize("permits", [1, 2])
async def test_waiting_for_ones_own_permit_is_an_error_with_keys_too(
    autojump_clock: MockClock, bound: Any, permits: int
) -> None:
    """Operations that hold every permit and call with the same bound get a RuntimeError."""
    shared, watch = bound(permits), Stopwatch()

    async def nested(_: str) -> list[Any]:
        await trio.sleep(1)
        return await fetch_all(Web(), urls("ab", 2), max_per_key=1, max_concurrency=shared)

    with trio.fail_after(60), pytest.raises(OperationsFailedError) as caught:
        await map_with_limit(
            None, nested, urls("abc", 1), key=host, max_per_key=1, max_concurrency=shared
        )
    assert RuntimeError in {type(leaf) for leaf in leaves(caught.value)}
    assert (borrowed(shared), watch.seconds) == (0, 1)


async def test_a_call_with_keys_has_one_place_in_the_line(autojump_clock: MockClock) -> None:
    """Though an item has come free while another was on its way from a slow source."""
    web, semaphore, waiting = Web({"a": 3}), Semaphore(2), list[int]()

    async def source() -> AsyncIterator[str]:
        yield "a0"
        yield "a1"
        await trio.sleep(5)
        yield "b0"
        yield "c0"

    async def use() -> None:
        async with semaphore:
            await trio.sleep(10)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(fetch_all, web, source(), max_per_key=1, max_concurrency=semaphore)
        )
        await trio.sleep(1)
        for _ in range(2):
            nursery.start_soon(use)  # one has what is free, and one what a0 gives back
        for _ in range(6):
            await trio.sleep(1)
            waiting.append(semaphore.statistics().waiting)
    assert waiting == [1, 1, 1, 1, 1, 1]
    assert web.began == {"a0": 0, "a1": 11, "b0": 13, "c0": 14}
