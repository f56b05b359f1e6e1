"""Load rulesets with the libnftables that LD_LIBRARY_PATH names. Arguments: a namespace, ``loads`` or ``changes``.

It writes JSON. ``version``: of the library. ``loaded``: a digest of each golden ruleset in the kernel. ``wrong``:
changes to golden rulesets that left the table with another marker. ``failed``: the needed tests of the selftest.
"""

from __future__ import annotations

import json
import sys

from golden.rendered import load, scenarios
from netloom.agent.host.observe_nft import observe_table, table_digest
from netloom.agent.kernel.nft import Nft, version
from netloom.agent.setup import selftest
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
                if observe_table(namespace).marker != ruleset.marker(want):
                    wrong.append(name)
                have = want
    return wrong


def failed_tests() -> list[str]:
    return [f"{it.what}: {it.says}" for it in selftest.run() if it.needed and not it.ok]


def main() -> None:
    namespace, part = sys.argv[1:]
    found: dict[str, object] = {"version": version()}
    if part == "loads":
        found["loaded"] = digests(namespace)
    else:
        found |= {"wrong": wrong_changes(namespace), "failed": failed_tests()}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
