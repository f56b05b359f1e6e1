"""Install the program on a host: upload it over an open SSH connection, and activate it there.

The host needs only a shell, coreutils and sed. The upload goes into a partial file whose name contains the SHA-256 of
the package. Each block is written at its own offset, so two uploads at the same time, or a repeated one, write the same
bytes, and a later upload resumes where the file ends. The complete file is copied, verified and renamed, so that no
incomplete program, and none that is still being written, can be executed.

All of this is done by one shell, over one channel (step_shell.py). The shell scripts are constants. Their arguments are
our directory, the build, sizes and the hash.
"""

from __future__ import annotations

import os
import time

import msgspec

from netloom.errors import HostUnreachable
from netloom.extension.package import Package
from netloom.extension.progress import Installing, Progress, Step
from netloom.extension.ssh import CompletedCommand, SshConnection
from netloom.extension.step_shell import StepShell
from netloom.wire import Activation

DIRECTORY = "/usr/local/libexec/netloom"

_BLOCK = 1 << 16
_LOG_EVERY_S = 5.0  # how often a slow upload writes its percentage to the log
_UPLOADS_MAX = 2  # when the uploaded bytes do not have the right hash
# Free space that the host must keep for its logs and states, in addition to the upload and its copy.
_SPARE_BYTES = 16 << 20

_COMMON = "export LC_ALL=C PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin; umask 022; "

# Prints facts about the host, one name and value per line. Leaves no file on the host.
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
[ -e "$directory/.untested" ] || say current "$(readlink "$directory/current")"
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
directory=$1 build=$2 hash=$3 blocks=$4 bytes=$5
part=$directory/$build/.part-$hash
if [ ! -d "${directory%/*}" ]; then mkdir -p "$directory" && : >"$directory/.made-parent"; fi
mkdir -p "$directory/$build" || exit 1
dd of="$part" bs=65536 seek="$blocks" conv=notrunc count="$bytes" iflag=fullblock,count_bytes && exit 0
rm -f "$part"
rmdir "$directory/$build"
exit 1
"""
)

# Exit status 65: the size or the hash of the uploaded file is wrong.
_FINISH = (
    _COMMON
    + r"""
directory=$1 build=$2 hash=$3 size=$4
part=$directory/$build/.part-$hash new=$directory/$build/.new.$$ program=$directory/$build/netloom
# Another sender of the same build may have finished it, and removed the uploaded part.
installed() { [ -f "$program" ] && [ "$(sha256sum <"$program" | cut -d ' ' -f 1)" = "$hash" ]; }
[ -f "$part" ] || { installed && exit 0; exit 65; }
trap 'rm -f "$new"' EXIT
flush() { sync "$1" 2>/dev/null || sync; }
if ! cp "$part" "$new"; then installed && exit 0; exit 1; fi
chmod 755 "$new" && flush "$new" || exit 1
if [ "$(wc -c <"$new")" -ne "$size" ] || [ "$(sha256sum <"$new" | cut -d ' ' -f 1)" != "$hash" ]; then
    rm -f "$part"
    exit 65
fi
mv -f "$new" "$program" && rm -f "$part" && flush "$directory/$build"
"""
)
_WRONG_HASH = 65

# Reads exactly the lines of its steps and the bytes of the upload. It ends after an upload that failed, because the
# remaining bytes would be read as steps.
_STEPS = f"""
directory=$1 build=$2 hash=$3 size=$4 step=$5
look() ({_LOOK})
upload() ({_UPLOAD})
finish() ({_FINISH})
[ -n "$step" ] || read -r step first second || exit 0
while :; do
    case $step in
    look) look "$directory" "$build" "$hash" </dev/null 2>&1 ;;
    upload) upload "$directory" "$build" "$hash" "$first" "$second" 2>&1 ;;
    finish) finish "$directory" "$build" "$hash" "$size" </dev/null 2>&1 ;;
    activate) "$directory/$build/netloom" agent activate $first </dev/null 2>&1 ;;
    connect) [ ! -x "$directory/current/netloom" ] || exec "$directory/current/netloom" agent connect; false ;;
    *) exit 64 ;;
    esac
    status=$?
    printf '\nnetloom-end %s\n' "$status"
    [ "$step" != upload ] || [ "$status" = 0 ] || exit 1
    read -r step first second || exit 0
done
"""


class CannotInstall(HostUnreachable):
    """The program cannot be installed on the host, or does not run there, so no agent answers."""


def _could_not_load(done: CompletedCommand) -> bool:
    """Whether the shell or the dynamic loader failed, before the program itself ran."""
    return done.status in (126, 127) or "GLIBC_" in done.complaint


def _bytes(text: str, otherwise: int) -> int:
    """A figure of a host; ``otherwise`` if it is missing, or is not a figure."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else otherwise


def install_shell(connection: SshConnection, package: Package) -> StepShell:
    """A shell that can install ``package``, and that can become the relay to the agent."""
    return StepShell(
        connection, ["sh", "-c", _STEPS, "netloom", DIRECTORY, package.build, package.sha256, str(package.size)]
    )


class Deployment:
    """The installation of ``package`` on one host. ``now``: how far it is."""

    def __init__(
        self,
        connection: SshConnection,
        package: Package,
        progress: Progress,
        shell: StepShell,
        *,
        forced_by_operator: bool = False,
    ) -> None:
        """``shell``: of ``install_shell``.

        ``forced_by_operator``: install the package even if an operator went back from this build on the host.
        """
        self.now = Installing(connection.host, "looking at the host")
        self._host = connection.host
        self._shell = shell
        self._package = package
        self._progress = progress
        self._forced_by_operator = forced_by_operator

    async def run(self, *, only_if_missing: bool = False) -> Activation | None:
        """Upload the package unless the host has it, and activate it. Another deployment can resume a failed upload.

        ``only_if_missing``: do nothing, and return None, when the host already uses an intact copy of this build.
        Raises HostUnreachable, or CannotInstall with a remedy.
        """
        package = self._package
        self._report("looking at the host")
        facts = await self._look()
        intact = facts.get("installed") == package.sha256
        if only_if_missing and intact and facts.get("current") == package.build:
            return None
        if not intact:
            for _ in range(_UPLOADS_MAX):
                await self._upload(_bytes(facts.get("part", ""), 0))
                if await self._finish():
                    break
                facts = {}
            else:
                raise CannotInstall(
                    f"{self._host}: what arrived there is not what was sent, {_UPLOADS_MAX} times (SHA-256)",
                    hint="is its disk, or its memory, broken?",
                )
        return await self._activate()

    async def _look(self) -> dict[str, str]:
        done = await self._shell.step("look")
        found = (
            line.removeprefix("netloom-").partition(" ") for line in done.out.splitlines() if line[:8] == "netloom-"
        )
        facts = {name: value for name, _, value in found}
        if "system" not in facts:
            raise CannotInstall(
                f"{self._host}: the agent is not installed, and the host cannot be examined: {done.complaint}",
                hint="is that user allowed to run sh there?",
            )
        self._check(facts)
        return facts

    def _check(self, facts: dict[str, str]) -> None:
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
        needed = 2 * package.size - _bytes(facts.get("part", ""), 0) + _SPARE_BYTES
        free = _bytes(facts.get("free", ""), needed) << 10  # without a figure from df, dd reports a full disk
        if free < needed:
            raise CannotInstall(
                f"{host}: {free >> 20} MiB are free at {DIRECTORY}, {needed >> 20} are needed", hint="make room there"
            )

    async def _upload(self, uploaded: int) -> None:
        package = self._package
        blocks = min(uploaded, package.size) // _BLOCK
        sent = blocks * _BLOCK
        percent = -1
        began = logged = time.monotonic()
        self._progress.log(f"{self._host}: uploading {package.build}, {package.size} bytes, from byte {sent}")

        def chunk() -> bytes:
            nonlocal sent, percent, logged
            now = sent * 100 // package.size
            if now != percent:
                percent = now
                self._report("uploading", percent)
                if time.monotonic() - logged > _LOG_EVERY_S:
                    logged = time.monotonic()
                    self._progress.log(f"{self._host}: uploading {package.build}, {percent} %")
            data = os.pread(file, min(_BLOCK, package.size - sent), sent)
            if not data and sent < package.size:  # guard: a-shorter-file-ends-the-upload
                raise CannotInstall(f"{package.path} was changed while it was uploaded", hint="repeat the call")
            sent += len(data)
            return data

        file = os.open(package.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            done = await self._shell.step("upload", str(blocks), str(package.size - sent), feed=chunk)
        finally:
            os.close(file)
        if done.status != 0:
            complaint = done.complaint.partition("dd: ")[2] or done.complaint
            raise CannotInstall(f"{self._host}: the agent could not be uploaded: {complaint}", hint="make room there")
        self._progress.log(f"{self._host}: uploaded {package.build} in {time.monotonic() - began:.1f} s")

    async def _finish(self) -> bool:
        """Verify the upload and move it into place. False: its hash was wrong, and the partial file was removed."""
        self._report("checking")
        package = self._package
        done = await self._shell.step("finish")
        if done.status == 0:
            return True
        if done.status == _WRONG_HASH:
            self._progress.log(f"{self._host}: what arrived of {package.build} is not what was sent")
            # Another call may have finished the same upload at the same time, and moved the file into place.
            return (await self._look()).get("installed") == package.sha256
        raise CannotInstall(f"{self._host}: the agent could not be put in its place: {done.complaint}")

    async def _activate(self) -> Activation:
        self._report("starting")
        package = self._package
        done = await self._shell.step("activate", *(["--by-word"] if self._forced_by_operator else []))
        line = next((line for line in done.out.splitlines() if line.startswith("{")), "")
        if done.status != 0 or not line:
            complaint = done.complaint.removeprefix("netloom agent: ").removeprefix("netloom: ")
            self._progress.log(f"{self._host}: {package.build} is not in use: {complaint}")
            raise CannotInstall(
                f"{self._host}: the agent does not start: {complaint}",
                hint="does that host have glibc 2.28 or later?" if _could_not_load(done) else "",
            )
        try:
            activation = msgspec.json.decode(line, type=Activation)
        except (msgspec.MsgspecError, RecursionError) as error:  # guard: an-activation-is-any-text
            raise CannotInstall(f"{self._host}: its answer to the installation cannot be read: {error}") from error
        self._progress.log(f"{self._host}: {activation.outcome}: {activation.build} {activation.reason}".rstrip())
        return activation

    def _report(self, step: Step, percent: int | None = None) -> None:
        self.now = Installing(self._host, step, percent)
        self._progress.installing(self.now)
