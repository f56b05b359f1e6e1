"""Sysctls are read and written in the given namespace, also for link names with dots."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from kernel.scratch import descriptors, scratch, tool
from netloom.agent.kernel import links, namespaces, sysctl
from netloom.agent.kernel.sysctl import SysctlError


@pytest.fixture
def ns() -> Iterator[str]:
    with scratch() as name:
        yield name


def test_a_write_affects_only_its_namespace(ns: str) -> None:
    name = "net.ipv4.conf.all.arp_announce"
    with scratch() as other:
        sysctl.write(ns, {name: "2", "net.ipv4.ip_forward": "1"})
        assert sysctl.read(ns, [name, "net.ipv4.ip_forward"]) == {name: "2", "net.ipv4.ip_forward": "1"}
        assert sysctl.read(other, [name]) == {name: "0"}
    assert tool(ns, "cat", "/proc/sys/net/ipv4/conf/all/arp_announce") == "2\n"


def test_link_names_with_dots_work_in_both_notations(ns: str) -> None:
    with namespaces.descriptor(ns) as fd:
        links.change(ns, [links.make_veth("eth1.1204", "", "gst-204", "", 0, fd)])
    sysctl.write(ns, {"net/ipv4/conf/eth1.1204/rp_filter": "2", "net.ipv4.conf.gst-204.rp_filter": "1"})
    names = ["net.ipv4.conf.eth1/1204.rp_filter", "net/ipv4/conf/gst-204/rp_filter"]
    assert list(sysctl.read(ns, names).values()) == ["2", "1"]


def test_a_missing_sysctl_reads_as_none_and_fails_to_write(ns: str) -> None:
    names = ["net.ipv4.no_such_thing", "net.ipv4.conf.nowhere.rp_filter", "net.ipv4.ip_forward.deeper"]
    assert sysctl.read(ns, names) == dict.fromkeys(names)
    with pytest.raises(SysctlError, match=r"set sysctl net\.ipv4\.no_such_thing: No such file") as caught:
        sysctl.write(ns, {"net.ipv4.no_such_thing": "1"})
    assert caught.value.errno == errno.ENOENT


def test_a_rejected_value_is_named(ns: str) -> None:
    with pytest.raises(SysctlError, match=r"set sysctl net\.ipv4\.ip_forward to banana: Invalid argument"):
        sysctl.write(ns, {"net.ipv4.ip_forward": "banana"})


def test_no_file_descriptor_leaks(ns: str) -> None:
    before = descriptors()
    for _ in range(20):
        sysctl.read(ns, ["net.ipv4.ip_forward", "net.ipv4.nothing"])
        with pytest.raises(SysctlError):
            sysctl.write(ns, {"net.ipv4.ip_forward": "banana"})
    assert descriptors() == before
