"""Ask a running haproxy which rules, and which clients, have used up their share of connections.

And tell it that all servers are healthy, on a host whose checks could not reach them until now.
"""

from __future__ import annotations

import csv
import errno
import io
import re
import socket
import time

from netloom.agent.processes.process import socket_inside
from netloom.render import haproxy
from netloom.state import LbRule, Scope

ANSWER_S = 2.0
_ANSWER_BYTES_MAX = 16 << 20  # some hundred bytes for each rule, or each client
_CLIENTS_SHOWN = 5  # per rule
_COMMANDS_BYTES_MAX = 8192  # haproxy reads a line of commands into one buffer, of 16 KiB by default
_RULES_SHOWN = 20  # that have no more than what is reserved for them

_KEY = re.compile(r"\bkey=(\S+) .*\bconn_cur=(\d+)")


def limited(scope: Scope, without: frozenset[int], pid: int) -> list[str]:
    """A sentence for each rule, and each client of a rule, that gets no further connection now.

    ``without``: ids of rules that haproxy does not serve. ``pid``: its master process. Empty as well if haproxy does
    not answer: ``liveness`` finds and restarts a process that hangs.
    """
    rules = tuple(rule for rule in haproxy.balanced(scope) if rule.rule_id not in without)
    if not rules:
        return []
    share = haproxy.shares(scope, len(rules))
    try:
        # Only frontends: one line for each rule (haproxy's management.txt, "show stat").
        current = {row["# pxname"]: int(row["scur"]) for row in _table(_ask(pid, "show stat -1 1 -1"))}
        found = []
        total = sum(current.values())
        if total > share.borrowed_below and share.reserved < share.rule:
            found += _restricted(rules, current, share)
        if total >= share.client_in_all:
            found += [
                f"balancing: {it} holds its share of {share.client_in_all} connections to all rules: more are refused"
                for it in _clients(pid, haproxy.CLIENTS, share.client_in_all)
            ]
        for rule in rules:
            connections = current.get(haproxy.section(rule), 0)
            if connections >= share.rule:
                found.append(f"{_name(rule)}: {connections} of {share.rule} connections: new clients wait")
            if connections >= share.client:
                found += _limited_clients(pid, rule, share.client)
    except (OSError, ValueError, KeyError):
        return []
    return found


def revive_servers(scope: Scope, without: frozenset[int], pid: int) -> None:
    """Let haproxy take all servers for healthy, as after its start. Checks that fail from now on count as usual.

    Parameters as those of ``limited``. Raises OSError, or ValueError if haproxy does not know a server.
    """
    commands = [
        f"set server {haproxy.section(rule)}/{haproxy.server(backend)} health up"
        for rule in haproxy.balanced(scope)
        if rule.rule_id not in without
        for backend in rule.backends
    ]
    while commands:
        line, length = [], 0
        while commands and length < _COMMANDS_BYTES_MAX:
            line.append(commands.pop())
            length += len(line[-1]) + 2
        if complaint := _ask(pid, "; ".join(line), at=haproxy.ADMIN).strip():
            raise ValueError(complaint)


def _restricted(rules: tuple[LbRule, ...], current: dict[str, int], share: haproxy.Shares) -> list[str]:
    """The rules that get no more than what is reserved for each rule, because most connections are in use."""
    full = [
        (rule, current.get(haproxy.section(rule), 0))
        for rule in rules
        if share.reserved <= current.get(haproxy.section(rule), 0) < share.rule
    ]
    found = [
        f"{_name(rule)}: {connections} connections, and {share.reserved} are reserved for it: more are refused while "
        f"all rules have more than {share.borrowed_below}"
        for rule, connections in full[:_RULES_SHOWN]
    ]
    return [*found, f"balancing: and {len(full) - _RULES_SHOWN} more rules"] if len(full) > _RULES_SHOWN else found


def _limited_clients(pid: int, rule: LbRule, share: int) -> list[str]:
    clients = _clients(pid, haproxy.section(rule), share)
    found = [
        f"{_name(rule)}: {it} holds its share of {share} connections: more of them are refused"
        for it in clients[:_CLIENTS_SHOWN]
    ]
    if len(clients) > _CLIENTS_SHOWN:
        found.append(f"{_name(rule)}: and {len(clients) - _CLIENTS_SHOWN} more clients")
    return found


def _clients(pid: int, table: str, connections: int) -> list[str]:
    """The clients in a table that have at least so many connections."""
    text = _ask(pid, f"show table {table} data.conn_cur ge {connections}")
    return sorted(found[1] for line in text.splitlines() if (found := _KEY.search(line)))


def _name(rule: LbRule) -> str:
    return f"balancing rule {rule.rule_id} ({rule.public_ip}:{rule.public_port})"


def _table(text: str) -> csv.DictReader[str]:
    return csv.DictReader(io.StringIO(text))


def _ask(pid: int, command: str, *, at: str = haproxy.MASTER) -> str:
    """The answer of the current worker to a command. Raises OSError, also when it is too long or takes too long.

    ``at``: the socket of the master, which passes on one command, or that of the worker for a line of commands.
    """
    until, answer = time.monotonic() + ANSWER_S, bytearray()
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(ANSWER_S)
        with socket_inside(pid, at) as path:
            asking.connect(path)
        asking.sendall(f"{'@1 ' if at == haproxy.MASTER else ''}{command}\n".encode())
        asking.shutdown(socket.SHUT_WR)
        while data := asking.recv(1 << 16):
            answer += data
            if len(answer) > _ANSWER_BYTES_MAX or time.monotonic() > until:
                raise OSError(errno.EMSGSIZE, "haproxy answers without end")
    return answer.decode("utf-8", "replace")
