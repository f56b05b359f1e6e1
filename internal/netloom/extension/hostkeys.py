"""Trust in SSH host keys: keys pinned by the operator, else the first key seen (trust on first use).

Remembered keys are stored in OpenSSH's known_hosts format, so that a person can read, compare and copy them.
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from netloom.errors import BadRequest, LoginRefused
from netloom.files import replace_bytes

FILE = "known_hosts"
DEFAULT_PORT = 22

_KEY_TYPE = re.compile(r"(?:ssh-(?:ed25519|ed448|rsa)|ecdsa-sha2-nistp(?:256|384|521))\Z")
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}=?\Z")


@dataclass(frozen=True)
class HostKey:
    """A server's public key: type and base64 text, as in OpenSSH's files."""

    kind: str
    blob: str

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(base64.b64decode(self.blob)).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    def __str__(self) -> str:
        return f"{self.kind} {self.blob}"


@dataclass(frozen=True)
class Pin:
    """A key or fingerprint that the operator trusts for ``host``, or for all hosts when that is empty."""

    host: str
    key: HostKey | None = None
    fingerprint: str = ""

    def admits(self, shown: HostKey) -> bool:
        return shown == self.key if self.key else shown.fingerprint == self.fingerprint


def parse_pins(text: str) -> tuple[Pin, ...]:
    """Parses the registration detail ``hostkeys``: entries separated by commas or line ends.

    An entry is ``[host ]ssh-ed25519 AAAA...`` or ``[host ]SHA256:...``. Raises BadRequest for any other: ignoring a
    misspelt pin would mean trust on first use.
    """
    return tuple(_pin(entry.split()) for entry in re.split(r"[,\r\n]", text) if entry.strip())


def _pin(fields: list[str]) -> Pin:
    host = ""
    if not (_KEY_TYPE.match(fields[0]) or fields[0].startswith("SHA256:")):
        host, fields = fields[0].strip("[]"), fields[1:]
    if fields and _FINGERPRINT.match(fields[0]):
        return Pin(host, fingerprint=fields[0].rstrip("="))
    if len(fields) >= 2 and _KEY_TYPE.match(fields[0]) and _is_blob(fields[0], fields[1]):
        return Pin(host, key=HostKey(fields[0], fields[1]))
    raise BadRequest(
        f"registration detail hostkeys: {' '.join([host, *fields]).strip()[:60]!r} is not a host key",
        hint="write '[host ]ssh-ed25519 AAAA...' or '[host ]SHA256:...', with commas between",
    )


def _is_blob(kind: str, blob: str) -> bool:
    try:
        raw = base64.b64decode(blob, validate=True)
    except (binascii.Error, ValueError):
        return False
    return raw.startswith(len(kind).to_bytes(4, "big") + kind.encode())


@dataclass(frozen=True)
class Known:
    """A remembered key and its line number in the file."""

    name: str
    key: HostKey
    line: int


def name_of(host: str, port: int) -> str:
    """The name of a server in OpenSSH's known_hosts: ``[host]:port`` when the port is not 22."""
    return host if port == DEFAULT_PORT else f"[{host}]:{port}"


@dataclass(frozen=True)
class KnownHosts:
    """The known_hosts file in ``directory``. Its methods raise OSError when the file cannot be read or written."""

    directory: str

    @property
    def path(self) -> str:
        return os.path.join(self.directory, FILE)

    def all(self) -> list[Known]:
        try:
            with open(self.path, encoding="utf-8", errors="replace") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return []
        return [known for number, line in enumerate(lines, 1) for known in _known(line, number)]

    def of(self, name: str) -> list[Known]:
        return [known for known in self.all() if known.name == name]

    def remember(self, name: str, key: HostKey) -> list[Known]:
        """Add ``key`` unless ``name`` already has a key; returns the keys of ``name``.

        A lock makes one of two simultaneous first uses the first.
        """
        with self._locked():
            if not self.of(name):
                self._append(f"{name} {key}\n".encode())
            return self.of(name)

    def forget(self, name: str) -> list[Known]:
        """Remove the keys of ``name`` and return them. The file is replaced atomically."""
        with self._locked():
            gone = self.of(name)
            if gone:
                numbers = {known.line for known in gone}
                with open(self.path, encoding="utf-8", errors="surrogateescape") as file:
                    lines = file.read().splitlines()
                kept = "".join(line + "\n" for number, line in enumerate(lines, 1) if number not in numbers)
                # Atomically: a key that a full disk lost would be trusted on first use again.
                replace_bytes(self.path, kept.encode("utf-8", "surrogateescape"))
            return gone

    def _append(self, line: bytes) -> None:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":  # an editor left out the final newline
                line = b"\n" + line
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, size)
                raise OSError(f"{self.path}: the disk is full")
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Holds the lock. The lock file is never removed: two processes could lock two files of the same name."""
        fd = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _known(line: str, number: int) -> Iterator[Known]:
    fields = line.split()
    if len(fields) >= 3 and _KEY_TYPE.match(fields[1]) and _is_blob(fields[1], fields[2]):
        for name in fields[0].split(","):
            yield Known(name, HostKey(fields[1], fields[2]), number)


@dataclass(frozen=True)
class Trust:
    """Decides whether a server's key is trusted: by the operator's pins if there are any, else by ``known``."""

    pins: tuple[Pin, ...]
    known: KnownHosts

    def expected_kinds(self, host: str, port: int) -> list[str]:
        """The key types that we know for a server. We ask for these first, because a server has several keys."""
        if self.pins:
            return [pin.key.kind for pin in self._pins_of(host) if pin.key]
        return [known.key.kind for known in self.known.of(name_of(host, port))]

    def check(self, host: str, port: int, shown: HostKey) -> None:
        """Return if ``shown`` is trusted. Raises LoginRefused with a remedy; no login is tried then."""
        if self.pins:
            self._check_pins(host, shown)
            return
        name = name_of(host, port)
        try:
            known = self.known.of(name) or self.known.remember(name, shown)
        except OSError as error:
            raise LoginRefused(
                f"{host}: its key cannot be remembered: {self.known.path}: {error.strerror or error}",
                hint="make the file writable, or pin keys by the registration detail hostkeys",
            ) from error
        if any(entry.key == shown for entry in known):  # guard: a-changed-host-key-is-refused
            return
        lines = ", ".join(str(entry.line) for entry in known)
        raise LoginRefused(
            f"{host}: its host key has changed: it shows {shown.kind} {shown.fingerprint}, "
            f"known is {known[0].key.kind} {known[0].key.fingerprint} ({self.known.path} line {lines})",
            hint=f"if the host was installed anew: netloom hosts forget '{name}', as this user, or remove that line",
        )

    def _pins_of(self, host: str) -> list[Pin]:
        return [pin for pin in self.pins if pin.host in ("", host)]

    def _check_pins(self, host: str, shown: HostKey) -> None:
        pins = self._pins_of(host)
        if any(pin.admits(shown) for pin in pins):
            return
        raise LoginRefused(
            f"{host}: its host key {shown.kind} {shown.fingerprint} is not among the {len(pins)} pinned for it",
            hint="compare it on the host, then put it into the registration detail hostkeys",
        )
