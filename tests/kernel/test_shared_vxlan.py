"""VXLAN segments between two hosts, including a tunnel created by CloudStack's KVM agent."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from kernel.agent_host import AgentHost, wait_until
from netloom.wire import Registration, Reply

VXLAN = Registration(owner="test", guest_nic="eth1", public_nic="eth2", isolation="vxlan", broadcast="vxlan")
VNI = "16777215"
BRIDGE, TUNNEL = f"brvx-{VNI}", f"vxlan{VNI}"
MAC = "02:01:00:cc:00:03"


@pytest.fixture
def host() -> Iterator[AgentHost]:
    """A host whose ``eth1`` (192.0.2.11) is connected to ``eth1`` (192.0.2.12) of the fabric, here a KVM host."""
    with contextlib.closing(AgentHost(("eth2.101",))) as made:
        made.ip("link", "add", "eth1", "type", "veth", "peer", "name", "eth1", "netns", str(made.fabric))
        made.ip("addr", "add", "192.0.2.11/24", "dev", "eth1")
        made.start()
        other = made.fabric
        for words in (
            "addr add 192.0.2.12/24 dev eth1",
            "link set eth1 up",
            # The same commands as CloudStack's KVM agent.
            f"link add {TUNNEL} type vxlan id {VNI} group 239.255.255.255 ttl 10 dev eth1",
            f"addr add 10.10.1.45/24 dev {TUNNEL}",
            f"link set {TUNNEL} address {MAC} up",
        ):
            made.run("ip", *words.split(), pid=other)
        yield made


def implement(host: AgentHost, **changes: str) -> Reply:
    return host.call("020", "implement-network", registration=VXLAN, vlan=VNI, **changes)


def is_reached(host: AgentHost, *options: str) -> bool:
    """Whether the gateway answers the KVM host."""
    ping = ["ping", "-c", "1", "-W", "5", *options, "10.10.1.1"]
    return " 0% packet loss" in host.run(*ping, pid=host.fabric, check=False)


def test_vxlan_carries_frames_between_two_hosts(host: AgentHost) -> None:
    reply = implement(host)
    assert reply.status == 0, reply.error
    assert reply.output == ""  # the management side computes what CloudStack reads
    made = host.links()
    tunnel = made[TUNNEL]["linkinfo"]["info_data"]
    told = {"id": 16777215, "group": "239.255.255.255", "port": 8472, "ttl": 10, "link": "eth1"}
    assert {key: tunnel.get(key) for key in told} == told
    assert (made[TUNNEL]["master"], made["vnetg204"]["master"]) == (BRIDGE, BRIDGE)
    assert "vxlan" not in "".join(name for name, it in made.items() if it.get("ifalias") == "netloom net-204")
    # The encapsulation needs 50 bytes (RFC 7348 section 5).
    assert (made["vnetg204"]["mtu"], host.links("cs-net-204")["gst-204"]["mtu"]) == (1450, 1450)
    wait_until(lambda: is_reached(host, "-M", "do", "-s", "1422"))

    assert host.call("030", "prepare-nic", registration=VXLAN, vlan=VNI).status == 0
    assert host.call("032", "add-dhcp-entry", registration=VXLAN, vlan=VNI).status == 0
    script = host.path("/run/udhcpc")
    script.write_text('#!/bin/sh\necho "$1 $ip $mtu"\n')
    script.chmod(0o755)
    client = f"udhcpc -i {TUNNEL} -nqf -t 20 -T 1 -O mtu -s {script}".split()
    assert "bound 10.10.1.45 1450" in host.run("busybox", *client, pid=host.fabric)

    assert host.call("126", "shutdown-network", registration=VXLAN, vlan=VNI).status == 0
    assert not {TUNNEL, BRIDGE, "vnetg204"} & host.links().keys()
    assert host.run("nft", "list", "tables") == ""


def test_a_deleted_tunnel_is_restored(host: AgentHost) -> None:
    assert implement(host).status == 0
    host.ip("link", "del", TUNNEL)
    wait_until(lambda: host.links().get(TUNNEL, {}).get("master") == BRIDGE)
    wait_until(lambda: is_reached(host))


def test_a_tunnel_of_the_kvm_agent_is_used_and_kept(host: AgentHost) -> None:
    host.ip("link", "add", TUNNEL, "mtu", "1400", "type", "vxlan", "id", VNI, "group", "239.255.255.255", "dev", "eth1")
    host.ip("link", "add", BRIDGE, "type", "bridge")
    host.ip("link", "set", TUNNEL, "master", BRIDGE, "up")
    host.ip("link", "set", BRIDGE, "up")
    host.ip("link", "set", "eth1", "up")
    before = host.links()
    assert implement(host).status == 0
    assert host.links()["vnetg204"]["mtu"] == 1400
    wait_until(lambda: is_reached(host))
    assert host.call("126", "shutdown-network", registration=VXLAN, vlan=VNI).status == 0
    assert host.links().keys() == before.keys()


@pytest.mark.mutation("ports-follow-the-mtu-of-their-segment", instead="False")
def test_the_tunnel_and_its_ports_follow_the_nic(host: AgentHost) -> None:
    assert implement(host).status == 0
    for nic, mtu in ((9000, 8950), (1400, 1350)):
        for where in (0, host.fabric):
            host.run("ip", "link", "set", "eth1", "mtu", str(nic), pid=where)
        host.run("ip", "link", "set", TUNNEL, "mtu", str(mtu), pid=host.fabric)
        wait_until(lambda mtu=mtu: host.links()["vnetg204"]["mtu"] == host.links("cs-net-204")["gst-204"]["mtu"] == mtu)
        wait_until(lambda mtu=mtu: host.links()[TUNNEL]["mtu"] == host.links()[BRIDGE]["mtu"] == mtu)
        wait_until(lambda mtu=mtu: is_reached(host, "-M", "do", "-s", str(mtu - 28)))


def test_a_missing_vxlan_address_is_reported_with_its_remedy(host: AgentHost) -> None:
    host.ip("addr", "flush", "dev", "eth1")
    reply = implement(host)
    assert (reply.status, reply.error) == (3, "eth1 has no IPv4 address for VXLAN to send from")
    host.ip("addr", "add", "192.0.2.11/24", "dev", "eth1")
    assert implement(host).status == 0
