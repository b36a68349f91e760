"""What type checkers must infer for users of the public API; checked by them, and never run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Never, assert_type

import trio
from outcome import Error, Value

from trio_resilience import (
    Advice,
    Bulkhead,
    CircuitBreaker,
    CircuitOpenError,
    CircuitState,
    CombinedRateLimiter,
    Exponential,
    FailureRecord,
    Fallback,
    Hedge,
    Keyed,
    OperationsFailedError,
    Pipeline,
    Policy,
    Quantile,
    RateLimiter,
    RejectedError,
    Retry,
    RetryBudget,
    RetryResult,
    Semaphore,
    Timeout,
    batched,
    map_with_limit,
    open_batcher,
    run_in,
    run_with_limit,
    run_with_retry,
    stream_map_with_limit,
    stream_with_limit,
    transient,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

retry = Retry(max_attempts=5, backoff=Exponential(0.1), on=(transient, OSError))
timeout = Timeout(1.0)


async def fetch(url: str, *, size: int = 10) -> bytes:
    """Stand for any operation with arguments."""
    await trio.lowlevel.checkpoint()
    return url.encode()[:size]


async def tick() -> int:
    """Stand for any operation without."""
    await trio.lowlevel.checkpoint()
    return 1


def endless() -> Iterator[Callable[[], Awaitable[int]]]:
    """Stand for a lazy source."""
    while True:
        yield tick


async def arriving() -> AsyncIterator[str]:
    """Stand for an asynchronous source."""
    await trio.lowlevel.checkpoint()
    yield "url"


async def results_of_run_with_limit(nursery: trio.Nursery) -> None:
    """The overloads of `on_error` decide between results and outcomes."""
    assert_type(await run_with_limit(nursery, [tick, tick]), list[int])
    assert_type(await run_with_limit(None, endless(), on_error="cancel"), list[int])
    assert_type(await run_with_limit(None, [tick], on_error="continue", timeout=3), list[int])
    assert_type(
        await run_with_limit(nursery, [tick], on_error="collect"),
        list[Value[int] | Error],
    )
    assert_type(await run_with_limit(None, [partial(fetch, "url", size=3)]), list[bytes])
    assert_type(await run_with_limit(None, (tick for _ in range(3)), policy=retry), list[int])
    await run_with_limit(None, [tick], max_concurrency=trio.CapacityLimiter(3))


async def results_of_map_with_limit(nursery: trio.Nursery) -> None:
    """So they do for `map_with_limit`, whose items have a type too."""
    assert_type(await map_with_limit(nursery, fetch, ["a", "b"]), list[bytes])
    assert_type(await map_with_limit(None, fetch, arriving(), on_error="continue"), list[bytes])
    assert_type(
        await map_with_limit(None, fetch, ["a"], on_error="collect"),
        list[Value[bytes] | Error],
    )
    await map_with_limit(None, fetch, [1])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def results_of_streams(nursery: trio.Nursery) -> None:
    """A stream yields an index or an item beside each result."""
    async with stream_with_limit(nursery, endless(), ordered=True) as results:
        async for pair in results:
            assert_type(pair, tuple[int, int])
    async with stream_with_limit(None, [tick], on_error="collect") as outcomes:
        async for index, outcome in outcomes:
            assert_type(index, int)
            assert_type(outcome, Value[int] | Error)
    async with stream_map_with_limit(nursery, fetch, arriving(), buffer=3) as pages:
        async for page in pages:
            assert_type(page, tuple[str, bytes])
    async with stream_map_with_limit(None, fetch, ["a"], on_error="collect") as attempts:
        async for url, answer in attempts:
            assert_type(url, str)
            assert_type(answer, Value[bytes] | Error)


async def result_of_run_in(nursery: trio.Nursery) -> None:
    """`run_in` passes arguments and the result's type through."""
    assert_type(await run_in(nursery, tick), int)
    assert_type(await run_in(nursery, fetch, "url", policy=retry, name="fetch"), bytes)
    assert_type(await run_in(None, fetch, "url"), bytes)
    await run_in(nursery, fetch, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def results_of_policies() -> None:
    """`call` has the operation's own type."""
    assert_type(await retry.call(fetch, "url"), bytes)
    assert_type(await retry.call(partial(fetch, "url", size=3), name="fetch"), bytes)
    assert_type(await timeout.call(tick), int)
    await retry.call(fetch, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def results_of_retries(nursery: trio.Nursery) -> None:
    """`call_counted` and the one-liner tell the number of attempts with the result."""
    assert_type(await retry.call_counted(tick), RetryResult[int])
    counted = await run_with_retry(nursery, fetch, "url", max_attempts=3, jitter=False)
    assert_type(counted, RetryResult[bytes])
    assert_type(counted.result, bytes)
    assert_type(counted.attempts, int)
    assert_type(counted.total_delay, float)
    async for attempt in retry.attempts():
        with attempt:
            assert_type(await tick(), int)


@retry
@timeout
async def decorated(url: str, *, size: int = 10) -> bytes:
    """Keep its signature."""
    return await fetch(url, size=size)


class Client:
    """Methods keep theirs too."""

    @retry
    async def get(self, url: str) -> bytes:
        """Fetch it."""
        return await fetch(url)


async def decorated_functions_keep_their_signature(client: Client) -> None:
    """Parameters, keywords and results are checked as if there were no decorator."""
    assert_type(await decorated("url", size=3), bytes)
    assert_type(await client.get("url"), bytes)
    await decorated(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await decorated("url", length=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


async def failures_are_typed() -> None:
    """The group's outcomes and leaves, and what the handler of a rejection gets."""
    try:
        await run_with_limit(None, [tick])
    except OperationsFailedError as error:
        assert_type(error.outcomes, Sequence[Value[Any] | Error | None])
        for leaf in error.exceptions:
            leaf.add_note("every leaf is an exception")
    except RejectedError as error:
        assert_type(error.retry_after, float | None)


def host(url: str) -> str:
    """Stand for a key."""
    return url


keyed = Keyed(lambda _: Semaphore(2), key=host)


@keyed
async def fetch_from_host(url: str) -> bytes:
    """Keep its signature."""
    return await fetch(url)


async def flow_control_keeps_the_results_type(nursery: trio.Nursery) -> None:
    """As calls, as a shared bound, by key, and as the policy of many."""
    semaphore, bulkhead, limiter = Semaphore(3), Bulkhead(3), RateLimiter(10)
    assert_type(await semaphore.call(fetch, "url"), bytes)
    assert_type(await bulkhead.call(tick), int)
    assert_type(await limiter.call(tick), int)
    assert_type(RateLimiter.all_of(limiter, limiter), CombinedRateLimiter)
    assert_type(await run_with_limit(nursery, [tick], max_concurrency=semaphore), list[int])
    pages = await map_with_limit(nursery, fetch, ["url"], key=host, max_per_key=2, policy=bulkhead)
    assert_type(pages, list[bytes])
    assert_type(await keyed.call(fetch, "url"), bytes)
    assert_type(await fetch_from_host("url"), bytes)
    async with keyed.hold("host") as policy, policy:
        assert_type(policy, Semaphore)


async def lengths(items: list[str]) -> list[int]:
    """Stand for what processes a batch."""
    await trio.lowlevel.checkpoint()
    return [len(item) for item in items]


async def save(items: list[str]) -> None:
    """Stand for one that has no results."""
    await lengths(items)


async def batches_are_typed(nursery: trio.Nursery) -> None:
    """Items in, results out."""
    async with open_batcher(nursery, lengths) as batcher:
        assert_type(await batcher.submit("item"), int)
        await batcher.submit(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    async with open_batcher(nursery, save, batch_size=7) as saver:
        await saver.submit("item")
    async with batched(nursery, arriving(), batch_size=10, max_age=1) as batches:
        async for batch in batches:
            assert_type(batch, list[str])


breaker = CircuitBreaker("dependency", failure_rate=0.5, recovery_timeout=Exponential(1))


@breaker
async def guarded(url: str, *, size: int = 10) -> bytes:
    """Keep its signature."""
    return await fetch(url, size=size)


async def breakers_keep_the_results_type(nursery: trio.Nursery) -> None:
    """As calls, as a block, as a decorator; and what they tell is typed."""
    assert_type(await breaker.call(fetch, "url", name="fetch"), bytes)
    assert_type(await guarded("url", size=3), bytes)
    await breaker.call(fetch, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await guarded(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(breaker.state, CircuitState)
    assert_type(breaker.retry_after, float | None)
    assert_type(breaker.last_failure, FailureRecord | None)
    await nursery.start(breaker.keep_probing, tick)
    try:
        async with breaker.guard():
            await tick()
        with breaker.isolate() as isolation:
            isolation.release()
    except CircuitOpenError as error:
        assert_type(error.last_failure, FailureRecord | None)


budget = RetryBudget(0.2, max_tokens=5)
hedge = Hedge(after=Quantile(0.95, initial=0.5), budget=budget, on_discard=bytes.lower)


@hedge
async def hedged(url: str) -> bytes:
    """Keep its signature."""
    return await fetch(url)


async def hedges_keep_the_results_type() -> None:
    """Which shares its budget with retries."""
    assert_type(await hedge.call(fetch, "url"), bytes)
    assert_type(await hedged("url"), bytes)
    assert_type(await Retry(budget=budget).call(hedge.call, tick), int)
    assert_type(hedge.statistics().after, float)
    assert_type(budget.statistics().tokens, float)
    await hedged(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Hedge(after="1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Hedge(0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Retry(budget=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def from_cache(error: Exception) -> str:
    """Stand for what is asked when an operation has failed."""
    await trio.lowlevel.checkpoint()
    return str(error)


zero, text, cached = Fallback(value=0), Fallback(value="none"), Fallback(from_cache, on=OSError)


@text
async def described(url: str) -> bytes:
    """Return this or that."""
    return await fetch(url)


async def fallbacks_add_their_type() -> None:
    """A result is the operation's or the fallback's."""
    assert_type(zero, Fallback[int])
    assert_type(cached, Fallback[str])
    assert_type(await zero.call(tick), int)
    assert_type(await zero.call(fetch, "url"), bytes | int)
    assert_type(await cached.call(fetch, "url"), bytes | str)
    assert_type(await described("url"), bytes | str)
    await described(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fallback(host)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Fallback(from_cache, value=0)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]


async def fallbacks_serve_many_operations() -> None:
    """One of another type needs to be told what comes of it."""
    assert_type(await run_with_limit(None, [tick], policy=zero), list[int])
    assert_type(await run_in(None, tick, policy=Pipeline(zero, retry)), int)
    pages: list[bytes | str] = await map_with_limit(None, fetch, ["url"], policy=text)
    assert_type(pages, list[bytes | str])


standard = Pipeline.standard(retry=Retry(max_attempts=5), breaker=None, bulkhead=keyed)


@standard
async def piped(url: str, *, size: int = 10) -> bytes:
    """Keep its signature."""
    return await fetch(url, size=size)


def pipelines_know_what_their_layers_may_give() -> None:
    """Mostly nothing; what fallbacks give, wherever they are."""
    assert_type(standard, Pipeline[Never])
    assert_type(Pipeline(retry), Pipeline[Never])
    assert_type(Pipeline(retry, breaker, hedge, timeout, retry, timeout, retry), Pipeline[Never])
    assert_type(Pipeline(retry, zero), Pipeline[int])
    assert_type(Pipeline(retry, zero, timeout), Pipeline[int])
    assert_type(Pipeline(retry, zero, text, timeout), Pipeline[int | str])
    assert_type(Pipeline(retry, zero, retry, timeout, cached), Pipeline[int | str])
    assert_type(Pipeline(retry, zero, retry, timeout, timeout, timeout), Pipeline[int])
    assert_type(Pipeline(cached, standard, name="pages"), Pipeline[str])
    assert_type(Pipeline(Pipeline(zero, retry), timeout), Pipeline[int])
    _wider: Policy[object] = Pipeline(zero, retry)
    assert_type(standard.advice(), list[Advice])
    assert_type(standard.layers, tuple[Policy[Never], ...])
    Pipeline(1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    Pipeline(Retry)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]
    Pipeline.standard(retry=zero)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


async def pipelines_keep_the_results_type(nursery: trio.Nursery) -> None:
    """As calls, as a decorator, and as the policy of many."""
    assert_type(await standard.call(fetch, "url"), bytes)
    assert_type(await Pipeline(retry, text).call(fetch, "url"), bytes | str)
    assert_type(await piped("url", size=3), bytes)
    assert_type(await run_with_limit(nursery, [tick], policy=standard), list[int])
    assert_type(await run_in(nursery, fetch, "url", policy=Pipeline(retry, timeout)), bytes)
    await standard.call(fetch, 3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await piped("url", length=3)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def wrong_options_are_refused() -> None:
    """What is checked at the door is checked before that by type checkers."""
    Retry(on_error="collect")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    CircuitBreaker(failure_threshold="3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    RetryBudget(0.1, 10)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    Timeout("3")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
