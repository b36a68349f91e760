"""Decide, from the seed alone, how the demo's server treats every request.

An answer is a pure function of (profile, seed, path, attempt): two runs meet the same faults,
however the network, the scheduler or the number of clients order their requests. And a path's
passing faults are few enough in a row that a client with `MAX_ATTEMPTS` always gets through, for
any seed: whether the demo succeeds is decided by the retries, never by luck.

An outage is no matter of chance at all: it begins with a request, and ends by the clock.
"""

from __future__ import annotations

import math
from enum import Enum
from random import Random
from typing import Final, Literal, final

import attrs

ProfileName = Literal["none", "mild", "harsh"]

MAX_ATTEMPTS: Final = 6
"""How often the demo's client tries."""
MAX_FAULTS_IN_A_ROW: Final = 3
"""After that many attempts a path has no faults left, but for the permanent failures.

It leaves a client that is slow, and gives up on a good answer now and then, room to do so.
"""
MEDIAN_LATENCY: Final = 0.010
MAX_LATENCY: Final = 0.25
"""Seconds. Far below the demo's time limit for an attempt: only a hang runs into that."""
TAIL: Final = 1.4
"""Shape of the Pareto tail of the latencies; the smaller, the longer."""
RETRY_AFTER: Final = 1
"""Seconds; the smallest wait that the header can ask for."""


class Treatment(Enum):
    """What the server does with a request, in the words that the report uses."""

    PAGE = "page"
    UNAVAILABLE = "503"
    UNAVAILABLE_UNTIL = "503 with Retry-After"
    TOO_MANY = "429"
    DROP = "dropped mid-response"
    HANG = "hangs"
    GONE = "404 for ever"
    BROKEN = "500 for ever"


STATUS: Final = {
    Treatment.PAGE: 200,
    Treatment.UNAVAILABLE: 503,
    Treatment.UNAVAILABLE_UNTIL: 503,
    Treatment.TOO_MANY: 429,
    Treatment.DROP: 200,
    Treatment.GONE: 404,
    Treatment.BROKEN: 500,
}


@final
@attrs.frozen
class Profile:
    """How likely each fault is."""

    passing: dict[Treatment, float]
    """Probability of each fault that another attempt may get past, per attempt."""
    permanent: dict[Treatment, float]
    """Probability of each failure that no attempt gets past, per path."""


PROFILES: Final[dict[ProfileName, Profile]] = {
    "none": Profile({}, {}),
    "mild": Profile(
        {
            Treatment.UNAVAILABLE: 0.10,
            Treatment.UNAVAILABLE_UNTIL: 0.04,
            Treatment.TOO_MANY: 0.04,
            Treatment.DROP: 0.10,
            Treatment.HANG: 0.04,
        },
        {},
    ),
    "harsh": Profile(
        {
            Treatment.UNAVAILABLE: 0.28,
            Treatment.UNAVAILABLE_UNTIL: 0.06,
            Treatment.TOO_MANY: 0.06,
            Treatment.DROP: 0.22,
            Treatment.HANG: 0.08,
        },
        {Treatment.GONE: 0.03, Treatment.BROKEN: 0.02},
    ),
}


@final
@attrs.frozen
class Answer:
    """How one request is answered."""

    treatment: Treatment
    latency: float
    """Seconds before the server begins to answer."""

    @property
    def retry_after(self) -> int | None:
        """Seconds that the answer asks the client to wait, if it does."""
        asks = self.treatment in {Treatment.UNAVAILABLE_UNTIL, Treatment.TOO_MANY}
        return RETRY_AFTER if asks else None


@final
@attrs.frozen
class FaultPlan:
    """The script that the server follows."""

    profile: ProfileName
    seed: int

    def answer(self, path: str, attempt: int) -> Answer:
        """Return how the *attempt*-th request (from 1) for *path* is answered."""
        rng = self._rng(path, attempt)
        latency = min(MEDIAN_LATENCY * rng.paretovariate(TAIL) / 2 ** (1 / TAIL), MAX_LATENCY)
        return Answer(self.permanent_failure(path) or self._passing(rng, attempt), latency)

    def permanent_failure(self, path: str) -> Treatment | None:
        """Return how every request for *path* fails, or ``None`` if it can succeed."""
        return _draw(PROFILES[self.profile].permanent, self._rng(path, 0))

    def _passing(self, rng: Random, attempt: int) -> Treatment:
        fault = _draw(PROFILES[self.profile].passing, rng)
        return Treatment.PAGE if fault is None or attempt > MAX_FAULTS_IN_A_ROW else fault

    def _rng(self, path: str, attempt: int) -> Random:
        # Seeded by a string, Random takes its SHA-512: the same in every process, unlike hash().
        return Random(f"{self.profile} {self.seed} {attempt} {path}")  # noqa: S311 - no secret


def _draw(chances: dict[Treatment, float], rng: Random) -> Treatment | None:
    """Return one of the *chances*, or ``None`` with what is left of the probability."""
    point = rng.random()
    for treatment, chance in chances.items():
        point -= chance
        if point < 0:
            return treatment
    return None


@final
@attrs.define(eq=False)
class Outage:
    """When a server is down: once it has had *after* requests, for *seconds*; by default never."""

    after: float = math.inf
    seconds: float = 0.0
    began_at: float | None = attrs.field(default=None, init=False)
    received: int = attrs.field(default=0, init=False)
    """How many requests came to the server while it was down."""

    def note_request(self, number: int, now: float) -> None:
        """Count the *number*-th request (from 1) that the server has received."""
        if self.began_at is None and number > self.after:
            self.began_at = now
        self.received += self.is_on(now)

    def is_on(self, now: float) -> bool:
        """Return whether the server is down."""
        return self.began_at is not None and now < self.began_at + self.seconds
