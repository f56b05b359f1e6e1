"""Guests that would not send their replies back through the device, and the source address that makes them do so.

A VM chooses the NIC for a reply by its own routes. Two kinds of connections through the device are therefore answered
past it, and conntrack, which sees one direction only, calls the client's later packets invalid:

* Connections to a NIC that is not the VM's default NIC. The VM answers through its default NIC.
* Connections from a tier in which the VM has another NIC. The VM answers the client directly.

For these connections the device puts its own guest address in the place of the client's address. This address is in
the NIC's own subnet, so the VM answers through the NIC. All other guests see the client's address.
"""

from __future__ import annotations

from collections.abc import Iterable

from netloom.state import Network, Nic


def device_for_all(networks: Iterable[Network]) -> dict[str, str]:
    """By the address of each NIC that is not its VM's default NIC: the device's guest address."""
    return {
        nic.ip: network.device_ip for network in networks for nic in network.nics.values() if nic.ip and not nic.default
    }


def device_for_network(networks: Iterable[Network]) -> dict[str, dict[str, str]]:
    """By network_id: the addresses in other networks of VMs with a default NIC there and another NIC in this network.

    The values are as in :func:`device_for_all`, which has the NICs that are not the default. CloudStack names no VM in
    calls about a NIC. NICs of one VM have the same host name, and a VPC has no two VMs with the same host name.
    """
    listed = list(networks)
    homes: dict[str, list[tuple[Network, Nic]]] = {}
    for network in listed:
        for nic in network.nics.values():
            if nic.ip and nic.hostname:
                homes.setdefault(nic.hostname.lower(), []).append((network, nic))
    found: dict[str, dict[str, str]] = {it.network_id: {} for it in listed}
    for nics in homes.values():
        for source, _ in nics:
            found[source.network_id] |= {nic.ip: home.device_ip for home, nic in nics if nic.default and home != source}
    return found
