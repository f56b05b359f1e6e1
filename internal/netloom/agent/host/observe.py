"""Asks the kernel what is there of one scope, and of nothing else; changes nothing.

The cost does not grow with the number of networks on the host, nor with the number of rules in the scope: links of
the host are asked for by name, and which ruleset stands is told by the name of a set.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from netloom import names
from netloom.agent.kernel import addresses, links, namespaces, neighbours, netlink, routes, rules, sysctl
from netloom.agent.kernel.links import Link
from netloom.agent.kernel.netlink import Message, NetlinkError, Socket
from netloom.names import UNTAGGED
from netloom.netobjects import MAIN_TABLE, Address, Neighbour, Route, Rule
from netloom.plan.have import ASK_MAIN, CARRIERS, Have, HostLink, InsideLink
from netloom.plan.plan import alias_of
from netloom.render.ruleset import MARKER_PREFIX, Name, Ruleset
from netloom.render.want import Want

FAMILY, TABLE = "inet", "netloom"
GUARD_FAMILY, GUARD_TABLE = "netdev", "netloom"  # on the host itself, a chain for each bridge of ours

# linux/netfilter/nf_tables.h: message types, then the attributes of the objects that bear a name
_NFTABLES = 10 << 8
_GETCHAIN, _GETRULE_NFT, _GETSET, _GETSETELEM, _GETGEN, _GETOBJ = (_NFTABLES | it for it in (4, 7, 10, 13, 16, 19))
_FAMILIES = {"inet": 1, "netdev": 5}
_SET_ANONYMOUS, _SET_MAP, _OBJECT_COUNTER = 0x1, 0x8, 1


def observe(
    scope_id: str,
    want: Want,
    known: Ruleset | None,
    *,
    known_marker: str,
    claimed: frozenset[str],
    guarded: frozenset[str],
    also: frozenset[str] = frozenset(),
) -> Have:
    """What there is of the scope, in the words of ``want``.

    ``known``: the ruleset that was loaded last, as far as the caller knows; believed when the table bears its marker.
    ``also``: links of the host to look at besides those that the scope stands on.

    Raises HostRefused when the kernel does not answer.
    """
    namespace = names.namespace(scope_id)
    exists = namespaces.exists(namespace)
    ip6 = any(":" in it.cidr for it in want.addresses)
    inside = _Inside.of(namespace, ip6=ip6) if exists else _Inside()
    with Socket(netlink.NETLINK_ROUTE) as host:
        found = _host_links(host, want, inside.links, also)
    peers = _peers(inside.links, found, alias_of(scope_id), want)
    have = Have(
        scope_id=scope_id,
        namespace=namespace,
        exists=exists,
        loopback_up=any(link.up for link in inside.links if link.name == "lo"),
        links={
            link.name: InsideLink(
                name=link.name,
                kind=link.kind,
                mac=link.mac,
                up=link.up,
                host_link=peers.get(link.name, ""),
                mtu=link.mtu,
            )
            for link in inside.links
            if link.name != "lo"
        },
        addresses=inside.addresses,
        cut_off=inside.cut_off,
        routes=inside.routes,
        rules=inside.rules,
        asks_main=inside.asks_main,
        neighbours=inside.neighbours,
        host_links=_described(found, want),
        claimed=claimed,
        guarded=guarded,
    )
    if not exists:
        return have
    table, stands, generation = _table(namespace)
    return replace(
        have,
        foreign=_foreign(have, want) if table is None else "",
        sysctls={key: it for key, it in sysctl.read(namespace, want.sysctls).items() if it is not None},
        marker=stands,
        ruleset=known if known_marker and known_marker == stands else None,
        table=table,
        generation=generation,
    )


def our_shared_links() -> dict[str, HostLink]:
    """The bridges, VLAN links and tunnels on the host that are ours, with the bridges' ports."""
    with Socket(netlink.NETLINK_ROUTE) as host:
        listed = [link for kind in ("bridge", *CARRIERS) for link in links.list_links_over(host, kind=kind)]
        found = {link.index: link for link in listed if _ours(link)}
        for bridge in [link for link in found.values() if link.kind == "bridge"]:
            found |= {port.index: port for port in links.list_links_over(host, master=bridge.index)}
    return _described(found, Want(namespace=""))


def stray_ports(living: frozenset[str]) -> list[str]:
    """Host ends of ours whose scope is none of ``living`` and has no namespace any more."""
    aliases = {alias_of(scope_id) for scope_id in living}
    return [
        link.name
        for link in links.list_links(None)
        if link.kind == "veth"
        and _ours(link)
        and " " in link.alias
        and link.alias not in aliases
        and not namespaces.exists(names.namespace(link.alias.partition(" ")[2]))
    ]


def guarded_bridges() -> frozenset[str]:
    """The bridges whose frames the guard keeps from the host's sockets; none when there is no guard."""
    with Socket(netlink.NETLINK_NETFILTER) as nfnetlink:
        chains = _nft_dump(nfnetlink, _GETCHAIN, GUARD_FAMILY, netlink.text(1, GUARD_TABLE)) or ()
    return frozenset(netlink.string(it.get(3)) for it in chains if netlink.string(it.get(1)) == GUARD_TABLE)


# ----------------------------------------------------------------------------------------------- in the namespace


class _Inside(msgspec.Struct, frozen=True):
    """What rtnetlink tells of a namespace; of IPv6 only where it is spoken, for elsewhere there is none."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    cut_off: frozenset[Address] = frozenset()
    routes: tuple[Route, ...] = ()
    rules: tuple[Rule, ...] = ()
    asks_main: bool = True
    neighbours: tuple[Neighbour, ...] = ()

    @classmethod
    def of(cls, namespace: str, *, ip6: bool) -> _Inside:
        families = (socket.AF_INET, socket.AF_INET6) if ip6 else (socket.AF_INET,)
        with Socket(netlink.NETLINK_ROUTE, namespace) as inside:
            found = links.list_links_over(inside)
            names_of = {link.index: link.name for link in found}
            address_rows = [it for af in families for it in addresses.list_addresses_over(inside, names_of, af)]
            route_rows = [it for af in families for it in routes.list_routes_over(inside, names_of, af)]
            listed_rules = rules.list_rules_over(inside)
            neighbour_rows = neighbours.list_neighbours_over(inside, names_of)
        own = tuple(it.address for it in address_rows if it.address.link != "lo" and not it.link_local)
        up = {link.name for link in found if link.up and link.running}  # one that is down has no routes
        reached = {
            (it.route.link, it.route.destination)
            for it in route_rows
            if it.route.table == MAIN_TABLE or it.route.kind == "local"
        }
        return cls(
            tuple(found),
            own,
            frozenset(
                it
                for it in own
                if it.link in up
                and any(prefix and (it.link, prefix) not in reached for prefix in (it.on_link, it.itself))
            ),
            tuple(it.route for it in route_rows if not it.automatic),
            tuple(it for it in listed_rules if not rules.is_default(it)),
            ASK_MAIN in listed_rules,
            tuple(it.neighbour for it in neighbour_rows if it.permanent),
        )


def _foreign(have: Have, want: Want) -> str:
    """Why a namespace without a ruleset of ours is somebody else's; empty when it is empty, or ours after all."""
    ours = {port.mac for port in want.ports}
    if any(link.host_link or link.mac in ours for link in have.links.values()):
        return ""
    # What the kernel puts into every new namespace by itself (tunl0, sit0 and the like) is no sign of life.
    strange = [link.name for link in have.links.values() if link.kind not in ("ipip", "sit", "gre", "ip6tnl", "vti")]
    if strange:
        return f"link {strange[0]} is in it"
    process = _process_in(have.namespace)
    return f"process {process} runs in it" if process else ""


def _process_in(namespace: str) -> str:
    there = os.stat(f"{namespaces.NETNS_DIR}/{namespace}")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            its = os.stat(f"/proc/{pid}/ns/net")
        except OSError:
            continue  # it ended while we looked
        if (its.st_dev, its.st_ino) == (there.st_dev, there.st_ino):
            return pid
    return ""


def table_digest(namespace: str) -> str:
    """Of all chains, rules and elements of our table as the kernel lists them, in whatever order it does.

    Not of what counts or is numbered anew with every load. Raises HostRefused.
    """
    listed: list[bytes] = []
    with Socket(netlink.NETLINK_NETFILTER, namespace) as nfnetlink:
        for it in _nft_dump(nfnetlink, _GETCHAIN, FAMILY, netlink.text(1, TABLE)) or ():
            if netlink.string(it.get(1)) == TABLE:
                # linux/netfilter/nf_tables.h: NFTA_CHAIN_NAME, _HOOK, _POLICY
                listed.append(b"chain" + b"\0".join(it.get(part, b"") for part in (3, 4, 5)))
        rules = _nft_dump(nfnetlink, _GETRULE_NFT, FAMILY, netlink.text(1, TABLE)) or ()
        for at, it in enumerate(rules):
            # Rules are in order; NFTA_RULE_CHAIN, _EXPRESSIONS
            listed.append(b"rule%d" % at + it.get(2, b"") + it.get(4, b""))
        for it in _nft_dump(nfnetlink, _GETSET, FAMILY, netlink.text(1, TABLE)) or ():
            name = netlink.string(it.get(2))
            listed.append(b"set" + it.get(2, b"") + it.get(3, b"") if not name.startswith("__") else b"set")
            both = netlink.text(1, TABLE) + netlink.text(2, name)
            for part in _nft_dump(nfnetlink, _GETSETELEM, FAMILY, both) or ():
                # NFTA_SET_ELEM_LIST_ELEMENTS; an anonymous set's name is as good as its number.
                listed += [name.encode() + element for _, element in netlink.attributes(part.get(3, b""))]
    return hashlib.sha256(b"\n".join(sorted(listed))).hexdigest()


def _table(namespace: str) -> tuple[frozenset[Name] | None, str, int]:
    """The names of what is in our table, None when there is no table; the marker that stands, empty when none.

    And how often anything was done to the namespace's rules, as far as the kernel counts.
    """
    present: set[Name] = set()
    with Socket(netlink.NETLINK_NETFILTER, namespace) as nfnetlink:
        (counted,) = nfnetlink.request([Message(_GETGEN, payload=bytes(4), what="count transactions")])
        generation = int.from_bytes(netlink.attribute_map(counted.payload, 4).get(1, b""), "big")
        sets = _nft_dump(nfnetlink, _GETSET, FAMILY, netlink.text(1, TABLE))
        if sets is None:
            return None, "", generation
        for it in sets:
            flags = int.from_bytes(it.get(3, b""), "big")
            if not flags & _SET_ANONYMOUS:
                present.add(("map" if flags & _SET_MAP else "set", netlink.string(it.get(2))))
        stands = sorted(name for kind, name in present if kind == "set" and name.startswith(MARKER_PREFIX))
        for it in _nft_dump(nfnetlink, _GETCHAIN, FAMILY, netlink.text(1, TABLE)) or ():
            if netlink.string(it.get(1)) == TABLE:
                present.add(("chain", netlink.string(it.get(3))))
        for it in _nft_dump(nfnetlink, _GETOBJ, FAMILY, netlink.text(1, TABLE)) or ():
            if netlink.string(it.get(1)) == TABLE and int.from_bytes(it.get(3, b""), "big") == _OBJECT_COUNTER:
                present.add(("counter", netlink.string(it.get(2))))
    # Two markers: somebody added one by hand. Then nobody knows what stands.
    return frozenset(present), stands[0] if len(stands) == 1 else "", generation


def _nft_dump(nfnetlink: Socket, kind: int, family: str, attributes: bytes) -> list[dict[int, bytes]] | None:
    """The attributes of each object; None when the table or the set that was named is not there."""
    head = bytes((_FAMILIES[family], 0, 0, 0))
    try:
        found = nfnetlink.dump(Message(kind, payload=head + attributes, what=f"list {family} {TABLE}"))
    except NetlinkError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    return [netlink.attribute_map(payload, len(head)) for _, payload in found]


# ---------------------------------------------------------------------------------------------------- on the host


def _host_links(host: Socket, want: Want, inside: Iterable[Link], also: frozenset[str]) -> dict[int, Link]:
    """The links that the scope stands on, or stood on: by name, by being the other end, by being their bridge."""
    asked = set(also)
    for port in want.ports:
        segment = port.segment
        asked |= {port.host_link, segment.bridge, segment.nic, *([segment.vlan_link] if segment.vlan_link else [])}
    found = {link.index: link for link in links.find_links_over(host, asked)}
    peers = {link.parent_index for link in inside if link.kind == "veth" and link.parent_index}
    found |= {link.index: link for link in links.find_links_over(host, peers - found.keys())}
    by_name = {link.name: link for link in found.values()}
    for segment in {port.segment for port in want.ports}:
        nic = by_name.get(segment.nic)
        if segment.vlan_link and segment.vlan_link not in by_name and nic is not None:
            # Another program may have given the same VLAN link, or tunnel, another name.
            alike = [it for it in links.list_links_over(host, kind=segment.kind) if str(it.vlan_id) == segment.vlan]
            found |= {it.index: it for it in alike if segment.kind == "vxlan" or it.parent_index == nic.index}
    masters = {link.master_index for link in found.values() if link.master_index}
    found |= {link.index: link for link in links.find_links_over(host, masters - found.keys())}
    leaving = _leaving(found, want)
    for bridge in [it for it in found.values() if it.kind == "bridge" and (_ours(it) or it.index in leaving)]:
        found |= {port.index: port for port in links.list_links_over(host, master=bridge.index)}
    return found


def _leaving(found: dict[int, Link], want: Want) -> set[int]:
    """The bridges that a port of ours is in and has to leave: perhaps we are the last."""
    wanted = {port.segment.bridge for port in want.ports}
    masters = {link.master_index for link in found.values() if link.kind == "veth" and _ours(link)}
    return {it.index for it in found.values() if it.index in masters and it.name not in wanted}


def _described(found: dict[int, Link], want: Want) -> dict[str, HostLink]:
    untagged = {port.segment.nic for port in want.ports if port.segment.vlan == UNTAGGED}
    tunnelled = {port.segment.nic for port in want.ports if port.segment.kind == "vxlan"}
    senders = {link.master_index or link.index for link in found.values() if link.name in tunnelled}
    leaving = _leaving(found, want)
    strange = leaving | {link.index for link in found.values() if link.kind == "vlan" and link.master_index in leaving}
    ours = [link.name for link in found.values() if _ours(link)]
    silent = sysctl.read(None, (f"net/ipv6/conf/{name}/disable_ipv6" for name in ours))
    described = {}
    for link in found.values():
        master = found.get(link.master_index or 0)
        parent = found.get(link.parent_index or 0)
        described[link.name] = HostLink(
            name=link.name,
            kind=link.kind,
            up=link.up,
            master=master.name if master else "",
            alias=link.alias,
            parent=parent.name if parent and link.kind == "vlan" else "",
            vlan_id=link.vlan_id or 0,
            ports=tuple(sorted(port.name for port in found.values() if port.master_index == link.index)),
            addresses=_addresses(link.name)
            if link.index in senders | strange or (link.name in untagged and not link.master_index)
            else (),
            ipv6=silent.get(f"net/ipv6/conf/{link.name}/disable_ipv6") == "0",
            mtu=link.mtu,
        )
    return described


def _addresses(name: str) -> tuple[str, ...]:
    with Socket(netlink.NETLINK_ROUTE) as host:
        names_of = {link.index: link.name for link in links.list_links_over(host)}
        rows = addresses.list_addresses_over(host, names_of)
    return tuple(it.address.cidr for it in rows if it.address.link == name and not it.link_local)


def _peers(inside: Iterable[Link], host: dict[int, Link], alias: str, want: Want) -> dict[str, str]:
    """Inside link to host end, for pairs that name each other: numbers alone are those of any namespace.

    Somebody may have wiped the alias: names and address of a port of ours are as good.
    """
    ours = {(port.link, port.mac, port.host_link) for port in want.ports}
    pairs = {}
    for link in inside:
        other = host.get(link.parent_index or 0)
        if link.kind != "veth" or other is None or other.parent_index != link.index:
            continue
        if other.alias == alias or (not other.alias and (link.name, link.mac, other.name) in ours):
            pairs[link.name] = other.name
    return pairs


def _ours(link: Link) -> bool:
    return HostLink(name=link.name, alias=link.alias).ours
