"""A network begins, ends, and ends for good."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from netloom.commands.transition import GUEST_TYPES, Context, network_of, only, with_network
from netloom.errors import BadRequest, NotBuiltYet
from netloom.names import UNTAGGED
from netloom.protocol.network import DestroyNetwork, ImplementNetwork, ShutdownNetwork
from netloom.protocol.scalars import VLAN_TAG_MAX, IPv4Prefix, Vlan
from netloom.state import Scope

# CloudStack's Networks.BroadcastDomainType, by the registration detail network.broadcast.
_BROADCAST_DOMAIN_TYPES = {"vlan": "Vlan", "vxlan": "Vxlan"}


def implement_network(scope: Scope, asked: ImplementNetwork, context: Context) -> Scope:
    """The network stands from now on, with the tag, subnet and addresses of this call.

    On a living network it changes what is said anew and keeps its firewall, addresses and forwards. The tag is
    remembered: a call without one means the last one told.
    """
    if asked.guest_type != "isolated":
        raise NotBuiltYet(f"implement-network: this version of netloom does not carry out {asked.guest_type} networks")
    told = network_of(scope, asked)
    vlan = str(asked.vlan) or told.vlan
    if not vlan:
        raise BadRequest(
            f"implement-network: payload.vlan is empty, and no tag of network {asked.network_id} is known",
            hint="remove the detail network.isolation.method from the extension and restart the network: with it "
            "CloudStack does not assign a VLAN (apache/cloudstack issue 14077)",
        )
    check_guest_vlan(vlan, context)
    gateway = only(asked.gateway, "gateway") or told.gateway
    cidr = only(asked.cidr, "cidr") or told.cidr
    for field, value in (("cidr", cidr), ("gateway", gateway)):
        if not value:
            raise BadRequest(f"implement-network: payload.{field} is missing")
    for field, value in (("gateway", gateway), ("extension_ip", str(asked.extension_ip))):
        if value and value not in IPv4Prefix(cidr):
            raise BadRequest(f"implement-network: payload.{field}: {value} is not in the network's {cidr}")
    return with_network(
        scope,
        replace(
            told,
            guest_type=GUEST_TYPES[asked.guest_type],
            implemented=True,
            vlan=vlan,
            gateway=gateway,
            cidr=cidr,
            extension_ip=str(asked.extension_ip),
        ),
    )


def implemented_output(scope: Scope, asked: ImplementNetwork, context: Context) -> str:
    """The network's own tag in the form that CloudStack takes over, when the registration asks for it; else nothing."""
    broadcast = context.registration.broadcast
    if not broadcast:
        return ""
    told = {
        "network.broadcast_domain_type": _BROADCAST_DOMAIN_TYPES[broadcast],
        "network.broadcast_uri": f"{broadcast}://{scope.networks[asked.network_id].vlan}",
    }
    return msgspec.json.encode(told).decode()


def shutdown_network(scope: Scope, asked: ShutdownNetwork, context: Context) -> Scope | None:
    """Nothing of the network is left, and nothing comes back: CloudStack forgets the host, so we forget the network."""
    return _without(scope, asked.network_id)


def destroy_network(scope: Scope, asked: DestroyNetwork, context: Context) -> Scope | None:
    """The same as shutdown-network, which left nothing behind."""
    return _without(scope, asked.network_id)


def check_guest_vlan(vlan: str, context: Context) -> None:
    """Raises BadRequest, or NotBuiltYet, when guests cannot be on this segment."""
    told = Vlan(vlan)
    if told.private:
        raise NotBuiltYet(f"payload.vlan: this version of netloom does not carry out private VLANs ({vlan})")
    if vlan == UNTAGGED:
        return
    if context.registration.isolation == "vxlan":
        raise NotBuiltYet("guest.isolation=vxlan: this version of netloom does not carry it out yet")
    if told.number > VLAN_TAG_MAX:
        raise BadRequest(
            f"payload.vlan: {vlan} is not a VLAN tag (1 to {VLAN_TAG_MAX})",
            hint="is it a VXLAN id? then register the extension with the detail guest.isolation=vxlan",
        )


def _without(scope: Scope, network_id: str) -> Scope | None:
    """``scope`` without one network and all that is only its own; None when the scope was that network."""
    if scope.scope_id.startswith("net-"):
        return None
    static_nats = {key: it for key, it in scope.static_nats.items() if it.network_id != network_id}
    port_forwards = {key: it for key, it in scope.port_forwards.items() if it.network_id != network_id}
    lb_rules = {key: it for key, it in scope.lb_rules.items() if it.network_id != network_id}
    used = static_nats.keys() | {it.public_ip for it in port_forwards.values()}
    used |= {it.public_ip for it in lb_rules.values()}
    return replace(
        scope,
        networks={key: it for key, it in scope.networks.items() if key != network_id},
        # An address that another tier's rules use stays, whichever tier asked for it first.
        public_ips={key: it for key, it in scope.public_ips.items() if it.network_id != network_id or key in used},
        static_nats=static_nats,
        port_forwards=port_forwards,
        lb_rules=lb_rules,
    )
