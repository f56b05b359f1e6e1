"""Trust in SSH host keys, tested with real servers whose keys change."""

from __future__ import annotations

import time

import pytest

from ssh.lab import HOSTILE, KEYS, Caller, SshLab

PLACED = '{"host":"10.99.0.12","namespace":"cs-net-42"}'


def details(lab: SshLab, caller: Caller, **more: object) -> dict[str, object]:
    return caller.details(hosts=lab.h2.address, sshkey=lab.key("good"), **more)


def test_a_key_is_remembered_on_first_use(lab: SshLab, caller: Caller) -> None:
    assert caller.ensure(details(lab, caller)).output == PLACED
    assert (caller.home / "known_hosts").read_text() == f"10.99.0.12 {lab.h2.public_key()}\n"
    assert caller.ensure(details(lab, caller)).output == PLACED
    assert caller.ensure(details(lab, caller, port=KEYS)).output == PLACED
    assert (caller.home / "known_hosts").read_text().splitlines() == [
        f"10.99.0.12 {lab.h2.public_key()}",
        f"[10.99.0.12]:{KEYS} {lab.h2.public_key()}",
    ]


def test_the_known_key_type_is_requested(lab: SshLab, caller: Caller) -> None:
    (caller.home / "known_hosts").write_text(f"10.99.0.12 {lab.h2.public_key('rsa')} a comment\n")
    assert caller.ensure(details(lab, caller)).output == PLACED


@pytest.mark.mutation("a-changed-host-key-is-refused", instead="known")
def test_defect_16_a_changed_key_is_refused_before_any_login(lab: SshLab, caller: Caller) -> None:
    """A changed key is not accepted silently, and the message names the remedy."""
    assert caller.ensure(details(lab, caller)).output == PLACED
    old = lab.h2.fingerprint()
    lab.h2.halt()
    lab.h2.new_host_keys()
    lab.h2.start()
    before = len(lab.h2.logins())
    ended = caller.ensure(caller.details(hosts=lab.h2.address, password=HOSTILE))
    assert ended.status == 2
    known_hosts = caller.home / "known_hosts"
    assert f"10.99.0.12: its host key has changed: it shows ssh-ed25519 {lab.h2.fingerprint()}" in ended.line
    assert f"known is ssh-ed25519 {old} ({known_hosts} line 1)" in ended.line
    assert "netloom hosts forget '10.99.0.12'" in ended.line
    assert "assword" not in lab.h2.logins()[before:]
    known_hosts.write_text("# the remedy that the message names\n")
    assert caller.ensure(details(lab, caller)).output == PLACED


def test_only_pinned_keys_are_accepted(lab: SshLab, caller: Caller) -> None:
    other = lab.h1
    good = [
        lab.h2.public_key(),
        lab.h2.public_key("rsa"),
        lab.h2.fingerprint(),
        f"10.99.0.12 {lab.h2.public_key()}",
        f"{lab.h1.address} {other.fingerprint()}, {lab.h2.address} {lab.h2.fingerprint()}",
        f"{other.public_key()} h1\r\n{lab.h2.public_key()} h2\r\n",
    ]
    for pins in good:
        assert caller.ensure(details(lab, caller, hostkeys=pins)).output == PLACED, pins
    bad = [other.public_key(), other.fingerprint(), f"10.99.0.11 {lab.h2.public_key()}"]
    for pins in bad:
        ended = caller.ensure(details(lab, caller, hostkeys=pins))
        assert ended.status == 2
        assert f"host key ssh-ed25519 {lab.h2.fingerprint()} is not among the" in ended.line, pins
        assert "hostkeys" in ended.line
    assert not (caller.home / "known_hosts").exists()


def test_an_invalid_pin_does_not_enable_trust_on_first_use(lab: SshLab, caller: Caller) -> None:
    ended = caller.ensure(details(lab, caller, hostkeys="ssh-ed25519 AAAA"))
    assert ended.status == 1
    assert "registration detail hostkeys: 'ssh-ed25519 AAAA' is not a host key" in ended.line
    assert lab.h2.calls_received(but="") == []


def test_a_key_that_cannot_be_stored_is_not_trusted(lab: SshLab, caller: Caller) -> None:
    (caller.home / "known_hosts").mkdir()
    ended = caller.ensure(details(lab, caller))
    assert ended.status == 2
    assert f"10.99.0.12: its key cannot be remembered: {caller.home}/known_hosts: Is a directory" in ended.line
    assert lab.h2.calls_received(but="") == []


def test_concurrent_first_uses_store_the_key_once(lab: SshLab, caller: Caller) -> None:
    path = caller.payload(details(lab, caller), payload={"current_details": "{}"})
    began = time.monotonic()
    calls = [caller.start("ensure-network-device", str(path), "60") for _ in range(6)]
    assert [caller.finish(call, began).output for call in calls] == [PLACED] * 6
    assert (caller.home / "known_hosts").read_text() == f"10.99.0.12 {lab.h2.public_key()}\n"
    assert caller.log.count("status=0") == 6
