"""What runs for a scope beside the kernel: the guest process's tables, the resolvers, the load balancer."""

from __future__ import annotations

import errno
import grp
import os
import re
import shutil
import socket
from functools import cache

from netloom.agent.environment import PATH
from netloom.agent.kernel.links import find_links
from netloom.agent.kernel.namespaces import inside
from netloom.agent.processes.guest_process import Guests
from netloom.agent.processes.supervisor import NOBODYS_GROUP, Supervisor, run
from netloom.errors import HostRefused
from netloom.names import guest_link
from netloom.render import dnsmasq, haproxy
from netloom.render.guest import tables
from netloom.render.services import services
from netloom.state import Scope


class Services:
    """For worker threads, one scope at a time each."""

    def __init__(self, guests: Guests, supervisor: Supervisor) -> None:
        self._guests = guests
        self._supervisor = supervisor
        self._waiting: dict[str, dict[int, str]] = {}

    def converge(self, scope: Scope, namespace: str) -> list[str]:
        """Exactly what the scope wants runs in its namespace; what was done, in words.

        Raises HostRefused naming the service that does not; the others are seen to all the same.
        """
        did: list[str] = []
        failed: HostRefused | None = None
        taken = _taken(scope, namespace)
        did += [f"rule {it} waits for {taken[it]}" for it in taken.keys() - self.waiting(scope.scope_id).keys()]
        self._waiting[scope.scope_id] = taken
        try:
            did += self._guests.converge(scope.scope_id, namespace, tables(scope, _mtus(scope, namespace)))
        except HostRefused as error:
            failed = error
        wanted = services(
            scope,
            frozenset(taken),  # guard: a-taken-port-is-not-balanced
            resolver=_resolver(),  # guard: resolver-of-this-host
        )
        did += self._supervisor.converge(scope.scope_id, namespace, wanted)
        if failed is not None:
            raise failed
        return did

    def waiting(self, scope_id: str) -> dict[int, str]:
        """The balanced rules of the scope whose port somebody else in its namespace has: id to address and port."""
        return self._waiting.get(scope_id, {})

    def unserved(self, scope: Scope, namespace: str) -> list[str]:
        """The networks of the scope whose guests get no lease, metadata and passwords, or old ones."""
        return self._guests.unserved(namespace, tables(scope, _mtus(scope, namespace)))

    def running(self, scope_id: str) -> dict[str, int]:
        """The processes of the scope that were last seen alive: name to pid."""
        return self._supervisor.states().get(scope_id, {})

    def ends(self, scope_id: str) -> dict[str, int]:
        """How often each of them died, or hung and was ended, and was started again."""
        return self._supervisor.ends(scope_id)

    def scopes(self) -> set[str]:
        """The scopes that something runs for."""
        return self._supervisor.scopes() | self._guests.scopes()

    def guest(self) -> tuple[int, int]:
        """The pid of the guest process, which is the host's, and how often one died or hung."""
        return self._guests.pid, self._guests.ends

    def renew(self, scope_id: str) -> None:
        """The next converge reloads the scope's processes, or starts them anew, whether they changed or not."""
        self._supervisor.renew(scope_id)

    def end(self, scope_id: str) -> list[str]:
        """Nothing runs for the scope any more: no process and no socket keeps its namespace alive."""
        self._waiting.pop(scope_id, None)
        return self._supervisor.end(scope_id) + self._guests.end(scope_id)


def _resolver() -> dnsmasq.Build:
    """What the dnsmasq of this host is like; where there is none, whoever starts it will say so."""
    program = shutil.which("dnsmasq", path=PATH)
    return dnsmasq.DEBIAN_12 if program is None else _build(program, os.stat(program).st_mtime_ns)


@cache
def _build(program: str, _changed_ns: int) -> dnsmasq.Build:
    version = re.search(r"version ([0-9]+)\.([0-9]+)", run(None, [program, "--version"]).stdout)
    forgets = version is None or (int(version[1]), int(version[2])) >= (2, 88)
    try:
        group = grp.getgrgid(NOBODYS_GROUP).gr_name  # nogroup on Debian, nobody on Enterprise Linux
    except KeyError:
        group = dnsmasq.DEBIAN_12.group  # it will say itself that there is none
    return dnsmasq.Build(group, forgets)


def _taken(scope: Scope, namespace: str) -> dict[int, str]:
    """The balanced rules whose port haproxy would not get, by id. One of them would keep it from all the others.

    Its own sockets are in nobody's way: like the one that is tried here, they are root's and share their port.
    """
    rules = haproxy.balanced(scope)
    taken: dict[int, str] = {}
    if rules:
        with inside(namespace):
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
    """Network to the MTU of its guest link, which the plan has made that of what carries the segment."""
    networks = {guest_link(network_id): network_id for network_id, it in scope.networks.items() if it.implemented}
    return {networks[link.name]: link.mtu for link in find_links(namespace, list(networks))}
