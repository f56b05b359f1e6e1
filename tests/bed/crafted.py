"""Many new TCP flows each second, made of packets from one process at both ends, without sockets for them.

    with crafted_flows(internet, vm, STATIC_NAT, vm.ip, gateway=GATEWAY, per_s=5000, seconds=10) as running:
        ...
        assert running.result() == 50_000

A flow is opened from outside (SYN, SYN-ACK, ACK), so conntrack calls it assured, and is reset at once, unless it
``stays``. Sockets would cost the machine more than what is measured.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import netns
from bed.probes import Control

if TYPE_CHECKING:
    from bed.client import Running
    from bed.machines import Machine

PORT = 6999  # of the guest; both ends drop what their kernels would answer
SECONDS_MAX = 120.0
_SOURCES = 200  # clients, 198.51.100.20 and so on, with 50,000 ports each
_PORTS = 50_000
_SYN, _SYN_ACK, _ACK, _RST = 0x02, 0x12, 0x10, 0x04
_SLICE_S = 0.002


class _End:
    """One end of all flows: a packet socket in its namespace, and the head of its frames."""

    def __init__(self, pid: int, link: str, mac: str, neighbour: str) -> None:
        with netns.inside(f"/proc/{pid}/ns/net"):
            self._raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            self._raw.bind((link, 0))
        self._head = bytes.fromhex((neighbour + mac).replace(":", "")) + b"\x08\0"

    def send(self, source: bytes, target: bytes, ports: tuple[int, int], flags: int, numbers: tuple[int, int]) -> None:
        tcp = struct.pack("!HHIIBBHHH", *ports, *numbers, 5 << 4, flags, 0xFFFF, 0, 0)
        total = _sum(source + target + struct.pack("!HH", 6, len(tcp)) + tcp)
        tcp = tcp[:16] + struct.pack("!H", total) + tcp[18:]
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0x4000, 64, 6, 0) + source + target
        ip = ip[:10] + struct.pack("!H", _sum(ip)) + ip[12:]
        self._raw.send(self._head + ip + tcp)

    def close(self) -> None:
        self._raw.close()


def _sum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return int(~(total + (total >> 16)) & 0xFFFF)


def craft_flows(
    stop: Control,
    *,
    outside: list[Any],
    inside: list[Any],
    address: str,
    guest: str,
    per_s: int,
    seconds: float,
    stays: bool,
) -> int:
    """Make flows at a rate, until stopped; returns their number. An end is [pid, link, its MAC, the neighbour's MAC].

    A process that gets no processor for a moment makes up for the missed flows.
    """
    if not 0 < seconds <= SECONDS_MAX:
        raise ValueError(f"{seconds} s is not within 0 and {SECONDS_MAX:.0f} s")
    client, server = _End(*outside), _End(*inside)
    public, private = socket.inet_aton(address), socket.inet_aton(guest)
    made, began = 0, time.monotonic()
    stop.ready()
    while not stop.is_set() and (spent := time.monotonic() - began) < seconds:
        while made < spent * per_s:
            source = socket.inet_aton(f"198.51.100.{20 + made // _PORTS % _SOURCES}")
            port = 10_000 + made % _PORTS
            client.send(source, public, (port, PORT), _SYN, (1, 0))
            server.send(private, source, (PORT, port), _SYN_ACK, (1, 2))
            client.send(source, public, (port, PORT), _ACK, (2, 2))
            if not stays:
                client.send(source, public, (port, PORT), _RST, (2, 0))
            made += 1
        time.sleep(_SLICE_S)
    client.close()
    server.close()
    return made


_DROP = "table inet crafted {{ chain input {{ type filter hook prerouting priority raw; {match} drop; }}; }}\n"


@contextmanager
def crafted_flows(
    outside: Machine,
    vm: Machine,
    address: str,
    guest: str,
    *,
    gateway: str,
    per_s: int,
    seconds: float,
    stays: bool = False,
) -> Iterator[Running[int]]:
    """Make flows from ``outside`` to a public address with static NAT for the guest, within the block."""
    from bed.client import Client

    (public_mac,), (gateway_mac,) = set(outside.who_has(address)), set(vm.who_has(gateway))
    outside.run("nft", "-f", "-", input=_DROP.format(match=f"tcp sport {PORT}"))
    vm.run("nft", "-f", "-", input=_DROP.format(match=f"tcp dport {PORT}"))
    client = Client("crafted", {"role": "worker"}).wait_up()
    try:
        ends = [
            [machine.client.pid, "eth0", machine.read("/sys/class/net/eth0/address").strip(), neighbour]
            for machine, neighbour in ((outside, public_mac), (vm, gateway_mac))
        ]
        running = client.start(
            "craft_flows",
            int,
            outside=ends[0],
            inside=ends[1],
            address=address,
            guest=guest,
            per_s=per_s,
            seconds=seconds,
            stays=stays,
        )
        yield running.wait_ready()
    finally:
        client.end()
        for machine in (outside, vm):
            machine.run("nft", "delete", "table", "inet", "crafted")
