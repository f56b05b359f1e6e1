"""The selftest checks what networks need, reports failures and removes its objects."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kernel.agent_host import PROGRAM, agent_host, wait_until
from netloom.agent import packages
from netloom.agent.setup import selftest
from netloom.errors import HostRefused


def host_objects() -> list[str]:
    """Namespaces, links, nftables tables and mounts of this machine, which a selftest could leave."""
    looks = (["ip", "netns"], ["ip", "-o", "link"], ["nft", "list", "tables"], ["cat", "/proc/self/mounts"])
    return [subprocess.run(words, capture_output=True, text=True, check=True).stdout for words in looks]


def test_a_usable_host_passes_and_no_objects_are_left() -> None:
    before = host_objects()
    found = {it.what: it for it in selftest.run()}
    assert [it for it in found.values() if it.needed and not it.ok] == []
    wait_until(lambda: host_objects() == before)  # the kernel removes a namespace and its links a moment later
    assert found["senders of requests"].ok
    selftest.require()
    # This kernel may lack 802.1Q. Then the remedy says so, and networks are not refused.
    if not found["802.1Q"].ok:
        assert "links <nic>.<vlan> must exist" in found["802.1Q"].remedy


def _fails(host: object) -> None:
    raise HostRefused("no such thing", hint="get one")


def _crashes(host: object) -> None:
    os._exit(9)


@pytest.mark.parametrize(("trial", "says"), [(_fails, "no such thing"), (_crashes, "the test crashed or hung")])
def test_a_failed_check_is_reported_and_stops_the_dependent_checks(
    trial: Callable[[object], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [what for what, *_ in selftest._TESTS]
    at = names.index("bridges")
    trials = [*selftest._TESTS[:at], ("bridges", trial, True, ""), *selftest._TESTS[at + 1 :]]
    monkeypatch.setattr(selftest, "_TESTS", tuple(trials))
    found = selftest.run()
    assert (found[-1].what, found[-1].ok) == ("bridges", False)
    assert says in found[-1].says
    assert [it.what for it in found[-len(names[: at + 1]) :]] == names[: at + 1]
    with pytest.raises(HostRefused, match=f"cannot carry networks: bridges: {says}"):
        selftest.require()


def test_missing_sender_addresses_are_reported_but_not_fatal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "_WITH_ETHERNET_HEADER", 3)  # no kernel supports this value
    found = {it.what: it for it in selftest.run()}["senders of requests"]
    assert (found.ok, found.needed) == (False, False)
    assert "no DHCP, metadata and passwords" in found.remedy
    selftest.require()


def test_a_failed_packet_test_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = selftest._isolated

    def without_source_nat() -> object:
        scope = closed()
        return type(scope)(**{name: getattr(scope, name) for name in scope.__struct_fields__} | {"public_ips": {}})

    monkeypatch.setattr(selftest, "_isolated", without_source_nat)
    monkeypatch.setattr(selftest, "_PACKET_S_MAX", 0.5)
    found = selftest.run()
    assert not found[-1].ok
    assert found[-1].needed


PACKAGES = {
    "debian": ("ID=debian\n", "apt-get install dnsmasq-base"),
    "ubuntu": ("ID=ubuntu\nID_LIKE=debian\n", "apt-get install dnsmasq-base"),
    "rocky": ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf install dnsmasq"),
    "suse": ('ID="opensuse-leap"\nID_LIKE="suse opensuse"\n', "zypper install dnsmasq"),
    "unknown": ("ID=nixos\n", "install dnsmasq"),
}


@pytest.mark.parametrize("distribution", PACKAGES)
def test_a_missing_program_is_reported_with_its_package(
    distribution: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, remedy = PACKAGES[distribution]
    (tmp_path / "os-release").write_text(release)
    monkeypatch.setattr(packages, "PATH", str(tmp_path))
    found = {it.what: it for it in selftest._programs(packages.family(str(tmp_path / "os-release")))}
    assert (found["dnsmasq"].ok, found["dnsmasq"].needed, found["dnsmasq"].remedy) == (False, False, remedy)


@pytest.mark.mutation("all-packages-are-named-at-once", instead="[]")
def test_a_bare_host_is_refused_with_all_packages_in_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "os-release").write_text("ID=debian\n")
    monkeypatch.setattr(packages, "PATH", str(tmp_path))
    monkeypatch.setattr(packages, "OS_RELEASE", str(tmp_path / "os-release"))
    monkeypatch.setattr(selftest, "load_library", lambda: None)
    monkeypatch.setattr(selftest, "run", lambda: selftest._programs("debian"))
    with pytest.raises(HostRefused) as refused:
        selftest.require()
    assert refused.value.message == (
        "this host cannot carry networks: nft: neither libnftables nor the program nft is installed; "
        "dnsmasq: networks with DNS have no resolver; haproxy: TCP is not load-balanced"
    )
    assert refused.value.hint == "apt-get install nftables dnsmasq-base haproxy"


def test_the_output_is_a_table_or_json() -> None:
    with agent_host() as host:
        table = host.run(*PROGRAM, "selftest")
        assert table.splitlines()[0].split() == ["WHAT", "THERE", "SAYS", "REMEDY"]
        assert table.splitlines()[-1] == "This host can carry networks."
        found = json.loads(host.run(*PROGRAM, "selftest", "--json"))
        assert {"what": "bridges", "ok": True, "needed": True, "says": "", "remedy": ""} in found
        assert host.run("ip", "netns") == ""
        host.run("mount", "--bind", "/dev/null", "/usr/sbin/dnsmasq")
        assert "networks with DNS have no resolver" in host.run(*PROGRAM, "selftest")
