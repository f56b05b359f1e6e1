"""Carries out steps: the only place that changes the host. Decides nothing.

Steps that follow one another and speak to the same kernel interface of the same namespace go together, in one
datagram where the kernel allows it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Literal

from netloom.agent.host.observe import GUARD_FAMILY, GUARD_TABLE
from netloom.agent.kernel import links, namespaces, sysctl
from netloom.agent.kernel.netlink import Message, NetlinkError
from netloom.agent.kernel.nft import Nft, NftRefused
from netloom.errors import HostRefused
from netloom.names import vxlan_group
from netloom.plan import (
    ALIAS,
    AddAddress,
    AddRule,
    AttachCarrier,
    AttachPort,
    CreateBridge,
    CreateNamespace,
    CreatePort,
    CreateVlanLink,
    CreateVxlanLink,
    GuardBridge,
    Inherit,
    LoadRuleset,
    MarkPort,
    PutNeighbour,
    PutRoute,
    RemoveAddress,
    RemoveBridge,
    RemoveHostPort,
    RemoveNamespace,
    RemoveNeighbour,
    RemovePort,
    RemoveRoute,
    RemoveRule,
    RemoveVlanLink,
    SetHostLinkDown,
    SetHostLinkUp,
    SetLinkUp,
    SetMac,
    SetMtu,
    SetPortUp,
    SetSysctl,
    SilenceIpv6,
    Step,
    UnguardBridge,
)
from netloom.render.ruleset import fresh, swap, take_over

VXLAN_TTL = 10  # routers between the hosts, as CloudStack's KVM agent has it

_Means = Literal["namespace", "sysctl", "nft", "guard", "netlink"]


def apply(steps: Iterable[Step]) -> None:
    """Carries the steps out in order.

    Raises HostRefused naming the step that failed and its object; the steps after it were not tried, except that those
    which went into the same datagram may have been.
    """
    for (means, namespace), group in groupby(steps, key=_way):
        those = list(group)
        match means:
            case "netlink":
                _links(namespace, those)
            case "sysctl":
                _sysctls(namespace, those)
            case _:
                for step in those:
                    _one(step)


def _way(step: Step) -> tuple[_Means, str]:
    match step:
        case CreateNamespace() | RemoveNamespace():
            return "namespace", step.namespace
        case LoadRuleset():
            return "nft", step.namespace
        case GuardBridge() | UnguardBridge():
            return "guard", ""
        case SetSysctl():
            return "sysctl", step.namespace
        case SilenceIpv6():
            return "sysctl", ""
        case (
            RemoveRoute()
            | PutRoute()
            | RemoveRule()
            | AddRule()
            | RemoveAddress()
            | AddAddress()
            | RemoveNeighbour()
            | PutNeighbour()
            | RemovePort()
            | SetMac()
            | SetMtu()
            | SetLinkUp()
        ):
            return "netlink", step.namespace
        case _:
            return "netlink", ""


def _one(step: Step) -> None:
    match step:
        case CreateNamespace(namespace):
            namespaces.create(namespace)
        case RemoveNamespace(namespace):
            namespaces.delete(namespace)
        case LoadRuleset():
            _load(step)
        case GuardBridge() | UnguardBridge():
            with Nft(None) as nft:
                nft.run(guard(step))


def _load(step: LoadRuleset) -> None:
    with Nft(step.namespace) as nft:
        if step.table is None:
            nft.run(fresh(step.want))
            return
        try:
            nft.run(swap(step.have, step.want) if step.have is not None else take_over(step.table, step.want))
        except NftRefused:
            # Somebody changed the table by hand. Nothing of the text was done; the table is made anew.
            nft.run(fresh(step.want))


def guard(step: GuardBridge | UnguardBridge) -> str:
    """The text that puts, or takes away, a bridge's chain in the host's own table.

    The hook is the ingress of the bridge as a device: what comes up through it is for the host, ARP too, and nothing
    else passes there. (``meta ibrname`` in a bridge's input would say the same, where the kernel has that module.)
    """
    chain = f"{GUARD_FAMILY} {GUARD_TABLE} {step.bridge}"
    lines = [f"add table {GUARD_FAMILY} {GUARD_TABLE}"]
    match step:
        case GuardBridge(bridge):
            hook = f'type filter hook ingress device "{bridge}" priority filter; policy drop;'
            lines.append(f"add chain {chain} {{ {hook} }}")
        case UnguardBridge(_, last):
            # Kernels differ in whether a chain outlives its device: added first, it is there to be deleted.
            lines += [f"add chain {chain}", f"delete chain {chain}"]
            if last:
                lines.append(f"delete table {GUARD_FAMILY} {GUARD_TABLE}")
    return "\n".join(lines) + "\n"


def _sysctls(namespace: str, steps: Sequence[Step]) -> None:
    values = {}
    for step in steps:
        match step:
            case SetSysctl(_, key, value):
                values[key] = value
            case SilenceIpv6(link):
                values[f"net/ipv6/conf/{link}/disable_ipv6"] = "1"
    if any("ipv6" in key for key in values) and sysctl.read(namespace, ["net/ipv6/conf/all/disable_ipv6"]) == {
        "net/ipv6/conf/all/disable_ipv6": None
    }:
        values = {key: value for key, value in values.items() if "ipv6" not in key}  # a kernel that speaks none
    sysctl.write(namespace, values)


def _links(namespace: str, steps: Sequence[Step]) -> None:
    with ExitStack() as descriptors:
        messages = [message for step in steps for message in _messages(step, descriptors)]
        try:
            links.change(namespace, messages)
        except NetlinkError as error:
            made = next((step for step in steps if isinstance(step, CreateVlanLink | CreateVxlanLink)), None)
            if error.errno == errno.EOPNOTSUPP and made is not None:
                what, module = ("802.1Q", "8021q") if isinstance(made, CreateVlanLink) else ("VXLAN", "vxlan")
                raise HostRefused(
                    f"{error.what}: this kernel has no {what}",
                    hint=f"load the module {module}, or make a link named {made.link} yourself: it will be used",
                ) from error
            raise


def _messages(step: Step, descriptors: ExitStack) -> Iterator[Message]:
    match step:
        case RemoveRoute(_, it):
            yield links.delete_route(it.destination, it.link, it.via, it.source, it.table).even_if_gone()
        case PutRoute(_, it):
            yield links.replace_route(it.destination, it.link, it.via, it.source, it.table, kind=it.kind)
        case RemoveRule(_, it):
            rule = (it.priority, it.mark, it.mask, it.table, it.source, it.destination, it.iif)
            yield links.delete_rule(*rule).even_if_gone()
        case AddRule(_, it):
            rule = (it.priority, it.mark, it.mask, it.table, it.source, it.destination, it.iif)
            yield links.add_rule(*rule).even_if_there()
        case RemoveAddress(_, it):
            yield links.delete_address(it.link, it.cidr).even_if_gone()
        case AddAddress(_, it):
            yield links.add_address(it.link, it.cidr).even_if_there()
        case RemoveNeighbour(_, it):
            yield links.delete_neighbour(it.link, it.address).even_if_gone()
        case PutNeighbour(_, it):
            yield links.put_neighbour(it.link, it.address, it.mac)
        case RemovePort(_, link) | RemoveHostPort(link) | RemoveBridge(link) | RemoveVlanLink(link):
            yield links.delete_link(link).even_if_gone()
        case MarkPort(link, alias) | Inherit(link, alias):
            yield links.set_alias(link, alias)
        case SetMac(_, link, mac):
            yield links.set_mac(link, mac)
        case SetMtu(_, link, mtu):
            yield links.set_mtu(link, mtu)
        case SetLinkUp(_, link) | SetPortUp(link) | SetHostLinkUp(link):
            yield links.set_up(link)
        case SetHostLinkDown(link):
            yield links.set_down(link)
        case CreateBridge(bridge, alias):
            yield links.make_bridge(bridge, alias=alias)
        case CreateVlanLink(link, nic, vlan):
            yield links.make_vlan(link, nic, vlan, alias=ALIAS)
        case CreateVxlanLink(link, under, vni):
            yield links.make_vxlan(link, under, vni, vxlan_group(vni), VXLAN_TTL, alias=ALIAS)
        case AttachCarrier(link, bridge) | AttachPort(link, bridge):
            yield links.set_master(link, bridge)
        case CreatePort(namespace, port, bridge, alias):
            fd = descriptors.enter_context(namespaces.descriptor(namespace))
            yield links.make_veth(port.host_link, bridge, port.link, port.mac, 0, fd, alias=alias)
        case _:
            raise TypeError(f"no message for {step}")
