"""TCP servers in a VM or outside that speak first, and clients that read what they say."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from kernel.agent_host import AgentHost


@contextlib.contextmanager
def serving(host: AgentHost, namespace: str, port: int, talk: Callable[[socket.socket], None]) -> Iterator[None]:
    """A server for IPv4 and IPv6 in a VM's namespace, or in the fabric. ``talk`` gets each connection in a thread."""
    with host.within(namespace):
        server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)

    def attend(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            talk(client)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=attend, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


def tell_address(client: socket.socket) -> None:
    """Tell the client its address, as the server sees it."""
    client.sendall(client.getpeername()[0].removeprefix("::ffff:").encode())


def connected(
    host: AgentHost, address: str, port: int, namespace: str = "", source: str = "", patience_s: float = 20.0
) -> socket.socket:
    """A connection from a VM's namespace, or from the fabric. Raises OSError if it is not open in ``patience_s``."""
    with host.within(namespace):
        return socket.create_connection((address, port), patience_s, (source, 0) if source else None)


def greeted(
    host: AgentHost, address: str, port: int, namespace: str = "", source: str = "", patience_s: float = 20.0
) -> str:
    """What the server says first on a new connection; the name of the error if there is none."""
    try:
        with connected(host, address, port, namespace, source, patience_s) as client:
            return client.recv(100).decode()
    except OSError as error:
        return type(error).__name__
