"""A range of which CloudStack names only a part, on tiers, shared networks and with IPv6: all reach the device.

tests/e2e/test_isolated_life.py has the same for isolated networks, with NAT.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kernel.agent_host import AgentHost, agent_host, done, wait_until
from kernel.greeting import greeted, serving, tell_address

MAC = "02:01:00:cc:09:01"
# Kind: the payload files with their commands; the namespace and the guest link; three octets of the subnet; the device.
Case = tuple[list[tuple[str, str]], str, str, str, str]
CASES: dict[str, Case] = {
    "tier": (
        [("202", "implement-vpc"), ("210", "implement-network"), ("221", "add-dhcp-entry"), ("223", "add-dns-entry")],
        "cs-vpc-7", "310", "10.20.1", "10.20.1.1",
    ),
    "shared": (
        [("301", "prepare-nic"), ("303", "add-dhcp-entry"), ("305", "add-dns-entry")],
        "cs-net-410", "410", "10.30.0", "10.30.0.5",
    ),
    "ipv6": (
        [("401", "implement-network"), ("403", "add-dhcp-entry"), ("404", "add-dns-entry")],
        "cs-net-520", "520", "10.50.1", "10.50.1.1",
    ),
}  # fmt: skip
NAT_CASES: dict[str, Case] = {
    "isolated": (
        [("020", "implement-network"), ("021", "assign-ip")], "cs-net-204", "204", "10.10.1", "10.10.1.1",
    ),
    "tier": (
        [("202", "implement-vpc"), ("210", "implement-network"), ("211", "assign-ip"), ("213", "apply-network-acl")],
        "cs-vpc-7", "310", "10.20.1", "10.20.1.1",
    ),
}  # fmt: skip
SOURCE_NAT = {"isolated": "203.0.113.20", "tier": "203.0.113.30"}


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host("eth1.1310", "eth1.1410", "eth1.1520", "eth2.101") as it:
        it.start()
        yield it


def pings(host: AgentHost, vm: str, target: str, *more: str) -> bool:
    return " 0% packet loss" in host.run("ping", *more, "-c1", "-W5", target, namespace=vm, check=False)


@pytest.mark.mutation("a-netmask-is-the-whole-range", instead="str(cidr)")
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        *(("tier", "64/26"), ("shared", "128/25"), ("ipv6", "64/26")),
        *(
            pytest.param(*it, marks=pytest.mark.long)
            for it in (("tier", "128/25"), ("shared", "64/26"), ("ipv6", "128/25"))
        ),
    ],
)
def test_machines_beside_the_named_part_of_a_range_reach_the_device(host: AgentHost, kind: str, part: str) -> None:
    """The device is outside the named part."""
    commands, namespace, network, net, device = CASES[kind]
    address, beside = (f"{net}.70", f"{net}.200") if part == "64/26" else (f"{net}.170", f"{net}.20")
    changes: dict[str, Any] = {"cidr": f"{net}.{part}"}
    link = f"gst-{network}"

    def send() -> None:
        for fixture, command in commands:
            more = {} if command.startswith("implement") else {"ip": address, "mac": MAC}
            done(host.call(fixture, command, **(changes if command != "implement-vpc" else {}), **more))

    send()
    bridge = f"breth1-1{network}"
    host.plug("vm", bridge, MAC, f"{address}/24")
    host.plug("beside", bridge, "02:01:00:cc:09:02", f"{beside}/24")
    for after in ("", "restart of the network", "restart of the agent"):
        if after == "restart of the network":
            send()
        elif after:
            host.kill()
            host.start()
        assert f"{device}/24" in host.run("ip", "-o", "-4", "addr", "show", link, namespace=namespace), after
        for vm in ("vm", "beside"):
            wait_until(lambda: pings(host, vm, device))  # noqa: B023
        question = ("dig", f"@{device}", "+short", "+time=5", "-x", address)
        wait_until(lambda: host.run(*question, namespace="beside", check=False).strip())  # noqa: B023
    if kind == "ipv6":
        host.run("sysctl", "-qw", "net/ipv6/conf/all/disable_ipv6=0", namespace="beside")
        host.run("sysctl", "-qw", "net/ipv6/conf/eth0/disable_ipv6=0", namespace="beside")
        host.ip("-n", "beside", "addr", "add", "2001:db8:50:1::200/64", "dev", "eth0", "nodad")
        wait_until(lambda: pings(host, "beside", "2001:db8:50:1::1", "-6"))


@pytest.mark.parametrize("kind", ["isolated", "tier"])
def test_machines_beside_the_named_part_of_a_range_have_nat(kind: str) -> None:
    """Outward by source NAT, and inward by a forward and static NAT that come before any NIC shows the whole range."""
    commands, _, _, net, device = NAT_CASES[kind]
    outside, forwarded, static = "203.0.113.1", "203.0.113.71", "203.0.113.72"
    beside = f"{net}.200"
    changes: dict[str, Any] = {"cidr": f"{net}.64/26"}
    with agent_host("eth1.1204", "eth1.1310", "eth2.101") as host:
        host.start()
        host.run("ip", "addr", "add", f"{outside}/24", "dev", "sw-eth2.101", pid=host.fabric)
        for fixture, command in commands:
            done(host.call(fixture, command, **(changes if command != "implement-vpc" else {})))
        public = {"public_vlan": "vlan://101", "public_gateway": outside, "public_cidr": "203.0.113.0/24"}
        rule = {**changes, **public, "private_ip": beside}
        ports = {"public_port": "2222", "private_port": "22", "protocol": "tcp"}
        tier = kind == "tier"
        done(host.call("226" if tier else "053", "add-port-forward", **rule, **ports, public_ip=forwarded))
        done(host.call("227" if tier else "058", "add-static-nat", **rule, public_ip=static))
        if not tier:
            opened = {"type": "ingress", "protocol": "tcp", "portStart": 22, "portEnd": 2222, "sourceCidrs": []}
            listed = [{**opened, "id": at, "publicIp": it} for at, it in enumerate((forwarded, static), 1)]
            told = {"default_egress_allow": True, "rules": listed}
            done(host.call("070", "apply-fw-rules", **changes, fw_rules=told))
        bridge = "breth1-1310" if tier else "breth1-1204"
        host.plug("beside", bridge, "02:01:00:cc:09:02", f"{beside}/24")
        host.ip("-n", "beside", "route", "add", "default", "via", device)
        with serving(host, "beside", 22, tell_address), serving(host, "", 80, tell_address):
            for after in ("", "first NIC"):
                if after:
                    nic = {"ip": f"{net}.70", "mac": MAC, "netmask": "255.255.255.0"}
                    done(host.call("220" if tier else "030", "prepare-nic", **changes, **nic))
                wait_until(lambda: greeted(host, forwarded, 2222) == outside)
                assert greeted(host, static, 22) == outside
                assert greeted(host, outside, 80, "beside") == static
            host.ip("-n", "beside", "addr", "add", f"{net}.201/24", "dev", "eth0")
            host.ip("-n", "beside", "route", "replace", "default", "via", device, "src", f"{net}.201")
            assert greeted(host, outside, 80, "beside") == SOURCE_NAT[kind]
