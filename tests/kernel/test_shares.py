"""One network's share of what the kernel keeps for all: neighbour entries, ICMP errors, learned addresses."""

from __future__ import annotations

import itertools
import socket
import struct
from collections.abc import Iterator

import pytest

from kernel.agent_host import AgentHost, agent_host, done
from kernel.isolated_network import BRIDGE, NS, WEB, WEB_IP, WEB_MAC, live_with_vm
from kernel.raw_frames import checksum, frame, one_cpu, send

GATEWAY, WIDE = "10.10.1.1", "10.10.0.0/16"
MANY, BOUND = 400, 256


@pytest.fixture
def host() -> Iterator[AgentHost]:
    """A network with a subnet of 65,000 addresses, and a VM that CloudStack named."""
    with agent_host() as it:
        it.start()
        live_with_vm(it)
        done(it.call("020", "implement-network", cidr=WIDE))
        it.ip("-n", WEB, "addr", "add", f"{WEB_IP}/16", "dev", "eth0")
        yield it


def fresh_addresses(third: int) -> list[str]:
    return [f"10.10.{third + at // 200}.{1 + at % 200}" for at in range(MANY)]


def neighbours(host: AgentHost) -> int:
    """The entries of the guest link that packets made."""
    listed = host.run("ip", "neigh", "show", "dev", "gst-204", "nud", "all", namespace=NS)
    return sum("PERMANENT" not in line for line in listed.splitlines())


def gateway_mac(host: AgentHost) -> str:
    mac: str = host.links(NS)["gst-204"]["address"]
    return mac.replace(":", "")


def ip_packet(source: str, destination: str, protocol: int, payload: bytes, ttl: int = 64) -> bytes:
    ends = socket.inet_aton(source) + socket.inet_aton(destination)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0, ttl, protocol, 0)
    return head[:10] + struct.pack("!H", checksum(head + ends)) + ends + payload


def echo_request(number: int) -> bytes:
    body = struct.pack("!BBHHH", 8, 0, 0, 7, number)
    return body[:2] + struct.pack("!H", checksum(body)) + body[4:]


def known_vm_is_served(host: AgentHost) -> bool:
    return " 0% packet loss" in host.run("ping", "-c", "2", "-W", "10", GATEWAY, namespace=WEB, check=False)


@pytest.mark.mutation("icmp-to-unknown-addresses-has-a-bound", instead='"counter"')
def test_pings_from_fresh_addresses_do_not_stop_the_answers_to_others(host: AgentHost) -> None:
    """The kernel has one socket for the ICMP messages of all namespaces on a CPU."""
    to = gateway_mac(host)
    with one_cpu():
        send(host, *(frame(to, 0x0800, ip_packet(it, GATEWAY, 1, echo_request(7))) for it in fresh_addresses(20)))
        assert known_vm_is_served(host)


@pytest.mark.mutation("packet-sources-have-a-bound")
@pytest.mark.mutation("next-hops-have-a-bound")
def test_packets_from_fresh_addresses_use_a_bounded_share(host: AgentHost) -> None:
    to = gateway_mac(host)
    # To a closed port: the device sends a reset.
    syn = struct.pack("!HHIIBBHHH", 5000, 81, 1, 0, 0x50, 2, 1000, 0, 0)
    frames = []
    for it in fresh_addresses(20):
        ends = socket.inet_aton(it) + socket.inet_aton(GATEWAY) + struct.pack("!HH", 6, 20)
        segment = syn[:16] + struct.pack("!H", checksum(ends + syn)) + syn[18:]
        frames.append(frame(to, 0x0800, ip_packet(it, GATEWAY, 6, segment)))
    send(host, *frames)
    assert 0 < neighbours(host) <= BOUND  # at once: the kernel soon forgets an address that does not answer
    assert known_vm_is_served(host)
    assert neighbours(host) <= BOUND


@pytest.mark.mutation("arp-senders-have-a-bound")
def test_arp_requests_from_fresh_addresses_use_a_bounded_share(host: AgentHost) -> None:
    mac = bytes.fromhex(WEB_MAC.replace(":", ""))
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + mac
    asked = bytes(6) + socket.inet_aton(GATEWAY)
    asking = (head + socket.inet_aton(at) + asked for at in fresh_addresses(30))
    send(host, *(frame("ff" * 6, 0x0806, it) for it in asking))
    assert 0 < neighbours(host) <= BOUND  # at once: the kernel soon forgets an address that does not answer
    assert known_vm_is_served(host)
    assert neighbours(host) <= BOUND


@pytest.mark.mutation("next-hops-have-a-bound")
def test_packets_to_fresh_addresses_use_a_bounded_share(host: AgentHost) -> None:
    with host.within(NS):
        opened = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    refused = 0
    with opened:
        # What waits for neighbours fits in. SO_SNDBUFFORCE
        opened.setsockopt(socket.SOL_SOCKET, 32, 4 << 20)
        for address in fresh_addresses(40):
            try:
                opened.sendto(b"x", (address, 9))
            except PermissionError:  # nftables dropped the device's own packet
                refused += 1
    assert refused == MANY - BOUND
    assert 0 < neighbours(host) <= BOUND  # at once: the kernel soon forgets an address that does not answer
    assert known_vm_is_served(host)
    assert neighbours(host) <= BOUND


@pytest.mark.mutation("icmp-errors-have-a-bound", instead='"counter"')
def test_one_network_does_not_use_up_the_icmp_errors_of_the_host(host: AgentHost) -> None:
    to, numbers = gateway_mac(host), itertools.count()
    packets = [ip_packet(WEB_IP, "198.51.100.7", 1, echo_request(next(numbers)), ttl=1) for _ in range(MANY)]
    with one_cpu():
        send(host, *(frame(to, 0x0800, it) for it in packets))
        assert known_vm_is_served(host)  # so this CPU has handled all that came before
    assert 0 < icmp(host, WEB, "InTimeExcds") < MANY
    # Before Linux 6.12 all namespaces share this count.
    assert icmp(host, NS, "OutTimeExcds") > 0
    assert icmp(host, NS, "OutRateLimitGlobal") == 0


def icmp(host: AgentHost, namespace: str, name: str) -> int:
    lines = host.run("cat", "/proc/net/snmp", namespace=namespace).splitlines()
    names, values = (it.split()[1:] for it in lines if it.startswith("Icmp:"))
    return int(dict(zip(names, values, strict=True))[name])


@pytest.mark.mutation("bridges-learn-a-bounded-number", instead="0")
def test_a_bridge_learns_a_bounded_number_of_addresses(host: AgentHost) -> None:
    def learned() -> int:
        return host.run("bridge", "fdb", "show", "br", BRIDGE).count(f"dev tap-{WEB}")

    for first in range(0, 6000, 500):
        macs = (struct.pack("!HI", 0x0202, at) for at in range(first, first + 500))
        send(host, *(b"\xff" * 6 + mac + b"\x88\xb6" + bytes(46) for mac in macs))
    assert 1000 < learned() <= 4200
    assert known_vm_is_served(host)


@pytest.mark.mutation("fragments-have-a-bound")
def test_fragments_use_a_bounded_share_of_memory(host: AgentHost) -> None:
    """The first fragments of packets whose rest never comes."""
    to, ends = gateway_mac(host), socket.inet_aton(WEB_IP) + socket.inet_aton(GATEWAY)
    frames = []
    for number in range(600):
        head = struct.pack("!BBHHHBBH", 0x45, 0, 1420, number, 0x2000, 64, 17, 0)
        frames.append(frame(to, 0x0800, head[:10] + struct.pack("!H", checksum(head + ends)) + ends + bytes(1400)))
    send(host, *frames)
    counted = host.run("cat", "/proc/net/sockstat", namespace=NS)
    memory = int(counted.partition("FRAG: inuse ")[2].split()[2])
    assert 100_000 < memory <= 540_000
    assert known_vm_is_served(host)


@pytest.mark.mutation("a-vm-adds-few-learned-addresses")
@pytest.mark.mutation("bridges-without-a-bound-get-rules", instead="True")
def test_a_vm_adds_few_addresses_to_a_bridge_without_a_bound() -> None:
    """Somebody else made the bridge. netloom changes none of its settings, as if the kernel had no such setting."""
    with agent_host() as host:
        host.start()
        host.ip("link", "add", BRIDGE, "type", "bridge")
        host.ip("link", "set", "eth1.1204", "master", BRIDGE, "up")
        host.ip("link", "set", BRIDGE, "up")
        live_with_vm(host)
        host.ip("addr", "add", f"{WEB_IP}/24", "dev", "eth0", namespace=WEB)
        host.ip("link", "set", f"tap-{WEB}", "name", "vnet7")  # as libvirt names them
        assert known_vm_is_served(host)
        for first in range(0, 3000, 500):
            macs = (struct.pack("!HI", 0x0202, at) for at in range(first, first + 500))
            targets = (b"\xff" * 6, bytes.fromhex("0180c2000003"))
            send(host, *(to + mac + b"\x88\x8e" + bytes(46) for mac in macs for to in targets))
        assert 200 < host.run("bridge", "fdb", "show", "br", BRIDGE).count("dev vnet7") <= 1000
        assert known_vm_is_served(host)
