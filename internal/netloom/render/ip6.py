"""IPv6 of a scope: the device routes and filters it, and translates nothing.

A guest's address is the one that the guest itself forms from the advertised prefix and its MAC address (RFC 4862).
CloudStack computes the same address. Conntrack does not track neighbour discovery, so it is accepted by type and with
hop limit 255, which no router forwards (RFC 4861 section 11.2). Router advertisements and redirects are dropped,
because the device is the only router.
"""

from __future__ import annotations

from ipaddress import IPv6Address, IPv6Interface

import msgspec

from netloom import names
from netloom.netobjects import ANYWHERE_IP6, IP6_LINK_LOCAL, MAIN_TABLE, Address, Route
from netloom.render import device, helpers, lost
from netloom.render.active import Active
from netloom.render.device import DNS_PORT, PUBLIC_LINKS, guest_link
from netloom.render.ruleset import Chain
from netloom.state import Network, Nic, Scope

CHAIN = "arriving_ip6"

_TO_ROUTERS = "icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } ip6 hoplimit 255"
_TO_NEIGHBOURS = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } ip6 hoplimit 255"


class DefaultRoute(msgspec.Struct, frozen=True, kw_only=True):
    """The IPv6 default route: the public link of the default exit, the device's address on it, and the gateway."""

    link: str
    address: str  # with prefix length
    gateway: str


def ip6_networks(now: Active) -> tuple[Network, ...]:
    """The active networks for which the device routes IPv6."""
    return tuple(network for network in now.networks if network.has_ip6)


def default_route(scope: Scope, now: Active) -> DefaultRoute | None:
    """The default route, if the registration names one and the scope has a public link.

    If the registered address has no host bits, each scope forms an address of its own from the MAC address of its
    link. This address is the same on every host, so the upstream router's route to the guests' prefix stays valid.
    """
    outside, exit_ = scope.outside6, now.default_exit
    if outside is None or exit_ is None or not ip6_networks(now):
        return None
    link = names.public_link(exit_.vlan)
    registered = IPv6Interface(outside.address)
    prefix = registered.network
    if registered.ip == prefix.network_address and prefix.prefixlen <= 64:
        own = prefix.network_address + eui64(names.mac(scope.owner, scope.scope_id, link))
        return DefaultRoute(link=link, address=f"{own}/{prefix.prefixlen}", gateway=outside.gateway)
    return DefaultRoute(link=link, address=registered.compressed, gateway=outside.gateway)


def addresses(scope: Scope, now: Active) -> tuple[Address, ...]:
    """The gateway address of each network, and the device's address on the public link."""
    inside = [
        Address(
            link=names.guest_link(network.network_id),
            cidr=f"{network.ip6_gateway}/{network.ip6_cidr.partition('/')[2]}",
        )
        for network in ip6_networks(now)
    ]
    out = default_route(scope, now)
    return (*inside, *([Address(link=out.link, cidr=out.address)] if out else []))


def routes(scope: Scope, now: Active) -> tuple[Route, ...]:
    """The default route. Without it the kernel rejects packets to the outside at once ("no route")."""
    out = default_route(scope, now)
    if out is None:
        return ()
    found = [Route(table=MAIN_TABLE, destination=ANYWHERE_IP6, link=out.link, via=out.gateway)]
    gateway = IPv6Interface(out.gateway)
    if not gateway.is_link_local and gateway.ip not in IPv6Interface(out.address).network:
        # Some providers route a subnet through a gateway outside of it.
        found.insert(0, Route(table=MAIN_TABLE, destination=f"{out.gateway}/128", link=out.link))
    return tuple(found)


def sysctls(scope: Scope, now: Active, links: list[str]) -> dict[str, str]:
    """Enable IPv6 on the links that use it and disable it on all others.

    It is disabled by default, so that a new link never has IPv6 for an instant. ``all.disable_ipv6`` keeps the kernel's
    value, because writing it changes the setting of every link. Programs may bind to the gateway's address while the
    link has none, which is so while its MTU is too small for IPv6. Duplicate address detection is off: it would delay
    the gateway's address by a second at each start, and no other machine uses this address.
    """
    out = default_route(scope, now)
    enabled = {names.guest_link(network.network_id) for network in ip6_networks(now)} | ({out.link} if out else set())
    wanted = {
        "net.ipv6.conf.all.disable_ipv6": "0",
        "net.ipv6.conf.all.forwarding": "0" if now.plain else "1",
        "net.ipv6.conf.default.disable_ipv6": "1",
    }
    if enabled:
        wanted["net.ipv6.ip_nonlocal_bind"] = "1"  # guard: the-resolver-starts-without-ipv6
    for link in links:
        conf = f"net.ipv6.conf.{link}"
        if link in enabled:
            wanted |= {
                f"{conf}.accept_ra": "0",
                f"{conf}.autoconf": "0",
                f"{conf}.accept_redirects": "0",
                f"{conf}.accept_source_route": "0",
                f"{conf}.dad_transmits": "0",
                f"{conf}.accept_dad": "0",
                f"{conf}.forwarding": "1",
                # Three small packets wait for the answer of a neighbour, or one of 1,500 bytes. The kernel's one socket
                # for ICMPv6 messages has room for 57 such neighbours.
                f"net.ipv6.neigh.{link}.unres_qlen_bytes": "2304",  # guard: few-packets-wait-for-an-ip6-neighbour
            }
        wanted[f"{conf}.disable_ipv6"] = "0" if link in enabled else "1"
    return wanted


def arriving(now: Active, used: tuple[str, ...], *, from_outside: bool) -> list[Chain]:
    """The chain for every IPv6 packet that enters the device.

    ``used``: the conntrack helpers in use.
    ``from_outside``: outside hosts may open connections here; the lists of the tiers, if there are any, decide later.
    """
    networks = ip6_networks(now)
    if not networks:
        return []
    rules = [
        f'iifname {PUBLIC_LINKS} ip6 daddr {network.ip6_cidr} counter name "{counters(network)[0]}"'
        for network in networks
    ]
    for network in networks:
        link = guest_link(network)
        rules += [
            f"iifname {link} ip6 saddr {source} {_TO_ROUTERS} accept"
            for source in ("::", IP6_LINK_LOCAL, network.ip6_cidr)
        ]
        rules += [
            # A guest that has only a link-local address may contact the device.
            f"iifname {link} ip6 saddr {IP6_LINK_LOCAL} ip6 daddr {IP6_LINK_LOCAL} accept",
            f"iifname {link} ip6 saddr {IP6_LINK_LOCAL} ip6 daddr {network.ip6_gateway} accept",
            f"iifname {link} ip6 saddr != {network.ip6_cidr} drop",
            f"iifname {PUBLIC_LINKS} ip6 saddr {network.ip6_cidr} drop",
        ]
    rules += [
        f"iifname {PUBLIC_LINKS} {_TO_NEIGHBOURS} accept",
        "ct state established accept",
        *helpers.related(used),
        *lost.arriving(),
        *helpers.ip6_assignment(used, from_outside=from_outside),
    ]
    rules += [f"iifname {guest_link(network)} accept" for network in networks]
    rules += [f"iifname {PUBLIC_LINKS} accept"] if from_outside else []
    return [Chain(name=CHAIN, rules=(*rules, "drop"))]


def leaving(now: Active) -> list[str]:
    """The rules that count packets of guests to the outside."""
    return [
        f'oifname {PUBLIC_LINKS} ip6 saddr {network.ip6_cidr} counter name "{counters(network)[1]}"'
        for network in ip6_networks(now)
    ]


def counters(network: Network) -> tuple[str, str]:
    """The names of the counters of a network's prefix: packets to it from outside, packets from it to the outside."""
    return f"in_ip6_{network.network_id}", f"out_ip6_{network.network_id}"


def to_device(now: Active) -> list[str]:
    """The rules for packets to the device itself: neighbour discovery, and pings and DNS from its guests."""
    networks = ip6_networks(now)
    rules = [f"{_TO_ROUTERS} accept"] if networks else []
    for network in networks:
        link = guest_link(network)
        to_gateway = f"iifname {link} ip6 daddr {network.ip6_gateway}"
        rules += [
            f"{to_gateway} icmpv6 type echo-request accept",
            f"iifname {link} ip6 daddr {IP6_LINK_LOCAL} icmpv6 type echo-request accept",
            f"{to_gateway} udp dport {DNS_PORT} accept",
            f"{to_gateway} tcp dport {DNS_PORT} accept",
        ]
    return rules


def refusals(network: Network) -> tuple[str, ...]:
    """The rules that answer a guest's requests to closed ports of its own gateway."""
    return tuple(
        rule
        for address in (network.ip6_gateway, IP6_LINK_LOCAL)
        for rule in device.refusals(f"iifname {guest_link(network)} ip6 daddr {address}", "icmpv6")
    )


def nic_addresses(nic: Nic) -> tuple[str, ...]:
    """The addresses of a NIC in a network with IPv6: the one that CloudStack computed, and the link-local one."""
    link_local = str(IPv6Address("fe80::") + eui64(nic.mac))
    return (nic.ip6, link_local) if nic.ip6 else (link_local,)


def eui64(mac: str) -> int:
    """The interface identifier of a guest: the modified EUI-64 of a MAC address (RFC 4291 appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return int.from_bytes(bytes((octets[0] ^ 2,)) + octets[1:3] + b"\xff\xfe" + octets[3:], "big")
