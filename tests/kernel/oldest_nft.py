"""Load rulesets with the libnftables that LD_LIBRARY_PATH names. Arguments: a namespace, ``loads`` or ``changes``.

It writes JSON. ``version``: of the library. ``loaded``: a digest of each golden ruleset in the kernel. ``wrong``:
changes to golden rulesets that left the table with another marker. ``failed``: the needed tests of the selftest.
``gates``: the closed gates after each change. ``leases``: the same for the ports that need a lease.
``host``: the rules of the host's own tables.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from golden.rendered import load, scenarios
from netloom.agent.host import frames, gate, lease
from netloom.agent.host.observe_nft import GUARD_TABLE, observe_table, table_digest
from netloom.agent.kernel import kept, links, namespaces, netlink, nft_netlink
from netloom.agent.kernel.netlink import Socket
from netloom.agent.kernel.nft import Nft, version
from netloom.agent.setup import selftest
from netloom.plan.have import Others
from netloom.render import ruleset
from netloom.render.ruleset import Ruleset
from netloom.render.scope import render


def rulesets() -> dict[str, Ruleset]:
    wanted = {it.name: render(load(it)).ruleset for it in scenarios()}
    return {name: it for name, it in wanted.items() if it is not None}


def digests(namespace: str) -> dict[str, str]:
    """Load each ruleset afresh, first into a namespace without a table, then instead of the one before."""
    found = {}
    for name, want in rulesets().items():
        with Nft(namespace, use="library") as nft:
            nft.run(ruleset.fresh(want))
        found[name] = table_digest(namespace)
    return found


def wrong_changes(namespace: str) -> list[str]:
    """Change the table from each ruleset to the next one, knowing the present ruleset or the names only."""
    every = rulesets()
    wrong = []
    for known in (True, False):
        have = next(iter(every.values()))
        with Nft(namespace, use="library") as nft:
            nft.run(ruleset.fresh(have))
            for name, want in [*every.items(), *reversed(every.items())]:
                text = ruleset.swap(have, want) if known else ruleset.take_over(ruleset.names(have), want)
                if text:
                    nft.run(text)
                if observe_table(namespace).marker != want.marker:
                    wrong.append(name)
                have = want
    return wrong


def failed_tests() -> list[str]:
    return [f"{it.what}: {it.says}" for it in selftest.run() if it.needed and not it.ok]


def host_chains() -> dict[str, int]:
    """The number of rules in each chain of the host, with a guarded bridge of others. For this thread, for good."""
    namespaces.enter_scratch()
    links.change(None, [links.make_veth("nic", "", "port", "", 0, os.open("/proc/thread-self/ns/net", os.O_RDONLY))])
    subprocess.run(["ip", "link", "add", "cloudbr0", "type", "bridge"], check=True)  # without a bound on what it learns
    bridge, nic, port = (frozenset([name]) for name in ("cloudbr0", "nic", "port"))
    frames.guard_others(Others(bridges=bridge, closed=bridge, ports=port, uplinks=nic, trunks=nic))
    found: dict[str, int] = {}
    with Socket(netlink.NETLINK_NETFILTER) as nfnetlink:
        for family in ("netdev", "bridge", "inet", "arp"):
            for rule in nft_netlink.rules(nfnetlink, family, GUARD_TABLE):
                name = f"{family} {netlink.string(rule.chain)}"
                found[name] = found.get(name, 0) + 1
    return found


def gates() -> list[list[str]]:
    """The closed gates after each change: of new, of further and of damaged ones, and after some and all were opened.

    In a namespace of its own, for this thread for good.
    """
    namespaces.enter_scratch()
    found = []
    for change, links_of in (
        (gate.close, ["a", "b"]),
        (gate.close, ["c"]),
        (damage, []),
        (gate.close, ["d"]),
        (gate.open_, ["b", "c"]),
        (gate.open_, ["a", "d"]),
    ):
        change(links_of)
        found.append(sorted(gate.closed()))
    return found


def damage(_: list[str]) -> None:
    with Nft(None) as nft:
        nft.run(f"flush chain {gate.TABLE.label} input")


def leases() -> list[dict[str, int]]:
    """The ports that need a lease after each change, as ``gates``."""
    namespaces.enter_scratch()
    found = []
    for ports in ({"a": 1, "b": 2}, {"b": 1}, {}, {"a": 2, "c": 1}):
        if ports:
            lease.guard(ports)
        else:
            with Nft(None) as nft:
                nft.run(f"flush chain {lease.TABLE.label} pass")
        found.append(lease.guarded())
    return found


def many_scripts(namespace: str) -> int:
    """Run scripts in four threads, as the worker threads of an agent do. The number of those that were accepted."""

    def run(at: int) -> None:
        with kept.nft(namespace) as nft:
            nft.run(f"add table inet t{at}")

    with ThreadPoolExecutor(4) as pool:
        return len(list(pool.map(run, range(200))))


def main() -> None:
    namespace, part = sys.argv[1:]
    found: dict[str, object] = {"version": version()}
    if part == "loads":
        found["loaded"] = digests(namespace)
    elif part == "threads":
        found["scripts"] = many_scripts(namespace)
    else:
        found |= {"wrong": wrong_changes(namespace), "failed": failed_tests(), "host": host_chains(), "gates": gates()}
        found["leases"] = leases()
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
