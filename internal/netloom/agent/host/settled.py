"""Change a scope that is as it was left, without a look at the host.

The agent hears what others change in the kernel (``watcher.py``). As long as all of it matches what a scope wants, the
scope is as it was when it converged, so the steps to another state follow from the former state alone. The events do
not tell of a changed ruleset, but the kernel counts the transactions of each namespace.

What the kernel does not report at all is left to the thorough checks: sysctls, and settings of links that the watcher
does not compare.
"""

from __future__ import annotations

import msgspec

from netloom.agent.host.apply import apply
from netloom.agent.kernel import kept, nft_netlink
from netloom.agent.kernel.namespaces import NamespaceError
from netloom.plan.plan import change
from netloom.plan.steps import AddAddress, LoadRuleset, PutNeighbour, RemoveNeighbour, Step
from netloom.render.want import Want

# Steps without further effects, so nobody has to look after them. The deletion of an address takes routes with it.
_SIMPLE = (LoadRuleset, AddAddress, PutNeighbour, RemoveNeighbour)


class Settled(msgspec.Struct, frozen=True):
    """A scope that has converged to ``want``. ``unexpected``: the number of the last event that did not match, then.

    ``generation``: the kernel's counter of nftables transactions in the namespace, as it should be.
    """

    want: Want
    unexpected: int
    generation: int


def change_settled(settled: Settled, want: Want) -> tuple[tuple[Step, ...], Settled] | None:
    """Make a scope that is as it was left what it wants now; returns the steps, and how it is left.

    None if that takes a look at the host. Nothing has changed then. Raises HostRefused.
    """
    steps = change(settled.want, want)
    if steps is None or not all(isinstance(step, _SIMPLE) for step in steps):
        return None
    try:
        with kept.netfilter(want.namespace) as nfnetlink:
            if nft_netlink.generation(nfnetlink) != settled.generation:  # guard: a-changed-table-is-looked-at
                return None
    except NamespaceError:  # somebody has removed its name
        return None
    apply(steps)
    # Count our own transactions only. If somebody else made one meanwhile, the next call finds another number.
    generation = settled.generation + sum(isinstance(step, LoadRuleset) for step in steps)
    return steps, Settled(want, settled.unexpected, generation)
