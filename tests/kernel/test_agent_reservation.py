"""A range of which CloudStack names only a part, on tiers, shared networks and with IPv6: all reach the device.

tests/e2e/test_isolated_life.py has the same for isolated networks, with NAT.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kernel.agent_host import AgentHost, agent_host, done, wait_until

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


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host("eth1.1310", "eth1.1410", "eth1.1520", "eth2.101") as it:
        it.start()
        yield it


def pings(host: AgentHost, vm: str, target: str, *more: str) -> bool:
    return " 0% packet loss" in host.run("ping", *more, "-c1", "-W5", target, namespace=vm, check=False)


@pytest.mark.mutation("a-netmask-is-the-whole-range", instead="str(cidr)")
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("part", ["64/26", "128/25"])
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
