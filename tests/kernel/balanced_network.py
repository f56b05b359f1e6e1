"""Balanced rules of network 204: clients on the public VLAN, servers in VMs that send their name."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

from kernel.agent_host import AgentHost, done

ADDRESS = "203.0.113.21"
CLIENT = "203.0.113.1"


def admit(host: AgentHost, *sources: str) -> None:
    """Allow every port of the balanced address from these sources."""
    rules = [
        {"id": at, "type": "ingress", "protocol": protocol, "portStart": 1, "portEnd": 65535, "publicIp": ADDRESS}
        | {"sourceCidrs": list(sources), "destCidrs": []}
        for at, protocol in enumerate(("tcp", "udp"))
        if sources
    ]
    done(host.call("070", "apply-fw-rules", fw_rules={"default_egress_allow": True, "rules": rules}))


def rule(number: int, port: int, *backends: str, name: str = "", **more: object) -> dict[str, object]:
    told = {"id": number, "name": name or f"rule {number}", "publicIp": ADDRESS, "publicPort": port, "privatePort": 80}
    behind = [{"ip": ip, "port": 80, "revoked": False} for ip in backends]
    return {**told, "protocol": "tcp", "algorithm": "roundrobin", "revoke": False, "backends": behind, **more}


@contextlib.contextmanager
def name_servers(host: AgentHost, *vms: str, port: int = 80) -> Iterator[list[bytes]]:
    """Listeners in the VMs that send the VM's name, then echo. Yields the first data of each client."""
    heard: list[bytes] = []
    listeners = []
    for vm in vms:
        with host.within(vm):
            listeners.append(socket.create_server(("0.0.0.0", port)))
        threading.Thread(target=_serve, args=(listeners[-1], vm, heard), daemon=True).start()
    try:
        yield heard
    finally:
        for listener in listeners:
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


def _serve(listener: socket.socket, vm: str, heard: list[bytes]) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_echo, args=(client, vm, heard), daemon=True).start()


def _echo(client: socket.socket, vm: str, heard: list[bytes]) -> None:
    with client, contextlib.suppress(OSError):  # a health check disconnects at once
        client.sendall(vm.encode())
        said = client.recv(1000)
        if said:
            heard.append(said)
        while said:
            client.sendall(said)
            said = client.recv(1000)


def connect(host: AgentHost, port: int, timeout_s: float = 20.0, source: str = "") -> socket.socket:
    with host.within():
        return socket.create_connection((ADDRESS, port), timeout_s, (source, 0) if source else None)


def answering_vm(host: AgentHost, port: int, timeout_s: float = 20.0) -> str:
    """The name of the VM that answers on a balanced port, ``closed``, or the name of the exception."""
    try:
        with connect(host, port, timeout_s) as client:
            return client.recv(100).decode() or "closed"
    except OSError as error:
        return type(error).__name__


def is_echoed(client: socket.socket) -> bool:
    try:
        client.sendall(b"still here")
        return client.recv(100) == b"still here"
    except OSError:
        return False
