"""The device as the tables of all network types see it: its links by name, and its services for guests.

The device is the namespace of a scope. Rules recognise links by their names (``names.guest_link``,
``names.public_link``).
"""

from __future__ import annotations

from typing import Literal

from netloom import names
from netloom.state import Network

PUBLIC_LINKS = '"' + names.public_link("*") + '"'
GUEST_LINKS = '"' + names.guest_link("*") + '"'

# Packets of guests to any address of the device.
FROM_GUESTS_TO_DEVICE = f"iifname {GUEST_LINKS} fib daddr type local"

DNS_PORT = 53  # UDP and TCP
DHCP_PORT = 67  # UDP
HTTP_PORTS = (80, 8080)  # TCP: metadata, passwords
SERVICE_PORTS_UDP = (DNS_PORT, DHCP_PORT)
SERVICE_PORTS_TCP = (DNS_PORT, *HTTP_PORTS)

# From every source address: a client that rebinds still has the address of its last network, and needs a DHCPNAK to
# give it up (RFC 2131 sections 4.3.2 and 4.4.5).
DHCP_REQUEST = "ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept"


def guest_link(network: Network) -> str:
    """The link of a network in the device, quoted for a rule."""
    return f'"{names.guest_link(network.network_id)}"'


def device_services(network: Network, *, ping: bool) -> tuple[str, ...]:
    """The rules that accept requests from guests of ``network``: DHCP, DNS, metadata, passwords, and ``ping``."""
    link = guest_link(network)
    to_device = f"iifname {link} ip daddr {network.device_ip}"
    return (
        f"iifname {link} {DHCP_REQUEST}",
        *([f"{to_device} icmp type echo-request accept"] if ping else []),
        f"{to_device} udp dport {_ports(SERVICE_PORTS_UDP)} accept",
        f"{to_device} tcp dport {_ports(SERVICE_PORTS_TCP)} accept",
    )


def refusals(packets: str, icmp: Literal["icmp", "icmpv6"] = "icmp") -> tuple[str, ...]:
    """The rules that answer requests to closed ports: TCP with a reset, UDP with "port unreachable".

    ``packets``: matches only packets of own guests to addresses of the device. Other machines get no answer. ICMP
    errors are limited, because before Linux 6.12 all namespaces share one limit for them (``icmp_msgs_per_sec``).
    """
    limit = "limit rate 5/second burst 10 packets"  # guard: refusals-of-udp-are-limited
    return (
        f"{packets} meta l4proto tcp reject with tcp reset",  # guard: a-closed-port-of-the-device-is-refused
        f"{packets} meta l4proto udp {limit} reject with {icmp} type port-unreachable",
    )


def _ports(ports: tuple[int, ...]) -> str:
    return f"{{ {', '.join(map(str, ports))} }}"
