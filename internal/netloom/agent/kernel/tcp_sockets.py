"""The TCP sockets of a namespace: reset its connections (sock_diag).

Message layout: linux/inet_diag.h. Ports and addresses are in network byte order, other numbers in the host's.
"""

from __future__ import annotations

import errno
import socket
import struct

from netloom.agent.kernel.netlink import Message, NetlinkError, Socket

_NETLINK_SOCK_DIAG = 4
_BY_FAMILY, _DESTROY = 20, 21
_ID_BYTES = 48  # inet_diag_sockid: ports, addresses, link, cookie
_REQUEST = struct.Struct(f"=BBBxI{_ID_BYTES}s")  # inet_diag_req_v2: family, protocol, extensions, states, id
_ID_AT = 4  # in an inet_diag_msg, after family, state, timer and retransmissions

# States of linux/tcp_states.h in which the other end has a connection: ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT.
_CONNECTED = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8


def reset_connections(namespace: str | None) -> int:
    """Reset all TCP connections of sockets in a namespace; returns their number. Listening sockets stay.

    Both the process and the other end get an error at once. A kernel without CONFIG_INET_DIAG_DESTROY resets none.
    Raises NamespaceError, NetlinkError.
    """
    count = 0
    with Socket(_NETLINK_SOCK_DIAG, namespace) as diag:
        for family in (socket.AF_INET, socket.AF_INET6):
            everything = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, _CONNECTED, bytes(_ID_BYTES))
            # ENOENT: the module tcp_diag is missing.
            listing = Message(_BY_FAMILY, payload=everything, what="list TCP sockets").even_if(errno.ENOENT)
            found = [payload for kind, payload in diag.dump(listing) if kind == _BY_FAMILY]
            requests = [reset_request(family, payload) for payload in found]
            for request, answer in zip(requests, diag.exchange(requests), strict=True):
                if answer.errno not in (0, errno.ENOENT, errno.EOPNOTSUPP):
                    raise NetlinkError(answer.errno, request.what, answer.ext_ack)
                count += answer.errno == 0
    return count


def reset_request(family: int, listed: bytes) -> Message:
    """The request for a socket as the kernel lists it. Raises NetlinkError (EBADMSG)."""
    identity = listed[_ID_AT : _ID_AT + _ID_BYTES]
    if len(identity) != _ID_BYTES:
        raise NetlinkError(errno.EBADMSG, "TCP socket", "cut short")
    payload = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, identity)
    return Message(_DESTROY, payload=payload, what="reset a TCP connection")
