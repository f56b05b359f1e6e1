"""The standby of a scope: which hosts are chosen, and what ``ensure-network-device`` asks them and prints."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from netloom.claimwire import StandbyClaim
from netloom.errors import HostRefused, HostUnreachable
from netloom.extension import dispatch as dispatching
from netloom.extension.deadline import Deadline
from netloom.extension.hostkeys import KnownHosts, Trust
from netloom.extension.hosts import Hosts
from netloom.extension.placement import HostAnswer, preferred_order
from netloom.extension.pool import Pool, Retries
from netloom.extension.proof import Credentials
from netloom.extension.record import CallRecord
from netloom.extension.request import check
from netloom.extension.ssh import Login
from netloom.extension.standby import REPLACE_AFTER_S, Chosen, TooFewHosts, choose, is_as_chosen, member
from netloom.secret import Secret
from netloom.standbywire import (
    JOIN_GROUP,
    LEAVE_GROUP,
    SET_GROUP,
    GroupAnswer,
    GroupHost,
    GroupSpec,
    JoinGroup,
    LeaveGroup,
    SetGroup,
    packed,
    unpacked,
)
from netloom.wire import Call, Reply, StandbyReply

NET = "net-42"  # its order is h1, h2, h3: the checksum of 42 is divisible by 3
UP, DRAINED, DOWN = HostAnswer(), HostAnswer(drained=True), HostAnswer(failure="h?: no answer")
ORDER = ("h1", "h2", "h3", "h4")


# ------------------------------------------------------------------------------------------------------- the choice


@pytest.mark.mutation("a-drained-host-stands-by-for-none")
@pytest.mark.parametrize(
    ("active", "answers", "chosen"),
    [
        ("h1", (UP, UP, UP, UP), ("h2", "h3")),
        ("h3", (UP, UP, UP, UP), ("h4", "h1")),
        ("h4", (UP, UP, UP, UP), ("h1", "h2")),
        ("h1", (UP, DOWN, UP, UP), ("h3", "h4")),
        ("h1", (UP, DRAINED, UP, UP), ("h3", "h2")),
        ("h1", (UP, DRAINED, DOWN, UP), ("h4", "h2")),
        ("h1", (DRAINED, UP, UP, DOWN), ("h2", "h3")),
    ],
)
def test_the_next_hosts_in_the_circle_are_chosen(
    active: str, answers: tuple[HostAnswer, ...], chosen: tuple[str, str]
) -> None:
    assert choose(ORDER, active, dict(zip(ORDER, answers, strict=True))) == Chosen(*chosen)


@pytest.mark.parametrize(
    ("order", "active", "answers", "error"),
    [
        (ORDER, "h1", (UP, DOWN, DOWN, UP), "2 of 4 hosts answer, and a standby takes three; h?: no answer"),
        (ORDER, "h1", (UP, UP), "2 of 4 hosts answer, and a standby takes three; h3: no answer in time; h4: no answer"),
        (ORDER[:2], "h1", (UP, UP), "2 of 2 hosts answer, and a standby takes three (register three hosts, or stand"),
        (ORDER, "h1", (UP, DRAINED, DRAINED, DOWN), "all hosts but h1 are drained: h2, h3 (netloom undrain h2)"),
        (ORDER, "h9", (UP, UP, UP, UP), "h9 is not registered (add it to the registration detail hosts)"),
    ],
)
def test_too_few_hosts_are_an_error_with_a_remedy(
    order: tuple[str, ...], active: str, answers: tuple[HostAnswer, ...], error: str
) -> None:
    with pytest.raises(TooFewHosts) as raised:
        choose(order, active, dict(zip(order, answers, strict=False)))
    assert error in str(raised.value)
    assert raised.value.hint


@pytest.mark.parametrize(
    ("order", "active", "answers", "chosen"),
    [
        (ORDER[:2], "h2", (UP, UP), Chosen("h1", "")),
        (ORDER[:3], "h1", (UP, DOWN, UP), Chosen("h3", "")),
        (ORDER[:3], "h1", (UP, UP, UP), Chosen("h2", "h3")),
        (ORDER[:3], "h1", (UP, DRAINED, UP), Chosen("h3", "h2")),
    ],
)
def test_two_hosts_are_a_pair_where_no_third_one_answers(
    order: tuple[str, ...], active: str, answers: tuple[HostAnswer, ...], chosen: Chosen
) -> None:
    assert choose(order, active, dict(zip(order, answers, strict=True)), as_pair=True) == chosen


@pytest.mark.parametrize(
    ("order", "answers", "error"),
    [
        (ORDER[:2], (UP, DOWN), "1 of 2 hosts answer, and a standby takes two; h?: no answer (bring them back)"),
        (ORDER[:1], (UP,), "1 of 1 hosts answer, and a standby takes two (register two hosts, or standby=off)"),
        (ORDER[:2], (UP, DRAINED), "all hosts but h1 are drained: h2"),
    ],
)
def test_too_few_hosts_for_a_pair(order: tuple[str, ...], answers: tuple[HostAnswer, ...], error: str) -> None:
    with pytest.raises(TooFewHosts) as raised:
        choose(order, "h1", dict(zip(order, answers, strict=True)), as_pair=True)
    assert error in str(raised.value)


@given(
    answers=st.dictionaries(st.sampled_from(ORDER), st.sampled_from([UP, DRAINED, DOWN])),
    active=st.sampled_from(ORDER),
    keys=st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
)
def test_all_scopes_of_a_host_get_one_group(answers: dict[str, HostAnswer], active: str, keys: tuple[int, int]) -> None:
    found: list[Chosen | None] = []
    for key in keys:
        try:
            found.append(choose(preferred_order(str(key), ORDER), active, answers))
        except TooFewHosts:
            found.append(None)
    assert found[0] == found[1]
    if (chosen := found[0]) is not None:
        assert len({active, chosen.standby, chosen.witness}) == 3
        assert answers[chosen.standby].answered and not answers[chosen.standby].drained
        assert answers[chosen.witness].answered


GROUP = GroupSpec(
    group_id="1a2b3c4d",
    owner="o",
    first=GroupHost(name="h1", address="192.0.2.1"),
    second=GroupHost(name="h2", address="192.0.2.2"),
    witness=GroupHost(name="h3", address="192.0.2.3"),
    secret=Secret("ab" * 32),
)


@pytest.mark.mutation("a-group-has-the-chosen-hosts", instead="True")
def test_a_host_cannot_bring_others_into_its_group() -> None:
    assert is_as_chosen(GROUP, GROUP)
    assert is_as_chosen(replace(GROUP, first=GROUP.second, second=GROUP.first), GROUP)
    assert is_as_chosen(replace(GROUP, group_id="00000001", secret=Secret("00" * 32)), GROUP)
    for other in (
        replace(GROUP, second=GroupHost(name="h3", address="192.0.2.3"), witness=GROUP.second),
        replace(GROUP, second=replace(GROUP.second, address="192.0.2.9")),
        replace(GROUP, witness=GroupHost(name="h3", address="192.0.2.3", port=1)),
        replace(GROUP, witness=None),
        replace(GROUP, first=GROUP.second),
        replace(GROUP, owner="other"),
        replace(GROUP, lease_ms=60_000),
        replace(GROUP, group_id="00000000"),
        replace(GROUP, group_id="1A2B3C4D"),
        replace(GROUP, group_id="1a2b3c4d\n"),
        replace(GROUP, secret=Secret("")),
        replace(GROUP, secret=Secret("ab" * 33)),
    ):
        assert not is_as_chosen(other, GROUP), other


@pytest.mark.mutation("a-group-has-addresses-for-all")
@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "fe80::1%eth0"])
def test_an_address_that_only_this_server_reaches_is_refused(address: str) -> None:
    assert member("h1", "2001:db8::1", 7788) == GroupHost(name="h1", address="2001:db8::1", port=7788)
    with pytest.raises(HostRefused, match="where no other host does"):
        member("h1", address, 7788)


def test_what_failed_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    retries = Retries(60.0)
    assert retries.may_try("a", "b")
    retries.failed("a")
    assert not retries.may_try("a", "b") and retries.may_try("b")
    now += 61
    assert retries.may_try("a", "b")


# --------------------------------------------------------------------------------------------------------- the call

KEY = asyncssh.generate_private_key("ssh-ed25519").export_private_key().decode()
CREDENTIALS = Credentials(Login(trust=Trust((), KnownHosts("/nonexistent")), sshkey=Secret(KEY)))


@dataclass
class Host:
    """An agent, as far as calls see it."""

    name: str
    reply: Reply = field(default_factory=lambda: Reply(call_id=""))
    groups: dict[str, GroupSpec] = field(default_factory=dict)
    down: bool = False
    fails: dict[str, str] = field(default_factory=dict)  # an error by command
    status: int = 3  # of these errors
    standby_is_silent: bool = False  # so no scope leaves its group
    forged: GroupSpec | None = None  # what it answers to set-group


class Bed:
    """A registration with simulated hosts. ``asked``: host and command of each call, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, names: str, details: dict[str, str]) -> None:
        self.hosts = {name: Host(name) for name in names.split(",")}
        self.details = {"hosts": names, "sshkey": KEY, "standby": "auto", "physicalnetworkname": "p", **details}
        self.environ = {"NETLOOM_DIR": str(directory)}
        self.stored: dict[str, Any] = {}
        self.asked: list[str] = []
        self.pool = Pool(resident=True)
        self.record = CallRecord(0.0)
        self.before: Callable[[str, Call], None] = lambda host, call: None
        self.slow: dict[str, float] = {}  # seconds, by command
        self.silent: set[str] = set()  # hosts that neither answer nor refuse, as after a power cut
        bed = self

        class FakeHosts(Hosts):
            def is_open(self, host: str) -> bool:
                return True

            def address(self, host: str) -> str:
                return f"192.0.2.{host[1:]}"

            async def call(self, host: str, call: Call, *, installs: bool = True) -> Reply:
                return await bed.execute(host, call)

        monkeypatch.setattr(dispatching, "Hosts", FakeHosts)
        monkeypatch.setattr(dispatching, "package", lambda: None)

    def serve(self, host: str, epoch: int = 0) -> None:
        self.hosts[host].reply = Reply(call_id="", holds=True, gate="open", epoch=epoch)

    def call(self, command: str = "ensure-network-device", timeout_s: float = 60, **payload: Any) -> str:
        fields = {"network_id": "42", "network_state": "implemented", **payload}
        if command == "ensure-network-device":
            fields["current_details"] = json.dumps(self.stored)
        file = {
            "physical-network-extension-details": self.details,
            "network-extension-details": self.stored,
            **(fields if command == "custom-action" else {"payload": fields}),
        }
        self.asked.clear()
        self.record = CallRecord(time.monotonic())
        request = check(command, json.dumps(file).encode(), "/ext/net/net.sh", self.record.call_id)
        deadline = Deadline(timeout_s, time.monotonic())
        return asyncio.run(dispatching.dispatch(request, deadline, self.environ, self.record, self.pool))

    def ensure(self, **payload: Any) -> dict[str, Any]:
        """What the call prints. CloudStack stores it."""
        text = self.call(**payload)
        assert len(text) < 1024
        self.stored = json.loads(text)
        return self.stored

    async def execute(self, name: str, call: Call) -> Reply:
        host = self.hosts[name]
        self.asked.append(f"{name} {call.command}")
        self.before(name, call)
        if name in self.silent:
            await asyncio.Event().wait()
        await asyncio.sleep(self.slow.get(call.command, 0))
        if host.down:
            raise HostUnreachable(f"{name}: no answer")
        if error := host.fails.get(call.command):
            return Reply(call_id=call.call_id, status=host.status, error=error)
        reply, data = host.reply, b""
        if call.command == SET_GROUP:
            assert call.scope_id == ""
            asked = unpacked(call.payload, SetGroup)
            if asked.exists and asked.group.group_id not in host.groups:
                return Reply(call_id=call.call_id, status=3, error="not known here any more")
            data = self._set_group(host, asked)
        elif call.command == JOIN_GROUP:
            await self._join(host, call, unpacked(call.payload, JoinGroup))
        elif call.command == LEAVE_GROUP:
            leave = unpacked(call.payload, LeaveGroup)
            assert leave.group_id == (reply.standby and reply.standby.group_id)
            if host.standby_is_silent and not leave.is_forgotten:
                return Reply(call_id=call.call_id, status=3, error="its standby does not answer")
            host.reply = replace(reply, standby=None)
        elif reply.moved_to and call.command != "locate":
            return replace(reply, call_id=call.call_id, status=3, error="it stands by")
        return replace(host.reply, call_id=call.call_id, data=data)

    def _set_group(self, host: Host, asked: SetGroup) -> bytes:
        assert asked.host == host.name
        group = asked.group
        if asked.reuses:
            same = [it for it in host.groups.values() if set(it.hosts) == set(group.hosts)]
            group = host.forged or (same or [group])[0]
        host.groups[group.group_id] = group
        return packed(GroupAnswer(group=group))

    async def _join(self, host: Host, call: Call, asked: JoinGroup) -> None:
        group = host.groups[asked.group_id]
        assert asked.epoch > host.reply.epoch
        other = group.second if group.first.name == host.name else group.first
        for name, proof in ((host.name, asked.proof), (other.name, asked.standby_proof)):
            assert self.hosts[name].groups[asked.group_id] == group
            claim = StandbyClaim(call.registration.owner, call.scope_id, asked.epoch, name)
            assert await CREDENTIALS.holds(claim, proof)
        witness = group.names.witness
        assert not witness or self.hosts[witness].groups[asked.group_id] == group
        standby = StandbyReply(group_id=group.group_id, host=other.name, witness=witness, serving=True)
        host.reply = Reply(
            call_id="", holds=True, gate="open", epoch=asked.epoch, proof=asked.proof, proof_from=asked.epoch,
            standby=standby,
        )  # fmt: skip
        self.hosts[other.name].reply = replace(
            host.reply, holds=False, gate="standby", moved_to=host.name, proof=asked.standby_proof,
            standby=replace(standby, serving=False),
        )  # fmt: skip

    def take_over(self, host: str) -> None:
        """The standby becomes active: the next term begins."""
        mine = self.hosts[host].reply
        assert mine.gate == "standby" and mine.standby is not None
        before = self.hosts[mine.moved_to]
        group = replace(mine.standby, term=mine.standby.term + 1, host=before.name, serving=True)
        self.hosts[host].reply = replace(
            mine, holds=True, gate="open", moved_to="", epoch=mine.epoch + 1, standby=group
        )
        before.reply = replace(
            before.reply, holds=False, gate="standby", moved_to=host, epoch=mine.epoch + 1,
            standby=replace(group, serving=False),
        )  # fmt: skip


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Bed]:
    directory = tmp_path / "netloom"
    directory.mkdir(mode=0o700)

    def made(names: str = "h1,h2,h3", **details: str) -> Bed:
        return Bed(monkeypatch, directory, names, details)

    return made


LOCATED = ["h1 locate", "h2 locate", "h3 locate"]
SET_UP = ["h1 set-group", "h2 set-group", "h3 set-group", "h1 join-group"]


@pytest.mark.mutation("a-standby-costs-no-question")
def test_a_network_gets_a_standby_with_the_first_call_after_it_was_built(bed: Callable[..., Bed]) -> None:
    it = bed()
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42"}
    assert it.asked == LOCATED
    it.serve("h1")
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42", "epoch": 1, "standby": "h2"}
    assert it.asked == [*LOCATED, *SET_UP]
    text = it.call()
    assert json.loads(text) == it.stored  # CloudStack writes nothing to its database
    assert it.asked == ["h1 locate"]
    assert it.record.note == ""
    (group,) = it.hosts["h3"].groups.values()
    assert [host.name for host in group.hosts] == ["h1", "h2", "h3"]
    assert [host.address for host in group.hosts] == ["192.0.2.1", "192.0.2.2", "192.0.2.3"]
    assert {host.port for host in group.hosts} == {7788} and len(group.secret.reveal()) == 64


def test_a_second_network_joins_the_group_that_its_host_has(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.ensure()
    for host in it.hosts.values():
        host.reply = Reply(call_id="")
    it.serve("h1", epoch=6)
    it.stored = {"host": "h1"}
    assert it.ensure(network_id="41") == {"host": "h1", "namespace": "cs-net-41", "epoch": 7, "standby": "h2"}
    assert all(len(host.groups) == 1 for host in it.hosts.values())


@pytest.mark.parametrize("anew", ["h2", "h3"])
def test_a_host_that_was_installed_anew_gets_a_new_group(bed: Callable[..., Bed], anew: str) -> None:
    """It does not know what it has promised in the old one."""
    it = bed()
    it.serve("h1")
    it.ensure()
    it.hosts[anew].groups.clear()
    for host in it.hosts.values():
        host.reply = Reply(call_id="")
    it.serve("h1", epoch=6)
    it.stored = {"host": "h1"}
    assert it.ensure(network_id="41")["standby"] == "h2"
    assert it.asked.count("h1 set-group") == 2
    group = it.hosts["h1"].reply.standby
    assert group is not None and list(it.hosts[anew].groups) == [group.group_id]


def test_calls_follow_a_take_over(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.ensure()
    it.take_over("h2")
    assert it.call("assign-ip", public_ip="203.0.113.20", public_vlan="vlan://101", public_cidr="203.0.113.0/24",
                   public_gateway="203.0.113.1", source_nat="true") == ""  # fmt: skip
    assert it.asked == ["h1 assign-ip", "h2 locate", "h2 assign-ip"]
    assert it.ensure() == {"host": "h2", "namespace": "cs-net-42", "epoch": 2, "standby": "h1"}
    assert it.ensure()["host"] == "h2" and it.asked == ["h2 locate"]


def test_a_dead_host_is_replaced_by_its_standby_also_for_a_call_that_comes_too_early(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.ensure()
    it.hosts["h1"].down = True
    asked = []

    def before(host: str, call: Call) -> None:
        asked.append(host)
        if asked.count("h2") == 3:
            it.take_over("h2")

    it.before = before
    assert it.ensure() == {
        "host": "h2",
        "namespace": "cs-net-42",
        "epoch": 2,
        "standby": "h1",
    }
    assert it.asked == [*LOCATED, "h2 locate", "h2 locate"]
    it.hosts["h1"].down = False
    assert it.ensure()["standby"] == "h1"


RULE: dict[str, Any] = {
    "public_ip": "203.0.113.20", "public_vlan": "vlan://101", "public_cidr": "203.0.113.0/24",
    "public_gateway": "203.0.113.1", "source_nat": "true",
}  # fmt: skip


def test_a_silent_host_is_not_waited_for(bed: Callable[..., Bed]) -> None:
    """Its kernel is dead, so TCP gives it up much later. The witness may be silent as well."""
    it = bed()
    it.serve("h1")
    it.ensure()
    it.take_over("h2")
    it.silent = {"h1", "h3"}
    assert it.ensure() == {"host": "h2", "namespace": "cs-net-42", "epoch": 2, "standby": "h1"}
    it.stored = {"host": "h1", "epoch": 1, "standby": "h2"}
    assert it.call("assign-ip", **RULE) == ""
    assert it.asked == ["h1 assign-ip", "h1 locate", "h2 locate", "h3 locate", "h2 assign-ip"]


def test_a_command_waits_for_the_take_over(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.ensure()
    asked = []

    def before(host: str, call: Call) -> None:
        asked.append(host)
        if asked.count("h2") == 3:
            it.take_over("h2")

    it.before = before
    it.silent = {"h1"}
    assert it.call("assign-ip", **RULE) == ""
    assert it.asked == ["h1 assign-ip", *LOCATED, "h2 locate", "h2 locate", "h2 assign-ip"]


@pytest.mark.mutation("a-call-is-sent-again-after-a-take-over", instead="True")
def test_a_command_is_not_sent_to_a_host_of_the_same_placement(bed: Callable[..., Bed]) -> None:
    """The host that got it may execute it still. It is alive, and says that another one has the scope."""
    it = bed()
    it.serve("h1")
    it.ensure()
    it.serve("h2", epoch=1)
    it.hosts["h1"].reply = Reply(call_id="", moved_to="h2", epoch=1)
    it.slow["assign-ip"] = 1.5
    it.hosts["h1"].fails["assign-ip"] = "it failed"
    with pytest.raises(HostRefused, match="it failed"):
        it.call("assign-ip", **RULE)
    assert [each for each in it.asked if "locate" not in each] == ["h1 assign-ip"]


def test_a_slow_command_of_a_host_that_lives_is_sent_once(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.ensure()
    it.slow["assign-ip"] = 2.5
    assert it.call("assign-ip", **RULE) == ""
    assert it.asked == ["h1 assign-ip", "h1 locate", "h1 locate"]


@pytest.mark.mutation("an-action-stays-where-it-was-sent")
def test_an_action_stays_where_it_was_sent(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.ensure()

    def before(host: str, call: Call) -> None:
        if call.command == "custom-action":
            it.take_over("h2")

    it.before = before
    it.slow["custom-action"] = 1.5
    with pytest.raises(HostRefused, match="it stands by"):
        it.call("custom-action", action="show")
    assert it.asked == ["h1 locate", "h1 custom-action"]


def test_a_standby_host_cannot_take_the_network_of_another_registration(bed: Callable[..., Bed]) -> None:
    """The proof names the owner, the network and the host."""
    it = bed()
    it.serve("h1")
    it.ensure()
    it.take_over("h2")
    it.hosts["h1"].down = True
    taken = it.hosts["h2"].reply
    for network, owner, host in (("43", "", "h2"), ("42", "other", "h2"), ("42", "", "h3")):
        for name in ("h2", "h3"):
            it.hosts[name].reply = taken if name == host else Reply(call_id="")
        it.details["owner"] = owner
        it.stored = {"host": "h1", "epoch": 1}
        with pytest.raises(HostUnreachable, match="lives on h1 and was not moved"):
            it.ensure(network_id=network)


# --- what goes wrong


@pytest.mark.mutation("a-move-is-not-disturbed-by-a-standby")
@pytest.mark.parametrize("policy", ["auto", "required"])
def test_a_network_that_is_about_to_move_gets_no_standby_before(bed: Callable[..., Bed], policy: str) -> None:
    it = bed(standby=policy)
    it.serve("h1", epoch=3)
    it.hosts["h1"].reply = replace(it.hosts["h1"].reply, about_to_move=True)
    assert "standby" not in it.ensure()
    assert not it.record.note
    it.serve("h1", epoch=3)
    assert it.ensure()["standby"] == "h2"


def test_a_network_that_leaves_for_a_move_while_its_standby_is_set_up_is_no_failure(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1", epoch=3)

    def move(host: str, call: Call) -> None:
        if call.command == JOIN_GROUP:
            it.hosts[host].fails[JOIN_GROUP] = "net-42 is about to move"
            it.hosts[host].reply = replace(it.hosts[host].reply, about_to_move=True)

    it.before = move
    assert "standby" not in it.ensure()
    assert not it.record.note


@pytest.mark.mutation("a-failed-standby-waits")
def test_a_standby_that_cannot_be_set_up_is_noted_once_in_a_while(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.hosts["h3"].down = True
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42"}
    few = "net-42 has no standby: 2 of 3 hosts answer, and a standby takes three; h3: no answer (bring them back)"
    assert it.record.note == few
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42"}
    assert (it.asked, it.record.note) == (["h1 locate"], "")
    it.stored = {"host": "h1"}
    it.ensure(network_id="41")  # the hosts are the same
    assert it.asked == ["h1 locate"]
    it.pool.standby_retries = Retries(60.0)
    it.hosts["h3"].down = False
    it.stored = {"host": "h1"}
    assert it.ensure()["standby"] == "h2"


@pytest.mark.mutation("a-missing-standby-is-logged")
@pytest.mark.parametrize("where", ["h1 set-group", "h2 set-group", "h3 set-group", "h1 join-group"])
def test_a_failure_on_any_host_fails_no_call(bed: Callable[..., Bed], where: str) -> None:
    it = bed()
    it.serve("h1")
    host, command = where.split()
    it.hosts[host].fails = {command: "no room"}
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42"}
    assert it.record.note == f"net-42 has no standby: {host}: no room"
    it.hosts[host].fails = {}
    it.pool.standby_retries = Retries(60.0)
    assert it.ensure()["standby"] == "h2"


def test_a_required_standby_fails_the_call_and_is_tried_with_each(bed: Callable[..., Bed]) -> None:
    it = bed(standby="required")
    it.serve("h1")
    it.hosts["h3"].down = True
    for _ in range(2):
        with pytest.raises(HostUnreachable) as raised:
            it.ensure()
        assert str(raised.value).startswith("net-42 has no standby, which is required: 2 of 3 hosts answer, and a stan")
        assert raised.value.hint
    it.hosts["h3"].down = False
    it.hosts["h2"].fails = {SET_GROUP: "its agent is older"}
    with pytest.raises(HostUnreachable, match="which is required: h2: its agent is older"):
        it.ensure()
    it.hosts["h2"].fails = {}
    assert it.ensure()["standby"] == "h2"


def test_an_older_agent_is_named(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.hosts["h3"].status = 1
    it.hosts["h3"].fails = {SET_GROUP: "set-group is not a command"}
    it.ensure()
    assert it.record.note == (
        "net-42 has no standby: h3: its agent is older and knows no standby (netloom agent install --hosts h3)"
    )


def test_a_reply_that_was_lost_is_no_failure(bed: Callable[..., Bed]) -> None:
    """Or another call has set the standby up just before."""
    it = bed()
    it.serve("h1")

    def before(host: str, call: Call) -> None:
        if call.command == JOIN_GROUP:
            asyncio.get_running_loop().create_task(it._join(it.hosts[host], call, unpacked(call.payload, JoinGroup)))
            it.hosts[host].fails = {JOIN_GROUP: "broken"}

    it.before = before
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42", "epoch": 1, "standby": "h2"}
    assert it.asked == [*LOCATED, *SET_UP, "h1 locate"]


@pytest.mark.parametrize("command", [SET_GROUP, JOIN_GROUP])
def test_a_slow_host_leaves_time_for_the_call(bed: Callable[..., Bed], command: str) -> None:
    it = bed()
    it.serve("h1")
    it.slow = {command: 60.0}
    assert json.loads(it.call(timeout_s=3)) == {"host": "h1", "namespace": "cs-net-42"}
    assert it.record.note.startswith("net-42 has no standby: not done within ")
    assert "still setting up h2 as a standby for h1" in it.record.note


def test_a_hostile_host_gets_no_other_hosts_into_its_group(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.hosts["h1"].forged = replace(GROUP, owner="net/p", second=replace(GROUP.second, address="192.0.2.66"))
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42"}
    assert it.asked == [*LOCATED, "h1 set-group"]
    assert "h1: its group has other hosts than Group(first='h1', second='h2', witness='h3')" in it.record.note


def test_a_standby_that_is_not_registered_is_not_printed(bed: Callable[..., Bed]) -> None:
    """A host may say any name, of any length."""
    it = bed()
    it.serve("h1")
    it.ensure()
    serving = it.hosts["h1"].reply
    assert serving.standby is not None
    it.hosts["h1"].fails = {LEAVE_GROUP: "no"}
    for name, printed in (("h9", None), ("x" * 5000, None), ("H2", "h2")):
        it.hosts["h1"].reply = replace(serving, standby=replace(serving.standby, host=name))
        assert it.ensure().get("standby") == printed


def test_a_group_with_a_host_that_is_not_registered_any_more_is_replaced(bed: Callable[..., Bed]) -> None:
    for gone, standby, witness in (("h2", "h3", "h4"), ("h3", "h2", "h4")):
        it = bed("h1,h2,h3,h4")
        it.details["hosts"] = "h1,h2,h3"
        it.serve("h1")
        assert it.ensure()["standby"] == "h2"
        it.details["hosts"] = ",".join(host for host in it.hosts if host != gone)
        it.stored = {"host": "h1", "epoch": 1, "standby": "h2"}
        printed = it.ensure()
        assert (printed["host"], printed["epoch"], printed["standby"]) == ("h1", 2, standby)
        assert it.asked[-3:] == ["h1 leave-group", "h1 locate", "h1 join-group"]
        assert gone not in {asked.split()[0] for asked in it.asked}
        found = it.hosts["h1"].reply.standby
        assert found is not None and (found.host, found.witness) == (standby, witness)


def test_a_network_keeps_its_group_until_there_is_another_one(bed: Callable[..., Bed]) -> None:
    it = bed("h1,h2,h3,h4")
    it.details["hosts"] = "h1,h2,h3"
    it.serve("h1")
    it.ensure()
    it.details["hosts"] = "h1,h2,h4"
    it.hosts["h4"].down = True
    assert it.ensure()["standby"] == "h2"
    assert "h1 leave-group" not in it.asked
    assert "net-42 has no standby: 2 of 3 hosts answer" not in it.record.note
    assert it.record.note.startswith("net-42 keeps its standby, with a witness that is not registered: 2 of 3 hosts")


def silence(it: Bed, standby_s: int = 0, witness_s: int = 0) -> None:
    """The active host does not hear its standby, or its witness."""
    reply = it.hosts["h1"].reply
    assert reply.standby is not None
    group = replace(reply.standby, standby_silent_s=standby_s, witness_silent_s=witness_s)
    it.hosts["h1"].reply = replace(reply, standby=group)


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.mutation("a-lost-host-is-not-chosen-again")
def test_a_standby_that_is_lost_is_replaced(bed: Callable[..., Bed], answers: bool) -> None:
    it = bed("h1,h2,h3,h4")
    it.details["hosts"] = "h1,h2,h3,h4"
    it.serve("h1")
    order = preferred_order("42", list(it.hosts))
    first = it.ensure()["standby"]
    group = it.hosts["h1"].reply.standby
    assert group is not None
    silence(it, standby_s=REPLACE_AFTER_S - 1)
    assert it.ensure()["standby"] == first and it.asked == ["h1 locate"]
    it.hosts[first].down = not answers  # this server may reach it, and the other hosts may not
    silence(it, standby_s=REPLACE_AFTER_S)
    printed = it.ensure()
    assert it.asked[-3:] == ["h1 leave-group", "h1 locate", "h1 join-group"]
    now = it.hosts["h1"].reply.standby
    assert now is not None and now.host == printed["standby"]
    assert first not in (now.host, now.witness) and printed["epoch"] == 2
    assert {now.host, now.witness} == {*order} - {"h1", first}
    assert it.ensure() == printed and it.asked == ["h1 locate"]


def test_a_second_network_does_not_get_the_standby_that_was_lost(bed: Callable[..., Bed]) -> None:
    it = bed("h1,h2,h3,h4")
    it.serve("h1")
    first = it.ensure()["standby"]
    silence(it, standby_s=REPLACE_AFTER_S)
    second = it.ensure()["standby"]
    for host in it.hosts.values():
        host.reply = Reply(call_id="")
    it.serve("h1", epoch=6)
    it.stored = {"host": "h1"}
    assert second != first
    assert it.ensure(network_id="41")["standby"] == second


def test_a_witness_that_is_lost_is_replaced_and_the_standby_stays(bed: Callable[..., Bed]) -> None:
    it = bed("h1,h2,h3,h4")
    it.serve("h1")
    standby = it.ensure()["standby"]
    group = it.hosts["h1"].reply.standby
    assert group is not None
    silence(it, witness_s=REPLACE_AFTER_S)
    assert it.ensure()["standby"] == standby
    now = it.hosts["h1"].reply.standby
    assert now is not None and now.witness not in ("h1", standby, group.witness)


@pytest.mark.mutation("a-lost-host-is-replaced-if-possible", instead="bool(silent)")
def test_with_three_hosts_none_is_replaced(bed: Callable[..., Bed]) -> None:
    """Nobody is asked: a question to a dead host takes time."""
    it = bed(standby="required")
    it.serve("h1")
    it.ensure()
    it.hosts["h2"].down = True
    silence(it, standby_s=REPLACE_AFTER_S)
    assert it.ensure()["standby"] == "h2"
    assert it.asked == ["h1 locate"] and it.record.note == ""


def test_a_lost_standby_that_cannot_be_replaced_fails_no_call(bed: Callable[..., Bed]) -> None:
    """Also where a standby is required: the network has one, and it may come back."""
    it = bed("h1,h2,h3,h4", standby="required")
    it.serve("h1")
    standby = it.ensure()["standby"]
    silence(it, standby_s=REPLACE_AFTER_S)
    for host in it.hosts.values():
        host.down = host.name != "h1"
    assert it.ensure()["standby"] == standby
    assert it.record.note.startswith(f"net-42 keeps its standby, though h1 does not hear {standby}: 1 of 4 hosts")
    assert "h1 leave-group" not in it.asked
    it.ensure()
    assert it.asked == ["h1 locate"]


# --- when there is to be none


def test_by_default_a_network_has_a_standby_where_there_are_three_hosts(bed: Callable[..., Bed]) -> None:
    it = bed(standby="")
    it.serve("h1")
    assert it.ensure()["standby"] == "h2"


@pytest.mark.mutation("two-hosts-need-no-note", instead="False")
@pytest.mark.parametrize("names", ["h1", "h1,h2"])
def test_by_default_fewer_hosts_are_neither_asked_nor_noted(bed: Callable[..., Bed], names: str) -> None:
    it = bed(names, standby="")
    it.serve("h1")
    it.ensure()
    assert it.record.note == ""
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42"}
    assert it.asked == ["h1 locate"] and it.record.note == ""


def test_a_group_whose_witness_is_registered_no_more_stays_with_a_note(bed: Callable[..., Bed]) -> None:
    it = bed(standby="")
    it.serve("h1")
    assert it.ensure()["standby"] == "h2"
    it.details["hosts"] = "h1,h2"
    assert it.ensure()["standby"] == "h2"
    assert "keeps its standby, with a witness that is not registered" in it.record.note


def test_without_a_standby_nobody_else_is_asked(bed: Callable[..., Bed]) -> None:
    it = bed(standby="off")
    it.serve("h1")
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42"}
    assert it.asked == LOCATED
    it.ensure()
    assert it.asked == ["h1 locate"]


def test_a_network_that_ends_gets_no_standby(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    assert it.ensure(network_state="shutdown") == {"host": "h1", "namespace": "cs-net-42"}
    assert it.asked == LOCATED


def test_a_standby_ends_when_the_registration_says_so(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.ensure()
    it.details["standby"] = "off"
    it.hosts["h1"].fails = {LEAVE_GROUP: "busy"}
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42", "epoch": 1, "standby": "h2"}
    assert it.record.note == "net-42 still has a standby: h1: busy"
    it.hosts["h1"].fails = {}
    it.pool.standby_retries = Retries(60.0)
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42", "epoch": 1}
    assert it.asked == ["h1 locate", "h1 leave-group", "h1 locate"]
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42", "epoch": 1}
    assert it.asked == ["h1 locate"]


def test_a_drained_host_becomes_the_witness(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.hosts["h2"].reply = Reply(call_id="", drained=True)
    assert it.ensure()["standby"] == "h3"
    (group,) = it.hosts["h1"].groups.values()
    assert group.names.witness == "h2"


def test_the_end_of_a_network_is_told_to_both_hosts(bed: Callable[..., Bed]) -> None:
    it = bed()
    it.serve("h1")
    it.ensure()
    it.details["hosts"] = "h1,h3"  # the standby is not registered any more
    assert it.call("destroy-network", network_state="allocated") == ""
    assert sorted(set(it.asked)) == [
        f"{host} {command}" for host in ("h1", "h2", "h3") for command in ("destroy-network", "locate")
    ]


# --- two hosts without a witness

PAIR = {"standby": "auto", "standby.alone": "gateway"}


def pair(it: Bed) -> list[tuple[str, ...]]:
    """The hosts of each group that the first host knows."""
    return [tuple(host.name for host in group.hosts) for group in it.hosts["h1"].groups.values()]


@pytest.mark.parametrize("policy", ["auto", "required"])
def test_two_hosts_are_a_group_if_the_registration_says_so(bed: Callable[..., Bed], policy: str) -> None:
    it = bed("h1,h2", **PAIR | {"standby": policy})
    it.serve("h1")
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42", "epoch": 1, "standby": "h2"}
    assert it.asked[2:] == ["h1 set-group", "h2 set-group", "h1 join-group"]
    assert pair(it) == [("h1", "h2")]
    it.ensure()
    assert it.asked == ["h1 locate"]
    silence(it, standby_s=REPLACE_AFTER_S)
    it.hosts["h2"].down = True
    assert it.ensure()["standby"] == "h2"
    assert it.asked == ["h1 locate"] and it.record.note == ""


def test_a_pair_gets_a_witness_when_a_third_host_answers(bed: Callable[..., Bed]) -> None:
    it = bed("h1,h2,h3", **PAIR)
    it.hosts["h3"].down = True
    it.serve("h1")
    assert it.ensure()["standby"] == "h2"
    assert pair(it) == [("h1", "h2")]
    assert it.ensure()["standby"] == "h2"
    few = "2 of 3 hosts answer, and a standby takes three; h3: no answer (bring them back)"
    assert it.record.note == f"net-42 keeps its standby, without a witness: {few}"
    it.ensure()
    assert it.asked == ["h1 locate"]  # the next attempt comes a minute later
    it.pool.standby_retries = Retries(60.0)
    it.hosts["h3"].down = False
    assert it.ensure()["standby"] == "h2"
    assert it.asked[-3:] == ["h1 leave-group", "h1 locate", "h1 join-group"]
    assert pair(it) == [("h1", "h2"), ("h1", "h2", "h3")]
    it.ensure()
    assert it.asked == ["h1 locate"]


@pytest.mark.mutation("a-lost-host-is-replaced-if-possible", instead="more")
def test_a_pair_whose_standby_is_silent_stays(bed: Callable[..., Bed]) -> None:
    """It may serve, if it does not hear the active host. Only its word ends the group."""
    it = bed("h1,h2,h3,h4", **PAIR)
    it.details["hosts"] = "h1,h2"
    it.serve("h1")
    it.ensure()
    it.details["hosts"] = "h1,h2,h3,h4"
    silence(it, standby_s=REPLACE_AFTER_S)
    assert it.ensure()["standby"] == "h2"
    assert it.asked == ["h1 locate"] and it.record.note == ""


@pytest.mark.mutation("a-pair-ends-with-its-registration", instead='policy == "off"')
def test_a_pair_ends_when_the_registration_says_stop(bed: Callable[..., Bed]) -> None:
    it = bed("h1,h2", **PAIR)
    it.serve("h1")
    it.ensure()
    it.details["standby.alone"] = "stop"
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42", "epoch": 1}
    assert it.asked == ["h1 locate", "h1 leave-group", "h1 locate"]
    it.ensure()
    assert it.asked == ["h1 locate"] and it.record.note == ""


def test_a_group_whose_witness_is_registered_no_more_becomes_a_pair(bed: Callable[..., Bed]) -> None:
    it = bed("h1,h2,h3", **PAIR)
    it.serve("h1")
    it.ensure()
    it.details["hosts"] = "h1,h2"
    assert it.ensure() == {"host": "h1", "namespace": "cs-net-42", "epoch": 2, "standby": "h2"}
    assert pair(it) == [("h1", "h2", "h3"), ("h1", "h2")]


@pytest.mark.mutation("a-standby-says-what-it-has", instead="True")
def test_a_network_leaves_a_standby_that_was_installed_anew_and_no_other_silent_one(bed: Callable[..., Bed]) -> None:
    """The active host does not hear it. This server asks it, and it does not have the network any more."""
    it = bed("h1,h2", **PAIR)
    it.serve("h1")
    it.ensure()
    it.hosts["h1"].standby_is_silent = True
    it.details["standby"] = "off"
    assert it.ensure()["standby"] == "h2"
    assert it.asked == ["h1 locate", "h1 leave-group", "h2 locate"]
    assert it.record.note == "net-42 still has a standby: h1: its standby does not answer"
    it.pool.standby_retries = Retries(60.0)
    it.hosts["h2"].reply = Reply(call_id="")
    assert "standby" not in it.ensure()
    assert it.asked == ["h1 locate", "h1 leave-group", "h2 locate", "h1 leave-group", "h1 locate"]
