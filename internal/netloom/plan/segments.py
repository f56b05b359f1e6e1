"""Where a segment is on this host: which bridge its ports join, and the steps that make that bridge ready.

A bridge, VLAN link or tunnel that exists already is used, whoever created it. From a NIC to a port:

    VLAN      NIC eth1 --- VLAN link eth1.204 --- bridge breth1-204 --- host end vnetg204
    VXLAN     NIC (or its bridge) --- tunnel vxlan5000 --- bridge brvx-5000 --- host end vnetg204
    untagged  NIC eth1 --- bridge breth1-0 (or the bridge that the NIC is in) --- host end vnetg204

Our ports have the MTU of the link that carries the segment, below it and above it. A smaller port would pull the bridge
down to its own MTU, and the kernel drops a frame that is larger than the MTU of the port that receives it, without an
ICMP error.
"""

from __future__ import annotations

import re

import msgspec

from netloom import names
from netloom.errors import HostRefused
from netloom.names import UNTAGGED
from netloom.netobjects import ETHERNET_MTU, IP6_MTU_MIN, VXLAN_BYTES
from netloom.plan.have import ALIAS, Have, HostLink, Others
from netloom.plan.steps import (
    AttachCarrier,
    AttachPort,
    CreateBridge,
    CreateVlanLink,
    CreateVxlanLink,
    GuardBridge,
    SetCarrierMtu,
    SetHostLinkUp,
    SilenceIpv6,
    Step,
)
from netloom.render.want import Port, Segment

_TAME = re.compile(r"[A-Za-z0-9_.-]+")  # names of links that can be part of the name of a chain


class SegmentPlacement(msgspec.Struct, frozen=True):
    """The bridge of a segment on this host, and the MTU of its ports.

    ``ours``: we created the bridge, or ``steps`` do. ``others``: else, its guard.
    """

    bridge: str
    mtu: int
    steps: tuple[Step, ...] = ()
    ours: bool = False
    others: Others = Others()


def place(have: Have, port: Port) -> SegmentPlacement:
    """Find or prepare the bridge of the port's segment.

    Raises HostRefused when the NIC does not exist, when VXLAN has no IPv4 address to send from, when the host would
    lose the addresses of a NIC, or when a link that should be a bridge is none.
    """
    if port.segment.vlan == UNTAGGED:
        return _untagged(have, port)
    return _vxlan(have, port) if port.segment.kind == "vxlan" else _vlan(have, port)


def is_guest(port: Port) -> bool:
    """Whether the port leads to guests; the others lead to public networks."""
    return port.link.startswith("gst-")


def _vlan(have: Have, port: Port) -> SegmentPlacement:
    segment = port.segment
    steps: list[Step] = []
    carrier = _vlan_link(have, segment)
    if carrier is None:
        nic = _nic(have, port)
        if not nic.up:
            steps.append(SetHostLinkUp(nic.name))
        steps.append(CreateVlanLink(segment.vlan_link, segment.nic, int(segment.vlan)))
        carrier = HostLink(name=segment.vlan_link, kind="vlan", alias=ALIAS, ipv6=True, mtu=nic.mtu)
    elif carrier.parent and not carrier.up and not have.host_links[carrier.parent].up:
        steps.append(SetHostLinkUp(carrier.parent))  # the kernel sets no VLAN link up on a NIC that is down
    nic_mtu = have.host_links[carrier.parent].mtu if carrier.parent in have.host_links else 0
    if carrier.ours and carrier.mtu < nic_mtu:
        # The kernel lowers a VLAN link with its NIC, and does not raise it again.
        steps.append(SetCarrierMtu(carrier.name, nic_mtu))
        carrier = msgspec.structs.replace(carrier, mtu=nic_mtu, ipv6=carrier.ipv6 or carrier.mtu < IP6_MTU_MIN)
    return _bridged(have, segment, carrier, steps)


def _vlan_link(have: Have, segment: Segment) -> HostLink | None:
    for link in have.host_links.values():
        if link.kind == "vlan" and link.parent == segment.nic and str(link.vlan_id) == segment.vlan:
            return link
    return have.host_links.get(segment.vlan_link)


def _vxlan(have: Have, port: Port) -> SegmentPlacement:
    """Use an existing tunnel with this VNI, whoever created it and however it finds its peers (multicast, EVPN).

    A tunnel of ours is created over the link with the address that frames are sent from: the bridge that the NIC is
    in, else the NIC.
    """
    segment = port.segment
    steps: list[Step] = []
    tunnels = [it for it in have.host_links.values() if it.kind == "vxlan" and str(it.vlan_id) == segment.vlan]
    carrier = tunnels[0] if tunnels else have.host_links.get(segment.vlan_link)
    if carrier is None:
        nic = _nic(have, port)
        under = have.host_links.get(nic.master, nic)
        mtu = under.mtu - VXLAN_BYTES if under.mtu else 0
        if not any(":" not in address for address in under.addresses):
            raise HostRefused(
                f"{under.name} has no IPv4 address for VXLAN to send from",
                hint=f"give it one, or name another NIC in {detail_of(port)}",
            )
        steps += [SetHostLinkUp(link.name) for link in dict.fromkeys((nic, under)) if not link.up]
        steps.append(CreateVxlanLink(segment.vlan_link, under.name, int(segment.vlan)))
        carrier = HostLink(name=segment.vlan_link, kind="vxlan", alias=ALIAS, ipv6=True, mtu=mtu)
    elif carrier.ours and (found := have.host_links.get(segment.nic)) is not None:
        # The kernel sets the MTU of a tunnel once, when the tunnel is created.
        mtu = have.host_links.get(found.master, found).mtu - VXLAN_BYTES
        if 0 < mtu != carrier.mtu:
            steps.append(SetCarrierMtu(carrier.name, mtu))
            carrier = msgspec.structs.replace(carrier, mtu=mtu, ipv6=carrier.ipv6 or carrier.mtu < IP6_MTU_MIN)
    return _bridged(have, segment, carrier, steps)


def _untagged(have: Have, port: Port) -> SegmentPlacement:
    nic = _nic(have, port)
    if nic.kind == "bridge":
        return SegmentPlacement(nic.name, _bridge_mtu(have, nic), others=guard_of(nic, have.host_links))
    if not nic.master and nic.addresses:
        raise HostRefused(
            f"NIC {nic.name} carries the host's address {nic.addresses[0]} and is in no bridge: "
            f"an untagged network would cut the host off",
            hint=f"put {nic.name} into a bridge that has the address, or name another NIC in {detail_of(port)}",
        )
    return _bridged(have, port.segment, nic, [])


def _bridge_mtu(have: Have, bridge: HostLink) -> int:
    """The smallest MTU of the uplinks in a bridge of the operator.

    The bridge's own MTU follows the smallest of all its ports, and these include ours and the taps of VMs. It limits
    only what the host itself sends.
    """
    ports = [have.host_links[name] for name in bridge.ports if name in have.host_links]
    uplinks = [it.mtu for it in ports if not leads_to_guests(bridge.name, it) and it.mtu]  # guard: guests-set-no-mtu
    return min(uplinks, default=bridge.mtu or ETHERNET_MTU)


def _bridged(have: Have, segment: Segment, carrier: HostLink, steps: list[Step]) -> SegmentPlacement:
    """The bridge that the carrier is in, else the segment's own bridge with the carrier as a port."""
    name = carrier.master or segment.bridge
    bridge = have.host_links.get(name)
    if bridge is None:
        was_up = carrier.up and carrier.name not in have.were_down
        alias = f"{ALIAS} {'carries' if was_up else 'raises'} {carrier.name}"
        steps.append(CreateBridge(name, alias))
        bridge = HostLink(name=name, kind="bridge", alias=alias, ipv6=True)
    elif bridge.kind != "bridge":
        raise HostRefused(
            f"{carrier.name} is in {name}, which is not a bridge" if carrier.master else f"link {name} is not a bridge",
            hint="rename it, or name another NIC in the registration",
        )
    # Also to a bridge that is there: it may have been made before anybody knew which ports the old one had.
    for orphan in sorted(have.orphans.get(name, frozenset()) - {carrier.name}):
        if orphan in have.host_links and not have.host_links[orphan].master:
            steps.append(AttachPort(orphan, name))  # guard: a-lost-port-comes-back-to-a-new-bridge
    moved = _above_the_label(have, segment)
    steps += [AttachPort(it, name) for it in moved]  # guard: vms-above-a-label-move-to-the-nic
    steps += [SilenceIpv6(link.name) for link in (carrier, bridge) if link.ours and link.ipv6]
    if bridge.ours and (name not in have.guarded or name not in have.host_links):
        steps.append(GuardBridge(name, (carrier.name,)))
    if not carrier.master:
        steps.append(AttachCarrier(carrier.name, name))
    if not carrier.up:
        steps.append(SetHostLinkUp(carrier.name))
    if not bridge.up:
        steps.append(SetHostLinkUp(name))
    others = Others()
    if not bridge.ours:
        ports = (*bridge.ports, *([] if carrier.master else [carrier.name]), *moved)
        joined = msgspec.structs.replace(bridge, ports=ports)
        others = guard_of(joined, have.host_links | {carrier.name: carrier})
    return SegmentPlacement(name, carrier.mtu or ETHERNET_MTU, tuple(steps), bridge.ours, others)


def _above_the_label(have: Have, segment: Segment) -> list[str]:
    """The ports of the bridge that carried the same VLAN above the registered bridge, without its VLAN link.

    From the moment that the NIC has a VLAN link with this tag, the one above the bridge receives nothing.
    """
    label = have.host_links.get(segment.besides)
    old = have.host_links.get(names.bridge(segment.besides, segment.vlan))
    if label is None or label.kind != "bridge" or old is None or old.kind != "bridge":
        return []
    return sorted(set(old.ports) - {old.carrier, names.vlan_link(label.name, segment.vlan)})


def guard_of(bridge: HostLink, links: dict[str, HostLink]) -> Others:
    """The guard of a bridge that somebody else created; ``links`` contains its ports.

    The host keeps what it uses the bridge for. A bridge with VLAN filtering may add tags: its operator said which.
    """
    ports = [links[name] for name in bridge.ports if name in links and _TAME.fullmatch(name)]
    guests = {it.name for it in ports if leads_to_guests(bridge.name, it)}
    uplinks = frozenset(it.name for it in ports if it.name not in guests)
    used = bridge.addresses or bridge.above or not _TAME.fullmatch(bridge.name)
    return Others(
        bridges=frozenset({bridge.name}),
        closed=frozenset() if used else frozenset({bridge.name}),
        ports=frozenset(it.name for it in ports if it.name in guests and not it.ours),
        uplinks=frozenset() if bridge.vlan_filtering else uplinks,
        trunks=uplinks if bridge.vlan_filtering else frozenset(),
    )


def leads_to_guests(bridge: str, port: HostLink) -> bool:
    """Whether a port is ours, a VM's tap, or a veth to a container. A veth between two bridges of the host is none."""
    to_container = port.kind == "veth" and port.elsewhere and port.name != names.carrier_of(bridge)
    return port.kind == "tun" or to_container or (port.kind == "veth" and port.ours)


def _nic(have: Have, port: Port) -> HostLink:
    nic = have.host_links.get(port.segment.nic)
    if nic is None:
        raise HostRefused(
            f"NIC {port.segment.nic} does not exist on this host",
            hint=f"check the registration detail {detail_of(port)}",
        )
    return nic


def detail_of(port: Port) -> str:
    """The registration detail that names the device of the port."""
    return "guest.network.device" if is_guest(port) else "public.network.device"
