"""Connection tracking of a namespace (ctnetlink): list, delete, mark and count connections.

Message layout: linux/netfilter/nfnetlink_conntrack.h, nfnetlink.h. Numbers inside attributes are big endian.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache

import msgspec

from netloom.agent.kernel import kept, netlink
from netloom.agent.kernel.netlink import Message, NetlinkError, Socket, attribute, attribute_map, be16, be32

_SUBSYSTEM = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_NEW, _GET, _DELETE, _GET_STATS = _SUBSYSTEM, _SUBSYSTEM | 1, _SUBSYSTEM | 2, _SUBSYSTEM | 5

_CTA_TUPLE_ORIG, _CTA_TUPLE_REPLY, _CTA_STATUS, _CTA_TIMEOUT, _CTA_MARK = 1, 2, 3, 7, 8
_CTA_TUPLE_MASTER = 14
_CTA_ID, _CTA_ZONE, _CTA_MARK_MASK = 12, 18, 21
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO, _CTA_TUPLE_ZONE = 1, 2, 3
_CTA_IP_V4_SRC, _CTA_IP_V4_DST, _CTA_IP_V6_SRC, _CTA_IP_V6_DST = 1, 2, 3, 4
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_CTA_PROTO_ICMP_TYPE, _CTA_PROTO_ICMP_CODE = 5, 6
_CTA_PROTO_ICMPV6_TYPE, _CTA_PROTO_ICMPV6_CODE = 8, 9
_CTA_STATS_GLOBAL_ENTRIES = 1

# Bits of ``status`` (enum ip_conntrack_status).
EXPECTED, SEEN_REPLY, ASSURED, CONFIRMED = 0x1, 0x2, 0x4, 0x8
SRC_NAT, DST_NAT = 0x10, 0x20

_HEAD = struct.Struct(">BBH")  # nfgenmsg: family, version, resource id
_ATTRIBUTE = struct.Struct("=HH")
_AF_INET = int(socket.AF_INET)
_TUPLE_AT, _TUPLE_END = 8, 56  # the value of the first attribute in such a payload

# The layout that all kernels use for an IPv4 tuple of a protocol with ports: constant attribute headers and values. So
# most entries are decoded with one unpack instead of eighteen nested attributes.
_PORTS_V4 = "8s4s4s4s8sB3x4sH2x4sH2x"
_BOTH_V4 = struct.Struct(f">4s{_PORTS_V4}4s{_PORTS_V4}")
_NESTED = netlink.NLA_F_NESTED
_H_IP = _ATTRIBUTE.pack(20, _CTA_TUPLE_IP | _NESTED) + _ATTRIBUTE.pack(8, _CTA_IP_V4_SRC)
_H_DST = _ATTRIBUTE.pack(8, _CTA_IP_V4_DST)
_H_PROTO = _ATTRIBUTE.pack(28, _CTA_TUPLE_PROTO | _NESTED) + _ATTRIBUTE.pack(5, _CTA_PROTO_NUM)
_H_SPORT = _ATTRIBUTE.pack(6, _CTA_PROTO_SRC_PORT)
_H_DPORT = _ATTRIBUTE.pack(6, _CTA_PROTO_DST_PORT)
_H_ORIGINAL = _ATTRIBUTE.pack(52, _CTA_TUPLE_ORIG | _NESTED)
_H_REPLY = _ATTRIBUTE.pack(52, _CTA_TUPLE_REPLY | _NESTED)
_HEADERS = (_H_IP, _H_DST, _H_PROTO, _H_SPORT, _H_DPORT)


class Master(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The first packet of the connection whose helper announced another one."""

    protocol: int
    src: str
    dst: str
    sport: int
    dport: int


class Entry(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A connection. Ports are 0 for a protocol without ports, ICMP type and code for a protocol other than ICMP.

    ``timeout``: seconds until the kernel deletes it. ``status``: bits such as SEEN_REPLY. ``family``, ``zone``, ``id``
    and ``original`` (the tuple as the kernel encodes it) identify the connection in a request.
    """

    protocol: int
    src: str
    dst: str
    sport: int
    dport: int
    reply_src: str
    reply_dst: str
    reply_sport: int
    reply_dport: int
    icmp_type: int
    icmp_code: int
    mark: int
    status: int
    timeout: int
    id: int
    zone: int
    family: int
    original: bytes
    master: Master | None = None  # of a connection that a conntrack helper announced


def dump(namespace: str | None, *, mark: int = 0, mask: int = 0) -> list[Entry]:
    """All connections of a namespace, IPv4 and IPv6; with a ``mask`` those whose masked mark equals ``mark``.

    Raises NamespaceError, NetlinkError.
    """
    payload = _HEAD.pack(socket.AF_UNSPEC, 0, 0)
    if mask:
        payload += be32(_CTA_MARK, mark) + be32(_CTA_MARK_MASK, mask)
    with kept.netfilter(namespace) as ctnetlink:
        found = ctnetlink.dump(Message(_GET, payload=payload, what="list connections"))
    return [decode_entry(payload) for kind, payload in found if kind == _NEW]


def delete(namespace: str | None, entries: Iterable[Entry]) -> int:
    """Delete these connections; return how many of them still existed.

    They are identified by tuple and id, so that a new connection with the same tuple stays. The kernel's id is a hash
    over the entry's address in memory, among other things, so a new connection may rarely have the same id.

    Raises NamespaceError, NetlinkError.
    """
    requests = [
        Message(
            _DELETE,
            payload=_request_for(entry) + be32(_CTA_ID, entry.id),
            what=f"delete connection {_described(entry)}",
        )
        for entry in entries
    ]
    return carry_out(namespace, requests)


def set_mark(namespace: str | None, entries: Iterable[Entry], mark: int, mask: int = 0xFFFFFFFF) -> int:
    """Set the bits of ``mask`` in the marks of these connections to ``mark``; return how many still existed.

    They are identified by tuple only: the kernel ignores the id in this request.

    Raises NamespaceError, NetlinkError.
    """
    new = be32(_CTA_MARK, mark & mask) + be32(_CTA_MARK_MASK, mask)
    requests = [
        Message(_NEW, payload=_request_for(entry) + new, what=f"mark connection {_described(entry)}")
        for entry in entries
    ]
    return carry_out(namespace, requests)


def count(namespace: str | None) -> int:
    """The number of connections in a namespace. Raises NamespaceError, NetlinkError."""
    with kept.netfilter(namespace) as ctnetlink:
        return count_over(ctnetlink)


def count_over(ctnetlink: Socket) -> int:
    """:func:`count` of the namespace of the socket, those included that no packet has confirmed yet."""
    ask = Message(_GET_STATS, payload=_HEAD.pack(socket.AF_UNSPEC, 0, 0), what="count connections")
    answers = ctnetlink.request([ask])
    for answer in answers:
        values = attribute_map(answer.payload, _HEAD.size)
        if _CTA_STATS_GLOBAL_ENTRIES in values:
            return int.from_bytes(values[_CTA_STATS_GLOBAL_ENTRIES], "big")
    raise NetlinkError(errno.EBADMSG, "count connections")


def decode_entry(payload: bytes) -> Entry:
    """Raises NetlinkError (EBADMSG) when ``payload`` is not an nfgenmsg with a connection's attributes."""
    if len(payload) >= 4 + _BOTH_V4.size:
        (
            h_original, h1, src, h2, dst, h3, protocol, h4, sport, h5, dport,
            h_reply, r1, reply_src, r2, reply_dst, r3, _, r4, reply_sport, r5, reply_dport,
        ) = _BOTH_V4.unpack_from(payload, 4)  # fmt: skip
        if (
            h_original == _H_ORIGINAL
            and h_reply == _H_REPLY
            and (h1, h2, h3, h4, h5) == _HEADERS
            and (r1, r2, r3, r4, r5) == _HEADERS
        ):
            values = _numbers(payload, 4 + _BOTH_V4.size)
            if values.get(_CTA_STATUS, 0) & EXPECTED:
                return _decode_any(payload)
            return Entry(
                protocol=protocol,
                src=_v4(src),
                dst=_v4(dst),
                sport=sport,
                dport=dport,
                reply_src=_v4(reply_src),
                reply_dst=_v4(reply_dst),
                reply_sport=reply_sport,
                reply_dport=reply_dport,
                icmp_type=0,
                icmp_code=0,
                mark=values.get(_CTA_MARK, 0),
                status=values.get(_CTA_STATUS, 0),
                timeout=values.get(_CTA_TIMEOUT, 0),
                id=values.get(_CTA_ID, 0),
                zone=values.get(_CTA_ZONE, 0),
                family=_AF_INET,
                original=payload[_TUPLE_AT:_TUPLE_END],
            )
    return _decode_any(payload)


def _decode_any(payload: bytes) -> Entry:
    if len(payload) < _HEAD.size:
        raise NetlinkError(errno.EBADMSG, "connection", "cut short")
    values = attribute_map(payload, _HEAD.size)
    if _CTA_TUPLE_ORIG not in values or _CTA_TUPLE_REPLY not in values:
        raise NetlinkError(errno.EBADMSG, "connection", "a direction is missing")
    original = values[_CTA_TUPLE_ORIG]
    src, dst, protocol, sport, dport, icmp_type, icmp_code, zone = _direction(original)
    reply_src, reply_dst, _, reply_sport, reply_dport, _, _, _ = _direction(values[_CTA_TUPLE_REPLY])
    return Entry(
        protocol=protocol,
        src=src,
        dst=dst,
        sport=sport,
        dport=dport,
        reply_src=reply_src,
        reply_dst=reply_dst,
        reply_sport=reply_sport,
        reply_dport=reply_dport,
        icmp_type=icmp_type,
        icmp_code=icmp_code,
        mark=_big(values.get(_CTA_MARK)),
        status=_big(values.get(_CTA_STATUS)),
        timeout=_big(values.get(_CTA_TIMEOUT)),
        id=_big(values.get(_CTA_ID)),
        zone=_big(values.get(_CTA_ZONE)) or zone,
        family=payload[0],
        original=original,
        master=_master(values.get(_CTA_TUPLE_MASTER)),
    )


def _master(value: bytes | None) -> Master | None:
    if value is None:
        return None
    src, dst, protocol, sport, dport, _, _, _ = _direction(value)
    return Master(protocol=protocol, src=src, dst=dst, sport=sport, dport=dport)


def _direction(value: bytes) -> tuple[str, str, int, int, int, int, int, int]:
    values = attribute_map(value)
    ip = attribute_map(values.get(_CTA_TUPLE_IP, b""))
    proto = attribute_map(values.get(_CTA_TUPLE_PROTO, b""))
    return (
        _text(ip.get(_CTA_IP_V4_SRC) or ip.get(_CTA_IP_V6_SRC, b"")),
        _text(ip.get(_CTA_IP_V4_DST) or ip.get(_CTA_IP_V6_DST, b"")),
        _big(proto.get(_CTA_PROTO_NUM)),
        _big(proto.get(_CTA_PROTO_SRC_PORT)),
        _big(proto.get(_CTA_PROTO_DST_PORT)),
        _big(proto.get(_CTA_PROTO_ICMP_TYPE, proto.get(_CTA_PROTO_ICMPV6_TYPE))),
        _big(proto.get(_CTA_PROTO_ICMP_CODE, proto.get(_CTA_PROTO_ICMPV6_CODE))),
        _big(values.get(_CTA_TUPLE_ZONE)),
    )


def _numbers(payload: bytes, offset: int) -> dict[int, int]:
    """The attributes from ``offset`` on that have at most 4 bytes, as numbers."""
    found = {}
    unpack, from_bytes, end = _ATTRIBUTE.unpack_from, int.from_bytes, len(payload)
    while offset + 4 <= end:
        length, kind = unpack(payload, offset)
        if length < 4 or offset + length > end:
            raise NetlinkError(errno.EBADMSG, "connection", f"attribute {kind} of length {length}")
        if length <= 8:
            found[kind] = from_bytes(payload[offset + 4 : offset + length], "big")
        offset += (length + 3) & ~3
    return found


def _request_for(entry: Entry) -> bytes:
    if not entry.original:
        raise ValueError("a request without a tuple would match all connections")
    payload = _HEAD.pack(entry.family, 0, 0) + attribute(_CTA_TUPLE_ORIG | _NESTED, entry.original)
    return payload + be16(_CTA_ZONE, entry.zone) if entry.zone else payload


def carry_out(namespace: str | None, requests: Sequence[Message]) -> int:
    """Send these changes of connections; return how many of the connections existed.

    Raises NamespaceError, NetlinkError.
    """
    if not requests:
        return 0
    with kept.netfilter(namespace) as ctnetlink:
        answers = ctnetlink.exchange(requests)
    for request, answer in zip(requests, answers, strict=True):
        if answer.errno not in (0, errno.ENOENT):
            raise NetlinkError(answer.errno, request.what, answer.ext_ack)
    return sum(answer.errno == 0 for answer in answers)


def _described(entry: Entry) -> str:
    return f"{entry.protocol} {entry.src}:{entry.sport} to {entry.dst}:{entry.dport}"


@lru_cache(maxsize=1 << 16)
def _v4(packed: bytes) -> str:
    return socket.inet_ntop(socket.AF_INET, packed)


def _text(packed: bytes) -> str:
    if len(packed) == 16:
        return socket.inet_ntop(socket.AF_INET6, packed)
    return _v4(packed) if len(packed) == 4 else ""


def _big(value: bytes | None) -> int:
    return 0 if value is None else int.from_bytes(value, "big")
