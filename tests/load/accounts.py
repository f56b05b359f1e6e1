"""What stands on a host, compared with what its states say, with an earlier time, and with a host without networks."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kernel.agent_host import wait_until
from load.hosts import Host
from netloom import names
from netloom.agent.kernel.descriptors import SELECTABLE
from netloom.agent.kernel.keeper import TITLE
from netloom.agent.scopes.store import Store
from netloom.render.scope import render
from netloom.render.services import services
from netloom.render.want import Want
from netloom.state import Scope

STATES = "/var/lib/netloom/scopes"
SERVICES = "/run/netloom/services"
# Descriptors of the agent for each active network: the watch of its namespace, and copies of the sockets for DHCP,
# metadata and passwords. For each service: a pidfd.
PER_NETWORK = 4
PER_SERVICE = 1
LOW_MAX = 100  # of all descriptors: those that select(2) knows are for libnftables


def states(host: Host) -> dict[str, dict[str, Any]]:
    """The state files of a host, by scope."""
    return {path.stem: json.loads(path.read_bytes()) for path in sorted(host.path(STATES).glob("*.json"))}


def scopes(host: Host) -> dict[str, Scope]:
    """The same as values of the program."""
    store = Store(str(host.path(STATES)))
    return {it: scope for it in store.living() if (scope := store.load(it)) is not None}


def service_pids(host: Host, scope_id: str = "*") -> dict[str, int]:
    """The processes that the records of services name: pid by path of the service."""
    found = {}
    # Not Path.glob: it fails when a directory goes meanwhile.
    for path in map(Path, glob.glob(f"{host.path(SERVICES)}/{scope_id}/*/running.json")):
        with contextlib.suppress(OSError, ValueError):
            found[f"{path.parent.parent.name}/{path.parent.name}"] = int(json.loads(path.read_bytes())["pid"])
    return found


def guest_pid(host: Host) -> int:
    """The guest process of the host; 0 without one."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return int(json.loads(host.path("/run/netloom/guest.json").read_bytes())["pid"])
    return 0


def _differences(what: str, have: Counter[str], want: Counter[str]) -> list[str]:
    more, less = have - want, want - have
    found = [f"{what}: {sum(more.values())} too many: {', '.join(sorted(more)[:5])}"] if more else []
    return found + ([f"{what}: {sum(less.values())} missing: {', '.join(sorted(less)[:5])}"] if less else [])


def unaccounted(host: Host, own_links: set[str], own_namespaces: set[str], base_descriptors: int) -> list[str]:
    """What stands on the host and no state explains, and what is missing.

    ``own_links``, ``own_namespaces``: what the test made. ``base_descriptors``: of an agent without networks.
    """
    held = scopes(host)
    wants = {scope_id: render(scope) for scope_id, scope in held.items()}
    ports = [port for want in wants.values() for port in want.ports]
    bridges = {port.segment.bridge for port in ports}
    # A bridge with a VM stays when its network has moved to the other host.
    with_vms = {it["master"] for name, it in host.links().items() if name.startswith("tap-") and it.get("master")}
    running = {scope_id: {it.name for it in services(scope)} for scope_id, scope in held.items()}

    found = [f"{it.scope_id}: its gate is {it.placement.gate}" for it in held.values() if it.placement.gate != "open"]
    links = {*bridges, *with_vms, *(port.host_link for port in ports)}
    found += _differences("links", Counter(set(host.links()) - own_links), Counter(links))
    namespaces = {line.split()[0] for line in host.run("ip", "netns", "list").splitlines()} - own_namespaces
    found += _differences("namespaces", Counter(namespaces), Counter({it.namespace for it in wants.values()}))
    with ThreadPoolExecutor(4) as pool:
        for lines in pool.map(lambda it: _inside(host, held[it], wants[it]), held):
            found += lines

    recorded = service_pids(host)
    wanted = {f"{scope_id}/{name}" for scope_id, its in running.items() for name in its}
    found += _differences("services", Counter(recorded.keys()), Counter(wanted))
    assert host.agent is not None
    keepers = [pid for pid, words in host.processes().items() if words[:3] == TITLE.decode().split()]
    found += [f"{host.name}: {len(keepers)} processes that close sockets"] if len(keepers) != 1 else []
    explained = {host.agent.pid, guest_pid(host), *keepers}
    for pid in recorded.values():
        explained |= family(pid)
    # The process that starts services ends some seconds after the last start.
    others = {pid: it for pid, it in host.processes().items() if pid not in explained and it[-3:-2] != ["serve"]}
    found += _differences("processes", Counter(" ".join(it)[-100:] for it in others.values()), Counter())
    directories = [f"{it}/" for it in os.listdir(host.path(SERVICES))] if host.path(SERVICES).exists() else []
    found += _differences(
        "service directories", Counter(directories), Counter(f"{it}/" for it, n in running.items() if n)
    )
    files = Counter(it for it in os.listdir(host.path(STATES)) if not it.endswith(".moved"))
    found += _differences("state files", files, Counter(f"{it}.json" for it in held))
    tables = host.run("nft", "list", "table", "bridge", "netloom_gate", check=False)
    found += [f"{host.name}: a gate is closed: {tables}"] if "elements" in tables else []
    fence = host.run("nft", "list", "table", "bridge", "netloom_fence", check=False)
    found += [f"{host.name}: uplinks are fenced: {fence}"] if fence else []

    active = sum(1 for scope in held.values() for it in scope.networks.values() if it.is_active)
    # The agent listens for claims on the uplink of each bridge.
    descriptors = base_descriptors + PER_NETWORK * active + PER_SERVICE * len(wanted) + len(bridges)
    pid = host.agent.pid
    have: list[int] = []

    def is_accounted() -> bool:
        launching = any(it[-3:-2] == ["serve"] for it in host.processes().values())
        have.append(process_figures(pid).descriptors - launching)
        return have[-1] == descriptors

    # The agent closes connections at once. A look at the host or a check opens a socket for a moment at any time.
    try:
        wait_until(is_accounted, 10)
    except AssertionError:
        kinds = descriptors_by_kind(pid)
        found.append(f"descriptors of the agent: {sorted(set(have))} instead of {descriptors}: {kinds}")
    low = sum(int(it) < SELECTABLE for it in os.listdir(f"/proc/{pid}/fd"))
    found += [f"{low} descriptors of the agent have low numbers"] if low > LOW_MAX else []
    return [f"{host.name}: {it}" for it in found]


def _inside(host: Host, scope: Scope, want: Want) -> list[str]:
    """What is in the namespace of a scope and should not be, and what is missing there."""
    if not want.namespace:
        return []
    what = scope.scope_id
    inside = {it["ifname"] for it in json.loads(host.run("ip", "-j", "link", namespace=want.namespace))}
    tables = host.run("nft", "list", "tables", namespace=want.namespace).splitlines()
    return [
        *_differences(f"links of {what}", Counter(inside), Counter({"lo", *(it.link for it in want.ports)})),
        *_differences(f"tables of {what}", Counter(tables), Counter(["table inet netloom", "table arp netloom"])),
        *_foreign_connections(host, scope),
    ]


def _foreign_connections(host: Host, scope: Scope) -> list[str]:
    """Connections in the namespace of the scope that no rule of its state allows: to a port that is not forwarded."""
    network = next(iter(scope.networks.values()), None)
    if network is None:
        return []
    text = host.run("conntrack", "-L", "-o", "extended", namespace=names.namespace(scope.scope_id), check=False)
    found = []
    known = {*scope.public_ips, network.device_ip, *(it.ip for it in network.nics.values()), "255.255.255.255"}
    for line in text.splitlines():
        words = [it.partition("=")[2] for it in line.split() if it.startswith(("src=", "dst="))]
        if words and known.isdisjoint(words[:2]):
            found.append(f"connections of {scope.scope_id}: {line.strip()}")
    return found


def family(pid: int) -> set[int]:
    """A process and all its descendants."""
    found, new = set(), [pid]
    while new:
        it = new.pop()
        found.add(it)
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{it}/task"):
                new += map(int, Path(f"/proc/{it}/task/{task}/children").read_text().split())
    return found


def descriptors_by_kind(pid: int) -> dict[str, int]:
    """How many descriptors of each kind the process has; packet sockets by the index of their link."""
    sockets = {}
    for family, inode in (("unix", 6), ("netlink", 9), ("packet", 8), ("tcp", 9), ("udp", 9)):
        for line in Path(f"/proc/{pid}/net/{family}").read_text().splitlines()[1:]:
            words = line.split()
            sockets[f"socket:[{words[inode]}]"] = f"{family} {words[4]}" if family == "packet" else family
    kinds: Counter[str] = Counter()
    for it in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            name = os.readlink(f"/proc/{pid}/fd/{it}")
            kinds[sockets.get(name, name.partition(":[")[0])] += 1
    return dict(kinds)


def fewest_descriptors(pid: int) -> int:
    """The smallest number of descriptors within a moment: those that a process keeps."""
    found = []
    for _ in range(20):
        found.append(process_figures(pid).descriptors)
        time.sleep(0.02)
    return min(found)


@dataclass(frozen=True)
class ProcessFigures:
    """A process at one moment. ``pss_kib``: its memory, with its part of what it shares. ``cpu_s``: since its start."""

    descriptors: int
    threads: int
    pss_kib: int
    cpu_s: float


def process_figures(pid: int) -> ProcessFigures:
    stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return ProcessFigures(
        descriptors=len(os.listdir(f"/proc/{pid}/fd")),
        threads=int(stat[17]),
        pss_kib=pss_kib(pid),
        cpu_s=(int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK"),
    )


def pss_kib(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0


@dataclass(frozen=True)
class HostFigures:
    """What the networks of a host take at one moment. Memory in KiB of PSS, by kind of process."""

    networks: int
    agent: ProcessFigures
    guest: ProcessFigures
    dnsmasq: list[int] = field(default_factory=list)
    haproxy: list[int] = field(default_factory=list)

    def row(self) -> str:
        """The figures in one line, memory in MiB."""
        each = [
            f"{len(kib)} {name} with {sum(kib) / len(kib) / 1024:.1f} MiB each"
            for name, kib in (("dnsmasq", self.dnsmasq), ("haproxy", self.haproxy))
            if kib
        ]
        processes = [
            f"{name} {it.pss_kib / 1024:.0f} MiB, {it.descriptors} descriptors, {it.threads} threads"
            for name, it in (("agent", self.agent), ("guest process", self.guest))
        ]
        return "; ".join([f"{self.networks} networks", *processes, *each])


def host_figures(host: Host) -> HostFigures:
    assert host.agent is not None
    pids = service_pids(host)
    return HostFigures(
        networks=len(list(host.path(STATES).glob("*.json"))),
        agent=process_figures(host.agent.pid),
        guest=process_figures(guest_pid(host)),
        dnsmasq=[sum(map(pss_kib, family(pid))) for name, pid in pids.items() if "/dns-" in name],
        haproxy=[sum(map(pss_kib, family(pid))) for name, pid in pids.items() if name.endswith("/lb")],
    )


def everything(host: Host) -> dict[str, Counter[str]]:
    """All that a network can leave on a host."""
    looks = {
        "links": ("ip", "-o", "link"),
        "addresses": ("ip", "-o", "addr"),
        "routes": ("ip", "route", "show", "table", "all"),
        "rules": ("ip", "rule"),
        "neighbours": ("ip", "neigh"),
        "namespaces": ("ip", "netns", "list"),
        "nftables": ("nft", "-s", "list", "ruleset"),
        "files": ("find", "/run", "/var/lib", "!", "-type", "d", "!", "-path", "/run/netns/*"),
        "directories": ("find", "/run", "/var/lib", "-type", "d"),
        "open connections": ("conntrack", "-L"),
    }
    found = {what: Counter(host.run(*words, check=False).splitlines()) for what, words in looks.items()}
    # The kernel sets the queueing discipline of a link when the link is set up for the first time.
    found["links"] = Counter(re.sub(r" qdisc \w+| state \w+|NO-CARRIER,", "", it) for it in found["links"].elements())
    found["processes"] = Counter(
        re.sub(r"\d+", "", " ".join(it)) for it in host.processes().values() if it[-3:-2] != ["serve"]
    )
    return found


def left_behind(before: dict[str, Counter[str]], now: dict[str, Counter[str]]) -> list[str]:
    return [line for what in before for line in _differences(what, now[what], before[what])]
