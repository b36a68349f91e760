"""Keyed: what belongs to a run, to a cancelled call, or to a test's block ends with it."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.test_concurrency_interrupts import ctrl_c, press_everywhere, run
from tests.test_keyed import Slots, first, keep, numbers, use
from trio_resilience import BulkheadFullError, Constant, Retry, Semaphore, run_with_limit
from trio_resilience._keyed import Keyed
from trio_resilience.testing import Scenario, cancel_everywhere, pause
from trio_resilience.testing import test_mode as mode

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

# --- one run after the other --------------------------------------------------------------------


def test_it_outlives_a_run() -> None:
    """Made before any, it keeps its policies from one to the next, and can be shown outside."""
    slots = Slots()
    keyed = keep(slots, name="hosts")
    assert numbers(keyed) == (0, 0, 0)
    assert keyed.is_idle
    for _ in range(2):
        run(partial(use, keyed, "ab"))
    assert slots.made == [*"ab"]
    assert numbers(keyed) == (2, 0, 0)
    assert repr(keyed) == "Keyed(name='hosts': 2 of 3 keys, 0 in use)"
    slots.put("warm", "a")
    assert not keyed.is_idle
    assert keyed.is_disposable


def end(hold: Any) -> None:
    """Leave the block, which takes no time, in a run or outside of any."""
    with pytest.raises(StopIteration):
        hold.__aexit__(None, None, None).send(None)


def test_what_died_with_its_run_is_in_use_no_more() -> None:
    """Nor does its end, when it comes after that run or in the next, disturb others."""
    keyed = keep(Slots(), max_keys=1)
    left = [keyed.hold(key) for key in "abaa"]

    async def die() -> None:
        for hold in left:
            await hold.__aenter__()
        assert numbers(keyed) == (2, 2, 0)
        raise SystemExit

    async def live() -> None:
        end(left.pop())
        assert numbers(keyed) == (2, 0, 0)
        async with keyed.hold("a"):
            assert numbers(keyed) == (2, 1, 0)
            end(left.pop())
            await use(keyed, "bcd")
            assert numbers(keyed) == (1, 1, 3)

    with pytest.raises(SystemExit):
        run(die)
    assert numbers(keyed) == (2, 0, 0)
    assert keyed.is_idle
    end(left.pop())
    assert numbers(keyed) == (2, 0, 0)
    run(live)
    assert numbers(keyed) == (1, 0, 3)


class _Never:
    def __await__(self) -> Iterator[Any]:
        yield


async def never(_: str) -> None:
    await _Never()  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]


def test_a_call_that_died_with_its_run_is_in_use_no_more() -> None:
    """Its coroutine is closed when the next run uses the same key."""
    keyed, left = Keyed(lambda _: Retry(), key=first, max_keys=1), list[Any]()

    async def die() -> None:
        left.append(keyed.call(never, "a"))
        left[0].send(None)
        assert numbers(keyed) == (1, 1, 0)

    async def live() -> None:
        async with keyed.hold("a"):
            left[0].close()
            await use(keyed, "b")
            assert numbers(keyed) == (1, 1, 1)

    run(die)
    assert numbers(keyed) == (1, 0, 0)
    run(live)
    assert numbers(keyed) == (1, 0, 1)


def test_times_of_another_run_mean_nothing() -> None:
    """Trio's clock starts anew: what was used last in an earlier run has its time from then on."""
    slots = Slots()
    keyed = keep(slots, max_keys=9, idle_after=10)

    async def late() -> None:
        await use(keyed, "a")
        await trio.sleep(1000)
        await use(keyed, "bc")

    async def early() -> None:
        await use(keyed, "d")
        await trio.sleep(9.9)
        await use(keyed, "d")
        assert slots.kept == "bcd"
        await trio.sleep(0.1)
        await use(keyed, "d")
        assert slots.kept == "d"

    run(late)
    run(early)


def test_what_was_believed_in_another_run_is_not_believed_for_ever() -> None:
    """That all have to stay is looked into again after a tenth of a second of this run's time."""
    slots = Slots()
    keyed = keep(slots, max_keys=30)

    async def be_refused(pause: float) -> None:
        await trio.sleep(pause)
        await use(keyed, range(30))
        slots.put("stays", range(30))
        with pytest.raises(BulkheadFullError):
            await use(keyed, "x")

    async def late() -> None:
        await be_refused(1000)

    async def early() -> None:
        await be_refused(0)
        slots.put("idle", [25])
        await trio.sleep(0.11)
        await use(keyed, "x")

    run(late)
    run(early)


def test_the_order_of_use_survives() -> None:
    """Also of what was looked at, and of what was in use when its run died."""
    slots = Slots()
    keyed = keep(slots, max_keys=4)

    async def before() -> None:
        await use(keyed, "abcd")
        slots.put("stays", "a")
        slots.put("warm", "b")
        await use(keyed, "e")
        assert slots.kept == "abde"
        await keyed.hold("d").__aenter__()

    async def after() -> None:
        slots.put("idle", "ab")
        gone = list[str]()
        for key in "wxyz":
            kept = slots.kept
            await use(keyed, key)
            gone += set(kept) - set(slots.kept)
        assert gone == [*"abed"]

    run(before)
    run(after)


def test_two_runs_at_once_are_refused() -> None:
    """In the second thread it is an error, and the first goes on."""
    keyed, refused = keep(Slots()), list[BaseException]()

    def second() -> None:
        for fn in (partial(use, keyed, "b"), keyed.hold("b").__aenter__):
            with pytest.raises(RuntimeError, match="two runs of trio at once") as caught:
                run(fn)
            refused.append(caught.value)

    async def main() -> None:
        async with keyed.hold("a"):
            thread = threading.Thread(target=second)
            thread.start()
            await trio.to_thread.run_sync(thread.join)
            assert await trio.to_thread.run_sync(partial(numbers, keyed)) == (1, 1, 0)
        await use(keyed, "a")

    run(main)
    assert len(refused) == 2
    assert numbers(keyed) == (1, 0, 0)


# --- in a test's block --------------------------------------------------------------------------


async def test_a_tests_block_has_policies_of_its_own() -> None:
    """And what begins inside ends there, also if it outlives the block."""
    slots = Slots()
    keyed = keep(slots, max_keys=1)
    await use(keyed, "a")
    with mode(fresh=False):
        await use(keyed, "a")
    with mode():
        assert numbers(keyed) == (0, 0, 0)
        await use(keyed, "a")
        hold = keyed.hold("b")
        await hold.__aenter__()
        assert numbers(keyed) == (1, 1, 1)
        assert not keyed.is_idle
    assert numbers(keyed) == (1, 0, 0)
    assert slots.made == [*"aab"]
    async with keyed.hold("b"):
        await hold.__aexit__(None, None, None)
        assert numbers(keyed) == (1, 1, 1)


# --- cancelled everywhere, and Ctrl-C -----------------------------------------------------------


def hosts() -> Keyed[Any, Semaphore]:
    return Keyed(lambda _: Semaphore(1), key=first, max_keys=1)


async def work(_: object) -> None:
    await pause()


async def by_call(keyed: Keyed[Any, Semaphore], key: str) -> None:
    await keyed.call(work, key)


async def by_hold(keyed: Keyed[Any, Semaphore], key: str) -> None:
    async with keyed.hold(key) as semaphore, semaphore:
        await pause()


async def by_decorator(keyed: Keyed[Any, Semaphore], key: str) -> None:
    @keyed
    async def function(key: str) -> None:
        await keyed.call(work, f"{key}{key}")

    await function(key)


async def by_many(keyed: Keyed[Any, Semaphore], key: str) -> None:
    """Two of the three calls fail at first, and come back for their permit."""
    retry, failed = Retry(max_attempts=2, on=OSError, backoff=Constant(0)), set[str]()

    @keyed
    async def flaky(key: str) -> None:
        await pause()
        if key not in failed:
            failed.add(key)
            raise OSError

    async def fetch(key: str) -> None:
        await retry.call(flaky, key)

    await run_with_limit(None, [partial(fetch, each) for each in (key, "c", key)])


FORMS = [by_call, by_hold, by_decorator, by_many]
forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.watchdog(180)
def test_whoever_is_cancelled_leaves_nothing_in_use(form: Any) -> None:
    """At any instant: others come in, and what came on top of the bound is shed."""

    def make_scenario() -> Scenario:
        keyed = hosts()

        def check() -> None:
            assert numbers(keyed)[:2] == (1, 0)
            assert keyed.is_idle

        return Scenario(
            lambda _: form(keyed, "a"),
            others=[partial(form, keyed, "a"), partial(form, keyed, "b")],
            fresh_user=partial(form, keyed, "a"),
            invariant=check,
        )

    assert cancel_everywhere(make_scenario, seeds=range(2)).cancellations > 2


@pytest.mark.parametrize("form", [by_call, by_hold])
def test_whoever_is_refused_can_be_cancelled(form: Any) -> None:
    """Refused or cancelled, nothing is kept of it."""

    def make_scenario() -> Scenario:
        slots = Slots()
        keyed = keep(slots, max_keys=1)

        async def victim(_: trio.Nursery) -> None:
            await use(keyed, "a")
            slots.put("stays", "a")
            await pause()
            await form(keyed, "b")

        return Scenario(
            victim,
            fresh_user=partial(use, keyed, "a"),
            invariant=lambda: numbers(keyed) == (1, 0, 0),
            expected=(BulkheadFullError,),
        )

    assert cancel_everywhere(make_scenario, seeds=range(2)).cancellations > 2


async def pass_round(_: object) -> None:
    await trio.lowlevel.checkpoint()


@pytest.mark.watchdog(120)
# Between the call of an async function and its await, Ctrl-C leaves a coroutine behind anywhere.
@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
def test_ctrl_c_at_any_line() -> None:
    """One KeyboardInterrupt comes out, and nothing stays in use."""

    def scenario(found: list[str]) -> Callable[[], Awaitable[None]]:
        async def main() -> None:
            keyed = Keyed(lambda _: Semaphore(1), key=first, max_keys=1, idle_after=5)
            try:
                for key in "aba":
                    await keyed.call(pass_round, key)
                    async with keyed.hold(key):
                        await pass_round(key)
                    await trio.sleep(5)
            finally:
                if numbers(keyed)[1] or not keyed.is_idle or numbers(keyed)[0] > 1:
                    found.append(f"something is left: {keyed!r}")

        return main

    press_everywhere(scenario, lines=100)


@pytest.mark.parametrize("where", ["key", "factory", "operation"])
def test_what_users_wrote_is_open_to_ctrl_c(where: str) -> None:
    """It is raised in the middle of it, as it would be without a policy; nothing is in use."""

    def press(here: str) -> None:
        if here == where:
            ctrl_c()
            pytest.fail("Ctrl-C was held back")

    def key(value: str) -> str:
        press("key")
        return value

    def factory(_: str) -> Retry:
        press("factory")
        return Retry()

    async def op(_: str) -> None:
        press("operation")
        await trio.lowlevel.checkpoint()

    keyed = Keyed(factory, key=key)

    async def main() -> None:
        with pytest.raises(KeyboardInterrupt):
            await keyed.call(op, "a")
        assert numbers(keyed) == (where == "operation", 0, 0)

    run(main)
