"""The share of a scope in what the kernel keeps once for all namespaces: neighbour entries and ICMP errors.

The neighbour tables of IPv4 and IPv6 are full at ``gc_thresh3`` entries, which the agent sets by the number of links
(``plan.limits``). A link may use ``UNKNOWN_MAX`` entries of each kind for addresses that CloudStack did not name. An
address that it did name is in ``known4`` or ``known6`` and always admitted. The kernel makes an entry for

- an ARP request for an address of the device, or a neighbour or router solicitation: by the sender's address,
- each packet that it sends, forwarded ones and all replies: by the next hop, after routing.

So there are two bounds. ``sharing`` (before connection tracking) and the ``arp`` table bound the sources, ``resolving``
(after routing) the next hops. A dynamic set that is full takes no new element: the rule ends there, and the next one
drops. A key that it has is refreshed. Elements live longer than an unused entry above ``gc_thresh1`` does (60 s, and
15 s until it is removed), so a sender cannot gain entries by waiting.

Two more things are shared, and ICMP uses both up:

- The kernel sends all ICMP messages of a CPU through one socket of all namespaces (Linux 5.18). It can hold some 160
  messages that wait for a neighbour (measured, 6.18), each up to 3 s. So the device's own messages to addresses that
  are not known have a low rate (``answering``).
- Before Linux 6.12 the kernel counts the ICMP errors of all namespaces together, those of IPv6 too. It does not count
  types outside ``ratemask``, so the scopes have an empty one, and ``answering`` bounds their errors for each link. What
  a router must send to a sender of too long packets has no bound (RFC 1812 4.3.2.8, RFC 4443 2.4 f).
"""

from __future__ import annotations

from netloom import names
from netloom.netobjects import IP6_LINK_LOCAL
from netloom.render import pbr, plain_network
from netloom.render.active import Active
from netloom.render.ip6 import default_route, ip6_networks, nic_addresses
from netloom.render.ruleset import Chain, NftSet, Ruleset
from netloom.state import Network, Scope

UNKNOWN_MAX = 256  # addresses of each kind that a link may use at a time
_UNKNOWN_TIMEOUT = "2m"
_ICMP6 = "{ destination-unreachable, packet-too-big, time-exceeded, parameter-problem, echo-reply }"
_TO_UNKNOWN = "limit rate over 2/second burst 3 packets drop"  # guard: icmp-to-unknown-addresses-has-a-bound
# Longer ones use up more of the socket's memory. Errors have at most this length (RFC 1812 4.3.2.3, RFC 4443 2.4 c).
_LONG = "limit rate over 1/second burst 3 packets drop"
_LONG4, _LONG6 = f"ip length > 576 {_LONG}", f"ip6 length > 1240 {_LONG}"
_ERRORS = "limit rate over 50/second burst 50 packets drop"  # guard: icmp-errors-have-a-bound
# Code 4 is "fragmentation needed".
_ERRORS4 = "icmp type { destination-unreachable, time-exceeded, parameter-problem } icmp code != 4"
_ERRORS6 = "icmpv6 type { destination-unreachable, time-exceeded, parameter-problem }"
# Types that the kernel counts for all namespaces together: none. 0 is the reserved type of ICMPv6.
RATEMASK, RATEMASK6 = "0", "0"  # guard: icmp-errors-are-not-counted-for-all


def shared(rules: Ruleset, scope: Scope, now: Active) -> Ruleset:
    """``rules`` with the bounds of this page."""
    known4 = _known4(scope, now)
    return Ruleset(
        family=rules.family,
        table=rules.table,
        counters=rules.counters,
        helpers=rules.helpers,
        sets=(*rules.sets, known4, *([_known6(scope, now)] if ip6_networks(now) else []), *_unknown(now)),
        chains=(*rules.chains, _sharing(now), _answering(now), _resolving(now)),
        beside=_arp_table(rules.table, known4, now),
    )


def _known4(scope: Scope, now: Active) -> NftSet:
    """The addresses of NICs, and of gateways, those of the operator's routes too."""
    found = {nic.ip for network in now.networks for nic in network.nics.values()}
    found |= {it.gateway for network in now.networks for it in network.ranges} if now.plain else set()
    found |= {network.gateway for network in now.networks if now.plain}
    found |= {it.gateway for it in now.exits}
    found |= {it.via for it in pbr.routes(scope.pbr, now)}
    return NftSet(name="known4", kind="set", type="ipv4_addr", elements=dict.fromkeys(sorted(found - {""}), ""))


def _known6(scope: Scope, now: Active) -> NftSet:
    """The addresses of NICs in networks with IPv6, and of the gateway outside."""
    found = {it for network in ip6_networks(now) for nic in network.nics.values() for it in nic_addresses(nic)}
    out = default_route(scope, now)
    found |= {out.gateway} if out else set()
    return NftSet(name="known6", kind="set", type="ipv6_addr", elements=dict.fromkeys(sorted(found), ""))


def _links(now: Active) -> list[str]:
    public = sorted({names.public_link(it.vlan) for it in now.held})
    return [*(names.guest_link(it.network_id) for it in now.networks), *public]


def _with_ip6(now: Active) -> frozenset[str]:
    """The links with IPv6."""
    networks = ip6_networks(now)
    public = {names.public_link(it.vlan) for it in now.held} if networks else set()
    return frozenset({names.guest_link(it.network_id) for it in networks} | public)


def _set(link: str, family: str) -> str:
    return f"unknown{family}_{link.replace('-', '_')}"


def _unknown(now: Active) -> list[NftSet]:
    with_ip6 = _with_ip6(now)
    return [_unknown_set(it, family) for it in _links(now) for family in ("46" if it in with_ip6 else "4")]


def _unknown_set(link: str, family: str) -> NftSet:
    return NftSet(
        name=_set(link, family),
        kind="set",
        type=f"ipv{family}_addr",
        flags="dynamic,timeout",
        size=UNKNOWN_MAX,
        timeout=_UNKNOWN_TIMEOUT,
    )


def _sharing(now: Active) -> Chain:
    rules: list[str] = []
    for network in now.networks:
        rules += _sources(network, now)  # guard: packet-sources-have-a-bound
    for link in sorted(_with_ip6(now) & {names.public_link(it.vlan) for it in now.held}):
        rules += _solicitations(link)  # guard: solicitations-from-outside-have-a-bound
    return Chain(name="sharing", hook="type filter hook prerouting priority raw; policy accept;", rules=tuple(rules))


def _sources(network: Network, now: Active) -> list[str]:
    """The senders on the segment. Others come through a router, or are dropped later."""
    link = names.guest_link(network.network_id)
    prefixes = [network.cidr, *(plain_network.on_link(network) if now.plain else [])]
    rules = [f'iifname "{link}" ip saddr @known4 accept']
    for prefix in prefixes:
        # A DHCP request gets its answer without a neighbour entry.
        from_here = f'iifname "{link}" ip daddr != 255.255.255.255 ip saddr {prefix}'
        rules += [f"{from_here} update @{_set(link, '4')} {{ ip saddr }} accept", f"{from_here} drop"]
    if network.has_ip6:
        rules.append(f'iifname "{link}" ip6 saddr @known6 accept')
        for prefix in (IP6_LINK_LOCAL, network.ip6_cidr):
            from_here = f'iifname "{link}" ip6 saddr {prefix}'
            rules += [f"{from_here} update @{_set(link, '6')} {{ ip6 saddr }} accept", f"{from_here} drop"]
    return rules


def _solicitations(link: str) -> list[str]:
    """The senders of neighbour solicitations on a public link. The kernel makes entries for any prefix."""
    asked = f'iifname "{link}" icmpv6 type nd-neighbor-solicit'
    return [
        f"{asked} ip6 saddr :: accept",
        f"{asked} ip6 saddr @known6 accept",
        f"{asked} update @{_set(link, '6')} {{ ip6 saddr }} accept",
        f"{asked} drop",
    ]


def _answering(now: Active) -> Chain:
    """The device's own ICMP messages. The types of neighbour discovery go through another socket."""
    rules = []
    for link in _links(now):
        out = f'oifname "{link}"'
        to_unknown = f"{out} meta l4proto icmp rt ip nexthop != @known4"
        rules += [f"{to_unknown} {_LONG4}", f"{to_unknown} {_TO_UNKNOWN}", f"{out} {_ERRORS4} {_ERRORS}"]
        if link in _with_ip6(now):
            to_unknown = f"{out} icmpv6 type {_ICMP6} rt ip6 nexthop != @known6"
            rules += [f"{to_unknown} {_LONG6}", f"{to_unknown} {_TO_UNKNOWN}", f"{out} {_ERRORS6} {_ERRORS}"]
    return Chain(name="answering", hook="type filter hook output priority raw; policy accept;", rules=tuple(rules))


def _resolving(now: Active) -> Chain:
    rules = []
    for link in _links(now):
        out, over_ip6 = f'oifname "{link}"', link in _with_ip6(now)
        rules += [f"{out} ip daddr >= 224.0.0.0 accept", f"{out} rt ip nexthop @known4 accept"]
        if over_ip6:
            rules += [f"{out} ip6 daddr ff00::/8 accept", f"{out} rt ip6 nexthop @known6 accept"]
        rules.append(f"{out} meta nfproto ipv4 update @{_set(link, '4')} {{ rt ip nexthop }} accept")
        if over_ip6:
            rules.append(f"{out} meta nfproto ipv6 update @{_set(link, '6')} {{ rt ip6 nexthop }} accept")
        rules.append(f"{out} drop")  # guard: next-hops-have-a-bound
    return Chain(
        name="resolving", hook="type filter hook postrouting priority srcnat + 20; policy accept;", rules=tuple(rules)
    )


def _arp_table(table: str, known4: NftSet, now: Active) -> Ruleset:
    """Senders of ARP requests for an address of the device; the kernel makes entries for no other ARP messages."""
    own = sorted({it.device_ip for it in now.networks} | {it.address for it in now.held})
    rules = ["arp daddr ip != @own accept", "arp saddr ip @known4 accept", "arp saddr ip 0.0.0.0 accept"]
    for link in _links(now):
        rules += [
            f'iifname "{link}" update @{_set(link, "4")} {{ arp saddr ip }} accept',
            f'iifname "{link}" drop',  # guard: arp-senders-have-a-bound
        ]
    return Ruleset(
        family="arp",
        table=table,
        sets=(
            NftSet(name="own", kind="set", type="ipv4_addr", elements=dict.fromkeys(own, "")),
            known4,
            *(_unknown_set(link, "4") for link in _links(now)),
        ),
        chains=(
            Chain(name="asking", hook="type filter hook input priority filter; policy accept;", rules=tuple(rules)),
        ),
    )
