"""The file with the groups of this host: with whom, and what its member of each group has promised.

It contains the secrets of the groups, so its mode is 0600. A file that cannot be read is left unchanged, and no group
is served: its promises are unknown.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path

import msgspec

from netloom.agent.exhausted import remedy
from netloom.errors import HostRefused
from netloom.files import replace_bytes
from netloom.heartbeatwire import key_of
from netloom.secret import dec_hook, enc_hook
from netloom.standby.decision import Kept
from netloom.standbywire import GROUP_ID_CHARACTERS, GroupSpec

NAME = "standby.json"
_SCHEMA = 1
_ID = re.compile(f"(?!0+$)[0-9a-f]{{{GROUP_ID_CHARACTERS}}}\\Z")
_SECRET_BYTES = 32


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A group in the file. ``me``: this host's name in it."""

    spec: GroupSpec
    me: str
    kept: Kept


class Contents(msgspec.Struct, frozen=True, kw_only=True):
    """The file. ``forgotten``: groups that this host has left. It does not know its promises in them, so it cannot be
    their member again."""

    version: int = _SCHEMA
    groups: tuple[Record, ...] = ()
    forgotten: tuple[str, ...] = ()


class GroupFile:
    """The file ``standby.json`` in a directory."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / NAME

    def load(self) -> Contents:
        """What the file says; without a file: no groups. Raises HostRefused when it cannot be read."""
        try:
            contents = msgspec.json.decode(self.path.read_bytes(), type=Contents, dec_hook=dec_hook)
            _check(contents)
        except FileNotFoundError:
            return Contents()
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
            raise HostRefused(f"file {self.path} cannot be read: {_reason(error)}") from error
        return contents

    def save(self, contents: Contents) -> None:
        """Replace the file; it is on disk when this returns. Raises OSError, see ``files.replace_bytes``."""
        data = msgspec.json.encode(contents, enc_hook=enc_hook)
        replace_bytes(self.path, msgspec.json.format(data, indent=2) + b"\n")

    def refusal(self, error: OSError) -> HostRefused:
        """The error for a caller whose change could not be saved."""
        return HostRefused(f"file {self.path} cannot be written: {error.strerror}", hint=remedy(error))


def check(spec: GroupSpec, me: str) -> None:
    """Refuse a group that cannot work. Raises HostRefused."""
    names = [it.name for it in spec.hosts]
    if not _ID.match(spec.group_id):
        raise HostRefused(f"a group's id is {GROUP_ID_CHARACTERS} hexadecimal digits")
    if len(set(names)) != len(names) or "" in names:
        raise HostRefused(f"group {spec.group_id}: a group has different hosts")
    if me not in names:
        raise HostRefused(f"group {spec.group_id}: {me} is none of its hosts")
    for it in spec.hosts:
        if not _is_numeric(it.address):
            raise HostRefused(f"group {spec.group_id}: the address of {it.name} is not numeric: {it.address}")
        if not 0 < it.port < 1 << 16:
            raise HostRefused(f"group {spec.group_id}: {it.name} has no port {it.port}")
    if not 100 <= spec.lease_ms <= 60_000:
        raise HostRefused(f"group {spec.group_id}: a lease lasts between 100 and 60000 ms")
    try:
        key_of(spec.secret)
    except ValueError as error:
        raise HostRefused(f"group {spec.group_id}: its secret is not hexadecimal") from error
    if len(spec.secret) != 2 * _SECRET_BYTES:
        raise HostRefused(f"group {spec.group_id}: its secret is not of {_SECRET_BYTES} bytes")


def _is_numeric(address: str) -> bool:
    try:
        ipaddress.ip_address(address)
    except ValueError:
        return False
    return "%" not in address


def _check(contents: Contents) -> None:
    """Raises HostRefused, ValueError."""
    if contents.version != _SCHEMA:
        raise ValueError(f"it is of version {contents.version}")
    if len({it.spec.group_id for it in contents.groups}) != len(contents.groups):
        raise ValueError("a group is there twice")
    for it in contents.groups:
        check(it.spec, it.me)
        names, kept = it.spec.names, it.kept
        if kept.active not in (names.first, names.second) or kept.candidate not in ("", names.first, names.second):
            raise ValueError(f"group {it.spec.group_id}: a host that is none of its own")
        if min(kept.term, kept.voted) < 0:
            raise ValueError(f"group {it.spec.group_id}: a negative term")


def _reason(error: Exception) -> str:
    return (error.strerror or "error") if isinstance(error, OSError) else str(error)
