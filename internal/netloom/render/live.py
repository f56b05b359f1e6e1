"""What of a scope stands on a host: the implemented networks, the held addresses, the translations in force.

The renderer of the ruleset and the judge of open flows read this same value, so that they cannot disagree about
what applies. Nothing here depends on the order in which the scope was told.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise

import msgspec
from msgspec.structs import replace

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


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """What stands. Without a standing network nothing does, whatever addresses and rules are remembered."""

    networks: tuple[Network, ...] = ()
    held: tuple[PublicIp, ...] = ()
    exits: tuple[Exit, ...] = ()
    source_nat: PublicIp | None = None  # what guests without an address of their own leave with
    static_nats: tuple[StaticNat, ...] = ()
    static_sources: dict[str, PublicIp] = {}  # by guest address
    port_forwards: tuple[PortForward, ...] = ()
    forwarded: tuple[ForwardedPorts, ...] = ()
    ingress: dict[str, tuple[FirewallRule, ...]] = {}  # by public address
    balanced: tuple[LbRule, ...] = ()  # in the order of their ids; backends that no standing network has are left out

    @property
    def answered(self) -> frozenset[tuple[str, int]]:
        """Address and TCP port of what the load balancer answers itself, on the device."""
        return frozenset((it.public_ip, it.public_port) for it in self.balanced if it.protocol != "udp")

    @property
    def spread(self) -> tuple[LbRule, ...]:
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

    def network_of(self, address: str) -> Network | None:
        """The standing network whose subnet an address lies in."""
        return _network_of(self.networks, address)


def live(scope: Scope | None) -> Live:
    """What of ``scope`` stands."""
    networks = _networks(scope)
    if scope is None or not networks:
        return Live()
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
    ingress: dict[str, list[FirewallRule]] = {it: [] for it in held_at}
    for network in networks:
        for rule in network.firewall.rules if network.firewall else ():
            if rule.direction == "ingress" and rule.public_ip in ingress:
                ingress[rule.public_ip].append(rule)
    return Live(
        networks=networks,
        held=held,
        exits=_exits(held),
        source_nat=next((it for it in held if it.source_nat), None),
        static_nats=static_nats,
        static_sources=static_sources,
        port_forwards=tuple(forwards),
        forwarded=tuple(_forwarded(forwards)),
        ingress={address: tuple(rules) for address, rules in ingress.items()},
        balanced=tuple(sorted(balanced, key=lambda it: it.rule_id)),
    )


def device_address(network: Network) -> str:
    """The device's own address on the guest side: its own where CloudStack gave one, else the gateway's."""
    return network.extension_ip or network.gateway


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
    """First and last address of an IPv4 prefix, as numbers."""
    prefix = subnet(cidr)
    return int(prefix.network_address), int(prefix.broadcast_address)


def within(address: str, cidr: str) -> bool:
    """Whether an address lies in a prefix."""
    first, last = bounds(cidr)
    return first <= as_number(address) <= last


def _networks(scope: Scope | None) -> tuple[Network, ...]:
    # Isolated networks are all that is built yet; tiers of a VPC will be several of them in one scope.
    if scope is None:
        return ()
    standing = [
        it
        for it in scope.networks.values()
        if it.implemented and it.guest_type == "isolated" and it.vlan and it.cidr and device_address(it)
    ]
    return tuple(sorted(standing, key=lambda it: int(it.network_id)))


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
