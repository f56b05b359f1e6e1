"""Gratuitous ARP: both frames arrive, and neighbours update their cache."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import pytest

from kernel.scratch import descriptors, joined, tool
from netloom.agent.kernel import arp, links
from netloom.agent.kernel.arp import ArpError
from netloom.agent.kernel.namespaces import inside

MAC = "0a:11:22:33:44:55"


def announce(namespace: str, link: str) -> None:
    with arp.Announcer(namespace) as announcer:
        announcer.announce(link, "10.9.0.77", MAC)


@pytest.fixture
def pair() -> Iterator[tuple[str, str]]:
    with joined() as names:
        yield names


def test_both_gratuitous_arp_frames_reach_a_neighbour(pair: tuple[str, str]) -> None:
    left, right = pair
    with inside(right):
        listener = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806))
    with listener:
        listener.bind(("right", 0x0806))
        listener.settimeout(10)
        announce(left, "left")
        received = [listener.recv(1000)[:42] for _ in range(2)]
    assert received == list(arp.frames("10.9.0.77", MAC))


def test_a_neighbour_updates_its_cache_entry(pair: tuple[str, str]) -> None:
    left, right = pair
    tool(right, "ip", "neigh", "add", "10.9.0.77", "lladdr", "0a:00:00:00:00:99", "dev", "right", "nud", "stale")
    announce(left, "left")
    assert f"lladdr {MAC}" in tool(right, "ip", "neigh", "show", "10.9.0.77")


def test_errors_name_the_missing_or_down_link(pair: tuple[str, str]) -> None:
    left, _ = pair
    with pytest.raises(ArpError, match=r"announce 10\.9\.0\.77 on nowhere: No such device"):
        announce(left, "nowhere")
    links.change(left, [links.set_down("left")])
    with pytest.raises(ArpError, match="Network is down") as caught:
        announce(left, "left")
    assert caught.value.errno == errno.ENETDOWN


def test_no_file_descriptor_leaks(pair: tuple[str, str]) -> None:
    before = descriptors()
    for link in ("left", "left", "nowhere"):
        try:
            announce(pair[0], link)
        except ArpError:
            assert link == "nowhere"
    assert descriptors() == before
