"""Show results: as tables for people, as records for programs."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

from benchmarks._runner import Bound, Results

NAME_WIDTH = 66


def environment() -> dict[str, str]:
    """Return what the numbers depend on, beside the machine."""
    packages = (
        "trio", "aiobreaker", "aiolimiter", "aiometer", "hyx", "interlock-cb", "purgatory",
        "pybreaker", "pyrate-limiter", "stamina", "tenacity", "throttled-py",
    )  # fmt: skip
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def as_text(results: Results) -> str:
    """Return two tables: what each case took, and how the bounds were kept."""
    lines = [
        f"\n{results.benchmark.about}",
        _row("", "median", "least", "most", "size"),
        *_figures(results),
        _row("", "value", "by round", "bound"),
        *(_bound_line(results, bound) for bound in results.benchmark.bounds),
    ]
    return "\n".join(lines)


def _row(name: str, *columns: str) -> str:
    return f"  {name:<{NAME_WIDTH}}" + "".join(f"{column:>10}" for column in columns)


def _figures(results: Results) -> Iterator[str]:
    for case in results.benchmark.cases:
        if not (rounds := results.rounds.get(case.name)):
            yield _row(case.name, "not run") + f"  (needs {case.package or case.program})"
            continue
        for figure in rounds[0]:
            values = results.of(case.name, figure)
            columns = [_number(value) for value in (median(values), min(values), max(values))]
            yield _row(f"{case.name}, {figure}", *columns, f"{results.sizes[case.name]:,}")


def _bound_line(results: Results, bound: Bound) -> str:
    value, by_round = results.median_of(bound), results.median_by_round(bound)
    row = _row(_subject(bound), _number(value), _number(by_round), _limit(bound))
    return f"{row}  {verdict(bound, value)}"


def _subject(bound: Bound) -> str:
    ratio = f"{bound.case} / {bound.relative_to}" if bound.relative_to else bound.case
    return f"{ratio}, {bound.figure}"


def _limit(bound: Bound) -> str:
    return f"<= {bound.at_most:g}" if bound.at_most < math.inf else f">= {bound.at_least:g}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 1 else f"{value:.4g}"


def verdict(bound: Bound, value: float | None) -> str:
    """Return whether the bound is kept, in one word if it was measured."""
    if value is None:
        return "not measured"
    return "ok" if bound.is_kept_by(value) else "MISSED"


def as_record(results: Results) -> dict[str, Any]:
    """Return everything that was measured, as what JSON can express."""
    return {
        "name": results.benchmark.name,
        "about": results.benchmark.about,
        "sizes": results.sizes,
        "rounds": results.rounds,
        "bounds": [_bound_record(results, bound) for bound in results.benchmark.bounds],
    }


def _bound_record(results: Results, bound: Bound) -> dict[str, Any]:
    value = results.median_of(bound)
    return {
        "case": bound.case,
        "relative_to": bound.relative_to or None,
        "figure": bound.figure,
        "at_most": bound.at_most if bound.at_most < math.inf else None,
        "at_least": bound.at_least or None,
        "value": value,
        "median_by_round": results.median_by_round(bound),
        "verdict": verdict(bound, value),
    }
