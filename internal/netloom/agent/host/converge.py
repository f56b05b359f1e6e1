"""Converge the kernel objects of this host to what scopes want: observe, plan, apply.

All of it blocks, so it runs in worker threads: several at once, but only one per scope. Links that scopes share are
changed by one thread at a time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

import msgspec

from netloom import names
from netloom.agent.host import fence, flows, gate, lease, unmanaged
from netloom.agent.host.answers import Neighbours
from netloom.agent.host.apply import apply
from netloom.agent.host.bridged_frames import BridgedFrames
from netloom.agent.host.changes import Announcement, HostChanges
from netloom.agent.host.claim_wires import claim_wires
from netloom.agent.host.helpers import missing
from netloom.agent.host.host_sysctls import RECORD, raise_to
from netloom.agent.host.observe import bridges_with_vms, devices, observe, our_shared_links, stray_ports
from netloom.agent.host.observe_nft import guarded_bridges, guarded_others, table_digest
from netloom.agent.host.occupied import Occupied, occupied
from netloom.agent.host.settled import Settled, change_settled
from netloom.agent.kernel import (
    arp,
    conntrack_changes,
    conntrack_copy,
    links,
    modules,
    namespaces,
    neighbours,
    netlink,
    nft_netlink,
    sysctl,
    tcp_sockets,
)
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.kernel.conntrack_changes import Listing
from netloom.agent.kernel.conntrack_copy import Created, Difference, Record
from netloom.agent.kernel.links import find_links
from netloom.agent.kernel.netlink import Socket
from netloom.errors import HostRefused, NetloomError
from netloom.plan.have import CARRIERS, Have, HostLink, Others
from netloom.plan.limits import NEIGHBOUR_LIMITS, neighbour_limits
from netloom.plan.plan import plan, sweep, sweep_gates, sweep_leases
from netloom.plan.steps import (
    AddAddress,
    AttachPort,
    CreatePort,
    LoadRuleset,
    OpenGate,
    ReleasePorts,
    RemoveBridge,
    RemoveHostPort,
    RemoveVlanLink,
    SetHostLinkDown,
    Step,
)
from netloom.plan.uplinks import follow
from netloom.render.ruleset import Ruleset
from netloom.render.want import Port, Want
from netloom.state import Scope

_ROUNDS_MAX = 3
ORPHANS_S = 30.0  # later, CloudStack's KVM agent has plugged the VMs in again
_INOTIFY_INSTANCES = "fs/inotify/max_user_instances"
_INOTIFY_INSTANCES_MIN = 8192  # Debian's 128 would be 128 networks with a resolver
_MODULES = ("nf_conntrack", "bridge", "veth", "8021q", "vxlan")


class _Table(msgspec.Struct, frozen=True):
    """The table as it was right after we loaded it. ``digest`` empty: not computed yet."""

    marker: str
    generation: int
    digest: str = ""


class KernelHost:
    """The kernel objects of this machine, and which bridges each scope claims. Implements ``Host``.

    ``state_dir``: the directory for the record of raised sysctls.

    ``unexpected``: ``Watcher.unexpected``. As long as its number stays the same, a scope is as it was when it
    converged (``settled.py``).
    """

    def __init__(self, state_dir: Path = Path("/var/lib/netloom")) -> None:
        self._raised_sysctls = state_dir / RECORD
        self._shared = threading.Lock()
        self._claims: dict[str, frozenset[str]] = {}
        self._gated: dict[str, frozenset[str]] = {}  # by scope, the host ends whose gate it wants closed
        self._leased: dict[str, dict[str, int]] = {}  # by scope, the host ends that need a lease, with its mark
        # Held while gates are closed as ``_gated`` says. So no gate closes after its scope has begun to want it open.
        # Likewise for leases.
        self._gates = threading.Lock()
        self._links: dict[str, int] = {}  # by scope, the number of its links
        self._links_allowed = 0  # the number for which the neighbour tables are large enough
        self._guarded: tuple[frozenset[str], Others] | None = None
        self._tables: dict[str, _Table] = {}
        self._placed: dict[str, tuple[Want, Want]] = {}  # by scope: as rendered, with the NICs of this host
        self._settled: dict[str, Settled] = {}
        self.unexpected: Callable[[str], int] | None = None  # None: nobody watches
        self._were_down: frozenset[str] = frozenset()
        self._orphans: dict[tuple[str, float], frozenset[str]] = {}  # bridge, and when it was lost -> what was in it
        self._bridged = BridgedFrames()

    def prepare(self) -> None:
        """Prepare what a host needs once: kernel modules, the directory of named namespaces, inotify instances."""
        load_modules()
        namespaces.prepare()
        self._raise_limits()
        if not unmanaged.is_marked():  # else the first tidy looks
            with contextlib.suppress(HostRefused):
                unmanaged.mark(_ours(our_shared_links()))
        # Each dnsmasq uses one inotify instance. Those of earlier versions all run as one user.
        with contextlib.suppress(HostRefused):  # not allowed in a container; a dnsmasq without an instance reports it
            if int(sysctl.read(None, [_INOTIFY_INSTANCES])[_INOTIFY_INSTANCES] or 0) < _INOTIFY_INSTANCES_MIN:
                raise_to({_INOTIFY_INSTANCES: str(_INOTIFY_INSTANCES_MIN)}, self._raised_sysctls)

    def claim(self, scope_id: str, want: Want) -> None:
        """Record which shared bridges, closed gates and leases the scope wants; they are kept from now on."""
        with self._gates:
            self._gated[scope_id] = want.closed_ends
            if not self._gated[scope_id]:
                del self._gated[scope_id]
            self._leased[scope_id] = want.leased_ends
            if not self._leased[scope_id]:
                del self._leased[scope_id]
        bridges = frozenset(port.segment.bridge for port in want.ports)
        if bridges:
            self._claims[scope_id] = bridges
            self._links[scope_id] = len(want.ports)
        else:
            self._claims.pop(scope_id, None)
            self._links.pop(scope_id, None)
            self._placed.pop(scope_id, None)

    def placed(self, scope_id: str, want: Want, *, anew: bool = False) -> Want:
        """``want`` with the NICs of this host where the registration names a bridge; the same object while it holds.

        ``anew``: look at the bridges even if nothing was heard of them. Raises HostRefused.
        """
        had, settled = self._placed.get(scope_id), self._settled.get(scope_id)
        if not anew and had is not None and settled is not None and had[0].ports == want.ports:
            assert self.unexpected is not None
            if settled.unexpected == self.unexpected(scope_id):
                if had[0] is not want:
                    found = want if had[1].ports == want.ports else msgspec.structs.replace(want, ports=had[1].ports)
                    had = self._placed[scope_id] = want, found
                return had[1]
        found = follow(want, devices(want))  # guard: a-bridge-is-followed-to-its-nic
        if had is None or had[0] is not want or had[1].ports != found.ports:
            had = self._placed[scope_id] = want, found
        return had[1]

    def _raise_limits(self) -> None:
        """Have the neighbour tables of the host hold the share of each network. They are never made smaller."""
        links = sum(list(self._links.values()))
        if links <= self._links_allowed:
            return
        self._links_allowed = links
        # Not allowed in a container, and absent outside the initial namespace. Then the host's own limits hold.
        with contextlib.suppress(HostRefused):
            if limits := neighbour_limits(links, sysctl.read(None, NEIGHBOUR_LIMITS)):
                raise_to(limits, self._raised_sysctls)

    def converge(self, scope_id: str, want: Want, known: Ruleset | None, *, thorough: bool = False) -> HostChanges:
        """Make the host what the scope wants; change nothing where it is so already.

        ``known``: the ruleset that was loaded last. ``thorough``: compute the digest of a table that has none yet; its
        cost grows with the number of rules.

        Raises HostRefused (or ForeignScope) naming the step and the object. Objects that existed before stay.
        """
        self.claim(scope_id, want)
        self._raise_limits()
        # Read before the look: an event during the look may concern an object that it has listed already.
        unexpected = self.unexpected(scope_id) if self.unexpected is not None else 0
        settled = self._settled.pop(scope_id, None)
        done: list[Step] = []
        try:
            if settled is not None and settled.unexpected == unexpected and not thorough:
                changed = change_settled(settled, want)
                if changed is not None:
                    steps, settled = changed
                    self._settled[scope_id] = settled
                    if any(isinstance(step, LoadRuleset) for step in steps) and want.ruleset is not None:
                        self._tables[scope_id] = _Table(want.ruleset.marker, settled.generation)
                    return HostChanges(steps, _announcements(want, list(steps)), settled=True)
            for _ in range(_ROUNDS_MAX):
                steps, generation = self._round(scope_id, want, known, thorough)
                done += steps
                if any(isinstance(step, LoadRuleset) for step in steps):
                    known = want.ruleset
                if not steps:
                    break
            else:
                hint = "does something undo it?"
                raise HostRefused(f"{done[-1]}: done {_ROUNDS_MAX} times, and it does not hold", hint=hint)
        except HostRefused:
            self.keep_gates_closed()  # guard: a-gate-closes-whatever-else-fails
            raise
        if not want.namespace:
            namespaces.clear(names.namespace(scope_id))
        elif self.unexpected is not None:
            self._settled[scope_id] = Settled(want, unexpected, generation)
        return HostChanges(tuple(done), _announcements(want, done))

    def changed_rulesets(self, scope_ids: Sequence[str]) -> list[str]:
        """Those of these scopes whose namespace has had nftables transactions that are not ours, or is gone."""
        changed = []
        for scope_id in scope_ids:
            settled = self._settled.get(scope_id)
            if settled is None:
                continue
            try:
                with Socket(netlink.NETLINK_NETFILTER, settled.want.namespace) as nfnetlink:
                    same = nft_netlink.generation(nfnetlink) == settled.generation
            except (NetloomError, OSError):
                same = False
            # A call may have changed it between the two readings.
            if not same and self._settled.get(scope_id) is settled:  # guard: own-transactions-are-no-change
                changed.append(scope_id)
        return changed

    def close_gate(self, scope_id: str, want: Want) -> None:
        """Close the gate of each port of ``want`` at once. Converge the scope with ``gated`` from now on.

        Raises HostRefused.
        """
        want = msgspec.structs.replace(want, gated=True)
        self._settled.pop(scope_id, None)
        self.claim(scope_id, want)
        gate.close(port.host_link for port in want.ports)

    def open_gate(self, scope_id: str, want: Want) -> tuple[Announcement, ...]:
        """Open the gate of each port of ``want`` at once, and return what is to be announced then.

        For a scope that has converged with ``gated``. Converge it without from now on. Raises HostRefused.
        """
        want = msgspec.structs.replace(want, gated=False)
        self._settled.pop(scope_id, None)
        self.claim(scope_id, want)  # guard: an-open-gate-stays-open
        opened = OpenGate(tuple(port.host_link for port in want.ports))
        gate.open_(opened.links)
        return _announcements(want, [opened])

    def hide_heartbeats(self, is_member: bool) -> None:
        """Let no VM of this host hear or send heartbeats, while the host is a member of a group. Raises HostRefused."""
        lease.hide_heartbeats(is_member)

    def announcements(self, scope_id: str, want: Want) -> tuple[Announcement, ...]:
        """What is to be announced when frames begin to pass all ports of ``want``. Raises HostRefused."""
        return _announcements(self.placed(scope_id, want), [OpenGate(tuple(port.host_link for port in want.ports))])

    def look_for_gateways(self, want: Want) -> None:
        """Let the kernel look for the next hops of all routes now. Raises HostRefused.

        Packets of open connections would wait for them in a short queue, and those that find no room there are lost.
        """
        known = {(it.link, it.address) for it in want.neighbours}
        hops = {(it.link, it.via) for it in want.routes if it.link and it.via} - known
        links.change(want.namespace, [neighbours.look_for_neighbour(*hop) for hop in sorted(hops)])

    def occupied(self, scope_id: str, want: Want, timeout_s: float, claim: bytes) -> Occupied:
        """Whether other hosts use the addresses of the scope. Blocks for the time-out. Raises HostRefused."""
        return occupied(self.placed(scope_id, want), timeout_s, claim)

    def claim_wires(self, scope_id: str, want: Want) -> frozenset[ClaimWire]:
        """The uplinks on which the scope is claimed. Raises HostRefused."""
        return claim_wires(self.placed(scope_id, want))

    def anybody_answers(self, scope_id: str, want: Want, timeout_s: float) -> bool | None:
        """Whether a VM or gateway behind the uplinks of these ports answers. ``answers.Neighbours``."""
        with self.neighbours(want) as asked:
            return asked.anybody_answers(timeout_s)

    def neighbours(self, want: Want) -> Neighbours:
        """The VMs and gateways behind the uplinks of these ports."""
        # Not ``placed``: it remembers what the scope wants, and this is a part of that.
        return Neighbours(lambda: follow(want, devices(want)))

    def serves(self, want: Want) -> bool:
        """Whether the namespace exists and none of its ports is behind a closed gate, whatever leases live.

        Raises HostRefused.
        """
        return namespaces.exists(want.namespace) and gate.closed().isdisjoint(it.host_link for it in want.ports)

    def read_flows(self, namespace: str) -> Listing:
        """The open connections that another host can continue. Raises HostRefused."""
        return flows.listing(namespace)

    def changed_flows(self, namespace: str, before: Listing) -> Difference:
        """What has changed since ``before``, which is used up. Raises HostRefused."""
        return conntrack_changes.changes(namespace, before)

    def reset_connections(self, namespace: str) -> None:
        """Reset the TCP connections of processes in the namespace, at both ends. Raises HostRefused."""
        tcp_sockets.reset_connections(namespace)

    def copy_flows(self, namespace: str, create: list[Record], delete: list[Record]) -> Created:
        """Create and delete these connections of another host. Raises HostRefused."""
        conntrack_copy.delete(namespace, delete)
        return conntrack_copy.create(namespace, create)

    def keep_gates_closed(self) -> tuple[Step, ...]:
        """Close the gates that scopes want closed and that are open; somebody may have deleted the table.

        The same for ports that need a lease: until the next ``lease.renew`` none passes a frame then.

        Any thread may call this. Raises HostRefused.
        """
        with self._gates:
            wanted = frozenset().union(*self._gated.values())
            steps = sweep_gates(gate.closed(), wanted, wanted) if wanted else ()
            leased = self._leases()
            if leased:  # guard: lost-leases-are-put-back
                steps += sweep_leases(lease.guarded(), leased, frozenset(leased))
            apply(steps)
        return steps

    def enforce_flows(self, namespace: str, old: Scope | None, new: Scope, *, revoked: bool) -> bool:
        """Delete the open flows in ``namespace`` that ``new`` does not allow. ``old`` None: not known.

        ``revoked``: whether a flow may be revoked; returns the same for afterwards. Raises HostRefused.
        """
        return flows.enforce(namespace, old, new, revoked=revoked).revoked

    def missing_helpers(self, helpers: tuple[str, ...]) -> tuple[str, ...]:
        """Those of these conntrack helpers that the kernel does not offer."""
        return missing(helpers)

    def look(self, scope_id: str, want: Want, known: Ruleset | None) -> Have:
        """Observe what exists of the scope; change nothing."""
        want = self.placed(scope_id, want)
        return self._checked_for_tampering(self._observe(scope_id, want, known, frozenset()), thorough=False)

    def renewed(self, scope_id: str) -> None:
        """Record that another part of the agent loaded the scope's ruleset, so the table is not tampered with."""
        self._tables.pop(scope_id, None)
        self._settled.pop(scope_id, None)

    def orphaned(self, bridge: str, links: frozenset[str]) -> None:
        """Record that somebody deleted a bridge, and which links (VMs' taps) were in it. Does not block."""
        now = time.monotonic()
        for it in [it for it in list(self._orphans) if it[1] <= now - ORPHANS_S]:
            self._orphans.pop(it, None)
        self._orphans[bridge, now] = links

    def tidy(self) -> tuple[Step, ...]:
        """Remove shared links that no scope wants any more, and restore the guards and gates of those that stay."""
        closed = self.keep_gates_closed()
        with self._shared:
            self._guarded = guarded, others = guarded_bridges(), guarded_others()
            strays = tuple(RemoveHostPort(name) for name in stray_ports(frozenset(self._claims)))
            apply(strays)
            links = our_shared_links()
            steps = sweep(links, self._claimed_by_others(""), guarded, others)
            self._apply(steps)
        gone = {step.bridge for step in steps if isinstance(step, RemoveBridge)}
        gone |= {step.link for step in steps if isinstance(step, RemoveVlanLink)}
        unmanaged.mark(_ours(links) - gone)
        return closed + strays + steps + self._forget_gates()

    def _forget_gates(self) -> tuple[Step, ...]:
        """Delete what the gates and leases of links that are gone have left."""
        closed, guarded = gate.closed(), lease.guarded()  # first: a scope wants a gate closed before it closes it
        with self._gates:
            wanted = closed & frozenset().union(*self._gated.values())
            claimed = self._leases()
            leased = {it: mark for it, mark in guarded.items() if it in claimed}
            asked = sorted((closed - wanted) | (guarded.keys() - leased.keys()))
            existing = frozenset(it.name for it in find_links(None, asked))
            steps = sweep_gates(closed, wanted, existing) + sweep_leases(guarded, leased, existing)
            apply(steps)
        return steps

    def _leases(self) -> dict[str, int]:
        return {link: mark for leased in self._leased.values() for link, mark in leased.items()}

    def let_through(self) -> tuple[str, ...]:
        """Let the frames of our bridges pass the host's own firewall; returns what was changed there."""
        with self._shared:
            return self._bridged.let_through()

    def blocked(self, ports: tuple[Port, ...], *, seen_within_s: float = 0.0) -> list[str]:
        """Why frames are dropped on the bridges of these ports, a sentence each; change nothing.

        By the host's own firewall, or because the host is cut off.

        ``seen_within_s`` as in ``BridgedFrames.examine``.
        """
        found = find_links(None, [it.host_link for it in ports])
        bridges = {it.index: it.name for it in find_links(None, [it.master_index for it in found if it.master_index])}
        plan = self._bridged.examine(seen_within_s=seen_within_s)
        fenced = fence.TABLE.links()
        return [
            *(it.what for it in plan.changes),
            *(str(it) for it in plan.blocked if it.bridge in bridges.values()),
            *(
                f"uplink {it.name} is fenced: this host hears nobody there"
                for it in (find_links(None, sorted(fenced)) if fenced else ())
                if it.master_index in bridges
            ),
        ]

    def bridges_with_vms(self) -> frozenset[str]:
        """The bridges with a port that is neither ours nor an uplink: a VM is plugged in."""
        return bridges_with_vms()

    def await_shared_links(self) -> None:
        """Return when no other thread changes links that scopes share: never if such a thread hangs."""
        with self._shared:
            pass

    def namespace_exists(self, namespace: str) -> bool:
        """Whether there is a namespace of this name."""
        return namespaces.exists(namespace)

    def announce(self, announcements: tuple[Announcement, ...]) -> Callable[[], None]:
        """Send these announcements once. Call the result when there is time: it waits for the kernel."""
        announcers: dict[str, arp.Announcer] = {}
        stack = contextlib.ExitStack()
        for it in announcements:
            with contextlib.suppress(OSError, NetloomError):  # the link is gone, so nobody needs to know its addresses
                if it.namespace not in announcers:
                    announcers[it.namespace] = stack.enter_context(arp.Announcer(it.namespace))
                announcers[it.namespace].announce(it.link, it.address, it.mac)
        return stack.close

    def send_arp(self, announcements: tuple[Announcement, ...]) -> None:
        """Send these announcements once."""
        self.announce(announcements)()

    def _round(self, scope_id: str, want: Want, known: Ruleset | None, thorough: bool) -> tuple[tuple[Step, ...], int]:
        """Look, and do what is to be done. The steps, and the generation that was seen."""
        have = self._checked_for_tampering(self._observe(scope_id, want, known, frozenset()), thorough=thorough)
        steps = plan(have, want)
        unshared = tuple(takewhile(lambda step: not step.shared, steps))
        if not have.exists or any(isinstance(step, LoadRuleset) for step in unshared):
            self._tables.pop(scope_id, None)
        apply(unshared)
        if len(unshared) == len(steps):
            return steps, have.generation
        with self._shared:
            # Observe again: while we waited for the lock, another thread may have created or removed the bridge. Name
            # the bridges that our ports were in, because the ports may just have left them.
            self._guarded = guarded_bridges(), guarded_others()
            bridges = frozenset(link.name for link in have.host_links.values() if link.kind == "bridge")
            lost = list(self._orphans)
            now = self._observe(scope_id, want, known, bridges)
            rest = plan(msgspec.structs.replace(now, left=have.host_ends), want)
            self._apply(rest)
            # Not what was lost meanwhile: the next repair puts that back.
            for it in lost:
                if it[0] in {port.segment.bridge for port in want.ports}:
                    self._orphans.pop(it, None)
        return unshared + rest, now.generation

    def _observe(
        self,
        scope_id: str,
        want: Want,
        known: Ruleset | None,
        also: frozenset[str],
    ) -> Have:
        # Read once: another thread may reset it between two reads.
        guarded = self._guarded
        if guarded is None:
            guarded = self._guarded = guarded_bridges(), guarded_others()
        claimed = self._claimed_by_others(scope_id)
        since = time.monotonic() - ORPHANS_S
        orphans: dict[str, frozenset[str]] = {}
        for (bridge, at), those in list(self._orphans.items()):
            if at > since:
                orphans[bridge] = orphans.get(bridge, frozenset()) | those
        asked = also.union(*(orphans.get(port.segment.bridge, ()) for port in want.ports))
        have = observe(scope_id, want, known, claimed=claimed, guarded=guarded[0], also=asked)
        # The alias of a bridge says that its carrier was down. Remember it, in case somebody deletes the bridge.
        self._were_down |= {
            it.carrier for it in have.host_links.values() if it.kind == "bridge" and it.carrier_was_down
        }
        return msgspec.structs.replace(
            have,
            were_down=self._were_down,
            orphans=orphans,
            others=guarded[1],
            closed=gate.closed(),
            leased=lease.guarded(),
        )

    def _checked_for_tampering(self, have: Have, *, thorough: bool) -> Have:
        """``have``, with ``tampered`` set if its table has our marker but is not what we loaded.

        The kernel counts the nftables transactions of a namespace. If the count is unchanged, so is the table.
        Otherwise a digest of the table's listing tells whether our table was changed.
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
        self._were_down -= lowered

    def _claimed_by_others(self, scope_id: str) -> frozenset[str]:
        claims = list(self._claims.items())
        return frozenset(bridge for other, bridges in claims if other != scope_id for bridge in bridges)


def _ours(links: dict[str, HostLink]) -> set[str]:
    return {it.name for it in links.values() if it.ours and it.kind in ("bridge", *CARRIERS)}


def load_modules() -> None:
    """Load the kernel modules that are not loaded on first use. Conntrack's sysctls need its module."""
    modules.load(_MODULES)


def _announcements(want: Want, steps: list[Step]) -> tuple[Announcement, ...]:
    """The announcements for addresses that are new, or whose link was attached to its bridge again, or opened."""
    if want.gated:
        return ()  # guard: a-gated-scope-announces-nothing
    opened = {link for step in steps if isinstance(step, OpenGate | ReleasePorts) for link in step.links}
    added = {step.address for step in steps if isinstance(step, AddAddress)}
    links = {step.port.link for step in steps if isinstance(step, CreatePort)}
    host_links = {step.link for step in steps if isinstance(step, AttachPort)}
    macs = {port.link: port.mac for port in want.ports}
    links |= {port.link for port in want.ports if port.host_link in host_links | opened}
    return tuple(
        Announcement(want.namespace, it.link, it.ip, macs[it.link])
        for it in want.announce
        if it in added or it.link in links  # guard: only-new-addresses-are-announced
    )
