"""Shared networks through a real agent: two address ranges, an external router, spoofing neighbours.

The router and the resolvers behind it are in the fabric. The device has its own address and forwards nothing.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from guestbed.dhcp import message as dhcp_message
from guestbed.dhcp import options_of
from guestbed.packets import broadcast_frame, checksum, frame
from kernel.agent_host import PAYLOADS, AgentHost, agent_host, done, steps, wait_until
from netloom.guest.dhcp import MessageType
from netloom.wire import Reply

COMMANDS = {it["file"][:3]: it["command"] for it in json.loads((PAYLOADS / "index.json").read_text())}
NS, BRIDGE, DEVICE = "cs-net-410", "breth1-1410", "10.30.0.5"
ROUTERS = ("10.30.0.1/24", "10.31.0.1/25")
ONE, ONE_MAC, ONE_IP = "sh-1", "1e:00:aa:00:00:11", "10.30.0.61"
TWO, TWO_MAC, TWO_IP = "sh-2", "1e:00:aa:00:00:12", "10.31.0.9"
THIEF_MAC = "1e:00:aa:00:00:99"
RESOLVER = "198.51.100.53"
BRIEFLY = ("--max-time", "1")  # where no answer is expected
DOMAIN = "shared.example.internal"
SECOND = {
    "nic_id": "7102",
    "nic_uuid": "6b7c2a10-0000-4000-8000-000000007102",
    "mac": TWO_MAC,
    "ip": TWO_IP,
    "netmask": "255.255.255.128",
    "gateway": "10.31.0.1",
    "hostname": TWO,
}

# Sets classless routes as RFC 3442 requires: router 0.0.0.0 means the link itself.
UDHCPC = """#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr replace "$ip/$mask" dev "$interface"
[ -n "$staticroutes" ] || ip route replace default via "$router"
set -- $staticroutes
while [ -n "$1" ]; do
    case "$2" in
        0.0.0.0) ip route replace "$1" dev "$interface" ;;
        *) ip route replace "$1" via "$2" ;;
    esac
    shift 2
done
echo "ip=$ip mask=$mask router=$router dns=$(echo $dns | tr ' ' ,) domain=$domain server=$serverid"
"""


def call_command(host: AgentHost, fixture: str, **changes: Any) -> Reply:
    return done(host.call(fixture, COMMANDS[fixture], **changes))


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with _host() as it:
        yield it


@pytest.fixture(scope="module")
def host_with_vms() -> Iterator[AgentHost]:
    """A host with a VM in each range, deployed by all calls of CloudStack. Tests that use it restore its state."""
    with _host() as it:
        for fixture in ("301", "302", "303", "304", "305", "306", "307", "308"):
            call_command(it, fixture)
        call_command(it, "305", **SECOND)
        call_command(it, "306", **SECOND, vm_data=[{"dir": "metadata", "file": "instance-id", "content": "i-two"}])
        call_command(it, "090", **_network(), **_first(), extension_ip=DEVICE, password="FAKE-one")
        it.plug(ONE, BRIDGE, ONE_MAC)
        it.plug(TWO, BRIDGE, TWO_MAC)
        for vm in (ONE, TWO):
            lease(it, vm)
        yield it


@contextlib.contextmanager
def _host() -> Iterator[AgentHost]:
    with agent_host("eth1.1410") as it, upstream_resolvers(it):
        it.start()
        for address in ROUTERS:
            it.run("ip", "addr", "add", address, "dev", "sw-eth1.1410", pid=it.fabric)
        it.run("sysctl", "-qw", "net.ipv4.ip_forward=1", pid=it.fabric)
        # The router forwards within one link and must not send redirects.
        for where in ("all", "sw-eth1/1410"):
            it.run("sysctl", "-qw", f"net.ipv4.conf.{where}.send_redirects=0", pid=it.fabric)
        script = it.path("/run/udhcpc")
        script.write_text(UDHCPC)
        script.chmod(0o755)
        yield it


@contextlib.contextmanager
def upstream_resolvers(host: AgentHost) -> Iterator[None]:
    """Run the resolvers behind the router. They know one name."""
    for address in (RESOLVER, "198.51.100.54"):
        host.run("ip", "addr", "add", f"{address}/32", "dev", "lo", pid=host.fabric)
    words = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--pid-file=", "--user=root"]
    words += ["--bind-interfaces", "--listen-address=198.51.100.53,198.51.100.54"]
    words += ["--address=/far.example/203.0.113.99"]
    process = subprocess.Popen(["nsenter", "-t", str(host.fabric), "-n", "-m", *words], cwd="/")
    try:
        wait_until(lambda: host.run("ss", "-Hlun", "sport", "53", pid=host.fabric).count("198.51.100.5") == 2)
        yield
    finally:
        process.kill()
        process.wait()


def _network() -> dict[str, str]:
    told = json.loads(next(PAYLOADS.glob("301-*")).read_text())["payload"]
    return {key: told[key] for key in ("network_id", "vlan", "guest_type", "network_state", "gateway", "cidr")}


def _first() -> dict[str, str]:
    told = json.loads(next(PAYLOADS.glob("301-*")).read_text())["payload"]
    return {key: told[key] for key in ("nic_id", "nic_uuid", "mac", "ip", "netmask")}


def lease(host: AgentHost, vm: str, *options: str, check: bool = True) -> dict[str, str]:
    words = ["busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", "20", "-T", "1", "-s", "/run/udhcpc"]
    said = host.run(*words, "-O", "staticroutes", *options, namespace=vm, check=check)
    line = next((line for line in said.splitlines() if line.startswith("ip=")), "")
    return dict(word.partition("=")[::2] for word in line.split())


def get(host: AgentHost, vm: str, path: str, *more: str, pid: int = 0, port: int = 80) -> str:
    words = ["curl", "-s", "--fail", "--max-time", "20", *more, f"http://{DEVICE}:{port}{path}"]
    return host.run(*words, namespace=vm, pid=pid, check=False)


def password(host: AgentHost, vm: str) -> str:
    return get(host, vm, "/", "-H", "DomU_Request: send_my_password", port=8080).strip()


def lookup(host: AgentHost, vm: str, name: str, pid: int = 0, patience_s: int = 20) -> str:
    said = host.run("timeout", str(patience_s), "busybox", "nslookup", name, DEVICE, namespace=vm, pid=pid, check=False)
    answers = said.partition("\n\n")[2]
    return " ".join(line.rpartition(" ")[2] for line in answers.splitlines() if "Address" in line)


def connection_request(to: str, mac: str, source: str, target: str, sport: int, dport: int) -> bytes:
    """The first packet of a TCP connection."""
    segment = struct.pack("!HHIIBBHHH", sport, dport, 1, 0, 0x50, 0x02, 64000, 0, 0)
    pseudo = socket.inet_aton(source) + socket.inet_aton(target) + struct.pack("!HH", socket.IPPROTO_TCP, len(segment))
    segment = segment[:16] + checksum(pseudo + segment) + segment[18:]
    return frame(to, mac, socket.IPPROTO_TCP, source, target, segment)


def pings(host: AgentHost, vm: str, address: str, patience_s: int = 20) -> bool:
    ping = ["ping", "-c", "1", "-W", str(patience_s), address]
    return " 0% packet loss" in host.run(*ping, namespace=vm, check=False)


def test_each_range_is_served_with_its_own_router_and_mask(host_with_vms: AgentHost) -> None:
    dns = f"{DEVICE},198.51.100.53,198.51.100.54"
    both = {"dns": dns, "domain": DOMAIN, "server": DEVICE}
    assert lease(host_with_vms, ONE) == {"ip": ONE_IP, "mask": "24", "router": "10.30.0.1", **both}
    assert lease(host_with_vms, TWO) == {"ip": TWO_IP, "mask": "25", "router": "10.31.0.1", **both}
    for vm in (ONE, TWO):
        assert lookup(host_with_vms, vm, f"{ONE}.{DOMAIN}") == ONE_IP
        assert lookup(host_with_vms, vm, f"{TWO}.{DOMAIN}") == TWO_IP
        assert lookup(host_with_vms, vm, "data-server") == DEVICE
        # Forwarded through the router, which is also the device's only route to the outside.
        assert lookup(host_with_vms, vm, "www.far.example") == "203.0.113.99"
    assert get(host_with_vms, ONE, "/latest/meta-data/local-hostname") == "sh-1"
    assert get(host_with_vms, ONE, "/latest/user-data").startswith("#!/bin/sh")
    assert get(host_with_vms, TWO, "/latest/meta-data/instance-id") == "i-two"
    assert password(host_with_vms, ONE) == "FAKE-one"


def test_a_client_that_rebinds_an_address_of_another_subnet_gets_a_nak(host_with_vms: AgentHost) -> None:
    host = host_with_vms
    stray = "192.168.7.7"
    own = [it for it in host.run("ip", "-br", "-4", "addr", "show", "eth0", namespace=ONE).split() if "/" in it]
    host.run("ip", "addr", "flush", "dev", "eth0", namespace=ONE)
    host.run("ip", "addr", "add", f"{stray}/24", "dev", "eth0", namespace=ONE)
    with host.within(ONE):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        client.bind(("0.0.0.0", 68))
        client.settimeout(10)
        client.sendto(dhcp_message(MessageType.REQUEST, ONE_MAC, ciaddr=stray), ("255.255.255.255", 67))
        answer = dict(options_of(client.recv(2000)))
    assert answer[53] == bytes([MessageType.NAK])
    host.run("ip", "addr", "flush", "dev", "eth0", namespace=ONE)
    for address in own:
        host.run("ip", "addr", "add", address, "dev", "eth0", namespace=ONE)
    lease(host, ONE)


def test_traffic_between_tenants_and_the_router_is_not_filtered(host_with_vms: AgentHost) -> None:
    assert pings(host_with_vms, ONE, TWO_IP)
    assert pings(host_with_vms, TWO, RESOLVER)


@pytest.mark.mutation("no-forwarding-in-a-plain-network", instead='"1"')
@pytest.mark.mutation("plain-networks-forward-nothing", instead='"type filter hook forward priority 0; policy accept;"')
def test_the_device_forwards_nothing(host_with_vms: AgentHost) -> None:
    before = json.loads(host_with_vms.run("ip", "-j", "route", "get", RESOLVER, namespace=ONE))[0]["gateway"]
    assert before == "10.30.0.1"
    host_with_vms.ip("-n", ONE, "route", "replace", RESOLVER, "via", DEVICE)
    try:
        assert pings(host_with_vms, ONE, DEVICE)
        assert not pings(host_with_vms, ONE, RESOLVER, 2)
    finally:
        host_with_vms.ip("-n", ONE, "route", "del", RESOLVER)


def test_a_neighbour_with_the_address_of_a_vm_gets_no_data_of_it(host_with_vms: AgentHost) -> None:
    host_with_vms.plug("thief", BRIDGE, THIEF_MAC, f"{ONE_IP}/24")
    host_with_vms.ip("-n", "thief", "link", "set", "eth0", "up")
    try:
        for path in ("/latest/user-data", "/latest/meta-data/local-hostname", "/latest/meta-data/"):
            assert get(host_with_vms, "thief", path, *BRIEFLY) == ""
        assert get(host_with_vms, "thief", "/", *BRIEFLY, "-H", "DomU_Request: send_my_password", port=8080) == ""
        assert lease(host_with_vms, "thief", "-t", "2", check=False) == {}
        # The thief answers ARP for the address. The device still sends to the owner's MAC address.
        assert get(host_with_vms, ONE, "/latest/meta-data/local-hostname") == "sh-1"
        assert lease(host_with_vms, ONE)["ip"] == ONE_IP
    finally:
        host_with_vms.ip("link", "del", "tap-thief")
        host_with_vms.ip("netns", "del", "thief")


def half_open(host: AgentHost) -> int:
    """The connections to the device that their clients have not completed."""
    return len(host.run("ss", "-Htn", "state", "syn-recv", namespace=NS).splitlines())


@pytest.mark.mutation("metadata-is-for-nics")
def test_connection_requests_from_made_up_addresses_take_nothing_from_the_vms(host_with_vms: AgentHost) -> None:
    """Also from the address of a VM with another MAC address, and from the MAC address of a VM with another address."""
    host = host_with_vms
    device_mac = host.links(NS)["gst-410"]["address"]
    host.plug("stranger", BRIDGE, THIEF_MAC)
    try:
        with host.within("stranger"):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            wire.bind(("eth0", 0))
        with wire:
            for number in range(600):
                made_up = (f"1e:00:aa:01:{number >> 8:02x}:{number & 255:02x}", f"10.30.0.{100 + number % 150}")
                sender = (made_up, (THIEF_MAC, ONE_IP), (TWO_MAC, made_up[1]))[number % 3]
                for port in (80, 8080):
                    wire.send(connection_request(device_mac, *sender, DEVICE, 2000 + number, port))
            assert half_open(host) == 0
        assert get(host, ONE, "/latest/meta-data/local-hostname") == "sh-1"
        assert get(host, TWO, "/latest/meta-data/instance-id") == "i-two"
        assert password(host, ONE) == "FAKE-one"
    finally:
        host.ip("link", "del", "tap-stranger")
        host.ip("netns", "del", "stranger")


@pytest.mark.mutation("a-vm-has-its-rate-of-connections")
def test_connection_requests_of_one_vm_leave_room_for_the_others(host_with_vms: AgentHost) -> None:
    host = host_with_vms
    device_mac = host.links(NS)["gst-410"]["address"]
    host.run("nft", "add table ip quiet; add chain ip quiet in { type filter hook input priority 0; policy drop; }",
             namespace=TWO)  # fmt: skip
    try:
        with host.within(TWO):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            wire.bind(("eth0", 0))
        with wire:
            taken = 0
            until = time.monotonic() + 20
            while not taken:  # they are forgotten after three seconds, which a busy machine may take to count them
                assert time.monotonic() < until
                for number in range(1500):
                    wire.send(connection_request(device_mac, TWO_MAC, TWO_IP, DEVICE, 2000 + number, 80))
                taken = half_open(host)
            # 200 at once, and 25 a second while the frames were sent.
            assert taken < 900
        assert get(host, ONE, "/latest/meta-data/local-hostname") == "sh-1"
        # They are forgotten after three seconds, with the kernel's default after 63.
        wait_until(lambda: half_open(host) == 0)
    finally:
        host.run("nft", "delete", "table", "ip", "quiet", namespace=TWO)
    wait_until(lambda: get(host, TWO, "/latest/meta-data/instance-id") == "i-two")


@pytest.mark.mutation("a-vm-has-its-rate-of-dhcp-requests")
def test_dhcp_requests_of_one_vm_leave_room_for_the_others(host_with_vms: AgentHost) -> None:
    host = host_with_vms
    with host.within(TWO):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        wire.bind(("eth0", 0))
        answers = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        answers.bind(("eth0", 0x0800))
    with wire, answers:
        answers.settimeout(20)
        began = time.monotonic()
        for _ in range(300):
            wire.send(broadcast_frame(TWO_MAC, dhcp_message(MessageType.DISCOVER, TWO_MAC)))
        offers = 0
        with contextlib.suppress(TimeoutError):
            while True:
                offers += answers.recv(2000)[23:24] == b"\x11"
                answers.settimeout(1 if offers else 20)
        assert 1 <= offers <= 60 + 12 * (time.monotonic() - began)
    assert lease(host, ONE)["ip"] == ONE_IP
    wait_until(lambda: lease(host, TWO, check=False).get("ip") == TWO_IP)


def test_a_vm_is_served_as_soon_as_its_entry_comes(host: AgentHost) -> None:
    """It started before, so the device has seen and dropped its requests."""
    for fixture in ("301", "302", "303", "304", "305", "306"):
        call_command(host, fixture)
    new = {**SECOND, "ip": "10.30.0.70", "netmask": "255.255.255.0", "gateway": "10.30.0.1"}
    host.plug(TWO, BRIDGE, TWO_MAC, "10.30.0.70/24")
    assert lease(host, TWO, "-t", "1", check=False) == {}
    assert get(host, TWO, "/latest/meta-data/instance-id", *BRIEFLY) == ""
    assert lookup(host, TWO, f"{ONE}.{DOMAIN}") == ONE_IP
    call_command(host, "303", **new)
    call_command(host, "306", **new, vm_data=[{"dir": "metadata", "file": "instance-id", "content": "i-two"}])
    assert lease(host, TWO)["ip"] == new["ip"]
    assert get(host, TWO, "/latest/meta-data/instance-id") == "i-two"


@pytest.mark.mutation("routers-do-not-reach-the-device")
def test_routers_and_outside_hosts_cannot_reach_the_device(host_with_vms: AgentHost) -> None:
    fabric = host_with_vms.fabric
    host_with_vms.run("nc", "-z", "-w", "20", DEVICE, "53", namespace=ONE)
    host_with_vms.run("ip", "route", "replace", f"{DEVICE}/32", "dev", "sw-eth1.1410", pid=fabric)
    for source in ("10.30.0.1", "10.31.0.1", RESOLVER):
        assert get(host_with_vms, "", "/", *BRIEFLY, "--interface", source, pid=fabric) == ""
        with pytest.raises(AssertionError, match="^nc "):
            host_with_vms.run("nc", "-z", "-w", "1", "-s", source, DEVICE, "53", pid=fabric)
        ping = host_with_vms.run("ping", "-c", "1", "-W", "1", "-I", source, DEVICE, pid=fabric, check=False)
        assert "100% packet loss" in ping
    assert lookup(host_with_vms, "", f"{ONE}.{DOMAIN}", pid=fabric, patience_s=2) == ""


def test_a_vm_behind_its_router_gets_names_but_no_metadata(host_with_vms: AgentHost) -> None:
    """The client ignores classless routes, so its requests have the MAC address of the router and prove no identity."""
    host_with_vms.ip("-n", TWO, "route", "replace", f"{DEVICE}/32", "via", "10.31.0.1")
    try:
        assert lookup(host_with_vms, TWO, f"{ONE}.{DOMAIN}") == ONE_IP
        assert get(host_with_vms, TWO, "/latest/meta-data/instance-id", *BRIEFLY) == ""
    finally:
        host_with_vms.ip("-n", TWO, "route", "replace", f"{DEVICE}/32", "dev", "eth0")
    assert get(host_with_vms, TWO, "/latest/meta-data/instance-id") == "i-two"


FIRST_CALLS = ("301", "302", "303", "304", "305", "306", "307", "314", "315", "090")


def test_any_first_command_builds_the_network_and_it_is_removed_completely(host: AgentHost) -> None:
    before = host.inventory()
    for removal in ("310", "311", "312", "313", "316"):
        call_command(host, removal)
    assert host.inventory() == before
    of_isolated = {**_network(), **_first(), "extension_ip": DEVICE, "password": "FAKE-one"}
    for first in FIRST_CALLS:
        call_command(host, first, **(of_isolated if first == "090" else {}))
        host.plug(ONE, BRIDGE, ONE_MAC, f"{ONE_IP}/24")
        assert pings(host, ONE, DEVICE), first
        if first in ("303", "315"):
            assert lease(host, ONE)["ip"] == ONE_IP
        if first == "090":
            wait_until(lambda: password(host, ONE) == "FAKE-one")
        call_command(host, "316")
        host.ip("link", "del", f"tap-{ONE}")
        host.ip("netns", "del", ONE)
        wait_until(lambda: host.inventory() == before)


def test_the_device_takes_the_address_that_cloudstack_sends(host: AgentHost) -> None:
    """Without an address in the call it stays. With another address the services move to it."""
    call_command(host, "301", extension_ip="")
    assert host.run("ip", "netns", "list") == ""
    for fixture in ("301", "302", "303", "304", "305", "306"):
        call_command(host, fixture)
    call_command(host, "303", extension_ip="")
    host.plug(ONE, BRIDGE, ONE_MAC)
    assert lease(host, ONE)["server"] == DEVICE
    moved = "10.30.0.6"
    call_command(host, "303", extension_ip=moved)
    assert lease(host, ONE)["server"] == moved
    url = f"http://{moved}/latest/meta-data/local-hostname"
    wait_until(lambda: host.run("curl", "-s", "--fail", *BRIEFLY, url, namespace=ONE, check=False) == "sh-1")
    query = ("busybox", "nslookup", f"{ONE}.{DOMAIN}", moved)
    wait_until(lambda: ONE_IP in host.run(*query, namespace=ONE, check=False))
    assert not pings(host, ONE, DEVICE, 2)
    host.kill()
    host.start()
    assert steps(host) == 0


def test_an_l2_network_stores_its_vms_and_builds_nothing(host: AgentHost) -> None:
    before = host.inventory()
    call_command(host, "320")
    assert host.inventory() == {**before, "files": before["files"] + 1}
    call_command(host, "316", network_id="420", vlan="1420", guest_type="l2")
    assert host.inventory() == before


def test_a_removed_range_a_restart_and_an_agent_restart_keep_the_other_range(host: AgentHost) -> None:
    for fixture in ("301", "302", "303", "304", "305", "306", "307", "308"):
        call_command(host, fixture)
    host.plug(ONE, BRIDGE, ONE_MAC)
    host.plug(TWO, BRIDGE, TWO_MAC)
    lease(host, ONE)
    assert lookup(host, ONE, f"{ONE}.{DOMAIN}") == ONE_IP
    # A restart by CloudStack: implement-network in state setup, then restore-network with all VMs, without netmasks.
    for fixture in ("314", "315"):
        call_command(host, fixture)
    assert lease(host, TWO)["mask"] == "25"
    wait_until(lambda: lookup(host, TWO, f"{TWO}.{DOMAIN}") == TWO_IP)
    # The first range is removed. Its VM gets nothing any more, the VM of the second range still gets everything.
    for fixture in ("311", "310", "312", "313"):
        call_command(host, fixture)
    assert lease(host, ONE, "-t", "2", check=False) == {}
    assert get(host, ONE, "/latest/meta-data/local-hostname", *BRIEFLY) == ""
    assert lease(host, TWO)["ip"] == TWO_IP
    wait_until(lambda: lookup(host, TWO, f"{ONE}.{DOMAIN}") == "")
    assert lookup(host, TWO, f"{TWO}.{DOMAIN}") == TWO_IP
    host.kill()
    host.start()
    assert steps(host) == 0
    assert get(host, TWO, "/latest/meta-data/local-hostname") == TWO


def test_after_failover_the_first_vm_command_builds_an_isolated_network() -> None:
    with agent_host() as host:
        host.start()
        call_command(host, "100")
        assert host.run("ip", "netns", "list") == ""
        call_command(host, "139")
        host.plug("web", "breth1-1204", "02:01:00:cc:00:03", "10.10.1.45/24")
        assert pings(host, "web", "10.10.1.1")


def test_an_isolated_network_with_an_external_gateway() -> None:
    """We provide only DHCP, DNS and user data. The device uses the gateway and does not take its address."""
    with agent_host("eth1.1205") as host, upstream_resolvers(host):
        host.start()
        host.run("ip", "addr", "add", "10.11.1.1/24", "dev", "sw-eth1.1205", pid=host.fabric)
        call_command(host, "140")
        told = json.loads(next(PAYLOADS.glob("140-*")).read_text())["payload"] | {"network_state": "implemented"}
        nic = {**told, "ip": "10.11.1.45", "dns": RESOLVER}
        for fixture in ("030", "032", "034"):
            call_command(host, fixture, **nic)
        host.plug("web", "breth1-1205", "02:01:00:cc:00:03", "10.11.1.45/24")
        said = host.run("busybox", "nslookup", "www.far.example", "10.11.1.7", namespace="web", check=False)
        assert "203.0.113.99" in said
        arping = ["arping", "-f", "-w", "20", "-I", "eth0", "10.11.1.1"]
        assert host.run(*arping, namespace="web").count("Unicast reply") == 1


def test_a_shared_network_with_nat_and_firewall_works_like_an_isolated_one() -> None:
    """In advanced zones the device is its gateway, and CloudStack implements the network and shuts it down."""
    with agent_host("eth1.1410", "eth2.101") as host:
        host.start()
        host.run("ip", "addr", "add", "203.0.113.1/24", "dev", "sw-eth2.101", pid=host.fabric)
        before = host.inventory()
        told = _network() | {"network_state": "implementing"}
        public, web = "203.0.113.20", 8081
        rule = {"id": 1, "type": "ingress", "protocol": "tcp", "portStart": web, "publicIp": public}
        call_command(host, "020", **told, extension_ip="10.30.0.1")
        call_command(host, "021", **told)
        told["network_state"] = "implemented"
        call_command(host, "053", **told, public_ip=public, public_port=str(web), private_ip=ONE_IP, private_port="80")
        call_command(host, "070", **told, fw_rules={"default_egress_allow": True, "rules": [rule]})
        call_command(host, "303", **told, **_first(), extension_ip="10.30.0.1")
        host.plug(ONE, BRIDGE, ONE_MAC, f"{ONE_IP}/24")
        host.ip("-n", ONE, "route", "add", "default", "via", "10.30.0.1")
        assert pings(host, ONE, "203.0.113.1")
        serve = "busybox nc -ll -p 80 -e echo served >/dev/null 2>&1 </dev/null &"
        host.run("sh", "-c", serve, namespace=ONE)
        heard = ("timeout", "3", "busybox", "nc", "-w", "2", public)
        wait_until(lambda: host.run(*heard, str(web), pid=host.fabric, check=False) == "served\n")
        assert host.run(*heard, "80", pid=host.fabric, check=False) == ""
        host.ip("link", "del", f"tap-{ONE}")
        host.ip("netns", "del", ONE)
        call_command(host, "126", **{**told, "network_state": "shutdown"})
        call_command(host, "316", network_state="setup")
        wait_until(lambda: {**host.inventory(), "connections": 0} == {**before, "connections": 0})


def test_an_untagged_shared_network_uses_the_nic_itself(host: AgentHost) -> None:
    call_command(host, "317")
    links = host.links()
    assert links["eth1"]["master"] == links["vnetg411"]["master"] == "breth1-0"
    assert "10.32.0.4/24" in host.run("ip", "addr", namespace="cs-net-411")


def test_a_private_vlan_is_refused_and_creates_nothing(host: AgentHost) -> None:
    before = host.inventory()
    reply = host.call("318", "prepare-nic")
    assert (reply.status, reply.error) == (
        1,
        "payload.vlan: 1412-i2412 is a private VLAN, which a Linux bridge cannot carry",
    )
    assert host.inventory() == before
