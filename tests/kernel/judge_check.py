"""Compares the flow judge of ``netloom.render.flows`` with what the kernel has just let through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kernel.ruleset_lab import Entry, Lab, Try
from netloom.render.flows import ICMP, ICMPV6, TCP, UDP, FlowPolicy
from netloom.render.marks import REVOKED


def agree(lab: Lab, tried: Mapping[Try, str]) -> None:
    """Assert that the flow judge admits exactly the attempts that the kernel admitted, as its conntrack entries show.

    ``tried`` holds attempts just made, with their source addresses. Source ports do not matter: no rule matches them.
    """
    judge = FlowPolicy(lab.scope)
    stands = {_what(it): it for it in lab.entries()}
    for it, source in tried.items():
        kinds = {"tcp": TCP, "udp": UDP, "icmp": ICMPV6 if ":" in it.target else ICMP}
        flow = Entry(kinds[it.protocol], source, it.target, "", "", mark=REVOKED)
        if it.protocol == "icmp":
            flow = replace(flow, icmp_type=it.port >> 8, icmp_code=it.port & 255)
        else:
            flow = replace(flow, sport=40000, dport=it.port)
        assert (judge.action(flow) == "delete") == (_what(flow) in stands), it
    for entry in stands.values():
        assert judge.action(entry) == "keep", entry


def _what(it: Entry) -> tuple[object, ...]:
    return (it.protocol, it.src, it.dst, it.dport, it.icmp_type, it.icmp_code)
