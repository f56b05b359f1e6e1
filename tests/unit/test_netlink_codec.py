"""The netlink codec without a kernel: round trips, malformed bytes, and a comparison with pyroute2."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from kernel.rtnetlink import add_address, add_route, add_rule
from netloom.agent.kernel import addresses, conntrack, links, netlink, routes, rules
from netloom.agent.kernel.netlink import Message, NetlinkError
from netloom.agent.kernel.routes import RouteRow
from netloom.netobjects import Route, Rule

U16, U32 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
MESSAGES = st.builds(Message, type=U16, flags=U16, payload=st.binary(max_size=200), sequence=U32)
ATTRIBUTES = st.lists(st.tuples(st.integers(0, netlink.NLA_TYPE_MASK), st.binary(max_size=60)), max_size=8)


@given(st.lists(MESSAGES, max_size=5))
def test_messages_round_trip(messages: list[Message]) -> None:
    assert netlink.decode(b"".join(map(netlink.encode, messages))) == messages


@given(ATTRIBUTES)
def test_attributes_round_trip(attributes: list[tuple[int, bytes]]) -> None:
    encoded = b"".join(netlink.attribute(kind, value) for kind, value in attributes)
    assert netlink.attributes(encoded) == attributes
    ((kind, inner),) = netlink.attributes(netlink.nested(7, encoded))
    assert (kind, inner) == (7, encoded)


def test_an_attribute_too_long_for_its_length_field_is_refused() -> None:
    assert len(netlink.attribute(1, bytes(65531))) == 65536
    with pytest.raises(ValueError):
        netlink.attribute(1, bytes(65532))


def _decode_everything(data: bytes) -> None:
    decoders: list[Any] = [
        netlink.decode,
        netlink.attributes,
        lambda it: netlink.decode_error(it, 0x300),
        links.decode_link,
        lambda it: addresses.decode_address(it, {}),
        lambda it: routes.decode_route(it, {}),
        rules.decode_rule,
        conntrack.decode_entry,
    ]
    for decoder in decoders:
        try:
            decoder(data)
        except NetlinkError as error:
            if error.errno != errno.EBADMSG:
                raise


@given(st.binary(max_size=300))
@example(b"")
@example(b"\x10\0\0\0" + bytes(12))
@example(b"\x04\0\0\0" * 8)
def test_any_bytes_are_decoded_or_refused(data: bytes) -> None:
    _decode_everything(data)


@given(st.data())
def test_damaged_messages_are_decoded_or_refused(data: st.DataObject) -> None:
    whole = bytearray(data.draw(st.sampled_from([_tcp_entry(), *(message.payload for message in _requests())])))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    _decode_everything(bytes(whole[: data.draw(st.integers(0, len(whole)))]))


def test_the_kernels_message_is_found_after_quoted_and_capped_requests() -> None:
    words = netlink.text(1, "Nexthop has invalid gateway")
    header = struct.pack("=IHHII", 36, 24, 0, 1, 0)
    capped = struct.pack("=i", -errno.ENETUNREACH) + header + words
    quoted = struct.pack("=i", -errno.ENETUNREACH) + header + bytes(20) + words
    decode = netlink._decode_acknowledgement
    assert decode(capped, 0x300) == (errno.ENETUNREACH, "Nexthop has invalid gateway")
    assert decode(quoted, 0x200) == (errno.ENETUNREACH, "Nexthop has invalid gateway")
    assert decode(capped[:20], 0) == (errno.ENETUNREACH, "")


def test_an_error_names_the_request_and_the_kernels_message() -> None:
    error = NetlinkError(errno.EEXIST, "make bridge br0", "Device is busy")
    assert str(error) == "make bridge br0: File exists: Device is busy"
    assert error.exit_code == 3


# Comparison with pyroute2


def _requests() -> list[Message]:
    return [
        links.make_bridge("br0"),
        links.make_veth("vnetg7", "br0", "gst-7", "0a:00:00:00:00:01", 1450, 9),
        links.make_vlan("eth1.7", "eth1", 7),
        add_address("gst-7", "10.1.1.1/24"),
        add_route("0.0.0.0/0", "gst-7", "10.1.1.254", "10.1.1.1", table=20007),
        add_rule(20007, 7, 0xFFFF, 20007),
    ]


def _seen_by_pyroute2(kind: Any, message: Message) -> Any:
    seen = kind(netlink.encode(message))
    seen.decode()
    return seen


def test_pyroute2_decodes_a_veth_pair() -> None:
    seen = _seen_by_pyroute2(ifinfmsg, links.make_veth("vnetg7", "br0", "gst-7", "0a:00:00:00:00:01", 1450, 9))
    info = seen.get_attr("IFLA_LINKINFO")
    peer = info.get_attr("IFLA_INFO_DATA").get_attr("VETH_INFO_PEER")
    assert (seen.get_attr("IFLA_IFNAME"), seen.get_attr("IFLA_MTU")) == ("vnetg7", 1450)
    assert info.get_attr("IFLA_INFO_KIND") == "veth"
    assert peer.get_attr("IFLA_IFNAME") == "gst-7"
    assert peer.get_attr("IFLA_ADDRESS") == "0a:00:00:00:00:01"
    assert peer.get_attr("IFLA_MTU") == 1450
    assert peer.get_attr("IFLA_NET_NS_FD") == 9


def test_pyroute2_decodes_a_bridge_and_a_vlan() -> None:
    bridge = _seen_by_pyroute2(ifinfmsg, links.make_bridge("br0")).get_attr("IFLA_LINKINFO")
    data = bridge.get_attr("IFLA_INFO_DATA")
    assert bridge.get_attr("IFLA_INFO_KIND") == "bridge"
    assert [data.get_attr(f"IFLA_BR_{it}") for it in ("FORWARD_DELAY", "STP_STATE", "MCAST_SNOOPING")] == [0, 0, 0]
    vlan = _seen_by_pyroute2(ifinfmsg, links.make_vlan("eth1.7", "eth1", 7)).get_attr("IFLA_LINKINFO")
    assert vlan.get_attr("IFLA_INFO_KIND") == "vlan"
    assert vlan.get_attr("IFLA_INFO_DATA").get_attr("IFLA_VLAN_ID") == 7


def test_pyroute2_decodes_addresses_routes_and_rules() -> None:
    address = _seen_by_pyroute2(ifaddrmsg, add_address("gst-7", "2001:db8::1/64"))
    assert (address["prefixlen"], address.get_attr("IFA_ADDRESS")) == (64, "2001:db8::1")
    route = _seen_by_pyroute2(rtmsg, add_route("198.51.100.0/24", "x", "10.1.1.254", "10.1.1.1", table=20007))
    assert (route["dst_len"], route.get_attr("RTA_DST"), route.get_attr("RTA_TABLE")) == (24, "198.51.100.0", 20007)
    assert (route.get_attr("RTA_GATEWAY"), route.get_attr("RTA_PREFSRC")) == ("10.1.1.254", "10.1.1.1")
    rule = _seen_by_pyroute2(fibmsg, add_rule(20007, 7, 0xFFFF, 20007))
    wanted = {"FRA_PRIORITY": 20007, "FRA_FWMARK": 7, "FRA_FWMASK": 0xFFFF, "FRA_TABLE": 20007}
    assert {name: rule.get_attr(name) for name in wanted} == wanted


def test_encoded_routes_and_rules_are_decoded_as_rows() -> None:
    route = add_route("198.51.100.0/24", "gst-7", "10.1.1.254", "10.1.1.1", table=20007)
    payload = bytearray(route.payload + netlink.u32(6, 5))  # RTA_PRIORITY
    ((offset, name),) = route.links
    assert name == "gst-7"
    payload[offset : offset + 4] = struct.pack("=I", 4)
    assert routes.decode_route(bytes(payload), {4: "gst-7"}) == RouteRow(
        route=Route(table=20007, destination="198.51.100.0/24", via="10.1.1.254", link="gst-7", source="10.1.1.1"),
        protocol="static",
        scope="global",
        metric=5,
    )
    rule = rules.decode_rule(add_rule(20007, 7, 0xFFFF, 20007).payload)
    assert rule == Rule(priority=20007, mark=7, mask=0xFFFF, table=20007)


@pytest.mark.parametrize("bad", ["", "0a:00:00:00:00", "0a:00:00:00:00:00:01", "zz:00:00:00:00:01"])
def test_an_invalid_mac_address_is_refused(bad: str) -> None:
    with pytest.raises(ValueError):
        links.set_mac("gst-7", bad)


# Connections


def _tuple(src: bytes, dst: bytes, sport: int, dport: int, protocol: int = 6) -> bytes:
    return netlink.nested(1, netlink.attribute(1, src), netlink.attribute(2, dst)) + netlink.nested(
        2, netlink.u8(1, protocol), netlink.be16(2, sport), netlink.be16(3, dport)
    )


def _tcp_entry(mark: int = 5, zone: int = 0) -> bytes:
    vm, peer, public = b"\x0a\x01\x01\x0a", b"\xc6\x33\x64\x01", b"\xcb\x00\x71\x0a"
    return (
        b"\x02\0\0\0"
        + netlink.nested(1, _tuple(vm, peer, 40000, 443))
        + netlink.nested(2, _tuple(peer, public, 443, 40001))
        + (netlink.be16(18, zone) if zone else b"")
        + netlink.be32(3, 0x1E)
        + netlink.be32(7, 431999)
        + netlink.nested(4, netlink.nested(1, netlink.u8(1, 3)))
        + netlink.be32(8, mark)
        + netlink.be32(12, 0xDEADBEEF)
    )


@pytest.mark.parametrize("zone", [0, 9])
def test_the_fast_and_the_general_decoder_agree(zone: int) -> None:
    payload = _tcp_entry(0x80000007, zone)
    entry = conntrack.decode_entry(payload)
    assert entry == conntrack._decode_any(payload)
    assert (entry.src, entry.sport, entry.dst, entry.dport) == ("10.1.1.10", 40000, "198.51.100.1", 443)
    assert (entry.reply_src, entry.reply_sport, entry.reply_dst, entry.reply_dport) == (
        "198.51.100.1",
        443,
        "203.0.113.10",
        40001,
    )
    assert (entry.protocol, entry.mark, entry.zone, entry.timeout) == (6, 0x80000007, zone, 431999)
    assert (entry.status, entry.id, entry.family) == (0x1E, 0xDEADBEEF, 2)


def test_deleting_an_entry_without_a_tuple_is_refused() -> None:
    entry = conntrack.decode_entry(_tcp_entry())
    nameless = conntrack.Entry(**{name: getattr(entry, name) for name in entry.__struct_fields__} | {"original": b""})
    with pytest.raises(ValueError):
        conntrack.delete("ktest-never-there", [nameless])
