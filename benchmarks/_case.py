"""Measure one case, as a program: ``python -m benchmarks._case MODULE BENCHMARK CASE SIZE``."""

from __future__ import annotations

import importlib
import json
import sys

from benchmarks._runner import Benchmark


def main(module: str, benchmark_name: str, case_name: str, size: str) -> None:
    """Find the case, measure it, and print what it found as JSON."""
    benchmarks: tuple[Benchmark, ...] = importlib.import_module(module).BENCHMARKS
    benchmark = next(each for each in benchmarks if each.name == benchmark_name)
    case = next(each for each in benchmark.cases if each.name == case_name)
    print(json.dumps(case.measure(int(size))))


if __name__ == "__main__":
    main(*sys.argv[1:])
