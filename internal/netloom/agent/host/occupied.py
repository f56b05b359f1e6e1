"""Ask whether another host uses the addresses of a scope: with ARP, on every link that leads out of its segments.

The question leaves and the answer arrives on the uplinks of the bridges, below them. So the scope's ports may be behind
a closed gate meanwhile, and neighbours on this host are not asked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import msgspec

from netloom.agent.kernel import netlink
from netloom.agent.kernel.arp_probe import Wire, ask
from netloom.agent.kernel.bridge_vlans import PortVlans, list_port_vlans
from netloom.agent.kernel.links import Link, find_links_over, list_links_over
from netloom.agent.kernel.netlink import Socket
from netloom.names import UNTAGGED
from netloom.plan.have import HostLink
from netloom.plan.segments import leads_to_guests
from netloom.render.want import Port, Want


class Occupied(msgspec.Struct, frozen=True):
    """What was heard of the IPv4 addresses of a scope.

    ``owners``: addresses that another host uses, with its MAC address. ``probing``: addresses that another host is
    about to use with a stronger claim (``arp_probe.ask``). ``unknown``: addresses that nobody could be asked for, with
    the reason. Nobody answered for the other addresses.
    """

    owners: dict[str, str] = {}
    probing: dict[str, str] = {}
    unknown: dict[str, str] = {}

    def __str__(self) -> str:
        """One line with an example of the strongest kind."""
        for heard, verb in ((self.owners, "is answered by"), (self.probing, "is about to be used by")):
            for address, mac in heard.items():
                return f"{address} {verb} {mac}"
        return next((f"nobody can be asked for {address}: {why}" for address, why in self.unknown.items()), "nothing")


def occupied(want: Want, timeout_s: float, claim: bytes) -> Occupied:
    """Ask for each address that ``want`` announces. Blocks for the time-out, so call it in a worker thread.

    ``claim``: see ``arp_probe.ask``.

    Raises HostRefused when the kernel does not list its links.
    """
    asked, unknown = questions(want)
    owners: dict[str, str] = {}
    probing: dict[str, str] = {}
    for wire, heard in ask(asked, timeout_s, claim).items():
        owners |= heard.owners
        probing |= heard.probing
        if heard.failed:
            unknown |= dict.fromkeys(asked[wire], heard.failed)  # guard: a-link-that-fails-proves-nothing
    return Occupied(owners, probing, {it: why for it, why in unknown.items() if it not in owners})


def questions(want: Want, look: Look | None = None) -> tuple[dict[Wire, tuple[str, ...]], dict[str, str]]:
    """The addresses to ask for by link, and the addresses that cannot be asked for with the reason.

    Raises HostRefused when the kernel does not list its links.
    """
    if look is None:
        with Look() as own:
            return questions(want, own)
    asked: dict[Wire, tuple[str, ...]] = {}
    unknown: dict[str, str] = {}
    for port in want.ports:
        addresses = tuple(it.ip for it in want.announce if it.link == port.link)
        found = look.wires(port) if addresses else ()
        if isinstance(found, str):
            unknown |= dict.fromkeys(addresses, found)
        else:
            for wire in found:
                asked[wire] = (*asked.get(wire, ()), *addresses)
    return asked, unknown


class Look:
    """A look at the links of the host. ``whole``: list them at once, for questions about many ports.

    Its methods raise HostRefused when the kernel does not list its links.
    """

    def __init__(self, *, whole: bool = False) -> None:
        """Raises HostRefused."""
        self._socket = Socket(netlink.NETLINK_ROUTE)
        self._listed: list[Link] | None = None
        self._ports: dict[int, list[Link]] = {}
        try:
            if whole:
                self._listed = list_links_over(self._socket)
        except BaseException:
            self._socket.close()
            raise
        self._known: dict[str | int, Link] = {}
        for it in self._listed or ():
            self._known |= {it.name: it, it.index: it}
            if it.master_index:
                self._ports.setdefault(it.master_index, []).append(it)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def all(self) -> list[Link]:
        """All links of the host."""
        return list_links_over(self._socket) if self._listed is None else self._listed

    def wires(self, port: Port) -> tuple[Wire, ...] | str:
        """Where the frames of a port leave this host; the reason if one of these uplinks cannot be asked."""
        bridge = self._bridge(port)
        if bridge is None:
            return f"the bridge of {port.host_link} does not exist"
        return wires(port.host_link, bridge, self.ports(bridge.index), self._vlans(bridge))

    def carrying(self, port: Port) -> list[tuple[Link, int]]:
        """The uplinks that carry the frames of the port, with their tag (:func:`tagged`); those that are down, too."""
        bridge = self._bridge(port)
        if bridge is None:
            return []
        ports = self.ports(bridge.index)
        return tagged(port.host_link, bridge, uplinks(bridge, ports), ports, self._vlans(bridge))

    def uplinks(self, port: Port) -> list[Link]:
        """The links through which the frames of a port leave this host, also those that are down."""
        bridge = self._bridge(port)
        return [] if bridge is None else uplinks(bridge, self.ports(bridge.index))

    def ports(self, bridge: int) -> list[Link]:
        """The ports of the bridge with this index."""
        if self._listed is None:
            return list_links_over(self._socket, master=bridge)
        return self._ports.get(bridge, [])

    def _vlans(self, bridge: Link) -> dict[int, PortVlans]:
        return list_port_vlans(self._socket, bridge.index) if bridge.vlan_filtering else {}

    def _find(self, wanted: Iterable[str | int]) -> list[Link]:
        if self._listed is None:
            return find_links_over(self._socket, wanted)
        return [self._known[it] for it in wanted if it in self._known]

    def _bridge(self, port: Port) -> Link | None:
        """The bridge that the port is in; if the port does not exist, the one that it would join."""
        segment = port.segment
        carrier = segment.nic if segment.vlan == UNTAGGED else segment.vlan_link
        named = {it.name: it for it in self._find([port.host_link, carrier, segment.bridge])}
        masters = [named[it].master_index for it in (port.host_link, carrier) if it in named]
        above = self._find([it for it in masters if it])
        found = [*above, *(it for name, it in named.items() if name == segment.bridge)]
        return next((it for it in found if it.kind == "bridge"), None)


def uplinks(bridge: Link, ports: list[Link]) -> list[Link]:
    """Those ports of a bridge that lead to other hosts."""
    return [it for it in ports if not leads_to_guests(bridge.name, _described(it))]


def wires(host_link: str, bridge: Link, ports: list[Link], vlans: dict[int, PortVlans]) -> tuple[Wire, ...] | str:
    """The uplinks of the port's bridge; the reason if one of them cannot be asked.

    ``vlans``: of the bridge's ports by index, if it filters VLANs.
    """
    up = [it for it in uplinks(bridge, ports) if it.up]
    if not up:
        return f"bridge {bridge.name} has no uplink"
    for it in up:
        if not it.running:
            return f"{it.name} has no link"  # guard: a-link-without-carrier-proves-nothing
    carrying = tuple(Wire(it.name, tag) for it, tag in tagged(host_link, bridge, up, ports, vlans))
    return carrying or f"no uplink of bridge {bridge.name} carries the VLAN of {host_link}"


def tagged(
    host_link: str, bridge: Link, leading: list[Link], ports: list[Link], vlans: dict[int, PortVlans]
) -> list[tuple[Link, int]]:
    """Those of the uplinks ``leading`` that carry the frames of the port, with the tag of these frames; 0 for none.

    ``vlans`` as for :func:`wires`.
    """
    if not bridge.vlan_filtering:
        return [(it, 0) for it in leading]
    own = next((vlans[it.index].own for it in ports if it.name == host_link and it.index in vlans), 0)
    tags = [(it, vlans[it.index].tag_of(own)) for it in leading if it.index in vlans and own]
    return [(it, tag) for it, tag in tags if tag is not None]


def _described(link: Link) -> HostLink:
    return HostLink(name=link.name, kind=link.kind, alias=link.alias, elsewhere=link.peer_netns is not None)
