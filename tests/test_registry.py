"""Policies by name: stable handles that all who ask share, and names that are hard to get wrong."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock

from tests.operations import Gauge, foreign_nursery, returns
from trio_resilience import (
    CircuitBreaker,
    CircuitOpenError,
    ConfigError,
    Pipeline,
    Retry,
    Timeout,
    run_in,
)
from trio_resilience._registry import RegisteredPolicy, Registry

if TYPE_CHECKING:
    from pathlib import Path

TEXT = """
[defaults]
retry = { max_attempts = 2, backoff = { kind = "constant", delay = 1 } }

[policies.payments]
breaker = { failure_threshold = 1, recovery_timeout = "1h" }

[policies.search]
timeout = "5s"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "resilience.toml"
    path.write_text(TEXT)
    return path


def layer(policy: RegisteredPolicy, kind: type[Any]) -> Any:
    """Return the first layer of that class."""
    return next(each for each in policy.pipeline.layers if isinstance(each, kind))


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "text", "mapping"])
def test_it_loads_from_a_file_or_a_mapping(config: Path, kind: str) -> None:
    """Outside of any run."""
    mapping: dict[str, object] = {"policies": {"payments": {}, "search": {"timeout": 5}}}
    sources = {"path": config, "text": str(config), "mapping": mapping}
    registry = Registry.load(sources[kind])
    assert list(registry) == ["payments", "search"]
    assert len(registry) == 2
    assert "search" in registry
    assert "x" not in registry
    assert layer(registry["search"], Timeout).seconds == 5
    assert repr(registry) == "<registry 'registry': payments, search>"
    assert repr(Registry.load({}, name="empty")) == "<registry 'empty': no policies>"


def test_a_policy_may_stand_for_a_whole_table() -> None:
    """A pipeline is used as it is; another policy is the only layer of one."""
    pipeline, retry = Pipeline(Retry()), Retry()
    registry = Registry.load({"policies": {"a": pipeline, "b": retry}})
    assert registry["a"].pipeline is pipeline
    assert registry["b"].pipeline.layers == (retry,)
    assert registry["b"].pipeline.name == "b"


def test_a_name_that_is_nowhere_is_a_key_error_with_the_nearest(config: Path) -> None:
    registry = Registry.load(config)
    with pytest.raises(
        KeyError, match=r"no policy has the name 'paymnts'; did you mean `payments`"
    ):
        registry["paymnts"]
    with pytest.raises(KeyError, match=r"no policy has the name 'zzzz'\""):
        registry["zzzz"]


def test_a_name_that_is_required_must_be_there(config: Path) -> None:
    """It is found out when the program starts, and not at the first payment."""
    assert len(Registry.load(config, require=["payments"])) == 2
    with pytest.raises(ConfigError, match=r"^policies.mail: is required, but missing$"):
        Registry.load(config, require=["payments", "mail"])
    names: Any
    for names in ("mail", ["mail", 3]):
        with pytest.raises(TypeError, match=r"`require` must be a list of names, got .*mail"):
            Registry.load(config, require=names)


def test_six_mistakes_are_six_errors_each_with_its_key_path(config: Path) -> None:
    """From a file and from a mapping; and none of its policies is there."""
    mapping: dict[str, object] = {
        "defaults": {"retry": {"max_attempts": 0}},
        "policies": {
            "payments": {"timeout": "abc", "breakr": {}, "rate_limit": "0/s"},
            "search": {"breaker": {"failure_rate": 1.5}, "layers": ["retry", "retri"]},
        },
    }
    config.write_text("""
        defaults.retry.max_attempts = 0
        policies.payments = { timeout = "abc", breakr = {}, rate_limit = "0/s" }
        policies.search = { breaker.failure_rate = 1.5, layers = ["retry", "retri"] }
    """)
    for source in (config, mapping):
        with pytest.raises(ConfigError) as caught:
            Registry.load(source)
        assert [each.split(": ")[0] for each in caught.value.errors] == [
            "defaults.retry.max_attempts",
            "policies.payments.timeout",
            "policies.payments.breakr",
            "policies.payments.rate_limit",
            "policies.search.breaker.failure_rate",
            "policies.search.layers.1",
        ]


def test_a_file_that_can_t_be_read_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere.toml: can't be read: No such file"):
        Registry.load(tmp_path / "nowhere.toml")


# --- handles --------------------------------------------------------------------------------------


async def test_all_who_ask_for_a_name_share_one_policy(
    config: Path, autojump_clock: MockClock
) -> None:
    """So a circuit that one of them has opened is open for all."""
    registry = Registry.load(config)
    assert registry["payments"] is registry["payments"]

    @registry["payments"]
    async def pay(amount: int, *, currency: str = "EUR") -> str:
        """Pay."""
        if not amount:
            raise OSError
        return f"{amount} {currency}"

    assert (pay.__name__, pay.__doc__) == ("pay", "Pay.")
    assert await pay(3, currency="USD") == "3 USD"
    with pytest.raises(CircuitOpenError):
        await pay(0)
    with pytest.raises(CircuitOpenError):
        await registry["payments"].call(returns, 1)
    assert await registry["search"].call(returns, 1) == 1


async def test_it_does_what_its_pipeline_does(config: Path, autojump_clock: MockClock) -> None:
    """Also within another pipeline, and in a nursery of the caller's choice."""
    policy = Registry.load(config)["search"]
    gauge = Gauge()
    assert await Pipeline(Timeout(9), policy).call(gauge.run, 7) == 7
    async with foreign_nursery() as nursery:
        assert await run_in(nursery, gauge.run, 8, policy=policy) == 8
    assert policy.statistics() == policy.pipeline.statistics()
    assert layer(policy, Timeout).statistics().calls == 2
    assert repr(policy) == f"<policy 'search': {policy.pipeline!r}>"


async def test_it_is_idle_and_disposable_as_its_pipeline_is(config: Path) -> None:
    policy = Registry.load(config)["search"]
    assert policy.is_idle
    assert policy.is_disposable
    isolation = layer(policy, CircuitBreaker).isolate()
    assert not policy.is_idle
    assert not policy.is_disposable
    isolation.release()


def test_a_handle_can_t_be_copied(config: Path) -> None:
    """Its pipeline has live state."""
    policy = Registry.load(config)["search"]
    for make in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a RegisteredPolicy can't be copied or pickled"):
            make(policy)


def test_statistics_are_those_of_each_policy_and_of_the_reloads(config: Path) -> None:
    registry = Registry.load(config)
    now = registry.statistics()
    assert list(now.policies) == ["payments", "search"]
    assert now.policies["search"] == registry["search"].statistics()
    assert (now.reloads, now.failed_reloads, now.last_error) == (0, 0, None)


def test_module_level_policies_serve_one_run_after_the_other(config: Path) -> None:
    registry = Registry.load(config)
    for _ in range(2):
        assert trio.run(registry["search"].call, returns, 3) == 3


# --- defined in the program -----------------------------------------------------------------------


def test_a_module_may_bring_its_own_policy_along(config: Path) -> None:
    """Over the defaults of the configuration; whoever asks for the same gets the same."""
    registry = Registry.load(config)
    mail = registry.define("mail", {"timeout": "7s"})
    assert layer(mail, Timeout).seconds == 7
    assert layer(mail, Retry).max_attempts == 2
    assert registry["mail"] is mail
    assert registry.define("mail", {"timeout": 7.0}) is mail
    assert registry.define("search", {"timeout": 5}) is registry["search"]


def test_the_same_name_with_other_settings_is_an_error_and_not_silent_sharing(config: Path) -> None:
    """Nothing changes by it."""
    registry = Registry.load(config)
    mail = registry.define("mail", {"timeout": "7s"})
    before = mail.pipeline
    with pytest.raises(
        ConfigError, match=r"^policies.mail: is defined already, with other settings"
    ):
        registry.define("mail", {"timeout": "8s"})
    with pytest.raises(
        ConfigError, match=r"^policies.mail: is defined already, with other settings"
    ):
        registry.define("mail", Retry())
    with pytest.raises(ConfigError, match=r"policies.search: is defined in the program, too, with"):
        registry.define("search", {"timeout": "8s"})
    with pytest.raises(ConfigError, match=r"policies.new.timeout: `seconds` must be >= 0, got -1"):
        registry.define("new", {"timeout": -1})
    assert registry["mail"].pipeline is before
    assert "new" not in registry
    assert layer(registry["search"], Timeout).seconds == 5
