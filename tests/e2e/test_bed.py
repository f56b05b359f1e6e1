"""The test bed itself: users, VLANs, power cuts, partitions, inventories and executions."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bed import Bed
from bed.cloudstack import CLOUD_UID, FakeCloudStack, Hung
from bed.lab import difference
from bed.machines import until
from e2e.networks import settled_objects

TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def own_bed() -> Iterator[Bed]:
    """A bed for this module, because its tests disconnect and power off hosts."""
    with Bed(hosts=2, vlans=[1001], public_vlans=[101]) as bed:
        yield bed


@pytest.fixture(autouse=True)
def no_vms_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Destroy the VMs that a failed test leaves."""
    yield
    if "own" in request.fixturenames:
        bed: Bed = request.getfixturevalue("own")
        for host in bed.hosts:
            for vm in list(host.vms):
                vm.destroy()


def ssh(bed: Bed, host: str, user: str, *argv: str) -> str:
    """Log in to a host by key from the management server; returns the output of the command."""
    bed.management.write("/var/cloudstack/management/key", bed.private_key, mode=0o600, uid=CLOUD_UID)
    options = [
        f"-o{it}"
        for it in ("BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR")
    ]
    key = ["-i", "/var/cloudstack/management/key", "-oConnectTimeout=30"]
    return bed.management.run("ssh", *key, *options, f"{user}@{host}", *argv, uid=CLOUD_UID).out.strip()


def test_each_user_has_the_intended_rights(own_bed: Bed) -> None:
    host = own_bed.hosts[0]
    assert ssh(own_bed, host.address, "root", "id -u; hostname") == "0\nh1"
    assert ssh(own_bed, host.address, "netadmin", "id -u; sudo -n id -u") == "1500\n0"
    assert (
        ssh(own_bed, host.address, "plainuser", "id -u; sudo -n id -u 2>/dev/null || echo refused") == "1501\nrefused"
    )
    assert ssh(own_bed, host.address6, "root", "hostname") == "h1"


def test_vms_of_two_hosts_share_only_their_vlan(own_bed: Bed) -> None:
    one, two = own_bed.hosts
    a = one.vm("a", vlan=1001, ip="10.0.0.1/24")
    b = two.vm("b", vlan=1001, ip="10.0.0.2/24")
    stranger = two.vm("c", vlan=1002, ip="10.0.0.1/24")
    assert a.ping("10.0.0.2", count=2).ok
    with b.serve_tcp(80), b.serve_udp(53, 55):
        answer = a.tcp("10.0.0.2", 80)
        assert (answer.server, answer.saw, answer.at) == ("b", "10.0.0.1", "10.0.0.2")
        assert a.udp("10.0.0.2", 53, source_port=4444).saw_port == 4444
        assert a.tcp("10.0.0.2", 81).outcome == "refused"
        assert stranger.ping("10.0.0.2", timeout_s=0.3).answered == 0
        transferred = a.transfer("10.0.0.2", 80, seconds=0.5).result()
        assert transferred.intact
        assert transferred.sent > 0
        assert a.flood_udp("10.0.0.2", [53, 55], count=200, rate=2000).result().answered == {53: 100, 55: 100}
        with b.serve_udp(56) as service:
            assert a.burst_udp("10.0.0.2", 56, count=100) > 0
            assert until(lambda: service.received() == 100)
        assert a.flood_udp("10.0.0.2", [54], count=10, linger_s=0.2).result().answered == {54: 0}
    for vm in (a, b, stranger):
        vm.destroy()
    assert "breth1-1001" not in one.sh("ip -o link"), (
        "the bridge is deleted with its last VM, as by CloudStack's KVM agent"
    )


def test_a_kept_connection_detects_a_dead_peer(own_bed: Bed) -> None:
    host = own_bed.hosts[0]
    a = host.vm("a", vlan=1001, ip="10.0.0.1/24")
    b = host.vm("b", vlan=1001, ip="10.0.0.2/24")
    with b.serve_tcp(80) as service, a.open("10.0.0.2", 80) as connection:
        assert connection.ask() == "answered"
        assert service.say("news") == 1
        assert connection.hear() == "news"
        b.run("nft", "add table ip t; add chain ip t c { type filter hook input priority 0; policy drop; }")
        assert connection.ask(timeout_s=0.3) == "timeout"
    a.destroy()
    b.destroy()


def test_arp_can_be_watched_and_requested(own_bed: Bed) -> None:
    host = own_bed.hosts[0]
    with host.vm("a", vlan=1001, ip="10.0.0.1/24") as a, host.vm("b", vlan=1001, ip="10.0.0.2/24") as b:
        assert until(lambda: a.who_has("10.0.0.2") == [b.mac])
        assert a.who_has("10.0.0.9", timeout_s=0.2) == []
        watch, all_frames = a.watch_arp(announced="10.0.0.2"), a.watch_arp()
        b.run("arping", "-U", "-c", "1", "-w", "1", "-I", "eth0", "10.0.0.2", check=False)
        seen = watch.result()
        assert seen[-1].gratuitous and seen[-1].sender == "10.0.0.2"
        assert seen[-1] in all_frames.stop()


def test_a_power_cut_keeps_only_the_disk(own_bed: Bed) -> None:
    host = own_bed.hosts[0]
    host.vm("doomed", vlan=1001, ip="10.0.0.1/24")
    key = host.host_key
    host.write("/var/lib/kept", "x")
    host.write("/run/lost", "x")
    host.run("ip", "netns", "add", "lost")
    host.power_cut()
    assert host.vms == []
    assert own_bed.management.ping(host.address, timeout_s=0.3).answered == 0
    host.boot()
    assert host.read("/var/lib/kept") == "x"
    assert host.listing("/run/netns") == []
    assert "lost" not in host.listing("/run")
    assert host.host_key == key
    assert ssh(own_bed, host.address, "root", "hostname") == "h1"


@pytest.mark.parametrize(("what", "managed", "heard"), [("mgmt", 0, 1), ("guest", 1, 0), ("all", 0, 0)])
def test_a_partition_drops_silently_and_can_be_healed(own_bed: Bed, what: str, managed: int, heard: int) -> None:
    one, two = own_bed.hosts
    with one.vm("a", vlan=1001, ip="10.0.0.1/24") as a, two.vm("b", vlan=1001, ip="10.0.0.2/24"):
        assert a.ping("10.0.0.2").ok
        one.partition(what)  # type: ignore[arg-type]
        assert own_bed.management.ping(one.address, timeout_s=20 if managed else 0.3).answered == managed
        assert a.ping("10.0.0.2", timeout_s=20 if heard else 0.3).answered == heard
        assert one.read("/sys/class/net/eth1/carrier").strip() == "1"
        one.heal()
        assert own_bed.management.ping(one.address).ok
        assert a.ping("10.0.0.2").ok


def test_the_internet_can_have_several_links(own_bed: Bed) -> None:
    internet = own_bed.internet(vlan=101, address="203.0.113.1/24", also=["198.51.100.1/32"])
    internet.attach("untagged", "192.0.2.1/24")
    host = own_bed.hosts[0]
    host.links("address add 203.0.113.9/24 dev eth2.101", "address add 192.0.2.9/24 dev eth2")
    assert host.ping("203.0.113.1").ok
    assert host.ping("192.0.2.1").ok
    host.links("address delete 203.0.113.9/24 dev eth2.101", "address delete 192.0.2.9/24 dev eth2")


def test_the_inventory_lists_every_kind_of_leftover(own_bed: Bed) -> None:
    host = own_bed.hosts[0]
    before = settled_objects(host)
    host.sh(
        "ip netns add left; ip -n left link set lo up; ip -n left route add 10.9.9.0/24 dev lo;"
        "ip -n left rule add fwmark 7 table 7 priority 7; ip link add left0 type bridge;"
        "ip netns exec left nft 'add table inet t; add set inet t s { type inet_service; elements = { 22 }; }';"
        "ip netns exec left nft 'add set inet t seen { type inet_service; size 9; flags dynamic; elements = { 23 }; }';"
        "mkdir -p /var/lib/netloom/scopes; touch /var/lib/netloom/scopes/net-1.json;"
        "setsid sleep 60 </dev/null >/dev/null 2>&1 &"
    )
    assert until(lambda: "sleep 60" in host.objects()["processes"])
    changes = difference(before, host.objects())
    assert set(changes) == {
        "processes",
        "namespaces",
        "mounts",
        "files",
        "links",
        "addresses",
        "routes",
        "rules",
        "nftables",
    }
    assert [it for it in changes["nftables"]["+"] if "element" in it] == ["left/inet t set s element 22"]
    host.sh("pkill -x sleep; ip netns delete left; ip link delete left0; rm -r /var/lib/netloom")
    assert until(lambda: set(difference(before, host.objects())) <= {"mounts"}), difference(before, host.objects())


class TestExecution:
    """The executable is run as by CloudStack's service."""

    def cloud(self, bed: Bed, script: str, *, patience_s: float = 20.0) -> FakeCloudStack:
        cloud = FakeCloudStack.on(bed.management, program=["sh", "-c", script], agent="", patience_s=patience_s)
        return cloud.register(hosts=["192.0.2.1"])

    def test_the_executable_gets_a_bare_environment_and_merged_output(self, own_bed: Bed) -> None:
        cloud = self.cloud(own_bed, "env | cut -d= -f1 | sort | tr '\\n' ' '; id -un; tty >&2; umask; ls -l /tmp/cs-*")
        sent = cloud.execute("x", {}, {})
        names, tty, umask, file = sent.output.splitlines()
        assert set(names.split()) <= {"LANG", "PATH", "PWD", "OLDPWD", "SHLVL", "_", "cloud"}
        assert names.split()[-1] == "cloud"
        assert tty == "not a tty"
        assert umask == "0022"
        assert file.startswith("-rw-r--r-- 1 cloud cloud")

    def test_stdin_never_ends(self, own_bed: Bed) -> None:
        cloud = self.cloud(own_bed, "timeout 0.3 cat; echo $?")
        assert cloud.execute("x", {}, {}).output == "124"

    def test_a_child_process_that_keeps_the_output_open_is_detected(self, own_bed: Bed) -> None:
        cloud = self.cloud(own_bed, "sleep 5 & exit 0", patience_s=0.5)
        with pytest.raises(Hung):
            cloud.execute("x", {}, {})

    def test_the_management_server_has_no_route_to_the_outside(self, own_bed: Bed) -> None:
        routes = own_bed.management.run("ip", "-o", "route").out.splitlines()
        assert [line.split()[0] for line in routes] == ["198.18.0.0/24"]

    def test_the_payload_file_is_deleted_afterwards(self, own_bed: Bed) -> None:
        self.cloud(own_bed, "true").execute("x", {}, {})
        assert own_bed.management.listing("/tmp") == [
            n for n in own_bed.management.listing("/tmp") if "payload" not in n
        ]


KILLED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
sys.path.insert(0, sys.argv[1])
from bed import Bed
bed = Bed(hosts=1, vlans=[1001])
bed.hosts[0].vm("a", vlan=1001)
print(bed.hosts[0].pid, bed.fabric.client.pid, bed.hosts[0].vms[0].client.pid, flush=True)
time.sleep(60)
"""


def bed_objects() -> list[str]:
    """Objects of a bed in the root namespaces: mounts of disks and links."""
    mounts = [
        line for line in Path("/proc/self/mounts").read_text().splitlines() if line.split()[0] in ("disk", "disks")
    ]
    links = [link for link in os.listdir("/sys/class/net") if link in ("h1m", "h1e1", "ms", "mgmt", "vnet1")]
    return mounts + links


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_test_leaves_nothing(how: signal.Signals) -> None:
    test = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(TESTS)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert test.stdout is not None
    pids = test.stdout.readline().split()
    assert len(pids) == 3
    assert bed_objects() == [], "a bed creates nothing in the root namespaces"
    test.send_signal(how)
    test.wait(20)
    deadline = time.monotonic() + 20
    while any(Path("/proc", pid).exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert bed_objects() == []
    test.stdout.close()
