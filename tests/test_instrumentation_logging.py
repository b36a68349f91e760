"""Events are written to the standard library's `logging`."""

from __future__ import annotations

import logging

import pytest

from tests._instrumentation import FAILED, RESULT, ForeignEvent, every_event, happened
from trio_resilience import CallStarted, RetryScheduled
from trio_resilience.instrumentation.logging import LoggingListener


def test_a_record_has_a_level_a_message_and_what_the_event_says(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG", "trio_resilience")
    LoggingListener()(happened(RetryScheduled, attempt=1, delay=0.5, error=FAILED))
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("trio_resilience", "INFO")
    assert record.getMessage() == (
        "retry_scheduled: time=1.5 task='main' policy='db' operation='load' attempt=1 delay=0.5 "
        "error='no route' error_type='OSError'"
    )
    said = vars(record)
    assert (said["event"], said["policy"], said["delay"]) == ("retry_scheduled", "db", 0.5)


def test_what_is_not_enabled_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "trio_resilience")
    LoggingListener()(happened(CallStarted))
    assert caplog.records == []


def test_another_logger(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("app.resilience")
    caplog.set_level("DEBUG", logger.name)
    LoggingListener(logger)(happened(CallStarted))
    assert [record.name for record in caplog.records] == [logger.name]


def test_results_are_never_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "trio_resilience")
    for event in every_event(FAILED):
        LoggingListener()(event)
    assert len(caplog.records) == len(every_event(FAILED))
    assert not any(RESULT in str(vars(record)) for record in caplog.records)


def test_a_name_can_not_forge_a_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "trio_resilience")
    LoggingListener()(happened(CallStarted, operation="x\nERROR all is lost"))
    assert "\n" not in caplog.records[0].getMessage()


def test_fields_that_a_record_has_itself_are_called_otherwise(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """`logging` refuses to overwrite its own."""
    caplog.set_level("DEBUG", "trio_resilience")
    LoggingListener()(happened(ForeignEvent))
    said = vars(caplog.records[0])
    assert (said["name_"], said["args_"], said["message_"]) == ("n", "1, 2", "m")
    assert (said["event"], said["event_"]) == ("foreign_event", "e")
