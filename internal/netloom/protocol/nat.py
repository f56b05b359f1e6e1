"""The payloads of the commands about public addresses, static NAT and port forwards."""

from __future__ import annotations

from typing import Literal

from netloom.protocol.network import NetworkPayload
from netloom.protocol.scalars import Choice, Flag, IPv4, IPv4Prefix, Loose, PortRange, UnicastIPv4, Vlan


class TransportProtocol(Choice[Literal["tcp", "udp"]]):
    """The protocols that port forwards exist for."""


class PublicAddress(NetworkPayload, frozen=True, kw_only=True):
    """A network and the five fields of a public address. All five are missing if CloudStack does not find it.

    ``VpcPublicAddress`` has the same five fields: a msgspec struct cannot have two bases with fields.
    """

    public_ip: UnicastIPv4 = UnicastIPv4("")
    public_vlan: Vlan = Vlan("")
    public_gateway: UnicastIPv4 = UnicastIPv4("")
    public_cidr: IPv4Prefix = IPv4Prefix("")
    source_nat: Flag = Flag(0)


class AssignIp(PublicAddress, frozen=True, kw_only=True):
    """assign-ip: assign the address to the device."""


class ReleaseIp(NetworkPayload, frozen=True, kw_only=True):
    """release-ip: remove the address from the device."""

    public_ip: Loose = Loose("")


class AddStaticNat(PublicAddress, frozen=True, kw_only=True):
    """add-static-nat. ``source_nat`` has no meaning here: it is ``false`` even on the source-NAT address."""

    private_ip: IPv4


class DeleteStaticNat(NetworkPayload, frozen=True, kw_only=True):
    """delete-static-nat. Only the public address is needed."""

    public_ip: Loose = Loose("")


class AddPortForward(PublicAddress, frozen=True, kw_only=True):
    """add-port-forward: from a range of ports to a range of the same length, or to one port."""

    public_port: PortRange
    private_ip: IPv4
    private_port: PortRange
    protocol: TransportProtocol


class DeletePortForward(NetworkPayload, frozen=True, kw_only=True):
    """delete-port-forward. ``private_ip`` may be missing.

    The values are compared with what is stored. A value that add-port-forward refuses is not stored, so nothing is
    deleted; an error would make the forward impossible to delete in CloudStack.
    """

    public_ip: Loose = Loose("")
    public_port: Loose = Loose("")
    protocol: Loose = Loose("")
    private_ip: Loose = Loose("")
