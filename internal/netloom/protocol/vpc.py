"""The payloads of the commands about a VPC as a whole. They have no ``network_id``."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from netloom.protocol.scalars import Flag, Id, IPv4Prefix, IPv4PrefixList, UnicastIPv4, Vlan, Word


class VpcPayload(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a VPC. An older version of CloudStack's documentation calls ``vpc_cidr`` ``cidr``."""

    ALIASES: ClassVar[dict[str, str]] = {"cidr": "vpc_cidr"}

    vpc_id: Id
    zone_id: Id = Id("")
    vpc_state: Word = Word("")
    vpc_cidr: IPv4PrefixList = IPv4PrefixList()


class VpcPublicAddress(VpcPayload, frozen=True, kw_only=True):
    """A VPC and the five fields of its source-NAT address, as in ``PublicAddress``."""

    public_ip: UnicastIPv4 = UnicastIPv4("")
    public_vlan: Vlan = Vlan("")
    public_gateway: UnicastIPv4 = UnicastIPv4("")
    public_cidr: IPv4Prefix = IPv4Prefix("")
    source_nat: Flag = Flag(0)


class ImplementVpc(VpcPublicAddress, frozen=True, kw_only=True):
    """implement-vpc. It has the public fields if the VPC already has a source-NAT address."""


class ShutdownVpc(VpcPayload, frozen=True, kw_only=True):
    """shutdown-vpc: delete the VPC with its public addresses; CloudStack sends no release-ip for them."""


class DestroyVpc(VpcPayload, frozen=True, kw_only=True):
    """destroy-vpc: documented, but not sent by today's client."""


class UpdateVpcSourceNatIp(VpcPublicAddress, frozen=True, kw_only=True):
    """update-vpc-source-nat-ip: the fields are those of the new address."""
