"""A simulated host that runs the real systemd in its own namespaces (PID, network, mount, cgroup) and its own disk."""

from __future__ import annotations

import contextlib
import os
import subprocess
from functools import partial
from pathlib import Path

import processes
from bed.machines import until

_DISK = """
mount --make-rprivate /
mount -t tmpfs -o mode=755 none /mnt
mkdir /mnt/upper /mnt/work /mnt/root /mnt/groups
mount -t cgroup2 none /mnt/groups
ip link set lo up
echo ready
exec sleep 1000
"""

# Units that would change the real machine, or wait for devices that do not exist.
_MASKED = "systemd-sysctl systemd-modules-load systemd-remount-fs systemd-udevd systemd-logind systemd-timesyncd"

_BOOT = r"""
echo $$ >/mnt/groups/$GROUP/cgroup.procs
exec unshare --cgroup --pid --fork --mount --kill-child sh -ec '
root=/mnt/root
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay $root
mount -t proc proc $root/proc
mount -t sysfs sysfs $root/sys
mount -t cgroup2 none $root/sys/fs/cgroup
mount -t tmpfs -o mode=755 none $root/run
mount -t tmpfs none $root/tmp
mount -t tmpfs -o mode=755 none $root/dev
for it in "null 1 3" "zero 1 5" "full 1 7" "random 1 8" "urandom 1 9" "tty 5 0"; do
    set -- $it; mknod -m 666 $root/dev/$1 c $2 $3
done
mkdir -p $root/dev/pts $root/dev/shm
ln -s /proc/self/fd $root/dev/fd
: >$root/etc/machine-id
: >$root/etc/fstab
for unit in $MASKED; do ln -sf /dev/null $root/etc/systemd/system/$unit.service; done
cd $root
pivot_root . mnt
umount -l /mnt
exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    /lib/systemd/systemd --system --unit=multi-user.target --show-status=no --log-target=null
'
"""


class SystemdHost:
    """A host with systemd as its init. ``power_cut`` and ``boot`` keep the disk; ``close`` removes it."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--net", "--uts", "--ipc", "sh", "-ec", _DISK], stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"ready\n"
        self._group = f"netloom-test-{self._holder.pid}"
        self._groups = Path(f"/proc/{self._holder.pid}/root/mnt/groups/{self._group}")
        self._groups.mkdir()
        self._machine: subprocess.Popen[bytes] | None = None
        self.pid = 0
        self.boot()

    def boot(self) -> None:
        """Power on; returns when systemd has started everything."""
        self._machine = subprocess.Popen(
            ["nsenter", "-t", str(self._holder.pid), "-m", "-n", "-u", "-i", "sh", "-ec", _BOOT],
            env={"PATH": os.environ["PATH"], "GROUP": self._group, "MASKED": _MASKED},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert until(self._is_up, seconds=120.0)

    def _is_up(self) -> bool:
        assert self._machine is not None
        self.pid = _first_process(self._machine.pid)
        return bool(self.pid) and self.run("systemctl", "is-system-running", check=False) in ("running", "degraded")

    def power_cut(self) -> None:
        """Kill every process at once."""
        assert self._machine is not None
        if self.pid:
            processes.kill(self.pid)
        self._machine.wait(60)

    def close(self) -> None:
        self.power_cut()
        for directory in (*sorted(self._groups.rglob("*/"), reverse=True), self._groups):
            until(partial(_removed, directory))
        self._holder.kill()
        self._holder.communicate()

    def run(self, *words: str, check: bool = True) -> str:
        """Run a program on the host; returns its standard output."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-a", "--", *words],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: {done.stderr}")
        return done.stdout.strip()

    def path(self, path: str) -> Path:
        """A path of the host, as this process can open it."""
        return Path(f"/proc/{self.pid}/root{path}")


def _removed(directory: Path) -> bool:
    with contextlib.suppress(OSError):
        directory.rmdir()
    return not directory.exists()


def _first_process(pid: int) -> int:
    """The descendant that is systemd as process 1 of its PID namespace; 0 while there is none."""
    while True:
        try:
            children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return 0
        ids = next(line.split()[1:] for line in status.splitlines() if line.startswith("NSpid"))
        if ids[-1] == "1" and "Name:\tsystemd" in status:
            return pid
        if not children:
            return 0
        pid = int(children[0])
