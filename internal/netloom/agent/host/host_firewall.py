"""What the host's own firewall does by default with a frame that a bridge forwards. Pure functions.

With the module br_netfilter the kernel hands bridged IPv4 and IPv6 frames to the hooks prerouting and forward of the
families ip, ip6 and inet (net/bridge/br_netfilter_hooks.c). There both the incoming and the outgoing link are the
bridge. A drop in any chain is final: an accept in another table does not change it.

``default_drop`` follows a frame of a protocol that is nothing special. A rule with a condition that cannot be decided
here, for example an address or a port, is a rule for special packets, so it is passed over.
"""

from __future__ import annotations

import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.nft_rules import FORWARD, Rule, big

# The chains in tables of others that belong to us, by hook: each accepts the frames of our bridges.
FORWARDED, ARRIVED = "netloom", "netloom-in"
OURS = (FORWARDED, ARRIVED)

Verdict = Literal["", "accept", "drop", "jump", "goto", "return"]

_DEPTH_MAX = 16  # of jumps, as in the kernel
_REGISTER_VERDICT = 0
_META_FIELDS = {
    1: "protocol",
    4: "iif",
    5: "oif",
    6: "iifname",
    7: "oifname",
    15: "family",
    16: "l4proto",
}  # NFT_META_*
_VERDICTS: dict[int, Verdict] = {0: "drop", 1: "accept", -3: "jump", -4: "goto", -5: "return"}
_L4PROTO_FIELDS = {(1, 9, 1), (1, 6, 1)}  # in the header of IPv4, and of IPv6: base, offset, length
_FIB_SADDR, _FIB_IIF, _FIB_RESULT_OIF = 1, 8, 1
_EQUAL, _NOT_EQUAL = 0, 1
_WITHOUT_A_CONDITION = {"counter", "log", "notrack", "objref", "dup", "flow_offload", "last", "secmark", "byteorder"}
_ACCEPTING = {"queue", "masq", "nat", "redir", "tproxy", "synproxy", "fwd"}
_LOADING = {"ct", "rt", "socket", "exthdr", "numgen", "hash", "osf", "bitwise", "xfrm", "tunnel"}
# Targets of iptables; those of other names let the packet go on.
_DROPPING_TARGETS = {"DROP", "REJECT", "TARPIT", "DELUDE", "STEAL"}
_ACCEPTING_TARGETS = {"ACCEPT", "DNAT", "SNAT", "MASQUERADE", "REDIRECT", "NETMAP", "TPROXY", "NFQUEUE", "SYNPROXY"}
_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58, "ipv6-icmp": 58}
_PHYSDEV_INVERT, _PHYSDEV_ASKS, _PHYSDEV_NAMES = 64, 65, 0b11  # linux/netfilter/xt_physdev.h
_RPFILTER_INVERT = 8  # linux/netfilter/xt_rpfilter.h


class Test(msgspec.Struct, frozen=True):
    """A condition. ``values``: those that match; a name without a zero byte at its end is a prefix."""

    field: str
    values: frozenset[bytes] = frozenset()
    inverted: bool = False


OTHER = Test("other")


class Line(msgspec.Struct, frozen=True):
    """A rule: its conditions, and what it does when all hold. ``target``: the chain of a jump.

    ``special``: it has a condition that cannot be decided here.
    """

    handle: int
    tests: tuple[Test, ...]
    verdict: Verdict
    target: str = ""
    special: bool = False


class Frame(NamedTuple):
    """A frame on the way through ``bridge``: IPv4 or IPv6 (``family`` 4 or 6) at a hook (NF_INET_*).

    ``l4proto``: the protocol that it carries (IPPROTO_*).
    """

    family: int
    l4proto: int
    hook: int
    bridge: str
    link_index: int


class Drop(NamedTuple):
    """Where a frame is dropped: the rule, or the end of a base chain (``handle`` None: its policy).

    ``named``: the rules on the way there name the bridge, so its owner has decided about it.
    """

    chain: str
    handle: int | None
    named: bool


def frames(family: int, hook: int, bridge: str, link_index: int) -> list[Frame]:
    """The frames to follow: TCP, UDP and ICMP, because a firewall may reject each protocol in its own way."""
    icmp = socket.IPPROTO_ICMP if family == 4 else socket.IPPROTO_ICMPV6
    return [Frame(family, it, hook, bridge, link_index) for it in (socket.IPPROTO_TCP, socket.IPPROTO_UDP, icmp)]


def default_drop(chains: Mapping[str, Sequence[Line]], base: str, policy_drops: bool, frame: Frame) -> Drop | None:
    """Where the base chain drops a frame that is nothing special; None when it passes. Our own jumps do not count."""
    outcome = _walk(chains, base, frame, named=False, depth=0)
    if isinstance(outcome, Drop):
        return outcome
    return Drop(base, None, named=False) if policy_drops and outcome != "accept" else None


def _walk(
    chains: Mapping[str, Sequence[Line]], chain: str, frame: Frame, *, named: bool, depth: int
) -> Drop | Literal["accept", ""]:
    """The outcome of a chain; empty when it returns to the chain that jumped to it."""
    for line in chains.get(chain, ()):
        if line.special or line.target in OURS or depth > _DEPTH_MAX:
            continue
        held = [_holds(test, frame) for test in line.tests]
        if not all(it is not None and it.matches for it in held):
            continue
        its_name = named or any(it is not None and it.names for it in held)
        match line.verdict:
            case "accept":
                return "accept"
            case "drop":
                return Drop(chain, line.handle, its_name)
            case "return":
                return ""
            case "jump" | "goto":
                outcome = _walk(chains, line.target, frame, named=its_name, depth=depth + 1)
                if outcome or line.verdict == "goto":
                    return outcome
    return ""


class _Held(NamedTuple):
    matches: bool
    names: bool = False  # the bridge


def _holds(test: Test, frame: Frame) -> _Held | None:
    """Whether the condition holds for the frame; None when that is not known."""
    match test.field:
        case "iifname" | "oifname":
            if test.field == "oifname" and frame.hook != FORWARD:
                return _Held(False)
            found = any(_is_name(it, frame.bridge) for it in test.values)
            return _Held(found != test.inverted, found and not test.inverted)
        case "iif" | "oif":
            if test.field == "oif" and frame.hook != FORWARD:
                return _Held(False)
            found = any(int.from_bytes(it, sys.byteorder) == frame.link_index for it in test.values)
            return _Held(found != test.inverted, found and not test.inverted)
        case "family":
            number = bytes((socket.AF_INET if frame.family == 4 else socket.AF_INET6,))  # the same as NFPROTO_*
            return _Held(any(it[:1] == number for it in test.values) != test.inverted)
        case "l4proto":
            return _Held((bytes((frame.l4proto,)) in test.values) != test.inverted)
        case "protocol":
            kind = b"\x08\x00" if frame.family == 4 else b"\x86\xdd"
            return _Held((kind in test.values) != test.inverted)
        case "route":
            # The host has no address on its guarded bridges, so it has no route there to the sender.
            return _Held((not any(any(it) for it in test.values)) != test.inverted)
        case "bridged":
            return _Held(not test.inverted) if frame.hook == FORWARD else None
    return None


def _is_name(value: bytes, name: str) -> bool:
    return value.rstrip(b"\0") == name.encode() if value.endswith(b"\0") else name.encode().startswith(value)


# ----------------------------------------------------------------------------------------------------------- nf_tables


def decode(rule: Rule, keys: Callable[[str], tuple[int, frozenset[bytes]]]) -> Line:
    """The rule as conditions and a verdict. ``keys``: the key length and the keys of a set of its table."""
    loaded: dict[int, str] = {}  # register -> what it has
    tests: list[Test] = []
    verdict: Verdict = ""
    target = ""
    for name, data in ((it.name, it.data) for it in rule.expressions()):
        match name:
            case "meta":
                if 1 in data:  # its register; without one it sets something
                    loaded[big(data[1])] = _META_FIELDS.get(big(data.get(2, b"")), "other")
            case "payload" if 1 in data:
                at = tuple(big(data.get(it, b"")) for it in (2, 3, 4))
                loaded[big(data[1])] = "l4proto" if at in _L4PROTO_FIELDS else "other"
            case "fib":
                asked = big(data.get(3, b"")) & (_FIB_SADDR | _FIB_IIF) == _FIB_SADDR | _FIB_IIF
                is_route = asked and big(data.get(2, b"")) == _FIB_RESULT_OIF
                loaded[big(data.get(1, b""))] = "route" if is_route else "other"
            case "cmp":
                compared = big(data.get(2, b""))
                value = dict(netlink.attributes(data.get(3, b""))).get(1, b"")
                field = loaded.get(big(data.get(1, b"")), "other")
                known = compared in (_EQUAL, _NOT_EQUAL)
                tests.append(Test(field, frozenset((value,)), compared == _NOT_EQUAL) if known else OTHER)
            case "lookup":
                tests.append(_lookup(data, loaded, keys))
            case "immediate" if big(data.get(1, b"")) == _REGISTER_VERDICT:
                code, target = _verdict(data)
                verdict = _VERDICTS.get(code, "")
            case "reject":
                verdict = "drop"
            case "match":
                tests += _xt_match(netlink.string(data.get(1)), data.get(3, b""))
            case "target":
                xt = netlink.string(data.get(1))
                verdict = "drop" if xt in _DROPPING_TARGETS else "accept" if xt in _ACCEPTING_TARGETS else ""
            case _ if name in _ACCEPTING:
                verdict = "accept"
            case _ if name in _LOADING or name == "immediate":
                loaded.clear()
            case _ if name not in _WITHOUT_A_CONDITION:
                tests.append(OTHER)
    return Line(rule.handle, tuple(tests), verdict, target, OTHER.field in {it.field for it in tests})


def _lookup(
    data: dict[int, bytes], loaded: dict[int, str], keys: Callable[[str], tuple[int, frozenset[bytes]]]
) -> Test:
    field = loaded.get(big(data.get(2, b"")), "other")
    if 3 in data or field in ("other", "route"):  # a map gives each key another verdict or value
        return OTHER
    length, found = keys(netlink.string(data.get(1)))
    wanted = {"iifname": 16, "oifname": 16, "iif": 4, "oif": 4, "family": 1, "l4proto": 1, "protocol": 2}[field]
    return Test(field, found, bool(big(data.get(5, b"")))) if length == wanted else OTHER


def _verdict(data: dict[int, bytes]) -> tuple[int, str]:
    values = netlink.attribute_map(netlink.attribute_map(data.get(2, b"")).get(2, b""))
    return int.from_bytes(values.get(1, b"\0\0\0\1"), "big", signed=True), netlink.string(values.get(2))


def _xt_match(name: str, info: bytes) -> list[Test]:
    if name == "comment":
        return []
    if name == "physdev" and len(info) > _PHYSDEV_ASKS and not info[_PHYSDEV_ASKS] & _PHYSDEV_NAMES:
        return [Test("bridged", inverted=bool(info[_PHYSDEV_INVERT] & info[_PHYSDEV_ASKS]))]
    if name == "rpfilter" and info:
        return [Test("route", frozenset((b"\0",)), inverted=not info[0] & _RPFILTER_INVERT)]
    return [OTHER]


# ------------------------------------------------------------------------------------------------------ iptables-legacy


def parse(listing: str) -> tuple[dict[str, list[Line]], dict[str, bool]]:
    """The chains of ``iptables -S``, and whether the policy of each base chain drops. Handles count from 1."""
    chains: dict[str, list[Line]] = {}
    policies: dict[str, bool] = {}
    for words in map(shlex.split, listing.splitlines()):
        match words:
            case ["-P", chain, policy]:
                policies[chain] = policy == "DROP"
                chains.setdefault(chain, [])
            case ["-N", chain]:
                chains.setdefault(chain, [])
            case ["-A", chain, *rest]:
                lines = chains.setdefault(chain, [])
                lines.append(_parse_rule(len(lines) + 1, rest))
    return chains, policies


def _parse_rule(number: int, words: list[str]) -> Line:
    tests: list[Test] = []
    verdict: Verdict = ""
    target = ""
    inverted = False
    rest = iter(words)
    for word in rest:
        match word:
            case "!":
                inverted = True
                continue
            case "-i" | "-o":
                field = "iifname" if word == "-i" else "oifname"
                name = next(rest, "")
                value = name[:-1].encode() if name.endswith("+") else name.encode() + b"\0"
                tests.append(Test(field, frozenset((value,)), inverted))
            case "-p":
                protocol = _PROTOCOLS.get(next(rest, ""))
                tests.append(OTHER if protocol is None else Test("l4proto", frozenset((bytes((protocol,)),)), inverted))
            case "-m" | "--reject-with" | "--log-prefix" | "--log-level" | "--comment":
                next(rest, "")  # the options of a match follow; these have no condition
            case "--physdev-is-bridged" | "--physdev-is-in" | "--physdev-is-out":
                tests.append(Test("bridged", inverted=inverted))
            case "-j" | "-g":
                target = next(rest, "")
                if target in _DROPPING_TARGETS:
                    verdict, target = "drop", ""
                elif target in _ACCEPTING_TARGETS:
                    verdict, target = "accept", ""
                elif target == "RETURN":
                    verdict, target = "return", ""
                else:
                    # A target such as LOG is a jump to a chain that does not exist: it changes nothing.
                    verdict = "jump" if word == "-j" else "goto"
            case _:
                tests.append(OTHER)
        inverted = False
    return Line(number, tuple(tests), verdict, target, OTHER in tests)
