"""An interpreter of seccomp filters."""

from __future__ import annotations

import struct

ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050001, 0x80000000


def judge(program: bytes, audit: int, number: int, *arguments: int) -> int:
    """The filter's result for a system call. It interprets the classic BPF instructions that the filters use."""
    values = [*arguments, *[0] * (6 - len(arguments))]
    seccomp_data = struct.pack("<iIQ6Q", number, audit, 0, *values)
    instructions = list(struct.iter_unpack("<HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", seccomp_data, value)
        elif code == 0x54:
            accumulator &= value
        elif code == 0x06:
            return int(value)
        else:
            true = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[code]
            at += if_true if true else if_false
