"""Choice of the host for a command, with two real SSH servers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from netloom.wire import Reply, encode
from ssh.lab import KEYS, Caller, SshLab

H1, H2 = "10.99.0.11", "10.99.0.12"


def details(lab: SshLab, caller: Caller, hosts: str = f"{H1}, {H2}", **more: Any) -> dict[str, Any]:
    return caller.details(hosts=hosts, sshkey=lab.key("good"), **more)


def stored_details(host: str, **more: Any) -> dict[str, Any]:
    return {"host": host, "namespace": "cs-net-42", **more}


def chosen_host(ended: Any) -> str:
    host = json.loads(ended.output)["host"]
    assert isinstance(host, str)
    return host


def test_a_new_network_is_placed_by_cksum(lab: SshLab, caller: Caller) -> None:
    # `printf 42 | cksum` gives 1199578407, an odd number: the second of two hosts, as in the reference extension.
    assert chosen_host(caller.ensure(details(lab, caller))) == H2
    assert chosen_host(caller.ensure(details(lab, caller, f"{H2},{H1}"))) == H1


def test_an_existing_network_is_found_on_its_host(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(holds=["net-42"])
    assert chosen_host(caller.ensure(details(lab, caller))) == H1
    assert caller.call("implement-network", details(lab, caller)).output == ""
    assert [call["command"] for call in lab.h1.calls_received()] == ["implement-network"]
    assert lab.h2.calls_received() == []


def test_the_stored_host_is_kept(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(holds=["net-42"])
    ended = caller.ensure(details(lab, caller), stored_details(H1))
    assert ended.output == '{"host":"10.99.0.11","namespace":"cs-net-42"}'
    assert lab.h2.calls_received(but="") == []


def test_a_group_gets_the_addresses_under_which_its_hosts_were_reached(lab: SshLab, caller: Caller) -> None:
    """The third host is the first one, by another address. Each gets the group over the connection that is open."""
    for host in (lab.h1, lab.h2):
        host.set_behaviour(holds=["net-42"])
    third = lab.h1.address6
    registered = details(lab, caller, f"{H1},{H2},{third}", standby="required", **{"standby.port": "9000"})
    ended = caller.ensure(registered, stored_details(H1, epoch=6))
    assert ended.output == '{"host":"10.99.0.11","namespace":"cs-net-42","epoch":7,"standby":"10.99.0.12"}'
    h1, h2 = lab.h1.calls_received(), lab.h2.calls_received()
    assert [call["command"] for call in h1] == ["set-group", "set-group", "join-group"]
    assert [call["command"] for call in h2] == ["set-group"]
    for call in (*h1[:2], *h2):
        assert (call["scope_id"], call["owner"]) == ("", h1[0]["owner"])
        assert all(f"address\ufffd{it}" in call["payload"] for it in (H1, H2)), call["payload"]
        assert f"address\ufffd{third}" in call["payload"]
    assert h1[2]["scope_id"] == "net-42" and "key:" in h1[2]["payload"]


def test_an_earlier_move_is_remembered(lab: SshLab, caller: Caller) -> None:
    ended = caller.ensure(details(lab, caller), stored_details(H1, epoch=3, previous=H2))
    assert ended.output == '{"host":"10.99.0.11","namespace":"cs-net-42","epoch":3,"previous":"10.99.0.12"}'


@pytest.mark.parametrize("garbage", ["", "nonsense", "[1]", '{"host":"-oProxyCommand=x"}', '{"host":5}', "{\x01}"])
def test_invalid_stored_details_count_as_unknown(garbage: str, lab: SshLab, caller: Caller) -> None:
    """netloom recovers by itself and always prints valid JSON."""
    lab.h1.set_behaviour(holds=["net-42"])
    ended = caller.call("ensure-network-device", details(lab, caller), None, {"current_details": garbage})
    assert chosen_host(ended) == H1


@pytest.mark.mutation("a-network-of-a-silent-host-stays", instead="Use(now.order[-1])")
def test_defect_58_a_network_stays_on_a_host_that_is_down(lab: SshLab, caller: Caller) -> None:
    for command in ("ensure-network-device", "shutdown-network"):
        ended = caller.call(command, details(lab, caller, f"10.99.0.99,{H2}"), stored_details("10.99.0.99"))
        assert ended.status == 2
        assert ended.line.startswith("10.99.0.99: no connection to port 22")
        assert "net-42 lives on 10.99.0.99 and was not moved" in ended.line
    assert lab.h2.calls_received() == []


def test_a_candidate_that_claims_the_network_of_a_silent_host_does_not_get_it(lab: SshLab, caller: Caller) -> None:
    lab.h2.set_behaviour(holds=["net-42"])
    for hosts in (f"10.99.0.99,{H2}", H2):  # also when the silent host is not a candidate any more
        for command in ("ensure-network-device", "release-nic"):
            fields = {"mac": "02:01:00:cc:00:03"}
            ended = caller.call(command, details(lab, caller, hosts), stored_details("10.99.0.99"), fields)
            assert ended.status == 2
            assert "net-42 lives on 10.99.0.99 and was not moved" in ended.line
    assert lab.h2.calls_received() == []


UNASKED = encode(Reply(call_id="x", output="x" * 1000)).hex()


@pytest.mark.parametrize(
    "behaviour",
    [
        {"how": "silent"},
        {"how": "hang"},
        {"how": "refuse"},
        {"how": "die"},
        {"how": "noise", "noise": '{"host":"10.99.0.12"}\n'},
        {"how": "frame", "length": 0},
        {"how": "flood", "chunk": UNASKED},
        {"how": "flood", "chunk": "00", "chunks": 1000},
        {"protocol": 99},
    ],
    ids=lambda it: "-".join(str(value)[:10] for value in it.values()),
)
def test_nothing_is_given_to_a_candidate_while_the_stored_host_fails(
    behaviour: dict[str, Any], lab: SshLab, caller: Caller
) -> None:
    lab.h1.set_behaviour(**behaviour)
    lab.h2.set_behaviour(holds=["net-42"])
    fields = {"mac": "02:01:00:cc:00:03", "nic_id": "7", "password": "Sesame-1"}
    for command in ("ensure-network-device", "save-password"):
        ended = caller.call(command, details(lab, caller, f"{H2},{H1}"), stored_details(H1), fields, timeout=3)
        assert ended.status == 2, ended
        assert ended.line.isprintable()
        assert "Sesame" not in ended.line
    # It is only asked whether it has the scope and a proof of that.
    assert {(it["command"], it["payload"]) for it in lab.h2.calls_received(but="")} <= {("locate", "{}")}


@pytest.mark.mutation("a-hosts-text-is-not-printed", instead="reply.output")
def test_a_hosts_text_is_not_printed(lab: SshLab, caller: Caller) -> None:
    """CloudStack would store the URI with the network and all its NICs."""
    forged = '{"network.broadcast_uri":"vlan://1301","status":"success"}'
    commands = ("implement-network", "prepare-nic", "assign-ip", "shutdown-network", "destroy-network")
    lab.h1.set_behaviour(holds=["net-42"], replies={command: {"output": forged} for command in commands})
    fields = {"vlan": "1204", "gateway": "10.10.1.1", "cidr": "10.10.1.0/24", "mac": "02:01:00:cc:00:03"}
    public = {"public_ip": "203.0.113.5", "public_vlan": "vlan://101", "public_cidr": "203.0.113.0/24"}
    for command in commands:
        ended = caller.call(command, details(lab, caller, H1), stored_details(H1), {**fields, **public})
        assert (ended.status, ended.output) == (0, ""), command


def test_a_frame_that_is_too_long_ends_the_call_and_takes_no_memory(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(holds=["net-42"], how="frame", length=0x3FFFFFFF)
    ended = caller.call("prepare-nic", details(lab, caller, H1), stored_details(H1), {"mac": "02:01:00:cc:00:03"})
    assert ended.status == 2
    assert "frame that is too long" in ended.line


@pytest.mark.mutation("a-host-off-the-list-keeps-its-networks", instead="_anywhere(now)")
def test_defect_60_a_host_removed_from_the_list_keeps_its_networks(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(holds=["net-42"])
    assert chosen_host(caller.ensure(details(lab, caller, H2), stored_details(H1))) == H1
    lab.h1.set_behaviour()
    assert chosen_host(caller.ensure(details(lab, caller, H2), stored_details(H1))) == H2


def test_removing_an_unknown_network_succeeds_without_a_call(lab: SshLab, caller: Caller) -> None:
    port = {"public_ip": "203.0.113.5", "public_port": "22", "private_ip": "10.1.1.5", "private_port": "22"}
    for command in ("shutdown-network", "release-ip", "delete-port-forward"):
        assert caller.call(command, details(lab, caller), None, {**port, "protocol": "tcp"}).output == ""
    assert lab.h1.calls_received() == lab.h2.calls_received() == []


def test_destroy_is_sent_to_all_hosts(lab: SshLab, caller: Caller) -> None:
    assert (
        caller.call("destroy-network", details(lab, caller, f"{H1},{H2},10.99.0.99"), stored_details(H1)).output == ""
    )
    (first,), (second,) = lab.h1.calls_received(), lab.h2.calls_received()
    assert first["command"] == second["command"] == "destroy-network"


def test_destroy_fails_while_the_stored_host_is_down(lab: SshLab, caller: Caller) -> None:
    ended = caller.call("destroy-network", details(lab, caller), stored_details("10.99.0.99"))
    assert ended.status == 2
    assert ended.line.startswith("10.99.0.99: ")
    assert [call["command"] for call in (*lab.h1.calls_received(), *lab.h2.calls_received())] == ["destroy-network"] * 2


def test_destroy_fails_when_one_host_fails(lab: SshLab, caller: Caller) -> None:
    lab.h2.set_behaviour(replies={"destroy-network": {"status": 3, "error": "link is busy"}})
    ended = caller.call("destroy-network", details(lab, caller), stored_details(H1))
    assert (ended.status, ended.line) == (3, f"{H2}: link is busy")
    assert len(lab.h1.calls_received()) == 1


@pytest.fixture
def mixed(lab: SshLab) -> Iterator[SshLab]:
    """A lab whose second host has no agent program: MIXED_AGENT exists on the first one only."""
    program = lab.h1.run_directory / "netloom-agent"
    standin = Path(__file__).with_name("standin.py")
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {standin} "$@"\n')
    program.chmod(0o755)
    yield lab
    program.unlink()
    for host in (lab.h1, lab.h2):
        shutil.rmtree(host.run_directory / "netns", ignore_errors=True)


MIXED_AGENT = "/run/netloom-agent agent"
PORT = {"public_ip": "203.0.113.5", "public_port": "22", "private_ip": "10.1.1.5", "private_port": "22"}
FORWARD = {**PORT, "protocol": "tcp"}


def test_a_removal_reaches_the_host_with_the_program_and_the_other_holds_nothing(mixed: SshLab, caller: Caller) -> None:
    mixed.h1.set_behaviour(holds=["net-42"])
    for stored in (None, stored_details(H1), stored_details(H2)):
        done = caller.call("destroy-network", details(mixed, caller), stored, agent=MIXED_AGENT)
        assert (done.output, done.took_s < 20) == ("", True)
    assert caller.call("delete-port-forward", details(mixed, caller), None, FORWARD, agent=MIXED_AGENT).output == ""
    received = [call["command"] for call in mixed.h1.calls_received()]
    assert received == ["destroy-network"] * 3 + ["delete-port-forward"]
    only_bare = details(mixed, caller, H2)
    for command in ("destroy-network", "delete-port-forward", "shutdown-network", "ensure-network-device"):
        assert caller.call(command, only_bare, stored_details(H2), FORWARD, agent=MIXED_AGENT).status == 0, command


def test_a_network_left_on_a_host_without_the_program_fails_its_removal(mixed: SshLab, caller: Caller) -> None:
    (mixed.h2.run_directory / "netns" / "cs-net-42").mkdir(parents=True)
    for command in ("destroy-network", "delete-port-forward"):
        ended = caller.call(command, details(mixed, caller), None, FORWARD, agent=MIXED_AGENT)
        assert ended.status == 3
        assert ended.line.startswith(f"{H2}: net-42 is still on this host (/run/netns/cs-net-42), and netloom is not")


@pytest.mark.mutation("a-program-that-fails-may-hold-something")
@pytest.mark.parametrize("status", [3, 126, 127])
def test_a_program_that_does_not_start_is_not_taken_for_a_missing_one(
    status: int, mixed: SshLab, caller: Caller
) -> None:
    program = mixed.h1.run_directory / "netloom-agent"
    program.write_text(f"#!/bin/sh\nexit {status}\n")
    for command in ("destroy-network", "delete-port-forward"):
        ended = caller.call(command, details(mixed, caller, H1), stored_details(H1), FORWARD, agent=MIXED_AGENT)
        assert (ended.status, ended.line.startswith(f"{H1}: ")) == (2, True)


def test_when_no_host_answers_all_hosts_are_named(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour("refuse")
    ended = caller.ensure(details(lab, caller, f"{H1},10.99.0.99", port=KEYS))
    assert ended.status == 2
    assert ended.line.startswith("none of the hosts answers: ")
    assert "10.99.0.11: the agent did not start" in ended.line
    assert "10.99.0.99: no connection to port" in ended.line


def test_a_vpc_and_its_tier_share_a_host_and_a_namespace(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(holds=["vpc-7"])
    payload = {"network_id": "", "vpc_id": "7", "current_details": "{}"}
    ended = caller.call("ensure-network-device", details(lab, caller), None, payload)
    assert ended.output == '{"host":"10.99.0.11","namespace":"cs-vpc-7","vpc_id":"7"}'


def test_the_owner_is_built_from_directory_and_physical_network(lab: SshLab, caller: Caller) -> None:
    assert caller.call("implement-network", details(lab, caller), stored_details(H1)).output == ""
    assert caller.call("implement-network", details(lab, caller, owner="east"), stored_details(H1)).output == ""
    assert [call["owner"] for call in lab.h1.calls_received()] == ["netloom/phys-1", "east"]
    assert "netloom/phys-1" not in caller.log


@pytest.mark.mutation("registration-does-not-cross-the-wire", instead="payload_file")
def test_defect_17_registration_secrets_are_not_sent_to_hosts(lab: SshLab, caller: Caller) -> None:
    given = details(lab, caller, password="hunter2 hunter2")
    assert caller.call("implement-network", given, stored_details(H1)).output == ""
    sent = json.dumps(lab.h1.calls_received(but=""))
    assert "hunter2" not in sent
    assert "PRIVATE" not in sent


def test_hosts_get_the_public_half_of_what_signs_placements_and_their_own_name(lab: SshLab, caller: Caller) -> None:
    given = details(lab, caller, password="hunter2 hunter2")
    assert caller.call("implement-network", given, stored_details(H1)).output == ""
    told = {tuple(call["signers"]) for call in lab.h1.calls_received(but="")}
    ((host, *keys),) = told
    assert host == H1
    registered = asyncssh.import_private_key(lab.key("good")).convert_to_public()
    public = [asyncssh.import_public_key(bytes.fromhex(it)) for it in keys]
    assert [it.get_algorithm() for it in public] == [registered.get_algorithm(), "ssh-ed25519"]
    assert public[0] == registered
