"""A VPC begins, changes the address that it leaves by, and ends with all that is in it."""

from __future__ import annotations

from msgspec.structs import replace

from netloom.commands.nat import with_source_nat
from netloom.commands.transition import Context
from netloom.protocol.vpc import DestroyVpc, ImplementVpc, ShutdownVpc, UpdateVpcSourceNatIp
from netloom.state import Scope


def implement_vpc(scope: Scope, payload: ImplementVpc, context: Context) -> Scope:
    """The VPC stands, and leaves by the address of the call, if there is one; the first tier brings it otherwise.

    On a living VPC nothing else changes: a restart with cleanup sends this once or twice and implements no tier again.
    """
    scope = replace(scope, vpc_implemented=True, vpc_cidr=",".join(map(str, payload.vpc_cidr)) or scope.vpc_cidr)
    return with_source_nat(scope, payload) if payload.public_ip else scope


def update_vpc_source_nat_ip(scope: Scope, payload: UpdateVpcSourceNatIp, context: Context) -> Scope:
    """The VPC leaves by this address alone. The former one is an address like any other, with what it leads to."""
    return with_source_nat(scope, payload)


def shutdown_vpc(scope: Scope, payload: ShutdownVpc, context: Context) -> Scope | None:
    """Nothing of the VPC is left: no release-ip comes for its addresses, and its tiers cannot stand without it."""
    return None  # guard: a-vpc-ends-with-its-tiers


def destroy_vpc(scope: Scope, payload: DestroyVpc, context: Context) -> Scope | None:
    """The same as shutdown-vpc, which left nothing behind."""
    return None
