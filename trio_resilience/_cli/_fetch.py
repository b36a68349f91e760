"""Fetch URLs, and report each on a line of JSON as soon as it is done."""

from __future__ import annotations

import json
from contextlib import AsyncExitStack, ExitStack, aclosing
from typing import TYPE_CHECKING, Any, Final, final

import attrs
import httpx2
import outcome
import trio

from trio_resilience import (
    Exponential,
    OperationsCancelledError,
    OperationTimeoutError,
    Retry,
    stream_map_with_limit,
)
from trio_resilience._cli._causes import BadURLError, explain, is_worth_retrying
from trio_resilience._cli._rate import Rate, Turns, host_of
from trio_resilience._cli._saving import file_name, saved_whole
from trio_resilience._cli._terminal import (
    EXIT_BROKEN_PIPE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    UsageError,
    cancel_on_interrupt,
    complain,
    progress_bar,
    set_aside,
    write_stdout_line,
)
from trio_resilience._cli._urls import Job, JobSource, find_problem, opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import Progress

MAX_SILENCE: Final = 10.0
"""Seconds without a byte after which an attempt is given up, if the operation's time allows it."""
SILENCES: Final = 3
"""How many silent attempts fit into the time of an operation."""
LOOKAHEAD: Final = 1000
"""How many URLs are read ahead, at most, to find one whose host is free."""


@final
@attrs.frozen(kw_only=True)
class Options:
    """What the user asked for."""

    max_concurrency: int
    max_attempts: int
    timeout: float
    """Seconds for a URL, with all attempts and the waits between them, but not for its turn."""
    output_dir: trio.Path | None
    rate: Rate | None = None
    burst: int = 1
    max_per_host: int | None = None

    @property
    def turns(self) -> Turns:
        """What every request waits for."""
        return Turns(None if self.rate is None else self.rate.limiter(self.burst))

    @property
    def retry(self) -> Retry:
        """The policy under which a URL is fetched."""
        return Retry(
            max_attempts=self.max_attempts,
            on=is_worth_retrying,
            backoff=Exponential(0.5, max_delay=10.0),
            name="fetch",
        )

    def client(self, turns: Turns) -> httpx2.AsyncClient:
        """Return a client that gives an attempt up when the server falls silent.

        So there is time for another. A body that keeps coming may take all the time there is.
        """
        return httpx2.AsyncClient(
            timeout=min(MAX_SILENCE, self.timeout / SILENCES),
            follow_redirects=True,
            # Nothing may queue inside the pool: there a request that is cancelled can take its
            # place along.
            limits=httpx2.Limits(
                max_connections=None, max_keepalive_connections=self.max_concurrency
            ),
            event_hooks={"response": [turns.wait_to_follow]},
        )


@final
@attrs.define(eq=False)
class Tally:
    """How far a call of ``fetch`` is, in URLs."""

    begun: int = 0
    """Of which a request has gone out."""
    fetched: int = 0
    failed: int = 0

    @property
    def midway(self) -> int:
        """How many have begun and are not done."""
        return self.begun - self.fetched - self.failed


@final
@attrs.define(eq=False)
class Downloader:
    """The operation: fetch what a job names, in as many attempts as it takes and may take."""

    options: Options
    turns: Turns
    client: httpx2.AsyncClient
    retry: Retry
    tally: Tally

    async def __call__(self, job: Job) -> None:
        """Return when the body is there, or raise why it is not."""
        if job.problem is not None:
            self.tally.begun += 1
            raise BadURLError(job.problem)
        with trio.CancelScope(relative_deadline=self.options.timeout) as patience:
            await self.retry.call(self._attempt, job, patience)
            return
        raise OperationTimeoutError(self.options.timeout, "fetch")

    async def _attempt(self, job: Job, patience: trio.CancelScope) -> None:
        """Receive the whole body, chunk by chunk, and save it if there is a place for it."""
        await self.turns.wait(patience)
        self.tally.begun += job.attempts == 0
        job.begin_attempt(trio.current_time())
        try:
            async with self.client.stream(
                "GET", job.url, extensions={"patience": patience}
            ) as response:
                job.status = response.status_code
                response.raise_for_status()
                await self._receive(response, job)
        finally:
            job.ended_at = trio.current_time()

    async def _receive(self, response: httpx2.Response, job: Job) -> None:
        async with AsyncExitStack() as stack:
            write = None
            if self.options.output_dir is not None:
                path = self.options.output_dir / file_name(job.url)
                write = await stack.enter_async_context(saved_whole(path, job.number))
            chunks = await stack.enter_async_context(aclosing(response.aiter_bytes()))
            async for chunk in chunks:
                job.received += len(chunk)
                if write is not None:
                    await write(chunk)


@final
@attrs.define(eq=False)
class Session:
    """One call of ``fetch``: where the jobs come from, and how far they are."""

    options: Options
    source: JobSource
    progress: Progress
    tally: Tally = attrs.field(factory=Tally, init=False)

    async def run(self) -> int:
        """Fetch everything; return the exit status."""
        status = EXIT_INTERRUPTED
        async with trio.open_nursery() as nursery:
            # The operations have a nursery of their own beside this task: Ctrl-C cancels that, and
            # this task is still there to report what they had finished.
            home = await nursery.start(_keep_nursery)
            await nursery.start(cancel_on_interrupt, home.cancel_scope)
            status = await self._run_in(home)
            nursery.cancel_scope.cancel()
        return status

    async def _run_in(self, home: trio.Nursery) -> int:
        try:
            await self._fetch_all(home)
        except OperationsCancelledError:
            complain(self._account())
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            return EXIT_BROKEN_PIPE
        except UsageError as error:
            complain(str(error))
            return EXIT_USAGE
        return EXIT_FAILED if self.tally.failed else 0

    async def _fetch_all(self, home: trio.Nursery) -> None:
        options = self.options
        bar = self.progress.add_task("fetching", total=None, note="")
        turns = options.turns
        async with (
            options.client(turns) as client,
            stream_map_with_limit(
                home,
                Downloader(options, turns, client, options.retry, self.tally),
                self.source,
                max_concurrency=options.max_concurrency,
                key=None if options.max_per_host is None else _host_of,
                max_per_key=options.max_per_host,
                lookahead=LOOKAHEAD,
                on_error="collect",
            ) as results,
        ):
            async for job, result in results:
                await self._report(job, result)
                self.progress.update(bar, advance=1, note=f"{self.tally.failed} failed")

    async def _report(self, job: Job, result: outcome.Value[None] | outcome.Error) -> None:
        error = result.error if isinstance(result, outcome.Error) else None
        if error is None:
            self.tally.fetched += 1
        else:
            self.tally.failed += 1
        if job.problem is not None:
            complain(job.problem)
        with set_aside(self.progress):
            await write_stdout_line(json.dumps(self._record(job, error)))

    def _record(self, job: Job, error: BaseException | None) -> dict[str, Any]:
        record: dict[str, Any] = {
            "url": job.url,
            "status": job.status,
            "attempts": job.attempts,
            "seconds": round(job.seconds, 6),
            "bytes": job.received,
            "error": None if error is None else explain(error),
        }
        if self.options.output_dir is not None:
            record["file"] = file_name(job.url) if error is None else None
        return record

    def _account(self) -> str:
        done = self.tally
        return (
            f"interrupted: {done.fetched} fetched, {done.failed} failed,"
            f" {done.midway} stopped midway"
        )


def _host_of(job: Job) -> object:
    return None if job.problem is not None else host_of(job.url)


async def _keep_nursery(*, task_status: trio.TaskStatus[trio.Nursery]) -> None:
    async with trio.open_nursery() as nursery:
        task_status.started(nursery)
        await trio.sleep_forever()


async def run_fetch(urls: Sequence[str], input_name: str | None, options: Options) -> int:
    """Fetch the *urls* and those in the file, and return the exit status."""
    if not urls and input_name is None:
        raise UsageError("nothing to fetch: give URLs, or --input FILE (- for stdin)")
    for problem in filter(None, map(find_problem, urls)):
        raise UsageError(problem)
    with ExitStack() as stack:
        descriptor = None if input_name is None else stack.enter_context(opened(input_name))
        await _make(options.output_dir)
        source = JobSource(urls, input_name or "", descriptor)
        return await Session(options, source, stack.enter_context(progress_bar())).run()


async def _make(directory: trio.Path | None) -> None:
    if directory is None:
        return
    try:
        await directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"can't write to {directory}: {error.strerror}") from None
