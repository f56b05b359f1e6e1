"""Three hosts of a group in namespaces: a management network, a VLAN, and a VM on that VLAN. Their engines run here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from kernel.scratch import carried, scratch, tool
from netloom.agent.kernel import links
from netloom.agent.kernel.claims_socket import ClaimWire
from netloom.agent.standby.engine import Engine, boottime_ns
from netloom.agent.standby.member import NANOSECONDS, GroupView
from netloom.secret import Secret
from netloom.standby.decision import Local
from netloom.standbywire import GroupHost, GroupSpec
from netns import inside
from unit.standby_group import Lines

NAMES = ("kvm1", "kvm2", "kvm3")
ADDRESSES = ("10.9.0.1", "fd09::2", "10.9.0.3")
TAG = 204
PATIENTLY_S = 60.0


def now() -> float:
    return boottime_ns() / NANOSECONDS


class Leases:
    """The lease of one host as its kernel would have it. Two at once are noted in ``two``."""

    def __init__(self, name: str, all_: dict[str, float], two: list[str]) -> None:
        self.name = name
        self.began: list[float] = []  # when there was none before
        self._all = all_
        self._two = two

    def renew(self, lives: Mapping[int, float], at: float) -> bool:
        clock = now()
        if self._all.get(self.name, 0.0) < clock:
            self.began.append(clock)
        for s in lives.values():
            self._all[self.name] = clock - (time.monotonic() - at) + s
        others = {name: until - clock for name, until in self._all.items() if name != self.name and until > clock}
        if others:
            self._two.append(f"{self.name} has a lease while others have one: {others}")
        return True

    def end(self, marks: Iterable[int]) -> bool:
        self._all.pop(self.name, None)
        return True

    def alive(self) -> dict[int, float]:
        left_s = self._all.get(self.name, 0.0) - now()
        return {0x2A: left_s} if left_s > 0 else {}


class Host:
    """A host with its engine. ``changes``: how often it said that something changed."""

    def __init__(self, name: str, namespace: str, directory: Path, leases: Leases, spec: GroupSpec) -> None:
        self.name = name
        self.namespace = namespace
        self.directory = directory
        self.leases = leases
        self.spec = spec
        self.log = Lines()
        self.changes = 0
        (found,) = links.find_links(namespace, ["vlan"])
        self.wire = ClaimWire("vlan", found.index, found.mac, TAG)
        self.engine: Engine | None = None

    def start(self, *, wires: bool = True, local: Local | None = None) -> None:
        """Start the agent's engine, as after a start of the agent."""
        engine = Engine(self.directory, self.log, self._changed, self.leases)
        with inside(self.namespace):
            engine.start()
        engine.set_group(self.spec, self.name)
        if wires:
            engine.set_wires(self.spec.group_id, {self.wire: 1})
        engine.set_local(self.spec.group_id, local or Local())
        self.engine = engine

    def stop(self) -> None:
        """Kill the agent: leases go on."""
        if self.engine is not None:
            self.engine.stop()
            self.engine = None

    def cut_power(self) -> None:
        """Nothing of the host works any more."""
        for link in ("mgmt", "vlan"):
            tool(self.namespace, "ip", "link", "set", link, "down")
        self.stop()
        self.leases.end([])

    def local(self, local: Local) -> None:
        assert self.engine is not None
        self.engine.set_local(self.spec.group_id, local)

    @property
    def view(self) -> GroupView:
        assert self.engine is not None
        return self.engine.views()[self.spec.group_id]

    def _changed(self, group_id: str) -> None:
        assert threading.current_thread().name == "standby"
        self.changes += 1


class Bed:
    """The hosts, and what is between them. ``switch``: the namespace with both bridges; ``vm``: of a VM."""

    def __init__(self, switch: str, vm: str, namespaces: list[str], directory: Path, lease_ms: int) -> None:
        self.switch = switch
        self.vm = vm
        self.two: list[str] = []
        self.leases: dict[str, float] = {}
        hosts = [GroupHost(name=name, address=it) for name, it in zip(NAMES, ADDRESSES, strict=True)]
        self.spec = GroupSpec(
            group_id="0000002a",
            owner="netloom/phys-1",
            first=hosts[0],
            second=hosts[1],
            witness=hosts[2],
            secret=Secret("5a" * 32),
            lease_ms=lease_ms,
        )
        self.hosts = []
        for name, namespace in zip(NAMES, namespaces, strict=True):
            (directory / name).mkdir()
            leases = Leases(name, self.leases, self.two)
            self.hosts.append(Host(name, namespace, directory / name, leases, self.spec))
        self.first, self.second, self.witness = self.hosts

    def start(self) -> None:
        """Start all engines, and wait until the first host serves and everybody is heard."""
        for it in self.hosts:
            it.start()
        self.until(lambda: self.first.view.serves and self.first.view.partner_ready)
        self.until(lambda: all(s < 1 for it in self.hosts for s in it.view.heard.values()))

    def until(self, what: Callable[[], bool]) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + PATIENTLY_S
        while not what():
            assert time.monotonic() < deadline, {it.name: (it.engine and it.view, it.log.lines) for it in self.hosts}
            time.sleep(0.01)
        assert self.two == []

    def goes_on(self, s: float, name: str = "kvm1") -> None:
        """For so many seconds of the engines' own clock this host serves, in the same term."""
        host = next(it for it in self.hosts if it.name == name)
        term, until = host.view.term, now() + s
        while now() < until:
            view = host.view
            assert view.serves and view.term == term, (view, host.log.lines)
            time.sleep(0.02)
        assert self.two == []

    def link(self, host: Host, link: str, state: str) -> None:
        """Cut a host's link in the switch, or heal it."""
        tool(self.switch, "ip", "link", "set", f"{link}{self.hosts.index(host)}", state)


@contextmanager
def standby_bed(directory: Path, lease_ms: int = 2000) -> Iterator[Bed]:
    """Three hosts, a VM, and what is between them, without engines."""
    with scratch() as switch, scratch() as first, scratch() as second, scratch() as witness, scratch() as vm:
        for bridge in ("mgmt", "vlan"):
            tool(switch, "ip", "link", "add", bridge, "type", "bridge")
            tool(switch, "ip", "link", "set", bridge, "up")
        for at, host in enumerate((first, second, witness, vm)):
            for link in ("mgmt", "vlan") if host != vm else ("vlan",):
                far = f"{link}{at}"
                tool(switch, "ip", "link", "add", far, "type", "veth", "peer", "name", link, "netns", host)
                tool(switch, "ip", "link", "set", far, "master", link, "up")
                tool(host, "ip", "link", "set", link, "up")
        for at, host in enumerate((first, second, witness)):
            tool(host, "ip", "addr", "add", f"10.9.0.{at + 1}/24", "dev", "mgmt")
            tool(host, "ip", "addr", "add", f"fd09::{at + 1}/64", "dev", "mgmt", "nodad")
            carried(host, "mgmt")
            carried(host, "vlan")
        bed = Bed(switch, vm, [first, second, witness], directory, lease_ms)
        try:
            yield bed
        finally:
            for it in bed.hosts:
                it.stop()
        assert bed.two == []
