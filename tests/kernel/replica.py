"""A source and a sink of flows in one process: some namespaces have the connections of others, all the time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from kernel.ruleset_lab import PATIENCE_S
from netloom.agent.kernel import conntrack_copy
from netloom.agent.kernel.conntrack_changes import list_records
from netloom.agent.kernel.conntrack_copy import Record
from netloom.agent.kernel.conntrack_events import BUFFER_BYTES, REPLICATED
from netloom.agent.log import Log
from netloom.agent.standby.flows import FlowSink, FlowSource
from netloom.render.marks import REVOKED


def eventually(holds: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    until = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


class Replica:
    """Use it as a context. ``pairs``: the namespace of the standby for each of the active host's."""

    def __init__(self, pairs: Mapping[str, str], *, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.pairs = dict(pairs)
        self.gaps: list[frozenset[str]] = []  # what the source has asked for
        self.lost: list[str] = []
        self.told: list[tuple[str, list[Record], list[Record]]] = []  # namespace, created, deleted
        self.sink = FlowSink(Log(), self.lost.append)
        self._buffer_bytes = buffer_bytes
        self._token = 0
        self._copies: set[asyncio.Task[None]] = set()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def on_loop(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run it on the event loop; returns its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE_S)

    def __enter__(self) -> Replica:
        self._thread.start()
        self.sink.start()
        self.on_loop(self._start())
        self.follow(*self.pairs)
        return self

    async def _start(self) -> None:
        self.source = FlowSource(Log(), self._changed, self._gap, buffer_bytes=self._buffer_bytes)
        self.source.start()

    def __exit__(self, *_: object) -> None:
        self.on_loop(self.source.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self.sink.stop()

    def follow(self, *namespaces: str) -> None:
        async def follow() -> None:
            self.source.follow(namespaces)

        expected = len(self.gaps) + bool(namespaces)
        self.on_loop(follow())
        eventually(lambda: len(self.gaps) >= expected)

    def _changed(self, namespace: str, create: list[Record], delete: list[Record]) -> None:
        self.told.append((namespace, create, delete))
        self._send(namespace, create, delete)

    def _send(self, namespace: str, create: list[Record], delete: list[Record]) -> None:
        sent = [[it for chunk in conntrack_copy.encode(part) for it in conntrack_copy.decode(chunk)]
                for part in (create, delete)]  # fmt: skip
        self.sink.change(self.pairs[namespace], sent[0], sent[1])

    def _gap(self, namespaces: frozenset[str]) -> None:
        self.gaps.append(namespaces)
        for it in namespaces:
            copy = self.loop.create_task(self.copy(it))
            self._copies.add(copy)
            copy.add_done_callback(self._copies.discard)

    async def copy(self, namespace: str) -> None:
        """List everything again."""
        self._token += 1
        token = self._token
        self.sink.begin(self.pairs[namespace], token)
        async for part in self.source.listing(namespace):
            self._send(namespace, part, [])
        self.sink.end(self.pairs[namespace], token)

    def is_equal(self) -> bool:
        """Whether the namespaces of the standby have the connections of the others, and no other ones."""
        return all(table(one) == table(other) for one, other in self.pairs.items())

    def await_equal(self) -> None:
        eventually(self.is_equal)


def table(namespace: str) -> set[bytes]:
    """The connections that a standby must have, without what is its own: TCP's state, its flags, timeouts."""
    records = list_records(namespace, marked=REVOKED, status=REPLICATED)
    return {it[:-13] + it[-12:-10] + it[-8:-4] for it in records}
