"""The agent as a systemd unit: started at boot, restarted when killed, without effect on networks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bed.machines import until
from kernel.agent_host import Client
from ssh.deploy_lab import LIBEXEC, ONE, SETTLE_S, TWO, deploying_files
from ssh.onefile import OneFiles
from ssh.systemd_host import SystemdHost

UNIT = "netloom-agent.service"


@pytest.fixture(scope="module")
def programs() -> Iterator[OneFiles]:
    with deploying_files() as files:
        files.make(ONE, changes={"netloom/agent/heartbeat.py": "EVERY_S, WATCHDOG_S = 0.5, 4"})
        files.make(TWO)
        yield files


@pytest.fixture
def machine(programs: OneFiles) -> Iterator[SystemdHost]:
    host = SystemdHost()
    try:
        for link, peer in (("eth1", "eth1-x"), ("eth1.1204", "sw1204"), ("eth2", "eth2-x")):
            host.run("ip", "link", "add", link, "type", "veth", "peer", "name", peer)
            host.run("ip", "link", "set", link, "up")
            host.run("ip", "link", "set", peer, "up")
        yield host
    finally:
        host.close()


def unit_property(host: SystemdHost, name: str) -> str:
    """The value of a property of the unit."""
    return host.run("systemctl", "show", "--property", name, "--value", UNIT)


def journal(host: SystemdHost) -> str:
    """The lines of the unit in the journal, without time and name."""
    return host.run("journalctl", "--unit", UNIT, "--output", "cat", "--no-pager", check=False)


def guests(host: SystemdHost) -> list[str]:
    lines = host.run("ps", "-A", "-o", "pid=,args=").splitlines()
    return [line.split()[0] for line in lines if "netloom guest --control" in line]


def implement(host: SystemdHost) -> None:
    with Client(str(host.path("/run/netloom/agent.sock"))) as client:
        reply = client.call("020", "implement-network")
        assert reply.status == 0, reply.error


def network_exists(host: SystemdHost) -> bool:
    return "cs-net-204" in host.run("ip", "netns") and "gst-204" in host.run("ip", "-n", "cs-net-204", "link")


def status(host: SystemdHost) -> dict[str, object]:
    (told,) = json.loads(host.run(f"{LIBEXEC}/current/netloom", "agent", "status", "--json"))
    return dict(told)


def test_systemd_starts_and_restarts_the_agent(machine: SystemdHost, programs: OneFiles) -> None:
    host = machine
    host.run(str(programs.make(ONE)), "agent", "install")
    assert host.run("systemctl", "is-enabled", UNIT) == "enabled"
    assert unit_property(host, "KillMode") == "process"
    assert int(unit_property(host, "LimitNOFILE")) >= 65536
    implement(host)
    assert network_exists(host)
    assert until(lambda: host.run("systemctl", "is-active", UNIT, check=False) == "active", seconds=SETTLE_S)
    # The agent's own lines are in the journal of its unit.
    assert until(lambda: " command=implement-network scope=net-204 " in journal(host), seconds=SETTLE_S), journal(host)
    assert f"serving: version={ONE.partition('-')[0]} build={ONE}" in journal(host)
    answering, first = guests(host), unit_property(host, "MainPID")
    # A killed agent is restarted. The guest process keeps running.
    host.run("kill", "-9", first)
    assert until(
        lambda: unit_property(host, "MainPID") not in ("0", first) and status(host)["serves"] == ONE, seconds=SETTLE_S
    )
    assert guests(host) == answering
    assert network_exists(host)
    # An agent that hangs gets SIGABRT and is restarted. The networks keep running. Build ONE asks for 4 s, not for 45.
    assert until(lambda: unit_property(host, "WatchdogUSec") == "4s", seconds=SETTLE_S)
    hung = unit_property(host, "MainPID")
    host.run("kill", "-STOP", hung)
    assert until(
        lambda: unit_property(host, "MainPID") not in ("0", hung) and status(host)["unrestored"] == 0, seconds=SETTLE_S
    )
    assert guests(host) == answering
    assert network_exists(host)
    assert until(lambda: unit_property(host, "StatusText") == "1 networks", seconds=SETTLE_S)
    # After a manual stop the next call starts the unit.
    host.run("systemctl", "stop", UNIT)
    assert guests(host) == answering
    host.run("sh", "-c", f"{LIBEXEC}/current/netloom agent connect </dev/null >/dev/null")
    assert until(lambda: host.run("systemctl", "is-active", UNIT, check=False) == "active", seconds=SETTLE_S)
    assert status(host)["serves"] == ONE
    # Upgrade to a newer build.
    host.run(str(programs.make(TWO)), "agent", "install")
    told = status(host)
    assert (told["serves"], told["previous"], told["unit"]) == (TWO, ONE, UNIT)
    assert str(told["pid"]) == unit_property(host, "MainPID")
    assert network_exists(host)
    # After a power cut the networks are restored without a call.
    host.power_cut()
    host.boot()
    assert until(lambda: network_exists(host), seconds=SETTLE_S)
    assert status(host)["serves"] == TWO
    # Rollback, then uninstall.
    host.run(f"{LIBEXEC}/current/netloom", "agent", "rollback")
    assert status(host)["serves"] == ONE
    host.run(f"{LIBEXEC}/current/netloom", "agent", "uninstall", "--networks", "remove")
    assert host.run("find", "/etc/systemd", "-name", "netloom*") == ""
    assert host.run("systemctl", "is-active", UNIT, check=False) == "inactive"
    assert guests(host) == []
    assert not Path(host.path(LIBEXEC)).exists()
    assert host.run("ip", "netns") == ""


def test_a_failed_selftest_leaves_no_unit_and_no_agent(machine: SystemdHost, programs: OneFiles) -> None:
    host = machine
    fails = {"netloom/agent/setup/selftest.py": "def require():\n    time.sleep(1)\n    raise HostRefused('it fails')"}
    program = str(programs.make("0.1.0-1-ffff", changes=fails))
    assert "it fails" in host.run("sh", "-c", f"{program} agent install 2>&1", check=False)
    assert host.run("find", "/etc/systemd", "-name", "netloom*") == ""
    assert host.run("systemctl", "is-active", UNIT, check=False) == "inactive"
    assert not host.path("/run/netloom/agent.sock").exists()
    assert host.run("ls", "-A", LIBEXEC).split() == [".made-parent", "0.1.0-1-ffff"]
    host.run(str(programs.make(ONE)), "agent", "install")
    assert status(host)["serves"] == ONE


def test_an_agent_started_without_its_unit_is_taken_over(machine: SystemdHost, programs: OneFiles) -> None:
    host = machine
    host.run(str(programs.make(ONE)), "agent", "install")
    detached = "systemctl disable --now -q netloom-agent && rm /etc/systemd/system/netloom-agent.service"
    host.run("sh", "-c", f"{detached} && systemctl daemon-reload")
    host.run("sh", "-c", f"{LIBEXEC}/current/netloom agent connect </dev/null >/dev/null")
    told = status(host)
    assert (told["serves"], told["unit"]) == (ONE, "")
    host.run(str(programs.make(ONE)), "agent", "install")
    told = status(host)
    assert (told["serves"], told["unit"], str(told["pid"])) == (ONE, UNIT, unit_property(host, "MainPID"))
