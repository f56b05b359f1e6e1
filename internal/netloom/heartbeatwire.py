"""Heartbeats: what the three hosts of a group tell each other ten times a second, with a proof that a member says it.

A heartbeat is one message to both other members. It travels over UDP, and as the body of an Ethernet frame of the kind
``HEARTBEAT`` (ethernet.py) on the VLANs that the hosts have in common. It has a fixed size; numbers are big endian::

    group      4 bytes
    sender     1 byte: 0 the first host, 1 the second, 2 the witness, if there is one; so are all hosts below
    flags      1 byte; 1: ``released``, 2: ``ready``, 4: ``dissolved``, 8: ``gives_way``, 16: ``partner_behind``
    active     1 byte
    grants     1 byte; 255: nobody
    boot       8 bytes, random: this start of the sender's agent
    seq        8 bytes: grows with each message of this boot
    sent       8 bytes: the sender's clock, ns
    term, voted, grants_term, wants    8 bytes each, see standby/decision.py
    twice, for the other two members in their order:
        heard      8 + 8 bytes: boot and ``sent`` of its newest message that was accepted; zeros: none
        greeting   8 + 8 bytes: the same of a message whose boot is not proved yet
    twice, for each segment that carries heartbeats:
        segment    4 bytes, see ``WireSays``; zeros: there is none
        flags      1 byte; 1: ``heard``, 2: ``answered`` is True, 4: it is False
    proof      16 bytes: the beginning of HMAC-SHA256 of all before, with a key that is derived from the group's secret

``agent/standby/boots.py`` says which messages are accepted.
"""

from __future__ import annotations

import hmac
import struct

import msgspec

from netloom.ethernet import HEARTBEAT, body_of, payload
from netloom.secret import Secret

BOOT_BYTES = 8
NOBODY = 255  # as ``grants``
SEGMENTS_MAX = 2  # that carry the heartbeats of a group

_VERSION = 1
_LABEL = b"netloom heartbeat 1"
PROOF_BYTES = 16
_BODY = struct.Struct(">4s4B8sQQQQQQ8sQ8sQ8sQ8sQIBIB")
_FLAGS = ("released", "ready", "dissolved", "gives_way", "partner_behind")
_NO_BOOT = bytes(BOOT_BYTES)
_ANSWERED = (None, True, False)  # as bits 2 and 4 of a segment's flags
_OTHERS = ((1, 2), (0, 2), (0, 1))  # by sender

HEARTBEAT_BYTES = _BODY.size + PROOF_BYTES


class Echo(msgspec.Struct, frozen=True):
    """A message of another member, as far as it is named in an answer: its boot and its ``sent``, ns."""

    boot: bytes
    sent: int


class WireSays(msgspec.Struct, frozen=True):
    """What a host that can serve says of one segment that carries heartbeats. ``segment``: its number, not 0.

    ``heard``: the heartbeats of the other one arrive there. ``answered``: whether neighbours there answer this host;
    None: not known, because it has not asked, or has nobody to ask.
    """

    segment: int
    heard: bool
    answered: bool | None = None


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """A heartbeat. Hosts are numbers: 0 the first, 1 the second, 2 the witness.

    ``wires``: not more than SEGMENTS_MAX.

    ``heard`` and ``greeting`` have an element for each host; that of the sender is None. ``grants``: ``NOBODY`` if
    nobody is granted a lease. The other fields: see above, and ``decision.Says``.
    """

    group_id: str
    sender: int
    boot: bytes
    seq: int
    sent: int
    heard: tuple[Echo | None, Echo | None, Echo | None]
    greeting: tuple[Echo | None, Echo | None, Echo | None]
    term: int
    active: int
    released: bool
    voted: int
    grants: int
    grants_term: int
    wants: int
    ready: bool
    dissolved: bool = False
    gives_way: bool = False
    partner_behind: bool = False
    wires: tuple[WireSays, ...] = ()


def key_of(secret: Secret) -> bytes:
    """The key for the heartbeats of a group. Raises ValueError when its secret is not hexadecimal."""
    return hmac.digest(bytes.fromhex(secret.reveal()), _LABEL, "sha256")


def pack(beat: Beat, key: bytes) -> bytes:
    """The message, with its proof."""
    one, two = _OTHERS[beat.sender]
    body = _BODY.pack(
        bytes.fromhex(beat.group_id),
        beat.sender,
        sum(getattr(beat, name) << bit for bit, name in enumerate(_FLAGS)),
        beat.active,
        beat.grants,
        beat.boot,
        beat.seq,
        beat.sent,
        beat.term,
        beat.voted,
        beat.grants_term,
        beat.wants,
        *_fields(beat.heard[one]),
        *_fields(beat.greeting[one]),
        *_fields(beat.heard[two]),
        *_fields(beat.greeting[two]),
        *_wire_fields(beat.wires),
    )
    return body + _proof(body, key)


def group_of(data: bytes) -> str | None:
    """The id of the group that a message is about, if it is one at all; nothing is proved yet. ``data``: any bytes."""
    return data[:4].hex() if len(data) == HEARTBEAT_BYTES else None


def unpack(data: bytes, key: bytes) -> Beat | None:
    """The heartbeat that a member has sent; None for anything else. ``data``: any bytes."""
    if len(data) != HEARTBEAT_BYTES:
        return None
    body, proof = data[:-PROOF_BYTES], data[-PROOF_BYTES:]
    if not hmac.compare_digest(_proof(body, key), proof):  # guard: a-heartbeat-is-proved
        return None
    group, sender, flags, active, grants, boot, seq, sent, term, voted, grants_term, wants, *rest = _BODY.unpack(body)
    echoes, wires = rest[:8], rest[8:]
    if sender > 2 or flags >> len(_FLAGS) or active > 1 or grants not in (0, 1, NOBODY) or boot == _NO_BOOT:
        return None  # of a member with another program
    if any(bits > 5 for bits in wires[1::2]):
        return None
    heard: list[Echo | None] = [None, None, None]
    greeting: list[Echo | None] = [None, None, None]
    for at, host in enumerate(_OTHERS[sender]):
        heard[host], greeting[host] = _echo(*echoes[4 * at : 4 * at + 2]), _echo(*echoes[4 * at + 2 : 4 * at + 4])
    return Beat(
        group_id=group.hex(),
        sender=sender,
        boot=boot,
        seq=seq,
        sent=sent,
        heard=(heard[0], heard[1], heard[2]),
        greeting=(greeting[0], greeting[1], greeting[2]),
        term=term,
        active=active,
        voted=voted,
        grants=grants,
        grants_term=grants_term,
        wants=wants,
        wires=tuple(
            WireSays(segment, bool(bits & 1), _ANSWERED[bits >> 1])
            for segment, bits in zip(wires[::2], wires[1::2], strict=True)
            if segment
        ),
        **{name: bool(flags >> bit & 1) for bit, name in enumerate(_FLAGS)},
    )


def in_ethernet(message: bytes) -> bytes:
    """What follows the Ethernet header of a frame with this message."""
    return payload(HEARTBEAT, _VERSION, message)


def from_ethernet(data: bytes) -> bytes | None:
    """The message in what follows an Ethernet header; None for anything else. ``data``: any bytes."""
    return body_of(data, HEARTBEAT, _VERSION)


def _proof(body: bytes, key: bytes) -> bytes:
    return hmac.digest(key, body, "sha256")[:PROOF_BYTES]


def _fields(echo: Echo | None) -> tuple[bytes, int]:
    return (_NO_BOOT, 0) if echo is None else (echo.boot, echo.sent)


def _wire_fields(wires: tuple[WireSays, ...]) -> list[int]:
    fields = [it for says in wires for it in (says.segment, says.heard + 2 * _ANSWERED.index(says.answered))]
    return fields + [0] * (2 * SEGMENTS_MAX - len(fields))


def _echo(boot: bytes, sent: int) -> Echo | None:
    return None if boot == _NO_BOOT else Echo(boot, sent)
