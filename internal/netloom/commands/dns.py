"""Names of VMs, and the resolver that knows them."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.dhcp import serves_other_ranges, with_resolvers
from netloom.commands.nic import find_nic, put_nic, with_nic
from netloom.protocol.dns import AddDnsEntry, ConfigDnsSubnet, RemoveDnsEntry, RemoveDnsSubnet
from netloom.state import Network


def add_dns_entry(network: Network, payload: AddDnsEntry) -> Network:
    """The NIC has a name, and the resolver answers: config-dns-subnet is not sent for a NIC with IPv6."""
    known, nic = with_nic(network, payload)
    return replace(with_resolvers(put_nic(known, replace(nic, named=True), nic), payload), dns=True)


def remove_dns_entry(network: Network, payload: RemoveDnsEntry) -> Network:
    """The NIC has no name; its lease stays."""
    nic = find_nic(network, payload)
    return network if nic is None else put_nic(network, replace(nic, named=False), nic)


def config_dns_subnet(network: Network, payload: ConfigDnsSubnet) -> Network:
    """The resolver answers on the network."""
    return replace(with_resolvers(network, payload), dns=True)  # guard: config-dns-starts-the-resolver


def remove_dns_subnet(network: Network, payload: RemoveDnsSubnet) -> Network:
    """The resolver no longer answers on the network, unless another of its ranges is served."""
    return replace(network, dns=network.dns and serves_other_ranges(network))
