"""The open connections of scopes on their standby: what the active host sends, and what the standby does with it.

The standby asks for the connections of a scope when it has built it. It gets all of them between ``FlowsBegin`` and
``FlowsEnd``, and from then on what changes. When something may be missing, it gets all of them again.
``agent/standby/flows.py`` reads them from the kernel and writes them.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Protocol

from netloom import names, pairwire
from netloom.agent.kernel import conntrack_copy
from netloom.agent.kernel.conntrack_copy import Record
from netloom.agent.log import Log
from netloom.errors import HostRefused


class Pairs(Protocol):
    """The connections to the other hosts. ``agent/standby/pair.py`` describes the methods."""

    def send(self, group_id: str, message: pairwire.PairMessage) -> bool: ...
    async def drained(self, group_id: str) -> bool: ...


class Source(Protocol):
    """``agent/standby/flows.FlowSource``, which describes the methods."""

    def follow(self, wanted: Iterable[str]) -> None: ...
    def listing(self, namespace: str) -> AsyncIterator[list[Record]]: ...


class Sink(Protocol):
    """``agent/standby/flows.FlowSink``, which describes the methods."""

    def change(self, namespace: str, create: list[Record], delete: list[Record]) -> None: ...
    def begin(self, namespace: str, token: int) -> None: ...
    def end(self, namespace: str, token: int) -> None: ...
    def flush(self, namespace: str) -> None: ...
    def serve(self, namespace: str) -> None: ...


class FlowCopies:
    """Created and used on the event loop. ``start_task``: runs work there. ``source`` and ``sink`` make theirs."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        log: Log,
        start_task: Callable[[Coroutine[object, object, object]], None],
        source: Callable[[Callable[[str, list[Record], list[Record]], None], Callable[[frozenset[str]], None]], Source],
        sink: Callable[[Callable[[str], None]], Sink],
    ) -> None:
        self._loop = loop
        self._log = log
        self._start_task = start_task
        self._make_source = source
        self._make_sink = sink
        self.pairs: Pairs | None = None
        self._source: Source | None = None
        self._sink: Sink | None = None
        self._wanted: dict[str, tuple[str, str]] = {}  # by namespace: its group and scope; the standby wants these
        self._listing: dict[str, int] = {}  # by namespace: the token of the listing under way
        self._tokens = itertools.count(1)
        self._served: set[str] = set()  # namespaces for which the sink takes no connections
        self._asked: dict[str, str] = {}  # by namespace, as standby: the group that was asked

    # ------------------------------------------------------------------------------------------ on the active host

    def wanted(self, group_id: str, scope_id: str) -> None:
        """The standby asks for all connections of the scope."""
        namespace = names.namespace(scope_id)
        is_new = namespace not in self._wanted
        self._wanted[namespace] = group_id, scope_id
        if self._source is None:
            self._source = self._make_source(self._changed, self._gap)
        self._source.follow(self._wanted)  # it reports a gap for a namespace that is new to it
        if not is_new:
            self._list(namespace)

    def is_wanted(self, scope_id: str) -> bool:
        """Whether the standby gets the connections of the scope."""
        return names.namespace(scope_id) in self._wanted

    def drop(self, group_id: str, scope_id: str = "") -> None:
        """Nobody wants the connections of the scope any more; of all scopes of the group, if none is named."""
        for namespace, (group, scope) in list(self._wanted.items()):
            if group == group_id and scope_id in ("", scope):
                del self._wanted[namespace]
                self._listing.pop(namespace, None)
        if self._source is not None:
            self._source.follow(self._wanted)

    def gap(self, group_id: str) -> None:
        """Messages of the group were dropped."""
        for namespace, (group, _) in self._wanted.items():
            if group == group_id:
                self._list(namespace)

    def _changed(self, namespace: str, create: list[Record], delete: list[Record]) -> None:
        if self.pairs is None or namespace not in self._wanted:
            return
        group_id, scope_id = self._wanted[namespace]
        for ended in conntrack_copy.encode(delete) if delete else []:
            self.pairs.send(group_id, pairwire.Flows(scope_id=scope_id, delete=ended))
        for opened in conntrack_copy.encode(create) if create else []:
            self.pairs.send(group_id, pairwire.Flows(scope_id=scope_id, create=opened))

    def _gap(self, namespaces: frozenset[str]) -> None:
        for namespace in namespaces:
            self._list(namespace)

    def _list(self, namespace: str) -> None:
        """Send all connections; a listing that is under way has no meaning any more."""
        if namespace in self._wanted:
            token = self._listing[namespace] = next(self._tokens)
            self._start_task(self._send_all(namespace, token))

    async def _send_all(self, namespace: str, token: int) -> None:
        group_id, scope_id = self._wanted[namespace]
        pairs, source = self.pairs, self._source
        if pairs is None or source is None:
            return
        pairs.send(group_id, pairwire.FlowsBegin(scope_id=scope_id, token=token))
        try:
            async for part in source.listing(namespace):
                if self._listing.get(namespace) != token:
                    return
                for opened in conntrack_copy.encode(part):
                    pairs.send(group_id, pairwire.Flows(scope_id=scope_id, create=opened))
                if not await pairs.drained(group_id):
                    return
        except HostRefused as error:
            self._log.line(f"scope={scope_id} the connections for the standby cannot be listed: {error}")
            return
        if self._listing.get(namespace) == token:
            pairs.send(group_id, pairwire.FlowsEnd(scope_id=scope_id, token=token))
            del self._listing[namespace]

    # -------------------------------------------------------------------------------------------- on the standby

    def ask(self, group_id: str, scope_id: str) -> bool:
        """Ask the active host for the connections of a scope that is built here; False if it was asked before."""
        namespace = names.namespace(scope_id)
        if self.pairs is None or self._asked.get(namespace) == group_id:
            return False
        if namespace in self._served:  # guard: a-host-that-served-takes-connections-again
            self.flush([scope_id])
        if not self.pairs.send(group_id, pairwire.FlowsWanted(scope_id=scope_id)):
            return False
        self._asked[namespace] = group_id
        return True

    def lost(self, group_id: str) -> None:
        """The other host of the group has to be asked again, when it is there."""
        self._asked = {it: group for it, group in self._asked.items() if group != group_id}

    def forget(self, scope_id: str) -> None:
        """The scope is not on this host any more."""
        self._asked.pop(names.namespace(scope_id), None)

    def received(self, message: pairwire.Flows | pairwire.FlowsBegin | pairwire.FlowsEnd) -> None:
        """What the active host says."""
        namespace, sink = names.namespace(message.scope_id), self._get_sink()
        match message:
            case pairwire.FlowsBegin():
                sink.begin(namespace, message.token)
            case pairwire.FlowsEnd():
                sink.end(namespace, message.token)
            case pairwire.Flows():
                try:
                    create, delete = _decoded(message.create), _decoded(message.delete)
                except HostRefused as error:
                    self._log.line(f"scope={message.scope_id} connections of the active host: {error}")
                    return
                sink.change(namespace, create, delete)

    def serve(self, scope_ids: Iterable[str]) -> None:
        """This host serves these scopes from now on."""
        for scope_id in scope_ids:
            self._served.add(names.namespace(scope_id))
            self._get_sink().serve(names.namespace(scope_id))

    def flush(self, scope_ids: Iterable[str]) -> None:
        """Another host serves these scopes: what is known here of their connections is out of date."""
        for scope_id in scope_ids:
            self._served.discard(names.namespace(scope_id))
            self._get_sink().flush(names.namespace(scope_id))

    def _get_sink(self) -> Sink:
        if self._sink is None:
            self._sink = self._make_sink(self._lost)
        return self._sink

    def _lost(self, namespace: str) -> None:
        """In any thread: something for this namespace was lost."""
        self._loop.call_soon_threadsafe(self._ask_again, namespace)

    def _ask_again(self, namespace: str) -> None:
        group_id = self._asked.pop(namespace, "")
        if group_id:
            self.ask(group_id, namespace.removeprefix(names.namespace("")))


def _decoded(chunk: bytes) -> list[Record]:
    return conntrack_copy.decode(chunk) if chunk else []
