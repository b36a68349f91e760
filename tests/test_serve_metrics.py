"""Metrics over a socket: what is served to whom, and whom nobody can disturb."""

from __future__ import annotations

import json
import os
import socket
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from tests.test_metrics import made
from trio_resilience import TimedOut
from trio_resilience import _serving as serving
from trio_resilience._metrics import Metrics
from trio_resilience._serving import serve_metrics
from trio_resilience._snapshots import MetricsSnapshot

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no Unix sockets")


@pytest.fixture
def metrics() -> Metrics:
    """Metrics that have counted something."""
    metrics = Metrics()
    for number in range(3):
        metrics(made(TimedOut, "db", f"load {number}", timeout=1.0))
    return metrics


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A short path: those of sockets have to be."""
    monkeypatch.chdir(tmp_path)
    return Path("metrics.sock")


async def connected(address: Any) -> trio.SocketStream:
    if isinstance(address, int):
        return await trio.open_tcp_stream("127.0.0.1", address)
    return await trio.open_unix_socket(address)


async def received(stream: trio.SocketStream) -> bytes:
    with trio.fail_after(10):
        async with stream:
            return b"".join([chunk async for chunk in stream])


async def asked(address: Any) -> MetricsSnapshot:
    """What is served there."""
    data = await received(await connected(address))
    assert data.endswith(b"\n")
    assert data.count(b"\n") == 1
    return MetricsSnapshot.from_dict(json.loads(data))


# --- what is served -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "text", "port"])
async def test_whoever_connects_gets_a_snapshot(metrics: Metrics, path: Path, kind: str) -> None:
    """One line, of that moment; again and again. What is returned is where."""
    where: Any = {"path": path, "text": str(path), "port": 0}[kind]
    async with trio.open_nursery() as nursery:
        address = await serve_metrics(nursery, where, metrics)
        assert (isinstance(address, int) and address > 0) or address == str(path)
        for _ in range(2):
            found = await asked(address)
            assert found.series == metrics.snapshot().series
            assert found.time is not None
            metrics(made(TimedOut, timeout=1.0))
        nursery.cancel_scope.cancel()


async def test_a_port_is_of_this_machine_only(metrics: Metrics) -> None:
    async with trio.open_nursery() as nursery:
        port = await serve_metrics(nursery, 0, metrics)
        assert isinstance(port, int)
        async with await connected(port) as stream:
            assert stream.socket.getpeername()[0] == "127.0.0.1"
        with pytest.raises(OSError, match=r".*"), socket.create_connection(("127.0.0.2", port)):
            pass
        nursery.cancel_scope.cancel()


# --- the socket file ----------------------------------------------------------------------------


@pytest.fixture
def lax() -> Iterator[None]:
    """Files that are made are everybody's."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.usefixtures("lax")
async def test_the_socket_is_its_users_alone_and_is_removed(metrics: Metrics, path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await serve_metrics(nursery, path, metrics)
        mode = path.stat().st_mode
        assert stat.S_ISSOCK(mode)
        assert stat.S_IMODE(mode) == 0o600
        nursery.cancel_scope.cancel()
    assert not path.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="it is made its user's alone at once there")
@pytest.mark.usefixtures("lax")
async def test_the_socket_is_its_users_alone_from_its_first_moment(
    metrics: Metrics, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the umask, which other threads make files under, and which is left as it is."""
    modes: list[int] = []

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            super().bind(address)
            modes.append(stat.S_IMODE(Path(address).stat().st_mode))

    monkeypatch.setattr(socket, "socket", Watched)
    async with trio.open_nursery() as nursery:
        await serve_metrics(nursery, path, metrics)
        nursery.cancel_scope.cancel()
    assert modes == [0o600]
    assert os.umask(0) == 0


async def test_it_is_removed_though_the_program_has_gone_to_another_folder(
    metrics: Metrics, path: Path, tmp_path: Path
) -> None:
    async with trio.open_nursery() as nursery:
        await serve_metrics(nursery, path, metrics)
        os.chdir(tmp_path.parent)
        nursery.cancel_scope.cancel()
    assert not (tmp_path / path).exists()


async def test_what_a_dead_process_has_left_is_replaced(metrics: Metrics, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
        dead.listen()
    assert path.exists()
    async with trio.open_nursery() as nursery:
        await serve_metrics(nursery, path, metrics)
        assert (await asked(path)).series
        nursery.cancel_scope.cancel()


async def refused(metrics: Metrics, where: Any) -> OSError:
    """The error that leaves everything as it was."""
    with pytest.RaisesGroup(OSError, flatten_subgroups=True) as caught:
        async with trio.open_nursery() as nursery:
            await serve_metrics(nursery, where, metrics)
    (error,) = caught.value.exceptions
    assert isinstance(error, OSError)
    return error


@pytest.mark.parametrize("full", [False, True])
async def test_a_socket_in_use_is_left_alone(metrics: Metrics, path: Path, full: bool) -> None:
    """Also one whose line is full."""
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as client:
        other.bind(str(path))
        other.listen(0)
        if full:
            client.connect(str(path))
        assert (await refused(metrics, path)).strerror == "another process listens there"
        assert path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
async def test_other_files_are_left_alone(metrics: Metrics, path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    error = await refused(metrics, path)
    assert isinstance(error, FileExistsError)
    assert error.strerror == "it is there, and is no socket"
    assert (path.read_text() == "precious") if kind == "file" else path.lstat()


async def test_a_place_that_does_not_exist_is_an_error(metrics: Metrics, path: Path) -> None:
    assert isinstance(await refused(metrics, path / "deeper"), FileNotFoundError)


async def test_what_has_taken_its_place_is_not_removed(metrics: Metrics, path: Path) -> None:
    """Somebody has removed the socket, and made a file."""
    async with trio.open_nursery() as nursery:
        await serve_metrics(nursery, path, metrics)
        path.unlink()
        path.write_text("precious")
        nursery.cancel_scope.cancel()
    assert path.read_text() == "precious"


async def test_it_may_be_removed_before(metrics: Metrics, path: Path) -> None:
    async with trio.open_nursery() as nursery:
        await serve_metrics(nursery, path, metrics)
        path.unlink()
        nursery.cancel_scope.cancel()
    assert not path.exists()


# --- clients ------------------------------------------------------------------------------------


async def test_a_client_that_sends_garbage_gets_its_snapshot(metrics: Metrics, path: Path) -> None:
    """And changes nothing: it is not read."""
    async with trio.open_nursery() as nursery:
        for where in (path, 0):
            address = await serve_metrics(nursery, where, metrics)
            stream = await connected(address)
            await stream.send_all(b"GET / HTTP/1.1\r\n\r\n\0\xff" * 100)
            assert json.loads(await received(stream))["series"]
            assert (await asked(address)).series == metrics.snapshot().series
        nursery.cancel_scope.cancel()


async def test_clients_that_leave_at_once_disturb_nobody(metrics: Metrics, path: Path) -> None:
    """Whatever they leave behind."""
    for number in range(900):
        metrics(made(TimedOut, "db", f"more {number}", timeout=1.0))
    async with trio.open_nursery() as nursery:
        await serve_metrics(nursery, path, metrics)
        for _ in range(30):
            await (await connected(path)).aclose()
        assert len((await asked(path)).series) == 903
        nursery.cancel_scope.cancel()


async def test_clients_that_hang_are_sent_away(
    metrics: Metrics, path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """After five seconds."""
    autojump_clock.autojump_threshold = 0.2  # real sockets need a moment
    async with trio.open_nursery() as nursery:
        await serve_metrics(nursery, path, metrics)
        before = nursery_size()
        hanging = await connected(path)
        assert await hanging.receive_some()
        assert nursery_size() == before + 1
        await trio.sleep(serving.PATIENCE + 1)
        assert nursery_size() == before
        await hanging.aclose()
        nursery.cancel_scope.cancel()


def nursery_size() -> int:
    return trio.lowlevel.current_statistics().tasks_living


@pytest.mark.parametrize("reads", [False, True])
async def test_any_number_of_clients_that_hang_keeps_out_nobody(
    metrics: Metrics, path: Path, reads: bool
) -> None:
    """Those that are there longest make room, so that there are never many."""
    async with trio.open_nursery() as nursery:
        await serve_metrics(nursery, path, metrics)
        before, hanging = nursery_size(), list[trio.SocketStream]()
        with trio.fail_after(serving.PATIENCE - 1):
            for _ in range(5 * serving.MAX_CLIENTS):
                hanging.append(await connected(path))
                if reads:
                    await hanging[-1].receive_some()
            assert (await asked(path)).series == metrics.snapshot().series
        assert nursery_size() <= before + serving.MAX_CLIENTS
        for each in hanging:
            await each.aclose()
        nursery.cancel_scope.cancel()


async def test_a_client_that_hangs_does_not_hold_up_the_end(metrics: Metrics, path: Path) -> None:
    with trio.fail_after(serving.PATIENCE / 2):
        async with trio.open_nursery() as nursery:
            await serve_metrics(nursery, path, metrics)
            hanging = await connected(path)
            await hanging.receive_some()
            nursery.cancel_scope.cancel()
    await hanging.aclose()
    assert not path.exists()


# --- arguments ----------------------------------------------------------------------------------


class BytesPath:
    """A path that is no text."""

    def __fspath__(self) -> bytes:
        return b"x"

    def __repr__(self) -> str:
        return "a path of bytes"


@pytest.mark.parametrize(
    "where, error, words",
    [
        (True, TypeError, "must be an int, got True"),
        (-1, ValueError, "must be >= 0, got -1"),
        (65536, ValueError, "must be <= 65535, got 65536"),
        (None, TypeError, "must be a path or a port, got None"),
        (b"x", TypeError, "must be a path or a port, got b'x'"),
        (BytesPath(), ValueError, "must be a path or a port, got a path of bytes"),
        ("", ValueError, "must be a path or a port, got ''"),
        ("a\0b", ValueError, "must be a path or a port, got 'a"),
    ],
)
async def test_the_place_is_checked(
    metrics: Metrics, where: Any, error: type[Exception], words: str
) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(error, match=f"`path_or_port` {words}"):
            await serve_metrics(nursery, where, metrics)


async def test_the_nursery_and_the_metrics_are_checked(metrics: Metrics) -> None:
    some: Any = None
    with pytest.raises(TypeError, match=r"`nursery` must be a Nursery, got None"):
        await serve_metrics(some, 0, metrics)
    async with trio.open_nursery() as nursery:
        with pytest.raises(TypeError, match=r"`metrics` must be a Metrics, got None"):
            await serve_metrics(nursery, 0, some)


async def test_without_unix_sockets_there_are_ports(
    metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.RaisesGroup(
        pytest.RaisesExc(ValueError, match="no Unix sockets"), flatten_subgroups=True
    ):
        async with trio.open_nursery() as nursery:
            await serve_metrics(nursery, "metrics.sock", metrics)
