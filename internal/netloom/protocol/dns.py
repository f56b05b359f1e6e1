"""DNS: names of VMs, resolvers."""

from __future__ import annotations

from netloom.protocol.nic import KnownNic, NicPayload


class AddDnsEntry(KnownNic, frozen=True, kw_only=True):
    """add-dns-entry: A and AAAA records; brings the resolver up by itself."""


class RemoveDnsEntry(KnownNic, frozen=True, kw_only=True):
    """remove-dns-entry: no caller was found; remove-dhcp-entry ends the names."""


class ConfigDnsSubnet(NicPayload, frozen=True, kw_only=True):
    """config-dns-subnet: not sent for NICs with IPv6."""


class RemoveDnsSubnet(NicPayload, frozen=True, kw_only=True):
    """remove-dns-subnet: for one subnet; others may still be served."""
