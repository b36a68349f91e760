"""A web server on a port of its own, in a thread of its own, that misbehaves as the path says."""

from __future__ import annotations

import gzip
import os
import random
import signal
import threading
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, final

import attrs
import trio

if TYPE_CHECKING:
    from collections.abc import Generator

BODY = random.Random(1).randbytes(300_000)  # more than any buffer on its way


def response(status: str, body: bytes, *headers: str) -> bytes:
    """Return a response as it goes over the wire."""
    lines = [f"HTTP/1.1 {status}", *headers, "Connection: close", "", ""]
    return "\r\n".join(lines).encode() + body


UNAVAILABLE = "503 Service Unavailable"
MISSING = response("404 Not Found", b"nothing here")
PAGES = {
    "ok": response("200 OK", b"PATH"),
    "slow": response("200 OK", b"slow"),
    "body": response("200 OK", BODY, f"Content-Length: {len(BODY)}"),
    "gzip": response("200 OK", gzip.compress(BODY), "Content-Encoding: gzip"),
    "ungzip": response("200 OK", b"this is not gzip", "Content-Encoding: gzip"),
    "flaky": response(UNAVAILABLE, b"flaky"),
    "flaky again": response("200 OK", b"flaky"),
    "sinking": response(UNAVAILABLE, b""),
    "sinking again": b"",
    "later": response(UNAVAILABLE, b"", "Retry-After: 1"),
    "later again": response("200 OK", b"late"),
    "busy": response("429 Too Many Requests", b"", "Retry-After: 3600"),
    "moved": response("302 Found", b"", "Location: /ok/moved"),
    "loop": response("302 Found", b"", "Location: /loop"),
    "away": response("302 Found", b"", "Location: ftp://127.0.0.1/"),
    "dropped": response("200 OK", b"beginning", "Content-Length: 1000"),
}


@final
@attrs.define(eq=False)
class Web:
    """The server; the counts are how often each path was asked for."""

    url: str = ""
    counts: Counter[str] = attrs.field(factory=Counter[str])
    running: int = 0
    peak: int = 0

    async def serve(self, started: threading.Event, scope: trio.CancelScope) -> None:
        with scope:
            listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
            self.url = f"http://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
            started.set()
            await trio.serve_listeners(self._handle, listeners)

    async def _handle(self, stream: trio.SocketStream) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            chunk = await stream.receive_some()
            if not chunk:
                return
            head += chunk
        path = head.split()[1].decode()
        self.counts[path] += 1
        self.running += 1
        self.peak = max(self.peak, self.running)
        try:
            await self._answer(stream, path)
        except trio.BrokenResourceError:
            pass
        finally:
            self.running -= 1

    async def _answer(self, stream: trio.SocketStream, path: str) -> None:
        page = path.partition("?")[0].strip("/").partition("/")[0]
        if page == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
        if page in {"interrupt", "hang"}:
            await stream.receive_some()  # the end of the connection
            return
        if page == "slow":
            await trio.sleep(0.2)
        again = f"{page} again"
        known = again if self.counts[path] > 1 and again in PAGES else page
        await stream.send_all(PAGES.get(known, MISSING).replace(b"PATH", path.encode()))


@contextmanager
def web_server() -> Generator[Web]:
    """Serve while the block runs; in a thread, since the command line has a trio run of its own."""
    web, started, scope = Web(), threading.Event(), trio.CancelScope()
    tokens: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        await web.serve(started, scope)

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    started.wait(10)
    try:
        yield web
    finally:
        tokens[0].run_sync_soon(scope.cancel)
        thread.join()
