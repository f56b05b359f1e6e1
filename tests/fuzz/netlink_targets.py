"""What the kernel answers to netlink requests and reports in events: any bytes are a value or a NetlinkError."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

from fuzz.payload_laws import check_refusal
from fuzz.pieces import Bytes
from netloom.agent.kernel import (
    addresses,
    conntrack,
    links,
    neighbours,
    netlink,
    nft_netlink,
    nft_rules,
    nft_watch,
    routes,
    rules,
    watch,
)
from netloom.agent.kernel.netlink import Message, NetlinkError, Socket
from netloom.agent.kernel.nft_rules import Table

NAMES = {1: "lo", 2: "eth0"}
_KERNEL = (0, 0)
_STEPS_MAX = 4000  # datagrams that one listing may receive before the kernel is silent


class _FakeSocket:
    """The socket below a netlink socket: it gives the datagrams one after the other, and then none."""

    def __init__(self, datagrams: list[bytes]) -> None:
        self._datagrams = list(datagrams)
        self._steps = 0

    def sendto(self, data: bytes, address: tuple[int, int]) -> int:
        return len(data)

    def _next(self) -> bytes:
        self._steps += 1
        assert self._steps < _STEPS_MAX, "an endless loop"
        if not self._datagrams:
            raise BlockingIOError
        data = self._datagrams.pop(0)
        if data[:1] == b"\xee":  # messages were dropped
            raise OSError(105, "no buffer space")
        return data

    def recvmsg_into(self, buffers: list[bytearray]) -> tuple[int, list[Any], int, tuple[int, int]]:
        data = self._next()
        fits = data[: len(buffers[0])]
        buffers[0][: len(fits)] = fits
        flags = socket.MSG_TRUNC if len(data) > len(fits) else 0
        return len(fits), [], flags, _KERNEL

    def recvmsg(self, size: int) -> tuple[bytes, list[Any], int, tuple[int, int]]:
        return self._next()[:size], [], 0, _KERNEL


def _socket(datagrams: list[bytes]) -> Socket:
    made = Socket.__new__(Socket)
    made._socket = cast(Any, _FakeSocket(datagrams))
    made._messages_max = 100
    made._sequence = 0
    made._buffer = bytearray(1 << 16)
    return made


def _refused(deed: Callable[[], object]) -> None:
    """Run ``deed``: it may raise NetlinkError, in one line, and nothing else."""
    try:
        deed()
    except NetlinkError as error:
        check_refusal(error)


# ---- single objects

DECODERS: tuple[Callable[[bytes], object], ...] = (
    netlink.decode,
    netlink.attributes,
    netlink.kind_of,
    lambda it: netlink.decode_error(it, 0x300),
    lambda it: netlink._decode_acknowledgement(it, 0x200),
    links.decode_link,
    lambda it: addresses.decode_address(it, NAMES),
    lambda it: routes.decode_route(it, NAMES),
    rules.decode_rule,
    lambda it: neighbours.decode_neighbour(it, NAMES),
    conntrack.decode_entry,
    conntrack._decode_any,
    lambda it: nft_rules.Rule("input", 1, it).expressions(),
)


def take_object(data: bytes) -> None:
    """One object; the first byte chooses the decoder."""
    given = Bytes(data)
    decoder = DECODERS[given.number() % len(DECODERS)]
    body = given.rest()
    _refused(lambda: decoder(body))
    if decoder is conntrack.decode_entry:
        _check_entries_agree(body)


def _check_entries_agree(body: bytes) -> None:
    """The fast way and the general one decode the same, except what the fast one leaves to the general one."""
    with contextlib.suppress(NetlinkError):
        fast, general = conntrack.decode_entry(body), conntrack._decode_any(body)
        assert (fast.src, fast.dst, fast.sport, fast.dport) == (general.src, general.dst, general.sport, general.dport)


# ---- whole answers

_TABLE = Table("inet", "netloom")
LISTINGS: tuple[Callable[[Socket], object], ...] = (
    links.list_links_over,
    lambda it: links.list_links_over(it, kind="bridge", master=2),
    lambda it: links.find_links_over(it, ["eth0", 2]),
    lambda it: links.change_over(
        it, [links.set_up("eth0"), links.make_bridge("br0", "alias"), links.set_master("br0", "x")]
    ),
    lambda it: addresses.list_addresses_over(it, NAMES),
    lambda it: routes.list_routes_over(it, NAMES),
    rules.list_rules_over,
    lambda it: neighbours.list_neighbours_over(it, NAMES),
    lambda it: nft_netlink.chains(it, "inet", "netloom"),
    lambda it: nft_netlink.rules(it, "inet", "netloom"),
    lambda it: nft_netlink.sets(it, "inet", "netloom"),
    lambda it: nft_netlink.link_names(it, "inet", "netloom", "x"),
    lambda it: nft_netlink.link_marks(it, "bridge", "netloom", "x"),
    lambda it: nft_netlink.lives(it, "bridge", "netloom", "x"),
    lambda it: nft_netlink.counters(it, "inet", "netloom"),
    nft_netlink.generation,
    nft_rules.list_chains,
    nft_rules.owned_tables,
    lambda it: [rule.expressions() for rule in nft_rules.list_rules(it, _TABLE)],
    lambda it: nft_rules.set_keys(it, _TABLE, "x"),
    lambda it: it.request([Message(16, what="one"), Message(17, what="two")]),
    lambda it: [conntrack.decode_entry(payload) for _, payload in it.dump(Message(257))],
)


def take_answer(data: bytes) -> None:
    """The datagrams of an answer. The first byte chooses the request. Each datagram is raw, or made of messages.

    Messages are made here with the sequence number that is waited for: a fuzzer would rarely find it.
    """
    given = Bytes(data)
    listing = LISTINGS[given.number() % len(LISTINGS)]
    datagrams = [_datagram(Bytes(part)) for part in given.parts()]
    _refused(lambda: listing(_socket(datagrams)))


def _datagram(given: Bytes) -> bytes:
    how = given.number()
    if how == 0:
        return given.rest()
    if how == 1:
        return b"\xee"
    messages = []
    for part in _messages(given):
        kind, flags, sequence = part.number() | part.number() << 8, part.number() | part.number() << 8, part.number()
        messages.append(netlink.encode(Message(kind, flags, part.rest(), sequence)))
    return b"".join(messages)


def _messages(given: Bytes) -> Iterator[Bytes]:
    while part := given.take(given.number()):
        yield Bytes(part)


def as_answer(listing: int, *messages: Message) -> bytes:
    """The bytes from which :func:`take_answer` makes one datagram of these messages."""
    body = b"\2"
    for it in messages:
        part = it.type.to_bytes(2, "little") + it.flags.to_bytes(2, "little") + bytes((it.sequence,)) + it.payload
        body += bytes((len(part),)) + part if len(part) < 256 else b""
    return bytes((listing,)) + len(body).to_bytes(2, "big") + body


# ---- events


def take_events(data: bytes) -> None:
    """The datagrams that a watch receives. The first byte chooses the watch."""
    given = Bytes(data)
    kind = given.number() % 2
    datagrams = [_datagram(Bytes(part)) for part in given.parts()]
    _refused((_read_links, _read_nftables)[kind](datagrams))


def _read_links(datagrams: list[bytes]) -> Callable[[], object]:
    made = watch.Watch.__new__(watch.Watch)
    made._wanted = frozenset(("link", "address", "route", "rule", "neighbour"))
    made.names = dict(NAMES)
    return _read(made, datagrams)


def _read_nftables(datagrams: list[bytes]) -> Callable[[], object]:
    made = nft_watch.NftWatch.__new__(nft_watch.NftWatch)
    made._names = [b"netloom\0"]
    made._lost = False
    return _read(made, datagrams)


def _read(made: watch.Watch | nft_watch.NftWatch, datagrams: list[bytes]) -> Callable[[], object]:
    made._what = "watch"
    made._socket = cast(Any, _FakeSocket(datagrams))
    return made.read
