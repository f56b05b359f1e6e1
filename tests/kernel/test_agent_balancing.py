"""Load balancing through a real agent, from a client on the public VLAN to listeners in VMs."""

from __future__ import annotations

import itertools
import json
import re
import select
import socket
from collections import Counter
from collections.abc import Iterator

import pytest

from kernel.agent_host import AgentHost, act, agent_host, done, message, wait_until
from kernel.balanced_network import (
    ADDRESS,
    CLIENT,
    admit,
    answering_vm,
    connect,
    is_echoed,
    name_servers,
    rule,
)
from kernel.isolated_network import BRIDGE, DB, DB_IP, DB_MAC, DB_NIC, NS, WEB, WEB_IP, WEB_MAC, live

NAMES = {WEB_IP: WEB, DB_IP: DB}
_ports = itertools.count(40000)


@pytest.fixture(scope="module")
def host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start()
        live(it)
        with it.client() as client:
            for nic in ({}, DB_NIC):
                done(client.call("032", "add-dhcp-entry", **nic))
        it.plug(WEB, BRIDGE, WEB_MAC, f"{WEB_IP}/24")
        it.plug(DB, BRIDGE, DB_MAC, f"{DB_IP}/24")
        for vm in (WEB, DB):
            it.ip("-n", vm, "route", "add", "default", "via", "10.10.1.1")
        it.run("ip", "addr", "add", f"{CLIENT}/24", "dev", "sw-eth2.101", pid=it.fabric)
        admit(it, f"{CLIENT}/32")
        yield it


def balance(host: AgentHost, *rules: dict[str, object]) -> None:
    done(host.call("080", "apply-lb-rules", lb_rules=list(rules)))


def revoke(host: AgentHost, *rules: dict[str, object]) -> None:
    balance(host, *({**it, "revoke": True} for it in rules))


def haproxy_count(host: AgentHost) -> int:
    return len(host.processes("haproxy"))


@pytest.mark.mutation("tcp-proxy-sends-the-proxy-header", instead='""')
@pytest.mark.parametrize("said", [{"protocol": "tcp-proxy"}, {"name": "mail [tcp-proxy]"}], ids=["sent", "named"])
def test_the_proxy_protocol_arrives_at_the_backend(host: AgentHost, said: dict[str, str]) -> None:
    """Version 1 of the header comes before the client's data and has its address (haproxy's proxy-protocol.txt)."""
    wanted = rule(1, 2525, WEB_IP, **said)
    with name_servers(host, WEB) as heard:
        balance(host, wanted)
        with connect(host, 2525) as client:
            ours = client.getsockname()
            wait_until(lambda: any(it.startswith(b"PROXY TCP4 %b " % CLIENT.encode()) for it in heard))
        line = f"PROXY TCP4 {CLIENT} {ADDRESS} {ours[1]} 2525\r\n".encode()
        assert any(it.startswith(line) for it in heard), heard
    revoke(host, wanted)


def test_backend_changes_keep_established_connections(host: AgentHost) -> None:
    with name_servers(host, WEB, DB):
        balance(host, rule(1, 8080, WEB_IP))
        assert {answering_vm(host, 8080) for _ in range(4)} == {WEB}
        with connect(host, 8080) as kept:
            assert kept.recv(100) == b"web"
            balance(host, rule(1, 8080, WEB_IP, DB_IP))
            assert Counter(answering_vm(host, 8080) for _ in range(6)) == {WEB: 3, DB: 3}
            assert is_echoed(kept)
            # After the reply no new connection reaches the removed backend.
            backends = [{"ip": ip, "port": 80, "revoked": ip == WEB_IP} for ip in (WEB_IP, DB_IP)]
            balance(host, rule(1, 8080, backends=backends))
            assert {answering_vm(host, 8080) for _ in range(20)} == {DB}
            assert is_echoed(kept)
            revoke(host, rule(1, 8080))
            assert not is_echoed(kept, 5)
        assert answering_vm(host, 8080, 0.5) == "TimeoutError"
    wait_until(lambda: not haproxy_count(host))


@pytest.mark.parametrize(
    ("algorithm", "spread"), [("roundrobin", {WEB: 4, DB: 4}), ("leastconn", {WEB: 4, DB: 4}), ("source", {})]
)
def test_each_algorithm_spreads_connections_as_documented(
    host: AgentHost, algorithm: str, spread: dict[str, int]
) -> None:
    with name_servers(host, WEB, DB):
        balance(host, rule(1, 8080, WEB_IP, DB_IP, algorithm=algorithm))
        clients = [connect(host, 8080) for _ in range(8)]
        seen = Counter(client.recv(100).decode() for client in clients)
        for client in clients:
            client.close()
    assert seen == spread if spread else len(seen) == 1
    revoke(host, rule(1, 8080))


@pytest.mark.parametrize("said", [{"protocol": "udp"}, {"name": "dns [udp]"}], ids=["sent", "named"])
def test_udp_is_balanced_without_haproxy(host: AgentHost, said: dict[str, str]) -> None:
    servers = []
    for vm in (WEB, DB):
        with host.within(vm):
            servers.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        servers[-1].bind(("0.0.0.0", 80))
    balance(host, rule(1, 5353, WEB_IP, DB_IP, **said))
    assert not haproxy_count(host)

    def answered(patience_s: float = 20.0) -> str:
        with host.within():
            client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with client:
            client.settimeout(20)
            client.bind(("0.0.0.0", next(_ports)))  # a port that was used before would go to the same VM
            client.sendto(b"?", (ADDRESS, 5353))
            for server in select.select(servers, [], [], patience_s)[0]:
                _, peer = server.recvfrom(10)
                assert peer == client.getsockname() or peer[0] == CLIENT, "the VM sees the client's address"
                server.sendto(b"!", peer)
                assert client.recvfrom(10) == (b"!", (ADDRESS, 5353))
                return (WEB, DB)[servers.index(server)]
        return "nobody"

    assert Counter(answered() for _ in range(6)) == {WEB: 3, DB: 3}
    revoke(host, rule(1, 5353, **said))
    assert answered(0.5) == "nobody"
    for server in servers:
        server.close()


def test_the_firewall_filters_balanced_traffic_by_client_address(host: AgentHost) -> None:
    with name_servers(host, WEB):
        balance(host, rule(1, 8080, WEB_IP))
        assert answering_vm(host, 8080) == WEB
        with connect(host, 8080) as kept:
            assert kept.recv(100) == b"web"
            admit(host, "203.0.113.9/32")
            assert answering_vm(host, 8080, 0.5) == "TimeoutError"
            assert not is_echoed(kept, 5)
        admit(host, f"{CLIENT}/32")
        assert answering_vm(host, 8080) == WEB
        revoke(host, rule(1, 8080))


def test_defect_42_seven_hundred_rules_in_one_call(host: AgentHost) -> None:
    """A restart of the network sends them in one call. A command line or the descriptor limit could be exceeded."""
    rules = [rule(number, 10000 + number, WEB_IP, DB_IP) for number in range(1, 701)]
    with name_servers(host, WEB, DB):
        balance(host, *rules)
        listening = set(re.findall(rf"{re.escape(ADDRESS)}:(\d+)", host.run("ss", "-ltn", namespace=NS)))
        assert listening == {str(it["publicPort"]) for it in rules}
        for port in (10001, 10350, 10700):
            assert {answering_vm(host, port) for _ in range(4)} == {WEB, DB}
        lines: list[str] = []
        while not lines or "skip=" in lines[-1]:
            more = lines.pop().partition("skip=")[2].partition(",")[0] if lines else "0"
            lines += message(act(host, "list-firewall-rules", filter="load-balancing", skip=more)).splitlines()
        assert len([it for it in lines if it.startswith(f"load-balancing {ADDRESS} tcp ")]) == 700
        balance(host, *rules)
        state = json.loads(host.path("/var/lib/netloom/scopes/net-204.json").read_text())
        assert len(state["lb_rules"]) == 700
        revoke(host, *rules[:350])
        assert answering_vm(host, 10001, 0.5) == "TimeoutError"
        assert answering_vm(host, 10700) in (WEB, DB)
        revoke(host, *rules)
    wait_until(lambda: not haproxy_count(host))
    assert answering_vm(host, 10700, 0.5) == "TimeoutError"
