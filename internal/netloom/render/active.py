"""What of a scope stands on a host: the implemented networks, the held addresses, the translations in force.

The renderer of the ruleset and the judge of open flows read this same value, so that they cannot disagree about
what applies. Nothing here depends on the order in which the scope was told.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_network
from itertools import pairwise

import msgspec
from msgspec.structs import replace

from netloom.render.acl import Acl, acl_of
from netloom.state import FirewallRule, LbRule, Network, PortForward, Ports, PublicIp, Scope, StaticNat


class ForwardedPorts(msgspec.Struct, frozen=True):
    """Ports of a public address that one forward, and no other, translates. All of them together are disjoint."""

    ports: Ports
    forward: PortForward


class Exit(msgspec.Struct, frozen=True):
    """A way out: a public VLAN and its gateway, with the addresses that use it."""

    number: int
    vlan: str
    gateway: str
    subnets: tuple[str, ...]
    addresses: tuple[str, ...]  # lowest first


class Active(msgspec.Struct, frozen=True, kw_only=True):
    """What stands. Without a standing network or VPC nothing does, whatever addresses and rules are remembered."""

    exists: bool = False
    networks: tuple[Network, ...] = ()
    acls: dict[str, Acl] = {}  # by network_id: of every tier; isolated networks have none
    plain: bool = False  # the device is a neighbour of its guests and no more (``render.shared``)
    held: tuple[PublicIp, ...] = ()
    exits: tuple[Exit, ...] = ()
    source_nat: PublicIp | None = None  # what guests without an address of their own leave with
    static_nats: tuple[StaticNat, ...] = ()
    static_sources: dict[str, PublicIp] = {}  # by guest address
    port_forwards: tuple[PortForward, ...] = ()
    forwarded: tuple[ForwardedPorts, ...] = ()
    ingress: dict[str, tuple[FirewallRule, ...]] = {}  # by public address; one that is not there lets everything on
    balanced: tuple[LbRule, ...] = ()  # in the order of their ids; backends that no standing network has are left out

    @property
    def haproxy_ports(self) -> frozenset[tuple[str, int]]:
        """Address and TCP port of what the load balancer answers itself, on the device."""
        return frozenset((it.public_ip, it.public_port) for it in self.balanced if it.protocol != "udp")

    @property
    def udp_balanced(self) -> tuple[LbRule, ...]:
        """The UDP rules: translated to one backend or another, flow by flow."""
        return tuple(it for it in self.balanced if it.protocol == "udp")

    @property
    def guest_cidrs(self) -> tuple[str, ...]:
        return tuple(it.cidr for it in self.networks)

    @property
    def default_exit(self) -> Exit | None:
        """The exit of whatever no mark sends elsewhere: the source-NAT address's, else the lowest."""
        if self.source_nat is None:
            return self.exits[0] if self.exits else None
        return next(it for it in self.exits if it.number == self.source_nat.exit)

    def backend_ports(self, rule: LbRule) -> list[tuple[Network, int]]:
        """The network and the port that a balanced port leads to, as far as there is a backend.

        CloudStack's rules have one port for all backends, in one tier. Where somebody else's have more, the first
        backend stands for all.
        """
        homes = [(home, end.port) for end in rule.backends if (home := self.network_of(end.ip)) is not None]
        return homes[:1]

    def network_of(self, address: str) -> Network | None:
        """The standing network whose subnet an address lies in."""
        return _network_of(self.networks, address)


def active(scope: Scope | None) -> Active:
    """What of ``scope`` stands."""
    networks = _networks(scope)
    if scope is None or not (networks or scope.vpc_implemented):
        return Active()
    held = tuple(sorted(scope.public_ips.values(), key=lambda it: as_number(it.address)))
    held_at = {it.address: it for it in held}
    static_nats = tuple(
        scope.static_nats[address]
        for address in held_at
        if address in scope.static_nats and _network_of(networks, scope.static_nats[address].private_ip)
    )
    static_sources: dict[str, PublicIp] = {}
    for nat in static_nats:
        # Of several public addresses of one guest the lowest, so that it does not move.
        static_sources.setdefault(nat.private_ip, held_at[nat.public_ip])
    forwards = [
        it for it in scope.port_forwards.values() if it.public_ip in held_at and _network_of(networks, it.private_ip)
    ]
    forwards.sort(key=lambda it: (as_number(it.public_ip), it.protocol, it.public_ports, it.key))
    balanced = [
        replace(it, backends=tuple(end for end in it.backends if _network_of(networks, end.ip)))
        for it in scope.lb_rules.values()
        if it.public_ip in held_at
    ]
    return Active(
        exists=True,
        networks=networks,
        acls={it.network_id: acl_of(it, open_without=scope.ingress_open) for it in networks if scope.is_vpc},
        plain=_plain(scope, networks),
        held=held,
        exits=_exits(held),
        source_nat=next((it for it in held if it.source_nat), None),
        static_nats=static_nats,
        static_sources=static_sources,
        port_forwards=tuple(forwards),
        forwarded=tuple(_forwarded(forwards)),
        ingress=_ingress(scope, networks, held),
        balanced=tuple(sorted(balanced, key=lambda it: it.rule_id)),
    )


def target_port(forward: PortForward, public_port: int) -> int:
    """The guest's port that a public port leads to: one to one, or all to one."""
    if forward.private_ports.count != forward.public_ports.count:
        return forward.private_ports.first
    return forward.private_ports.first + public_port - forward.public_ports.first


@lru_cache(maxsize=65536)
def as_number(address: str) -> int:
    """An IPv4 address as a number, to sort and compare by."""
    return int(IPv4Address(address))


@lru_cache(maxsize=65536)
def subnet(cidr: str) -> IPv4Network:
    """An IPv4 prefix; host bits are dropped."""
    return IPv4Network(cidr, strict=False)


@lru_cache(maxsize=65536)
def bounds(cidr: str) -> tuple[int, int]:
    """First and last address of a prefix, as numbers."""
    prefix = ip_network(cidr, strict=False)
    return int(prefix.network_address), int(prefix.broadcast_address)


def within(address: str, cidr: str) -> bool:
    """Whether an address lies in a prefix of its family."""
    first, last = bounds(cidr)
    return first <= (_as_number6 if ":" in address else as_number)(address) <= last


@lru_cache(maxsize=65536)
def _as_number6(address: str) -> int:
    return int(IPv6Address(address))


def _networks(scope: Scope | None) -> tuple[Network, ...]:
    standing = [it for it in scope.networks.values() if it.is_active] if scope is not None else []
    return tuple(sorted(standing, key=lambda it: int(it.network_id)))


def _ingress(
    scope: Scope, networks: tuple[Network, ...], held: Iterable[PublicIp]
) -> dict[str, tuple[FirewallRule, ...]]:
    """An address of a VPC has no firewall of its own, unless the tier that asked for it has a list."""
    judged = {it.network_id for it in networks if it.firewall is not None}
    found: dict[str, list[FirewallRule]] = {
        it.address: []
        for it in held
        if not scope.is_vpc or it.network_id in judged  # guard: a-tiers-firewall-is-asked-too
    }
    for network in networks:
        for rule in network.firewall.rules if network.firewall else ():
            if rule.direction == "ingress" and rule.public_ip in found:
                found[rule.public_ip].append(rule)
    return {address: tuple(rules) for address, rules in found.items()}


def _plain(scope: Scope, networks: tuple[Network, ...]) -> bool:
    """Whether the guests have another gateway, and nothing of the outside is held for them."""
    return not scope.is_vpc and networks[0].device_ip != networks[0].gateway and not scope.public_ips


def _network_of(networks: Iterable[Network], address: str) -> Network | None:
    return next((it for it in networks if within(address, it.cidr)), None)


def _exits(held: Iterable[PublicIp]) -> tuple[Exit, ...]:
    users: dict[int, list[PublicIp]] = {}
    for it in held:
        users.setdefault(it.exit, []).append(it)
    return tuple(
        Exit(
            number,
            addresses[0].vlan,
            next((it.gateway for it in addresses if it.gateway), ""),
            tuple(sorted({str(subnet(it.cidr)) for it in addresses if it.cidr})),
            tuple(it.address for it in addresses),
        )
        for number, addresses in sorted(users.items())
    )


def _forwarded(forwards: list[PortForward]) -> list[ForwardedPorts]:
    found: list[ForwardedPorts] = []
    by_address: dict[tuple[str, str], list[PortForward]] = {}
    for it in forwards:
        by_address.setdefault((it.public_ip, it.protocol), []).append(it)
    for those in by_address.values():
        if all(before.public_ports.last < after.public_ports.first for before, after in pairwise(those)):
            found += [ForwardedPorts(it.public_ports, it) for it in those]
        else:
            found += _disjoint(those)
    return found


def _disjoint(forwards: list[PortForward]) -> list[ForwardedPorts]:
    """Where forwards overlap, the one with fewer ports has them: a kernel map takes each port once."""
    edges = sorted({it.public_ports.first for it in forwards} | {it.public_ports.last + 1 for it in forwards})
    found: list[ForwardedPorts] = []
    for first, after in pairwise(edges):
        covering = [it for it in forwards if it.public_ports.first <= first <= it.public_ports.last]
        if not covering:
            continue
        winner = min(covering, key=lambda it: (it.public_ports.count, it.public_ports.first))
        if found and found[-1].forward is winner and found[-1].ports.last == first - 1:
            found[-1] = ForwardedPorts(Ports(found[-1].ports.first, after - 1), winner)
        else:
            found.append(ForwardedPorts(Ports(first, after - 1), winner))
    return found
