"""Unix sockets: the credentials of the process at the other end."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("3i")  # struct ucred, unix(7)


class PeerCredentials(NamedTuple):
    """The process at the other end: pid, effective uid and gid when it called connect(2), or listen(2)."""

    pid: int
    uid: int
    gid: int


def peer_credentials(sock: socket.socket) -> PeerCredentials:
    """The credentials of the other end of a connected Unix stream socket (SO_PEERCRED). Raises OSError."""
    return PeerCredentials(*_UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)))
