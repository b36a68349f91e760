"""Keyed: it keeps what a plain model keeps, and serves with the policies of this library."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from tests.operations import returns
from tests.test_keyed import Slot, Slots, keep, last, numbers, use
from trio_resilience import (
    Bulkhead,
    BulkheadFullError,
    RateLimiter,
    RateLimitExceededError,
    Semaphore,
    run_with_limit,
)
from trio_resilience._keyed import Keyed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


def run(main: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    return trio.run(main, *args, clock=trio.testing.MockClock(autojump_threshold=0))


# --- a model of what is kept ---------------------------------------------------------------------

STATES = ["idle", "warm", "stays"]

Snapshot = dict[str, str]
"""The keys that are kept at an instant, each with the state of its policy."""


@attrs.define(eq=False)
class Model:
    """What may go, by the words of the docstring, against what has gone."""

    max_keys: int
    pins: Counter[str] = attrs.field(factory=Counter[str])
    used: list[str] = attrs.field(factory=list[str])
    """Keys, the least recently used first."""
    has_order: bool = True
    """Whether nothing but the order of their use decides between keys."""

    def enter(self, key: str, before: Snapshot, after: Snapshot, *, admitted: bool) -> None:
        resting = [each for each in before if not self.pins[each]]
        idle, warm = self._ranks(before)
        if key in before or len(before) < self.max_keys:
            assert admitted
            self._check_gone(before, after, 0)
        elif idle or warm:
            assert admitted
            self._check_gone(before, after, 1)
        else:
            assert admitted == (len(resting) < self.max_keys)
            self._check_gone(before, after, 0)
        assert set(after) - set(before) == ({key} - set(before) if admitted else set())
        self.pins[key] += admitted

    def leave(self, key: str, before: Snapshot, after: Snapshot) -> None:
        self.pins[key] -= 1
        surplus = 0
        if not self.pins[key]:
            self.used = [each for each in self.used if each != key] + [key]
            surplus = max(0, len(before) - self.max_keys)
        idle, warm = self._ranks(before)
        self._check_gone(before, after, min(surplus, len(idle) + len(warm)))
        assert set(after) <= set(before)

    def _ranks(self, kept: Snapshot) -> list[list[str]]:
        resting = [key for key in self.used if key in kept and not self.pins[key]]
        return [[key for key in resting if kept[key] == state] for state in ("idle", "warm")]

    def _check_gone(self, before: Snapshot, after: Snapshot, number: int) -> None:
        idle, warm = self._ranks(before)
        gone = set(before) - set(after)
        assert len(gone) == number
        assert gone <= {*idle, *warm}
        assert len(gone.intersection(idle)) == min(number, len(idle))
        if self.has_order:
            assert gone == set(idle[:number])


keys = st.sampled_from("abcdefg")
spots = st.integers(0, 3)
steps = st.one_of(
    st.tuples(st.just("call"), keys),
    st.tuples(st.just("hold"), keys, spots),
    st.tuples(st.just("leave"), spots),
)
changes = st.tuples(st.just("put"), st.sampled_from(["idle", "warm", "stays"]), keys)


@attrs.define(eq=False)
class Player:
    """Does what a script says, and asks the model about each change."""

    max_keys: int
    slots: Slots = attrs.field(factory=Slots)
    keyed: Keyed[Any, Slot] = attrs.field(init=False)
    model: Model = attrs.field(init=False)
    holds: dict[int, tuple[str, Any]] = attrs.field(factory=dict[int, tuple[str, Any]])

    def __attrs_post_init__(self) -> None:
        self.keyed = keep(self.slots, max_keys=self.max_keys)
        self.model = Model(self.max_keys)

    async def play(self, script: list[Any]) -> None:
        for verb, *args in script:
            await getattr(self, verb)(*args)
            kept, in_use, _ = numbers(self.keyed)
            assert (kept, in_use) == (len(self.slots.states), len(+self.model.pins))
        for spot in range(4):
            await self.leave(spot)
        states = set(self.slots.states.values())
        assert self.keyed.is_idle == (states <= {"idle"})
        assert self.keyed.is_disposable == ("stays" not in states)

    async def call(self, key: str) -> None:
        before = self.slots.states

        async def op(_: str) -> Snapshot:
            self.model.enter(key, before, self.slots.states, admitted=True)
            assert not self.keyed.is_disposable
            return self.slots.states

        try:
            inside = await self.keyed.call(op, key)
        except BulkheadFullError:
            self.model.enter(key, before, self.slots.states, admitted=False)
        else:
            self.model.leave(key, inside, self.slots.states)

    async def hold(self, key: str, spot: int) -> None:
        await self.leave(spot)
        before, hold = self.slots.states, self.keyed.hold(key)
        try:
            await hold.__aenter__()
        except BulkheadFullError:
            self.model.enter(key, before, self.slots.states, admitted=False)
        else:
            self.model.enter(key, before, self.slots.states, admitted=True)
            self.holds[spot] = key, hold

    async def leave(self, spot: int) -> None:
        if spot in self.holds:
            before, (key, hold) = self.slots.states, self.holds.pop(spot)
            await hold.__aexit__(None, None, None)
            self.model.leave(key, before, self.slots.states)

    async def put(self, state: str, key: str) -> None:
        self.slots.put(state, [key])
        self.model.has_order = False


@pytest.mark.parametrize("script_of", [steps, steps | changes], ids=["order", "states"])
@given(data=st.data(), max_keys=st.integers(1, 5))
def test_it_keeps_what_the_model_keeps(script_of: Any, data: st.DataObject, max_keys: int) -> None:
    """Calls and holds of seven keys, and policies that turn idle, warm or indispensable."""
    run(Player(max_keys).play, data.draw(st.lists(script_of, max_size=40)))


@attrs.define(eq=False)
class Moment:
    """When a key was last used, and since when it has been idle without a break."""

    used_at: float
    idle_since: float


async def wait_and_use(script: list[Any], idle_after: float) -> None:
    slots, moments = Slots(), dict[str, Moment]()
    keyed = keep(slots, max_keys=99, idle_after=idle_after)
    for step in script:
        now, before = trio.current_time(), slots.states
        for key, state in before.items():
            if state != "idle":
                moments[key].idle_since = now
        match step:
            case ("call", key):
                await use(keyed, key)
                gone = set(before) - set(slots.states)
                for each in before.keys() - {key}:
                    moment = moments[each]
                    if each in gone:
                        assert before[each] == "idle"
                        assert now >= moment.used_at + idle_after
                    elif before[each] == "idle":
                        assert now < moment.idle_since + idle_after
                moments[key] = Moment(now, now)
            case ("put", state, key):
                slots.put(state, [key])
            case seconds:
                await trio.sleep(seconds)


waits = st.integers(1, 12).map(lambda halves: halves / 2)


@given(script=st.lists(steps.filter(lambda step: step[0] == "call") | changes | waits, max_size=40))
def test_what_is_idle_for_long_is_forgotten(script: list[Any]) -> None:
    """Never too early, and at the next use if it has been idle all the time."""
    run(wait_and_use, script, 5.0)


# --- with the policies of this library ----------------------------------------------------------


async def test_a_limit_per_host(autojump_clock: MockClock) -> None:
    """Two at a time on each: those on the slow host do not hold up the others."""
    hosts = Keyed(lambda _: Semaphore(2), key=host_of)
    ended = dict[str, float]()

    async def fetch(url: str) -> None:
        await trio.sleep(10 if host_of(url) == "slow" else 1)
        ended[host_of(url)] = trio.current_time()

    urls = [f"{host}/{page}" for page in range(6) for host in ("slow", "fast", "other")]
    ops = [partial(fetch, url) for url in urls]
    await run_with_limit(None, ops, max_concurrency=18, policy=hosts)
    assert ended == {"slow": 30, "fast": 3, "other": 3}


def host_of(url: str) -> str:
    return url.partition("/")[0]


async def test_a_rate_per_tenant(autojump_clock: MockClock) -> None:
    """One that waits for its turn does not delay another."""
    tenants = Keyed(lambda _: RateLimiter(1), key=str)
    began = dict[str, list[float]]()

    @tenants
    async def serve(tenant: str) -> None:
        began.setdefault(tenant, []).append(trio.current_time())
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        for tenant in "aaabab":
            nursery.start_soon(serve, tenant)
    assert began == {"a": [0, 1, 2, 3], "b": [0, 1]}


async def test_a_rate_that_is_partly_used_up_outlasts_one_that_is_not(
    autojump_clock: MockClock,
) -> None:
    """So that a tenant does not get its burst back by making others come."""
    rates = {"a": 0.01}
    tenants = Keyed(lambda tenant: RateLimiter(rates.get(tenant, 10)), key=str, max_keys=2)
    for tenant in "abcde":
        await tenants.call(returns, tenant)
        await trio.sleep(1)
    async with tenants.hold("a") as limiter:
        assert limiter.retry_after == pytest.approx(95)


async def test_a_line_that_is_not_empty_stays(autojump_clock: MockClock) -> None:
    """And everybody in it is served, while any number of other keys come and go."""
    hosts = Keyed(lambda _: Semaphore(1), key=host_of, max_keys=1)
    ended = list[float]()

    async def fetch(_: str) -> None:
        await trio.sleep(1)
        ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(hosts.call, fetch, "busy")
        await wait_all_tasks_blocked()
        for key in range(100):
            assert await hosts.call(returns, f"{key}") == f"{key}"
            assert numbers(hosts)[:2] == (1, 1)
    assert ended == [1, 2, 3]


async def test_a_refusal_of_the_policy_is_its_own(autojump_clock: MockClock) -> None:
    """It comes out as it is, and nothing is left in use."""
    bulkheads = Keyed(lambda key: Bulkhead(1, queue_size=0, name=key), key=str)
    rates = Keyed(lambda _: RateLimiter(0.1, max_wait=1), key=str)
    async with bulkheads.hold("a") as bulkhead, bulkhead:
        with pytest.raises(BulkheadFullError, match=r"^a is full"):
            await bulkheads.call(returns, "a")
    await rates.call(returns, "a")
    with pytest.raises(RateLimitExceededError) as caught:
        await rates.call(returns, "a")
    assert caught.value.retry_after == pytest.approx(10)
    assert numbers(bulkheads) == numbers(rates) == (1, 0, 0)


def first_of(host: str, _: str) -> str:
    return host


async def test_keyed_within_keyed() -> None:
    """A limit for each page of each host: the outer one asks the inner ones what they are."""
    slots = Slots()

    def pages(_: str) -> Keyed[Any, Slot]:
        return keep(slots, key=last)

    async def get(_: str, page: str) -> str:
        return page

    keyed = Keyed(pages, key=first_of, max_keys=2)
    for host, page in (("a", "x"), ("a", "y"), ("b", "z")):
        assert await keyed.call(get, host, page) == page
    slots.put("stays", "x")
    for page in "xy":
        assert await keyed.call(get, "c", page) == page
    assert slots.kept == "xxyy"
    assert not keyed.is_disposable
    slots.put("warm", "xy")
    assert keyed.is_disposable
    assert not keyed.is_idle
