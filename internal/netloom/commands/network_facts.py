"""What a network stands on: its segment, its ranges, and an address that is the device's own.

CloudStack implements a network first, and the call tells all three. Two kinds of networks are never implemented: plain
shared ones (the first command of any kind is about a VM), and those that moved to another host, which gets whatever
command comes next. So any call that tells as much builds the network.
"""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Address, IPv6Network

from msgspec.structs import replace

from netloom.errors import BadRequest
from netloom.names import UNTAGGED, VLAN_TAG_MAX
from netloom.protocol.network import NetworkPayload
from netloom.protocol.nic import NicPayload
from netloom.protocol.scalars import IPv4List, IPv4Prefix, Vlan
from netloom.state import Network, Scope, Subnet
from netloom.wire import Registration

# The states in which VMs use the network; "setup" is that of a plain shared one. While CloudStack is implementing, the
# call that says everything comes or has come.
_IN_USE = frozenset({"implemented", "setup"})


def with_facts(known: Network, payload: NetworkPayload) -> Network:
    """``known`` with what the call tells of the network; an absent field says nothing.

    Of an isolated network that stands only implement-network says such things anew: elsewhere the gateway is a NIC's.
    A shared network may never see an implement-network, so there every call counts.
    """
    if not known.implemented:
        known = replace(known, guest_type=payload.guest_type.word)
    elif known.guest_type == "isolated":
        return known
    known = replace(
        known,
        vlan=str(payload.vlan) or known.vlan,
        extension_ip=str(getattr(payload, "extension_ip", "")) or known.extension_ip,
        ip6_cidr=str(next(iter(payload.network_ip6_cidr), known.ip6_cidr)),
        ip6_gateway=str(next(iter(payload.network_ip6_gateway), known.ip6_gateway)),
    )
    if known.guest_type != "isolated":
        return _with_ranges(known, payload)
    return replace(
        known,
        cidr=only(payload.cidr, "cidr") or known.cidr,
        gateway=only(payload.gateway, "gateway") or known.gateway,
    )


def implemented_if_complete(network: Network, payload: NetworkPayload, scope: Scope) -> Network:
    """``network`` as one that stands, if CloudStack says it is in use and the device's place in it is certain.

    The calls about VMs name the device's address. Those about addresses and rules do not; there the device is the
    gateway if it holds the source-NAT address, and otherwise nobody can tell: a guess could take the real one's place.
    """
    is_gateway = network.guest_type == "isolated" and any(it.source_nat for it in scope.public_ips.values())
    if payload.network_state not in _IN_USE or not (network.vlan and network.cidr):
        return network
    if not (network.extension_ip or is_gateway):
        return network
    check_addresses(network)
    return replace(network, implemented=True)


def check_addresses(network: Network) -> None:
    """Raises BadRequest when the device's address, or an isolated network's gateway, is in none of its subnets."""
    addresses = [("extension_ip", network.extension_ip)]
    if network.guest_type == "isolated":
        addresses.append(("gateway", network.gateway))
    for field, value in addresses:
        if value and not any(value in IPv4Prefix(it.cidr) for it in network.ranges):
            raise BadRequest(f"payload.{field}: {value} is not in the network's {network.cidr}")
    if network.ip6_gateway and network.ip6_cidr and not _is_in6(network.ip6_gateway, network.ip6_cidr):
        raise BadRequest(f"payload.network_ip6_gateway: {network.ip6_gateway} is not in {network.ip6_cidr}")


def check_segment(vlan: str, registration: Registration) -> None:
    """Raises BadRequest when guests cannot be on this segment."""
    segment = Vlan(vlan)
    if segment.private:
        raise BadRequest(
            f"payload.vlan: {vlan} is a private VLAN, which a Linux bridge cannot carry",
            hint=f"make the network in CloudStack with the plain VLAN {segment.number}, without isolatedpvlan",
        )
    if vlan != UNTAGGED and registration.isolation == "vlan" and segment.number > VLAN_TAG_MAX:
        raise BadRequest(
            f"payload.vlan: {vlan} is not a VLAN tag (1 to {VLAN_TAG_MAX})",
            hint="is it a VXLAN id? then register the extension with the detail guest.isolation=vxlan",
        )


def only(values: tuple[str, ...], field: str) -> str:
    """The one value of a field that may be a list, or nothing.

    Raises BadRequest for several: only shared networks have more than one range.
    """
    if len(values) > 1:
        raise BadRequest(f"payload.{field}: {len(values)} values, where a network has one")
    return str(values[0]) if values else ""


def gateway_in(cidr: str, gateways: IPv4List) -> str:
    """The first of the gateways that lies in a subnet; empty: none does."""
    return next((str(it) for it in gateways if it in IPv4Prefix(cidr)), "")


def _with_ranges(network: Network, payload: NetworkPayload) -> Network:
    """A shared network with the ranges that the call names: its list, and the subnet of the NIC that it is about.

    ``cidr`` stays that of the first range in a call about a NIC of the second (protocol section 2): there gateway and
    netmask are the NIC's. What overlaps a range that is named now was another time's.
    """
    ranges = {it.cidr: it.gateway for it in network.ranges}
    for cidr in payload.cidr:
        ranges = _with_range(ranges, str(cidr), payload.gateway)
    if (
        isinstance(payload, NicPayload)
        and payload.subnet
        and not any(payload.ip in IPv4Prefix(it) and it != payload.subnet for it in ranges)
    ):
        ranges = _with_range(ranges, payload.subnet, payload.gateway)
    if not ranges:
        return network
    of_device = (it for it in ranges if network.extension_ip and network.extension_ip in IPv4Prefix(it))
    home = next(of_device, network.cidr if network.cidr in ranges else next(iter(ranges)))
    others = sorted(Subnet(cidr, gateway) for cidr, gateway in ranges.items() if cidr != home)
    return replace(network, cidr=home, gateway=ranges[home], subnets=tuple(others))


def _with_range(ranges: dict[str, str], cidr: str, gateways: IPv4List) -> dict[str, str]:
    gateway = gateway_in(cidr, gateways) or ranges.get(cidr, "")
    return {it: other for it, other in ranges.items() if it == cidr or not _overlap(it, cidr)} | {cidr: gateway}


def _is_in6(address: str, cidr: str) -> bool:
    return IPv6Address(address) in IPv6Network(cidr)


def _overlap(one: str, other: str) -> bool:
    return IPv4Network(one).overlaps(IPv4Network(other))
