"""Calls as values for the laws of the commands: (command, payload), applied to a scope without a host.

Payloads come from small pools, so that random walks return to the same objects.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from typing import Any

import msgspec
from hypothesis import strategies as st

from netloom.commands import Context, apply, decode
from netloom.errors import NetloomError
from netloom.secret import enc_hook
from netloom.state import Scope
from netloom.wire import Registration

OURS = Context(scope_id="net-204", registration=Registration(owner="zone-a"))
Call = tuple[str, dict[str, Any]]
# Few values, so that calls of a walk concern the same objects, and few wrong ones, so that most calls succeed. .2 and
# .20 share a textual prefix; one guest is outside the network. Payloads are built in advance, because drawing one value
# per call is fast.
ADDRESSES = ("203.0.113.2", "203.0.113.20", "203.0.113.21")
GUESTS = ("10.10.1.45", "10.10.1.4", "10.10.1.45", "10.10.1.4", "10.10.2.45")
PORTS = ("22", "80", "8080-8090", "8085", "8090-8100", "8000:8090")
NETWORK = {
    "network_id": "204",
    "vlan": "1204",
    "gateway": "10.10.1.1",
    "cidr": "10.10.1.0/24",
    "network_state": "implemented",
}
IMPLEMENTS = [
    {**NETWORK, "vlan": vlan, "extension_ip": device}
    for vlan, device in product(("1204", "1377", "", "untagged", "1204", "5001"), ("10.10.1.1", "", "10.10.1.2"))
]
PUBLIC = [
    {
        **NETWORK,
        "public_ip": address,
        "public_vlan": vlan,
        "public_gateway": gateway,
        "public_cidr": "203.0.113.0/24",
        "source_nat": source_nat,
    }
    for address, vlan, gateway, source_nat in product(
        ADDRESSES, ("vlan://101", "102", "vlan://untagged"), ("203.0.113.1", "203.0.113.9", ""), ("true", "false")
    )
]


def some(commands: Sequence[str], payloads: Sequence[dict[str, Any]]) -> st.SearchStrategy[Call]:
    return st.tuples(st.sampled_from(commands), st.sampled_from(payloads))


def carry_out(scope: Scope | None, call: Call, context: Context = OURS) -> Scope | None:
    """Apply a call; returns the scope after it. A call that raises NetloomError leaves the scope unchanged."""
    command, payload = call
    try:
        return apply(command, scope, decode(command, json.dumps(payload).encode()), context).scope
    except NetloomError:
        return scope


def text(scope: Scope | None) -> bytes:
    return msgspec.json.encode(scope, enc_hook=enc_hook, order="sorted")


def content(scope: Scope | None) -> Scope | None:
    return scope and msgspec.structs.replace(scope, revision=0)
