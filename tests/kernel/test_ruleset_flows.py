"""A revocation ends exactly the open flows that depended on it, whichever end sends next."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from msgspec.structs import replace

from kernel.agent_host import wait_until
from kernel.lost_connections import Listener, is_reset, opened
from kernel.ruleset_lab import CLIENT, CLIENT2, PATIENCE_S, STRANGER, VMS, Lab, Try, echoes
from netloom.render.marks import REVOKED
from netloom.state import Scope
from unit.scopes import A1, A2, B1, GATEWAY, VM1, VM2, VM3, admit, egress, forward, network, static, wish

QUIET_S = 0.4


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        for port in (22, 80, 5000):
            for vm in VMS:
                lab.serve(vm, "tcp", port)
            lab.serve("inet", "tcp", port, STRANGER)
            lab.serve("inet", "udp", port, STRANGER)
        yield lab


@dataclass
class Conversation:
    """A UDP flow in which both ends can send: ``server`` is bound, ``client`` is connected to it."""

    client: socket.socket
    server: socket.socket
    peer: tuple[str, int]

    def delivers(self, sender: str, patience_s: float = QUIET_S) -> bool:
        """Whether a datagram sent now by ``client`` or ``server`` reaches the other end."""
        word = f"{sender}{id(self)}".encode()
        listener = self.server if sender == "client" else self.client
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):
            while True:
                listener.recv(100)
        if sender == "client":
            self.client.send(word)
        else:
            self.server.sendto(word, self.peer)
        listener.settimeout(patience_s)
        try:
            return listener.recv(100) == word
        except TimeoutError:
            return False

    def works_both_ways(self) -> bool:
        return self.delivers("client", PATIENCE_S) and self.delivers("server", PATIENCE_S)

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture
def talk(lab: Lab) -> Iterator[Callable[..., Conversation]]:
    talks: list[Conversation] = []

    def begin(
        space: str, target: str, port: int, server: str, local: int = 0, at: int = 0, source: str = ""
    ) -> Conversation:
        """Open a flow to ``target:port`` that reaches ``server``. ``at`` is the server's own port if it differs."""
        ear = lab.open_socket(server, socket.SOCK_DGRAM)
        ear.bind((STRANGER if server == "inet" else "", at or port))
        mouth = lab.open_socket(space, socket.SOCK_DGRAM)
        mouth.bind((source or (CLIENT if space == "inet" else ""), local))
        mouth.connect((target, port))
        mouth.send(b"hello")
        ear.settimeout(PATIENCE_S)
        _, peer = ear.recvfrom(100)
        talks.append(Conversation(mouth, ear, peer))
        return talks[-1]

    yield begin
    for it in talks:
        it.close()


CASES: dict[str, tuple[Scope, Scope]] = {
    "the rule": (
        wish(admit(A1, "tcp", "22"), admit(A1, "udp", "53"), admit(A1, "tcp", "80"), admit(A1, "udp", "80"),
             held=(A1, A2), forwards=[forward(A1, "22", VM1), forward(A1, "80", VM2),
                                      forward(A1, "53", VM1, protocol="udp"), forward(A1, "80", VM2, protocol="udp")]),
        wish(admit(A1, "tcp", "80"), admit(A1, "udp", "80"),
             held=(A1, A2), forwards=[forward(A1, "22", VM1), forward(A1, "80", VM2),
                                      forward(A1, "53", VM1, protocol="udp"), forward(A1, "80", VM2, protocol="udp")]),
    ),
    "the forward": (
        wish(admit(A1, "all"), held=(A1, A2),
             forwards=[forward(A1, "22", VM1), forward(A1, "80", VM2),
                       forward(A1, "53", VM1, protocol="udp"), forward(A1, "80", VM2, protocol="udp")]),
        wish(admit(A1, "all"), held=(A1, A2),
             forwards=[forward(A1, "80", VM2), forward(A1, "80", VM2, protocol="udp")]),
    ),
    "the address": (
        wish(admit(A1, "all"), admit(A2, "all"), held=(A1, A2),
             forwards=[forward(A2, "22", VM1), forward(A1, "80", VM2),
                       forward(A2, "53", VM1, protocol="udp"), forward(A1, "80", VM2, protocol="udp")]),
        wish(admit(A1, "all"), admit(A2, "all"), held=(A1,),
             forwards=[forward(A2, "22", VM1), forward(A1, "80", VM2),
                       forward(A2, "53", VM1, protocol="udp"), forward(A1, "80", VM2, protocol="udp")]),
    ),
    "the static translation": (
        wish(admit(A1, "all"), admit(A2, "all"), held=(A1, A2), static=[static(A2, VM1)],
             forwards=[forward(A1, "80", VM2), forward(A1, "80", VM2, protocol="udp")]),
        wish(admit(A1, "all"), admit(A2, "all"), held=(A1, A2),
             forwards=[forward(A1, "80", VM2), forward(A1, "80", VM2, protocol="udp")]),
    ),
    "a prefix of the rule": (
        wish(admit(A1, "all", "", f"{CLIENT}/32", f"{CLIENT2}/32"), held=(A1,),
             forwards=[forward(A1, "22", VM1), forward(A1, "80", VM2),
                       forward(A1, "53", VM1, protocol="udp"), forward(A1, "80", VM2, protocol="udp")]),
        wish(admit(A1, "all", "", f"{CLIENT2}/32"), held=(A1,),
             forwards=[forward(A1, "22", VM1), forward(A1, "80", VM2),
                       forward(A1, "53", VM1, protocol="udp"), forward(A1, "80", VM2, protocol="udp")]),
    ),
}  # fmt: skip


@pytest.mark.mutation("a-flow-ends-with-what-allowed-it", instead='"keep"')
@pytest.mark.parametrize("revoked", CASES)
def test_defect_22_a_revocation_ends_only_the_flows_it_allowed(
    lab: Lab, talk: Callable[..., Conversation], revoked: str
) -> None:
    before, after = CASES[revoked]
    lab.renew(before)
    entry = A2 if revoked in ("the address", "the static translation") else A1
    other = CLIENT2 if revoked == "a prefix of the rule" else CLIENT
    tcp_ends = [lab.connect("inet", entry.address, 22, CLIENT), lab.connect("inet", entry.address, 22, CLIENT)]
    tcp_stays = [lab.connect("inet", A1.address, 80, other), lab.connect("vm1", STRANGER, 22)]
    udp_ends = [talk("inet", entry.address, 53, "vm1")]
    udp_stays = [talk("inet", A1.address, 80, "vm2", source=other)]
    try:
        assert all(echoes(it) for it in tcp_ends + tcp_stays)
        assert all(it.works_both_ways() for it in udp_ends + udp_stays)
        lab.apply(after)
        # On one flow the guest sends first, on the other the client. Then both send again.
        assert not udp_ends[0].delivers("server")
        assert not udp_ends[0].delivers("client")
        assert not udp_ends[0].delivers("server")
        assert not any(echoes(it, QUIET_S) for it in tcp_ends)
        stays = tcp_stays if revoked != "the static translation" else tcp_stays[:1]
        assert all(echoes(it) for it in stays)
        assert all(it.works_both_ways() for it in udp_stays)
        # When it is allowed again, the revoked flow works again.
        lab.apply(before)
        assert udp_ends[0].delivers("client", PATIENCE_S)
    finally:
        for it in tcp_ends + tcp_stays:
            it.close()


@pytest.mark.parametrize("first", ["client", "server"])
def test_a_revoked_udp_flow_stays_blocked_while_both_ends_send(
    lab: Lab, talk: Callable[..., Conversation], first: str
) -> None:
    """Without the mark the guest's next datagram would open a new outbound flow with the same ports."""
    before, after = CASES["the forward"]
    lab.renew(before)
    conversation = talk("inet", A1.address, 53, "vm1", local=4000)
    lab.apply(after)
    order = [first, "server" if first == "client" else "client"] * 3
    assert [conversation.delivers(it) for it in order] == [False] * 6
    marked = [it for it in lab.entries() if it.mark & REVOKED]
    assert [(it.src, it.dst, it.dport) for it in marked] == [(CLIENT, A1.address, 53)]
    # Judging the flows again changes nothing.
    lab.enforce_flows(before)
    assert [it.mark for it in lab.entries() if it.dport == 53] == [marked[0].mark]


def test_tcp_without_a_handshake_is_not_accepted_from_either_end(lab: Lab) -> None:
    """Both ends of the revoked connection get a reset. The public address is also that of the guests' connections."""
    lab.renew(wish(admit(A1, "tcp", "2200"), forwards=[forward(A1, "2200", VM1)]))
    for first in ("client", "server"):
        with opened(lab, "inet", A1.address, 2200, Listener("vm1", 2200), CLIENT) as connection:
            lab.apply(wish(forwards=[forward(A1, "2200", VM1)]))
            assert connection.ends_are_reset(first)
            assert not [it for it in lab.entries() if 2200 in (it.sport, it.dport)]
            lab.apply(wish(admit(A1, "tcp", "2200"), forwards=[forward(A1, "2200", VM1)]))


def test_a_closed_address_stays_silent_after_a_revocation(lab: Lab) -> None:
    before = wish(admit(A2, "tcp", "2200"), held=(A1, A2), forwards=[forward(A2, "2200", VM1)])
    lab.renew(before)
    with opened(lab, "inet", A2.address, 2200, Listener("vm1", 2200), CLIENT) as connection:
        lab.apply(wish(held=(A1, A2), forwards=[forward(A2, "2200", VM1)]))
        for _ in range(2):
            assert not is_reset(connection.client, QUIET_S)
        assert is_reset(connection.server)
        assert not [it for it in lab.entries() if 2200 in (it.sport, it.dport)]


def test_denied_egress_ends_flows_of_guests_in_both_directions(lab: Lab, talk: Callable[..., Conversation]) -> None:
    lab.renew(wish(held=(A1,)))
    ends, stays = lab.connect("vm1", STRANGER, 22), lab.connect("vm2", STRANGER, 22)
    spoken = talk("vm1", STRANGER, 5001, "inet")
    with ends, stays:
        lab.apply(wish(egress("all", sources=(f"{VM1}/32",)), held=(A1,)))
        assert not echoes(ends, QUIET_S)
        assert [spoken.delivers(it) for it in ("server", "client", "server")] == [False] * 3
        assert echoes(stays)


def test_a_continuous_ping_stops_when_its_rule_is_revoked(lab: Lab) -> None:
    lab.renew(wish(admit(A1, "icmp"), held=(A1,)))
    lab.answered(Try("inet", "icmp", A1.address, source=CLIENT))
    lab.apply(wish(held=(A1,)))
    lab.silent(Try("inet", "icmp", A1.address, source=CLIENT))
    assert not [it for it in lab.entries() if it.protocol == 1 and it.dst == A1.address and it.src == CLIENT]


def test_a_hairpin_flow_ends_when_its_forward_is_removed(lab: Lab, talk: Callable[..., Conversation]) -> None:
    before = wish(admit(A1, "all"), forwards=[forward(A1, "22", VM1), forward(A1, "53", VM1, protocol="udp")])
    lab.renew(before)
    spoken = talk("vm2", A1.address, 53, "vm1")
    with lab.connect("vm2", A1.address, 22) as ends:
        assert echoes(ends)
        assert spoken.works_both_ways()
        lab.apply(wish(admit(A1, "all")))
        assert not echoes(ends, QUIET_S)
        assert [spoken.delivers(it) for it in ("server", "client", "server")] == [False] * 3


def test_a_moved_forward_redirects_its_clients(lab: Lab, talk: Callable[..., Conversation]) -> None:
    """The old guest keeps sending. Its datagrams do not reach the client and do not block the new guest."""
    lab.renew(wish(admit(A1, "udp"), forwards=[forward(A1, "53", VM1, protocol="udp")]))
    spoken = talk("inet", A1.address, 53, "vm1", local=4100)
    lab.apply(wish(admit(A1, "udp"), forwards=[forward(A1, "53", VM2, protocol="udp")]))
    assert not spoken.delivers("server")
    heir = lab.open_socket("vm2", socket.SOCK_DGRAM)
    with heir:
        heir.bind(("", 53))
        heir.settimeout(PATIENCE_S)
        spoken.client.send(b"still there?")
        data, peer = heir.recvfrom(100)
        assert data == b"still there?"
        assert not spoken.delivers("server")
        heir.sendto(b"here", peer)
        spoken.client.settimeout(PATIENCE_S)
        assert spoken.client.recv(100) == b"here"


class Pings:
    """A guest that pings the same host without end, always with the same number."""

    def __init__(self, lab: Lab, space: str, target: str) -> None:
        self._socket = lab.open_socket(space, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
        self._socket.bind(("", 4711))
        self._socket.connect((target, 0))
        self._socket.settimeout(PATIENCE_S)

    def are_answered(self) -> bool:
        self._socket.send(b"\x08" + bytes(15))
        return bool(self._socket.recv(100))

    def close(self) -> None:
        self._socket.close()


@pytest.mark.mutation("datagrams-follow-a-static-nat", instead="True")
def test_datagrams_follow_the_static_nat_of_their_guest_and_tcp_stays(
    lab: Lab, talk: Callable[..., Conversation]
) -> None:
    before = wish(admit(B1, "icmp"), held=(A1, A2, B1))
    lab.renew(before)
    spoken, neighbours = talk("vm2", STRANGER, 5002, "inet"), talk("vm1", STRANGER, 5001, "inet")
    pings = Pings(lab, "vm2", STRANGER)

    def source() -> str:
        """The address with which the server sees the guest's next datagram; the ping must have the same."""
        assert pings.are_answered()
        spoken.client.send(b"?")
        spoken.server.settimeout(PATIENCE_S)
        sources = {it.reply_dst for it in lab.entries() if it.protocol == 1 and it.src == VM2}
        seen = spoken.server.recvfrom(100)[1][0]
        assert sources == {seen}
        return str(seen)

    with contextlib.closing(pings), lab.connect("vm2", STRANGER, 22) as stays:
        assert source() == A1.address
        for address in (B1, A2):
            lab.apply(replace(before, static_nats={address.address: static(address, VM2)}))
            assert source() == address.address
            assert echoes(stays)
            # Also when something else is revoked later.
            lab.apply(replace(before, static_nats={address.address: static(address, VM2)}, networks=wish().networks))
            assert source() == address.address
            assert echoes(stays)
        with lab.connect("vm2", STRANGER, 80) as ends:
            lab.apply(before)
            assert source() == A1.address
            assert echoes(stays)
            assert not echoes(ends, QUIET_S)
        assert neighbours.works_both_ways()


@pytest.mark.mutation("datagrams-leave-a-forwarded-port", instead="True")
def test_a_flow_gives_its_port_to_a_new_forward(lab: Lab, talk: Callable[..., Conversation]) -> None:
    before = wish(admit(A1, "udp"))
    lab.renew(before)
    spoken = talk("vm1", STRANGER, 5003, "inet", local=5100)
    assert spoken.peer == (A1.address, 5100)
    lab.apply(wish(admit(A1, "udp"), forwards=[forward(A1, "5100", VM2, protocol="udp")]))
    spoken.client.send(b"again")
    spoken.server.settimeout(PATIENCE_S)
    _, peer = spoken.server.recvfrom(100)
    assert peer[0] == A1.address and peer[1] != 5100
    heir = lab.open_socket("vm2", socket.SOCK_DGRAM)
    with heir:
        heir.bind(("", 5100))
        heir.settimeout(PATIENCE_S)
        spoken.server.sendto(b"to the forward", (A1.address, 5100))
        assert heir.recv(100) == b"to the forward"


def test_removing_a_vlan_keeps_flows_over_another(lab: Lab) -> None:
    """The VLAN's link, routes and rule are removed and later added again."""
    both = [forward(A1, "22", VM1), forward(B1, "22", VM2)]
    before = wish(admit(A1, "tcp"), admit(B1, "tcp"), held=(A1, B1), forwards=both)
    lab.renew(before)
    stays = [lab.connect("inet", A1.address, 22, CLIENT), lab.connect("vm1", STRANGER, 22)]
    ends = lab.connect("inet", B1.address, 22, CLIENT)
    try:
        assert all(echoes(it) for it in (*stays, ends))
        lab.apply(replace(before, public_ips={A1.address: A1}))
        assert all(echoes(it) for it in stays)
        assert not echoes(ends, QUIET_S)
        assert not [it for it in lab.entries() if it.dst == B1.address]
        lab.apply(before)
        lab.answered(Try("inet", "tcp", B1.address, 22, CLIENT2))
        assert all(echoes(it) for it in stays)
    finally:
        for it in (*stays, ends):
            it.close()


def test_changing_the_source_nat_address_ends_flows_of_the_old_one(lab: Lab, talk: Callable[..., Conversation]) -> None:
    lab.renew(wish(held=(A1, A2)))
    spoken = talk("vm1", STRANGER, 5003, "inet")
    with lab.connect("vm1", STRANGER, 22) as ends:
        lab.apply(wish(held=(replace(A1, source_nat=False), replace(A2, source_nat=True))))
        assert not echoes(ends, QUIET_S)
        assert not spoken.delivers("server")
        spoken.client.send(b"again")  # a new flow with the new address
        spoken.server.settimeout(PATIENCE_S)
        data, peer = spoken.server.recvfrom(100)
        assert (data, peer[0]) == (b"again", A2.address)


@pytest.mark.mutation("a-new-address-redirects-open-flows")
def test_a_flow_to_an_outside_address_follows_it_when_it_moves_inside(lab: Lab) -> None:
    """An address moves here from another network. A guest that kept sending to it now reaches the local target."""
    lab.renew(wish(held=(A1,)))
    with lab.open_socket("vm1", socket.SOCK_DGRAM) as mouth, lab.open_socket("vm2", socket.SOCK_DGRAM) as ear:
        ear.bind(("", 5004))
        mouth.connect((A2.address, 5004))
        mouth.send(b"outward")
        wait_until(lambda: [it.reply_dst for it in lab.entries() if it.dport == 5004] == [A1.address])
        lab.apply(wish(admit(A2, "udp"), held=(A1, A2), forwards=[forward(A2, "5004", VM2, protocol="udp")]))
        mouth.send(b"inward")
        ear.settimeout(PATIENCE_S)
        assert ear.recv(100) == b"inward"


def test_flows_with_the_device_itself_survive_changes(lab: Lab) -> None:
    lab.serve("dev", "tcp", 80)
    before, after = CASES["the rule"]
    lab.renew(before)
    with lab.connect("vm1", GATEWAY, 80) as stays:
        lab.apply(after)
        lab.apply(wish(allow_egress=False, held=(A1,)))
        assert echoes(stays)


def test_a_long_transfer_survives_a_hundred_rule_changes(lab: Lab) -> None:
    size = 16 << 20
    block = bytes(range(256)) * 256
    base = wish(admit(A1, "tcp", "7000"), held=(A1, A2), forwards=[forward(A1, "7000", VM1)])
    lab.renew(base)
    listener = lab.open_socket("vm1", socket.SOCK_STREAM)
    listener.bind(("", 7000))
    listener.listen(2)
    listener.settimeout(30)
    failures: list[str] = []
    changing = threading.Event()
    changing.set()

    def send(connection: socket.socket) -> None:
        connection.settimeout(30)
        try:
            sent = 0
            while sent < size or changing.is_set():
                connection.sendall(block)
                sent += len(block)
                time.sleep(0.003)  # leave processor time for the rule changes
            connection.shutdown(socket.SHUT_WR)
        except OSError as error:
            failures.append(f"send: {error!r}")

    def receive(connection: socket.socket) -> None:
        connection.settimeout(30)
        at = 0
        try:
            while data := connection.recv(1 << 20):
                start = at % len(block)
                if data != (block * (len(data) // len(block) + 2))[start : start + len(data)]:
                    failures.append(f"wrong bytes at {at}")
                    return
                at += len(data)
            if at < size:
                failures.append(f"ended at {at}")
        except OSError as error:
            failures.append(f"receive: {error!r}")

    inward = lab.open_socket("inet", socket.SOCK_STREAM)
    inward.settimeout(30)
    inward.bind((CLIENT, 0))
    inward.connect((A1.address, 7000))
    inside, _ = listener.accept()
    outside = lab.open_socket("inet", socket.SOCK_STREAM)
    outside.bind((STRANGER, 7001))
    outside.listen(1)
    outside.settimeout(30)
    outward = lab.open_socket("vm2", socket.SOCK_STREAM)
    outward.settimeout(30)
    outward.connect((STRANGER, 7001))
    far, _ = outside.accept()
    jobs = [
        threading.Thread(target=work, args=(it,))
        for work, it in ((send, inward), (receive, inside), (send, outward), (receive, far))
    ]
    with listener, inward, inside, outside, outward, far:
        for job in jobs:
            job.start()
        for change in range(100):
            scope = [
                base,
                replace(base, port_forwards={**base.port_forwards, "x": forward(A2, str(100 + change), VM3)}),
                replace(base, static_nats={A2.address: static(A2, VM3)}),
                replace(base, networks={"204": network()}, ingress_open=True),
                replace(base, public_ips={A1.address: A1}),
                wish(admit(A1, "tcp", "6000-8000"), admit(A1, "udp", str(change + 1)), egress("udp"), held=(A1, A2, B1),
                     forwards=[forward(A1, "7000", VM1)], allow_egress=True),
            ][change % 6]  # fmt: skip
            lab.apply(scope)
        changing.clear()
        for job in jobs:
            job.join(120)
    assert failures == []
