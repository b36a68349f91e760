"""Hedge, fallback and retry budget, cancelled at every instant: nothing is lost, or counted."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests._scenarios import World, cancel
from tests.test_cancellation_retry import Ledger, flaky, forms
from trio_resilience import Constant, Retry
from trio_resilience._algorithms._budget import RetryBudget
from trio_resilience._algorithms._quantile import Quantile
from trio_resilience._fallback import Fallback
from trio_resilience._hedge import Hedge
from trio_resilience.testing import pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Operation = Callable[[], Awaitable[int]]
    Form = Callable[[Retry, Operation], Awaitable[int]]

pytestmark = pytest.mark.watchdog(180)


@attrs.define(eq=False)
class Hedged:
    """Calls under a hedge, of whose legs every result and every token is accounted for."""

    world: World
    hedge: Hedge
    budget: RetryBudget = attrs.field(factory=lambda: RetryBudget(1, max_tokens=5))
    ledger: Ledger = attrs.field(factory=Ledger)
    made: list[int] = attrs.field(factory=list[int])
    returned: list[int] = attrs.field(factory=list[int])
    discarded: list[int] = attrs.field(factory=list[int])

    def __attrs_post_init__(self) -> None:
        self.hedge = attrs.evolve(self.hedge, budget=self.budget, on_discard=self.discarded.append)
        self.world.checks.append(self.check)

    async def call(self, *operations: Operation) -> None:
        """Make a call whose legs do these things, in the order in which they begin."""
        left = list(operations)

        async def leg() -> int:
            await left.pop(0)()
            self.made.append(len(self.made))
            return self.made[-1]

        async def form() -> None:
            self.returned.append(await self.hedge.call(leg))

        try:
            await self.ledger.enter(form)
        except BaseExceptionGroup:  # a leg has failed as it was cancelled: neither is lost
            self.ledger.cancelled += 1
            raise

    def check(self) -> None:
        made = self.hedge.statistics()
        assert sorted(self.made) == sorted(self.returned + self.discarded), "no result is lost"
        assert self.budget.statistics().taken == made.hedges, "who calls nothing pays nothing"
        assert made.calls == self.ledger.calls
        assert made.hedges <= self.world.started <= made.calls + made.hedges
        assert made.failed <= self.ledger.raised
        assert made.wins_by_hedge <= self.ledger.returned


# --- hedge ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, Quantile(0.5, initial=0)])
def test_a_hedge(after: float | Quantile) -> None:
    """Of quick operations: of one, or of several at once, of which one wins."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        hedged = Hedged(world, Hedge(after=after, max_hedges=2))
        await hedged.call(world.work, partial(world.work, rounds=1), world.work)
        assert hedged.returned

    cancel(victim)


@pytest.mark.parametrize("failures", [1, 2, 3])
def test_a_hedge_whose_legs_fail(failures: int) -> None:
    """Each failure starts the next; if all fail, that is one failure."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        hedged = Hedged(world, Hedge(after=1, max_hedges=2))
        await hedged.call(*[world.fail] * failures, *[world.work] * 2)

    cancel(victim, OSError)


def test_a_hedge_of_a_slow_operation() -> None:
    """The first has to be cancelled, and takes a while to clean up."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        async def hang_on() -> int:
            try:
                await world.hang()
                raise AssertionError
            finally:
                with trio.CancelScope(shield=True):
                    await pause(2)

        hedged = Hedged(world, Hedge(after=1))
        await hedged.call(hang_on, world.work)
        assert hedged.hedge.statistics().wins_by_hedge == 1

    cancel(victim)


def test_a_hedge_of_what_does_not_hear_of_cancellations() -> None:
    """All legs succeed, whoever is cancelled; one result is returned, the others are discarded."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        async def deaf() -> int:
            with trio.CancelScope(shield=True):
                await world.work()
            return 0

        hedged = Hedged(world, Hedge(after=0, max_hedges=2))
        await hedged.call(deaf, deaf, deaf)
        assert len(hedged.discarded) == len(hedged.made) - 1

    cancel(victim)


def test_a_hedge_that_others_share() -> None:
    """Calls at once, of one policy with one budget, which is too small for all."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        hedged = Hedged(world, Hedge(after=1), budget=RetryBudget(0.1, max_tokens=1))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hedged.call, world.work)
            nursery.start_soon(hedged.call, world.fail, world.work)
            await hedged.call(world.fail, world.work)

    cancel(victim, OSError)


# --- budget --------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("failures", [1, 2])
def test_a_retry_with_a_budget(form: Form, failures: int) -> None:
    """A token is paid for each attempt that began, and for no other."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        budget = RetryBudget(max_tokens=3)
        retry = Retry(max_attempts=3, backoff=Constant(1), budget=budget)

        def check() -> None:
            made = retry.statistics()
            assert budget.statistics().taken == made.attempts - made.calls

        world.checks.append(check)
        assert await form(retry, flaky(world, failures)) == 7

    cancel(victim)


@forms
def test_a_retry_with_an_empty_budget(form: Form) -> None:
    """It gives up at once, unless it is being cancelled, and then it is cancelled."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        budget, ledger = RetryBudget(max_tokens=1), Ledger()
        assert budget.try_take()
        retry = Retry(backoff=Constant(1), budget=budget)
        world.checks.append(lambda: _given_up_is(retry, ledger.raised))
        await ledger.enter(lambda: form(retry, world.fail))

    cancel(victim, OSError)


def _given_up_is(retry: Retry, number: int) -> None:
    assert retry.statistics().given_up == number


# --- fallback ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["value", "function", "failing function"])
@pytest.mark.parametrize("failing", [True, False])
def test_a_fallback(kind: str, *, failing: bool) -> None:
    """It is asked for no cancellation; and one while it is asked is counted nowhere."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        async def instead(_: Exception) -> int:
            return await (world.work() if kind == "function" else world.fail())

        fallback = Fallback(value=0) if kind == "value" else Fallback(instead)
        ledger = Ledger()

        def check() -> None:
            counts = fallback.statistics()
            assert counts.calls == ledger.calls
            assert counts.used == (ledger.returned if failing else 0)
            assert counts.failed == ledger.raised

        world.checks.append(check)
        await ledger.enter(lambda: fallback.call(world.fail if failing else world.work))

    cancel(victim, OSError)


# --- all of them ---------------------------------------------------------------------------------


def test_a_stack_of_policies() -> None:
    """Fallback, retry and hedge, with one budget: all counters of all layers."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        budget = RetryBudget(max_tokens=5)
        hedge = Hedge(after=1, budget=budget)
        retry = Retry(max_attempts=2, backoff=Constant(1), budget=budget)
        fallback = Fallback(value=0)

        def check() -> None:
            repeats = retry.statistics().attempts - retry.statistics().calls
            assert budget.statistics().taken == repeats + hedge.statistics().hedges

        world.checks.append(check)

        async def once() -> int:
            return await hedge.call(world.fail)

        result = await fallback.call(lambda: retry.call(once))
        assert (result, world.started) == (0, 4)

    cancel(victim, OSError)
