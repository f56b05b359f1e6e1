"""The table of the protocol's commands, one row per command, and their execution on a scope."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from netloom.commands import acl, asked, dhcp, dns, firewall, lb, nat, network, nic, pbr, restore, userdata, vpc
from netloom.commands.asked import Asked
from netloom.commands.transition import (
    Context,
    Transitioned,
    for_known_network,
    for_network,
    is_shutting_down,
    new_scope,
    with_registration,
)
from netloom.errors import BadRequest, ForeignScope
from netloom.names import scope_of
from netloom.protocol.acl import ApplyNetworkAcl
from netloom.protocol.custom import CustomAction
from netloom.protocol.dhcp import AddDhcpEntry, ConfigDhcpSubnet, RemoveDhcpEntry, RemoveDhcpSubnet, SetDhcpOptions
from netloom.protocol.dns import AddDnsEntry, ConfigDnsSubnet, RemoveDnsEntry, RemoveDnsSubnet
from netloom.protocol.firewall import ApplyFwRules
from netloom.protocol.lb import ApplyLbRules
from netloom.protocol.nat import AddPortForward, AddStaticNat, AssignIp, DeletePortForward, DeleteStaticNat, ReleaseIp
from netloom.protocol.network import DestroyNetwork, EnsureNetworkDevice, ImplementNetwork, ShutdownNetwork
from netloom.protocol.nic import PrepareNic, ReleaseNic
from netloom.protocol.reader import convert, load_object
from netloom.protocol.restore import RestoreNetwork
from netloom.protocol.scalars import quoted
from netloom.protocol.userdata import SaveHypervisorHostname, SavePassword, SaveSshkey, SaveUserdata, SaveVmData
from netloom.protocol.vpc import DestroyVpc, ImplementVpc, ShutdownVpc, UpdateVpcSourceNatIp
from netloom.state import Scope

P = TypeVar("P", bound=msgspec.Struct)

# When the scope does not exist yet: ``builds`` creates it; ``removes`` succeeds and does nothing; ``acts`` creates
# nothing and returns output. ``extension``: the management server answers, without a host. Only ``builds`` installs the
# program on a host (``only_removes``, extension/request.py).
Kind = Literal["builds", "removes", "acts", "extension"]


class Row(msgspec.Struct, Generic[P], frozen=True):
    """One command.

    ``payload``: the type of its payload. ``transition``: its effect on the scope; None: no host executes it.
    ``output``: what it prints; None: nothing. ``asks``: what it asks of the services. The type parameter makes a row a
    type error if its functions take another payload.
    """

    name: str
    kind: Kind
    payload: type[P]
    transition: Callable[[Scope, P, Context], Scope | None] | None = None
    output: Callable[[Scope, P, Context], str] | None = None
    asks: Asked | Callable[[P], Asked] = asked.NOTHING


# Without an annotation, so that mypy checks each row with its own payload type. TABLE has ``Row[Any]``.
_ROWS = (
    Row("ensure-network-device", "extension", EnsureNetworkDevice),
    Row(
        "implement-network",
        "builds",
        ImplementNetwork,
        network.implement_network,
    ),
    Row("shutdown-network", "removes", ShutdownNetwork, network.shutdown_network, asks=asked.NO_NETWORK),
    Row("destroy-network", "removes", DestroyNetwork, network.destroy_network, asks=asked.NO_NETWORK),
    Row("implement-vpc", "builds", ImplementVpc, vpc.implement_vpc),
    Row("shutdown-vpc", "removes", ShutdownVpc, vpc.shutdown_vpc),
    Row("destroy-vpc", "removes", DestroyVpc, vpc.destroy_vpc),
    Row("update-vpc-source-nat-ip", "builds", UpdateVpcSourceNatIp, vpc.update_vpc_source_nat_ip),
    Row("assign-ip", "builds", AssignIp, nat.assign_ip),
    Row("release-ip", "removes", ReleaseIp, nat.release_ip),
    Row("add-static-nat", "builds", AddStaticNat, nat.add_static_nat),
    Row("delete-static-nat", "removes", DeleteStaticNat, nat.delete_static_nat),
    Row("add-port-forward", "builds", AddPortForward, nat.add_port_forward),
    Row("delete-port-forward", "removes", DeletePortForward, nat.delete_port_forward),
    Row("apply-fw-rules", "builds", ApplyFwRules, firewall.apply_fw_rules),
    Row("apply-network-acl", "builds", ApplyNetworkAcl, acl.apply_network_acl),
    Row("prepare-nic", "builds", PrepareNic, for_network(nic.prepare_nic)),
    Row("release-nic", "removes", ReleaseNic, for_known_network(nic.release_nic)),
    Row("add-dhcp-entry", "builds", AddDhcpEntry, for_network(dhcp.add_dhcp_entry), asks=asked.LEASES),
    Row("remove-dhcp-entry", "removes", RemoveDhcpEntry, for_known_network(dhcp.remove_dhcp_entry), asks=asked.NO_VM),
    Row("config-dhcp-subnet", "builds", ConfigDhcpSubnet, for_network(dhcp.config_dhcp_subnet), asks=asked.LEASES),
    Row(
        "remove-dhcp-subnet",
        "removes",
        RemoveDhcpSubnet,
        for_known_network(dhcp.remove_dhcp_subnet),
        asks=asked.NO_LEASES,
    ),
    Row("set-dhcp-options", "builds", SetDhcpOptions, dhcp.set_dhcp_options, asks=asked.LEASES),
    Row("add-dns-entry", "builds", AddDnsEntry, for_network(dns.add_dns_entry), asks=asked.NAMES),
    Row("remove-dns-entry", "removes", RemoveDnsEntry, for_known_network(dns.remove_dns_entry), asks=asked.NO_NAMES),
    Row("config-dns-subnet", "builds", ConfigDnsSubnet, for_network(dns.config_dns_subnet), asks=asked.NAMES),
    Row("remove-dns-subnet", "removes", RemoveDnsSubnet, for_known_network(dns.remove_dns_subnet), asks=asked.NO_NAMES),
    Row("save-vm-data", "builds", SaveVmData, for_network(userdata.save_vm_data), asks=asked.METADATA),
    Row("save-password", "builds", SavePassword, for_network(userdata.save_password), asks=asked.METADATA),
    Row("save-userdata", "builds", SaveUserdata, for_network(userdata.save_userdata), asks=asked.METADATA),
    Row("save-sshkey", "builds", SaveSshkey, for_network(userdata.save_sshkey), asks=asked.METADATA),
    Row(
        "save-hypervisor-hostname",
        "builds",
        SaveHypervisorHostname,
        for_network(userdata.save_hypervisor_hostname),
        asks=asked.METADATA,
    ),
    Row("apply-lb-rules", "builds", ApplyLbRules, lb.apply_lb_rules, asks=asked.balancing),
    Row("restore-network", "builds", RestoreNetwork, restore.restore, asks=asked.restored),
    Row("custom-action", "acts", CustomAction, pbr.transition, output=pbr.output),
)

TABLE: dict[str, Row[Any]] = {row.name: row for row in _ROWS}


def row_of(command: str) -> Row[Any]:
    """The row of ``command``. Raises BadRequest if the protocol has no such command."""
    row = TABLE.get(command)
    if row is None:
        raise BadRequest(f"{quoted(command)} is not a command of the Network Extension Script Protocol")
    return row


def only_removes(command: str, payload: msgspec.Struct) -> bool:
    """Whether the call creates nothing where its scope does not exist: it removes, or CloudStack ends the network."""
    kind = row_of(command).kind
    return kind == "removes" or (kind == "builds" and is_shutting_down(payload))


def decode(command: str, payload: bytes) -> msgspec.Struct:
    """Parse and check the JSON text of a payload. Raises BadRequest with the path of the field."""
    return check_payload(command, load_object(payload, root="payload"))


def check_payload(command: str, payload: dict[str, Any]) -> msgspec.Struct:
    """Check a payload that is already parsed (``Envelope.payload``). Raises BadRequest with the path of the field.

    A command that removes ignores fields that cannot be read: nothing was ever stored under such a value.
    """
    row = row_of(command)
    shape: type[msgspec.Struct] = row.payload
    try:
        return convert(payload, shape, root="payload")
    except BadRequest:
        if row.kind != "removes":
            raise
    return convert(_readable_fields(payload, shape), shape, root="payload")  # guard: a-removal-reads-what-it-can


def _readable_fields(payload: dict[str, Any], shape: type[msgspec.Struct]) -> dict[str, Any]:
    """The fields of a payload that can be read, and the ids of its scope, whose errors remain errors."""
    ids: dict[str, Any] = {key: payload[key] for key in ("network_id", "vpc_id") if key in payload}
    readable: dict[str, Any] = dict(ids)
    for key, value in payload.items():
        with contextlib.suppress(BadRequest):
            convert({**ids, key: value}, shape, root="payload")
            readable[key] = value
    return readable


def apply(command: str, scope: Scope | None, payload: msgspec.Struct, context: Context) -> Transitioned:
    """Apply ``command`` to ``scope``; None means that the scope does not exist.

    The revision increases by one if the scope changes. Raises BadRequest, or ForeignScope if the scope has another
    owner.
    """
    row = row_of(command)
    check_scope(command, scope, payload, context)
    if row.transition is None:
        raise BadRequest(f"{command}: answered where CloudStack runs, not on a host")
    if scope is None:
        if only_removes(command, payload):
            return Transitioned(scope=None)
        scope = new_scope(context)
    wanted = row.transition(with_registration(scope, context.registration), payload, context)
    if wanted is None:
        return Transitioned(scope=None)
    wanted = nat.without_unused(wanted)  # guard: a-former-source-nat-address-goes
    if not is_shutting_down(payload):
        wanted = nat.with_unassigned_told(wanted)  # guard: rules-without-their-address-are-told
    if wanted != scope:
        wanted = replace(wanted, revision=scope.revision + 1)
    output = row.output(wanted, payload, context) if row.output else ""
    return Transitioned(scope=wanted if wanted.revision else None, output=output)


def asked_of_services(command: str, payload: msgspec.Struct) -> Asked:
    """What the command asks of the services of its network."""
    asks = row_of(command).asks
    return asks if isinstance(asks, Asked) else asks(payload)


def check_scope(command: str, scope: Scope | None, payload: msgspec.Struct, context: Context) -> None:
    """Raise BadRequest if the payload names another scope, ForeignScope if the scope has another owner."""
    named = scope_of(getattr(payload, "network_id", ""), getattr(payload, "vpc_id", ""))
    if named != context.scope_id:
        raise BadRequest(f"{command}: the payload is about {named}, the call about {context.scope_id}")
    if scope is not None and scope.owner != context.registration.owner:
        raise ForeignScope(
            f"{context.scope_id} belongs to {scope.owner!r}, not to {context.registration.owner!r}",
            hint="use another host, or give both registrations the same detail owner",
        )
