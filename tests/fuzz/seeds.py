"""The first inputs of each target: messages as the program and the kernel send them.

``python -m fuzz.seeds`` writes those that are missing to the corpus.
"""

from __future__ import annotations

import hashlib
import struct
import sys

from msgspec.structs import replace

from fuzz.guest_targets import GUEST_HELLO, OTHER, SERVE, WEB
from fuzz.netlink_targets import DECODERS, LISTINGS, as_answer
from fuzz.payload_grammar import REAL, as_json
from fuzz.pieces import as_parts
from fuzz.targets import CORPUS
from fuzz.wire_targets import CALL, HEARTBEAT_KEY, MESSAGES
from guestbed.dhcp import message
from netloom.agent.kernel import addresses, links, neighbours, netlink, routes, rules
from netloom.agent.kernel.netlink import Message
from netloom.claimwire import EvacuationClaim, PlacementClaim, payloads
from netloom.extension.helper_client import ANSWER, BEAT, DOING, pack
from netloom.guest.dhcp import MessageType
from netloom.guestwire import (
    Ack,
    DropNetwork,
    GuestMessage,
    LendSockets,
    LentSockets,
    Listener,
    Notice,
    PasswordTaken,
    Ping,
    encode,
)
from netloom.heartbeatwire import NOBODY, PROOF_BYTES, Beat, Echo
from netloom.heartbeatwire import pack as pack_beat
from netloom.netobjects import Address, Neighbour, Route, Rule
from netloom.pairwire import Flows, FlowsEnd, Gone, Held, Holds, PairMessage, State, Stored, hello
from netloom.pairwire import encode as encode_pair
from netloom.placementwire import ReadPart, packed
from netloom.wire import Hello, Reply
from netloom.wire import encode as wire_encode

_REQUESTS = (
    b"GET /latest/meta-data/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET //latest/./meta-data/b%2fc?x HTTP/1.0\r\n\r\n",
    b"HEAD http://x/latest/user-data HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
    b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nDomU_Request: send_my_password\r\n\r\n" * 2,
    b"GET / HTTP/1.1\r\nHost: x\r\nDomU_Request: saved_password\r\n\r\n",
)

HELLO = Hello(version="1", build="b")
_OPTIONS = {50: b"\n\1\1-", 57: b"\5\xdc", 61: b"\xff\0"}
_CALL = (b"prepare-nic", b"/x", b"id", b"30 1.5", b"NETLOOM_DIR=/x", b"", b"{}")


def _body(message: bytes) -> bytes:
    return message[4:]


def _wire(*messages: Hello | Reply) -> bytes:
    return as_parts(*(_body(wire_encode(it)) for it in messages))


def _objects() -> list[Message]:
    at = Address(link="eth0", cidr="10.1.1.1/24")
    return [
        links.make_bridge("br0", "alias"),
        links.make_vlan("v101", "eth1", 101),
        links.make_vxlan("vx1", "eth1", 1, "239.0.0.1", 10),
        links.make_veth("h0", "br0", "g0", "02:00:00:00:00:01", 1450, 3),
        addresses.add_address(at),
        addresses.add_address(Address(link="eth0", cidr="fe80::1/64")),
        routes.replace_route(Route(table=300, destination="0.0.0.0/0", link="eth0", via="10.1.1.2", source="10.1.1.1")),
        rules.add_rule(Rule(priority=10001, mark=1, mask=1, table=300, source="10.0.0.0/8", iif="eth0")),
        neighbours.replace_neighbour(Neighbour(link="eth0", address="10.1.1.2", mac="02:00:00:00:00:01")),
    ]


def _connection() -> bytes:
    """A TCP connection as ctnetlink lists it."""
    tuples = b""
    for kind, (src, dst) in ((1, (b"\n\1\1\2", b"\xc0\0\2\1")), (2, (b"\xc0\0\2\1", b"\n\1\1\2"))):
        ip = netlink.nested(1, netlink.attribute(1, src), netlink.attribute(2, dst))
        proto = netlink.nested(2, netlink.u8(1, 6), netlink.be16(2, 1000), netlink.be16(3, 80))
        tuples += netlink.nested(kind, ip, proto)
    return b"\2\0\0\0" + tuples + netlink.be32(3, 8) + netlink.be32(7, 60) + netlink.be32(12, 7)


def _nftables() -> list[Message]:
    """A chain, a rule, a set, an element and a counter as nf_tables lists them."""
    table, head = netlink.text(1, "netloom"), b"\1\0\0\0"
    expression = netlink.nested(1, netlink.text(1, "cmp"), netlink.nested(2, netlink.be32(1, 1)))
    element = netlink.nested(1, netlink.nested(1, netlink.text(1, "eth0")))
    payloads = (
        table
        + netlink.text(3, "input")
        + netlink.nested(4, netlink.be32(1, 1))
        + netlink.be32(5, 0)
        + netlink.text(7, "filter"),
        table + netlink.text(2, "input") + netlink.attribute(3, bytes(8)) + netlink.nested(4, expression),
        table + netlink.text(2, "x") + netlink.be32(3, 8) + netlink.be32(5, 4),
        table + netlink.text(2, "x") + netlink.nested(3, element),
        table + netlink.text(2, "c") + netlink.be32(3, 1),
        netlink.be32(1, 7) + netlink.be32(2, 1) + netlink.text(3, "nft"),
    )
    return [
        Message(10 << 8 | it, payload=head + payload)
        for it, payload in zip((3, 6, 9, 12, 18, 15), payloads, strict=True)
    ]


def _claims() -> list[bytes]:
    """Both kinds of claims, with a signature of each kind of key."""
    frames = []
    for claim in (PlacementClaim("o", "net-204", 2, "h2"), EvacuationClaim("o", "h1", 1 << 31, "h2")):
        for name, body in (
            (b"ssh-ed25519", bytes(64)),
            (b"rsa-sha2-512", bytes(256)),
            (b"ecdsa-sha2-nistp256", b"\0\0\0\1\1" * 2),
            (b"ecdsa-sha2-nistp521", b"\0\0\0\2\1\1" * 2),
        ):
            signature = b"".join(len(it).to_bytes(4, "big") + it for it in (name, body))
            frames += payloads("net-204", claim, [signature])[0]
    return frames


def _heartbeats() -> list[Beat]:
    """One of each member, with all kinds of echoes."""
    echo = Echo(b"12345678", 1 << 40)
    first = Beat(
        group_id="0000002a",
        sender=0,
        boot=b"abcdefgh",
        seq=1,
        sent=1 << 41,
        heard=(None, echo, None),
        greeting=(None, None, echo),
        term=2,
        active=0,
        released=False,
        voted=3,
        grants=NOBODY,
        grants_term=0,
        wants=5,
        ready=True,
    )
    second = replace(first, sender=1, heard=(echo, None, echo), greeting=(None, None, None), grants=0, grants_term=2)
    return [first, second, replace(second, sender=2, heard=(echo, echo, None), released=True, wants=0)]


def _pair() -> list[bytes]:
    """Messages of two hosts, whole and in several records, and what a stranger may repeat."""
    messages: tuple[PairMessage, ...] = (
        Gone(scope_id="net-205"),
        Holds(scopes=(Held("net-204", 2, 1, 9),)),
        State(scope_id="net-204", epoch=2, joined=1, revision=9, data=b"{}"),
        Stored(scope_id="net-204", revision=9),
        Flows(scope_id="net-204", create=bytes(30), delete=bytes(30)),
        FlowsEnd(scope_id="net-204", token=1),
    )
    bodies = [encode_pair(it) for it in messages]
    halves = [part for body in bodies for part in (b"\1" + body[:9], b"\0" + body[9:])]
    return [as_parts(*(b"\0" + it for it in bodies)), as_parts(*halves), hello(bytes(32), 1, bytes(32))]


def seeds() -> dict[str, list[bytes]]:
    """The first inputs, by target."""
    done = Message(netlink.NLMSG_DONE, 2, struct.pack("=i", 0), 1)
    refused = Message(netlink.NLMSG_ERROR, 0x300, struct.pack("=i", -22) + bytes(16) + netlink.text(1, "no"), 1)
    objects = [*_objects(), *_nftables(), Message(256, payload=_connection())]
    sent = [Message(it.type, 2, it.payload, 1) for it in objects]
    ids = {"scope_id": "net-204", "network_id": "204"}
    notices = (PasswordTaken(**ids, nic="n", password_id="1"), Notice(scope_id="s", network_id="1", nic="n", text="x"))
    answers: tuple[GuestMessage, ...] = (
        GUEST_HELLO,
        Ack(seq=1),
        LentSockets(seq=2, listeners=(Listener("dhcp"),)),
        Ack(seq=3, error="no"),
        *notices,
    )
    requests: tuple[GuestMessage, ...] = (Ping(seq=1), SERVE, LendSockets(seq=2, **ids), DropNetwork(seq=3, **ids))
    macs = (WEB.mac, OTHER.mac)
    return {
        "payload": [f"{command}\n".encode() + as_json(file) for command, file in REAL],
        "calls": [bytes(range(at, at + 200)) for at in (0, 17, 40, 55)],
        "details": [as_json({"host": "h1", "namespace": "netloom-net-204", "epoch": 2, "previous": "h2,h3"})],
        "state-file": [it.read_bytes() for it in sorted(CORPUS.parents[1].glob("golden/*/state.json"))],
        "host": [
            _wire(
                HELLO,
                Reply(call_id="a", output="x"),
                Reply(call_id="b", status=3, error="no", hint="x"),
            ),
            b"\0Welcome to host1\r\n",
        ],
        "caller": [as_parts(_body(wire_encode(HELLO)), _body(wire_encode(CALL)))],
        "placement": [bytes((at,)) + packed(ReadPart(token="t")) for at in range(len(MESSAGES))],
        "claim": _claims(),
        "heartbeat": [pack_beat(it, HEARTBEAT_KEY)[:-PROOF_BYTES] for it in _heartbeats()],
        "pair": _pair(),
        "helper": [as_parts(_body(pack(BEAT)), _body(pack(DOING, b"x")), _body(pack(ANSWER, b"1", b"out", b"error")))],
        "helper-client": [as_parts(_body(pack(*_CALL)))],
        "guest-process": [b"\1" + as_parts(*(encode(it) for it in answers))],
        "agent": [b"\1" + as_parts(*(encode(it) for it in requests))],
        "dhcp": [message(kind, mac, _OPTIONS) for kind in MessageType for mac in macs],
        "metadata": [bytes((at * 7,)) + it for at, it in enumerate(_REQUESTS)],
        "password": [bytes((at * 7,)) + it for at, it in enumerate(_REQUESTS)],
        "netlink-object": [bytes((at,)) + it.payload for it in objects for at in range(len(DECODERS))],
        "netlink-answer": [
            as_answer(at, *sent[part : part + 8], done) for at in range(len(LISTINGS)) for part in (0, 8)
        ]
        + [as_answer(at, refused) for at in (0, 3, 18)],
        "netlink-event": [as_answer(at, it) for at in (0, 1) for it in sent],
    }


def main() -> int:
    """Write the seeds that are missing to the corpus."""
    for target, found in seeds().items():
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        for it in found:
            (CORPUS / target / hashlib.sha256(it).hexdigest()[:16]).write_bytes(it)
    return 0


if __name__ == "__main__":
    sys.exit(main())
