"""Every command of the protocol, a row each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from netloom.commands import firewall, nat, network
from netloom.commands.transition import Context, Outcome, blank, registered
from netloom.errors import BadRequest, ForeignScope, NotBuiltYet
from netloom.names import scope_of
from netloom.protocol import acl, custom, dhcp, dns, lb, nic, restore, userdata, vpc
from netloom.protocol import firewall as fw
from netloom.protocol import nat as address
from netloom.protocol import network as net
from netloom.protocol.reader import read
from netloom.protocol.scalars import quoted
from netloom.state import Scope

P = TypeVar("P", bound=msgspec.Struct)

# builds: on nothing it begins a scope. removes: on nothing it succeeds, and builds nothing. asks: changes nothing.
# extension: answered where CloudStack runs, never on a host.
Kind = Literal["builds", "removes", "asks", "extension"]


@dataclass(frozen=True)
class Row(Generic[P]):
    """One command: its payload's shape, what it means (None: not built yet), and what it prints (None: nothing).

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
    Row("implement-vpc", "builds", vpc.ImplementVpc),
    Row("shutdown-vpc", "removes", vpc.ShutdownVpc),
    Row("destroy-vpc", "removes", vpc.DestroyVpc),
    Row("update-vpc-source-nat-ip", "builds", vpc.UpdateVpcSourceNatIp),
    Row("assign-ip", "builds", address.AssignIp, nat.assign_ip),
    Row("release-ip", "removes", address.ReleaseIp, nat.release_ip),
    Row("add-static-nat", "builds", address.AddStaticNat, nat.add_static_nat),
    Row("delete-static-nat", "removes", address.DeleteStaticNat, nat.delete_static_nat),
    Row("add-port-forward", "builds", address.AddPortForward, nat.add_port_forward),
    Row("delete-port-forward", "removes", address.DeletePortForward, nat.delete_port_forward),
    Row("apply-fw-rules", "builds", fw.ApplyFwRules, firewall.apply_fw_rules),
    Row("apply-network-acl", "builds", acl.ApplyNetworkAcl),
    Row("prepare-nic", "builds", nic.PrepareNic),
    Row("release-nic", "removes", nic.ReleaseNic),
    Row("add-dhcp-entry", "builds", dhcp.AddDhcpEntry),
    Row("remove-dhcp-entry", "removes", dhcp.RemoveDhcpEntry),
    Row("config-dhcp-subnet", "builds", dhcp.ConfigDhcpSubnet),
    Row("remove-dhcp-subnet", "removes", dhcp.RemoveDhcpSubnet),
    Row("set-dhcp-options", "builds", dhcp.SetDhcpOptions),
    Row("add-dns-entry", "builds", dns.AddDnsEntry),
    Row("remove-dns-entry", "removes", dns.RemoveDnsEntry),
    Row("config-dns-subnet", "builds", dns.ConfigDnsSubnet),
    Row("remove-dns-subnet", "removes", dns.RemoveDnsSubnet),
    Row("save-vm-data", "builds", userdata.SaveVmData),
    Row("save-password", "builds", userdata.SavePassword),
    Row("save-userdata", "builds", userdata.SaveUserdata),
    Row("save-sshkey", "builds", userdata.SaveSshkey),
    Row("save-hypervisor-hostname", "builds", userdata.SaveHypervisorHostname),
    Row("apply-lb-rules", "builds", lb.ApplyLbRules),
    Row("restore-network", "builds", restore.RestoreNetwork),
    Row("custom-action", "asks", custom.CustomAction),
)

TABLE: dict[str, Row[Any]] = {row.name: row for row in _ROWS}


def row_of(command: str) -> Row[Any]:
    """The row of ``command``. Raises BadRequest for a word that is not in the protocol."""
    row = TABLE.get(command)
    if row is None:
        raise BadRequest(f"{quoted(command)} is not a command of the Network Extension Script Protocol")
    return row


def decode(command: str, payload: bytes) -> msgspec.Struct:
    """The payload of ``command``, checked. Raises BadRequest with the field's path."""
    shape: type[msgspec.Struct] = row_of(command).payload
    return read(payload, shape)


def apply(command: str, scope: Scope | None, payload: msgspec.Struct, context: Context) -> Outcome:
    """The scope after ``command``; None stands for nothing at all.

    The revision grows by one when something changed, and not otherwise. Raises BadRequest (NotBuiltYet among them)
    or ForeignScope, and then nothing has changed.
    """
    row = row_of(command)
    _check_scope(command, payload, context)
    if scope is not None and scope.owner != context.registration.owner:
        raise ForeignScope(
            f"{context.scope_id} belongs to {scope.owner!r}, not to {context.registration.owner!r}",
            hint="use another host, or give both registrations the same detail owner",
        )
    if row.kind == "extension":
        raise BadRequest(f"{command}: answered where CloudStack runs, not on a host")
    if row.transition is None:
        raise NotBuiltYet(f"{command}: this version of netloom does not carry it out yet")
    if scope is None:
        if row.kind != "builds" or _going(payload):
            return Outcome(scope=None)
        scope = blank(context)
    if row.kind == "builds" and context.scope_id.startswith("vpc-"):
        raise NotBuiltYet(f"{command}: this version of netloom does not carry out tiers of a VPC yet")
    wanted = row.transition(registered(scope, context.registration), payload, context)
    if wanted is None:
        return Outcome(scope=None)
    if wanted != scope:
        wanted = replace(wanted, revision=scope.revision + 1)
    return Outcome(scope=wanted, output=row.output(wanted, payload, context) if row.output else "")


def _check_scope(command: str, payload: msgspec.Struct, context: Context) -> None:
    named = scope_of(getattr(payload, "network_id", ""), getattr(payload, "vpc_id", ""))
    if named != context.scope_id:
        raise BadRequest(f"{command}: the payload is about {named}, the call about {context.scope_id}")


def _going(payload: msgspec.Struct) -> bool:
    """Whether CloudStack is taking the network down: the rules that it still lists then are not to begin anything."""
    return getattr(payload, "network_state", "") in ("shutdown", "destroy")
