"""Shares of a network's resolver: one VM floods it over UDP or TCP, and another VM is still answered.

The resolvers outside are a socket that answers names that begin with "good", and no other.
"""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from kernel.agent_host import AgentHost, act, agent_host, done, message, wait_until
from kernel.isolated_network import BRIDGE, DB, DB_IP, DB_MAC, DB_NIC, NS, SERVER, WEB, WEB_IP, live_with_vm
from meanwhile import meanwhile

UPSTREAM = "198.51.100.53"
UNKNOWN_MAC = "02:01:00:cc:00:99"
FLOOD = 3000
BURST, PER_S, CONNECTIONS = 500, 100, 4
RESETS = 8  # one more each 30 seconds


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start()
        live_with_vm(it)
        for fixture, command in (("041", "prepare-nic"), ("032", "add-dhcp-entry"), ("034", "add-dns-entry")):
            done(it.call(fixture, command, **DB_NIC))
        it.plug(DB, BRIDGE, DB_MAC, f"{DB_IP}/24")
        it.ip("-n", WEB, "addr", "add", f"{WEB_IP}/24", "dev", "eth0")
        it.run("ip", "addr", "add", "203.0.113.1/24", "dev", "sw-eth2.101", pid=it.fabric)
        it.run("ip", "addr", "add", f"{UPSTREAM}/32", "dev", "lo", pid=it.fabric)
        yield it


@contextlib.contextmanager
def upstream(host: AgentHost) -> Iterator[set[bytes]]:
    """Yields the first labels of all names that were asked."""
    asked: set[bytes] = set()
    with host.within():
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    sock.bind((UPSTREAM, 53))
    sock.settimeout(0.2)

    def serve() -> None:
        with contextlib.suppress(TimeoutError):
            query, peer = sock.recvfrom(2000)
            label = query[13 : 13 + query[12]]
            asked.add(label)
            if label.startswith(b"good"):
                end = query.index(b"\0", 12) + 5
                answer = b"\xc0\x0c" + struct.pack("!HHIH", 1, 1, 60, 4) + socket.inet_aton("192.0.2.7")
                sock.sendto(query[:2] + b"\x81\x80\0\1\0\1\0\0\0\0" + query[12:end] + answer, peer)

    with sock, meanwhile(serve):
        yield asked


def question(name: str) -> bytes:
    labels = b"".join(bytes((len(it),)) + it.encode() for it in name.split("."))
    return random.randbytes(2) + b"\x01\0\0\1\0\0\0\0\0\0" + labels + b"\0\0\1\0\1"


def asks(host: AgentHost, vm: str, name: str, *, tcp: bool = False) -> str:
    """Ask for an A record, over UDP up to three times; returns the address, else the response code or ``silence``."""
    with host.within(vm):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM)
    with sock:
        sock.settimeout(20 if tcp else 5)
        query = question(name)
        for _ in range(1 if tcp else 3):
            with contextlib.suppress(OSError):
                sock.connect((SERVER, 53))
                sock.sendall(struct.pack("!H", len(query)) + query if tcp else query)
                data = sock.recv(2000)
                if tcp and len(data) == 2:  # the length may come alone
                    data += sock.recv(2000)
                answer = data[2:] if tcp else data
                if answer:
                    return socket.inet_ntoa(answer[-4:]) if answer[7] else f"code {answer[3] & 15}"
    return "silence"


def flood(host: AgentHost, vm: str, asked: set[bytes]) -> float:
    """Ask ``FLOOD`` names that nobody answers, from 20 sockets; returns the seconds that it took.

    A full socket of the resolver would hide what is tested: it is given time, and has to ask on what passes for sure.
    """
    with host.within(vm):
        socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(20)]
    began = time.monotonic()
    for number in range(FLOOD):
        socks[number % 20].sendto(question(f"n{number}.example"), (SERVER, 53))
        if number % 100 == 99 and number < BURST:
            wait_until(lambda: len(asked) > number)  # noqa: B023
        elif number % 100 == 99:
            time.sleep(0.02)
    took = time.monotonic() - began
    for it in socks:
        it.close()
    return took


def flooded(host: AgentHost) -> None:
    with upstream(host) as asked:
        took = flood(host, WEB, asked)
        assert asks(host, DB, "good.example") == "192.0.2.7"
        assert BURST <= len(asked) < BURST + PER_S * (took + 2), "what passes is one VM's share"


@pytest.mark.mutation("a-vm-has-its-share-of-the-resolver")
def test_questions_of_one_vm_leave_the_resolver_to_others(host: AgentHost) -> None:
    flooded(host)
    limited = f"network 204: DNS questions of VM web-1 ({WEB_IP}) are limited to {PER_S} per second"
    for action in ("check", "show"):
        assert limited in message(act(host, action)).splitlines()
    assert DB_IP not in message(act(host, "check"))


@pytest.mark.mutation("forged-addresses-share-the-resolver")
def test_questions_from_forged_addresses_leave_the_resolver_to_vms(host: AgentHost) -> None:
    host.ip("-n", WEB, "link", "set", "eth0", "address", UNKNOWN_MAC)
    flooded(host)
    limited = f"network 204: DNS questions of MAC addresses without a NIC are limited to {PER_S} per second"
    assert limited in message(act(host, "check")).splitlines()


@pytest.mark.mutation("resolver-has-places-for-many-vms", instead='"dns-forward-max=150"')
def test_unanswered_questions_of_one_vm_do_not_fill_the_resolver(host: AgentHost) -> None:
    with upstream(host) as asked:
        flood(host, WEB, asked)
        assert [asks(host, DB, f"good{at}.example") for at in range(5)] == ["192.0.2.7"] * 5


@pytest.mark.mutation("a-vm-has-its-share-of-dns-connections")
def test_silent_tcp_connections_of_one_vm_leave_the_resolver_to_others(host: AgentHost) -> None:
    held: list[socket.socket] = []
    refused = 0
    for _ in range(110):
        with host.within(WEB):
            try:
                held.append(socket.create_connection((SERVER, 53), 5))
            except ConnectionRefusedError:
                refused += 1
    try:
        assert asks(host, DB, "web-1.cs2cloud.internal", tcp=True) == WEB_IP
        assert (len(held), refused) == (CONNECTIONS, 110 - CONNECTIONS)
        limited = f"network 204: DNS connections of VM web-1 ({WEB_IP}) are limited to {CONNECTIONS} at the same time"
        assert limited in message(act(host, "check")).splitlines()
        assert asks(host, WEB, "web-1.cs2cloud.internal", tcp=True) == "silence"
    finally:
        for it in held:
            it.close()
    # The share is free again once the connections have ended.
    until = time.monotonic() + 20
    while asks(host, WEB, "web-1.cs2cloud.internal", tcp=True) != WEB_IP:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.mutation("a-half-closed-connection-counts", instead='"60"')
@pytest.mark.mutation("a-reset-connection-to-the-resolver-counts")
def test_connections_that_a_vm_resets_count_while_the_resolver_serves_them(host: AgentHost) -> None:
    """The resolver outside is silent, so a process waits for it, and does not notice that the VM has gone.

    A connection that the VM closes counts until conntrack forgets it.
    """
    with host.within():
        outside = socket.create_server((UPSTREAM, 53))
    outside.settimeout(5)
    waiting: list[socket.socket] = []
    with outside, upstream(host):
        began = time.monotonic()
        for at in range(60):
            time.sleep(0.01)  # the kernel updates its count once per tick
            with host.within(WEB), contextlib.suppress(ConnectionRefusedError):
                client = socket.create_connection((SERVER, 53), 5)
                query = question(f"n{at}.example")
                client.sendall(struct.pack("!H", len(query)) + query)
                waiting.append(outside.accept()[0])
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                client.close()
        assert asks(host, DB, "web-1.cs2cloud.internal", tcp=True) == WEB_IP
        assert CONNECTIONS < len(waiting) < CONNECTIONS + RESETS + 2 + (time.monotonic() - began) / 30
        limited = f"network 204: DNS connections of VM web-1 ({WEB_IP}) are limited to {CONNECTIONS} at the same time"
        assert limited in message(act(host, "check")).splitlines()
        with host.within(DB):
            closed = socket.create_connection((SERVER, 53), 5)
        closed.sendall(struct.pack("!H", len(query)) + query)
        waiting.append(outside.accept()[0])
        closed.shutdown(socket.SHUT_WR)
        wait_until(lambda: closing_s(host) > 150)  # the process ends after 150 seconds
        closed.close()
    for it in waiting:
        it.close()


def closing_s(host: AgentHost) -> int:
    """The seconds for which conntrack remembers the connection that the VM has closed; 0: there is none."""
    listed = map(str.split, host.run("cat", "/proc/net/nf_conntrack", namespace=NS).splitlines())
    return next((int(it[4]) for it in listed if it[5] == "CLOSE_WAIT" and f"src={DB_IP}" in it), 0)


def test_elements_that_packets_add_are_no_difference(host: AgentHost) -> None:
    """The elements that packets add are not compared: no repair, and the counts stay over a change of the ruleset."""
    with host.within(WEB):
        held = [socket.create_connection((SERVER, 53), 5) for _ in range(CONNECTIONS)]
    assert message(act(host, "check")) == "nothing to do: all is as it should be"
    done(host.call("053", "add-port-forward"))
    with host.within(WEB), pytest.raises(ConnectionRefusedError):
        socket.create_connection((SERVER, 53), 5)
    for it in held:
        it.close()
