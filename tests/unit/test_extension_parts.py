"""Small parts of the extension: deadline, owner, output, directories, host keys, login and log."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import resource
import threading
import time
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netloom import program
from netloom.errors import BadRequest, HostRefused, HostUnreachable, LoginRefused, ascii_only
from netloom.extension import run
from netloom.extension.deadline import Deadline, margin_s, parse_timeout, process_started
from netloom.extension.directory import NoDirectory, candidates, home_of, persistent, unusable
from netloom.extension.hostkeys import HostKey, KnownHosts, Trust, name_of, parse_pins
from netloom.extension.hosts import EPOCH_MAX
from netloom.extension.log import FILE, line, write_down
from netloom.extension.outcome import DETAILS_CHARACTERS_MAX, ensured, error_in
from netloom.extension.package import package
from netloom.extension.placement import Use
from netloom.extension.pool import Pool
from netloom.extension.record import CallRecord
from netloom.extension.registration import owner, registration
from netloom.extension.ssh import Login
from netloom.protocol.envelope import PhysicalDetails, StoredDetails, parse_current_details
from netloom.protocol.reader import convert
from netloom.secret import Secret
from netloom.wire import Reply

# --- the deadline


def test_the_margin_grows_with_the_timeout() -> None:
    assert {timeout: margin_s(timeout) for timeout in (1, 2, 10, 60, 600)} == {1: 0.5, 2: 1, 10: 1, 60: 3, 600: 30}


@given(st.integers(1, 86_400))
def test_the_deadline_ends_before_the_callers_timeout(timeout: int) -> None:
    started = time.monotonic()
    deadline = Deadline(parse_timeout(str(timeout)), started)
    assert started < deadline.ends < started + timeout
    # The timer of last resort, half a margin later, also expires before the caller's timeout.
    assert deadline.ends + deadline.margin_s / 2 < started + timeout
    assert 0 <= deadline.grace_s() <= 5
    assert 5 <= deadline.reach_s() <= max(5, timeout / 3)


def test_a_passed_deadline_leaves_no_time() -> None:
    deadline = Deadline(10, time.monotonic() - 60)
    assert (deadline.remaining_s(), deadline.grace_s()) == (0, 0)


def test_the_start_time_of_the_process_is_in_the_past() -> None:
    assert time.monotonic() - 6 < process_started() <= time.monotonic()


# --- the owner


def details(**given: object) -> PhysicalDetails:
    return convert({"hosts": "h1", **given}, PhysicalDetails, root="details")


def test_the_owner_is_configured_or_derived() -> None:
    path = "/usr/share/cloudstack-management/extensions/ext-net/ext-net.sh"
    assert owner(details(physicalnetworkname="Physical 1"), path) == "ext-net/Physical 1"
    assert owner(details(physicalnetworkname="K\u00f6ln 2"), path) == "ext-net/K\\xf6ln 2"
    assert owner(details(physicalnetworkname="p", owner="east"), path) == "east"
    assert owner(details(), path) == "ext-net/"


def test_the_owner_does_not_depend_on_the_programs_file_name() -> None:
    paths = [f"/ext/net/{name}" for name in ("net.sh", "netloom", "anything.bin")]
    assert {owner(details(physicalnetworkname="p"), path) for path in paths} == {"net/p"}


def test_the_registration_has_no_secrets() -> None:
    given = details(
        sshkey="k3y", password="p4ss", username="ops", firewall="absent", owner="east",
        **{"guest.network.device": "bond0", "network.broadcast": "vlan", "guest.isolation": "vxlan",
           "conntrack.helpers": "tftp,ftp"},
    )  # fmt: skip
    made = registration(given, "/a/b")
    assert (made.owner, made.guest_nic, made.public_nic) == ("east", "bond0", "eth1")
    assert (made.ingress_open, made.broadcast, made.isolation) == (True, "vlan", "vxlan")
    assert made.conntrack_helpers == ("ftp", "tftp")
    assert not any(secret in repr(made) for secret in ("k3y", "p4ss", "ops"))


# --- the output


def test_ensure_prints_host_and_namespace() -> None:
    assert ensured(StoredDetails(), Use("h1"), "net-42") == '{"host":"h1","namespace":"cs-net-42"}'
    assert ensured(StoredDetails(), Use("h1"), "vpc-7") == '{"host":"h1","namespace":"cs-vpc-7","vpc_id":"7"}'
    with_standby = ensured(StoredDetails(previous=("h2", "h3")), Use("h1", 4), "net-42", "h2")
    assert with_standby == '{"host":"h1","namespace":"cs-net-42","epoch":4,"standby":"h2","previous":"h3"}'


HOST = st.from_regex(r"h[a-z0-9]{0,60}(\.h[a-z0-9]{0,60}){0,3}", fullmatch=True)


@given(
    host=HOST,
    epoch=st.integers(0, EPOCH_MAX),
    previous=st.lists(HOST, max_size=20).map(tuple),
    left=st.lists(HOST, max_size=2).map(tuple),
    scope_id=st.sampled_from(["net-1", "net-4294967295", "vpc-4294967295"]),
    standby=st.one_of(st.just(""), HOST),
)
def test_the_output_of_ensure_can_always_be_stored(
    host: str, epoch: int, previous: tuple[str, ...], left: tuple[str, ...], scope_id: str, standby: str
) -> None:
    """The output is one line of ASCII that fits CloudStack's column: a JSON object without a key ``status``."""
    text = ensured(StoredDetails(host="x", previous=previous), Use(host, epoch, left), scope_id, standby)
    assert len(text) <= DETAILS_CHARACTERS_MAX
    assert text.isascii()
    assert "\n" not in text
    printed_details = json.loads(text)
    assert printed_details["host"] == host
    assert "status" not in printed_details
    again = parse_current_details(text)
    assert (again.epoch, again.standby) == (epoch, standby)
    assert host not in again.previous
    assert standby not in again.previous


@given(st.text())
def test_output_is_ascii_and_the_same_json(text: str) -> None:
    as_json = json.dumps({"a": text}, ensure_ascii=False)
    assert ascii_only(as_json).isascii()
    assert json.loads(ascii_only(as_json)) == {"a": text}


@pytest.mark.mutation("a-large-payload-does-not-stop-the-loop", instead="check(*arguments)")
def test_a_large_payload_is_checked_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def checked(*arguments: object) -> NoReturn:
        threads.append(threading.get_ident())
        raise BadRequest("checked")

    monkeypatch.setattr(run, "check", checked)
    for size in (100, 1 << 20):
        with pytest.raises(BadRequest, match="checked"):
            asyncio.run(
                run.run("prepare-nic", b" " * size, Deadline(60, 0), "/x", CallRecord(0), {}, Pool(resident=True))
            )
    assert [it == threading.get_ident() for it in threads] == [True, False]


@pytest.mark.parametrize(
    ("status", "kind"), [(1, BadRequest), (2, HostUnreachable), (3, HostRefused), (77, HostRefused)]
)
def test_a_failed_reply_is_an_error_that_names_its_host(status: int, kind: type[Exception]) -> None:
    error = error_in("h1", Reply(call_id="x", status=status, error="link is busy", hint="try again"))
    assert type(error) is kind
    assert str(error) == "h1: link is busy (try again)"
    assert error_in("h1", Reply(call_id="x")) is None


# --- directories


def test_candidate_directories_are_in_order() -> None:
    assert candidates({"NETLOOM_DIR": "/d"}, 7, "/home/cloud") == [
        "/d",
        "/home/cloud/.cache/netloom",
        "/var/cache/netloom/7",
        "/var/tmp/netloom-7",
    ]
    assert candidates({}, 7, "") == ["/var/cache/netloom/7", "/var/tmp/netloom-7"]


def test_an_unset_home_is_read_from_passwd() -> None:
    assert home_of({"HOME": "/h"}, 0) == "/h"
    assert home_of({}, 0) == "/root"
    assert home_of({"HOME": "relative"}, 0) == "/root"
    assert home_of({}, 4_000_000) == ""


@pytest.mark.mutation("the-directory-is-private")
def test_defect_21_only_a_private_directory_of_ours_is_usable(tmp_path: Path) -> None:
    uid = os.geteuid()
    new = tmp_path / "a" / "b"
    assert unusable(str(new), uid) == ""
    assert new.stat().st_mode & 0o777 == 0o700
    assert unusable(str(new), uid) == ""
    (tmp_path / "link").symlink_to(new)
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir(mode=0o755)
    assert unusable(str(tmp_path / "link"), uid) == "a link"
    assert unusable(str(tmp_path / "file"), uid) == "not a directory"
    assert unusable(str(tmp_path / "open"), uid) == "mode 0755, not 0700"
    # The user's own directory in NETLOOM_DIR is not changed; one that only netloom uses is made private again.
    (tmp_path / "open" / "theirs").touch()
    os.chown(tmp_path / "open" / "theirs", uid + 1, -1)
    (tmp_path / "open" / "ours").touch()
    assert unusable(str(tmp_path / "open"), uid, repair=True) == ""
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o700
    assert os.listdir(tmp_path / "open") == ["ours"]
    for mode in (0o000, 0o500, 0o4755 | 0o2000):
        (tmp_path / "open").chmod(mode)
        assert unusable(str(tmp_path / "open"), uid, repair=True) == ""
        assert (tmp_path / "open").stat().st_mode & 0o777 == 0o700
    assert unusable(str(new), uid + 1).endswith(f"owned by uid {uid}")
    assert unusable("relative", uid) == "not an absolute path"
    assert unusable(str(tmp_path / "file" / "below"), uid) == "Not a directory"


@pytest.mark.mutation("a-foreign-directory-is-set-aside", instead="False")
def test_what_others_put_into_a_widened_directory_blocks_no_name(tmp_path: Path) -> None:
    """A directory of another user may have content that only its owner can remove."""
    uid, place = os.geteuid(), tmp_path / "netloom"
    place.mkdir()
    place.chmod(0o777)
    (place / "known_hosts" / "full").mkdir(parents=True)
    os.mkfifo(place / "helper.lock")
    (place / "netloom.log").symlink_to("/etc/passwd")
    for name in ("known_hosts", "helper.lock", "netloom.log"):
        os.chown(place / name, uid + 1, -1, follow_symlinks=False)
    for _ in range(2):
        place.chmod(0o755)
        assert unusable(str(place), uid, repair=True) == ""
        (left,) = os.listdir(place)
        assert left.startswith(".foreign-")


@pytest.mark.mutation("no-other-can-exchange-the-directory", instead='(why := "")')
def test_a_directory_that_another_user_could_replace_is_not_used(tmp_path: Path) -> None:
    uid, above = os.geteuid(), tmp_path / "home" / ".cache"
    above.mkdir(parents=True)
    for mode in (0o777, 0o707):
        above.chmod(mode)
        assert unusable(str(above / "netloom"), uid) == f"others may write to {above}"
        assert list(above.iterdir()) == []
    above.chmod(0o1777)
    assert unusable(str(above / "netloom"), uid) == ""
    above.chmod(0o775)  # writable by our own group
    assert unusable(str(above / "netloom"), uid) == ""
    assert unusable(str(above / "netloom" / "a" / "b"), uid) == ""
    (tmp_path / "link").symlink_to(above.parent)
    assert unusable(str(tmp_path / "link" / "x" / "netloom"), uid) == ""


def test_an_unreadable_program_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program can be started without read permission (mode 0711), or be replaced while it runs."""
    monkeypatch.setattr(program, "path", lambda: str(tmp_path / "netloom.sh"))
    package.cache_clear()
    with pytest.raises(BadRequest, match=r"netloom\.sh: No such file or directory \(make this file readable"):
        package()


def test_the_first_usable_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    environ = {"NETLOOM_DIR": str(tmp_path / "open"), "HOME": str(tmp_path / "home")}
    assert persistent(environ) == str(tmp_path / "home" / ".cache" / "netloom")


def test_no_usable_directory_is_an_error_with_every_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(tmp_path / "file"), "relative"]
    (tmp_path / "file").touch()
    monkeypatch.setattr("netloom.extension.directory.candidates", lambda environ, uid, home: paths)
    with pytest.raises(NoDirectory) as raised:
        persistent({})
    assert f"{tmp_path}/file: not a directory; relative: not an absolute path" in str(raised.value)
    assert raised.value.exit_code == 1


# --- host keys


def host_key(number: int, kind: str = "ssh-ed25519") -> HostKey:
    raw = len(kind).to_bytes(4, "big") + kind.encode() + bytes([0, 0, 0, 32]) + bytes([number]) * 32
    return HostKey(kind, base64.b64encode(raw).decode())


KEY, OTHER, RSA = host_key(1), host_key(2), host_key(3, "ssh-rsa")


@pytest.mark.parametrize(
    ("text", "admits_h1", "admits_h2"),
    [
        (str(KEY), True, True),
        (KEY.fingerprint, True, True),
        (KEY.fingerprint + "=", True, True),
        (f"h1 {KEY}", True, False),
        (f"[h1] {KEY.fingerprint}", True, False),
        (f"h1 {KEY},h2 {OTHER}", True, False),
        (f"h1 {OTHER}\nh2 {KEY}\n", False, True),
        (f" , {KEY} a comment,\r\n", True, True),
        (str(RSA), False, False),
    ],
)
def test_pins_admit_only_matching_keys(text: str, admits_h1: bool, admits_h2: bool, tmp_path: Path) -> None:
    trust = Trust(parse_pins(text), KnownHosts(str(tmp_path)))
    for host, admits in (("h1", admits_h1), ("h2", admits_h2)):
        if admits:
            trust.check(host, 22, KEY)
        else:
            with pytest.raises(LoginRefused, match="pinned"):
                trust.check(host, 22, KEY)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["ssh-ed25519", "ssh-ed25519 AAAA", f"h1 h2 {KEY}", "SHA256:short", "h1", f"ssh-rsa {KEY.blob}", "MD5:00:11"],
)
def test_an_invalid_pin_is_refused(text: str) -> None:
    with pytest.raises(BadRequest, match="hostkeys"):
        parse_pins(f"{KEY}, {text}")


@given(st.text(max_size=200))
def test_any_text_is_parsed_as_pins_or_refused(text: str) -> None:
    try:
        pins = parse_pins(text)
    except BadRequest:
        return
    assert all(pin.key or pin.fingerprint for pin in pins)


def test_remembered_keys_are_openssh_lines(tmp_path: Path) -> None:
    known = KnownHosts(str(tmp_path))
    Path(known.path).write_text(f"# by hand\nother,10.0.0.9 {RSA} comment\nbroken line")
    trust = Trust((), known)
    trust.check("h1", 22, KEY)
    trust.check("h1", 2222, OTHER)
    trust.check("other", 22, RSA)
    assert Path(known.path).read_text().splitlines()[3:] == [f"h1 {KEY}", f"[h1]:2222 {OTHER}"]
    assert trust.expected_kinds("other", 22) == ["ssh-rsa"]
    with pytest.raises(LoginRefused) as raised:
        trust.check("h1", 22, OTHER)
    assert f"{known.path} line 4" in str(raised.value)
    assert KEY.fingerprint in str(raised.value)
    assert OTHER.fingerprint in str(raised.value)
    assert [entry.key for entry in known.forget("h1")] == [KEY]
    assert known.forget("h1") == []
    trust.check("h1", 22, OTHER)
    assert Path(known.path).read_text().startswith("# by hand\nother,10.0.0.9")
    assert name_of("fd00::1", 2222) == "[fd00::1]:2222"


def test_a_full_disk_loses_no_remembered_key(tmp_path: Path) -> None:
    known = KnownHosts(str(tmp_path))
    for number in range(20):
        known.remember(f"h{number}", KEY)
    before = Path(known.path).read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))  # only half can be written
        with pytest.raises(OSError, match="File too large"):
            known.forget("h7")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert Path(known.path).read_bytes() == before
    assert sorted(it.name for it in tmp_path.iterdir()) == ["known_hosts", "known_hosts.lock"]


# --- the login


@pytest.mark.parametrize(
    ("username", "agent", "command"),
    [
        ("root", "/usr/local/libexec/netloom/netloom agent", "/usr/local/libexec/netloom/netloom agent connect"),
        ("ops", "/x/netloom agent", "sudo -n /x/netloom agent connect"),
        ("root", "'/a b/netloom' agent", "'/a b/netloom' agent connect"),
        ("root", "/x/$(id) agent", "'/x/$(id)' agent connect"),
    ],
)
def test_the_command_on_the_host(username: str, agent: str, command: str, tmp_path: Path) -> None:
    login = Login(trust=Trust((), KnownHosts(str(tmp_path))), username=username, agent=agent)
    assert login.command == command


def test_a_login_does_not_print_its_secrets(tmp_path: Path) -> None:
    trust = Trust((), KnownHosts(str(tmp_path)))
    login = Login(trust=trust, sshkey=Secret("k3y"), password=Secret("p4ss"))
    assert login.method == "sshkey"
    assert Login(trust=trust, password=Secret("p4ss")).method == "password"
    assert "k3y" not in repr(login)
    assert "p4ss" not in repr(login)


# --- the log


def test_a_log_line_is_one_line() -> None:
    record = CallRecord(0.0)
    record.call_id, record.command, record.scope_id, record.host = "abc", "assign-ip\x1b", "net-42", "h1"
    assert line(record, 3, "no\nroom", now_s=0, took_ms=12.4) == (
        "1970-01-01T00:00:00Z abc assign-ip\\x1b net-42 h1 status=3 12ms no room\n"
    )


@pytest.mark.mutation("the-log-has-what-else-is-wrong")
def test_the_line_of_a_call_that_succeeded_has_a_note_of_what_else_is_wrong() -> None:
    record = CallRecord(0.0)
    record.note = "dns-204: dnsmasq is not\ninstalled on this host"
    assert line(record, 0, "", now_s=0, took_ms=1).endswith(
        " status=0 1ms note: dns-204: dnsmasq is not installed on this host\n"
    )


def test_the_log_is_private_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netloom.logfile.BYTES_MAX", 2000)
    for number in range(100):
        write_down(CallRecord(time.monotonic()), 0, f"number {number}", {"NETLOOM_DIR": str(tmp_path / "d")})
    files = {path.name: path for path in (tmp_path / "d").iterdir()}
    assert set(files) | {FILE} == {FILE, FILE + ".1"}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in files.values())
    assert sum(path.stat().st_size for path in files.values()) < 6000
    kept = "".join(path.read_text() for _, path in sorted(files.items(), reverse=True))
    assert "number 99\n" in kept
