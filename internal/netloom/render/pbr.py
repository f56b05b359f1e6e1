"""Policy routing: the operator's route tables and rules, and the source addresses for traffic on these routes.

The operator's rules have lower priority numbers than the rules of the exits, so they are tried first. They match only
packets with the mark ``marks.POLICY``: connections that guests opened to the outside. Replies leave through the exit
where the request came in, packets to guests are delivered, and the device's own packets use the normal routes, whatever
the operator's rules say.
"""

from __future__ import annotations

import msgspec

from netloom import names
from netloom.netobjects import ANYWHERE, Route, Rule
from netloom.render.active import Active, Exit, subnet, within
from netloom.render.marks import POLICY
from netloom.state import Pbr, PbrRoute, PublicIp


class PolicyNat(msgspec.Struct, frozen=True, kw_only=True):
    """Source NAT for traffic on an operator's route.

    The traffic is source-NATed to ``address``, except for guests that have a static NAT address on the same exit.
    """

    link: str
    via: str  # empty: on-link
    destination: str  # empty: any, or matched by ``via``
    address: PublicIp


def routes(pbr: Pbr, now: Active) -> tuple[Route, ...]:
    """The operator's routes in force. A route that the kernel refuses would make the plan of the whole scope fail."""
    return tuple(
        Route(table=it.table, destination=it.destination, kind=it.kind, link=it.link, via=it.via, source=it.source)
        for it in pbr.routes
        if in_force(it, now)
    )


def rules(pbr: Pbr) -> tuple[Rule, ...]:
    """The operator's rules, with their priorities."""
    return tuple(
        Rule(
            priority=it.priority,
            mark=POLICY,
            mask=POLICY,
            table=it.table,
            source=it.source,
            destination=it.destination,
            iif=it.iif,
        )
        for it in pbr.rules
    )


def in_force(route: PbrRoute, now: Active) -> bool:
    """Whether the kernel can take the route.

    Its link must exist, its source must be an address of the device, and its gateway must be an address of another
    machine.
    """
    if route.kind != "unicast":
        return True
    links = {names.guest_link(it.network_id) for it in now.networks} | {names.public_link(it.vlan) for it in now.held}
    own = {it.device_ip for it in now.networks} | {it.address for it in now.held}
    network_and_broadcast = {
        str(address)
        for it in now.networks
        for address in (subnet(it.cidr).network_address, subnet(it.cidr).broadcast_address)
        if subnet(it.cidr).prefixlen < 31
    }
    gateway_is_other = route.via not in own | network_and_broadcast
    return route.link in links and gateway_is_other and (not route.source or route.source in own)


def policy_nats(pbr: Pbr, now: Active) -> tuple[PolicyNat, ...]:
    """Source NAT for the routes in force that lead to a public link; equal entries only once, sorted."""
    found: dict[tuple[str, str, str], PolicyNat] = {}
    for route in pbr.routes:
        exits = [exit_ for exit_ in now.exits if names.public_link(exit_.vlan) == route.link]
        if exits and in_force(route, now):
            destination = "" if route.via or route.destination == ANYWHERE else route.destination
            address = _address(_exit(route.via, exits), now)
            found[route.link, route.via, destination] = PolicyNat(
                link=route.link, via=route.via, destination=destination, address=address
            )
    return tuple(nat for _, nat in sorted(found.items()))


def _exit(via: str, exits: list[Exit]) -> Exit:
    """The exit on this link with this gateway; otherwise one whose subnet contains it; otherwise the first."""
    found = [it for it in exits if it.gateway == via] or [
        it for it in exits if via and any(within(via, cidr) for cidr in it.subnets)
    ]
    return (found or exits)[0]


def _address(exit_: Exit, now: Active) -> PublicIp:
    """The source address for an exit: the source NAT address if it belongs to the exit, otherwise the lowest."""
    if now.source_nat is not None and now.source_nat.exit == exit_.number:
        return now.source_nat
    return next(it for it in now.held if it.address == exit_.addresses[0])
