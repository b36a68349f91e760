"""All that is wrong with a configuration, each mistake with its key path, rule and value."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Callable, Iterable
from typing import Final, final

import attrs

from trio_resilience._config_text import one_line
from trio_resilience._errors import ConfigError

MAX_MISTAKES: Final = 50
"""So many are told; of more, how many."""

Path = tuple[str, ...]

_BARE = re.compile(r"[A-Za-z0-9_-]{1,60}")
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def short(value: object) -> str:
    """Return a repr of bounded length and depth."""
    return _short.repr(value)


@final
@attrs.define(eq=False)
class Mistakes:
    """All that is wrong, each with its key path; a bounded number of them."""

    found: list[str] = attrs.field(factory=list[str], init=False)
    more: int = attrs.field(default=0, init=False)

    @property
    def count(self) -> int:
        """How many there are so far."""
        return len(self.found) + self.more

    def add(self, path: Path, rule: str | Callable[[], str]) -> None:
        """Remember that what is at *path* breaks a *rule*."""
        if len(self.found) == MAX_MISTAKES:
            self.more += 1
            return
        text = one_line(rule if isinstance(rule, str) else rule())
        self.found.append(f"{shown_path(path)}: {text}" if path else text)

    def raise_any(self) -> None:
        """Raise all of them, if there are any."""
        if self.found:
            rest = [f"... and {self.more} more"] if self.more else []
            raise ConfigError([*self.found, *rest])


def shown_path(path: Path) -> str:
    """Return *path* as it would be written in the file."""
    return ".".join(key if _BARE.fullmatch(key) else short(key) for key in path)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return a hint at the one among *known* that is most like *word*, if any is."""
    # To compare takes quadratic time.
    near = difflib.get_close_matches(word, known, 1) if len(word) <= 60 else []  # noqa: PLR2004
    return f"; did you mean `{near[0]}`?" if near else ""


def unknown(key: str, known: Iterable[str]) -> Callable[[], str]:
    words = list(known)
    return lambda: f"is no known key{suggestion(key, words) or '; known are ' + ', '.join(words)}"
