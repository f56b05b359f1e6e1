"""VPCs through a real agent: tiers are added and removed in one namespace, and nothing is left at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kernel.agent_host import AgentHost, agent_host, done

NS = "cs-vpc-7"
TIERS = ("gst-310", "gst-311")


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host("eth1.1310", "eth1.1311", "eth2.101") as it:
        it.start()
        yield it


def addresses(host: AgentHost) -> set[str]:
    words = host.run("ip", "-o", "-4", "addr", namespace=NS).split()
    return {words[at + 1] for at, word in enumerate(words) if word == "inet"} - {"127.0.0.1/8"}


def two_tiers(host: AgentHost) -> None:
    with host.client() as client:
        for fixture, command in (
            ("202", "implement-vpc"),
            ("210", "implement-network"),
            ("211", "assign-ip"),
            ("213", "apply-network-acl"),
            ("230", "implement-network"),
        ):
            done(client.call(fixture, command))


def test_a_vpc_exists_before_its_tiers_and_is_removed_completely(host: AgentHost) -> None:
    before = host.inventory()
    done(host.call("203", "implement-vpc"))
    assert "lo" in host.run("ip", "-o", "link", namespace=NS)
    done(host.call("202", "implement-vpc"))
    assert addresses(host) == {"203.0.113.30/32"}
    two_tiers(host)
    assert {"10.20.1.1/24", "203.0.113.30/32"} < addresses(host)
    done(host.call("202", "implement-vpc"))
    assert set(host.links(NS)) == {"lo", "pub-101", *TIERS}
    done(host.call("234", "update-vpc-source-nat-ip"))
    assert {"203.0.113.30/32", "203.0.113.34/32"} < addresses(host)
    done(host.call("232", "shutdown-network"))
    assert set(host.links(NS)) == {"lo", "pub-101", "gst-311"}
    done(host.call("233", "destroy-network"))
    done(host.call("233", "destroy-network", network_id="311"))
    assert set(host.links(NS)) == {"lo", "pub-101"}
    assert not done(host.call("235", "shutdown-vpc")).holds
    assert host.inventory() == before


@pytest.mark.mutation("a-vpc-ends-with-its-tiers", instead="replace(scope, vpc_implemented=False)")
def test_defect_39_shutdown_vpc_removes_its_remaining_tiers(host: AgentHost) -> None:
    before = host.inventory()
    two_tiers(host)
    with host.client() as client:
        for fixture, command in (
            ("220", "prepare-nic"),
            ("221", "add-dhcp-entry"),
            ("222", "config-dns-subnet"),
            ("225", "assign-ip"),
            ("226", "add-port-forward"),
            ("228", "apply-lb-rules"),
        ):
            done(client.call(fixture, command))
        done(client.call("225", "assign-ip", public_ip="203.0.113.33"))
    assert host.processes("dnsmasq")
    assert host.processes("haproxy")
    for _ in range(2):
        assert not done(host.call("237", "shutdown-vpc")).holds
        assert host.inventory() == before


@pytest.mark.mutation("one-call-of-a-scope-at-a-time", instead="asyncio.Semaphore(99)")
@pytest.mark.mutation("state-is-saved-first", instead="time.sleep(0.05) or self._store.save(outcome.scope)")
def test_defect_68_commands_of_a_vpc_and_its_tiers_are_serialized(host: AgentHost) -> None:
    two_tiers(host)

    def forward(port: int) -> None:
        done(host.call("226", "add-port-forward", public_ip="203.0.113.30", public_port=str(port)))

    def again(_: int) -> None:
        done(host.call("202", "implement-vpc"))
        done(host.call("230", "implement-network"))

    with ThreadPoolExecutor(24) as workers:
        works = [workers.submit(work, port) for port in range(2000, 2012) for work in (forward, again)]
        for it in works:
            it.result()
    kept = json.loads(host.path("/var/lib/netloom/scopes/vpc-7.json").read_text())
    assert len(kept["port_forwards"]) == 12
    assert set(kept["networks"]) == {"310", "311"}
