"""Moves of networks between two hosts by commands of the operator, with VMs, open connections and CloudStack."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from bed import Bed
from bed.lab import REPOSITORY, Internet, agent_command, program_from_source
from bed.machines import until
from bed.operator import Operator
from e2e.networks import OUTSIDE, Life, MakeLife, answers_arp
from netloom.extension.agent_client import HEARD_S


@pytest.fixture
def operator(bed: Bed) -> Operator:
    return Operator(bed)


def scope(life: Life) -> str:
    return f"net-{life.network.facts.network_id}"


def test_open_connections_go_on_while_a_network_moves(
    brisk_life: Life, internet: Internet, operator: Operator, record_testsuite_property: Callable[[str, object], None]
) -> None:
    """The VM stays where it is. Datagrams every 5 ms measure how long nothing passes."""
    life = brisk_life
    vm, nic = life.vm("web-1")
    network = life.network
    static, forwarded = network.associate(life.public(1)), network.associate(life.public(2))
    network.enable_static_nat(static, nic)
    network.add_firewall_rule(static, "all")
    network.add_port_forward(forwarded, 2222, nic, 22, open_firewall=True)
    source, target = life.host, life.elsewhere
    with vm.serve_tcp(22), vm.serve_udp(53), internet.serve_tcp(80) as web:
        quiet = internet.open(forwarded.ip, 2222)
        outward = vm.open(OUTSIDE, 80)
        transfer = internet.transfer(static.ip, 22, seconds=60)
        steady = internet.steady_udp(static.ip, 53)
        (moved,) = operator.json("move", scope(life), "--to", target.address)
        assert (moved["from"], moved["to"], moved["epoch"]) == (source.address, target.address, 1)
        assert not transfer.done and not steady.done
        assert quiet.ask() == "answered"
        assert outward.ask() == "answered"
        assert web.say("still there") >= 1
        assert outward.hear() == "still there"
        measured, transferred = steady.stop(), transfer.stop()
        assert transferred.intact and transferred.failure == ""
        assert internet.tcp(static.ip, 22).server == "web-1"
        assert vm.tcp(OUTSIDE, 80).ok
    record_testsuite_property("gap_ms", round(measured.gap_s * 1000, 1))
    record_testsuite_property("gap_ms_by_the_command", moved["gap_ms"])
    record_testsuite_property("tcp_stall_ms", round(transferred.stall_s * 1000))
    assert measured.gap_s < 5, "a loose limit: the machine may be busy"
    assert operator.where(scope(life)) == [target.address]
    assert not source.sh("ip netns list").count(f"cs-{scope(life)}")
    # CloudStack's next command follows the network.
    time.sleep(HEARD_S)  # until then the helper answers for a host that has just replied
    network.ensure()
    assert network.host == target.address
    network.add_firewall_rule(static, "tcp", 443)
    network.disable_static_nat(static)
    assert not internet.tcp(static.ip, 22, timeout_s=0.4).ok


def test_a_host_is_emptied_and_takes_networks_again(
    make_life: MakeLife, internet: Internet, operator: Operator, bed: Bed
) -> None:
    lives = [make_life(brisk=True) for _ in range(3)]
    vms = []
    for life in lives:
        vms.append(life.vm(f"vm-{life.number}")[0])
    for life in lives:
        if life.host != bed.hosts[0]:
            operator.run("move", scope(life), "--to", bed.hosts[0].address)
            life.network.ensure()
    full, other = bed.hosts
    plan = operator.json("drain", full.address, "--dry-run")
    assert {scope(life) for life in lives} <= {it["scope"] for it in plan["moves"]}
    with internet.serve_tcp(80):
        connections = [vm.open(OUTSIDE, 80) for vm in vms]
        done = operator.run("drain", full.address)
        assert [it.ask() for it in connections] == ["answered"] * 3
    assert "is drained from now on. Moving" in done.err
    for life in lives:
        assert operator.where(scope(life)) == [other.address]
    assert not any(name.startswith("cs-") for name in full.sh("ip netns list").split())
    new = make_life(brisk=True)
    new.vm("placed-elsewhere")
    assert new.host == other, "nothing new is placed on a drained host"
    assert operator.run("undrain", full.address).out.splitlines()[-1] == f"{full.address} takes scopes again"
    time.sleep(HEARD_S)
    for life in lives:
        life.network.ensure()
        assert life.host == other
        assert answers_arp(internet, life.public(0))
    rebalanced = operator.json("rebalance")
    assert rebalanced and all(it["to"] == full.address and it["status"] == 0 for it in rebalanced)
    for life in [*lives, new]:
        life.network.ensure()


def test_the_operators_machine_fails_between_the_two_gates(
    brisk_life: Life, internet: Internet, operator: Operator
) -> None:
    """The old host opens again by itself, and the next command moves the network."""
    life = brisk_life
    vm, _ = life.vm("web-1")
    source, target = life.host, life.elsewhere
    with internet.serve_tcp(80):
        connection = vm.open(OUTSIDE, 80)
        script = (
            "import os; from netloom.extension.moves.move import Mover; "
            "from netloom.entry import main; "
            "Mover._open = lambda *_: os._exit(9); main()"
        )
        *python, _ = program_from_source()
        arguments = ["move", scope(life), "--to", target.address, "--hosts", f"{source.address},{target.address}"]
        died = operator.bed.management.run(
            *python,
            "-c",
            f"import sys; sys.path.insert(0, '{REPOSITORY}/internal'); {script}",
            *arguments,
            "--sshkey",
            "/root/key",
            check=False,
            HOME="/root",
            NETLOOM_AGENT=agent_command(),
        )
        assert died.status == 9, died.err
        assert until(lambda: connection.ask(timeout_s=1) == "answered", seconds=30)
        assert internet.who_has(life.public(0)) != []
        operator.run("move", scope(life), "--to", target.address)
        assert connection.ask() == "answered"
    assert operator.where(scope(life)) == [target.address]
    life.network.ensure()
