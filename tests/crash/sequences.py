"""Sequences of calls that contain every command of the protocol: an isolated network, a VPC and a shared network.

A new command or a new verb of the agent is one more step. A step is a payload file, the command, and changed fields.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

from kernel.agent_host import PAYLOADS, REGISTRATION
from netloom.wire import Call

_ids = itertools.count()
_INDEX = {it["file"][:3]: it["command"] for it in json.loads((PAYLOADS / "index.json").read_text())}


@dataclass(frozen=True)
class Step:
    """One call. ``fixture``: the number of a payload file; empty: ``changes`` are the payload, for ``scope_id``.

    ``flows``: open connections that exist before the call, as arguments of ``conntrack -I`` in the scope's namespace.
    """

    fixture: str
    command: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    flows: tuple[str, ...] = ()
    scope_id: str = ""

    @property
    def name(self) -> str:
        return self.command or _INDEX[self.fixture]

    def call(self) -> Call:
        """The call, with an id of its own."""
        payload = dict(self.changes)
        if self.fixture:
            (file,) = PAYLOADS.glob(f"{self.fixture}-*.json")
            content = json.loads(file.read_bytes())
            payload = content.get("payload", content) | self.changes
        for details in ("physical-network-extension-details", "network-extension-details"):
            payload.pop(details, None)
        vpc = payload.get("vpc_id")
        return Call(
            call_id=f"crash-{next(_ids)}",
            command=self.name,
            scope_id=self.scope_id or (f"vpc-{vpc}" if vpc else f"net-{payload['network_id']}"),
            registration=REGISTRATION,
            payload=json.dumps(payload).encode(),
            remaining_ms=60_000,
        )


@dataclass(frozen=True)
class Sequence:
    """Calls for one scope in their order. ``last`` removes the scope at any time."""

    scope_id: str
    steps: tuple[Step, ...]
    last: Step

    @property
    def namespace(self) -> str:
        return f"cs-{self.scope_id}"


def steps(*fixtures: str | Step) -> tuple[Step, ...]:
    return tuple(it if isinstance(it, Step) else Step(it) for it in fixtures)


def action(name: str, params: dict[str, str] | None = None) -> Step:
    return Step("501", "custom-action", {"action": name, "action-params": params or {}})


VLANS = ("eth1.1204", "eth1.1377", "eth1.1205", "eth1.1310", "eth1.1311", "eth1.1410", "eth2.101")

_CLIENT = "-p tcp -s 198.51.100.9 --sport 40000 -t 3000 --state ESTABLISHED"
_FORWARDED = f"{_CLIENT} -d 203.0.113.21 --dport 2222 --dst-nat 10.10.1.45:22"
_STATIC = f"{_CLIENT} -d 203.0.113.22 --dport 443 --dst-nat 10.10.1.162"

ISOLATED = Sequence(
    "net-204",
    steps(
        "020", "021", "022", "030", "031", "032", "033", "034", "035", "090", "091", "092", "093", "600",
        "041", "050", "053", "057", "058", "070", "080",
        action("pbr-create-table", {"table-id": "101", "table-name": "backup"}), action("reboot-device"),
        "137", "110",
        Step("083", flows=(_FORWARDED,)),
        Step("056", flows=(_FORWARDED, _STATIC)),
        Step("059", flows=(_STATIC,)),
        "060", "072", "100", "102", "101",
        Step("312", changes={"network_id": "204", "vlan": "1204", "guest_type": "isolated"}),
        Step("313", changes={"network_id": "204", "vlan": "1204", "guest_type": "isolated"}),
        "136", "126", "131",
    ),
    Step("131"),
)  # fmt: skip

VPC = Sequence(
    "vpc-7",
    steps(
        "202", "210", "211", "212", "230", "220", "221", "222", "223", "224", "225", "226", "227", "228",
        "217", "234", "231", "229", "216", "232", "233",
        Step("235", "destroy-vpc"), "202", "235",
    ),
    Step("235"),
)  # fmt: skip

SHARED = Sequence(
    "net-410",
    steps("301", "302", "303", "304", "305", "306", "307", "308", "310", "311", "312", "313", "315", "316"),
    Step("316"),
)

# The network beside: nothing of it may change.
OTHER = "205"
_OTHER = {"network_id": OTHER, "vlan": "1205", "private_ip": "10.10.1.45"}
_ELSEWHERE = {**_OTHER, "public_ip": "203.0.113.50"}
BESIDE = (
    Step("020", changes=_OTHER),
    Step("021", changes=_ELSEWHERE),
    Step("030", changes=_OTHER),
    Step("031", changes=_OTHER),
    Step("032", changes=_OTHER),
    Step("034", changes=_OTHER),
    Step("035", changes=_OTHER),
    Step("053", changes=_ELSEWHERE),
)
