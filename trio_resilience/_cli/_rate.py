"""How fast requests may go out, and to whom: rates as they are written, turns, and hosts."""

from __future__ import annotations

import math
import re
from typing import Final, final

import attrs
import httpx2
import trio

from trio_resilience import RateLimiter

UNITS: Final = {None: 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}
"""Seconds of the period after the slash; a bare number is one per second."""
DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_WRITTEN: Final = re.compile(r"(\d+(?:\.\d+)?)(?:/(s|min|h))?", re.ASCII)


@final
@attrs.frozen
class Rate:
    """So many requests in so many seconds."""

    requests: float
    seconds: float

    def limiter(self, burst: int) -> RateLimiter:
        """Return a limiter that lets *burst* requests go at once after a pause."""
        return RateLimiter(self.requests, per=self.seconds, burst=burst, name="fetch")


def parse_rate(text: str) -> Rate:
    """Read ``10/s``, ``300/min``, ``5000/h`` or ``10``; anything else is a `ValueError`."""
    written = _WRITTEN.fullmatch(text)
    if written is None:
        raise ValueError(f"Must be like 10/s, 300/min or 5000/h, got {text[:80]!a}.")
    requests = float(written[1])
    if not 0 < requests < math.inf:
        raise ValueError(f"Must be > 0 and finite, got {text[:80]!a}.")
    return Rate(requests, UNITS[written[2]])


@final
@attrs.frozen(eq=False)
class Turns:
    """Makes each request wait until the rate allows it; without a limiter, none waits."""

    limiter: RateLimiter | None = None

    async def wait(self, patience: trio.CancelScope) -> None:
        """Wait for a turn, while the deadline of *patience* stands still.

        A slow rate makes long lines; what waits there must not run out of the time that it has for
        its work.
        """
        if self.limiter is None:
            return
        left = patience.deadline - trio.current_time()
        patience.deadline = math.inf
        await self.limiter.acquire()
        patience.deadline = trio.current_time() + left

    async def wait_to_follow(self, response: httpx2.Response) -> None:
        """Wait for another turn, if the *response* is about to be followed to where it leads.

        A hook of the client, which knows the scope as ``patience`` from the request's extensions.
        """
        if response.has_redirect_location:
            await response.aread()  # so that the connection is free meanwhile
            await self.wait(response.request.extensions["patience"])


def host_of(url: str) -> tuple[str, int | None]:
    """Return the host and the port that *url* leads to, the same for all ways to write them."""
    parsed = httpx2.URL(url)
    port = DEFAULT_PORTS.get(parsed.scheme) if parsed.port is None else parsed.port
    return parsed.raw_host.decode("ascii").removesuffix("."), port
