"""The processes that run in the namespace of a scope."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.render import dnsmasq, haproxy
from netloom.render.service import Service
from netloom.state import Network, Scope


def services(
    scope: Scope, without: frozenset[int] = frozenset(), *, resolver: dnsmasq.Build = dnsmasq.DEBIAN_12
) -> tuple[Service, ...]:
    """A dnsmasq for each active network that has DNS or IPv6, and one haproxy if a rule needs it.

    ``without``: ids of load balancing rules that are left out, because another program uses their port.
    """
    wanted = [
        dnsmasq.service(scope.scope_id, network, resolver, scope if scope.is_vpc else None)
        for _, network in sorted(scope.networks.items())
        if network.is_active and (network.dns or network.has_ip6)
    ]
    balancer = (
        haproxy.service(scope, without) if any(network.is_active for network in scope.networks.values()) else None
    )
    return (*wanted, balancer) if balancer is not None else tuple(wanted)


def same_services(before: Scope, after: Scope) -> bool:
    """Whether both states have the same services, and the same tables for guests; False also where that is not sure.

    It takes less time than to make them: rules and public addresses change much more often than VMs.
    """
    return (
        _for_guests(before.networks) == _for_guests(after.networks)
        and haproxy.balanced(before) == haproxy.balanced(after)
        and before.balancing == after.balancing
        and before.vpc_cidr == after.vpc_cidr
    )


def _for_guests(networks: dict[str, Network]) -> dict[str, Network]:
    """The networks without what only the ruleset has."""
    return {network_id: replace(it, firewall=None, acl=None) for network_id, it in networks.items()}
