"""The payloads of the DHCP commands: leases, subnets and options."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol, Self

import msgspec

from netloom.protocol.nic import KnownNic, NicPayload
from netloom.protocol.scalars import Domain, Id, IPv4, IPv4List, IPv6List, Number, OptionValue, quoted, string


class Resolvers(Protocol):
    """A payload with the network's resolvers and domain; empty means not given."""

    @property
    def dns(self) -> IPv4List: ...
    @property
    def dns6(self) -> IPv6List: ...
    @property
    def domain(self) -> Domain: ...


class AddDhcpEntry(KnownNic, frozen=True, kw_only=True):
    """add-dhcp-entry: a static lease. If ``default_nic`` is false, DHCP sends no router option."""


class RemoveDhcpEntry(NicPayload, frozen=True, kw_only=True):
    """remove-dhcp-entry: the NIC is removed, with its names, metadata and password."""


class ConfigDhcpSubnet(NicPayload, frozen=True, kw_only=True):
    """config-dhcp-subnet: DHCP answers on the network."""


class RemoveDhcpSubnet(NicPayload, frozen=True, kw_only=True):
    """remove-dhcp-subnet: one range of the network needs no DHCP any more."""


class OptionCode(Number):
    """The code of a DHCP option (RFC 2132: 0 is padding, 255 is the end)."""

    LOW = 1
    HIGH = 254
    WHAT = "a DHCP option code"


class DhcpOptions(dict[int, str]):
    """Values by option code. CloudStack's documentation shows an object, and an object as JSON in a string."""

    @classmethod
    def parse(cls, value: object) -> Self:
        options = value if isinstance(value, dict) else None
        if isinstance(value, str):
            with contextlib.suppress(msgspec.DecodeError, RecursionError):
                options = msgspec.json.decode(string(value, limit=1 << 16), type=dict[str, Any])
        if options is None:
            raise ValueError(f"{quoted(value)}, where an object of options is expected")
        return cls({int(OptionCode.parse(code)): str(OptionValue.parse(it)) for code, it in options.items()})


class SetDhcpOptions(msgspec.Struct, frozen=True, kw_only=True):
    """set-dhcp-options: documented, but not sent by today's client. It may come before the NIC is known."""

    network_id: Id
    nic_id: Id
    options: DhcpOptions
    vpc_id: Id = Id("")
    extension_ip: IPv4 = IPv4("")
