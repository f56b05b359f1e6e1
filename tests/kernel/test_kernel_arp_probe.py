"""ARP probes: who owns an address on a link, heard without leaving a trace."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import pytest

from kernel.scratch import descriptors, joined, tool
from netloom.agent.kernel import arp, arp_probe, links, packet_socket
from netloom.agent.kernel.arp_probe import Heard, SignsOfLife, Wire, answers, ask
from netns import inside

# What kernel.scratch.joined makes.
OWNER, RIGHT_MAC = "10.9.0.2", "0a:00:00:00:09:02"
FREE, TAKEN = "10.9.0.77", "10.9.0.78"
OTHER_MAC = "0a:00:00:00:09:99"
BRIEFLY_S, PATIENTLY_S = 0.3, 20.0


@pytest.fixture
def pair() -> Iterator[tuple[str, str]]:
    with joined() as names:
        yield names


def asked(namespace: str, *addresses: str, timeout_s: float = BRIEFLY_S, link: str = "left", tag: int = 0) -> Heard:
    with inside(namespace):
        return answers(link, addresses, timeout_s=timeout_s, tag=tag)


def mac_of(namespace: str, link: str) -> str:
    return links.find_links(namespace, [link])[0].mac


@contextlib.contextmanager
def packets(namespace: str, link: str, protocol: int = 0x0806) -> Iterator[socket.socket]:
    with inside(namespace):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(protocol))
    with tap:
        tap.bind((link, protocol))
        tap.settimeout(PATIENTLY_S)
        yield tap


@contextlib.contextmanager
def answering(namespace: str, link: str, *frames: bytes) -> Iterator[None]:
    """Send these frames when a probe arrives on the link."""
    with packets(namespace, link, 0x0003) as tap:

        def answer() -> None:
            while tap.recv(1000)[12:14] != b"\x08\x06":
                pass
            for each in frames:
                tap.send(each)

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield
        finally:
            thread.join()


def message(
    operation: int = 2,
    sender: str = FREE,
    target: str = "0.0.0.0",
    mac: str = OTHER_MAC,
    formats: tuple[int, int, int, int] = (1, 0x0800, 6, 4),
    kind: int = 0x0806,
) -> bytes:
    """An ARP message, broadcast."""
    packed = bytes.fromhex(mac.replace(":", ""))
    body = struct.pack("!HHBBH", *formats, operation) + packed + socket.inet_aton(sender)
    return b"\xff" * 6 + packed + struct.pack("!H", kind) + body + bytes(6) + socket.inet_aton(target)


def tagged(tag: int, frame: bytes) -> bytes:
    return frame[:12] + struct.pack("!HH", 0x8100, tag) + frame[12:]


def test_nobody_answers_for_a_free_address_and_three_probes_are_sent(pair: tuple[str, str]) -> None:
    left, right = pair
    with packets(right, "right") as tap:
        assert asked(left, FREE, TAKEN) == Heard()
        seen = [tap.recv(1000)[:42] for _ in range(6)]
    mac = bytes.fromhex(mac_of(left, "left").replace(":", ""))
    assert seen == [arp_probe.probe(socket.inet_aton(it), mac) for it in (FREE, TAKEN)] * 3


def test_each_owner_is_heard_and_no_neighbour_table_changes(pair: tuple[str, str]) -> None:
    left, right = pair
    tool(right, "ip", "addr", "add", f"{TAKEN}/32", "dev", "right")
    tool(right, "ip", "neigh", "flush", "all")
    assert asked(left, OWNER, FREE, TAKEN) == Heard(owners={OWNER: RIGHT_MAC, TAKEN: RIGHT_MAC})
    assert "lladdr" not in tool(right, "ip", "-4", "neigh")


def test_no_more_is_waited_for_when_all_addresses_have_an_owner(pair: tuple[str, str]) -> None:
    # Without the early end the test would take hours.
    assert asked(pair[0], OWNER, timeout_s=10_000).owners == {OWNER: RIGHT_MAC}


@pytest.mark.parametrize(
    "frame",
    [
        message(),
        message(mac=RIGHT_MAC),
        message(operation=1, target=OWNER),
        arp.frames(FREE, OTHER_MAC)[0],
        arp.frames(FREE, OTHER_MAC)[1],
        message() + bytes(18),
    ],
    ids=["answer", "another MAC", "request of the owner", "announcement", "gratuitous answer", "padding"],
)
def test_every_message_of_an_owner_counts(pair: tuple[str, str], frame: bytes) -> None:
    left, right = pair
    with answering(right, "right", frame):
        heard = asked(left, FREE, timeout_s=PATIENTLY_S)
    assert heard == Heard(owners={FREE: ":".join(f"{it:02x}" for it in frame[6:12])})


def claimed(claim: bytes) -> bytes:
    """A probe for FREE, from another host of netloom with this claim."""
    return arp_probe.probe(socket.inet_aton(FREE), bytes.fromhex(OTHER_MAC.replace(":", "")), claim=claim)


@pytest.mark.mutation("the-stronger-claim-goes-first", instead="True")
@pytest.mark.parametrize(
    ("theirs", "goes_first"),
    [
        (claimed(b"\0\0\0\2" + bytes(7)), True),
        (claimed(b"\0\0\0\1\x81" + bytes(6)), True),
        (claimed(b"\0\0\0\1\x80" + bytes(6)), False),  # our own, reflected
        (claimed(b"\0\0\0\1\x7f" + b"\xff" * 6), False),
        (message(operation=1, sender="0.0.0.0", target=FREE), False),
        (message(operation=1, sender="0.0.0.0", target=FREE) + b"\xff" * 18, False),
        (claimed(b"\xff" * 3), True),
    ],
    ids=["epoch", "number", "own", "weaker", "stranger", "padded stranger", "cut short"],
)
def test_of_two_hosts_that_ask_at_once_only_the_weaker_hears_of_the_other(
    pair: tuple[str, str], theirs: bytes, goes_first: bool
) -> None:
    left, right = pair
    with answering(right, "right", theirs), inside(left):
        heard = answers("left", [FREE, TAKEN], timeout_s=0.5, claim=b"\0\0\0\1\x80" + bytes(6))
    assert heard == Heard(probing={FREE: OTHER_MAC} if goes_first else {})


GARBAGE = [
    b"",
    message()[:41],
    message()[:20],
    message(operation=3),
    message(sender=TAKEN),
    message(formats=(6, 0x0800, 6, 4)),
    message(formats=(1, 0x86DD, 6, 4)),
    message(formats=(1, 0x0800, 8, 4)),
    message(formats=(1, 0x0800, 6, 16)),
    message(kind=0x0800),
    message(kind=0x8100),
    message(mac="00:00:00:00:00:00"),
    message(mac="01:00:5e:00:00:01"),
    message(operation=1, sender="0.0.0.0", target=TAKEN),
    message(operation=2, sender="0.0.0.0", target=FREE),
    b"\xff" * 1000,
]


@pytest.mark.mutation("an-owner-has-a-station-address")
def test_garbage_is_ignored(pair: tuple[str, str]) -> None:
    left, right = pair
    long_enough = [it for it in GARBAGE if len(it) >= 14]  # what the kernel sends at all
    with answering(right, "right", *long_enough):
        assert asked(left, FREE) == Heard()
    for it in GARBAGE:
        decoded = arp_probe.decoded(it)
        assert decoded is None or decoded[2] != socket.inet_aton(FREE)


@pytest.mark.mutation("probes-leave-out-what-we-send", instead="True")
def test_what_this_host_sends_is_no_answer(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = pair
    monkeypatch.setattr(packet_socket, "_PACKET_IGNORE_OUTGOING", 0x7FFF)  # as a kernel that does not know the option
    with packets(left, "left") as tap, packets(right, "right") as far:
        done = threading.Event()

        def send_too() -> None:
            far.recv(1000)  # a probe: the other socket listens by now
            while not done.wait(0.01):
                tap.send(message())

        sending = threading.Thread(target=send_too)
        sending.start()
        try:
            assert asked(left, FREE) == Heard()
        finally:
            done.set()
            sending.join()


@pytest.mark.mutation("probes-hear-their-own-vlan", instead="(0x15, 0, 0, tag)")
def test_vlans_of_one_nic_are_told_apart(pair: tuple[str, str]) -> None:
    left, right = pair
    in_vlan = {tag: tagged(tag, message(mac=f"0a:00:00:00:00:{tag:02x}")) for tag in (5, 6)}
    with answering(right, "right", *in_vlan.values()):
        assert asked(left, FREE, tag=6).owners == {FREE: "0a:00:00:00:00:06"}
    with packets(right, "right", 0x0003) as tap:
        tap.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA: the tag is not in the frame any more
        asked(left, FREE, tag=6)
        data, found, _, _ = tap.recvmsg(1000, 1000)
        while data[12:14] != b"\x08\x06":
            data, found, _, _ = tap.recvmsg(1000, 1000)
        assert struct.unpack_from("=H", found[0][2], 16)[0] & 0xFFF == 6  # tpacket_auxdata.tp_vlan_tci
    # Answers in the other VLANs that nobody asked for.
    with answering(right, "right", *in_vlan.values()):
        assert asked(left, FREE) == Heard()
    # The tag 0 is a priority without a VLAN (IEEE 802.1Q).
    with answering(right, "right", tagged(5 << 13, message())):
        assert asked(left, FREE, timeout_s=PATIENTLY_S).owners == {FREE: OTHER_MAC}


def test_a_link_that_is_missing_or_down_fails_alone(pair: tuple[str, str]) -> None:
    left, _ = pair
    tool(left, "ip", "link", "add", "off", "type", "bridge")
    before = descriptors()
    with inside(left):
        heard = ask({Wire("left"): [OWNER], Wire("off"): [FREE], Wire("nowhere"): [FREE]}, BRIEFLY_S)
    assert heard == {
        Wire("left"): Heard(owners={OWNER: RIGHT_MAC}),
        Wire("off"): Heard(failed="off: Network is down"),
        Wire("nowhere"): Heard(failed="nowhere: No such device"),
    }
    assert descriptors() == before
    with pytest.raises(ValueError, match="10.9.0"):
        asked(left, "10.9.0")


def answered(namespace: str, *addresses: str, timeout_s: float = BRIEFLY_S) -> bool:
    with inside(namespace), SignsOfLife() as signs:
        return signs.any_answer({Wire("left"): addresses}, timeout_s)


def test_one_answer_is_enough_and_shows_that_the_link_works(pair: tuple[str, str]) -> None:
    # Without the early end the test would take hours.
    assert answered(pair[0], FREE, OWNER, timeout_s=10_000)
    assert not answered(pair[0], FREE, TAKEN)
    assert not answered(pair[0])


@pytest.mark.mutation("what-is-broadcast-is-no-answer", instead="message is None")
@pytest.mark.parametrize(
    "frame",
    [message(), message(operation=1, target=OWNER), arp.frames(FREE, OTHER_MAC)[1]],
    ids=["broadcast answer", "request of the owner", "gratuitous answer"],
)
def test_what_is_broadcast_does_not_show_that_the_link_works(pair: tuple[str, str], frame: bytes) -> None:
    left, right = pair
    with answering(right, "right", frame):
        assert not answered(left, FREE)


def test_only_an_answer_for_an_address_in_question_counts(pair: tuple[str, str]) -> None:
    left, right = pair
    mine = bytes.fromhex(mac_of(left, "left").replace(":", ""))
    with answering(right, "right", mine + message(sender=TAKEN)[6:], mine + message(operation=1)[6:]):
        assert not answered(left, FREE)
    with answering(right, "right", mine + message()[6:]):
        assert answered(left, FREE, timeout_s=PATIENTLY_S)


def test_a_link_that_is_down_has_no_answer(pair: tuple[str, str]) -> None:
    tool(pair[1], "ip", "link", "set", "right", "down")
    assert not answered(pair[0], OWNER)


def frames_to(namespace: str, *frames: bytes) -> None:
    """Send these frames from the right end of the pair."""
    with packets(namespace, "right") as tap:
        for it in frames:
            tap.send(it)


@pytest.mark.mutation("late-answers-are-not-those-to-the-next-question", instead="self._owners")
def test_each_question_has_answers_of_its_own(pair: tuple[str, str]) -> None:
    left, right = pair
    wire = {Wire("left"): [OWNER]}
    with inside(left), SignsOfLife() as signs:
        assert signs.any_answer(wire, PATIENTLY_S)
        open_ = descriptors()
        assert signs.any_answer(wire, PATIENTLY_S)
        assert descriptors() == open_
        tool(right, "ip", "addr", "del", f"{OWNER}/24", "dev", "right")
        frames_to(right, bytes.fromhex(mac_of(left, "left").replace(":", "")) + message(sender=OWNER)[6:])
        assert not signs.any_answer(wire, BRIEFLY_S)
        assert signs.any_answer({Wire("left"): [FREE]}, BRIEFLY_S) is False
        assert descriptors() == open_
        tool(right, "ip", "addr", "add", f"{OWNER}/24", "dev", "right")
        assert signs.any_answer(wire, PATIENTLY_S)
    with inside(left):
        assert descriptors() < open_


@pytest.mark.mutation("a-link-that-came-back-gets-a-new-socket", instead="self._failed")
@pytest.mark.parametrize("change", ["down", "renamed", "replaced", "other mac"])
def test_a_link_that_was_away_is_asked_again(pair: tuple[str, str], change: str) -> None:
    left, right = pair
    wire = {Wire("left"): [OWNER]}
    with inside(left), SignsOfLife() as signs:
        assert signs.any_answer(wire, PATIENTLY_S)
        match change:
            case "down":
                tool(left, "ip", "link", "set", "left", "down")
                assert not signs.any_answer(wire, BRIEFLY_S)
                tool(left, "ip", "link", "set", "left", "up")
            case "renamed":
                tool(left, "ip", "link", "set", "left", "name", "other")  # Linux 6.2 does that while it is up
                assert not signs.any_answer(wire, BRIEFLY_S)
                assert signs.any_answer({Wire("other"): [OWNER]}, PATIENTLY_S)
                tool(left, "ip", "link", "set", "other", "name", "left")
            case "replaced":
                tool(left, "ip", "link", "del", "left")
                assert not signs.any_answer(wire, BRIEFLY_S)
                tool(left, "ip", "link", "add", "left", "type", "veth", "peer", "name", "right", "netns", right)
                tool(left, "ip", "link", "set", "left", "up")
                tool(right, "ip", "addr", "add", f"{OWNER}/24", "dev", "right")
                tool(right, "ip", "link", "set", "right", "up")
            case "other mac":
                tool(left, "ip", "link", "set", "left", "address", "0a:00:00:00:09:77")
        assert signs.any_answer(wire, PATIENTLY_S)
