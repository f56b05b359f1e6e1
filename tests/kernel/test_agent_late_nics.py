"""A boot at which NICs, VLAN links and the ports of bridges appear after the agent has started, with packets."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from kernel.agent_host import NO_CHECKS, REGISTRATION, AgentHost, agent_host, done, wait_until
from kernel.isolated_network import BRIDGE, DEPLOY, FIRST_LIFE, UDHCPC, WEB, WEB_IP, WEB_MAC, get, lease
from netloom.wire import Registration

LABELS = Registration(owner="test", guest_nic="cloudbr1", public_nic="cloudbr0")
OUTSIDE = "203.0.113.1"
VLANS = ("eth1.1204", "eth1.1377", "eth2.101")
WITHIN_S = 20.0  # a second on an idle machine


def live(host: AgentHost, registration: Registration) -> None:
    """Build network 204 with the VM ``web``, and network 205, which shares the public VLAN."""
    with host.client() as client:
        for fixture, command in FIRST_LIFE[:3] + DEPLOY:
            done(client.call(fixture, command, registration=registration))
        other = {"registration": registration, "network_id": "205", "vlan": "1377"}
        done(client.call("020", "implement-network", **other))
        done(client.call("021", "assign-ip", **other, public_ip="203.0.113.55"))


def power_off(host: AgentHost) -> None:
    """End the agent and everything that a power cut ends. The disk stays."""
    host.kill()
    for pid in host.processes():
        host.run("kill", "-9", str(pid), check=False)
    host.run("sh", "-c", "rm -rf /run/netloom; for it in $(ls /run/netns); do ip netns delete $it; done")
    for name, link in host.links().items():
        if name != "lo" and (link.get("linkinfo", {}).get("info_kind") == "bridge" or name.startswith("eth")):
            host.run("ip", "link", "del", name, check=False)
    wait_until(lambda: set(host.links()) == {"lo", "mgmt0"})


def appear(host: AgentHost, *vlans: str) -> None:
    """Let a NIC appear, and the links of these VLANs. This kernel has no VLANs of its own."""
    nic = vlans[0].partition(".")[0]
    host.ip("link", "add", nic, "type", "veth", "peer", "name", f"{nic}-x")
    for name in vlans:
        host.add_vlan(name)


def wait_for_retries(host: AgentHost) -> None:
    """Return when the timer will not try again for several seconds."""
    wait_until(lambda: all(f"scope=net-{it} retry 3 failed" in host.log() for it in ("204", "205")), 60)


def waited_for(host: AgentHost, words: str) -> None:
    """Assert that the agent tells what the networks wait for."""
    with host.client() as client:
        assert client.hello.unrestored == 2
        assert [bool(re.match(rf"net-20[45] \(.*{words}", it)) for it in client.hello.restoring] == [True, True]


def carries(host: AgentHost) -> None:
    """Assert that the VM of network 204 is served and reaches a host outside, and that network 205 is complete."""
    host.run("ip", "addr", "replace", f"{OUTSIDE}/24", "dev", "sw-eth2.101", pid=host.fabric)
    host.plug(WEB, BRIDGE, WEB_MAC)
    script = host.path("/run/udhcpc")
    script.write_text(UDHCPC)
    script.chmod(0o755)
    assert lease(host, WEB)["ip"] == WEB_IP
    assert get(host, WEB, "/latest/meta-data/local-hostname") != ""
    host.run("ping", "-c", "1", "-W", "20", OUTSIDE, namespace=WEB)
    host.run("arping", "-c", "1", "-w", "20", "-I", "sw-eth2.101", "203.0.113.55", pid=host.fabric)


def restored_by_events(host: AgentHost, since: int) -> None:
    """Assert that both networks were restored, and that a kernel event caused it, not the timer of the retries."""

    def last(scope: str) -> str:
        return next((it for it in reversed(host.log()[since:].splitlines()) if f"scope={scope} " in it), "")

    wait_until(
        lambda: all(re.search(r" watch: \S+: steps=[1-9]", last(f"net-{it}")) for it in ("204", "205")), WITHIN_S
    )
    with host.client() as client:
        assert client.hello.unrestored == 0


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host(*VLANS) as it:
        it.run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "sw-eth2.101", pid=it.fabric)
        it.start(*NO_CHECKS)
        yield it


def test_networks_are_restored_when_their_nics_appear(host: AgentHost) -> None:
    """The NICs appear one after the other. The last one is shared by both networks."""
    live(host, REGISTRATION)
    power_off(host)
    host.start(*NO_CHECKS)
    waited_for(host, "NIC eth[12] does not exist")
    wait_for_retries(host)
    appear(host, "eth1.1204", "eth1.1377")
    wait_until(lambda: host.log().count("watch: eth1") >= 2, WITHIN_S)
    waited_for(host, "NIC eth2 does not exist")
    refused = host.call("050", "assign-ip")
    assert (refused.status, refused.error) == (3, "NIC eth2 does not exist on this host")
    before = len(host.log())
    appear(host, "eth2.101")
    restored_by_events(host, before)
    carries(host)


@pytest.mark.mutation("a-bridge-without-a-nic-is-watched")
def test_networks_are_restored_when_their_bridges_get_their_nics(host: AgentHost) -> None:
    """The registered devices are bridges, CloudStack's traffic labels. They exist before their ports do."""
    for label, nic in (("cloudbr1", "eth1"), ("cloudbr0", "eth2")):
        host.ip("link", "add", label, "type", "bridge")
        host.ip("link", "set", nic, "master", label, "up")
    live(host, LABELS)
    power_off(host)
    host.ip("link", "add", "cloudbr1", "type", "bridge")
    host.start(*NO_CHECKS)
    waited_for(host, "bridge cloudbr1 has no NIC")
    wait_for_retries(host)
    before = len(host.log())
    host.ip("link", "add", "cloudbr0", "type", "bridge")
    appear(host, "eth1.1204", "eth1.1377")
    appear(host, "eth2.101")
    for label, nic in (("cloudbr1", "eth1"), ("cloudbr0", "eth2")):
        host.ip("link", "set", label, "up")
        host.ip("link", "set", nic, "master", label, "up")
    restored_by_events(host, before)
    carries(host)
