"""SIP (RFC 3261, RFC 4566), PPTP (RFC 2637) and FTP with conntrack helpers, and what they must not open."""

from __future__ import annotations

import re
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from msgspec.structs import replace

from kernel.ftp_control import Control, expectations, numbers
from kernel.ruleset_lab import CLIENT, PATIENCE_S, QUIET_S, STRANGER, Lab, Try
from netloom.agent.host import flows
from netloom.state import Backend, LbRule, Scope
from unit.scopes import A1, A2, GATEWAY, VM1, VM2, VM3, admit, forward, static, wish


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


INWARD = wish(
    admit(A2, "udp", "5060"), admit(A1, "udp", "5070"), held=(A1, A2), static=[static(A2, VM2)],
    forwards=[forward(A1, "5070", VM1, "5060", "udp")],
)  # fmt: skip


def with_helpers(scope: Scope, *helpers: str) -> Scope:
    return replace(scope, helpers=helpers)


class Phone:
    """A SIP user agent over UDP; it announces its RTP port in the session description."""

    def __init__(self, lab: Lab, space: str, address: str, port: int = 5060, rtp: int = 40000) -> None:
        self.address, self.port, self.rtp_port = address, port, rtp
        self.sip, self.rtp, self.rtcp = (lab.open_socket(space, socket.SOCK_DGRAM) for _ in range(3))
        for sock, at in ((self.sip, port), (self.rtp, rtp), (self.rtcp, rtp + 1)):
            sock.bind((address, at))
            sock.settimeout(PATIENCE_S)

    def __enter__(self) -> Phone:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in (self.sip, self.rtp, self.rtcp):
            sock.close()

    def session(self, announced: str = "") -> str:
        where = announced or self.address
        lines = ["v=0", f"o=u 1 1 IN IP4 {where}", "s=-", f"c=IN IP4 {where}", "t=0 0"]
        return "\r\n".join([*lines, f"m=audio {self.rtp_port} RTP/AVP 0", ""])

    def invite(self, to: tuple[str, int], announced: str = "") -> None:
        body = self.session(announced)
        text = (
            f"INVITE sip:b@{to[0]}:{to[1]} SIP/2.0\r\nVia: SIP/2.0/UDP {self.address}:{self.port};branch=z9hG4bK1\r\n"
            f"From: <sip:a@{self.address}>;tag=1\r\nTo: <sip:b@{to[0]}>\r\nCall-ID: 1@{self.address}\r\n"
            f"CSeq: 1 INVITE\r\nContact: <sip:a@{self.address}:{self.port}>\r\nMax-Forwards: 70\r\n"
            f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        )
        self.sip.sendto(text.encode(), to)

    def answer(self) -> tuple[tuple[str, int], tuple[str, int]]:
        """Accept a call. Returns where the caller's signalling comes from, and where it wants the RTP."""
        data, peer = self.sip.recvfrom(4096)
        text = data.decode()
        kept = [it for it in text.split("\r\n") if re.match("Via|From|To|Call-ID|CSeq", it)]
        body = self.session()
        reply = "\r\n".join(
            ["SIP/2.0 200 OK", *kept, f"Contact: <sip:b@{self.address}:{self.port}>", "Content-Type: application/sdp",
             f"Content-Length: {len(body)}", "", body]
        )  # fmt: skip
        self.sip.sendto(reply.encode(), peer)
        return peer, media(text)

    def register(self, at: tuple[str, int], registrar: Phone) -> tuple[str, int]:
        """Register at a registrar, which accepts. Returns where the registrar sends calls."""
        contact = f"<sip:a@{self.address}:{self.port}>"
        text = (
            f"REGISTER sip:{at[0]} SIP/2.0\r\nVia: SIP/2.0/UDP {self.address}:{self.port};branch=z9hG4bK2\r\n"
            f"From: <sip:a@{at[0]}>;tag=2\r\nTo: <sip:a@{at[0]}>\r\nCall-ID: 2@{self.address}\r\n"
            f"CSeq: 1 REGISTER\r\nContact: {contact}\r\nExpires: 3600\r\nContent-Length: 0\r\n\r\n"
        )
        self.sip.sendto(text.encode(), at)
        data, peer = registrar.sip.recvfrom(4096)
        asked = data.decode()
        kept = [it for it in asked.split("\r\n") if re.match("Via|From|To|Call-ID|CSeq|Contact|Expires", it)]
        registrar.sip.sendto("\r\n".join(["SIP/2.0 200 OK", *kept, "Content-Length: 0", "", ""]).encode(), peer)
        assert self.sip.recv(4096).startswith(b"SIP/2.0 200")
        found = re.search(r"Contact: <sip:a@([0-9.]+):(\d+)", asked)
        assert found
        return found[1], int(found[2])

    def answered(self) -> tuple[str, int]:
        return media(self.sip.recv(4096).decode())


def media(text: str) -> tuple[str, int]:
    """Where a session description wants the RTP."""
    address, port = re.search(r"c=IN IP4 (\S+)", text), re.search(r"m=audio (\d+)", text)
    assert address and port, text
    return address[1], int(port[1])


def arrives(sender: socket.socket, to: tuple[str, int], receiver: socket.socket, *, patience_s: float) -> bool:
    receiver.settimeout(patience_s)
    sender.sendto(b"sound", to)
    try:
        return receiver.recv(100) == b"sound"
    except TimeoutError:
        return False


@pytest.mark.parametrize("named", [(), ("sip",)], ids=["none", "sip"])
def test_a_sip_call_to_the_outside_has_sound_with_its_helper_only(lab: Lab, named: tuple[str, ...]) -> None:
    lab.renew(with_helpers(wish(held=(A1, A2)), *named))
    works, patience_s = bool(named), PATIENCE_S if named else QUIET_S
    with Phone(lab, "vm1", VM1) as ours, Phone(lab, "inet", STRANGER) as theirs:
        ours.invite((STRANGER, 5060))
        _, (address, port) = theirs.answer()
        assert address == (A1.address if works else VM1)
        assert ours.answered() == (STRANGER, theirs.rtp_port)
        with lab.open_socket("inet", socket.SOCK_DGRAM) as other:
            other.bind((CLIENT, theirs.rtp_port))
            assert not arrives(other, (A1.address, port), ours.rtp, patience_s=QUIET_S)
        assert arrives(theirs.rtp, (A1.address, port), ours.rtp, patience_s=patience_s) == works
        assert arrives(theirs.rtcp, (A1.address, port + 1), ours.rtcp, patience_s=patience_s) == works


@pytest.mark.parametrize("named", [(), ("sip",)], ids=["none", "sip"])
@pytest.mark.parametrize(
    ("vm", "address", "target"),
    [("vm2", VM2, (A2.address, 5060)), ("vm1", VM1, (A1.address, 5070))],
    ids=["static", "forward"],
)
def test_a_sip_call_to_a_vm_has_sound_with_its_helper_only(
    lab: Lab, vm: str, address: str, target: tuple[str, int], named: tuple[str, ...]
) -> None:
    lab.renew(with_helpers(INWARD, *named))
    works, patience_s = bool(named), PATIENCE_S if named else QUIET_S
    with Phone(lab, vm, address) as ours, Phone(lab, "inet", CLIENT) as theirs:
        theirs.invite(target)
        _, caller = ours.answer()
        told, port = theirs.answered()
        assert told == (target[0] if works else address)
        assert arrives(theirs.rtp, (target[0], port), ours.rtp, patience_s=patience_s) == works
        assert arrives(ours.rtp, caller, theirs.rtp, patience_s=PATIENCE_S)


def test_the_sound_of_a_call_follows_a_static_nat_of_its_vm(lab: Lab) -> None:
    before = with_helpers(wish(admit(A2, "all"), held=(A1, A2)), "sip")
    after = replace(before, static_nats={A2.address: static(A2, VM1)})
    lab.renew(before)
    with Phone(lab, "vm1", VM1) as ours, Phone(lab, "inet", STRANGER) as theirs:
        ours.invite((STRANGER, 5060))
        _, there = theirs.answer()
        ours.answered()
        assert arrives(theirs.rtp, there, ours.rtp, patience_s=PATIENCE_S)
        lab.apply(after, settle=False)
        flows.enforce(lab.ns("dev"), before, after)
        ours.rtp.sendto(b"sound", (STRANGER, theirs.rtp_port))
        data, peer = theirs.rtp.recvfrom(100)
        assert (data, peer[0]) == (b"sound", A2.address)
        assert arrives(theirs.rtp, peer, ours.rtp, patience_s=PATIENCE_S)


@pytest.mark.mutation("an-announced-call-is-judged-by-its-registration", instead="{}")
def test_a_call_to_a_vm_goes_on_when_another_rule_is_removed(lab: Lab) -> None:
    """The registrar calls from another port, so the signalling itself was announced: by the registration."""
    before = with_helpers(wish(admit(A2, "all"), held=(A1, A2)), "sip")
    after = replace(before, networks=wish().networks)
    lab.renew(before)
    with Phone(lab, "vm1", VM1) as ours, Phone(lab, "inet", STRANGER) as registrar:
        contact = ours.register((STRANGER, 5060), registrar)
        with Phone(lab, "inet", STRANGER, 5080, 40010) as theirs:
            theirs.invite(contact)
            _, there = ours.answer()
            to = theirs.answered()
            assert to[0] == A1.address
            assert arrives(theirs.rtp, to, ours.rtp, patience_s=PATIENCE_S)
            lab.apply(after, settle=False)
            flows.enforce(lab.ns("dev"), before, after)
            assert arrives(theirs.rtp, to, ours.rtp, patience_s=PATIENCE_S)
            assert arrives(ours.rtp, there, theirs.rtp, patience_s=PATIENCE_S)


@pytest.mark.parametrize("third", [VM3, GATEWAY, A1.address, A2.address, CLIENT])
def test_a_session_description_opens_nothing_to_another_machine(lab: Lab, third: str) -> None:
    lab.renew(with_helpers(INWARD, "sip"))
    with Phone(lab, "vm1", VM1) as ours, Phone(lab, "inet", STRANGER) as theirs:
        ours.invite((STRANGER, 5060), third)
        assert theirs.answer()[1] == (third, ours.rtp_port)
        ours.answered()
        # What the peer announced about itself is open, for the caller only.
        expected = expectations(lab)
        assert {it[:2] for it in expected} == {(VM1, STRANGER)}, expected


# ---- PPTP


_MAGIC = 0x1A2B3C4D  # RFC 2637 section 1.4
_GRE = 47


def message(kind: int, body: bytes) -> bytes:
    return struct.pack("!HHIHH", 12 + len(body), 1, _MAGIC, kind, 0) + body


def received(sock: socket.socket, kind: int) -> bytes:
    """The body of the next control message, which must be of this kind."""
    length = struct.unpack("!H", sock.recv(2, socket.MSG_WAITALL))[0]
    data = sock.recv(length - 2, socket.MSG_WAITALL)
    assert struct.unpack("!H", data[6:8])[0] == kind
    return data[10:]


class Tunnel:
    """A PPTP call of a VM, which has call 7 on its side, to a server outside. Both ends have a socket for GRE."""

    def __init__(self, lab: Lab, vm: str, peer: str, call: int) -> None:
        self.vm, self.peer = vm, peer
        with lab.open_socket("inet", socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((peer, 1723))
            listener.listen(1)
            listener.settimeout(PATIENCE_S)
            self.client = lab.open_socket(vm, socket.SOCK_STREAM)
            self.client.settimeout(PATIENCE_S)
            self.client.connect((peer, 1723))
            self.server, _ = listener.accept()
            self.server.settimeout(PATIENCE_S)
        self.inside, self.outside = (lab.open_socket(it, socket.SOCK_RAW, _GRE) for it in (vm, "inet"))
        self.outside.bind((peer, 0))
        self.client.sendall(message(1, struct.pack("!HHIIHH", 0x100, 0, 1, 1, 0, 1) + bytes(128)))
        received(self.server, 1)
        self.server.sendall(message(2, struct.pack("!HBBIIHH", 0x100, 1, 0, 1, 1, 0, 1) + bytes(128)))
        received(self.client, 2)
        self.client.sendall(message(7, struct.pack("!HHIIIIHHHH", 7, 1, 1, 1, 3, 3, 64, 0, 0, 0) + bytes(128)))
        # The device may replace the VM's call number, so that no two VMs have the same one.
        self.to_vm = struct.unpack("!H", received(self.server, 7)[:2])[0]
        self.server.sendall(message(8, struct.pack("!HHBBHIHHI", call, self.to_vm, 1, 0, 0, 1, 64, 0, 0)))
        self.to_server, own = struct.unpack("!HH", received(self.client, 8)[:4])
        assert own == 7

    def close(self) -> None:
        for it in (self.client, self.server, self.inside, self.outside):
            it.close()

    def goes_out(self) -> bool:
        self.inside.sendto(_packet(self.to_server, self.vm), (self.peer, 0))
        return _arrived(self.outside, self.to_server, self.vm, PATIENCE_S)

    def comes_in(self, patience_s: float) -> bool:
        self.outside.sendto(_packet(self.to_vm, self.vm), (A1.address, 0))
        return _arrived(self.inside, 7, self.vm, patience_s)


def _packet(call: int, text: str) -> bytes:
    """Enhanced GRE with a sequence number (RFC 2637 section 4.1)."""
    return struct.pack("!HHHHI", 0x3001, 0x880B, len(text), call, 1) + text.encode()


def _arrived(sock: socket.socket, call: int, text: str, patience_s: float) -> bool:
    """Whether a packet with this call number and text came. A raw socket gets those of other calls too."""
    until = time.monotonic() + patience_s
    while (left := until - time.monotonic()) > 0:
        sock.settimeout(left)
        try:
            data = sock.recv(2048)
        except TimeoutError:
            return False
        data = data[(data[0] & 15) * 4 :]
        if (struct.unpack("!H", data[6:8])[0], data[12:]) == (call, text.encode()):
            return True
    return False


@pytest.mark.parametrize("peers", [(STRANGER, CLIENT), (STRANGER, STRANGER)], ids=["two-peers", "one-peer"])
def test_pptp_of_two_vms_works_with_its_helper(lab: Lab, peers: tuple[str, str]) -> None:
    lab.renew(with_helpers(wish(held=(A1, A2)), "pptp"))
    tunnels = [Tunnel(lab, *it) for it in zip(("vm1", "vm2"), peers, (100, 101), strict=True)]
    try:
        assert [it.goes_out() for it in tunnels] == [True, True]
        assert [it.comes_in(PATIENCE_S) for it in tunnels] == [True, True]
    finally:
        for it in tunnels:
            it.close()


def test_pptp_without_its_helper_gets_no_packets_in(lab: Lab) -> None:
    lab.renew(wish(held=(A1, A2)))
    tunnel = Tunnel(lab, "vm1", STRANGER, 100)
    try:
        assert not tunnel.comes_in(QUIET_S)
    finally:
        tunnel.close()


# ---- FTP


def test_ftp_announces_nothing_for_another_machine(lab: Lab) -> None:
    scope = wish(admit(A2, "tcp", "21"), held=(A1, A2), static=[static(A2, VM2)])
    lab.renew(with_helpers(scope, "ftp"))
    others = (VM3, GATEWAY, A1.address, STRANGER)
    with Control(lab, "vm1", "inet", (STRANGER, 21), (STRANGER, 21)) as control:
        for it in (*others, CLIENT):
            told = f"PORT {numbers(it, 22)}"
            assert control.ask(told, "425 no")[0] == told
            if it != STRANGER:
                control.ask("PASV", f"227 Entering ({numbers(it, 22)})")
    with Control(lab, "inet", "vm2", (A2.address, 21), (VM2, 21)) as control:
        for it in others:
            told = f"227 Entering ({numbers(it, 22)})"
            assert control.ask("PASV", told)[1] == told
    assert expectations(lab) == []


def test_an_offer_over_irc_opens_the_port_of_its_vm_only(lab: Lab) -> None:
    """DCC: the helper reads the client's lines, and any host may take the offer."""
    lab.renew(with_helpers(wish(held=(A1, A2)), "irc"))
    lab.serve("vm1", "tcp", 5000)
    with Control(lab, "vm1", "inet", (STRANGER, 6667), (STRANGER, 6667)) as control:
        for machine in (VM3, CLIENT):
            control.ask(offer(machine, 5000), "PONG")
        assert expectations(lab) == []
        assert control.ask(offer(VM1, 5000), "PONG")[0] == offer(A1.address, 5000)
        lab.silent(Try("inet", "tcp", A1.address, 5001, CLIENT))
        lab.answered(Try("inet", "tcp", A1.address, 5000, CLIENT))
        lab.silent(Try("inet", "tcp", A1.address, 5000, CLIENT))


def offer(address: str, port: int) -> str:
    number = struct.unpack("!I", socket.inet_aton(address))[0]
    return f"PRIVMSG you :\1DCC SEND file {number} {port}\1"


def test_an_announced_port_wins_over_a_forward_for_one_connection_of_its_peer(lab: Lab) -> None:
    """Documented, because a VM of the same network must cooperate."""
    scope = wish(admit(A1, "tcp", "2222"), held=(A1, A2), forwards=[forward(A1, "2222", VM3, "22")])
    lab.renew(with_helpers(scope, "ftp"))
    lab.serve("vm1", "tcp", 2222)
    lab.serve("vm3", "tcp", 22)
    with Control(lab, "vm1", "inet", (STRANGER, 21), (STRANGER, 21)) as control:
        control.ask(f"PORT {numbers(VM1, 2222)}", "200 yes")
        answers = [
            lab.answered(Try("inet", "tcp", A1.address, 2222, source))[0].split()[0]
            for source in (CLIENT, STRANGER, STRANGER)
        ]
    assert answers == ["vm3", "vm1", "vm3"]


@pytest.mark.mutation("a-connection-to-the-device-has-no-helper", instead='f"iifname {GUEST_LINKS}"')
def test_a_backend_of_balanced_ftp_opens_no_port_of_the_public_address(lab: Lab) -> None:
    """Otherwise a VM and a backend that work together would pass the firewall of every forward."""
    balanced = LbRule(
        rule_id=1, public_ip=A1.address, public_port=21, protocol="tcp", algorithm="roundrobin",
        backends=(Backend(ip=VM2, port=21),), network_id="204",
    )  # fmt: skip
    scope = wish(admit(A1, "tcp", "21"), held=(A1, A2), forwards=[forward(A1, "2222", VM3, "22")])
    lab.renew(replace(with_helpers(scope, "ftp"), lb_rules={"1": balanced}))
    lab.serve("vm3", "tcp", 22)
    with Control(lab, "vm1", "dev", (A1.address, 21), (A1.address, 21)) as control:
        control.ask("PASV", f"227 Entering ({numbers(A1.address, 2222)})")
        lab.silent(Try("vm1", "tcp", A1.address, 2222))
        assert expectations(lab) == []


def test_passive_ftp_works_for_another_vm_of_the_network(lab: Lab) -> None:
    scope = wish(admit(A2, "tcp", "21"), held=(A1, A2), static=[static(A2, VM2)])
    lab.renew(with_helpers(scope, "ftp"))
    lab.serve("vm2", "tcp", 2999)
    with Control(lab, "vm1", "vm2", (A2.address, 21), (VM2, 21)) as control:
        for said, wanted in (
            (f"227 Entering ({numbers(VM2, 2999)})", numbers(A2.address, 2999)),
            ("229 (|||2999|)",) * 2,
        ):
            assert wanted in control.ask("PASV", said)[1]
            lab.answered(Try("vm1", "tcp", A2.address, 2999))
