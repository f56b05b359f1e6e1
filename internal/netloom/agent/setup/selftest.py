"""Test whether this host can carry networks, by doing what networks need instead of reading version numbers.

A child process enters a scratch host: network and mount namespaces of its own. There it builds networks as the agent
does, replaces their rules, and sends a packet through. Everything disappears with that process.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec

from netloom import names
from netloom.agent import packages
from netloom.agent.host import lease
from netloom.agent.host.converge import KernelHost, load_modules
from netloom.agent.kernel import conntrack, links, namespaces, neighbours
from netloom.agent.kernel import nft as kernel_nft
from netloom.agent.kernel.nft import Nft, load_library
from netloom.agent.packages import Family
from netloom.agent.setup import bridge_test
from netloom.errors import HostRefused, NetloomError, one_line
from netloom.netobjects import Neighbour
from netloom.render.scope import render
from netloom.state import (
    AclItem,
    Backend,
    Firewall,
    FirewallRule,
    LbRule,
    Network,
    Outside6,
    Pbr,
    PbrRoute,
    PbrRule,
    PbrTable,
    PortForward,
    Ports,
    PublicIp,
    Scope,
    StaticNat,
    Uplinks,
)

TESTS_S_MAX = 60.0
_PACKET_S_MAX = 5.0
_PROGRAMS = ("nft", "dnsmasq", "haproxy")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one test. ``needed``: no network works without it; else only networks that use the feature need it.

    The field names are the keys of ``netloom agent selftest --json``.
    """

    what: str
    ok: bool
    needed: bool
    says: str = ""  # the error, and its consequence
    remedy: str = ""


def require() -> None:
    """Raise HostRefused, with all needed tests that failed, if there are any.

    The remedy has all missing packages, also those that only some networks need: one command installs them.
    """
    found = _without_the_host()
    missing = [it for it in found if it.needed and not it.ok]
    if missing:
        absent = [it.what for it in found if it.what in _PROGRAMS and not it.ok]
        others = [it for it in found if it.what in absent and not it.needed]  # guard: all-packages-are-named-at-once
        what = "; ".join(f"{it.what}: {it.says}" for it in [*missing, *others])
        install = [packages.install(*absent)] if absent else []
        remedies = dict.fromkeys(install + [it.remedy for it in missing if it.remedy and it.what not in absent])
        raise HostRefused(f"this host cannot carry networks: {what}", hint=", ".join(remedies))


def run() -> list[Finding]:
    """Run all tests, each after those that it depends on. Raises HostRefused without root."""
    found = _without_the_host()
    return found if any(it.needed and not it.ok for it in found) else [*found, _host_firewall()]


def _without_the_host() -> list[Finding]:
    """The tests that change nothing outside namespaces of their own."""
    if os.geteuid() != 0:
        raise HostRefused("the selftest creates network namespaces and needs root")
    found, tests = _programs(packages.family()), _in_a_scratch_host()
    if not all(it.ok for it in tests if it.what in _WITH_RULES):
        nft, linux = kernel_nft.version(), os.uname().release
        tests = [explained(it, nft, linux) for it in tests]
    return [*found, *tests]


def _host_firewall() -> Finding:
    what = "bridges behind the host's firewall"
    try:
        found = bridge_test.run()
    except (NetloomError, OSError) as error:
        says, hint = one_line(str(error), 400), getattr(error, "hint", "")
        return Finding(what=what, ok=False, needed=False, says=says, remedy=hint)
    return Finding(what=what, ok=not found.dropped, needed=False, says=found.says, remedy=found.remedy)


# ------------------------------------------------------------------------------------------------------------ programs


def _programs(family: Family) -> list[Finding]:
    nft = load_library() is not None or packages.is_installed("nft")
    return [
        _program("nft", family, nft, True, "neither libnftables nor the program nft is installed"),
        _program("dnsmasq", family, packages.is_installed("dnsmasq"), False, "networks with DNS have no resolver"),
        _program("haproxy", family, packages.is_installed("haproxy"), False, "TCP is not load-balanced"),
    ]


def _program(name: str, family: Family, ok: bool, needed: bool, says: str) -> Finding:
    remedy = packages.install(name, of=family)
    return Finding(what=name, ok=ok, needed=needed, says="" if ok else says, remedy="" if ok else remedy)


# ---------------------------------------------------------------------------------------------------------- versions

NFT_OLDEST, LINUX_OLDEST = (0, 9, 8), (5, 10)  # known to work; older ones lack something that rulesets use

# The tests that load rules, by name.
_NF_TABLES, _RULESETS, _IP6 = "nf_tables", "networks and their rulesets", "IPv6"
_WITH_RULES = (_NF_TABLES, f"{_NF_TABLES}, netdev family", f"{_NF_TABLES}, bridge family", _RULESETS, _IP6)

# Words of a refused line, and what the kernel lacks if it refuses them.
_MODULES = (
    ("ct helper", "nf_conntrack_<helper>"),
    ("ct count", "nft_connlimit"),
    ("numgen", "nft_numgen"),
    ("jhash", "nft_hash"),
    ("fib ", "nft_fib_inet"),
    ("limit rate", "nft_limit"),
    ("reject", "nft_reject_inet"),
    ("type nat", "nft_chain_nat"),
    ("dnat ", "nft_nat"),
    ("snat ", "nft_nat"),
    ("ct ", "nft_ct"),
)


def explained(found: Finding, nft: tuple[int, ...], linux: str) -> Finding:
    """A failed test of rulesets with its likely cause: the version of nftables or of Linux, or a missing module.

    ``nft`` and ``linux`` are the versions of this host. A version alone refuses no host: distributions add features to
    older versions.
    """
    if found.ok or found.what not in _WITH_RULES:
        return found
    if nft and nft < NFT_OLDEST:  # guard: an-old-nft-is-named
        product, here, oldest, verb = "nftables", _dotted(nft), _dotted(NFT_OLDEST), "install"
    elif _numbers(linux) < LINUX_OLDEST:
        product, here, oldest, verb = "Linux", linux, _dotted(LINUX_OLDEST), "boot"
    else:
        modules = [module for word, module in _MODULES if word in found.says]
        likely = f"load the module {modules[0]}, or boot a kernel that has it" if modules else ""
        return msgspec.structs.replace(found, remedy=found.remedy or likely)
    says = f"{product} {here} is too old, the oldest that works is {oldest} ({found.says})"
    return msgspec.structs.replace(found, says=says, remedy=f"{verb} {product} {oldest} or later")


def _numbers(release: str) -> tuple[int, ...]:
    """The first two numbers of a kernel's release, ``5.10.0-32-amd64``."""
    return tuple(int(it) for it in re.findall(r"\d+", release)[:2])


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


# --------------------------------------------------------------------------------------------------- the scratch host

_NIC = "eth1"
_VM_MAC, _VM_IP = "02:00:00:00:00:45", "10.1.1.45"
_GATEWAY_MAC, _GATEWAY_IP, _WORLD_IP = "02:00:00:00:00:01", "203.0.113.1", "198.51.100.9"
_OTHER_GATEWAY_IP = "203.0.113.9"
_OWNER = "selftest"
_TCP_SAVE_SYN, _WITH_ETHERNET_HEADER = 27, 2  # linux/tcp.h


def _in_a_scratch_host() -> list[Finding]:
    """Run the tests in a child process. It reports each result at once, so that a crash loses only the current one."""
    load_modules()
    results_read, results_write = os.pipe()
    child = os.fork()
    if not child:
        _run_in_scratch_host(results_write)
    os.close(results_write)
    try:
        text = _read_all(results_read, time.monotonic() + TESTS_S_MAX)
    finally:
        os.close(results_read)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    found = [msgspec.json.decode(line, type=Finding) for line in text.splitlines() if line.endswith(b"}")]
    if len(found) < len(_TESTS) and (not found or found[-1].ok or not found[-1].needed):
        what, _, needed, _ = _TESTS[len(found)]
        found.append(Finding(what=what, ok=False, needed=needed, says="the test crashed or hung"))
    return found


def _read_all(fd: int, until: float) -> bytes:
    text = b""
    while select.select([fd], [], [], max(0.0, until - time.monotonic()))[0]:
        data = os.read(fd, 1 << 16)
        if not data:
            break
        text += data
    return text


def _run_in_scratch_host(results: int) -> None:
    try:
        host = _ScratchHost()
        for what, test, needed, remedy in _TESTS:
            says = ""
            try:
                test(host)
            except (NetloomError, OSError) as error:
                says = one_line(str(error), 400)
            finding = Finding(what=what, ok=not says, needed=needed, says=says, remedy=remedy if says else "")
            os.write(results, msgspec.json.encode(finding) + b"\n")
            if says and needed:  # the following tests depend on it
                break
    finally:
        os._exit(0)


class _ScratchHost:
    """The state that the tests share."""

    def __init__(self) -> None:
        self.host = KernelHost()
        self.scope = _isolated()


def _make_scratch(host: _ScratchHost) -> None:
    namespaces.enter_scratch()
    namespaces.prepare()


def _make_links(host: _ScratchHost) -> None:
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for link, other in (
            (_NIC, "nic-x"),
            (f"{_NIC}.1204", "vm"),
            (f"{_NIC}.1301", "tier"),
            (f"{_NIC}.101", "world"),
        ):
            links.change(None, [links.make_veth(link, "", other, "", 0, here), links.set_up(link), links.set_up(other)])
    finally:
        os.close(here)


def _make_bridge(host: _ScratchHost) -> None:
    links.change(None, [links.make_bridge("trial"), links.delete_link("trial")])


def _load_table(family: str) -> Callable[[_ScratchHost], None]:
    def load(host: _ScratchHost) -> None:
        hook = "ingress device nic-x" if family == "netdev" else "prerouting"
        with Nft(None) as nft:
            chain = f"chain c {{ type filter hook {hook} priority 0; policy accept; }}"
            nft.run(f"table {family} trial {{\n{chain}\n}}\nadd rule {family} trial c counter")
            nft.run(f"delete table {family} trial")

    return load


def _track(host: _ScratchHost) -> None:
    conntrack.dump(None)


def _build(host: _ScratchHost) -> None:
    """Build a network with simple rules, replace them by all kinds of rules and back; then build a VPC."""
    plain = msgspec.structs.replace(
        host.scope, port_forwards={}, static_nats={}, lb_rules={}, pbr=Pbr(), networks=_plain(host.scope)
    )
    known = None
    for scope in (plain, host.scope, plain, host.scope):
        want = render(scope)
        host.host.converge(scope.scope_id, want, known)
        known = want.ruleset
    vpc = _vpc()
    host.host.converge(vpc.scope_id, render(vpc), None)


def _send_a_packet(host: _ScratchHost) -> None:
    """Send a packet from a VM to an outside host, and the answer back; both are translated by NAT."""
    namespace = names.namespace(host.scope.scope_id)
    to_device = names.mac(_OWNER, host.scope.scope_id, names.guest_link("204"))
    to_exit = names.mac(_OWNER, host.scope.scope_id, names.public_link("101"))
    gateway = Neighbour(link="pub-101", address=_GATEWAY_IP, mac=_GATEWAY_MAC)
    guest = Neighbour(link="gst-204", address=_VM_IP, mac=_VM_MAC)
    links.change(namespace, map(neighbours.replace_neighbour, (gateway, guest)))
    with _packets("vm") as vm, _packets("world") as world:
        request = _Datagram(_VM_IP, _WORLD_IP, 4000, 5353)
        out = _passes(vm, request.frame(_VM_MAC, to_device), world, lambda it: it.to == _WORLD_IP)
        if out.source != "203.0.113.20":
            raise HostRefused(f"a packet left with the source address {out.source} instead of 203.0.113.20")
        answer = _Datagram(out.to, out.source, out.to_port, out.source_port)
        back = _passes(world, answer.frame(_GATEWAY_MAC, to_exit), vm, lambda it: it.source == _WORLD_IP)
        if (back.to, back.to_port) != (request.source, request.source_port):
            raise HostRefused(f"the answer to a packet reached {back.to} instead of {request.source}")


def _revoke(host: _ScratchHost) -> None:
    """Mark and delete conntrack entries, as the agent does to end flows that are no longer allowed."""
    namespace = names.namespace(host.scope.scope_id)
    entries = conntrack.dump(namespace)
    conntrack.set_mark(namespace, entries, 1 << 31, 1 << 31)
    if not entries or conntrack.delete(namespace, entries) != len(entries):
        raise HostRefused(f"{len(entries)} conntrack entries, and they cannot be deleted")


def _keep_first_packet(host: _ScratchHost) -> None:
    """Keep the first packet of a connection: it proves to the guest process which VM connects (guest/peer.py)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        try:
            listener.setsockopt(socket.IPPROTO_TCP, _TCP_SAVE_SYN, _WITH_ETHERNET_HEADER)
        except OSError as error:
            raise HostRefused(
                f"the kernel does not keep a connection's first packet with its MAC address: {error}"
            ) from error


def _renew_a_lease(host: _ScratchHost) -> None:
    """Lengthen, shorten and end a lease; old kernels keep the timeout of an element that exists."""
    lease.guard({"trial": 1})
    for life_s in (5.0, 60.0, 20.0):
        lease.renew({1: life_s})
        left_s = lease.alive().get(1, 0.0)
        if not life_s - 4 < left_s < life_s:
            raise HostRefused(f"an element with a timeout of {life_s:.0f} s lives {left_s:.0f} s")
    lease.end([1])
    if lease.alive():
        raise HostRefused("an element with a timeout cannot be deleted")
    lease.release(["trial"])


def _build_with_ip6(host: _ScratchHost) -> None:
    for scope in (_with_ip6(host.scope), _with_ip6(_vpc())):
        host.host.converge(scope.scope_id, render(scope), None)


def _make_vlan(host: _ScratchHost) -> None:
    links.change(None, [links.make_vlan("trial.9", _NIC, 9)])


def _make_vxlan(host: _ScratchHost) -> None:
    links.change(None, [links.make_vxlan("vxlan9", _NIC, 9, names.vxlan_group(9), 10)])


_TESTS: tuple[tuple[str, Callable[[_ScratchHost], None], bool, str], ...] = (
    ("network namespaces", _make_scratch, True, "a kernel with CONFIG_NET_NS"),
    ("veth links", _make_links, True, "load the module veth"),
    ("bridges", _make_bridge, True, "load the module bridge"),
    (_NF_TABLES, _load_table("inet"), True, "load the module nf_tables"),
    (f"{_NF_TABLES}, netdev family", _load_table("netdev"), True, "a kernel with CONFIG_NF_TABLES_NETDEV"),
    (f"{_NF_TABLES}, bridge family", _load_table("bridge"), True, "a kernel with CONFIG_NF_TABLES_BRIDGE"),
    ("connection tracking", _track, True, "load the module nf_conntrack_netlink"),
    (_RULESETS, _build, True, ""),
    ("a packet through a network", _send_a_packet, True, ""),
    ("ending of flows", _revoke, True, ""),
    (
        "senders of requests",
        _keep_first_packet,
        False,
        "Linux 5.10; with an older kernel no DHCP, metadata and passwords",
    ),
    (_IP6, _build_with_ip6, False, "boot without ipv6.disable; only networks with IPv6 need it"),
    ("leases", _renew_a_lease, False, "Linux 5.10; with an older kernel this host cannot stand by for another one"),
    ("802.1Q", _make_vlan, False, "load the module 8021q; without it links <nic>.<vlan> must exist"),
    ("VXLAN", _make_vxlan, False, "load the module vxlan; only guest.isolation=vxlan needs it"),
)


# -------------------------------------------------------------------------------------------------------------- frames


class _Datagram(NamedTuple):
    """A UDP datagram without its optional checksum (RFC 768) in IPv4 (RFC 791) on Ethernet."""

    source: str
    to: str
    source_port: int
    to_port: int

    def frame(self, source_mac: str, to_mac: str) -> bytes:
        datagram = struct.pack("!4H", self.source_port, self.to_port, 8 + 4, 0) + b"ping"
        addresses = socket.inet_aton(self.source) + socket.inet_aton(self.to)
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(datagram), 1, 0, 64, socket.IPPROTO_UDP, 0) + addresses
        total = sum(struct.unpack("!10H", head))
        total = (total & 0xFFFF) + (total >> 16)
        checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
        head = head[:10] + struct.pack("!H", checksum) + head[12:]
        return bytes.fromhex((to_mac + source_mac).replace(":", "")) + b"\x08\x00" + head + datagram


def _read(frame: bytes) -> _Datagram | None:
    """The UDP datagram in a frame; None for any other frame."""
    if len(frame) < 42 or frame[12:14] != b"\x08\x00" or frame[14] != 0x45 or frame[23] != socket.IPPROTO_UDP:
        return None
    ports = struct.unpack("!2H", frame[34:38])
    return _Datagram(socket.inet_ntoa(frame[26:30]), socket.inet_ntoa(frame[30:34]), *ports)


@contextlib.contextmanager
def _packets(link: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003)) as sock:  # ETH_P_ALL
        sock.bind((link, 0))
        yield sock


def _passes(
    sender: socket.socket, frame: bytes, receiver: socket.socket, is_it: Callable[[_Datagram], bool]
) -> _Datagram:
    """Send ``frame`` until the receiver gets a datagram that ``is_it`` accepts, and return that datagram.

    It is sent every 0.2 s, because the links may still be coming up. Raises HostRefused after _PACKET_S_MAX seconds.
    """
    until = time.monotonic() + _PACKET_S_MAX
    again = 0.0
    while time.monotonic() < until:
        if time.monotonic() >= again:
            sender.send(frame)
            again = time.monotonic() + 0.2
        if select.select([receiver], [], [], 0.05)[0]:
            received, where = receiver.recvfrom(2048)
            datagram = _read(received)
            if datagram is not None and where[2] != socket.PACKET_OUTGOING and is_it(datagram):
                return datagram
    raise HostRefused(f"no packet came through within {_PACKET_S_MAX:.0f} s", hint="is forwarding or nftables limited?")


# -------------------------------------------------------------------------------------------------- the test networks


def _plain(scope: Scope) -> dict[str, Network]:
    return {key: msgspec.structs.replace(network, firewall=None) for key, network in scope.networks.items()}


def _isolated() -> Scope:
    """An isolated network with every kind of rule."""
    rules = (
        FirewallRule(rule_id=1, direction="ingress", protocol="tcp", ports=Ports(22, 90), public_ip="203.0.113.21"),
        FirewallRule(
            rule_id=2,
            direction="ingress",
            protocol="udp",
            ports=Ports(53, 53),
            public_ip="203.0.113.21",
            source_cidrs=("192.0.2.0/25", "198.51.100.0/24"),
        ),
        FirewallRule(
            rule_id=3, direction="ingress", protocol="icmp", icmp_type=8, icmp_code=0, public_ip="203.0.113.22"
        ),
        FirewallRule(rule_id=4, direction="ingress", protocol="all", public_ip="203.0.113.22"),
        FirewallRule(
            rule_id=5,
            direction="egress",
            protocol="tcp",
            ports=Ports(25, 25),
            source_cidrs=("10.1.1.0/24",),
            dest_cidrs=("192.0.2.0/24",),
        ),
        FirewallRule(rule_id=6, direction="egress", protocol="icmp", icmp_type=-1, icmp_code=-1),
    )
    network = Network(
        network_id="204",
        implemented=True,
        vlan="1204",
        cidr="10.1.1.0/24",
        gateway="10.1.1.1",
        extension_ip="10.1.1.1",
        dhcp=True,
        dns=True,
        firewall=Firewall(default_egress_allow=True, rules=rules),
    )

    def forward(public: Ports, private: Ports) -> PortForward:
        return PortForward(
            public_ip="203.0.113.21",
            protocol="tcp",
            public_ports=public,
            private_ip=_VM_IP,
            private_ports=private,
            network_id="204",
        )

    forwards = (
        forward(Ports(22, 22), Ports(2222, 2222)),
        forward(Ports(40, 45), Ports(40, 45)),
        forward(Ports(50, 52), Ports(60, 62)),
        forward(Ports(70, 72), Ports(80, 80)),
    )
    backends = (Backend(ip=_VM_IP, port=80), Backend(ip="10.1.1.46", port=80))
    balanced = (
        LbRule(rule_id=1, public_ip="203.0.113.21", public_port=81, protocol="tcp", algorithm="roundrobin"),
        LbRule(rule_id=2, public_ip="203.0.113.21", public_port=82, protocol="udp", algorithm="roundrobin"),
        LbRule(rule_id=3, public_ip="203.0.113.21", public_port=83, protocol="udp", algorithm="source"),
    )
    return Scope(
        scope_id="net-204",
        owner=_OWNER,
        uplinks=Uplinks(guest=_NIC, public=_NIC),
        networks={"204": network},
        public_ips={
            it.address: it
            for it in (_public_ip(20), _public_ip(21), _public_ip(22), _public_ip(23, gateway=_OTHER_GATEWAY_IP))
        },
        static_nats={"203.0.113.22": StaticNat(public_ip="203.0.113.22", private_ip="10.1.1.47", network_id="204")},
        port_forwards={it.key: it for it in forwards},
        lb_rules={str(it.rule_id): msgspec.structs.replace(it, backends=backends, network_id="204") for it in balanced},
        pbr=Pbr(
            tables=(PbrTable(number=100, name="office"),),
            routes=(PbrRoute(table=100, destination="192.0.2.0/24", link="pub-101", via=_OTHER_GATEWAY_IP),),
            rules=(PbrRule(priority=10000, table=100, source=f"{_VM_IP}/32"),),
        ),
    )


def _with_ip6(scope: Scope) -> Scope:
    """``scope`` with IPv6 and rules for it."""
    egress = FirewallRule(rule_id=7, direction="egress", protocol="tcp", dest_cidrs=("2001:db8:1::/48", "0.0.0.0/0"))
    ping = FirewallRule(rule_id=8, direction="egress", protocol="icmp", icmp_type=13)
    item = AclItem(number=9, action="allow", direction="ingress", protocol="tcp", cidrs=("2001:db8:7::/48",))
    icmp = AclItem(number=10, action="allow", direction="ingress", protocol="icmp")
    networks = {}
    for key, it in scope.networks.items():
        firewall = it.firewall and msgspec.structs.replace(it.firewall, rules=(*it.firewall.rules, egress, ping))
        acl = None if it.acl is None else (*it.acl, item, icmp)
        networks[key] = msgspec.structs.replace(
            it, ip6_cidr="2001:db8:50:1::/64", ip6_gateway="2001:db8:50:1::1", firewall=firewall, acl=acl
        )
    outside = Outside6(gateway="2001:db8:99::1", address="2001:db8:99::/64")
    return msgspec.structs.replace(scope, networks=networks, outside6=outside)


def _public_ip(last: int, *, gateway: str = _GATEWAY_IP) -> PublicIp:
    """A public address; 203.0.113.20 is the source NAT address. An address with another gateway is on another exit."""
    return PublicIp(
        address=f"203.0.113.{last}",
        vlan="101",
        gateway=gateway,
        cidr="203.0.113.0/24",
        exit=1 if gateway == _GATEWAY_IP else 2,
        source_nat=last == 20,
        network_id="204",
    )


def _vpc() -> Scope:
    """A VPC with one tier and its access control list."""
    acl = (
        AclItem(
            number=1, action="allow", direction="ingress", protocol="tcp", ports=Ports(22, 80), cidrs=("0.0.0.0/0",)
        ),
        AclItem(number=2, action="deny", direction="ingress", cidrs=("192.0.2.0/24",)),
        AclItem(number=3, action="allow", direction="egress", protocol="icmp", icmp_type=8, icmp_code=0),
    )
    tier = Network(
        network_id="301",
        implemented=True,
        vlan="1301",
        cidr="10.2.1.0/24",
        gateway="10.2.1.1",
        extension_ip="10.2.1.1",
        acl=acl,
    )
    address = PublicIp(
        address="203.0.113.30", vlan="101", gateway=_GATEWAY_IP, cidr="203.0.113.0/24", exit=1, source_nat=True
    )
    return Scope(
        scope_id="vpc-7",
        owner=_OWNER,
        uplinks=Uplinks(guest=_NIC, public=_NIC),
        vpc_implemented=True,
        vpc_cidr="10.2.0.0/16",
        networks={"301": tier},
        public_ips={address.address: address},
    )
