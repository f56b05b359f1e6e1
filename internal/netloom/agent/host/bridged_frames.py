"""Let the frames of our bridges pass the host's own firewall, where it drops forwarded packets by default.

Where br_netfilter is in force, the rule or the policy that drops a frame is looked up (host_firewall.py), and a jump to
a chain of ours is put in front of it, in the same table. That chain accepts what a bridge of ours forwards, and nothing
else: both links of the packet are this bridge, and the host itself takes no frames from it (frames.py). So what the
host routes meets the same rules as before, and rules for special packets, which come earlier, hold for our frames too.

The bridges that CloudStack's KVM agent made for a network of ours are treated as ours, unless the host itself uses
them. Another bridge of somebody else is left to its owner, and so is one that the dropping rules name; ``Blocked`` says
so. The owner may consent by an alias of the bridge, ``ACCEPTED``.

Frames on our bridges are not tracked by the host: its NAT rules must not rewrite them, and two networks may have the
same addresses. A bridge with a port that the host's rules name is tracked: these rules may need the state.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from netloom import names
from netloom.agent.environment import PATH
from netloom.agent.host.host_firewall import (
    ARRIVED,
    FORWARDED,
    OURS,
    Drop,
    Line,
    decode,
    default_drop,
    frames,
    parse,
)
from netloom.agent.host.observe_nft import GUARD_TABLE, guarded_bridges, guarded_others
from netloom.agent.kernel import kept, links, nft_netlink, nft_rules, sysctl
from netloom.agent.kernel.links import Link
from netloom.agent.kernel.netlink import Socket
from netloom.agent.kernel.nft_rules import FORWARD, PREROUTING, Chain, Table
from netloom.errors import HostRefused, NetloomError
from netloom.plan.have import HostLink

# A table of ours, with a set and a chain of the same name: the bridges whose frames are not tracked.
UNTRACKED_FAMILY, UNTRACKED = "inet", "netloom_untracked"
TEST_ALIAS = "netloom-selftest"  # of a bridge that the selftest makes; its frames are let through like those of ours
ACCEPTED = "netloom-accept"  # the alias by which the owner of a bridge consents that its frames are let through
_CALLS = {4: "net/bridge/bridge-nf-call-iptables", 6: "net/bridge/bridge-nf-call-ip6tables"}
_HOOKS = {FORWARD: FORWARDED, PREROUTING: ARRIVED}
_FAMILIES = {"ip": (4,), "ip6": (6,), "inet": (4, 6)}
_TRIES = 3
_NAMED_MAX = 5  # bridges in a line of the log
_RAW = -300
_LEGACY_S_MAX = 20
_LEGACY = {4: ("iptables-legacy", "ip_tables_names"), 6: ("ip6tables-legacy", "ip6_tables_names")}


class Place(msgspec.Struct, frozen=True, order=True):
    """Where a jump to one of our chains belongs: before a rule, or at the end of the chain (``handle`` 0)."""

    chain: str
    handle: int
    jump_to: str


class Blocked(msgspec.Struct, frozen=True):
    """A bridge whose frames the host's firewall drops, and netloom leaves it so."""

    bridge: str
    where: str
    why: str
    remedy: str
    surely: bool = True
    families: tuple[int, ...] = ()

    def __str__(self) -> str:
        drops = "drops" if self.surely else "may drop"
        what = " and ".join(f"IPv{it}" for it in self.families)
        parts = filter(None, (self.why, self.remedy))
        return f"the host's firewall {drops} {what} frames on {self.bridge}: {self.where}: {'; '.join(parts)}"


class Change(msgspec.Struct, frozen=True):
    """What is to be done in one table: for people, and for nft (``script``) or iptables-legacy (``commands``)."""

    what: str
    script: str = ""
    commands: tuple[tuple[str, ...], ...] = ()


class Plan(msgspec.Struct, frozen=True):
    """What is to be changed in the host's firewall, and what netloom leaves to others."""

    changes: tuple[Change, ...] = ()
    blocked: tuple[Blocked, ...] = ()
    dropped_at: tuple[str, ...] = ()  # every place where frames would be dropped without our chains


class _Bridges(msgspec.Struct, frozen=True):
    """The bridges that a port of ours is in. ``links``: those that exist, by name."""

    own: frozenset[str] = frozenset()
    accepted: frozenset[str] = frozenset()  # of others; their owners consent
    others: frozenset[str] = frozenset()
    links: dict[str, Link] = {}


class BridgedFrames:
    """Keeps our chains in the host's firewall. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._refused: dict[str, str] = {}  # what the last ``let_through`` could not change, and why
        self._known: tuple[object, Plan] | None = None  # what was examined, and the result
        self._last = Plan()  # the result of the last look at the firewall
        self._looked = -math.inf  # when that was

    def let_through(self) -> tuple[str, ...]:
        """Let the frames of the guarded bridges through, those of no other. Returns what was changed.

        Without bridges all chains of ours are removed. A table that refuses the change does not stop the others;
        ``examine`` has the reason. Raises HostRefused when the firewall cannot be looked at.
        """
        return self._change(_guarded)

    def leave(self) -> None:
        """Remove all chains of ours, whatever is guarded. Raises HostRefused as ``let_through``."""
        self._change(lambda: (_Bridges(), []))

    def _change(self, find: Callable[[], tuple[_Bridges, list[Link]]]) -> tuple[str, ...]:
        done: list[str] = []
        with self._lock:
            for _ in range(_TRIES):  # the rules may change meanwhile
                changes = self._plan(*find()).changes
                refused = {}
                for change in changes:
                    try:
                        _carry_out(change)
                        done.append(change.what)
                    except NetloomError as error:
                        refused[change.what] = error.message
                self._refused = refused
                if not changes:
                    break
                self._known = None
        return tuple(done)

    def examine(self, *, seen_within_s: float = 0.0) -> Plan:
        """What ``let_through`` would do, and what stays blocked; change nothing. Raises HostRefused.

        ``seen_within_s``: a result of so many seconds ago is good enough. A look costs more with each link of the host.
        """
        with self._lock:
            seen = time.monotonic() - self._looked <= seen_within_s
            plan = self._last if seen else self._plan(*_guarded())
            said = (": ".join(filter(None, (it.what, self._refused.get(it.what)))) for it in plan.changes)
            return msgspec.structs.replace(plan, changes=tuple(map(Change, said)))

    def _plan(self, bridges: _Bridges, host_links: list[Link]) -> Plan:
        plan = self._examined(bridges, host_links)
        self._last, self._looked = plan, time.monotonic()
        return plan

    def _examined(self, bridges: _Bridges, host_links: list[Link]) -> Plan:
        calls = sysctl.read(None, _CALLS.values())
        in_force = {
            name: tuple(family for family, key in _CALLS.items() if calls[key] == "1" or _calls_itself(link, family))
            for name, link in bridges.links.items()
        }
        own = [bridges.links[it] for it in bridges.own]
        ports = _guests(own, host_links) if any(in_force.values()) else {}
        legacy = {family: _legacy_tables(names_file) for family, (_, names_file) in _LEGACY.items()}
        with kept.netfilter(None) as nfnetlink:
            generation = nft_netlink.generation(nfnetlink)
            key = (generation, bridges, tuple(sorted(in_force.items())), tuple(sorted(ports.items())))
            if self._known is not None and self._known[0] == key and not any(legacy.values()):
                return self._known[1]
            plan = _plan_nft(nfnetlink, bridges, in_force, ports)
        for family, tables in legacy.items():
            if "filter" in tables:
                plan = _joined(plan, _plan_legacy(family, bridges, in_force))
        self._known = key, plan
        return plan


def _guarded() -> tuple[_Bridges, list[Link]]:
    """The guarded bridges, with those of the selftest, and all links of the host. Raises HostRefused.

    All links are listed at once: a request for each bridge would take longer with each network, and the kernel looks at
    all links to list the ports of one bridge.
    """
    guard = guarded_others()
    own = guarded_bridges() | {
        # The host takes no frames from a closed bridge, so all that is forwarded there is bridged.
        it
        for it in guard.closed & guard.bridges  # guard: bridges-of-the-kvm-agent-are-let-through
        if names.carrier_of(it) in guard.uplinks  # guard: a-bridge-with-another-name-belongs-to-others
    }
    host_links = links.list_links(None)
    found = {it.name: it for it in host_links if it.name in own or it.name in guard.bridges}
    tested = {it.name: it for it in host_links if it.kind == "bridge" and it.alias == TEST_ALIAS}
    others = guard.bridges & found.keys() - own
    accepted = frozenset(it for it in others if found[it].alias == ACCEPTED)
    return _Bridges((own & found.keys()) | tested.keys(), accepted, others - accepted, found | tested), host_links


def _joined(one: Plan, other: Plan) -> Plan:
    return Plan(one.changes + other.changes, one.blocked + other.blocked, one.dropped_at + other.dropped_at)


def _calls_itself(link: Link, family: int) -> bool:
    return link.calls_iptables if family == 4 else link.calls_ip6tables


def _guests(bridges: Iterable[Link], host_links: Iterable[Link]) -> dict[str, tuple[str, ...]]:
    """The names of the ports of each bridge that are not ours."""
    ports: dict[int | None, list[str]] = defaultdict(list)
    for it in host_links:
        if it.master_index is not None and not HostLink(name=it.name, alias=it.alias).ours:
            ports[it.master_index].append(it.name)
    return {bridge.name: tuple(sorted(ports[bridge.index])) for bridge in bridges}


def _listed(bridges: list[str]) -> str:
    more = len(bridges) - _NAMED_MAX
    return ", ".join(bridges[:_NAMED_MAX]) + (f" and {more} more" if more > 0 else "")


def _carry_out(change: Change) -> None:
    if change.script:
        with kept.nft(None) as nft:
            nft.run(change.script)
    for command in change.commands:
        _legacy(command)


# ----------------------------------------------------------------------------------------------------------- nf_tables


class _Tables:
    """The rules of the host's tables, decoded when they are needed."""

    def __init__(self, nfnetlink: Socket) -> None:
        self._nfnetlink = nfnetlink
        self.chains = [it for it in nft_rules.list_chains(nfnetlink) if it.table.name not in (GUARD_TABLE, UNTRACKED)]
        self.owned = nft_rules.owned_tables(nfnetlink)
        self._raw: dict[Table, dict[str, list[nft_rules.Rule]]] = {}

    def bases(self) -> list[Chain]:
        """The base chains that a bridged frame passes, without those for NAT."""
        return [it for it in self.chains if it.hook in _HOOKS and it.kind != "nat"]

    def with_ours(self) -> set[Table]:
        return {it.table for it in self.chains if it.name in OURS}

    def has(self, table: Table, chain: str) -> bool:
        return any(it.table == table and it.name == chain for it in self.chains)

    def raw(self, table: Table) -> dict[str, list[nft_rules.Rule]]:
        if table not in self._raw:
            rules: dict[str, list[nft_rules.Rule]] = defaultdict(list)
            for rule in nft_rules.list_rules(self._nfnetlink, table):
                rules[rule.chain].append(rule)
            self._raw[table] = dict(rules)
        return self._raw[table]

    def lines(self, table: Table) -> _Lines:
        return _Lines(self._nfnetlink, table, self.raw(table))


class _Lines(Mapping[str, list[Line]]):
    """The rules of a table by chain. A chain is decoded when it is looked up: a table may have thousands of rules."""

    def __init__(self, nfnetlink: Socket, table: Table, raw: Mapping[str, list[nft_rules.Rule]]) -> None:
        self._nfnetlink = nfnetlink
        self._table = table
        self._raw = raw
        self._decoded: dict[str, list[Line]] = {}

    def __getitem__(self, chain: str) -> list[Line]:
        if chain not in self._decoded:
            self._decoded[chain] = [decode(rule, self._keys) for rule in self._raw[chain]]
        return self._decoded[chain]

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)

    def mentioning(self, names: Iterable[str]) -> dict[str, list[Line]]:
        """The chains that may have a jump to one of the named chains."""
        wanted = [name.encode() + b"\0" for name in names]
        return {
            chain: self[chain]
            for chain, rules in self._raw.items()
            if any(name in rule.raw for rule in rules for name in wanted)
        }

    def _keys(self, name: str) -> tuple[int, frozenset[bytes]]:
        return nft_rules.set_keys(self._nfnetlink, self._table, name)


def _plan_nft(
    nfnetlink: Socket,
    bridges: _Bridges,
    in_force: Mapping[str, tuple[int, ...]],
    ports: Mapping[str, tuple[str, ...]],
) -> Plan:
    tables = _Tables(nfnetlink)
    bases = tables.bases() if any(in_force.values()) else []
    wanted: dict[Table, tuple[set[Place], dict[str, set[str]]]] = {table: (set(), {}) for table in tables.with_ours()}
    blocked: dict[tuple[str, str], Blocked] = {}
    dropped_at: dict[str, None] = {}
    for table in dict.fromkeys(it.table for it in bases):
        lines = tables.lines(table)
        for base in [it for it in bases if it.table == table]:
            assert base.hook is not None
            for bridge, link in sorted(bridges.links.items()):
                if base.hook == PREROUTING and bridge not in bridges.own:
                    continue  # the frames for the host itself pass prerouting too
                families = set(_FAMILIES[table.family]) & set(in_force[bridge])
                for frame in (f for it in families for f in frames(it, base.hook, bridge, link.index)):
                    drop = default_drop(lines, base.name, base.drops, frame)
                    if drop is None:
                        continue
                    where = _where(table, drop)
                    dropped_at[where] = None
                    if (
                        bridge in bridges.others  # guard: bridges-of-others-are-not-let-through
                        or drop.named
                        or table in tables.owned
                    ):
                        of_others = bridge in bridges.others
                        before = blocked.get((bridge, where))
                        blocked[bridge, where] = Blocked(
                            bridge,
                            where,
                            _why(drop, of_others=of_others),
                            _consent(bridge) if of_others and not drop.named else _remedy(tables, table, bridge),
                            families=tuple(sorted({*(before.families if before else ()), frame.family})),
                        )
                        continue
                    places, chains = wanted.setdefault(table, (set(), {}))
                    places.add(Place(drop.chain, drop.handle or 0, _HOOKS[base.hook]))
                    chains.setdefault(_HOOKS[base.hook], set()).add(bridge)
    changes = []
    for table, (places, chains) in sorted(wanted.items()):
        script = _script(tables, table, places, chains)
        if script:
            names = sorted(set().union(*chains.values()))
            what = f"accept the frames of {_listed(names)} in table {table}" if names else f"leave table {table}"
            changes.append(Change(what, script))
    changes += _untracked(nfnetlink, tables, {it for it in bridges.own if in_force[it]}, ports)
    return Plan(tuple(changes), tuple(blocked.values()), tuple(dropped_at))


def _where(table: Table, drop: Drop) -> str:
    return f"table {table}, chain {drop.chain}" + ("" if drop.handle else ", policy drop")


def _why(drop: Drop, *, of_others: bool) -> str:
    if drop.named:
        return "the rules there name the bridge"
    return "the bridge belongs to somebody else" if of_others else "only its owner may change this table"


def _consent(bridge: str) -> str:
    return f"ip link set {bridge} alias {ACCEPTED} lets netloom accept them"


def _remedy(tables: _Tables, table: Table, bridge: str) -> str:
    both = f"-i {bridge} -o {bridge}"
    if table in tables.owned and table.name == "firewalld":
        return "set NftablesTableOwner=no in /etc/firewalld/firewalld.conf and restart firewalld, then netloom does it"
    if table.name.startswith("firewalld"):
        return f"firewall-cmd --permanent --zone=trusted --add-interface={bridge}; firewall-cmd --reload"
    if tables.has(table, "ufw-before-forward"):
        return f"ufw route allow in on {bridge} out on {bridge}"
    if table.family != "inet" and table.name == "filter":
        program = "iptables" if table.family == "ip" else "ip6tables"
        chain = "DOCKER-USER" if tables.has(table, "DOCKER-USER") else "FORWARD"
        return f"{program} -I {chain} {both} -j ACCEPT"
    return f"accept it there: iifname {bridge} oifname {bridge} accept"


def _script(tables: _Tables, table: Table, places: set[Place], chains: Mapping[str, set[str]]) -> str:
    """The transaction that brings our chains and jumps in a table to what is wanted; empty when they are so."""
    lines = tables.lines(table)
    jumps = [
        (chain, line.handle, _place_of(chain, at, rules, line.target))
        for chain, rules in lines.mentioning(OURS).items()
        for at, line in enumerate(rules)
        if line.target in OURS
    ]
    have = {
        name: sorted(value.rstrip(b"\0").decode() for line in lines.get(name, ()) for value in _iifnames(line))
        for name in OURS
        if tables.has(table, name)
    }
    if sorted(it for _, _, it in jumps) == sorted(places) and have == {it: sorted(chains[it]) for it in chains}:
        return ""
    said = [f"add chain {table} {name}\nflush chain {table} {name}" for name in {**have, **chains}]
    for name, bridges in chains.items():
        for bridge in sorted(bridges):
            out = f' oifname "{bridge}"' if name == FORWARDED else ""
            rule = f'iifname "{bridge}"{out} counter accept comment "netloom"'
            said.append(f"add rule {table} {name} {rule}")  # guard: frames-pass-the-firewall-of-the-host
    said += [f"delete rule {table} {chain} handle {handle}" for chain, handle, _ in jumps]
    for place in sorted(places):
        verb, at = ("insert", f" handle {place.handle}") if place.handle else ("add", "")
        said.append(f'{verb} rule {table} {place.chain}{at} counter jump {place.jump_to} comment "netloom"')
    said += [f"delete chain {table} {name}" for name in have if name not in chains]
    return "\n".join(said) + "\n"


def _place_of(chain: str, at: int, rules: list[Line], jump_to: str) -> Place:
    """The place of a jump of ours: the first rule after it that is not one of ours."""
    return Place(chain, next((it.handle for it in rules[at:] if it.target not in OURS), 0), jump_to)


def _iifnames(line: Line) -> list[bytes]:
    return [value for test in line.tests if test.field == "iifname" for value in test.values]


def _untracked(nfnetlink: Socket, tables: _Tables, own: set[str], ports: Mapping[str, tuple[str, ...]]) -> list[Change]:
    """Have the host not track the frames of our bridges."""
    raw = b"".join(
        rule.raw
        for table in {it.table for it in tables.bases()}
        for chain, rules in (tables.raw(table).items() if own else ())
        if chain not in OURS
        for rule in rules
        if not any(name in rule.raw for name in (FORWARDED.encode() + b"\0", ARRIVED.encode() + b"\0"))
    )
    wanted = {it for it in own if not any(name.encode() + b"\0" in raw for name in (it, *ports.get(it, ())))}
    have = nft_netlink.link_names(nfnetlink, UNTRACKED_FAMILY, UNTRACKED, UNTRACKED)
    rules = nft_netlink.rules(nfnetlink, UNTRACKED_FAMILY, UNTRACKED)
    if have == wanted and bool(rules) == bool(wanted):
        return []
    table = f"{UNTRACKED_FAMILY} {UNTRACKED}"
    if not wanted:
        return [Change("track the frames of all bridges", f"add table {table}\ndelete table {table}\n")]
    listed = ", ".join(f'"{it}"' for it in sorted(wanted))
    script = [
        f"add table {table}",
        f"add set {table} {UNTRACKED} {{ type ifname; }}",
        f"flush set {table} {UNTRACKED}",
        f"add element {table} {UNTRACKED} {{ {listed} }}",
        f"add chain {table} {UNTRACKED} {{ type filter hook prerouting priority {_RAW}; policy accept; }}",
        f"flush chain {table} {UNTRACKED}",
        f"add rule {table} {UNTRACKED} iifname @{UNTRACKED} notrack",  # guard: the-host-does-not-translate-frames
    ]
    return [Change(f"do not track the frames of {_listed(sorted(wanted))}", "\n".join(script) + "\n")]


# ------------------------------------------------------------------------------------------------------ iptables-legacy


def _legacy_tables(names_file: str) -> frozenset[str]:
    """The tables that iptables-legacy has loaded in this namespace."""
    try:
        return frozenset(Path("/proc/thread-self/net", names_file).read_text().split())
    except OSError:
        return frozenset()


def _plan_legacy(
    family: int,
    bridges: _Bridges,
    in_force: Mapping[str, tuple[int, ...]],
) -> Plan:
    program, _ = _LEGACY[family]
    concerned = sorted(it for it in bridges.links if family in in_force[it])
    if shutil.which(program, path=PATH) is None:
        where, why = f"tables of {program}", f"they cannot be read; install {program}"
        return Plan(blocked=tuple(Blocked(it, where, why, "", surely=False, families=(family,)) for it in concerned))
    listing = _legacy((program, "-S"))
    chains, policies = parse(listing)
    had = FORWARDED in chains
    if not had and not concerned:
        return Plan()
    passing: dict[str, None] = {}
    places: set[int] = set()
    blocked: dict[str, Blocked] = {}
    dropped_at: dict[str, None] = {}
    for frame in (f for it in concerned for f in frames(family, FORWARD, it, bridges.links[it].index)):
        bridge = frame.bridge
        drop = default_drop(chains, "FORWARD", policies.get("FORWARD", False), frame)
        if drop is None:
            continue
        where = f"{program}, chain {drop.chain}" + ("" if drop.handle else ", policy drop")
        dropped_at[where] = None
        if bridge in bridges.others or drop.named:
            remedy = f"{program} -I FORWARD -i {bridge} -o {bridge} -j ACCEPT"
            of_others = bridge in bridges.others
            remedy = _consent(bridge) if of_others and not drop.named else remedy
            blocked[bridge] = Blocked(bridge, where, _why(drop, of_others=of_others), remedy, families=(family,))
            continue
        passing[bridge] = None
        # One jump only: each is inserted by its number, which may change at any time.
        places.add(number_in_forward(chains, drop))
    changes = legacy_changes(program, chains, list(passing), min(places, default=0))
    return Plan(changes, tuple(blocked.values()), tuple(dropped_at))


def number_in_forward(chains: Mapping[str, list[Line]], drop: Drop) -> int:
    """The number for our jump in FORWARD: before the rule that drops, or leads there; last if the policy drops."""
    others = [it for it in chains.get("FORWARD", ()) if it.target != FORWARDED]
    if drop.handle is None:
        return len(others) + 1
    if drop.chain == "FORWARD":
        return 1 + [it.handle for it in others].index(drop.handle)
    return 1 + next(at for at, it in enumerate(others) if _leads_to(chains, it, drop.chain))


def _leads_to(chains: Mapping[str, list[Line]], line: Line, chain: str, depth: int = 0) -> bool:
    if depth > len(chains):
        return False
    return line.target == chain or any(_leads_to(chains, it, chain, depth + 1) for it in chains.get(line.target, ()))


def legacy_changes(
    program: str, chains: Mapping[str, list[Line]], bridges: list[str], number: int
) -> tuple[Change, ...]:
    """What iptables-legacy has to do so that ``bridges`` pass, with our jump as rule ``number`` of FORWARD."""
    forward = chains.get("FORWARD", [])
    jumps = [at for at, it in enumerate(forward, 1) if it.target == FORWARDED]
    have = sorted(value.rstrip(b"\0").decode() for it in chains.get(FORWARDED, ()) for value in _iifnames(it))
    if have == bridges and jumps == ([number] if bridges else []) and (FORWARDED in chains) == bool(bridges):
        return ()
    commands: list[tuple[str, ...]] = [(program, "-D", "FORWARD", str(at)) for at in reversed(jumps)]
    if FORWARDED in chains:
        commands += [(program, "-F", FORWARDED)]
        commands += [] if bridges else [(program, "-X", FORWARDED)]
    elif bridges:
        commands += [(program, "-N", FORWARDED)]
    comment = ("-m", "comment", "--comment", "netloom")
    commands += [
        (
            program,
            "-A",
            FORWARDED,
            "-i",
            it,
            "-o",
            it,
            "-m",
            "physdev",
            "--physdev-is-bridged",
            *comment,
            "-j",
            "ACCEPT",
        )
        for it in bridges
    ]
    if bridges:
        commands += [(program, "-I", "FORWARD", str(number), *comment, "-j", FORWARDED)]
    what = f"accept the frames of {_listed(bridges)} in {program}" if bridges else f"leave {program}"
    return (Change(what, commands=tuple(commands)),)


def _legacy(command: tuple[str, ...]) -> str:
    """Run iptables-legacy and return its output. Raises HostRefused."""
    program, *words = command
    try:
        done = subprocess.run(
            [program, "-w", "10", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={"PATH": PATH, "LC_ALL": "C"},
            cwd="/",
            timeout=_LEGACY_S_MAX,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostRefused(f"{program}: {error}") from error
    if done.returncode:
        raise HostRefused(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
