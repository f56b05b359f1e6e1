"""Limits that the kernel keeps once for the whole host, by what the networks on it may use."""

from __future__ import annotations

from collections.abc import Mapping

from netloom.render.share import UNKNOWN_MAX

# An entry that is not resolved counts twice in IPv6: its group address is a neighbour, too. In IPv4, ARP and packets
# have a budget each.
_ENTRIES_OF_A_LINK = 2 * UNKNOWN_MAX
_ENTRIES_OF_THE_HOST = 1024
# gc_thresh1 to 3 as parts of the last, as in the kernel's defaults (128, 512, 1024).
_PARTS = {"gc_thresh1": 8, "gc_thresh2": 2, "gc_thresh3": 1}


def neighbour_limits(links: int, present: Mapping[str, str | None]) -> dict[str, str]:
    """The thresholds of both neighbour tables that are too low for this number of links of networks.

    ``present``: their values now; None for one that does not exist, as in a kernel without IPv6 or a container. The
    number is rounded up to a power of two, so that it changes rarely. A threshold is never lowered.
    """
    needed = 1 << (_ENTRIES_OF_THE_HOST + links * _ENTRIES_OF_A_LINK - 1).bit_length()
    wanted = {name: needed // _PARTS[name.rpartition("/")[2]] for name in present}
    return {
        name: str(wanted[name])
        for name, value in present.items()
        if value is not None and int(value) < wanted[name]  # guard: an-operators-limit-is-not-lowered
    }


NEIGHBOUR_LIMITS = tuple(
    f"net/{family}/neigh/default/{name}" for family in ("ipv4", "ipv6") for name in reversed(_PARTS)
)
