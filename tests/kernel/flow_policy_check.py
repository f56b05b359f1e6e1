"""Compares the flow policy (``netloom.render.flows``) with the packets that the kernel has just accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kernel.ruleset_lab import Entry, Lab, Try
from netloom.render.flows import ICMP, ICMPV6, TCP, UDP, FlowPolicy
from netloom.render.marks import REVOKED


def agree(lab: Lab, tried: Mapping[Try, str]) -> None:
    """Assert that the flow policy allows exactly the attempts that the kernel accepted, as its conntrack entries show.

    ``tried`` holds attempts just made, with their source addresses. Source ports do not matter: no rule matches them.
    """
    policy = FlowPolicy(lab.scope)
    entries = {_what(it): it for it in lab.entries()}
    for it, source in tried.items():
        kinds = {"tcp": TCP, "udp": UDP, "icmp": ICMPV6 if ":" in it.target else ICMP}
        flow = Entry(kinds[it.protocol], source, it.target, "", "", mark=REVOKED)
        if it.protocol == "icmp":
            flow = replace(flow, icmp_type=it.port >> 8, icmp_code=it.port & 255)
        else:
            flow = replace(flow, sport=40000, dport=it.port)
        assert (policy.action(flow) == "delete") == (_what(flow) in entries), it
    for entry in entries.values():
        assert policy.action(entry) == "keep", entry


def _what(it: Entry) -> tuple[object, ...]:
    return (it.protocol, it.src, it.dst, it.dport, it.icmp_type, it.icmp_code)
