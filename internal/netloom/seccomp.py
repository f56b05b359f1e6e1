"""Seccomp filters (seccomp(2)) as arrays of struct sock_filter: assemble and install them. Standard library only."""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Iterable, Sequence

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, value

# linux/seccomp.h, linux/prctl.h, linux/audit.h
_RET_ALLOW, _RET_USER_NOTIF, _RET_ERRNO, _RET_KILL_PROCESS = 0x7FFF0000, 0x7FC00000, 0x00050000, 0x80000000
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2
_SECCOMP_SET_MODE_FILTER, _FLAG_NEW_LISTENER = 1, 8
AUDIT_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# linux/bpf_common.h, as classic BPF instructions on struct seccomp_data.
_LD_W_ABS, _AND, _JEQ, _JGE, _JSET, _RET = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCH_AT, _ARGS_AT = 0, 4, 16
_X32_BIT = 0x40000000

ALLOW: Instruction = (_RET, 0, 0, _RET_ALLOW)  # returns: the system call is executed
ASK: Instruction = (_RET, 0, 0, _RET_USER_NOTIF)  # returns: the reader of the listener answers (install_listened)


def numbers(table: str) -> dict[str, int]:
    """The numbers of system calls by name, from a text of names and numbers in turn."""
    words = table.split()
    return {name: int(number) for name, number in zip(words[::2], words[1::2], strict=True)}


def refuse(error: int) -> Instruction:
    """Return: the system call fails with this errno."""
    return (_RET, 0, 0, _RET_ERRNO | error)


def if_equal(value: int, body: Sequence[Instruction]) -> list[Instruction]:
    """Execute ``body`` only if the loaded value is this one."""
    return [(_JEQ, 0, len(body), value), *body]


def if_any_bit(bits: int, body: Sequence[Instruction]) -> list[Instruction]:
    """Execute ``body`` only if the loaded value has one of these bits."""
    return [(_JSET, 0, len(body), bits), *body]


def masked(bits: int) -> Instruction:
    """Keep only these bits of the loaded value."""
    return (_AND, 0, 0, bits)


def head(audit: int) -> list[Instruction]:
    """The first instructions of a filter: load the number of the call.

    A system call of another architecture kills the process. One of x32 fails with EPERM.
    """
    return [
        (_LD_W_ABS, 0, 0, _ARCH_AT),
        (_JEQ, 1, 0, audit),
        (_RET, 0, 0, _RET_KILL_PROCESS),
        (_LD_W_ABS, 0, 0, _NUMBER_AT),
        (_JGE, 0, 1, _X32_BIT),
        refuse(errno.EPERM),
    ]


def argument(index: int) -> Instruction:
    """Load the lower half of a 64-bit argument. All supported architectures are little-endian."""
    return (_LD_W_ABS, 0, 0, _ARGS_AT + 8 * index)


def assemble(program: Iterable[Instruction]) -> bytes:
    """The filter as an array of struct sock_filter."""
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def install(libc: ctypes.CDLL, code: bytes) -> bool:
    """Install a filter, irrevocably; False: the kernel has no seccomp filters. Raises OSError.

    Needs PR_SET_NO_NEW_PRIVS, or CAP_SYS_ADMIN. ``libc`` must have been opened with ``use_errno``.
    """
    program = _Program(len(code) // 8, code)
    mode, address = ctypes.c_ulong(_SECCOMP_MODE_FILTER), ctypes.c_ulong(ctypes.addressof(program))
    if libc.prctl(_PR_SET_SECCOMP, mode, address, ctypes.c_ulong(0), ctypes.c_ulong(0)) == 0:
        return True
    if ctypes.get_errno() == errno.EINVAL:
        return False
    raise OSError(ctypes.get_errno(), "seccomp")


def install_listened(libc: ctypes.CDLL, number: int, code: bytes) -> int:
    """Install a filter and return its listener, from which notifications are read (seccomp_unotify(2)).

    ``number``: of the system call seccomp. Raises OSError.
    """
    program = _Program(len(code) // 8, code)
    mode, flags = ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER), ctypes.c_ulong(_FLAG_NEW_LISTENER)
    listener = libc.syscall(ctypes.c_long(number), mode, flags, ctypes.byref(program))
    if listener < 0:
        raise OSError(ctypes.get_errno(), "seccomp")
    return int(listener)
