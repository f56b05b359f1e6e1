"""Public addresses, static NAT and port forwards."""

from __future__ import annotations

from typing import Literal

import msgspec


class Ports(msgspec.Struct, frozen=True, order=True, gc=False):
    """An inclusive range of ports, 0 to 65535; a single port is a range of one."""

    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class PublicIp(msgspec.Struct, frozen=True, kw_only=True):
    """A public address of the device.

    ``exit`` is the number of the address's exit within the scope. An exit is a public VLAN and a gateway; all addresses
    with both in common have the same exit. A new exit gets the lowest free number, from 1. Connection marks and route
    tables are derived from the number, so it stays the same as long as the exit has an address.
    """

    address: str
    vlan: str  # a tag, "untagged", or a VXLAN: "vx1000"
    gateway: str  # empty: CloudStack sent none
    cidr: str  # the public subnet, network address with prefix length
    exit: int
    source_nat: bool = False
    # The network or tier that it is assigned to. Empty: it is, or was, the source-NAT address of the scope.
    network_id: str = ""


class StaticNat(msgspec.Struct, frozen=True, kw_only=True):
    """One public address that is translated to one guest, in both directions."""

    public_ip: str
    private_ip: str
    network_id: str


class PortForward(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Ports of a public address that are translated to ports of a guest: each to its own, or all to one port."""

    public_ip: str
    protocol: Literal["tcp", "udp"]
    public_ports: Ports
    private_ip: str
    private_ports: Ports
    network_id: str

    @property
    def key(self) -> str:
        """The identity of the forward in ``Scope.port_forwards``: ``203.0.113.21/tcp/8080-8090``."""
        return f"{self.public_ip}/{self.protocol}/{self.public_ports}"
