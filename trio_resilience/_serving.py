"""Let other processes of this machine read what `Metrics` has counted, and nothing else."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast, final

import attrs
import trio

from trio_resilience._checks import integer
from trio_resilience._metrics import Metrics

if TYPE_CHECKING:
    from collections.abc import Generator

Address: TypeAlias = "str | os.PathLike[str] | int"

LOOPBACK: Final = "127.0.0.1"
MAX_CLIENTS: Final = 16
"""A further one takes the place of the one that is there longest."""
PATIENCE: Final = 5.0
"""Seconds that a client has to take its snapshot."""
_OWNER_ONLY: Final = stat.S_IRUSR | stat.S_IWUSR
_LAST_PORT: Final = 65535


async def serve_metrics(nursery: trio.Nursery, path_or_port: Address, metrics: Metrics) -> Address:
    """Serve snapshots of *metrics* until *nursery* is cancelled; return where.

    Whoever connects is sent one snapshot, as a line of JSON (`MetricsSnapshot.as_dict`), and then
    the end of the connection; what it sends is not read. ``python -m trio_resilience top`` shows
    it as a table. A client that hangs, or leaves, disturbs nobody: it has five seconds, and when 16
    are there, a further one takes the place of the first.

    When this returns, it is listening. It never lets *nursery* end by itself.

    Args:
        nursery: where it runs.
        path_or_port: path of a Unix socket, which only this user may connect to. It is removed in
            the end; one that a process has left that is gone is replaced, and what is no socket, or
            is in use, is an `OSError`. Or a port of 127.0.0.1, which everybody on this machine may
            connect to; 0 means any that is free, and the one that it is is returned.
        metrics: what is served.

    Example::

        metrics = Metrics()
        with subscribe(metrics):
            async with trio.open_nursery() as nursery:
                await serve_metrics(nursery, "/run/shop/metrics.sock", metrics)
                ...
    """
    _check("nursery", nursery, trio.Nursery)
    _check("metrics", metrics, Metrics)
    address = checked_address(path_or_port)
    found: Address = await nursery.start(_serve, address, metrics, name="serve_metrics")
    return found


def _check(name: str, value: object, kind: type[object]) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"`{name}` must be a {kind.__name__}, got {value!r}")


def checked_address(value: object) -> str | int:
    """Return a path or a port, or refuse what is neither."""
    if isinstance(value, int):
        port = integer("path_or_port", value, minimum=0)
        if port > _LAST_PORT:
            raise ValueError(f"`path_or_port` must be <= {_LAST_PORT}, got {value!r}")
        return port
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"`path_or_port` must be a path or a port, got {value!r}")
    path: object = os.fspath(cast("os.PathLike[Any]", value))
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError(f"`path_or_port` must be a path or a port, got {value!r}")
    return path


async def _serve(  # noqa: ASYNC114 - what is started so is never called in a block
    address: str | int, metrics: Metrics, *, task_status: trio.TaskStatus[str | int]
) -> None:
    serve = _Server(metrics).serve
    if isinstance(address, int):
        listeners = await trio.open_tcp_listeners(address, host=LOOPBACK)
        task_status.started(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(serve, listeners)
    with _unix_listener(Path(address)) as listener:
        task_status.started(address)
        await trio.serve_listeners(serve, [listener])


# --- the socket file ----------------------------------------------------------------------------


@contextmanager
def _unix_listener(path: Path) -> Generator[trio.SocketListener]:
    """Listen at *path*, as its only user; remove it in the end, if it still is what was made."""
    if not hasattr(socket, "AF_UNIX"):
        raise ValueError("`path_or_port` must be a port: this system has no Unix sockets")
    with socket.socket(socket.AF_UNIX) as ours:
        ours.settimeout(0)
        _bind(ours, path)
        path = path.absolute()  # the program may go to another folder
        made = _identity(path)
        try:
            # What the umask has taken away, and for systems where a socket has no mode of its own.
            # Nobody can connect before it listens, so there is no moment at which others could.
            path.chmod(_OWNER_ONLY)
            ours.listen()
            yield trio.SocketListener(trio.socket.from_stdlib_socket(ours))
        finally:
            if _identity(path) == made:
                path.unlink()


def _bind(ours: socket.socket, path: Path) -> None:
    with suppress(OSError):  # systems other than Linux may refuse
        os.fchmod(ours.fileno(), _OWNER_ONLY)  # the file's own mode, from its first moment
    try:
        ours.bind(str(path))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_stale(path)
        ours.bind(str(path))


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens to any more, and nothing else."""
    found = path.lstat()
    if not stat.S_ISSOCK(found.st_mode):
        raise FileExistsError(errno.EEXIST, "it is there, and is no socket", str(path))
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass  # somebody listens, and is busy
    raise OSError(errno.EADDRINUSE, "another process listens there", str(path))


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


# --- clients ------------------------------------------------------------------------------------


@final
@attrs.define(eq=False)
class _Server:
    """Sends a snapshot to each client."""

    metrics: Metrics
    _clients: list[trio.CancelScope] = attrs.field(factory=list[trio.CancelScope], init=False)
    """In the order in which they came."""

    async def serve(self, stream: trio.SocketStream) -> None:
        await trio.lowlevel.checkpoint()
        with self._let_in():
            await stream.send_all(self._line())
            await stream.send_eof()
            await _drain(stream)

    @contextmanager
    def _let_in(self) -> Generator[None]:
        """Have patience with a client, and with no more than a few at a time."""
        # The first has most likely got its snapshot by now, and does not go. To send newcomers away
        # instead would let a few that hang keep out everybody.
        if len(self._clients) >= MAX_CLIENTS:
            self._clients.pop(0).cancel()
        with trio.move_on_after(PATIENCE) as client:
            self._clients.append(client)
            try:
                yield
            except trio.BrokenResourceError:
                pass  # it has left
            finally:
                if client in self._clients:
                    self._clients.remove(client)

    def _line(self) -> bytes:
        document = self.metrics.snapshot().as_dict()
        return json.dumps(document, allow_nan=False, separators=(",", ":")).encode() + b"\n"


async def _drain(stream: trio.SocketStream) -> None:
    """Wait until the client has closed its end, too."""
    # To close a connection whose client has sent something that nobody has read is to reset it,
    # and the client might lose the snapshot.
    received = await stream.receive_some()
    while received:
        received = await stream.receive_some()
