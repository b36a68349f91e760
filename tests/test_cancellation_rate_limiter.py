"""RateLimiter, cancelled at every instant: no token is lost or won, and the line moves up."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import trio

from tests._scenarios import World
from tests._scenarios import cancel as cancel_job
from tests.test_rate_limiter_properties import Bucket
from trio_resilience import (
    Bulkhead,
    Constant,
    RateLimiter,
    RateLimitExceededError,
    Retry,
    Semaphore,
    run_with_limit,
)
from trio_resilience.testing import Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.test_rate_limiter import Limiter

    Operation = Callable[[], Awaitable[int]]
    User = Callable[[], Awaitable[object]]

pytestmark = [pytest.mark.watchdog(180), pytest.mark.exhaustive]


def exact(seconds: float) -> Fraction:
    """All that happens here happens at whole quarters of a second, or thirds."""
    return Fraction(seconds).limit_denominator(10**4)


def clock() -> Fraction:
    return exact(trio.current_time())


@attrs.define(eq=False)
class Visit:
    """One request: of whom, when it came, and when it was let in, or went away."""

    cost: int
    limits: frozenset[int]
    arrived: float = attrs.field(factory=trio.current_time)
    ended: float = math.inf
    has_passed: bool = False

    def pass_(self) -> None:
        self.ended, self.has_passed = trio.current_time(), True


@attrs.define(eq=False)
class Books:
    """Limiters, and everybody who came, from whom follows how the limiters must stand."""

    limiters: tuple[RateLimiter, ...]
    visits: list[Visit] = attrs.field(factory=list[Visit])

    def way(self, *limits: int, max_wait: float = math.inf) -> Limiter:
        if len(limits) == 1 and max_wait == math.inf:
            return self.limiters[limits[0]]
        return RateLimiter.all_of(*(self.limiters[n] for n in limits), max_wait=max_wait)

    async def visit(
        self,
        enter: Callable[[Visit], Awaitable[object]],
        cost: int = 1,
        limits: tuple[int, ...] = (0,),
    ) -> None:
        visit = Visit(cost, frozenset(limits))
        self.visits.append(visit)
        try:
            await enter(visit)
        finally:
            if not visit.has_passed:
                visit.ended = trio.current_time()

    async def acquire(self, cost: int = 1, limits: tuple[int, ...] = (0,)) -> None:
        async def enter(visit: Visit) -> None:
            await self.way(*limits).acquire(cost)
            visit.pass_()
            await pause()

        await self.visit(enter, cost, limits)

    async def block(self, limits: tuple[int, ...] = (0,)) -> None:
        async def enter(visit: Visit) -> None:
            async with self.way(*limits):
                visit.pass_()
                await pause()

        await self.visit(enter, 1, limits)

    async def call(self, limits: tuple[int, ...] = (0,)) -> None:
        async def operation(visit: Visit) -> None:
            visit.pass_()
            await pause()

        async def enter(visit: Visit) -> None:
            await self.way(*limits).call(operation, visit)

        await self.visit(enter, 1, limits)

    async def audit(self) -> None:
        """Raise unless everybody was let in as soon as possible, and the rest is still there."""
        buckets = [Bucket(Fraction(each.rate), each.burst) for each in self.limiters]
        passed = sorted((v for v in self.visits if v.has_passed), key=lambda visit: visit.ended)
        for visit in passed:
            when = self._turn_of(visit)
            mine = [buckets[n] for n in visit.limits]
            for bucket in mine:
                bucket.fill(max(when, bucket.filled_at))
            when = max(when, *(bucket.due(visit.cost) for bucket in mine))
            assert visit.ended == pytest.approx(float(when), abs=1e-6), "its turn was another"
            for bucket in mine:
                assert bucket.try_take(when, visit.cost), "one too many"
        for bucket, limiter in zip(buckets, self.limiters, strict=True):
            self._check(bucket, limiter)
        await pause()

    def _turn_of(self, visit: Visit) -> Fraction:
        """When all who came before it, and wait for the same, were gone."""
        before = itertools.takewhile(lambda other: other is not visit, self.visits)
        ends = [other.ended for other in before if other.limits & visit.limits]
        return exact(max([visit.arrived, *ends]))

    def _check(self, bucket: Bucket, limiter: RateLimiter) -> None:
        now = clock()
        bucket.fill(now)
        statistics = limiter.statistics()
        assert statistics.waiting == 0, "nobody waits"
        assert statistics.available == int(bucket.tokens), "tokens are back, and no more"
        due = float(max(Fraction(0), bucket.due(1) - now))
        assert limiter.retry_after == pytest.approx(due, abs=1e-6), "and so are parts of them"


def four(books: Books) -> list[User]:
    """Take two tokens at once, or one, in each form."""
    return [books.acquire, partial(books.acquire, 2), books.call, books.block]


def nobody(_: Books) -> list[User]:
    return []


def cancel(
    victim: Callable[[Books], Awaitable[object]],
    *expected: type[Exception],
    bursts: tuple[int, ...] = (2, 3),
    crowd: Callable[[Books], list[User]] = four,
) -> None:
    """Cancel *victim* everywhere, among a crowd of others."""
    __tracebackhide__ = True

    def scenario() -> Scenario:
        books = Books(tuple(RateLimiter(1, burst=burst) for burst in bursts))
        return Scenario(
            lambda _: victim(books),
            others=crowd(books),
            fresh_user=books.audit,
            expected=expected,
        )

    assert cancel_everywhere(scenario, seeds=range(4)).cancellations > 0


# --- one limit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [Books.acquire, Books.block, Books.call])
def test_one_among_others(form: Callable[[Books], Awaitable[None]]) -> None:
    """It may be the first in line, or the last, or not have to wait."""
    cancel(form)


@pytest.mark.parametrize("form", [Books.acquire, Books.block, Books.call])
def test_one_that_asks_again(form: Callable[[Books], Awaitable[None]]) -> None:
    async def victim(books: Books) -> None:
        for _ in range(3):
            await form(books)

    cancel(victim)


@pytest.mark.parametrize("form", [Books.acquire, Books.block, Books.call])
def test_one_that_nobody_competes_with(form: Callable[[Books], Awaitable[None]]) -> None:
    async def victim(books: Books) -> None:
        for _ in range(3):
            await form(books)

    cancel(victim, bursts=(1,), crowd=nobody)


def test_large_requests() -> None:
    """While one of them waits, tokens gather, for those behind it if it leaves."""

    async def victim(books: Books) -> None:
        await books.acquire(4)
        await books.acquire(3)

    def crowd(books: Books) -> list[User]:
        return [partial(books.acquire, cost) for cost in (1, 3, 4, 1)]

    cancel(victim, bursts=(4,), crowd=crowd)


def test_several_at_once() -> None:
    """One cancellation takes several out of the line, first, last and in between."""

    async def victim(books: Books) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(books.acquire, 2)
            nursery.start_soon(books.call)
            nursery.start_soon(books.block)

    cancel(victim)


@pytest.mark.parametrize("max_wait", [0, 1, 2.5])
def test_one_that_does_not_wait_for_long(max_wait: float) -> None:
    """It is refused, or let in, or cancelled: in each case the others are served as if alone."""

    async def victim(books: Books) -> None:
        books.limiters[0].max_wait = max_wait
        await books.acquire(2)
        await books.acquire(1)

    def crowd(books: Books) -> list[User]:
        return [partial(tolerate, partial(books.acquire, cost)) for cost in (1, 2, 1)]

    cancel(victim, RateLimitExceededError, bursts=(2,), crowd=crowd)


async def tolerate(form: Callable[[], Awaitable[object]]) -> None:
    """Try again until it is not refused."""
    while True:
        try:
            await form()
        except RateLimitExceededError as error:
            await pause()
            await trio.sleep(error.retry_after or 0)
        else:
            return


# --- several limits -----------------------------------------------------------------------------

BOTH, BACK = (0, 1), (1, 0)


@pytest.mark.parametrize("form", [Books.acquire, Books.block, Books.call])
def test_one_that_takes_from_two(form: Any) -> None:
    """Others take from the one, from the other, and from both."""

    def crowd(books: Books) -> list[User]:
        return [
            partial(books.acquire, 2, (1,)),
            partial(books.acquire, 1, BACK),
            partial(books.call, (0,)),
            partial(books.acquire, 2, BOTH),
            partial(books.block, (1,)),
        ]

    cancel(partial(form, limits=BOTH), crowd=crowd)


def test_one_in_the_middle_of_three() -> None:
    """Its leaving lets others move up that have nothing else in common."""

    def crowd(books: Books) -> list[User]:
        limits = [(0,), (2,), (0, 1), (1, 2), (0, 2)]
        return [partial(books.acquire, 1, each) for each in limits]

    async def victim(books: Books) -> None:
        await books.acquire(2, (0, 1, 2))

    cancel(victim, bursts=(2, 3, 2), crowd=crowd)


def test_one_that_takes_from_two_and_does_not_wait_for_long() -> None:
    async def victim(books: Books) -> None:
        both = books.way(*BOTH, max_wait=1)

        async def enter(visit: Visit) -> None:
            await both.acquire(2)
            visit.pass_()
            await pause()

        await books.visit(enter, 2, BOTH)
        await books.visit(enter, 2, BOTH)

    cancel(victim, RateLimitExceededError)


# --- the stack ----------------------------------------------------------------------------------


ORDERS = list(itertools.permutations(["bulkhead", "limiter", "retry"]))


@attrs.define(eq=False)
class Stack:
    """A bulkhead, a rate limiter and a retry, one in the other, and what they must stand at."""

    world: World
    order: tuple[str, ...]
    bulkhead: Bulkhead = attrs.field(factory=lambda: Bulkhead(1, queue_size=9))
    limiter: RateLimiter = attrs.field(factory=lambda: RateLimiter(1, burst=2))
    retry: Retry = attrs.field(factory=lambda: Retry(max_attempts=3, backoff=Constant(0.25)))
    bound: Semaphore = attrs.field(factory=lambda: Semaphore(2))
    calls: int = 0
    passed_at: list[Fraction] = attrs.field(factory=list[Fraction])

    async def operation(self, errors: list[OSError]) -> int:
        self.calls += 1
        return await self.world.work(error=errors.pop() if errors else None)

    def op(self, failures: int) -> Operation:
        """Return an operation that fails so many times, under all policies."""
        layers = {"bulkhead": self.bulkhead, "limiter": self.limiter, "retry": self.retry}
        call: Any = partial(self.operation, [OSError() for _ in range(failures)])
        for name in reversed(self.order):
            if name == "limiter":
                call = partial(self._count_passing, call)
            call = partial(layers[name].call, call)
        return call  # type: ignore[no-any-return]

    async def _count_passing(self, call: Operation) -> int:
        self.passed_at.append(clock())
        return await call()

    def check(self) -> None:
        bulkhead, bound = self.bulkhead.statistics(), self.bound.statistics()
        limiter, retry = self.limiter.statistics(), self.retry.statistics()
        assert (bulkhead.borrowed, bulkhead.waiting, bulkhead.rejections) == (0, 0, 0)
        assert (bulkhead.available, bound.available) == (1, 2)
        assert (bound.borrowed, bound.waiting) == (0, 0)
        assert (limiter.waiting, limiter.rejections) == (0, 0)
        assert self.calls == self.world.started
        assert (retry.given_up, self.bulkhead.is_idle, self.bound.is_idle) == (0, True, True)
        assert retry.recovered <= self.world.succeeded
        assert retry.attempts >= self.calls
        self._check_tokens()

    def _check_tokens(self) -> None:
        """Raise unless just those tokens are gone that were taken for something."""
        bucket = Bucket(Fraction(1), 2)
        for when in self.passed_at:
            assert bucket.try_take(when), "one too many"
        bucket.fill(clock())
        assert self.limiter.statistics().available == int(bucket.tokens)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("given", [True, False], ids=["given", "own"])
def test_a_stack_of_policies_in_a_bounded_job(order: tuple[str, ...], given: bool) -> None:
    """Whichever layer it is cancelled in, all of them are as if nobody waited or ran."""

    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        stack = Stack(world, order)
        world.checks.append(stack.check)
        ops = [stack.op(failures) for failures in (1, 0, 2)]
        results = await run_with_limit(nursery, ops, max_concurrency=stack.bound)
        assert results == [0, 0, 0]

    cancel_job(victim, given=given)
