"""Which processes a scope wants inside its namespace."""

from __future__ import annotations

from netloom.render import dnsmasq, haproxy
from netloom.render.service import Service
from netloom.state import Scope


def services(scope: Scope) -> tuple[Service, ...]:
    """A resolver for each standing network that has DNS, and one load balancer when a rule needs it."""
    wanted = [
        dnsmasq.service(scope.scope_id, network)
        for _, network in sorted(scope.networks.items())
        if network.implemented and network.dns
    ]
    balancer = haproxy.service(scope) if any(network.implemented for network in scope.networks.values()) else None
    return (*wanted, balancer) if balancer is not None else tuple(wanted)
