"""Plain networks, where the device is not the gateway: shared networks, and isolated networks without NAT.

The gateway of the guests is another machine. The device provides DHCP, DNS and metadata at an address of its own. It
forwards nothing, translates nothing, and filters only packets to itself. The segment may carry several subnets: the
device reaches their guests directly, and everything else through the router of its own subnet.
"""

from __future__ import annotations

from netloom import names
from netloom.netobjects import ANYWHERE, MAIN_TABLE, Route
from netloom.render import senders
from netloom.render.active import within
from netloom.render.device import DHCP_REQUEST, FROM_GUESTS_TO_DEVICE, device_services, guest_link, refusals
from netloom.render.helpers import ICMP_ERRORS
from netloom.render.ruleset import Chain, Ruleset
from netloom.state import Network, Nic, Subnet


def range_of(network: Network, address: str) -> Subnet | None:
    """The network's IPv4 range that contains an address; None if CloudStack did not send such a range."""
    return next((it for it in network.ranges if within(address, it.cidr)), None)


def on_link(network: Network) -> list[str]:
    """The prefixes on the segment besides the device's own subnet: other ranges, and NICs outside all ranges."""
    strays = {f"{nic.ip}/32" for nic in network.nics.values() if nic.ip and range_of(network, nic.ip) is None}
    return [*(it.cidr for it in network.subnets), *sorted(strays)]


def routes(network: Network) -> tuple[Route, ...]:
    """Direct routes to the other ranges, and a default route through the router of the device's subnet."""
    link = names.guest_link(network.network_id)
    direct = [Route(table=MAIN_TABLE, destination=it, link=link) for it in on_link(network)]
    if network.gateway:
        direct.append(Route(table=MAIN_TABLE, destination=ANYWHERE, link=link, via=network.gateway))
    return tuple(direct)


def classless_static_routes(network: Network, nic: Nic) -> str:
    """The routes of DHCP option 121 that let a VM of another subnet reach the device directly; empty: not needed.

    Through the VM's router, requests would arrive with the router's MAC address, and such a request gets no metadata
    and no password (``guest.peer``). A client that accepts option 121 ignores the router option (RFC 3442), so the
    default route is part of the list.
    """
    home = range_of(network, nic.ip)
    if home is None or home.cidr == network.cidr:
        return ""
    router = nic.gateway or home.gateway
    default_route = f", {ANYWHERE} via {router}" if router and nic.default else ""
    return f"{network.device_ip}/32 via 0.0.0.0{default_route}"


def ruleset(network: Network, family: str, table: str) -> Ruleset:
    """The table of a plain network: guests reach the device's services; routers, and hosts behind them, do not.

    An accept never depends on a lookup that misses (see ``nft``).
    """
    link = guest_link(network)
    routers = sorted({it.gateway for it in network.ranges if it.gateway})
    guests = [network.cidr, *on_link(network)]
    return Ruleset(
        family=family,
        table=table,
        sets=senders.sets(network),
        chains=(
            Chain(
                name="arriving",
                hook="type filter hook prerouting priority mangle; policy drop;",
                rules=(
                    'iifname "lo" accept',
                    "meta nfproto ipv6 drop",
                    f"iifname {link} {DHCP_REQUEST}",
                    # Replies to the resolver's queries come from any address.
                    "ct state established accept",
                    ICMP_ERRORS,
                    "ct state invalid drop",
                    *(f"ip saddr {it} drop" for it in routers),  # guard: routers-do-not-reach-the-device
                    *(f"iifname {link} ip saddr {it} accept" for it in guests),
                    "drop",
                ),
            ),
            Chain(
                name="to_device",
                hook="type filter hook input priority filter; policy drop;",
                rules=(
                    'iifname "lo" accept',
                    *senders.guards(network),
                    "ct state established accept",
                    ICMP_ERRORS,
                    *device_services(network, ping=True),
                    *refusals(FROM_GUESTS_TO_DEVICE),
                ),
            ),
            senders.resets([network]),
            Chain(
                name="through",
                hook="type filter hook forward priority filter; policy drop;",  # guard: plain-networks-forward-nothing
            ),
        ),
    )
