"""The filter of system calls of dnsmasq and haproxy, and the numbers of system calls in all filters."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import pytest

from netloom import confine
from netloom.guest import sandbox
from netloom.seccomp import AUDIT_ARCHES
from unit.call_filters import ALLOW, KILL, REFUSE, judge

# The headers of linux-libc-dev. The generic table is that of aarch64, on each machine.
HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}
_DEFINED = re.compile(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", re.MULTILINE)
NO_FAMILY = 0x00050000 | errno.EAFNOSUPPORT


@pytest.mark.parametrize("machine", AUDIT_ARCHES)
def test_the_numbers_of_system_calls_are_those_of_the_kernel(machine: str) -> None:
    header = HEADERS[machine]
    if not header.exists():  # a development host of the other machine has only its own table
        assert HEADERS["aarch64"].exists(), "install linux-libc-dev"
        return
    defined = {name: int(number) for name, number in _DEFINED.findall(header.read_text())}
    used = {**confine.REFUSED[machine], **confine.CALLS[machine], **sandbox.ARCHES[machine].numbers}
    assert used == {name: defined.get(name) for name in used}


def test_both_machines_refuse_the_same_system_calls() -> None:
    only_x86 = {"ustat", "sysfs", "iopl", "ioperm"}
    assert confine.REFUSED["x86_64"].keys() - only_x86 == confine.REFUSED["aarch64"].keys()
    assert sandbox.ARCHES["x86_64"].numbers.keys() - sandbox.ARCHES["aarch64"].numbers.keys() == {
        "poll", "time", "epoll_wait",
    }  # fmt: skip


@pytest.mark.parametrize("machine", AUDIT_ARCHES)
def test_a_service_gets_no_raw_sockets_but_icmpv6_and_of_netlink_only_routes(machine: str) -> None:
    program, audit = confine.call_filter(machine), AUDIT_ARCHES[machine]
    nonblocking = 0o2004000  # SOCK_CLOEXEC | SOCK_NONBLOCK

    def opened(family: int, kind: int, protocol: int = 0) -> int:
        return judge(program, audit, confine.CALLS[machine]["socket"], family, kind, protocol)

    for family in (2, 10):
        assert [opened(family, kind | nonblocking) for kind in (1, 2)] == [ALLOW, ALLOW]
        # 10: SOCK_PACKET, which the kernel opens as a packet socket
        assert {opened(family, kind, 255) for kind in (3, 4, 5, 10)} == {NO_FAMILY}
    assert opened(10, 3 | nonblocking, 58) == ALLOW
    assert {opened(2, 3, 1), opened(2, 3, 58), opened(10, 3, 17), opened(10, 10, 58)} == {NO_FAMILY}
    assert (opened(1, 1), opened(1, 5)) == (ALLOW, ALLOW)
    assert opened(16, 3) == ALLOW
    assert {opened(16, 3, protocol) for protocol in range(1, 23)} == {NO_FAMILY}  # 12: netfilter
    assert {opened(family, 3) for family in range(3, 46) if family not in (10, 16)} == {NO_FAMILY}


@pytest.mark.parametrize("machine", AUDIT_ARCHES)
def test_a_service_gets_no_namespaces_and_no_calls_of_the_list(machine: str) -> None:
    program, audit = confine.call_filter(machine), AUDIT_ARCHES[machine]
    assert {judge(program, audit, number) for number in confine.REFUSED[machine].values()} == {REFUSE}
    for flag in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert judge(program, audit, confine.CALLS[machine]["clone"], flag | 17) == REFUSE
    assert judge(program, audit, confine.CALLS[machine]["clone"], 0x01200011) == ALLOW
    assert judge(program, audit, confine.CALLS[machine]["clone3"]) == 0x00050000 | errno.ENOSYS
    assert judge(program, 0x40000003, 11) == KILL


@pytest.mark.parametrize(
    "args",
    [
        "",
        "1 /run",
        "x /run a=/b net_raw net_admin 1 true",
        "1 /run a=/b raw net_admin 1 true",
        "1 /run a net_raw net_admin 1 true",
    ],
)
def test_wrong_arguments_are_one_line(args: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert confine.main(args.split()) == 1
    assert capfd.readouterr().err.count("usage: netloom confine") == 1
