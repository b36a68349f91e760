"""The benchmarks run, measure what they name and hold it against bounds; no test judges a time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Never

import pytest
import trio
from trio.testing import assert_checkpoints

from benchmarks import _runner
from benchmarks.__main__ import SUITE, main
from benchmarks._report import as_record, as_text
from benchmarks._runner import ROOT, Benchmark, Bound, Case, Figures, Results
from benchmarks._timing import MICROSECONDS, timed
from benchmarks.bench_circuit_breaker import raise_further_in
from benchmarks.bench_instructions import (
    IDLE,
    LISTENERS,
    METRICS,
    METRICS_SPREAD,
    NOBODY,
    POLICIES,
    VALGRIND,
    by_listener,
    call,
    clock_for,
    instructions_of,
)
from benchmarks.bench_pipeline import bare, beyond_bare
from benchmarks.bench_stream import ALLOCATED, AT_ONCE, TASKS, LiveTasks
from trio_resilience import (
    CircuitBreaker,
    CircuitOpenError,
    LatencySnapshot,
    Metrics,
    Retry,
    Timeout,
    subscribe,
)
from trio_resilience._engine._report import current_subscriptions

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator
    from pathlib import Path

pytestmark = pytest.mark.exhaustive

BENCHMARKS = [benchmark for each in SUITE.values() for benchmark in each]
IN_THIS_PROCESS = [
    pytest.param(case, id=f"{benchmark.name}: {case.name}")
    for benchmark in BENCHMARKS
    for case in benchmark.cases
    if case.is_available and benchmark.name not in {"import", "instructions"}
]


def unmeasured(_: int) -> Figures:
    raise AssertionError("a record of results needs no run")


def compared(*bounds: Bound) -> Benchmark:
    """Make a benchmark of two cases, of which nothing is run."""
    cases = (Case("ours", unmeasured), Case("theirs", unmeasured, package="no_such_package"))
    return Benchmark(module="none", name="none", about="About it", cases=cases, bounds=bounds)


def results(benchmark: Benchmark, **times: list[float]) -> Results:
    """What each case took, round by round."""
    rounds = {name: [{"s": value} for value in values] for name, values in times.items()}
    return Results(benchmark, dict.fromkeys(times, 20), rounds)


@pytest.fixture
def short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks._timing.SECONDS_AT_LEAST", 1e-9)


@pytest.mark.parametrize("case", IN_THIS_PROCESS)
def test_a_case_does_its_work(case: Case, short_measurements: None) -> None:
    """Each contender that is installed does a few operations, and finds something positive."""
    figures = case.measure(40)
    assert figures
    assert all(value >= 0 for value in figures.values())
    assert figures.get(MICROSECONDS, 1) > 0


def test_our_own_cases_need_no_other_package() -> None:
    """So something is measured whatever is installed."""
    assert {benchmark.cases[0].package for benchmark in BENCHMARKS} == {""}


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_every_bound_is_about_cases_of_its_benchmark(benchmark: Benchmark) -> None:
    """A name that is misspelt would read as a case that could not run."""
    names = {case.name for case in benchmark.cases}
    assert benchmark.bounds
    assert {bound.case for bound in benchmark.bounds} <= names
    assert {bound.relative_to for bound in benchmark.bounds} - {""} <= names
    assert all(bound.at_most < float("inf") or bound.at_least > 0 for bound in benchmark.bounds)


def test_the_memory_of_a_stream_is_traced() -> None:
    """Ten times the operations allocate no more, and a task is counted for each worker."""
    measure = next(
        case.measure
        for case in SUITE["stream"][0].cases
        if case.name == "stream_with_limit, traced"
    )
    few, many = measure(300), measure(3_000)
    assert AT_ONCE <= many[TASKS] <= AT_ONCE + 3
    assert 0 < many[ALLOCATED] < 2 * few[ALLOCATED]


def test_live_tasks_are_those_at_the_same_time() -> None:
    """Three at once and then two more make three."""

    async def run() -> LiveTasks:
        tasks = LiveTasks()
        trio.lowlevel.add_instrument(tasks)
        for count in (3, 2):
            async with trio.open_nursery() as nursery:
                for _ in range(count):
                    nursery.start_soon(trio.lowlevel.checkpoint)
        trio.lowlevel.remove_instrument(tasks)
        return tasks

    tasks = trio.run(run)
    assert (tasks.peak, tasks.now) == (3, 0)


async def test_a_refusal_is_compared_with_what_comes_as_far() -> None:
    """Through as many frames, and with a checkpoint on the way."""
    breaker = CircuitBreaker()
    with breaker.isolate(), assert_checkpoints(), pytest.raises(CircuitOpenError) as refusal:
        await breaker.call(unreachable)
    with assert_checkpoints(), pytest.raises(ConnectionError) as plain:
        await raise_further_in()
    assert len(plain.traceback) == len(refusal.traceback) == 3


async def unreachable() -> Never:
    raise AssertionError("a call that is refused runs nothing")


async def test_a_policy_costs_what_it_takes_beyond_the_operation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the operation, which each of the parts runs, is in neither side of a comparison."""

    async def seconds_of(run: Callable[[int], object], size: int) -> float:
        await trio.lowlevel.checkpoint()
        return (0.25 if run is bare else 3.0) * size

    monkeypatch.setattr("benchmarks.bench_pipeline.seconds_of", seconds_of)
    fns = (Timeout(1).call, Retry().call, Timeout(1).call)
    assert await beyond_bare(fns, 4) == 3 * (3.0 - 0.25) * 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("listener", LISTENERS)
async def test_the_calls_whose_instructions_count_are_made(
    policy: str, listener: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as are asked for, and somebody listens to each of them unless nobody is to."""
    somebody_listens = list[bool]()

    async def succeed() -> None:
        await trio.lowlevel.checkpoint()
        somebody_listens.append(bool(current_subscriptions()))

    monkeypatch.setattr("benchmarks.bench_instructions.succeed", succeed)
    await call(policy, listener, 7)
    assert somebody_listens == [listener != NOBODY] * 7


@pytest.mark.parametrize("listener, buckets", [(METRICS, {1}), (METRICS_SPREAD, range(100, 764))])
def test_durations_whose_account_is_counted_are_the_same_in_every_run(
    listener: str, buckets: Container[int]
) -> None:
    """Alike, or spread over many of the buckets that `Metrics` sorts them into."""
    first, second = (trio.run(durations, 640, clock=clock_for(listener)) for _ in range(2))
    assert first.total == second.total
    assert first.buckets == second.buckets
    assert len(first.buckets) in buckets


async def durations(count: int) -> LatencySnapshot:
    """What `Metrics` finds out about the durations of so many calls."""
    metrics = Metrics()
    with subscribe(metrics):
        await call("Retry", NOBODY, count)
    [series] = metrics.snapshot().series
    return series.calls.succeeded


def test_only_the_instructions_of_further_calls_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of the start, nor of the first calls; and then they are compared."""
    each = {NOBODY: 40, METRICS: 90, METRICS_SPREAD: 110, IDLE: 200}

    def instructions_of(command: list[str]) -> int:
        *_, listener, count = command
        return 800_000_000 + each[listener] * int(count)

    monkeypatch.setattr("benchmarks.bench_instructions.instructions_of", instructions_of)
    assert by_listener("Retry", 1_000) == {
        **each,
        f"{METRICS} / {NOBODY}": 90 / 40,
        f"{METRICS_SPREAD} / {NOBODY}": 110 / 40,
        f"{IDLE} / {NOBODY}": 200 / 40,
    }


@pytest.mark.skipif(shutil.which(VALGRIND) is None, reason="needs valgrind")
def test_instructions_are_those_that_a_program_executes() -> None:
    """Four times the work adds four times as many."""

    def looping(count: int) -> int:
        # Not "-I": strings would hash differently each time, which is a tenth of the difference.
        return instructions_of([sys.executable, "-Sc", f"for _ in range({count}): pass"])

    start, few, many = looping(0), looping(10_000), looping(40_000)
    assert few - start > 10_000
    assert (many - start) / (few - start) == pytest.approx(4, rel=0.1)


def test_a_contender_that_does_not_do_its_work_has_no_time() -> None:
    """Returning early would look fast."""

    async def lazy(count: int) -> list[int]:
        await trio.lowlevel.checkpoint()
        return list(range(count - 1))

    with pytest.raises(RuntimeError, match="expected the results of 2 operations"):
        timed(lazy)(40)


def test_the_cases_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A B A B A B, each at its size, and never those that lack a package."""
    cases = (
        Case("a", unmeasured, 100),
        Case("b", unmeasured, 1),
        Case("c", unmeasured, package="no_such_package"),
    )
    benchmark = Benchmark(module="m", name="n", about="", cases=cases, bounds=())
    ran = list[tuple[str, int]]()
    figures: Iterator[Figures] = iter({"s": float(number)} for number in range(6))

    def measure(_: Benchmark, case: Case, size: int) -> Figures:
        ran.append((case.name, size))
        return next(figures)

    monkeypatch.setattr(_runner, "_measure_afresh", measure)
    found = _runner.run(benchmark, rounds=3, scale=0.1)
    assert ran == [("a", 10), ("b", 1)] * 3
    assert found.of("a", "s") == [0, 2, 4]
    assert found.of("b", "s") == [1, 3, 5]
    assert found.of("c", "s") == []


def test_what_does_not_vary_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark may have fewer rounds than are asked for."""
    benchmark = Benchmark(
        module="m", name="n", about="", cases=(Case("a", unmeasured),), bounds=(), most_rounds=1
    )

    def measure(*_: object) -> Figures:
        return {"s": 1.0}

    monkeypatch.setattr(_runner, "_measure_afresh", measure)
    assert len(_runner.run(benchmark, rounds=7).rounds["a"]) == 1


def test_ratios_are_of_medians_and_by_round() -> None:
    """One disturbed round changes neither much; the two may differ."""
    bound = Bound(case="ours", relative_to="theirs", figure="s", at_most=2)
    found = results(compared(bound), ours=[3.0, 4.0, 90.0], theirs=[2.0, 4.0, 1.0])
    assert found.median_of(bound) == 4.0 / 2.0
    assert found.median_by_round(bound) == 3.0 / 2.0


@pytest.mark.parametrize(
    "at_least, at_most, verdict",
    [(0, 2, "ok"), (0, 1.9, "MISSED"), (2, float("inf"), "ok"), (2.1, float("inf"), "MISSED")],
)
def test_a_bound_is_kept_or_missed(at_least: float, at_most: float, verdict: str) -> None:
    """Its last column says so, and its record."""
    bound = Bound(case="ours", relative_to="theirs", figure="s", at_most=at_most, at_least=at_least)
    found = results(compared(bound), ours=[4.0], theirs=[2.0])
    assert as_text(found).endswith(f"  {verdict}")
    assert as_record(found)["bounds"][0]["verdict"] == verdict


def test_a_bound_may_be_about_a_figure_itself() -> None:
    """Such as the memory that is added."""
    bound = Bound(case="ours", figure="s", at_most=8)
    found = results(compared(bound), ours=[7.0, 9.0, 7.5])
    assert found.median_of(bound) == 7.5
    assert found.median_by_round(bound) is None
    assert "ours, s" in as_text(found)


def test_a_peer_that_is_missing_is_said_to_be() -> None:
    """Its bound is neither kept nor missed."""
    bound = Bound(case="ours", relative_to="theirs", figure="s", at_most=2)
    text = as_text(results(compared(bound), ours=[4.0]))
    assert "(needs no_such_package)" in text
    assert text.endswith("  not measured")


def test_a_program_that_is_missing_is_said_to_be() -> None:
    """Its case is left out."""
    case = Case("ours", unmeasured, program="no_such_program")
    benchmark = Benchmark(module="m", name="n", about="", cases=(case,), bounds=())
    found = _runner.run(benchmark, rounds=1)
    assert found.rounds == {}
    assert "(needs no_such_program)" in as_text(found)


def python_m_benchmarks(*arguments: str) -> str:
    """Run it as a user does, and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


def test_the_command_prints_tables() -> None:
    """Every case that can run has its row, and every bound that was measured its verdict."""
    [benchmark] = SUITE["retry"]
    lines = python_m_benchmarks("retry", "--rounds", "1", "--scale", "0.001").splitlines()
    assert benchmark.about in lines
    for case in benchmark.cases:
        [row] = [line for line in lines if line.startswith(f"  {case.name}, µs")] or [
            line for line in lines if line.startswith(f"  {case.name} ") and "(needs" in line
        ]
        assert case.is_available == ("not run" not in row)
    verdicts = [line for line in lines if " / " in line]
    assert len(verdicts) == len(benchmark.bounds)
    assert verdicts[0].endswith(("  ok", "  MISSED"))


def test_the_command_prints_json() -> None:
    """Each benchmark has its record, with all rounds and the value for each bound."""
    arguments = ["concurrency", "stream", "import", "--rounds", "1", "--scale", "0.001", "--json"]
    document: dict[str, Any] = json.loads(python_m_benchmarks(*arguments))
    assert document["environment"]["trio"] == trio.__version__
    names = [record["name"] for record in document["benchmarks"]]
    assert names == ["5 at once", "100 at once", "memory", "import"]
    for record in document["benchmarks"]:
        assert record["rounds"]
        assert all(len(rounds) == 1 for rounds in record["rounds"].values())
        assert record["bounds"][0]["value"] > 0
        assert record["bounds"][0]["verdict"] in {"ok", "MISSED"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["no-such"], f"no benchmark 'no-such'; there are {', '.join(SUITE)}"),
        (["--rounds", "0"], "must be >= 1, got 0"),
        (["--rounds", "x"], "invalid"),
        (["--scale", "nan"], "must be > 0, got nan"),
        (["--scale", "-1"], "must be > 0, got -1"),
    ],
)
def test_bad_usage_is_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is run, and the exit status is 2."""
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


CRASHING = """
from benchmarks._runner import Benchmark, Case

def crash(size):
    raise OSError("planted")

BENCHMARKS = (
    Benchmark(module=__name__, name="b", about="", cases=(Case("c", crash),), bounds=()),
)
"""


def test_a_case_that_crashes_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is no figure that is missing, but an error, and its traceback is shown."""
    (tmp_path / "crashing.py").write_text(CRASHING, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    benchmark = Benchmark(
        module="crashing", name="b", about="", cases=(Case("c", unmeasured),), bounds=()
    )
    with pytest.raises(subprocess.CalledProcessError):
        _runner.run(benchmark, rounds=1)
    assert "OSError: planted" in capfd.readouterr().err
