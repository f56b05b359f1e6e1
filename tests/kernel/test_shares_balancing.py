"""Shares of the load balancer with real haproxy processes: of each rule, of each client; idle connections; old workers.

Clients are on the public VLAN, servers in VMs.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest

from kernel.agent_host import REGISTRATION, AgentHost, act, agent_host, done, message, wait_until
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
from kernel.isolated_network import BRIDGE, WEB, WEB_IP, WEB_MAC, live
from netloom.agent.processes.supervisor import OLD_WORKERS_MAX

OTHERS = tuple(f"203.0.113.{at}" for at in range(101, 109))
# 200 connections for two rules: 100 for each rule, 25 for each client of a rule, 50 for each client of both.
SMALL = msgspec.structs.replace(REGISTRATION, lb_connections_max=200)
SHORT = msgspec.structs.replace(REGISTRATION, lb_idle_s=5)
RULE_SHARE, CLIENT_SHARE = 100, 25


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start()
        live(it)
        done(it.call("032", "add-dhcp-entry"))
        it.plug(WEB, BRIDGE, WEB_MAC, f"{WEB_IP}/24")
        it.ip("-n", WEB, "route", "add", "default", "via", "10.10.1.1")
        for address in (CLIENT, *OTHERS):
            it.run("ip", "addr", "add", f"{address}/24", "dev", "sw-eth2.101", pid=it.fabric)
        admit(it, "203.0.113.0/24")
        yield it


def balance(host: AgentHost, *rules: dict[str, object], registration: object = REGISTRATION) -> None:
    done(host.call("080", "apply-lb-rules", registration=registration, lb_rules=list(rules)))


@contextlib.contextmanager
def silent(host: AgentHost, port: int, sources: tuple[str, ...], each: int) -> Iterator[list[socket.socket]]:
    """Connections that send nothing, ``each`` from every source."""
    held: list[socket.socket] = []
    try:
        for source in sources:
            for _ in range(each):
                with contextlib.suppress(ConnectionResetError):  # above the share of a client
                    held.append(connect(host, port, source=source))
        yield held
    finally:
        for it in held:
            it.close()


def served(held: list[socket.socket], enough: int) -> int:
    """How many of the connections have reached the server, which sends its name first.

    Waits up to 20 seconds for ``enough`` of them, and then two seconds for more.
    """
    left, count = set(held), 0
    until = time.monotonic() + 20
    while left and (ready := select.select(list(left), [], [], max(until - time.monotonic(), 0))[0]):
        for it in ready:
            with contextlib.suppress(OSError):
                count += it.recv(100) == WEB.encode()
        left -= set(ready)
        if count >= enough:
            until = min(until, time.monotonic() + 2)
    return count


def reported(host: AgentHost, line: str) -> None:
    """Wait until check and show have this line: without an answer of haproxy in time they have none of its lines."""
    wait_until(lambda: all(line in message(act(host, action)).splitlines() for action in ("check", "show")))


@pytest.mark.mutation("a-rule-has-its-share")
def test_silent_connections_to_one_rule_leave_the_other_rules_alone(host: AgentHost) -> None:
    with name_servers(host, WEB):
        balance(host, rule(1, 8081, WEB_IP), rule(2, 8082, WEB_IP), registration=SMALL)
        with silent(host, 8081, OTHERS, CLIENT_SHARE) as held:  # twice the share of the rule, all of the process
            assert served(held, RULE_SHARE) == RULE_SHARE
            assert answering_vm(host, 8081, 0.5) == "TimeoutError"
            assert answering_vm(host, 8082) == WEB
            reported(
                host, f"balancing rule 1 ({ADDRESS}:8081): {RULE_SHARE} of {RULE_SHARE} connections: new clients wait"
            )
        wait_until(lambda: answering_vm(host, 8081, 0.5) == WEB)
        # The connections that waited are served first.
        wait_until(lambda: "balancing rule 1" not in message(act(host, "check")))


@pytest.mark.mutation("a-client-has-its-share")
def test_silent_connections_of_one_client_leave_the_rule_to_other_clients(host: AgentHost) -> None:
    with name_servers(host, WEB):
        balance(host, rule(1, 8081, WEB_IP), rule(2, 8082, WEB_IP), registration=SMALL)
        with silent(host, 8081, OTHERS[:1], 2 * RULE_SHARE) as held:
            assert served(held, CLIENT_SHARE) == CLIENT_SHARE
            assert answering_vm(host, 8081) == WEB
            reported(
                host,
                f"balancing rule 1 ({ADDRESS}:8081): {OTHERS[0]} holds its share of {CLIENT_SHARE} connections: "
                f"more of them are refused",
            )


def test_a_client_of_many_rules_has_a_share_of_all_connections(host: AgentHost) -> None:
    """A client has 12 connections of each rule, and 50 in all."""
    rules = [rule(at, 8080 + at, WEB_IP) for at in range(1, 8)]
    with name_servers(host, WEB), contextlib.ExitStack() as stack:
        balance(host, *rules, registration=SMALL)
        held = [it for at in range(1, 8) for it in stack.enter_context(silent(host, 8080 + at, OTHERS[:1], 12))]
        assert served(held, 50) == 50
        assert answering_vm(host, 8081) == WEB
        reported(host, f"balancing: {OTHERS[0]} holds its share of 50 connections to all rules: more are refused")


def test_silent_connections_to_all_other_rules_leave_a_rule_what_is_reserved_for_it(host: AgentHost) -> None:
    """Seven rules may have 50 connections each, which is more than the 200 there are. 14 are reserved for each."""
    with name_servers(host, WEB), contextlib.ExitStack() as stack:
        balance(host, *(rule(at, 8080 + at, WEB_IP) for at in range(1, 8)), registration=SMALL)
        for at in range(1, 7):
            stack.enter_context(silent(host, 8080 + at, OTHERS, 7))
        assert answering_vm(host, 8087) == WEB
        # A refused connection counts until it is closed. So a rule gets a few less or more, and is not named with less.
        wait_until(lambda: message(act(host, "check")).count(", and 14 are reserved for it: more are refused") >= 2)


@pytest.mark.mutation("idle-connections-end", instead="3600")
def test_idle_connections_end_and_those_with_data_stay(host: AgentHost) -> None:
    """Idle is a client that sends nothing, and one that does not read what it asked for."""
    with name_servers(host, WEB):
        balance(host, rule(1, 8081, WEB_IP), registration=SHORT)
        with connect(host, 8081) as idle, connect(host, 8081) as deaf, connect(host, 8081) as busy:
            assert {it.recv(100) for it in (idle, deaf, busy)} == {b"web"}
            deaf.settimeout(0.2)
            with contextlib.suppress(TimeoutError):
                while True:
                    deaf.send(bytes(1 << 16))
                    assert is_echoed(busy)  # this may take as long as an idle connection may last
            began = time.monotonic()
            left = {idle, deaf}
            while left:
                assert is_echoed(busy)
                assert time.monotonic() < began + 30
                left -= {it for it in left if has_ended(it)}
            assert time.monotonic() > began + 3
            assert is_echoed(busy)


def has_ended(client: socket.socket) -> bool:
    """Whether the balancer has ended the connection: poll(2) reports a FIN or a reset also before unread data."""
    poll = select.poll()
    poll.register(client, select.POLLRDHUP)
    return bool(poll.poll(300))


def haproxies(host: AgentHost) -> int:
    return len(host.processes("haproxy"))


@pytest.mark.mutation("old-workers-are-bounded")
def test_many_changes_leave_a_bounded_number_of_processes(host: AgentHost) -> None:
    """Each change leaves a worker with a connection. The oldest ones end."""
    held: list[socket.socket] = []
    with name_servers(host, WEB):
        for number in range(25):
            balance(host, rule(1, 8081, WEB_IP), rule(2, 9000 + number, WEB_IP))
            held.append(connect(host, 8081))
            assert held[-1].recv(100) == b"web"
        wait_until(lambda: haproxies(host) <= 2 + OLD_WORKERS_MAX)  # the master and the current worker
        assert all(is_echoed(it) for it in held[-OLD_WORKERS_MAX - 1 :])
        assert answering_vm(host, 8081) == WEB
        # Another agent finds the old processes of the first one.
        host.kill()
        host.start()
        for number in range(2):
            balance(host, rule(1, 8081, WEB_IP), rule(2, 9100 + number, WEB_IP))
            held.append(connect(host, 8081))
            assert held[-1].recv(100) == b"web"
        wait_until(lambda: haproxies(host) <= 2 + OLD_WORKERS_MAX)
        assert all(is_echoed(it) for it in held[-OLD_WORKERS_MAX - 1 :])
        # Connections that are still open keep none of them.
        done(host.call("131", "destroy-network"))
        assert not haproxies(host)
    for it in held:
        it.close()


def test_a_connection_survives_many_changes_if_the_workers_between_have_none(host: AgentHost) -> None:
    with name_servers(host, WEB):
        balance(host, rule(1, 8081, WEB_IP))
        with connect(host, 8081) as kept:
            assert kept.recv(100) == b"web"
            for number in range(12):
                balance(host, rule(1, 8081, WEB_IP), rule(2, 9000 + number, WEB_IP))
            assert is_echoed(kept)
            wait_until(lambda: haproxies(host) == 3)
