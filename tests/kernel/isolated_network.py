"""Network 204 of the payload files on an :class:`AgentHost`: the calls that build it, its VMs, and what the kernel has.

``live`` builds the network with its addresses and rules, ``live_with_vm`` with one VM that has guest services.
"""

from __future__ import annotations

import json

from kernel.agent_host import AgentHost, done

FIRST_LIFE = [
    ("020", "implement-network"),
    ("021", "assign-ip"),
    ("022", "apply-fw-rules"),
    ("050", "assign-ip"),
    ("053", "add-port-forward"),
    ("057", "assign-ip"),
    ("058", "add-static-nat"),
    ("070", "apply-fw-rules"),
]
NS = "cs-net-204"


SERVER = "10.10.1.1"
BRIDGE = "breth1-1204"
WEB, WEB_MAC, WEB_IP = "web", "02:01:00:cc:00:03", "10.10.1.45"
DB, DB_MAC, DB_IP = "db", "02:01:00:cc:00:04", "10.10.1.162"
DB_NIC = {
    "nic_id": "5102",
    "nic_uuid": "6b7c2a10-0000-4000-8000-000000005102",
    "mac": DB_MAC,
    "ip": DB_IP,
    "hostname": "win-db-1",
}
DEPLOY = [
    ("030", "prepare-nic"),
    ("031", "config-dhcp-subnet"),
    ("032", "add-dhcp-entry"),
    ("033", "config-dns-subnet"),
    ("034", "add-dns-entry"),
    ("035", "save-vm-data"),
]
FILE = "/var/lib/netloom/scopes/net-204.json"
PASSWORD = "FAKE-pass-4711"
BRIEFLY = ("--max-time", "1")
UDHCPC = """#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr replace "$ip/$mask" dev "$interface"
[ -z "$router" ] || ip route replace default via "$router"
echo "ip=$ip router=$router dns=$(echo $dns | tr ' ' ,) domain=$domain hostname=$hostname lease=$lease server=$serverid"
"""


def live(host: AgentHost) -> None:
    """Build the network: addresses, a port forward, a static NAT and firewall rules."""
    with host.client() as client:
        for fixture, command in FIRST_LIFE:
            done(client.call(fixture, command))


def addresses(host: AgentHost) -> set[str]:
    """All addresses of the namespace, with prefix length, without those of lo."""
    found = json.loads(host.run("ip", "-j", "addr", namespace=NS))
    return {f"{it['local']}/{it['prefixlen']}" for link in found for it in link["addr_info"] if link["ifname"] != "lo"}


def snapshot(host: AgentHost) -> list[object]:
    """The kernel objects of the network, without link numbers, which change when a link is made again.

    The word linkdown of a route is left out: the kernel sets and clears it a moment after the link has changed.
    """
    return [
        {name: (it.get("master"), "ifalias" in it, "UP" in it["flags"]) for name, it in host.links().items()},
        sorted(host.run("nft", "-s", "list", "ruleset").splitlines()),
        NS in host.run("ip", "netns", "list")
        and [
            {name: (it["address"], "UP" in it["flags"]) for name, it in host.links(NS).items()},
            addresses(host),
            sorted(routes(host).splitlines()),
            host.run("ip", "rule", namespace=NS),
            sorted(host.run("nft", "-s", "list", "ruleset", namespace=NS).splitlines()),
            host.run("sysctl", "net.ipv4.conf.pub-101", namespace=NS, check=False),
        ],
    ]


def routes(host: AgentHost, table: str = "all") -> str:
    """The routes of the namespace as text, without the word linkdown."""
    return host.run("ip", "route", "show", "table", table, namespace=NS).replace(" linkdown", "")


def live_with_vm(host: AgentHost) -> None:
    """Build the network, deploy the VM ``web`` and connect it to the guest bridge."""
    with host.client() as client:
        for fixture, command in FIRST_LIFE[:3] + DEPLOY:
            done(client.call(fixture, command))
    host.plug(WEB, BRIDGE, WEB_MAC)
    script = host.path("/run/udhcpc")
    script.write_text(UDHCPC)
    script.chmod(0o755)


def lease(host: AgentHost, vm: str, *, check: bool = True) -> dict[str, str]:
    """Run busybox's DHCP client with a try each second; returns the values of its lease, or nothing when it got none.

    ``check``: a lease must come. Without it the client tries twice.
    """
    tries = "20" if check else "2"
    words = ["busybox", "udhcpc", "-i", "eth0", "-f", "-q", "-n", "-t", tries, "-T", "1", "-s", "/run/udhcpc"]
    said = host.run(*words, "-x", "hostname:x", namespace=vm, check=check)
    line = next((line for line in said.splitlines() if line.startswith("ip=")), "")
    return dict(word.partition("=")[::2] for word in line.split(" ") if "=" in word)


def get(host: AgentHost, vm: str, path: str, *more: str, port: int = 80) -> str:
    """GET a path from the metadata server with curl; empty when it fails. ``more`` are options of curl.

    A test that expects nothing gives ``*BRIEFLY``.
    """
    words = ["curl", "-s", "--fail", "--max-time", "20", *more, f"http://{SERVER}:{port}{path}"]
    return host.run(*words, namespace=vm, check=False)


def lookup(host: AgentHost, vm: str, name: str) -> str:
    """Ask the network's resolver for a name or an address; returns the answers, separated by spaces."""
    said = host.run("busybox", "nslookup", name, SERVER, namespace=vm, check=False)
    answers = said.partition("\n\n")[2]
    return " ".join(line.rpartition(" ")[2] for line in answers.splitlines() if "Address" in line or "name =" in line)


def running(host: AgentHost) -> dict[str, set[int]]:
    """The process ids of dnsmasq, haproxy and the guest process (``--control``)."""
    return {word: set(host.processes(word)) for word in ("dnsmasq", "haproxy", "--control")}


def kernel(host: AgentHost) -> tuple[str, ...]:
    """Links, addresses, routes, rules and ruleset of the namespace as text, without counters and handles.

    What the kernel changes a moment after a link is set up or down is left out: the operational state, and linkdown.
    """
    links = [line.split() for line in host.run("ip", "-br", "link", namespace=NS).splitlines()]
    return (
        "\n".join(f"{name} {mac} {'UP' in flags.strip('<>').split(',')}" for name, _, mac, flags in links),
        "\n".join(sorted(addresses(host))),
        routes(host),
        host.run("ip", "rule", namespace=NS),
        host.run("nft", "-s", "list", "ruleset", namespace=NS),
    )
