"""Rows of the guest process: offers beside dnsmasq, and metadata beside a bare loop of the same HTTP library."""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bed import payloads
from bed.lab import Vm
from bed.machines import until
from bench.rows import Measured, Run, in_turns
from bench.stand import FIRST_VLAN, GATEWAY, CommandFailed, Stand, nic, standing
from guestbed.dhcp import message
from netloom.guest.dhcp import MessageType
from netns import inside

VMS = 500
OFFER_ROUNDS, REQUEST_ROUNDS = 5, 4
REFILL_S = 10.0  # until the VMs may ask as much again
REQUESTS = 150  # below what one VM may send at once
SIDE_VLAN = 3900  # of the yardsticks, which are VMs
SIDE_IP = "10.20.1.1"
PATH = "/latest/meta-data/instance-id"
LOOP = Path(__file__).with_name("http_loop.py")
_ETH_IP = 0x0800


def services(run: Run) -> Iterator[Measured]:
    """One network with many VMs. The yardsticks serve a VM of another segment."""
    with standing() as stand:
        run.say("a network with many VMs")
        stand.grow_to(1)
        network = stand.networks[0]
        nics = [nic(0, vm, address=f"10.20.{1 + vm // 200}.{10 + vm % 200}") for vm in range(VMS)]
        network.facts.cidr = "10.20.0.0/16"
        with stand.directly(network):
            network.send_or_fail("restore-network", payloads.restore_network(network.facts, nics, {}))
        first = nics[0]
        ours = stand.host.vm("ours", vlan=FIRST_VLAN, mac=first.mac, ip=f"{first.ip}/16", gateway=GATEWAY)
        theirs = stand.host.vm("theirs", vlan=SIDE_VLAN, mac=first.mac, ip=f"{first.ip}/16")
        server = stand.host.vm("server", vlan=SIDE_VLAN, ip=f"{SIDE_IP}/16")
        macs = [it.mac for it in nics]
        if run.wants("dhcp"):
            run.say("offers")
            server.write("/tmp/known", "".join(f"{it.mac},{it.ip}\n" for it in nics))
            with dnsmasq(stand, server):
                yield from in_turns(
                    OFFER_ROUNDS,
                    lambda: offers_per_s(theirs, macs),
                    {"dhcp": lambda: offers_per_s(ours, macs, pause_s=REFILL_S / 10)},
                ).items()
        if run.wants("metadata"):
            run.say("metadata requests")
            with http_loop(server):
                yield from in_turns(
                    REQUEST_ROUNDS,
                    lambda: requests_per_s(theirs),
                    {"metadata": lambda: requests_per_s(ours, pause_s=REFILL_S)},
                ).items()


# ----------------------------------------------------------------------------------------------------------------- DHCP


@contextmanager
def dnsmasq(stand: Stand, server: Vm) -> Iterator[None]:
    """A dnsmasq that knows the same VMs."""
    words = "--port=0 --bind-interfaces --interface=eth0 --dhcp-range=10.20.0.0,static,255.255.0.0"
    files = "--dhcp-hostsfile=/tmp/known --conf-file=/dev/null --leasefile-ro --pid-file=/tmp/dnsmasq.pid"
    server.run("dnsmasq", *words.split(), *files.split(), "--dhcp-authoritative", "--no-ping", "--user=root")
    try:
        yield
    finally:
        server.sh("kill $(cat /tmp/dnsmasq.pid)")


def offers_per_s(vm: Vm, macs: list[str], *, pause_s: float = 0.0) -> float:
    """From a DISCOVER to its OFFER, for one VM after the other. Each frame has the MAC address of the VM."""
    frames = [discover(mac) for mac in macs]
    time.sleep(pause_s)
    with inside(Path(f"/proc/{vm.client.pid}/ns/net")):
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    with listener, sender:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        listener.bind(("", 68))
        listener.settimeout(10)
        sender.bind(("eth0", 0))
        began = time.perf_counter()
        for frame in frames:
            sender.send(frame)
            listener.recv(2000)
        return len(frames) / (time.perf_counter() - began)


def discover(mac: str) -> bytes:
    """The frame of a DISCOVER, which asks for a broadcast reply."""
    said: bytes = message(MessageType.DISCOVER, mac, flags=0x8000)
    udp = struct.pack("!HHHH", 68, 67, 8 + len(said), 0) + said
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), socket.inet_aton("255.255.255.255")
    )
    head = head[:10] + checksum(head) + head[12:]
    return b"\xff" * 6 + bytes.fromhex(mac.replace(":", "")) + _ETH_IP.to_bytes(2, "big") + head + udp


def checksum(head: bytes) -> bytes:
    """That of an IPv4 header."""
    total: int = sum(struct.unpack(f"!{len(head) // 2}H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (~total & 0xFFFF).to_bytes(2, "big")


# ------------------------------------------------------------------------------------------------------------- metadata


@contextmanager
def http_loop(server: Vm) -> Iterator[None]:
    """A loop of the same library that gives everyone the same answer."""
    server.sh(f"{sys.executable} {LOOP} 80 >/tmp/loop.log 2>&1 & echo $! >/tmp/loop.pid")
    try:
        if not until(lambda: ":80 " in server.sh("ss -ltnH")):
            raise CommandFailed(f"the loop does not listen: {server.read('/tmp/loop.log')}")
        yield
    finally:
        with contextlib.suppress(OSError):
            server.sh("kill $(cat /tmp/loop.pid)")


def requests_per_s(vm: Vm, *, pause_s: float = 0.0) -> float:
    """Requests one after the other, each over its own connection, as cloud-init sends them."""
    time.sleep(pause_s)
    asked = f"GET {PATH} HTTP/1.1\r\nHost: {GATEWAY}\r\nConnection: close\r\n\r\n".encode()
    where = Path(f"/proc/{vm.client.pid}/ns/net")
    with inside(where):
        connections = [socket.socket() for _ in range(REQUESTS)]
    began = time.perf_counter()
    for connection in connections:
        with connection:
            connection.settimeout(10)
            connection.connect((GATEWAY, 80))
            connection.sendall(asked)
            said = b""
            while more := connection.recv(4096):
                said += more
            if not said.startswith(b"HTTP/1.1 200"):
                raise CommandFailed(f"metadata: {said[:100]!r}")
    return REQUESTS / (time.perf_counter() - began)
