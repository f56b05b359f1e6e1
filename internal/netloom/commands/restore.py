"""restore-network: leases, names and metadata of all VMs of a network, in one call."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from msgspec.structs import replace

from netloom.commands.dhcp import with_resolvers
from netloom.commands.nic import Nics, with_name_of, without_unlisted
from netloom.commands.transition import Context, for_network, with_left_out
from netloom.commands.userdata import with_known_items
from netloom.protocol.restore import RestoredVm, RestoreNetwork
from netloom.state import Network, Nic, Scope


def restore(scope: Scope, payload: RestoreNetwork, context: Context) -> Scope:
    """Restore the network (:func:`restore_network`), and keep the reasons why parts of the list are not in force."""
    scope = for_network(restore_network)(scope, payload, context)
    return with_left_out(scope, "restore-network", str(payload.network_id), payload.restore_data.vms.invalid)


def restore_network(network: Network, payload: RestoreNetwork) -> Network:
    """Set what the enabled services need for each VM in the list. Other services stay as they are.

    Passwords are never in the list, so they stay. Metadata items with an invalid name are left out: a tenant chooses
    the names, and one tenant's mistake must not prevent the restore of the network. The list has all VMs, so a VM that
    is not in it is expunged (:func:`without_unlisted`).
    """
    data = payload.restore_data
    network = with_resolvers(network, payload)
    if data.dhcp_enabled:
        network = replace(network, dhcp=True)
    if data.dns_enabled:
        network = replace(network, dns=True)
    nics = Nics(network)
    listed_once = _once(data.vms.items)  # guard: a-restore-takes-a-nic-once
    vms = tuple(vm for vm in listed_once if vm.mac or nics.find(vm))
    all_known = len(vms) == len(listed_once)
    fresh = _fresh_others(network, {nic.key for vm in vms if (nic := nics.find(vm)) is not None})
    macs, addresses = {it.mac for it in fresh}, {it.ip for it in fresh} - {""}
    vms = tuple(
        vm
        for vm in vms
        if vm.mac not in macs and vm.ip not in addresses  # guard: a-list-may-be-old
    )
    _drop_moved_addresses(nics, vms)  # guard: a-restore-keeps-other-vms
    listed = set()
    for vm in vms:
        nic = nics.take(vm)
        restored = replace(nic, leased=nic.leased or bool(data.dhcp_enabled), named=nic.named or bool(data.dns_enabled))
        if data.userdata_enabled:
            restored = with_known_items(restored, vm.vm_data)
        nics.put(restored, nic)
        listed.add(restored.key)
    network = nics.network
    if data.vms.items and data.vms.complete and all_known:
        network = without_unlisted(network, listed)  # guard: a-restore-lists-all-vms
    others = network.nics.keys() - listed
    if others:
        for nic in [network.nics[key] for key in listed & network.nics.keys()]:
            network = with_name_of(network, nic, others)
    return network


def _once(vms: Iterable[RestoredVm]) -> tuple[RestoredVm, ...]:
    """The VMs without those whose NIC an earlier one names, by uuid or MAC address.

    Otherwise a repeated restore might do something else: the second one may be found only after the first one was put.
    """
    kept: list[RestoredVm] = []
    named: set[str] = set()
    for vm in vms:
        names = {str(it) for it in (vm.nic_uuid, vm.mac) if it}
        if named.isdisjoint(names):
            kept.append(vm)
        named |= names
    return tuple(kept)


def _fresh_others(network: Network, known: Collection[str]) -> list[Nic]:
    """The NICs that are not in the list and have had commands of their own since implement-network.

    Such a command is newer than the list. So a VM of the list with the address of such a NIC is expunged already.
    """
    return [nic for nic in network.nics.values() if nic.fresh and nic.key not in known]


def _drop_moved_addresses(nics: Nics, vms: tuple[RestoredVm, ...]) -> None:
    """Remove the old addresses of the listed VMs that have new ones, so that two VMs can exchange their addresses."""
    for vm in vms:
        nic = nics.find(vm)
        if nic is not None:
            ip = "" if vm.ip and nic.ip != vm.ip else nic.ip
            ip6 = "" if vm.ip6_address and nic.ip6 != vm.ip6_address else nic.ip6
            nics.update(replace(nic, ip=ip, ip6=ip6))
