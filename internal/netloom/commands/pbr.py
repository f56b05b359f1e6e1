"""The custom actions ``pbr-*`` that change a scope: an operator's route tables, routes and rules.

Adding the same object again changes nothing. An object that conflicts with an existing one is refused; the operator has
to delete the existing one first. Deleting an object that does not exist succeeds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Literal, TypeVar

import msgspec
from msgspec.structs import replace

from netloom import names
from netloom.commands.actions import success_json
from netloom.commands.transition import Context
from netloom.errors import BadRequest, HostRefused
from netloom.protocol.custom import CustomAction
from netloom.protocol.pbr import (
    OF_THE_KERNEL,
    PRIORITY_MAX,
    PRIORITY_MIN,
    TABLE_MAX,
    RouteParams,
    RuleParams,
    TableParams,
    has_table_params,
    parse_route,
    parse_rule,
    parse_table,
)
from netloom.protocol.scalars import quoted
from netloom.state import Pbr, PbrRoute, PbrRule, PbrTable, Scope

_T = TypeVar("_T")

# The maximum of tables, of routes and of rules in a scope: the kernel compares each outward packet with every rule.
EACH_MAX = 256
_FIRST_TABLE = 100  # the first number for tables that are created by name only

Params = Mapping[str, str]


class Action(msgspec.Struct, frozen=True):
    """One action: ``change`` returns the new ``pbr`` of the scope, ``message`` describes the result.

    ``kind``: as in :mod:`netloom.commands.table`. ``message`` gets the scope after the change.
    """

    kind: Literal["builds", "removes"]
    change: Callable[[Scope, Params], Pbr]
    message: Callable[[Scope, Params], str]


def transition(scope: Scope, payload: CustomAction, context: Context) -> Scope:
    """The scope after the action. Raises BadRequest for actions that do not change the state."""
    action = ACTIONS.get(payload.action)
    if action is None:
        raise BadRequest(f"custom-action {payload.action}: it reads the host and does not change the state")
    if action.kind == "builds" and not scope.revision:
        raise unknown_scope(payload.action, context.scope_id)
    return replace(scope, pbr=action.change(scope, payload.params))


def output(scope: Scope, payload: CustomAction, context: Context) -> str:
    """The output for the caller of CloudStack's API. A repeated action has the same output."""
    return success_json(ACTIONS[payload.action].message(scope, payload.params))


def limited_to_table(scope: Scope, params: Params) -> Scope:
    """``scope`` with the routes and rules of the table in ``params`` only; unchanged if they name no table.

    Raises BadRequest for an invalid name or number of a table.
    """
    if not has_table_params(params):
        return scope
    table = _match(scope.pbr, parse_table(params))
    number = table.number if table is not None else 0
    routes = tuple(it for it in scope.pbr.routes if it.table == number)
    rules = tuple(it for it in scope.pbr.rules if it.table == number)
    return replace(scope, pbr=replace(scope.pbr, routes=routes, rules=rules))


def unknown_scope(action: str, scope_id: str) -> HostRefused:
    """The error for a scope that has no state on this host."""
    kind = "VPC" if scope_id.startswith("vpc-") else "network"
    return HostRefused(
        f"custom-action {action}: nothing is known of {scope_id} on this host", hint=f"is the {kind} implemented?"
    )


# --------------------------------------------------------------------------------------------------------------- tables


def _create_table(scope: Scope, params: Params) -> Pbr:
    given, pbr = parse_table(params), scope.pbr
    if _match(pbr, given) is not None:
        return pbr
    taken = {it.number for it in pbr.tables}
    number = given.number or next(it for it in range(_FIRST_TABLE, TABLE_MAX) if it not in taken | OF_THE_KERNEL)
    table = PbrTable(number=number, name=given.name or f"table-{number}")
    if any(it.name == table.name for it in pbr.tables):
        raise BadRequest(f"payload.action-params: another table has the name {table.name}", hint=_known(pbr))
    tables = _not_too_many("tables", (*pbr.tables, table))
    return replace(pbr, tables=tuple(sorted(tables, key=lambda it: it.number)))


def _delete_table(scope: Scope, params: Params) -> Pbr:
    """Delete the table, its routes, and the rules that look it up."""
    pbr = scope.pbr
    table = _match(pbr, parse_table(params))
    if table is None:
        return pbr
    return Pbr(
        tables=tuple(it for it in pbr.tables if it != table),
        routes=tuple(it for it in pbr.routes if it.table != table.number),
        rules=tuple(it for it in pbr.rules if it.table != table.number),
    )


def _there_is(scope: Scope, params: Params) -> str:
    return f"table {_table(scope.pbr, params)}"


def _there_is_no(scope: Scope, params: Params) -> str:
    return f"no table {_named(scope, params)}"


def _named(scope: Scope, params: Params) -> str:
    """The name of the table if it exists; else the name or number in ``params``."""
    given = parse_table(params)
    table = _match(scope.pbr, given)
    return table.name if table is not None else given.name or str(given.number)


def _match(pbr: Pbr, given: TableParams) -> PbrTable | None:
    """The table with the given number or name; None if none has it. Raises BadRequest if they are of two tables."""
    for it in pbr.tables:
        by_number, by_name = given.number == it.number, given.name == it.name
        if (by_number and not given.name) or (by_name and not given.number) or (by_number and by_name):
            return it
        if by_number or by_name:
            raise BadRequest(
                f"payload.action-params: table {given.number} {given.name} is known as {it}", hint=_known(pbr)
            )
    return None


def _table(pbr: Pbr, params: Params) -> PbrTable:
    given = parse_table(params)
    table = _match(pbr, given)
    if table is None:
        raise BadRequest(
            f"payload.action-params: there is no table {given.name or given.number}",
            hint=f"pbr-create-table makes one; {_known(pbr)}",
        )
    return table


def _known(pbr: Pbr) -> str:
    return f"known: {', '.join(map(str, pbr.tables)) or 'none'}"


# --------------------------------------------------------------------------------------------------------------- routes


def _add_route(scope: Scope, params: Params) -> Pbr:
    pbr = scope.pbr
    route = _route(scope, _table(pbr, params).number, parse_route(params))
    for it in pbr.routes:
        if it == route:
            return pbr
        if (it.table, it.destination) == (route.table, route.destination):
            raise BadRequest(
                f"payload.action-params.route: table {pbr.name_of(it.table)} already has: {it}",
                hint="delete that route first",
            )
    routes = _not_too_many("routes", (*pbr.routes, route))
    return replace(pbr, routes=tuple(sorted(routes, key=lambda it: (it.table, _order(it.destination)))))


def _delete_route(scope: Scope, params: Params) -> Pbr:
    """Delete the route to the destination, if it has all given properties."""
    pbr, given = scope.pbr, parse_route(params)
    table = _match(pbr, parse_table(params))
    return replace(pbr, routes=tuple(it for it in pbr.routes if table is None or not _agrees(it, table, given)))


def _route_there_is(scope: Scope, params: Params) -> str:
    table = _table(scope.pbr, params)
    return f"{_route(scope, table.number, parse_route(params))} in table {table.name}"


def _route_there_is_no(scope: Scope, params: Params) -> str:
    return f"no {_text(params['route'])} in table {_named(scope, params)}"


def _agrees(route: PbrRoute, table: PbrTable, given: RouteParams) -> bool:
    return (
        (route.table, route.destination) == (table.number, given.destination)
        and given.kind in (None, route.kind)
        and given.via in ("", route.via)
        and given.link in ("", route.link)
        and given.source in ("", route.source)
    )


def _route(scope: Scope, table: int, given: RouteParams) -> PbrRoute:
    """The route with its link. Raises BadRequest if the namespace lacks the link, the address or the neighbour."""
    if given.kind in ("blackhole", "unreachable", "prohibit"):
        return PbrRoute(table=table, destination=given.destination, kind=given.kind)
    where = "payload.action-params.route"
    subnets = _subnets(scope)
    links = f"links here: {', '.join(subnets) or 'none yet'}"
    if given.link and given.link not in subnets:
        raise BadRequest(f"{where}: {quoted(given.link)} is not a link of {scope.scope_id}", hint=links)
    if given.via and not _is_host(given.via, subnets):
        raise BadRequest(f"{where}: via {given.via}: no neighbour has that address")
    own = _own_addresses(scope)
    if given.via in own or (given.source and given.source not in own):
        wrong = (
            f"via {given.via} is the device itself" if given.via in own else f"src {given.source} is not the device's"
        )
        raise BadRequest(f"{where}: {wrong}", hint=f"its addresses: {', '.join(own) or 'none yet'}")
    link = given.link
    if not link:
        fitting = [it for it, within in subnets.items() if given.via and any(_within(given.via, net) for net in within)]
        if len(fitting) != 1:
            which = f"through which link {given.via} is reached" if given.via else "where it leads"
            raise BadRequest(f"{where}: it does not say {which}", hint=f"give via, and dev with one of the {links}")
        (link,) = fitting
    return PbrRoute(table=table, destination=given.destination, link=link, via=given.via, source=given.source)


def _subnets(scope: Scope) -> dict[str, list[str]]:
    """The links of the scope, each with the subnets on it."""
    found: dict[str, list[str]] = {}
    for network in sorted(scope.networks.values(), key=lambda it: int(it.network_id)):
        found[names.guest_link(network.network_id)] = [it.cidr for it in network.ranges]
    for ip in sorted(scope.public_ips.values(), key=lambda it: (it.vlan, it.address)):
        gateway = [f"{ip.gateway}/32"] if ip.gateway else []
        found.setdefault(names.public_link(ip.vlan), []).extend([ip.cidr, *gateway])
    return found


def _own_addresses(scope: Scope) -> list[str]:
    devices = [it.device_ip for it in scope.networks.values()]
    return sorted({*filter(None, devices), *scope.public_ips}, key=lambda it: int(IPv4Address(it)))


def _is_host(address: str, subnets: Mapping[str, list[str]]) -> bool:
    """Whether a neighbour can have the address: unicast, and not the first or last address of a subnet."""
    it = IPv4Address(address)
    if it.is_multicast or it.is_loopback or it.is_reserved or it.is_unspecified or int(it) >> 24 == 0:
        return False
    networks = [IPv4Network(cidr, strict=False) for within in subnets.values() for cidr in within]
    return not any(it in (net.network_address, net.broadcast_address) for net in networks if net.prefixlen < 31)


def _within(address: str, cidr: str) -> bool:
    return IPv4Address(address) in IPv4Network(cidr, strict=False)


# ---------------------------------------------------------------------------------------------------------------- rules


def _add_rule(scope: Scope, params: Params) -> Pbr:
    pbr = scope.pbr
    table, given = _table(pbr, params), parse_rule(params)
    _check_guest_link(scope, given)
    there = _rule_like(pbr, table, given)
    if there is not None:
        return pbr
    rule = PbrRule(
        priority=given.priority or _next_priority(pbr),
        table=table.number,
        source=given.source,
        destination=given.destination,
        iif=given.iif,
    )
    for it in pbr.rules:
        if it.priority == rule.priority or replace(it, priority=rule.priority) == rule:
            raise BadRequest(
                f"payload.action-params.rule: there is already {it.priority}: {it.selector} "
                f"lookup {pbr.name_of(it.table)}",
                hint="delete that rule first, or give another priority",
            )
    rules = _not_too_many("rules", (*pbr.rules, rule))
    return replace(pbr, rules=tuple(sorted(rules, key=lambda it: it.priority)))


def _delete_rule(scope: Scope, params: Params) -> Pbr:
    pbr, given = scope.pbr, parse_rule(params)
    table = _match(pbr, parse_table(params))
    gone = _rule_like(pbr, table, given) if table is not None else None
    return replace(pbr, rules=tuple(it for it in pbr.rules if it != gone))


def _rule_there_is(scope: Scope, params: Params) -> str:
    table = _table(scope.pbr, params)
    rule = _rule_like(scope.pbr, table, parse_rule(params))
    assert rule is not None  # the transition has added it
    return f"{rule.priority}: {rule.selector} lookup {table.name}"


def _rule_there_is_no(scope: Scope, params: Params) -> str:
    return f"no {_text(params['rule'])} lookup {_named(scope, params)}"


def _rule_like(pbr: Pbr, table: PbrTable, given: RuleParams) -> PbrRule | None:
    """The rule with the same selectors and table, and with the given priority if there is one."""
    for it in pbr.rules:
        same = (it.source, it.destination, it.iif, it.table) == (
            given.source,
            given.destination,
            given.iif,
            table.number,
        )
        if same and given.priority in (0, it.priority):
            return it
    return None


def _next_priority(pbr: Pbr) -> int:
    """The priority after all others, so that the kernel tries rules in the order in which they were added."""
    highest = max((it.priority for it in pbr.rules), default=PRIORITY_MIN - 1)
    if highest >= PRIORITY_MAX:
        raise BadRequest(
            "payload.action-params.rule: a rule already has the last priority",
            hint=f"give one: priority {PRIORITY_MIN} to {PRIORITY_MAX}",
        )
    return highest + 1


def _check_guest_link(scope: Scope, given: RuleParams) -> None:
    links = [names.guest_link(it) for it in sorted(scope.networks, key=int)]
    if given.iif and given.iif not in links:
        raise BadRequest(
            f"payload.action-params.rule: {quoted(given.iif)} is not a guest link of {scope.scope_id}",
            hint=f"rules are about what guests send; guest links here: {', '.join(links) or 'none yet'}",
        )


def _not_too_many(what: str, items: tuple[_T, ...]) -> tuple[_T, ...]:
    if len(items) > EACH_MAX:
        raise BadRequest(f"payload.action-params: more than {EACH_MAX} {what} in one scope")
    return items


def _order(destination: str) -> tuple[int, int]:
    network = IPv4Network(destination)
    return int(network.network_address), network.prefixlen


def _text(given: str) -> str:
    return " ".join(given.split())


ACTIONS = {
    "pbr-create-table": Action("builds", _create_table, _there_is),
    "pbr-delete-table": Action("removes", _delete_table, _there_is_no),
    "pbr-add-route": Action("builds", _add_route, _route_there_is),
    "pbr-delete-route": Action("removes", _delete_route, _route_there_is_no),
    "pbr-add-rule": Action("builds", _add_rule, _rule_there_is),
    "pbr-delete-rule": Action("removes", _delete_rule, _rule_there_is_no),
}
