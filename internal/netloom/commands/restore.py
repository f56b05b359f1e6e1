"""Everything that the VMs of a network need, in one call."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.dhcp import told_resolvers
from netloom.commands.nic import put, with_nic
from netloom.commands.userdata import with_items
from netloom.protocol.restore import RestoreNetwork
from netloom.state import Network


def restore_network(network: Network, asked: RestoreNetwork) -> Network:
    """Every listed VM has what the enabled services give; what is not listed or not enabled is left alone.

    Passwords are never in the list and stay. A tenant's item of an impossible name is left out: it must not keep
    the whole network down.
    """
    data = asked.restore_data
    told = told_resolvers(network, asked)
    if data.dhcp_enabled:
        told = replace(told, dhcp=True)
    if data.dns_enabled:
        told = replace(told, dns=True)
    for vm in data.vms:
        told, nic = with_nic(told, vm)
        restored = replace(nic, leased=nic.leased or bool(data.dhcp_enabled), named=nic.named or bool(data.dns_enabled))
        if data.userdata_enabled:
            restored = with_items(restored, [item for it in vm.vm_data if (item := it.checked()) is not None])
        told = put(told, restored, nic)
    return told
