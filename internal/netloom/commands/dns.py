"""Names of VMs, and the resolver that knows them."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.dhcp import others_served, told_resolvers
from netloom.commands.nic import find, put, with_nic
from netloom.protocol.dns import AddDnsEntry, ConfigDnsSubnet, RemoveDnsEntry, RemoveDnsSubnet
from netloom.state import Network


def add_dns_entry(network: Network, asked: AddDnsEntry) -> Network:
    """The NIC has a name, and the resolver answers: config-dns-subnet is not sent for a NIC with IPv6."""
    known, nic = with_nic(network, asked)
    return replace(told_resolvers(put(known, replace(nic, named=True), nic), asked), dns=True)


def remove_dns_entry(network: Network, asked: RemoveDnsEntry) -> Network:
    """The NIC has no name; its lease stays."""
    nic = find(network, asked)
    return network if nic is None else put(network, replace(nic, named=False), nic)


def config_dns_subnet(network: Network, asked: ConfigDnsSubnet) -> Network:
    """The resolver answers on the network."""
    return replace(told_resolvers(network, asked), dns=True)  # guard: config-dns-starts-the-resolver


def remove_dns_subnet(network: Network, asked: RemoveDnsSubnet) -> Network:
    """The resolver no longer answers on the network, unless another of its ranges is served."""
    return replace(network, dns=network.dns and others_served(network))
