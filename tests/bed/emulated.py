"""Emulated hosts: real kernels and real systemd in QEMU, in the place of the bed's simulated hosts.

An :class:`EmulatedHost` has the methods of a simulated :class:`bed.lab.Host`. The bed's process on it is started over
SSH. Its three NICs lead to the switch of bed/trunk.py, so management server, internet and VLANs are those of the bed.
QEMU runs without KVM: a machine needs 30 to 60 seconds to boot, and times on it are no measure of anything.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bed import images
from bed.client import BedError, Client, Running
from bed.lab import Bed, Host
from bed.machines import Done, Machine

BOOT_S_MAX = 300.0
_TRUNKS = ("eth0", "eth1", "eth2")
_TESTS = Path(__file__).resolve().parents[1]
_BED_ON_HOST = "/opt/bed"
_CHILD = f"exec python3 -I -S -B {_BED_ON_HOST}/bed/child.py"
_MEMORY_MB = 768

_SSHD = "PermitRootLogin prohibit-password\nMaxSessions 200\nMaxStartups 200\nUseDNS no\n"


class EmulatedHost(Host):
    """A machine in QEMU with a disk of its own, which survives ``power_cut``. ``kind``: what is installed there."""

    def __init__(self, bed: EmulatedBed, number: int, kind: images.Kind) -> None:
        super().__init__(bed, number)
        self.kind = kind
        self.image = images.make_image(kind)
        self.directory = bed.directory / self.name
        self.directory.mkdir()
        self._control = self.directory / "ssh"
        self._log = self.directory / "qemu.log"
        self._emulated = bed

    @property
    def pid(self) -> int:
        """There is no process of this host in the namespace of the test."""
        raise BedError(f"{self.name} is emulated: its processes are not those of this machine")

    # --- power

    def begin_boot(self) -> None:
        if self.running:
            raise BedError(f"{self.name} runs already")
        disk = self.directory / "disk.qcow2"
        if not disk.exists():
            base = str(self.image / "disk.raw")
            _run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", str(disk))
            self._write_initrd()
        for nic in _TRUNKS:
            Path(f"{self._trunk(nic)}").unlink(missing_ok=True)
        self._init = Client(self.name, {"role": "emulator", "argv": self._qemu(disk), "log": str(self._log)})
        self._init.wait_up()

    def end_boot(self) -> None:
        self.client = self._connect(self.name, {"role": "worker"}, master=True)
        self.running = True

    def power_cut(self) -> None:
        """End QEMU at once. What was written and not synced is lost, as on a machine."""
        if not self.running:
            return
        self._leave()
        assert self._init is not None
        self._init.end()

    def reboot(self, *, how: str = "systemctl reboot") -> None:
        """Restart from inside, and wait until SSH answers again."""
        before = self.read("/proc/sys/kernel/random/boot_id")
        # A little later, so that the command's own session ends properly.
        self.sh(f"systemd-run --quiet --on-active=1 sh -c {shlex.quote(how)}")
        self._leave()
        deadline = time.monotonic() + BOOT_S_MAX
        while True:
            self.end_boot()
            if self.read("/proc/sys/kernel/random/boot_id") != before:
                return
            if time.monotonic() > deadline:
                raise BedError(f"{self.name} did not restart within {BOOT_S_MAX:.0f} s: see {self.console}")
            self._leave()
            time.sleep(1)

    @property
    def console(self) -> Path:
        """The serial console, of all boots."""
        return self.directory / "console.log"

    def _leave(self) -> None:
        self.running = False
        for vm in self.vms:
            vm.client.end()
        self.vms = []
        self.client.end()

    # --- links and VMs

    def _plug(self, segments: Sequence[tuple[str, str]]) -> None:
        """The kernel of the host knows 802.1Q: its VLAN links are made by netloom, as on a real host."""

    def _node(self, name: str) -> Client:
        return self._connect(name, {"role": "node", "name": name, "unshare": ["net", "mnt", "uts"]})

    def _make_vlan_link(self, nic: str, vlan: int | str) -> None:
        """Make the VLAN link as CloudStack's KVM agent does, unless it is there."""
        self.sh(f"ip link show {nic}.{vlan} || ip link add link {nic} name {nic}.{vlan} type vlan id {vlan}")
        self.links(f"link set {nic} up")

    def _make_tap(self, tap: str, mac: str, client: Client) -> None:
        self.links(f"link add {tap} type veth peer name eth0 address {mac} netns {client.pid}")

    def within(self, namespace: str) -> Machine:
        spec = {"role": "worker", "netns": f"/run/netns/{namespace}"}
        return Machine(f"{self.name}/{namespace}", self._connect(f"{self.name}/{namespace}", spec))

    # --- looking

    def netloom(self, *arguments: str, check: bool = True) -> Done:
        """Run the installed program as an operator of the host does."""
        program = "/usr/local/libexec/netloom/current/netloom"
        return self.run(program, *arguments, check=check, timeout_s=120.0)

    def journal(self, *arguments: str) -> str:
        return self.run("journalctl", "--no-pager", "-o", "short-monotonic", *arguments).out

    def versions(self) -> dict[str, str]:
        """The versions of the kernel and the packages that matter, by name."""
        return dict(line.split(" ", 1) for line in (self.image / "versions").read_text().splitlines())

    def keep_logs(self, where: Path) -> None:
        """Copy the console, and what the host logs where it still answers, for a person who looks for a failure."""
        where.mkdir(parents=True, exist_ok=True)
        if self.console.exists():
            shutil.copy(self.console, where / f"{self.name}.console.log")
        if not self.running:
            return
        for name, script in (
            ("journal", "journalctl --no-pager -b"),
            ("netloom", "cat /var/log/netloom-agent.log /var/log/netloom/*.log 2>/dev/null"),
            ("network", "ip -d address; ip route; bridge link; nft list ruleset; sysctl -a 2>/dev/null | grep bridge"),
            ("processes", "ps axjf; systemctl --no-pager status netloom-agent; systemctl --no-pager --failed"),
        ):
            try:
                text = self.run("sh", "-c", script, check=False, timeout_s=100.0).out
            except (BedError, OSError) as error:
                text = f"{error}\n"
            (where / f"{self.name}.{name}.log").write_text(text, errors="replace")

    # --- making

    def _trunk(self, nic: str) -> str:
        return f"{self._emulated.directory}/{self.name}.{nic}"

    def _qemu(self, disk: Path) -> list[str]:
        append = (
            f"console=ttyS0 quiet mitigations=off net.ifnames=0 root=/dev/vda rw panic=1 systemd.hostname={self.name}"
        )
        words = [
            *("/usr/bin/qemu-system-x86_64", "-name", self.name, "-machine", "q35,accel=tcg", "-cpu", "Nehalem"),
            *("-smp", "1", "-m", str(_MEMORY_MB), "-display", "none", "-monitor", "none", "-nodefaults"),
            *("-serial", f"file:{self.console}", "-device", "virtio-rng-pci"),
            *("-kernel", str(self.image / "vmlinuz"), "-initrd", str(self.directory / "initrd.gz"), "-append", append),
            *("-drive", f"file={disk},if=virtio,cache=writeback"),
        ]
        for number, nic in enumerate(_TRUNKS):
            ends = f"local.type=unix,local.path={self._trunk(nic)}"
            ends += f",remote.type=unix,remote.path={self._emulated.directory}/{nic}"
            hardware = f"02:4c:00:00:0{number}:{self.number:02x}"
            words += ["-netdev", f"dgram,id={nic},{ends}"]
            words += ["-device", f"virtio-net-pci,netdev={nic},mac={hardware},romfile="]
        return words

    def _write_initrd(self) -> None:
        """The initrd of the image, and an archive with the files of this machine."""
        with tempfile.TemporaryDirectory() as directory:
            files = Path(directory, "machine")
            key = self.directory / "host_key"
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", str(key))
            lines = ["auto eth0", "iface eth0 inet static", f"  address {self.address}/24"]
            lines += ["iface eth0 inet6 static", f"  address {self.address6}/64", "  accept_ra 0", "  dad-attempts 0"]
            texts = {
                "etc/hostname": f"{self.name}\n",
                "etc/hosts": f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n",
                "etc/network/interfaces.d/eth0": "\n".join(lines) + "\n",
                "etc/ssh/sshd_config.d/bed.conf": _SSHD,
                "etc/ssh/ssh_host_ed25519_key": key.read_text(),
                "etc/ssh/ssh_host_ed25519_key.pub": key.with_suffix(".pub").read_text(),
                "etc/sudoers.d/netadmin": "netadmin ALL=(ALL) NOPASSWD: ALL\n",
            }
            for path, text in texts.items():
                file = files / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text)
            for name in ("etc/ssh/ssh_host_ed25519_key", "etc/sudoers.d/netadmin"):
                (files / name).chmod(0o600 if "key" in name else 0o440)
            for home, owner in (("root", 0), ("home/netadmin", 1500)):
                folder = files / home / ".ssh"
                folder.mkdir(parents=True)
                folder.chmod(0o700)
                (folder / "authorized_keys").write_text(self.bed.public_key + "\n")
                for owned in (files / home, folder, folder / "authorized_keys"):
                    os.chown(owned, owner, owner)
            (files / "root").chmod(0o700)
            for source in [_TESTS / "netns.py", *sorted((_TESTS / "bed").glob("*.py"))]:
                target = files / _BED_ON_HOST.lstrip("/") / source.relative_to(_TESTS)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
            packed = "find . | cpio -o -H newc --quiet | gzip -1"
            archive = subprocess.run(packed, shell=True, cwd=directory, capture_output=True, check=True).stdout
        (self.directory / "initrd.gz").write_bytes((self.image / "initrd.gz").read_bytes() + archive)

    def _connect(self, name: str, spec: dict[str, Any], *, master: bool = False) -> Client:
        """A process of the bed on this host. With ``master`` it waits for the boot, and later ones share its login."""
        deadline = time.monotonic() + BOOT_S_MAX
        while True:
            client = Client(name, spec, lambda text: [*self._ssh(master=master), f"{_CHILD} {shlex.quote(text)}"])
            try:
                return client.wait_up()
            except BedError as error:
                client.end()
                ended = self._init is None or not self._init.alive
                if not master or ended or time.monotonic() > deadline:
                    raise BedError(f"{error}\n{self._why()}") from error
                time.sleep(0.5)

    def _why(self) -> str:
        """The ends of what QEMU and the kernel wrote."""
        texts = [path.read_text(errors="replace")[-1500:] for path in (self._log, self.console) if path.exists()]
        return "\n".join(texts)

    def _ssh(self, *, master: bool) -> list[str]:
        options = {
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
            "ConnectTimeout": "5",
            "ServerAliveInterval": "5",
            "ServerAliveCountMax": "12",
            "ControlMaster": "yes" if master else "no",
            "ControlPath": str(self._control),
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        network = f"/proc/{self.bed.management.client.pid}/ns/net"
        return [
            "nsenter",
            f"--net={network}",
            "ssh",
            "-F",
            "none",
            *words,
            "-i",
            str(self._emulated.key),
            f"root@{self.address}",
        ]


class EmulatedBed(Bed):
    """A bed whose hosts are emulated. ``kinds`` has one kind for each host; they boot at the same time.

    Raises BedError, or CannotMakeImage. Needs root.
    """

    def __init__(
        self, kinds: Iterable[images.Kind], vlans: Iterable[int | str] = (), public_vlans: Iterable[int | str] = ()
    ) -> None:
        self._kinds = list(kinds)
        for kind in dict.fromkeys(self._kinds):
            images.make_image(kind)
        # A short path: the address of a Unix socket has at most 107 bytes.
        self._own = tempfile.TemporaryDirectory(prefix="netloom-bed-")
        self.directory = Path(self._own.name)
        self.key = self.directory / "key"
        self._trunks: Running[None] | None = None
        super().__init__(0, vlans, public_vlans)
        try:
            self.key.touch(0o600)
            self.key.write_text(self.private_key)
            self.hosts = [EmulatedHost(self, number + 1, kind) for number, kind in enumerate(self._kinds)]
            for host in self.hosts:
                host.begin_boot()
            for host in self.hosts:
                host.end_boot()
        except BaseException:
            self.close()
            raise

    @property
    def emulated(self) -> list[EmulatedHost]:
        return [host for host in self.hosts if isinstance(host, EmulatedHost)]

    def close(self) -> None:
        super().close()
        self._own.cleanup()

    def frames_seen(self, nic: str = "eth1") -> dict[str, dict[str, int]]:
        """How many frames each host has sent on its NIC so far, by host and tag; tag 0 is for frames without one."""
        return dict(self.fabric.client.call("frames_seen", nic=nic))

    def _add_bridges(self, segments: Iterable[tuple[str, str]]) -> None:
        fabric = self.fabric
        if self._trunks is None:
            nics = list(_TRUNKS)
            self._trunks = fabric.client.start("switch_trunks", _nothing, directory=str(self.directory), nics=nics)
            self._trunks.wait_ready()
            for nic in _TRUNKS:
                self._add_access(nic, 0, bridge="mgmt" if nic == "eth0" else nic)
        new = [it for it in segments if it not in self._plan.segments]
        super()._add_bridges(new)
        for nic, vlan in new:
            if vlan.isdigit():
                self._add_access(nic, int(vlan), bridge=f"{nic}.{vlan}")

    def _add_access(self, nic: str, tag: int, *, bridge: str) -> None:
        link = f"a{nic[-1]}.{tag}"
        self.fabric.client.call("add_access", nic=nic, tag=tag, link=link)
        self.fabric.links(f"link set {link} master {bridge} up")


def _nothing(_: object) -> None:
    return None


def _run(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BedError(f"{' '.join(argv)}: exit status {done.returncode}\n{done.stderr}")
