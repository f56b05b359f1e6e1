"""What the host's firewall does by default with a bridged frame, for rules as its owners write them."""

from __future__ import annotations

import struct

import pytest

from netloom.agent.host.bridged_frames import legacy_changes, number_in_forward
from netloom.agent.host.host_firewall import Drop, Frame, decode, default_drop, parse
from netloom.agent.kernel.netlink import nested, text
from netloom.agent.kernel.nft_rules import FORWARD, PREROUTING, Rule

BRIDGE = "breth1-1204"
FRAME = Frame(4, 6, FORWARD, BRIDGE, 7)

DROPPED = Drop("FORWARD", 1, named=False)
NAMED = Drop("FORWARD", 1, named=True)
POLICY = Drop("FORWARD", None, named=False)


@pytest.mark.parametrize(
    ("rules", "drop"),
    [
        ("", POLICY),
        ("-A FORWARD -j DROP", DROPPED),
        ("-A FORWARD -j REJECT --reject-with icmp-host-prohibited", DROPPED),
        ("-A FORWARD ! -i docker0 -j DROP", DROPPED),
        (f"-A FORWARD -i {BRIDGE} -j DROP", NAMED),
        (f"-A FORWARD ! -o {BRIDGE} -j DROP", POLICY),
        ("-A FORWARD -i br+ -j DROP", NAMED),
        ("-A FORWARD -i docker0 -j DROP", POLICY),
        ("-A FORWARD -p udp -j DROP", POLICY),
        ("-A FORWARD -p tcp -j REJECT --reject-with tcp-reset\n-A FORWARD -j REJECT", DROPPED),
        ("-A FORWARD ! -p icmp -j DROP", DROPPED),
        ("-A FORWARD -p tcp -m tcp --dport 25 -j DROP", POLICY),
        ("-A FORWARD -m conntrack --ctstate INVALID -j DROP", POLICY),
        ("-A FORWARD -m physdev --physdev-is-bridged -j ACCEPT", None),
        ("-A FORWARD -m physdev ! --physdev-is-bridged -j ACCEPT", POLICY),
        ("-A FORWARD -m physdev --physdev-in vnet3 --physdev-is-bridged -j ACCEPT", POLICY),
        (f"-A FORWARD -i {BRIDGE} -o {BRIDGE} -j ACCEPT", None),
        ("-A FORWARD -j ACCEPT", None),
        ("-A FORWARD -m comment --comment 'drop it' -j DROP", DROPPED),
        ("-A FORWARD -j LOG --log-prefix 'dropped: '\n-A FORWARD -j ACCEPT", None),
        ("-N X\n-A X -i docker0 -j RETURN\n-A X -j DROP\n-A FORWARD -j X", Drop("X", 2, named=False)),
        ("-N X\n-A X -j RETURN\n-A X -j DROP\n-A FORWARD -j X", POLICY),
        ("-N X\n-A FORWARD -g X\n-A FORWARD -j ACCEPT", POLICY),
        (f"-N X\n-A X -j DROP\n-A FORWARD -i {BRIDGE} -j X", Drop("X", 1, named=True)),
        # Our own chain is passed over: it is to be put where it belongs.
        (f"-N netloom\n-A netloom -i {BRIDGE} -o {BRIDGE} -j ACCEPT\n-A FORWARD -j netloom", POLICY),
    ],
)
def test_the_default_for_a_frame_is_found(rules: str, drop: Drop | None) -> None:
    chains, policies = parse(f"-P INPUT ACCEPT\n-P FORWARD DROP\n-P OUTPUT ACCEPT\n{rules}")
    assert policies == {"INPUT": False, "FORWARD": True, "OUTPUT": False}
    assert default_drop(chains, "FORWARD", True, FRAME) == drop


@pytest.mark.parametrize(
    ("rules", "number"),
    [
        ("-A FORWARD -p udp -j ACCEPT", 2),
        ("-A FORWARD -p udp -j ACCEPT\n-A FORWARD -j DROP", 2),
        ("-A FORWARD -p udp -j ACCEPT\n-A FORWARD -j X\n-N X\n-A X -j Y\n-N Y\n-A Y -j DROP", 2),
    ],
)
def test_the_jump_of_iptables_legacy_comes_before_what_drops(rules: str, number: int) -> None:
    listing = f"-P FORWARD DROP\n{rules}"
    chains, _ = parse(listing)
    drop = default_drop(chains, "FORWARD", True, FRAME)
    assert drop is not None
    assert number_in_forward(chains, drop) == number
    (change,) = legacy_changes("iptables-legacy", chains, [BRIDGE], number)
    assert [" ".join(it) for it in change.commands] == [
        "iptables-legacy -N netloom",
        f"iptables-legacy -A netloom -i {BRIDGE} -o {BRIDGE} -m physdev --physdev-is-bridged "
        "-m comment --comment netloom -j ACCEPT",
        f"iptables-legacy -I FORWARD {number} -m comment --comment netloom -j netloom",
    ]
    # As iptables-legacy lists it afterwards.
    lines = listing.splitlines()
    forward = [it for it in lines if it.startswith("-A FORWARD")]
    forward.insert(number - 1, "-A FORWARD -m comment --comment netloom -j netloom")
    made = [
        "-N netloom",
        f"-A netloom -i {BRIDGE} -o {BRIDGE} -m physdev --physdev-is-bridged -m comment --comment netloom -j ACCEPT",
    ]
    chains, _ = parse("\n".join([*(it for it in lines if it not in forward), *made, *forward]))
    assert legacy_changes("iptables-legacy", chains, [BRIDGE], number) == ()
    (change,) = legacy_changes("iptables-legacy", chains, [], 0)
    assert [" ".join(it) for it in change.commands] == [
        f"iptables-legacy -D FORWARD {number}",
        "iptables-legacy -F netloom",
        "iptables-legacy -X netloom",
    ]


def xt(kind: str, name: str, info: bytes = b"") -> bytes:
    """An expression of nf_tables for an extension of iptables (linux/netfilter/nf_tables_compat.h)."""
    data = text(1, name) + struct.pack("=HH", 4 + len(info), 3) + info
    return nested(1, text(1, kind), nested(2, data))


def test_extensions_of_iptables_are_read_in_rules_of_iptables_nft() -> None:
    names = bytes(64)
    bridged, not_bridged = names + bytes((0, 4, 0, 0)), names + bytes((4, 4, 0, 0))
    named = b"vnet3".ljust(64, b"\0") + bytes((0, 5, 0, 0))

    def outcome(frame: Frame, *expressions: bytes) -> Drop | None:
        line = decode(Rule("FORWARD", 1, b"".join(expressions)), lambda name: (0, frozenset()))
        return default_drop({"FORWARD": [line]}, "FORWARD", False, frame)

    reject = xt("target", "REJECT")
    assert outcome(FRAME, reject) == DROPPED
    assert outcome(FRAME, xt("target", "LOG")) is None
    assert outcome(FRAME, xt("match", "physdev", bridged), reject) == DROPPED
    assert outcome(FRAME, xt("match", "physdev", not_bridged), reject) is None
    assert outcome(FRAME, xt("match", "physdev", named), reject) is None
    assert outcome(FRAME, xt("match", "comment"), reject) == DROPPED
    # The reverse path filter of firewalld with iptables, and of others: no route leads back over the bridge.
    arriving = FRAME._replace(hook=PREROUTING)
    assert outcome(arriving, xt("match", "rpfilter", b"\x08\0\0\0"), xt("target", "DROP")) == DROPPED
    assert outcome(arriving, xt("match", "rpfilter", b"\0\0\0\0"), xt("target", "DROP")) is None
