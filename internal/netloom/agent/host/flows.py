"""Delete open flows that the desired state does not allow (any more), so that neither end can continue them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msgspec.structs import replace

from netloom.agent.kernel import conntrack, conntrack_changes, packets
from netloom.agent.kernel.conntrack import Entry
from netloom.agent.kernel.conntrack_changes import Listing
from netloom.render.flows import FlowAction, FlowCheck, FlowPolicy, flow_check
from netloom.render.marks import REVOKED
from netloom.state import Scope

_ANNOUNCEMENTS_MAX = 8  # in a row, of one connection by another


class Enforced(NamedTuple):
    """How many flows were deleted or revoked, and whether a revoked one may be left."""

    ended: int
    revoked: bool


def enforce(namespace: str, old: Scope | None, new: Scope, *, revoked: bool = True) -> Enforced:
    """Delete or revoke the flows in ``namespace`` that ``new`` does not allow.

    Call it when the ruleset of ``new`` is loaded: under the old ruleset, a deleted flow could open again. ``old`` None:
    what was allowed before is not known, so all flows are checked. ``revoked``: whether a flow may be revoked. If none
    is, an added rule needs no list of the flows. For that the kernel looks at all flows of the host, which takes 10 ms.
    Raises HostRefused.
    """
    check: FlowCheck = "all" if old is None else flow_check(old, new)
    if check == "none" or (check == "revoked_only" and not revoked):
        return Enforced(0, revoked)
    if check == "all":
        # A packet that passed the old rules could otherwise confirm its flow after we listed the flows.
        packets.settled()  # guard: packets-under-way-are-awaited
    if not conntrack.count(namespace):
        return Enforced(0, revoked=False)
    mask = REVOKED if check == "revoked_only" else 0
    policy = FlowPolicy(new)
    by_action: dict[FlowAction, list[Entry]] = {"keep": [], "delete": [], "revoke": []}
    for entry in _with_first_masters(conntrack.dump(namespace, mark=mask, mask=mask)):
        by_action[policy.action(entry)].append(entry)
    # Mark first, then delete, so that no packet of a revoked flow passes in between.
    conntrack.set_mark(namespace, by_action["revoke"], REVOKED, REVOKED)
    conntrack.delete(namespace, by_action["delete"])
    left = any(entry.mark & REVOKED for entry in by_action["keep"])
    return Enforced(len(by_action["delete"]) + len(by_action["revoke"]), left or bool(by_action["revoke"]))


def listing(namespace: str) -> Listing:
    """The flows that another host must have to serve the scope instead of this one. Raises HostRefused.

    Revoked flows are among them: without its entry such a flow would open again with the guest's next packet.
    """
    return conntrack_changes.listing(namespace, marked=REVOKED)  # guard: a-revoked-flow-stays-revoked-elsewhere


def _with_first_masters(entries: list[Entry]) -> Iterator[Entry]:
    """The entries, each with the connection of which all announcements came: a SIP call to a guest is announced by its
    registration, and announces the sound."""
    masters = {
        (it.protocol, it.src, it.sport, it.dst, it.dport): it.master for it in entries if it.master is not None
    }  # guard: an-announced-call-is-judged-by-its-registration
    for entry in entries:
        master, seen = entry.master, 0
        while master is not None and seen < _ANNOUNCEMENTS_MAX:
            before = masters.get((master.protocol, master.src, master.sport, master.dst, master.dport))
            if before is None:
                break
            master, seen = before, seen + 1
        yield entry if master is entry.master else replace(entry, master=master)
