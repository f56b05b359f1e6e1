"""restore-network: leases, names and metadata of all VMs of a network, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from netloom.protocol.network import NetworkPayload
from netloom.protocol.nic import VmNic
from netloom.protocol.reader import Items, convert_items
from netloom.protocol.scalars import Domain, Flag, IPv4, IPv6List, ResolverList
from netloom.protocol.userdata import GivenItem

# Fields of a VM without which it still has its lease.
_OPTIONAL = ("hostname", "domain", "dns", "dns6", "device_id", "default_nic", "ip6_address", "vm_data")


class RestoredVm(VmNic, frozen=True, kw_only=True):
    """One VM. ``vm_data`` never has a password."""

    vm_data: tuple[GivenItem, ...] = ()


class RestoredVms(Items[RestoredVm]):
    """The VMs, and the errors of the others. One VM with an invalid value must not prevent the restore of the network.

    A VM with an invalid name, domain or metadata keeps its lease. ``complete``: all VMs of the list are in ``items``.
    """

    def __init__(self, items: Iterable[RestoredVm] = (), invalid: Iterable[str] = (), *, complete: bool = True) -> None:
        super().__init__(items, invalid)
        self.complete = complete

    @classmethod
    def parse(cls, value: object) -> RestoredVms:
        """Raises BadRequest if ``value`` is not a list."""
        root = "payload.restore_data.vms"
        given = value if isinstance(value, list) else ()
        objects = [it for it in given if isinstance(it, dict)] if given else value
        items, errors = convert_items(objects, RestoredVm, root=root, wider=_narrower)
        errors += [f"{root}[{at}]: expected an object" for at, it in enumerate(given) if not isinstance(it, dict)]
        return cls(items, errors, complete=len(items) == len(given))


def _narrower(vm: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The VM without one of its optional fields, then without all of them."""
    for without in (*({it} for it in _OPTIONAL), set(_OPTIONAL)):
        yield {key: it for key, it in vm.items() if key not in without}


class RestoreData(msgspec.Struct, frozen=True, kw_only=True):
    """The VMs of the network, and the services that the network has."""

    dhcp_enabled: Flag = Flag(0)
    dns_enabled: Flag = Flag(0)
    userdata_enabled: Flag = Flag(0)
    vms: RestoredVms = msgspec.field(default_factory=RestoredVms)


class RestoreNetwork(NetworkPayload, frozen=True, kw_only=True):
    """restore-network: the list of VMs is complete."""

    restore_data: RestoreData
    dns: ResolverList = ResolverList()
    dns6: IPv6List = IPv6List()
    domain: Domain = Domain("")
    extension_ip: IPv4 = IPv4("")
