"""Observe nftables: which ruleset is loaded in a namespace, and which bridges of the host are guarded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import msgspec

from netloom.agent.kernel import kept, nft_netlink
from netloom.agent.kernel.netlink import Socket
from netloom.plan.have import Others
from netloom.render.nft import FAMILY, TABLE
from netloom.render.ruleset import MARKER_PREFIX, Name

GUARD_FAMILY, GUARD_TABLE = "netdev", "netloom"  # on the host itself, with a chain for each bridge of ours
FRAMES_FAMILY = "bridge"  # of the table GUARD_TABLE that filters the frames of bridges
GUARDED, UPLINKS = "guarded", "uplinks"  # its sets: bridges with a guard, and their ports that lead to the wire
OTHERS, OTHERS_UPLINKS = "others", "others_uplinks"  # the same for bridges that others created
OTHERS_GUESTS, OTHERS_TRUNKS = "others_guests", "others_trunks"  # their ports to guests; uplinks with VLAN filtering
TO_BRIDGE, FROM_PORT = "to-", "from-"  # begin the names of the chains for bridges of others and for their ports
STACK_FAMILY, RESERVED = "inet", "reserved_addresses"  # the family and the chain that guard the host's own protocols
FORMER_RESERVED = "reserved"  # this chain's name in older builds; nft 0.9.8 has a keyword of this name
RULES = {"inet": 1, "arp": 1, FRAMES_FAMILY: 24}  # how many rules these tables on the host have (frames.py)


class Table(msgspec.Struct, frozen=True):
    """Our table in a namespace. ``names`` None: there is no table.

    ``marker``: the set whose name says which ruleset is loaded; empty when there is none, or more than one.
    ``generation``: the kernel's counter of nftables transactions in the namespace.
    """

    names: frozenset[Name] | None
    marker: str
    generation: int


def observe_table(namespace: str) -> Table:
    """The names of the objects in our table. Raises HostRefused."""
    with kept.netfilter(namespace) as nfnetlink:
        generation = nft_netlink.generation(nfnetlink)
        sets = nft_netlink.sets(nfnetlink, FAMILY, TABLE)
        if sets is None:
            return Table(None, "", generation)
        present: set[Name] = {("map" if it.map else "set", it.name) for it in sets if not it.anonymous}
        markers = [name for kind, name in present if kind == "set" and name.startswith(MARKER_PREFIX)]
        present |= {("chain", it.name) for it in nft_netlink.chains(nfnetlink, FAMILY, TABLE)}
        present |= {("counter", name) for name in nft_netlink.counters(nfnetlink, FAMILY, TABLE)}
    # With two markers, somebody added one by hand, and neither can be believed.
    return Table(frozenset(present), markers[0] if len(markers) == 1 else "", generation)


def table_digest(namespace: str) -> str:
    """A digest of our table's chains, rules and elements that does not depend on the order the kernel lists them in.

    It leaves out the values of named counters, the elements that packets add, and the handles, which are new with every
    load. The table of the family arp is part of it. Raises HostRefused.
    """
    parts: list[bytes] = []
    with kept.netfilter(namespace) as nfnetlink:
        for family in (FAMILY, "arp"):
            for chain in nft_netlink.chains(nfnetlink, family, TABLE):
                parts.append(b"chain" + b"\0".join((chain.name.encode(), chain.hook, chain.policy)))
            for at, rule in enumerate(nft_netlink.rules(nfnetlink, family, TABLE)):
                parts.append(b"rule%d" % at + rule.chain + rule.expressions)  # rules are listed in order
            for it in nft_netlink.sets(nfnetlink, family, TABLE) or ():
                parts.append(b"set" if it.name.startswith("__") else b"set" + it.name.encode() + it.flags)
                if it.dynamic:  # guard: elements-of-packets-are-no-change
                    continue
                for element in nft_netlink.elements(nfnetlink, family, TABLE, it.name):
                    # An anonymous set keeps its name (``__set3``) as long as its rule exists.
                    parts.append(it.name.encode() + element)
    return hashlib.sha256(b"\n".join(sorted(parts))).hexdigest()


def guarded_bridges() -> frozenset[str]:
    """The bridges that have a guard: a chain that drops the frames for the host's own sockets, and an element.

    A bridge that an older build guarded has no element, or the chain ``RESERVED`` is missing. It is guarded again.
    Raises HostRefused.
    """
    with kept.netfilter(None) as nfnetlink:
        if not _is_current(nfnetlink):
            return frozenset()
        chains = frozenset(it.name for it in nft_netlink.chains(nfnetlink, GUARD_FAMILY, GUARD_TABLE))
        return chains & nft_netlink.link_names(nfnetlink, FRAMES_FAMILY, GUARD_TABLE, GUARDED)


def guarded_uplinks() -> frozenset[str]:
    """The links to which only ordinary frames are forwarded. Raises HostRefused."""
    with kept.netfilter(None) as nfnetlink:
        return nft_netlink.link_names(nfnetlink, FRAMES_FAMILY, GUARD_TABLE, UPLINKS)


def guarded_others() -> Others:
    """The guard of the bridges of others, as it is loaded. Raises HostRefused."""
    with kept.netfilter(None) as nfnetlink:
        current = _is_current(nfnetlink)
        chains = [it.name for it in nft_netlink.chains(nfnetlink, GUARD_FAMILY, GUARD_TABLE)]
        return Others(
            # Without the bridges the guard differs from any that is wanted, so it is loaded again.
            bridges=nft_netlink.link_names(nfnetlink, FRAMES_FAMILY, GUARD_TABLE, OTHERS) if current else frozenset(),
            closed=frozenset(it.removeprefix(TO_BRIDGE) for it in chains if it.startswith(TO_BRIDGE)),
            ports=frozenset(it.removeprefix(FROM_PORT) for it in chains if it.startswith(FROM_PORT)),
            uplinks=nft_netlink.link_names(nfnetlink, FRAMES_FAMILY, GUARD_TABLE, OTHERS_UPLINKS),
            trunks=nft_netlink.link_names(nfnetlink, FRAMES_FAMILY, GUARD_TABLE, OTHERS_TRUNKS),
        )


def former_chains(families: Iterable[str]) -> list[str]:
    """Our chains on the host that have the name of an older build: family, table and name. Raises HostRefused."""
    with kept.netfilter(None) as nfnetlink:
        return [
            f"{family} {GUARD_TABLE} {it.name}"
            for family in families
            for it in nft_netlink.chains(nfnetlink, family, GUARD_TABLE)
            if it.name == FORMER_RESERVED
        ]


def _is_current(nfnetlink: Socket) -> bool:
    """Whether the tables have the rules of this build. Older builds had fewer; somebody may have flushed a table."""
    named = any(it.name == RESERVED for it in nft_netlink.chains(nfnetlink, STACK_FAMILY, GUARD_TABLE))
    return named and all(
        _rules_of(nfnetlink, family) == number  # guard: flushed-rules-are-loaded-again
        for family, number in RULES.items()
    )


def _rules_of(nfnetlink: Socket, family: str) -> int:
    """How many rules the table has that frames.py loads; learning.py loads the others where they are needed."""
    rules = nft_netlink.rules(nfnetlink, family, GUARD_TABLE)
    return sum(not it.chain.startswith(b"learning") for it in rules)
