"""The agent, which also writes down each change that it makes to the kernel, for replay.py to make it again.

    RECORD=FILE recorded_agent.py agent serve --log FILE

It restores one scope at a time, so that the kernel gives each link the same index at the replay.
"""

from __future__ import annotations

import os
import pickle
import struct
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "internal")]

from netloom.agent.kernel import namespaces, netlink, nft, sysctl  # noqa: E402
from netloom.agent.scopes import upkeep  # noqa: E402
from netloom.entry import main  # noqa: E402

# The agent starts the guest process by the same program and without the variable.
_file = open(os.environ.get("RECORD", os.devnull), "ab", buffering=0)  # noqa: SIM115, open until the process ends
_turn = threading.Lock()
_namespaces: weakref.WeakKeyDictionary[netlink.Socket, tuple[int, str]] = weakref.WeakKeyDictionary()


def record(kind: str, *values: object) -> None:
    with _turn:
        _file.write(pickle.dumps((kind, *values)))


def is_change(protocol: int, datagram: bytes) -> bool:
    """Whether the datagram changes links, addresses, routes or rules, or is a transaction of nftables."""
    (kind,) = struct.unpack_from("=H", datagram, 4)
    if protocol == netlink.NETLINK_NETFILTER:
        return bool(kind == netlink.NLMSG_NOOP + 15)  # NFNL_MSG_BATCH_BEGIN
    return protocol == netlink.NETLINK_ROUTE and kind & 3 != 2


original_create, original_descriptor = namespaces.create, namespaces.descriptor
original_init, original_send = netlink.Socket.__init__, netlink.Socket._send
original_run, original_write = nft.Nft.run, sysctl.write


def create(name: str) -> None:
    original_create(name)
    record("namespace", name)


@contextmanager
def descriptor(namespace: str) -> Iterator[int]:
    with original_descriptor(namespace) as fd:
        record("open", namespace, fd)
        yield fd


def init(self: netlink.Socket, protocol: int, namespace: str | None = None, *, port: int = 0) -> None:
    original_init(self, protocol, namespace, port=port)
    _namespaces[self] = protocol, namespace or ""


def send(self: netlink.Socket, datagram: bytes) -> None:
    protocol, namespace = _namespaces[self]
    if is_change(protocol, datagram):
        record("send", protocol, namespace, datagram)
    original_send(self, datagram)


def run(self: nft.Nft, script: str) -> None:
    record("nft", self.namespace or "", script)
    original_run(self, script)


def write(namespace: str | None, values: Mapping[str, str]) -> None:
    record("sysctl", namespace or "", {sysctl.path(name): value for name, value in values.items()})
    original_write(namespace, values)


if __name__ == "__main__":
    namespaces.create, namespaces.descriptor, sysctl.write = create, descriptor, write
    netlink.Socket.__init__, netlink.Socket._send = init, send  # type: ignore[method-assign]
    nft.Nft.run = run  # type: ignore[method-assign]
    upkeep.RESTORING_AT_ONCE = 1
    sys.exit(main(sys.argv))
