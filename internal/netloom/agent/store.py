"""The state directory: one file per scope, replaced whole or not at all.

``net-204.json`` is the state of a scope that lives here. ``net-204.ended`` is one whose end was asked for and is not
carried out yet: what is left of it on the host has to go, then the file. The agent is the only writer.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import msgspec

from netloom.errors import HostRefused
from netloom.secret import dec_hook, enc_hook
from netloom.state import SCHEMA, Scope

_NAME = re.compile(r"((?:net|vpc)-(?:0|[1-9][0-9]{0,9}))\.(json|ended)\Z")

_decoder = msgspec.json.Decoder(Scope, dec_hook=dec_hook)


class _Head(msgspec.Struct):
    schema: int


class Unreadable(HostRefused):
    """A scope whose file cannot be used; the file and what runs of the scope are left as they are."""


class Store:
    """The files of ``directory``, which is made when it is missing (0700, the files 0600)."""

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
        """The ids of the scopes whose end is not carried out yet."""
        return self._ids("ended")

    def load(self, scope_id: str) -> Scope | None:
        """The state of the scope, None when it has none here. Raises Unreadable."""
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
                    f"state file {path} is of schema {head.schema}, this agent knows up to {SCHEMA}",
                    hint="a newer netloom wrote it: use that one, or a later one",
                )
            scope = _decoder.decode(text)
        except msgspec.MsgspecError as error:
            raise Unreadable(f"state file {path} cannot be read: {error}", hint="repair or remove the file") from error
        if scope.scope_id != scope_id:
            raise Unreadable(f"state file {path} is about {scope.scope_id}", hint="give it its own name")
        return scope

    def save(self, scope: Scope) -> None:
        """Replaces the scope's file. Raises HostRefused, with the old file intact, when that is not possible."""
        path = self._path(scope.scope_id)
        new = path.with_name(f".{path.name}.new")
        text = msgspec.json.format(msgspec.json.encode(scope, enc_hook=enc_hook), indent=2) + b"\n"
        try:
            try:
                fd = os.open(
                    new,
                    os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW,
                    0o600,  # guard: state-is-readable-by-root-alone
                )
                with open(fd, "wb") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(fd)
                new.rename(path)
            except OSError:
                with contextlib.suppress(OSError):
                    new.unlink()
                raise
            self._path(scope.scope_id, "ended").unlink(missing_ok=True)
            self._sync()
        except OSError as error:
            raise HostRefused(
                f"state file {path} cannot be written: {error.strerror}", hint="nothing was changed"
            ) from error

    def retire(self, scope_id: str) -> None:
        """Notes that the scope has ended: takes no space, so it works on a full disk."""
        path = self._path(scope_id)
        try:
            with contextlib.suppress(FileNotFoundError):
                path.rename(self._path(scope_id, "ended"))
            self._sync()
        except OSError as error:
            raise HostRefused(f"state file {path} cannot be renamed: {error.strerror}") from error

    def forget(self, scope_id: str) -> None:
        """Removes the note that ``retire`` left, once nothing of the scope is left on the host."""
        path = self._path(scope_id, "ended")
        try:
            path.unlink(missing_ok=True)
            self._sync()
        except OSError as error:
            raise HostRefused(f"state file {path} cannot be removed: {error.strerror}") from error

    def _path(self, scope_id: str, suffix: str = "json") -> Path:
        return self.directory / f"{scope_id}.{suffix}"

    def _ids(self, suffix: str) -> list[str]:
        found = (_NAME.match(name) for name in os.listdir(self.directory))
        return sorted(match[1] for match in found if match and match[2] == suffix)

    def _sync(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
