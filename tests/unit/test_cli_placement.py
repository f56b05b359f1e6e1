"""``netloom move``, ``drain`` and the others, with real agents on simulated hosts: what they do and print."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from fakehost import Agent
from fakehosts import CREDENTIALS, Hosts, virtual_hosts
from netloom import standbywire
from netloom.agent.scopes import store
from netloom.claimwire import EvacuationClaim, PlacementClaim
from netloom.cli.app import run
from netloom.errors import HostRefused
from netloom.extension.moves import agents, evacuate
from netloom.extension.moves.inventory import take_inventory
from netloom.extension.moves.move import Moved
from netloom.placementwire import CLOSED_S, PLACEMENTS, HeldScope, Placements, packed, unpacked
from netloom.secret import Secret
from netloom.standbywire import LEAVE_GROUP, LeaveGroup
from netloom.state import Nic, Placement
from netloom.wire import Call, Reply

HOSTS = ("h1", "h2", "h3")


@dataclass
class Operator:
    """Runs commands of the program. ``out`` and ``err``: what the last one printed."""

    runner: asyncio.Runner
    hosts: Hosts
    capture: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""
    lines: list[str] = field(default_factory=list)
    blind: bool = False  # the hosts do not hear each other, so two may serve a network

    def __call__(self, *words: str, names: str = "h1,h2,h3") -> int:
        """The exit status."""
        self.capture.readouterr()
        try:
            status = run([*words, "--hosts", names])
        except SystemExit as ended:
            status = int(ended.code or 0)
        self.out, self.err = self.capture.readouterr()
        self.lines = [" ".join(line.split()) for line in self.out.splitlines()]
        assert self.blind or self.hosts.wrong == []
        return status

    def json(self, *words: str, names: str = "h1,h2,h3") -> Any:
        self(*words, "--json", names=names)
        return json.loads(self.out)

    def live(self, host: str, *numbers: str) -> None:
        """Networks that the host serves, with an address each."""

        async def live() -> None:
            agent = self.hosts[host]
            for number in numbers:
                vlan = str(1000 + int(number))
                assert (await agent.call("020", "implement-network", network_id=number, vlan=vlan)).status == 0
                address = {"vlan": vlan, "public_ip": f"203.0.113.{number}", "network_id": number}
                assert (await agent.call("021", "assign-ip", **address)).status == 0

        self.runner.run(live())

    def pass_time(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

    def serving(self, *numbers: str) -> list[str]:
        return ["+".join(self.hosts.serving(f"net-{it}")) for it in numbers]


@pytest.fixture
def operator(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Operator]:
    (tmp_path / "netloom").mkdir(mode=0o700)
    monkeypatch.setenv("NETLOOM_DIR", str(tmp_path / "netloom"))
    with virtual_hosts(HOSTS) as (runner, hosts):
        monkeypatch.setattr(asyncio, "run", runner.run)
        monkeypatch.setattr(agents, "agents_over_ssh", lambda names, login: hosts.operator(*names).agents)
        monkeypatch.setattr("netloom.extension.proof.Credentials", lambda login: hosts.operator().signer)

        async def answers(host: str, login: object) -> None:
            if host not in hosts.dead:
                raise HostRefused(f"{host} answers, so it is not dead", hint=f"netloom drain {host}")

        monkeypatch.setattr(evacuate, "refuse_if_it_answers", answers)
        yield Operator(runner, hosts, capsys)


# ------------------------------------------------------------------------------------------------------- move, where


def test_a_network_is_moved_and_the_line_says_how_long_it_took(operator: Operator) -> None:
    operator.live("h1", "20", "21")
    assert operator("move", "net-20", "--to", "h2") == 0
    assert operator.lines == ["net-20 went from h1 to h2, epoch 1: switched over within 4 ms, 0 connections copied."]
    assert operator.err == "" or operator.err.isascii()
    assert operator.serving("20", "21") == ["h2", "h1"]
    assert operator("where") == 0
    assert operator.lines == [
        "SCOPE HOST EPOCH GATE NETWORKS NICS ADDRESSES",
        "net-20 h2 1 open 1 0 1",
        "net-21 h1 0 open 1 0 1",
    ]
    assert operator("where", "net-20") == 0
    assert operator.lines[1:] == ["net-20 h2 1 open 1 0 1", "net-20 h1 1 moved to h2 0 0 0"]
    assert operator("move", "net-20", "--to", "h2") == 0
    assert operator.lines == ["net-20 is on h2, epoch 1."]


@pytest.mark.parametrize(
    ("words", "status", "error"),
    [
        ("move net-9 --to h2", 3, "no host that answers has net-9 (netloom where lists all; does --hosts name every"),
        ("move net-20 --to h9", 1, "h9 is none of the hosts h1, h2, h3 (--hosts names all of them)"),
        ("move 20 --to h2", 1, "'20' is not a scope (net-<id> of a network, or vpc-<id>)"),
        ("drain h9", 1, "h9 is none of the hosts h1, h2, h3"),
        ("undrain h9", 1, "h9 is none of the hosts h1, h2, h3"),
        ("evacuate h1", 3, "h1 answers, so it is not dead (netloom drain h1"),
        ("where nothing", 1, "'nothing' is not a scope"),
        ("export /nonexistent/file", 1, "the states contain passwords and user data of VMs (encrypt them by --arch"),
        ("export /nonexistent/file --without-secrets", 1, "No such file or directory"),
        ("import /nonexistent", 1, "/nonexistent: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_one_line_with_a_remedy(operator: Operator, words: str, status: int, error: str) -> None:
    operator.live("h1", "20")
    assert operator(*words.split()) == status
    assert operator.out == ""
    assert error in operator.err
    assert operator.err.startswith("netloom: ") and operator.err.count("\n") == 1
    assert operator.serving("20") == ["h1"]


@pytest.mark.mutation("a-drained-host-takes-no-scope")
def test_a_drained_host_takes_a_network_only_by_force(operator: Operator) -> None:
    operator.live("h1", "20")
    operator.live("h3", "30")
    assert operator("drain", "h2") == 0
    assert operator.lines == ["h2 is drained: it had nothing."]
    assert operator("move", "net-20", "--to", "h2") == 1
    assert operator.err == "netloom: h2 is drained (netloom undrain h2, or --force)\n"
    assert operator("drain", "h3") == 0
    assert operator.serving("30") == ["h1"]
    assert operator("move", "net-20", "--to", "h2", "--force") == 0
    assert operator.serving("20") == ["h2"]
    assert operator("where") == 0
    assert operator.lines[-2:] == ["h2 is drained.", "h3 is drained."]


def test_silent_hosts_are_named(operator: Operator) -> None:
    operator.live("h1", "20")
    operator.hosts.dead.add("h2")
    assert operator("move", "net-20", "--to", "h2") == 2
    assert operator.err == (
        "netloom: h2: port 22 does not answer within 10 s (is the host up, and does a firewall drop the packets?)\n"
    )
    assert operator("where") == 2
    assert operator.lines[1] == "net-20 h1 0 open 1 0 1"
    assert operator.lines[-1].startswith("h2: port 22 does not answer")
    assert operator("move", "net-20", "--to", "h3") == 0  # a third host is not needed


@pytest.mark.mutation("an-older-agent-is-named")
def test_an_agent_without_these_commands_is_told_to_be_upgraded(operator: Operator) -> None:
    operator.live("h1", "20")
    older = operator.hosts["h2"]

    def answer(host: str, call: Call) -> None:
        if host == "h2":
            older.moves.execute = older.scopes.execute  # type: ignore[method-assign]

    operator.hosts.before_call = answer
    assert operator("move", "net-20", "--to", "h2") == 3
    assert operator.err == "netloom: h2: its agent is older and knows no moves (netloom agent install --hosts h2)\n"
    assert operator.serving("20") == ["h1"]


def test_two_hosts_that_serve_one_network_are_named_with_the_remedy(operator: Operator) -> None:
    """After a move during which the hosts did not hear each other on the VLANs."""
    operator.live("h1", "20")
    operator.hosts.blind |= {"h1", "h2"}
    operator.blind = True
    operator.hosts.slow = {"finish": 3600.0}
    operator("move", "net-20", "--to", "h2")
    operator.pass_time(CLOSED_S + 1)
    assert operator.hosts.wrong != []
    operator.hosts.wrong.clear()
    assert operator.serving("20") == ["h1+h2"]
    operator.hosts.blind.clear()
    operator.hosts.slow = {}
    assert operator("where") == 3
    assert operator.lines[-1] == (
        "h1 serves net-20 too, with the older epoch 0: netloom move net-20 --to h2 removes it"
    )
    assert operator("move", "net-20", "--to", "h2") == 0
    assert operator.serving("20") == ["h2"]
    assert operator("where") == 0


def stopped_halfway(operator: Operator, at: str, *, after_s: float) -> None:
    """A move from h1 to h2 whose operator's machine fails when it sends ``at``."""

    def fail(host: str, call: Call) -> None:
        if call.command == at:
            operator.hosts.kill_operator()

    operator.hosts.before_call = fail

    async def work() -> Moved:
        mover = operator.hosts.operator()
        return await mover.move("net-20", "h2", await take_inventory(mover.agents))

    assert operator.runner.run(operator.hosts.run(work())) is None
    operator.hosts.before_call = lambda host, call: None
    operator.pass_time(after_s)


def test_where_says_what_an_interrupted_move_has_left(operator: Operator) -> None:
    operator.live("h1", "20")
    stopped_halfway(operator, "add-flows", after_s=1)
    assert operator("where") == 3
    assert operator.lines[-1] == (
        "h2 has a copy of net-20 from a move that is under way, or was interrupted: netloom move net-20 --to h2 "
        "repeats it, with --to h1 the copy is removed"
    )
    assert operator("move", "net-20", "--to", "h1") == 0
    assert operator("where") == 0
    stopped_halfway(operator, "close", after_s=0.1)
    assert operator("where") == 3
    assert operator.lines[-2].startswith("h1 has closed net-20 for a move to h2, and opens it again within seconds")
    assert operator("move", "net-20", "--to", "h3") == 0  # it waits until h1 has opened again
    stopped_halfway(operator, "finish", after_s=0.1)
    operator.hosts.dead.add("h3")


# ---------------------------------------------------------------------------------------------------------- standby

GROUP = "1a2b3c4d"


def with_standby(operator: Operator, *, epoch: int = 4) -> list[str]:
    """Let h2 stand by for net-20 on h1, as far as the hosts say. The commands that they get, from then on.

    The group ends with ``leave-group``.
    """
    heard: list[str] = []
    has_group = True
    active, standby = operator.hosts["h1"], operator.hosts["h2"]

    def listed(reply: Reply, scopes: tuple[HeldScope, ...]) -> Reply:
        return replace(reply, data=packed(replace(unpacked(reply.data, Placements), scopes=scopes)))

    def replace_execute(agent: Agent, of_group: Callable[[HeldScope], HeldScope]) -> None:
        execute, others = agent.moves.execute, agent.scopes.execute

        async def moves(call: Call) -> Reply:
            reply = await execute(call)
            if call.command != PLACEMENTS or not has_group:
                return reply
            of_active = unpacked((await active_moves(call)).data, Placements).scopes
            return listed(reply, tuple(of_group(it) for it in of_active if it.scope_id == "net-20"))

        async def scopes(call: Call) -> Reply:
            nonlocal has_group
            if call.command != LEAVE_GROUP:
                return await others(call)
            assert (agent, call.scope_id) == (active, "net-20")
            assert standbywire.unpacked(call.payload, LeaveGroup).group_id == GROUP
            has_group = False
            return Reply(call_id=call.call_id, holds=True)

        agent.moves.execute = moves  # type: ignore[method-assign]
        agent.scopes.execute = scopes  # type: ignore[method-assign]

    active_moves = active.moves.execute
    took_over = "2026-11-30 09:00:00 from h2, which was silent: 1.1 s"
    group: dict[str, Any] = {"group": GROUP, "standby": "h2", "witness": "h3", "term": 4, "epoch": epoch}
    replace_execute(active, lambda it: replace(it, took_over=took_over, behind="it lacks revision 7", **group))
    replace_execute(standby, lambda it: replace(it, gate="standby", peer="h1", **group))

    def note(host: str, call: Call) -> None:
        heard.append(f"{call.command} {host}")

    operator.hosts.before_call = note
    return heard


def test_where_shows_a_network_with_its_standby(operator: Operator) -> None:
    operator.live("h1", "20")
    with_standby(operator)
    assert operator("where") == 0
    assert operator.lines == [
        "SCOPE HOST EPOCH GATE NETWORKS NICS ADDRESSES STANDBY WITNESS TERM BEHIND TOOK_OVER",
        "net-20 h1 4 open 1 0 1 h2 h3 4 it lacks revision 7 2026-11-30 09:00:00 from h2, which was silent: 1.1 s",
        "net-20 h2 4 stands by for h1 1 0 1 h2 h3 4 - -",
    ]
    rows = operator.json("where")["scopes"]
    assert [(it["host"], it["gate"], it["standby"], it["witness"], it["term"]) for it in rows] == [
        ("h1", "open", "h2", "h3", 4),
        ("h2", "stands by for h1", "h2", "h3", 4),
    ]


def test_a_network_leaves_its_group_before_it_moves(operator: Operator) -> None:
    operator.live("h1", "20")
    heard = with_standby(operator)
    assert operator("move", "net-20", "--to", "h1") == 0
    assert not any("leave-group" in it for it in heard)
    assert operator("undrain", "h2") == 0
    assert operator.lines == ["h2 takes scopes again"]
    assert operator("drain", "h2") == 0
    assert operator.lines == ["h2 is drained: it had nothing."]
    heard.clear()
    assert operator("move", "net-20", "--to", "h3") == 0
    assert [it for it in heard if not it.startswith("placements")][:3] == [
        "leave-group h1",
        "read-state h1",
        "receive h3",
    ]
    assert operator.serving("20") == ["h3"]


def test_a_network_that_cannot_leave_its_group_stays(operator: Operator) -> None:
    operator.live("h1", "20")
    with_standby(operator)

    async def refuse(call: Call) -> Reply:
        return Reply(call_id=call.call_id, status=3, error="its disk is full")

    operator.hosts["h1"].scopes.execute = refuse  # type: ignore[method-assign]
    assert operator("move", "net-20", "--to", "h3") == 3
    assert operator.err == "netloom: h1: its disk is full\n"
    assert operator.serving("20") == ["h1"]


# ------------------------------------------------------------------------------------------------- drain, rebalance


def test_a_drain_shows_its_plan_and_empties_the_host(operator: Operator) -> None:
    operator.live("h1", "20", "21", "22")
    operator.live("h3", "30")
    assert operator("drain", "h1", "--dry-run") == 0
    assert operator.lines == [
        "SCOPE FROM TO LOAD",
        "net-20 h1 h2 2",
        "net-21 h1 h2 2",
        "net-22 h1 h3 2",
        "",
        "HOST LOAD THEN",
        "h1 6 0",
        "h2 0 4",
        "h3 2 4",
    ]
    assert operator.serving("20", "21", "22") == ["h1", "h1", "h1"]
    assert not operator.hosts["h1"].store.record.drained
    assert operator("drain", "h1") == 0
    assert operator.err.splitlines()[0] == "h1 is drained from now on. Moving 3 networks: 2 to h2, 1 to h3."
    assert sorted(line.split()[0] for line in operator.err.splitlines()[1:]) == ["net-20:", "net-21:", "net-22:"]
    assert operator.lines[0] == "SCOPE FROM TO EPOCH GAP_MS SECONDS CONNECTIONS"
    assert operator.serving("20", "21", "22") == ["h2", "h2", "h3"]
    assert operator.hosts["h1"].store.files == {} and operator.hosts["h1"].store.record.drained
    assert operator("undrain", "h1") == 0
    assert operator.lines == ["h1 takes scopes again"]
    assert not operator.hosts["h1"].store.record.drained


def test_one_network_that_cannot_be_moved_stops_no_other(operator: Operator) -> None:
    operator.live("h1", "20", "21", "22")
    operator.hosts["h2"].host.fail("net-20", HostRefused("the bridge brx-1 is not ours"))
    operator.hosts["h3"].host.fail("net-20", HostRefused("the bridge brx-1 is not ours"))
    rows = operator.json("drain", "h1")
    by_scope = {it["scope"]: it for it in rows}
    assert (by_scope["net-20"]["status"], by_scope["net-21"]["status"], by_scope["net-22"]["status"]) == (3, 0, 0)
    assert "the bridge brx-1 is not ours" in by_scope["net-20"]["error"]
    assert operator.serving("20")[0] == "h1"
    assert operator("drain", "h1") == 0  # once more: the rest
    assert operator.hosts["h1"].store.files == {}


def test_moves_run_side_by_side_but_a_target_builds_two_at_once(operator: Operator) -> None:
    operator.live("h1", *map(str, range(20, 32)))
    building: dict[str, set[str]] = {}
    most: dict[str, int] = {}

    def watch(host: str, call: Call) -> None:
        if call.command == "receive":
            building.setdefault(host, set()).add(call.scope_id)
        if call.command == "open":
            building[host].discard(call.scope_id)
        for name, scopes in building.items():
            most[name] = max(most.get(name, 0), len(scopes))

    operator.hosts.before_call = watch
    assert operator("drain", "h1") == 0
    assert most == {"h2": 2, "h3": 2}


@pytest.mark.mutation("an-interrupted-move-ends-before-the-gate-closes")
def test_an_interrupted_drain_ends_in_a_safe_state(operator: Operator) -> None:
    operator.live("h1", "20", "21", "22", "23", "24", "25")
    stopped = False

    def interrupt(host: str, call: Call) -> None:
        nonlocal stopped
        if call.command == "read-flows" and not stopped:
            stopped = True
            loop = operator.hosts.loop
            handler = loop._signal_handlers[2]  # type: ignore[attr-defined]
            loop.call_soon(handler._run)

    operator.hosts.before_call = interrupt
    assert operator("drain", "h1") == 130
    assert "stopping when the moves under way are safe" in operator.err
    assert operator.serving("20", "21", "22", "23", "24", "25") == ["h1"] * 6
    assert operator.hosts["h2"].store.files == operator.hosts["h3"].store.files == {}


def test_a_new_host_gets_its_share_with_the_fewest_moves(operator: Operator) -> None:
    operator.live("h1", "20", "21", "22")
    operator.live("h2", "30", "31", "32")
    assert operator("rebalance", "--dry-run") == 0
    assert operator.lines[-4:] == ["HOST LOAD THEN", "h1 6 4", "h2 6 4", "h3 0 4"]
    assert operator("rebalance") == 0
    assert len(operator.lines) == 3
    assert len(operator.hosts["h3"].store.files) == 2
    assert operator("rebalance") == 0
    assert operator.lines == ["The hosts are even: nothing to move."]


# ----------------------------------------------------------------------------------------------------- a dead host


def test_a_dead_host_is_evacuated_with_what_is_known(operator: Operator) -> None:
    operator.live("h1", "20", "21", "22")
    operator.live("h2", "30")
    assert operator("move", "net-22", "--to", "h3") == 0
    assert operator("move", "net-22", "--to", "h1") == 0
    stopped_halfway(operator, "add-flows", after_s=1)
    operator.hosts.dead.add("h1")
    assert operator("evacuate", "h1", "--dry-run") == 0
    assert operator.lines == ["SCOPE TO FROM", "net-20 h2 h2"]
    assert operator("evacuate", "h1") == 0
    assert operator.lines == [
        "With their state, on h2: net-20.",
        "All other networks of h1 (net-22, and those that no host knows of): CloudStack's next command for one of them "
        "builds it on h2 or h3, from what the command says. This holds for 7 days.",
        "Only a restart of such a network in CloudStack brings the rest: public addresses, static NAT, port forwards, "
        "rules, and DHCP and metadata of VMs that are not started anew.",
    ]
    assert operator.serving("20") == ["h2"]
    (record,) = operator.hosts["h3"].store.record.evacuated
    claim = EvacuationClaim("test", "h1", record.until, "h3")
    assert record.host == "h1" and operator.runner.run(CREDENTIALS.holds(claim, record.proof))
    # The host returns with its old copies. They stay passive, and are removed when it takes scopes again.
    operator.hosts.dead.discard("h1")
    operator.hosts.restart("h1")
    operator.hosts["h1"].host.present.clear()
    operator.hosts.restart("h1")
    operator.pass_time(60)
    assert operator.hosts["h1"].store.files["net-20"].placement.gate == "passive"
    assert operator("where") == 3
    assert any("h1 has an old copy of net-20, passive" in line for line in operator.lines)
    assert operator.lines[-1] == (
        "h1 was evacuated: h2 and h3 may take its networks. When it is back: netloom undrain h1"
    )
    assert operator("undrain", "h1") == 0
    assert operator.lines == [
        "net-20: h2 serves it; removed here",
        "h2 may not take its scopes any more",
        "h3 may not take its scopes any more",
        "h1 takes scopes again",
    ]
    assert operator.hosts["h2"].store.record.evacuated == ()
    assert operator.serving("20", "21") == ["h2", "h1"]


def test_an_evacuation_refuses_while_an_address_is_answered(operator: Operator) -> None:
    operator.live("h1", "20")
    operator.live("h2", "30")
    stopped_halfway(operator, "add-flows", after_s=1)
    operator.hosts.dead.add("h1")
    operator.hosts["h2"].host.owners["203.0.113.20"] = "02:00:00:00:00:01"
    assert operator("evacuate", "h1") == 3
    assert operator.lines[0].startswith("Not placed: net-20: h2: ")
    assert operator.err.splitlines()[-1] == (
        "netloom: h1 was not evacuated: 1 of its networks were not placed (power it off for sure, then add --fenced)"
    )
    assert operator.serving("20") == [""]
    assert operator.hosts["h2"].store.record.evacuated == ()


@pytest.mark.mutation("fencing-is-about-one-host")
@pytest.mark.parametrize("third", ["answers", "is silent"])
def test_the_word_that_a_host_is_off_is_about_this_host(operator: Operator, third: str, tmp_path: Path) -> None:
    operator.live("h1", "20")
    operator.live("h2", "30")
    assert operator("export", str(tmp_path / "archive"), "--without-secrets") == 0
    operator.hosts.dead.add("h1")
    if third == "is silent":
        operator.hosts.dead.add("h3")
    operator.hosts["h2"].host.owners["203.0.113.20"] = "02:00:00:00:00:01"
    operator.hosts["h3"].host.owners["203.0.113.20"] = "02:00:00:00:00:01"
    status = operator("evacuate", "h1", "--fenced", "--state", str(tmp_path / "archive"))
    assert status == (0 if third == "answers" else 2)
    assert len(operator.hosts.serving("net-20")) == (1 if third == "answers" else 0)


@pytest.mark.mutation("what-is-served-is-not-evacuated")
def test_an_archive_gives_back_what_the_dead_host_had_and_nothing_else(operator: Operator, tmp_path: Path) -> None:
    archive = str(tmp_path / "archive")
    operator.live("h1", "20", "21")
    operator.live("h2", "30")
    assert operator("export", archive, "--without-secrets") == 0
    assert operator("move", "net-21", "--to", "h3") == 0
    operator.hosts.dead.add("h1")
    assert operator("evacuate", "h1", "--state", archive) == 0
    assert operator.serving("20", "21", "30") == ["h3", "h3", "h2"] or operator.serving("20") == ["h2"]
    assert "net-20" in operator.lines[0] and "net-21" not in operator.out
    held = next(it.store.files["net-20"] for it in operator.hosts.agents.values() if "net-20" in it.store.files)
    assert held.public_ips.keys() == {"203.0.113.20"}


@pytest.mark.mutation("nothing-is-taken-over-while-a-host-is-silent")
def test_a_passive_copy_is_opened_on_demand(operator: Operator) -> None:
    operator.live("h1", "20")
    agent = operator.hosts["h1"]
    agent.scopes.placements.make_passive(agent.scopes.slot("net-20"), "02:00:00:00:00:01 answers for 203.0.113.20")
    agent.host.present.clear()
    operator.hosts.dead.add("h3")
    assert operator("move", "net-20", "--to", "h1") == 2
    operator.hosts.dead.clear()
    agent.host.owners["203.0.113.20"] = "02:00:00:00:00:01"
    assert operator("where") == 3
    assert operator.lines[-1].endswith("when nobody uses its addresses any more, netloom move net-20 --to h1")
    assert operator("move", "net-20", "--to", "h1") == 3
    assert agent.store.files["net-20"].placement.gate == "passive"
    agent.host.owners.clear()
    assert operator("move", "net-20", "--to", "h1") == 0
    assert operator.serving("20") == ["h1"]


# --------------------------------------------------------------------------------------------------- export, import


def with_secrets(operator: Operator) -> None:
    """Give a VM of net-20 a password and user data."""
    agent = operator.hosts["h1"]
    scope = agent.store.files["net-20"]
    network = scope.networks["20"]
    nic = Nic(mac="02:01:00:cc:00:03", user_data=Secret("#cloud-config"), password=Secret("hunter22"))
    scope = replace(scope, networks={"20": replace(network, nics={nic.key: nic})})
    agent.store.files["net-20"] = scope
    agent.scopes.slot("net-20").scope = scope


@pytest.mark.mutation("an-archive-has-no-secret-in-plain-text", instead="state")
@pytest.mark.parametrize("how", ["encrypted", "left out"])
def test_an_archive_brings_networks_back_that_no_host_has(operator: Operator, tmp_path: Path, how: str) -> None:
    operator.live("h1", "20")
    operator.live("h2", "30")
    with_secrets(operator)
    (tmp_path / "password").write_text("correct horse\nbattery\n")
    options = ["--archive-password-file", str(tmp_path / "password")] if how == "encrypted" else []
    archive = tmp_path / "archive"
    assert operator("export", str(archive), *(options or ["--without-secrets"])) == 0
    told = "encrypted" if options else "without passwords and user data"
    assert operator.lines == [f"2 networks of h1 and h2 in {archive}, {told}."]
    assert archive.stat().st_mode & 0o777 == 0o600
    assert b"hunter22" not in archive.read_bytes() and b"#cloud-config" not in archive.read_bytes()
    assert operator("import", str(archive), *options) == 3
    assert operator.err == ("netloom: h1 holds net-20 (name the scopes that are to be imported, without it)\n")
    lost = operator.hosts["h1"]
    lost.store.files.clear()
    lost.host.present.clear()
    operator.hosts.restart("h1")
    assert operator("import", str(archive), "net-20", "--dry-run", *options) == 0
    assert operator.lines == ["SCOPE TO", "net-20 h1"]
    assert operator("import", str(archive), "net-20", "--to", "h3", *options) == 0
    assert operator.serving("20") == ["h3"]
    (nic,) = operator.hosts["h3"].store.files["net-20"].networks["20"].nics.values()
    expected = Secret("hunter22") if options else None
    assert nic.password == expected
    assert operator("import", str(archive), "net-20", *options) == 3


@pytest.mark.mutation("an-import-replaces-nothing")
def test_an_import_replaces_nothing(operator: Operator, tmp_path: Path) -> None:
    operator.live("h1", "20")
    archive = str(tmp_path / "archive")
    assert operator("export", archive, "--without-secrets") == 0
    assert operator("import", archive, "--to", "h2") == 3
    assert operator("import", archive, "--to", "h2", "--dry-run") == 3
    assert operator.serving("20") == ["h1"]
    assert operator.hosts["h2"].store.files == {}


@pytest.mark.mutation("an-import-asks-every-host")
def test_an_import_asks_every_host(operator: Operator, tmp_path: Path) -> None:
    operator.live("h1", "20")
    archive = str(tmp_path / "archive")
    assert operator("export", archive, "--without-secrets") == 0
    operator.hosts.dead.add("h1")
    assert operator("import", archive) == 2
    assert "h1: port 22 does not answer" in operator.err
    assert operator("export", archive, "--without-secrets") == 3
    assert operator.err.splitlines()[-1].startswith(f"netloom: {archive} was not written (an archive is complete")


def test_a_network_that_came_back_has_a_higher_epoch_than_every_host_knows(operator: Operator, tmp_path: Path) -> None:
    operator.live("h1", "20")
    archive = str(tmp_path / "archive")
    assert operator("export", archive, "--without-secrets") == 0
    operator.hosts["h2"].store.went["net-20"] = store.Moved(to="h9", epoch=7)
    operator.hosts["h1"].store.files.clear()
    operator.hosts["h1"].host.present.clear()
    for name in ("h1", "h2"):
        operator.hosts.restart(name)
    assert operator("import", archive, "--to", "h2") == 0
    placement = operator.hosts["h2"].store.files["net-20"].placement
    assert placement == Placement(epoch=8, host="h2", proof=placement.proof, from_dead=True)
    assert operator.runner.run(CREDENTIALS.holds(PlacementClaim("test", "net-20", 8, "h2"), placement.proof))


def test_help_names_what_is_needed(operator: Operator) -> None:
    for command in ("move", "drain", "undrain", "rebalance", "where", "evacuate", "export", "import"):
        with pytest.raises(SystemExit) as ended:
            run([command, "--help"])
        assert ended.value.code == 0
        told = operator.capture.readouterr().out
        assert max(map(len, told.splitlines())) <= 80
        assert "All hosts of the registration" in told
