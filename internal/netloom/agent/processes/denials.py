"""Whether AppArmor or SELinux kept a service from starting, and the remedy.

The program itself says "Permission denied" at most. The kernel's log names the profile and the file. It is read from
/dev/kmsg, and from the file of auditd, which takes these lines away from the kernel's log. Where neither has a line,
the profile that is in force for the program is named as the likely reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import NamedTuple

from netloom.errors import one_line

KERNEL_LOG = "/dev/kmsg"
AUDIT_LOG = "/var/log/audit/audit.log"
APPARMOR_PROFILES = "/sys/kernel/security/apparmor/profiles"
SELINUX_ENFORCE = "/sys/fs/selinux/enforce"

_AUDIT_BYTES = 256 << 10
_KERNEL_LINES_MAX = 20_000
_RECENT_S = 60.0
# AppArmor closes the descriptors that a profile does not allow, so a program may print nothing at all.
_REFUSED = ("ermission denied", "not permitted", "printed nothing")


class Denial(NamedTuple):
    """``says``: what was denied, for an error message. ``remedy``: what the operator can do."""

    says: str
    remedy: str


def find(program: str, pid: int, output: str) -> Denial | None:
    """The denial that kept ``program`` (a path) from starting, with process id ``pid`` and this output; None: none."""
    for line in reversed(_logged()):
        if re.search(rf"\bpid={pid}\b", line) and _recent(line):
            if 'apparmor="DENIED"' in line:
                what = _field(line, "name") or _field(line, "capname") or _field(line, "family")
                return _apparmor(program, _field(line, "profile"), f" {_field(line, 'operation')} {what}".rstrip())
            if "avc:" in line and " denied " in line:
                return _selinux(program, line.partition("denied")[2])
    if not any(it in output for it in _REFUSED):
        return None
    if profile := _enforced(program):
        return _apparmor(program, profile, "")
    return _selinux(program, "") if _read(SELINUX_ENFORCE) == "1" else None


def _apparmor(program: str, profile: str, what: str) -> Denial:
    file = program.lstrip("/").replace("/", ".")
    return Denial(
        one_line(
            f"AppArmor denied{what} (profile {profile})" if what else f"AppArmor enforces profile {profile} on it"
        ),
        f"allow it in /etc/apparmor.d/local/{file} and load the profile again, or aa-complain {program}",
    )


def _selinux(program: str, what: str) -> Denial:
    return Denial(
        one_line(f"SELinux denied{what}" if what else "SELinux is enforcing, which may be the reason", 400),
        f"see ausearch -m avc -c {os.path.basename(program)}, and allow it in a policy module",
    )


def _enforced(program: str) -> str:
    """The enforced profile of AppArmor that is named after the program; empty if there is none."""
    for line in _read(APPARMOR_PROFILES).splitlines():
        name, _, mode = line.rpartition(" ")
        if mode == "(enforce)" and name.rpartition("/")[2] == os.path.basename(program):
            return name
    return ""


def _logged() -> list[str]:
    """The lines of the kernel's log and the last ones of auditd's file, oldest first; none if neither can be read."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        fd = os.open(KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while len(lines) < _KERNEL_LINES_MAX:  # a read returns one record; EAGAIN: there are no more
                with contextlib.suppress(BrokenPipeError):  # a record was overwritten meanwhile
                    record = os.read(fd, 1 << 13)
                    if not record:
                        break
                    lines += record.decode("utf-8", "replace").splitlines()
        finally:
            os.close(fd)
    with contextlib.suppress(OSError), open(AUDIT_LOG, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _AUDIT_BYTES))
        lines += file.read().decode("utf-8", "replace").splitlines()
    return lines


def _recent(line: str) -> bool:
    """Whether the line is of the last minute: an earlier process may have had the same id."""
    at = re.search(r"\baudit\((\d+)\.", line)
    age_s = time.time() - int(at[1]) if at else _RECENT_S
    return abs(age_s) < _RECENT_S  # guard: an-old-denial-is-of-another-process


def _field(line: str, name: str) -> str:
    found = re.search(rf'\b{name}="([^"]*)"', line)
    return found[1] if found else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
