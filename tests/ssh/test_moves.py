"""CloudStack learns of a move; and a hostile host that claims a network gets nothing, over real SSH.

The second host is the hostile one. It has seen everything that it was ever sent: old proofs, and proofs for others.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import asyncssh
import pytest

import processes
from netloom.claimwire import Claim, EvacuationClaim, PlacementClaim
from netloom.extension.hostkeys import KnownHosts, Trust
from netloom.extension.proof import sign
from netloom.extension.ssh import Login
from netloom.secret import Secret
from ssh.lab import HOSTILE, KEYS, MANAGEMENT, Caller, CallResult, SshLab, helper_pids, run, until

H1, H2 = "10.99.0.11", "10.99.0.12"
REFUSING = "10.99.0.1"  # the management server itself: no SSH server listens there
OWNER, SCOPE = "netloom/phys-1", "net-42"
EPOCH = 3  # stored
SECRET = "Sesame-1"
NIC = {"mac": "02:01:00:cc:00:03", "ip": "10.1.1.5", "nic_id": "7", "password": SECRET}


def details(lab: SshLab, caller: Caller, hosts: str = f"{H1},{H2}", **more: Any) -> dict[str, Any]:
    return caller.details(hosts=hosts, **{"sshkey": lab.key("good"), **more})


def stored_details(host: str, epoch: int = EPOCH, **more: Any) -> dict[str, Any]:
    return {"host": host, "namespace": "cs-net-42", "epoch": epoch, **more}


def proof(lab: SshLab, claim: Claim, *, key: str = "good", password: str = "") -> str:
    """A proof by a key of the lab, or by a password."""
    trust = Trust((), KnownHosts("/nonexistent"))
    credentials = Login(trust, password=Secret(password)) if password else Login(trust, sshkey=Secret(lab.key(key)))
    return asyncio.run(sign(credentials, claim))


def claim(*, owner: str = OWNER, scope: str = SCOPE, epoch: int = EPOCH + 1, host: str = H2) -> PlacementClaim:
    return PlacementClaim(owner, scope, epoch, host)


def dead(*, owner: str = OWNER, host: str = REFUSING, by: str = H2, left_s: int = 600) -> EvacuationClaim:
    return EvacuationClaim(owner, host, int(time.time()) + left_s, by)


def serves(text: str = "", epoch: int = EPOCH + 1, gate: str = "open", **more: Any) -> dict[str, Any]:
    """A host's answer: it has the scope."""
    return {"holds": True, "epoch": epoch, "gate": gate, "proof": text, **more}


def may_take(text: str, record: EvacuationClaim, **more: Any) -> dict[str, Any]:
    """A host's answer: it may take the scopes of a dead host."""
    return {"evacuated": [{"host": record.dead, "until": record.until, "proof": text}], **more}


def every_reply(answer: Mapping[str, Any]) -> dict[str, Any]:
    """A stand-in with the same facts about the placement in each reply."""
    commands = ("locate", "save-password", "destroy-network", "implement-network")
    return {"holds": [SCOPE], "replies": {command: dict(answer) for command in commands}}


def tricks(lab: SshLab) -> dict[str, dict[str, Any]]:
    """What a hostile host can say, with all that it may have seen."""
    valid = proof(lab, claim())
    own = asyncssh.generate_private_key("ssh-ed25519").sign(claim().text, b"ssh-ed25519")
    expired, forged = dead(left_s=-60), dead()
    return {
        "no proof": serves(),
        "no proof, and the largest number": serves(epoch=(1 << 64) - 1),
        "its own signature": serves("key:" + base64.b64encode(own).decode()),
        "another registration's signature": serves(proof(lab, claim(), key="stranger")),
        "a guessed password": serves(proof(lab, claim(), password="guess")),
        "garbage": serves("key:" + "A" * 4000 + ",mac:\x1b[2J"),
        "the proof of the stored epoch": serves(proof(lab, claim(epoch=EPOCH)), epoch=EPOCH),
        "an old proof": serves(proof(lab, claim(epoch=EPOCH - 1)), epoch=EPOCH - 1),
        "an old proof for a new number": serves(proof(lab, claim(epoch=EPOCH - 1))),
        "the proof of another host": serves(proof(lab, claim(host=H1))),
        "the proof of another scope": serves(proof(lab, claim(scope="net-43"))),
        "the proof of another owner": serves(proof(lab, claim(owner="netloom/phys-2"))),
        "a valid proof, and no state": {"holds": False, "epoch": EPOCH + 1, "proof": valid},
        "a valid proof, and a move to itself": serves(valid, moved_to=H2),
        "a move to itself": {"moved_to": H2, "epoch": EPOCH + 1},
        "a record without a proof": may_take("", forged),
        "a record by its own signature": may_take("key:" + base64.b64encode(own).decode(), forged),
        "an expired record": may_take(proof(lab, expired), expired),
        "an expired record with a new time": may_take(proof(lab, expired), dead()),
        "a record for another dead host": may_take(proof(lab, dead(host="10.99.0.98")), dead(host="10.99.0.98")),
        "the same under the stored host's name": may_take(proof(lab, dead(host="10.99.0.98")), forged),
        "the record of another host": may_take(proof(lab, dead(by=H1)), forged),
        "the record of another owner": may_take(proof(lab, dead(owner="netloom/phys-2")), forged),
        "a record of which it makes a placement": serves(proof(lab, forged)),
        "a placement of which it makes a record": may_take(valid, forged),
    }


def assert_nothing_was_given(lab: SshLab) -> None:
    """The host was asked whether it has the scope, and got no payload."""
    for call in lab.h2.calls_received(but=""):
        assert (call["command"], call["payload"]) == ("locate", "{}"), call


def test_a_hostile_host_gets_nothing_while_the_stored_host_refuses_connections(lab: SshLab, caller: Caller) -> None:
    given = details(lab, caller, f"{REFUSING},{H2}", port=KEYS)
    for name, answer in tricks(lab).items():
        lab.h2.set_behaviour(**every_reply(answer))
        ended = caller.call("save-password", given, stored_details(REFUSING), NIC)
        assert ended.status == 2, name
        assert f"net-42 lives on {REFUSING} and was not moved" in ended.line, name
        assert SECRET not in ended.line
        assert lab.h2.calls_received(but="") != [], name
        assert_nothing_was_given(lab)


@pytest.mark.parametrize("trick", ["no proof", "an old proof for a new number", "the record of another host"])
def test_a_hostile_host_does_not_become_the_stored_one(trick: str, lab: SshLab, caller: Caller) -> None:
    """Neither by ensure-network-device, nor by the end of the network."""
    lab.h2.set_behaviour(**every_reply(tricks(lab)[trick]))
    given = details(lab, caller, f"{REFUSING},{H2}", port=KEYS)
    for command in ("ensure-network-device", "destroy-network"):
        ended = caller.call(command, given, stored_details(REFUSING))
        assert ended.status == 2
        assert f"net-42 lives on {REFUSING} and was not moved" in ended.line


@contextlib.contextmanager
def black_hole(address: str) -> Iterator[None]:
    """Packets to the address are sent, and nobody takes them."""
    neighbour = (address, "lladdr", "02:00:00:00:00:99", "dev", "sw")
    run("ip", "-n", MANAGEMENT, "neighbour", "replace", *neighbour, "nud", "permanent")
    try:
        yield
    finally:
        run("ip", "-n", MANAGEMENT, "neighbour", "delete", *neighbour)


# Each call waits 5 s for the stored host. Above, every trick is tried.
@pytest.mark.parametrize(
    "trick",
    [
        "an old proof for a new number",
        *(pytest.param(it, marks=pytest.mark.long) for it in ("no proof", "a record for another dead host")),
    ],
)
def test_a_hostile_host_gets_nothing_while_the_stored_host_is_a_black_hole(
    trick: str, lab: SshLab, caller: Caller
) -> None:
    lab.h2.set_behaviour(**every_reply(tricks(lab)[trick]))
    with black_hole(H1):
        ended = caller.call("save-password", details(lab, caller), stored_details(H1), NIC, timeout=15)
    assert ended.status == 2
    assert ended.line.startswith("10.99.0.11: port 22 does not answer within ")
    assert "net-42 lives on 10.99.0.11 and was not moved: bring that host back" in ended.line
    assert ended.took_s < 15
    assert lab.h2.calls_received(but="") != []
    assert_nothing_was_given(lab)


def test_a_proof_is_believed_while_the_stored_host_is_a_black_hole(lab: SshLab, caller: Caller) -> None:
    lab.h2.set_behaviour(replies={"locate": serves(proof(lab, claim()))})
    with black_hole(H1):
        ended = caller.call("save-password", details(lab, caller), stored_details(H1), NIC, timeout=15)
    assert ended.output == ""
    assert [it["command"] for it in lab.h2.calls_received()] == ["save-password"]


def test_a_hostile_host_gets_nothing_while_the_stored_host_is_passive(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(replies={"locate": serves(gate="passive", epoch=EPOCH, error="10.1.1.1 is answered")})
    lab.h2.set_behaviour(**every_reply(serves(epoch=99)))
    for command in ("ensure-network-device", "save-password"):
        ended = caller.call(command, details(lab, caller), stored_details(H1), NIC)
        assert (ended.status, ended.line) == (
            3,
            "10.99.0.11: net-42 is not served there: 10.1.1.1 is answered (look: netloom where net-42)",
        )
    assert lab.h1.calls_received() == []
    assert_nothing_was_given(lab)


@pytest.mark.mutation("only-registered-hosts-are-contacted")
def test_no_login_is_sent_to_a_host_that_a_host_names(lab: SshLab, caller: Caller) -> None:
    """With a password login that host would learn the password."""
    lab.h1.set_behaviour(**every_reply({"moved_to": H2, "epoch": EPOCH + 1}))
    logins = lab.h2.logins()
    for command in ("ensure-network-device", "save-password", "destroy-network"):
        ended = caller.call(command, details(lab, caller, H1), stored_details(H1), NIC)
        assert ended.status == 3
        assert f"{H1}: net-42 was moved to {H2}, which is not registered" in ended.line
    assert lab.h2.logins() == logins


# --- and those who have a proof


@pytest.mark.parametrize("login", ["key", "password"])
def test_a_proof_is_believed_while_the_stored_host_is_silent(login: str, lab: SshLab, caller: Caller) -> None:
    more = {"port": KEYS} if login == "key" else {"sshkey": None, "password": HOSTILE}
    signed = proof(lab, claim(), password=HOSTILE if login == "password" else "")
    lab.h2.set_behaviour(replies={"locate": serves(signed)})
    given = details(lab, caller, f"{REFUSING},{H2}", **more)
    ended = caller.ensure(given, stored_details(REFUSING))
    assert ended.output == f'{{"host":"{H2}","namespace":"cs-net-42","epoch":4,"previous":"{REFUSING}"}}'
    assert caller.call("save-password", given, stored_details(REFUSING), NIC).output == ""
    (got,) = lab.h2.calls_received()
    assert (got["command"], got["epoch"]) == ("save-password", EPOCH + 1)
    assert SECRET in got["payload"]


@pytest.mark.mutation("a-command-names-its-placement", instead="request.call")
def test_a_dead_hosts_network_goes_to_a_host_that_may_take_it(lab: SshLab, caller: Caller) -> None:
    record = dead()
    lab.h2.set_behaviour(replies={"locate": may_take(proof(lab, record), record)})
    given = details(lab, caller, f"{REFUSING},{H2}", port=KEYS)
    ended = caller.ensure(given, stored_details(REFUSING))
    assert ended.output == f'{{"host":"{H2}","namespace":"cs-net-42","epoch":4,"previous":"{REFUSING}"}}'
    assert caller.call("save-password", given, stored_details(REFUSING), NIC).output == ""
    assert [(it["command"], it["epoch"]) for it in lab.h2.calls_received()] == [("save-password", EPOCH + 1)]


# --- CloudStack learns of a move


def test_a_call_follows_a_move(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(replies={"locate": {"moved_to": H2, "epoch": EPOCH + 1}})
    lab.h2.set_behaviour(replies={"locate": serves()})
    ended = caller.ensure(details(lab, caller), stored_details(H1))
    assert ended.output == f'{{"host":"{H2}","namespace":"cs-net-42","epoch":4}}'
    assert caller.call("save-password", details(lab, caller), stored_details(H1), NIC).output == ""
    assert lab.h1.calls_received() == []
    assert [(it["command"], it["epoch"]) for it in lab.h2.calls_received()] == [("save-password", EPOCH + 1)]


@contextlib.contextmanager
def helper(caller: Caller) -> Iterator[None]:
    """Calls use a helper, which keeps connections to the hosts."""
    caller.helper = "60"
    yield
    for pid in helper_pids():
        processes.kill(pid)
    assert until(lambda: not helper_pids())


def test_a_call_to_a_connected_host_follows_a_move(lab: SshLab, caller: Caller) -> None:
    """The call is sent to the stored host without a question, and not executed there."""
    elsewhere = {"moved_to": H2, "epoch": EPOCH + 1, "status": 3, "error": "net-42 was moved to 10.99.0.12"}
    asked = [serves(epoch=EPOCH), {"moved_to": H2, "epoch": EPOCH + 1}]
    lab.h1.set_behaviour(replies={"locate": asked, "save-password": [{}, elsewhere]})
    lab.h2.set_behaviour(replies={"locate": serves()})
    given = details(lab, caller)
    with helper(caller):
        for _ in range(3):
            assert caller.call("save-password", given, stored_details(H1), NIC).output == ""
        assert [it["command"] for it in lab.h1.calls_received(but="")] == ["locate", *["save-password"] * 3]
        assert [it["command"] for it in lab.h2.calls_received(but="")] == ["locate", "save-password"] * 2


def test_a_move_between_the_question_and_the_command(lab: SshLab, caller: Caller) -> None:
    elsewhere = {"moved_to": H2, "epoch": EPOCH + 1, "status": 3, "error": "net-42 was moved to 10.99.0.12"}
    lab.h1.set_behaviour(replies={"locate": serves(epoch=EPOCH), "save-password": elsewhere})
    lab.h2.set_behaviour(replies={"locate": serves()})
    assert caller.call("save-password", details(lab, caller), stored_details(H1), NIC).output == ""
    assert [it["command"] for it in lab.h2.calls_received(but="")] == ["locate", "save-password"]


@pytest.mark.mutation("an-action-is-not-sent-twice")
def test_a_custom_action_is_sent_to_one_host(lab: SshLab, caller: Caller) -> None:
    """It ran while the network was moved, or before. Nobody knows, if it failed."""
    failed = {"moved_to": H2, "epoch": EPOCH + 1, "status": 3, "error": "the hook failed"}
    lab.h1.set_behaviour(replies={"locate": serves(epoch=EPOCH), "custom-action": failed})
    lab.h2.set_behaviour(replies={"locate": serves()})
    ended = custom_action(lab, caller)
    assert (ended.status, ended.line) == (3, f"{H1}: the hook failed")
    assert lab.h2.calls_received() == []
    done = {"moved_to": H2, "epoch": EPOCH + 1, "output": "done"}
    lab.h1.set_behaviour(replies={"locate": serves(epoch=EPOCH), "custom-action": done})
    assert custom_action(lab, caller).output == "done"
    assert lab.h2.calls_received() == []


def test_a_custom_action_follows_a_move_also_when_the_old_host_is_connected(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(replies={"locate": [serves(epoch=EPOCH), {"moved_to": H2, "epoch": EPOCH + 1}]})
    lab.h2.set_behaviour(replies={"locate": serves(), "custom-action": {"output": "done"}})
    with helper(caller):
        assert caller.call("save-password", details(lab, caller), stored_details(H1), NIC).output == ""
        assert custom_action(lab, caller).output == "done"
    assert [it["command"] for it in lab.h1.calls_received()] == ["save-password"]


def custom_action(lab: SshLab, caller: Caller) -> CallResult:
    """The file of a custom action has its fields beside the details."""
    path = caller.payload(details(lab, caller), stored_details(H1))
    file = json.loads(path.read_text())
    del file["payload"]
    path.write_text(json.dumps({**file, "network_id": "42", "action": "greet", "action_params": {}}))
    began = time.monotonic()
    return caller.finish(caller.start("custom-action", str(path), "30"), began)


def test_hosts_that_send_a_call_to_each_other_end_it(lab: SshLab, caller: Caller) -> None:
    away = {"status": 3, "error": "moved", "epoch": 9}
    lab.h1.set_behaviour(replies={"locate": serves(), "save-password": {**away, "moved_to": H2}})
    lab.h2.set_behaviour(replies={"locate": serves(epoch=9), "save-password": {**away, "moved_to": H1}})
    ended = caller.call("save-password", details(lab, caller), stored_details(H1), NIC)
    assert ended.status == 3
    assert ended.took_s < 20


def test_a_call_waits_for_the_last_step_of_a_move(lab: SshLab, caller: Caller) -> None:
    """The gate of the stored host is closed, then it says where the scope went, and that host opens."""
    closed = serves(epoch=EPOCH, gate="closed")
    lab.h1.set_behaviour(replies={"locate": [closed, closed, {"moved_to": H2, "epoch": EPOCH + 1}]})
    lab.h2.set_behaviour(replies={"locate": [serves(gate="incoming"), serves(gate="incoming"), serves()]})
    ended = caller.ensure(details(lab, caller), stored_details(H1))
    assert ended.output == f'{{"host":"{H2}","namespace":"cs-net-42","epoch":4}}'
    ids = [it["call_id"] for it in lab.h1.calls_received(but="")]
    assert len(set(ids)) == len(ids) == 3  # an agent answers a repeated id from memory


def test_a_move_that_does_not_end_fails_within_the_time_of_the_call(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(replies={"locate": serves(epoch=EPOCH, gate="closed")})
    ended = caller.ensure(details(lab, caller), stored_details(H1), timeout=6)
    assert ended.status == 3
    assert ended.line.startswith("10.99.0.11: net-42 is not served there: its move from this host is not finished")
    assert ended.took_s < 6


def test_a_drained_host_gets_no_new_network(lab: SshLab, caller: Caller) -> None:
    lab.h2.set_behaviour(replies={"locate": {"drained": True}})  # the preferred host
    assert json.loads(caller.ensure(details(lab, caller)).output)["host"] == H1
    assert json.loads(caller.ensure(details(lab, caller), stored_details(H2)).output)["host"] == H2
    lab.h1.set_behaviour(replies={"locate": {"drained": True}})
    ended = caller.ensure(details(lab, caller))
    assert (ended.status, ended.line) == (
        3,
        f"net-42 is on no host, and every host that could take it is drained: {H2}, {H1} (netloom undrain {H2})",
    )
    assert caller.call("delete-port-forward", details(lab, caller), None, FORWARD).output == ""


FORWARD = {
    "public_ip": "203.0.113.5",
    "public_port": "22",
    "private_ip": "10.1.1.5",
    "private_port": "22",
    "protocol": "tcp",
}


# --- the end of a network


@pytest.mark.mutation("what-is-left-behind-is-logged")
@pytest.mark.parametrize("kind", ["a proof", "a record"])
def test_a_network_of_a_silent_host_ends_where_it_went(kind: str, lab: SshLab, caller: Caller) -> None:
    record = dead()
    answer = serves(proof(lab, claim())) if kind == "a proof" else may_take(proof(lab, record), record)
    lab.h2.set_behaviour(replies={"locate": answer})
    given = details(lab, caller, f"{REFUSING},{H2}", port=KEYS)
    assert caller.call("destroy-network", given, stored_details(REFUSING)).output == ""
    assert [it["command"] for it in lab.h2.calls_received()] == ["destroy-network"]
    assert f"note: net-42 may be left on {REFUSING}, which did not answer" in caller.log


def test_hosts_that_a_network_left_are_told_of_its_end(lab: SshLab, caller: Caller) -> None:
    given = details(lab, caller, H1)
    assert caller.call("destroy-network", given, stored_details(H1, previous=H2)).output == ""
    for host in (lab.h1, lab.h2):
        assert [it["command"] for it in host.calls_received()] == ["destroy-network"]
    assert "note:" not in caller.log
    gone = stored_details(H1, previous="10.99.0.99")
    assert caller.call("destroy-network", given, gone).output == ""
    assert "note: net-42 may be left on 10.99.0.99" in caller.log


def test_the_end_of_a_moved_network_reaches_its_host(lab: SshLab, caller: Caller) -> None:
    moved = {"moved_to": H2, "epoch": EPOCH + 1}
    lab.h1.set_behaviour(replies={"locate": moved, "destroy-network": {**moved, "status": 3, "error": "moved"}})
    assert caller.call("destroy-network", details(lab, caller), stored_details(H1)).output == ""
    assert [it["command"] for it in lab.h2.calls_received()] == ["destroy-network"]
    with lab.disconnected(lab.h2):
        ended = caller.call("destroy-network", details(lab, caller), stored_details(H1), timeout=10)
    assert ended.status == 2
    assert "net-42 was moved to 10.99.0.12: bring that host back" in ended.line
