"""Rows of networks with many rules: what one more costs, and what a new connection costs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from bed import payloads
from bed.cloudstack import IsolatedNetwork
from bed.lab import Internet, Vm
from bed.payloads import FirewallRule, PortForwardRule

from bench.rows import Measured, Run, in_turns
from bench.stand import FIRST_VLAN, GATEWAY, CommandFailed, Stand, standing

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
    """Two networks on one host: one with few forwards or rules, and one with many."""
    many = QUICK_MANY if run.quick else MANY
    with standing() as stand:
        stand.grow_to(2)
        internet = stand.bed.internet(vlan=101, address="100.64.255.254/16")
        internet.attach(102, "100.65.255.254/16")
        few, full = stand.networks
        full.ensure()
        vms = [with_vm(stand, network) for network in stand.networks]
        if run.wants("forwards", "through-forwards"):
            run.say(f"{many} forwards")
            for network, count in ((few, FEW), (full, many)):
                open_all(stand, network)
                with stand.directly(network):
                    for rule in forwards(network, count):
                        network.send_or_fail("add-port-forward", payloads.port_forward(network.facts, rule))
            run.say("add-port-forward")
            if run.wants("forwards"):
                numbers = itertools.count(FIRST_PORT + MANY)
                yield from in_turns(
                    run.rounds // 2,
                    lambda: one_more_ms(few, next(numbers)),
                    {"forwards": lambda: one_more_ms(full, next(numbers))},
                ).items()
            run.say("new connections through forwards")
            found = in_turns(
                FLOW_ROUNDS,
                lambda: flows_per_s(stand, internet, few, vms[0], FEW),
                {"through-forwards": lambda: flows_per_s(stand, internet, full, vms[1], many)},
            )
            yield from found.items()
        if run.wants("through-rules"):
            run.say(f"{many} rules")
            for network, count in ((few, FEW), (full, many)):
                behind_rules(stand, network, count)
            run.say("new connections through rules")
            yield from in_turns(
                FLOW_ROUNDS,
                lambda: flows_per_s(stand, internet, few, vms[0], FEW),
                {"through-rules": lambda: flows_per_s(stand, internet, full, vms[1], many)},
            ).items()


def with_vm(stand: Stand, network: IsolatedNetwork) -> Vm:
    """The VM of the network, which counts and drops what arrives."""
    nic = network.nics[0]
    vlan = FIRST_VLAN + stand.networks.index(network)
    vm = stand.host.vm(nic.vm.name, vlan=vlan, mac=nic.mac, ip=f"{nic.ip}/24", gateway=GATEWAY)
    vm.run("nft", "-f", "-", input=ARRIVED)
    return vm


def forwards(network: IsolatedNetwork, count: int) -> list[PortForwardRule]:
    ip = network.nics[0].ip
    return [
        PortForwardRule(port, network.addresses[0], str(port), ip, str(port), "udp")
        for port in range(FIRST_PORT, FIRST_PORT + count)
    ]


def open_all(stand: Stand, network: IsolatedNetwork) -> None:
    """A firewall rule for all ports."""
    rule = FirewallRule(1, "udp", network.addresses[0], 1, 65_535, source_cidrs=ANYWHERE)
    with stand.directly(network):
        network.send_or_fail("apply-fw-rules", payloads.fw_rules(network.facts, [rule]))


def behind_rules(stand: Stand, network: IsolatedNetwork, count: int) -> None:
    """One forward of all ports, and a firewall rule for each of ``count`` ports."""
    address = network.addresses[0]
    every = PortForwardRule(1, address, f"{FIRST_PORT}-{FIRST_PORT + MANY}", network.nics[0].ip, "", "udp")
    every.private_ports = every.public_ports
    listed = [
        FirewallRule(port, "udp", address, port, port, source_cidrs=ANYWHERE)
        for port in range(FIRST_PORT, FIRST_PORT + count)
    ]
    with stand.directly(network):
        for rule in reversed([*forwards(network, count), *network.port_forwards]):
            network.send("delete-port-forward", payloads.port_forward(network.facts, rule))
        network.port_forwards.clear()
        network.send_or_fail("add-port-forward", payloads.port_forward(network.facts, every))
        network.send_or_fail("apply-fw-rules", payloads.fw_rules(network.facts, listed))


def one_more_ms(network: IsolatedNetwork, port: int) -> float:
    """add-port-forward, without the ensure-network-device before it."""
    rule = PortForwardRule(port, network.addresses[0], str(port), network.nics[0].ip, str(port), "udp")
    network.port_forwards.append(rule)
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
