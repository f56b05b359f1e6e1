"""Properties of the code that parses bytes of tenants: no exceptions, and valid answers with the owner's data only."""

from __future__ import annotations

import asyncio
import socket
from urllib.parse import quote

import h11
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guestbed import SERVER, network, nic
from guestbed.dhcp import check_reply, message, reply_to
from guestbed.http import converse
from netloom.guest import http, metadata, password
from netloom.guest.dhcp import MessageType
from netloom.guest.table import GuestTable, mac_bytes
from netloom.guestwire import GuestNic
from netloom.secret import Secret

WEB = nic(45, options={43: bytes(300), 66: b"boot"}, password=Secret("FAKE-pass"), metadata={"a": "1", "b": ""})
OTHER = nic(46, default_nic=False)
TABLE = GuestTable(network(WEB, OTHER, mtu=1450))
NICS = {mac_bytes(it.mac): it for it in (WEB, OTHER)}

options = st.dictionaries(st.integers(1, 254), st.binary(max_size=80), max_size=8)
real_options = st.fixed_dictionaries(
    {},
    optional={
        50: st.sampled_from([socket.inet_aton(it.ip) for it in (WEB, OTHER)]) | st.binary(min_size=3, max_size=5),
        54: st.just(socket.inet_aton(SERVER)) | st.binary(min_size=4, max_size=4),
        55: st.binary(max_size=40),
        57: st.binary(min_size=2, max_size=2),
        61: st.binary(min_size=2, max_size=255),
        52: st.binary(min_size=1, max_size=1),
    },
)
messages = st.builds(
    message,
    st.sampled_from(MessageType),
    st.sampled_from([WEB.mac, OTHER.mac, "02:00:00:00:00:99"]),
    options | real_options,
    ciaddr=st.sampled_from(["0.0.0.0", WEB.ip, OTHER.ip, "10.1.1.99"]),
    giaddr=st.sampled_from(["0.0.0.0", "0.0.0.0", "10.1.1.7"]),
    flags=st.sampled_from([0, 0x8000, 0xFFFF]),
    tail=st.binary(max_size=20),
    sname=st.binary(max_size=64),
    file=st.binary(max_size=128),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    packet = bytearray(draw(messages))
    for _ in range(draw(st.integers(0, 4))):
        packet[draw(st.integers(0, len(packet) - 1))] = draw(st.integers(0, 255))
    return bytes(packet[: draw(st.integers(0, len(packet)))])


@settings(max_examples=600)
@given(st.binary(max_size=700) | messages | damaged())
@example(b"")
def test_any_packet_gets_a_valid_reply_or_none(packet: bytes) -> None:
    reply = reply_to(packet, TABLE)
    if reply is not None:
        check_reply(packet, reply, NICS[packet[28:34]])


@given(messages)
def test_the_same_request_gets_the_same_reply(packet: bytes) -> None:
    assert reply_to(packet, TABLE) == reply_to(packet, TABLE)


# ---- HTTP


def conversation(chunks: list[bytes], site: http.Site) -> bytes:
    """The bytes that one connection answers to ``chunks``."""
    failures: list[dict[str, object]] = []
    with asyncio.Runner() as runner:
        runner.get_loop().set_exception_handler(lambda _, context: failures.append(context))
        said = runner.run(converse(chunks, site))
    assert failures == []
    return said


def metadata_site(of: GuestNic) -> http.Site:
    return lambda request: metadata.respond(request, of)


def password_site(request: h11.Request) -> http.HttpAnswer:
    return password.respond(request, WEB.password).answer


heads = st.lists(
    st.sampled_from(
        [
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET /latest/meta-data/a HTTP/1.0\r\n\r\n",
            b"HEAD /latest/meta-data/a HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
            b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
            b"GET http://x/latest/ HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1\r\n\r\n",
            b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost:",
            b"\r\n\r\n",
            b"\0\xff\x16\x03\x01",
        ]
    ),
    max_size=4,
)


@settings(max_examples=150)
@given(heads | st.lists(st.binary(max_size=200), max_size=4))
def test_any_bytes_get_an_http_answer_or_none(chunks: list[bytes]) -> None:
    said = conversation(chunks, metadata_site(WEB))
    assert not said or said.startswith(b"HTTP/1.1 ")
    assert b"FAKE-pass" not in said


@settings(max_examples=150)
@given(heads | st.lists(st.binary(max_size=200), max_size=4))
def test_a_password_is_sent_only_for_send_my_password(chunks: list[bytes]) -> None:
    said = conversation(chunks, password_site)
    assert not said or said.startswith(b"HTTP/1.1 ")
    assert b"FAKE-pass" not in said


@settings(max_examples=100)
@given(st.integers(1, 40))
def test_requests_may_arrive_in_pieces_of_any_size(size: int) -> None:
    request = b"GET /latest/meta-data/a HTTP/1.1\r\nHost: x\r\n\r\n" * 3
    pieces = [request[at : at + size] for at in range(0, len(request), size)]
    assert conversation(pieces, metadata_site(WEB)).count(b"\r\n\r\n1") == 3


# Names of another meaning in a path are left out.
names = st.text(min_size=1, max_size=30).filter(lambda name: name.lower() not in ("user-data", "meta-data", ".", ".."))


@given(st.dictionaries(names, st.text(max_size=50), max_size=6), st.text(max_size=200))
def test_every_metadata_item_is_served_unchanged_at_both_paths(items: dict[str, str], user_data: str) -> None:
    of = nic(45, metadata=items, user_data=Secret(user_data))

    def get(path: str) -> http.HttpAnswer:
        return metadata.respond(h11.Request(method="GET", target=path, headers=[("Host", "x")]), of)

    assert get("/latest/user-data") == http.HttpAnswer(200, user_data.encode())
    listed = get("/latest/meta-data/")
    assert listed.body.decode() == "".join(f"{name}\n" for name, text in items.items() if text)
    for name, text in items.items():
        there = http.HttpAnswer(200, text.encode()) if text else http.HttpAnswer(404)
        assert get(f"/latest/meta-data/{quote(name, safe='')}") == there
        assert get(f"/latest/{quote(name, safe='')}") == there
