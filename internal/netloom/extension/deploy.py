"""The program brings itself to a host: over the connection that is there, with what every Linux has there.

What is uploaded lies in a file whose name has the SHA-256 of the whole. Its bytes are written at their own places, so
whoever sends them, again or at the same time, writes the same; a later upload goes on where the file ends. The whole is
copied under a name of its own, checked, and renamed, so that nobody runs half of it or a file that is still written to.

The shell scripts are constants. Their arguments are a directory, a build, numbers and a hash of ours.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import msgspec

from netloom import program
from netloom.errors import BadRequest, HostUnreachable

if TYPE_CHECKING:
    from netloom.extension.ssh import Connection, Ran

DIRECTORY = "/usr/local/libexec/netloom"

_BLOCK = 1 << 16
_NOTED_S = 5.0  # how often a slow upload is in the log
_AGAIN_MAX = 2  # uploads whose bytes turn out to be others than were sent
# Beside the upload and its copy, what a host must have left for its logs and states.
_SPARE_BYTES = 16 << 20

_COMMON = "export LC_ALL=C PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin; umask 022; "

# What of the host matters, one word and value a line. Leaves nothing behind.
_LOOK = (
    _COMMON
    + r"""
directory=$1 build=$2 hash=$3
say() { printf 'netloom-%s %s\n' "$1" "$2"; }
say system "$(uname -s)"
say machine "$(uname -m)"
for tool in sha256sum dd df cp mv rm mkdir chmod wc sed sync; do command -v $tool >/dev/null || say missing $tool; done
if [ -L "$directory" ]; then say foreign "a link"; exit 0; fi
if [ -e "$directory" ] && [ ! -d "$directory" ]; then say foreign "no directory"; exit 0; fi
say current "$(readlink "$directory/current")"
program=$directory/$build/netloom part=$directory/$build/.part-$hash
if [ -f "$program" ]; then say installed "$(sha256sum <"$program" | cut -d ' ' -f 1)"; fi
if [ -f "$part" ]; then say part "$(wc -c <"$part")"; fi
there=$directory
while [ ! -d "$there" ]; do there=${there%/*}; [ -n "$there" ] || there=/; done
say free "$(df -Pk "$there" | sed -n '$s/.* \([0-9][0-9]*\)  *[0-9][0-9]*% .*/\1/p')"
probe=$there/.netloom-probe.$$
trap 'rm -f "$probe"' EXIT
if printf '#!/bin/sh\nexit 7\n' >"$probe" && chmod 700 "$probe"; then
    "$probe" 2>/dev/null
    if [ $? = 7 ]; then say runs yes; else say runs no; fi
else
    say readonly "$there"
fi
"""
)

_UPLOAD = (
    _COMMON
    + r"""
directory=$1 build=$2 hash=$3 blocks=$4
part=$directory/$build/.part-$hash
if [ ! -d "${directory%/*}" ]; then mkdir -p "$directory" && : >"$directory/.made-parent"; fi
mkdir -p "$directory/$build" || exit 1
dd of="$part" bs=65536 seek="$blocks" conv=notrunc || { rm -f "$part"; rmdir "$directory/$build"; exit 1; }
"""
)

# 65: what arrived is not what was sent.
_FINISH = (
    _COMMON
    + r"""
directory=$1 build=$2 hash=$3 size=$4
part=$directory/$build/.part-$hash new=$directory/$build/.new.$$
[ -f "$part" ] || exit 65
trap 'rm -f "$new"' EXIT
flush() { sync "$1" 2>/dev/null || sync; }
cp "$part" "$new" && chmod 755 "$new" && flush "$new" || exit 1
if [ "$(wc -c <"$new")" -ne "$size" ] || [ "$(sha256sum <"$new" | cut -d ' ' -f 1)" != "$hash" ]; then
    rm -f "$part"
    exit 65
fi
mv -f "$new" "$directory/$build/netloom" && rm -f "$part" && flush "$directory/$build"
"""
)
_NOT_WHAT_WAS_SENT = 65


class CannotInstall(HostUnreachable):
    """The host does not take the program, or cannot run it: no agent answers there."""


@dataclass(frozen=True)
class Package:
    """The one file that is brought to hosts."""

    path: str
    build: str
    size: int
    sha256: str
    machine: str


class Outcome(msgspec.Struct, frozen=True):
    """What ``netloom agent activate`` says (agent/setup/install.py)."""

    outcome: str
    build: str
    reason: str = ""


@cache
def package() -> Package | None:
    """The file that is running; None from a checkout. Raises BadRequest when it cannot be read."""
    path = program.path()
    if path is None:
        return None
    try:
        with open(path, "rb") as file:
            head = file.read(20)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Package(path, program.build_id(), os.fstat(file.fileno()).st_size, digest, machine_of(head))
    except OSError as error:
        raise BadRequest(f"{path}: {error.strerror}", hint="hosts are given this file: let it be read") from error


def _is_the_loaders(ran: Ran) -> bool:
    """Whether the program did not come to say something itself."""
    return ran.status in (126, 127) or "GLIBC_" in ran.complaint


# elf(5), e_machine, and what uname calls it.
_MACHINES = {62: "x86_64", 183: "aarch64", 243: "riscv64", 22: "s390x", 21: "ppc64le"}


def machine_of(head: bytes) -> str:
    """What a program with these first bytes is made for; this machine, where they do not tell."""
    if head[:4] != b"\x7fELF":
        return os.uname().machine
    return _MACHINES.get(int.from_bytes(head[18:20], "little" if head[5] == 1 else "big"), "another machine")


class Deployment:
    """One host gets the program. ``tell`` hears what is being done, as often as it changes; ``note`` is for the log."""

    def __init__(
        self,
        connection: Connection,
        package: Package,
        tell: Callable[[str], None],
        note: Callable[[str], None],
        *,
        by_word: bool = False,
    ) -> None:
        self._connection = connection
        self._package = package
        self._tell = tell
        self._note = note
        self._by_word = by_word

    @property
    def _host(self) -> str:
        return self._connection.host

    async def carry_out(self, *, repair: bool = False) -> Outcome | None:
        """Uploads what is missing and puts it in use. Raises HostUnreachable; a later one goes on from there.

        ``repair``: only if the program in use there is not this one, whole; None if it is.
        """
        package = self._package
        self._say("looking at the host")
        facts = await self._look()
        whole = facts.get("installed") == package.sha256
        if repair and whole and facts.get("current") == package.build:
            return None
        if not whole:
            for _ in range(_AGAIN_MAX):
                await self._upload(int(facts.get("part") or 0))
                if await self._finish():
                    break
                facts = {}
            else:
                raise CannotInstall(
                    f"{self._host}: what arrived there is not what was sent, {_AGAIN_MAX} times (SHA-256)",
                    hint="is its disk, or its memory, broken?",
                )
        return await self._activate()

    async def _look(self) -> dict[str, str]:
        ran = await self._shell(_LOOK, self._package.sha256)
        facts = dict(
            line.removeprefix("netloom-").split(" ", 1) for line in ran.out.splitlines() if line.startswith("netloom-")
        )
        if "system" not in facts:
            raise CannotInstall(
                f"{self._host}: the agent is not installed, and the host cannot be looked at: {ran.complaint}",
                hint="may that user run sh there?",
            )
        self._judge(facts)
        return facts

    def _judge(self, facts: dict[str, str]) -> None:
        package, host = self._package, self._host
        if facts["system"] != "Linux":
            raise CannotInstall(f"{host}: runs {facts['system']}, not Linux")
        if facts["machine"] != package.machine:
            raise CannotInstall(
                f"{host}: is a {facts['machine']} machine, this netloom is made for {package.machine}",
                hint="use hosts of that architecture",
            )
        if missing := facts.get("missing"):
            raise CannotInstall(f"{host}: has no {missing}", hint="install coreutils and sed there")
        if what := facts.get("foreign"):
            raise CannotInstall(f"{host}: {DIRECTORY} is {what}, not ours", hint="remove it")
        if facts.get("runs") == "no":
            raise CannotInstall(f"{host}: {DIRECTORY} is mounted noexec", hint="mount something without noexec there")
        if facts.get("installed") == package.sha256:
            return
        if where := facts.get("readonly"):
            raise CannotInstall(
                f"{host}: {where} cannot be written to", hint=f"mount something writable at {DIRECTORY}"
            )
        wants = 2 * package.size - int(facts.get("part") or 0) + _SPARE_BYTES
        free = int(facts.get("free") or wants) << 10  # where df does not tell, dd will
        if free < wants:
            raise CannotInstall(
                f"{host}: {free >> 20} MiB are free at {DIRECTORY}, {wants >> 20} are needed", hint="make room there"
            )

    async def _upload(self, there: int) -> None:
        package = self._package
        blocks = min(there, package.size) // _BLOCK
        sent = blocks * _BLOCK
        percent = -1
        began = noted = time.monotonic()
        self._note(f"{self._host}: uploading {package.build}, {package.size} bytes, from byte {sent}")

        def chunks() -> Sequence[bytes]:
            nonlocal sent, percent, noted
            now = sent * 100 // package.size
            if now != percent:
                percent = now
                self._say(f"{percent} %")
                if time.monotonic() - noted > _NOTED_S:
                    noted = time.monotonic()
                    self._note(f"{self._host}: uploading {package.build}, {percent} %")
            data = os.pread(file, _BLOCK, sent)
            sent += len(data)
            return [data] if data else []

        file = os.open(package.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            ran = await self._shell(_UPLOAD, package.sha256, str(blocks), feed=chunks)
        finally:
            os.close(file)
        if ran.status != 0:
            complaint = ran.complaint.partition("dd: ")[2] or ran.complaint
            raise CannotInstall(f"{self._host}: the agent could not be uploaded: {complaint}", hint="make room there")
        self._note(f"{self._host}: uploaded {package.build} in {time.monotonic() - began:.1f} s")

    async def _finish(self) -> bool:
        """Whether all of it arrived as it was sent; what did not is gone then, and all is to be sent anew."""
        self._say("checking")
        package = self._package
        ran = await self._shell(_FINISH, package.sha256, str(package.size))
        if ran.status == 0:
            return True
        if ran.status == _NOT_WHAT_WAS_SENT:
            self._note(f"{self._host}: what arrived of {package.build} is not what was sent")
            # Two may finish at the same time: the other one has put it there.
            return (await self._look()).get("installed") == package.sha256
        raise CannotInstall(f"{self._host}: the agent could not be put in its place: {ran.complaint}")

    async def _activate(self) -> Outcome:
        self._say("starting")
        package = self._package
        words = [f"{DIRECTORY}/{package.build}/netloom", "agent", "activate", *(["--by-word"] if self._by_word else [])]
        ran = await self._connection.execute(words)
        line = next((line for line in ran.out.splitlines() if line.startswith("{")), "")
        if ran.status != 0 or not line:
            complaint = ran.complaint.removeprefix("netloom agent: ").removeprefix("netloom: ")
            self._note(f"{self._host}: {package.build} is not in use: {complaint}")
            raise CannotInstall(
                f"{self._host}: the agent does not start: {complaint}",
                hint="does that host have glibc 2.28 or later?" if _is_the_loaders(ran) else "",
            )
        outcome = msgspec.json.decode(line, type=Outcome)
        self._note(f"{self._host}: {outcome.outcome}: {outcome.build} {outcome.reason}".rstrip())
        return outcome

    async def _shell(self, script: str, *arguments: str, feed: Callable[[], Sequence[bytes]] | None = None) -> Ran:
        words = ["sh", "-c", script, "netloom", DIRECTORY, self._package.build, *arguments]
        return await self._connection.execute(words, feed=feed)

    def _say(self, what: str) -> None:
        self._connection.installing = what
        self._tell(f"agent being installed on {self._host}, {what}")
