"""Retry and timeout, cancelled at every instant: obeyed at once, and counted as nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import pytest
import trio

from tests._scenarios import World, cancel
from trio_resilience import (
    Constant,
    OperationTimeoutError,
    RetriesExhaustedError,
    Retry,
    Timeout,
    run_with_retry,
)
from trio_resilience.testing import pause

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Operation = Callable[[], Awaitable[int]]
    Form = Callable[[Retry, Operation], Awaitable[int]]
    TimeoutForm = Callable[[Timeout, Operation], Awaitable[int]]

pytestmark = pytest.mark.watchdog(180)
given_or_not = pytest.mark.parametrize("given", [True, False], ids=["given", "own"])


@attrs.define(eq=False)
class Ledger:
    """Calls under a policy, as their callers saw them end."""

    returned: int = 0
    raised: int = 0
    cancelled: int = 0

    async def enter(self, form: Callable[[], Awaitable[object]]) -> None:
        try:
            await form()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        except Exception:
            self.raised += 1
            raise
        else:
            self.returned += 1

    @property
    def calls(self) -> int:
        return self.returned + self.raised + self.cancelled


async def call(retry: Retry, op: Operation) -> int:
    return await retry.call(op)


async def call_counted(retry: Retry, op: Operation) -> int:
    return (await retry.call_counted(op)).result


async def attempts(retry: Retry, op: Operation) -> int:
    result = -1
    async for attempt in retry.attempts():
        with attempt:
            result = await op()
            attempt.set_result(result)
    return result


async def decorated(retry: Retry, op: Operation) -> int:
    @retry
    async def function() -> int:
        return await op()

    return await function()


forms = pytest.mark.parametrize("form", [call, call_counted, attempts, decorated])


def flaky(world: World, failures: int) -> Operation:
    """Return an operation that fails so many times before it succeeds."""
    errors = [OSError() for _ in range(failures)]

    async def op() -> int:
        return await world.work(7, 2, errors.pop() if errors else None)

    return op


def check_retry(retry: Retry, ledger: Ledger, world: World) -> None:
    statistics = retry.statistics()
    assert statistics.attempts == world.started
    assert statistics.calls <= ledger.calls  # a loop may be cancelled before its first attempt
    assert statistics.given_up == ledger.raised
    assert statistics.recovered <= ledger.returned


# --- retry ---------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("failures", [0, 1, 2, 3])
def test_a_retry(form: Form, failures: int) -> None:
    """It is cancelled in an attempt or between two; then it neither succeeded nor gave up."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        retry, ledger = Retry(max_attempts=3, backoff=Constant(1)), Ledger()
        world.checks.append(lambda: check_retry(retry, ledger, world))
        await ledger.enter(lambda: form(retry, flaky(world, failures)))

    cancel(victim, *([OSError] if failures else []))


@forms
def test_a_retry_without_delay(form: Form) -> None:
    async def victim(world: World, _: trio.Nursery | None) -> None:
        retry, ledger = Retry(max_attempts=None, backoff=Constant(0)), Ledger()
        world.checks.append(lambda: check_retry(retry, ledger, world))
        await ledger.enter(lambda: form(retry, flaky(world, 2)))

    cancel(victim, OSError)


@forms
@pytest.mark.parametrize("max_attempts", [2, 3])
def test_a_retry_of_refused_results(form: Form, max_attempts: int) -> None:
    async def victim(world: World, _: trio.Nursery | None) -> None:
        answers, ledger = [3, 2, 1], Ledger()

        async def op() -> int:
            return await world.work(answers.pop(0))

        retry = Retry(max_attempts=max_attempts, retry_result=lambda n: n > 1, backoff=Constant(1))
        world.checks.append(lambda: check_retry(retry, ledger, world))
        await ledger.enter(lambda: form(retry, op))

    cancel(victim, *([RetriesExhaustedError] if max_attempts == 2 else []))


@forms
def test_a_retry_whose_attempts_take_too_long(form: Form) -> None:
    """Its own limits cancel the operation too; they are told apart from the caller's."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        ledger = Ledger()
        retry = Retry(
            max_attempts=None, attempt_timeout=1, total_timeout=3.5, backoff=Constant(0.5)
        )
        world.checks.append(lambda: check_retry(retry, ledger, world))
        with pytest.raises(OperationTimeoutError):
            await ledger.enter(lambda: form(retry, world.hang))
        assert world.started == 3

    cancel(victim)


@forms
def test_a_retry_that_others_share(form: Form) -> None:
    """The policy has no state that a cancelled call could leave behind."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        retry, ledger = Retry(max_attempts=2, backoff=Constant(1)), Ledger()
        world.checks.append(lambda: check_retry(retry, ledger, world))

        async def enter() -> None:
            await ledger.enter(lambda: form(retry, flaky(world, 1)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(enter)
            nursery.start_soon(enter)
            await enter()

    cancel(victim, OSError)


def test_a_retry_whose_operation_fails_as_it_is_cancelled() -> None:
    """Its clean-up turns the cancellation into an error, which would deserve another try."""

    async def victim(world: World, _: trio.Nursery | None) -> None:
        retry = Retry(max_attempts=None, backoff=Constant(1))
        world.checks.append(lambda: _given_up_is(retry, 0))

        async def op() -> int:
            try:
                return await world.work()
            finally:
                if trio.current_effective_deadline() < trio.current_time():
                    raise OSError

        assert await retry.call(op) == 0

    cancel(victim)


@given_or_not
@pytest.mark.parametrize("failures", [0, 2, 3])
def test_run_with_retry(given: bool, failures: int) -> None:
    async def victim(world: World, nursery: trio.Nursery | None) -> None:
        result = await run_with_retry(nursery, flaky(world, failures), jitter=False)
        assert (result.result, result.attempts) == (7, 1 + failures)

    cancel(victim, *([OSError] if failures else []), given=given)


# --- timeout -------------------------------------------------------------------------------------


async def timeout_call(timeout: Timeout, op: Operation) -> int:
    return await timeout.call(op)


async def timeout_scope(timeout: Timeout, op: Operation) -> int:
    with timeout.scope():
        return await op()
    raise AssertionError


timeout_forms = pytest.mark.parametrize("form", [timeout_call, timeout_scope])


def check_timeout(timeout: Timeout, ledger: Ledger) -> None:
    assert timeout.statistics().calls == ledger.calls
    assert timeout.statistics().timed_out == ledger.raised


@timeout_forms
def test_an_operation_in_time(form: TimeoutForm) -> None:
    async def victim(world: World, _: trio.Nursery | None) -> None:
        timeout, ledger = Timeout(1), Ledger()
        world.checks.append(lambda: check_timeout(timeout, ledger))
        await ledger.enter(lambda: form(timeout, world.work))

    cancel(victim)


@timeout_forms
def test_an_operation_that_takes_too_long(form: TimeoutForm) -> None:
    async def victim(world: World, _: trio.Nursery | None) -> None:
        timeout, ledger = Timeout(1), Ledger()
        world.checks.append(lambda: check_timeout(timeout, ledger))
        with pytest.raises(OperationTimeoutError):
            await ledger.enter(lambda: form(timeout, world.hang))
        await pause()

    cancel(victim)


@timeout_forms
def test_a_timeout_within_a_retry_within_a_timeout(form: TimeoutForm) -> None:
    async def victim(world: World, _: trio.Nursery | None) -> None:
        inner, retry = Timeout(1), Retry(max_attempts=None, backoff=Constant(0))
        outer, ledger = Timeout(2.5), Ledger()
        world.checks.append(lambda: check_timeout(outer, ledger))
        with pytest.raises(OperationTimeoutError):
            await ledger.enter(
                lambda: form(outer, lambda: retry.call(lambda: inner.call(world.hang)))
            )
        assert inner.statistics().timed_out == 2

    cancel(victim)


def _given_up_is(retry: Retry, number: int) -> None:
    assert retry.statistics().given_up == number
