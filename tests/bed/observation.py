"""Ask the hosts of the bed for addresses, each at its own port of the switch, and note which host answers.

This runs in a process of the switch (bed/observer.py starts it). A question is put on the wire of one host, so the
answer tells the host apart, although hosts that serve one network have the same MAC addresses. It reaches the host
whatever the switch drops. The switch drops the answers, after they are noted and before it learns from them. So
nobody else notices the observer.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import socket
import struct
import time
from typing import Any

from bed.probes import ETH_P_ALL, ETH_P_ARP, SO_RCVBUFFORCE, Control

MAC_PREFIX = "02:4c:0b:5e"  # the last two bytes of the observer's MAC address are the number of the host
SECONDS_MAX = 900.0
ANSWERS_MAX = 1_000_000
LATE_S = 0.03  # a round of questions that comes so much later than the one before is reported

_ETH_P_IPV6 = 0x86DD
_SO_ATTACH_FILTER, _SO_TIMESTAMPNS = 26, 35
_SOL_PACKET, _PACKET_IGNORE_OUTGOING = 263, 23
# The host has no power: its port is down or away, or just losing its other end (veth refuses the frame then).
_OFF = {errno.ENODEV, errno.ENXIO, errno.ENETDOWN, errno.ENOBUFS}

# What is noted: [time, host number, index of the address]; and the rounds that came late: [from, to].
_answers: list[tuple[float, int, int]] = []
_late: list[tuple[float, float]] = []


def _mac(host: int) -> bytes:
    return bytes.fromhex(MAC_PREFIX.replace(":", "")) + host.to_bytes(2, "big")


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return int(~(total + (total >> 16)) & 0xFFFF)


def _arp_request(source: bytes, target: bytes) -> bytes:
    """An ARP probe: without a sender address, so that nobody notes the observer."""
    head = b"\xff" * 6 + source + struct.pack("!HHHBBH", ETH_P_ARP, 1, 0x0800, 6, 4, 1)
    return head + source + bytes(4) + bytes(6) + target


def _neighbour_solicitation(source: bytes, target: bytes) -> bytes:
    sender = bytes.fromhex("fe80000000000000") + source[:3] + b"\xff\xfe" + source[3:]
    group = bytes.fromhex("ff0200000000000000000001ff") + target[13:]
    body = struct.pack("!BBHI", 135, 0, 0, 0) + target + b"\1\1" + source
    pseudo = sender + group + struct.pack("!II", len(body), 58)
    body = body[:2] + struct.pack("!H", _checksum(pseudo + body)) + body[4:]
    ip = struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + sender + group
    return b"\x33\x33" + group[12:] + source + struct.pack("!H", _ETH_P_IPV6) + ip + body


def _answered(frame: bytes) -> bytes:
    """The address that the frame is an answer for; empty for another frame."""
    kind = frame[12:14]
    if kind == b"\x08\x06" and frame[20:22] == b"\0\2":
        return frame[28:32]
    if kind == b"\x86\xdd" and len(frame) >= 78 and (frame[20], frame[54]) == (58, 136):
        return frame[62:78]
    return b""


# Instructions of classic BPF: code, jump if true, jump if false, operand.
_Program = list[tuple[int, int, int, int]]
_ENDS = [(0x06, 0, 0, 0x40000), (0x06, 0, 0, 0)]  # ret all; ret nothing
# ld [0]; jeq prefix
_TO_OBSERVER: _Program = [(0x20, 0, 0, 0), (0x15, 0, 1, int.from_bytes(_mac(0)[:4], "big")), *_ENDS]
# ldh [12]; jeq IPv4; ldb [23]; jeq UDP; ldh [34]; jeq port 67
_DHCP_ANSWERS: _Program = [
    (0x28, 0, 0, 12), (0x15, 0, 5, 0x0800), (0x30, 0, 0, 23), (0x15, 0, 3, 17), (0x28, 0, 0, 34), (0x15, 0, 1, 67),
    *_ENDS,
]  # fmt: skip


def _listener(code: _Program) -> socket.socket:
    """A socket that receives such frames on every port of the switch, with the kernel's time."""
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *it) for it in code))
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    raw.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(code), ctypes.addressof(program)))
    raw.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 << 20)
    raw.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
    raw.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    raw.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:  # what has arrived before the filter was there
            raw.recv(1)
    return raw


def _note_all(raw: socket.socket, numbers: dict[bytes, int]) -> None:
    while True:
        try:
            frame, told, _, _ = raw.recvmsg(128, 64)
        except BlockingIOError:
            return
        address = _answered(frame)
        if address in numbers and len(_answers) < ANSWERS_MAX:
            seconds, nanoseconds = struct.unpack("qq", told[0][2])
            age_s = time.time() - (seconds + nanoseconds / 1e9)
            _answers.append((time.monotonic() - age_s, int.from_bytes(frame[4:6], "big"), numbers[address]))


def observe(
    stop: Control, *, addresses: list[str], wires: list[list[Any]], every_s: float = 0.005, seconds: float = SECONDS_MAX
) -> int:
    """Ask until stopped; returns the number of answers. A wire is [host number, port, indices of ``addresses``]."""
    if not 0 < seconds <= SECONDS_MAX:
        raise ValueError(f"{seconds} s is not within 0 and {SECONDS_MAX:.0f} s")
    families = [socket.AF_INET6 if ":" in it else socket.AF_INET for it in addresses]
    packed = [socket.inet_pton(family, it) for family, it in zip(families, addresses, strict=True)]
    numbers = {it: number for number, it in enumerate(packed)}
    frames = [
        (port, (_arp_request if len(packed[it]) == 4 else _neighbour_solicitation)(_mac(host), packed[it]))
        for host, port, asked in wires
        for it in asked
    ]
    # The observer must see what happens on a busy machine, and needs some per cent of a core.
    os.setpriority(os.PRIO_PROCESS, 0, -10)
    with _listener(_TO_OBSERVER) as raw, socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        stop.ready()
        poll = select.poll()
        poll.register(raw, select.POLLIN)
        began = due = last = time.monotonic()
        while not stop.is_set() and (now := time.monotonic()) < began + seconds:
            if now >= due:
                if now - last > every_s + LATE_S:
                    _late.append((last, now))
                last, due = now, max(due + every_s, now)
                for port, frame in frames:
                    try:
                        sender.sendto(frame, (port, 0))
                    except OSError as error:
                        if error.errno not in _OFF:
                            raise
            if poll.poll(max(0.0, due - time.monotonic()) * 1000):
                _note_all(raw, numbers)
        _note_all(raw, numbers)
    return len(_answers)


def observed(stop: Control, *, answers: int, late: int) -> dict[str, Any]:
    """What was noted after the first ``answers`` answers and ``late`` late rounds."""
    return {"answers": _answers[answers:], "late": _late[late:]}


def dhcp_answers(stop: Control, *, seconds: float = SECONDS_MAX) -> list[list[Any]]:
    """Note each answer of a DHCP server until stopped: the port of the switch at which it arrives, and its number."""
    if not 0 < seconds <= SECONDS_MAX:
        raise ValueError(f"{seconds} s is not within 0 and {SECONDS_MAX:.0f} s")
    found: list[list[Any]] = []
    with _listener(_DHCP_ANSWERS) as raw:
        stop.ready()
        poll = select.poll()
        poll.register(raw, select.POLLIN)
        until = time.monotonic() + seconds
        while poll.poll(50) or not (stop.is_set() or time.monotonic() > until):
            with contextlib.suppress(BlockingIOError):
                frame, (port, *_) = raw.recvfrom(128)
                found.append([port, int.from_bytes(frame[46:50], "big")])
    return found
