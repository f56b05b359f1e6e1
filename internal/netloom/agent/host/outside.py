"""Find out whether the host hears other machines, and fence its uplinks when it is told to (``scopes/isolation.py``).

"Others" are the machines behind the ways out of this host: the uplinks of bridges, and the links with an address of the
host's own. VMs and containers on this host are none.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import random
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from itertools import islice

import msgspec
from msgspec.structs import replace

from netloom.agent.host.fence import TABLE
from netloom.agent.host.occupied import Look, Occupied, uplinks
from netloom.agent.kernel import netlink
from netloom.agent.kernel.addresses import list_addresses_over
from netloom.agent.kernel.arp_probe import Heard, Wire, ask, probe
from netloom.agent.kernel.descriptors import high_socket
from netloom.agent.kernel.links import Link, all_received_packets, find_links_over, received_packets
from netloom.agent.kernel.multicast import Filter
from netloom.agent.kernel.neighbours import list_neighbours_over
from netloom.agent.kernel.netlink import Socket
from netloom.agent.kernel.packet_socket import PACKET_OUTGOING, open_packet_socket
from netloom.agent.kernel.rtnetlink import packed_mac
from netloom.errors import NetloomError
from netloom.render.want import Port, Want

_CALLED_MAX = 32  # neighbours that are asked for a sign of life in one round, and as many VMs and gateways
_SCOPES_MAX = 32  # whose VMs and gateways are asked
_ALONE_MAX = 8  # counters that are read one by one


class Answer(msgspec.Struct, frozen=True):
    """The answers that came through one uplink, about the addresses of one scope."""

    uplink: str
    scope_id: str
    occupied: Occupied


class Outside:
    """The ways out of this host. Methods that block raise HostRefused; call them in a worker thread, one at a time.

    ``keep_fenced`` may be called by any thread.
    """

    def __init__(self, placed: Callable[[str, Want], Want]) -> None:
        """``placed``: see ``KernelHost.placed``."""
        self._placed = placed
        self._fenced: set[str] = set()
        self._changing = threading.Lock()
        self._counters: dict[int, int] = {}  # packets by index of a way out, the last one that heard something first
        self._fresh: set[int] = set()  # those of ``_counters`` that were read in the last round

    # ------------------------------------------------------------------------------------------------- who is heard

    def watch(self, wants: Mapping[str, Want]) -> None:
        """Find the ways out of this host again. ``wants``: by scope. Blocks."""
        with Look(whole=True) as look, Socket(netlink.NETLINK_ROUTE) as host:
            ways = {it.index for port in self._ports(wants) for it in look.uplinks(port)}
            names = {it.index: it.name for it in look.all()}
            own = {row.address.link for row in list_addresses_over(host, names) if not row.link_local} - {"lo"}
            for link in look.all():
                if link.name in own:
                    ways |= {it.index for it in uplinks(link, look.ports(link.index))} or {link.index}
            known = {index: count for index, count in self._counters.items() if index in ways}
            counts = all_received_packets(host)
            found = {index: counts[index] for index in ways - known.keys() if index in counts}
            self._counters = known | found
            self._fresh |= found.keys()

    def heard_lately(self) -> bool:
        """Whether anything has arrived since the last call on one of the few ways out that heard something last.

        A counter that the last call did not read tells nothing now. Blocks for moments; the cost does not grow with the
        number of ways.
        """
        fresh, self._fresh = self._fresh, set()
        with Socket(netlink.NETLINK_ROUTE) as host:
            for index in islice(list(self._counters), _ALONE_MAX):
                now = received_packets(host, index)
                if now is None:
                    continue
                self._fresh.add(index)
                had, self._counters[index] = self._counters[index], now
                if now != had and index in fresh:  # guard: an-old-counter-is-no-sign-of-life
                    self._put_first(index)
                    return True
        return False

    def _put_first(self, index: int) -> None:
        if next(iter(self._counters)) != index:
            now = self._counters.pop(index)
            self._counters = {index: now, **self._counters}

    def heard(self) -> bool:
        """Whether anything has arrived on any way out since its counter was read last. Blocks for moments."""
        had = self._counters
        with Socket(netlink.NETLINK_ROUTE) as host:
            counts = all_received_packets(host)
        heard = {index for index, count in had.items() if counts.get(index, count) != count}
        order = sorted(had, key=lambda index: index not in heard)
        self._counters = {index: counts[index] for index in order if index in counts}
        self._fresh = set(self._counters)
        return bool(heard)

    def call_neighbours(self) -> bool:
        """Ask neighbours of the host itself for a sign of life: ARP requests. Returns whether there are any.

        Blocks for moments; the cost does not grow with the number of links.
        """
        with Socket(netlink.NETLINK_ROUTE) as host:
            rows = [it for it in list_neighbours_over(host, {}) if it.neighbour.mac]
            found = find_links_over(host, {it.link_index for it in rows})
        links = {it.index: it for it in found if it.name != "lo"}
        asked = [(links[it.link_index], it.neighbour.address) for it in rows if it.link_index in links][:_CALLED_MAX]
        _send([(link, Wire(link.name), address) for link, address in asked])
        return bool(asked)

    def call(self, wants: Mapping[str, Want]) -> None:
        """Ask some machines that are known outside for a sign of life: ARP requests. Blocks for moments.

        They are neighbours of the host itself, and public gateways and VMs of some scopes: other ones in each round.
        """
        self.call_neighbours()
        asked: list[tuple[Wire, str]] = []
        with Look(whole=True) as look:
            links = {it.name: it for it in look.all()}
            for scope_id in random.sample(sorted(wants), min(len(wants), _SCOPES_MAX)):
                known = _known_outside(look, self._want(wants, scope_id))
                asked += random.sample(known, min(len(known), _CALLED_MAX // 4))
                if len(asked) >= _CALLED_MAX:
                    break
        _send([(links[wire.link], wire, address) for wire, address in asked if wire.link in links])

    # ---------------------------------------------------------------------------------------------------- the fence

    def uplinks(self, wants: Mapping[str, Want]) -> frozenset[str]:
        """The links through which frames of these scopes leave this host. Blocks."""
        with Look(whole=True) as look:
            return self._used(look, wants)

    def unused(self, wants: Mapping[str, Want], links: Iterable[str]) -> frozenset[str]:
        """Those of ``links`` that are there and carry no frames of these scopes. Blocks."""
        with Look(whole=True) as look:
            return frozenset(links) & ({it.name for it in look.all()} - self._used(look, wants))

    def fenced(self) -> frozenset[str]:
        """The uplinks that are fenced, by an earlier agent, too. Blocks for moments."""
        with self._changing:
            self._fenced |= TABLE.links()
            return frozenset(self._fenced)

    def fence(self, links: Iterable[str]) -> None:
        """Fence these uplinks; those that are fenced stay so. Blocks for moments."""
        with self._changing:
            self._fenced |= set(links)
            TABLE.add(self._fenced)

    def lift(self, links: Iterable[str]) -> None:
        """Let frames pass these uplinks again. Blocks for moments."""
        with self._changing:
            gone = set(links)
            self._fenced -= gone
            TABLE.discard(gone)

    def keep_fenced(self) -> None:
        """Fence what has to be fenced: somebody may have deleted the table."""
        with self._changing:
            if self._fenced - TABLE.links():
                TABLE.add(self._fenced)

    def ask(
        self, wants: Mapping[str, Want], links: frozenset[str], timeout_s: float, claim: Callable[[str], bytes]
    ) -> list[Answer]:
        """Ask on these uplinks who else answers for the addresses of the scopes. Blocks for the time-out.

        ``wants`` and ``claim`` (see ``arp_probe.ask``) are by scope. A scope has an answer for each of the uplinks that
        its frames leave through.
        """
        asked: dict[bytes, dict[Wire, list[str]]] = {}
        scopes: dict[bytes, dict[tuple[Wire, str], str]] = {}  # address on a link -> scope
        answers: list[Answer] = []
        with Look(whole=True) as look:
            for scope_id in wants:
                want = self._want(wants, scope_id)
                for port in want.ports:
                    addresses = [it.ip for it in want.announce if it.link == port.link]
                    mine = {it.name for it in look.uplinks(port)} & links
                    found = look.wires(port) if mine else ()
                    if isinstance(found, str):
                        silent = Occupied(unknown=dict.fromkeys(addresses or [port.link], found))
                        answers += [Answer(it, scope_id, silent) for it in sorted(mine)]
                        continue
                    for wire in found:
                        if wire.link in mine:
                            own = claim(scope_id)
                            asked.setdefault(own, {}).setdefault(wire, []).extend(addresses)
                            scopes.setdefault(own, {}).update(((wire, it), scope_id) for it in addresses)
        for own, questions in asked.items():
            answers += _heard(ask(questions, timeout_s, own), scopes[own])
        return answers

    def _want(self, wants: Mapping[str, Want], scope_id: str) -> Want:
        """What the scope wants, with the NICs of this host; as it was rendered while they are missing."""
        try:
            return self._placed(scope_id, wants[scope_id])
        except NetloomError:
            return wants[scope_id]

    def _used(self, look: Look, wants: Mapping[str, Want]) -> frozenset[str]:
        return frozenset(it.name for port in self._ports(wants) for it in look.uplinks(port))

    def _ports(self, wants: Mapping[str, Want]) -> list[Port]:
        return [port for scope_id in wants for port in self._want(wants, scope_id).ports]


class Listener:
    """Hears frames on a link, on the event loop.

    Frames to reserved addresses (spanning tree, LLDP) say nothing: a switch sends them also through a port on which it
    forwards nothing yet.
    """

    def __init__(self, link: str) -> None:
        """Raises OSError: there is no such link."""
        self._socket = high_socket(open_packet_socket(link, _NOT_RESERVED))
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """The descriptor to wait on, for ``loop.add_reader``."""
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def heard(self) -> bool:
        """Whether a frame has arrived. Raises OSError when the link is gone; one that is down hears nothing."""
        found = False
        while True:
            try:
                _, sender = self._socket.recvfrom(1)
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno != errno.ENETDOWN or not self._socket.getsockname()[0]:
                    raise  # a socket whose link was deleted has no name, and hears nothing any more
                return found
            found = found or sender[2] != PACKET_OUTGOING


_NOT_RESERVED: Filter = (
    (0x20, 0, 0, 0),  # ld [0]: the first four octets of the destination
    (0x15, 0, 1, 0x0180C200),  # guard: spanning-tree-frames-are-nobody
    (0x06, 0, 0, 0),  # ret: nothing
    (0x06, 0, 0, 14),  # ret: the header
)


def _known_outside(look: Look, want: Want) -> list[tuple[Wire, str]]:
    """The addresses behind the uplinks of the scope: of VMs and gateways."""
    known = []
    for port in want.ports:
        addresses = [it.address for it in want.neighbours if it.link == port.link and _is_ip4(it.address)]
        addresses += [it.via for it in want.routes if it.link == port.link and it.via and _is_ip4(it.via)]
        if addresses:
            found = look.wires(port)
            known += [(wire, it) for it in addresses for wire in ([] if isinstance(found, str) else found)]
    return known


def _is_ip4(address: str) -> bool:
    return ":" not in address


def _send(asked: Iterable[tuple[Link, Wire, str]]) -> None:
    """Send an ARP request for each of these addresses, if its link lets us: one that is down or gone reaches nobody."""
    # One socket for all: the kernel waits for all CPUs when one is closed.
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as out:
        for link, wire, address in asked:
            with contextlib.suppress(OSError):
                frame = probe(ipaddress.IPv4Address(address).packed, packed_mac(link.mac), wire.tag)
                out.sendto(frame, (wire.link, 0))


def _heard(found: Mapping[Wire, Heard], asked: Mapping[tuple[Wire, str], str]) -> list[Answer]:
    """The answers by scope. ``asked``: the scope by address on a link."""
    answers: dict[tuple[str, str], Occupied] = {}
    for (wire, address), scope_id in asked.items():
        heard = found.get(wire)
        if heard is None:
            continue
        it = answers.get((wire.link, scope_id), Occupied())
        if address in heard.owners:
            it = replace(it, owners=it.owners | {address: heard.owners[address]})
        elif heard.failed:
            it = replace(it, unknown=it.unknown | {address: heard.failed})
        elif address in heard.probing:
            it = replace(it, probing=it.probing | {address: heard.probing[address]})
        answers[wire.link, scope_id] = it
    return [Answer(link, scope_id, it) for (link, scope_id), it in answers.items()]
