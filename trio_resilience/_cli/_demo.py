"""The demo: fetch pages from a server that misbehaves, with and without the library."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Final, final

import attrs
import httpx2
import outcome
import trio

from trio_resilience import Exponential, Retry, run_with_limit
from trio_resilience._cli._causes import cause
from trio_resilience._cli._faults import MAX_ATTEMPTS, FaultPlan
from trio_resilience._cli._report import Gauge, RunReport, comparison, headline, overloads, problems
from trio_resilience._cli._server import ATTEMPT_HEADER, FaultServer
from trio_resilience._cli._terminal import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    cancel_on_interrupt,
    complain,
    progress_bar,
    render,
    write_stdout,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.progress import Progress

    from trio_resilience import RetryScheduled
    from trio_resilience._cli._faults import ProfileName

ATTEMPT_TIMEOUT: Final = 1.0
"""Seconds; in the run without retries it is the HTTP client's own timeout."""
OPERATION_TIMEOUT: Final = 15.0
"""Seconds for a page, with all attempts and waits."""
PROBLEMS_SHOWN: Final = 5
"""The rest are in the JSON."""


@final
@attrs.frozen
class Setting:
    """What the user asked for."""

    requests: int
    max_concurrency: int
    seed: int
    faults: ProfileName

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
    advance: Callable[[], object]
    """Called whenever a page is done, or has failed."""
    _gauge: Gauge = attrs.field(factory=Gauge, init=False)
    _fetches: list[PageFetch] = attrs.field(factory=list[PageFetch], init=False)
    _failed: dict[str, str] = attrs.field(factory=dict[str, str], init=False)
    _retries: Counter[str] = attrs.field(factory=Counter[str], init=False)
    _latencies: list[float] = attrs.field(factory=list[float], init=False)

    async def resilient(self) -> RunReport:
        """Fetch with retries, a time limit for every attempt, and one for the whole operation."""
        retry = Retry(
            max_attempts=MAX_ATTEMPTS,
            backoff=Exponential(0.05, max_delay=1.0),
            attempt_timeout=ATTEMPT_TIMEOUT,
            on_retry=self._on_retry,
        )
        return await self._run(retry, OPERATION_TIMEOUT, client_timeout=None)

    async def plain(self) -> RunReport:
        """Fetch each page once; the client's own timeout is all that ends a request that hangs."""
        return await self._run(None, math.inf, client_timeout=ATTEMPT_TIMEOUT)

    async def _run(
        self, policy: Retry | None, timeout: float, client_timeout: float | None
    ) -> RunReport:
        server = FaultServer(self.setting.plan)
        async with trio.open_nursery() as nursery:
            url = await nursery.start(server.serve)
            start = trio.current_time()
            async with _client(url, self.setting.max_concurrency, client_timeout) as client:
                self._fetches = [
                    PageFetch(client, path, self._gauge) for path in self.setting.paths
                ]
                await run_with_limit(
                    nursery,
                    self._fetches,
                    max_concurrency=self.setting.max_concurrency,
                    timeout=timeout,
                    policy=policy,
                    on_error="collect",
                    on_done=self._on_done,
                )
            seconds = trio.current_time() - start
            nursery.cancel_scope.cancel()
        return self._report(seconds, server.peak)

    def _on_retry(self, event: RetryScheduled) -> None:
        self._retries[cause(event.error)] += 1

    def _on_done(self, index: int, result: outcome.Value[None] | outcome.Error) -> None:
        fetch = self._fetches[index]
        if isinstance(result, outcome.Error):
            self._failed[fetch.path] = cause(result.error)
        else:
            self._latencies.append(trio.current_time() - fetch.started_at)
        self.advance()

    def _report(self, seconds: float, server_peak: int) -> RunReport:
        return RunReport(
            requests=self.setting.requests,
            failed=self._failed,
            attempts=sum(fetch.attempts for fetch in self._fetches),
            retries=self._retries,
            latencies=self._latencies,
            seconds=seconds,
            client_peak=self._gauge.peak,
            server_peak=server_peak,
        )


def _client(url: str, max_concurrency: int, timeout: float | None) -> httpx2.AsyncClient:
    # Nothing may queue inside the pool: there a request that is cancelled can take its place along.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=max_concurrency)
    # The server is on this machine and speaks plain HTTP: no proxy, and no certificates to load.
    return httpx2.AsyncClient(
        base_url=url, limits=limits, timeout=timeout, trust_env=False, verify=False
    )


@final
@attrs.frozen
class Comparison:
    """Both runs, and what is wrong with them."""

    setting: Setting
    resilient: RunReport
    plain: RunReport

    @property
    def problems(self) -> list[str]:
        """Return why the demo has failed; nothing, if it has not."""
        found = problems(
            self.resilient, self.setting.scripted_failures, self.setting.max_concurrency
        )
        return found + overloads(self.plain, self.setting.max_concurrency)

    def as_json(self) -> str:
        """Return everything as one JSON object."""
        document = {
            **attrs.asdict(self.setting),
            "scripted_failures": self.setting.scripted_failures,
            "ok": not self.problems,
            "problems": self.problems,
            "with": self.resilient.as_dict(),
            "without": self.plain.as_dict(),
        }
        return json.dumps(document, indent=2) + "\n"

    def as_text(self) -> str:
        """Return the table, and the result in words."""
        scripted = len(self.setting.scripted_failures)
        expected = f" ({scripted} fail by script, whatever is done)" if scripted else ""
        return render(
            comparison(self.resilient, self.plain),
            headline("with", self.resilient) + expected,
            headline("without", self.plain),
        )


async def run_demo(setting: Setting, *, as_json: bool) -> int:
    """Run both, print the comparison, and return the exit status."""
    done: list[Comparison] = []
    async with trio.open_nursery() as watch:
        await watch.start(cancel_on_interrupt, watch.cancel_scope)
        with progress_bar() as progress:
            resilient = await Run(setting, _bar(progress, "with", setting)).resilient()
            plain = await Run(setting, _bar(progress, "without", setting)).plain()
        done.append(Comparison(setting, resilient, plain))
        watch.cancel_scope.cancel()
    if not done:
        complain("interrupted")
        return EXIT_INTERRUPTED
    (both,) = done
    write_stdout(both.as_json() if as_json else both.as_text())
    for problem in both.problems[:PROBLEMS_SHOWN]:
        complain(problem)
    return EXIT_FAILED if both.problems else 0


def _bar(progress: Progress, name: str, setting: Setting) -> Callable[[], None]:
    """Add a bar for a run; return what moves it on by one."""
    bar = progress.add_task(name, total=setting.requests, note="")
    return partial(progress.advance, bar)
