"""Links, addresses, routes, rules and neighbours by rtnetlink, compared with the output of ``ip``."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
from pyroute2 import IPRoute

from kernel.agent_host import wait_until
from kernel.rtnetlink import (
    add_address,
    add_route,
    add_rule,
    delete_address,
    delete_neighbour,
    delete_route,
    delete_rule,
    list_addresses,
    list_neighbours,
    list_routes,
    list_rules,
    replace_neighbour,
    replace_route,
)
from kernel.scratch import ip_json, joined, scratch, settled, tool
from netloom.agent.kernel import links, namespaces, netlink
from netloom.agent.kernel.links import Link
from netloom.agent.kernel.neighbours import look_for_neighbour
from netloom.agent.kernel.netlink import Message, NetlinkError, Socket
from netloom.netobjects import Rule


@pytest.fixture
def ns() -> Iterator[str]:
    with scratch() as name:
        yield name


@pytest.fixture
def pair() -> Iterator[tuple[str, str]]:
    with scratch() as host, scratch() as inner:
        yield host, inner


def link(namespace: str, name: str) -> Link:
    (found,) = links.find_links(namespace, [name])
    return found


def permanent(namespace: str) -> dict[str, str]:
    neighbours = (it.neighbour for it in list_neighbours(namespace) if it.permanent)
    return {it.address: it.mac for it in neighbours}


def build(host: str, inner: str) -> None:
    with namespaces.descriptor(inner) as fd:
        links.change(
            host,
            [
                links.make_bridge("breth1-7", alias="netloom"),
                links.set_up("breth1-7"),
                links.make_veth("vnetg7", "breth1-7", "gst-7", "0a:00:00:00:00:07", 1450, fd, alias="netloom"),
                links.set_up("vnetg7"),
            ],
        )
    links.change(
        inner,
        [
            links.set_up("gst-7"),
            add_address("gst-7", "10.7.0.1/24"),
            add_address("gst-7", "fd07::1/64"),
            add_route("0.0.0.0/0", "gst-7", via="10.7.0.254"),
            add_route("0.0.0.0/0", "gst-7", via="10.7.0.254", source="10.7.0.1", table=20007),
            add_route("198.51.100.0/24", "gst-7", table=20007),
            add_route("2001:db8::/32", "gst-7", via="fd07::ffff"),
            add_rule(20007, 7, 0xFFFF, 20007),
        ],
    )
    # The address is usable at once, without duplicate address detection.
    assert "tentative" not in tool(inner, "ip", "-6", "addr", "show", "to", "fd07::1")
    settled(host, "breth1-7", "vnetg7")
    settled(inner, "gst-7")


def test_ip_shows_a_network_built_in_two_datagrams(pair: tuple[str, str]) -> None:
    host, inner = pair
    build(host, inner)

    (bridge,) = ip_json(host, "link", "show", "breth1-7")
    data = bridge["linkinfo"]["info_data"]
    assert (bridge["ifalias"], data["forward_delay"], data["stp_state"], data["mcast_snooping"]) == ("netloom", 0, 0, 0)
    (port,) = ip_json(host, "link", "show", "vnetg7")
    assert (port["master"], port["ifalias"], port["mtu"], port["operstate"]) == ("breth1-7", "netloom", 1450, "UP")
    (gst,) = ip_json(inner, "link", "show", "gst-7")
    assert (gst["address"], gst["mtu"], gst["operstate"]) == ("0a:00:00:00:00:07", 1450, "UP")
    assert gst["link_index"] == port["ifindex"]

    seen = {(it["local"], it["prefixlen"]) for it in ip_json(inner, "addr", "show", "gst-7")[0]["addr_info"]}
    assert seen >= {("10.7.0.1", 24), ("fd07::1", 64)}
    (default,) = ip_json(inner, "route", "show", "default")
    assert (default["gateway"], default["dev"], default["protocol"]) == ("10.7.0.254", "gst-7", "static")
    table = {it["dst"]: it for it in ip_json(inner, "route", "show", "table", "20007")}
    assert table["default"]["prefsrc"] == "10.7.0.1"
    assert table["198.51.100.0/24"]["scope"] == "link"
    (v6,) = ip_json(inner, "-6", "route", "show", "2001:db8::/32")
    assert v6["gateway"] == "fd07::ffff"
    (rule,) = [it for it in ip_json(inner, "rule") if it["priority"] == 20007]
    assert (rule["fwmark"], rule["fwmask"], rule["table"]) == ("0x7", "0xffff", "20007")


def test_rows_match_the_output_of_ip(pair: tuple[str, str]) -> None:
    host, inner = pair
    build(host, inner)
    for namespace in pair:
        ours = links.list_links(namespace)
        theirs = {it["ifname"]: it for it in ip_json(namespace, "link")}
        assert {it.name for it in ours} == theirs.keys()
        names = {it.index: it.name for it in ours}
        for it in ours:
            that = theirs[it.name]
            assert (it.index, it.mtu, it.mac) == (that["ifindex"], that["mtu"], that["address"])
            assert it.kind == that.get("linkinfo", {}).get("info_kind", "")
            assert it.alias == that.get("ifalias", "")
            assert it.up == ("UP" in that["flags"])
            assert names.get(it.master_index or 0) == that.get("master")
    assert {(it.address.cidr, it.address.link) for it in list_addresses(inner)} == {
        (f"{info['local']}/{info['prefixlen']}", it["ifname"])
        for it in ip_json(inner, "addr")
        for info in it["addr_info"]
    }
    routes = [it for it in list_routes(inner) if it.protocol == "static"]
    assert {(it.route.table, it.route.destination, it.route.via, it.route.source, it.scope) for it in routes} == {
        (254, "0.0.0.0/0", "10.7.0.254", "", "global"),
        (20007, "0.0.0.0/0", "10.7.0.254", "10.7.0.1", "global"),
        (20007, "198.51.100.0/24", "", "", "link"),
        (254, "2001:db8::/32", "fd07::ffff", "", "global"),
    }
    assert len(list_routes(inner)) == sum(
        len(ip_json(inner, family, "route", "show", "table", "all")) for family in ("-4", "-6")
    )
    assert Rule(priority=20007, mark=7, mask=0xFFFF, table=20007) in list_rules(inner)
    assert [it.priority for it in list_rules(inner)] == [it["priority"] for it in ip_json(inner, "rule")]


def test_pyroute2_lists_the_same_links_and_addresses(pair: tuple[str, str]) -> None:
    host, inner = pair
    build(host, inner)
    with namespaces.inside(inner):
        ip = IPRoute()
    with ip:
        theirs: set[Any] = {(it["index"], it.get("ifname"), it.get("address"), it.get("mtu")) for it in ip.get_links()}
        addresses = {f"{it.get('address')}/{it['prefixlen']}" for it in ip.get_addr()}
    assert {(it.index, it.name, it.mac, it.mtu) for it in links.list_links(inner)} == theirs
    assert {it.address.cidr for it in list_addresses(inner)} == addresses


def test_link_local_addresses_are_marked() -> None:
    with joined() as (left, _):
        settled(left, "left")
        # A provider may use this subnet, so it does not count as link-local.
        links.change(left, [add_address("left", "169.254.7.1/16")])
        rows = {it.address.cidr: it for it in list_addresses(left)}
        local = [it for it in rows.values() if it.link_local]
        assert [it.address.cidr.startswith("fe80::") for it in local] == [True]
        assert (local[0].scope, rows["10.9.0.1/24"].scope, rows["127.0.0.1/8"].scope) == ("link", "global", "host")


def test_repeats_marked_as_harmless_are_no_errors(pair: tuple[str, str]) -> None:
    host, inner = pair
    build(host, inner)
    before = links.list_links(host), list_addresses(inner), list_routes(inner), list_rules(inner)
    with namespaces.descriptor(inner) as fd:
        messages = [
            links.make_bridge("breth1-7", alias="netloom"),
            links.make_veth("vnetg7", "breth1-7", "gst-7", "0a:00:00:00:00:07", 1450, fd, alias="netloom"),
        ]
        links.change(host, [message.even_if_there() for message in messages])
    messages = [
        add_address("gst-7", "10.7.0.1/24"),
        add_address("gst-7", "fd07::1/64"),
        add_route("198.51.100.0/24", "gst-7", table=20007),
        add_rule(20007, 7, 0xFFFF, 20007),
    ]
    links.change(inner, [message.even_if_there() for message in messages])
    links.change(inner, [replace_route("0.0.0.0/0", "gst-7", via="10.7.0.254")])
    assert before == (
        links.list_links(host),
        list_addresses(inner),
        list_routes(inner),
        list_rules(inner),
    )
    gone = [
        delete_rule(20007, 7, 0xFFFF, 20007),
        delete_route("198.51.100.0/24", table=20007),
        delete_route("0.0.0.0/0", "gst-7", "10.7.0.254", "10.7.0.1", 20007),
        delete_route("2001:db8::/32"),
        delete_address("gst-7", "10.7.0.1/24"),
        delete_address("gst-7", "fd07::1/64"),
        links.delete_link("gst-7"),
        delete_address("gst-7", "10.7.0.1/24"),
    ]
    links.change(inner, [message.even_if_gone() for message in gone])
    assert {it.name for it in links.list_links(inner)} == {"lo"}
    assert {it.priority for it in list_rules(inner)} == {0, 32766, 32767}
    links.change(inner, [message.even_if_gone() for message in gone])


@pytest.mark.parametrize(
    ("message", "number", "words"),
    [
        (links.make_bridge("br0"), errno.EEXIST, "make bridge br0: File exists"),
        (links.set_up("nowhere"), errno.ENODEV, "set nowhere up: No such device"),
        (links.set_master("nowhere", "br0"), errno.ENODEV, "make nowhere a port of br0: No such device"),
        (
            links.set_master("br0", "nowhere"),
            errno.ENODEV,
            "make br0 a port of nowhere: No such device: there is no link nowhere",
        ),
        (links.delete_link("nowhere"), errno.ENODEV, "delete link nowhere: No such device"),
        (
            add_address("nowhere", "192.0.2.1/24"),
            errno.ENODEV,
            "add address 192.0.2.1/24 to nowhere: No such device: there is no link nowhere",
        ),
        (
            delete_address("br0", "192.0.2.1/24"),
            errno.EADDRNOTAVAIL,
            "delete address 192.0.2.1/24 from br0: Cannot assign requested address",
        ),
        (delete_route("192.0.2.0/24"), errno.ESRCH, "delete route 192.0.2.0/24 table 254: No such process"),
        (
            delete_rule(9, 1, 255, 9),
            errno.ENOENT,
            "delete rule 9: fwmark 0x1/0xff table 9: No such file or directory",
        ),
        (links.make_bridge("a-name-too-long-for-it"), errno.ERANGE, "make bridge a-name-too-long-for-it: Numerical"),
    ],
    ids=lambda it: it.what if isinstance(it, Message) else "",
)
def test_a_failure_names_the_object_and_the_cause(ns: str, message: Message, number: int, words: str) -> None:
    links.change(ns, [links.make_bridge("br0")])
    with pytest.raises(NetlinkError) as caught:
        links.change(ns, [message])
    assert caught.value.errno == number
    assert str(caught.value).startswith(words)


def test_an_existing_link_of_the_same_name_keeps_its_alias(ns: str) -> None:
    tool(ns, "ip", "link", "add", "breth1-7", "type", "bridge")
    links.change(ns, [links.make_bridge("breth1-7", alias="netloom").even_if_there()])
    assert link(ns, "breth1-7").alias == ""
    links.change(ns, [links.set_alias("breth1-7", "of somebody")])
    assert link(ns, "breth1-7").alias == "of somebody"
    links.change(ns, [links.set_alias("breth1-7", "")])
    assert link(ns, "breth1-7").alias == ""


def test_links_are_modified_by_name(ns: str) -> None:
    with namespaces.descriptor(ns) as fd:
        veth = links.make_veth("a", "br0", "b", "", 0, fd)
        links.change(ns, [links.make_bridge("br0"), links.make_bridge("br1"), veth])
    br0, br1, a = links.find_links(ns, ["br0", "br1", "a"])
    assert a.master_index == br0.index
    links.change(
        ns,
        [
            links.set_master("a", "br1"),
            links.set_mac("a", "0a:00:00:00:00:0a"),
            links.set_mtu("a", 1400),
            links.set_up("a"),
            links.set_up("b"),
        ],
    )
    a = link(ns, "a")
    assert (a.master_index, a.mac, a.mtu, a.up, a.running) == (br1.index, "0a:00:00:00:00:0a", 1400, True, True)
    links.change(ns, [links.set_master("a", None), links.set_down("a")])
    a = link(ns, "a")
    assert (a.master_index, a.up, a.running) == (None, False, False)
    assert not link(ns, "b").running
    links.change(ns, [links.delete_link("a")])
    assert links.find_links(ns, ["a", "b"]) == []


def test_a_veth_pair_is_not_created_when_the_inner_name_exists(pair: tuple[str, str]) -> None:
    host, inner = pair
    build(host, inner)
    with namespaces.descriptor(inner) as fd, pytest.raises(NetlinkError, match="File exists"):
        links.change(host, [links.make_veth("vnetg8", "breth1-7", "gst-7", "", 0, fd)])
    assert links.find_links(host, ["vnetg8"]) == []


def test_deleting_one_end_of_a_veth_pair_deletes_both(pair: tuple[str, str]) -> None:
    host, inner = pair
    build(host, inner)
    links.change(inner, [links.delete_link("gst-7")])
    assert links.find_links(host, ["vnetg7"]) == []


def test_a_link_is_found_by_name_index_and_alternative_name(ns: str) -> None:
    links.change(ns, [links.make_bridge("br0")])
    tool(ns, "ip", "link", "property", "add", "dev", "br0", "altname", "manynames")
    index = link(ns, "br0").index
    assert [it.name for it in links.find_links(ns, [index, "nowhere", 4711, "lo"])] == ["br0", "lo"]
    assert link(ns, "manynames").index == index


def test_a_listing_may_be_filtered_by_kind_and_by_bridge(pair: tuple[str, str]) -> None:
    host, inner = pair
    build(host, inner)
    with Socket(0, host) as rtnetlink:
        assert [it.name for it in links.list_links_over(rtnetlink, kind="bridge")] == ["breth1-7"]
        bridge = link(host, "breth1-7").index
        assert [it.name for it in links.list_links_over(rtnetlink, master=bridge)] == ["vnetg7"]
        assert links.list_links_over(rtnetlink, kind="vlan") == []


def test_counters_of_one_link_and_of_all_are_those_of_ip(ns: str) -> None:
    tool(ns, "ip", "link", "set", "lo", "up")
    tool(ns, "ping", "-c3", "-i0.01", "127.0.0.1")
    links.change(ns, [links.make_bridge("breth1-7", alias="netloom")])
    want = {it["ifindex"]: it["stats64"]["rx"]["packets"] for it in ip_json(ns, "-s", "link")}
    assert want[1] >= 6
    with Socket(netlink.NETLINK_ROUTE, ns) as sock:
        assert links.all_received_packets(sock) == want
        assert {index: links.received_packets(sock, index) for index in want} == want
        assert links.received_packets(sock, 4711) is None


def test_replacing_a_route_leaves_one(pair: tuple[str, str]) -> None:
    host, inner = pair
    build(host, inner)
    links.change(inner, [replace_route("0.0.0.0/0", "gst-7", via="10.7.0.253", table=20007)])
    table = [it.route for it in list_routes(inner) if (it.route.table, it.route.destination) == (20007, "0.0.0.0/0")]
    assert [(it.via, it.source) for it in table] == [("10.7.0.253", "")]


def test_a_vlan_link_is_created_or_the_missing_support_is_reported(ns: str) -> None:
    """Build machines often have kernels without 802.1Q. Then the error message is checked."""
    links.change(ns, [links.make_bridge("eth1")])
    tried = subprocess.run(
        ["ip", "-n", ns, "link", "add", "link", "eth1", "name", "eth1.9", "type", "vlan", "id", "9"],
        capture_output=True,
    )
    message = links.make_vlan("eth1.1204", "eth1", 1204, alias="netloom")
    if tried.returncode == 0:
        links.change(ns, [message])
        made = link(ns, "eth1.1204")
        assert (made.kind, made.vlan_id, made.alias) == ("vlan", 1204, "netloom")
        assert made.parent_index == link(ns, "eth1").index
    else:
        with pytest.raises(NetlinkError, match=r"make VLAN link eth1\.1204 with tag 1204 on eth1: Operation not supp"):
            links.change(ns, [message])


def test_the_kernel_looks_for_a_neighbour_before_there_is_a_packet() -> None:
    with joined() as (left, _):
        settled(left, "left")
        links.change(left, [look_for_neighbour("left", "10.9.0.2"), look_for_neighbour("left", "10.9.0.99")])
        wait_until(lambda: [it.neighbour.mac for it in list_neighbours(left) if it.neighbour.mac])
        assert {(it.neighbour.address, it.neighbour.mac) for it in list_neighbours(left)} == {
            ("10.9.0.2", "0a:00:00:00:09:02"),
            ("10.9.0.99", ""),
        }


def test_permanent_neighbours_override_learned_ones_and_table_limits() -> None:
    with joined() as (left, _):
        settled(left, "left")
        tool(left, "ping", "-c1", "-W5", "10.9.0.2")
        learned = list_neighbours(left)
        assert [(it.neighbour.address, it.neighbour.mac, it.permanent) for it in learned] == [
            ("10.9.0.2", "0a:00:00:00:09:02", False)
        ]
        wanted = {f"10.9.0.{number}": f"0a:00:00:00:01:{number:02x}" for number in range(2, 202)}
        links.change(left, [replace_neighbour("left", address, mac) for address, mac in wanted.items()])
        links.change(left, [replace_neighbour("left", "10.9.0.3", "0a:00:00:00:02:03")])
        wanted["10.9.0.3"] = "0a:00:00:00:02:03"
        assert permanent(left) == wanted
        shown = {it["dst"]: it["lladdr"] for it in ip_json(left, "neigh", "show", "dev", "left", "nud", "permanent")}
        assert {address: mac for address, mac in shown.items() if "." in address} == wanted
        links.change(left, [delete_neighbour("left", "10.9.0.3")])
        links.change(left, [delete_neighbour("left", "10.9.0.3").even_if_gone()])
        assert "10.9.0.3" not in permanent(left)
        # The kernel drops permanent neighbours when a link goes down, so the agent sets them again.
        links.change(left, [links.set_down("left"), links.set_up("left")])
        assert not permanent(left)
