"""A configuration: what its words mean, what fills the gaps, and that every mistake is told."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from typing import Any, cast

import attrs
import pytest

from trio_resilience import (
    Bulkhead,
    CircuitBreaker,
    ConfigError,
    Constant,
    Exponential,
    Hedge,
    Pipeline,
    Quantile,
    RateLimiter,
    Retry,
    RetryBudget,
    Timeout,
)
from trio_resilience._config import LayerConfig, check_config
from trio_resilience._config_options import structure
from trio_resilience._config_schema import LAYERS
from trio_resilience._config_text import MAX_DEPTH, parse_toml

NO_TIME = '`seconds` must be seconds, or a text such as "250ms", "30s", "2m" or "1h30m", got'


def layers(settings: object, **top: object) -> dict[str, LayerConfig]:
    """Return the layers of a policy with these settings, by kind, in their order."""
    config = check_config({"policies": {"it": settings}, **top})
    return {layer.kind: layer for layer in config.pipelines["it"].layers}


def options(kind: str, given: object, **top: object) -> dict[str, Any]:
    """Return all options of one layer."""
    return dict(layers({kind: given}, **top)[kind].options)


def mistakes(settings: object, **top: object) -> list[str]:
    """Return what is wrong with a policy, without the path to it."""
    with pytest.raises(ConfigError) as caught:
        layers(settings, **top)
    return [line.removeprefix("policies.it.") for line in caught.value.errors]


# --- what fills the gaps --------------------------------------------------------------------------


def test_an_empty_policy_is_the_standard_pipeline() -> None:
    """Layer by layer, and option by option."""
    standard = cast("tuple[Any, ...]", Pipeline.standard(name="it").layers)
    made: list[Any] = [layer.make("it", {}) for layer in layers({}).values()]
    assert [type(layer) for layer in made] == [type(layer) for layer in standard]
    for ours, theirs in zip(made, standard, strict=True):
        keys = [*LAYERS[_kind_of(ours)].options, "name"]
        assert [getattr(ours, key) for key in keys] == [getattr(theirs, key) for key in keys]


def _kind_of(layer: object) -> str:
    return next(kind for kind, table in LAYERS.items() if isinstance(layer, table.make))


@pytest.mark.parametrize(
    "settings, seconds",
    [
        ({}, 10),
        ({"timeout": 6}, 2),
        ({"timeout": Timeout(3)}, 1),
        ({"timeout": True}, 10),
        ({"timeout": False}, 10),
        ({"timeout": math.inf}, 10),
        ({"layers": ["attempt_timeout"]}, 10),
    ],
)
def test_an_attempt_has_a_third_of_the_whole(settings: object, seconds: float) -> None:
    """As in the standard pipeline; and ten seconds if there is no limit for the whole."""
    assert layers(settings)["attempt_timeout"].options == {"seconds": seconds}


def test_what_a_name_does_not_say_is_as_in_the_defaults_option_by_option() -> None:
    """Also within a backoff."""
    defaults = {
        "timeout": "12s",
        "retry": {"max_attempts": 7, "backoff": {"base_delay": 2, "multiplier": 3}},
    }
    found = layers({"retry": {"backoff": {"max_delay": 9}}}, defaults=defaults)
    assert found["timeout"].options == {"seconds": 12}
    assert found["retry"].options["max_attempts"] == 7
    assert found["retry"].options["backoff"] == Exponential(2, multiplier=3, max_delay=9)


def test_another_kind_of_backoff_has_nothing_of_the_one_before() -> None:
    """Their options mean different things."""
    defaults = {"retry": {"backoff": {"base_delay": 2}}}
    given = {"backoff": {"kind": "constant", "delay": 1}}
    assert options("retry", given, defaults=defaults)["backoff"] == Constant(1)


@pytest.mark.parametrize(
    "below, above, kept",
    [
        (False, {}, False),
        (False, {"retry": True}, True),
        (False, {"retry": {}}, True),
        ({}, {"retry": False}, False),
        ({"max_attempts": 7}, {"retry": True}, True),
        (False, {"layers": ["timeout", "retry"]}, True),
        ({}, {"layers": ["timeout"]}, False),
    ],
)
def test_a_layer_is_left_out_by_false(below: object, above: object, kept: bool) -> None:
    """What the name says counts; a list of layers that has it says that it is meant."""
    assert ("retry" in layers(above, defaults={"retry": below})) is kept


def test_true_keeps_what_the_defaults_say() -> None:
    found = layers({"retry": True}, defaults={"retry": {"max_attempts": 7}})
    assert found["retry"].options["max_attempts"] == 7


def test_layers_are_in_the_standard_order_or_in_the_given_one() -> None:
    """The outermost first. A rate limit is there if it is spoken of."""
    assert list(layers({"rate_limit": 5})) == [
        "timeout",
        "retry",
        "breaker",
        "bulkhead",
        "rate_limit",
        "attempt_timeout",
    ]
    given = ["retry", "breaker", "timeout"]
    assert list(layers({"layers": given})) == given
    assert list(layers({}, defaults={"layers": given})) == given
    assert list(layers({"layers": ["bulkhead"]}, defaults={"layers": given})) == ["bulkhead"]
    assert list(layers({"retry": False}, defaults={"layers": given})) == ["breaker", "timeout"]


# --- what the words mean --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "written, seconds",
    [
        (3, 3),
        (0.5, 0.5),
        ("250ms", 0.25),
        ("30s", 30),
        ("30 s", 30),
        ("1.5s", 1.5),
        ("2m", 120),
        ("2min", 120),
        ("1h30m", 5400),
        ("1h 30m", 5400),
        ("1d", 86400),
        (timedelta(minutes=1), timedelta(minutes=1)),
    ],
)
def test_a_time_is_seconds_or_a_text_with_a_unit(written: object, seconds: object) -> None:
    assert options("timeout", written) == {"seconds": seconds}


@pytest.mark.parametrize("written", ["", "3", "s", "3x", "-3s", "3s 3", "1e3s", "3S", "nan", "٣s"])
def test_no_other_text_is_a_time(written: str) -> None:
    """A number in quotes is more likely a mistake than a time."""
    assert mistakes({"timeout": written}) == [f"timeout: {NO_TIME} {written!r}"]


@pytest.mark.parametrize(
    "written, rate, per",
    [
        (10, 10, 1),
        ("10/s", 10, 1),
        ("300/min", 300, 60),
        ("1.5 / 2h", 1.5, 7200),
        ("1/500ms", 1, 0.5),
    ],
)
def test_a_rate_is_a_number_or_a_text_with_a_time(written: object, rate: float, per: float) -> None:
    found = options("rate_limit", written)
    assert (found["rate"], found["per"]) == (rate, per)


def test_a_rate_in_a_text_has_its_own_period() -> None:
    """It wins over that of the defaults; to give another beside it contradicts it."""
    found = options("rate_limit", {"rate": "5/s"}, defaults={"rate_limit": {"rate": 9, "per": 60}})
    assert (found["rate"], found["per"]) == (5, 1)
    wrong = {"rate": "5/s", "per": 2}
    expected = "rate_limit.rate: `rate` must be a number where `per` is given, got '5/s'"
    assert mistakes({"rate_limit": wrong}) == [expected]
    assert mistakes({"rate_limit": "fast"})[0].startswith("rate_limit: `rate` must be a number, or")


def test_false_stands_for_no_limit() -> None:
    """TOML has no word for nothing; where `False` has a meaning, it keeps that."""
    found = options("retry", {"max_attempts": False})
    assert found["max_attempts"] is None
    assert options("bulkhead", {"queue_size": False})["queue_size"] is None
    assert options("breaker", {"enforce": False})["enforce"] is False
    backoff: Any = options("retry", {"backoff": {"jitter": False}})["backoff"]
    assert backoff.jitter == "none"
    expected = "breaker.min_calls: `min_calls` must be an int, got False"
    assert mistakes({"breaker": {"min_calls": False}}) == [expected]


def test_a_table_may_stand_for_a_value_that_has_parts() -> None:
    """A backoff, for the delays of a retry or a breaker; and a quantile of latencies."""
    backoff = {"kind": "linear", "base_delay": "100ms", "max_delay": "1s"}
    made: Any = options("breaker", {"recovery_timeout": backoff})["recovery_timeout"]
    assert (type(made).__name__, made.base_delay, made.max_delay) == ("Linear", 0.1, 1)
    given = {"layers": ["hedge"], "hedge": {"after": {"quantile": 0.9}}}
    assert layers(given)["hedge"].options["after"] == Quantile(0.9)


def test_a_budget_is_shared_by_its_name() -> None:
    """By all layers of all policies that name it."""
    config = check_config(
        {
            "budgets": {"backend": {"ratio": 0.2}, "made": (made := RetryBudget(0.3))},
            "defaults": {"retry": {"budget": "backend"}},
            "policies": {"it": {}},
        }
    )
    assert config.budgets == {"backend": {"ratio": 0.2, "max_tokens": 10}, "made": made}
    budget = RetryBudget(0.2)
    layer: Any = config.pipelines["it"].layers[1].make("it", {"backend": budget})
    assert layer.budget is budget


def test_in_a_program_policies_and_attrs_objects_may_stand_for_tables() -> None:
    """A policy is used as it is; of an object, fields that are `None` are not given."""

    @attrs.frozen
    class Limits:
        max_concurrency: int
        queue_size: int | None = None

    @attrs.frozen
    class Settings:
        retry: Retry
        bulkhead: Limits
        backoff: None = None

    @attrs.frozen
    class App:
        policies: dict[str, object]

    retry, hedge = Retry(on=OSError), Hedge(after=1)
    settings = Settings(retry, Limits(3))
    config = check_config(App({"it": settings, "whole": hedge}))
    _, given, _, bulkhead, _ = config.pipelines["it"].layers
    assert given.make("it", {}) is retry
    assert bulkhead.options == {"max_concurrency": 3, "queue_size": None, "max_wait": math.inf}
    assert config.pipelines["whole"].policy is hedge
    backoff = Exponential(3)
    assert options("retry", {"backoff": backoff})["backoff"] is backoff


def test_layers_are_called_after_their_pipeline() -> None:
    """So that events and errors tell them apart."""
    found = layers({"rate_limit": 1})
    made: list[Any] = [layer.make("it", {}) for layer in found.values()]
    assert [layer.name for layer in made] == [
        "it.timeout",
        "it.retry",
        "it.circuit",
        "it.bulkhead",
        "it.rate_limit",
        "it.attempt_timeout",
    ]


# --- mistakes -------------------------------------------------------------------------------------


def test_six_mistakes_are_six_lines_each_with_its_key_path() -> None:
    """All at once, in the words of the constructors."""
    text = """
        [defaults]
        timeout = "20x"
        breaker = { min_calls = 200 }
        [policies.payments]
        retry = { max_attempts = 0, backof = {} }
        bulkhead = { max_concurrency = "ten" }
        [policies."a b"]
        timeut = 3
    """
    with pytest.raises(ConfigError) as caught:
        check_config(parse_toml(text.encode(), "x"))
    assert list(caught.value.errors) == [
        f"defaults.timeout: {NO_TIME} '20x'",
        "defaults.breaker: `min_calls` must be <= `window_calls` (100), got 200",
        "policies.payments.retry.max_attempts: `max_attempts` must be >= 1, got 0",
        "policies.payments.retry.backof: is no known key; did you mean `backoff`?",
        "policies.payments.bulkhead.max_concurrency: `max_concurrency` must be an int, got 'ten'",
        "policies.'a b'.timeut: is no known key; did you mean `timeout`?",
    ]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"retry": {"on": "OSError"}}, "retry.on: is code, which no file can give"),
        ({"retry": {"name": "x"}}, "retry.name: is no known key"),
        ({"retry": {"budget": "x"}}, "retry.budget: no budget has the name 'x'"),
        ({"retry": {"backoff": 3}}, 'retry.backoff: `backoff` must be a table such as {kind = "ex'),
        ({"retry": {"backoff": {"kind": "expo"}}}, "retry.backoff: `kind` must be one of 'expone"),
        ({"retry": {"backoff": {"kind": 3}}}, "retry.backoff: `kind` must be one of 'exponential'"),
        (
            {"retry": {"backoff": {"base_dela": 3}}},
            "retry.backoff.base_dela: is no known key; did you mean `base_delay`?",
        ),
        (
            {"retry": {"backoff": {"base_delay": -1}}},
            "retry.backoff.base_delay: `base_delay` must be >= 0, got -1",
        ),
        ({"retry": {"backoff": {"kind": "constant"}}}, "retry.backoff: `delay` is required"),
        (
            {"retry": {"backoff": {"base_delay": "1m"}}},
            "retry.backoff: `max_delay` must be >= `base_delay` (60), got 30.0",
        ),
        ({"retry": {"max_attempts": [3]}}, "retry.max_attempts: `max_attempts` must be a single"),
        ({"retry": 3}, "retry: must be a table of options, or true or false, got 3"),
        ({"timeout": [3]}, "timeout: must be a table of options, or true or false, got [3]"),
        ({"timeout": Bulkhead(3)}, "timeout: must be a table of options, or true or false, got"),
        ({"timeout": None}, "timeout: `seconds` must be seconds or a timedelta, got None"),
        ({"rate_limit": {}}, "rate_limit: `rate` is required"),
        ({"rate_limit": True}, "rate_limit: `rate` is required"),
        ({"layers": ["hedge"]}, "hedge: `after` is required"),
        ({"layers": []}, "layers: must be a list of layers, got []"),
        ({"layers": "retry"}, "layers: must be a list of layers, got 'retry'"),
        ({"layers": ["retri"]}, "layers.0: is no layer: 'retri'; did you mean `retry`?"),
        ({"layers": [3]}, "layers.0: is no layer: 3; known are timeout, retry, breaker, bulkhead"),
        ({"layers": ["retry", "retry"]}, "layers.1: is there twice: 'retry'"),
        ({"layers": ["retry"] * 8}, "layers: must name each layer at most once, and there are 7"),
        ({"layers": ["timeout", "retry"], "retry": False}, "retry: is left out, but named in"),
        ({"layers": ["timeout"], "retry": {}}, "retry: is not named in `layers`: name each layer"),
        ({"hedge": {"after": 1}}, "hedge: is not in the standard order: name each layer in"),
        ({1: 2}, "policies.it: its keys must be strings, got 1"),
        (3, "policies.it: must be a table, got 3"),
        (dict.fromkeys(LAYERS, False), "policies.it: a pipeline must have at least one layer"),
        (
            {"breaker": {"failure_threshold": False}},
            "breaker: one of `failure_threshold`, `failure_rate` and `slow_call_rate` must be set",
        ),
        ({"timeout": math.nan}, "timeout: `seconds` must be >= 0, got nan"),
    ],
)
def test_a_mistake_is_told_where_it_is_and_once(settings: object, expected: str) -> None:
    (found,) = mistakes(settings)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    "raw, expected",
    [
        ([], "a configuration must be a mapping, got []"),
        (3, "a configuration must be a mapping, got 3"),
        ({"polices": {}}, "polices: is no known key; did you mean `policies`?"),
        ({"policies": 3}, "policies: must be a table, got 3"),
        ({"policies": {"": {}}}, "policies.'': a name must not be empty"),
        ({"budgets": {"x": 3}}, "budgets.x: must be a table, got 3"),
        ({"budgets": {"x": {"ratio": 0}}}, "budgets.x.ratio: `ratio` must be > 0, got 0"),
        ({"defaults": {"retries": {}}}, "defaults.retries: is no known key; did you mean `retry`?"),
    ],
)
def test_what_is_wrong_with_the_whole_is_told_too(raw: object, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(raw)
    assert list(caught.value.errors) == [expected]


def test_a_mistake_in_the_defaults_is_told_once_however_many_use_them() -> None:
    """And not again, for what follows from it."""
    raw = {
        "defaults": {
            "retry": {"backoff": {"kind": "linear", "base_delay": 60}},
            "rate_limit": {"rate": -1},
        },
        "policies": {
            "a": {},
            "b": {"retry": True, "rate_limit": True},
            "c": {"retry": {"max_attempts": 2}, "rate_limit": {"burst": 2}},
        },
    }
    with pytest.raises(ConfigError) as caught:
        check_config(raw)
    assert list(caught.value.errors) == [
        "defaults.rate_limit.rate: `rate` must be > 0, got -1",
        "defaults.retry.backoff: `max_delay` must be >= `base_delay` (60), got 30.0",
    ]


def test_a_wrong_order_in_the_defaults_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config({"defaults": {"layers": ["x"]}, "policies": {"a": {}, "b": {}}})
    assert len(caught.value.errors) == 1


def test_mistakes_in_layers_are_told_beside_one_in_their_order() -> None:
    """Also those that a layer's options make only together."""
    mine = {"layers": ["retri"], "breaker": {"min_calls": 200}, "rate_limit": True, "hedge": False}
    with pytest.raises(ConfigError) as caught:
        check_config({"policies": {"a": {**mine, "retry": {"max_attempts": 2}}, "b": {}}})
    assert list(caught.value.errors) == [
        "policies.a.layers.0: is no layer: 'retri'; did you mean `retry`?",
        "policies.a.breaker: `min_calls` must be <= `window_calls` (100), got 200",
        "policies.a.rate_limit: `rate` is required",
    ]


def test_all_mistakes_of_one_layer_are_told() -> None:
    """Those of a nested table, those of the whole, and names that are nowhere."""
    breaker = {"recovery_timeout": {"base_delay": 60}, "min_calls": 200}
    assert mistakes({"breaker": breaker}) == [
        "breaker.recovery_timeout: `max_delay` must be >= `base_delay` (60), got 30.0",
        "breaker: `min_calls` must be <= `window_calls` (100), got 200",
    ]
    retry = {"budget": "x", "max_attempts": 0}
    assert mistakes({"retry": retry}, budgets={"xy": {}}) == [
        "retry.budget: no budget has the name 'x'; did you mean `xy`?",
        "retry.max_attempts: `max_attempts` must be >= 1, got 0",
    ]


def test_a_name_that_is_required_must_be_there() -> None:
    with pytest.raises(ConfigError) as caught:
        check_config({"policies": {"paymnts": {}}}, required=["payments", "x", "x"])
    assert list(caught.value.errors) == [
        "policies.payments: is required, but missing; did you mean `paymnts`?",
        "policies.x: is required, but missing",
    ]


def test_what_is_made_is_what_the_options_say() -> None:
    """Each layer is of the class that its options come from."""
    found = layers({"layers": list(LAYERS), "rate_limit": 5, "hedge": 1} | {"hedge": {"after": 1}})
    made = {kind: layer.make("it", {}) for kind, layer in found.items()}
    expected = [Timeout, Retry, CircuitBreaker, Bulkhead, RateLimiter, Timeout, Hedge]
    assert [type(layer) for layer in made.values()] == expected


def test_without_cattrs_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has no configuration needs no cattrs."""
    structure.cache_clear()
    monkeypatch.setitem(sys.modules, "cattrs", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'trio_resilience\[config\]'"):
        options("timeout", 3)
    structure.cache_clear()


def test_a_bug_is_not_taken_for_a_mistake_in_the_configuration() -> None:
    """Only what says that a value is refused is."""

    class Odd(float):
        def __float__(self) -> float:
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        options("timeout", Odd(3))


def test_tables_nest_far_less_than_the_bound() -> None:
    """So that it is in nobody's way."""
    deepest = "policies.x.retry.backoff.kind"
    assert deepest.count(".") * 2 < MAX_DEPTH
