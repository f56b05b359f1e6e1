"""Public addresses and what they are translated to."""

from __future__ import annotations

from typing import Literal

import msgspec


class Ports(msgspec.Struct, frozen=True, order=True):
    """An inclusive range of ports, 1 to 65535; a single port is a range of one."""

    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first + 1

    def __str__(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


class PublicIp(msgspec.Struct, frozen=True, kw_only=True):
    """A public address that the device holds.

    ``exit`` numbers the way out (a public VLAN and its gateway) within the scope: lowest free number from 1,
    the same for all addresses with the same VLAN and gateway, and unchanged while one of them is held. Marks and
    route tables are made from it, so it must not move under established flows.
    """

    address: str
    vlan: str  # a tag, or "untagged"
    gateway: str  # empty: CloudStack did not say
    cidr: str  # the public subnet, network address with prefix length
    exit: int
    source_nat: bool = False
    network_id: str = ""  # the tier that asked for it; empty: the VPC itself


class StaticNat(msgspec.Struct, frozen=True, kw_only=True):
    """One public address stands for one guest, both ways."""

    public_ip: str
    private_ip: str
    network_id: str


class PortForward(msgspec.Struct, frozen=True, kw_only=True):
    """Ports of a public address lead to ports of a guest: one to one, or all to one port."""

    public_ip: str
    protocol: Literal["tcp", "udp"]
    public_ports: Ports
    private_ip: str
    private_ports: Ports
    network_id: str

    @property
    def key(self) -> str:
        """What makes a forward the same forward: ``203.0.113.21/tcp/8080-8090``."""
        return f"{self.public_ip}/{self.protocol}/{self.public_ports}"
