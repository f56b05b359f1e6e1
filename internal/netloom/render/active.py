"""The part of a scope that is in force on a host: implemented networks, held addresses, effective translations.

Both the ruleset (``nft``) and the policy for open flows (``flows``) are computed from this value, so they cannot
disagree. The result does not depend on the order in which CloudStack sent its commands.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_network
from itertools import pairwise
from operator import attrgetter, lt

import msgspec
from msgspec.structs import replace

from netloom.render import second_nics
from netloom.render.acl import Acl, acl_of
from netloom.state import FirewallRule, LbRule, Network, PortForward, Ports, PublicIp, Scope, StaticNat

_FIRST_PORT, _LAST_PORT = attrgetter("public_ports.first"), attrgetter("public_ports.last")


class ForwardedPorts(msgspec.Struct, frozen=True, gc=False):
    """Ports of a public address that are translated by exactly one forward. No two of these ranges overlap."""

    ports: Ports
    forward: PortForward


class Exit(msgspec.Struct, frozen=True):
    """A public VLAN and its gateway, with the public addresses that use them (glossary: exit)."""

    number: int
    vlan: str
    gateway: str
    subnets: tuple[str, ...]
    addresses: tuple[str, ...]  # lowest first


class Active(msgspec.Struct, frozen=True, kw_only=True):
    """The active part of a scope. It is empty as long as no network is active and no VPC is implemented.

    ``balanced``: load balancing rules by ascending id, without backends that are in no active network.
    """

    exists: bool = False
    networks: tuple[Network, ...] = ()  # by ascending id
    acls: dict[str, Acl] = {}  # by network_id, for each tier of a VPC; isolated networks have none
    plain: bool = False  # guests have another gateway, see ``plain_network``
    held: tuple[PublicIp, ...] = ()  # by ascending address
    exits: tuple[Exit, ...] = ()  # by ascending number
    source_nat: PublicIp | None = None  # the source address of guests without a static NAT address
    static_nats: tuple[StaticNat, ...] = ()
    static_sources: dict[str, PublicIp] = {}  # by guest address
    port_forwards: tuple[PortForward, ...] = ()
    forwarded: tuple[ForwardedPorts, ...] = ()
    ingress: dict[str, tuple[FirewallRule, ...]] = {}  # by public address; an address that is missing allows everything
    balanced: tuple[LbRule, ...] = ()
    device_for_all: dict[str, str] = {}  # see ``second_nics``
    device_for_network: dict[str, dict[str, str]] = {}  # see ``second_nics``; only networks that have some

    @property
    def haproxy_rules(self) -> tuple[LbRule, ...]:
        """The load balancing rules for TCP. haproxy serves them on the device."""
        return tuple(rule for rule in self.balanced if rule.protocol != "udp")

    @property
    def udp_balanced(self) -> tuple[LbRule, ...]:
        """The load balancing rules for UDP. nftables translates each flow to one of the backends."""
        return tuple(rule for rule in self.balanced if rule.protocol == "udp")

    @property
    def guest_cidrs(self) -> tuple[str, ...]:
        """The guest subnets."""
        return tuple(network.cidr for network in self.networks)

    @property
    def default_exit(self) -> Exit | None:
        """The exit for packets without a mark: that of the source NAT address, otherwise the lowest."""
        if self.source_nat is None:
            return self.exits[0] if self.exits else None
        return next(exit_ for exit_ in self.exits if exit_.number == self.source_nat.exit)

    def backend_ports(self, rule: LbRule) -> list[tuple[Network, int]]:
        """The network and port of a rule's backends; empty if it has no backend.

        CloudStack gives all backends of a rule the same port in the same tier, so only the first backend is read.
        """
        found = [
            (network, backend.port) for backend in rule.backends if (network := self.network_of(backend.ip)) is not None
        ]
        return found[:1]

    def seen_as(self, home: Network | None, guest: str) -> str:
        """The source address that ``guest`` sees instead of a client's, or empty (``second_nics``).

        ``home``: the client's network; None: an outside host.
        """
        by_home = self.device_for_network.get(home.network_id, {}) if home is not None else {}
        return self.device_for_all.get(guest) or by_home.get(guest, "")

    def network_of(self, address: str) -> Network | None:
        """The active network whose subnet contains an address."""
        return _network_of(self.networks, address)


def active(scope: Scope | None) -> Active:
    """The active part of ``scope``. It is computed once for each of the last states: all of ``render`` asks for it."""
    for known, found in tuple(_recent):
        if known is scope:
            return found
    found = _active(scope)
    _recent.append((scope, found))
    return found


_recent: deque[tuple[Scope | None, Active]] = deque(maxlen=32)  # twice as many as worker threads


def _active(scope: Scope | None) -> Active:
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
        # A guest with several public addresses uses the lowest, so that its source address does not change.
        static_sources.setdefault(nat.private_ip, held_at[nat.public_ip])
    forwards = _effective_forwards(scope, networks, held_at)
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
        port_forwards=tuple(it for group in forwards for it in group),
        forwarded=tuple(it for group in forwards for it in _forwarded(group)),
        ingress=_ingress(scope, networks, held),
        balanced=tuple(sorted(balanced, key=lambda it: it.rule_id)),
        device_for_all=second_nics.device_for_all(networks),
        device_for_network={key: it for key, it in second_nics.device_for_network(networks).items() if it},
    )


def target_port(forward: PortForward, public_port: int) -> int:
    """The guest's port for a public port. Ranges of equal size map one to one, otherwise all ports map to one."""
    private, public = forward.private_ports, forward.public_ports
    if private.last - private.first != public.last - public.first:
        return private.first
    return private.first + public_port - public.first


@lru_cache(maxsize=65536)
def as_number(address: str) -> int:
    """An IPv4 address as a number, to sort and compare."""
    return int(IPv4Address(address))


@lru_cache(maxsize=65536)
def subnet(cidr: str) -> IPv4Network:
    """An IPv4 prefix; host bits are cleared."""
    return IPv4Network(cidr, strict=False)


@lru_cache(maxsize=65536)
def bounds(cidr: str) -> tuple[int, int]:
    """The first and the last address of a prefix, as numbers."""
    prefix = ip_network(cidr, strict=False)
    return int(prefix.network_address), int(prefix.broadcast_address)


def within(address: str, cidr: str) -> bool:
    """Whether a prefix contains an address. Both must be of the same family."""
    first, last = bounds(cidr)
    return first <= (_as_number6 if ":" in address else as_number)(address) <= last


@lru_cache(maxsize=65536)
def _as_number6(address: str) -> int:
    return int(IPv6Address(address))


def _networks(scope: Scope | None) -> tuple[Network, ...]:
    found = [network for network in scope.networks.values() if network.is_active] if scope is not None else []
    return tuple(sorted(found, key=lambda network: int(network.network_id)))


def _ingress(
    scope: Scope, networks: tuple[Network, ...], held: Iterable[PublicIp]
) -> dict[str, tuple[FirewallRule, ...]]:
    """The ingress rules of each address that has a firewall.

    An address of a VPC has a firewall only if CloudStack sent firewall rules for the tier that uses the address.
    """
    with_firewall = {network.network_id for network in networks if network.firewall is not None}
    found: dict[str, tuple[FirewallRule, ...]] = {
        it.address: ()
        for it in held
        if not scope.is_vpc or it.network_id in with_firewall  # guard: a-tiers-firewall-is-asked-too
    }
    for network in networks:
        for address, rules in (network.firewall.ingress if network.firewall else {}).items():
            if address in found:
                found[address] += rules
    return found


def _plain(scope: Scope, networks: tuple[Network, ...]) -> bool:
    """Whether the guests' gateway is another machine and the scope has no public address."""
    return not scope.is_vpc and networks[0].device_ip != networks[0].gateway and not scope.public_ips


def _network_of(networks: Iterable[Network], address: str) -> Network | None:
    return next((it for it in networks if within(address, it.cidr)), None)


def _exits(held: Iterable[PublicIp]) -> tuple[Exit, ...]:
    users: dict[int, list[PublicIp]] = {}
    for address in held:
        users.setdefault(address.exit, []).append(address)
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


def _effective_forwards(scope: Scope, networks: tuple[Network, ...], held: Collection[str]) -> list[list[PortForward]]:
    """The port forwards of held addresses to guests, for each address and protocol, by their ports."""
    groups: dict[tuple[str, str], list[PortForward]] = {}
    guests: dict[str, bool] = {}  # many forwards lead to the same guest
    for it in scope.port_forwards.values():
        if it.private_ip not in guests:
            guests[it.private_ip] = _network_of(networks, it.private_ip) is not None
        if guests[it.private_ip] and it.public_ip in held:
            groups.setdefault((it.public_ip, it.protocol), []).append(it)
    for group in groups.values():
        group.sort(key=_LAST_PORT)
        group.sort(key=_FIRST_PORT)
    return [groups[key] for key in sorted(groups, key=lambda it: (as_number(it[0]), it[1]))]


def _forwarded(forwards: list[PortForward]) -> list[ForwardedPorts]:
    """Of forwards of one address and protocol, by their ports."""
    if all(map(lt, map(_LAST_PORT, forwards), map(_FIRST_PORT, forwards[1:]))):
        return [_whole(it) for it in forwards]
    return _disjoint(forwards)


@lru_cache(maxsize=65536)
def _whole(forward: PortForward) -> ForwardedPorts:
    """All ports of a forward; the same object for the same forward."""
    return ForwardedPorts(forward.public_ports, forward)


def _disjoint(forwards: list[PortForward]) -> list[ForwardedPorts]:
    """Split overlapping forwards. The forward with fewer ports wins: a map has one element for each port."""
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
