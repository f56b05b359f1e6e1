"""Ask with ARP probes who owns an address on a link, and take nothing from the answer but the MAC address.

A probe (RFC 5227 section 2.1.1) has the sender address 0.0.0.0, so it changes no neighbour's table. Its sender is the
MAC address of the link itself: no switch learns the address of another port from it.

The padding of the frame says that the probe is one of netloom, and how strong its claim is: of two hosts that ask at
the same moment, only the one with the weaker claim hears of the other. Probes of anybody else say nothing: a VM that
checks its address sends them, too, and whoever wants to see who owns an address.

The answers are read by a packet socket for all protocols, which gets the frames of a link before a bridge takes them.
What this host sends itself, its VMs included, is left out.
"""

from __future__ import annotations

import ipaddress
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple, Self

import msgspec

from netloom.agent.kernel.arp import BROADCAST, ETHERTYPE_ARP, FRAME, REPLY, REQUEST
from netloom.agent.kernel.multicast import Filter
from netloom.agent.kernel.packet_socket import PACKET_OUTGOING, open_packet_socket
from netloom.agent.kernel.rtnetlink import mac_text

_ETHERTYPE_VLAN = 0x8100
_VLAN_TAG = 0xFFFFF000 + 44  # SKF_AD_OFF + SKF_AD_VLAN_TAG, linux/filter.h: the tag that is not in the frame any more
_RECEIVE_BYTES = 1 << 20  # a broadcast storm must not displace the answers
_FRAME_BYTES_MAX = 256  # what follows an ARP message is padding
_PROBES = 3
_ETHERNET, _IPV4 = (1, 6), (0x0800, 4)  # type and length of addresses
_NOBODY = bytes(4)
_MAGIC = b"netloom"
CLAIM_BYTES = 11  # with the magic, the padding of the shortest Ethernet frame: 60 bytes without the checksum


class Wire(NamedTuple):
    """A link of the host, and the VLAN tag that the frames of a segment have there; 0: they have none."""

    link: str
    tag: int = 0


class Heard(msgspec.Struct, frozen=True):
    """Who was heard on one link, by address: ``owners`` use the address, ``probing`` ask with a stronger claim.

    ``failed``: why the link could not be asked until the end; then an address without an owner is not known to be free.
    """

    owners: dict[str, str] = {}
    probing: dict[str, str] = {}
    failed: str = ""


def answers(
    link: str, addresses: Iterable[str], *, timeout_s: float, tag: int = 0, claim: bytes = bytes(CLAIM_BYTES)
) -> Heard:
    """Ask on one link, see :func:`ask`."""
    wire = Wire(link, tag)
    return ask({wire: addresses}, timeout_s, claim)[wire]


def ask(asked: Mapping[Wire, Iterable[str]], timeout_s: float, claim: bytes = bytes(CLAIM_BYTES)) -> dict[Wire, Heard]:
    """Send three probes for each IPv4 address out of its link: now, after a third and after two thirds of the time.

    Each ARP message that arrives on the link with one of the addresses as its sender's shows an owner: an answer, a
    request of the owner for another address, and an announcement. Another host's probe with a stronger claim is
    reported apart: that host does not use the address yet, but will unless somebody answers. Two hosts that start at
    the same time hear nothing else of each other. ``claim``: CLAIM_BYTES bytes, compared from the left; the greater is
    stronger.

    Returns when the time is over, or when all addresses have an owner. Blocks, so call it in a worker thread.
    ValueError for an invalid address.
    """
    with ExitStack() as stack:
        probes = {wire: _Probe(wire, addresses, claim) for wire, addresses in asked.items()}
        for it in probes.values():
            stack.callback(it.close)
            it.open()
        begun = time.monotonic()
        for number in range(1, _PROBES + 1):
            for it in probes.values():
                it.send()
            _receive(list(probes.values()), begun + timeout_s * number / _PROBES)
        return {wire: it.heard() for wire, it in probes.items()}


class SignsOfLife:
    """Asks whether machines answer this host, perhaps again and again: sockets stay open until ``close``."""

    def __init__(self) -> None:
        self._probes: dict[tuple[Wire, tuple[str, ...]], _SignOfLife] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._probes:
            self._probes.popitem()[1].close()

    def any_answer(self, asked: Mapping[Wire, Iterable[str]], timeout_s: float) -> bool:
        """Whether a machine with one of these addresses answers this host. Then both directions of its link work.

        Sends probes like :func:`ask`, without a claim. Only replies to the link's own MAC address count: what a machine
        broadcasts by itself shows one direction. Returns with the first answer, or when the time is over. Blocks, so
        call it in a worker thread. ValueError for an invalid address.
        """
        wanted = {(wire, tuple(addresses)) for wire, addresses in asked.items()}
        for gone in self._probes.keys() - wanted:
            self._probes.pop(gone).close()
        for key in wanted:
            if key not in self._probes or not self._probes[key].begin_again():
                self._open(key)
        probes = list(self._probes.values())
        begun = time.monotonic()
        for number in range(1, _PROBES + 1):
            for it in probes:
                it.send()
            if _receive(probes, begun + timeout_s * number / _PROBES, lambda: any(it.has_answer for it in probes)):
                return True
        return False

    def _open(self, key: tuple[Wire, tuple[str, ...]]) -> None:
        if key in self._probes:
            self._probes.pop(key).close()
        self._probes[key] = opened = _SignOfLife(*key)
        opened.open()


def _receive(probes: Sequence[_Probe], until: float, is_enough: Callable[[], bool] = lambda: False) -> bool:
    """Take what arrives until then; whether it is enough."""
    while waiting := {it.fileno(): it for it in probes if it.waits}:
        poll = select.poll()  # not select(), which takes no descriptor above 1,023
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        ready = poll.poll(max(0.0, until - time.monotonic()) * 1000)
        for descriptor, _ in ready:
            waiting[descriptor].receive()
        if is_enough():
            return True
        if not ready and time.monotonic() >= until:
            break
    return False


def _all(tag: int) -> Filter:
    """ARP with this VLAN tag: the kernel has moved it out of the frame. Links of the host share a NIC by their tags."""
    return (
        (0x28, 0, 0, 12),  # ldh [12]
        (0x15, 0, 4, ETHERTYPE_ARP),  # jeq
        *_tagged(tag),
    )


def _replies(tag: int) -> Filter:
    """As ``_all``, but only replies: a socket that stays open need not take the questions of everybody."""
    return (
        (0x28, 0, 0, 12),  # ldh [12]
        (0x15, 0, 6, ETHERTYPE_ARP),  # jeq
        (0x28, 0, 0, 20),  # ldh [20]
        (0x15, 0, 4, REPLY),  # jeq
        *_tagged(tag),
    )


def _tagged(tag: int) -> Filter:
    return (
        (0x20, 0, 0, _VLAN_TAG),  # ld
        (0x54, 0, 0, 0x0FFF),  # and: without the priority; the tag 0 is none
        (0x15, 0, 1, tag),  # guard: probes-hear-their-own-vlan
        (0x06, 0, 0, 0xFFFFFFFF),  # ret: the whole frame
        (0x06, 0, 0, 0),  # ret: nothing
    )


class _Probe:
    """The question on one link. It fails for good with the first error of its socket, for example a link that is down.

    ``waits``: whether an answer could still tell something.
    """

    _filter = staticmethod(_all)

    def __init__(self, wire: Wire, addresses: Iterable[str], claim: bytes) -> None:
        self._wire = wire
        self._claim = claim
        self._addresses = {ipaddress.IPv4Address(it).packed: it for it in addresses}
        self._owners: dict[str, str] = {}
        self._probing: dict[str, str] = {}
        self._failed = ""
        self._mac = b""
        self._socket: socket.socket | None = None

    @property
    def waits(self) -> bool:
        return not self._failed and len(self._owners) < len(self._addresses)

    def open(self) -> None:
        try:
            program = self._filter(self._wire.tag)
            self._socket = open_packet_socket(self._wire.link, program, receive_bytes=_RECEIVE_BYTES)
        except OSError as error:
            self._fail(error)
        else:
            self._look()

    def _look(self) -> None:
        """The MAC address of the link, as it is now; the link may have gone, or have another name."""
        if self._socket is not None and not self._failed:
            name, _, _, _, self._mac = self._socket.getsockname()
            if not self._mac or name != self._wire.link:
                self._failed = f"{self._wire.link} is gone"  # guard: a-link-that-came-back-gets-a-new-socket

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno() if self._socket is not None else -1

    def send(self) -> None:
        """Send a probe for each address that has no owner yet."""
        try:
            for packed, address in self._addresses.items():
                if self._socket is not None and not self._failed and address not in self._owners:
                    self._socket.send(probe(packed, self._mac, self._wire.tag, self._claim))
        except OSError as error:
            self._fail(error)

    def receive(self) -> None:
        """Take what has arrived."""
        assert self._socket is not None
        try:
            while True:
                data, sender = self._socket.recvfrom(_FRAME_BYTES_MAX, socket.MSG_DONTWAIT)
                if sender[2] != PACKET_OUTGOING:  # guard: probes-leave-out-what-we-send
                    self._hear(data)
        except BlockingIOError:
            return
        except OSError as error:
            self._fail(error)

    def heard(self) -> Heard:
        return Heard(self._owners, self._probing, self._failed)

    def _hear(self, data: bytes) -> None:
        message = decoded(data)
        if message is None:
            return
        operation, mac, sender, target = message
        if sender in self._addresses:
            self._owners.setdefault(self._addresses[sender], mac_text(mac))
        elif (
            sender == _NOBODY
            and operation == REQUEST
            and target in self._addresses
            and _claim(data) > self._claim  # guard: the-stronger-claim-goes-first
        ):
            self._probing.setdefault(self._addresses[target], mac_text(mac))

    def _fail(self, error: OSError) -> None:
        self._failed = f"{self._wire.link}: {os.strerror(error.errno or 0)}"


class _SignOfLife(_Probe):
    """The question whether anybody answers."""

    _filter = staticmethod(_replies)

    def __init__(self, wire: Wire, addresses: Iterable[str]) -> None:
        super().__init__(wire, addresses, b"")

    @property
    def has_answer(self) -> bool:
        return bool(self._owners)

    def begin_again(self) -> bool:
        """Forget all that was heard so far; False: the socket is of no use any more."""
        if self._socket is None or self._failed:
            return False
        self.receive()
        self._owners = {}  # guard: late-answers-are-not-those-to-the-next-question
        self._look()
        return not self._failed

    def _hear(self, data: bytes) -> None:
        message = decoded(data)
        if message is None or data[:6] != self._mac:  # guard: what-is-broadcast-is-no-answer
            return
        operation, mac, sender, _ = message
        if operation == REPLY and sender in self._addresses:
            self._owners.setdefault(self._addresses[sender], mac_text(mac))


def probe(address: bytes, mac: bytes, tag: int = 0, claim: bytes = b"") -> bytes:
    """An ARP probe for a packed address, a whole Ethernet frame; with ``claim`` it is one of netloom."""
    plain = FRAME.pack(BROADCAST, mac, ETHERTYPE_ARP, 1, 0x0800, 6, 4, REQUEST, mac, _NOBODY, bytes(6), address)
    plain += _MAGIC + claim if claim else b""
    return plain if not tag else plain[:12] + struct.pack(">HH", _ETHERTYPE_VLAN, tag) + plain[12:]


def _claim(data: bytes) -> bytes:
    """The claim of a probe of netloom; empty for others."""
    padding = data[FRAME.size :]
    return padding[len(_MAGIC) :][:CLAIM_BYTES] if padding.startswith(_MAGIC) else b""


def decoded(data: bytes) -> tuple[int, bytes, bytes, bytes] | None:
    """Operation, sender's MAC address, sender's and target's IPv4 address; None for what is not such a message."""
    if len(data) < FRAME.size:
        return None
    _, _, kind, hardware, protocol, mac_bytes, ip_bytes, operation, mac, sender, _, target = FRAME.unpack_from(data)
    formats = (hardware, mac_bytes), (protocol, ip_bytes)
    if kind != ETHERTYPE_ARP or formats != (_ETHERNET, _IPV4) or operation not in (REQUEST, REPLY):
        return None
    if mac[0] & 1 or mac == bytes(6):  # guard: an-owner-has-a-station-address
        return None
    return operation, mac, sender, target
