"""``python -m benchmarks``: run benchmarks and print medians, ratios, and the bounds on them.

A bound that is missed is shown, and changes nothing else: the exit status is that of a program that
ran to its end. What the extra ``bench`` installs is left out where it is missing, and so is what
valgrind counts.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence

from benchmarks import (
    bench_batching,
    bench_circuit_breaker,
    bench_concurrency,
    bench_import,
    bench_instructions,
    bench_keys,
    bench_permits,
    bench_pipeline,
    bench_rate,
    bench_retry,
    bench_stream,
)
from benchmarks._report import as_record, as_text, environment
from benchmarks._runner import Benchmark, Results, run

SUITE: dict[str, tuple[Benchmark, ...]] = {
    "concurrency": bench_concurrency.BENCHMARKS,
    "keys": bench_keys.BENCHMARKS,
    "permits": bench_permits.BENCHMARKS,
    "rate": bench_rate.BENCHMARKS,
    "batching": bench_batching.BENCHMARKS,
    "circuit": bench_circuit_breaker.BENCHMARKS,
    "pipeline": bench_pipeline.BENCHMARKS,
    "retry": bench_retry.BENCHMARKS,
    "stream": bench_stream.BENCHMARKS,
    "instructions": bench_instructions.BENCHMARKS,
    "import": bench_import.BENCHMARKS,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = _parser().parse_args(arguments)
    chosen = [each for name in options.names or SUITE for each in SUITE[name]]
    results = (_run(each, options.rounds, options.scale) for each in chosen)
    if options.json:
        records = [as_record(each) for each in results]
        print(json.dumps({"environment": environment(), "benchmarks": records}, indent=2))
    else:
        print(", ".join(f"{name} {found}" for name, found in environment().items()))
        for each in results:
            print(as_text(each), flush=True)


def _run(benchmark: Benchmark, rounds: int, scale: float) -> Results:
    results = run(benchmark, rounds=rounds, scale=scale, on_progress=_show_progress)
    _show_progress("")
    return results


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", type=_name, metavar="NAME", help=f"default: all of {', '.join(SUITE)}"
    )
    parser.add_argument("--rounds", type=_positive_int, default=7, help="default: 7")
    parser.add_argument(
        "--scale", type=_positive, default=1.0, help="multiply the sizes, for a quick look: 0.01"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    return parser


def _name(text: str) -> str:
    if text not in SUITE:
        raise argparse.ArgumentTypeError(f"no benchmark {text!r}; there are {', '.join(SUITE)}")
    return text


def _positive_int(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {text}")
    return int(text)


def _positive(text: str) -> float:
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"must be > 0, got {text}")
    return float(text)


def _show_progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
