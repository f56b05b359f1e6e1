"""restore-network: leases, names and metadata of all VMs of a network, in one call."""

from __future__ import annotations

import msgspec

from netloom.protocol.network import NetworkPayload
from netloom.protocol.nic import VmNic
from netloom.protocol.scalars import Domain, Flag, IPv4, IPv4List, IPv6List
from netloom.protocol.userdata import RestoredItem


class RestoredVm(VmNic, frozen=True, kw_only=True):
    """One VM. ``vm_data`` never has a password."""

    dns: IPv4List = IPv4List()
    dns6: IPv6List = IPv6List()
    domain: Domain = Domain("")
    vm_data: tuple[RestoredItem, ...] = ()


class RestoreData(msgspec.Struct, frozen=True, kw_only=True):
    """The VMs of the network, and the services that the network has."""

    dhcp_enabled: Flag = Flag(0)
    dns_enabled: Flag = Flag(0)
    userdata_enabled: Flag = Flag(0)
    vms: tuple[RestoredVm, ...] = ()


class RestoreNetwork(NetworkPayload, frozen=True, kw_only=True):
    """restore-network. It removes nothing."""

    restore_data: RestoreData
    dns: IPv4List = IPv4List()
    dns6: IPv6List = IPv6List()
    domain: Domain = Domain("")
    extension_ip: IPv4 = IPv4("")
