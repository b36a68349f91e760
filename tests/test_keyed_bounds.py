"""Keyed: how much is kept, what goes first, what never goes, and what is refused then."""

from __future__ import annotations

import datetime as dt
import gc
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import assert_checkpoints, wait_all_tasks_blocked

from tests.operations import returns, within_calls
from tests.test_events import Listener
from tests.test_keyed import Slots, keep, numbers, use
from trio_resilience import (
    BulkheadFullError,
    Rejected,
    RejectedError,
    subscribe,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

ABC = "abcdefghijklmnopqrstuvwxyz"

# --- what goes first ----------------------------------------------------------------------------


async def test_the_least_recently_used_goes_first() -> None:
    """A use counts, and so does a block when it ends; what is forgotten is made anew."""
    slots = Slots()
    keyed = keep(slots)
    await use(keyed, "abcad")
    assert slots.kept == "acd"
    async with keyed.hold("c"):
        await use(keyed, "ad")
    await use(keyed, "e")
    assert slots.kept == "cde"
    await use(keyed, "b")
    assert slots.kept == "bce"
    assert "".join(map(str, slots.made)) == "abcdeb"
    assert numbers(keyed) == (3, 0, 3)


async def test_those_of_which_nothing_is_lost_go_first() -> None:
    """However recently they were used; and only then those that lose their history."""
    slots = Slots()
    keyed = keep(slots, max_keys=4)
    await use(keyed, "abcd")
    slots.put("warm", "ac")
    await use(keyed, "e")
    assert slots.kept == "acde"
    await use(keyed, "f")
    assert slots.kept == "acef"
    slots.put("warm", "ef")
    await use(keyed, "g")
    assert slots.kept == "cefg"
    slots.put("warm", "g")
    await use(keyed, "h")
    assert slots.kept == "efgh"


async def test_what_has_become_idle_again_is_noticed() -> None:
    """Though it was not when it was last looked at, and was not used since."""
    slots = Slots()
    keyed = keep(slots, max_keys=4)
    await use(keyed, "abcd")
    slots.put("warm", "abc")
    slots.put("stays", "d")
    await use(keyed, "e")
    assert slots.kept == "bcde"
    slots.put("warm", "e")
    slots.put("idle", "c")
    await use(keyed, "f")
    assert slots.kept == "bdef"
    slots.put("warm", "f")
    slots.put("idle", "d")
    await use(keyed, "g")
    assert slots.kept == "befg"


async def test_what_must_stay_does_so_while_others_come_and_go() -> None:
    """Until it need not stay any longer; then it goes as any other."""
    slots = Slots()
    keyed = keep(slots)
    await use(keyed, "ab")
    slots.put("stays", "a")
    slots.put("warm", "b")
    await use(keyed, ABC[2:])
    assert slots.kept == "abz"
    slots.put("stays", "b")
    slots.put("warm", "z")
    await use(keyed, "c")
    assert slots.kept == "abc"
    slots.put("warm", "ac")
    await use(keyed, "d")
    assert slots.kept == "bcd"
    slots.put("warm", "d")
    await use(keyed, "e")
    assert slots.kept == "bde"


async def test_what_was_warm_and_must_stay_now_is_not_dropped() -> None:
    """A policy that others use too may change without a call here."""
    slots = Slots()
    keyed = keep(slots)
    await use(keyed, "abc")
    slots.put("warm", "abc")
    await use(keyed, "d")
    slots.put("warm", "d")
    slots.put("stays", "b")
    await use(keyed, "e")
    assert slots.kept == "bde"


# --- refusals -----------------------------------------------------------------------------------
@pytest.mark.parametrize("form", ["call", "hold"])
async def test_too_many_that_must_stay(form: str) -> None:
    """A further key is refused at a checkpoint, and told of; known ones are served as before."""
    slots, listener = Slots(), Listener()
    keyed = keep(slots, name="hosts")
    await use(keyed, "abc")
    slots.put("stays", "abc")

    async def try_d() -> None:
        if form == "call":
            await keyed.call(returns, "d")
        async with keyed.hold("d"):
            pass

    with (
        subscribe(within_calls(listener)),
        assert_checkpoints(),
        pytest.raises(RejectedError) as caught,
    ):
        await try_d()
    assert isinstance(caught.value, BulkheadFullError)
    assert caught.value.args[:3] == ("hosts", 3, 4)
    (event,) = listener.heard
    operation = "returns" if form == "call" else "acquire"
    assert (type(event), event.policy, event.operation) == (Rejected, "hosts", operation)
    assert slots.made == [*"abc"]
    await use(keyed, "abc")
    assert numbers(keyed) == (3, 0, 0)
    slots.put("warm", "b")
    await try_d()
    assert slots.kept == "acd"


async def test_those_in_use_do_not_count_as_staying() -> None:
    """With one of three in use there is room beside two that stay; when it ends, it is shed."""
    slots = Slots()
    keyed = keep(slots)
    await use(keyed, "abc")
    slots.put("stays", "ab")
    async with keyed.hold("c"):
        await use(keyed, "de")
        assert slots.kept == "abc"
        async with keyed.hold("d"), keyed.hold("e"):
            assert slots.kept == "abcde"
            slots.put("stays", "de")
        # All that rest must stay: more than there is room for, until one of them may go.
        assert slots.kept == "abcde"
        with pytest.raises(BulkheadFullError):
            await use(keyed, "f")
        slots.put("idle", "e")
    assert slots.kept == "abd"


async def test_a_cancelled_wait_leaves_nothing_in_use(autojump_clock: MockClock) -> None:
    """Whether it waited for its policy or ran."""
    keyed = keep(Slots())

    async def hang(_: str) -> None:
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for key in "aab":
            nursery.start_soon(keyed.call, hang, key)
        await wait_all_tasks_blocked()
        assert numbers(keyed) == (2, 2, 0)
        nursery.cancel_scope.cancel()
    assert numbers(keyed) == (2, 0, 0)
    assert repr(keyed) == "Keyed(name='keyed': 2 of 3 keys, 0 in use)"


async def test_that_many_must_stay_is_believed_for_a_moment(autojump_clock: MockClock) -> None:
    """A refusal looks at a few of them, in turn; and at all of them after a tenth of a second."""
    slots = Slots()
    keyed = keep(slots, max_keys=1000)

    async def looks_for_a_refusal(key: object) -> int:
        before = slots.looks
        with pytest.raises(BulkheadFullError):
            await use(keyed, [key])
        return slots.looks - before

    await use(keyed, range(1000))
    slots.put("stays", range(1000))
    assert await looks_for_a_refusal("new") >= 1000
    assert await looks_for_a_refusal("new") < 10
    slots.put("idle", [900])
    assert await looks_for_a_refusal("new") < 10
    await trio.sleep(0.11)
    await use(keyed, ["new"])
    assert numbers(keyed) == (1000, 0, 1)
    slots.put("stays", ["new"])
    assert await looks_for_a_refusal("newer") >= 1000
    slots.put("idle", [500])
    tries = 0
    while numbers(keyed) == (1000, 0, 1):
        with suppress(BulkheadFullError):
            await use(keyed, ["newer"])
        tries += 1
    assert 1 < tries < 150


@pytest.mark.parametrize("state", ["idle", "warm", "mixed"])
async def test_to_make_room_takes_a_few_looks(state: str) -> None:
    """For each new key, however many there are: the table is not searched for it."""
    slots = Slots()
    keyed = keep(slots, max_keys=500)
    for key in range(3000):
        await use(keyed, [key])
        mixed = "stays" if key % 10 == 0 else "warm"
        slots.put(mixed if state == "mixed" else state, [key])
    assert numbers(keyed)[0] == 500
    assert slots.looks < 3000 * 20


async def test_a_hundred_thousand_keys_are_bounded() -> None:
    """What is forgotten is gone, and the state does not grow with the keys that ever were."""
    slots = Slots()
    keyed = keep(slots, max_keys=100)
    await use(keyed, range(100_000))
    assert len(slots.made) == 100_000
    assert numbers(keyed) == (100, 0, 99_900)
    assert len(slots) == 100


# --- what was not used for long -----------------------------------------------------------------


async def test_what_is_idle_for_long_is_forgotten(autojump_clock: MockClock) -> None:
    """At the next use of any key, and exactly when the time is over."""
    slots = Slots()
    keyed = keep(slots, max_keys=9, idle_after=dt.timedelta(seconds=10))
    await use(keyed, "abc")
    await trio.sleep(5)
    await use(keyed, "b")
    await trio.sleep(4.9)
    await use(keyed, "d")
    assert slots.kept == "abcd"
    await trio.sleep(0.1)
    await use(keyed, "d")
    assert slots.kept == "bd"
    await trio.sleep(10)
    assert slots.kept == "bd"
    await use(keyed, "b")
    assert slots.kept == "b"
    assert slots.made == [*"abcdb"]
    assert numbers(keyed) == (1, 0, 4)


async def test_a_use_lasts_until_it_ends(autojump_clock: MockClock) -> None:
    """What is in use is never forgotten, and its time starts afterwards."""
    slots = Slots()
    keyed = keep(slots, idle_after=10)
    async with keyed.hold("a"):
        await trio.sleep(50)
        await use(keyed, "b")
    await trio.sleep(9.9)
    await use(keyed, "b")
    assert slots.kept == "ab"
    await trio.sleep(0.1)
    await use(keyed, "b")
    assert slots.kept == "b"


async def test_what_is_not_idle_gets_its_time_again(autojump_clock: MockClock) -> None:
    """So it is forgotten twice as late at most, if it is idle then."""
    slots = Slots()
    keyed = keep(slots, max_keys=9, idle_after=10)
    await use(keyed, "ab")
    slots.put("warm", "a")
    slots.put("stays", "b")
    await trio.sleep(10)
    await use(keyed, "c")
    assert slots.kept == "abc"
    slots.put("idle", "a")
    await trio.sleep(9.9)
    await use(keyed, "c")
    assert slots.kept == "abc"
    await trio.sleep(0.1)
    await use(keyed, "c")
    assert slots.kept == "bc"


async def test_nothing_at_all_is_kept_for_no_time(autojump_clock: MockClock) -> None:
    """Of many that are not idle, each call looks at a few."""
    slots = Slots()
    keyed = keep(slots, max_keys=200, idle_after=0)
    await use(keyed, "abc")
    assert slots.kept == "c"
    for key in range(100):
        await use(keyed, [key])
        slots.put("warm", [key])
    assert numbers(keyed) == (100, 0, 3)
    before = slots.looks
    await use(keyed, [99])
    assert slots.looks - before < 10
    slots.put("idle", range(100))
    await use(keyed, "z")
    assert slots.kept == "z"


# --- what is let go -----------------------------------------------------------------------------


class Local:
    """Something that an operation holds, to see whether it is let go."""


async def leave_traces(held: list[weakref.ref[Any]]) -> None:
    keyed = keep(Slots(), max_keys=1)
    hold = keyed.hold("held")
    held.append(weakref.ref(keyed))

    async def op(key: Any) -> None:
        local = Local()
        held.append(weakref.ref(local))
        await trio.lowlevel.checkpoint()
        raise OSError(key)

    keys: list[Any] = ["a", "a", "b", []]
    for key in keys:
        with suppress(OSError, TypeError):
            await keyed.call(op, key)
    async with hold as slot:
        held.append(weakref.ref(slot))
    del slot
    await use(keyed, "c")
    assert [ref() for ref in held] == [keyed, None, None, None, None]


async def test_nothing_is_kept_alive() -> None:
    """Neither what operations held, nor what was forgotten, nor the whole when it is dropped."""
    held = list[weakref.ref[Any]]()
    gc.disable()
    try:
        await leave_traces(held)
        assert held[0]() is None
    finally:
        gc.enable()
