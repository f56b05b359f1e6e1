"""What is observed for one network does not grow with the number of networks on a shared bridge."""

from __future__ import annotations

import pytest

from kernel.scratch import scratch, tool
from netloom import names
from netloom.agent.host.observe import observe, our_shared_links
from netloom.plan.have import Have
from netloom.render.want import Port, Segment, Want
from netns import inside

BRIDGE = "breth2-101"
SEGMENT = Segment(bridge=BRIDGE, nic="eth2", vlan="101", vlan_link="eth2.101")
OWN = names.public_port("net-1", "101")
WANT = Want(
    namespace="cs-net-1",
    ports=(Port(link="pub-101", host_link=OWN, mac="0a:00:00:00:00:01", segment=SEGMENT),),
)


def observed(host: str, claimed: frozenset[str]) -> Have:
    with inside(host):
        return observe("net-1", WANT, None, claimed=claimed, guarded=frozenset({BRIDGE}))


@pytest.mark.mutation("ports-of-a-shared-bridge-are-not-listed")
def test_the_ports_of_other_networks_are_looked_at_only_when_the_bridge_may_have_to_go() -> None:
    with scratch() as host:
        tool(host, "ip", "link", "add", BRIDGE, "type", "bridge")
        tool(host, "ip", "link", "set", BRIDGE, "alias", "netloom carries eth2.101", "up")
        for number in range(1, 9):
            port = names.public_port(f"net-{number}", "101")
            tool(host, "ip", "link", "add", port, "type", "veth", "peer", "name", f"pub-{number}")
            tool(host, "ip", "link", "set", port, "alias", f"netloom net-{number}", "master", BRIDGE)
        alone, shared = observed(host, frozenset()), observed(host, frozenset({BRIDGE}))
        assert len(alone.host_links[BRIDGE].ports) == 8
        assert shared.host_links.keys() == {OWN, BRIDGE}
        assert shared.host_links[OWN] == alone.host_links[OWN]
        with inside(host):
            assert len(our_shared_links()[BRIDGE].ports) == 8
