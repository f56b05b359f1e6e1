"""Balanced ports in the ruleset: which packets reach haproxy on the device, and how UDP flows are distributed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

import pytest
from msgspec.structs import replace

from kernel.ruleset_lab import CLIENT, VMS, Lab, Try, echoes
from netloom.state import Backend, LbRule, Scope
from unit.scopes import A1, A2, VM1, VM2, VM3, admit, wish


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        for vm in VMS:
            lab.serve(vm, "udp", 5000)
        lab.serve("dev", "tcp", 80)
        lab.serve("dev", "tcp", 8080)
        yield lab


def _rule(
    number: int,
    protocol: Literal["tcp", "udp", "tcp-proxy"],
    port: int,
    *guests: str,
    algorithm: Literal["roundrobin", "leastconn", "source"] = "roundrobin",
) -> LbRule:
    backends = tuple(Backend(ip=it, port=5000) for it in guests)
    return LbRule(
        rule_id=number,
        public_ip=A2.address,
        public_port=port,
        protocol=protocol,
        algorithm=algorithm,
        backends=backends,
        network_id="204",
    )


def _scope(*rules: LbRule, admits: bool = True) -> Scope:
    ingress = (admit(A2, "tcp", "80"), admit(A2, "udp", "500")) if admits else ()
    return replace(wish(*ingress, held=(A1, A2)), lb_rules={str(it.rule_id): it for it in rules})


def _attempt(protocol: str, port: int, space: str = "inet") -> Try:
    return Try(space, protocol, A2.address, port, CLIENT if space == "inet" else "")


def test_only_balanced_ports_of_the_device_are_reachable(lab: Lab) -> None:
    lab.renew(_scope(_rule(1, "tcp", 80, VM1)))
    lab.answered(_attempt("tcp", 80), _attempt("tcp", 80, "vm1"))
    lab.silent(_attempt("tcp", 8080))
    lab.renew(_scope())
    lab.silent(_attempt("tcp", 80))


def test_the_firewall_sees_the_client_address_of_balanced_traffic(lab: Lab) -> None:
    rules = _scope(_rule(1, "tcp", 80, VM1), _rule(2, "udp", 500, VM1), admits=False)
    lab.renew(rules)
    lab.silent(_attempt("tcp", 80), _attempt("udp", 500))
    only = replace(rules, networks=wish(admit(A2, "tcp", "80", f"{CLIENT}/32")).networks)
    lab.renew(only)
    lab.answered(_attempt("tcp", 80))
    lab.silent(Try("nb", "tcp", A2.address, 80))


@pytest.mark.parametrize("algorithm", ["roundrobin", "leastconn"])
def test_udp_flows_are_spread_evenly(lab: Lab, algorithm: Literal["roundrobin", "leastconn"]) -> None:
    lab.renew(_scope(_rule(2, "udp", 500, VM1, VM2, VM3, algorithm=algorithm)))
    answers = lab.answered(*[_attempt("udp", 500)] * 12)
    told = Counter(next(vm for vm in ("vm1", "vm2", "vm3") if vm in answer) for answer in answers)
    assert told == {"vm1": 4, "vm2": 4, "vm3": 4}


def test_udp_by_source_uses_one_backend_per_client(lab: Lab) -> None:
    lab.renew(_scope(_rule(2, "udp", 500, VM1, VM2, VM3, algorithm="source")))
    first = {answer.split()[0] for answer in lab.answered(*[_attempt("udp", 500)] * 6)}
    lab.renew(_scope(_rule(2, "udp", 500, VM1, VM2, VM3, algorithm="source"), _rule(3, "tcp", 80, VM1)))
    assert {answer.split()[0] for answer in lab.answered(*[_attempt("udp", 500)] * 6)} == first
    assert len(first) == 1


def test_a_rule_without_backends_does_not_answer(lab: Lab) -> None:
    lab.renew(_scope(_rule(2, "udp", 500)))
    lab.silent(_attempt("udp", 500))


def test_a_revoked_rule_ends_the_connections_it_allowed(lab: Lab) -> None:
    lab.renew(_scope(_rule(1, "tcp", 80, VM1)))
    with lab.connect("inet", A2.address, 80, CLIENT) as client:
        assert echoes(client)
        lab.apply(_scope(_rule(1, "tcp", 80, VM1), _rule(2, "udp", 500, VM1)))
        assert echoes(client), "a change of another rule does not affect the connection"
        lab.apply(_scope(_rule(2, "udp", 500, VM1)))
        assert not echoes(client, 1.0)
