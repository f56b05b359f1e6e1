"""A network whose device is a neighbour of its guests and no more: plain shared ones, and isolated ones without NAT.

Its VMs' gateway is somebody else. The device gives them DHCP, names and metadata at an address of its own; it forwards
nothing, translates nothing, and filters only what is for itself. VMs of several subnets may stand on the segment: the
device speaks to all of them directly, and to the rest of the world through the router that it has in its own subnet.
"""

from __future__ import annotations

from netloom import names
from netloom.netobjects import ANYWHERE, MAIN_TABLE, Route
from netloom.render.active import within
from netloom.render.ruleset import Chain, Ruleset
from netloom.state import Network, Nic, Subnet

_DHCP_REQUEST = "ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept"


def range_of(network: Network, address: str) -> Subnet | None:
    """The network's range that an address lies in; None when nobody told of that range."""
    return next((it for it in network.ranges if within(address, it.cidr)), None)


def on_link(network: Network) -> list[str]:
    """What is on the segment besides the device's own subnet: the other ranges, and VMs of ranges nobody told of."""
    strays = {f"{nic.ip}/32" for nic in network.nics.values() if nic.ip and range_of(network, nic.ip) is None}
    return [*(it.cidr for it in network.subnets), *sorted(strays)]


def routes(network: Network) -> tuple[Route, ...]:
    """To each range directly, whatever its own router is; to the rest through the router of the device's subnet."""
    link = names.guest_link(network.network_id)
    direct = [Route(table=MAIN_TABLE, destination=it, link=link) for it in on_link(network)]
    if network.gateway:
        direct.append(Route(table=MAIN_TABLE, destination=ANYWHERE, link=link, via=network.gateway))
    return tuple(direct)


def classless_static_routes(network: Network, nic: Nic) -> str:
    """The routes that a VM of another subnet is told (DHCP option 121), for it to reach the device directly.

    Otherwise its router would hand its requests on, under the router's MAC address, and a request of another MAC
    address than the VM's gets no metadata and no password (``guest.peer``). A client that takes these routes leaves the
    router option alone (RFC 3442), so the way to everywhere is among them. Empty: it reaches the device anyway.
    """
    home = range_of(network, nic.ip)
    if home is None or home.cidr == network.cidr:
        return ""
    router = nic.gateway or home.gateway
    everywhere = f", {ANYWHERE} via {router}" if router and nic.default else ""
    return f"{network.device_ip}/32 via 0.0.0.0{everywhere}"


def ruleset(network: Network, family: str, table: str) -> Ruleset:
    """Tenants reach the device's services; routers and whoever stands behind them do not begin anything here.

    The verdicts are those of exact lines: nothing that accepts depends on a look-up missing (``render.nft``).
    """
    link = f'"{names.guest_link(network.network_id)}"'
    device = f"iifname {link} ip daddr {network.device_ip}"
    routers = sorted({it.gateway for it in network.ranges if it.gateway})
    tenants = [network.cidr, *on_link(network)]
    return Ruleset(
        family=family,
        table=table,
        chains=(
            Chain(
                name="arriving",
                hook="type filter hook prerouting priority mangle; policy drop;",
                rules=(
                    'iifname "lo" accept',
                    "meta nfproto ipv6 drop",
                    f"iifname {link} ip saddr 0.0.0.0 {_DHCP_REQUEST}",
                    # Answers to the resolver's own questions come from anywhere.
                    "ct state established,related accept",
                    "ct state invalid drop",
                    *(f"ip saddr {it} drop" for it in routers),  # guard: routers-do-not-reach-the-device
                    *(f"iifname {link} ip saddr {it} accept" for it in tenants),
                    "drop",
                ),
            ),
            Chain(
                name="to_device",
                hook="type filter hook input priority filter; policy drop;",
                rules=(
                    'iifname "lo" accept',
                    "ct state established,related accept",
                    f"iifname {link} {_DHCP_REQUEST}",
                    f"{device} icmp type echo-request accept",
                    f"{device} udp dport {{ 53, 67 }} accept",
                    f"{device} tcp dport {{ 53, 80, 8080 }} accept",
                ),
            ),
            Chain(
                name="through",
                hook="type filter hook forward priority filter; policy drop;",  # guard: plain-networks-forward-nothing
            ),
        ),
    )
