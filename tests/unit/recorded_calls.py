"""A recorder that replaces the executable, and helpers to read the payloads that the fake CloudStack sent to it."""

from __future__ import annotations

import json
from pathlib import Path

from bed import payloads as cs
from bed.cloudstack import FakeCloudStack
from bed.machines import Execution

FIXTURES = Path(__file__).resolve().parents[1] / "payloads"


class Recorder:
    """Replies like a program that always chooses the same host. Commands in ``fails`` exit with status 3."""

    def __init__(self) -> None:
        self.prints = '{"host":"192.0.2.11","namespace":"cs-net-204"}'
        self.fails: set[str] = set()

    def __call__(self, command: str, text: str, timeout_s: int) -> Execution:
        if command in self.fails:
            return Execution(3, f"{command}: refused\n", 0.1, "")
        return Execution(0, self.prints + "\n" if command == "ensure-network-device" else "", 0.1, "")


def fixture(number: str) -> dict[str, object]:
    (path,) = FIXTURES.glob(f"{number}-*.json")
    document: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    return document


def sent(cloud: FakeCloudStack, since: int = 0) -> list[dict[str, object]]:
    """The payloads sent, without the registration, because its members have no fixed order."""
    return [{**json.loads(each.text), "physical-network-extension-details": {}} for each in cloud.history[since:]]


def as_fixtures(*numbers: str) -> list[dict[str, object]]:
    return [{**fixture(number), "physical-network-extension-details": {}} for number in numbers]


def without_ensures(cloud: FakeCloudStack, since: int = 0) -> list[str]:
    return [command for command in cloud.commands(since) if command != "ensure-network-device"]


KEY = (
    "-----BEGIN OPENSSH PRIVATE KEY-----\nRkFLRS1LRVktRk9SLVRFU1RTLU5PVC1BLVJFQUwtS0VZ\n"
    "RkFLRS1LRVktRk9SLVRFU1RTLU5PVC1BLVJFQUwtS0VZRQ==\n-----END OPENSSH PRIVATE KEY-----"
)
FAKE_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIEZBS0VGQUtFRkFLRUZBS0VGQUtFRkFLRUZBS0VGQUtF"
USER_DATA = (
    "#cloud-config\npackages:\n - nginx\nwrite_files:\n - path: /etc/motd\n"
    '   content: "it\'s <b>café</b> & more = 100%"\n'
)


def uuid(number: int) -> str:
    return f"9f000000-0000-4000-8000-{number:012d}"


WEB_VM = cs.VirtualMachine("web-1", uuid(31), user_data=USER_DATA, public_key=f"{FAKE_KEY} user@example.org")


def nic(number: int, mac: str, ip: str, vm: cs.VirtualMachine, device_id: int = 0) -> cs.Nic:
    name = f"6b7c2a10-0000-4000-8000-{number:012d}"
    return cs.Nic(str(number), name, mac, ip, vm, device_id=device_id, default=device_id == 0)


WEB = nic(5101, "02:01:00:cc:00:03", "10.10.1.45", WEB_VM)
