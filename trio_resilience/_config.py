"""Check a configuration, all of it, and tell what pipelines it describes; or every mistake in it.

A configuration is a tree of tables: ``[defaults]`` and ``[policies.NAME]`` have a table of options
for each layer, and ``[budgets.NAME]`` what several of them share. What a name does not say is as in
the defaults, option by option; what those do not say is as in `Pipeline.standard` and in the
policies' constructors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final, cast, final

import attrs

from trio_resilience._algorithms._budget import RetryBudget
from trio_resilience._config_mistakes import (
    Mistakes,
    Path,
    short,
    suggestion,
    unknown,
)
from trio_resilience._config_options import Nested, require, structure, told
from trio_resilience._config_schema import (
    BUDGET,
    BY_DEFAULT,
    LAYERS,
    REQUIRED,
    STANDARD,
    Table,
    spread,
)
from trio_resilience._engine._policy import Policy
from trio_resilience._pipeline import Pipeline
from trio_resilience._records import Record

MAX_NAMES: Final = 1000

_TOP: Final = ("defaults", "policies", "budgets")
_BROKEN: Final[Any] = object()
"""In the place of what has been complained of already."""

# --- what it comes to -----------------------------------------------------------------------------


@final
@attrs.frozen(hash=False)
class LayerConfig:
    """A layer of a pipeline, and all of its options."""

    kind: str
    options: Mapping[str, object]
    policy: Policy[Any] | None = None
    """The layer itself, if that is what was given."""

    def make(self, name: str, budgets: Mapping[str, RetryBudget]) -> Policy[Any]:
        """Return the layer, as one of the pipeline *name*."""
        if self.policy is not None:
            return self.policy
        options = dict(self.options)
        if isinstance(options.get("budget"), str):
            options["budget"] = budgets[cast("str", options["budget"])]
        label = "circuit" if self.kind == "breaker" else self.kind
        layer: Policy[Any] = LAYERS[self.kind].make(**options, name=f"{name}.{label}")
        return layer


@final
@attrs.frozen(hash=False)
class PipelineConfig:
    """A named pipeline."""

    name: str
    layers: tuple[LayerConfig, ...]
    policy: Policy[Any] | None = None
    """What was given in its place."""


@final
@attrs.frozen(hash=False)
class Config:
    """A configuration in which nothing is wrong."""

    pipelines: Mapping[str, PipelineConfig]
    budgets: Mapping[str, Mapping[str, object] | RetryBudget]


def check_config(
    raw: object, *, required: Iterable[str] = (), defined: Mapping[str, object] | None = None
) -> Config:
    """Return what *raw*, a mapping or an attrs object, describes.

    Args:
        raw: what a TOML file says, or is written in a program in the same shape.
        required: names that must be there.
        defined: what further names say, as if under ``policies``; where both have one, they must
            come to the same.

    Raises:
        ConfigError: something is wrong; it tells all that is.
    """
    mistakes = Mistakes()
    reader = _Reader(mistakes)
    top = reader.table((), raw)
    for key in top:
        if key not in _TOP:
            mistakes.add((key,), unknown(key, _TOP))
    reader.budgets = reader.read_budgets(top.get("budgets", {}))
    reader.defaults = reader.section(("defaults",), top.get("defaults", {}))
    reader.check_defaults()
    pipelines = reader.read_pipelines(top.get("policies", {}), defined or {})
    for name in dict.fromkeys(required):
        if name not in pipelines:
            mistakes.add(("policies", name), partial(_missing, name, pipelines))
    mistakes.raise_any()
    return Config({name: each for name, each in pipelines.items() if each}, reader.budgets)


# --- sections -------------------------------------------------------------------------------------


@final
@attrs.define(eq=False)
class _Section:
    """What the defaults say, or a name."""

    path: Path
    order: tuple[str, ...] | None = None
    """Empty if there is a mistake in it."""
    layers: dict[str, Any] = attrs.field(factory=dict[str, Any])
    """By kind: the options that are given, a policy, or a bool."""


@final
@attrs.define(eq=False)
class _Reader:
    """Goes through a configuration, and past its mistakes, which it remembers."""

    mistakes: Mistakes
    defaults: _Section = attrs.field(factory=partial(_Section, ("defaults",)), init=False)
    budgets: dict[str, Any] = attrs.field(factory=dict[str, Any], init=False)

    def table(self, path: Path, value: object) -> dict[str, object]:
        """Return *value* as a dict, empty if it is nothing of the kind."""
        if _is_record(value):
            cls: Any = type(value)
            named = {field.name: getattr(value, field.name) for field in attrs.fields(cls)}
            return {key: each for key, each in named.items() if each is not None}
        if not isinstance(value, Mapping):
            what = "must be a table" if path else "a configuration must be a mapping"
            self.mistakes.add(path, f"{what}, got {short(value)}")
            return {}
        found = cast("Mapping[object, object]", value)
        for key in found:
            if not isinstance(key, str):
                self.mistakes.add(path, f"its keys must be strings, got {short(key)}")
        return {key: each for key, each in found.items() if isinstance(key, str)}

    def named(self, path: Path, value: object) -> dict[str, object]:
        """Return a table whose keys are names."""
        found = self.table(path, value)
        if len(found) > MAX_NAMES:
            self.mistakes.add(path, f"must have at most {MAX_NAMES} names, got {len(found)}")
            return {}
        if "" in found:
            self.mistakes.add((*path, ""), "a name must not be empty")
        return found

    def read_budgets(self, value: object) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, given in self.named(("budgets",), value).items():
            path = ("budgets", name)
            options = given if isinstance(given, RetryBudget) else self.options(path, BUDGET, given)
            is_table = isinstance(options, dict)
            found[name] = {**BUDGET.defaults(), **cast("Any", options)} if is_table else options
        return found

    def section(self, path: Path, value: object) -> _Section:
        section = _Section(path)
        for key, given in self.table(path, value).items():
            here = (*path, key)
            if key == "layers":
                section.order = self.order(here, given)
            elif key in LAYERS:
                section.layers[key] = self.layer(here, key, given)
            else:
                self.mistakes.add(here, unknown(key, ["layers", *LAYERS]))
        for kind in section.order or ():
            if section.layers.get(kind) is False:
                self.mistakes.add((*path, kind), "is left out, but named in `layers`")
        return section

    def order(self, path: Path, value: object) -> tuple[str, ...]:
        kinds = cast("list[object]", value) if isinstance(value, (list, tuple)) else []
        if not kinds:
            self.mistakes.add(path, f"must be a list of layers, got {short(cast('Any', value))}")
            return ()
        if len(kinds) > len(LAYERS):
            rule = f"must name each layer at most once, and there are {len(LAYERS)}"
            self.mistakes.add(path, f"{rule}, got {len(kinds)}")
            return ()
        count = self.mistakes.count
        for index, kind in enumerate(kinds):
            if not isinstance(kind, str) or kind not in LAYERS:
                self.mistakes.add((*path, str(index)), partial(_no_layer, kind))
            elif kind in kinds[:index]:
                self.mistakes.add((*path, str(index)), f"is there twice: {kind!r}")
        return () if self.mistakes.count > count else tuple(cast("list[str]", kinds))

    def layer(self, path: Path, kind: str, value: Any) -> Any:
        """Return the options, the policy or the bool that is given for a layer."""
        table = LAYERS[kind]
        if isinstance(value, bool) or isinstance(value, table.make):  # noqa: SIM101 - for pyright
            return value
        is_table = _is_table(value)
        if not is_table and (table.shorthand is None or not _is_single(value)):
            rule = f"must be a table of options, or true or false, got {short(value)}"
            self.mistakes.add(path, rule)
            return _BROKEN
        if is_table:
            return self.options(path, table, value)
        # What is wrong with a value alone is wrong where that is.
        return self.options(path, table, {table.shorthand: value}, lambda _: path)

    def options(
        self,
        path: Path,
        table: Table,
        value: object,
        place: Callable[[Path], Path] = lambda path: path,
    ) -> Any:
        """Return the options that are given, each of them checked; *place* tells where each is."""
        count = self.mistakes.count
        given = self.table(path, value)
        found: dict[str, object] = {}
        budget = given.get("budget")
        if "budget" in table.options and isinstance(budget, str) and budget not in self.budgets:
            self.mistakes.add((*path, "budget"), partial(_no_budget, budget, self.budgets))
        try:
            given = spread(path[-1], given)
        except ValueError as error:
            self.mistakes.add(place((*path, "rate")), str(error))
            del given["rate"]
        try:
            found = structure(table)(given)
        except ExceptionGroup as error:
            for where, words in told(error, path):
                self.mistakes.add(place(where), words)
        return _BROKEN if self.mistakes.count > count else found

    # --- what they come to ------------------------------------------------------------------------

    def check_defaults(self) -> None:
        """Complain of what is wrong with the defaults where they are, and once."""
        for kind, given in self.defaults.layers.items():
            table = LAYERS[kind]
            needs = {key for key, each in table.options.items() if each.default is REQUIRED}
            if isinstance(given, dict) and needs <= given.keys():
                path = (*self.defaults.path, kind)
                if self.finish(path, kind, cast("dict[str, object]", given)) is None:
                    self.defaults.layers[kind] = _BROKEN

    def read_pipelines(
        self, value: object, defined: Mapping[str, object]
    ) -> dict[str, PipelineConfig | None]:
        """Return each name's pipeline, or ``None`` where there is a mistake."""
        found: dict[str, PipelineConfig | None] = {}
        for name, given in self.named(("policies",), value).items():
            found[name] = self.pipeline(name, given)
        for name, given in defined.items():
            again = self.pipeline(name, given)
            if found.setdefault(name, again) != again:
                rule = "is defined in the program, too, with other settings"
                self.mistakes.add(("policies", name), rule)
        return found

    def pipeline(self, name: str, value: object) -> PipelineConfig | None:
        if isinstance(value, Policy):
            return PipelineConfig(name, (), cast("Any", value))
        path = ("policies", name)
        own = self.section(path, value)
        named = self.defaults.order if own.order is None else own.order
        if named == ():
            self.check_alone(own)
            return None
        order = named or STANDARD
        self.check_places(own, order)
        merged = {kind: self.merged(own, kind) for kind in order}
        kept = [
            kind
            for kind in order
            if merged[kind] is not False
            and (named or kind in BY_DEFAULT or merged[kind] is not None)
        ]
        layers = [self.finish_layer(own, kind, merged, order=kept) for kind in kept]
        if not layers:
            self.attempt(path, Pipeline[Any])
        if not layers or None in layers:
            return None
        return PipelineConfig(name, tuple(layer for layer in layers if layer is not None))

    def check_alone(self, own: _Section) -> None:
        """Find what is wrong with each layer, where it is not known which there are."""
        for kind in own.layers:
            merged = self.merged(own, kind)
            if merged is not False:
                self.finish_layer(own, kind, {kind: merged}, order=[])

    def check_places(self, own: _Section, order: tuple[str, ...]) -> None:
        for kind, given in own.layers.items():
            if kind not in order and given is not False:
                where = "named in `layers`" if order is not STANDARD else "in the standard order"
                rule = f"is not {where}: name each layer in `layers`, the outermost first"
                self.mistakes.add((*own.path, kind), rule)

    def merged(self, own: _Section, kind: str) -> Any:
        """Return what is given for a layer: by the name itself, over what the defaults give."""
        above, below = own.layers.get(kind), self.defaults.layers.get(kind)
        if above is None:
            # A layer that is named here is meant, also where the defaults leave it out.
            return True if below is False and own.order else below
        if below is _BROKEN and (above is True or isinstance(above, dict)):
            return below
        if above is True:
            return above if below in (None, False) else below
        if isinstance(above, dict) and isinstance(below, dict):
            return _over(cast("dict[str, object]", above), cast("dict[str, object]", below))
        return cast("Any", above)

    def finish_layer(
        self, own: _Section, kind: str, merged: Mapping[str, Any], *, order: list[str]
    ) -> LayerConfig | None:
        given = merged[kind]
        if given is _BROKEN:
            return None
        if isinstance(given, Policy):
            return LayerConfig(kind, {}, cast("Any", given))
        options = dict(cast("dict[str, object]", given)) if isinstance(given, dict) else {}
        if kind == "attempt_timeout" and "seconds" not in options:
            total = merged.get("timeout") if "timeout" in order else None
            options["seconds"] = _part_of(total, has_total="timeout" in order)
        return self.finish((*own.path, kind), kind, options)

    def finish(self, path: Path, kind: str, given: dict[str, object]) -> LayerConfig | None:
        """Fill in what is not given, and let the constructor judge all of it together."""
        count = self.mistakes.count
        table = LAYERS[kind]
        filled = {**table.defaults(), **given}
        options = {key: filled[key] for key in table.options if key in filled}
        for key, value in options.items():
            if isinstance(value, Nested):
                made = self.attempt((*path, key), value.make)
                options[key] = table.options[key].default if made is None else made
        layer = LayerConfig(kind, options)
        budgets = dict.fromkeys(self.budgets, RetryBudget())
        if self.attempt(path, lambda: require(table, options)):
            self.attempt(path, lambda: layer.make("", budgets))
        return layer if self.mistakes.count == count else None

    def attempt(self, path: Path, make: Callable[[], object]) -> object:
        """Return what *make* returns, or ``None`` if it raises, which is then a mistake."""
        try:
            return make()
        except (TypeError, ValueError) as error:
            self.mistakes.add(path, str(error))
            return None


def _over(above: Mapping[str, object], below: Mapping[str, object]) -> dict[str, object]:
    merged = {
        key: value.over(below.get(key)) if isinstance(value, Nested) else value
        for key, value in above.items()
    }
    return {**below, **merged}


def _no_budget(name: str, known: Iterable[str]) -> str:
    return f"no budget has the name {short(name)}{suggestion(name, known)}"


def _missing(name: str, known: Iterable[str]) -> str:
    return f"is required, but missing{suggestion(name, known)}"


def _no_layer(kind: object) -> str:
    hint = suggestion(kind, LAYERS) if isinstance(kind, str) else ""
    return f"is no layer: {short(kind)}{hint or '; known are ' + ', '.join(LAYERS)}"


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping) or _is_record(value)


def _is_single(value: object) -> bool:
    return not isinstance(value, (list, tuple, Policy))


def _is_record(value: object) -> bool:
    """Tell whether *value* is an attrs object that stands for a table, and not for itself."""
    return attrs.has(type(value)) and not isinstance(value, (Policy, RetryBudget, Record))


def _part_of(total: Any, *, has_total: bool) -> object:
    """Return the seconds of an attempt that `Pipeline.standard` has for so many in all."""
    whole: Any = None
    if isinstance(total, Policy):
        whole = cast("Any", total)
    elif has_total:
        given = cast("dict[str, object]", total) if isinstance(total, dict) else {}
        whole = {**LAYERS["timeout"].defaults(), **given}["seconds"]
    standard = Pipeline.standard(timeout=whole, retry=None, breaker=None, bulkhead=None)
    last: Any = standard.layers[-1]
    return last.seconds
