"""IPv6 through a real agent: router advertisements, names, outbound traffic, filtering and repair."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from kernel.agent_host import REGISTRATION, AgentHost, act, agent_host, done, message, wait_until
from netloom.wire import Registration

NS, LINK = "cs-net-520", "gst-520"
GATEWAY, PREFIX = "2001:db8:50:1::1", "2001:db8:50:1::/64"
MAC, ADDRESS = "02:01:00:cc:05:03", "2001:db8:50:1:1:ff:fecc:503"  # from payload 402
OTHER_MAC, OTHER = "02:01:00:cc:05:04", "2001:db8:50:1:1:ff:fecc:504"
OUTSIDE = "2001:db8:99::1"  # the provider's router, and a host behind it
FAR = "2001:db8:ffff::1"
OURS = "2001:db8:99::520"
WAY_OUT = Registration(owner="test", guest_nic="eth1", public_nic="eth2", ip6_gateway=OUTSIDE, ip6_address=f"{OURS}/64")
FIRST_VM = (
    ("401", "implement-network"),
    ("021", "assign-ip"),
    ("402", "prepare-nic"),
    ("403", "add-dhcp-entry"),
    ("404", "add-dns-entry"),
)


def call(host: AgentHost, fixture: str, command: str, registration: Registration = WAY_OUT, **changes: Any) -> None:
    done(host.call(fixture, command, registration=registration, network_id="520", **changes))


def build(host: AgentHost, registration: Registration = WAY_OUT) -> None:
    for fixture, command in FIRST_VM:
        changes = {"vlan": "1520", "cidr": "10.50.1.0/24", "gateway": "10.50.1.1"} if fixture == "021" else {}
        call(host, fixture, command, registration, **changes)


def plug(host: AgentHost, vm: str, mac: str, bridge: str = "breth1-1520") -> None:
    """Add a VM whose kernel configures IPv6 by itself (SLAAC)."""
    host.plug(vm, "", mac)
    host.run("sysctl", "-qw", "net/ipv6/conf/all/disable_ipv6=0", namespace=vm)
    host.run("sysctl", "-qw", "net/ipv6/conf/eth0/dad_transmits=0", namespace=vm)
    host.ip("link", "set", f"tap-{vm}", "master", bridge)


def addresses(host: AgentHost, namespace: str, link: str = "eth0") -> set[str]:
    words = host.run(
        "ip", "-6", "-o", "addr", "show", "dev", link, "scope", "global", "-tentative", namespace=namespace
    ).split()
    return {words[at + 1].partition("/")[0] for at, word in enumerate(words) if word == "inet6"}


@contextlib.contextmanager
def listening(host: AgentHost, namespace: str, port: int, address: str = "::") -> Iterator[socket.socket]:
    with host.within(namespace):
        listener = socket.create_server((address, port), family=socket.AF_INET6)
    with listener:
        listener.settimeout(20)
        yield listener


def connect(host: AgentHost, namespace: str, address: str, port: int, patience_s: float = 20.0) -> socket.socket:
    with host.within(namespace):
        client = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    client.settimeout(patience_s)
    try:
        client.connect((address, port))
    except BaseException:
        client.close()
        raise
    return client


def reaches(host: AgentHost, namespace: str, address: str, port: int, patience_s: float = 20.0) -> bool:
    try:
        connect(host, namespace, address, port, patience_s).close()
    except TimeoutError:
        return False
    return True


def unreachables(host: AgentHost, namespace: str) -> int:
    """The number of ICMPv6 messages "destination unreachable" that a namespace has received."""
    lines = host.run("cat", "/proc/net/snmp6", namespace=namespace).splitlines()
    return int(next(line for line in lines if line.startswith("Icmp6InDestUnreachs")).split()[1])


def is_answered(host: AgentHost, namespace: str, address: str, patience_s: int = 20) -> bool:
    ping = ["ping", "-6", "-c1", f"-W{patience_s}", address]
    return " 0% packet loss" in host.run(*ping, namespace=namespace, check=False)


def answer_of(client: socket.socket, request: bytes, server: tuple[Any, ...]) -> bytes:
    """Send a request each second until something comes, as clients do: a program that starts loses the first ones."""
    client.settimeout(1)
    for _ in range(20):
        client.sendto(request, server)
        with contextlib.suppress(TimeoutError):
            return client.recv(4096)
    raise TimeoutError(f"{server} does not answer")


def dns_answer(host: AgentHost, namespace: str, server: str, name: str, kind: int = 28) -> bytes:
    """Query a name server; returns the DNS message. In an AAAA answer its last 16 bytes are the address."""
    labels = b"".join(bytes((len(it),)) + it.encode() for it in name.split("."))
    query = struct.pack(">6H", 7, 0x0100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">2H", kind, 1)
    with host.within(namespace):
        client = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        answer = answer_of(client, query, (server, 53))
    assert struct.unpack(">H", answer[6:8])[0] == 1, answer
    return answer


@pytest.fixture(scope="module")
def host() -> Iterator[AgentHost]:
    """A dual-stack network with an IPv6 uplink, its VMs, and the provider's router."""
    with agent_host("eth1.1520", "eth2.101") as it:
        it.start()
        build(it)
        plug(it, "vm", MAC)
        plug(it, "other", OTHER_MAC)
        outside(it, PREFIX, OURS)
        wait_until(lambda: ADDRESS in addresses(it, "vm") and OTHER in addresses(it, "other"))
        yield it


def outside(host: AgentHost, prefix: str, via: str) -> None:
    def run(*words: str) -> None:
        host.run("ip", *words, pid=host.fabric)

    host.run("sysctl", "-qw", "net/ipv6/conf/all/forwarding=1", pid=host.fabric)
    run("-6", "addr", "add", f"{OUTSIDE}/64", "dev", "sw-eth2.101", "nodad")
    run("-6", "addr", "add", f"{FAR}/128", "dev", "lo", "nodad")
    run("-6", "route", "add", prefix, "via", via, "dev", "sw-eth2.101")


def test_a_vm_configures_the_address_that_cloudstack_computed(host: AgentHost) -> None:
    assert addresses(host, "vm") == {ADDRESS}
    assert "default via fe80::" in host.run("ip", "-6", "route", namespace="vm")
    assert is_answered(host, "vm", GATEWAY)


def router_advertisement(host: AgentHost) -> tuple[int, dict[int, bytes]]:
    """Send a router solicitation from ``vm``; returns the router lifetime in seconds and the options by type."""
    with host.within("vm"):
        client = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        number = socket.if_nametoindex("eth0")
    with client:
        client.setsockopt(socket.IPPROTO_ICMPV6, 1, b"\xff" * 16 + b"\xbf" + b"\xff" * 15)  # ICMPV6_FILTER: only 134
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        client.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, number)
        answer = answer_of(client, bytes((133, 0, 0, 0, 0, 0, 0, 0)), ("ff02::2", 0, 0, number))
    options = {}
    rest = answer[16:]
    while rest:
        options[rest[0]] = rest[: 8 * rest[1]]
        rest = rest[8 * rest[1] :]
    return int.from_bytes(answer[6:8], "big"), options


def test_the_gateway_advertises_prefix_resolver_and_domain(host: AgentHost) -> None:
    lifetime_s, options = router_advertisement(host)
    assert lifetime_s >= 600
    assert socket.inet_ntop(socket.AF_INET6, options[3][16:32]) == "2001:db8:50:1::"
    assert options[3][2] == 64
    assert options[3][3] & 0x40  # autonomous
    assert socket.inet_ntop(socket.AF_INET6, options[25][8:24]) == GATEWAY  # RFC 8106: recursive DNS server
    assert b"\x08cs2cloud\x08internal" in options[31]


def test_the_mtu_of_the_segment_is_advertised() -> None:
    with agent_host("eth1.1520", "eth2.101") as it:
        it.ip("link", "set", "eth1.1520", "mtu", "1400")
        it.start()
        build(it)
        plug(it, "vm", MAC)
        wait_until(lambda: ADDRESS in addresses(it, "vm"))
        assert int.from_bytes(router_advertisement(it)[1][5][4:8], "big") == 1400
        assert it.run("cat", "/proc/sys/net/ipv6/conf/eth0/mtu", namespace="vm") == "1400\n"


def test_the_device_ignores_router_advertisements_of_guests(host: AgentHost) -> None:
    """Advertisements of a guest, sent to all nodes or to the gateway, do not change the device's routes."""
    before = host.run("ip", "-6", "route", namespace=NS)
    prefix = bytes((3, 4, 64, 0xC0)) + b"\xff" * 8 + bytes(4) + socket.inet_pton(socket.AF_INET6, "2001:db8:66::")
    forged = bytes((134, 0, 0, 0, 64, 0, 0x07, 0x08)) + bytes(8) + prefix
    with host.within("other"):
        sender = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        number = socket.if_nametoindex("eth0")
    # Protect the other VM, which would accept the advertisement and lose its default route for later tests.
    host.run("sysctl", "-qw", "net/ipv6/conf/eth0/accept_ra=0", namespace="vm")
    try:
        with sender:
            sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
            sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 255)
            sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, number)
            for receiver in ("ff02::1", GATEWAY):
                sender.sendto(forged, (receiver, 0, 0, number))
        assert is_answered(host, "other", GATEWAY)  # sent later and answered, so the advertisements were processed
    finally:
        host.run("sysctl", "-qw", "net/ipv6/conf/eth0/accept_ra=1", namespace="vm")
    assert host.run("ip", "-6", "route", namespace=NS) == before
    assert addresses(host, NS, LINK) == {GATEWAY}


def redirect(host: AgentHost, namespace: str, link: str, source: str, receiver: str) -> None:
    """Send ``receiver`` an ICMPv6 redirect for the far host in the name of a router."""
    target, far = (socket.inet_pton(socket.AF_INET6, it) for it in ("fe80::bad", FAR))
    with host.within(namespace):
        sender = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        number = socket.if_nametoindex(link)
    with sender:
        sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 255)
        sender.bind((source, 0, 0, number))
        sender.sendto(bytes((137, 0, 0, 0, 0, 0, 0, 0)) + target + far, (receiver, 0, 0, number))


@pytest.mark.mutation("neighbours-with-ip6-are-permanent")
def test_no_advertisement_of_a_guest_redirects_the_packets_for_another(host: AgentHost) -> None:
    assert is_answered(host, NS, ADDRESS)  # an entry that is not permanent could be changed now
    # RFC 4861 section 4.4: solicited, and it overrides what is known; with the sender's MAC address.
    flags, target = bytes((0x60, 0, 0, 0)), socket.inet_pton(socket.AF_INET6, ADDRESS)
    forged = bytes((136, 0, 0, 0)) + flags + target + bytes((2, 1)) + bytes.fromhex(OTHER_MAC.replace(":", ""))
    with host.within("other"):
        sender = socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
    with sender:
        sender.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 255)
        sender.sendto(forged, (GATEWAY, 0))
    wait_until(lambda: is_answered(host, "other", GATEWAY, 1))
    assert is_answered(host, NS, ADDRESS)
    known = host.run("ip", "-6", "neigh", "show", "dev", LINK, "nud", "permanent", namespace=NS).splitlines()
    assert {f"{it} lladdr {MAC} PERMANENT" for it in (ADDRESS, "fe80::1:ff:fecc:503")} <= {it.strip() for it in known}


def test_the_device_ignores_redirects(host: AgentHost) -> None:
    """The router has a link-local address, which a neighbour can forge. A VM follows the redirect, for comparison."""
    far = ("ip", "-6", "route", "get", FAR)
    router = json.loads(host.run("ip", "-6", "-j", "route", "show", "default", namespace="vm"))[0]["gateway"]
    host.run("ip", "-6", "addr", "add", "fe80::1/64", "dev", "sw-eth2.101", "nodad", pid=host.fabric)
    host.run("ip", "-6", "addr", "add", f"{router}/64", "dev", "eth0", "nodad", namespace="other")
    try:
        call(host, "401", "implement-network", msgspec.structs.replace(WAY_OUT, ip6_gateway="fe80::1"))
        assert is_answered(host, "vm", FAR)
        redirect(host, "", "sw-eth2.101", "fe80::1", OURS)
        redirect(host, "other", "eth0", router, ADDRESS)
        wait_until(lambda: "via fe80::bad" in host.run(*far, namespace="vm"))
        assert "via fe80::1 " in host.run(*far, namespace=NS)
    finally:
        host.run("ip", "-6", "addr", "del", f"{router}/64", "dev", "eth0", namespace="other")
        host.run("ip", "-6", "route", "flush", "cache", namespace="vm")
        call(host, "401", "implement-network")
        host.run("ip", "-6", "addr", "del", "fe80::1/64", "dev", "sw-eth2.101", pid=host.fabric)
    wait_until(lambda: is_answered(host, "vm", FAR, 1))


def test_names_resolve_to_both_addresses_over_both_families(host: AgentHost) -> None:
    for server in (GATEWAY, "10.50.1.1"):
        if server == "10.50.1.1":
            host.ip("-n", "vm", "addr", "replace", "10.50.1.45/24", "dev", "eth0")
        assert dns_answer(host, "vm", server, "six-1.cs2cloud.internal")[-16:] == socket.inet_pton(
            socket.AF_INET6, ADDRESS
        )
    nibbles = ".".join(reversed(socket.inet_pton(socket.AF_INET6, ADDRESS).hex()))
    assert b"\x05six-1" in dns_answer(host, "vm", GATEWAY, f"{nibbles}.ip6.arpa", kind=12)


@pytest.mark.mutation("names-have-both-addresses")
def test_defect_49_a_restore_keeps_both_addresses(host: AgentHost) -> None:
    call(host, "406", "restore-network")
    assert dns_answer(host, "vm", GATEWAY, "six-1.cs2cloud.internal")[-16:] == socket.inet_pton(
        socket.AF_INET6, ADDRESS
    )


def test_a_guest_reaches_the_outside_with_its_own_address(host: AgentHost) -> None:
    with listening(host, "", 8080, FAR) as listener, connect(host, "vm", FAR, 8080) as client:
        served, peer = listener.accept()
        with served:
            assert peer[0] == ADDRESS
            served.sendall(b"hello")
            assert client.recv(10) == b"hello"


def test_outside_hosts_cannot_open_connections(host: AgentHost) -> None:
    with listening(host, "vm", 22), pytest.raises(TimeoutError):
        connect(host, "", ADDRESS, 22, patience_s=1.5)
    for address in (ADDRESS, GATEWAY, OURS):
        assert not reaches(host, "", address, 53, patience_s=1)
    # A neighbour on the public VLAN cannot use the address of a guest.
    host.run("ip", "-6", "addr", "add", f"{OTHER}/128", "dev", "lo", "nodad", pid=host.fabric)
    try:
        with host.within():
            forged = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        with host.within("vm"):
            heard = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        with forged, heard:
            heard.bind(("::", 5000))
            heard.settimeout(1)
            forged.bind((OTHER, 5001))
            forged.sendto(b"forged", (ADDRESS, 5000))
            with pytest.raises(TimeoutError):
                heard.recv(10)
    finally:
        host.run("ip", "-6", "addr", "del", f"{OTHER}/128", "dev", "lo", pid=host.fabric)


def test_traffic_of_a_prefix_is_counted(host: AgentHost) -> None:
    def counted() -> tuple[int, int]:
        told = message(act(host, "counters", "501", network_id="520", filter=PREFIX)).split()
        return int(told[2]), int(told[7])

    arrived, left = counted()
    host.run("ping", "-6", "-c3", "-i0.2", "-W5", FAR, namespace="vm")
    assert counted() == (arrived + 3, left + 3)
    # Traffic from outside is counted even if the firewall drops it. Traffic to the gateway is not counted.
    assert not reaches(host, "", ADDRESS, 22, patience_s=0.5)
    assert is_answered(host, "vm", GATEWAY)
    assert counted()[0] > arrived + 3
    assert counted()[1] == left + 3


def test_a_guest_cannot_send_from_a_foreign_address(host: AgentHost) -> None:
    host.run("ip", "-6", "addr", "add", "2001:db8:50:2::7/128", "dev", "eth0", "nodad", namespace="vm")
    try:
        with host.within("vm"):
            client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        with host.within():
            heard = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        with client, heard:
            heard.bind((FAR, 5000))
            heard.settimeout(20)
            client.bind(("2001:db8:50:2::7", 5001))
            client.sendto(b"forged", (FAR, 5000))
            with host.within("vm"):
                honest = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
            with honest:
                honest.bind((ADDRESS, 5002))
                honest.sendto(b"honest", (FAR, 5000))
            assert heard.recv(10) == b"honest"
            heard.settimeout(1)
            with pytest.raises(TimeoutError):
                heard.recv(10)
    finally:
        host.run("ip", "-6", "addr", "del", "2001:db8:50:2::7/128", "dev", "eth0", namespace="vm")


@pytest.fixture
def rules(host: AgentHost) -> Iterator[Any]:
    def apply(*egress: dict[str, Any], allow: bool) -> None:
        listed = [{"id": 900 + at, "type": "egress", **it} for at, it in enumerate(egress)]
        call(host, "408", "apply-fw-rules", fw_rules={"default_egress_allow": allow, "rules": listed})

    yield apply
    apply(allow=True)


@pytest.mark.mutation("egress-rules-are-about-ipv6-too")
def test_defect_12_egress_rules_apply_to_ipv6(host: AgentHost, rules: Any) -> None:
    web = {"protocol": "tcp", "portStart": 80, "portEnd": 80, "sourceCidrs": [], "destCidrs": []}
    with listening(host, "", 80, FAR), listening(host, "", 81, FAR):
        rules(allow=False)
        assert not reaches(host, "vm", FAR, 80, 1)
        rules(web, allow=False)
        assert reaches(host, "vm", FAR, 80)
        assert not reaches(host, "vm", FAR, 81, 1)
        rules(web | {"destCidrs": ["2001:db8:ffff::/48"]}, allow=True)
        assert not reaches(host, "vm", FAR, 80, 1)
        assert reaches(host, "vm", FAR, 81)
        # 0.0.0.0/0 does not match IPv6.
        rules(web | {"destCidrs": ["0.0.0.0/0"]}, allow=True)
        assert reaches(host, "vm", FAR, 80)
        rules({"protocol": "icmp", "icmpType": -1, "icmpCode": -1}, allow=False)
        assert is_answered(host, "vm", FAR)
        assert not reaches(host, "vm", FAR, 80, 1)
        rules(allow=False)
        assert not is_answered(host, "vm", FAR, 1)
        assert is_answered(host, "vm", GATEWAY)  # the device itself, under any policy


def test_a_revoked_rule_ends_only_its_own_flows(host: AgentHost, rules: Any) -> None:
    rules(allow=True)
    with listening(host, "", 80, FAR) as one, listening(host, "", 81, FAR) as two:
        first, second = connect(host, "vm", FAR, 80), connect(host, "vm", FAR, 81)
        ends = one.accept()[0], two.accept()[0]
        with first, second, ends[0], ends[1]:
            denied = {"protocol": "tcp", "portStart": 80, "portEnd": 80, "destCidrs": ["2001:db8:ffff::/48"]}
            rules(denied, allow=True)
            for sender, receiver, lives in ((first, ends[0], False), (ends[0], first, False), (second, ends[1], True)):
                sender.sendall(b"still there?")
                receiver.settimeout(20 if lives else 1)
                if lives:
                    assert receiver.recv(20) == b"still there?"
                else:
                    with pytest.raises((TimeoutError, ConnectionResetError)):  # it was reset as a sender
                        receiver.recv(20)


@pytest.mark.mutation("an-unconnected-flow-is-marked-as-revoked", instead='"keep"')
def test_a_revoked_rule_ends_udp_flows(host: AgentHost, rules: Any) -> None:
    """Neither end gets datagrams of the other. When the flow is allowed again, it works again."""
    rules(allow=True)
    with host.within("vm"):
        near = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with host.within():
        far = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with near, far:
        near.bind((ADDRESS, 5011))
        far.bind((FAR, 5010))

        def heard(sender: socket.socket, receiver: socket.socket, patience_s: float) -> bool:
            sender.sendto(b"hello", receiver.getsockname())
            receiver.settimeout(patience_s)
            try:
                return receiver.recv(10) == b"hello"
            except TimeoutError:
                return False

        assert heard(near, far, 20)
        assert heard(far, near, 20)
        rules({"protocol": "udp", "portStart": 5010, "portEnd": 5010, "destCidrs": ["2001:db8:ffff::/48"]}, allow=True)
        assert not heard(far, near, 1)
        assert not heard(near, far, 1)
        assert not heard(far, near, 1)
        rules(allow=True)
        assert heard(near, far, 20)
        assert heard(far, near, 20)


def test_removed_ipv6_objects_are_restored(host: AgentHost) -> None:
    assert message(act(host, "check", "501", network_id="520")) == "nothing to do: all is as it should be"
    host.run("ip", "-6", "addr", "del", f"{GATEWAY}/64", "dev", LINK, namespace=NS)
    host.run("ip", "-6", "route", "del", "default", namespace=NS)
    wait_until(lambda: GATEWAY in addresses(host, NS, LINK))
    host.run("ip", "-6", "route", "flush", "table", "main", namespace=NS)
    wait_until(lambda: PREFIX in host.run("ip", "-6", "route", namespace=NS))
    wait_until(lambda: GATEWAY in addresses(host, NS, LINK))
    wait_until(lambda: "default via" in host.run("ip", "-6", "route", namespace=NS))
    wait_until(lambda: is_answered(host, "vm", FAR, 1))
    neighbour = ["ip", "-6", "neigh", "show", ADDRESS, "dev", LINK, "nud", "permanent"]
    host.run("ip", "-6", "neigh", "del", ADDRESS, "dev", LINK, namespace=NS)
    wait_until(lambda: MAC in host.run(*neighbour, namespace=NS))
    # Delete the link: dnsmasq is bound to its index, and the new link has another one.
    host.ip("link", "del", "vnetg520")
    wait_until(lambda: "vnetg520" in host.links())
    wait_until(lambda: GATEWAY in addresses(host, NS, LINK))
    lifetime_s, options = router_advertisement(host)
    assert lifetime_s >= 600
    assert socket.inet_ntop(socket.AF_INET6, options[3][16:32]) == "2001:db8:50:1::"
    assert dns_answer(host, "vm", GATEWAY, "six-1.cs2cloud.internal")
    wait_until(lambda: MAC in host.run(*neighbour, namespace=NS))


@pytest.mark.mutation("a-reboot-puts-back-what-links-lost", instead="first")
def test_defect_47_reboot_device_keeps_the_ipv6_gateway_address(host: AgentHost) -> None:
    assert host.agent is not None
    done(act(host, "reboot-device", "501", network_id="520"))
    host.agent.send_signal(signal.SIGSTOP)  # without its repairs
    try:
        assert addresses(host, NS, LINK) == {GATEWAY}
    finally:
        host.agent.send_signal(signal.SIGCONT)
    wait_until(lambda: is_answered(host, "vm", FAR, 1))


def test_a_restarted_agent_finds_ipv6_as_it_should_be(host: AgentHost) -> None:
    host.kill()
    host.start()
    assert message(act(host, "check", "501", network_id="520")) == "nothing to do: all is as it should be"
    assert f"IPv6 leaves as {OURS}/64 through {OUTSIDE}" in message(act(host, "show", "501", network_id="520"))
    assert is_answered(host, "vm", FAR)


def test_packets_that_are_too_large_get_an_icmp_error_in_both_directions(host: AgentHost) -> None:
    def resize(mtu: int) -> None:
        host.ip("link", "set", "eth1.1520", "mtu", str(mtu))
        wait_until(lambda: host.links("cs-net-520")["gst-520"]["mtu"] == mtu)

    resize(9000)
    for words in (["-n", "vm", "link", "set", "eth0", "mtu", "9000"], ["link", "set", "tap-vm", "mtu", "9000"]):
        host.ip(*words)
    ping = ["ping", "-6", "-c", "1", "-W", "20", "-M", "do", "-s", "3952", FAR]
    assert f"From {GATEWAY} icmp_seq=1 Packet too big: mtu=1500" in host.run(*ping, namespace="vm", check=False)

    resize(1400)
    with host.within("vm"):
        client = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with host.within():
        server = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    with client, server:
        server.setsockopt(socket.IPPROTO_IPV6, 23, 2)  # IPV6_MTU_DISCOVER, IPV6_PMTUDISC_DO
        server.setsockopt(socket.IPPROTO_IPV6, 62, 1)  # IPV6_DONTFRAG
        server.bind((FAR, 5555))
        server.settimeout(20)
        client.sendto(b"hello", (FAR, 5555))
        _, sender = server.recvfrom(100)
        with pytest.raises(OSError, match="Message too long"):
            wait_until(lambda: server.sendto(bytes(1400), sender) == 0)
    resize(1500)
    for words in (["-n", "vm", "link", "set", "eth0", "mtu", "1500"], ["link", "set", "tap-vm", "mtu", "1500"]):
        host.ip(*words)


@pytest.mark.mutation("the-resolver-starts-without-ipv6")
def test_the_resolver_starts_on_a_segment_that_is_too_small_for_ipv6(host: AgentHost) -> None:
    def has_ip6() -> bool:
        return GATEWAY in host.ip("-6", "-n", "cs-net-520", "addr", "show", "dev", "gst-520")

    host.ip("-n", "vm", "addr", "replace", "10.50.1.45/24", "dev", "eth0")
    host.ip("link", "set", "eth1.1520", "mtu", "1200")
    wait_until(lambda: not has_ip6())
    (before,) = host.processes("dnsmasq")
    os.kill(before, signal.SIGKILL)
    # Either its end starts another one, or the repair of the smaller segment, which may still run.
    wait_until(lambda: host.processes("dnsmasq").keys() not in ({before}, set()))
    name = "six-1.cs2cloud.internal"
    assert dns_answer(host, "vm", "10.50.1.1", name)[-16:] == socket.inet_pton(socket.AF_INET6, ADDRESS)
    host.ip("link", "set", "eth1.1520", "mtu", "1500")
    wait_until(has_ip6)
    assert dns_answer(host, "vm", GATEWAY, name)[-16:] == socket.inet_pton(socket.AF_INET6, ADDRESS)


def test_without_an_ipv6_uplink_the_gateway_rejects_at_once() -> None:
    with agent_host("eth1.1520", "eth2.101") as it:
        it.start()
        before = it.inventory()
        build(it, REGISTRATION)
        plug(it, "vm", MAC)
        wait_until(lambda: ADDRESS in addresses(it, "vm"))
        before_refusal = unreachables(it, "vm")
        with pytest.raises(OSError) as refused:
            connect(it, "vm", FAR, 80, patience_s=30)
        assert refused.value.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH), refused.value
        # The gateway's ICMPv6 message ended the attempt, not a timeout.
        assert unreachables(it, "vm") > before_refusal
        it.ip("netns", "del", "vm")
        for fixture, command in (("126", "shutdown-network"), ("131", "destroy-network")):
            call(it, fixture, command, REGISTRATION)
        wait_until(lambda: it.inventory() == before)


def test_acls_filter_ipv6_and_a_tier_without_ipv6_has_none() -> None:
    """An ACL with IPv6 prefixes filters traffic of a tier with IPv6. The other tier has no IPv6 address."""
    with agent_host("eth1.1310", "eth1.1311", "eth2.101") as it:
        it.start()
        six = {"network_ip6_gateway": GATEWAY, "network_ip6_cidr": PREFIX}

        def send(fixture: str, command: str, **changes: Any) -> None:
            done(it.call(fixture, command, registration=WAY_OUT, **changes))

        send("202", "implement-vpc")
        send("210", "implement-network", **six)
        send("211", "assign-ip", **six)
        send("230", "implement-network")
        plug(it, "vm", MAC, "breth1-1310")
        outside(it, PREFIX, OURS)
        wait_until(lambda: ADDRESS in addresses(it, "vm"))
        assert addresses(it, "cs-vpc-7", "gst-310") == {GATEWAY}
        assert it.run("cat", "/proc/sys/net/ipv6/conf/gst-311/disable_ipv6", namespace="cs-vpc-7") == "1\n"
        assert "fe80" not in it.run("ip", "-6", "addr", "show", "dev", "gst-311", namespace="cs-vpc-7")
        item = {"number": 1, "action": "allow", "trafficType": "ingress", "protocol": "tcp"}
        with listening(it, "vm", 22), listening(it, "vm", 23), listening(it, "", 80, FAR):
            assert not reaches(it, "", ADDRESS, 22, 1)  # without an ACL ingress is closed and egress open
            assert reaches(it, "vm", FAR, 80)
            ssh = item | {"portStart": 22, "portEnd": 22, "sourceCidrs": ["2001:db8:99::/64"]}
            send("212", "apply-network-acl", **six, acl_rules=[ssh])
            assert reaches(it, "", ADDRESS, 22)
            assert not reaches(it, "", ADDRESS, 23, 1)
            send("212", "apply-network-acl", **six, acl_rules=[ssh | {"sourceCidrs": ["0.0.0.0/0"]}])
            assert not reaches(it, "", ADDRESS, 22, 1)
            denied = item | {"action": "deny", "trafficType": "egress", "sourceCidrs": ["2001:db8:ffff::/48"]}
            send("212", "apply-network-acl", **six, acl_rules=[ssh, denied])
            assert not reaches(it, "vm", FAR, 80, 1)
