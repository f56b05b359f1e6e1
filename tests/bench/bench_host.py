"""Time work on one host against other tools that do the same, in turns. Needs root; nothing is asserted.

PYTHONPATH=internal:tests python tests/bench/bench_host.py [rounds]
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from kernel.agent_host import AgentHost, Client, agent_host
from netloom.wire import Reply

NS = "cs-net-204"
NETWORKS = 20
PUBLIC = {"public_vlan": "101", "public_cidr": "198.51.100.0/24", "public_gateway": "198.51.100.254"}


def timed_ms(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return (time.perf_counter() - started) * 1000


def done(reply: Reply) -> None:
    if reply.status:
        raise SystemExit(f"refused: {reply.error}")


# --------------------------------------------------------------------------------------------------------- the firewall


def rules(number: int) -> dict[str, Any]:
    """``number`` ports, each open to one prefix."""
    listed = [
        {
            "id": at,
            "type": "ingress",
            "protocol": "tcp",
            "portStart": 1000 + at,
            "publicIp": "203.0.113.20",
            "sourceCidrs": [f"10.{at // 250}.{at % 250}.0/24"],
        }
        for at in range(number)
    ]
    return {"default_egress_allow": True, "rules": listed}


def bench_firewall(host: AgentHost, client: Client, rounds: int) -> Iterator[tuple[float, float]]:
    """Add or remove one rule among a thousand, against ``nft -f`` with the resulting ruleset."""
    host.run("ip", "netns", "add", "yardstick")
    counts = itertools.cycle((1001, 1000))
    file = host.path("/run/yardstick.nft")
    for _ in range(rounds):
        asked = rules(next(counts))
        ours = timed_ms(lambda: done(client.call("070", "apply-fw-rules", fw_rules=asked)))  # noqa: B023
        text = host.run("nft", "list", "table", "inet", "netloom", namespace=NS)
        file.write_text(f"table inet netloom {{}}\ndelete table inet netloom\n{text}")
        yield ours, timed_ms(lambda: host.run("nft", "-f", "/run/yardstick.nft", namespace="yardstick"))
    host.run("ip", "netns", "del", "yardstick")


# -------------------------------------------------------------------------------------------------------- the power cut

ON_HOST = """
link add name ybr{at} type bridge stp_state 0 forward_delay 0
link set ybr{at} alias netloom up
link add name yg{at} type veth peer name gst netns {netns}
link set yg{at} alias netloom master ybr{at} up
link add name yp{at} type veth peer name pub netns {netns}
link set yp{at} alias netloom master breth2-101 up
"""
INSIDE = """
link set lo up
link set gst up
link set pub up
address add 10.20.{at}.1/24 dev gst
address add 198.51.100.{at}/24 dev pub
route add default via 198.51.100.254
route add default via 198.51.100.254 table 20001
rule add fwmark 1/0xffff priority 20001 table 20001
"""
SYSCTLS = ("net.ipv4.ip_forward=1", "net.ipv4.conf.all.rp_filter=2", "net.ipv4.conf.gst.arp_ignore=1")


def by_programs(host: AgentHost) -> None:
    """Run five programs for each network. The agent does more: it reads the host first and sets more link options."""
    for at in range(NETWORKS):
        netns = f"yardstick-{at}"
        host.run("ip", "netns", "add", netns)
        for namespace, batch in (("", ON_HOST), (netns, INSIDE)):
            file = host.path("/run/yardstick.ip")
            file.write_text(batch.format(at=at, netns=netns))
            host.ip("-batch", "/run/yardstick.ip", namespace=namespace)
        host.run("sysctl", "-qw", *SYSCTLS, namespace=netns)
        host.run("nft", "-f", "/run/yardstick.nft", namespace=netns)


def bench_power_cut(host: AgentHost, client: Client, rounds: int) -> Iterator[tuple[float, float]]:
    """Start an agent that builds 20 networks on an empty host; its own start is included."""
    for at in range(NETWORKS):
        fields = {"network_id": str(3000 + at), "vlan": "1377", "cidr": f"10.20.{at}.0/24", "gateway": f"10.20.{at}.1"}
        done(client.call("020", "implement-network", **fields, extension_ip=f"10.20.{at}.1"))
        done(client.call("021", "assign-ip", **fields, **PUBLIC, public_ip=f"198.51.100.{1 + at}"))
    ruleset = host.run("nft", "list", "table", "inet", "netloom", namespace="cs-net-3000")
    host.path("/run/yardstick.nft").write_text(ruleset)
    for _ in range(max(2, rounds // 5)):
        host.kill()
        for at in range(NETWORKS):
            host.run("ip", "netns", "del", f"cs-net-{3000 + at}")
        ours = timed_ms(host.start)
        yield ours, timed_ms(lambda: by_programs(host))
        for at in range(NETWORKS):
            host.run("ip", "netns", "del", f"yardstick-{at}")
            host.ip("link", "del", f"ybr{at}")


BENCHES = {
    "a firewall of 1,000 rules, nft -f": bench_firewall,
    f"power cut, {NETWORKS} networks, programs": bench_power_cut,
}


def main(rounds: int) -> None:
    """Print the best and median time of both sides of each measurement, and their ratio."""
    head = f"{'':36}{'best ms':>10}{'of it':>10}{'median ms':>11}{'of it':>10}{'ratio':>8}\n"
    sys.stdout.write(head)
    for name, bench in BENCHES.items():
        with agent_host("eth1.1204", "eth1.1377", "eth2.101") as host:
            host.start()
            with host.client() as client:
                for fixture, command in (("020", "implement-network"), ("021", "assign-ip")):
                    done(client.call(fixture, command))
                pairs = list(bench(host, client, rounds))
        ours, theirs = zip(*pairs, strict=True)
        middle = statistics.median(ours), statistics.median(theirs)
        best = f"{min(ours):10.2f}{min(theirs):10.2f}"
        sys.stdout.write(f"{name:36}{best}{middle[0]:11.2f}{middle[1]:10.2f}{middle[0] / middle[1]:8.2f}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
