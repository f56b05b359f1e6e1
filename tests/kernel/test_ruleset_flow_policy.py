"""The flow policy and the kernel agree about every first packet, for random scopes.

With policy routing the policy may admit a flow that the kernel drops, because the ruleset filters its next packet. It
must not reject a flow that the kernel admits, because that flow would be ended.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings

from kernel.ruleset_lab import CLIENT, NEIGHBOUR, PATIENCE_S, STRANGER, VMS, Entry, Lab
from model.scope_strategies import ADDRESSES, scopes
from netloom.render.flows import ICMP, TCP, UDP, FlowPolicy
from netloom.render.marks import REVOKED
from netloom.state import Scope
from unit.scopes import A1, A2, B1, C1, GATEWAY, VM1, VM2, VM3, admit, egress, forward, static, wish

PORTS = (22, 53, 80, 85, 99, 443, 5003, 8080, 65535)
SENDERS = {"inet": (CLIENT, STRANGER), "nb": (NEIGHBOUR,), "vm1": (VM1,), "vm2": (VM2,)}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        # A TCP reset deletes the conntrack entry, so all machines drop their own resets, the device before conntrack.
        for space in (*VMS, "inet", "nb", "gw1", "gw2", "dev"):
            lab.nft(
                space, "table ip mute { chain out { type filter hook output priority -300; tcp flags rst drop; }; }\n"
            )
        yield lab


def _first_packets(lab: Lab) -> list[Entry]:
    """Send one packet of a new flow from every source to every target; returns the expected conntrack entries."""
    sent: list[Entry] = []
    sockets: list[socket.socket] = []
    number = 20000
    for space, sources in SENDERS.items():
        for source in sources:
            targets = [it.address for it in ADDRESSES]
            if space == "nb":  # the neighbour has routes to the guests
                targets += [GATEWAY, VM3]
            elif space != "inet":
                targets += [GATEWAY, STRANGER, "192.0.2.11", "203.0.113.1"]
            for target in targets:
                for kind, protocol in ((socket.SOCK_DGRAM, UDP), (socket.SOCK_STREAM, TCP)):
                    for port in PORTS:
                        number += 1
                        flow = lab.open_socket(space, kind)
                        sockets.append(flow)
                        flow.setblocking(False)
                        flow.bind((source, number))
                        with contextlib.suppress(BlockingIOError):
                            flow.connect((target, port))
                        if kind == socket.SOCK_DGRAM:
                            flow.send(b"?")
                        sent.append(Entry(protocol, source, target, "", "", sport=number, dport=port))
                for type_, code in ((8, 0), (8, 1), (13, 0)):
                    number += 1
                    lab.ping(space, source, target, type_, code, number)
                    sent.append(Entry(ICMP, source, target, "", "", icmp_type=type_, icmp_code=code, icmp_id=number))
    time.sleep(0.15)
    for flow in sockets:
        flow.close()
    return sent


def _original(it: Entry) -> tuple[object, ...]:
    return (it.protocol, it.src, it.dst, it.sport, it.dport, it.icmp_type, it.icmp_code, it.icmp_id)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@example(
    wish(
        admit(A1, "tcp", "22", f"{CLIENT}/32"), admit(A1, "udp", "80-100"), admit(A2, "all"), admit(B1, "icmp", type=8),
        admit(C1, "udp", "53"), admit(B1, "udp", "1-443", "10.1.1.0/24", f"{STRANGER}/32"),
        egress("udp", "80-90", dests=("192.0.2.0/28",)), egress("icmp", type=13), egress("tcp", "22"),
        held=(A1, A2, B1, C1), static=[static(B1, VM2), static(C1, VM1)],
        forwards=[forward(A1, "22", VM1), forward(A1, "80-90", VM2, "180-190", protocol="udp"),
                  forward(A1, "85", VM3, protocol="udp"), forward(A2, "5000-5009", VM1, "443")],
    )
)  # fmt: skip
@given(scopes())
def test_the_flow_policy_agrees_with_the_kernel(lab: Lab, scope: Scope) -> None:
    lab.renew(scope)
    sent = _first_packets(lab)
    policy = FlowPolicy(scope)
    # For a revoked flow the policy says "delete" exactly when its first packet would be admitted now.
    admitted = {it for it in sent if policy.action(replace(it, mark=REVOKED)) == "delete"}
    certain = set() if scope.pbr.routes else {_original(it) for it in admitted}
    until = time.monotonic() + PATIENCE_S
    while True:
        entries = {_original(it): it for it in lab.entries()}
        if certain <= entries.keys() or time.monotonic() > until:
            break
    for it in sent:
        entry = entries.get(_original(it))
        generous = bool(scope.pbr.routes) and it in admitted
        assert (entry is not None) == (it in admitted) or generous, it
        if entry is not None:
            assert policy.action(entry) == "keep", entry
