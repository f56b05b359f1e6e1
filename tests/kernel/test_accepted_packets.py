"""Values that CloudStack stores, with packets: odd items among good ones, new addresses, a public VXLAN."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from kernel.agent_host import AgentHost, agent_host, done, wait_until
from kernel.greeting import greeted, serving
from kernel.isolated_network import BRIDGE, NS, WEB, WEB_IP, WEB_MAC

OUTSIDE = "203.0.113.1"
STATIC = "203.0.113.22"  # of the VM
NEVER_ASSIGNED = "203.0.113.77"
OPEN: dict[str, Any] = {
    "type": "ingress",
    "protocol": "tcp",
    "publicIp": STATIC,
    "sourceCidrs": ["0.0.0.0/0"],
    "destCidrs": [],
}


@pytest.fixture
def host() -> Iterator[AgentHost]:
    """Network 204 with a VM that has a static NAT address, and a client outside."""
    with agent_host() as it:
        it.start()
        with it.client() as client:
            for fixture, command in (("020", "implement-network"), ("021", "assign-ip")):
                done(client.call(fixture, command))
            done(client.call("058", "add-static-nat", private_ip=WEB_IP, public_ip=STATIC))
        it.plug(WEB, BRIDGE, WEB_MAC, f"{WEB_IP}/24")
        it.ip("-n", WEB, "route", "add", "default", "via", "10.10.1.1")
        it.run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "sw-eth2.101", pid=it.fabric)
        yield it


def firewall(host: AgentHost, *rules: dict[str, Any]) -> None:
    listed = [{"id": at, **rule} for at, rule in enumerate(rules, 1)]
    told = {"default_egress_allow": True, "rules": listed}
    done(host.call("070", "apply-fw-rules", fw_rules=told, network_state="implementing"))


def listener(host: AgentHost, port: int) -> contextlib.AbstractContextManager[None]:
    """A program in the VM that accepts connections and greets."""
    return serving(host, WEB, port, lambda client: client.sendall(b"web"))


def pings(host: AgentHost, patience_s: int = 20) -> bool:
    ping = ["ping", "-c", "1", "-W", str(patience_s), OUTSIDE]
    return "1 received" in host.run(*ping, namespace=WEB, check=False)


@pytest.mark.parametrize("port", [1, 65535])
def test_ports_0_to_65535_open_and_odd_rules_keep_no_other_out(host: AgentHost, port: int) -> None:
    odd = [{**OPEN, "protocol": "t"}, {**OPEN, "publicIp": ""}, {**OPEN, "protocol": "icmp", "icmpType": 300}]
    whole = {**OPEN, "portStart": 0, "portEnd": 65535, "sourceCidrs": ["0.0.0.0/0", "::/0"]}
    with listener(host, port):
        firewall(host, *odd)
        assert greeted(host, STATIC, port, patience_s=1) == "TimeoutError"
        firewall(host, *odd[:2], whole, odd[2])
        assert greeted(host, STATIC, port) == "web"
    assert (
        host.log().count(
            "warning: not in force: apply-fw-rules 204: rule 1: its protocol is not a whole name of a protocol"
        )
        == 1
    )


def test_sources_of_ipv6_only_open_nothing(host: AgentHost) -> None:
    with listener(host, 80):
        firewall(host, {**OPEN, "sourceCidrs": ["::/0"]})
        assert greeted(host, STATIC, 80, patience_s=1) == "TimeoutError"


def test_a_port_of_all_protocols_opens_that_port_only(host: AgentHost) -> None:
    with listener(host, 80), listener(host, 81):
        firewall(host, {**OPEN, "protocol": "all", "portStart": 80})
        assert greeted(host, STATIC, 80) == "web"
        assert greeted(host, STATIC, 81, patience_s=1) == "TimeoutError"


def test_an_egress_rule_that_denies_is_widened(host: AgentHost) -> None:
    assert pings(host)
    deny = {"type": "egress", "protocol": "t", "sourceCidrs": [], "destCidrs": [f"{OUTSIDE}/32"]}
    firewall(host, deny)
    assert not pings(host, 1)
    firewall(host)
    assert pings(host)


@pytest.mark.parametrize("command", ["apply-lb-rules", "apply-fw-rules"])
def test_a_rule_takes_an_address_that_was_never_assigned(host: AgentHost, command: str) -> None:
    ping = ["ping", "-c", "1", "-W", "20", NEVER_ASSIGNED]
    allow = [
        {**OPEN, "publicIp": NEVER_ASSIGNED, "portStart": 80},
        {**OPEN, "publicIp": NEVER_ASSIGNED, "protocol": "icmp"},
    ]
    if command == "apply-fw-rules":
        firewall(host, *allow)
        host.run(*ping, pid=host.fabric)
    else:
        rule = {"id": 1, "name": "web", "publicIp": NEVER_ASSIGNED, "publicPort": 80, "protocol": "tcp"}
        with listener(host, 80):
            done(host.call("080", "apply-lb-rules", lb_rules=[{**rule, "backends": [{"ip": WEB_IP, "port": 80}]}]))
            assert NEVER_ASSIGNED in host.ip("addr", namespace=NS)
            firewall(host, *allow)
            wait_until(lambda: greeted(host, NEVER_ASSIGNED, 80) == "web")
    done(host.call("060", "release-ip", public_ip=NEVER_ASSIGNED))
    assert NEVER_ASSIGNED not in host.ip("addr", namespace=NS)


def test_a_public_vxlan_carries_frames_between_two_hosts() -> None:
    with contextlib.closing(AgentHost(("eth1.1204",))) as host:
        host.ip("link", "add", "eth2", "type", "veth", "peer", "name", "eth2", "netns", str(host.fabric))
        host.ip("addr", "add", "192.0.2.11/24", "dev", "eth2")
        for words in (
            "addr add 192.0.2.12/24 dev eth2",
            "link set eth2 up",
            "link add vxlan1000 type vxlan id 1000 group 239.0.3.232 ttl 10 dev eth2",
            f"addr add {OUTSIDE}/24 dev vxlan1000",
            "link set vxlan1000 up",
        ):
            host.run("ip", *words.split(), pid=host.fabric)
        host.start()
        done(host.call("020", "implement-network"))
        done(host.call("021", "assign-ip", public_vlan="vxlan://1000"))
        done(host.call("058", "add-static-nat", public_vlan="vxlan://1000", private_ip=WEB_IP, public_ip=STATIC))
        firewall(host, OPEN)
        made = host.links()
        assert made["vxlan1000"]["linkinfo"]["info_data"]["id"] == 1000
        assert (made["vxlan1000"]["master"], made["vnetxn204.1000"]["master"]) == ("brvx-1000", "brvx-1000")
        assert "eth2.1000" not in made
        host.plug(WEB, BRIDGE, WEB_MAC, f"{WEB_IP}/24")
        host.ip("-n", WEB, "route", "add", "default", "via", "10.10.1.1")
        with listener(host, 80):
            assert greeted(host, STATIC, 80) == "web"
        assert pings(host)
        refused = host.call("050", "assign-ip", public_vlan="lswitch://7")
        assert (refused.status, "lswitch" in refused.error) == (1, True)
        done(host.call("126", "shutdown-network", vlan="lswitch://7"))
        assert not {"vxlan1000", "brvx-1000", "vnetxn204.1000"} & host.links().keys()
