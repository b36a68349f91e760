"""Show what the policies of a running process do, as a table that follows them."""

from __future__ import annotations

import json
import math
import os
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
    EXIT_BROKEN_PIPE,
    EXIT_FAILED,
    UsageError,
    cancel_on_interrupt,
    complain,
    render,
    write_stdout_line,
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
_ROOM: Final = 2000
"""Characters of a line where no terminal says how many it shows."""
_TEXTS: Final = {"policy": 12, "state": 9, "last failure": 18}
"""Columns whose lines may be broken: where there is little room, at these widths."""
_COLUMNS: Final = {
    **{name: _TEXTS.get(name, _ROOM) for name in ("policy", "state", "running", "waiting")},
    **dict.fromkeys(("calls", "calls/s", "failed", "refused", "refused/s", *QUANTILES), _ROOM),
    "last failure": _TEXTS["last failure"],
}
"""And the characters that each needs at most."""
_SPARE: Final = (
    *("refused/s", "p50", "p95", "waiting", "running", "p99", "calls/s", "refused", "calls"),
    *("last failure", "failed"),
)
"""Columns that are left out where there is no room, one after the other."""
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
            show = _json_of if as_json else _table_writer(stack, is_live=not once)
            status = await _follow(address, show, math.inf if once else interval)
        watch.cancel_scope.cancel()
    return status


async def _follow(
    address: str | int, show: Callable[[MetricsSnapshot], str], interval: float
) -> int:
    try:
        await _write(show(await fetch_snapshot(address)))
        while interval < math.inf:
            await trio.sleep(interval)
            await _write(show(await fetch_snapshot(address)))
    except GoneError as error:
        complain(str(error))
        return EXIT_FAILED
    except BrokenPipeError:
        return EXIT_BROKEN_PIPE
    return 0


async def _write(text: str) -> None:
    await trio.lowlevel.checkpoint()
    if text:
        await write_stdout_line(text.removesuffix("\n"))


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


def _json_of(snapshot: MetricsSnapshot) -> str:
    return json.dumps(snapshot.as_dict())


def _table_writer(stack: ExitStack, *, is_live: bool) -> Callable[[MetricsSnapshot], str]:
    """Return what shows snapshots: in one place of a terminal, or else as text to write."""
    history = History()
    console = Console(highlight=False)
    if not is_live or not console.is_terminal or console.is_dumb_terminal:
        width = _width_of(console)
        return lambda snapshot: render(history.table(snapshot, width), width=width)
    live = stack.enter_context(Live(console=console, auto_refresh=False))

    def update(snapshot: MetricsSnapshot) -> str:
        live.update(history.table(snapshot, console.width), refresh=True)
        return ""

    return update


def _width_of(console: Console) -> int:
    """Return the characters of a line; a file, or a pipe, has room for all of them."""
    return console.width if console.is_terminal or "COLUMNS" in os.environ else _ROOM


@final
@attrs.define(eq=False)
class History:
    """The snapshot before, from which rates are told."""

    _before: MetricsSnapshot | None = attrs.field(default=None, init=False)

    def table(self, snapshot: MetricsSnapshot, width: int = _ROOM) -> Table:
        """Return a table of the policies, each with what all of its operations come to.

        What there is no room for in *width* characters is left out.
        """
        before, self._before = self._before, snapshot
        now = snapshot.by_policy()
        earlier = {} if before is None else before.by_policy()
        seconds = _seconds_between(before, snapshot)
        if any(_is_less(each, earlier.get(policy)) for policy, each in now.items()):
            earlier, seconds = {}, None
        states = _states(snapshot)
        rows = [
            Row(each, earlier.get(policy), seconds, states.get(policy), snapshot.time).cells()
            for policy, each in sorted(now.items())
        ]
        return _fitting(_title(snapshot), rows, width)


def _is_less(now: SeriesSnapshot, before: SeriesSnapshot | None) -> bool:
    """Tell whether it was another process before, which had counted further."""
    return before is not None and (
        _finished(now) < _finished(before) or _refused(now) < _refused(before)
    )


def _fitting(title: str, rows: list[list[Text]], width: int) -> Table:
    """Return a table with those of the columns that there is room for."""
    wanted = {
        name: max([len(name), *(min(row[place].cell_len, most) for row in rows)])
        for place, (name, most) in enumerate(_COLUMNS.items())
    }
    padding = 1 if sum(wanted.values()) + 3 * len(wanted) < width else 0
    for name in _SPARE:
        if sum(wanted.values()) + (1 + 2 * padding) * len(wanted) < width:
            break
        del wanted[name]
    table = Table(title=title, padding=(0, padding))
    for name in wanted:
        is_text = name in _TEXTS
        table.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold" if is_text else "ellipsis",
        )
    for row in rows:
        table.add_row(*(cell for name, cell in zip(_COLUMNS, row, strict=True) if name in wanted))
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
