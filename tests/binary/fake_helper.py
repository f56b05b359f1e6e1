"""A helper for the tests of its clients: it reads requests, and sends what the test says."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from pathlib import Path
from typing import NamedTuple

from netloom.extension.helper_client import ANSWER, BEAT, DOING, pack, unpack


def answer(status: int, output: bytes = b"", error: bytes = b"") -> bytes:
    return pack(ANSWER, str(status).encode(), output, error)


def doing(what: str) -> bytes:
    return pack(DOING, what.encode())


class Reply(NamedTuple):
    """What one connection gets once its request has arrived."""

    data: bytes = b""
    piece_bytes: int = 1 << 20  # sent by one send(2)
    pause_s: float = 0.0  # before the first byte
    waits: bool = False  # keeps the connection open
    beats: bool = False  # and sends heartbeats
    deaf: bool = False  # does not read the request


class FakeHelper:
    """Listens at ``path``. The first connection gets the first of ``replies``, and so on; more get the last one."""

    def __init__(self, path: Path, *replies: Reply, uid: int = 0) -> None:
        self.path = path
        self.requests: list[list[bytes]] = []
        self._replies = replies
        self._over = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        os.seteuid(uid)  # the peer sees the user who called listen(2)
        try:
            self._listener.listen(100)
        finally:
            os.seteuid(0)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        threads = []
        number = 0
        self._listener.settimeout(0.05)
        while not self._over.is_set():
            with contextlib.suppress(TimeoutError):
                peer, _ = self._listener.accept()
                peer.settimeout(10)
                reply = self._replies[min(number, len(self._replies) - 1)]
                threads.append(threading.Thread(target=self._serve, args=(peer, reply)))
                threads[-1].start()
                number += 1
        for thread in threads:
            thread.join()

    def _serve(self, peer: socket.socket, reply: Reply) -> None:
        with peer, contextlib.suppress(OSError):
            if not reply.deaf:
                with peer.makefile("rb") as stream:
                    head = stream.read(4)
                    if not head:  # the client has left without a request
                        return
                    self.requests.append(unpack(stream.read(int.from_bytes(head, "big"))))
            time.sleep(reply.pause_s)
            for at in range(0, len(reply.data), reply.piece_bytes):
                peer.sendall(reply.data[at : at + reply.piece_bytes])
            while reply.waits and not self._over.wait(0.3):
                if reply.beats:
                    peer.sendall(pack(BEAT))

    def stop(self) -> None:
        """Close all connections. The file of the socket stays."""
        self._over.set()
        self._thread.join()
        self._listener.close()

    def close(self) -> None:
        self.stop()
        self.path.unlink(missing_ok=True)
