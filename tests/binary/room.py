"""A room: mounts of its own, in which the directories that the one file may choose are empty."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import processes
from bed.machines import until
from binary.onefile import build_id

NOBODY = 65534
# Empty mounts over the candidate directories of extension/directory.py, and a directory for the executable.
_ROOM = """
mount --make-rprivate /
for d in /var/cache /var/tmp /root /tmp /opt /run; do mount -t tmpfs -o mode=$(stat -c %a $d) none $d; done
mkdir /opt/extension; cp "$ONE_FILE" /opt/extension/any-name.sh; chmod 755 /opt/extension /opt/extension/any-name.sh
"""
RUN = "/opt/extension/any-name.sh"
HOME = "/root/.cache/netloom"


class Room:
    """A mount and network namespace, kept alive by a shell."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as source:
            self.holder = subprocess.Popen(
                ["unshare", "--mount", "--net", "sh", "-ec", f"{_ROOM}\necho ready; exec sleep 600"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=[source.fileno()],
                env={"PATH": os.environ["PATH"], "ONE_FILE": f"/proc/self/fd/{source.fileno()}"},
            )
            assert self.holder.stdout is not None
            assert self.holder.stdout.readline() == b"ready\n"

    def popen(self, script: str, *, uid: int = 0, **environ: str) -> subprocess.Popen[str]:
        drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups"] if uid else []
        where = ["nsenter", "-t", str(self.holder.pid), "-m", "-n", f"--wd={self.path('/')}"]
        bare = ["env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", *(f"{name}={it}" for name, it in environ.items())]
        return subprocess.Popen(
            [*where, *drop, *bare, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, script: str, *, uid: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
        """Run a shell script in the room. HOME is unset unless given."""
        process = self.popen(script, uid=uid, **environ)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    def path(self, path: str) -> Path:
        return Path(f"/proc/{self.holder.pid}/root{path}")

    def unpacked(self, directory: str = HOME) -> list[str]:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(os.listdir(self.path(f"{directory}/programs")))
        return []

    def processes(self, word: str = "") -> list[int]:
        """The processes started in the room. ``word`` selects those with this first argument."""
        found = []
        here = os.stat(f"/proc/{self.holder.pid}/ns/mnt").st_ino
        for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                if (
                    os.stat(f"/proc/{pid}/ns/mnt").st_ino == here
                    and pid != self.holder.pid
                    and word in ("", *words[1:2])
                ):
                    found.append(pid)
        return found

    def close(self) -> None:
        for pid in self.processes():
            processes.kill(pid)
        self.holder.kill()
        self.holder.wait()
        assert self.holder.stdout is not None
        self.holder.stdout.close()


def helper_of(room: Room) -> int:
    """The pid of the only helper, once it executes the unpacked program of this build. A call does not wait for it."""

    def found() -> list[int]:
        return [pid for pid in room.processes("helper") if executable(pid).endswith(f"/{build_id()}/netloom.bin")]

    assert until(lambda: len(found()) == 1), room.processes("helper")
    (helper,) = room.processes("helper")
    return helper


def executable(pid: int) -> str:
    """The path of the file that a process executes; empty when it has ended."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/exe")
    return ""
