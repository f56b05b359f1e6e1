"""A scope as text for people: its firewall and translations, its NICs, and its state without secrets.

Each line is complete in itself, so that lines can be filtered by a text. The same state gives the same lines.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from netloom import names
from netloom.render import ip6
from netloom.render.acl import acl_of
from netloom.render.active import Active, active, as_number
from netloom.render.guest import tables
from netloom.render.pbr import in_force
from netloom.state import PROTOCOLS_WITH_PORTS, AclItem, FirewallRule, LbRule, Network, Nic, Ports, Scope

# Metadata items that CloudStack writes itself. Other items contain names and values of tenants, so they are not shown.
_SHOWN = frozenset(
    {
        "availability-zone",
        "cloud-domain",
        "cloud-domain-id",
        "cloud-identifier",
        "cloud-name",
        "hypervisor-host-name",
        "instance-id",
        "local-hostname",
        "local-ipv4",
        "public-hostname",
        "public-ipv4",
        "service-offering",
        "vm-id",
    }
)


def segment_name(vlan: str) -> str:
    """A segment for people: ``VLAN 101``, ``VLAN untagged``, ``VXLAN 1000``."""
    is_vxlan = vlan.startswith(names.VXLAN)
    return f"VXLAN {vlan.removeprefix(names.VXLAN)}" if is_vxlan else f"VLAN {vlan or 'unknown'}"


def firewall(scope: Scope) -> list[str]:
    """Ingress, egress, source NAT, static NAT, port forwards and load balancing, one line for each.

    Rules that differ only in their ports share a line. A line that is in the state but not in force says so.
    """
    now = active(scope)
    lines: list[str] = []
    for network in _in_order(scope):
        lines += _acl(scope, network) if scope.is_vpc else _ingress(scope, network, now)
    for network in _in_order(scope):
        lines += _egress(network) if network.firewall or not scope.is_vpc else []
    if now.source_nat is not None:
        lines += [f"source-nat {it.cidr} leaves as {now.source_nat.address}" for it in now.networks]
    effective_nats = {it.public_ip for it in now.static_nats}
    for nat in sorted(scope.static_nats.values(), key=lambda it: as_number(it.public_ip)):
        lines.append(
            f"static-nat {nat.public_ip} <-> {nat.private_ip}{_in_force_note(nat.public_ip in effective_nats)}"
        )
    effective_forwards = {it.key for it in now.port_forwards}
    forwards = sorted(scope.port_forwards.values(), key=lambda it: (as_number(it.public_ip), it.public_ports, it.key))
    for forward in forwards:
        public = f"{forward.public_ip} {forward.protocol} {forward.public_ports}"
        note = _in_force_note(forward.key in effective_forwards)
        lines.append(f"port-forward {public} -> {forward.private_ip} {forward.private_ports}{note}")
    held = {it.address for it in now.held}
    lines += [_balanced(it, held) for _, it in sorted(scope.lb_rules.items(), key=lambda item: (len(item[0]), item[0]))]
    return lines


def leases(scope: Scope) -> list[str]:
    """The NICs of every network, by address, with the services that they get."""
    leased = {(table.network_id, it.nic) for table in tables(scope) for it in table.nics if it.dhcp}
    return [
        _nic(network, it, leased=(network.network_id, it.key) in leased)
        for network in _in_order(scope)
        for it in sorted(network.nics.values(), key=lambda it: (_number(it.ip), it.key))
    ]


def pbr_tables(scope: Scope) -> list[str]:
    """The operator's route tables."""
    return [f"table {it}" for it in scope.pbr.tables]


def pbr_routes(scope: Scope) -> list[str]:
    """The routes in the operator's tables."""
    now = active(scope)
    return [f"{it} table {scope.pbr.name_of(it.table)}{_in_force_note(in_force(it, now))}" for it in scope.pbr.routes]


def pbr_rules(scope: Scope) -> list[str]:
    """The operator's rules that select a table, in the order in which the kernel tries them."""
    return [f"{it.priority}: {it.selector} lookup {scope.pbr.name_of(it.table)}" for it in scope.pbr.rules]


def summary(scope: Scope) -> list[str]:
    """The scope's networks, public addresses, and numbers of rules."""
    lines = [f"scope {scope.scope_id}, owner {scope.owner}, revision {scope.revision}"]
    for network in _in_order(scope):
        services = [name for name, enabled in (("DHCP", network.dhcp), ("DNS", network.dns)) if enabled]
        lines.append(
            f"network {network.network_id}: {network.guest_type}, "
            f"{'implemented' if network.implemented else 'not implemented'}, "
            f"{segment_name(network.vlan)} of {scope.uplinks.guest}, {network.cidr or 'no subnet'}, "
            f"gateway {network.gateway or 'none'}, {len(network.nics)} NICs{''.join(f', {it}' for it in services)}"
            f"{f', IPv6 {network.ip6_cidr}' if network.ip6_cidr else ''}"
        )
    for ip in sorted(scope.public_ips.values(), key=lambda it: as_number(it.address)):
        kind = " (source NAT)" if ip.source_nat else ""
        lines.append(
            f"public address {ip.address}{kind}: {segment_name(ip.vlan)} of {scope.uplinks.public}, exit {ip.exit}"
        )
    if (out := ip6.default_route(scope, active(scope))) is not None:
        lines.append(f"IPv6 leaves as {out.address} through {out.gateway}")
    rules = sum(len(it.firewall.rules) for it in scope.networks.values() if it.firewall)
    lines.append(
        f"{rules} firewall rules, {len(scope.port_forwards)} port forwards, {len(scope.static_nats)} static NATs, "
        f"{len(scope.lb_rules)} load balancing rules"
    )
    return lines


def state(scope: Scope) -> list[str]:
    """The state as indented JSON. Passwords are ``***``; user data and tenants' own items are shown by size."""
    document: dict[str, Any] = msgspec.to_builtins(scope, enc_hook=lambda _: "***")
    for network_id, network in scope.networks.items():
        for key, nic in network.nics.items():
            shown = document["networks"][network_id]["nics"][key]
            if nic.user_data is not None:
                shown["user_data"] = _size(nic.user_data.reveal())
            shown["metadata"] = {
                item: value if item in _SHOWN else _size(value) for item, value in sorted(nic.metadata.items())
            }
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode().splitlines()


def _ingress(scope: Scope, network: Network, now: Active) -> list[str]:
    if scope.ingress_open:
        return ["ingress any: allow (the registration says firewall=absent)"]
    if network.firewall is None:
        return [f"ingress of network {network.network_id}: deny (no firewall rules received yet)"]
    lines = []
    for rule, ports in _grouped(it for it in network.firewall.rules if it.direction == "ingress"):
        where = rule.public_ip or "any address"
        source = f"from {_any_or(rule.source_cidrs)}"
        lines.append(
            f"ingress {where} {_rule_match(rule, ports)} {source}: allow{_in_force_note(rule.public_ip in now.ingress)}"
        )
    return [*lines, "ingress anything else: deny"]


def _acl(scope: Scope, network: Network) -> list[str]:
    """A tier's access control list, in order."""
    acl = acl_of(network, open_without=scope.ingress_open)
    lines = [
        f"acl of tier {network.network_id}, {it.direction} {it.number}: {it.action} {_item_match(it)} "
        f"{'from' if it.direction == 'ingress' else 'to'} {_any_or(it.cidrs)}"
        for it in (*acl.ingress, *acl.egress)
    ]
    why = " (no list received yet)" if network.acl is None else ""
    for direction, allowed in (("ingress", acl.ingress_default_allow), ("egress", acl.egress_default_allow)):
        lines.append(
            f"acl of tier {network.network_id}, {direction}, anything else: {'allow' if allowed else 'deny'}{why}"
        )
    return lines


def _item_match(item: AclItem) -> str:
    if item.ports is not None:
        return f"{item.protocol} {item.ports}"
    if item.icmp_type is not None:
        code = "" if item.icmp_code is None else f" code {item.icmp_code}"
        return f"icmp type {item.icmp_type}{code}"
    return f"protocol {item.protocol}" if item.protocol.isdigit() else item.protocol


def _egress(network: Network) -> list[str]:
    if network.firewall is None:
        return [f"egress of network {network.network_id}: allow (no firewall rules received yet)"]
    listed, default = ("deny", "allow") if network.firewall.default_egress_allow else ("allow", "deny")
    lines = []
    for rule, ports in _grouped(it for it in network.firewall.rules if it.direction == "egress"):
        addresses = f"from {_any_or(rule.source_cidrs)} to {_any_or(rule.dest_cidrs)}"
        lines.append(f"egress {_rule_match(rule, ports)} {addresses}: {listed}")
    return [*lines, f"egress of network {network.network_id}, anything else: {default}"]


def _grouped(rules: Iterable[FirewallRule]) -> list[tuple[FirewallRule, list[Ports]]]:
    groups: dict[FirewallRule, list[Ports]] = {}
    for rule in rules:
        ports = groups.setdefault(msgspec.structs.replace(rule, rule_id=0, ports=None), [])
        # A rule without ports applies to all ports.
        ports.append(rule.ports or Ports(0, 65535))
    ordered = [(rule, sorted(set(ports))) for rule, ports in groups.items()]
    ordered.sort(key=lambda it: (_number(it[0].public_ip), it[0].protocol, it[1], str(it[0])))
    return ordered


def _rule_match(rule: FirewallRule, ports: list[Ports]) -> str:
    if rule.protocol in PROTOCOLS_WITH_PORTS:
        return f"{rule.protocol} {'any' if Ports(0, 65535) in ports else ','.join(map(str, ports))}"
    if rule.protocol == "icmp" and rule.icmp_type is not None and rule.icmp_type >= 0:
        code = "" if rule.icmp_code is None or rule.icmp_code < 0 else f" code {rule.icmp_code}"
        return f"icmp type {rule.icmp_type}{code}"
    return rule.protocol


def _balanced(rule: LbRule, held: set[str]) -> str:
    backends = ", ".join(f"{it.ip}:{it.port}" for it in sorted(rule.backends)) or "none"
    where = f"{rule.public_ip} {rule.protocol} {rule.public_port} {rule.algorithm}"
    return f"load-balancing {where} -> {backends}{_in_force_note(rule.public_ip in held)}"


def _nic(network: Network, nic: Nic, *, leased: bool) -> str:
    words = [
        "default" if nic.default else "secondary",
        *(["lease"] if leased else []),
        *(["names"] if nic.named and nic.hostname and network.dns and network.is_active else []),
        *(["user data"] if nic.user_data is not None else []),
        *(["password waiting"] if nic.password is not None else []),
    ]
    return f"network {network.network_id}: {nic.ip or '-'} {nic.mac} {nic.hostname or '-'}: {', '.join(words)}"


def _in_order(scope: Scope) -> list[Network]:
    return [network for _, network in sorted(scope.networks.items(), key=lambda item: int(item[0]))]


def _number(address: str) -> int:
    return as_number(address) if address else -1


def _any_or(cidrs: tuple[str, ...]) -> str:
    return ",".join(cidrs) or "any"


def _in_force_note(in_force: bool) -> str:
    return "" if in_force else " (not in force: the address or the network is not active)"


def _size(text: str) -> str:
    return f"({len(text.encode('utf-8', 'surrogatepass'))} bytes)"
