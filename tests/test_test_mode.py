"""test_mode: policies that are quick and exact, in the tests of code that uses them."""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.test_retry import Script, errors
from trio_resilience import (
    Constant,
    Decorrelated,
    Exponential,
    Fibonacci,
    Linear,
    OperationTimeoutError,
    Retry,
    RetryStatistics,
    Timeout,
    TimeoutStatistics,
    run_with_limit,
    run_with_retry,
)
from trio_resilience.testing import test_mode as mode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from trio.testing import MockClock

# As programs have them: at module level.
retry = Retry(max_attempts=5)
timeout = Timeout(5)


@retry
async def load(script: Script) -> Any:
    return await script()


async def by_loop(script: Script) -> Any:
    result: Any = None
    async for attempt in retry.attempts():
        with attempt:
            result = await script()
    return result


async def by_count(script: Script) -> Any:
    return (await retry.call_counted(script)).result


forms = pytest.mark.parametrize("form", [load, by_loop, by_count])


def test_pytest_does_not_collect_it() -> None:
    """Though it is called test_*, and imported into tests."""
    assert mode.__name__ == "test_mode"
    assert not getattr(mode, "__test__", True)


# --- delays -------------------------------------------------------------------------------------


@forms
async def test_delays_are_exact(autojump_clock: MockClock, form: Any) -> None:
    """Without jitter: what the backoff would have drawn from."""
    script = Script([*errors(4)])
    with mode():
        assert await form(script) == "ok"
    assert script.began_at == [0, 1, 3, 7, 15]


@pytest.mark.parametrize("jitter", ["full", "equal", "none"])
@pytest.mark.parametrize("kind, total", [(Exponential, 7), (Linear, 6), (Fibonacci, 4)])
async def test_delays_of_every_backoff_are_exact(
    autojump_clock: MockClock, kind: Any, total: float, jitter: str
) -> None:
    """Whatever its jitter."""
    policy = Retry(max_attempts=4, backoff=kind(jitter=jitter))
    with mode():
        assert (await policy.call_counted(Script([*errors(3)]))).total_delay == total
    assert trio.current_time() == total


async def test_decorrelated_delays_are_exact(autojump_clock: MockClock) -> None:
    """The longest: three times the one before."""
    policy = Retry(max_attempts=5, backoff=Decorrelated(1, max_delay=20))
    with mode():
        assert (await policy.call_counted(Script([*errors(4)]))).total_delay == 3 + 9 + 20 + 20


async def test_a_hint_is_exact_too(autojump_clock: MockClock) -> None:
    """No tenth is added to it."""
    error = OSError("busy")
    error.retry_after = 40  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    with mode():
        assert (await retry.call_counted(Script([error]))).total_delay == 40
    with mode(delays=False):
        assert (await retry.call_counted(Script([error]))).total_delay == 0


@forms
async def test_delays_can_be_zero(autojump_clock: MockClock, form: Any) -> None:
    """All of them; the number of attempts stays."""
    script = Script([*errors(4)])
    with mode(delays=False):
        assert await form(script) == "ok"
    assert script.began_at == [0] * 5


async def test_without_delays_nothing_is_counted_as_delay(autojump_clock: MockClock) -> None:
    """A predicate's own wait, neither; and a near deadline is no reason to give up."""
    policy = Retry(max_attempts=5, on=lambda _: 30.0)
    with mode(delays=False), trio.move_on_after(0.5):
        assert (await policy.call_counted(Script([*errors(4)]))).total_delay == 0
    assert trio.current_time() == 0


async def test_jitter_can_stay(autojump_clock: MockClock) -> None:
    """Then the policy's own generator is used."""
    policy = Retry(max_attempts=5, rng=Random(1))
    with mode(jitter=True):
        first = (await policy.call_counted(Script([*errors(4)]))).total_delay
    assert first != 15
    again = Retry(max_attempts=5, rng=Random(1))
    assert (await again.call_counted(Script([*errors(4)]))).total_delay == first


async def test_the_policys_generator_is_left_alone(autojump_clock: MockClock) -> None:
    """Exact delays draw nothing from it."""
    rng = Random(1)
    before = rng.getstate()
    with mode():
        await Retry(rng=rng).call(Script(errors(2)))
    assert rng.getstate() == before


DRAWS: dict[str, Callable[[Random], float]] = {
    "random": lambda rng: rng.random(),
    "uniform": lambda rng: rng.uniform(1, 2),
    "triangular": lambda rng: rng.triangular(1, 2),
    "choice": lambda rng: rng.choice([1.0, 2.0, 3.0]),
    "randint": lambda rng: rng.randint(1, 3),
    "expovariate": lambda rng: min(rng.expovariate(1.0), 50.0),
    "gauss": lambda rng: abs(rng.gauss(1, 0.1)),
}


@pytest.mark.watchdog(5)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
async def test_a_backoff_of_ones_own_may_draw_in_any_way(
    autojump_clock: MockClock, draw: Callable[[Random], float]
) -> None:
    """It gets a generator that works like any other, and always draws the same."""

    def backoff(rng: Random) -> Iterator[float]:
        while True:
            yield draw(rng)

    policy = Retry(max_attempts=4, backoff=backoff)
    with mode():
        totals = {(await policy.call_counted(Script([*errors(3)]))).total_delay for _ in range(3)}
    assert len(totals) == 1


# --- attempts -----------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("most, calls", [(1, 1), (2, 2), (4, 4), (5, 5), (9, 5), (None, 5)])
async def test_attempts_are_capped(
    autojump_clock: MockClock, form: Any, most: int | None, calls: int
) -> None:
    """At the smaller of both numbers."""
    script = Script([*errors(9)])
    with mode(max_attempts=most), pytest.raises(OSError, match=f"failure {calls}"):
        await form(script)
    assert script.calls == calls


async def test_endless_retries_are_capped(autojump_clock: MockClock) -> None:
    """`max_attempts=None` as well."""
    with mode(max_attempts=3), pytest.raises(OSError, match="failure 3") as caught:
        await Retry(max_attempts=None).call(Script([*errors(9)]))
    assert caught.value.__notes__[0].startswith("retry: gave up after 3 attempts")


@pytest.mark.parametrize("value", [0, -1, 1.5, math.nan, True, "5"])
def test_a_bad_cap_is_refused(value: Any) -> None:
    """In the house's wording."""
    with pytest.raises((TypeError, ValueError), match=r"^`max_attempts` must be "):
        mode(max_attempts=value).__enter__()


@pytest.mark.parametrize("option", ["jitter", "delays", "fresh"])
@pytest.mark.parametrize("value", [None, 0, 1, "no"])
def test_flags_are_bools(option: str, value: object) -> None:
    """So that `delays=0.5` is not taken for a yes."""
    with pytest.raises(TypeError, match=rf"^`{option}` must be True or False, got "):
        mode(**{option: value}).__enter__()  # type: ignore[arg-type]


# --- state --------------------------------------------------------------------------------------


async def test_statistics_start_afresh(autojump_clock: MockClock) -> None:
    """In the block, and they are what they were before it when it has ended."""
    policy, limit = Retry(), Timeout(5)
    await policy.call(Script())
    await limit.call(trio.sleep, 1)
    with mode():
        assert policy.statistics() == RetryStatistics(0, 0, 0, 0)
        assert limit.statistics() == TimeoutStatistics(0, 0)
        await policy.call(Script(errors(1)))
        with pytest.raises(OperationTimeoutError):
            await limit.call(trio.sleep, 9)
        assert policy.statistics() == RetryStatistics(1, 2, 1, 0)
        assert limit.statistics() == TimeoutStatistics(1, 1)
    assert policy.statistics() == RetryStatistics(1, 1, 0, 0)
    assert limit.statistics() == TimeoutStatistics(1, 0)
    with mode():
        assert policy.statistics() == RetryStatistics(0, 0, 0, 0)


async def test_state_can_be_kept(autojump_clock: MockClock) -> None:
    """`fresh=False` counts on."""
    policy = Retry()
    await policy.call(Script())
    with mode(fresh=False):
        await policy.call(Script())
        assert policy.statistics().calls == 2
    assert policy.statistics().calls == 2


async def test_timeouts_stay_what_they_are(autojump_clock: MockClock) -> None:
    """Only waits between attempts are changed."""
    with mode(delays=False), pytest.raises(OperationTimeoutError):
        await timeout.call(trio.sleep_forever)
    assert trio.current_time() == 5


# --- scope --------------------------------------------------------------------------------------


async def test_it_ends_with_its_block(autojump_clock: MockClock) -> None:
    """Also when the block raises."""
    with pytest.raises(KeyError), mode(max_attempts=1):
        raise KeyError
    script = Script([*errors(9)])
    with pytest.raises(OSError, match="failure 5"):
        await load(script)


async def test_tasks_that_the_block_starts_are_in_it(autojump_clock: MockClock) -> None:
    """And operations, wherever their nursery lies; other tasks are not."""
    inside, outside = Script([*errors(1)]), Script([*errors(1)])
    started = trio.Event()

    async def neighbour() -> None:
        await started.wait()
        await Retry(backoff=Constant(3)).call(outside)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(neighbour)
        with mode(delays=False):
            started.set()
            await run_with_limit(nursery, [inside], policy=Retry(backoff=Constant(3)))
            async with trio.open_nursery() as children:
                children.start_soon(load, Script([*errors(1)]))
            await run_with_retry(nursery, Script([*errors(1)]))
            assert trio.current_time() == 0
    assert (inside.began_at, outside.began_at) == ([0, 0], [0, 3])


async def test_a_task_that_outlives_the_block_is_not_in_it(autojump_clock: MockClock) -> None:
    """It changes nothing once the block has ended."""
    script = Script([*errors(1)])

    async def later() -> None:
        await trio.sleep(1)
        await Retry(backoff=Constant(3)).call(script)

    async with trio.open_nursery() as nursery:
        with mode(delays=False):
            nursery.start_soon(later)
            await trio.lowlevel.checkpoint()
    assert script.began_at == [1, 4]


async def test_of_nested_blocks_the_inner_one_counts(autojump_clock: MockClock) -> None:
    """And the outer one again after it."""
    calls = list[int]()
    with mode(max_attempts=2):
        for context in (mode(max_attempts=3), mode()):
            with context:
                script = Script([*errors(9)])
                with pytest.raises(OSError, match="failure"):
                    await load(script)
            calls.append(script.calls)
        script = Script([*errors(9)])
        with pytest.raises(OSError, match="failure 2"):
            await load(script)
    assert calls == [3, 5]


async def test_a_task_that_outlives_the_inner_block_is_in_the_outer_one(
    autojump_clock: MockClock,
) -> None:
    """Which it was started in as well, and which has not ended."""
    script = Script([*errors(9)])

    async def later() -> None:
        await trio.sleep(1)
        with pytest.raises(OSError, match="failure 2"):
            await load(script)

    with mode(max_attempts=2):
        async with trio.open_nursery() as nursery:
            with mode(max_attempts=3):
                nursery.start_soon(later)
                await trio.lowlevel.checkpoint()
    assert script.calls == 2


def test_it_may_surround_a_run() -> None:
    """For tests that call `trio.run` themselves."""
    script = Script([*errors(4)])
    with mode(delays=False):
        trio.run(load, script, clock=trio.testing.MockClock())
        assert retry.statistics() == RetryStatistics(1, 5, 1, 0)
    assert script.calls == 5
