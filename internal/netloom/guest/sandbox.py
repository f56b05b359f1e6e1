"""The sandbox of the guest process. An attacker who controls the process can read its tables and use its sockets only.

The process enters the sandbox once, after all imports, and opens nothing afterwards. Each layer works without the
others:

* an empty network namespace, in which no address can be reached, and an IPC namespace;
* an empty root directory;
* a user id and a group id that own nothing;
* no capabilities, and no way to gain any;
* limits: no child processes, no core files, and a maximum of open files;
* a seccomp filter with a list of the system calls that serving needs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
from typing import NamedTuple

from netloom import seccomp
from netloom.errors import HostRefused
from netloom.seccomp import ALLOW, Instruction, argument, if_any_bit, if_equal

# In no passwd file and in no range that is assigned to subordinate ids, dynamic users or containers (systemd's
# UIDS-GIDS.md: 0x70000000 to 0x7fffffff are free).
USER_ID = GROUP_ID = 0x7E7E0043

# Enough for a thousand networks with three sockets and 256 connections each.
DESCRIPTORS_MAX = 1 << 18
# The agent shortens the log long before (agent/processes/files.py).
LOG_BYTES_MAX = 1 << 20
# Private memory (RLIMIT_DATA). On a host with more than 16 GiB the limit is an eighth of the memory.
MEMORY_BYTES_MAX = 2 << 30

_M_MMAP_THRESHOLD = -3  # malloc.h
# linux/sched.h, linux/prctl.h
_CLONE_NEWNET, _CLONE_NEWIPC = 0x40000000, 0x08000000
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITIES_V3 = 0x20080522

_PROT_EXEC = 0x4
_FIONBIO = 0x5421
_F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL = 1, 2, 3, 4
# level << 16 | option: SO_NO_CHECK, TCP_SAVE_SYN
_SOCKET_OPTIONS = ((1, 11), (6, 27))
_REFUSE = seccomp.refuse(errno.EPERM)


class _Arch(NamedTuple):
    audit: int
    numbers: dict[str, int]


# Numbers from asm/unistd_64.h and asm-generic/unistd.h. The agent passes the sockets, and accept4 returns connections.
# No call of the list opens or creates files or sockets, connects, starts or signals processes, or inspects files.
_X86_64 = seccomp.numbers("""
    read 0  write 1  close 3  poll 7  lseek 8  mmap 9  mprotect 10  munmap 11  brk 12  rt_sigaction 13
    rt_sigprocmask 14  rt_sigreturn 15  ioctl 16  sched_yield 24  mremap 25  madvise 28  nanosleep 35  getpid 39
    sendto 44  recvfrom 45  sendmsg 46  recvmsg 47  shutdown 48  getsockname 51  getpeername 52  setsockopt 54
    getsockopt 55  exit 60  fcntl 72  gettimeofday 96  getppid 110  sigaltstack 131  gettid 186  time 201  futex 202
    restart_syscall 219  clock_gettime 228  clock_nanosleep 230  exit_group 231  epoll_wait 232  epoll_ctl 233
    ppoll 271  epoll_pwait 281  accept4 288  getrandom 318  membarrier 324  rseq 334  epoll_pwait2 441
""")
_AARCH64 = seccomp.numbers("""
    epoll_ctl 21  epoll_pwait 22  fcntl 25  ioctl 29  close 57  lseek 62  read 63  write 64  ppoll 73  exit 93
    exit_group 94  futex 98  nanosleep 101  clock_gettime 113  clock_nanosleep 115  sched_yield 124
    restart_syscall 128  sigaltstack 132  rt_sigaction 134  rt_sigprocmask 135  rt_sigreturn 139  gettimeofday 169
    getpid 172  getppid 173  gettid 178  getsockname 204  getpeername 205  sendto 206  recvfrom 207  setsockopt 208
    getsockopt 209  shutdown 210  sendmsg 211  recvmsg 212  brk 214  munmap 215  mremap 216  mmap 222  mprotect 226
    madvise 233  accept4 242  getrandom 278  membarrier 283  rseq 293  epoll_pwait2 441
""")
ARCHES = {
    "x86_64": _Arch(seccomp.AUDIT_ARCHES["x86_64"], _X86_64),
    "aarch64": _Arch(seccomp.AUDIT_ARCHES["aarch64"], _AARCH64),
}


def enter(root: str) -> tuple[str, ...]:
    """Enter the sandbox, irrevocably; return the names of its layers.

    ``root`` is an empty directory that only root can write to; it becomes the root directory. Raises HostRefused when
    a layer cannot be set up. Only ``seccomp`` may be missing, on a kernel or a processor without it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    if os.geteuid() != 0:
        raise HostRefused("the guest process must be started as root; it drops all privileges itself")
    status = os.stat(root)
    if os.listdir(root) or status.st_uid != 0 or status.st_mode & 0o022:
        raise HostRefused(f"{root} is not an empty directory that only root can write to")

    # Each large answer is a mapping of its own, so that its memory goes back to the host when it is sent (mallopt(3)).
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 18)  # guard: freed-answers-are-returned
    _call(libc.unshare, _CLONE_NEWNET | _CLONE_NEWIPC)
    os.chroot(root)
    os.chdir("/")

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    descriptors = DESCRIPTORS_MAX if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS_MAX)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A write to a full log fails; the interpreter ignores SIGXFSZ (setrlimit(2)).
    resource.setrlimit(resource.RLIMIT_FSIZE, (LOG_BYTES_MAX, LOG_BYTES_MAX))
    # Tables grow with the networks, unread answers do not (limits.py).
    memory = max(MEMORY_BYTES_MAX, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 8)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))  # guard: the-guest-process-has-a-memory-limit

    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break  # EINVAL: the kernel has no further capabilities
    os.setgroups([])
    os.setresgid(GROUP_ID, GROUP_ID, GROUP_ID)
    os.setresuid(USER_ID, USER_ID, USER_ID)  # guard: the-guest-process-is-not-root
    libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    _call(libc.capset, struct.pack("=Ii", _CAPABILITIES_V3, 0), bytes(24))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    _call(libc.prctl, _PR_SET_DUMPABLE, 0, 0, 0, 0)
    _call(libc.prctl, _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    layers = ("namespace", "root", "user", "capabilities", "limits")
    return (*layers, "seccomp") if _filter_calls(libc) else layers


def call_filter(arch: _Arch) -> bytes:
    """The seccomp filter as an array of struct sock_filter. Calls that are not in the list fail with EPERM.

    A system call of another architecture kills the process.
    """
    program = seccomp.head(arch.audit)
    conditions = {
        "mmap": _unless_bits(2, _PROT_EXEC),
        "mprotect": _unless_bits(2, _PROT_EXEC),
        "ioctl": _if_one_of(1, (_FIONBIO,)),
        "fcntl": _if_one_of(1, (_F_GETFD, _F_SETFD, _F_GETFL, _F_SETFL)),
        "setsockopt": _if_pair(1, 2, _SOCKET_OPTIONS),
    }
    for name, number in arch.numbers.items():
        program += if_equal(number, conditions.get(name, [ALLOW]))
    return seccomp.assemble([*program, _REFUSE])


def _unless_bits(index: int, bits: int) -> list[Instruction]:
    return [argument(index), *if_any_bit(bits, [_REFUSE]), ALLOW]


def _if_one_of(index: int, values: tuple[int, ...]) -> list[Instruction]:
    body = [argument(index)]
    for value in values:
        body += if_equal(value, [ALLOW])
    return [*body, _REFUSE]


def _if_pair(first: int, second: int, pairs: tuple[tuple[int, int], ...]) -> list[Instruction]:
    body: list[Instruction] = []
    for one, other in pairs:
        body += [argument(first), *if_equal(one, [argument(second), *if_equal(other, [ALLOW])])]
    return [*body, _REFUSE]


def _filter_calls(libc: ctypes.CDLL) -> bool:
    arch = ARCHES.get(platform.machine())
    if arch is None:
        return False
    try:
        return seccomp.install(libc, call_filter(arch))
    except OSError as error:
        raise HostRefused(f"the guest process cannot install its seccomp filter: {error.strerror}") from error


def _call(function: ctypes._NamedFuncPointer, *arguments: int | bytes) -> None:
    if function(*arguments) != 0:
        name, reason = function.__name__, os.strerror(ctypes.get_errno())
        raise HostRefused(f"the guest process cannot enter its sandbox: {name}: {reason}")
