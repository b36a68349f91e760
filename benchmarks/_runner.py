"""Run cases in fresh interpreters, in turns, so that what disturbs one of them disturbs all.

A case is measured in an interpreter of its own (`benchmarks._case`), once in every round; the cases
of a benchmark take turns (A B C A B C ...), and what is reported are medians over the rounds.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import TypeAlias, final

import attrs

Figures: TypeAlias = dict[str, float]
"""What one run of a case found: numbers by the names under which they are shown."""

ROOT = Path(__file__).parent.parent


@final
@attrs.frozen
class Case:
    """One contender: *measure* is called with *size* in a fresh interpreter."""

    name: str
    measure: Callable[[int], Figures]
    size: int = 20_000
    package: str = ""
    """What has to be installed for it, beside the dependencies of `trio_resilience`."""
    program: str = ""
    """What has to be found on the path for it."""

    @property
    def is_available(self) -> bool:
        """Whether it can run here."""
        if self.program and shutil.which(self.program) is None:
            return False
        return not self.package or importlib.util.find_spec(self.package) is not None


@final
@attrs.frozen(kw_only=True)
class Bound:
    """What a figure of *case*, or its ratio to that of *relative_to*, is to keep."""

    case: str
    relative_to: str = ""
    figure: str
    at_most: float = math.inf
    at_least: float = 0.0

    def is_kept_by(self, value: float) -> bool:
        """Whether *value* lies within."""
        return self.at_least <= value <= self.at_most


@final
@attrs.frozen(kw_only=True)
class Benchmark:
    """Cases that are compared with one another."""

    module: str
    """Where a fresh interpreter finds it: a module with a list ``BENCHMARKS``."""
    name: str
    about: str
    cases: tuple[Case, ...]
    bounds: tuple[Bound, ...]
    most_rounds: float = math.inf
    """More would show nothing new."""


@final
@attrs.frozen
class Results:
    """What was measured: for every case that could run, its figures in each round."""

    benchmark: Benchmark
    sizes: dict[str, int]
    rounds: dict[str, list[Figures]]

    def of(self, case: str, figure: str) -> list[float]:
        """Return one figure of *case*, round by round; nothing if it did not run."""
        return [figures[figure] for figures in self.rounds.get(case, ())]

    def median_of(self, bound: Bound) -> float | None:
        """Return the median that *bound* is about, or the ratio of the two medians."""
        values = self.of(bound.case, bound.figure)
        others = self.of(bound.relative_to, bound.figure) if bound.relative_to else [1.0]
        return median(values) / median(others) if values and others else None

    def median_by_round(self, bound: Bound) -> float | None:
        """Return the median of the ratios in each round, which drifts less than its parts."""
        values = self.of(bound.case, bound.figure)
        others = self.of(bound.relative_to, bound.figure)
        ratios = [value / other for value, other in zip(values, others, strict=False)]
        return median(ratios) if ratios else None


def run(
    benchmark: Benchmark,
    *,
    rounds: int,
    scale: float = 1.0,
    on_progress: Callable[[str], object] = lambda _: None,
) -> Results:
    """Run every case that can run here, once in each of so many rounds.

    A case that crashes raises `subprocess.CalledProcessError`; its traceback is on stderr.
    """
    cases = [case for case in benchmark.cases if case.is_available]
    sizes = {case.name: max(1, round(case.size * scale)) for case in cases}
    found: dict[str, list[Figures]] = {case.name: [] for case in cases}
    for number, case in _turns(cases, int(min(rounds, benchmark.most_rounds))):
        on_progress(f"{benchmark.name}, round {number}: {case.name}")
        found[case.name].append(_measure_afresh(benchmark, case, sizes[case.name]))
    return Results(benchmark, sizes, found)


def _turns(cases: list[Case], rounds: int) -> Iterator[tuple[int, Case]]:
    for number in range(1, rounds + 1):
        for case in cases:
            yield number, case


def _measure_afresh(benchmark: Benchmark, case: Case, size: int) -> Figures:
    words = (benchmark.module, benchmark.name, case.name, str(size))
    return output_of([sys.executable, "-m", "benchmarks._case", *words])


def output_of(command: list[str]) -> Figures:
    """Run a program of ours, from the root of the repository, and read the JSON that it prints."""
    # Without compiled modules at hand, an import would measure the compiler.
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    figures: Figures = json.loads(done.stdout)
    return figures
