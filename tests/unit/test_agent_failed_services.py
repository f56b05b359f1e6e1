"""A service that does not start fails the calls that ask for it, and no others. On a simulated host."""

from __future__ import annotations

import json
from dataclasses import dataclass

import msgspec
import pytest

from fakehost import PAYLOADS, Agent, simulated
from netloom.agent.processes.failures import GUEST, ServiceFailure
from netloom.commands import table
from netloom.state.served import Served

RESOLVER = ServiceFailure(
    name="dns-204",
    message="dns-204: dnsmasq is not installed on this host",
    hint="apt-get install dnsmasq-base",
    serves=frozenset({"dns"}),
    network_id="204",
)
ADVERTISER = msgspec.structs.replace(RESOLVER, serves=frozenset({"dns", "advertisements"}))
BALANCER = ServiceFailure(
    name="lb",
    message="lb: haproxy is not installed on this host",
    hint="apt-get install haproxy",
    serves=frozenset({"balancing"}),
)
GUESTS = ServiceFailure(name="guest-204", message="the guest process does not start", serves=GUEST, network_id="204")


@dataclass
class Command:
    """A call, what it asks for, and what it ends. The other calls ask for nothing."""

    fixture: str
    command: str
    serve: str = ""
    end: str = ""


COMMANDS = [
    Command("020", "implement-network"),
    Command("126", "shutdown-network", end="dhcp advertisements metadata dns balancing"),
    Command("131", "destroy-network", end="dhcp advertisements metadata dns balancing"),
    Command("202", "implement-vpc"),
    Command("235", "shutdown-vpc"),
    Command("235", "destroy-vpc"),
    Command("234", "update-vpc-source-nat-ip"),
    Command("021", "assign-ip"),
    Command("060", "release-ip"),
    Command("058", "add-static-nat"),
    Command("059", "delete-static-nat"),
    Command("053", "add-port-forward"),
    Command("056", "delete-port-forward"),
    Command("070", "apply-fw-rules"),
    Command("212", "apply-network-acl"),
    Command("030", "prepare-nic"),
    Command("100", "release-nic"),
    Command("032", "add-dhcp-entry", serve="dhcp advertisements"),
    Command("101", "remove-dhcp-entry", end="dhcp advertisements dns metadata"),
    Command("031", "config-dhcp-subnet", serve="dhcp advertisements"),
    Command("313", "remove-dhcp-subnet", end="dhcp advertisements"),
    Command("600", "set-dhcp-options", serve="dhcp advertisements"),
    Command("034", "add-dns-entry", serve="dns"),
    Command("102", "remove-dns-entry", end="dns"),
    Command("033", "config-dns-subnet", serve="dns"),
    Command("312", "remove-dns-subnet", end="dns"),
    Command("035", "save-vm-data", serve="metadata"),
    Command("090", "save-password", serve="metadata"),
    Command("091", "save-userdata", serve="metadata"),
    Command("092", "save-sshkey", serve="metadata"),
    Command("093", "save-hypervisor-hostname", serve="metadata"),
    Command("080", "apply-lb-rules", serve="balancing"),
    Command("083", "apply-lb-rules", end="balancing"),
    Command("110", "restore-network", serve="dhcp advertisements dns metadata"),
    Command("111", "restore-network", serve="dhcp advertisements dns"),
    Command("500", "custom-action"),
]


def test_the_matrix_has_every_command() -> None:
    assert {it.command for it in COMMANDS} == table.TABLE.keys() - {"ensure-network-device"}


@pytest.mark.parametrize("row", COMMANDS, ids=str)
def test_what_a_command_asks_of_the_services(row: Command) -> None:
    (file,) = PAYLOADS.glob(f"{row.fixture}-*.json")
    payload = json.loads(file.read_bytes())
    if row.command != "custom-action":
        payload = payload["payload"]
    payload.pop("network-extension-details", None)
    payload.pop("physical-network-extension-details", None)
    asked = table.asked_of_services(row.command, table.check_payload(row.command, payload))
    assert (asked.serve, asked.end) == (frozenset(row.serve.split()), frozenset(row.end.split()))


def test_a_udp_rule_needs_no_process() -> None:
    (file,) = PAYLOADS.glob("080-*.json")
    payload = json.loads(file.read_bytes())["payload"]
    payload["lb_rules"][0]["name"] = "syslog [udp]"
    asked = table.asked_of_services("apply-lb-rules", table.check_payload("apply-lb-rules", payload))
    assert asked.serve == asked.end == frozenset()


# -------------------------------------------------------------------------------------------------- the deciding rule


@dataclass
class Case:
    """A call while a service fails, and whether the call fails."""

    failure: ServiceFailure
    fixture: str
    command: str
    fails: bool


@pytest.mark.mutation("a-call-fails-for-what-it-asked")
@pytest.mark.parametrize(
    "case",
    [
        Case(RESOLVER, "033", "config-dns-subnet", True),
        Case(RESOLVER, "034", "add-dns-entry", True),
        Case(RESOLVER, "110", "restore-network", True),
        Case(RESOLVER, "032", "add-dhcp-entry", False),
        Case(ADVERTISER, "032", "add-dhcp-entry", True),
        Case(RESOLVER, "035", "save-vm-data", False),
        Case(RESOLVER, "070", "apply-fw-rules", False),
        Case(RESOLVER, "053", "add-port-forward", False),
        Case(RESOLVER, "058", "add-static-nat", False),
        Case(RESOLVER, "050", "assign-ip", False),
        Case(RESOLVER, "080", "apply-lb-rules", False),
        Case(RESOLVER, "020", "implement-network", False),
        Case(GUESTS, "032", "add-dhcp-entry", True),
        Case(GUESTS, "090", "save-password", True),
        Case(GUESTS, "034", "add-dns-entry", False),
        Case(GUESTS, "070", "apply-fw-rules", False),
        Case(BALANCER, "080", "apply-lb-rules", True),
        Case(BALANCER, "083", "apply-lb-rules", False),  # the revoked rule is balanced by nothing
        Case(msgspec.structs.replace(BALANCER, stale=True), "083", "apply-lb-rules", True),  # it still is
        Case(BALANCER, "033", "config-dns-subnet", False),
        Case(BALANCER, "070", "apply-fw-rules", False),
        Case(msgspec.structs.replace(RESOLVER, network_id="205"), "034", "add-dns-entry", False),  # of another tier
        Case(RESOLVER, "102", "remove-dns-entry", False),
        Case(msgspec.structs.replace(RESOLVER, stale=True), "102", "remove-dns-entry", True),
    ],
    ids=lambda case: f"{case.failure.name}-{case.failure.network_id}-{case.fixture}-{case.command}",
)
@simulated
async def test_a_call_fails_for_what_it_asked_and_for_nothing_else(agent: Agent, case: Case) -> None:
    await agent.live()
    agent.services.failed = [case.failure]
    reply = await agent.call(case.fixture, case.command)
    if case.fails:
        assert (reply.status, reply.error, reply.hint) == (3, case.failure.message, case.failure.hint)
    else:
        assert (reply.status, reply.error, reply.hint) == (0, "", "")
    # Either way the state is saved and the kernel converged, so that nothing is missing when the service starts.
    assert agent.store.files["net-204"].revision == reply.revision
    assert [it for it in agent.did if it.startswith("converge")] == ["converge net-204"]


@simulated
async def test_a_call_waits_for_the_services_that_it_asks_for_only(agent: Agent) -> None:
    await agent.live()
    agent.services.asked.clear()
    await agent.call("070", "apply-fw-rules")
    await agent.call("034", "add-dns-entry")
    await agent.upkeep.repair("net-204", "a kernel event")
    names: frozenset[Served] = frozenset({"dns"})
    assert agent.services.asked == [frozenset(), names, None]


@pytest.mark.mutation("a-failed-service-is-tried-again")
@simulated
async def test_a_failed_service_is_tried_again_without_a_call(agent: Agent) -> None:
    await agent.live()
    agent.services.failed = [RESOLVER]
    assert (await agent.call("070", "apply-fw-rules")).status == 0
    await agent.clock.advance(200)
    tries = agent.did.count("services net-204")
    assert 5 <= tries <= 10  # the delays grow up to a minute, also when calls come that succeed
    agent.services.failed = []
    await agent.clock.advance(61)
    assert agent.did.count("services net-204") == tries + 1
    (slot,) = agent.scopes.slots()
    assert (slot.retry, slot.failures, slot.failed, slot.unconverged) == (None, 0, (), False)
    # One line when it began and one when it ended; the retries in between say nothing.
    assert [it for it in agent.log.lines if not it.startswith("call=")] == [
        f"scope=net-204 failed: {RESOLVER}; only calls that need it fail; it is tried again",
        "scope=net-204 dns-204 works again",
    ]


@simulated
async def test_the_first_reply_after_a_failure_has_a_note_and_later_ones_have_none(agent: Agent) -> None:
    await agent.live()
    agent.services.failed = [RESOLVER]
    notes = [(await agent.call("070", "apply-fw-rules")).note for _ in range(2)]
    assert notes == [str(RESOLVER), ""]
    agent.services.failed = [RESOLVER, BALANCER]
    reply = await agent.call("080", "apply-lb-rules")
    assert (reply.status, reply.error, reply.note) == (3, BALANCER.message, "")
    # When it fails again after it has worked, it is told again.
    agent.services.failed = []
    await agent.call("070", "apply-fw-rules")
    agent.services.failed = [RESOLVER]
    assert (await agent.call("070", "apply-fw-rules")).note == str(RESOLVER)


@pytest.mark.mutation("check-says-why-a-service-fails")
@simulated
async def test_check_and_show_name_the_failure_while_it_lasts(agent: Agent) -> None:
    await agent.live()
    agent.services.failed = [RESOLVER]
    await agent.call("070", "apply-fw-rules")
    assert f"failed: {RESOLVER}" in (await agent.call("501", "custom-action", action="check")).output
    assert "not as they should be" in (await agent.call("501", "custom-action", action="show")).output
    agent.services.failed = []
    await agent.call("070", "apply-fw-rules")
    assert "failed:" not in (await agent.call("501", "custom-action", action="check")).output


@simulated
async def test_a_network_with_a_failed_service_is_shut_down_and_removed(agent: Agent) -> None:
    await agent.live()
    agent.services.failed = [RESOLVER, BALANCER, GUESTS]
    await agent.call("070", "apply-fw-rules")
    assert (await agent.call("126", "shutdown-network")).status == 0
    assert (await agent.call("131", "destroy-network")).status == 0
    await agent.clock.advance(100)
    assert agent.scopes.slots() == []
