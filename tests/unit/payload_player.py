"""Apply commands to scopes without a host: from the client's payload files, or from single fields."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from netloom.commands import Context, Transitioned, apply, check_payload, decode
from netloom.protocol.envelope import read_envelope, scope_id_of
from netloom.state import Network, Scope
from netloom.wire import Registration

PAYLOADS = Path(__file__).parents[1] / "payloads"
OURS = Registration(owner="zone-a", guest_nic="eth1", public_nic="eth2")


def play(scope: Scope | None, name: str, registration: Registration = OURS) -> Transitioned:
    """Apply the command of a payload file to ``scope``. ``name`` is the number in the file's name."""
    (file,) = PAYLOADS.glob(f"{name}-*.json")
    command = {it["file"]: it["command"] for it in json.loads((PAYLOADS / "index.json").read_text())}[file.name]
    envelope = read_envelope(file.read_bytes(), command)
    context = Context(scope_id=scope_id_of(command, envelope.payload), registration=registration)
    return apply(command, scope, check_payload(command, envelope.payload), context)


def call(
    scope: Scope | None, command: str, registration: Registration = OURS, scope_id: str = "net-204", **fields: Any
) -> Transitioned:
    payload = decode(command, json.dumps({"network_id": "204", **fields}).encode())
    return apply(command, scope, payload, Context(scope_id=scope_id, registration=registration))


def implement(scope: Scope | None = None, registration: Registration = OURS, **fields: Any) -> Transitioned:
    good = {"vlan": "1204", "gateway": "10.10.1.1", "cidr": "10.10.1.0/24", "extension_ip": "10.10.1.1"}
    return call(scope, "implement-network", registration, **{**good, **fields})


def network(outcome: Transitioned) -> Network:
    assert outcome.scope is not None
    return outcome.scope.networks["204"]
