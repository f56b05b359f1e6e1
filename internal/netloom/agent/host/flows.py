"""Open flows held against a new state: what it does not allow ends, whichever end sends next; nothing else notices."""

from __future__ import annotations

from netloom.agent.kernel import conntrack, packets
from netloom.agent.kernel.conntrack import Entry
from netloom.render.flows import Judge, Verdict, attention
from netloom.render.marks import REVOKED
from netloom.state import Scope


def judge(namespace: str, old: Scope | None, new: Scope) -> int:
    """Ends the flows in ``namespace`` that ``new`` does not allow; the number of them.

    To be called when the ruleset of ``new`` stands: a flow that is ended earlier would begin anew under the old one.
    ``old`` None: whatever was allowed before, all flows are looked at. Raises HostRefused.
    """
    looks = "all" if old is None else attention(old, new)
    if looks == "none":
        return 0
    if looks == "all":
        # Else a connection that the old rules let through could be confirmed after we looked.
        packets.settled()  # guard: packets-under-way-are-awaited
    if not conntrack.count(namespace):
        return 0
    mask = REVOKED if looks == "tombstones" else 0
    judge_of = Judge(new)
    ended: dict[Verdict, list[Entry]] = {"keep": [], "delete": [], "tombstone": []}
    for entry in conntrack.dump(namespace, mark=mask, mask=mask):
        ended[judge_of.verdict(entry)].append(entry)
    # Marked first: between the two a flow that is to end must not find a hole.
    conntrack.set_mark(namespace, ended["tombstone"], REVOKED, REVOKED)
    conntrack.delete(namespace, ended["delete"])
    return len(ended["delete"]) + len(ended["tombstone"])
