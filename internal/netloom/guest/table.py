"""The table of a network, prepared for fast look-ups by MAC address and by IP address.

It is prepared and checked once, when the agent sends it. So a table that cannot be served is refused then, and not
when a VM asks.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from netloom.guestwire import GuestNetwork, GuestNic, domain_bytes

SUBNET_MASK, ROUTER, DNS, HOSTNAME, DOMAIN, MTU, BROADCAST, SEARCH = 1, 3, 6, 12, 15, 26, 28, 119

# RFC 2131 section 3.3: a lease time of all ones means "infinity", which we never grant. The minimum is a value that
# clients can work with.
LEASE_S_MIN, LEASE_S_MAX = 60, 0x7FFFFFFF


class TableRow(NamedTuple):
    """One NIC: its MAC and IP addresses as bytes, and the values of its DHCP options by code."""

    nic: GuestNic
    mac: bytes
    ip: bytes
    options: dict[int, bytes]


class GuestTable:
    """The NICs of a network. Raises ValueError, naming the field, for a table that cannot be served."""

    def __init__(self, network: GuestNetwork) -> None:
        self.network = network
        self.server_ip = IPv4Address(network.server_ip).packed
        if not LEASE_S_MIN <= network.lease_s <= LEASE_S_MAX:
            raise ValueError(f"lease_s {network.lease_s} is not between {LEASE_S_MIN} and {LEASE_S_MAX}")
        self.lease_s = network.lease_s
        self.by_mac: dict[bytes, TableRow] = {}
        self.by_ip: dict[str, TableRow] = {}
        for nic in network.nics:
            row = TableRow(nic, mac_bytes(nic.mac), IPv4Address(nic.ip).packed, _options(network, nic))
            if row.mac in self.by_mac:
                raise ValueError(f"two NICs with MAC {nic.mac}")
            if nic.ip in self.by_ip:
                raise ValueError(f"two NICs with address {nic.ip}")
            self.by_mac[row.mac] = self.by_ip[nic.ip] = row


def mac_bytes(mac: str) -> bytes:
    """The six bytes of a MAC address. Raises ValueError."""
    octets = mac.split(":")
    if len(octets) != 6 or any(len(octet) != 2 for octet in octets):
        raise ValueError(f"{mac!r} is not a MAC address")
    return bytes(int(octet, 16) for octet in octets)


def _options(network: GuestNetwork, nic: GuestNic) -> dict[int, bytes]:
    subnet = IPv4Network((nic.ip, nic.prefix_len), strict=False)
    options = {SUBNET_MASK: subnet.netmask.packed}
    if subnet.prefixlen < 31:
        options[BROADCAST] = subnet.broadcast_address.packed
    if nic.hostname:
        options[HOSTNAME] = nic.hostname.encode("ascii")
    if network.mtu:
        options[MTU] = network.mtu.to_bytes(2, "big")
    if nic.default_nic:  # guard: only-the-default-nic-gets-a-router
        if nic.gateway:
            options[ROUTER] = IPv4Address(nic.gateway).packed
        if network.dns:
            options[DNS] = b"".join(IPv4Address(server).packed for server in network.dns)
        if network.domain:
            options[DOMAIN] = network.domain.encode("ascii")
        if network.search:
            options[SEARCH] = b"".join(domain_bytes(name) for name in network.search)
    return options | nic.options
