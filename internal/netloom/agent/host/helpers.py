"""Which conntrack helpers the kernel of this host offers. A ruleset with another one would be refused as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from netloom.agent.kernel import kept, modules
from netloom.agent.kernel.nft import NftError, NftRefused
from netloom.render import helpers
from netloom.render.ruleset import Ruleset, fresh

_offered: set[str] = set()


def missing(names: Iterable[str]) -> tuple[str, ...]:
    """Those of the registration's helpers that the kernel does not offer, even after its modules were loaded.

    What was missing is asked again each time. If nftables cannot be used, nothing is missing: the load of the ruleset
    reports that.
    """
    unknown = [name for name in names if name not in _offered]
    if not unknown:
        return ()
    # The kernel loads nf_conntrack_<name> by itself, but not always nf_nat_<name>.
    modules.load(module for name in unknown for module in helpers.modules(name))
    try:
        with kept.nft(None) as nft:
            for name in unknown:
                probe = Ruleset(family="inet", table="netloom_probe", helpers=helpers.objects([name]))
                with contextlib.suppress(NftRefused):
                    nft.check(fresh(probe))
                    _offered.add(name)
    except NftError:
        return ()
    return tuple(name for name in unknown if name not in _offered)
