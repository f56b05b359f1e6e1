"""A namespace that the agent makes anew from nothing, and a full conntrack table: open connections, and commands."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Callable, Iterator

import pytest

from kernel.agent_host import AgentHost, act, agent_host, done, message, wait_until
from kernel.isolated_network import BRIDGE, NS, SERVER, WEB, WEB_IP, WEB_MAC, live
from kernel.lost_connections import Connection, Listener, fill_conntrack, is_reset, opened

SOURCE_NAT, FORWARDING = "203.0.113.20", "203.0.113.21"
OUTSIDE = "192.0.2.10"
FABRIC = ""


class World:
    """A host with network 204, a VM in it, and an outside host in the fabric."""

    def __init__(self, host: AgentHost) -> None:
        self.host = host
        live(host)
        for words in (
            f"ip addr add {OUTSIDE}/32 dev lo",
            "ip addr add 203.0.113.1/24 dev sw-eth2.101",
        ):
            host.run(*words.split(), pid=host.fabric)
        host.plug(WEB, BRIDGE, WEB_MAC, f"{WEB_IP}/24")
        host.ip("-n", WEB, "route", "add", "default", "via", SERVER)

    def open_socket(self, space: str, kind: int, protocol: int = 0, address: str = "") -> socket.socket:
        with self.host.within(space):
            return socket.socket(socket.AF_INET, kind, protocol)

    @contextlib.contextmanager
    def connections(self) -> Iterator[tuple[Connection, Connection]]:
        """One by source NAT, and one by a port forward at another address."""
        with (
            opened(self, WEB, OUTSIDE, 700, Listener(FABRIC, 700, OUTSIDE)) as out,
            opened(self, FABRIC, FORWARDING, 2222, Listener(WEB, 22), OUTSIDE) as inward,
        ):
            yield out, inward

    def is_silent(self) -> bool:
        """Whether a new connection of the VM is not answered."""
        with self.open_socket(WEB, socket.SOCK_STREAM) as client, self.open_socket(FABRIC, socket.SOCK_STREAM) as far:
            far.bind((OUTSIDE, 0))
            far.listen(1)
            client.settimeout(0.5)
            try:
                client.connect(far.getsockname())
            except TimeoutError:
                return True
            return False


@pytest.fixture
def world() -> Iterator[World]:
    with agent_host() as host:
        host.start()
        yield World(host)


def delete_namespace(host: AgentHost) -> None:
    """While the agent runs. Until it notices, packets still pass the old namespace, which its sockets keep."""
    host.ip("netns", "del", NS)
    wait_until(lambda: host.run("ip", "-br", "link", "show", "up", namespace=NS, check=False).count("@") == 2)


def lose_power(host: AgentHost) -> None:
    """The agent has ended and finds no namespace when it starts."""
    host.kill()
    host.ip("netns", "del", NS)
    wait_until(lambda: NS not in host.run("ip", "netns", "list"))
    host.start()


@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.parametrize("lose", [delete_namespace, lose_power])
def test_connections_through_a_namespace_that_was_made_anew_are_reset(
    world: World, lose: Callable[[AgentHost], None], first: str
) -> None:
    with world.connections() as connections:
        lose(world.host)
        assert [it.ends_are_reset(first) for it in connections] == [True, True]
    with world.connections() as connections:
        assert all(it.works() for it in connections)


def test_a_full_table_keeps_open_connections_and_commands_work(world: World) -> None:
    """The kernel drops the first packets of new connections. An open connection that is lost is reset."""
    with world.connections() as (out, inward), world.connections() as (lost, _):
        assert "nf_conntrack_max" not in message(act(world.host, "check"))
        fill_conntrack(world.host.path(f"/run/netns/{NS}"), "10.10.1.99", SOURCE_NAT)
        told = message(act(world.host, "check"))
        assert re.search(r"\d+ of \d+ connections of .* are in use.*nf_conntrack_max", told)
        assert world.is_silent()
        assert out.works()
        assert inward.works()
        port = str(lost.client.getsockname()[1])
        world.host.run("conntrack", "-D", "-p", "tcp", "--orig-port-src", port, namespace=NS)
        assert lost.ends_are_reset("server")
        # The forward is removed. Nothing else changes.
        done(world.host.call("056", "delete-port-forward"))
        assert is_reset(inward.server)
        assert out.works()
        world.host.run("conntrack", "-F", namespace=NS)
        assert not world.is_silent()
