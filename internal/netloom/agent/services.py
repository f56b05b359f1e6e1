"""What runs for a scope beside the kernel: the guest process's tables, the resolvers, the load balancer."""

from __future__ import annotations

from netloom.agent.guests import Guests
from netloom.agent.kernel.links import find_links
from netloom.agent.supervise import Supervisor
from netloom.errors import HostRefused
from netloom.names import guest_link
from netloom.render.guest import tables
from netloom.render.services import services
from netloom.state import Scope


class Services:
    """For worker threads, one scope at a time each."""

    def __init__(self, guests: Guests, supervisor: Supervisor) -> None:
        self._guests = guests
        self._supervisor = supervisor

    def converge(self, scope: Scope, namespace: str) -> list[str]:
        """Exactly what the scope wants runs in its namespace; what was done, in words.

        Raises HostRefused naming the service that does not; the others are seen to all the same.
        """
        did: list[str] = []
        failed: HostRefused | None = None
        try:
            did += self._guests.converge(scope.scope_id, namespace, tables(scope, _mtus(scope, namespace)))
        except HostRefused as error:
            failed = error
        did += self._supervisor.converge(scope.scope_id, namespace, services(scope))
        if failed is not None:
            raise failed
        return did

    def running(self, scope_id: str) -> dict[str, int]:
        """The processes of the scope that were last seen alive: name to pid."""
        return self._supervisor.states().get(scope_id, {})

    def renew(self, scope_id: str) -> None:
        """The next converge reloads the scope's processes, or starts them anew, whether they changed or not."""
        self._supervisor.renew(scope_id)

    def end(self, scope_id: str) -> list[str]:
        """Nothing runs for the scope any more: no process and no socket keeps its namespace alive."""
        return self._supervisor.end(scope_id) + self._guests.end(scope_id)


def _mtus(scope: Scope, namespace: str) -> dict[str, int]:
    """Network to the MTU of its guest link, which the plan has made that of what carries the segment."""
    networks = {guest_link(network_id): network_id for network_id, it in scope.networks.items() if it.implemented}
    return {networks[link.name]: link.mtu for link in find_links(namespace, list(networks))}
