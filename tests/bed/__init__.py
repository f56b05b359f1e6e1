"""The test bed: simulated hosts, VMs, an internet and a management server, all made of namespaces on one machine.

    with Bed(hosts=2, vlans=[1204], public_vlans=[101]) as bed:
        h1, h2 = bed.hosts
        vm = h1.vm("web-1", vlan=1204, mac="02:01:00:cc:00:03", ip="10.10.1.45/24", gateway="10.10.1.1")
        internet = bed.internet(vlan=101, address="203.0.113.1/24", also=["198.51.100.1/32"])
        cloud = FakeCloudStack(bed.management)

bed/standby.py has a larger one, for hosts that take over from each other.

Each machine is held by a process that ends when its pipe to the test closes. So a killed test leaves no process, link,
mount or file. Nothing is made in the root namespaces.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bed.cloudstack import FakeCloudStack as FakeCloudStack
    from bed.cloudstack import Offering as Offering
    from bed.lab import Bed as Bed
    from bed.lab import Host as Host
    from bed.lab import Internet as Internet
    from bed.lab import Vm as Vm

_MODULES = {
    "Bed": "bed.lab",
    "Host": "bed.lab",
    "Internet": "bed.lab",
    "Vm": "bed.lab",
    "FakeCloudStack": "bed.cloudstack",
    "Offering": "bed.cloudstack",
}


def __getattr__(name: str) -> object:
    # Import late: the child processes import this package too, and start in a third of the time without these modules.
    import importlib

    if name not in _MODULES:
        raise AttributeError(f"module 'bed' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
