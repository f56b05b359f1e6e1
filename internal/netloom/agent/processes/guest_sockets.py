"""The listening sockets of a network's guest services, opened inside its namespace.

The agent opens them and passes them to the guest process, which cannot enter a namespace.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Sequence

from netloom.agent.kernel import namespaces
from netloom.agent.kernel.descriptors import high_socket
from netloom.errors import HostRefused
from netloom.guestwire import GuestNetwork, Listener, ListenerKind
from netloom.names import guest_link

# The sockets of a network, in the order in which they are passed.
LISTENERS: tuple[Listener, ...] = (Listener("dhcp"), Listener("metadata"), Listener("password"))

_PORTS: dict[ListenerKind, int] = {"dhcp": 67, "metadata": 80, "password": 8080}
_METADATA = 1  # index in LISTENERS

# Places for connections that are not complete yet. When none is left, the kernel sends SYN cookies, and such a
# connection has no first packet that proves its MAC address. ``render.senders`` limits what one VM can use. The kernel
# limits the value to net.core.somaxconn, which is 4096 in a new namespace.
_BACKLOG = 4096

_SO_BINDTOIFINDEX = 62  # asm-generic/socket.h: the index of the link that SO_BINDTODEVICE names
_IP_FREEBIND = 15  # linux/in.h: bind to an address that the link may get later
_SIOCGSKNS = 0x894C  # linux/sockios.h: a descriptor of the socket's network namespace


def open_sockets(namespace: str, table: GuestNetwork) -> list[socket.socket]:
    """Open the sockets of ``LISTENERS`` on the network's guest link.

    Raises HostRefused, for example when another process in the namespace uses a port. Changes the namespace of the
    calling thread meanwhile.
    """
    opened: list[socket.socket] = []
    link = guest_link(table.network_id).encode()
    try:
        with namespaces.inside(namespace):
            for listener in LISTENERS:
                datagrams = listener.kind == "dhcp"
                sock = high_socket(
                    socket.socket(socket.AF_INET, socket.SOCK_DGRAM if datagrams else socket.SOCK_STREAM)
                )
                opened.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, link)
                if datagrams:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
                    sock.bind(("0.0.0.0", _PORTS[listener.kind]))
                else:
                    sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
                    sock.bind((table.server_ip, _PORTS[listener.kind]))
                    sock.listen(_BACKLOG)
    except OSError as error:
        for sock in opened:
            sock.close()
        raise HostRefused(f"the guest services of network {table.network_id}: {error.strerror}") from error
    return opened


def lengthen_queues(sockets: Sequence[socket.socket]) -> None:
    """Give open sockets of ``LISTENERS`` the queue of new ones: an agent of an earlier version opened them shorter."""
    for listener, sock in zip(LISTENERS, sockets, strict=True):
        if listener.kind != "dhcp":
            sock.listen(_BACKLOG)


def usable(sockets: Sequence[socket.socket], namespace: str, table: GuestNetwork) -> bool:
    """Whether the open sockets are on the right link, in the right namespace, and have the right address.

    If the namespace or the link was deleted and created again under its name, they receive nothing any more.
    """
    if not sockets:
        return False
    sock = sockets[_METADATA]  # the DHCP socket has no address
    link = _link_index(namespace, table.network_id)
    place = (namespaces.identity(namespace), link, table.server_ip)
    return (_namespace_of(sock), sock.getsockopt(socket.SOL_SOCKET, _SO_BINDTOIFINDEX), sock.getsockname()[0]) == place


def _link_index(namespace: str, network_id: str) -> int:
    """The index of the network's guest link; 0 when it does not exist."""
    with namespaces.inside(namespace):
        try:
            return socket.if_nametoindex(guest_link(network_id))
        except OSError:
            return 0


def _namespace_of(sock: socket.socket) -> int:
    """The inode of the network namespace of the socket; 0 when the kernel does not tell."""
    try:
        descriptor = fcntl.ioctl(sock.fileno(), _SIOCGSKNS)
    except OSError:
        return 0
    try:
        return os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)
