"""rtnetlink events of one namespace: additions, changes and removals, in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from kernel.rtnetlink import (
    add_address,
    add_route,
    add_rule,
    delete_address,
    delete_neighbour,
    delete_rule,
    replace_neighbour,
)
from kernel.scratch import descriptors, joined, readable, scratch, settled, tool
from netloom.agent.kernel import links
from netloom.agent.kernel.addresses import AddressRow
from netloom.agent.kernel.links import Link
from netloom.agent.kernel.neighbours import NeighbourRow
from netloom.agent.kernel.routes import RouteRow
from netloom.agent.kernel.watch import Event, NamesWatch, Watch
from netloom.netobjects import Rule


@pytest.fixture
def ns() -> Iterator[str]:
    with scratch() as name:
        yield name


def until(watch: Watch, enough: Callable[[list[Event]], bool]) -> list[Event]:
    events: list[Event] = []
    while not enough(events):
        assert readable(watch), events
        events += watch.read()
    return events


def test_link_events_are_those_of_the_watched_namespace(ns: str) -> None:
    with scratch() as other, Watch(ns, "link") as watch:
        links.change(other, [links.make_bridge("elsewhere")])
        links.change(ns, [links.make_bridge("br0"), links.set_up("br0"), links.set_alias("br0", "netloom")])
        links.change(ns, [links.delete_link("br0")])
        events = until(watch, lambda seen: any(it.gone for it in seen))
        rows = [(it.gone, it.row.name, it.row.alias) for it in events if isinstance(it.row, Link)]
    assert rows[0] == (False, "br0", "")
    assert (False, "br0", "netloom") in rows
    assert rows[-1] == (True, "br0", "netloom")
    assert {name for _, name, _ in rows} == {"br0"}


def test_address_and_route_events_contain_link_names(ns: str) -> None:
    with Watch(ns, "address", "route") as watch:
        links.change(ns, [links.make_bridge("br0"), links.set_up("br0"), add_address("br0", "10.7.0.1/24")])
        links.change(ns, [add_route("198.51.100.0/24", "br0", via="10.7.0.9")])
        links.change(ns, [delete_address("br0", "10.7.0.1/24")])
        events = until(watch, lambda seen: any(it.kind == "address" and it.gone for it in seen))
    addresses = [(it.gone, it.row.address.link, it.row.address.cidr) for it in events if isinstance(it.row, AddressRow)]
    assert [it for it in addresses if it[2] == "10.7.0.1/24"] == [
        (False, "br0", "10.7.0.1/24"),
        (True, "br0", "10.7.0.1/24"),
    ]
    routes = [(it.gone, it.row.route.link, it.row.route.via) for it in events if isinstance(it.row, RouteRow)]
    assert (False, "br0", "10.7.0.9") in routes
    assert not any(isinstance(it.row, Link) for it in events)


def test_reading_without_events_returns_an_empty_list(ns: str) -> None:
    with Watch(ns) as watch:
        assert watch.read() == []


def test_an_overrun_is_reported(ns: str) -> None:
    """When events are lost in a full buffer, the reader gets an overrun event and can read the state again."""
    links.change(ns, [links.make_bridge("br0"), links.set_up("br0")])
    with Watch(ns, "link") as watch:
        links.change(ns, [links.set_alias("br0", f"number {i}") for i in range(15000)])
        events = watch.read()
        assert "overrun" in {it.kind for it in events}
        links.change(ns, [links.set_alias("br0", "the last")])
        (last,) = until(watch, lambda seen: len(seen) == 1)
        assert isinstance(last.row, Link)
        assert last.row.alias == "the last"


async def test_an_event_loop_can_wait_for_events(ns: str) -> None:
    came = asyncio.Event()
    with Watch(ns, "link") as watch:
        asyncio.get_running_loop().add_reader(watch, came.set)
        await asyncio.to_thread(links.change, ns, [links.make_bridge("br0")])
        async with asyncio.timeout(10):
            await came.wait()
        asyncio.get_running_loop().remove_reader(watch)
        assert [it.row.name for it in watch.read() if isinstance(it.row, Link)] == ["br0"]


def test_no_file_descriptor_leaks(ns: str) -> None:
    before = descriptors()
    for _ in range(20):
        with Watch(ns):
            pass
    assert descriptors() == before


def test_events_of_learned_neighbours_are_ignored() -> None:
    with joined() as (left, _):
        settled(left, "left")
        with Watch(left, "rule", "neighbour") as watch:
            tool(left, "ping", "-c1", "-W5", "10.9.0.2")
            links.change(left, [replace_neighbour("left", "10.9.0.3", "0a:00:00:00:09:03")])
            links.change(left, [delete_neighbour("left", "10.9.0.3")])
            links.change(left, [add_rule(20001, 1, 0xFFFF, 20001), delete_rule(20001, 1, 0xFFFF, 20001)])
            events = until(watch, lambda seen: any(it.kind == "rule" and it.gone for it in seen))
        neighbours = [(it.row.neighbour.address, it.row.permanent) for it in events if isinstance(it.row, NeighbourRow)]
        assert neighbours == [("10.9.0.3", True), ("10.9.0.3", False)]
        rules = [(it.gone, it.row.priority, it.row.mark) for it in events if isinstance(it.row, Rule)]
        assert rules == [(False, 20001, 1), (True, 20001, 1)]


def test_removed_namespace_names_are_reported() -> None:
    watch = NamesWatch()
    try:
        with scratch() as name:
            assert name not in (watch.read() or ())
        gone: set[str] = set()
        while name not in gone:
            assert readable(watch)
            gone |= watch.read() or set()
    finally:
        watch.close()
