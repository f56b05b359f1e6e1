"""The load balancer of a scope: one haproxy for all tcp and tcp-proxy rules, started only if there is such a rule.

It runs as master and worker (``-W``). A reload starts a new worker, which takes over the listening sockets. The old
worker stays until its connections have ended, so clients do not notice the reload. nftables balances UDP (``nft``).
"""

from __future__ import annotations

from netloom.render.service import Probe, Service, directory_of
from netloom.state import LbRule, Scope

NAME = "lb"
# In the root directory of the process, the only place where it can write (netloom/confine.py).
_MASTER, _ADMIN = "/sockets/master.sock", "/sockets/admin.sock"


def balanced(scope: Scope) -> tuple[LbRule, ...]:
    """The rules that haproxy serves, by ascending id. A rule whose address is not assigned yet is left out."""
    return tuple(
        rule
        for _, rule in sorted(scope.lb_rules.items(), key=lambda item: int(item[0]))
        if rule.protocol != "udp" and rule.public_ip in scope.public_ips
    )


def service(scope: Scope, without: frozenset[int] = frozenset()) -> Service | None:
    """The haproxy of ``scope``; None if it has no rule to serve. ``without``: ids of rules that are left out."""
    rules = tuple(rule for rule in balanced(scope) if rule.rule_id not in without)
    if not rules:
        return None
    directory = directory_of(scope.scope_id, NAME)
    configuration = f"{directory}/haproxy.cfg"
    return Service(
        name=NAME,
        directory=directory,
        argv=("haproxy", "-W", "-db", "-S", f"{_MASTER},mode,600", "-f", configuration),
        config={"haproxy.cfg": _configuration(rules)},
        on_change="reload",
        data_mib_max=1024,
        check=("haproxy", "-c", "-q", "-f", configuration),
        listens=tuple(("tcp", rule.public_port) for rule in rules),
        probe=Probe("haproxy", _MASTER),
    )


def _configuration(rules: tuple[LbRule, ...]) -> str:
    head = f"""# netloom
global
    maxconn 8000
    hard-stop-after 1h
    stats socket {_ADMIN} mode 600 level admin expose-fd listeners

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
        f"    balance {rule.algorithm}",  # haproxy and CloudStack use the same names
    ]
    # A server is named after its address, so it keeps its name when another server is removed.
    lines += [
        f"    server {backend.ip}:{backend.port} {backend.ip}:{backend.port} check{proxy}"
        for backend in sorted(rule.backends)
    ]
    return "\n".join(lines) + "\n"
