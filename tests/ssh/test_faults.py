"""Silent, dead, outdated or misbehaving hosts and agents: one error line, status 2, before the caller's deadline."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from typing import Any

import pytest

from ssh.lab import BLACK_HOLE, BUSY, KEYS, MANAGEMENT, MUTE, Caller, SshLab

STORED = {"host": "10.99.0.11", "namespace": "cs-net-42"}

SILENT: dict[str, tuple[dict[str, Any], str]] = {
    "packets are dropped": ({"port": BLACK_HOLE}, f"10.99.0.11: port {BLACK_HOLE} does not answer within"),
    "a listener is mute": ({"port": MUTE}, f"10.99.0.11: port {MUTE} is open, but no SSH answers within"),
    "the resolver is silent": ({"hosts": "kvm1.example"}, "kvm1.example: its name is not resolved within"),
}


@pytest.mark.mutation("a-call-ends-before-cloudstacks-limit", instead="started + 8")
@pytest.mark.parametrize("case", SILENT)
def test_defect_53_a_call_ends_before_its_deadline(case: str, lab: SshLab, caller: Caller) -> None:
    details, said = SILENT[case]
    timeout = 4
    ended = caller.ensure(caller.details(sshkey=lab.key("good"), **details), timeout=timeout)
    assert ended.status == 2
    assert said in ended.line
    assert ended.took_s < timeout


def test_silent_hosts_are_reported_long_before_the_deadline(lab: SshLab, caller: Caller) -> None:
    """All hosts are queried in parallel, so a call does not wait for its whole deadline."""
    details = caller.details(hosts="10.99.0.11, 10.99.0.12", sshkey=lab.key("good"), port=BLACK_HOLE)
    ended = caller.ensure(details, timeout=18)
    assert ended.status == 2
    assert ended.line.startswith("none of the hosts answers: ")
    assert ended.line.count(f": port {BLACK_HOLE} does not answer within") == 2
    assert ended.took_s < 12


@pytest.mark.mutation("a-network-of-a-silent-host-stays", instead="Use(now.order[-1])")
def test_defect_59_a_network_of_a_silent_host_is_not_moved(lab: SshLab, caller: Caller) -> None:
    details = caller.details(hosts="10.99.0.11, 10.99.0.12", sshkey=lab.key("good"), port=KEYS)
    lab.h1.set_behaviour("silent")
    ended = caller.ensure(details, STORED, timeout=6)
    assert ended.status == 2
    assert ended.line.startswith("10.99.0.11: SSH is fine, but the agent does not answer within")
    assert "net-42 lives on 10.99.0.11 and was not moved: bring that host back" in ended.line
    assert ended.took_s < 6


@pytest.mark.parametrize(("host", "why"), [("10.99.0.99", "No route to host"), ("10.99.0.11", "Connection refused")])
def test_an_unreachable_host_is_reported_at_once(host: str, why: str, lab: SshLab, caller: Caller) -> None:
    ended = caller.ensure(caller.details(sshkey=lab.key("good"), hosts=host, port="2999"), timeout=30)
    assert ended.status == 2
    assert ended.line.startswith(f"{host}: no connection to port 2999: {why} (")


def test_a_hung_agent_gives_status_2_before_the_deadline(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour("hang", on=["implement-network"])
    ended = caller.call("implement-network", caller.details(sshkey=lab.key("good")), STORED, timeout=6)
    assert ended.status == 2
    assert ended.line.startswith("10.99.0.11: its agent did not answer implement-network within")
    assert "/var/log/netloom/agent.log" in ended.line
    assert ended.took_s < 6
    (call,) = lab.h1.calls_received()
    assert 0 < call["remaining_ms"] < 5000  # the agent's deadline is before ours


def test_a_stopped_ssh_server_gives_status_2_before_the_deadline(lab: SshLab, caller: Caller) -> None:
    """The host is disconnected during a call, like a hung machine that answers no packet of an open connection."""
    lab.h1.set_behaviour("hang", on=["implement-network"])
    process, began = caller.start_and_wait_for_call(caller.details(sshkey=lab.key("good")), 6, lab.h1, STORED)
    with lab.disconnected(lab.h1):
        ended = caller.finish(process, began)
    assert ended.status == 2
    assert "10.99.0.11: " in ended.line
    assert ended.took_s < 6


def test_a_call_whose_connection_breaks_is_repeated_once_with_its_id(lab: SshLab, caller: Caller) -> None:
    """The agent answers a repeated call from memory, so the work is done once."""
    lab.h1.set_behaviour("die-once", on=["implement-network"])
    assert caller.call("implement-network", caller.details(sshkey=lab.key("good")), STORED).output == ""
    first, second = lab.h1.calls_received()
    assert first["call_id"] == second["call_id"]
    assert second["remaining_ms"] < first["remaining_ms"]


def test_a_second_broken_connection_gives_status_2(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour("die", on=["implement-network"])
    ended = caller.call("implement-network", caller.details(sshkey=lab.key("good")), STORED)
    assert ended.status == 2
    assert ended.line.startswith("10.99.0.11: the connection to the agent broke")
    assert "during implement-network, and again" in ended.line
    assert len(lab.h1.calls_received()) == 2


@pytest.mark.parametrize("noise", ["Welcome to kvm1!\n", "\n", "*** 1234 ***\n", "\x00\x00\x00\x04abcd"])
def test_output_of_a_login_shell_is_reported(noise: str, lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour("noise", noise=noise)
    ended = caller.ensure(caller.details(sshkey=lab.key("good")))
    assert ended.status == 2
    assert ended.line.startswith("10.99.0.11: ")
    if noise.isprintable() or noise.endswith("\n"):
        assert "the login shell prints text before the agent speaks" in ended.line
        assert ".bashrc" in ended.line


def test_an_incompatible_protocol_error_names_both_versions(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(protocol=2)
    ended = caller.ensure(caller.details(sshkey=lab.key("good")))
    assert ended.status == 2
    assert "10.99.0.11: its agent (netloom 9.9) speaks protocol 2, this server" in ended.line
    assert "bring netloom up to date on this server" in ended.line


def test_a_newer_agent_that_supports_our_protocol_is_used(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour(protocol=7, oldest=1)
    assert json.loads(caller.ensure(caller.details(sshkey=lab.key("good"))).output)["host"] == "10.99.0.11"


def test_the_error_of_an_agent_that_cannot_start_is_quoted(lab: SshLab, caller: Caller) -> None:
    lab.h1.set_behaviour("refuse")
    ended = caller.ensure(caller.details(sshkey=lab.key("good")))
    assert ended.status == 2
    assert "it ended with status 3: netloom agent: the socket is on fire" in ended.line


REPLIES: list[tuple[dict[str, Any], int, str]] = [
    ({"status": 3, "error": "nft: no such table", "hint": "load nf_tables"}, 3, "nft: no such table (load nf_tables)"),
    ({"status": 1, "error": "payload.vlan is empty"}, 1, "payload.vlan is empty"),
    ({"status": 255, "error": "ip: exit 255"}, 3, "ip: exit 255"),  # defect 56: not an SSH error
    ({"status": 3}, 3, "the agent failed and did not say why"),  # defect 55
    ({"status": 3, "error": "zwei\nZeilen \x1b[31m \u00fc"}, 3, r"zwei Zeilen \x1b[31m \xfc"),
]


@pytest.mark.mutation("a-refusal-of-the-host-is-status-3", instead="2")
@pytest.mark.parametrize(("reply", "status", "said"), REPLIES)
def test_defect_56_an_error_of_the_agent_is_printed_as_one_line(
    reply: dict[str, Any], status: int, said: str, lab: SshLab, caller: Caller
) -> None:
    lab.h1.set_behaviour(replies={"implement-network": reply})
    ended = caller.call("implement-network", caller.details(sshkey=lab.key("good")), STORED)
    assert (ended.status, ended.line) == (status, f"10.99.0.11: {said}")


def test_output_is_printed_where_the_protocol_defines_one(lab: SshLab, caller: Caller) -> None:
    """It is computed here: the answer of the host is not printed."""
    forged = json.dumps({"network.broadcast_uri": "vlan://1301"})
    lab.h1.set_behaviour(replies={name: {"output": forged} for name in ("implement-network", "assign-ip")})
    details = caller.details(sshkey=lab.key("good"), **{"network.broadcast": "vlan"})
    ended = caller.call("implement-network", details, STORED, {"vlan": "1204"})
    assert json.loads(ended.output)["network.broadcast_uri"] == "vlan://1204"
    assert caller.call("assign-ip", details, STORED, {"public_ip": "203.0.113.5"}).output == ""


@pytest.mark.mutation("a-signal-ends-the-call")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_defect_54_a_signal_ends_the_call_at_once(
    number: signal.Signals, status: int, lab: SshLab, caller: Caller
) -> None:
    lab.h1.set_behaviour("hang", on=["implement-network"])
    process, began = caller.start_and_wait_for_call(caller.details(sshkey=lab.key("good")), 600, lab.h1, STORED)
    process.send_signal(number)
    ended = caller.finish(process, began)
    assert ended.status == status
    assert ended.line == f"ended by {number.name} while waiting for 10.99.0.11"
    assert f"status={status}" in caller.log


def test_a_call_without_a_log_still_works(lab: SshLab, caller: Caller) -> None:
    (caller.home / "netloom.log").mkdir()
    assert json.loads(caller.ensure(caller.details(sshkey=lab.key("good"))).output)["host"] == "10.99.0.11"


def test_a_connection_dropped_by_maxstartups_is_retried(lab: SshLab, caller: Caller) -> None:
    """OpenSSH's MaxStartups closes new connections before login while too many others have not logged in yet."""
    path = caller.payload(caller.details(sshkey=lab.key("good"), port=BUSY), payload={"current_details": "{}"})
    before = len(lab.h1.logins())
    with subprocess.Popen(
        ["ip", "netns", "exec", MANAGEMENT, "nc", lab.h1.address, str(BUSY)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().startswith(b"SSH-2.0")
        began = time.monotonic()
        call = caller.start("ensure-network-device", str(path), "60")
        while "past MaxStartups" not in lab.h1.logins()[before:]:
            assert call.poll() is None and time.monotonic() < began + 30
            time.sleep(0.01)
        other.kill()
    assert json.loads(caller.finish(call, began).output)["host"] == "10.99.0.11"


@pytest.mark.mutation(
    "a-command-is-one-channel",
    instead="await inquiry.look(situation, host) and await hosts.call(host, call)",
)
def test_defect_66_a_command_uses_one_connection_and_one_channel(lab: SshLab, caller: Caller) -> None:
    before = len(lab.h1.logins())
    assert caller.call("implement-network", caller.details(sshkey=lab.key("good")), STORED).output == ""
    log = lab.h1.logins()[before:]
    assert log.count("Accepted publickey") == 1
    assert [call["command"] for call in lab.h1.calls_received(but="")] == ["locate", "implement-network"]


def test_a_large_payload_arrives_completely(lab: SshLab, caller: Caller) -> None:
    rule = {"type": "egress", "protocol": "tcp", "portStart": 22, "portEnd": 22, "sourceCidrs": [], "destCidrs": []}
    rules = {"rules": [{"id": n, **rule} for n in range(20_000)], "default_egress_allow": True, "cidr": "10.0.0.0/24"}
    assert (
        caller.call("apply-fw-rules", caller.details(sshkey=lab.key("good")), STORED, {"fw_rules": rules}).output == ""
    )
    (call,) = lab.h1.calls_received()
    assert json.loads(call["payload"])["fw_rules"]["rules"][-1]["id"] == 19_999
