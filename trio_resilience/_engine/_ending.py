"""What is raised when a call's operations have ended, and nothing of it is lost."""

from __future__ import annotations

import math
import reprlib
from typing import Any, TypeAlias

from outcome import Error, Value

from trio_resilience._engine._join import Job, leaves_of
from trio_resilience._engine._pool import MISSING, Pool
from trio_resilience._engine._traceback import add_note_once
from trio_resilience._errors import OperationsCancelledError, OperationsFailedError

Failures: TypeAlias = dict[int, tuple[Any, Exception]]

# A note is to tell items apart, such as URLs, and not to carry a file's contents.
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 200


def raise_failure(job: Job[None], failure: BaseException | None) -> None:
    """Raise *failure*; but if the wait for the job was cancelled, that, with it as context."""
    try:
        if failure is not None:
            raise failure
    finally:
        del failure
        job.raise_if_interrupted()


def take_failure(
    job: Job[None],
    pool: Pool,
    *,
    left_early: bool = False,
    body_error: BaseException | None = None,
) -> BaseException | None:
    """Return what is to be raised for a job that has ended; the pool keeps no part of it."""
    failures, pool.failures = pool.failures, {}
    errors = [error for _, (_, error) in sorted(failures.items())]
    source_error, pool.error = pool.error, None
    if job.error is not None:
        stopper, job.error = job.error, None
        others = errors if body_error is None else [*errors, body_error]
        return job.stopped_by(*leaves_of(stopper), *others)
    if source_error is not None:
        if not errors:
            return source_error
        if not isinstance(source_error, Exception):
            return job.stopped_by(source_error, *errors)
        return _group(pool, failures, source_error)
    if job.was_cancelled and not left_early and not job.was_interrupted:
        return OperationsCancelledError(errors)
    return _group(pool, failures) if errors else None


def _group(pool: Pool, failures: Failures, *others: Exception) -> OperationsFailedError:
    for index, (item, error) in failures.items():
        shown = f": {_short.repr(item)}" if pool.plan.is_map else ""
        add_note_once(error, "operation ", f"{index}{shown}")
    started = max(pool.started, len(pool.results))
    total = started if pool.size == math.inf else max(int(pool.size), started)
    errors = [error for _, (_, error) in sorted(failures.items())]
    group = OperationsFailedError(f"{len(errors)} of {total} operations failed", [*errors, *others])
    group.outcomes = _outcomes(pool, failures, total)
    return group


def _outcomes(pool: Pool, failures: Failures, total: int) -> list[Value[Any] | Error | None]:
    if pool.outbox is not None:
        return [Error(error) for _, (_, error) in sorted(failures.items())]
    outcomes: list[Value[Any] | Error | None] = [None] * total
    for index, result in enumerate(pool.results):
        if result is not MISSING:
            outcomes[index] = result if pool.plan.on_error == "collect" else Value(result)
    for index, (_, error) in failures.items():
        outcomes[index] = Error(error)
    return outcomes


def add_context(error: BaseException, context: BaseException | None) -> None:
    """Make *context* the origin of the chain that a traceback of *error* shows."""
    while error is not context and error.__context__ is not None:
        error = error.__context__
    if error is not context:
        error.__context__ = context
