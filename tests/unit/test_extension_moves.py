"""What the next step of a move is, what is said about a scope that several hosts have, and archives."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

import msgspec
import pytest

from netloom.errors import BadRequest, HostRefused, HostUnreachable, NetloomError
from netloom.extension.moves import archive
from netloom.extension.moves.agents import Agents
from netloom.extension.moves.archive import Archived, load_of, read_archive, without_secrets, write_archive
from netloom.extension.moves.balance import Planned
from netloom.extension.moves.drain import plan_drain, plan_rebalance
from netloom.extension.moves.evacuate import place_copies, plan_evacuation
from netloom.extension.moves.inventory import (
    Await,
    HostView,
    Inventory,
    TakeOver,
    There,
    Transfer,
    is_scope_id,
    leftovers,
    next_step,
)
from netloom.extension.moves.move import Mover, Signer
from netloom.extension.moves.where import remarks
from netloom.placementwire import GATEWAY, HeldScope
from netloom.secret import Secret, enc_hook
from netloom.standbywire import LeaveGroup
from netloom.state import Network, Nic, Scope
from netloom.wire import Reply

NET = "net-204"


def inventory(silent: str = "", **hosts: str) -> Inventory:
    """Hosts by what they say: ``open 3``, ``closed 2 h2``, ``moved 3 h2``, ``standby 3 h1 GROUP``; "-": nothing.

    A peer "-" is none.
    """
    views = {}
    for host, text in hosts.items():
        gate, epoch, peer, group = (*text.split(), "", "", "", "")[:4]
        held = HeldScope(
            scope_id=NET,
            owner="o",
            gate=gate,
            epoch=int(epoch or 0),
            peer=peer.strip("-"),
            why="it says so",
            group=group,
            standby="h2" if group else "",
            witness="h3" if group else "",
        )
        views[host] = HostView({} if text == "-" else {NET: held})
    failures: dict[str, NetloomError] = {it: HostUnreachable(f"{it}: no answer") for it in silent.split()}
    return Inventory(views, failures)


@pytest.mark.parametrize(
    ("now", "step"),
    [
        (inventory(h1="open 0", h2="-"), (Transfer, "h1", 1)),
        (inventory(h1="open 4", h2="incoming 5 h1"), (Transfer, "h1", 6)),
        (inventory(h1="open 4", h2="passive 2"), (Transfer, "h1", 5)),
        (inventory(h1="open 4", h2="-", h3="moved 9 h1"), (Transfer, "h1", 10)),
        (inventory(h1="closed 4 h2", h2="incoming 5 h1"), (Transfer, "h1", 6)),
        (inventory(h1="closed 4 h3", h2="-", h3="incoming 5 h1"), (Await, "h1", 0)),
        (inventory(h1="closed 4 h2", h2="open 5"), (There, "", 5)),
        (inventory(h1="open 4", h2="open 5"), (There, "", 5)),
        (inventory(h1="open 5", h2="open 4"), (Transfer, "h1", 6)),
        (inventory(h1="moved 5 h2", h2="open 5"), (There, "", 5)),
        (inventory(h1="passive 5", h2="passive 3"), (TakeOver, "h1", 6)),
        (inventory(h1="passive 5", h2="incoming 6"), (TakeOver, "h1", 7)),
        (inventory(silent="h3", h1="open 5", h2="-"), (Transfer, "h1", 6)),
        (inventory(h1="open 5 - G", h2="standby 5 h1 G"), (Transfer, "h1", 6)),
        (inventory(h1="standby 6 h2 G", h2="open 6 - G"), (There, "", 6)),
    ],
)
def test_the_next_step_follows_from_what_the_hosts_say(now: Inventory, step: tuple[type, str, int]) -> None:
    found = next_step(NET, "h2", now)
    assert (type(found), getattr(found, "source", ""), getattr(found, "epoch", 0)) == step


@pytest.mark.parametrize(
    ("now", "error"),
    [
        (inventory(h1="-", h2="-"), "no host that answers has net-204 (netloom where lists all"),
        (inventory(h1="open 3", h2="open 3"), "h1 and h2 both serve net-204 (epoch 3) (CloudStack uses one of them"),
        (inventory(h1="moved 3 h9", h2="-"), "no host that answers has net-204; h1 says that it went to h9"),
        (
            inventory(silent="h3", h1="passive 3", h2="-"),
            "no host that answers serves net-204; h1 has it passive (it says so); h3: no answer (bring that host back; "
            "if it is dead: netloom evacuate <host>)",
        ),
        (inventory(silent="h3", h2="incoming 3 h3"), "h2 has it incoming from h3 (it says so); h3: no answer"),
        (inventory(h1="unreadable", h2="passive 3"), "h1 has it unreadable (it says so)"),
        (inventory(h1="standby 5 - G", h2="standby 5 h1 G"), "no host that answers serves net-204; h1 has it standby"),
        (inventory(silent="h1", h2="standby 5 h1 G"), "h2 has it standby (it says so); h1: no answer (bring that host"),
    ],
)
def test_what_has_no_next_step_is_an_error_with_a_remedy(now: Inventory, error: str) -> None:
    with pytest.raises(NetloomError) as raised:
        next_step(NET, "h2", now)
    assert error in str(raised.value)
    assert raised.value.hint


@pytest.mark.mutation("a-newer-copy-is-not-removed")
@pytest.mark.parametrize(
    ("now", "hosts"),
    [
        (inventory(h1="open 3"), []),
        (inventory(h1="open 3", h2="passive 2", h3="closed 2 h1"), ["h2", "h3"]),
        (inventory(h1="open 3", h2="passive 3", h3="passive 4"), []),
        (inventory(h1="open 3", h2="incoming 4 h1"), ["h2"]),
        (inventory(h1="open 3", h2="open 2", h3="moved 2 h2"), ["h2"]),
        (inventory(h1="open 3", h2="open 3", h3="passive 2"), []),
        (inventory(h1="open 3", h2="unreadable"), []),
        (inventory(h1="closed 3 h2", h2="passive 2"), []),
        (inventory(h1="open 3 - G", h2="standby 2 h1 OLD", h3="passive 2"), ["h2", "h3"]),
        (inventory(h1="open 3", h2="standby 2 h1 OLD"), ["h2"]),
    ],
)
def test_only_what_is_older_than_the_serving_host_is_left_over(now: Inventory, hosts: list[str]) -> None:
    assert [it.host for it in leftovers(NET, now)] == hosts


@pytest.mark.mutation("a-standby-is-no-leftover")
@pytest.mark.parametrize(
    ("now", "hosts"),
    [
        (inventory(h1="open 3 - G", h2="standby 3 h1 G"), []),
        (inventory(h1="open 3 - G", h2="standby 2 h1 G", h3="passive 2"), ["h3"]),
        (inventory(h1="open 3 - G", h2="open 2 - G"), []),  # it has no lease, and learns of the take-over
    ],
)
def test_nothing_is_removed_from_a_host_that_stands_by(now: Inventory, hosts: list[str]) -> None:
    assert [it.host for it in leftovers(NET, now)] == hosts


def test_a_standby_copy_is_no_load_and_stays_in_a_drain() -> None:
    now = inventory(h1="open 3 - G", h2="standby 3 h1 G", h3="-")
    assert now.loads() == {"h1": 1, "h2": 0, "h3": 0}
    assert plan_drain("h2", now) == []
    assert plan_drain("h1", now) == [Planned(NET, "h1", "h2", 1)]
    held = now.views["h1"].scopes[NET]
    many = {f"net-{number}": msgspec.structs.replace(held, scope_id=f"net-{number}") for number in (1, 2)}
    copies = {it: msgspec.structs.replace(held, scope_id=it, gate="standby", peer="h1") for it in many}
    both = Inventory({"h1": HostView(many), "h2": HostView(copies)})
    assert [(it.source, it.target) for it in plan_rebalance(both)] == [("h1", "h2")]


def test_the_copy_of_the_standby_is_used_when_its_host_is_dead_and_it_has_not_taken_over() -> None:
    plan = plan_evacuation("h1", inventory(silent="h1", h2="standby 3 h1 G", h3="-"), [])
    assert [(it.scope_id, it.host, it.served) for it in plan.partners] == [(NET, "h2", False)]
    served = plan_evacuation("h1", inventory(silent="h1", h2="open 4 - G", h3="-"), [])
    assert (served.partners, served.copies) == ((), ())


@pytest.mark.mutation("a-standby-is-not-bypassed", instead="False")
def test_a_standby_copy_is_used_where_it_is_because_it_could_still_take_over() -> None:
    now = inventory(silent="h1", h2="standby 3 h1 G", h3="-")
    views = {**now.views, "h2": HostView(now.views["h2"].scopes, drained=True)}
    newer = archived(epoch=9)
    plan = plan_evacuation("h1", Inventory(views, now.failures), [newer])
    assert [(it.scope_id, it.host) for it in plan.partners] == [(NET, "h2")]
    assert plan.copies == ()


class ToldAgents:
    """What agents are told to do. They do it."""

    def __init__(self) -> None:
        self.told: list[tuple[str, object]] = []

    async def tell(self, host: str, command: str, message: object, **about: object) -> Reply:
        self.told.append((host, message))
        return Reply(call_id="")


def evacuated(now: Inventory, dead: str, *, fenced: bool) -> list[tuple[str, object]]:
    """What the hosts are told about their groups with the dead one."""
    agents = ToldAgents()
    mover = Mover(cast(Agents, agents), cast(Signer, None))
    asyncio.run(place_copies(mover, plan_evacuation(dead, now, []), now, fenced=fenced))
    return agents.told


@pytest.mark.parametrize(
    ("now", "dead", "fenced", "asks_first"),
    [
        (inventory(h1="open 3 - G", silent="h2"), "h2", True, False),  # it serves: nobody else answers
        (inventory(h1="standby 3 - G", silent="h2"), "h2", True, True),  # it has no lease, and h2 is silent
        (inventory(h1="standby 3 - G"), "h2", True, False),
        (inventory(h2="standby 3 h1 G"), "h1", True, False),
        (inventory(h2="standby 3 h1 G", silent="h3"), "h1", True, True),
        (inventory(h2="standby 3 h1 G"), "h1", False, True),
    ],
)
def test_the_other_host_of_a_group_serves_alone_if_one_is_off(
    now: Inventory, dead: str, fenced: bool, asks_first: bool
) -> None:
    (host,) = now.views
    message = LeaveGroup(group_id="G", fenced=dead, asks_first=asks_first)
    assert evacuated(now, dead, fenced=fenced) == [(host, message)]


@pytest.mark.mutation("a-group-ends-by-the-operators-word")
def test_without_the_operators_word_a_served_network_stays_in_its_group() -> None:
    assert evacuated(inventory(h1="open 3 - G"), "h2", fenced=False) == []


@pytest.mark.mutation("a-standby-may-take-over", instead="False")
def test_no_copy_is_taken_over_beside_a_standby() -> None:
    with pytest.raises(HostRefused, match="no host that answers serves net-204"):
        next_step(NET, "h3", inventory(h1="passive 3", h2="standby 3 h1 G", h3="-"))


@pytest.mark.parametrize(
    ("now", "texts"),
    [
        (inventory(h1="open 3", h2="-", h3="moved 3 h1"), []),
        (inventory(h1="open 3", h2="open 3"), ["h1 and h2 both serve net-204 (epoch 3)"]),
        (
            inventory(h1="open 3", h2="open 2"),
            ["h2 serves net-204 too, with the older epoch 2: netloom move net-204 --to h1"],
        ),
        (inventory(h1="open 3", h2="passive 2"), ["h2 has an old copy of net-204, passive (it says so): netloom move"]),
        (inventory(h1="open 3", h2="passive 3"), ["h2 has a copy of net-204, passive, that is not older"]),
        (inventory(h1="open 3", h2="incoming 4 h1"), ["h2 has a copy of net-204 from a move that is under way"]),
        (inventory(h1="open 3", h2="unreadable"), ["h2 cannot read its state file of net-204"]),
        (inventory(h1="closed 3 h2", h2="incoming 4 h1"), ["h1 has closed net-204 for a move to h2", "h2 has a copy"]),
        (inventory(h2="incoming 4 h9"), ["if h9 is dead, netloom evacuate h9"]),
        (
            inventory(h1="passive 4"),
            ["stays passive (it says so): when nobody uses its addresses any more, netloom move"],
        ),
        (inventory(h1="unreadable"), ["h1 cannot read its state file of net-204, and leaves the network as it is"]),
        (inventory(h1="moved 4 h2", h2="-"), ["h1 gave net-204 to h2, which does not have it any more"]),
        (inventory(h1="moved 4 h9", h2="-"), ["h1 gave net-204 to h9, which did not answer"]),
        (inventory(h1="open 3 - G", h2="standby 3 h1 G", h3="-"), []),
        (inventory(h1="standby 4 h2 G", h2="open 4 - G", h3="-"), []),
        (
            inventory(h1="open 3 - G", h2="open 4 - G"),
            ["h1 and h2 both say that they are active for net-204 in the group G: look again"],
        ),
        (inventory(h1="open 3 - G", h2="standby 3 h9 G"), ["h2 stands by for h9, but h1 serves net-204: look again"]),
        (
            inventory(h1="open 3 - G", h2="standby 2 h1 OLD"),
            ["h2 stands by for net-204 in a group that h1 has left: netloom move net-204 --to h1 removes it"],
        ),
        (
            inventory(silent="h1", h2="standby 3 h1 G"),
            ["h2 stands by for h1, which did not answer, and has not taken net-204 over: bring h1 or h3 back; if h1"],
        ),
        (
            inventory(h1="standby 3 - G", h2="standby 3 h1 G"),
            [
                "h1 is active for net-204 without a lease: it hears neither h2 nor h3",
                "h2 stands by for h1, which does not serve net-204: look again",
            ],
        ),
    ],
)
def test_what_is_wrong_is_said_in_plain_words(now: Inventory, texts: list[str]) -> None:
    found = remarks(NET, now)
    assert len(found) == len(texts)
    assert all(text in line for text, line in zip(texts, found, strict=True))


def test_of_a_group_without_a_witness_the_gateway_is_named() -> None:
    held = inventory(h1="standby 3 - G").views["h1"].scopes[NET]
    now = Inventory({"h1": HostView({NET: msgspec.structs.replace(held, witness=GATEWAY)})})
    (line,) = remarks(NET, now)
    assert line.endswith("without a lease: it hears neither h2 nor the gateway")


def test_names_of_scopes() -> None:
    assert all(map(is_scope_id, ["net-204", "vpc-7", "net-0"]))
    assert not any(map(is_scope_id, ["", "net-", "net-01", "204", "NET-1", "net-1 ", "vm-1", "net-12345678901"]))


# -------------------------------------------------------------------------------------------------------- archives


def archived(scope_id: str = NET, host: str = "h1", epoch: int = 3) -> Archived:
    nic = Nic(mac="02:01:00:cc:00:03", user_data=Secret("#cloud-config"), password=Secret("hunter22"))
    network = Network(network_id="204", nics={nic.key: nic})
    scope = Scope(scope_id=scope_id, owner="o", revision=7, networks={"204": network})
    state = msgspec.json.format(msgspec.json.encode(scope, enc_hook=enc_hook), indent=2)
    return Archived(scope_id=scope_id, owner="o", host=host, epoch=epoch, revision=7, state=state)


@pytest.fixture(autouse=True)
def _cheap_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "_SCRYPT_N", 1 << 4)


PASSWORD = Secret("correct horse")
SCOPES = [archived("net-204"), archived("net-205", "h2"), archived("vpc-7")]


def test_an_encrypted_archive_gives_back_every_byte(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    write_archive(path, SCOPES, PASSWORD)
    assert read_archive(path, PASSWORD) == SCOPES
    assert os.stat(path).st_mode & 0o777 == 0o600
    data = Path(path).read_bytes()
    assert b"hunter22" not in data and b"cloud-config" not in data
    assert [json.loads(line).get("scope_id") for line in data.splitlines()] == [
        None,
        "net-204",
        "net-205",
        "vpc-7",
        None,
    ]
    write_archive(path, SCOPES, PASSWORD)
    assert not set(data.splitlines()) & set(Path(path).read_bytes().splitlines())


def test_an_archive_without_secrets_has_all_the_rest(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    write_archive(path, SCOPES, None)
    found = read_archive(path, None)
    assert [it.scope_id for it in found] == ["net-204", "net-205", "vpc-7"]
    scope = msgspec.json.decode(found[0].state, type=Scope)
    (nic,) = scope.networks["204"].nics.values()
    assert (nic.mac, nic.user_data, nic.password) == ("02:01:00:cc:00:03", None, None)
    assert scope.revision == 7
    assert [load_of(it) for it in found] == [2, 2, 2]


@pytest.mark.mutation("an-archive-is-complete")
@pytest.mark.parametrize("password", [None, PASSWORD])
@pytest.mark.parametrize(
    "damage",
    [
        lambda lines: lines[:2] + lines[3:],
        lambda lines: lines[:-1],
        lambda lines: lines[:1],
        lambda lines: [],
        lambda lines: [*lines[:3], lines[2], *lines[4:]],
        lambda lines: [b"{}", *lines[1:]],
        lambda lines: [lines[0], b"[]", *lines[2:]],
        lambda lines: [lines[0].replace(b'"netloom_archive":1', b'"netloom_archive":2'), *lines[1:]],
        lambda lines: [*lines[:1], lines[1].replace(b"net-204", b"net/204"), *lines[2:]],
    ],
)
def test_a_damaged_archive_is_refused(
    tmp_path: Path, password: Secret | None, damage: Callable[[list[bytes]], list[bytes]]
) -> None:
    path = tmp_path / "a"
    write_archive(str(path), SCOPES, password)
    path.write_bytes(b"\n".join(damage(path.read_bytes().splitlines())) + b"\n")
    with pytest.raises(BadRequest) as raised:
        read_archive(str(path), password)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("field", ["epoch", "owner", "host"])
def test_what_stands_beside_an_encrypted_state_cannot_be_changed(tmp_path: Path, field: str) -> None:
    path = tmp_path / "a"
    write_archive(str(path), SCOPES, PASSWORD)
    lines = path.read_bytes().splitlines()
    changed = json.loads(lines[1]) | {field: 9 if field == "epoch" else "h9"}
    path.write_bytes(b"\n".join([lines[0], json.dumps(changed).encode(), *lines[2:]]))
    with pytest.raises(BadRequest, match="cannot be decrypted"):
        read_archive(str(path), PASSWORD)


def test_a_wrong_password_and_none_are_told_apart(tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    with pytest.raises(BadRequest, match="at least 8 characters"):
        write_archive(path, SCOPES, Secret("short"))
    write_archive(path, SCOPES, PASSWORD)
    with pytest.raises(BadRequest, match="is encrypted"):
        read_archive(path, None)
    with pytest.raises(BadRequest, match="is the password right"):
        read_archive(path, Secret("battery staple"))


def test_a_state_of_a_newer_build_is_exported_encrypted_only(tmp_path: Path) -> None:
    newer = msgspec.structs.replace(archived(), state=b'{"schema": 99, "scope_id": "net-204", "later": {}}')
    write_archive(str(tmp_path / "a"), [newer], PASSWORD)
    assert read_archive(str(tmp_path / "a"), PASSWORD) == [newer]
    with pytest.raises(HostRefused, match="has schema 99"):
        without_secrets(newer.state)


def test_secrets_are_not_in_the_text_of_an_archived_scope() -> None:
    assert "hunter22" not in repr(archived())


# ---------------------------------------------------------------------------------------------------- evacuations


def test_an_evacuation_takes_the_newest_copy() -> None:
    copies = {"h2": "incoming 5 h1", "h3": "passive 3 h1"}
    plan = plan_evacuation("h1", inventory(**copies), [archived(epoch=2)])
    assert [(it.scope_id, it.host) for it in plan.copies] == [(NET, "h2")]
    plan = plan_evacuation("h1", inventory(**copies), [archived(epoch=6)])
    assert [(it.scope_id, it.host) for it in plan.copies] == [(NET, "")]


@pytest.mark.parametrize("other", ["open 5", "closed 5 h1"])
def test_what_another_host_serves_is_left_alone(other: str) -> None:
    plan = plan_evacuation("h1", inventory(h2=other, h3="passive 3 h1"), [archived(epoch=9)])
    assert plan.copies == () and plan.unknown == ()


def test_the_owner_must_be_known() -> None:
    with pytest.raises(BadRequest, match="--owner NAME"):
        plan_evacuation("h1", inventory(h2="-"), [])
    assert plan_evacuation("h1", inventory(h2="-"), [], "mine").owner == "mine"
