"""One host made to hold what scopes want: look, plan, apply; shared objects by one scope at a time.

Blocking: for worker threads only. Several threads may call at once, but only one per scope.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from itertools import takewhile

import msgspec

from netloom import names
from netloom.agent.host.apply import apply
from netloom.agent.host.observe import guarded_bridges, observe, our_shared_links, stray_ports, table_digest
from netloom.agent.kernel import namespaces, sysctl
from netloom.errors import HostRefused
from netloom.plan import (
    AddAddress,
    AttachPort,
    CreateBridge,
    CreatePort,
    Have,
    LoadRuleset,
    RemoveHostPort,
    RemoveVlanLink,
    SetHostLinkDown,
    Step,
    plan,
    sweep,
)
from netloom.render.ruleset import Ruleset, marker
from netloom.render.want import Want

_ROUNDS_MAX = 3
ORPHANS_S = 30.0  # after that, whoever plugs VMs in has dealt with it
_INOTIFY_INSTANCES = "fs/inotify/max_user_instances"
_INOTIFY_INSTANCES_MIN = 8192  # Debian's 128 would be 128 networks with a resolver
_MODULES = ("nf_conntrack", "bridge", "veth", "8021q", "vxlan")


class News(msgspec.Struct, frozen=True):
    """What the neighbours on a link have to learn: this address is at this MAC address now."""

    namespace: str
    link: str
    address: str
    mac: str


class Done(msgspec.Struct, frozen=True):
    """What was done to the kernel and to processes, and what the neighbours have to learn of it."""

    steps: tuple[Step, ...] = ()
    news: tuple[News, ...] = ()
    services: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        return len(self.steps) + len(self.services)


class _Table(msgspec.Struct, frozen=True):
    """The ruleset as it was right after we loaded it. ``digest`` empty: not taken yet."""

    marker: str
    generation: int
    digest: str = ""


class Host:
    """The kernel of this machine, and which bridges which scope wants."""

    def __init__(self) -> None:
        self._shared = threading.Lock()
        self._claims: dict[str, frozenset[str]] = {}
        self._guarded: frozenset[str] | None = None
        self._tables: dict[str, _Table] = {}
        self._markers: dict[str, tuple[Ruleset, str]] = {}  # by scope, of what was last known to be loaded
        self._raised: frozenset[str] = frozenset()
        self._orphans: dict[str, tuple[float, frozenset[str]]] = {}  # bridge -> when it was lost, what was in it

    def claim(self, scope_id: str, want: Want) -> None:
        """Notes what the scope wants of the shared objects: from now on nobody takes it away."""
        bridges = frozenset(port.segment.bridge for port in want.ports)
        if bridges:
            self._claims[scope_id] = bridges
        else:
            self._claims.pop(scope_id, None)

    def converge(self, scope_id: str, want: Want, known: Ruleset | None, *, thorough: bool = False) -> Done:
        """Makes it so; nothing is done where it is so already. ``known``: the ruleset that was loaded last.

        ``thorough``: takes the digest of a table that has none yet, which costs more the more rules there are.

        Raises HostRefused (or ForeignScope) naming the step and the object; what stood before goes on standing.
        """
        self.claim(scope_id, want)
        done: list[Step] = []
        for _ in range(_ROUNDS_MAX):
            steps = self._round(scope_id, want, known, thorough)
            done += steps
            if any(isinstance(step, LoadRuleset) for step in steps):
                known = want.ruleset
            if not steps:
                if not want.namespace:
                    namespaces.clear(names.namespace(scope_id))
                return Done(tuple(done), _news(want, done))
        raise HostRefused(f"{done[-1]}: done {_ROUNDS_MAX} times, and it does not hold", hint="does something undo it?")

    def look(self, scope_id: str, want: Want, known: Ruleset | None) -> Have:
        """What there is of the scope now; changes nothing."""
        return self._held_against(self._observe(scope_id, want, known, frozenset()), thorough=False)

    def renewed(self, scope_id: str) -> None:
        """Notes that the scope's ruleset was loaded by somebody of us: what stands now is as it should be."""
        self._tables.pop(scope_id, None)

    def orphaned(self, bridge: str, links: frozenset[str]) -> None:
        """Notes that somebody deleted a bridge: these links were in it, VMs' taps, say. Does not block."""
        self._orphans[bridge] = time.monotonic(), links

    def tidy(self) -> tuple[Step, ...]:
        """Removes the shared objects that nobody wants any more, and renews the guard of those that stay."""
        with self._shared:
            self._guarded = guarded_bridges()
            strays = tuple(RemoveHostPort(name) for name in stray_ports(frozenset(self._claims)))
            apply(strays)
            steps = sweep(our_shared_links(), self._claimed_by_others(""), self._guarded)
            self._apply(steps)
            return strays + steps

    def _round(self, scope_id: str, want: Want, known: Ruleset | None, thorough: bool) -> tuple[Step, ...]:
        have = self._held_against(self._observe(scope_id, want, known, frozenset()), thorough=thorough)
        steps = plan(have, want)
        alone = tuple(takewhile(lambda step: not step.shared, steps))
        if not have.exists or any(isinstance(step, LoadRuleset) for step in alone):
            self._tables.pop(scope_id, None)
        apply(alone)
        if len(alone) == len(steps):
            return steps
        with self._shared:
            # Looked at again: while we waited, somebody else may have made the bridge, or taken it away. The bridges
            # that our ports were in are asked for by name, for the ports may have left them just now.
            self._guarded = guarded_bridges()
            bridges = frozenset(link.name for link in have.host_links.values() if link.kind == "bridge")
            rest = plan(self._observe(scope_id, want, known, bridges), want)
            self._apply(rest)
            for step in rest:
                if isinstance(step, CreateBridge):
                    self._orphans.pop(step.bridge, None)
        return alone + rest

    def _observe(
        self,
        scope_id: str,
        want: Want,
        known: Ruleset | None,
        also: frozenset[str],
    ) -> Have:
        # Once: another scope's thread may forget it between two looks.
        guarded = self._guarded
        if guarded is None:
            guarded = self._guarded = guarded_bridges()
        claimed = self._claimed_by_others(scope_id)
        since = time.monotonic() - ORPHANS_S
        orphans = {bridge: those for bridge, (at, those) in list(self._orphans.items()) if at > since}
        asked = also.union(*(orphans.get(port.segment.bridge, ()) for port in want.ports))
        bears = self._marker_of(scope_id, known)
        have = observe(scope_id, want, known, known_marker=bears, claimed=claimed, guarded=guarded, also=asked)
        # A bridge that is deleted under us takes along the word that its carrier is ours to set down again.
        self._raised |= {it.carrier for it in have.host_links.values() if it.kind == "bridge" and it.raised}
        return msgspec.structs.replace(have, raised=self._raised, orphans=orphans)

    def _marker_of(self, scope_id: str, ruleset: Ruleset | None) -> str:
        """Computed once per ruleset: that takes milliseconds where there are thousands of forwards."""
        if ruleset is None:
            self._markers.pop(scope_id, None)
            return ""
        had = self._markers.get(scope_id)
        if had is None or had[0] is not ruleset:
            had = self._markers[scope_id] = ruleset, marker(ruleset)
        return had[1]

    def _held_against(self, have: Have, *, thorough: bool) -> Have:
        """``have``, and whether its table is still what we loaded, though it bears the same marker.

        The kernel counts the transactions of a namespace. Where the count has not moved, nothing has changed; where it
        has, the table's own listing tells whether that was our table.
        """
        seen = self._tables.get(have.scope_id)
        if not have.marker:
            return have
        if seen is None or seen.marker != have.marker:
            seen = _Table(have.marker, have.generation)
        elif seen.generation != have.generation:
            if not seen.digest or table_digest(have.namespace) != seen.digest:
                return msgspec.structs.replace(have, tampered=True)
            seen = _Table(seen.marker, have.generation, seen.digest)
        if thorough and not seen.digest:
            seen = _Table(seen.marker, seen.generation, table_digest(have.namespace))
        self._tables[have.scope_id] = seen
        return have

    def _apply(self, steps: tuple[Step, ...]) -> None:
        try:
            apply(steps)
        finally:
            self._guarded = None
        lowered = {step.link for step in steps if isinstance(step, SetHostLinkDown | RemoveVlanLink)}
        self._raised -= lowered

    def _claimed_by_others(self, scope_id: str) -> frozenset[str]:
        claims = list(self._claims.items())
        return frozenset(bridge for other, bridges in claims if other != scope_id for bridge in bridges)


def prepare() -> None:
    """What a host needs once, and what no network leaves behind: modules, the directory of named namespaces."""
    load_modules()
    namespaces.prepare()
    # Each resolver has one, and they all run as one user.
    with contextlib.suppress(HostRefused):  # a container may not; then the resolver that gets none says so
        if int(sysctl.read(None, [_INOTIFY_INSTANCES])[_INOTIFY_INSTANCES] or 0) < _INOTIFY_INSTANCES_MIN:
            sysctl.write(None, {_INOTIFY_INSTANCES: str(_INOTIFY_INSTANCES_MIN)})


def load_modules() -> None:
    """Loads what does not load itself when it is first used: the sysctls of conntrack are not there before it is.

    A kernel that has it built in, or has no modules, is as good; what is really missing is told by who needs it.
    """
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        subprocess.run(
            ["modprobe", "--all", "--quiet", *_MODULES],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"},
            timeout=20,
            check=False,
        )


def _news(want: Want, steps: list[Step]) -> tuple[News, ...]:
    """Of the announced addresses those that are new, or whose link has got a new way to the neighbours."""
    added = {step.address for step in steps if isinstance(step, AddAddress)}
    links = {step.port.link for step in steps if isinstance(step, CreatePort)}
    host_links = {step.link for step in steps if isinstance(step, AttachPort)}
    macs = {port.link: port.mac for port in want.ports}
    links |= {port.link for port in want.ports if port.host_link in host_links}
    return tuple(
        News(want.namespace, it.link, it.cidr.partition("/")[0], macs[it.link])
        for it in want.announce
        if it in added or it.link in links
    )
