"""The demo's server does on real sockets what its script says, and counts what is in progress."""

from __future__ import annotations

import math
import socket
import struct
from typing import TYPE_CHECKING

import attrs
import httpx2
import pytest
import trio

from trio_resilience._cli._faults import Answer, Outage, Treatment
from trio_resilience._cli._server import PAGE, FaultServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

GET = b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n"


@attrs.define(eq=False)
class Script:
    """Treats each path as its name says, at once unless told otherwise."""

    latency: float = 0.0
    attempts: list[int] = attrs.field(factory=list[int])

    def answer(self, path: str, attempt: int) -> Answer:
        self.attempts.append(attempt)
        return Answer(Treatment[path.strip("/")], self.latency)


@attrs.frozen
class Site:
    """The server, and what a test needs to talk to it."""

    server: FaultServer
    url: str
    script: Script

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", int(self.url.rpartition(":")[2]))


async def until(condition: Callable[[], object]) -> None:
    """Let the server run until it has come that far."""
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - the server has no event for every test's condition
            await trio.sleep(0.001)


@pytest.fixture
async def site() -> AsyncGenerator[Site]:
    script = Script()
    server = FaultServer(script, Outage(seconds=math.inf))
    async with trio.open_nursery() as nursery:
        url = await nursery.start(server.serve)
        yield Site(server, url, script)
        nursery.cancel_scope.cancel()


@pytest.fixture
async def client(site: Site) -> AsyncGenerator[httpx2.AsyncClient]:
    async with httpx2.AsyncClient(base_url=site.url, trust_env=False, timeout=5.0) as client:
        yield client


async def test_a_page_comes_whole_and_the_connection_stays(
    site: Site, client: httpx2.AsyncClient
) -> None:
    responses = [await client.get("/PAGE") for _ in range(3)]
    assert [response.content for response in responses] == [PAGE] * 3
    assert site.server.requests == 3
    assert len({response.extensions["network_stream"] for response in responses}) == 1


@pytest.mark.parametrize(
    "path, status, retry_after",
    [
        ("/UNAVAILABLE", 503, None),
        ("/UNAVAILABLE_UNTIL", 503, "1"),
        ("/TOO_MANY", 429, "1"),
        ("/GONE", 404, None),
        ("/BROKEN", 500, None),
    ],
)
async def test_a_refusal_has_its_status_and_says_when_to_come_back(
    client: httpx2.AsyncClient, path: str, status: int, retry_after: str | None
) -> None:
    response = await client.get(path)
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert response.text.startswith("scripted")


async def test_a_dropped_connection_breaks_the_body_off(client: httpx2.AsyncClient) -> None:
    with pytest.raises(httpx2.RemoteProtocolError, match="without sending complete message body"):
        await client.get("/DROP")


async def test_a_request_that_hangs_is_in_progress_until_its_client_leaves(site: Site) -> None:
    async with await site.connect() as stream:
        await stream.send_all(GET % b"/HANG")
        with trio.move_on_after(0.1) as scope:
            await stream.receive_some()
        assert scope.cancelled_caught
        assert site.server.in_progress == 1
    await until(lambda: not site.server.in_progress)


async def test_a_client_that_leaves_during_the_latency_is_not_answered(site: Site) -> None:
    site.script.latency = math.inf
    async with await site.connect() as stream:
        await stream.send_all(GET % b"/PAGE")
        await until(lambda: site.server.in_progress)
    await until(lambda: not site.server.in_progress)


async def test_the_attempt_is_what_the_client_says_or_else_the_first(
    site: Site, client: httpx2.AsyncClient
) -> None:
    await client.get("/PAGE", headers={"X-Attempt": "3"})
    await client.get("/PAGE")
    await client.get("/PAGE", headers={"X-Attempt": "soon"})
    assert site.script.attempts == [3, 1, 1]


async def test_the_peak_is_the_most_that_were_in_progress_at_once(site: Site) -> None:
    streams = [await site.connect() for _ in range(4)]
    for stream in streams:
        await stream.send_all(GET % b"/HANG")
    await until(lambda: site.server.in_progress == 4)
    for stream in streams:
        await stream.aclose()
    assert site.server.peak == 4


async def test_a_client_that_gives_up_and_tries_again_is_counted_once(site: Site) -> None:
    """The server sees the new request and the end of the old one at the same time, in any order."""
    for _ in range(50):
        old = await site.connect()
        new = await site.connect()
        await old.send_all(GET % b"/HANG")
        await until(lambda: site.server.in_progress)
        old.socket.close()
        await new.send_all(GET % b"/PAGE")
        assert await new.receive_some()
        await new.aclose()
    assert site.server.peak == 1


async def test_the_next_request_can_follow_at_once_and_is_counted_alone(site: Site) -> None:
    """An answer is complete for the client before the server's task runs again."""
    streams = [await site.connect(), await site.connect()]
    protocol_end = b"0\r\n\r\n"
    for turn in range(100):
        stream = streams[turn % 2]
        await stream.send_all(GET % b"/PAGE")
        received = b""
        while not received.endswith(protocol_end):
            received += await stream.receive_some()
    for stream in streams:
        await stream.aclose()
    assert site.server.requests == 100
    assert site.server.peak == 1


async def test_a_client_that_is_gone_before_its_request_is_counted_is_not(site: Site) -> None:
    for _ in range(20):
        stream = await site.connect()
        await stream.send_all(GET % b"/HANG")
        stream.socket.close()
    async with await site.connect() as stream:
        await stream.send_all(GET % b"/PAGE")
        assert await stream.receive_some()
    assert site.server.peak == 1


async def test_a_post_is_answered_like_a_get(client: httpx2.AsyncClient) -> None:
    response = await client.post("/PAGE", content=b"x" * 200_000)
    assert response.content == PAGE


@pytest.mark.parametrize(
    "noise", [b"\x00\x01 nonsense\r\n\r\n", b"HEAD /PAGE HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /PA"]
)
async def test_what_is_no_request_ends_its_own_connection_only(site: Site, noise: bytes) -> None:
    async with await site.connect() as stream:
        await stream.send_all(noise)
        await stream.send_eof()
        with trio.fail_after(5):
            while await stream.receive_some():
                pass
    async with await site.connect() as stream:
        await stream.send_all(GET % b"/PAGE")
        assert await stream.receive_some()
    assert site.server.peak == 1


async def test_a_connection_that_is_reset_ends_its_own_request_only(site: Site) -> None:
    stream = await site.connect()
    await stream.send_all(GET % b"/HANG")
    await until(lambda: site.server.in_progress)
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await stream.aclose()
    await until(lambda: not site.server.in_progress)
    async with await site.connect() as stream:
        await stream.send_all(GET % b"/PAGE")
        assert await stream.receive_some()


async def test_a_server_that_is_down_counts_its_requests_and_answers_none(
    site: Site, client: httpx2.AsyncClient
) -> None:
    site.server.outage.after = 1
    assert (await client.get("/PAGE")).content == PAGE
    for _ in range(2):
        with pytest.raises(httpx2.RemoteProtocolError, match="without sending a response"):
            await client.get("/PAGE")
    assert site.server.is_down
    assert (site.server.requests, site.server.outage.received) == (3, 2)
    assert site.server.in_progress == 0
    site.server.outage.seconds = 0.0
    assert (await client.get("/PAGE")).content == PAGE
    assert (site.server.requests, site.server.outage.received) == (4, 2)


async def test_a_server_that_goes_down_answers_none_that_it_has_begun_with(
    site: Site, client: httpx2.AsyncClient
) -> None:
    site.server.outage.after = 1
    site.script.latency = 0.2
    async with trio.open_nursery() as nursery:
        for _ in range(2):
            nursery.start_soon(expect_no_answer, client)
    assert (site.server.requests, site.server.outage.received) == (2, 1)


async def expect_no_answer(client: httpx2.AsyncClient) -> None:
    with pytest.raises(httpx2.RemoteProtocolError, match="without sending a response"):
        await client.get("/PAGE")
