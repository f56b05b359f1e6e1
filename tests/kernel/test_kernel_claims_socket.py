"""The sockets for claims: what they send and hear on a link, and what they leave out."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import pytest

from kernel.scratch import joined, tool
from netloom.agent.kernel import links
from netloom.agent.kernel.claims_socket import AT_ONCE, PAUSE_S, ClaimSockets, ClaimWire
from netloom.ethernet import MAGIC, PAYLOAD_BYTES_MAX, ethernet_frame
from netns import inside

MAC = b"\2\0\0\0\0\x99"
PAYLOAD = MAGIC + b"\1\1\0\0 and so on"
PATIENTLY_S = 20.0


@pytest.fixture
def pair() -> Iterator[tuple[str, str]]:
    with joined() as names:
        yield names


class Heard:
    """Sockets in a namespace, and what they have heard."""

    def __init__(self, namespace: str, *, tag: int = 0, link: str = "left") -> None:
        self.namespace = namespace
        self.payloads: list[bytes] = []
        self.lost: list[ClaimWire] = []
        self.wire = wire_of(namespace, link, tag)
        self.sockets = ClaimSockets(
            asyncio.get_running_loop(), lambda _, payload: self.payloads.append(payload), self.lost.append
        )
        self.errors = self.follow(self.wire)

    def follow(self, *wires: ClaimWire) -> list[str]:
        with inside(self.namespace):
            return self.sockets.follow(wires)

    async def until(self, *payloads: bytes) -> None:
        await until(lambda: self.payloads[-len(payloads) :] == list(payloads))


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENTLY_S):
        while not what():  # noqa: ASYNC110, the kernel tells nobody
            await asyncio.sleep(0.01)


def wire_of(namespace: str, link: str, tag: int = 0) -> ClaimWire:
    (found,) = links.find_links(namespace, [link])
    return ClaimWire(link, found.index, found.mac, tag)


@contextlib.contextmanager
def raw(namespace: str, link: str) -> Iterator[socket.socket]:
    with inside(namespace):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    with tap:
        tap.bind((link, 3))
        tap.settimeout(PATIENTLY_S)
        yield tap


async def test_a_claim_is_broadcast_with_the_links_own_address_and_heard(pair: tuple[str, str]) -> None:
    left, right = pair
    one, other = Heard(left), Heard(right, link="right")
    with raw(right, "right") as tap:
        one.sockets.send(one.wire, PAYLOAD)
        while (seen := tap.recv(2000))[12:14] != b"\x88\xb5":
            pass
    assert seen == ethernet_frame(bytes.fromhex(one.wire.mac.replace(":", "")), 0, PAYLOAD)
    await other.until(PAYLOAD)
    assert one.payloads == []  # not what it sends itself
    one.sockets.close()
    other.sockets.close()


@pytest.mark.mutation("claims-are-heard-on-their-own-vlan", instead="(0x15, 0, 0, tag)")
@pytest.mark.parametrize("tag", [0, 204])
async def test_only_frames_of_this_type_with_this_tag_are_heard(pair: tuple[str, str], tag: int) -> None:
    left, right = pair
    heard = Heard(left, tag=tag)
    assert heard.errors == []
    good = ethernet_frame(MAC, tag, PAYLOAD)
    with raw(right, "right") as tap:
        for frame in (
            ethernet_frame(MAC, 205, PAYLOAD),
            ethernet_frame(MAC, 0 if tag else 204, PAYLOAD),
            ethernet_frame(MAC, tag, b"Netloom" + PAYLOAD[7:]),
            ethernet_frame(MAC, tag, b"netlooM" + PAYLOAD[7:]),
            ethernet_frame(MAC, tag, MAGIC + b"\2" + PAYLOAD[8:]),
            ethernet_frame(MAC, tag, b"netloom")[:-3],
            good.replace(b"\x88\xb5", b"\x08\x00"),
            ethernet_frame(MAC, tag, b""),
        ):
            tap.send(frame)
        tap.send(good)
        tap.send(good + b"!")
    await heard.until(PAYLOAD, PAYLOAD + b"!")
    assert heard.payloads == [PAYLOAD, PAYLOAD + b"!"]
    heard.sockets.close()


async def test_a_frame_of_any_length_is_cut(pair: tuple[str, str]) -> None:
    heard = Heard(pair[0])
    with raw(pair[1], "right") as tap:
        tap.send(ethernet_frame(MAC, 0, MAGIC + b"\1" + bytes(1400)))
        tap.send(ethernet_frame(MAC, 0, PAYLOAD))
    await heard.until(PAYLOAD)
    assert [len(it) for it in heard.payloads] == [PAYLOAD_BYTES_MAX + 1, len(PAYLOAD)]
    heard.sockets.close()


@pytest.mark.mutation("a-flood-of-claims-costs-little")
async def test_a_flood_leaves_time_for_other_work(pair: tuple[str, str]) -> None:
    """After some frames the link is not read for a moment, and the kernel drops what comes meanwhile."""
    heard = Heard(pair[0])
    with raw(pair[1], "right") as tap:
        for _ in range(2000):
            tap.send(ethernet_frame(MAC, 0, PAYLOAD))
        began = time.monotonic()
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(heard.payloads) <= AT_ONCE * (1 + (time.monotonic() - began) / PAUSE_S)
        await until(lambda: len(heard.payloads) >= 2 * AT_ONCE)  # it goes on
    heard.sockets.close()
    await asyncio.sleep(0.3)  # the timer finds the sockets closed


async def test_a_link_that_goes_is_reported_and_one_that_comes_back_is_heard(pair: tuple[str, str]) -> None:
    left, right = pair
    heard = Heard(left)
    tool(left, "ip", "link", "set", "left", "down")
    await until(lambda: heard.lost != [])
    assert heard.lost == [heard.wire]
    tool(left, "ip", "link", "set", "left", "up")
    with raw(right, "right") as tap:

        def arrives() -> bool:
            with contextlib.suppress(OSError):  # the pair has no carrier yet
                tap.send(ethernet_frame(MAC, 0, PAYLOAD))
            return PAYLOAD in heard.payloads

        await until(arrives)
    assert heard.follow() == []
    heard.sockets.send(heard.wire, PAYLOAD)  # nobody listens there any more
    count = len(heard.payloads)
    with raw(right, "right") as tap:
        tap.send(ethernet_frame(MAC, 0, PAYLOAD))
    await asyncio.sleep(0.1)
    assert len(heard.payloads) == count
    heard.sockets.close()


async def test_a_link_that_cannot_be_heard_is_named(pair: tuple[str, str]) -> None:
    heard = Heard(pair[0])
    gone = ClaimWire("gone", 99, "02:00:00:00:00:01")
    renamed = ClaimWire("left", heard.wire.index + 1, heard.wire.mac)
    assert heard.follow(gone, renamed, heard.wire) == [
        "claims cannot be heard on gone: No such device",
        "claims cannot be heard on left: another link has its name now",
    ]
    heard.sockets.close()
