"""Policy routing: an operator's tables as routes and rules, as far as what they name stands, and who leaves by them.

The rules come before those of the ways out, and look at packets with the mark ``marks.POLICY`` alone: what guests begin
outward. Replies leave where the request came in, what is for a guest goes to it, and the device's own packets go their
ways, whatever an operator's rules say.
"""

from __future__ import annotations

import msgspec

from netloom import names
from netloom.netobjects import ANYWHERE, Route, Rule
from netloom.render.active import Active, Exit, subnet, within
from netloom.render.marks import POLICY
from netloom.state import Pbr, PbrRoute, PublicIp


class PolicyNat(msgspec.Struct, frozen=True, kw_only=True):
    """A way out that a route leads to: what takes it leaves as ``address``, but for guests whose own is of its exit."""

    link: str
    via: str  # empty: on-link
    destination: str
    address: PublicIp


def routes(pbr: Pbr, now: Active) -> tuple[Route, ...]:
    """The routes that the kernel would take: one refused would keep everything else of the scope from being done."""
    return tuple(
        Route(table=it.table, destination=it.destination, kind=it.kind, link=it.link, via=it.via, source=it.source)
        for it in pbr.routes
        if in_force(it, now)
    )


def rules(pbr: Pbr) -> tuple[Rule, ...]:
    """The rules, at their own priorities."""
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
    """Whether the route's link stands, its source is the device's, and its neighbour is somebody else."""
    if route.kind != "unicast":
        return True
    links = {names.guest_link(it.network_id) for it in now.networks} | {names.public_link(it.vlan) for it in now.held}
    own = {it.device_ip for it in now.networks} | {it.address for it in now.held}
    edges = {
        str(edge)
        for it in now.networks
        for edge in (subnet(it.cidr).network_address, subnet(it.cidr).broadcast_address)
        if subnet(it.cidr).prefixlen < 31
    }
    return route.link in links and route.via not in own | edges and (not route.source or route.source in own)


def policy_nats(pbr: Pbr, now: Active) -> tuple[PolicyNat, ...]:
    """Each way out that a route in force leads to, once."""
    found: dict[tuple[str, str, str], PolicyNat] = {}
    for it in pbr.routes:
        exits = [out for out in now.exits if names.public_link(out.vlan) == it.link]
        if exits and in_force(it, now):
            destination = "" if it.via or it.destination == ANYWHERE else it.destination
            address = _address(_exit(it.via, exits), now)
            found[it.link, it.via, destination] = PolicyNat(
                link=it.link, via=it.via, destination=destination, address=address
            )
    return tuple(way for _, way in sorted(found.items()))


def _exit(via: str, exits: list[Exit]) -> Exit:
    """Of the exits on one link the one with this gateway, else with this neighbour in its subnet, else the first."""
    here = [it for it in exits if it.gateway == via] or [
        it for it in exits if via and any(within(via, cidr) for cidr in it.subnets)
    ]
    return (here or exits)[0]


def _address(way_out: Exit, now: Active) -> PublicIp:
    """What leaves by an exit: the source-NAT address where it is one of the exit's, else the lowest."""
    if now.source_nat is not None and now.source_nat.exit == way_out.number:
        return now.source_nat
    return next(it for it in now.held if it.address == way_out.addresses[0])
