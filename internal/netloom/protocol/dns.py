"""The payloads of the DNS commands: names of VMs, and the resolver of a network."""

from __future__ import annotations

from netloom.protocol.nic import KnownNic, NicPayload


class AddDnsEntry(KnownNic, frozen=True, kw_only=True):
    """add-dns-entry: A and AAAA records of a NIC. It also starts the resolver."""


class RemoveDnsEntry(NicPayload, frozen=True, kw_only=True):
    """remove-dns-entry. No caller in CloudStack was found: remove-dhcp-entry removes the names."""


class ConfigDnsSubnet(NicPayload, frozen=True, kw_only=True):
    """config-dns-subnet: start the resolver. CloudStack does not send it for NICs with IPv6."""


class RemoveDnsSubnet(NicPayload, frozen=True, kw_only=True):
    """remove-dns-subnet: one range of the network needs no resolver any more."""
