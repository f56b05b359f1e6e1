"""Ethernet frames of netloom's own: hosts send them to each other on a VLAN, below their bridges.

The frames have the EtherType 0x88b5 (IEEE 802, local experimental). After the Ethernet header come::

    "netloom"  7 bytes
    kind       1 byte; 1: a claim (claimwire.py), 2: a heartbeat (heartbeatwire.py). Other kinds are ignored
    version    1 byte, of this kind. Other versions are ignored
    length     2 bytes, big endian: of the body; what follows the body is padding
    body
"""

from __future__ import annotations

ETHERTYPE = 0x88B5
MAGIC = b"netloom"
CLAIM, HEARTBEAT = 1, 2  # the kinds
PAYLOAD_BYTES_MAX = 1280  # every link of an IPv6 network carries that, also in a tunnel
HEAD_BYTES = len(MAGIC) + 4

_BROADCAST = b"\xff" * 6
_ETHERTYPE_VLAN = 0x8100


def payload(kind: int, version: int, body: bytes) -> bytes:
    """What follows the Ethernet header of a frame with this body."""
    return MAGIC + bytes((kind, version)) + len(body).to_bytes(2, "big") + body


def body_of(data: bytes, kind: int, version: int) -> bytes | None:
    """The body of a frame of this kind and version; None for anything else. ``data``: what follows the header."""
    if data[: len(MAGIC) + 2] != MAGIC + bytes((kind, version)):
        return None
    if not HEAD_BYTES <= len(data) <= PAYLOAD_BYTES_MAX:  # guard: a-claim-is-short
        return None
    length = int.from_bytes(data[HEAD_BYTES - 2 : HEAD_BYTES], "big")
    return data[HEAD_BYTES : HEAD_BYTES + length] if length <= len(data) - HEAD_BYTES else None


def ethernet_frame(mac: bytes, tag: int, payload: bytes) -> bytes:
    """A whole broadcast frame. ``mac``: the sender's, 6 bytes. ``tag``: the VLAN tag, 0 for none."""
    vlan = _ETHERTYPE_VLAN.to_bytes(2, "big") + tag.to_bytes(2, "big") if tag else b""
    return _BROADCAST + mac + vlan + ETHERTYPE.to_bytes(2, "big") + payload
