"""Serve pages over real sockets, with scripted faults, and count honestly how many are in progress.

It speaks HTTP/1.1 through h11 on its own, because half of the faults are below what a web framework
can do: a body that stops in the middle, a request that never gets an answer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Protocol, final

import attrs
import h11
import trio

from trio_resilience._cli._faults import STATUS, Outage, Treatment

if TYPE_CHECKING:
    from trio_resilience._cli._faults import Answer

ATTEMPT_HEADER: Final = "x-attempt"
"""Which attempt a request is, said by the client.

The server can't count them itself: a request that was given up before the server has read it would
shift every later one, and with it their faults.
"""
PAGE: Final = b"<!doctype html><title>A page</title><p>" + b"All is well. " * 300 + b"</p>\n"
CHUNK: Final = 65536


class Plan(Protocol):
    """Decides how each request is treated: a `FaultPlan`, or a test's own."""

    def answer(self, path: str, attempt: int) -> Answer:
        """Return how the *attempt*-th request (from 1) for *path* is answered."""
        ...


@final
@attrs.define(eq=False)
class FaultServer:
    """Answers every request as *plan* says, and remembers the most that were in progress at once.

    A request is in progress from the moment when the server has read it until the server has
    answered it or has seen its end. Both ends are taken exactly, or `peak` would show more requests
    than the client ever had under way:

    - *Answered* is when the last piece of the answer is about to be sent, since the client may send
      its next request as soon as it has that piece.
    - A client that gives up closes its connection before it sends anything else, so its end is
      already here when its next request is; but the task that serves the closed connection may
      not have run yet. So before a request is counted, every connection that has an unanswered
      one is looked at: if the client has left, that request has ended.

    During an *outage* no request gets an answer, also none that was in progress when it began; its
    connection is closed instead. Requests are still read, since they are to be counted.
    """

    plan: Plan
    outage: Outage = attrs.field(factory=Outage)
    requests: int = attrs.field(default=0, init=False)
    peak: int = attrs.field(default=0, init=False)
    _in_progress: set[trio.SocketStream] = attrs.field(factory=set[trio.SocketStream], init=False)

    async def serve(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve on a port of 127.0.0.1 that the system chooses; start with its base URL."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._handle, listeners)
            task_status.started(f"http://127.0.0.1:{port}")

    async def _handle(self, stream: trio.SocketStream) -> None:
        try:
            await _Conversation(self, stream).run()
        except (trio.BrokenResourceError, h11.ProtocolError):
            pass  # a client that resets the connection, or speaks no HTTP, ends its own only
        finally:
            self.ended(stream)

    @property
    def in_progress(self) -> int:
        """How many requests are counted at this moment."""
        return len(self._in_progress)

    @property
    def is_down(self) -> bool:
        """Whether there is an outage at this moment."""
        return self.outage.is_on(trio.current_time())

    def begun(self, stream: trio.SocketStream) -> None:
        """Count the request that was read from *stream*."""
        self.requests += 1
        self.outage.note_request(self.requests, trio.current_time())
        self._in_progress = {
            other for other in (*self._in_progress, stream) if not _has_left(other)
        }
        self.peak = max(self.peak, self.in_progress)

    def ended(self, stream: trio.SocketStream) -> None:
        """Count the request of *stream* no longer; harmless if it has ended before."""
        self._in_progress.discard(stream)


def _has_left(stream: trio.SocketStream) -> bool:
    # A client that waits for its answer sends nothing meanwhile (it does not pipeline): what can be
    # read is the end of the connection, or its reset.
    return stream.socket.is_readable()


@final
@attrs.define(eq=False)
class _Conversation:
    """One connection: requests one after the other, until either side ends it."""

    server: FaultServer
    stream: trio.SocketStream
    _protocol: h11.Connection = attrs.field(factory=lambda: h11.Connection(h11.SERVER), init=False)

    async def run(self) -> None:
        while (request := await self._next_request()) is not None:
            self.server.begun(self.stream)
            answer = self.server.plan.answer(request.target.decode("ascii"), _attempt(request))
            if (
                self.server.is_down
                or not await self._client_waits(answer.latency)
                or self.server.is_down
            ):
                return
            await self._send(answer)
            self.server.ended(self.stream)
            if self._protocol.our_state is not h11.DONE:
                return
            self._protocol.start_next_cycle()

    async def _next_request(self) -> h11.Request | None:
        """Return the next complete request, or ``None`` when the client has no more."""
        request: h11.Request | None = None
        while True:
            event = self._protocol.next_event()
            if event is h11.NEED_DATA:
                self._protocol.receive_data(await self.stream.receive_some(CHUNK))
            elif isinstance(event, h11.Request):
                request = event
            elif isinstance(event, h11.EndOfMessage):
                return request
            elif isinstance(event, h11.ConnectionClosed):
                return None

    async def _client_waits(self, seconds: float) -> bool:
        """Do nothing for *seconds* but read; return whether the client is still there.

        Reading is what shows that it has left: a server that only sleeps would hold on to requests
        that nobody waits for.
        """
        with trio.move_on_after(seconds):
            await self.stream.receive_some(CHUNK)
            return False
        return True

    async def _send(self, answer: Answer) -> None:
        if answer.treatment is Treatment.HANG:
            await self._client_waits(math.inf)
            return
        body = _body(answer)
        await self._send_event(_head(answer))
        if answer.treatment is Treatment.DROP:
            await self._send_event(h11.Data(body[: len(body) // 2]))
            return
        await self._send_event(h11.Data(body))
        last_piece = self._protocol.send(h11.EndOfMessage())
        self.server.ended(self.stream)
        await self.stream.send_all(last_piece or b"")

    async def _send_event(self, event: h11.Event) -> None:
        await self.stream.send_all(self._protocol.send(event) or b"")


def _attempt(request: h11.Request) -> int:
    said = dict(request.headers).get(ATTEMPT_HEADER.encode(), b"")
    return int(said) if said.isdigit() else 1


def _head(answer: Answer) -> h11.Response:
    # Without a length the body goes out in chunks, and its end is a piece of its own.
    headers = [("content-type", "text/html")]
    if answer.retry_after is not None:
        headers.append(("retry-after", str(answer.retry_after)))
    return h11.Response(status_code=STATUS[answer.treatment], headers=headers)


def _body(answer: Answer) -> bytes:
    is_page = STATUS[answer.treatment] == STATUS[Treatment.PAGE]
    return PAGE if is_page else f"scripted: {answer.treatment.value}\n".encode()
