"""implement-network, shutdown-network and destroy-network."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from netloom.commands.nat import addresses_in_use, without_unused
from netloom.commands.network_facts import check_addresses, check_segment, with_facts
from netloom.commands.nic import settled
from netloom.commands.transition import Context, with_network
from netloom.errors import BadRequest
from netloom.names import UNTAGGED, VXLAN
from netloom.protocol.network import DestroyNetwork, ImplementNetwork, ShutdownNetwork
from netloom.state import Network, Scope

# CloudStack's Networks.BroadcastDomainType, by the registration detail network.broadcast.
_BROADCAST_DOMAIN_TYPES = {"vlan": "Vlan", "vxlan": "Vxlan"}


def implement_network(scope: Scope, payload: ImplementNetwork, context: Context) -> Scope:
    """Create the network with the tag, subnet and addresses of this call, or update them.

    An update keeps the firewall, public addresses and forwards. A call without a tag means the last known tag. Without
    an address of its own the device has the gateway's; on a shared network it has none, so nothing is created.
    """
    known = scope.networks.get(payload.network_id) or Network(network_id=str(payload.network_id))
    network = with_facts(replace(settled(known), implemented=False), payload)
    if not network.vlan:  # guard: a-network-has-a-vlan
        raise BadRequest(
            f"implement-network: payload.vlan is empty, and no tag of network {payload.network_id} is known",
            hint="remove the detail network.isolation.method from the extension and restart the network: with it "
            "CloudStack does not assign a VLAN (apache/cloudstack issue 14077)",
        )
    check_segment(network.vlan, payload.vlan, context.registration)
    if network.guest_type == "isolated":
        for field, value in (("cidr", network.cidr), ("gateway", network.gateway)):
            if not value:
                raise BadRequest(f"implement-network: payload.{field} is missing")
    network = replace(network, implemented=True, extension_ip=str(payload.extension_ip))
    check_addresses(network)
    scope = without_unused(scope, network.network_id)  # guard: a-restart-keeps-no-unused-address
    return with_network(scope, network)


def broadcast_domain(vlan: str, broadcast: str) -> str:
    """The output of implement-network: the network's broadcast domain as CloudStack stores it.

    Empty if the registration has no network.broadcast, or if the payload has no tag: CloudStack then keeps what it has.
    The payload wins over the registration: ``vx1204`` is a VXLAN, and ``untagged`` is none.
    """
    if not (broadcast and vlan):
        return ""
    if vlan.startswith(VXLAN) or vlan == UNTAGGED:
        broadcast = "vlan" if vlan == UNTAGGED else "vxlan"
    fields = {
        "network.broadcast_domain_type": _BROADCAST_DOMAIN_TYPES[broadcast],
        "network.broadcast_uri": f"{broadcast}://{vlan.removeprefix(VXLAN)}",
    }
    return msgspec.json.encode(fields).decode()


def shutdown_network(scope: Scope, payload: ShutdownNetwork, context: Context) -> Scope | None:
    """Delete the network with all its state: CloudStack forgets the host, so a later implement may use another one."""
    return _without(scope, payload.network_id)


def destroy_network(scope: Scope, payload: DestroyNetwork, context: Context) -> Scope | None:
    """Delete the network, as shutdown-network does."""
    return _without(scope, payload.network_id)


def _without(scope: Scope, network_id: str) -> Scope | None:
    """``scope`` without one network, its translations and its own public addresses; None if nothing else is in it."""
    if not scope.is_vpc:
        return None
    networks = {key: it for key, it in scope.networks.items() if key != network_id}
    if not networks and not scope.vpc_implemented:
        return None
    static_nats = {key: it for key, it in scope.static_nats.items() if it.network_id != network_id}
    port_forwards = {
        key: it for key, it in scope.port_forwards.items() if it.network_id != network_id
    }  # guard: port-forwards-end-with-their-tier
    lb_rules = {key: it for key, it in scope.lb_rules.items() if it.network_id != network_id}
    left = replace(
        scope,
        networks=networks,
        static_nats=static_nats,
        port_forwards=port_forwards,
        lb_rules=lb_rules,
        left_out={key: it for key, it in scope.left_out.items() if key.rpartition(" ")[2] != network_id},
    )
    # An address that another tier's rules use stays, even if it was assigned to this tier.
    kept = addresses_in_use(left)
    return replace(
        left,
        public_ips={
            key: it
            for key, it in scope.public_ips.items()
            if it.network_id != network_id or it.source_nat or key in kept  # guard: addresses-of-other-tiers-stay
        },
    )
