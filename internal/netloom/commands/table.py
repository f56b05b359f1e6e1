"""Every command of the protocol, a row each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from netloom.commands import acl as acls
from netloom.commands import dhcp as leases
from netloom.commands import dns as names_of
from netloom.commands import firewall, nat, network
from netloom.commands import lb as balancer
from netloom.commands import nic as nics
from netloom.commands import pbr as policy
from netloom.commands import restore as restoring
from netloom.commands import userdata as vm
from netloom.commands import vpc as vpcs
from netloom.commands.transition import (
    Context,
    PartlyDone,
    Transitioned,
    for_known_network,
    for_network,
    new_scope,
    with_registration,
)
from netloom.errors import BadRequest, ForeignScope
from netloom.names import scope_of
from netloom.protocol import acl, custom, dhcp, dns, lb, nic, restore, userdata, vpc
from netloom.protocol import firewall as fw
from netloom.protocol import nat as address
from netloom.protocol import network as net
from netloom.protocol.reader import convert, read
from netloom.protocol.scalars import quoted
from netloom.state import Scope

P = TypeVar("P", bound=msgspec.Struct)

# builds: on nothing it begins a scope. removes: on nothing it succeeds, and builds nothing. acts: on nothing it builds
# nothing either, and has something to say. extension: answered where CloudStack runs, never on a host.
Kind = Literal["builds", "removes", "acts", "extension"]


class Row(msgspec.Struct, Generic[P], frozen=True):
    """One command: its payload's shape, what it means (None: no host does it), and what it prints (None: nothing).

    The type parameter ties them together, so a row whose function takes another payload is a type error.
    """

    name: str
    kind: Kind
    payload: type[P]
    transition: Callable[[Scope, P, Context], Scope | None] | None = None
    output: Callable[[Scope, P, Context], str] | None = None


# Without an annotation: each row is checked as what it is, and only the table below forgets the difference.
_ROWS = (
    Row("ensure-network-device", "extension", net.EnsureNetworkDevice),
    Row(
        "implement-network",
        "builds",
        net.ImplementNetwork,
        network.implement_network,
        output=network.implemented_output,
    ),
    Row("shutdown-network", "removes", net.ShutdownNetwork, network.shutdown_network),
    Row("destroy-network", "removes", net.DestroyNetwork, network.destroy_network),
    Row("implement-vpc", "builds", vpc.ImplementVpc, vpcs.implement_vpc),
    Row("shutdown-vpc", "removes", vpc.ShutdownVpc, vpcs.shutdown_vpc),
    Row("destroy-vpc", "removes", vpc.DestroyVpc, vpcs.destroy_vpc),
    Row("update-vpc-source-nat-ip", "builds", vpc.UpdateVpcSourceNatIp, vpcs.update_vpc_source_nat_ip),
    Row("assign-ip", "builds", address.AssignIp, nat.assign_ip),
    Row("release-ip", "removes", address.ReleaseIp, nat.release_ip),
    Row("add-static-nat", "builds", address.AddStaticNat, nat.add_static_nat),
    Row("delete-static-nat", "removes", address.DeleteStaticNat, nat.delete_static_nat),
    Row("add-port-forward", "builds", address.AddPortForward, nat.add_port_forward),
    Row("delete-port-forward", "removes", address.DeletePortForward, nat.delete_port_forward),
    Row("apply-fw-rules", "builds", fw.ApplyFwRules, firewall.apply_fw_rules),
    Row("apply-network-acl", "builds", acl.ApplyNetworkAcl, acls.apply_network_acl),
    Row("prepare-nic", "builds", nic.PrepareNic, for_network(nics.prepare_nic)),
    Row("release-nic", "removes", nic.ReleaseNic, for_known_network(nics.release_nic)),
    Row("add-dhcp-entry", "builds", dhcp.AddDhcpEntry, for_network(leases.add_dhcp_entry)),
    Row("remove-dhcp-entry", "removes", dhcp.RemoveDhcpEntry, for_known_network(leases.remove_dhcp_entry)),
    Row("config-dhcp-subnet", "builds", dhcp.ConfigDhcpSubnet, for_network(leases.config_dhcp_subnet)),
    Row("remove-dhcp-subnet", "removes", dhcp.RemoveDhcpSubnet, for_known_network(leases.remove_dhcp_subnet)),
    Row("set-dhcp-options", "builds", dhcp.SetDhcpOptions, leases.set_dhcp_options),
    Row("add-dns-entry", "builds", dns.AddDnsEntry, for_network(names_of.add_dns_entry)),
    Row("remove-dns-entry", "removes", dns.RemoveDnsEntry, for_known_network(names_of.remove_dns_entry)),
    Row("config-dns-subnet", "builds", dns.ConfigDnsSubnet, for_network(names_of.config_dns_subnet)),
    Row("remove-dns-subnet", "removes", dns.RemoveDnsSubnet, for_known_network(names_of.remove_dns_subnet)),
    Row("save-vm-data", "builds", userdata.SaveVmData, for_network(vm.save_vm_data)),
    Row("save-password", "builds", userdata.SavePassword, for_network(vm.save_password)),
    Row("save-userdata", "builds", userdata.SaveUserdata, for_network(vm.save_userdata)),
    Row("save-sshkey", "builds", userdata.SaveSshkey, for_network(vm.save_sshkey)),
    Row(
        "save-hypervisor-hostname",
        "builds",
        userdata.SaveHypervisorHostname,
        for_network(vm.save_hypervisor_hostname),
    ),
    Row("apply-lb-rules", "builds", lb.ApplyLbRules, balancer.apply_lb_rules),
    Row("restore-network", "builds", restore.RestoreNetwork, for_network(restoring.restore_network)),
    Row("custom-action", "acts", custom.CustomAction, policy.transition, output=policy.output),
)

TABLE: dict[str, Row[Any]] = {row.name: row for row in _ROWS}


def row_of(command: str) -> Row[Any]:
    """The row of ``command``. Raises BadRequest for a word that is not in the protocol."""
    row = TABLE.get(command)
    if row is None:
        raise BadRequest(f"{quoted(command)} is not a command of the Network Extension Script Protocol")
    return row


def decode(command: str, payload: bytes) -> msgspec.Struct:
    """Parses and checks the JSON text of a payload. Raises BadRequest with the path of the field."""
    shape: type[msgspec.Struct] = row_of(command).payload
    return read(payload, shape)


def check_payload(command: str, payload: dict[str, Any]) -> msgspec.Struct:
    """Checks a payload that is parsed already (``Envelope.payload``). Raises BadRequest with the path of the field."""
    shape: type[msgspec.Struct] = row_of(command).payload
    return convert(payload, shape, root="payload")


def apply(command: str, scope: Scope | None, payload: msgspec.Struct, context: Context) -> Transitioned:
    """The scope after ``command``; None stands for nothing at all.

    The revision grows by one when something changed, and not otherwise. Raises BadRequest or
    ForeignScope, and then nothing has changed.
    """
    row = row_of(command)
    check_scope(command, scope, payload, context)
    if row.transition is None:
        raise BadRequest(f"{command}: answered where CloudStack runs, not on a host")
    if scope is None:
        if row.kind == "removes" or (row.kind == "builds" and _is_shutting_down(payload)):
            return Transitioned(scope=None)
        scope = new_scope(context)
    refused = None
    try:
        wanted = row.transition(with_registration(scope, context.registration), payload, context)
    except PartlyDone as partly:
        wanted, refused = partly.scope, partly
    if wanted is None:
        return Transitioned(scope=None)
    if wanted != scope:
        wanted = replace(wanted, revision=scope.revision + 1)
    output = row.output(wanted, payload, context) if row.output else ""
    return Transitioned(scope=wanted if wanted.revision else None, output=output, refused=refused)


def check_scope(command: str, scope: Scope | None, payload: msgspec.Struct, context: Context) -> None:
    """Raises BadRequest when the payload is about another scope, ForeignScope when the scope is somebody else's."""
    named = scope_of(getattr(payload, "network_id", ""), getattr(payload, "vpc_id", ""))
    if named != context.scope_id:
        raise BadRequest(f"{command}: the payload is about {named}, the call about {context.scope_id}")
    if scope is not None and scope.owner != context.registration.owner:
        raise ForeignScope(
            f"{context.scope_id} belongs to {scope.owner!r}, not to {context.registration.owner!r}",
            hint="use another host, or give both registrations the same detail owner",
        )


def _is_shutting_down(payload: msgspec.Struct) -> bool:
    """Whether CloudStack is taking the network down: the rules that it still lists then are not to begin anything."""
    return getattr(payload, "network_state", "") in ("shutdown", "destroy")
