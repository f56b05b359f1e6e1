"""After random commands a VPC equals one that is built from its stored state, and deletion leaves nothing.

The commands go through a real agent. IPv6 and its uplink are switched on and off, segments change, and addresses move
between tiers.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from msgspec.structs import replace

from kernel.agent_host import REGISTRATION, AgentHost, agent_host, done, message, wait_until
from model import vpc_calls as vpc
from netloom.wire import Registration

NS = "cs-vpc-7"
WAY_OUT = replace(REGISTRATION, ip6_gateway="2001:db8:99::1", ip6_address="2001:db8:99::/64")
CALLS = 70

Step = tuple[str, dict[str, Any]]


def tier(chance: random.Random) -> dict[str, Any]:
    """The fields of a random tier in a payload, half of the time with IPv6."""
    told = chance.choice(vpc.TIERS)
    prefix = f"2001:db8:50:{told['network_id'][-1]}::"
    six = {"network_ip6_gateway": f"{prefix}1", "network_ip6_cidr": f"{prefix}/64"}
    return told | {"extension_ip": told["gateway"]} | (six if chance.random() < 0.5 else {})


def implement_network(chance: random.Random) -> Step:
    told = tier(chance)
    return "implement-network", told | {"vlan": chance.choice((told["vlan"], told["vlan"], "1499"))}


def nic(told: dict[str, Any], last: str) -> dict[str, Any]:
    mac, ip = f"02:01:00:00:{told['network_id'][:2]}:0{last}", f"{told['gateway'][:-1]}4{last}"
    named = {"nic_uuid": "", "hostname": f"vm{last}", "netmask": "255.255.255.0", "dns": "198.51.100.53"}
    return {**told, "mac": mac, "ip": ip, **named}


def guest_command(chance: random.Random) -> Step:
    commands = ("add-dhcp-entry", "add-dns-entry", "prepare-nic", "remove-dhcp-entry")
    return chance.choice(commands), nic(tier(chance), chance.choice("56"))


def pick(commands: str, payloads: list[dict[str, Any]]) -> Callable[[random.Random], Step]:
    return lambda chance: (chance.choice(commands.split()), chance.choice(payloads))


ENDING = [{**it, "network_state": "shutdown"} for it in vpc.TIERS]
# Relative frequency of each step.
STEPS: dict[Callable[[random.Random], Step], int] = {
    pick("implement-vpc", [vpc.VPC, *vpc.WHOLE]): 3,
    implement_network: 6,
    guest_command: 6,
    pick("update-vpc-source-nat-ip", vpc.WHOLE): 3,
    pick("shutdown-network destroy-network", ENDING): 2,
    pick("assign-ip assign-ip release-ip", vpc.IN_TIER): 6,
    pick("add-static-nat add-static-nat delete-static-nat", vpc.GUESTS): 5,
    pick("add-port-forward add-port-forward delete-port-forward", vpc.FORWARDS): 6,
    pick("apply-lb-rules", vpc.BALANCED): 3,
    pick("apply-network-acl", vpc.ACLS): 3,
}


def send(host: AgentHost, step: Step, registration: Registration = REGISTRATION) -> None:
    command, payload = step
    reply = host.call("210" if "network_id" in payload else "203", command, registration=registration, **payload)
    # Only requests for used ports may fail. CloudStack would not send them.
    assert reply.status == 0 or re.search("overlaps|the port is", reply.error), (step, reply.error)


def kernel_objects(host: AgentHost) -> dict[str, Counter[str]]:
    """The kernel objects of the VPC, regardless of order, without counters, handles and link indexes."""
    looks = {
        "links": ("ip", "-br", "link"),
        "addresses": ("ip", "-br", "addr"),
        "routes": ("ip", "route", "show", "table", "all"),
        "routes of IPv6": ("ip", "-6", "route", "show", "table", "all"),
        "rules": ("ip", "rule"),
        "neighbours": ("ip", "neigh", "show", "nud", "permanent"),
        "settings": ("sh", "-c", "sysctl -a -e -r 'net.ipv[46].(conf|ip_forward)' 2>/dev/null"),
        "ruleset": ("nft", "-s", "list", "ruleset"),
    }
    found = {}
    for what, words in looks.items():
        text = re.sub(r"@if\d+", "", host.run(*words, namespace=NS))
        # Elements that packets add depend on the packets.
        text = re.sub(r"(set \w+ \{[^{}]*flags dynamic[^{}]*)elements = \{[^}]*\}", r"\1", text)
        # Set elements have no order, and addresses of a link are listed in the order of their creation.
        by_words = what in ("ruleset", "addresses")
        found[what] = Counter(re.findall(r"[^\s,{}]+", text) if by_words else text.splitlines())
    # Other IPv6 settings do not matter on a link with IPv6 disabled.
    for link in re.findall(r"net\.ipv6\.conf\.(\S+)\.disable_ipv6 = 1", "\n".join(found["settings"])):
        switch = f"net.ipv6.conf.{link}."
        found["settings"] = Counter(it for it in found["settings"].elements() if not it.startswith(switch))
    return found


@pytest.mark.parametrize("seed", [7, 20261127])
def test_after_random_commands_a_vpc_equals_one_built_from_state(seed: int) -> None:
    chance = random.Random(seed)
    with agent_host("eth1.1310", "eth1.1311", "eth1.1499", "eth2.101", "eth2.102") as host:
        host.start()
        before = host.inventory()
        begun: list[Step] = [("implement-vpc", vpc.VPC), implement_network(chance), implement_network(chance)]
        walk = [make(chance) for make in chance.choices([*STEPS], [*STEPS.values()], k=CALLS)]
        told = tier(chance)
        went: list[Step] = [("prepare-nic", nic(told, "5")), ("remove-dhcp-entry", nic(told, "5"))]
        for step in [*begun, *walk, *went]:
            send(host, step, chance.choice((REGISTRATION, WAY_OUT)))
        said = message(host.call("203", "custom-action", action="check", **{"action-params": {}}))
        assert said == "nothing to do: all is as it should be"
        # The kernel adds routes of an IPv6 address when it has found no duplicate.
        wait_until(lambda: not host.run("ip", "-6", "addr", "show", "tentative", namespace=NS))
        lived = kernel_objects(host)
        host.kill()
        host.ip("netns", "del", NS)
        host.start()
        wait_until(lambda: kernel_objects(host) == lived)
        for told in vpc.TIERS:
            done(host.call("210", "destroy-network", **told))
        done(host.call("203", "shutdown-vpc", **vpc.VPC))
        wait_until(lambda: host.inventory() == before)
