"""IPv6 of a scope: the device routes it, translates nothing, and lets nobody begin anything from outside.

A guest's address is the one that it makes itself from the advertised prefix and its MAC address (RFC 4862), which is
the one that CloudStack computed. Neighbour discovery is no connection to conntrack, so it is admitted by its types,
with the hop limit that no router leaves (RFC 4861 section 11.2); advertisements of routers and redirects never are:
the device is the router.
"""

from __future__ import annotations

from ipaddress import IPv6Interface

import msgspec

from netloom import names
from netloom.netobjects import MAIN_TABLE, Address, Route
from netloom.render.active import Active
from netloom.render.ruleset import Chain
from netloom.state import Network, Scope

ANYWHERE = "::/0"
CHAIN = "arriving_ip6"

_PUBLIC = '"' + names.public_link("*") + '"'
_TO_ROUTERS = "icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } ip6 hoplimit 255"
_TO_NEIGHBOURS = "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } ip6 hoplimit 255"


class DefaultRoute(msgspec.Struct, frozen=True, kw_only=True):
    """Where IPv6 leaves: the public link of the default exit, with an address of the device's own on it."""

    link: str
    address: str  # with prefix length
    gateway: str


def ip6_networks(now: Active) -> tuple[Network, ...]:
    """The standing networks whose guests the device routes IPv6 for."""
    return tuple(it for it in now.networks if it.has_ip6)


def default_route(scope: Scope, now: Active) -> DefaultRoute | None:
    """The way out, where the registration names one and a public link stands.

    A registered network without host bits gives every scope an address of its own, made from its link's MAC address:
    the same on whichever host it lives, so that an upstream router's route to the guests' prefix stays right.
    """
    outside, exit_ = scope.outside6, now.default_exit
    if outside is None or exit_ is None or not ip6_networks(now):
        return None
    link = names.public_link(exit_.vlan)
    named = IPv6Interface(outside.address)
    if named.ip == named.network.network_address and named.network.prefixlen <= 64:
        own = named.network.network_address + _interface_id(names.mac(scope.owner, scope.scope_id, link))
        return DefaultRoute(link=link, address=f"{own}/{named.network.prefixlen}", gateway=outside.gateway)
    return DefaultRoute(link=link, address=named.compressed, gateway=outside.gateway)


def addresses(scope: Scope, now: Active) -> tuple[Address, ...]:
    """The gateway's of each network, and the device's own outside."""
    inside = [
        Address(link=names.guest_link(it.network_id), cidr=f"{it.ip6_gateway}/{it.ip6_cidr.partition('/')[2]}")
        for it in ip6_networks(now)
    ]
    out = default_route(scope, now)
    return (*inside, *([Address(link=out.link, cidr=out.address)] if out else []))


def routes(scope: Scope, now: Active) -> tuple[Route, ...]:
    """The default route; without a way out there is none, and the kernel answers at once that there is no route."""
    out = default_route(scope, now)
    if out is None:
        return ()
    found = [Route(table=MAIN_TABLE, destination=ANYWHERE, link=out.link, via=out.gateway)]
    gateway = IPv6Interface(out.gateway)
    if not gateway.is_link_local and gateway.ip not in IPv6Interface(out.address).network:
        # Some providers route a subnet through a gateway outside of it.
        found.insert(0, Route(table=MAIN_TABLE, destination=f"{out.gateway}/128", link=out.link))
    return tuple(found)


def sysctls(scope: Scope, now: Active, links: list[str]) -> dict[str, str]:
    """IPv6 is off on every link but those that speak it: off by default, so that no new link speaks for an instant.

    The switch for all links stays as the kernel has it: who writes it sets every link's back. Duplicate address
    detection would keep the gateway silent for a second after each start; its address is nobody else's.
    """
    out = default_route(scope, now)
    speak = {names.guest_link(it.network_id) for it in ip6_networks(now)} | ({out.link} if out else set())
    wanted = {
        "net.ipv6.conf.all.disable_ipv6": "0",
        "net.ipv6.conf.all.forwarding": "0" if now.plain else "1",
        "net.ipv6.conf.default.disable_ipv6": "1",
    }
    for link in links:
        conf = f"net.ipv6.conf.{link}"
        if link in speak:
            wanted |= {
                f"{conf}.accept_ra": "0",
                f"{conf}.autoconf": "0",
                f"{conf}.accept_redirects": "0",
                f"{conf}.accept_source_route": "0",
                f"{conf}.dad_transmits": "0",
                f"{conf}.accept_dad": "0",
                f"{conf}.forwarding": "1",
            }
        wanted[f"{conf}.disable_ipv6"] = "0" if link in speak else "1"
    return wanted


def arriving(now: Active, *, from_outside: bool) -> list[Chain]:
    """Every IPv6 packet from outside; ``from_outside``: lists of tiers, or nobody, judge what strangers begin."""
    networks = ip6_networks(now)
    if not networks:
        return []
    rules = [f'iifname {_PUBLIC} ip6 daddr {it.ip6_cidr} counter name "{counters(it)[0]}"' for it in networks]
    for it in networks:
        link = _link(it)
        rules += [
            f"iifname {link} ip6 saddr {source} {_TO_ROUTERS} accept" for source in ("::", "fe80::/10", it.ip6_cidr)
        ]
        rules += [
            # Whoever has no other address yet may ask the device.
            f"iifname {link} ip6 saddr fe80::/10 ip6 daddr fe80::/10 accept",
            f"iifname {link} ip6 saddr fe80::/10 ip6 daddr {it.ip6_gateway} accept",
            f"iifname {link} ip6 saddr != {it.ip6_cidr} drop",
            f"iifname {_PUBLIC} ip6 saddr {it.ip6_cidr} drop",
        ]
    rules += [
        f"iifname {_PUBLIC} {_TO_NEIGHBOURS} accept",
        "ct state established,related accept",
        "ct state invalid drop",
    ]
    rules += [f"iifname {_link(it)} accept" for it in networks]
    rules += [f"iifname {_PUBLIC} accept"] if from_outside else []
    return [Chain(name=CHAIN, rules=(*rules, "drop"))]


def leaving(now: Active) -> list[str]:
    """What is counted when it leaves."""
    return [f'oifname {_PUBLIC} ip6 saddr {it.ip6_cidr} counter name "{counters(it)[1]}"' for it in ip6_networks(now)]


def counters(network: Network) -> tuple[str, str]:
    """The names of the counters of a network's prefix: what arrived for it, what left from it."""
    return f"in_ip6_{network.network_id}", f"out_ip6_{network.network_id}"


def to_device(now: Active) -> list[str]:
    """What the device itself hears: neighbour discovery, pings, and names from its guests."""
    networks = ip6_networks(now)
    rules = [f"{_TO_ROUTERS} accept"] if networks else []
    for it in networks:
        to_gateway = f"iifname {_link(it)} ip6 daddr {it.ip6_gateway}"
        rules += [
            f"{to_gateway} icmpv6 type echo-request accept",
            f"iifname {_link(it)} ip6 daddr fe80::/10 icmpv6 type echo-request accept",
            f"{to_gateway} udp dport 53 accept",
            f"{to_gateway} tcp dport 53 accept",
        ]
    return rules


def _interface_id(mac: str) -> int:
    """The modified EUI-64 of a MAC address (RFC 4291 appendix A)."""
    octets = bytes.fromhex(mac.replace(":", ""))
    return int.from_bytes(bytes((octets[0] ^ 2,)) + octets[1:3] + b"\xff\xfe" + octets[3:], "big")


def _link(network: Network) -> str:
    return f'"{names.guest_link(network.network_id)}"'
