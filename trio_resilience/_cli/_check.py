"""Show what a configuration comes to, or all that is wrong with it."""

from __future__ import annotations

import math
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import attrs
from rich.text import Text
from rich.tree import Tree

from trio_resilience import ConfigError, Quantile
from trio_resilience._cli._terminal import UsageError, render, write_stdout
from trio_resilience._registry import Registry

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from trio_resilience._config import Config
    from trio_resilience._registry import RegisteredPolicy

SAMPLE: Final = Path(__file__).with_name("sample.toml")
"""A configuration that shows what can be said; it ships with the package."""


def run_check(path: Path) -> int:
    """Print the pipelines that the file at *path* describes, and return the exit status."""
    with mistakes_told():
        registry = Registry.load(path)
    tree = Tree(_text(str(path)))
    for name, budget in registry.config.budgets.items():
        _add_options(tree.add(_text(f"budget {name}")), cast("dict[str, object]", budget))
    for name in registry:
        _add_pipeline(tree.add(_text(name)), registry.config, registry[name])
    write_stdout(render(tree))
    return 0


@contextmanager
def mistakes_told() -> Generator[None]:
    """Refuse the command for all that is wrong with a configuration, each mistake on a line."""
    try:
        yield
    except ConfigError as error:
        raise UsageError(*error.errors) from error
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from error


def _add_pipeline(branch: Tree, config: Config, policy: RegisteredPolicy) -> None:
    for layer in config.pipelines[policy.name].layers:
        _add_options(branch.add(Text(layer.kind)), layer.options)
    for odd in policy.pipeline.advice():
        branch.add(_text(f"advice: {odd.reason}"))


def _add_options(branch: Tree, options: Mapping[str, object]) -> None:
    for key, value in options.items():
        branch.add(_text(f"{key} = {shown(value)}"))


def _text(line: str) -> Text:
    """Return *line* as a terminal can show it, which what is in a name might command."""
    return Text(line if line.isprintable() else repr(line)[1:-1])


def shown(value: object) -> str:
    """Return *value* as the file would have it."""
    if value is None:
        return "false"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return "inf" if value == math.inf else f"{value:g}"
    if isinstance(value, (int, str)):
        return f'"{value}"' if isinstance(value, str) else str(value)
    return _shown_table(value)


def _shown_table(value: Any) -> str:
    cls: Any = value.__class__
    fields: Any = attrs.fields(cls)
    pairs = [f"{field.name} = {shown(getattr(value, field.name))}" for field in fields]
    if not isinstance(value, Quantile):  # the only one where it is
        pairs.insert(0, f'kind = "{type(value).__name__.lower()}"')
    return f"{{{', '.join(pairs)}}}"
