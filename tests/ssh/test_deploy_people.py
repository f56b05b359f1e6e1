"""Commands of an operator for agents: install on many hosts, status, selftest, rollback and uninstall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bed import Bed
from bed.cloudstack import ALL_SERVICES
from bed.lab import Host, difference
from bed.machines import Done, until
from ssh.deploy_lab import LIBEXEC, ONE, SETTLE_S, TWO, Server, current, host_objects, running_agents, succeeded

PROGRAM = "/root/netloom"


@pytest.fixture
def operator(bed: Bed, one: Path) -> Operator:
    return Operator(bed, one)


class Operator:
    """Runs commands of the one-file program as root on the management server, with an SSH key."""

    def __init__(self, bed: Bed, program: Path) -> None:
        self.bed = bed
        bed.management.run("install", "-D", "-m", "755", str(program), PROGRAM)
        bed.management.write("/root/key", bed.private_key, mode=0o600)
        bed.management.sh("rm -rf /root/.cache")

    def run(self, *words: str, key: bool = True, check: bool = True) -> Done:
        login = ["--sshkey", "/root/key"] if key else []
        return self.bed.management.run(PROGRAM, "agent", *words, *login, check=check, HOME="/root")

    def json(self, *words: str, check: bool = True) -> list[dict[str, object]]:
        told: list[dict[str, object]] = json.loads(self.run(*words, "--json", check=check).out)
        return told


def test_install_on_many_hosts_shows_their_progress(operator: Operator, bed: Bed, host: Host) -> None:
    nobody = "198.18.0.99"
    done = operator.run("install", "--hosts", f"{host.address},{nobody}", check=False)
    assert done.status == 2
    assert done.out.splitlines()[0].split() == ["HOST", "OUTCOME", "BUILD", "ERROR"]
    assert done.out.splitlines()[1].split() == [host.address, "activated", ONE, "-"]
    assert f"{nobody}: no connection to port 22" in done.out.splitlines()[2]
    news = [line for line in done.err.splitlines() if line.startswith(host.address)]
    assert news[0] == f"{host.address}: looking at the host"
    assert next(line for line in news if line.endswith(" %")) == f"{host.address}: 0 %"
    assert news[-1] == f"{host.address}: starting"
    assert running_agents(host) == [ONE]
    again = operator.json("install", "--hosts", host.address)
    assert again == [{"host": host.address, "status": 0, "error": "", "outcome": "current", "build": ONE}]
    # Calls of CloudStack use the installed agent.
    server = Server(bed, Path(PROGRAM))
    assert succeeded(server.ask())
    assert "uploading" not in server.log()


def test_install_works_by_password_and_sudo(operator: Operator, bed: Bed, host: Host) -> None:
    bed.management.write("/root/password", f"# of the hosts\nNETLOOM_PASSWORD={bed.password}\n", mode=0o600)
    words = ["--hosts", host.address, "--username", "netadmin", "--password-file", "/root/password"]
    assert operator.run("install", *words, key=False).status == 0
    assert running_agents(host) == [ONE]
    bed.management.write("/root/password", "wrong\n")
    refused = operator.run("install", *words, key=False, check=False)
    assert refused.status == 2
    assert "login as netadmin by password refused" in refused.out
    assert bed.password not in refused.out + refused.err


def test_a_terminal_shows_progress_bars(operator: Operator, host: Host) -> None:
    typed = f"{PROGRAM} agent install --hosts {host.address} --sshkey /root/key"
    seen = operator.bed.management.run("script", "-qec", typed, "/dev/null", HOME="/root", TERM="linux").out
    assert f"{host.address}  [" in seen
    assert "#" in seen
    assert "\x1b[1A" in seen


def test_commands_of_an_older_program_are_refused_on_a_newer_host_with_a_hint(
    operator: Operator, host: Host, two: Path
) -> None:
    operator.bed.management.run("install", "-m", "755", str(two), "/root/newer")
    host.run(str(two), "agent", "install")
    done = operator.run("install", "--hosts", host.address, check=False)
    assert done.status == 3
    assert f"{TWO} is installed, which is newer than {ONE}: an automatic downgrade is refused" in done.out
    assert "netloom agent rollback" in done.out
    assert running_agents(host) == [TWO]


def test_status_selftest_and_rollback_work_on_hosts(operator: Operator, host: Host, two: Path) -> None:
    missing = operator.run("status", "--hosts", host.address, check=False)
    assert missing.status == 3
    assert f"netloom is not installed there (netloom agent install --hosts {host.address})" in missing.out
    operator.run("install", "--hosts", host.address)
    host.run(str(two), "agent", "install")
    (told,) = operator.json("status", "--hosts", host.address)
    assert (told["current"], told["previous"], told["serves"], told["networks"]) == (TWO, ONE, TWO, 0)
    (tried,) = operator.json("selftest", "--hosts", host.address)
    findings = tried["answer"]
    assert isinstance(findings, list)
    assert {"what": "nf_tables", "ok": True, "needed": True, "says": "", "remedy": ""} in findings
    assert f"{host.address}:\nWHAT " in operator.run("selftest", "--hosts", host.address).out
    (back,) = operator.json("rollback", "--hosts", host.address)
    assert back["build"] == ONE
    (told,) = operator.json("status", "--hosts", host.address)
    assert (told["serves"], told["held"], told["previous"]) == (ONE, TWO, "")
    # An install by the operator overrides the earlier rollback.
    host.run(str(two), "agent", "install")
    assert running_agents(host) == [TWO]


def test_uninstall_restores_the_host(operator: Operator, host: Host, two: Path) -> None:
    host.sh("rm -rf /root/.cache")
    before = host_objects(host)
    operator.run("install", "--hosts", host.address)
    host.run(str(two), "agent", "install")
    assert difference(before, host_objects(host)) != {}
    done = operator.json("uninstall", "--hosts", host.address)
    assert done == [{"host": host.address, "status": 0, "error": "", "outcome": "removed", "stays": []}]
    assert until(lambda: difference(before, host_objects(host)) == {}, seconds=SETTLE_S), difference(
        before, host_objects(host)
    )


def test_install_and_uninstall_work_on_the_host_itself(host: Host, one: Path) -> None:
    host.sh("rm -rf /root/.cache")
    before = host_objects(host)
    host.run(str(one), "agent", "install")
    assert running_agents(host) == [ONE]
    host.run(str(one), "agent", "uninstall")
    assert until(lambda: difference(before, host_objects(host)) == {}, seconds=SETTLE_S), difference(
        before, host_objects(host)
    )


@pytest.mark.parametrize("word", ["install", "status", "selftest", "rollback", "uninstall"])
def test_an_empty_host_list_does_not_mean_this_machine(word: str, host: Host, one: Path) -> None:
    """An empty shell variable must not run the command on this machine, where it may be irreversible."""
    done = host.run(str(one), "agent", word, "--hosts", "", check=False)
    assert (done.status, done.out) == (1, "")
    assert done.err == "netloom: --hosts names no host (for this machine, leave the option out)\n"
    assert (running_agents(host), current(host)) == ([], "")


@pytest.mark.parametrize("word", ["install", "status", "rollback", "uninstall"])
def test_commands_require_root(word: str, host: Host, one: Path) -> None:
    somebody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    done = host.run(*somebody, str(one), "agent", word, check=False, HOME="/tmp")
    assert (done.status, done.out) == (1, "")
    assert done.err == "netloom: on this machine only root can do that (use sudo, or --hosts for other hosts)\n"


def test_uninstall_removes_networks_only_when_told_to(operator: Operator, bed: Bed, host: Host) -> None:
    bed.add_segments([("eth1", "1204")])
    host.sh("rm -rf /root/.cache")
    before = host_objects(host)
    server = Server(bed, Path(PROGRAM))
    net = server.cloud.isolated_network(
        204, vlan=1204, cidr="10.10.1.0/24", offering=ALL_SERVICES, public_vlan=101, source_nat="203.0.113.20"
    )
    net.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:00:00:45")
    host.write("/var/lib/netloom/hooks/custom-action-mine.sh", "#!/bin/sh\n")
    refused = operator.run("uninstall", "--hosts", host.address, check=False)
    assert refused.status == 3
    assert "1 networks live on this host: net-204" in refused.out
    assert "--networks remove" in refused.out
    assert running_agents(host) == [ONE]
    done = operator.json("uninstall", "--hosts", host.address, "--networks", "remove")
    assert done[0]["stays"] == ["/var/lib/netloom/hooks/custom-action-mine.sh"]
    host.sh("rm -r /var/lib/netloom")
    assert until(lambda: difference(before, host_objects(host)) == {}, seconds=SETTLE_S), difference(
        before, host_objects(host)
    )


@pytest.mark.mutation("no-guard-without-its-agent")
def test_uninstall_names_the_bridge_that_a_vm_keeps(operator: Operator, bed: Bed, host: Host) -> None:
    bed.add_segments([("eth1", "1204")])
    host.sh("rm -rf /root/.cache")
    before = host_objects(host)
    server = Server(bed, Path(PROGRAM))
    net = server.cloud.isolated_network(204, vlan=1204, cidr="10.10.1.0/24", offering=ALL_SERVICES, public_vlan=101)
    nic = net.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:00:00:45")
    vm = host.vm("web-1", vlan=1204, mac=nic.mac, ip="10.10.1.45/24", gateway="10.10.1.1")
    assert "table netdev netloom" in host.sh("nft list tables")
    (done,) = operator.json("uninstall", "--hosts", host.address, "--networks", "remove")
    assert (done["status"], done["outcome"], done["stays"]) == (0, "removed in part", [])
    assert f"bridge {vm.bridge}" in str(done["kept"])
    assert f"{vm.tap} is plugged in" in str(done["kept"])
    assert host.sh("nft list tables") == ""
    assert "group_fwd_mask 0 " in host.sh(f"ip -d link show {vm.bridge}")
    assert f"{vm.tap} in {vm.bridge}" in host_objects(host)["links"]
    host.sh(f"ip link set {vm.tap} nomaster")
    following = done["next"]
    assert isinstance(following, list)
    for command in following:
        host.sh(str(command))
    vm.destroy()
    assert until(lambda: difference(before, host_objects(host)) == {}, seconds=SETTLE_S), difference(
        before, host_objects(host)
    )


def test_networks_kept_by_uninstall_work_and_are_adopted_again(operator: Operator, bed: Bed, host: Host) -> None:
    server = Server(bed, Path(PROGRAM))
    bed.add_segments([("eth1", "1204")])
    net = server.cloud.isolated_network(
        204, vlan=1204, cidr="10.10.1.0/24", offering=ALL_SERVICES, public_vlan=101, source_nat="203.0.113.20"
    )
    net.deploy_vm("web-1", ip="10.10.1.45", mac="02:01:00:00:00:45")
    host.run(f"{LIBEXEC}/current/netloom", "agent", "uninstall", "--networks", "leave")
    assert (running_agents(host), current(host)) == ([], "")
    assert "cs-net-204" in host.sh("ip netns")
    assert "dnsmasq" in host.sh("ps -A -o comm=").split()
    assert succeeded(server.ask())
    assert running_agents(host) == [ONE]
    net.delete()
    assert host.sh("ip netns") == ""


def test_installing_a_checkout_is_refused(bed: Bed) -> None:
    from bed.lab import program_from_source

    for words in (["install"], ["install", "--hosts", bed.hosts[0].address]):
        done = bed.management.run(*program_from_source(), "agent", *words, check=False, HOME="/root")
        assert done.status in (1, 3)
        assert done.err == "netloom: a checkout cannot be installed (use the one file that make build makes)\n"
