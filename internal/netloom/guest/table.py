"""A network's table, arranged for look-ups: every answer below is one dictionary access and a few bytes.

Arranged once per table and checked by that: a table that cannot be served is refused when it comes, not when a VM asks.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from netloom.guestwire import GuestNetwork, GuestNic, domain_bytes

SUBNET_MASK, ROUTER, DNS, HOSTNAME, DOMAIN, MTU, BROADCAST, SEARCH = 1, 3, 6, 12, 15, 26, 28, 119

# RFC 2131 section 3.3: all ones is "infinite", which our leases never are. The least is what a client can live with.
LEASE_S_LEAST, LEASE_S_MOST = 60, 0x7FFFFFFF


class Lease(NamedTuple):
    """What DHCP answers one NIC: its address, and its options by code."""

    nic: GuestNic
    ip: bytes
    options: dict[int, bytes]


class GuestTable:
    """Raises ValueError, naming the field, for a table that cannot be served."""

    def __init__(self, network: GuestNetwork) -> None:
        self.network = network
        self.server_ip = IPv4Address(network.server_ip).packed
        if not LEASE_S_LEAST <= network.lease_s <= LEASE_S_MOST:
            raise ValueError(f"lease_s {network.lease_s} is not between {LEASE_S_LEAST} and {LEASE_S_MOST}")
        self.lease_s = network.lease_s
        self.leases: dict[bytes, Lease] = {}
        self.nics: dict[str, GuestNic] = {}
        for nic in network.nics:
            mac = mac_bytes(nic.mac)
            if mac in self.leases:
                raise ValueError(f"two NICs with MAC {nic.mac}")
            if nic.ip in self.nics:
                raise ValueError(f"two NICs with address {nic.ip}")
            self.nics[nic.ip] = nic
            self.leases[mac] = Lease(nic, IPv4Address(nic.ip).packed, _options(network, nic))


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
