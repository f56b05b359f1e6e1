"""Copy the connections of a namespace to a namespace of another host, so that they go on there.

The source lists its connections as records (``conntrack_changes.listing``, :func:`record_of`) and sends them as chunks
(:func:`encode`, :func:`decode`). The target creates them (:func:`create`). When the source receives no more packets,
and the target does not yet receive any, the source looks once more and sends only the :func:`difference`.

The fields of a created connection were chosen by tests with packets:

* The kernel translates packets only with the NAT attributes. Without them it accepts a translated reply tuple and
  translates nothing. With them the reply tuple must be the inverse of the original one: the kernel changes it itself.
* ``CONFIRMED`` must be set (else EBUSY). The other bits of the status are ignored, except that a connection without
  ``ASSURED`` is the first to be removed when the table is full.
* The TCP windows cannot be copied. The kernel learns them from the next segments, and the window scales must be in
  force for that: the scales, and the flag ``WINDOW_SCALE`` of both directions. Besides, both directions are liberal:
  windows are not checked. With neither, transfers stall that were under way.
* The timeout is what was left at the source. The next packet sets it anew.

**What is copied.** TCP that is established, in one direction closed, or about to end: all states in which an
application still waits for data. Other protocols when the other end has replied: UDP, GRE, ESP and the like. Without
the copy, a translated flow would not receive anything until the guest sends again, and would then perhaps have another
source port. In any state: connections whose mark has a bit of ``marked``.

**What is not copied.** Half-open TCP: the client repeats its SYN. TCP that is closed. Flows without a reply: their next
packet makes a new entry. ICMP: the next echo request makes a new entry. SCTP, DCCP and UDP-Lite: their entries were not
tried. Connections with a conntrack helper and the connections that it announced: their expectations and changed
sequence numbers are not listed completely. Counters.

**Connections of the host's own processes** (haproxy, dnsmasq) are copied as all others. Their sockets are not. So at
the target the next segment of the remote end is for a port without a socket, and the kernel answers it with a reset. A
remote end that only waits sends none: see ``tcp_sockets.reset_connections``.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NewType

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.conntrack import ASSURED, CONFIRMED, EXPECTED, SEEN_REPLY, carry_out
from netloom.agent.kernel.netlink import (
    ATTRIBUTE,
    Message,
    NetlinkError,
    Socket,
    attribute,
    attribute_map,
    be16,
    be32,
    nested,
    u8,
)
from netloom.errors import HostRefused

# A connection that is copied. It begins with the family (4 or 6; ``_TRANSLATED`` is added if the reply tuple is not the
# inverse of the original one), the protocol, the zone (2 bytes) and the original tuple: source, destination, source
# port, destination port. The reply tuple follows if the connection is translated. The end is ``_STATE``. Numbers are
# big endian, ports are 0 if the protocol has none. IPv4: 30 bytes, translated 42. IPv6: 54 bytes, translated 90.
Record = NewType("Record", bytes)

CHUNK_BYTES_MAX = 512 << 10

_MAGIC, _VERSION = b"NLCT", 1
_CHUNK_HEAD = struct.Struct(">4sHI")  # magic, version, number of records
_RECORD_HEAD = struct.Struct(">BBH")  # family, protocol, zone
_STATE = struct.Struct(">B5sII")  # status, TCP (state, both window scales, both flags), mark, timeout in seconds
_STATE_OF_ENDED = _STATE.pack(CONFIRMED, bytes(5), 0, 0)
_TIMEOUT_BYTES = 4
_TRANSLATED = 0x80
_NO_TCP = bytes(5)

_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_NEW, _GET, _DELETE = _SUBSYSTEM, _SUBSYSTEM | 1, _SUBSYSTEM | 2
_CREATE = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
_NFGENMSG = struct.Struct(">BBH")  # family, version, resource id

# linux/netfilter/nfnetlink_conntrack.h
_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_STATUS, _CTA_PROTOINFO, _CTA_NAT_SRC = 1, 2, 3, 4, 6
_CTA_TIMEOUT, _CTA_MARK, _CTA_ID, _CTA_NAT_DST, _CTA_ZONE = 7, 8, 12, 13, 18
_ID_FOLLOWS = ATTRIBUTE.pack(8, _CTA_ID)
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP_V4_SRC, _CTA_IP_V4_DST, _CTA_IP_V6_SRC, _CTA_IP_V6_DST = 1, 2, 3, 4
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_CTA_PROTOINFO_TCP = 1
_CTA_TCP_STATE, _CTA_TCP_WSCALE_ORIGINAL, _CTA_TCP_WSCALE_REPLY = 1, 2, 3
_CTA_TCP_FLAGS_ORIGINAL, _CTA_TCP_FLAGS_REPLY = 4, 5
_CTA_NAT_V4_MINIP, _CTA_NAT_V4_MAXIP, _CTA_NAT_PROTO, _CTA_NAT_V6_MINIP, _CTA_NAT_V6_MAXIP = 1, 2, 3, 4, 5
_CTA_PROTONAT_PORT_MIN, _CTA_PROTONAT_PORT_MAX = 1, 2

# Bits of the status (enum ip_conntrack_status): sequence numbers are changed; a helper was assigned.
_SEQ_ADJUST, _HELPER = 0x40, 0x2000
_STATUS_BITS = SEEN_REPLY | ASSURED | CONFIRMED

# linux/netfilter/nf_conntrack_tcp.h: the states from ESTABLISHED to LAST_ACK.
_TCP_ESTABLISHED = 3
_TCP_OPEN = frozenset({_TCP_ESTABLISHED, 4, 5, 6})
_TCP_STATE_MAX = 9
_WINDOW_SCALE_MAX = 14  # RFC 7323
# WINDOW_SCALE, SACK_PERM and CLOSE_INIT. MAXACK_SET would make the kernel compare resets with a number that it lacks.
_TCP_FLAGS_COPIED = 0x07  # guard: window-scales-are-in-force
_TCP_BE_LIBERAL = 0x08

_TCP, _UDP, _GRE = 6, 17, 47
_WITH_PORTS = frozenset({_TCP, _UDP, _GRE})  # GRE has a key in each direction instead
_WITH_TRANSLATED_PORTS = _WITH_PORTS - {_GRE}
_ICMP, _DCCP, _ICMPV6, _SCTP, _UDP_LITE = 1, 33, 58, 132, 136
_NEVER_COPIED = frozenset({0, _ICMP, _DCCP, _ICMPV6, _SCTP, _UDP_LITE})

# A difference contains a connection again if the source has renewed a timeout shorter than this: the target's might
# run out meanwhile. Longer ones last until the last copy.
SHORT_TIMEOUT_S = 60

_BATCH = 2048


class RecordsInvalid(HostRefused):
    """A chunk of connections cannot be decoded: damaged, or made by another version."""


class Created(msgspec.Struct, frozen=True):
    """The result of :func:`create`."""

    standing: int  # connections that exist now, those that existed before included
    refused: int = 0  # connections that the kernel refused
    reason: str = ""  # why it refused the first of them


class Difference(msgspec.Struct, frozen=True):
    """What a target that has an earlier list must do, in this order, to have the later one."""

    delete: list[Record]  # connections that have ended, or that are created again with other fields
    create: list[Record]  # connections that are new or changed


@dataclass(frozen=True, slots=True)
class _Family:
    """An address family, and how the kernel encodes a connection of it whose protocol has ports.

    ``both``: an nfgenmsg, and the tuples of both directions. ``headers``: the constant bytes in it.
    """

    code: int  # in a record
    number: int  # AF_INET, AF_INET6
    address_bytes: int
    tuple_bytes: int
    source: int  # attribute types
    destination: int
    nat_min: int
    nat_max: int
    both: struct.Struct
    headers: tuple[bytes, ...]


def _family(code: int, number: int, size: int, source: int, destination: int, nat_min: int, nat_max: int) -> _Family:
    header, nest = ATTRIBUTE.pack, netlink.NLA_F_NESTED
    addresses = 4 + 2 * (4 + size)
    headers: list[bytes] = []
    for kind in (_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY):
        begin = header(4 + addresses + 28, kind | nest) + header(addresses, _CTA_TUPLE_IP | nest)
        headers += [
            begin + header(4 + size, source),
            header(4 + size, destination),
            header(28, _CTA_TUPLE_PROTO | nest) + header(5, _CTA_PROTO_NUM),
            header(6, _CTA_PROTO_SRC_PORT),
            header(6, _CTA_PROTO_DST_PORT),
        ]
    one = f"12s{size}s4s{size}s8sB3x4s2s2x4s2s2x"
    both = struct.Struct(f">4x{one}{one}")
    return _Family(code, number, size, 2 * size + 4, source, destination, nat_min, nat_max, both, tuple(headers))


_IPV4 = _family(4, socket.AF_INET, 4, _CTA_IP_V4_SRC, _CTA_IP_V4_DST, _CTA_NAT_V4_MINIP, _CTA_NAT_V4_MAXIP)
_IPV6 = _family(6, socket.AF_INET6, 16, _CTA_IP_V6_SRC, _CTA_IP_V6_DST, _CTA_NAT_V6_MINIP, _CTA_NAT_V6_MAXIP)
_BY_CODE = {it.code: it for it in (_IPV4, _IPV6)}
_BY_NUMBER = {it.number: it for it in (_IPV4, _IPV6)}


# List


def record_of(payload: bytes, *, marked: int = 0, status: int = SEEN_REPLY) -> Record | None:
    """The record of a connection as the kernel lists it; None if the connection is not copied.

    ``status``: the bits that a connection must have, except one with a bit of ``marked``.

    Raises NetlinkError (EBADMSG) when ``payload`` is not an nfgenmsg with a connection's attributes.
    """
    family = _BY_NUMBER.get(payload[0]) if payload else None
    if family is None:
        return None
    if len(payload) >= family.both.size:
        (
            h0, source, h1, destination, h2, protocol, h3, sport, h4, dport,
            r0, reply_source, r1, reply_destination, r2, _, r3, reply_sport, r4, reply_dport,
        ) = family.both.unpack_from(payload)  # fmt: skip
        if (h0, h1, h2, h3, h4, r0, r1, r2, r3, r4) == family.headers:
            values = _values(payload, family.both.size)
            original = source + destination + sport + dport
            reply = reply_source + reply_destination + reply_sport + reply_dport
            return _record(family, protocol, original, reply, values, marked, status)
    values = _values(payload, _NFGENMSG.size)
    protocol, original = _decode_tuple(family, values.get(_CTA_TUPLE_ORIG))
    _, reply = _decode_tuple(family, values.get(_CTA_TUPLE_REPLY))
    return _record(family, protocol, original, reply, values, marked, status)


def ended(payload: bytes) -> Record | None:
    """A record that only identifies the connection, for :func:`delete`; None if its protocol is not copied.

    Raises NetlinkError (EBADMSG) as :func:`record_of`.
    """
    family = _BY_NUMBER.get(payload[0]) if payload else None
    if family is None:
        return None
    size = family.both.size
    if payload[size : size + 4] == _ID_FOLLOWS:  # the zone would come first
        h0, source, h1, destination, h2, protocol, h3, sport, h4, dport, *_ = family.both.unpack_from(payload)
        if (h0, h1, h2, h3, h4) == family.headers[:5]:
            if protocol in _NEVER_COPIED:
                return None
            head = _RECORD_HEAD.pack(family.code, protocol, 0)
            return Record(head + source + destination + sport + dport + _STATE_OF_ENDED)
    values = _values(payload, _NFGENMSG.size)
    protocol, original = _decode_tuple(family, values.get(_CTA_TUPLE_ORIG))
    if protocol in _NEVER_COPIED:
        return None
    head = _RECORD_HEAD.pack(family.code, protocol, _number(values, _CTA_ZONE) & 0xFFFF)
    return Record(head + original + _STATE_OF_ENDED)


def has_closed(payload: bytes) -> bool:
    """Whether it is a TCP connection in which no end waits for data (any more)."""
    state = _tcp_state(_values(payload, _NFGENMSG.size).get(_CTA_PROTOINFO))[0]
    return state != 0 and state not in _TCP_OPEN


def _record(
    family: _Family,
    protocol: int,
    original: bytes,
    reply: bytes,
    values: dict[int, bytes],
    marked: int,
    required: int,
) -> Record | None:
    status, mark = _number(values, _CTA_STATUS), _number(values, _CTA_MARK)
    if protocol in _NEVER_COPIED:
        return None
    tcp = _tcp_state(values.get(_CTA_PROTOINFO)) if protocol == _TCP else _NO_TCP
    if not mark & marked:
        if status & required != required or status & (EXPECTED | _SEQ_ADJUST | _HELPER):
            return None
        if protocol == _TCP and tcp[0] not in _TCP_OPEN:
            return None
    translated = reply != _inverse(original, family.address_bytes)
    head = _RECORD_HEAD.pack(
        family.code | (_TRANSLATED if translated else 0), protocol, _number(values, _CTA_ZONE) & 0xFFFF
    )
    state = _STATE.pack(status & _STATUS_BITS, tcp, mark, _number(values, _CTA_TIMEOUT))
    return Record(head + original + reply + state if translated else head + original + state)


def _values(payload: bytes, offset: int) -> dict[int, bytes]:
    """As netlink.attribute_map, without a list in between: a namespace may have 100,000 connections."""
    found = {}
    unpack, end, mask = ATTRIBUTE.unpack_from, len(payload), netlink.NLA_TYPE_MASK
    while offset + 4 <= end:
        length, kind = unpack(payload, offset)
        if length < 4 or offset + length > end:
            raise NetlinkError(errno.EBADMSG, "connection", f"attribute {kind & mask} of length {length}")
        found[kind & mask] = payload[offset + 4 : offset + length]
        offset += (length + 3) & ~3
    return found


def _number(values: dict[int, bytes], kind: int) -> int:
    value = values.get(kind, b"")
    if len(value) > 4:
        raise NetlinkError(errno.EBADMSG, "connection", f"attribute {kind} of {len(value)} bytes")
    return int.from_bytes(value, "big")


def _decode_tuple(family: _Family, value: bytes | None) -> tuple[int, bytes]:
    """The protocol, and the addresses and ports as a record has them."""
    if value is None:
        raise NetlinkError(errno.EBADMSG, "connection", "a direction is missing")
    values = attribute_map(value)
    ip = attribute_map(values.get(_CTA_TUPLE_IP, b""))
    proto = attribute_map(values.get(_CTA_TUPLE_PROTO, b""))
    source, destination = ip.get(family.source, b""), ip.get(family.destination, b"")
    ports = [proto.get(it, bytes(2)) for it in (_CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT)]
    encoded = b"".join((source, destination, *ports))
    protocol = _number(proto, _CTA_PROTO_NUM)
    if len(source) != family.address_bytes or len(encoded) != family.tuple_bytes or protocol > 0xFF:
        raise NetlinkError(errno.EBADMSG, "connection", "a direction cannot be decoded")
    return protocol, encoded


def _inverse(encoded: bytes, size: int) -> bytes:
    """The tuple of the other direction without a translation. ``size``: that of an address."""
    ports = 2 * size
    return encoded[size:ports] + encoded[:size] + encoded[ports + 2 :] + encoded[ports : ports + 2]


@lru_cache(maxsize=1024)
def _tcp_state(protoinfo: bytes | None) -> bytes:
    """State, window scales and flags, one byte each, each pair for the original and the reply direction."""
    if protoinfo is None:
        return _NO_TCP
    values = attribute_map(attribute_map(protoinfo).get(_CTA_PROTOINFO_TCP, b""))
    flags = [values.get(it, b"\0")[:1] for it in (_CTA_TCP_FLAGS_ORIGINAL, _CTA_TCP_FLAGS_REPLY)]
    numbers = [_number(values, it) for it in (_CTA_TCP_STATE, _CTA_TCP_WSCALE_ORIGINAL, _CTA_TCP_WSCALE_REPLY)]
    numbers += [int.from_bytes(it, "big") & _TCP_FLAGS_COPIED for it in flags]
    if numbers[0] > _TCP_STATE_MAX or max(numbers[1:3]) > _WINDOW_SCALE_MAX:
        raise NetlinkError(errno.EBADMSG, "connection", "its TCP state is unknown")
    return bytes(numbers)


# Send


class Portion(msgspec.Struct, frozen=True):
    """A part of a :class:`Difference`: two chunks, of at most ``CHUNK_BYTES_MAX`` bytes together."""

    delete: bytes
    create: bytes
    created: int  # records in ``create``


def encode_difference(changes: Difference) -> list[Portion]:
    """The difference in portions that a target carries out in this order; at least one.

    First what has ended: a new connection may need its address and port. A changed connection is deleted and created by
    the same portion, so no portion takes away what a later one would give back.
    """
    ended = {key_of(it): it for it in changes.delete}
    pairs = [(ended.pop(key_of(it), None), it) for it in changes.create]
    portions: list[Portion] = []
    delete: list[Record] = []
    create: list[Record] = []
    size = empty = 2 * _CHUNK_HEAD.size
    for old, new in (*((it, None) for it in ended.values()), *pairs):
        added = len(old or b"") + len(new or b"")
        if size + added > CHUNK_BYTES_MAX:
            portions.append(Portion(_chunk(delete), _chunk(create), len(create)))
            delete, create, size = [], [], empty
        if old is not None:
            delete.append(old)
        if new is not None:
            create.append(new)
        size += added
    if delete or create or not portions:
        portions.append(Portion(_chunk(delete), _chunk(create), len(create)))
    return portions


def encode(listed: Iterable[Record]) -> list[bytes]:
    """The records as chunks of at most ``CHUNK_BYTES_MAX`` bytes, each with a header; at least one chunk."""
    chunks: list[bytes] = []
    part: list[Record] = []
    size = _CHUNK_HEAD.size
    for record in listed:
        if size + len(record) > CHUNK_BYTES_MAX:
            chunks.append(_chunk(part))
            part, size = [], _CHUNK_HEAD.size
        part.append(record)
        size += len(record)
    return [*chunks, _chunk(part)] if part or not chunks else chunks


def _chunk(part: list[Record]) -> bytes:
    return _CHUNK_HEAD.pack(_MAGIC, _VERSION, len(part)) + b"".join(part)


def decode(chunk: bytes) -> list[Record]:
    """The records of one chunk. Raises RecordsInvalid for anything that :func:`encode` does not make."""
    if len(chunk) < _CHUNK_HEAD.size or len(chunk) > CHUNK_BYTES_MAX:
        raise RecordsInvalid(f"copied connections: a chunk of {len(chunk)} bytes")
    magic, version, number = _CHUNK_HEAD.unpack_from(chunk)
    if magic != _MAGIC or version != _VERSION:
        raise RecordsInvalid("copied connections: an unknown format", hint="do both hosts have the same build?")
    found: list[Record] = []
    at, end = _CHUNK_HEAD.size, len(chunk)
    while at < end:
        length = _length(chunk[at])
        if not length or at + length > end:
            raise RecordsInvalid(f"copied connections: no record at byte {at} of {end}")
        record = Record(chunk[at : at + length])
        if not _is_valid(record):
            raise RecordsInvalid(f"copied connections: the record at byte {at} has impossible values")
        found.append(record)
        at += length
    if len(found) != number:
        raise RecordsInvalid(f"copied connections: {len(found)} records instead of {number}")
    return found


def _length(first: int) -> int:
    """The length of a record with this first byte; 0 if there is none."""
    family = _BY_CODE.get(first & ~_TRANSLATED)
    if family is None:
        return 0
    tuples = 2 if first & _TRANSLATED else 1
    return _RECORD_HEAD.size + tuples * family.tuple_bytes + _STATE.size


def _is_valid(record: Record) -> bool:
    status, tcp, _, _ = _STATE.unpack_from(record, len(record) - _STATE.size)
    return (
        record[1] not in _NEVER_COPIED
        and bool(status & CONFIRMED)
        and not status & ~_STATUS_BITS
        and tcp[0] <= _TCP_STATE_MAX
        and max(tcp[1], tcp[2]) <= _WINDOW_SCALE_MAX
        and not (tcp[3] | tcp[4]) & ~_TCP_FLAGS_COPIED
        and (record[1] == _TCP or tcp == _NO_TCP)
    )


def difference(before: Iterable[Record], now: Iterable[Record]) -> Difference:
    """What a target with the connections of ``before`` lacks of ``now``, and what it must delete.

    A connection is changed if its translation, its state or its mark differs, or if a short timeout was renewed. Other
    timeouts run at the target as at the source, and the first packet sets them anew.
    """
    old = {key_of(it): it for it in before}
    changed: list[Record] = []
    ended: list[Record] = []
    for record in now:
        earlier = old.pop(key_of(record), None)
        if earlier is None:
            changed.append(record)
        elif not _stands(earlier, record):
            changed.append(record)
            ended.append(earlier)  # guard: a-changed-connection-is-created-anew
    return Difference(delete=[*ended, *old.values()], create=changed)


def key_of(record: Record) -> bytes:
    """What identifies the connection: protocol, zone and original tuple. Its length tells the family."""
    return record[1 : _RECORD_HEAD.size + _BY_CODE[record[0] & ~_TRANSLATED].tuple_bytes]


def timeout_of(record: Record) -> int:
    """The seconds after which the connection ended without a packet, when it was listed."""
    return int.from_bytes(record[-_TIMEOUT_BYTES:], "big")


def _stands(earlier: Record, record: Record) -> bool:
    """Whether a target that created ``earlier`` needs nothing for ``record``."""
    if earlier[0] != record[0] or earlier[:-_TIMEOUT_BYTES] != record[:-_TIMEOUT_BYTES]:
        return False
    left, now = timeout_of(earlier), timeout_of(record)
    return now <= left or left >= SHORT_TIMEOUT_S  # guard: a-renewed-short-timeout-is-sent-again


# Create


def create(namespace: str | None, listed: Sequence[Record]) -> Created:
    """Create these connections. One that exists already counts as standing and is not changed.

    The ruleset must be loaded: without a chain for NAT the kernel refuses translations. A refused connection does not
    affect the others. Raises NamespaceError, NetlinkError when no request can be sent.
    """
    standing = refused = 0
    reason = ""
    with Socket(netlink.NETLINK_NETFILTER, namespace) as ctnetlink:
        for at in range(0, len(listed), _BATCH):
            part = listed[at : at + _BATCH]
            answers = ctnetlink.exchange([Message(_NEW, _CREATE, creation(it)) for it in part])
            for record, answer in zip(part, answers, strict=True):
                if answer.errno in (0, errno.EEXIST):
                    standing += 1
                    continue
                refused += 1  # guard: a-refused-connection-is-counted
                if not reason:
                    said = f"{os.strerror(answer.errno)} {answer.ext_ack}".rstrip()
                    reason = f"{described(record)}: {said}"
    return Created(standing, refused, reason)


def replicate(ctnetlink: Socket, gone: Iterable[Record], listed: Sequence[Record]) -> Created:
    """Delete the connections of ``gone`` that exist, then create these, in the namespace of the socket.

    A connection that exists is replaced, and so is another one with the same reply direction: it has ended at the
    source, where there can be only one. ``standing`` counts what was created. Raises NetlinkError when no request can
    be sent.
    """
    deletions = [Message(_DELETE, payload=b"".join(_identity(it))) for it in gone]
    creations = [Message(_NEW, _CREATE, creation(it)) for it in listed]
    failed = ctnetlink.failures([*deletions, *creations])
    refused = {at - len(deletions): code for at, code in failed.items() if at >= len(deletions)}
    there = [at for at, code in refused.items() if code == errno.EEXIST]
    if there:
        again: list[Message] = []
        for at in there:
            again += [Message(_DELETE, payload=b"".join(_identity(listed[at])))]
            again += [Message(_DELETE, payload=b"".join(_identity_of_reply(listed[at]))), creations[at]]
        failed = ctnetlink.failures(again)
        for place, at in enumerate(there):
            code = failed.get(3 * place + 2, 0)
            if code:
                refused[at] = code
            else:
                del refused[at]
    reason = ""
    if refused:
        at, code = min(refused.items())
        reason = f"{described(listed[at])}: {os.strerror(code)}"
    return Created(len(listed) - len(refused), len(refused), reason)


def flush(ctnetlink: Socket) -> None:
    """Delete all connections in the namespace of the socket. Raises NetlinkError."""
    ctnetlink.request([Message(_DELETE, payload=_NFGENMSG.pack(socket.AF_UNSPEC, 0, 0), what="delete all connections")])


def set_timeouts(ctnetlink: Socket, listed: Iterable[Record], timeout_s: int) -> None:
    """Make these connections end after so many seconds without a packet; no error for those that exist no more.

    Raises NetlinkError when no request can be sent.
    """
    wanted = be32(_CTA_TIMEOUT, timeout_s)
    ctnetlink.failures([Message(_NEW, payload=b"".join(_identity(it)) + wanted) for it in listed])


def is_open_tcp(record: Record) -> bool:
    """Whether it is an established TCP connection that neither end has closed."""
    return record[1] == _TCP and _STATE.unpack_from(record, len(record) - _STATE.size)[1][0] == _TCP_ESTABLISHED


def lasting(record: Record, timeout_s: int) -> Record:
    """The same, with at least this timeout."""
    if timeout_of(record) >= timeout_s:
        return record
    return Record(record[:-_TIMEOUT_BYTES] + timeout_s.to_bytes(_TIMEOUT_BYTES, "big"))


def delete(namespace: str | None, listed: Iterable[Record]) -> int:
    """Delete these connections; return how many of them existed. Raises NamespaceError, NetlinkError."""
    requests = [Message(_DELETE, payload=b"".join(_identity(it)), what=f"delete {described(it)}") for it in listed]
    return carry_out(namespace, requests)


def described(record: Record) -> str:
    """The original direction as text, for example ``6 10.1.1.11:40001 to 192.0.2.10:80``."""
    family, original, _ = _tuples(record)
    source, destination, sport, dport = _parts(family, original)
    name = (socket.inet_ntop(family.number, it) for it in (source, destination))
    ports = (int.from_bytes(it, "big") for it in (sport, dport))
    one, other = (f"[{it}]:{port}" if ":" in it else f"{it}:{port}" for it, port in zip(name, ports, strict=True))
    return f"{record[1]} {one} to {other}"


def _tuples(record: Record) -> tuple[_Family, bytes, bytes]:
    """The family, and the original and the reply tuple."""
    family = _BY_CODE[record[0] & ~_TRANSLATED]
    first, size = _RECORD_HEAD.size, family.tuple_bytes
    original = record[first : first + size]
    if record[0] & _TRANSLATED:
        return family, original, record[first + size : first + 2 * size]
    return family, original, _inverse(original, family.address_bytes)


def _parts(family: _Family, encoded: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Source, destination, source port, destination port."""
    size = family.address_bytes
    return encoded[:size], encoded[size : 2 * size], encoded[2 * size : 2 * size + 2], encoded[2 * size + 2 :]


def _identity(record: Record) -> Iterator[bytes]:
    """The message's head, the original tuple and the zone."""
    family, original, _ = _tuples(record)
    yield _NFGENMSG.pack(family.number, 0, 0)
    yield _tuple_attribute(_CTA_TUPLE_ORIG, family, record[1], original)
    zone = int.from_bytes(record[2:4], "big")
    if zone:
        yield be16(_CTA_ZONE, zone)


def _identity_of_reply(record: Record) -> Iterator[bytes]:
    """As :func:`_identity`, with the reply tuple."""
    family, _, reply = _tuples(record)
    yield _NFGENMSG.pack(family.number, 0, 0)
    yield _tuple_attribute(_CTA_TUPLE_REPLY, family, record[1], reply)
    zone = int.from_bytes(record[2:4], "big")
    if zone:
        yield be16(_CTA_ZONE, zone)


def creation(record: Record) -> bytes:
    """The payload of the request that creates the connection."""
    return b"".join(_attributes(record))


def _attributes(record: Record) -> Iterator[bytes]:
    family, original, reply = _tuples(record)
    protocol = record[1]
    status, tcp, mark, timeout_s = _STATE.unpack_from(record, len(record) - _STATE.size)
    plain = _inverse(original, family.address_bytes)
    yield from _identity(record)
    yield _tuple_attribute(_CTA_TUPLE_REPLY, family, protocol, plain)
    yield be32(_CTA_STATUS, status)  # guard: a-copied-connection-is-assured
    yield be32(_CTA_TIMEOUT, timeout_s)
    if mark:
        yield be32(_CTA_MARK, mark)  # guard: a-mark-is-copied
    if protocol == _TCP:
        yield _protoinfo(tcp)
    if reply != plain:
        source, destination, sport, dport = _parts(family, reply)
        plain_source, plain_destination, plain_sport, plain_dport = _parts(family, plain)
        if (source, sport) != (plain_source, plain_sport):
            yield _nat(_CTA_NAT_DST, family, protocol, source, sport)  # guard: a-translated-destination-is-copied
        if (destination, dport) != (plain_destination, plain_dport):
            yield _nat(_CTA_NAT_SRC, family, protocol, destination, dport)  # guard: a-translated-source-is-copied


def _tuple_attribute(kind: int, family: _Family, protocol: int, encoded: bytes) -> bytes:
    source, destination, sport, dport = _parts(family, encoded)
    if protocol in _WITH_PORTS:
        h0, h1, h2, h3, h4 = family.headers[:5] if kind == _CTA_TUPLE_ORIG else family.headers[5:]
        number = bytes((protocol, 0, 0, 0))
        return b"".join((h0, source, h1, destination, h2, number, h3, sport, b"\0\0", h4, dport, b"\0\0"))
    addresses = nested(_CTA_TUPLE_IP, attribute(family.source, source), attribute(family.destination, destination))
    return nested(kind, addresses, nested(_CTA_TUPLE_PROTO, u8(_CTA_PROTO_NUM, protocol)))


@lru_cache(maxsize=1024)
def _protoinfo(tcp: bytes) -> bytes:
    state, scale, reply_scale, flags, reply_flags = tcp
    liberal = _TCP_BE_LIBERAL  # guard: windows-of-copied-connections-are-not-checked
    all_bits = 0xFF  # the mask of the bits to set
    return nested(
        _CTA_PROTOINFO,
        nested(
            _CTA_PROTOINFO_TCP,
            u8(_CTA_TCP_STATE, state),
            u8(_CTA_TCP_WSCALE_ORIGINAL, scale),
            u8(_CTA_TCP_WSCALE_REPLY, reply_scale),
            attribute(_CTA_TCP_FLAGS_ORIGINAL, bytes((flags | liberal, all_bits))),
            attribute(_CTA_TCP_FLAGS_REPLY, bytes((reply_flags | liberal, all_bits))),
        ),
    )


def _nat(kind: int, family: _Family, protocol: int, address: bytes, port: bytes) -> bytes:
    """Translate to exactly this address and port."""
    ports = b""
    if protocol in _WITH_TRANSLATED_PORTS:
        ports = nested(_CTA_NAT_PROTO, attribute(_CTA_PROTONAT_PORT_MIN, port), attribute(_CTA_PROTONAT_PORT_MAX, port))
    return nested(kind, attribute(family.nat_min, address), attribute(family.nat_max, address), ports)
