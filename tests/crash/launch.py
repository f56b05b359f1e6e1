"""Execute a program whose effects a tracer follows: ``python launch.py <program> [<argument>...]``.

It installs a seccomp filter (seccomp_unotify(2)) that stops the program, and all processes that it starts, before each
system call with an effect. The tracer (``effects.py``) takes the listener of the filter out of this process. Until it
answers, this process waits in execve(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

if __name__ == "__main__":  # as a program it is alone in sys.path
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "internal")]

from crash.system_calls import HARMLESS, NAMED
from netloom import seccomp

_SET_MODE_FILTER = 1
# The second flag: a signal does not interrupt a system call that waits for the tracer, and so does not repeat it. It is
# unknown before Linux 5.19.
_NEW_LISTENER, _WAIT_KILLABLE = 8, 32
_O_CREAT, _O_TRUNC = 0x40, 0x200
_CLONE_THREAD = 0x10000


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def filter_of(machine: str) -> bytes:
    """The filter: harmless calls are executed, all others wait for the tracer."""
    named = NAMED[machine]
    program = seccomp.head(seccomp.AUDIT_ARCHES[machine])
    for number in HARMLESS[machine].values():
        program += seccomp.if_equal(number, [seccomp.ALLOW])
    # A file that is opened but not created changes nothing, nor does a thread. They are many.
    opens = [*seccomp.if_any_bit(_O_CREAT | _O_TRUNC, [seccomp.ASK]), seccomp.ALLOW]
    for name, index in (("open", 1), ("openat", 2)):
        if name in named:
            program += seccomp.if_equal(named[name], [seccomp.argument(index), *opens])
    threads = [seccomp.argument(0), *seccomp.if_any_bit(_CLONE_THREAD, [seccomp.ALLOW]), seccomp.ASK]
    program += seccomp.if_equal(named["clone"], threads)
    return seccomp.assemble([*program, seccomp.ASK])


def install(libc: ctypes.CDLL, machine: str) -> None:
    """Install the filter; its listener is an open descriptor of this process. Raises OSError."""
    code = filter_of(machine)
    program = _Program(len(code) // 8, code)
    for flags in (_NEW_LISTENER | _WAIT_KILLABLE, _NEW_LISTENER):
        number = ctypes.c_long(HARMLESS[machine]["seccomp"])
        if libc.syscall(number, _SET_MODE_FILTER, ctypes.c_ulong(flags), ctypes.byref(program)) >= 0:
            return
        if ctypes.get_errno() != errno.EINVAL:
            break
    raise OSError(ctypes.get_errno(), "seccomp")


if __name__ == "__main__":
    install(ctypes.CDLL(None, use_errno=True), os.uname().machine)
    os.execvp(sys.argv[1], sys.argv[1:])
