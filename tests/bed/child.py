"""The child process of the bed: enters or makes namespaces, then serves requests of the test.

Run as ``python -I -S -B child.py <spec as JSON>``. It reads requests as JSON lines from stdin and writes answers to
stdout. The process ends when stdin closes, and its namespaces, mounts and links go with it. So nothing outlives a test.
"""

from __future__ import annotations

import builtins
import json
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import netns
from bed import syscalls

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
RUN_TIMEOUT_S = 120.0

_say_lock = threading.Lock()


def say(message: dict[str, Any]) -> None:
    with _say_lock:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()


def main() -> None:
    # Before Python 3.10 (an emulated host with Debian 11) sockets raise a class of their own.
    vars(builtins)["TimeoutError"] = vars(socket)["timeout"]
    spec: dict[str, Any] = json.loads(sys.argv[1])
    # The test handles Ctrl-C and closes our stdin at its end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.umask(0o022)
    if entered := spec.get("enter"):
        netns.enter(entered["pid"], entered["kinds"])
    before: list[str] = spec.get("unshare_before_fork", [])
    if before:
        syscalls.unshare(before)
    if "pid" in before or (entered and "pid" in entered["kinds"]):
        _continue_in_child()
    else:
        say({"pid": os.getpid()})
    if path := spec.get("netns"):
        netns.enter_network(path)
    if after := spec.get("unshare", []):
        syscalls.unshare(after)
    ROLES[spec["role"]](spec)


def _continue_in_child() -> None:
    """Continue in a forked child, because only children enter a new PID namespace; report its outer pid to the test."""
    told_read, told_write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(told_write)
        os.read(told_read, 1)
        os.close(told_read)
        return
    os.close(told_read)
    say({"pid": child})
    os.close(told_write)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


# --- roles ----------------------------------------------------------------------------------------


def keeper(spec: dict[str, Any]) -> None:
    """The switch of the bed. It also holds the disks of the hosts in a tmpfs of its own mount namespace."""
    syscalls.make_mounts_private()
    syscalls.mount("disks", spec["shelf"], "tmpfs", options="mode=755")
    _run(["ip", "link", "set", "lo", "up"])
    serve()


def node(spec: dict[str, Any]) -> None:
    """A network namespace with its own mounts and host name: a VM, or a machine of the internet."""
    syscalls.make_mounts_private()
    syscalls.set_hostname(spec["name"])
    syscalls.mount("sysfs", "/sys", "sysfs")
    syscalls.mount("tmp", "/tmp", "tmpfs")
    with open("/tmp/resolv.conf", "w"):
        pass
    real = os.path.realpath("/etc/resolv.conf")
    if os.path.exists(real):
        syscalls.bind("/tmp/resolv.conf", real, read_only=False)
    _run(["ip", "link", "set", "lo", "up"])
    serve()


def worker(spec: dict[str, Any]) -> None:
    """Serve requests in the namespaces of another process."""
    serve()


def machine(spec: dict[str, Any]) -> NoReturn:
    """PID 1 of a host or of the management server: overlays the root file system, then supervises services."""
    _build_root(spec)
    syscalls.set_hostname(spec["name"])
    _run(["ip", "link", "set", "lo", "up"])
    services = {}
    if spec["sshd"]:
        _prepare_sshd()
        services["sshd"] = ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/bed_sshd_config"]
    _supervise(services)


def emulator(spec: dict[str, Any]) -> NoReturn:
    """Run QEMU until stdin closes or QEMU ends: nothing outlives the test, even if the test is killed."""
    pid = _spawn(spec["argv"], spec["log"])
    process = os.pidfd_open(pid)
    say({"ready": True})
    while process not in (found := select.select([0, process], [], [])[0]):
        if 0 in found and not os.read(0, 4096):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            break
    _, status = os.waitpid(pid, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


ROLES: dict[str, Callable[[dict[str, Any]], None]] = {
    "keeper": keeper,
    "node": node,
    "worker": worker,
    "machine": machine,
    "emulator": emulator,
}


# --- a machine's root and its PID 1 -----------------------------------------------------------------


def _build_root(spec: dict[str, Any]) -> None:
    disk = spec["disk"]
    syscalls.make_mounts_private()
    first_boot = not os.path.exists(f"{disk}/upper")
    for name in ("upper", "work", "root"):
        os.makedirs(f"{disk}/{name}", exist_ok=True)
    root = f"{disk}/root"
    syscalls.mount("disk", root, "overlay", options=f"lowerdir=/,upperdir={disk}/upper,workdir={disk}/work")
    syscalls.mount("proc", f"{root}/proc", "proc")
    syscalls.mount("sysfs", f"{root}/sys", "sysfs")
    syscalls.mount("cgroup", f"{root}/sys/fs/cgroup", "tmpfs", options="mode=755")
    syscalls.mount("run", f"{root}/run", "tmpfs", options="mode=755")
    syscalls.mount("tmp", f"{root}/tmp", "tmpfs", options="mode=1777")
    syscalls.mount("dev", f"{root}/dev", "tmpfs", options="mode=755")
    os.umask(0)
    for name, major, minor in (
        ("null", 1, 3),
        ("zero", 1, 5),
        ("full", 1, 7),
        ("random", 1, 8),
        ("urandom", 1, 9),
        ("tty", 5, 0),
    ):
        os.mknod(f"{root}/dev/{name}", 0o020666, os.makedev(major, minor))
    os.umask(0o022)
    for name in ("dev/net", "dev/pts", "dev/shm", "run/sshd", "run/netns", "run/lock"):
        os.makedirs(f"{root}/{name}")
    os.mknod(f"{root}/dev/net/tun", 0o020600, os.makedev(10, 200))
    syscalls.mount("devpts", f"{root}/dev/pts", "devpts", options="newinstance,ptmxmode=0666,mode=620")
    for link, target in (
        ("ptmx", "pts/ptmx"),
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ):
        os.symlink(target, f"{root}/dev/{link}")
    if first_boot:
        _fill_disk(root, spec)
    # The program and its interpreter, as they are now and not to be written to.
    for path in spec["shown"]:
        os.makedirs(root + path, exist_ok=True)
        parent = os.path.dirname(root + path)
        while len(parent) > len(root):
            os.chmod(parent, os.stat(parent).st_mode | 0o011)
            parent = os.path.dirname(parent)
        syscalls.bind(path, root + path, read_only=True)
    syscalls.change_root(root)
    os.environ.clear()
    os.environ.update(PATH=PATH, HOME="/root", LANG="C.UTF-8")


def _fill_disk(root: str, spec: dict[str, Any]) -> None:
    for path in ("/var/lib/netloom", "/etc/netloom"):
        shutil.rmtree(root + path, ignore_errors=True)
    for path, text in spec["append"].items():
        with open(root + path, "a") as file:
            file.write(text)
    for path, entry in spec["files"].items():
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        if os.path.islink(root + path):
            os.unlink(root + path)
        with open(root + path, "w") as file:
            file.write(entry["text"])
        os.chmod(root + path, entry.get("mode", 0o644))
        os.chown(root + path, entry.get("uid", 0), entry.get("gid", 0))
    for path, entry in spec["directories"].items():
        os.makedirs(root + path, exist_ok=True)
        os.chmod(root + path, entry.get("mode", 0o755))
        os.chown(root + path, entry.get("uid", 0), entry.get("gid", 0))
    if root_hash := spec.get("root_password_hash"):
        with open(root + "/etc/shadow") as file:
            lines = [line for line in file if not line.startswith("root:")]
        with open(root + "/etc/shadow", "w") as file:
            file.write(f"root:{root_hash}:19000:0:99999:7:::\n" + "".join(lines))


def _prepare_sshd() -> None:
    if not os.path.exists("/etc/ssh/bed_host_key"):
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/etc/ssh/bed_host_key"])
    config = "/etc/ssh/bed_sshd_config"
    # OpenSSH 9.8 and later lock out an address after failed logins; older ones do not know the option.
    penalties = "PerSourcePenalties no\n"
    with open(config) as file:
        if "PerSourcePenalties" in file.read():
            return
    with open(config, "a") as file:
        file.write(penalties)
    if _status(["/usr/sbin/sshd", "-t", "-f", config]) != 0:
        with open(config) as file:
            text = file.read()
        with open(config, "w") as file:
            file.write(text.replace(penalties, "# PerSourcePenalties\n"))


def _listens(port: int) -> bool:
    with open("/proc/net/tcp") as file:
        return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in list(file)[1:])


def _supervise(services: dict[str, list[str]]) -> NoReturn:
    """Reap orphans; start and restart sshd and the programs of /etc/bed/respawn; end when stdin closes."""
    woken_read, woken_write = os.pipe()
    os.set_blocking(woken_write, False)
    os.set_blocking(woken_read, False)
    signal.set_wakeup_fd(woken_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    if os.path.isdir("/etc/bed/respawn"):
        services |= {name: [f"/etc/bed/respawn/{name}"] for name in sorted(os.listdir("/etc/bed/respawn"))}
    running = {_spawn(argv, f"/var/log/{name}.log"): name for name, argv in services.items()}
    waiting: dict[str, float] = {}
    if "sshd" in services:
        deadline = time.monotonic() + 50
        while not _listens(22) and time.monotonic() < deadline:
            time.sleep(0.004)
    say({"ready": True})
    while True:
        timeout = min((at - time.monotonic() for at in waiting.values()), default=60.0)
        readable, _, _ = select.select([0, woken_read], [], [], max(0.0, timeout))
        if 0 in readable and not os.read(0, 4096):
            os._exit(0)
        if woken_read in readable:
            os.read(woken_read, 4096)
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if name := running.pop(pid, ""):
                waiting[name] = time.monotonic() + 0.2
        for name in [name for name, at in waiting.items() if at <= time.monotonic()]:
            del waiting[name]
            running[_spawn(services[name], f"/var/log/{name}.log")] = name


def _spawn(argv: list[str], log: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        null = os.open("/dev/null", os.O_RDONLY)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(null, 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.closerange(3, 256)
        os.execv(argv[0], argv)
    finally:
        os._exit(127)


def _status(argv: list[str]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for descriptor in (0, 1, 2):
                os.dup2(null, descriptor)
            os.execvp(argv[0], argv)
        finally:
            os._exit(127)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run(argv: list[str]) -> None:
    if status := _status(argv):
        raise RuntimeError(f"{' '.join(argv)}: exit status {status}")


# --- serving requests -------------------------------------------------------------------------------


def serve() -> NoReturn:
    """Answer requests until stdin closes. Each runs in a thread of its own, so a test can run many in parallel."""
    from bed import server

    say({"ready": True})
    server.serve(sys.stdin, say)
    os._exit(0)


if __name__ == "__main__":
    main()
