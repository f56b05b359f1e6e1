"""What becomes of open connections when a scope changes.

Conntrack lets established connections through whatever the rules say. So after a change that takes something away,
each entry is judged by the new state, as its first packet would be judged, with the translation that it has. Deleting
the entry ends a TCP connection: nothing picks it up in the middle. A UDP flow would be begun anew by the guest's next
packet, outward, with the same ports; its entry stays, with ``marks.REVOKED``, and the ruleset drops its packets.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Literal, Protocol

import msgspec

from netloom.render.live import Live, device_address, live, target_port, within
from netloom.render.marks import REVOKED, exit_of
from netloom.state import FirewallRule, Network, PortForward, Scope

ICMP, TCP, UDP = 1, 6, 17
_NUMBERS = {"icmp": ICMP, "tcp": TCP, "udp": UDP}
_ECHO_REQUEST = 8
_DHCP_CLIENT, _DHCP_SERVER = 68, 67
_BROADCAST = "255.255.255.255"
_NOBODY = "0.0.0.0"
_SERVICES = {(UDP, 53), (UDP, 67), (TCP, 53), (TCP, 80), (TCP, 8080)}

Verdict = Literal["keep", "delete", "tombstone"]
Attention = Literal["none", "tombstones", "all"]


class Flow(Protocol):
    """A conntrack entry. Ports are 0 and ICMP's type and code -1 where the protocol has none; addresses are text."""

    @property
    def protocol(self) -> int: ...
    @property
    def src(self) -> str: ...
    @property
    def dst(self) -> str: ...
    @property
    def sport(self) -> int: ...
    @property
    def dport(self) -> int: ...
    @property
    def reply_src(self) -> str: ...
    @property
    def reply_dst(self) -> str: ...
    @property
    def reply_sport(self) -> int: ...
    @property
    def reply_dport(self) -> int: ...
    @property
    def icmp_type(self) -> int: ...
    @property
    def icmp_code(self) -> int: ...
    @property
    def mark(self) -> int: ...
    @property
    def status(self) -> int: ...


class _Way(msgspec.Struct, frozen=True):
    """One way in which the state lets a first packet through: what its replies come from and go to, and its exit."""

    reply_src: str
    reply_sport: int
    reply_dst: str
    exit: int | None  # None: any


def attention(old: Scope | None, new: Scope | None) -> Attention:
    """Which open flows have to be judged after the change from ``old`` to ``new``.

    ``all`` when something that was allowed, translated or held goes away or changes. ``tombstones`` (entries whose
    mark has ``marks.REVOKED``) when things were only added: a revoked flow that is allowed again is to begin anew.
    ``none`` when nothing that decides about flows is different.
    """
    before, after = live(old), live(new)
    if not before.networks:
        return "none"
    if _shrinks(before, after, _open_to_all(old), _open_to_all(new)):
        return "all"
    return "none" if _policy(before, _open_to_all(old)) == _policy(after, _open_to_all(new)) else "tombstones"


def shrinks(old: Scope | None, new: Scope | None) -> bool:
    """Whether the change takes anything away from open flows, so that all of them must be looked at."""
    return attention(old, new) == "all"


def verdict(scope: Scope | None, flow: Flow) -> Verdict:
    """What to do with one open flow under ``scope``; for many flows make one :class:`Judge`."""
    return Judge(scope).verdict(flow)


class Judge:
    """Judges open flows by one state. A flow that was dealt with as told is told to be kept the next time."""

    def __init__(self, scope: Scope | None) -> None:
        self._open_to_all = _open_to_all(scope)
        self._now = live(scope)
        self._held = {it.address: it for it in self._now.held}
        self._devices = {device_address(it) for it in self._now.networks}
        self._guests = {it.public_ip: it.private_ip for it in self._now.static_nats}
        self._egress = {it.network_id: _egress(it) for it in self._now.networks}
        self._spread: dict[tuple[str, int], list[tuple[str, int]]] = {}
        self._forwards: dict[tuple[str, int], list[PortForward]] = {}
        for it in self._now.port_forwards:
            self._forwards.setdefault((it.public_ip, _NUMBERS[it.protocol]), []).append(it)
        self._answered = self._now.answered
        for rule in self._now.spread:
            self._spread[rule.public_ip, rule.public_port] = [(it.ip, it.port) for it in rule.backends]
        # Thousands of flows differ in the other end's port only.
        self._admits = lru_cache(maxsize=16384)(self._admits_anew)
        self._lets_out = lru_cache(maxsize=16384)(self._lets_out_anew)

    def verdict(self, flow: Flow) -> Verdict:
        """``keep`` the flow, ``delete`` its entry, or set ``marks.REVOKED`` in its mark (``tombstone``)."""
        ways = list(self._ways(flow))
        if flow.mark & REVOKED:
            return "delete" if ways else "keep"
        if any(_fits(way, flow) for way in ways):
            return "keep"
        # Where the state has another way for it, the flow takes that one with its next packet.
        return "delete" if ways or flow.protocol in (TCP, ICMP) else "tombstone"

    def _ways(self, flow: Flow) -> Iterator[_Way]:
        """Every way in which the state lets the flow's first packet through."""
        if flow.src in self._devices or flow.src in self._held:
            # What the device itself began: the ruleset leaves that alone.
            yield _Way(flow.dst, flow.dport, flow.src, None)
            return
        dhcp = flow.protocol == UDP and (flow.sport, flow.dport) == (_DHCP_CLIENT, _DHCP_SERVER)
        if flow.dst == _BROADCAST or flow.src == _NOBODY:
            if dhcp and flow.dst == _BROADCAST and (flow.src == _NOBODY or self._now.network_of(flow.src)):
                yield _Way(flow.dst, flow.dport, flow.src, None)
            return
        home = self._now.network_of(flow.src)
        if flow.dst in self._held:
            yield from self._ways_in(flow, home)
        elif home is not None:
            yield from self._ways_out(flow, home)

    def _ways_in(self, flow: Flow, home: Network | None) -> Iterator[_Way]:
        """Through a public address, by a stranger or by a guest (``home``)."""
        if not self._admits(flow.dst, flow.protocol, flow.src, flow.dport, flow.icmp_type, flow.icmp_code):
            return
        way_out = self._held[flow.dst].exit if home is None else 0
        targets = [
            (it.private_ip, target_port(it, flow.dport))
            for it in self._forwards.get((flow.dst, flow.protocol), ())
            if it.public_ports.first <= flow.dport <= it.public_ports.last
        ]
        if flow.protocol == UDP:
            targets += self._spread.get((flow.dst, flow.dport), ())
        if flow.dst in self._guests:
            targets.append((self._guests[flow.dst], flow.dport))
        for address, port in targets:
            if home is None:
                yield _Way(address, port, flow.src, way_out)
            elif self._now.network_of(address) == home:
                yield _Way(address, port, device_address(home), way_out)
        if not targets and flow.protocol == TCP and (flow.dst, flow.dport) in self._answered:
            yield _Way(flow.dst, flow.dport, flow.src, way_out if home is None else None)
        if not targets and flow.protocol == ICMP and flow.icmp_type == _ECHO_REQUEST:
            # The device's answer to a guest goes to the guest, whatever exit the guest's own address has.
            yield _Way(flow.dst, 0, flow.src, way_out if home is None else None)

    def _ways_out(self, flow: Flow, home: Network) -> Iterator[_Way]:
        """From a guest, to the device or to the outside."""
        if flow.dst in self._devices:
            echo = flow.protocol == ICMP and flow.icmp_type == _ECHO_REQUEST
            if echo or (flow.dst == device_address(home) and (flow.protocol, flow.dport) in _SERVICES):
                yield _Way(flow.dst, flow.dport, flow.src, 0)
            return
        if self._now.network_of(flow.dst) is not None:
            return
        if not self._lets_out(
            home.network_id, flow.protocol, flow.src, flow.dst, flow.dport, flow.icmp_type, flow.icmp_code
        ):
            return
        own = self._now.static_sources.get(flow.src)
        if own is not None:
            yield _Way(flow.dst, flow.dport, own.address, own.exit)
        if self._now.source_nat is not None:
            # Also for a guest that got an address of its own since: what it had begun goes on.
            yield _Way(flow.dst, flow.dport, self._now.source_nat.address, 0)

    def _admits_anew(self, public_ip: str, protocol: int, src: str, dport: int, type_: int, code: int) -> bool:
        if self._open_to_all:
            return True
        rules = self._now.ingress[public_ip]
        return any(_matches(it, protocol, src, public_ip, dport, type_, code) for it in rules)

    def _lets_out_anew(
        self, network_id: str, protocol: int, src: str, dst: str, dport: int, type_: int, code: int
    ) -> bool:
        allowed_by_default, rules = self._egress[network_id]
        return allowed_by_default != any(_matches(it, protocol, src, dst, dport, type_, code) for it in rules)


def _fits(way: _Way, flow: Flow) -> bool:
    """Whether the flow has the translation, and the exit, of this way."""
    return (
        flow.reply_src == way.reply_src
        and flow.reply_dst == way.reply_dst
        and (flow.protocol not in (TCP, UDP) or flow.reply_sport == way.reply_sport)
        and way.exit in (None, exit_of(flow.mark))
    )


def _matches(rule: FirewallRule, protocol: int, src: str, dst: str, dport: int, type_: int, code: int) -> bool:
    if rule.protocol != "all":
        if _NUMBERS[rule.protocol] != protocol:
            return False
        if protocol == ICMP:
            if rule.icmp_type is not None and rule.icmp_type >= 0:
                any_code = rule.icmp_code is None or rule.icmp_code < 0
                if rule.icmp_type != type_ or not (any_code or rule.icmp_code == code):
                    return False
        elif rule.ports is not None and not rule.ports.first <= dport <= rule.ports.last:
            return False
    return _in_one_of(src, rule.source_cidrs) and _in_one_of(dst, rule.dest_cidrs)


def _in_one_of(address: str, prefixes: tuple[str, ...]) -> bool:
    return not prefixes or any(within(address, it) for it in prefixes if ":" not in it)


def _open_to_all(scope: Scope | None) -> bool:
    return scope is not None and scope.ingress_open


def _policy(now: Live, open_to_all: bool) -> tuple[object, ...]:
    """All that decides about flows, in a form in which equal policies are equal."""
    return (
        _subnets(now),
        {it.address: it.exit for it in now.held},
        now.source_nat and now.source_nat.address,
        now.static_nats,
        now.port_forwards,
        _balancing(now),
        open_to_all or {address: _bare(rules) for address, rules in now.ingress.items()},
        {it.network_id: _egress(it) for it in now.networks},
    )


def _shrinks(before: Live, after: Live, was_open: bool, is_open: bool) -> bool:
    if not _subnets(before) <= _subnets(after):
        return True
    exits = {it.address: it.exit for it in after.held}
    if any(exits.get(it.address) != it.exit for it in before.held):
        return True
    if before.source_nat is not None and (
        after.source_nat is None or after.source_nat.address != before.source_nat.address
    ):
        return True
    # A new static translation changes what the address itself answered, so any difference counts.
    if before.static_nats != after.static_nats or not set(before.port_forwards) <= set(after.port_forwards):
        return True
    if not _balancing(before) <= _balancing(after):
        return True
    if was_open and not is_open:
        return True
    if not is_open and any(not _bare(rules) <= _bare(after.ingress[at]) for at, rules in before.ingress.items()):
        return True
    now = {it.network_id: it for it in after.networks}
    return any(_closes(_egress(it), _egress(now[it.network_id])) for it in before.networks)


def _subnets(now: Live) -> set[tuple[str, str, str]]:
    return {(it.network_id, it.cidr, device_address(it)) for it in now.networks}


def _balancing(now: Live) -> frozenset[tuple[str, int, str, int]]:
    """What balanced flows lead to: the device itself (no address), or each backend."""
    spread = {(it.public_ip, it.public_port, end.ip, end.port) for it in now.spread for end in it.backends}
    return frozenset(spread | {(address, port, "", 0) for address, port in now.answered})


def _egress(network: Network) -> tuple[bool, frozenset[FirewallRule]]:
    """Whether egress is allowed by default, and the rules that say otherwise."""
    if network.firewall is None:
        return True, frozenset()
    rules = _bare(it for it in network.firewall.rules if it.direction == "egress")
    return network.firewall.default_egress_allow, rules


def _closes(was: tuple[bool, frozenset[FirewallRule]], now: tuple[bool, frozenset[FirewallRule]]) -> bool:
    """Whether something that egress allowed is no longer allowed; in doubt it is."""
    if now[0]:
        return not now[1] <= (was[1] if was[0] else frozenset())
    return was[0] or not was[1] <= now[1]


def _bare(rules: Iterable[FirewallRule]) -> frozenset[FirewallRule]:
    """Rules without their ids, which CloudStack may give anew."""
    return frozenset(msgspec.structs.replace(it, rule_id=0) for it in rules)
