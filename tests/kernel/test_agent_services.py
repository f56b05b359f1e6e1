"""Guest services of a real agent as a VM uses them: DHCP, DNS, metadata, passwords, also across restarts."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

import processes
from guestbed.dhcp import message as message_of
from guestbed.dhcp import options_of
from kernel.agent_host import AgentHost, act, agent_host, done, message, steps, wait_until
from kernel.isolated_network import (
    BRIDGE,
    BRIEFLY,
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


def password(host: AgentHost, vm: str, word: str, *more: str) -> str:
    return get(host, vm, "/", *more, "-H", f"DomU_Request: {word}", port=8080).strip()


def neighbours(host: AgentHost) -> dict[str, str]:
    """MAC addresses of the permanent neighbours, by IP address."""
    found = json.loads(host.run("ip", "-j", "neigh", "show", "nud", "permanent", namespace=NS))
    return {it["dst"]: it["lladdr"] for it in found}


def test_a_vm_gets_lease_names_metadata_and_its_password_once(host: AgentHost) -> None:
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


def test_vms_come_and_go_without_restarts_and_removed_ones_get_nothing(host: AgentHost) -> None:
    lease(host, WEB)
    before = running(host)
    assert len(before["dnsmasq"]) == len(before["--control"]) == 1
    deploy_db(host)
    assert lease(host, DB)["ip"] == DB_IP
    # dnsmasq learns of the file by inotify, a moment after the reply.
    wait_until(lambda: lookup(host, WEB, "win-db-1.cs2cloud.internal") == DB_IP)
    assert get(host, DB, "/latest/meta-data/instance-id") == "i-db"
    assert get(host, WEB, "/latest/meta-data/instance-id").startswith("9f")
    # A stopped VM keeps its entries. A removed VM has none.
    done(host.call("100", "release-nic", **DB_NIC))
    assert neighbours(host) == {WEB_IP: WEB_MAC, DB_IP: DB_MAC}
    assert lookup(host, WEB, "win-db-1.cs2cloud.internal") == DB_IP
    for fixture, command in (("101", "remove-dhcp-entry"), ("102", "remove-dns-entry")):
        done(host.call(fixture, command, **DB_NIC))
    wait_until(lambda: lookup(host, WEB, "win-db-1.cs2cloud.internal") == "")
    assert lease(host, DB, check=False) == {}
    assert get(host, DB, "/latest/meta-data/instance-id", *BRIEFLY) == ""
    assert lease(host, WEB)["ip"] == WEB_IP
    assert neighbours(host) == {WEB_IP: WEB_MAC}
    assert running(host) == before


def test_the_firewall_admits_dhcp_from_clients_with_an_address(host: AgentHost) -> None:
    everybody = "255.255.255.255"
    lease = {53: MessageType.ACK, 51: 12 * 3600}
    another_vms = DB_IP
    assert dhcp_answer(host, MessageType.REQUEST, WEB_IP, SERVER) == lease  # RENEWING
    assert dhcp_answer(host, MessageType.REQUEST, WEB_IP, everybody) == lease  # REBINDING
    for to in (SERVER, everybody):
        assert dhcp_answer(host, MessageType.REQUEST, another_vms, to) == {53: MessageType.NAK}
    for of_another_network in ("192.168.7.7", "198.51.100.9"):
        assert dhcp_answer(host, MessageType.REQUEST, of_another_network, everybody) == {53: MessageType.NAK}
    assert dhcp_answer(host, MessageType.INFORM, WEB_IP, SERVER) == {53: MessageType.ACK}
    for kind in (MessageType.RELEASE, MessageType.DECLINE):
        assert dhcp_answer(host, kind, WEB_IP, everybody, patience_s=0.5) == {}
    assert dhcp_answer(host, MessageType.REQUEST, WEB_IP, SERVER) == lease  # it keeps its address
    wait_until(lambda: f"the VM declines its address {WEB_IP}" in host.log())


def dhcp_answer(host: AgentHost, kind: MessageType, address: str, to: str, patience_s: float = 10) -> dict[int, int]:
    """Send a DHCP message from this address; returns message type and lease time of the answer, empty without one."""
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
def test_defect_26_a_reassigned_address_serves_the_new_vm_at_once(host: AgentHost) -> None:
    assert lease(host, WEB)["ip"] == WEB_IP
    host.plug(DB, BRIDGE, DB_MAC)
    taken = DB_NIC | {"ip": WEB_IP}
    done(host.call("041", "prepare-nic", **taken))
    done(host.call("032", "add-dhcp-entry", **taken))
    assert neighbours(host) == {WEB_IP: DB_MAC}
    assert lease(host, DB)["ip"] == WEB_IP
    # The previous VM still uses the address, but gets no data.
    for path in ("/latest/user-data", "/latest/meta-data/instance-id"):
        assert get(host, WEB, path, *BRIEFLY) == ""
    assert password(host, WEB, "send_my_password", *BRIEFLY) == ""
    done(host.call("034", "add-dns-entry", **taken))
    wait_until(lambda: lookup(host, DB, WEB_IP) == "win-db-1.cs2cloud.internal")
    assert lookup(host, DB, "web-1.cs2cloud.internal") == ""


def test_vms_cannot_take_the_name_data_server(host: AgentHost) -> None:
    """cloud-init fetches user data from that name, so a VM with it could run commands in other VMs."""
    lease(host, WEB)
    done(host.call("032", "add-dhcp-entry", **DB_NIC | {"hostname": "Data-Server"}))
    done(host.call("034", "add-dns-entry", **DB_NIC | {"hostname": "Data-Server"}))
    done(host.call("034", "add-dns-entry", nic_uuid="", mac="02:01:00:cc:00:05", ip="10.10.1.46", hostname="later"))
    wait_until(lambda: dig(host, "later.cs2cloud.internal", "A") == "10.10.1.46")
    for name in ("data-server", "data-server.cs2cloud.internal"):
        assert dig(host, name, "A") == SERVER


def test_local_and_external_names_resolve_over_udp_and_tcp(host: AgentHost) -> None:
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
        # Queries for the network's domain are not forwarded, and the host's /etc/hosts is not used.
        assert dig(host, "nobody.cs2cloud.internal", "A") == ""
        assert dig(host, "localhost", "A") == ""
    finally:
        world.kill()
        world.wait()


@pytest.mark.mutation("reverse-zones-are-answered-here")
def test_reverse_questions_about_private_addresses_do_not_leave(host: AgentHost) -> None:
    """They are answered at once. A private resolver of the operator is asked, but not about the network's addresses."""
    host.run("ip", "addr", "add", "203.0.113.1/24", "dev", "sw-eth2.101", pid=host.fabric)
    for address in ("198.51.100.53", "10.99.0.53"):
        host.run("ip", "addr", "add", f"{address}/32", "dev", "lo", pid=host.fabric)
    words = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--pid-file=", "--user=root"]
    words += ["--bind-interfaces", "--listen-address=198.51.100.53,10.99.0.53", "--port=53", "--log-facility=-"]
    words += [
        "--log-queries",
        "--ptr-record=7.0.99.10.in-addr.arpa,known.example",
        "--address=/far.example/203.0.113.9",
    ]
    foreign = ("10.99.0.8", "172.20.1.1", "192.168.7.7", "169.254.3.3", "100.70.0.1", "fd12::1", "fe80::77", "fc00::1")
    lease(host, WEB)
    world = subprocess.Popen(
        ["nsenter", "-t", str(host.fabric), "-n", "-m", *words], cwd="/", stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: ":53" in host.run("ss", "-lun", pid=host.fabric))
        wait_until(lambda: dig(host, "far.example", "A") == "203.0.113.9")
        for address in (*foreign, "10.10.1.200"):
            assert "NXDOMAIN" in host.run("dig", f"@{SERVER}", "+tries=1", "+time=15", "-x", address, namespace=WEB), (
                address
            )
        done(host.call("033", "config-dns-subnet", dns="198.51.100.53,10.99.0.53"))
        wait_until(lambda: dig(host, "-x", "10.99.0.7") == "known.example.")
        dig(host, "-x", "10.10.1.201")
    finally:
        world.kill()
        said = world.communicate()[1]
    asked = [line.split() for line in said.splitlines() if "query[" in line]
    assert any("7.0.99.10.in-addr.arpa" in line for line in asked)
    for address in (*foreign, "10.10.1.200", "10.10.1.201"):
        assert not any(ip_address(address).reverse_pointer in line for line in asked), address


@pytest.mark.mutation("resolver-does-not-tell-its-version")
def test_the_resolver_does_not_tell_its_version(host: AgentHost) -> None:
    lease(host, WEB)
    for name in ("version.bind", "authors.bind", "copyright.bind", "cachesize.bind", "version.server", "id.server"):
        assert dig(host, "CH", "TXT", name) == dig(host, "TXT", name, "+tcp", "-c", "CH") == ""


@pytest.mark.parametrize("name", ["wpad", "localhost"])
def test_a_vm_with_a_reserved_name_has_a_lease_but_no_name(host: AgentHost, name: str) -> None:
    host.plug(DB, BRIDGE, DB_MAC)
    done(host.call("032", "add-dhcp-entry", **DB_NIC | {"hostname": name}))
    done(host.call("034", "add-dns-entry", **DB_NIC | {"hostname": name}))
    assert lease(host, DB)["ip"] == DB_IP
    lease(host, WEB)
    done(host.call("034", "add-dns-entry", nic_uuid="", mac="02:01:00:cc:00:05", ip="10.10.1.46", hostname="later"))
    wait_until(lambda: dig(host, "later", "A") == "10.10.1.46")
    for asked in (name, f"{name}.cs2cloud.internal"):
        assert dig(host, asked, "A") == ""
    assert dig(host, "-x", DB_IP) == ""
    assert f"the name {name} is reserved" in host.log()


def dig(host: AgentHost, *words: str) -> str:
    asked = ["dig", f"@{SERVER}", "+short", "+time=5", "+tries=2", *words]
    return " ".join(host.run(*asked, namespace=WEB, check=False).split())


def test_dnsmasq_starts_when_the_group_is_named_nobody() -> None:
    """Enterprise Linux has no group ``nogroup``; the group is named ``nobody``."""
    with agent_host() as host:
        groups = Path("/etc/group").read_text().replace("nogroup:x:65534:", "nobody:x:65534:")
        # nss-systemd(8) provides the name on Debian without a file.
        for file, text in (("group", groups), ("nsswitch.conf", "passwd: files\ngroup: files\n")):
            host.path(f"/run/{file}").write_text(text)
            host.run("mount", "--bind", f"/run/{file}", f"/etc/{file}")
        host.start()
        live_with_vm(host)
        lease(host, WEB)
        assert lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP


@pytest.mark.mutation("resolver-of-this-host")
def test_an_old_dnsmasq_is_restarted_when_a_name_is_removed() -> None:
    """dnsmasq before 2.88 reads new files in its hostsdir, but does not forget deleted ones (its changelog)."""
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
        assert host.processes("dnsmasq") == before  # new files are read without a restart
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


def test_dhcp_options_may_be_set_before_the_nic_exists(host: AgentHost) -> None:
    done(host.call("101", "remove-dhcp-entry"))
    network = {key: value for key, value in DB_NIC.items() if key == "nic_id"}
    done(host.call("031", "set-dhcp-options", **network, options={"26": "1342", "15": "of-its-own.example"}))
    deploy_db(host)
    words = ["busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "8", "-T", "1", "-O", "mtu", "-s", "/run/env"]
    host.path("/run/env").write_text('#!/bin/sh\n[ "$1" = bound ] && echo "$mtu $domain"\nexit 0\n')
    host.path("/run/env").chmod(0o755)
    assert "1342 of-its-own.example" in host.run(*words, namespace=DB)


def test_killed_services_are_restarted(host: AgentHost) -> None:
    with host.client() as client:
        done(client.call("050", "assign-ip"))
        done(client.call("080", "apply-lb-rules"))
    lease(host, WEB)
    before = running(host)
    assert all(before.values())
    for word in ("dnsmasq", "haproxy", "--control"):
        # All processes at once, as ``pkill`` does.
        for pid in before[word]:
            processes.kill(pid)
    # The request waits in the socket until the next guest process serves it.
    assert get(host, WEB, "/latest/meta-data/local-hostname") == "web-1"
    wait_until(lambda: lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP)
    wait_until(lambda: all(running(host).values()))
    for word, pids in running(host).items():
        assert not pids & before[word], word


def test_a_recreated_guest_link_is_served_again(host: AgentHost) -> None:
    """The new link has the same name but another index, and sockets are bound to the index."""
    assert lease(host, WEB)["ip"] == WEB_IP
    before = running(host)
    host.ip("link", "del", "vnetg204")
    wait_until(lambda: "vnetg204" in host.links())
    assert lease(host, WEB)["ip"] == WEB_IP
    wait_until(lambda: get(host, WEB, "/latest/meta-data/local-hostname") == "web-1")
    wait_until(lambda: lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP)
    host.kill()
    host.ip("link", "del", "vnetg204")
    host.start()
    assert lease(host, WEB)["ip"] == WEB_IP
    assert get(host, WEB, "/latest/meta-data/local-hostname") == "web-1"
    assert lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP
    assert running(host) == before


def test_hung_services_are_killed_and_restarted(host: AgentHost) -> None:
    with host.client() as client:
        done(client.call("050", "assign-ip"))
        done(client.call("080", "apply-lb-rules"))
    lease(host, WEB)
    before = running(host)
    assert all(before.values())
    (master,) = (pid for pid in before["haproxy"] if before["haproxy"] - {pid} == children(pid))
    hung = before["dnsmasq"] | before["--control"] | before["haproxy"] - {master}  # of haproxy only the worker
    for pid in hung:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: not any(pids & hung for pids in running(host).values()), seconds=90)
    wait_until(lambda: lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP)
    assert get(host, WEB, "/latest/meta-data/local-hostname") == "web-1"
    wait_until(lambda: "203.0.113.21:80" in host.run("ss", "-ltn", namespace=NS))
    for words in ("dns-204 (pid ", "lb (pid ", "guest process (pid "):
        assert re.search(rf"{re.escape(words)}\d+\) does not answer: killed", host.log()), words
    wait_until(lambda: "scope=net-204 dns-204 hung: steps=" in host.log())
    shown = message(act(host, "show"))
    assert re.search(r"dns-204 \(pid \d+, died or hung 1 times since the agent started\)", shown), shown
    assert re.search(r"guest process of this host: pid \d+, died or hung 1 times since the agent started", shown), shown


def children(pid: int) -> set[int]:
    with contextlib.suppress(OSError):
        return {int(it) for it in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    return set()


def test_services_survive_an_agent_restart(host: AgentHost) -> None:
    with host.client() as client:
        done(client.call("050", "assign-ip"))
        done(client.call("080", "apply-lb-rules"))
    wait_until(lambda: len(running(host)["haproxy"]) == 2)  # the master and a worker
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
    # The new agent supervises the adopted processes.
    for pid in before["dnsmasq"]:
        processes.kill(pid)
    wait_until(lambda: lookup(host, WEB, "web-1.cs2cloud.internal") == WEB_IP)


@pytest.mark.mutation("a-taken-password-is-remembered")
def test_defect_69_a_password_fetched_without_an_agent_is_erased_at_the_next_start(host: AgentHost) -> None:
    lease(host, WEB)
    host.kill()
    assert password(host, WEB, "send_my_password") == PASSWORD
    assert password(host, WEB, "saved_password") == "saved_password"
    assert PASSWORD in host.path(FILE).read_text()
    host.start()
    wait_until(lambda: PASSWORD not in host.path(FILE).read_text())


def test_a_service_that_cannot_start_fails_only_the_calls_that_ask_for_it(host: AgentHost) -> None:
    """dnsmasq cannot bind its port, because another process in the namespace has it."""
    done(host.call("131", "destroy-network"))
    done(host.call("020", "implement-network"))
    host.run("sh", "-c", f"nc -l -k {SERVER} 53 >/dev/null 2>&1 </dev/null &", namespace=NS)
    wait_until(lambda: f"{SERVER}:53" in host.run("ss", "-ltn", namespace=NS))
    (thief,) = host.processes("nc", "-k", "53")
    reply = host.call("033", "config-dns-subnet")
    assert (reply.status, reply.holds) == (3, True)
    assert reply.error.startswith("dns-204 ")
    for fixture, command in (("021", "assign-ip"), ("053", "add-port-forward"), ("032", "add-dhcp-entry")):
        done(host.call(fixture, command))
    lease(host, WEB)
    assert host.call("034", "add-dns-entry").status == 3
    named = message(act(host, "check"))
    assert named.startswith("failed: dns-204 ") and "Address already in use" in named
    assert "203.0.113.20/32" in host.run("ip", "addr", namespace=NS)
    assert "203.0.113.20" in host.run("nft", "list", "table", "inet", "netloom", namespace=NS)
    os.kill(thief, signal.SIGKILL)
    wait_until(lambda: not host.processes("nc", "-k", "53"))
    done(host.call("034", "add-dns-entry"))  # a repeated call waits for no delay
    assert running(host)["dnsmasq"]


def test_missing_programs_fail_the_calls_that_need_them_and_are_used_once_installed(host: AgentHost) -> None:
    done(host.call("131", "destroy-network"))
    for program in ("dnsmasq", "haproxy"):
        host.run("mount", "--bind", "/dev/null", f"/usr/sbin/{program}")
    done(host.call("020", "implement-network"))
    done(host.call("021", "assign-ip"))
    resolver, balancer = host.call("033", "config-dns-subnet"), host.call("080", "apply-lb-rules")
    assert (resolver.status, resolver.error) == (3, "dns-204: dnsmasq is not installed on this host")
    assert (balancer.status, balancer.error) == (3, "lb: haproxy is not installed on this host")
    # One command installs all that is missing.
    assert {"dnsmasq", "haproxy"} == {it.removesuffix("-base") for it in resolver.hint.split()[-2:]}
    for fixture, command in (("070", "apply-fw-rules"), ("053", "add-port-forward"), ("032", "add-dhcp-entry")):
        done(host.call(fixture, command))
    for program in ("dnsmasq", "haproxy"):
        host.run("umount", f"/usr/sbin/{program}")
    done(host.call("034", "add-dns-entry"))
    done(host.call("080", "apply-lb-rules"))
    assert running(host)["dnsmasq"] and running(host)["haproxy"]
    assert message(act(host, "check")) == "nothing to do: all is as it should be"


def test_a_rejected_rule_does_not_affect_other_balanced_rules(host: AgentHost) -> None:
    with host.client() as client:
        done(client.call("050", "assign-ip"))
        done(client.call("053", "add-port-forward"))
        rule = {"id": 1, "name": "x", "publicIp": "203.0.113.21", "privatePort": 80, "protocol": "tcp"}
        rule |= {"algorithm": "roundrobin", "revoke": False, "backends": []}
        taken = int(json.loads(host.path(FILE).read_text())["port_forwards"].popitem()[1]["public_ports"]["first"])
        rules = [{**rule, "publicPort": 8081}, {**rule, "id": 2, "publicPort": taken}]
        done(client.call("080", "apply-lb-rules", lb_rules=rules))
    assert "not in force: apply-lb-rules 204: rule 2 " in message(act(host, "check"))
    assert "203.0.113.21:8081" in host.run("ss", "-ltn", namespace=NS)


@pytest.mark.mutation("a-taken-port-is-not-balanced")
def test_a_rule_that_cannot_bind_or_be_parsed_is_reported_and_others_work(host: AgentHost) -> None:
    with host.client() as client:
        done(client.call("050", "assign-ip"))
        done(client.call("080", "apply-lb-rules", lb_rules=[balanced(1, 8081)]))
        # Not nc, which sets SO_REUSEPORT.
        thief = "import socket, time; it = socket.create_server(('203.0.113.21', 8082)); time.sleep(600)"
        host.run("sh", "-c", f'python3 -c "{thief}" >/dev/null 2>&1 </dev/null &', namespace=NS)
        wait_until(lambda: "203.0.113.21:8082" in host.run("ss", "-ltn", namespace=NS))
        (pid,) = host.processes(thief)
        unread = {**balanced(4, 8084), "algorithm": "random"}
        reply = client.call("080", "apply-lb-rules", lb_rules=[balanced(2, 8082), balanced(3, 8083)])
        assert reply.status == 3
        assert "rule 2 (203.0.113.21:8082)" in reply.error
        assert client.call("080", "apply-lb-rules", lb_rules=[balanced(2, 8082)]).status == 3
        # The failed rule does not affect other rules or a VM that starts.
        done(client.call("080", "apply-lb-rules", lb_rules=[balanced(3, 8083)]))
        done(client.call("032", "add-dhcp-entry"))
        assert "balance rule 2, once 203.0.113.21:8082 is free" in message(act(host, "check"))
        listening = host.run("ss", "-ltn", namespace=NS)
        assert "203.0.113.21:8081" in listening
        assert "203.0.113.21:8083" in listening
        done(client.call("080", "apply-lb-rules", lb_rules=[unread]))
        assert "payload.lb_rules[0].algorithm: " in message(act(host, "check"))
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not host.processes(thief))
        done(client.call("080", "apply-lb-rules", lb_rules=[balanced(3, 8083)]))
        assert "203.0.113.21:8082" in host.run("ss", "-ltn", namespace=NS)
        done(client.call("080", "apply-lb-rules", lb_rules=[balanced(5, 8085), unread]))
        assert "payload.lb_rules[1].algorithm: " in message(act(host, "check"))
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
        # CloudStack sends no removals before destroy-network, which removes everything.
        done(host.call("131", "destroy-network"))
        for vm in (WEB, DB):
            host.ip("link", "del", f"tap-{vm}")
            host.ip("netns", "del", vm)
        host.kill()
        host.start()
        wait_until(lambda: host.inventory() == before)


def test_services_of_a_manually_removed_network_are_stopped() -> None:
    """The procedure of docs/operators/repair.md. Running services would keep the unnamed namespace alive."""
    with agent_host() as host:
        before = host.inventory()
        host.start()
        live_with_vm(host)
        with host.client() as client:
            done(client.call("050", "assign-ip"))
            done(client.call("080", "apply-lb-rules"))
        wait_until(lambda: len(running(host)["haproxy"]) == 2)  # the master and a worker
        runs = running(host)
        host.kill(signal.SIGTERM)
        host.path(FILE).unlink()
        # The state file may also have been lost by accident, so services of a named namespace keep running.
        host.start()
        assert running(host) == runs
        host.kill(signal.SIGTERM)
        for words in (["link", "del", f"tap-{WEB}"], ["netns", "del", WEB], ["netns", "del", NS]):
            host.ip(*words)
        host.start()
        wait_until(lambda: host.inventory() == before)
        guest = host.processes("guest", "--control")
        assert len(guest) == 1
        # Build the same network again.
        live_with_vm(host)
        assert lease(host, WEB)["ip"] == WEB_IP
        assert host.processes("guest", "--control") == guest


@pytest.mark.mutation("config-dns-starts-the-resolver", instead="network")
@pytest.mark.parametrize("order", [("031", "033"), ("033", "031"), ("032", "033", "031")], ids="-".join)
def test_defect_25_the_resolver_is_reachable_in_any_order_of_commands(order: tuple[str, ...]) -> None:
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
    "a-network-has-its-own-leases", instead="next(iter(self._networks.values()), _NetworkRuntime(table, self._unread))"
)
def test_defect_27_networks_with_equal_subnets_have_separate_leases(host: AgentHost) -> None:
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
