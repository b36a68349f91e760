"""Take URLs from the command line and from a file, no faster than they are fetched."""

from __future__ import annotations

import codecs
import os
import stat
import sys
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, Self, final

import attrs
import httpx2
import trio

from trio_resilience._cli._terminal import UsageError

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

CHUNK: Final = 65536
"""Bytes read at a time, and the longest line that is taken for a URL."""
STDIN: Final = "-"
MAX_PORT: Final = 65535
SHOWN: Final = 200
"""How much of a bad URL a message repeats."""


@final
@attrs.define(eq=False)
class Job:
    """A URL to fetch, and what has become of it so far."""

    number: int
    """Counted from 1 over all URLs of a call; the same URL may come twice."""
    url: str
    problem: str | None = None
    """Why this is no URL, if it isn't one."""
    attempts: int = attrs.field(default=0, init=False)
    status: int | None = attrs.field(default=None, init=False)
    """Of the last response, if there was one."""
    received: int = attrs.field(default=0, init=False)
    """Bytes of the body in the last attempt."""
    started_at: float = attrs.field(default=0.0, init=False)
    ended_at: float = attrs.field(default=0.0, init=False)
    """In seconds of trio's clock, as is `started_at`."""

    def begin_attempt(self, now: float) -> None:
        """Count an attempt, and forget what the one before it received."""
        if self.attempts == 0:
            self.started_at = now
        self.attempts += 1
        self.status = None
        self.received = 0

    @property
    def seconds(self) -> float:
        """From the start of the first attempt to the end of the last."""
        return self.ended_at - self.started_at


def find_problem(url: str) -> str | None:
    """Return why *url* can't be fetched whatever the network does, or ``None``."""
    shown = ascii(url[:SHOWN])
    try:
        parsed = httpx2.URL(url)
    except (httpx2.InvalidURL, UnicodeError) as error:
        return f"not a URL: {shown} ({error})"
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        return f"not an http or https URL: {shown}"
    if parsed.port is not None and parsed.port > MAX_PORT:
        return f"no port has this number: {shown}"
    return None


@contextmanager
def opened(name: str) -> Generator[int]:
    """Open the file for reading, or stdin for ``-``; yield the descriptor.

    It is read past `sys.stdin`: a thread that waits for a line there holds a lock that the end of
    the interpreter would run into.
    """
    if name == STDIN:
        yield sys.stdin.fileno()
        return
    try:
        descriptor = os.open(name, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"can't read {name}: {error.strerror}") from None
    try:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise UsageError(f"can't read {name}: it is a directory")
        yield descriptor
    finally:
        os.close(descriptor)


@final
@attrs.define(eq=False)
class JobSource:
    """An async iterator over the *urls* and then over the lines of a file, read when asked for.

    At most one chunk of the file is held, however long it is; a file that never ends is fine, and
    waiting for its next line holds up nothing else. Empty lines and those that begin with ``#``
    are skipped.
    """

    urls: Sequence[str]
    name: str = ""
    """The file, in messages."""
    descriptor: int | None = None
    issued: int = attrs.field(default=0, init=False)
    _lines: deque[bytes] = attrs.field(factory=deque[bytes], init=False)
    _rest: bytes = attrs.field(default=b"", init=False)
    _line_number: int = attrs.field(default=0, init=False)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Job:
        if self.issued < len(self.urls):
            return self._job(self.urls[self.issued])
        while True:
            while not self._lines:
                await self._read()
            job = self._parse(self._lines.popleft())
            if job is not None:
                return job

    def _job(self, url: str, problem: str | None = None) -> Job:
        self.issued += 1
        return Job(self.issued, url, problem)

    def _parse(self, line: bytes) -> Job | None:
        self._line_number += 1
        line = line.removeprefix(codecs.BOM_UTF8).strip()
        if not line or line.startswith(b"#"):
            return None
        url = line.decode(errors="replace")
        problem = find_problem(url)
        return self._job(url, problem and f"{self.name}:{self._line_number}: {problem}")

    async def _read(self) -> None:
        """Wait for more lines; the end of the file is a `StopAsyncIteration`."""
        if self.descriptor is None:
            raise StopAsyncIteration
        chunk = await self._read_chunk(self.descriptor)
        if not chunk:
            self.descriptor = None
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        self._lines.extend(lines if chunk else [self._rest])
        if len(self._rest) > CHUNK:
            self.descriptor = None
            raise UsageError(
                f"{self.name}:{self._line_number + len(lines) + 1}: a line of more than"
                f" {CHUNK} bytes; is this a list of URLs?"
            )

    async def _read_chunk(self, descriptor: int) -> bytes:
        try:
            # A read can't be interrupted. If the call is cancelled, nobody waits for it any more.
            return await trio.to_thread.run_sync(os.read, descriptor, CHUNK, abandon_on_cancel=True)
        except OSError as error:
            raise UsageError(f"can't read {self.name}: {error.strerror}") from None
