"""The commands about public addresses: assign and release them, static NAT, port forwards."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from netloom.commands.network_facts import with_guest
from netloom.commands.transition import Context, network_of, with_left_out, with_network
from netloom.errors import BadRequest
from netloom.names import UNTAGGED, VLAN_TAG_MAX
from netloom.protocol.nat import (
    AddPortForward,
    AddStaticNat,
    AssignIp,
    DeletePortForward,
    DeleteStaticNat,
    PublicAddress,
    ReleaseIp,
)
from netloom.protocol.scalars import IPv4Prefix, PortRange, Vlan
from netloom.protocol.vpc import VpcPublicAddress
from netloom.state import PortForward, Ports, PublicIp, Scope, StaticNat

# The number of an exit is the low half of a packet's mark (render.marks).
_EXIT_MAX = 0xFFFF


def assign_ip(scope: Scope, payload: AssignIp, context: Context) -> Scope:
    """Assign the address to the device. With ``source_nat`` it becomes the only source-NAT address of the scope.

    The source-NAT address of a tier is that of its VPC.
    """
    if payload.source_nat:
        scope = with_source_nat(scope, payload, network_id="" if scope.is_vpc else str(payload.network_id))
    else:
        assigned = _public_ip(scope, payload, source_nat=False, network_id=str(payload.network_id))
        scope = replace(scope, public_ips={**scope.public_ips, assigned.address: assigned})
    return with_network(scope, network_of(scope, payload, context))


def with_source_nat(scope: Scope, payload: PublicAddress | VpcPublicAddress, *, network_id: str = "") -> Scope:
    """``scope`` with this address as its only source-NAT address. The former one belongs to no network any more.

    CloudStack never names the former address again, and may give it to another network. So it stays only as long as a
    rule uses it: :func:`without_unused`.
    """
    assigned = _public_ip(scope, payload, source_nat=True, network_id=network_id)
    others = {
        address: replace(it, source_nat=False, network_id="") if it.source_nat else it
        for address, it in scope.public_ips.items()
    }
    return replace(scope, public_ips={**others, assigned.address: assigned})


def without_unused(scope: Scope, network_id: str = "") -> Scope:
    """``scope`` without addresses that no rule uses: the former source-NAT addresses, or those of a network.

    An address that an assign-ip of a network brought stays until its release-ip, also without rules. Only
    implement-network removes it: no rule came since, so a version before this rule has left it as a former source-NAT
    address, or its release-ip failed while the host was down.
    """
    unused = {key for key, it in scope.public_ips.items() if not it.source_nat and it.network_id == network_id}
    if unused:
        unused -= addresses_in_use(scope) | _firewalled_addresses(scope)
    if not unused:
        return scope
    return replace(scope, public_ips={key: it for key, it in scope.public_ips.items() if key not in unused})


def with_unassigned_told(scope: Scope) -> Scope:
    """``scope`` with a reason for each address whose rules are not in force, because its VLAN is not known.

    The lists of firewall and load balancer rules name addresses without their VLAN (:func:`address_next_to`).
    """
    for network in scope.networks.values():
        named = set(network.firewall.ingress) if network.firewall is not None else set()
        named |= {it.public_ip for it in scope.lb_rules.values() if it.network_id == network.network_id}
        reasons = [
            f"the rules of {address}: its VLAN is not known before its assign-ip"
            for address in sorted(named - scope.public_ips.keys())
        ]
        scope = with_left_out(scope, "assign-ip", network.network_id, reasons)
    return scope


def release_ip(scope: Scope, payload: ReleaseIp, context: Context) -> Scope:
    """Release the address, with the network's static NAT, port forwards and load balancer rules on it.

    In a VPC, only the translations of this tier are removed. The VPC's source-NAT address stays assigned, and so does
    an address that another tier's rules use.
    """
    address, network_id = str(payload.public_ip), str(payload.network_id)
    scope = replace(
        scope,
        static_nats={  # guard: release-ip-ends-static-nat
            key: it for key, it in scope.static_nats.items() if key != address or it.network_id != network_id
        },
        port_forwards={
            key: it
            for key, it in scope.port_forwards.items()
            if it.public_ip != address  # guard: release-ip-is-no-prefix-match
            or it.network_id != network_id
        },
        lb_rules={
            key: it for key, it in scope.lb_rules.items() if it.public_ip != address or it.network_id != network_id
        },
    )
    assigned = scope.public_ips.get(address)
    if scope.is_vpc and ((assigned is not None and assigned.source_nat) or address in addresses_in_use(scope)):
        return scope
    return replace(scope, public_ips={key: it for key, it in scope.public_ips.items() if key != address})


def add_static_nat(scope: Scope, payload: AddStaticNat, context: Context) -> Scope:
    """Translate the address to the guest in both directions. A guest has one such address: an older one is removed."""
    network = with_guest(scope, network_of(scope, payload, context), payload, str(payload.private_ip))
    scope = with_network(_with_public_ip(scope, payload), network)
    nat = StaticNat(
        public_ip=str(payload.public_ip), private_ip=str(payload.private_ip), network_id=str(payload.network_id)
    )
    others = {
        key: it
        for key, it in scope.static_nats.items()
        if (it.private_ip, it.network_id) != (nat.private_ip, nat.network_id)
    }
    return replace(scope, static_nats={**others, nat.public_ip: nat})


def delete_static_nat(scope: Scope, payload: DeleteStaticNat, context: Context) -> Scope:
    """Remove the static NAT of the address."""
    address = str(payload.public_ip)
    return replace(scope, static_nats={key: it for key, it in scope.static_nats.items() if key != address})


def add_port_forward(scope: Scope, payload: AddPortForward, context: Context) -> Scope:
    """Forward the ports to the guest. A forward of the same ports to another guest is replaced.

    Raises BadRequest if the lengths of the two ranges do not fit, if some of the ports are already forwarded, or if
    the guest is not in the network.
    """
    network = with_guest(scope, network_of(scope, payload, context), payload, str(payload.private_ip))
    forward = PortForward(
        public_ip=_required(payload.public_ip),
        protocol=payload.protocol.word,
        public_ports=_ports(payload.public_port),
        private_ip=str(payload.private_ip),
        private_ports=_ports(payload.private_port),
        network_id=str(payload.network_id),
    )
    if forward.private_ports.count not in (1, forward.public_ports.count):
        raise BadRequest(
            f"payload.private_port: {forward.private_ports} is neither one port nor as many as {forward.public_ports}"
        )
    for key, other in scope.port_forwards.items():
        if key != forward.key and _overlap(forward, other):
            raise BadRequest(
                f"payload.public_port: {forward.key} overlaps {key}, which leads to {other.private_ip}",
                hint="delete that port forward first",
            )
    scope = with_network(_with_public_ip(scope, payload), network)
    return replace(scope, port_forwards={**scope.port_forwards, forward.key: forward})


def delete_port_forward(scope: Scope, payload: DeletePortForward, context: Context) -> Scope:
    """Remove the port forward, unless these ports lead to another guest by now."""
    try:
        key = f"{payload.public_ip}/{payload.protocol.lower()}/{_ports(PortRange.parse(payload.public_port))}"
    except ValueError:
        return scope  # add-port-forward refuses these ports, so nothing is stored
    known = scope.port_forwards.get(key)
    if known is None or payload.private_ip not in ("", known.private_ip):
        return scope
    return replace(scope, port_forwards={it: forward for it, forward in scope.port_forwards.items() if it != key})


def addresses_in_use(scope: Scope) -> set[str]:
    """The public addresses that static NAT, a port forward or a load balancer rule uses."""
    forwarded = {it.public_ip for it in scope.port_forwards.values()}
    return {*scope.static_nats, *forwarded, *(it.public_ip for it in scope.lb_rules.values())}


def address_next_to(assigned: Iterable[PublicIp], address: str, network_id: str) -> PublicIp | None:
    """The address as assigned, with VLAN and gateway of an address in the same subnet: the call has neither."""
    for other in assigned:
        if address in IPv4Prefix(other.cidr) and address != other.gateway:
            return replace(other, address=address, source_nat=False, network_id=network_id)
    return None


def _firewalled_addresses(scope: Scope) -> set[str]:
    """The public addresses with ingress rules. CloudStack counts these rules, too, before it releases an address."""
    firewalls = [network.firewall for network in scope.networks.values() if network.firewall is not None]
    return {address for firewall in firewalls for address in firewall.ingress}


def _required(public_ip: str) -> str:
    if not public_ip:
        raise BadRequest(
            "payload.public_ip is missing", hint="CloudStack leaves it out when it does not find the address"
        )
    return str(public_ip)


def _with_public_ip(scope: Scope, payload: PublicAddress) -> Scope:
    """``scope`` with the public address of a rule assigned: CloudStack may send the rule before assign-ip.

    ``source_nat`` has no meaning in such a call, so an address that is already assigned stays as it is.
    """
    if _required(payload.public_ip) in scope.public_ips:
        return scope
    assigned = _public_ip(scope, payload, source_nat=False, network_id=str(payload.network_id))
    return replace(scope, public_ips={**scope.public_ips, assigned.address: assigned})


def _public_ip(
    scope: Scope, payload: PublicAddress | VpcPublicAddress, *, source_nat: bool, network_id: str
) -> PublicIp:
    missing = [field for field in ("public_ip", "public_vlan", "public_cidr") if not getattr(payload, field)]
    if missing:  # guard: a-missing-public-field-is-named
        raise BadRequest(
            f"payload.{missing[0]} is missing" if len(missing) == 1 else f"payload: {', '.join(missing)} are missing",
            hint="CloudStack leaves the public fields out when it does not find the address",
        )
    vlan = _public_vlan(payload.public_vlan)
    gateway = str(payload.public_gateway)
    if gateway == payload.public_ip or gateway in scope.public_ips:
        raise BadRequest(f"payload.public_gateway: {gateway} is a public address of the guests' own")
    if any(payload.public_ip == assigned.gateway for assigned in scope.public_ips.values()):
        raise BadRequest(f"payload.public_ip: {payload.public_ip} is the gateway of another public address")
    if payload.public_cidr.endswith("/0"):
        raise BadRequest(f"payload.public_cidr: no public VLAN has the subnet {payload.public_cidr}")
    return PublicIp(
        address=str(payload.public_ip),
        vlan=vlan,
        gateway=gateway,
        cidr=str(payload.public_cidr),
        exit=_exit(scope, str(payload.public_ip), vlan, gateway),
        source_nat=source_nat,
        network_id=network_id,
    )


def _public_vlan(vlan: Vlan) -> str:
    if vlan != UNTAGGED and not vlan.is_vxlan and (vlan.private or not 1 <= vlan.number <= VLAN_TAG_MAX):
        raise BadRequest(
            f"payload.public_vlan: {vlan} is not a VLAN tag (1 to {VLAN_TAG_MAX}, or untagged)",
            hint="write the public range of a VXLAN as vxlan://<number>",
        )
    return str(vlan)


def _exit(scope: Scope, address: str, vlan: str, gateway: str) -> int:
    """The number of the exit: that of an address with the same VLAN and gateway, else the lowest free one.

    An address keeps its number as long as its VLAN and gateway stay, because open connections are marked with it.
    """
    for assigned in scope.public_ips.values():
        if (assigned.vlan, assigned.gateway) == (vlan, gateway):  # guard: an-exit-has-one-vlan-and-gateway
            return assigned.exit
    taken = {assigned.exit for assigned in scope.public_ips.values() if assigned.address != address}
    free = next((number for number in range(1, _EXIT_MAX + 1) if number not in taken), None)
    if free is None:
        raise BadRequest(f"payload.public_vlan: more than {_EXIT_MAX} public VLANs and gateways in one scope")
    return free


def _ports(ports: PortRange) -> Ports:
    return Ports(ports.first, ports.last)  # guard: a-range-is-forwarded-whole


def _overlap(one: PortForward, other: PortForward) -> bool:
    return (
        (one.public_ip, one.protocol) == (other.public_ip, other.protocol)
        and one.public_ports.first <= other.public_ports.last
        and other.public_ports.first <= one.public_ports.last
    )
