"""Calls about a VPC as a whole: no network_id."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from netloom.protocol.scalars import Flag, Id, IPv4Prefix, IPv4PrefixList, UnicastIPv4, Vlan, Word


class VpcPayload(msgspec.Struct, frozen=True, kw_only=True):
    """The VPC's fields; older text calls ``vpc_cidr`` ``cidr``."""

    ALIASES: ClassVar[dict[str, str]] = {"cidr": "vpc_cidr"}

    vpc_id: Id
    zone_id: Id = Id("")
    vpc_state: Word = Word("")
    vpc_cidr: IPv4PrefixList = IPv4PrefixList()


class VpcPublicAddress(VpcPayload, frozen=True, kw_only=True):
    """A VPC and the public fields of its source-NAT address."""

    public_ip: UnicastIPv4 = UnicastIPv4("")
    public_vlan: Vlan = Vlan("")
    public_gateway: UnicastIPv4 = UnicastIPv4("")
    public_cidr: IPv4Prefix = IPv4Prefix("")
    source_nat: Flag = Flag(0)


class ImplementVpc(VpcPublicAddress, frozen=True, kw_only=True):
    """implement-vpc: with public fields when a source-NAT address exists already."""


class ShutdownVpc(VpcPayload, frozen=True, kw_only=True):
    """shutdown-vpc: addresses included; no release-ip comes for them."""


class DestroyVpc(VpcPayload, frozen=True, kw_only=True):
    """destroy-vpc: today's client does not send it."""


class UpdateVpcSourceNatIp(VpcPublicAddress, frozen=True, kw_only=True):
    """update-vpc-source-nat-ip: the new address only."""
