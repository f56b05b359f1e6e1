"""What a VM meets in a network that the agent keeps: lease, names, metadata, password; and what it never notices."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import processes
from guestbed.dhcp import message as message_of
from guestbed.dhcp import options_of
from kernel.agent_host import AgentHost, act, agent_host, done, message, steps, wait_until
from kernel.isolated_network import (
    BRIDGE,
    DB,
    DB_IP,
    DB_MAC,
    DB_NIC,
    FILE,
    NS,
    PASSWORD,
    SERVER,
    WEB,
    WEB_IP,
    WEB_MAC,
    get,
    lease,
    live_with_vm,
    lookup,
    running,
)
from netloom.guest.dhcp import MessageType


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start()
        live_with_vm(it)
        yield it


def deploy_db(host: AgentHost) -> None:
    done(host.call("041", "prepare-nic"))
    done(host.call("032", "add-dhcp-entry", **DB_NIC))
    done(host.call("034", "add-dns-entry", **DB_NIC))
    items = [{"dir": "metadata", "file": "instance-id", "content": "i-db"}]
    done(host.call("035", "save-vm-data", **DB_NIC, vm_data=items))
    host.plug(DB, BRIDGE, DB_MAC)


def password(host: AgentHost, vm: str, word: str) -> str:
    return get(host, vm, "/", "-H", f"DomU_Request: {word}", port=8080).strip()


def neighbours(host: AgentHost) -> dict[str, str]:
    """The permanent ones, MAC address by address."""
    found = json.loads(host.run("ip", "-j", "neigh", "show", "nud", "permanent", namespace=NS))
    return {it["dst"]: it["lladdr"] for it in found}


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


def test_a_client_that_has_its_address_is_heard_through_the_firewall(host: AgentHost) -> None:
    everybody = "255.255.255.255"
    assert told_by_dhcp(host, MessageType.REQUEST, WEB_IP, SERVER) == {53: MessageType.ACK, 51: 12 * 3600}  # RENEWING
    assert told_by_dhcp(host, MessageType.REQUEST, WEB_IP, everybody) == {
        53: MessageType.ACK,
        51: 12 * 3600,
    }  # REBINDING
    assert told_by_dhcp(host, MessageType.REQUEST, DB_IP, everybody) == {
        53: MessageType.NAK
    }  # an address that is its own no more
    assert told_by_dhcp(host, MessageType.INFORM, WEB_IP, SERVER) == {53: MessageType.ACK}
    assert told_by_dhcp(host, MessageType.DECLINE, WEB_IP, everybody, patience_s=0.5) == {}
    wait_until(lambda: f"the VM declines its address {WEB_IP}" in host.log())


def told_by_dhcp(host: AgentHost, kind: MessageType, address: str, to: str, patience_s: float = 10) -> dict[int, int]:
    """What a client is answered that sends from this address: message type and lease time."""
    host.ip("-n", WEB, "addr", "add", f"{address}/24", "dev", "eth0")
    with host.within(WEB):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        client.bind(("0.0.0.0", 68))
        client.settimeout(patience_s)
        client.sendto(message_of(kind, WEB_MAC, {55: b"\1"}, ciaddr=address), (to, 67))
        try:
            options = dict(options_of(client.recv(2000)))
        except TimeoutError:
            options = {}
    host.ip("-n", WEB, "addr", "flush", "dev", "eth0")
    return {code: int.from_bytes(options[code], "big") for code in (53, 51) if code in options}


@pytest.mark.mutation("an-address-has-one-vm")
def test_defect_26_an_address_that_is_given_to_another_vm_is_that_vms_at_once(host: AgentHost) -> None:
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
    done(host.call("034", "add-dns-entry", **taken))
    wait_until(lambda: lookup(host, DB, WEB_IP) == "win-db-1.cs2cloud.internal")
    assert lookup(host, DB, "web-1.cs2cloud.internal") == ""


def test_no_vm_has_the_name_of_the_data_server(host: AgentHost) -> None:
    """cloud-init asks for user data where that name leads: a neighbour's VM would execute what this one likes."""
    lease(host, WEB)
    done(host.call("032", "add-dhcp-entry", **DB_NIC | {"hostname": "Data-Server"}))
    done(host.call("034", "add-dns-entry", **DB_NIC | {"hostname": "Data-Server"}))
    done(host.call("034", "add-dns-entry", nic_uuid="", mac="02:01:00:cc:00:05", ip="10.10.1.46", hostname="later"))
    wait_until(lambda: dig(host, "later.cs2cloud.internal", "A") == "10.10.1.46")
    for name in ("data-server", "data-server.cs2cloud.internal"):
        assert dig(host, name, "A") == SERVER


@pytest.mark.mutation("resolver-reads-no-hosts-file")
def test_names_of_every_kind_over_udp_and_tcp_from_the_network_and_from_the_world(host: AgentHost) -> None:
    done(host.call("032", "add-dhcp-entry", ip6_address="fd00:1::45"))
    done(host.call("034", "add-dns-entry", ip6_address="fd00:1::45"))
    host.run("ip", "addr", "add", "203.0.113.1/24", "dev", "sw-eth2.101", pid=host.fabric)
    host.run("ip", "addr", "add", "198.51.100.53/32", "dev", "lo", pid=host.fabric)
    words = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--pid-file=", "--user=root"]
    words += ["--bind-interfaces", "--listen-address=198.51.100.53", "--address=/far.example/203.0.113.99"]
    lease(host, WEB)
    world = subprocess.Popen(["nsenter", "-t", str(host.fabric), "-n", "-m", *words], cwd="/")
    try:
        wait_until(lambda: ":53" in host.run("ss", "-lun", pid=host.fabric))
        wait_until(lambda: dig(host, "web-1.cs2cloud.internal", "AAAA") == "fd00:1::45")
        for way in ("+notcp", "+tcp"):
            assert dig(host, "web-1.cs2cloud.internal", "A", way) == WEB_IP
            assert dig(host, "web-1.cs2cloud.internal", "AAAA", way) == "fd00:1::45"
            assert dig(host, "-x", WEB_IP, way) == "web-1.cs2cloud.internal."
            assert dig(host, "-x", "fd00:1::45", way) == "web-1.cs2cloud.internal."
            assert dig(host, "data-server.cs2cloud.internal", "A", way) == dig(host, "data-server", "A", way) == SERVER
            assert dig(host, "far.example", "A", way) == "203.0.113.99"
        # Of the network's own domain nobody else is asked, and of the host's /etc/hosts nothing is known.
        assert dig(host, "nobody.cs2cloud.internal", "A") == ""
        assert dig(host, "localhost", "A") == ""
    finally:
        world.kill()
        world.wait()


def dig(host: AgentHost, *words: str) -> str:
    asked = ["dig", f"@{SERVER}", "+short", "+time=5", "+tries=2", *words]
    return " ".join(host.run(*asked, namespace=WEB, check=False).split())


@pytest.mark.mutation("resolver-of-this-host")
def test_a_host_may_call_nobodys_group_as_it_likes() -> None:
    """Enterprise Linux has no ``nogroup``: there the group is ``nobody``."""
    with agent_host() as host:
        groups = Path("/etc/group").read_text().replace("nogroup:x:65534:", "nobody:x:65534:")
        # Debian's systemd knows the name by itself (nss-systemd(8)).
        for file, text in (("group", groups), ("nsswitch.conf", "passwd: files\ngroup: files\n")):
            host.path(f"/run/{file}").write_text(text)
            host.run("mount", "--bind", f"/run/{file}", f"/etc/{file}")
        host.start()
        live_with_vm(host)
        lease(host, WEB)
        assert lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP


@pytest.mark.mutation("resolver-of-this-host")
def test_a_resolver_that_does_not_forget_is_started_anew_when_a_name_goes() -> None:
    """Before 2.88 dnsmasq reads what comes into its hostsdir, and keeps what goes (its changelog)."""
    with agent_host() as host:
        host.run("mount", "-t", "tmpfs", "-o", "mode=755", "none", "/usr/local/sbin")
        old = host.path("/usr/local/sbin/dnsmasq")
        old.write_text(
            '#!/bin/sh\n[ "$1" != --version ] || exec echo "Dnsmasq version 2.85"\nexec /usr/sbin/dnsmasq "$@"\n'
        )
        old.chmod(0o755)
        host.start()
        live_with_vm(host)
        before = host.processes("dnsmasq")
        deploy_db(host)
        assert host.processes("dnsmasq") == before  # what comes is read
        lease(host, WEB)
        done(host.call("101", "remove-dhcp-entry", **DB_NIC))
        assert len(host.processes("dnsmasq")) == 1
        assert not host.processes("dnsmasq").keys() & before.keys()
        assert lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP
        assert lookup(host, WEB, "win-db-1.cs2cloud.internal") == ""
        after = host.processes("dnsmasq")
        done(host.call("101", "remove-dhcp-entry", **DB_NIC))
        assert host.processes("dnsmasq") == after
        host.kill()
        host.start()
        assert host.processes("dnsmasq") == after


def test_options_may_come_before_the_nic(host: AgentHost) -> None:
    done(host.call("101", "remove-dhcp-entry"))
    network = {key: value for key, value in DB_NIC.items() if key == "nic_id"}
    done(host.call("031", "set-dhcp-options", **network, options={"26": "1342", "15": "of-its-own.example"}))
    deploy_db(host)
    words = ["busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "8", "-T", "1", "-O", "mtu", "-s", "/run/env"]
    host.path("/run/env").write_text('#!/bin/sh\n[ "$1" = bound ] && echo "$mtu $domain"\nexit 0\n')
    host.path("/run/env").chmod(0o755)
    assert "1342 of-its-own.example" in host.run(*words, namespace=DB)


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
            processes.kill(pid)
    # What waits in a socket of the guest process waits for the next one.
    assert get(host, WEB, "/latest/meta-data/local-hostname") == "web-1"
    wait_until(lambda: lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP)
    wait_until(lambda: all(running(host).values()))
    for word, pids in running(host).items():
        assert not pids & before[word], word


def test_a_guest_link_that_was_taken_is_served_again_when_it_is_back(host: AgentHost) -> None:
    """The new link has the same name and another number, which is what a socket is bound to."""
    assert lease(host, WEB)["ip"] == WEB_IP
    before = running(host)
    host.ip("link", "del", "vnetg204")
    wait_until(lambda: "vnetg204" in host.links())
    assert lease(host, WEB)["ip"] == WEB_IP
    assert get(host, WEB, "/latest/meta-data/local-hostname") == "web-1"
    assert lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP
    host.kill()
    host.ip("link", "del", "vnetg204")
    host.start()
    assert lease(host, WEB)["ip"] == WEB_IP
    assert get(host, WEB, "/latest/meta-data/local-hostname") == "web-1"
    assert lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP
    assert running(host) == before


def test_what_hangs_is_ended_and_back(host: AgentHost) -> None:
    with host.client() as client:
        done(client.call("050", "assign-ip"))
        done(client.call("080", "apply-lb-rules"))
    lease(host, WEB)
    before = running(host)
    assert all(before.values())
    (master,) = (pid for pid in before["haproxy"] if before["haproxy"] - {pid} == children(pid))
    hung = before["dnsmasq"] | before["--control"] | before["haproxy"] - {master}  # of haproxy, the worker alone
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: not any(pids & hung for pids in running(host).values()), seconds=90)
    wait_until(lambda: lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP)
    assert get(host, WEB, "/latest/meta-data/local-hostname") == "web-1"
    wait_until(lambda: "203.0.113.21:80" in host.run("ss", "-ltn", namespace=NS))
    for words in ("dns-204 (pid ", "lb (pid ", "guest process (pid "):
        assert re.search(rf"{re.escape(words)}\d+\) does not answer: killed", host.log()), words
    assert "scope=net-204 dns-204 hung: steps=" in host.log()
    shown = message(act(host, "show"))
    assert re.search(r"dns-204 \(pid \d+, died or hung 1 times since the agent started\)", shown), shown
    assert re.search(r"guest process of this host: pid \d+, died or hung 1 times since the agent started", shown), shown


def children(pid: int) -> set[int]:
    with contextlib.suppress(OSError):
        return {int(it) for it in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return set()


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
        processes.kill(pid)
    wait_until(lambda: lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP)


@pytest.mark.mutation("a-taken-password-is-remembered")
def test_defect_69_a_password_that_is_taken_while_no_agent_runs_is_erased_by_the_next(host: AgentHost) -> None:
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


@pytest.mark.mutation("a-taken-port-is-not-balanced")
def test_a_rule_that_cannot_bind_or_be_read_harms_no_other_and_is_named(host: AgentHost) -> None:
    with host.client() as client:
        done(client.call("050", "assign-ip"))
        done(client.call("080", "apply-lb-rules", lb_rules=[balanced(1, 8081)]))
        # Not nc, which would share its port with anybody.
        thief = "import socket, time; it = socket.create_server(('203.0.113.21', 8082)); time.sleep(600)"
        host.run("sh", "-c", f'python3 -c "{thief}" >/dev/null 2>&1 </dev/null &', namespace=NS)
        wait_until(lambda: "203.0.113.21:8082" in host.run("ss", "-ltn", namespace=NS))
        (pid,) = host.processes(thief)
        unread = {**balanced(4, 8084), "algorithm": "random"}
        reply = client.call("080", "apply-lb-rules", lb_rules=[balanced(2, 8082), balanced(3, 8083)])
        assert reply.status == 3
        assert "rule 2 (203.0.113.21:8082)" in reply.error
        assert client.call("080", "apply-lb-rules", lb_rules=[balanced(2, 8082)]).status == 3
        # Other rules, and a VM that starts, are none of its business.
        done(client.call("080", "apply-lb-rules", lb_rules=[balanced(3, 8083)]))
        done(client.call("032", "add-dhcp-entry"))
        assert "balance rule 2, once 203.0.113.21:8082 is free" in message(act(host, "check"))
        listening = host.run("ss", "-ltn", namespace=NS)
        assert "203.0.113.21:8081" in listening
        assert "203.0.113.21:8083" in listening
        reply = client.call("080", "apply-lb-rules", lb_rules=[unread])
        assert (reply.status, reply.error.partition(":")[0]) == (1, "payload.lb_rules[0].algorithm")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not host.processes(thief))
        done(client.call("080", "apply-lb-rules", lb_rules=[balanced(3, 8083)]))
        assert "203.0.113.21:8082" in host.run("ss", "-ltn", namespace=NS)
        reply = client.call("080", "apply-lb-rules", lb_rules=[balanced(5, 8085), unread])
        assert (reply.status, "payload.lb_rules[1].algorithm: " in reply.error) == (3, True)
        assert "203.0.113.21:8085" in host.run("ss", "-ltn", namespace=NS)


def balanced(number: int, port: int, *backends: str, **more: object) -> dict[str, object]:
    rule = {"id": number, "name": f"r{number}", "publicIp": "203.0.113.21", "publicPort": port, "privatePort": 80}
    behind = [{"ip": ip, "port": 80, "revoked": False} for ip in backends]
    return {**rule, "protocol": "tcp", "algorithm": "roundrobin", "revoke": False, "backends": behind, **more}


def test_nothing_is_left_of_a_destroyed_network() -> None:
    with agent_host() as host:
        before = host.inventory()
        host.start()
        live_with_vm(host)
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


def test_a_network_that_is_taken_off_by_hand_leaves_nothing_running() -> None:
    """As docs/operators/repair.md tells operators to; what runs would hold the namespace that has lost its name."""
    with agent_host() as host:
        before = host.inventory()
        host.start()
        live_with_vm(host)
        with host.client() as client:
            done(client.call("050", "assign-ip"))
            done(client.call("080", "apply-lb-rules"))
        runs = running(host)
        host.kill(signal.SIGTERM)
        host.path(FILE).unlink()
        # Lost it may be as well: what stands goes on.
        host.start()
        assert running(host) == runs
        host.kill(signal.SIGTERM)
        for words in (["link", "del", f"tap-{WEB}"], ["netns", "del", WEB], ["netns", "del", NS]):
            host.ip(*words)
        host.start()
        wait_until(lambda: host.inventory() == before)
        guest = host.processes("guest", "--control")
        assert len(guest) == 1
        # The same network, from the beginning, on what is left.
        live_with_vm(host)
        assert lease(host, WEB)["ip"] == WEB_IP
        assert host.processes("guest", "--control") == guest


@pytest.mark.mutation("config-dns-starts-the-resolver", instead="network")
@pytest.mark.parametrize("order", [("031", "033"), ("033", "031"), ("032", "033", "031")], ids="-".join)
def test_defect_25_the_resolver_opens_whatever_came_before(order: tuple[str, ...]) -> None:
    words = {"031": "config-dhcp-subnet", "032": "add-dhcp-entry", "033": "config-dns-subnet"}
    with agent_host() as host:
        host.start()
        done(host.call("020", "implement-network"))
        for fixture in order:
            done(host.call(fixture, words[fixture]))
        host.plug(WEB, BRIDGE, WEB_MAC, f"{WEB_IP}/24")
        assert lookup(host, WEB, "data-server.cs2cloud.internal") == SERVER
        done(host.call("031", "config-dhcp-subnet"))
        assert lookup(host, WEB, "data-server.cs2cloud.internal") == SERVER


@pytest.mark.mutation(
    "a-network-has-its-own-leases", instead="next(iter(self._networks.values()), _NetworkRuntime(table))"
)
def test_defect_27_networks_with_the_same_addresses_have_leases_of_their_own(host: AgentHost) -> None:
    other = {"network_id": "205", "vlan": "1377"}
    nic = other | DB_NIC | {"ip": WEB_IP, "nic_uuid": "6b7c2a10-0000-4000-8000-000000005103"}
    with host.client() as client:
        done(client.call("020", "implement-network", **other))
        done(client.call("032", "add-dhcp-entry", **nic))
        done(client.call("034", "add-dns-entry", **nic))
    host.plug(DB, "breth1-1377", DB_MAC)
    for _ in range(2):
        assert (lease(host, WEB)["ip"], lease(host, WEB)["hostname"]) == (WEB_IP, "web-1")
        assert (lease(host, DB)["ip"], lease(host, DB)["hostname"]) == (WEB_IP, "win-db-1")
        assert lookup(host, WEB, "win-db-1.cs2cloud.internal") == ""
        host.kill()
        host.start()
    done(host.call("131", "destroy-network", **other))
    assert lease(host, WEB)["ip"] == WEB_IP
