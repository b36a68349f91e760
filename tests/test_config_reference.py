"""README.md has every key of a configuration, with its unit, default and range, as they are now.

What stands there is made of the constructors of the policies. After a change of them, write it
anew, from the root of the repository:

    python3 -m tests.test_config_reference
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from trio_resilience import Pipeline, RetryBudget
from trio_resilience._config_schema import (
    BACKOFFS,
    BUDGET,
    LAYERS,
    QUANTILES,
    REQUIRED,
    STANDARD,
    Option,
    Table,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

README = Path(__file__).parent.parent / "README.md"
BEGIN: Final = (
    "<!-- The configuration reference, made by `python3 -m tests.test_config_reference` -->"
)
END: Final = "<!-- The end of the configuration reference -->"

PROBES: Final = (-1, 0, 0.5, 2, 1e300, math.inf)
RULE: Final = re.compile(r"must be (.*?)(?:, got .*)?$", re.DOTALL)
KINDS: Final = {"an int": "integer", "a number": "number", "True or False": "true or false"}


# --- what the constructors say --------------------------------------------------------------------


def unit_of(option: Option) -> str:
    """Return what kind of value it is."""
    if option.key == "budget":
        return "name of a budget"
    if option.choices and not option.is_time:
        return "backoff"
    if option.is_time:
        return " or ".join(["time", *_other_of(option)])
    objection = option.objection("?") or ""
    return next((unit for words, unit in KINDS.items() if words in objection), "word")


def _other_of(option: Option) -> list[str]:
    if not option.choices:
        return []
    return ["quantile"] if "quantile" in option.choices else ["backoff"]


def range_of(option: Option) -> str:
    """Return what the constructor says of the values that it refuses."""
    found = [RULE.search(option.objection(probe) or "") for probe in _probes_of(option)]
    rules = [match[1].replace("one of ", "").replace("'", '"') for match in found if match]
    words = list(dict.fromkeys(rule for rule in rules if rule not in KINDS))
    if unit_of(option) != "true or false" and option.accepts(None):
        words.append("`false`: none")
    return ", ".join(words)


def _probes_of(option: Option) -> tuple[object, ...]:
    unit = unit_of(option)
    if unit in {"name of a budget", "backoff"}:
        return ()
    return ("?",) if unit == "word" else PROBES


def default_of(option: Option) -> str:
    """Return what it is if it is not given, as the file would have it."""
    value: Any = option.default
    if value is REQUIRED:
        return "required"
    if callable(value):
        return f'`kind = "{type(value).__name__.lower()}"`'
    words = {"None": "`false`", "True": "`true`", "False": "`false`", "inf": "`inf`"}
    shown = f"{value:g}" if isinstance(value, float) else repr(value).replace("'", '"')
    return words.get(shown, f"`{shown}`")


def rows(table: Table, **defaults: str) -> Iterator[str]:
    """Yield the lines of a table of all options."""
    yield "| key | value | default | range |"
    yield "|---|---|---|---|"
    for key, option in table.options.items():
        default = defaults.get(key, default_of(option))
        yield f"| `{key}` | {unit_of(option)} | {default} | {range_of(option)} |"


def reference() -> str:
    """Return the whole reference, in Markdown."""
    order = ", ".join(f"`{kind}`" for kind in STANDARD)
    lines = [
        BEGIN,
        "",
        "`layers`: a list of layers, the outermost first. The default is",
        f"{order};",
        "`rate_limit` is there if it is given. Any of them is left out by `false`.",
    ]
    for kind, table in LAYERS.items():
        alone = f"; a value alone is its `{table.shorthand}`" if table.shorthand else ""
        third = {"seconds": "a third of `timeout`, or `10`"} if kind == "attempt_timeout" else {}
        lines += ["", f"**`{kind}`**: a `{table.name}`{alone}.", "", *rows(table, **third)]
    for kind, table in BACKOFFS.items():
        lines += ["", f'Backoff `{{ kind = "{kind}" }}`: `{table.name}`.', "", *rows(table)]
    lines += ["", "Quantile, of the latencies: `Quantile`.", "", *rows(QUANTILES["quantile"])]
    lines += ["", "**`budgets.NAME`**: a `RetryBudget`.", "", *rows(BUDGET), "", END]
    return "\n".join(lines)


# --- tests ----------------------------------------------------------------------------------------


def test_the_reference_in_the_readme_is_current() -> None:
    text = README.read_text()
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    assert text[begin:end] == reference()


@pytest.mark.parametrize(
    "line",
    [
        "| `max_attempts` | integer | `3` | >= 1, `false`: none |",
        "| `failure_rate` | number | `false` | > 0, <= 1, `false`: none |",
        "| `window_seconds` | time | `false` | > 0, finite, `false`: none |",
        "| `enforce` | true or false | `true` |  |",
        "| `recovery_timeout` | time or backoff | `60` | >= 0, finite |",
        "| `rate` | number | required | > 0, finite |",
        '| `jitter` | word | `"full"` | "full", "equal", "none" |',
        '| `backoff` | backoff | `kind = "exponential"` |  |',
        "| `budget` | name of a budget | `false` | `false`: none |",
        "| `after` | time or quantile | required | >= 0 |",
    ],
)
def test_a_line_says_what_the_constructor_does(line: str) -> None:
    """These were written by hand."""
    assert line in reference().splitlines()


def test_the_defaults_are_those_of_the_standard_pipeline() -> None:
    """What is made by hand and what is made by a file are the same."""
    total: Any = Pipeline.standard().layers[0]
    assert f"| `seconds` | time | `{total.seconds:g}` | >= 0 |" in reference()
    assert f"| `ratio` | number | `{RetryBudget().ratio:g}` | > 0, finite |" in reference()


def write_reference() -> None:
    """Put the current reference into the place of the one in README.md."""
    text = README.read_text()
    begin, end = text.index(BEGIN), text.index(END) + len(END)
    README.write_text(text[:begin] + reference() + text[end:])


if __name__ == "__main__":
    write_reference()
