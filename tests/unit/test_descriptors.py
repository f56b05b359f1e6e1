"""Sockets whose descriptors get high numbers stay as they are."""

from __future__ import annotations

import os
import socket

import pytest

from netloom.agent.kernel.descriptors import high_socket


@pytest.mark.mutation("a-lent-socket-does-not-block", instead="True")
def test_a_socket_of_another_process_stays_non_blocking() -> None:
    """That process has the same open file. Its event loop would hang in an accept(2) that another one was faster at."""
    owners, end = socket.socketpair()
    with owners, end:
        owners.setblocking(False)
        with high_socket(socket.socket(fileno=os.dup(owners.fileno()))):
            assert not os.get_blocking(owners.fileno())


@pytest.mark.parametrize("timeout_s", [0.0, 2.5])
def test_a_socket_keeps_its_timeout(timeout_s: float) -> None:
    ours, end = socket.socketpair()
    with end:
        ours.settimeout(timeout_s)
        with high_socket(ours) as moved:
            assert moved.gettimeout() == timeout_s
