"""A table of the family ``bridge`` on the host itself with one set or map of links, and rules about them.

The table exists while the set or map has elements. Links are matched by name, so a link can be added before it exists.

Elements are changed over a socket that stays open. The kernel waits for all CPUs (8 to 20 ms, measured 2026-11) when a
netfilter socket is closed after something was deleted, and meanwhile it accepts no other change.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterable, Mapping, Sequence

from netloom.agent.kernel import kept, netlink, nft_netlink
from netloom.agent.kernel.netlink import NetlinkError, Socket
from netloom.agent.kernel.nft import NftRefused

FAMILY = "bridge"
_FIRST = -400  # before all other chains: br_netfilter hands frames to the host's rules at 0, and at the end
_TRIES = 5
_HOOKS = frozenset({"prerouting", "input", "forward", "output", "postrouting"})


class OpenSocket:
    """A netlink socket that stays open, in the namespace of the calling thread, used by one thread at a time.

    ``mark``: see ``netlink.marked_socket``; 0: none.
    """

    def __init__(self, mark: int = 0) -> None:
        self._mark = mark
        self._turn = threading.Lock()
        self._socket: Socket | None = None
        self._inode = 0

    def __enter__(self) -> Socket:
        self._turn.acquire()
        try:
            inode = os.stat("/proc/thread-self/ns/net").st_ino
            if self._socket is None or inode != self._inode:
                if self._socket is not None:
                    self._socket.close()
                    self._socket = None
                if self._mark:
                    self._socket = netlink.marked_socket(netlink.NETLINK_NETFILTER, None, self._mark)
                else:
                    self._socket = Socket(netlink.NETLINK_NETFILTER)
                self._inode = inode
        except BaseException:
            self._turn.release()
            raise
        return self._socket

    def __exit__(self, *_: object) -> None:
        self._turn.release()


_kernel = OpenSocket()


class _Table:
    """The table ``bridge <name>``.

    ``sets``: for each of its sets and maps "set" or "map", its name, and its declaration. The first one has the links.
    ``chains``: by name of the chain, its rules. A chain that is named as a hook is attached to it.
    """

    def __init__(self, name: str, sets: Sequence[tuple[str, str, str]], chains: dict[str, Sequence[str]]) -> None:
        self.name = name
        self.label = f"{FAMILY} {name}"
        self._links = sets[0][1]
        self._sets = sets
        self._chains = chains

    def discard(self, links: Iterable[str]) -> None:
        """Take links out. Those that are not there stay away; with the last one the table goes.

        Raises HostRefused.
        """
        asked = frozenset(links)
        with _kernel as nfnetlink:
            for tries_left in reversed(range(_TRIES)):
                had = nft_netlink.link_names(nfnetlink, FAMILY, self.name, self._links)
                if not had & asked:
                    return
                changes = nft_netlink.delete_link_names(FAMILY, self.name, self._links, sorted(had & asked))
                if not had - asked:
                    changes.append(nft_netlink.delete_table(FAMILY, self.name))
                try:
                    nft_netlink.change(nfnetlink, changes)
                    return
                except NetlinkError as error:  # somebody else deleted an element or the table since the listing
                    if error.errno != errno.ENOENT or not tries_left:
                        raise

    def remove(self) -> None:
        """Delete the table, if there is one. Raises HostRefused."""
        with _kernel as nfnetlink:
            try:
                nft_netlink.change(nfnetlink, [nft_netlink.delete_table(FAMILY, self.name)])
            except NetlinkError as error:
                if error.errno != errno.ENOENT:
                    raise

    def _in_force(self, nfnetlink: Socket) -> bool:
        found = [netlink.string(it.chain) for it in nft_netlink.rules(nfnetlink, FAMILY, self.name)]
        wanted = [chain for chain, rules in self._chains.items() for _ in rules]
        return sorted(found) == sorted(wanted)  # guard: a-gate-without-its-rules-is-open

    def _load(self, *changes: tuple[str, str]) -> None:
        """Add the table, or replace its rules by the same; its elements stay. Then change elements.

        ``changes``: "add" or "delete", and the elements.
        """
        lines = [f"add table {self.label}"]
        lines += [f"add {kind} {self.label} {name} {{ {declared} }}" for kind, name, declared in self._sets]
        for chain in self._chains:
            hooked = f"type filter hook {chain} priority {_FIRST}; policy accept;"
            lines.append(f"add chain {self.label} {chain} {{ {hooked if chain in _HOOKS else ''} }}")
        for chain, rules in self._chains.items():
            lines.append(f"flush chain {self.label} {chain}")
            lines += [f"add rule {self.label} {chain} {rule}" for rule in rules]
        lines += [f"{verb} element {self.label} {self._links} {{ {listed} }}" for verb, listed in changes if listed]
        with kept.nft(None) as nft:
            nft.run("\n".join(lines) + "\n")


class LinkTable(_Table):
    """A table with a set of links."""

    def __init__(self, name: str, set_name: str, chains: dict[str, Sequence[str]]) -> None:
        super().__init__(name, [("set", set_name, "type ifname;")], chains)

    def add(self, links: Iterable[str]) -> None:
        """Add links of the host, which need not exist, to the set. Those that are there stay.

        The rules match later frames. One that a CPU handles at this moment may pass; ``packets.settled`` waits for it.

        Raises HostRefused.
        """
        added = sorted(set(links))
        if not added:
            return
        with _kernel as nfnetlink:
            if self._in_force(nfnetlink):
                try:
                    nft_netlink.change(nfnetlink, nft_netlink.add_link_names(FAMILY, self.name, self._links, added))
                    return
                except NetlinkError as error:
                    if error.errno != errno.ENOENT:
                        raise
            # No table, or somebody changed it.
            self._load(("add", ", ".join(f'"{it}"' for it in added)))

    def links(self) -> frozenset[str]:
        """The links that the rules match: none, if the rules are not all there. Raises HostRefused."""
        with _kernel as nfnetlink:
            if not self._in_force(nfnetlink):
                return frozenset()
            return nft_netlink.link_names(nfnetlink, FAMILY, self.name, self._links)


class MarkTable(_Table):
    """A table with a map from links to marks.

    ``sets``: its other sets by name, and their declarations.
    """

    def __init__(self, name: str, map_name: str, sets: dict[str, str], chains: dict[str, Sequence[str]]) -> None:
        others = [("set", it, declared) for it, declared in sets.items()]
        super().__init__(name, [("map", map_name, "type ifname : mark;"), *others], chains)

    def put(self, marks: Mapping[str, int]) -> None:
        """Add links of the host, which need not exist, with their marks, or replace the marks of those that are there.

        The rules match later frames, as those of a ``LinkTable``. Raises HostRefused.
        """
        with _kernel as nfnetlink:
            for tries_left in reversed(range(_TRIES)):
                had = nft_netlink.link_marks(nfnetlink, FAMILY, self.name, self._links)
                added = {it: mark for it, mark in sorted(marks.items()) if had.get(it) != mark}
                changed = sorted(added.keys() & had.keys())
                try:
                    if not self._in_force(nfnetlink):
                        texts = (f'"{it}" : {mark:#x}' for it, mark in added.items())
                        self._load(("delete", ", ".join(f'"{it}"' for it in changed)), ("add", ", ".join(texts)))
                    elif added:
                        changes = nft_netlink.delete_link_names(FAMILY, self.name, self._links, changed)
                        changes += nft_netlink.add_link_marks(FAMILY, self.name, self._links, added)
                        nft_netlink.change(nfnetlink, changes)
                    return
                except (NetlinkError, NftRefused):  # somebody else changed the table since the listing
                    if not tries_left:
                        raise

    def marks(self) -> dict[str, int]:
        """The links that the rules match, with their marks: none, if the rules are not all there.

        Raises HostRefused.
        """
        with _kernel as nfnetlink:
            if not self._in_force(nfnetlink):
                return {}
            return nft_netlink.link_marks(nfnetlink, FAMILY, self.name, self._links)
