"""Show what the policies of a running process do, as a table that follows them."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Final, final

import attrs
import trio
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trio_resilience import CircuitState
from trio_resilience._algorithms._sketch import LatencySnapshot
from trio_resilience._cli._terminal import (
    EXIT_FAILED,
    UsageError,
    cancel_on_interrupt,
    complain,
    render,
    write_stdout,
)
from trio_resilience._serving import LOOPBACK, checked_address
from trio_resilience._snapshots import QUANTILES, MetricsSnapshot, OutcomesSnapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_resilience import FailureRecord
    from trio_resilience._snapshots import CircuitSnapshot, SeriesSnapshot

PATIENCE: Final = 5.0
"""Seconds that the process has to answer."""
MOST: Final = 64 * 2**20
"""Bytes of an answer."""
UNKNOWN: Final = "-"
_MESSAGE: Final = 50
"""Characters of a failure's message."""
_LONG: Final = 1000
"""Seconds, from which on minutes are easier to read."""
_STYLES: Final = {
    CircuitState.CLOSED: "green",
    CircuitState.OPEN: "red",
    CircuitState.HALF_OPEN: "yellow",
    CircuitState.ISOLATED: "magenta",
}


class GoneError(Exception):
    """The process does not answer, or not with a snapshot; the message is why."""


async def run_top(where: str, *, interval: float, once: bool, as_json: bool) -> int:
    """Show the process that serves its metrics at *where*, and return the exit status."""
    try:
        address = checked_address(int(where) if where.isdecimal() else where)
    except ValueError as error:
        raise UsageError(str(error).replace("`path_or_port`", "PATH_OR_PORT")) from None
    status = 0  # also after Ctrl-C, which is how one leaves
    async with trio.open_nursery() as watch:
        await watch.start(cancel_on_interrupt, watch.cancel_scope)
        with ExitStack() as stack:
            show = _write_json if as_json else _table_writer(stack, is_live=not once)
            status = await _follow(address, show, math.inf if once else interval)
        watch.cancel_scope.cancel()
    return status


async def _follow(
    address: str | int, show: Callable[[MetricsSnapshot], None], interval: float
) -> int:
    try:
        show(await fetch_snapshot(address))
        while interval < math.inf:
            await trio.sleep(interval)
            show(await fetch_snapshot(address))
    except GoneError as error:
        complain(str(error))
        return EXIT_FAILED
    return 0


# --- asking -------------------------------------------------------------------------------------


async def fetch_snapshot(address: str | int) -> MetricsSnapshot:
    """Ask the process for a snapshot; raise `GoneError` if it does not answer with one."""
    place = f"port {address}" if isinstance(address, int) else address
    try:
        with trio.fail_after(PATIENCE):
            return MetricsSnapshot.from_dict(json.loads(await _receive(address)))
    except trio.TooSlowError:
        raise GoneError(f"{place} has not answered within {PATIENCE:g} s") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise GoneError(f"no process serves its metrics at {place}: {reason}") from None
    except trio.BrokenResourceError:
        raise GoneError(f"the process at {place} has gone away") from None
    except (ValueError, RecursionError):
        raise GoneError(f"what {place} has answered is no snapshot of metrics") from None


async def _receive(address: str | int) -> bytes:
    """Return all that is sent."""
    async with await _connect(address) as stream:
        data = bytearray()
        async for chunk in stream:
            data += chunk
            if len(data) > MOST:
                raise ValueError("it is too long")
        return bytes(data)


async def _connect(address: str | int) -> trio.SocketStream:
    if isinstance(address, int):
        return await trio.open_tcp_stream(LOOPBACK, address)
    return await trio.open_unix_socket(address)


# --- showing ------------------------------------------------------------------------------------


def _write_json(snapshot: MetricsSnapshot) -> None:
    write_stdout(json.dumps(snapshot.as_dict()) + "\n")


def _table_writer(stack: ExitStack, *, is_live: bool) -> Callable[[MetricsSnapshot], None]:
    """Return what shows snapshots: in one place of a terminal, or else one after the other."""
    history = History()
    console = Console(highlight=False)
    if not (is_live and console.is_terminal):
        return lambda snapshot: write_stdout(render(history.table(snapshot)))
    live = stack.enter_context(Live(console=console, auto_refresh=False))
    return lambda snapshot: live.update(history.table(snapshot), refresh=True)


@final
@attrs.define(eq=False)
class History:
    """The snapshot before, from which rates are told."""

    _before: MetricsSnapshot | None = attrs.field(default=None, init=False)

    def table(self, snapshot: MetricsSnapshot) -> Table:
        """Return a table of the policies, each with what all of its operations come to."""
        before, self._before = self._before, snapshot
        table = Table(title=_title(snapshot))
        table.add_column("policy")
        table.add_column("state")
        for name in ("running", "waiting", "calls", "calls/s", "failed", "refused", "refused/s"):
            table.add_column(name, justify="right")
        for name in QUANTILES:
            table.add_column(name, justify="right")
        table.add_column("last failure")
        earlier = {} if before is None else before.by_policy()
        seconds = _seconds_between(before, snapshot)
        states = _states(snapshot)
        for policy, now in sorted(snapshot.by_policy().items()):
            row = Row(now, earlier.get(policy), seconds, states.get(policy), snapshot.time)
            table.add_row(*row.cells())
        return table


@final
@attrs.frozen
class Row:
    """A policy."""

    now: SeriesSnapshot
    before: SeriesSnapshot | None
    seconds: float | None
    """Between the two."""
    state: CircuitSnapshot | str | None
    time: float | None

    def cells(self) -> list[Text]:
        """Return what the table has in its row."""
        outcomes = outcomes_of(self.now)
        return [
            _text(self.now.policy),
            self._state(),
            _text(outcomes.in_progress),
            _text(self.now.waits.in_progress),
            _text(outcomes.finished),
            _text(self._rate(_finished)),
            _text(outcomes.failed.count),
            _text(_refused(self.now)),
            _text(self._rate(_refused)),
            *(_text(_duration(_latency(outcomes).quantile(each))) for each in QUANTILES.values()),
            _text(self._failure(self.now.last_failure)),
        ]

    def _state(self) -> Text:
        if self.state is None or isinstance(self.state, str):
            return _text(self.state or UNKNOWN)
        state, age = self.state.state, self._age(self.state.since)
        reason = "" if state is CircuitState.CLOSED else f": {self.state.reason}"
        return _text(f"{state.value}{age}{reason}", _STYLES[state])

    def _failure(self, failure: FailureRecord | None) -> str:
        if failure is None:
            return UNKNOWN
        message = " ".join(failure.message.split())
        shown = message if len(message) <= _MESSAGE else f"{message[:_MESSAGE]}..."
        return f"{failure.type_name}: {shown}{self._age(failure.time, ' ago')}"

    def _age(self, then: float, word: str = "") -> str:
        return "" if self.time is None else f" ({_duration(self.time - then)}{word})"

    def _rate(self, count: Callable[[SeriesSnapshot], int]) -> str:
        if self.seconds is None:
            return UNKNOWN
        before = 0 if self.before is None else count(self.before)
        return f"{(count(self.now) - before) / self.seconds:.1f}"


def _states(snapshot: MetricsSnapshot) -> dict[str, CircuitSnapshot | str]:
    """Return the states of circuits: reported ones, or else those that breakers say they are in."""
    watched = {each.policy: each.statistics.get("state") for each in snapshot.policies}
    said = {policy: state for policy, state in watched.items() if isinstance(state, str)}
    return {**said, **{each.policy: each for each in snapshot.circuits}}


def outcomes_of(series: SeriesSnapshot) -> OutcomesSnapshot:
    """Return what became of calls; or of operations, where a function is no policy."""
    return series.calls if series.calls.started else series.operations


def _finished(series: SeriesSnapshot) -> int:
    return outcomes_of(series).finished


def _refused(series: SeriesSnapshot) -> int:
    return series.rejections


def _latency(outcomes: OutcomesSnapshot) -> LatencySnapshot:
    return outcomes.succeeded.plus(outcomes.failed)


def _seconds_between(before: MetricsSnapshot | None, now: MetricsSnapshot) -> float | None:
    """Return nothing if there is no telling: another run may have begun, with another clock."""
    if before is None or before.time is None or now.time is None or before.time >= now.time:
        return None
    return now.time - before.time


def _title(snapshot: MetricsSnapshot) -> str:
    merged = snapshot.merged_operations
    return f"about {merged} operations are counted as (others)" if merged else "policies"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    return f"{seconds:.3g} s" if seconds < _LONG else f"{seconds / 60:.0f} min"


def _text(value: object, style: str = "") -> Text:
    """Return what is safe to show: names and messages are another process's."""
    return Text("".join(each if each.isprintable() else "?" for each in str(value)), style)
