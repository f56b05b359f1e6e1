"""Where a scope lives, as one host sees it."""

from __future__ import annotations

from typing import Literal

import msgspec

# "open": this host serves the scope. All others: no frame leaves its ports, and none enters.
# "incoming": it moves to this host, and ``peer`` still serves it. "closed": it moves from this host to ``peer``.
# "passive": somebody else answers for its addresses, or another host serves it.
# In a group, "open" means that the active host of the group serves the scope; which one that is, is not in the state.
Gate = Literal["open", "incoming", "closed", "passive"]


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """The placement of a scope on this host.

    ``epoch``: the number of the placement, one more with each move; 0 for a scope that was never moved. ``host``: the
    name of this host in the registration, and ``proof``: who moved the scope here was allowed to (extension/proof.py);
    both are empty at epoch 0. ``why``: one line, why the gate is passive. ``was_passive``: while the gate is incoming,
    why an earlier copy here was passive; it becomes passive again if the scope is not opened. ``from_dead``: no host
    handed the scope over: an operator declared the one before dead, or the state is from an archive. Perhaps that host
    still answers. ``taken_from``: the hosts that were declared dead and may have a copy; while the scope is served
    here, it is claimed on its VLANs (claimwire.py).

    ``group``: the group of hosts that the scope belongs to (standbywire.py); empty: none. ``joined``: the term of the
    group in which ``epoch`` was the number of the placement; each later term counts one more. ``partner_proof``: the
    authorisation of the other host of the group. ``leaving``: the scope is about to leave the group, and stays here.
    ``proof_from``: the proof holds for each number from this one on; 0: for ``epoch`` alone.
    """

    epoch: int = 0
    host: str = ""
    proof: str = ""
    gate: Gate = "open"
    peer: str = ""
    why: str = ""
    from_dead: bool = False
    was_passive: str = ""
    taken_from: tuple[str, ...] = ()
    group: str = ""
    joined: int = 0
    partner_proof: str = ""
    leaving: bool = False
    proof_from: int = 0
