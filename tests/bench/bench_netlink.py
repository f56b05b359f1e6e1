"""One network by our codec against ``ip -batch``, in turns in the same run. Root; run it by hand, nothing is asserted.

PYTHONPATH=internal:tests python tests/bench/bench_netlink.py [rounds]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from kernel.rtnetlink import add_address, add_route
from netloom.agent.kernel import links, namespaces, sysctl

HOST, INNER = (f"kbench-{os.getpid()}-{end}" for end in ("host", "inner"))
SYSCTLS = {"net.ipv4.ip_forward": "1", "net.ipv4.conf.all.rp_filter": "2", "net/ipv4/conf/gst-7/arp_ignore": "1"}

ON_HOST = f"""
link add breth1-7 type bridge stp_state 0 forward_delay 0 mcast_snooping 0
link set breth1-7 alias netloom up
link add vnetg7 type veth peer name gst-7 address 0a:00:00:00:00:07 netns {INNER}
link set vnetg7 alias netloom master breth1-7 up
link add vnetpn7.9 type veth peer name pub-9 address 0a:00:00:00:00:09 netns {INNER}
link set vnetpn7.9 alias netloom master breth1-7 up
"""
INSIDE = """
link set lo up
link set gst-7 up
link set pub-9 up
address add 10.7.0.1/24 dev gst-7
address add 203.0.113.7/24 dev pub-9
route add default via 203.0.113.1
"""


def by_codec() -> None:
    """As the agent does it: three datagrams and the sysctls by file."""
    namespaces.create(INNER)
    with namespaces.descriptor(INNER) as fd:
        links.change(
            HOST,
            [
                links.make_bridge("breth1-7", alias="netloom"),
                links.set_up("breth1-7"),
                links.make_veth("vnetg7", "breth1-7", "gst-7", "0a:00:00:00:00:07", 0, fd, alias="netloom"),
                links.make_veth("vnetpn7.9", "breth1-7", "pub-9", "0a:00:00:00:00:09", 0, fd, alias="netloom"),
                links.set_up("vnetg7"),
                links.set_up("vnetpn7.9"),
            ],
        )
    links.change(
        INNER,
        [
            *(links.set_up(name) for name in ("lo", "gst-7", "pub-9")),
            add_address("gst-7", "10.7.0.1/24"),
            add_address("pub-9", "203.0.113.7/24"),
            add_route("0.0.0.0/0", "pub-9", via="203.0.113.1"),
        ],
    )
    sysctl.write(INNER, SYSCTLS)


def by_ip() -> None:
    """The same by ``ip netns add``, two ``ip -batch`` and the same files."""
    subprocess.run(["ip", "netns", "add", INNER], check=True)
    for namespace, batch in ((HOST, ON_HOST), (INNER, INSIDE)):
        subprocess.run(["ip", "-n", namespace, "-batch", "-"], input=batch, text=True, check=True)
    sysctl.write(INNER, SYSCTLS)


def cleared() -> None:
    """Nothing of the network is left, as far as the kernel shows it."""
    links.change(HOST, [links.delete_link(name).even_if_gone() for name in ("vnetg7", "vnetpn7.9", "breth1-7")])
    namespaces.delete(INNER)


def timed_ms(way: Callable[[], None]) -> float:
    """How long it takes, clearing not counted."""
    started = time.perf_counter()
    way()
    took = time.perf_counter() - started
    cleared()
    return took * 1000


def main(rounds: int) -> None:
    """Prints best and median of both, and how many times the one is as fast as the other."""
    namespaces.create(HOST)
    try:
        pairs = [(timed_ms(by_codec), timed_ms(by_ip)) for _ in range(rounds)]
    finally:
        cleared()
        namespaces.delete(HOST)
    best = [min(column) for column in zip(*pairs, strict=True)]
    median = [statistics.median(column) for column in zip(*pairs, strict=True)]
    rows = [f"{'one network':14}{'codec ms':>10}{'ip ms':>10}{'ratio':>8}"]
    for name, (ours, theirs) in (("best", best), ("median", median)):
        rows.append(f"{name:14}{ours:10.1f}{theirs:10.1f}{theirs / ours:8.1f}")
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
