"""What goes into a command and what comes out; how a network of a scope is found and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from netloom.commands.network_facts import check_addresses, check_segment, implemented_if_complete, with_facts
from netloom.errors import HostRefused
from netloom.protocol.network import NetworkPayload
from netloom.state import Network, Outside6, Scope, Uplinks
from netloom.wire import Registration

N = TypeVar("N", bound=NetworkPayload)


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What a command knows beside its payload."""

    scope_id: str
    registration: Registration


class Transitioned(msgspec.Struct, frozen=True, kw_only=True):
    """The scope as it should be from now on, and what CloudStack reads. No scope: nothing of it is left.

    ``refused``: what of the command was not taken over; the rest is in ``scope``.
    """

    scope: Scope | None
    output: str = ""
    refused: HostRefused | None = None


class PartlyDone(HostRefused):
    """Some of what a call lists was refused; ``scope`` has the rest."""

    def __init__(self, scope: Scope, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.scope = scope


def new_scope(context: Context) -> Scope:
    """A scope of which nothing is known but whose it is."""
    return Scope(
        scope_id=context.scope_id,
        owner=context.registration.owner,
        uplinks=_uplinks(context.registration),
        outside6=_outside6(context.registration),
        ingress_open=context.registration.ingress_open,
    )


def with_registration(scope: Scope, registration: Registration) -> Scope:
    """``scope`` with the operator's present details; an operator may change them while networks live."""
    return replace(
        scope,
        uplinks=_uplinks(registration),
        outside6=_outside6(registration),
        ingress_open=registration.ingress_open,
    )


def network_of(scope: Scope, payload: NetworkPayload, context: Context) -> Network:
    """The network that ``payload`` is about, as the call tells of it; built, when the call is the first to tell enough.

    Raises BadRequest when guests cannot be on its segment, or the device not in its subnets.
    """
    known = scope.networks.get(payload.network_id) or Network(network_id=str(payload.network_id))
    network = with_facts(known, payload)
    if network.vlan:
        check_segment(network.vlan, context.registration)
    if not network.implemented:
        return implemented_if_complete(network, payload, scope)
    check_addresses(network)
    return network


def with_network(scope: Scope, network: Network) -> Scope:
    """``scope`` with ``network`` put in its place."""
    return replace(scope, networks={**scope.networks, network.network_id: network})


def for_network(change: Callable[[Network, N], Network]) -> Callable[[Scope, N, Context], Scope]:
    """A command that is about one network only, as one about its scope."""

    def transition(scope: Scope, payload: N, context: Context) -> Scope:
        return with_network(scope, change(network_of(scope, payload, context), payload))

    return transition


def for_known_network(change: Callable[[Network, N], Network]) -> Callable[[Scope, N, Context], Scope]:
    """The same for a command that takes something away: from a network that nobody told of there is nothing to take."""

    def transition(scope: Scope, payload: N, context: Context) -> Scope:
        network = scope.networks.get(payload.network_id)
        return scope if network is None else with_network(scope, change(network, payload))

    return transition


def _outside6(registration: Registration) -> Outside6 | None:
    if not registration.ip6_gateway:
        return None
    return Outside6(gateway=registration.ip6_gateway, address=registration.ip6_address)


def _uplinks(registration: Registration) -> Uplinks:
    return Uplinks(
        guest=registration.guest_nic,
        public=registration.public_nic,
        isolation="vxlan" if registration.isolation == "vxlan" else "vlan",
    )
