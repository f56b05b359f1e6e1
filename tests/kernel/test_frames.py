"""Frames of a VM that are not ordinary data of its segment: they reach no socket of the host, and do not leave."""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import socket
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from kernel.agent_host import AgentHost, agent_host, done, wait_until
from kernel.raw_frames import VM, VM_MAC, checksum, frame, received, send, wire
from netloom.agent.host.frames import guard
from netloom.agent.host.observe_nft import guarded_bridges

VM_IP = "10.10.1.45"
HOST_IP, HOST_IP6, PORT = "198.51.100.9", "2001:db8:f::9", 4711
MANAGEMENT = "192.0.2.77/24"
RESERVED = [f"0180c20000{at:02x}" for at in range(16)]
ARP, IP, IP6 = 0x0806, 0x0800, 0x86DD


@pytest.fixture
def host() -> Iterator[AgentHost]:
    with agent_host() as it:
        it.start()
        yield it


def build(host: AgentHost, vlan: str = "1204") -> str:
    """Network 204 with a VM, on a VLAN or untagged; returns its bridge."""
    done(host.call("020", "implement-network", vlan=vlan))
    bridge = "breth1-1204" if vlan == "1204" else "breth1-0"
    host.plug(VM, bridge, VM_MAC, f"{VM_IP}/24")
    return bridge


def build_on(host: AgentHost, owner: str) -> tuple[str, str]:
    """Network 204 with a VM on a bridge that somebody else made; returns the bridge and its uplink.

    ``agent``: CloudStack's KVM agent, for VLAN 1204. ``operator``: an untagged bridge with the management address.
    """
    bridge, uplink = ("breth1-1204", "eth1.1204") if owner == "agent" else ("cloudbr0", "eth1")
    host.ip("link", "add", bridge, "type", "bridge")
    host.ip("link", "set", uplink, "master", bridge, "up")
    if owner == "operator":
        host.ip("link", "set", "eth1-x", "up")
        host.ip("addr", "add", MANAGEMENT, "dev", bridge)
    host.ip("link", "set", bridge, "up")
    done(host.call("020", "implement-network", vlan="1204" if owner == "agent" else "untagged"))
    host.plug(VM, bridge, VM_MAC, f"{VM_IP}/24")
    wait_until(lambda: f"from-tap-{VM}" in guards(host))
    wait_until(lambda: forwards(host, f"tap-{VM}", uplink))
    return bridge, uplink


def without_repairs(host: AgentHost) -> None:
    """Stop the agent, which loads its tables again when a port changes. A signal takes effect later."""
    assert host.agent is not None
    host.agent.send_signal(signal.SIGSTOP)
    threads = Path(f"/proc/{host.agent.pid}/task")
    wait_until(lambda: all(state_of(it) == "T" for it in threads.iterdir()))


def state_of(thread: Path) -> str:
    return (thread / "stat").read_text().rpartition(")")[2].split()[0]


def forwards(host: AgentHost, *ports: str) -> bool:
    """Whether the bridge of each port forwards its frames; it does soon after the link has a carrier."""
    links = host.links()
    return all(links[it]["linkinfo"]["info_slave_data"]["state"] == "forwarding" for it in ports)


def guards(host: AgentHost) -> str:
    """The two tables as nft lists them; empty without a guard."""
    return host.run("nft", "list", "ruleset")


# ----------------------------------------------------------------------------------------------------------- frames


def udp(port: int, data: bytes) -> bytes:
    """A UDP packet over IPv4 from the VM to the host's address. The checksum of UDP is left out (RFC 768)."""
    length = 8 + len(data)
    ends = socket.inet_aton(VM_IP) + socket.inet_aton(HOST_IP)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0, 64, 17, 0)
    head = head[:10] + struct.pack("!H", checksum(head + ends)) + ends
    return head + struct.pack("!HHHH", 5000, port, length, 0) + data


def udp6(port: int, data: bytes) -> bytes:
    """A UDP packet over IPv6 from the VM to the host's address; ``data`` has an even length."""
    length = 8 + len(data)
    ends = socket.inet_pton(socket.AF_INET6, "2001:db8:a::45") + socket.inet_pton(socket.AF_INET6, HOST_IP6)
    head = struct.pack("!HHH", 5000, port, length)
    total = checksum(ends + struct.pack("!II", length, 17) + head + b"\0\0" + data) or 0xFFFF
    return struct.pack("!IHBB", 6 << 28, length, 17, 64) + ends + head + struct.pack("!H", total) + data


def arp_request() -> bytes:
    mac = bytes.fromhex(VM_MAC.replace(":", ""))
    return struct.pack("!HHBBH", 1, IP, 6, 4, 1) + mac + socket.inet_aton(VM_IP) + bytes(6) + socket.inet_aton(HOST_IP)


def tagged(tag: int, vlan: int, kind: int, payload: bytes) -> bytes:
    """A broadcast with a tag in front of its type."""
    return frame("ff" * 6, tag, struct.pack("!HH", vlan, kind) + payload)


def llc(destination: str, payload: bytes) -> bytes:
    return frame(destination, len(payload), payload)


# ----------------------------------------------------------------------------------------------- sockets of the host


@pytest.fixture
def listening(host: AgentHost) -> Iterator[list[socket.socket]]:
    """Sockets on addresses of the host that are on no segment: IPv4 and IPv6."""
    host.ip("addr", "add", f"{HOST_IP}/32", "dev", "lo")
    # Without "nodad" the address is tentative for a moment, even on the loopback, and a socket cannot be bound to it.
    host.ip("addr", "add", f"{HOST_IP6}/128", "dev", "lo", "nodad")
    with contextlib.ExitStack() as stack:
        with host.inside_host():
            found = [socket.socket(family, socket.SOCK_DGRAM) for family in (socket.AF_INET, socket.AF_INET6)]
        for it, address in zip(found, (HOST_IP, HOST_IP6), strict=True):
            stack.enter_context(it)
            it.bind((address, PORT))
            it.settimeout(0.2)
        yield found


@pytest.fixture
def tunnel(host: AgentHost, listening: list[socket.socket]) -> None:
    """A VXLAN tunnel of another tenant: ``other``. Without rp_filter the host takes packets from any link."""
    assert listening
    host.ip("link", "add", "other", "type", "vxlan", "id", "77", "dstport", "8472", "local", HOST_IP)
    host.ip("link", "set", "other", "up")


def trusting(host: AgentHost, bridge: str) -> None:
    for link in (f"tap-{VM}", bridge):
        host.run("sysctl", "-qw", f"net.ipv4.conf.{link}.rp_filter=0", f"net.ipv6.conf.{link}.disable_ipv6=0")
    host.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")


def reached(host: AgentHost, listening: list[socket.socket]) -> tuple[set[bytes], set[bytes], int, bool]:
    """Send to all reserved addresses: what IPv4 and IPv6 sockets got, what the tunnel got, whether ARP was answered."""
    inner = struct.pack("!II", 0x08000000, 77 << 8) + frame("ff" * 6, IP, bytes(46))
    with wire(host, "eth0", VM) as answers:
        for to in RESERVED:
            name = to[-2:].encode()
            send(host, frame(to, IP, udp(PORT, name)), frame(to, IP6, udp6(PORT, name)))
            send(host, frame(to, 0x8100, struct.pack("!HH", 0, IP) + udp(PORT, b"tagged")))
            send(host, frame(to, ARP, arp_request()), frame(to, IP, udp(8472, inner)))
        answered = answered_for_host(answers)
    return (
        set(received(listening[0])),
        set(received(listening[1])),
        json.loads(host.ip("-s", "-j", "link", "show", "other"))[0]["stats64"]["rx"]["packets"],
        answered,
    )


def answered_for_host(answers: socket.socket) -> bool:
    own = socket.inet_aton(HOST_IP)
    return any(it[12:14] == b"\x08\x06" and it[28:32] == own for it in received(answers))


@pytest.mark.parametrize("vlan", ["1204", "untagged"])
def test_frames_to_reserved_addresses_reach_no_socket_of_the_host(
    host: AgentHost, listening: list[socket.socket], tunnel: None, vlan: str
) -> None:
    trusting(host, build(host, vlan))
    assert reached(host, listening) == (set(), set(), 0, False)
    without_repairs(host)
    for family in ("bridge", "netdev", "inet", "arp"):
        host.run("nft", "delete", "table", family, "netloom")
    four, six, tunnelled, answered = reached(host, listening)
    # So the tables had blocked them. The kernel drops :01 itself.
    assert four >= {it[-2:].encode() for it in RESERVED if it[-2:] != "01"}
    assert len(six) == 15
    assert tunnelled
    assert answered


@pytest.mark.mutation("no-moment-without-a-guard", instead="(STACK_FAMILY, 'prerouting', 'counter')")
@pytest.mark.parametrize(
    ("owner", "stp"),
    [
        *(("agent", "0"), ("operator", "1")),
        *(pytest.param(*it, marks=pytest.mark.long) for it in (("agent", "1"), ("operator", "0"))),
    ],
)
def test_frames_to_reserved_addresses_reach_no_socket_through_a_bridge_of_others(
    host: AgentHost, listening: list[socket.socket], tunnel: None, owner: str, stp: str
) -> None:
    bridge, _ = build_on(host, owner)
    trusting(host, bridge)
    host.ip("link", "set", bridge, "type", "bridge", "stp_state", stp, "forward_delay", "0")
    assert reached(host, listening) == (set(), set(), 0, False)
    assert host.links()[bridge]["linkinfo"]["info_data"]["group_fwd_mask"] == "0"
    without_repairs(host)
    # As if nobody had seen the port yet.
    host.run("nft", "delete", "chain", "netdev", "netloom", f"from-tap-{VM}")
    assert reached(host, listening) == (set(), set(), 0, False)
    for family in ("inet", "arp"):
        host.run("nft", "delete", "table", family, "netloom")
    four, six, _, answered = reached(host, listening)
    # These pass no hook of the family bridge.
    assert four - {b"tagged"} == six == ({b"0e", b"00"} if stp == "1" else {b"0e"})
    assert answered


@pytest.mark.mutation("reserved-addresses-reach-no-socket", instead="'counter'")
def test_a_packet_socket_for_one_protocol_gets_nothing_from_reserved_addresses(host: AgentHost) -> None:
    """As a daemon for ATA over Ethernet opens one: the kernel serves it behind the hooks of the port."""
    build(host)
    assert reaching_a_packet_socket(host) == []
    without_repairs(host)
    host.run("nft", "flush", "chain", "bridge", "netloom", "input")
    assert set(reaching_a_packet_socket(host)) == {it for it in RESERVED if it[-2:] not in ("00", "01", "0e")}


@pytest.mark.mutation(
    "ports-of-others-are-guarded", instead="(FROM_PORT, others.ports, had.ports, 'accept', 'counter')"
)
def test_a_packet_socket_gets_nothing_from_reserved_addresses_through_a_bridge_of_others(host: AgentHost) -> None:
    build_on(host, "operator")
    assert reaching_a_packet_socket(host) == []
    without_repairs(host)
    host.run("nft", "delete", "chain", "netdev", "netloom", f"from-tap-{VM}")
    assert reaching_a_packet_socket(host) == ["0180c200000e"]


def reaching_a_packet_socket(host: AgentHost) -> list[str]:
    """The reserved addresses whose frames reach a socket for ATA over Ethernet on the VM's port."""
    with host.inside_host():
        listening = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88A2))
    with listening:
        listening.bind((f"tap-{VM}", 0x88A2))
        listening.settimeout(0.2)
        send(host, *(frame(it, 0x88A2, DATA) for it in RESERVED))
        return [it[:6].hex() for it in received(listening)]


# ----------------------------------------------------------------------------------------------------------- the wire

DATA = bytes(range(46))
SNAP_CISCO = bytes.fromhex("aaaa0300000c")
NOT_ORDINARY = {
    "STP": llc("0180c2000000", bytes.fromhex("424203") + DATA[:35]),
    "STP to a station": llc("020000000099", bytes.fromhex("424203") + DATA[:35]),
    "PVST": llc("01000ccccccd", SNAP_CISCO + b"\x01\x0b" + DATA[:30]),
    "CDP": llc("01000ccccccc", SNAP_CISCO + b"\x20\0" + DATA[:30]),
    "VTP": llc("01000ccccccc", SNAP_CISCO + b"\x20\3" + DATA[:30]),
    "CDP to all": llc("ff" * 6, SNAP_CISCO + b"\x20\0" + DATA[:30]),
    "EDP": llc("00e02b000000", bytes.fromhex("aaaa0300e02b00bb") + DATA[:30]),
    "FDP": llc("01e052cccccc", bytes.fromhex("aaaa0300e0522000") + DATA[:30]),
    "LLDP in SNAP": llc("020000000099", bytes.fromhex("aaaa0300000088cc") + DATA[:30]),
    "802.1Q in SNAP": llc("ff" * 6, bytes.fromhex("aaaa030000008100") + struct.pack("!HH", 1301, IP) + DATA[:30]),
    "loop detection": frame("cf0000000000", 0x9000, DATA),
    "a claim of a host": frame("ff" * 6, 0x88B5, b"netloom" + DATA),
    "ISL": frame("01000c000000", 0x0100, DATA),
    "LACP": frame("0180c2000002", 0x8809, DATA),
    "LLDP": frame("0180c200000e", 0x88CC, DATA),
    "LLDP to a station": frame("020000000099", 0x88CC, DATA),
    "MVRP": frame("0180c2000021", 0x88F5, DATA),
    "GVRP": llc("0180c2000021", bytes.fromhex("424203") + DATA[:30]),
    "CFM": frame("0180c2000031", 0x8902, DATA),
    "802.1X": frame("0180c2000003", 0x888E, DATA),
    "802.1Q": tagged(0x8100, 1301, IP, udp(9, DATA)),
    "802.1Q with a tag in it": tagged(0x8100, 1301, 0x8100, struct.pack("!HH", 1302, IP) + udp(9, DATA)),
    "priority tag": tagged(0x8100, 0, IP, udp(9, DATA)),
    "priority tag before a tag": tagged(0x8100, 0, 0x8100, struct.pack("!HH", 1301, IP) + udp(9, DATA)),
    "802.1ad": tagged(0x88A8, 1301, IP, udp(9, DATA)),
    "802.1ad and 802.1Q": tagged(0x88A8, 1301, 0x8100, struct.pack("!HH", 1302, IP) + udp(9, DATA)),
    "tag 0x9100": tagged(0x9100, 1301, IP, udp(9, DATA)),
    "tagged LLDP to a station": tagged(0x8100, 1301, 0x88CC, DATA),
    "tagged STP to a station": tagged(0x8100, 1301, 38, bytes.fromhex("424203") + DATA[:35]),
    "tagged PVST": frame("01000ccccccd", 0x8100, struct.pack("!HH", 1301, 46) + SNAP_CISCO + b"\x01\x0b" + DATA[:38]),
}


def leaving(host: AgentHost, is_tagged: bool) -> set[str]:
    """Have the VM send an ordinary frame, those above and an ordinary one; the names of those that leave."""
    place = partial(wire, host, "sw-eth1.1204", fabric=True) if is_tagged else partial(wire, host, "eth1-x")
    numbers = itertools.count(1)
    sent = {struct.pack("!Q", 0xFEED_0000_0000 + next(numbers)): (name, it) for name, it in NOT_ORDINARY.items()}
    plain = {b"plain-%d" % at: frame("ff" * 6, IP, udp(9, DATA + b"plain-%d" % at)) for at in (1, 2)}
    with place() as it:
        send(host, plain[b"plain-1"])
        for mark, (_, data) in sent.items():
            send(host, data + mark)
        send(host, plain[b"plain-2"])
        seen = list(received(it))
    names = {name for mark, (name, _) in sent.items() if any(mark in each for each in seen)}
    return names | {mark.decode() for mark in plain if any(mark in each for each in seen)}


@pytest.mark.mutation("only-ordinary-frames-leave")
@pytest.mark.parametrize("vlan", ["1204", "untagged"])
def test_only_ordinary_frames_of_a_vm_leave_on_the_wire(host: AgentHost, vlan: str) -> None:
    build(host, vlan)
    host.ip("link", "set", "eth1-x", "up")
    wait_until(lambda: forwards(host, f"tap-{VM}", "eth1.1204" if vlan == "1204" else "eth1"))
    assert leaving(host, vlan == "1204") == {"plain-1", "plain-2"}
    without_repairs(host)
    host.run("nft", "delete", "table", "bridge", "netloom")
    assert {"STP", "PVST", "CDP", "LLDP", "802.1Q", "802.1ad", "tag 0x9100"} <= leaving(host, vlan == "1204")


def reaching(host: AgentHost, is_tagged: bool) -> set[str]:
    """Have the wire send a claim, and an ordinary frame; those that reach the VM."""
    place = partial(wire, host, "sw-eth1.1204", fabric=True) if is_tagged else partial(wire, host, "eth1-x")
    with place() as far, wire(host, "eth0", VM) as vm:
        far.send(frame("ff" * 6, 0x88B5, b"netloom" + DATA))
        far.send(frame("ff" * 6, IP, udp(9, b"ordinary" + DATA)))
        seen = list(received(vm))
    return {name for name in ("netloom", "ordinary") if any(name.encode() in it for it in seen)}


@pytest.mark.mutation("vms-hear-no-claims")
@pytest.mark.parametrize("vlan", ["1204", "untagged"])
def test_a_vm_hears_nothing_that_hosts_say_to_each_other(host: AgentHost, vlan: str) -> None:
    build(host, vlan)
    host.ip("link", "set", "eth1-x", "up")
    wait_until(lambda: forwards(host, f"tap-{VM}", "eth1.1204" if vlan == "1204" else "eth1"))
    assert reaching(host, vlan == "1204") == {"ordinary"}


@pytest.mark.mutation("nor-behind-others")
@pytest.mark.parametrize("owner", ["agent", "operator"])
def test_a_vm_on_a_bridge_of_others_hears_nothing_that_hosts_say(host: AgentHost, owner: str) -> None:
    build_on(host, owner)
    assert reaching(host, owner == "agent") == {"ordinary"}


@pytest.mark.mutation("lldp-frames-are-filtered")
@pytest.mark.mutation("no-chain-of-an-older-build-stays")
@pytest.mark.parametrize("missing", ["bridge", "inet"])
def test_a_bridge_that_an_older_build_made_is_guarded_at_the_start(host: AgentHost, missing: str) -> None:
    bridge = build(host)
    host.kill()
    host.run("nft", "delete", "table", missing, "netloom")
    host.ip("link", "set", bridge, "type", "bridge", "group_fwd_mask", "0")
    if missing == "inet":
        host.run("nft", "add table inet netloom; add chain inet netloom reserved { type filter hook prerouting "
                 "priority -450; }; add rule inet netloom reserved meta iiftype ether drop")  # fmt: skip
    host.start()
    wait_until(lambda: f"{missing} netloom" in host.run("nft", "list", "tables"))
    wait_until(lambda: "chain reserved_addresses {" in host.run("nft", "list", "table", "inet", "netloom"))
    assert "chain reserved {" not in host.run("nft", "list", "table", "inet", "netloom")
    wait_until(lambda: host.links()[bridge]["linkinfo"]["info_data"]["group_fwd_mask"] == "0x4000")
    wait_until(lambda: "eth1.1204" in host.run("nft", "list", "set", "bridge", "netloom", "uplinks"))
    host.ip("link", "del", f"tap-{VM}")
    done(host.call("131", "destroy-network"))
    wait_until(lambda: host.run("nft", "list", "tables") == "")


@pytest.mark.mutation("flushed-rules-are-loaded-again", instead="True")
def test_a_flushed_table_is_no_guard(host: AgentHost) -> None:
    bridge = build(host)
    host.kill()
    with host.inside_host():
        for family in ("bridge", "inet", "arp"):
            assert guarded_bridges() == {bridge}
            host.run("nft", "flush", "table", family, "netloom")
            assert guarded_bridges() == frozenset()
            guard(bridge, ("eth1.1204",))


def test_a_link_that_left_its_bridge_may_carry_anything_again(host: AgentHost) -> None:
    """An untagged network ends and its NIC stays."""
    build(host, "untagged")
    done(host.call("020", "implement-network", vlan="1377", network_id="205"))
    host.ip("link", "del", f"tap-{VM}")
    done(host.call("131", "destroy-network"))
    uplinks = partial(host.run, "nft", "list", "set", "bridge", "netloom", "uplinks")
    wait_until(lambda: '"eth1"' not in uplinks())
    assert '"eth1.1377"' in uplinks()


# ------------------------------------------------------------------------------------------------- bridges of others


@pytest.mark.mutation("bridges-of-others-are-closed")
def test_the_host_answers_nothing_on_a_bridge_of_others_that_it_does_not_use_itself(
    host: AgentHost, listening: list[socket.socket]
) -> None:
    bridge, _ = build_on(host, "agent")
    trusting(host, bridge)
    mac = host.links()[bridge]["address"].replace(":", "")

    def answers() -> tuple[bool, set[bytes], set[bytes]]:
        with wire(host, "eth0", VM) as it:
            send(host, frame("ff" * 6, ARP, arp_request()), frame(mac, ARP, arp_request()))
            send(host, frame(mac, IP, udp(PORT, b"four")), frame(mac, IP6, udp6(PORT, b"six-")))
            return answered_for_host(it), set(received(listening[0])), set(received(listening[1]))

    assert answers() == (False, set(), set())
    # The host takes the bridge into use. It is closed again when the address has gone.
    host.ip("addr", "add", MANAGEMENT, "dev", bridge)
    wait_until(lambda: f"to-{bridge}" not in guards(host))
    assert answers() == (True, {b"four"}, {b"six-"})
    host.ip("addr", "del", MANAGEMENT, "dev", bridge)
    wait_until(lambda: f"to-{bridge}" in guards(host))
    assert answers() == (False, set(), set())


@pytest.mark.mutation("uplinks-of-others-are-guarded")
@pytest.mark.parametrize("owner", ["agent", "operator"])
def test_only_ordinary_frames_leave_through_a_bridge_of_others(host: AgentHost, owner: str) -> None:
    build_on(host, owner)
    assert leaving(host, owner == "agent") == {"plain-1", "plain-2"}
    without_repairs(host)
    host.run("nft", "delete", "table", "bridge", "netloom")
    assert {"STP", "PVST", "CDP", "802.1Q", "802.1ad", "tag 0x9100"} <= leaving(host, owner == "agent")


@pytest.mark.mutation("no-second-tag-leaves", instead="'counter'")
def test_a_bridge_with_vlan_filtering_may_add_a_tag_and_no_frame_has_a_second_one(host: AgentHost) -> None:
    """This kernel may lack VLAN filtering: the outer tag is that of the VM, in the place where the bridge puts its own.

    The bridge removes its own tag before this filter where the uplink has the VLAN untagged. A second tag of the VM
    would then leave as the first one.
    """
    build_on(host, "operator")
    without_repairs(host)
    host.run("nft", "flush", "set", "bridge", "netloom", "others_uplinks")
    host.run("nft", "add", "element", "bridge", "netloom", "others_trunks", '{ "eth1" }')
    assert leaving(host, is_tagged=False) == {"plain-1", "plain-2", "802.1Q", "802.1ad", "priority tag"}


@pytest.mark.mutation("the-host-takes-no-tags-of-guests")
def test_the_host_takes_no_tagged_frames_of_a_vm_from_an_operators_bridge(
    host: AgentHost, listening: list[socket.socket]
) -> None:
    """They would reach a VLAN link above the bridge, and with VLAN 0 the host itself."""
    bridge, _ = build_on(host, "operator")
    trusting(host, bridge)
    mac = host.links()[bridge]["address"].replace(":", "")
    priority = frame(mac, 0x8100, struct.pack("!HH", 0, IP) + udp(PORT, b"tagged"))
    with wire(host, bridge) as it:
        send(host, priority, *(data for name, data in NOT_ORDINARY.items() if name.startswith("802.1Q")))
        send(host, frame(mac, IP, udp(PORT, b"plain")))
        assert set(received(listening[0])) == {b"plain"}
        assert not [each for each in received(it) if DATA[10:] in each]
    # Tags from the wire reach the host.
    with wire(host, "eth1-x") as sending:
        sending.send(priority)
    assert set(received(listening[0])) == {b"tagged"}


def test_the_management_address_on_an_operators_bridge_goes_on_working(host: AgentHost) -> None:
    """From the wire and from VMs, with ARP and without, before and after the network."""
    bridge, _ = build_on(host, "operator")
    host.ip("netns", "add", "admin")
    host.ip("link", "set", "eth1-x", "netns", "admin")
    host.ip("-n", "admin", "addr", "add", "192.0.2.1/24", "dev", "eth1-x")
    host.ip("-n", "admin", "link", "set", "eth1-x", "up")
    wait_until(lambda: "1 received" in host.run("ping", "-c1", "-W2", "192.0.2.77", namespace="admin", check=False))
    with host.within("admin"):
        asking = socket.create_server(("192.0.2.1", 8080))
    with asking, host.inside_host():
        socket.create_connection(("192.0.2.1", 8080), 5).close()
    assert f"from-tap-{VM}" in guards(host)
    assert f"to-{bridge}" not in guards(host)
    # Frames of control protocols from the wire reach the host's programs (lldpd; systemd-networkd, which listens to
    # LLDP only) and the spanning tree of the bridge.
    with host.inside_host():
        lldp_only = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88CC))
    host.ip("link", "set", bridge, "type", "bridge", "stp_state", "1")
    with wire(host, "eth1") as it, lldp_only:
        lldp_only.bind(("eth1", 0x88CC))
        lldp_only.settimeout(0.2)
        with wire(host, "eth1-x", "admin") as sending:
            sending.send(frame("0180c200000e", 0x88CC, DATA))
            sending.send(bpdu())
        assert any(each[12:14] == b"\x88\xcc" for each in received(it))
        assert list(received(lldp_only))
    wait_until(lambda: host.links()[bridge]["linkinfo"]["info_data"]["root_port"] == 1)


def bpdu() -> bytes:
    """A configuration BPDU of a better root than any other (IEEE 802.1D, 9.3.1)."""
    root = bytes(2) + bytes.fromhex("020000000007")
    times = struct.pack("!4H", 0, 20 << 8, 2 << 8, 15 << 8)  # in 1/256 s
    return llc("0180c2000000", bytes.fromhex("424203") + bytes(5) + root + bytes(4) + root + b"\x80\x01" + times)


@pytest.mark.mutation("a-new-port-is-guarded")
@pytest.mark.mutation("ports-follow-the-mtu-of-their-segment")
def test_a_vm_that_is_plugged_in_later_is_guarded_within_moments(host: AgentHost) -> None:
    bridge, _ = build_on(host, "operator")
    host.plug("db", bridge, "02:01:00:cc:00:04")
    wait_until(lambda: "from-tap-db" in guards(host))
    host.ip("link", "del", "tap-db")
    wait_until(lambda: "from-tap-db" not in guards(host))


@pytest.mark.mutation("the-guard-of-others-follows")
@pytest.mark.parametrize("owner", ["agent", "operator"])
def test_no_guard_is_left_on_a_bridge_of_others_after_the_network(host: AgentHost, owner: str) -> None:
    bridge, uplink = build_on(host, owner)
    host.kill()
    host.run("nft", "delete", "table", "inet", "netloom")  # an older build had none
    host.start()
    wait_until(lambda: "inet netloom" in guards(host))
    host.run("nft", "flush", "ruleset")
    host.kill()
    host.start()
    wait_until(lambda: all(it in guards(host) for it in (f"from-tap-{VM}", f'"{uplink}"')))
    done(host.call("131", "destroy-network"))
    wait_until(lambda: guards(host) == "")
    assert bridge in host.links()  # with the VM in it
