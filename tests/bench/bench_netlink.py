"""Time one network made by our codec, by ``ip -batch`` and by pyroute2, in turns, and the import of both libraries.

Needs root. Run it by hand; nothing is asserted.

PYTHONPATH=internal:tests python tests/bench/bench_netlink.py [rounds]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from pyroute2 import NetNS

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
    """Make the network as the agent does: three datagrams, and the sysctls as files."""
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
    """Make the same network by ``ip netns add``, two ``ip -batch`` and the same files."""
    subprocess.run(["ip", "netns", "add", INNER], check=True)
    for namespace, batch in ((HOST, ON_HOST), (INNER, INSIDE)):
        subprocess.run(["ip", "-n", namespace, "-batch", "-"], input=batch, text=True, check=True)
    sysctl.write(INNER, SYSCTLS)


def by_pyroute2() -> None:
    """Make the same network by pyroute2, one request after the other, and the same files."""
    namespaces.create(INNER)
    with NetNS(HOST) as host:
        host.link("add", ifname="breth1-7", kind="bridge", br_stp_state=0, br_forward_delay=0, br_mcast_snooping=0)
        (bridge,) = host.link_lookup(ifname="breth1-7")
        host.link("set", index=bridge, ifalias="netloom", state="up")
        for outer, inner, mac in (
            ("vnetg7", "gst-7", "0a:00:00:00:00:07"),
            ("vnetpn7.9", "pub-9", "0a:00:00:00:00:09"),
        ):
            peer = {"ifname": inner, "address": mac, "net_ns_fd": INNER}
            host.link("add", ifname=outer, kind="veth", peer=peer)
            (index,) = host.link_lookup(ifname=outer)
            host.link("set", index=index, ifalias="netloom", master=bridge, state="up")
    with NetNS(INNER) as inside:
        of = {name: inside.link_lookup(ifname=name)[0] for name in ("lo", "gst-7", "pub-9")}
        for index in of.values():
            inside.link("set", index=index, state="up")
        inside.addr("add", index=of["gst-7"], address="10.7.0.1", prefixlen=24)
        inside.addr("add", index=of["pub-9"], address="203.0.113.7", prefixlen=24)
        inside.route("add", dst="default", gateway="203.0.113.1", oif=of["pub-9"])
    sysctl.write(INNER, SYSCTLS)


def import_ms(module: str) -> tuple[float, int]:
    """The time in ms that the import takes in a new interpreter (best of five), and the number of modules it loads."""
    code = (
        "import sys, time; had = len(sys.modules); began = time.perf_counter(); "
        f"import {module}; print((time.perf_counter() - began) * 1000, len(sys.modules) - had)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(5)]
    took, count = min((float(run.stdout.split()[0]), int(run.stdout.split()[1])) for run in runs)
    return took, count


def cleared() -> None:
    """Remove the network."""
    links.change(HOST, [links.delete_link(name).even_if_gone() for name in ("vnetg7", "vnetpn7.9", "breth1-7")])
    namespaces.delete(INNER)


def timed_ms(way: Callable[[], None]) -> float:
    """The time that ``way`` takes, without the removal of its network."""
    started = time.perf_counter()
    way()
    took = time.perf_counter() - started
    cleared()
    return took * 1000


def main(rounds: int) -> None:
    """Print the best and median time of the three ways with their ratio to our codec, then the imports."""
    ways = {"codec": by_codec, "ip": by_ip, "pyroute2": by_pyroute2}
    namespaces.create(HOST)
    try:
        took = [[timed_ms(way) for way in ways.values()] for _ in range(rounds)]
    finally:
        cleared()
        namespaces.delete(HOST)
    lines = [f"{'one network':14}" + "".join(f"{name + ' ms':>14}" for name in ways)]
    for name, of in (("best", min), ("median", statistics.median)):
        columns = [of(column) for column in zip(*took, strict=True)]
        lines.append(f"{name:14}" + "".join(f"{ms:14.1f}" for ms in columns))
        lines.append(f"{'  ratio':14}" + "".join(f"{ms / columns[0]:14.1f}" for ms in columns))
    for module in ("netloom.agent.kernel.watch", "pyroute2"):
        ms, count = import_ms(module)
        lines.append(f"import {module}: {ms:.0f} ms, {count} modules")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 50)
