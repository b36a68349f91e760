"""Keyed: which policy a call gets, what is kept for how long, and what is refused."""

from __future__ import annotations

import copy
import datetime as dt
import math
import pickle
import re
import warnings
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Never, TypeVar, TypeVarTuple, cast, final

import attrs
import pytest
import trio
from trio.testing import assert_checkpoints

from tests.operations import Steps, fails, returns
from trio_resilience import (
    Policy,
    Retry,
    map_with_limit,
    run_with_limit,
)
from trio_resilience._keyed import Keyed, KeyedStatistics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Container, Iterable

    from trio.testing import MockClock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@final
@attrs.define(eq=False)
class Slot(Policy[Never]):
    """Runs one call at a time, and is in the state that the test puts it in."""

    key: object
    state: str = "idle"
    calls: list[Any] = attrs.field(factory=list[Any])
    look: Callable[[], None] = lambda: None
    """Called when it is asked whether it may go."""
    _lock: trio.Lock = attrs.field(factory=trio.Lock)

    @property
    def is_idle(self) -> bool:
        return self.state == "idle"

    @property
    def is_disposable(self) -> bool:
        self.look()
        return self.state != "stays"

    async def call(
        self, fn: Callable[[*Ts], Awaitable[T]], *args: *Ts, name: str | None = None
    ) -> T:
        self.calls.append((args, name))
        async with self._lock:
            return await fn(*args)

    def statistics(self) -> None:
        return None


@attrs.define(eq=False)
class Slots:
    """Makes slots, and knows which of them still exist."""

    made: list[object] = attrs.field(factory=list[object])
    looks: int = 0
    """How often any of them was asked whether it may go."""
    _alive: weakref.WeakSet[Slot] = attrs.field(factory=weakref.WeakSet[Slot])

    def __call__(self, key: Any) -> Slot:
        self.made.append(key)
        slot = Slot(key, look=self._count)
        self._alive.add(slot)
        return slot

    @property
    def kept(self) -> str:
        """The keys of those that exist: one that is dropped is gone at once, uncollected."""
        return "".join(sorted(str(slot.key) for slot in self._alive))

    def __len__(self) -> int:
        return len(self._alive)

    def _count(self) -> None:
        self.looks += 1

    @property
    def states(self) -> dict[Any, str]:
        return {slot.key: slot.state for slot in self._alive}

    def put(self, state: str, keys: Container[Any]) -> None:
        for slot in self._alive:
            if slot.key in keys:
                slot.state = state


def first(key: Any) -> Any:
    return key


def last(*args: Any) -> Any:
    return args[-1]


def keep(slots: Callable[[Any], Slot], **options: Any) -> Keyed[Any, Slot]:
    """A `Keyed` with room for three, whose key is the argument of a call."""
    given: dict[str, Any] = {"key": first, "max_keys": 3, **options}
    return Keyed(slots, **given)


async def use(keyed: Keyed[Any, Any], keys: Iterable[Any]) -> None:
    """Make a short call for each of *keys*."""
    for key in keys:
        assert await keyed.call(returns, key) == key


def numbers(keyed: Keyed[Any, Any]) -> tuple[int, int, int]:
    now = keyed.statistics()
    return now.keys, now.in_use, now.evicted


# --- at the door --------------------------------------------------------------------------------

NUMBERS = [math.nan, -1, -math.inf, True, "5", None]


@pytest.mark.parametrize("value", [*NUMBERS, 0, 1.5, math.inf, 1e400], ids=repr)
def test_bad_numbers_of_keys_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^`max_keys` must be .*, got "):
        keep(Slots(), max_keys=value)


@pytest.mark.parametrize("value", [*NUMBERS, dt.timedelta(-1)], ids=repr)
def test_bad_times_are_refused(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"^`idle_after` must be .*, got "):
        keep(Slots(), idle_after=value)


@pytest.mark.parametrize("name", ["factory", "key"])
@pytest.mark.parametrize("value", [None, 5, returns, partial(returns, 1)])
def test_what_is_no_plain_function_is_refused(name: str, value: Any) -> None:
    given: dict[str, Any] = {"factory": Slot, "key": str, name: value}
    with pytest.raises(TypeError, match=rf"^`{name}` must be a.*function"):
        Keyed(**given)


def test_a_policy_is_no_factory() -> None:
    """Though it can be called, as a decorator: it would be shared by all keys."""
    policy: Any = Retry()
    with pytest.raises(TypeError, match=r"^`factory` must be .* returns a policy.*, got Retry\("):
        Keyed(policy, key=str)


def test_the_options_are_the_documented_ones() -> None:
    keyed = Keyed(Slot, key=str)
    assert (keyed.max_keys, keyed.idle_after, keyed.name) == (1024, math.inf, "keyed")
    with pytest.raises(TypeError, match="positional"):
        Keyed(Slot, str)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="'key'"):
        Keyed(Slot)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_there_is_no_copy_of_it(copied: Any) -> None:
    """It would keep other policies for the same keys."""
    with pytest.raises(TypeError, match="a Keyed can't be copied or pickled"):
        copied(keep(Slots()))


# --- which policy a call gets -------------------------------------------------------------------


async def test_each_key_has_one_policy() -> None:
    """Made when it is first needed, with its key; also for keys that are false, or not there."""
    keys: list[Any] = ["a", "b", None, 0, "", ("host", 80), frozenset(), "a", None]
    slots = Slots()
    keyed = keep(slots, max_keys=99)
    await use(keyed, keys)
    assert slots.made == keys[:-2]
    assert keyed.statistics() == KeyedStatistics(keys=7, in_use=0, evicted=0)


async def test_the_key_is_made_of_what_the_operation_gets() -> None:
    """What partials bind, within one another too, and what follows; the last keyword counts."""
    seen = list[Any]()

    def key(*args: object, **kwargs: object) -> int:
        seen.append((args, kwargs))
        return 1

    async def op(*args: object, **kwargs: object) -> object:
        await trio.lowlevel.checkpoint()
        return args, kwargs

    class Unflattened(partial[Any]):
        """`functools` makes one of two partials only if neither is of a class of its own."""

    keyed = keep(Slots(), key=key)
    nested = Unflattened(Unflattened(partial(op, 1, a=1, b=1), 2, b=2, c=2), 3, c=3)
    for fn in (op, partial(op, 1, a=1), partial(partial(op, 1, a=1), 2, a=2), nested):
        assert await keyed.call(fn, 8, 9) == seen[-1]
    assert seen[-1] == ((1, 2, 3, 8, 9), {"a": 1, "b": 2, "c": 3})
    assert await keyed(op)("x", y=5) == seen[-1] == (("x",), {"y": 5})
    assert await keyed(partial(op, 1, z=1))("x", z=5) == seen[-1] == ((1, "x"), {"z": 5})


async def test_methods_and_what_runs_many_operations() -> None:
    """A decorated method hands over its object; `run_with_limit` takes partials."""
    slots = Slots()
    keyed = keep(slots, key=last)

    class Client:
        @keyed
        async def get(self, host: str) -> str:
            return await returns(host)

    assert await Client().get("a") == "a"
    ops = [partial(returns, host) for host in "abca"]
    assert await run_with_limit(None, ops, policy=keyed) == [*"abca"]
    assert await map_with_limit(None, returns, "cab", policy=keyed) == [*"cab"]
    assert sorted(slots.made, key=str) == [*"abc"]


async def test_a_name_is_passed_on() -> None:
    """And so are the arguments, as they are."""
    keyed = keep(Slots())
    async with keyed.hold("a") as slot:
        await keyed.call(returns, "a", name="mine")
        await keyed.call(partial(returns, "a"))
    assert slot.calls == [(("a",), "mine"), ((), None)]


@pytest.mark.parametrize("key", [[], {}, ("a", [])], ids=repr)
async def test_what_is_not_hashable_is_no_key(key: Any) -> None:
    """Of a call or a block; it is told what it was, and nothing is kept."""
    keyed, told = keep(Slots()), re.escape(f"a key must be hashable, got {key!r}")
    with pytest.raises(TypeError, match=told):
        await keyed.call(returns, key)
    with pytest.raises(TypeError, match=told):
        async with keyed.hold(key):
            pass
    assert numbers(keyed) == (0, 0, 0)


async def test_what_a_key_or_a_factory_raises_comes_out() -> None:
    """As it is; nothing is kept, and nothing had to go for it."""
    slots, error = Slots(), KeyError("unknown tenant")

    def factory(key: str) -> Slot:
        if key == "x":
            raise error
        return slots(key)

    keyed = keep(factory)
    await use(keyed, "abc")
    slots.put("warm", "abc")
    for _ in range(3):
        with pytest.raises(KeyError) as caught:
            await use(keyed, "x")
        assert caught.value is error
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'key'"):
        await keyed.call(trio.lowlevel.checkpoint)
    assert numbers(keyed) == (3, 0, 0)
    assert slots.kept == "abc"


@pytest.mark.parametrize("result", [None, 5, Slot, "Slot"], ids=str)
async def test_a_factory_returns_policies(result: Any) -> None:
    """Anything else is named in a TypeError, and not kept."""
    keyed = keep(lambda _: result)
    with pytest.raises(TypeError, match=r"^`factory` must return a policy such as .*, got "):
        await use(keyed, "a")
    assert numbers(keyed) == (0, 0, 0)


@pytest.mark.parametrize("name", ["factory", "key"])
async def test_async_functions_in_disguise_are_refused(name: str) -> None:
    """What they return is closed: no "never awaited" warning follows."""

    def disguised(_: object) -> Any:
        return returns(1)

    given: dict[str, Any] = {"factory": Slots(), "key": str, name: disguised}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TypeError, match=f"^`{name}` must be a plain function, but it returned"):
            await Keyed(**given).call(returns, 1)


async def test_what_is_no_operation_is_refused_before_all_else() -> None:
    """The usual mistake, ``call(fetch(url))``, would leave the key without its argument, too."""
    keyed, coro = keep(Slots()), cast("Any", returns("a"))
    with pytest.raises(TypeError, match=r"functools\.partial\(returns, "):
        await keyed.call(coro)
    assert coro.cr_frame is None
    with pytest.raises(TypeError, match="must be an async function"):
        await keyed.call(cast("Any", print), "a")
    with pytest.raises(TypeError, match="must be an async function"):
        keyed(cast("Any", print))
    assert numbers(keyed) == (0, 0, 0)


# --- calls --------------------------------------------------------------------------------------


async def test_waiting_for_one_key_never_delays_another(autojump_clock: MockClock) -> None:
    """Three calls on one key take three seconds, and on another one second meanwhile."""
    keyed, ended = keep(Slots()), dict[str, float]()

    async def op(key: str) -> None:
        await trio.sleep(1)
        ended[key] = trio.current_time()

    async with trio.open_nursery() as nursery:
        for key in "aaab":
            nursery.start_soon(keyed.call, op, key)
    assert ended == {"a": 3, "b": 1}


async def test_errors_come_out_as_they_are() -> None:
    """The same object, whose traceback is no longer for having been kept apart."""
    keyed, error, depths = keep(Slots()), OSError("mine"), list[int]()
    for _ in range(3):
        with pytest.raises(OSError, match="mine") as caught:
            await keyed.call(lambda _: fails(error.with_traceback(None)), "a")
        assert caught.value is error
        assert error.__context__ is None
        depths.append(len(caught.traceback))
    assert depths[0] == depths[-1] <= 5
    assert numbers(keyed) == (1, 0, 0)


async def test_it_adds_no_trip_through_the_scheduler() -> None:
    """Neither for a new key nor for a known one."""
    keyed, steps = Keyed(lambda _: Retry(), key=str), Steps()
    trio.lowlevel.add_instrument(steps)
    for _ in range(2):
        await keyed.call(returns, 1)
    trio.lowlevel.remove_instrument(steps)
    assert steps.count == 0


# --- hold ---------------------------------------------------------------------------------------


async def test_a_block_holds_the_policy_of_a_key() -> None:
    """It is not entered; it is in use until the last one has left, and then may go."""
    slots = Slots()
    keyed = keep(slots, max_keys=1)
    async with keyed.hold("a") as first:
        async with keyed.hold("a") as second:
            assert second is first
            assert first.calls == []
            await use(keyed, "bca")
            assert numbers(keyed) == (1, 1, 2)
        await use(keyed, "b")
        assert numbers(keyed) == (1, 1, 3)
        assert not keyed.is_idle
        assert not keyed.is_disposable
    assert keyed.is_idle
    await use(keyed, "b")
    assert numbers(keyed) == (1, 0, 4)


async def test_to_hold_is_a_checkpoint() -> None:
    """Of which nothing is left when it is cancelled."""
    keyed = keep(Slots())
    with assert_checkpoints():
        async with keyed.hold("a"):
            pass
    with trio.CancelScope() as scope:
        scope.cancel()
        async with keyed.hold("b"):
            raise AssertionError
    assert scope.cancelled_caught
    assert numbers(keyed) == (1, 0, 0)


async def test_a_hold_serves_one_block() -> None:
    """Entered again, inside or after its block, it says so, and changes nothing."""
    keyed = keep(Slots())
    hold = keyed.hold("a")
    async with hold:
        with pytest.raises(RuntimeError, match="a hold serves one block"):
            async with hold:
                raise AssertionError
        assert numbers(keyed) == (1, 1, 0)
    with pytest.raises(RuntimeError, match="a hold serves one block"):
        await hold.__aenter__()
    assert numbers(keyed) == (1, 0, 0)
