"""Which processes a scope wants inside its namespace."""

from __future__ import annotations

from netloom.render import dnsmasq, haproxy
from netloom.render.service import Service
from netloom.state import Scope


def services(
    scope: Scope, without: frozenset[int] = frozenset(), *, resolver: dnsmasq.Build = dnsmasq.DEBIAN_12
) -> tuple[Service, ...]:
    """A resolver for each standing network that has DNS or IPv6, and one load balancer when a rule needs it.

    ``without``: ids of balanced rules that have to wait, because somebody else has their port.
    """
    wanted = [
        dnsmasq.service(scope.scope_id, network, resolver)
        for _, network in sorted(scope.networks.items())
        if network.is_active and (network.dns or network.has_ip6)
    ]
    balancer = (
        haproxy.service(scope, without) if any(network.is_active for network in scope.networks.values()) else None
    )
    return (*wanted, balancer) if balancer is not None else tuple(wanted)
