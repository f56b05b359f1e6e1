"""Shares of the metadata server: a VM that holds connections or asks in a loop is named, and harms no other VM."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from kernel.agent_host import AgentHost, act, agent_host, done, message, wait_until
from kernel.isolated_network import BRIDGE, DB, DB_IP, DB_MAC, DB_NIC, SERVER, WEB, WEB_IP, get, live_with_vm
from netloom.guest.limits import VM_CONNECTIONS_MAX, VM_REQUESTS_BURST, VM_REQUESTS_PER_S


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start()
        live_with_vm(it)
        done(it.call("032", "add-dhcp-entry", **DB_NIC))
        items = [{"dir": "metadata", "file": "instance-id", "content": "i-db"}]
        done(it.call("035", "save-vm-data", **DB_NIC, vm_data=items))
        it.plug(DB, BRIDGE, DB_MAC, f"{DB_IP}/24")
        it.ip("-n", WEB, "addr", "add", f"{WEB_IP}/24", "dev", "eth0")
        yield it


def named(host: AgentHost, text: str) -> bool:
    line = f"network 204: VM web-1 ({WEB_IP}): metadata and passwords: the VM {text}"
    return all(line in message(act(host, action)).splitlines() for action in ("check", "show"))


@pytest.mark.mutation("a-limited-vm-is-named")
def test_a_vm_that_holds_connections_is_named_and_others_are_served(host: AgentHost) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4 * VM_CONNECTIONS_MAX):
            with host.within(WEB):
                stack.enter_context(socket.create_connection((SERVER, 80), 20))
        assert get(host, DB, "/latest/meta-data/instance-id", "--max-time", "20") == "i-db"
        wait_until(lambda: named(host, f"holds {VM_CONNECTIONS_MAX} connections: more are closed"))


def test_a_vm_that_asks_in_a_loop_is_named_and_others_are_served(host: AgentHost) -> None:
    refused = 0
    for _ in range(10):
        with host.within(WEB):
            sock = socket.create_connection((SERVER, 80), 20)
        with sock, sock.makefile("rb") as answers:
            for _ in range(60):
                sock.sendall(b"GET /latest/none HTTP/1.1\r\nHost: x\r\n\r\n")
                status = answers.readline()
                while answers.readline() not in (b"\r\n", b""):
                    pass
                if b" 429 " in status:
                    refused += 1
                    break
    assert refused, f"more than {VM_REQUESTS_BURST} requests at once"
    assert get(host, DB, "/latest/meta-data/instance-id", "--max-time", "20") == "i-db"
    wait_until(lambda: named(host, f"sends more than {VM_REQUESTS_PER_S:.0f} requests per second: more are refused"))
