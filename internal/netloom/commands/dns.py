"""The DNS commands: names of VMs, and the resolver of a network."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.dhcp import serves_other_ranges, with_resolvers
from netloom.commands.nic import find_nic, put_nic, with_name_of, with_nic
from netloom.protocol.dns import AddDnsEntry, ConfigDnsSubnet, RemoveDnsEntry, RemoveDnsSubnet
from netloom.state import Network


def add_dns_entry(network: Network, payload: AddDnsEntry) -> Network:
    """Add the DNS name of the NIC and enable the resolver: config-dns-subnet is not sent for a NIC with IPv6.

    An expunged VM that still has the name loses it.
    """
    known, nic = with_nic(network, payload)
    named = put_nic(known, replace(nic, named=True), nic)
    named = with_name_of(named, nic, named.nics)  # guard: a-name-told-anew-has-one-vm
    return replace(with_resolvers(named, payload), dns=True)


def remove_dns_entry(network: Network, payload: RemoveDnsEntry) -> Network:
    """Remove the DNS name of the NIC; its lease stays."""
    nic = find_nic(network, payload)
    return network if nic is None else put_nic(network, replace(nic, named=False), nic)


def config_dns_subnet(network: Network, payload: ConfigDnsSubnet) -> Network:
    """Enable the resolver on the network."""
    return replace(with_resolvers(network, payload), dns=True)  # guard: config-dns-starts-the-resolver


def remove_dns_subnet(network: Network, payload: RemoveDnsSubnet) -> Network:
    """Disable the resolver on the network, unless another range still needs it."""
    return replace(network, dns=network.dns and serves_other_ranges(network))
