"""Shares of conntrack: what floods it with new connections does not stop the connections of others, nor its own."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from kernel.agent_host import REGISTRATION, AgentHost, act, agent_host, done, message, wait_until
from kernel.isolated_network import BRIDGE, DB, DB_IP, DB_MAC, DB_NIC, NS, WEB, WEB_IP, live_with_vm
from kernel.raw_frames import checksum, wire
from netloom.wire import Registration

OUTSIDE, PUBLIC = "203.0.113.1", "203.0.113.20"
UNKNOWN_MAC = "02:01:00:cc:00:99"
SHARE = 1000  # counted by samples: the true limit varies by some hundreds
FLOOD = 8 * SHARE


def registration(share: int) -> Registration:
    return replace(REGISTRATION, conntrack_max_per_vm=share)


@pytest.fixture
def host() -> Iterator[AgentHost]:
    """A network with two VMs, a small share, and a machine outside."""
    with agent_host() as it:
        it.start()
        live_with_vm(it)
        small = registration(SHARE)
        for fixture, command in (("041", "prepare-nic"), ("032", "add-dhcp-entry")):
            done(it.call(fixture, command, registration=small, **DB_NIC))
        it.plug(DB, BRIDGE, DB_MAC, f"{DB_IP}/24")
        it.ip("-n", WEB, "addr", "add", f"{WEB_IP}/24", "dev", "eth0")
        for vm in (WEB, DB):
            it.ip("-n", vm, "route", "add", "default", "via", "10.10.1.1")
        it.run("ip", "addr", "add", f"{OUTSIDE}/24", "dev", "sw-eth2.101", pid=it.fabric)
        yield it


def entries(host: AgentHost) -> int:
    return int(host.run("cat", "/proc/sys/net/netfilter/nf_conntrack_count", namespace=NS))


@contextlib.contextmanager
def listener(host: AgentHost) -> Iterator[socket.socket]:
    """A UDP socket outside."""
    with host.within(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((OUTSIDE, 53))
        sock.settimeout(5)
        yield sock


def sender(host: AgentHost, vm: str) -> socket.socket:
    with host.within(vm):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    return sock


def flood(host: AgentHost, vm: str) -> None:
    """Open many connections to ports outside."""
    with sender(host, vm) as sock:
        for port in range(1000, 1000 + FLOOD):
            with contextlib.suppress(ConnectionRefusedError):
                sock.sendto(b"x", (OUTSIDE, port))


def answered(asking: socket.socket, outside: socket.socket) -> bool:
    """Whether a datagram arrives, and its answer comes back."""
    asking.sendto(b"question", (OUTSIDE, 53))
    with contextlib.suppress(TimeoutError):
        outside.sendto(b"answer", outside.recvfrom(100)[1])
        return asking.recv(100) == b"answer"
    return False


@pytest.mark.mutation("a-vm-has-its-share-of-connections")
def test_a_vm_that_opens_many_connections_leaves_room_for_the_others(host: AgentHost) -> None:
    flood(host, WEB)
    assert SHARE // 4 < entries(host) < 4 * SHARE
    limited = f"connections from VM web-1 ({WEB_IP}) are limited to {SHARE} at the same time (conntrack.max.per.vm)"
    for action in ("check", "show"):
        assert limited in message(act(host, action)).splitlines()
    with listener(host) as outside, sender(host, DB) as other:
        assert answered(other, outside)
    flood(host, DB)
    assert entries(host) < 8 * SHARE


@pytest.mark.mutation("only-first-packets-are-counted")
def test_connections_of_a_limited_vm_go_on_and_survive_a_new_ruleset(host: AgentHost) -> None:
    with listener(host) as outside, sender(host, WEB) as open_already:
        assert answered(open_already, outside)
        flood(host, WEB)
        outside.settimeout(0.05)
        with contextlib.suppress(TimeoutError):
            while True:
                outside.recv(100)
        outside.settimeout(5)
        assert answered(open_already, outside)
        # Another share has other sets.
        done(host.call("041", "prepare-nic", registration=registration(0), **DB_NIC))
        assert answered(open_already, outside)
        flood(host, WEB)
        assert entries(host) > FLOOD - SHARE  # the kernel forgets them after a while
        assert answered(open_already, outside)


def test_senders_that_are_no_nic_have_one_share_together(host: AgentHost) -> None:
    to = bytes.fromhex(host.links(NS)["gst-204"]["address"].replace(":", ""))
    ends = socket.inet_aton(WEB_IP) + socket.inet_aton(OUTSIDE)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 29, 0, 0, 64, 17, 0)
    packet = head[:10] + struct.pack("!H", checksum(head + ends)) + ends
    with wire(host, "eth0", WEB) as link:
        for at in range(FLOOD):
            mac = struct.pack("!HI", 0x0201, 0x1000 + at % 100)
            link.send(to + mac + b"\x08\x00" + packet + struct.pack("!HHHHB", 1000 + at, 7, 9, 0, 0) + bytes(17))
    assert SHARE // 4 < entries(host) < 4 * SHARE
    of_others = "connections of addresses without a NIC, through gst-204,"
    limited = f"{of_others} are limited to {SHARE} at the same time (conntrack.max.per.vm)"
    assert limited in message(act(host, "check")).splitlines()
    with listener(host) as outside, sender(host, WEB) as known:
        assert answered(known, outside)


@pytest.mark.mutation("a-public-address-has-its-share")
def test_connections_from_outside_have_a_share_for_each_public_address(host: AgentHost) -> None:
    rule = {"id": 1, "type": "ingress", "protocol": "icmp", "icmpType": -1, "icmpCode": -1, "publicIp": PUBLIC}
    small = registration(SHARE)
    rules = {"default_egress_allow": True, "rules": [rule]}
    done(host.call("070", "apply-fw-rules", registration=small, fw_rules=rules))
    with host.within(), socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as pings:
        for at in range(4 * FLOOD):
            body = struct.pack("!BBHHH", 8, 0, 0, at, 1)
            pings.sendto(body[:2] + struct.pack("!H", checksum(body)) + body[4:], (PUBLIC, 0))
    assert SHARE < entries(host) < 12 * SHARE
    limited = f"connections to {PUBLIC} are limited to {4 * SHARE} at the same time (conntrack.max.per.vm)"
    assert limited in message(act(host, "check")).splitlines()
    with listener(host) as outside, sender(host, WEB) as vm:
        assert answered(vm, outside)


@pytest.mark.mutation("closed-connections-are-soon-forgotten")
def test_connections_that_are_not_counted_are_soon_forgotten(host: AgentHost) -> None:
    """A TCP connection that a reset has closed is not counted."""
    with host.within(), socket.create_server((OUTSIDE, 9)):
        with host.within(WEB):
            opened = socket.create_connection((OUTSIDE, 9), timeout=5)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        opened.close()
    found: list[list[str]] = []

    def closed() -> bool:
        listed = host.run("cat", "/proc/net/nf_conntrack", namespace=NS)
        found[:] = [it.split() for it in listed.splitlines() if f"dst={OUTSIDE}" in it]
        return [it[5] for it in found] in ([], ["CLOSE"])  # none: two seconds have passed

    wait_until(closed)
    assert all(int(it[4]) <= 2 for it in found)
