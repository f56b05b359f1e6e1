"""Time take-overs of a network beside keepalived with conntrackd, and events beside a network without a standby.

Needs root.

PYTHONPATH=internal:tests python tests/bench/bench_standby.py [rounds] [flows of each kind]

The first packet is timed from the last answer of the old host to the first one of the new host. Both figures are upper
bounds on a busy machine.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bed import faults, payloads
from bed.cloudstack import FakeCloudStack, IsolatedNetwork, Sent
from bed.crafted import crafted_flows
from bed.flows import FlowKind, Flows
from bed.keepalived import keepalived_bed
from bed.lab import Host, Internet
from bed.machines import until
from bed.observer import Observer, Question, outage
from bed.standby import GATEWAY, OUTSIDE, PUBLIC_VLAN, STATIC_NAT, VLAN, StandbyBed, standby_bed
from netloom.agent.host import lease
from netloom.extension.placement import preferred_order

SETTLE_S = 2.0  # before a fault: heartbeats and copies of the flows are under way
CPU_S = 30.0
CPU_ROUNDS = 3
CPU_SETTLE_S = 8.0  # the ticks of the hosts come together meanwhile, and what a start leaves to do is done
FLOWS_S = 10.0
FLOWS_PER_S = 5000
_CPUCLOCK_SCHED = 2  # linux/posix-timers.h: the clock of a process, in nanoseconds; /proc has 10 ms
MANY = 200
MANY_EVERY_S = 0.1  # asking so many addresses takes time
AGENT_LOG = "/var/log/netloom/agent.log"
EVENT_ROUNDS, BURST_ROUNDS = 40, 100
EVENT_PAUSE_S = 0.15  # the standby builds what it has stored, on the same processors
WITH, WITHOUT = "with a standby", "without"
BURST = 900  # datagrams; the kernel queues 1,000 at most
BURST_PORT = 6998
BURST_SIZES = (18, 1472)  # frames of 60 and 1,514 bytes
BURST_TABLE = f"""table inet burst {{
  chain arrived {{ type filter hook prerouting priority raw; udp dport {BURST_PORT} counter drop; }}
}}
"""


@dataclass(frozen=True)
class Measured:
    """One take-over. ``overlap``: how many answers of the old host came after the first one of the new host."""

    first_packet_ms: float
    tcp_gap_s: float
    kept: int
    flows: int
    overlap: int


def power_cut(host: Host) -> None:
    host.power_cut()


def freeze(host: Host) -> None:
    faults.freeze(host, "all")


FAULTS: dict[str, Callable[[Host], None]] = {"power cut": power_cut, "all processes frozen": freeze}


def take_over(observer: Observer, kinds: Sequence[FlowKind], active: Host, standby: Host, fault: str) -> Measured:
    """Let the active host fail while flows go on, and wait until the standby serves."""
    with Flows(kinds) as flows:
        flows.wait_open()
        time.sleep(SETTLE_S)
        FAULTS[fault](active)
        first = observer.wait_for(standby)
        flows.go_on(seconds=30)
        living = [it for it in flows.seen() if not it.failure]
        stuck = flows.stuck(first)
        gap_s = flows.gap()
    after = [it for it in observer.answers(host=active) if it.at > first]
    turns_s = outage(observer) if not after else 0.0
    kept = len(living) - sum(not it.failure for it in stuck)
    return Measured(turns_s * 1000, gap_s, kept, sum(it.count for it in kinds), len(after))


def keepalived(fault: str, each: int) -> Measured:
    with keepalived_bed() as it, it.observer() as observer:
        time.sleep(SETTLE_S)
        (name,) = observer.serving()
        active, standby = sorted(it.routers, key=lambda router: router.name != name)
        return take_over(observer, it.kinds(each), active, standby, fault)


@contextmanager
def with_standby() -> Iterator[StandbyBed]:
    with standby_bed(details={"standby": "auto"}) as it:
        it.make_ready()
        yield it


def netloom(fault: str, each: int) -> Measured:
    with with_standby() as it, it.observer(over6=False) as observer:
        return take_over(observer, it.kinds(each), it.active, it.standby, fault)


def agents_cpu() -> None:
    """Print how much of a core each agent uses: without a group, in one, and with new flows; and what a group adds."""
    kinds: dict[str, tuple[int, dict[str, str]]] = {
        "without a group": (3, {"standby": "off"}),
        "in a group": (3, {"standby": "auto"}),
        "with the gateway as second vote": (2, {"standby": "auto", "standby.alone": "gateway"}),
    }
    used: dict[tuple[str, str], list[float]] = {}  # by kind and role, in % of a core
    for _ in range(CPU_ROUNDS):
        for kind, (candidates, details) in kinds.items():
            with standby_bed(candidates, details=details) as it:
                roles = dict.fromkeys(it.candidates, "idle") | {it.active: "active"}
                if kind != "without a group":
                    it.make_ready()
                    roles = dict.fromkeys(it.candidates, "witness") | {it.active: "active", it.standby: "standby"}
                time.sleep(CPU_SETTLE_S)
                for host, percent in _used(it.candidates).items():
                    used.setdefault((kind, roles[host]), []).append(percent)
    for (kind, role), percents in used.items():
        middle = statistics.median(percents)
        # A standby has the network, too, so part of the difference is not that of the heartbeats.
        alone = statistics.median(used["without a group", "active" if role == "active" else "idle"])
        shown = " ".join(f"{it:.2f}" for it in percents)
        sys.stdout.write(f"CPU of an agent {kind}, {role}: {shown} %, median {middle:.2f} %, {middle - alone:+.2f} %\n")
    with with_standby() as it:
        time.sleep(SETTLE_S)
        hosts = {"active": it.active, "standby": it.standby, "witness": it.witness}
        ends = it.internet, it.vm, STATIC_NAT, it.vm.ip
        before = {name: cpu_s(host) for name, host in hosts.items()}
        with crafted_flows(*ends, gateway=GATEWAY, per_s=FLOWS_PER_S, seconds=FLOWS_S) as running:
            made = running.result()
        shown = ", ".join(f"{name} {(cpu_s(it) - before[name]) / FLOWS_S * 100:.1f} %" for name, it in hosts.items())
        sys.stdout.write(f"CPU of the agents at {made / FLOWS_S:.0f} new flows a second: {shown}\n")
        sys.stdout.flush()


def _used(hosts: Sequence[Host]) -> dict[Host, float]:
    """How many % of a core the agent of each host uses while nothing happens."""
    before, began = {it: cpu_s(it) for it in hosts}, time.monotonic()
    time.sleep(CPU_S)
    took_s = time.monotonic() - began
    return {it: (cpu_s(it) - was) / took_s * 100 for it, was in before.items()}


def event_cost(rounds: int) -> None:
    """Print how long CloudStack's events take with a standby and without one, in turns, on the same host.

    First a process for each command, as CloudStack runs it, with ``ensure-network-device`` before it. Then the same
    events inside of the agent, from the call to its reply. All of it twice: all hosts share the processors, and the
    active host has one of its own.
    """
    with with_standby() as it:
        networks = {WITH: event_network(it, 1, it.cloud), WITHOUT: event_network(it, 2, without_standby(it))}
        if not until(lambda: "standby: ready" in networks[WITH].custom_action("show"), seconds=60):
            raise SystemExit("the standby is not ready")
        time.sleep(SETTLE_S)
        active = it.candidates[0]
        if any(network.host != active.address for network in networks.values()):
            raise SystemExit("the networks are not on the same host")
        time_events("shared processors", networks, active, rounds)
        keep_apart(active, [host for host in it.candidates if host is not active])
        time_events("a processor of its own", networks, active, rounds)


def time_events(processors: str, networks: dict[str, IsolatedNetwork], active: Host, rounds: int) -> None:
    """Send the events of both networks in turns, and print their times."""
    logged = len(active.read(AGENT_LOG))
    outside: dict[str, dict[str, list[float]]] = {name: {} for name in networks}
    for at in range(rounds):
        for name in (WITH, WITHOUT) if at % 2 else (WITHOUT, WITH):
            for sent in run_events(networks[name], at):
                outside[name].setdefault(sent.command, []).append(sent.execution.seconds * 1000)
            time.sleep(EVENT_PAUSE_S)
    log = active.read(AGENT_LOG)[logged:]
    if " is behind" in log:  # then a call is answered without waiting for the standby
        raise SystemExit("the standby was behind")
    inside = {name: inside_ms(log, network) for name, network in networks.items()}
    write_head(f"ms, {processors}")
    for where, taken in ((", as CloudStack runs it", outside), (", in the agent", inside)):
        for command in outside[WITH]:
            if command in taken[WITH]:
                write_ratio(command + where, taken[WITH][command], taken[WITHOUT][command])


def keep_apart(active: Host, others: Sequence[Host]) -> None:
    """Give the active host's processes a processor that the other hosts do not use, as real hosts have their own."""
    first, *rest = sorted(os.sched_getaffinity(0))
    for host, processors in ((active, {first}), *((it, set(rest)) for it in others if rest)):
        for pid in faults.processes_of(host):
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), processors)


def write_head(what: str) -> None:
    """Print the head of a table of ``write_ratio``."""
    sys.stdout.write(f"{what:42}{WITH:>22}{WITHOUT:>18}{'ratio':>14}\n")
    sys.stdout.write(f"{'':42}{'best':>12}{'median':>10}{'best':>8}{'median':>10}{'best':>7}{'median':>7}\n")


def write_ratio(what: str, ours: Sequence[float], theirs: Sequence[float]) -> None:
    """Print the best and the median of both, and the ratios of these."""
    best, middle = (min(ours), min(theirs)), (statistics.median(ours), statistics.median(theirs))
    shown = f"{best[0]:12.1f}{middle[0]:10.1f}{best[1]:8.1f}{middle[1]:10.1f}"
    sys.stdout.write(f"{what:42}{shown}{best[0] / best[1]:7.2f}{middle[0] / middle[1]:7.2f}\n")
    sys.stdout.flush()


def without_standby(it: StandbyBed) -> FakeCloudStack:
    """A CloudStack whose registration is the same but for the standby."""
    cloud = FakeCloudStack.on(it.bed.management)
    cloud.registration = {**it.cloud.registration, "standby": "off"}
    return cloud


def event_network(it: StandbyBed, at: int, cloud: FakeCloudStack) -> IsolatedNetwork:
    """A network with a VM, a forwarded port and a firewall rule, on the first candidate."""
    names = [host.address for host in it.candidates]
    numbers = (number for number in itertools.count(1000 * at) if preferred_order(str(number), names)[0] == names[0])
    it.bed.add_segments([("eth1", str(VLAN + at))])
    network = cloud.isolated_network(
        next(numbers), vlan=VLAN + at, cidr="10.20.1.0/24", source_nat=f"203.0.113.{100 + at}", public_vlan=PUBLIC_VLAN
    )
    network.implement()
    network.deploy_vm(f"vm-{at}", ip="10.20.1.10", mac=f"02:01:00:dd:00:0{at}")
    network.add_firewall_rule(network.addresses[0], "tcp", 22)
    network.add_port_forward(network.addresses[0], "8080", network.nics[0], "80")
    return network


def run_events(network: IsolatedNetwork, at: int) -> list[Sent]:
    """Send what changes the network, and what changes it back. Returns all executions."""
    facts, nic, address = network.facts, network.nics[0], network.addresses[0]
    forward = payloads.PortForwardRule(1, address, str(9000 + at), nic.ip, "90", "tcp")
    opened = payloads.FirewallRule(2, "tcp", address, 9000 + at, 9000 + at)
    second = replace(nic, nic_id="7001", uuid="", mac="02:01:00:de:00:01", ip="10.20.1.11")
    since = len(network.cloud.history)
    for command, payload in (
        ("add-port-forward", payloads.port_forward(facts, forward)),
        ("delete-port-forward", payloads.port_forward(facts, forward)),
        ("apply-fw-rules", payloads.fw_rules(facts, [*network.firewall, opened])),
        ("add-dhcp-entry", payloads.add_dhcp_entry(facts, second)),
        ("remove-dhcp-entry", payloads.remove_dhcp_entry(facts, second)),
    ):
        if not network.send(command, payload).ok:
            raise SystemExit(f"{command} failed: {network.cloud.history[-1].output}")
    return network.cloud.history[since:]


def inside_ms(log: str, network: IsolatedNetwork) -> dict[str, list[float]]:
    """By command: how long the agent took from each call to its reply, as its log says."""
    found: dict[str, list[float]] = {}
    scope = network.namespace.removeprefix("cs-")
    for command, ms in re.findall(rf" command=(\S+) scope={scope} .* ms=([0-9.]+) ", log):
        found.setdefault(command, []).append(float(ms))
    return found


def packet_cost(rounds: int) -> None:
    """Print how long a datagram takes from a VM to the internet, with and without the lease table on the active host.

    There are no agents then: they would repair the table, and use a processor. The table is the one that was there,
    with a lease of an hour.
    """
    with with_standby() as it:
        time.sleep(SETTLE_S)
        active = it.active
        listed = active.run("nft", "list", "table", "bridge", lease.TABLE.name).out
        table, leases = re.subn(r"timeout \S+ expires \S+", "timeout 1h", listed)
        if leases != len(lease.LIVES):
            raise SystemExit(f"no lease: {listed}")
        removal = f"table bridge {lease.TABLE.name}\ndelete table bridge {lease.TABLE.name}\n"
        it.internet.run("nft", "-f", "-", input=BURST_TABLE)
        for host in (*it.passive, active):
            faults.kill_agent(host)
        write_head("microseconds for a datagram")
        for size in BURST_SIZES:
            taken: dict[str, list[float]] = {WITH: [], WITHOUT: []}
            for at in range(rounds):
                for name in (WITH, WITHOUT) if at % 2 else (WITHOUT, WITH):
                    active.run("nft", "-f", "-", input=removal + (table if name == WITH else ""))
                    before = arrived(it.internet)
                    burst_s = it.second_vm.burst_udp(OUTSIDE, BURST_PORT, count=BURST, size=size)
                    if arrived(it.internet) - before != BURST:
                        raise SystemExit("datagrams were lost")
                    taken[name].append(burst_s / BURST * 1e6)
            write_ratio(f"{size} bytes", taken[WITH], taken[WITHOUT])
            ratios = [ours / theirs for ours, theirs in zip(taken[WITH], taken[WITHOUT], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            sys.stdout.write(
                f"{'':4}ratio of neighbouring bursts: {middle:.2f}, half of them {low:.2f} to {high:.2f}\n"
            )


def arrived(internet: Internet) -> int:
    """How many datagrams of all bursts have come."""
    listed = internet.run("nft", "list", "table", "inet", "burst").out
    return int(listed.partition("counter packets ")[2].split()[0])


def many_networks(count: int) -> None:
    """Print how long it takes until networks of a host that fails are all served by their standby."""
    with with_standby() as it:
        names = [host.address for host in it.candidates]
        numbers = (number for number in itertools.count(1000) if preferred_order(str(number), names)[0] == names[0])
        questions = []
        for at, number in enumerate(itertools.islice(numbers, count)):
            address = f"203.0.{114 + at // 200}.{10 + at % 200}"  # .1 is the gateway
            it.bed.add_segments([("eth1", str(VLAN + 1 + at))])
            network = it.cloud.isolated_network(
                number, vlan=VLAN + 1 + at, cidr="10.20.1.0/24", source_nat=address, public_vlan=PUBLIC_VLAN
            )
            network.ensures_always = False
            network.implement()
            network.ensure()  # the standby
            if network.host == names[0]:
                questions.append(Question("eth2", PUBLIC_VLAN, address))
        time.sleep(SETTLE_S)
        first = it.candidates[0]
        with Observer(it.bed, questions, hosts=it.candidates, every_s=MANY_EVERY_S) as observer:
            observer.wait_for(first)
            first.power_cut()
            if not until(lambda: all(len(observer.turns(address=it.address)) > 1 for it in questions), pause_s=0.5):
                sys.stdout.write("not all networks were taken over within 30 s\n")
                return
            turns = {it.address: observer.turns(address=it.address) for it in questions}
        outages = sorted(later.first - earlier.last for earlier, later, *_ in turns.values())
        each_s = f"the first after {outages[0]:.2f} s, the last after {outages[-1]:.2f} s"
        sys.stdout.write(f"{len(outages)} networks at once, asked each {MANY_EVERY_S * 1000:.0f} ms: {each_s}\n")


def cpu_s(host: Host) -> float:
    """The processor time of the host's agent so far, of all its threads, also those that have ended."""
    (pid,) = faults.agents_of(host)
    return time.clock_gettime((~pid) << 3 | _CPUCLOCK_SCHED)


SYSTEMS: dict[str, Callable[[str, int], Measured]] = {"keepalived": keepalived, "netloom": netloom}


def main(rounds: int, each: int) -> None:
    """Print the best and median of each fault and system, in turns."""
    head = f"{'':34}{'first packet, ms':>22}{'TCP gap, s':>16}{'flows kept':>16}{'both answered':>16}\n"
    sys.stdout.write(head + f"{'':34}{'best':>11}{'median':>11}{'best':>8}{'median':>8}\n")
    for fault in FAULTS:
        taken: dict[str, list[Measured]] = {name: [] for name in SYSTEMS}
        for _ in range(rounds):
            for name, system in SYSTEMS.items():
                taken[name].append(system(fault, each))
        for name, results in taken.items():
            first = [it.first_packet_ms for it in results if not it.overlap]
            gaps = [it.tcp_gap_s for it in results]
            shown = f"{min(first):11.0f}{statistics.median(first):11.0f}" if first else f"{'-':>11}{'-':>11}"
            shown += f"{min(gaps):8.2f}{statistics.median(gaps):8.2f}"
            kept = f"{sum(it.kept for it in results)} of {sum(it.flows for it in results)}"
            both = f"{sum(it.overlap > 0 for it in results)} of {len(results)}"
            sys.stdout.write(f"{name + ', ' + fault:34}{shown}{kept:>16}{both:>16}\n")
            sys.stdout.flush()
    agents_cpu()
    many_networks(MANY)
    event_cost(EVENT_ROUNDS)
    packet_cost(BURST_ROUNDS)


if __name__ == "__main__":
    numbers = [int(it) for it in sys.argv[1:]]
    main(*[*numbers, *(3, 200)[len(numbers) :]])
