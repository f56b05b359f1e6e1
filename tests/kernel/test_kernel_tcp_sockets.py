"""TCP connections of a namespace are reset: both ends get an error, and nothing else changes."""

from __future__ import annotations

import socket
from contextlib import ExitStack

import pytest

from kernel.scratch import descriptors, joined
from netloom.agent.kernel import tcp_sockets
from netloom.agent.kernel.namespaces import inside
from netloom.agent.kernel.netlink import NetlinkError

PATIENCE_S = 20.0


def connected(stack: ExitStack, client_space: str, server_space: str, address: str) -> tuple[socket.socket, ...]:
    """A listening socket in ``server_space`` and the two ends of a connection to it: client, server."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(server_space):
        listener = stack.enter_context(socket.create_server((address, 7), family=family))
    with inside(client_space):
        client = stack.enter_context(socket.socket(family))
    client.settimeout(PATIENCE_S)
    client.connect((address, 7))
    server = stack.enter_context(listener.accept()[0])
    server.settimeout(PATIENCE_S)
    return listener, client, server


@pytest.mark.parametrize("address", ["10.9.0.1", "fd09::1"])
def test_both_ends_of_a_connection_get_an_error_and_the_server_goes_on(address: str) -> None:
    with joined() as (left, right), ExitStack() as stack:
        listener, client, server = connected(stack, right, left, address)
        with inside(right):
            waiting = stack.enter_context(socket.socket(listener.family))
        waiting.settimeout(PATIENCE_S)
        waiting.connect((address, 7))  # in the queue of the listening socket
        assert tcp_sockets.reset_connections(left) == 2
        for end in (client, waiting):
            with pytest.raises(ConnectionResetError):
                end.recv(10)
        with pytest.raises(ConnectionAbortedError):
            server.recv(10)
        with inside(right):
            another = stack.enter_context(socket.socket(listener.family))
        another.settimeout(PATIENCE_S)
        another.connect((address, 7))
        assert tcp_sockets.reset_connections(left) == 1
        assert tcp_sockets.reset_connections(left) == 0


def test_connections_of_other_namespaces_stay() -> None:
    with joined() as (left, right), joined() as (here, there), ExitStack() as stack:
        _, client, _ = connected(stack, right, left, "10.9.0.1")
        _, stays, stays_too = connected(stack, there, here, "10.9.0.1")
        assert tcp_sockets.reset_connections(left) == 1
        with pytest.raises(ConnectionResetError):
            client.recv(10)
        stays.sendall(b"x")
        assert stays_too.recv(10) == b"x"


def test_a_listing_that_is_cut_short_is_refused() -> None:
    with pytest.raises(NetlinkError, match="cut short"):
        tcp_sockets.reset_request(socket.AF_INET, bytes(51))


def test_no_file_descriptor_leaks() -> None:
    with joined() as (left, _):
        before = descriptors()
        tcp_sockets.reset_connections(left)
        assert descriptors() == before
