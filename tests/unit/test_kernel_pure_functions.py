"""Functions of agent/kernel that need no kernel: ARP frames, sysctl paths, nftables error messages, namespace names."""

from __future__ import annotations

import pytest

from netloom.agent.kernel import arp, namespaces, nft, sysctl


def test_an_arp_announcement_is_a_broadcast_request_and_reply() -> None:
    request, reply = arp.frames("203.0.113.10", "0a:11:22:33:44:55")
    mac, ip = bytes.fromhex("0a1122334455"), bytes((203, 0, 113, 10))
    head = b"\xff" * 6 + mac + bytes.fromhex("0806 0001 0800 06 04")
    assert request == head + b"\0\1" + mac + ip + bytes(6) + ip
    assert reply == head + b"\0\2" + mac + ip + mac + ip


@pytest.mark.parametrize(("address", "mac"), [("fd00::1", "0a:11:22:33:44:55"), ("203.0.113.10", "0a:11"), ("x", "")])
def test_an_invalid_address_is_not_announced(address: str, mac: str) -> None:
    with pytest.raises(ValueError):
        arp.frames(address, mac)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("net.ipv4.ip_forward", "net/ipv4/ip_forward"),
        ("net/ipv4/ip_forward", "net/ipv4/ip_forward"),
        ("net.ipv4.conf.gst-204.rp_filter", "net/ipv4/conf/gst-204/rp_filter"),
        ("net/ipv4/conf/eth1.1204/rp_filter", "net/ipv4/conf/eth1.1204/rp_filter"),
        ("net.ipv4.conf.eth1/1204.rp_filter", "net/ipv4/conf/eth1.1204/rp_filter"),
    ],
)
def test_sysctl_paths_follow_sysctl_d(name: str, file: str) -> None:
    assert sysctl.path(name) == f"/proc/sys/{file}"


@pytest.mark.parametrize(
    "name", ["", "net..ipv4", "/net/ipv4", "net/../../etc/passwd", "net///ipv4", "net/./x", "net/\0"]
)
def test_a_sysctl_name_outside_proc_sys_is_refused(name: str) -> None:
    with pytest.raises(ValueError):
        sysctl.path(name)


def test_an_nft_error_names_the_line_of_the_script() -> None:
    script = "table inet t {\n\tchain c { junk }\n}\n"
    complaint = "/proc/self/fd/9:2:12-15: Error: syntax error, unexpected string\n\tchain c { junk }\n\t   ^^^^\n"
    error = nft.error_of(script, complaint)
    assert str(error) == "nftables: syntax error, unexpected string: chain c { junk }"
    assert (error.reason, error.line) == ("syntax error, unexpected string", "chain c { junk }")


@pytest.mark.parametrize(
    ("complaint", "words"),
    [
        ("", "nftables: failed without a message"),
        ("\nnetlink: Error: cache initialization failed: No such file\n", "nftables: netlink: Error: cache"),
        ("x:99:1-2: Error: beyond the script\n", "nftables: beyond the script"),
    ],
)
def test_an_nft_error_without_a_line_is_still_reported(complaint: str, words: str) -> None:
    assert str(nft.error_of("add table inet t", complaint)).startswith(words)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/run/netns/x", "a\0b", "x" * 256])
def test_an_invalid_namespace_name_is_refused(name: str) -> None:
    with pytest.raises(namespaces.NamespaceError):
        namespaces.exists(name)
