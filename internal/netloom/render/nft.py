"""The nftables table of a scope's namespace: firewall before DNAT, translations in maps, and drop as the default.

Rules of thumb that this page keeps, because a packet may be under way while the table is swapped:

* no verdict that accepts, and no translation, depends on a look-up *missing*;
* maps are named, and their elements live through a swap; what stands in a rule is a set of exact values, for
  interval sets and the maps of exchanged rules miss what is in them for an instant (``firewall``);
* base chains drop by policy, and chains of addresses end with an explicit drop.

Links are told apart by their names (``names.guest_link``, ``names.public_link``). Chain names are no keywords of nft.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from netloom import names
from netloom.render import ip6, plain_network
from netloom.render.acl import egress_lines, ingress_lines, lines_to_port
from netloom.render.active import Active, ForwardedPorts, active, subnet, target_port
from netloom.render.firewall import verdicts
from netloom.render.marks import EXIT_MASK, POLICY, REVOKED
from netloom.render.pbr import PolicyNat, policy_nats
from netloom.render.ruleset import Chain, NftSet, Ruleset
from netloom.state import LbRule, Network, Ports, PublicIp, Scope

FAMILY, TABLE = "inet", "netloom"

_PUBLIC = '"' + names.public_link("*") + '"'
_GUEST = '"' + names.guest_link("*") + '"'
_REVOKED = f"ct mark & {REVOKED:#010x} != 0 drop"
_DHCP_REQUEST = "ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept"


def ruleset(scope: Scope) -> Ruleset:
    """The table for ``scope``; without a standing network it lets nothing through."""
    now = active(scope)
    if now.plain:
        return plain_network.ruleset(now.networks[0], FAMILY, TABLE)
    addresses = [_public_address(it, now, open_to_all=scope.ingress_open) for it in now.held]
    egress = [_egress(it) for it in now.networks]
    lists = [_lists(it, now) for it in now.networks if it.network_id in now.acls]
    counted = counters(now)
    return Ruleset(
        family=FAMILY,
        table=TABLE,
        counters=tuple(name for pair in counted.values() for name in pair),
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
            _balanced(now, in_vpc=scope.is_vpc),
        ),
        chains=(
            _arriving(now),
            *ip6.arriving(now, from_outside=scope.is_vpc or scope.ingress_open),
            _translate_to(now),
            _choose_exit(now, by_policy=bool(scope.pbr.rules)),
            _to_tiers_device(now) if scope.is_vpc else _to_device(now),
            _through(now, open_to_all=scope.ingress_open),
            _translate_from(now, policy_nats(scope.pbr, now)),
            _leaving(now),
            _from_device(now),
            *(it for chains in addresses + egress + lists for it in chains),
        ),
    )


def counters(now: Active) -> dict[str, tuple[str, str]]:
    """Public addresses and IPv6 prefixes, each with its two counters.

    The first counts what arrived for it from outside, whatever the firewall said of it; the second what left under it.
    """
    addresses = {it.address: (f"in_{it.address}", f"out_{it.address}") for it in now.held}
    return addresses | {it.ip6_cidr: ip6.counters(it) for it in ip6.ip6_networks(now)}


def _arriving(now: Active) -> Chain:
    """Every packet from outside: who it claims to be, whether its connection is known, what it is allowed to begin."""
    over_ip6 = f"goto {ip6.CHAIN}" if ip6.ip6_networks(now) else "drop"
    rules = [_REVOKED, 'iifname "lo" accept', f"meta nfproto ipv6 {over_ip6}"]
    rules.append(f"iifname {_PUBLIC} counter name ip daddr map @counted_in")
    for it in now.networks:
        link = _link(it)
        rules += [
            f"iifname {link} ip saddr 0.0.0.0 {_DHCP_REQUEST}",
            f"iifname {link} ip saddr != {it.cidr} drop",
            f"iifname {_PUBLIC} ip saddr {it.cidr} drop",
        ]
    rules += ["ct state established,related accept", "ct state invalid drop", "ip daddr vmap @held"]
    # The addresses once more, one by one: a guest's packet to one of them must have met that address's chain.
    rules += [f"ip daddr {it.address} drop" for it in now.held]
    rules += [f"iifname {_link(it)} accept" for it in now.networks]
    return Chain(
        name="arriving",
        hook="type filter hook prerouting priority mangle; policy drop;",
        rules=(
            *rules,
            "drop",  # guard: only-translated-packets-come-in
        ),
    )


def _public_address(address: PublicIp, now: Active, *, open_to_all: bool) -> list[Chain]:
    """The firewall of one public address, judged before translation, for strangers and for guests alike."""
    name = _chain_of(address)
    # Only what comes in from outside is bound to the exit; a guest's way to a neighbour is not.
    bind = f"iifname {_PUBLIC} ct mark set {address.exit:#010x}"  # guard: a-flow-is-bound-to-its-exit
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
    exact: dict[str, str] = {}
    ranges: dict[str, str] = {}
    to_one: dict[str, str] = {}
    for it in now.forwarded:
        forward, first, last = it.forward, it.ports.first, it.ports.last
        where = f"{forward.public_ip} . {forward.protocol}"
        if first == last:
            exact[f"{where} . {first}"] = f"{forward.private_ip} . {target_port(forward, first)}"
        elif target_port(forward, first) == target_port(forward, last):
            to_one[f"{where} . {first}-{last}"] = f"{forward.private_ip} . {target_port(forward, first)}"
        elif target_port(forward, first) == first:
            ranges[f"{where} . {first}-{last}"] = forward.private_ip
        else:
            # A translation to a range of ports does not keep the offset (tried, nft and iptables): one by one.
            for port in range(first, last + 1):
                exact[f"{where} . {port}"] = f"{forward.private_ip} . {target_port(forward, port)}"
    service = "ipv4_addr . inet_proto . inet_service"
    return (
        _map("forwards", f"{service} : ipv4_addr . inet_service", exact),
        _map("forwards_same_port", f"{service} : ipv4_addr", ranges, "interval"),
        _map("forwards_to_one_port", f"{service} : ipv4_addr . inet_service", to_one, "interval"),
        _map("static_guests", "ipv4_addr : ipv4_addr", {it.public_ip: it.private_ip for it in now.static_nats}),
        _map("static_sources", "ipv4_addr : ipv4_addr", {ip: it.address for ip, it in now.static_sources.items()}),
        _map("static_exits", "ipv4_addr : mark", {ip: f"{it.exit:#010x}" for ip, it in now.static_sources.items()}),
    )


def _source_ports(now: Active) -> tuple[NftSet, ...]:
    """UDP ports of the source-NAT address that lead inward, and the guests' own ports that they lead to unchanged.

    No other guest may leave with such a port: after a forward moved, the old guest's next datagram would take the new
    one's client over.
    """
    forwarded: dict[str, str] = {}
    own: dict[str, str] = {}
    for it in _forwarded_udp(now):
        forwarded[str(it.ports)] = ""
        if target_port(it.forward, it.ports.first) == it.ports.first:
            last = max(at for at in (it.ports.first, it.ports.last) if target_port(it.forward, at) == at)
            own[f"{it.forward.private_ip} . {Ports(it.ports.first, last)}"] = ""
    return (
        NftSet(name="forwarded_udp", kind="set", type="inet_service", flags="interval", elements=forwarded),
        NftSet(name="forwarded_udp_own", kind="set", type="ipv4_addr . inet_service", flags="interval", elements=own),
    )


def _forwarded_udp(now: Active) -> list[ForwardedPorts]:
    if now.source_nat is None:
        return []
    address = now.source_nat.address
    return [it for it in now.forwarded if it.forward.public_ip == address and it.forward.protocol == "udp"]


def _free_ports(taken: list[Ports]) -> Ports | None:
    """Source ports that lead nowhere: a fixed block where one is free, so that forwards seldom change the rule."""
    for block in (Ports(49152, 65535), Ports(32768, 49151), Ports(16384, 32767), Ports(1024, 16383)):
        if all(it.last < block.first or it.first > block.last for it in taken):
            return block
    gaps = [Ports(a.last + 1, b.first - 1) for a, b in pairwise([Ports(0, 1023), *sorted(taken), Ports(65536, 65536)])]
    widest = max(gaps, key=lambda it: it.count)
    return widest if widest.count > 0 else None


def _translate_to(now: Active) -> Chain:
    service = "meta l4proto { tcp, udp } dnat ip to ip daddr . meta l4proto . th dport map"
    return Chain(
        name="translate_to",
        hook="type nat hook prerouting priority dstnat; policy accept;",
        rules=(
            f"{service} @forwards",
            f"{service} @forwards_same_port",
            f"{service} @forwards_to_one_port",
            *(line for rule in now.udp_balanced for line in _spread(rule)),
            "dnat ip to ip daddr map @static_guests",
        ),
    )


def _spread(rule: LbRule) -> list[str]:
    """A UDP rule's flows over its backends: the first takes one in n, the second one in n - 1 of the others, and so on.

    That is round robin without a map, which an exchanged rule would miss for an instant. By source address each has
    its own part of the hash, with a seed of ours: without one the kernel draws another at every load.
    """
    lines = []
    count = len(rule.backends)
    for index, it in enumerate(rule.backends):
        left = count - index
        if left == 1:
            chosen = ""
        elif rule.algorithm == "source":
            chosen = f"jhash ip saddr mod {count} seed 0x1 {index} "
        else:
            chosen = f"numgen inc mod {left} 0 "
        lines.append(f"ip daddr {rule.public_ip} udp dport {rule.public_port} {chosen}dnat ip to {it.ip}:{it.port}")
    return lines


def _choose_exit(now: Active, *, by_policy: bool) -> Chain:
    """After translation, before routing: what guests send out leaves by the exit of its connection.

    ``by_policy``: of what they began themselves an operator's rules are asked first.
    """
    outward = f"iifname {_GUEST} {_outside(now.guest_cidrs)}"
    policy = f"{outward} ct direction original meta mark set meta mark | {POLICY:#010x}"  # guard: replies-ask-no-policy
    return Chain(
        name="choose_exit",
        hook="type filter hook prerouting priority dstnat + 10; policy accept;",
        rules=(
            # With its first packet only: a flow that nobody answered is still new when its guest gets an address.
            f"{outward} ct status & confirmed == 0 ct mark set ip saddr map @static_exits",
            f"{outward} meta mark set ct mark & {EXIT_MASK:#010x}",
            *([policy] if by_policy else []),
        )
        if now.networks
        else (),
    )


def _to_device(now: Active) -> Chain:
    """The device's own services, for its guests. Of what an address's chain let in: pings and balanced ports."""
    rules = [
        'iifname "lo" accept',
        "ct state established,related accept",
        # Of a guest: the device's address, or a public one whose chain allowed it.
        "icmp type echo-request fib daddr type local accept",
        "ip daddr . tcp dport @balanced accept",
        *ip6.to_device(now),
    ]
    for it in now.networks:
        device = f"iifname {_link(it)} ip daddr {it.device_ip}"
        rules += [
            f"iifname {_link(it)} {_DHCP_REQUEST}",
            f"{device} udp dport {{ 53, 67 }} accept",
            f"{device} tcp dport {{ 53, 80, 8080 }} accept",
        ]
    return Chain(name="to_device", hook="type filter hook input priority filter; policy drop;", rules=tuple(rules))


def _to_tiers_device(now: Active) -> Chain:
    """The same in a VPC: tiers reach their own gateway, whatever their lists say, and no public address is pinged.

    What is balanced is judged by the client's own address here, before haproxy hands it on under the device's.
    """
    rules = ['iifname "lo" accept', "ct state established,related accept", *ip6.to_device(now)]
    for it in now.networks:
        device = f"iifname {_link(it)} ip daddr {it.device_ip}"
        rules += [
            f"iifname {_link(it)} {_DHCP_REQUEST}",
            f"{device} icmp type echo-request accept",
            f"{device} udp dport {{ 53, 67 }} accept",
            f"{device} tcp dport {{ 53, 80, 8080 }} accept",
            f"iifname {_link(it)} jump {_out_chain(it)}",
        ]
    rules.append("ip daddr . tcp dport vmap @balanced_by_list")  # guard: a-balanced-port-is-judged-by-its-list
    return Chain(name="to_device", hook="type filter hook input priority filter; policy drop;", rules=tuple(rules))


def _balanced(now: Active, *, in_vpc: bool) -> NftSet:
    """The TCP ports that the load balancer answers; in a VPC with the chain that judges whoever asks there."""
    if not in_vpc:
        elements = {f"{address} . {port}": "" for address, port in sorted(now.haproxy_ports)}
        return NftSet(name="balanced", kind="set", type="ipv4_addr . inet_service", elements=elements)
    judges = {
        f"{rule.public_ip} . {rule.public_port}": f"goto {_balanced_chain(home, port)}"
        for rule in now.balanced
        if rule.protocol != "udp"
        for home, port in now.backend_ports(rule)
    }
    return _map("balanced_by_list", "ipv4_addr . inet_service : verdict", judges)


def _lists(network: Network, now: Active) -> list[Chain]:
    """A tier's access control list, both ways, and what it says of each port that is balanced into the tier."""
    acl = now.acls[network.network_id]
    ports = {
        port
        for rule in now.balanced
        if rule.protocol != "udp"
        for home, port in now.backend_ports(rule)
        if home == network
    }
    return [
        Chain(name=_out_chain(network), rules=tuple(egress_lines(acl))),
        Chain(
            name=_in_chain(network),
            rules=tuple(ingress_lines(acl)),  # guard: a-tier-has-all-lines-of-its-list
        ),
        *(Chain(name=_balanced_chain(network, it), rules=tuple(lines_to_port(acl, it))) for it in sorted(ports)),
    ]


def _through(now: Active, *, open_to_all: bool) -> Chain:
    rules = [
        # Both ways, and also for what is answered: the smaller of the two routes' MTUs.
        "tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu",
        "ct state established,related accept",
    ]
    tiers = [it for it in now.networks if it.network_id in now.acls]
    # Between tiers both lists are asked: first what the one lets out, then what the other lets in.
    rules += [f"iifname {_link(it)} jump {_out_chain(it)}" for it in tiers]  # guard: the-source-tiers-list-is-asked
    for it in now.networks:
        link = _link(it)
        if it in tiers:
            rules += [
                f"iifname {_PUBLIC} oifname {link} ct status dnat goto {_in_chain(it)}",
                f"iifname {_GUEST} oifname {link} goto {_in_chain(it)}",
                *(
                    [
                        f"iifname {_PUBLIC} oifname {link} meta nfproto ipv6 goto {_in_chain(it)}"
                    ]  # guard: a-tiers-list-is-asked-about-ipv6
                    if it.has_ip6
                    else []
                ),
            ]
        else:
            rules += [
                f"iifname {_PUBLIC} oifname {link} ct status dnat accept",
                f"iifname {link} oifname {link} ct status dnat accept",
            ]
            if open_to_all and it.has_ip6:
                rules.append(f"iifname {_PUBLIC} oifname {link} meta nfproto ipv6 accept")
        rules.append(f"iifname {link} oifname {_PUBLIC} goto {_egress_chain(it)}")
    return Chain(
        name="through",
        hook="type filter hook forward priority filter; policy drop;",  # guard: nothing-is-forwarded-without-a-rule
        rules=tuple(rules),
    )


def _egress(network: Network) -> list[Chain]:
    """What guests may begin outward. Open before the first firewall list; then the list, then the default."""
    name, firewall = _egress_chain(network), network.firewall
    if firewall is None:
        return [Chain(name=name, rules=("accept",))]
    otherwise, listed = ("accept", "drop") if firewall.default_egress_allow else ("drop", "accept")
    rules = (it for it in firewall.rules if it.direction == "egress")
    lines, chains = verdicts(
        rules,
        listed,
        name,
        ip6=network.has_ip6,  # guard: egress-rules-are-about-ipv6-too
    )
    return [Chain(name=name, rules=(*lines, otherwise)), *chains]


def _translate_from(now: Active, chosen: tuple[PolicyNat, ...]) -> Chain:
    rules = [
        # Hairpin: the guest must answer to us, or it would answer its neighbour directly, from the wrong address.
        f"oifname {_link(it)} ip saddr {it.cidr} ct status dnat snat ip to {it.device_ip}"
        for it in now.networks  # guard: hairpin-comes-from-the-device
    ]
    rules += [line for way in chosen for line in _policy_source_nat(way, now)]  # guard: a-chosen-exit-has-its-source
    rules.append(f"oifname {_PUBLIC} snat ip to ip saddr map @static_sources")  # guard: static-nat-sets-the-source
    if now.source_nat is not None:
        free = _free_ports([it.ports for it in _forwarded_udp(now)])
        static = f" ip saddr != {_one_of(sorted(now.static_sources))}" if now.static_sources else ""
        for it in now.networks:
            guests = f"oifname {_PUBLIC} ip saddr {it.cidr}{static}"
            if free is not None:
                taken = "udp sport @forwarded_udp ip saddr . udp sport != @forwarded_udp_own"
                rules.append(f"{guests} {taken} snat ip to {now.source_nat.address}:{free}")
            rules.append(f"{guests} snat ip to {now.source_nat.address}")
    return Chain(
        name="translate_from",
        hook="type nat hook postrouting priority srcnat; policy accept;",
        rules=tuple(rules),
    )


def _policy_source_nat(way: PolicyNat, now: Active) -> list[str]:
    """What an operator's route sends out leaves with an address of that way's exit, or the provider drops it."""
    where = f'oifname "{way.link}"'
    if way.via or way.destination:
        where += f" rt ip nexthop {way.via}" if way.via else f" ip daddr {way.destination}"
    strangers = sorted(guest for guest, own in now.static_sources.items() if own.exit != way.address.exit)
    at_home = sorted(now.static_sources.keys() - set(strangers))
    if way.address.source_nat:
        # The others leave as they do anyway.
        who = [f"ip saddr {_one_of(strangers)}"] if strangers else []
    else:
        others = f" ip saddr != {_one_of(at_home)}" if at_home else ""
        who = [f"ip saddr {it.cidr}{others}" for it in now.networks]
    address = way.address.address
    inward = [it.ports for it in now.forwarded if (it.forward.public_ip, it.forward.protocol) == (address, "udp")]
    free = _free_ports(inward) if inward else None
    return [
        line
        for those in who
        for line in (
            *([f"{where} {those} meta l4proto udp snat ip to {address}:{free}"] if free is not None else []),
            f"{where} {those} snat ip to {address}",
        )
    ]


def _leaving(now: Active) -> Chain:
    """After translation: nothing leaves a public link but from an address that is held on it."""
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
        rules=(*rules, f"oifname {_PUBLIC} counter name ip saddr map @counted_out", *ip6.leaving(now)),
    )


def _from_device(now: Active) -> Chain:
    """The device's own packets; a changed mark routes them anew, so that answers leave where the question came in."""
    rules = [_REVOKED]
    if now.networks:
        outward = _outside(now.guest_cidrs)
        rules.append(f"{outward} ct mark & {EXIT_MASK:#010x} != 0 meta mark set ct mark & {EXIT_MASK:#010x}")
    return Chain(name="from_device", hook="type route hook output priority mangle; policy accept;", rules=tuple(rules))


def _link(network: Network) -> str:
    return f'"{names.guest_link(network.network_id)}"'


def _chain_of(address: PublicIp) -> str:
    return f"at_{address.address}"


def _egress_chain(network: Network) -> str:
    return f"egress_{network.network_id}"


def _out_chain(network: Network) -> str:
    return f"acl_out_{network.network_id}"


def _in_chain(network: Network) -> str:
    return f"acl_in_{network.network_id}"


def _balanced_chain(network: Network, port: int) -> str:
    return f"acl_in_{network.network_id}_to_{port}"


def _map(name: str, type_: str, elements: dict[str, str], flags: str = "") -> NftSet:
    return NftSet(name=name, kind="map", type=type_, flags=flags, elements=elements)


def _one_of(values: Iterable[str]) -> str:
    listed = list(values)
    return listed[0] if len(listed) == 1 else f"{{ {', '.join(listed)} }}"


def _outside(cidrs: Iterable[str]) -> str:
    """Packets to none of these subnets, without a set of intervals."""
    by_length: dict[int, list[str]] = {}
    for it in cidrs:
        by_length.setdefault(subnet(it).prefixlen, []).append(it)
    words = []
    for those in by_length.values():
        if len(those) == 1:
            words.append(f"ip daddr != {those[0]}")
        else:
            values = ", ".join(it.partition("/")[0] for it in those)
            words.append(f"ip daddr & {subnet(those[0]).netmask} != {{ {values} }}")
    return " ".join(words)
