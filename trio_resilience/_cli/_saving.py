"""Save a body so that a file of that name is always whole."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

MAX_READABLE: Final = 80
"""Characters of the URL in a file name; with the rest it stays far below 255."""


def file_name(url: str) -> str:
    """Return a name that is safe on every file system, and the same for this URL only.

    A readable part, and a hash of the whole URL, since different URLs can look the same once what
    no file name may hold is gone, or on a file system that does not tell ``a`` from ``A``.
    """
    address = url.partition("://")[2].partition("#")[0].partition("?")[0]
    found = re.search(r"/[^/]*[^/.](\.[A-Za-z0-9]{1,8})$", address)
    suffix = found[1] if found else ""
    readable = re.sub(r"[^A-Za-z0-9.]+", "_", address.removesuffix(suffix))
    digest = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{readable[:MAX_READABLE].strip('._') or 'url'}-{digest}{suffix}"


@asynccontextmanager
async def saved_whole(
    path: trio.Path, number: int
) -> AsyncGenerator[Callable[[bytes], Awaitable[Any]]]:
    """Yield a function that writes a chunk; put the file in place when the block succeeds.

    Until then it has another name in the same directory, so that renaming it is atomic. That name
    holds *number* and the process: the same URL may be on its way twice. If the block fails, or is
    cancelled, nothing is left of it.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}-{number}.part")
    try:
        async with await part.open("wb") as file:
            yield file.write
        await part.replace(path)
    except BaseException:
        with trio.CancelScope(shield=True):
            await part.unlink(missing_ok=True)
        raise
