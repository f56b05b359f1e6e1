"""A VM's NIC: what every call about one carries."""

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
    IPv4List,
    IPv4Prefix,
    IPv6,
    IPv6List,
    IPv6Prefix,
    Mac,
    Netmask,
    Number,
    Word,
)


class NicPayload(NetworkPayload, frozen=True, kw_only=True):
    """The NIC's fields. ``gateway`` (of the network's fields) is the NIC's here.

    ``dns`` and ``domain`` come with the DHCP and DNS calls only; ``dns6`` is documented and was never seen.
    The NIC of a removal is bare: no uuid, no name, ``default_nic`` always false.
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
    default_nic: Flag = Flag(0)
    device_id: Number = Number(0)
    ip6_address: IPv6 = IPv6("")
    ip6_gateway: IPv6 = IPv6("")
    ip6_cidr: IPv6Prefix = IPv6Prefix("")
    hostname: HostName = HostName("")
    extension_ip: IPv4 = IPv4("")
    dns: IPv4List = IPv4List()
    dns6: IPv6List = IPv6List()
    domain: Domain = Domain("")

    @property
    def subnet(self) -> str:
        """The NIC's IPv4 subnet, from its address and its netmask; empty when one of them is missing."""
        return str(IPv4Prefix.parse(f"{self.ip}/{self.netmask.length}")) if self.ip and self.netmask else ""


class KnownNic(NicPayload, frozen=True, kw_only=True):
    """A NIC that the call must name: by its uuid, its MAC or its number."""

    def __post_init__(self) -> None:
        if not (self.nic_uuid or self.mac or self.nic_id):
            raise ValueError("none of nic_uuid, mac and nic_id is given")


class PrepareNic(KnownNic, frozen=True, kw_only=True):
    """prepare-nic: the NIC is known; on plain shared networks the first command of all."""


class ReleaseNic(KnownNic, frozen=True, kw_only=True):
    """release-nic: the VM has stopped; what is known of it stays."""


class VmNic(msgspec.Struct, frozen=True, kw_only=True):
    """How restore-network writes a NIC: no gateway, no netmask."""

    ip: IPv4 = IPv4("")
    ip6_address: IPv6 = IPv6("")
    mac: Mac = Mac("")
    nic_uuid: Word = Word("")
    hostname: HostName = HostName("")
    device_id: Number = Number(0)
    default_nic: Flag = Flag(0)
