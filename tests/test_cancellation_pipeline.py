"""A whole pipeline, cancelled at every instant: every layer takes back what it gave, and counts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio
import trio.testing

from tests._layers import INSTEAD, Stack, same_key
from trio_resilience import (
    AttemptFinished,
    AttemptStarted,
    Bulkhead,
    Constant,
    Event,
    Keyed,
    OperationsCancelledError,
    OperationsFailedError,
    OperationTimeoutError,
    RateLimiter,
    RejectedError,
    Retry,
    Semaphore,
    Timeout,
    WaitFinished,
    WaitStarted,
    run_with_limit,
    subscribe,
)
from trio_resilience._algorithms._budget import RetryBudget
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._events import CircuitState
from trio_resilience._fallback import Fallback
from trio_resilience._hedge import Hedge
from trio_resilience._pipeline import Pipeline
from trio_resilience.testing import CancelReport, Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio_resilience import Policy

    Victim = Callable[["World"], Awaitable[object]]
    Layers = Callable[["World"], list[Policy[Any]]]

pytestmark = pytest.mark.watchdog(180)

PERMITS = 2


@attrs.define(eq=False)
class World:
    """A pipeline, what is called under it, and the permits that must all be there in the end."""

    make: Layers
    budget: RetryBudget = attrs.field(factory=RetryBudget)
    permits: Semaphore = attrs.field(factory=lambda: Semaphore(PERMITS))
    bulkhead: Bulkhead = attrs.field(factory=lambda: Bulkhead(PERMITS, queue_size=9))
    stack: Stack = attrs.field(init=False)
    nursery: trio.Nursery | None = None
    running: int = 0
    failures: int = 0
    """How many more calls fail."""
    hangs: int = 0
    """How many more calls never end."""
    heard: list[Event] = attrs.field(factory=list[Event])

    def __attrs_post_init__(self) -> None:
        self.stack = Stack(self.make(self))

    async def work(self, answer: int = 1) -> int:
        """Suspend, then hang, fail or return."""
        self.running += 1
        try:
            await pause(2)
            if self.hangs:
                self.hangs -= 1
                await trio.sleep_forever()
        finally:
            self.running -= 1
        if self.failures:
            self.failures -= 1
            raise OSError
        return answer

    async def use(self, answer: int = 1) -> object:
        """Make one call."""
        result: object = await self.stack.watched.call(self.work, answer)
        return result

    async def use_all(self) -> None:
        """Take every permit that there should be, at once; then make a call."""
        for _ in range(PERMITS):
            self.permits.acquire_nowait()
            self.bulkhead.acquire_nowait()
        await pause()
        for _ in range(PERMITS):
            self.permits.release()
            self.bulkhead.release()
        self.hangs = self.failures = 0
        assert await self.use(5) == 5

    def check(self) -> None:
        """Raise unless all layers are as if nobody had ever been here, and agree on what was."""
        assert self.running == 0
        self.stack.check()
        assert self.stack.watched.is_disposable
        retries = [layer for layer in self.stack.layers if isinstance(layer, Retry)]
        hedges = [layer for layer in self.stack.layers if isinstance(layer, Hedge)]
        repeats = [retry.statistics().attempts - retry.statistics().calls for retry in retries]
        repeats += [hedge.statistics().hedges for hedge in hedges]
        assert self.budget.statistics().taken == sum(repeats)
        kinds = [type(event) for event in self.heard]
        assert kinds.count(WaitStarted) == kinds.count(WaitFinished)
        assert kinds.count(AttemptStarted) == kinds.count(AttemptFinished)


def standard(world: World) -> list[Policy[Any]]:
    """The standard order, with a rate limit."""
    return [
        Timeout(1000),
        Retry(max_attempts=3, backoff=Constant(1), budget=world.budget),
        RateLimiter(1, burst=3),
        CircuitBreaker(failure_threshold=99),
        world.bulkhead,
        Timeout(30),
    ]


def hedged(world: World) -> list[Policy[Any]]:
    """A fallback around hedges, each with a permit of its key."""
    return [
        Fallback(value=INSTEAD),
        Timeout(1000),
        Hedge(after=1, budget=world.budget),
        Keyed(lambda _: world.permits, key=same_key),
        CircuitBreaker(failure_threshold=99, cancel_in_flight=True),
        Timeout(30),
    ]


def everything(world: World) -> list[Policy[Any]]:
    """All kinds of layers at once."""
    return [
        Fallback(value=INSTEAD, on=RejectedError),
        Timeout(1000),
        Retry(max_attempts=2, backoff=Constant(1), budget=world.budget),
        Hedge(after=5, budget=world.budget),
        CircuitBreaker(failure_threshold=99),
        RateLimiter(1, burst=3),
        world.bulkhead,
        Keyed(lambda _: world.permits, key=same_key),
        Timeout(30),
    ]


def cancel(
    layers: Layers, victim: Victim, *expected: type[Exception], others: int = 2, seeds: int = 1
) -> CancelReport:
    """Cancel *victim* everywhere, beside others that make calls under the same pipeline."""
    __tracebackhide__ = True

    def scenario() -> Scenario:
        world = World(layers)

        async def call(nursery: trio.Nursery) -> None:
            world.nursery = nursery
            with subscribe(world.heard.append):
                await victim(world)

        async def other() -> None:
            assert await world.stack.watched.call(pause) is None

        return Scenario(
            call,
            others=[other] * others,
            fresh_user=world.use_all,
            invariant=world.check,
            expected=expected,
            on_nursery_cancelled=(OperationsCancelledError,),
        )

    report = cancel_everywhere(scenario, seeds=range(seeds))
    assert report.cancellations > 0
    return report


every_stack = pytest.mark.parametrize("layers", [standard, hedged, everything])


@every_stack
def test_a_call(layers: Layers) -> None:
    async def victim(world: World) -> None:
        assert await world.use(7) == 7

    cancel(layers, victim, seeds=2)


@every_stack
def test_a_call_that_is_repeated(layers: Layers) -> None:
    """It is cancelled in an attempt, between two, or in a leg; a token comes back if need be."""

    async def victim(world: World) -> None:
        world.failures = 1
        assert await world.use(7) == 7

    cancel(layers, victim, OSError, others=0, seeds=2)


@every_stack
def test_a_call_that_fails(layers: Layers) -> None:
    """Or comes out with what a fallback gives."""

    async def victim(world: World) -> None:
        world.failures = 4
        assert await world.use(7) is INSTEAD

    cancel(layers, victim, OSError, others=0)


@every_stack
def test_a_call_that_hangs(layers: Layers) -> None:
    """Our own limit ends the attempt at some instant; a cancellation at any other one wins."""

    async def victim(world: World) -> None:
        world.hangs = 1
        assert await world.use(7) == 7

    cancel(layers, victim, others=0)


@every_stack
def test_calls_that_wait_in_line(layers: Layers) -> None:
    """More at once than there are permits, and than the rate allows."""

    async def victim(world: World) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(PERMITS + 2):
                nursery.start_soon(world.use, number)

    cancel(layers, victim, others=1)


@pytest.mark.parametrize("given", [True, False])
def test_operations_of_bounded_concurrency(given: bool) -> None:
    """The caller or its nursery is cancelled, while some run, wait or back off."""

    async def victim(world: World) -> None:
        world.failures = 2
        ops = [partial(world.work, number) for number in range(3)]
        nursery = world.nursery if given else None
        assert await run_with_limit(nursery, ops, policy=world.stack.watched) == [0, 1, 2]

    cancel(standard, victim, OperationsFailedError, OSError, others=1)


@pytest.mark.parametrize("is_plain", [True, False])
def test_a_probe_of_a_circuit(is_plain: bool) -> None:
    """In whatever it is cancelled, the circuit closes with the next call that succeeds."""

    def layers(world: World) -> list[Policy[Any]]:
        return [
            Timeout(1000),
            CircuitBreaker(failure_threshold=1, recovery_timeout=1),
            world.bulkhead,
        ]

    async def victim(world: World) -> None:
        world.failures = 1
        pipeline: Pipeline[Any] = world.stack.plain if is_plain else world.stack.watched
        try:
            await pipeline.call(world.work)
        except OSError:
            await trio.sleep(1)
            assert await pipeline.call(world.work, 7) == 7

    class Recovering(World):
        async def use_all(self) -> None:
            await trio.sleep(1)
            await super().use_all()

        def check(self) -> None:
            breaker: Any = self.stack.layers[1]
            assert breaker.state is CircuitState.CLOSED
            assert breaker.statistics().in_flight == 0
            if not is_plain:
                super().check()

    def scenario() -> Scenario:
        world = Recovering(layers)
        return Scenario(lambda _: victim(world), fresh_user=world.use_all, invariant=world.check)

    assert cancel_everywhere(scenario, seeds=range(2)).cancellations > 0


def test_refusals_of_a_full_line() -> None:
    """Two of five are refused, nothing of theirs is run, and nobody else pays for it."""

    def layers(world: World) -> list[Policy[Any]]:
        world.bulkhead = Bulkhead(PERMITS, queue_size=1)
        return [Fallback(value=INSTEAD), Timeout(1000), Retry(budget=world.budget), world.bulkhead]

    async def victim(world: World) -> None:
        results = list[object]()

        async def use() -> None:
            results.append(await world.stack.plain.call(world.work))

        async with trio.open_nursery() as nursery:
            for _ in range(PERMITS + 3):
                nursery.start_soon(use)
        assert sorted(results, key=str) == [1, 1, 1, INSTEAD, INSTEAD]

    def scenario() -> Scenario:
        world = World(layers)

        def check() -> None:
            fallback, timeout, retry, bulkhead = world.stack.statistics()
            assert world.running == bulkhead.borrowed == bulkhead.waiting == 0
            assert bulkhead.rejections == retry.given_up >= fallback.used
            assert (timeout.timed_out, fallback.failed) == (0, 0)
            assert world.budget.is_full

        return Scenario(lambda _: victim(world), fresh_user=world.use_all, invariant=check)

    assert cancel_everywhere(scenario, seeds=range(2)).cancellations > 0


def test_a_timeout_at_the_instant_of_the_cancellation() -> None:
    """The limits of an attempt and of the whole, and the caller's own, expire all at once."""

    async def main() -> None:
        world = World(lambda _: [Timeout(30), *standard(_)[1:]])
        world.hangs = 1
        with trio.move_on_after(30) as scope:
            await world.use()
        assert scope.cancelled_caught
        world.check()
        await world.use_all()
        world.check()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_what_the_whole_is_given_is_kept_to() -> None:
    """The total timeout of the pipeline ends a call that is anywhere: in line, or backing off."""

    def layers(world: World) -> list[Policy[Any]]:
        return [Timeout(2), *standard(world)[1:]]

    async def victim(world: World) -> None:
        world.failures = 9
        await world.use()

    cancel(layers, victim, OSError, OperationTimeoutError, others=0)
