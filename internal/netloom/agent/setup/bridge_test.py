"""Send packets through a bridge of the host itself, where the host's own firewall may drop them.

The rest of the selftest runs in namespaces of its own and does not meet that firewall. Here a bridge is created in the
namespace of the host, with two ports whose other ends are in a child process's namespace. The child sends from one to
the other. Its namespace, and so the ports, end with it. Another child deletes the bridge when this process ends in any
way, even by SIGKILL.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

from netloom.agent.host.bridged_frames import TEST_ALIAS, BridgedFrames, Plan
from netloom.agent.kernel import links, namespaces, sysctl
from netloom.errors import HostRefused, NetloomError

_FORWARDS_S_MAX = 10.0  # until the ports of the bridge forward
_PACKET_S_MAX = 1.0
_AGAIN_S = 0.1
_REPORT_S_MAX = 20.0
_NAME = "nltest"
_TYPES = {"any": 0x88B5, "IPv4": 0x0800, "IPv6": 0x86DD}  # 0x88b5: for experiments, IEEE 802; no IP firewall sees it
_MARK = b"netloom selftest"
_FROM, _TO = "02:00:00:00:00:45", "02:00:00:00:00:46"


class Result(NamedTuple):
    """``dropped``: the protocols whose packets do not pass a bridge of ours. ``says``: what drops them, or did."""

    dropped: tuple[str, ...]
    says: str
    remedy: str


def run() -> Result:
    """Send packets; if some are dropped, do what the agent does about it, and send again. Leaves nothing behind.

    Raises HostRefused when the test cannot be made.
    """
    frames = BridgedFrames()
    with _bridge() as bridge:
        dropped = _send(bridge)
        if not dropped:
            return Result((), "", "")
        plan = frames.examine()
        try:
            frames.let_through()
            still = _send(bridge)
        except NetloomError as error:
            still, plan = dropped, Plan(dropped_at=(*plan.dropped_at, error.message), blocked=plan.blocked)
    with contextlib.suppress(NetloomError):
        frames.let_through()  # without this bridge
    where = "; ".join(plan.dropped_at) or "no rule or policy that netloom knows: look for ebtables or another filter"
    if not still and not plan.dropped_at:
        return Result((), "", "")  # the first packets were late
    if not still:
        return Result((), f"dropped by {where}; netloom accepts the frames of its own bridges there", "")
    remedies = dict.fromkeys(it.remedy.replace(it.bridge, "<bridge>") for it in plan.blocked)
    remedy = "; ".join(remedies) or "let its owner accept what is bridged, for each bridge of a network"
    return Result(still, f"{' and '.join(still)} on bridges is dropped: {where}", remedy)


@contextlib.contextmanager
def _bridge() -> Iterator[str]:
    name = f"{_NAME}{os.getpid()}"[:15]
    _delete_leftovers()
    alive, end = os.pipe()
    cleaner = os.fork()
    if not cleaner:
        os.close(end)
        _delete_at_end(alive, name)
    os.close(alive)
    try:
        links.change(None, [links.make_bridge(name, alias=TEST_ALIAS)])
        with contextlib.suppress(HostRefused):  # a kernel without IPv6
            sysctl.write(None, {f"net/ipv6/conf/{name}/disable_ipv6": "1"})
        links.change(None, [links.set_up(name)])
        yield name
    finally:
        os.close(end)
        os.waitpid(cleaner, 0)


def _delete_at_end(alive: int, name: str) -> None:
    """In a child process: wait until the other end of ``alive`` is closed, then delete the bridge."""
    try:
        os.setsid()
        for it in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(it, signal.SIG_IGN)
        os.read(alive, 1)
        links.change(None, [links.delete_link(name).even_if_gone()])
        BridgedFrames().let_through()
    finally:
        os._exit(0)


def _delete_leftovers() -> None:
    """Delete the bridges of tests whose processes were all killed."""
    for it in links.list_links(None):
        pid = it.name.removeprefix(_NAME)
        if it.alias == TEST_ALIAS and pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            links.change(None, [links.delete_link(it.name).even_if_gone()])


def _send(bridge: str) -> tuple[str, ...]:
    """The protocols that do not pass the bridge. Raises HostRefused when no frame passes."""
    ports = (f"{bridge}a"[-15:], "one", _FROM), (f"{bridge}b"[-15:], "two", _TO)
    ready_read, ready_write = os.pipe()
    go_read, go_write = os.pipe()
    child = os.fork()
    if not child:
        os.close(ready_read)
        os.close(go_write)
        _sender(ready_write, go_read)
    os.close(ready_write)
    os.close(go_read)
    try:
        if _read(ready_read) != b"ready\n":
            raise HostRefused("no namespace for the sender")
        netns = os.open(f"/proc/{child}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for port, end, mac in ports:
                made = links.make_veth(port, bridge, end, mac, 0, netns, alias=TEST_ALIAS)
                links.change(None, [made, links.set_up(port)])
        finally:
            os.close(netns)
        os.write(go_write, b"go\n")
        passed = _read(ready_read).decode().split()
    finally:
        os.close(ready_read)
        os.close(go_write)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        # The kernel removes the namespace with the other ends later.
        links.change(None, [links.delete_link(port).even_if_gone() for port, _, _ in ports])
    if "any" not in passed:
        raise HostRefused("no frame passes a bridge of this host", hint="look at ebtables and nft's tables for bridges")
    return tuple(it for it in _TYPES if it not in passed)


def _read(fd: int) -> bytes:
    return os.read(fd, 4096) if select.select([fd], [], [], _REPORT_S_MAX)[0] else b""


def _sender(report: int, go: int) -> None:
    """In a child process: send through the two ends and report the names of what arrived."""
    try:
        namespaces.enter_scratch()
        os.write(report, b"ready\n")
        if os.read(go, 16):
            links.change(None, [links.set_up("one"), links.set_up("two")])
            passed = _passed(("any",), _FORWARDS_S_MAX)
            passed += _passed(("IPv4", "IPv6"), _PACKET_S_MAX) if passed else []
            os.write(report, " ".join([*passed, "end"]).encode())
    finally:
        os._exit(0)


def _passed(names: tuple[str, ...], seconds: float) -> list[str]:
    """Send frames of each protocol until all have arrived, or the time is over; the names of those that arrived."""
    passed: list[str] = []
    with contextlib.ExitStack() as stack:
        senders = {name: stack.enter_context(_packet_socket("one", _TYPES[name])) for name in names}
        receivers = {stack.enter_context(_packet_socket("two", _TYPES[name])): name for name in names}
        until = time.monotonic() + seconds
        while time.monotonic() < until and len(passed) < len(names):
            for name, sender in senders.items():
                with contextlib.suppress(OSError):  # the link is not up yet
                    sender.send(_frame(name))
            for receiver in select.select(list(receivers), [], [], _AGAIN_S)[0]:
                if _MARK in receiver.recv(2048) and receivers[receiver] not in passed:
                    passed.append(receivers[receiver])
    return passed


def _frame(name: str) -> bytes:
    return bytes.fromhex((_TO + _FROM).replace(":", "")) + struct.pack("!H", _TYPES[name]) + _payload(name)


def _packet_socket(link: str, kind: int) -> socket.socket:
    found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(kind))
    found.bind((link, kind))
    return found


def _payload(name: str) -> bytes:
    """A UDP datagram to the port discard between addresses for documentation (RFC 5737, RFC 3849)."""
    if name == "any":
        return _MARK.ljust(46, b"\0")
    length = 8 + len(_MARK)
    if name == "IPv6":
        ends = socket.inet_pton(socket.AF_INET6, "2001:db8::45") + socket.inet_pton(socket.AF_INET6, "2001:db8::46")
        total = _sum(ends + struct.pack("!II", length, 17) + struct.pack("!HHH", 9, 9, length) + _MARK)
        return struct.pack("!IHBB", 6 << 28, length, 17, 64) + ends + struct.pack("!HHHH", 9, 9, length, total) + _MARK
    ends = socket.inet_aton("192.0.2.45") + socket.inet_aton("192.0.2.46")
    head = struct.pack("!BBHHHBB", 0x45, 0, 20 + length, 1, 0, 64, 17)
    head += struct.pack("!H", _sum(head + ends)) + ends
    return head + struct.pack("!HHHH", 9, 9, length, 0) + _MARK  # without a checksum (RFC 768)


def _sum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF or 0xFFFF
