"""Upgrade and rollback: which build replaces which, without effect on networks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bed import Bed
from bed.cloudstack import ALL_SERVICES, IsolatedNetwork
from bed.lab import Host, Internet, Vm
from bed.machines import until
from ssh.deploy_lab import (
    LIBEXEC,
    ONE,
    SETTLE_S,
    THREE,
    TWO,
    Server,
    builds,
    current,
    in_background,
    kill_agent,
    running_agents,
    succeeded,
)
from ssh.onefile import OneFiles

SCOPES = "/var/lib/netloom/scopes"
INSTALL = "netloom/agent/setup/install.py"
PUBLIC = 101


@pytest.fixture
def older(files: OneFiles) -> Path:
    return files.make(ONE)


@pytest.fixture(scope="session")
def internet(deploy_bed: tuple[Bed, OneFiles]) -> Internet:
    return deploy_bed[0].internet(vlan=PUBLIC, address="203.0.113.1/24")


def network(server: Server, number: int = 204) -> IsolatedNetwork:
    """An isolated network with all services."""
    server.bed.add_segments([("eth1", str(1000 + number))])
    made = server.cloud.isolated_network(
        number, vlan=1000 + number, cidr="10.10.1.0/24", offering=ALL_SERVICES, public_vlan=PUBLIC
    )
    made.ensures_always = False
    made.source_nat = source_nat = made.associate(f"203.0.113.{number % 100 + 10}")
    source_nat.source_nat = True
    return made


def guest(it: IsolatedNetwork, host: Host, name: str = "web-1", last: int = 45) -> Vm:
    """Deploy a VM of the network and start it on the host."""
    nic = it.deploy_vm(name, ip=f"10.10.1.{last}", mac=f"02:01:00:00:00:{last:02x}")
    return host.vm(name, vlan=it.facts.vlan, mac=nic.mac, ip=f"{nic.ip}/24", gateway=it.facts.gateway)


def processes(host: Host, word: str) -> list[str]:
    """The processes whose command line contains ``word``, with their pids."""
    return sorted(line for line in host.sh("ps -A -o pid=,args=").splitlines() if word in line and "ps -A" not in line)


def lease(vm: Vm) -> str:
    done = vm.run("busybox", "udhcpc", "-f", "-q", "-n", "-t", "5", "-T", "1", "-i", "eth0", "-s", "/bin/true")
    return done.out + done.err


def run_agent_command(host: Host, *words: str, check: bool = True) -> str:
    """Run ``agent`` commands of the active program on the host; returns the output."""
    done = host.run(f"{LIBEXEC}/current/netloom", "agent", *words, check=check)
    return done.out + done.err


@contextmanager
def no_kernel_changes(host: Host) -> Iterator[None]:
    """Assert that no link, IPv4 address, route or rule of the host or of network 204 changes, not even briefly.

    IPv6 is left out, because links of the host get their link-local addresses seconds after their creation.
    """
    monitor = "ip -4 monitor link address route rule </dev/null >>/run/changes 2>&1 &"
    host.sh(f"rm -f /run/changes; {monitor} ip netns exec cs-net-204 {monitor}")
    try:
        sockets = "for pid in $(pgrep -x ip); do ls -l /proc/$pid/fd; done | grep -c socket: || true"
        assert until(lambda: int(host.sh(sockets)) == 4)  # ip has one netlink socket for requests and one for events
        yield
        assert host.read("/run/changes") == ""
    finally:
        host.sh("pkill -x ip")


def test_a_newer_build_takes_over_without_affecting_networks(
    bed: Bed, host: Host, internet: Internet, older: Path, two: Path
) -> None:
    server = Server(bed, older)
    net = network(server)
    vm, other = guest(net, host), guest(net, host, "web-2", 46)
    web = net.add_port_forward(net.associate("203.0.113.90"), "80", net.nics[0], "80")
    net.add_firewall_rule(web.address, "tcp", 80)
    with vm.serve_tcp(80):
        balanced = net.add_lb_rule(net.associate("203.0.113.91"), "web", 81, 80, net.nics)
        net.add_firewall_rule(balanced.address, "tcp", 81)
        assert internet.tcp("203.0.113.91", 81).ok
        stays = processes(host, "dnsmasq") + processes(host, "haproxy")
        assert len(stays) >= 2
        guests = processes(host, "netloom guest")
        rules = ruleset(host)
        with internet.open("203.0.113.90", 80) as kept:
            running = internet.transfer("203.0.113.90", 80)
            with no_kernel_changes(host):
                server.replace(two)
                calls = 0
                while f"activated: {TWO}" not in server.log():  # calls succeed during the upgrade
                    assert succeeded(server.ask())
                    calls += 1
                    assert calls < 1000
                assert until(lambda: current(host) == TWO and running_agents(host) == [TWO], seconds=SETTLE_S)
                assert until(lambda: TWO in "".join(processes(host, "netloom guest")) and guests[0] not in
                             processes(host, "netloom guest"), seconds=SETTLE_S)  # fmt: skip
            assert f"lease of {net.nics[1].ip} obtained" in lease(other)
            assert kept.ask() == "answered"
            moved = running.stop()
            assert (moved.failure, moved.intact) == ("", True)
        assert processes(host, "dnsmasq") + processes(host, "haproxy") == stays
        assert ruleset(host) == rules
        assert succeeded(server.ask())
        assert internet.tcp("203.0.113.91", 81).ok
    assert builds(host) == [ONE, TWO, "current", "previous"]


def ruleset(host: Host) -> str:
    """The ruleset of the network with all handles, without the elements that packets add."""
    listed = host.sh("ip netns exec cs-net-204 nft -s -a list ruleset")
    return re.sub(r"(set \w+ \{[^{}]*flags dynamic[^{}]*?)\s*elements = \{[^}]*\}", r"\1", listed)


def test_only_the_previous_build_is_kept(bed: Bed, host: Host, files: OneFiles, older: Path, two: Path) -> None:
    server = Server(bed, older, helper="0")
    assert succeeded(server.ask())
    host.write(f"{LIBEXEC}/notes.txt", "the operator's")
    host.sh(f"mkdir -p {LIBEXEC}/0.0.1-1-own; touch {LIBEXEC}/0.0.1-1-own/mine {LIBEXEC}/{ONE}/.part-old")
    for program in (two, files.make(THREE)):
        host.sh(f"touch -d yesterday {LIBEXEC}/0*; mkdir -p {LIBEXEC}/0.0.2-1-young")
        host.sh(f"touch {LIBEXEC}/0.0.2-1-young")  # an upload in progress
        server.replace(program)
        assert succeeded(server.ask())
    assert sorted(builds(host)) == ["0.0.1-1-own", "0.0.2-1-young", TWO, THREE, "current", "notes.txt", "previous"]
    assert host.listing(f"{LIBEXEC}/0.0.1-1-own") == ["mine"]
    assert running_agents(host) == [THREE]


def test_an_older_server_works_with_a_newer_agent_and_does_not_replace_it(
    bed: Bed, host: Host, older: Path, two: Path
) -> None:
    assert succeeded(Server(bed, two).ask())
    server = Server(bed, older)
    net = network(server)
    net.implement()
    assert net.failures == []
    assert host.listing(SCOPES) == ["net-204.json"]
    assert builds(host) == [TWO, "current"]
    assert f"this server's {ONE} works with the agent {TWO} there" in server.log()
    assert "no automatic downgrade" in server.log()


def test_two_servers_of_different_builds_result_in_the_newer(bed: Bed, host: Host, older: Path, two: Path) -> None:
    servers = [Server(bed, older), Server(bed, two), Server(bed, older)]
    for ended in [in_background(server) for server in servers]:
        assert succeeded(ended())
    assert until(lambda: current(host) == TWO and running_agents(host) == [TWO], seconds=SETTLE_S)
    for server in servers:
        assert succeeded(server.ask())
    assert running_agents(host) == [TWO]


def test_rollback_restores_the_previous_build_and_its_state(
    bed: Bed, host: Host, files: OneFiles, older: Path, two: Path
) -> None:
    server = Server(bed, older)
    stays, ends, comes = network(server, 204), network(server, 205), network(server, 206)
    stays.implement()
    ends.implement()
    then = host.read(f"{SCOPES}/net-204.json")
    server.replace(two)
    assert succeeded(server.ask())
    assert until(lambda: running_agents(host) == [TWO], seconds=SETTLE_S)
    comes.implement()
    stays.add_firewall_rule(stays.associate("203.0.113.90"), "tcp", 22)
    ends.delete()
    now = host.read(f"{SCOPES}/net-204.json")
    assert now != then
    assert f"went back from {TWO} to {ONE}" in run_agent_command(host, "rollback")
    assert running_agents(host) == [ONE]
    assert json.loads(host.read(f"{SCOPES}/net-204.json"))["public_ips"] == json.loads(then)["public_ips"]
    # The deleted network is not restored, because its addresses may be in use again.
    assert host.listing(SCOPES) == ["net-204.json", "net-206.json"]
    assert host.read("/var/lib/netloom/undone/net-204.json") == now
    # Calls do not undo a rollback by the operator. A build newer than the one that was left does replace it.
    for _ in range(2):
        assert succeeded(server.ask())
    assert running_agents(host) == [ONE]
    assert "to which an operator of the host went back" in server.log()
    assert "no build before" in run_agent_command(host, "rollback", check=False)
    host.sh(f"touch -d yesterday {LIBEXEC}/0*")
    server.replace(files.make(THREE))
    assert succeeded(server.ask())
    assert server.logged(f"activated: {THREE}")
    assert running_agents(host) == [THREE]
    assert [name for name in builds(host) if name[0] == "0"] == [ONE, THREE]


def test_rollback_can_keep_the_current_state(bed: Bed, host: Host, older: Path, two: Path) -> None:
    server = Server(bed, older)
    net = network(server)
    net.implement()
    server.helper = "0"
    server.replace(two)
    assert succeeded(server.ask())
    net.add_firewall_rule(net.associate("203.0.113.90"), "tcp", 22)
    now = host.read(f"{SCOPES}/net-204.json")
    run_agent_command(host, "rollback", "--keep-state")
    assert running_agents(host) == [ONE]
    assert host.read(f"{SCOPES}/net-204.json") == now


# The moments of a replacement at which it is killed: the call of install.py that would be next, by function and a
# condition on its arguments.
KILLED = {
    "the old agent has ended": ("save_states", "True"),
    "the state is kept": ("set_link", "arguments[0] == _CURRENT"),
    "the link is set": ("_start", "True"),
    "the new agent has started": ("_wait_for", "True"),
    "nothing is removed yet": ("_remove_old", "True"),
}

_KILL_ONCE = """
original_{function} = {function}

def {function}(*arguments):
    if {condition} and not os.path.exists("/run/died"):
        open("/run/died", "w")
        os.kill(os.getpid(), 9)
    return original_{function}(*arguments)
"""


@pytest.mark.parametrize("when", KILLED)
def test_after_an_interrupted_replacement_the_next_call_works(
    when: str, bed: Bed, host: Host, files: OneFiles, older: Path
) -> None:
    server = Server(bed, older, helper="0")
    assert succeeded(server.ask())
    build = f"0.1.0-{10 + list(KILLED).index(when)}-dies"
    function, condition = KILLED[when]
    server.replace(files.make(build, changes={INSTALL: _KILL_ONCE.format(function=function, condition=condition)}))
    for _ in range(2):
        assert succeeded(server.ask())
    assert host.listing("/run").count("died") == 1
    assert running_agents(host) == [build]
    assert current(host) == build


# The last step of an agent's start before it answers: it spoils a state file and fails.
_SPOIL_AND_FAIL = f"""
def _Calls(*_):
    with open("{SCOPES}/net-204.json", "w") as file:
        file.write("{{}}")
    raise HostRefused("broken")
"""


def test_a_new_agent_that_fails_to_start_is_rolled_back(bed: Bed, host: Host, files: OneFiles, older: Path) -> None:
    server = Server(bed, older)
    net = network(server)
    net.implement()
    then = host.read(f"{SCOPES}/net-204.json")
    broken = files.make(
        "0.1.0-5-broken",
        changes={
            INSTALL: "START_S_MAX = 3.0",
            "netloom/agent/serve.py": _SPOIL_AND_FAIL,
        },
    )
    server.replace(broken)
    assert succeeded(server.ask())
    assert server.logged("the agent of 0.1.0-5-broken does not answer, 0.1.0-1-aaaa serves again: .*broken")
    for _ in range(3):
        assert succeeded(server.ask())
    assert running_agents(host) == [ONE]
    assert host.read(f"{SCOPES}/net-204.json") == then
    assert (
        host.read("/var/log/netloom/agent.log").count(" stopped; ") == 1
    )  # the failed build is not started again by each call
    assert "no build before" in run_agent_command(host, "rollback", check=False)


def test_an_operator_can_replace_a_hung_agent(bed: Bed, host: Host, files: OneFiles, older: Path) -> None:
    assert succeeded(Server(bed, older).ask())
    kill_agent(host, "STOP")
    two = files.make("0.1.0-2-quick", changes={INSTALL: "STOP_S_MAX = 1.0"})
    host.run(str(two), "agent", "install")
    assert running_agents(host) == ["0.1.0-2-quick"]
