"""Network namespaces around one device, to test the rendered rulesets with packets.

    vm1 vm2 vm3 ── guest segment ── dev ── public VLAN 101 ── gw1 ──┐
                                     │          └ neighbour         ├── internet (clients on its loopback)
                                     └──── public VLAN 102 ── gw2 ──┘

The device is made from a ``Want`` with ``ip``, ``nft -f`` and ``conntrack``, without code of the agent. Each gateway
drops packets whose source is not an address of its own VLAN, as providers do, so a reply through the wrong exit is
lost. Sockets are opened in the namespaces and stay there; no packet leaves them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import select
import selectors
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from netloom.netobjects import Route, Rule
from netloom.render import flows, ruleset
from netloom.render.marks import REVOKED
from netloom.render.scope import render
from netloom.render.want import Want
from netloom.state import Scope
from netns import inside

GUEST_CIDR, GATEWAY = "10.1.1.0/24", "10.1.1.1"
VMS = {"vm1": "10.1.1.11", "vm2": "10.1.1.12", "vm3": "10.1.1.13"}
MACS = {name: f"02:00:00:00:00:{number:02x}" for number, name in enumerate((*VMS, "a1", "a2", "b1"), 1)}
CLIENT, CLIENT2, STRANGER = "192.0.2.10", "192.0.2.11", "192.0.2.200"
NEIGHBOUR = "203.0.113.99"
OUTSIDE = ("inet", "nb", "gw1", "gw2")
SUBNETS = {"gw1": ("203.0.113.0/24", "198.151.100.0/24"), "gw2": ("198.51.100.0/24",)}

# Time without an answer that counts as no answer, and time that an expected answer may take on a busy machine.
QUIET_S, PATIENCE_S = 0.35, 20.0


def run(*argv: str, stdin: str = "") -> str:
    done = subprocess.run(argv, input=stdin, text=True, capture_output=True)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr.strip()}\n{stdin}"
    return done.stdout


class Nft:
    """libnftables in this process, for one namespace. Hundreds of ``nft`` processes would be much slower."""

    def __init__(self, namespace: str) -> None:
        self._library = ctypes.CDLL("libnftables.so.1")
        self._library.nft_ctx_new.restype = ctypes.c_void_p
        self._library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        with inside(namespace):
            self._context = ctypes.c_void_p(self._library.nft_ctx_new(0))
        self._library.nft_ctx_buffer_error(self._context)
        self._library.nft_ctx_buffer_output(self._context)

    def refusal(self, text: str) -> str:
        """Run a transaction; returns the error message, or an empty text when the kernel accepted it."""
        if not self._library.nft_run_cmd_from_buffer(self._context, text.encode()):
            return ""
        return str(self._library.nft_ctx_get_error_buffer(self._context).decode()) or "refused"

    def load(self, text: str) -> None:
        refusal = self.refusal(text) if text else ""
        assert not refusal, f"{refusal}\n{text}"

    def close(self) -> None:
        self._library.nft_ctx_free(self._context)


@dataclass(frozen=True)
class Try:
    """One attempt from ``space``; ``source`` empty lets the kernel choose. ICMP: ``port`` is type * 256 + code.

    With an IPv6 target the packet is IPv6, and ``icmp`` is ICMPv6.
    """

    space: str
    protocol: str
    target: str
    port: int = 8 << 8
    source: str = ""


@dataclass(frozen=True)
class Entry:
    """A conntrack entry, as ``flows.Flow`` has it."""

    protocol: int
    src: str
    dst: str
    reply_src: str
    reply_dst: str
    sport: int = 0
    dport: int = 0
    reply_sport: int = 0
    reply_dport: int = 0
    icmp_type: int = -1
    icmp_code: int = -1
    icmp_id: int = 0
    mark: int = 0
    status: int = 0
    master: None = None

    def selector(self) -> list[str]:
        family = ["-f", "ipv6"] if ":" in self.src else []
        words = [*family, "-p", str(self.protocol), "-s", self.src, "-d", self.dst]
        if self.protocol == flows.ICMP:
            kind = ["--icmp-type", str(self.icmp_type), "--icmp-code", str(self.icmp_code)]
            return [*words, *kind, "--icmp-id", str(self.icmp_id)]
        if self.protocol in (flows.TCP, flows.UDP):
            words += ["--sport", str(self.sport), "--dport", str(self.dport)]
        return words


@dataclass
class Lab:
    tag: str = field(default_factory=lambda: f"rtest-{os.getpid()}-{secrets.token_hex(2)}")
    scope: Scope | None = None
    families: tuple[str, ...] = ("ipv4",)  # families of the open flows that are checked
    want: Want = field(default_factory=lambda: Want(namespace=""))

    def __post_init__(self) -> None:
        self._spaces: list[str] = []
        self._served: dict[tuple[str, str, str, int], socket.socket] = {}
        self._answering = selectors.DefaultSelector()
        self._stop_r, self._stop_w = os.pipe()
        self._asked_r, self._asked_w = os.pipe()
        self._is_idle = threading.Event()
        for pipe in (self._stop_r, self._asked_r):
            self._answering.register(pipe, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._icmp: dict[str, socket.socket] = {}
        self._numbers = iter(range(1, 65000))

    def ns(self, space: str) -> str:
        return f"{self.tag}-{space}"

    def __enter__(self) -> Lab:
        self._thread.start()
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        spaces = ["sw", "dev", *VMS, "gw1", "gw2", "inet", "nb"]
        for it in spaces:
            run("ip", "netns", "add", self.ns(it))
            self._spaces.append(it)
            with inside(self.ns(it)):
                _write("net.ipv6.conf.all.disable_ipv6", "1")
                _write("net.ipv4.conf.all.rp_filter", "0")
                _write("net.ipv4.conf.default.rp_filter", "0")
                _write("net.ipv4.ping_group_range", "0 2147483647")
                if it in ("gw1", "gw2", "inet"):
                    _write("net.ipv4.ip_forward", "1")
            self.ip(it, "link set lo up")
        with inside(self.ns("dev")):
            # Keep entries of closed connections until the test has read them, on a busy machine too.
            _write("net.netfilter.nf_conntrack_tcp_timeout_close", "120")
        self.ip("sw", *(f"link add breth1-{vlan} type bridge" for vlan in ("1204", "101", "102", "0")))
        self.ip("sw", *(f"link set breth1-{vlan} up" for vlan in ("1204", "101", "102", "0")))
        for name, address in VMS.items():
            self.plug(name, "1204", f"{address}/24")
            self.ip(name, f"route add default via {GATEWAY}")
        self.plug("gw1", "101", "203.0.113.1/24")
        self.ip("gw1", "addr add 198.151.100.1/24 dev eth0")
        self.plug("gw2", "102", "198.51.100.1/24")
        self.plug("nb", "101", f"{NEIGHBOUR}/24")
        self.ip("nb", "route add default via 203.0.113.1", f"route add {GUEST_CIDR} via 203.0.113.20")
        for number, gw in ((1, "gw1"), (2, "gw2")):
            self.ip(
                "inet",
                f"link add up{number} type veth peer name wan netns {self.ns(gw)}",
                f"addr add 172.16.{number}.1/30 dev up{number}",
                f"link set up{number} up",
            )
            self.ip(
                gw,
                f"addr add 172.16.{number}.2/30 dev wan",
                "link set wan up",
                f"route add default via 172.16.{number}.1",
            )
            self.ip("inet", *(f"route add {subnet} via 172.16.{number}.2" for subnet in SUBNETS[gw]))
            self.nft(gw, f"table ip strays {{ chain stray {{ type filter hook prerouting priority -300; "
                         f"iifname eth0 ip saddr != {{ {', '.join(SUBNETS[gw])} }} counter drop; }}; }}\n")  # fmt: skip
        self.ip("inet", *(f"addr add {it}/32 dev lo" for it in (CLIENT, CLIENT2, STRANGER)))

    def __exit__(self, *_: object) -> None:
        os.write(self._stop_w, b"x")
        self._thread.join(10)
        for key in list(self._answering.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
        self._answering.close()
        for it in self._icmp.values():
            it.close()
        for pipe in (self._stop_r, self._stop_w, self._asked_r, self._asked_w):
            os.close(pipe)
        for space in self._spaces:
            run("ip", "netns", "del", self.ns(space))

    # Plain tools

    def ip(self, space: str, *lines: str) -> None:
        run("ip", "-n", self.ns(space), "-batch", "-", stdin="\n".join(lines) + "\n")

    def nft(self, space: str, text: str) -> None:
        run("ip", "netns", "exec", self.ns(space), "nft", "-f", "-", stdin=text)

    def listing(self) -> str:
        return run("ip", "netns", "exec", self.ns("dev"), "nft", "-j", "list", "table", "inet", "netloom")

    def plug(self, space: str, vlan: str, address: str) -> None:
        """Connect ``space`` to a segment by a veth pair."""
        port = f"x{space}-{vlan}"[:15]
        mac = f" address {MACS[space]}" if space in MACS else ""
        self.ip("sw", f"link add {port} type veth peer name eth0{mac} netns {self.ns(space)}",
                f"link set {port} master breth1-{vlan}", f"link set {port} up")  # fmt: skip
        self.ip(space, f"addr add {address} dev eth0", "link set eth0 up")
        with inside(self.ns(space)):
            # An unknown neighbour becomes an error only after a minute: a test that expects silence may be held up.
            for family in ("ipv4", "ipv6"):
                _write(f"net.{family}.neigh.eth0.mcast_solicit", "60")

    def foreign_source_packets(self) -> int:
        """The number of packets that reached a provider's gateway with a source address of another VLAN."""
        found = 0
        for gw in ("gw1", "gw2"):
            text = run("ip", "netns", "exec", self.ns(gw), "nft", "list", "table", "ip", "strays")
            found += int(re.findall(r"packets (\d+)", text)[0])
        return found

    # The device

    def apply(self, scope: Scope | None, *, settle: bool = True) -> None:
        """Configure the device for ``scope``; then delete or mark open flows as the flow policy decides."""
        before, self.scope = self.scope, scope
        self.realise(render(scope))
        if settle:
            self.enforce_flows(before)

    def renew(self, scope: Scope) -> None:
        """Configure the device for ``scope``; flush its connection tracking and the neighbours' ARP caches."""
        self.apply(scope, settle=False)
        run("ip", "netns", "exec", self.ns("dev"), "conntrack", "-F")
        for space in ("gw1", "gw2", "nb"):  # the lab sends no gratuitous ARP
            self.ip(space, "neigh flush all")

    def realise(self, want: Want) -> None:
        have, self.want = self.want, want
        if want.ruleset is not None:
            text = ruleset.swap(have.ruleset, want.ruleset) if have.ruleset else ruleset.fresh(want.ruleset)
            if text:
                self.nft("dev", text)
        elif have.ruleset is not None:
            self.nft("dev", "delete table inet netloom\n")
        for rule in set(have.rules) - set(want.rules):
            self.ip("dev", f"rule del priority {rule.priority}")
        for port in set(have.ports) - set(want.ports):
            self.ip("dev", f"link del {port.link}")
        for port in want.ports:
            if port not in have.ports:
                self.ip("sw", f"link add {port.host_link} type veth peer name {port.link} address {port.mac} "
                              f"netns {self.ns('dev')}", f"link set {port.host_link} master {port.segment.bridge}",
                        f"link set {port.host_link} up")  # fmt: skip
        links = {it.link for it in have.ports if it in want.ports}
        # Before the sysctls: disabling IPv6 on a link removes its addresses.
        self.ip("dev", *(f"addr del {it.cidr} dev {it.link}" for it in have.addresses
                         if it not in want.addresses and it.link in links))  # fmt: skip
        if want.sysctls != have.sysctls:
            with inside(self.ns("dev")):
                for key, value in want.sysctls.items():
                    _write(key, value)
        lines = [f"link set {it.link} up" for it in want.ports if it not in have.ports]
        lines += [f"addr add {it.cidr} dev {it.link}" for it in want.addresses
                  if it not in have.addresses or it.link not in links]  # fmt: skip
        # The kernel deletes routes together with their preferred source address, so set all routes again.
        lines += [f"route replace {_route(it)}" for it in want.routes]
        lines += [f"rule add {_rule(it)}" for it in want.rules if it not in have.rules]
        self.ip("dev", *lines)
        places = {(it.table, it.destination) for it in want.routes}
        for route in have.routes:
            if (route.table, route.destination) not in places:
                with contextlib.suppress(AssertionError):  # already deleted with its link or address
                    self.ip("dev", f"route del {route.destination} table {route.table}")

    def entries(self) -> list[Entry]:
        look = ("ip", "netns", "exec", self.ns("dev"), "conntrack", "-L", "-o", "extended", "-f")
        return [_entry(line) for family in self.families for line in run(*look, family).splitlines()]

    def enforce_flows(self, before: Scope | None) -> None:
        check = flows.flow_check(before, self.scope)
        if check == "none":
            return
        policy = flows.FlowPolicy(self.scope)
        for entry in self.entries():
            if check == "revoked_only" and not entry.mark & REVOKED:
                continue
            match policy.action(entry):
                case "delete":
                    self.conntrack("-D", *entry.selector())
                case "revoke":
                    self.conntrack("-U", *entry.selector(), "--mark", f"{REVOKED:#x}/{REVOKED:#x}")

    def conntrack(self, *argv: str) -> None:
        # The entry may have timed out since it was listed.
        subprocess.run(["ip", "netns", "exec", self.ns("dev"), "conntrack", *argv], capture_output=True, check=False)

    # Packets

    def open_socket(self, space: str, kind: int, protocol: int = 0, address: str = "") -> socket.socket:
        """Make a socket in ``space``, of the address family of ``address``."""
        with inside(self.ns(space)):
            return socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind, protocol)

    def serve(self, space: str, protocol: str, port: int, address: str = "") -> None:
        """Answer each connection and datagram with ``space address:port``: the client as the server sees it."""
        key = (space, protocol, address, port)
        if key in self._served:
            return
        listener = self.open_socket(space, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM, 0, address)
        if ":" in address:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind((address, port))
        if protocol == "tcp":
            listener.listen(64)
        self._served[key] = listener
        self._answering.register(listener, selectors.EVENT_READ, (space, protocol))

    def _wait_for_servers(self) -> None:
        """Wait until each server has answered what came first. Their thread may run late on a busy machine."""
        self._is_idle.clear()
        os.write(self._asked_w, b"?")
        assert self._is_idle.wait(PATIENCE_S), "the servers have ended"

    def _answer(self) -> None:
        while True:
            ready = self._answering.select()
            self._answer_all(ready)
            found = {key.fileobj for key, _ in ready}
            if self._stop_r in found:
                return
            if self._asked_r in found:
                os.read(self._asked_r, 1)
                self._is_idle.set()

    def _answer_all(self, ready: list[tuple[selectors.SelectorKey, int]]) -> None:
        for key, _ in ready:
            if key.fileobj in (self._stop_r, self._asked_r):
                continue
            assert isinstance(key.fileobj, socket.socket)
            space, protocol = key.data
            with contextlib.suppress(OSError):
                if protocol == "udp":
                    _, peer = key.fileobj.recvfrom(2048)
                    key.fileobj.sendto(f"{space} {peer[0]}:{peer[1]}".encode(), peer)
                elif protocol == "tcp":
                    connection, peer = key.fileobj.accept()
                    connection.setblocking(False)
                    connection.send(f"{space} {peer[0]}:{peer[1]}\n".encode())
                    self._answering.register(connection, selectors.EVENT_READ, (space, "echo"))
                else:
                    self._echo(key.fileobj)

    def _echo(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(65536)
        except OSError:
            data = b""
        if data:
            connection.sendall(data)
            return
        self._answering.unregister(connection)
        connection.close()

    def ask(self, tries: Iterable[Try], patience_s: float = PATIENCE_S) -> list[str]:
        """Make all attempts at once; returns for each the answer, ``refused``, or an empty text when nothing came.

        Waits until all have an answer, at most ``patience_s`` seconds.
        """
        asked = list(tries)
        answers = [""] * len(asked)
        waiting: dict[int, tuple[int, socket.socket, bytes]] = {}
        poll = select.poll()
        for at, it in enumerate(asked):
            client, expected = self._begin(it)
            waiting[client.fileno()] = (at, client, expected)
            poll.register(client, select.POLLIN | select.POLLERR | select.POLLHUP)
        until = time.monotonic() + patience_s
        is_over = False
        while waiting:
            # What has come is read also when this process could not run for longer than it waits.
            ready = poll.poll(max(until - time.monotonic(), 0) * 1000)
            if not ready and is_over:
                break
            if not ready:
                self._wait_for_servers()
                is_over = True
            for fd, _ in ready:
                at, client, expected = waiting[fd]
                try:
                    data = client.recv(4096)
                    if expected:
                        if not _is_reply(data, expected):
                            continue
                        data = b"pong"
                    answers[at] = data.decode().strip() or "closed"
                except ConnectionError:
                    answers[at] = "refused"
                except OSError as error:
                    answers[at] = f"error {error.errno}"
                poll.unregister(fd)
                waiting.pop(fd)
                client.close()
        for _, client, _ in waiting.values():
            client.close()
        return answers

    def _begin(self, it: Try) -> tuple[socket.socket, bytes]:
        if it.protocol == "icmp":
            family = socket.IPPROTO_ICMPV6 if ":" in it.target else socket.IPPROTO_ICMP
            client = self.open_socket(it.space, socket.SOCK_RAW, family, it.target)
            client.setblocking(False)
            if it.source:
                client.bind((it.source, 0))
            number = next(self._numbers)
            client.connect((it.target, 0))
            client.send(_icmp(it.port >> 8, it.port & 255, number))
            return client, struct.pack("!BH", {8: 0, 13: 14, 128: 129}.get(it.port >> 8, 0), number)
        client = self.open_socket(
            it.space, socket.SOCK_STREAM if it.protocol == "tcp" else socket.SOCK_DGRAM, 0, it.target
        )
        client.setblocking(False)
        if it.source:
            client.bind((it.source, 0))
        if it.protocol == "tcp":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with contextlib.suppress(BlockingIOError):
            client.connect((it.target, it.port))
        if it.protocol == "udp":
            client.send(b"?")
        return client, b""

    def ping(self, space: str, source: str, target: str, type_: int, code: int, number: int) -> None:
        """Send one ICMP query without waiting for the reply."""
        with self.open_socket(space, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sender:
            sender.bind((source, 0))
            sender.sendto(_icmp(type_, code, number), (target, 0))

    def answered(self, *tries: Try) -> list[str]:
        """Assert that every attempt is answered within ``PATIENCE_S``; returns the answers."""
        answers = self.ask(tries)
        for it, answer in zip(tries, answers, strict=True):
            assert answer and answer != "refused" and not answer.startswith("error"), f"{it}: {answer or 'silence'}"
        return answers

    def silent(self, *tries: Try) -> None:
        """Assert that no attempt is answered within ``QUIET_S``."""
        for it, answer in zip(tries, self.ask(tries, QUIET_S), strict=True):
            assert not answer, f"{it}: {answer}"

    def assert_answers(self, told: Mapping[Try, bool]) -> None:
        """Assert that exactly the attempts marked True are answered.

        The device may refuse those of its own guests to itself; all others must be silent. They come first, because an
        answered one leaves a conntrack entry that could admit others.
        """
        device = {it.cidr.partition("/")[0] for it in self.want.addresses}
        refusable = [
            it for it, allowed in told.items() if not allowed and it.space not in OUTSIDE and it.target in device
        ]
        self.silent(*(it for it, allowed in told.items() if not allowed and it not in refusable))
        for it, answer in zip(refusable, self.ask(refusable, QUIET_S), strict=True):
            assert answer in ("", "refused"), f"{it}: {answer}"
        self.answered(*(it for it, allowed in told.items() if allowed))

    def connect(self, space: str, target: str, port: int, source: str = "") -> socket.socket:
        """Open a TCP connection to a server of :meth:`serve` and read its greeting. The socket has a timeout."""
        client = self.open_socket(space, socket.SOCK_STREAM, 0, target)
        client.settimeout(PATIENCE_S)
        if source:
            client.bind((source, 0))
        client.connect((target, port))
        assert client.recv(200)
        return client


def echoes(connection: socket.socket, patience_s: float = PATIENCE_S) -> bool:
    """Whether a connection of :meth:`Lab.connect` still carries data in both directions."""
    connection.settimeout(patience_s)
    word = secrets.token_hex(8).encode()
    try:
        connection.sendall(word)
        data = b""
        while not data.endswith(word):
            more = connection.recv(4096)
            if not more:
                return False
            data += more
    except OSError:
        return False
    return True


def _icmp(type_: int, code: int, number: int) -> bytes:
    body = struct.pack("!HH", number, 1) + bytes(12)
    head = struct.pack("!BBH", type_, code, 0)
    total = sum(struct.unpack(f"!{len(head + body) // 2}H", head + body))
    total = (total >> 16) + (total & 0xFFFF)
    total += total >> 16
    return struct.pack("!BBH", type_, code, ~total & 0xFFFF) + body


def _is_reply(packet: bytes, expected: bytes) -> bool:
    # A raw IPv4 socket returns the IP header, a raw IPv6 socket does not.
    body = packet if expected[0] == 129 else packet[(packet[0] & 15) * 4 :]
    return body[:1] == expected[:1] and body[4:6] == expected[1:3]


def _route(route: Route) -> str:
    if route.kind != "unicast":
        return f"{route.kind} {route.destination} table {route.table}"
    words = [route.destination, "dev", route.link, "table", str(route.table)]
    words += ["via", route.via, "onlink"] if route.via else ["scope", "link"]
    words += ["src", route.source] if route.source else []
    return " ".join(words)


def _rule(rule: Rule) -> str:
    words = [f"priority {rule.priority} fwmark {rule.mark}/{rule.mask:#x} table {rule.table}"]
    for word, value in (("from", rule.source), ("to", rule.destination), ("iif", rule.iif)):
        words += [f"{word} {value}"] if value else []
    return " ".join(words)


def _entry(line: str) -> Entry:
    protocol = int(line.split()[3])
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"(\w+)=(\S+)", line):
        found.setdefault(key, []).append(value)
    ports: dict[str, Any] = {}
    if "sport" in found:
        ports = {
            "sport": int(found["sport"][0]), "dport": int(found["dport"][0]),
            "reply_sport": int(found["sport"][1]), "reply_dport": int(found["dport"][1]),
        }  # fmt: skip
    if "type" in found:
        ports = {"icmp_type": int(found["type"][0]), "icmp_code": int(found["code"][0]), "icmp_id": int(found["id"][0])}
    return Entry(
        protocol=protocol, src=found["src"][0], dst=found["dst"][0], reply_src=found["src"][1],
        reply_dst=found["dst"][1], mark=int(found["mark"][0]), **ports,
    )  # fmt: skip


def _write(key: str, value: str) -> None:
    with open("/proc/sys/" + key.replace(".", "/"), "w") as file:
        file.write(value)
