"""Tell what is odd about the pipelines of a program."""

from __future__ import annotations

from pkgutil import resolve_name
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trio_resilience import Pipeline
from trio_resilience._cli._terminal import EXIT_FAILED, UsageError, write_stdout

if TYPE_CHECKING:
    from collections.abc import Iterable


def run_advice(targets: Iterable[str]) -> int:
    """Print the advice on each pipeline that is named, and return the exit status."""
    # All are found before anything is printed.
    pipelines = {name: found for target in targets for name, found in _find(target).items()}
    lines = {name: [each.reason for each in found.advice()] for name, found in pipelines.items()}
    for name, reasons in lines.items():
        for text in reasons or ["nothing is odd"]:
            write_stdout(f"{name}: {text}\n")
    return EXIT_FAILED if any(lines.values()) else 0


def _find(target: str) -> dict[str, Pipeline[Any]]:
    found = _import(target)
    if isinstance(found, Pipeline):
        return {target: found}
    if not isinstance(found, ModuleType):
        raise UsageError(f"{target} is no Pipeline, but {found!r}")
    named: dict[str, Any] = vars(found)
    members = [name for name, value in named.items() if isinstance(value, Pipeline)]
    if not members:
        raise UsageError(f"{target} has no Pipeline at module level")
    return {f"{target}:{name}": named[name] for name in members}


def _import(target: str) -> object:
    try:
        return resolve_name(target)
    except Exception as error:
        # To import a module is to run it, which may raise anything.
        raise UsageError(f"can't import {target}: {type(error).__name__}: {error}") from error
