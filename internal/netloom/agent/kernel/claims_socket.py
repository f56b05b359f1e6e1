"""Frames of netloom's own EtherType (ethernet.py) on the uplinks of bridges: sent and heard below the bridge.

Each uplink has a packet socket of its own. A flood on one VLAN fills the buffer of that socket alone, and the frames of
other links pass no filter of ours. VMs of this host neither get what is sent here, nor are they heard.

A bridge takes frames from its ports before a socket for one EtherType sees them. So the sockets are for all protocols,
and a filter in the kernel drops what is not ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable

import msgspec

from netloom.agent.kernel.descriptors import high_socket
from netloom.agent.kernel.keeper import Keeper
from netloom.agent.kernel.multicast import Filter
from netloom.agent.kernel.packet_socket import PACKET_OUTGOING, open_packet_socket
from netloom.agent.kernel.rtnetlink import packed_mac
from netloom.ethernet import CLAIM, ETHERTYPE, MAGIC, PAYLOAD_BYTES_MAX, ethernet_frame

_VLAN_TAG = 0xFFFFF000 + 44  # SKF_AD_OFF + SKF_AD_VLAN_TAG, linux/filter.h: the tag that is not in the frame any more
HEADER_BYTES = 14
_RECEIVE_BYTES = 64 << 10
AT_ONCE = 16  # frames of one link that are read before other work of the agent has its turn
PAUSE_S = 0.1  # after that many


class ClaimWire(msgspec.Struct, frozen=True):
    """A link on which claims of a scope are sent and heard: its name, index and MAC address, and the VLAN tag that the
    frames have there (0: none)."""

    link: str
    index: int
    mac: str
    tag: int = 0


class ClaimSockets:
    """One socket for each of some links. Created and used on the event loop.

    ``received`` is called there with the link and what follows the Ethernet header. ``lost``: the link has gone, or is
    down; the socket of a link that comes up again goes on.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        received: Callable[[ClaimWire, bytes], None],
        lost: Callable[[ClaimWire], None],
        *,
        keeper: Keeper | None = None,
    ) -> None:
        """``keeper``: closes the sockets after the agent has ended."""
        self._loop = loop
        self._keeper = keeper or Keeper()
        self._received = received
        self._lost = lost
        self._sockets: dict[ClaimWire, socket.socket] = {}

    def follow(self, wires: Iterable[ClaimWire]) -> list[str]:
        """Listen on these links and no others; the errors, one line each."""
        wanted, errors = set(wires), []
        gone = [self._sockets.pop(wire) for wire in self._sockets.keys() - wanted]
        for it in gone:
            self._loop.remove_reader(it.fileno())
        if gone:
            # The kernel waits until no packet is on its way to the socket: milliseconds for each.
            self._loop.run_in_executor(None, self._close, gone)
        for wire in sorted(wanted - self._sockets.keys(), key=lambda it: it.link):
            try:
                self._sockets[wire] = opened = open_wire(wire, CLAIM)
            except OSError as error:
                errors.append(f"claims cannot be heard on {wire.link}: {error.strerror}")
                continue
            self._keeper.keep(opened.fileno())
            self._listen(wire, opened)
        return errors

    def send(self, wire: ClaimWire, payload: bytes) -> None:
        """Broadcast a frame with this payload. Nothing happens while the link cannot send: another one follows."""
        opened = self._sockets.get(wire)
        if opened is not None:
            with contextlib.suppress(OSError):
                opened.send(ethernet_frame(packed_mac(wire.mac), wire.tag, payload))

    def close(self) -> None:
        """Stop listening."""
        for opened in self._sockets.values():
            self._loop.remove_reader(opened.fileno())
        self._close(self._sockets.values())
        self._sockets.clear()

    def _close(self, sockets: Iterable[socket.socket]) -> None:
        for it in sockets:
            self._keeper.drop(it.fileno())
            it.close()

    def _listen(self, wire: ClaimWire, opened: socket.socket) -> None:
        if self._sockets.get(wire) is opened:
            self._loop.add_reader(opened.fileno(), self._read, wire, opened)

    def _read(self, wire: ClaimWire, opened: socket.socket) -> None:
        for _ in range(AT_ONCE):
            try:
                data, sender = opened.recvfrom(HEADER_BYTES + PAYLOAD_BYTES_MAX + 1)
            except BlockingIOError:
                return
            except OSError:
                self._lost(wire)
                return
            if sender[2] != PACKET_OUTGOING:
                self._received(wire, data[HEADER_BYTES:])
        # Whoever sends so many sends rubbish. The kernel drops the rest.
        self._loop.remove_reader(opened.fileno())  # guard: a-flood-of-claims-costs-little
        self._loop.call_later(PAUSE_S, self._listen, wire, opened)


def open_wire(wire: ClaimWire, kind: int) -> socket.socket:
    """A socket that does not block, for frames of this kind (ethernet.py) on this link. Raises OSError."""
    opened = high_socket(open_packet_socket(wire.link, _filter(wire.tag, kind), receive_bytes=_RECEIVE_BYTES))
    try:
        if opened.getsockname()[0] != wire.link or socket.if_nametoindex(wire.link) != wire.index:
            raise OSError(0, "another link has its name now")
        opened.setblocking(False)
    except BaseException:
        opened.close()
        raise
    return opened


def _filter(tag: int, kind: int) -> Filter:
    """Our frames of this kind with this VLAN tag: the kernel has moved it out of the frame. The magic follows 14 bytes,
    and the kind follows the magic."""
    return (
        (0x28, 0, 0, 12),  # ldh [12]
        (0x15, 0, 10, ETHERTYPE),  # jeq
        (0x20, 0, 0, 14),  # ld [14]
        (0x15, 0, 8, int.from_bytes(MAGIC[:4], "big")),  # jeq
        (0x20, 0, 0, 17),  # ld [17]
        (0x15, 0, 6, int.from_bytes(MAGIC[3:7], "big")),  # jeq
        (0x30, 0, 0, 21),  # ldb [21]
        (0x15, 0, 4, kind),  # jeq
        (0x20, 0, 0, _VLAN_TAG),  # ld
        (0x54, 0, 0, 0x0FFF),  # and: without the priority; the tag 0 is none
        (0x15, 0, 1, tag),  # guard: claims-are-heard-on-their-own-vlan
        (0x06, 0, 0, 0xFFFFFFFF),  # ret: the whole frame
        (0x06, 0, 0, 0),  # ret: nothing
    )
