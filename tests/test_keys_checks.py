"""What gives an item its key, and what is refused: before anything runs, if it can be known."""

from __future__ import annotations

import datetime as dt
import math
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.operations import Gauge, foreign_nursery
from tests.test_keys import Web, host, shapes, urls
from trio_resilience import (
    map_with_limit,
    run_with_limit,
    stream_map_with_limit,
    stream_with_limit,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio.testing import MockClock

NAN, INF = math.nan, math.inf
stream_items: Any = stream_map_with_limit


async def by_map(gauge: Gauge, nursery: trio.Nursery | None = None, **options: Any) -> None:
    items = options.pop("items", [0])
    await map_with_limit(nursery, gauge.run, items, **options)


async def by_stream(gauge: Gauge, nursery: trio.Nursery | None = None, **options: Any) -> None:
    items = options.pop("items", [0])
    async with stream_items(nursery, gauge.run, items, **options) as results:
        async for _ in results:
            pass


jobs = pytest.mark.parametrize("job", [by_map, by_stream], ids=["map", "stream"])


def key_of(item: int) -> int:
    """Be a plain function of the item."""
    return item % 3


async def async_key(item: int) -> int:
    """Be a function that can't be called for a key."""
    return item


class AsyncKey:
    """An object whose call is a coroutine."""

    async def __call__(self, item: int) -> int:
        return item


# --- at the door ----------------------------------------------------------------------------------

KEYED: dict[str, Any] = {"key": key_of, "max_per_key": 2}

BAD_OPTIONS: list[tuple[str, object, type[Exception]]] = [
    *[("max_per_key", bad, ValueError) for bad in (0, -1, -(10**30))],
    *[("max_per_key", bad, TypeError) for bad in (NAN, INF, 1.5, 2.0, True, False, "5", [1])],
    ("max_per_key", dt.timedelta(seconds=1), TypeError),
    ("max_per_key", trio.CapacityLimiter(1), TypeError),
    *[("lookahead", bad, ValueError) for bad in (0, -1)],
    *[("lookahead", bad, TypeError) for bad in (NAN, INF, 1.5, True, False, "5", None)],
    *[("key", bad, TypeError) for bad in (5, "host", object(), (key_of,), True)],
    *[("key", bad, TypeError) for bad in (async_key, partial(async_key), AsyncKey())],
]


@jobs
@pytest.mark.parametrize("option, value, error", BAD_OPTIONS, ids=repr)
async def test_bad_options_are_refused(
    job: Any, option: str, value: object, error: type[Exception]
) -> None:
    """Each with an error that names it, before anything runs."""
    gauge = Gauge()
    with pytest.raises(error, match=f"`{option}`"):
        await job(gauge, **{**KEYED, option: value})
    assert gauge.started == []


@jobs
@pytest.mark.parametrize(
    "option, value, shown",
    [
        ("max_per_key", 0, "`max_per_key` must be >= 1, got 0"),
        ("lookahead", 0, "`lookahead` must be >= 1, got 0"),
        ("max_per_key", True, "`max_per_key` must be an int, got True"),
        ("lookahead", "5", "`lookahead` must be an int, got '5'"),
        ("key", async_key, "`key` must be a plain function, not an async one"),
        ("key", "host", "`key` must be a function, got 'host'"),
    ],
)
async def test_the_wording_is_the_houses(job: Any, option: str, value: object, shown: str) -> None:
    """Name, rule, and what was given."""
    with pytest.raises((TypeError, ValueError), match=shown):
        await job(Gauge(), **{**KEYED, option: value})


@jobs
@pytest.mark.parametrize("missing", ["key", "max_per_key"])
@pytest.mark.parametrize("given_none", [True, False])
async def test_a_key_and_its_bound_go_together(job: Any, missing: str, given_none: bool) -> None:
    """One without the other does nothing, so it is refused; the error names both."""
    gauge, options = Gauge(), {name: each for name, each in KEYED.items() if name != missing}
    if given_none:
        options[missing] = None
    with pytest.raises(ValueError, match="`key`") as caught:
        await job(gauge, **options)
    assert "`max_per_key`" in str(caught.value)
    assert gauge.started == []


@jobs
@pytest.mark.parametrize("bad", [0, -1, True, "5", 1.5, None])
async def test_a_window_is_checked_though_there_are_no_keys(job: Any, bad: object) -> None:
    """A wrong number stays wrong when it is not needed."""
    with pytest.raises((TypeError, ValueError), match="`lookahead`"):
        await job(Gauge(), lookahead=bad)


GOOD_OPTIONS: list[dict[str, Any]] = [
    {"key": None, "max_per_key": None},
    {"lookahead": 1},
    {**KEYED, "lookahead": 1},
    {**KEYED, "lookahead": 10**30, "max_per_key": 10**30},
    {**KEYED, "key": int},
    {**KEYED, "key": {1: "a", 2: "b", 3: "c"}.__getitem__},
    {**KEYED, "key": partial(divmod, 7)},
    {**KEYED, "max_concurrency": 1, "queue_size": 2, "batch_size": 2},
]


@jobs
@pytest.mark.parametrize("options", GOOD_OPTIONS, ids=str)
async def test_good_options_are_accepted(
    autojump_clock: MockClock, job: Any, options: dict[str, Any]
) -> None:
    """The edges of what is allowed; anything callable may give the key."""
    gauge = Gauge()
    await job(gauge, items=[1, 2, 3], **options)
    assert sorted(gauge.finished) == [1, 2, 3]


async def test_operations_have_no_keys() -> None:
    """Only items have: the functions that take operations know no such option."""
    for function in (run_with_limit, stream_with_limit):
        call: Callable[..., Any] = function
        for option in ("key", "max_per_key", "lookahead"):
            with pytest.raises(TypeError, match=option):
                await call(None, [trio.lowlevel.checkpoint], **{option: 1})


# --- the function ---------------------------------------------------------------------------------


@shapes
async def test_it_is_called_once_for_each_item_in_their_order(
    autojump_clock: MockClock, shape: str
) -> None:
    """However long an item waits, and though another has the same key."""
    web, asked = Web(), list[str]()

    def key(url: str) -> str:
        asked.append(url)
        return host(url)

    items = [*urls("a", 5), *urls("bc", 5)]
    await map_with_limit(None, web.fetch, web.given(items, shape), key=key, max_per_key=1)
    assert asked == items


variable = ContextVar("variable", default="")


@jobs
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("asynchronous", [True, False])
async def test_it_is_called_in_the_callers_context(
    job: Any, given: bool, asynchronous: bool
) -> None:
    """Like the iterable: it sees the caller's variables, and none that an operation has set."""
    seen = list[str]()

    async def operation(_: int) -> None:
        variable.set("an operation's")
        await trio.lowlevel.checkpoint()
        variable.set("an operation's")

    def key(item: int) -> int:
        seen.append(variable.get())
        variable.set(f"key {item}")
        return item % 2

    async def items() -> Any:
        for item in range(5):
            yield item

    async with foreign_nursery() as nursery:
        where = nursery if given else None
        variable.set("the caller's")
        source: Any = items() if asynchronous else range(5)
        options: Any = {"key": key, "max_per_key": 1, "max_concurrency": 2}
        if job is by_map:
            await map_with_limit(where, operation, source, **options)
        else:
            async with stream_items(where, operation, source, **options) as results:
                async for _ in results:
                    pass
    assert seen == ["the caller's", "key 0", "key 1", "key 2", "key 3"]


class KeyLookupError(Exception):
    """What a key function raises for an item that it does not know."""


@jobs
@pytest.mark.parametrize("on_error", ["cancel", "continue", "collect"])
@pytest.mark.parametrize("kind", [KeyLookupError, KeyboardInterrupt, SystemExit])
async def test_what_it_raises_comes_out_as_it_is(
    autojump_clock: MockClock, job: Any, on_error: Any, kind: type[BaseException]
) -> None:
    """What runs is cancelled and joined, what waits never runs, and the source is closed."""
    gauge, web, error = Gauge(), Web(), kind()

    def key(item: int) -> int:
        if item == 7:
            raise error
        return 0

    async with foreign_nursery() as nursery:
        with pytest.raises(kind) as caught:
            await job(
                gauge,
                nursery,
                items=web.source.of(range(100)),
                key=key,
                max_per_key=2,
                on_error=on_error,
            )
        assert not nursery.child_tasks
    assert caught.value is error
    assert gauge.running == 0
    assert sorted(gauge.cancelled) == sorted(gauge.started)
    assert (web.source.closed, web.source.pulled) == (True, 8)


@jobs
@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration])
async def test_an_error_that_means_the_end_of_something_is_not_the_end_of_the_items(
    autojump_clock: MockClock, job: Any, kind: type[Exception]
) -> None:
    """A `next()` without a default in the key function does not cut the work short in silence."""
    gauge = Gauge()

    def key(item: int) -> int:
        if item == 2:
            raise kind
        return item

    with pytest.raises((RuntimeError, kind)):
        await job(gauge, items=range(5), key=key, max_per_key=1)
    assert len(gauge.finished) < 5


@jobs
@shapes
async def test_a_key_must_be_hashable(autojump_clock: MockClock, job: Any, shape: str) -> None:
    """Python's own TypeError says so, and ends the call."""
    gauge, web = Gauge(), Web()
    items: Any = web.given(["a0", "a1", "a2"], shape)
    with pytest.raises(TypeError, match="unhashable type: 'list'"):
        await job(gauge, items=items, key=list, max_per_key=1)
    assert gauge.running == 0
    assert gauge.finished == []


class Spiteful:
    """A key that can be hashed but not compared."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        raise self.error


def _spite(error: Exception, _: int) -> Spiteful:
    return Spiteful(error)


@jobs
async def test_a_key_that_cannot_be_compared_ends_the_call(
    autojump_clock: MockClock, job: Any
) -> None:
    """Its error comes out, like that of the function; nothing hangs or is lost."""
    gauge, error = Gauge(), KeyLookupError()
    with trio.fail_after(60), pytest.raises(KeyLookupError) as caught:
        await job(gauge, items=range(5), key=partial(_spite, error), max_per_key=1)
    assert caught.value is error
    assert gauge.running == 0


async def test_an_error_of_the_key_comes_out_at_once(autojump_clock: MockClock) -> None:
    """Though the items that run would take long, and others wait for their turn."""
    web = Web({"a": 100})
    with pytest.raises(KeyLookupError):
        await map_with_limit(None, web.fetch, [*urls("a", 5), "b0"], key=_no_b, max_per_key=1)
    assert (web.watch.seconds, web.finished, web.cancelled) == (0, [], web.started)


def _no_b(url: str) -> str:
    if host(url) == "b":
        raise KeyLookupError
    return host(url)


@jobs
async def test_a_key_that_returns_a_coroutine_is_refused(job: Any) -> None:
    """An async function in disguise is found out when it is called, and warns of nothing."""

    async def find() -> int:
        return 1

    def key(_: int) -> Any:
        return find()

    with pytest.raises(TypeError, match="`key` must be a plain function"):
        await job(Gauge(), items=range(3), key=key, max_per_key=1)
