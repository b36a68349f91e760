"""The demo's server follows a script that only the seed decides."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter

import pytest

from trio_resilience._cli._faults import (
    MAX_ATTEMPTS,
    MAX_FAULTS_IN_A_ROW,
    MAX_LATENCY,
    PROFILES,
    Answer,
    FaultPlan,
    Outage,
    ProfileName,
    Treatment,
)

PATHS = [f"/page/{number}" for number in range(1, 201)]
PASSING = set(Treatment) - {Treatment.PAGE, Treatment.GONE, Treatment.BROKEN}
ALL_PROFILES = pytest.mark.parametrize("profile", list(PROFILES))


@ALL_PROFILES
def test_the_order_of_arrival_changes_nothing(profile: ProfileName) -> None:
    keys = [(path, attempt) for path in PATHS for attempt in range(1, 7)]
    in_order = {key: FaultPlan(profile, 7).answer(*key) for key in keys}
    random.Random(0).shuffle(keys)
    plan = FaultPlan(profile, 7)
    assert {key: plan.answer(*key) for key in keys} == in_order


def test_another_process_draws_the_same_faults() -> None:
    code = (
        "from trio_resilience._cli._faults import FaultPlan\n"
        "plan = FaultPlan('harsh', 3)\n"
        "print([plan.answer(f'/page/{n}', 1) for n in range(50)])"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    plan = FaultPlan("harsh", 3)
    assert outputs == {f"{[plan.answer(f'/page/{n}', 1) for n in range(50)]}\n"}


def test_another_seed_draws_other_faults() -> None:
    answers = [[FaultPlan("mild", seed).answer(path, 1) for path in PATHS] for seed in (1, 2)]
    assert answers[0] != answers[1]


@pytest.mark.parametrize("profile", ["none", "mild"])
def test_no_path_fails_for_longer_than_the_client_tries(profile: ProfileName) -> None:
    """Whatever the seed is: so a run without permanent failures succeeds by construction."""
    assert MAX_FAULTS_IN_A_ROW < MAX_ATTEMPTS
    for seed in range(50):
        plan = FaultPlan(profile, seed)
        for path in PATHS:
            assert plan.permanent_failure(path) is None
            assert plan.answer(path, MAX_FAULTS_IN_A_ROW + 1).treatment is Treatment.PAGE


def test_a_fault_that_one_attempt_meets_the_next_may_not() -> None:
    plan = FaultPlan("mild", 1)
    drawn = {tuple(plan.answer(path, n).treatment in PASSING for n in (1, 2)) for path in PATHS}
    assert drawn == {(False, False), (False, True), (True, False), (True, True)}


def test_some_path_does_fail_as_often_in_a_row_as_is_allowed() -> None:
    plan = FaultPlan("harsh", 1)
    runs = [[plan.answer(path, n).treatment in PASSING for n in range(1, 5)] for path in PATHS]
    assert [True, True, True, False] in runs


@pytest.mark.parametrize("profile", ["mild", "harsh"])
def test_every_kind_of_fault_occurs_among_the_default_pages(profile: ProfileName) -> None:
    drawn = {FaultPlan(profile, 1).answer(path, 1).treatment for path in PATHS}
    assert drawn > PASSING


def test_faults_are_as_frequent_as_the_profile_says() -> None:
    drawn = Counter(FaultPlan("mild", 1).answer(f"/{n}", 1).treatment for n in range(20_000))
    for treatment, chance in PROFILES["mild"].passing.items():
        assert drawn[treatment] / 20_000 == pytest.approx(chance, abs=0.01)


def test_without_faults_every_page_comes() -> None:
    assert {FaultPlan("none", 5).answer(path, 1).treatment for path in PATHS} == {Treatment.PAGE}


def test_a_permanent_failure_is_the_same_at_every_attempt() -> None:
    plan = FaultPlan("harsh", 1)
    permanent = {path: plan.permanent_failure(path) for path in PATHS}
    assert set(permanent.values()) - {None} == {Treatment.GONE, Treatment.BROKEN}
    for path, failure in permanent.items():
        drawn = {plan.answer(path, attempt).treatment for attempt in range(1, 20)}
        assert (
            drawn == {failure} if failure else drawn.isdisjoint({Treatment.GONE, Treatment.BROKEN})
        )


def test_latencies_have_a_long_tail_that_ends() -> None:
    """Half are below 11 ms, one in a hundred is above 100 ms, none is above the limit."""
    latencies = sorted(FaultPlan("none", 1).answer(f"/{n}", 1).latency for n in range(10_000))
    assert latencies[5_000] == pytest.approx(0.010, rel=0.1)
    assert latencies[9_900] > 0.1
    assert latencies[-1] == MAX_LATENCY


def test_only_some_answers_say_when_to_come_back() -> None:
    asking = {treatment for treatment in Treatment if Answer(treatment, 0.0).retry_after}
    assert asking == {Treatment.UNAVAILABLE_UNTIL, Treatment.TOO_MANY}


def test_an_outage_begins_with_a_request_and_ends_by_the_clock() -> None:
    outage = Outage(after=2, seconds=3.0)
    down: list[bool] = []
    for number, now in enumerate([5.0, 6.0, 10.0, 12.9, 13.0, 14.0], start=1):
        outage.note_request(number, now)
        down.append(outage.is_on(now))
    assert down == [False, False, True, True, False, False]
    assert outage.began_at == 10.0
    assert outage.received == 2


def test_by_default_there_is_no_outage() -> None:
    outage = Outage()
    outage.note_request(10**9, 1.0)
    assert not outage.is_on(1.0)
    assert (outage.began_at, outage.received) == (None, 0)
