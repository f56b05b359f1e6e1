"""A host as it was observed: the namespace of one scope, and the host's own links that concern it."""

from __future__ import annotations

import msgspec

from netloom.netobjects import MAIN_TABLE, Address, Neighbour, Route, Rule
from netloom.render.ruleset import Name, Ruleset

ALIAS = "netloom"  # the first word of the alias of every link that we create; no other links are deleted

CARRIERS = ("vlan", "vxlan")  # the kinds of links that we create to carry a segment

# The default rule "lookup main", present in every new namespace; ``ip rule flush`` deletes it.
ASK_MAIN = Rule(priority=32766, mark=0, mask=0, table=MAIN_TABLE)


class Others(msgspec.Struct, frozen=True, kw_only=True):
    """The guard of ``bridges``: those that a port of ours is in and that somebody else created.

    ``closed``: those of them that deliver no frame to the host itself. ``ports``: the ports that lead to guests.
    ``uplinks``: the ports that lead to the wire; ``trunks``: the same where the bridge filters VLANs.
    """

    bridges: frozenset[str] = frozenset()
    closed: frozenset[str] = frozenset()
    ports: frozenset[str] = frozenset()
    uplinks: frozenset[str] = frozenset()
    trunks: frozenset[str] = frozenset()

    def __or__(self, other: Others) -> Others:
        return Others(
            bridges=self.bridges | other.bridges,
            closed=self.closed | other.closed,
            ports=self.ports | other.ports,
            uplinks=self.uplinks | other.uplinks,
            trunks=self.trunks | other.trunks,
        )


class HostLink(msgspec.Struct, frozen=True, kw_only=True):
    """A link of the host itself. ``kind`` is the kernel's ("bridge", "vlan", "veth"; empty for a NIC)."""

    name: str
    kind: str = ""
    up: bool = False
    master: str = ""
    alias: str = ""
    parent: str = ""  # of a VLAN link
    vlan_id: int = 0  # the tag of a VLAN link, the VNI of a VXLAN
    ports: tuple[str, ...] = ()  # of a bridge; not observed for one of ours that other scopes claim
    # The host's own addresses on this link. Observed only where a decision needs them: for NICs that may have to join
    # a bridge, for the link that VXLAN sends from, and for bridges of others that our ports are in.
    addresses: tuple[str, ...] = ()
    ipv6: bool = False  # whether the host speaks IPv6 on this link; observed for wanted links that are ours
    mtu: int = 0  # 0: not observed
    vlan_filtering: bool = False  # of a bridge: the operator told it which tags pass which port
    above: bool = False  # of a bridge of others: the host has a link above it (VLAN, macvlan, VRF)
    elsewhere: bool = False  # of a veth: its other end is in another namespace

    @property
    def ours(self) -> bool:
        return self.alias.split(" ", 1)[0] == ALIAS

    @property
    def carrier(self) -> str:
        """The uplink port of a bridge that we created. A bridge whose only port is this one may be removed."""
        alias = self.alias.split(" ")
        return alias[2] if self.ours and len(alias) == 3 else ""

    @property
    def carrier_was_down(self) -> bool:
        """Whether the carrier was down before this bridge was created."""
        return self.ours and self.alias.startswith(f"{ALIAS} raises ")


class InsideLink(msgspec.Struct, frozen=True, kw_only=True):
    """A link of the namespace other than the loopback. ``host_link``: its other end, empty when not on the host."""

    name: str
    kind: str = ""
    mac: str = ""
    up: bool = False
    host_link: str = ""
    mtu: int = 0  # 0: not observed


class Have(msgspec.Struct, frozen=True, kw_only=True):
    """What exists of one scope on one host, and the links of the host that it concerns."""

    scope_id: str
    namespace: str  # the name that the scope's namespace has, or would have
    exists: bool = False
    foreign: str = ""  # why the namespace belongs to somebody else; empty: it is ours, or does not exist
    loopback_up: bool = False
    links: dict[str, InsideLink] = {}
    addresses: tuple[Address, ...] = ()
    cut_off: frozenset[Address] = frozenset()  # addresses without the route to their own subnet
    routes: tuple[Route, ...] = ()
    rules: tuple[Rule, ...] = ()  # without the kernel's own
    asks_main: bool = True  # whether the default rule "lookup main" exists
    neighbours: tuple[Neighbour, ...] = ()  # the permanent ones
    sysctls: dict[str, str] = {}
    marker: str = ""  # which ruleset is loaded; empty: no table, or a table without a marker
    ruleset: Ruleset | None = None  # the ruleset behind ``marker``, where it is known
    table: frozenset[Name] | None = None  # the names of the objects in the table; None: no table
    generation: int = 0  # the kernel's counter of changes to the namespace's rulesets
    tampered: bool = False  # the table has the marker, but differs from what was loaded
    host_links: dict[str, HostLink] = {}
    were_down: frozenset[str] = frozenset()  # carriers that were down before we came, as far as is remembered
    orphans: dict[str, frozenset[str]] = {}  # bridges that somebody deleted, and the links that were in them
    claimed: frozenset[str] = frozenset()  # bridges that other scopes want
    guarded: frozenset[str] = frozenset()  # bridges of ours whose frames never reach the host's own sockets
    others: Others = Others()  # the guard of bridges of others
    closed: frozenset[str] = frozenset()  # links of the host that no frame passes: the closed gates of all scopes
    leased: dict[str, int] = {}  # links of the host that frames pass only with a lease -> its mark; of all scopes
    left: frozenset[str] = frozenset()  # host ends of ports that the scope had before the steps that are done already

    @property
    def host_ends(self) -> frozenset[str]:
        """The host ends of the scope's ports."""
        return frozenset(it.host_link for it in self.links.values() if it.host_link and not self.foreign)
