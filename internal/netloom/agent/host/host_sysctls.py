"""Sysctls of the host that networks need higher: raised while netloom is installed, and restored by the uninstall.

A record beside the state files has, for each of them, the value before and the value that we wrote. Without a record,
as after an earlier build, nothing is restored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from netloom.agent.kernel import sysctl
from netloom.errors import HostRefused
from netloom.files import replace_text

RECORD = "sysctls.json"  # in /var/lib/netloom


class Raised(msgspec.Struct, frozen=True):
    """The value before, and ours."""

    former: str
    ours: str


def raise_to(values: Mapping[str, str], record: Path) -> None:
    """Write these sysctls of the host, and record their former values first. Raises HostRefused.

    The former value is the one that we did not write: that of the operator, or of the kernel after a reboot.
    """
    present = sysctl.read(None, values)
    raised = _read(record)
    for name, value in values.items():
        now, had = present[name], raised.get(name)
        if now is not None:
            raised[name] = Raised(had.former if had is not None and had.ours == now else now, value)
    with contextlib.suppress(OSError):  # as on a full disk: the networks need the values all the same
        replace_text(record, msgspec.json.encode(raised).decode() + "\n")
    sysctl.write(None, values)


def restore(record: Path) -> None:
    """Write the former values back and remove the record. A value that somebody else has changed since then stays."""
    for name, it in _read(record).items():
        with contextlib.suppress(HostRefused, ValueError):
            if sysctl.read(None, [name])[name] == it.ours:  # guard: another-hand-set-this-sysctl
                sysctl.write(None, {name: it.former})
    record.unlink(missing_ok=True)


def _read(record: Path) -> dict[str, Raised]:
    try:
        return msgspec.json.decode(record.read_bytes(), type=dict[str, Raised])
    except (OSError, msgspec.MsgspecError):
        return {}
