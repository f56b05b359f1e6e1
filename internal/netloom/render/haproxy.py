"""The load balancer of a scope: one haproxy for its tcp and tcp-proxy rules, started only when there is one.

Master and worker (``-W``): a reload starts a new worker that takes the listening sockets over, and the old one
stays until its connections have ended, so that no client notices. UDP is balanced by nftables (``render.nft``).
"""

from __future__ import annotations

from netloom.render.service import Probe, Service, directory_of
from netloom.state import LbRule, Scope

NAME = "lb"
_MASTER = "master.sock"
_ALGORITHMS = {"roundrobin": "roundrobin", "leastconn": "leastconn", "source": "source"}


def balanced(scope: Scope) -> tuple[LbRule, ...]:
    """The rules that haproxy carries, in the order of their ids; a rule waits for its address to be assigned."""
    return tuple(
        rule
        for _, rule in sorted(scope.lb_rules.items(), key=lambda item: int(item[0]))
        if rule.protocol != "udp" and rule.public_ip in scope.public_ips
    )


def service(scope: Scope, without: frozenset[int] = frozenset()) -> Service | None:
    """The haproxy of ``scope``, without some rules by their ids; None when it balances nothing."""
    rules = tuple(rule for rule in balanced(scope) if rule.rule_id not in without)
    if not rules:
        return None
    directory = directory_of(scope.scope_id, NAME)
    configuration = f"{directory}/haproxy.cfg"
    return Service(
        name=NAME,
        directory=directory,
        argv=("haproxy", "-W", "-db", "-S", f"{directory}/{_MASTER},mode,600", "-f", configuration),
        config={"haproxy.cfg": _configuration(directory, rules)},
        on_change="reload",
        check=("haproxy", "-c", "-q", "-f", configuration),
        listens=tuple(("tcp", rule.public_port) for rule in rules),
        probe=Probe("haproxy", f"{directory}/{_MASTER}"),
    )


def _configuration(directory: str, rules: tuple[LbRule, ...]) -> str:
    head = f"""# netloom
global
    uid 65534
    gid 65534
    maxconn 8000
    hard-stop-after 1h
    stats socket {directory}/admin.sock mode 600 level admin expose-fd listeners

defaults
    mode tcp
    timeout connect 5s
    timeout client 1h
    timeout server 1h
    option redispatch
    retries 3
"""
    return head + "".join(map(_listen, rules))


def _listen(rule: LbRule) -> str:
    proxy = " send-proxy" if rule.protocol == "tcp-proxy" else ""  # guard: tcp-proxy-sends-the-proxy-header
    lines = [
        "",
        f"listen rule-{rule.rule_id}",
        f"    bind {rule.public_ip}:{rule.public_port}",
        f"    balance {_ALGORITHMS[rule.algorithm]}",
    ]
    # Named by what they are and not by their place, so that a server keeps its name when another goes.
    lines += [
        f"    server {backend.ip}:{backend.port} {backend.ip}:{backend.port} check{proxy}"
        for backend in sorted(rule.backends)
    ]
    return "\n".join(lines) + "\n"
