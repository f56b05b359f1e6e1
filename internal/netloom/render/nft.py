"""The nftables table ``inet netloom`` of a scope's namespace.

README.md beside this file shows the chains in the order in which a packet meets them. This text explains
the design.

**The device.** The namespace is a router. Its guest links lead to the guests' networks, its public links to the public
VLANs. It holds the scope's public addresses, filters, translates, and serves DHCP, DNS and metadata. Rules recognise a
link by its name (``names.guest_link``, ``names.public_link``). The base chains for received and forwarded packets drop
by policy, so each packet needs a rule that accepts it.

**The firewall comes before DNAT.** CloudStack's firewall rules of an isolated network name the public address and the
public port. DNAT replaces both by the guest's address and port. So the rules of a public address are applied in
prerouting at priority mangle (-150), before DNAT (-100) and after connection tracking (-200): the chain ``arriving``
looks up the destination in the map ``@held``, which leads to the chain ``at_<address>``. This applies to guests as
well, because a guest may contact a public address of its own scope. The access control lists of a VPC are different.
They name the guest's own port, so they are applied in ``through``, after DNAT.

**Only the first packet of a connection is checked.** Conntrack recognises the others, and "established" accepts them
early. A change of the rules would therefore leave open connections alone. ``flows`` computes which of them the new
state forbids, and the agent deletes their conntrack entries. That ends a TCP connection (``lost``). The next packet of
a UDP flow would open it again, so such an entry stays and gets the mark ``REVOKED``. The first rule for received
packets, and the first rule for the device's own packets, drop the packets of marked connections.

**Marks select the exit.** A scope may have addresses on several public VLANs. An exit is a public VLAN with its
gateway, and a reply must leave through the exit where its request came in: another provider would drop the source
address. ``at_<address>`` stores the number of the exit in the mark of the connection. ``choose_exit`` (packets of
guests) and ``from_device`` (the device's own packets) copy it to the mark of the packet, and a routing rule per exit
selects the route table by this mark. Connections of a guest with static NAT use the exit of their public address
(``@static_exits``). Other connections of guests have no number and take the main table's default route, or a route of
the operator (``pbr``) if the bit ``POLICY`` is set. ``translate_from`` then chooses a source address of the same exit.

**Packets pass while the table is replaced.** The agent loads a new ruleset in one transaction (``ruleset.swap``). The
chains that differ are written again; base chains, named maps and counters stay, and only changed elements of maps are
written. Three conventions keep this safe at every instant:

* No rule accepts or translates a packet because a lookup misses. So ``arriving`` drops packets to each held address by
  name after the lookup in ``@held``, before it accepts packets of guests.
* Rules contain comparisons and sets of exact values (``prefixes``). Interval sets and anonymous maps can miss a lookup
  while they are replaced. Named interval maps are safe, because they keep their elements.
* Chains of addresses end with an explicit ``drop``.

**One UDP problem needs source ports.** A UDP port forward on the source NAT address leads from a public port to a
guest. If another guest's flow left with the same source port, it would take over the remote end's conversation. So
flows of guests that use such a port are translated to other ports (``_source_ports``).
"""

from __future__ import annotations

from collections.abc import Iterable

from netloom import names
from netloom.render import connections, helpers, ip6, lost, plain_network, senders, share
from netloom.render.acl import egress_lines, ingress_lines, lines_to_port
from netloom.render.active import Active, active, target_port
from netloom.render.device import (
    DHCP_REQUEST,
    FROM_GUESTS_TO_DEVICE,
    GUEST_LINKS,
    PUBLIC_LINKS,
    device_services,
    guest_link,
    refusals,
)
from netloom.render.firewall import verdicts
from netloom.render.marks import EXIT_MASK, POLICY, REVOKED
from netloom.render.pbr import PolicyNat, policy_nats
from netloom.render.prefixes import by_length, is_not_in
from netloom.render.ruleset import Chain, NftSet, Ruleset
from netloom.render.source_ports import forwarded_udp, free_ports, keeps_port
from netloom.state import LbRule, Network, PublicIp, Scope

FAMILY, TABLE = "inet", "netloom"

_FORWARDED_PROTOCOLS = ("tcp", "udp")
_REVOKED = f"ct mark & {REVOKED:#010x} != 0 drop"


def ruleset(scope: Scope) -> Ruleset:
    """The table for ``scope``. Without an active network it forwards no packet."""
    now = active(scope)
    rules = plain_network.ruleset(now.networks[0], FAMILY, TABLE) if now.plain else _routed(scope, now)
    return connections.shared(share.shared(rules, scope, now), now, scope.connections_max)


def _routed(scope: Scope, now: Active) -> Ruleset:
    address_chains = [_public_address(it, now, open_to_all=scope.ingress_open) for it in now.held]
    egress_chains = [_egress(it) for it in now.networks]
    acl_chains = [_acl_chains(it, now) for it in now.networks if it.network_id in now.acls]
    counted = counters(now)
    nats = policy_nats(scope.pbr, now)
    return Ruleset(
        family=FAMILY,
        table=TABLE,
        counters=tuple(name for pair in counted.values() for name in pair),
        helpers=helpers.objects(scope.helpers),
        sets=(
            _map(
                "held",
                "ipv4_addr : verdict",
                {
                    it.address: f"goto {_chain_of(it)}"
                    for it in now.held  # guard: every-held-address-has-its-firewall
                },
            ),
            _map("counted_in", "ipv4_addr : counter", {it.address: f'"{counted[it.address][0]}"' for it in now.held}),
            _map("counted_out", "ipv4_addr : counter", {it.address: f'"{counted[it.address][1]}"' for it in now.held}),
            *_translations(now),
            *_source_ports(now),
            *_second_nics(now),
            *helpers.opened_ports(now, scope.helpers),
            _balanced(now, in_vpc=scope.is_vpc),
            *(it for network in now.networks for it in senders.sets(network)),
            *lost.sets(now, nats),
        ),
        chains=(
            _arriving(now, scope.helpers),
            *ip6.arriving(now, scope.helpers, from_outside=scope.is_vpc or scope.ingress_open),
            _translate_to(now),
            _choose_exit(now, by_policy=bool(scope.pbr.rules)),
            _to_vpc_device(now) if scope.is_vpc else _to_device(now),
            _through(now, helpers.related(scope.helpers), open_to_all=scope.ingress_open),
            _translate_from(now, nats),
            _leaving(now),
            _from_device(now),
            senders.resets(now.networks),  # guard: a-reset-connection-to-the-resolver-counts
            *lost.chains(now, _outside(now.guest_cidrs)),
            *(chain for chains in address_chains + egress_chains + acl_chains for chain in chains),
        ),
    )


def counters(now: Active) -> dict[str, tuple[str, str]]:
    """The names of the two counters of each public address and IPv6 prefix.

    The first counts packets to it from outside, including those that the firewall drops. The second counts packets that
    leave with it as their source.
    """
    addresses = {it.address: (f"in_{it.address}", f"out_{it.address}") for it in now.held}
    return addresses | {it.ip6_cidr: ip6.counters(it) for it in ip6.ip6_networks(now)}


def _arriving(now: Active, used: tuple[str, ...]) -> Chain:
    """Every packet that enters the device: check the source address, the connection, and the firewall.

    ``used``: the conntrack helpers in use.
    """
    over_ip6 = f"goto {ip6.CHAIN}" if ip6.ip6_networks(now) else "drop"
    rules = [_REVOKED, 'iifname "lo" accept', f"meta nfproto ipv6 {over_ip6}"]
    rules.append(f"iifname {PUBLIC_LINKS} counter name ip daddr map @counted_in")
    for network in now.networks:
        link = guest_link(network)
        rules += [
            f"iifname {link} {DHCP_REQUEST}",
            f"iifname {link} ip saddr != {network.cidr} drop",
            f"iifname {PUBLIC_LINKS} ip saddr {network.cidr} drop",
        ]
    rules += ["ct state established accept", *helpers.related(used), *lost.arriving()]
    rules += helpers.assignment(used)  # guard: a-helper-is-assigned-before-dnat
    rules.append("ip daddr vmap @held")
    # Drop for each address: if the lookup missed, a guest's packet would pass without the firewall of the address.
    rules += [f"ip daddr {it.address} drop" for it in now.held]
    rules += [f"iifname {guest_link(it)} accept" for it in now.networks]
    return Chain(
        name="arriving",
        hook="type filter hook prerouting priority mangle; policy drop;",
        rules=(
            *rules,
            "drop",  # guard: only-translated-packets-come-in
        ),
    )


def _public_address(address: PublicIp, now: Active, *, open_to_all: bool) -> list[Chain]:
    """The firewall of one public address, for outside hosts and guests alike. It is applied before DNAT."""
    name = _chain_of(address)
    # Only connections from outside use the exit of the address. A guest's connection to another guest uses none.
    bind = f"iifname {PUBLIC_LINKS} ct mark set {address.exit:#010x}"  # guard: a-flow-is-bound-to-its-exit
    if open_to_all or address.address not in now.ingress:
        return [Chain(name=name, rules=(bind, "accept"))]
    lines, chains = verdicts(now.ingress[address.address], "accept", name)
    rules = (
        bind,
        *lines,
        "drop",  # guard: an-address-is-closed-but-for-its-rules
    )
    return [Chain(name=name, rules=rules), *chains]


def _translations(now: Active) -> tuple[NftSet, ...]:
    """The maps for port forwards and static NAT.

    Each protocol has its own maps: nft 0.9.8 accepts no map with three fields in its keys and two in its values.
    """
    exact: dict[str, dict[str, str]] = {it: {} for it in _FORWARDED_PROTOCOLS}
    ranges: dict[str, dict[str, str]] = {it: {} for it in _FORWARDED_PROTOCOLS}
    to_one: dict[str, dict[str, str]] = {it: {} for it in _FORWARDED_PROTOCOLS}
    for part in now.forwarded:
        forward, first, last = part.forward, part.ports.first, part.ports.last
        where, protocol = forward.public_ip, forward.protocol
        if first == last:
            exact[protocol][f"{where} . {first}"] = f"{forward.private_ip} . {target_port(forward, first)}"
        elif target_port(forward, first) == target_port(forward, last):
            to_one[protocol][f"{where} . {first}-{last}"] = f"{forward.private_ip} . {target_port(forward, first)}"
        elif target_port(forward, first) == first:
            ranges[protocol][f"{where} . {first}-{last}"] = forward.private_ip
        else:
            # Each port has its own element: DNAT to a range does not keep the offset (tried with nft and iptables).
            for port in range(first, last + 1):
                exact[protocol][f"{where} . {port}"] = f"{forward.private_ip} . {target_port(forward, port)}"
    key = "ipv4_addr . inet_service"
    by_protocol = (
        (
            _map(f"forwards_{it}", f"{key} : ipv4_addr . inet_service", exact[it]),
            _map(f"forwards_same_port_{it}", f"{key} : ipv4_addr", ranges[it], "interval"),
            _map(f"forwards_to_one_port_{it}", f"{key} : ipv4_addr . inet_service", to_one[it], "interval"),
        )
        for it in _FORWARDED_PROTOCOLS
    )
    return (
        *(each for maps in by_protocol for each in maps),
        _map("static_guests", "ipv4_addr : ipv4_addr", {it.public_ip: it.private_ip for it in now.static_nats}),
        _map("static_sources", "ipv4_addr : ipv4_addr", {ip: it.address for ip, it in now.static_sources.items()}),
        _map("static_exits", "ipv4_addr : mark", {ip: f"{it.exit:#010x}" for ip, it in now.static_sources.items()}),
    )


def _source_ports(now: Active) -> tuple[NftSet, ...]:
    """The UDP ports of the source NAT address that are forwarded, and the guests' ports with the same number.

    No other guest may use such a port as its source port outside. Otherwise, after the forward has moved to another
    guest, the next datagram of the old guest would take over the new guest's remote end.

    Single ports and ranges have their own sets: nft lists all elements of an interval set before it adds one.
    """
    forwarded: tuple[dict[str, str], dict[str, str]] = {}, {}
    own: tuple[dict[str, str], dict[str, str]] = {}, {}
    for part in forwarded_udp(now):
        first, last, guest = part.ports.first, part.ports.last, part.forward.private_ip
        is_range = first != last
        text = f"{first}-{last}" if is_range else f"{first}"
        forwarded[is_range][text] = ""
        if keeps_port(part, first):
            kept = text if not is_range or keeps_port(part, last) else f"{first}"
            own[is_range][f"{guest} . {kept}"] = ""
    return tuple(
        NftSet(name=name + suffix, kind="set", type=type_, flags=flags, elements=elements[is_range])
        for name, type_, elements in (
            ("forwarded_udp", "inet_service", forwarded),
            ("forwarded_udp_own", "ipv4_addr . inet_service", own),
        )
        for is_range, (suffix, flags) in enumerate((("", ""), ("_ranges", "interval")))
    )


def _second_nics(now: Active) -> tuple[NftSet, ...]:
    """The guests that see the device's address instead of the client's, for all clients and by the client's network."""
    type_ = "ipv4_addr : ipv4_addr"
    by_network = sorted(now.device_for_network.items())
    return (
        _map("second_nics", type_, now.device_for_all),
        *(_map(_second_nics_map(network_id), type_, guests) for network_id, guests in by_network),
    )


def _to_second_nics(now: Active) -> list[str]:
    """The source translation for these guests; see ``second_nics``."""
    return [
        "snat ip to ip daddr map @second_nics",  # guard: a-second-nic-answers-the-device
        *(
            f"ip saddr {it.cidr} snat ip to ip daddr map @{_second_nics_map(it.network_id)}"
            for it in now.networks  # guard: a-vm-in-two-tiers-answers-the-device
            if it.network_id in now.device_for_network
        ),
    ]


def _translate_to(now: Active) -> Chain:
    return Chain(
        name="translate_to",
        hook="type nat hook prerouting priority dstnat; policy accept;",
        rules=(
            *(rule for it in _FORWARDED_PROTOCOLS for rule in _to_forwarded(it)),
            *(line for rule in now.udp_balanced for line in _spread(rule)),
            "dnat ip to ip daddr map @static_guests",
        ),
    )


def _to_forwarded(protocol: str) -> tuple[str, ...]:
    # nft 0.9.8 demands "addr . port" where the values of a map have two fields.
    key = f"ip daddr . {protocol} dport"
    return (
        f"dnat ip addr . port to {key} map @forwards_{protocol}",  # guard: two-values-are-named-in-the-rule
        f"dnat ip to {key} map @forwards_same_port_{protocol}",
        f"dnat ip addr . port to {key} map @forwards_to_one_port_{protocol}",
    )


def _spread(rule: LbRule) -> list[str]:
    """The DNAT rules that distribute the flows of a UDP rule over its backends.

    Round robin: the first backend takes one flow in n, the second one in n - 1 of the others, and so on. This needs no
    anonymous map, which could miss a lookup while the rules are replaced. By source address: each backend has its part
    of the hash. The seed is fixed, because the kernel would otherwise draw another one at each load.
    """
    lines = []
    count = len(rule.backends)
    for index, backend in enumerate(rule.backends):
        left = count - index
        if left == 1:
            chosen = ""
        elif rule.algorithm == "source":
            chosen = f"jhash ip saddr mod {count} seed 0x1 {index} "
        else:
            chosen = f"numgen inc mod {left} 0 "
        lines.append(
            f"ip daddr {rule.public_ip} udp dport {rule.public_port} {chosen}dnat ip to {backend.ip}:{backend.port}"
        )
    return lines


def _choose_exit(now: Active, *, by_policy: bool) -> Chain:
    """After DNAT, before routing: packets of guests to the outside get the exit of their connection as their mark.

    ``by_policy``: the operator's rules apply to connections that guests opened.
    """
    outward = f"iifname {GUEST_LINKS} {_outside(now.guest_cidrs)}"
    policy = f"{outward} ct direction original meta mark set meta mark | {POLICY:#010x}"  # guard: replies-ask-no-policy
    return Chain(
        name="choose_exit",
        hook="type filter hook prerouting priority dstnat + 10; policy accept;",
        rules=(
            # Only the first packet: a flow without a reply is still "new" when its guest gets a static NAT address.
            f"{outward} ct status & confirmed == 0 ct mark set ip saddr map @static_exits",
            f"{outward} meta mark set ct mark & {EXIT_MASK:#010x}",
            *([policy] if by_policy else []),
        )
        if now.networks
        else (),
    )


def _to_device(now: Active) -> Chain:
    """Packets to the device: its services for guests, and pings and load-balanced ports that a firewall accepted."""
    rules = [
        'iifname "lo" accept',
        *(rule for network in now.networks for rule in senders.guards(network)),
        "ct state established accept",
        lost.to_device(),
        helpers.ICMP_ERRORS,
        # From a guest to the device's address, or to a public address whose chain has accepted the packet.
        "icmp type echo-request fib daddr type local accept",
        "ip daddr . tcp dport @balanced accept",
        *ip6.to_device(now),
    ]
    for network in now.networks:
        rules += device_services(network, ping=False)
        rules += ip6.refusals(network) if network.has_ip6 else ()
    rules += refusals(FROM_GUESTS_TO_DEVICE)
    return Chain(name="to_device", hook="type filter hook input priority filter; policy drop;", rules=tuple(rules))


def _to_vpc_device(now: Active) -> Chain:
    """Packets to the device of a VPC.

    Tiers reach their own gateway whatever their lists say. Public addresses do not reply to pings. Load-balanced
    connections are checked here with the client's own address, before haproxy connects with the device's.
    """
    rules = [
        'iifname "lo" accept',
        *(rule for network in now.networks for rule in senders.guards(network)),
        "ct state established accept",
        lost.to_device(),
        helpers.ICMP_ERRORS,
        *ip6.to_device(now),
    ]
    for network in now.networks:
        rules += [
            *device_services(network, ping=True),
            # Before the lists, which do not apply to the tier's own gateway.
            *refusals(f"iifname {guest_link(network)} ip daddr {network.device_ip}"),
            *(ip6.refusals(network) if network.has_ip6 else ()),
            f"iifname {guest_link(network)} jump {_out_chain(network)}",
        ]
    rules.append("ip daddr . tcp dport vmap @balanced_by_list")  # guard: a-balanced-port-is-judged-by-its-list
    rules += refusals(FROM_GUESTS_TO_DEVICE)
    return Chain(name="to_device", hook="type filter hook input priority filter; policy drop;", rules=tuple(rules))


def _balanced(now: Active, *, in_vpc: bool) -> NftSet:
    """The TCP ports that haproxy serves; in a VPC, each with the chain that applies the list of the backends' tier."""
    if not in_vpc:
        ports = sorted({(rule.public_ip, rule.public_port) for rule in now.haproxy_rules})
        elements = {f"{address} . {port}": "" for address, port in ports}
        return NftSet(name="balanced", kind="set", type="ipv4_addr . inet_service", elements=elements)
    chains = {
        f"{rule.public_ip} . {rule.public_port}": f"goto {_balanced_chain(network, port)}"
        for rule in now.haproxy_rules
        for network, port in now.backend_ports(rule)
    }
    return _map("balanced_by_list", "ipv4_addr . inet_service : verdict", chains)


def _acl_chains(network: Network, now: Active) -> list[Chain]:
    """The chains of a tier's access control list: out, in, and one for each load-balanced port of the tier."""
    acl = now.acls[network.network_id]
    ports = {port for rule in now.haproxy_rules for home, port in now.backend_ports(rule) if home == network}
    return [
        Chain(name=_out_chain(network), rules=tuple(egress_lines(acl))),
        Chain(
            name=_in_chain(network),
            rules=tuple(ingress_lines(acl)),  # guard: a-tier-has-all-lines-of-its-list
        ),
        *(Chain(name=_balanced_chain(network, it), rules=tuple(lines_to_port(acl, it))) for it in sorted(ports)),
    ]


def _through(now: Active, related: list[str], *, open_to_all: bool) -> Chain:
    """Forwarded packets. ``related``: the rules for related connections."""
    rules = [
        # In both directions, and in replies: the smaller of the two routes' MTUs.
        "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu",
        "ct state established accept",
        *related,
    ]
    tiers = [network for network in now.networks if network.network_id in now.acls]
    # Between tiers both lists apply: first the list of the source tier, then the list of the destination tier.
    rules += [
        f"iifname {guest_link(it)} jump {_out_chain(it)}" for it in tiers
    ]  # guard: the-source-tiers-list-is-asked
    for network in now.networks:
        link = guest_link(network)
        if network in tiers:
            rules += [
                f"iifname {PUBLIC_LINKS} oifname {link} ct status dnat goto {_in_chain(network)}",
                f"iifname {GUEST_LINKS} oifname {link} goto {_in_chain(network)}",
                *(
                    [
                        f"iifname {PUBLIC_LINKS} oifname {link} meta nfproto ipv6 goto {_in_chain(network)}"
                    ]  # guard: a-tiers-list-is-asked-about-ipv6
                    if network.has_ip6
                    else []
                ),
            ]
        else:
            rules += [
                f"iifname {PUBLIC_LINKS} oifname {link} ct status dnat accept",
                f"iifname {link} oifname {link} ct status dnat accept",
            ]
            if open_to_all and network.has_ip6:
                rules.append(f"iifname {PUBLIC_LINKS} oifname {link} meta nfproto ipv6 accept")
        rules.append(f"iifname {link} oifname {PUBLIC_LINKS} goto {_egress_chain(network)}")
    return Chain(
        name="through",
        hook="type filter hook forward priority filter; policy drop;",  # guard: nothing-is-forwarded-without-a-rule
        rules=tuple(rules),
    )


def _egress(network: Network) -> list[Chain]:
    """Connections of guests to the outside. All are allowed until CloudStack sends firewall rules and a default."""
    name, firewall = _egress_chain(network), network.firewall
    if firewall is None:
        return [Chain(name=name, rules=("accept",))]
    default, listed = ("accept", "drop") if firewall.default_egress_allow else ("drop", "accept")
    lines, chains = verdicts(
        firewall.egress,
        listed,
        name,
        ip6=network.has_ip6,  # guard: egress-rules-are-about-ipv6-too
    )
    return [Chain(name=name, rules=(*lines, default)), *chains]


def _translate_from(now: Active, nats: tuple[PolicyNat, ...]) -> Chain:
    """Source translation: hairpin, second NICs, the operator's routes, static NAT, source NAT.

    The first match decides.
    """
    rules = [
        # Hairpin: without this the guest would reply directly to its neighbour, from an address that is not expected.
        f"oifname {guest_link(it)} ip saddr {it.cidr} ct status dnat snat ip to {it.device_ip}"
        for it in now.networks  # guard: hairpin-comes-from-the-device
    ]
    rules += _to_second_nics(now)
    rules += [line for nat in nats for line in _policy_source_nat(nat, now)]  # guard: a-chosen-exit-has-its-source
    rules.append(f"oifname {PUBLIC_LINKS} snat ip to ip saddr map @static_sources")  # guard: static-nat-sets-the-source
    if now.source_nat is not None:
        free = free_ports([it.ports for it in forwarded_udp(now)])
        static = f" ip saddr != {_one_of(sorted(now.static_sources))}" if now.static_sources else ""
        for network in now.networks:
            guests = f"oifname {PUBLIC_LINKS} ip saddr {network.cidr}{static}"
            if free is not None:
                for kind in ("", "_ranges"):
                    taken = f"udp sport @forwarded_udp{kind} ip saddr . udp sport != @forwarded_udp_own{kind}"
                    rules.append(f"{guests} {taken} snat ip to {now.source_nat.address}:{free}")
            rules.append(f"{guests} snat ip to {now.source_nat.address}")
    return Chain(
        name="translate_from",
        hook="type nat hook postrouting priority srcnat; policy accept;",
        rules=tuple(rules),
    )


def _policy_source_nat(nat: PolicyNat, now: Active) -> list[str]:
    """Packets on an operator's route leave with an address of that exit; the provider drops other addresses."""
    route = f'oifname "{nat.link}"'
    if nat.via or nat.destination:
        route += f" rt ip nexthop {nat.via}" if nat.via else f" ip daddr {nat.destination}"
    of_other_exits = sorted(guest for guest, own in now.static_sources.items() if own.exit != nat.address.exit)
    of_this_exit = sorted(now.static_sources.keys() - set(of_other_exits))
    if nat.address.source_nat:
        # All other guests get this address, or their own on this exit, by the rules for static NAT and source NAT.
        guests = [f"ip saddr {_one_of(of_other_exits)}"] if of_other_exits else []
    else:
        without = f" ip saddr != {_one_of(of_this_exit)}" if of_this_exit else ""
        guests = [f"ip saddr {network.cidr}{without}" for network in now.networks]
    address = nat.address.address
    forwarded = [it.ports for it in now.forwarded if (it.forward.public_ip, it.forward.protocol) == (address, "udp")]
    free = free_ports(forwarded) if forwarded else None
    return [
        line
        for sources in guests
        for line in (
            *([f"{route} {sources} meta l4proto udp snat ip to {address}:{free}"] if free is not None else []),
            f"{route} {sources} snat ip to {address}",
        )
    ]


def _leaving(now: Active) -> Chain:
    """After source translation: a packet leaves a public link only with a source address that is held on this link."""
    on_link: dict[str, list[str]] = {}
    for it in now.held:
        on_link.setdefault(it.vlan, []).append(it.address)
    rules = [
        f'oifname "{names.public_link(vlan)}" ip saddr != {_one_of(addresses)} drop'  # guard: only-held-addresses-leave
        for vlan, addresses in sorted(on_link.items())
    ]
    return Chain(
        name="leaving",
        hook="type filter hook postrouting priority srcnat + 10; policy accept;",
        rules=(*rules, f"oifname {PUBLIC_LINKS} counter name ip saddr map @counted_out", *ip6.leaving(now)),
    )


def _from_device(now: Active) -> Chain:
    """The device's own packets.

    A changed mark makes the kernel route them again, so replies leave through the exit where the request came in.
    """
    rules = [_REVOKED, lost.from_device()]
    if now.networks:
        outward = _outside(now.guest_cidrs)
        rules.append(f"{outward} ct mark & {EXIT_MASK:#010x} != 0 meta mark set ct mark & {EXIT_MASK:#010x}")
    return Chain(name="from_device", hook="type route hook output priority mangle; policy accept;", rules=tuple(rules))


def _chain_of(address: PublicIp) -> str:
    return f"at_{address.address}"


def _egress_chain(network: Network) -> str:
    return f"egress_{network.network_id}"


def _out_chain(network: Network) -> str:
    return f"acl_out_{network.network_id}"


def _in_chain(network: Network) -> str:
    return f"acl_in_{network.network_id}"


def _second_nics_map(network_id: str) -> str:
    return f"second_nics_{network_id}"


def _balanced_chain(network: Network, port: int) -> str:
    return f"acl_in_{network.network_id}_to_{port}"


def _map(name: str, type_: str, elements: dict[str, str], flags: str = "") -> NftSet:
    return NftSet(name=name, kind="map", type=type_, flags=flags, elements=elements)


def _one_of(values: Iterable[str]) -> str:
    listed = list(values)
    return listed[0] if len(listed) == 1 else f"{{ {', '.join(listed)} }}"


def _outside(cidrs: Iterable[str]) -> str:
    """The expression for packets to an address in none of these subnets."""
    return " ".join(is_not_in("daddr", group) for group in by_length(cidrs).values())
