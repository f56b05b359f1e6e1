"""Both ends of an FTP control connection (RFC 959, RFC 2428), and what the device's conntrack helpers expect."""

from __future__ import annotations

import re
import socket
from typing import Literal

from kernel.ruleset_lab import PATIENCE_S, Lab, run


class Control:
    """The two ends of an FTP control connection. Each says what the test wants; the helper reads it."""

    def __init__(self, lab: Lab, client: str, server: str, target: tuple[str, int], bound: tuple[str, int]) -> None:
        with lab.open_socket(server, socket.SOCK_STREAM, 0, target[0]) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(bound)
            listener.listen(1)
            listener.settimeout(PATIENCE_S)
            self.client = lab.open_socket(client, socket.SOCK_STREAM, 0, target[0])
            self.client.settimeout(PATIENCE_S)
            self.client.connect(target)
            self.server, _ = listener.accept()
            self.server.settimeout(PATIENCE_S)
        self.ask("USER x", "331 who?")

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.server.close()

    def ask(self, command: str, reply: str) -> tuple[str, str]:
        """The command as the server got it, and the reply as the client got it."""
        self.client.sendall(f"{command}\r\n".encode())
        heard = self.server.recv(200).decode().strip()
        self.server.sendall(f"{reply}\r\n".encode())
        return heard, self.client.recv(200).decode().strip()


def numbers(address: str, port: int) -> str:
    return f"{address.replace('.', ',')},{port >> 8},{port & 255}"


def expectations(lab: Lab, ip: Literal[4, 6] = 4) -> list[tuple[str, str, str]]:
    """The announced connections that have not been opened: source, destination, destination port."""
    listed = run("ip", "netns", "exec", lab.ns("dev"), "conntrack", "-L", "expect", "-f", f"ipv{ip}")
    return re.findall(r"src=(\S+) dst=(\S+) .*? dport=(\d+) mask", listed)
