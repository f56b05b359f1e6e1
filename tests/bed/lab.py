"""The machines of the bed (hosts, VMs, an internet, a management server) and the switch that connects them."""

from __future__ import annotations

import itertools
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import processes
from bed import syscalls
from bed.client import BedError, Client
from bed.cloudstack import CLOUD_UID
from bed.machines import Execution, Machine
from bed.observation import MAC_PREFIX as OBSERVER_MAC_PREFIX

REPOSITORY = Path(__file__).resolve().parents[2]
MANAGEMENT_NET = "198.18.0"
MANAGEMENT_NET6 = "fd4c"
COMPILED = "/var/tmp/pycache"
EXTENSIONS = "/usr/share/cloudstack-management/extensions"

# Every character that a shell, a JSON text, an XML text or a careless split would trip over.
HOSTILE_PASSWORD = "p\u00e4 \"ss'$(x)`id`;|&<>=#%{}*~!\\"

# "guest" is both of "vlan" (eth1) and "public" (eth2).
Cut = Literal["mgmt", "guest", "vlan", "public", "all but public", "all"]
Direction = Literal["both", "from", "to"]  # which frames are lost: those from the host, those to it
_NICS: dict[Cut, list[int]] = {
    "mgmt": [], "guest": [1, 2], "vlan": [1], "public": [2], "all but public": [1], "all": [1, 2]
}  # fmt: skip

_USERS = "netadmin:x:1500:1500::/home/netadmin:/bin/bash\nplainuser:x:1501:1501::/home/plainuser:/bin/bash\n"
_GROUPS = "netadmin:x:1500:\nplainuser:x:1501:\n"
_SSHD = """HostKey /etc/ssh/bed_host_key
PermitRootLogin yes
PasswordAuthentication yes
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
MaxStartups 200
MaxSessions 200
MaxAuthTries 20
PidFile none
Subsystem sftp internal-sftp
"""


# What is lost on a wire comes before the switch learns a MAC address from it. So do the answers to the observer.
_SWITCH = """table bridge bed {
  set off { type ifname; }
  set cut_from { type ifname; }
  set cut_to { type ifname; }
  set apart { type ifname . ifname; }
  chain arriving {
    type filter hook prerouting priority -200
    iifname @off drop; iifname @cut_from drop
    ether daddr & ff:ff:ff:ff:00:00 == {observer}:00:00 drop
  }
  chain wires {
    type filter hook forward priority -200
    oifname @off drop; oifname @cut_to drop
    iifname . oifname @apart drop
  }
}
""".replace("{observer}", OBSERVER_MAC_PREFIX)


@dataclass
class _Plan:
    """The segments of the bed: (nic, vlan), with "untagged" for the NIC itself."""

    segments: list[tuple[str, str]] = field(default_factory=list)


class Vm(Machine):
    """A VM: a namespace on a guest bridge of a host. It ends with its host."""

    def __init__(self, name: str, client: Client, host: Host, bridge: str, tap: str, mac: str, ip: str) -> None:
        super().__init__(name, client)
        self.host, self.bridge, self.tap, self.mac = host, bridge, tap, mac
        self.ip = ip.partition("/")[0]

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()

    def destroy(self) -> None:
        """Stop the VM. Remove its bridge when no port named vnet is left, as CloudStack's KVM agent does."""
        self.client.end()
        self.host._forget_vm(self)


class Internet(Machine):
    """A machine behind one or more public VLANs."""

    def __init__(self, name: str, client: Client, bed: Bed) -> None:
        super().__init__(name, client)
        self._bed = bed
        self._legs = 0
        self._ports: list[str] = []

    def ports(self) -> list[str]:
        """The ports of the switch at which the machine is."""
        return list(self._ports)

    def attach(self, vlan: int | str, address: str, *, nic: str = "eth2", mac: str = "") -> str:
        """Add a link on a VLAN of the fabric; returns its name. ``address`` includes the prefix length."""
        bridge = self._bed._segment_bridge(nic, str(vlan))
        link = f"eth{self._legs}"
        self._legs += 1
        port = f"i{self.client.pid}.{link}"
        self._ports.append(port)
        hardware = f" address {mac}" if mac else ""
        self._bed.fabric.links(
            f"link add {port} type veth peer name {link}{hardware} netns {self.client.pid}",
            f"link set {port} master {bridge} up",
        )
        self.links(f"address add {address} dev {link}", f"link set {link} up")
        return link


class Host(Machine):
    """A simulated KVM host: its own process tree, root, disk, sshd and links. ``address`` is its management address."""

    def __init__(self, bed: Bed, number: int) -> None:
        self.bed, self.number = bed, number
        self.address = f"{MANAGEMENT_NET}.{10 + number}"
        self.address6 = f"{MANAGEMENT_NET6}::{10 + number}"
        self.vms: list[Vm] = []
        self.running = False
        self._taps = itertools.count(1)  # VMs may be started by several threads
        self._init: Client | None = None
        self._segments: list[tuple[str, str]] = []
        self.name = f"h{number}"

    @property
    def pid(self) -> int:
        """The process id of the host's PID 1 in the namespace of the test."""
        assert self._init is not None
        return self._init.pid

    # --- power

    def boot(self) -> Host:
        """Power on; returns when sshd listens. The disk keeps its contents."""
        self.begin_boot()
        self.end_boot()
        return self

    def begin_boot(self) -> None:
        if self.running:
            raise BedError(f"{self.name} runs already")
        self._init = Client(self.name, self.bed._machine_spec(self.name, self._files(), sshd=True))

    def end_boot(self) -> None:
        assert self._init is not None
        pid = self._init.wait_up().pid
        entered = {"pid": pid, "kinds": ["uts", "ipc", "net", "pid", "mnt"]}
        client = Client(self.name, {"role": "worker", "enter": entered})
        n = self.number
        lines = [
            f"link add h{n}m group {n} type veth peer name eth0 address 02:4c:00:00:00:{n:02x} netns {pid}",
            f"link set h{n}m master mgmt up",
        ]
        for digit in (1, 2):
            lines += [
                f"link add h{n}e{digit} group {n} type veth peer name eth{digit} netns {pid}"
                f" address 02:4c:00:00:0{digit}:{n:02x}",
                f"link set h{n}e{digit} master eth{digit} up",
            ]
        self.bed.fabric.links(*lines)
        self.client = client.wait_up()
        self.running = True
        self.links(
            f"address add {self.address}/24 dev eth0",
            f"address add {self.address6}/64 dev eth0 nodad",
            *(f"link set eth{digit} up" for digit in (0, 1, 2)),
        )
        self._segments = []
        self._plug(self.bed._plan.segments)

    def power_cut(self) -> None:
        """Kill every process of the host at once. Its links and VMs disappear; its disk stays."""
        if not self.running:
            return
        assert self._init is not None
        self.running = False
        # A host without power says no goodbye: the connections of its processes end after its wires are dead.
        names = ", ".join(f'"{port}"' for port in self._ports("all"))
        self.bed.fabric.run("nft", "-f", "-", input=f"add element bridge bed off {{ {names} }}\n")
        processes.kill(self._init.pid)
        # These two fail if the kernel has deleted all links of the group with the namespaces of the host.
        group = str(self.number)
        self.bed.fabric.run("ip", "link", "set", "group", group, "down", check=False)
        self._init.end()
        self.client.end()
        for vm in self.vms:
            vm.client.end()
        self.vms = []
        # Delete the links now. The kernel may keep a namespace, and so its links, for minutes: as long as a TCP
        # connection in it waits for an acknowledgement.
        self.bed.fabric.run("ip", "link", "delete", "group", group, check=False)
        self.bed.fabric.run("nft", "-f", "-", input=f"delete element bridge bed off {{ {names} }}\n")

    # --- links

    def _plug(self, segments: Sequence[tuple[str, str]]) -> None:
        assert self._init is not None
        lines, ups = [], []
        for nic, vlan in segments:
            if (nic, vlan) in self._segments:
                continue
            self._segments.append((nic, vlan))
            if vlan == "untagged":
                continue
            port = f"h{self.number}e{nic[-1]}.{vlan}"
            lines += [
                f"link add {port} group {self.number} type veth peer name {nic}.{vlan} netns {self.pid}",
                f"link set {port} master {nic}.{vlan} up",
            ]
            ups.append(f"link set {nic}.{vlan} up")
        self.bed.fabric.links(*lines)
        self.links(*ups)

    def partition(self, what: Cut = "all", direction: Direction = "both") -> None:
        """Disconnect the host without a sign of it: the switch drops its frames, and every link stays up."""
        names = ", ".join(f'"{port}"' for port in self._ports(what))
        sets = ["cut_from", "cut_to"] if direction == "both" else [f"cut_{direction}"]
        lines = "".join(f"add element bridge bed {it} {{ {names} }}\n" for it in sets)
        self.bed.fabric.run("nft", "-f", "-", input=lines)

    def separate(self, others: Iterable[Host | Internet | Management]) -> None:
        """Let no frame pass between this host and those machines. It still reaches all other machines."""
        theirs = [port for it in others for port in it.ports()]
        pairs = [
            f'"{one}" . "{two}"'
            for port in self._ports("all")
            for it in theirs
            for one, two in ((port, it), (it, port))
        ]
        self.bed.fabric.run("nft", "-f", "-", input=f"add element bridge bed apart {{ {', '.join(pairs)} }}\n")

    def ports(self) -> list[str]:
        """The ports of the switch at which the host is."""
        return self._ports("all")

    def heal(self) -> None:
        """End every partition of this host."""
        lines = "flush set bridge bed apart\n"
        names = ", ".join(f'"{port}"' for port in self._ports("all"))
        for it in ("cut_from", "cut_to"):
            lines += f"add element bridge bed {it} {{ {names} }}\ndelete element bridge bed {it} {{ {names} }}\n"
        self.bed.fabric.run("nft", "-f", "-", input=lines)

    def _ports(self, what: Cut) -> list[str]:
        ports = [f"h{self.number}m"] if what in ("mgmt", "all but public", "all") else []
        nics = _NICS[what]
        ports += [f"h{self.number}e{nic}" for nic in nics]
        tagged = [(int(nic[-1]), vlan) for nic, vlan in self._segments if vlan != "untagged"]
        return ports + [f"h{self.number}e{nic}.{vlan}" for nic, vlan in tagged if nic in nics]

    def port(self, nic: str, vlan: int | str) -> str:
        """The port of the switch at which the host is on this VLAN."""
        tag = "" if str(vlan) == "untagged" else f".{vlan}"
        return f"h{self.number}e{nic[-1]}{tag}"

    # --- VMs

    def vm(
        self,
        name: str,
        *,
        vlan: int | str,
        mac: str = "",
        ip: str = "",
        gateway: str = "",
        nic: str = "eth1",
        bridge: str = "",
    ) -> Vm:
        """Start a VM on the bridge of a guest VLAN; make the bridge as CloudStack's KVM agent does, if it is missing.

        ``ip`` includes the prefix length. When it is empty, the link is up without an address.
        """
        if str(vlan) != "untagged":
            self.bed.add_segments([(nic, str(vlan))])
        bridge = bridge or f"br{nic}-{vlan}"
        tap_number = next(self._taps)
        tap = f"vnet{tap_number}"
        mac = mac or f"02:4c:{self.number:02x}:00:{tap_number >> 8:02x}:{tap_number & 255:02x}"
        client = self._node(name)
        if self.run("ip", "link", "show", bridge, check=False).status:
            self._make_vlan_link(nic, vlan)
            self.links(
                f"link add {bridge} type bridge stp_state 0 mcast_snooping 0",
                f"link set {nic}.{vlan} master {bridge} up",
                f"link set {bridge} up",
            )
        client.wait_up()
        vm = Vm(name, client, self, bridge, tap, mac, ip)
        self._make_tap(tap, mac, client)
        self.links(f"link set {tap} master {bridge} up")
        lines = ["link set eth0 up"]
        if ip:
            lines.insert(0, f"address add {ip} dev eth0")
        if gateway:
            lines.append(f"route add default via {gateway}")
        vm.links(*lines)
        self.vms.append(vm)
        return vm

    def _node(self, name: str) -> Client:
        """A process in namespaces of its own on this host; it may not be up yet."""
        entered = {"pid": self.pid, "kinds": ["uts", "ipc", "net", "pid", "mnt"]}
        return Client(name, {"role": "node", "name": name, "enter": entered, "unshare": ["net", "mnt", "uts"]})

    def _make_vlan_link(self, nic: str, vlan: int | str) -> None:
        """The switch has made the stand-in for the VLAN link (``add_segments``)."""

    def _make_tap(self, tap: str, mac: str, client: Client) -> None:
        self.bed.fabric.links(f"link add {tap}x type veth peer name eth0 address {mac} netns {client.pid}")
        self.bed.fabric.links(f"link set {tap}x netns {self.pid}")
        self.links(f"link set {tap}x name {tap}")

    def _forget_vm(self, vm: Vm) -> None:
        if vm not in self.vms:
            return
        self.vms.remove(vm)
        # Delete the link now, for the reason given in power_cut.
        self.run("ip", "link", "delete", vm.tap, check=False)
        ports = self.listing(f"/sys/class/net/{vm.bridge}/brif")
        if not any("vnet" in port for port in ports):
            self.run("ip", "link", "delete", vm.bridge, check=False)

    # --- looking

    def within(self, namespace: str) -> Machine:
        """One of the named namespaces of this host, as a machine. Its process ends with the ``with`` block."""
        assert self._init is not None
        entered = {"pid": self.pid, "kinds": ["uts", "ipc", "net", "pid", "mnt"]}
        spec = {"role": "worker", "enter": entered, "netns": f"/run/netns/{namespace}"}
        return Machine(f"{self.name}/{namespace}", Client(f"{self.name}/{namespace}", spec).wait_up())

    def objects(self, *, files: Sequence[str] = ()) -> dict[str, list[str]]:
        """Everything that a network could leave behind, by category and name (inventory.py)."""
        found: dict[str, list[str]] = self.client.call("objects", files=list(files))
        return found

    @property
    def host_key(self) -> str:
        """The public SSH host key, as in a line of a known_hosts file without the host name."""
        return " ".join(self.read("/etc/ssh/bed_host_key.pub").split()[:2])

    def _files(self) -> dict[str, Any]:
        bed = self.bed
        key = {"text": bed.public_key + "\n", "mode": 0o600}
        homes = {"/root": 0, "/home/netadmin": 1500, "/home/plainuser": 1501}
        return {
            "append": {
                "/etc/passwd": _USERS,
                "/etc/group": _GROUPS,
                "/etc/shadow": "".join(
                    f"{n}:{bed.password_hash}:19000:0:99999:7:::\n" for n in ("netadmin", "plainuser")
                ),
            },
            "files": {
                "/etc/hostname": {"text": f"{self.name}\n"},
                "/etc/hosts": {"text": f"127.0.0.1 localhost\n127.0.1.1 {self.name}\n"},
                "/etc/resolv.conf": {"text": ""},
                "/etc/sudoers.d/netadmin": {"text": "netadmin ALL=(ALL) NOPASSWD: ALL\n", "mode": 0o440},
                "/etc/ssh/bed_sshd_config": {"text": _SSHD},
                **{f"{home}/.ssh/authorized_keys": {**key, "uid": uid, "gid": uid} for home, uid in homes.items()},
            },
            "directories": {
                path: {"mode": 0o700, "uid": uid, "gid": uid}
                for home, uid in homes.items()
                for path in (home, f"{home}/.ssh")
            },
            "root_password_hash": bed.password_hash,
        }


class Management(Machine):
    """The management server: one link to the hosts and no other way out; programs run there as user ``cloud``."""

    def __init__(self, bed: Bed, client: Client) -> None:
        super().__init__("management", client)
        self.bed = bed
        self.home = "/var/cloudstack/management"

    def ports(self) -> list[str]:
        """The ports of the switch at which the machine is."""
        return ["ms"]

    def install(self, name: str, program: Sequence[str] | Path) -> str:
        """Install an extension's executable where CloudStack expects it; returns its path.

        A sequence is a command that a small script executes (the program from source). A path is a file to copy.
        """
        path = f"{EXTENSIONS}/{name}/{name}.sh"
        if isinstance(program, Path):
            self.run("install", "-D", "-m", "755", str(program), path)
        else:
            self.write(path, f'#!/bin/sh\nexec {shlex.join(program)} "$@"\n', mode=0o755)
        return path

    def environment(self, *, home: Literal["set", "unset"] = "unset", **more: str) -> dict[str, str]:
        """The bare environment of CloudStack's service: no terminal, no XDG_RUNTIME_DIR, HOME set or not."""
        bare = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}
        if home == "set":
            bare["HOME"] = self.home
        return {**bare, **more}

    def execute(
        self, argv: Sequence[str], *, environment: dict[str, str] | None = None, patience_s: float = 100.0
    ) -> Execution:
        """Run as CloudStack's client does: as user ``cloud``, stdin left open, stderr merged, output read to end."""
        return Execution(
            **self.client.call(
                "execute",
                argv=list(argv),
                environment=self.environment() if environment is None else environment,
                directory="/",
                uid=CLOUD_UID,
                patience_s=patience_s,
            )
        )


class Bed:
    """A switch, a management server and hosts. Use it in a ``with`` block, or call ``close``.

    ``vlans`` become ``eth1.<id>`` on every host, ``public_vlans`` ``eth2.<id>``; ``add_segments`` adds more later.
    Raises BedError when something does not start. Needs root.
    """

    def __init__(self, hosts: int = 1, vlans: Iterable[int | str] = (), public_vlans: Iterable[int | str] = ()) -> None:
        if os.geteuid() != 0:
            raise BedError("the test bed needs root: it makes namespaces, mounts and links")
        self.private_key, self.public_key = _make_key()
        self.password = HOSTILE_PASSWORD
        self.password_hash = syscalls.hash_password(self.password)
        self.hosts: list[Host] = []
        self._nodes: list[Internet] = []
        self._inits: list[Client] = []
        self._plan = _Plan()
        self._shown = _shown_paths()
        self._disk_mount_point = _disk_mount_point(self._shown)
        self._keeper = Client("fabric", {"role": "keeper", "unshare": ["net", "mnt"], "shelf": self._disk_mount_point})
        try:
            self.fabric = Machine("fabric", self._keeper.wait_up())
            self._build(hosts, [("eth1", str(v)) for v in vlans] + [("eth2", str(v)) for v in public_vlans])
        except BaseException:
            self.close()
            raise

    def _build(self, hosts: int, segments: list[tuple[str, str]]) -> None:
        self.fabric.run(
            "nft",
            "-f",
            "-",
            input=_SWITCH,
        )
        self.fabric.sysctl("net.ipv6.conf.default.disable_ipv6", "1")
        lines = []
        for name in ("mgmt", "eth1", "eth2"):
            lines += [f"link add {name} type bridge mcast_snooping 0", f"link set {name} up"]
        self.fabric.links(*lines)
        self._add_bridges(segments)
        files: dict[str, Any] = {
            "append": {
                "/etc/passwd": f"cloud:x:{CLOUD_UID}:{CLOUD_UID}::/var/cloudstack/management:/bin/sh\n",
                "/etc/group": f"cloud:x:{CLOUD_UID}:\n",
            },
            "files": {
                "/etc/hostname": {"text": "management\n"},
                "/etc/hosts": {"text": "127.0.0.1 localhost\n127.0.1.1 management\n"},
                "/etc/resolv.conf": {"text": ""},
            },
            "directories": {"/var/cloudstack/management": {"uid": CLOUD_UID, "gid": CLOUD_UID}},
        }
        machine = Client("management", self._machine_spec("mgmt", files, sshd=False))
        self._inits.append(machine)
        self.hosts = [Host(self, number + 1) for number in range(hosts)]
        for host in self.hosts:
            host.begin_boot()
        for host in self.hosts:
            host.end_boot()
        pid = machine.wait_up().pid
        entered = {"pid": pid, "kinds": ["uts", "ipc", "net", "pid", "mnt"]}
        client = Client("management", {"role": "worker", "enter": entered})
        self.fabric.links(
            f"link add ms type veth peer name eth0 address 02:4c:00:00:00:fe netns {pid}", "link set ms master mgmt up"
        )
        self.management = Management(self, client.wait_up())
        self.management.links(
            f"address add {MANAGEMENT_NET}.1/24 dev eth0",
            f"address add {MANAGEMENT_NET6}::1/64 dev eth0 nodad",
            "link set eth0 up",
        )
        # ARP tells within 2 s that a host is off or cut off, and not after the times of the tests.
        for name, value in (("base_reachable_time_ms", 1000), ("delay_first_probe_time", 1), ("retrans_time_ms", 250)):
            self.management.sysctl(f"net.ipv4.neigh.eth0.{name}", str(value))

    def __enter__(self) -> Bed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the bed. All namespaces, links, mounts and files end with them."""
        for host in self.hosts:
            for vm in host.vms:
                vm.client.end()
            host.running = False
            for client in (getattr(host, "client", None), host._init):
                if client is not None:
                    client.end()
        for node in self._nodes:
            node.client.end()
        if management := getattr(self, "management", None):
            management.client.end()
        for machine in self._inits:
            machine.end()
        self._keeper.end()

    def login(self, user: str = "root", *, by: Literal["key", "password", "nothing"] = "key") -> dict[str, str]:
        """Registration details to log in to every host. Users: ``root``, ``netadmin`` (sudo without a password),
        ``plainuser`` (no sudo). All have the same key and the same, hostile, password.
        """
        secret = {"key": {"sshkey": self.private_key}, "password": {"password": self.password}, "nothing": {}}[by]
        return {"username": user, **secret}

    def add_segments(self, segments: Iterable[tuple[str, str]]) -> None:
        """Add VLANs, as (nic, vlan), to every running host and to every later boot. Existing ones are skipped."""
        new = [each for each in segments if each not in self._plan.segments]
        self._add_bridges(new)
        for host in self.hosts:
            if host.running:
                host._plug(new)

    def _add_bridges(self, segments: Iterable[tuple[str, str]]) -> None:
        lines = []
        for nic, vlan in segments:
            if (nic, vlan) not in self._plan.segments:
                self._plan.segments.append((nic, vlan))
                if vlan != "untagged":
                    lines += [f"link add {nic}.{vlan} type bridge mcast_snooping 0", f"link set {nic}.{vlan} up"]
        self.fabric.links(*lines)

    def _segment_bridge(self, nic: str, vlan: str) -> str:
        self.add_segments([(nic, vlan)])
        return nic if vlan == "untagged" else f"{nic}.{vlan}"

    def internet(
        self,
        *,
        vlan: int | str,
        address: str,
        nic: str = "eth2",
        also: Iterable[str] = (),
        name: str = "internet",
        mac: str = "",
    ) -> Internet:
        """Start a machine on a public VLAN; it forwards between its links, as the internet does.

        ``address`` is for its link and includes the prefix length. ``also`` are further addresses, on lo.
        """
        client = Client(name, {"role": "node", "name": name, "unshare": ["net", "mnt", "uts"]}).wait_up()
        internet = Internet(name, client, self)
        self._nodes.append(internet)
        internet.attach(vlan, address, nic=nic, mac=mac)
        internet.links(*(f"address add {each} dev lo" for each in also))
        internet.sysctl("net.ipv4.ip_forward", "1")
        return internet

    def _machine_spec(self, name: str, files: dict[str, Any], *, sshd: bool) -> dict[str, Any]:
        return {
            "role": "machine",
            "name": name,
            "sshd": sshd,
            "enter": {"pid": self._keeper.pid, "kinds": ["mnt"]},
            "unshare_before_fork": ["mnt", "pid", "net", "uts", "ipc"],
            "disk": f"{self._disk_mount_point}/{name}",
            "shown": self._shown,
            **files,
        }


def program_from_source() -> list[str]:
    """The executable from source.

    Byte code is kept on the machine's own disk: nothing can be written beside the sources, and compiling them on each
    call costs a third of a second.
    """
    return [sys.executable, "-X", f"pycache_prefix={COMPILED}", str(REPOSITORY / "cmd/netloom/main.py")]


def agent_command() -> str:
    """The agent from source, as the setting NETLOOM_AGENT names it."""
    return shlex.join([*program_from_source(), "agent"])


def difference(before: dict[str, list[str]], after: dict[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """Additions (``+``) and removals (``-``) between two inventories, by category; empty when they are equal."""
    found: dict[str, dict[str, list[str]]] = {}
    for category in sorted({*before, *after}):
        then, now = list(before.get(category, [])), list(after.get(category, []))
        for name in list(then):
            if name in now:
                then.remove(name)
                now.remove(name)
        if then or now:
            found[category] = {sign: names for sign, names in (("+", now), ("-", then)) if names}
    return found


def _make_key() -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "key")
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "bed", "-f", str(path)], check=True)
        return path.read_text(), path.with_suffix(".pub").read_text().strip()


def _shown_paths() -> list[str]:
    """The paths outside /usr that hosts see: the repository and the interpreter."""
    wanted = sorted({str(REPOSITORY), sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)}, key=len)
    shown: list[str] = []
    for path in wanted:
        if not path.startswith("/usr") and path != "/" and not any(path.startswith(f"{up}/") for up in shown):
            shown.append(path)
    return shown


def _disk_mount_point(shown: Sequence[str]) -> str:
    """A standard directory that holds nothing of ``shown``: the mount point of the disks, in a private namespace."""
    for path in ("/mnt", "/srv", "/media", "/opt"):
        if os.path.isdir(path) and not any(each.startswith(f"{path}/") for each in shown):
            return path
    raise BedError("no directory to mount the hosts' disks on")
