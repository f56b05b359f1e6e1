"""Observe what exists of one scope; change nothing.

The cost does not grow with the number of networks on the host, nor with the number of rules in the scope: links of the
host are found by name or index, and the name of one set says which ruleset is loaded (observe_nft.py).

The links of one segment, and which of them the kernel says of each::

    namespace           host

    gst-204  <--------> vnetg204      port: names its other end (parent_index) and its bridge (master_index)
                           |
                           v
                        breth1-204    bridge: names none of its ports
                           ^
                           |
                        eth1.204      carrier, a VLAN link or VXLAN tunnel: names its bridge (master_index);
                           |            a VLAN link also names its NIC (parent_index)
                           v
                        eth1          uplink, the NIC; without a VLAN it is the carrier itself

So ports lead to their bridge by index, and the ports of a bridge are found by a listing that names the bridge.
"""

from __future__ import annotations

import os
import socket
from collections import defaultdict
from collections.abc import Iterable

import msgspec
from msgspec.structs import replace

from netloom import names
from netloom.agent.host.observe_nft import observe_table
from netloom.agent.kernel import addresses, links, namespaces, neighbours, netlink, routes, rules, sysctl
from netloom.agent.kernel.addresses import AddressRow
from netloom.agent.kernel.links import Link
from netloom.agent.kernel.neighbours import NeighbourRow
from netloom.agent.kernel.netlink import Socket
from netloom.agent.kernel.routes import RouteRow
from netloom.names import UNTAGGED
from netloom.netobjects import MAIN_TABLE, Address, Rule
from netloom.plan.have import ASK_MAIN, CARRIERS, Have, HostLink, InsideLink
from netloom.plan.plan import alias_of
from netloom.plan.uplinks import followed, is_nic_name
from netloom.render.ruleset import Ruleset
from netloom.render.want import Segment, Want

# The kinds of the links that the kernel itself adds to each new namespace (tunl0, sit0 and the like).
_KINDS_IN_NEW_NAMESPACES = ("ipip", "sit", "gre", "ip6tnl", "vti")

_ABOVE = ("vlan", "macvlan", "macvtap", "ipvlan")  # the kinds of links that take frames from a bridge below them


def observe(
    scope_id: str,
    want: Want,
    known: Ruleset | None,
    *,
    claimed: frozenset[str],
    guarded: frozenset[str],
    also: frozenset[str] = frozenset(),
) -> Have:
    """What exists of the scope, and the links of the host that ``want`` concerns.

    ``known``: the ruleset that the caller loaded last; it is taken as loaded if the table has its marker.
    ``also``: further links of the host to look at.

    Raises HostRefused when the kernel does not answer.
    """
    namespace = names.namespace(scope_id)
    exists = namespaces.exists(namespace)
    inside = _inside(namespace, ip6=any(":" in it.cidr for it in want.addresses)) if exists else _Inside()
    with Socket(netlink.NETLINK_ROUTE) as host:
        found = _host_links(host, want, inside.links, also, claimed)
        host_links = _described(host, found, want)
    host_ends = _host_ends(inside.links, found, alias_of(scope_id), want)
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
                host_link=host_ends.get(link.name, ""),
                mtu=link.mtu,
            )
            for link in inside.links
            if link.name != "lo"
        },
        addresses=_own_addresses(inside),
        cut_off=_cut_off(inside),
        routes=tuple(row.route for row in inside.routes if not row.automatic),
        rules=tuple(rule for rule in inside.rules if not rules.is_default(rule)),
        asks_main=not exists or ASK_MAIN in inside.rules,
        neighbours=tuple(row.neighbour for row in inside.neighbours if row.permanent),
        host_links=host_links,
        claimed=claimed,
        guarded=guarded,
    )
    if not exists:
        return have
    table = observe_table(namespace)
    return replace(
        have,
        foreign=_foreign(have, want) if table.names is None else "",
        sysctls={key: it for key, it in sysctl.read(namespace, want.sysctls).items() if it is not None},
        marker=table.marker,
        ruleset=known if known is not None and known.marker == table.marker else None,
        table=table.names,
        generation=table.generation,
    )


def devices(want: Want) -> dict[str, HostLink]:
    """What ``plan.uplinks.follow`` needs: links by name, if a device of ``want`` is a bridge. Raises HostRefused."""
    ports = [port for port in want.ports if followed(port.segment)]
    if not ports:
        return {}
    with Socket(netlink.NETLINK_ROUTE) as host:
        found = _by_index(links.find_links_over(host, {port.segment.nic for port in ports}))
        labels = {it.name: it.index for it in found.values() if it.kind == "bridge"}
        ports = [port for port in ports if port.segment.nic in labels]
        if not ports:
            return {}
        for index in labels.values():
            found |= _by_index(links.list_links_over(host, master=index))
        below = {it.parent_index for it in found.values() if it.kind == "vlan" and it.parent_index}
        found |= _by_index(links.find_links_over(host, below - found.keys()))
        nics = {it.name for it in found.values() if is_nic_name(it.name) or it.index in below}
        asked = {port.host_link for port in ports}
        asked |= {names.vlan_link(nic, port.segment.vlan) for nic in nics for port in ports}
        asked |= {it for port in ports for it in (port.segment.vlan_link, port.segment.bridge)}
        found |= _by_index(links.find_links_over(host, asked))
        masters = {it.master_index for it in found.values() if it.master_index}
        found |= _by_index(links.find_links_over(host, masters - found.keys()))
        used = {port.segment.bridge for port in ports}
        above = [it for it in found.values() if it.name in used]
        for bridge in above:
            found |= _by_index(links.list_links_over(host, master=bridge.index))
        if above:  # the NIC may have a VLAN link under another name; all links are listed only where that matters
            found |= _by_index(links.list_links_over(host, kind="vlan"))
    ports_of = _ports(found)
    return {link.name: _described_by_itself(link, found, ports_of) for link in found.values()}


def our_shared_links() -> dict[str, HostLink]:
    """The bridges, VLAN links and tunnels of the host that are ours, and the bridges of others that our ports are in.

    Also the ports of all these bridges. Raises HostRefused.
    """
    with Socket(netlink.NETLINK_ROUTE) as host:
        # At once: to list the ports of one bridge the kernel looks at all links.
        listed = links.list_links_over(host)
        joined = {it.master_index for it in listed if it.kind == "veth" and _ours(it)}
        found = _by_index(
            link
            for link in listed
            if (link.kind in ("bridge", *CARRIERS) and _ours(link)) or (link.kind == "bridge" and link.index in joined)
        )
        bridges = {link.index for link in found.values() if link.kind == "bridge"}
        found |= _by_index(link for link in listed if link.master_index in bridges)
        return _described(host, found, Want(namespace=""))


def stray_ports(living: frozenset[str]) -> list[str]:
    """Host ends of ours whose scope is not in ``living`` and has no namespace any more. Raises HostRefused."""
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


def bridges_with_vms() -> frozenset[str]:
    """The bridges of the host with a port that is neither ours nor an uplink. Raises HostRefused."""
    listed = links.list_links(None)
    bridges = {link.index: link.name for link in listed if link.kind == "bridge"}
    return frozenset(
        bridges[link.master_index]
        for link in listed
        if link.master_index in bridges
        and link.kind not in ("", "bond", *CARRIERS)  # a physical NIC has no kind
        and not _ours(link)
    )


# ----------------------------------------------------------------------------------------------- in the namespace


class _Inside(msgspec.Struct, frozen=True):
    """The rows that rtnetlink lists in a namespace."""

    links: list[Link] = []
    addresses: list[AddressRow] = []
    routes: list[RouteRow] = []
    rules: list[Rule] = []
    neighbours: list[NeighbourRow] = []


def _inside(namespace: str, *, ip6: bool) -> _Inside:
    """List the namespace; IPv6 only with ``ip6``: a scope without IPv6 has none of its own."""
    families = (socket.AF_INET, socket.AF_INET6) if ip6 else (socket.AF_INET,)
    with Socket(netlink.NETLINK_ROUTE, namespace) as inside:
        found = links.list_links_over(inside)
        names_of = {link.index: link.name for link in found}
        return _Inside(
            links=found,
            addresses=[row for family in families for row in addresses.list_addresses_over(inside, names_of, family)],
            routes=[row for family in families for row in routes.list_routes_over(inside, names_of, family)],
            rules=rules.list_rules_over(inside),
            neighbours=[
                row for family in families for row in neighbours.list_neighbours_over(inside, names_of, family)
            ],
        )


def _own_addresses(inside: _Inside) -> tuple[Address, ...]:
    """The addresses that somebody added, without those of the loopback and those that came with a link."""
    return tuple(row.address for row in inside.addresses if row.address.link != "lo" and not row.link_local)


def _cut_off(inside: _Inside) -> frozenset[Address]:
    """The addresses that lack a route which the kernel added with them; a link that is down has no routes."""
    up = {link.name for link in inside.links if link.up and link.running}
    routes_of = [row.route for row in inside.routes if row.route.table == MAIN_TABLE or row.route.kind == "local"]
    existing = {(route.link, route.destination) for route in routes_of}
    return frozenset(
        address
        for address in _own_addresses(inside)
        if address.link in up
        and any(prefix and (address.link, prefix) not in existing for prefix in (address.on_link, address.itself))
    )


def _foreign(have: Have, want: Want) -> str:
    """Why a namespace without our ruleset belongs to somebody else; empty when it is empty, or has ports of ours."""
    ours = {port.mac for port in want.ports}
    if any(link.host_link or link.mac in ours for link in have.links.values()):
        return ""
    others = [link.name for link in have.links.values() if link.kind not in _KINDS_IN_NEW_NAMESPACES]
    if others:
        return f"link {others[0]} is in it"
    process = _process_in(have.namespace)
    return f"process {process} runs in it" if process else ""


def _process_in(namespace: str) -> str:
    """The process id of a process in the namespace; empty when there is none."""
    wanted = os.stat(f"{namespaces.NETNS_DIR}/{namespace}")
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            its = os.stat(f"/proc/{pid}/ns/net")
        except OSError:
            continue  # it has ended since
        if (its.st_dev, its.st_ino) == (wanted.st_dev, wanted.st_ino):
            return pid
    return ""


# ---------------------------------------------------------------------------------------------------- on the host


def _host_links(
    host: Socket, want: Want, inside: Iterable[Link], also: frozenset[str], claimed: frozenset[str]
) -> dict[int, Link]:
    """The links, by index, that the scope uses or used: its ports, their bridges, and what carries the segments.

    Of a bridge all ports are added if the bridge may have to be removed, carries a segment itself, or is another's. A
    bridge of ours that other scopes claim stays: it may have a port for each network of the host.
    """
    found = _by_index(links.find_links_over(host, also | _names_in(want)))
    other_ends = {link.parent_index for link in inside if link.kind == "veth" and link.parent_index}
    found |= _by_index(links.find_links_over(host, other_ends - found.keys()))
    found |= _carriers_with_other_names(host, found, want)
    bridges = {link.master_index for link in found.values() if link.master_index}
    found |= _by_index(links.find_links_over(host, bridges - found.keys()))
    left = _bridges_to_leave(found, want)
    stay = claimed - {it for port in want.ports for it in _besides(port.segment)}
    ours = {it.index for it in found.values() if it.kind == "bridge" and _ours(it)}
    staying = {index for index in ours if found[index].name in stay}
    bridges = ours | left | _of_others(found, want)
    bridges -= staying  # guard: ports-of-a-shared-bridge-are-not-listed
    for bridge in [it for it in found.values() if it.kind == "bridge" and it.index in bridges]:
        found |= _by_index(links.list_links_over(host, master=bridge.index))
    return found


def _by_index(found: Iterable[Link]) -> dict[int, Link]:
    return {link.index: link for link in found}


def _names_in(want: Want) -> set[str]:
    """The names of the host's links that ``want`` names."""
    found = set()
    for port in want.ports:
        segment = port.segment
        found |= {port.host_link, segment.bridge, segment.nic, segment.vlan_link}
        if segment.besides:
            found |= {segment.besides, *_besides(segment)}
    return found - {""}


def _carriers_with_other_names(host: Socket, found: dict[int, Link], want: Want) -> dict[int, Link]:
    """The VLAN links and tunnels of wanted segments that another program created under a name of its own."""
    by_name = {link.name: link for link in found.values()}
    carriers = {}
    for segment in {port.segment for port in want.ports}:
        nic = by_name.get(segment.nic)
        if segment.vlan_link and segment.vlan_link not in by_name and nic is not None:
            for link in links.list_links_over(host, kind=segment.kind):
                if str(link.vlan_id) == segment.vlan and (segment.kind == "vxlan" or link.parent_index == nic.index):
                    carriers[link.index] = link
    return carriers


def _bridges_to_leave(found: dict[int, Link], want: Want) -> set[int]:
    """The bridges that a port of ours is in and has to leave. It may be the last port in them."""
    wanted = {port.segment.bridge for port in want.ports}
    bridges = {link.master_index for link in found.values() if link.kind == "veth" and _ours(link)}
    return {link.index for link in found.values() if link.index in bridges and link.name not in wanted}


def _of_others(found: dict[int, Link], want: Want) -> set[int]:
    """The bridges of others that a port of ours is in, or will be in."""
    segments = {port.segment for port in want.ports}
    carriers = {it.nic if it.vlan == UNTAGGED else it.vlan_link for it in segments}
    tags = {(it.kind, it.vlan) for it in segments}
    joined = {
        link.master_index
        for link in found.values()
        if (link.kind == "veth" and _ours(link)) or link.name in carriers or (link.kind, str(link.vlan_id)) in tags
    }
    named = carriers | {it.bridge for it in segments} | {it for segment in segments for it in _besides(segment)}
    return {
        link.index
        for link in found.values()
        if link.kind == "bridge" and not _ours(link) and (link.index in joined or link.name in named)
    }


def _besides(segment: Segment) -> tuple[str, ...]:
    """The bridge and the VLAN link of the same VLAN on the other device that it may be on."""
    if not segment.besides:
        return ()
    return names.bridge(segment.besides, segment.vlan), names.vlan_link(segment.besides, segment.vlan)


def _below(host: Socket, bridges: set[int]) -> set[int]:
    """Those of the bridges that the host has a link above."""
    kinds = _ABOVE if bridges else ()
    above = [link for kind in kinds for link in links.list_links_over(host, kind=kind) if link.peer_netns is None]
    return bridges & {link.parent_index for link in above if link.parent_index}


def _described(host: Socket, found: dict[int, Link], want: Want) -> dict[str, HostLink]:
    """The links by name, with the names of the links that they refer to by index."""
    addresses_of = _host_addresses(host, found, _addresses_needed(found, want))
    others = _of_others(found, want)
    below = _below(host, others) | {index for index in others if found[index].master_index}
    wanted = {port.host_link for port in want.ports}
    own = [it.name for it in found.values() if _ours(it) and (it.kind != "veth" or it.name in wanted)]
    speaking_ip6 = _with_ip6(own) if wanted else set()
    ports = _ports(found)
    return {
        link.name: replace(
            _described_by_itself(link, found, ports),
            addresses=addresses_of.get(link.index, ()),
            ipv6=link.name in speaking_ip6,
            above=link.index in below,
        )
        for link in found.values()
    }


def _ports(found: dict[int, Link]) -> dict[int | None, list[str]]:
    """The names of the ports by the index of their bridge."""
    ports: dict[int | None, list[str]] = defaultdict(list)
    for link in found.values():
        ports[link.master_index].append(link.name)
    return ports


def _described_by_itself(link: Link, found: dict[int, Link], ports: dict[int | None, list[str]]) -> HostLink:
    return HostLink(
        name=link.name,
        kind=link.kind,
        up=link.up,
        master=_name(found, link.master_index),
        alias=link.alias,
        parent=_name(found, link.parent_index) if link.kind == "vlan" else "",
        vlan_id=link.vlan_id or 0,
        ports=tuple(sorted(ports.get(link.index, ()))),
        mtu=link.mtu,
        vlan_filtering=link.vlan_filtering,
        elsewhere=link.peer_netns is not None,
    )


def _name(found: dict[int, Link], index: int | None) -> str:
    return found[index].name if index in found else ""


def _addresses_needed(found: dict[int, Link], want: Want) -> set[int]:
    """The links whose addresses a decision depends on (see ``HostLink.addresses``)."""
    untagged_nics = {port.segment.nic for port in want.ports if port.segment.vlan == UNTAGGED}
    vxlan_nics = {port.segment.nic for port in want.ports if port.segment.kind == "vxlan"}
    joining = {link.index for link in found.values() if link.name in untagged_nics and not link.master_index}
    senders = {link.master_index or link.index for link in found.values() if link.name in vxlan_nics}
    left = _bridges_to_leave(found, want)
    vlan_links_in_left = {link.index for link in found.values() if link.kind == "vlan" and link.master_index in left}
    return joining | senders | left | vlan_links_in_left | _of_others(found, want)


def _host_addresses(host: Socket, found: dict[int, Link], needed: set[int]) -> dict[int, tuple[str, ...]]:
    """The host's own addresses on each of the needed links, without link-local IPv6."""
    if not needed:
        return {}
    rows = addresses.list_addresses_over(host, {link.index: link.name for link in found.values()})
    own = [row.address for row in rows if not row.link_local]
    return {index: tuple(it.cidr for it in own if it.link == _name(found, index)) for index in needed}


def _with_ip6(names_of_links: Iterable[str]) -> set[str]:
    """Those of the host's links on which IPv6 is not disabled."""
    keys = {name: f"net/ipv6/conf/{name}/disable_ipv6" for name in names_of_links}
    values = sysctl.read(None, keys.values())
    return {name for name, key in keys.items() if values[key] == "0"}


def _host_ends(inside: Iterable[Link], host: dict[int, Link], alias: str, want: Want) -> dict[str, str]:
    """The host end of each link of the namespace, for pairs whose ends name each other by index.

    An index alone could be that of a link in any namespace, so the host end must also have the scope's alias. If
    somebody removed the alias, the names and the MAC address of a wanted port will do.
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
