"""The services of a scope that run as processes: DHCP, metadata and passwords, DNS, load balancing."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from functools import cache

from netloom.agent.environment import PATH
from netloom.agent.kernel.links import find_links
from netloom.agent.kernel.namespaces import inside
from netloom.agent.log import Log
from netloom.agent.processes import balancer, limited_vms
from netloom.agent.processes.failures import GUEST, ServiceFailure, ServicesFailed
from netloom.agent.processes.guests import Guests
from netloom.agent.processes.process import owning_sockets, run
from netloom.agent.processes.supervisor import Supervisor
from netloom.errors import HostRefused
from netloom.names import guest_link
from netloom.render import dns_names, dnsmasq, haproxy
from netloom.render.guest import tables
from netloom.render.services import same_services, services
from netloom.state import Scope
from netloom.state.served import Served

_PRIVILEGED = "can change links and routes of the host, because this host does not let netloom answer system calls"


class Services:
    """The services of all scopes. Called by worker threads; for one scope, by one thread at a time."""

    def __init__(self, guests: Guests, supervisor: Supervisor, log: Log) -> None:
        self._log = log
        self._guests = guests
        self._supervisor = supervisor
        self._waiting: dict[str, dict[int, str]] = {}  # scope id to what waiting() returns
        self._unnamed: dict[str, dict[str, str]] = {}  # scope id to NIC to reserved name
        self._unserved: dict[str, tuple[ServiceFailure, ...]] = {}  # scope id to failures of the guest process
        self._running: dict[str, tuple[Scope, frozenset[str]]] = {}  # scope id to what runs, and its processes

    def converge(
        self, scope: Scope, namespace: str, asked: frozenset[Served] | None = None, *, settled: bool = False
    ) -> list[str]:
        """Run the services that the scope needs in its namespace, and stop all others; return a text for each step.

        ``asked``: as in ``Supervisor.converge``. ``settled``: nothing of the scope was changed by others, as far as the
        kernel reports it. Then nothing is done for a state that has the same services as the last one. Raises
        ServicesFailed when some fail, after all others.
        """
        if settled and self._runs(scope):
            return []
        self._running.pop(scope.scope_id, None)
        did: list[str] = []
        failed: list[ServiceFailure] = []
        taken = taken_ports(scope, namespace, self._supervisor.user(scope.scope_id, haproxy.NAME))
        did += [
            f"rule {rule_id} waits for {taken[rule_id]}"
            for rule_id in taken.keys() - self.waiting(scope.scope_id).keys()
        ]
        self._waiting[scope.scope_id] = taken
        self._log_reserved_names(scope)
        if asked is None or asked & GUEST or scope.scope_id not in self._unserved:
            self._unserved.pop(scope.scope_id, None)
            try:
                did += self._guests.converge(scope.scope_id, namespace, tables(scope, _mtus(scope, namespace)))
            except ServicesFailed as error:
                did += error.did
                self._unserved[scope.scope_id] = error.failures
        failed += self._unserved.get(scope.scope_id, ())
        wanted = services(
            scope,
            frozenset(taken),  # guard: a-taken-port-is-not-balanced
            resolver=_dnsmasq_build(),  # guard: resolver-of-this-host
        )
        try:
            did += self._supervisor.converge(scope.scope_id, namespace, wanted, asked)
        except ServicesFailed as error:
            did += error.did
            failed += error.failures
        if failed:
            raise ServicesFailed(failed, did)
        if not taken:
            self._running[scope.scope_id] = scope, frozenset(it.name for it in wanted)
        return did

    def _runs(self, scope: Scope) -> bool:
        """Whether all services of the scope run as this state wants them, as far as we know without asking."""
        before, names = self._running.get(scope.scope_id, (None, frozenset()))
        return (
            before is not None
            and same_services(before, scope)
            and self._supervisor.runs_all(scope.scope_id, names)  # guard: a-dead-process-is-noticed-by-the-next-call
            and self._guests.serves_all(scope.scope_id)
        )

    def _log_reserved_names(self, scope: Scope) -> None:
        """Log each NIC whose name is reserved, once."""
        unnamed = {nic: name for it in scope.networks.values() for nic, name in dns_names.reserved(it).items()}
        for nic in sorted(unnamed.keys() - self._unnamed.get(scope.scope_id, {}).keys()):
            self._log.line(f"scope={scope.scope_id} the name {unnamed[nic]} is reserved: the NIC {nic} is not in DNS")
        self._unnamed[scope.scope_id] = unnamed

    def waiting(self, scope_id: str) -> dict[int, str]:
        """The balancing rules of the scope whose port another program in its namespace uses: id to address:port."""
        return self._waiting.get(scope_id, {})

    def limited(self, scope: Scope, namespace: str) -> list[str]:
        """A sentence for each rule, client and VM that has used up its share of a service now or in the last minute."""
        balancing = self.running(scope.scope_id).get(haproxy.NAME)
        return [
            *(balancer.limited(scope, frozenset(self.waiting(scope.scope_id)), balancing) if balancing else ()),
            *limited_vms.limited(scope, namespace),
            *limited_vms.connected(scope, namespace),
            *limited_vms.noticed(scope, self._guests.process.limited(scope.scope_id)),
        ]

    def revive_backends(self, scope: Scope) -> None:
        """Let the balancer of the scope use all backends, until its next checks fail. Raises HostRefused.

        No frame of a standby passes, so its checks have failed. In its turn it would refuse clients for seconds.
        """
        balancing = self.running(scope.scope_id).get(haproxy.NAME)
        if balancing:
            try:
                balancer.revive_servers(scope, frozenset(self.waiting(scope.scope_id)), balancing)
            except (OSError, ValueError) as error:
                raise HostRefused(
                    f"haproxy waits until its checks have found the backends: {error}",
                    hint="nothing to do: this takes some seconds",
                ) from error

    def privileged(self, scope_id: str) -> list[str]:
        """A sentence for each process with more privileges than it needs, because this host cannot take them away."""
        return [f"{it} {_PRIVILEGED}" for it in self._supervisor.privileged(scope_id)]

    def unserved(self, scope: Scope, namespace: str) -> list[str]:
        """The networks of the scope that the guest process does not serve now, or serves with an outdated table."""
        return self._guests.unserved(namespace, tables(scope, _mtus(scope, namespace)))

    def running(self, scope_id: str) -> dict[str, int]:
        """The processes of the scope that were alive when we last looked: name to pid."""
        return self._supervisor.states().get(scope_id, {})

    def crashes(self, scope_id: str) -> dict[str, int]:
        """How often each process of the scope died, or hung and was killed: name to number."""
        return self._supervisor.crashes(scope_id)

    def scopes(self) -> set[str]:
        """The scopes that have processes, or networks that the guest process serves."""
        return self._supervisor.scopes() | self._guests.scopes()

    def guest_process(self) -> tuple[int, int]:
        """The pid of the host's guest process, and how often it died, or hung and was killed."""
        return self._guests.process.pid, self._guests.process.crashes

    def renew(self, scope_id: str) -> None:
        """Make the next ``converge`` reload or restart every process of the scope, even if nothing has changed."""
        self._running.pop(scope_id, None)
        self._supervisor.renew(scope_id)

    def stop(self, scope_id: str) -> list[str]:
        """Stop all processes of the scope and close its sockets, which keep its namespace alive; return the steps."""
        self._waiting.pop(scope_id, None)
        self._unnamed.pop(scope_id, None)
        self._unserved.pop(scope_id, None)
        self._running.pop(scope_id, None)
        return self._supervisor.stop(scope_id) + self._guests.drop(scope_id)


def _dnsmasq_build() -> dnsmasq.Build:
    """The properties of this host's dnsmasq; if it cannot be asked, those of Debian 12: the start reports why."""
    program = shutil.which("dnsmasq", path=PATH)
    if program is None:
        return dnsmasq.DEBIAN_12
    try:
        return _inspect(program, os.stat(program).st_mtime_ns)
    except (HostRefused, OSError):
        return dnsmasq.DEBIAN_12


@cache
def _inspect(program: str, _changed_ns: int) -> dnsmasq.Build:
    """Ask the program for its version and options, once for each version of its file. An unknown one counts as new.

    Raises HostRefused or OSError when it cannot be executed.
    """
    version = re.search(r"version ([0-9]+)\.([0-9]+)", run(None, [program, "--version"]).stdout)
    options = run(None, [program, "--help"]).stdout
    forgets = version is None or (int(version[1]), int(version[2])) >= (2, 88)
    return dnsmasq.Build(forgets, "--no-ident" in options, "--max-tcp-connections" in options)


def taken_ports(scope: Scope, namespace: str, user: int) -> dict[int, str]:
    """The balancing rules whose port another program already uses: id to address:port.

    With one such rule haproxy would not start at all. Sockets of haproxy do not count: they and the sockets of this
    test belong to the same ``user`` and have SO_REUSEPORT, so both can be bound to one port (socket(7)).
    """
    rules = haproxy.balanced(scope)
    taken: dict[int, str] = {}
    if rules:
        with inside(namespace), owning_sockets(user):
            for rule in rules:
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                    try:
                        sock.bind((rule.public_ip, rule.public_port))
                    except OSError as error:
                        if error.errno == errno.EADDRINUSE:
                            taken[rule.rule_id] = f"{rule.public_ip}:{rule.public_port}"
    return taken


def _mtus(scope: Scope, namespace: str) -> dict[str, int]:
    """Network to the MTU of its guest link. The plan has set it to that of the link that carries the segment."""
    networks = {guest_link(network_id): network_id for network_id, it in scope.networks.items() if it.implemented}
    return {networks[link.name]: link.mtu for link in find_links(namespace, list(networks))}
