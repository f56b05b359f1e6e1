"""Carry out the steps of a plan. This is the only module that changes the kernel objects of a scope.

Consecutive steps for the same kernel interface in the same namespace are carried out together, as one netlink datagram
where the kernel allows it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Literal

from netloom.agent.host import gate, lease
from netloom.agent.host.frames import guard, guard_others, unguard
from netloom.agent.kernel import addresses, kept, links, namespaces, neighbours, routes, rules, sysctl
from netloom.agent.kernel.netlink import Message, NetlinkError
from netloom.agent.kernel.nft import NftRefused
from netloom.errors import HostRefused
from netloom.names import vxlan_group
from netloom.plan.have import ALIAS
from netloom.plan.steps import (
    AddAddress,
    AddRule,
    AdoptLink,
    AttachCarrier,
    AttachPort,
    CloseGate,
    CreateBridge,
    CreateNamespace,
    CreatePort,
    CreateVlanLink,
    CreateVxlanLink,
    GuardBridge,
    GuardOthers,
    LeasePorts,
    LoadRuleset,
    MarkPort,
    NamespaceStep,
    OpenGate,
    PutNeighbour,
    PutRoute,
    ReleasePorts,
    RemoveAddress,
    RemoveBridge,
    RemoveHostPort,
    RemoveNamespace,
    RemoveNeighbour,
    RemovePort,
    RemoveRoute,
    RemoveRule,
    RemoveVlanLink,
    SetCarrierMtu,
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

VXLAN_TTL = 10  # hops between hosts, as CloudStack's KVM agent sets it

_Interface = Literal["namespace", "sysctl", "nft", "guard", "gate", "netlink"]

# All other steps are netlink messages.
_INTERFACES: dict[type[Step], _Interface] = {
    CreateNamespace: "namespace",
    RemoveNamespace: "namespace",
    LoadRuleset: "nft",
    GuardBridge: "guard",
    GuardOthers: "guard",
    UnguardBridge: "guard",
    CloseGate: "gate",
    OpenGate: "gate",
    LeasePorts: "gate",
    ReleasePorts: "gate",
    SetSysctl: "sysctl",
    SilenceIpv6: "sysctl",
}


def apply(steps: Iterable[Step]) -> None:
    """Carry the steps out in order.

    Raises HostRefused naming the step that failed and its object. Later steps were not tried, except that some of the
    same datagram may have been.
    """
    for (interface, namespace), group in groupby(steps, key=_interface):
        adjacent = list(group)
        match interface:
            case "netlink":
                _netlink(namespace, adjacent)
            case "sysctl":
                _sysctls(namespace, adjacent)
            case _:
                for step in adjacent:
                    _one(step)


def _interface(step: Step) -> tuple[_Interface, str]:
    """The kernel interface that carries the step out, and the namespace that it is opened in; empty: the host's."""
    return _INTERFACES.get(type(step), "netlink"), step.namespace if isinstance(step, NamespaceStep) else ""


def _one(step: Step) -> None:
    match step:
        case CreateNamespace(namespace):
            namespaces.create(namespace)
        case RemoveNamespace(namespace):
            kept.forget(namespace)
            namespaces.delete(namespace)
        case LoadRuleset():
            _load(step)
        case GuardBridge(bridge, uplinks):
            guard(bridge, uplinks)
        case GuardOthers(others):
            guard_others(others)
        case UnguardBridge(bridge, last):
            unguard(bridge, last=last)
        case CloseGate(closed):
            gate.close(closed)
        case OpenGate(opened):
            gate.open_(opened)
        case LeasePorts(links_of, mark):
            lease.guard(dict.fromkeys(links_of, mark))
        case ReleasePorts(released):
            lease.release(released)


def _load(step: LoadRuleset) -> None:
    if step.table is not None:
        change = swap(step.have, step.want) if step.have is not None else take_over(step.table, step.want)
        try:
            _run(step.namespace, change)
        except NftRefused:
            # Somebody changed the table by hand. The transaction changed nothing; replace the whole table.
            _run(step.namespace, fresh(step.want))
    else:
        _run(step.namespace, fresh(step.want))


def _run(namespace: str, script: str) -> None:
    with kept.nft(namespace) as nft:
        nft.run(script)


def _sysctls(namespace: str, steps: Sequence[Step]) -> None:
    # A link has no IPv6 if its MTU is too small for it (RFC 8200 section 5). The kernel has no such sysctl then.
    silenced = [f"net/ipv6/conf/{step.link}/disable_ipv6" for step in steps if isinstance(step, SilenceIpv6)]
    absent = {key for key, value in sysctl.read(namespace, silenced).items() if value is None}
    values = {}
    for step in steps:
        match step:
            case SetSysctl(_, key, value):
                values[key] = value
            case SilenceIpv6(link) if (key := f"net/ipv6/conf/{link}/disable_ipv6") not in absent:
                values[key] = "1"
    if any("ipv6" in key for key in values) and sysctl.read(namespace, ["net/ipv6/conf/all/disable_ipv6"]) == {
        "net/ipv6/conf/all/disable_ipv6": None
    }:
        # A kernel without IPv6.
        values = {key: value for key, value in values.items() if "ipv6" not in key and "frag6" not in key}
    sysctl.write(namespace, values)


def _netlink(namespace: str, steps: Sequence[Step]) -> None:
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
        case RemoveRoute(_, route):
            yield routes.delete_route(route).even_if_gone()
        case PutRoute(_, route):
            yield routes.replace_route(route)
        case RemoveRule(_, rule):
            yield rules.delete_rule(rule).even_if_gone()
        case AddRule(_, rule):
            yield rules.add_rule(rule).even_if_there()
        case RemoveAddress(_, address):
            yield addresses.delete_address(address).even_if_gone()
        case AddAddress(_, address):
            yield addresses.add_address(address).even_if_there()
        case RemoveNeighbour(_, neighbour):
            yield neighbours.delete_neighbour(neighbour).even_if_gone()
        case PutNeighbour(_, neighbour):
            yield neighbours.replace_neighbour(neighbour)
        case RemovePort(_, link) | RemoveHostPort(link) | RemoveBridge(link) | RemoveVlanLink(link):
            yield links.delete_link(link).even_if_gone()
        case MarkPort(link, alias) | AdoptLink(link, alias):
            yield links.set_alias(link, alias)
        case SetMac(_, link, mac):
            yield links.set_mac(link, mac)
        case SetMtu(_, link, mtu) | SetCarrierMtu(link, mtu):
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
        case CreatePort(namespace, port, bridge, alias, mtu):
            fd = descriptors.enter_context(namespaces.descriptor(namespace))
            yield links.make_veth(port.host_link, bridge, port.link, port.mac, mtu, fd, alias=alias)
        case _:
            raise TypeError(f"no message for {step}")
