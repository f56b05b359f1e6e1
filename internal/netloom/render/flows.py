"""Which open connections survive a change of the scope.

The ruleset accepts the packets of established connections whatever the other rules say. So after a change that takes
something away, each conntrack entry is checked: would the new state accept the first packet of this connection, with
the same translation? If not, the entry is deleted. That ends a TCP connection, because the kernel does not pick up a
connection in the middle (``lost``). The guest's next packet of a UDP flow would open the flow again with the same
ports. So the entry of such a flow stays and gets the mark ``marks.REVOKED``, and the ruleset drops its packets.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import lru_cache
from typing import Literal, Protocol, TypeVar

import msgspec

from netloom.netobjects import IP6_LINK_LOCAL
from netloom.render import ip6
from netloom.render.active import Active, active, target_port, within
from netloom.render.device import DNS_PORT, SERVICE_PORTS_TCP, SERVICE_PORTS_UDP
from netloom.render.marks import REVOKED, exit_of
from netloom.render.pbr import policy_nats
from netloom.render.source_ports import forwarded_udp, free_ports, keeps_port
from netloom.state import AclItem, FirewallRule, Network, PortForward, Scope

ICMP, TCP, UDP, ICMPV6 = 1, 6, 17, 58
_NUMBERS = {"icmp": ICMP, "tcp": TCP, "udp": UDP}
_ECHO_REQUEST = 8
_DHCP_CLIENT, _DHCP_SERVER = 68, 67
_BROADCAST = "255.255.255.255"
_UNSPECIFIED = "0.0.0.0"
_ECHO_REQUEST_V6 = 128
_DNS = {(UDP, DNS_PORT), (TCP, DNS_PORT)}
_SERVICES = {*((UDP, port) for port in SERVICE_PORTS_UDP), *((TCP, port) for port in SERVICE_PORTS_TCP)}

_T = TypeVar("_T")
_List = tuple[bool, tuple[FirewallRule, ...]]  # a list of rules, after what holds without a rule

FlowAction = Literal["keep", "delete", "revoke"]
FlowCheck = Literal["none", "revoked_only", "all"]


class Master(Protocol):
    """The first packet of the connection whose helper announced another one, e.g. of the control connection of FTP."""

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


class Flow(Master, Protocol):
    """A conntrack entry. Addresses are text. Fields that the protocol does not have (ports, ICMP type) are not read."""

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
    @property
    def master(self) -> Master | None: ...


class _FirstPacket(msgspec.Struct, frozen=True, kw_only=True):
    """A flow of which only the first packet is known."""

    protocol: int
    src: str
    dst: str
    sport: int
    dport: int
    reply_src: str = ""
    reply_dst: str = ""
    reply_sport: int = 0
    reply_dport: int = 0
    icmp_type: int = -1
    icmp_code: int = -1
    mark: int = 0
    status: int = 0
    master: None = None


class _ReplyTuple(msgspec.Struct, frozen=True):
    """One way to accept a flow: where its replies must come from and go to, and its exit."""

    reply_src: str
    reply_sport: int
    reply_dst: str
    exit: int | None  # None: any
    port_fits: bool = True  # False: the flow has a source port outside that the ruleset would not give it


def flow_check(old: Scope | None, new: Scope | None) -> FlowCheck:
    """Which open flows must be checked after the change from ``old`` to ``new``.

    ``all``: something that was allowed, translated or held was removed or changed, or an address or a subnet was added.
    ``revoked_only`` (entries with the mark ``marks.REVOKED``): other things were added; a revoked flow that is allowed
    again must be able to open again. ``none``: nothing changed that decides about flows.
    """
    before, after = active(old), active(new)
    if not before.exists or before.plain:
        return "none"
    if _may_break_flows(before, after, _open_to_all(old), _open_to_all(new)):
        return "all"
    ip6_before, ip6_after = _ip6_outside_address(old, before), _ip6_outside_address(new, after)
    if _policy_sources(old, before) - _policy_sources(new, after) or ip6_before - ip6_after:
        return "all"
    same = _flow_rules(before) == _flow_rules(after)
    same = same and _same_lists(_lists(before, _open_to_all(old)), _lists(after, _open_to_all(new)))
    return "none" if same and ip6_before == ip6_after else "revoked_only"


class FlowPolicy:
    """Decides about open flows by one state. After its action was carried out, a flow gets the action ``keep``."""

    def __init__(self, scope: Scope | None) -> None:
        self._open_to_all = _open_to_all(scope)
        self._now = active(scope)
        self._in_vpc = scope is not None and scope.is_vpc
        self._policy_sources = _policy_sources(scope, self._now)
        self._held = {it.address: it for it in self._now.held}
        self._devices = {it.device_ip for it in self._now.networks}
        self._ip6_networks = [it for it in self._now.networks if it.has_ip6]
        self._ip6_outside_address = _ip6_outside_address(scope, self._now)
        self._ip6_gateways = {it.ip6_gateway: it.network_id for it in self._ip6_networks}
        forwarded = forwarded_udp(self._now)
        self._forwarded_udp = forwarded if free_ports([it.ports for it in forwarded]) is not None else []
        self._guests = {it.public_ip: it.private_ip for it in self._now.static_nats}
        self._egress = {it.network_id: _egress(it) for it in self._now.networks}
        self._udp_backends: dict[tuple[str, int], list[tuple[str, int]]] = {}
        self._forwards: dict[tuple[str, int], list[PortForward]] = {}
        for forward in self._now.port_forwards:
            self._forwards.setdefault((forward.public_ip, _NUMBERS[forward.protocol]), []).append(forward)
        self._haproxy_rules = {(it.public_ip, it.public_port): it for it in self._now.haproxy_rules}
        for rule in self._now.udp_balanced:
            self._udp_backends[rule.public_ip, rule.public_port] = [(it.ip, it.port) for it in rule.backends]
        # Cached: thousands of flows differ only in the port of the remote end.
        self._ingress_allows = lru_cache(maxsize=16384)(self._ingress_allows_uncached)
        self._egress_allows = lru_cache(maxsize=16384)(self._egress_allows_uncached)

    def action(self, flow: Flow) -> FlowAction:
        """``keep`` the flow, ``delete`` its entry, or ``revoke``: set ``marks.REVOKED`` in its mark."""
        master = flow.master
        announced = (
            self._action_by_master(master, flow) if master is not None else None
        )  # guard: an-announced-flow-is-judged-by-its-control-connection
        if announced is not None:
            return "delete" if flow.mark & REVOKED else announced
        allowed = list(self._allowed(flow))
        if flow.mark & REVOKED:
            return "delete" if allowed else "keep"
        if any(_has_tuple(flow, reply) for reply in allowed):
            return "keep"
        # If the state allows the flow with another translation, its next packet opens it again with that one.
        return (  # guard: a-flow-ends-with-what-allowed-it
            "delete"
            if allowed or flow.protocol in (TCP, ICMP, ICMPV6)
            else "revoke"  # guard: an-unconnected-flow-is-marked-as-revoked
        )

    def _action_by_master(self, master: Master, flow: Flow) -> Literal["keep", "delete"] | None:
        """The action for a flow that a helper announced; None if the state does not allow the connection that did.

        Whether that is still open does not matter. The flow's addresses on our side must be addresses of the master, or
        the master gets another address with its next packet. The remote end may be another one (SIP). If the helper is
        no longer in use, open flows stay.
        """
        first = _FirstPacket(
            protocol=master.protocol, src=master.src, dst=master.dst, sport=master.sport, dport=master.dport
        )
        allowed = list(self._allowed(first))
        ours = {it for it in (flow.src, flow.dst, flow.reply_src, flow.reply_dst) if self._is_ours(it)}
        if any(ours <= {master.src, master.dst, it.reply_src, it.reply_dst} for it in allowed):
            return "keep"
        return "delete" if allowed else None

    def _is_ours(self, address: str) -> bool:
        if ":" in address:
            return self._ip6_network_of(address) is not None
        return address in self._held or self._now.network_of(address) is not None

    def _allowed(self, flow: Flow) -> Iterator[_ReplyTuple]:
        """Each reply tuple with which the state accepts the first packet of the flow."""
        if ":" in flow.src:
            if self._ip6_allowed(flow):
                yield _ReplyTuple(flow.dst, flow.dport, flow.src, None)
            return
        if flow.src in self._devices or flow.src in self._held:
            # A flow of the device itself: the ruleset does not restrict it.
            yield _ReplyTuple(flow.dst, flow.dport, flow.src, None)
            return
        dhcp = flow.protocol == UDP and (flow.sport, flow.dport) == (_DHCP_CLIENT, _DHCP_SERVER)
        if flow.dst == _BROADCAST or flow.src == _UNSPECIFIED:
            if dhcp and flow.dst == _BROADCAST and (flow.src == _UNSPECIFIED or self._now.network_of(flow.src)):
                yield _ReplyTuple(flow.dst, flow.dport, flow.src, None)
            return
        home = self._now.network_of(flow.src)
        if flow.dst in self._held:
            yield from self._allowed_in(flow, home)
        elif home is not None:
            yield from self._allowed_out(flow, home)

    def _ip6_allowed(self, flow: Flow) -> bool:
        """Whether the state accepts the first packet of an IPv6 flow. Nothing is translated (``ip6``)."""
        home, there = self._ip6_network_of(flow.src), self._ip6_network_of(flow.dst)
        if flow.dst in self._ip6_gateways:
            echo = flow.protocol == ICMPV6 and flow.icmp_type == _ECHO_REQUEST_V6
            dns = (flow.protocol, flow.dport) in _DNS
            return home is not None and self._ip6_gateways[flow.dst] == home.network_id and (echo or dns)
        if home is None and there is None:
            # The device's own flow, or one on the link. A guest of a removed tier has neither kind of address.
            return flow.src in self._ip6_outside_address or (
                bool(self._ip6_networks) and within(flow.src, IP6_LINK_LOCAL)
            )
        if flow.src in self._ip6_gateways:
            return True
        if not self._acls_allow(home, there, flow, flow.dst, flow.dport):  # guard: an-ipv6-flow-is-judged-by-the-lists
            return False
        if there is not None:
            return self._in_vpc or (home is None and self._open_to_all)
        assert home is not None
        return self._egress_allows(
            home.network_id, flow.protocol, flow.src, flow.dst, flow.dport, flow.icmp_type, flow.icmp_code
        )

    def _ip6_network_of(self, address: str) -> Network | None:
        return next((it for it in self._ip6_networks if within(address, it.ip6_cidr)), None)

    def _allowed_in(self, flow: Flow, home: Network | None) -> Iterator[_ReplyTuple]:
        """A flow to a public address. ``home``: the network of the guest that opened it; None: an outside host."""
        if not self._ingress_allows(flow.dst, flow.protocol, flow.src, flow.dport, flow.icmp_type, flow.icmp_code):
            return
        exit_ = self._held[flow.dst].exit if home is None else 0
        targets = [
            (it.private_ip, target_port(it, flow.dport))
            for it in self._forwards.get((flow.dst, flow.protocol), ())
            if it.public_ports.first <= flow.dport <= it.public_ports.last
        ]
        if flow.protocol == UDP:
            targets += self._udp_backends.get((flow.dst, flow.dport), ())
        if flow.dst in self._guests:
            targets.append((self._guests[flow.dst], flow.dport))
        for address, port in targets:
            there = self._now.network_of(address)
            if there is None or not self._acls_allow(home, there, flow, address, port):
                continue
            if home is not None and there == home:
                yield _ReplyTuple(address, port, home.device_ip, exit_)
            elif home is None or self._in_vpc:
                for source in self._sources_seen_by(address, home, there, flow):
                    yield _ReplyTuple(address, port, source, exit_)
        if not targets and flow.protocol == TCP and self._balancer_answers(flow, home):
            yield _ReplyTuple(flow.dst, flow.dport, flow.src, exit_ if home is None else None)
        if not targets and flow.protocol == ICMP and flow.icmp_type == _ECHO_REQUEST and not self._in_vpc:
            # The device replies to a guest directly, whatever exit the guest's static NAT address has.
            yield _ReplyTuple(flow.dst, 0, flow.src, exit_ if home is None else None)

    def _allowed_out(self, flow: Flow, home: Network) -> Iterator[_ReplyTuple]:
        """A flow of a guest to the device, to another tier, or to the outside."""
        if flow.dst in self._devices:
            echo = flow.protocol == ICMP and flow.icmp_type == _ECHO_REQUEST
            own_gateway = flow.dst == home.device_ip
            service = (flow.protocol, flow.dport) in _SERVICES
            if (echo and (own_gateway or not self._in_vpc)) or (own_gateway and service):
                yield _ReplyTuple(flow.dst, flow.dport, flow.src, 0)
            return
        there = self._now.network_of(flow.dst)
        if there is not None:
            if self._in_vpc and self._acls_allow(home, there, flow, flow.dst, flow.dport):
                for source in self._sources_seen_by(flow.dst, home, there, flow):
                    yield _ReplyTuple(flow.dst, flow.dport, source, 0)
            return
        if not self._acls_allow(home, None, flow, flow.dst, flow.dport) or not self._egress_allows(
            home.network_id, flow.protocol, flow.src, flow.dst, flow.dport, flow.icmp_type, flow.icmp_code
        ):
            return
        own = self._now.static_sources.get(flow.src)
        if own is not None:
            yield _ReplyTuple(flow.dst, flow.dport, own.address, own.exit)
        # The guest may have got its static NAT address since. Only TCP cannot continue with a new address, so it stays.
        if self._now.source_nat is not None and (
            own is None or flow.protocol == TCP  # guard: datagrams-follow-a-static-nat
        ):
            fits = not self._takes_a_forwarded_port(flow)
            yield _ReplyTuple(flow.dst, flow.dport, self._now.source_nat.address, 0, fits)
        for address in self._policy_sources:
            yield _ReplyTuple(flow.dst, flow.dport, address, None)

    def _sources_seen_by(self, guest: str, home: Network | None, there: Network, flow: Flow) -> tuple[str, ...]:
        """The client's address as a guest may see it: see ``second_nics``.

        TCP has both possibilities. A connection that is open when the default NIC of the VM changes continues.
        """
        source = self._now.seen_as(home, guest) or flow.src
        return (flow.src, there.device_ip) if flow.protocol == TCP else (source,)

    def _takes_a_forwarded_port(self, flow: Flow) -> bool:
        """Whether a UDP flow has a source port outside that is forwarded to another guest (``source_ports``)."""
        return flow.protocol == UDP and any(
            part.ports.first <= flow.reply_dport <= part.ports.last
            and not (part.forward.private_ip == flow.src and keeps_port(part, flow.reply_dport))
            for part in self._forwarded_udp
        )

    def _balancer_answers(self, flow: Flow, home: Network | None) -> bool:
        """Whether haproxy serves this address and port, and, in a VPC, the lists allow it."""
        rule = self._haproxy_rules.get((flow.dst, flow.dport))
        if rule is None or not self._in_vpc:
            return rule is not None
        return self._acls_allow(home, None, flow, flow.dst, flow.dport) and any(
            self._acls_allow(None, there, flow, flow.dst, port) for there, port in self._now.backend_ports(rule)
        )

    def _acls_allow(self, home: Network | None, there: Network | None, flow: Flow, dst: str, dport: int) -> bool:
        """Whether the access control lists of the source tier and of the destination tier allow the first packet."""
        if home is not None and home.network_id in self._now.acls:
            acl = self._now.acls[home.network_id]
            if not _acl_allows(acl.egress, acl.egress_default_allow, dst, flow, dport):
                return False
        if there is not None and there.network_id in self._now.acls:
            acl = self._now.acls[there.network_id]
            default = acl.ingress_default_allow
            return _acl_allows(acl.ingress, default, flow.src, flow, dport)  # guard: a-flow-ends-with-its-list-item
        return True

    def _ingress_allows_uncached(
        self, public_ip: str, protocol: int, src: str, dport: int, type_: int, code: int
    ) -> bool:
        if self._open_to_all or public_ip not in self._now.ingress:
            return True
        rules = self._now.ingress[public_ip]
        return any(_rule_matches(it, protocol, src, public_ip, dport, type_, code) for it in rules)

    def _egress_allows_uncached(
        self, network_id: str, protocol: int, src: str, dst: str, dport: int, type_: int, code: int
    ) -> bool:
        allowed_by_default, rules = self._egress[network_id]
        return allowed_by_default != any(_rule_matches(it, protocol, src, dst, dport, type_, code) for it in rules)


def _has_tuple(flow: Flow, reply: _ReplyTuple) -> bool:
    """Whether the flow has this translation and this exit."""
    return (
        reply.port_fits  # guard: datagrams-leave-a-forwarded-port
        and flow.reply_src == reply.reply_src
        and flow.reply_dst == reply.reply_dst
        and (flow.protocol not in (TCP, UDP) or flow.reply_sport == reply.reply_sport)
        and reply.exit in (None, exit_of(flow.mark))
    )


def _rule_matches(rule: FirewallRule, protocol: int, src: str, dst: str, dport: int, type_: int, code: int) -> bool:
    if rule.protocol != "all":
        if rule.protocol == "icmp" and protocol == ICMPV6:
            any_type = rule.icmp_type is None or rule.icmp_type < 0
            return any_type and _in_one_of(src, rule.source_cidrs) and _in_one_of(dst, rule.dest_cidrs)
        if (_NUMBERS.get(rule.protocol) or int(rule.protocol)) != protocol:
            return False
        if protocol == ICMP:
            if rule.icmp_type is not None and rule.icmp_type >= 0:
                any_code = rule.icmp_code is None or rule.icmp_code < 0
                if rule.icmp_type != type_ or not (any_code or rule.icmp_code == code):
                    return False
        elif rule.ports is not None and not rule.ports.first <= dport <= rule.ports.last:
            return False
    return _in_one_of(src, rule.source_cidrs) and _in_one_of(dst, rule.dest_cidrs)


def _acl_allows(items: tuple[AclItem, ...], default: bool, remote: str, flow: Flow, dport: int) -> bool:
    """Whether the first matching item, or otherwise the default, allows. ``remote``: the address outside the tier."""
    for item in items:
        if _item_matches(item, flow, dport) and _in_one_of(remote, item.cidrs):
            return item.action == "allow"
    return default


def _item_matches(item: AclItem, flow: Flow, dport: int) -> bool:
    if item.protocol == "all":
        return True
    if item.protocol != "icmp":
        number = _NUMBERS.get(item.protocol) or int(item.protocol)
        return number == flow.protocol and (item.ports is None or item.ports.first <= dport <= item.ports.last)
    right_type = item.icmp_type in (None, flow.icmp_type)
    return flow.protocol in (ICMP, ICMPV6) and right_type and item.icmp_code in (None, flow.icmp_code)


def _in_one_of(address: str, prefixes: tuple[str, ...]) -> bool:
    return not prefixes or any(within(address, it) for it in prefixes if (":" in it) == (":" in address))


def _policy_sources(scope: Scope | None, now: Active) -> frozenset[str]:
    """The source addresses of guests on the operator's routes."""
    return frozenset(it.address.address for it in policy_nats(scope.pbr, now)) if scope is not None else frozenset()


def _open_to_all(scope: Scope | None) -> bool:
    return scope is not None and scope.ingress_open


def _flow_rules(now: Active) -> tuple[object, ...]:
    """Everything that decides about flows, as a value that can be compared, except the firewall's rules."""
    return (
        _subnets(now),
        _exits_by_address(now),
        now.source_nat and now.source_nat.address,
        now.static_nats,
        now.device_for_all,
        now.device_for_network,
        now.port_forwards,
        _balancing(now),
        now.acls,
    )


def _lists(now: Active, open_to_all: bool) -> dict[str, _List]:
    """The firewall's lists: of the ingress of addresses, and of the egress of networks."""
    ingress = {} if open_to_all else {address: (False, rules) for address, rules in now.ingress.items()}
    return {"open": (open_to_all, ()), **ingress, **{it.network_id: _egress(it) for it in now.networks}}


def _same_lists(before: dict[str, _List], after: dict[str, _List]) -> bool:
    """Whether the lists have the same rules, whatever their ids."""
    if before.keys() != after.keys():
        return False
    pairs = [(was, after[key]) for key, was in before.items()]
    return all(
        was[0] == now[0] and not lacks(now[1], was[1], _without_id) and not lacks(was[1], now[1], _without_id)
        for was, now in pairs
    )


def _may_break_flows(before: Active, after: Active, was_open: bool, is_open: bool) -> bool:
    """Whether the change can invalidate an open flow: no longer allowed, or translated differently. If unsure, True."""
    # A new address or subnet counts, too: until now, guests reached an outside host under this address.
    if (
        _subnets(before) != _subnets(after)
        or _exits_by_address(before) != _exits_by_address(after)  # guard: a-new-address-redirects-open-flows
    ):
        return True
    if before.source_nat is not None and (
        after.source_nat is None or after.source_nat.address != before.source_nat.address
    ):
        return True
    # With new static NAT the address no longer replies itself, so any difference counts.
    if before.static_nats != after.static_nats or lacks(after.port_forwards, before.port_forwards):
        return True
    # A guest may have an open flow with the port that is now forwarded to another guest.
    if lacks(forwarded_udp(before), forwarded_udp(after)):
        return True
    if not _balancing(before) <= _balancing(after):
        return True
    if (before.device_for_all, before.device_for_network) != (after.device_for_all, after.device_for_network):
        return True
    if was_open and not is_open:
        return True
    # In a list the first match decides, so any difference can forbid something.
    if any(after.acls.get(network_id) != acl for network_id, acl in before.acls.items()):
        return True
    if not is_open and any(_ingress_narrowed(before, after, it.address) for it in before.held):
        return True
    now = {it.network_id: it for it in after.networks}
    return any(_egress_narrowed(_egress(it), _egress(now[it.network_id])) for it in before.networks)


def _ip6_outside_address(scope: Scope | None, now: Active) -> frozenset[str]:
    """The device's IPv6 address on the public link, if it has one."""
    out = ip6.default_route(scope, now) if scope is not None else None
    return frozenset((out.address.partition("/")[0],)) if out else frozenset()


def _subnets(now: Active) -> set[tuple[str, str, str]]:
    four = {(it.network_id, it.cidr, it.device_ip) for it in now.networks}
    return four | {(it.network_id, it.ip6_cidr, it.ip6_gateway) for it in now.networks if it.has_ip6}


def _exits_by_address(now: Active) -> dict[str, int]:
    return {it.address: it.exit for it in now.held}


def _balancing(now: Active) -> frozenset[tuple[str, int, str, int]]:
    """The destinations of load-balanced flows.

    UDP: each backend. TCP: the device itself (an empty address), and the tier whose list applies.
    """
    udp = {
        (it.public_ip, it.public_port, backend.ip, backend.port) for it in now.udp_balanced for backend in it.backends
    }
    tcp = {(rule.public_ip, rule.public_port, "", 0) for rule in now.haproxy_rules}
    tiers = {
        (rule.public_ip, rule.public_port, network.network_id, port)
        for rule in now.haproxy_rules
        for network, port in now.backend_ports(rule)
    }
    return frozenset(udp | tcp | tiers)


def _egress(network: Network) -> _List:
    """Whether egress is allowed by default, and the rules that are exceptions from the default."""
    if network.firewall is None:
        return True, ()
    return network.firewall.default_egress_allow, network.firewall.egress


def _egress_narrowed(was: _List, now: _List) -> bool:
    """Whether the change forbids egress that was allowed. If unsure, True."""
    if now[0]:
        return lacks(was[1] if was[0] else (), now[1], _without_id)
    return was[0] or lacks(now[1], was[1], _without_id)


def _ingress_narrowed(before: Active, after: Active, address: str) -> bool:
    """Whether the change forbids ingress to an address. An address without a firewall allows everything."""
    was, now = before.ingress.get(address), after.ingress.get(address)
    return now is not None and (was is None or lacks(now, was, _without_id))


def lacks(these: Collection[_T], others: Collection[_T], value: Callable[[_T], object] = lambda it: it) -> bool:
    """Whether one of ``others`` has a value that none of ``these`` has.

    Of two states, most objects are the same in both. Values are computed and compared only for those that are not.
    """
    mine, theirs = dict(zip(map(id, these), these, strict=True)), dict(zip(map(id, others), others, strict=True))
    left = {value(theirs[it]) for it in theirs.keys() - mine.keys()}
    if left:
        left -= {value(mine[it]) for it in mine.keys() - theirs.keys()}
    return bool(left) and not left <= set(map(value, these))


def _without_id(rule: FirewallRule) -> FirewallRule:
    """A rule without its id, because CloudStack may send the same rule with another id."""
    return msgspec.structs.replace(rule, rule_id=0)
