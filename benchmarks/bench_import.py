"""What the import costs beyond that of the three dependencies."""

from __future__ import annotations

import sys
from functools import partial
from typing import Final

from benchmarks._runner import Benchmark, Bound, Case, Figures, output_of

OURS = "import trio_resilience"
HEART = "from trio_resilience import run_with_limit, Retry, Timeout"
ALL = "from trio_resilience import *"
DEPENDENCIES = "import trio, attrs, outcome"

WALL: Final = "ms"
"""From before the import to after it; what the interpreter takes to start is left out."""
PROCESSOR: Final = "ms of processor"

IMPORTS = 5
"""How often an interpreter is started afresh for one figure, which is the least that was found."""

# Nothing is imported here that would otherwise be part of what is measured.
_PROGRAM = """
from time import perf_counter, process_time
wall, processor = perf_counter(), process_time()
{statement}
wall, processor = perf_counter() - wall, process_time() - processor
print(f'{{{{"{wall_name}": {{wall * 1e3}}, "{processor_name}": {{processor * 1e3}}}}}}')
"""


def import_time(statement: str, count: int) -> Figures:
    """Execute *statement* in so many fresh interpreters, one after the other."""
    program = _PROGRAM.format(statement=statement, wall_name=WALL, processor_name=PROCESSOR)
    found = [output_of([sys.executable, "-c", program]) for _ in range(count)]
    return {name: min(figures[name] for figures in found) for name in (WALL, PROCESSOR)}


def _case(statement: str) -> Case:
    return Case(statement, partial(import_time, statement), IMPORTS)


BENCHMARKS = (
    Benchmark(
        module="benchmarks.bench_import",
        name="import",
        about="Import in a fresh interpreter, beyond the start of the interpreter itself",
        cases=tuple(map(_case, (OURS, HEART, ALL, DEPENDENCIES))),
        bounds=tuple(
            Bound(case=case, relative_to=DEPENDENCIES, figure=figure, at_most=1.3)
            for case in (OURS, HEART)
            for figure in (WALL, PROCESSOR)
        ),
    ),
)
