"""Checked at the door: what is no option, operation or nursery is refused before anything runs."""

from __future__ import annotations

import datetime as dt
import inspect
import math
from contextlib import closing
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, cast

import pytest
import trio

from tests.operations import Gauge, Source, foreign_nursery, returns
from trio_resilience import (
    Retry,
    Timeout,
    map_with_limit,
    run_in,
    run_with_limit,
    stream_map_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

NAN, INF = math.nan, math.inf


async def by_run(gauge: Gauge, nursery: trio.Nursery | None = None, **options: Any) -> None:
    await run_with_limit(nursery, gauge.ops(0), **options)


async def by_map(gauge: Gauge, nursery: trio.Nursery | None = None, **options: Any) -> None:
    await map_with_limit(nursery, gauge.run, [0], **options)


async def by_stream(gauge: Gauge, nursery: trio.Nursery | None = None, **options: Any) -> None:
    await drain(stream_with_limit(nursery, gauge.ops(0), **options))


async def by_stream_map(gauge: Gauge, nursery: trio.Nursery | None = None, **options: Any) -> None:
    await drain(stream_map_with_limit(nursery, gauge.run, [0], **options))


async def drain(stream: Any) -> None:
    async with stream as results:
        async for _ in results:
            pass


jobs = pytest.mark.parametrize("job", [by_run, by_map])
streams = pytest.mark.parametrize("job", [by_stream, by_stream_map])
everywhere = pytest.mark.parametrize("job", [by_run, by_map, by_stream, by_stream_map])

BAD_OPTIONS = [
    *[("max_concurrency", bad) for bad in (0, -1, NAN, 1.5, True, False, "5", None, [1])],
    ("max_concurrency", dt.timedelta(seconds=1)),
    ("max_concurrency", trio.Semaphore(1)),
    *[("timeout", bad) for bad in (-1, -0.001, NAN, True, "5", None, -INF)],
    ("timeout", dt.timedelta(seconds=-1)),
    *[("queue_size", bad) for bad in (-1, NAN, True, "5")],
    *[("batch_size", bad) for bad in (0, -1, NAN, 1.5, True, "5")],
    *[("delay_between_batches", bad) for bad in (-1, NAN, True, "5", None)],
    *[("on_error", bad) for bad in ("ignore", "", None, True)],
    *[("policy", bad) for bad in (5, "retry", Timeout, trio.sleep)],
]


@everywhere
@pytest.mark.parametrize("option, value", BAD_OPTIONS, ids=repr)
async def test_bad_options_are_refused(job: Any, option: str, value: object) -> None:
    """Each with a TypeError or ValueError that names the option, before anything runs."""
    gauge = Gauge()
    with pytest.raises((TypeError, ValueError), match=f"`?{option}`?"):
        await job(gauge, **{option: value})
    assert gauge.started == []


@everywhere
@pytest.mark.parametrize(
    "option, value, shown",
    [
        ("max_concurrency", 0, "`max_concurrency` must be >= 1, got 0"),
        ("batch_size", 0, "`batch_size` must be >= 1, got 0"),
        ("queue_size", -1, "`queue_size` must be >= 0, got -1"),
        ("timeout", NAN, "got nan"),
        ("on_error", "ignore", "'ignore'"),
    ],
)
async def test_the_wording_is_the_same_everywhere(
    job: Any, option: str, value: object, shown: str
) -> None:
    """Name, rule, and what was given."""
    with pytest.raises(ValueError, match=shown):
        await job(Gauge(), **{option: value})


@jobs
@pytest.mark.parametrize("bad", [5, "print", returns])
async def test_on_done_must_be_a_sync_callable(job: Any, bad: object) -> None:
    """An async callback would never be awaited: it is refused."""
    gauge = Gauge()
    with pytest.raises(TypeError, match="on_done"):
        await job(gauge, on_done=bad)
    assert gauge.started == []


@streams
@pytest.mark.parametrize("bad", [-1, NAN, 1.5, True, "5", None])
async def test_a_bad_buffer_is_refused(job: Any, bad: object) -> None:
    """A buffer is a whole number of results, zero or more."""
    gauge = Gauge()
    with pytest.raises((TypeError, ValueError), match="buffer"):
        await job(gauge, buffer=bad)
    assert gauge.started == []


@streams
async def test_a_stream_takes_no_on_done(job: Any) -> None:
    """Its results are delivered to the block instead."""
    with pytest.raises(TypeError, match="on_done"):
        await job(Gauge(), on_done=print)


async def test_options_are_keyword_only() -> None:
    """A bare number after the operations is refused, not guessed at."""
    run, run_map = cast("Any", run_with_limit), cast("Any", map_with_limit)
    with pytest.raises(TypeError, match="positional"):
        await run(None, [], 5)
    with pytest.raises(TypeError, match="positional"):
        await run_map(None, trio.sleep, [], 5)


@everywhere
@pytest.mark.parametrize("bad", [object(), 5, [trio.sleep], trio.CancelScope()])
async def test_a_nursery_must_be_a_nursery(job: Any, bad: Any) -> None:
    """A forgotten nursery, so that the operations are in its place, is a TypeError."""
    gauge = Gauge()
    with pytest.raises(TypeError, match="nursery"):
        await job(gauge, bad)
    assert gauge.started == []


@everywhere
async def test_good_options_are_accepted(autojump_clock: MockClock, job: Any) -> None:
    """The edges of what is allowed."""
    gauge = Gauge()
    await job(
        gauge,
        max_concurrency=1,
        timeout=dt.timedelta(days=1),
        queue_size=0,
        batch_size=1,
        delay_between_batches=dt.timedelta(0),
        policy=None,
        on_error="collect",
    )
    await job(gauge, timeout=INF, queue_size=None, batch_size=None, delay_between_batches=0)
    assert gauge.finished == [0, 0]


# --- what is given as operations ----------------------------------------------------------------


def synchronous(*_: object) -> int:
    return 3


class SyncCallable:
    """An instance is called like a function, and returns no awaitable."""

    def __call__(self, *_: object) -> int:
        return 3


@pytest.mark.parametrize("bad", [3, None, "fetch", synchronous, object(), partial(synchronous, 1)])
@pytest.mark.parametrize("on_error", ["cancel", "collect"])
async def test_what_is_no_operation_is_refused_before_the_others_run(
    bad: Any, on_error: Any
) -> None:
    """A list is looked through first; the error is a bare TypeError."""
    gauge = Gauge()
    for ops in ([gauge.op(0, 0), bad], (gauge.op(0, 0), bad)):
        with pytest.raises(TypeError):
            await run_with_limit(None, ops, on_error=on_error)
        with pytest.raises(TypeError):
            await drain(stream_with_limit(None, ops, on_error=on_error))
    with pytest.raises(TypeError):
        await map_with_limit(None, bad, [0, 1], on_error=on_error)
    with pytest.raises(TypeError):
        await drain(stream_map_with_limit(None, bad, [0], on_error=on_error))
    with pytest.raises(TypeError):
        await run_in(None, bad)
    assert gauge.started == []


async def fetch(page: int = 1) -> int:
    return page


@pytest.mark.parametrize("given", [True, False])
async def test_coroutine_objects_are_refused_and_closed(given: bool) -> None:
    """Before any operation ran; the error shows the fix, and no coroutine is "never awaited"."""
    gauge, coroutines = Gauge(), [fetch(1), fetch(2)]
    async with foreign_nursery() as nursery:
        with pytest.raises(TypeError, match="coroutine") as caught:
            await run_with_limit(
                nursery if given else None, cast("Any", [gauge.op(0, 0), *coroutines])
            )
    assert "fetch" in str(caught.value)
    assert "partial(" in str(caught.value) or "lambda" in str(caught.value)
    assert gauge.started == []
    assert [inspect.getcoroutinestate(each) for each in coroutines] == [inspect.CORO_CLOSED] * 2


@pytest.mark.parametrize("call", [map_with_limit, stream_map_with_limit, run_in])
async def test_a_coroutine_object_is_no_function(call: Any) -> None:
    """It is closed and refused, in the place of a function too."""
    coroutine = fetch(1)
    arguments = [] if call is run_in else [[1, 2]]
    with pytest.raises(TypeError, match="coroutine"):
        given = call(None, coroutine, *arguments)
        if call is stream_map_with_limit:
            async with given:
                pass
        else:
            await given
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


async def test_a_coroutine_object_from_a_generator_ends_the_job(
    autojump_clock: MockClock,
) -> None:
    """Unknown at the door, it is a bare TypeError when it is pulled; the rest is cancelled."""
    gauge, coroutine, source = Gauge(), fetch(1), Source()
    ops: list[Any] = [gauge.op(0, 5), coroutine, gauge.op(2, 5)]
    with pytest.raises(TypeError, match="coroutine"):
        await run_with_limit(None, source.of(ops), on_error="collect")
    assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED
    assert gauge.finished == []
    assert sorted(gauge.cancelled) == sorted(gauge.started)
    assert source.closed


async def ticks() -> Any:
    yield 1


@pytest.mark.parametrize("on_error", ["cancel", "continue", "collect"])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("max_attempts", [0, 5])
@pytest.mark.parametrize(
    "bad", [lambda: 3, lambda: None, SyncCallable(), partial(len, "abc"), dict, ticks]
)
async def test_an_operation_that_returns_no_awaitable_ends_the_job(
    autojump_clock: MockClock, bad: Any, given: bool, on_error: Any, max_attempts: int
) -> None:
    """A bare TypeError cancels the rest, whatever on_error says; nothing is retried or counted."""
    gauge, done = Gauge(), list[int]()
    retry = Retry(on=Exception, max_attempts=max_attempts) if max_attempts else None
    async with foreign_nursery() as nursery:
        with pytest.raises(TypeError):
            await run_with_limit(
                nursery if given else None,
                [gauge.op(0, 5), bad, gauge.op(2, 5)],
                on_error=on_error,
                policy=retry,
                on_done=lambda index, _: done.append(index),
            )
        assert not nursery.child_tasks
    assert gauge.finished == []
    assert done == []
    assert gauge.running == 0


async def test_a_mistake_is_called_once(autojump_clock: MockClock) -> None:
    """A retry does not repeat what can't work."""
    calls = list[int]()
    policy = Retry(on=Exception, max_attempts=5)
    wrong = cast("Any", lambda: calls.append(1))
    with pytest.raises(TypeError):
        await run_with_limit(None, [wrong], policy=policy)
    with pytest.raises(TypeError):
        await run_in(None, wrong, policy=policy)
    assert calls == [1, 1]


async def test_an_operations_own_type_error_is_a_failure() -> None:
    """Only the mistake of giving no operation is special: a TypeError from inside is collected."""

    async def confused() -> None:
        raise TypeError("mine")

    indirect: Callable[[], Awaitable[None]] = lambda: confused()  # noqa: E731, PLW0108
    results = await run_with_limit(None, [confused, indirect], on_error="collect")
    assert [repr(cast("Any", each).error) for each in results] == ["TypeError('mine')"] * 2


@pytest.mark.parametrize("bad", [5, None, fetch, ticks, "fetch", object()])
async def test_what_is_no_iterable_is_refused(bad: Any) -> None:
    """A lone operation, a function that was not called, a number: TypeError, nothing runs."""
    with pytest.raises(TypeError):
        await run_with_limit(None, bad)
    if not isinstance(bad, str):
        with pytest.raises(TypeError):
            await map_with_limit(None, trio.sleep, bad)
        with pytest.raises(TypeError):
            await drain(stream_with_limit(None, bad))


async def test_a_coroutine_in_the_place_of_the_operations_is_closed() -> None:
    """run_with_limit(nursery, get_ops()) with an async get_ops is a TypeError, with no warning."""
    coroutine = fetch()
    with closing(coroutine):
        with pytest.raises(TypeError):
            await run_with_limit(None, cast("Any", coroutine))
        assert inspect.getcoroutinestate(coroutine) == inspect.CORO_CLOSED


async def test_an_endless_source_is_not_looked_through() -> None:
    """Only what has a length is checked in advance."""
    checked: Callable[[], Awaitable[int]] = partial(returns, 1)
    with trio.CancelScope() as scope:
        await run_with_limit(
            None, (checked for _ in count()), on_done=lambda _index, _result: scope.cancel()
        )
    assert scope.cancelled_caught
