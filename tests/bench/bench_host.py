"""Time work on one host against other tools that do the same, in turns. Needs root; nothing is asserted.

PYTHONPATH=internal:tests python tests/bench/bench_host.py [rounds]
"""

from __future__ import annotations

import itertools
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from guestbed.dhcp import message
from kernel.agent_host import AgentHost, Client, agent_host
from netloom.guest.dhcp import MessageType
from netloom.wire import Reply

NS = "cs-net-204"
MAC = "02:01:00:cc:00:03"  # of payload 032, as its address is
VMS = 500
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


# ----------------------------------------------------------------------------------------------------------------- DHCP


@contextmanager
def dnsmasq(host: AgentHost) -> Iterator[None]:
    """A dnsmasq with the same number of VMs, on a second link of the same VM."""
    host.run("ip", "netns", "add", "dnsmasq")
    host.ip("link", "add", "d0", "netns", "dnsmasq", "type", "veth", "peer", "name", "eth1", "netns", "vm")
    host.ip("-n", "dnsmasq", "addr", "add", "10.10.1.1/24", "dev", "d0")
    host.ip("-n", "dnsmasq", "link", "set", "d0", "up")
    host.ip("-n", "vm", "link", "set", "eth1", "up")
    known = [f"{MAC},10.10.1.45", *(f"02:02:00:00:{at // 256:02x}:{at % 256:02x}" for at in range(VMS))]
    host.path("/run/known").write_text("\n".join(known) + "\n")
    words = "--port=0 --bind-interfaces --interface=d0 --dhcp-range=10.10.1.0,static --dhcp-hostsfile=/run/known"
    files = "--conf-file=/dev/null --leasefile-ro --dhcp-authoritative --no-ping --user=root --pid-file=/run/d.pid"
    host.run("dnsmasq", *words.split(), *files.split(), namespace="dnsmasq")
    try:
        yield
    finally:
        host.run("kill", host.path("/run/d.pid").read_text().strip())
        host.run("ip", "netns", "del", "dnsmasq")


def asker(host: AgentHost, link: str) -> socket.socket:
    with host.within("vm"):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, link.encode())
    client.bind(("", 68))
    client.settimeout(5)
    return client


def bench_dhcp(host: AgentHost, client: Client, rounds: int) -> Iterator[tuple[float, float]]:
    """The time from a DISCOVER to its OFFER with 500 configured VMs, against a dnsmasq with the same number."""
    nic = {"dns": "192.0.2.53", "default_nic": "true", "extension_ip": "10.10.1.1"}
    vms = [
        {
            "ip": f"10.10.{2 + at // 250}.{at % 250}",
            "mac": f"02:02:00:00:{at // 256:02x}:{at % 256:02x}",
            "nic_uuid": f"00000000-0000-0000-0000-{at:012}",
            "hostname": f"vm-{at}",
            "device_id": "0",
            "default_nic": "true",
            "vm_data": [],
        }
        for at in range(VMS)
    ]
    data = {"dhcp_enabled": True, "dns_enabled": False, "userdata_enabled": False, "vms": vms}
    wide = {"cidr": "10.10.0.0/20"}
    done(client.call("110", "restore-network", **nic, **wide, restore_data=data))
    done(client.call("032", "add-dhcp-entry", **wide))
    host.plug("vm", "breth1-1204", MAC)
    discover = message(MessageType.DISCOVER, MAC, flags=0x8000)
    with dnsmasq(host), closing(asker(host, "eth0")) as ours, closing(asker(host, "eth1")) as theirs:

        def offered(by: socket.socket) -> None:
            by.sendto(discover, ("255.255.255.255", 67))
            by.recv(2000)

        offered(ours)
        offered(theirs)
        for _ in range(rounds * 10):
            yield timed_ms(lambda: offered(ours)), timed_ms(lambda: offered(theirs))


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
    f"DHCP offer, {VMS} VMs, dnsmasq": bench_dhcp,
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
