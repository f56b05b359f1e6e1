"""The fields of all calls about a VM's NIC."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from netloom.protocol.network import NetworkPayload
from netloom.protocol.scalars import (
    Domain,
    Flag,
    HostName,
    Id,
    IPv4,
    IPv4Prefix,
    IPv6,
    IPv6List,
    IPv6Prefix,
    Mac,
    Netmask,
    Number,
    ResolverList,
    Word,
)


class NicPayload(NetworkPayload, frozen=True, kw_only=True):
    """A network and the fields of a NIC. ``gateway``, a field of the network, is the NIC's here.

    ``dns`` and ``domain`` come with the DHCP and DNS calls only; ``dns6`` is documented, but was never observed. In
    calls that remove a NIC, uuid and host name are missing and ``default_nic`` is always false.
    """

    ALIASES: ClassVar[dict[str, str]] = {
        "nic_ip6_address": "ip6_address",
        "nic_ip6_gateway": "ip6_gateway",
        "nic_ip6_cidr": "ip6_cidr",
    }

    nic_id: Id = Id("")
    nic_uuid: Word = Word("")
    mac: Mac = Mac("")
    ip: IPv4 = IPv4("")
    netmask: Netmask = Netmask("")
    default_nic: Flag | None = None
    device_id: Number = Number(0)
    ip6_address: IPv6 = IPv6("")
    ip6_gateway: IPv6 = IPv6("")
    ip6_cidr: IPv6Prefix = IPv6Prefix("")
    hostname: HostName = HostName("")
    extension_ip: IPv4 = IPv4("")
    dns: ResolverList = ResolverList()
    dns6: IPv6List = IPv6List()
    domain: Domain = Domain("")

    @property
    def subnet(self) -> str:
        """The NIC's IPv4 subnet, from its address and its netmask; empty when one of them is missing."""
        return str(IPv4Prefix.parse(f"{self.ip}/{self.netmask.length}")) if self.ip and self.netmask else ""


class KnownNic(NicPayload, frozen=True, kw_only=True):
    """A payload that adds something and must name its NIC by uuid, MAC address or number."""

    def __post_init__(self) -> None:
        if not (self.nic_uuid or self.mac or self.nic_id):
            raise ValueError("none of nic_uuid, mac and nic_id is given")


class PrepareNic(KnownNic, frozen=True, kw_only=True):
    """prepare-nic: add the NIC. On a plain shared network this is the first command."""


class ReleaseNic(NicPayload, frozen=True, kw_only=True):
    """release-nic: the VM has stopped. Its state stays."""


class VmNic(msgspec.Struct, frozen=True, kw_only=True):
    """A NIC in restore-network, without gateway and netmask.

    The fields are in NicPayload too: a msgspec struct cannot have two bases with fields.
    """

    ip: IPv4 = IPv4("")
    ip6_address: IPv6 = IPv6("")
    mac: Mac = Mac("")
    nic_uuid: Word = Word("")
    hostname: HostName = HostName("")
    device_id: Number = Number(0)
    default_nic: Flag | None = None
