"""The table of a network, prepared for fast look-ups by MAC address and by IP address.

It is prepared and checked once, when the agent sends it. So a table that cannot be served is refused then, and not
when a VM asks. The DHCP options are encoded then too: a boot storm sends the same ones thousands of times.
"""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from netloom.guestwire import GuestNetwork, GuestNic, domain_bytes

SUBNET_MASK, ROUTER, DNS, HOSTNAME, DOMAIN, MTU, BROADCAST, SEARCH = 1, 3, 6, 12, 15, 26, 28, 119
_IP_PKTINFO = 8  # linux/in.h
_LEASE_TIME, _SERVER_ID, _T1, _T2 = 51, 54, 58, 59

# RFC 2131 section 3.3: a lease time of all ones means "infinity", which we never grant. The minimum is a value that
# clients can work with.
LEASE_S_MIN, LEASE_S_MAX = 60, 0x7FFFFFFF


class TableRow(NamedTuple):
    """One NIC: its MAC and IP addresses as bytes, and its encoded DHCP options by code.

    ``always``: the codes of the options that are sent even if they were not requested.
    """

    nic: GuestNic
    mac: bytes
    ip: bytes
    options: dict[int, bytes]
    always: tuple[int, ...]


class GuestTable:
    """The NICs of a network. Raises ValueError, naming the field, for a table that cannot be served."""

    def __init__(self, network: GuestNetwork) -> None:
        self.network = network
        self.server_ip = IPv4Address(network.server_ip).packed
        if not LEASE_S_MIN <= network.lease_s <= LEASE_S_MAX:
            raise ValueError(f"lease_s {network.lease_s} is not between {LEASE_S_MIN} and {LEASE_S_MAX}")
        # DHCP replies come from the address that they give as server identifier; the link may have several addresses.
        source = struct.pack("=I4s4s", 0, self.server_ip, bytes(4))
        self.reply_source = [(socket.IPPROTO_IP, _IP_PKTINFO, source)]
        self.server_id = encoded_option(_SERVER_ID, self.server_ip)
        times = ((_LEASE_TIME, network.lease_s), (_T1, network.lease_s // 2), (_T2, network.lease_s * 7 // 8))
        self.lease = [encoded_option(code, struct.pack("!I", seconds)) for code, seconds in times]
        self.by_mac: dict[bytes, TableRow] = {}
        self.by_ip: dict[str, TableRow] = {}
        for nic in network.nics:
            options = {code: encoded_option(code, value) for code, value in _options(network, nic).items()}
            always = (SUBNET_MASK, *(code for code in options if code == MTU or code in nic.options))
            row = TableRow(nic, mac_bytes(nic.mac), IPv4Address(nic.ip).packed, options, always)
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


def encoded_option(code: int, value: bytes) -> bytes:
    """A DHCP option. A value of more than 255 bytes is split (RFC 3396)."""
    if len(value) < 256:
        return bytes((code, len(value))) + value
    pieces = [value[at : at + 255] for at in range(0, len(value), 255)]
    return b"".join(bytes((code, len(piece))) + piece for piece in pieces)


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
