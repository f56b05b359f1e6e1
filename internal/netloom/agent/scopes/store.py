"""The state directory of the agent: one JSON file per scope, replaced atomically.

``net-204.json`` is the state of a scope. ``net-204.ended`` is the state of a deleted scope; it exists until the scope
is removed from the host. The agent is the only writer while it runs.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import msgspec

from netloom.errors import HostRefused
from netloom.files import replace_bytes, sync_directory
from netloom.secret import dec_hook, enc_hook
from netloom.state import SCHEMA, Scope

_NAME = re.compile(r"((?:net|vpc)-(?:0|[1-9][0-9]{0,9}))\.(json|ended)\Z")

_decoder = msgspec.json.Decoder(Scope, dec_hook=dec_hook)


class _Head(msgspec.Struct):
    schema: int


class Unreadable(HostRefused):
    """The state file of a scope cannot be used. The file, and whatever runs for the scope, are left unchanged."""


class Store:
    """The state files in ``directory``, which is created if it is missing. Directory mode 0700, file mode 0600.

    The constructor removes temporary files that a crash has left, and raises HostRefused.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory.chmod(0o700)
            for leftover in self.directory.glob(".*.new"):
                leftover.unlink()
        except OSError as error:
            raise HostRefused(f"state directory {directory}: {error.strerror}") from error

    def living(self) -> list[str]:
        """The ids of the scopes that have a state."""
        return self._ids("json")

    def ended(self) -> list[str]:
        """The ids of the deleted scopes that are not yet removed from the host."""
        return self._ids("ended")

    def load(self, scope_id: str) -> Scope | None:
        """The state of the scope; None when it has none. Raises Unreadable."""
        path = self._path(scope_id)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unreadable(f"state file {path}: {error.strerror}", hint="repair or remove the file") from error
        try:
            head = msgspec.json.decode(text, type=_Head)
            if head.schema > SCHEMA:
                raise Unreadable(
                    f"state file {path} has schema {head.schema}, this agent reads schemas up to {SCHEMA}",
                    hint="a newer netloom wrote it: use that version or a later one",
                )
            scope = _decoder.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:  # guard: a-state-file-is-any-bytes
            raise Unreadable(f"state file {path} cannot be read: {error}", hint="repair or remove the file") from error
        if scope.scope_id != scope_id:
            raise Unreadable(f"state file {path} is about {scope.scope_id}", hint="rename it to match its scope")
        return scope

    def save(self, scope: Scope) -> None:
        """Replace the scope's state file. Raises HostRefused; the old file is intact then."""
        path, ended = self._path(scope.scope_id), self._path(scope.scope_id, "ended")
        text = msgspec.json.format(msgspec.json.encode(scope, enc_hook=enc_hook), indent=2) + b"\n"
        try:
            replace_bytes(
                path,
                text,
                mode=0o600,  # guard: state-is-readable-by-root-alone
            )
            with contextlib.suppress(FileNotFoundError):
                ended.unlink()
                sync_directory(self.directory)
        except OSError as error:
            raise HostRefused(
                f"state file {path} cannot be written: {error.strerror}", hint="nothing was changed"
            ) from error

    def retire(self, scope_id: str) -> None:
        """Mark the scope as deleted. This renames its file, so it works on a full disk. Raises HostRefused."""
        path = self._path(scope_id)
        try:
            with contextlib.suppress(FileNotFoundError):
                path.rename(self._path(scope_id, "ended"))
            sync_directory(self.directory)
        except OSError as error:
            raise HostRefused(f"state file {path} cannot be renamed: {error.strerror}") from error

    def forget(self, scope_id: str) -> None:
        """Remove the file of a deleted scope, after the scope was removed from the host. Raises HostRefused."""
        path = self._path(scope_id, "ended")
        try:
            path.unlink(missing_ok=True)
            sync_directory(self.directory)
        except OSError as error:
            raise HostRefused(f"state file {path} cannot be removed: {error.strerror}") from error

    def _path(self, scope_id: str, suffix: str = "json") -> Path:
        return self.directory / f"{scope_id}.{suffix}"

    def _ids(self, suffix: str) -> list[str]:
        found = (_NAME.match(name) for name in os.listdir(self.directory))
        return sorted(match[1] for match in found if match and match[2] == suffix)
