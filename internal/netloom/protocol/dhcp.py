"""DHCP: leases, subnets, options."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol, Self

import msgspec

from netloom.protocol.nic import KnownNic, NicPayload
from netloom.protocol.scalars import Domain, Id, IPv4, IPv4List, IPv6List, Number, ParamValue, quoted, string


class Resolvers(Protocol):
    """A payload that tells the network's resolvers and domain; empty says nothing."""

    @property
    def dns(self) -> IPv4List: ...
    @property
    def dns6(self) -> IPv6List: ...
    @property
    def domain(self) -> Domain: ...


class AddDhcpEntry(KnownNic, frozen=True, kw_only=True):
    """add-dhcp-entry: a static lease; ``default_nic`` false withholds the router option."""


class RemoveDhcpEntry(KnownNic, frozen=True, kw_only=True):
    """remove-dhcp-entry: the VM is gone, with its names, metadata and password."""


class ConfigDhcpSubnet(NicPayload, frozen=True, kw_only=True):
    """config-dhcp-subnet: DHCP serves the subnet of the NIC."""


class RemoveDhcpSubnet(NicPayload, frozen=True, kw_only=True):
    """remove-dhcp-subnet."""


class OptionCode(Number):
    """A DHCP option code that a lease may carry (RFC 2132: 0 is padding, 255 the end)."""

    LOW = 1
    HIGH = 254
    WHAT = "a DHCP option code"


class DhcpOptions(dict[int, str]):
    """Option code to value; CloudStack's documentation shows it as JSON in a string, and as an object."""

    @classmethod
    def parse(cls, value: object) -> Self:
        options = value if isinstance(value, dict) else None
        if isinstance(value, str):
            with contextlib.suppress(msgspec.DecodeError, RecursionError):
                options = msgspec.json.decode(string(value, limit=1 << 16), type=dict[str, Any])
        if options is None:
            raise ValueError(f"{quoted(value)}, where an object of options is expected")
        return cls({int(OptionCode.parse(code)): str(ParamValue.parse(it)) for code, it in options.items()})


class SetDhcpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """set-dhcp-options: documented; today's client never sends it. It may come before the NIC is known."""

    network_id: Id
    nic_id: Id
    options: DhcpOptions
    vpc_id: Id = Id("")
    extension_ip: IPv4 = IPv4("")
