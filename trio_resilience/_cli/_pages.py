"""Fetch the demo's pages from a server of its own, under a policy or under none."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, Never, final

import attrs
import httpx2
import outcome
import trio

from trio_resilience import (
    Bulkhead,
    CircuitBreaker,
    CircuitStateChanged,
    Exponential,
    HedgeStarted,
    Pipeline,
    RejectedError,
    Retry,
    RetryScheduled,
    run_with_limit,
    subscribe,
)
from trio_resilience._cli._causes import cause
from trio_resilience._cli._faults import MAX_ATTEMPTS, FaultPlan, Outage
from trio_resilience._cli._report import CircuitChange, Gauge, RunReport
from trio_resilience._cli._server import ATTEMPT_HEADER

if TYPE_CHECKING:
    from collections.abc import Callable

    from trio_resilience import Event, Policy
    from trio_resilience._cli._faults import ProfileName
    from trio_resilience._cli._server import FaultServer

ATTEMPT_TIMEOUT: Final = 1.0
"""Seconds; in the run without policies it is the HTTP client's own timeout."""
OPERATION_TIMEOUT: Final = 15.0
"""Seconds for a page, with all attempts and the waits between them."""
PATIENCE: Final = 30.0
"""Seconds for a page beyond the outage, the waits for the circuit included."""
RECOVERY_TIMEOUT: Final = 0.5
"""Seconds for which an open circuit lets nothing through."""
BACKOFF: Final = Exponential(0.05, max_delay=0.4)
"""Below the recovery time, so that a page whose failure opened the circuit is refused next, and is
not the probe: then an outage can't use up its attempts."""


@final
@attrs.frozen
class Setting:
    """What the user asked for."""

    requests: int
    max_concurrency: int
    seed: int
    faults: ProfileName
    outage: float
    """Seconds."""

    @property
    def paths(self) -> list[str]:
        """The pages to fetch."""
        return [f"/page/{number}" for number in range(1, self.requests + 1)]

    @property
    def plan(self) -> FaultPlan:
        """The script of the server."""
        return FaultPlan(self.faults, self.seed)

    @property
    def scripted_failures(self) -> list[str]:
        """The pages that nobody can fetch."""
        return [path for path in self.paths if self.plan.permanent_failure(path) is not None]

    def make_outage(self) -> Outage:
        """Return an outage that begins when half of the pages have been asked for."""
        return Outage(self.requests // 2, self.outage)


def make_breaker() -> CircuitBreaker:
    """Return a breaker that opens when nothing answers any more."""
    return CircuitBreaker(
        recovery_timeout=RECOVERY_TIMEOUT,
        # A server that refuses, or asks for a pause, is up; the retries respect that.
        failure_on=(trio.TooSlowError, httpx2.TransportError),
    )


def make_policy(max_concurrency: int, breaker: CircuitBreaker | None) -> Policy[Never]:
    """Return the standard pipeline, called with patience."""
    standard = Pipeline.standard(
        timeout=OPERATION_TIMEOUT,
        retry=Retry(max_attempts=MAX_ATTEMPTS, backoff=BACKOFF),
        breaker=breaker,
        bulkhead=Bulkhead(max_concurrency),
        attempt_timeout=ATTEMPT_TIMEOUT,
    )
    return with_patience(standard)


def with_patience(*layers: Policy[Never]) -> Policy[Never]:
    """Return the *layers*, called with the patience of a job that wants all its pages."""
    # What the open circuit refuses comes back when a probe is due. Such a try costs the server
    # nothing, so it counts apart: however long the outage is, it uses up no attempt.
    patience = Retry(max_attempts=None, on=RejectedError, backoff=BACKOFF, name="patience")
    return Pipeline(patience, *layers)


@final
@attrs.define(eq=False)
class PageFetch:
    """The operation: get one page. Its attempts are counted, since the server is told."""

    client: httpx2.AsyncClient
    path: str
    gauge: Gauge
    attempts: int = attrs.field(default=0, init=False)
    started_at: float = attrs.field(default=0.0, init=False)

    async def __call__(self) -> None:
        """Make an attempt; a bad status is an `httpx2.HTTPStatusError`."""
        self.attempts += 1
        if self.attempts == 1:
            self.started_at = trio.current_time()
        with self.gauge:
            answer = await self.client.get(self.path, headers={ATTEMPT_HEADER: str(self.attempts)})
        answer.raise_for_status()


@final
@attrs.define(eq=False)
class Run:
    """One pass over all pages, against a server of its own."""

    setting: Setting
    server: FaultServer
    policy: Policy[Never] | None
    advance: Callable[[], object]
    """Called whenever a page is done, or has failed."""
    started_at: float = attrs.field(default=0.0, init=False)
    _gauge: Gauge = attrs.field(factory=Gauge, init=False)
    _fetches: list[PageFetch] = attrs.field(factory=list[PageFetch], init=False)
    _failed: dict[str, str] = attrs.field(factory=dict[str, str], init=False)
    _retries: Counter[str] = attrs.field(factory=Counter[str], init=False)
    _refused: int = attrs.field(default=0, init=False)
    _hedges: int = attrs.field(default=0, init=False)
    _circuit: list[CircuitChange] = attrs.field(factory=list[CircuitChange], init=False)
    _latencies: list[float] = attrs.field(factory=list[float], init=False)

    async def __call__(self) -> RunReport:
        """Fetch all pages, and return what it came to."""
        async with trio.open_nursery() as nursery:
            url = await nursery.start(self.server.serve)
            self.started_at = trio.current_time()
            async with self._client(url) as client:
                self._fetches = [
                    PageFetch(client, path, self._gauge) for path in self.setting.paths
                ]
                with subscribe(self._hear):
                    await run_with_limit(
                        nursery,
                        self._fetches,
                        max_concurrency=self.setting.max_concurrency,
                        timeout=self.setting.outage + PATIENCE,
                        policy=self.policy,
                        on_error="collect",
                        on_done=self._on_done,
                    )
            seconds = trio.current_time() - self.started_at
            nursery.cancel_scope.cancel()
        return self._report(seconds)

    def _client(self, url: str) -> httpx2.AsyncClient:
        # Nothing may queue in the pool: there a request that is cancelled can take its place along.
        most = self.setting.max_concurrency
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=most)
        return httpx2.AsyncClient(
            base_url=url,
            limits=limits,
            # Without a policy, the client's own timeout is all that ends a request that hangs.
            timeout=ATTEMPT_TIMEOUT if self.policy is None else None,
            # The server is on this machine and speaks plain HTTP: no proxy, and no certificates.
            trust_env=False,
            verify=False,
        )

    def _hear(self, event: Event) -> None:
        match event:
            case RetryScheduled(error=RejectedError()):
                self._refused += 1
            case RetryScheduled():
                self._retries[cause(event.error)] += 1
            case HedgeStarted():
                self._hedges += 1
            case CircuitStateChanged():
                seconds = event.time - self.started_at
                self._circuit.append(CircuitChange(seconds, event.state))
            case _:
                pass

    def _on_done(self, index: int, result: outcome.Value[None] | outcome.Error) -> None:
        fetch = self._fetches[index]
        if isinstance(result, outcome.Error):
            self._failed[fetch.path] = cause(result.error)
        else:
            self._latencies.append(trio.current_time() - fetch.started_at)
        self.advance()

    def _report(self, seconds: float) -> RunReport:
        return RunReport(
            requests=self.setting.requests,
            failed=self._failed,
            attempts=sum(fetch.attempts for fetch in self._fetches),
            retries=self._retries,
            refused=self._refused,
            hedges=self._hedges,
            circuit=self._circuit,
            latencies=self._latencies,
            seconds=seconds,
            client_peak=self._gauge.peak,
            server_peak=self.server.peak,
        )
