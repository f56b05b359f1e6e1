"""What a proof of a placement says, and the Ethernet frames in which a host claims a scope that it took over.

A host that serves a scope of a dead host broadcasts a claim once a second, below its bridges. If the dead host lives
and its links come back, it hears the claim, verifies the signature, asks by ARP, and serves the scope no longer.

``ethernet.py`` has the head of the frames; the kind is ``CLAIM`` and the version 1. The body is MessagePack: an array
of scope, owner, host, epoch, dead host, until, signatures.

A claim of an evacuation has a dead host and no epoch. A signature is that of SSH (RFC 4253, section 6.6).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from netloom.ethernet import CLAIM, HEAD_BYTES, PAYLOAD_BYTES_MAX, body_of, payload

SIGNATURES_MAX = 16  # in one frame
KEY = "key:"  # begins a signature in a proof

_VERSION = 1


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


@dataclass(frozen=True)
class StandbyClaim:
    """``host`` may serve the scope with ``epoch`` and any higher number: it belongs to a group (standbywire.py) since.

    Each take-over in the group raises the number by itself. No host broadcasts such a claim.
    """

    owner: str
    scope_id: str
    epoch: int
    host: str

    @property
    def text(self) -> bytes:
        """What is signed. Raises ValueError when a field contains NUL."""
        return signed_text("netloom standby 1", self.owner, self.scope_id, str(self.epoch), self.host.lower())


Claim = PlacementClaim | EvacuationClaim  # what a host broadcasts
Signable = Claim | StandbyClaim


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
    return [payload(CLAIM, _VERSION, _body(scope_id, claim, it)) for it in bodies], too_long


def _fits(scope_id: str, claim: Claim, signatures: Sequence[bytes]) -> bool:
    return HEAD_BYTES + len(_body(scope_id, claim, signatures)) <= PAYLOAD_BYTES_MAX


def _body(scope_id: str, claim: Claim, signatures: Sequence[bytes]) -> bytes:
    epoch, dead, until = (claim.epoch, "", 0) if isinstance(claim, PlacementClaim) else (0, claim.dead, claim.until)
    return _encoder.encode(_Body(scope_id, claim.owner, claim.host, epoch, dead, until, tuple(signatures)))


def decode(data: bytes) -> Claimed | None:
    """The claim in what follows an Ethernet header; None for anything else. ``data``: any bytes."""
    packed = body_of(data, CLAIM, _VERSION)
    if packed is None:
        return None
    try:
        body = _decoder.decode(packed)
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
