"""What a proof of a placement says, and the Ethernet frames in which a host claims a scope that it took over.

A host that serves a scope of a dead host broadcasts a claim once a second, below its bridges. If the dead host lives
and its links come back, it hears the claim, verifies the signature, asks by ARP, and serves the scope no longer.

The frames have the EtherType 0x88b5 (IEEE 802, local experimental). After the Ethernet header come::

    "netloom"  7 bytes
    kind       1 byte; 1: a claim. Other kinds are ignored
    version    1 byte; 1. Other versions are ignored
    length     2 bytes, big endian: of the body; what follows the body is padding
    body       MessagePack: an array of scope, owner, host, epoch, dead host, until, signatures

A claim of an evacuation has a dead host and no epoch. A signature is that of SSH (RFC 4253, section 6.6).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

ETHERTYPE = 0x88B5
MAGIC = b"netloom"
CLAIM = 1  # the kind
PAYLOAD_BYTES_MAX = 1280  # every link of an IPv6 network carries that, also in a tunnel
SIGNATURES_MAX = 16  # in one frame
KEY = "key:"  # begins a signature in a proof

_VERSION = 1
_HEAD_BYTES = len(MAGIC) + 4
_BROADCAST = b"\xff" * 6
_ETHERTYPE_VLAN = 0x8100


@dataclass(frozen=True)
class PlacementClaim:
    """``host`` serves the scope with the number ``epoch``."""

    owner: str
    scope_id: str
    epoch: int
    host: str

    @property
    def text(self) -> bytes:
        """What is signed. Raises ValueError when a field contains NUL."""
        return signed_text("netloom placement 1", self.owner, self.scope_id, str(self.epoch), self.host.lower())


@dataclass(frozen=True)
class EvacuationClaim:
    """``dead`` is dead, and ``host`` may take its scopes. ``until``: UTC, in seconds since 1970."""

    owner: str
    dead: str
    until: int
    host: str

    @property
    def text(self) -> bytes:
        """What is signed. Raises ValueError when a field contains NUL."""
        return signed_text("netloom evacuation 1", self.owner, self.dead.lower(), str(self.until), self.host.lower())


Claim = PlacementClaim | EvacuationClaim


def signed_text(*fields: str) -> bytes:
    """The fields, separated by NUL. Raises ValueError when a field contains NUL.

    Host names are compared in lower case, as DNS does. The text begins with "netloom". What SSH signs in a login begins
    with the length of a hash, and a signed file with "SSHSIG", so no signature serves two purposes.
    """
    if any("\0" in field for field in fields):
        raise ValueError("a field contains NUL")
    return "\0".join(fields).encode("utf-8", "surrogatepass")


class Claimed(msgspec.Struct, frozen=True):
    """A claim as it is heard: ``scope_id`` is claimed, and one of the ``signatures`` has to be right."""

    scope_id: str
    claim: Claim
    signatures: tuple[bytes, ...]


class _Body(msgspec.Struct, frozen=True, array_like=True):
    scope_id: str
    owner: str
    host: str
    epoch: int
    dead: str
    until: int
    signatures: tuple[bytes, ...]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Body)


def signatures_in(proof: str) -> list[bytes]:
    """The signatures of a proof (extension/proof.py), without what is none."""
    found = []
    for part in proof.split(","):
        if part.startswith(KEY):
            try:
                found.append(base64.b64decode(part.removeprefix(KEY), validate=True))
            except (binascii.Error, ValueError):  # any text may be a proof
                continue
    return found


def payloads(scope_id: str, claim: Claim, signatures: Sequence[bytes]) -> tuple[list[bytes], int]:
    """What follows the Ethernet header of as many frames as the signatures need, and how many are too long for one."""
    bodies: list[list[bytes]] = []
    too_long = 0
    for signature in signatures:
        if _fits(scope_id, claim, [signature]):
            if bodies and len(bodies[-1]) < SIGNATURES_MAX and _fits(scope_id, claim, [*bodies[-1], signature]):
                bodies[-1].append(signature)
            else:
                bodies.append([signature])
        else:
            too_long += 1
    return [_payload(_body(scope_id, claim, it)) for it in bodies], too_long


def _fits(scope_id: str, claim: Claim, signatures: Sequence[bytes]) -> bool:
    return _HEAD_BYTES + len(_body(scope_id, claim, signatures)) <= PAYLOAD_BYTES_MAX


def _body(scope_id: str, claim: Claim, signatures: Sequence[bytes]) -> bytes:
    epoch, dead, until = (claim.epoch, "", 0) if isinstance(claim, PlacementClaim) else (0, claim.dead, claim.until)
    return _encoder.encode(_Body(scope_id, claim.owner, claim.host, epoch, dead, until, tuple(signatures)))


def _payload(body: bytes) -> bytes:
    return MAGIC + bytes((CLAIM, _VERSION)) + len(body).to_bytes(2, "big") + body


def ethernet_frame(mac: bytes, tag: int, payload: bytes) -> bytes:
    """A whole broadcast frame. ``mac``: the sender's, 6 bytes. ``tag``: the VLAN tag, 0 for none."""
    vlan = _ETHERTYPE_VLAN.to_bytes(2, "big") + tag.to_bytes(2, "big") if tag else b""
    return _BROADCAST + mac + vlan + ETHERTYPE.to_bytes(2, "big") + payload


def decode(payload: bytes) -> Claimed | None:
    """The claim in what follows an Ethernet header; None for anything else. ``payload``: any bytes."""
    start, kind, version = payload[: len(MAGIC)], payload[len(MAGIC) :][:1], payload[len(MAGIC) + 1 :][:1]
    if start != MAGIC or kind != bytes((CLAIM,)) or version != bytes((_VERSION,)):
        return None
    if not _HEAD_BYTES <= len(payload) <= PAYLOAD_BYTES_MAX:  # guard: a-claim-is-short
        return None
    length = int.from_bytes(payload[_HEAD_BYTES - 2 : _HEAD_BYTES], "big")
    if length > len(payload) - _HEAD_BYTES:
        return None
    try:
        body = _decoder.decode(payload[_HEAD_BYTES : _HEAD_BYTES + length])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):  # guard: a-claim-is-any-bytes
        return None
    if len(body.signatures) > SIGNATURES_MAX:  # guard: a-claim-has-few-signatures
        return None
    if any("\0" in it for it in (body.owner, body.scope_id, body.dead, body.host)):  # guard: a-claim-can-be-signed
        return None
    claim: Claim = (
        EvacuationClaim(body.owner, body.dead, body.until, body.host)
        if body.dead
        else PlacementClaim(body.owner, body.scope_id, body.epoch, body.host)
    )
    return Claimed(body.scope_id, claim, body.signatures)
