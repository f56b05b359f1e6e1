"""How the management side logs in: real SSH servers, a stand-in for the agent behind them."""

from __future__ import annotations

from typing import Any

import pytest

from ssh.lab import ASKING, HOSTILE, KEYS, Caller, SshLab

PLACED = '{"host":"10.99.0.11","namespace":"cs-net-42"}'

WAYS: dict[str, dict[str, Any]] = {
    "key, root": {"sshkey": "good"},
    "key, sudo": {"sshkey": "good", "username": "ops"},
    "key in PEM": {"sshkey": "pem"},
    "key beats a wrong password": {"sshkey": "good", "password": "wrong"},
    "password, root": {"password": HOSTILE},
    "password, sudo": {"password": HOSTILE, "username": "ops"},
    "keyboard-interactive": {"password": HOSTILE, "port": str(ASKING)},
    "port as a number": {"sshkey": "good", "port": KEYS},
    "IPv6": {"sshkey": "good", "hosts": "fd99::11"},
}


@pytest.mark.parametrize("way", WAYS)
def test_logs_in(way: str, lab: SshLab, caller: Caller) -> None:
    details = caller.details(**WAYS[way])
    if "sshkey" in details:
        details["sshkey"] = lab.key(details["sshkey"])
    ended = caller.ensure(details)
    assert ended.output == PLACED.replace("10.99.0.11", details["hosts"])
    assert [call["uid"] for call in lab.h1.asked(but="")] == [0]
