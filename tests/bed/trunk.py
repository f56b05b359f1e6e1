"""A VLAN switch in user space between emulated hosts and the bridges of the bed.

Each NIC of an emulated host is a *trunk*: a datagram socket on which QEMU sends and receives whole Ethernet frames,
with their 802.1Q tags. Each segment of the bed that such hosts should reach is an *access port*: a TAP device in a
bridge of the bed's switch, without tags. This kernel need not know 802.1Q; the kernels of the hosts do it all.

The path of a trunk's socket is ``<directory>/<host>.<nic>``; that of the switch is ``<directory>/<nic>``. The NIC
``eth0`` is the management network.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import struct
from collections import Counter

from bed.probes import Control

FRAME_BYTES_MAX = 1 << 16
UNTAGGED = 0
# linux/if_tun.h
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_VLAN = b"\x81\x00"  # the EtherType of an 802.1Q tag
_GROUP = 1  # the bit of a MAC address that marks group addresses


class Switch:
    """The ports of one NIC name (``eth1``) of all hosts. Only its own thread reads from the ports."""

    def __init__(self, directory: str, nic: str) -> None:
        self.nic = nic
        self.trunks = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.trunks.bind(f"{directory}/{nic}")
        self.trunks.setblocking(False)
        self.access: dict[int, int] = {}  # the descriptor of the TAP device by tag
        self.seen: Counter[tuple[str, int]] = Counter()  # frames from a trunk, by its host and the tag
        self._paths: set[str] = set()  # every trunk from which a frame has come
        self._learned: dict[tuple[int, bytes], str | int] = {}  # the port behind which a MAC address is, by tag

    def from_trunk(self) -> None:
        frame, path = self.trunks.recvfrom(FRAME_BYTES_MAX)
        if not path:
            return
        self._paths.add(path)
        tag, inner = UNTAGGED, frame
        if frame[12:14] == _VLAN:
            tag, inner = struct.unpack_from("!H", frame, 14)[0] & 0xFFF, frame[:12] + frame[16:]
        self.seen[os.path.basename(path).partition(".")[0], tag] += 1
        self._forward(path, tag, inner)

    def from_access(self, tag: int) -> None:
        self._forward(tag, tag, os.read(self.access[tag], FRAME_BYTES_MAX))

    def _forward(self, source: str | int, tag: int, inner: bytes) -> None:
        self._learned[tag, inner[6:12]] = source
        known = None if inner[0] & _GROUP else self._learned.get((tag, inner[:6]))
        targets: list[str | int] = (
            [known] if known is not None else [*self._paths, *([tag] if tag in self.access else [])]
        )
        for target in targets:
            if target == source:
                continue
            # A host that is switched off, or has no room: the frame is lost, as on a wire.
            with contextlib.suppress(OSError):
                if isinstance(target, int):
                    os.write(self.access[target], inner)
                else:
                    vlan = _VLAN + struct.pack("!H", tag) if tag else b""
                    self.trunks.sendto(inner[:12] + vlan + inner[12:], target)


_switches: dict[str, Switch] = {}
_wakers: list[int] = []  # a byte makes the switch look for new ports


def switch_trunks(stop: Control, *, directory: str, nics: list[str]) -> None:
    """Switch frames until stopped. Ready when QEMU may start."""
    woken_read, woken_write = os.pipe()
    _wakers.append(woken_write)
    for nic in nics:
        _switches[nic] = Switch(directory, nic)
    stop.ready()
    while not stop.is_set():
        ports: dict[int, tuple[Switch, int | None]] = {}
        for switch in _switches.values():
            ports[switch.trunks.fileno()] = switch, None
            ports.update({descriptor: (switch, tag) for tag, descriptor in list(switch.access.items())})
        poll = select.epoll()
        for descriptor in (*ports, woken_read):
            poll.register(descriptor, select.EPOLLIN)
        added = False
        while not added and not stop.is_set():
            for descriptor, _ in poll.poll(0.5):
                if descriptor == woken_read:
                    os.read(woken_read, 1)
                    added = True
                    continue
                switch, tag = ports[descriptor]
                with contextlib.suppress(BlockingIOError):
                    if tag is None:
                        switch.from_trunk()
                    else:
                        switch.from_access(tag)
        poll.close()


def add_access(stop: Control, *, nic: str, tag: int, link: str) -> None:
    """Make the TAP device ``link``, the access port of a VLAN; tag 0 is for frames without a tag. Raises OSError."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", link.encode(), _IFF_TAP | _IFF_NO_PI))
    _switches[nic].access[tag] = tap
    for waker in _wakers:
        os.write(waker, b"x")


def frames_seen(stop: Control, *, nic: str) -> dict[str, dict[str, int]]:
    """How many frames each host has sent on a NIC so far, by host and tag."""
    found: dict[str, dict[str, int]] = {}
    for (host, tag), count in list(_switches[nic].seen.items()):
        found.setdefault(host, {})[str(tag)] = count
    return found
