"""What a VM meets in a network that the agent keeps: lease, names, metadata, password; and what it never notices."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from kernel.agent_host import AgentHost, agent_host, wait_until
from kernel.test_agent_network import FIRST_LIFE, NS, done, steps

SERVER = "10.10.1.1"
BRIDGE = "breth1-1204"
WEB, WEB_MAC, WEB_IP = "web", "02:01:00:cc:00:03", "10.10.1.45"
DB, DB_MAC, DB_IP = "db", "02:01:00:cc:00:04", "10.10.1.162"
DB_NIC = {
    "nic_id": "5102",
    "nic_uuid": "6b7c2a10-0000-4000-8000-000000005102",
    "mac": DB_MAC,
    "ip": DB_IP,
    "hostname": "win-db-1",
}
DEPLOY = [
    ("030", "prepare-nic"),
    ("031", "config-dhcp-subnet"),
    ("032", "add-dhcp-entry"),
    ("033", "config-dns-subnet"),
    ("034", "add-dns-entry"),
    ("035", "save-vm-data"),
]
FILE = "/var/lib/netloom/scopes/net-204.json"
PASSWORD = "FAKE-pass-4711"

UDHCPC = """#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr replace "$ip/$mask" dev "$interface"
[ -z "$router" ] || ip route replace default via "$router"
echo "ip=$ip router=$router dns=$(echo $dns | tr ' ' ,) domain=$domain hostname=$hostname lease=$lease server=$serverid"
"""


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start()
        live(it)
        yield it


def live(host: AgentHost) -> None:
    """The isolated network with a VM deployed on it, and plugged in."""
    with host.client() as client:
        for fixture, command in FIRST_LIFE[:3] + DEPLOY:
            done(client.call(fixture, command))
    host.plug(WEB, BRIDGE, WEB_MAC)
    script = host.path("/run/udhcpc")
    script.write_text(UDHCPC)
    script.chmod(0o755)


def deploy_db(host: AgentHost) -> None:
    done(host.call("041", "prepare-nic"))
    done(host.call("032", "add-dhcp-entry", **DB_NIC))
    done(host.call("034", "add-dns-entry", **DB_NIC))
    items = [{"dir": "metadata", "file": "instance-id", "content": "i-db"}]
    done(host.call("035", "save-vm-data", **DB_NIC, vm_data=items))
    host.plug(DB, BRIDGE, DB_MAC)


def lease(host: AgentHost, vm: str, *, check: bool = True) -> dict[str, str]:
    """What busybox's DHCP client is given."""
    words = ["busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "8", "-T", "1", "-s", "/run/udhcpc"]
    said = host.run(*words, "-x", "hostname:x", namespace=vm, check=check)
    line = next((line for line in said.splitlines() if line.startswith("ip=")), "")
    return dict(word.partition("=")[::2] for word in line.split(" ") if "=" in word)


def get(host: AgentHost, vm: str, path: str, *more: str, port: int = 80) -> str:
    words = ["curl", "-s", "--fail", "--max-time", "5", *more, f"http://{SERVER}:{port}{path}"]
    return host.run(*words, namespace=vm, check=False)


def password(host: AgentHost, vm: str, word: str) -> str:
    return get(host, vm, "/", "-H", f"DomU_Request: {word}", port=8080).strip()


def lookup(host: AgentHost, vm: str, name: str) -> str:
    """The address, or the name, that the network's resolver has."""
    said = host.run("busybox", "nslookup", name, SERVER, namespace=vm, check=False)
    answers = said.partition("\n\n")[2]
    return " ".join(line.rpartition(" ")[2] for line in answers.splitlines() if "Address" in line or "name =" in line)


def neighbours(host: AgentHost) -> dict[str, str]:
    """The permanent ones, MAC address by address."""
    found = json.loads(host.run("ip", "-j", "neigh", "show", "nud", "permanent", namespace=NS))
    return {it["dst"]: it["lladdr"] for it in found}


def running(host: AgentHost) -> dict[str, set[int]]:
    return {word: set(host.processes(word)) for word in ("dnsmasq", "haproxy", "--control")}


def test_a_vm_boots_with_lease_names_metadata_and_its_password_once(host: AgentHost) -> None:
    given = lease(host, WEB)
    assert given == {
        "ip": WEB_IP,
        "router": SERVER,
        "dns": f"{SERVER},198.51.100.53,198.51.100.54",
        "domain": "cs2cloud.internal",
        "hostname": "web-1",
        "lease": str(12 * 3600),
        "server": SERVER,
    }
    assert lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP
    assert lookup(host, WEB, "data-server") == SERVER
    assert lookup(host, WEB, WEB_IP) == "web-1.cs2cloud.internal"
    assert get(host, WEB, "/latest/meta-data/instance-id") == "9f000000-0000-4000-8000-000000000031"
    assert "nginx" in get(host, WEB, "/latest/user-data")
    assert PASSWORD in host.path(FILE).read_text()
    revision = json.loads(host.path(FILE).read_text())["revision"]
    assert password(host, WEB, "send_my_password") == PASSWORD
    assert password(host, WEB, "saved_password") == "saved_password"
    wait_until(lambda: PASSWORD not in host.path(FILE).read_text())
    assert json.loads(host.path(FILE).read_text())["revision"] == revision + 1
    assert password(host, WEB, "send_my_password") == "saved_password"
    host.kill()
    host.start()
    assert password(host, WEB, "send_my_password") == "saved_password"
    assert PASSWORD not in host.log()


def test_a_vm_more_or_less_restarts_nothing_and_a_removed_one_has_nothing(host: AgentHost) -> None:
    lease(host, WEB)
    before = running(host)
    assert len(before["dnsmasq"]) == len(before["--control"]) == 1
    deploy_db(host)
    assert lease(host, DB)["ip"] == DB_IP
    # The resolver is told by inotify, a moment after the call was answered.
    wait_until(lambda: lookup(host, WEB, "win-db-1.cs2cloud.internal") == DB_IP)
    assert get(host, DB, "/latest/meta-data/instance-id") == "i-db"
    assert get(host, WEB, "/latest/meta-data/instance-id").startswith("9f")
    # Stopped, it keeps what it has; removed, it has nothing.
    done(host.call("100", "release-nic", **DB_NIC))
    assert neighbours(host) == {WEB_IP: WEB_MAC, DB_IP: DB_MAC}
    assert lookup(host, WEB, "win-db-1.cs2cloud.internal") == DB_IP
    for fixture, command in (("101", "remove-dhcp-entry"), ("102", "remove-dns-entry")):
        done(host.call(fixture, command, **DB_NIC))
    wait_until(lambda: lookup(host, WEB, "win-db-1.cs2cloud.internal") == "")
    assert lease(host, DB, check=False) == {}
    assert get(host, DB, "/latest/meta-data/instance-id") == ""
    assert lease(host, WEB)["ip"] == WEB_IP
    assert neighbours(host) == {WEB_IP: WEB_MAC}
    assert running(host) == before


def test_an_address_that_is_given_to_another_vm_is_that_vms_at_once(host: AgentHost) -> None:
    assert lease(host, WEB)["ip"] == WEB_IP
    host.plug(DB, BRIDGE, DB_MAC)
    taken = DB_NIC | {"ip": WEB_IP}
    done(host.call("041", "prepare-nic", **taken))
    done(host.call("032", "add-dhcp-entry", **taken))
    assert neighbours(host) == {WEB_IP: DB_MAC}
    assert lease(host, DB)["ip"] == WEB_IP
    # The former owner still has the address, and is not believed.
    assert get(host, WEB, "/latest/user-data") == get(host, WEB, "/latest/meta-data/instance-id") == ""
    assert password(host, WEB, "send_my_password") == ""


def test_what_dies_is_back(host: AgentHost) -> None:
    with host.client() as client:
        done(client.call("050", "assign-ip"))
        done(client.call("080", "apply-lb-rules"))
    lease(host, WEB)
    before = running(host)
    assert all(before.values())
    for word in ("dnsmasq", "haproxy", "--control"):
        # All at once, as a careless hand does it.
        for pid in before[word]:
            os.kill(pid, signal.SIGKILL)
    # What waits in a socket of the guest process waits for the next one.
    assert get(host, WEB, "/latest/meta-data/local-hostname") == "web-1"
    wait_until(lambda: lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP)
    wait_until(lambda: all(running(host).values()))
    for word, pids in running(host).items():
        assert not pids & before[word], word


def test_an_agent_that_is_replaced_goes_unnoticed(host: AgentHost) -> None:
    with host.client() as client:
        done(client.call("050", "assign-ip"))
        done(client.call("080", "apply-lb-rules"))
    wait_until(lambda: len(running(host)["haproxy"]) == 2)  # master and worker
    before = running(host)
    host.kill()
    assert lease(host, WEB)["ip"] == WEB_IP
    assert get(host, WEB, "/latest/meta-data/local-hostname") == "web-1"
    host.start()
    assert steps(host) == 0
    done(host.call("032", "add-dhcp-entry"))
    assert steps(host) == 0
    host.kill(signal.SIGTERM)
    assert lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP
    host.start()
    assert running(host) == before
    # And the adopted ones are watched.
    for pid in before["dnsmasq"]:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP)


def test_a_password_that_is_taken_while_no_agent_runs_is_erased_by_the_next(host: AgentHost) -> None:
    lease(host, WEB)
    host.kill()
    assert password(host, WEB, "send_my_password") == PASSWORD
    assert password(host, WEB, "saved_password") == "saved_password"
    assert PASSWORD in host.path(FILE).read_text()
    host.start()
    wait_until(lambda: PASSWORD not in host.path(FILE).read_text())


def test_a_service_that_does_not_start_leaves_the_network_standing_and_is_named(host: AgentHost) -> None:
    """dnsmasq cannot bind: somebody in the namespace has the port."""
    done(host.call("131", "destroy-network"))
    done(host.call("020", "implement-network"))
    host.run("sh", "-c", f"nc -l -k {SERVER} 53 >/dev/null 2>&1 </dev/null &", namespace=NS)
    wait_until(lambda: f"{SERVER}:53" in host.run("ss", "-ltn", namespace=NS))
    (thief,) = host.processes("nc", "-k", "53")
    reply = host.call("033", "config-dns-subnet")
    assert (reply.status, reply.holds) == (3, True)
    assert reply.error.startswith("dns-204 ")
    reply = host.call("021", "assign-ip")
    assert reply.status == 3
    assert "203.0.113.20/32" in host.run("ip", "addr", namespace=NS)
    assert "203.0.113.20" in host.run("nft", "list", "table", "inet", "netloom", namespace=NS)
    os.kill(thief, signal.SIGKILL)
    wait_until(lambda: bool(running(host)["dnsmasq"]))
    wait_until(lambda: steps(host) == 0 or host.call("021", "assign-ip").status == 0)


def test_a_rule_that_is_refused_keeps_no_other_from_balancing(host: AgentHost) -> None:
    with host.client() as client:
        done(client.call("050", "assign-ip"))
        done(client.call("053", "add-port-forward"))
        rule = {"id": 1, "name": "x", "publicIp": "203.0.113.21", "privatePort": 80, "protocol": "tcp"}
        rule |= {"algorithm": "roundrobin", "revoke": False, "backends": []}
        taken = int(json.loads(host.path(FILE).read_text())["port_forwards"].popitem()[1]["public_ports"]["first"])
        rules = [{**rule, "publicPort": 8081}, {**rule, "id": 2, "publicPort": taken}]
        reply = client.call("080", "apply-lb-rules", lb_rules=rules)
    assert reply.status == 3
    assert "rule 2 " in reply.error
    assert "203.0.113.21:8081" in host.run("ss", "-ltn", namespace=NS)


def test_nothing_is_left_of_a_destroyed_network() -> None:
    with agent_host() as host:
        before = host.inventory()
        host.start()
        live(host)
        with host.client() as client:
            done(client.call("050", "assign-ip"))
            done(client.call("080", "apply-lb-rules"))
        lease(host, WEB)
        deploy_db(host)
        assert host.inventory()["processes"] >= 2
        # No order of removals is promised: the network goes with all that was on it.
        done(host.call("131", "destroy-network"))
        for vm in (WEB, DB):
            host.ip("link", "del", f"tap-{vm}")
            host.ip("netns", "del", vm)
        host.kill()
        host.start()
        wait_until(lambda: host.inventory() == before)
