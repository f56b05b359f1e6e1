"""Rows of calls and events: what CloudStack waits for, from its execution of the program to its exit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from bed import Bed, payloads
from bed.cloudstack import CLOUD_UID, FakeCloudStack, IsolatedNetwork
from bed.payloads import Backend, LoadBalancerRule
from bench.rows import SCRIPT, Measured, Pair, Run, in_turns, timed_ms
from bench.stand import (
    FIRST_ID,
    KEY,
    PUBLIC_VLANS,
    CommandFailed,
    Stand,
    nic,
    one_file,
    public_address,
    rules,
    standing,
    took_ms,
)

AT_ONCE, EVENTS, WIDTH, OVER = 16, 50, 10, 30
LIFE_RULES, LIFE_VMS, RESTORED_VMS = 20, 100, 1000
MANY_ROUNDS = 3  # of rows that take long


def calls(run: Run) -> Iterator[Measured]:
    """The rows that need one host with at most 30 networks."""
    with standing() as stand:
        stand.grow_to(1)
        network = stand.networks[0]
        if run.wants("call"):
            run.say("a call")
            yield from in_turns(run.rounds, lambda: bare_ms(stand), {"call": lambda: refused_ms(stand)}).items()
        if run.wants("event"):
            run.say("an event")
            yield from events(stand, network, run.rounds)
        if run.wants("life"):
            run.say("the life of a network")
            lives = {"life" + SCRIPT: lambda: stand.script_ms("life"), "life": lambda: life_ms(stand)}
            yield from in_turns(2 if run.quick else MANY_ROUNDS, stand.ssh_ms, lives).items()
        if run.wants("sixteen"):
            run.say("16 commands at once")
            once = {"sixteen": lambda: at_once_ms(stand, [network] * AT_ONCE, AT_ONCE)}
            yield from in_turns(MANY_ROUNDS, stand.ssh_ms, once).items()
        if run.wants("rules-1000"):
            yield "rules-1000", rule_lists(run, stand, network, 1000, run.rounds // 2)
        if run.wants("rules-10000"):
            yield "rules-10000", rule_lists(run, stand, network, 10_000, MANY_ROUNDS)
        if run.wants("restore"):
            run.say("restore-network")
            yield from in_turns(MANY_ROUNDS, stand.ssh_ms, {"restore": lambda: restored_ms(stand)}).items()
        if run.wants("fifty"):
            run.say(f"{OVER} networks")
            stand.grow_to(OVER)
            run.say("50 events")
            over = [stand.networks[at % OVER] for at in range(EVENTS)]
            yield from in_turns(MANY_ROUNDS, stand.ssh_ms, {"fifty": lambda: at_once_ms(stand, over, WIDTH)}).items()


def bare_ms(stand: Stand) -> float:
    """One start of a bare interpreter, as user cloud on the management server."""
    return stand.management.execute(["/usr/bin/python3", "-I", "-S", "-c", "pass"]).seconds * 1000


def refused_ms(stand: Stand) -> float:
    """One call that the helper refuses because of its payload: the way there and back."""
    sent = stand.cloud.execute_text("implement-network", "{}")
    if sent.execution.status != 1:
        raise CommandFailed(f"an empty payload: exit status {sent.execution.status}: {sent.output}")
    return sent.execution.seconds * 1000


def events(stand: Stand, network: IsolatedNetwork, rounds: int) -> Iterator[Measured]:
    """One event, and the same by a shell script."""
    stand.script_ms("prepare")
    ports = iter(range(1000, 1000 + rounds))
    ways: dict[str, Callable[[], float]] = {
        "event" + SCRIPT: lambda: stand.script_ms("event", str(next(ports))),
        "event": lambda: stand.event_ms(network),
    }
    found = in_turns(rounds, stand.ssh_ms, ways)
    stand.script_ms("clear")
    stand.forget_forwards(network)
    yield "event@1", found["event"]
    yield from found.items()


def at_once_ms(stand: Stand, networks: list[IsolatedNetwork], width: int) -> float:
    """One event for each network of the list, so many at a time: until the last has ended."""
    with ThreadPoolExecutor(width) as pool:
        took = timed_ms(lambda: list(pool.map(stand.event_ms, networks)))
    for network in {id(it): it for it in networks}.values():
        stand.forget_forwards(network)
    return took


def rule_lists(run: Run, stand: Stand, network: IsolatedNetwork, count: int, rounds: int) -> list[Pair]:
    """The command alone, with one rule more or less than the list before."""
    run.say(f"{count} rules")
    listed = rules(network.addresses[0], count + 1)
    state = {"more": False}

    def apply() -> float:
        state["more"] = not state["more"]
        payload = payloads.fw_rules(network.facts, listed if state["more"] else listed[:-1])
        return command_ms(network, "apply-fw-rules", payload)

    apply()
    found = in_turns(rounds, stand.ssh_ms, {"apply": apply})["apply"]
    command_ms(network, "apply-fw-rules", payloads.fw_rules(network.facts, []))
    return found


def command_ms(network: IsolatedNetwork, command: str, payload: payloads.Fields) -> float:
    """One execution, without the ensure-network-device before it."""
    network.ensures_always = False
    try:
        return took_ms(network, lambda: network.send_or_fail(command, payload))
    finally:
        network.ensures_always = True


def restored_ms(stand: Stand) -> float:
    """restore-network of a new network: the command alone."""
    network = stand.network(3060, stand.cloud)
    network.facts.cidr, network.facts.gateway = "10.40.0.0/16", "10.40.0.1"
    stand.bed.add_segments([("eth1", network.next_vlan)])
    nics = [nic(3060, vm, address=f"10.40.{1 + vm // 250}.{1 + vm % 250}") for vm in range(RESTORED_VMS)]
    with stand.directly(network):
        network.implement()
    network.ensure()
    took = command_ms(network, "restore-network", payloads.restore_network(network.facts, nics, {}))
    with stand.directly(network):
        network.delete()
    return took


def life_ms(stand: Stand) -> float:
    """21 operations of a network that comes and goes: the executions of each, with the ensure before it."""
    network = stand.network(3050, stand.cloud)
    stand.bed.add_segments([("eth1", network.next_vlan)])
    facts, first, second = network.facts, nic(3050, 0), public_address(3051)
    facts.vlan, facts.state = network.next_vlan, "implementing"
    source_nat = network.addresses[0]
    forward = stand.forward(network)
    balanced = [
        LoadBalancerRule(at, f"web-{at}", source_nat, port, port, backends=[Backend(first.ip, port)] * 1)
        for at, port in ((1, 80), (2, 443))
    ]
    vms = [nic(3050, at) for at in range(LIFE_VMS)]
    operations: list[tuple[str, payloads.Fields]] = [
        ("implement-network", payloads.implement_network(facts)),
        ("assign-ip", payloads.public_ip(facts, source_nat)),
        ("config-dhcp-subnet", payloads.config_subnet(facts, first)),
        ("config-dns-subnet", payloads.config_subnet(facts, first)),
        ("prepare-nic", payloads.prepare_nic(facts, first)),
        ("add-dhcp-entry", payloads.add_dhcp_entry(facts, first)),
        ("add-dns-entry", payloads.add_dns_entry(facts, first)),
        ("save-vm-data", payloads.save_vm_data(facts, first)),
        ("apply-fw-rules", payloads.fw_rules(facts, rules(source_nat, LIFE_RULES))),
        ("assign-ip", payloads.public_ip(facts, second)),
        ("add-static-nat", payloads.static_nat(facts, second, first.ip)),
        ("add-port-forward", payloads.port_forward(facts, forward)),
        ("apply-lb-rules", payloads.lb_rules(facts, balanced)),
        ("delete-port-forward", payloads.port_forward(facts, forward)),
        ("delete-static-nat", payloads.static_nat(facts, second, first.ip)),
        ("release-ip", payloads.public_ip(facts, second)),
        ("release-nic", payloads.release_nic(facts, first)),
        ("restore-network", payloads.restore_network(facts, vms, {})),
        ("custom-action", {}),
        ("shutdown-network", payloads.bare(facts)),
        ("destroy-network", payloads.bare(facts)),
    ]

    def live() -> None:
        for command, payload in operations:
            if command == "custom-action":
                network.ensure()
                network.custom_action("dump-config")
            else:
                network.send_or_fail(command, payload)

    return took_ms(network, live)


def first(run: Run) -> Iterator[Measured]:
    """The first commands of a network on a host that has never seen the program: ensure and implement-network."""
    rounds = 2 if run.quick else 4
    run.say("bare hosts")
    with Bed(hosts=rounds + 1, vlans=[1000], public_vlans=PUBLIC_VLANS) as bed:
        cloud = FakeCloudStack.on(bed.management, program=one_file(), agent="")
        bed.management.write(KEY, bed.private_key, mode=0o600, uid=CLOUD_UID)
        pairs: list[Pair] = []
        for at, host in enumerate(bed.hosts):
            run.say(f"bare host {at}")
            cloud.register(hosts=[host], **bed.login("root", by="key"))
            network = cloud.isolated_network(FIRST_ID + at, vlan=1000, cidr="10.20.1.0/24")
            network.facts.vlan, network.facts.state = network.next_vlan, "implementing"
            payload = payloads.implement_network(network.facts)
            ssh = ["ssh", "-F", "none", "-q", "-i", KEY, "-o", "StrictHostKeyChecking=no"]
            yardstick = bed.management.execute(
                [*ssh, "-o", "UserKnownHostsFile=/dev/null", f"root@{host.address}", "true"]
            )
            took = took_ms(network, lambda: network.send_or_fail("implement-network", payload))  # noqa: B023
            pairs.append((took, yardstick.seconds * 1000))
        yield "first", pairs[1:]  # the first one also unpacked the program on the management server
