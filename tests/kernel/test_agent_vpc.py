"""VPCs through a real agent: tiers are added and removed in one namespace, and nothing is left at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kernel.agent_host import AgentHost, agent_host, done, wait_until

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
    # The former source-NAT address has no rule, so the host gives it up.
    assert "203.0.113.34/32" in addresses(host)
    assert "203.0.113.30/32" not in addresses(host)
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
@pytest.mark.mutation("state-is-saved-first", instead='__import__("time").sleep(0.05) or self._store.save(scope)')
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


TIER2 = {
    "network_id": "311",
    "vlan": "1311",
    "gateway": "10.20.2.1",
    "cidr": "10.20.2.0/24",
    "extension_ip": "10.20.2.1",
}
DOMAIN = "vpc7.example.internal"


def deploy(host: AgentHost, number: int, name: str, address: str, **more: str) -> None:
    """Deploy a VM with this name: ``add-dhcp-entry`` and ``add-dns-entry``."""
    nic = {"nic_id": str(number), "nic_uuid": f"6b7c2a10-0000-4000-8000-00000000{number}",
           "mac": f"02:01:00:cc:02:{number % 100:02x}", "ip": address, "hostname": name}  # fmt: skip
    for fixture, command in (("221", "add-dhcp-entry"), ("223", "add-dns-entry")):
        done(host.call(fixture, command, **(nic | more)))


def dig(host: AgentHost, vm: str, *words: str) -> list[str]:
    """The answers of the resolver of the tier ``vm``, sorted."""
    asked = ("dig", f"@10.20.{vm[-1]}.1", "+short", "+time=5", "+tries=2", *words)
    return sorted(host.run(*asked, namespace=vm, check=False).split())


@pytest.mark.mutation("tiers-know-each-others-names", instead="[]")
def test_names_resolve_across_the_tiers_of_a_vpc(host: AgentHost) -> None:
    two_tiers(host)
    for tier in ("1", "2"):
        host.plug(f"vm{tier}", f"breth1-131{int(tier) - 1}", f"02:01:00:cc:03:0{tier}", f"10.20.{tier}.99/24")
    deploy(host, 6101, "app-1", "10.20.1.31")
    deploy(host, 6102, "db", "10.20.2.31", ip6_address="fd00:2::31", **TIER2)
    wait_until(lambda: dig(host, "vm1", "db", "A") == ["10.20.2.31"])
    resolvers = set(host.processes("dnsmasq"))
    assert len(resolvers) == 2
    # The lists between the tiers deny everything, which does not concern names.
    for vm in ("vm1", "vm2"):
        for name in ("db", f"db.{DOMAIN}", "DB"):
            wait_until(lambda: dig(host, vm, name, "A") == ["10.20.2.31"])  # noqa: B023
            assert dig(host, vm, name, "AAAA") == ["fd00:2::31"]
        wait_until(lambda: dig(host, vm, "app-1", "A") == ["10.20.1.31"])  # noqa: B023
        assert dig(host, vm, f"app-1.{DOMAIN}", "A") == ["10.20.1.31"]
        assert dig(host, vm, f"app-1.{DOMAIN}", "AAAA") == []
        assert dig(host, vm, "-x", "10.20.2.31") == dig(host, vm, "-x", "fd00:2::31") == [f"db.{DOMAIN}."]
        assert dig(host, vm, "-x", "10.20.1.31") == [f"app-1.{DOMAIN}."]
        assert dig(host, vm, "data-server", "A") == [f"10.20.{vm[-1]}.1"]
    # A VM that gets another name, moves to another address, and is expunged, seen from the other tier.
    deploy(host, 6104, "queue", "10.20.2.41", **TIER2)
    wait_until(lambda: dig(host, "vm1", "QUEUE", "A") == ["10.20.2.41"])
    deploy(host, 6104, "bus", "10.20.2.42", **TIER2)
    wait_until(lambda: dig(host, "vm1", "bus", "A") == ["10.20.2.42"])
    wait_until(lambda: dig(host, "vm1", "queue", "A") == dig(host, "vm1", "-x", "10.20.2.41") == [])
    done(host.call("101", "remove-dhcp-entry", vpc_id="7", nic_id="6104", mac="02:01:00:cc:02:04", **TIER2))
    wait_until(lambda: dig(host, "vm1", "bus", "A") == dig(host, "vm1", "-x", "10.20.2.42") == [])
    # A name that two tiers have means the VM of the own tier.
    deploy(host, 6103, "app-1", "10.20.2.32", ip6_address="fd00:2::32", **TIER2)
    wait_until(lambda: dig(host, "vm2", "app-1", "A") == ["10.20.2.32"])
    wait_until(lambda: dig(host, "vm1", "-x", "10.20.2.32") == [f"app-1.{DOMAIN}."])
    for name in ("app-1", f"app-1.{DOMAIN}"):
        assert dig(host, "vm1", name, "A") == ["10.20.1.31"]
        assert dig(host, "vm1", name, "AAAA") == []
        assert dig(host, "vm2", name, "A") == ["10.20.2.32"]
    done(host.call("232", "shutdown-network", **TIER2))
    wait_until(lambda: dig(host, "vm1", "db", "A") == dig(host, "vm1", "-x", "10.20.2.31") == [])
    assert dig(host, "vm1", "app-1", "A") == ["10.20.1.31"]
    assert len(set(host.processes("dnsmasq")) & resolvers) == 1


def test_a_long_name_has_the_domain_of_its_tier(host: AgentHost) -> None:
    """CloudStack gives all tiers the domain of the VPC; other callers may not."""
    two_tiers(host)
    host.plug("vm1", "breth1-1310", "02:01:00:cc:03:01", "10.20.1.99/24")
    deploy(host, 6101, "app-1", "10.20.1.31")
    deploy(host, 6102, "db", "10.20.2.31", domain="data.example.internal", **TIER2)
    wait_until(lambda: dig(host, "vm1", "db.data.example.internal", "A") == ["10.20.2.31"])
    assert dig(host, "vm1", "db", "A") == ["10.20.2.31"]
    assert dig(host, "vm1", f"db.{DOMAIN}", "A") == []
    assert dig(host, "vm1", "-x", "10.20.2.31") == ["db.data.example.internal."]
