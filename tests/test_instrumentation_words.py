"""What events say is told in words that any tool can take, and the table of numbers is sound."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests._instrumentation import (
    FAILED,
    REFUSED,
    RESULT,
    ForeignEvent,
    Mute,
    ended,
    every_event,
    happened,
)
from trio_resilience import (
    CallFinished,
    CallStarted,
    CircuitState,
    Event,
    FailureRecord,
    HealthStatus,
    RetryScheduled,
)
from trio_resilience.instrumentation._measures import COUNTERS, DURATIONS, Bounded, measures
from trio_resilience.instrumentation._words import (
    error_message,
    error_type,
    event_name,
    fields,
    level,
    outcome,
    text,
)


def test_every_kind_of_event_is_tried() -> None:
    """No tool is tested without one."""
    known = {kind.__name__ for kind in Event.__subclasses__() if "trio_res" in kind.__module__}
    assert known <= {type(event).__name__ for event in every_event(FAILED)}


@given(st.text(st.characters()))
def test_a_text_can_be_encoded_and_is_short(words: str) -> None:
    """Whatever characters there are in it, surrogates too."""
    said = text(words)
    assert said.encode() and len(said) <= 200 if words else said == ""


def test_a_text_that_is_short_and_can_be_encoded_is_left_as_it_is() -> None:
    assert text("größe ☃ 'x'\n") == "größe ☃ 'x'\n"
    assert text("x" * 200) == "x" * 200
    assert text("x" * 201) == "x" * 199 + "…"


def test_what_has_no_words_is_told_by_its_class() -> None:
    """An error whose `__str__` fails breaks nothing."""
    assert text(Mute()) == "<Mute>"
    assert error_type(Mute()) == "tests._instrumentation.Mute"


def test_an_error_is_told_by_its_class_and_its_words() -> None:
    assert (error_type(FAILED), error_message(FAILED)) == ("OSError", "no route")
    record = FailureRecord(type_name="KeyError", message="'x'", time=1.0)
    assert (error_type(record), error_message(record)) == ("KeyError", "'x'")


def test_the_fields_of_an_event() -> None:
    """By name: what is None is left out, and what the operation returned is never told."""
    event = happened(RetryScheduled, attempt=1, delay=0.5, error=FAILED, result=RESULT)
    assert fields(event) == {
        "time": 1.5,
        "task": "main",
        "policy": "db",
        "operation": "load",
        "attempt": 1,
        "delay": 0.5,
        "error": "no route",
        "error_type": "OSError",
    }
    again = happened(RetryScheduled, attempt=1, delay=0.5, error=None, result=RESULT)
    assert RESULT not in fields(again).values()
    assert "error" not in fields(again)


def test_the_fields_of_an_event_that_is_not_known() -> None:
    """What it holds that has no plain words is left out, and names that are taken are changed."""
    said = fields(happened(ForeignEvent), {"args", "name"})
    assert "thing" not in said
    assert (said["name_"], said["args_"]) == ("n", "1, 2")
    assert not {"name", "args"} & set(said)
    assert said["level"] == str(2**70)


def test_names_of_events() -> None:
    assert event_name(happened(CallStarted)) == "call_started"


@pytest.mark.parametrize(
    "ending, word",
    [
        (ended(), "succeeded"),
        (ended(FAILED), "failed"),
        (ended(REFUSED), "refused"),
        (ended(cancelled=True), "cancelled"),
    ],
)
def test_outcomes(ending: dict[str, object], word: str) -> None:
    assert outcome(happened(CallFinished, **ending)) == word


def test_levels() -> None:
    """What needs somebody is an error, what costs something a warning, what heals an info."""
    found: dict[str, set[str]] = {}
    for event in every_event(FAILED):
        state = getattr(event, "state", None) or getattr(event, "status", "")
        found.setdefault(level(event), set()).add(f"{event_name(event)} {state}".strip())
    changed = "circuit_state_changed"
    assert found["error"] == {
        *(f"{changed} {CircuitState.OPEN}", f"{changed} {CircuitState.ISOLATED}"),
        *("config_reload_failed", f"health_changed {HealthStatus.UNHEALTHY}"),
    }
    assert found["warning"] == {
        *("retry_gave_up", "rejected", "timed_out", "fallback_used", "loser_failed"),
        *("batch_flushed", f"health_changed {HealthStatus.DEGRADED}"),
    }
    assert found["info"] == {
        *("retry_scheduled", "rejection_skipped", "config_reloaded"),
        *(f"{changed} {CircuitState.CLOSED}", f"{changed} {CircuitState.HALF_OPEN}"),
        f"health_changed {HealthStatus.HEALTHY}",
    }


def test_every_quantity_is_added_to_by_some_event() -> None:
    """And each measure is of a quantity that tools know, with a value for each of its labels."""
    found = [measure for event in every_event(FAILED) for measure in measures(event)]
    assert {quantity for quantity, _, _ in found} == {*COUNTERS, *DURATIONS}
    for quantity, amount, last in found:
        assert bool(last) == (quantity.labels[-1] not in {"policy", "operation"})
        assert amount > 0


def test_values_of_a_label_are_bounded() -> None:
    """The first ones are themselves, also later; all others are one."""
    bounded = Bounded(2)
    assert [bounded(word) for word in "abcab"] == ["a", "b", "other", "a", "b"]
