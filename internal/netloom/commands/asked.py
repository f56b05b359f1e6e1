"""What a command asks of the services of its network.

A call fails for what it asked for. A firewall rule is in force although the resolver does not start, so its call
succeeds; a call for a name fails. ``check`` and the logs name the service in both cases.

implement-network asks for the segment alone. No other host would be tried after its failure: CloudStack shuts the
network down and chooses the same host again. restore-network, the last command of each implement, asks for the services
that it restores.
"""

from __future__ import annotations

import msgspec

from netloom.protocol.lb import ApplyLbRules
from netloom.protocol.restore import RestoreNetwork
from netloom.state.served import Served

_LEASES: frozenset[Served] = frozenset({"dhcp", "advertisements"})
_NAMES: frozenset[Served] = frozenset({"dns"})
_METADATA: frozenset[Served] = frozenset({"metadata"})
_BALANCING: frozenset[Served] = frozenset({"balancing"})
_ALL = _LEASES | _NAMES | _METADATA | _BALANCING


class Asked(msgspec.Struct, frozen=True):
    """``serve``: what has to work when the call succeeds. ``end``: what must no longer be served as before it."""

    serve: frozenset[Served] = frozenset()
    end: frozenset[Served] = frozenset()


NOTHING = Asked()
LEASES = Asked(serve=_LEASES)
NAMES = Asked(serve=_NAMES)
METADATA = Asked(serve=_METADATA)
NO_LEASES = Asked(end=_LEASES)
NO_NAMES = Asked(end=_NAMES)
NO_VM = Asked(end=_LEASES | _NAMES | _METADATA)
NO_NETWORK = Asked(end=_ALL)


def balancing(payload: ApplyLbRules) -> Asked:
    """A UDP rule needs no process: nftables balances it. A revoked rule must not be balanced any more."""
    needs = any(rule.effective_protocol != "udp" for rule in payload.lb_rules.items)
    return Asked(
        serve=_BALANCING if needs else frozenset(), end=_BALANCING if payload.lb_rules.revoked else frozenset()
    )


def restored(payload: RestoreNetwork) -> Asked:
    """The services that the list restores."""
    data = payload.restore_data
    asked: frozenset[Served] = frozenset()
    for enabled, services in (
        (data.dhcp_enabled, _LEASES),
        (data.dns_enabled, _NAMES),
        (data.userdata_enabled, _METADATA),
    ):
        asked |= services if enabled else frozenset()
    return Asked(serve=asked)
