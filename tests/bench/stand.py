"""Where `make bench` measures: a host with an SSH server, a management server with the built executable, and networks.

The networks are those of CloudStack. Few of them are called through the executable, as CloudStack does. The others are
built by calls to the agent's socket, with the same payloads, because that is faster.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from bed import Bed, faults, payloads
from bed.cloudstack import CLOUD_UID, FakeCloudStack, IsolatedNetwork
from bed.lab import Host
from bed.machines import Execution, until
from bed.payloads import FirewallRule, Nic, PortForwardRule, PublicAddress, VirtualMachine
from kernel.agent_host import Client
from netloom.wire import Call, Registration, Reply

ROOT = Path(__file__).resolve().parents[2]
PUBLIC_VLANS = (101, 102, 103, 104)
FIRST_VLAN, FIRST_ID = 1000, 3000
GATEWAY, SUBNET = "10.20.1.1", "10.20.1.0/24"
KEY = "/var/cloudstack/management/bench_key"
SCRIPT_PATH = "/var/cloudstack/management/equivalent.sh"
STATES = "/var/lib/netloom/scopes"
SEGMENTS_AT_ONCE = 200
BUILDERS = 4
BUSY_PERCENT, SETTLE_S_MAX = 60.0, 300.0
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h: the clock of a process, in nanoseconds; /proc has 10 ms


class NotBuilt(Exception):
    """There is no executable to measure."""


class CommandFailed(Exception):
    """A command that should be measured failed."""


def one_file() -> Path:
    """The executable that is measured: dist/netloom. Raises NotBuilt."""
    found = Path(os.environ.get("NETLOOM_ONE_FILE") or ROOT / "dist/netloom")
    if not found.exists():
        raise NotBuilt(f"there is no {found}: make build")
    return found


def build_of(program: Path) -> str:
    """The build id that the executable prints."""
    said = subprocess.run([program, "version"], capture_output=True, text=True, check=True)
    found = re.search(r"build ([^ ,)]+)", said.stdout)
    return found[1] if found else said.stdout.strip()


def public_address(at: int) -> PublicAddress:
    """Public address number ``at``. The addresses are spread over the public VLANs."""
    vlan, number = at % len(PUBLIC_VLANS), at // len(PUBLIC_VLANS)
    gateway = f"100.{64 + vlan}.255.254"
    address = f"100.{64 + vlan}.{number // 250}.{number % 250 + 1}"
    return PublicAddress(address, f"vlan://{PUBLIC_VLANS[vlan]}", gateway, f"100.{64 + vlan}.0.0/16")


def nic(at: int, vm: int, *, address: str = "") -> Nic:
    """NIC ``vm`` of network ``at``."""
    number = at * 4096 + vm
    machine = VirtualMachine(f"vm-{at}-{vm}", f"{number:08x}-1111-4000-8000-000000000000")
    mac = f"02:01:{at >> 8:02x}:{at & 255:02x}:{vm >> 8:02x}:{vm & 255:02x}"
    uuid = f"{number:08x}-0000-4000-8000-000000000000"
    return Nic(str(100_000 + number), uuid, mac, address or f"10.20.1.{10 + vm}", machine)


class Stand:
    """One host, a management server, and as many networks as asked for."""

    def __init__(self, bed: Bed, program: Path) -> None:
        self.bed = bed
        self.host = bed.hosts[0]
        self.management = bed.management
        self.cloud = FakeCloudStack.on(self.management, program=program, agent="")
        self.cloud.register(hosts=[self.host], **bed.login("root", by="key"))
        self.networks: list[IsolatedNetwork] = []
        self.management.write(KEY, bed.private_key, mode=0o600, uid=CLOUD_UID)
        self.management.write(SCRIPT_PATH, Path(__file__).with_name("equivalent.sh").read_text(), mode=0o755)
        self._ports = itertools.count(20_000)
        self._clients = threading.local()
        self._registration: Registration | None = None
        self._stored = ""

    # --- the yardstick, and the shell script beside it

    def ssh_ms(self, host: Host | None = None) -> float:
        """One fresh ``ssh host true``, as user cloud on the management server."""
        known = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]
        target = f"root@{(host or self.host).address}"
        return self._executed(["ssh", "-F", "none", "-q", "-i", KEY, *known, target, "true"])

    def script_ms(self, *words: str) -> float:
        """The same work by a shell script: a fresh ssh for each step, a process for each object."""
        return self._executed(["bash", SCRIPT_PATH, self.host.address, KEY, *words])

    def _executed(self, argv: Sequence[str]) -> float:
        done = self.management.execute(argv)
        if done.status:
            raise CommandFailed(f"{' '.join(argv)}: exit status {done.status}: {done.output}")
        return done.seconds * 1000

    # --- what CloudStack sends

    def event_ms(self, network: IsolatedNetwork, rule: PortForwardRule | None = None) -> float:
        """ensure-network-device and add-port-forward of a new rule, each an execution."""
        rule = rule or self.forward(network)
        network.port_forwards.append(rule)
        payload = payloads.port_forward(network.facts, rule)
        return took_ms(network, lambda: network.send_or_fail("add-port-forward", payload))

    def forward(self, network: IsolatedNetwork) -> PortForwardRule:
        """A new rule, which CloudStack has not sent yet."""
        port = 20_000 + next(self._ports) % 20_000
        return PortForwardRule(port, network.addresses[0], str(port), "10.20.1.10", "22", "tcp")

    def forget_forwards(self, network: IsolatedNetwork) -> None:
        """Delete all forwards of the network, without measuring it."""
        with self.directly(network):
            for rule in network.port_forwards:
                network.send_or_fail("delete-port-forward", payloads.port_forward(network.facts, rule))
        network.port_forwards.clear()

    # --- networks

    def grow_to(self, count: int) -> None:
        """Build networks until there are ``count``, each with DNS and one VM."""
        had = len(self.networks)
        if had == 0:
            self._add_segments(range(1))
            first = self.network(0, self.cloud)
            first.nics.append(nic(0, 0))
            first.implement()
            first.ensure()
            self.networks.append(first)
            self._stored = first.stored
            state = json.loads(self.host.read(f"{STATES}/net-{first.facts.network_id}.json"))
            self._registration = Registration(owner=_owner(state), guest_nic="eth1", public_nic="eth2")
            had = 1
        if count <= had:
            return
        self._add_segments(range(had, count))
        new = [self.network(at, self.cloud) for at in range(had, count)]
        with ThreadPoolExecutor(BUILDERS) as pool:
            list(pool.map(self._build, new))
        self.networks += new

    def network(self, at: int, cloud: FakeCloudStack) -> IsolatedNetwork:
        """Network ``at`` in CloudStack's database, without VMs."""
        made = cloud.isolated_network(FIRST_ID + at, vlan=FIRST_VLAN + at, cidr=SUBNET, gateway=GATEWAY)
        made.source_nat = made.associate(public_address(at))
        made.source_nat.source_nat = True
        return made

    def _build(self, network: IsolatedNetwork) -> None:
        at = int(network.facts.network_id) - FIRST_ID
        network.nics.append(nic(at, 0))
        with self.directly(network):
            network.implement()

    def _add_segments(self, numbers: range) -> None:
        vlans = [("eth1", str(FIRST_VLAN + at)) for at in numbers]
        # Otherwise each link gets an IPv6 address, and says so to all.
        self.host.sysctl("net.ipv6.conf.default.disable_ipv6", "1")
        for at in range(0, len(vlans), SEGMENTS_AT_ONCE):
            self.bed.add_segments(vlans[at : at + SEGMENTS_AT_ONCE])
        self.host.sysctl("net.ipv6.conf.default.disable_ipv6", "0")

    @contextmanager
    def directly(self, network: IsolatedNetwork) -> Iterator[None]:
        """Within the block the commands of the network go to the agent's socket, without the executable."""
        usual, network.cloud = network.cloud, FakeCloudStack(self._call_agent)
        network.cloud.registration = usual.registration
        try:
            yield
        finally:
            network.cloud = usual

    def _call_agent(self, command: str, text: str, timeout_s: int) -> Execution:
        payload = json.loads(text)["payload"]
        scope = f"net-{payload['network_id']}"
        if command == "ensure-network-device":
            return Execution(0, json.dumps(json.loads(self._stored) | {"namespace": f"cs-{scope}"}), 0.0, "")
        reply = self.client().call_now(command, scope, payload, self.registration)
        return Execution(reply.status, reply.output or reply.error, 0.0, "")

    @property
    def registration(self) -> Registration:
        assert self._registration is not None
        return self._registration

    def client(self) -> DirectClient:
        """The connection of this thread to the agent."""
        path = f"/proc/{self.host.pid}/root/run/netloom/agent.sock"
        found: DirectClient | None = getattr(self._clients, "client", None)
        if found is None or found.agents != faults.agents_of(self.host):
            found = self._clients.client = DirectClient(path, faults.agents_of(self.host))
        return found

    def settle(self) -> None:
        """Wait until the agent uses little of a core: what it does after a start is done."""
        if not until(lambda: self.agent_cpu(1.0) < BUSY_PERCENT, seconds=SETTLE_S_MAX):
            raise CommandFailed(f"the agent is still busy after {SETTLE_S_MAX:.0f} s")

    # --- what the host uses

    def agent_pid(self) -> int:
        (pid,) = faults.agents_of(self.host)
        return pid

    def agent_cpu(self, seconds: float) -> float:
        """How many % of a core the agent uses during so many seconds."""
        pid = self.agent_pid()
        before, began = cpu_s(pid), time.monotonic()
        time.sleep(seconds)
        return (cpu_s(pid) - before) / (time.monotonic() - began) * 100

    def memory_mb(self, *words: str) -> float:
        """The memory of the host's processes, or of those whose command line has one of the words: PSS, in MB."""
        found = faults.processes_of(self.host)
        return sum(pss_mb(pid) for pid, line in found.items() if not words or any(word in line for word in words))


class DirectClient(Client):
    """A connection to an agent, for calls that are not payload files."""

    def __init__(self, path: str, agents: list[int]) -> None:
        super().__init__(path)
        self.agents = agents

    def call_now(self, command: str, scope: str, payload: object, registration: Registration) -> Reply:
        self.send(
            Call(
                call_id=os.urandom(8).hex(),
                command=command,
                scope_id=scope,
                registration=registration,
                payload=json.dumps(payload).encode(),
            )
        )
        reply = self.receive()
        assert isinstance(reply, Reply)
        return reply


@contextmanager
def standing() -> Iterator[Stand]:
    """A stand without networks. Raises NotBuilt."""
    program = one_file()
    with Bed(hosts=1, public_vlans=PUBLIC_VLANS) as bed:
        yield Stand(bed, program)


def took_ms(network: IsolatedNetwork, work: Callable[[], object]) -> float:
    """The time of all executions of the network's CloudStack during ``work``."""
    since = len(network.cloud.history)
    work()
    return sum(sent.execution.seconds for sent in network.cloud.history[since:]) * 1000


def rules(address: PublicAddress, count: int) -> list[FirewallRule]:
    """So many ports, each open to one prefix."""
    return [
        FirewallRule(at, "tcp", address, 1000 + at, 1000 + at, source_cidrs=(f"10.{at // 250 % 250}.{at % 250}.0/24",))
        for at in range(count)
    ]


def cpu_s(pid: int) -> float:
    """The processor time of a process so far, of all its threads, also those that have ended."""
    return time.clock_gettime((~pid) << 3 | _CPUCLOCK_SCHED)


def pss_mb(pid: int) -> float:
    """The memory of a process, with its part of what it shares. 0 when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1000 for line in lines if line.startswith("Pss:")), 0.0) * 1.024


def _owner(state: object) -> str:
    """The owner in a state file, wherever it stands."""
    match state:
        case {"owner": str(owner)}:
            return owner
        case dict():
            return next((owner for it in state.values() if (owner := _owner(it))), "")
    return ""
