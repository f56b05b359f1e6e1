"""Public addresses: held, translated one to one, forwarded port by port."""

from __future__ import annotations

from typing import Literal

from netloom.protocol.network import NetworkPayload
from netloom.protocol.scalars import Choice, Flag, IPv4, IPv4Prefix, PortRange, UnicastIPv4, Vlan


class TransportProtocol(Choice[Literal["tcp", "udp"]]):
    """What has ports."""


class PublicAddress(NetworkPayload, frozen=True, kw_only=True):
    """A network and the five public fields. All five may be missing when CloudStack does not find the address."""

    public_ip: UnicastIPv4 = UnicastIPv4("")
    public_vlan: Vlan = Vlan("")
    public_gateway: UnicastIPv4 = UnicastIPv4("")
    public_cidr: IPv4Prefix = IPv4Prefix("")
    source_nat: Flag = Flag(0)


class AssignIp(PublicAddress, frozen=True, kw_only=True):
    """assign-ip: the device holds the address."""


class ReleaseIp(PublicAddress, frozen=True, kw_only=True):
    """release-ip: the device no longer holds it."""


class AddStaticNat(PublicAddress, frozen=True, kw_only=True):
    """add-static-nat. ``source_nat`` says nothing here: it is ``false`` even on the source-NAT address."""

    private_ip: IPv4


class DeleteStaticNat(PublicAddress, frozen=True, kw_only=True):
    """delete-static-nat."""

    private_ip: IPv4 = IPv4("")


class AddPortForward(PublicAddress, frozen=True, kw_only=True):
    """add-port-forward: a range leads to a range of the same length, or to one port."""

    public_port: PortRange
    private_ip: IPv4
    private_port: PortRange
    protocol: TransportProtocol


class DeletePortForward(PublicAddress, frozen=True, kw_only=True):
    """delete-port-forward; only what names the forward is needed."""

    public_port: PortRange
    protocol: TransportProtocol
    private_ip: IPv4 = IPv4("")
    private_port: PortRange | None = None
