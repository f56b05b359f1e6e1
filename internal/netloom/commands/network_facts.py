"""The facts that a network needs on a host: its segment, its ranges, and the device's own address.

implement-network carries all three and usually comes first. It does not come for plain shared networks, whose first
command is about a VM, nor for networks that moved to another host: that host gets the next command of any kind. So
every command that carries these facts implements the network.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from msgspec.structs import replace

from netloom.errors import BadRequest
from netloom.names import UNTAGGED, VLAN_TAG_MAX
from netloom.protocol.network import NetworkPayload
from netloom.protocol.nic import NicPayload
from netloom.protocol.scalars import IPv4List, IPv4Prefix, Vlan
from netloom.state import Network, Nic, Scope, Subnet
from netloom.wire import Registration

# The states in which VMs use the network; "setup" is that of a plain shared one. In state "implementing" CloudStack
# sends implement-network or has sent it, so no other command has to implement the network.
_IN_USE = frozenset({"implemented", "setup"})

# The shortest prefix of an isolated network. The largest private range, 10.0.0.0/8, has it (RFC 1918).
_PREFIX_LENGTH_MIN = 8


def with_facts(known: Network, payload: NetworkPayload) -> Network:
    """``known`` with the facts of the payload; an absent field changes nothing.

    Only implement-network changes the facts of an isolated network that is implemented: in other commands the gateway
    may be a NIC's. But every command can make its subnet larger (:func:`whole_subnet`). A shared network may never get
    an implement-network, so every command changes its facts.
    """
    if not known.implemented:
        known = replace(known, guest_type=payload.guest_type.word)
    elif known.guest_type == "isolated":
        return replace(known, cidr=_larger(known.cidr, [*payload.cidr, *_nic_subnets(known, payload)]))
    known = replace(
        known,
        vlan=str(payload.vlan) or known.vlan,
        extension_ip=str(getattr(payload, "extension_ip", "")) or known.extension_ip,
        ip6_cidr=str(next(iter(payload.network_ip6_cidr), known.ip6_cidr)),
        ip6_gateway=str(next(iter(payload.network_ip6_gateway), known.ip6_gateway)),
    )
    if known.guest_type != "isolated":
        return _with_ranges(known, payload)
    known = replace(known, gateway=only(payload.gateway, "gateway") or known.gateway)
    return replace(known, cidr=whole_subnet(known, payload))


def whole_subnet(known: Network, payload: NetworkPayload) -> str:
    """The whole IPv4 subnet of an isolated network. ``known`` already has the gateway of the payload.

    With an IP reservation CloudStack sends the reserved part as ``cidr``. The rest of the subnet belongs to machines
    that CloudStack does not know, and the gateway may be in that rest. Only the netmask of a NIC shows the whole subnet
    (docs/protocol.md, section 2). So the result is the largest of the known subnet, the subnets of the NICs, and the
    smallest prefix with ``cidr`` and the device's addresses, as far as they contain the latter.
    """
    sent = only(payload.cidr, "cidr") or known.cidr
    if not sent:
        return ""
    addresses = [it for it in (known.gateway, known.extension_ip) if it]
    smallest = _smallest(sent, addresses)
    if smallest.prefixlen < _PREFIX_LENGTH_MIN:
        return sent  # check_addresses refuses the address that is too far away
    known_ones = [known.cidr] if known.cidr else []
    return _larger(str(smallest), [*known_ones, *_nic_subnets(known, payload)])  # guard: a-netmask-is-the-whole-subnet


def with_guest(scope: Scope, network: Network, payload: NetworkPayload, address: str) -> Network:
    """``network`` with a subnet that has the address of a guest which a rule names.

    A secondary address of a NIC may be outside an IP reservation, and after a failover its rule comes before any NIC.
    If the gateway is outside the reserved part, the whole subnet is known to be larger, and not how large. Then the
    rule shows more of it, as the device's addresses do in :func:`whole_subnet`.

    Raises BadRequest if there is no such reservation, if a NIC has shown the whole subnet, or if the larger subnet
    would overlap another one of the scope.
    """
    if not network.cidr or any(address in IPv4Prefix(it.cidr) for it in network.ranges):
        return network
    reserved = network.guest_type == "isolated" and payload.cidr and network.cidr not in payload.cidr
    if reserved and not any(_subnet_of(nic) for nic in network.nics.values()):
        larger = _smallest(network.cidr, [address, *(it for it in (network.gateway, network.extension_ip) if it)])
        others = [it for it in scope.networks.values() if it.network_id != network.network_id]
        taken = [it.cidr for other in others for it in other.ranges] + [it.cidr for it in scope.public_ips.values()]
        if larger.prefixlen >= _PREFIX_LENGTH_MIN and not any(_overlap(str(larger), it) for it in taken):
            return replace(network, cidr=str(larger))
    raise BadRequest(f"payload.private_ip: {address} is not in the network's {network.cidr}")


def implemented_if_complete(network: Network, payload: NetworkPayload, scope: Scope) -> Network:
    """``network`` as implemented, if it is in use according to CloudStack and the device's own address is known.

    Commands about VMs name the device's address. Commands about public addresses and rules do not: the device then has
    the gateway's address if it has the source-NAT address. Otherwise its address is unknown, and the network stays as
    it is: a guessed address could conflict with the real gateway's.
    """
    is_gateway = network.guest_type == "isolated" and any(it.source_nat for it in scope.public_ips.values())
    if payload.network_state not in _IN_USE or not (network.vlan and network.cidr):
        return network
    if not (network.extension_ip or is_gateway):
        return network
    check_addresses(network)
    return replace(network, implemented=True)


def check_addresses(network: Network) -> None:
    """Raise BadRequest if the device's address, or an isolated network's gateway, is in none of the subnets.

    Also for an IPv6 prefix that cannot be advertised.
    """
    addresses = [("extension_ip", network.extension_ip)]
    if network.guest_type == "isolated":
        addresses.append(("gateway", network.gateway))
    for field, value in addresses:
        if value and not any(value in IPv4Prefix(it.cidr) for it in network.ranges):
            raise BadRequest(f"payload.{field}: {value} is not in the network's {network.cidr}")
    if network.ip6_gateway and network.ip6_cidr and not _is_in6(network.ip6_gateway, network.ip6_cidr):
        raise BadRequest(f"payload.network_ip6_gateway: {network.ip6_gateway} is not in {network.ip6_cidr}")
    # VMs derive their addresses from an advertised prefix of 64 bits (RFC 4862), and dnsmasq advertises no other.
    if network.ip6_cidr and not network.ip6_cidr.endswith("/64"):  # guard: a-prefix-can-be-advertised
        raise BadRequest(f"payload.network_ip6_cidr: {network.ip6_cidr} is not a prefix of 64 bits")


def check_segment(vlan: str, sent: Vlan, registration: Registration) -> None:
    """Raise BadRequest if guests cannot be on this segment.

    ``vlan``: the network's segment. ``sent``: the payload's. Its scheme may contradict guest.isolation.
    """
    segment = Vlan(vlan)
    if sent.says_vlan and registration.isolation == "vxlan":  # guard: a-vlan-is-not-read-as-a-vxlan
        raise BadRequest(
            f"payload.vlan: vlan://{sent} is a VLAN, and the registration has VXLANs (guest.isolation=vxlan)",
            hint="CloudStack sends the number of a guest network without a scheme",
        )
    if segment.is_vxlan and registration.isolation != "vxlan":
        raise BadRequest(
            f"payload.vlan: vxlan://{segment.number} is a VXLAN, and the registration has VLANs",
            hint="register the extension with the detail guest.isolation=vxlan",
        )
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
    """The only value of a field that may be a list; empty if there is none.

    Raises BadRequest for several values: only shared networks have more than one range.
    """
    if len(values) > 1:
        raise BadRequest(f"payload.{field}: {len(values)} values, where a network has one")
    return str(values[0]) if values else ""


def gateway_in(cidr: str, gateways: IPv4List) -> str:
    """The first of the gateways that is in the subnet ``cidr``; empty if none is."""
    return next((str(it) for it in gateways if it in IPv4Prefix(cidr)), "")


def _with_ranges(network: Network, payload: NetworkPayload) -> Network:
    """A shared network with the ranges of the payload: those of ``cidr``, and the subnet of the payload's NIC.

    In a call about a NIC of the second range, ``cidr`` is still the first range, but gateway and netmask are the NIC's
    (docs/protocol.md, section 2). A known range that overlaps a given one is out of date and is removed. A given one
    that is only a part of a NIC's subnet means the whole subnet, as in :func:`whole_subnet`.
    """
    ranges = {it.cidr: it.gateway for it in network.ranges}
    nic_subnets = _nic_subnets(network, payload)
    for cidr in payload.cidr:
        ranges = _with_range(
            ranges,
            _larger(str(cidr), nic_subnets),  # guard: a-netmask-is-the-whole-range
            payload.gateway,
        )
    if (
        isinstance(payload, NicPayload)
        and (subnet := payload.subnet)
        and not any(payload.ip in IPv4Prefix(it) and it != subnet for it in ranges)
    ):
        ranges = _with_range(ranges, subnet, payload.gateway)
    if not ranges:
        return network
    of_device = (it for it in ranges if network.extension_ip and network.extension_ip in IPv4Prefix(it))
    home = next(of_device, network.cidr if network.cidr in ranges else next(iter(ranges)))
    others = sorted(Subnet(cidr, gateway) for cidr, gateway in ranges.items() if cidr != home)
    return replace(network, cidr=home, gateway=ranges[home], subnets=tuple(others))


def _with_range(ranges: dict[str, str], cidr: str, gateways: IPv4List) -> dict[str, str]:
    gateway = gateway_in(cidr, gateways) or ranges.get(cidr, "")
    return {it: other for it, other in ranges.items() if it == cidr or not _overlap(it, cidr)} | {cidr: gateway}


def _smallest(cidr: str, addresses: list[str]) -> IPv4Network:
    """The smallest prefix that contains ``cidr`` and has the addresses as possible addresses of a machine."""
    subnet = IPv4Network(cidr)
    machines = [IPv4Address(it) for it in addresses]
    while subnet.prefixlen and not all(_is_host(it, subnet) for it in machines):
        subnet = subnet.supernet()
    return subnet


def _is_host(address: IPv4Address, subnet: IPv4Network) -> bool:
    """Whether a machine in ``subnet`` can have the address: a subnet's first and last address are reserved."""
    edges = (subnet.network_address, subnet.broadcast_address) if subnet.prefixlen < 31 else ()
    return address in subnet and address not in edges


def _nic_subnets(known: Network, payload: NetworkPayload) -> list[str]:
    """The subnets that the netmasks of the known NICs and of the payload's NIC show."""
    subnets = [_subnet_of(nic) for nic in known.nics.values()]
    return [it for it in (*subnets, getattr(payload, "subnet", "")) if it]


def _subnet_of(nic: Nic) -> str:
    return str(IPv4Network(f"{nic.ip}/{nic.netmask}", strict=False)) if nic.ip and nic.netmask else ""


def _larger(cidr: str, others: Iterable[str]) -> str:
    """The largest of ``cidr`` and those of the others that contain it. A prefix below the shortest one is ignored."""
    larger = [it for it in map(IPv4Network, others) if it.supernet_of(IPv4Network(cidr))]
    larger = [it for it in larger if it.prefixlen >= _PREFIX_LENGTH_MIN]
    return str(min(larger, key=lambda it: it.prefixlen)) if larger else cidr


def _is_in6(address: str, cidr: str) -> bool:
    return IPv6Address(address) in IPv6Network(cidr)


def _overlap(one: str, other: str) -> bool:
    return IPv4Network(one).overlaps(IPv4Network(other))
