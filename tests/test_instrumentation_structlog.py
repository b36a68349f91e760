"""Events are written to structlog, as key-values."""

from __future__ import annotations

import json
import logging

import pytest
import structlog
from structlog.testing import capture_logs

from tests._instrumentation import FAILED, RESULT, ForeignEvent, every_event, happened
from trio_resilience import CallFinished, RetryScheduled
from trio_resilience.instrumentation.structlog import StructlogListener


def test_an_entry_has_a_level_a_name_and_what_the_event_says() -> None:
    with capture_logs() as entries:
        StructlogListener()(happened(RetryScheduled, attempt=1, delay=0.5, error=FAILED))
    assert entries == [
        {
            "event": "retry_scheduled",
            "log_level": "info",
            "time": 1.5,
            "task": "main",
            "policy": "db",
            "operation": "load",
            "attempt": 1,
            "delay": 0.5,
            "error": "no route",
            "error_type": "OSError",
        }
    ]


def test_results_are_never_logged() -> None:
    with capture_logs() as entries:
        for event in every_event(FAILED):
            StructlogListener()(event)
    assert len(entries) == len(every_event(FAILED))
    assert RESULT not in str(entries)


def test_every_event_can_be_rendered_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    """By the processors that are usual."""
    logger = structlog.wrap_logger(
        structlog.PrintLogger(),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
    )
    for event in every_event(FAILED):
        StructlogListener(logger)(event)
    entries = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(entries) == len(every_event(FAILED))
    foreign = entries[-1]
    assert (foreign["event"], foreign["event_"]) == ("foreign_event", "e")
    assert (foreign["level"], foreign["level_"]) == ("debug", str(2**70))


def test_it_can_hand_on_to_the_standard_library(caplog: pytest.LogCaptureFixture) -> None:
    """A logger of that kind takes names of its own, which events do not use."""
    caplog.set_level("DEBUG", "app")
    logger = structlog.wrap_logger(
        logging.getLogger("app"),
        processors=[structlog.stdlib.render_to_log_kwargs],
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    StructlogListener(logger)(happened(RetryScheduled, attempt=1, delay=0.5, error=FAILED))
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "retry_scheduled")
    ]
    StructlogListener(logger)(happened(ForeignEvent))
    assert vars(caplog.records[-1])["name_"] == "n"


def test_what_a_level_leaves_out_is_not_put_into_words(capsys: pytest.CaptureFixture[str]) -> None:
    """It costs next to nothing; and what the level lets through is logged, as by other loggers."""
    asked: list[str] = []

    class Asked(Exception):  # noqa: N818 - it is for one thing only
        def __str__(self) -> str:
            asked.append("words")
            return "no route"

    logger = structlog.wrap_logger(
        structlog.PrintLogger(),
        processors=[structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    listener = StructlogListener(logger)
    listener(happened(CallFinished, duration=1.0, error=Asked(), cancelled=False))
    assert (asked, capsys.readouterr().out) == ([], "")
    listener(happened(RetryScheduled, attempt=1, delay=0.5, error=Asked()))
    assert asked == ["words"]
    assert json.loads(capsys.readouterr().out)["error"] == "no route"


def test_a_logger_is_asked_for_nothing_but_to_log() -> None:
    """Some take any attribute for a way to log."""
    logger = structlog.testing.CapturingLogger()
    StructlogListener(logger)(happened(RetryScheduled, attempt=1, delay=0.5, error=FAILED))
    assert [call.method_name for call in logger.calls] == ["info"]
