"""The golden scenarios of the renderer: ``<name>/state.json`` in, ``ruleset.nft`` and ``want.txt`` out.

If VMs are served, ``services.txt`` has the processes with their files, and ``guests.txt`` has the lease and the
metadata tree (port 80) of each VM.

``UPDATE_GOLDEN=1 pytest tests/golden`` writes the current output of the renderer. Read the difference before you
commit it.
"""

from __future__ import annotations

import os
from pathlib import Path

import h11
import msgspec

from netloom.guest import metadata
from netloom.guestwire import GuestNic
from netloom.netobjects import MAIN_TABLE
from netloom.render import ruleset
from netloom.render.guest import tables
from netloom.render.scope import render
from netloom.render.services import services
from netloom.render.want import Want
from netloom.secret import dec_hook
from netloom.state import Scope

GOLDEN = Path(__file__).parent
UPDATE = bool(os.environ.get("UPDATE_GOLDEN"))


def scenarios() -> list[Path]:
    return sorted(it.parent for it in GOLDEN.glob("*/state.json"))


def load(scenario: Path) -> Scope:
    return msgspec.json.decode((scenario / "state.json").read_bytes(), type=Scope, dec_hook=dec_hook)


def texts(scenario: Path) -> dict[str, str]:
    """The output of the renderer for a scenario, by file name."""
    scope = load(scenario)
    want = render(scope)
    given = {"services.txt": processes(scope), "guests.txt": guests(scope)}
    return {
        "ruleset.nft": ruleset.fresh(want.ruleset) if want.ruleset else "",
        "want.txt": described(want),
        **{name: text for name, text in given.items() if text},
    }


def processes(scope: Scope) -> str:
    """The service processes of a scope, each with the files that it reads."""
    lines = []
    for service in services(scope):
        lines += [f"== {service.name}: {' '.join(service.argv)}"]
        files = {
            **service.config,
            **{f"{service.watched_directory}/{it}": text for it, text in service.watched_files.items()},
        }
        for name, text in files.items():
            lines += ["", f"-- {name}", text.rstrip("\n")]
        lines.append("")
    return "\n".join(lines)


def guests(scope: Scope) -> str:
    """The lease, options, password and metadata of each VM."""
    lines = []
    for table in tables(scope):
        if table.nics:
            network = f"dns {' '.join(table.dns)}, domain {table.domain}, lease {table.lease_s} s"
            lines += [f"== network {table.network_id}, from {table.server_ip}: {network}", ""]
        for nic in table.nics:
            lease = f"{nic.ip}/{nic.prefix_len} via {nic.gateway}" if nic.dhcp else "no lease"
            which = "" if nic.default_nic else ", not the default NIC"
            lines.append(f"-- {nic.mac} {nic.hostname}: {lease}{which}")
            lines += [f"   option {code}: {value.hex(' ')}" for code, value in nic.options.items()]
            lines += [f"   password {nic.password_id}: {nic.password.reveal()}"] if nic.password else []
            lines += [*_tree(nic), ""]
    return "\n".join(lines)


def _tree(nic: GuestNic) -> list[str]:
    names = _get(nic, "/latest/meta-data/")
    paths = ["/latest/", "/latest/user-data", "/latest/meta-data/"]
    paths += [f"/latest/meta-data/{name}" for name in (names or "").splitlines()]
    lines = []
    for path in paths:
        text = _get(nic, path)
        lines += (
            [f"   {path}: 404"] if text is None else [f"   {path}", *(f"     {it!r}" for it in text.splitlines(True))]
        )
    return lines


def _get(nic: GuestNic, path: str) -> str | None:
    answer = metadata.respond(h11.Request(method="GET", target=path, headers=[("host", "x")]), nic)
    return answer.body.decode() if answer.status == 200 else None


def described(want: Want) -> str:
    """A want without its ruleset as text, one line per object."""
    lines = [f"namespace {want.namespace or '(nothing)'}", ""]
    for port in want.ports:
        segment = port.segment
        by = f"through {segment.vlan_link}" if segment.vlan_link else f"untagged on {segment.nic}"
        lines.append(f"link    {port.link:<14} {port.mac} in bridge {segment.bridge} as {port.host_link}, {by}")
    lines += [""] + [f"address {it.cidr:<18} on {it.link}" for it in want.addresses]
    lines.append("")
    for route in want.routes:
        table = "main" if route.table == MAIN_TABLE else str(route.table)
        via = f" via {route.via}" if route.via else ""
        source = f" from {route.source}" if route.source else ""
        where = f"on {route.link}" if route.link else route.kind
        lines.append(f"route   {table:<6} {route.destination:<18} {where}{via}{source}")
    for rule in want.rules:
        words = (("from", rule.source), ("to", rule.destination), ("on", rule.iif))
        which = "".join(f" {word} {it}" for word, it in words if it)
        lines.append(f"rule    {rule.priority}: mark {rule.mark:#x}/{rule.mask:#x}{which} looks up {rule.table}")
    lines += [f"neighbour {it.address} is {it.mac} on {it.link}" for it in want.neighbours]
    lines += [""] + [f"sysctl  {key} = {value}" for key, value in want.sysctls.items()]
    lines += [""] + [f"tell    {it.cidr} on {it.link}" for it in want.announce]
    return "\n".join(lines).replace("\n\n\n", "\n\n").strip() + "\n"
