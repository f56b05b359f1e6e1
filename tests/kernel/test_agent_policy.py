"""Policy routing actions through a real agent: kernel objects are created, repaired and deleted."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kernel.agent_host import AgentHost, act, agent_host, message, wait_until
from kernel.isolated_network import NS, kernel, live, routes

BLACKHOLE, TO = "blackhole 192.0.2.0/24", "to 192.0.2.0/24"


@pytest.fixture(scope="module")
def host() -> Iterator[AgentHost]:
    """A host with the network. Tests that use it restore its state."""
    with agent_host() as it:
        it.start()
        live(it)
        yield it


def pbr(host: AgentHost, action: str, **params: Any) -> str:
    """Run a ``pbr-`` action and return its message. ``table_id`` is the parameter ``table-id``."""
    return message(act(host, f"pbr-{action}", **{name.replace("_", "-"): it for name, it in params.items()}))


def add_table_routes_and_rules(host: AgentHost) -> None:
    pbr(host, "create-table", table_id="100", table_name="smoke")
    pbr(host, "add-route", table="smoke", route=BLACKHOLE)
    pbr(host, "add-route", table="smoke", route="default via 203.0.113.254 dev pub-101")
    pbr(host, "add-rule", table="smoke", rule=TO)
    pbr(host, "add-rule", table="smoke", rule="from 10.10.1.4 iif gst-204 priority 12345")


def is_in_kernel(host: AgentHost) -> bool:
    rules = host.ip("rule", namespace=NS)
    found = routes(host, "100").split("\n")
    return (
        "10000:\tfrom all to 192.0.2.0/24 fwmark 0x10000/0x10000 lookup 100" in rules
        and "12345:\tfrom 10.10.1.4 fwmark 0x10000/0x10000 iif gst-204 lookup 100" in rules
        and {it.strip() for it in found}
        >= {"blackhole 192.0.2.0/24 proto static", "default via 203.0.113.254 dev pub-101 proto static onlink"}
    )


def test_smoke_08_policy_routing_actions_in_sequence(host: AgentHost) -> None:
    before = kernel(host)[:-1]
    assert "smoke" in pbr(host, "create-table", table_id="100", table_name="smoke")
    assert pbr(host, "list-tables") == "table 100 smoke"
    assert "192.0.2.0/24" in pbr(host, "add-route", table="smoke", route=BLACKHOLE)
    assert pbr(host, "list-routes") == pbr(host, "list-routes", table="smoke") == f"{BLACKHOLE} table smoke"
    assert pbr(host, "list-routes", table="other") == "no route"
    assert "192.0.2.0/24" in pbr(host, "add-rule", table="smoke", rule=TO)
    assert pbr(host, "list-rules") == pbr(host, "list-rules", table="100") == f"10000: {TO} lookup smoke"
    assert pbr(host, "list-rules", table_id="101") == "no rule"
    assert host.ip("route", "show", "table", "100", namespace=NS).split("\n")[0].strip() == f"{BLACKHOLE} proto static"
    assert "192.0.2.0/24" in pbr(host, "delete-rule", table="smoke", rule=TO)
    assert "192.0.2.0/24" in pbr(host, "delete-route", table="smoke", route=BLACKHOLE)
    assert "smoke" in pbr(host, "delete-table", table_id="100", table_name="smoke")
    assert [pbr(host, f"list-{it}") for it in ("tables", "routes", "rules")] == ["no table", "no route", "no rule"]
    *after, ruleset = kernel(host)
    assert tuple(after) == before
    assert "0x00010000" not in ruleset


def test_repeated_policy_routing_actions_take_no_steps(host: AgentHost) -> None:
    before = kernel(host)
    add_table_routes_and_rules(host)
    assert is_in_kernel(host)
    assert message(act(host, "check")) == "nothing to do: all is as it should be"
    after, log = kernel(host), host.log()
    add_table_routes_and_rules(host)
    assert kernel(host) == after
    calls = [line for line in host.log()[len(log) :].splitlines() if "command=custom-action" in line]
    assert len(calls) == 5
    assert all(" steps=0 " in line for line in calls)
    pbr(host, "delete-table", table="smoke")
    wait_until(lambda: kernel(host) == before)


@pytest.mark.parametrize(
    "taken",
    [
        ["ip", "route", "flush", "table", "100"],
        ["ip", "rule", "del", "priority", "10000"],
        ["ip", "rule", "del", "priority", "12345"],
        ["ip", "link", "set", "pub-101", "down"],
        ["ip", "link", "del", "pub-101"],
    ],
    ids=" ".join,
)
def test_removed_policy_routing_objects_are_restored(host: AgentHost, taken: list[str]) -> None:
    add_table_routes_and_rules(host)
    host.run(*taken, namespace=NS)
    wait_until(lambda: is_in_kernel(host))
    assert message(act(host, "check")) == "nothing to do: all is as it should be"
    pbr(host, "delete-table", table="smoke")


def test_policy_routing_is_restored_when_the_namespace_is_recreated(host: AgentHost) -> None:
    add_table_routes_and_rules(host)
    host.kill()
    host.ip("netns", "del", NS)
    host.start()
    assert is_in_kernel(host)
    assert pbr(host, "list-tables") == "table 100 smoke"
    pbr(host, "delete-table", table="smoke")
    assert not host.ip("route", "show", "table", "100", namespace=NS)
    assert "10000" not in host.ip("rule", namespace=NS)


def test_a_route_whose_link_is_gone_is_inactive_and_blocks_nothing_else(host: AgentHost) -> None:
    add_table_routes_and_rules(host)
    for fixture, command in (("125", "release-ip"), ("124", "delete-static-nat")):
        host.call(fixture, command)
    for address in ("203.0.113.20", "203.0.113.21", "203.0.113.22"):
        assert not host.call("125", "release-ip", public_ip=address).error
    assert "(not in force" in pbr(host, "list-routes", filter="pub-101")
    assert message(act(host, "check")) == "nothing to do: all is as it should be"
    live(host)
    assert is_in_kernel(host)
    pbr(host, "delete-table", table="smoke")


@pytest.mark.mutation("a-table-name-is-a-name")
def test_defect_13_parameters_are_never_executed(host: AgentHost) -> None:
    canary = host.path("/run/canary")
    pbr(host, "create-table", table_id="100", table_name="smoke")
    before, revision = kernel(host), act(host, "show").revision
    texts = (
        "blackhole 192.0.2.0/24; touch /run/canary",
        "default via $(touch /run/canary)",
        "`touch /run/canary`",
        "blackhole 192.0.2.0/24 && touch /run/canary",
        "blackhole 192.0.2.0/24\ntouch /run/canary",
        "-batch /run/canary",
        "| touch /run/canary",
        "default via 203.0.113.1 dev eth0",
        "default via 203.0.113.1 table 20001",
    )
    for text in texts:
        for action, param in (("add-route", "route"), ("delete-route", "route"), ("add-rule", "rule")):
            params: dict[str, Any] = {"table": "smoke", param: text}
            reply = act(host, f"pbr-{action}", **params)
            assert (action, reply.status) in {(action, 1), ("delete-route", 0)}
    for name in (*texts, "a b", "../x", "main", "254", "20001"):
        named: list[dict[str, Any]] = [{"table-name": name, "table-id": "101"}, {"table-id": name}]
        assert [act(host, "pbr-create-table", **it).status for it in named] == [1, 1]
    assert not canary.exists()
    assert not Path("/run/canary").exists()
    assert kernel(host) == before
    assert act(host, "show").revision == revision
    pbr(host, "delete-table", table="smoke")


def test_the_kernel_accepts_every_accepted_route_and_rule(host: AgentHost) -> None:
    """Random routes and rules. Rejected ones change nothing, and deleting the tables removes the accepted ones."""
    chance = random.Random(20261123)
    destinations = (
        "default", "0.0.0.0/8", "0.0.0.0", "10.10.1.0/24", "10.10.1.1", "10.10.1.255", "127.0.0.0/8", "169.254.0.0/16",
        "128.0.0.0/1", "192.0.2.0/31", "203.0.113.0/24", "203.0.113.20",
        "224.0.0.0/4", "240.0.0.0/4", "255.255.255.255",
    )  # fmt: skip
    hops = (
        "", "via 203.0.113.1", "via 10.10.1.45", "via 10.10.1.1 dev gst-204", "via 10.10.1.0", "via 203.0.113.0",
        "via 203.0.113.255", "via 0.0.0.1 dev pub-101", "via 127.0.0.1 dev pub-101", "via 255.255.255.255 dev pub-101",
        "via 240.0.0.1 dev pub-101", "via 169.254.1.1 dev pub-101", "via 192.0.2.1 dev gst-204", "dev pub-101",
        "dev gst-204", "dev lo", "dev pub-101 src 203.0.113.21", "via 203.0.113.1 src 10.10.1.1",
        "dev gst-204 src 0.0.0.0",
    )  # fmt: skip
    before = kernel(host)
    pbr(host, "create-table", table_id="7", table_name="seven")
    pbr(host, "create-table", table_id="19999", table_name="last")
    statuses: list[int] = []
    for _ in range(120):
        kind = chance.choice(("", "", "", "blackhole ", "unreachable ", "prohibit "))
        route = kind + chance.choice(destinations) + ("" if kind else f" {chance.choice(hops)}")
        which = " ".join(f"{chance.choice(('from', 'to'))} {chance.choice(destinations)}" for _ in range(2))
        what, text = chance.choice((("route", route), ("rule", which)))
        table = chance.choice(("seven", "last"))
        verb = chance.choice(("add", "add", "add", "delete"))
        params: dict[str, Any] = {"table": table, what: text}
        reply = act(host, f"pbr-{verb}-{what}", **params)
        assert reply.status in (0, 1), f"{verb} {what} {text!r}: {reply.error}"
        statuses.append(reply.status)
    assert 20 < sum(statuses) < 100
    assert message(act(host, "check")) == "nothing to do: all is as it should be"
    assert host.ip("route", "show", "table", "19999", namespace=NS)
    pbr(host, "delete-table", table="seven")
    pbr(host, "delete-table", table="last")
    wait_until(lambda: kernel(host) == before)
