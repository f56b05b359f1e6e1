"""The load balancer of a scope: one haproxy for all tcp and tcp-proxy rules, started only if there is such a rule.

It runs as master and worker (``-W``). A reload starts a new worker, which takes over the listening sockets. The old
worker stays until its connections have ended, so clients do not notice the reload. nftables balances UDP (``nft``).

The rules share one process, so each has a share of its connections, and each client a share of those of a rule. With
many rules, equal shares would be too small to be useful. Then a rule may have more, but only while at most half of all
connections are in use. The other half is divided equally, and this part is reserved for each rule. A connection without
data in either direction is closed after ``Balancing.idle_s`` seconds. A peer that has gone is
noticed earlier, by keepalive probes of the kernel (``render.scope`` sets their times).
"""

from __future__ import annotations

import msgspec

from netloom.render.service import Probe, Service, directory_of
from netloom.state import Backend, LbRule, Scope

NAME = "lb"
# In the root directory of the process, the only place where it can write (netloom/confine.py).
MASTER, ADMIN = "/sockets/master.sock", "/sockets/admin.sock"

_RULE_MIN = 50  # a smaller share would not be useful
_CLIENTS = 4  # so many clients can use up the share of a rule, or all connections

CLIENTS = "clients"  # the name of the table of clients of all rules
_TOTAL = "total"  # the name of the table whose only entry counts all connections


def balanced(scope: Scope) -> tuple[LbRule, ...]:
    """The rules that haproxy serves, by ascending id. A rule whose address is not assigned yet is left out."""
    return tuple(
        rule
        for _, rule in sorted(scope.lb_rules.items(), key=lambda item: int(item[0]))
        if rule.protocol != "udp" and rule.public_ip in scope.public_ips
    )


class Shares(msgspec.Struct, frozen=True):
    """The connections at the same time: of all rules, of each rule, of one client address to one rule, to all rules.

    ``reserved``: those of each rule while more than half of all connections are in use.
    """

    in_all: int
    rule: int
    reserved: int
    client: int
    client_in_all: int

    @property
    def borrowed_below(self) -> int:
        """While at most so many connections are in use, a rule may have more than what is reserved for it."""
        return self.in_all // 2


def shares(scope: Scope, rules: int) -> Shares:
    """The shares of ``rules`` rules of the scope. They are equal, so that no rule can use up another one's share."""
    # With thousands of rules each still has a connection of its own.
    in_all = max(scope.balancing.connections_max, 2 * rules)
    rule = reserved = in_all // max(rules, 1)
    if rule < _RULE_MIN:
        rule, reserved = _RULE_MIN, in_all // 2 // rules
    return Shares(in_all, rule, reserved, rule // _CLIENTS, in_all // _CLIENTS)


def section(rule: LbRule) -> str:
    """The name of the rule's section in the configuration, and of its statistics and its table of clients."""
    return f"rule-{rule.rule_id}"


def server(backend: Backend) -> str:
    """The name of a server in the section of its rule. It stays the same when another server is removed."""
    return f"{backend.ip}:{backend.port}"


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
        argv=("haproxy", "-W", "-db", "-S", f"{MASTER},mode,600", "-f", configuration),
        config={"haproxy.cfg": _configuration(scope, rules)},
        on_change="reload",
        data_mib_max=512 + shares(scope, len(rules)).in_all // 16,  # 64 KiB for each connection
        check=("haproxy", "-c", "-q", "-f", configuration),
        listens=tuple(("tcp", rule.public_port) for rule in rules),
        probe=Probe("haproxy", MASTER),
        serves=frozenset({"balancing"}),
    )


def _configuration(scope: Scope, rules: tuple[LbRule, ...]) -> str:
    share = shares(scope, len(rules))
    idle_s = scope.balancing.idle_s  # guard: idle-connections-end
    head = f"""# netloom
global
    maxconn {share.in_all}
    hard-stop-after 1h
    stats socket {ADMIN} mode 600 level admin expose-fd listeners

defaults
    mode tcp
    timeout connect 5s
    timeout client {idle_s}s
    timeout server {idle_s}s
    option clitcpka
    option srvtcpka
    option redispatch
    retries 3

backend {CLIENTS}
    stick-table type ip size {share.in_all} expire 10s store conn_cur
"""
    if share.reserved < share.rule:
        head += f"""
backend {_TOTAL}
    stick-table type integer size 1 expire 10s store conn_cur
"""
    return head + "".join(_listen(rule, share) for rule in rules)


def _listen(rule: LbRule, share: Shares) -> str:
    proxy = " send-proxy" if rule.protocol == "tcp-proxy" else ""  # guard: tcp-proxy-sends-the-proxy-header
    lines = [
        "",
        f"listen {section(rule)}",
        f"    bind {rule.public_ip}:{rule.public_port}",
        f"    maxconn {share.rule}",  # guard: a-rule-has-its-share
        # A client in the table has a connection, so the table is never full of them.
        f"    stick-table type ip size {share.rule} expire 10s store conn_cur",
        "    tcp-request connection track-sc0 src",
        f"    tcp-request connection track-sc1 src table {CLIENTS}",
        f"    tcp-request connection reject if {{ sc0_conn_cur gt {share.client} }}",  # guard: a-client-has-its-share
        f"    tcp-request connection reject if {{ sc1_conn_cur gt {share.client_in_all} }}",
        *(_borrowing(share) if share.reserved < share.rule else ()),  # guard: rules-have-reserved-connections
        f"    balance {rule.algorithm}",  # haproxy and CloudStack use the same names
    ]
    lines += [
        f"    server {server(backend)} {backend.ip}:{backend.port} check{proxy}" for backend in sorted(rule.backends)
    ]
    return "\n".join(lines) + "\n"


def _borrowing(share: Shares) -> list[str]:
    """Refuse what exceeds the reserved connections of a rule while more than half of all are in use."""
    all_in_use = f"sc2_conn_cur gt {share.borrowed_below}"
    return [
        f"    tcp-request connection track-sc2 int(0) table {_TOTAL}",
        f"    tcp-request connection reject if {{ fe_conn gt {share.reserved} }} {{ {all_in_use} }}",
    ]
