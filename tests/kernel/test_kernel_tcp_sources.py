"""A listening socket that only some hosts can reach."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from kernel.rtnetlink import add_address
from kernel.scratch import joined, settled
from netloom.agent.kernel import links
from netloom.agent.kernel.tcp_sources import accept_all, accept_only
from netns import inside

PORT = 7788
LISTENS_4, LISTENS_6 = "10.9.0.1", "fd09::1"  # what kernel.scratch.joined makes, and the first source of each kind
IP4, IP6 = ["10.9.0.2", "10.9.0.3", "10.9.0.4"], ["fd09::2", "fd09::3", "fd09::1:0:0:2"]
# A jump of a filter passes at most 255 instructions.
MANY = [bytes((10, 8, at >> 8, at & 0xFF)) for at in range(300)] + [b"\xfd\x08" + bytes(13) + bytes((1,))]
PATIENTLY_S, BRIEFLY_S = 20.0, 0.3


@pytest.fixture(name="hosts")
def two_namespaces() -> Iterator[tuple[socket.socket, str]]:
    """A socket that listens in one namespace, and another namespace that has all addresses."""
    with joined() as (left, right):
        more = [*(f"{it}/24" for it in IP4[1:]), *(f"{it}/64" for it in IP6[1:])]
        links.change(right, [add_address("right", it) for it in more])
        settled(left, "left")
        settled(right, "right")
        with inside(left):
            listening = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True)
        with listening:
            listening.settimeout(PATIENTLY_S)
            yield listening, right


def packed(*addresses: str) -> list[bytes]:
    return [socket.inet_pton(socket.AF_INET6 if ":" in it else socket.AF_INET, it) for it in addresses]


def reaching(hosts: tuple[socket.socket, str], expected: list[str]) -> list[str]:
    """The addresses from which a client can connect. Those that are expected have more time."""
    listening, right = hosts
    found = []
    for source in IP4 + IP6:
        with inside(right):
            client = socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET)
        with client, contextlib.suppress(TimeoutError):
            client.bind((source, 0))
            client.settimeout(PATIENTLY_S if source in expected else BRIEFLY_S)
            client.connect((LISTENS_6 if ":" in source else LISTENS_4, PORT))
            accepted, peer = listening.accept()
            accepted.close()
            found.append(peer[0].removeprefix("::ffff:"))
    return found


@pytest.mark.parametrize(
    "known",
    [IP4[:1], IP4[1:], IP6[:1], IP6[1:], [IP4[2], IP6[2]], IP4 + IP6],
    ids=["one IPv4", "two IPv4", "one IPv6", "two IPv6", "both", "all"],
)
def test_only_known_hosts_connect(hosts: tuple[socket.socket, str], known: list[str]) -> None:
    accept_only(hosts[0], MANY + packed(*known))
    assert reaching(hosts, known) == known


def test_all_hosts_connect_without_a_filter(hosts: tuple[socket.socket, str]) -> None:
    accept_all(hosts[0])
    accept_only(hosts[0], [])
    assert reaching(hosts, []) == []
    accept_all(hosts[0])
    assert reaching(hosts, IP4 + IP6) == IP4 + IP6
