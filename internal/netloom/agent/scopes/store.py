"""The state directory of the agent: one JSON file per scope, replaced atomically.

``net-204.json`` is the state of a scope. ``net-204.ended`` is the state of a deleted scope; it exists until the scope
is removed from the host. Beside a ``net-204.json`` it has no meaning: the scope was created again. ``net-204.moved``
names the host to which the scope was moved. ``placement.json``, beside the directory, has what an operator said about
the host as a whole. The agent is the only writer while it runs.

A change that cannot be flushed to disk is taken back, so that an error leaves the old state in place. Where that fails,
too, the error says so, and the scope is not used until the directory can be flushed (``unsettled``).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from netloom.agent.exhausted import remedy
from netloom.errors import HostRefused
from netloom.files import NotFlushed, remove_leftovers, rename_durably, replace_bytes, sync_directory
from netloom.secret import dec_hook, enc_hook
from netloom.state import SCHEMA, Scope
from netloom.wire import Evacuated, Signers

_NAME = re.compile(r"((?:net|vpc)-(?:0|[1-9][0-9]{0,9}))\.(json|ended|moved)\Z")

_IN_LINES_MAX = 256 << 10  # of 10,000 rules, lines would take twice the time and space

# What msgspec raises for text that is not what it should be.
_NOT_READABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_decoder = msgspec.json.Decoder(Scope, dec_hook=dec_hook)


class Moved(msgspec.Struct, frozen=True, kw_only=True):
    """Where a scope went from this host: the host's name in the registration, and the number of that placement."""

    to: str
    epoch: int


class HostRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator said about this host. ``drained``: no scope is placed here any more.

    ``evacuated``: the dead hosts whose scopes may be placed here. ``over``: records of other hosts about this one that
    hold at most until then are over (UTC, in seconds since 1970). ``signers``: by owner, as the last call said.
    """

    drained: bool = False
    evacuated: tuple[Evacuated, ...] = ()
    over: int = 0
    signers: dict[str, Signers] = {}

    def dead_hosts(self, owner: str, now: float) -> tuple[str, ...]:
        """The hosts whose scopes of this owner may be placed here. ``now``: UTC, in seconds since 1970."""
        valid = (it.host for it in self.evacuated if it.until > now and it.owner in ("", owner))
        return tuple(dict.fromkeys(valid))


class _Head(msgspec.Struct):
    schema: int


class Unreadable(HostRefused):
    """The state file of a scope cannot be used. The file, and whatever runs for the scope, are left unchanged."""


class Store:
    """The state files in ``directory``, which is created if it is missing. Directory mode 0700, file mode 0600.

    The constructor removes temporary files that a crash has left, and raises HostRefused.

    ``on_saved`` and ``on_retired`` are called after each change of a scope's state, in the thread that changed it.
    """

    on_saved: Callable[[Scope, bytes], None] = staticmethod(lambda scope, text: None)
    on_retired: Callable[[str], None] = staticmethod(lambda scope_id: None)

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self._unflushed: set[str] = set()  # scopes with a change that a power failure may undo
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory.chmod(0o700)
            remove_leftovers(self.directory)
            remove_leftovers(self.directory.parent)
        except OSError as error:
            raise HostRefused(f"state directory {directory}: {error.strerror}") from error

    def living(self) -> list[str]:
        """The ids of the scopes that have a state."""
        return self._ids("json")

    def ended(self) -> list[str]:
        """The ids of the deleted scopes that are not yet removed from the host."""
        return sorted({*self._ids("ended")} - {*self._ids("json")})

    def moved(self) -> dict[str, Moved]:
        """Where scopes went from this host, by scope id. A file that cannot be read is left out: nobody needs it."""
        found: dict[str, Moved] = {}
        for scope_id in self._ids("moved"):
            with contextlib.suppress(OSError, *_NOT_READABLE):
                found[scope_id] = msgspec.json.decode(self._path(scope_id, "moved").read_bytes(), type=Moved)
        return found

    def save_moved(self, scope_id: str, moved: Moved) -> None:
        """Remember where the scope went. Raises HostRefused."""
        path = self._path(scope_id, "moved")
        try:
            replace_bytes(path, msgspec.json.encode(moved) + b"\n")
        except OSError as error:
            raise HostRefused(f"file {path} cannot be written: {error.strerror}") from error

    def forget_moved(self, scope_id: str) -> None:
        """Forget where the scope went: it came back, or it was deleted. Raises HostRefused."""
        path = self._path(scope_id, "moved")
        try:
            path.unlink(missing_ok=True)
            sync_directory(self.directory)
        except OSError as error:
            raise HostRefused(f"file {path} cannot be removed: {error.strerror}") from error

    def host_record(self) -> HostRecord:
        """What an operator said about this host. Raises HostRefused."""
        path = self._host_record
        try:
            return msgspec.json.decode(path.read_bytes(), type=HostRecord)
        except FileNotFoundError:
            return HostRecord()
        except (OSError, *_NOT_READABLE) as error:
            raise HostRefused(f"file {path} cannot be read: {error}", hint="remove it, and drain again") from error

    def save_host_record(self, record: HostRecord) -> None:
        """Replace what an operator said about this host; nothing leaves no file. Raises HostRefused."""
        path = self._host_record
        try:
            if record == HostRecord():
                path.unlink(missing_ok=True)
                sync_directory(path.parent)
            else:
                replace_bytes(path, msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        except OSError as error:
            raise HostRefused(f"file {path} cannot be written: {error.strerror}") from error

    def load(self, scope_id: str) -> Scope | None:
        """The state of the scope; None when it has none. Raises Unreadable."""
        path = self._path(scope_id)
        if scope_id in self._unflushed:
            try:
                sync_directory(self.directory)  # guard: an-unflushed-state-is-not-used
            except OSError as error:
                raise Unreadable(_undoable(path, error), hint=remedy(error)) from error
            self._unflushed.discard(scope_id)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            hint = remedy(error) or "repair or remove the file"
            raise Unreadable(f"state file {path}: {error.strerror}", hint=hint) from error
        return self.decoded(scope_id, text, f"state file {path}")

    def decoded(self, scope_id: str, text: bytes, path: str) -> Scope:
        """The state in ``text``. ``path``: what it is, for the error. Raises Unreadable."""
        try:
            head = msgspec.json.decode(text, type=_Head)
            if head.schema > SCHEMA:
                raise Unreadable(
                    f"{path} has schema {head.schema}, this agent reads schemas up to {SCHEMA}",
                    hint="a newer netloom wrote it: use that version or a later one",
                )
            scope = _decoder.decode(text)
        except _NOT_READABLE as error:  # guard: a-state-file-is-any-bytes
            raise Unreadable(f"{path} cannot be read: {error}", hint="repair or remove the file") from error
        if scope.scope_id != scope_id:
            raise Unreadable(f"{path} is about {scope.scope_id}", hint="rename it to match its scope")
        placement = scope.placement
        if placement.gate == "incoming" and placement.why:  # guard: the-only-copy-is-known-in-older-states
            # Written before there was ``was_passive``.
            return replace(scope, placement=replace(placement, why="", was_passive=placement.why))
        return scope

    def unsettled(self, scope_id: str) -> bool:
        """Whether the scope's files have a change that failed and may last: its state is to be loaded again."""
        return scope_id in self._unflushed

    def save(self, scope: Scope) -> None:
        """Replace the scope's state file. Raises HostRefused; the old file is in place then, or it is ``unsettled``."""
        path = self._path(scope.scope_id)
        text = self.encoded(scope)
        try:
            replace_bytes(
                path,
                text,
                mode=0o600,  # guard: state-is-readable-by-root-alone
            )
        except OSError as error:
            raise self._refused(scope.scope_id, "written", error) from error
        with contextlib.suppress(OSError):  # beside the state it has no meaning, and the next one replaces it
            self._path(scope.scope_id, "ended").unlink()
        self.on_saved(scope, text)

    @staticmethod
    def encoded(scope: Scope) -> bytes:
        """The content of the scope's state file, with lines for people as long as it is short."""
        text = msgspec.json.encode(scope, enc_hook=enc_hook)
        return (text if len(text) > _IN_LINES_MAX else msgspec.json.format(text, indent=2)) + b"\n"

    def retire(self, scope_id: str) -> None:
        """Mark the scope as deleted. This renames its file, so it works on a full disk.

        Raises HostRefused; the scope has its state then, or it is ``unsettled``.
        """
        path = self._path(scope_id)
        try:
            if path.exists():
                rename_durably(path, self._path(scope_id, "ended"))
        except OSError as error:
            raise self._refused(scope_id, "renamed", error) from error
        self.on_retired(scope_id)

    def forget(self, scope_id: str) -> None:
        """Remove the file of a deleted scope, after the scope was removed from the host.

        Raises HostRefused. The removal is repeated then: the file may be gone, and a power failure may bring it back.
        """
        path = self._path(scope_id, "ended")
        try:
            path.unlink(missing_ok=True)
            sync_directory(self.directory)
        except OSError as error:
            raise HostRefused(
                f"the network is gone, but its state file {path} cannot be removed: {error.strerror}",
                hint=remedy(error),
            ) from error

    def _refused(self, scope_id: str, done: str, error: OSError) -> HostRefused:
        """The error of a change of the scope's state file that could not be done."""
        path = self._path(scope_id)
        if isinstance(error, NotFlushed):
            self._unflushed.add(scope_id)
            return HostRefused(_undoable(path, error), hint=remedy(error))
        what = f"state file {path} cannot be {done}, nothing was changed: {error.strerror}"
        return HostRefused(what, hint=remedy(error))

    @property
    def _host_record(self) -> Path:
        return self.directory.parent / "placement.json"

    def _path(self, scope_id: str, suffix: str = "json") -> Path:
        return self.directory / f"{scope_id}.{suffix}"

    def _ids(self, suffix: str) -> list[str]:
        found = (_NAME.match(name) for name in os.listdir(self.directory))
        return sorted(match[1] for match in found if match and match[2] == suffix)


def _undoable(path: Path, error: OSError) -> str:
    return f"state file {path} was changed, and a power failure may undo that: {error.strerror}"
