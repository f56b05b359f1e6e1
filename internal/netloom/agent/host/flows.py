"""Delete open flows that the desired state does not allow (any more), so that neither end can continue them."""

from __future__ import annotations

from netloom.agent.kernel import conntrack, packets
from netloom.agent.kernel.conntrack import Entry
from netloom.render.flows import FlowAction, FlowPolicy, flow_check
from netloom.render.marks import REVOKED
from netloom.state import Scope


def enforce(namespace: str, old: Scope | None, new: Scope) -> int:
    """Delete or revoke the flows in ``namespace`` that ``new`` does not allow, and return their number.

    Call it when the ruleset of ``new`` is loaded: under the old ruleset, a deleted flow could open again. ``old`` None:
    what was allowed before is not known, so all flows are checked. Raises HostRefused.
    """
    looks = "all" if old is None else flow_check(old, new)
    if looks == "none":
        return 0
    if looks == "all":
        # A packet that passed the old rules could otherwise confirm its flow after we listed the flows.
        packets.settled()  # guard: packets-under-way-are-awaited
    if not conntrack.count(namespace):
        return 0
    mask = REVOKED if looks == "revoked_only" else 0
    judge_of = FlowPolicy(new)
    by_verdict: dict[FlowAction, list[Entry]] = {"keep": [], "delete": [], "revoke": []}
    for entry in conntrack.dump(namespace, mark=mask, mask=mask):
        by_verdict[judge_of.action(entry)].append(entry)
    # Mark first, then delete, so that no packet of a revoked flow passes in between.
    conntrack.set_mark(namespace, by_verdict["revoke"], REVOKED, REVOKED)
    conntrack.delete(namespace, by_verdict["delete"])
    return len(by_verdict["delete"]) + len(by_verdict["revoke"])
