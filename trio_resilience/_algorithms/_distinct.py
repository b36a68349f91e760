"""Tell about how many different things there were, and remember none of them.

Whang, Vander-Zanden and Taylor, "A linear-time probabilistic counting algorithm for database
applications", ACM TODS 15 (1990): each thing sets the one bit that its hash names, and how many
bits are still unset tells how many things there were.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Final, final

import attrs

BITS: Final = 65536
"""Ten thousand things are counted within one per cent or so; beyond 700,000 there is no telling."""


@final
@attrs.define(eq=False, repr=False)
class DistinctCounter:
    """The things that it was given, counted once each."""

    _bits: bytearray = attrs.field(factory=lambda: bytearray(BITS // 8), init=False)
    _unset: int = attrs.field(default=BITS, init=False)

    def add(self, thing: Hashable) -> None:
        """Count it, unless it was counted before."""
        number = hash(thing) % BITS
        place, bit = number >> 3, 1 << (number & 7)
        if not self._bits[place] & bit:
            self._bits[place] |= bit
            self._unset -= 1

    def estimate(self) -> int:
        """Return about how many there were."""
        return round(BITS * math.log(BITS / max(self._unset, 1)))
