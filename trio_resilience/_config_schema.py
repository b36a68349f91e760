"""What a configuration may say of each layer: the options of the policies' own constructors.

Nothing of it is written down twice. Keys and defaults are those of the constructors, and what is
refused is refused by their own checks, in their own words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Final, cast, final

import attrs

from trio_resilience._algorithms._backoff import (
    Constant,
    Decorrelated,
    Exponential,
    Fibonacci,
    Linear,
)
from trio_resilience._algorithms._budget import RetryBudget
from trio_resilience._algorithms._quantile import Quantile
from trio_resilience._bulkhead import Bulkhead
from trio_resilience._circuit_breaker import CircuitBreaker
from trio_resilience._config_text import duration, rate
from trio_resilience._hedge import Hedge
from trio_resilience._pipeline import Pipeline
from trio_resilience._rate_limiter import RateLimiter
from trio_resilience._retry import Retry
from trio_resilience._timeout import Timeout

REQUIRED: Final[Any] = inspect.Parameter.empty
"""In the place of a default."""

_CODE: Final = {"failure_on", "failure_result", "on", "on_discard", "on_retry", "retry_result"}
_OURS: Final = {"name", "rng"}
"""Not for a configuration: a layer is called after its pipeline."""


@final
@attrs.frozen(eq=False)
class Option:
    """A key, and what it may be set to."""

    key: str
    check: Callable[[Any], object]
    """Returns what the constructor makes of a value, or raises what it has against it."""
    default: object
    choices: Mapping[str, Table] = attrs.field(factory=dict[str, "Table"])
    """What it may be instead of a single value: a table, whose `kind` says which of these."""

    @property
    def is_time(self) -> bool:
        """Whether it is in seconds."""
        return self.accepts(timedelta(seconds=0.5))

    def accepts(self, value: object) -> bool:
        """Tell whether the constructor does."""
        return self.objection(value) is None

    def objection(self, value: object) -> str | None:
        """Return what the constructor has against *value*, if anything."""
        try:
            self.check(value)
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def read(self, value: object) -> object:
        """Return what the constructor is to be given for what is written as *value*."""
        if isinstance(value, (Mapping, list, tuple, set, frozenset)):
            shape = "table" if isinstance(value, Mapping) else "list"
            raise TypeError(f"`{self.key}` must be a single value, got a {shape}")
        # TOML has no word for nothing.
        if value is False and self.accepts(None) and not self.accepts(False):  # noqa: FBT003
            return None
        if isinstance(value, str) and self.is_time:
            value = duration(self.key, value)
        self.check(value)
        return value


@final
@attrs.frozen(eq=False)
class Table:
    """The keys of one kind of thing, and the class that they are the options of."""

    make: type[Any]
    options: Mapping[str, Option]
    shorthand: str | None = None
    """The key that a value alone is for, if the constructor takes one by position."""
    code: frozenset[str] = frozenset()
    """Options that only a program can give."""

    @property
    def name(self) -> str:
        """What the class is called."""
        return self.make.__name__

    def defaults(self) -> dict[str, object]:
        """Return the options that need not be given, and what they are then."""
        return {
            key: option.default
            for key, option in self.options.items()
            if option.default is not REQUIRED
        }


# --- how they are found ---------------------------------------------------------------------------


def _table_of(
    cls: type[Any],
    choices: Mapping[str, Mapping[str, Table]] | None = None,
    **standard: object,
) -> Table:
    """Return the options of *cls*, with other defaults for some of them."""
    parameters = inspect.signature(cls).parameters
    keys = [key for key in parameters if key not in _CODE | _OURS]
    first = next(iter(parameters.values()))
    is_positional = first.kind is first.POSITIONAL_OR_KEYWORD and first.name not in _OURS
    fields = attrs.fields_dict(cls)
    options = {
        key: Option(
            key,
            _check_of(cls, key, fields.get(key)),
            standard.get(key, _default_of(parameters[key], fields.get(key))),
            (choices or {}).get(key, {}),
        )
        for key in keys
    }
    code = frozenset(parameters) & _CODE
    return Table(cls, options, first.name if is_positional else None, code)


def _default_of(parameter: inspect.Parameter, field: attrs.Attribute[Any] | None) -> object:
    if parameter.default is not attrs.NOTHING or field is None:
        return parameter.default
    return cast("Any", field.default).factory()


def _check_of(
    cls: type[Any], key: str, field: attrs.Attribute[Any] | None
) -> Callable[[Any], object]:
    found: Any = field
    converter: Any = None if field is None else found.converter
    if converter is not None:
        return cast("Callable[[Any], object]", converter)
    validator: Any = None if field is None else field.validator
    if validator is not None:
        return partial(validator, None, field)
    return partial(_construct, cls, key)


def _construct(cls: type[Any], key: str, value: object) -> object:
    """Check a value by making something with it: of a class that does so in its `__init__`."""
    required = [
        name
        for name, each in inspect.signature(cls).parameters.items()
        if each.default is each.empty and name != key
    ]
    return cls(**dict.fromkeys(required, 1), **{key: value})


BACKOFFS: Final = {
    cls.__name__.lower(): _table_of(cls)
    for cls in (Exponential, Constant, Linear, Fibonacci, Decorrelated)
}
QUANTILES: Final = {"quantile": _table_of(Quantile)}
BUDGET: Final = _table_of(RetryBudget)

_whole, _, _, _bulkhead, _ = cast("tuple[Any, ...]", Pipeline.standard().layers)

LAYERS: Final[Mapping[str, Table]] = {
    "timeout": _table_of(Timeout, seconds=_whole.seconds),
    "retry": _table_of(Retry, {"backoff": BACKOFFS}),
    "breaker": _table_of(CircuitBreaker, {"recovery_timeout": BACKOFFS}),
    "bulkhead": _table_of(Bulkhead, max_concurrency=_bulkhead.max_concurrency),
    "rate_limit": _table_of(RateLimiter),
    "attempt_timeout": _table_of(Timeout),
    "hedge": _table_of(Hedge, {"after": QUANTILES}),
}
"""What a pipeline may consist of."""

STANDARD: Final = ("timeout", "retry", "breaker", "bulkhead", "rate_limit", "attempt_timeout")
"""The order of `Pipeline.standard`. A rate limit is where what passes it is called at once, so that
what is called sees that rate; a wait for it takes no time from an attempt."""

BY_DEFAULT: Final = frozenset(STANDARD) - {"rate_limit"}


# --- words that mean several options --------------------------------------------------------------


def spread(kind: str, table: Mapping[str, object]) -> dict[str, object]:
    """Return *table* with a rate such as "10/s" put into its two options."""
    given = dict(table)
    text = given.get("rate")
    if kind == "rate_limit" and isinstance(text, str):
        number, seconds = rate("rate", text)
        if "per" in given:
            raise ValueError(f"`rate` must be a number where `per` is given, got {text!r}")
        given |= {"rate": number, "per": seconds}
    return given
