"""What all emulated hosts are asked to do: the life of a network, and a removal without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bed.cloudstack import IsolatedNetwork
from bed.emulated import EmulatedHost
from bed.lab import Internet, Vm, difference
from bed.machines import until
from binary.onefile import build_id
from e2e.networks import OUTSIDE, Life, MakeLife, lease

SETTLE_S = 120.0  # an emulated machine needs many seconds for what a real one does in one
INSTALL_S = 400.0
CLOSED = {"timeout_s": 2.0}
FILES = ["/usr/local", "/etc/systemd/system", "/var/log/netloom", "/var/cache/netloom", "/root/.cache"]
# Kernel settings of the host that netloom raises while it has networks.
RAISED = [
    "fs/inotify/max_user_instances",
    *(f"net/ipv{family}/neigh/default/gc_thresh{number}" for family in (4, 6) for number in (1, 2, 3)),
]
OURS = ("netloom", "dnsmasq", "haproxy")


def objects(host: EmulatedHost) -> dict[str, list[str]]:
    """What netloom could leave behind on the host, and nothing that the distribution does by itself."""
    found = host.objects(files=FILES)
    found["processes"] = [line for line in found["processes"] if any(word in line for word in OURS)]
    found["mounts"] = [path for path in found["mounts"] if not path.startswith("/run/user/")]
    found["conntrack"] = []
    found["settings"] = [f"{it} {host.read(f'/proc/sys/{it}').strip()}" for it in RAISED]
    # An empty directory in memory, which `ip netns` makes, too.
    found["files"] = [path for path in found["files"] if path != "/run/netns/"]
    return found


def traces(host: EmulatedHost, before: dict[str, list[str]]) -> dict[str, dict[str, list[str]]]:
    """The differences to ``before``, once what goes late is gone."""
    until(lambda: difference(before, objects(host)) == {}, seconds=SETTLE_S, pause_s=1.0)
    return difference(before, objects(host))


def carries(life: Life, vm: Vm, internet: Internet, *, saw: str = "") -> None:
    """Assert that the VM has a lease, names, metadata, and a way to the internet from the network's address."""
    network = life.network
    assert until(lambda: f"lease of {vm.ip} obtained" in lease(vm), seconds=SETTLE_S)
    gateway = network.facts.gateway
    url = f"http://{gateway}/latest/meta-data/local-hostname"
    assert until(lambda: vm.run("curl", "-s", "-m", "20", url).out == vm.name, seconds=SETTLE_S)
    name = f"{vm.name}.{network.facts.domain}"
    question = ["dig", "+short", "+tries=1", "+time=10", f"@{gateway}", name]
    assert until(lambda: vm.run(*question, check=False).out.strip() == vm.ip, seconds=SETTLE_S)
    with internet.serve_tcp(80):
        assert until(lambda: vm.tcp(OUTSIDE, 80).saw == (saw or life.public(0)), seconds=SETTLE_S)


def is_reached(address: str, port: int, internet: Internet, server: str) -> bool:
    """Whether the VM ``server`` answers on a public address, within a generous time."""
    return until(lambda: internet.tcp(address, port).server == server, seconds=SETTLE_S)


def install(network: IsolatedNetwork) -> None:
    """Have the first call install the program. On an emulated machine that may take longer than one call has."""
    state, network.facts.state = network.facts.state, "implementing"
    assert until(lambda: network.ensure().ok, seconds=INSTALL_S, pause_s=1.0)
    network.facts.state = state
    network.failures.clear()


def live(life: Life, internet: Internet, names: Sequence[str] = ("web",)) -> list[Vm]:
    """The life of an isolated network up to its running VMs: the VMs, the first of which is forwarded to."""
    install(life.network)
    vms: list[Vm] = []
    for number, name in enumerate(names):
        vm, nic = life.vm(f"{name}-{life.number}", 45 + number)
        if not vms:
            address = life.network.associate(life.public(1))
            life.network.add_port_forward(address, 2222, nic, 22, open_firewall=True)
        vms.append(vm)
    assert life.network.failures == [], life.network.failures
    for vm in vms:
        carries(life, vm, internet)
    with vms[0].serve_tcp(22):
        assert is_reached(life.public(1), 2222, internet, vms[0].name)
    assert internet.tcp(life.public(0), 22, **CLOSED).outcome == "timeout"
    return vms


def still_carries(life: Life, vm: Vm, internet: Internet) -> None:
    """Assert that the network does what it did, for a VM that is there or was plugged in anew."""
    carries(life, vm, internet)
    with vm.serve_tcp(22):
        assert is_reached(life.public(1), 2222, internet, vm.name)


def uninstall(host: EmulatedHost) -> str:
    """Uninstall on the host; what the command says."""
    return host.netloom("agent", "uninstall").out


def make_bare(host: EmulatedHost) -> None:
    """Uninstall if an earlier test left netloom there."""
    if host.sh("ls -d /usr/local/libexec/netloom 2>/dev/null || true"):
        uninstall(host)


def older(program: Path, directory: Path) -> tuple[Path, str]:
    """A copy of the one file that is an older build: the file and its build. The build id is in it as plain text."""
    data = program.read_bytes()
    build = build_id()
    version, number, made = build.split("-")
    before = f"{version}-{'1'.zfill(len(number))}-{made[::-1]}"
    assert data.count(build.encode()) >= 2
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"netloom-{before}"
    file.write_bytes(data.replace(build.encode(), before.encode()))
    file.chmod(0o755)
    return file, before


def whole_life(host: EmulatedHost, make_life: MakeLife, internet: Internet) -> None:
    """A network on a host without netloom, a reboot, its deletion, and an uninstall without a trace."""
    make_bare(host)
    before = objects(host)
    life = make_life()
    live(life, internet)
    said = host.netloom("agent", "selftest").out
    assert "can carry networks" in said, said
    host.reboot()
    life.vms = []
    still_carries(life, life.plug(life.network.nics[0]), internet)
    life.end()
    uninstall(host)
    assert traces(host, before) == {}
