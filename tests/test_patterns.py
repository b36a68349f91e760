"""What users write first, as they would write it: files, requests per second, batches, a crawl."""

from __future__ import annotations

import gc
import sys
import tracemalloc
from collections import Counter
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing

from tests.operations import Source, Stopwatch
from trio_resilience import (
    Bulkhead,
    Constant,
    OperationsFailedError,
    RateLimiter,
    Retry,
    Semaphore,
    map_with_limit,
    stream_map_with_limit,
)

if TYPE_CHECKING:
    from pathlib import Path

    from trio.testing import MockClock

# As programs have them: made once, at module level, before there is a run.
files = Semaphore(3)
ten_a_second = RateLimiter(10)


@attrs.define(eq=False)
class Meter:
    """Count how many are inside a block at once, and when each came."""

    inside: int = 0
    peak: int = 0
    times: list[float] = attrs.field(factory=list[float])
    watch: Stopwatch = attrs.field(factory=Stopwatch)

    def __enter__(self) -> None:
        self.times.append(self.watch.seconds)
        self.inside += 1
        self.peak = max(self.peak, self.inside)

    def __exit__(self, *_: object) -> None:
        self.inside -= 1

    def most_within(self, seconds: float) -> int:
        """The most that came within any so many seconds, both ends included."""
        most = first = 0
        for last, time in enumerate(self.times):
            while self.times[first] < time - seconds - 1e-6:
                first += 1
            most = max(most, last - first + 1)
        return most


# --- three files at a time ------------------------------------------------------------------------


def some_files(folder: Path) -> list[trio.Path]:
    for number in range(20):
        (folder / f"{number}.txt").write_text(str(number))
    return [trio.Path(folder / f"{number}.txt") for number in range(20)]


async def test_three_files_at_a_time_in_one_call(tmp_path: Path) -> None:
    """A bound of one call is a number."""
    meter = Meter()

    async def read(path: trio.Path) -> str:
        with meter:
            return await path.read_text()

    async with trio.open_nursery() as nursery:
        texts = await map_with_limit(nursery, read, some_files(tmp_path), max_concurrency=3)
    assert texts == [str(number) for number in range(20)]
    assert meter.peak == 3


async def test_three_files_at_a_time_in_a_whole_program(tmp_path: Path) -> None:
    """A bound of many calls is a semaphore: as bound, as decorator and as block."""
    meter, paths = Meter(), some_files(tmp_path)

    async def read(path: trio.Path) -> str:
        with meter:
            return await path.read_text()

    @files
    async def append(path: trio.Path) -> None:
        with meter:
            await path.write_text(str(meter.peak))

    async def list_folder() -> None:
        async with files:
            with meter:
                await trio.Path(tmp_path).iterdir()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(map_with_limit, nursery, read, paths, max_concurrency=files))
        for path in paths:
            nursery.start_soon(append, path)
            nursery.start_soon(list_folder)
    assert meter.peak == 3
    assert len(meter.times) == 60
    assert files.statistics().borrowed == 0


# --- ten requests per second ----------------------------------------------------------------------


@ten_a_second
async def request(meter: Meter, number: int) -> int:
    """Be a request that takes a while."""
    with meter:
        await trio.sleep(0.75)
        return number


@pytest.mark.parametrize("_run", ["first", "second"])
async def test_ten_requests_per_second(autojump_clock: MockClock, _run: str) -> None:
    """Evenly spaced, however many wait; and again in the next run of the program."""
    meter = Meter()
    async with trio.open_nursery() as nursery:
        fetch = partial(request, meter)
        results = await map_with_limit(nursery, fetch, range(100), max_concurrency=50)
    assert results == list(range(100))
    assert meter.times == [pytest.approx(number / 10) for number in range(100)]
    assert (meter.most_within(1), meter.peak) == (11, 8)


async def test_ten_requests_per_second_that_may_come_at_once(autojump_clock: MockClock) -> None:
    """With a burst: ten at once after a pause, and never more than twenty in a second."""
    meter, limiter = Meter(), RateLimiter(10, burst=10)

    async def fetch(_: int) -> None:
        with meter:
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        for _ in range(2):
            await map_with_limit(nursery, fetch, range(40), max_concurrency=40, policy=limiter)
            await trio.sleep(100)
    assert meter.times[:10] == [0] * 10
    assert meter.times[40:50] == [pytest.approx(103.05)] * 10
    assert meter.most_within(1) == 20


async def test_two_limits_at_once(autojump_clock: MockClock) -> None:
    """Ten a second and thirty a minute."""
    meter = Meter()
    limiter = RateLimiter.all_of(
        RateLimiter(10, burst=10), RateLimiter(30, per=60, burst=30), name="api"
    )

    async def fetch(_: int) -> None:
        with meter:
            await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        await map_with_limit(nursery, fetch, range(90), policy=limiter, max_concurrency=20)
    assert meter.most_within(1) <= 20
    assert meter.most_within(60) <= 60
    assert meter.watch.seconds == pytest.approx((90 - 30) * 2 + 0.05)


# --- batches, with a pause, five at a time, rate-limited ------------------------------------------


async def test_ten_thousand_items_in_batches(autojump_clock: MockClock) -> None:
    """Of fifty, a second apart, five at a time, a hundred a second."""
    meter = Meter()

    async def process(item: int) -> int:
        with meter:
            await trio.sleep(0.02)
            return item

    async with trio.open_nursery() as nursery:
        results = await map_with_limit(
            nursery,
            process,
            range(10_000),
            max_concurrency=5,
            batch_size=50,
            delay_between_batches=1,
            policy=RateLimiter(100),
        )
    assert results == list(range(10_000))
    assert meter.peak <= 5
    assert meter.most_within(0.5) <= 51
    # A batch takes its fifty turns and the last one's work; there is no pause after the last.
    assert meter.watch.seconds == pytest.approx(200 * (0.49 + 0.02) + 199 * 1)


async def test_a_stream_in_batches(autojump_clock: MockClock) -> None:
    """The same for a source that never ends: as far as the consumer wants, and no further."""
    meter, source, got = Meter(), Source(), list[int]()

    async def process(item: int) -> int:
        with meter:
            await trio.sleep(0.02)
            return item

    async with stream_map_with_limit(
        None,
        process,
        source.of(count()),
        max_concurrency=5,
        batch_size=50,
        delay_between_batches=1,
        policy=RateLimiter(100),
        ordered=True,
    ) as results:
        async for item, _ in results:
            got.append(item)
            if item == 119:
                break
    assert got == list(range(120))
    assert meter.watch.seconds == pytest.approx(2 * (0.51 + 1) + 0.19 + 0.02)
    assert source.closed
    assert source.pulled <= 126


BATCH, BATCHES = 50, 2000
TICK = 1 / 64
"""Between two turns of the rate limit; what is a sum of such can be told to the last digit."""


@attrs.define(eq=False)
class Service:
    """Something slow that fails now and then, and may be asked so often."""

    limiter: RateLimiter
    calls: Counter[str] = attrs.field(factory=Counter[str])
    memory: dict[int, tuple[int, int]] = attrs.field(factory=dict[int, tuple[int, int]])
    """Blocks and traced bytes that are in use when these items begin."""
    tried: set[int] = attrs.field(factory=set[int])

    async def ask(self, item: int) -> None:
        await self.limiter.acquire()
        self.calls["made"] += 1
        if item in {10_000, 90_000, 91_000, 98_000}:
            self._look(item)
        await trio.sleep(4 * TICK)
        if item % BATCH == 7 and item not in self.tried:
            self.tried.add(item)
            raise OSError(item)
        self.tried.discard(item)

    def _look(self, item: int) -> None:
        gc.collect()
        if item == 90_000:
            tracemalloc.start()  # it makes everything several times slower, so not earlier
        self.memory[item] = sys.getallocatedblocks(), tracemalloc.get_traced_memory()[0]


@pytest.mark.exhaustive
@pytest.mark.watchdog(180)
def test_a_hundred_thousand_items_through_everything() -> None:
    """In batches, under a rate limit and a retry: at the predicted instant, in constant memory."""
    service = Service(RateLimiter(64))
    retry = Retry(max_attempts=3, backoff=Constant(16 * TICK))
    elapsed = -1.0

    async def main() -> list[None]:
        nonlocal elapsed
        watch = Stopwatch()
        results = await map_with_limit(
            None,
            service.ask,
            range(BATCH * BATCHES),
            max_concurrency=10,
            batch_size=BATCH,
            delay_between_batches=32 * TICK,
            policy=retry,
        )
        elapsed = watch.seconds
        return results

    try:
        results = trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    finally:
        tracemalloc.stop()
    assert results == [None] * 100_000
    # One item of each batch has a second turn, in time for the other workers to hide it.
    assert elapsed == pytest.approx(BATCHES * (BATCH + 4) * TICK + (BATCHES - 1) * 32 * TICK)
    assert service.calls["made"] == retry.statistics().attempts == BATCHES * (BATCH + 1)
    assert retry.statistics().recovered == BATCHES
    blocks, traced = zip(*service.memory.values(), strict=True)
    assert abs(blocks[-1] - blocks[0]) < 1000
    # A result is a place in a list, which has an eighth to spare when it grows, and no block.
    assert traced[-1] - traced[-2] < 100_000 * 8 * 9 / 8 + 50_000
    assert traced[-1] > 0


# --- all together ---------------------------------------------------------------------------------


async def test_a_crawl(autojump_clock: MockClock) -> None:
    """Two at a time of each host, twenty a second in all, five attempts: every host gets on."""
    retry, limiter = Retry(max_attempts=5, backoff=Constant(1)), RateLimiter(20, burst=20)
    peaks, running, failures = Counter[int](), Counter[int](), {7: 2, 107: 1}
    watch = Stopwatch()

    def host(url: int) -> int:
        return url % 10

    @limiter
    async def fetch(url: int) -> int:
        running[host(url)] += 1
        peaks[host(url)] = max(peaks[host(url)], running[host(url)])
        await trio.sleep(10 if host(url) == 3 else 0.5)
        running[host(url)] -= 1
        if failures.get(url):
            failures[url] -= 1
            raise OSError
        return url

    async with trio.open_nursery() as nursery:
        pages = await map_with_limit(
            nursery,
            fetch,
            range(200),
            key=host,
            max_per_key=2,
            max_concurrency=100,
            policy=retry,
        )
    assert pages == list(range(200))
    assert set(peaks.values()) == {2}
    # The slow host has twenty pages of ten seconds, two at a time: all the rest is hidden by it.
    assert 100 <= watch.seconds < 103


async def test_a_bulkhead_and_a_rate_limit_for_every_operation(
    autojump_clock: MockClock,
) -> None:
    """Refusals of the bulkhead are failures like others, and those that got in are all run."""
    bulkhead, limiter, meter = Bulkhead(4, queue_size=6), RateLimiter(10), Meter()

    async def fetch(_: int) -> None:
        async with limiter:
            with meter:
                await trio.sleep(1)

    with pytest.raises(OperationsFailedError) as caught:
        await map_with_limit(
            None, fetch, range(15), max_concurrency=15, policy=bulkhead, on_error="continue"
        )
    assert len(caught.value.exceptions) == bulkhead.statistics().rejections == 5
    assert [result for result in caught.value.outcomes if hasattr(result, "value")]
    assert (len(meter.times), meter.peak) == (10, 4)
    results: list[Any] = await map_with_limit(
        None, fetch, range(15), max_concurrency=4, policy=bulkhead, on_error="collect"
    )
    assert [hasattr(result, "value") for result in results] == [True] * 15
