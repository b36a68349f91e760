"""Read a configuration's text within bounds, and the durations and rates that are written in it.

Whatever a file holds, to read it takes bounded time and memory, and comes to a mapping or to one
`ConfigError`.
"""

from __future__ import annotations

import codecs
import re
import stat
from pathlib import Path
from typing import Any, Final, cast

from trio_resilience._errors import ConfigError

MAX_BYTES: Final = 1024 * 1024
MAX_DEPTH: Final = 16
"""How deep tables may be within one another; ours go to five."""
INTEGERS: Final = range(-(2**63), 2**63)
"""Those that every reader of TOML knows."""
MAX_LINE: Final = 200
"""Characters of a message."""

UNITS: Final = {"ms": 0.001, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
"""Seconds."""

_NUMBER = r"\d{1,15}(?:\.\d{1,9})?"
_UNIT = "ms|s|min|m|h|d"
_PART = re.compile(rf"({_NUMBER}) ?({_UNIT})", re.ASCII)
_DURATION = re.compile(rf"{_PART.pattern}(?: ?{_PART.pattern})*", re.ASCII)
_RATE = re.compile(rf"({_NUMBER}) ?/ ?({_NUMBER})? ?({_UNIT})", re.ASCII)

# What a scan for depth has to tell apart. A string that has no end reaches to that of the text, so
# that nothing is looked at twice, however the text is made.
_TOKEN = re.compile(
    r'"""(?:[^"\\]++|\\.?|"(?!""))*+(?:"""|\Z)'
    r"|'''(?:[^']++|'(?!''))*+(?:'''|\Z)"
    r'|"(?:[^"\\\n]++|\\.?)*+(?:"|\n|\Z)'
    r"|'[^'\n]*+(?:'|\n|\Z)"
    r"|\#[^\n]*+"
    r"|[\[\]{}.=,\n]",
    re.DOTALL,
)


# --- files ----------------------------------------------------------------------------------------


def read_toml(path: Path) -> dict[str, Any]:
    """Return what the TOML file at *path* says."""
    try:
        return parse_toml(_read(path), str(path))
    except OSError as error:
        raise ConfigError([f"{path}: can't be read: {error.strerror or error}"]) from error
    except ValueError as error:  # a path that no system has, such as one with a NUL
        raise ConfigError([f"{path!r}: can't be read: {error}"]) from None


def parse_toml(data: bytes, name: str) -> dict[str, Any]:
    """Return what *data* says, which comes from the file *name*."""
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{name}: must have at most {MAX_BYTES} bytes"])
    try:
        # Editors of Windows write a mark of the encoding first, which the parser knows nothing of.
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{name}: line {line} is no UTF-8: {error.reason}"]) from None
    _check_depth(text, name)
    import tomllib  # noqa: PLC0415 - dear to import for everybody; most have no file

    try:
        found = tomllib.loads(text)
    except ValueError as error:  # a number of too many digits is one, too
        raise ConfigError([f"{name}: is no TOML: {one_line(str(error))}"]) from None
    _check_integers(found, name)
    return found


def _read(path: Path) -> bytes:
    # To open a pipe would wait for somebody to write to it.
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(0, "it is no regular file")
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)


def _check_depth(text: str, name: str) -> None:
    """Refuse what a parser would take quadratic time for, or come to the end of its stack."""
    depth = dots = line = 0
    for token in _TOKEN.finditer(text):
        mark = token[0]
        depth += (mark in "[{") - (mark in "]}")
        dots = 0 if mark in "[]{}=,\n" else dots + (mark == ".")
        line += mark.count("\n")
        if max(depth, dots) > MAX_DEPTH:
            raise ConfigError([f"{name}: line {line + 1} nests more than {MAX_DEPTH} tables"])


def _check_integers(found: object, name: str) -> None:
    """Refuse an integer that TOML does not have, whose digits Python itself may refuse to tell."""
    rest = [("", found)]
    while rest:
        key, value = rest.pop()
        if isinstance(value, dict):
            rest += cast("dict[str, object]", value).items()
        elif isinstance(value, list):
            rest += [(key, each) for each in cast("list[object]", value)]
        elif isinstance(value, int) and value not in INTEGERS:
            what = one_line(f"an integer of {key!r} has more than 64 bits")
            raise ConfigError([f"{name}: is no TOML: {what}"])


def one_line(text: str) -> str:
    """Return *text* as one line of bounded length."""
    line = " ".join(text[: 2 * MAX_LINE].split())
    return line if len(line) <= MAX_LINE else f"{line[: MAX_LINE - 1]}…"


# --- words ----------------------------------------------------------------------------------------


def duration(key: str, text: str) -> float:
    """Return the seconds that *text* says, such as "250ms", "30s", "2m", "1h 30m" or "1d"."""
    if len(text) > MAX_LINE or not _DURATION.fullmatch(text):
        raise ValueError(
            f'`{key}` must be seconds, or a text such as "250ms", "30s", "2m" or "1h30m",'
            f" got {text!r}"
        )
    return sum(float(number) * UNITS[unit] for number, unit in _PART.findall(text))


def rate(key: str, text: str) -> tuple[float, float]:
    """Return how many, and in how many seconds, *text* says, such as "10/s" or "300/min"."""
    found = _RATE.fullmatch(text)
    if found is None:
        raise ValueError(
            f'`{key}` must be a number, or a text such as "10/s", "300/min" or "1/2s", got {text!r}'
        )
    number, count, unit = found.groups()
    return float(number), float(count or 1) * UNITS[unit]
