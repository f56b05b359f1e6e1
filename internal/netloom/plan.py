"""(have, want) to steps: what has to be done to a host, in an order that is safe to stop in at any point.

Pure: ``agent.observe`` looks, this decides, ``agent.apply`` does. Where the wish is fulfilled there is no step.

The order, and why:

1. The namespace, and the sysctls that links inherit, before anything else is in it.
2. What is no longer wanted goes: routes, rules, addresses, neighbours, links. An address that is gone needs no filter.
3. The ruleset. Nothing new is reachable yet, what was taken away is gone: at no point is something open that neither
   the old nor the new wish allows.
4. The host's shared objects (bridges, VLAN links), then the ports into the namespace, all down.
5. Addresses, links up (the public ones last), neighbours, routes, rules.
6. Bridges that nobody needs any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar, TypeVar

import msgspec

from netloom import names
from netloom.errors import ForeignScope, HostRefused
from netloom.names import UNTAGGED
from netloom.render.ruleset import Name, Ruleset, marker
from netloom.render.want import Address, Neighbour, Port, Route, Rule, Segment, Want

_T = TypeVar("_T")

ALIAS = "netloom"  # first word of the alias of every link that we made; only such are ever deleted


# --------------------------------------------------------------------------------------------------------- have


CARRIERS = ("vlan", "vxlan")  # the kinds of links that we make to carry a segment

# What the kernel begins a namespace with, and ``ip rule flush`` takes away.
ASK_MAIN = Rule(priority=32766, mark=0, mask=0, table=254)

MTU_MAX = 1500  # Ethernet's (RFC 894); what a guest assumes that nobody tells another


class HostLink(msgspec.Struct, frozen=True, kw_only=True):
    """A link of the host itself. ``kind`` is the kernel's ("bridge", "vlan", "veth"; empty for a NIC)."""

    name: str
    kind: str = ""
    up: bool = False
    master: str = ""
    alias: str = ""
    parent: str = ""  # of a VLAN link
    vlan_id: int = 0  # of a VLAN link its tag, of a VXLAN its number
    ports: tuple[str, ...] = ()  # of a bridge
    addresses: tuple[str, ...] = ()  # of the host, on this link; looked up for NICs that may have to join a bridge,
    # for what VXLAN sends from, and for what somebody else made and we may be the last to leave
    ipv6: bool = False  # whether the host speaks IPv6 on it; looked up for links that are ours
    mtu: int = 0  # 0: nobody looked

    @property
    def ours(self) -> bool:
        return self.alias.split(" ", 1)[0] == ALIAS

    @property
    def carrier(self) -> str:
        """The port that a bridge of ours was made for, which is no reason to keep it."""
        words = self.alias.split(" ")
        return words[2] if self.ours and len(words) == 3 else ""

    @property
    def raised(self) -> bool:
        """Whether the carrier was down before we came."""
        return self.ours and self.alias.startswith(f"{ALIAS} raises ")


class InsideLink(msgspec.Struct, frozen=True, kw_only=True):
    """A link of the namespace other than the loopback. ``host_link``: its other end, empty when not on the host."""

    name: str
    kind: str = ""
    mac: str = ""
    up: bool = False
    host_link: str = ""
    mtu: int = 0  # 0: nobody looked


class Have(msgspec.Struct, frozen=True, kw_only=True):
    """What is there of one scope on one host, and of the host's links that it concerns."""

    scope_id: str
    namespace: str  # the name that the scope's namespace has, or would have
    exists: bool = False
    foreign: str = ""  # why the namespace is somebody else's; empty: it is ours, or nobody's
    loopback_up: bool = False
    links: dict[str, InsideLink] = {}
    addresses: tuple[Address, ...] = ()
    cut_off: frozenset[Address] = frozenset()  # those of them whose own network's route somebody took away
    routes: tuple[Route, ...] = ()
    rules: tuple[Rule, ...] = ()  # without the kernel's own
    asks_main: bool = True  # whether its own rule is there that has the main table looked up
    neighbours: tuple[Neighbour, ...] = ()  # the permanent ones
    sysctls: dict[str, str] = {}
    marker: str = ""  # which ruleset is loaded; empty: no table, or one that does not say
    ruleset: Ruleset | None = None  # the ruleset behind ``marker``, where it is known
    table: frozenset[Name] | None = None  # what is in the table; None: no table
    generation: int = 0  # the kernel's count of what was done to the namespace's rules
    tampered: bool = False  # the table bears the marker, and is not what was loaded
    host_links: dict[str, HostLink] = {}
    raised: frozenset[str] = frozenset()  # carriers that were down before we came, as far as is remembered
    orphans: dict[str, frozenset[str]] = {}  # bridges that somebody deleted, and the links that were in them
    claimed: frozenset[str] = frozenset()  # bridges that other scopes want
    guarded: frozenset[str] = frozenset()  # bridges whose frames never reach the host's own sockets


# -------------------------------------------------------------------------------------------------------- steps


class Step(msgspec.Struct, frozen=True):
    """One thing to do to the host. ``shared``: it touches what other scopes use too, so one scope at a time."""

    shared: ClassVar[bool] = False


class CreateNamespace(Step, frozen=True):
    """Makes the scope's namespace: empty, its loopback down."""

    namespace: str

    def __str__(self) -> str:
        return f"create namespace {self.namespace}"


class RemoveNamespace(Step, frozen=True):
    """Takes the name away, and with it what is left inside."""

    namespace: str

    def __str__(self) -> str:
        return f"remove namespace {self.namespace}"


class SetSysctl(Step, frozen=True):
    """Writes a setting of the namespace."""

    namespace: str
    key: str
    value: str

    def __str__(self) -> str:
        return f"set {self.key} = {self.value} in {self.namespace}"


class RemoveRoute(Step, frozen=True):
    """Takes away a route that nobody wants any more."""

    namespace: str
    route: Route

    def __str__(self) -> str:
        return f"remove route {route_words(self.route)}"


class PutRoute(Step, frozen=True):
    """Adds the route, or replaces the one to the same destination without an instant in between."""

    namespace: str
    route: Route

    def __str__(self) -> str:
        return f"put route {route_words(self.route)}"


class RemoveRule(Step, frozen=True):
    """Takes away a policy rule that nobody wants any more."""

    namespace: str
    rule: Rule

    def __str__(self) -> str:
        return f"remove rule {rule_words(self.rule)}"


class AddRule(Step, frozen=True):
    """Lets packets with a mark look up a table of their own."""

    namespace: str
    rule: Rule

    def __str__(self) -> str:
        return f"add rule {rule_words(self.rule)}"


class RemoveAddress(Step, frozen=True):
    """Takes an address from a link that stays."""

    namespace: str
    address: Address

    def __str__(self) -> str:
        return f"remove address {self.address.cidr} from {self.address.link}"


class AddAddress(Step, frozen=True):
    """Puts an address on a link."""

    namespace: str
    address: Address

    def __str__(self) -> str:
        return f"add address {self.address.cidr} to {self.address.link}"


class RemoveNeighbour(Step, frozen=True):
    """Leaves an address to ARP again."""

    namespace: str
    neighbour: Neighbour

    def __str__(self) -> str:
        return f"remove neighbour {self.neighbour.address} from {self.neighbour.link}"


class PutNeighbour(Step, frozen=True):
    """Says for good which MAC address an address on a link is at."""

    namespace: str
    neighbour: Neighbour

    def __str__(self) -> str:
        return f"put neighbour {self.neighbour.address} at {self.neighbour.mac} on {self.neighbour.link}"


class RemovePort(Step, frozen=True):
    """Takes a link of the namespace away, and with it its other end on the host."""

    namespace: str
    link: str

    def __str__(self) -> str:
        return f"remove link {self.link} of {self.namespace}"


class RemoveHostPort(Step, frozen=True):
    """Takes away a host end that leads nowhere we know."""

    link: str

    def __str__(self) -> str:
        return f"remove stray link {self.link}"


class LoadRuleset(Step, frozen=True):
    """Loads the ruleset in one transaction: from ``have``, else over whatever is in the table, else anew."""

    namespace: str
    want: Ruleset
    have: Ruleset | None = None
    table: frozenset[Name] | None = None

    def __str__(self) -> str:
        verb = "swap" if self.have else "load" if self.table is None else "take over"
        return f"{verb} ruleset {self.want.family} {self.want.table} of {self.namespace}"


class GuardBridge(Step, frozen=True):
    """Drops whatever the bridge would hand up to the host itself; what it forwards is not touched."""

    shared: ClassVar[bool] = True
    bridge: str

    def __str__(self) -> str:
        return f"guard the host's sockets from {self.bridge}"


class UnguardBridge(Step, frozen=True):
    """Takes away the guard of a bridge that is gone; after the ``last`` one, the table."""

    shared: ClassVar[bool] = True
    bridge: str
    last: bool

    def __str__(self) -> str:
        return f"remove the guard of {self.bridge}"


class CreateBridge(Step, frozen=True):
    """Makes a bridge of ours, down, without an address. Its alias tells what it is for."""

    shared: ClassVar[bool] = True
    bridge: str
    alias: str

    def __str__(self) -> str:
        return f"create bridge {self.bridge}, alias {self.alias}"


class Inherit(Step, frozen=True):
    """Notes on a link that somebody else made that it is ours to remove: whoever dies now, the next one knows."""

    shared: ClassVar[bool] = True
    link: str
    alias: str

    def __str__(self) -> str:
        return f"inherit {self.link}, alias {self.alias}"


class CreateVlanLink(Step, frozen=True):
    """Makes the VLAN sub-interface of a NIC, down."""

    shared: ClassVar[bool] = True
    link: str
    nic: str
    vlan: int

    def __str__(self) -> str:
        return f"create VLAN link {self.link} on {self.nic}"


class CreateVxlanLink(Step, frozen=True):
    """Makes the VXLAN tunnel over a NIC, or over the bridge that the NIC is in, down."""

    shared: ClassVar[bool] = True
    link: str
    under: str
    vni: int

    def __str__(self) -> str:
        return f"create VXLAN link {self.link} over {self.under}"


class AttachCarrier(Step, frozen=True):
    """Makes the link that carries a segment a port of the segment's bridge."""

    shared: ClassVar[bool] = True
    link: str
    bridge: str

    def __str__(self) -> str:
        return f"attach {self.link} to {self.bridge}"


class SetHostLinkUp(Step, frozen=True):
    """Sets a NIC, a VLAN link or a bridge up."""

    shared: ClassVar[bool] = True
    link: str

    def __str__(self) -> str:
        return f"set {self.link} up"


class SetHostLinkDown(Step, frozen=True):
    """Sets a carrier down that was down before us: else the host would speak on the tenants' segment by itself."""

    shared: ClassVar[bool] = True
    link: str

    def __str__(self) -> str:
        return f"set {self.link} down"


class RemoveBridge(Step, frozen=True):
    """Takes away a bridge; its carrier is let go."""

    shared: ClassVar[bool] = True
    bridge: str

    def __str__(self) -> str:
        return f"remove bridge {self.bridge}"


class RemoveVlanLink(Step, frozen=True):
    """Takes away a VLAN link or a VXLAN tunnel."""

    shared: ClassVar[bool] = True
    link: str

    def __str__(self) -> str:
        return f"remove VLAN link {self.link}"


class SilenceIpv6(Step, frozen=True):
    """Keeps the host from having an address on a link that tenants share."""

    link: str

    def __str__(self) -> str:
        return f"set net.ipv6.conf.{self.link}.disable_ipv6 = 1"


class CreatePort(Step, frozen=True):
    """Makes the pair, both ends down: the host end is a port of the bridge, the other stands in the namespace."""

    namespace: str
    port: Port
    bridge: str
    alias: str

    def __str__(self) -> str:
        return f"create {self.port.host_link} on {self.bridge} with {self.port.link} in {self.namespace}"


class AttachPort(Step, frozen=True):
    """Makes a link one of the segment's bridge again: the host end of a port, or what a deleted bridge let go."""

    link: str
    bridge: str

    def __str__(self) -> str:
        return f"attach {self.link} to {self.bridge}"


class MarkPort(Step, frozen=True):
    """Says whose the host end of a port is again: by that we know what we may delete."""

    link: str
    alias: str

    def __str__(self) -> str:
        return f"set the alias of {self.link} to {self.alias}"


class SetMac(Step, frozen=True):
    """Gives a link of the namespace its derived MAC address back."""

    namespace: str
    link: str
    mac: str

    def __str__(self) -> str:
        return f"set MAC address of {self.link} to {self.mac}"


class SetMtu(Step, frozen=True):
    """Gives one end of a port the MTU of its segment. ``namespace`` empty: the host's end."""

    namespace: str
    link: str
    mtu: int

    def __str__(self) -> str:
        return f"set MTU of {self.link} to {self.mtu}"


class SetPortUp(Step, frozen=True):
    """Sets the host end of a port up."""

    link: str

    def __str__(self) -> str:
        return f"set {self.link} up"


class SetLinkUp(Step, frozen=True):
    """Sets a link of the namespace up."""

    namespace: str
    link: str

    def __str__(self) -> str:
        return f"set {self.link} up in {self.namespace}"


# --------------------------------------------------------------------------------------------------------- plan


def plan(have: Have, want: Want) -> tuple[Step, ...]:
    """The steps from ``have`` to ``want``, in order; none when nothing has to change.

    Raises ForeignScope when the namespace is somebody else's, HostRefused when the host lacks what the wish
    stands on (a NIC), or would lose something of its own (the addresses of a NIC).
    """
    if not want.namespace:
        inherited, after = _inherited(have, wanted=frozenset())
        return (*inherited, *_tear_down(have), *_unneeded(after, wanted=frozenset(), leaving=_our_ports(have)))
    if have.foreign:
        raise ForeignScope(
            f"namespace {have.namespace} is there already and is not ours: {have.foreign}",
            hint="remove it, or let the network live on another host",
        )
    grounds = {port.segment: _ground(have, port) for port in want.ports}
    return tuple(_build(have, want, grounds))


def sweep(links: dict[str, HostLink], claimed: frozenset[str], guarded: frozenset[str]) -> tuple[Step, ...]:
    """The steps that set the shared objects right: ``links`` are all bridges and VLAN links that are ours.

    What no scope wants and no VM is plugged into goes; a guard stands before each bridge that stays, and no other.
    """
    have = Have(scope_id="", namespace="", host_links=links, claimed=claimed, guarded=guarded)
    steps = list(_unneeded(have, wanted=claimed, leaving=frozenset()))
    gone = {step.bridge for step in steps if isinstance(step, RemoveBridge)}
    carriers = {step.link for step in steps if isinstance(step, RemoveVlanLink)}
    steps += [
        RemoveVlanLink(link.name)
        for link in links.values()
        if link.kind in CARRIERS and link.ours and not link.master and link.name not in carriers
    ]
    bridges = {link.name for link in links.values() if link.kind == "bridge" and link.ours} - gone
    steps += [GuardBridge(name) for name in sorted(bridges - guarded)]
    left = (guarded - gone) | bridges
    for name in sorted(left - bridges):  # somebody else took the bridge away
        left -= {name}
        steps.append(UnguardBridge(name, last=not left))
    return tuple(steps)


def alias_of(scope_id: str) -> str:
    """The alias of a scope's host ends: says whose they are to whoever looks at the host."""
    return f"{ALIAS} {scope_id}"


class _Ground(msgspec.Struct, frozen=True):
    """Where a segment really is on this host: what is there already is used."""

    bridge: str
    steps: tuple[Step, ...] = ()
    ours: bool = False


def _ground(have: Have, port: Port) -> _Ground:
    if port.segment.vlan == UNTAGGED:
        return _untagged(have, port)
    return _tunnelled(have, port) if port.segment.kind == "vxlan" else _tagged(have, port)


def _tagged(have: Have, port: Port) -> _Ground:
    segment = port.segment
    steps: list[Step] = []
    carrier = _vlan_link(have, segment)
    if carrier is None:
        nic = have.host_links.get(segment.nic)
        if nic is None:
            raise _no_nic(port)
        if not nic.up:
            steps.append(SetHostLinkUp(nic.name))
        steps.append(CreateVlanLink(segment.vlan_link, segment.nic, int(segment.vlan)))
        carrier = HostLink(name=segment.vlan_link, kind="vlan", alias=ALIAS, ipv6=True)
    elif carrier.parent and not carrier.up and not have.host_links[carrier.parent].up:
        steps.append(SetHostLinkUp(carrier.parent))  # the kernel sets no VLAN link up on a NIC that is down
    return _bridged(have, segment, carrier, steps)


def _tunnelled(have: Have, port: Port) -> _Ground:
    """A tunnel that is there is used, whoever made it and however it finds the others (multicast, EVPN).

    Ours stands on what has the address that frames are sent from: the bridge that the NIC is in, else the NIC.
    """
    segment = port.segment
    steps: list[Step] = []
    tunnels = [it for it in have.host_links.values() if it.kind == "vxlan" and str(it.vlan_id) == segment.vlan]
    carrier = tunnels[0] if tunnels else have.host_links.get(segment.vlan_link)
    if carrier is None:
        nic = have.host_links.get(segment.nic)
        if nic is None:
            raise _no_nic(port)
        under = have.host_links.get(nic.master, nic)
        if not any(":" not in address for address in under.addresses):
            raise HostRefused(
                f"{under.name} has no IPv4 address for VXLAN to send from",
                hint=f"give it one, or name another NIC in {_detail(port)}",
            )
        steps += [SetHostLinkUp(link.name) for link in dict.fromkeys((nic, under)) if not link.up]
        steps.append(CreateVxlanLink(segment.vlan_link, under.name, int(segment.vlan)))
        carrier = HostLink(name=segment.vlan_link, kind="vxlan", alias=ALIAS, ipv6=True)
    return _bridged(have, segment, carrier, steps)


def _untagged(have: Have, port: Port) -> _Ground:
    segment = port.segment
    nic = have.host_links.get(segment.nic)
    if nic is None:
        raise _no_nic(port)
    if nic.kind == "bridge":
        return _Ground(nic.name)
    if not nic.master and nic.addresses:
        raise HostRefused(
            f"NIC {nic.name} carries the host's address {nic.addresses[0]} and is in no bridge: "
            f"an untagged network would cut the host off",
            hint=f"put {nic.name} into a bridge that has the address, or name another NIC in {_detail(port)}",
        )
    return _bridged(have, segment, nic, [])


def _bridged(have: Have, segment: Segment, carrier: HostLink, steps: list[Step]) -> _Ground:
    """The bridge that the carrier is in, else the segment's own with the carrier as a port."""
    name = carrier.master or segment.bridge
    bridge = have.host_links.get(name)
    if bridge is None:
        was_up = carrier.up and carrier.name not in have.raised
        alias = f"{ALIAS} {'carries' if was_up else 'raises'} {carrier.name}"
        steps.append(CreateBridge(name, alias))
        for orphan in sorted(have.orphans.get(name, frozenset()) - {carrier.name}):
            if orphan in have.host_links and not have.host_links[orphan].master:
                steps.append(AttachPort(orphan, name))
        bridge = HostLink(name=name, kind="bridge", alias=alias, ipv6=True)
    elif bridge.kind != "bridge":
        raise HostRefused(
            f"{carrier.name} is in {name}, which is no bridge" if carrier.master else f"link {name} is no bridge",
            hint="rename it, or name another NIC in the registration",
        )
    steps += [SilenceIpv6(link.name) for link in (carrier, bridge) if link.ours and link.ipv6]
    if bridge.ours and name not in have.guarded:
        steps.append(GuardBridge(name))
    if not carrier.master:
        steps.append(AttachCarrier(carrier.name, name))
    if not carrier.up:
        steps.append(SetHostLinkUp(carrier.name))
    if not bridge.up:
        steps.append(SetHostLinkUp(name))
    return _Ground(name, tuple(steps), bridge.ours)


def _vlan_link(have: Have, segment: Segment) -> HostLink | None:
    for link in have.host_links.values():
        if link.kind == "vlan" and link.parent == segment.nic and str(link.vlan_id) == segment.vlan:
            return link
    return have.host_links.get(segment.vlan_link)


def _build(have: Have, want: Want, grounds: dict[Segment, _Ground]) -> Iterator[Step]:
    """What goes, the ruleset, what comes: no packet arrives over a link that the rules do not know yet."""
    ns = want.namespace
    ports = {port.link: port for port in want.ports}
    standing = {port.link for port in want.ports if _stands(have, port)}
    wanted = frozenset(ground.bridge for ground in grounds.values())
    inherited, after = _inherited(have, wanted=wanted)
    yield from inherited
    if not have.exists:
        yield CreateNamespace(ns)
    for key, value in want.sysctls.items():
        if _link_of(key, ports) is None and have.sysctls.get(key) != value:
            yield SetSysctl(ns, key, value)
    yield from _what_goes(have, want, standing)
    yield from _ruleset(have, want)
    yield from dict.fromkeys(step for ground in grounds.values() for step in ground.steps)
    for port in want.ports:
        yield from _port(have, ns, port, grounds[port.segment].bridge, alias_of(have.scope_id))
    for key, value in want.sysctls.items():
        link = _link_of(key, ports)
        if link is not None and (link not in standing or have.sysctls.get(key) != value):
            yield SetSysctl(ns, key, value)
    yield from _what_comes(have, want, standing)
    guarded = have.guarded | {ground.bridge for ground in grounds.values() if ground.ours}
    after = msgspec.structs.replace(after, guarded=guarded)
    yield from _unneeded(after, wanted=wanted, leaving=_our_ports(have))


def _what_goes(have: Have, want: Want, standing: set[str]) -> Iterator[Step]:
    """What is in the namespace and is not wanted there. What hangs on a link that goes, goes with it."""
    ns = want.namespace
    put = {(route.table, route.destination) for route in want.routes}
    for route in have.routes:
        if (route.table, route.destination) not in put and (route.link in standing or not route.link):
            yield RemoveRoute(ns, route)
    for rule in _without(have.rules, want.rules):
        yield RemoveRule(ns, rule)
    for address in have.addresses:
        # One that is cut off comes again: the kernel makes the route with it. The others go with their link.
        if address.link in standing and (address not in want.addresses or address in have.cut_off):
            yield RemoveAddress(ns, address)
    named = {(it.link, it.address) for it in want.neighbours}
    for neighbour in have.neighbours:
        if neighbour.link in standing and (neighbour.link, neighbour.address) not in named:
            yield RemoveNeighbour(ns, neighbour)
    ports = {port.link for port in want.ports}
    for link in have.links.values():
        if link.name not in standing and (link.kind == "veth" or link.name in ports):
            yield RemovePort(ns, link.name)


def _ruleset(have: Have, want: Want) -> Iterator[Step]:
    if want.ruleset is not None and have.tampered:
        yield LoadRuleset(want.namespace, want.ruleset, None, have.table)
    # The very same value needs no digest: 25 ms where there are ten thousand forwards.
    elif want.ruleset is not None and have.ruleset is not want.ruleset and have.marker != marker(want.ruleset):
        yield LoadRuleset(want.namespace, want.ruleset, have.ruleset, have.table)


def _what_comes(have: Have, want: Want, standing: set[str]) -> Iterator[Step]:
    """What is wanted in the namespace and is not there: first what a link may have while it is down."""
    ns = want.namespace
    kept = {it for it in have.addresses if it.link in standing and it not in have.cut_off}
    for address in want.addresses:
        if address not in kept:
            yield AddAddress(ns, address)
    if not have.loopback_up:
        yield SetLinkUp(ns, "lo")
    for port in want.ports:
        host_link = have.host_links.get(port.host_link)
        if port.link not in standing or host_link is None or not host_link.up:
            yield SetPortUp(port.host_link)
    for port in sorted(want.ports, key=lambda port: (not _is_guest(port), port)):
        if port.link not in standing or not have.links[port.link].up:
            yield SetLinkUp(ns, port.link)
    # A link that gets another MAC address, or has been down, has forgotten its neighbours.
    macs = {port.link: port.mac for port in want.ports}
    known = {it for it in have.neighbours if it.link in standing and have.links[it.link].mac == macs[it.link]}
    for neighbour in want.neighbours:
        if neighbour not in known:
            yield PutNeighbour(ns, neighbour)
    there = {route for route in have.routes if route.link in standing or not route.link}
    for route in want.routes:
        if route not in there:
            yield PutRoute(ns, route)
    if not have.asks_main:
        yield AddRule(ns, ASK_MAIN)
    for rule in _without(want.rules, have.rules):
        yield AddRule(ns, rule)


def _port(have: Have, ns: str, port: Port, bridge: str, alias: str) -> Iterator[Step]:
    host_link = have.host_links.get(port.host_link)
    if not _stands(have, port):
        inside = have.links.get(port.link)
        if host_link is not None and (inside is None or inside.host_link != port.host_link):
            if not host_link.ours:
                raise HostRefused(
                    f"link {port.host_link} is there already and is not ours",
                    hint="remove or rename it",
                )
            yield RemoveHostPort(port.host_link)
        yield CreatePort(ns, port, bridge, alias)
        yield SilenceIpv6(port.host_link)
        if (mtu := _mtu(have, port)) < MTU_MAX:
            yield SetMtu("", port.host_link, mtu)
            yield SetMtu(ns, port.link, mtu)
        return
    assert host_link is not None
    if host_link.alias != alias:
        yield MarkPort(port.host_link, alias)
    if host_link.ipv6:
        yield SilenceIpv6(port.host_link)
    if have.links[port.link].mac != port.mac:
        yield SetMac(ns, port.link, port.mac)
    mtu = _mtu(have, port)
    if host_link.mtu not in (0, mtu):
        yield SetMtu("", port.host_link, mtu)
    if have.links[port.link].mtu not in (0, mtu):
        yield SetMtu(ns, port.link, mtu)
    if host_link.master != bridge:
        yield AttachPort(port.host_link, bridge)


def _mtu(have: Have, port: Port) -> int:
    """The MTU of what carries the segment, and never more than Ethernet's: guests assume that one."""
    carrier = have.host_links.get(port.segment.vlan_link or port.segment.nic)
    return min(MTU_MAX, carrier.mtu) if carrier is not None and carrier.mtu else MTU_MAX


def _stands(have: Have, port: Port) -> bool:
    inside = have.links.get(port.link)
    return inside is not None and inside.host_link == port.host_link and port.host_link in have.host_links


def _tear_down(have: Have) -> Iterator[Step]:
    if not have.exists or have.foreign:
        return
    for link in have.links.values():
        # A namespace can outlive its name (a process holds it): its links go by themselves.
        if link.kind == "veth":
            yield RemovePort(have.namespace, link.name)
    yield RemoveNamespace(have.namespace)


def _our_ports(have: Have) -> frozenset[str]:
    return frozenset(link.host_link for link in have.links.values() if link.host_link and not have.foreign)


def _unneeded(have: Have, *, wanted: frozenset[str], leaving: frozenset[str]) -> Iterator[Step]:
    """Removes the bridges of ours that nobody wants once the ports ``leaving`` have left."""
    guarded = set(have.guarded)
    for bridge in sorted(have.host_links.values(), key=lambda link: link.name):
        if bridge.kind != "bridge" or not bridge.ours or bridge.name in wanted or bridge.name in have.claimed:
            continue
        if set(bridge.ports) - leaving - {bridge.carrier}:
            continue
        yield RemoveBridge(bridge.name)
        carrier = have.host_links.get(bridge.carrier)
        if carrier is not None and carrier.ours and carrier.kind in CARRIERS:
            yield RemoveVlanLink(carrier.name)
        elif carrier is not None and bridge.raised:
            yield SetHostLinkDown(carrier.name)
        if bridge.name in guarded:
            guarded.remove(bridge.name)
            yield UnguardBridge(bridge.name, last=not guarded)


def _inherited(have: Have, *, wanted: frozenset[str]) -> tuple[list[Step], Have]:
    """Takes over, before our ports leave, the bridges that they alone keep; and what there is then.

    CloudStack's KVM agent, which made them, removes its bridge of a VLAN with the last VM, unless a port's name has
    ``vnet`` in it as ours does, and never looks again. What has another port, an address, an alias, or another name
    than the agent's, is left to whoever made it. So is VXLAN: we could not make a tunnel again that an operator has
    connected in a way of their own.
    """
    leaving = _our_ports(have)
    aliases: dict[str, str] = {}
    for bridge in sorted(have.host_links.values(), key=lambda link: link.name):
        nic, _, vlan = bridge.name.removeprefix("br").rpartition("-")
        link = names.vlan_link(nic, vlan)
        others = set(bridge.ports) - leaving
        if (
            bridge.kind != "bridge"
            or bridge.name in wanted
            or bridge.name in have.claimed
            or not vlan.isdigit()
            or bridge.name != names.bridge(nic, vlan)
            or not leaving & set(bridge.ports)
            or not others <= {link}
            or bridge.alias
            or bridge.addresses
        ):
            continue
        # The VLAN link first: without its bridge nobody would find it again.
        carrier = have.host_links.get(link) if link in others else None
        if carrier is not None and carrier.kind == "vlan" and not carrier.alias and not carrier.addresses:
            aliases[link] = ALIAS
        aliases[bridge.name] = f"{ALIAS} carries {link}"
    host_links = have.host_links | {
        name: msgspec.structs.replace(have.host_links[name], alias=alias) for name, alias in aliases.items()
    }
    steps: list[Step] = [Inherit(name, alias) for name, alias in aliases.items()]
    return steps, msgspec.structs.replace(have, host_links=host_links)


def _link_of(key: str, ports: Iterable[str]) -> str | None:
    """The link that a sysctl belongs to: ``net.ipv4.conf.gst-204.rp_filter`` is ``gst-204``'s."""
    words = key.replace("/", ".").split(".")
    return next((name for name in ports if name in words), None)


def _without(items: Iterable[_T], others: Iterable[_T]) -> list[_T]:
    taken = set(others)
    return [item for item in items if item not in taken]


def _is_guest(port: Port) -> bool:
    return port.link.startswith("gst-")


def _detail(port: Port) -> str:
    return "guest.network.device" if _is_guest(port) else "public.network.device"


def _no_nic(port: Port) -> HostRefused:
    return HostRefused(
        f"NIC {port.segment.nic} does not exist on this host",
        hint=f"check the registration detail {_detail(port)}",
    )


def route_words(route: Route) -> str:
    """A route as ip-route(8) writes it."""
    kind = "" if route.kind == "unicast" else f"{route.kind} "
    words = (("via", route.via), ("dev", route.link), ("src", route.source))
    return f"{kind}{route.destination}{''.join(f' {word} {it}' for word, it in words if it)} table {route.table}"


def rule_words(rule: Rule) -> str:
    """A rule as ip-rule(8) writes it."""
    words = (("from", rule.source), ("to", rule.destination), ("iif", rule.iif))
    which = "".join(f"{word} {it} " for word, it in words if it)
    return f"{rule.priority}: {which}fwmark {rule.mark:#x}/{rule.mask:#x} table {rule.table}"
