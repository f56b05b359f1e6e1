"""The DHCP commands: static leases, subnets and options."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.nic import put_nic, with_nic, without_nic
from netloom.commands.transition import Context, with_network
from netloom.errors import BadRequest
from netloom.guestwire import option_bytes
from netloom.protocol.dhcp import (
    AddDhcpEntry,
    ConfigDhcpSubnet,
    RemoveDhcpEntry,
    RemoveDhcpSubnet,
    Resolvers,
    SetDhcpOptions,
)
from netloom.state import Network, Scope


def add_dhcp_entry(network: Network, payload: AddDhcpEntry) -> Network:
    """Add the lease of the NIC and enable DHCP. CloudStack may never send config-dhcp-subnet."""
    known, nic = with_nic(network, payload)
    return replace(with_resolvers(put_nic(known, replace(nic, leased=True), nic), payload), dhcp=True)


def remove_dhcp_entry(network: Network, payload: RemoveDhcpEntry) -> Network:
    """Remove the NIC with its lease, names, metadata and password: no other command removes these."""
    return without_nic(network, payload)


def config_dhcp_subnet(network: Network, payload: ConfigDhcpSubnet) -> Network:
    """Enable DHCP on the network."""
    return replace(with_resolvers(network, payload), dhcp=True)


def remove_dhcp_subnet(network: Network, payload: RemoveDhcpSubnet) -> Network:
    """Disable DHCP on the network, unless another range still needs it."""
    return replace(network, dhcp=network.dhcp and serves_other_ranges(network))


def set_dhcp_options(scope: Scope, payload: SetDhcpOptions, context: Context) -> Scope:
    """Replace the extra DHCP options of one NIC. The command may come before the NIC is known."""
    for code, value in payload.options.items():
        try:
            option_bytes(code, value)
        except ValueError as error:
            raise BadRequest(f"payload.options.{code}: {error}") from None
    options = {str(code): value for code, value in sorted(payload.options.items())}
    network = scope.networks.get(payload.network_id)
    if network is None:
        if not options:
            return scope
        network = Network(network_id=str(payload.network_id))
    others = {nic_id: value for nic_id, value in network.dhcp_options.items() if nic_id != payload.nic_id}
    return with_network(
        scope, replace(network, dhcp_options={**others, str(payload.nic_id): options} if options else others)
    )


def serves_other_ranges(network: Network) -> bool:
    """Whether another range still needs the service when it is removed for one range.

    The call does not say which range lost its last NIC: its fields are those of the network.
    """
    return len(network.ranges) > 1 and bool(network.nics)


def with_resolvers(network: Network, payload: Resolvers) -> Network:
    """``network`` with the resolvers and the domain of the payload; an absent field changes nothing."""
    return replace(
        network,
        resolvers=tuple(map(str, payload.dns)) or network.resolvers,
        domain=str(payload.domain) or network.domain,
    )
