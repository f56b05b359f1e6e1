"""From ``have`` and ``want`` to the steps between them, in an order that is safe to stop in at any point.

The order, and why:

1. The namespace, and the sysctls that new links take over, before any link is created in it.
2. Deletions: routes, rules, addresses, neighbours, links. Addresses are removed before the ruleset changes, so a
   removed address is never reachable under the new rules. An address with a new prefix length is an exception: it is
   added with the new length first, so it is never missing.
3. The ruleset. New addresses and links do not exist yet and removed ones are gone, so at no moment is anything
   reachable that neither the old nor the new state allows.
4. The host's shared links (bridges, VLAN links), then the ports into the namespace, all down.
5. Addresses, links up (the public ones last), neighbours, routes, rules.
6. Bridges that are no longer needed are removed.

A gate closes before all other steps, so no frame passes a port of a gated scope from its creation on. It opens after
all other steps: then everything that answers is in place. The same holds for ports that need a lease.

Where ``have`` is already as wanted, there is no step. The same steps are computed for a first call, a repeated call, a
repair and a restore after a reboot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from operator import or_
from typing import TypeVar

import msgspec

from netloom import names
from netloom.errors import ForeignScope, HostRefused
from netloom.netobjects import IP6_MTU_MIN, Address
from netloom.plan.have import ALIAS, ASK_MAIN, CARRIERS, Have, HostLink, InsideLink, Others
from netloom.plan.segments import SegmentPlacement, guard_of, is_guest, place
from netloom.plan.steps import (
    AddAddress,
    AddRule,
    AdoptLink,
    AttachPort,
    CloseGate,
    CreateNamespace,
    CreatePort,
    GuardBridge,
    GuardOthers,
    LeasePorts,
    LoadRuleset,
    MarkPort,
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
    SetHostLinkDown,
    SetLinkUp,
    SetMac,
    SetMtu,
    SetPortUp,
    SetSysctl,
    SilenceIpv6,
    Step,
    UnguardBridge,
)
from netloom.render.ruleset import names as names_in
from netloom.render.want import Port, Segment, Want

_T = TypeVar("_T")


def plan(have: Have, want: Want) -> tuple[Step, ...]:
    """The steps from ``have`` to ``want``, in order; none when nothing has to change.

    Raises ForeignScope when the namespace belongs to somebody else, HostRefused when the host lacks something that the
    scope needs (a NIC), or would lose something of its own (the addresses of a NIC).
    """
    if not want.namespace:
        adopted, after = _adopted(have, wanted=frozenset())
        unneeded = _unneeded(after, wanted=frozenset(), leaving=have.host_ends)
        return (*_closed(have, want), *adopted, *_tear_down(have), *unneeded, *_opened(have, want))
    if have.foreign:
        raise ForeignScope(
            f"namespace {have.namespace} is there already and is not ours: {have.foreign}",
            hint="remove it, or let the network live on another host",
        )
    placements = {port.segment: place(have, port) for port in want.ports}
    narrow = {port.link for port in want.ports if placements[port.segment].mtu < IP6_MTU_MIN}
    want = _without_ip6(want, narrow)  # guard: a-narrow-segment-has-no-ipv6
    return tuple(_build(have, want, placements))


def change(before: Want, want: Want) -> tuple[Step, ...] | None:
    """The steps of ``plan`` from a scope that is as ``before`` says, computed without an observation.

    None if that takes one: the ports, gates, leases or sysctls differ, or IPv6, which a segment may not have.
    """
    if _base(before) != _base(want):
        return None
    links = {it.link: InsideLink(name=it.link, kind="veth", mac=it.mac, up=True) for it in want.ports}
    have = Have(
        scope_id="",
        namespace=want.namespace,
        exists=True,
        loopback_up=True,
        links=links,
        host_links={it.host_link: HostLink(name=it.host_link, up=True) for it in want.ports},
        addresses=before.addresses,
        routes=before.routes,
        rules=before.rules,
        neighbours=before.neighbours,
        marker=before.ruleset.marker if before.ruleset is not None else "",
        ruleset=before.ruleset,
        table=names_in(before.ruleset) if before.ruleset is not None else None,
    )
    return (*_until_ruleset(have, want, set(links)), *_after_ports(have, want, set(links)))


def _base(want: Want) -> tuple[object, ...]:
    """What ``change`` does not change."""
    return (
        want.namespace,
        want.ports,
        want.sysctls,
        want.gated,
        want.gated_ports,
        want.lease,
        want.ruleset is None,
        [it for it in want.addresses if ":" in it.cidr],
        [it for it in want.routes if ":" in it.destination],
        [it for it in want.neighbours if ":" in it.address],
    )


def _without_ip6(want: Want, links: set[str]) -> Want:
    """``want`` without what the kernel has for IPv6 only: the addresses, routes and sysctls of these links."""
    if not links:
        return want
    return msgspec.structs.replace(
        want,
        addresses=tuple(it for it in want.addresses if it.link not in links or ":" not in it.cidr),
        routes=tuple(it for it in want.routes if it.link not in links or ":" not in it.destination),
        neighbours=tuple(it for it in want.neighbours if it.link not in links or ":" not in it.address),
        sysctls={key: it for key, it in want.sysctls.items() if ".ipv6." not in key or not _link_of(key, links)},
    )


def sweep(
    links: dict[str, HostLink], claimed: frozenset[str], guarded: frozenset[str], others: Others
) -> tuple[Step, ...]:
    """The steps that tidy the shared links of a host.

    ``links``: all bridges and VLAN links that are ours, the bridges of others that our ports are in, and their ports.

    Bridges that no scope claims and no VM is plugged into are removed. Each bridge that stays gets a guard; guards
    of other bridges are removed. The guard of the bridges of others follows their ports and the host's addresses.
    """
    have = Have(scope_id="", namespace="", host_links=links, claimed=claimed, guarded=guarded, others=others)
    steps = list(_unneeded(have, wanted=claimed, leaving=frozenset()))
    removed = {step.bridge for step in steps if isinstance(step, RemoveBridge)}
    carriers = {step.link for step in steps if isinstance(step, RemoveVlanLink)}
    steps += [
        RemoveVlanLink(link.name)
        for link in links.values()
        if link.kind in CARRIERS and link.ours and not link.master and link.name not in carriers
    ]
    bridges = {link.name for link in links.values() if link.kind == "bridge" and link.ours} - removed
    steps += [GuardBridge(name, tuple(filter(None, [links[name].carrier]))) for name in sorted(bridges - guarded)]
    left = (guarded - removed) | bridges
    for name in sorted(left - bridges):  # bridges that somebody else removed
        left -= {name}
        steps.append(UnguardBridge(name, last=not left and not others.bridges))
    wanted = reduce(or_, (guard_of(it, links) for it in links.values() if _joined(it, links)), Others())
    if wanted != others:
        steps.append(GuardOthers(wanted))  # guard: the-guard-of-others-follows
    return tuple(steps)


def sweep_gates(closed: frozenset[str], wanted: frozenset[str], existing: frozenset[str]) -> tuple[Step, ...]:
    """The steps that make ``closed`` the gates that scopes want; the gates of other links that exist stay as they are.

    ``closed``: the links whose gate is closed; ``wanted``: those that scopes want closed; ``existing``: those of
    ``closed`` that are links of the host. The gate of an existing link is opened by the plan of its scope only.
    """
    missing, stale = wanted - closed, closed - wanted - existing
    return (
        *([CloseGate(tuple(sorted(missing)))] if missing else []),
        *([OpenGate(tuple(sorted(stale)))] if stale else []),
    )


def sweep_leases(leased: Mapping[str, int], wanted: Mapping[str, int], existing: frozenset[str]) -> tuple[Step, ...]:
    """As ``sweep_gates``, for the links that need a lease, with its mark."""
    missing = {it: mark for it, mark in wanted.items() if leased.get(it) != mark}
    stale = leased.keys() - wanted.keys() - existing
    return (
        *(LeasePorts(_with(missing, mark), mark) for mark in sorted(set(missing.values()))),
        *([ReleasePorts(tuple(sorted(stale)))] if stale else []),
    )


def _with(leased: Mapping[str, int], mark: int) -> tuple[str, ...]:
    return tuple(sorted(it for it, other in leased.items() if other == mark))


def _joined(bridge: HostLink, links: dict[str, HostLink]) -> bool:
    """Whether somebody else created the bridge and a port of ours is in it."""
    ports = [links[name] for name in bridge.ports if name in links]
    return bridge.kind == "bridge" and not bridge.ours and any(it.kind == "veth" and it.ours for it in ports)


def alias_of(scope_id: str) -> str:
    """The alias of a scope's host ends, which names their owner."""
    return f"{ALIAS} {scope_id}"


# ------------------------------------------------------------------------------------------------- a scope that exists


def _build(have: Have, want: Want, placements: dict[Segment, SegmentPlacement]) -> Iterator[Step]:
    """Deletions, the ruleset, additions: no packet arrives over a link that the rules do not know yet."""
    ns = want.namespace
    links = [port.link for port in want.ports]
    existing = {port.link for port in want.ports if _exists(have, port)}
    bridges = frozenset(placement.bridge for placement in placements.values())
    adopted, after = _adopted(have, wanted=bridges)
    yield from _closed(have, want)
    yield from adopted
    if not have.exists:
        yield CreateNamespace(ns)
    for key, value in want.sysctls.items():
        if _link_of(key, links) is None and have.sysctls.get(key) != value:
            yield SetSysctl(ns, key, value)
    yield from _until_ruleset(have, want, existing)
    others = reduce(or_, (placement.others for placement in placements.values()), have.others)
    if others != have.others:
        yield GuardOthers(others)
    yield from dict.fromkeys(step for placement in placements.values() for step in placement.steps)
    for port in want.ports:
        yield from _port(have, ns, port, placements[port.segment], alias_of(have.scope_id))
    for key, value in want.sysctls.items():
        link = _link_of(key, links)
        if link is not None and (link not in existing or have.sysctls.get(key) != value):
            yield SetSysctl(ns, key, value)
    yield from _after_ports(have, want, existing)
    guarded = have.guarded | {placement.bridge for placement in placements.values() if placement.ours}
    after = msgspec.structs.replace(after, guarded=guarded, others=others)
    yield from _unneeded(after, wanted=bridges, leaving=have.host_ends)
    yield from _opened(have, want)


def _until_ruleset(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    """Inside the namespace: the deletions, then the ruleset. ``existing``: the links of ports that exist already."""
    yield from _stale_routes(have, want, existing)
    yield from _stale_rules(have, want)
    yield from _stale_addresses(have, want, existing)
    yield from _stale_neighbours(have, want, existing)
    yield from _stale_links(have, want, existing)
    yield from _ruleset(have, want)


def _after_ports(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    """Inside the namespace: the additions, when all ports exist. ``existing`` as above."""
    yield from _missing_addresses(have, want, existing)
    yield from _replaced_addresses(have, want, existing)
    yield from _links_up(have, want, existing)
    yield from _missing_neighbours(have, want, existing)
    yield from _missing_routes(have, want, existing)
    yield from _missing_rules(have, want)


def _closed(have: Have, want: Want) -> Iterator[Step]:
    missing = _closed_meanwhile(have, want) - have.closed
    if missing:  # guard: a-gate-closes-before-its-port-exists
        yield CloseGate(tuple(sorted(missing)))
    without = {it for it in _leased_meanwhile(have, want) if have.leased.get(it) != want.lease}
    if without:  # guard: a-port-needs-its-lease-before-it-exists
        yield LeasePorts(tuple(sorted(without)), want.lease)


def _opened(have: Have, want: Want) -> Iterator[Step]:
    ports = have.host_ends | have.left | _wanted_ends(want)
    released = ports & (have.leased.keys() | _leased_meanwhile(have, want))
    released -= want.leased_ends.keys()
    if released:
        yield ReleasePorts(tuple(sorted(released)))
    stale = ports & (have.closed | _closed_meanwhile(have, want))
    stale -= want.closed_ends
    if stale:
        yield OpenGate(tuple(sorted(stale)))


def _closed_meanwhile(have: Have, want: Want) -> frozenset[str]:
    """The host ends that are closed during the plan: of a gated scope those that it will not have any longer, too."""
    return have.host_ends | want.closed_ends if want.gated else want.closed_ends


def _leased_meanwhile(have: Have, want: Want) -> frozenset[str]:
    """The host ends that need the lease during the plan: those that the scope will not have any longer, too."""
    return have.host_ends | want.leased_ends.keys() if want.lease else frozenset()


def _wanted_ends(want: Want) -> frozenset[str]:
    return frozenset(port.host_link for port in want.ports)


def _exists(have: Have, port: Port) -> bool:
    """Whether both ends of the port exist and belong together."""
    inside = have.links.get(port.link)
    return inside is not None and inside.host_link == port.host_link and port.host_link in have.host_links


# Deletions. ``existing``: the links of ports that exist already. Whatever belongs to another link disappears with it.


def _stale_routes(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    replaced = {(route.table, route.destination) for route in want.routes}
    for route in have.routes:
        if (route.table, route.destination) not in replaced and (route.link in existing or not route.link):
            yield RemoveRoute(want.namespace, route)


def _stale_rules(have: Have, want: Want) -> Iterator[Step]:
    for rule in _without(have.rules, want.rules):
        yield RemoveRule(want.namespace, rule)


def _stale_addresses(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    for address in have.addresses:
        # An address without its subnet's route is added again later: the kernel creates the route with it.
        stale = address not in want.addresses or address in have.cut_off
        if (
            address.link in existing
            and stale
            and not _has_other_prefix(address, want)  # guard: a-new-prefix-length-leaves-no-gap
        ):
            yield RemoveAddress(want.namespace, address)


def _replaced_addresses(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    """Remove addresses whose prefix length changes after they were added with the new one, so that they never miss."""
    for address in have.addresses:
        if address.link in existing and _has_other_prefix(address, want):
            yield RemoveAddress(want.namespace, address)


def _has_other_prefix(address: Address, want: Want) -> bool:
    """Whether ``want`` has the address on the same link, but with another prefix length."""
    ip = address.cidr.partition("/")[0]
    return address not in want.addresses and any(
        it.link == address.link and it.cidr.partition("/")[0] == ip for it in want.addresses
    )


def _stale_neighbours(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    wanted = {(it.link, it.address) for it in want.neighbours}
    for neighbour in have.neighbours:
        if neighbour.link in existing and (neighbour.link, neighbour.address) not in wanted:
            yield RemoveNeighbour(want.namespace, neighbour)


def _stale_links(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    ports = {port.link for port in want.ports}
    for link in have.links.values():
        if link.name not in existing and (link.kind == "veth" or link.name in ports):
            yield RemovePort(want.namespace, link.name)


def _ruleset(have: Have, want: Want) -> Iterator[Step]:
    if want.ruleset is not None and have.tampered:
        yield LoadRuleset(want.namespace, want.ruleset, None, have.table)
    elif want.ruleset is not None and have.marker != want.ruleset.marker:
        yield LoadRuleset(want.namespace, want.ruleset, have.ruleset, have.table)


# Additions, beginning with what a link may have while it is down.


def _port(have: Have, ns: str, port: Port, placement: SegmentPlacement, alias: str) -> Iterator[Step]:
    bridge, mtu = placement.bridge, placement.mtu
    host_link = have.host_links.get(port.host_link)
    if not _exists(have, port):
        inside = have.links.get(port.link)
        if host_link is not None and (inside is None or inside.host_link != port.host_link):
            if not host_link.ours:
                raise HostRefused(
                    f"link {port.host_link} is there already and is not ours",
                    hint="remove or rename it",
                )
            yield RemoveHostPort(port.host_link)
        yield CreatePort(ns, port, bridge, alias, mtu)
        yield SilenceIpv6(port.host_link)
        return
    assert host_link is not None
    if host_link.alias != alias:
        yield MarkPort(port.host_link, alias)
    if host_link.ipv6:
        yield SilenceIpv6(port.host_link)
    if have.links[port.link].mac != port.mac:
        yield SetMac(ns, port.link, port.mac)
    if host_link.mtu not in (0, mtu):
        yield SetMtu("", port.host_link, mtu)
        if host_link.mtu < IP6_MTU_MIN <= mtu:  # the kernel begins anew with IPv6 there
            yield SilenceIpv6(port.host_link)
            if placement.ours:
                yield SilenceIpv6(bridge)
    if have.links[port.link].mtu not in (0, mtu):
        yield SetMtu(ns, port.link, mtu)
    if host_link.master != bridge:
        yield AttachPort(port.host_link, bridge)


def _missing_addresses(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    kept = {it for it in have.addresses if it.link in existing and it not in have.cut_off}
    for address in want.addresses:
        if address not in kept:
            yield AddAddress(want.namespace, address)


def _links_up(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    if not have.loopback_up:
        yield SetLinkUp(want.namespace, "lo")
    for port in want.ports:
        host_link = have.host_links.get(port.host_link)
        if port.link not in existing or host_link is None or not host_link.up:
            yield SetPortUp(port.host_link)
    for port in sorted(want.ports, key=lambda port: (not is_guest(port), port)):
        if port.link not in existing or not have.links[port.link].up:
            yield SetLinkUp(want.namespace, port.link)


def _missing_neighbours(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    # A link loses its neighbours when it gets another MAC address and when it goes down.
    macs = {port.link: port.mac for port in want.ports}
    kept = {it for it in have.neighbours if it.link in existing and have.links[it.link].mac == macs[it.link]}
    for neighbour in want.neighbours:
        if neighbour not in kept:
            yield PutNeighbour(want.namespace, neighbour)


def _missing_routes(have: Have, want: Want, existing: set[str]) -> Iterator[Step]:
    kept = {route for route in have.routes if route.link in existing or not route.link}
    for route in want.routes:
        if route not in kept:
            yield PutRoute(want.namespace, route)


def _missing_rules(have: Have, want: Want) -> Iterator[Step]:
    if not have.asks_main:
        yield AddRule(want.namespace, ASK_MAIN)
    for rule in _without(want.rules, have.rules):
        yield AddRule(want.namespace, rule)


# -------------------------------------------------------------------------------------------- a scope that has ended


def _tear_down(have: Have) -> Iterator[Step]:
    if not have.exists or have.foreign:
        return
    for link in have.links.values():
        # A process can keep the namespace alive after its name is removed, so the links are deleted first.
        if link.kind == "veth":
            yield RemovePort(have.namespace, link.name)
    yield RemoveNamespace(have.namespace)


# ------------------------------------------------------------------------------------------------------------- bridges


def _unneeded(have: Have, *, wanted: frozenset[str], leaving: frozenset[str]) -> Iterator[Step]:
    """Remove our bridges that are not wanted and that nothing is plugged into once the ports ``leaving`` have left."""
    guarded = set(have.guarded)
    for bridge in sorted(have.host_links.values(), key=lambda link: link.name):
        if bridge.kind != "bridge" or not bridge.ours or bridge.name in wanted or bridge.name in have.claimed:
            continue
        if set(bridge.ports) - leaving - {bridge.carrier}:
            continue
        yield RemoveBridge(bridge.name)  # guard: an-unused-bridge-is-removed
        carrier = have.host_links.get(bridge.carrier)
        if carrier is not None and carrier.ours and carrier.kind in CARRIERS:
            yield RemoveVlanLink(carrier.name)
        elif carrier is not None and bridge.carrier_was_down:
            yield SetHostLinkDown(carrier.name)
        if bridge.name in guarded:
            guarded.remove(bridge.name)
            yield UnguardBridge(bridge.name, last=not guarded and not have.others.bridges)


def _adopted(have: Have, *, wanted: frozenset[str]) -> tuple[list[Step], Have]:
    """Adopt (by alias) the bridges of CloudStack's KVM agent in which our ports are the last, so that we remove them.

    Returns the steps, and ``have`` as it is after them.

    The KVM agent removes its bridge of a VLAN with the last VM, unless the name of a port contains ``vnet``, as ours
    do, and it does not look again.
    """
    leaving = have.host_ends
    aliases: dict[str, str] = {}
    for bridge in sorted(have.host_links.values(), key=lambda link: link.name):
        if bridge.name in wanted or bridge.name in have.claimed or not _only_ours_keep(bridge, leaving):
            continue
        link = names.carrier_of(bridge.name)
        # The VLAN link first: after a crash it could not be found again without its bridge.
        carrier = have.host_links.get(link) if link in set(bridge.ports) - leaving else None
        if carrier is not None and carrier.kind == "vlan" and not carrier.alias and not carrier.addresses:
            aliases[link] = ALIAS
        aliases[bridge.name] = f"{ALIAS} carries {link}"  # guard: an-adopted-bridge-is-ours
    host_links = have.host_links | {
        name: msgspec.structs.replace(have.host_links[name], alias=alias) for name, alias in aliases.items()
    }
    steps: list[Step] = [AdoptLink(name, alias) for name, alias in aliases.items()]
    return steps, msgspec.structs.replace(have, host_links=host_links)


def _only_ours_keep(bridge: HostLink, leaving: frozenset[str]) -> bool:
    """Whether this is a bridge of the KVM agent whose only ports are ours, besides its VLAN link.

    A bridge with another port, an address, an alias, or another name than the agent's, stays its creator's. So does a
    VXLAN bridge: an operator may have connected its tunnel in a way that we could not restore.
    """
    link = names.carrier_of(bridge.name)
    return (
        bridge.kind == "bridge"
        and bool(link)
        and not link.startswith(names.vxlan_link(""))
        and bool(leaving & set(bridge.ports))
        and set(bridge.ports) - leaving <= {link}
        and not bridge.alias
        and not bridge.addresses
    )


def _link_of(key: str, links: Iterable[str]) -> str | None:
    """The link that a sysctl belongs to: ``net.ipv4.conf.gst-204.rp_filter`` belongs to ``gst-204``."""
    parts = key.replace("/", ".").split(".")
    return next((name for name in links if name in parts), None)


def _without(items: Iterable[_T], others: Iterable[_T]) -> list[_T]:
    taken = set(others)
    return [item for item in items if item not in taken]
