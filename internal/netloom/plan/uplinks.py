"""Which NIC carries a VLAN whose registered device is a bridge, CloudStack's traffic label.

CloudStack's KVM agent follows such a bridge to its NIC (``getPif`` in BridgeVifDriver.java): ``cloudbr1`` with the port
``eth1`` gives ``eth1.101`` and ``breth1-101``. A port that is a VLAN link leads to the link below it. The same rules
hold here, so that the device and the VMs are in one bridge. Two VLAN links with one tag, one on the NIC and one on the
bridge above it, cannot both work: the kernel gives each frame to the one on the NIC (``vlan_do_receive``).

The result depends on the host alone, and it is computed anew each time. Another host may have another NIC under the
same label.
"""

from __future__ import annotations

import re

import msgspec

from netloom import names
from netloom.errors import HostRefused
from netloom.names import UNTAGGED
from netloom.plan.have import HostLink
from netloom.plan.segments import detail_of
from netloom.render.want import Port, Segment, Want

# The ports of a bridge that the KVM agent takes for NICs (ifNamePatterns in LibvirtComputingResource.java).
_NIC_NAME = re.compile(r"(?:eth|bond|vlan|vx|em|ens|eno|enp|team|enx|dummy|lo|p[0-9]+p[0-9]+).*")


def is_nic_name(name: str) -> bool:
    """Whether CloudStack's KVM agent takes a port of this name for a NIC."""
    return _NIC_NAME.fullmatch(name) is not None  # guard: ports-are-nics-by-the-agents-names


def followed(segment: Segment) -> bool:
    """Whether the segment is a VLAN. Untagged networks are in the bridge itself, and so are the tunnels of VXLANs."""
    return segment.kind == "vlan" and segment.vlan != UNTAGGED


def nics_of(bridge: HostLink, links: dict[str, HostLink]) -> list[str]:
    """The NICs that the ports of the bridge lead to. ``links`` contains the ports."""
    ports = [links[name] for name in bridge.ports if name in links and is_nic_name(name)]
    return sorted({it.parent if it.kind == "vlan" and it.parent else it.name for it in ports})


def follow(want: Want, links: dict[str, HostLink]) -> Want:
    """``want`` with the segments that this host has; the same object if it names NICs only.

    ``links``: the devices of the segments. For a bridge also its ports and the links below them, and the links and
    bridges that carry the VLAN now.

    Raises HostRefused for a bridge with no NIC, or with more than one. A network that is in a bridge already stays.
    """
    ports = tuple(_followed(port, links) for port in want.ports)
    return want if ports == want.ports else msgspec.structs.replace(want, ports=ports)


def _followed(port: Port, links: dict[str, HostLink]) -> Port:
    label = links.get(port.segment.nic)
    if label is None or label.kind != "bridge" or not followed(port.segment):
        return port
    return msgspec.structs.replace(port, segment=_segment(port, label, links))


def _segment(port: Port, label: HostLink, links: dict[str, HostLink]) -> Segment:
    segment = port.segment
    nics = nics_of(label, links)
    if len(nics) != 1:
        used = _used_now(port, links)
        if not used:
            found = f"has {len(nics)} NICs ({', '.join(nics)})" if nics else f"has no NIC ({_listed(label)})"
            raise HostRefused(
                f"bridge {label.name} {found}, so it is open which NIC carries VLAN {segment.vlan}",
                hint=f"name the NIC itself in {detail_of(port)}",
            )
        if used == label.name:
            return segment
        nics = [used]
    if _used_by_others(segment, nics[0], links):  # guard: vms-above-a-label-keep-their-wire
        return msgspec.structs.replace(segment, besides=nics[0])
    return msgspec.structs.replace(
        segment,
        nic=nics[0],
        bridge=names.bridge(nics[0], segment.vlan),
        vlan_link=names.vlan_link(nics[0], segment.vlan),
        besides=label.name,
    )


def _listed(label: HostLink) -> str:
    return f"its ports: {', '.join(label.ports)}" if label.ports else "it has no ports"


def _used_now(port: Port, links: dict[str, HostLink]) -> str:
    """The device below the bridge that the port is in, read from the bridge's name; empty if the port is in none."""
    host_link = links.get(port.host_link)
    nic, _, vlan = (host_link.master if host_link is not None else "").removeprefix("br").rpartition("-")
    return nic if vlan == port.segment.vlan else ""


def _used_by_others(segment: Segment, nic: str, links: dict[str, HostLink]) -> bool:
    """Whether others use the VLAN above the bridge, and it works: the NIC has no VLAN link that takes the frames."""
    on_nic = any(it.kind == "vlan" and it.parent == nic and str(it.vlan_id) == segment.vlan for it in links.values())
    bridge = links.get(segment.bridge)
    if bridge is None or on_nic or names.vlan_link(nic, segment.vlan) in links:
        return False
    carriers = {segment.vlan_link, bridge.carrier}
    return any(name not in carriers and not (name in links and links[name].ours) for name in bridge.ports)
