"""Send one datagram of each of many new flows, and print the seconds: what a router does per packet is part of it.

    new_flows.py DESTINATION SOURCE_NETWORK FIRST_PORT PORTS COUNT

The kernel carries a packet over veth links before the call that sends it returns, so no answer is needed. The source
addresses are those of SOURCE_NETWORK (two octets), and each flow has one of its own. The ports are spread evenly.
"""

from __future__ import annotations

import itertools
import random
import socket
import struct
import sys
import time

BURST = 500  # the kernel queues 1,000 packets; after each burst it gets a moment for the rest
PAUSE_S = 0.002


def datagram(destination: bytes, source: bytes, source_port: int, port: int) -> bytes:
    """An IPv4 packet. The kernel fills in its checksum, and UDP needs none."""
    udp = struct.pack("!HHHH", source_port, port, 26, 0) + bytes(18)
    return struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, source, destination) + udp


def main(destination: str, network: str, first: int, ports: int, count: int) -> None:
    """Make all packets first, so that only their sending is timed."""
    chance = random.Random(1)
    to = socket.inet_aton(destination)
    packets = [
        datagram(
            to,
            socket.inet_aton(f"{network}.{at // 250 % 250}.{at % 250 + 1}"),
            1024 + at % 60_000,
            first + chance.randrange(ports),
        )
        for at in range(count)
    ]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        took = 0.0
        waiting = iter(packets)
        while burst := list(itertools.islice(waiting, BURST)):
            began = time.perf_counter()
            for packet in burst:
                raw.sendto(packet, (destination, 0))
            took += time.perf_counter() - began
            time.sleep(PAUSE_S)
    sys.stdout.write(f"{took}\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
