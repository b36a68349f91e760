"""A configuration that changes while the program runs: all of it or nothing; nobody is lost."""

from __future__ import annotations

import os
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.operations import Gauge, fails, foreign_nursery, returns
from trio_resilience import (
    Bulkhead,
    CircuitBreaker,
    CircuitOpenError,
    CircuitState,
    ConfigError,
    Event,
    RateLimiter,
    Retry,
    RetryBudget,
    Timeout,
    subscribe,
)
from trio_resilience._config_text import read_toml
from trio_resilience._events import ConfigReloaded, ConfigReloadFailed
from trio_resilience._registry import RegisteredPolicy, Registry
from trio_resilience.testing import Scenario, cancel_everywhere, pause

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "resilience.toml"


def write(path: Path, text: str) -> None:
    """Write the file so that its time of modification is another one, however fast that is."""
    before = path.stat().st_mtime_ns if path.exists() else 0
    path.write_text(text)
    os.utime(path, ns=(before + 1_000_000, before + 1_000_000))


def layer(policy: RegisteredPolicy, kind: type[Any]) -> Any:
    """Return the first layer of that class."""
    return next(each for each in policy.pipeline.layers if isinstance(each, kind))


# --- what stays, and what is new ------------------------------------------------------------------


def test_a_reload_changes_what_handles_do(path: Path) -> None:
    """It tells whose policies are others now; those that are gone or new as well."""
    write(path, "policies = { a = { timeout = 1 }, b = {}, c = {} }")
    registry = Registry.load(path)
    a = registry["a"]
    write(path, "policies = { a = { timeout = 2 }, b = {}, d = {} }")
    assert registry.reload() == ("a", "c", "d")
    assert registry["a"] is a
    assert layer(a, Timeout).seconds == 2
    assert list(registry) == ["a", "b", "d"]
    assert registry.reload() == ()
    assert registry.statistics().reloads == 2


async def test_what_has_the_same_settings_keeps_its_state(path: Path) -> None:
    """Although other layers around it are new, or stand in another order."""
    text = "[policies.a]\nbreaker = { failure_threshold = 1 }\nbulkhead = 3\nrate_limit = 5\n"
    write(path, text)
    registry = Registry.load(path)
    policy = registry["a"]
    kinds = (CircuitBreaker, Bulkhead, RateLimiter)
    before = [layer(policy, kind) for kind in kinds]
    with pytest.raises(CircuitOpenError):
        await policy.call(fails, OSError())
    old = policy.pipeline
    write(path, f"{text}timeout = 77")
    assert registry.reload() == ("a",)
    assert policy.pipeline is not old
    assert [layer(policy, kind) for kind in kinds] == before
    assert layer(policy, Timeout).seconds == 77
    write(path, f'{text}layers = ["rate_limit", "breaker", "bulkhead"]')
    registry.reload()
    assert list(policy.pipeline.layers) == [before[2], before[0], before[1]]
    with pytest.raises(CircuitOpenError):
        await policy.call(returns, 1)


def test_what_has_other_settings_is_new(path: Path) -> None:
    """A circuit that is open by another rule says nothing about this one."""
    write(path, "[policies.a]\nbreaker = { failure_threshold = 1 }")
    registry = Registry.load(path)
    before = layer(registry["a"], CircuitBreaker)
    write(path, "[policies.a]\nbreaker = { failure_threshold = 2 }")
    registry.reload()
    assert layer(registry["a"], CircuitBreaker) is not before


def test_nothing_is_new_when_nothing_has_changed(path: Path) -> None:
    """Whatever the file looks like: it is the settings that count."""
    write(path, "policies.a.timeout = 60")
    registry = Registry.load(path)
    before = registry["a"].pipeline
    write(path, "defaults = { timeout = '1m' }\npolicies = { a = { } }")
    assert registry.reload() == ()
    assert registry["a"].pipeline is before


def test_a_budget_keeps_its_tokens_and_its_retries(path: Path) -> None:
    """With other settings it is a new one, and so are the retries that take from it."""
    text = "[budgets.x]\nmax_tokens = {}\n[policies.a]\nretry.budget = 'x'\ntimeout = {}"
    write(path, text.format(5, 1))
    registry = Registry.load(path)
    retry = layer(registry["a"], Retry)
    assert retry.budget.try_take()
    write(path, text.format(5, 2))
    registry.reload()
    assert layer(registry["a"], Retry) is retry
    write(path, text.format(6, 2))
    registry.reload()
    assert layer(registry["a"], Retry).budget.statistics().tokens == 6


def test_a_budget_of_the_program_is_used_as_it_is() -> None:
    """Over reloads, too."""
    budget = RetryBudget(0.3)
    a = {"retry": {"budget": "x"}}
    registry = Registry.load({"budgets": {"x": budget}, "policies": {"a": a}})
    assert layer(registry["a"], Retry).budget is budget
    assert registry.reload() == ()


def test_another_source_may_take_the_place_of_the_first(path: Path) -> None:
    """Also one of another kind. From then on it is that one which is read again."""
    write(path, "policies.a.timeout = 1")
    registry = Registry.load(path)
    mapping: dict[str, Any] = {"policies": {"a": {"timeout": 2}}}
    assert registry.reload(mapping) == ("a",)
    mapping["policies"]["a"]["timeout"] = 3
    assert registry.reload() == ("a",)
    assert layer(registry["a"], Timeout).seconds == 3
    with pytest.raises(ConfigError):
        registry.reload({"policies": 3})
    assert registry.reload() == ()


def test_what_the_program_defines_stays_and_gets_the_new_defaults(path: Path) -> None:
    """A file that says something else of it is refused."""
    write(path, "policies = {}")
    registry = Registry.load(path)
    mail = registry.define("mail", {"retry": False})
    write(path, "defaults.timeout = 3")
    assert registry.reload() == ("mail",)
    assert layer(mail, Timeout).seconds == 3
    write(path, "policies.mail.timeout = 3")
    with pytest.raises(ConfigError, match=r"policies.mail: is defined in the program, too, with"):
        registry.reload()


# --- what fails -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("policies = {", "is no TOML"),
        ("policies.a.timeout = -1\npolicies.b.timeout = 1", "policies.a.timeout: `seconds` must"),
        ("policies.b.timeout = 9", "policies.a: is required, but missing"),
    ],
)
def test_a_reload_that_fails_changes_nothing(path: Path, text: str, words: str) -> None:
    """Nor one in which a name is gone that somebody uses. The next may succeed."""
    good = "policies = { a = { timeout = 1 }, b = { timeout = 1 } }"
    write(path, good)
    registry = Registry.load(path)
    a = registry["a"]
    before = a.pipeline
    write(path, text)
    with pytest.raises(ConfigError, match=words) as caught:
        registry.reload()
    assert a.pipeline is before
    assert layer(registry["b"], Timeout).seconds == 1
    now = registry.statistics()
    assert (now.reloads, now.failed_reloads, now.last_error) == (0, 1, caught.value)
    write(path, good)
    assert registry.reload() == ()
    assert registry.statistics().last_error is None


async def test_a_listener_hears_of_reloads(path: Path, autojump_clock: MockClock) -> None:
    """Of those that succeed, with the names; and of those that fail, with the error."""
    write(path, "policies.a.timeout = 1")
    registry = Registry.load(path, name="policies")
    heard: list[Any] = []
    with subscribe(heard.append):
        write(path, "policies.a.timeout = 2")
        registry.reload()
        write(path, "policies.a.timeout = -2")
        with pytest.raises(ConfigError) as caught:
            registry.reload()
    succeeded, failed = heard
    assert isinstance(succeeded, ConfigReloaded)
    assert isinstance(failed, ConfigReloadFailed)
    assert (succeeded.policy, succeeded.operation) == ("policies", "reload")
    assert succeeded.changed == ("a",)
    assert failed.error is caught.value


def test_outside_of_a_run_nobody_is_told(path: Path) -> None:
    """There is no clock to tell the time by."""
    write(path, "policies = {}")
    registry = Registry.load(path)
    heard: list[Event] = []
    with subscribe(heard.append):
        registry.reload()
        write(path, "policies = 3")
        with pytest.raises(ConfigError):
            registry.reload()
    assert heard == []


# --- under load -----------------------------------------------------------------------------------


async def test_a_reload_with_a_thousand_calls_in_flight_loses_and_fails_none(
    path: Path, autojump_clock: MockClock
) -> None:
    """Those that run or wait end under the pipeline that they began with; new ones use the new."""
    text = "[policies.a]\ntimeout = 1000\nattempt_timeout = 100\nbulkhead = {}\nretry = {}"
    write(path, text.format(100, "false"))
    registry = Registry.load(path)
    gauge = Gauge()

    @registry["a"]
    async def work(index: int) -> int:
        return await gauge.run(index)

    results: list[int] = []

    async def collect(index: int) -> None:
        results.append(await work(index))

    async with trio.open_nursery() as nursery:
        for index in range(1000):
            nursery.start_soon(collect, index)
        await wait_all_tasks_blocked()
        old = layer(registry["a"], Bulkhead)
        for size in (50, 60, 70):
            write(path, text.format(size, "{ max_attempts = 2 }"))
            registry.reload()
        assert old.statistics().borrowed == 100
        assert old.statistics().waiting == 900
        for index in range(1000, 1070):
            nursery.start_soon(collect, index)
        await wait_all_tasks_blocked()
        assert gauge.running == 170
    assert sorted(results) == list(range(1070))
    assert (gauge.failed, gauge.cancelled) == ([], [])
    assert old.statistics().borrowed == 0
    assert layer(registry["a"], Bulkhead).max_concurrency == 70


async def test_a_reload_that_fails_under_load_disturbs_nobody(
    path: Path, autojump_clock: MockClock
) -> None:
    """A thousand calls in flight end as they would have, and so do new ones; an event says so."""
    write(path, "policies.a.bulkhead = 100")
    registry = Registry.load(path)
    policy, gauge, heard = registry["a"], Gauge(), list[Event]()
    before = policy.pipeline

    async def call(index: int) -> None:
        await policy.call(gauge.run, index, 0.1)

    async with trio.open_nursery() as nursery:
        for index in range(1000):
            nursery.start_soon(call, index)
        await wait_all_tasks_blocked()
        write(path, "policies.a = { bulkhead = 0, retry.max_attempts = 0, timeut = 1 }")
        with subscribe(heard.append), pytest.raises(ConfigError):
            registry.reload()
        nursery.start_soon(call, 1000)
    assert policy.pipeline is before
    assert sorted(gauge.finished) == list(range(1001))
    assert (gauge.failed, gauge.cancelled) == ([], [])
    (event,) = heard
    assert isinstance(event, ConfigReloadFailed)
    assert isinstance(event.error, ConfigError)
    assert len(event.error.errors) == 3


async def test_calls_in_flight_are_judged_by_a_circuit_that_stays(
    path: Path, autojump_clock: MockClock
) -> None:
    """Those that began before the reload as well as those that begin after it; a probe, too."""
    text = "policies.a = {{ breaker = {{ failure_threshold = 2 }}, retry = false, timeout = {} }}"
    write(path, text.format(50))
    registry = Registry.load(path)
    policy, gauge = registry["a"], Gauge()
    breaker, states = layer(policy, CircuitBreaker), list[CircuitState]()

    async def fail(seconds: float) -> None:
        with pytest.raises(OSError, match="down"):
            await policy.call(gauge.run, 1, seconds, OSError("down"))

    async def probe() -> None:
        assert await policy.call(gauge.run, 2, 3) == 2

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fail, 2)
        await wait_all_tasks_blocked()
        write(path, text.format(40))
        assert registry.reload() == ("a",)
        assert breaker.statistics().in_flight == 1
        nursery.start_soon(fail, 1)
    assert layer(policy, CircuitBreaker) is breaker
    states.append(breaker.state)
    await trio.sleep(60)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe)
        await wait_all_tasks_blocked()
        write(path, text.format(30))
        assert registry.reload() == ("a",)
        with pytest.raises(CircuitOpenError):
            await policy.call(returns, 1)
    states.append(breaker.state)
    assert states == [CircuitState.OPEN, CircuitState.CLOSED]


# --- watching the file ----------------------------------------------------------------------------


async def _until(condition: Callable[[], bool]) -> None:
    """Wait on the virtual clock, which stands still while a thread looks at the file."""
    while not condition():
        await trio.sleep(0.01)
        await trio.to_thread.run_sync(lambda: None)


async def test_a_file_that_has_changed_is_reloaded(path: Path, autojump_clock: MockClock) -> None:
    """Its mistakes are told, once for each change, and its policies stay as they were."""
    write(path, "policies.a.timeout = 1")
    registry = Registry.load(path)
    policy = registry["a"]
    heard: list[Any] = []
    with subscribe(heard.append):
        async with trio.open_nursery() as nursery, registry.open(nursery, watch=5) as opened:
            assert opened is registry
            write(path, "policies.a.timeout = 2")
            await _until(lambda: len(heard) == 1)
            assert layer(policy, Timeout).seconds == 2
            write(path, "policies.a.timeout = -2")
            await _until(lambda: len(heard) == 2)
            await _looks(20)
            path.unlink()
            await _until(lambda: len(heard) == 3)
            await _looks(20)
            assert layer(policy, Timeout).seconds == 2
            write(path, "policies.a.timeout = 3")
            await _until(lambda: len(heard) == 4)
            assert layer(policy, Timeout).seconds == 3
    assert [type(event) for event in heard] == [
        ConfigReloaded,
        ConfigReloadFailed,
        ConfigReloadFailed,
        ConfigReloaded,
    ]
    assert "can't be read" in str(heard[2].error)
    assert "must be >= 0" in str(heard[1].error)


async def _looks(seconds: float) -> None:
    """Let so much time pass, and the threads that were started meanwhile end."""
    for _ in range(int(seconds)):
        await trio.sleep(1)
        await trio.to_thread.run_sync(lambda: None)


async def test_a_change_between_loading_and_watching_is_found(
    path: Path, autojump_clock: MockClock
) -> None:
    """Modules are imported long before a nursery is open."""
    write(path, "policies.a.timeout = 1")
    registry = Registry.load(path)
    policy = registry["a"]
    write(path, "policies.a.timeout = 2")
    async with registry.open(None, watch=1):
        await _until(lambda: layer(policy, Timeout).seconds == 2)


@pytest.mark.parametrize("text", ["policies.a.timeout = 2", "policies.a.timeout = -2", "?"])
async def test_what_was_reloaded_meanwhile_wins_over_what_the_watcher_has_read(
    path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Or else what is older would stay, for the file does not change again."""
    write(path, "policies.a.timeout = 1")
    registry = Registry.load(path)
    policy = registry["a"]
    real = trio.to_thread.run_sync
    reads: list[object] = []

    async def slow(fn: Any, *args: Any, **options: Any) -> Any:
        try:
            return await real(fn, *args, **options)
        finally:
            if fn is read_toml:
                reads.append(fn)
                write(path, "policies.a.timeout = 3")
                registry.reload()

    async with trio.open_nursery() as nursery, registry.open(nursery, watch=1):
        monkeypatch.setattr(trio.to_thread, "run_sync", slow)
        write(path, text)
        await _until(lambda: bool(reads))
        await _looks(5)
    assert len(reads) == 1
    assert layer(policy, Timeout).seconds == 3
    assert registry.statistics().failed_reloads == 0


async def test_a_watcher_has_nothing_to_do_while_the_source_is_no_file(
    path: Path, autojump_clock: MockClock
) -> None:
    """It goes on when it is one again."""
    write(path, "policies.a.timeout = 1")
    registry = Registry.load(path)
    policy = registry["a"]
    async with trio.open_nursery() as nursery, registry.open(nursery, watch=1):
        registry.reload({"policies": {"a": {"timeout": 2}}})
        await _looks(5)
        assert layer(policy, Timeout).seconds == 2
        registry.reload(path)
        write(path, "policies.a.timeout = 4")
        await _until(lambda: layer(policy, Timeout).seconds == 4)


async def test_when_the_block_has_ended_nothing_watches(
    path: Path, autojump_clock: MockClock
) -> None:
    """It ends at once, with the error of its body if that has one."""
    write(path, "policies = {}")
    registry = Registry.load(path)
    async with trio.open_nursery() as nursery:
        with pytest.raises(OSError, match="mine"):
            async with registry.open(nursery, watch=1):
                assert len(nursery.child_tasks) == 1
                raise OSError("mine")
        assert len(nursery.child_tasks) == 0
        async with registry.open(nursery):
            await trio.sleep(100)
        assert len(nursery.child_tasks) == 0
    assert registry.statistics().reloads == 0


async def test_a_nursery_that_is_cancelled_ends_the_watch_and_not_the_block(
    path: Path, autojump_clock: MockClock
) -> None:
    """The policies go on working."""
    write(path, "policies.a.timeout = 1")
    registry = Registry.load(path)
    async with foreign_nursery() as nursery, registry.open(nursery, watch=1):
        nursery.cancel_scope.cancel()
        await wait_all_tasks_blocked()
        write(path, "policies.a.timeout = 2")
        await trio.sleep(10)
        assert await registry["a"].call(returns, 1) == 1
    assert registry.statistics().reloads == 0


async def test_what_stops_the_program_comes_out_of_the_block(
    path: Path, autojump_clock: MockClock
) -> None:
    """A listener that raises Ctrl-C, for instance; it does not crash the nursery."""
    write(path, "policies.a.timeout = 1")
    registry = Registry.load(path)

    def interrupt(event: Event) -> None:
        raise KeyboardInterrupt

    async with trio.open_nursery() as nursery:
        with pytest.raises(BaseExceptionGroup) as caught, subscribe(interrupt):
            async with registry.open(nursery, watch=1):
                write(path, "policies.a.timeout = 2")
                await _until(lambda: registry.statistics().reloads == 1)
                await _looks(3)
        assert not nursery.child_tasks
    assert caught.group_contains(KeyboardInterrupt)


async def test_ctrl_c_is_not_for_the_watcher(path: Path, autojump_clock: MockClock) -> None:
    """Nobody would hear of it before the block ends, which in a server is never."""
    write(path, "policies.a.timeout = 1")
    registry = Registry.load(path)
    heard: list[bool] = []
    with subscribe(lambda _: heard.append(trio.lowlevel.currently_ki_protected())):
        async with trio.open_nursery() as nursery, registry.open(nursery, watch=1):
            write(path, "policies.a.timeout = 2")
            await _until(lambda: bool(heard))
    assert heard == [True]


async def test_a_block_is_refused_that_has_nothing_to_watch_or_no_nursery(path: Path) -> None:
    """At once, before it is entered; and one block serves once."""
    registry = Registry.load({})
    with pytest.raises(ValueError, match="`watch` must be None where the configuration comes from"):
        registry.open(None, watch=1)
    with pytest.raises(TypeError, match=r"`nursery` must be a trio.Nursery or None"):
        registry.open(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    write(path, "")
    with pytest.raises(ValueError, match="`watch` must be > 0, got 0"):
        Registry.load(path).open(None, watch=0)
    block = registry.open(None)
    async with block:
        pass
    with pytest.raises(RuntimeError, match="can be entered only once"):
        await block.__aenter__()


def make_scenario() -> Scenario:
    """Open a registry in a nursery, and call under one of its policies, which reloads replace."""
    settings: dict[str, Any] = {"policies": {"a": {"bulkhead": 1}}}
    registry = Registry.load(settings)
    bulkhead = layer(registry["a"], Bulkhead)
    sizes = count(2)

    async def use(nursery: trio.Nursery | None = None) -> None:
        async with registry.open(nursery):
            await registry["a"].call(pause)
            settings["policies"]["a"]["timeout"] = next(sizes)
            registry.reload()
            await registry["a"].call(pause)

    def is_free() -> bool:
        return layer(registry["a"], Bulkhead) is bulkhead and not bulkhead.statistics().borrowed

    return Scenario(victim=use, others=[use, use], fresh_user=use, invariant=is_free)


def test_cancelled_at_any_checkpoint_it_leaves_nothing_behind() -> None:
    """No task and no permit, whatever is replaced around it."""
    report = cancel_everywhere(make_scenario, seeds=range(2))
    assert report.runs > 20
