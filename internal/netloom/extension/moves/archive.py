"""The archive of ``netloom export``: the states of scopes in one file, as a backup.

The file has one JSON object per line: a head, a scope per line, and a last line with their number. The states contain
the passwords and the user data of VMs. They are either left out, or each state is encrypted with a password (scrypt,
AES-256-GCM). There is no archive with secrets in plain text: a backup is copied to places that other people can read.

An encrypted line is bound to its archive, its place and its scope, and the last line to the number of scopes. So a
reader notices a line that is missing, exchanged, or of another archive.
"""

from __future__ import annotations

import base64
import hashlib
import os
import time
from collections.abc import Sequence
from typing import Literal

import msgspec

from netloom.errors import BadRequest, HostRefused
from netloom.extension.moves.inventory import is_scope_id, load
from netloom.files import replace_bytes
from netloom.placementwire import HeldScope
from netloom.secret import Secret, dec_hook
from netloom.state import SCHEMA, Scope

FORMAT = 1
PASSWORD_CHARACTERS_MIN = 8

# 128 MiB and half a second for each attempt to guess the password. Part of the format, so no file can ask for more.
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 1 << 17, 8, 1
_SCRYPT_BYTES_MAX = 256 << 20
_SALT_BYTES = 16
_NONCE_BYTES = 12
_END = "the end"


class Archived(msgspec.Struct, frozen=True, kw_only=True):
    """One scope. ``host``: who served it at the time of the export. ``state``: its state as JSON text."""

    scope_id: str
    owner: str
    host: str
    epoch: int
    revision: int
    state: bytes

    def __repr__(self) -> str:
        return f"Archived({self.scope_id}, {len(self.state)} bytes)"  # the state has secrets


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    netloom_archive: int
    secrets: Literal["left out", "encrypted"]
    created: int  # UTC, in seconds since 1970
    salt: str = ""


class _Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A scope. Either ``state``, the document without secrets, or ``sealed``, its encrypted text in base64."""

    scope_id: str
    owner: str
    host: str
    epoch: int
    revision: int
    state: msgspec.Raw = msgspec.Raw(b"null")
    sealed: str = ""

    def place(self, number: int) -> str:
        """What the encrypted text is bound to."""
        named = (number, self.scope_id, self.owner, self.host, self.epoch, self.revision)
        return msgspec.json.encode(named).decode()


class _Last(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    scopes: int
    sealed: str = ""


class _DocumentHead(msgspec.Struct):
    schema: int
    scope_id: str


class _CountedNetwork(msgspec.Struct):
    nics: dict[str, msgspec.Raw] = {}


class _Counted(msgspec.Struct):
    """What the load of a scope is computed from. States of later versions have it, too."""

    networks: dict[str, _CountedNetwork] = {}
    public_ips: dict[str, msgspec.Raw] = {}


class _Box:
    """Encrypts and decrypts the texts of one archive. ``place``: what a text is bound to."""

    def __init__(self, password: Secret, salt: str) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # asyncssh brings it; for archives only

        self._salt = salt
        key = hashlib.scrypt(
            password.reveal().encode(),
            salt=salt.encode(),
            n=_SCRYPT_N,
            r=_SCRYPT_R,
            p=_SCRYPT_P,
            maxmem=_SCRYPT_BYTES_MAX,
            dklen=32,
        )
        self._cipher = AESGCM(key)

    def seal(self, text: bytes, place: str) -> str:
        nonce = os.urandom(_NONCE_BYTES)
        return base64.b64encode(nonce + self._cipher.encrypt(nonce, text, self._bound(place))).decode()

    def unseal(self, sealed: str, place: str, what: str) -> bytes:
        """Raises BadRequest, which names ``what``."""
        from cryptography.exceptions import InvalidTag  # as in __init__

        try:
            data = base64.b64decode(sealed, validate=True)
            return self._cipher.decrypt(data[:_NONCE_BYTES], data[_NONCE_BYTES:], self._bound(place))
        except (InvalidTag, ValueError) as error:
            raise BadRequest(
                f"{what} cannot be decrypted", hint="is the password right, and was the file not changed?"
            ) from error

    def _bound(self, place: str) -> bytes:
        return f"netloom archive {FORMAT} {self._salt} {place}".encode()


def without_secrets(state: bytes) -> bytes:
    """The state's document without passwords and user data. Raises HostRefused for a state that cannot be read."""
    try:
        head = msgspec.json.decode(state, type=_DocumentHead)
        if head.schema > SCHEMA:
            raise HostRefused(
                f"the state of {head.scope_id} has schema {head.schema}, this netloom reads schemas up to {SCHEMA}",
                hint="use the newest netloom",
            )
        scope = msgspec.json.decode(state, type=Scope, dec_hook=dec_hook)
    except msgspec.MsgspecError as error:
        raise HostRefused(f"a state cannot be read: {error}") from error
    return msgspec.json.encode(scope, enc_hook=lambda secret: None)  # guard: an-archive-has-no-secret-in-plain-text


def load_of(it: Archived) -> int:
    """The load of an archived scope, as ``inventory.load`` computes it."""
    try:
        found = msgspec.json.decode(it.state, type=_Counted)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"the archived state of {it.scope_id} cannot be read: {error}") from error
    nics = sum(len(network.nics) for network in found.networks.values())
    return load(
        HeldScope(scope_id=it.scope_id, networks=len(found.networks), nics=nics, public_ips=len(found.public_ips))
    )


def write_archive(path: str, scopes: Sequence[Archived], password: Secret | None) -> None:
    """Replace the file atomically, mode 0600. ``password``: None leaves the secrets out.

    Raises BadRequest for a short password, HostRefused for a state that cannot be read, OSError.
    """
    if password is not None and len(password) < PASSWORD_CHARACTERS_MIN:
        raise BadRequest(f"the password of an archive has at least {PASSWORD_CHARACTERS_MIN} characters")
    salt = os.urandom(_SALT_BYTES).hex() if password is not None else ""
    box = _Box(password, salt) if password is not None else None
    secrets: Literal["left out", "encrypted"] = "left out" if box is None else "encrypted"
    lines: list[msgspec.Struct] = [
        _Head(netloom_archive=FORMAT, secrets=secrets, created=int(time.time()), salt=salt),
    ]
    for number, it in enumerate(scopes):
        line = _Line(scope_id=it.scope_id, owner=it.owner, host=it.host, epoch=it.epoch, revision=it.revision)
        if box is None:
            line = msgspec.structs.replace(line, state=msgspec.Raw(without_secrets(it.state)))
        else:
            line = msgspec.structs.replace(line, sealed=box.seal(it.state, line.place(number)))
        lines.append(line)
    sealed = box.seal(str(len(scopes)).encode(), _END) if box is not None else ""
    lines.append(_Last(scopes=len(scopes), sealed=sealed))
    replace_bytes(os.path.abspath(path), b"".join(msgspec.json.encode(it) + b"\n" for it in lines), mode=0o600)


def is_encrypted(path: str) -> bool:
    """Whether a password is needed to read the archive. Raises BadRequest."""
    return _head(path, _lines(path)).secrets == "encrypted"


def read_archive(path: str, password: Secret | None) -> list[Archived]:
    """The scopes of the archive. Raises BadRequest when it is no complete archive, or the password is wrong."""
    lines = _lines(path)
    head = _head(path, lines)
    box = None
    if head.secrets == "encrypted":
        if password is None:
            raise BadRequest(f"{path} is encrypted", hint="--archive-password-file FILE")
        box = _Box(password, head.salt)
    if len(lines) < 2:
        raise _not_complete(path)
    try:
        last = msgspec.json.decode(lines[-1], type=_Last)
        found = [msgspec.json.decode(line, type=_Line) for line in lines[1:-1]]
    except msgspec.MsgspecError as error:
        raise _not_complete(path) from error
    told = last.scopes
    if box is not None:
        told = int(box.unseal(last.sealed, _END, f"{path}: its last line"))
    if told != len(found):  # guard: an-archive-is-complete
        raise _not_complete(path)
    scopes = []
    for number, line in enumerate(found):
        what = f"{path}: line {number + 2}"
        state = bytes(line.state) if box is None else box.unseal(line.sealed, line.place(number), what)
        if not is_scope_id(line.scope_id) or line.epoch < 0:
            raise BadRequest(f"{what} names no scope")
        scopes.append(
            Archived(
                scope_id=line.scope_id,
                owner=line.owner,
                host=line.host,
                epoch=line.epoch,
                revision=line.revision,
                state=state,
            )
        )
    if len({it.scope_id for it in scopes}) != len(scopes):
        raise BadRequest(f"{path}: a scope is in it twice")
    return scopes


def _lines(path: str) -> list[bytes]:
    try:
        with open(path, "rb") as file:
            return file.read().splitlines()
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}") from error


def _head(path: str, lines: Sequence[bytes]) -> _Head:
    try:
        head = msgspec.json.decode(lines[0] if lines else b"", type=_Head)
    except msgspec.MsgspecError as error:
        raise BadRequest(f"{path} is not an archive of netloom export") from error
    if head.netloom_archive != FORMAT:
        raise BadRequest(
            f"{path} has format {head.netloom_archive}, this netloom reads format {FORMAT}", hint="use a newer netloom"
        )
    return head


def _not_complete(path: str) -> BadRequest:
    return BadRequest(f"{path} is not complete", hint="use another copy of the archive")
