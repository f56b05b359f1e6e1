"""Which SSH host keys we believe: those the operator pinned, else the one we saw first.

Remembered keys are kept in OpenSSH's known_hosts format, so that a person can read, compare and copy them.
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

FILE = "known_hosts"
DEFAULT_PORT = 22

_KEY_TYPE = re.compile(r"(?:ssh-(?:ed25519|ed448|rsa)|ecdsa-sha2-nistp(?:256|384|521))\Z")
_FINGERPRINT = re.compile(r"SHA256:[A-Za-z0-9+/]{43}=?\Z")


@dataclass(frozen=True)
class HostKey:
    """A server's public key: its type and its base64 text, as OpenSSH writes them."""

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
    """One key that the operator trusts: for ``host`` alone, or for all when that is empty. A key or a fingerprint."""

    host: str
    key: HostKey | None = None
    fingerprint: str = ""

    def admits(self, shown: HostKey) -> bool:
        return shown == self.key if self.key else shown.fingerprint == self.fingerprint


def parse_pins(text: str) -> tuple[Pin, ...]:
    """The registration detail ``hostkeys``: ``[host ]ssh-ed25519 AAAA...`` or ``[host ]SHA256:...``, between commas or
    line ends. Raises BadRequest for an entry that is neither; a misspelt pin must not become trust on first use."""
    return tuple(_pin(entry.split()) for entry in re.split(r"[,\r\n]", text) if entry.strip())


def _pin(words: list[str]) -> Pin:
    host = ""
    if not (_KEY_TYPE.match(words[0]) or words[0].startswith("SHA256:")):
        host, words = words[0].strip("[]"), words[1:]
    if words and _FINGERPRINT.match(words[0]):
        return Pin(host, fingerprint=words[0].rstrip("="))
    if len(words) >= 2 and _KEY_TYPE.match(words[0]) and _is_blob(words[0], words[1]):
        return Pin(host, key=HostKey(words[0], words[1]))
    raise BadRequest(
        f"registration detail hostkeys: {' '.join([host, *words]).strip()[:60]!r} is no host key",
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
    """One remembered key, and where it stands."""

    name: str
    key: HostKey
    line: int


def name_of(host: str, port: int) -> str:
    """The name under which OpenSSH keeps a server's key: with the port where it is not 22."""
    return host if port == DEFAULT_PORT else f"[{host}]:{port}"


@dataclass(frozen=True)
class KnownHosts:
    """The remembered keys of a directory of ours. Raises OSError where the file cannot be read or written."""

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
        """Keep ``key`` unless something is known under ``name`` by now; what is known, in either case.

        One write under a lock: of two first uses at the same time, one is first.
        """
        with self._locked():
            if not self.of(name):
                self._append(f"{name} {key}\n".encode())
            return self.of(name)

    def forget(self, name: str) -> list[Known]:
        """Remove what is known under ``name``; what it was. The file is replaced whole."""
        with self._locked():
            gone = self.of(name)
            if gone:
                numbers = {known.line for known in gone}
                with open(self.path, encoding="utf-8", errors="surrogateescape") as file:
                    lines = file.read().splitlines()
                kept = "".join(line + "\n" for number, line in enumerate(lines, 1) if number not in numbers)
                self._replace(kept.encode("utf-8", "surrogateescape"))
            return gone

    def _replace(self, text: bytes) -> None:
        """All of ``text`` or nothing: a key that a full disk lost would be believed anew, whoever shows one."""
        temporary = f"{self.path}.{os.getpid()}.new"
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(fd)
            os.rename(temporary, self.path)
        except OSError:
            os.unlink(temporary)
            raise

    def _append(self, line: bytes) -> None:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":  # an editor left the last line open
                line = b"\n" + line
            if os.write(fd, line) != len(line):
                os.ftruncate(fd, size)
                raise OSError(f"{self.path}: the disk is full")
            os.fsync(fd)
        finally:
            os.close(fd)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock file stays for good: who removes one lets two in."""
        fd = os.open(self.path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _known(line: str, number: int) -> Iterator[Known]:
    words = line.split()
    if len(words) >= 3 and _KEY_TYPE.match(words[1]) and _is_blob(words[1], words[2]):
        for name in words[0].split(","):
            yield Known(name, HostKey(words[1], words[2]), number)


@dataclass(frozen=True)
class Trust:
    """What decides on the key that a server shows: the operator's pins if there are any, else ``known``."""

    pins: tuple[Pin, ...]
    known: KnownHosts

    def expected_kinds(self, host: str, port: int) -> list[str]:
        """The types of key that we hold for a server: to be asked for first, for a server has several keys."""
        if self.pins:
            return [pin.key.kind for pin in self._pins_of(host) if pin.key]
        return [known.key.kind for known in self.known.of(name_of(host, port))]

    def check(self, host: str, port: int, shown: HostKey) -> None:
        """Return if ``shown`` may be believed. Raises LoginRefused with the remedy; no login is tried then."""
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
