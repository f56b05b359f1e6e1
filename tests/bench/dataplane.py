"""Rows of networks with many rules: what one more costs, and what a new connection costs."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from bed import faults, payloads
from bed.cloudstack import IsolatedNetwork
from bed.lab import Internet, Vm
from bed.payloads import FirewallRule, PortForwardRule
from bench.rows import Measured, Run, in_turns
from bench.stand import FIRST_VLAN, GATEWAY, PUBLIC_VLANS, STATES, CommandFailed, Stand, standing

FEW, MANY, QUICK_MANY = 10, 10_000, 1_000
FIRST_PORT = 20_000
FLOWS = 4_000  # of a sample: far below the share of connections that others may open to one VM
FLOW_ROUNDS = 8
ANYWHERE = ("0.0.0.0/0",)
SENDER = str(Path(__file__).with_name("new_flows.py"))
ARRIVED = """table inet arrived {
  counter seen { }
  chain arriving { type filter hook prerouting priority raw; udp dport 9000-65535 counter name seen drop; }
}
"""


def dataplane(run: Run) -> Iterator[Measured]:
    """Four networks on one host: with few and with many forwards, and with few and with many rules."""
    many = QUICK_MANY if run.quick else MANY
    with standing() as stand:
        stand.grow_to(4)
        internet = stand.bed.internet(vlan=PUBLIC_VLANS[0], address="100.64.255.254/16")
        for at, vlan in enumerate(PUBLIC_VLANS[1:], 1):
            internet.attach(vlan, f"100.{64 + at}.255.254/16")
        vms = [with_vm(stand, network) for network in stand.networks]
        few, full, few_rules, full_rules = stand.networks
        if run.wants("forwards", "through-forwards"):
            run.say(f"{many} forwards")
            for network in (few, full):
                allow(stand, network, [FirewallRule(1, "udp", network.addresses[0], 1, 65_535, source_cidrs=ANYWHERE)])
            put_forwards(stand, {few: FEW, full: many})
        if run.wants("forwards"):
            run.say("add-port-forward")
            numbers = itertools.count(FIRST_PORT + MANY)
            yield from in_turns(
                run.rounds // 2,
                lambda: one_more_ms(few, next(numbers)),
                {"forwards": lambda: one_more_ms(full, next(numbers))},
            ).items()
        if run.wants("through-forwards"):
            run.say("new connections through forwards")
            yield from in_turns(
                FLOW_ROUNDS,
                lambda: flows_per_s(stand, internet, few, vms[0], FEW),
                {"through-forwards": lambda: flows_per_s(stand, internet, full, vms[1], many)},
            ).items()
        if run.wants("through-rules"):
            run.say(f"{many} rules")
            for network, count in ((few_rules, FEW), (full_rules, many)):
                forward_all(stand, network)
                allow(stand, network, exact_ports(network, count))
            run.say("new connections through rules")
            yield from in_turns(
                FLOW_ROUNDS,
                lambda: flows_per_s(stand, internet, few_rules, vms[2], FEW),
                {"through-rules": lambda: flows_per_s(stand, internet, full_rules, vms[3], many)},
            ).items()


def with_vm(stand: Stand, network: IsolatedNetwork) -> Vm:
    """The VM of the network, which counts and drops what arrives."""
    nic = network.nics[0]
    vlan = FIRST_VLAN + stand.networks.index(network)
    vm = stand.host.vm(nic.vm.name, vlan=vlan, mac=nic.mac, ip=f"{nic.ip}/24", gateway=GATEWAY)
    vm.run("nft", "-f", "-", input=ARRIVED)
    return vm


def put_forwards(stand: Stand, counts: Mapping[IsolatedNetwork, int]) -> None:
    """Give networks so many forwards. They are written into the states, because 10,000 commands take too long."""
    for network in counts:
        with stand.directly(network):
            network.send_or_fail("add-port-forward", payloads.port_forward(network.facts, forward(network, FIRST_PORT)))
    faults.kill_agent(stand.host)
    for network, count in counts.items():
        path = f"{STATES}/net-{network.facts.network_id}.json"
        state = json.loads(stand.host.read(path))
        ((key, one),) = state["port_forwards"].items()
        for port in range(FIRST_PORT, FIRST_PORT + count):
            ports = {"first": port, "last": port}
            name = key.replace(str(FIRST_PORT), str(port))
            state["port_forwards"][name] = {**one, "public_ports": ports, "private_ports": ports}
        stand.host.write(path, json.dumps(state), mode=0o600)
    stand.networks[-1].ensure()
    for network in counts:
        stand.event_ms(network, forward(network, FIRST_PORT + MANY - 1))  # an agent runs, and has restored both


def forward(network: IsolatedNetwork, port: int) -> PortForwardRule:
    return PortForwardRule(port, network.addresses[0], str(port), network.nics[0].ip, str(port), "udp")


def forward_all(stand: Stand, network: IsolatedNetwork) -> None:
    """One forward of all ports."""
    ports = f"{FIRST_PORT}-{FIRST_PORT + MANY}"
    rule = PortForwardRule(1, network.addresses[0], ports, network.nics[0].ip, ports, "udp")
    with stand.directly(network):
        network.send_or_fail("add-port-forward", payloads.port_forward(network.facts, rule))


def exact_ports(network: IsolatedNetwork, count: int) -> list[FirewallRule]:
    """A rule for each of so many ports."""
    address = network.addresses[0]
    ports = range(FIRST_PORT, FIRST_PORT + count)
    return [FirewallRule(port, "udp", address, port, port, source_cidrs=ANYWHERE) for port in ports]


def allow(stand: Stand, network: IsolatedNetwork, rules: list[FirewallRule]) -> None:
    with stand.directly(network):
        network.send_or_fail("apply-fw-rules", payloads.fw_rules(network.facts, rules))


def one_more_ms(network: IsolatedNetwork, port: int) -> float:
    """add-port-forward, without the ensure-network-device before it."""
    rule = forward(network, port)
    sent = network.cloud.execute("add-port-forward", network.details, payloads.port_forward(network.facts, rule))
    if not sent.ok:
        raise CommandFailed(f"add-port-forward: {sent.output}")
    return sent.execution.seconds * 1000


_sources = itertools.count()


def flows_per_s(stand: Stand, internet: Internet, network: IsolatedNetwork, vm: Vm, ports: int) -> float:
    """Send new flows from the internet to the VM, and check that all have come."""
    before = arrived(vm)
    source = f"198.{20 + next(_sources) % 200}"  # another one each time: the flows of the last time still exist
    said = internet.run(
        sys.executable, SENDER, network.addresses[0].ip, source, str(FIRST_PORT), str(ports), str(FLOWS)
    )
    came = arrived(vm) - before
    stand.host.run("conntrack", "-F", check=False)
    stand.host.run("ip", "netns", "exec", network.namespace, "conntrack", "-F")
    if came < FLOWS * 0.99:
        raise CommandFailed(f"{FLOWS - came} of {FLOWS} datagrams were lost")
    return FLOWS / float(said.out)


def arrived(vm: Vm) -> int:
    """How many datagrams the VM has seen."""
    return int(vm.run("nft", "list", "counter", "inet", "arrived", "seen").out.partition("packets ")[2].split()[0])
