"""The channel between agent and guest process, the values of DHCP options, and the seccomp filter in an interpreter."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from guestbed import network, nic
from netloom.agent.processes.guest_client import GuestClient
from netloom.frames import frame
from netloom.guest import sandbox
from netloom.guestwire import Ack, GuestMessage, LentSockets, Listener, ServeNetwork, encode, option_bytes
from netloom.guestwire.channel import Channel, ChannelError
from netloom.secret import Secret
from unit.call_filters import ALLOW, KILL, REFUSE, judge

NETWORK = network(
    nic(45, options={3: b"\n\1\1\1"}, user_data=Secret("#!\n\n"), password=Secret("FAKE"), password_id="7")
)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    one, other = map(Channel, socket.socketpair())
    yield one, other
    one.close()
    other.close()


def test_a_message_arrives_unchanged_with_its_descriptors(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    read, write = os.pipe()
    one.queue(Ack(seq=1))
    one.queue(
        ServeNetwork(seq=2, network=NETWORK, listeners=(Listener("dhcp"), Listener("metadata", True))), [read, write]
    )
    one.queue(Ack(seq=3, error="no"))
    one.flush()
    os.close(read)
    os.close(write)
    arrived: list[tuple[GuestMessage, list[int]]] = []
    while len(arrived) < 3:
        arrived += other.receive()
    assert [message for message, _ in arrived] == [
        Ack(seq=1),
        ServeNetwork(seq=2, network=NETWORK, listeners=(Listener("dhcp"), Listener("metadata", True))),
        Ack(seq=3, error="no"),
    ]
    theirs = arrived[1][1]
    assert [len(descriptors) for _, descriptors in arrived] == [0, 2, 0]
    os.write(theirs[1], b"through")
    assert os.read(theirs[0], 10) == b"through"
    for descriptor in theirs:
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)


def test_the_tags_of_the_messages_stay_as_they_are() -> None:
    """An agent and a guest process of different builds talk to each other during an upgrade."""
    tags = [it.__struct_config__.tag for it in get_args(GuestMessage)]
    assert tags == ["serve", "update", "drop", "lend", "ping", "hello", "done", "lent", "taken", "notice"]


def test_a_message_larger_than_the_socket_buffer_arrives(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    big = network(nic(45, user_data=Secret("x" * 3_000_000)))
    read, write = os.pipe()
    one.queue(ServeNetwork(seq=1, network=big, listeners=(Listener("dhcp"),)), [read])
    arrived: list[object] = []
    while not arrived:
        one.flush()
        for message, descriptors in other.receive():
            arrived.append(message)
            os.close(*descriptors)
    assert arrived == [ServeNetwork(seq=1, network=big, listeners=(Listener("dhcp"),))]
    assert not one.pending
    os.close(read)
    os.close(write)


def test_secrets_are_not_printed() -> None:
    assert "FAKE" not in repr(NETWORK)
    assert "#!" not in repr(NETWORK)


def test_the_end_of_the_stream_and_invalid_bytes_are_errors(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.close()
    with pytest.raises(ChannelError, match="gone"):
        other.receive()
    for foreign in (b"\xff\xff\xff\xff", b"\0\0\0\1\xc1", b"SSH-2.0-x\r\n" * 10):
        here, there = socket.socketpair()
        there.send(foreign)
        with here, there, pytest.raises(ChannelError):
            Channel(here).receive()


@pytest.mark.mutation("a-message-is-any-bytes")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\x82\xa4type\xa4done\xa3seq\xa1\xff",  # not UTF-8
        b"\x83\xa4type\xa4done\xa3seq\x01\xa1z" + b"\x91" * 200_000,  # an unknown field, deeply nested
    ],
)
def test_any_bytes_are_a_message_or_an_error(body: bytes) -> None:
    one, other = socket.socketpair()
    with one, other, pytest.raises(ChannelError, match="cannot be read"):
        channel = Channel(one)
        data = frame(body)
        for at in range(0, len(data), 50_000):
            other.send(data[at : at + 50_000])
            channel.receive()


@pytest.mark.mutation("waiting-descriptors-are-bounded")
def test_descriptors_that_no_message_announces_are_bounded_and_closed() -> None:
    """An attacker who controls the guest process must not use up the agent's descriptors."""
    before = len(os.listdir("/proc/self/fd"))
    here, there = socket.socketpair()
    with there:
        channel = Channel(here)
        with pytest.raises(ChannelError, match="that no message announces"):
            for _ in range(3):
                socket.send_fds(there, [frame(encode(Ack(seq=1)))], [0] * 200)
                channel.receive()
        channel.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.mutation("unwanted-descriptors-are-closed")
@pytest.mark.mutation("guest-messages-are-bounded", instead="Channel(sock)")
async def test_a_hostile_guest_process_costs_the_agent_no_descriptors_and_little_memory(tmp_path: Path) -> None:
    lost: list[ChannelError] = []
    ended = asyncio.Event()

    def end(_: GuestClient, error: ChannelError) -> None:
        lost.append(error)
        ended.set()

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(1)
        before = len(os.listdir("/proc/self/fd"))
        loop = asyncio.get_running_loop()
        GuestClient(loop, tmp_path / "s", lambda _, event: None, end)
        there, _ = listening.accept()
        with there:
            for message in (
                LentSockets(seq=9, listeners=(Listener("dhcp"),)),
                ServeNetwork(seq=9, network=NETWORK, listeners=(Listener("dhcp"),)),
            ):
                socket.send_fds(there, [frame(encode(message))], [0])
            there.send((64 << 20).to_bytes(4, "big"))
            await asyncio.wait_for(ended.wait(), 60)
        assert len(os.listdir("/proc/self/fd")) == before
    assert "too long" in str(lost[0])


def test_missing_descriptors_are_an_error(ends: tuple[Channel, Channel]) -> None:
    one, other = ends
    one.queue(LentSockets(seq=1, listeners=(Listener("dhcp"),)))
    one.flush()
    with pytest.raises(ChannelError, match="1 descriptors were announced and 0 came"):
        other.receive()


def test_a_receiver_that_does_not_read_is_an_error() -> None:
    here, there = socket.socketpair()
    with here, there:
        channel = Channel(here, pending_bytes_max=100_000)
        with pytest.raises(ChannelError, match="does not read"):
            for _ in range(10_000):
                channel.queue(Ack(seq=1, error="x" * 1000))
                channel.flush()


@pytest.mark.parametrize(
    ("code", "text", "value"),
    [
        (3, "10.1.1.254", bytes([10, 1, 1, 254])),
        (6, "10.1.1.1, 192.0.2.53", bytes([10, 1, 1, 1, 192, 0, 2, 53])),
        (2, "-3600", b"\xff\xff\xf1\xf0"),
        (19, "true", b"\1"),
        (23, "64", b"\x40"),
        (26, "9000", b"\x23\x28"),
        (25, "68,296", b"\0\x44\1\x28"),
        (66, "boot.example", b"boot.example"),
        (67, "10.1.1.1", b"10.1.1.1"),
        (119, "a.example, b", b"\1a\7example\0\1b\0"),
        (121, "10.0.0.0/8 via 10.1.1.1, 0.0.0.0/0 via 10.1.1.2", b"\x08\n\n\1\1\1\0\n\1\1\2"),
        (43, "0x01:04:0a000001", b"\1\4\n\0\0\1"),
        (150, "192.0.2.1", b"\xc0\0\2\1"),
        (224, "192.0.2.1", b"\xc0\0\2\1"),
        (224, "words, and more", b"words, and more"),
        (252, "http://wpad/x.dat", b"http://wpad/x.dat"),
    ],
)
def test_an_option_is_encoded_with_the_type_of_its_rfc(code: int, text: str, value: bytes) -> None:
    assert option_bytes(code, text) == value


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (3, "router"), (26, "70000"), (26, "-1"), (23, "a"), (119, "a..b"), (121, "10.0.0.1/8 via 10.1.1.1"), (66, ""),
        (43, "0xzz"), (51, "4294967295"), (53, "5"), (54, "10.1.1.9"), (0, "x"), (255, "x"), (61, "x"), (82, "x"),
        (256, "x"), (-1, "x"),
    ],
)  # fmt: skip
def test_an_invalid_value_or_code_of_an_option_is_refused(code: int, text: str) -> None:
    with pytest.raises(ValueError):
        option_bytes(code, text)


# ---- the seccomp filter

# open, connect, socket, execve, fork or clone, ptrace, bind, kill, prctl, clone3, io_uring_setup, openat2, bpf
FORBIDDEN = {
    "x86_64": [2, 42, 41, 59, 57, 56, 101, 49, 62, 157, 435, 425, 437, 321, 257, 0x40000000, 0x40000029],
    "aarch64": [56, 203, 198, 221, 220, 117, 200, 129, 167, 435, 425, 437, 280, 48],
}


@pytest.mark.parametrize("machine", sandbox.ARCHES)
def test_the_filter_allows_only_the_system_calls_of_its_list(machine: str) -> None:
    arch = sandbox.ARCHES[machine]
    program = sandbox.call_filter(arch)
    assert len(program) // 8 <= 4096  # BPF_MAXINSNS
    conditional = {"mmap", "mprotect", "ioctl", "fcntl", "setsockopt"}
    allowed = set(arch.numbers.values())
    for number in range(600):
        name = next((name for name, its in arch.numbers.items() if its == number), "")
        if name in conditional:
            continue
        assert judge(program, arch.audit, number) == (ALLOW if number in allowed else REFUSE), number
    for number in FORBIDDEN[machine]:
        assert judge(program, arch.audit, number) == REFUSE
    assert judge(program, 0x40000003, 11) == KILL  # execve of 32-bit x86, which has another number

    def of(name: str, *arguments: int) -> int:
        return judge(program, arch.audit, arch.numbers[name], *arguments)

    assert [of("mmap", 0, 1, prot) for prot in (1, 3, 4, 7)] == [ALLOW, ALLOW, REFUSE, REFUSE]
    assert [of("mprotect", 0, 1, prot) for prot in (1, 5)] == [ALLOW, REFUSE]
    assert [of("ioctl", 3, request) for request in (0x5421, 0x5412, 0x8914)] == [ALLOW, REFUSE, REFUSE]
    assert [of("fcntl", 3, command) for command in (1, 3, 4)] == [ALLOW] * 3
    assert [of("fcntl", 3, command) for command in (0, 8, 1030)] == [REFUSE] * 3
    options = [(1, 11), (6, 27), (1, 25), (6, 11), (1, 27), (0, 3)]
    assert [of("setsockopt", 3, *it) for it in options] == [ALLOW, ALLOW, REFUSE, REFUSE, REFUSE, REFUSE]
