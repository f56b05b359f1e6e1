"""Kernel objects in the notation of iproute2, and the routes that the kernel adds with an address."""

from __future__ import annotations

import pytest

from netloom.netobjects import ANYWHERE, Address, Neighbour, Route, Rule

SPELLED = [
    (Address(link="gst-204", cidr="10.10.1.1/24"), "10.10.1.1/24 dev gst-204"),
    (Route(table=254, destination="10.1.0.0/16", link="gst-204"), "10.1.0.0/16 dev gst-204 table 254"),
    (
        Route(table=20001, destination=ANYWHERE, via="203.0.113.1", link="pub-101", source="203.0.113.20"),
        "0.0.0.0/0 via 203.0.113.1 dev pub-101 src 203.0.113.20 table 20001",
    ),
    (Route(table=100, destination="192.0.2.0/24", kind="blackhole"), "blackhole 192.0.2.0/24 table 100"),
    (Rule(priority=20001, mark=1, mask=0xFFFF, table=20001), "20001: fwmark 0x1/0xffff table 20001"),
    (
        Rule(priority=10000, mark=0x10000, mask=0x10000, table=100, source="10.1.1.0/24", iif="gst-204"),
        "10000: from 10.1.1.0/24 iif gst-204 fwmark 0x10000/0x10000 table 100",
    ),
    (
        Neighbour(link="gst-204", address="10.1.1.11", mac="02:01:00:cc:00:03"),
        "10.1.1.11 dev gst-204 lladdr 02:01:00:cc:00:03",
    ),
]


@pytest.mark.parametrize(("it", "text"), SPELLED, ids=[text for _, text in SPELLED])
def test_objects_are_formatted_like_iproute2(it: object, text: str) -> None:
    assert str(it) == text


@pytest.mark.parametrize(
    ("cidr", "ip", "on_link", "itself"),
    [
        ("10.10.1.1/24", "10.10.1.1", "10.10.1.0/24", "10.10.1.1/32"),
        ("203.0.113.20/32", "203.0.113.20", "", "203.0.113.20/32"),
        ("203.0.113.20/31", "203.0.113.20", "", "203.0.113.20/32"),
        ("2001:db8::1/64", "2001:db8::1", "2001:db8::/64", ""),
    ],
)
def test_routes_that_the_kernel_adds_with_an_address(cidr: str, ip: str, on_link: str, itself: str) -> None:
    address = Address(link="gst-204", cidr=cidr)
    assert (address.ip, address.on_link, address.itself) == (ip, on_link, itself)
