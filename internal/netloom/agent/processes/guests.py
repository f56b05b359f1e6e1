"""Have the networks of a scope served by the guest process. For worker threads, which may enter namespaces."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from netloom.agent.processes.failures import GUEST, ServiceFailure, ServicesFailed, refusal
from netloom.agent.processes.guest_process import GuestProcess, ServedNetwork
from netloom.agent.processes.guest_sockets import open_sockets, usable
from netloom.errors import HostRefused
from netloom.guestwire import GuestNetwork

_T = TypeVar("_T")


class Guests:
    """Opens the sockets in the calling thread and passes them to ``process`` on the event loop.

    For one scope, one thread at a time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, process: GuestProcess) -> None:
        self._loop = loop
        self.process = process

    def converge(self, scope_id: str, namespace: str, wanted: tuple[GuestNetwork, ...]) -> list[str]:
        """Have the networks ``wanted`` of the scope, and no others, served from these tables; the steps in words.

        Raises ServicesFailed when the guest process refuses tables or cannot be started. All networks are tried first.
        """
        keys = {(table.scope_id, table.network_id) for table in wanted}
        did: list[str] = []
        # list() copies in one operation, because the event loop may add and remove networks meanwhile.
        failed: list[ServiceFailure] = []
        # list() copies in one operation, because the event loop may add and remove networks meanwhile.
        for key in [key for key in list(self.process.networks) if key[0] == scope_id and key not in keys]:
            try:
                self._on_loop(self.process.drop(key))
                did.append(f"guest: drop {key[1]}")
            except (HostRefused, OSError) as error:
                failed.append(_failure(key[1], error, stale=True))
        for table in wanted:
            try:
                did += self._serve(namespace, table)
            except (HostRefused, OSError) as error:
                had = self.process.networks.get((table.scope_id, table.network_id))
                failed.append(_failure(table.network_id, error, stale=had is not None and had.served))
        if failed:
            raise ServicesFailed(failed, did)
        return did

    def _serve(self, namespace: str, table: GuestNetwork) -> list[str]:
        key = (table.scope_id, table.network_id)
        network = self.process.networks.get(key)
        if network is not None and usable(network.sockets, namespace, table):
            return [f"guest: update {table.network_id}"] if self._on_loop(self.process.update(network, table)) else []
        network = ServedNetwork(table, table.revision, open_sockets(namespace, table))
        self._on_loop(self.process.serve(key, network))
        return [f"guest: serve {table.network_id}"]

    def unserved(self, namespace: str, wanted: tuple[GuestNetwork, ...]) -> list[str]:
        """The networks of ``wanted`` that are not served from these tables now. Changes nothing."""
        return [table.network_id for table in wanted if not self._serves(namespace, table)]

    def _serves(self, namespace: str, table: GuestNetwork) -> bool:
        network = self.process.networks.get((table.scope_id, table.network_id))
        return (
            network is not None
            and network.served
            and network.revision == table.revision
            and usable(network.sockets, namespace, table)
        )

    def serves_all(self, scope_id: str) -> bool:
        """Whether the process that is connected now serves all networks of the scope that it should serve."""
        return all(it.served for (scope, _), it in list(self.process.networks.items()) if scope == scope_id)

    def scopes(self) -> set[str]:
        """The scopes that have networks which are served."""
        return {scope_id for scope_id, _ in list(self.process.networks)}

    def drop(self, scope_id: str) -> list[str]:
        """Serve no network of the scope any more, and close the sockets, which keep its namespace alive."""
        return self.converge(scope_id, "", ())

    def _on_loop(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _failure(network_id: str, error: HostRefused | OSError, *, stale: bool) -> ServiceFailure:
    it = refusal(f"the guest services of network {network_id}", error)
    return ServiceFailure(
        name=f"guest-{network_id}",
        message=it.message,
        hint=it.hint,
        serves=GUEST,
        network_id=network_id,
        stale=stale,
    )
