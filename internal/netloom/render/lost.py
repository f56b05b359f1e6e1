"""Resets for TCP connections whose conntrack entry is lost.

Entries are lost when a host loses its power, with ``conntrack -F``, when the table is full, and when a network moves
without them. Conntrack does not pick up a TCP connection in the middle (``nf_conntrack_tcp_loose`` is 0), because a
revoked connection would come back, and the translation and the direction of a connection cannot be derived from a
segment in its middle. So the connection is over. Without a reset both ends would send again for many minutes.

A segment in the middle of a connection has ACK, and neither SYN nor RST. If it has no entry (``ct state invalid``), its
sender gets a reset, with the addresses that the sender knows, because nothing is translated yet. The other end gets its
reset when it sends. Segments without ACK (NULL, FIN and Xmas scans), SYN-ACK and RST have no answer.

These rules come after the checks of the source address, and after the rule that accepts established connections: a
packet of an open connection does not meet them. The answer depends on where the segment comes from:

- **A guest** gets a reset, whatever the destination is.
- **An outside host** gets a reset from an address with which guests open connections (``@outward``), for each port
  alike. From any other public address it gets one only if the firewall of the address accepts the segment, as it would
  accept a new connection (``at_<address>``, then ``to_device``, where all packets to public addresses arrive that are
  not translated). So an address or port that is closed to a host stays silent. An IPv6 prefix of guests answers for
  each address and port alike, so nobody learns which guests exist.
- **A process of the device** (haproxy, the resolver) gets a reset when it sends.

A reset is not longer than the segment, so nothing is amplified. Each outside address has a rate of its own (for IPv6
each /64), which bounds what a forged source address receives. A rate for all together would tell any outside host
whether a segment with a forged source address belongs to an open connection (as in CVE-2016-5696), and a flood would
silence the resets for others. If the set of rates is full, further addresses get no answer.
"""

from __future__ import annotations

from collections.abc import Iterable

from netloom.render.active import Active
from netloom.render.device import GUEST_LINKS, PUBLIC_LINKS
from netloom.render.pbr import PolicyNat
from netloom.render.ruleset import Chain, NftSet

# The set of rates allocates 11 to 32 bytes for each place at once. Places are soon free again, because thousands of
# clients may send at the same time after a power cut. Who gets no reset sends its segment again, ever more slowly.
_SOURCES_MAX = 1024
_RATE = "200/second burst 500 packets"
_RATE_TIMEOUT = "4s"  # longer than the burst needs to be full again

_IN_THE_MIDDLE = "tcp flags & (syn | rst | ack) == ack"
_RESET = "reject with tcp reset"
_NOT_TRACKED = "ct state invalid"


def sets(now: Active, nats: tuple[PolicyNat, ...]) -> Iterable[NftSet]:
    """The addresses with which guests open connections, the exit of each address, and the rate of each outside host.

    ``nats``: the operator's routes.
    """
    outward = {it.address for it in now.static_sources.values()} | {it.address.address for it in nats}
    outward |= {now.source_nat.address} if now.source_nat is not None else set()
    exits = {it.address: f"{it.exit:#010x}" for it in now.held}
    yield NftSet(name="outward", kind="set", type="ipv4_addr", elements=dict.fromkeys(sorted(outward), ""))
    yield NftSet(name="exits", kind="map", type="ipv4_addr : mark", elements=exits)
    for family in ("4", "6") if _prefixes6(now) else ("4",):
        yield NftSet(
            name=_rates(family),
            kind="set",
            type=f"ipv{family}_addr",
            flags="dynamic,timeout",
            size=_SOURCES_MAX,
            timeout=_RATE_TIMEOUT,
        )


def arriving() -> tuple[str, ...]:
    """The rules for packets without an entry, after the checks of their source address. No packet passes them."""
    return (
        f"{_NOT_TRACKED} {_IN_THE_MIDDLE} jump lost",  # guard: a-lost-connection-is-reset
        f"{_NOT_TRACKED} drop",
    )


def to_device() -> str:
    """The rule for segments from outside that the firewall of a public address has accepted."""
    return f"iifname {PUBLIC_LINKS} {_NOT_TRACKED} goto reset_outside"


def from_device() -> str:
    """The rule for the device's own segments without an entry: those of its processes, and resets."""
    return f"{_NOT_TRACKED} meta l4proto tcp jump lost_here"


def chains(now: Active, outside: str) -> Iterable[Chain]:
    """The chains that these rules use. ``outside``: matches packets that do not go to guests."""
    yield Chain(
        name="lost",
        rules=(
            # A reset goes to one other machine, and comes from an address of one.
            "meta pkttype != host drop",  # guard: a-broadcast-has-no-answer
            "fib saddr type != unicast drop",  # guard: a-reset-goes-to-one-machine
            "fib daddr type { broadcast, anycast, multicast } drop",  # guard: a-broadcast-address-has-no-answer
            f"iifname {GUEST_LINKS} {_RESET}",
            f"iifname {PUBLIC_LINKS} ip daddr @outward goto reset_outside",  # guard: only-addresses-of-guests-answer
            *(f"iifname {PUBLIC_LINKS} ip6 daddr {it} goto reset_outside" for it in _prefixes6(now)),
            "ip daddr vmap @held",
        ),
    )
    rates = [f"update @{_rates('4')} {{ ip saddr limit rate {_RATE} }} {_RESET}"]  # guard: resets-have-a-rate
    if _prefixes6(now):
        prefix = "ip6 saddr & ffff:ffff:ffff:ffff::"
        rates.append(f"update @{_rates('6')} {{ {prefix} limit rate {_RATE} }} {_RESET}")
    yield Chain(name="reset_outside", rules=(*rates, "drop"))
    yield Chain(
        name="lost_here",
        rules=(
            f"{_IN_THE_MIDDLE} {_RESET}",  # guard: a-lost-connection-of-the-device-is-reset
            # A reset has no connection whose mark names the exit.
            f"{outside} meta mark set ip saddr map @exits".strip(),  # guard: a-reset-leaves-by-its-exit
        ),
    )


def _prefixes6(now: Active) -> list[str]:
    return [network.ip6_cidr for network in now.networks if network.has_ip6]


def _rates(family: str) -> str:
    return f"resets{family}"
