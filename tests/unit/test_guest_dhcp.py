"""DHCP replies. golden/dhcp/<name>.txt has the messages of an exchange as text, compared with RFC 2131 by a person."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from guestbed import SERVER, network, nic
from guestbed.dhcp import COMMON, describe, message, option, options_of, reply_to
from netloom.guest.dhcp import BROADCAST_IP, MessageType
from netloom.guest.table import GuestTable
from netloom.guestwire import option_bytes

GOLDEN = Path(__file__).parents[1] / "golden" / "dhcp"

WEB = nic(45, hostname="web-1")
SECOND = nic(46, hostname="web-1", default_nic=False)
TUNED = nic(47, options={42: option_bytes(42, "192.0.2.123"), 66: option_bytes(66, "boot.example")})
UNLEASED = nic(48, dhcp=False)
TABLE = GuestTable(network(WEB, SECOND, TUNED, UNLEASED, mtu=1450))

BROADCAST = 0x8000


def address(text: str) -> bytes:
    return socket.inet_aton(text)


def at(ip: str, server: str = SERVER) -> dict[int, bytes]:
    return {50: address(ip), 54: address(server)}


# The messages of a client, in order. The server stores nothing between them.
SCENARIOS: dict[str, list[bytes]] = {
    "boot": [message(MessageType.DISCOVER, WEB.mac), message(MessageType.REQUEST, WEB.mac, at(WEB.ip))],
    "boot-of-a-client-that-wants-broadcasts": [
        message(MessageType.DISCOVER, WEB.mac, flags=BROADCAST),
        message(MessageType.REQUEST, WEB.mac, at(WEB.ip), flags=BROADCAST),
    ],
    "boot-of-a-second-nic": [
        message(MessageType.DISCOVER, SECOND.mac),
        message(MessageType.REQUEST, SECOND.mac, at(SECOND.ip)),
    ],
    "boot-with-options-of-its-own": [message(MessageType.DISCOVER, TUNED.mac, {55: bytes([15, 3, 1])})],
    "boot-of-a-client-with-an-id": [message(MessageType.DISCOVER, WEB.mac, {61: b"\xff\0\0\0\1id", 55: b"\3"})],
    "reboot": [message(MessageType.REQUEST, WEB.mac, {50: address(WEB.ip)})],
    "reboot-from-another-network": [message(MessageType.REQUEST, WEB.mac, {50: address("192.168.7.7")})],
    "renew": [message(MessageType.REQUEST, WEB.mac, ciaddr=WEB.ip)],
    "rebind": [message(MessageType.REQUEST, WEB.mac, ciaddr=WEB.ip, flags=BROADCAST)],
    "renew-of-an-address-that-is-another-vms-now": [message(MessageType.REQUEST, WEB.mac, ciaddr=SECOND.ip)],
    "another-address-than-was-offered": [message(MessageType.REQUEST, WEB.mac, at("10.1.1.99"))],
    "another-server-was-chosen": [message(MessageType.REQUEST, WEB.mac, at(WEB.ip, "10.1.1.2"))],
    "inform": [message(MessageType.INFORM, WEB.mac, ciaddr=WEB.ip)],
    "inform-from-an-address-that-is-not-its-own": [message(MessageType.INFORM, WEB.mac, ciaddr="10.1.1.99")],
    "decline-and-ask-again": [
        message(MessageType.DECLINE, WEB.mac, at(WEB.ip)),
        message(MessageType.DISCOVER, WEB.mac),
    ],
    "release-and-ask-again": [
        message(MessageType.RELEASE, WEB.mac, {54: address(SERVER)}, ciaddr=WEB.ip),
        message(MessageType.DISCOVER, WEB.mac),
    ],
    "unknown-mac": [
        message(MessageType.DISCOVER, "02:00:00:00:00:99"),
        message(MessageType.REQUEST, "02:00:00:00:00:99", {50: address(WEB.ip)}),
        message(MessageType.REQUEST, "02:00:00:00:00:99", {50: address("192.168.7.7")}),
        message(MessageType.REQUEST, "02:00:00:00:00:99", ciaddr=WEB.ip),
    ],
    "nic-without-a-lease": [message(MessageType.DISCOVER, UNLEASED.mac)],
    "through-a-relay": [message(MessageType.DISCOVER, WEB.mac, giaddr="10.1.1.7")],
}  # fmt: skip


@pytest.mark.parametrize("name", SCENARIOS)
def test_golden(name: str) -> None:
    said = []
    for packet in SCENARIOS[name]:
        reply = reply_to(packet, TABLE)
        said.append("> " + describe(packet))
        said.append("< " + describe(*reply) if reply else "< nothing")
    text = "\n".join(said) + "\n"
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("NETLOOM_WRITE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text


def test_every_golden_file_has_its_scenario() -> None:
    assert {path.stem for path in GOLDEN.iterdir()} == set(SCENARIOS)


def offered(packet: bytes, table: GuestTable = TABLE) -> dict[int, bytes]:
    reply = reply_to(packet, table)
    assert reply is not None
    return dict(options_of(reply.packet))


def test_options_have_the_requested_order_with_the_mask_before_the_router() -> None:
    reply = reply_to(message(MessageType.DISCOVER, WEB.mac, {55: bytes([15, 6, 3, 1, 12, 12, 200])}), TABLE)
    assert reply is not None
    codes = [code for code, _ in options_of(reply.packet)]
    assert codes == [53, 54, 51, 58, 59, 1, 15, 6, 3, 12, 26]


def test_a_client_without_a_parameter_request_list_gets_all_options() -> None:
    bare = message(MessageType.DISCOVER, WEB.mac, {55: b""})
    assert set(offered(bare)) == {53, 54, 51, 58, 59, *COMMON}


def test_the_lease_time_is_twelve_hours_by_default_and_never_infinite() -> None:
    assert offered(message(MessageType.DISCOVER, WEB.mac))[51] == (12 * 3600).to_bytes(4, "big")
    hour = GuestTable(network(WEB, lease_s=3600))
    options = offered(message(MessageType.DISCOVER, WEB.mac), hour)
    assert [int.from_bytes(options[code], "big") for code in (51, 58, 59)] == [3600, 1800, 3150]
    for seconds in (0, 59, 0x80000000, 0xFFFFFFFF):
        with pytest.raises(ValueError, match="lease_s"):
            GuestTable(network(WEB, lease_s=seconds))


def test_a_reply_has_at_most_the_maximum_size_of_the_client_and_the_mtu() -> None:
    long = nic(45, options={code: bytes(200) for code in range(200, 206)})
    table, narrow = GuestTable(network(long)), GuestTable(network(long, mtu=1000))
    for announced, most in ((b"", 548), (b"\0\1", 548), (b"\3\x20", 772), (b"\xff\xff", 1472)):
        small = reply_to(message(MessageType.DISCOVER, long.mac, {57: announced} if announced else {}), narrow)
        assert small is not None
        assert len(small.packet) <= min(most, 972)  # a larger reply would be fragmented on this segment
        reply = reply_to(message(MessageType.DISCOVER, long.mac, {57: announced} if announced else {}), table)
        assert reply is not None
        assert most - 202 < len(reply.packet) <= most
        assert {51, 53, 54} <= set(dict(options_of(reply.packet)))


def test_an_option_longer_than_255_bytes_is_split() -> None:
    long = nic(45, options={43: bytes(range(256)) * 2})
    reply = reply_to(message(MessageType.DISCOVER, long.mac, {57: b"\5\xdc"}), GuestTable(network(long)))
    assert reply is not None
    pieces = [value for code, value in options_of(reply.packet) if code == 43]
    assert [len(piece) for piece in pieces] == [255, 255, 2]
    assert b"".join(pieces) == long.options[43]


def test_options_in_the_file_and_sname_fields_are_read() -> None:
    requested, server = option(50, address(WEB.ip)), option(54, address(SERVER)) + b"\xff"
    spread = message(MessageType.REQUEST, WEB.mac, {52: b"\3"}, file=requested, sname=server)
    reply = reply_to(spread, TABLE)
    assert reply is not None
    assert dict(options_of(reply.packet))[53] == bytes([MessageType.ACK])
    # Without the overload option (52) the fields have no options.
    assert reply_to(message(MessageType.REQUEST, WEB.mac, {}, file=requested, sname=server), TABLE) is None


@pytest.mark.parametrize(
    ("offset", "value"), [(0, 2), (1, 6), (2, 8), (236, 0)], ids=["a reply", "not Ethernet", "a long MAC", "BOOTP"]
)
def test_a_packet_that_is_no_dhcp_request_gets_no_reply(offset: int, value: int) -> None:
    packet = bytearray(message(MessageType.DISCOVER, WEB.mac))
    packet[offset] = value
    assert reply_to(bytes(packet), TABLE) is None


@pytest.mark.parametrize(
    "kind", [MessageType.OFFER, MessageType.ACK, MessageType.NAK, MessageType.DECLINE, MessageType.RELEASE]
)
def test_messages_of_servers_declines_and_releases_get_no_reply(kind: MessageType) -> None:
    assert reply_to(message(kind, WEB.mac, at(WEB.ip), ciaddr=WEB.ip), TABLE) is None


def test_an_ack_is_unicast_only_to_a_client_that_already_has_the_address() -> None:
    def to(packet: bytes) -> str:
        reply = reply_to(packet, TABLE)
        assert reply is not None
        return reply.to

    assert to(message(MessageType.REQUEST, WEB.mac, ciaddr=WEB.ip)) == WEB.ip
    assert to(message(MessageType.REQUEST, WEB.mac, {50: address(WEB.ip)}, ciaddr="10.1.1.99")) == BROADCAST_IP
    assert to(message(MessageType.DISCOVER, WEB.mac, ciaddr=WEB.ip)) == BROADCAST_IP


def test_options_of_the_nic_replace_those_of_the_network() -> None:
    own = nic(45, default_nic=False, options={3: address("10.1.1.254"), 26: b"\x23\x28"})
    options = offered(message(MessageType.DISCOVER, own.mac), GuestTable(network(own, mtu=1450)))
    assert (options[3], options[26]) == (address("10.1.1.254"), b"\x23\x28")
    assert not {6, 15, 119} & set(options)


@pytest.mark.parametrize("bad", [{"mac": "02:00:00:00:00"}, {"ip": "10.1.1.300"}, {"prefix_len": 33}, {"gateway": "x"}])
def test_a_table_that_cannot_be_served_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        GuestTable(network(nic(45, **bad)))
