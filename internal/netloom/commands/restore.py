"""restore-network: leases, names and metadata of all VMs of a network, in one call."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.dhcp import with_resolvers
from netloom.commands.nic import find_nic, put_nic, with_nic
from netloom.commands.userdata import valid_items, with_items
from netloom.protocol.restore import RestoredVm, RestoreNetwork
from netloom.state import Network


def restore_network(network: Network, payload: RestoreNetwork) -> Network:
    """Set what the enabled services need for each VM in the list. Other VMs and other services stay as they are.

    Passwords are never in the list, so they stay. Metadata items with an invalid name are left out: a tenant chooses
    the names, and one tenant's mistake must not prevent the restore of the network.
    """
    data = payload.restore_data
    network = with_resolvers(network, payload)
    if data.dhcp_enabled:
        network = replace(network, dhcp=True)
    if data.dns_enabled:
        network = replace(network, dns=True)
    network = _without_moved_addresses(network, data.vms.items)  # guard: a-restore-keeps-other-vms
    for vm in data.vms.items:
        network, nic = with_nic(network, vm)
        restored = replace(nic, leased=nic.leased or bool(data.dhcp_enabled), named=nic.named or bool(data.dns_enabled))
        if data.userdata_enabled:
            restored = with_items(restored, valid_items(vm.vm_data))
        network = put_nic(network, restored, nic)
    return network


def _without_moved_addresses(network: Network, vms: tuple[RestoredVm, ...]) -> Network:
    """Remove the old addresses of the listed VMs that have new ones, so that two VMs can exchange their addresses."""
    nics = dict(network.nics)
    for vm in vms:
        nic = find_nic(network, vm)
        if nic is not None:
            ip = "" if vm.ip and nic.ip != vm.ip else nic.ip
            ip6 = "" if vm.ip6_address and nic.ip6 != vm.ip6_address else nic.ip6
            nics[nic.key] = replace(nic, ip=ip, ip6=ip6)
    return replace(network, nics=nics)
