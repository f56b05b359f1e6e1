"""The payload files that CloudStack's client writes, byte by byte, one function for each command.

They are taken from the client's source, not its documentation, and compared byte by byte with tests/payloads. The
module executes nothing. Its objects (networks, addresses, rules, VMs) are those of CloudStack's database.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Fields = dict[str, Any]

# --- Gson -------------------------------------------------------------------------------------------

# Gson's HTML-safe mode writes these characters as escapes in strings, and other letters as UTF-8.
_HTML_SAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&='\u2028\u2029"}


def gson(value: Any) -> str:
    """JSON as by Gson's default writer: one line, no spaces, HTML-safe, without null members."""
    # The escaped characters occur only in strings, so they can be replaced in the whole text.
    return json.dumps(without_nulls(value), ensure_ascii=False, separators=(",", ":")).translate(_HTML_SAFE)


def without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(each) for each in value]
    return value


def hash_map_order(members: Mapping[str, str]) -> dict[str, str]:
    """The members in the iteration order of a Java HashMap, in which details arrive."""
    size = 16
    while len(members) > size * 3 // 4:
        size *= 2

    def bucket(key: str) -> int:
        value = 0
        units = key.encode("utf-16-be")
        for high, low in zip(units[::2], units[1::2], strict=True):
            value = (31 * value + (high << 8 | low)) & 0xFFFFFFFF
        return (value ^ (value >> 16)) & (size - 1)

    return dict(sorted(members.items(), key=lambda member: bucket(member[0])))


def envelope(registration: Mapping[str, str], details: Mapping[str, Any], payload: Fields) -> str:
    """The complete file of every command except custom-action."""
    return gson(
        {
            "physical-network-extension-details": hash_map_order(registration),
            "network-extension-details": details,
            "payload": payload,
        }
    )


def custom_action(
    registration: Mapping[str, str], details: Mapping[str, Any], about: Fields, action: str, params: Mapping[str, str]
) -> str:
    """The complete, flat file of custom-action. ``about`` has the common members of the network or VPC."""
    return gson(
        {
            **about,
            "action": action,
            "action-params": params,
            "physical-network-extension-details": hash_map_order(registration),
            "network-extension-details": details,
        }
    )


# --- CloudStack's objects ---------------------------------------------------------------------------

State = Literal["allocated", "implementing", "implemented", "shutdown", "setup"]

GUEST_SERVICES = frozenset({"Dhcp", "Dns", "UserData"})


@dataclass(frozen=True)
class Offering:
    """A network offering: the services of the extension and the egress default.

    With ``subnets`` the extension declares DhcpAccrossMultipleSubnets (sic), so config-dhcp-subnet is sent.
    """

    services: frozenset[str]
    default_egress_allow: bool = True
    subnets: bool = True

    @classmethod
    def of(cls, *services: str, default_egress_allow: bool = True, subnets: bool = True) -> Offering:
        return cls(frozenset(services), default_egress_allow, subnets)


ALL_SERVICES = Offering.of(
    "SourceNat", "StaticNat", "PortForwarding", "Firewall", "Lb", "Dhcp", "Dns", "UserData", "CustomAction"
)
NAT_SERVICES = Offering.of("SourceNat", "StaticNat", "PortForwarding", "Firewall")


@dataclass
class PublicAddress:
    """A public address. ``vlan`` is CloudStack's column text: ``vlan://101``, ``vlan://untagged``, or a bare number."""

    ip: str
    vlan: str
    gateway: str
    cidr: str
    source_nat: bool = False


@dataclass
class VirtualMachine:
    """The properties of a VM that appear in its metadata."""

    name: str
    uuid: str
    service_offering: str = "Medium Instance"
    zone: str = "zone-a"
    user_data: str = ""
    public_key: str = ""
    parameters: dict[str, str] = field(default_factory=dict)
    hypervisor: str = ""  # included only when two settings expose it
    domain: str = ""
    domain_uuid: str = ""
    cloud_name: str = ""
    cloud_identifier: str = "CloudStack-{00000000-1111-2222-3333-444444444444}"
    windows: bool = False


@dataclass
class Nic:
    nic_id: str
    uuid: str
    mac: str
    ip: str
    vm: VirtualMachine
    netmask: str = "255.255.255.0"
    device_id: int = 0
    default: bool = True
    gateway: str = ""  # overrides the gateway of the network unless blank
    ip6_address: str = ""
    ip6_gateway: str = ""
    ip6_cidr: str = ""


@dataclass
class PortForwardRule:
    rule_id: int
    address: PublicAddress
    public_ports: str
    private_ip: str
    private_ports: str
    protocol: str


@dataclass
class FirewallRule:
    """An ingress rule, or an egress rule if ``address`` is None."""

    rule_id: int
    protocol: str
    address: PublicAddress | None = None
    first_port: int | None = None
    last_port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    source_cidrs: tuple[str, ...] = ()
    dest_cidrs: tuple[str, ...] = ()


@dataclass
class Backend:
    ip: str
    port: int
    revoked: bool = False


@dataclass
class LoadBalancerRule:
    rule_id: int
    name: str
    address: PublicAddress
    public_port: int
    private_port: int
    algorithm: str = "roundrobin"
    # The client always sends tcp, whatever the user chose.
    protocol: str = "tcp"
    backends: list[Backend] = field(default_factory=list)
    revoke: bool = False


@dataclass
class AclItem:
    """An item of a network ACL list, as CloudStack numbers it. ``cidrs`` filters the far end in both directions."""

    number: int
    action: str
    direction: str
    protocol: str
    first_port: int | None = None
    last_port: int | None = None
    icmp_type: int | None = None
    icmp_code: int | None = None
    cidrs: tuple[str, ...] = ("0.0.0.0/0",)


@dataclass
class VpcFacts:
    """A VPC as the client's payloads describe it."""

    vpc_id: str
    cidr: str
    zone_id: str = "1"
    state: Literal["enabled", "inactive"] = "enabled"


@dataclass
class NetworkFacts:
    """A guest network as the client's payloads describe it."""

    network_id: str
    cidr: str
    gateway: str
    vlan: str = ""
    state: State = "allocated"
    zone_id: str = "1"
    guest_type: str = "isolated"
    vpc_id: str = ""
    ip6_gateway: str = ""
    ip6_cidr: str = ""
    dns: str = "198.51.100.53,198.51.100.54"
    domain: str = "cs2cloud.internal"
    offering: Offering = ALL_SERVICES
    reserved_ip: str = ""  # the device's guest address if it is not the gateway

    @property
    def extension_ip(self) -> str:
        """The gateway if the extension provides SourceNat or Gateway, else the reserved address for guest services."""
        if self.offering.services & {"SourceNat", "Gateway"}:
            return self.gateway
        return self.reserved_ip if self.offering.services & GUEST_SERVICES else ""


# --- pieces of payloads -----------------------------------------------------------------------------


def _present(**members: str) -> Fields:
    """The members that are not blank."""
    return {key: value for key, value in members.items() if value}


def _flag(value: bool) -> str:
    return "true" if value else "false"


def network(it: NetworkFacts, *, gateway: str = "") -> Fields:
    """The first members of every payload of a network."""
    return {
        "network_id": it.network_id,
        "vlan": it.vlan,
        "zone_id": it.zone_id,
        **_present(
            guest_type=it.guest_type,
            network_state=it.state,
            gateway=gateway or it.gateway,
            cidr=it.cidr,
            vpc_id=it.vpc_id,
            network_ip6_gateway=it.ip6_gateway,
            network_ip6_cidr=it.ip6_cidr,
        ),
    }


def _resolvers(it: NetworkFacts) -> Fields:
    return {"dns": it.dns, "domain": it.domain}


def _device(it: NetworkFacts) -> Fields:
    return _present(extension_ip=it.extension_ip)


def _nic(nic: Nic) -> Fields:
    return {
        "nic_id": nic.nic_id,
        **_present(nic_uuid=nic.uuid),
        "mac": nic.mac,
        "ip": nic.ip,
        **_present(netmask=nic.netmask),
        "default_nic": _flag(nic.default),
        "device_id": str(nic.device_id),
        **_present(ip6_address=nic.ip6_address, ip6_gateway=nic.ip6_gateway, ip6_cidr=nic.ip6_cidr),
    }


def _bare_nic(nic: Nic) -> Fields:
    return {
        "nic_id": nic.nic_id,
        "mac": nic.mac,
        "ip": nic.ip,
        "default_nic": "false",
        **_present(ip6_address=nic.ip6_address),
    }


def _public(address: PublicAddress, *, source_nat: bool) -> Fields:
    return {
        "public_ip": address.ip,
        "public_vlan": address.vlan,
        "public_gateway": address.gateway,
        "public_cidr": address.cidr,
        "source_nat": _flag(source_nat),
    }


# --- commands ---------------------------------------------------------------------------------------


def ensure_network_device(it: NetworkFacts, stored: str) -> Fields:
    return {**network(it), "current_details": stored}


def implement_network(it: NetworkFacts) -> Fields:
    return {**network(it), **_device(it)}


def bare(it: NetworkFacts) -> Fields:
    """The payload of shutdown-network and destroy-network."""
    return network(it)


def public_ip(it: NetworkFacts, address: PublicAddress) -> Fields:
    """The payload of assign-ip and release-ip. Only here ``source_nat`` describes the address."""
    return {**network(it), **_public(address, source_nat=address.source_nat)}


def static_nat(it: NetworkFacts, address: PublicAddress, private_ip: str) -> Fields:
    return {**network(it), **_public(address, source_nat=False), "private_ip": private_ip}


def port_forward(it: NetworkFacts, rule: PortForwardRule) -> Fields:
    return {
        **network(it),
        **_public(rule.address, source_nat=False),
        "public_port": rule.public_ports,
        "private_ip": rule.private_ip,
        "private_port": rule.private_ports,
        "protocol": rule.protocol,
    }


def fw_rules(it: NetworkFacts, rules: Iterable[FirewallRule]) -> Fields:
    listed = [
        {
            "id": rule.rule_id,
            "type": "ingress" if rule.address else "egress",
            "protocol": rule.protocol,
            "portStart": rule.first_port,
            "portEnd": rule.last_port,
            "icmpType": rule.icmp_type,
            "icmpCode": rule.icmp_code,
            "publicIp": rule.address.ip if rule.address else None,
            "sourceCidrs": list(rule.source_cidrs),
            "destCidrs": list(rule.dest_cidrs),
        }
        for rule in rules
    ]
    allowed = it.offering.default_egress_allow
    return {**network(it), "fw_rules": {"default_egress_allow": allowed, "cidr": it.cidr, "rules": listed}}


def lb_rules(it: NetworkFacts, rules: Iterable[LoadBalancerRule]) -> Fields:
    listed = [
        {
            "id": rule.rule_id,
            "name": rule.name,
            "publicIp": rule.address.ip,
            "publicPort": rule.public_port,
            "privatePort": rule.private_port,
            "protocol": rule.protocol,
            "algorithm": rule.algorithm,
            "revoke": rule.revoke,
            "backends": [{"ip": each.ip, "port": each.port, "revoked": each.revoked} for each in rule.backends],
        }
        for rule in rules
    ]
    return {**network(it), "lb_rules": listed}


def vpc(it: VpcFacts, address: PublicAddress | None = None) -> Fields:
    """The members of every payload of a VPC. ``address`` is its source-NAT address."""
    about: Fields = {"vpc_id": it.vpc_id, "zone_id": it.zone_id, "vpc_state": it.state, "vpc_cidr": it.cidr}
    return about | (_public(address, source_nat=True) if address else {})


def ensure_vpc_device(it: VpcFacts, stored: str) -> Fields:
    return {**vpc(it), "current_details": stored}


def acl_rules(it: NetworkFacts, items: Iterable[AclItem]) -> Fields:
    """The complete ACL of a tier, ordered by item number."""
    return {**network(it), "acl_rules": [_acl_item(item) for item in sorted(items, key=lambda item: item.number)]}


def _acl_item(item: AclItem) -> Fields:
    return {
        "number": item.number,
        "action": item.action,
        "trafficType": item.direction,
        "protocol": item.protocol,
        "portStart": item.first_port,
        "portEnd": item.last_port if item.last_port is not None else item.first_port,
        "icmpType": item.icmp_type,
        "icmpCode": item.icmp_code,
        "sourceCidrs": list(item.cidrs),
    }


def prepare_nic(it: NetworkFacts, nic: Nic) -> Fields:
    return {**network(it, gateway=nic.gateway), **_nic(nic), "hostname": nic.vm.name, **_device(it)}


def release_nic(it: NetworkFacts, nic: Nic) -> Fields:
    return {**network(it, gateway=nic.gateway), **_nic(nic), **_device(it)}


def config_subnet(it: NetworkFacts, nic: Nic) -> Fields:
    """The payload of config-dhcp-subnet and config-dns-subnet."""
    return {**network(it, gateway=nic.gateway), **_resolvers(it), **_device(it), **_nic(nic)}


def subnet(it: NetworkFacts) -> Fields:
    """The payload of remove-dns-subnet of a shared network, which names no NIC."""
    return {**network(it), **_resolvers(it), **_device(it)}


def add_dhcp_entry(it: NetworkFacts, nic: Nic) -> Fields:
    return {
        **network(it, gateway=nic.gateway),
        **_nic(nic),
        "hostname": nic.vm.name,
        **_resolvers(it),
        **_device(it),
    }


def add_dns_entry(it: NetworkFacts, nic: Nic) -> Fields:
    return {
        **network(it, gateway=nic.gateway),
        **_resolvers(it),
        **_nic(nic),
        "hostname": nic.vm.name,
        **_device(it),
    }


def remove_dhcp_entry(it: NetworkFacts, nic: Nic) -> Fields:
    """The payload of remove-dhcp-entry: without an address, because the client reads it before it is filled in."""
    return {**network(it), **_bare_nic(replace(nic, ip="", ip6_address="")), **_device(it)}


def remove_dns_entry(it: NetworkFacts, nic: Nic) -> Fields:
    return {**network(it), **_resolvers(it), **_bare_nic(nic), **_device(it)}


def save_item(
    it: NetworkFacts, nic: Nic, item: Literal["password", "userdata", "sshkey", "hypervisor_hostname"], value: str
) -> Fields:
    return {**network(it, gateway=nic.gateway), **_nic(nic), item: value, **_device(it)}


def save_vm_data(it: NetworkFacts, nic: Nic, *, static_nat_ip: str = "", password: str = "") -> Fields:
    data = vm_data(nic, static_nat_ip=static_nat_ip, password=password)
    return {**network(it, gateway=nic.gateway), **_nic(nic), **_device(it), "vm_data": data}


def restore_network(it: NetworkFacts, nics: Iterable[Nic], static_nat_ips: Mapping[str, str]) -> Fields:
    """The payload of restore-network. ``static_nat_ips`` maps guest addresses to public addresses."""
    services = it.offering.services
    vms = [
        {
            **_resolvers(it),
            "ip": nic.ip,
            "ip6_address": nic.ip6_address,
            "mac": nic.mac,
            "nic_uuid": nic.uuid,
            "hostname": nic.vm.name,
            "device_id": str(nic.device_id),
            "default_nic": nic.default,
            "vm_data": vm_data(nic, static_nat_ip=static_nat_ips.get(nic.ip, "")) if "UserData" in services else [],
        }
        for nic in nics
    ]
    return {
        **network(it),
        **_device(it),
        **_resolvers(it),
        "restore_data": {
            "dhcp_enabled": "Dhcp" in services,
            "dns_enabled": "Dns" in services,
            "userdata_enabled": "UserData" in services,
            "vms": vms,
        },
    }


def vm_data(nic: Nic, *, static_nat_ip: str = "", password: str = "") -> list[Fields]:
    """The metadata of a VM, in the client's order. ``password`` is given only in the call that sets it."""
    vm = nic.vm
    entries = [("userdata", "user_data", vm.user_data)] if vm.user_data else []
    entries += [
        ("metadata", "service-offering", _as_ascii(vm.service_offering)),
        ("metadata", "availability-zone", _as_ascii(vm.zone)),
        ("metadata", "local-hostname", _as_ascii(vm.name)),
        ("metadata", "local-ipv4", nic.ip),
        *(("metadata", name, _as_ascii(value)) for name, value in vm.parameters.items()),
        ("metadata", "public-ipv4", static_nat_ip or nic.ip),
        ("metadata", "public-hostname", static_nat_ip),
        ("metadata", "instance-id", vm.uuid),
        ("metadata", "vm-id", vm.uuid),
        ("metadata", "public-keys", vm.public_key),
        ("metadata", "cloud-identifier", vm.cloud_identifier),
    ]
    if password and vm.windows:
        digest = hashlib.md5(password.encode()).hexdigest().lstrip("0")
        entries.append(("password", "vm-password-md5checksum", digest))
    if password:
        entries.append(("password", "vm_password", password))
    entries.append(("metadata", "hypervisor-host-name", vm.hypervisor))
    if vm.domain:
        entries += [("metadata", "cloud-domain", vm.domain), ("metadata", "cloud-domain-id", vm.domain_uuid)]
    if vm.cloud_name:
        entries.append(("metadata", "cloud-name", vm.cloud_name))
    return [{"dir": folder, "file": name, "content": content} for folder, name, content in entries]


def _as_ascii(text: str) -> str:
    """Replace each non-ASCII letter by an escape of six characters, as CloudStack does for these values."""
    return "".join(letter if ord(letter) < 128 else f"\\u{ord(letter):04X}" for letter in text)


def netmask(cidr: str) -> str:
    return str(ipaddress.ip_network(cidr).netmask)


def first_address(cidr: str) -> str:
    return str(ipaddress.ip_network(cidr)[1])
