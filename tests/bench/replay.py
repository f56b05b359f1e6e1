"""Make the changes that recorded_agent.py wrote down again, in a bare loop; print the seconds and what was refused.

    replay.py FILE

Each netlink datagram is sent as it was, and its answer awaited. Rulesets go through the same library.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import socket
import struct
import sys
import time
from typing import Any

NETNS = "/run/netns"
CLONE_NEWNET = 0x40000000
NLM_F_ACK, NLMSG_ERROR = 4, 2
_libc = ctypes.CDLL(None, use_errno=True)


class Loop:
    """The sockets and library contexts of all namespaces, by name; empty: the host's."""

    def __init__(self) -> None:
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        self._netns: dict[str, int] = {"": self._home}
        self._sockets: dict[tuple[int, str], socket.socket] = {}
        self._nft = ctypes.CDLL("libnftables.so.1")
        self._nft.nft_ctx_new.restype = ctypes.c_void_p
        self._contexts: dict[str, int] = {}
        self.refused = 0

    def enter(self, namespace: str) -> None:
        if namespace not in self._netns:
            self._netns[namespace] = os.open(f"{NETNS}/{namespace}", os.O_RDONLY)
        if _libc.setns(self._netns[namespace], CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), namespace)

    def namespace(self, name: str) -> None:
        path = f"{NETNS}/{name}"
        if os.path.exists(path):
            return
        os.close(os.open(path, os.O_CREAT | os.O_RDONLY, 0o444))
        if _libc.unshare(CLONE_NEWNET) or _libc.mount(b"/proc/thread-self/ns/net", path.encode(), b"", 0x1000, None):
            raise OSError(ctypes.get_errno(), name)

    def open(self, name: str, fd: int) -> None:
        """Have the namespace at the number that the datagrams name."""
        opened = os.open(f"{NETNS}/{name}", os.O_RDONLY)
        os.dup2(opened, fd)
        if opened != fd:
            os.close(opened)

    def send(self, protocol: int, namespace: str, datagram: bytes) -> None:
        key = (protocol, namespace)
        if key not in self._sockets:
            self.enter(namespace)
            made = self._sockets[key] = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
            made.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE
            made.settimeout(10)
        self._sockets[key].sendto(datagram, (0, 0))
        at, last = 0, 0
        while at < len(datagram):
            length, _, flags, sequence, _ = struct.unpack_from("=IHHII", datagram, at)
            last = sequence if flags & NLM_F_ACK else last
            at += (length + 3) & ~3
        while last and not self._answered(self._sockets[key].recv(1 << 18), last):
            pass

    def _answered(self, data: bytes, last: int) -> bool:
        at, found = 0, False
        while at < len(data):
            length, kind, _, sequence, _ = struct.unpack_from("=IHHII", data, at)
            if kind == NLMSG_ERROR:
                self.refused += struct.unpack_from("=i", data, at + 16)[0] != 0
                found = found or sequence == last
            at += (length + 3) & ~3
        return found

    def nft(self, namespace: str, script: str) -> None:
        self.enter(namespace)
        if namespace not in self._contexts:
            context = self._contexts[namespace] = self._nft.nft_ctx_new(0)
            self._nft.nft_ctx_buffer_error(ctypes.c_void_p(context))
        context = ctypes.c_void_p(self._contexts[namespace])
        self.refused += self._nft.nft_run_cmd_from_buffer(context, script.encode()) != 0

    def sysctl(self, namespace: str, values: dict[str, str]) -> None:
        self.enter(namespace)
        for path, value in values.items():
            try:
                fd = os.open(path, os.O_WRONLY)
                os.write(fd, value.encode() + b"\n")
                os.close(fd)
            except OSError:
                self.refused += 1


def main(path: str) -> None:
    """Read all records first, so that only the changes are timed."""
    records: list[tuple[Any, ...]] = []
    with open(path, "rb") as file:
        try:
            while True:
                records.append(pickle.load(file))
        except EOFError:
            pass
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # The numbers that the datagrams name are not for the descriptors of this loop.
    top = max((values[1] for kind, *values in records if kind == "open"), default=0)
    while os.open("/dev/null", os.O_RDONLY) < top:
        pass
    loop = Loop()
    began = time.perf_counter()
    for kind, *values in records:
        getattr(loop, kind)(*values)
    took = time.perf_counter() - began
    sys.stdout.write(f"{took} {loop.refused} {len(records)}\n")


if __name__ == "__main__":
    main(sys.argv[1])
