"""The parts of the host that ``Scopes`` and ``Upkeep`` use, as protocols.

The implementations need root: ``host/converge.py``, ``host/watcher.py`` and ``processes/services.py``. The tests of the
scheduler have simulated ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from netloom.agent.host.changes import Announcement, HostChanges
from netloom.agent.host.occupied import Occupied
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.kernel.conntrack_changes import Listing
from netloom.agent.kernel.conntrack_copy import Created, Difference, Record
from netloom.agent.scopes.store import HostRecord, Moved
from netloom.plan.have import Have
from netloom.plan.steps import Step
from netloom.render.ruleset import Ruleset
from netloom.render.want import Port, Want
from netloom.state import Scope
from netloom.state.served import Served


class Neighbours(Protocol):
    """VMs and gateways. ``agent/host/answers.py`` describes the methods."""

    def anybody_answers(self, timeout_s: float) -> bool | None: ...
    def close(self) -> None: ...


class Host(Protocol):
    """The kernel objects of this machine. Every method may block, except ``claim`` and ``renewed``."""

    def prepare(self) -> None:
        """Prepare what a host needs once, before the first scope converges."""

    def claim(self, scope_id: str, want: Want) -> None:
        """Record which shared bridges the scope wants; they are not removed from now on."""

    def placed(self, scope_id: str, want: Want, *, anew: bool = False) -> Want:
        """``want`` with the NICs of this host where the registration names a bridge. Raises HostRefused.

        ``anew``: look at the bridges even if nothing was heard of them.
        """

    def converge(self, scope_id: str, want: Want, known: Ruleset | None, *, thorough: bool = False) -> HostChanges:
        """Make the host what the scope wants. Raises HostRefused or ForeignScope."""

    def enforce_flows(self, namespace: str, old: Scope | None, new: Scope, *, revoked: bool) -> bool:
        """Delete the open flows that ``new`` does not allow. ``old`` None: not known. Raises HostRefused.

        ``revoked``: whether a flow may be revoked; returns the same for afterwards.
        """

    def missing_helpers(self, helpers: tuple[str, ...]) -> tuple[str, ...]:
        """Those of these conntrack helpers that the kernel does not offer."""

    def look(self, scope_id: str, want: Want, known: Ruleset | None) -> Have:
        """Observe what exists of the scope; change nothing. Raises HostRefused."""

    def changed_rulesets(self, scope_ids: Sequence[str]) -> list[str]:
        """Those of these scopes in whose namespace others have changed nftables, or that is gone."""

    def renewed(self, scope_id: str) -> None:
        """Record that another part of the agent loaded the scope's ruleset."""

    def tidy(self) -> tuple[Step, ...]:
        """Remove shared links that no scope wants any more. Raises HostRefused."""

    def let_through(self) -> tuple[str, ...]:
        """Let the frames of our bridges pass the host's own firewall; what was changed. Raises HostRefused."""

    def blocked(self, ports: tuple[Port, ...], *, seen_within_s: float = 0.0) -> list[str]:
        """What keeps frames from passing the bridges of these ports, a sentence each, as it was so many seconds ago.

        Raises HostRefused.
        """

    def bridges_with_vms(self) -> frozenset[str]:
        """The bridges with a port that is neither ours nor an uplink: a VM is plugged in. Raises HostRefused."""

    def await_shared_links(self) -> None:
        """Return when no other thread changes links that scopes share: never if such a thread hangs."""

    def namespace_exists(self, namespace: str) -> bool:
        """Whether there is a namespace of this name."""

    def hide_heartbeats(self, is_member: bool) -> None:
        """Let no VM of this host hear or send heartbeats, while the host is a member of a group. Raises HostRefused."""

    def look_for_gateways(self, want: Want) -> None:
        """Let the kernel look for the next hops of all routes now. Raises HostRefused."""

    def announcements(self, scope_id: str, want: Want) -> tuple[Announcement, ...]:
        """What is to be announced when frames begin to pass all ports of ``want``. Raises HostRefused."""

    def send_arp(self, announcements: tuple[Announcement, ...]) -> None:
        """Send these announcements once. Errors are ignored: the link may be gone."""

    def announce(self, announcements: tuple[Announcement, ...]) -> Callable[[], None]:
        """As ``send_arp``, but return as soon as the frames are sent. Call the result when there is time."""

    def serves(self, want: Want) -> bool:
        """Whether the namespace exists and none of its ports is behind a closed gate. Raises HostRefused."""

    def close_gate(self, scope_id: str, want: Want) -> None:
        """From now on no frame passes the ports of ``want``. Raises HostRefused."""

    def open_gate(self, scope_id: str, want: Want) -> tuple[Announcement, ...]:
        """Let frames pass the ports of ``want`` again; returns what is to be announced. Raises HostRefused."""

    def occupied(self, scope_id: str, want: Want, timeout_s: float, claim: bytes) -> Occupied:
        """Whether other hosts use the addresses of the scope. Blocks for the time-out. Raises HostRefused."""

    def claim_wires(self, scope_id: str, want: Want) -> frozenset[ClaimWire]:
        """The uplinks on which the scope is claimed. Raises HostRefused."""

    def anybody_answers(self, scope_id: str, want: Want, timeout_s: float) -> bool | None:
        """Whether a VM or gateway behind the uplinks of these ports answers ARP; None: there is nobody to ask.

        False at once if no uplink has a carrier. Blocks up to the time-out. Raises HostRefused.
        """

    def neighbours(self, want: Want) -> Neighbours:
        """The same machines, to be asked again and again."""

    def read_flows(self, namespace: str) -> Listing:
        """The open connections that another host can continue. Raises HostRefused."""

    def changed_flows(self, namespace: str, before: Listing) -> Difference:
        """What has changed since ``before``, which is used up. Raises HostRefused."""

    def reset_connections(self, namespace: str) -> None:
        """Reset the TCP connections of processes in the namespace, at both ends. Raises HostRefused."""

    def copy_flows(self, namespace: str, create: list[Record], delete: list[Record]) -> Created:
        """Create and delete these connections of another host. Raises HostRefused."""


class ScopeServices(Protocol):
    """The processes of all scopes. ``Services`` implements it and describes the methods."""

    def converge(
        self, scope: Scope, namespace: str, asked: frozenset[Served] | None = None, *, settled: bool = False
    ) -> list[str]: ...
    def stop(self, scope_id: str) -> list[str]: ...
    def renew(self, scope_id: str) -> None: ...
    def scopes(self) -> set[str]: ...
    def waiting(self, scope_id: str) -> dict[int, str]: ...
    def limited(self, scope: Scope, namespace: str) -> list[str]: ...
    def revive_backends(self, scope: Scope) -> None: ...
    def privileged(self, scope_id: str) -> list[str]: ...
    def unserved(self, scope: Scope, namespace: str) -> list[str]: ...
    def running(self, scope_id: str) -> dict[str, int]: ...
    def crashes(self, scope_id: str) -> dict[str, int]: ...
    def guest_process(self) -> tuple[int, int]: ...


class ScopeWatcher(Protocol):
    """The watches of all scopes. ``Watcher`` implements it and describes the methods."""

    def open(self) -> None: ...
    def watch(self, scope_id: str, want: Want) -> None: ...
    def unwatch(self, scope_id: str) -> None: ...
    def work_done(self, scope_id: str) -> None: ...


class ScopeStore(Protocol):
    """The states of all scopes. ``Store`` implements it and describes the methods."""

    def living(self) -> list[str]: ...
    def ended(self) -> list[str]: ...
    def load(self, scope_id: str) -> Scope | None: ...
    def unsettled(self, scope_id: str) -> bool: ...
    def save(self, scope: Scope) -> None: ...
    def retire(self, scope_id: str) -> None: ...
    def forget(self, scope_id: str) -> None: ...
    def decoded(self, scope_id: str, text: bytes, path: str) -> Scope: ...
    def encoded(self, scope: Scope) -> bytes: ...
    def moved(self) -> dict[str, Moved]: ...
    def save_moved(self, scope_id: str, moved: Moved) -> None: ...
    def forget_moved(self, scope_id: str) -> None: ...
    def host_record(self) -> HostRecord: ...
    def save_host_record(self, record: HostRecord) -> None: ...
