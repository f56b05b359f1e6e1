"""The denial of a program by AppArmor or SELinux, from the kernel's log, auditd's file or the profiles in force."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from netloom.agent.processes import denials

DNSMASQ = "/usr/sbin/dnsmasq"
SAYS = "dnsmasq: cannot read /run/netloom/services/net-204/dns-204/dnsmasq.conf: Permission denied"
APPARMOR = (
    'audit: type=1400 audit(%d.123:14): apparmor="DENIED" operation="open" profile="dnsmasq" '
    'name="/run/x/dnsmasq.conf" pid=%d comm="dnsmasq" requested_mask="r" denied_mask="r" fsuid=0 ouid=0'
)
SELINUX = (
    'type=AVC msg=audit(%d.123:14): avc:  denied  { read } for  pid=%d comm="dnsmasq" name="dnsmasq.conf" '
    "scontext=system_u:system_r:dnsmasq_t:s0 tcontext=system_u:object_r:var_run_t:s0 tclass=file permissive=0"
)
LOCAL = (
    "allow it in /etc/apparmor.d/local/usr.sbin.dnsmasq and load the profile again, or aa-complain /usr/sbin/dnsmasq"
)


def apparmor(pid: int, ago_s: int = 0) -> str:
    return APPARMOR % (time.time() - ago_s, pid)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host without either: files of this directory take the place of the kernel's."""
    for name, file in (
        ("KERNEL_LOG", "kmsg"),
        ("AUDIT_LOG", "audit.log"),
        ("APPARMOR_PROFILES", "profiles"),
        ("SELINUX_ENFORCE", "enforce"),
    ):
        monkeypatch.setattr(denials, name, str(tmp_path / file))
    return tmp_path


def test_a_program_that_failed_for_another_reason_was_not_denied(host: Path) -> None:
    (host / "profiles").write_text("dnsmasq (enforce)\n")
    (host / "enforce").write_text("1")
    (host / "audit.log").write_text(apparmor(7) + "\n")
    assert denials.find(DNSMASQ, 8, "dnsmasq: failed to create listening socket: Address already in use") is None


def test_without_either_a_refusal_of_the_system_is_no_denial(host: Path) -> None:
    assert denials.find(DNSMASQ, 8, SAYS) is None


@pytest.mark.parametrize("file", ["kmsg", "audit.log"])
def test_a_denial_of_apparmor_has_profile_file_and_remedy(host: Path, file: str) -> None:
    (host / file).write_text(f"{apparmor(7)}\n{apparmor(71)}\n{apparmor(7).replace('open', 'mknod')}\n")
    assert denials.find(DNSMASQ, 7, SAYS) == ("AppArmor denied mknod /run/x/dnsmasq.conf (profile dnsmasq)", LOCAL)


@pytest.mark.mutation("an-old-denial-is-of-another-process", instead="True")
def test_a_denial_of_an_earlier_process_with_the_same_id_does_not_count(host: Path) -> None:
    (host / "kmsg").write_text(apparmor(7, ago_s=3600) + "\n")
    assert denials.find(DNSMASQ, 7, SAYS) is None


def test_an_enforced_profile_is_the_likely_reason_where_no_log_can_be_read(host: Path) -> None:
    others = "/usr/sbin/haproxy (enforce)\ndnsmasq//libvirt_leaseshelper (enforce)\n"
    (host / "profiles").write_text(f"{others}dnsmasq (complain)\n")
    assert denials.find(DNSMASQ, 7, SAYS) is None
    (host / "profiles").write_text("/usr/sbin/haproxy (enforce)\n/usr/sbin/dnsmasq (enforce)\n")
    for output in (SAYS, "it printed nothing"):
        denial = denials.find(DNSMASQ, 7, output)
        assert denial == ("AppArmor enforces profile /usr/sbin/dnsmasq on it", LOCAL)


def test_a_denial_of_selinux_has_its_line_and_a_remedy(host: Path) -> None:
    (host / "audit.log").write_text(SELINUX % (time.time(), 7) + "\n")
    denial = denials.find(DNSMASQ, 7, SAYS)
    assert denial is not None
    assert denial.says.startswith('SELinux denied { read } for pid=7 comm="dnsmasq" name="dnsmasq.conf" scontext=')
    assert denial.remedy == "see ausearch -m avc -c dnsmasq, and allow it in a policy module"
    (host / "audit.log").unlink()
    (host / "enforce").write_text("1\n")
    assert denials.find(DNSMASQ, 7, SAYS) == ("SELinux is enforcing, which may be the reason", denial.remedy)
