"""The golden scenarios of the renderer: ``<name>/state.json`` in, ``ruleset.nft`` and ``want.txt`` out.

To write what the renderer says now, and read the difference before committing it:
``UPDATE_GOLDEN=1 pytest tests/golden``.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from netloom.render import ruleset
from netloom.render.scope import render
from netloom.render.want import Want
from netloom.state import Scope

GOLDEN = Path(__file__).parent
UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))


def scenarios() -> list[Path]:
    return sorted(it.parent for it in GOLDEN.glob("*/state.json"))


def load(scenario: Path) -> Scope:
    return msgspec.json.decode((scenario / "state.json").read_bytes(), type=Scope)


def texts(scenario: Path) -> dict[str, str]:
    """What the renderer says of a scenario, by file name."""
    want = render(load(scenario))
    return {
        "ruleset.nft": ruleset.fresh(want.ruleset) if want.ruleset else "",
        "want.txt": described(want),
    }


def described(want: Want) -> str:
    """A want without its ruleset, as a person reads it: one line per thing."""
    lines = [f"namespace {want.namespace or '(nothing)'}", ""]
    for port in want.ports:
        segment = port.segment
        by = f"through {segment.vlan_link}" if segment.vlan_link else f"untagged on {segment.nic}"
        lines.append(f"link    {port.link:<14} {port.mac} in bridge {segment.bridge} as {port.host_link}, {by}")
    lines += [""] + [f"address {it.cidr:<18} on {it.link}" for it in want.addresses]
    lines.append("")
    for route in want.routes:
        table = "main" if route.table == 254 else str(route.table)
        via = f" via {route.via}" if route.via else ""
        source = f" from {route.source}" if route.source else ""
        lines.append(f"route   {table:<6} {route.destination:<18} on {route.link}{via}{source}")
    lines += [f"rule    {it.priority}: mark {it.mark:#x}/{it.mask:#x} looks up {it.table}" for it in want.rules]
    lines += [f"neighbour {it.address} is {it.mac} on {it.link}" for it in want.neighbours]
    lines += [""] + [f"sysctl  {key} = {value}" for key, value in want.sysctls.items()]
    lines += [""] + [f"tell    {it.cidr} on {it.link}" for it in want.announce]
    return "\n".join(lines).replace("\n\n\n", "\n\n").strip() + "\n"
