"""The netlink socket with a real kernel: many requests, errors, concurrent changes, messages of other programs."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kernel.rtnetlink import add_address, add_route, list_addresses
from kernel.scratch import descriptors, ip_json, scratch
from netloom.agent.kernel import links, netlink
from netloom.agent.kernel.netlink import Message, NetlinkError, Socket


@pytest.fixture
def ns() -> Iterator[str]:
    with scratch() as name:
        yield name


def addresses(number: int) -> list[Message]:
    return [add_address("lo", f"10.{7 + (i >> 16)}.{i >> 8 & 255}.{i & 255}/32") for i in range(number)]


def test_thousands_of_requests_are_executed_and_answered(ns: str) -> None:
    links.change(ns, addresses(5000))
    listed = list_addresses(ns)
    assert len([row for row in listed if row.address.cidr.endswith("/32")]) == 5000
    assert len(ip_json(ns, "-4", "addr")[0]["addr_info"]) == 5001
    with Socket(netlink.NETLINK_ROUTE, ns) as rtnetlink:
        links.change_over(rtnetlink, [message.even_if_there() for message in addresses(5000)])
        assert rtnetlink.request([]) == []


def test_a_failed_request_is_named_and_the_rest_of_its_datagram_is_executed(ns: str) -> None:
    first, second, third = addresses(3)
    with pytest.raises(NetlinkError) as caught:
        links.change(ns, [first, second, second, links.set_up("nowhere"), third])
    assert caught.value.errno == errno.EEXIST
    assert caught.value.what == "add address 10.7.0.1/32 to lo"
    assert {row.address.cidr for row in list_addresses(ns)} >= {"10.7.0.0/32", "10.7.0.1/32", "10.7.0.2/32"}


def test_answers_keep_the_order_of_the_requests(ns: str) -> None:
    wanted = ["lo", "nowhere", "lo"]
    with Socket(netlink.NETLINK_ROUTE, ns) as rtnetlink:
        answers = rtnetlink.exchange([links._ask(name) for name in wanted])
    assert [answer.errno for answer in answers] == [0, errno.ENODEV, 0]
    assert [len(answer.data) for answer in answers] == [1, 0, 1]


def test_errors_contain_the_extended_ack_of_the_kernel(ns: str) -> None:
    with pytest.raises(NetlinkError) as caught:
        # The kernel refuses a local address as gateway.
        links.change(ns, [add_address("lo", "192.0.2.1/24"), add_route("0.0.0.0/0", "lo", via="192.0.2.1")])
    assert caught.value.ext_ack == "Nexthop has invalid gateway"
    assert str(caught.value).startswith("add route 0.0.0.0/0 via 192.0.2.1 dev lo table 254: Invalid argument: Nexthop")


def test_a_dump_is_consistent_during_concurrent_changes(ns: str) -> None:
    """A link moves between the front and the back of the list and always exists in at least one place.

    A dump that is not repeated after NLM_F_DUMP_INTR can miss both.
    """
    front, back = (_with_index(links.make_bridge(name), index) for name, index in (("front", 10), ("back", 9000)))
    links.change(ns, [front, *(_with_index(links.make_bridge(f"s{i}"), 1000 + i) for i in range(120))])
    over = threading.Event()

    def move() -> None:
        while not over.wait(0.01):
            links.change(ns, [back, links.delete_link("front"), front, links.delete_link("back")])

    thread = threading.Thread(target=move)
    thread.start()
    try:
        for _ in range(150):
            assert {link.name for link in links.list_links(ns)} & {"front", "back"}
    finally:
        over.set()
        thread.join()


def _with_index(message: Message, index: int) -> Message:
    """The message, with this index for the new link."""
    return replace(message, payload=message.payload[:4] + struct.pack("=i", index) + message.payload[8:])


def test_messages_of_other_programs_are_ignored(ns: str) -> None:
    with Socket(netlink.NETLINK_ROUTE, ns) as rtnetlink, netlink.open_socket(netlink.NETLINK_ROUTE, ns) as stranger:
        with socket.socket(fileno=os.dup(rtnetlink.fileno())) as same:
            port = same.getsockname()[0]
        lie = netlink.encode(Message(netlink.NLMSG_ERROR, payload=bytes(20), sequence=1))
        stranger.sendto(lie, (port, 0))
        with pytest.raises(NetlinkError, match="set nowhere up: No such device"):
            rtnetlink.request([links.set_up("nowhere")])


def test_a_socket_keeps_its_namespace_in_other_threads(ns: str) -> None:
    links.change(ns, [links.make_bridge("only-here")])
    found: list[str] = []
    with Socket(netlink.NETLINK_ROUTE, ns) as rtnetlink:
        thread = threading.Thread(target=lambda: found.extend(it.name for it in links.list_links_over(rtnetlink)))
        thread.start()
        thread.join()
    assert found == ["lo", "only-here"]


def test_two_dumps_in_one_exchange_are_refused(ns: str) -> None:
    dump = Message(18, netlink.NLM_F_DUMP, bytes(16))
    with Socket(netlink.NETLINK_ROUTE, ns) as rtnetlink:
        assert len(rtnetlink.request([dump])) == 1
        with pytest.raises(ValueError):
            rtnetlink.request([dump, dump])


def test_no_file_descriptor_leaks(ns: str) -> None:
    before = descriptors()
    for _ in range(30):
        links.list_links(ns)
        with pytest.raises(NetlinkError):
            links.change(ns, [links.set_up("nowhere")])
    assert descriptors() == before
