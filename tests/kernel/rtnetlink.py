"""Short forms for tests: list the kernel's objects in a namespace, and write messages without naming each field."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from netloom.agent.kernel import addresses, links, neighbours, netlink, routes, rules
from netloom.agent.kernel.addresses import AddressRow
from netloom.agent.kernel.neighbours import NeighbourRow
from netloom.agent.kernel.netlink import Message, Socket
from netloom.agent.kernel.routes import RouteRow
from netloom.netobjects import MAIN_TABLE, Address, Neighbour, Route, Rule

_T = TypeVar("_T")


def list_addresses(namespace: str) -> list[AddressRow]:
    return _listed(namespace, addresses.list_addresses_over)


def list_routes(namespace: str) -> list[RouteRow]:
    return _listed(namespace, routes.list_routes_over)


def list_rules(namespace: str) -> list[Rule]:
    return _listed(namespace, lambda rtnetlink, _: rules.list_rules_over(rtnetlink))


def list_neighbours(namespace: str) -> list[NeighbourRow]:
    return _listed(namespace, neighbours.list_neighbours_over)


def _listed(namespace: str, listing: Callable[[Socket, dict[int, str]], list[_T]]) -> list[_T]:
    with Socket(netlink.NETLINK_ROUTE, namespace) as rtnetlink:
        return listing(rtnetlink, {link.index: link.name for link in links.list_links_over(rtnetlink)})


def add_address(link: str, cidr: str) -> Message:
    return addresses.add_address(Address(link=link, cidr=cidr))


def delete_address(link: str, cidr: str) -> Message:
    return addresses.delete_address(Address(link=link, cidr=cidr))


def add_route(destination: str, link: str, via: str = "", source: str = "", table: int = MAIN_TABLE) -> Message:
    """Add a route; EEXIST when one to the same destination exists."""
    route = Route(table=table, destination=destination, link=link, via=via, source=source)
    flags = netlink.NLM_F_CREATE | netlink.NLM_F_EXCL
    return replace(routes.replace_route(route), flags=flags, what=f"add route {route}")


def replace_route(destination: str, link: str, via: str = "", source: str = "", table: int = MAIN_TABLE) -> Message:
    return routes.replace_route(Route(table=table, destination=destination, link=link, via=via, source=source))


def delete_route(destination: str, link: str = "", via: str = "", source: str = "", table: int = MAIN_TABLE) -> Message:
    return routes.delete_route(Route(table=table, destination=destination, link=link, via=via, source=source))


def add_rule(priority: int, mark: int, mask: int, table: int) -> Message:
    return rules.add_rule(Rule(priority=priority, mark=mark, mask=mask, table=table))


def delete_rule(priority: int, mark: int, mask: int, table: int) -> Message:
    return rules.delete_rule(Rule(priority=priority, mark=mark, mask=mask, table=table))


def replace_neighbour(link: str, address: str, mac: str) -> Message:
    return neighbours.replace_neighbour(Neighbour(link=link, address=address, mac=mac))


def delete_neighbour(link: str, address: str) -> Message:
    return neighbours.delete_neighbour(Neighbour(link=link, address=address, mac=""))
