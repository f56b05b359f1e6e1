"""When the services of a scope are left alone."""

from __future__ import annotations

from typing import Any, cast

import pytest
from msgspec.structs import replace

from netloom.agent.log import Log
from netloom.agent.processes import services as processes
from netloom.agent.processes.failures import ServiceFailure, ServicesFailed
from netloom.agent.processes.guests import Guests
from netloom.agent.processes.services import Services
from netloom.agent.processes.supervisor import Supervisor
from netloom.state import PortForward, Scope
from netloom.state.nat import Ports
from unit.balanced_scope import NETWORK, RULE, balanced_scope

SCOPE = balanced_scope(RULE)
FORWARD = PortForward(
    public_ip="203.0.113.21",
    protocol="tcp",
    public_ports=Ports(8080, 8080),
    private_ip="10.10.1.45",
    private_ports=Ports(80, 80),
    network_id="204",
)


class Processes:
    """Counts convergences. Implements what ``Services`` uses of the supervisor and of the guests."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.converged = 0
        self.alive = self.served = True
        self.failed = False
        self.names: tuple[str, ...] = ()
        monkeypatch.setattr(processes, "taken_ports", lambda *of: self.taken)
        monkeypatch.setattr(processes, "_mtus", lambda *of: {})
        self.taken: dict[int, str] = {}
        self.services = Services(cast(Guests, self), cast(Supervisor, self), cast(Log, None))

    def converge(self, scope_id: str, namespace: str, wanted: Any, asked: Any = None) -> list[str]:
        if wanted and hasattr(wanted[0], "argv"):
            self.converged += 1
            if self.failed:
                raise ServicesFailed([ServiceFailure(name="lb", message="it failed", serves=frozenset())], [])
        return []

    def user(self, scope_id: str, name: str) -> int:
        return 0

    def runs_all(self, scope_id: str, names: frozenset[str]) -> bool:
        assert names == {"dns-204", "lb"}
        return self.alive

    def serves_all(self, scope_id: str) -> bool:
        return self.served

    def renew(self, scope_id: str) -> None: ...

    def converges(self, scope: Scope, *, settled: bool = True) -> bool:
        """Whether the services are looked at for this state."""
        before = self.converged
        self.services.converge(scope, "cs-net-204", settled=settled)
        return self.converged > before


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)


def test_a_change_that_no_service_sees_looks_at_none(host: Processes) -> None:
    assert host.converges(SCOPE)
    assert not host.converges(replace(SCOPE, revision=9, port_forwards={FORWARD.key: FORWARD}))
    assert host.converges(replace(SCOPE, networks={"204": replace(NETWORK, nics={})}))


def test_an_unsettled_scope_is_looked_at(host: Processes) -> None:
    assert host.converges(SCOPE)
    assert host.converges(SCOPE, settled=False)
    assert not host.converges(SCOPE)


@pytest.mark.mutation("a-dead-process-is-noticed-by-the-next-call", instead="True")
def test_a_dead_process_is_looked_at(host: Processes) -> None:
    assert host.converges(SCOPE)
    host.alive = False
    assert host.converges(SCOPE)
    host.alive, host.served = True, False
    assert host.converges(SCOPE)


def test_after_a_failure_and_a_renewal_they_are_looked_at(host: Processes) -> None:
    host.failed = True
    for _ in range(2):
        with pytest.raises(ServicesFailed):
            host.converges(SCOPE)
    assert host.converged == 2
    host.failed = False
    assert host.converges(SCOPE)
    host.services.renew("net-204")
    assert host.converges(SCOPE)


def test_a_rule_that_waits_for_its_port_is_looked_at(host: Processes) -> None:
    host.taken = {RULE.rule_id: "203.0.113.10:80"}
    assert host.converges(SCOPE)
    assert host.converges(SCOPE)
