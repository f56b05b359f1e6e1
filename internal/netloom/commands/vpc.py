"""The commands about a VPC as a whole: create it, change its source-NAT address, delete it with its tiers."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.nat import with_source_nat
from netloom.commands.transition import Context
from netloom.protocol.vpc import DestroyVpc, ImplementVpc, ShutdownVpc, UpdateVpcSourceNatIp
from netloom.state import Scope


def implement_vpc(scope: Scope, payload: ImplementVpc, context: Context) -> Scope:
    """Create the VPC, with the source-NAT address of the call; without one, it comes with the first tier.

    For a VPC that exists nothing else changes: a restart with cleanup sends this once or twice, and does not implement
    the tiers again.
    """
    scope = replace(scope, vpc_implemented=True, vpc_cidr=",".join(map(str, payload.vpc_cidr)) or scope.vpc_cidr)
    return with_source_nat(scope, payload) if payload.public_ip else scope


def update_vpc_source_nat_ip(scope: Scope, payload: UpdateVpcSourceNatIp, context: Context) -> Scope:
    """Make this the only source-NAT address. The former one stays only while a rule uses it."""
    return with_source_nat(scope, payload)


def shutdown_vpc(scope: Scope, payload: ShutdownVpc, context: Context) -> Scope | None:
    """Delete the VPC with its addresses and tiers: CloudStack sends no release-ip for its addresses."""
    return None  # guard: a-vpc-ends-with-its-tiers


def destroy_vpc(scope: Scope, payload: DestroyVpc, context: Context) -> Scope | None:
    """Delete the VPC, as shutdown-vpc does."""
    return None
