"""Custom actions through a real agent: output of the built-in actions, repairs, and hooks of the operator."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kernel.agent_host import NO_CHECKS, AgentHost, act, agent_host, done, message, wait_until
from kernel.isolated_network import FIRST_LIFE, NS, kernel, live
from netloom.commands.actions import OUTPUT_CHARACTERS_MAX
from netloom.wire import Reply

WEB = "10.10.1.45"
PASSWORD = "not-for-anybody-4711"
ECHO = """
import socket
server = socket.create_server(("203.0.113.1", 7000))
client, _ = server.accept()
while said := client.recv(100):
    client.sendall(said)
"""


@pytest.fixture(scope="module")
def host() -> Iterator[AgentHost]:
    """A host with the network. Tests that use it restore its state."""
    with agent_host() as it:
        it.start(*NO_CHECKS)
        live(it)
        it.plug("web", "breth1-1204", "02:01:00:cc:00:03", f"{WEB}/24")
        it.run("ip", "route", "add", "default", "via", "10.10.1.1", namespace="web")
        (it.path("/var/lib/netloom/hooks")).mkdir(mode=0o755)
        yield it


def write_hook(host: AgentHost, action: str, text: str, mode: int = 0o755) -> None:
    path = host.path(f"/var/lib/netloom/hooks/custom-action-{action}.sh")
    path.write_text(text)
    path.chmod(mode)


# ------------------------------------------------------------------------------------------------------ what is shown


def test_dump_config_shows_everything_except_secrets(host: AgentHost) -> None:
    done(host.call("030", "prepare-nic"))
    done(host.call("090", "save-password", password=PASSWORD))
    done(
        host.call(
            "035", "save-vm-data", vm_data=[{"dir": "userdata", "file": "user_data", "content": "#!\n" + PASSWORD}]
        )
    )
    told = done(act(host, "dump-config")).output
    assert PASSWORD not in told
    for it in ("10.10.1.1/24 on gst-204", "203.0.113.21/32 on pub-101", "table 20001", "chain arriving", "vnetg204"):
        assert it in told
    assert '"password": "***"' in told
    assert '"user_data": "(23 bytes)"' in told
    assert (
        f'"revision": {json.loads(host.path("/var/lib/netloom/scopes/net-204.json").read_bytes())["revision"]}' in told
    )
    assert len(told) < OUTPUT_CHARACTERS_MAX + 2000
    assert WEB in message(act(host, "leases"))
    assert "owner test" in message(act(host, "show"))


@pytest.mark.mutation("a-page-holds-a-thousand-rules", instead="480")
def test_defect_42_a_thousand_rules_are_listed(host: AgentHost) -> None:
    rules: list[dict[str, Any]] = [
        {
            "id": at,
            "type": "ingress",
            "protocol": "tcp",
            "portStart": 1000 + at,
            "portEnd": 1000 + at,
            "publicIp": "203.0.113.21",
            "sourceCidrs": [f"198.51.{at // 250}.{at % 250}/32"],
        }
        for at in range(1000)
    ]
    done(host.call("070", "apply-fw-rules", fw_rules={"default_egress_allow": True, "rules": rules}))
    told = message(act(host, "list-firewall-rules"))
    assert len(told) <= OUTPUT_CHARACTERS_MAX + 100
    shown = told.splitlines()
    skip = shown[-1].partition("skip=")[2].partition(",")[0]
    rest = message(act(host, "list-firewall-rules", skip=skip)).splitlines()
    for it in rules:
        assert f"ingress 203.0.113.21 tcp {it['portStart']} from {it['sourceCidrs'][0]}: allow" in shown[:-1] + rest
    assert act(host, "list-firewall-rules", skip="x").status == 1
    assert message(act(host, "list-firewall-rules", filter="tcp 1999 ")) == (
        "ingress 203.0.113.21 tcp 1999 from 198.51.3.249/32: allow"
    )
    # Rules that differ only in the port are listed as one line.
    for it in rules:
        it["sourceCidrs"] = []
    done(host.call("070", "apply-fw-rules", fw_rules={"default_egress_allow": False, "rules": rules}))
    lines = message(act(host, "list-firewall-rules")).splitlines()
    assert lines[0].startswith("ingress 203.0.113.21 tcp 1000,1001,")
    assert lines[0].endswith(",1999 from any: allow")
    assert lines[1:] == [
        "ingress anything else: deny",
        "egress of network 204, anything else: deny",
        "source-nat 10.10.1.0/24 leaves as 203.0.113.20",
        "static-nat 203.0.113.22 <-> 10.10.1.162",
        "port-forward 203.0.113.21 tcp 2222 -> 10.10.1.45 22",
    ]
    done(host.call(*FIRST_LIFE[-1]))


def test_check_lists_the_repair_steps_without_applying_them(host: AgentHost) -> None:
    assert message(act(host, "check")) == "nothing to do: all is as it should be"
    # A sysctl causes no event. Any other change would be repaired before the check.
    host.run("sysctl", "-qw", "net.ipv4.conf.pub-101.rp_filter=1", namespace=NS)
    before = kernel(host)
    assert message(act(host, "check")) == f"set net.ipv4.conf.pub-101.rp_filter = 0 in {NS}"
    assert "1 things are not as they should be" in message(act(host, "show"))
    assert kernel(host) == before
    message(act(host, "reboot-device"))
    assert message(act(host, "check")) == "nothing to do: all is as it should be"


# --------------------------------------------------------------------------------------------------------- the repair


def test_reboot_device_keeps_state_and_open_connections(host: AgentHost) -> None:
    host.run("ip", "addr", "add", "203.0.113.1/24", "dev", "sw-eth2.101", pid=host.fabric)
    server = subprocess.Popen(["nsenter", "-t", str(host.fabric), "-n", "--", sys.executable, "-c", ECHO])
    client = None
    try:
        wait_until(lambda: ":7000" in host.run("ss", "-Hltn", pid=host.fabric))
        client = subprocess.Popen(
            [
                "nsenter",
                "-t",
                str(host.pid),
                "-n",
                "-m",
                "--",
                "ip",
                "netns",
                "exec",
                "web",
                "nc",
                "203.0.113.1",
                "7000",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        into, out = client.stdin, client.stdout
        assert into is not None
        assert out is not None

        def echo(text: bytes) -> bytes:
            into.write(text)
            into.flush()
            return out.readline()

        assert echo(b"before\n") == b"before\n"
        message(act(host, "reboot-device"))  # from here the chains have the order of a recreated table
        before = kernel(host)
        host.run("nft", "add", "rule", "inet", "netloom", "through", "drop", namespace=NS)  # a manual change
        assert kernel(host) != before
        assert "links down and up" in message(act(host, "reboot-device"))
        assert kernel(host) == before
        assert echo(b"after\n") == b"after\n"
    finally:
        for it in (client, server):
            if it is not None:
                it.kill()
                it.communicate()


def test_reboot_device_restarts_the_services(host: AgentHost) -> None:
    for fixture, command in (("030", "prepare-nic"), ("033", "config-dns-subnet")):
        done(host.call(fixture, command))
    (pid,) = host.processes("dnsmasq")
    assert f"dns-204 (pid {pid})" in message(act(host, "show"))
    message(act(host, "reboot-device"))
    (other,) = host.processes("dnsmasq")
    assert other != pid
    assert message(act(host, "check")) == "nothing to do: all is as it should be"


# ---------------------------------------------------------------------------------------------------------- the hooks


def test_a_hook_gets_the_payload_and_its_output_is_the_reply(host: AgentHost) -> None:
    write_hook(
        host,
        "tell",
        '#!/bin/sh\ncat "$1" "$1" >/run/told\necho "$NETLOOM_ACTION $NETLOOM_SCOPE $NETLOOM_NAMESPACE"\n'
        "ip netns exec $NETLOOM_NAMESPACE ip -br addr show gst-204\nprintf 'na\\303\\257ve\\n'; echo aside >&2\n",
    )
    told = done(act(host, "tell", table="101", note="a 'b' $(c)")).output.splitlines()
    assert told[0] == "tell net-204 cs-net-204"
    assert "10.10.1.1/24" in told[1]
    assert told[2:] == ["na\\u00efve"]
    handed = host.path("/run/told").read_text()
    assert handed[: len(handed) // 2] == handed[len(handed) // 2 :]
    payload = json.loads(handed[: len(handed) // 2])
    assert payload["action-params"] == {"table": "101", "note": "a 'b' $(c)"}
    assert payload["network_id"] == "204"
    assert not [key for key in payload if "details" in key]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("echo out; echo first >&2; echo 'the last' >&2; exit 7", "hook bad failed with status 7: the last"),
        ("echo only; exit 1", "hook bad failed with status 1: only"),
        ("exit 1", "hook bad failed with status 1, without a message"),
        ("kill -9 $$", "hook bad was killed by signal 9, without a message"),
        ('echo \'{"status": "failed", "message": "no"}\'', "hook bad says status 'failed': no"),
    ],
)
def test_a_failing_hook_is_reported_with_its_last_line(host: AgentHost, text: str, error: str) -> None:
    write_hook(host, "bad", f"#!/bin/sh\n{text}\n")
    reply = act(host, "bad")
    assert (reply.status, reply.error, reply.output) == (3, error, "")


def test_a_hook_and_its_children_are_killed_at_the_deadline(host: AgentHost) -> None:
    write_hook(host, "slow", "#!/bin/sh\nsleep 4711 & sleep 4711\n")
    replies: list[Reply] = []
    begun = time.monotonic()
    caller = threading.Thread(target=lambda: replies.append(act(host, "slow", remaining_ms=2_000)))
    caller.start()
    wait_until(lambda: len(host.processes("sleep", "4711")) == 2 or time.monotonic() - begun > 2)
    # Commands of the network are executed meanwhile. On a busy machine the deadline may have come before.
    done(host.call(*FIRST_LIFE[0]))
    assert not replies or time.monotonic() - begun > 2
    caller.join(60)
    assert (replies[0].status, replies[0].error) == (3, "hook slow was killed: it did not end in the time of the call")
    wait_until(lambda: not host.processes("sleep", "4711"))


def test_background_processes_of_a_hook_do_not_delay_the_reply(host: AgentHost) -> None:
    write_hook(host, "leaves", "#!/bin/sh\nsleep 4712 &\necho done\n")
    assert done(act(host, "leaves")).output == "done"
    wait_until(lambda: not host.processes("sleep", "4712"))


def test_long_hook_output_is_truncated_and_the_hook_runs_to_its_end(host: AgentHost) -> None:
    write_hook(host, "loud", "#!/bin/sh\nhead -c 3000000 /dev/zero | tr '\\0' x\ntouch /run/loud-ended\n")
    told = done(act(host, "loud")).output
    assert told.endswith(f"... cut here, after {OUTPUT_CHARACTERS_MAX} characters")
    assert host.path("/run/loud-ended").exists()


def test_unsafe_hook_files_are_not_executed(host: AgentHost) -> None:
    write_hook(host, "loose", "#!/bin/sh\necho ran\n", 0o775)
    assert "users other than root may write to it" in act(host, "loose").error
    write_hook(host, "mine", "#!/bin/sh\necho ran\n", 0o644)
    assert "not executable" in act(host, "mine").error
    path = host.path("/var/lib/netloom/hooks/custom-action-link.sh")
    path.symlink_to("/bin/true")
    assert "not a plain file" in act(host, "link").error
    write_hook(host, "text", "echo ran\n")
    assert "cannot be run" in act(host, "text").error
    for it in ("loose", "mine", "link", "text"):
        host.path(f"/var/lib/netloom/hooks/custom-action-{it}.sh").unlink()


def test_unknown_actions_and_unknown_scopes_are_errors(host: AgentHost) -> None:
    write_hook(host, "known", "#!/bin/sh\n")
    assert done(act(host, "known")).output == ""
    unknown = act(host, "reboot")
    assert (unknown.status, unknown.error) == (1, "custom-action reboot: there is no such action on this host")
    assert {"known", "dump-config"} <= set(unknown.hint.removeprefix("known: ").split(", "))
    assert act(host, "../known").status == 1
    for vpcs in ("502", "503"):
        assert act(host, "dump-config", vpcs).error == (
            "custom-action dump-config: nothing is known of vpc-7 on this host"
        )
    assert "belongs to" in act(host, "dump-config", owner="somebody").error


def test_actions_without_stored_state_fail_and_create_nothing() -> None:
    with agent_host() as it:
        it.start()
        before = it.inventory()
        for action in ("dump-config", "reboot-device", "check"):
            reply = act(it, action, "504")
            assert (reply.status, reply.holds) == (3, False)
            assert reply.error == f"custom-action {action}: nothing is known of net-204 on this host"
        assert it.inventory() == before
        done(it.call("053", "add-port-forward"))  # stored but not implemented: a rule alone builds nothing
        assert "is shut down" in act(it, "reboot-device").error
        assert "not implemented" in message(act(it, "show"))
        assert message(act(it, "counters")) == "no public address stands"
        assert "== found: nftables\n  (none)" in done(act(it, "dump-config")).output


def test_counters_keep_their_values_when_rules_change() -> None:
    with agent_host() as it:
        it.start()
        for fixture, command in (("020", "implement-network"), ("021", "assign-ip"), ("050", "assign-ip")):
            done(it.call(fixture, command))
        it.run("ip", "addr", "add", "203.0.113.1/24", "dev", "sw-eth2.101", pid=it.fabric)
        it.run("ping", "-c3", "-i0.2", "-W1", "203.0.113.20", pid=it.fabric, check=False)
        told = message(act(it, "counters", "501", network_id="204"))
        assert "203.0.113.20: in 3 packets, 252 bytes; out 0 packets, 0 bytes" in told
        assert "203.0.113.21: in 0 packets" in told
        done(it.call("070", "apply-fw-rules"))
        done(it.call("060", "release-ip"))
        it.run("ping", "-c2", "-i0.2", "-W1", "203.0.113.20", pid=it.fabric)
        told = message(act(it, "counters", "501", network_id="204"))
        assert "203.0.113.20: in 5 packets, 420 bytes; out 2 packets, 168 bytes" in told
        assert "203.0.113.21" not in told

        def refused() -> bool:
            # Delete the table on every attempt, because the periodic check may have just restored it.
            it.run("nft", "delete", "table", "inet", "netloom", namespace=NS, check=False)
            reply = act(it, "counters", "501", network_id="204")
            return reply.status == 3 and reply.error.startswith("nftables: ")

        wait_until(refused)


def test_traffic_of_vpc_addresses_is_counted() -> None:
    with agent_host("eth1.1310", "eth1.1311", "eth2.101") as it:
        it.start()
        for fixture, command in (("202", "implement-vpc"), ("210", "implement-network"), ("211", "assign-ip")):
            done(it.call(fixture, command))
        it.run("ip", "addr", "add", "203.0.113.1/24", "dev", "sw-eth2.101", pid=it.fabric)
        it.plug("vm", "breth1-1310", "02:01:00:cc:07:03", "10.20.1.45/24")
        it.run("ip", "route", "add", "default", "via", "10.20.1.1", namespace="vm")
        # The device does not answer these.
        it.run("ping", "-c2", "-i0.2", "-W1", "203.0.113.30", pid=it.fabric, check=False)
        it.run("ping", "-c3", "-i0.2", "-W5", "203.0.113.1", namespace="vm")
        told = message(act(it, "counters", "502"))
        assert told == "203.0.113.30: in 5 packets, 420 bytes; out 3 packets, 252 bytes"
