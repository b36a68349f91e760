"""How many machine instructions a call executes, by who listens to its events.

Valgrind counts them, on a clock of ours: neither what else the machine does nor how fast it is
changes anything, so one round says it all.
"""

from __future__ import annotations

# Nothing here gives way, so that only the calls are counted.
# flake8: noqa: ASYNC124, ASYNC910
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from itertools import accumulate, cycle, repeat
from random import Random
from typing import TYPE_CHECKING, Final, final

import attrs
import trio

from benchmarks._runner import ROOT, Benchmark, Bound, Case, Figures
from trio_resilience import CircuitBreaker, Metrics, Retry, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

NOBODY: Final = "nobody listens"
METRICS: Final = "one Metrics"
METRICS_SPREAD: Final = "one Metrics, varied times"
IDLE: Final = "one that does nothing"

POLICIES: Final[dict[str, Callable[[], Retry | CircuitBreaker]]] = {
    "Retry": Retry,
    "CircuitBreaker": CircuitBreaker,
}
LISTENERS: Final[dict[str, Callable[[], AbstractContextManager[object]]]] = {
    NOBODY: nullcontext,
    METRICS: lambda: subscribe(Metrics()),
    METRICS_SPREAD: lambda: subscribe(Metrics()),
    IDLE: lambda: subscribe(lambda _: None),
}

WARM_UP: Final = 100
"""Calls after which imports are made, caches filled and byte code specialised."""

VALGRIND: Final = "valgrind"


@final
@attrs.frozen(eq=False)
class GivenTimes(trio.abc.Clock):
    """A clock that shows one time after the other as it is looked at, the same in every run.

    How far durations differ decides how many of them `Metrics` finds in the same bucket, so the
    time of the machine would change what there is to count, by some percent from run to run.
    """

    times: Iterator[float]
    # So that a look is as much work as one at trio's own clock: something of C's is added to it.
    offset: float = 1.0

    def start_clock(self) -> None:
        """Do nothing: time passes when it is looked at."""

    def current_time(self) -> float:
        """Return the next time."""
        return self.offset + next(self.times)

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Return the time that is left."""
        return deadline - self.current_time()


def clock_for(listener: str) -> GivenTimes:
    """Return one on which all calls take about a microsecond, as these do outside of valgrind.

    Or else, for durations that vary, about a millisecond, distributed exponentially.
    """
    if listener != METRICS_SPREAD:
        return GivenTimes(accumulate(repeat(1e-6)))
    random = Random(0)  # noqa: S311 - the same in every run
    return GivenTimes(accumulate(cycle([random.expovariate(1_000) for _ in range(1_000)])))


async def succeed() -> int:
    """Return at once."""
    return 1


async def call(policy: str, listener: str, count: int) -> None:
    """Call it so many times under a new policy, with the listener of that name."""
    caller = POLICIES[policy]()
    with LISTENERS[listener]():
        for _ in repeat(None, count):
            await caller.call(succeed)


def instructions_of(command: list[str]) -> int:
    """Run a program of ours, from the root of the repository, and count what it executes."""
    # Strings hash alike in all the programs, or their dictionaries would collide differently.
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    valgrind = [VALGRIND, "--tool=callgrind", "--callgrind-out-file=/dev/null", "--log-fd=1"]
    done = subprocess.run(
        [*valgrind, *command],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    [count] = re.findall(r"^==\d+== Collected : (\d+)$", done.stdout, re.MULTILINE)
    return int(count)


def instructions_per_call(policy: str, listener: str, size: int) -> float:
    """Return what *size* calls add to a program that has made some already, for each of them."""
    program = [sys.executable, "-m", "benchmarks.bench_instructions", policy, listener]
    few, many = (instructions_of([*program, str(count)]) for count in (WARM_UP, WARM_UP + size))
    return (many - few) / size


def by_listener(policy: str, size: int) -> Figures:
    """Return the instructions for each listener, and how many times those for none they are."""
    found = {listener: instructions_per_call(policy, listener, size) for listener in LISTENERS}
    ratios = {_ratio(each): found[each] / found[NOBODY] for each in LISTENERS if each != NOBODY}
    return found | ratios


def _ratio(listener: str) -> str:
    return f"{listener} / {NOBODY}"


def _case(policy: str) -> Case:
    return Case(f"{policy}.call", partial(by_listener, policy), 1_000, program=VALGRIND)


BENCHMARKS = (
    Benchmark(
        module="benchmarks.bench_instructions",
        name="instructions",
        about="Machine instructions of a call that succeeds at once, by who listens",
        cases=tuple(map(_case, POLICIES)),
        bounds=tuple(
            Bound(case=f"{policy}.call", figure=_ratio(listener), at_most=2.5)
            for policy in POLICIES
            for listener in (METRICS, METRICS_SPREAD)
        ),
        most_rounds=1,
    ),
)


if __name__ == "__main__":
    _, policy, listener, count = sys.argv
    trio.run(call, policy, listener, int(count), clock=clock_for(listener))
