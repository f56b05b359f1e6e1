"""Which host of its group serves a scope now, as this host knows it. May be asked in any thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from netloom.agent.standby.member import GroupView
from netloom.state import Placement


class Role(msgspec.Struct, frozen=True, kw_only=True):
    """What this host is to the scopes of a group.

    ``active``: it is this host's turn. ``serves``: it has a lease, too, so its gates are open. ``host``: whose turn it
    is; empty: not known. ``mark``: of the group in the lease table (agent/host/lease.py). ``standby_silent_s``,
    ``witness_silent_s``: since when they were heard last. ``witness``: empty: the upstream has the second vote.
    """

    active: bool
    serves: bool
    host: str
    term: int
    mark: int
    standby: str
    witness: str
    standby_silent_s: float = 0.0
    witness_silent_s: float = 0.0


# A scope may name a group whose file was lost. Then nobody here knows whose turn it is, and the gates stay closed.
_UNKNOWN = Role(active=False, serves=False, host="", term=0, mark=0xFFFFFFFF, standby="", witness="")


class Roles:
    """``views``: as in ``Engine``."""

    def __init__(self, views: Callable[[], Mapping[str, GroupView]]) -> None:
        self._views = views

    def of(self, placement: Placement) -> Role | None:
        """The role of this host for a scope with this placement. None: the scope belongs to no group."""
        if not placement.group:
            return None
        view = self._views().get(placement.group)
        if view is None:
            return _UNKNOWN
        names = view.spec.names
        partner, witness = names.partner(view.me), names.witness
        return Role(
            active=view.active == view.me and not view.released,
            serves=view.serves,
            host=view.active,
            term=view.term,
            mark=view.spec.mark,
            standby=partner if view.active == view.me else view.me,
            witness=witness,
            standby_silent_s=view.silent_s.get(partner, 0.0) if view.active == view.me else 0.0,
            witness_silent_s=view.silent_s.get(witness, 0.0),
        )

    def epoch(self, placement: Placement) -> int:
        """The number of the placement now: each turn since the scope joined its group counts one."""
        role = self.of(placement)
        return placement.epoch + max(0, role.term - placement.joined) if role is not None else placement.epoch

    def gate(self, placement: Placement) -> str:
        """The gate as in ``state.Placement``, or "standby": another host of the group has its turn."""
        role = self.of(placement)
        return "standby" if role is not None and placement.gate == "open" and not role.active else placement.gate


NO_GROUPS = Roles(dict)
