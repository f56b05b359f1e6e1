"""The share of each VM in the connections that conntrack holds for a scope.

The kernel has one maximum for each namespace, ``nf_conntrack_max``. Without shares one VM could use it up, and its
whole network would have no new connections. A VM has two shares: of the connections that it opens, by its MAC address,
and of those that others open to it, by its IP address. The second share is larger, because its clients are many and may
be hostile. Senders that are no NIC of the network have one share together, and so have destinations that are no NIC.
A public address has the second share for connections to the device itself.

``ct count`` examines its whole list at each new connection: 250 us for a list of 1,000 (measured, 6.18). So it is asked
about one new connection of ``_SAMPLED``, chosen at random, and its list has as much of the share. If the list is full,
the VM is in the set ``opened_over`` for a second, and its new connections are dropped at the cost of one lookup. A
share is exact within some ten percent.

A set is never full, because its keys are NICs, held addresses and links. If the kernel cannot add an element
nevertheless, the sampled connection counts as one too many. Only the first packet of a connection is counted, when all
other chains have accepted it. So connections that exist are never cut, whatever happens to these sets. The kernel
removes what has ended from the lists, and elements with empty lists. It does not count a TCP connection that is closed;
short time-outs (``scope``) end its entry.

The limit is part of the names of the sets: an element keeps the limit with which it was added.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec.structs import replace

from netloom import names
from netloom.render import senders
from netloom.render.active import Active
from netloom.render.device import DNS_PORT, HTTP_PORTS, PUBLIC_LINKS
from netloom.render.ip6 import ip6_networks
from netloom.render.ruleset import Chain, NftSet, Ruleset
from netloom.state import Network

REACHED_TIMES = 4  # the share of connections to a VM, as a multiple of the share of those that it opens

# Sets of what has exceeded its share within the last minute, for the custom actions check and show.
NOTED_SENDERS = "connections_of"  # MAC addresses
NOTED_TARGETS = ("connections_to", "connections_to6")  # IP addresses
NOTED_OTHERS = "connections_of_others"  # links: of senders, or of clients of destinations, that are no NIC

_SAMPLED = 64
_OVER = "1s"
_FIRST_PACKET = (
    "ct state untracked accept",
    "ct status & confirmed != 0 accept",  # guard: only-first-packets-are-counted
)


def shared(rules: Ruleset, now: Active, share: int) -> Ruleset:
    """``rules`` with a share of ``share`` connections for each VM; 0: without."""
    if not share or not now.networks:
        return rules
    over_ip6 = bool(ip6_networks(now))
    return replace(
        rules,
        sets=(*rules.sets, *_sets(now, share, over_ip6=over_ip6)),
        chains=(*rules.chains, _through(now), _to_device(now), *_chains(now, share, over_ip6=over_ip6)),
    )


def _sets(now: Active, share: int, *, over_ip6: bool) -> Iterable[NftSet]:
    size = senders.set_size(len(now.held) + sum(len(it.nics) for it in now.networks))
    kinds = [(_OF, share, "ether_addr"), (_TO, share * REACHED_TIMES, "ipv4_addr")]
    kinds += [(_TO6, share * REACHED_TIMES, "ipv6_addr")] if over_ip6 else []
    kinds += [(_REST, share, "iface_index")]
    for name, limit, key in kinds:
        # Without a timeout: the kernel counts connections in such sets only.
        yield NftSet(name=_counted(name, limit), kind="set", type=key, flags="dynamic", size=size)
        yield NftSet(name=f"{name}_over", kind="set", type=key, flags="dynamic,timeout", size=size, timeout=_OVER)
    noted = {NOTED_SENDERS: "ether_addr", NOTED_OTHERS: "iface_index"}
    for name, key in (noted | dict(zip(NOTED_TARGETS, ("ipv4_addr", "ipv6_addr"), strict=True))).items():
        if over_ip6 or key != "ipv6_addr":
            yield NftSet(name=name, kind="set", type=key, flags="dynamic,timeout", size=size, timeout="1m")


# What connections are counted by: the sender, the destination, the link of those that are no NIC.
_OF, _TO, _TO6, _REST = "opened", "reached", "reached6", "others"


def _counted(name: str, limit: int) -> str:
    return f"{name}_{limit}"


def _share(name: str, key: str, limit: int, noted: str) -> list[str]:
    """The rules for connections that have the share ``limit`` of the element ``key`` of a set."""
    return [
        f"{key} @{name}_over drop",
        f"numgen random mod {_SAMPLED} != 0 accept",
        f"add @{_counted(name, limit)} {{ {key} ct count {max(1, limit // _SAMPLED)} }} accept",
        f"update @{name}_over {{ {key} }}",  # guard: a-vm-has-its-share-of-connections
        f"update @{noted}",
        "drop",
    ]


def _chains(now: Active, share: int, *, over_ip6: bool) -> list[Chain]:
    to_vm = share * REACHED_TIMES
    noted4, noted6 = NOTED_TARGETS
    chains = [
        Chain(
            name=_OF,
            rules=tuple(_share(_OF, "ether saddr", share, f"{NOTED_SENDERS} {{ ether saddr }}")),
        ),
        Chain(
            name=f"{_OF}_by_others",
            rules=tuple(_share(_REST, "iif", share, f"{NOTED_OTHERS} {{ iif }}")),
        ),
        Chain(name=_TO, rules=tuple(_share(_TO, "ip daddr", to_vm, f"{noted4} {{ ip daddr }}"))),
        Chain(name=f"{_TO}_others", rules=tuple(_share(_REST, "iif", share, f"{NOTED_OTHERS} {{ iif }}"))),
    ]
    if over_ip6:
        chains += [
            Chain(name=_TO6, rules=tuple(_share(_TO6, "ip6 daddr", to_vm, f"{noted6} {{ ip6 daddr }}"))),
            Chain(name=f"{_TO6}_others", rules=tuple(_share(_REST, "iif", share, f"{NOTED_OTHERS} {{ iif }}"))),
        ]
    return chains


def _from_guests(network: Network) -> list[str]:
    link = f'iifname "{names.guest_link(network.network_id)}"'
    known = f"ether saddr @{senders.macs_set(network)}"
    return [f"{link} {known} goto {_OF}", f"{link} goto {_OF}_by_others"]


def _through(now: Active) -> Chain:
    rules = [*_FIRST_PACKET, *(rule for network in now.networks for rule in _from_guests(network))]
    rules += [f"ip daddr @known4 goto {_TO}", f"meta nfproto ipv4 goto {_TO}_others"]
    if ip6_networks(now):
        rules += [f"ip6 daddr @known6 goto {_TO6}", f"meta nfproto ipv6 goto {_TO6}_others"]
    return Chain(
        name="counting", hook="type filter hook forward priority filter + 10; policy accept;", rules=tuple(rules)
    )


def _to_device(now: Active) -> Chain:
    """Connections to the device. The services for guests have shares of their own (``senders``)."""
    rules = [*_FIRST_PACKET, 'iifname "lo" accept']
    http = ", ".join(map(str, HTTP_PORTS))
    for network in now.networks:
        link = f'iifname "{names.guest_link(network.network_id)}"'
        to_device = [f"{link} ip daddr {network.device_ip}"]
        to_device += [f"{link} ip6 daddr {network.ip6_gateway}"] if network.has_ip6 else []
        rules += [f"{link} udp dport 67 accept"]
        rules += [f"{it} meta l4proto {{ tcp, udp }} th dport {{ {DNS_PORT}, {http} }} accept" for it in to_device]
        rules += _from_guests(network)
    rules.append(f"iifname {PUBLIC_LINKS} meta nfproto ipv4 goto {_TO}")  # guard: a-public-address-has-its-share
    return Chain(
        name="counting_own", hook="type filter hook input priority filter + 10; policy accept;", rules=tuple(rules)
    )
