"""CloudStack's usual layout: the registered devices are bridges (traffic labels) with the NICs as ports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kernel.agent_host import NO_CHECKS, AgentHost, act, agent_host, done, wait_until
from kernel.isolated_network import BRIDGE, DEPLOY, FIRST_LIFE, UDHCPC, WEB, WEB_IP, WEB_MAC, lease
from netloom.wire import Registration

LABELS = Registration(owner="test", guest_nic="cloudbr1", public_nic="cloudbr0")
ABOVE = "brcloudbr1-1204"


@pytest.fixture
def host() -> Iterator[AgentHost]:
    """A host with cloudbr1 over eth1 and cloudbr0 over eth2; only the public VLAN has a link."""
    with agent_host("eth2.101") as it:
        it.ip("link", "add", "eth1", "type", "veth", "peer", "name", "eth1-x")
        for label, nic in (("cloudbr1", "eth1"), ("cloudbr0", "eth2")):
            it.ip("link", "add", label, "type", "bridge")
            it.ip("link", "set", nic, "master", label, "up")
            it.ip("link", "set", label, "up")
        script = it.path("/run/udhcpc")
        script.write_text(UDHCPC)
        script.chmod(0o755)
        it.start(*NO_CHECKS)
        yield it


def live_with_labels(host: AgentHost) -> None:
    with host.client() as client:
        for fixture, command in FIRST_LIFE[:3] + DEPLOY:
            done(client.call(fixture, command, registration=LABELS))


def masters(host: AgentHost, *links: str) -> list[str]:
    found = host.links()
    return [found[it].get("master", "") for it in links]


@pytest.mark.mutation("a-bridge-is-followed-to-its-nic", instead="want")
def test_a_vm_in_the_bridge_of_the_kvm_agent_is_served_when_the_device_is_a_label(host: AgentHost) -> None:
    host.add_vlan("eth1.1204")
    # The links that networks above the bridges would have: the kernel of this machine may lack VLANs.
    host.add_vlan("cloudbr1.1204")
    host.add_vlan("cloudbr0.101")
    before = host.inventory()
    live_with_labels(host)
    assert masters(host, "vnetg204", "eth1.1204") == [BRIDGE, BRIDGE]
    assert masters(host, "vnetpn204.101", "eth2.101", "eth1") == ["breth2-101", "breth2-101", "cloudbr1"]
    host.plug(WEB, BRIDGE, WEB_MAC)
    assert lease(host, WEB)["ip"] == WEB_IP
    host.run("ping", "-c", "1", "-W", "20", "10.10.1.1", namespace=WEB)
    # And a VM on another host, behind the wire.
    host.run("ip", "addr", "add", "10.10.1.77/24", "dev", "sw-eth1.1204", pid=host.fabric)
    host.run("ping", "-c", "1", "-W", "20", "10.10.1.77", namespace=WEB)
    assert "as it should be" in act(host, "check").output
    host.ip("link", "del", f"tap-{WEB}")
    host.ip("netns", "del", WEB)
    host.run("ip", "addr", "del", "10.10.1.77/24", "dev", "sw-eth1.1204", pid=host.fabric)
    done(host.call("131", "destroy-network", registration=LABELS))
    wait_until(lambda: {"vnetg204", BRIDGE, "breth2-101"}.isdisjoint(host.links()))
    assert {it: count for it, count in host.inventory().items() if it == "links"} == {"links": before["links"]}


def test_vms_above_the_label_stay_there_until_the_kvm_agent_takes_the_vlan(host: AgentHost) -> None:
    host.add_vlan("cloudbr1.1204")
    host.ip("link", "add", ABOVE, "type", "bridge")
    host.ip("link", "set", ABOVE, "alias", "netloom carries cloudbr1.1204", "up")
    host.ip("link", "set", "cloudbr1.1204", "master", ABOVE)
    host.plug(WEB, ABOVE, WEB_MAC)
    live_with_labels(host)
    assert masters(host, "vnetg204", f"tap-{WEB}") == [ABOVE, ABOVE]
    assert lease(host, WEB)["ip"] == WEB_IP

    host.add_vlan("eth1.1204")  # CloudStack's KVM agent starts a VM
    wait_until(lambda: masters(host, "vnetg204", f"tap-{WEB}", "eth1.1204") == [BRIDGE] * 3)
    wait_until(lambda: ABOVE not in host.links())
    assert lease(host, WEB)["ip"] == WEB_IP
    assert "as it should be" in act(host, "check").output


def test_vms_in_both_bridges_of_an_earlier_version_are_in_one_afterwards(host: AgentHost) -> None:
    for bridge, vlan in ((ABOVE, "cloudbr1.1204"), (BRIDGE, "eth1.1204")):
        host.add_vlan(vlan)
        host.ip("link", "add", bridge, "type", "bridge")
        host.ip("link", "set", bridge, "up")
        host.ip("link", "set", vlan, "master", bridge)
    host.ip("link", "set", ABOVE, "alias", "netloom carries cloudbr1.1204")
    host.plug(WEB, ABOVE, WEB_MAC)
    host.plug("db", BRIDGE, "02:01:00:cc:00:04", "10.10.1.162/24")
    live_with_labels(host)
    assert masters(host, "vnetg204", f"tap-{WEB}", "tap-db") == [BRIDGE] * 3
    assert lease(host, WEB)["ip"] == WEB_IP
    host.run("ping", "-c", "1", "-W", "20", "10.10.1.162", namespace=WEB)
    wait_until(lambda: ABOVE not in host.links())
    wait_until(lambda: f"from-tap-{WEB}" in host.run("nft", "list", "ruleset"))  # the bridge is the KVM agent's


def test_a_label_without_a_nic_or_with_two_is_refused_and_nothing_is_made(host: AgentHost) -> None:
    host.ip("link", "set", "eth1", "nomaster")
    before = host.inventory()
    reply = host.call("020", "implement-network", registration=LABELS)
    assert (reply.status, reply.hint) == (3, "name the NIC itself in guest.network.device")
    assert reply.error == ("bridge cloudbr1 has no NIC (it has no ports), so it is open which NIC carries VLAN 1204")
    assert host.inventory() | {"files": 0} == before | {"files": 0}
    host.ip("link", "set", "eth1", "master", "cloudbr1")
    host.ip("link", "set", "eth1-x", "name", "bond7", "master", "cloudbr1")
    reply = host.call("020", "implement-network", registration=LABELS)
    assert (reply.status, "has 2 NICs (bond7, eth1)" in reply.error) == (3, True)


def test_an_untagged_network_is_in_the_label_itself(host: AgentHost) -> None:
    done(host.call("020", "implement-network", vlan="untagged", registration=LABELS))
    assert masters(host, "vnetg204") == ["cloudbr1"]


def test_networkmanager_and_networkd_are_told_which_links_are_ours(host: AgentHost) -> None:
    files = [host.path("/run/NetworkManager/conf.d/netloom.conf"), host.path("/run/systemd/network/00-netloom.network")]
    for directory in ("/run/NetworkManager", "/run/systemd/netif"):
        host.path(directory).mkdir(parents=True)
    host.add_vlan("eth1.1204")
    done(host.call("020", "implement-network", registration=LABELS))
    host.ip("link", "add", "other", "type", "bridge")
    host.ip("link", "del", "other")  # a tidy follows
    wait_until(lambda: all(it.exists() and BRIDGE in it.read_text() for it in files))
    done(host.call("131", "destroy-network", registration=LABELS))
    host.ip("link", "add", "other", "type", "bridge")
    host.ip("link", "del", "other")
    wait_until(lambda: not any(BRIDGE in it.read_text() for it in files))
    assert all("vnet*" in it.read_text() for it in files)
