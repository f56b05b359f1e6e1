"""Delete open flows that the desired state does not allow (any more), so that neither end can continue them."""

from __future__ import annotations

from netloom.agent.kernel import conntrack, packets
from netloom.agent.kernel.conntrack import Entry
from netloom.render.flows import FlowAction, FlowCheck, FlowPolicy, flow_check
from netloom.render.marks import REVOKED
from netloom.state import Scope


def enforce(namespace: str, old: Scope | None, new: Scope) -> int:
    """Delete or revoke the flows in ``namespace`` that ``new`` does not allow, and return their number.

    Call it when the ruleset of ``new`` is loaded: under the old ruleset, a deleted flow could open again. ``old`` None:
    what was allowed before is not known, so all flows are checked. Raises HostRefused.
    """
    check: FlowCheck = "all" if old is None else flow_check(old, new)
    if check == "none":
        return 0
    if check == "all":
        # A packet that passed the old rules could otherwise confirm its flow after we listed the flows.
        packets.settled()  # guard: packets-under-way-are-awaited
    if not conntrack.count(namespace):
        return 0
    mask = REVOKED if check == "revoked_only" else 0
    policy = FlowPolicy(new)
    by_action: dict[FlowAction, list[Entry]] = {"keep": [], "delete": [], "revoke": []}
    for entry in conntrack.dump(namespace, mark=mask, mask=mask):
        by_action[policy.action(entry)].append(entry)
    # Mark first, then delete, so that no packet of a revoked flow passes in between.
    conntrack.set_mark(namespace, by_action["revoke"], REVOKED, REVOKED)
    conntrack.delete(namespace, by_action["delete"])
    return len(by_action["delete"]) + len(by_action["revoke"])
