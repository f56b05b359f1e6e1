"""Helpers of all commands: their context and result, a new scope, and access to one network of a scope."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from netloom.commands.network_facts import check_addresses, check_segment, implemented_if_complete, with_facts
from netloom.errors import one_line
from netloom.protocol.network import NetworkPayload
from netloom.state import Balancing, Network, Outside6, Scope, Uplinks
from netloom.wire import Registration

N = TypeVar("N", bound=NetworkPayload)


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What a command gets in addition to its payload."""

    scope_id: str
    registration: Registration


class Transitioned(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a command: the new desired state, and the output for CloudStack.

    ``scope`` None: the scope does not exist any more.
    """

    scope: Scope | None
    output: str = ""


# Sentences about one list that are stored and shown, and characters of each.
_LEFT_OUT_MAX, _LEFT_OUT_CHARACTERS_MAX = 20, 300


def new_scope(context: Context) -> Scope:
    """A new scope without networks, for the owner and with the details of the registration."""
    return Scope(
        scope_id=context.scope_id,
        owner=context.registration.owner,
        uplinks=_uplinks(context.registration),
        outside6=_outside6(context.registration),
        helpers=context.registration.conntrack_helpers,
        ingress_open=context.registration.ingress_open,
        balancing=_balancing(context.registration),
        connections_max=context.registration.conntrack_max_per_vm,
    )


def with_registration(scope: Scope, registration: Registration) -> Scope:
    """``scope`` with the current registration details. An operator may change them while networks exist."""
    return replace(
        scope,
        uplinks=_uplinks(registration),
        outside6=_outside6(registration),
        helpers=registration.conntrack_helpers,
        ingress_open=registration.ingress_open,
        balancing=_balancing(registration),
        connections_max=registration.conntrack_max_per_vm,
    )


def network_of(scope: Scope, payload: NetworkPayload, context: Context) -> Network:
    """The network that ``payload`` names, with the facts of the payload; implemented as soon as they are complete.

    Raises BadRequest if guests cannot be on the segment, or if the device's address is in none of the subnets.
    """
    known = scope.networks.get(payload.network_id) or Network(network_id=str(payload.network_id))
    network = with_facts(known, payload)
    if network.vlan:
        check_segment(network.vlan, payload.vlan, context.registration)
    if not network.implemented:
        return implemented_if_complete(network, payload, scope)
    check_addresses(network)
    return network


def with_network(scope: Scope, network: Network) -> Scope:
    """``scope`` with ``network`` added, or replaced if it is there."""
    return replace(scope, networks={**scope.networks, network.network_id: network})


def with_left_out(scope: Scope, command: str, network_id: str, left_out: Sequence[str]) -> Scope:
    """``scope`` with the reasons why parts of the last list of this command are not in force; none: all are."""
    key = f"{command} {network_id}"
    others = {it: reasons for it, reasons in scope.left_out.items() if it != key}
    if not left_out:
        return scope if others == scope.left_out else replace(scope, left_out=others)
    reasons = [one_line(it, _LEFT_OUT_CHARACTERS_MAX) for it in left_out[:_LEFT_OUT_MAX]]
    if len(left_out) > _LEFT_OUT_MAX:
        reasons.append(f"and {len(left_out) - _LEFT_OUT_MAX} more")
    return replace(scope, left_out={**others, key: tuple(reasons)})


def is_shutting_down(payload: msgspec.Struct) -> bool:
    """Whether CloudStack is removing the network. It still sends rules then, which must not create the scope anew."""
    return getattr(payload, "network_state", "") in ("shutdown", "destroy")


def for_network(change: Callable[[Network, N], Network]) -> Callable[[Scope, N, Context], Scope]:
    """Make a transition of the scope from a function that changes one network. The network is added if necessary."""

    def transition(scope: Scope, payload: N, context: Context) -> Scope:
        network = change(network_of(scope, payload, context), payload)
        # A change of a NIC may show that the network's subnet is larger. The next command must not be the first to see.
        network = with_facts(network, payload)  # guard: a-changed-nic-shows-its-subnet-at-once
        return with_network(scope, network)

    return transition


def for_known_network(change: Callable[[Network, N], Network]) -> Callable[[Scope, N, Context], Scope]:
    """The same for a command that removes something: it does nothing if the network is not known."""

    def transition(scope: Scope, payload: N, context: Context) -> Scope:
        network = scope.networks.get(payload.network_id)
        return scope if network is None else with_network(scope, change(network, payload))

    return transition


def _outside6(registration: Registration) -> Outside6 | None:
    if not registration.ip6_gateway:
        return None
    return Outside6(gateway=registration.ip6_gateway, address=registration.ip6_address)


def _balancing(registration: Registration) -> Balancing:
    return Balancing(idle_s=registration.lb_idle_s, connections_max=registration.lb_connections_max)


def _uplinks(registration: Registration) -> Uplinks:
    return Uplinks(
        guest=registration.guest_nic,
        public=registration.public_nic,
        isolation="vxlan" if registration.isolation == "vxlan" else "vlan",
    )
