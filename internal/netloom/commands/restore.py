"""Everything that the VMs of a network need, in one call."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.dhcp import with_resolvers
from netloom.commands.nic import find_nic, put_nic, with_nic
from netloom.commands.userdata import with_items
from netloom.protocol.restore import RestoredVm, RestoreNetwork
from netloom.state import Network


def restore_network(network: Network, payload: RestoreNetwork) -> Network:
    """Every listed VM has what the enabled services give; what is not listed or not enabled is left alone.

    Passwords are never in the list and stay. A tenant's item of an impossible name is left out: it must not keep
    the whole network down.
    """
    data = payload.restore_data
    network = with_resolvers(network, payload)
    if data.dhcp_enabled:
        network = replace(network, dhcp=True)
    if data.dns_enabled:
        network = replace(network, dns=True)
    network = _without_moved_addresses(network, data.vms)  # guard: a-restore-keeps-other-vms
    for vm in data.vms:
        network, nic = with_nic(network, vm)
        restored = replace(nic, leased=nic.leased or bool(data.dhcp_enabled), named=nic.named or bool(data.dns_enabled))
        if data.userdata_enabled:
            restored = with_items(restored, [item for it in vm.vm_data if (item := it.valid_item()) is not None])
        network = put_nic(network, restored, nic)
    return network


def _without_moved_addresses(network: Network, vms: tuple[RestoredVm, ...]) -> Network:
    """Listed VMs let go of the addresses that they no longer have: two that have changed places take nothing away."""
    nics = dict(network.nics)
    for vm in vms:
        nic = find_nic(network, vm)
        if nic is not None:
            ip = "" if vm.ip and nic.ip != vm.ip else nic.ip
            ip6 = "" if vm.ip6_address and nic.ip6 != vm.ip6_address else nic.ip6
            nics[nic.key] = replace(nic, ip=ip, ip6=ip6)
    return replace(network, nics=nics)
