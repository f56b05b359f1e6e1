"""One HTTP connection to the metadata or the password server, as a VM has it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable

from netloom.guest import http, limits

_ENDS_WITHIN_S = 60.0


async def converse(pieces: Iterable[bytes], site: http.Site) -> bytes:
    """Send the pieces and no more; the bytes that the server answers. TimeoutError if it does not end then."""
    loop = asyncio.get_running_loop()
    ours, theirs = socket.socketpair()
    ended = asyncio.Event()
    ours.setblocking(False)
    theirs.setblocking(False)
    http.HttpConnection(loop, ours, site, lambda _: ended.set(), limits.Unread())
    said = b""
    with theirs, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for piece in pieces:
            await loop.sock_sendall(theirs, piece)
            await asyncio.sleep(0)
        theirs.shutdown(socket.SHUT_WR)
        while more := await loop.sock_recv(theirs, 65536):
            said += more
    await asyncio.wait_for(ended.wait(), _ENDS_WITHIN_S)
    return said
