"""Disk images of the emulated hosts: Debian with its own kernel and systemd, and the programs that operators have.

``make_image`` builds an image from Debian packages and caches it below NETLOOM_HOSTS_CACHE, by default
/var/cache/netloom-hosts, under a hash of its recipe. An image is a directory:

    vmlinuz      the kernel of the distribution
    initrd.gz    busybox and the modules for a virtio disk with ext4
    disk.raw     the root file system, sparse
    versions     one line for each package of VERSIONS_OF: its name and version

The root of a suite is made by debootstrap. The image of a *kind* is this root and further packages. Packages are
installed as in a container: no service is started, and the machine starts them at its first boot.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("NETLOOM_HOSTS_CACHE", "/var/cache/netloom-hosts"))
DISK_BYTES = 6 << 30

_BASE = [
    *["systemd-sysv", "systemd", "udev", "dbus", "kmod", "iproute2", "openssh-server", "sudo", "ifupdown", "procps"],
    *["python3", "ca-certificates", "iputils-ping", "busybox-static", "netbase", "less", "apparmor", "bind9-dnsutils"],
    *["conntrack", "curl", "wget", "linux-image-amd64"],
    *["nftables", "dnsmasq-base", "haproxy"],  # what netloom needs
]
VERSIONS_OF = [
    *["systemd", "libnftables1", "nftables", "dnsmasq-base", "haproxy", "openssh-server", "docker.io", "firewalld"],
    *["network-manager", "ufw", "apparmor"],
]
_DO_NOT_START = "#!/bin/sh\nexit 101\n"
_INTERFACES = """auto lo
iface lo inet loopback
source /etc/network/interfaces.d/*
"""
_INIT = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module" 2>/dev/null; done </order
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 100 ]; do sleep 0.1; tries=$((tries + 1)); done
mount -t ext4 -o noatime,rw /dev/vda /new || exec sh
# The files of this machine, from a second archive that belongs to it alone.
if [ -d /machine ] && [ ! -e /new/etc/machine-files ]; then
    cp -a /machine/. /new/
    touch /new/etc/machine-files
fi
umount /proc /sys
mount --move /dev /new/dev
exec switch_root /new /sbin/init
"""


@dataclass(frozen=True)
class Kind:
    """What a machine is made of. ``packages`` are installed in addition to the base; ``script`` then runs there."""

    name: str
    suite: str = "bookworm"
    packages: tuple[str, ...] = ()
    script: str = ""


KINDS = {
    it.name: it
    for it in (
        Kind("debian12"),
        Kind("debian13", "trixie"),
        Kind("debian11", "bullseye"),
        Kind("docker", packages=("docker.io", "iptables")),
        Kind("firewalld", packages=("firewalld", "iptables", "ufw")),
        Kind("networkmanager", packages=("network-manager", "ifenslave")),
        Kind("apparmor", packages=("apparmor-profiles", "apparmor-utils", "dnsmasq")),
    )
}


class CannotMakeImage(Exception):
    """A step of making an image failed; the message has the end of its output."""


def make_image(kind: Kind) -> Path:
    """The directory of the image, made if it is missing. Raises CannotMakeImage."""
    recipe = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{kind.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = CACHE / f"{kind.name}-{recipe}"
        if done.exists():
            return done
        base = _make_root(kind.suite)
        with tempfile.TemporaryDirectory(prefix=f"{kind.name}.", dir=CACHE) as work:
            made = Path(work, "image")
            made.mkdir()
            with _root_of(kind, base, Path(work)) as root:
                _write_versions(root, made / "versions")
                _make_initrd(root, made)
                disk = made / "disk.raw"
                with open(disk, "wb") as file:
                    file.truncate(DISK_BYTES)
                _run("mkfs.ext4", "-q", "-F", "-d", str(root), "-L", "root", str(disk))
            for old in CACHE.glob(f"{kind.name}-*"):
                shutil.rmtree(old)
            made.rename(done)
        return done


def _make_root(suite: str) -> Path:
    """The root file system of a suite with the base packages and a kernel."""
    recipe = hashlib.sha256(" ".join([suite, *_BASE]).encode()).hexdigest()[:12]
    done = CACHE / f"root-{suite}-{recipe}"
    with open(CACHE / f"root-{suite}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if done.exists():
            return done
        part = CACHE / f"root-{suite}.part"
        shutil.rmtree(part, ignore_errors=True)
        _run("debootstrap", "--variant=minbase", suite, str(part), _mirror())
        with _prepared(part):
            _install(part, _BASE)
        for old in CACHE.glob(f"root-{suite}-*"):
            shutil.rmtree(old)
        part.rename(done)
    return done


@contextlib.contextmanager
def _root_of(kind: Kind, base: Path, work: Path) -> Iterator[Path]:
    """The root of the kind, mounted above that of its suite, which does not change."""
    root = work / "root"
    for name in ("upper", "work", "root"):
        (work / name).mkdir()
    _run(
        "mount",
        "-t",
        "overlay",
        "overlay",
        str(root),
        "-o",
        f"lowerdir={base},upperdir={work}/upper,workdir={work}/work",
    )
    try:
        with _prepared(root):
            if kind.packages:
                _install(root, kind.packages)
            if kind.script:
                _run("chroot", str(root), "sh", "-ec", kind.script)
            _chroot(root, "apt-get", "clean")
        _configure(root)
        yield root
    finally:
        _run("umount", str(root))


@contextlib.contextmanager
def _prepared(root: Path) -> Iterator[None]:
    """Prevent packages from starting services in the root, and give them /proc and the name servers of this machine."""
    policy, resolver = root / "usr/sbin/policy-rc.d", root / "etc/resolv.conf"
    policy.write_text(_DO_NOT_START)
    policy.chmod(0o755)
    resolver.unlink(missing_ok=True)
    shutil.copyfile("/etc/resolv.conf", resolver)
    _run("mount", "-t", "proc", "proc", str(root / "proc"))
    try:
        yield
    finally:
        _run("umount", str(root / "proc"))
        policy.unlink()


def _install(root: Path, packages: Sequence[str]) -> None:
    _chroot(root, "apt-get", "-q", "update")
    _chroot(root, "apt-get", "-q", "-y", "--no-install-recommends", "install", *packages)


def _configure(root: Path) -> None:
    """What every machine has, whatever its name: root's network file, no host name, and no machine id."""
    (root / "etc/network/interfaces").write_text(_INTERFACES)
    (root / "etc/resolv.conf").write_text("")
    (root / "etc/hostname").unlink(missing_ok=True)
    for name in ("etc/machine-id", "var/lib/dbus/machine-id"):
        (root / name).unlink(missing_ok=True)
    (root / "etc/machine-id").touch()  # made at the first boot: each machine has one of its own
    _run("chroot", str(root), "useradd", "-m", "-u", "1500", "-s", "/bin/bash", "netadmin")
    # The tests look at what the machines log, also after a power cut.
    (root / "var/log/journal").mkdir(exist_ok=True)
    # These wait for hardware, or write to the network, and no test needs them.
    units = root / "etc/systemd/system"
    for unit in (
        "apt-daily.timer",
        "apt-daily-upgrade.timer",
        "e2scrub_all.timer",
        "man-db.timer",
        "getty@tty1.service",
    ):
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")


def _make_initrd(root: Path, out: Path) -> None:
    version = sorted(path.name for path in (root / "lib/modules").iterdir())[-1]
    shutil.copyfile(root / f"boot/vmlinuz-{version}", out / "vmlinuz")
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        for name in ("bin", "modules", "proc", "sys", "dev", "new"):
            (tree / name).mkdir()
        shutil.copy(root / "bin/busybox", tree / "bin/busybox")
        order: list[str] = []
        for module in ("virtio_pci", "virtio_blk", "virtio_net", "ext4"):
            listed = _run("chroot", str(root), "modprobe", "-S", version, "--show-depends", module)
            order += [line.split()[1].lstrip("/") for line in listed.splitlines() if line.startswith("insmod ")]
        names = []
        for relative in dict.fromkeys(order):
            path, name = root / relative, Path(relative).name
            if name.endswith(".xz"):
                name = name.removesuffix(".xz")
                packed = subprocess.run(["xz", "-dc", path], capture_output=True, check=True)
                (tree / "modules" / name).write_bytes(packed.stdout)
            else:
                shutil.copy(path, tree / "modules" / name)
            names.append(name)
        (tree / "order").write_text("".join(f"{name}\n" for name in names))
        (tree / "init").write_text(_INIT)
        (tree / "init").chmod(0o755)
        archive = subprocess.run(
            "find . | cpio -o -H newc --quiet | gzip -1", shell=True, cwd=tree, capture_output=True, check=True
        )
        (out / "initrd.gz").write_bytes(archive.stdout)


def _write_versions(root: Path, path: Path) -> None:
    listed = _run("chroot", str(root), "dpkg-query", "-W", "-f", "${Package} ${Version} ${db:Status-Status}\n")
    packages = dict(line.rsplit(" ", 1)[0].split(" ") for line in listed.splitlines() if line.endswith(" installed"))
    kernel = sorted(it.name for it in (root / "lib/modules").iterdir())[-1]
    lines = [f"kernel {kernel}", *(f"{name} {packages[name]}" for name in VERSIONS_OF if name in packages)]
    path.write_text("".join(f"{line}\n" for line in lines))


def _mirror() -> str:
    """The address of the Debian archive that this machine's apt uses."""
    sites = _run("apt-get", "indextargets", "--format", "$(SITE)").split()
    found = [site for site in sites if site.rstrip("/").endswith("/debian")] or sites
    if not found:
        raise CannotMakeImage("apt knows no archive: run apt-get update")
    return found[0]


def _chroot(root: Path, *argv: str) -> str:
    # INITRD: the kernel's own initrd is not made, because the machines boot with ours.
    settings = ("DEBIAN_FRONTEND=noninteractive", "LC_ALL=C.UTF-8", "INITRD=No")
    return _run("chroot", str(root), "env", *settings, *argv)


def _run(*argv: str) -> str:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    output = done.stdout.decode("utf-8", "replace")
    if done.returncode:
        raise CannotMakeImage(f"{' '.join(argv[:6])}: exit status {done.returncode}\n{output[-3000:]}")
    return output
