"""Addresses, routes, policy rules and neighbours as the kernel has them: the values that are wanted and observed.

``render`` says with them what a scope wants, ``agent.kernel`` reads and writes them, ``plan`` compares the two. The
text of each value is what iproute2 calls it: ip-address(8), ip-route(8), ip-rule(8), ip-neighbour(8).
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Interface, IPv6Interface, ip_interface

import msgspec

MAIN_TABLE = 254  # linux/rtnetlink.h: RT_TABLE_MAIN

ANYWHERE = "0.0.0.0/0"  # the destination of a default route
ANYWHERE_IP6 = "::/0"
IP6_LINK_LOCAL = "fe80::/10"  # RFC 4291 section 2.5.6

ETHERNET_MTU = 1500  # RFC 894
IP6_MTU_MIN = 1280  # RFC 8200 section 5: the kernel has no IPv6 on a link with less
# The headers that VXLAN adds to a frame over IPv4: 20 (IP), 8 (UDP), 8 (VXLAN), 14 (Ethernet). RFC 7348 section 5
VXLAN_BYTES = 50


class Address(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """An address with its prefix length on a link, e.g. ``10.10.1.1/24`` or ``203.0.113.20/32``."""

    link: str
    cidr: str

    def __str__(self) -> str:
        return f"{self.cidr} dev {self.link}"

    @property
    def ip(self) -> str:
        """The address without its prefix length."""
        return self.cidr.partition("/")[0]

    @property
    def on_link(self) -> str:
        """The subnet that the kernel adds a route to along with this address; empty: none."""
        network = _interface(self.cidr).network
        return str(network) if network.prefixlen < network.max_prefixlen - 1 else ""

    @property
    def itself(self) -> str:
        """The address as a prefix, which has a route in the kernel's local table; empty for IPv6: kernels differ."""
        address = _interface(self.cidr).ip
        return f"{address}/32" if address.version == 4 else ""


class Route(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A route. Empty ``via``: on-link. Empty ``link``: packets are not sent anywhere, ``kind`` says what happens."""

    table: int
    destination: str  # a prefix; the default route is ANYWHERE
    link: str = ""
    via: str = ""
    source: str = ""  # preferred source address
    kind: str = "unicast"  # ip-route(8)'s word: "blackhole" and so on

    def __str__(self) -> str:
        return f"{route_text(self.destination, self.kind, self.via, self.link, self.source)} table {self.table}"


class Rule(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A policy routing rule: packets with this firewall mark look up this table. Empty selectors match any packet."""

    priority: int
    mark: int
    mask: int  # the bits of the mark that are compared; 0: none
    table: int
    source: str = ""  # a prefix, as destination is
    destination: str = ""
    iif: str = ""

    def __str__(self) -> str:
        selectors = selector_text(self.source, self.destination, self.iif)
        mark = f"fwmark {self.mark:#x}/{self.mask:#x}"
        return f"{self.priority}: {f'{selectors} ' if selectors else ''}{mark} table {self.table}"


class Neighbour(msgspec.Struct, frozen=True, kw_only=True, order=True):
    """A permanent neighbour: the MAC address that an address on a link has. No ARP or NDP message changes it."""

    link: str
    address: str
    mac: str

    def __str__(self) -> str:
        return f"{self.address} dev {self.link} lladdr {self.mac}"


def route_text(destination: str, kind: str = "unicast", via: str = "", link: str = "", source: str = "") -> str:
    """A route without its table as ip-route(8) writes it."""
    options = _options(("via", via), ("dev", link), ("src", source))
    return " ".join(filter(None, ("" if kind == "unicast" else kind, destination, options)))


def selector_text(source: str, destination: str, iif: str) -> str:
    """The selectors of a rule as ip-rule(8) writes them; empty when there is none."""
    return _options(("from", source), ("to", destination), ("iif", iif))


def _options(*options: tuple[str, str]) -> str:
    return " ".join(f"{word} {value}" for word, value in options if value)


@lru_cache(maxsize=65536)
def _interface(cidr: str) -> IPv4Interface | IPv6Interface:
    # Each observation of a host asks this of every address.
    return ip_interface(cidr)
